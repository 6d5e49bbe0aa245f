"""Compare two results.json of benchmarks/bench.py: how many times worse each of our rows became.

python benchmarks/compare.py OLD.json NEW.json [--fail_above 1.2] [--relative]

Above 1 is worse, below 1 better. Exits with 1 if a row of ours is worse than --fail_above.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

KEY = ("section", "what", "shape", "variant")  # what names a row
Key = tuple[str, ...]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Rows that say which way is better, by section, what, shape and variant."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = {}
    for row in rows:
        if row["better"]:  # a profile, say, is neither better nor worse
            key = tuple(row[name] for name in KEY)
            found[key] = row
    return found


def peer_ratio(row: dict[str, Any]) -> float:
    """NaN where there is no peer, which JSON holds as null."""
    return float(row["ratio_to_best_peer"] or math.nan)


def regression(
    old: dict[str, Any], new: dict[str, Any], relative: bool = False
) -> tuple[float, bool]:
    """How many times worse new is than old, and whether the two spreads [low, high] are apart.

    relative: by ratio_to_best_peer, which a faster or slower machine does not change.
    """
    if relative:
        return peer_ratio(old) / peer_ratio(new), True  # a ratio has no spread of its own
    # Whether every round of one was faster than every round of the other
    apart = new["high"] < old["low"] or old["high"] < new["low"]
    # Turned so that above 1 is worse, for speeds and for memory
    if old["better"] == "higher":
        worse, base = old["median"], new["median"]
    else:
        worse, base = new["median"], old["median"]
    # A median of zero (no memory, no difference) has no ratio
    ratio = worse / base if worse > 0 and base > 0 else math.nan
    return ratio, apart


def tell(key: Key, ratio: float, apart: bool) -> None:
    """Prints the line of one row."""
    verdict = "worse" if ratio > 1 else "better"
    if not apart:  # the machine's own ups and downs may have made it
        verdict += " (within the spread)"
    print(f"{ratio:6.2f}x {verdict}: {' | '.join(key)}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").splitlines()[0]
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.add_argument("old", type=Path, metavar="OLD.json", help="results before")
    p.add_argument("new", type=Path, metavar="NEW.json", help="results after")
    p.add_argument(
        "--fail_above",
        type=float,
        default=math.inf,
        metavar="RATIO",
        help="exit 1 if one of our rows is worse by more than this",
    )
    p.add_argument(
        "--relative",
        action="store_true",
        help="compare ratios to the best peer, not speeds: for two machines",
    )
    args = p.parse_args(argv)
    try:
        args.old, args.new = read(args.old), read(args.new)
    except (OSError, ValueError, KeyError, TypeError) as e:
        p.error(f"not a results.json of benchmarks/bench.py: {e}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    old, new = args.old, args.new
    # Only rows of the same section, sizes and variant say anything about each other
    found = {key: regression(old[key], new[key], args.relative) for key in old.keys() & new.keys()}

    # The worst first; rows without a ratio are counted, not shown
    shown = {key: pair for key, pair in found.items() if math.isfinite(pair[0])}
    for key, (ratio, apart) in sorted(shown.items(), key=lambda item: -item[1][0]):
        tell(key, ratio, apart)
    # What was renamed or no longer measured should not get lost without a word
    for key in sorted(old.keys() - new.keys()):
        print(f"only in old: {' | '.join(key)}")
    for key in sorted(new.keys() - old.keys()):
        print(f"only in new: {' | '.join(key)}")

    # A peer that became slower is no regression of ours
    ours = [ratio for key, (ratio, _) in found.items() if key[3].startswith("ours")]
    n_worse = sum(ratio > args.fail_above for ratio in ours)
    print(f"{len(found)} rows compared, {n_worse} of ours worse by more than {args.fail_above:g}x")
    return int(n_worse > 0)


if __name__ == "__main__":
    sys.exit(main())

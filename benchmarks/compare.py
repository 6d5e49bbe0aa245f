"""Compare two results.json of benchmarks/bench.py: how many times worse (above 1) or better (below 1) each of our rows became.

python benchmarks/compare.py OLD.json NEW.json [--fail_above 1.2] [--relative]     (exit 1 if a row is worse by more than that)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

KEY = ("section", "what", "shape", "variant")


def read(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows that say which way is better, by section, what, shape and variant."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {tuple(r[k] for k in KEY): r for r in rows if r["better"]}


def regression(old: dict[str, Any], new: dict[str, Any], relative: bool = False) -> tuple[float, bool]:
    """How many times worse new is than old, and whether the two spreads [low, high] are apart.

    relative: by ratio_to_best_peer, which a faster or slower machine does not change (NaN where there is no peer).
    """
    if relative:
        before, after = (float(r["ratio_to_best_peer"] or math.nan) for r in (old, new))
        return before / after, True
    apart = new["high"] < old["low"] or old["high"] < new["low"]
    top, bottom = (old["median"], new["median"]) if old["better"] == "higher" else (new["median"], old["median"])
    return (top / bottom if top > 0 and bottom > 0 else math.nan), apart


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    p.add_argument("old", type=Path, metavar="OLD.json", help="results before")
    p.add_argument("new", type=Path, metavar="NEW.json", help="results after")
    p.add_argument(
        "--fail_above", type=float, default=math.inf, metavar="RATIO", help="exit 1 if one of our rows is worse by more than this"
    )
    p.add_argument("--relative", action="store_true", help="compare ratios to the best peer, not speeds: for two machines")
    args = p.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
    except (OSError, ValueError, KeyError, TypeError) as e:
        p.error(f"not a results.json of benchmarks/bench.py: {e}")
    found = {key: regression(old[key], new[key], args.relative) for key in old.keys() & new.keys()}
    for key, (ratio, apart) in sorted(found.items(), key=lambda item: -item[1][0] if math.isfinite(item[1][0]) else math.inf):
        if math.isfinite(ratio):
            print(f"{ratio:6.2f}x {'worse' if ratio > 1 else 'better'}{'' if apart else ' (within the spread)'}: {' | '.join(key)}")
    for name, only in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        for key in sorted(only):
            print(f"only in {name}: {' | '.join(key)}")
    bad = [key for key, (ratio, _) in found.items() if ratio > args.fail_above and key[3].startswith("ours")]
    print(f"{len(found)} rows compared, {len(bad)} of ours worse by more than {args.fail_above:g}x")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

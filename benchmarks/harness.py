"""What every section of the benchmark shares: races, rows of results, peers that may be missing."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import statistics
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts
CPU = torch.device("cpu")
Row = dict[str, Any]  # one line of the results, as row() makes it
Calls = dict[str, Callable[[], Any]]  # variants of a race: what each calls over and over
HOW_TO_INSTALL = {
    "dictionary_learning": "pip install --no-deps dictionary-learning==0.1.0",
    "sparsify": "pip install --no-deps eai-sparsify==1.3.3 natsort simple-parsing schedulefree",
    "sae_lens": "pip install -r requirements-dev.txt",
    "transformer_lens": "pip install -r requirements-dev.txt",
}
SKIPPED: list[str] = []  # what could not be measured, for the end of the report


def skip(what: str, why: object) -> None:
    """Notes and prints, in one line, what could not be measured."""
    reason = " ".join(str(why).split())  # errors may have many lines
    SKIPPED.append(f"{what}: {reason[:200]}")
    print(f"  skipped: {SKIPPED[-1]}", flush=True)


def peer(name: str) -> Any:
    """The module `name`, or None, noted, if it cannot be imported."""
    library = name.partition(".")[0]
    # dictionary_learning imports nnsight for its buffer of activations; its trainers do without,
    # so an empty module will do
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object  # type: ignore[attr-defined]
    if library == "dictionary_learning":
        sys.modules.setdefault("nnsight", stub)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some greet
            return importlib.import_module(name)
    except ImportError as e:
        skip(library, f"not installed ({e}); {HOW_TO_INSTALL.get(library, '')}")
    finally:  # the stub must not pass for the library elsewhere
        if sys.modules.get("nnsight") is stub:
            del sys.modules["nnsight"]


def seconds_of(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds a call, over `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def warmed_up(call: Callable[[], Any]) -> float:
    """Seconds of the second call, or of the first where that takes longer than 2 seconds.

    The first calls compile and touch memory for the first time; they are no part of a race.
    """
    first = seconds_of(call)
    return first if first > 2 else seconds_of(call)


def random_text(folder: Path, name: str, n_kinds: int, n_words: int) -> list[object]:
    """Flags of the scripts for a text of `n_words` random words, each a token of `n_kinds`.

    For what does not depend on what a model learns, as time and memory do not.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(n_kinds)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer_file = folder / f"{name}.json"
    tokenizer.save(str(tokenizer_file))

    # The same words for the same sizes, so that the token cache is found again
    words = np.random.default_rng(0).integers(n_kinds, size=(n_words // 50, 50))  # [lines, 50]
    lines = []
    for line in words.tolist():
        lines.append(" ".join(f"w{i}" for i in line))
    text_file = folder / f"{name}.txt"
    text_file.write_text("\n".join(lines), encoding="utf-8")
    return ["--dataset", text_file, "--tokenizer", tokenizer_file]


def race(variants: Calls, seconds: float) -> dict[str, list[float]]:
    """Seconds a call, of each variant in each round, after its warm-up.

    Rounds go on until the variants have had `seconds` each, and there are at least three. The order
    is turned round after each round, A B C, C B A, A B C ...: a variant that shares its model and
    memory with another is then not always the one that finds them gone cold. A variant that fails
    is skipped, unless it is ours.
    """
    repeats: dict[str, int] = {}  # calls a round: a round of a variant lasts a tenth of a second
    times: dict[str, list[float]] = {}  # seconds a call, one a round
    for name, call in variants.items():
        try:
            repeats[name] = max(1, math.ceil(0.1 / warmed_up(call)))
            times[name] = []
        except Exception as e:  # a peer may fail in any way; the others go on
            if name.startswith("ours"):
                raise
            skip(name, f"{type(e).__name__}: {e}")

    order = list(times)  # without those that failed
    # The fast and the slow get as many rounds each, so that rounds can be compared in pairs
    end = time.perf_counter() + seconds * len(times)
    rounds = 0
    while time.perf_counter() < end or rounds < 3:
        for name in order:
            times[name].append(seconds_of(variants[name], repeats[name]))
        order.reverse()
        rounds += 1
    return times


def row(
    section: str,
    what: str,
    shape: str,
    variant: str,
    values: Iterable[float],
    unit: str,
    better: str = "",
    ratio: float = math.nan,
) -> Row:
    """One line of the results: median, lowest and highest of `values`, which are in `unit`.

    better: higher, lower, or "" (not to be compared). ratio: to the best peer, above 1 is better.
    """
    # The keys of results.json, which compare.py and RESULTS.md read
    numbers = [float(value) for value in values]
    return {
        "section": section,
        "what": what,
        "shape": shape,
        "variant": variant,
        "median": statistics.median(numbers),
        "low": min(numbers),
        "high": max(numbers),
        "n": len(numbers),
        "unit": unit,
        "better": better,
        "ratio_to_best_peer": ratio,
    }


def rates(
    section: str,
    what: str,
    shape: str,
    times: dict[str, list[float]],
    work: float | dict[str, float],
    unit: str,
) -> list[Row]:
    """Rows of a race (seconds a call) as work a second, in `unit`.

    work: what a call does, of every variant or of each. ratio_to_best_peer: this median over that
    of the fastest variant that is neither ours nor a bound.
    """
    work_of = work if isinstance(work, dict) else dict.fromkeys(times, work)
    # A library's median time, not its best: it is what a user waits for
    medians = {name: work_of[name] / statistics.median(times[name]) for name in times}
    peers = [rate for name, rate in medians.items() if not name.startswith(("ours", "bound"))]
    best_peer = max(peers, default=math.nan)  # where none is installed, no ratio

    rows = []
    for name, seconds in times.items():
        values = [work_of[name] / s for s in seconds]  # a rate a round, which gives the spread
        ratio = medians[name] / best_peer
        rows.append(row(section, what, shape, name, values, unit, "higher", ratio))
    return rows


def without_peers(rows: list[Row]) -> list[Row]:
    """The same rows without a ratio to the best peer: of a race in which no variant is ours."""
    return [found | {"ratio_to_best_peer": math.nan} for found in rows]


REST = "elementwise, norms, copies, rest"  # what torch.compile fused counts as elementwise


def kind_of(kernel: str, kinds: dict[str, tuple[str, ...]]) -> str:
    """The first of `kinds` of which a word is part of the kernel's name."""
    for kind, words in kinds.items():
        if any(word in kernel.lower() for word in words):
            return kind
    return REST


def breakdown(call: Callable[[], Any], kinds: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Share of the CPU time of one call, by kind of kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    total: Counter[str] = Counter()  # microseconds
    for event in profile.key_averages():
        # A kernel's own time, without that of the kernels it calls, so that nothing counts twice
        total[kind_of(event.key, kinds)] += event.self_cpu_time_total
    everything = sum(total.values())
    return {kind: microseconds / everything for kind, microseconds in total.items()}


def bfloat16_is_fast() -> bool:
    """Whether the scripts would multiply in bfloat16 here; elsewhere its products are emulated,
    which takes minutes."""
    import janus_adaptive as janus

    return janus.multiplies_bfloat16_fast("cpu")


def autocast(on: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)

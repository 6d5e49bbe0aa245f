"""What every section of the benchmark shares: races, rows of results, and peers that may not be installed."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
Row = dict[str, Any]
HOW = {
    "dictionary_learning": "pip install --no-deps dictionary-learning==0.1.0",
    "sparsify": "pip install --no-deps eai-sparsify==1.3.3 natsort simple-parsing schedulefree",
    "sae_lens": "pip install -r requirements-dev.txt",
    "transformer_lens": "pip install -r requirements-dev.txt",
}
SKIPPED: list[str] = []


def skip(what: str, why: object) -> None:
    """Notes and prints, in one line, what could not be measured."""
    SKIPPED.append(f"{what}: {' '.join(str(why).split())[:200]}")
    print(f"  skipped: {SKIPPED[-1]}", flush=True)


def peer(name: str) -> Any:
    """The module `name`, or None, noted, if it cannot be imported."""
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object  # type: ignore[attr-defined]
    if name.startswith("dictionary_learning"):  # it imports nnsight for its buffer; its trainers do without
        sys.modules.setdefault("nnsight", stub)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except ImportError as e:
        skip(name.partition(".")[0], f"not installed ({e}); {HOW.get(name.partition('.')[0], '')}")
    finally:
        if sys.modules.get("nnsight") is stub:
            del sys.modules["nnsight"]


def race(variants: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds a call, of each variant in each round: rounds until the variants have had `seconds` each, at least three.

    The order is turned round after each round, A B C, C B A, A B C ...: a variant that shares its model and memory with another
    is then not always the one that finds them gone cold. The first two calls of a variant (compilation, first touch of memory) do
    not count, only the first if it takes longer than 2 seconds; one that fails is skipped.
    """
    repeats, times = {}, {}
    for name, call in variants.items():
        try:
            for _ in range(2):
                start = time.perf_counter()
                call()
                if (took := time.perf_counter() - start) > 2:
                    break
            repeats[name], times[name] = max(1, math.ceil(0.1 / took)), []
        except Exception as e:  # a peer may fail in any way; the others go on
            if name.startswith("ours"):
                raise
            skip(name, f"{type(e).__name__}: {e}")
    order, end = list(times), time.perf_counter() + seconds * len(times)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                variants[name]()
            times[name].append((time.perf_counter() - start) / repeats[name])
        order.reverse()
    return times


def row(section: str, what: str, shape: str, variant: str, values: Any, unit: str, better: str = "", ratio: float = math.nan) -> Row:
    """One line of the results: median, lowest and highest of `values`. `better`: higher, lower, or "" (not to be compared)."""
    values = [float(v) for v in values]
    facts = dict(section=section, what=what, shape=shape, variant=variant, median=statistics.median(values), low=min(values))
    return facts | dict(high=max(values), n=len(values), unit=unit, better=better, ratio_to_best_peer=ratio)


def rates(section: str, what: str, shape: str, times: dict[str, list[float]], work: float | dict[str, float], unit: str) -> list[Row]:
    """Rows of a race as work a second. ratio_to_best_peer: this median over that of the fastest variant that is not ours."""
    of = work if isinstance(work, dict) else dict.fromkeys(times, work)
    medians = {name: of[name] / statistics.median(t) for name, t in times.items()}
    best = max((m for name, m in medians.items() if not name.startswith(("ours", "bound"))), default=math.nan)
    return [row(section, what, shape, k, [of[k] / s for s in t], unit, "higher", medians[k] / best) for k, t in times.items()]


def half() -> bool:
    """Whether the scripts would multiply in bfloat16 here."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))


def autocast(on: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)

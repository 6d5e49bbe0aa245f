"""Measure this project beside the libraries that people would otherwise use, on this machine.

Every comparison is a race: the variants run in turn, A B B A A B ..., in one process, after warm-up
calls, so that a change of the machine's speed hits all of them. A row gives the median over the
rounds, with the lowest and the highest. Peers get what a user could give them: the same shapes,
data and optimiser, autocast and torch.compile where they work.

Writes  <out>/results.json   rows {section, what, shape, variant, median, low, high, n, unit,
                             better, ratio_to_best_peer}
        <out>/RESULTS.md     the same as tables
Two runs are compared with benchmarks/compare.py OLD.json NEW.json, two commits with
benchmarks/ab.py.

Full    python benchmarks/bench.py            (make bench: under 25 minutes on two idle cores)
Quick   python benchmarks/bench.py --quick    (tiny shapes, into runs/bench: does every section run?
                                               The numbers mean nothing)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, SKIPPED, Row, bfloat16_is_fast, race, rates, skip, without_peers
from race_ablation import ablation
from race_energy import gradients, nulls
from race_harvest import harvest
from race_memory import memory
from race_sae import sae
from race_scaling import scaling
from race_training import training

import janus_adaptive as janus


# ------------------------------------------------------------------------------------- the hardware
def matrix_products(n: int, seconds: float) -> list[Row]:
    """GFLOP/s of n x n matrices in both precisions."""

    def product(dtype: torch.dtype) -> Any:
        a = torch.randn(n, n).to(dtype)
        b = torch.randn(n, n).to(dtype)
        out = torch.randn(n, n).to(dtype)  # made once: allocating is no part of a product
        return lambda: torch.mm(a, b, out=out)

    calls = {"float32": product(torch.float32)}
    if bfloat16_is_fast():
        calls = {"bfloat16": product(torch.bfloat16), **calls}
    else:
        skip("matrix products in bfloat16", "emulated here")
    flops = 2 * n**3  # a multiplication and an addition each
    shape = f"{n} x {n} x {n}"
    return rates("machine", "matrix product", shape, race(calls, seconds), flops / 1e9, "GFLOP/s")


def memory_bandwidth(size: int, seconds: float) -> list[Row]:
    """GB/s of float32 arrays of `size` numbers."""
    a, b = torch.ones(size), torch.ones(size)
    c = torch.ones(size)  # 4 bytes a number
    copy = "copy (2 arrays)"
    triad = "triad a = b + s c (3 arrays)"
    calls = {copy: lambda: a.copy_(b), triad: lambda: torch.add(b, c, alpha=0.5, out=a)}
    work = {copy: 2 * 4 * size / 1e9, triad: 3 * 4 * size / 1e9}  # GB
    return rates("machine", "memory", "", race(calls, seconds), work, "GB/s")


def disk_bandwidth(n_blocks: int, folder: Path, seconds: float) -> list[Row]:
    """MB/s of a file of so many blocks of 16 MiB, on the disk when the call returns."""
    block = os.urandom(1 << 24)  # nothing that a file system could compress

    def write() -> None:
        with tempfile.NamedTemporaryFile(dir=folder) as f:
            for _ in range(n_blocks):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())  # else it would be the speed of the system's cache

    times = race({"write and fsync": write}, seconds)
    return rates("machine", "disk", "", times, n_blocks * len(block) / 1e6, "MB/s")


def machine(options: argparse.Namespace) -> list[Row]:
    """What the hardware gives: matrix products, memory, disk."""
    seconds = options.seconds / 10
    rows = []
    # Around the sizes of a full training step, 2,048 tokens a micro-batch
    for n in (256, 512) if options.quick else (2048, 3072, 4096):
        rows += without_peers(matrix_products(n, seconds))
    # Numbers an array: 256 MB of them, far more than a cache
    size = 1 << (20 if options.quick else 26)
    rows += without_peers(memory_bandwidth(size, seconds))
    return rows + disk_bandwidth(1 if options.quick else 16, options.scratch, seconds)


# ------------------------------------------------------------------------------------------- report
# In the order in which they run; RESULTS.md shows their docstrings
SECTIONS = {
    section.__name__: section
    for section in (
        machine,
        training,
        sae,
        ablation,
        harvest,
        nulls,
        gradients,
        memory,
        scaling,
    )
}
PEERS = ("transformers", "sae-lens", "transformer-lens", "dictionary-learning", "eai-sparsify")


def cpu_name() -> str:
    # On Linux platform.processor() is often empty, or the architecture alone
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def describe() -> dict[str, Any]:
    """The machine and the versions behind the numbers."""
    capabilities = torch.cpu.get_capabilities()
    telling = ("avx2", "avx512_bf16", "amx_bf16")  # of what decides which kernels run
    facts = {
        "cpu": cpu_name(),
        "features": [name for name, has in capabilities.items() if has is True and name in telling],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compiler": shutil.which("c++"),
        "load_at_start": os.getloadavg()[0],  # 0: nobody else was at work
    }
    for name in PEERS:
        with contextlib.suppress(ImportError):  # not installed
            facts[name] = importlib.metadata.version(name)
    # The rest of the record, paths and arguments, is this machine's own
    record = janus.provenance()
    return facts | {key: record[key] for key in record if key in ("git", "versions", "time")}


def show(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def table_row(found: Row) -> str:
    """A row as a line of its section's table."""
    number = show(found["median"])
    if found["n"] > 1:  # a single measurement has no spread
        number += f" [{show(found['low'])}, {show(found['high'])}]"
    ratio = found["ratio_to_best_peer"]  # NaN without a peer
    cells = [
        found["what"],
        found["shape"],
        found["variant"],
        f"{number} {found['unit']}",
        str(found["n"]),
        f"{ratio:.2f}" if math.isfinite(ratio) else "",
    ]
    return f"| {' | '.join(cells)} |\n"


def introduction(results: dict[str, Any]) -> str:
    """What RESULTS.md says before its tables."""
    facts = results["machine"]
    peers = [f"{name} {facts[name]}" for name in PEERS if name in facts]  # the installed ones
    commit = facts["git"]["commit"][:8]
    if facts["git"]["dirty"]:
        commit += " with changes"
    # Line breaks are where they have always been: RESULTS.md is compared from commit to commit
    cores = f"{facts['cores']} cores, {facts['threads']} threads"
    features = ", ".join(facts["features"])
    return f"""# Benchmarks

{facts["cpu"]}, {cores}, {features}, C++ compiler {facts["compiler"]}; torch
{facts["versions"]["torch"]}, {", ".join(peers)}. {facts["time"]}, commit {commit}, \
load average at the start
{facts["load_at_start"]:.2f}, {results["seconds"] / 60:.0f} minutes: `{results["command"]}`

Variants of a table ran in turn, A B B A A B ..., in one process: median [lowest, highest] over n \
rounds. "x peer" is how many times
better than the best variant that is not ours. Tokens are random and models untrained where speed \
is measured; what is learnt
(FVU, differences in standard errors) is measured on real activations and text.
"""


def markdown(results: dict[str, Any]) -> str:
    """The results as tables, one a section."""
    text = introduction(results)
    sections = dict.fromkeys(found["section"] for found in results["rows"])  # each once, in order
    for section in sections:
        about = " ".join((SECTIONS[section].__doc__ or "").split())
        minutes = results["section_seconds"][section] / 60
        text += f"\n## {section}\n\n{about} {minutes:.1f} minutes.\n\n"
        text += "| what | shape | variant | median [low, high] | n | x peer |\n"
        text += "|---|---|---|---|---|---|\n"
        for found in results["rows"]:
            if found["section"] == section:
                text += table_row(found)
    if results["skipped"]:
        text += "\n## Not measured\n\n"
        for line in results["skipped"]:
            text += f"* {line}\n"
    return text


# ---------------------------------------------------------------------------------------------- run
def measure(name: str, options: argparse.Namespace) -> list[Row] | None:
    """The rows of one section, printed; None, noted, if it failed: the others are worth having."""
    print(f"{name} ...", flush=True)
    try:
        rows = SECTIONS[name](options)
    except Exception as e:  # of a peer, or because a script has changed
        traceback.print_exc()
        skip(name, f"failed with {type(e).__name__}: {e}")
        return None
    for found in rows:
        spread = f"{found['median']:.4g} [{found['low']:.4g}, {found['high']:.4g}] {found['unit']}"
        # As it goes: the whole takes half an hour
        print(f"  {found['what']} | {found['shape']} | {found['variant']}: {spread}", flush=True)
    return rows


def save(out: Path, results: dict[str, Any]) -> None:
    janus.write_json(out / "results.json", results)
    with janus.atomic(out / "RESULTS.md") as tmp:
        tmp.write_text(markdown(results), encoding="utf-8")


def run(options: argparse.Namespace, command: str) -> int:
    """Measures the sections, and saves what there is after each. 1 if one of them failed."""
    start = time.perf_counter()
    for folder in (options.out, options.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    SKIPPED.clear()
    # As the scripts do; the peers gain from it too
    janus.keep_memory()
    # What results.json holds; SKIPPED grows as the sections run
    results: dict[str, Any] = {
        "command": command,
        "machine": describe(),
        "rows": [],
        "skipped": SKIPPED,
        "section_seconds": {},
    }
    for name in options.sections:
        began = time.perf_counter()
        rows = measure(name, options)
        if rows is None:  # it stands under "Not measured"
            continue
        now = time.perf_counter()
        results["rows"] += rows
        results["section_seconds"][name] = now - began
        results["seconds"] = now - start
        # After each, so that one that is killed leaves what was measured
        save(options.out, results)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts kilobytes
    print(f"{options.out / 'RESULTS.md'}: {seconds:.0f} s, {peak:.1f} GB")
    # A peer that is not installed is no failure
    return int(any("failed with" in line for line in SKIPPED))


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="what to measure",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes: only shows that every section runs",
    )
    p.add_argument(
        "--whole",
        action="store_true",
        help="memory: every layer, and all sequences of hero analysis; over an hour",
    )
    p.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="time each variant of a race gets, seconds; at least three rounds",
    )
    p.add_argument(
        "--run",
        type=Path,
        default=Path("runs/demo"),
        help="folder of `make demo`: its model and activations",
    )
    p.add_argument(
        "--activations",
        type=Path,
        metavar="FILE.npy",
        help="real activations [N, D] for SAE quality; none: those of --run",
    )
    p.add_argument(
        "--out",
        type=Path,
        help="folder of the results; none: benchmarks, with --quick runs/bench",
    )
    options = p.parse_args(argv)
    if not 0 < options.seconds < 3600:  # NaN neither
        p.error(f"--seconds is {options.seconds}, expected a positive number below 3600")
    if options.quick:
        options.seconds = 0.0  # three rounds
    default = "runs/bench" if options.quick else "benchmarks"
    options.out = (options.out or ROOT / default).resolve()
    options.scratch = ROOT / "runs"  # on the disk that the scripts write to
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    # So that RESULTS.md says how to make it again
    words = sys.argv[1:] if argv is None else argv
    return run(options, " ".join(["python", "benchmarks/bench.py", *words]))


if __name__ == "__main__":
    sys.exit(main())

"""Compare the speed of two checkouts of this repository: A B, B A, A B ..., whole commands.

    python benchmarks/ab.py --old /path/to/other/checkout
    python benchmarks/ab.py --old DIR --sections sae --rounds 9 --fail_above 1.03

Each section is one command line of one script, run by each checkout in turn as a process of its
own, by this interpreter, on the same text and on what this checkout itself made of it: formats may
differ. Every command also runs cut short, to a few steps: what it takes then is its start
(imports, reading the text, measuring what the run will cost), and the rest is work, which is what
grows with a user's run. The ratio new / old is taken round by round, so that a change of the
machine's speed hits both. Printed: the median ratio over the rounds with its 95 % bootstrap
interval, of the CPU time of the process (which other work on the machine hardly changes): of the
work, and of the whole command, that also by the clock.
Commands run on as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import ROOT, random_text

# What a user would type; each reads what those above it wrote
COMMANDS = {
    "training": """janus_adaptive.py --dataset {folder}/words.txt --tokenizer {folder}/words.json
        --preset {preset} --n_layers 8 --d_model {d_model} --n_heads 8 --d_ff {d_ff}
        --seq_len {seq_len} --batch_size 8 --grad_accum 1 --compile off
        --steps {steps} --val_interval {steps} --control_interval 2
        --save_dir {folder}/model""",
    "harvest": """harvest_activations.py --model_path {folder}/model/janus_adaptive_final.pt
        --run_name ab --layers 2 5 --tokens {tokens} --save_dir {folder}/dumps""",
    "sae": """train_sae.py --activations_dir {folder}/dumps --runs ab --layers 5
        --arch topk --k 16 --expansion 8 --batch_size {sae_batch} --steps {sae_steps}
        --eval_tokens 5000 --save_dir {folder}/saes""",
    "ablation": """ablation_test.py --adaptive_model {folder}/model/janus_adaptive_final.pt
        --layers 2 5 --mode mean zero --dtype float32
        --n_seqs {n_seqs} --n_mean 8 --bootstrap 200 --save_file {folder}/results.csv""",
}
FULL = dict(  # half a minute a command on one thread, of which start is about a fifth
    preset="demo",
    d_model=256,
    d_ff=688,
    seq_len=256,
    n_words=400_000,
    steps=30,
    tokens=200_000,  # dumped, of each layer
    sae_batch=2048,
    sae_steps=150,
    n_seqs=24,  # through every head of two layers, twice
)
SHORT = dict(steps=1, tokens=20_000, sae_steps=1, n_seqs=8)  # the start, and little more
QUICK = dict(  # seconds, nearly all of them start
    preset="smoke",
    d_model=48,
    d_ff=128,
    seq_len=64,
    n_words=60_000,
    steps=4,
    tokens=10_000,
    sae_batch=256,
    sae_steps=8,
    n_seqs=10,
)


@dataclass(frozen=True)
class Cost:
    """Seconds of one command: of the processor, and on the clock."""

    cpu: float  # of user and system, of all threads
    clock: float
    work: float  # of the processor, without those of the command cut short


def run_script(checkout: Path, command: list[str], log: Path) -> tuple[float, float]:
    """Runs a script of a checkout -> seconds of the processor, and on the clock.

    Raises RuntimeError with its last line if it fails.
    """
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as out:
        words = [sys.executable, *command]
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, cwd=checkout)
        # The usage of this process alone, which the totals of all children would not tell
        _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - start
    # wait4 has taken the exit status, which Popen would otherwise look for in vain
    process.returncode = os.waitstatus_to_exitcode(status)
    # A command that fails early would be the fastest of all
    if process.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RuntimeError(f"{checkout}: {command[0]} ended with {process.returncode}: {last}")
    return usage.ru_utime + usage.ru_stime, clock


def command_line(section: str, folder: Path, sizes: dict[str, object]) -> list[str]:
    """The words of a section's command, all of whose files are in `folder`."""
    words = COMMANDS[section].split()
    # Tokenised once, in the runs that are not counted; each run replaces the output of the last
    words += ["--cache_dir", "{folder}/cache", "--overwrite"]
    return [word.format(folder=folder, **sizes) for word in words]


@dataclass(frozen=True)
class Interval:
    """A median over rounds, and the 2.5 % and 97.5 % points of its bootstrap."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(values: list[float]) -> Interval:
    rounds = np.array(values)  # [rounds]
    # Rounds drawn with replacement: what other rounds of the same machine would have said
    draws = np.random.default_rng(0).integers(len(rounds), size=(10_000, len(rounds)))
    medians = np.median(rounds[draws], axis=1)  # [draws]
    low, high = np.quantile(medians, [0.025, 0.975])
    return Interval(float(np.median(rounds)), float(low), float(high))


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder that its commands read and write."""

    checkout: Path
    folder: Path  # of its own: the formats of the checkouts may differ

    def run(self, section: str, sizes: dict[str, object]) -> Cost:
        log = self.folder / "log.txt"
        # Short first: the sections below read what the whole command wrote
        short = command_line(section, self.folder, sizes | SHORT)
        start, _ = run_script(self.checkout, short, log)
        whole = command_line(section, self.folder, sizes)
        cpu, clock = run_script(self.checkout, whole, log)
        return Cost(cpu, clock, work=cpu - start)


def compare_section(
    old: Side, new: Side, section: str, sizes: dict[str, object], rounds: int
) -> float:
    """Races one command and prints its line; the median ratio of the work, new / old."""
    # Not counted: the first run of each compiles bytecode and fills the file system's cache
    old.run(section, sizes)
    new.run(section, sizes)

    before: list[Cost] = []
    after: list[Cost] = []
    for number in range(rounds):
        # A B, B A, A B ...: neither is always the one that follows the other
        if number % 2 == 0:
            before.append(old.run(section, sizes))
            after.append(new.run(section, sizes))
        else:
            after.append(new.run(section, sizes))
            before.append(old.run(section, sizes))

    # Round by round, because what a machine does to one command it does to the next
    pairs = list(zip(before, after, strict=True))
    work = median_interval([b.work / a.work for a, b in pairs])
    cpu = median_interval([b.cpu / a.cpu for a, b in pairs])
    clock = median_interval([b.clock / a.clock for a, b in pairs])
    print(f"new / old: work {work}, whole command {cpu}, by the clock {clock}", end="; ")
    # So that a reader sees how much of it was start
    seconds = np.median([(cost.work, cost.cpu) for cost in before], axis=0)
    print(f"{rounds} rounds, old {seconds[0]:.1f} of {seconds[1]:.1f} s of CPU", flush=True)
    return work.median


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sections = list(COMMANDS)
    p.add_argument("--old", type=Path, required=True, help="folder of the checkout before")
    p.add_argument("--new", type=Path, default=ROOT, help="folder of the checkout after")
    p.add_argument(
        "--sections", nargs="+", choices=sections, default=sections, help="what to compare"
    )
    p.add_argument("--rounds", type=int, default=5, help="runs of each checkout, of each section")
    p.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    p.add_argument(
        "--fail_above",
        type=float,
        default=math.inf,
        metavar="RATIO",
        help="exit 1 if the work of a section, new / old, is above this",
    )
    args = p.parse_args(argv)
    # One round has no interval worth the name, but shows that everything runs
    if args.rounds < 1:
        p.error(f"--rounds is {args.rounds}, expected at least 1")
    for checkout in (args.old, args.new):
        if not (checkout / "janus_adaptive.py").is_file():
            p.error(f"{checkout} is no checkout of this repository: it has no janus_adaptive.py")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sizes = QUICK if args.quick else FULL
    worst = 0.0  # of the median ratios
    # A folder of its own, so that neither checkout finds what an earlier run left
    with tempfile.TemporaryDirectory() as name:
        sides = []
        # Old first: it runs first in the first round
        for side, checkout in {"old": args.old, "new": args.new}.items():
            folder = Path(name) / side
            folder.mkdir()
            # The same text for both; speed does not depend on what it says
            random_text(folder, "words", n_kinds=4096, n_words=sizes["n_words"])
            sides.append(Side(checkout.resolve(), folder))  # commands run in the checkout
        for section in COMMANDS:
            # Each section reads what the ones above it wrote
            if section in args.sections:
                print(f"{section}: ", end="", flush=True)
                worst = max(worst, compare_section(*sides, section, sizes, args.rounds))
            # Not compared, but read by those after it
            elif section in ("training", "harvest"):
                for side in sides:
                    side.run(section, sizes)
    return int(worst > args.fail_above)


if __name__ == "__main__":
    sys.exit(main())

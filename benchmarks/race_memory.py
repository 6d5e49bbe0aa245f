"""Peak memory of each phase, run as a process of its own with the command of a user."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, Row, bfloat16_is_fast, random_text, row, skip

KIB = 1024 / 1e9  # of Linux's counters, in GB


def read_status(pid: int) -> tuple[float, float]:
    """GB of the peak resident memory of a process, and of its anonymous memory now.

    From /proc, because ru_maxrss would count the parent before exec. Raises OSError or KeyError if
    the process has ended.
    """
    counters = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        name, value = line.split(":", 1)  # VmHWM:     123456 kB
        if name in ("VmHWM", "RssAnon"):
            counters[name] = int(value.split()[0]) * KIB
    return counters["VmHWM"], counters["RssAnon"]


def peak(command: list[str], folder: Path) -> tuple[float, float]:
    """Runs a script; GB of its peak resident memory, and of the anonymous part of it.

    The anonymous part leaves out mapped files, which the system may drop. Raises RuntimeError with
    the last line that the script printed if it fails.
    """
    resident, anonymous = 0.0, 0.0
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )
        while process.poll() is None:
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                resident, anonymous_now = read_status(process.pid)
                anonymous = max(anonymous, anonymous_now)
            time.sleep(0.02)  # VmHWM is exact; of the anonymous part the peak is sampled
    if process.returncode:
        printed = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        last = " ".join(printed[-1:]).replace(f"{folder}/", "")
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {last}")
    return resident, anonymous


class MemoryStudy:
    """Runs the phases in one folder, each on what those before it left, and collects the rows.

    Models are trained for a step or two on random words: memory does not depend on what they learn.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self.rows: list[Row] = []
        self.dumps = ["--activations_dir", folder / "dumps"]  # for all that reads them
        self.saes = folder / "saes"
        # Memory is at its peak after a few steps
        self.few_steps: list[object] = ["--steps", 8, "--eval_tokens", 5_000]

    def measure(self, what: str, shape: str, *command: object) -> None:
        """Two rows of one command, or a note that it failed."""
        # Under no cache but its own: tokenising is a part of the first phase
        words = [str(word) for word in (*command, "--cache_dir", self.folder / "cache")]
        try:
            resident, anonymous = peak(words, self.folder)
        except RuntimeError as e:
            skip(f"memory of {what}", e)
            return
        whole = row("memory", what, shape, "ours, resident", [resident], "GB", "lower")
        variant = "ours, anonymous (no mapped files)"
        own = row("memory", what, shape, variant, [anonymous], "GB", "lower")
        self.rows += [whole, own]

    def train(self, preset: str, n_kinds: int, n_words: int, *more: object) -> Path:
        """The checkpoint of a model trained for a step or two."""
        text = random_text(self.folder, preset, n_kinds, n_words)
        out = self.folder / preset
        command = ["janus_adaptive.py", *text, "--preset", preset, "--save_dir", out, *more]
        shape = f"{preset} preset, {' '.join(str(word) for word in more)}"
        self.measure("1 training", shape, *command)
        return out / "janus_adaptive_final.pt"

    def harvest(self, what: str, shape: str, model: Path, *more: object) -> None:
        out = ["--save_dir", self.folder / "dumps"]
        command = ["harvest_activations.py", "--model_path", model, *out, *more]
        self.measure(what, shape, *command)

    def train_sae(self, what: str, shape: str, run: str, layer: int, *more: object) -> None:
        command = ["train_sae.py", "--runs", run, "--layers", layer, *self.dumps]
        self.measure(what, shape, *command, "--save_dir", self.saes, *self.few_steps, *more)

    def ablate(self, shape: str, model: Path, csv: Path, *more: object) -> None:
        sequences = ["--n_seqs", 8, "--n_mean", 4]
        method = ["--mode", "mean", "--resample_draws", 1, "--bootstrap", 200]
        command = ["ablation_test.py", "--adaptive_model", model, "--save_file", csv]
        # float32 needs more memory than bfloat16, and auto would try both
        self.measure(
            "4 ablation", shape, *command, *sequences, *method, "--dtype", "float32", *more
        )

    def analyse_hero(self, shape: str, csv: Path, layer: int, *more: object) -> None:
        hero = ["--force_layer", layer, "--force_head", 0, "--n_features", 2, "--features", 2]
        where = [*self.dumps, "--saes_dir", self.saes, "--save_dir", self.folder / "hero"]
        command = ["hero_head_analysis.py", "--ablation_csv", csv, *where, *hero]
        self.measure("5 hero analysis", shape, *command, *more)


def all_phases(study: MemoryStudy, whole: bool) -> None:
    """Every phase at full size. whole: with every layer and all sequences, over an hour."""
    quick = study.quick
    preset = "smoke" if quick else "full"
    # Two steps of two micro-batches, so that gradients and Adam's moments are there already
    steps = ["--steps", 2, "--grad_accum", 2, "--compile", "off"]
    # As many kinds of token as GPT-2 has: logits are what a training step needs most memory for
    n_kinds, n_words = (500, 60_000) if quick else (50257, 330_000)
    model = study.train(preset, n_kinds, n_words, *steps)

    # 275,000: a full pool of train_sae.py; hero analysis takes 64 + 64 windows of 512 tokens
    tokens = ["--tokens", 275_000 if whole and not quick else 20_000]
    layers = ["--layers", 3, 6, 9, "--run_name", "adaptive"]
    study.harvest("2 harvest", f"{preset} preset, layers 3 6 9", model, *layers, *tokens)

    layer = 3 if whole else 9  # what follows a late layer is soon run through
    size = ["--batch_size", 512] if quick else []  # the small dump has not more
    shape = f"{preset} preset, one layer"
    study.train_sae("3 SAE training", shape, "adaptive", layer, *size)
    if whole and bfloat16_is_fast():
        again = [*size, "--int8", "--overwrite"]
        study.train_sae("3 SAE training", f"{shape}, --int8", "adaptive", layer, *again)

    # Of one layer, unless --whole: memory does not add up over layers
    csv = study.folder / "ablation.csv"
    which = "every layer" if whole else f"layer {layer}"
    only = [] if whole else ["--layers", layer]
    study.ablate(f"{preset} preset, {which}, 8 sequences", model, csv, *only)
    which = "its own" if whole else "2 + 2"
    few = [] if whole else ["--n_seqs", 2]
    study.analyse_hero(f"{preset} preset, {which} sequences", csv, layer, *few)


def constant_phases(study: MemoryStudy) -> None:
    """Harvest and SAE training on two lengths: their memory must not grow with the tokens."""
    quick = study.quick
    n_kinds, n_words = (500, 60_000) if quick else (4096, 650_000)
    model = study.train("demo", n_kinds, n_words, "--steps", 1)  # text enough for the second length
    lengths = (20_000, 40_000) if quick else (275_000, 550_000)  # one and two full pools
    # The same commands on twice the tokens: what is held in memory must not be the dump
    for number, n_tokens in enumerate(lengths):
        shape = f"demo preset, {n_tokens:,} tokens"
        run = f"n{number}"
        more = ["--layers", 3, "--tokens", n_tokens, "--run_name", run, "--overwrite"]
        study.harvest("2 harvest: constant?", shape, model, *more)
        study.train_sae("3 SAE training: constant?", shape, run, 3)


def memory(options: argparse.Namespace) -> list[Row]:
    """Peak memory of each phase as a process of its own: a few steps at full size, and two lengths
    at demo size."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        study = MemoryStudy(Path(folder), options.quick)
        all_phases(study, options.whole)
        if not options.whole:
            constant_phases(study)
    return study.rows

"""Two processes under torchrun (gloo, on the CPU) do what one process does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ablation_test
import harvest_activations
import janus_adaptive as janus
import train_sae

SMALL = ["--n_layers", "2", "--control_interval", "2", "--pressure_warmup", "4", "--dtype", "float32"]


def torchrun(script: str | Path, argv: list) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return [*launcher, str(script), *map(str, argv)]


def run_both(module, argv: list, flag: str, one: Path, two: Path) -> None:
    """`module` by one process, writing to `one`, and by two, writing to `two`."""
    assert module.main([*map(str, argv), flag, str(one)]) == 0
    r = subprocess.run(torchrun(module.__file__, [*argv, flag, two]), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    lines = [line for line in r.stdout.splitlines() if str(two) in line]
    assert len(lines) == len({*lines}), r.stdout  # one process prints


def assert_same_files(one: Path, two: Path) -> None:
    """The same files with the same bytes; the .json hold times, paths and command lines."""
    files = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != ".lock") for folder in (one, two)]
    assert files[0] == files[1] and files[0]
    assert not [p for p in files[0] if p.suffix != ".json" and (one / p).read_bytes() != (two / p).read_bytes()]


@pytest.fixture(scope="module")
def train_args(smoke_args) -> list[str]:
    return [*smoke_args, *SMALL]


@pytest.fixture(scope="module")
def model(train_args, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert janus.main([*train_args, "--steps", "10", "--save_dir", str(folder)]) == 0
    return folder / "janus_adaptive_final.pt"


@pytest.fixture(scope="module")
def dumps(model, cache_dir, tmp_path_factory) -> tuple[Path, Path]:
    """What one process and two processes harvest."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    quick = ["--tokens", "2560", "--dtype", "float32", "--batch_size", "2", "--cache_dir", cache_dir]
    run_both(harvest_activations, ["--model_path", model, "--run_name", "adaptive", *quick], "--save_dir", one, two)
    return one, two


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "janus_adaptive_final.pt", weights_only=True)["model"]


def test_training_takes_the_same_steps(train_args, tmp_path):
    """Two micro-batches a process. Sums of four terms in another order: float32 rounds each at 6e-8 of its size, and Adam
    passes that on to the next step; 1e-5 of the norm leaves room for ten steps, and is a hundredth of what one micro-batch
    in the wrong place changes (below)."""
    argv = [*train_args, "--steps", "10", "--batch_size", "2", "--grad_accum", "4", "--val_interval", "5"]
    run_both(janus, argv, "--save_dir", tmp_path / "one", tmp_path / "two")
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    assert max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a) < 1e-5
    for csv in ("telemetry.csv", "layers.csv"):
        x, y = (pd.read_csv(tmp_path / n / csv).drop(columns="tokens_per_s", errors="ignore") for n in ("one", "two"))
        pd.testing.assert_frame_equal(x, y, rtol=1e-5)
    assert [p.name for p in sorted((tmp_path / "one").iterdir())] == [p.name for p in sorted((tmp_path / "two").iterdir())]
    assert janus.main([*argv[:-6], "--batch_size", "4", "--grad_accum", "2", "--save_dir", str(tmp_path / "other")]) == 0
    c = state(tmp_path / "other")  # the same sequences, and the penalty of other micro-batches
    assert max(((a[k] - c[k]).norm() / a[k].norm()).item() for k in a) > 1e-3


def test_a_signal_saves_and_one_process_goes_on_to_the_same_bits(train_args, tmp_path):
    """One micro-batch a process: the sum of two terms has no order, so nothing may differ, not in the last bit."""
    argv = [*train_args, "--steps", "120", "--save_interval", "3", "--batch_size", "2", "--grad_accum", "2"]
    p = subprocess.Popen(
        torchrun(janus.__file__, [*argv, "--save_dir", tmp_path / "two"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while p.poll() is None and not list((tmp_path / "two").glob("ckpt_*.json")):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=300)
    assert p.returncode != 0 and out.count("--resume") == 1, err
    assert "janus_adaptive.py: error" not in err
    assert json.loads((tmp_path / "two" / "run.json").read_text())["exit_status"] == 128 + signal.SIGTERM
    for name, more in (("one", []), ("two", ["--resume"])):
        assert janus.main([*argv, *more, "--save_dir", str(tmp_path / name)]) == 0
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    assert all(torch.equal(a[k], b[k]) for k in a)
    x, y = (pd.read_csv(tmp_path / n / "telemetry.csv").drop(columns="tokens_per_s") for n in ("one", "two"))
    pd.testing.assert_frame_equal(x, y, check_exact=True)


def test_harvest(dumps):
    assert_same_files(*dumps)
    sides = [json.loads((folder / "adaptive" / "L1.z.npy.json").read_text()) for folder in dumps]
    assert sides[0]["sha256"] == sides[1]["sha256"] and sides[0]["mean"] == sides[1]["mean"]


def test_saes(dumps, cache_dir, tmp_path):
    argv = ["--activations_dir", dumps[0], "--runs", "adaptive", "--steps", "20", "--dtype", "float32", "--cache_dir", cache_dir]
    run_both(train_sae, argv, "--save_dir", tmp_path / "one", tmp_path / "two")
    assert_same_files(tmp_path / "one", tmp_path / "two")
    assert len(pd.read_csv(tmp_path / "two" / "sae_metrics.csv")) == 2


def test_ablation(model, cache_dir, tmp_path):
    argv = ["--adaptive_model", model, "--n_seqs", "12", "--batch_size", "5", "--bootstrap", "200", "--dtype", "float32"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    run_both(ablation_test, [*argv, "--cache_dir", cache_dir], "--save_file", tmp_path / "one" / "r.csv", tmp_path / "two" / "r.csv")
    assert_same_files(tmp_path / "one", tmp_path / "two")
    assert np.load(tmp_path / "two" / "r.npz")["adaptive.mean.kl"].all()  # every sequence was measured


LONE = """
import sys
sys.path.insert(0, {root!r})
import torch
from janus_adaptive import *

@one_line_errors
@torchrun
def main(argv=None):
    rank, world = rank_and_world()
    all_sum(x := torch.full((2, 3), rank + 1.0), y := torch.tensor(float(world)))
    assert x.tolist() == [[3.0] * 3] * 2 and y == 4
    if rank == 1:
        raise HandoffError(f"only process {{rank}} of {{world}} fails")
    all_sum(x)
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize("what", ["command line", "missing file", "lone"])
def test_a_failure_is_one_line(what, train_args, cache_dir, tmp_path):
    lone = tmp_path / "lone.py"
    lone.write_text(LONE.format(root=os.path.dirname(janus.__file__)))
    command, says = {
        "command line": (torchrun(janus.__file__, [*train_args, "--grad_accum", "3"]), "--grad_accum 3 must be a multiple of the 2"),
        "missing file": (torchrun(ablation_test.__file__, ["--adaptive_model", tmp_path / "no.pt"]), "no.pt does not exist"),
        "lone": (torchrun(lone, []), "only process 1 of 2 fails"),
    }[what]
    r = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    lines = [line for line in r.stderr.splitlines() if ": error: " in line]
    assert r.returncode != 0 and len(lines) == 1 and says in lines[0], r.stderr
    assert r.stderr.count("Traceback") == 1  # torchrun's own report, which names the process
    assert not r.stdout and not list(tmp_path.glob("*.csv"))

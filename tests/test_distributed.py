"""Two processes under torchrun (gloo, on the CPU) do what one process does."""

import json
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
import real_model_extension as real
import train_sae

SMALL = [
    "--n_layers",
    "2",
    "--control_interval",
    "2",
    "--pressure_warmup",
    "4",
    "--batch_size",
    "2",
]

# Starting two processes takes seconds, so one start serves several commands, which find each other under a prefix of their own.
DRIVER = f"""
import json, sys
sys.path.insert(0, {str(Path(janus.__file__).parent)!r})
import torch
import torch.distributed as dist
from janus_adaptive import HandoffError, all_sum, one_line_errors, rank_and_world, under_torchrun

def lone(argv):
    return one_line_errors(lambda: under_torchrun(fail_alone))

def fail_alone():
    rank, world = rank_and_world()
    all_sum(x := torch.full((2, 3), rank + 1.0), y := torch.tensor(float(world)))
    assert x.tolist() == [[3.0] * 3] * 2 and y == 4
    if rank == 1:
        raise HandoffError("only process 1 fails")
    all_sum(x)

store, rank, world = next(dist.rendezvous("env://"))
for n, (script, argv) in enumerate(json.load(open(sys.argv[1]))):
    dist.rendezvous = lambda _: iter([(dist.PrefixStore(str(n), store), rank, world)])
    main = lone if script == "lone" else __import__(script).main
    try:
        status = main(argv)
    except SystemExit as e:  # go on after a wrong command line
        dist.destroy_process_group()
        status = 0 if e.code == 2 else e.code
    if status:
        sys.exit(status)
"""


def start(script: str | Path, *argv) -> subprocess.Popen:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    return subprocess.Popen(
        [*launcher, str(script), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(p: subprocess.Popen) -> tuple[str, str]:
    try:
        return p.communicate(timeout=300)
    finally:
        p.terminate()  # if it hangs: torchrun takes its processes along


def drive(commands: list, folder: Path) -> tuple[int, str, str]:
    """Runs commands (script, argv) by two processes -> exit status, stdout, stderr."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "commands.json").write_text(json.dumps(commands))
    p = start(folder / "driver.py", folder / "commands.json")
    out, err = end(p)
    return p.returncode, out, err


def errors(err: str) -> list[str]:
    assert err.count("Traceback") == 1  # torchrun's own report, which names the process
    return [line for line in err.splitlines() if ": error: " in line]


@pytest.fixture(scope="module")
def both(smoke_args, cache_dir, tmp_path_factory) -> tuple[Path, Path, str, str]:
    """Phases 1 to 4 by one process and by two, from the same inputs, and a command that fails: both folders, stdout, stderr."""
    root = tmp_path_factory.mktemp("both")
    data, quick = root / "one", ["--dtype", "float32", "--cache_dir", str(cache_dir)]
    model = str(data / "model" / "janus_adaptive_final.pt")

    def commands(to: Path) -> list:
        harvest = [
            "--model_path",
            model,
            "--tokens",
            "2560",
            "--batch_size",
            "2",
            "--save_dir",
            str(to / "activations"),
        ]
        sae = [
            "--activations_dir",
            str(data / "activations"),
            "--runs",
            "adaptive",
            "--steps",
            "20",
            "--save_dir",
            str(to / "saes"),
        ]
        ablate = [
            "--adaptive_model",
            model,
            "--n_seqs",
            "12",
            "--batch_size",
            "5",
            "--bootstrap",
            "200",
        ]
        train = [
            *smoke_args,
            *SMALL,
            "--grad_accum",
            "4",
            "--steps",
            "10",
            "--val_interval",
            "5",
            "--save_dir",
            str(to / "model"),
        ]
        more = [
            (harvest_activations, harvest),
            (train_sae, sae),
            (ablation_test, [*ablate, "--save_file", str(to / "ablation" / "r.csv")]),
        ]
        return [(janus, train), *((module, [*argv, *quick]) for module, argv in more)]

    for module, argv in commands(root / "one"):
        assert module.main(argv) == 0
    wrong = (
        "ablation_test",
        ["--adaptive_model", str(root / "no.pt"), "--save_file", str(root / "no.csv")],
    )
    status, out, err = drive(
        [*((module.__name__, argv) for module, argv in commands(root / "two")), wrong], root
    )
    assert status and (root / "two" / "ablation" / "r.csv.json").exists(), err
    return root / "one", root / "two", out, err


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "janus_adaptive_final.pt", weights_only=True)["model"]


def test_training_takes_the_same_steps(both, smoke_args, tmp_path):
    """Two micro-batches a process. The sum of four terms in another order: float32 rounds each at 6e-8 of its size, and Adam
    passes that on from step to step; 1e-5 of the norm leaves room for ten steps, and is a hundredth of what it takes to notice
    that the penalty was taken of other micro-batches (below)."""
    one, two = (folder / "model" for folder in both[:2])
    a, b = state(one), state(two)
    assert max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a) < 1e-5
    for csv in ("telemetry.csv", "layers.csv"):
        x, y = (
            pd.read_csv(folder / csv).drop(columns="tokens_per_s", errors="ignore")
            for folder in (one, two)
        )
        pd.testing.assert_frame_equal(x, y, rtol=1e-5)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    other = [
        "--batch_size",
        "4",
        "--grad_accum",
        "2",
        "--steps",
        "10",
        "--val_interval",
        "5",
    ]  # the same sequences
    assert janus.main([*smoke_args, *SMALL, *other, "--save_dir", str(tmp_path)]) == 0
    c = state(tmp_path)
    assert max(((a[k] - c[k]).norm() / a[k].norm()).item() for k in a) > 1e-3


@pytest.mark.parametrize("phase", ["activations", "saes", "ablation"])
def test_later_phases_write_the_same_bytes(phase, both):
    """The .json aside, which hold times, paths and command lines."""
    one, two = (folder / phase for folder in both[:2])
    files, others = (
        sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file() and p.name != ".lock")
        for f in (one, two)
    )
    assert files == others and len(files) > 5
    assert not [
        p for p in files if p.suffix != ".json" and (one / p).read_bytes() != (two / p).read_bytes()
    ]


def test_everything_was_measured(both):
    assert np.load(both[1] / "ablation" / "r.npz")["adaptive.mean.kl"].all()
    assert len(pd.read_csv(both[1] / "saes" / "sae_metrics.csv")) == 2
    sides = [
        json.loads((folder / "activations" / "adaptive" / "L1.z.npy.json").read_text())
        for folder in both[:2]
    ]
    assert sides[0]["sha256"] == sides[1]["sha256"] and sides[0]["mean"] == sides[1]["mean"]


def test_only_one_process_speaks(both):
    _, _, out, err = both
    lines = [
        line
        for line in out.splitlines()
        if "/two/" in line or line.startswith(("cost:", "disk:", "time:", "adaptive:"))
    ]
    assert len(lines) == len({*lines}) > 5, out
    assert len(errors(err)) == 1 and "no.pt does not exist" in errors(err)[0], err


def test_a_wrong_command_line_and_a_process_that_fails_alone_are_one_line_each(
    smoke_args, tmp_path
):
    wrong = [*smoke_args, "--grad_accum", "3", "--save_dir", str(tmp_path / "x")]
    status, out, err = drive([("janus_adaptive", wrong), ("lone", [])], tmp_path)
    assert status and not out and not (tmp_path / "x").exists()
    first, second = errors(err)
    assert (
        "--grad_accum 3 must be a multiple of the 2 processes" in first and err.count("usage:") == 1
    )
    assert second.endswith(": error: only process 1 fails")


def test_a_signal_saves_and_one_process_goes_on_to_the_same_bits(smoke_args, tmp_path):
    """One micro-batch a process: the sum of two terms has no order, so not a bit may differ."""
    argv = [*smoke_args, *SMALL, "--steps", "120", "--save_interval", "3", "--grad_accum", "2"]
    p = start(janus.__file__, *argv, "--save_dir", tmp_path / "two")
    while p.poll() is None and not list((tmp_path / "two").glob("ckpt_*.json")):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    out, err = end(p)
    assert p.returncode and out.count("--resume") == 1 and not errors(err)
    assert (
        json.loads((tmp_path / "two" / "run.json").read_text())["exit_status"]
        == 128 + signal.SIGTERM
    )
    assert not (tmp_path / "two" / "janus_adaptive_final.pt").exists()
    for name, more in (("one", []), ("two", ["--resume"])):
        assert janus.main([*argv, *more, "--save_dir", str(tmp_path / name)]) == 0
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    assert all(torch.equal(a[k], b[k]) for k in a)
    x, y = (
        pd.read_csv(tmp_path / n / "telemetry.csv").drop(columns="tokens_per_s")
        for n in ("one", "two")
    )
    pd.testing.assert_frame_equal(x, y, check_exact=True)


def test_energy_lens_gives_the_same_numbers(gpt2, tmp_path):
    """Three blocks and 21 batches of sequences over two processes; a tuned energy, which has a translator to hand on."""
    sizes = dict(
        corpus_tokens=6400,
        seq_len=24,
        sae_dict_size=64,
        sae_iterations=3,
        permutations=100,
        directions=100,
        intervened=4,
    )
    argv = [
        "--model_name",
        gpt2,
        "--corpus",
        "topics",
        "--energy",
        "tuned",
        "--energy_layers",
        0,
        1,
        3,
    ]
    (texts := tmp_path / "texts.txt").write_text("The quick brown fox jumps over the lazy dog.\n")
    argv = [
        str(x)
        for x in [
            *argv,
            "--texts",
            texts,
            *(y for k, v in sizes.items() for y in (f"--{k}", v)),
            "--save_dir",
        ]
    ]
    assert real.main([*argv, str(tmp_path / "one")]) == 0
    wrong = ["--model_name", "energy-transformer", "--save_dir", str(tmp_path / "wrong")]
    commands = [
        ("real_model_extension", [*argv, str(tmp_path / "two")]),
        ("real_model_extension", wrong),
    ]
    status, out, err = drive(commands, tmp_path)
    assert status and len(errors(err)) == 1 and "runs in one process" in errors(err)[0], err
    assert out.count("report: ") == 1 and not (tmp_path / "wrong").exists()
    one, two = (json.loads((tmp_path / n / "raw_results.json").read_text()) for n in ("one", "two"))
    assert {"interventions", "text_ablations", "text_types"} < set(one["tables"]) and one[
        "tables"
    ] == two["tables"]
    assert (
        "in the first of 2 processes" in two["facts"]["cost"]
        and "processes" not in one["facts"]["cost"]
    )
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        p.name for p in (tmp_path / "two").iterdir()
    )

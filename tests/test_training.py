"""Training as a user runs it: arms, telemetry, resume after SIGKILL, signals, and what is refused."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import janus_adaptive as janus


def run(argv, **kw):
    return subprocess.run(
        [sys.executable, janus.__file__, *argv], capture_output=True, text=True, timeout=300, **kw
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_outputs_and_telemetry(smoke_checkpoint):
    folder = smoke_checkpoint.parent
    t = pd.read_csv(folder / "telemetry.csv")
    named = [
        "step",
        "tokens",
        "loss",
        "val_loss",
        "perplexity",
        "lambda",
        "P",
        "I",
        "D",
        "saturated",
        "phase",
        "sigma_z",
        "sigma_resid",
        "lr",
        "tokens_per_s",
    ]
    assert set(named) <= set(t.columns)
    assert t["step"].tolist() == [10, 20, 30]
    assert t["tokens"].iloc[-1] == 30 * 8 * 64
    assert t["val_loss"].notna().iloc[-1] and np.isclose(
        np.exp(t["val_loss"].iloc[-1]), t["perplexity"].iloc[-1]
    )
    assert t["loss"].iloc[-1] < np.log(512)
    assert t["phase"].tolist() == ["warmup", "auto", "auto"]
    # The terms of the law add up to what is used, from the first row that it decides; before it there are none
    assert t[["P", "I", "D"]].iloc[0].isna().all()
    closed = t[t["phase"] == "auto"]
    assert np.allclose(
        np.exp(closed["P"] + closed["I"] + closed["D"]), closed["lambda"], rtol=1e-12
    )
    assert (t["setpoint"] == 0.0035).all()
    layers = pd.read_csv(folder / "layers.csv")
    assert layers["layer"].tolist() == list(range(12))
    assert np.isclose(layers["sigma_z"].mean(), t["val_sigma_z"].iloc[-1])
    record = json.loads((folder / "run.json").read_text())
    assert record["exit_status"] == 0 and record["arguments"]["n_layers"] == 12 and record["end"]
    side = json.loads((folder / "janus_adaptive_final.pt.json").read_text())
    assert side["sha256"] == janus.sha256(smoke_checkpoint) and side["arm"] == "adaptive"
    assert (folder / "training.png").stat().st_size > 10_000
    assert not [p for p in folder.iterdir() if ".tmp" in p.name]
    assert len(list(folder.glob("ckpt_*.pt"))) == 2


def test_validation_is_the_whole_split_and_equals_a_plain_loop(
    smoke_checkpoint, smoke_args, cache_dir
):
    model, ckpt = janus.load_checkpoint(smoke_checkpoint, torch.device("cpu"), skip_probe=False)
    val = janus.HFWikiTextLoader(
        ckpt["dataset"],
        str(smoke_checkpoint.parent / "tokenizer.json"),
        64,
        "validation",
        cache_dir,
    )
    with torch.no_grad():
        losses = [model(*val.batch(np.array([i])))[1].item() for i in range(val.n_windows)]
    t = pd.read_csv(smoke_checkpoint.parent / "telemetry.csv")
    assert np.isclose(np.mean(losses), t["val_loss"].iloc[-1], atol=1e-5)


def test_some_windows_of_the_split_are_spread_over_it(smoke_args, cache_dir, tmp_path):
    short = ["--steps", "2", "--save_dir", str(tmp_path)]
    assert janus.main([*smoke_args, *short, "--val_windows", "5"]) == 0
    table = pd.read_csv(tmp_path / "validation.csv")
    final = tmp_path / "janus_adaptive_final.pt"
    model, ckpt = janus.load_checkpoint(final, torch.device("cpu"), skip_probe=False)
    tokenizer = str(tmp_path / "tokenizer.json")
    val = janus.HFWikiTextLoader(ckpt["dataset"], tokenizer, 64, "validation", cache_dir)
    first_of_fifths = [val.n_windows * fifth // 5 for fifth in range(5)]
    assert table["window"].tolist() == first_of_fifths
    with torch.no_grad():
        losses = [model(*val.batch(np.array([i])))[1].item() for i in first_of_fifths]
    np.testing.assert_allclose(table["loss_nats"], losses, atol=1e-5)
    telemetry = pd.read_csv(tmp_path / "telemetry.csv")
    assert np.isclose(np.mean(losses), telemetry["val_loss"].iloc[-1], atol=1e-5)


def test_control_equals_a_run_with_all_gains_zero_bit_for_bit(
    control_checkpoint, smoke_args, tmp_path
):
    assert (
        janus.main(
            [*smoke_args, "--k_p", "0", "--k_i", "0", "--k_d", "0", "--save_dir", str(tmp_path)]
        )
        == 0
    )
    assert same(tmp_path / "janus_adaptive_final.pt", control_checkpoint)
    a, b = (pd.read_csv(f / "telemetry.csv") for f in (tmp_path, control_checkpoint.parent))
    assert a["loss"].equals(b["loss"]) and a["val_loss"].equals(b["val_loss"])


def test_arms_share_initial_weights_and_data_but_part_under_pressure(
    smoke_checkpoint, control_checkpoint
):
    assert not same(smoke_checkpoint, control_checkpoint)
    a, b = (pd.read_csv(c.parent / "telemetry.csv") for c in (smoke_checkpoint, control_checkpoint))
    assert (b["lambda"] == 0).all() and (a["lambda"] > 0).all()
    assert a["sigma_z"].iloc[-1] < b["sigma_z"].iloc[-1]


def test_the_model_before_its_first_step_is_kept_and_known_by_its_weights(
    smoke_checkpoint, control_checkpoint, smoke_args, tmp_path
):
    flags = [*smoke_args, "--save_dir", str(tmp_path)]
    assert janus.main([*flags, "--save_initial"]) == 0
    path = tmp_path / "janus_adaptive_initial.pt"
    assert same(tmp_path / "janus_adaptive_final.pt", smoke_checkpoint)  # it changes nothing
    model, initial = janus.load_checkpoint(path, torch.device("cpu"), skip_probe=False)
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().numpy().tobytes())
    assert initial["step"] == 0 and digest.hexdigest().startswith(initial["initial"])
    for trained in (smoke_checkpoint, control_checkpoint):  # both arms began with it
        assert not same(path, trained)
        assert torch.load(trained, weights_only=True)["initial"] == initial["initial"]
    # as `make demo` asks for it: with --resume, where there is nothing to go on with
    resumed = [*smoke_args, "--save_dir", str(tmp_path / "resumed"), "--resume", "--save_initial"]
    assert janus.main(resumed) == 0
    assert same(tmp_path / "resumed" / path.name, path)
    # a run that replaces this one does not leave it behind
    assert janus.main([*flags, "--seed", "5", "--overwrite"]) == 0
    assert not path.exists() and not janus.sidecar_path(path).exists()
    other = torch.load(tmp_path / "janus_adaptive_final.pt", weights_only=True)
    assert other["initial"] != initial["initial"]


def test_replay_of_a_run_is_that_run(smoke_checkpoint, smoke_args, tmp_path):
    csv = smoke_checkpoint.parent / "telemetry.csv"
    # The adaptive ramp moves every step within an interval, so without it lambda is exactly what the rows say.
    assert (
        janus.main([*smoke_args, "--pressure_warmup", "0", "--save_dir", str(tmp_path / "a")]) == 0
    )
    csv = tmp_path / "a" / "telemetry.csv"
    assert (
        janus.main([*smoke_args, "--pressure", f"replay:{csv}", "--save_dir", str(tmp_path / "b")])
        == 0
    )
    assert same(
        tmp_path / "a" / "janus_adaptive_final.pt", tmp_path / "b" / "janus_replay_final.pt"
    )


def test_same_command_same_bytes(smoke_checkpoint, smoke_args, tmp_path):
    assert janus.main([*smoke_args, "--save_dir", str(tmp_path)]) == 0
    assert same(tmp_path / "janus_adaptive_final.pt", smoke_checkpoint)


def test_micro_batches_do_not_move_the_loss_or_sigma(smoke_args, control_checkpoint, tmp_path):
    split = ["--batch_size", "2", "--grad_accum", "4", "--pressure", "control"]
    assert janus.main([*smoke_args, *split, "--save_dir", str(tmp_path)]) == 0
    a, b = (pd.read_csv(f / "telemetry.csv") for f in (tmp_path, control_checkpoint.parent))
    assert np.allclose(a[["loss", "sigma_z"]], b[["loss", "sigma_z"]], rtol=2e-3)


def test_a_sample_is_sigma_of_all_its_steps(smoke_args, cache_dir, tmp_path):
    """Weights that stand still (no learning rate to speak of): sigma of steps 3 to 5 together, by NumPy from z."""
    still = ["--pressure", "control", "--learning_rate", "1e-12", "--steps", "5"]
    several = ["--control_interval", "5", "--sample_steps", "3", "--save_dir", str(tmp_path)]
    assert janus.main([*smoke_args, *still, *several]) == 0
    logged = pd.read_csv(tmp_path / "telemetry.csv")["sigma_z"].tolist()
    model, ckpt = janus.load_checkpoint(
        tmp_path / "janus_control_final.pt", torch.device("cpu"), False
    )
    args = ckpt["arguments"]
    where = (args["dataset"], str(tmp_path / "tokenizer.json"), args["seq_len"], "train")
    data = janus.HFWikiTextLoader(*where, cache_dir)
    x, _ = data.shuffled(2 * args["batch_size"], 3 * args["batch_size"], args["seed"])
    tap = {f"z.{layer}": None for layer in range(12)}
    with torch.no_grad():
        model(x, x, tap=tap)
    sigmas = []
    for z in tap.values():
        flat = z.double().permute(2, 0, 1, 3).flatten(1).numpy()  # [H, all tokens x d_head]
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        sigmas.append(np.abs((flat @ flat.T)[np.triu_indices(3, 1)]).mean())
    assert logged == pytest.approx([np.mean(sigmas)], rel=1e-4)


def test_the_sampling_floor_is_that_of_independent_heads(smoke_checkpoint):
    """Drawn: heads of independent normal numbers, as many as a sample of this run has."""
    folder = smoke_checkpoint.parent
    t = pd.read_csv(folder / "telemetry.csv")
    args = json.loads((folder / "run.json").read_text())["arguments"]
    d_head = torch.load(smoke_checkpoint, weights_only=True)["config"]["d_head"]
    n = args["sample_steps"] * int(t["tokens"][0] / t["step"][0]) * d_head
    z = np.random.default_rng(0).standard_normal((40, n), dtype=np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    drawn = np.abs((z @ z.T)[np.triu_indices(40, 1)])
    error = drawn.std() / np.sqrt(len(drawn))
    assert t["sigma_floor"].nunique() == 1
    assert t["sigma_floor"][0] == pytest.approx(drawn.mean(), abs=4 * error)
    assert (t["sigma_z"] > t["sigma_floor"]).all()


def test_a_setpoint_step_is_logged_and_pressed_for(smoke_args, tmp_path):
    moved = ["--control_interval", "5", "--k_p", "2", "--setpoint_step", "20", "0.001"]
    assert janus.main([*smoke_args, *moved, "--save_dir", str(tmp_path)]) == 0
    t = pd.read_csv(tmp_path / "telemetry.csv").set_index("step")
    assert t["setpoint"].tolist() == [0.0035] * 3 + [0.001] * 3
    # P of the row after the step answers to the new setpoint
    error = np.log(t["sigma_filtered"][25] / 0.001)
    assert t["P"][25] == pytest.approx(2 * error)
    assert t["lambda"][25] > 2 * t["lambda"][20]


def test_killed_three_times_and_resumed_equals_uninterrupted(
    smoke_args, smoke_checkpoint, tmp_path
):
    """SIGKILL at three random moments, dropout on so that the random state matters too."""
    more = ["--dropout", "0.1", "--save_interval", "3", "--steps", "40", "--sample_steps", "7"]
    assert janus.main([*smoke_args, *more, "--save_dir", str(tmp_path / "whole")]) == 0
    broken, rng = tmp_path / "broken", random.Random(time.time_ns())
    argv = [
        sys.executable,
        janus.__file__,
        *smoke_args,
        *more,
        "--save_dir",
        str(broken),
        "--resume",
    ]
    kills = 0
    while kills < 3:
        seen = len(list(broken.glob("ckpt_*.json")))
        p = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while (
            p.poll() is None
            and len(list(broken.glob("ckpt_*.pt"))) <= min(seen, 2)
            and kills < 3
            and not newest_moved(broken, p)
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if p.poll() is not None:
            break
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
        for pt in broken.glob("*.pt"):  # whatever has a sidecar is whole
            if janus.sidecar_path(pt).exists():
                assert janus.sha256(pt) == json.loads(janus.sidecar_path(pt).read_text())["sha256"]
    assert kills == 3
    assert not (broken / "janus_adaptive_final.pt.json").exists()
    assert subprocess.run(argv, capture_output=True).returncode == 0
    assert same(tmp_path / "whole" / "janus_adaptive_final.pt", broken / "janus_adaptive_final.pt")
    a, b = (
        pd.read_csv(tmp_path / f / "telemetry.csv").drop(columns="tokens_per_s")
        for f in ("whole", "broken")
    )
    pd.testing.assert_frame_equal(a, b)


def newest_moved(folder: Path, process: subprocess.Popen, memory={}) -> bool:  # noqa: B006 -- remembers each process's start
    """Whether a checkpoint newer than those at the start of `process` has been finished."""
    newest = max((p.name for p in folder.glob("ckpt_*.pt.json")), default="")
    return newest > memory.setdefault(process.pid, newest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(number, smoke_args, tmp_path):
    # The process sends it to itself in its 20th step, whatever else the machine does
    program = """
import signal, sys, janus_adaptive as janus
calls, real = [], janus.training_step
def training_step(*args, **named):
    calls.append(1)
    if len(calls) == 20:
        signal.raise_signal(int(sys.argv[1]))
    return real(*args, **named)
janus.training_step = training_step
sys.exit(janus.main(sys.argv[2:]))
"""
    often = ["--steps", "5000", "--save_interval", "5000", "--val_interval", "5000"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number)), *smoke_args, *often]
        + ["--save_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(janus.__file__).parent,
        timeout=600,
    )
    assert done.returncode == 128 + number and "Traceback" not in done.stderr
    assert "--resume" in done.stdout
    saved = list(tmp_path.glob("ckpt_*.pt"))
    assert len(saved) == 1 and janus.sidecar_path(saved[0]).exists()
    assert json.loads((tmp_path / "run.json").read_text())["exit_status"] == 128 + number


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(smoke_args, tmp_path, capsys):
    assert (
        janus.main(
            [
                *smoke_args,
                "--learning_rate",
                "1e18",
                "--save_interval",
                "1",
                "--lr_warmup",
                "0",
                "--save_dir",
                str(tmp_path),
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert "not finite" in err and "--learning_rate" in err and err.count("\n") == 1
    assert not (tmp_path / "janus_adaptive_final.pt").exists()


def test_resume_refuses_other_arguments(smoke_args, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    argv = [*smoke_args, "--save_dir", str(tmp_path / "a"), "--steps", "12", "--save_interval", "5"]
    assert janus.main(argv) == 0
    janus.sidecar_path(tmp_path / "a" / "janus_adaptive_final.pt").unlink()
    before = sorted(os.listdir(tmp_path / "a"))
    assert janus.main([*argv, "--resume", "--target_sigma", "0.01"]) == 1
    assert "--target_sigma from 0.0035 to 0.01" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "a")) == before


def test_existing_output_is_kept_without_overwrite(smoke_checkpoint, smoke_args, capsys):
    before = janus.sha256(smoke_checkpoint)
    assert janus.main([*smoke_args, "--save_dir", str(smoke_checkpoint.parent)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert janus.sha256(smoke_checkpoint) == before


@pytest.mark.parametrize(
    ("what", "drifted"),
    [
        ("SwiGLU", ("F.silu", torch.relu)),
        ("norm", ("RMSNorm.forward", lambda self, x: x * self.weight)),
    ],
)
def test_golden_probe_catches_a_drifted_model(what, drifted, smoke_checkpoint, monkeypatch):
    owner, name = drifted[0].split(".")
    monkeypatch.setattr(getattr(janus, owner), name, drifted[1])
    with pytest.raises(janus.HandoffError, match="golden probe"):
        janus.load_checkpoint(smoke_checkpoint, torch.device("cpu"), skip_probe=False)
    janus.load_checkpoint(smoke_checkpoint, torch.device("cpu"), skip_probe=True)


def test_redraw_needs_only_the_csv(smoke_checkpoint, control_checkpoint, tmp_path):
    csvs = [str(c.parent / "telemetry.csv") for c in (smoke_checkpoint, control_checkpoint)]
    assert janus.main(["--redraw", *csvs, "--save_dir", str(tmp_path)]) == 0
    assert (tmp_path / "training.png").stat().st_size > 10_000
    width = plt.imread(tmp_path / "training.png").shape[1]
    assert janus.main(["--redraw", csvs[1], "--save_dir", str(tmp_path)]) == 0
    assert plt.imread(tmp_path / "training.png").shape[1] < width, (
        "no empty panel for a penalty that the control arm has not"
    )


def test_linear_law_and_the_published_preset_parse_to_the_published_numbers():
    a = janus.parse_args(["--preset", "published", "--batch_size", "3"])
    assert (a.n_layers, a.d_model, a.n_heads, a.d_ff, a.dropout) == (12, 512, 8, 1365, 0.05)
    assert (a.law, a.k_p, a.k_i * a.control_interval, a.lambda_max, a.penalty, a.layer_weights) == (
        "linear",
        0.0,
        0.5,
        0.25,
        "fro",
        "cubic",
    )
    assert a.batch_size == 3  # an explicit flag beats the preset


def test_schedules():
    a = janus.parse_args(["--preset", "full"])
    rate = [janus.learning_rate(s, a) for s in range(1, a.steps + 1)]
    assert max(rate) == pytest.approx(a.learning_rate) and rate[-1] == pytest.approx(
        0.1 * a.learning_rate
    )
    a.schedule = "wsd"
    rate = np.array([janus.learning_rate(s, a) for s in range(1, a.steps + 1)])
    assert (rate[200 : int(0.8 * a.steps)] == a.learning_rate).all() and 0 < rate[
        -1
    ] < 0.02 * a.learning_rate


def test_tensorboard_shows_the_numbers_of_the_csv_and_moves_nothing(
    smoke_args, smoke_checkpoint, tmp_path
):
    pytest.importorskip("tensorboard", reason="requirements-dev.txt installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert janus.main([*smoke_args, "--tensorboard", "--save_dir", str(tmp_path)]) == 0
    assert same(tmp_path / "janus_adaptive_final.pt", smoke_checkpoint)
    events, t = (
        EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "histograms": 0}),
        pd.read_csv(tmp_path / "telemetry.csv"),
    )
    events.Reload()
    for column in ("loss", "val_loss", "sigma_z", "lambda", "grad_norm"):
        rows = t[["step", column]].dropna()
        shown = [(e.step, e.value) for e in events.Scalars(column)]
        assert [step for step, _ in shown] == rows["step"].tolist()
        assert np.allclose([value for _, value in shown], rows[column], rtol=1e-6)
    assert len(events.Histograms("cosines between heads")) == len(t)
    assert len(events.Images("abs(cosine) between heads, by layer")) == len(t)


def test_tensorboard_that_is_missing_is_one_line(smoke_args, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(janus, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as e:
        janus.main([*smoke_args, "--tensorboard", "--save_dir", str(tmp_path)])
    assert (
        e.value.code == 2
        and "error: --tensorboard needs a package: pip install tensorboard"
        in capsys.readouterr().err
    )

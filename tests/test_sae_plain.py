"""The plain forwards of train_sae.py beside its fast steps; an architecture that only a test knows."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import train_sae as ts

CPU = torch.device("cpu")
ARCHS = list(ts.ARCHITECTURES)
CASES = [(arch, aux_k) for arch in ARCHS for aux_k in (0, 3, -1)]
SMALL = [
    "--expansion",
    "4",
    "--k",
    "4",
    "--batch_size",
    "128",
    "--steps",
    "60",
    "--learning_rate",
    "3e-3",
    "--dead_tokens",
    "1000",
]
SMALL += ["--eval_tokens", "600", "--device", "cpu"]


def settings(**more) -> argparse.Namespace:
    base = dict(
        arch="topk",
        expansion=4,
        k=4,
        target_l0=4,
        l1=3e-3,
        aux_k=-1,
        dead_tokens=500,
        batch_size=128,
        steps=50,
        null="",
    )
    return argparse.Namespace(
        **base | dict(learning_rate=3e-3, lr_warmup=5, lr_decay=0.2, seed=0, dtype="float32") | more
    )


def trainer(d: int = 16, plain: bool = False, **more) -> ts.Trainer:
    """Away from its start: all biases and scales differ from their defaults."""
    t = ts.Trainer(settings(**more), torch.zeros(d), math.sqrt(d), CPU, plain)
    g = torch.Generator().manual_seed(3)
    t.sae.W_enc += 0.2 * torch.randn(t.sae.W_enc.shape, generator=g)
    t.sae.b_enc += 0.1 * torch.randn(t.sae.b_enc.shape, generator=g)
    t.sae.b_dec += 0.3 * torch.randn(t.sae.b_dec.shape, generator=g)
    for name in t.architecture.extra:
        weight = getattr(t.sae, name)
        weight += (
            1 + 0.5 * torch.rand(weight.shape, generator=g)
            if name == "threshold"
            else 0.3 * torch.randn(weight.shape, generator=g)
        )
    return t


def both_gradients(x: torch.Tensor, **more) -> tuple[ts.Gradients, ts.Gradients]:
    """From the fast step and from the forward, with a third of the latents dead."""
    t = trainer(x.shape[1], **more)
    t.idle[::3] = 10**9
    now = t.now()
    assert now.dead.sum() > 5
    return t.architecture.fast(x, t.sae, now), ts.plain_gradients(
        x, t.sae, ts.Now(**vars(now) | {"dtype": "float32"})
    )


@pytest.mark.parametrize("arch, aux_k", CASES)
def test_the_fast_step_has_the_gradients_of_the_forward(arch, aux_k):
    x = 2 * torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    fast, plain = both_gradients(x, arch=arch, aux_k=aux_k)
    assert (
        set(fast.by_name)
        == set(plain.by_name)
        == {"W_enc", "b_enc", "W_dec", "b_dec", *ts.ARCHITECTURES[arch].extra}
    )
    for name, gradient in plain.by_name.items():
        assert (
            gradient.norm() > 0 and (fast.by_name[name] - gradient).norm() <= 1e-5 * gradient.norm()
        ), name
    assert torch.equal(fast.fired, plain.fired) and 0 < plain.fired.sum() < 96 * 64
    torch.testing.assert_close(fast.error, plain.error, rtol=1e-5, atol=1e-5)
    assert (fast.cut is None) == (plain.cut is None) and (
        fast.cut is None or fast.cut.item() == pytest.approx(plain.cut.item(), rel=1e-5)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("arch", [name for name, record in ts.ARCHITECTURES.items() if record.int8])
def test_in_low_precision_within_one_percent(arch, dtype):
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    fast, plain = both_gradients(x, arch=arch, expansion=8, k=16, dtype=dtype, aux_k=0)
    assert torch.equal(fast.fired, plain.fired)
    for name, gradient in plain.by_name.items():
        assert (fast.by_name[name] - gradient).norm() < 0.01 * gradient.norm(), name


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_losses_over_fifty_steps(arch):
    """Adam divides by the size of a gradient, so that rounding grows: in 50 steps to less than 1e-3 of a loss."""
    fast, plain = trainer(arch=arch), trainer(arch=arch, plain=True)
    assert fast.take_gradients is not plain.take_gradients is ts.plain_gradients
    g, losses = torch.Generator().manual_seed(2), []
    for _ in range(50):
        raw = 2 * torch.randn(128, 16, generator=g)
        now = fast.now()
        losses.append([t.architecture.forward(raw, t.sae, now).loss.item() for t in (fast, plain)])
        fast.step(raw)
        plain.step(raw)
    losses = np.array(losses)
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)
    assert fast.history[0] == pytest.approx(plain.history[0], rel=1e-3)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory) -> Path:
    """activations/adaptive/L0.z.npy: 120 windows of 16 tokens, each a positive mixture of 3 of 32 directions."""
    root, g = tmp_path_factory.mktemp("plain"), torch.Generator().manual_seed(0)
    folder = root / "activations" / "adaptive"
    folder.mkdir(parents=True)
    planted = torch.nn.functional.normalize(torch.randn(32, 24, generator=g), dim=1)
    which = torch.rand(1920, 32, generator=g).topk(3).indices
    x = torch.zeros(1920, 32).scatter(1, which, 1 + torch.rand(1920, 3, generator=g)) @ planted + 3
    np.save(folder / "L0.z.npy", x.half().numpy())
    np.save(folder / "tokens.npy", np.zeros(1920, np.uint16))
    np.save(folder / "documents.npy", np.arange(120, dtype=np.uint32).repeat(16))
    ts.write_sidecar(folder / "documents.npy", "janus.documents/1", [])
    facts = dict(
        split="train",
        seq_len=16,
        n_heads=3,
        d_head=8,
        arm="adaptive",
        checkpoint="gone.pt",
        checkpoint_sha256="0",
        shape=[1920, 24],
    )
    moments = dict(mean=x.mean(0).tolist(), variance=x.var(0).tolist())
    ts.write_sidecar(
        folder / "L0.z.npy",
        "janus.activations/1",
        [],
        dtype="float16",
        preset="smoke",
        **facts,
        **moments,
    )
    return root


def run(dumps: Path, out: Path, *more: str) -> int:
    return ts.main(
        ["--activations_dir", str(dumps / "activations"), "--save_dir", str(out), *SMALL, *more]
    )


@pytest.mark.parametrize("arch", ["batchtopk", "jumprelu"])
def test_plain_from_the_command_line_ends_where_the_fast_step_does(dumps, tmp_path, arch):
    assert run(dumps, tmp_path / "fast", "--arch", arch, "--dtype", "float32") == 0
    assert run(dumps, tmp_path / "plain", "--arch", arch, "--plain") == 0
    fast, plain = (
        pd.read_csv(tmp_path / way / "sae_metrics.csv").iloc[0] for way in ("fast", "plain")
    )
    for name in ("l0", "fvu", "mse"):
        assert plain[name] == pytest.approx(fast[name], rel=2e-2), name
    cfgs = [
        json.loads((tmp_path / way / "adaptive/L0/cfg.json").read_text())
        for way in ("fast", "plain")
    ]
    assert cfgs[0] == cfgs[1]


def abstopk(x: torch.Tensor, sae: ts.Weights, now: ts.Now) -> ts.Output:
    """The k largest by absolute value, with their sign."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    largest = pre.abs().topk(now.k).indices
    latents = torch.zeros_like(pre).scatter(1, largest, pre.gather(1, largest))
    reconstruction = latents @ sae.W_dec + sae.b_dec
    return ts.Output(latents, reconstruction, torch.nn.functional.mse_loss(reconstruction, x))


def test_a_function_in_the_table_is_an_architecture(dumps, tmp_path, monkeypatch, capsys):
    """It trains, saves, exports, resumes, is measured and drawn, and negative latents count."""
    monkeypatch.setitem(ts.ARCHITECTURES, "abstopk", ts.Architecture(abstopk))
    assert run(dumps, tmp_path / "whole", "--arch", "abstopk", "--lr_decay", "0") == 0
    out = capsys.readouterr().out
    assert "SAELens has no class for abstopk" in out and "in float32" in out
    folder = tmp_path / "whole/adaptive/L0"
    sae = ts.load_sae(folder)
    everything = torch.from_numpy(
        np.load(dumps / "activations/adaptive/L0.z.npy").astype(np.float32)
    )
    # of 120 documents of a window, those whose places times the golden ratio lie less than 5 % above a whole number
    raw = everything.view(120, 16, 24)[[0, 13, 34, 68, 89, 102]].reshape(96, 24)
    latents = sae.encode(raw)
    assert ((latents != 0).sum(1) == 4).all() and (latents < 0).sum() > 20
    assert torch.equal(sae.encode(raw.view(6, 16, 24)), latents.view(6, 16, 96))
    row = pd.read_csv(tmp_path / "whole/sae_metrics.csv").iloc[0]
    fvu = (sae.decode(latents) - raw).square().sum() / (raw - raw.mean(0)).square().sum()
    assert (
        row["arch"] == "abstopk"
        and row["k"] == row["l0"] == 4
        and row["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
        and row["fvu"] < 0.7
    )
    assert (
        pd.read_csv(folder / "latent_frequencies.csv")["n_fired"].tolist()
        == (sae.encode(everything) != 0).sum(0).tolist()
    )
    assert all(
        (tmp_path / "whole" / name).stat().st_size > 1000
        for name in ("figure2_l0_by_depth.png", "figure3_activation_frequency.png")
    )
    from sae_lens import SAE

    with pytest.raises(KeyError, match="janus.abstopk"):  # its own abstopk wants other settings
        SAE.load_from_disk(str(folder))
    assert (
        run(dumps, tmp_path / "parts", "--arch", "abstopk", "--lr_decay", "0", "--steps", "30") == 0
    )
    assert run(dumps, tmp_path / "parts", "--arch", "abstopk", "--lr_decay", "0", "--resume") == 0
    assert (tmp_path / "parts/adaptive/L0" / ts.WEIGHTS).read_bytes() == (
        folder / ts.WEIGHTS
    ).read_bytes()
    monkeypatch.delitem(ts.ARCHITECTURES, "abstopk")
    with pytest.raises(
        ts.HandoffError, match="of architecture janus.abstopk, not of standard, topk"
    ):
        ts.load_sae(folder)


def test_an_export_of_another_function_is_not_signed(dumps, tmp_path, monkeypatch, capsys):
    """topk has a relu, abstopk has none: weights folded right, run by the wrong class."""
    record = ts.Architecture(abstopk, saelens="topk", twins=ts.topk_twins)
    monkeypatch.setitem(ts.ARCHITECTURES, "abstopk", record)
    assert run(dumps, tmp_path, "--arch", "abstopk") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unlike the forward of --arch abstopk" in line and "`saelens`" in line
    assert not (tmp_path / "adaptive/L0" / (ts.WEIGHTS + ".json")).exists()


def test_what_an_export_cannot_fold_is_not_signed(dumps, tmp_path, monkeypatch, capsys):
    """A gain does not scale with x: an architecture that forgets to say so is found out."""

    def with_gain(x, sae, now):
        pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * sae.gain
        latents = pre.relu()
        reconstruction = latents @ sae.W_dec + sae.b_dec
        return ts.Output(
            latents,
            reconstruction,
            torch.nn.functional.mse_loss(reconstruction, x) + now.l1 * latents.sum(1).mean(),
        )

    record = ts.Architecture(with_gain, l0_flag=None, extra={"gain": 1.0})
    monkeypatch.setitem(ts.ARCHITECTURES, "gain", record)
    assert run(dumps, tmp_path, "--arch", "gain") == 1
    assert "unlike the SAE trained" in capsys.readouterr().err
    monkeypatch.setitem(ts.ARCHITECTURES, "gain", dataclasses.replace(record, unitless=("gain",)))
    assert run(dumps, tmp_path, "--arch", "gain", "--overwrite") == 0
    assert math.isnan(pd.read_csv(tmp_path / "sae_metrics.csv")["k"].iloc[0])


def test_an_edit_of_the_forward_alone_is_found(dumps, tmp_path, monkeypatch, capsys):
    def squared(x, sae, now):
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        latents = pre.relu()
        reconstruction = latents @ sae.W_dec + sae.b_dec
        return ts.Output(
            latents,
            reconstruction,
            torch.nn.functional.mse_loss(reconstruction, x)
            + now.l1 * latents.square().sum(1).mean(),
        )

    monkeypatch.setattr(ts.ARCHITECTURES["relu"], "forward", squared)
    assert run(dumps, tmp_path, "--arch", "relu") == 1
    assert "than its forward; change both alike, or train with --plain" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
    assert run(dumps, tmp_path, "--arch", "relu", "--plain") == 0


def test_a_weight_of_l1_that_warms_up_is_in_both(dumps, tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "l1_weight", lambda now: now.l1 * min(1, now.step / (0.1 * now.steps)))
    for arch in ("relu", "gated"):
        assert (
            run(dumps, tmp_path, "--arch", arch, "--overwrite") == 0
        )  # the check of the fast step passes
        t, x = trainer(arch=arch), torch.randn(64, 16)
        t.step_count = 2
        fast, plain = t.architecture.fast(x, t.sae, t.now()), ts.plain_gradients(x, t.sae, t.now())
        t.step_count = 40
        late = ts.plain_gradients(x, t.sae, t.now())
        for name in ("W_enc", "b_enc"):
            assert (fast.by_name[name] - plain.by_name[name]).norm() <= 1e-5 * plain.by_name[
                name
            ].norm()
            assert (late.by_name[name] - plain.by_name[name]).norm() > 1e-3 * plain.by_name[
                name
            ].norm()


def test_an_older_checkpoint_had_the_default_of_a_new_flag(dumps, tmp_path, monkeypatch, capsys):
    flags = ["--lr_decay", "0", "--arch", "topk", "--dtype", "float32"]
    assert run(dumps, tmp_path / "whole", *flags, "--steps", "40") == 0
    assert run(dumps, tmp_path / "s", *flags, "--steps", "20") == 0
    path = tmp_path / "s/adaptive/L0/training_state.pt"
    state = torch.load(path, weights_only=True)
    for name in (
        "plain",
        "aux_k",
        "l1",
    ):  # as if the flags were newer than the file; one of them is a size of the preset
        del state["trajectory"][name]
    torch.save(state, path)
    for change, message in (
        (["--aux_k", "2"], "would change aux_k of"),
        (["--l1", "0.5"], "from 0.02 to 0.5"),
    ):
        assert run(dumps, tmp_path / "s", *flags, *change, "--steps", "40", "--resume") == 1
        assert message in capsys.readouterr().err
    assert run(dumps, tmp_path / "s", *flags, "--plain", "--steps", "40", "--resume") == 1
    assert "would change plain of" in capsys.readouterr().err
    assert run(dumps, tmp_path / "s", *flags, "--steps", "40", "--resume") == 0
    name = f"adaptive/L0/{ts.WEIGHTS}"
    assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_every_argument_that_decides_the_weights_is_kept(dumps):
    """Also one that nobody has thought of: only what is listed may differ."""
    args = ts.parse_args(["--activations_dir", str(dumps / "activations"), *SMALL])
    args.brand_new, args.a_path = 7, Path("x")
    job = ts.find_jobs(args)[0]
    assert (
        job.trajectory["brand_new"] == 7
        and job.trajectory["a_path"] == "x"
        and "target_l0" not in job.trajectory
    )
    assert set(ts.MAY_DIFFER) <= set(vars(job.args)) | {"epochs"}
    assert not {"arch", "k", "l1", "seed", "dtype", "steps", "lr_decay", "aux_k", "plain"} & set(
        ts.MAY_DIFFER
    )


@pytest.mark.parametrize("flags", [["--plain", "--dtype", "bfloat16"], ["--plain", "--int8"]])
def test_plain_is_float32(flags, capsys):
    with pytest.raises(SystemExit) as e:
        ts.main(flags)
    assert e.value.code == 2 and "computes in float32" in capsys.readouterr().err

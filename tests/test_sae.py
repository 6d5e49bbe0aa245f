"""train_sae.py against autograd, planted dictionaries, SAELens and itself interrupted."""

import argparse
import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import train_sae as ts

CPU = torch.device("cpu")
ROOT = Path(ts.__file__).parent
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
SAELENS = {
    "batchtopk": "jumprelu",
    "topk": "topk",
    "relu": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "matryoshka": "jumprelu",
}
SMALL += ["--eval_tokens", "600", "--device", "cpu", "--dtype", "float32"]


def settings(**more) -> argparse.Namespace:
    """What a Trainer reads from the command line."""
    base = dict(
        arch="topk",
        expansion=4,
        k=4,
        target_l0=4,
        l1=3e-3,
        aux_k=-1,
        dead_tokens=10**9,
        batch_size=128,
        steps=100,
        learning_rate=1e-3,
    )
    return argparse.Namespace(
        **base | dict(lr_warmup=5, lr_decay=0.2, seed=0, dtype="float32", null="") | more
    )


def trainer(d: int = 16, **more) -> ts.Trainer:
    """A trainer away from its start: all biases and scales differ from their defaults."""
    t = ts.Trainer(settings(**more), torch.zeros(d), math.sqrt(d), CPU)
    g = torch.Generator().manual_seed(3)
    t.sae.W_enc += 0.2 * torch.randn(t.sae.W_enc.shape, generator=g)
    t.sae.b_enc += 0.1 * torch.randn(t.sae.b_enc.shape, generator=g)
    t.sae.b_dec += 0.3 * torch.randn(t.sae.b_dec.shape, generator=g)
    for p in t.params[4:]:  # a threshold is positive; r_mag and b_mag need not be
        p += (
            1 + 0.5 * torch.rand(p.shape, generator=g)
            if t.args.arch == "jumprelu"
            else 0.3 * torch.randn(p.shape, generator=g)
        )
    return t


# ------------------------------------------------------------------------------------------------ selection and gradients
@pytest.mark.parametrize("f, k", [(512, 8), (96, 8), (50, 5), (64, 64)])
def test_row_topk_is_exact(f, k):
    pre = torch.randn(70, f, generator=torch.Generator().manual_seed(f))
    value, latent = ts.row_topk(pre, k)
    assert torch.equal(value.sort(1, descending=True).values, pre.topk(k).values)
    assert torch.equal(pre.gather(1, latent), value)
    assert all(len(set(row)) == k for row in latent.tolist())


def test_topk_keeps_k_a_token_and_batchtopk_the_largest_of_the_batch():
    g = torch.Generator().manual_seed(0)
    # rows of very different size: some must get more than 2 k entries, others none
    pre = torch.randn(64, 160, generator=g) * torch.linspace(0.01, 5, 64)[:, None] + 0.3
    code = ts.select_topk(pre, 6)
    assert torch.bincount(code.token, minlength=64).eq(6).all()
    for guess in (0.5, 0.0, 1e9):
        code, tau = ts.select_batchtopk(pre, 6, guess)
        assert len(code.value) == 6 * 64
    assert torch.bincount(code.token, minlength=64).max() > 12
    assert (
        torch.equal(code.value.sort(descending=True).values, pre.flatten().topk(6 * 64).values)
        and tau == code.value.min()
    )
    assert torch.equal(pre[code.token, code.latent], code.value)
    assert torch.equal(code.start, torch.searchsorted(code.token, torch.arange(64)))
    code, tau = ts.select_batchtopk(pre - 100, 6)
    assert len(code.value) == 0 and tau == 0


class Jump(torch.autograd.Function):
    """pre [pre > threshold] and [pre > threshold], with the pseudo-derivatives of arXiv 2407.14435, equations 11 and 12."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold), (pre > threshold).float()

    @staticmethod
    def backward(ctx, d_f, d_step):
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold) / ctx.width).abs().lt(0.5) / ctx.width
        return d_f * (pre > threshold), -(kernel * (threshold * d_f + d_step)).sum(0), None


def dense_loss(
    t: ts.Trainer, x: torch.Tensor, params: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The documented loss, written densely for autograd; the latents [N, F] and the error [N, D]."""
    a, (w_enc, b_enc, w_dec, b_dec, *more) = t.args, params
    pre = (x - b_dec) @ w_enc.T + b_enc
    if a.arch == "jumprelu":
        f, step = Jump.apply(pre, more[0], ts.BANDWIDTH)
    elif a.arch == "gated":
        f = (pre > 0) * (((x - b_dec) @ w_enc.T) * more[0].exp() + more[1]).relu()
    else:
        cut = (
            0
            if a.arch == "relu"
            else pre.topk(a.k).values[:, -1:]
            if a.arch == "topk"
            else pre.flatten().topk(a.k * len(x)).values[-1]
        )
        f = pre.relu() * (pre >= cut)
    error = f @ w_dec + b_dec - x
    loss = error.square().sum(1).mean() / x.shape[1]
    if a.arch == "matryoshka":
        prefixes = [
            f[:, :m] @ w_dec[:m] + b_dec - x for m in (2, 6, 14, 30, 64)
        ]  # 1, 3, 7, 15 and 32 of 32 parts
        loss = sum(part.square().sum(1).mean() for part in prefixes) / 5 / x.shape[1]
    if a.arch == "jumprelu":
        loss = loss + (step.sum(1).mean() / a.target_l0 - 1) ** 2
    if a.arch == "relu":
        loss = loss + a.l1 * f.sum(1).mean()
    if a.arch == "gated":
        by_gate = pre.relu() @ w_dec.detach() + b_dec.detach() - x
        loss = loss + by_gate.square().sum(1).mean() / x.shape[1] + a.l1 * pre.relu().sum(1).mean()
    dead = t.idle > a.dead_tokens
    if a.aux_k and dead.any() and a.arch not in ("relu", "gated"):
        m = math.ceil(len(x) / 8)
        top = pre[:m, dead].topk(min(a.aux_k if a.aux_k > 0 else x.shape[1] // 2, int(dead.sum())))
        acts = torch.zeros(m, int(dead.sum())).scatter(1, top.indices, top.values.relu())
        residual = -error[:m].detach()
        loss = loss + (acts @ w_dec[dead] - residual).square().sum() / residual.square().sum() / 32
    return loss, f, error


CASES = [
    ("topk", 0),
    ("topk", 3),
    ("batchtopk", -1),
    ("relu", 0),
    ("jumprelu", 0),
    ("jumprelu", 3),
    ("gated", 0),
    ("matryoshka", -1),
]


@pytest.mark.parametrize("arch, aux_k", CASES)
def test_gradients_equal_dense_autograd(arch, aux_k):
    t = trainer(arch=arch, aux_k=aux_k, dead_tokens=50)
    x = 2 * torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    params = [p.clone().requires_grad_() for p in t.params]
    assert len(params) == 4 + {"jumprelu": 1, "gated": 2}.get(arch, 0)
    t.idle[::3] = 51
    mse, fired = t.gradients(x)
    loss, f, error = dense_loss(t, x, params)
    loss.backward()
    for ours, reference in zip(t.params, params, strict=True):
        assert (
            reference.grad.norm() > 0
            and (ours.grad - reference.grad).norm() <= 1e-5 * reference.grad.norm()
        )
    assert torch.equal(fired, (f > 0).sum(0)) and 0 < fired.sum() < f.numel()
    assert mse.item() == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_int8_products_are_those_of_the_rounded_rows():
    g = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(40, 96, generator=g),
        1e-3 * torch.randn(64, 96, generator=g),
        torch.randn(64, generator=g),
    )
    x[0], x[1], w[0], w[1] = 0, 3, 7, -7  # nothing; and the largest sums, which must not saturate
    x[2] = x[2] * torch.logspace(-3, 0, 96)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.double().abs().amax(1, keepdim=True) / 127
        return (rows / scale.clamp(min=1e-30)).round() * scale

    found = ts.int8_products(x, w, b)
    products = rounded(x) @ rounded(w).T
    assert found.dtype == torch.bfloat16
    # bfloat16 rounds five times by at most 1 in 256 / 2: the sum, both scales, the bias and the result
    torch.testing.assert_close(
        found.double(), products + b, rtol=0, atol=float(5 / 512 * (products.abs() + b.abs()).max())
    )
    big = products.abs() > 20 * b.abs()
    assert (
        big.sum() > 50
        and ((found - products - b)[big].abs() <= 5 / 256 * products[big].abs()).all()
    )
    error, size = (
        (products - x @ w.T)[3:, 2:],
        x[3:].norm(dim=1)[:, None] * w[2:].norm(dim=1) / math.sqrt(96),
    )
    assert 0.005 < (error / size).square().mean().sqrt() < 0.015  # 1 %, as the docstring says


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_all_latents_may_fire(arch, dtype):
    """k = F: nothing is left that could be confused with the k-th largest."""
    t = trainer(d=16, arch=arch, expansion=2, k=32, aux_k=0, dtype=dtype)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    params = [p.clone().requires_grad_() for p in t.params]
    loss, _, _ = dense_loss(t, x, params)
    loss.backward()
    t.gradients(x)
    for ours, reference in zip(t.params, params, strict=True):
        assert (ours.grad - reference.grad).norm() < 0.01 * reference.grad.norm()


def test_int8_also_fits_the_residual_with_dead_latents():
    """The auxiliary loss takes its values from bfloat16, not from int8."""
    t = trainer(d=64, expansion=8, k=8, aux_k=5, dead_tokens=50, dtype="int8")
    x = 2 * torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    t.idle[::3], t.sae.b_enc[::3] = 51, -4
    params = [p.clone().requires_grad_() for p in t.params]
    _, fired = t.gradients(x)
    dense_loss(t, x, params)[0].backward()
    assert (
        silent := (fired == 0) & (t.idle > 50)
    ).sum() > 100  # their gradient comes from the auxiliary loss alone
    for ours, reference in list(zip(t.params, params, strict=True))[:3]:
        error = (ours.grad - reference.grad)[silent].norm() / reference.grad[silent].norm()
        assert error < 0.01, error


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_training_gradients_in_low_precision_are_within_one_percent_of_dense_float32(arch, dtype):
    """Though bfloat16 or int8 alone would choose other latents: it proposes, float32 decides."""
    t, x = (
        trainer(d=128, arch=arch, expansion=8, k=16, aux_k=0, dtype=dtype),
        torch.randn(256, 128, generator=torch.Generator().manual_seed(1)),
    )
    params = [p.clone().requires_grad_() for p in t.params]
    loss, f, _ = dense_loss(t, x, params)
    loss.backward()
    sae, low = t.sae, x - t.sae.b_dec
    pre = (
        ts.int8_products(low, sae.W_enc, sae.b_enc)
        if dtype == "int8"
        else low.bfloat16() @ sae.W_enc.bfloat16().T + sae.b_enc
    )
    pre = pre.float()
    code = ts.select_topk(pre, 16) if arch == "topk" else ts.select_batchtopk(pre, 16)[0]
    assert not torch.equal((f > 0).sum(0), torch.bincount(code.latent, minlength=1024)), (
        "a test of nothing"
    )
    _, fired = t.gradients(x)
    assert torch.equal(fired, (f > 0).sum(0))
    for ours, reference in zip(t.params, params, strict=True):
        assert (ours.grad - reference.grad).norm() < 0.01 * reference.grad.norm()


def test_bfloat16_gradients_are_within_one_percent():
    t = trainer(d=64, expansion=8, k=8)
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(256, 64, generator=g), torch.randn(256, 64, generator=g)
    code = ts.select_topk(x @ t.sae.W_enc.T, 8)
    slope = torch.ones_like(code.value)
    exact, exact_value = ts.sparse_backward(x, code, dy, t.sae.W_dec, slope)
    found, found_value = ts.sparse_backward(
        x.bfloat16(),
        code.cast(torch.bfloat16),
        dy.bfloat16(),
        t.sae.W_dec.bfloat16(),
        slope.bfloat16(),
    )
    for a, b in zip((*found, found_value), (*exact, exact_value), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_relu_equals_a_plain_autograd_loop():
    t, a = trainer(arch="relu", steps=30), settings(arch="relu", steps=30)
    params = [p.clone().requires_grad_() for p in t.params]
    adam = torch.optim.Adam(params, lr=1.0, eps=1e-9)
    g = torch.Generator().manual_seed(2)
    for step in range(1, 31):
        x = torch.randn(128, 16, generator=g)
        t.step(x)
        adam.zero_grad()
        dense_loss(t, x, params)[0].backward()
        adam.param_groups[0]["lr"] = a.learning_rate * min(1, step / 5, (31 - step) / 6)
        with torch.no_grad():
            w = params[2]
            w.grad -= (w.grad * w).sum(1, keepdim=True) * w
            adam.step()
            w /= w.norm(dim=1, keepdim=True)
    for ours, reference in zip(t.params, params, strict=True):
        torch.testing.assert_close(ours, reference.detach(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "relu"])
def test_a_latent_that_does_not_fire_stands_still(arch):
    t, g = trainer(arch=arch), torch.Generator().manual_seed(5)
    if arch == "relu":
        t.sae.b_enc -= 1.6  # else all latents fire in every batch
    for _ in range(6):
        t.step(torch.randn(24, 16, generator=g))
    x = torch.randn(24, 16, generator=g)
    w_enc, b_enc, w_dec, _ = params = [p.clone().requires_grad_() for p in t.params]
    fires = (dense_loss(t, x, params)[1] > 0).any(0)
    sae = t.sae
    momentum = t.optimizer.state[sae.W_enc]["exp_avg"].abs().sum(1) > 0
    assert fires.sum() > 5 and (momentum & ~fires).sum() > 5  # those would be dragged along
    t.step(x)
    assert torch.equal(sae.W_enc[~fires], w_enc[~fires]) and torch.equal(
        sae.b_enc[~fires], b_enc[~fires]
    )
    torch.testing.assert_close(
        sae.W_dec[~fires], w_dec[~fires], rtol=1e-6, atol=1e-7
    )  # its norm is set to 1 again
    assert (sae.W_enc != w_enc)[fires].any(1).all() and (sae.W_dec != w_dec)[fires].any(1).all()


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu", "matryoshka", "gated"])
def test_a_planted_dictionary_is_recovered(arch):
    d, n_features, active = 32, 64, 3
    g = torch.Generator().manual_seed(0)
    planted = F.normalize(torch.randn(n_features, d, generator=g), dim=1)
    mean = 5 * torch.randn(d, generator=g)

    def draw(n: int) -> torch.Tensor:
        which = torch.rand(n, n_features, generator=g).topk(active).indices
        return (
            torch.zeros(n, n_features).scatter(1, which, 1 + torch.rand(n, active, generator=g))
        ) @ planted + mean

    x = draw(4096)
    t = ts.Trainer(
        settings(
            arch=arch,
            k=active,
            target_l0=active,
            l1=0.03,
            steps=800,
            dead_tokens=20_000,
            learning_rate=3e-3,
        ),
        x.mean(0),
        (x - x.mean(0)).norm(dim=1).mean().item(),
        CPU,
    )
    held_out, fvu, l0 = draw(2048), [], 0.0
    for step in range(800):
        t.step(draw(256))
        if step in (0, 799):
            sae = ts.SparseAutoencoder(
                {"architecture": SAELENS[arch], "k": active}, t.weights(t.scale, t.mean)
            )
            error, f = sae.decode(sae.encode(held_out)) - held_out, sae.encode(held_out)
            fvu += [(error.square().sum() / (held_out - held_out.mean(0)).square().sum()).item()]
            l0 = (f > 0).sum(1).float().mean().item()
    assert fvu[1] < 0.1 and fvu[1] < fvu[0] / 2
    assert abs(l0 - active) < 0.2 if arch != "gated" else l0 < 0.25 * len(t.sae.W_dec)
    cosine = planted @ t.sae.W_dec.T
    assert cosine.max(1).values.mean() > 0.9
    control = planted @ F.normalize(torch.randn(t.sae.W_dec.shape, generator=g), dim=1).T
    assert control.max(1).values.mean() < 0.7  # what as many random directions reach


@pytest.mark.parametrize("arch", SAELENS)
def test_folding_changes_nothing_but_the_units(arch):
    t = trainer(arch=arch)
    t.cut += 0.4
    cfg = {"architecture": SAELENS[arch], "k": 4}
    raw = torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    scale, mean = 7.3, torch.linspace(-2, 3, 16)
    inside = ts.SparseAutoencoder(cfg, t.weights())
    folded = ts.SparseAutoencoder(cfg, t.weights(scale, mean))
    f, f_raw = inside.encode((raw - mean) * scale), folded.encode(raw)
    torch.testing.assert_close(f_raw * scale, f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        folded.decode(f_raw), inside.decode(f) / scale + mean, rtol=1e-4, atol=1e-5
    )
    assert 0 < (f > 0).sum(1).float().mean() <= (4 if arch == "topk" else 64)


def test_interval_agrees_with_the_textbook():
    x = np.random.default_rng(0).normal(3, 2, 400)
    each = np.arange(400)  # every window a document of its own
    out = ts.ratio_interval("m", x, 1.0, each)
    assert out["m"] == pytest.approx(x.mean())
    assert (out["m_hi"] - out["m_lo"]) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.1)
    ratio = ts.ratio_interval("r", x * 2, x, each)
    assert ratio["r"] == ratio["r_lo"] == ratio["r_hi"] == 2


def test_interval_counts_documents_and_not_their_windows():
    """Ten equal windows a document say no more than one."""
    x = np.random.default_rng(0).normal(3, 2, 40)
    once = ts.ratio_interval("m", x, 1.0, np.arange(40))
    tenfold = ts.ratio_interval("m", x.repeat(10), 1.0, np.arange(40).repeat(10))
    assert tenfold == pytest.approx(once)
    order = np.random.default_rng(1).permutation(
        400
    )  # numbers and order of the windows do not matter
    mixed = ts.ratio_interval("m", x.repeat(10)[order], 1.0, 7 * np.arange(40).repeat(10)[order])
    assert mixed == pytest.approx(once)


def test_there_is_no_interval_where_it_would_mean_nothing():
    rng = np.random.default_rng(0)
    few = ts.LEAST_DOCUMENTS - 1
    x = rng.normal(3, 1, 10 * few)
    out = ts.ratio_interval("m", x, 1.0, np.arange(few).repeat(10))
    assert out["m"] == pytest.approx(x.mean()) and math.isnan(out["m_lo"] + out["m_hi"])
    out = ts.ratio_interval("m", rng.normal(size=60), rng.normal(size=60), np.arange(60))
    assert math.isnan(out["m_lo"] + out["m_hi"])  # a denominator that may be 0


# ----------------------------------------------------------------------------------------------------- a run and its dump
# Of the 80 documents of `made`, one a window, those held out: their places times the golden ratio lie less than 5 %
# above a whole number
HELD_OUT = [0, 13, 34, 68]


def documents_of_made() -> np.ndarray:
    """[80, 32]: a document a window, but 33 ends in the next document, which is held out, and 68, which is held out, in 69."""
    documents = np.arange(80, dtype=np.uint32)[:, None].repeat(32, 1)
    documents[33, -1] = 34
    documents[68, -5:] = 69
    return documents


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a small random model, model.pt, and its dump activations/adaptive of 80 windows, layers 0 and 2, made here."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    cfg = ts.GPTConfig(
        vocab_size=61,
        n_layers=3,
        d_model=24,
        n_heads=3,
        n_kv_heads=3,
        d_head=8,
        d_ff=40,
        seq_len=32,
    )
    model = ts.NewGPT(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.dim() == 1 else 0.0))
    torch.save(
        {"config": vars(cfg), "model": model.state_dict(), "probe": ts.golden_probe(model)},
        root / "model.pt",
    )
    ts.write_sidecar(root / "model.pt", ts.CHECKPOINT_SCHEMA, [])
    idx = torch.randint(61, (80, 32))
    tap = dict.fromkeys(["z.0", "z.2", "mlp_out.2"])
    with torch.no_grad():
        model(idx, tap=tap)
    folder = root / "activations" / "adaptive"
    folder.mkdir(parents=True)
    facts = dict(
        n_heads=3,
        d_head=8,
        seq_len=32,
        preset="smoke",
        arm="adaptive",
        run_name="adaptive",
        dataset="none",
        tokenizer_hash="none",
        split="train",
        windows="spread over the split",
    )
    facts |= dict(checkpoint=str(root / "model.pt"), checkpoint_sha256=ts.sha256(root / "model.pt"))
    np.save(folder / "tokens.npy", idx.flatten().numpy().astype(np.uint16))
    ts.write_sidecar(
        folder / "tokens.npy", "janus.tokens/1", [root / "model.pt"], shape=[2560], **facts
    )
    np.save(folder / "documents.npy", documents_of_made().flatten())
    ts.write_sidecar(
        folder / "documents.npy", "janus.documents/1", [root / "model.pt"], shape=[2560], **facts
    )
    for name, value in tap.items():
        x = value.reshape(2560, 24).half().numpy()
        site, layer = name.split(".")
        np.save(folder / f"L{layer}.{site}.npy", x)
        moments = dict(
            mean=x.astype(float).mean(0).tolist(), variance=x.astype(float).var(0).tolist()
        )
        where = dict(layer=int(layer), site=site, axes="N D", shape=[2560, 24], dtype="float16")
        ts.write_sidecar(
            folder / f"L{layer}.{site}.npy",
            "janus.activations/1",
            [root / "model.pt"],
            **where,
            **facts,
            **moments,
        )
    return root


def run(made: Path, out: Path, *more: str, small: list[str] = SMALL) -> int:
    return ts.main(
        ["--activations_dir", str(made / "activations"), "--save_dir", str(out), *small, *more]
    )


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory) -> Path:
    """SAEs of each architecture, in <arch>/adaptive/L0 and L2."""
    out = tmp_path_factory.mktemp("saes")
    for arch in SAELENS:
        assert (
            run(made, out / arch, "--runs", "adaptive", "--layers", "0", "2", "--arch", arch) == 0
        )
    return out


def held_out(made: Path, layer: int) -> torch.Tensor:
    """The rows of the 4 windows held out, 128, float32."""
    x = np.load(made / f"activations/adaptive/L{layer}.z.npy").astype(np.float32)
    return torch.from_numpy(x.reshape(80, 32, 24)[HELD_OUT].reshape(128, 24))


def test_tensorboard_shows_the_numbers_of_the_csv(made, finished, tmp_path):
    pytest.importorskip("tensorboard", reason="requirements-dev.txt installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        run(
            made, tmp_path, "--runs", "adaptive", "--layers", "0", "--arch", "topk", "--tensorboard"
        )
        == 0
    )
    folder, events = (
        tmp_path / "adaptive" / "L0",
        EventAccumulator(str(tmp_path / "adaptive" / "L0" / "tensorboard")),
    )
    events.Reload()
    t = pd.read_csv(folder / "training.csv")
    for column in ("mse_normalised", "l0", "dead_share"):
        shown = [(e.step, e.value) for e in events.Scalars(column)]
        assert [step for step, _ in shown] == t["step"].tolist() and np.allclose(
            [v for _, v in shown], t[column], rtol=1e-6
        )
    assert t.equals(pd.read_csv(finished / "topk" / "adaptive" / "L0" / "training.csv")), (
        "looking must not change the training"
    )


@pytest.mark.parametrize("arch", SAELENS)
def test_saelens_loads_the_export_and_agrees(made, finished, arch):
    from sae_lens import SAE

    folder, x = finished / arch / "adaptive" / "L2", held_out(made, 2)
    theirs, ours = SAE.load_from_disk(str(folder)), ts.load_sae(folder)
    assert theirs.cfg.architecture() == SAELENS[arch]
    assert theirs.cfg.metadata.hook_name == "blocks.2.attn.hook_z"
    with torch.no_grad():
        everything = np.load(made / "activations/adaptive/L2.z.npy").astype(np.float32)
        fired = (theirs.encode(torch.from_numpy(everything)) > 0).sum(0).numpy()
        f = theirs.encode(x)
        assert (f - ours.encode(x)).abs().max() <= 1e-5 and (
            theirs.decode(f) - ours.decode(ours.encode(x))
        ).abs().max() <= 1e-5
        theirs.turn_on_forward_pass_hook_z_reshaping()  # what the docstring tells users of HookedSAETransformer to do
        assert torch.equal(
            theirs(x.view(4, 32, 3, 8)).reshape(128, 24), theirs.decode(f).reshape(128, 24)
        )
    assert (ours.weights["W_dec"].norm(dim=1) - 1).abs().max() < 1e-5
    # the metrics, once more, with SAELens' numbers and numpy
    m = json.loads((folder / "sae_weights.safetensors.json").read_text())["metrics"]
    y, n, xn = ours.decode(f).numpy(), (f > 0).sum(1).numpy(), x.numpy()
    assert (
        m["l0"] == pytest.approx(n.mean(), rel=1e-6) and m["n_windows"] == 4 and m["n_rows"] == 128
    )
    assert m["n_documents"] == 4 and math.isnan(m["fvu_lo"] or math.nan)  # too few for an interval
    assert m["fvu"] == pytest.approx(
        ((y - xn) ** 2).sum() / ((xn - xn.mean(0)) ** 2).sum(), rel=1e-4
    )
    assert m["mse"] == pytest.approx(((y - xn) ** 2).mean(), rel=1e-4)
    assert m["ev_legacy"] == pytest.approx(
        (1 - ((y - xn) ** 2).sum(1) / ((xn - xn.mean(0)) ** 2).sum(1)).mean(), rel=1e-4
    )
    # how often latents fire: on the whole dump, which has less than 100,000 tokens
    latents = pd.read_csv(folder / "latent_frequencies.csv")
    assert np.abs(latents["n_fired"] - fired).sum() <= 2  # rounding, where one is at its threshold
    assert set(latents["n_rows"]) == {2560} and m["dead_share_tokens"] == 2560
    assert m["dead_share"] == pytest.approx((latents["n_fired"] == 0).mean())
    assert n.max() <= 4 if arch == "topk" else n.std() > 0
    assert m["fvu"] < 0.7 and m["l0"] < 6 or arch in ("relu", "gated")  # 60 steps on random z


def test_a_topk_folder_serves_three_libraries(made, finished, monkeypatch):
    # dictionary_learning imports two packages for other ends (tracing models, reading .zst files)
    for name, member in (("nnsight", "LanguageModel"), ("zstandard", "ZstdDecompressor")):
        monkeypatch.setitem(sys.modules, name, stub := types.ModuleType(name))
        stub.__spec__ = ModuleSpec(name, None)  # for those that only ask whether it is there
        setattr(stub, member, None)
    reason = "installed without its dependencies: make setup-dev"
    sparsify = pytest.importorskip("sparsify", reason=reason)
    dictionary_learning = pytest.importorskip("dictionary_learning.utils", reason=reason)
    folder, x = finished / "topk/adaptive/L2", held_out(made, 2)
    ours = ts.load_sae(folder)
    f, y = ours.encode(x), ours.decode(ours.encode(x))
    assert (f > 0).sum() > 100
    with torch.no_grad():
        theirs, config = dictionary_learning.load_dictionary(str(folder), "cpu")
        assert (
            config["trainer"]["k"] == theirs.k == 4 and type(theirs).__name__ == "AutoEncoderTopK"
        )
        assert (theirs.encode(x) - f).abs().max() <= 1e-5 and (theirs(x) - y).abs().max() <= 1e-5
        coder = sparsify.SparseCoder.load_from_disk(folder)
        top = coder.encode(x)
        assert coder.num_latents == 96 and top[0].shape == (128, 4)
        assert (torch.zeros_like(f).scatter(1, top[1], top[0]) - f).abs().max() <= 1e-5
        assert (coder.decode(top[0], top[1]) - y).abs().max() <= 1e-5
    state = torch.load(folder / "ae.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for v in state.values())


def test_another_architecture_leaves_no_twin_behind(made, finished, tmp_path):
    shutil.copytree(finished / "topk", tmp_path, dirs_exist_ok=True)
    assert all((tmp_path / "adaptive/L0" / name).stat().st_size for name in ts.TWINS)
    assert (
        run(
            made,
            tmp_path,
            "--layers",
            "0",
            "--arch",
            "jumprelu",
            "--target_l0",
            "6",
            "--steps",
            "5",
            "--overwrite",
        )
        == 0
    )
    assert not any((tmp_path / "adaptive/L0" / name).exists() for name in ts.TWINS)
    record = json.loads((tmp_path / "adaptive/L0/sae_weights.safetensors.json").read_text())
    assert record["k"] == record["trajectory"]["target_l0"] == 6
    assert pd.read_csv(tmp_path / "adaptive/L0/training.csv")["l0"].iloc[-1] == pytest.approx(
        6, abs=1.5
    )  # where thresholds start
    assert pd.read_csv(tmp_path / "sae_metrics.csv").set_index("layer")["arch"].to_dict() == {
        0: "jumprelu",
        2: "topk",
    }


def test_the_export_carries_what_the_next_phase_needs(finished):
    record = json.loads((finished / "topk/adaptive/L0/sae_weights.safetensors.json").read_text())
    expected = {
        "schema": "janus.sae/1",
        "run": "adaptive",
        "layer": 0,
        "head": None,
        "arch": "topk",
        "k": 4,
        "d_in": 24,
        "d_sae": 96,
        "unit": "layer",
    }
    assert expected.items() <= record.items() and record["inputs"][0]["path"].endswith("L0.z.npy")
    assert len(record["checkpoint_sha256"]) == 64
    rows = pd.read_csv(finished / "topk/sae_metrics.csv")
    assert rows["layer"].tolist() == [0, 2] and rows["l0"].tolist() == pytest.approx([4, 4])
    for name in (
        "table2.csv",
        "table2.md",
        "figure2_l0_by_depth.png",
        "figure3_activation_frequency.png",
        "adaptive/run.json",
    ):
        assert (finished / "topk" / name).stat().st_size > 100


def test_a_head_has_an_sae_of_its_own_beside_what_was_there(made, finished, tmp_path):
    from sae_lens import SAE

    shutil.copytree(finished / "topk", tmp_path, dirs_exist_ok=True)
    assert (
        run(made, tmp_path, "--layers", "2", "--unit", "head", "--arch", "relu", "--seed", "-3")
        == 0
    )
    rows = pd.read_csv(tmp_path / "sae_metrics.csv")
    assert (
        len(rows) == 5 and len(pd.read_csv(tmp_path / "table2.csv")) == 3
    )  # the report covers every finished SAE
    rows = rows[rows["unit"] == "head"].reset_index(drop=True)
    assert rows["head"].tolist() == [0, 1, 2] and (rows["d_in"] == 8).all()
    x = held_out(made, 2)[:, 8:16]
    theirs, ours = (
        SAE.load_from_disk(str(tmp_path / "adaptive/L2/H1")),
        ts.load_sae(tmp_path / "adaptive/L2/H1"),
    )
    assert theirs.cfg.metadata.hook_head_index == 1
    assert (theirs.encode(x) - ours.encode(x)).abs().max() <= 1e-5
    fvu = (ours.decode(ours.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert rows["fvu"][1] == pytest.approx(fvu.item(), rel=1e-4)
    table = pd.read_csv(tmp_path / "table2.csv").query("unit == 'head'").iloc[0]
    assert (table["n_saes"], table["n_documents"], table["split"]) == (3, 4, "train")
    assert table["l0"] == pytest.approx(rows["l0"].mean())
    assert table["l0_sd"] == pytest.approx(rows["l0"].std())
    assert table["dead_share"] == pytest.approx(rows["dead_share"].mean())
    assert table["dead_share_tokens"] == 2560


def test_the_interval_of_a_mean_over_heads_is_as_long_as_theirs():
    """Heads are no sample of heads: their mean is uncertain as the text is. Its error is at most the mean of theirs."""
    rng = np.random.default_rng(0)
    n, rows, by_head = 60, [], []
    shared = rng.normal(size=n)
    for head in range(3):
        x = 5 + head + shared + rng.normal(size=n)
        by_head.append(x)
        row = dict(run="r", unit="head", arch="topk", setting="k 32", seed=42, site="z", layer=0)
        row |= dict(head=head, split="train")
        row |= dict(n_documents=n, dead_share=0.1, dead_share_tokens=100_000)
        for name in ("l0", "mse", "fvu"):
            row |= ts.ratio_interval(name, x, 1.0, np.arange(n))
        rows.append(row)
    table = ts.table2(pd.DataFrame(rows)).iloc[0]
    exact = ts.ratio_interval("mean", np.mean(by_head, 0), 1.0, np.arange(n))
    assert table["l0"] == pytest.approx(exact["mean"])
    length = table["l0_hi"] - table["l0_lo"]
    assert (
        exact["mean_hi"] - exact["mean_lo"] < length < 1.5 * (exact["mean_hi"] - exact["mean_lo"])
    )


def test_figures_and_table_come_from_the_csvs_alone(finished, tmp_path):
    shutil.copytree(finished / "topk", tmp_path / "s")
    for path in [
        *tmp_path.rglob("*.png"),
        *tmp_path.rglob("table2*"),
        *tmp_path.rglob("*.safetensors*"),
        *tmp_path.rglob("*.pt"),
        *tmp_path.rglob("*.json"),
    ]:
        path.unlink(missing_ok=True)
    assert ts.main(["--redraw", "--save_dir", str(tmp_path / "s")]) == 0
    for name in (
        "table2.csv",
        "table2.md",
        "figure2_l0_by_depth.png",
        "figure3_activation_frequency.png",
    ):
        assert (tmp_path / "s" / name).read_bytes() == (finished / "topk" / name).read_bytes()


# ------------------------------------------------------------------------------------------------------------ CE recovered
def model_and_dump(made: Path, layer: int = 2, site: str = "z") -> tuple[ts.NewGPT, ts.Dump]:
    return ts.load_checkpoint(made / "model.pt", CPU, False)[0], ts.Dump(
        made / "activations/adaptive", layer, site
    )


@torch.no_grad()
def test_splicing_nothing_is_the_model_and_splicing_zero_is_ablation(made):
    model, dump = model_and_dump(made)
    idx = torch.randint(61, (3, 32))
    resid = model.run_blocks(model.embed(idx), 0, 1)
    for site in ("z", "attn_out", "mlp_out", "resid_pre", "resid_post"):
        assert torch.equal(ts.spliced(model, resid, 1, site, lambda v: v), model(idx)[0])
    scale = torch.ones(3, 3)
    scale[1] = 0
    torch.testing.assert_close(
        ts.spliced(model, resid, 1, "z", torch.zeros_like), model(idx, head_scale=scale)[0]
    )
    torch.testing.assert_close(
        ts.spliced(model, resid, 1, "attn_out", torch.zeros_like), model(idx, head_scale=scale)[0]
    )
    other = model.run_blocks(model.embed(idx.flip(0)), 0, 1)
    torch.testing.assert_close(
        ts.spliced(model, resid, 1, "resid_pre", lambda v: v.flip(0)),
        ts.spliced(model, other, 1, "z", lambda v: v),
    )


@pytest.mark.parametrize("head", [None, 1])
def test_ce_recovered_is_one_for_the_identity_and_zero_for_the_ablation(made, head):
    model, _ = model_and_dump(made)
    dump, tokens = (
        ts.Dump(made / "activations/adaptive", 2, "z", head),
        np.load(made / "activations/adaptive/tokens.npy"),
    )
    # Text that the model expects, so that it loses by ablation: each token its likeliest next one
    windows = torch.from_numpy(tokens.reshape(80, 32).astype(np.int64))
    for t in range(31):
        with torch.no_grad():
            windows[:, t + 1] = model(windows[:, : t + 1])[0][:, -1].argmax(-1)
    tokens = windows.flatten().numpy()
    d = dump.array.shape[1]
    eye, mean = torch.eye(d), torch.full((d,), 0.25)
    identity = dict(
        W_enc=torch.cat([eye, -eye], 1),
        b_enc=torch.zeros(2 * d),
        W_dec=torch.cat([eye, -eye]),
        b_dec=torch.zeros(d),
    )
    nothing = identity | {"W_enc": torch.zeros(d, 2 * d)}
    constant = nothing | {"b_dec": mean}
    saes = [
        ts.SparseAutoencoder({"architecture": "standard"}, weights)
        for weights in (identity, nothing, constant)
    ]
    losses = ts.losses_with(model, saes, dump, tokens, mean, dump.held_out)
    documents = dump.documents[dump.held_out]
    out = ts.ce_recovered(losses, "sae0", documents)
    assert out["ce_recovered_zero"] == pytest.approx(1, abs=1e-4) and out[
        "kl_sae"
    ] == pytest.approx(0, abs=1e-6)
    out = ts.ce_recovered(losses, "sae1", documents)
    assert out["ce_recovered_zero"] == pytest.approx(0, abs=1e-6) and out[
        "kl_sae"
    ] == pytest.approx(out["kl_zero"], rel=1e-5)
    out = ts.ce_recovered(losses, "sae2", documents)
    assert out["ce_recovered_mean"] == pytest.approx(0, abs=1e-6) and out["kl_sae"] > 1e-3
    # the losses, from the model itself
    idx = torch.from_numpy(tokens.reshape(80, 32)[HELD_OUT].astype(np.int64))
    scale = torch.ones(3, 3)
    scale[2] = 0 if head is None else torch.tensor([1.0, 0.0, 1.0])
    with torch.no_grad():
        clean, zero = (
            F.cross_entropy(
                model(idx, head_scale=s)[0][:, :-1].flatten(0, 1), idx[:, 1:].flatten()
            ).item()
            for s in (None, scale)
        )
    assert out["ce_clean"] == pytest.approx(clean, rel=1e-5) and out["ce_zero"] == pytest.approx(
        zero, rel=1e-5
    )


def test_another_site_and_a_model_that_is_gone(made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "copy")
    side = tmp_path / "copy/activations/adaptive/L2.mlp_out.npy.json"
    side.write_text(side.read_text().replace(str(made / "model.pt"), str(tmp_path / "gone.pt")))
    assert run(tmp_path / "copy", tmp_path / "s", "--site", "mlp_out") == 0
    assert capsys.readouterr().out.count("CE recovered and KL stay empty") == 1
    row = pd.read_csv(tmp_path / "s/sae_metrics.csv").iloc[0]
    assert row["site"] == "mlp_out" and math.isnan(row["kl_sae"]) and row["fvu"] > 0
    assert (
        json.loads((tmp_path / "s/adaptive/L2.mlp_out/cfg.json").read_text())["metadata"][
            "hook_name"
        ]
        == "blocks.2.hook_mlp_out"
    )
    # with the place named, the columns fill
    assert (
        run(
            tmp_path / "copy",
            tmp_path / "s",
            "--runs",
            "adaptive",
            "--site",
            "mlp_out",
            "--model_path",
            str(made / "model.pt"),
            "--overwrite",
        )
        == 0
    )
    assert pd.read_csv(tmp_path / "s/sae_metrics.csv")["kl_sae"].notna().all()


# -------------------------------------------------------------------------------------------------------- data and resume
def bare_dump(folder: Path, documents: np.ndarray, d: int = 2) -> ts.Dump:
    """A dump whose rows hold their own number, of windows of these documents [W, T]."""
    n = documents.size
    np.save(folder / "L0.z.npy", np.arange(n, dtype=np.float32)[:, None].repeat(d, 1))
    np.save(folder / "documents.npy", documents.astype(np.uint32).flatten())
    facts = dict(seq_len=documents.shape[1], d_head=1, dtype="float32", split="train")
    ts.write_sidecar(folder / "L0.z.npy", "janus.activations/1", [], shape=[n, d], **facts)
    ts.write_sidecar(folder / "documents.npy", "janus.documents/1", [], shape=[n], **facts)
    return ts.Dump(folder, 0, "z")


def random_documents(seed: int, n_windows: int = 400, seq_len: int = 16) -> np.ndarray:
    """[W, T]: documents that begin anywhere, each some windows long; numbers with gaps."""
    rng = np.random.default_rng(seed)
    length = rng.choice([5, 40, 200])  # tokens, about
    begins = np.cumsum(rng.geometric(1 / length, size=n_windows * seq_len))
    numbers = np.searchsorted(begins, np.arange(n_windows * seq_len), side="right")
    return 3 * numbers.reshape(n_windows, seq_len) + 2


@pytest.mark.parametrize("seed", range(12))
def test_no_document_is_both_trained_on_and_held_out(tmp_path, seed):
    documents = random_documents(seed)
    dump = bare_dump(tmp_path, documents)
    held_out, trained = set(dump.held_out), set(dump.trained)
    assert not held_out & trained
    # what makes a window held out is the document that it begins in, and all windows of that one are
    chosen = set(documents[sorted(held_out), 0])
    assert held_out == {w for w in range(400) if documents[w, 0] in chosen}
    seen = set(documents[sorted(trained)].flatten())
    assert not seen & set(documents[sorted(held_out)].flatten())
    # nothing else is left out
    unseen = set(documents[sorted(held_out)].flatten())
    assert trained == {w for w in range(400) if not unseen & set(documents[w])}
    # 5 % of the windows and at most one document more, from all over the dump
    largest = np.unique(documents[:, 0], return_counts=True)[1].max()
    assert 20 <= len(held_out) < 20 + largest
    if largest == 1:
        gaps = np.diff([-1, *sorted(held_out), 400])
        assert gaps.max() <= 3 * gaps.mean()
    assert dump.n_train == 16 * len(trained)


def test_every_sae_of_a_run_holds_out_the_same_windows(made):
    folder = made / "activations/adaptive"
    dumps = [ts.Dump(folder, 0, "z"), ts.Dump(folder, 2, "z", 1), ts.Dump(folder, 2, "mlp_out")]
    for dump in dumps:
        assert dump.held_out.tolist() == HELD_OUT
        assert dump.trained.tolist() == [w for w in range(80) if w not in [*HELD_OUT, 33, 69]]


def test_the_sidecar_names_what_was_held_out(finished, capsys):
    record = json.loads((finished / "topk/adaptive/L0/sae_weights.safetensors.json").read_text())
    assert record["held_out_documents"] == HELD_OUT and record["n_train"] == 74 * 32
    assert record["split"] == "train" and record["windows"] == "spread over the split"
    assert [Path(file["path"]).name for file in record["inputs"]] == ["L0.z.npy", "documents.npy"]


def test_every_number_says_which_text_it_is_of(made, tmp_path, capsys):
    assert run(made, tmp_path, "--layers", "0") == 0
    out = capsys.readouterr().out
    assert "held out: 4 windows (5.0%) of 4 documents of the train split, and 2 windows" in out
    assert "on 4 held-out documents of the train split" in out
    assert "never fired" in out and "on 2,560 tokens of all" in out
    row = pd.read_csv(tmp_path / "sae_metrics.csv").iloc[0]
    assert (row["split"], row["n_documents"], row["n_ce_documents"]) == ("train", 4, 3)
    assert "dead_share_eval" not in row


def test_latents_that_are_rare_are_not_dead(tmp_path):
    """Each latent fires in a document of its own: on 5 % of the documents 95 % of the latents are silent, and none is dead."""
    dump = bare_dump(tmp_path, np.arange(200)[:, None].repeat(16, 1), d=200)
    dump.array = np.eye(200, dtype=np.float32).repeat(16, 0)
    eye = torch.eye(200)
    weights = dict(W_enc=eye, b_enc=torch.zeros(200), W_dec=eye, b_dec=torch.zeros(200))
    sae = ts.SparseAutoencoder({"architecture": "standard"}, weights)
    assert (ts.count_on_windows(sae, dump, dump.held_out) == 0).mean() == 0.95  # what was printed
    assert (ts.count_on_windows(sae, dump, dump.mixture(10**5)) == 16).all()
    half = dump.mixture(1600)
    assert len(half) == 100 and np.diff(half).max() == 2  # spread over the dump
    assert len(dump.mixture(1601)) == 101  # at least as many tokens


def test_batches_are_the_training_rows_each_once_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "POOL", 1024)  # several pools
    monkeypatch.setattr(ts, "BLOCK", 32)
    dump = bare_dump(tmp_path, np.arange(400)[:, None].repeat(16, 1))
    assert len(dump.held_out) == 20 and dump.n_train == 380 * 16
    pools, per_pool = dump.layout(64).n_pools, dump.layout(64).batches_per_pool
    epoch = torch.cat([dump.batch(i, 64, 7)[:, 0] for i in range(pools * per_pool)])
    allowed = {16 * w + t for w in range(400) for t in range(16) if w not in set(dump.held_out)}
    assert set(epoch.tolist()) <= allowed
    assert len(set(epoch.tolist())) == len(epoch) >= 0.9 * dump.n_train
    assert epoch.diff().eq(1).float().mean() < 0.05  # shuffled within blocks
    later = dump.batch(pools * per_pool + 3, 64, 7)
    assert torch.equal(dump.batch(2, 64, 7)[:, 0], epoch[128:192])  # going back gives the same
    assert not torch.equal(later, dump.batch(3, 64, 7)) and not torch.equal(
        dump.batch(2, 64, 8)[:, 0], epoch[128:192]
    )


def test_moments_are_those_of_the_training_rows(made):
    dump = ts.Dump(made / "activations/adaptive", 2, "z")
    x = np.load(made / "activations/adaptive/L2.z.npy").astype(np.float64).reshape(80, 32, 24)
    x = x[[w for w in range(80) if w not in [*HELD_OUT, 33, 69]]].reshape(-1, 24)
    found = dump.moments()
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-6)
    assert found.norm == pytest.approx(np.linalg.norm(x - x.mean(0), axis=1).mean(), rel=0.05)


@pytest.mark.parametrize("arch", SAELENS)
def test_an_interrupted_run_resumes_to_the_same_bytes(made, tmp_path, monkeypatch, arch):
    flags = ["--layers", "2", "--arch", arch, "--save_interval", "30", "--dead_tokens", "500"]
    assert run(made, tmp_path / "whole", *flags) == 0
    save = ts.save_sae

    def save_and_stop(job, t):
        save(job, t)
        raise KeyboardInterrupt

    monkeypatch.setattr(ts, "save_sae", save_and_stop)
    assert run(made, tmp_path / "parts", *flags) == 1
    monkeypatch.undo()
    folder = tmp_path / "parts/adaptive/L2"
    assert not (folder / "sae_weights.safetensors.json").exists()
    assert json.loads((tmp_path / "parts/adaptive/run.json").read_text())["exit_status"] == 1
    assert torch.load(folder / "training_state.pt", weights_only=True)["step"] == 30
    ts.load_sae(folder)  # every save is a loadable export
    assert run(made, tmp_path / "parts", *flags, "--resume") == 0
    for name in ("sae_weights.safetensors", "training.csv", "latent_frequencies.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "whole/adaptive/L2" / name).read_bytes()
    a, b = (
        torch.load(tmp_path / w / "adaptive/L2/training_state.pt", weights_only=True)
        for w in ("parts", "whole")
    )
    assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))


def test_without_decay_fifty_steps_and_fifty_more_are_a_hundred(made, tmp_path, capsys):
    flags = ["--layers", "0", "--lr_decay", "0"]
    assert run(made, tmp_path / "whole", *flags, "--steps", "100") == 0
    assert run(made, tmp_path / "parts", *flags, "--steps", "50") == 0
    assert run(made, tmp_path / "parts", *flags, "--steps", "100", "--resume") == 0
    name = "adaptive/L0/sae_weights.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert run(made, tmp_path / "parts", *flags, "--steps", "100", "--resume") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_killed_run_leaves_no_sidecar(made, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train_sae.py"),
        "--activations_dir",
        str(made / "activations"),
        "--save_dir",
        str(tmp_path),
    ]
    job = subprocess.Popen(
        [*command, *SMALL, "--layers", "0", "--steps", "100000", "--save_interval", "10"],
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path / "adaptive/L0"
    while not (folder / "cfg.json").exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert (folder / "training_state.pt").exists() and not list(
        tmp_path.rglob("*.safetensors.json")
    )
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert state["step"] % 10 == 0 and state["step"] > 0


def test_a_signal_saves_and_says_how_to_go_on(made, tmp_path, monkeypatch, capsys):
    step = ts.Trainer.step

    def step_and_interrupt(self, raw):
        step(self, raw)
        if (
            self.step_count == 17
            and json.loads((tmp_path / "adaptive/run.json").read_text())["end"] is None
        ):
            signal.raise_signal(signal.SIGTERM)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(ts.Trainer, "step", step_and_interrupt)
    status = run(made, tmp_path, "--layers", "0")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert status == 143 and "--resume" in capsys.readouterr().out
    assert json.loads((tmp_path / "adaptive/run.json").read_text())["exit_status"] == 143
    assert torch.load(tmp_path / "adaptive/L0/training_state.pt", weights_only=True)["step"] == 17
    assert not list(tmp_path.rglob("*.safetensors.json"))


def test_an_export_that_differs_is_not_signed(made, tmp_path, monkeypatch, capsys):
    weights = ts.Trainer.weights
    monkeypatch.setattr(
        ts.Trainer, "weights", lambda self, scale=1.0, _=0.0: weights(self, scale, 0.0)
    )  # the mean forgotten
    assert run(made, tmp_path, "--layers", "2") == 1
    assert "unlike the SAE trained" in capsys.readouterr().err and not list(
        tmp_path.rglob("*.safetensors.json")
    )


# ------------------------------------------------------------------------------------------------------------ wrong inputs
def damage(made: Path, root: Path, how: str) -> None:
    """A copy of the run with one thing wrong."""
    shutil.copytree(made / "activations", root / "activations")
    dump = root / "activations/adaptive/L2.z.npy"
    x = np.load(dump)
    if how == "nan":
        x[1234, 5] = np.nan
        np.save(dump, x)
    elif how == "inf":
        x[68 * 32 + 5, 0] = np.inf  # a held-out row
        np.save(dump, x)
    elif how == "truncated":
        dump.write_bytes(dump.read_bytes()[:-100])
    elif how == "pickled":
        size = dump.stat().st_size
        data = pickle.dumps({"a": 1})
        dump.write_bytes(data + b"\0" * (size - len(data)))
    elif how == "constant":
        np.save(dump, np.ones_like(x))
    elif how == "no sidecar":
        Path(f"{dump}.json").unlink()
    elif how == "other schema":
        Path(f"{dump}.json").write_text('{"schema": "x/1", "bytes": 1}')
    elif how == "tokens":
        np.save(dump.with_name("tokens.npy"), np.full(2560, 60000, np.uint16))
    elif how == "other shape":
        side = Path(f"{dump}.json")
        side.write_text(json.dumps(json.loads(side.read_text()) | {"shape": [24, 2560]}))
    else:
        damage_documents(dump.with_name("documents.npy"), how)


def damage_documents(path: Path, how: str) -> None:
    if how == "no documents":
        path.unlink()
    elif how == "unfinished documents":
        Path(f"{path}.json").unlink()
    elif how == "other documents":
        np.save(path, np.load(path)[:-32])
        ts.write_sidecar(path, "janus.documents/1", [])
    elif how == "one document":
        np.save(path, np.full(2560, 7, np.uint32))
        ts.write_sidecar(path, "janus.documents/1", [])


WRONG = {
    "nan": "layer 2, row 1234",
    "inf": "layer 2, row 2181",
    "truncated": "bytes, its sidecar says",
    "pickled": "does not agree with its sidecar",
    "constant": "nothing to decompose",
    "no sidecar": "did not finish",
    "other schema": "expected 'janus.activations/1'",
    "tokens": "or the model; remake both",
    "other shape": "expected float16 [24, 2560]",
    "no documents": "--run_name adaptive --site z --layers 0 2",
    "unfinished documents": "documents.npy.json: the run that wrote it did not finish",
    "other documents": "documents.npy [2528] does not fit L2.z.npy (2560 rows",
    "one document": "80 windows of 1 documents, too few to hold any out: harvest more",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_bad_dump_is_one_line(made, tmp_path, capsys, how):
    damage(made, tmp_path, how)
    assert run(tmp_path, tmp_path / "s", "--layers", "2") == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert WRONG[how] in err[-1] and not any("Traceback" in line for line in err)
    assert not list((tmp_path / "s").rglob("*.safetensors*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layers", "7"], "dumps of z of layers 0, 2, not 7"),
        (["--runs", "absent"], "has no dumps of z; make more with"),
        (["--layers", "0", "--k", "97"], "--k 97 is more than the 96 latents"),
        (
            ["--layers", "0", "--arch", "jumprelu", "--target_l0", "97"],
            "--target_l0 97 is more than the 96 latents",
        ),
        (["--layers", "0", "--batch_size", "5000"], "too large for the 2368 training rows"),
        (
            ["--layers", "0", "--learning_rate", "1e30", "--lr_warmup", "0"],
            "try a --learning_rate below",
        ),
    ],
)
def test_a_bad_request_is_one_line(made, tmp_path, capsys, flags, message):
    assert run(made, tmp_path / "s", *flags) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "flags", [["--unit", "head", "--site", "mlp_out"], ["--steps", "5", "--tokens", "9"], ["--k", "0"], ["--resume", "--overwrite"],
              ["--runs", "a", "--model_path", "x", "y"], ["--lr_decay", "1.5"], ["--layer", "0"],
              ["--int8", "--arch", "relu"], ["--int8", "--dtype", "float32"], ["--int8", "--device", "cuda"]]
)  # fmt: skip
def test_a_bad_command_line_exits_two(flags, capsys):
    with pytest.raises(SystemExit) as e:
        ts.main(flags)
    assert e.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_the_checkpoint_must_be_the_one_that_was_dumped(made, tmp_path, capsys):
    shutil.copy(made / "model.pt", tmp_path / "other.pt")
    with open(tmp_path / "other.pt", "ab") as f:
        f.write(b"x")
    assert (
        run(made, tmp_path / "s", "--runs", "adaptive", "--model_path", str(tmp_path / "other.pt"))
        == 1
    )
    assert "is not the checkpoint of run adaptive" in capsys.readouterr().err
    assert (
        run(made, tmp_path / "s", "--runs", "adaptive", "--model_path", str(tmp_path / "absent.pt"))
        == 1
    )
    assert not (tmp_path / "s").exists()


def test_what_exists_is_kept_unless_asked(made, finished, tmp_path, capsys):
    shutil.copytree(finished / "topk", tmp_path / "s")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run(made, tmp_path / "s", "--layers", "0", "--arch", "topk") == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert run(made, tmp_path / "s", "--layers", "0", "--arch", "topk", "--resume", "--k", "5") in (
        0,
        1,
    )
    assert "would change k" in capsys.readouterr().err
    (tmp_path / "s/adaptive/L2/training_state.pt").write_bytes(pickle.dumps({"a": object}))
    assert run(made, tmp_path / "s", "--layers", "2", "--arch", "topk", "--resume") == 1
    assert "cannot be read" in capsys.readouterr().err
    kept = [p for p in before if p.name not in ("run.json", "training_state.pt")]
    assert all(p.read_bytes() == before[p] for p in kept)


def test_an_sae_that_held_out_the_last_windows_is_not_mixed_with_others(
    made, finished, tmp_path, capsys
):
    shutil.copytree(finished / "topk", tmp_path / "s")
    side = tmp_path / "s/adaptive/L2/sae_weights.safetensors.json"
    record = json.loads(side.read_text())
    record.pop("held_out_documents")
    record["trajectory"].pop("held_out")
    side.write_text(json.dumps(record))
    assert run(made, tmp_path / "s", "--layers", "0", "--overwrite") == 0
    out = capsys.readouterr().out
    assert out.count("is left out of the tables: it held out the last windows") == 1
    assert pd.read_csv(tmp_path / "s/sae_metrics.csv")["layer"].tolist() == [0]
    # nor is its training continued
    path = tmp_path / "s/adaptive/L2/training_state.pt"
    state = torch.load(path, weights_only=True)
    state["trajectory"].pop("held_out")
    torch.save(state, path)
    assert run(made, tmp_path / "s", "--layers", "2", "--arch", "topk", "--resume") == 1
    assert "would change held_out of" in capsys.readouterr().err
    # the tables of that version are not redrawn as if they were of this one
    old = pd.read_csv(tmp_path / "s/sae_metrics.csv").drop(columns=["n_documents", "dead_share"])
    old.to_csv(tmp_path / "s/sae_metrics.csv", index=False)
    assert ts.main(["--redraw", "--save_dir", str(tmp_path / "s")]) == 1
    assert "lacks n_documents, dead_share" in capsys.readouterr().err


def test_a_damaged_or_empty_csv_is_one_line(tmp_path, capsys):
    for text in ("", "run,layer\n", "\0\0"):
        (tmp_path / "sae_metrics.csv").write_text(text)
        assert ts.main(["--redraw", "--save_dir", str(tmp_path)]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(ts.HandoffError, match="not a readable SAE"):
        ts.load_sae(tmp_path)


# ----------------------------------------------------------------------------------------------------- several of a kind
@pytest.mark.parametrize("lacks", [["setting"], ["setting", "seed"], ["setting", "seed", "k"]])
def test_tables_of_an_older_version_are_drawn_again(finished, tmp_path, lacks):
    """A sae_metrics.csv from before there were several settings and seeds."""
    shutil.copytree(finished / "batchtopk", tmp_path / "s")
    path = tmp_path / "s/sae_metrics.csv"
    metrics = pd.read_csv(path)
    new = ts.table2(metrics)
    metrics.drop(columns=[*lacks, "step", "initial"]).to_csv(path, index=False)
    for name in ("table2.csv", "figure2_l0_by_depth.png", "figure3_activation_frequency.png"):
        (tmp_path / "s" / name).unlink()
    assert ts.main(["--redraw", "--save_dir", str(tmp_path / "s")]) == 0
    table = pd.read_csv(tmp_path / "s/table2.csv")
    expected = {"setting": "k" if "k" in lacks else "k 4"}
    expected["seed"] = "unknown" if "seed" in lacks else 42
    for column, value in expected.items():
        assert (table[column] == value).all(), column
    np.testing.assert_allclose(table["fvu"], new["fvu"], rtol=1e-12)
    assert (tmp_path / "s/figure2_l0_by_depth.png").stat().st_size > 10_000


def test_setting_is_what_decides_how_many_latents_fire():
    assert ts.setting_of("topk", 16) == ts.setting_of("topk", 16.0) == "k 16"
    assert ts.setting_of("jumprelu", 20) == "target_l0 20"
    assert ts.setting_of("relu", None, 3e-3) == "l1 0.003"
    assert ts.setting_of("relu", None) == "l1" and ts.setting_of("topk", math.nan) == "k"
    # of a script with another --arch
    assert ts.setting_of("own", 5) == "k 5" and ts.setting_of("own", None, 1e-3) == "l1 0.001"


def as_older(folder: Path) -> None:
    """Makes an SAE what it was before there were nulls, seeds and a start within axes."""
    side = folder / "sae_weights.safetensors.json"
    record = json.loads(side.read_text())
    for name in ("null", "step", "initial"):
        record.pop(name)
    state = torch.load(folder / "training_state.pt", weights_only=True)
    for name in ("null", "start_variance", "finish_kl"):
        record["trajectory"].pop(name)
        state["trajectory"].pop(name)
    side.write_text(json.dumps(record))
    torch.save(state, folder / "training_state.pt")
    (folder / "errors.csv").unlink()


def test_an_older_sae_stands_beside_new_ones_and_is_resumed_as_it_began(
    made, finished, tmp_path, capsys
):
    shutil.copytree(finished / "batchtopk", tmp_path / "s")
    for layer in ("L0", "L2"):
        as_older(tmp_path / "s/adaptive" / layer)
    flags = ["--layers", "0", "--nulls", "--resume"]
    assert run(made, tmp_path / "s", *flags) == 1
    assert "would change start_variance" in capsys.readouterr().err
    assert run(made, tmp_path / "s", *flags, "--start_variance", "1") == 0
    metrics = pd.read_csv(tmp_path / "s/sae_metrics.csv")
    assert metrics["layer"].tolist() == [0, 2] and metrics["setting"].eq("k 4").all()
    assert pd.read_csv(tmp_path / "s/sae_nulls.csv")["null"].tolist() == ["decoder", "gaussian"]
    # without its errors by document, no gain
    gains = [name for name in metrics if name.startswith("gain_")]
    assert metrics[gains].isna().all(axis=None)


def test_the_same_sae_in_two_folders_is_one_row(made, tmp_path, capsys):
    flags = ["--layers", "0", "--steps", "50"]
    assert run(made, tmp_path / "s", *flags, "--k", "4") == 0
    assert run(made, tmp_path / "s", *flags, "--k", "3", "4", "--seeds", "42", "43") == 0
    out = capsys.readouterr().out
    assert out.count("adaptive/L0 is left out of the tables") == 1
    metrics = pd.read_csv(tmp_path / "s/sae_metrics.csv")
    expected = [f"adaptive/L0/k{k}/seed{seed}" for k in (3, 4) for seed in (42, 43)]
    assert sorted(metrics["folder"]) == expected
    assert pd.read_csv(tmp_path / "s/table2.csv")["n_saes"].eq(1).all()
    alone, of_several = (
        (tmp_path / "s" / folder / "sae_weights.safetensors").read_bytes()
        for folder in ("adaptive/L0", "adaptive/L0/k4/seed42")
    )
    assert alone == of_several
    # the one that was trained last counts
    assert run(made, tmp_path / "s", *flags, "--k", "4", "--overwrite") == 0
    out = capsys.readouterr().out
    assert out.count("adaptive/L0/k4/seed42 is left out of the tables") == 1


@pytest.mark.parametrize("flag", ["k", "seeds"])
def test_a_value_given_twice_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        ts.parse_args([f"--{flag}", "4", "8", "4"])
    assert stop.value.code == 2 and f"--{flag} has a value twice" in capsys.readouterr().err


def test_a_share_of_the_variance_above_one_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        ts.parse_args(["--start_variance", "1.5"])
    assert stop.value.code == 2 and "--start_variance" in capsys.readouterr().err


def test_a_negative_finish_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        ts.parse_args(["--finish_kl", "-1"])
    assert stop.value.code == 2 and "--finish_kl" in capsys.readouterr().err


def test_values_that_differ_have_folders_that_differ():
    args = ts.parse_args(["--arch", "relu", "--seeds", "12345678", "12345679", "--l1", "1e-3"])
    folders = [below for below, _ in ts.variants(args)]
    assert folders == [Path("seed12345678"), Path("seed12345679")]


def test_folders_do_not_hang_on_the_order_of_flags():
    flags = [["--k", "8", "16"], ["--seeds", "1", "2"]]
    found = []
    for order in (flags, flags[::-1]):
        found.append([below for below, _ in ts.variants(ts.parse_args([*order[0], *order[1]]))])
    assert found[0] == found[1] and Path("k16/seed1") in found[0]


def test_a_signal_in_a_finish_ends_it_and_resume_begins_it_anew(made, tmp_path, monkeypatch):
    flags = ["--layers", "2", "--steps", "60", "--finish_kl", "640"]
    assert run(made, tmp_path / "whole", *flags) == 0
    gradients, n_taken = ts.kl_gradients, []

    def interrupted(*args):
        n_taken.append(1)
        if len(n_taken) == 2:
            signal.raise_signal(signal.SIGINT)
        return gradients(*args)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(ts, "kl_gradients", interrupted)
    try:
        assert run(made, tmp_path / "parts", *flags) == 128 + signal.SIGINT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    monkeypatch.undo()
    assert len(n_taken) == 2, "after the step"
    folder, whole = tmp_path / "parts/adaptive/L2", tmp_path / "whole/adaptive/L2"
    assert not (folder / "sae_weights.safetensors.json").exists()
    assert run(made, tmp_path / "parts", *flags, "--resume") == 0
    name = "sae_weights.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_finish_moves_the_cut_with_the_encoder(made, tmp_path):
    """The threshold of batchtopk is that of the last steps, those of the finish too."""
    cuts = []
    for tokens in ("0", "6400"):
        flags = ["--layers", "2", "--steps", "60", "--finish_kl", tokens]
        assert run(made, tmp_path / tokens, "--arch", "batchtopk", *flags) == 0
        cuts.append(ts.load_sae(tmp_path / tokens / "adaptive/L2").weights["threshold"])
    assert (cuts[0] != cuts[1]).all()


def test_a_finish_takes_windows_of_training_documents_in_no_order(made, tmp_path, monkeypatch):
    """The auxiliary loss looks at the first rows of a batch: they must be a sample of all."""
    gradients, steps = ts.kl_gradients, []

    def noted(trainer, dump, model, idx):
        steps.append(idx.numpy().copy())
        return gradients(trainer, dump, model, idx)

    monkeypatch.setattr(ts, "kl_gradients", noted)
    assert run(made, tmp_path, "--layers", "2", "--steps", "60", "--finish_kl", "6400") == 0
    folder = made / "activations/adaptive"
    tokens = np.load(folder / "tokens.npy").astype(np.int64).reshape(-1, 32)
    number = {window.tobytes(): i for i, window in enumerate(tokens)}
    chosen = [[number[window.tobytes()] for window in step] for step in steps]
    assert sum(map(len, chosen)) * 32 >= 6400
    assert set().union(*chosen) <= set(ts.Dump(folder, 2, "z").trained)
    in_order = [step == sorted(step) for step in chosen]
    assert len(chosen[0]) > 1 and np.mean(in_order) < 0.5


def test_a_finish_that_was_interrupted_begins_again(made, tmp_path, monkeypatch):
    flags = ["--layers", "2", "--steps", "60", "--finish_kl", "640"]
    assert run(made, tmp_path / "whole", *flags) == 0

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ts, "measure_sae", stop)  # which comes after the finish
    assert run(made, tmp_path / "parts", *flags) == 1
    monkeypatch.undo()
    folder, whole = tmp_path / "parts/adaptive/L2", tmp_path / "whole/adaptive/L2"
    assert not (folder / "sae_weights.safetensors.json").exists()
    assert run(made, tmp_path / "parts", *flags, "--resume") == 0
    for name in ("sae_weights.safetensors", "training.csv", "errors.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = (
        json.loads((place / "sae_weights.safetensors.json").read_text())["metrics"]
        for place in (folder, whole)
    )
    assert found == expected and "finish_kl_left" in found


def test_an_untrained_model_is_a_null_of_saes_like_its_own(tmp_path):
    names = dict(unit="layer", arch="topk", setting="k 4", seed=0, site="z", layer=0)
    names |= dict(head=math.nan, initial="0123", d_sae=96, steps=50, null="", settings="same")
    rows = []
    others = {"wide": {"d_sae": 192}, "long": {"steps": 100}, "fast": {"settings": "rate"}}
    for run, changes in {"a": {}, **others}.items():
        rows.append(names | changes | {"run": run, "folder": run, "dump": run})
    # the same weights, harvested once for each arm
    null = pd.DataFrame(
        [
            names | dict(run=run, folder=run, dump=run, null="untrained")
            for run in ("start", "start_again")
        ]
    )
    rng = np.random.default_rng(0)
    for folder in ("a", "wide", "long", "fast", "start", "start_again"):
        (tmp_path / folder).mkdir()
        sums = dict(document=np.arange(20), error=rng.uniform(1, 2, 20), variance=10.0)
        pd.DataFrame(sums).to_csv(tmp_path / folder / "errors.csv", index=False)
    found = ts.add_gains(pd.DataFrame(rows), null, tmp_path).set_index("run")
    assert found["gain_untrained"].notna().tolist() == [True, False, False, False]
    pairs = list(ts.pairs_with_nulls(tmp_path, pd.DataFrame(rows), null))
    assert len(pairs) == 1, "two names of one model are one training"


def test_untrained_are_the_saes_of_a_first_step_and_not_their_nulls():
    rows = [
        dict(run="a", step=60, initial="ab", null=""),
        dict(run="a", step=60, initial="ab", null="gaussian"),
        dict(run="start", step=0, initial="ab", null=""),
        dict(run="start", step=0, initial="ab", null="gaussian"),
        dict(run="start of another", step=0, initial="cd", null=""),
        dict(run="older", step=None, initial=None, null=""),
    ]
    assert ts.is_untrained(pd.DataFrame(rows)).tolist() == [False, False, True, False, False, False]

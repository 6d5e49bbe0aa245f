"""Energy-Lens on a small Energy Transformer: is a sparse feature aligned with the energy, and does that mean anything?

Trains an Energy Transformer by masked-token denoising, sparse autoencoders (SAE) on its states, and measures for every
feature k   EFAS_k = Pearson(f_k, A_k),  A = -<dE/dx, d_k>   over tokens: f_k the feature's activation, d_k its decoder
direction (unit norm). EFAS > 0 is amplification (the pull along d_k grows with f_k), EFAS < 0 restoring; it is not "the
feature lowers the energy", which is the attribution f*A. Two nulls, interventions and the attractors say what that is worth.

Reads   text: --corpus (`builtin`: documentation on this machine; `topics`; or a text file), plus templated lines
Writes  <save_dir>/research_report.md, .html (self-contained), raw_results.json, *.csv (tidy), *.png, run.json

Quick   python energy_lens_minimal.py --preset smoke       (under 30 s on two CPU cores; too small for conclusions)
Full    python energy_lens_minimal.py                      (under 5 minutes and 2 GB on two CPU cores; run.json keeps both)

Shapes  S sequences (one a held-out document), L tokens, D state, H heads, Z d_head, M memories, K SAE features, V vocabulary.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

TOKEN = re.compile(r"[a-z]+|\d+|[^\sa-z\d]")  # of lower-cased text
CLASSES = {
    "word": r"[a-z]+",
    "number": r"\d+",
    "regex": r"[\\^$|?*+()\[\]{}]",
}  # concept classes, by the token's form
UNK, MASK = 0, 1
MIN_ACTIVE, MIN_SEQUENCES = (
    30,
    10,
)  # a feature is tested if it is active on 30 tokens in 10 sequences
RULE = 0.1  # the original study called a feature aligned when |EFAS| exceeded this
ALPHA = 0.05  # false discovery rate
# Sizes only: both take the same code path; a flag given explicitly beats the preset.
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(
        corpus="builtin",
        train_steps=1000,
        sequences=320,
        sae_dict_size=2048,
        sae_tokens=4096,
        sae_iterations=30,
        permutations=10_000,
        directions=2000,
        energy_layers=[0, 1, 2, 4, 6],
        intervened=100,
        relaxed=24,
    ),
    "smoke": dict(
        corpus="topics",
        train_steps=60,
        sequences=96,
        sae_dict_size=256,
        sae_tokens=1024,
        sae_iterations=8,
        permutations=1000,
        directions=300,
        energy_layers=[1, 2],
        intervened=12,
        relaxed=4,
    ),
}


# -------------------------------------------------------------------------------- method: edit here
class EnergyTransformer(nn.Module):
    """An Energy Transformer (Hoover et al. 2023, arXiv 2302.07253) as a full hierarchical associative memory (HAM).

    State x [S, L, D], activation g = dL/dx = LayerNorm(x), input field b [S, L, D]. The energy of a sequence is
        E = sum_l <x_l, g_l> - L(x_l)                                               neuron (Legendre) term, dE/dg = x
          - (1/beta) sum_{h, q} log sum_{k != q} exp(beta <Wq_h g_q, Wk_h g_k>)     attention, no token attends to itself
          - 1/2 sum_{l, m} relu(<Xi_m, g_l>)^2                                      Hopfield memories
          - sum_l <b_l, g_l>                                                        input field
    and the descent is x <- x - alpha v with v = dE/dg = x - b + d(E_att + E_hn)/dg, so that dE/dt = -v^T J v <= 0, J = dg/dx >= 0.
    """

    def __init__(
        self,
        vocab: int,
        seq_len: int,
        d: int = 128,
        heads: int = 4,
        d_head: int = 32,
        memories: int = 256,
    ) -> None:
        super().__init__()
        self.emb = nn.Parameter(torch.randn(vocab, d) * 0.5)
        self.pos = nn.Parameter(torch.randn(seq_len, d) * 0.1)
        self.wq, self.wk = (nn.Parameter(torch.randn(heads, d_head, d) * 0.04) for _ in range(2))
        self.xi = nn.Parameter(torch.randn(d, memories) * 0.04)
        self.gamma, self.delta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(d))
        self.bias, self.readout = (
            nn.Parameter(torch.zeros(vocab)),
            nn.Parameter(torch.tensor(d**-0.5)),
        )
        self.beta, self.eps, self.field_scale = d_head**-0.5, 1e-5, 8.0

    def field(self, ids: Tensor) -> Tensor:
        """Token ids [S, L] -> input field b [S, L, D], which is also the start of the descent."""
        return self.field_scale * (F.embedding(ids, self.emb) + self.pos[: ids.shape[1]])

    def activation(self, x: Tensor) -> Tensor:
        """g = gamma (x - mean) / sqrt(var + eps) + delta, per token; gamma is one number, so that g is a gradient."""
        c = x - x.mean(-1, keepdim=True)
        return self.gamma * c * (c.square().mean(-1, keepdim=True) + self.eps).rsqrt() + self.delta

    def lagrangian(self, x: Tensor) -> Tensor:
        """L(x) [S, L], the potential whose gradient is the activation."""
        c = x - x.mean(-1, keepdim=True)
        return x.shape[-1] * self.gamma * (c.square().mean(-1) + self.eps).sqrt() + x @ self.delta

    def keys(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g [S, L, D] -> queries, keys [S, H, L, Z] and the masked scores beta Q K^T [S, H, L, L]."""
        q, k = (torch.einsum("sld,hzd->shlz", g, w) for w in (self.wq, self.wk))
        diagonal = torch.eye(g.shape[1], dtype=torch.bool, device=g.device)
        return q, k, (self.beta * q @ k.mT).masked_fill(diagonal, -torch.inf)

    def energy_terms(self, x: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Each term's share of every token, [S, L]; attention counts for its query. Shares are for plots, derivatives are of the sum."""
        g = self.activation(x)
        return {
            "neuron": (x * g).sum(-1) - self.lagrangian(x),
            "attention": -self.keys(g)[2].logsumexp(-1).sum(1) / self.beta,
            "hopfield": -0.5 * (g @ self.xi).relu().square().sum(-1),
            "field": -(b * g).sum(-1),
        }

    def energy(self, x: Tensor, b: Tensor) -> Tensor:
        """Total energy of each sequence, [S]."""
        return torch.stack(list(self.energy_terms(x, b).values())).sum((0, 2))

    def grad_g(self, x: Tensor, b: Tensor) -> Tensor:
        """v = dE/dg [S, L, D] in closed form: a token acts as query and, unlike in ordinary attention, as key."""
        g = self.activation(x)
        q, k, score = self.keys(g)
        p = score.softmax(-1)
        attention = torch.einsum("shlz,hzd->sld", p @ k, self.wq) + torch.einsum(
            "shlz,hzd->sld", p.mT @ q, self.wk
        )
        return x - b - attention - (g @ self.xi).relu() @ self.xi.T

    def grad_x(self, x: Tensor, b: Tensor) -> Tensor:
        """dE/dx = J v [S, L, D] with J = (gamma / sigma)(I - 11^T/D - c c^T/D), c = (x - mean) / sigma."""
        c = x - x.mean(-1, keepdim=True)
        sigma = (c.square().mean(-1, keepdim=True) + self.eps).sqrt()
        c, v = c / sigma, self.grad_g(x, b)
        return (
            self.gamma / sigma * (v - v.mean(-1, keepdim=True) - c * (c * v).mean(-1, keepdim=True))
        )

    def logits(self, x: Tensor) -> Tensor:
        """State [..., D] -> scores of the tokens [..., V]."""
        return self.activation(x) @ self.emb.T * self.readout + self.bias


def mask_tokens(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hides 20 % of the tokens [S, L] -> masked ids, and which of them are to be predicted (not the unknown ones)."""
    hidden = torch.rand(ids.shape, generator=generator) < 0.2
    return ids.masked_fill(hidden, MASK), hidden & (ids != UNK)


def descend(
    et: EnergyTransformer, ids: Tensor, steps: int, alpha: float
) -> tuple[Tensor, list[Tensor]]:
    """The field of the tokens [S, L] and the states x_0 = b, x_1 .. x_steps of the descent, each [S, L, D]."""
    b = et.field(ids)
    xs = [b]
    for _ in range(steps):
        xs.append(xs[-1] - alpha * et.grad_g(xs[-1], b))
    return b, xs


def train_denoiser(
    predict: Callable[[Tensor], Tensor],
    groups: list[dict],
    train: Tensor,
    steps: int,
    seed: int,
    name: str,
) -> None:
    """AdamW on the masked-token cross-entropy; predict(ids [S, L]) -> logits [S, L, V]. Warm-up 30 steps, then linear to 5 %."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks, generator = (
        [g["lr"] for g in optimizer.param_groups],
        torch.Generator().manual_seed(seed),
    )
    for step in tqdm(range(steps), desc=name, unit="step", disable=None):
        for g, peak in zip(optimizer.param_groups, peaks, strict=True):
            g["lr"] = peak * min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)
        ids = train[torch.randint(len(train), (32,), generator=generator)]
        seen, asked = mask_tokens(ids, generator)
        loss = F.cross_entropy(predict(seen)[asked], ids[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
    if not math.isfinite(loss.item()):
        raise HandoffError(
            f"{name}: the loss is {loss.item()} after {steps} steps; use a smaller --step_size"
        )


def untrained(corpus: Corpus, seed: int) -> EnergyTransformer:
    """The Energy Transformer as it starts. The mask token has no field, so that its context decides."""
    torch.manual_seed(seed)
    et = EnergyTransformer(len(corpus.vocab), corpus.train.shape[1])
    et.emb.data[MASK] = 0
    return et


def train_energy_transformer(
    corpus: Corpus, steps: int, alpha: float, seed: int
) -> EnergyTransformer:
    """Plain first-order training through 3 to 6 descent steps: the energy's gradient is closed form, so no double backward.

    The synaptic energies are of second degree in the weights: at the others' learning rate Adam inflates them until every
    input shares one attractor. They get a fifth of it and more decay.
    """
    et = untrained(corpus, seed)
    synapses = [et.wq, et.wk, et.xi]
    rest = [p for p in et.parameters() if all(p is not q for q in synapses)]
    rng = np.random.default_rng(seed)

    def predict(ids: Tensor) -> Tensor:
        return et.logits(descend(et, ids, int(rng.integers(3, 7)), alpha)[1][-1])

    groups = [
        dict(params=rest, lr=5e-3, weight_decay=0.1),
        dict(params=synapses, lr=1e-3, weight_decay=1.0),
    ]
    train_denoiser(predict, groups, corpus.train, steps, seed, "Energy Transformer")
    if et.gamma <= 0:
        raise HandoffError(
            f"training made gamma {et.gamma.item():.3f}: the activation is no longer monotone; use a smaller --step_size"
        )
    return et.requires_grad_(False)


def train_transformer(corpus: Corpus, steps: int, seed: int) -> Callable[[Tensor], Tensor]:
    """An ordinary two-layer transformer of the same width, on the same batches, for comparison."""
    torch.manual_seed(seed)
    d, vocab, length = 128, len(corpus.vocab), corpus.train.shape[1]
    layer = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.ModuleDict(
        dict(
            emb=nn.Embedding(vocab, d),
            pos=nn.Embedding(length, d),
            enc=nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), False),
        )
    )

    def predict(ids: Tensor) -> Tensor:
        return net["enc"](net["emb"](ids) + net["pos"].weight) @ net["emb"].weight.T / d**0.5  # type: ignore[operator]

    train_denoiser(
        predict,
        [dict(params=list(net.parameters()), lr=2e-3, weight_decay=0.02)],
        corpus.train,
        steps,
        seed,
        "transformer",
    )
    return predict


@torch.no_grad()
def compare_models(
    et: EnergyTransformer,
    transformer: Callable[[Tensor], Tensor],
    corpus: Corpus,
    alpha: float,
    seed: int,
) -> pd.DataFrame:
    """Held-out masked cross-entropy (nats) and accuracy; for the ET also signs of collapse: decoded tokens, unmasked ones kept."""
    ids = corpus.test[::3]
    seen, asked = mask_tokens(ids, torch.Generator().manual_seed(seed))
    counts = torch.bincount(corpus.train.flatten(), minlength=len(corpus.vocab)) + 1.0
    counts[[UNK, MASK]] = (
        1e-3  # never asked for; without their mass the baseline is as strong as it can be
    )
    rows = []

    def row(name: str, logits: Tensor) -> None:
        best, kept = logits.argmax(-1), ~asked & (seen != MASK)
        scores = dict(
            masked_nats=F.cross_entropy(logits[asked], ids[asked]).item(),
            accuracy=(best == ids)[asked].float().mean().item(),
        )
        rows.append(
            dict(
                model=name,
                **scores,
                n_masked=int(asked.sum()),
                distinct_decoded=len(best.unique()),
                unmasked_kept=(best == seen)[kept].float().mean().item(),
            )
        )

    row("unigram", (counts / counts.sum()).log().expand(*seen.shape, -1))
    xs = descend(et, seen, 100, alpha)[1]
    for t in (4, 20, 100):
        row(f"Energy Transformer, {t} steps", et.logits(xs[t]))
    row("ordinary transformer, 2 layers", transformer(seen))
    return pd.DataFrame(rows)


@torch.no_grad()
def largest_step(et: EnergyTransformer, ids: Tensor) -> tuple[float, pd.DataFrame]:
    """The largest alpha of a grid at which no energy rises in 60 steps (float64), and the share of rising steps for each."""
    rows = []
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0):
        b, xs = descend(et, ids, 60, alpha)
        e = torch.stack([et.energy(x, b) for x in xs])
        rows.append(
            dict(
                alpha=alpha, rising=(~(e.diff(dim=0) <= 1e-9 * e[:-1].abs())).double().mean().item()
            )
        )
    table = pd.DataFrame(rows)
    good = table.alpha[(table.rising > 0).cumsum() == 0]
    return float(good.max()) if len(good) else math.nan, table


@torch.no_grad()
def relax(
    et: EnergyTransformer,
    x: Tensor,
    b: Tensor,
    alpha: float,
    tol: float = 1e-3,
    max_steps: int = 1500,
    hold: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Descends each sequence until no token moves faster than `tol` (|v|, or its analogue under `hold`).

    hold(x, i) is applied to the states of sequences i after every step: a persistent clamp. Returns x* [S, L, D], residual [S].
    """
    x, residual = x.clone(), torch.full((len(x),), math.inf, dtype=x.dtype)
    i = torch.arange(len(x))
    for _ in range(max_steps):
        new = x[i] - alpha * et.grad_g(x[i], b[i])
        new = hold(new, i) if hold else new
        residual[i] = (new - x[i]).norm(dim=-1).amax(1) / alpha
        x[i] = new
        i = i[residual[i] > tol]
        if not len(i):
            break
    return x, residual


@dataclass
class SAE:
    """f = relu((x - mean) @ w_enc + b_enc) [.., K], reconstruction b_dec + f @ w_dec. In raw state units, unit-norm w_dec rows."""

    w_enc: Tensor  # [D, K]
    b_enc: Tensor  # [K]
    w_dec: Tensor  # [K, D]
    b_dec: Tensor  # [D]
    limit: float = math.inf  # a state further than this from b_dec is outside the dictionary ("massive activations"): f = 0

    def encode(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        """States [..., D] -> activations [..., K] of the chosen features, in state units."""
        f = ((x - self.b_dec) @ self.w_enc[:, features] + self.b_enc[features]).relu()
        return f if math.isinf(self.limit) else f * self.covers(x)[..., None]

    def covers(self, x: Tensor) -> Tensor:
        """Which states [..., D] the dictionary applies to, [...] bool."""
        return (x - self.b_dec).norm(dim=-1) <= self.limit

    def score(self, x: Tensor) -> dict[str, float]:
        """x [N, D] -> fraction of variance unexplained, active latents a token, share of latents never active, share of tokens outside."""
        inside = self.covers(x)
        x, outside = x[inside], 1 - inside.float().mean().item()
        f = self.encode(x)
        error, spread = (
            (x - self.b_dec - f @ self.w_dec).square().sum(),
            (x - x.mean(0)).square().sum(),
        )
        alive = dict(
            l0=(f > 0).sum(-1).float().mean().item(),
            dead=(f <= 0).all(0).float().mean().item(),
            outside=outside,
        )
        return dict(fvu=(error / spread).item()) | alive


def train_sae(
    x: Tensor, n_latents: int, l1: float, iterations: int, optimiser: str, seed: int
) -> SAE:
    """ReLU + L1 autoencoder of x [N, D] on one fixed batch: sum-of-squares error + l1 * sum_k f_k |d_k|, per token, whitened scale.

    L-BFGS with strong Wolfe needs a deterministic, smooth objective: hence a fixed batch, a penalty that carries |d_k| instead
    of renormalising between iterations (which would invalidate the curvature pairs), and a short history for memory.
    """
    if not x.isfinite().all():
        raise HandoffError("the states hold NaN or infinity: the model's weights are damaged")
    if n_latents < x.shape[1]:
        raise HandoffError(
            f"a dictionary of {n_latents} latents is smaller than the state ({x.shape[1]} dimensions); use a larger --sae_dict_size"
        )
    generator = torch.Generator().manual_seed(seed)
    distance = (x - x.median(0).values).norm(dim=-1)
    x = x[
        distance <= 5 * distance.median()
    ]  # a few massive tokens would otherwise set the scale and be all of the loss
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt().clamp_min(1e-12)
    z = (x - mean) / scale
    atoms = z[torch.randint(len(z), (n_latents,), generator=generator)] + 0.1 * torch.randn(
        n_latents, x.shape[1], generator=generator
    )
    w_dec = F.normalize(atoms, dim=-1).requires_grad_()
    w_enc, b_enc, b_dec = (
        w_dec.detach().T.contiguous().clone().requires_grad_(),
        torch.zeros(n_latents, requires_grad=True),
        torch.zeros(x.shape[1], requires_grad=True),
    )
    params = [w_enc, b_enc, w_dec, b_dec]

    def loss(batch: Tensor) -> Tensor:
        f = ((batch - b_dec) @ w_enc + b_enc).relu()
        return (
            (batch - b_dec - f @ w_dec).square().sum() + l1 * (f * w_dec.norm(dim=-1)).sum()
        ) / len(batch)

    if optimiser == "lbfgs":
        opt: torch.optim.Optimizer = torch.optim.LBFGS(
            params,
            max_iter=iterations,
            max_eval=2 * iterations,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            opt.zero_grad()
            value = loss(z)
            value.backward()
            return value

        opt.step(closure)
    else:
        opt = torch.optim.Adam(params, lr=2e-3, fused=True)
        for _ in range(20 * iterations):
            opt.zero_grad()
            loss(z[torch.randint(len(z), (min(512, len(z)),), generator=generator)]).backward()
            opt.step()
    norm = (
        w_dec.detach().norm(dim=-1).clamp_min(1e-12)
    )  # fold the scale and the norms in, once, at the end
    centre = mean + scale * b_dec.detach()
    limit = 5 * (x - centre).norm(dim=-1).median().item()
    return SAE(
        w_enc.detach() * norm,
        b_enc.detach() * norm * scale,
        w_dec.detach() / norm[:, None],
        centre,
        limit,
    )


def feature_gradient(gx: Tensor, directions: Tensor) -> Tensor:
    """A = -<dE/dx, d_k>: gx [S, L, D], directions [K, D] in state units -> [S, L, K], energy units per state unit."""
    return -(gx @ directions.T)


def finite_difference(
    energy: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, h: float = 1e-5
) -> Tensor:
    """The same A by central differences along each direction, one token at a time: energy(x [n, L, D]) -> [n]. Use float64."""
    out = torch.empty(*x.shape[:2], len(directions), dtype=x.dtype)
    step = h * x.norm(dim=-1).mean()
    for k, d in enumerate(directions.to(x.dtype)):
        for l in range(x.shape[1]):
            move = torch.zeros_like(x[0])
            move[l] = step * d
            out[:, l, k] = -(energy(x + move) - energy(x - move)) / (2 * step)
    return out


def sequence_sums(f: Tensor, a: Tensor) -> Tensor:
    """Sufficient statistics of Pearson(f, A) for every sequence: n, f, A, f^2, A^2, fA summed over tokens, [6, S, K] float64."""
    f, a = f.double(), a.double()
    n = torch.full_like(f[:, 0], f.shape[1])
    return torch.stack([n, f.sum(1), a.sum(1), (f * f).sum(1), (a * a).sum(1), (f * a).sum(1)])


def pearson(sums: Tensor, weights: Tensor | None = None) -> Tensor:
    """Pearson correlation from sequence_sums [6, S, K] under sequence weights [B, S] (default: one row of ones) -> [B, K]."""
    weights = torch.ones(1, sums.shape[1], dtype=sums.dtype) if weights is None else weights
    n, f, a, ff, aa, fa = (weights @ s for s in sums)
    r = (n * fa - f * a) / ((n * ff - f * f).clamp_min(0) * (n * aa - a * a).clamp_min(0)).sqrt()
    return torch.where(r.isfinite(), r.clamp(-1, 1), torch.nan)


def efas(f: Tensor, a: Tensor) -> dict[str, Tensor]:
    """f >= 0 and A, both [S, L, K] -> per feature [K]: n_active (tokens), n_seq (sequences), eligible, efas, efas_on, attribution.

    efas_on: over active tokens only. attribution: mean of f*A over active tokens, energy units; > 0: the feature's presence
    lowers the energy to first order. Features that are dead, constant or active too rarely are not eligible; theirs are NaN.
    """
    on = f > 0
    n_active, n_seq = on.sum((0, 1)), on.any(1).sum(0)
    eligible = (
        (n_active >= MIN_ACTIVE) & (n_seq >= MIN_SEQUENCES) & (n_active < f.shape[0] * f.shape[1])
    )
    sums = sequence_sums(f, a)
    on_sums = sequence_sums(f, a * on)
    on_sums[0] = on.sum(1)
    values = dict(
        efas=pearson(sums)[0], efas_on=pearson(on_sums)[0], attribution=sums[5].sum(0) / n_active
    )
    eligible &= values["efas"].isfinite()
    return dict(n_active=n_active, n_seq=n_seq, eligible=eligible) | {
        k: v.masked_fill(~eligible, torch.nan) for k, v in values.items()
    }


def rank_normal(a: Tensor) -> Tensor:
    """Ranks of each feature's A over all tokens, mapped to normal scores: heavy tails would make the normal theory too liberal."""
    flat = a.reshape(-1, a.shape[-1])
    ranks = flat.argsort(0).argsort(0).double()
    return torch.special.ndtri((ranks + 0.5) / len(flat)).reshape(a.shape).to(a.dtype)


def seqperm_moments(f: Tensor, y: Tensor, strata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T = sum f*y and its exact mean and variance when whole sequences of y are permuted within strata; f, y [S, L, K] -> three [K].

    mean = sum_l S fbar_l ybar_l;  var = <Fc^T Fc, Yc^T Yc>_F / (S - 1), Fc and Yc centred per position (Hoeffding 1951).
    """
    observed, mean, var = (
        (f.double() * y.double()).sum((0, 1)),
        torch.zeros(f.shape[-1]).double(),
        torch.zeros(f.shape[-1]).double(),
    )
    for g in strata.unique():
        fg, yg = f[strata == g], y[strata == g]
        mean += len(fg) * (fg.mean(0).double() * yg.mean(0).double()).sum(0)
        if len(fg) > 1:
            fc, yc = (
                (fg - fg.mean(0)).permute(2, 1, 0),
                (yg - yg.mean(0)).permute(2, 1, 0),
            )  # [K, L, S]
            var += ((fc @ fc.mT) * (yc @ yc.mT)).sum((1, 2), dtype=torch.float64) / (len(fg) - 1)
    return observed, mean, var


def permutations(strata: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """n permutations of the sequences within their strata, [n, S] int32."""
    out = np.tile(np.arange(len(strata), dtype=np.int32), (n, 1))
    for g in strata.unique():
        i = (strata == g).nonzero()[:, 0].numpy()
        out[:, i] = rng.permuted(out[:, i], axis=1)
    return torch.from_numpy(out)


def seqperm_mc(f: Tensor, y: Tensor, perms: Tensor, chunk: int = 32, block: int = 8) -> Tensor:
    """T of every permutation: f, y [S, L, K], perms [P, S] -> [P, K].

    T_p = sum_s M[s, perm_p(s)] with M_k = F_k Y_k^T [S, S]: one small matrix product a feature, then sums of gathered rows. Eight
    sequences and 32 features at a time keep the table in the cache: a fifth of the time of one big gather.
    """
    n, features = len(f), f.shape[-1]
    out = torch.zeros(len(perms), features)
    offset = torch.arange(n, dtype=torch.int32) % block * n
    index = (perms + offset).contiguous()
    for c in range(0, features, chunk):
        fc, yc = (
            f[..., c : c + chunk].permute(2, 0, 1).contiguous(),
            y[..., c : c + chunk].permute(2, 1, 0).contiguous(),
        )
        table = (fc.float() @ yc.float()).permute(1, 2, 0).contiguous()  # [S, S, chunk]
        for s in range(0, n, block):
            out[:, c : c + chunk] += F.embedding_bag(
                index[:, s : s + block].contiguous(), table[s : s + block].flatten(0, 1), mode="sum"
            )
    return out


def mi_binned(f: Tensor, score: Tensor, bins: int = 8) -> tuple[Tensor, Tensor]:
    """Mutual information (nats) of f in {0, low, high} and the octile of A, Miller-Madow corrected, and the entropy of f's bins.

    f and A's normal scores [N, K] -> [K] each.
    """
    n = len(f)
    split = torch.where(f > 0, f, torch.nan).nanmedian(0).values
    fb, ab = (
        (f > 0).long() + (f > split),
        (torch.special.ndtr(score.double()) * bins).clamp(0, bins - 1).long(),
    )
    cell = fb * bins + ab + 3 * bins * torch.arange(f.shape[1])
    joint = (
        torch.bincount(cell.flatten(), minlength=3 * bins * f.shape[1])
        .reshape(-1, 3, bins)
        .permute(1, 2, 0)
        .double()
        / n
    )

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum(0) + ((p > 0).sum(0) - 1) / (2 * n)

    h_f = entropy(joint.sum(1))
    return h_f + entropy(joint.sum(0)) - entropy(joint.flatten(0, 1)), h_f


def direction_null(
    x: Tensor, gx: Tensor, rates: Tensor, n: int, rng: np.random.Generator, n_bins: int = 8
) -> tuple[Tensor, Tensor]:
    """EFAS of n random directions u ~ N(0, cov x), f = relu(<u, x> - threshold), decoder u: [bins, n]; and each feature's bin [K].

    x, gx [N, D]. The thresholds give the firing rates of the bins, which are quantiles of the features' `rates` [K].
    """
    edges = torch.quantile(rates.double(), torch.linspace(0, 1, n_bins + 1, dtype=torch.float64))
    bins = torch.searchsorted(edges[1:-1].contiguous(), rates.double())
    centre = torch.stack(
        [
            rates[bins == b].double().log().mean().exp() if (bins == b).any() else edges[b]
            for b in range(n_bins)
        ]
    )
    xc = x - x.mean(0)
    u = F.normalize(
        torch.from_numpy(rng.standard_normal((n, len(x)), dtype=np.float32)) @ xc, dim=-1
    )  # a random mix of the data has their covariance
    out = torch.empty(n_bins, n)
    for c in range(0, n, 200):
        p, a = xc @ u[c : c + 200].T, -(gx @ u[c : c + 200].T)
        a = F.normalize(a - a.mean(0), dim=0)
        ordered = p.sort(0, descending=True).values
        for b, rate in enumerate(centre):
            f = (p - ordered[min(len(p) - 1, max(1, round(rate.item() * len(p))))]).relu()
            f = f - f.mean(0)
            out[b, c : c + 200] = (f * a).sum(0) / f.norm(dim=0)
    return out.nan_to_num(0.0), bins


def fdr(p: np.ndarray, method: str = "bh") -> np.ndarray:
    """Adjusted p-values of the finite entries; the others stay NaN (dead features are dropped from the family, not filled with 1)."""
    q, ok = np.full(len(p), np.nan), np.isfinite(p)
    if ok.any():
        q[ok] = stats.false_discovery_control(p[ok], method=method)
    return q


@dataclass
class Layer:
    """EFAS of one layer (or descent step): a row a feature, what both nulls look like, and scalars."""

    features: pd.DataFrame
    null: Tensor  # [bins, n] EFAS of random directions
    facts: dict[str, Any]
    boot: np.ndarray  # [B, K] EFAS under the sequence bootstrap


def analyse_layer(
    layer: int,
    x: Tensor,
    gx: Tensor,
    e_token: Tensor,
    sae: SAE,
    strata: Tensor,
    args: Any,
    slope: Callable[[Tensor], Tensor] | None = None,
    features: Tensor | None = None,
) -> Layer:
    """EFAS with both nulls for the SAE's features at one layer.

    x, gx = dE/dx [S, L, D] and e_token [S, L] (each token's energy, for the legacy score) over valid tokens only; strata [S]; args
    has permutations, directions and seed. slope(directions [k, D]) -> A [S, L, k] replaces the gradient; `features` limits the family.
    """
    rng, n_seq = np.random.default_rng(args.seed), len(x)
    perms = permutations(strata, args.permutations, rng)
    halves = torch.zeros(
        2, n_seq, dtype=torch.float64
    )  # discovery: even rows; replication, and every intervention: odd rows
    halves[0, ::2] = halves[1, 1::2] = 1  # the rows are in random order
    weights = torch.cat(
        [halves, torch.from_numpy(rng.multinomial(n_seq, np.full(n_seq, 1 / n_seq), 200)).double()]
    )
    legacy = -torch.gradient(e_token, dim=1)[0][..., None]
    rows, boots, max_z, todo = (
        [],
        [],
        torch.zeros(len(perms)),
        torch.arange(len(sae.b_enc)) if features is None else features,
    )
    for index in tqdm(todo.split(256), desc=f"EFAS, layer {layer}", unit="chunk", disable=None):
        f = sae.encode(x, index)
        a = slope(sae.w_dec[index]).to(f.dtype) if slope else feature_gradient(gx, sae.w_dec[index])
        row = (
            dict(feature=index) | efas(f, a) | dict(mean_active=f.sum((0, 1)) / (f > 0).sum((0, 1)))
        )
        keep = row["eligible"].nonzero()[:, 0]
        table = pd.DataFrame({k: v.numpy() for k, v in row.items()})
        rows.append(table)
        if not len(keep):
            continue
        f, a = f[..., keep], a[..., keep]
        score = rank_normal(a)
        observed, mean, var = seqperm_moments(f, score, strata)
        z = (observed - mean) / var.sqrt()
        z_mc = ((seqperm_mc(f, score, perms) - mean) / var.sqrt()).abs().float()
        max_z = torch.maximum(max_z, z_mc.amax(1))
        _, raw_mean, raw_var = seqperm_moments(f, a, strata)
        spread = (
            f.std((0, 1), correction=0).double()
            * a.std((0, 1), correction=0).double()
            * e_token.numel()
        )
        r = pearson(sequence_sums(f, a), weights)
        boots.append(r[2:].numpy())
        flat, shuffled = f.flatten(0, 1), rank_normal(a[perms[0].long()]).flatten(0, 1)
        mi, entropy = mi_binned(flat, score.flatten(0, 1))
        found = dict(
            z_token=z,
            p_token=2 * torch.special.ndtr(-z.abs()),
            p_mc=(1 + (z_mc >= z.abs()).sum(0)) / (1 + len(perms)),
            null_mean=(raw_mean - f.double().sum((0, 1)) * a.double().mean((0, 1))) / spread,
            null_sd=raw_var.sqrt() / spread,
            mc_sd_ratio=z_mc.square().mean(0).sqrt(),
            efas_a=r[0],
            efas_b=r[1],
            efas_shuffled=pearson(sequence_sums(f, a.roll(1, -1)))[
                0
            ],  # with another feature's direction
            legacy=pearson(sequence_sums(f, legacy.expand_as(f)))[0],
            mi=mi,
            mi_share=mi / entropy,
            mi_permuted=mi_binned(flat, shuffled)[0],
        )
        for name, value in found.items():
            table.loc[keep.numpy(), name] = value.double().numpy()
    t = pd.concat(rows, ignore_index=True).assign(layer=layer)
    ok = t.eligible.to_numpy()
    null = torch.zeros(1, 0)
    facts: dict[str, Any] = dict(
        layer=layer, n_tokens=e_token.numel(), n_seq=n_seq, latents=len(t), eligible=int(ok.sum())
    )
    if not ok.any():
        return Layer(t, null, facts, np.zeros((200, 0)))
    t.loc[ok, "p_maxt"] = [
        (1 + (max_z >= abs(z)).sum().item()) / (1 + len(perms)) for z in t.z_token[ok]
    ]
    inside, rates = sae.covers(x), torch.tensor(t.n_active[ok].to_numpy() / e_token.numel())
    null, bins = direction_null(x[inside], gx[inside], rates, args.directions, rng)
    own, r = null[bins], torch.tensor(t.efas[ok].to_numpy())[:, None]
    tail = torch.minimum((own >= r).sum(1), (own <= r).sum(1))
    t.loc[ok, "p_direction"] = (2 * (1 + tail) / (1 + args.directions)).clamp(max=1).numpy()
    t.loc[ok, "z_direction"] = ((r[:, 0] - own.mean(1)) / own.std(1)).numpy()
    sd, mean = t.null_sd[ok].to_numpy(), t.null_mean[ok].to_numpy()
    facts |= dict(
        rule_passes=int((t.efas[ok].abs() > RULE).sum()),
        rule_false_permuted=float(
            (stats.norm.sf((RULE - mean) / sd) + stats.norm.cdf((-RULE - mean) / sd)).sum()
        ),
        rule_false_directions=float((own.abs() > RULE).double().mean(1).sum()),
        random_directions_positive=float((null > 0).double().mean()),
        random_directions_q95=float(null.abs().quantile(0.95))
        if null.numel() < 2**24
        else math.nan,
        shuffled_pairing_q95=float(t.efas_shuffled[ok].abs().quantile(0.95)),
        split_half_r=float(np.corrcoef(t.efas_a[ok], t.efas_b[ok])[0, 1]),
        legacy_max=float(t.legacy[ok].abs().max()),
        mc_sd_over_analytic=float(t.mc_sd_ratio[ok].median()),
    )
    return Layer(t, null, facts, np.concatenate(boots, axis=1))


def call_aligned(layers: list[Layer]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One family over all layers -> every feature, with q-values and `aligned`; and a summary row a layer."""
    t = pd.concat([layer.features for layer in layers], ignore_index=True)
    for name in (
        "z_token",
        "p_token",
        "p_mc",
        "p_maxt",
        "p_direction",
        "z_direction",
        "efas_a",
        "efas_b",
        "mi",
        "legacy",
    ):
        t[name] = t.get(name, pd.Series(np.nan, t.index)).astype(float)
    t["q_token"], t["q_token_by"], t["q_direction"] = (
        fdr(t.p_token.to_numpy()),
        fdr(t.p_token.to_numpy(), "by"),
        fdr(t.p_direction.to_numpy()),
    )
    t["replicates"] = np.sign(t.efas_a) == np.sign(t.efas_b)
    t["aligned"] = (t.q_token < ALPHA) & (t.q_direction < ALPHA) & t.replicates & t.eligible
    rows = []
    for layer in layers:
        own = t[(t.layer == layer.facts["layer"]) & t.eligible]
        medians = (
            np.nanmedian(np.abs(layer.boot), axis=1)
            if layer.boot.shape[1]
            else np.full(200, np.nan)
        )
        medians += (
            own.efas.abs().median() - medians.mean()
        )  # resampling adds noise, which raises |EFAS|: the interval is shifted back
        rows.append(
            layer.facts
            | dict(
                token_null=int((own.q_token < ALPHA).sum()),
                token_null_by=int((own.q_token_by < ALPHA).sum()),
                token_null_maxt=int((own.p_maxt < ALPHA).sum()),
                direction_null=int((own.q_direction < ALPHA).sum()),
                aligned=int(own.aligned.sum()),
                aligned_positive=int((own.aligned & (own.efas > 0)).sum()),
                median_abs_efas=own.efas.abs().median(),
                median_ci_lo=np.quantile(medians, 0.025),
                median_ci_hi=np.quantile(medians, 0.975),
                median_mi_nats=own.mi.median(),
                median_mi_permuted=own.mi_permuted.median() if len(own) else np.nan,
            )
        )
    return t, pd.DataFrame(rows)


@torch.no_grad()
def attractors(
    et: EnergyTransformer, b: Tensor, alpha: float, rng: np.random.Generator
) -> tuple[pd.DataFrame, Tensor]:
    """Fixed points from five starts under the same field b [S, L, D] -> a row a start, and x* from the own field.

    Relaxed in float32; the residual |v| is then measured in float64. converged: share of sequences with |v| <= 1e-3 at every token.
    """
    exact, noise = (
        copy.deepcopy(et).double(),
        torch.from_numpy(rng.standard_normal(b.shape)).to(b.dtype) * b.std(),
    )
    starts = {
        "own field": b,
        "another sequence's field": b.roll(1, 0),
        "noise": noise,
        "zero": torch.zeros_like(b),
        "twice the field": 2 * b,
    }
    found = relax(
        et, torch.cat(list(starts.values())), b.repeat(len(starts), 1, 1), alpha, tol=5e-4
    )[0].split(len(b))
    rows, g0, first = [], et.activation(found[0]), et.logits(found[0]).argmax(-1)
    for name, x in zip(starts, found, strict=True):
        residual = exact.grad_g(x.double(), b.double()).norm(dim=-1).amax(1)
        gap = (et.activation(x) - g0).norm(dim=(1, 2)) / g0.norm(dim=(1, 2))
        rows.append(
            dict(
                start=name,
                n_seq=len(x),
                converged=(residual <= 1e-3).double().mean().item(),
                max_residual=residual.max().item(),
                energy_per_token=(et.energy(x, b) / x.shape[1]).mean().item(),
                distance_from_own=gap.mean().item(),
                max_distance=gap.max().item(),
                decoded_differs=(et.logits(x).argmax(-1) != first).double().mean().item(),
            )
        )
    return pd.DataFrame(rows), found[0]


@torch.no_grad()
def basins(
    et: EnergyTransformer,
    star: Tensor,
    b: Tensor,
    alpha: float,
    rng: np.random.Generator,
    draws: int = 2,
) -> pd.DataFrame:
    """How often x* + sigma |x*| noise relaxes back to within 1 % of g*: a row a sigma (sigma 1: the noise is as long as the state)."""
    rows, g0 = [], et.activation(star)
    for sigma in tqdm((0.1, 0.25, 0.5, 1.0, 2.0), desc="basins", unit="sigma", disable=None):
        back = []
        for _ in range(draws):
            noise = F.normalize(
                torch.from_numpy(rng.standard_normal(star.shape)).to(star.dtype), dim=-1
            ) * star.norm(dim=-1, keepdim=True)
            x, _ = relax(et, star + sigma * noise, b, alpha, tol=1e-2, max_steps=600)
            back += ((et.activation(x) - g0).norm(dim=(1, 2)) / g0.norm(dim=(1, 2)) < 0.01).tolist()
        ci = stats.binomtest(sum(back), len(back)).proportion_ci(method="wilson")
        rows.append(
            dict(
                sigma=sigma,
                returned=sum(back) / len(back),
                ci_lo=ci.low,
                ci_hi=ci.high,
                n=len(back),
            )
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def merge_tree(
    et: EnergyTransformer,
    b: Tensor,
    alpha: float,
    rng: np.random.Generator,
    starts: int = 12,
    neighbours: int = 6,
) -> pd.DataFrame:
    """H0 persistence of the sublevel sets of one sequence's energy: b [L, D] -> birth and death (energy a token) of every component.

    Points: the descents from noisy starts. Edges: successive states, and nearest neighbours in g; an edge is as high as the
    higher of its ends and its midpoint, so that depths are upper bounds of what a finer path would find.
    """
    l, d = b.shape
    field, x = (
        b.expand(starts, l, d),
        b
        + torch.from_numpy(
            rng.uniform(0, 2, (starts, 1, 1)) * rng.standard_normal((starts, l, d))
        ).to(b.dtype)
        * b.std(),
    )
    points = []
    for t in range(201):
        if t in (1, 2, 4, 8, 16, 40, 100, 200):
            points.append(x)
        x = x - alpha * et.grad_g(x, field)
    cloud = torch.cat(points)
    chain = [(i, i + starts) for i in range(len(cloud) - starts)]
    gap = torch.cdist(*[et.activation(cloud).flatten(1)] * 2)
    near = [
        (i, int(j))
        for i, row in enumerate(gap.topk(neighbours + 1, largest=False).indices)
        for j in row
        if j > i
    ]
    edges = torch.tensor(sorted(set(chain + near)))
    e = et.energy(cloud, b.expand_as(cloud)) / l
    middle = cloud[edges].mean(1)
    height = torch.maximum(e[edges].amax(1), et.energy(middle, b.expand_as(middle)) / l)
    parent, rows = list(range(len(cloud))), []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for n in height.argsort().tolist():
        lo, hi = sorted((root(i) for i in edges[n].tolist()), key=lambda i: e[i].item())
        if lo != hi:  # the younger component (higher minimum) dies
            parent[hi] = lo
            rows.append(dict(birth=e[hi].item(), death=height[n].item()))
    rows.append(dict(birth=e.min().item(), death=math.inf))
    return (
        pd.DataFrame(rows)
        .assign(depth=lambda t: t.death - t.birth)
        .query("depth > 1e-6")
        .sort_values("depth", ascending=False)
    )


def concept_features(
    f: Tensor, classes: np.ndarray, strata: Tensor, features: np.ndarray
) -> pd.DataFrame:
    """f [S, L, K'] of eligible features and token classes [S, L] -> a row a (feature, class): AUROC, precision, lift over the
    base rate, p, q."""
    ranks = stats.rankdata(f.flatten(0, 1).numpy(), axis=0)
    rows = []
    for name in CLASSES:
        of = classes == name
        n, m = of.sum(), of.size
        if not 0 < n < m:
            continue
        inside = torch.from_numpy(of)
        observed, mean, var = seqperm_moments(f, inside[..., None].expand_as(f).float(), strata)
        hits = ((f > 0) & inside[..., None]).sum((0, 1)) / (f > 0).sum((0, 1))
        rows.append(
            pd.DataFrame(
                dict(
                    feature=features,
                    token_class=name,
                    base_rate=n / m,
                    precision=hits.numpy(),
                    lift=hits.numpy() / (n / m),
                    auroc=(ranks[of.ravel()].sum(0) - n * (n + 1) / 2) / (n * (m - n)),
                    p=torch.special.ndtr(-(observed - mean) / var.sqrt()).numpy(),
                )
            )
        )
    if not rows:
        return pd.DataFrame(
            columns=["feature", "token_class", "base_rate", "precision", "lift", "auroc", "p", "q"]
        )
    return pd.concat(rows, ignore_index=True).assign(q=lambda t: fdr(t.p.to_numpy()))


def attractor_clusters(
    et: EnergyTransformer, star: Tensor, b: Tensor, classes: np.ndarray, seed: int
) -> pd.DataFrame:
    """Adjusted mutual information of token clusters with token classes: attractors, against permuted labels and the input itself."""
    cluster, score = (
        import_module("sklearn.cluster").KMeans,
        import_module("sklearn.metrics").adjusted_mutual_info_score,
    )
    labels, rng, rows = classes.ravel(), np.random.default_rng(seed), []
    for name, points in (("attractor g*", et.activation(star)), ("input field", et.activation(b))):
        found = cluster(16, n_init=3, random_state=seed).fit_predict(
            points.flatten(0, 1).float().numpy()
        )
        permuted = [score(rng.permutation(labels), found) for _ in range(50)]
        rows.append(
            dict(
                clusters_of=name,
                ami=score(labels, found),
                permuted_q95=np.quantile(permuted, 0.95),
                n_tokens=labels.size,
            )
        )
    return pd.DataFrame(rows)


def matched_features(t: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Up to n eligible features of one layer: half aligned, each with the unaligned one nearest in firing rate and mean activation."""
    space = np.log(t[["n_active", "mean_active"]].to_numpy() + 1e-9)
    passed, rest = np.flatnonzero(t.aligned), list(np.flatnonzero(~t.aligned))
    chosen = list(rng.permutation(passed)[: n // 2])
    for i in list(chosen):
        if rest:
            chosen.append(rest.pop(int(np.argmin(np.abs(space[rest] - space[i]).sum(1)))))
    chosen += list(rng.permutation(rest)[: max(0, n - len(chosen))])
    return t.iloc[chosen]


@torch.no_grad()
def ablate(
    energy: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    gx: Tensor,
    sae: SAE,
    features: pd.DataFrame,
    n_seq: int,
    steps: int = 4,
    doses: tuple[float, ...] = (0.05, 0.25, 1.0),
) -> pd.DataFrame:
    """x <- x - eps f_k d_k at the tokens where f_k > 0 (the SAE's error is kept): predicted and actual change of energy.

    energy(x, i) -> [n] and slope(x, i) = dE/dx take states of sequences i. x, gx [S, L, D]: held-out half. A row a (feature, eps, sequence)
    with sums over the active tokens: energy_change, attribution (eps f A), integrated_gradients (midpoint rule), f, n_active.
    """
    rows = []
    for k in tqdm(features.feature.tolist(), desc="ablations", unit="feature", disable=None):
        d, f = (
            sae.w_dec[k].to(x.dtype),
            sae.encode(x.float(), torch.tensor([k]))[..., 0].to(x.dtype),
        )
        i = (f > 0).any(1).nonzero()[:n_seq, 0]
        if not len(i):
            continue
        base, f, pull = energy(x[i], i), f[i], -(gx[i] @ d)
        move = f[..., None] * d
        for eps in doses:
            path = sum(
                (slope(x[i] - (j + 0.5) / steps * eps * move, i) * -eps * move).sum((1, 2))
                for j in range(steps)
            ) / max(1, steps)
            change = energy(x[i] - eps * move, i) - base
            rows.append(
                pd.DataFrame(
                    dict(
                        feature=k,
                        eps=eps,
                        sequence=i,
                        energy_change=change,
                        attribution=eps * (f * pull).sum(1),
                        integrated_gradients=path,
                        f=f.sum(1),
                        f2=f.square().sum(1),
                        n_active=(f > 0).sum(1),
                    )
                )
            )
    return (
        pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=["feature", "eps", "sequence"])
    )


def predicted_versus_actual(
    effects: pd.DataFrame, features: pd.DataFrame, seed: int, n_boot: int = 200
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spearman correlation over features of each predictor with the energy change per active token, CI by resampling sequences
    and features.

    attribution, integrated gradients and magnitude use the intervened tokens; EFAS is the discovery half's. Returns scores and points.
    """
    rng, scores, points = np.random.default_rng(seed), [], []
    fixed = features.set_index("feature")[["efas_a", "efas_on", "n_active", "aligned"]].rename(
        columns={"n_active": "frequency"}
    )
    fixed["random"] = 0.0
    names = {
        "attribution": "signed",
        "integrated_gradients": "signed",
        "efas_a": "signed",
        "efas_on": "signed",
        "magnitude": "absolute",
        "frequency": "absolute",
        "random": "signed",
    }
    for eps, group in effects.groupby("eps"):
        sums = ["energy_change", "attribution", "integrated_gradients", "f2", "n_active"]
        keys, seqs = group.feature.unique(), group.sequence.unique()
        cube = np.zeros((len(sums), len(keys), len(seqs)))
        cube[
            :, pd.Index(keys).get_indexer(group.feature), pd.Index(seqs).get_indexer(group.sequence)
        ] = group[sums].to_numpy().T
        draws = np.vstack(
            [
                np.ones(len(seqs)),
                rng.multinomial(len(seqs), np.full(len(seqs), 1 / len(seqs)), n_boot),
            ]
        )
        change, att, ig, mag, n = np.einsum("bs,vks->vbk", draws, cube)
        change, att, ig, mag = (
            np.where(n > 0, v / np.maximum(n, 1), v[:1] / n[:1]) for v in (change, att, ig, mag)
        )  # a feature left out of a draw keeps its mean
        index = np.vstack([np.arange(len(keys)), rng.integers(len(keys), size=(n_boot, len(keys)))])
        live = {"attribution": att, "integrated_gradients": ig, "magnitude": mag}
        points.append(
            pd.DataFrame(
                dict(
                    feature=keys,
                    eps=eps,
                    energy_change=change[0],
                    **{k: v[0] for k, v in live.items()},
                )
            ).merge(fixed, left_on="feature", right_index=True)
        )
        for name, kind in names.items():
            values = (
                live[name]
                if name in live
                else np.tile(fixed.loc[keys, name].astype(float), (len(draws), 1))
            )
            if name == "random":  # its interval is the null's
                values = rng.standard_normal(values.shape)
            for how in ("signed", "absolute") if kind == "signed" else ("absolute",):
                pair = [
                    np.take_along_axis(v if how == "signed" else np.abs(v), index, axis=1)
                    for v in (values, change)
                ]
                pair = [stats.rankdata(v, axis=1) for v in pair]
                pair = [v - v.mean(1, keepdims=True) for v in pair]
                rho = (pair[0] * pair[1]).sum(1) / np.sqrt(
                    (pair[0] ** 2).sum(1) * (pair[1] ** 2).sum(1) + 1e-300
                )
                rho[0] = rho[1:].mean() if name == "random" else rho[0]
                lo, hi = np.quantile(rho[1:], [0.025, 0.975])
                slope = (
                    np.polyfit(values[0], change[0], 1)[0]
                    if how == "signed"
                    and name in ("attribution", "integrated_gradients")
                    and len(keys) > 3
                    else np.nan
                )
                agree = (
                    np.mean(np.sign(values[0]) == np.sign(change[0])) if how == "signed" else np.nan
                )
                scores.append(
                    dict(
                        eps=eps,
                        predictor=name,
                        scale=how,
                        spearman=rho[0],
                        ci_lo=lo,
                        ci_hi=hi,
                        slope=slope,
                        sign_agreement=agree,
                        n_features=len(keys),
                        n_seq=len(seqs),
                    )
                )
    return pd.DataFrame(scores), pd.concat(points, ignore_index=True) if points else pd.DataFrame()


@dataclass
class Clamp:
    """Holds a read-out of chosen tokens: x += mask (target - read(x)) d, read = relu(<w, x> + c) for a feature, <w, x> for a
    direction. Rows are sequences."""

    w: Tensor  # [P, D]
    c: Tensor  # [P]
    d: Tensor  # [P, D] unit norm
    target: Tensor  # [P, L]
    mask: Tensor  # [P, L] bool
    rectified: Tensor  # [P] bool

    def __call__(self, x: Tensor, i: Tensor) -> Tensor:
        read = torch.einsum("pld,pd->pl", x, self.w[i]) + self.c[i, None]
        read = torch.where(self.rectified[i, None], read.relu(), read)
        return x + ((self.target[i] - read) * self.mask[i])[..., None] * self.d[i, None]


@torch.no_grad()
def dose_response(
    et: EnergyTransformer,
    x: Tensor,
    b: Tensor,
    sae: SAE,
    features: pd.DataFrame,
    alpha: float,
    rng: np.random.Generator,
    n_seq: int = 4,
    steps: int = 60,
    doses: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0),
) -> pd.DataFrame:
    """Clamps one feature persistently at dose x its mean activation while the state relaxes -> a row a (feature, dose, arm, sequence).

    Arms: the feature, and a random direction with the same displacement at the same tokens. attractor_shift = [E(x*) - E(x*_free)] per
    clamped token, E being the unclamped energy; flips on the clamped tokens, collateral = flips on the others; g_change = |g -
    g_free| there.
    """
    rows = []
    for _, row in tqdm(list(features.iterrows()), desc="clamps", unit="feature", disable=None):
        k = int(row.feature)
        d, w, f = (
            sae.w_dec[k].to(x.dtype),
            sae.w_enc[:, k].to(x.dtype),
            sae.encode(x.float(), torch.tensor([k]))[..., 0].to(x.dtype),
        )
        i = (f > 0).any(1).nonzero()[:n_seq, 0]
        if not len(i):
            continue
        start, field, on, n = x[i], b[i], f[i] > 0, len(i)
        free, _ = relax(et, start, field, alpha, max_steps=steps)
        u = F.normalize(
            torch.from_numpy(rng.standard_normal((len(doses), x.shape[-1]))).to(x.dtype), dim=-1
        )
        targets = (
            torch.tensor(doses, dtype=x.dtype)[:, None, None]
            * row.mean_active
            * torch.ones_like(f[i])
        )  # [doses, n, L]
        along = torch.einsum("nld,ed->enl", start, u) + targets - f[i]
        offset = sae.b_enc[k].to(x.dtype) - sae.b_dec.to(x.dtype) @ w
        many = len(doses) * n
        clamp = Clamp(
            torch.cat([w.expand(many, -1), u.repeat_interleave(n, 0)]),
            torch.cat([offset.expand(many), torch.zeros(many, dtype=x.dtype)]),
            torch.cat([d.expand(many, -1), u.repeat_interleave(n, 0)]),
            torch.cat([targets.flatten(0, 1), along.flatten(0, 1)]),
            on.repeat(2 * len(doses), 1),
            torch.arange(2 * many) < many,
        )
        every = torch.arange(2 * many)
        again = field.repeat(2 * len(doses), 1, 1)
        held, residual = relax(
            et,
            clamp(start.repeat(2 * len(doses), 1, 1), every),
            again,
            alpha,
            max_steps=steps,
            hold=clamp,
        )
        shift = (et.energy(held, again) - et.energy(free, field).repeat(2 * len(doses))) / on.sum(
            1
        ).repeat(2 * len(doses))
        flips = et.logits(held).argmax(-1) != et.logits(free).argmax(-1).repeat(2 * len(doses), 1)
        moved = (et.activation(held) - et.activation(free).repeat(2 * len(doses), 1, 1)).norm(
            dim=-1
        )
        mask = clamp.mask
        rows.append(
            pd.DataFrame(
                dict(
                    feature=k,
                    aligned=bool(row.aligned),
                    efas=row.efas,
                    arm=np.repeat(["feature", "random direction"], many),
                    dose=np.tile(np.repeat(doses, n), 2),
                    sequence=i.repeat(2 * len(doses)),
                    attractor_shift=shift,
                    residual=residual,
                    flip_rate=(flips & mask).sum(1) / mask.sum(1),
                    collateral=(flips & ~mask).sum(1) / (~mask).sum(1).clamp_min(1),
                    g_change_others=(moved * ~mask).sum(1) / (~mask).sum(1).clamp_min(1),
                )
            )
        )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def bootstrap_mean(
    values: pd.Series, groups: pd.Series, seed: int, n: int = 500
) -> tuple[float, float, float]:
    """Mean and 95 % interval by resampling whole groups (sequences or features), which is what is independent."""
    g = values.groupby(groups.to_numpy()).agg(["sum", "count"]).to_numpy()
    draws = np.random.default_rng(seed).multinomial(len(g), np.full(len(g), 1 / len(g)), n) @ g
    lo, hi = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    return float(values.mean()), float(lo), float(hi)


# ---------------------------------------------------------------------------------------------- run
def documents(corpus: str, cache_dir: str | Path) -> dict[str, str]:
    """{name: text}: `builtin` (cached: parsing costs 40 s), `topics` (the language reference in sections), or a file's paragraphs."""
    if corpus == "topics":
        topics = import_module("pydoc_data.topics").topics
        return {
            f"{k}/{i}": " ".join(v.split()[i : i + 150])
            for k, v in sorted(topics.items())
            for i in range(0, len(v.split()), 150)
        }
    if corpus != "builtin":
        try:
            return dict(enumerate(Path(corpus).read_text(encoding="utf-8").split("\n\n")))  # type: ignore[arg-type]
        except (OSError, UnicodeDecodeError) as e:
            raise HandoffError(
                f"--corpus {corpus} cannot be read ({e}); expected builtin, topics or a UTF-8 text file"
            ) from None
    key = repr(
        [
            BUILTIN_VERSION,
            platform.python_version(),
            [version(p) for p in BUILTIN_PACKAGES.values()],
        ]
    )
    cache = (
        Path(cache_dir).expanduser()
        / f"builtin-{hashlib.sha256(key.encode()).hexdigest()[:12]}-documents.json"
    )
    with contextlib.suppress(OSError, ValueError):
        return json.loads(cache.read_text(encoding="utf-8"))
    texts = builtin_documents()
    write_json(cache, texts)
    return texts


def templated_documents(n: int, rng: np.random.Generator) -> dict[str, str]:
    """n documents of dates, e-mail addresses, regular expressions and sums: so that numbers and metacharacters are not rare."""
    names, hosts = (
        ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi"],
        ["example", "mail", "lab", "home"],
    )
    patterns = [r"\d+", r"[a-z]*", r"\w+@\w+", r"^a.b$", r"(x|y)?", r"[0-9]{2}"]

    def line() -> str:
        name, other, host, pattern = (
            str(rng.choice(words)) for words in (names, names, hosts, patterns)
        )
        a, b, year, month, day = (
            int(rng.integers(lo, hi))
            for lo, hi in ((1, 20), (1, 20), (2000, 2030), (1, 13), (1, 29))
        )
        kinds = (
            f"the date is {year}-{month:02d}-{day:02d} .",
            f"send a message to {name}.{other}@{host}.org .",
            f"the pattern {pattern} matches the string {name} .",
            f"the sum {a} + {b} = {a + b} .",
        )
        return kinds[rng.integers(len(kinds))]

    return {f"templated/{i}": " ".join(line() for _ in range(8)) for i in range(n)}


@dataclass
class Corpus:
    """Token windows, split by document. `test` has one window a document, so that sequences are independent units."""

    vocab: list[str]
    train: Tensor  # [n, L] int64
    test: Tensor  # [S, L] int64
    strata: Tensor  # [S] 0 prose, 1 templated: permutations stay within one

    def classes(self, ids: Tensor) -> np.ndarray:
        """Token ids -> the name of each token's class, same shape; `other` if none."""
        of = np.array(
            [
                next((c for c, r in CLASSES.items() if i > MASK and re.fullmatch(r, w)), "other")
                for i, w in enumerate(self.vocab)
            ]
        )
        return of[ids.numpy()]

    def encode(self, text: str) -> Tensor:
        """Any text -> token ids [l]."""
        index = {w: i for i, w in enumerate(self.vocab)}
        return torch.tensor(
            [index.get(w, UNK) for w in TOKEN.findall(text.lower())], dtype=torch.int64
        )


def build_corpus(
    texts: dict[str, str], sequences: int, seed: int, vocab_size: int = 1000, length: int = 32
) -> Corpus:
    """Windows of `length` word, number or symbol tokens; a fifth of the documents, by the hash of their names, is held out.

    Raises HandoffError if fewer than `sequences` held-out documents are long enough.
    """
    texts = {str(k): v for k, v in texts.items()} | templated_documents(
        max(200, len(texts) // 3), np.random.default_rng(seed)
    )
    words = {name: TOKEN.findall(text.lower()) for name, text in texts.items()}
    held = {name for name in words if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 2}
    counts = Counter(w for name, ws in words.items() if name not in held for w in ws)
    vocab = ["<unk>", "<mask>"] + [w for w, _ in counts.most_common(vocab_size - 2)]
    index = {w: i for i, w in enumerate(vocab)}
    train, test = [], {0: [], 1: []}  # type: ignore[var-annotated]
    for name, ws in words.items():
        windows = [
            [index.get(w, UNK) for w in ws[i : i + length]]
            for i in range(0, len(ws) - length + 1, length)
        ]
        if name in held:
            test[name.startswith("templated/")] += windows[:1]
        else:
            train += windows
    share = {1: min(len(test[1]), sequences // 4)}
    share[0] = sequences - share[1]
    if len(test[0]) < share[0] or not train:
        raise HandoffError(
            f"not enough data: {len(test[0])} held-out documents of {length} tokens, needed {share[0]}; use a larger --corpus or "
            f"fewer --sequences"
        )
    rng = np.random.default_rng(seed)
    rows = [test[g][i] for g in (0, 1) for i in rng.permutation(len(test[g]))[: share[g]]]
    return Corpus(
        vocab,
        torch.tensor(train),
        torch.tensor(rows),
        torch.tensor([0] * share[0] + [1] * share[1]),
    )


def run(args: argparse.Namespace) -> int:
    clock = time.perf_counter()
    report, raw = args.save_dir / "research_report.md", args.save_dir / "raw_results.json"
    refuse_overwrite([report, raw], args.overwrite)
    keep_memory()
    with run_record(args.save_dir, args) as record:
        res, _ = run_all(
            args, build_corpus(documents(args.corpus, args.cache_dir), args.sequences, args.seed)
        )
        cost = (
            f"{(time.perf_counter() - clock) / 60:.1f} minutes, {time.process_time() / 60:.1f} CPU minutes on "
            f"{torch.get_num_threads()} threads, peak {peak_gb():.2f} GB"
        )
        save_tables(res.tables, args.save_dir)
        write_report(
            "Energy-Lens on an Energy Transformer", compose(res, args, cost, args.save_dir), report
        )
        res.to_json(raw)
        record |= dict(cost=cost, facts=res.facts)
    shown = [
        "layer",
        "eligible",
        "rule_passes",
        "token_null",
        "direction_null",
        "aligned",
        "median_abs_efas",
        "split_half_r",
    ]
    print(res.tables["layers"][shown].to_string(index=False, float_format="%.3f"))
    print(f"{cost}; report: {report}")
    return 0


# ------------------------------------------------------------------------------- tables and figures
# ("h", heading), ("p", paragraph), ("t", table) or ("img", (path, caption)) of a report
ReportPart = tuple[str, Any]
COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
]  # Okabe & Ito: safe for colour-blind readers


@dataclass
class LensResults:
    """Everything that an analysis found: scalars, and tidy tables by name."""

    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    state: dict[str, Any] = field(
        default_factory=dict, repr=False
    )  # models and arguments; not saved

    def to_dataframe(self, name: str = "features") -> pd.DataFrame:
        """One of the tables; `features` has a row a (layer, feature)."""
        return self.tables[name]

    def to_json(self, path: str | Path | None = None) -> str:
        """Facts and tables as JSON; written to `path` if given."""
        record = dict(
            model=self.model,
            facts=self.facts,
            tables={k: json.loads(v.to_json(orient="records")) for k, v in self.tables.items()},
        )
        if path:
            write_json(path, record)
        return json.dumps(record, default=str)


def cell(value: Any) -> str:
    """A value of a table for the reader: four significant digits, whole numbers whole, a dash where
    there is none."""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if math.isnan(value):
        return "–"
    if float(value).is_integer() and abs(float(value)) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def markdown_table(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1]]
    for row in table.itertuples(index=False):
        lines.append([cell(value).replace("|", "\\|") for value in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_block(kind: str, value: Any) -> str:
    """A block of the report as Markdown."""
    if kind == "h":
        return f"## {value}"
    if kind == "p":
        return value
    if kind == "t":
        return markdown_table(value)
    image, caption = value
    return f"![{caption}]({Path(image).name})\n\n*{caption}*"


def png_address(image: Path) -> str:
    """A PNG as an address that carries the picture itself."""
    return "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()


def write_report(title: str, blocks: list[ReportPart], path: Path) -> None:
    """The same blocks as Markdown (`path`) and as one self-contained HTML page beside it. Where the
    folder pages/ is missing, a line says so and there is no page."""
    paragraphs = [f"# {title}"]
    for kind, value in blocks:
        paragraphs.append(markdown_block(kind, value))
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")

    page_path = path.with_suffix(".html")
    page_path.unlink(missing_ok=True)  # an earlier page is not of this report
    try:
        page = render_page(
            "energy_lens.html", title=title, blocks=blocks, show=cell, png_address=png_address
        )
    except HandoffError as error:  # the script was copied alone
        print(error)
        return
    with atomic(page_path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def save_tables(tables: dict[str, pd.DataFrame], out: Path) -> None:
    """Every table as <out>/<name>.csv."""
    for name, table in tables.items():
        with atomic(out / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)


@contextlib.contextmanager
def new_figure(
    path: Path, columns: int = 1, width: float = 4.2, height: float = 3.4, rows: int = 1
) -> Iterator[Any]:
    """Axes [rows, columns] of a new figure, flattened; saved as PNG when the block ends."""
    plt = import_module("matplotlib.pyplot")
    plt.switch_backend("agg")
    fig, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    yield axes.flat
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=130)
    plt.close(fig)


def histogram_table(features: pd.DataFrame, layers: list[Layer], seed: int) -> pd.DataFrame:
    """Densities of EFAS and of both nulls, a row a (layer, source, bin): what draw_distribution needs."""
    edges, rows, rng = np.linspace(-1, 1, 81), [], np.random.default_rng(seed)
    for layer in layers:
        own = features[(features.layer == layer.facts["layer"]) & features.eligible]
        if not len(own):
            continue
        draws = own.null_mean.to_numpy() + own.null_sd.to_numpy() * rng.standard_normal(
            (20, len(own))
        )  # the normal null that p_token uses
        sources = {
            "features": own.efas,
            "sequences permuted": draws.ravel(),
            "random directions": layer.null.flatten().numpy(),
        }
        for name, values in sources.items():
            density = np.histogram(values, edges, density=True)[0]
            rows.append(
                pd.DataFrame(
                    dict(
                        layer=layer.facts["layer"],
                        source=name,
                        efas=(edges[1:] + edges[:-1]) / 2,
                        density=density,
                    )
                )
            )
    return (
        pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=["layer", "source", "efas", "density"])
    )


def draw_distribution(t: pd.DataFrame, path: Path, unit: str) -> None:
    names = list(t.layer.unique())
    with new_figure(path, max(1, len(names)), 3.1, 3.2) as axes:
        for ax, layer in zip(axes, names, strict=False):
            for colour, style, (source, group) in zip(
                COLOURS,
                ("-", ":", "--"),
                t[t.layer == layer].groupby("source", sort=False),
                strict=False,
            ):
                ax.step(
                    group.efas,
                    group.density,
                    where="mid",
                    color=colour,
                    linestyle=style,
                    label=source,
                )
            ax.axvspan(-RULE, RULE, color="0.92", zorder=0)
            ax.set(
                title=f"{unit} {layer}",
                xlabel="EFAS (correlation)",
                yscale="symlog",
                ylim=(0, None),
            )
        axes[0].set_ylabel("density (grey: |EFAS| < 0.1)")
        key = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(
            *key,
            loc="outside lower center",
            ncols=3 if len(names) > 1 else 1,
            fontsize=7,
            frameon=False,
        )


def draw_predicted(
    points: pd.DataFrame,
    scores: pd.DataFrame,
    path: Path,
    ylabel: str = "energy change per active token",
) -> None:
    names = {
        "attribution": "attribution eps f A",
        "integrated_gradients": "integrated gradients",
        "efas_a": "EFAS (other half)",
    }
    with new_figure(path, len(names), 3.6, 3.4) as axes:
        for ax, (name, label) in zip(axes, names.items(), strict=True):
            for colour, marker, (eps, group) in zip(
                COLOURS, "os^", points.groupby("eps"), strict=False
            ):
                rho = scores[
                    (scores.eps == eps) & (scores.predictor == name) & (scores.scale == "signed")
                ].spearman.iloc[0]
                ax.scatter(
                    group[name],
                    group.energy_change,
                    s=10,
                    alpha=0.7,
                    color=colour,
                    marker=marker,
                    label=f"eps {eps:g}: Spearman {rho:.2f}",
                )
            wide = name != "efas_a"
            ax.set_yscale("symlog", linthresh=1e-2)
            if wide:
                ax.set_xscale("symlog", linthresh=1e-2)
                lim = [
                    min(ax.get_xlim()[0], ax.get_ylim()[0]),
                    max(ax.get_xlim()[1], ax.get_ylim()[1]),
                ]
                ax.plot(lim, lim, color="0.6", linewidth=0.8, zorder=0)
            ax.tick_params(labelsize=7)
            ax.set(xlabel=label)
            ax.legend(fontsize=7, frameon=False, loc="best")
        axes[0].set_ylabel(ylabel)


def draw_dose(t: pd.DataFrame, path: Path) -> None:
    outcomes = {
        "attractor_shift": "attractor shift per clamped token",
        "flip_rate": "flip rate of clamped tokens",
        "collateral": "flip rate of other tokens",
    }
    with new_figure(path, len(outcomes), 3.8, 3.3) as axes:
        for ax, (name, label) in zip(axes, outcomes.items(), strict=True):
            for colour, style, (arm, group) in zip(
                COLOURS, ("-o", "--s"), t.groupby("arm"), strict=False
            ):
                ci = pd.DataFrame(
                    [bootstrap_mean(g[name], g.feature, 0) for _, g in group.groupby("dose")],
                    columns=["mean", "lo", "hi"],
                )
                ax.plot(
                    sorted(t.dose.unique()),
                    ci["mean"],
                    style,
                    color=colour,
                    label=arm,
                    markersize=4,
                )
                ax.fill_between(sorted(t.dose.unique()), ci.lo, ci.hi, color=colour, alpha=0.2)
            ax.set(xlabel="clamp (multiple of mean activation)", ylabel=label)
            if name != "attractor_shift":
                ax.set_ylim(-0.002, max(0.05, ax.get_ylim()[1]))
        axes[0].legend(fontsize=8, frameon=False)


def draw_descent(t: pd.DataFrame, path: Path) -> None:
    with new_figure(path, 2, 4.4, 3.4) as axes:
        for colour, (term, group) in zip(COLOURS, t.groupby("term", sort=False), strict=False):
            ax = axes[0] if term == "total" else axes[1]
            ax.plot(group.step, group["mean"], color=colour, label=term)
            ax.fill_between(group.step, group.q05, group.q95, color=colour, alpha=0.2)
        axes[0].set(
            xlabel="descent step",
            ylabel="energy per token",
            xscale="symlog",
            title="total (band: 5-95 % of sequences)",
        )
        axes[1].set(
            xlabel="descent step", ylabel="energy per token", xscale="symlog", title="terms"
        )
        axes[1].legend(fontsize=8, frameon=False)


def draw_basins(basin: pd.DataFrame, tree: pd.DataFrame, path: Path) -> None:
    with new_figure(path, 2, 4.4, 3.4) as axes:
        axes[0].errorbar(
            basin.sigma,
            basin.returned,
            [basin.returned - basin.ci_lo, basin.ci_hi - basin.returned],
            fmt="-o",
            color=COLOURS[0],
            capsize=3,
        )
        axes[0].set(
            xlabel="noise / length of the state",
            ylabel="share of starts that return (95 % CI)",
            ylim=(-0.03, 1.03),
            xscale="log",
            title="basin size",
        )
        for colour, (name, group) in zip(COLOURS, tree.groupby("sequence"), strict=False):
            finite = group[np.isfinite(group.depth)]
            axes[1].plot(
                np.arange(1, len(finite) + 1),
                finite.depth,
                "o-",
                color=colour,
                markersize=3,
                label=f"sequence {name}",
            )
        axes[1].set(
            xlabel="rank of the minimum",
            ylabel="depth to the merge (energy per token)",
            yscale="log",
            title="merge tree of the sublevel sets",
        )
        if not np.isfinite(
            tree.depth
        ).any():  # nothing merges: one minimum each, as far as the starts can tell
            axes[1].text(
                0.5,
                0.5,
                "every start reached the same minimum",
                ha="center",
                transform=axes[1].transAxes,
            )
            axes[1].set_yscale("linear")
            axes[1].set(xticks=[], yticks=[])
        else:
            axes[1].legend(fontsize=7, frameon=False)


def noise_line() -> str:
    """What pure noise gives under the original's rule at eight tokens, computed here from the exact null of r."""
    r = (
        2 * stats.beta(3, 3).rvs(200_000, random_state=0) - 1
    )  # Pearson r of independent Gaussians at n = 8
    kept = np.abs(r[np.abs(r) > RULE])
    return (
        f"independent Gaussian noise at n = 8 tokens, kept when |r| > {RULE}: mean {kept.mean():.4f}, 95th percentile "
        f"{np.quantile(kept, 0.95):.4f}"
    )


def against_original(
    layers: pd.DataFrame, features: pd.DataFrame, concept: str, shift: str, cost: str
) -> pd.DataFrame:
    """The headlines of the original (drawn from a random generator there) beside what was measured here, and why they differ."""
    ok = features[features.eligible]
    total, n = int(layers.eligible.sum()), int(layers.aligned.sum())
    corr = np.corrcoef(ok.efas_a, ok.efas_b)[0, 1] if len(ok) > 2 else math.nan
    rows = [
        (
            "496 alignments",
            f"{n} of {total} eligible pass both nulls at q < {ALPHA} and replicate (expected false: at most {ALPHA:.0%}); |EFAS| > "
            f"{RULE} passes {int(layers.rule_passes.sum())}, "
            f"of which {layers.rule_false_permuted.sum():.0f} expected by permuted sequences, "
            f"{layers.rule_false_directions.sum():.0f} by random directions",
            "a threshold is no test; ours has nulls",
        ),
        (
            "maximum 0.8559",
            f"not reported; split-half r {corr:.2f}, 95th percentile of |EFAS| of random directions "
            f"{layers.random_directions_q95.median():.3f}",
            "a maximum grows with the number of features",
        ),
        (
            "mean 0.3775",
            f"median |EFAS| of eligible features {ok.efas.abs().median():.3f}",
            noise_line(),
        ),
        ("95th percentile 0.7388", f"{ok.efas.abs().quantile(0.95):.3f}", "as above"),
        (
            "7 regex / 272 word / 12 number features",
            concept,
            "a count means nothing without the share of such tokens; we print lift",
        ),
        (
            "shifts up to 0.67 units",
            shift,
            "within a basin any clamp raises the energy: only the excess over random directions counts",
        ),
        ("< 30 minutes, < 6 GB on an M2", cost, "measured on this machine; an M2 was not tested"),
    ]
    return pd.DataFrame(rows, columns=["original", "measured here", "why they differ"])


def peak_gb() -> float:
    """Peak resident memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform != "darwin" else 1e9
    )


def check_invariants(et: EnergyTransformer, ids: Tensor, alpha: float) -> dict[str, float]:
    """What must hold in float64: the largest errors of the closed forms against autograd, and of dE against -alpha v^T J v."""
    b = et.field(ids)
    x = (b - alpha * et.grad_g(b, b)).requires_grad_()
    auto = torch.autograd.grad(et.energy(x, b).sum(), x)[0]
    lagrangian = torch.autograd.grad(et.lagrangian(x).sum(), x)[0]
    x = x.detach()
    v, jv = et.grad_g(x, b), et.grad_x(x, b)
    small = 1e-4
    change = (et.energy(x - small * v, b) - et.energy(x, b)).sum()
    return dict(
        grad_x_error=(jv - auto).abs().max().item(),
        grad_scale=auto.abs().max().item(),
        activation_error=(et.activation(x) - lagrangian).abs().max().item(),
        energy_change=change.item(),
        predicted_change=(-small * (v * jv).sum()).item(),
    )


def token_dictionary(train_x: Tensor, train_ids: Tensor, x: Tensor, ids: Tensor) -> float:
    """FVU of the trivial dictionary, one atom a token id plus one a position: train_x [n, L, D] -> its score on x [S, L, D]."""
    mean, place = train_x.mean((0, 1)), train_x.mean(0)
    rest, flat = (train_x - place).flatten(0, 1), train_ids.flatten()
    total = torch.zeros(int(max(flat.max(), ids.max())) + 1, x.shape[-1]).index_add_(0, flat, rest)
    count = torch.bincount(flat, minlength=len(total)).clamp_min(1)[:, None]
    error = x - place - (total / count)[ids]
    return (error.square().sum() / (x - mean).square().sum()).item()


def dictionary_learning(train: Tensor, test: Tensor, l0: float, seed: int) -> dict[str, float]:
    """MiniBatchDictionaryLearning (256 atoms, OMP with the SAE's L0 rounded) on x [N, D]: its FVU on `test`."""
    n, mean, scale = max(1, round(l0)), train.mean(0), train.std()
    model = import_module("sklearn.decomposition").MiniBatchDictionaryLearning(
        256,
        alpha=2,
        batch_size=256,
        max_iter=2,
        transform_algorithm="omp",
        transform_n_nonzero_coefs=n,
        random_state=seed,
    )
    with warnings.catch_warnings(action="ignore"):
        model.fit(((train - mean) / scale).numpy())
        code = model.transform(((test - mean) / scale).numpy())
    error = test - mean - torch.from_numpy(code @ model.components_).float() * scale
    return dict(fvu=(error.square().sum() / (test - mean).square().sum()).item(), l0=n)


def descent_table(
    et: EnergyTransformer, ids: Tensor, alpha: float, steps: int = 60
) -> pd.DataFrame:
    """Energy per token and its terms along the descent: a row a (step, term), mean and 5-95 % range over sequences."""
    b, xs = descend(et, ids, steps, alpha)
    rows = []
    for t, x in enumerate(xs):
        terms = {k: v.mean(1) for k, v in et.energy_terms(x, b).items()}
        for name, e in {"total": torch.stack(list(terms.values())).sum(0), **terms}.items():
            rows.append(
                dict(
                    step=t,
                    term=name,
                    mean=e.mean().item(),
                    q05=e.quantile(0.05).item(),
                    q95=e.quantile(0.95).item(),
                    n_seq=len(e),
                )
            )
    return pd.DataFrame(rows)


def efas_at(
    t: int, et: EnergyTransformer, x: Tensor, b: Tensor, sae: SAE, strata: Tensor, args: Any
) -> Layer:
    """EFAS of the SAE's features at descent step t, by the gradient that --gradient names; x, b [S, L, D]."""
    et64 = copy.deepcopy(et).double()
    state = x.clone().requires_grad_()
    gx = torch.autograd.grad(et.energy(state, b).sum(), state)[0].detach()
    e_token = torch.stack(list(et.energy_terms(x, b).values())).sum(0)
    slope = few = None
    if args.gradient == "finite_difference":
        few = sae.encode(x).gt(0).sum((0, 1)).topk(16).indices

        def slope(d: Tensor) -> Tensor:
            return finite_difference(lambda y: et64.energy(y, b.double()), x.double(), d)

    layer = analyse_layer(t, x, gx, e_token, sae, strata, args, slope, few)
    some = sae.w_dec[
        torch.from_numpy(np.random.default_rng(args.seed).integers(0, len(sae.w_dec), 4))
    ]
    fd = finite_difference(lambda y: et64.energy(y, b[:2].double()), x[:2].double(), some)
    exact = feature_gradient(et64.grad_x(x[:2].double(), b[:2].double()), some.double())
    layer.facts["finite_difference_error"] = ((fd - exact).abs().max() / exact.abs().max()).item()
    return layer


def untrained_control(t: int, picked: Tensor, corpus: Corpus, args: Any) -> pd.DataFrame:
    """The same analysis, SAE included, of an Energy Transformer that was never trained: the summary row of descent step t."""
    et = untrained(corpus, args.seed).requires_grad_(False)
    b, xs = descend(et, corpus.test, t, args.step_size)
    fit = descend(et, picked[: math.ceil(args.sae_tokens / picked.shape[1])], t, args.step_size)[1][
        t
    ].flatten(0, 1)[: args.sae_tokens]
    sae = train_sae(
        fit, args.sae_dict_size, args.sae_l1, args.sae_iterations, args.optimiser, args.seed
    )
    return call_aligned([efas_at(t, et, xs[t], b, sae, corpus.strata, args)])[1].assign(
        fvu=sae.score(xs[t].flatten(0, 1))["fvu"]
    )


def analyse_energy_transformer(args: Any, et: EnergyTransformer, corpus: Corpus) -> LensResults:
    """SAE, EFAS, topology and interventions of a trained Energy Transformer."""
    rng, res, timer = (
        np.random.default_rng(args.seed),
        LensResults("energy-transformer"),
        time.perf_counter(),
    )
    et64, alpha, tables = copy.deepcopy(et).double(), args.step_size, res.tables
    res.facts["invariants"] = check_invariants(et64, corpus.test[:4], alpha)
    stable, tables["step_size"] = largest_step(et64, corpus.test[::40])
    res.facts["largest_step"] = stable
    last, middle = args.energy_layers[-1], args.energy_layers[len(args.energy_layers) // 2]
    picked = corpus.train[
        torch.from_numpy(rng.permutation(len(corpus.train))[: max(1000, args.sae_tokens // 32)])
    ]
    with torch.no_grad():
        b, xs = descend(et, corpus.test, last, alpha)
        parts = [
            descend(et, some, last, alpha)[1] for some in picked.split(125)
        ]  # all at once would need a gigabyte
        train_xs = {t: torch.cat([states[t] for states in parts]) for t in args.energy_layers}
        del parts

    layers, saes, quality = [], {}, []
    for t in tqdm(args.energy_layers, desc="layers", disable=None):
        x, fit = xs[t], train_xs[t].flatten(0, 1)[: args.sae_tokens]
        sae = saes[t] = train_sae(
            fit, args.sae_dict_size, args.sae_l1, args.sae_iterations, args.optimiser, args.seed
        )
        score = sae.score(x.flatten(0, 1))
        words = token_dictionary(train_xs[t], picked, x, corpus.test)
        quality.append(dict(layer=t, dictionary=f"SAE, {args.optimiser}", **score))
        quality.append(
            dict(layer=t, dictionary="one atom a token id + position", fvu=words, l0=2.0)
        )
        if t == middle:
            other = dictionary_learning(
                fit[:2048], x[::10].flatten(0, 1)[:320], score["l0"], args.seed
            )
            quality.append(
                dict(layer=t, dictionary="MiniBatchDictionaryLearning, 256 atoms", **other)
            )
        layers.append(efas_at(t, et, x, b, sae, corpus.strata, args))
    tables["untrained"] = untrained_control(middle, picked, corpus, args)
    tables["features"], tables["layers"] = call_aligned(layers)
    tables["sae"], tables["efas_distribution"] = (
        pd.DataFrame(quality),
        histogram_table(tables["features"], layers, args.seed),
    )
    res.facts["seconds_efas"] = time.perf_counter() - timer

    t, x, sae = tables["features"], xs[middle], saes[middle]
    own = t[(t.layer == middle) & t.eligible].reset_index(drop=True)
    if len(own):
        classes = corpus.classes(corpus.test)
        tables["concepts"] = concept_features(
            sae.encode(x, torch.tensor(own.feature.to_numpy())),
            classes,
            corpus.strata,
            own.feature.to_numpy(),
        )
        chosen = matched_features(own, args.intervened, rng)
        held = torch.arange(len(x))[1::2]  # the half that efas_a has not seen
        xd, bd = x[held].double(), b[held].double()
        effects = ablate(
            lambda y, i: et64.energy(y, bd[i]),
            lambda y, i: et64.grad_x(y, bd[i]),
            xd,
            et64.grad_x(xd, bd),
            sae,
            chosen,
            n_seq=12,
        )
        tables["interventions"] = effects
        tables["predictors"], tables["predicted_actual"] = predicted_versus_actual(
            effects, chosen, args.seed
        )
        relaxing = min(alpha, stable) if math.isfinite(stable) else alpha
        tables["clamps"] = dose_response(
            et,
            xs[middle][held],
            b[held],
            sae,
            chosen.groupby("aligned").head(max(2, args.intervened // 12)),
            relaxing,
            rng,
        )

    few_ids = corpus.test[torch.from_numpy(rng.permutation(len(corpus.test))[: args.relaxed])]
    masked = mask_tokens(few_ids, torch.Generator().manual_seed(args.seed))[
        0
    ]  # as in training: a hidden token has no field of its own
    few, fast = et.field(masked), min(stable, 1.0) if math.isfinite(stable) else alpha
    tables["attractors"], star = attractors(et, few, fast, rng)
    tables["basins"] = basins(et, star[:16], few[:16], fast, rng)
    tables["merge_tree"] = pd.concat(
        [
            merge_tree(et64, row, fast, rng).assign(sequence=i)
            for i, row in enumerate(few[:3].double())
        ],
        ignore_index=True,
    )
    tables["attractor_clusters"] = attractor_clusters(
        et, star, few, corpus.classes(few_ids), args.seed
    )
    tables["descent"] = descent_table(et, corpus.test[::5], alpha)
    res.state |= dict(args=args, saes=saes, et=et, corpus=corpus)
    res.facts["seconds"] = time.perf_counter() - timer
    return res


def concept_line(t: pd.DataFrame) -> str:
    """How many features are significant for each class, beside the base rate."""
    parts = []
    for name, g in t.groupby("token_class"):
        hit = g[(g.q < ALPHA) & (g.lift > 1.5) & (g.auroc > 0.5)]
        parts.append(
            f"{len(hit)} {name} (base rate {g.base_rate.iloc[0]:.1%}; lift > 1.5, q < {ALPHA})"
        )
    return "; ".join(parts) or "no eligible feature"


def sae_line(sae: pd.DataFrame) -> str:
    """At how many steps or blocks token ids explain the states better than the SAE, or nothing is explained; what that means."""
    fvu = sae.assign(trivial=sae.dictionary.str.startswith("one atom")).query(
        "trivial or dictionary.str.startswith('SAE')"
    )
    fvu = fvu.pivot(index="layer", columns="trivial", values="fvu")
    useless = fvu.index[fvu[False] >= 1]
    warning = (
        f"At layer {', '.join(map(str, useless))} the SAE explains nothing: it leaves no less than the mean state would (FVU 1 or more). "
        "What follows about the features there says nothing about the model. "
    )
    return (warning if len(useless) else "") + (
        f"One atom a token id plus one a position leaves less unexplained than the SAE at {int((fvu[True] < fvu[False]).sum())} of "
        f"{len(fvu)} layers. Where it does, the states are largely the tokens themselves, and a feature need be no more than a token."
    )


def upright(layers: pd.DataFrame) -> pd.DataFrame:
    """The table of layers with a column a layer: there are more quantities than layers."""
    return (
        layers.drop(columns=["latents"])
        .set_index("layer")
        .T.rename_axis(index="layer", columns=None)
        .reset_index()
        .rename(columns=str)
    )


def compose(res: LensResults, args: Any, cost: str, folder: Path) -> list[ReportPart]:
    """The report of the Energy Transformer, and its figures in `folder`."""
    t, f = res.tables, res.facts
    inv, rows = f["invariants"], t["layers"]
    draw_distribution(t["efas_distribution"], folder / "efas_distribution.png", "descent step")
    draw_basins(t["basins"], t["merge_tree"], folder / "basins.png")
    draw_descent(t["descent"], folder / "energy_descent.png")
    out: list[ReportPart] = [
        (
            "p",
            "EFAS of a feature is the correlation, over tokens, of its activation f with the pull of the energy along its decoder "
            "direction, A = -<dE/dx, d>. Positive: amplifying "
            "(the pull grows with the feature); negative: restoring. It does not say that the feature lowers the energy: that is "
            "the attribution f*A. A feature is called aligned only if it "
            f"passes two nulls (whole sequences permuted; random directions with the states' covariance) at a false discovery rate "
            f"of {ALPHA:.0%} over all layers, and has the same sign in both halves of the documents.",
        ),
        (
            "p",
            f"n = {int(rows.n_seq.iloc[0])} held-out sequences of 32 tokens, one a document, which are the unit of every test; one "
            f"training seed ({args.seed}), so nothing here speaks for other seeds. "
            f"Preset {args.preset}, corpus {args.corpus}, gradient by {args.gradient}. {cost}.",
        ),
        ("h", "Model: masked-token denoising"),
        ("t", t["models"]),
        (
            "p",
            "The Energy Transformer is not expected to beat an ordinary transformer, and no parity is claimed. Collapse would show "
            "as few distinct decoded tokens or few unmasked tokens kept.",
        ),
        (
            "p",
            f"Invariants in float64: closed-form gradient against autograd {inv['grad_x_error']:.1e} at a scale of "
            f"{inv['grad_scale']:.1f}; energy change of a small step "
            f"{inv['energy_change']:.5f}, predicted {inv['predicted_change']:.5f}; largest step size of the grid at which no energy "
            f"rises {f['largest_step']:g} (descent uses {args.step_size:g}).",
        ),
        ("img", (folder / "energy_descent.png", "Energy along the descent, held-out sequences")),
        ("h", "Sparse autoencoders"),
        ("t", t["sae"]),
        ("p", sae_line(t["sae"])),
        ("h", "EFAS against its nulls"),
        ("t", upright(rows)),
        (
            "p",
            "rule_false_*: how many features the original's rule |EFAS| > 0.1 would pass if sequences were permuted, or if every "
            "feature were a random direction of the same firing rate. "
            "shuffled_pairing: f against the pull along another feature's direction. "
            "legacy: correlation with -np.gradient of the token energies over positions, which is no derivative in state space.",
        ),
        (
            "p",
            f"The same on an Energy Transformer that was never trained (own SAE, step {int(t['untrained'].layer.iloc[0])}): "
            f"{int(t['untrained'].aligned.iloc[0])} of {int(t['untrained'].eligible.iloc[0])} eligible features pass, median |EFAS| "
            f"{t['untrained'].median_abs_efas.iloc[0]:.3f}. What also appears there owes nothing to training.",
        ),
        (
            "img",
            (
                folder / "efas_distribution.png",
                "EFAS of the features, of permuted sequences and of random directions",
            ),
        ),
    ]
    concept, shift = "no eligible feature", "not enough data"
    if "predictors" in t:
        draw_predicted(t["predicted_actual"], t["predictors"], folder / "predicted_actual.png")
        draw_dose(t["clamps"], folder / "dose_response.png")
        concept = concept_line(t["concepts"])
        clearest = (
            t["concepts"].sort_values("auroc", ascending=False).groupby("token_class").head(3)
        )
        small = clearest[["p", "q"]].map(
            lambda p: p if p >= 1e-10 else "< 1e-10"
        )  # so far out the normal tail gives no digits
        clearest = clearest.assign(**small)
        dose = t["clamps"]
        own, random = (
            dose[(dose.arm == arm) & (dose.dose == dose.dose.max())]
            for arm in ("feature", "random direction")
        )
        gap = own.attractor_shift.reset_index(drop=True) - random.attractor_shift.reset_index(
            drop=True
        )
        mean, lo, hi = bootstrap_mean(gap, own.feature.reset_index(drop=True), args.seed)
        shift = (
            f"clamped at {dose.dose.max():g} x the mean activation: {own.attractor_shift.mean():.3f}, minus equal random "
            f"displacement {mean:.3f} [{lo:.3f}, {hi:.3f}] energy per token; flip rate {own.flip_rate.mean():.2f} against "
            f"{random.flip_rate.mean():.2f}"
        )
        f["shift"] = shift
        summary = dose.groupby(["arm", "aligned", "dose"], as_index=False)[
            ["attractor_shift", "flip_rate", "collateral", "g_change_others", "residual"]
        ].mean()
        out += [
            ("h", "Concepts"),
            ("p", concept + "."),
            ("t", clearest),
            ("h", "Interventions: predicted against actual"),
            ("t", t["predictors"]),
            (
                "p",
                "Spearman over features, interval by resampling sequences and features. Attribution, integrated gradients and "
                "magnitude are evaluated on the very tokens that are then intervened on; EFAS comes from the other half of the documents. "
                "random: a new predictor in every draw, so its interval is what chance gives.",
            ),
            (
                "img",
                (
                    folder / "predicted_actual.png",
                    "Predicted and actual energy change of partial and full ablation",
                ),
            ),
            ("h", "Interventions: persistent clamps"),
            ("t", summary),
            (
                "img",
                (
                    folder / "dose_response.png",
                    "Dose-response of clamps and of equal random displacements; band: 95 % over features",
                ),
            ),
        ]
    out += [
        ("h", "Attractors and basins"),
        (
            "p",
            "Held-out sequences with a fifth of the tokens masked, as in training; five starts under the same field.",
        ),
        ("t", t["attractors"]),
        ("t", t["basins"]),
        ("t", t["attractor_clusters"]),
        (
            "p",
            "Depths in the merge tree are upper bounds: the graph joins states by straight segments.",
        ),
        ("img", (folder / "basins.png", "Basin sizes and the merge tree of three sequences")),
        ("h", "Against the original's headlines"),
        ("t", against_original(rows, t["features"], concept, shift, cost)),
    ]
    return out


def run_all(args: Any, corpus: Corpus) -> tuple[LensResults, EnergyTransformer]:
    """Trains both models, compares them and analyses the Energy Transformer; prints progress."""
    print(
        f"corpus: {args.corpus}, {corpus.train.numel():,} training tokens, {len(corpus.test)} held-out documents",
        flush=True,
    )
    et = train_energy_transformer(corpus, args.train_steps, args.step_size, args.seed)
    models = compare_models(
        et,
        train_transformer(corpus, args.train_steps, args.seed),
        corpus,
        args.step_size,
        args.seed,
    )
    print(models.to_string(index=False, float_format="%.3f"), flush=True)
    res = analyse_energy_transformer(args, et, corpus)
    res.tables["models"] = models
    return res, et


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # type: ignore[union-attr]
    count, real = positive(int), positive(float)
    g = p.add_argument_group("inputs")
    g.add_argument(
        "--corpus",
        help="builtin (documentation of the installed packages), topics (Python's language reference), or a text file (blank lines "
        "end a document)",
    )
    g = p.add_argument_group("outputs")
    g.add_argument(
        "--save_dir", type=Path, default=Path("energy_lens_results"), help="output folder"
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="full",
        help="sizes; an explicit flag beats it, the defaults shown are the preset's",
    )
    g.add_argument(
        "--train_steps",
        type=count,
        help="optimiser steps of the Energy Transformer, 32 sequences each",
    )
    g.add_argument(
        "--step_size",
        type=real,
        default=0.5,
        help="alpha of the descent, state units per unit of dE/dg",
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--energy_layers", type=int, nargs="+", help="descent steps whose states are analysed"
    )
    g.add_argument(
        "--sequences",
        type=count,
        help="held-out sequences of 32 tokens, one a document: n of every statistic",
    )
    g.add_argument("--sae_dict_size", type=count, help="SAE latents")
    g.add_argument("--sae_tokens", type=count, help="tokens of the fixed batch that L-BFGS sees")
    g.add_argument("--sae_iterations", type=count, help="L-BFGS iterations (Adam: times 20 steps)")
    g.add_argument(
        "--sae_l1",
        type=real,
        default=0.6,
        help="weight of the L1 penalty, per unit of whitened activation",
    )
    g.add_argument("--optimiser", choices=["lbfgs", "adam"], default="lbfgs", help="of the SAE")
    g.add_argument(
        "--gradient",
        choices=["autograd", "finite_difference"],
        default="autograd",
        help="of the energy; the latter along the 16 most active features only, in minutes",
    )
    g.add_argument("--permutations", type=count, help="Monte Carlo permutations of sequences")
    g.add_argument("--directions", type=count, help="covariance-matched random directions")
    g.add_argument(
        "--intervened", type=count, help="features that are ablated, half of them aligned"
    )
    g.add_argument("--relaxed", type=count, help="sequences that are relaxed to their fixed points")
    g = p.add_argument_group("runtime")
    g.add_argument("--seed", type=int, default=42, help="seed of NumPy and torch")
    g.add_argument("--overwrite", action="store_true", help="replace existing output")
    g.add_argument(
        "--cache_dir",
        default=os.environ.get("JANUS_CACHE", "~/.cache/janus_arc"),
        help="folder of the text cache",
    )
    add_version_flag(p)
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=list(PRESETS), default="full")
    p.set_defaults(**PRESETS[preset.parse_known_args(argv)[0].preset])
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks; exits 2 with one line."""
    args.energy_layers = sorted(set(args.energy_layers))
    if not 0 <= args.energy_layers[0] <= args.energy_layers[-1] <= 30:
        p.error(
            f"--energy_layers {args.energy_layers} are descent steps: expected 0 to 30 (a fixed point has no gradient to align with)"
        )
    if args.sae_dict_size < 128:
        p.error(
            f"--sae_dict_size {args.sae_dict_size} is smaller than the state: expected at least 128 latents"
        )
    if args.sequences < 4 * MIN_SEQUENCES:
        p.error(
            f"not enough data: --sequences {args.sequences}, needed at least {4 * MIN_SEQUENCES}"
        )


# ----------------------------------------------------------------------------------- shared regions
# >>> shared: flags ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def positive(kind: type) -> Callable[[str], Any]:
    """argparse type: a finite int or float above zero."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not (number > 0 and math.isfinite(number)):
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
        return number

    parse.__name__ = f"positive {kind.__name__}"  # argparse names the type in its errors
    return parse


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --version: the installed release and the git commit."""
    try:
        release = version("janus-arc")
    except PackageNotFoundError:
        release = "not installed"
    # An installed copy has no repository, but its version ends in the commit: 0.1.dev7+g1a2b3c4
    commit = git("describe", "--always", "--dirty", "--abbrev=12") or release.partition("+g")[2]
    text = f"janus-arc {release}, commit {commit or 'unknown'}"
    parser.add_argument("--version", action="version", version=text)


# <<< shared: flags


# >>> shared: memory ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def keep_memory() -> None:
    """Linux with glibc: freed memory stays with the process.

    Else every large tensor is mapped anew, page by page, which takes a tenth of a step. Only for
    loops that allocate the same again and again: what is kept between large temporaries would pin
    them.
    """
    m_mmap_max = -4
    m_trim_threshold = -1
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


# <<< shared: memory


# >>> shared: files ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
class HandoffError(Exception):
    """A broken input or hand-off. The text is the one line that the user reads: fact, found,
    expected, command."""


def one_line_errors(work: Callable[[], int]) -> int:
    """Exit status of `work`; an expected failure is one line on stderr and status 1, no
    traceback."""
    try:
        return work()
    except HandoffError as e:
        text = str(e)
    except OSError as e:
        where = e.filename or "while writing"
        advice = "nothing that existed was changed: use a folder with room, and yours"
        text = f"{e.strerror or e}: {where}; {advice}"
    except (MemoryError, torch.OutOfMemoryError) as e:
        text = f"out of memory ({e}); use a smaller --batch_size"
    except KeyboardInterrupt:
        text = "interrupted"
    script = Path(work.__code__.co_filename).name
    print(f"{script}: error: {' '.join(text.split())}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); renames it to `path` if the block ends
    well, else removes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())  # the bytes are on the disk before the name is
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Writes `record` atomically as strict JSON: NaN and infinity become null, other types
    their text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if isinstance(value, str | int | float | None) else str(value)

    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(record), indent=1) + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hex digest of the file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def first_line(error: Exception, length: int) -> str:
    """The first line of an error's text, cut to `length` characters; its type where it has
    none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]


def git(*words: str) -> str:
    """What git says of the repository whose root holds this file; empty where there is none."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():  # a virtual environment may lie in another repository
        return ""
    command = ["git", "-C", str(here), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Script, argv, git commit (and whether the tree was dirty), versions and hardware."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    hardware = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {
        "script": Path(__file__).name,
        "argv": sys.argv,
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)},
        "versions": versions,
        "hardware": hardware,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@contextlib.contextmanager
def run_record(out_dir: str | Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Keeps <out_dir>/run.json: argv, resolved arguments, machine, start, end, exit status.

    Yields the record, for more facts.
    """
    path = Path(out_dir) / "run.json"
    record = {"arguments": vars(args), **provenance(), "end": None, "exit_status": None}
    write_json(path, record)
    try:
        yield record
        record["exit_status"] = record["exit_status"] or 0
    except BaseException:
        record["exit_status"] = 1
        raise
    finally:
        record["end"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with contextlib.suppress(OSError):  # a full disk must not hide the error on its way
            write_json(path, record)


def refuse_overwrite(paths: list[Path], overwrite: bool) -> None:
    """Raises HandoffError if one of `paths` exists, unless --overwrite was given."""
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        advice = "pass --overwrite to replace it, or name another place"
        raise HandoffError(f"{existing[0]} exists; {advice}")


def need_disk(folder: str | Path, n_bytes: float) -> None:
    """Creates `folder`; raises HandoffError if its disk has less than `n_bytes` free."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        needed = f"{folder} needs {n_bytes / 1e9:.3f} GB and its disk has {free / 1e9:.3f} GB free"
        raise HandoffError(f"{needed}; nothing was written")


# <<< shared: files


# >>> shared: builtin ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
# Import name -> distribution, of the packages whose documentation `builtin` reads.
BUILTIN_PACKAGES = {
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "seaborn": "seaborn",
    "torch": "torch",
    "transformers": "transformers",
    "datasets": "datasets",
    "sklearn": "scikit-learn",
}
BUILTIN_VERSION = 1  # raise it when the cleaning changes: it is part of the token cache's name


@functools.cache  # reading ten thousand files takes half a minute, and each split asks for it
def builtin_documents() -> dict[str, str]:
    """English prose that is already on the machine: {name: text}, in a fixed order.

    The language reference (pydoc_data.topics) and the documentation strings of the standard
    library and of BUILTIN_PACKAGES, one document a source file; paragraphs that are mostly
    letters, each kept once.
    """
    documents: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name, texts in documentation_strings().items():
        for paragraph in "\n\n".join(texts).split("\n\n"):
            paragraph = " ".join(paragraph.split())
            if is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                documents.setdefault(name, []).append(paragraph)
    return {name: "\n\n".join(paragraphs) for name, paragraphs in documents.items()}


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is long enough, no session of an interpreter, and mostly letters."""
    if len(paragraph) < 60 or ">>>" in paragraph:
        return False
    n_letters = sum(character.isalpha() or character == " " for character in paragraph)
    return n_letters > 0.8 * len(paragraph)


def documentation_strings() -> dict[str, list[str]]:
    """{name: texts} of the language reference, and of every source file that can be parsed."""
    topics = import_module("pydoc_data.topics").topics
    sources = {f"topics/{name}": [text] for name, text in sorted(topics.items())}
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for package in BUILTIN_PACKAGES:
        spec = find_spec(package)
        roots[package] = Path(spec.origin).parent  # type: ignore[union-attr, arg-type]
    files = []
    for package, root in roots.items():
        files += [(package, file) for file in sorted(root.rglob("*.py"))]

    left_out = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    gc.disable()  # else a third of the time goes into looking for garbage among the syntax trees
    for package, file in tqdm(files, desc="documentation strings", unit="file", disable=None):
        inner = file.relative_to(roots[package])
        if left_out & set(inner.parts):
            continue
        if package == "transformers" and inner.parts[0] == "models":  # the same text, 400 times
            continue
        with (
            contextlib.suppress(SyntaxError, ValueError, OSError),
            warnings.catch_warnings(action="ignore"),
        ):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
            docstrings = [ast.get_docstring(node) for node in nodes]
            sources[f"{package}/{inner.as_posix()}"] = [text for text in docstrings if text]
    gc.enable()
    return sources


# <<< shared: builtin


# >>> shared: pages ---- edit in hero_head_analysis.py, then: python tools/check_copies.py --fix
def render_page(template: str, **values: Any) -> str:
    """A self-contained HTML page: the template of the folder pages/ beside this script, filled with
    `values`, all of which are escaped. Raises HandoffError where that folder is missing."""
    import jinja2

    folder = Path(__file__).resolve().parent / "pages"
    if not (folder / template).is_file():
        script = Path(__file__).name
        raise HandoffError(f"no {template}: the page needs the folder pages/ beside {script}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not a gap in the page
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


# <<< shared: pages


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error of one line, 2 for a wrong command line."""
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

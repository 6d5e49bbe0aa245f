"""Energy-Lens on a small Energy Transformer: are sparse features aligned with the energy?

Question: does the alignment of a sparse feature with the gradient of an energy mean anything? An
Energy Transformer is trained by masked-token denoising, and sparse autoencoders (SAE) on its
states. For every feature k

    EFAS_k = Pearson(f_k, A_k),  A_k = -<dE/dx, d_k>    over tokens

with f_k the feature's activation and d_k its decoder direction (unit norm). EFAS > 0 is
amplification (the pull along d_k grows with f_k), EFAS < 0 restoring. It is not "the feature lowers
the energy", which is the attribution f*A. Two nulls, interventions and the attractors say what EFAS
is worth.

Reads   text: --corpus (`builtin`: documentation on this machine; `topics`; or a text file), plus
        templated lines
Writes  <save_dir>/research_report.md, .html (self-contained), raw_results.json, *.csv (tidy),
        *.png, run.json

Quick   python energy_lens_minimal.py --preset smoke
        (under 30 s on two CPU cores; too small for conclusions)
Full    python energy_lens_minimal.py
        (six CPU minutes and 2 GB; run.json keeps both)

Shapes  S sequences (one a held-out document), L tokens, D state, H heads, Z d_head, M memories,
        K SAE features, V vocabulary, P permutations or rows of a clamp, B bootstrap draws.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import gc
import hashlib
import html
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

# Before torch: a thread that waits for another leaves its core to whoever needs it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import sparse, stats
from torch import Tensor, nn
from tqdm import tqdm

UNK = 0
MASK = 1
TOKEN = re.compile(r"[a-z]+|\d+|[^\sa-z\d]")  # of lower-cased text
# The letters whose lower case would be two characters, or would be the k of another alphabet.
KEEPS_ITS_LENGTH = str.maketrans({"\u0130": "i\u0307", "\u212a": "K"})
# A feature is tested if it is active on 30 tokens in 10 sequences.
MIN_ACTIVE = 30
MIN_SEQUENCES = 10
RULE = 0.1  # the original study called a feature aligned when |EFAS| exceeded this
ALPHA = 0.05  # false discovery rate
COPY = 0.9  # features whose directions have a larger |cosine| count as copies of each other
N_BOOT = 200  # bootstrap draws of an interval
# A Monte Carlo p is counted. Beyond all draws it is read off a tail fitted to the outermost ones,
# and believed down to a tenth of what counting can give.
TAIL = 250  # outermost draws that a tail is fitted to; a tenth of all where that is less
REACH = 10  # the smallest p that can be counted, over the smallest that the tail may give
MIN_GROUPS = 8  # an interval over fewer clusters or sequences covers too little: none is given
LOOKED_AT = 20  # passing features that are looked at one by one, beside as many that do not pass
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
        directions=20_000,
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
        directions=1000,
        energy_layers=[1, 2],
        intervened=12,
        relaxed=4,
    ),
}


# -------------------------------------------------------------------------------- method: edit here
# What is varied most is a table: OPTIMISERS (of the SAE), CLASSES (concepts), PREDICTORS (of what
# an ablation does), INTERVENTIONS (clamps). An entry more appears in the CSVs and the report; a
# predictor gets a panel too where its entry says `drawn`.
#
# ---- the energy and its model ----
class EnergyTransformer(nn.Module):
    """An Energy Transformer (Hoover et al. 2023, arXiv 2302.07253) as a full hierarchical
    associative memory (HAM).

    State x [S, L, D], activation g = dL/dx = LayerNorm(x), input field b [S, L, D]. The energy of a
    sequence is

        E = sum_l <x_l, g_l> - L(x_l)                        neuron (Legendre) term, dE/dg = x
          - (1/beta) sum_{h, q} log sum_{k != q} exp(beta <Wq_h g_q, Wk_h g_k>)
                                                             attention: no token attends to itself
          - 1/2 sum_{l, m} relu(<Xi_m, g_l>)^2               Hopfield memories
          - sum_l <b_l, g_l>                                 input field

    The descent is x <- x - alpha v with v = dE/dg = x - b + d(E_att + E_hn)/dg. With J = dg/dx >= 0
    it follows that dE/dt = -v^T J v <= 0.
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
        self.emb = nn.Parameter(torch.randn(vocab, d) * 0.5)  # [V, D]
        self.pos = nn.Parameter(torch.randn(seq_len, d) * 0.1)  # [L, D]
        self.wq = nn.Parameter(torch.randn(heads, d_head, d) * 0.04)  # [H, Z, D]
        self.wk = nn.Parameter(torch.randn(heads, d_head, d) * 0.04)  # [H, Z, D]
        self.xi = nn.Parameter(torch.randn(d, memories) * 0.04)  # [D, M]
        self.gamma = nn.Parameter(torch.ones(()))  # one number, so that g is a gradient
        self.delta = nn.Parameter(torch.zeros(d))  # [D]
        self.bias = nn.Parameter(torch.zeros(vocab))  # [V]
        self.readout = nn.Parameter(torch.tensor(d**-0.5))
        self.beta = d_head**-0.5
        self.eps = 1e-5
        self.field_scale = 8.0  # the field must outweigh the synapses, else all inputs end alike

    def field(self, ids: Tensor) -> Tensor:
        """Token ids [S, L] -> input field b [S, L, D], which is also the start of the descent."""
        return self.field_scale * (F.embedding(ids, self.emb) + self.pos[: ids.shape[1]])

    def activation(self, x: Tensor) -> Tensor:
        """g = gamma (x - mean) / sqrt(var + eps) + delta of every token, [S, L, D]."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)  # [S, L, 1]
        return self.gamma * centred * (variance + self.eps).rsqrt() + self.delta

    def lagrangian(self, x: Tensor) -> Tensor:
        """L(x) [S, L], the potential whose gradient is the activation."""
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1) + self.eps).sqrt()  # [S, L]
        return x.shape[-1] * self.gamma * deviation + x @ self.delta

    def queries_and_keys(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Wq g and Wk g of every head, each [S, H, L, Z]."""
        queries = torch.einsum("sld,hzd->shlz", g, self.wq)  # [S, H, L, Z]
        keys = torch.einsum("sld,hzd->shlz", g, self.wk)  # [S, H, L, Z]
        return queries, keys

    def attention_scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """beta Q K^T [S, H, L, L], -inf where a token would attend to itself."""
        length = queries.shape[2]
        diagonal = torch.eye(length, dtype=torch.bool, device=queries.device)
        return (self.beta * queries @ keys.mT).masked_fill(diagonal, -torch.inf)

    def energy_terms(self, x: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Each term's share of every token, [S, L]; attention counts for its query.

        The shares are for plots. Derivatives are of the sum.
        """
        g = self.activation(x)
        neuron = (x * g).sum(-1) - self.lagrangian(x)
        queries, keys = self.queries_and_keys(g)  # [S, H, L, Z] each
        scores = self.attention_scores(queries, keys)  # [S, H, L, L]
        attention = -scores.logsumexp(-1).sum(1) / self.beta  # [S, L], keys, then heads summed
        hopfield = -0.5 * (g @ self.xi).relu().square().sum(-1)  # [S, L], memories summed
        field = -(b * g).sum(-1)
        return {"neuron": neuron, "attention": attention, "hopfield": hopfield, "field": field}

    def energy(self, x: Tensor, b: Tensor) -> Tensor:
        """Total energy of each sequence, [S]."""
        return torch.stack(list(self.energy_terms(x, b).values())).sum((0, 2))

    def token_energy(self, x: Tensor, b: Tensor) -> Tensor:
        """All terms' share of every token, [S, L]."""
        return torch.stack(list(self.energy_terms(x, b).values())).sum(0)

    def autograd_x(self, x: Tensor, b: Tensor) -> Tensor:
        """dE/dx [S, L, D] by differentiating the energy itself: the plain twin of grad_x."""
        with torch.enable_grad():
            state = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.energy(state, b).sum(), state)[0]

    def grad_g(self, x: Tensor, b: Tensor) -> Tensor:
        """v = dE/dg [S, L, D] in closed form: a token acts as query and, unlike in ordinary
        attention, as key."""
        g = self.activation(x)
        queries, keys = self.queries_and_keys(g)  # [S, H, L, Z] each
        weights = self.attention_scores(queries, keys).softmax(-1)  # [S, H, L, L]
        as_query = torch.einsum("shlz,hzd->sld", weights @ keys, self.wq)  # [S, L, D]
        as_key = torch.einsum("shlz,hzd->sld", weights.mT @ queries, self.wk)  # [S, L, D]
        attention = as_query + as_key
        return x - b - attention - (g @ self.xi).relu() @ self.xi.T

    def grad_x(self, x: Tensor, b: Tensor) -> Tensor:
        """dE/dx = J v [S, L, D] in closed form.

        J = (gamma / sigma)(I - 11^T/D - c c^T/D) with c = (x - mean) / sigma.
        """
        centred = x - x.mean(-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()  # [S, L, 1]
        c = centred / sigma  # [S, L, D]
        v = self.grad_g(x, b)  # [S, L, D]
        along_ones = v.mean(-1, keepdim=True)  # [S, L, 1]
        along_c = c * (c * v).mean(-1, keepdim=True)
        return self.gamma / sigma * (v - along_ones - along_c)

    def logits(self, x: Tensor) -> Tensor:
        """State [..., D] -> scores of the tokens [..., V]."""
        return self.activation(x) @ self.emb.T * self.readout + self.bias  # tied to the embedding


def descend(
    et: EnergyTransformer, ids: Tensor, steps: int, alpha: float
) -> tuple[Tensor, list[Tensor]]:
    """The field of the tokens [S, L], and the states x_0 = b, x_1 .. x_steps of the descent.

    The field and each state are [S, L, D].
    """
    b = et.field(ids)
    xs = [b]
    for _ in range(steps):
        xs.append(xs[-1] - alpha * et.grad_g(xs[-1], b))
    return b, xs


def mask_tokens(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hides 20 % of the tokens [S, L] -> masked ids, and which of them are to be predicted (not the
    unknown ones)."""
    hidden = torch.rand(ids.shape, generator=generator) < 0.2  # [S, L]
    return ids.masked_fill(hidden, MASK), hidden & (ids != UNK)


def train_denoiser(
    predict: Callable[[Tensor], Tensor],
    groups: list[dict],
    train: Tensor,
    steps: int,
    seed: int,
    name: str,
) -> None:
    """AdamW on the masked-token cross-entropy; predict(ids [S, L]) -> logits [S, L, V].

    The learning rate warms up over 30 steps, then falls linearly to 5 % of its peak.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = []
    for group in groups:
        parameters += group["params"]
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc=name, unit="step", disable=None):
        # Every group keeps its own peak.
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 30) * max(0.05, 1 - step / steps)
        # 32 windows, drawn with replacement; a fifth of their tokens is hidden.
        ids = train[torch.randint(len(train), (32,), generator=generator)]  # [32, L]
        seen, asked = mask_tokens(ids, generator)
        loss = F.cross_entropy(predict(seen)[asked], ids[asked])  # nats a hidden token
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    if not math.isfinite(loss.item()):
        advice = "use a smaller --step_size"
        raise HandoffError(f"{name}: the loss is {loss.item()} after {steps} steps; {advice}")


def untrained(corpus: Corpus, seed: int) -> EnergyTransformer:
    """The Energy Transformer as it starts. The mask token has no field, so that its context
    decides."""
    torch.manual_seed(seed)
    et = EnergyTransformer(len(corpus.vocab), corpus.train.shape[1])
    et.emb.data[MASK] = 0
    return et


def train_energy_transformer(
    corpus: Corpus, steps: int, alpha: float, seed: int
) -> EnergyTransformer:
    """Plain first-order training through 3 to 6 descent steps: the energy's gradient is closed
    form, so there is no double backward."""
    et = untrained(corpus, seed)
    rng = np.random.default_rng(seed)

    def predict(ids: Tensor) -> Tensor:
        # A random depth: the states must be good wherever the descent is read.
        _, xs = descend(et, ids, int(rng.integers(3, 7)), alpha)
        return et.logits(xs[-1])

    # The synaptic energies are of second degree in the weights: at the others' learning rate Adam
    # inflates them until every input shares one attractor. They get a fifth of it and more decay.
    synapses: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in et.named_parameters():
        group = synapses if name in ("wq", "wk", "xi") else others
        group.append(parameter)
    groups = [
        {"params": others, "lr": 5e-3, "weight_decay": 0.1},
        {"params": synapses, "lr": 1e-3, "weight_decay": 1.0},
    ]
    train_denoiser(predict, groups, corpus.train, steps, seed, "Energy Transformer")
    if et.gamma <= 0:
        found = f"training made gamma {et.gamma.item():.3f}"
        advice = "use a smaller --step_size"
        raise HandoffError(f"{found}: the activation is no longer monotone; {advice}")
    return et.requires_grad_(False)


def train_transformer(corpus: Corpus, steps: int, seed: int) -> Callable[[Tensor], Tensor]:
    """An ordinary two-layer transformer of the same width, on the same batches, for comparison."""
    torch.manual_seed(seed)
    d = 128  # the width of the Energy Transformer
    layer = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
    emb = nn.Embedding(len(corpus.vocab), d)
    pos = nn.Embedding(corpus.train.shape[1], d)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), False)

    def predict(ids: Tensor) -> Tensor:
        hidden = encoder(emb(ids) + pos.weight)  # [S, L, D]
        return hidden @ emb.weight.T / d**0.5  # [S, L, V]

    parameters = [*emb.parameters(), *pos.parameters(), *encoder.parameters()]
    groups = [{"params": parameters, "lr": 2e-3, "weight_decay": 0.02}]
    train_denoiser(predict, groups, corpus.train, steps, seed, "transformer")
    return predict


def unigram_logits(corpus: Corpus) -> Tensor:
    """Log frequency of every token in the training windows, [V]."""
    counts = torch.bincount(corpus.train.flatten(), minlength=len(corpus.vocab)) + 1.0
    # Never asked for: without their mass the baseline is as strong as it can be.
    counts[[UNK, MASK]] = 1e-3
    return (counts / counts.sum()).log()


@torch.no_grad()
def compare_models(
    et: EnergyTransformer,
    transformer: Callable[[Tensor], Tensor],
    corpus: Corpus,
    alpha: float,
    seed: int,
) -> pd.DataFrame:
    """Held-out masked cross-entropy (nats) and accuracy, a row a model; minus_unigram: its loss
    less that of unigram, with its interval over sequences.

    For the Energy Transformer also the signs of collapse: distinct decoded tokens, and the share of
    the unmasked tokens that are decoded as themselves.
    """
    ids = corpus.test[::3]  # [S', L]
    seen, asked = mask_tokens(ids, torch.Generator().manual_seed(seed))
    unmasked = ~asked & (seen != MASK)  # [S', L]
    _, xs = descend(et, seen, 100, alpha)
    rows = []

    sequence = asked.nonzero()[:, 0].numpy()  # [n_masked] of which sequence each asked token is
    nats_of_unigram: list[Tensor] = []  # of every model in fact: the first is unigram

    def add_row(model: str, logits: Tensor) -> None:
        """Logits [S', L, V], one model's at a time, for memory."""
        decoded = logits.argmax(-1)  # [S', L]
        nats = F.cross_entropy(logits[asked], ids[asked], reduction="none")  # [n_masked]
        nats_of_unigram.append(nats)  # the first model's stays the first
        difference = pd.Series((nats - nats_of_unigram[0]).double().numpy())
        apart = bootstrap_mean(difference, pd.Series(sequence))
        rows.append(
            {
                "model": model,
                "masked_nats": nats.mean().item(),
                "minus_unigram": apart.mean,
                "ci_lo": apart.lo,
                "ci_hi": apart.hi,
                "n_seq": len(np.unique(sequence)),
                "accuracy": (decoded == ids)[asked].float().mean().item(),
                "n_masked": int(asked.sum()),
                "distinct_decoded": len(decoded.unique()),
                "unmasked_kept": (decoded == seen)[unmasked].float().mean().item(),
            }
        )

    add_row("unigram", unigram_logits(corpus).expand(*seen.shape, -1))
    for steps in (4, 20, 100):
        add_row(f"Energy Transformer, {steps} steps", et.logits(xs[steps]))
    add_row("ordinary transformer, 2 layers", transformer(seen))
    return pd.DataFrame(rows)


def check_invariants(et: EnergyTransformer, ids: Tensor, alpha: float) -> dict[str, float]:
    """What must hold in float64: the largest errors of the closed forms against autograd, and dE of
    a small step beside -step v^T J v."""
    b = et.field(ids)
    x = b - alpha * et.grad_g(b, b)  # [S, L, D]
    auto = et.autograd_x(x, b)
    state = x.clone().requires_grad_()
    gradient_of_lagrangian = torch.autograd.grad(et.lagrangian(state).sum(), state)[0]
    v = et.grad_g(x, b)
    jv = et.grad_x(x, b)
    step = 1e-4  # small enough for first order, large enough for float64
    change = (et.energy(x - step * v, b) - et.energy(x, b)).sum()
    return {
        "grad_x_error": (jv - auto).abs().max().item(),
        "grad_scale": auto.abs().max().item(),
        "activation_error": (et.activation(x) - gradient_of_lagrangian).abs().max().item(),
        "energy_change": change.item(),
        "predicted_change": (-step * (v * jv).sum()).item(),
    }


@torch.no_grad()
def largest_step(et: EnergyTransformer, ids: Tensor) -> tuple[float, pd.DataFrame]:
    """The largest alpha of a grid at which no energy rises in 60 steps (float64), NaN if there is
    none; and the share of rising steps for each."""
    rows = []
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0):
        b, xs = descend(et, ids, 60, alpha)
        # Rising beyond rounding, 1e-9 of the energy, counts.
        energies = torch.stack([et.energy(x, b) for x in xs])  # [61, S]
        falling = energies.diff(dim=0) <= 1e-9 * energies[:-1].abs()
        rising = (~falling).double().mean().item()  # so a step to NaN counts as rising
        rows.append({"alpha": alpha, "rising": rising})
    table = pd.DataFrame(rows)
    none_so_far = (table.rising > 0).cumsum() == 0
    stable = table.alpha[none_so_far]
    return float(stable.max()) if len(stable) else math.nan, table


def descent_table(
    et: EnergyTransformer, ids: Tensor, alpha: float, steps: int = 60
) -> pd.DataFrame:
    """Energy per token and its terms along the descent: a row a (step, term), mean and 5-95 % range
    over sequences, of it and of its change since step 0."""
    b, xs = descend(et, ids, steps, alpha)
    rows = []
    at_start: dict[str, Tensor] = {}  # term -> [S]
    for step, x in enumerate(xs):
        # Means over tokens, so that sequences can be compared.
        terms = {term: share.mean(1) for term, share in et.energy_terms(x, b).items()}  # [S] each
        total = torch.stack(list(terms.values())).sum(0)
        for term, energies in {"total": total, **terms}.items():
            start = at_start.setdefault(term, energies)  # [S]
            change = energies - start
            rows.append(
                {
                    "step": step,
                    "term": term,
                    "mean": energies.mean().item(),
                    "q05": energies.quantile(0.05).item(),
                    "q95": energies.quantile(0.95).item(),
                    "change_q05": change.quantile(0.05).item(),
                    "change_q95": change.quantile(0.95).item(),
                    "n_seq": len(energies),
                }
            )
    return pd.DataFrame(rows)


# ---- the sparse autoencoder ----
@dataclass
class SAE:
    """f = relu((x - b_dec) @ w_enc + b_enc) [.., K], reconstruction b_dec + f @ w_dec, in raw state
    units."""

    w_enc: Tensor  # [D, K]
    b_enc: Tensor  # [K]
    w_dec: Tensor  # [K, D] the directions d_k, unit norm
    b_dec: Tensor  # [D]
    # A state further than this from b_dec is outside the dictionary ("massive activations"): f = 0.
    limit: float = math.inf

    def encode(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        """States [..., D] -> activations [..., K] of the chosen features, in state units."""
        f = ((x - self.b_dec) @ self.w_enc[:, features] + self.b_enc[features]).relu()  # [..., K]
        if math.isinf(self.limit):
            return f
        return f * self.covers(x)[..., None]

    def covers(self, x: Tensor) -> Tensor:
        """Which states [..., D] the dictionary applies to, [...] bool."""
        return (x - self.b_dec).norm(dim=-1) <= self.limit

    def score(self, x: Tensor) -> dict[str, float]:
        """x [N, D] -> fraction of variance unexplained, active latents a token, share of latents
        never active, share of tokens outside."""
        inside = self.covers(x)  # [N]
        covered = x[inside]
        f = self.encode(covered)  # [N', K]
        error = (covered - self.b_dec - f @ self.w_dec).square().sum()
        spread = (covered - covered.mean(0)).square().sum()
        return {
            "fvu": (error / spread).item(),
            "l0": (f > 0).sum(-1).float().mean().item(),
            "dead": (f <= 0).all(0).float().mean().item(),
            "outside": 1 - inside.float().mean().item(),
        }


def train_sae(
    x: Tensor, n_latents: int, l1: float, iterations: int, optimiser: str, seed: int
) -> SAE:
    """ReLU + L1 autoencoder of the states x [N, D]; `optimiser` is one of OPTIMISERS.

    Raises HandoffError for states that are not finite and for a dictionary smaller than the state.
    """
    d = x.shape[1]
    if not x.isfinite().all():
        n_bad = int((~x.isfinite()).any(1).sum())
        fact = f"{n_bad} of {len(x)} states hold NaN or infinity"
        raise HandoffError(f"{fact}, so no dictionary can be fitted on them")
    if n_latents < d:
        found = f"a dictionary of {n_latents} latents is smaller than the state ({d} dimensions)"
        raise HandoffError(f"{found}; use a larger --sae_dict_size")
    generator = torch.Generator().manual_seed(seed)

    # A few massive tokens would otherwise set the scale and be all of the loss.
    distance = (x - x.median(0).values).norm(dim=-1)  # [N]
    x = x[distance <= 5 * distance.median()]  # [N', D]
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt().clamp_min(1e-12)
    z = (x - mean) / scale  # [N', D] whitened: variance 1 on average over the dimensions

    # The dictionary starts at random tokens, the encoder as its transpose.
    tokens = z[start_tokens(len(z), n_latents, generator)]  # [K, D]
    atoms = tokens + 0.1 * torch.randn(n_latents, d, generator=generator)
    w_dec = F.normalize(atoms, dim=-1).requires_grad_()  # [K, D]
    w_enc = w_dec.detach().T.contiguous().clone().requires_grad_()  # [D, K]
    b_enc = torch.zeros(n_latents, requires_grad=True)  # [K]
    b_dec = torch.zeros(d, requires_grad=True)  # [D]
    sae = SAE(w_enc, b_enc, w_dec, b_dec)
    OPTIMISERS[optimiser](sae, z, l1, iterations, generator)

    # Fold the scale and the norms in, once, at the end: back to raw state units.
    norm = w_dec.detach().norm(dim=-1).clamp_min(1e-12)  # [K]
    centre = mean + scale * b_dec.detach()  # [D]
    return SAE(
        w_enc=w_enc.detach() * norm,
        b_enc=b_enc.detach() * norm * scale,
        w_dec=w_dec.detach() / norm[:, None],
        b_dec=centre,
        limit=5 * (x - centre).norm(dim=-1).median().item(),
    )


def start_tokens(n_tokens: int, n_latents: int, generator: torch.Generator) -> Tensor:
    """Which token each latent starts at, [K]: drawn without replacement, as two that start at the
    same one stay copies. With more latents than tokens, every token once before any again."""
    rounds = math.ceil(n_latents / n_tokens)
    orders = [torch.randperm(n_tokens, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:n_latents]


def sae_loss(sae: SAE, batch: Tensor, l1: float) -> Tensor:
    """Sum-of-squares error + l1 * sum_k f_k |d_k|, mean over the tokens of batch [n, D].

    The penalty carries |d_k|, so that the directions need no renormalising while they are fitted:
    that would invalidate the curvature pairs of L-BFGS.
    """
    f = ((batch - sae.b_dec) @ sae.w_enc + sae.b_enc).relu()  # [n, K]
    error = (batch - sae.b_dec - f @ sae.w_dec).square().sum()
    penalty = (f * sae.w_dec.norm(dim=-1)).sum()
    return (error + l1 * penalty) / len(batch)


def fit_lbfgs(sae: SAE, z: Tensor, l1: float, iterations: int, _generator: torch.Generator) -> None:
    """L-BFGS with strong Wolfe, in place. It needs a deterministic objective: all of z [N, D] is
    one fixed batch. The short history is for memory."""
    optimizer = torch.optim.LBFGS(
        [sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sae_loss(sae, z, l1)
        loss.backward()
        return loss

    optimizer.step(closure)


def fit_adam(sae: SAE, z: Tensor, l1: float, iterations: int, generator: torch.Generator) -> None:
    """Adam, in place: 20 steps an iteration, on 512 random tokens of z [N, D] each."""
    parameters = [sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec]
    optimizer = torch.optim.Adam(parameters, lr=2e-3, fused=True)
    size = min(512, len(z))
    for _ in range(20 * iterations):
        optimizer.zero_grad()
        batch = z[torch.randint(len(z), (size,), generator=generator)]  # [size, D]
        sae_loss(sae, batch, l1).backward()
        optimizer.step()


OPTIMISERS = {"lbfgs": fit_lbfgs, "adam": fit_adam}


TOKEN_DICTIONARY = "one atom a token id + position"


def token_dictionary(
    train_x: Tensor, train_ids: Tensor, x: Tensor, ids: Tensor, scored: Tensor
) -> float:
    """FVU of the trivial dictionary, one atom a token id plus one a position: train_x [n, L, D] ->
    its score on the tokens of x [S, L, D] that `scored` [S, L] bool names.

    To compare it with an SAE, give it the tokens that the SAE was fitted on and is scored on.
    """
    position = train_x.mean(0)  # [L, D] the atoms of the positions
    rest = (train_x - position).flatten(0, 1)  # [n L, D]
    flat_ids = train_ids.flatten()  # [n L]
    n_ids = int(max(flat_ids.max(), ids.max())) + 1
    total = torch.zeros(n_ids, x.shape[-1]).index_add_(0, flat_ids, rest)  # [V, D]
    count = torch.bincount(flat_ids, minlength=n_ids).clamp_min(1)[:, None]  # [V, 1]
    # The atom of a token is the mean of what its position leaves; of an unseen one it is zero.
    error = x - position - (total / count)[ids]  # [S, L, D]
    states = x[scored]  # [N, D]
    spread = (states - states.mean(0)).square().sum()
    return (error[scored].square().sum() / spread).item()


def dictionary_learning(train: Tensor, test: Tensor, l0: float, seed: int) -> dict[str, float]:
    """MiniBatchDictionaryLearning (256 atoms, OMP with the SAE's L0 rounded) of train [N, D]: its
    FVU on `test`."""
    n_active = max(1, round(l0))
    mean = train.mean(0)
    scale = train.std()
    model = import_module("sklearn.decomposition").MiniBatchDictionaryLearning(
        256,
        alpha=2,
        batch_size=256,
        max_iter=2,
        transform_algorithm="omp",
        transform_n_nonzero_coefs=n_active,
        random_state=seed,
    )
    with warnings.catch_warnings(action="ignore"):
        model.fit(((train - mean) / scale).numpy())
        code = model.transform(((test - mean) / scale).numpy())  # [N', 256]
    error = test - mean - torch.from_numpy(code @ model.components_).float() * scale
    fvu = (error.square().sum() / (test - mean).square().sum()).item()
    return {"fvu": fvu, "l0": n_active}


# ---- copies among the features: how many different ones a count is of ----
def copy_clusters(directions: Tensor) -> np.ndarray:
    """The cluster of each feature, numbered from 0, [K]: unit directions [K, D] are joined where
    their |cosine| exceeds COPY, and a cluster is a connected component (single linkage)."""
    n = len(directions)
    pairs = []
    for first in range(0, n, 1024):  # a part of all cosines at a time, for memory
        cosines = directions[first : first + 1024] @ directions.T  # [1024, K]
        joined = (cosines.abs() > COPY).nonzero().numpy()  # [n, 2]
        pairs.append(joined + [first, 0])
    row, column = np.concatenate(pairs).T
    graph = sparse.coo_array((np.ones(len(row)), (row, column)), shape=(n, n))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    return labels


def participation_ratio(directions: Tensor) -> float:
    """How many directions some unit directions [n, D] amount to: (sum of v)^2 / sum of v^2 over the
    eigenvalues v of their Gram matrix. n at right angles, 1 if all are parallel, 0 of none."""
    n = len(directions)
    if not n:
        return 0.0
    second_moment = directions.T.double() @ directions.double()  # [D, D], the same eigenvalues
    return n**2 / second_moment.square().sum().item()


def one_a_cluster_first(rows: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """`rows` in their order, but the first of every cluster before the second of any; clusters [K]
    are of all features."""
    own = pd.Series(clusters[rows])
    turn = own.groupby(own).cumcount().to_numpy()
    return rows[np.argsort(turn, kind="stable")]


# ---- EFAS and its two nulls ----
def feature_gradient(gx: Tensor, directions: Tensor) -> Tensor:
    """A = -<dE/dx, d_k>: gx [S, L, D], directions [K, D] in state units -> [S, L, K], energy units
    per state unit."""
    return -(gx @ directions.T)


def finite_difference(
    energy: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, h: float = 1e-5
) -> Tensor:
    """The plain twin of feature_gradient: central differences along each direction, one token at a
    time. energy(x [n, L, D]) -> [n]. Use float64."""
    pull = torch.empty(*x.shape[:2], len(directions), dtype=x.dtype)  # [S, L, K]
    step = h * x.norm(dim=-1).mean()
    for k, direction in enumerate(directions.to(x.dtype)):
        for l in range(x.shape[1]):
            # Forward and back, for all sequences at once.
            move = torch.zeros_like(x[0])  # [L, D]
            move[l] = step * direction
            pull[:, l, k] = -(energy(x + move) - energy(x - move)) / (2 * step)
    return pull


@dataclass
class SequenceSums:
    """What Pearson(f, A) needs of every sequence: sums over its tokens, each [S, K] float64."""

    n: Tensor  # of ones: the number of tokens
    f: Tensor  # of f
    a: Tensor  # of A
    ff: Tensor  # of f^2
    aa: Tensor  # of A^2
    fa: Tensor  # of f A


def sequence_sums(f: Tensor, a: Tensor) -> SequenceSums:
    """f, A [S, L, K] -> their sums over the tokens of every sequence."""
    f = f.double()
    a = a.double()
    return SequenceSums(
        n=torch.full_like(f[:, 0], f.shape[1]),
        f=f.sum(1),
        a=a.sum(1),
        ff=(f * f).sum(1),
        aa=(a * a).sum(1),
        fa=(f * a).sum(1),
    )


def pearson(sums: SequenceSums, weights: Tensor | None = None) -> Tensor:
    """Pearson(f, A) under sequence weights [B, S] (default: one row of ones) -> [B, K]; NaN where f
    or A is constant."""
    if weights is None:
        weights = torch.ones(1, len(sums.n), dtype=sums.n.dtype)
    n = weights @ sums.n  # [B, K]
    f = weights @ sums.f
    a = weights @ sums.a
    covariance = n * (weights @ sums.fa) - f * a
    variance_f = (n * (weights @ sums.ff) - f * f).clamp_min(0)
    variance_a = (n * (weights @ sums.aa) - a * a).clamp_min(0)
    r = covariance / (variance_f * variance_a).sqrt()
    return torch.where(r.isfinite(), r.clamp(-1, 1), torch.nan)


def efas(f: Tensor, a: Tensor) -> dict[str, Tensor]:
    """f >= 0 and A, both [S, L, K] -> per feature [K]: n_active (tokens), n_seq (sequences),
    eligible, efas, efas_on, attribution.

    efas_on: over active tokens only. attribution: mean of f*A over active tokens, energy units; > 0
    says that the feature's presence lowers the energy to first order. Features that are dead,
    constant or active too rarely are not eligible; theirs are NaN.
    """
    active = f > 0
    n_active = active.sum((0, 1))  # [K] tokens
    n_seq = active.any(1).sum(0)  # [K] sequences
    n_tokens = f.shape[0] * f.shape[1]
    eligible = (n_active >= MIN_ACTIVE) & (n_seq >= MIN_SEQUENCES) & (n_active < n_tokens)
    sums = sequence_sums(f, a)
    active_sums = sequence_sums(f, a * active)
    active_sums.n = active.sum(1).double()  # [S, K]; f and A are zero at the other tokens
    values = {
        "efas": pearson(sums)[0],
        "efas_on": pearson(active_sums)[0],
        "attribution": sums.fa.sum(0) / n_active,
    }
    eligible &= values["efas"].isfinite()
    found = {"n_active": n_active, "n_seq": n_seq, "eligible": eligible}
    for name, value in values.items():
        found[name] = value.masked_fill(~eligible, torch.nan)
    return found


# The first null, permuted sequences: is there any association, with the document as the unit? A
# topic that raises both f and A passes as well as a pull that follows f from token to token.
def permutations(strata: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """n permutations of the sequences within their strata [S], [n, S] int32."""
    orders = np.tile(np.arange(len(strata), dtype=np.int32), (n, 1))  # [n, S] in order
    for stratum in strata.unique():
        members = (strata == stratum).nonzero()[:, 0].numpy()
        orders[:, members] = rng.permuted(orders[:, members], axis=1)
    return torch.from_numpy(orders)


def rank_normal(a: Tensor) -> Tensor:
    """Ranks of each feature's A over all tokens, mapped to normal scores [S, L, K]: heavy tails
    would make the normal theory too liberal."""
    flat = a.reshape(-1, a.shape[-1])  # [S L, K]
    ranks = flat.argsort(0).argsort(0).double()  # 0 to S L - 1 in each column
    return torch.special.ndtri((ranks + 0.5) / len(flat)).reshape(a.shape).to(a.dtype)


def permuted_sums(f: Tensor, y: Tensor, perms: Tensor) -> Tensor:
    """T = sum f*y with the sequences of y in each permuted order: f, y [S, L, K], perms [P, S] ->
    [P, K]. The plain twin of seqperm_mc and of seqperm_moments."""
    return torch.stack([(f * y[order.long()]).sum((0, 1)) for order in perms])


def seqperm_mc(f: Tensor, y: Tensor, perms: Tensor, chunk: int = 32, block: int = 8) -> Tensor:
    """The sums T of permuted_sums, fast: f, y [S, L, K], perms [P, S] -> [P, K].

    T_p = sum_s M[s, perm_p(s)] with M_k = F_k Y_k^T [S, S]: one small matrix product a feature,
    then sums of gathered rows. Eight sequences and 32 features at a time keep the table in the
    cache: a fifth of the time of one big gather.
    """
    n_seq = len(f)
    n_features = f.shape[-1]
    sums = torch.zeros(len(perms), n_features)
    # Row of the pair (s, perm_p(s)) in a table of `block` sequences, [P, S].
    offset = torch.arange(n_seq, dtype=torch.int32) % block * n_seq
    row = (perms + offset).contiguous()
    # Features are independent of each other; sequences add up.
    for first in range(0, n_features, chunk):
        some = slice(first, first + chunk)
        f_some = f[..., some].permute(2, 0, 1).contiguous().float()  # [chunk, S, L]
        y_some = y[..., some].permute(2, 1, 0).contiguous().float()  # [chunk, L, S]
        pairs = (f_some @ y_some).permute(1, 2, 0).contiguous()  # [S, S, chunk]
        for s in range(0, n_seq, block):
            rows = row[:, s : s + block].contiguous()  # [P, block]
            table = pairs[s : s + block].flatten(0, 1)  # [block S, chunk]
            sums[:, some] += F.embedding_bag(rows, table, mode="sum")
    return sums


@dataclass
class Moments:
    """T = sum f*y of every feature, and its moments over all permutations of the sequences."""

    observed: Tensor  # [K] float64
    mean: Tensor  # [K] float64, exact
    var: Tensor  # [K] float64, exact

    def z_of(self, sums: Tensor) -> Tensor:
        """How far sums T [..., K] lie from their mean, in standard deviations."""
        return (sums - self.mean) / self.var.sqrt()


def seqperm_moments(f: Tensor, y: Tensor, strata: Tensor) -> Moments:
    """The moments of T when whole sequences of y are permuted within strata [S]; f, y [S, L, K].

    mean = sum_l S fbar_l ybar_l and var = <Fc^T Fc, Yc^T Yc>_F / (S - 1), Fc and Yc centred per
    position (Hoeffding 1951).
    """
    observed = (f.double() * y.double()).sum((0, 1))
    mean = torch.zeros(f.shape[-1]).double()
    var = torch.zeros(f.shape[-1]).double()
    for stratum in strata.unique():
        f_own = f[strata == stratum]  # [S', L, K]
        y_own = y[strata == stratum]
        n = len(f_own)
        # Any sequence of y meets any of f equally often.
        mean += n * (f_own.mean(0).double() * y_own.mean(0).double()).sum(0)
        if n > 1:
            f_centred = (f_own - f_own.mean(0)).permute(2, 1, 0)  # [K, L, S']
            y_centred = (y_own - y_own.mean(0)).permute(2, 1, 0)  # [K, L, S']
            f_gram = f_centred @ f_centred.mT  # [K, L, L]
            y_gram = y_centred @ y_centred.mT  # [K, L, L]
            var += (f_gram * y_gram).sum((1, 2), dtype=torch.float64) / (n - 1)
    return Moments(observed, mean, var)


# Beside it, signs flipped by document: is there an association of tokens within documents?
def within_documents(y: Tensor, strata: Tensor) -> Tensor:
    """y [S, L, K] less its mean over each document and, within strata [S], over each position."""
    rest = y - y.mean(1, keepdim=True)  # [S, L, K]
    for stratum in strata.unique():
        members = strata == stratum
        rest[members] -= rest[members].mean(0)
    return rest


def document_covariances(f: Tensor, y: Tensor, strata: Tensor) -> Tensor:
    """Of f and y [S, L, K] within each document: c [S, K] float64, scaled to sum c^2 = 1.

    Without association within documents each c is as likely as -c. Whatever a document shares, the
    size of its f and y included, is in |c|, which flipped signs leave as it is.
    """
    products = within_documents(f, strata) * within_documents(y, strata)  # [S, L, K]
    c = products.sum(1, dtype=torch.float64)  # [S, K]
    return c / c.square().sum(0).sqrt()


def signflip_p(c: Tensor) -> Tensor:
    """Two-sided p [K] of sum c, c [S, K] with sum c^2 = 1, among all flips of the signs: a
    saddlepoint approximation (Lugannani and Rice 1980).

    The normal tail would be too long where few documents count: n of them cannot lie further out
    than sqrt(n) standard deviations, nor reach a p below 2^(1 - n).
    """
    c = c.abs() * c.sum(0).sign() * c.sign()  # the sum is positive now
    total = c.sum(0)  # [K]
    size = c.abs()
    # The saddlepoint: sum |c| tanh(t |c|) = total. The left side is concave, so Newton climbs.
    t = total.clone()
    for _ in range(40):
        slope = (size / (t * size).cosh()).square().sum(0)
        t = t + (total - (size * (t * size).tanh()).sum(0)) / slope.clamp_min(1e-12)
    log_mean = (F.softplus(2 * t * size) - t * size - math.log(2)).sum(0)  # log cosh, summed
    w = (2 * (t * total - log_mean)).clamp_min(0).sqrt()
    u = t * (size / (t * size).cosh()).square().sum(0).sqrt()
    density = (-w.square() / 2).exp() / math.sqrt(2 * math.pi)
    p = 2 * (torch.special.ndtr(-w) + density * (1 / u - 1 / w))
    p = torch.where(w < 0.01, 2 * torch.special.ndtr(-total), p)  # 0/0 at the centre
    return torch.minimum(p, 2 * (-w.square() / 2).exp()).clamp(0, 1)  # Chernoff's bound holds


# The second null, random directions: is this dictionary special?
def random_directions(centred: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """n unit vectors with the covariance of centred states [N, D]: [n, D]."""
    covariance = centred.double().T @ centred.double()  # [D, D]
    variances, axes = torch.linalg.eigh(covariance)
    root = axes * variances.clamp_min(0).sqrt()  # [D, D] root @ root.T is the covariance
    noise = torch.from_numpy(rng.standard_normal((n, len(root)), dtype=np.float32))  # [n, D]
    return F.normalize(noise @ root.T.float(), dim=-1)


@dataclass
class DirectionNull:
    """EFAS of n random directions u ~ N(0, cov x), f = relu(<u, x> - threshold), decoder u, at
    thresholds that let each fire on a given number of tokens."""

    n_active: Tensor  # [R] int64, those numbers of tokens, ascending
    efas: Tensor  # [R, n]

    def at(self, n_active: Tensor) -> Tensor:
        """EFAS of the directions if they fired on n_active [K] tokens: [K, n]; between two numbers
        by the logarithm."""
        known = self.n_active.double().log()  # [R]
        wanted = n_active.double().log()  # [K]
        upper = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        lower = upper - 1
        share = (wanted - known[lower]) / (known[upper] - known[lower])
        share = share.clamp(0, 1).float()[:, None]  # [K, 1]
        return torch.lerp(self.efas[lower], self.efas[upper], share)


def firing_numbers(n_active: Tensor, n_tokens: int, n: int = 16) -> Tensor:
    """Up to n numbers of tokens, evenly spaced in the logarithm over those of the features: [R]."""
    lowest = min(int(n_active.min()), n_tokens - 2)
    highest = min(max(int(n_active.max()), lowest + 1), n_tokens - 1)
    return torch.logspace(math.log10(lowest), math.log10(highest), n).round().long().unique()


def direction_null(
    x: Tensor, gx: Tensor, inside: Tensor, n_active: Tensor, n: int, rng: np.random.Generator
) -> DirectionNull:
    """EFAS of n random directions at the firing rates of the features, which are active on n_active
    [K] of the tokens; x, gx [N, D]. Like the features, they fire on no token outside the dictionary
    (`inside` [N] is False)."""
    numbers = firing_numbers(n_active, int(inside.sum()))  # [R]
    centred = x - x[inside].mean(0)  # [N, D]
    centred_gx = gx - gx.mean(0)
    directions = random_directions(centred[inside], n, rng)  # [n, D]
    null = []
    for some in directions.split(200):  # 200 directions at a time, for memory
        projection = (some @ centred.T).masked_fill_(~inside, -torch.inf)  # [200, N]
        pull = -(some @ centred_gx.T)  # [200, N]
        null.append(direction_efas(projection, pull, numbers))
    return DirectionNull(numbers, torch.cat(null, dim=1).nan_to_num(0.0))


def direction_efas(projection: Tensor, pull: Tensor, numbers: Tensor) -> Tensor:
    """EFAS of directions that fire on so many tokens, `numbers` [R]: [R, n].

    projection <u, x> and pull, each [n, N]; the pull is centred over the tokens. Only the tokens
    above a threshold enter the sums of Pearson's formula: the rest have f = 0.
    """
    n_tokens = projection.shape[1]
    pull = F.normalize(pull, dim=1)
    top, tokens = projection.topk(int(numbers[-1]) + 1, dim=1)  # [n, most], falling
    top_pull = pull.gather(1, tokens)  # [n, most]
    found = []
    for number in numbers.tolist():
        f = top[:, :number] - top[:, number : number + 1]  # [n, number] above the next token
        squares = f.square().sum(1) - f.sum(1).square() / n_tokens  # of f less its mean
        found.append((f * top_pull[:, :number]).sum(1) / squares.sqrt())
    return torch.stack(found)


@dataclass
class Tail:
    """A generalised Pareto tail above a threshold (Pickands 1975), a row a null."""

    threshold: Tensor  # [K]
    scale: Tensor  # [K]
    shape: Tensor  # [K] near 0: exponential; above: heavier; below: bounded
    share: float  # of the draws, beyond the threshold

    def beyond(self, value: Tensor) -> Tensor:
        """P(draw >= value) [K]; meant for values above the threshold."""
        excess = (value - self.threshold).clamp_min(0) / self.scale
        return self.share * (1 + self.shape * excess).clamp_min(0).pow(-1 / self.shape)

    def quantile(self, p: float) -> Tensor:
        """The value that is reached with probability p, [K]: the inverse of `beyond`."""
        folds = math.log(self.share / p)
        return self.threshold + self.scale * (self.shape * folds).expm1() / self.shape


def tail_size(n: int) -> int:
    """How many of n draws a tail is fitted to."""
    return min(TAIL, n // 10)


def fit_tail(draws: Tensor) -> Tail:
    """The upper tail of draws [K, n] by probability-weighted moments (Hosking and Wallis 1987).

    The shape is taken two of its standard errors heavier than estimated: a tail that is too light
    by chance would find features by chance.
    """
    size = tail_size(draws.shape[1])
    outermost = draws.double().topk(size + 1, dim=1).values  # [K, size + 1], falling
    threshold = outermost[:, -1]
    excess = outermost[:, :-1] - threshold[:, None]  # [K, size]
    mean = excess.mean(1).clamp_min(1e-300)
    # E[excess x P(another is larger)]: of the largest, none is.
    share_above = torch.arange(size, dtype=torch.float64) / (size - 1)  # [size]
    weighted = (excess * share_above).mean(1)
    shape = 2 - mean / (mean - 2 * weighted).clamp_min(1e-300)
    error = 1.3 / math.sqrt(size)  # 1.15 at shape 0, 1.5 at 0.33
    shape = (shape + 2 * error).clamp(-0.5, 0.9)
    shape = torch.where(shape.abs() < 1e-6, 1e-6, shape)  # the exponential is the limit at 0
    return Tail(threshold, mean * (1 - shape), shape, size / draws.shape[1])


def has_tail(n: int) -> bool:
    """Whether n draws are enough to fit a tail to a tenth of them."""
    return tail_size(n) >= 100


def smallest_p(n: int) -> tuple[float, float]:
    """The smallest two-sided p that n draws give by counting, and with a fitted tail."""
    counted = 2 / (1 + n)
    fitted = counted / REACH if has_tail(n) else counted
    return counted, fitted


def one_sided_p(value: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """How often draws [K, n] reach value [K], by counting; and the same with a tail where none
    does. [K] each."""
    n = draws.shape[1]
    n_beyond = (draws >= value[:, None]).sum(1)  # [K]
    counted = (1 + n_beyond.double()) / (1 + n)
    if not has_tail(n):
        return counted, counted
    fitted = fit_tail(draws).beyond(value).clamp_min(smallest_p(n)[1] / 2)
    return counted, torch.where(n_beyond == 0, torch.minimum(fitted, counted), counted)


def direction_p(r: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Two-sided p of EFAS r [K] among that of random directions, own [K, n]: by counting, and with
    a fitted tail."""
    above = one_sided_p(r, own)
    below = one_sided_p(-r, -own)
    counted = 2 * torch.minimum(above[0], below[0])
    fitted = 2 * torch.minimum(above[1], below[1])
    return counted.clamp(max=1), fitted.clamp(max=1)


def mi_binned(f: Tensor, score: Tensor, bins: int = 8) -> tuple[Tensor, Tensor]:
    """Mutual information (nats) of f in {0, low, high} and the octile of A, Miller-Madow corrected,
    and the entropy of f's bins; f and A's normal scores [N, K] -> [K] each."""
    n, n_features = f.shape
    median_of_active = torch.where(f > 0, f, torch.nan).nanmedian(0).values  # [K]
    f_bin = (f > 0).long() + (f > median_of_active)  # [N, K] 0, 1, 2
    a_bin = (torch.special.ndtr(score.double()) * bins).clamp(0, bins - 1).long()  # [N, K]
    # One count of all cells of all features: 3 x bins each.
    bin_of_feature = f_bin * bins + a_bin + 3 * bins * torch.arange(n_features)  # [N, K]
    counts = torch.bincount(bin_of_feature.flatten(), minlength=3 * bins * n_features)
    joint = counts.reshape(-1, 3, bins).permute(1, 2, 0).double() / n  # [3, bins, K]

    def entropy(p: Tensor) -> Tensor:
        """Of p [bins, K], with the Miller-Madow correction for the bins in use."""
        return -torch.special.xlogy(p, p).sum(0) + ((p > 0).sum(0) - 1) / (2 * n)

    entropy_f = entropy(joint.sum(1))
    information = entropy_f + entropy(joint.sum(0)) - entropy(joint.flatten(0, 1))
    return information, entropy_f


def fdr(p: np.ndarray, method: str = "bh") -> np.ndarray:
    """Adjusted p-values of the finite entries; the others stay NaN: dead features are dropped from
    the family, not filled with 1."""
    q = np.full(len(p), np.nan)
    finite = np.isfinite(p)
    if finite.any():
        q[finite] = stats.false_discovery_control(p[finite], method=method)
    return q


def fewest_findable(smallest: float, family: int) -> int:
    """How many of a family of tests must share the smallest possible p before Benjamini and
    Hochberg pass any of them."""
    return math.floor(smallest * family / ALPHA) + 1


# EFAS of a layer, and what both nulls say of it.
@dataclass
class Layer:
    """EFAS of one layer (or descent step)."""

    features: pd.DataFrame  # a row a feature
    null: Tensor  # [8, n] EFAS of random directions, firing like eight eighths of the features
    facts: dict[str, Any]  # scalars of the layer
    boot: np.ndarray  # [B, K'] EFAS of the eligible features under the sequence bootstrap
    directions: Tensor  # [K', D] of the eligible features, unit norm


def bootstrap_counts(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n units is drawn when n are drawn with replacement, [draws, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), draws)


def cluster_counts(clusters: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each feature is drawn when whole clusters of copies are drawn with replacement:
    clusters [K] -> [draws, K]. Copies are no independent features."""
    names, own = np.unique(clusters, return_inverse=True)  # own [K]
    return bootstrap_counts(len(names), draws, rng)[:, own]


@dataclass
class Resampling:
    """How the sequences of a layer are permuted and weighted, for all features alike."""

    strata: Tensor  # [S] permutations stay within one
    perms: Tensor  # [P, S] int32
    weights: Tensor  # [2 + B, S] float64: discovery half, replication half, bootstrap counts


def resample(strata: Tensor, n_permutations: int, rng: np.random.Generator) -> Resampling:
    """Permutations, halves and bootstrap of the sequences, which are in random order."""
    n_seq = len(strata)
    perms = permutations(strata, n_permutations, rng)
    halves = torch.zeros(2, n_seq, dtype=torch.float64)
    halves[0, ::2] = 1  # discovery
    halves[1, 1::2] = 1  # replication, and every intervention
    counts = bootstrap_counts(n_seq, N_BOOT, rng)  # [B, S]
    return Resampling(strata, perms, torch.cat([halves, torch.from_numpy(counts).double()]))


def discovery_statistics(f: Tensor, a: Tensor) -> dict[str, Tensor]:
    """What the predictors of an ablation may know of features: f, A [S/2, L, K] of the discovery
    half, of which nothing is intervened on -> per feature [K]; 0 of one that is silent there."""
    active = f > 0
    n_active = active.sum((0, 1))  # [K]
    sums = sequence_sums(f, a * active)
    sums.n = active.sum(1).double()  # [S/2, K]; f and A are zero at the other tokens
    return {
        "n_active_a": n_active,
        "efas_on_a": pearson(sums)[0].nan_to_num(0.0),
        "attribution_a": sums.fa.sum(0) / n_active.clamp_min(1),
        "magnitude_a": sums.ff.sum(0) / n_active.clamp_min(1),
    }


@dataclass
class FeatureStatistics:
    """What is known of some eligible features."""

    columns: dict[str, Tensor]  # name -> [K], in the order of the table
    boot: Tensor  # [B, K] EFAS under the sequence bootstrap
    max_z: Tensor  # [P] the largest |z| of any of them, by permutation


def feature_statistics(
    f: Tensor, a: Tensor, legacy: Tensor, draws: Resampling
) -> FeatureStatistics:
    """Both halves' EFAS, the token null and the mutual information of eligible features: f, A
    [S, L, K]; legacy [S, L] is what the original study correlated f with."""
    # The token null is tested on normal scores, whose moments are exact and whose tails are light.
    score = rank_normal(a)  # [S, L, K]
    null = seqperm_moments(f, score, draws.strata)
    z = null.z_of(null.observed)  # [K]
    z_permuted = null.z_of(seqperm_mc(f, score, draws.perms)).abs().float()  # [P, K]
    n_perms = len(draws.perms)
    covariances = document_covariances(f, score, draws.strata)  # [S, K]

    # The same moments of the raw A, in units of EFAS, are for the figure and the original's rule.
    raw = seqperm_moments(f, a, draws.strata)
    sd_f = f.std((0, 1), correction=0).double()  # [K]
    sd_a = a.std((0, 1), correction=0).double()  # [K]
    spread = sd_f * sd_a * (f.shape[0] * f.shape[1])
    product_of_means = f.double().sum((0, 1)) * a.double().mean((0, 1))

    # What else is known: the halves and bootstrap draws, f against another feature's direction
    # (`roll`), and the mutual information beside that of the first permutation.
    r = pearson(sequence_sums(f, a), draws.weights)  # [2 + B, K]
    shuffled = pearson(sequence_sums(f, a.roll(1, -1)))[0]
    flat_f = f.flatten(0, 1)  # [S L, K]
    information, entropy = mi_binned(flat_f, score.flatten(0, 1))
    discovery = draws.weights[0] > 0  # [S]
    permuted_score = rank_normal(a[draws.perms[0].long()])
    information_permuted, _ = mi_binned(flat_f, permuted_score.flatten(0, 1))
    columns = {
        "z_token": z,
        "p_token": 2 * torch.special.ndtr(-z.abs()),
        "p_mc": (1 + (z_permuted >= z.abs()).sum(0)) / (1 + n_perms),
        "null_mean": (raw.mean - product_of_means) / spread,
        "null_sd": raw.var.sqrt() / spread,
        "mc_sd_ratio": z_permuted.square().mean(0).sqrt(),
        "z_within": covariances.sum(0),
        "p_within": signflip_p(covariances),
        "efas_a": r[0],
        "efas_b": r[1],
        "efas_shuffled": shuffled,
        "legacy": pearson(sequence_sums(f, legacy[..., None].expand_as(f)))[0],
        "mi": information,
        "mi_share": information / entropy,
        "mi_permuted": information_permuted,
        **discovery_statistics(f[discovery], a[discovery]),
    }
    return FeatureStatistics(columns, r[2:], z_permuted.amax(1))


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

    x, gx = dE/dx [S, L, D] and e_token [S, L] (each token's energy, for the legacy score) over
    valid tokens only; strata [S]; args has permutations, directions and seed. slope(directions
    [k, D]) -> A [S, L, k] replaces the gradient; `features` limits the family.
    """
    rng = np.random.default_rng(args.seed)
    draws = resample(strata, args.permutations, rng)
    legacy = -torch.gradient(e_token, dim=1)[0]  # [S, L]
    if features is None:
        features = torch.arange(len(sae.b_enc))
    tables = []
    boots = []
    max_z = torch.zeros(args.permutations)
    # 256 features at a time, for memory; nothing but max_z joins them.
    for index in tqdm(features.split(256), desc=f"EFAS, layer {layer}", unit="chunk", disable=None):
        f = sae.encode(x, index)  # [S, L, 256]
        a = slope(sae.w_dec[index]).to(f.dtype) if slope else feature_gradient(gx, sae.w_dec[index])
        table = efas_table(index, f, a)
        eligible = np.flatnonzero(table.eligible)
        if len(eligible):
            f = f[..., eligible]  # [S, L, K'], in place of the larger one, for memory
            a = a[..., eligible]
            statistics = feature_statistics(f, a, legacy, draws)
            for name, value in statistics.columns.items():
                table.loc[eligible, name] = value.double().numpy()
            boots.append(statistics.boot.numpy())
            max_z = torch.maximum(max_z, statistics.max_z)
        tables.append(table)

    table = pd.concat(tables, ignore_index=True).assign(layer=layer)
    n_eligible = int(table.eligible.sum())
    facts: dict[str, Any] = {
        "layer": layer,
        "n_tokens": e_token.numel(),
        "n_seq": len(x),
        "latents": len(table),
        "eligible": n_eligible,
    }
    if not n_eligible:
        return Layer(table, torch.zeros(1, 0), facts, np.zeros((N_BOOT, 0)), sae.w_dec[:0])
    directions = sae.w_dec[torch.tensor(table.feature[table.eligible].to_numpy())]  # [K', D]
    table.loc[table.eligible, "cluster"] = copy_clusters(directions)
    table.loc[table.eligible, "p_maxt"] = familywise_p(table.z_token[table.eligible], max_z)
    null = compare_with_directions(table, x, gx, sae, args.directions, rng)
    facts |= layer_facts(table[table.eligible], null)
    return Layer(table, null, facts, np.concatenate(boots, axis=1), directions)


def efas_table(index: Tensor, f: Tensor, a: Tensor) -> pd.DataFrame:
    """What `efas` finds of f and A [S, L, K] of the features `index` [K], a row a feature."""
    mean_active = f.sum((0, 1)) / (f > 0).sum((0, 1))  # [K]
    columns = {"feature": index, **efas(f, a), "mean_active": mean_active}
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def familywise_p(z: pd.Series, max_z: Tensor) -> list[float]:
    """Westfall-Young p of every z: how often the largest |z| of all features reaches it, by
    permutation."""
    adjusted = []
    for value in z:
        n_reached = (max_z >= abs(value)).sum().item()
        adjusted.append((1 + n_reached) / (1 + len(max_z)))
    return adjusted


def compare_with_directions(
    table: pd.DataFrame, x: Tensor, gx: Tensor, sae: SAE, n: int, rng: np.random.Generator
) -> Tensor:
    """Adds what random directions say to the eligible rows of `table`. EFAS of the directions [8,
    n], firing like the features at the middle of each eighth of them."""
    eligible = table.eligible
    flat_x = x.flatten(0, 1)  # [N, D]
    n_active = torch.tensor(table.n_active[eligible].to_numpy())  # [K']
    r = torch.tensor(table.efas[eligible].to_numpy())
    null = direction_null(flat_x, gx.flatten(0, 1), sae.covers(flat_x), n_active, n, rng)
    columns = []
    # Each feature meets all n directions, which fire as often as it does; 128 features at a time.
    for r_some, n_some in zip(r.split(128), n_active.split(128), strict=True):
        own = null.at(n_some)  # [128, n]
        counted, fitted = direction_p(r_some, own)
        columns.append(
            {
                "p_direction": fitted,
                "p_direction_counted": counted,
                "z_direction": (r_some - own.mean(1)) / own.std(1),
                "rule_share_directions": (own.abs() > RULE).double().mean(1),
            }
        )
    for name in columns[0]:
        table.loc[eligible, name] = torch.cat([some[name] for some in columns]).numpy()
    middles = torch.arange(0.5, 8, dtype=torch.float64) / 8
    return null.at(n_active.double().quantile(middles))


def layer_facts(eligible: pd.DataFrame, null: Tensor) -> dict[str, Any]:
    """Scalars of a layer from the rows of its eligible features: what the original's rule passes
    and what it would pass of either null, and how EFAS replicates."""
    mean = eligible.null_mean.to_numpy()
    sd = eligible.null_sd.to_numpy()
    passes_above = stats.norm.sf((RULE - mean) / sd)
    passes_below = stats.norm.cdf((-RULE - mean) / sd)
    small_enough = null.numel() < 2**24  # for torch's quantile
    return {
        "directions": null.shape[1],
        "rule_passes": int((eligible.efas.abs() > RULE).sum()),
        "rule_false_permuted": float((passes_above + passes_below).sum()),
        "rule_false_directions": float(eligible.rule_share_directions.sum()),
        "random_directions_positive": float((null > 0).double().mean()),
        "random_directions_q95": float(null.abs().quantile(0.95)) if small_enough else math.nan,
        "shuffled_pairing_q95": float(eligible.efas_shuffled.abs().quantile(0.95)),
        "split_half_r": float(np.corrcoef(eligible.efas_a, eligible.efas_b)[0, 1]),
        "legacy_max": float(eligible.legacy.abs().max()),
        "mc_sd_over_analytic": float(eligible.mc_sd_ratio.median()),
    }


# fmt: off
TESTED_COLUMNS = (
    "z_token", "p_token", "p_mc", "p_maxt", "z_within", "p_within", "null_sd",
    "p_direction", "p_direction_counted", "z_direction", "efas_a", "efas_b", "mi", "legacy",
    "cluster",
)
# fmt: on


def call_aligned(layers: list[Layer]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One family over all layers -> every feature, with q-values and `aligned`; and a summary row a
    layer."""
    features = pd.concat([layer.features for layer in layers], ignore_index=True)
    nothing = pd.Series(np.nan, features.index)
    for name in TESTED_COLUMNS:  # where no layer has an eligible feature, nothing was tested
        features[name] = features.get(name, nothing).astype(float)
    # One family: the false discovery rate is that of all layers together.
    features["q_token"] = fdr(features.p_token.to_numpy())
    features["q_token_by"] = fdr(features.p_token.to_numpy(), "by")
    features["q_within"] = fdr(features.p_within.to_numpy())
    features["q_direction"] = fdr(features.p_direction.to_numpy())
    features["q_direction_counted"] = fdr(features.p_direction_counted.to_numpy())
    features["replicates"] = np.sign(features.efas_a) == np.sign(features.efas_b)
    associated = (features.q_token < ALPHA) & features.replicates & features.eligible
    features["aligned"] = associated & (features.q_direction < ALPHA)
    features["aligned_counted"] = associated & (features.q_direction_counted < ALPHA)
    family = int(features.p_direction.notna().sum())
    rows = []
    for layer in layers:
        own = features[(features.layer == layer.facts["layer"]) & features.eligible]
        row = layer.facts | summarise(own, layer)
        if len(own):
            row |= least_found(own, layer.null, family)
        rows.append(row)
    return features, pd.DataFrame(rows)


def least_found(own: pd.DataFrame, null: Tensor, family: int) -> dict[str, Any]:
    """What the tests that follow from a layer's nulls could have found at least: its eligible
    features are `own`, its directions `null` [8, n], the family that of all layers."""
    counted, fitted = smallest_p(null.shape[1])
    alone = ALPHA / family  # the p below which a feature passes though no other does
    below = torch.tensor([math.nan])
    above = torch.tensor([math.nan])
    if fitted < alone:
        below = -fit_tail(-null).quantile(alone / 2)  # [8]
        above = fit_tail(null).quantile(alone / 2)  # [8]
    z_alone = stats.norm.isf(alone / 2)
    return {
        "family": family,
        "smallest_p_counted": counted,
        "smallest_p": fitted,
        "fewest_counted": fewest_findable(counted, family),
        "fewest": fewest_findable(fitted, family),
        "efas_alone_below": below.median().item(),
        "efas_alone_above": above.median().item(),
        "efas_alone_permuted": z_alone * own.null_sd.median(),
        # All signs alike is one of 2^n cases, and so is all of them the other way.
        "within_too_few": int((2.0 ** (1 - own.n_seq) >= alone).sum()),
    }


def summarise(own: pd.DataFrame, layer: Layer) -> dict[str, Any]:
    """How many eligible features of a layer pass what, in how many clusters of copies; the median
    |EFAS| with its interval. `own`: their rows of the table."""
    passing = {
        "eligible": own.eligible,
        "rule_passes": own.efas.abs() > RULE,
        "token_null": own.q_token < ALPHA,
        "token_null_by": own.q_token_by < ALPHA,
        "token_null_maxt": own.p_maxt < ALPHA,
        "within_documents": own.q_within < ALPHA,
        "direction_null": own.q_direction < ALPHA,
        "direction_null_counted": own.q_direction_counted < ALPHA,
        "aligned": own.aligned,
        "aligned_counted": own.aligned_counted,
        "aligned_within": own.aligned & (own.q_within < ALPHA),
        "aligned_positive": own.aligned & (own.efas > 0),
    }
    found: dict[str, Any] = {}
    for name, passes in passing.items():
        found |= count_with_copies(name, passes.to_numpy(bool), own.cluster, layer.directions)
    return found | {
        "median_abs_efas": own.efas.abs().median(),
        **median_interval(layer.boot, own.efas, own.cluster),
        "median_mi_nats": own.mi.median(),
        "median_mi_permuted": own.mi_permuted.median() if len(own) else np.nan,
    }


def count_with_copies(
    name: str, passes: np.ndarray, clusters: pd.Series, directions: Tensor
) -> dict[str, Any]:
    """How many features pass [K' bool], how many clusters of copies they belong to, and the
    participation ratio of their directions [K', D]."""
    own = directions[torch.tensor(passes)]  # [n, D]
    return {
        name: int(passes.sum()),
        f"{name}_clusters": clusters[passes].nunique(),
        f"{name}_participation": participation_ratio(own),
    }


def median_interval(boot: np.ndarray, efas: pd.Series, clusters: pd.Series) -> dict[str, float]:
    """95 % interval of the median |EFAS| over features, resampling sequences (EFAS of each draw:
    `boot` [B, K']) and whole clusters of copies."""
    if clusters.nunique() < MIN_GROUPS:
        return {"median_ci_lo": math.nan, "median_ci_hi": math.nan}
    rng = np.random.default_rng(len(efas))
    times = cluster_counts(clusters.to_numpy(), len(boot), rng)  # [B, K'] int
    medians = []
    for sizes, n_times in zip(np.abs(boot), times, strict=True):
        medians.append(np.nanmedian(np.repeat(sizes, n_times)))
    # Resampling sequences adds noise, which raises |EFAS|: the interval is shifted back.
    shift = np.nanmedian(np.abs(boot), axis=1).mean() - efas.abs().median()
    lo, hi = np.quantile(medians, [0.025, 0.975]) - shift
    return {"median_ci_lo": lo, "median_ci_hi": hi}


# ---- attractors, basins, concepts ----
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
    """Descends each sequence until no token moves faster than `tol` (|v|, or its analogue under
    `hold`). Returns x* [S, L, D] and the residual speed [S].

    hold(x, i) is applied to the states of sequences i after every step: a persistent clamp.
    """
    x = x.clone()
    residual = torch.full((len(x),), math.inf, dtype=x.dtype)
    moving = torch.arange(len(x))  # the sequences that have not arrived
    for _ in range(max_steps):
        moved = x[moving] - alpha * et.grad_g(x[moving], b[moving])
        if hold:
            moved = hold(moved, moving)
        residual[moving] = (moved - x[moving]).norm(dim=-1).amax(1) / alpha
        x[moving] = moved
        moving = moving[residual[moving] > tol]
        if not len(moving):
            break
    return x, residual


def relative_distance(g: Tensor, g_star: Tensor) -> Tensor:
    """|g - g*| / |g*| of every sequence, [S]."""
    return (g - g_star).norm(dim=(1, 2)) / g_star.norm(dim=(1, 2))


@torch.no_grad()
def attractors(
    et: EnergyTransformer, b: Tensor, alpha: float, rng: np.random.Generator
) -> tuple[pd.DataFrame, Tensor]:
    """Fixed points from five starts under the same field b [S, L, D] -> a row a start, and x* from
    the own field.

    Relaxed in float32; the residual |v| is then measured in float64. converged: share of sequences
    with |v| <= 1e-3 at every token.
    """
    exact = copy.deepcopy(et).double()
    noise = torch.from_numpy(rng.standard_normal(b.shape)).to(b.dtype)
    starts = {
        "own field": b,
        "another sequence's field": b.roll(1, 0),
        "noise": noise * b.std(),
        "zero": torch.zeros_like(b),
        "twice the field": 2 * b,
    }
    every_start = torch.cat(list(starts.values()))  # [5 S, L, D]
    relaxed, _ = relax(et, every_start, b.repeat(len(starts), 1, 1), alpha, tol=5e-4)
    ends = dict(zip(starts, relaxed.split(len(b)), strict=True))
    star = ends["own field"]
    g_star = et.activation(star)
    decoded = et.logits(star).argmax(-1)  # [S, L]
    rows = []
    for name, x in ends.items():
        residual = exact.grad_g(x.double(), b.double()).norm(dim=-1).amax(1)  # [S]
        distance = relative_distance(et.activation(x), g_star)
        rows.append(
            {
                "start": name,
                "n_seq": len(x),
                "converged": (residual <= 1e-3).double().mean().item(),
                "max_residual": residual.max().item(),
                "energy_per_token": (et.energy(x, b) / x.shape[1]).mean().item(),
                "distance_from_own": distance.mean().item(),
                "max_distance": distance.max().item(),
                "decoded_differs": (et.logits(x).argmax(-1) != decoded).double().mean().item(),
            }
        )
    return pd.DataFrame(rows), star


@torch.no_grad()
def basins(
    et: EnergyTransformer,
    star: Tensor,
    b: Tensor,
    alpha: float,
    rng: np.random.Generator,
    draws: int = 2,
) -> pd.DataFrame:
    """How often x* + sigma |x*| noise relaxes back to within 1 % of g*: a row a sigma.

    At sigma 1 the noise is as long as the state; star, b [S, L, D].
    """
    g_star = et.activation(star)
    length = star.norm(dim=-1, keepdim=True)  # [S, L, 1]
    rows = []
    for sigma in tqdm((0.1, 0.25, 0.5, 1.0, 2.0), desc="basins", unit="sigma", disable=None):
        returned = []
        for _ in range(draws):
            direction = torch.from_numpy(rng.standard_normal(star.shape)).to(star.dtype)
            noise = F.normalize(direction, dim=-1) * length
            x, _ = relax(et, star + sigma * noise, b, alpha, tol=1e-2, max_steps=600)
            returned += (relative_distance(et.activation(x), g_star) < 0.01).tolist()
        n_back = sum(returned)
        interval = stats.binomtest(n_back, len(returned)).proportion_ci(method="wilson")
        rows.append(
            {
                "sigma": sigma,
                "returned": n_back / len(returned),
                "ci_lo": interval.low,
                "ci_hi": interval.high,
                "n": len(returned),
            }
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
    """H0 persistence of the sublevel sets of one sequence's energy: b [L, D] -> birth, death and
    depth (energy a token) of every component.

    Points: the descents from noisy starts. Edges: successive states, and nearest neighbours in g.
    An edge is as high as the higher of its ends and its midpoint, so that depths are upper bounds
    of what a finer path would find.
    """
    points = descent_points(et, b, alpha, rng, starts)  # [P, L, D]
    edges = neighbour_edges(et.activation(points).flatten(1), starts, neighbours)  # [n, 2]
    length = len(b)
    energy = et.energy(points, b.expand_as(points)) / length  # [P]
    midpoints = points[edges].mean(1)  # [n, L, D]
    midpoint_energy = et.energy(midpoints, b.expand_as(midpoints)) / length
    height = torch.maximum(energy[edges].amax(1), midpoint_energy)  # [n]
    tree = sublevel_components(energy, edges, height)
    tree["depth"] = tree.death - tree.birth
    return tree.query("depth > 1e-6").sort_values("depth", ascending=False)


def descent_points(
    et: EnergyTransformer, b: Tensor, alpha: float, rng: np.random.Generator, starts: int
) -> Tensor:
    """Eight states of each descent from b [L, D] plus noise of random strength: [8 starts, L, D],
    all starts of a step together."""
    strength = rng.uniform(0, 2, (starts, 1, 1))
    noise = torch.from_numpy(strength * rng.standard_normal((starts, *b.shape))).to(b.dtype)
    x = b + noise * b.std()  # [starts, L, D]
    points = []
    for step in range(201):
        if step in (1, 2, 4, 8, 16, 40, 100, 200):
            points.append(x)
        x = x - alpha * et.grad_g(x, b.expand_as(x))
    return torch.cat(points)


def neighbour_edges(g: Tensor, starts: int, neighbours: int) -> Tensor:
    """Pairs of points g [P, L D] that are successive states of a descent or near each other, each
    once: [n, 2]."""
    edges = {(i, i + starts) for i in range(len(g) - starts)}
    distance = torch.cdist(g, g)  # [P, P]
    nearest = distance.topk(neighbours + 1, largest=False).indices  # [P, neighbours + 1]
    for i, row in enumerate(nearest.tolist()):
        edges |= {(i, j) for j in row if j > i}
    return torch.tensor(sorted(edges))


def sublevel_components(energy: Tensor, edges: Tensor, height: Tensor) -> pd.DataFrame:
    """Birth and death of every connected component as the level rises over a graph: energy of its
    points [P], edges [n, 2], height of its edges [n]."""
    parent = list(range(len(energy)))  # union-find: points of a component share a root

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    rows = []
    for n in height.argsort().tolist():
        roots = [root(i) for i in edges[n].tolist()]
        older, younger = sorted(roots, key=lambda i: energy[i].item())
        if older != younger:  # the edge joins two components: the one with the higher minimum dies
            parent[younger] = older
            rows.append({"birth": energy[younger].item(), "death": height[n].item()})
    rows.append({"birth": energy.min().item(), "death": math.inf})
    return pd.DataFrame(rows)


# Concept classes: the form of a token, as it is written in the text, before it is lower-cased. A
# class more is an entry more. A token may belong to several classes; the clusters of attractors
# count it for the first, so that part of another class stands before it to be seen there. The
# model itself sees the lower-cased token only.
CLASSES = {
    "word": r"[A-Za-z]+",
    "number": r"\d+",
    "regex": r"[\\^$|?*+()\[\]{}]",
}


def class_members(ids: Tensor, written: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens belong to each class: ids and written forms [S, L] -> {class: [S, L] bool}. An
    unknown token, of whose form the model sees nothing, belongs to none."""
    known = (ids > MASK).numpy()
    members = {}
    for name, pattern in CLASSES.items():
        fits = [re.fullmatch(pattern, form) is not None for form in written.ravel()]
        members[name] = known & np.array(fits).reshape(written.shape)
    return members


def concept_features(
    f: Tensor,
    members: dict[str, np.ndarray],
    strata: Tensor,
    perms: Tensor,
    features: np.ndarray,
) -> pd.DataFrame:
    """f [S, L, K'] of eligible features and the members [S, L] of each class -> a row a (feature,
    class): AUROC, precision, lift over the base rate, p, q.

    p is counted over permuted sequences, perms [P, S], with a fitted tail: where feature and class
    are rare, sums are skewed, and a normal tail would call ten times too many significant.
    """
    names = ["feature", "token_class", "base_rate", "precision", "lift", "auroc", "p", "q"]
    ranks = stats.rankdata(f.flatten(0, 1).numpy(), axis=0)  # [S L, K']
    active = f > 0
    tables = []
    for name, member in members.items():
        n = member.sum()
        n_others = member.size - n
        if n == 0 or n_others == 0:
            continue
        inside = torch.from_numpy(member)[..., None]  # [S, L, 1]
        inside_all = inside.expand_as(f).float()  # [S, L, K']
        moments = seqperm_moments(f, inside_all, strata)
        z = moments.z_of(moments.observed)  # [K']
        z_permuted = moments.z_of(seqperm_mc(f, inside_all, perms)).T  # [K', P]
        p = one_sided_p(z - 1e-5, z_permuted)[1]  # [K'] a tie counts, however it was rounded
        precision = ((active & inside).sum((0, 1)) / active.sum((0, 1))).numpy()
        base_rate = n / member.size
        rank_sum = ranks[member.ravel()].sum(0)  # Mann and Whitney: AUROC from the ranks inside
        columns = {
            "feature": features,
            "token_class": name,
            "base_rate": base_rate,
            "precision": precision,
            "lift": precision / base_rate,
            "auroc": (rank_sum - n * (n + 1) / 2) / (n * n_others),
            "p": p.numpy(),
        }
        tables.append(pd.DataFrame(columns))
    if not tables:
        return pd.DataFrame(columns=names)
    table = pd.concat(tables, ignore_index=True)
    table["q"] = fdr(table.p.to_numpy())
    return table[names]


def attractor_clusters(
    et: EnergyTransformer, star: Tensor, b: Tensor, members: dict[str, np.ndarray], seed: int
) -> pd.DataFrame:
    """Adjusted mutual information of token clusters with token classes: attractors, against
    permuted labels and against the input itself. A token counts for its first class."""
    k_means = import_module("sklearn.cluster").KMeans
    adjusted_mi = import_module("sklearn.metrics").adjusted_mutual_info_score
    labels = np.select(list(members.values()), list(members), "other").ravel()  # [S L]
    rng = np.random.default_rng(seed)
    rows = []
    for name, states in {"attractor g*": star, "input field": b}.items():
        points = et.activation(states).flatten(0, 1).float().numpy()  # [S L, D]
        clusters = k_means(16, n_init=3, random_state=seed).fit_predict(points)
        permuted = [adjusted_mi(rng.permutation(labels), clusters) for _ in range(50)]
        rows.append(
            {
                "clusters_of": name,
                "ami": adjusted_mi(labels, clusters),
                "permuted_q95": np.quantile(permuted, 0.95),
                "n_tokens": labels.size,
            }
        )
    return pd.DataFrame(rows)


# ---- interventions ----
def matched_features(features: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Up to n eligible features of one layer: half aligned, of as many clusters of copies as there
    are, each with the unaligned one nearest in firing rate and mean activation."""
    # The unaligned features are used up: no two share a match.
    space = np.log(features[["n_active", "mean_active"]].to_numpy() + 1e-9)  # [K, 2]
    aligned = rng.permutation(np.flatnonzero(features.aligned))
    rest = list(np.flatnonzero(~features.aligned))
    half = list(one_a_cluster_first(aligned, features.cluster.to_numpy())[: n // 2])
    matches = []
    for i in half:
        if rest:
            distance = np.abs(space[rest] - space[i]).sum(1)
            matches.append(rest.pop(int(np.argmin(distance))))
    chosen = half + matches
    chosen += list(rng.permutation(rest)[: max(0, n - len(chosen))])
    return features.iloc[chosen]


@dataclass
class ActiveFeature:
    """One feature in some sequences where it is active: f = relu(<x, reads> + offset)."""

    sequences: Tensor  # [n] which ones
    x: Tensor  # [n, L, D] their states
    f: Tensor  # [n, L] its activation there
    direction: Tensor  # [D] d_k
    reads: Tensor  # [D]
    offset: Tensor  # []


def where_active(sae: SAE, feature: int, x: Tensor, n_seq: int) -> ActiveFeature:
    """The feature in up to `n_seq` sequences of x [S, L, D] that activate it; none may.

    Every feature has others, as far as there are: if all had the first ones, whatever is said of
    features would rest on a handful of documents.
    """
    f = sae.encode(x.float(), torch.tensor([feature]))[..., 0].to(x.dtype)  # [S, L]
    sequences = (f > 0).any(1).nonzero()[:, 0]  # all that activate it
    if len(sequences) > n_seq:
        sequences = sequences.roll(-feature * n_seq)[:n_seq]  # [n]
    reads = sae.w_enc[:, feature].to(x.dtype)  # [D]
    return ActiveFeature(
        sequences,
        x=x[sequences],
        f=f[sequences],
        direction=sae.w_dec[feature].to(x.dtype),
        reads=reads,
        offset=sae.b_enc[feature].to(x.dtype) - sae.b_dec.to(x.dtype) @ reads,
    )


@dataclass
class Ablation:
    """x <- x - eps f d of one feature in n sequences: what a predictor may know before it is
    done."""

    eps: float  # the dose; 1 removes the feature
    active: ActiveFeature  # its states x [n, L, D], activation f [n, L] and direction
    gradient: Tensor  # [n, L, D] dE/dx at x
    slope: Callable[[Tensor], Tensor]  # states [n, L, D] -> dE/dx there
    steps: int  # of the path that integrated gradients follow; 0: they are not computed


def attribution(ablation: Ablation) -> Tensor:
    """eps f A [n]: the change to first order."""
    pull = -(ablation.gradient @ ablation.active.direction)  # [n, L]
    return ablation.eps * (ablation.active.f * pull).sum(1)


def integrated_gradients(ablation: Ablation) -> Tensor | float:
    """The change as the integral of dE/dx along the straight path, midpoint rule, [n]."""
    active = ablation.active
    eps = ablation.eps
    move = active.f[..., None] * active.direction  # [n, L, D]
    total: Tensor | float = 0.0
    for step in range(ablation.steps):
        travelled = (step + 0.5) / ablation.steps  # share of the path
        slope = ablation.slope(active.x - travelled * eps * move)  # [n, L, D]
        total = total + (slope * -eps * move).sum((1, 2))
    return total / max(1, ablation.steps)


def activation(ablation: Ablation) -> Tensor:
    """f [n]."""
    return ablation.active.f.sum(1)


def squared_activation(ablation: Ablation) -> Tensor:
    """f^2 [n]: the baseline to beat."""
    return ablation.active.f.square().sum(1)


def discovery_efas(features: pd.DataFrame) -> pd.Series:
    """EFAS, [K]."""
    return features.efas_a


def discovery_attribution(features: pd.DataFrame) -> pd.Series:
    """Mean of f A over active tokens, [K]: attribution on the terms of EFAS."""
    return features.attribution_a


def discovery_active_efas(features: pd.DataFrame) -> pd.Series:
    """EFAS over active tokens, [K]."""
    return features.efas_on_a


def discovery_magnitude(features: pd.DataFrame) -> pd.Series:
    """Mean of f^2 over active tokens, [K]."""
    return features.magnitude_a


def discovery_frequency(features: pd.DataFrame) -> pd.Series:
    """How often the feature is active, [K]."""
    return features.n_active_a


def standard_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """What chance gives."""
    return rng.standard_normal(shape)


@dataclass
class Predictor:
    """Something that may predict the energy change of an ablation, per active token.

    The basis says what the function takes and gives:
        tokens   function(ablation) -> [n], summed over the tokens that are intervened on; the
                 caller divides by their number. They are those where f is above 0: what has no
                 factor f must be multiplied by (ablation.active.f > 0)
        feature  function(table of features) -> a column of it: what the discovery half of the
                 documents says, of which nothing is intervened on. Only these predict, and only
                 they compare on equal terms
        chance   function(rng, shape) -> random numbers, anew in every draw
    """

    formula: str  # the axis of its panel
    function: Callable[..., Any]
    basis: str
    signed: bool = True  # it may tell whether the energy rises or falls, not only by how much
    in_energy: bool = False  # the prediction is an energy: its slope is reported too
    scored: bool = True  # compared with the outcome, not only written to interventions.csv
    drawn: bool = False  # it gets a panel in predicted_actual.png
    column: str = ""  # its name in interventions.csv, where that is another

    def documents(self) -> str:
        """What it has seen: the tokens that are then intervened on, or other documents."""
        seen = {"tokens": "intervened tokens", "feature": "other half", "chance": "none"}
        return seen[self.basis]

    def scales(self) -> list[str]:
        """How it is compared with the outcome: by value, by size."""
        return ["signed", "absolute"] if self.signed else ["absolute"]


# A predictor more is a function and an entry more; the order is that of the tables.
PREDICTORS = {
    "efas_a": Predictor("EFAS, a correlation (other half)", discovery_efas, "feature", drawn=True),
    "attribution_a": Predictor(
        "attribution f A, energy (other half)", discovery_attribution, "feature", drawn=True
    ),
    "efas_on_a": Predictor("EFAS of active tokens (other half)", discovery_active_efas, "feature"),
    "magnitude_a": Predictor("mean f^2 (other half)", discovery_magnitude, "feature", signed=False),
    "frequency_a": Predictor(
        "active tokens (other half)", discovery_frequency, "feature", signed=False
    ),
    "attribution": Predictor(
        "attribution eps f A, energy (same tokens)",
        attribution,
        "tokens",
        in_energy=True,
        drawn=True,
    ),
    "integrated_gradients": Predictor(
        "integrated gradients, energy (same tokens)",
        integrated_gradients,
        "tokens",
        in_energy=True,
    ),
    "activation": Predictor("f", activation, "tokens", scored=False, column="f"),
    "magnitude": Predictor(
        "mean f^2 (same tokens)", squared_activation, "tokens", signed=False, column="f2"
    ),
    "random": Predictor("standard normal", standard_normal, "chance"),
}
REFERENCE = "efas_a"  # the predictor from which the differences of the others are reported
IDENTITIES = ("integrated_gradients",)  # equal to the change by construction: checks, not drawn


def predictors_of(basis: str) -> dict[str, Predictor]:
    """Those of PREDICTORS that have this basis."""
    return {name: p for name, p in PREDICTORS.items() if p.basis == basis}


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
    """x <- x - eps f_k d_k at the tokens where f_k > 0 (the SAE's error is kept): predicted and
    actual change of energy, a row a (feature, eps, sequence), sums over the active tokens.

    energy(x, i) -> [n] and slope(x, i) = dE/dx take states of sequences i. x, gx [S, L, D]: the
    held-out half. `steps` of integrated gradients.
    """
    tables = []
    for k in tqdm(features.feature.tolist(), desc="ablations", unit="feature", disable=None):
        active = where_active(sae, k, x, n_seq)
        if not len(active.sequences):
            continue
        gradient = gx[active.sequences]  # [n, L, D]
        for table in ablate_feature(energy, slope, active, gradient, steps, doses):
            table.insert(0, "feature", k)
            tables.append(table)
    if not tables:
        return pd.DataFrame(columns=["feature", "eps", "sequence"])
    return pd.concat(tables, ignore_index=True)


def ablate_feature(
    energy: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor, Tensor], Tensor],
    active: ActiveFeature,
    gradient: Tensor,
    steps: int,
    doses: tuple[float, ...],
) -> list[pd.DataFrame]:
    """A table a dose of one feature, with a row a sequence; gradient [n, L, D] is dE/dx before."""
    sequences = active.sequences
    before = energy(active.x, sequences)  # [n]
    move = active.f[..., None] * active.direction  # [n, L, D]
    tables = []
    for eps in doses:
        change = energy(active.x - eps * move, sequences) - before  # [n] the outcome
        columns = {"eps": eps, "sequence": sequences, "energy_change": change}
        ablation = Ablation(eps, active, gradient, lambda y: slope(y, sequences), steps)
        for name, predictor in predictors_of("tokens").items():
            columns[predictor.column or name] = predictor.function(ablation)
        columns["n_active"] = (active.f > 0).sum(1)
        tables.append(pd.DataFrame(columns))
    return tables


@dataclass
class AblationEffects:
    """What ablations at one dose did and were predicted to do, per active token: with everything
    (row 0), then with each cluster of copies left out, then with each sequence left out."""

    numbers: np.ndarray  # [K] of the features
    clusters: np.ndarray  # [K] of each feature, numbered from 0 to C - 1
    n_clusters: int  # C
    n_seq: int  # S, of all features together
    means: dict[str, np.ndarray]  # name -> [1 + C + S, K]
    kept: np.ndarray  # [1 + C + S, K] bool: which features are not left out


def leave_out(effects: pd.DataFrame, clusters: pd.Series) -> AblationEffects:
    """What the jackknife needs of the ablations at one dose: rows that `ablate` gave, and feature
    -> its cluster of copies."""
    numbers = effects.feature.unique()
    sequences = effects.sequence.unique()
    row = pd.Index(numbers).get_indexer(effects.feature)
    column = pd.Index(sequences).get_indexer(effects.sequence)

    def sums(name: str) -> np.ndarray:
        """Over all sequences, then over all but each one."""
        by_sequence = np.zeros((len(numbers), len(sequences)))
        by_sequence[row, column] = effects[name]
        total = by_sequence.sum(1)  # [K]
        return np.vstack([total, total - by_sequence.T])  # [1 + S, K]

    columns = {"energy_change": "energy_change"}
    for name, predictor in predictors_of("tokens").items():
        columns[name] = predictor.column or name
    _, own = np.unique(clusters.loc[numbers], return_inverse=True)  # [K]
    n_clusters = own.max() + 1
    n_active = sums("n_active")
    means = {}
    for name, column_name in columns.items():
        mean = sums(column_name) / np.maximum(n_active, 1)
        # A feature that has no other sequence keeps its mean.
        mean = np.where(n_active > 0, mean, mean[:1])
        of_clusters = np.tile(mean[:1], (n_clusters, 1))  # these leave no sequence out
        means[name] = np.vstack([mean[:1], of_clusters, mean[1:]])
    kept = np.ones((1 + n_clusters + len(sequences), len(numbers)), dtype=bool)
    kept[1 : 1 + n_clusters] = own != np.arange(n_clusters)[:, None]
    return AblationEffects(numbers, own, n_clusters, len(sequences), means, kept)


def rank_correlation(predicted: np.ndarray, actual: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Spearman correlation of each row over the kept features; all [R, K] -> [R]."""
    found = []
    for x, y, own in zip(predicted, actual, kept, strict=True):
        x_ranks = stats.rankdata(x[own])
        y_ranks = stats.rankdata(y[own])
        x_ranks -= x_ranks.mean()
        y_ranks -= y_ranks.mean()
        spread = math.sqrt((x_ranks @ x_ranks) * (y_ranks @ y_ranks))
        found.append(x_ranks @ y_ranks / spread if spread else 0.0)  # one value says nothing
    return np.array(found)


@dataclass
class Correlations:
    """Spearman correlations of P predictions with the outcome, and their 95 % intervals."""

    rho: np.ndarray  # [P]
    lo: np.ndarray  # [P]
    hi: np.ndarray  # [P]
    related: np.ndarray  # [P, P] how the errors of two estimates are correlated


def jackknife(rho: np.ndarray, effects: AblationEffects) -> Correlations:
    """Intervals of correlations [P, 1 + C + S], which leave out as `effects` does.

    Two jackknives, over clusters and over sequences, whose variances add up (no less than the
    truth); on the scale of Fisher's z, with t at C - 1 degrees of freedom. NaN for few of either.
    """
    # z has no end: a correlation of .9999 would seem as far from .99 as that from .5. So few ranks
    # do not tell such correlations apart: they are shrunk a little before, and stretched after.
    shrunk = 1 - 1 / len(effects.numbers)
    z = np.arctanh(rho * shrunk)  # [P, 1 + C + S]
    covariance = np.zeros((len(z), len(z)))
    for left_out in (z[:, 1 : 1 + effects.n_clusters], z[:, 1 + effects.n_clusters :]):
        n = left_out.shape[1]
        deviation = left_out - left_out.mean(1, keepdims=True)
        covariance += (n - 1) / n * deviation @ deviation.T
    error = np.sqrt(covariance.diagonal())  # [P]
    enough = min(effects.n_clusters, effects.n_seq) >= MIN_GROUPS
    width = stats.t.ppf(0.975, effects.n_clusters - 1) * error if enough else np.nan
    related = covariance / (np.outer(error, error) + 1e-300)
    lo = np.tanh(z[:, 0] - width) / shrunk
    hi = np.tanh(z[:, 0] + width) / shrunk
    return Correlations(rho[:, 0], lo.clip(-1, 1), hi.clip(-1, 1), related)


def difference_interval(found: Correlations, a: int, b: int) -> tuple[float, float, float]:
    """rho[a] - rho[b] with its 95 % interval, from the two intervals and how the errors go together
    (Zou 2007, "Toward using confidence intervals to compare correlations")."""
    if a == b:
        return 0.0, 0.0, 0.0
    difference = found.rho[a] - found.rho[b]
    together = found.related[a, b]

    def distance(of_a: float, of_b: float) -> float:
        square = of_a**2 + of_b**2 - 2 * together * of_a * of_b
        return math.sqrt(square) if square > 0 else 0 * square  # rounding; NaN stays NaN

    below = distance(found.rho[a] - found.lo[a], found.hi[b] - found.rho[b])
    above = distance(found.hi[a] - found.rho[a], found.rho[b] - found.lo[b])
    return difference, difference - below, difference + above


def score_predictions(
    predictions: dict[str, np.ndarray], effects: AblationEffects, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A row a (prediction, scale): how predictions [1 + C + S, K] rank the features beside their
    energy changes, and by how much better than REFERENCE does."""
    rows = []
    for scale in ("signed", "absolute"):
        names = [name for name in predictions if scale in PREDICTORS[name].scales()]
        actual = effects.means["energy_change"]
        size = np.abs if scale == "absolute" else np.asarray
        rho = []
        for name in names:
            rho.append(rank_correlation(size(predictions[name]), size(actual), effects.kept))
        found = jackknife(np.array(rho), effects)
        for name in predictors_of("chance"):
            set_to_chance(found, names.index(name), PREDICTORS[name], size(actual[0]), effects, rng)
        for i, name in enumerate(names):
            predictor = PREDICTORS[name]
            more, more_lo, more_hi = difference_interval(found, i, names.index(REFERENCE))
            row: dict[str, Any] = {"predictor": name}
            row |= {"documents": predictor.documents(), "scale": scale}
            row |= {"spearman": found.rho[i], "ci_lo": found.lo[i], "ci_hi": found.hi[i]}
            row |= {"minus_efas": more, "minus_efas_lo": more_lo, "minus_efas_hi": more_hi}
            row |= size_and_sign(predictor, scale, predictions[name][0], effects)
            row["n_features"] = len(effects.numbers)
            row["n_clusters"] = effects.n_clusters
            row["n_seq"] = effects.n_seq
            rows.append(row)
    return rows


def set_to_chance(
    found: Correlations,
    i: int,
    predictor: Predictor,
    actual: np.ndarray,
    effects: AblationEffects,
    rng: np.random.Generator,
) -> None:
    """Entry i becomes what chance gives: mean and 95 % range over many random predictors of the
    outcome `actual` [K]. Copies get one number, as any property of theirs would be alike."""
    by_cluster = predictor.function(rng, (1000, effects.n_clusters))
    random = by_cluster[:, effects.clusters]  # [1000, K]
    everywhere = np.ones(random.shape, dtype=bool)
    rho = rank_correlation(random, np.tile(actual, (1000, 1)), everywhere)
    found.rho[i] = rho.mean()
    found.lo[i], found.hi[i] = np.quantile(rho, [0.025, 0.975])
    found.related[i] = 0
    found.related[:, i] = 0


def size_and_sign(
    predictor: Predictor, scale: str, predicted: np.ndarray, effects: AblationEffects
) -> dict[str, float]:
    """The slope of the energy change on a prediction [K] that is an energy, and the share of
    features whose sign is right; NaN where neither makes sense."""
    actual = effects.means["energy_change"][0]
    slope = math.nan
    sign_agreement = math.nan
    if scale == "signed":
        sign_agreement = float(np.mean(np.sign(predicted) == np.sign(actual)))
        if predictor.in_energy and len(actual) > 3:
            slope = float(np.polyfit(predicted, actual, 1)[0])
    return {"slope": slope, "sign_agreement": sign_agreement}


def predict(
    effects: AblationEffects, features: pd.DataFrame, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Every prediction that is compared with the outcome: name -> [1 + C + S, K]; `features` holds
    the rows of effects.numbers."""
    shape = effects.kept.shape
    predictions = {}
    for name, predictor in PREDICTORS.items():
        if not predictor.scored:
            continue
        if predictor.basis == "tokens":
            predictions[name] = effects.means[name]
        elif predictor.basis == "feature":
            values = predictor.function(features).to_numpy(dtype=float)  # [K]
            values = np.nan_to_num(values)  # silent in that half: nothing is predicted
            predictions[name] = np.tile(values, (shape[0], 1))
        else:
            predictions[name] = predictor.function(rng, shape)
    return predictions


def predicted_versus_actual(
    effects: pd.DataFrame, features: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How each of PREDICTORS does at the energy change per active token: Spearman correlation over
    features, with intervals over sequences and clusters of copies; and the points of the figure."""
    rng = np.random.default_rng(seed)
    features = features.set_index("feature")
    scores = []
    points = []
    for eps, effects_at_dose in effects.groupby("eps"):
        measured = leave_out(effects_at_dose, features.cluster)
        own = features.loc[measured.numbers]  # a row a feature
        predictions = predict(measured, own, rng)
        for score in score_predictions(predictions, measured, rng):
            scores.append({"eps": eps, **score})

        change = measured.means["energy_change"][0]
        columns = {"feature": measured.numbers, "eps": eps, "energy_change": change}
        for name, predictor in predictors_of("tokens").items():
            if predictor.scored:
                columns[name] = predictions[name][0]
        for name, predictor in predictors_of("feature").items():
            columns[name] = predictor.function(own).to_numpy()
        columns["aligned"] = own.aligned.to_numpy()
        columns["cluster"] = own.cluster.to_numpy()
        for name in predictors_of("chance"):
            columns[name] = 0.0  # drawn anew every time: a feature has no value of its own
        points.append(pd.DataFrame(columns))
    return pd.DataFrame(scores), pd.concat(points, ignore_index=True) if points else pd.DataFrame()


@dataclass
class Clamp:
    """Holds a read-out of chosen tokens: x += mask (target - read(x)) d. Rows are sequences."""

    reads: Tensor  # [P, D] read(x) = <x, reads> + offset
    offset: Tensor  # [P]
    direction: Tensor  # [P, D] unit norm
    target: Tensor  # [P, L]
    mask: Tensor  # [P, L] bool
    rectified: Tensor  # [P] bool: the relu of that read-out, as of a feature

    def __call__(self, x: Tensor, i: Tensor) -> Tensor:
        """The states x [n, L, D] of rows i, moved to their targets."""
        linear = torch.einsum("pld,pd->pl", x, self.reads[i]) + self.offset[i, None]  # [n, L]
        read = torch.where(self.rectified[i, None], linear.relu(), linear)
        distance = (self.target[i] - read) * self.mask[i]  # [n, L]
        return x + distance[..., None] * self.direction[i, None]

    @classmethod
    def join(cls, clamps: list[Clamp]) -> Clamp:
        """One clamp with the rows of all."""
        joined = {}
        for column in dataclasses.fields(cls):
            joined[column.name] = torch.cat([getattr(clamp, column.name) for clamp in clamps])
        return cls(**joined)


def hold_feature(active: ActiveFeature, target: Tensor, _rng: np.random.Generator) -> Clamp:
    """Holds the activation at target [E, n, L], moving along the feature's direction; rows are
    (dose, sequence)."""
    n_doses = len(target)
    n_rows = n_doses * target.shape[1]
    return Clamp(
        reads=active.reads.expand(n_rows, -1),
        offset=active.offset.expand(n_rows),
        direction=active.direction.expand(n_rows, -1),
        target=target.flatten(0, 1),
        mask=(active.f > 0).repeat(n_doses, 1),
        rectified=torch.ones(n_rows, dtype=torch.bool),
    )


def hold_random_direction(active: ActiveFeature, target: Tensor, rng: np.random.Generator) -> Clamp:
    """Displaces the same tokens by as much, from f to target [E, n, L], along a random direction,
    another for each dose; rows are (dose, sequence)."""
    n_doses = len(target)
    noise = torch.from_numpy(rng.standard_normal((n_doses, active.x.shape[-1])))
    u = F.normalize(noise.to(active.x.dtype), dim=-1)  # [E, D]
    start = torch.einsum("nld,ed->enl", active.x, u)  # [E, n, L]
    direction = u.repeat_interleave(target.shape[1], 0)  # [E n, D]
    n_rows = len(direction)
    return Clamp(
        reads=direction,
        offset=torch.zeros(n_rows, dtype=active.x.dtype),
        direction=direction,
        target=(start + target - active.f).flatten(0, 1),
        mask=(active.f > 0).repeat(n_doses, 1),
        rectified=torch.zeros(n_rows, dtype=torch.bool),
    )


# A clamp more is a function and an entry more; the name is the `arm` of clamps.csv.
INTERVENTIONS = {"feature": hold_feature, "random direction": hold_random_direction}


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
    """Clamps one feature persistently at dose x its mean activation while the state relaxes -> a
    row a (feature, arm, dose, sequence) with its clamp_outcomes; the arms are INTERVENTIONS."""
    tables = []
    rows = list(features.itertuples())
    for feature in tqdm(rows, desc="clamps", unit="feature", disable=None):
        active = where_active(sae, feature.feature, x, n_seq)
        n = len(active.sequences)
        if not n:
            continue
        b_own = b[active.sequences]  # [n, L, D]
        # Where the states go without a clamp.
        free, _ = relax(et, active.x, b_own, alpha, max_steps=steps)

        # All arms and doses relax together: rows are (arm, dose, sequence).
        multiples = torch.tensor(doses, dtype=x.dtype)[:, None, None]  # [E, 1, 1]
        target = multiples * feature.mean_active * torch.ones_like(active.f)  # [E, n, L]
        clamp = Clamp.join([hold(active, target, rng) for hold in INTERVENTIONS.values()])
        copies = len(INTERVENTIONS) * len(doses)
        fields = b_own.repeat(copies, 1, 1)  # [P, L, D]
        start = clamp(active.x.repeat(copies, 1, 1), torch.arange(len(fields)))
        held, residual = relax(et, start, fields, alpha, max_steps=steps, hold=clamp)

        columns = {
            "feature": feature.feature,
            "aligned": feature.aligned,
            "cluster": feature.cluster,
            "efas": feature.efas,
            "arm": np.repeat(list(INTERVENTIONS), len(doses) * n),
            "dose": np.tile(np.repeat(doses, n), len(INTERVENTIONS)),
            "sequence": active.sequences.repeat(copies),
        }
        columns |= clamp_outcomes(et, free, held, residual, b_own, clamp.mask)
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def clamp_outcomes(
    et: EnergyTransformer, free: Tensor, held: Tensor, residual: Tensor, b: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """What a clamp did, [P] each: the clamped fixed points [P, L, D] beside the free ones
    [n, L, D], whose n sequences they hold again and again; b [n, L, D], mask [P, L].

    attractor_shift = [E(x*) - E(x*_free)] per clamped token, E being the unclamped energy; flips on
    the clamped tokens, collateral = flips on the others; g_change = |g - g_free| there.
    """
    copies = len(held) // len(free)
    n_held = mask.sum(1)  # [P]
    n_others = (~mask).sum(1).clamp_min(1)
    energy_held = et.energy(held, b.repeat(copies, 1, 1))  # [P]
    energy_free = et.energy(free, b).repeat(copies)  # [P]
    decoded_free = et.logits(free).argmax(-1).repeat(copies, 1)  # [P, L]
    flips = et.logits(held).argmax(-1) != decoded_free
    g_free = et.activation(free).repeat(copies, 1, 1)  # [P, L, D]
    moved = (et.activation(held) - g_free).norm(dim=-1)  # [P, L]
    return {
        "attractor_shift": (energy_held - energy_free) / n_held,
        "residual": residual,
        "flip_rate": (flips & mask).sum(1) / n_held,
        "collateral": (flips & ~mask).sum(1) / n_others,
        "g_change_others": (moved * ~mask).sum(1) / n_others,
    }


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    lo: float  # nan below MIN_GROUPS groups, infinite where nothing bounds it
    hi: float


def bootstrap_mean(values: pd.Series, groups: pd.Series) -> Interval:
    """Mean with its interval over whole groups (sequences, texts, clusters of features), which are
    what is independent."""
    by_group = values.groupby(groups.to_numpy()).agg(["sum", "count"])
    return bootstrap_ratio(by_group["sum"], by_group["count"])


def bootstrap_ratio(totals: pd.Series, counts: pd.Series) -> Interval:
    """Sum of `totals` over sum of `counts`, an entry a group [G], and its interval."""
    total = np.asarray(totals, dtype=float)
    count = np.asarray(counts, dtype=float)
    ratio = ratio_of_sums(total, count, MIN_GROUPS)
    return Interval(ratio.value, ratio.low, ratio.high)


# ---- the passing features, one by one: what they fire on, and what their ablation does ----
def passing_and_matched(features: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Up to n aligned features of all layers, of as many clusters of copies as there are, and for
    each one that is not, nearest in firing rate and mean activation. Their rows, with `group` and
    `pair`: pairs are of one layer.

    Where no feature is aligned, the strongest by |z_direction| stand in; `group` says so.
    """
    eligible = features[features.eligible].reset_index(drop=True)
    cluster = eligible.groupby(["layer", "cluster"]).ngroup().to_numpy()  # over all layers
    group = "aligned"
    candidates = rng.permutation(np.flatnonzero(eligible.aligned))
    if not len(candidates):
        group = "strongest"
        candidates = np.argsort(-eligible.z_direction.abs().to_numpy())
    picked = one_a_cluster_first(candidates, cluster)[:n]
    copies = np.isin(cluster, cluster[picked])  # no match is a copy of what it is matched with
    tables = []
    for layer, passing in eligible.loc[picked].groupby("layer"):
        others = eligible[(eligible.layer == layer) & ~eligible.aligned & ~copies]
        pool = pd.concat([passing.assign(aligned=True), others], ignore_index=True)
        both = matched_features(pool, 2 * len(passing), rng)
        n_matched = len(both) - len(passing)
        groups = [group] * len(passing) + ["matched"] * n_matched
        pairs = [*range(len(passing)), *range(n_matched)]
        tables.append(both.assign(group=groups, pair=pairs, aligned=np.equal(groups, "aligned")))
    return pd.concat(tables, ignore_index=True) if tables else eligible


Spell = Callable[[list[int]], list[str]]  # token ids -> text of each where it stands
# What would end the cell of a table becomes a sign that can be seen
LINE_ENDS = str.maketrans({"\n": "⏎", "\r": "␍", "\f": "␌", "\v": "␋", "\x85": "␤", "\u2028": "␤"})


def look_at(
    chosen: pd.DataFrame,
    f: Tensor,
    ids: Tensor,
    spell: Spell,
    effects: pd.DataFrame,
) -> pd.DataFrame:
    """A row a feature of `chosen` (of one layer): what it fires on, by its activation f [S, L, n]
    and the tokens ids [S, L]; and the energy change of its full ablation per active token, with an
    interval over sequences, from the rows that `ablate` gave."""
    rows = []
    for n, feature in enumerate(chosen.feature):
        own = effects[effects.feature == feature]  # a row a sequence
        change = bootstrap_ratio(own.energy_change, own.n_active)
        effect = {"energy_change": change.mean, "ci_lo": change.lo, "ci_hi": change.hi}
        effect["n_seq_ablated"] = len(own)
        rows.append(fired_on(f[..., n], ids, spell) | effect | contexts(f[..., n], ids, spell))
    names = "group pair layer feature cluster efas z_direction q_direction n_active n_seq"
    return pd.concat([chosen[names.split()].reset_index(drop=True), pd.DataFrame(rows)], axis=1)


def fired_on(f: Tensor, ids: Tensor, spell: Spell) -> dict[str, Any]:
    """Of the tokens ids [S, L] where f [S, L] is above 0: share of distinct ones, entropy (nats),
    and the commonest with its share. A feature that is one token has shares near 0 and 1."""
    tokens, counts = ids[f > 0].unique(return_counts=True)
    commonest = counts.argmax()
    return {
        "distinct_share": len(tokens) / counts.sum().item(),
        "token_entropy": float(stats.entropy(counts.numpy())),
        "top_token": spell([tokens[commonest].item()])[0].translate(LINE_ENDS),
        "top_token_share": (counts[commonest] / counts.sum()).item(),
    }


def contexts(f: Tensor, ids: Tensor, spell: Spell, n: int = 3, width: int = 8) -> dict[str, str]:
    """The n sequences where f [S, L] is largest: `width` tokens on both sides of its peak, which is
    marked."""
    shown = {}
    for rank, s in enumerate(f.amax(1).topk(n).indices.tolist(), 1):
        peak = int(f[s].argmax())
        texts = spell(ids[s].tolist())
        # Of several tokens that make one letter the last has it, and the others have no text
        end = next(place for place in range(peak, len(texts)) if texts[place])
        before = "".join(texts[max(0, peak - width) : peak])
        after = "".join(texts[end + 1 : end + 1 + width])
        text = f"{before}«{texts[end]}»{after}"
        shown[f"context_{rank}"] = text.translate(LINE_ENDS)
    return shown


# ---------------------------------------------------------------------------------------------- run
# ---- the corpus ----
def documents(corpus: str, cache_dir: str | Path) -> dict[str, str]:
    """{name: text}: `builtin` (cached: parsing costs 40 s), `topics` (the language reference in
    sections), or a file's paragraphs, which end at empty lines. A file of few and long ones is cut
    into documents of 2,000 characters."""
    if corpus == "topics":
        topics = import_module("pydoc_data.topics").topics
        sections = {}
        for name, text in sorted(topics.items()):
            words = text.split()
            for first in range(0, len(words), 150):
                sections[f"{name}/{first}"] = " ".join(words[first : first + 150])
        return sections
    if corpus != "builtin":
        try:
            content = "\n".join(read_lines(corpus))
        except (OSError, UnicodeDecodeError) as e:
            expected = "expected builtin, topics or a UTF-8 text file"
            raise HandoffError(f"--corpus {corpus} cannot be read ({e}); {expected}") from None
        paragraphs = re.split(r"\n(?:[ \t]*\n)+", content)
        if len(paragraphs) < 100:
            pieces = []
            for paragraph in paragraphs:
                pieces += cut(paragraph, 2000)
            paragraphs = pieces
        return {str(i): paragraph for i, paragraph in enumerate(paragraphs)}
    # What the text depends on is in the name of its cache.
    releases = [version(package) for package in BUILTIN_PACKAGES.values()]
    key = repr([BUILTIN_VERSION, platform.python_version(), releases])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    cache = Path(cache_dir).expanduser() / f"builtin-{digest}-documents.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(cache.read_text(encoding="utf-8"))
    texts = builtin_documents()
    write_json(cache, texts)
    return texts


def templated_documents(n: int, rng: np.random.Generator) -> dict[str, str]:
    """n documents of dates, e-mail addresses, regular expressions and sums: so that numbers and
    metacharacters are not rare."""
    names = ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi"]
    hosts = ["example", "mail", "lab", "home"]
    patterns = [r"\d+", r"[a-z]*", r"\w+@\w+", r"^a.b$", r"(x|y)?", r"[0-9]{2}"]

    def line() -> str:
        name = str(rng.choice(names))
        other = str(rng.choice(names))
        host = str(rng.choice(hosts))
        pattern = str(rng.choice(patterns))
        a = int(rng.integers(1, 20))
        b = int(rng.integers(1, 20))
        year = int(rng.integers(2000, 2030))
        month = int(rng.integers(1, 13))
        day = int(rng.integers(1, 29))
        kinds = (
            f"the date is {year}-{month:02d}-{day:02d} .",
            f"send a message to {name}.{other}@{host}.org .",
            f"the pattern {pattern} matches the string {name} .",
            f"the sum {a} + {b} = {a + b} .",
        )
        return kinds[rng.integers(len(kinds))]

    texts = {}
    for i in range(n):
        texts[f"templated/{i}"] = " ".join([line() for _ in range(8)])
    return texts


@dataclass
class Corpus:
    """Token windows, split by document. `test` has one window a document, so that sequences are
    independent units."""

    vocab: list[str]  # [V] lower-cased
    train: Tensor  # [n, L] int64
    test: Tensor  # [S, L] int64
    written: np.ndarray  # [S, L] the tokens of `test` as the text has them, before lower-casing
    strata: Tensor  # [S] 0 prose, 1 templated: permutations stay within one

    def encode(self, text: str) -> Tensor:
        """Any text -> token ids [l]."""
        index = {word: i for i, word in enumerate(self.vocab)}
        words = TOKEN.findall(text.lower())
        return torch.tensor([index.get(word, UNK) for word in words], dtype=torch.int64)

    def spell(self, ids: list[int]) -> list[str]:
        """Token ids -> text of each, with a space before it."""
        return [f" {self.vocab[i]}" for i in ids]


def written_tokens(text: str, n: int) -> list[str]:
    """The first n tokens of a text as they are written. They are found in the lower-cased text, at
    the same places."""
    text = text.translate(KEEPS_ITS_LENGTH)
    found = itertools.islice(TOKEN.finditer(text.lower()), n)
    return [text[match.start() : match.end()] for match in found]


def build_corpus(
    texts: dict[str, str], sequences: int, seed: int, vocab_size: int = 1000, length: int = 32
) -> Corpus:
    """Windows of `length` word, number or symbol tokens; a fifth of the documents, by the hash of
    their names, is held out.

    Raises HandoffError if fewer than `sequences` held-out documents are long enough.
    """
    made = templated_documents(max(200, len(texts) // 3), np.random.default_rng(seed))
    texts = texts | made
    words = {name: TOKEN.findall(text.lower()) for name, text in texts.items()}
    held_out = {name for name in words if is_held_out(name)}
    vocab = vocabulary([words[name] for name in words if name not in held_out], vocab_size)
    index = {word: i for i, word in enumerate(vocab)}

    train = []
    prose: list[tuple[np.ndarray, list[str]]] = []  # held-out windows: ids, written tokens
    templated: list[tuple[np.ndarray, list[str]]] = []
    for name, tokens in words.items():
        n_windows = len(tokens) // length
        ids = np.array([index.get(word, UNK) for word in tokens[: n_windows * length]], np.int64)
        windows = ids.reshape(n_windows, length)
        if name not in held_out:
            train.append(windows)
        elif n_windows:
            group = templated if name.startswith("templated/") else prose
            group.append((windows[0], written_tokens(texts[name], length)))
    n_templated = min(len(templated), sequences // 4)
    n_prose = sequences - n_templated
    if len(prose) < n_prose:
        found = f"{len(prose)} held-out documents of {length} tokens, needed {n_prose}"
        advice = "use a larger --corpus or fewer --sequences"
        raise HandoffError(f"not enough data: {found}; {advice}")

    rng = np.random.default_rng(seed)
    rows = [prose[i] for i in rng.permutation(len(prose))[:n_prose]]
    rows += [templated[i] for i in rng.permutation(len(templated))[:n_templated]]
    return Corpus(
        vocab,
        train=torch.from_numpy(np.concatenate(train)),
        test=torch.from_numpy(np.stack([ids for ids, _ in rows])),
        written=np.array([forms for _, forms in rows]),
        strata=torch.tensor([0] * n_prose + [1] * n_templated),
    )


def vocabulary(token_lists: list[list[str]], size: int) -> list[str]:
    """<unk>, <mask> and the most frequent tokens of some documents, [V]."""
    counts: Counter[str] = Counter()
    for tokens in token_lists:
        counts.update(tokens)
    return ["<unk>", "<mask>"] + [word for word, _ in counts.most_common(size - 2)]


def is_held_out(name: str) -> bool:
    """Whether the hash of a document's name falls into the held-out fifth."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 2


# ---- the analysis ----
@dataclass
class LensResults:
    """Everything that an analysis found: scalars, and tidy tables by name."""

    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict, repr=False)  # models, arguments; not saved

    def to_dataframe(self, name: str = "features") -> pd.DataFrame:
        """One of the tables; `features` has a row a (layer, feature)."""
        return self.tables[name]

    def to_json(self, path: str | Path | None = None) -> str:
        """Facts and tables as JSON; written to `path` if given."""
        tables = {}
        for name, table in self.tables.items():
            tables[name] = json.loads(table.to_json(orient="records"))
        record = {"model": self.model, "facts": self.facts, "tables": tables}
        if path:
            write_json(path, record)
        return json.dumps(record, default=str)


@dataclass
class Study:
    """A trained Energy Transformer, and what its analysis shares."""

    args: Any  # of the command line
    et: EnergyTransformer
    et64: EnergyTransformer  # the same in float64
    corpus: Corpus
    stable: float  # largest step at which no energy rises; NaN if there is none
    rng: np.random.Generator
    tables: dict[str, pd.DataFrame]  # those of the results

    def step_below(self, limit: float) -> float:
        """A step size at which no energy rises, at most `limit`; --step_size if there is none."""
        return min(limit, self.stable) if math.isfinite(self.stable) else self.args.step_size


@dataclass
class Descents:
    """States of the descent by step, of held-out and of training windows."""

    b: Tensor  # [S, L, D] field of the held-out windows
    xs: list[Tensor]  # step -> [S, L, D]
    fit_ids: Tensor  # [n, L] training windows that all dictionaries are fitted on
    fit_xs: dict[int, Tensor]  # analysed step -> [n, L, D]


@torch.no_grad()
def descend_corpus(study: Study) -> Descents:
    """Both sets of windows down to the last analysed step."""
    args = study.args
    last = args.energy_layers[-1]
    train = study.corpus.train
    n_windows = math.ceil(args.sae_tokens / train.shape[1])
    fit_ids = train[torch.from_numpy(study.rng.permutation(len(train))[:n_windows])]  # [n, L]
    b, xs = descend(study.et, study.corpus.test, last, args.step_size)
    batches: dict[int, list[Tensor]] = {step: [] for step in args.energy_layers}
    for ids in fit_ids.split(125):  # all at once could need a gigabyte
        _, states = descend(study.et, ids, last, args.step_size)
        for step in args.energy_layers:
            batches[step].append(states[step])
    fit_xs = {step: torch.cat(states) for step, states in batches.items()}
    return Descents(b, xs, fit_ids, fit_xs)


def middle_step(args: Any) -> int:
    """The analysed step whose features are named and intervened on."""
    return args.energy_layers[len(args.energy_layers) // 2]


def fit_sae(x: Tensor, args: Any) -> SAE:
    """An SAE of the tokens of states x [n, L, D], with the sizes of the command line."""
    tokens = x.flatten(0, 1)  # [N, D]
    return train_sae(
        tokens, args.sae_dict_size, args.sae_l1, args.sae_iterations, args.optimiser, args.seed
    )


def dictionary_rows(
    step: int, descents: Descents, sae: SAE, test_ids: Tensor, args: Any
) -> list[dict[str, Any]]:
    """How well the SAE and other dictionaries explain the states of a step: rows of sae.csv. The
    SAE and the token ids are fitted on the same tokens and scored on the same tokens."""
    x = descents.xs[step]  # [S, L, D]
    fit_x = descents.fit_xs[step]  # [n, L, D]
    n_tokens = descents.fit_ids.numel()
    score = sae.score(x.flatten(0, 1))
    trivial = token_dictionary(fit_x, descents.fit_ids, x, test_ids, sae.covers(x))
    rows = [
        dictionary_row(step, f"SAE, {args.optimiser}", n_tokens, **score),
        dictionary_row(step, TOKEN_DICTIONARY, n_tokens, fvu=trivial, l0=2.0),
    ]
    if step == middle_step(args):  # slow: at one step only, on a part of the tokens
        fit_tokens = fit_x.flatten(0, 1)[:2048]
        test_tokens = x[::10].flatten(0, 1)[:320]
        other = dictionary_learning(fit_tokens, test_tokens, score["l0"], args.seed)
        name = "MiniBatchDictionaryLearning, 256 atoms"
        rows.append(dictionary_row(step, name, len(fit_tokens), **other))
    return rows


def dictionary_row(layer: int, name: str, n_fit_tokens: int, **score: float) -> dict[str, Any]:
    """A row of sae.csv: which dictionary, on how many tokens it was fitted, and its score."""
    return {"layer": layer, "dictionary": name, "n_fit_tokens": n_fit_tokens, **score}


def efas_at(
    step: int, et: EnergyTransformer, x: Tensor, b: Tensor, sae: SAE, strata: Tensor, args: Any
) -> Layer:
    """EFAS of the SAE's features at a descent step, by the gradient that --gradient names; x, b
    [S, L, D]."""
    et64 = copy.deepcopy(et).double()
    gx = et.autograd_x(x, b)  # [S, L, D]
    slope = None
    features = None
    if args.gradient == "finite_difference":
        features = sae.encode(x).gt(0).sum((0, 1)).topk(16).indices

        def slope(directions: Tensor) -> Tensor:
            return finite_difference(lambda y: et64.energy(y, b.double()), x.double(), directions)

    layer = analyse_layer(step, x, gx, et.token_energy(x, b), sae, strata, args, slope, features)
    layer.facts["finite_difference_error"] = finite_difference_error(et64, x, b, sae, args.seed)
    return layer


def finite_difference_error(
    et64: EnergyTransformer, x: Tensor, b: Tensor, sae: SAE, seed: int
) -> float:
    """Largest error of the closed-form gradient along four features in two sequences, as a share of
    the largest gradient."""
    some = np.random.default_rng(seed).integers(0, len(sae.w_dec), 4)
    directions = sae.w_dec[torch.from_numpy(some)]  # [4, D]
    x = x[:2].double()  # [2, L, D]
    b = b[:2].double()
    difference = finite_difference(lambda y: et64.energy(y, b), x, directions)  # [2, L, 4]
    exact = feature_gradient(et64.grad_x(x, b), directions.double())
    return ((difference - exact).abs().max() / exact.abs().max()).item()


def untrained_control(fit_ids: Tensor, corpus: Corpus, args: Any) -> pd.DataFrame:
    """The same analysis, SAE included, of an Energy Transformer that was never trained: the summary
    row of the middle step."""
    step = middle_step(args)
    et = untrained(corpus, args.seed).requires_grad_(False)
    b, xs = descend(et, corpus.test, step, args.step_size)
    _, fit_xs = descend(et, fit_ids, step, args.step_size)
    sae = fit_sae(fit_xs[step], args)
    layer = efas_at(step, et, xs[step], b, sae, corpus.strata, args)
    _, summary = call_aligned([layer])
    return summary.assign(fvu=sae.score(xs[step].flatten(0, 1))["fvu"])


def analyse_features(study: Study, descents: Descents) -> dict[int, SAE]:
    """SAE and EFAS at every step, and of an untrained model: their tables, and the SAEs."""
    args = study.args
    corpus = study.corpus
    layers = []
    saes = {}
    quality = []
    for step in tqdm(args.energy_layers, desc="layers", disable=None):
        x = descents.xs[step]
        sae = fit_sae(descents.fit_xs[step], args)
        quality += dictionary_rows(step, descents, sae, corpus.test, args)
        layers.append(efas_at(step, study.et, x, descents.b, sae, corpus.strata, args))
        saes[step] = sae
    tables = study.tables
    tables["untrained"] = untrained_control(descents.fit_ids, corpus, args)
    tables["features"], tables["layers"] = call_aligned(layers)
    tables["sae"] = pd.DataFrame(quality)
    tables["efas_distribution"] = histogram_table(tables["features"], layers, args.seed)
    tables["z_distribution"] = z_table(tables["features"], layers)
    return saes


def eligible_at(study: Study, step: int) -> pd.DataFrame:
    """The eligible features of a step."""
    features = study.tables["features"]
    own = features[(features.layer == step) & features.eligible]
    return own.reset_index(drop=True)


def ablation_of(study: Study, x: Tensor, b: Tensor, sae: SAE) -> Callable[..., pd.DataFrame]:
    """`ablate` for states x with field b [S, L, D], in float64: it still takes the features."""
    x = x.double()
    b = b.double()
    return functools.partial(
        ablate,
        lambda y, i: study.et64.energy(y, b[i]),
        lambda y, i: study.et64.grad_x(y, b[i]),
        x,
        study.et64.grad_x(x, b),
        sae,
    )


def intervene(study: Study, x: Tensor, b: Tensor, sae: SAE) -> None:
    """Concepts of the features of the middle step, ablations and clamps; x, b [S, L, D]. No tables
    if no feature is eligible."""
    args = study.args
    corpus = study.corpus
    own = eligible_at(study, middle_step(args))
    if not len(own):
        return
    numbers = own.feature.to_numpy()
    members = class_members(corpus.test, corpus.written)
    f = sae.encode(x, torch.tensor(numbers))  # [S, L, K']
    perms = permutations(corpus.strata, args.permutations, np.random.default_rng(args.seed))
    concepts = concept_features(f, members, corpus.strata, perms, numbers)
    study.tables["concepts"] = concepts.merge(own[["feature", "cluster"]], how="left")

    chosen = matched_features(own, args.intervened, study.rng)
    held_out = torch.arange(1, len(x), 2)  # the half that the predictors have not seen
    x = x[held_out]
    b = b[held_out]
    effects = ablation_of(study, x, b, sae)(chosen, n_seq=12)
    scores, points = predicted_versus_actual(effects, chosen, args.seed)
    study.tables["interventions"] = effects
    study.tables["predictors"] = scores
    study.tables["predicted_actual"] = points

    n_clamped = max(2, args.intervened // 12)  # of the aligned ones, and as many others
    clamped = chosen.groupby("aligned").head(n_clamped)
    alpha = study.step_below(args.step_size)
    study.tables["clamps"] = dose_response(study.et, x, b, sae, clamped, alpha, study.rng)


def look_at_passing(study: Study, x: Tensor, b: Tensor, sae: SAE) -> None:
    """The table of passing features of the middle step, one by one; x, b [S, L, D]. None if no
    feature is eligible."""
    corpus = study.corpus
    seed = study.args.seed
    own = eligible_at(study, middle_step(study.args))
    if not len(own):
        return
    chosen = passing_and_matched(own, LOOKED_AT, np.random.default_rng(seed))
    removed = ablation_of(study, x[1::2], b[1::2], sae)(chosen, n_seq=24, steps=0, doses=(1.0,))
    f = sae.encode(x, torch.tensor(chosen.feature.to_numpy()))  # [S, L, n]
    table = look_at(chosen, f, corpus.test, corpus.spell, removed)
    study.tables["passing_features"] = table


def study_attractors(study: Study) -> None:
    """Fixed points, basins, merge trees and clusters of a few held-out windows: their tables."""
    et = study.et
    args = study.args
    rng = study.rng
    picked = torch.from_numpy(rng.permutation(len(study.corpus.test))[: args.relaxed])
    ids = study.corpus.test[picked]  # [S', L]
    # As in training: a hidden token has no field of its own.
    masked, _ = mask_tokens(ids, torch.Generator().manual_seed(args.seed))
    b = et.field(masked)  # [S', L, D]
    alpha = study.step_below(1.0)
    study.tables["attractors"], star = attractors(et, b, alpha, rng)
    study.tables["basins"] = basins(et, star[:16], b[:16], alpha, rng)
    trees = []
    for sequence, own_field in enumerate(b[:3].double()):
        trees.append(merge_tree(study.et64, own_field, alpha, rng).assign(sequence=sequence))
    study.tables["merge_tree"] = pd.concat(trees, ignore_index=True)
    members = class_members(ids, study.corpus.written[picked.numpy()])
    study.tables["attractor_clusters"] = attractor_clusters(et, star, b, members, args.seed)


def analyse_energy_transformer(args: Any, et: EnergyTransformer, corpus: Corpus) -> LensResults:
    """SAE, EFAS, interventions and attractors of a trained Energy Transformer."""
    clock = time.perf_counter()
    res = LensResults("energy-transformer")
    et64 = copy.deepcopy(et).double()
    res.facts["invariants"] = check_invariants(et64, corpus.test[:4], args.step_size)
    stable, res.tables["step_size"] = largest_step(et64, corpus.test[::40])
    res.facts["largest_step"] = stable
    rng = np.random.default_rng(args.seed)
    study = Study(args, et, et64, corpus, stable, rng, res.tables)

    descents = descend_corpus(study)
    saes = analyse_features(study, descents)
    res.facts["seconds_efas"] = time.perf_counter() - clock
    middle = middle_step(args)
    intervene(study, descents.xs[middle], descents.b, saes[middle])
    before = time.perf_counter()
    look_at_passing(study, descents.xs[middle], descents.b, saes[middle])
    res.facts["seconds_looked_at"] = time.perf_counter() - before
    study_attractors(study)
    res.tables["descent"] = descent_table(et, corpus.test[::5], args.step_size)
    res.facts["seconds"] = time.perf_counter() - clock
    res.state |= {"args": args, "saes": saes, "et": et, "corpus": corpus}
    return res


def run_all(args: Any, corpus: Corpus) -> tuple[LensResults, EnergyTransformer]:
    """Trains both models, compares them and analyses the Energy Transformer; prints progress."""
    sizes = f"{corpus.train.numel():,} training tokens, {len(corpus.test)} held-out documents"
    print(f"corpus: {args.corpus}, {sizes}", flush=True)
    et = train_energy_transformer(corpus, args.train_steps, args.step_size, args.seed)
    transformer = train_transformer(corpus, args.train_steps, args.seed)
    models = compare_models(et, transformer, corpus, args.step_size, args.seed)
    print(models.to_string(index=False, float_format="%.3f"), flush=True)
    res = analyse_energy_transformer(args, et, corpus)
    res.tables["models"] = models
    return res, et


def peak_gb() -> float:
    """Peak resident memory of this process, GB; NaN where the system does not say (Windows)."""
    if find_spec("resource") is None:
        return math.nan
    resource = import_module("resource")
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def cost_line(clock: float) -> str:
    """Time since `clock` (of time.perf_counter), CPU time, threads and memory of this process."""
    minutes = (time.perf_counter() - clock) / 60
    cpu_minutes = time.process_time() / 60
    n_threads = torch.get_num_threads()
    threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
    times = f"{minutes:.1f} minutes, {cpu_minutes:.1f} CPU minutes on {threads}"
    memory = peak_gb()
    return times if math.isnan(memory) else f"{times}, peak {memory:.2f} GB"


def run(args: argparse.Namespace) -> int:
    """Trains, analyses, writes tables, figures and report to args.save_dir; exit status."""
    if args.redraw:
        return redraw(args.save_dir)
    clock = time.perf_counter()
    report = args.save_dir / "research_report.md"
    raw = args.save_dir / "raw_results.json"
    refuse_overwrite([report, raw], args.overwrite)
    keep_memory()
    with run_record(args.save_dir, args) as record:
        texts = documents(args.corpus, args.cache_dir)
        corpus = build_corpus(texts, args.sequences, args.seed)
        some = corpus.train[:32]
        et = untrained(corpus, args.seed)
        choose_threads(lambda: descend(et, some, 6, args.step_size), args.threads)
        res, _ = run_all(args, corpus)
        cost = cost_line(clock)
        record |= {"cost": cost, "facts": res.facts}
        save_results(res, args.save_dir)
        again = ["energy_lens_minimal.py", "--redraw", "--save_dir", args.save_dir]
        with drawing([raw, args.save_dir / "features.csv"], again):
            write_report(TITLE, compose(res, args, cost, args.save_dir), report)
        res.to_json(raw)  # with what the report concludes
    shown = (
        "layer eligible rule_passes token_null within_documents direction_null fewest aligned "
        "aligned_clusters aligned_participation median_abs_efas split_half_r"
    )
    print(res.tables["layers"][shown.split()].to_string(index=False, float_format="%.3f"))
    print(f"{cost}; report: {report}")
    return 0


def redraw(folder: Path) -> int:
    """Figures and report once more, from the files of an earlier run; exit status."""
    res = read_results(folder)
    record = read_record(folder, "python energy_lens_minimal.py")
    args = argparse.Namespace(**record["arguments"])
    report = folder / "research_report.md"
    write_report(TITLE, compose(res, args, record["cost"], folder), report)
    print(f"drawn again: {report}")
    return 0


# ------------------------------------------------------------------------------- tables and figures
TITLE = "Energy-Lens on an Energy Transformer"
# A part of a report is one of
#   ("lead", (label, sentence))  a line of the first screen
#   ("h", heading)               begins a section, ("closed", heading) one that a reader opens
#   ("p", paragraph), ("t", table), ("img", (path, caption))
ReportPart = tuple[str, Any]
COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
]  # Okabe & Ito: safe for colour-blind readers


def cell(value: Any) -> str:
    """A value of a table for the reader, as on every page: at most three significant digits."""
    return three_digits(value)


def markdown_table(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    names = [markdown_text(str(name)) for name in table.columns]
    lines = [names, ["---"] * table.shape[1]]
    for row in table.itertuples(index=False):
        lines.append([markdown_text(cell(value)) for value in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_code(name: str) -> str:
    """A user's name in a sentence: as code nothing in it is markup, but a backtick would end it."""
    return f"`{name.replace('`', chr(39))}`"


def markdown_block(kind: str, value: Any) -> str:
    """A block of the report as Markdown, in which nothing is closed."""
    if kind in ("h", "closed"):
        return f"## {value}"
    if kind == "lead":
        label, sentence = value
        end = "" if label.endswith("?") else "."
        return f"**{label}{end}** {sentence}"
    if kind == "p":
        return value
    if kind == "t":
        return markdown_table(value)
    image, caption = value
    return f"![{caption}]({Path(image).name})\n\n*{caption}*"


@dataclass
class PageSection:
    """A section of the page: what is seen at once, or after a click."""

    heading: str  # empty: the first screen
    is_closed: bool
    parts: list[ReportPart] = field(default_factory=list)


def page_sections(blocks: list[ReportPart]) -> list[PageSection]:
    """The blocks of a report by section, each up to the next heading."""
    sections = [PageSection("", is_closed=False)]  # what stands before the first heading
    for kind, value in blocks:
        if kind in ("h", "closed"):
            sections.append(PageSection(value, kind == "closed"))
        else:
            sections[-1].parts.append((kind, value))
    return sections


def write_report(title: str, blocks: list[ReportPart], path: Path) -> None:
    """The same blocks as Markdown (`path`) and as one self-contained HTML page beside it. Where the
    folder pages/ is missing, a line says so and there is no page."""
    paragraphs = [f"# {markdown_text(title)}"]
    for kind, value in blocks:
        paragraphs.append(markdown_block(kind, value))
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")

    page_path = path.with_suffix(".html")
    page_path.unlink(missing_ok=True)  # an earlier page is not of this report
    sections = page_sections(blocks)
    try:
        page = render_page("energy_lens.html", title=title, blocks=sections, show=cell)
    except HandoffError as error:  # the script was copied alone
        print(error)
        return
    with atomic(page_path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def save_tables(tables: dict[str, pd.DataFrame], out: Path) -> None:
    """Every table as <out>/<name>.csv."""
    for name, table in tables.items():
        with atomic(out / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)


def save_results(res: LensResults, out: Path) -> None:
    """All that --redraw needs beside run.json: raw_results.json, and every table as CSV."""
    save_tables(res.tables, out)
    res.to_json(out / "raw_results.json")


def read_record(folder: Path, remedy: str) -> dict[str, Any]:
    """The run.json of a run that got as far as its results. Raises HandoffError otherwise."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["cost"], record["arguments"]  # noqa: B018 -- KeyError if it did not get so far
    except (OSError, ValueError, KeyError, TypeError) as e:
        fact = f"{path} is not that of a run with results ({e!r})"
        raise HandoffError(f"{fact}; it is written by: {remedy}") from None
    return record


def read_results(folder: Path) -> LensResults:
    """What `save_results` saved. Raises HandoffError if a file is missing or cannot be read."""
    raw = folder / "raw_results.json"
    try:
        record = json.loads(raw.read_text(encoding="utf-8"))
        res = LensResults(record["model"], none_to_nan(record["facts"]))
        for name in record["tables"]:
            file = folder / f"{name}.csv"
            if file.stat().st_size > 1:  # a table without columns has one line end
                words = ["token", "top_token", "context_1", "context_2", "context_3"]
                table = csv_table(file, dict.fromkeys(words, str))
            else:
                table = pd.DataFrame()
            res.tables[name] = table
    except (OSError, ValueError, KeyError, TypeError) as e:
        fact = f"{folder} cannot be drawn again ({e})"
        expected = "expected raw_results.json and a CSV for each of its tables"
        raise HandoffError(f"{fact}; {expected}") from None
    return res


def none_to_nan(facts: Any) -> Any:
    """The facts of a JSON file, which has no NaN: null stands for it."""
    if isinstance(facts, dict):
        return {name: none_to_nan(value) for name, value in facts.items()}
    return math.nan if facts is None else facts


# ---- figures ----
def new_panels(n: int, width: float, height: float, is_stacked: bool) -> tuple[Any, list[Any]]:
    """A figure of n panels, each width x height inches, and their axes: three in a row, or below
    one another for a phone."""
    plt = import_module("matplotlib.pyplot")
    plt.switch_backend("agg")
    columns = 1 if is_stacked else min(3, n)
    rows = math.ceil(n / columns)
    size = (4.5, height * rows) if is_stacked else (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for ax in panels[n:]:  # the last row may have room left
        ax.remove()
    # Only two axes: nothing is read off the others
    for ax in panels[:n]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, panels[:n]


def one_legend(figure: Any, ax: Any, columns: int) -> None:
    """The legend of one panel, for all: below them."""
    handles, labels = ax.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles, labels, fontsize=8, frameon=False, **place)


def tested_pairs(features: pd.DataFrame, layers: list[Layer]) -> Iterator[tuple[Any, Any]]:
    """Each layer that has eligible features, with their rows."""
    for layer in layers:
        own = features[(features.layer == layer.facts["layer"]) & features.eligible]
        if len(own):
            yield layer, own


def histogram_table(features: pd.DataFrame, layers: list[Layer], seed: int) -> pd.DataFrame:
    """Densities of EFAS and of both nulls, a row a (layer, source, bin): what draw_distribution
    needs."""
    edges = np.linspace(-1, 1, 401)  # 0.005 wide: of a language model |EFAS| is around 0.01
    centres = (edges[1:] + edges[:-1]) / 2
    rng = np.random.default_rng(seed)
    tables = []
    for layer, own in tested_pairs(features, layers):
        # The normal null that p_token uses, 20 draws a feature.
        noise = rng.standard_normal((20, len(own)))
        permuted = own.null_mean.to_numpy() + own.null_sd.to_numpy() * noise
        sources = {
            "features": own.efas,
            "sequences permuted": permuted.ravel(),
            "random directions": layer.null.flatten().numpy(),
        }
        for source, values in sources.items():
            density, _ = np.histogram(values, edges, density=True)
            number = layer.facts["layer"]
            columns = {"layer": number, "source": source, "efas": centres, "density": density}
            tables.append(pd.DataFrame(columns))
    if not tables:
        return pd.DataFrame(columns=["layer", "source", "efas", "density"])
    return pd.concat(tables, ignore_index=True)


Z_BIN = 0.5  # width of a bin of z_direction


def z_table(features: pd.DataFrame, layers: list[Layer]) -> pd.DataFrame:
    """How often random directions have which z, a row a (layer, bin): `share` of them at `z`, the
    middle of the bin. Their z is counted from their own mean, in their own standard deviations, as
    z_direction of the features is."""
    tables = []
    for layer, _ in tested_pairs(features, layers):
        null = layer.null.double()  # [8, n]
        spread = null.std(1, keepdim=True)
        z = ((null - null.mean(1, keepdim=True)) / spread).flatten().numpy()  # [8 n]
        edges = z_edges(z)
        counts, _ = np.histogram(z, edges)
        middles = (edges[1:] + edges[:-1]) / 2
        number = layer.facts["layer"]
        columns = {"layer": number, "z": middles, "share": counts / len(z)}
        tables.append(pd.DataFrame(columns))
    if not tables:
        return pd.DataFrame(columns=["layer", "z", "share"])
    return pd.concat(tables, ignore_index=True)


def z_edges(z: np.ndarray) -> np.ndarray:
    """Edges of bins of Z_BIN, with 0 among them, that hold all of z and some room."""
    # In bins, of which 0 is an edge
    low = math.floor(min(np.nanmin(z), -3) / Z_BIN) - 1
    high = math.ceil(max(np.nanmax(z), 3) / Z_BIN) + 1
    return Z_BIN * np.arange(low, high + 1)


def draw_z(features: pd.DataFrame, null: pd.DataFrame | None, path: Path, unit: str) -> None:
    """features.csv beside z_distribution.csv (which older runs lack), a panel a layer: how far
    each feature lies from random directions."""
    own = features[features.eligible]  # the others were not tested
    layers = sorted(own.layer.unique())

    def draw(is_stacked: bool) -> Any:
        figure, axes = new_panels(max(1, len(layers)), 3.6, 2.9, is_stacked)
        for ax, layer in zip(axes, layers, strict=False):
            rows = own[own.layer == layer]
            edges = z_edges(rows.z_direction.to_numpy())
            groups = [rows.z_direction[~rows.aligned], rows.z_direction[rows.aligned]]
            look = {"color": [COLOURS[0], COLOURS[1]], "label": ["not aligned", "aligned"]}
            # One group on the other: together they are all tested features
            heights = ax.hist(groups, edges, stacked=True, **look)[0]  # [2, bins]
            highest = heights[-1].max()
            if null is not None:
                expected = null[null.layer == layer]
                highest = max(highest, (expected.share * len(rows)).max())
                # Shares times the number of features: the same unit as the bars
                curve = {"where": "mid", "color": "black", "linewidth": 1.2}
                label = "as many random directions"
                ax.step(expected.z, expected.share * len(rows), label=label, **curve)
            # Logarithmic from one feature on: a few that stand out must be seen beside thousands.
            ax.set_yscale("symlog", linthresh=1)
            ticks = [0, 1, 10, 100, 1000]
            ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.set(title=f"{unit} {layer}", ylim=(0, 1.8 * highest))
            ax.set_xlabel("z: distance from random directions\n(standard deviations of theirs)")
            ax.set_ylabel("features a bin (log scale)")
        if layers:
            one_legend(figure, axes[0], 1 if is_stacked else 3)
        return figure

    save_figure(draw, path)


def draw_distribution(table: pd.DataFrame, path: Path, unit: str) -> None:
    """efas_distribution.csv, a panel a layer; `unit` says what a layer is."""
    layers = list(table.layer.unique())

    def draw(is_stacked: bool) -> Any:
        figure, axes = new_panels(max(1, len(layers)), 3.6, 2.9, is_stacked)
        for ax, layer in zip(axes, layers, strict=False):
            sources = table[table.layer == layer].groupby("source", sort=False)
            reach = 0.0  # how far from 0 anything lies, but for the outermost thousandth
            for (source, rows), colour, style in zip(
                sources, COLOURS, ("-", ":", "--"), strict=False
            ):
                below = rows.density.cumsum() / rows.density.sum()  # [bins]
                width = rows.efas.diff().median()  # of a bin, whose right end `below` is of
                ax.plot(rows.efas + width / 2, below, color=colour, linestyle=style, label=source)
                between = rows.efas[(below > 0.001) & (below < 0.999)]
                reach = max(reach, between.abs().max()) if len(between) else 1.0
            ax.axvspan(-RULE, RULE, color="0.5", alpha=0.2, linewidth=0, zorder=0)
            reach = min(1.0, max(1.1 * reach, 0.12))
            ax.set(title=f"{unit} {layer}", xlim=(-reach, reach), ylim=(0, 1))
            ax.set_xlabel("EFAS (correlation; grey: below 0.1)")
            ax.set_ylabel("share with less")
        if layers:
            one_legend(figure, axes[0], 1 if is_stacked or len(layers) == 1 else 3)
        return figure

    save_figure(draw, path)


def dose_name(eps: float) -> str:
    """`5 %`, the share of a feature that is removed."""
    return f"{100 * eps:.3g} %"


def draw_forest(scores: pd.DataFrame, path: Path, unit: str) -> None:
    """predictors.csv: Spearman of every predictor with the change, all doses on one scale, with
    intervals. Of one layer a panel for the change and one for its size; of several a panel each for
    the change."""
    panels = {}  # title -> rows of the table
    if "layer" in scores:
        for layer, rows in scores[scores.scale == "signed"].groupby("layer"):
            panels[f"{unit} {layer}"] = rows
    else:
        panels["the change, with its sign"] = scores[scores.scale == "signed"]
        panels["the size of the change"] = scores[scores.scale == "absolute"]

    def draw(is_stacked: bool) -> Any:
        # Of three panels in a row only the first names the predictors
        width = 3.7 if len(panels) > 2 else 5.2
        figure, axes = new_panels(len(panels), width, 4.2, is_stacked)
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            draw_forest_panel(ax, rows)
            is_alike = "layer" in scores  # the same predictors in every panel
            if is_alike and not is_stacked and not ax.get_subplotspec().is_first_col():
                ax.set_yticklabels([])
            sizes = f"({sizes_line(rows)})"
            sizes = textwrap.fill(sizes, 34) if is_stacked else sizes
            ax.set_title(f"{title}\n{sizes}", fontsize=9)
        one_legend(figure, axes[0], 2 if is_stacked else 4)
        return figure

    save_figure(draw, path)


def draw_forest_panel(ax: Any, rows: pd.DataFrame) -> None:
    """Predictors of one panel below one another, a mark a dose. What is an identity is left out;
    what chance gives is a grey band."""
    chance = rows[rows.predictor == "random"]
    names = []
    for name in rows.predictor.unique():
        if name not in ("random", *IDENTITIES):
            names.append(name)
    doses = rows[rows.predictor.isin(names)].groupby("eps")
    if chance.ci_lo.notna().any():
        band = {"color": "0.5", "alpha": 0.25, "linewidth": 0}  # on light and on dark ground
        ax.axvspan(chance.ci_lo.min(), chance.ci_hi.max(), label="chance", zorder=0, **band)
    ax.axvline(0, color="black", linewidth=0.8)
    # The doses of a predictor stand just below one another, its name at their middle
    lines = np.linspace(-0.25, 0.25, len(doses))
    for (eps, own), colour, marker, shift in zip(doses, COLOURS, "os^vD", lines, strict=False):
        place = [names.index(name) + shift for name in own.predictor]
        errors = np.abs([own.spearman - own.ci_lo, own.ci_hi - own.spearman])  # [2, n]
        look = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none"}
        label = f"{dose_name(eps)} of the feature removed"
        ax.errorbar(own.spearman, place, xerr=errors, label=label, **look)
    # A predictor that has been taken out of the table since that run keeps its bare name
    shown = [PREDICTORS[name].formula if name in PREDICTORS else name for name in names]
    ax.set_yticks(range(len(names)), [as_label(label).replace(" (", "\n(") for label in shown])
    # The first one on top; the same scale in every panel
    ax.set(ylim=(len(names) - 0.5, -0.5), xlim=(-1.05, 1.05))
    ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    ax.set_xlabel("Spearman correlation with the change")


def draw_predicted(
    points: pd.DataFrame,
    scores: pd.DataFrame,
    path: Path,
    ylabel: str = "energy change per active token",
) -> None:
    """predicted_actual.csv, a panel a predictor that is drawn; Spearman from predictors.csv."""
    drawn = {name: p for name, p in PREDICTORS.items() if p.drawn}

    def draw(is_stacked: bool) -> Any:
        figure, axes = new_panels(len(drawn), 3.8, 3.4, is_stacked)
        for ax, (name, predictor) in zip(axes, drawn.items(), strict=True):
            own = scores[(scores.predictor == name) & (scores.scale == predictor.scales()[0])]
            rho = own.set_index("eps").spearman
            what = "Spearman" if predictor.signed else "Spearman of sizes"
            doses = points.groupby("eps")
            for (eps, rows), colour, marker in zip(doses, COLOURS, "os^", strict=False):
                look = {"color": colour, "marker": marker, "s": 10, "alpha": 0.7}
                label = f"{dose_name(eps)} removed: {what} {rho[eps]:.2f}"
                ax.scatter(rows[name], rows.energy_change, label=label, rasterized=True, **look)
            ax.set_yscale("symlog", linthresh=1e-2)
            if predictor.in_energy:  # both axes in the same unit: an exact prediction is diagonal
                ax.set_xscale("symlog", linthresh=1e-2)
                low = min(ax.get_xlim()[0], ax.get_ylim()[0])
                high = max(ax.get_xlim()[1], ax.get_ylim()[1])
                ax.plot([low, high], [low, high], color="0.6", linewidth=0.8, zorder=0)
            ax.set(xlabel=predictor.formula, ylabel=ylabel)
            # Above the panel: inside it there is a point everywhere
            ax.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
        # One quantity, one scale: the diagonal stretches that of its own panel
        low = min(ax.get_ylim()[0] for ax in axes)
        high = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(low, high)
        return figure

    save_figure(draw, path)


def draw_dose(clamps: pd.DataFrame, path: Path) -> None:
    """clamps.csv, a panel an outcome; bands: 95 % by resampling clusters of copies."""
    outcomes = {
        "attractor_shift": "shift of the attractor\n(energy per clamped token)",
        "flip_rate": "clamped tokens that flip (share)",
        "collateral": "other tokens that flip (share)",
    }
    doses = sorted(clamps.dose.unique())

    def draw(is_stacked: bool) -> Any:
        figure, axes = new_panels(len(outcomes), 3.8, 3.3, is_stacked)
        for ax, (outcome, label) in zip(axes, outcomes.items(), strict=True):
            styles = itertools.cycle(("-o", "--s"))
            arms = clamps.groupby("arm")
            bands = []
            for (arm, rows), colour, style in zip(arms, COLOURS, styles, strict=False):
                means = []
                for _, at_dose in rows.groupby("dose"):
                    means.append(bootstrap_mean(at_dose[outcome], at_dose.cluster))
                band = pd.DataFrame(means)  # a row a dose: mean, lo, hi
                if outcome != "attractor_shift":  # a rate, also where no sample bounds it
                    band = band.clip(0, 1)
                ax.plot(doses, band["mean"], style, color=colour, label=arm, markersize=4)
                bands.append((band, colour))
                ends = band[["lo", "hi"]].to_numpy()
                ax.update_datalim([(doses[0], end) for end in ends[np.isfinite(ends)]])
            ax.autoscale_view()
            ax.set(xlabel="clamp (multiple of the mean activation)", ylabel=label)
            if outcome != "attractor_shift":  # rates: from zero, and not narrower than 5 %
                ax.set_ylim(-0.002, max(0.05, ax.get_ylim()[1]))
            # What nothing bounds goes on to the edge of the panel
            low, high = ax.get_ylim()
            for band, colour in bands:
                ends = band.clip(low, high)
                ax.fill_between(doses, ends.lo, ends.hi, color=colour, alpha=0.2, lw=0)
            ax.set_ylim(low, high)
        one_legend(figure, axes[0], 2)
        return figure

    save_figure(draw, path)


def draw_descent(table: pd.DataFrame, path: Path) -> None:
    """descent.csv: how far the total energy has fallen since the start, and each of its terms."""

    def draw(is_stacked: bool) -> Any:
        figure, axes = new_panels(2, 4.4, 3.4, is_stacked)
        for (term, rows), colour in zip(table.groupby("term", sort=False), COLOURS, strict=False):
            is_total = term == "total"
            ax = axes[0] if is_total else axes[1]
            # The mean of a change is the change of the mean
            change = rows["mean"] - rows["mean"].iloc[0]
            ax.plot(rows.step, change, color=colour, label=term)
            if "change_q05" in rows:  # older runs kept the range of the energy, not of its change
                ax.fill_between(
                    rows.step, rows.change_q05, rows.change_q95, color=colour, alpha=0.2
                )
        titles = ("total energy", "its terms")
        for ax, title in zip(axes, titles, strict=True):
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set(xlabel="descent step t (log scale from 1)", title=title)
            ax.set_xscale("symlog", linthresh=1)
            ax.set_ylabel("E(t) − E(0), energy per token")
            ticks = [0, 1, 3, 10, 30]
            ax.set_xticks(ticks, ticks)
            ax.set_xlim(0, table.step.max())
            ax.minorticks_off()
        axes[1].legend(fontsize=8, frameon=False)
        return figure

    save_figure(draw, path)


def draw_basins(basin: pd.DataFrame, tree: pd.DataFrame, path: Path) -> None:
    """basins.csv and merge_tree.csv, side by side."""

    def draw(is_stacked: bool) -> Any:
        figure, axes = new_panels(2, 4.4, 3.4, is_stacked)
        size, depth = axes
        errors = [basin.returned - basin.ci_lo, basin.ci_hi - basin.returned]
        look = {"fmt": "-o", "color": COLOURS[0], "capsize": 3}
        size.errorbar(basin.sigma, basin.returned, errors, **look)
        size.set(xlabel="noise / length of the state", xscale="log", title="basin size")
        size.set(ylabel="share of starts that return (95 % CI)", ylim=(-0.03, 1.03))

        for (sequence, rows), colour in zip(tree.groupby("sequence"), COLOURS, strict=False):
            finite = rows[np.isfinite(rows.depth)]
            rank = np.arange(1, len(finite) + 1)
            label = f"sequence {sequence}"
            depth.plot(rank, finite.depth, "o-", color=colour, markersize=3, label=label)
        depth.set(xlabel="rank of the minimum", ylabel="depth to the merge (energy per token)")
        depth.set(yscale="log", title="merge tree of the sublevel sets")
        if np.isfinite(tree.depth).any():
            depth.legend(fontsize=7, frameon=False)
        else:  # nothing merges: one minimum each, as far as the starts can tell
            said = "every start reached\nthe same minimum"
            depth.text(0.5, 0.5, said, ha="center", transform=depth.transAxes)
            depth.set_yscale("linear")
            depth.set(xticks=[], yticks=[])
        return figure

    save_figure(draw, path)


# ---- the sentences of the first screen: each from a table, in both directions ----
def span(values: pd.Series) -> str:
    """`0.133 to 0.42`; one number where both ends read alike; `unknown` of none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "unknown"
    low = cell(known.min())
    high = cell(known.max())
    return low if low == high else f"{low} to {high}"


def limits(lo: float, hi: float) -> str:
    """`[0.4, 0.77]`, or `[no interval]` where there are too few units for one."""
    return "[no interval]" if math.isnan(lo) else f"[{cell(lo)}, {cell(hi)}]"


def aligned_line(layers: pd.DataFrame, features: pd.DataFrame, unit: str, quantity: str) -> str:
    """Whether a feature is aligned with the energy (`quantity`), and which are."""
    n_tested = int(layers.eligible.sum())
    if not n_tested:
        needed = f"active on {MIN_ACTIVE} tokens in {MIN_SEQUENCES} documents"
        return f"Cannot tell whether a feature is aligned: none is {needed}, so none was tested."
    n_aligned = int(layers.aligned.sum())
    if not n_aligned:
        # Nothing found says something only where something could have been
        if layers.fewest.max() > n_tested:
            cause = f"with so few random directions none of {n_tested:,} could have passed"
            return f"Cannot tell whether a feature is aligned: {cause}."
        return f"No feature is aligned with the {quantity}: of {n_tested:,} tested none passes."
    n_positive = int(layers.aligned_positive.sum())
    are = "is" if n_aligned == 1 else "are"
    count = f"{n_aligned:,} of the {n_tested:,} features tested {are} aligned with the {quantity}"
    kinds = f"{n_aligned - n_positive:,} restoring, {n_positive:,} amplifying"
    found = features[features.aligned]
    listed = []
    for row in layers[layers.aligned > 0].itertuples():
        which = f"{int(row.aligned):,} of {int(row.eligible):,}"
        if n_aligned <= LOOKED_AT:  # few enough to name each
            numbers = found.feature[found.layer == row.layer]
            which = "features " + ", ".join(str(number) for number in numbers)
        listed.append(f"{unit} {row.layer}: {which}")
    n_clusters = int(layers.aligned_clusters.sum())
    copies = f"Near-copies counted once, they are {n_clusters:,}."
    chance = f"At most about {ALPHA:.0%} of the {n_aligned:,} are expected by chance."
    where = "; ".join(listed)
    return f"{count} ({kinds}). {copies} {chance} {where[0].upper()}{where[1:]}."


def rule_line(layers: pd.DataFrame) -> str:
    """What the original's rule passes, beside what as many random directions give it."""
    n_tested = int(layers.eligible.sum())
    if not n_tested:
        return "Nothing was tested."
    passes = int(layers.rule_passes.sum())
    by_chance = layers.rule_false_directions.sum()
    count = f"The published rule, |EFAS| > {RULE}, passes {passes:,} of these {n_tested:,} features"
    chance = f"Given random directions that fire as often instead, it would pass {by_chance:,.0f}"
    # No interval: the second number is an expectation, exact but for the draw of directions
    if by_chance >= passes:
        return f"{count}. {chance}: no fewer, so the rule tells nothing."
    return f"{count}. {chance} ({by_chance / passes:.0%} of that number)."


def least_line(layers: pd.DataFrame, unit: str) -> str:
    """The weakest alignment that this run could have found."""
    if fewest_number(layers) == "no eligible feature":
        return "Nothing was tested."
    own = layers.dropna(subset="fewest")
    fewest = int(own.fewest.max())
    # Of several layers the easiest and the hardest: a range
    if fewest == 1 and own.efas_alone_above.notna().any():
        above = span(own.efas_alone_above)
        below = span(own.efas_alone_below)
        reach = f"EFAS is above {above} or below {below}"
        by = f" (it differs by {unit})" if len(own) > 1 else ""
        return f"One feature alone is found if its {reach}{by}. A weaker one may have been missed."
    n = int(own.directions.min())
    family = int(own.family.iloc[0])
    needed = f"at least {fewest:,} of {family:,} must lie beyond all {n:,} random directions"
    return f"No feature can be found alone: {needed} before any passes. Fewer would be missed."


def against_unigram(lo: float, hi: float, is_worse: bool) -> str:
    """What the interval of the model's loss less unigram's allows to say."""
    if math.isnan(lo):
        return "Cannot tell whether the model is better than unigram: too few documents"
    if lo > 0:
        return "The model is worse than unigram: it knows less than how frequent tokens are"
    if hi < 0:
        return "The model is better than unigram"
    here = "worse" if is_worse else "better"
    return f"Cannot tell whether the model is better than unigram (it is {here} here)"


def worth_line(models: pd.DataFrame) -> str:
    """What the model is worth: its loss beside unigram's, which knows how frequent tokens are."""
    unigram = models[models.model == "unigram"].iloc[0]
    own = models[models.model != "unigram"].iloc[0]  # at the depth that it was trained at
    difference = own.masked_nats - unigram.masked_nats  # above 0: worse
    losses = (
        f"{own.model}: {own.masked_nats:.2f} nats a token, unigram {unigram.masked_nats:.2f}, over "
        f"{int(own.n_masked):,} tokens"
    )
    others = []
    for row in models.itertuples():
        if row.model.startswith(("bigram", "ordinary")):
            others.append(f"{row.model}: {row.masked_nats:.2f}")
    beside = f" ({'; '.join(others)})" if others else ""
    if "minus_unigram" not in models:  # a run before there was an interval
        word = "worse" if difference > 0 else "better"
        unsure = "this older run kept no interval, so it is not known how surely"
        return f"The model is {word} than unigram here; {unsure}. {losses}{beside}."
    interval = limits(own.ci_lo, own.ci_hi)
    said = against_unigram(own.ci_lo, own.ci_hi, difference > 0)
    n = f"over {int(own.n_seq):,} documents"
    return f"{said}. {losses}{beside}. Difference {difference:+.3f} nats {interval} {n}."


def sizes_line(rows: pd.DataFrame) -> str:
    """On how many features, clusters of copies and documents the rows of predictors.csv rest."""
    features = span(rows.n_features)
    clusters = span(rows.n_clusters)
    return f"n = {features} features in {clusters} clusters, {span(rows.n_seq)} documents"


def told_from_0(own: pd.DataFrame) -> str:
    """In how many rows of predictors.csv the interval leaves 0 out, and on which side."""
    n = len(own)
    # Without an interval (NaN) a row counts on neither side
    n_up = int((own.ci_lo > 0).sum())
    n_down = int((own.ci_hi < 0).sum())
    if own.ci_lo.isna().all():
        return "cannot be told from 0, with too few features or documents for an interval"
    if n_up == n:
        return f"is above 0 in all {n} cases"
    if n_down == n:
        return f"is below 0, the wrong way, in all {n} cases"
    if not n_up and not n_down:
        return f"cannot be told from 0 in any of {n} cases"
    below = f" and below 0, the wrong way, in {n_down}" if n_down else ""
    return f"is above 0 in {n_up} of {n} cases{below}, and cannot be told from 0 in the others"


def cases_line(own: pd.DataFrame, unit: str) -> str:
    """Spearman at every dose (and layer) with its interval; of many only the range."""
    if len(own) > 3:
        return f"{span(own.spearman)}, drawn with intervals"
    cases = []
    for row in own.itertuples():
        where = f"{unit} {row.layer}, " if "layer" in own else ""
        interval = limits(row.ci_lo, row.ci_hi)
        cases.append(f"{row.spearman:.2f} {interval} with {where}{dose_name(row.eps)} removed")
    return "; ".join(cases)


def prediction_line(scores: pd.DataFrame, unit: str, outcome: str) -> str:
    """Whether EFAS predicts what an ablation does to `outcome`, and whether attribution does it
    better; both from documents of which nothing is intervened on."""
    signed = scores[scores.scale == "signed"]
    efas = signed[signed.predictor == REFERENCE]
    own = signed[signed.predictor == "attribution_a"]
    # Paired: both are of the same features and documents, and so is their difference
    better = int((own.minus_efas_lo > 0).sum())
    worse = int((own.minus_efas_hi < 0).sum())
    n = len(own)
    rival = "Plain attribution (f times the pull)"
    if not better and not worse:
        compared = f"{rival} does neither better nor worse, as far as can be told."
    else:
        compared = f"{rival} predicts better in {better} of {n} cases, worse in {worse}."
    return (
        f"The correlation of EFAS with the change of the {outcome} when a feature is removed "
        f"{told_from_0(efas)}: {cases_line(efas, unit)} (Spearman; {sizes_line(efas)}). {compared}"
    )


def identity_line(scores: pd.DataFrame) -> str:
    """Integrated gradients equal the change by construction: whether they do."""
    own = scores[scores.predictor.isin(IDENTITIES)]
    if not len(own):
        return ""
    least = own.spearman.min()  # over doses, scales and layers
    if least >= 0.99:
        return (
            "Integrated gradients rank the changes as they are (Spearman 0.99 or more in every "
            "case). That is an identity, the gradient summed along the way is the change: it "
            "checks the code and predicts nothing, so it is not drawn."
        )
    return (
        "Integrated gradients ought to equal the change, as the gradient summed along the way is "
        f"the change. Here their Spearman is as low as {least:.2f}: too few steps along the way."
    )


def first_order_line(scores: pd.DataFrame, unit: str) -> str:
    """How far the gradient of the very tokens that are changed tells what the change does."""
    own = scores[(scores.predictor == "attribution") & (scores.scale == "signed")]
    return (
        "Attribution on the very tokens that are changed (eps f A) is a first-order estimate and "
        f"no prediction either: Spearman {cases_line(own, unit)}."
    )


def untrained_line(untrained: pd.DataFrame) -> str:
    """What the same analysis finds in a model that was never trained."""
    n_tested = int(untrained.eligible.sum())
    n_aligned = int(untrained.aligned.sum())
    count = f"In the same model before training {n_aligned:,} of {n_tested:,} are"
    if not n_tested:
        return "In the same model before training no feature could be tested."
    if n_aligned:
        return f"{count}: that much owes nothing to training."
    return f"{count}."


EFAS_MEANING = (
    "The correlation, over tokens, of a feature's activation f with the pull of the {quantity} "
    "along its direction d, A = -<dE/dx, d>. Positive: amplifying; negative: restoring. It is not "
    "“the feature lowers the {quantity}”: that is the attribution f A. Aligned: beyond "
    "both nulls (documents permuted; random directions that fire as often) at a false discovery "
    f"rate of {ALPHA:.0%} over all layers, with the same sign in both halves of the documents."
)


# ---- the report ----
def noise_line() -> str:
    """What pure noise gives under the original's rule at eight tokens, computed here from the exact
    null of r."""
    # Pearson r of independent Gaussians at n = 8.
    r = 2 * stats.beta(3, 3).rvs(200_000, random_state=0) - 1
    passing = np.abs(r[np.abs(r) > RULE])
    rule = f"independent Gaussian noise at n = 8 tokens, kept when |r| > {RULE}"
    return f"{rule}: mean {passing.mean():.4f}, 95th percentile {np.quantile(passing, 0.95):.4f}"


WITHIN_A_BASIN = (
    "within a basin any clamp raises the energy: only the excess over random directions counts"
)


def against_original(
    layers: pd.DataFrame,
    features: pd.DataFrame,
    concept: str,
    shift: str,
    cost: str,
    why_shift: str = WITHIN_A_BASIN,
) -> pd.DataFrame:
    """The headlines of the original (drawn from a random generator there) beside what was measured
    here, and why they differ."""
    own = features[features.eligible]
    size = own.efas.abs()
    split_half = np.corrcoef(own.efas_a, own.efas_b)[0, 1] if len(own) > 2 else math.nan
    n_aligned = int(layers.aligned.sum())
    n_clusters = int(layers.aligned_clusters.sum())
    passed = (
        f"{n_aligned:,} of {int(layers.eligible.sum()):,} tested are aligned, in {n_clusters:,} "
        f"clusters of near-copies (fewest that could have passed: {fewest_number(layers)}); "
        f"|EFAS| > {RULE} passes {int(layers.rule_passes.sum()):,}; expected of permuted "
        f"sequences {layers.rule_false_permuted.sum():,.0f}, of random directions "
        f"{layers.rule_false_directions.sum():,.0f}"
    )
    maximum = (
        f"not reported; split-half r {split_half:.2f}, 95th percentile of |EFAS| of random "
        f"directions {layers.random_directions_q95.median():.3f}"
    )
    median = f"median |EFAS| of tested features {size.median():.3f}"
    no_share = "a count means nothing without the share of such tokens; we print lift"
    # fmt: off
    rows = [
        ("496 alignments", passed, "a threshold is no test; ours has nulls"),
        ("maximum 0.8559", maximum, "a maximum grows with the number of features"),
        ("mean 0.3775", median, noise_line()),
        ("95th percentile 0.7388", f"{size.quantile(0.95):.3f}", "as above"),
        ("7 regex / 272 word / 12 number features", concept, no_share),
        ("shifts up to 0.67 units", shift, why_shift),
        ("< 30 minutes, < 6 GB on an M2", cost, "measured on this machine; an M2 was not tested"),
    ]
    # fmt: on
    return pd.DataFrame(rows, columns=["original", "measured here", "why they differ"])


def fewest_number(layers: pd.DataFrame) -> str:
    """The smallest number of features that could have passed random directions."""
    if "fewest" not in layers or layers.fewest.isna().all():
        return "no eligible feature"
    return f"{int(layers.fewest.max())}"


def floor_line(layers: pd.DataFrame) -> str:
    """What random directions could have found at least, by counting and with the fitted tail, and
    what each finds."""
    if fewest_number(layers) == "no eligible feature":
        return "No feature is eligible: nothing was tested."
    own = layers.dropna(subset="fewest")
    n = int(own.directions.min())
    tail = "So few directions have no tail to fit. "
    if has_tail(n):
        tail = (
            "For a feature beyond every direction p is read off a generalised Pareto tail fitted "
            f"to the outermost {tail_size(n)} (its shape two standard errors heavier than "
            f"estimated), down to {own.smallest_p.max():.1e}. "
        )
    alone = "no feature can pass alone."
    if own.efas_alone_above.notna().any():
        alone = (
            "a feature passes alone if its EFAS is below about "
            f"{own.efas_alone_below.median():.3f} or above {own.efas_alone_above.median():.3f} "
            "(median over layers and firing rates)."
        )
    return (
        f"What random directions could have found at least: {n:,} of them a layer give no "
        f"two-sided p below {own.smallest_p_counted.max():.1e} by counting, so that of "
        f"{int(own.family.iloc[0]):,} features {int(own.fewest_counted.max())} must lie beyond "
        f"all of them before any passes. {tail}So {fewest_number(layers)} could have passed; "
        f"{alone} By counting {count_line(own, 'direction_null_counted')} pass and "
        f"{count_line(own, 'aligned_counted')} are aligned; with the tail "
        f"{count_line(own, 'direction_null')} and {count_line(own, 'aligned')}."
    )


def unit_line(layers: pd.DataFrame) -> str:
    """What permuted documents test and what they do not, and what is found within documents."""
    if fewest_number(layers) == "no eligible feature":
        return "No feature is eligible: nothing was tested."
    own = layers.dropna(subset="fewest")
    return (
        "Permuted documents test any association of f with A, with the document as the unit. What "
        "raises both in the same documents passes, even if within a document neither follows the "
        "other. Their p has no floor (exact moments, normal tail): a feature passes alone if its "
        f"EFAS lies {own.efas_alone_permuted.median():.3f} from the permuted mean (median). Within "
        "documents (f and A less their means by document and by position; the sign of each "
        f"document's covariance flipped at random) {count_line(own, 'within_documents')} of "
        f"{int(own.family.iloc[0]):,} pass at q < {ALPHA}, and {count_line(own, 'aligned_within')} "
        f"of the {int(own.aligned.sum())} aligned; {int(own.within_too_few.sum())} are active in "
        "too few documents to pass that alone."
    )


def count_line(layers: pd.DataFrame, name: str) -> str:
    """How many features pass something, with their copies: `218 (44 clusters, participation ratio
    22)`; clusters are summed over layers, participation ratios too."""
    clusters = int(layers[f"{name}_clusters"].sum())
    participation = layers[f"{name}_participation"].sum()
    n = int(layers[name].sum())
    return f"{n} ({clusters} clusters, participation ratio {participation:.1f})" if n else "0"


def concept_line(concepts: pd.DataFrame) -> str:
    """How many features are significant for each class, beside the base rate."""
    counts = []
    for name, rows in concepts.groupby("token_class"):
        found = rows[(rows.q < ALPHA) & (rows.lift > 1.5) & (rows.auroc > 0.5)]
        rule = f"base rate {rows.base_rate.iloc[0]:.1%}; lift > 1.5, q < {ALPHA}"
        counts.append(f"{len(found)} {name} in {found.cluster.nunique()} clusters ({rule})")
    return "; ".join(counts) or "no eligible feature"


def sae_line(sae: pd.DataFrame) -> str:
    """At how many steps or blocks token ids explain the states better than the SAE, or nothing is
    explained; what that means."""
    own = sae[sae.dictionary.str.startswith("SAE")].set_index("layer").fvu
    n_tokens = int(sae.n_fit_tokens.iloc[0])
    trivial = sae[sae.dictionary.str.startswith("one atom")].set_index("layer").fvu
    useless = sorted(own.index[own >= 1])
    n_trivial = int((trivial < own).sum())
    warning = ""
    if useless:
        warning = (
            f"At layer {', '.join(map(str, useless))} the SAE explains nothing: it leaves no less "
            "than the mean state would (FVU 1 or more). What follows about the features there says "
            "nothing about the model. "
        )
    return warning + (
        f"SAE and token ids are fitted on the same {n_tokens:,} tokens and scored on the same "
        "others. One atom a token id plus one a position leaves less unexplained than the SAE at "
        f"{n_trivial} of {len(own)} layers. Where it does, the states are largely the tokens "
        "themselves, and a feature need be no more than a token."
    )


def shift_line(clamps: pd.DataFrame) -> str:
    """What the strongest clamp shifts, beside an equal random displacement."""
    strongest = clamps[clamps.dose == clamps.dose.max()]
    own = strongest[strongest.arm == "feature"].reset_index(drop=True)
    random = strongest[strongest.arm == "random direction"].reset_index(drop=True)
    excess = bootstrap_mean(own.attractor_shift - random.attractor_shift, own.cluster)
    n_clusters = own.cluster.nunique()
    interval = f"{limits(excess.lo, excess.hi)}, {n_clusters} clusters of copies"
    return (
        f"clamped at {clamps.dose.max():g} x the mean activation: "
        f"{own.attractor_shift.mean():.3f}, minus equal random displacement {excess.mean:.3f} "
        f"({interval}) energy per token; flip rate "
        f"{own.flip_rate.mean():.2f} against {random.flip_rate.mean():.2f}"
    )


def upright(layers: pd.DataFrame) -> pd.DataFrame:
    """The table of layers with a column a layer: there are more quantities than layers. A count of
    features has its clusters and participation ratio beside it."""
    columns = {}
    for name in layers.drop(columns=["layer", "latents"]):
        if f"{name}_clusters" in layers:
            numbers = [layers[name], layers[f"{name}_clusters"], layers[f"{name}_participation"]]
            cells = [f"{n:g} ({c:g}; {r:.1f})" for n, c, r in zip(*numbers, strict=True)]
            columns[f"{name} (clusters; participation ratio)"] = cells
        elif not name.endswith(("_clusters", "_participation")):
            columns[name] = [cell(value) for value in layers[name]]
    table = pd.DataFrame(columns, index=layers.layer.astype(str)).T
    return table.rename_axis(index="layer", columns=None).reset_index()


COPIES_MEANING = (
    f"Features whose decoder directions have |cosine| > {COPY} are near-copies, and a count of "
    "them is no count of different things. Clusters: connected components of that relation among "
    "the eligible features of a layer (single linkage). Participation ratio: (sum of v)^2 / sum of "
    "v^2 over the eigenvalues v of the counted directions' Gram matrix, how many directions at "
    "right angles they amount to. Sums over layers count a thing once a layer. Intervals over "
    f"features are over clusters; there is none below {MIN_GROUPS} clusters."
)


def named(table: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """The columns of a table that a reader needs, under the names that a reader needs. Numbers that
    are only names stay as they are written."""
    known = [column for column in names if column in table]
    shown = table[known].copy()
    for column in ("feature", "pair", "cluster"):
        if column in shown:
            shown[column] = [f"{number:g}" for number in shown[column]]
    return shown.rename(columns=names)


MODEL_NAMES = {
    "model": "model",
    "masked_nats": "loss (nats a token)",
    "minus_unigram": "less unigram (nats)",
    "ci_lo": "from",
    "ci_hi": "to (95 %)",
    "accuracy": "right (share)",
    "n_masked": "tokens asked for",
    "n_seq": "documents",
    "distinct_decoded": "different tokens decoded",
    "unmasked_kept": "unmasked tokens kept (share)",
}
SAE_NAMES = {
    "layer": "layer",
    "dictionary": "dictionary",
    "n_fit_tokens": "tokens it is fitted on",
    "fvu": "FVU (share)",
    "l0": "L0 (features a token)",
    "dead": "never active (share)",
    "outside": "tokens outside (share)",
}
LAYER_NAMES = {
    "n_tokens": "tokens",
    "n_seq": "documents",
    "eligible": "features tested",
    "directions": "random directions",
    "rule_passes": f"|EFAS| > {RULE}",
    "rule_false_permuted": f"|EFAS| > {RULE} expected of permuted documents",
    "rule_false_directions": f"|EFAS| > {RULE} expected of random directions",
    "random_directions_positive": "random directions with EFAS > 0 (share)",
    "random_directions_q95": "95th percentile of |EFAS|: random directions",
    "shuffled_pairing_q95": "95th percentile of |EFAS|: pull of another feature",
    "split_half_r": "EFAS in both halves of the documents (r)",
    "legacy_max": "largest correlation of the original's kind",
    "mc_sd_over_analytic": "null's spread, drawn over exact",
    "finite_difference_error": "error of the gradient (share)",
    "token_null": "pass permuted documents",
    "token_null_by": "the same, under any dependence",
    "token_null_maxt": "the same, max-T",
    "within_documents": "pass within documents",
    "direction_null": "pass random directions",
    "direction_null_counted": "the same, by counting",
    "aligned": "aligned",
    "aligned_counted": "aligned, by counting",
    "aligned_within": "aligned, and pass within documents",
    "aligned_positive": "aligned, EFAS > 0",
    "median_abs_efas": "median |EFAS|",
    "median_ci_lo": "median |EFAS|, from",
    "median_ci_hi": "median |EFAS|, to (95 %)",
    "median_mi_nats": "median mutual information (nats)",
    "median_mi_permuted": "the same, documents permuted (nats)",
    "family": "tests that are corrected for",
    "smallest_p_counted": "smallest p by counting",
    "smallest_p": "smallest p with the tail",
    "fewest_counted": "fewest that pass, by counting",
    "fewest": "fewest that pass, with the tail",
    "efas_alone_below": "passes alone below EFAS",
    "efas_alone_above": "passes alone above EFAS",
    "efas_alone_permuted": "passes permuted documents alone beyond",
    "within_too_few": "in too few documents to pass within alone",
}


def layer_rows(layers: pd.DataFrame, unit: str) -> pd.DataFrame:
    """`upright` under names for readers."""
    table = upright(layers)
    names = []
    for name in table.layer:
        column = name.split(" (")[0]  # a count has its clusters beside it, in parentheses
        rest = name.removeprefix(column)
        names.append(LAYER_NAMES.get(column, column) + rest)  # a new quantity keeps its own
    table["layer"] = names
    return table.rename(columns={"layer": unit})


def efas_legend() -> str:
    """What the rows of `layer_rows` are."""
    return (
        f"|EFAS| > {RULE} expected: how many features the original's rule would pass if documents "
        "were permuted, or if every feature were a random direction of the same firing rate. Pull "
        "of another feature: f against the pull along another feature's direction. The original's "
        "kind: correlation with -np.gradient of the token energies over positions, which is no "
        "derivative in state space."
    )


def first_screen(
    tables: dict[str, pd.DataFrame], unit: str, quantity: str, outcome: str
) -> list[ReportPart]:
    """What was found, in words: the lines that every model has."""
    layers = tables["layers"]
    aligned = aligned_line(layers, tables["features"], unit, quantity)
    if "untrained" in tables:
        aligned += " " + untrained_line(tables["untrained"])
    parts = [("lead", ("Aligned features", aligned))]
    # A count of features is worth what their model is worth
    if "models" in tables:
        parts.append(("lead", ("What the model is worth", worth_line(tables["models"]))))
    parts += [
        ("lead", ("The published rule", rule_line(layers))),
        ("lead", ("What could be found", least_line(layers, unit))),
    ]
    if "predictors" in tables:
        line = prediction_line(tables["predictors"], unit, outcome)
        parts.append(("lead", ("Does it predict an ablation?", line)))
    return parts


def evidence(tables: dict[str, pd.DataFrame], unit: str, folder: Path) -> list[ReportPart]:
    """The pictures behind the first screen: z of the features, and the forest of predictors."""
    null = tables.get("z_distribution")  # older runs lack it
    figure = folder / "z_direction.png"
    draw_z(tables["features"], null, figure, unit)
    caption = (
        "Each tested feature by its distance from random directions that fire as often. Line: what "
        "as many random directions would give."
    )
    if null is None:
        caption = (
            "Each tested feature by its distance from random directions that fire as often. This "
            "run kept no z of its random directions; a new run draws them too."
        )
    blocks: list[ReportPart] = [
        ("h", "Features against random directions"),
        ("img", (figure, caption)),
    ]
    if "predictors" not in tables:
        return blocks
    scores = tables["predictors"]
    forest = folder / "predictors.png"
    draw_forest(scores, forest, unit)
    caption = (
        "Spearman of each predictor with what removing a feature did; 95 % intervals. Grey: what "
        "chance gives. Only predictors of the other half of the documents predict."
    )
    identity = identity_line(scores)
    blocks += [("h", "What predicts an ablation?"), ("img", (forest, caption))]
    if identity:
        blocks.append(("p", identity))
    return blocks


def model_section(res: LensResults, args: Any, folder: Path) -> list[ReportPart]:
    """The models, and whether the energy behaves as one."""
    invariants = res.facts["invariants"]
    no_parity = (
        "The Energy Transformer is not expected to beat an ordinary transformer, and no parity is "
        "claimed. Collapse would show as few distinct decoded tokens or few unmasked tokens kept."
    )
    checks = (
        "Invariants in float64: closed-form gradient against autograd "
        f"{invariants['grad_x_error']:.1e} at a scale of {invariants['grad_scale']:.1f}; energy "
        f"change of a small step {invariants['energy_change']:.5f}, predicted "
        f"{invariants['predicted_change']:.5f}; largest step size of the grid at which no energy "
        f"rises {res.facts['largest_step']:g} (descent uses {args.step_size:g})."
    )
    table = res.tables["descent"]
    figure = folder / "energy_descent.png"
    draw_descent(table, figure)
    n_seq = int(table.n_seq.iloc[0])
    caption = f"How far the energy has fallen along the descent: mean over {n_seq} documents"
    if "change_q05" in table:
        caption += "; bands: 5 to 95 % of them"
    return [
        ("closed", "The model, and whether its energy falls"),
        ("t", named(res.tables["models"], MODEL_NAMES)),
        ("p", no_parity),
        ("p", checks),
        ("img", (figure, caption)),
    ]


def sae_section(sae: pd.DataFrame) -> list[ReportPart]:
    """What the dictionaries leave unexplained."""
    return [
        ("closed", "Sparse autoencoders"),
        ("p", sae_line(sae)),
        ("t", named(sae, SAE_NAMES)),
    ]


def efas_section(tables: dict[str, pd.DataFrame], unit: str, folder: Path) -> list[ReportPart]:
    """EFAS of the features against both nulls, number by number."""
    layers = tables["layers"]
    figure = folder / "efas_distribution.png"
    draw_distribution(tables["efas_distribution"], figure, unit)
    caption = "EFAS of the features, of permuted documents and of random directions: shares below"
    return [
        ("closed", "EFAS against its nulls, number by number"),
        ("img", (figure, caption)),
        ("t", layer_rows(layers, unit)),
        ("p", floor_line(layers)),
        ("p", unit_line(layers)),
        ("p", efas_legend()),
        ("p", COPIES_MEANING),
    ]


def untrained_part(untrained: pd.DataFrame) -> ReportPart:
    """The same analysis of a model that was never trained, in words."""
    control = untrained.iloc[0]
    return (
        "p",
        "The same on an Energy Transformer that was never trained (own SAE, step "
        f"{int(control.layer)}): {count_line(untrained, 'aligned')} of "
        f"{count_line(untrained, 'eligible')} eligible features pass (fewest that could have "
        f"passed: {fewest_number(untrained)}), median |EFAS| {control.median_abs_efas:.3f}. What "
        "also appears there owes nothing to training.",
    )


CONCEPT_NAMES = {
    "feature": "feature",
    "token_class": "class of tokens",
    "base_rate": "share of all tokens",
    "precision": "share where it fires",
    "lift": "lift",
    "auroc": "AUROC",
    "q": "q",
    "cluster": "cluster of copies",
}


def concept_section(concepts: pd.DataFrame) -> list[ReportPart]:
    """How many features tell a class of tokens, and the three clearest of each."""
    ranked = concepts.sort_values("auroc", ascending=False)
    clearest = ranked.groupby("token_class").head(3)
    floor = (
        "p is over permuted sequences, so a class that belongs to a kind of document passes too; "
        f"the smallest p here is {concepts.p.min():.1e}, and permutations and tail give no "
        "smaller one."
    )
    return [
        ("closed", "Concepts"),
        ("p", concept_line(concepts) + "."),
        ("t", named(clearest, CONCEPT_NAMES)),
        ("p", floor),
    ]


def prediction_table(scores: pd.DataFrame) -> pd.DataFrame:
    """predictors.csv for readers: a row a (scale, predictor), and for each dose the Spearman
    correlation and what it has over that of REFERENCE, with intervals."""
    keys = ["scale", "predictor", "documents"]
    table = scores[keys].drop_duplicates().sort_values("scale", ascending=False, kind="stable")
    table = table.set_index(keys)
    for eps, rows in scores.groupby("eps"):
        own = rows.set_index(keys)
        table[f"eps {eps:g}"] = interval_cells(own.spearman, own.ci_lo, own.ci_hi)
        minus = (own.minus_efas, own.minus_efas_lo, own.minus_efas_hi)
        table[f"eps {eps:g}, minus {REFERENCE}"] = interval_cells(*minus)
    return table.reset_index()


def interval_cells(value: pd.Series, lo: pd.Series, hi: pd.Series) -> pd.Series:
    """`0.85 [0.75, 0.91]`, a cell a row."""
    numbers = zip(value, lo, hi, strict=True)
    cells = []
    for v, a, b in numbers:
        cells.append(f"{v:.2f} [{a:.2f}, {b:.2f}]" if math.isfinite(a) else f"{v:.2f} [–]")
    return pd.Series(cells, value.index)


def prediction_method(scores: pd.DataFrame) -> str:
    """What prediction_table compares, on which documents, and how its intervals come about."""
    return (
        "Spearman, over features, of a predictor with the change per active token "
        f"({sizes_line(scores)}). Predictors from the other half of the documents know "
        "nothing of those that are intervened on: only they predict, and only they are on equal "
        "terms with EFAS. Those of the intervened tokens are computed on the very "
        "states that are then changed. Intervals: 95 %, jackknife over sequences and over whole "
        f"clusters; of a difference jointly; none below {MIN_GROUPS} of either. Standard normal: a "
        "thousand predictors that know nothing, so its interval "
        "is what chance gives."
    )


def ablation_section(
    scores: pd.DataFrame, points: pd.DataFrame, outcome: str, folder: Path
) -> list[ReportPart]:
    """Ablations beside their predictors, number by number; `outcome` is what changes."""
    figure = folder / "predicted_actual.png"
    caption = f"Predicted and actual change of the {outcome}, partial and full ablation"
    rho = scores
    if "layer" in scores:
        by_predictor = scores.groupby(["eps", "predictor", "scale"], as_index=False)
        rho = by_predictor.spearman.mean()
        caption += ", all layers; Spearman: mean over layers"
    draw_predicted(points, rho, figure, f"change of the {outcome}\nper active token")
    return [
        ("closed", "Ablations, number by number"),
        ("img", (figure, caption)),
        ("t", prediction_rows(scores)),
        ("p", prediction_method(scores)),
    ]


def prediction_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """`prediction_table` of every layer under names for readers, less what is an identity."""
    scores = scores[~scores.predictor.isin(IDENTITIES)]
    tables = []
    if "layer" in scores:
        for layer, rows in scores.groupby("layer"):
            table = prediction_table(rows)
            table.insert(0, "layer", layer)
            tables.append(table)
    else:
        tables.append(prediction_table(scores))
    shown = pd.concat(tables)
    formulas = {name: predictor.formula for name, predictor in PREDICTORS.items()}
    shown["predictor"] = [formulas.get(name, name) for name in shown.predictor]
    names = {"scale": "change", "documents": "it has seen"}
    for eps in scores.eps.unique():
        names[f"eps {eps:g}"] = f"{dose_name(eps)} removed"
        names[f"eps {eps:g}, minus {REFERENCE}"] = "less that of EFAS"
    return shown.rename(columns=names)


CLAMP_NAMES = {
    "arm": "what is clamped",
    "aligned": "aligned",
    "dose": "dose (x mean activation)",
    "attractor_shift": "shift (energy per clamped token)",
    "flip_rate": "clamped tokens that flip (share)",
    "collateral": "others that flip (share)",
    "g_change_others": "change of the others' activation (length)",
    "residual": "residual speed",
}


def clamp_section(clamps: pd.DataFrame, folder: Path) -> list[ReportPart]:
    """Persistent clamps beside random displacements."""
    responses = folder / "dose_response.png"
    draw_dose(clamps, responses)
    outcomes = ["attractor_shift", "flip_rate", "collateral", "g_change_others", "residual"]
    means = clamps.groupby(["arm", "aligned", "dose"], as_index=False)[outcomes].mean()
    # As words: True and False are of the code
    means["aligned"] = means.aligned.map({True: "yes", False: "no"})
    band = "Dose-response of clamps and of equal random displacements"
    if clamps.cluster.nunique() >= MIN_GROUPS:
        band += "; band: 95 % over clusters"
    said = shift_line(clamps)
    return [
        ("closed", "Clamps: a feature held at a value"),
        ("p", f"{said[0].upper()}{said[1:]}."),
        ("img", (responses, band)),
        ("t", named(means, CLAMP_NAMES)),
    ]


def against_matched(looked: pd.DataFrame) -> pd.DataFrame:
    """What sets the passing features apart from their matches: a row a quantity, with the mean
    difference within pairs and its interval over clusters of the passing ones."""
    looked = looked.assign(size_of_change=looked.energy_change.abs())
    keys = ["layer", "pair"]
    matched = looked[looked.group == "matched"].set_index(keys)
    passing = looked[looked.group != "matched"].set_index(keys).loc[matched.index]
    cluster = pd.Series(passing.groupby(["layer", "cluster"]).ngroup())
    rows = []
    for quantity in (
        "distinct_share", "token_entropy", "top_token_share", "energy_change", "size_of_change"
    ):  # fmt: skip
        difference = passing[quantity] - matched[quantity]
        interval = bootstrap_mean(difference, cluster)
        rows.append(
            {
                "quantity": quantity,
                "passing": passing[quantity].mean(),
                "matched": matched[quantity].mean(),
                "difference": interval.mean,
                "ci_lo": interval.lo,
                "ci_hi": interval.hi,
                "n_pairs": len(difference),
                "n_clusters": cluster.nunique(),
            }
        )
    return pd.DataFrame(rows)


LOOKED_NAMES = {
    "group": "group",
    "pair": "pair",
    "layer": "layer",
    "feature": "feature",
    "cluster": "cluster",
    "efas": "EFAS",
    "z_direction": "z (random directions)",
    "q_direction": "q (random directions)",
    "n_active": "active tokens",
    "n_seq": "documents",
    "distinct_share": "different tokens (share)",
    "token_entropy": "entropy of its tokens (nats)",
    "top_token": "top token",
    "top_token_share": "top token (share)",
    "energy_change": "change when removed",
    "n_seq_ablated": "documents ablated",
}
MATCHED_NAMES = {
    "quantity": "quantity",
    "passing": "aligned",
    "matched": "matched",
    "difference": "difference",
    "ci_lo": "from",
    "ci_hi": "to (95 %)",
    "n_pairs": "pairs",
    "n_clusters": "clusters",
}
QUANTITY_NAMES = LOOKED_NAMES | {"size_of_change": "size of the change"}
CONTEXT_NAMES = {
    "group": "group",
    "layer": "layer",
    "feature": "feature",
    "context_1": "strongest context",
    "context_2": "second",
    "context_3": "third",
}


def looked_at_section(looked: pd.DataFrame, unit: str, cost: str) -> list[ReportPart]:
    """The passing features one by one, beside matched ones; `unit` of the change of energy."""
    group = looked.group[0]
    n_passing = int((looked.group == group).sum())
    who = f"{n_passing} of the aligned features, one a cluster of copies first,"
    heading = "Aligned features, one by one"
    if group == "strongest":
        who = f"No feature is aligned; the {n_passing} strongest by |z|"
        heading = "Strongest features, one by one"
    text = (
        f"{who} beside as many that are not aligned, of the same layer, nearest in firing rate and "
        "mean activation (pair). Different tokens, entropy and top token: of the tokens that a "
        "feature is active on. Change: of removing the feature wholly, "
        f"{unit} per active token, on documents of the half that EFAS has not seen here, 95 % "
        f"interval over the documents ablated (none below {MIN_GROUPS}). « » marks the token where "
        f"the feature is strongest. {cost}."
    )
    shown = looked.copy()
    shown["energy_change"] = [
        f"{cell(row.energy_change)} {limits(row.ci_lo, row.ci_hi)}" for row in looked.itertuples()
    ]
    # First what sets the groups apart, then who is in them
    apart = against_matched(looked)
    apart["quantity"] = apart.quantity.map(QUANTITY_NAMES)
    return [
        ("closed", heading),
        ("p", text),
        ("t", named(apart, MATCHED_NAMES)),
        ("t", named(shown, LOOKED_NAMES)),
        ("t", named(looked, CONTEXT_NAMES)),
    ]


ATTRACTOR_NAMES = {
    "start": "start",
    "n_seq": "documents",
    "converged": "converged (share)",
    "max_residual": "largest residual speed",
    "energy_per_token": "energy per token",
    "distance_from_own": "mean distance from the own attractor (share of length)",
    "max_distance": "largest distance (share of length)",
    "decoded_differs": "tokens decoded otherwise (share)",
}
BASIN_NAMES = {
    "sigma": "noise / length of the state",
    "returned": "returned (share)",
    "ci_lo": "from",
    "ci_hi": "to (95 %)",
    "n": "starts",
}


def returned_line(basin: pd.DataFrame) -> str:
    """Null result of the basins: every noisy start came back. Empty if one did not."""
    if basin.returned.min() < 1:
        return ""  # then the table and the figure are shown
    n = int(basin.n.min())
    sigmas = span(basin.sigma)
    return (
        f"Every start with noise of {sigmas} times the state's length came back to its attractor: "
        f"{n} of {n} at each strength, 95 % interval from {cell(basin.ci_lo.min())}."
    )


def merged_line(tree: pd.DataFrame) -> str:
    """Null result of the merge trees: one minimum each. Empty if two minima merge anywhere."""
    if np.isfinite(tree.depth).any():
        return ""
    n = tree.sequence.nunique()
    return (
        f"Of {n} documents whose starts were followed down together, each has one minimum: no two "
        "starts ended apart."
    )


def one_attractor_line(ends: pd.DataFrame) -> str:
    """Null result of the five starts: all end alike. Empty if one does not."""
    # The same 1 % as in `basins`
    if ends.max_distance.max() >= 0.01 or ends.converged.min() < 1:
        return ""
    n = int(ends.n_seq.iloc[0])
    return (
        f"From each of {len(ends)} kinds of start all {n} documents end in the attractor of their "
        f"own field, within {cell(100 * ends.max_distance.max())} % of its length."
    )


def class_line(clusters: pd.DataFrame) -> str:
    """Whether attractors tell the classes of tokens, beside their input."""
    ami = clusters.set_index("clusters_of").ami
    chance = clusters.permuted_q95.max()
    star = ami["attractor g*"]  # where the descent ends
    source = ami["input field"]  # where it starts
    found = (
        f"Clusters of attractors share {cell(star)} of the classes of tokens (adjusted mutual "
        f"information, 1: all), clusters of the input {cell(source)}; permuted at most "
        f"{cell(chance)} (95th percentile). "
    )
    if star <= chance:
        return found + "The attractors tell no more than chance."
    if star <= source:
        start = "the input they start from; the difference has no interval"
        return found + f"Here the attractors tell no more than {start}."
    return found + "Whether they tell more than the input cannot be told: it has no interval."


def attractor_section(res: LensResults, folder: Path) -> list[ReportPart]:
    """Fixed points, their basins and how they merge; what is a null result in words alone."""
    setting = (
        "Held-out sequences with a fifth of the tokens masked, as in training; five starts under "
        "the same field."
    )
    bounds = (
        "Depths in the merge tree are upper bounds: the graph joins states by straight segments."
    )
    tables = res.tables
    figure = folder / "basins.png"
    draw_basins(tables["basins"], tables["merge_tree"], figure)
    alike = one_attractor_line(tables["attractors"])
    returned = returned_line(tables["basins"])
    merged = merged_line(tables["merge_tree"])
    blocks: list[ReportPart] = [("closed", "Attractors and basins"), ("p", setting)]
    if alike:
        blocks.append(("p", alike))
    else:
        blocks.append(("t", named(tables["attractors"], ATTRACTOR_NAMES)))
    if returned:
        blocks.append(("p", returned))
    else:
        blocks.append(("t", named(tables["basins"], BASIN_NAMES)))
    if merged:
        blocks.append(("p", merged))
    if not (returned and merged):
        caption = f"Basin sizes and the merge tree of three documents. {bounds}"
        blocks.append(("img", (figure, caption)))
    return [*blocks, ("p", class_line(tables["attractor_clusters"]))]


def about_section(res: LensResults, args: Any, cost: str) -> list[ReportPart]:
    """What EFAS is, and what was run."""
    n_seq = int(res.tables["layers"].n_seq.iloc[0])
    setting = (
        f"n = {n_seq} held-out sequences of 32 tokens, one a document, which are the unit of every "
        f"test; one training seed ({args.seed}), so nothing here speaks for other seeds. Preset "
        f"{args.preset}, corpus {args.corpus}, gradient by {args.gradient}. {cost}."
    )
    meaning = EFAS_MEANING.format(quantity="energy")
    return [("lead", ("What EFAS is", meaning)), ("lead", ("What was run", setting))]


def compose(res: LensResults, args: Any, cost: str, folder: Path) -> list[ReportPart]:
    """The report of the Energy Transformer, and its figures in `folder`."""
    tables = res.tables
    unit = "descent step"
    is_predicted = "predictors" in tables
    concept = "no eligible feature"
    shift = "not enough data"
    if is_predicted:
        concept = concept_line(tables["concepts"])
        shift = shift_line(tables["clamps"])
        res.facts["shift"] = shift
    headlines = against_original(tables["layers"], tables["features"], concept, shift, cost)

    blocks = first_screen(tables, unit, "energy", "energy")
    blocks += about_section(res, args, cost)
    blocks += evidence(tables, unit, folder)
    if is_predicted:
        blocks.append(("p", first_order_line(tables["predictors"], unit)))
    blocks += [("h", "The original against here"), ("t", headlines)]
    # From here on only for whoever wants to check
    blocks += model_section(res, args, folder)
    blocks += efas_section(tables, unit, folder)
    blocks.append(untrained_part(tables["untrained"]))
    if is_predicted:
        looked = tables["passing_features"]
        took = f"This took {res.facts['seconds_looked_at']:.0f} s"
        blocks += looked_at_section(looked, "energy", took)
        blocks += ablation_section(
            tables["predictors"], tables["predicted_actual"], "energy", folder
        )
        blocks += clamp_section(tables["clamps"], folder)
        blocks += concept_section(tables["concepts"])
    blocks += attractor_section(res, folder)
    return blocks + sae_section(tables["sae"])


# ------------------------------------------------------------------------------------- command line
def add_input_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--corpus",
        help="builtin (documentation of the installed packages), topics (Python's language "
        "reference), or a text file (blank lines end a document)",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("outputs")
    folder = Path("energy_lens_results")
    again = "only draw the figures and write the report again, from the files in --save_dir"
    group.add_argument("--save_dir", type=Path, default=folder, help="output folder")
    group.add_argument("--redraw", action="store_true", help=again)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    sizes = "sizes; an explicit flag beats it, the defaults shown are the preset's"
    group.add_argument("--preset", choices=list(PRESETS), default="full", help=sizes)
    steps = "optimiser steps of the Energy Transformer, 32 sequences each"
    group.add_argument("--train_steps", type=positive(int), help=steps)
    alpha = "alpha of the descent, state units per unit of dE/dg"
    group.add_argument("--step_size", type=positive(float), default=0.5, help=alpha)


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    count = positive(int)
    real = positive(float)
    layers = "descent steps whose states are analysed"
    group.add_argument("--energy_layers", type=integer, nargs="+", help=layers)
    sequences = "held-out sequences of 32 tokens, one a document: n of every statistic"
    group.add_argument("--sequences", type=count, help=sequences)
    group.add_argument("--sae_dict_size", type=count, help="SAE latents")
    tokens = "tokens, in whole sequences, that every dictionary is fitted on"
    group.add_argument("--sae_tokens", type=count, help=tokens)
    iterations = "L-BFGS iterations (Adam: times 20 steps)"
    group.add_argument("--sae_iterations", type=count, help=iterations)
    penalty = "weight of the L1 penalty, per unit of whitened activation"
    group.add_argument("--sae_l1", type=real, default=0.6, help=penalty)
    optimisers = list(OPTIMISERS)
    group.add_argument("--optimiser", choices=optimisers, default="lbfgs", help="of the SAE")
    gradients = ["autograd", "finite_difference"]
    slow = "of the energy; the latter along the 16 most active features only, in minutes"
    group.add_argument("--gradient", choices=gradients, default="autograd", help=slow)
    orders = "Monte Carlo permutations of sequences (p_mc, p_maxt; p_token is exact moments)"
    group.add_argument("--permutations", type=count, help=orders)
    directions = (
        "covariance-matched random directions a layer: of m features, 40 m / directions must lie "
        "beyond all before one passes by counting; a fitted tail reaches 10 times further"
    )
    group.add_argument("--directions", type=count, help=directions)
    ablated = "features that are ablated, half of them aligned"
    group.add_argument("--intervened", type=count, help=ablated)
    relaxed = "sequences that are relaxed to their fixed points"
    group.add_argument("--relaxed", type=count, help=relaxed)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=integer, default=42, help="seed of NumPy and torch")
    add_threads_flag(group)
    group.add_argument("--overwrite", action="store_true", help="replace existing output")
    cache = os.environ.get("JANUS_CACHE", "~/.cache/janus_arc")
    group.add_argument("--cache_dir", default=cache, help="folder of the text cache")
    add_version_flag(parser)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_input_flags(parser)
    add_output_flags(parser)
    add_model_flags(parser)
    add_method_flags(parser)
    add_run_flags(parser)
    # The preset is read first: its sizes are the defaults of the other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="full")
    preset = first.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks; exits 2 with one line."""
    args.energy_layers = sorted(set(args.energy_layers))
    if not 0 <= args.energy_layers[0] <= args.energy_layers[-1] <= 30:
        found = f"--energy_layers {args.energy_layers} are descent steps"
        parser.error(f"{found}: expected 0 to 30 (a fixed point has no gradient to align with)")
    if args.sae_dict_size < 128:
        found = f"--sae_dict_size {args.sae_dict_size} is smaller than the state"
        parser.error(f"{found}: expected at least 128 latents")
    if args.sequences < 4 * MIN_SEQUENCES:
        needed = f"needed at least {4 * MIN_SEQUENCES}"
        parser.error(f"not enough data: --sequences {args.sequences}, {needed}")


# ----------------------------------------------------------------------------------- shared regions
# >>> shared: flags ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def positive(kind: type) -> Callable[[str], Any]:
    """argparse type: a finite int or float above zero."""

    def parse(text: str) -> Any:
        number = float(text)
        if not (number > 0 and math.isfinite(number)):
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
        if kind is float:
            return number
        return integer(text)

    parse.__name__ = f"positive {kind.__name__}"  # argparse names the type in its errors
    return parse


def integer(text: str) -> int:
    """argparse type: a whole number of at most 64 bits, as torch takes them; also written 1e3."""
    try:
        number = int(text)
    except ValueError:
        as_float = float(text)
        if not as_float.is_integer():
            raise
        number = int(as_float)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit into 64 bits")
    return number


def finite(text: str) -> float:
    """argparse type: a float that is not NaN or infinite."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


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


# >>> shared: threads ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def choose_threads(step: Callable[[], object], wanted: int | None, n: int = 3) -> float:
    """Sets the number of threads that torch computes with -> seconds of one `step`, mean of n.

    `wanted` threads; else one, or all that torch may use, whichever is faster now. Threads that
    share a step wait for one another: where another program has a core, all wait for that core.
    Several processes may call this together: each takes as many steps.
    """
    step()  # touches its memory for the first time
    most = torch.get_num_threads()  # a core each, or OMP_NUM_THREADS
    torch.set_num_threads(wanted or most)
    seconds = seconds_of(step, n)
    if wanted or most == 1:
        return seconds
    torch.set_num_threads(1)
    seconds_alone = seconds_of(step, n)
    # Sums round differently with another number of threads, so it should not change by chance
    if seconds_alone <= 1.1 * seconds:
        return seconds_alone
    torch.set_num_threads(most)
    return seconds


def seconds_of(step: Callable[[], object], n: int = 3) -> float:
    """Mean seconds of n calls."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - start) / n


def duration(seconds: float) -> str:
    """A time for people, such as 12 s or 3.4 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def add_threads_flag(group: Any) -> None:
    """Adds --threads to a parser or a group of flags."""
    about = "threads of torch on the CPU; not given: one or all, whichever is faster at the start"
    group.add_argument("--threads", type=positive(int), help=about)


# <<< shared: threads


# >>> shared: files ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
class HandoffError(Exception):
    """A broken input or hand-off. The text is the one line that the user reads: fact, found,
    expected, command."""


def one_line_errors(work: Callable[[], int]) -> int:
    """Exit status of `work`; an expected failure is one line on stderr and status 1 (2 for an
    argument that is not UTF-8), no traceback."""
    # A letter that the terminal lacks is shown as an escape: printing never fails
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a test or a notebook puts there has none
            stream.reconfigure(errors="backslashreplace")
    status = 1
    try:
        for argument in sys.argv:
            argument.encode()
        return work()
    except HandoffError as e:
        text = str(e)
    except UnicodeEncodeError as e:
        text = f"{ascii(e.object):.200} is not UTF-8; expected names and texts in UTF-8"
        status = 2
    except UnicodeDecodeError as e:
        text = f"a file that was read is not UTF-8 text ({e}); convert it: iconv -t UTF-8"
    except OSError as e:
        advice = {
            errno.ENOSPC: "; make room on that disk, or name a folder on another one",
            errno.EACCES: "; name a place that you may read and write",
            errno.EROFS: "; name a folder that can be written",
        }
        where = e.filename or "while writing"
        text = f"{e.strerror or e}: {where}{advice.get(e.errno or 0, '')}"
    except (MemoryError, torch.OutOfMemoryError) as e:
        text = f"out of memory ({e}); give smaller sizes or batches, see --help"
    except KeyboardInterrupt:
        text = "interrupted"
    script = Path(work.__code__.co_filename).name
    print(f"{script}: error: {' '.join(text.split())}", file=sys.stderr)
    return status


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


# Columns that hold names and tokens, which may look like a number, or like "nan"
TEXT_COLUMNS = ["run", "initial", "context", "next", "attends_to", "query_token", "key_token"]


def csv_table(path: str | Path, types: dict[str, type] | None = None) -> pd.DataFrame:
    """A CSV, in which text stays text: a run called 007 or null, a token NaN. What is empty is
    missing, and nothing else. `types` of other columns are checked."""
    types = dict.fromkeys(TEXT_COLUMNS, str) | (types or {})
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])


@contextlib.contextmanager
def drawing(finished: list[Path], redraw: list[Any]) -> Iterator[None]:
    """Within the block a failure costs a picture, and no result: HandoffError, which names the
    files that are finished, and `redraw`, the words of the command that draws again."""
    try:
        yield
    except Exception as e:  # matplotlib raises many types
        if not all(path.is_file() for path in finished):
            raise
        cause = f"{type(e).__name__}: {first_line(e, 120)}"
        kept = f"the results are safe in {' and '.join(map(str, finished))}"
        command = shlex.join(map(str, ["python", *redraw]))
        fact = f"a picture could not be drawn ({cause})"
        raise HandoffError(f"{fact}; {kept}; draw it with: {command}") from e


def save_figure(draw: Callable[[bool], Any], path: Path, dpi: int = 130) -> None:
    """Draws a figure twice, and writes it atomically: draw(False), its panels in a row -> PNG at
    `path`, for slides, and SVG beside it, for pages; draw(True), its panels below one another ->
    NAME.narrow.svg, for the page on a phone. Text in an SVG stays text."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    files = {False: [path, path.with_suffix(".svg")], True: [path.with_suffix(".narrow.svg")]}
    for is_stacked, targets in files.items():
        figure = draw(is_stacked)
        figure.draw_without_rendering()
        # What the layout solves for may differ in its last digits, and an SVG would show them
        figure.set_layout_engine("none")
        for part in figure.subfigs:
            part.bbox_relative.set_points(part.bbox_relative.get_points().round(4))
        for ax in figure.axes:
            place = ax.get_position(original=True).bounds
            ax.set_position([round(share, 4) for share in place])
        for text in [text for part in (figure, *figure.subfigs) for text in part.texts]:
            text.set_position([round(share, 4) for share in text.get_position()])
        for target in targets:
            is_svg = target.suffix == ".svg"
            # The same figure has the same bytes: no time, and names that hang on the content
            more = {"metadata": {"Date": None}, "transparent": True} if is_svg else {"dpi": dpi}
            settings = {"svg.fonttype": "none", "svg.hashsalt": target.name}
            with atomic(target) as temporary, mpl.rc_context(settings), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # letters that the font lacks become boxes
                figure.savefig(temporary, **more)
        plt.close(figure)


def as_label(name: object) -> str:
    """A name as matplotlib shows it letter for letter: $ begins no formula, and a leading _ does
    not keep it out of a legend."""
    text = str(name).encode("utf-8", "replace").decode()  # a path may hold bytes that are no text
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def markdown_text(text: str) -> str:
    """One line of Markdown that shows the text: it can neither end the cell of a table nor become
    markup, code, a link or a formula."""
    escaped = html.escape(text)
    for character in "|`*$~\\":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    escaped = escaped.replace("](", "]&#40;")
    # An underscore within a word is one, as in the names of columns
    escaped = re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", escaped)
    return " ".join(escaped.splitlines())


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
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, ValueError, subprocess.TimeoutExpired):
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
        record["hardware"]["threads"] = torch.get_num_threads()  # chosen since the start
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


# >>> shared: lines ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def read_lines(path: str | Path) -> list[str]:
    r"""Lines of a UTF-8 file, without its byte order mark. They end at \n, \r\n or \r:
    str.splitlines would also cut at form feeds and at U+2028."""
    return Path(path).read_text(encoding="utf-8-sig").split("\n")


def cut(text: str, length: int) -> list[str]:
    """Pieces of at most `length` characters, cut at the last space that is in reach (which is left
    out) or, in a text without spaces, between two characters."""
    pieces = []
    start = 0
    while len(text) - start > length:
        end = text.rfind(" ", start + 1, start + length + 1)
        is_space = end > 0
        if not is_space:
            end = start + length
        pieces.append(text[start:end])
        start = end + is_space
    return [*pieces, text[start:]]


# <<< shared: lines


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


@functools.cache  # reading five thousand files takes a while, and each split asks for it
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
    n_letters = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
    return n_letters > 0.8 * len(paragraph)


def statements(tree: ast.Module) -> list[ast.AST]:
    """The tree and every statement in it, in the order of ast.walk, which would spend most
    of its time on expressions; they hold no documentation."""
    found: list[ast.AST] = [tree]
    for node in found:  # it grows while it is read: breadth first
        for block in ("body", "cases", "handlers", "orelse", "finalbody"):
            found.extend(getattr(node, block, []))
    return found


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
    names = []
    kept = []
    for package, file in files:
        inner = file.relative_to(roots[package])
        if left_out & set(inner.parts):
            continue
        if package == "transformers" and inner.parts[0] == "models":  # the same text, 400 times
            continue
        names.append(f"{package}/{inner.as_posix()}")
        kept.append(file)
    gc.disable()  # else a third of the time goes into looking for garbage among the syntax trees
    found = on_all_cores(docstrings_in, kept, "documentation strings")
    gc.enable()
    return sources | dict(zip(names, found, strict=True))


def docstrings_in(file: Path) -> list[str]:
    """The documentation strings of a source file, in order; none if it cannot be parsed."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    with (
        contextlib.suppress(SyntaxError, ValueError, OSError),
        warnings.catch_warnings(action="ignore"),
    ):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = [node for node in statements(tree) if isinstance(node, documented)]
        docstrings = [ast.get_docstring(node) for node in nodes]
        return [text for text in docstrings if text]
    return []


def on_all_cores(function: Callable[[Path], Any], files: list[Path], about: str) -> list[Any]:
    """function(file) of every file, in order.

    On Linux up to four processes share the files: threads would share one interpreter. What does
    not come back from a process is computed here.
    """
    n = min(4, os.cpu_count() or 1)
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        n = 1  # elsewhere a new process would first import everything anew
    context = multiprocessing.get_context("fork" if n > 1 else None)
    receivers = {}
    for first in range(1, n):
        with contextlib.suppress(OSError):  # no process, or no pipe, to be had
            receiver, sender = context.Pipe(duplex=False)
            arguments = (function, files[first::n], receiver, sender)
            context.Process(target=send_results, args=arguments, daemon=True).start()
            sender.close()  # the process has its own: this one would keep the pipe open
            receivers[first] = receiver

    found: list[Any] = [None] * len(files)
    for first in range(n):
        part = files[first::n]
        try:
            found[first::n] = receivers[first].recv()
        except (KeyError, EOFError, OSError):  # this process's part, or that of one which ended
            found[first::n] = [
                function(file) for file in tqdm(part, about, unit="file", disable=None)
            ]
    return found


def send_results(
    function: Callable[[Path], Any], files: list[Path], receiver: Any, sender: Any
) -> None:
    """function(file) of every file, in another process, for the one that asked."""
    receiver.close()  # a copy of that one's: while it is open, sending waits for somebody to read
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that one is interrupted, and ends this one
    with contextlib.suppress(OSError):  # it is there no more
        sender.send([function(file) for file in files])


# <<< shared: builtin


# >>> shared: pages ---- edit in hero_head_analysis.py, then: python tools/check_copies.py --fix
def render_page(template: str, **values: Any) -> str:
    """A self-contained HTML page: the template of the folder pages/ beside this script, filled
    with `values`, all of which are escaped. Raises HandoffError where that folder is missing.

    A template may use, beside `values`:
        text | gloss             words of pages/glossary.json tell what they mean
        figure(png, alt)         the figure at that path, sharp and in the colours of the page
        value | three_digits     a number as a reader wants it
    """
    import jinja2
    import markupsafe

    folder = Path(__file__).resolve().parent / "pages"
    for name in (template, "glossary.json"):
        if not (folder / name).is_file():
            script = Path(__file__).name
            raise HandoffError(f"no {name}: the page needs the folder pages/ beside {script}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not a gap in the page
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    meanings = json.loads((folder / "glossary.json").read_text(encoding="utf-8"))
    environment.filters["gloss"] = lambda text: markupsafe.Markup(gloss(text, meanings))
    environment.filters["three_digits"] = three_digits
    environment.globals["figure"] = lambda png, alt: markupsafe.Markup(figure_html(png, alt))
    return environment.get_template(template).render(values)


def three_digits(value: Any) -> str:
    """A value as text: at most three significant digits, whole numbers whole, a dash where there
    is none."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, (int, float, np.integer, np.floating)):
        return str(value)
    number = float(value)
    if math.isnan(number):
        return "–"
    if number.is_integer() or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) >= 1e-4 else f"{number:.1e}"


def gloss(text: object, meanings: dict[str, str]) -> str:
    """HTML of a text, in which the first use of each word of `meanings` tells what it means when it
    is pointed at or focused."""
    longest_first = sorted(meanings, key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})s?\b")
    told = set()

    def explain(match: re.Match[str]) -> str:
        word = match[1]
        if word in told:
            return match[0]
        told.add(word)
        meaning = html.escape(meanings[word])
        return f'<abbr tabindex="0" title="{meaning}">{match[0]}</abbr>'

    return pattern.sub(explain, html.escape(str(text)))


def figure_html(png: str | Path, alt: str) -> str:
    """HTML of a figure of `save_figure`: its SVGs, one for wide and one for narrow screens, in the
    colours of the page; the PNG itself where they are missing, large or not what matplotlib
    writes."""
    png = Path(png)
    found = []
    for name, ending in {"wide": ".svg", "narrow": ".narrow.svg"}.items():
        path = png.with_suffix(ending)
        drawn = inline_svg(path, alt) if path.is_file() else ""
        if not drawn:
            content = base64.b64encode(png.read_bytes()).decode()
            return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{content}">'
        found.append(f'<div class="{name}">{drawn}</div>')
    return "".join(found)


SVG_BYTES = 600_000  # a figure of more is shown as PNG
SVG = "{http://www.w3.org/2000/svg}"
SVG_TAGS = "svg g path defs use clipPath rect text tspan image style metadata"


def inline_svg(path: Path, alt: str) -> str:
    """An SVG that matplotlib wrote as HTML: black is the colour of the page's text, white that of
    its ground. Empty if it is too large or damaged, or could do more than be seen."""
    content = path.read_text(encoding="utf-8", errors="replace")
    if len(content) > SVG_BYTES:
        return ""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return ""
    known = {SVG + tag for tag in SVG_TAGS.split()}
    for element in root.iter():
        if element.tag in (SVG + "metadata", SVG + "style"):
            element.clear()
            continue
        for name, value in element.attrib.items():
            is_link = name.endswith("href") and not value.startswith(("#", "data:image/png"))
            asks = "url(" in value.replace("url(#", "")  # for something outside the file
            if is_link or asks or name.startswith("on"):
                return ""
            if name in ("style", "fill", "stroke"):
                themed = value.replace("#000000", "currentColor")
                element.attrib[name] = themed.replace("#ffffff", "var(--paper)")
        if element.tag not in known and not element.tag.startswith("{http://www.w3.org/1999/02"):
            return ""
    # The page sets its size
    width = root.attrib.pop("width", "").removesuffix("pt")
    root.attrib.pop("height", None)
    root.attrib |= {"role": "img", "aria-label": alt, "style": f"max-width: {width or 700}pt"}
    ElementTree.register_namespace("", SVG.strip("{}"))
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


# <<< shared: pages


# >>> shared: ratios ---- edit in hero_head_analysis.py, then: python tools/check_copies.py --fix
N_BOOTSTRAP = 10_000  # resamples behind every interval of a ratio
MOST_COUNTS = 2**23  # of units in them, if those are 1,000 or more


@dataclass
class Ratio:
    """A ratio of sums and its 95 % interval."""

    value: float
    low: float  # nan below the least number of units, infinite where nothing bounds it
    high: float


def ratio_of_sums(top: np.ndarray, bottom: np.ndarray, least: int, tests: int = 1) -> Ratio:
    """sum(top) / sum(bottom) over n independent units [n], and its 95 % interval from `least` units
    on, Bonferroni-corrected for `tests` intervals.

    The interval holds each ratio r for which top - r bottom has a mean near enough to 0, counted in
    standard errors t (Fieller 1954). How near is the further of two: the bootstrap-t (Hall 1988;
    Efron & Tibshirani 1993, 12.5), for skewed units, and Student's t, for tails on both sides.

    An end is infinite where nothing bounds it: where sum(bottom) is not told from 0, or where so
    few units differ from the others that too many resamples have none of them.
    """
    if bottom.sum() < 0:  # the same ratio, with a positive denominator
        top = -top
        bottom = -bottom
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(top.sum() / bottom.sum())
        error = top - value * bottom  # [n], of sum 0
    n = len(top)
    if n < least:
        return Ratio(value, math.nan, math.nan)
    if np.abs(error).max() <= 1e-12 * np.abs(top).max():  # all units are alike
        return Ratio(value, value, value)
    tail = 0.025 / tests
    t_low, t_high = np.quantile(bootstrap_t(error), [tail, 1 - tail], method="nearest")
    student = stats.t.ppf(1 - tail, n - 1)
    low = ratio_at(max(t_high, student), top, bottom)  # the larger the ratio, the smaller t
    high = ratio_at(min(t_low, -student), top, bottom)
    return Ratio(value, low, high)


def bootstrap_t(error: np.ndarray) -> np.ndarray:
    """Errors [n], which sum to 0 -> mean over standard error in resamples of them [draws];
    infinite where a resample has no variance."""
    n = len(error)
    error = error / np.sqrt((error**2).mean())  # no unit: then rounding is around 1e-16
    moments = resamples(n) @ np.stack((error, error**2), 1) / n  # [draws, 2]
    mean = moments[:, 0]
    variance = moments[:, 1] - mean**2
    se = np.sqrt(np.where(variance > 1e-12, variance, 0) / (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(mean) < 1e-12, 0, mean / se)


@functools.lru_cache(maxsize=4)
def resamples(n: int) -> np.ndarray:
    """How often each of n units is in each resample [draws, n]: the same for every interval, so
    that they stay paired. Of very many units there are fewer, for memory."""
    draws = max(1000, min(N_BOOTSTRAP, MOST_COUNTS // n))
    picked = np.random.default_rng(0).integers(n, size=(draws, n))
    place = picked + n * np.arange(draws)[:, None]  # of each picked unit's count among all
    counts = np.bincount(place.ravel(), minlength=draws * n)
    return counts.reshape(draws, n).astype(float)


def ratio_at(t: float, top: np.ndarray, bottom: np.ndarray) -> float:
    """The ratio r at which top - r bottom [n] has a mean of t standard errors: a root of
    a r^2 - 2 b r + c = 0. Infinite where there is none: the mean of bottom is itself too near 0."""
    side = -float(np.sign(t))
    if math.isinf(t):
        return side * math.inf
    covariance = np.cov(top, bottom) / len(top)  # [2, 2], of the two means
    a = bottom.mean() ** 2 - t**2 * covariance[1, 1]
    b = top.mean() * bottom.mean() - t**2 * covariance[0, 1]
    c = top.mean() ** 2 - t**2 * covariance[0, 0]
    if not a > 0:
        return side * math.inf
    return float((b + side * math.sqrt(max(0.0, b * b - a * c))) / a)


# <<< shared: ratios


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error of one line, 2 for a wrong command line."""
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

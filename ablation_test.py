"""Measure the loss impact of ablating each attention head: is one a Hero Head? (phase 4)

Question: how much worse does the model predict without one head, and does one head stand out from
the others by more than chance? One head at a time loses its output z, which is replaced by its mean
(mean: ranks the heads), by zero (the published ablation), or by the z of other sequences at the
same positions (resample: the loss is averaged over draws). The loss is exact: only what follows the
head is computed again. The unit of replication is the document, since sequences of one document are
alike; all heads and both models see the same ones. The first head is a Hero Head if it leads every
other head by more than chance (two tied heads are called so in about 5 %), its impact is above 0
(max-T p < .05), and the model beats word frequencies; otherwise there is "no unique hero". With
fewer than 32 documents there is no interval, no p value and no Hero Head: they would not be what
they say.

The exact effect of a head is dear: a pass of its own. Its first-order effect is cheap: one backward
pass gives those of all heads. Over sequences the two move together, so the first-order effect of
the whole split steadies the exact effect of some of its sequences (a control variate): the same
quantity, with a smaller standard error. --plain does without.

Every loss, and every z of another sequence, is of the validation split. The means of z and the word
frequencies are of the training split.

Reads   checkpoints of janus_adaptive.py with their tokenizer.json; the text that they name
Writes  <stem>.csv           a row a run, mode and head: impact (nats a token), interval, p values
        <stem>.npz           behind it, float64: base [sequences], the loss without ablation; loss,
                             KL, top-1 flips, first-order effect [sequences, layers, H];
                             documents [sequences], the number of the document of each; and of
                             the split: base [windows], first-order effect [windows, layers, H]
        <stem>_summary.csv   a row a run and mode: Hero Head or none, and how unequal heads are
        <stem>_together.csv  what it costs to remove ever more heads, in the order of their impact,
                             the other way round, and at random
        <stem>_pairs.csv     the first heads in pairs: what both cost beyond each alone
        <stem>_figure4.png, <stem>_heatmap.png, <stem>_together.png, <stem>_table3.csv,
        <stem>_table3.md, and run.json
        METRICS.md explains each column.

Quick   python ablation_test.py --adaptive_model checkpoints/smoke/janus_adaptive_final.pt
        (15 s on one CPU core)
Full    python ablation_test.py --adaptive_model ./checkpoints/v1/janus_adaptive_final.pt \\
            --save_file results_ablation.csv
        (144 heads x 10 passes over the validation split: meant for a GPU; prints its time first)

Shapes  B batch, T tokens, D d_model, H heads, K d_head, L layers, V vocabulary,
        n units of replication, N windows of the validation split, R heads of all ablated layers.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before torch: a thread that waits for another leaves its core to whoever needs it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colors, ticker
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

CSV_SCHEMA = "janus.ablation/1"
LOSSES_SCHEMA = "janus.ablation_losses/1"
REMEDY = "python ablation_test.py --adaptive_model PATH"
# With fewer units there is no interval and no p value. Where half of the units do not know the
# first head, a 95 % interval of its cross-fitted impact holds 90 % of the time at 16, 93 % at 32
MIN_UNITS = 32
# n_seqs: validation sequences, 0 is all; n_linear: those of the first-order effects; n_together:
# those without several heads at once, 0 is none; n_mean: training sequences behind a mean;
# resample_draws: draws of a random mode; batch_size: sequences.
PHASE_PRESETS: dict[str, dict[str, int]] = {
    "full": dict(n_seqs=0, n_linear=0, n_together=256, n_mean=256, resample_draws=8, batch_size=4),
    "published": dict(
        n_seqs=0, n_linear=0, n_together=256, n_mean=256, resample_draws=8, batch_size=4
    ),
    "demo": dict(
        n_seqs=48, n_linear=384, n_together=48, n_mean=128, resample_draws=1, batch_size=4
    ),
    "smoke": dict(n_seqs=24, n_linear=96, n_together=0, n_mean=24, resample_draws=1, batch_size=12),
}


# -------------------------------------------------------------------------------- method: edit here
# The impact of a head is how much the loss rises when a substitute takes the place of its output z.
# Three tables are there to be added to: MODES, SCORES and CONCENTRATION.

# ---- what takes the place of a head's z


@dataclass
class Batch:
    """What a mode of ablation may use: the z that it replaces, and where other z come from.

    z        {layer: [B, T, H, K]} outputs of the heads, before the output projection; not to be
             changed in place. z at a later position has seen the targets of earlier ones, and
             would tell them: a substitute comes from the same or an earlier position
    mean_z   {layer: [H, K]} their means over the training split
    model    computes z of other tokens (`head_z`)
    val      the validation split, which the batch is from
    windows  [B] numbers of the batch's sequences in `val`
    fitted   {layer: [H, K]} what the mode's `fit` returned, or none
    seed     of --seed: the same draws for every model and batch size
    draw     which draw of a random mode this is, from 0
    """

    z: dict[int, Tensor]
    mean_z: dict[int, Tensor]
    model: NewGPT
    val: HFWikiTextLoader
    windows: np.ndarray
    seed: int
    draw: int = 0
    fitted: dict[int, Tensor] | None = None


@dataclass
class Mode:
    """A way to ablate a head.

    substitute  Batch -> {layer: what replaces z}, of a shape that broadcasts to [B, T, H, K]
    random      True: the substitute depends on `draw`, and scores are means over --resample_draws
    fit         what is learned before from text of the training split, or none: like
                `fit_constants`. Dear, so only for the heads of the second stage where there is one
    """

    substitute: Callable[[Batch], dict[int, Tensor]]
    random: bool = False
    fit: Callable[..., dict[int, Tensor]] | None = None


def mean_ablation(batch: Batch) -> dict[int, Tensor]:
    """The mean of z over the training split: the head still says what it says on average."""
    return batch.mean_z


def zero_ablation(batch: Batch) -> dict[int, Tensor]:
    """Nothing, which also takes away what the head says on average."""
    return {layer: torch.zeros_like(mean) for layer, mean in batch.mean_z.items()}


def resample_ablation(batch: Batch) -> dict[int, Tensor]:
    """z of another sequence of the validation split, at the same positions."""
    n_windows = batch.val.n_windows
    rng = np.random.default_rng(batch.seed)
    # Each window of the split has a shift of its own in each draw, whatever the batch is
    shifts = rng.integers(1, n_windows, size=(batch.draw + 1, n_windows))  # [draws so far, windows]
    shift = shifts[batch.draw, batch.windows]  # [B]
    donors = (batch.windows + shift) % n_windows  # [B], never the window itself
    tokens, _ = batch.val.batch(donors)  # [B, T]
    return head_z(batch.model, tokens, list(batch.z))


def optimal_ablation(batch: Batch) -> dict[int, Tensor]:
    """The constant that hurts least: what is lost with it is what the head says about this text,
    and no more. Source: Li and Janson 2024, arXiv 2409.09951. In a model that was trained on other
    text a constant also teaches it what is frequent in this one: then the loss falls."""
    assert batch.fitted is not None
    return batch.fitted


FIT_STEPS = 32
FIT_BATCH = 16  # windows of the training split in each step, other ones in every step
FIT_CHECK = 32  # further windows, which choose among what was found
FIT_RATE = 0.2  # of Adam, in standard deviations of z; falls linearly to 0


def fit_constants(
    model: NewGPT,
    tokens: Tensor,
    targets: Tensor,
    mean_z: dict[int, Tensor],
    chosen: dict[int, list[int]],
) -> dict[int, Tensor]:
    """{layer: [H, K]}: for each of the chosen {layer: heads} a constant under which the loss is
    small, by gradient steps from the mean; the mean for the other heads.

    tokens, targets [N, T]: the first FIT_CHECK windows choose for each head among the mean, zero
    and what was found on the way; the steps take FIT_BATCH others each. Without the choice the
    constants would follow the noise of the batches, and hurt more than the mean on other text.
    """
    layers = list(chosen)
    checked = clean_pass(model, tokens[:FIT_CHECK], targets[:FIT_CHECK], layers)
    spread = {layer: checked.z[layer].float().std((0, 1)) for layer in layers}  # [H, K]
    shift = {layer: torch.zeros_like(mean_z[layer], requires_grad=True) for layer in layers}
    optimizer = torch.optim.Adam(list(shift.values()), lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=FIT_STEPS)

    found = {layer: [mean_z[layer], torch.zeros_like(mean_z[layer])] for layer in layers}
    for step in range(FIT_STEPS):
        start = FIT_CHECK + step * FIT_BATCH
        rows = slice(start, start + FIT_BATCH)
        clean = clean_pass(model, tokens[rows], targets[rows], layers)
        optimizer.zero_grad()
        for layer, heads in chosen.items():
            with torch.enable_grad():
                constant = mean_z[layer] + shift[layer] * spread[layer]  # [H, K]
                losses = constant_losses(model, clean, layer, constant, heads)  # [C]
                losses.sum().backward()  # each depends on the constant of its own head alone
        optimizer.step()
        schedule.step()
        if (step + 1) % (FIT_STEPS // 4) == 0:
            for layer in layers:
                found[layer].append((mean_z[layer] + shift[layer] * spread[layer]).detach())

    # What is best for each head on text that none of it was found on
    constants = {}
    for layer, heads in chosen.items():
        candidates = torch.stack(found[layer])  # [6, H, K]
        by_candidate = [constant_losses(model, checked, layer, z, heads) for z in candidates]
        best = torch.stack(by_candidate).argmin(0)  # [C]
        constants[layer] = mean_z[layer].clone()
        constants[layer][heads] = candidates[best, heads]
    return constants


def constant_losses(
    model: NewGPT, clean: CleanPass, layer: int, constant: Tensor, heads: list[int]
) -> Tensor:
    """Mean loss [C] with each of the heads replaced in turn by its row of `constant` [H, K]."""
    scores = ablate_layer(model, clean, layer, constant, heads)
    return scores["loss"][1:].mean((1, 2))


# A new mode is a function and a line here. Of the modes that are measured the first one in this
# table ranks the heads.
MODES = {
    "mean": Mode(mean_ablation),
    "zero": Mode(zero_ablation),
    "resample": Mode(resample_ablation, random=True),
    "optimal": Mode(optimal_ablation, fit=fit_constants),
}
DEFAULT_MODES = ["mean", "zero", "resample"]  # the others are measured when --mode names them


def head_z(model: NewGPT, tokens: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """{layer: z [B, T, H, K]} of `layers` on tokens [B, T]; stops at the deepest."""
    tap: dict[str, Any] = {f"z.{layer}": None for layer in layers}
    x = model.embed(tokens.to(model.embedding.weight.device))  # [B, T, D]
    model.run_blocks(x, stop=max(layers) + 1, tap=tap)
    return {layer: tap[f"z.{layer}"] for layer in layers}


@torch.no_grad()
def training_means(
    model: NewGPT, train: HFWikiTextLoader, args: argparse.Namespace, autocast: Any
) -> dict[int, Tensor]:
    """{layer: mean z [H, K]} of --layers over --n_mean windows of the training split; float32."""
    windows = train.spread(args.n_mean)
    n_batches = math.ceil(len(windows) / args.batch_size)
    total = {layer: torch.zeros(()) for layer in args.layers}
    for batch in np.array_split(windows, n_batches):
        tokens, _ = train.batch(batch)  # [B, T]
        with autocast:
            z = head_z(model, tokens, args.layers)  # {layer: [B, T, H, K]}
        for layer in args.layers:
            batch_sum = z[layer].float().sum((0, 1))  # [H, K]
            total[layer] = total[layer].to(batch_sum.device) + batch_sum
    n_tokens = len(windows) * train.seq_len
    return {layer: z_sum / n_tokens for layer, z_sum in total.items()}


# ---- the loss without a head


def loss_score(log_q: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each variant, nats."""
    return -log_q_of(targets, log_q)


def kl_score(log_q: Tensor, _targets: Tensor) -> Tensor:
    """KL divergence from the clean model's distribution p to each variant's q, nats."""
    p = log_q[0].exp()  # [n, V]
    with torch.autocast(log_q.device.type, enabled=False):  # else the product is in bfloat16
        cross_entropy = -torch.linalg.vecdot(log_q, p)  # [1 + R, n]
    return cross_entropy - cross_entropy[0]  # row 0 is the entropy of p


def flip_score(log_q: Tensor, _targets: Tensor) -> Tensor:
    """1 where a variant's first guess is not the clean model's, else 0."""
    clean_guess = log_q[0].argmax(-1)  # [n]
    return (log_q_of(clean_guess, log_q) < log_q.amax(-1)).float()


# From log-probabilities log_q [1 + R, n, V], of which row 0 is the clean model's and the others are
# the variants', and targets [n]: a score of every token [1 + R, n]. Each is an array of the .npz.
SCORES = {"loss": loss_score, "kl": kl_score, "flip": flip_score}


def log_q_of(tokens: Tensor, log_q: Tensor) -> Tensor:
    """The log-probability [1 + R, n] that each variant gives to tokens [n]."""
    index = tokens[None, :, None].expand(len(log_q), -1, 1)  # [1 + R, n, 1]
    return log_q.gather(-1, index)[..., 0]


def token_scores(
    model: NewGPT, final: Tensor, targets: Tensor, names: Iterable[str] = SCORES
) -> dict[str, Tensor]:
    """Last residual streams [1 + R, N, D], the clean one first, and targets [N] -> {score: [1 + R,
    N]} for `names` of SCORES, float32.

    A few tokens at a time: the logits of all variants never exist at once. But 256 rows at least:
    with fewer a product reads all of a large unembedding for next to no work.
    """
    n_logits = 1 << (20 if final.device.type == "cpu" else 27)  # at once, about a cache
    n_rows = max(256, n_logits // model.cfg.vocab_size)
    n_tokens = max(1, n_rows // len(final))  # of each variant
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for x, y in zip(final.split(n_tokens, dim=1), targets.split(n_tokens), strict=True):
        log_q = model.unembed(x).float().log_softmax(-1)  # [1 + R, n, V]
        for name in parts:
            parts[name].append(SCORES[name](log_q, y))  # [1 + R, n]
    return {name: torch.cat(part, dim=1) for name, part in parts.items()}


@dataclass
class CleanPass:
    """What the model computes on a batch without ablation, for the layers that are ablated.

    z          {layer: [B, T, H, K]} outputs of the heads, before the output projection
    slope      {layer: [B, T, H, K]} d(mean loss of the sequence) / dz, nats per unit of z
    resid_pre  {layer: [B, T, D]} residual stream before the layer
    resid_mid  {layer: [B, T, D]} residual stream between attention and MLP
    final      [B, T, D] residual stream after the last block
    targets    [B, T] the tokens to predict
    loss       [B] mean loss of each sequence, nats a token
    """

    z: dict[int, Tensor]
    slope: dict[int, Tensor]
    resid_pre: dict[int, Tensor]
    resid_mid: dict[int, Tensor]
    final: Tensor
    targets: Tensor
    loss: Tensor


def clean_pass(model: NewGPT, tokens: Tensor, targets: Tensor, layers: list[int]) -> CleanPass:
    """The model without ablation on tokens [B, T]: a forward pass, where every ablation starts, and
    a backward pass, for the first-order effects."""
    tap: dict[str, Any] = {}  # its keys ask for activations, the forward pass fills them in
    for layer in layers:
        tap[f"resid_pre.{layer}"] = None
        tap[f"z.{layer}"] = None
        tap[f"resid_mid.{layer}"] = None
    with torch.enable_grad():
        # The weights take no gradient: the embedded tokens are where the graph begins
        x = model.embed(tokens).requires_grad_()  # [B, T, D]
        final = model.run_blocks(x, tap=tap)  # [B, T, D]
        rows = final.flatten(0, 1)[None]  # [1, B T, D]
        loss = token_scores(model, rows, targets.flatten(), ["loss"])["loss"]  # [1, B T]
        loss_sum = loss.sum() / targets.shape[1]  # over sequences, of their mean loss
        slopes = torch.autograd.grad(loss_sum, [tap[f"z.{layer}"] for layer in layers])
    return CleanPass(
        z={layer: tap[f"z.{layer}"].detach() for layer in layers},
        slope=dict(zip(layers, slopes, strict=True)),
        resid_pre={layer: tap[f"resid_pre.{layer}"].detach() for layer in layers},
        resid_mid={layer: tap[f"resid_mid.{layer}"].detach() for layer in layers},
        final=final.detach(),
        targets=targets,
        loss=loss.detach().unflatten(1, targets.shape)[0].mean(1),
    )


def ablate_layer(
    model: NewGPT,
    clean: CleanPass,
    layer: int,
    substitute: Tensor,
    heads: list[int] | None = None,
) -> dict[str, Tensor]:
    """Replaces z of each head of a layer in turn by `substitute` (broadcast to [B, T, H, K]) ->
    {score: [1 + H, B, T]} for SCORES; row 0 is the clean model. `heads`: of these alone, H is their
    number.

    Exact without attention of the layer or anything before it: a variant starts from the clean
    residual stream after attention plus (substitute - z)_h W_O,h. The heads run as one batch.
    """
    # What each head writes to the residual stream changes by this much when it alone is ablated
    block: Any = model.blocks[layer]
    z = clean.z[layer]  # [B, T, H, K]
    w_o = block.attn.w_o.weight.unflatten(1, z.shape[2:])  # [D, H, K]
    difference = substitute - z  # [B, T, H, K]
    if heads is not None:
        w_o = w_o[:, heads]
        difference = difference[:, :, heads]
    change = torch.einsum("bthk,dhk->hbtd", difference, w_o)  # [H, B, T, D]

    # The rest of the model, on all heads' variants at once
    if model.cfg.norm_after:  # the changed sum of what heads write passes through that norm anew
        written = block.attn.w_o(z.flatten(2)) + change  # [H, B, T, D]
        mid = clean.resid_pre[layer] + block.norm_attn_out(written)
    else:
        mid = clean.resid_mid[layer] + change  # [H, B, T, D]
    x = block.after_mlp(clean.resid_pre[layer], mid).flatten(0, 1)  # [H B, T, D]
    out = model.run_blocks(x, start=layer + 1)  # [H B, T, D]

    # Scored beside the clean model, token by token
    variants = torch.cat((clean.final, out))  # [(1 + H) B, T, D]
    variants = variants.unflatten(0, (-1, len(z))).flatten(1, 2)  # [1 + H, B T, D]
    scores = token_scores(model, variants, clean.targets.flatten())  # [1 + H, B T] each
    return {name: score.unflatten(1, z.shape[:2]) for name, score in scores.items()}


def first_order(clean: CleanPass, layer: int, substitute: Tensor) -> Tensor:
    """Change of a sequence's loss [B, H] by ablating each head, to first order: the sum over its
    tokens of (substitute - z) . dloss/dz."""
    change = (substitute - clean.z[layer]).float()  # [B, T, H, K]
    return (change * clean.slope[layer].float()).sum((1, 3))  # [B, H]


def ablate_heads(
    model: NewGPT,
    clean: CleanPass,
    substitute: dict[int, Tensor],
    chosen: dict[int, list[int]] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Puts `substitute` {layer: z} in the place of z of every head in turn -> the clean loss [B],
    and {score: [B, layers, H]} for SCORES and first_order; means over tokens, float64. `chosen`
    {layer: heads}: of these alone, and NaN for the others."""
    effects: dict[str, list[np.ndarray]] = {name: [] for name in [*SCORES, "first_order"]}
    for layer, z in clean.z.items():
        heads = list(range(z.shape[2])) if chosen is None else chosen[layer]  # C of them
        given = None if chosen is None else heads
        scores = ablate_layer(model, clean, layer, substitute[layer], given)  # [1 + C, B, T] each
        of_heads = {"first_order": first_order(clean, layer, substitute[layer])}  # [B, H]
        for name, score in scores.items():
            means = score.mean(-1)  # [1 + C, B]
            of_heads[name] = means.new_full((z.shape[0], z.shape[2]), math.nan)
            of_heads[name][:, heads] = means[1:].T
        for name, values in of_heads.items():
            effects[name].append(values.cpu().double().numpy())
    # Row 0 went through the same product as the ablated ones, so that its rounding is theirs
    base = scores["loss"][0].mean(-1).cpu().double().numpy()  # [B]
    return base, {name: np.stack(layers, axis=1) for name, layers in effects.items()}


def first_order_heads(
    _model: NewGPT, clean: CleanPass, substitute: dict[int, Tensor]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `ablate_heads` returns, as far as the clean pass knows it: no head is ablated."""
    effects = [first_order(clean, layer, substitute[layer]) for layer in clean.z]  # [B, H] each
    stacked = torch.stack(effects, dim=1)  # [B, layers, H]
    base = clean.loss.cpu().double().numpy()  # [B]
    return base, {"first_order": stacked.cpu().double().numpy()}


# ---- what heads do together


def joint_loss(
    model: NewGPT,
    tokens: Tensor,
    targets: Tensor,
    mean_z: dict[int, Tensor],
    removed: dict[int, Tensor],
) -> Tensor:
    """Loss of each sequence [S, B], nats a token, when all heads of a set are replaced by their
    means at once. tokens, targets [B, T]; removed {layer: [S, H] bool}, a row a set."""
    n_layers = len(model.blocks)
    n_sets = len(next(iter(removed.values())))
    n_sequences, n_tokens = tokens.shape
    # Up to the first layer of which something is removed all sets are one, the clean model
    first = min([layer for layer in removed if removed[layer].any()], default=n_layers)
    clean = model.run_blocks(model.embed(tokens), stop=first)  # [B, T, D]
    # Then all sets are one batch; each head reads what the model without its set has written so far
    x = clean.repeat(n_sets, 1, 1)  # [S B, T, D]
    for layer in range(first, n_layers):
        block: Any = model.blocks[layer]
        rotary = model.rotary(layer, n_tokens)
        z, _ = block.attn(block.norm_attn(x), *rotary)  # [S B, T, H, K]
        if layer in removed:
            is_gone = removed[layer].repeat_interleave(n_sequences, dim=0)  # [S B, H]
            z = torch.where(is_gone[:, None, :, None], mean_z[layer].to(z.dtype), z)
        x = block.after_mlp(x, x + block.write(z))
    final = x.unflatten(0, (n_sets, n_sequences)).flatten(1, 2)  # [S, B T, D]
    loss = token_scores(model, final, targets.flatten(), ["loss"])["loss"]  # [S, B T]
    return loss.unflatten(1, targets.shape).mean(-1)


RANDOM_ORDERS = 10
STEPS = 6  # in which all heads are removed, largest or smallest impact first
RANDOM_STEPS = 3  # in a random order, the last of which removes all and is left out
PAIRED = 6  # heads of largest impact whose pairs are measured
LOUD = 2  # further ones that write most: of two copies of a head neither has an impact alone
WRITTEN = 16  # sequences that tell how much heads write


def write_size(
    model: NewGPT, tokens: Tensor, mean_z: dict[int, Tensor], layers: list[int]
) -> np.ndarray:
    """How much each head says beyond what it says on average [R]: the mean over tokens [B, T] of
    the norm of (z - mean z)_h W_O,h, before a norm that may follow attention."""
    sizes = []
    for layer, z in head_z(model, tokens, layers).items():
        attention: Any = model.blocks[layer].attn
        w_o = attention.w_o.weight.unflatten(1, z.shape[2:])  # [D, H, K]
        written = torch.einsum("bthk,dhk->bthd", z.float() - mean_z[layer], w_o.float())
        sizes.append(written.norm(dim=-1).mean((0, 1)))  # [H]
    return torch.cat(sizes).cpu().double().numpy()  # [R]


def plan_sets(impact: np.ndarray, size: np.ndarray, seed: int) -> tuple[list[str], np.ndarray]:
    """Which heads to remove together, by their impact [R] and how much they write [R] -> the kind
    of each set, and the sets [S, R] bool: none; ever more of the first, the last, those that write
    least, and random ones; the first and the loudest heads alone and in pairs."""
    n_heads = len(impact)
    by_impact = np.argsort(-impact, kind="stable")  # [R]
    orders = {"largest first": by_impact, "smallest first": by_impact[::-1]}
    orders["quietest first"] = np.argsort(size, kind="stable")
    rng = np.random.default_rng(seed)
    for i in range(RANDOM_ORDERS):
        orders[f"random {i}"] = rng.permutation(n_heads)
    members: list[tuple[str, np.ndarray]] = [("none", by_impact[:0])]
    for name, order in orders.items():
        is_random = name.startswith("random")
        sizes = set_sizes(n_heads, RANDOM_STEPS)[:-1] if is_random else set_sizes(n_heads, STEPS)
        members += [(name, order[:n_removed]) for n_removed in sizes]
    rest = by_impact[PAIRED:]
    loudest = rest[np.argsort(-size[rest], kind="stable")][:LOUD]
    paired = [*by_impact[:PAIRED], *loudest]
    members += [("alone", np.array([head])) for head in paired]
    members += [("pair", np.array(pair)) for pair in itertools.combinations(paired, 2)]
    sets = np.zeros((len(members), n_heads), dtype=bool)
    for row, (_, heads) in zip(sets, members, strict=True):
        row[heads] = True
    return [name for name, _ in members], sets


def set_sizes(n_heads: int, n_steps: int) -> list[int]:
    """Numbers of heads to remove: about evenly spaced, up to all."""
    return sorted({round(n_heads * k / n_steps) for k in range(1, n_steps + 1)} - {0})


def interactions(alone: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """What two heads cost together beyond what each costs alone, in each unit [n, P].

    Above 0: each stands in for the other (a backup), and losing both is worse than the sum. Below
    0: both serve one purpose, which is lost with either.

    alone [n, C]: the cost of each head; pairs [n, P]: of each of the P = C (C - 1) / 2 pairs, in
    the order of itertools.combinations.
    """
    i, j = np.array(list(itertools.combinations(range(alone.shape[1]), 2))).T  # [P] each
    return pairs - alone[:, i] - alone[:, j]


def heads_to_spare(cost: np.ndarray, sizes: np.ndarray, limit: float) -> float:
    """How many heads can go, in the order in which they went, before the cost [sizes] of the first
    `sizes` of them reaches `limit`; between two sizes by a straight line."""
    cost = np.concatenate(([0.0], cost))
    sizes = np.concatenate(([0], sizes))
    too_dear = np.flatnonzero(cost >= limit)
    if not len(too_dear):
        return float(sizes[-1])
    k = too_dear[0]
    share = (limit - cost[k - 1]) / (cost[k] - cost[k - 1])
    return float(sizes[k - 1] + share * (sizes[k] - sizes[k - 1]))


# ---- is one head a Hero Head?
# delta [n, R]: what each of R heads costs in each of n units of replication, nats a token.


@dataclass
class Bootstrap:
    """Paired bootstrap: one set of resamples of the units for all columns.

    mean  [draws, C] mean of each column
    t     [draws, C] studentised: (mean - mean of the sample) / standard error of the resample
    """

    mean: np.ndarray
    t: np.ndarray


@dataclass
class HeadStatistics:
    """What is said of the heads of one run under one mode.

    columns   {column of the CSV: [R]}
    hero      the head of largest impact, 0 <= hero < R; second: the next one
    summary   {column of the summary: value}
    crossfit  [n] values of `cross_fit`, or none where there are too few units
    """

    columns: dict[str, np.ndarray]
    hero: int
    second: int
    summary: dict[str, Any]
    crossfit: np.ndarray


def units(values: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Per-sequence values [sequences, R] and the document of each -> a value a document [n, R],
    with the same mean.

    A document of many sequences weighs more: it lies as much further from the mean.
    """
    _, unit = np.unique(documents, return_inverse=True)  # [sequences], 0 to n - 1
    mean = values.mean(0)  # [R]
    deviation = np.zeros((unit.max() + 1, values.shape[1]))  # [n, R]
    np.add.at(deviation, unit, values - mean)
    return mean + deviation * len(deviation) / len(values)


# The control variate: what is estimated stays the mean exact effect, over the whole split.


def steady(
    exact: np.ndarray, linear: np.ndarray, split_mean: np.ndarray, documents: np.ndarray
) -> np.ndarray:
    """Effects of the heads in some sequences -> values [sequences, R], whose mean estimates the
    mean exact effect over the whole split, with no more noise than that of `exact`.

    A sequence in which the first-order effect is above its mean over the split probably has an
    exact effect above its own: so much is taken off, by the regression of one on the other.
    Source: control variates, e.g. Owen, Monte Carlo theory, 8.9. Where effects have heavy tails
    this may do harm: a head whose standard error would be larger keeps its exact effects. Where
    that decides, both are nearly the same, so that its interval holds as often.

    exact       [sequences, R] change of the loss, nats a token
    linear      [sequences, R] the same to first order
    split_mean  [R] mean of `linear` over all windows of the split
    documents   [sequences] number of the document of each
    """
    slope = slope_of_others(linear, exact, documents)  # [sequences, R]
    steadied = exact - slope * (linear - split_mean)
    spread, plain_spread = (units(one, documents).std(0) for one in (steadied, exact))  # [R] each
    return np.where(spread < plain_spread, steadied, exact)


def units_elsewhere(
    exact: np.ndarray,
    linear: np.ndarray,
    split_linear: np.ndarray,
    documents: np.ndarray,
    split_documents: np.ndarray,
) -> np.ndarray:
    """What `units` returns, for statements about other documents, of which those of the split are a
    sample: a value a document of the split [documents, R], with the steadied impact as mean.

    exact, linear [sequences, R], split_linear [N, R]: effects; the document of each row of them.
    """
    spread = np.maximum(linear.var(0), 1e-300)
    slope = ((linear - linear.mean(0)) * (exact - exact.mean(0))).mean(0) / spread  # [R]
    rest = exact - slope * linear  # [sequences, R], what first-order effects do not know
    known = slope * split_linear  # [N, R], what they know
    # By how much each document moves the estimate, through either part
    numbers = np.union1d(split_documents, documents)  # a few windows may miss some documents
    split_unit = np.searchsorted(numbers, split_documents)
    unit = np.searchsorted(numbers, documents)
    moves = np.zeros((len(numbers), exact.shape[1]))
    np.add.at(moves, unit, (rest - rest.mean(0)) / len(rest))
    np.add.at(moves, split_unit, (known - known.mean(0)) / len(known))
    return rest.mean(0) + known.mean(0) + len(moves) * moves


def slope_of_others(x: np.ndarray, y: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Slope of y on x [sequences, R], for each sequence fitted to the other documents alone -> the
    same shape.

    A slope that knew the sequence would follow its noise, and bias the mean. Where x and y have
    little to do with one another it shrinks to 0: fitting it would add more noise than it takes.
    """
    _, unit = np.unique(documents, return_inverse=True)  # [sequences], 0 to n - 1

    def of_others(values: np.ndarray) -> np.ndarray:
        """Sums of values [sequences, C] over all sequences of other documents, same shape."""
        own = np.zeros((unit.max() + 1, values.shape[1]))  # [n, C]
        np.add.at(own, unit, values)
        return values.sum(0) - own[unit]

    x = x - x.mean(0)  # sums of squares lose no digits
    y = y - y.mean(0)
    count = of_others(np.ones((len(x), 1)))  # [sequences, 1]
    x_sum = of_others(x)  # [sequences, R]
    y_sum = of_others(y)
    xx = of_others(x * x) - x_sum**2 / count
    yy = of_others(y * y) - y_sum**2 / count
    xy = of_others(x * y) - x_sum * y_sum / count
    with np.errstate(divide="ignore", invalid="ignore"):
        # F statistic of the regression: about 1 where there is no relation
        squared = xy**2 / (xx * yy)  # of the correlation
        f = squared * (count - 2) / (1 - squared)
        slope = xy / xx * np.maximum(0, 1 - 1 / f)
    return np.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the columns of x and y [n, R] -> [R]; 0 where one is constant."""
    x = x - x.mean(0)
    y = y - y.mean(0)
    norms = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return (x * y).sum(0) / np.maximum(norms, 1e-300)


def head_statistics(delta: np.ndarray, draws: int, seed: int) -> HeadStatistics:
    """Impact of every head with its uncertainty, and whether the first head is a Hero Head."""
    impact = delta.mean(0)  # [R]
    order = np.argsort(-impact, kind="stable")
    hero = int(order[0])
    second = int(order[1])
    costs = np.maximum(impact, 0)  # [R]
    columns = {
        "impact": impact,
        "share": costs / max(costs.sum(), 1e-300),
        "rank": stats.rankdata(-impact, "ordinal").astype(int),
    }
    summary = {
        "n_unit": len(delta),
        "delta": impact[hero],
        "gap": impact[hero] - impact[second],
        "n_negative": (impact < 0).sum(),
        "negative_sum": np.minimum(impact, 0).sum(),
        **concentration_columns(delta, seed),
    }
    if len(delta) < MIN_UNITS:
        columns |= {name: np.full(len(impact), math.nan) for name in UNCERTAIN_COLUMNS}
        summary |= dict.fromkeys(UNCERTAIN_SUMMARY, math.nan)
        summary["unique_hero"] = False
        return HeadStatistics(columns, hero, second, summary, crossfit=np.empty(0))

    # How much of this may be chance: all heads on the same resamples of the units
    bootstrap = bootstrap_units(delta, draws, seed)
    columns |= uncertain_columns(delta, bootstrap)
    crossfit = cross_fit(delta, seed)  # [n]
    crossfit_lo, crossfit_hi = mean_interval(crossfit, draws, seed)
    gap_lo, gap_hi = lead_interval(delta, hero, draws, seed)
    heads, heads_lo, heads_hi = effective_heads(delta, draws, seed)

    # What these units can tell of a head of median noise: how large t must be for p_maxT < .05,
    # and how much larger it is to be so in 80 % of samples
    critical_t = np.quantile(bootstrap.t.max(1), 0.95)
    power_t = stats.norm.ppf(0.8)
    median_se = np.median(columns["se"])
    summary |= {
        "p_top1": columns["p_top1"][hero],
        "p_maxT": columns["p_maxT"][hero],
        "gap_lo": gap_lo,
        "gap_hi": gap_hi,
        "crossfit": crossfit.mean(),
        "crossfit_lo": crossfit_lo,
        "crossfit_hi": crossfit_hi,
        "unique_hero": is_unique_hero(gap_lo, columns["p_maxT"][hero]),
        "noise_limit": critical_t * median_se,
        "min_detectable": (critical_t + power_t) * median_se,
        "effective_heads": heads,
        "effective_heads_lo": heads_lo,
        "effective_heads_hi": heads_hi,
    }
    return HeadStatistics(columns, hero, second, summary, crossfit)


# Empty where there are fewer than MIN_UNITS
UNCERTAIN_COLUMNS = ["se", "ci_lo", "ci_hi", "ci_all_lo", "ci_all_hi", "p_maxT", "q_bh", "p_top1"]
ERRORS_BESIDE = ["se_plain", "se_elsewhere"]  # empty there too
UNCERTAIN_SUMMARY = [
    *("p_top1", "p_maxT", "gap_lo", "gap_hi", "crossfit", "crossfit_lo", "crossfit_hi"),
    *("noise_limit", "min_detectable"),
    *("effective_heads", "effective_heads_lo", "effective_heads_hi"),
]


def is_unique_hero(gap_lo: float, p_max_t: float) -> bool:
    """Whether the first head is ahead of every other head by more than chance, and costs anything
    at all by more than chance."""
    return bool(gap_lo > 0 and p_max_t < 0.05)


def uncertain_columns(delta: np.ndarray, bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """Columns [R] of the CSV that resamples of the units give: intervals, p values, leads.

    p values are one-sided, for impact > 0. Both compare t with the bootstrap's t of all heads,
    since that of one head alone is too light in the tail: p_maxT with the largest of a resample
    (family-wise), q_bh with how many heads exceed it by chance (false discovery rate).
    """
    draws, n_heads = bootstrap.t.shape
    se = standard_error(delta)  # [R]
    t = delta.mean(0) / se  # [R]
    # In how many resamples does chance give as much to any of the heads, and to how many of them?
    largest = np.sort(bootstrap.t.max(1))  # [draws]
    n_anywhere = draws - np.searchsorted(largest, t)  # [R]
    pooled = np.sort(bootstrap.t, axis=None)  # [draws R]
    n_of_all = draws * n_heads - np.searchsorted(pooled, t)  # [R]
    # Intervals: of one head by itself, and so wide that 95 % of samples have none that misses
    ci_lo, ci_hi = interval(delta, bootstrap.t)
    ci_all_lo, ci_all_hi = interval(delta, bootstrap.t, together=True)
    n_leads = np.bincount(bootstrap.mean.argmax(1), minlength=n_heads)  # [R]
    return {
        "se": se,
        "ci_lo": ci_lo,
        "ci_hi": ci_hi,
        "ci_all_lo": ci_all_lo,
        "ci_all_hi": ci_all_hi,
        "p_maxT": (1 + n_anywhere) / (draws + 1),
        "q_bh": stats.false_discovery_control((1 + n_of_all) / (draws * n_heads + 1)),
        "p_top1": n_leads / draws,
    }


def bootstrap_units(values: np.ndarray, draws: int, seed: int) -> Bootstrap:
    """Means of values [n, C] over resamples of the n units, and their t."""
    n, n_columns = values.shape
    means = bootstrap_means(np.hstack((values, values**2)), draws, seed)  # [draws, 2 C]
    mean = means[:, :n_columns]  # [draws, C]
    square = means[:, n_columns:]  # [draws, C]
    variance = np.maximum(square - mean**2, 0) / (n - 1)  # of the resample's mean
    t = (mean - values.mean(0)) / np.maximum(np.sqrt(variance), 1e-12)
    return Bootstrap(mean, t)


def bootstrap_means(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means of columns [n, C] over resamples of the n units -> [draws, C]. One seed, one set of
    resamples: heads, modes and runs stay paired."""
    n = len(columns)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, 500):  # some at a time, to bound the memory
        size = min(500, draws - start)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size)  # [size, n], how often each unit
        means.append(counts @ columns / n)  # [size, C]
    return np.concatenate(means)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over units [n, C] -> [C]; the floor only guards divisions."""
    return np.maximum(values.std(0, ddof=1) / math.sqrt(len(values)), 1e-12)


def interval(
    values: np.ndarray, t: np.ndarray, together: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of the means of values [n, C], whose bootstrap has t [draws, C] -> their ends,
    [C] each; `together`: all C hold at once in 95 %.

    Each end is the wider of Student's t, which heavy tails need, and of the studentised bootstrap,
    which skew needs.
    """
    n, n_columns = values.shape
    tail = 0.025
    if together:
        highest = np.quantile(t.max(1), 1 - tail)
        lowest = np.quantile(t.min(1), tail)
        student = stats.t.ppf(1 - tail / n_columns, n - 1)
    else:
        highest = np.quantile(t, 1 - tail, axis=0)  # [C]
        lowest = np.quantile(t, tail, axis=0)  # [C]
        student = stats.t.ppf(1 - tail, n - 1)
    mean = values.mean(0)  # [C]
    se = standard_error(values)  # [C]
    low = mean - np.maximum(highest, student) * se
    high = mean - np.minimum(lowest, -student) * se
    return low, high


def mean_interval(values: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of values [n]."""
    column = values[:, None]  # [n, 1]
    low, high = interval(column, bootstrap_units(column, draws, seed).t)
    return low[0], high[0]


def lead_interval(delta: np.ndarray, hero: int, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of what the first head costs more than the largest other one.

    The lead over the largest other head is the least of all leads, and at least what the intervals
    of all leads allow. The low end needs no correction for their number; nor for the choice of the
    first head, since the interval is two-sided (Hung and Fithian 2019): of two tied heads the one
    in front is called ahead in 5 %.
    """
    lead = delta[:, [hero]] - np.delete(delta, hero, axis=1)  # [n, R - 1]
    t = bootstrap_units(lead, draws, seed).t  # [draws, R - 1]
    low, _ = interval(lead, t)
    _, high = interval(lead, t, together=True)
    return low.min(), high.min()


CHANCE_LOST = 0.01  # that the first head is not among those of the second stage


def may_lead(values: np.ndarray, chance: float = CHANCE_LOST) -> np.ndarray:
    """Which heads may still be the first, by few sequences: their numbers, the likeliest first; the
    first one is among them but for a probability of `chance`.

    values [n, R]. A head is let go if the one in front is ahead of it by a paired t test. That one
    was chosen among R - 1 others, so each test is at chance / (R - 1): the first head is lost only
    if one of the others beats it by that much (Bonferroni).
    """
    n, n_heads = values.shape
    impact = values.mean(0)
    if n == 1:  # one document tells nothing
        return np.argsort(-impact)
    leader = impact.argmax()
    lead = values[:, [leader]] - values  # [n, R]
    t = lead.mean(0) / standard_error(lead)  # [R]
    p = stats.t.sf(t, n - 1)  # that chance alone put the leader in front of each
    p[leader] = 1.0
    order = np.lexsort((-impact, -p))
    n_kept = (p > chance / (n_heads - 1)).sum()
    return order[: max(n_kept, 2)]  # the first, and one to compare it with


def p_missed(confirmed: np.ndarray, dropped: np.ndarray) -> float:
    """p value against "a head that was dropped is in truth the first".

    confirmed [n2, C]: the heads of the second stage, in its units; dropped [n, D]: the others, in
    those of the first. The first of the C must be above every one of the D by Welch's t test, so
    the largest p counts; it was picked as the largest of C, so times C (Bonferroni).
    """
    if dropped.shape[1] == 0:
        return 0.0
    first = confirmed[:, [confirmed.mean(0).argmax()]]  # [n2, 1]
    p = stats.ttest_ind(first, dropped, equal_var=False, alternative="greater").pvalue  # [D]
    return min(1.0, float(p.max() * confirmed.shape[1]))


def cross_fit(delta: np.ndarray, seed: int, halvings: int = 100) -> np.ndarray:
    """delta [n, R] -> values [n], whose mean is the first head's impact without the winner's curse,
    and whose spread is its uncertainty.

    One half of the units chooses the head that leads, the other half measures it, both ways,
    averaged over random halvings. What is estimated: the expected impact of the head that leads on
    half as many units. The values are jackknife pseudo-values: each unit is left out in turn, and
    the head chosen again.
    """
    n = len(delta)
    alternating = np.arange(n) % 2 == 0  # [n]
    rng = np.random.default_rng(seed)
    total = 0.0
    total_without = np.zeros(n)
    for _ in range(halvings):
        half = rng.permutation(alternating)
        for chooses in (half, ~half):
            votes = delta[chooses]  # [n / 2, R]
            votes_sum = votes.sum(0)  # [R]
            measured = delta[~chooses].sum(0)  # [R]
            leader = votes_sum.argmax()
            total += measured[leader]
            # Without a unit that chooses another head may lead; without one that measures the same
            leaders = (votes_sum - votes).argmax(1)  # [n / 2]
            total_without[chooses] += measured[leaders]
            total_without[~chooses] += measured[leader] - delta[~chooses, leader]
    return pseudo_values(total / halvings / n, total_without / halvings / (n - 1))


def pseudo_values(estimate: float, without: np.ndarray) -> np.ndarray:
    """An estimate, and what it is without each of n units [n] -> values [n] with the estimate as
    their mean, and with the jackknife's standard error as that of their mean."""
    n = len(without)
    return estimate - (n - 1) * (without - without.mean())


# ---- how unequal are the heads?
# `effective_heads` is corrected for noise and has an interval. The measures below it describe the
# sample, with its noise, which makes heads look more unequal than they are, or more equal: compare
# them with their null, and between runs of the same size.
# A measure takes d [rows, R], the impact of each head with negative impact counted as 0, in
# ascending order (the first head is d[:, -1]), and returns a value a row.


def effective_heads(delta: np.ndarray, draws: int, seed: int) -> tuple[float, float, float]:
    """(sum of impacts)^2 / (sum of their squares), k if k heads have all impact in equal parts;
    and its 95 % interval. NaN where noise hides it.

    Noise adds its variance to a square, but nothing to the product of two units: a square is
    estimated by the mean of such products.
    """
    total = delta.sum(1, keepdims=True)  # [n, 1], of all heads
    of_total = squared_means(total)[:, 0]  # [1 + n]
    of_heads = squared_means(delta).sum(1)  # [1 + n]
    if min(of_total.min(), of_heads.min()) <= 0:
        return math.nan, math.nan, math.nan
    logs = np.log(of_total / of_heads)  # [1 + n]
    low, high = mean_interval(pseudo_values(logs[0], logs[1:]), draws, seed)
    return math.exp(logs[0]), math.exp(low), math.exp(high)


def squared_means(values: np.ndarray) -> np.ndarray:
    """Square of the mean of values [n, C], without bias: of all units, and without each -> [1 + n,
    C]."""
    n = len(values)
    total = values.sum(0)  # [C]
    squares = np.square(values).sum(0)  # [C]
    of_all = (total**2 - squares) / (n * (n - 1))  # [C], mean over pairs of units
    squares_without = (total - values) ** 2 - (squares - values**2)  # [n, C]
    return np.vstack((of_all, squares_without / ((n - 1) * (n - 2))))


def shares(d: np.ndarray) -> np.ndarray:
    """Part of the total that each head has [rows, R], in ascending order."""
    return d / d.sum(1, keepdims=True)


def max_share(d: np.ndarray) -> np.ndarray:
    """Share of the first head."""
    return d[:, -1] / d.sum(1)


def top1_over_top2(d: np.ndarray) -> np.ndarray:
    """The first head over the second."""
    return d[:, -1] / d[:, -2]


def gini(d: np.ndarray) -> np.ndarray:
    """sum |d_i - d_j| / (2 R^2 mean): 0 if all are equal, 1 - 1/R if one head has everything."""
    n_heads = d.shape[1]
    rank = np.arange(1, n_heads + 1)
    return 2 * shares(d) @ rank / n_heads - (n_heads + 1) / n_heads


def exp_entropy(d: np.ndarray) -> np.ndarray:
    """exp of the entropy of the shares, a number of heads."""
    return np.exp(stats.entropy(shares(d), axis=1))


def robust_z(d: np.ndarray) -> np.ndarray:
    """(first - median) / (1.4826 median absolute deviation): in standard deviations."""
    median = np.median(d, axis=1)
    deviation = np.median(np.abs(d - median[:, None]), axis=1)
    return (d[:, -1] - median) / (1.4826 * deviation)


# A new measure is a function and a line here: it gets its null in the summary.
# A file that was measured before is told about it by --redraw --overwrite.
CONCENTRATION = {
    "max_share": max_share,
    "top1_over_top2": top1_over_top2,
    "gini": gini,
    "exp_entropy": exp_entropy,
    "robust_z": robust_z,
}


def concentration(impact: np.ndarray) -> pd.DataFrame:
    """CONCENTRATION of each row of impact [rows, R]; NaN where a measure divides by 0."""
    d = np.sort(np.maximum(impact, 0.0), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {name: measure(d) for name, measure in CONCENTRATION.items()}
    return pd.DataFrame(values).replace(np.inf, np.nan)


def concentration_columns(delta: np.ndarray, seed: int) -> dict[str, float]:
    """Each measure of the summary: its value, and its median under the null that no head differs
    from another (the heads are shuffled in every unit)."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permuted(delta, axis=1).mean(0) for _ in range(200)]  # [R] each
    observed = concentration(delta.mean(0)[None]).iloc[0]
    null = concentration(np.stack(shuffled)).median()
    columns = {}
    for name in CONCENTRATION:
        columns[name] = observed[name]
        columns[f"{name}_null"] = null[name]
    return columns


# ---------------------------------------------------------------------------------------------- run
@dataclass
class Arm:
    """A model to measure, a `run` of the tables; `checkpoint` is what its file holds."""

    model: NewGPT
    checkpoint: dict[str, Any]
    path: Path


def run(args: argparse.Namespace) -> int:
    """Measures, or takes up what was measured; then statistics, tables and figures."""
    csv = args.save_file
    npz = named(csv, ".npz")
    if args.redraw:
        # The statistics need the .npz; the figures need no more than the CSVs
        if npz.exists() or not csv.exists():
            write_results(args)
        else:
            draw(csv)
        return 0

    written = [csv, npz, *(named(csv, end) for end in ("_summary.csv", *TOGETHER))]
    refuse_overwrite(written, args.overwrite)
    rank, _ = rank_and_world()
    if rank > 0:  # it takes its share of the batches; rank 0 writes
        measure_runs(args)
        return 0
    with run_record(csv.parent, args):
        losses, facts = measure_runs(args)
        sidecar_path(npz).unlink(missing_ok=True)
        with atomic(npz) as temporary:
            np.savez(temporary, **losses)
        checkpoints = [about["checkpoint"] for about in facts["runs"].values()]
        write_sidecar(npz, LOSSES_SCHEMA, checkpoints, **facts)
        write_results(args)
    return 0


@dataclass
class Bench:
    """An arm, what its measurements need, and what they gave.

    measure    `measure` with its first four arguments given
    precision  the context of the products
    mean_z     {layer: [H, K]} means of z over the training split
    fit_text   tokens and targets [B, T] of the training split, for modes that learn from it
    cost       seconds that it takes, by the first few sequences
    seconds    a sequence in the last stage
    arrays     {name: array} of the .npz, without the name of the run
    kept       [C] numbers of the heads of the second stage, or none
    """

    arm: Arm
    measure: MeasureArm
    precision: Any
    mean_z: dict[int, Tensor]
    fit_text: tuple[Tensor, Tensor]
    cost: Cost
    arrays: dict[str, np.ndarray]
    seconds: float = math.nan
    kept: np.ndarray | None = None


def measure_runs(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Ablates every head of every arm -> the arrays of the .npz, and the facts of its sidecar."""
    keep_memory()
    device, autocast = set_up(args)
    arms = load_arms(args, device)
    reference = next(iter(arms.values()))  # what it says of sizes and text holds for both
    fill_in_sizes(args, reference)
    with rank_0_first():  # it fills the cache
        train, val = open_splits(args, reference)
    if "resample" in args.mode and val.n_windows < 2:
        fact = "--mode resample takes z from another window, and the validation split has one"
        raise HandoffError(f"{fact}; use more text, or --mode mean zero")
    benches = {name: prepare(arm, train, val, args, autocast) for name, arm in arms.items()}
    started = time.perf_counter()
    if args.minutes:
        plan_first_stage(benches, val, args)

    # Every arm on the same sequences
    text = choose_windows(args, val)
    for name, bench in benches.items():
        announce_cost(name, bench, text, args)
        first_stage(name, bench, text, args)
    if has_second_stage(args):
        seconds_left = 60 * (args.minutes or 0) - (time.perf_counter() - started)
        most = args.keep or heads_in_time(benches, seconds_left, args)
        for name, bench in benches.items():
            choose_heads(name, bench, text, val, most, args)
        text.fresh = choose_fresh(benches, val, seconds_left, args)
        for name, bench in benches.items():
            second_stage(name, bench, text, args)
    if len(text.together):
        for name, bench in benches.items():
            measure_together(name, bench, text, val, args)

    losses: dict[str, np.ndarray] = {}
    parts = {"": text.exact, "split.": text.linear, "confirm.": text.fresh}
    for prefix, windows in (parts | {"together.": text.together}).items():
        if len(windows):
            losses |= about_windows(prefix, train, val, windows)
    for name, bench in benches.items():
        losses |= {f"{name}.{array}": values for array, values in bench.arrays.items()}
    return losses, facts_of(benches, val, args)


def facts_of(
    benches: dict[str, Bench], val: HFWikiTextLoader, args: argparse.Namespace
) -> dict[str, Any]:
    """What the sidecar of the .npz says of the measurement and of each arm."""
    about_arms = {}
    for name, bench in benches.items():
        about_arms[name] = {
            "seed": bench.arm.checkpoint["seed"],
            "checkpoint": str(bench.arm.path),
            "ckpt_sha": sha256(bench.arm.path),
            "n_heads": bench.arm.model.cfg.n_heads,
            "dtype": "bfloat16" if is_bfloat16(bench.precision) else "float32",
            "seconds_a_sequence": round(bench.seconds, 4),
        }
    return {
        "layers": args.layers,
        "n_mean": args.n_mean,
        "resample_draws": args.resample_draws,
        "modes": args.mode,
        "seq_len": val.seq_len,
        "data": val.description,
        "bos": val.bos,
        "runs": about_arms,
    }


def prepare(
    arm: Arm,
    train: HFWikiTextLoader,
    val: HFWikiTextLoader,
    args: argparse.Namespace,
    autocast: Any,
) -> Bench:
    """What an arm needs before it is measured; sets the number of threads."""
    arm.model.requires_grad_(False)
    device = arm.model.embedding.weight.device
    mean_z = training_means(arm.model, train, args, autocast)
    tokens, targets = train.batch(fit_windows(train))  # [B, T] each
    measure_arm = functools.partial(measure, arm.model, val, mean_z, args)
    some_windows = val.spread(args.n_seqs)
    precision = choose_precision(measure_arm, some_windows, args, autocast)
    return Bench(
        arm=arm,
        measure=measure_arm,
        precision=precision,
        mean_z=mean_z,
        fit_text=(tokens.to(device), targets.to(device)),
        cost=measure_cost(measure_arm, some_windows, precision, args),
        arrays={},
    )


def fit_windows(train: HFWikiTextLoader) -> np.ndarray:
    """Windows of the training split in a random order, for modes that learn; some of them again
    where it has too few."""
    order = np.random.default_rng(0).permutation(train.n_windows)
    return np.resize(order, FIT_CHECK + FIT_STEPS * FIT_BATCH)


def first_stage(name: str, bench: Bench, text: Chosen, args: argparse.Namespace) -> None:
    """All heads: their exact effects on some sequences, their first-order ones on more."""
    modes = modes_of_stage(1, args)
    every_head = {layer: list(range(bench.arm.model.cfg.n_heads)) for layer in args.layers}
    fitted = fit_modes(bench, modes, every_head)
    given = (modes, args.layers, bench.precision)
    started = time.perf_counter()
    bench.arrays |= bench.measure(text.exact, *given, name, replace(EXACT, fitted=fitted))
    bench.seconds = (time.perf_counter() - started) / len(text.exact)
    if len(text.linear):
        label = f"{name}, first order"
        effects = replace(FIRST_ORDER, fitted=fitted)
        for array, values in bench.measure(text.linear, *given, label, effects).items():
            bench.arrays[f"split.{array}"] = values
    for array, values in bench.arrays.items():
        need_finite(array, values)


def need_finite(array: str, values: np.ndarray) -> None:
    """Refuses effects [n, ...] of which one is no number: statistics would drop its head."""
    is_bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)  # [n]
    if is_bad.any():
        fact = f"{array}: no finite number in {is_bad.sum()} of {len(values)} sequences"
        raise HandoffError(f"{fact}; pass --dtype float32, or a model whose losses are finite")


# ---- the second stage: fresh sequences for the heads that may still lead


def has_second_stage(args: argparse.Namespace) -> bool:
    """Whether the heads that may lead get sequences of their own."""
    return bool(args.confirm or args.minutes)


def modes_of_stage(stage: int, args: argparse.Namespace) -> list[str]:
    """Modes under which heads are ablated. If there is a second stage, it has those that are fitted
    and the one that ranks the heads; the first stage has all that are not fitted."""
    if not has_second_stage(args):
        return args.mode
    fitted = [mode for mode in args.mode if MODES[mode].fit]
    others = [mode for mode in args.mode if mode not in fitted]
    return others if stage == 1 else [others[0], *fitted]


@torch.no_grad()
def fit_modes(
    bench: Bench, modes: list[str], chosen: dict[int, list[int]]
) -> dict[str, dict[int, Tensor]]:
    """{mode: what it learned for the chosen {layer: heads}} of the modes that learn."""
    fitted = {}
    for mode in modes:
        fit = MODES[mode].fit
        if fit:
            with bench.precision:
                fitted[mode] = fit(bench.arm.model, *bench.fit_text, bench.mean_z, chosen)
    return fitted


N_FRESH = 6 * MIN_UNITS  # sequences that a head of the second stage gets at least, in --minutes


def heads_in_time(
    benches: dict[str, Bench], seconds_left: float, args: argparse.Namespace
) -> int | None:
    """How many heads the rest of --minutes buys N_FRESH sequences; None: there is no limit."""
    if not args.minutes:
        return None
    n_modes = len(modes_of_stage(2, args))
    shared = sum(bench.cost.shared for bench in benches.values())
    of_head = 0.0
    for bench in benches.values():
        cfg = bench.arm.model.cfg
        # An ablation goes through all later layers. Those that go on may all be of the first one,
        # measured was the middle one
        middle = args.layers[len(args.layers) // 2]
        longer = (cfg.n_layers - min(args.layers)) / (cfg.n_layers - middle)
        of_head += longer * bench.cost.of_layer / cfg.n_heads
    return from_rank_0(max(2, int((seconds_left / N_FRESH - shared) / of_head / n_modes)))


def choose_heads(
    name: str,
    bench: Bench,
    text: Chosen,
    val: HFWikiTextLoader,
    most: int | None,
    args: argparse.Namespace,
) -> None:
    """Sets the heads that go on, after the first stage, and prints how many: those that may still
    lead; if there are more than `most`, the likeliest of them."""
    mode = args.mode[0]
    arrays = bench.arrays
    n_heads = len(args.layers) * bench.arm.model.cfg.n_heads
    effects = arrays[f"{mode}.loss"] - arrays["base"][:, None, None]  # [n, layers, H]
    exact = effects.reshape(-1, n_heads)  # [n, R]
    documents = val.documents(text.exact)[:, 0]  # [n]
    if len(text.linear):
        linear = arrays[f"{mode}.first_order"].reshape(-1, n_heads)  # [n, R]
        split = arrays[f"split.{mode}.first_order"].reshape(-1, n_heads)  # [N, R]
        exact = steady(exact, linear, split.mean(0), documents)
    candidates = may_lead(units(exact, documents))
    bench.kept = candidates[:most]
    found = f"after {len(exact)} sequences {len(candidates)} of {n_heads} heads may still lead"
    outcome = f"the other {n_heads - len(candidates)} are dropped, the first one among them in at "
    outcome += f"most {CHANCE_LOST:.0%} unless it acts in few documents"
    if len(bench.kept) < len(candidates):
        outcome = f"the {most} likeliest go on"
    print(f"{name}: {found}; {outcome}", flush=True)


def choose_fresh(
    benches: dict[str, Bench],
    val: HFWikiTextLoader,
    seconds_left: float,
    args: argparse.Namespace,
) -> np.ndarray:
    """Windows of the second stage, of other documents than those of the first: --confirm of them,
    or as many as the rest of --minutes buys."""
    windows = np.arange(val.n_windows)
    is_fresh = second_half(val, windows)
    fresh = windows[is_fresh]
    n_wanted = args.confirm
    if args.minutes:
        seconds = sum(seconds_of_kept(bench, fresh, args) for bench in benches.values())
        n_wanted = from_rank_0(max(MIN_UNITS, int(seconds_left / seconds)))
    chosen = some_of(fresh, n_wanted)
    again = f"--screen {args.n_seqs} --n_linear {args.n_linear} --confirm {len(chosen)}"
    if args.keep or args.minutes:
        again += f" --keep {max(len(bench.kept) for bench in benches.values())}"
    print(f"second stage: {len(chosen)} fresh sequences (the same again: {again})", flush=True)
    return chosen


def second_half(val: HFWikiTextLoader, windows: np.ndarray) -> np.ndarray:
    """Whether each window belongs to the second stage: it begins in every other document of the
    split, whichever windows are asked for."""
    every = np.unique(val.documents(np.arange(val.n_windows))[:, 0])
    rank = np.searchsorted(every, val.documents(windows)[:, 0])
    return rank % 2 == 1


def seconds_of_kept(bench: Bench, windows: np.ndarray, args: argparse.Namespace) -> float:
    """Seconds a sequence that the second stage takes, by a quarter of a batch."""
    _, world = rank_and_world()
    some_windows = windows[: math.ceil(args.batch_size / 4)]
    chosen = by_layer(bench, args)
    effects = replace(EXACT, of_batch=functools.partial(ablate_heads, chosen=chosen))
    given = (some_windows, args.mode[:1], list(chosen), bench.precision, None, effects)
    n_modes = len(modes_of_stage(2, args))
    return n_modes * seconds_of(lambda: bench.measure(*given), n=2) / len(some_windows) / world


def from_rank_0(number: int) -> int:
    """The number that the first process has, in all of them: each measures another time."""
    rank, _ = rank_and_world()
    shared = torch.tensor(float(number if rank == 0 else 0))
    all_sum(shared)
    return int(shared.item())


def by_layer(bench: Bench, args: argparse.Namespace) -> dict[int, list[int]]:
    """{layer: heads} of the second stage."""
    n_heads = bench.arm.model.cfg.n_heads
    chosen: dict[int, list[int]] = {}
    for number in sorted(bench.kept):
        chosen.setdefault(args.layers[number // n_heads], []).append(int(number % n_heads))
    return chosen


def second_stage(name: str, bench: Bench, text: Chosen, args: argparse.Namespace) -> None:
    """Measures the heads that may still lead on fresh sequences; NaN stands for the others."""
    chosen = by_layer(bench, args)
    modes = modes_of_stage(2, args)
    of_batch = functools.partial(ablate_heads, chosen=chosen)
    effects = replace(EXACT, of_batch=of_batch, fitted=fit_modes(bench, modes, chosen))
    given = (modes, list(chosen), bench.precision, f"{name}, second stage", effects)
    is_kept = np.zeros((len(chosen), bench.arm.model.cfg.n_heads), dtype=bool)
    for row, heads in zip(is_kept, chosen.values(), strict=True):
        row[heads] = True
    started = time.perf_counter()
    measured = bench.measure(text.fresh, *given)
    bench.seconds = (time.perf_counter() - started) / len(text.fresh)
    for array, values in measured.items():
        need_finite(array, values if array == "base" else values[:, is_kept])
        if array != "base":
            found = values  # [n, some layers, H]
            values = np.full((len(found), len(args.layers), found.shape[2]), math.nan)
            values[:, [args.layers.index(layer) for layer in chosen]] = found
        bench.arrays[f"confirm.{array}"] = values


def measure_together(
    name: str, bench: Bench, text: Chosen, val: HFWikiTextLoader, args: argparse.Namespace
) -> None:
    """What heads cost when several are removed at once."""
    model = bench.arm.model
    windows = some_of(text.together, WRITTEN)
    size = np.zeros(len(args.layers) * model.cfg.n_heads)  # [R]
    # A batch at a time, like all else: what every head writes is H times as large as the stream
    for start in range(0, len(windows), args.batch_size):
        tokens, _ = val.batch(windows[start : start + args.batch_size])
        share = len(tokens) / len(windows)
        size += share * write_size(model, tokens, bench.mean_z, args.layers)
    kinds, sets = plan_sets(impact_of(bench.arrays, args.mode[0]), size, args.seed)
    given = (model, val, bench.mean_z, args, text.together, sets, bench.precision, name)
    bench.arrays["together.kinds"] = np.array(kinds)
    bench.arrays["together.sets"] = sets
    bench.arrays["together.loss"] = measure_sets(*given)
    need_finite("together.loss", bench.arrays["together.loss"])


@dataclass
class Chosen:
    """Numbers of windows of the validation split.

    exact     [n] those on which every head is ablated
    linear    [N] those with first-order effects, among them the exact ones; empty: none
    together  [W] those on which heads are removed together, which had no part in choosing them
              where the split has others; empty: none
    fresh     [n2] those of the second stage; empty: none
    """

    exact: np.ndarray
    linear: np.ndarray
    together: np.ndarray
    fresh: np.ndarray


def choose_windows(args: argparse.Namespace, val: HFWikiTextLoader) -> Chosen:
    """Evenly spaced windows of the split, for each of the measurements."""
    sizes = (args.n_seqs, args.n_linear)
    # 0 is all, so a single 0 takes the whole split
    needed = 0 if args.plain or min(sizes) == 0 else max(sizes)
    linear = val.spread(needed)  # [N]
    first = linear
    if has_second_stage(args):
        every = np.arange(val.n_windows)
        first_half = every[~second_half(val, every)]
        if len(first_half) == len(every):
            fact = "the validation split has one document"
            raise HandoffError(f"{fact}; --confirm and --minutes need fresh ones: use more text")
        first = np.intersect1d(linear, first_half)
        if len(first) < args.n_seqs:  # of few windows any number may lie in the second half
            first = first_half
    exact = some_of(first, args.n_seqs)  # [n]
    linear = np.union1d(linear, exact)
    if args.plain or len(exact) == len(linear):
        linear = linear[:0]
    others = np.setdiff1d(np.arange(val.n_windows), exact)
    fresh = others if len(others) >= args.n_together else exact
    together = some_of(fresh, args.n_together) if args.n_together else fresh[:0]
    return Chosen(exact, linear, together, fresh=exact[:0])


def some_of(windows: np.ndarray, n: int) -> np.ndarray:
    """n of the windows, evenly spaced; all if n is 0 or there are no more."""
    n = min(n or len(windows), len(windows))
    return windows[np.arange(n) * len(windows) // n]


def about_windows(
    prefix: str, train: HFWikiTextLoader, val: HFWikiTextLoader, windows: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrays of the .npz that hold for every model: number, document and unigram loss of each of
    these windows of the validation split."""
    return {
        f"{prefix}windows": windows,
        f"{prefix}documents": val.documents(windows)[:, 0],  # where each begins
        f"{prefix}unigram": unigram_loss(train, val, windows),
    }


def impact_of(of_arm: dict[str, np.ndarray], mode: str) -> np.ndarray:
    """Impact [R] of every head under a mode, by the exact effects alone."""
    exact = of_arm[f"{mode}.loss"] - of_arm["base"][:, None, None]  # [n, layers, H]
    return exact.mean(0).reshape(-1)


@dataclass
class Effects:
    """What is measured of every head: `of_batch`, like `ablate_heads`, returns the arrays `names`.

    fitted      {mode: what it learned}, as `fit_modes` returns
    """

    of_batch: Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]
    names: list[str]
    fitted: dict[str, dict[int, Tensor]] = field(default_factory=dict)


EXACT = Effects(ablate_heads, [*SCORES, "first_order"])
FIRST_ORDER = Effects(first_order_heads, ["first_order"])
MeasureArm = Callable[..., dict[str, np.ndarray]]  # `measure` with its first four arguments given


@torch.no_grad()
def measure(
    model: NewGPT,
    val: HFWikiTextLoader,
    mean_z: dict[int, Tensor],
    args: argparse.Namespace,
    windows: np.ndarray,
    modes: list[str],
    layers: list[int],
    autocast: Any,
    bar_label: str | None = None,
    effects: Effects = EXACT,
) -> dict[str, np.ndarray]:
    """Effects of the heads of `layers` on `windows` [n] of the validation split, with a progress
    bar if it gets a label -> arrays of the .npz: base [n], the loss without ablation, and for each
    mode <mode>.<name> [n, layers, H] for each of `effects.names`; float64.

    Several processes share the batches; each returns all of it.
    """
    n_sequences = len(windows)
    shape = (n_sequences, len(layers), model.cfg.n_heads)
    losses = {"base": np.zeros(n_sequences)}
    for mode in modes:
        for name in effects.names:
            losses[f"{mode}.{name}"] = np.zeros(shape)
    # The same draws for every measurement of a window: a control variate is no mean of other ones
    passes = list_passes(modes, args.resample_draws)

    rank, world = rank_and_world()
    n_steps = n_sequences * len(passes) // world
    no_bar = None if bar_label else True  # None: a bar where there is a terminal
    bar = tqdm(total=n_steps, desc=bar_label, unit="sequence", disable=no_bar)
    for start in range(rank * args.batch_size, n_sequences, world * args.batch_size):
        rows = slice(start, start + args.batch_size)
        tokens, targets = val.batch(windows[rows])  # [B, T] each
        device = model.embedding.weight.device
        with autocast:
            # Once a batch: where every ablation starts
            clean = clean_pass(model, tokens.to(device), targets.to(device), layers)
            for mode, draw in passes:
                batch = Batch(clean.z, mean_z, model, val, windows[rows], args.seed, draw)
                batch.fitted = effects.fitted.get(mode)
                substitute = MODES[mode].substitute(batch)  # {layer: [B, T, H, K]}
                base, found = effects.of_batch(model, clean, substitute)
                losses["base"][rows] = base
                # The mean over draws
                for name, values in found.items():
                    losses[f"{mode}.{name}"][rows] += values / n_draws(mode, args.resample_draws)
                bar.update(len(tokens))
    bar.close()
    # In place; where another process measured, the arrays are still 0
    all_sum(*map(torch.from_numpy, losses.values()))
    return losses


@torch.no_grad()
def measure_sets(
    model: NewGPT,
    val: HFWikiTextLoader,
    mean_z: dict[int, Tensor],
    args: argparse.Namespace,
    windows: np.ndarray,
    sets: np.ndarray,
    autocast: Any,
    name: str,
) -> np.ndarray:
    """Loss [W, S] on `windows` without each of the sets [S, R] of heads of args.layers, with a
    progress bar. Several processes share the batches; each returns all of it."""
    device = model.embedding.weight.device
    by_layer = torch.from_numpy(sets).to(device).unflatten(1, (len(args.layers), -1))
    # Sets that begin in the same layer together: what comes before it is computed once
    n_heads = sets.shape[1]
    first_head = np.where(sets.any(1), sets.argmax(1), n_heads)  # [S], layer after layer
    by_start = np.argsort(first_head, kind="stable")
    losses = np.zeros((len(windows), len(sets)))
    rank, world = rank_and_world()
    label = f"{name}, together"
    bar = tqdm(total=len(windows) // world, desc=label, unit="sequence", disable=None)
    for start in range(rank * args.batch_size, len(windows), world * args.batch_size):
        rows = slice(start, start + args.batch_size)
        tokens, targets = val.batch(windows[rows])  # [B, T] each
        # As many sets at once as a layer has heads, which is what one ablation takes
        for first in range(0, len(sets), model.cfg.n_heads):
            some = by_start[first : first + model.cfg.n_heads]
            removed = {layer: by_layer[some, i] for i, layer in enumerate(args.layers)}
            with autocast:
                loss = joint_loss(model, tokens.to(device), targets.to(device), mean_z, removed)
            losses[rows, some] = loss.T.cpu().double().numpy()  # [B, S]
        bar.update(len(tokens))
    bar.close()
    all_sum(torch.from_numpy(losses))
    return losses


def n_draws(mode: str, resample_draws: int) -> int:
    """How often a mode replaces the z of a batch."""
    return resample_draws if MODES[mode].random else 1


def list_passes(modes: list[str], resample_draws: int) -> list[tuple[str, int]]:
    """What is done to each batch: (mode, number of the draw), at least one a mode."""
    passes = []
    for mode in modes:
        draws = range(n_draws(mode, resample_draws))
        assert draws, f"{mode}: without a draw its scores would stay 0"
        passes += [(mode, draw) for draw in draws]
    return passes


def unigram_loss(train: HFWikiTextLoader, val: HFWikiTextLoader, windows: np.ndarray) -> np.ndarray:
    """Loss [n] of the training split's word frequencies on windows [n] of the validation split."""
    counts = np.bincount(train.tokens, minlength=count_ids(train.tokenizer)) + 1
    loss = -np.log(counts / counts.sum())  # [V]
    _, targets = val.batch(windows)  # [n, T]
    return loss[targets.numpy()].mean(1)


def choose_precision(
    measure_arm: MeasureArm,
    windows: np.ndarray,
    args: argparse.Namespace,
    autocast: Any,
) -> Any:
    """The context of the products: that of --dtype, but with auto bfloat16 only where it does not
    move the results."""
    if args.dtype != "auto" or not is_bfloat16(autocast):
        return autocast
    # A mode that learns has learned nothing yet
    mode = next(mode for mode in [*args.mode, *MODES] if not MODES[mode].fit)
    if bfloat16_will_do(measure_arm, windows, mode, args.layers, autocast):
        return autocast
    print("falling back to float32")
    return torch.autocast(autocast.device, enabled=False)


def is_bfloat16(autocast: Any) -> bool:
    """Whether products inside this context are in bfloat16."""
    return bool(autocast._enabled)


def bfloat16_will_do(
    measure_arm: MeasureArm,
    windows: np.ndarray,
    mode: str,
    layers: list[int],
    autocast: Any,
) -> bool:
    """Whether bfloat16 moves no head's impact by more than a tenth of its standard error, on a few
    sequences and layers."""
    some_windows = windows[:: math.ceil(len(windows) / 8)]
    some_layers = layers[:: math.ceil(len(layers) / 3)]
    impact = {}
    for dtype, precision in {"bfloat16": autocast, "float32": contextlib.nullcontext()}.items():
        losses = measure_arm(some_windows, [mode], some_layers, precision)
        base = losses["base"][:, None, None]  # [n, 1, 1]
        impact[dtype] = losses[f"{mode}.loss"] - base  # [n, layers, H]
    moved = np.abs(impact["bfloat16"].mean(0) - impact["float32"].mean(0))  # [layers, H]
    worst = (moved / standard_error(impact["float32"])).max()
    fact = f"some head's impact moves by {worst:.2f} standard errors"
    print(f"bfloat16 against float32: {fact} of {len(some_windows)} sequences (accepted: 0.1)")
    return worst <= 0.1


@dataclass
class Cost:
    """Seconds a sequence: `shared`, the model without ablation, forward and backward; `of_layer`,
    all heads of the middle layer under one mode."""

    shared: float
    of_layer: float

    def of_linear(self, args: argparse.Namespace) -> float:
        """Seconds a sequence of the first-order effects: each draw of a random mode goes forward
        through other text."""
        n_random = sum(MODES[mode].random for mode in modes_of_stage(1, args))
        return self.shared * (1 + n_random * args.resample_draws / 2)

    def of_exact(self, args: argparse.Namespace) -> float:
        """Seconds a sequence of the first stage."""
        n_passes = len(list_passes(modes_of_stage(1, args), args.resample_draws))
        return self.of_linear(args) + self.of_layer * n_passes * len(args.layers)


def measure_cost(
    measure_arm: MeasureArm, windows: np.ndarray, precision: Any, args: argparse.Namespace
) -> Cost:
    """Measures a quarter of a batch under one mode in the middle layer, and sets the number of
    threads."""
    some_windows = windows[: math.ceil(args.batch_size / 4)]  # all heads: a batch takes seconds
    middle = args.layers[len(args.layers) // 2]
    mode = [mode for mode in MODES if not MODES[mode].fit][:1]

    def part_of_a_batch() -> None:
        measure_arm(some_windows, mode, [middle], precision)

    seconds = choose_threads(part_of_a_batch, args.threads, n=2)
    # What all layers and passes share: the model without ablation
    shared = seconds_of(lambda: measure_arm(some_windows, [], [middle], precision), n=2)
    _, world = rank_and_world()
    n_each = len(some_windows) * world
    return Cost(shared / n_each, max(0.0, seconds - shared) / n_each)


def announce_cost(name: str, bench: Bench, text: Chosen, args: argparse.Namespace) -> None:
    """Prints what will be measured, and how long it will take."""
    cost = bench.cost
    seconds = cost.of_exact(args) * len(text.exact) + cost.of_linear(args) * len(text.linear)
    n_heads = len(args.layers) * bench.arm.model.cfg.n_heads
    nothing = np.zeros(n_heads)  # of each head
    n_sets = len(plan_sets(nothing, nothing, args.seed)[0])
    seconds += cost.shared / 2 * len(text.together) * n_sets
    n_passes = len(list_passes(modes_of_stage(1, args), args.resample_draws))
    size = f"{n_heads} heads x {n_passes} passes over {len(text.exact)} sequences of "
    size += f"{bench.arm.model.cfg.seq_len} tokens"
    if len(text.linear):
        size += f", to first order over {len(text.linear):,}"
    if len(text.together):
        size += f", {n_sets} sets of heads over {len(text.together)}"
    last = "; then a second stage" if has_second_stage(args) else ""
    print(f"{name}: {size}: about {duration(seconds)} here{last}", flush=True)
    if args.mode != modes_of_stage(1, args) or not any(MODES[mode].fit for mode in args.mode):
        return
    # Each step goes forward and back through the layers above, on all of the text for fitting
    steps = FIT_STEPS * FIT_BATCH * 3
    fit = duration(cost.of_layer * len(args.layers) * steps)
    print(f"{name}: besides, fitting takes about {fit}", flush=True)


def plan_first_stage(
    benches: dict[str, Bench], val: HFWikiTextLoader, args: argparse.Namespace
) -> None:
    """Sets how many sequences half of --minutes buys; what it buys later is said after it."""
    seconds = 60 * args.minutes / 2
    linear = sum(bench.cost.of_linear(args) for bench in benches.values())
    exact = sum(bench.cost.of_exact(args) for bench in benches.values())
    # A third of it for the first-order effects, which all heads share
    n_linear = min(args.n_linear or val.n_windows, int(seconds / 3 / linear))
    n_seqs = int((seconds - n_linear * linear) / exact)
    args.n_linear = from_rank_0(n_linear)
    args.n_seqs = from_rank_0(min(n_seqs, val.n_windows // 2))
    if args.n_seqs < 8:
        # Half of the time, of which a third goes to the first-order effects
        least = math.ceil(8 * exact * 3 / 60)
        fact = f"--minutes {args.minutes:g} buy {args.n_seqs} sequences of all heads, expected 8"
        raise HandoffError(f"{fact}: give --minutes {least}, or fewer --layers")


def load_arms(args: argparse.Namespace, device: torch.device) -> dict[str, Arm]:
    """{name: Arm}, named by arm, or by flag if both are of one arm. Raises HandoffError if they do
    not read the same text in the same way."""
    given = {"adaptive": args.adaptive_model}
    if args.control_model:
        given["control"] = args.control_model
    with rank_0_first():  # a pretrained model is made into a checkpoint once
        paths = {
            flag: as_checkpoint(path, args.cache_dir, args.dataset) for flag, path in given.items()
        }
    by_flag = {}
    for flag, path in paths.items():
        model, checkpoint = load_checkpoint(path, device, args.skip_probe)
        checkpoint["bos"] = window_bos(args.bos, checkpoint, path)  # as it is read here
        by_flag[flag] = Arm(model, checkpoint, path)
    if "control" in by_flag:
        expected = how_it_reads(by_flag["adaptive"])
        found = how_it_reads(by_flag["control"])
        for key, value in expected.items():
            if found[key] != value:
                fact = f"{args.control_model} has {key} {found[key]}, {args.adaptive_model} {value}"
                raise HandoffError(f"{fact}: their heads cannot be compared, sequence by sequence")
    by_arm = {arm.checkpoint["arm"]: arm for arm in by_flag.values()}
    return by_arm if len(by_arm) == len(by_flag) else by_flag


def how_it_reads(arm: Arm) -> dict[str, Any]:
    """What two arms must share to be compared on the same sequences."""
    config = arm.checkpoint["config"]
    return {
        "n_layers": config["n_layers"],
        "seq_len": config["seq_len"],
        "vocab_size": config["vocab_size"],
        "tokenizer": arm.checkpoint["data"]["tokenizer_hash"],
        "BOS token": arm.checkpoint["bos"],
    }


def fill_in_sizes(args: argparse.Namespace, arm: Arm) -> None:
    """Gives args the layers, and from the preset the sizes, that the command line left open.
    Raises HandoffError for a layer that is not there."""
    n_layers = arm.checkpoint["config"]["n_layers"]
    wanted = range(n_layers) if args.layers is None else args.layers
    args.layers = sorted(set(wanted))
    missing = [layer for layer in args.layers if not 0 <= layer < n_layers]
    if missing:
        fact = f"--layers {missing[0]} is out of range"
        raise HandoffError(f"{fact}: {args.adaptive_model} has layers 0 to {n_layers - 1}")
    if len(args.layers) * arm.checkpoint["config"]["n_heads"] < 2:
        fact = f"layer {args.layers[0]} of {args.adaptive_model} has one head"
        raise HandoffError(f"{fact}, with none to compare it with: name more --layers")
    preset = arm.checkpoint["preset"] if args.preset == "auto" else args.preset
    sizes = PHASE_PRESETS.get(preset, PHASE_PRESETS["full"])  # a pretrained model has no preset
    for name, size in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, size)


def open_splits(args: argparse.Namespace, arm: Arm) -> tuple[HFWikiTextLoader, HFWikiTextLoader]:
    """Training and validation split of the text that the checkpoint was trained on, or of
    --dataset."""
    dataset = args.dataset or find_text(arm.checkpoint, arm.path)
    tokenizer = args.tokenizer or str(arm.path.parent / "tokenizer.json")
    seq_len = arm.checkpoint["config"]["seq_len"]
    bos = arm.checkpoint["bos"]
    train = HFWikiTextLoader(dataset, tokenizer, seq_len, "train", args.cache_dir, bos)
    val = HFWikiTextLoader(dataset, tokenizer, seq_len, "validation", args.cache_dir, bos)
    need_rows(count_ids(train.tokenizer), arm.checkpoint["config"]["vocab_size"], arm.path)
    here = train.description
    trained = arm.checkpoint["data"]
    if here["tokenizer_hash"] != trained["tokenizer_hash"]:
        fact = f"tokenizer {tokenizer} has hash {here['tokenizer_hash']}"
        raise HandoffError(f"{fact}, {arm.path} was trained with {trained['tokenizer_hash']}")
    if text_identity(here["dataset_key"]) != text_identity(trained["dataset_key"]):
        fact = f"note: the text is {here['dataset_key']}"
        print(f"{fact}, {arm.path} was trained on {trained['dataset_key']}")
    return train, val


def read_losses(npz: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The .npz of this script and the facts of its sidecar, checked."""
    facts = read_sidecar(npz, LOSSES_SCHEMA, REMEDY)
    found = sha256(npz)
    if found != facts["sha256"]:
        fact = f"{npz} has sha256 {found[:12]}, its sidecar says {facts['sha256'][:12]}"
        raise HandoffError(f"{fact}: damaged; remake it with: {REMEDY}")
    with np.load(npz, allow_pickle=False) as arrays:
        return dict(arrays), facts


TOGETHER = ("_together.csv", "_pairs.csv")  # what heads cost together, where that is measured


def remove_together(csv: Path) -> None:
    """Of an earlier run of the same name: they would be drawn as of this one."""
    figures = ("_together.png", "_together.svg", "_together.narrow.svg")
    for end in (*TOGETHER, *figures):
        path = named(csv, end)
        path.unlink(missing_ok=True)
        sidecar_path(path).unlink(missing_ok=True)


def write_results(args: argparse.Namespace) -> None:
    """Statistics, tables and figures from the .npz; the sidecars of the CSVs last."""
    csv = args.save_file
    npz = named(csv, ".npz")
    losses, facts = read_losses(npz)
    table, summary = summarise(losses, facts, args)
    frames = {csv: table, named(csv, "_summary.csv"): summary}
    together = read_together(losses, facts)
    if together:
        tables, columns = together_tables(together, summary, args)
        summary = summary.merge(columns, on="run", how="left")
        frames |= {named(csv, end): frame for end, frame in tables.items()}
        frames[named(csv, "_summary.csv")] = summary
    elif args.overwrite:
        remove_together(csv)
    texts = {}
    for path, frame in frames.items():
        texts[path] = frame.to_csv(index=False, float_format="%.10g")
        # What was drawn with other settings is not replaced unasked
        keep = args.redraw and not args.overwrite and path.exists()
        if keep and path.read_text(encoding="utf-8") != texts[path]:
            fact = f"{path} would change (other --mode, --bootstrap, --seed or --plain, or script?)"
            raise HandoffError(f"{fact}; pass --overwrite to replace it")
    # Without a sidecar until both are written: an unfinished result never looks done
    for path, text in texts.items():
        sidecar_path(path).unlink(missing_ok=True)
        save(path, text)
    ranked_by = summary["ranked_by"][0]
    about = {"ranked_by": ranked_by, "bootstrap": args.bootstrap, "seed": args.seed}
    about["bos"] = facts.get("bos")  # an older .npz has none
    for path in texts:
        write_sidecar(path, CSV_SCHEMA, [npz], **about)
    tell(summary, facts)
    if together:
        tell_together(summary)
    with drawing(list(texts), ["ablation_test.py", "--redraw", csv]):
        draw(csv)


# ------------------------------------------------------------------------------- tables and figures
COLORS = ["#D55E00", "#0072B2"]  # Okabe-Ito
NAMED_HEADS = 30  # of a run in Figure 4
CELLS_WITH_NUMBERS = 300  # a larger heatmap is read by its colours
PUBLISHED = {  # zero ablation, 24 heads: % of base loss
    "adaptive L9H1": 0.932,
    "adaptive L9H3": 0.438,
    "control L9H7": 0.367,
    "control L6H3": 0.361,
    "adaptive L9H5": 0.360,
}


# ---- the CSV and its summary


@dataclass
class Split:
    """The model without ablation on the windows of the split, out of the .npz.

    base_loss   [N] loss, nats a token
    linear      [N, R] effect of ablating each head, to first order
    documents   [N] number of the document of each window
    unigram     [N] loss of word frequencies
    """

    base_loss: np.ndarray
    linear: np.ndarray
    documents: np.ndarray
    unigram: np.ndarray


@dataclass
class Ablation:
    """One arm under one mode, out of the .npz.

    about       the sidecar's facts of the arm: seed, checkpoint, ckpt_sha, n_heads, dtype
    run, mode        names
    stage            1: all heads; 2: fresh sequences for those that may lead
    base_loss        [sequences] loss without ablation, nats a token
    score            {each of SCORES, first_order: [sequences, R]}; NaN where the file has none
    documents        [sequences] number of the document of each
    unit             what those numbers count: documents, or sequences
    unigram          [sequences] loss of word frequencies
    split            its first-order effects are the control variate; or none
    is_steadied      [R] for which heads
    layer, head      [R] which head of which layer each of the R is
    """

    about: dict[str, Any]
    run: str
    mode: str
    stage: int
    base_loss: np.ndarray
    score: dict[str, np.ndarray]
    documents: np.ndarray
    unit: str
    unigram: np.ndarray
    split: Split | None
    is_steadied: np.ndarray
    layer: np.ndarray
    head: np.ndarray

    def exact(self) -> np.ndarray:
        """What each ablation costs in each sequence [sequences, R], nats a token."""
        return self.score["loss"] - self.base_loss[:, None]

    def plain(self) -> np.ndarray:
        """Impact in each document [n, R], its mean the estimate; of the exact effects alone."""
        return units(self.exact(), self.documents)

    def steadied(self) -> np.ndarray:
        """The same [n, R] with the control variate, for statements about the split."""
        if self.split is None:
            return self.plain()
        control = self.split.linear.mean(0)  # [R]
        values = steady(self.exact(), self.score["first_order"], control, self.documents)
        return np.where(self.is_steadied, units(values, self.documents), self.plain())

    def elsewhere(self) -> np.ndarray:
        """The same [documents, R], for statements about other documents."""
        if self.split is None:
            return self.plain()
        # What is the same everywhere has a slope of 0
        linear = np.where(self.is_steadied, self.score["first_order"], 0.0)
        split_linear = np.where(self.is_steadied, self.split.linear, 0.0)
        known = (split_linear, self.documents, self.split.documents)
        return units_elsewhere(self.exact(), linear, *known)

    def better_steadied(self) -> np.ndarray:
        """[R] bool, of which heads the standard error is smaller with the control variate."""
        return standard_error(self.steadied()) < standard_error(self.plain())

    def loss(self) -> float:
        """Loss without ablation, nats a token, of the text that the impact is of."""
        return (self.base_loss if self.split is None else self.split.base_loss).mean()


def summarise(
    losses: dict[str, np.ndarray], facts: dict[str, Any], args: argparse.Namespace
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The .npz and its facts -> the CSV, a row per run, mode and head, and the summary, a row per
    run and mode."""
    modes = [mode for mode in facts["modes"] if args.mode is None or mode in args.mode]
    if not modes:
        npz = args.save_file.with_suffix(".npz")
        held = " ".join(facts["modes"])
        raise HandoffError(f"{npz} holds --mode {held}, not {' '.join(args.mode)}")
    document_numbers(losses, args)
    results = []
    for run in facts["runs"]:
        of_run = []
        for mode in modes:
            result = result_of_mode(losses, facts, run, mode, args)
            if result.stage == 2 and "p_missed" not in result.row:
                chose = result_of_mode(losses, facts, run, facts["modes"][0], args)
                result = of_kept_heads(result, chose)
            of_run.append(result)
        for result in of_run:
            result.row["ranked_by"] = modes[0]
            both = result.heads.merge(of_run[0].heads, on=["layer", "head"])
            agree = stats.spearmanr(both["impact_x"], both["impact_y"]).statistic
            result.row["spearman_ranking_mode"] = agree
        results.append(of_run)
    if len(results) == 2:
        for one, two in zip(*results, strict=True):
            difference = best_minus_best(one.crossfit, two.crossfit, args)
            one.row |= difference
            two.row |= difference
    every = [result for of_run in results for result in of_run]
    return pd.concat([result.heads for result in every]), pd.DataFrame([r.row for r in every])


def result_of_mode(
    losses: dict[str, np.ndarray],
    facts: dict[str, Any],
    run: str,
    mode: str,
    args: argparse.Namespace,
) -> Result:
    """Of a mode with a stage alone there is no more than that; of two the second one decides."""
    stages = []
    for ablation in read_stages(losses, facts, run, mode, args):
        stages.append(result_of(ablation, facts, args))
    return stages[0] if len(stages) == 1 else two_stages(*stages)


@dataclass
class Result:
    """What is said of one run under one mode.

    stage     the last one
    heads     rows of the CSV, R of them
    row       the row of the summary
    crossfit  [n] values of `cross_fit`
    values    [n, R] steadied effects of the heads in each unit
    """

    stage: int
    heads: pd.DataFrame
    row: dict[str, Any]
    crossfit: np.ndarray
    values: np.ndarray


def result_of(ablation: Ablation, facts: dict[str, Any], args: argparse.Namespace) -> Result:
    """The statistics of one stage of the measurement."""
    values = ablation.steadied()  # [n, R]
    statistics = head_statistics(values, args.bootstrap, args.seed)
    heads = head_rows(ablation, statistics, facts["seq_len"])
    row = summary_row(ablation, statistics)
    row |= steadiness(heads)
    row |= lead_elsewhere(ablation, statistics, args)
    # Ahead in this text, and in other documents too
    row["unique_hero"] = row["unique_hero"] and bool(row["gap_elsewhere_lo"] > 0)
    row["n_needed"] = sequences_needed(ablation, statistics)
    row |= screen_quality(ablation, statistics.columns["impact"])
    return Result(ablation.stage, heads, row, statistics.crossfit, values)


def sequences_needed(ablation: Ablation, statistics: HeadStatistics) -> float:
    """How many sequences would tell the first head from the second with 80 % power, if its lead is
    what was measured; NaN with too few units to say."""
    if len(statistics.crossfit) == 0:
        return math.nan
    values = ablation.steadied()  # [n, R]
    lead = values[:, [statistics.hero]] - values[:, [statistics.second]]  # [n, 1]
    t = lead.mean() / standard_error(lead)[0]
    t_needed = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    return len(ablation.base_loss) * (t_needed / max(t, 1e-3)) ** 2


def two_stages(first: Result, second: Result) -> Result:
    """The heads that went on as the second stage has them, on its fresh sequences alone, which had
    no part in choosing them; behind them the others, as the first stage has them. What is said of
    all heads, such as how unequal they are, is of the first stage."""
    of_head = ["layer", "head"]
    gone_on = second.heads[of_head].apply(tuple, axis=1)
    is_dropped = ~first.heads[of_head].apply(tuple, axis=1).isin(gone_on)
    dropped = first.heads[is_dropped].sort_values("rank").assign(p_top1=0.0)
    missed = p_missed(second.values, first.values[:, is_dropped])
    heads = pd.concat((second.heads.sort_values("rank"), dropped), ignore_index=True)
    heads["rank"] = np.arange(1, len(heads) + 1)
    costs = heads["impact"].clip(lower=0)
    heads["share"] = costs / max(costs.sum(), 1e-300)
    row = second.row | {name: first.row[name] for name in of_all_heads()}
    row["n_screen"] = first.row["n_seq"]
    row["n_dropped"] = len(dropped)
    row["p_missed"] = missed
    row["chosen_by"] = second.row["mode"]
    row["unique_hero"] = row["unique_hero"] and missed < 0.05
    heads = heads.sort_values(of_head, ignore_index=True)
    return Result(second.stage, heads, row, second.crossfit, second.values)


def of_kept_heads(result: Result, chose: Result) -> Result:
    """A mode that the second stage alone has knows nothing of the heads that were dropped: whether
    the first one is among them is what the mode says that chose them, and of all heads nothing is
    said."""
    row = result.row | dict.fromkeys(of_all_heads(), math.nan)
    row |= {name: chose.row[name] for name in ("n_screen", "n_dropped", "p_missed", "chosen_by")}
    row["unique_hero"] = row["unique_hero"] and row["p_missed"] < 0.05
    return replace(result, row=row)


def of_all_heads() -> list[str]:
    """Columns of the summary that speak of all heads of a model."""
    columns = [f"{name}{end}" for name in CONCENTRATION for end in ("", "_null")]
    columns += [f"effective_heads{end}" for end in ("", "_lo", "_hi")]
    return columns + ["n_negative", "negative_sum", "spearman_first_order", "recall5_first_order"]


def document_numbers(losses: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    """Of an older file, a number a sequence: puts it where the number of the document stands."""
    if "documents" in losses:
        return
    npz = named(args.save_file, ".npz")
    fact = f"note: {npz} does not say which document each sequence is of"
    print(f"{fact}; here each counts as a unit; for documents measure again: {REMEDY}")
    losses["documents"] = np.arange(len(array_of(losses, "unigram")))
    losses["units"] = np.array("sequences")


def read_stages(
    losses: dict[str, np.ndarray],
    facts: dict[str, Any],
    run: str,
    mode: str,
    args: argparse.Namespace,
) -> list[Ablation]:
    """One run and mode: the first stage, all heads; the second, those that went on; or one."""
    stages = []
    for stage in ("", "confirm."):
        if f"{run}.{stage}{mode}.loss" in losses:
            stages.append(read_ablation(losses, facts, run, mode, stage))
    if not stages:
        array_of(losses, f"{run}.{mode}.loss")
    if args.plain:
        stages = [replace(ablation, split=None) for ablation in stages]
    helps = [ablation.better_steadied() for ablation in stages]  # [R] each
    if len(stages) == 2:
        # The second one heeds the first, too, which is other text
        first, second = stages
        went_on = np.isin(numbers_of(first), numbers_of(second))  # [R of the first]
        helps[1] &= helps[0][went_on]
    chosen = []
    for ablation, is_steadied in zip(stages, helps, strict=True):
        # Impacts are of the whole split as soon as one head's is
        split = ablation.split if is_steadied.any() else None
        chosen.append(replace(ablation, is_steadied=is_steadied, split=split))
    return chosen


def numbers_of(ablation: Ablation) -> np.ndarray:
    """A number for each head [R], the same in both stages, and rising."""
    return ablation.layer * ablation.about["n_heads"] + ablation.head


def read_ablation(
    losses: dict[str, np.ndarray], facts: dict[str, Any], run: str, mode: str, stage: str
) -> Ablation:
    """The arrays of one run, mode and stage ("", or "confirm."), all heads of all layers side by
    side; without those that were not measured."""
    about = facts["runs"][run]
    base_loss = array_of(losses, f"{run}.{stage}base")  # [sequences]
    shape = (len(base_loss), len(facts["layers"]) * about["n_heads"])
    loss = array_of(losses, f"{run}.{stage}{mode}.loss").reshape(shape)
    is_measured = ~np.isnan(loss).any(0)  # [R]
    missing = np.full(shape, math.nan)  # of an older file: the column is empty
    score = {}
    for name in [*SCORES, "first_order"]:
        values = losses.get(f"{run}.{stage}{mode}.{name}", missing).reshape(shape)
        score[name] = values[:, is_measured]
    split = None
    name = f"{run}.split.{mode}.first_order"
    # Neither in an older file nor where all of the split was ablated
    if name in losses and "units" not in losses:
        split = Split(
            base_loss=array_of(losses, f"{run}.split.base"),
            linear=losses[name].reshape(-1, shape[1])[:, is_measured],
            documents=array_of(losses, "split.documents"),
            unigram=array_of(losses, "split.unigram"),
        )
    layer = np.repeat(facts["layers"], about["n_heads"])  # [R]
    head = np.tile(np.arange(about["n_heads"]), len(facts["layers"]))  # [R]
    return Ablation(
        about=about,
        run=run,
        mode=mode,
        stage=2 if stage else 1,
        base_loss=base_loss,
        score=score,
        documents=array_of(losses, f"{stage}documents"),
        unit="sequences" if "units" in losses else "documents",
        unigram=array_of(losses, f"{stage}unigram"),
        split=split,
        is_steadied=np.ones(is_measured.sum(), bool),
        layer=layer[is_measured],
        head=head[is_measured],
    )


def steadiness_columns(ablation: Ablation) -> dict[str, Any]:
    """Columns of the CSV that tell what the control variate does: rho, the correlation of exact and
    first-order effect over sequences; numbers of both; and the standard errors without it, and for
    other documents than those of the split."""
    plain = ablation.plain()  # [n, R]
    has_se = len(plain) >= MIN_UNITS
    n_linear = 0 if ablation.split is None else len(ablation.split.linear)
    return {
        "rho": correlation(ablation.exact(), ablation.score["first_order"]),
        "n_exact": len(ablation.base_loss),
        "n_linear": np.where(ablation.is_steadied, n_linear, 0),
        "se_plain": standard_error(plain) if has_se else math.nan,
        "se_elsewhere": standard_error(ablation.elsewhere()) if has_se else math.nan,
    }


def steadiness(heads: pd.DataFrame) -> dict[str, Any]:
    """For the summary: how much smaller standard errors became, and of which heads they did not."""
    ratio = heads["se_plain"] / heads["se"]
    is_as_large = (ratio <= 1) & (heads["n_linear"].max() > 0)
    names = [f"L{head.layer}H{head.head}" for head in heads[is_as_large].itertuples()]
    return {
        "n_linear": heads["n_linear"].max(),
        "se_ratio": ratio.median(),
        "se_ratio_lo": ratio.min(),
        "se_ratio_hi": ratio.max(),
        "not_steadied": " ".join(names),
    }


def array_of(losses: dict[str, np.ndarray], name: str) -> np.ndarray:
    """An array of the .npz that nothing can be said without."""
    if name not in losses:
        raise HandoffError(f"the .npz has no array {name}; make it with: {REMEDY}")
    return losses[name]


def head_rows(ablation: Ablation, statistics: HeadStatistics, seq_len: int) -> pd.DataFrame:
    """Rows of the CSV, one a head."""
    base = ablation.loss()
    of_head = statistics.columns
    impact = of_head["impact"]
    n_sequences = len(ablation.base_loss)
    return pd.DataFrame(
        {
            # Whose head it is
            "run": ablation.run,
            "seed": ablation.about["seed"],
            "checkpoint": ablation.about["checkpoint"],
            "ckpt_sha": ablation.about["ckpt_sha"],
            "layer": ablation.layer,
            "head": ablation.head,
            "mode": ablation.mode,
            # What its ablation costs: nats a token, and % of the loss without ablation
            "base_loss": base,
            "ablated_loss": base + impact,
            "impact": impact,
            "pct_impact": 100 * impact / base,
            "delta": impact,  # the same as impact and pct_impact, under their other names
            "delta_pct": 100 * impact / base,
            # By how much that may be chance, and how it compares with the other heads
            "se": of_head["se"],
            "ci_lo": of_head["ci_lo"],
            "ci_hi": of_head["ci_hi"],
            "ci_all_lo": of_head["ci_all_lo"],
            "ci_all_hi": of_head["ci_all_hi"],
            "p_maxT": of_head["p_maxT"],
            "q_bh": of_head["q_bh"],
            "delta_ppl": np.exp(base + impact) - np.exp(base),  # perplexity
            "share": of_head["share"],
            "rank": of_head["rank"],
            "p_top1": of_head["p_top1"],
            # What else the ablation changes, on how much text
            "kl_clean_ablated": ablation.score["kl"].mean(0),
            "top1_flip_rate": ablation.score["flip"].mean(0),
            "n_seq": n_sequences,
            "n_tok": n_sequences * seq_len,
            "dtype": ablation.about["dtype"],
            "first_order": np.abs(ablation.score["first_order"]).mean(0),
            **steadiness_columns(ablation),
            "stage": ablation.stage,
        }
    )


def summary_row(ablation: Ablation, statistics: HeadStatistics) -> dict[str, Any]:
    """What the summary says of one run and mode."""
    base = ablation.loss()
    unigram_loss = (ablation if ablation.split is None else ablation.split).unigram.mean()
    row = {
        "run": ablation.run,
        "mode": ablation.mode,
        "base_loss": base,
        "n_seq": len(ablation.base_loss),
        "unigram_loss": unigram_loss,
        "unit": ablation.unit,
        "hero_layer": ablation.layer[statistics.hero],
        "hero_head": ablation.head[statistics.hero],
        "second_layer": ablation.layer[statistics.second],
        "second_head": ablation.head[statistics.second],
        **statistics.summary,
    }
    # A model that does not beat word frequencies makes no use of its context: its heads differ,
    # but none is a hero.
    row["unique_hero"] = statistics.summary["unique_hero"] and bool(base < unigram_loss)
    return row


def screen_quality(ablation: Ablation, impact: np.ndarray) -> dict[str, float]:
    """How well the first-order effect [sequences, R], from one backward pass, foretells impact [R]:
    Spearman's correlation, and how many of its first five heads are among the first five."""
    screen = np.abs(ablation.score["first_order"]).mean(0)  # [R]
    if np.isnan(screen).any():
        return {"spearman_first_order": math.nan, "recall5_first_order": math.nan}
    expected = set(np.argsort(-screen)[:5])
    first = set(np.argsort(-impact)[:5])
    return {
        "spearman_first_order": stats.spearmanr(screen, impact).statistic,
        "recall5_first_order": len(expected & first) / 5,
    }


def best_minus_best(one: np.ndarray, two: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Cross-fitted impact of the best head of one run minus that of the other, from the values of
    `cross_fit` on the same units [n], with its paired interval."""
    if not len(one):
        return dict.fromkeys(["difference", "difference_lo", "difference_hi"], math.nan)
    difference = one - two  # [n]
    low, high = mean_interval(difference, args.bootstrap, args.seed)
    return {"difference": difference.mean(), "difference_lo": low, "difference_hi": high}


@dataclass
class Together:
    """What the heads of one run cost when several are removed at once, out of the .npz.

    kinds    name of each of S sets, as `plan_sets` says; the first is none
    sets     [S, R] bool, the heads of each
    cost     [n, S] rise of the loss in each document, nats a token
    base     loss without any removed
    heads    names of the R heads, such as L3H1
    """

    run: str
    kinds: list[str]
    sets: np.ndarray
    cost: np.ndarray
    base: float
    heads: list[str]

    def of_kind(self, kind: str) -> np.ndarray:
        """Numbers of the sets of a kind."""
        return np.array([i for i, name in enumerate(self.kinds) if name == kind])


def read_together(losses: dict[str, np.ndarray], facts: dict[str, Any]) -> list[Together]:
    """A Together for each run that has one."""
    found = []
    for run, about in facts["runs"].items():
        if f"{run}.together.loss" not in losses:
            continue
        loss = losses[f"{run}.together.loss"]  # [W, S]
        cost = units(loss - loss[:, :1], losses["together.documents"])  # [n, S]
        kinds = [str(kind) for kind in losses[f"{run}.together.kinds"]]
        heads = [f"L{layer}H{h}" for layer in facts["layers"] for h in range(about["n_heads"])]
        sets = losses[f"{run}.together.sets"]
        found.append(Together(run, kinds, sets, cost, loss[:, 0].mean(), heads))
    return found


def with_limits(
    values: np.ndarray, args: argparse.Namespace, together: bool = False
) -> dict[str, Any]:
    """Mean of values [n, C] and 95 % interval of each, `together`: of all at once; NaN for the
    limits with fewer than MIN_UNITS."""
    low = high = np.full(values.shape[1], math.nan)
    if len(values) >= MIN_UNITS:
        t = bootstrap_units(values, args.bootstrap, args.seed).t
        low, high = interval(values, t, together)
    return {"value": values.mean(0), "ci_lo": low, "ci_hi": high}


def removal_curves(of_run: Together, args: argparse.Namespace) -> pd.DataFrame:
    """What it costs to remove ever more heads, a row a set: run, order, n_removed, cost in nats a
    token and in % of the loss with its interval, n."""
    tables = []
    orders = [kind for kind in dict.fromkeys(of_run.kinds) if kind not in ("none", "alone", "pair")]
    for order in orders:
        own = of_run.of_kind(order)
        limits = with_limits(of_run.cost[:, own], args)
        table = pd.DataFrame(limits)
        table.insert(0, "run", of_run.run)
        table.insert(1, "order", order)
        table.insert(2, "n_removed", of_run.sets[own].sum(1))
        tables.append(table)
    curves = pd.concat(tables, ignore_index=True).rename(columns={"value": "cost"})
    curves["pct_cost"] = 100 * curves["cost"] / of_run.base
    return curves.assign(base_loss=of_run.base, n_unit=len(of_run.cost))


def pair_table(of_run: Together, args: argparse.Namespace) -> pd.DataFrame:
    """The first heads in pairs, a row a pair: what each costs alone, both together, and their
    interaction with an interval that holds for all pairs at once."""
    alone = of_run.cost[:, of_run.of_kind("alone")]  # [n, C]
    both = of_run.cost[:, of_run.of_kind("pair")]  # [n, P]
    limits = with_limits(interactions(alone, both), args, together=True)
    first = [of_run.heads[int(of_run.sets[i].argmax())] for i in of_run.of_kind("alone")]
    pairs = list(itertools.combinations(range(len(first)), 2))
    return pd.DataFrame(
        {
            "run": of_run.run,
            "head_1": [first[i] for i, _ in pairs],
            "head_2": [first[j] for _, j in pairs],
            "alone_1": [alone[:, i].mean() for i, _ in pairs],
            "alone_2": [alone[:, j].mean() for _, j in pairs],
            "both": both.mean(0),
            "interaction": limits["value"],
            "ci_lo": limits["ci_lo"],
            "ci_hi": limits["ci_hi"],
            "n_unit": len(both),
        }
    )


def together_tables(
    together: list[Together], summary: pd.DataFrame, args: argparse.Namespace
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """{end of its name: CSV}, and a row a run that the summary so far is to have beside its own."""
    ranking = summary[summary["mode"] == summary["ranked_by"]].set_index("run")
    curves = []
    pairs = []
    rows = []
    for of_run in together:
        curves.append(removal_curves(of_run, args))
        pairs.append(pair_table(of_run, args))
        spare = spare_columns(of_run, args)
        first = ranking.loc[of_run.run]
        backup = backup_columns(pairs[-1], f"L{first['hero_layer']}H{first['hero_head']}")
        rows.append({"run": of_run.run} | spare | backup)
    tables = {"_together.csv": pd.concat(curves), "_pairs.csv": pd.concat(pairs)}
    return tables, pd.DataFrame(rows)


SPARE = 0.01  # of the loss: what may be lost with the heads that can go


def spare_columns(of_run: Together, args: argparse.Namespace) -> dict[str, float]:
    """How many heads can go together for less than SPARE of the loss, those of smallest impact
    first, and those that write least first; 95 % intervals over resamples of the documents."""
    limit = SPARE * of_run.base
    columns = {}
    for name, order in {
        "heads_to_spare": "smallest first",
        "quiet_to_spare": "quietest first",
    }.items():
        own = of_run.of_kind(order)
        if not len(own):  # an older file
            continue
        cost = of_run.cost[:, own]  # [n, sizes]
        sizes = of_run.sets[own].sum(1)
        columns[name] = heads_to_spare(cost.mean(0), sizes, limit)
        low = high = math.nan
        if len(cost) >= MIN_UNITS:
            means = bootstrap_means(cost, args.bootstrap, args.seed)  # [draws, sizes]
            draws = [heads_to_spare(mean, sizes, limit) for mean in means]
            low, high = np.quantile(draws, [0.025, 0.975])
        columns |= {f"{name}_lo": low, f"{name}_hi": high}
    return columns


NO_BACKUP = "none"  # an empty column says that there was nothing to tell it by


def backup_columns(pairs: pd.DataFrame, hero: str) -> dict[str, Any]:
    """For the summary: the head that stands in most for the first one, `hero`; "none" where none is
    told to, and how much may have been missed; empty without intervals."""
    of_hero = pairs[(pairs["head_1"] == hero) | (pairs["head_2"] == hero)]
    row = {"backup": "", "backup_interaction": math.nan, "backup_at_most": of_hero["ci_hi"].max()}
    if of_hero["ci_lo"].isna().all():  # too few documents, or the hero is in no pair
        return row
    told = of_hero[of_hero["ci_lo"] > 0]
    if told.empty:
        return row | {"backup": NO_BACKUP}
    best = told.loc[told["interaction"].idxmax()]
    name = best["head_2"] if best["head_1"] == hero else best["head_1"]
    return row | {"backup": name, "backup_interaction": best["interaction"]}


def tell(summary: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Prints of every run and mode the Hero Head, or that there is none, with its uncertainty; then
    how two runs compare."""
    for _, row in summary.iterrows():
        tell_of_run(row)
        if row["mode"] == row["ranked_by"] and not row["unique_hero"]:
            tell_what_it_takes(row, facts)
    if "difference" in summary:
        row = summary.iloc[0]
        one, two = summary["run"].unique()
        what = f"best head of {one} minus best of {two}, {row['mode']} ablation"
        if row["n_unit"] < MIN_UNITS:
            return
        print(f"{what}: {with_interval(row, 'difference')} nats over {row['unit']}; ", end="")
        print("n=1 seed: descriptive only")


def tell_of_run(row: pd.Series) -> None:
    """Prints the lines about one run and mode."""
    first = f"L{row['hero_layer']}H{row['hero_head']}"
    second = f"L{row['second_layer']}H{row['second_head']}"
    verdict = "Hero Head" if row["unique_hero"] else "no unique hero; the first head is"
    print(f"{row['run']}, {row['mode']} ablation: {verdict} {first}")
    if not row["base_loss"] < row["unigram_loss"]:
        fact = f"the model does not beat word frequencies ({row['unigram_loss']:.4f} nats)"
        print(f"  {fact}, so none of its heads can be a hero")

    percent = 100 * row["delta"] / row["base_loss"]
    impact = f"impact {row['delta']:+.5f} nats a token, {percent:+.3f} % of {row['base_loss']:.4f}"
    n = f"n = {row['n_unit']} {row['unit']}"
    if row["unit"] == "documents":
        n += f" of {row['n_seq']} sequences"
    if row["n_unit"] < MIN_UNITS:
        print(f"  {impact}, ahead of {second} by {row['gap']:+.5f}")
        print(f"  {n}: no interval, no p value and no Hero Head with fewer than {MIN_UNITS}")
        return
    fitted = f"cross-fitted {with_interval(row, 'crossfit')}"
    lead = f"ahead of {second} by {with_interval(row, 'gap')}"
    draws = f"in front in {row['p_top1']:.1%} of resamples"
    print(f"  {impact}; {fitted}; p (max-T) {row['p_maxT']:.4f}; {lead}; {draws}")
    if row["n_linear"]:
        print(f"  {tell_steadiness(row)}")

    if row.get("n_dropped", math.nan) >= 0:
        n_screen = f"{row['n_screen']:.0f} other sequences"
        missed = f"that one of them is in truth the first: p {row['p_missed']:.2g}"
        if row["mode"] != row["chosen_by"]:
            missed += f" ({row['chosen_by']} ablation)"
        print(f"  {row['n_dropped']:.0f} heads were dropped after {n_screen}; {missed};")
        print("  what is said of the first head is of the second stage alone")
    power = f"detects {row['min_detectable']:.5f} nats with 80 % power"
    heads = [row[f"effective_heads{end}"] for end in ("", "_lo", "_hi")]
    shared = f"effective heads {heads[0]:.1f} [{heads[1]:.1f}, {heads[2]:.1f}]"
    if math.isnan(row["n_negative"]):
        shared = "of the heads of the second stage alone"
    elif math.isnan(heads[0]):
        shared = "how many heads share the impact cannot be told"
    print(f"  {n}: {power}; {shared}; two tied heads make a Hero Head in about 5 %")


def tell_what_it_takes(row: pd.Series, facts: dict[str, Any]) -> None:
    """Prints how much more text would tell whether the first head is a Hero Head."""
    n_needed = row["n_needed"]
    if math.isnan(n_needed) or n_needed <= row["n_seq"]:
        return
    seconds = facts["runs"][row["run"]].get("seconds_a_sequence", math.nan)
    time_needed = "" if math.isnan(seconds) else f", about {duration(seconds * n_needed)} here"
    cost = f"{n_needed:,.0f} sequences{time_needed}"
    print(f"  if its lead is as measured, {cost}, would tell it from the second with 80 % power")


def lead_elsewhere(
    ablation: Ablation, statistics: HeadStatistics, args: argparse.Namespace
) -> dict[str, float]:
    """For the summary: 95 % interval of the first head's lead, as a statement about other
    documents."""
    delta = ablation.elsewhere()  # [documents, R]
    if len(statistics.crossfit) == 0:  # too few documents
        return dict.fromkeys(["gap_elsewhere_lo", "gap_elsewhere_hi"], math.nan)
    low, high = lead_interval(delta, statistics.hero, args.bootstrap, args.seed)
    return {"gap_elsewhere_lo": low, "gap_elsewhere_hi": high}


def tell_together(summary: pd.DataFrame) -> None:
    """Prints of every run what its heads do together."""
    for _, row in summary.drop_duplicates("run").iterrows():
        ends = f"[{row['heads_to_spare_lo']:.1f}, {row['heads_to_spare_hi']:.1f}]"
        if math.isnan(row["heads_to_spare_lo"]):
            ends = f"(no interval below {MIN_UNITS} documents)"
        spare = (
            f"{row['heads_to_spare']:.1f} {ends} heads can go together for {SPARE:.0%} of the loss"
        )
        print(f"{row['run']}: {spare}; {tell_backup(row)}")


def tell_backup(row: pd.Series) -> str:
    """Whether a head stands in for the first one; a few words."""
    if not row["backup"]:
        return "it cannot be told whether a head stands in for the first one"
    if row["backup"] == NO_BACKUP:
        found = "none of the heads of its pairs is told to stand in for the first one"
        return f"{found}: both cost at most {row['backup_at_most']:+.5f} nats more than one by one"
    more = f"{row['backup_interaction']:+.5f} nats more than one by one"
    return f"{row['backup']} stands in for the first one: both cost {more}"


def tell_steadiness(row: pd.Series) -> str:
    """What the control variate did to the standard errors, in a sentence."""
    split = f"first-order effects of {row['n_linear']:,} sequences make standard errors"
    span = f"{row['se_ratio']:.2g} times smaller (median; {row['se_ratio_lo']:.2g} to"
    as_large = str(row["not_steadied"] or "")
    but = f"; not of {as_large}" if as_large else ""
    lead = f"[{row['gap_elsewhere_lo']:+.5f}, {row['gap_elsewhere_hi']:+.5f}]"
    scope = f"intervals hold for these sequences; for other documents the lead is in {lead}"
    return f"{split} {span} {row['se_ratio_hi']:.2g}{but}); {scope}"


def with_interval(row: pd.Series, name: str) -> str:
    """A value of the summary with its 95 % interval."""
    return f"{row[name]:+.5f} [{row[f'{name}_lo']:+.5f}, {row[f'{name}_hi']:+.5f}]"


# ---- figures, from the CSV and the summary alone


def draw(csv: Path) -> None:
    """Table 3, Figure 4 and the heatmap, from the CSV and the summary alone."""
    table, summary = read_tables(csv)
    ranking = table[table["mode"] == summary["ranked_by"].iloc[0]]
    top = table3(table, ranking)
    save(named(csv, "_table3.csv"), top.to_csv(index=False, float_format="%.10g"))
    save(named(csv, "_table3.md"), as_markdown(top))
    figures = {"_figure4.png": (figure4, table), "_heatmap.png": (heatmap, ranking)}
    for end, (figure, heads) in figures.items():
        save_figure(functools.partial(figure, heads, summary), named(csv, end))
    if named(csv, "_together.csv").exists() and named(csv, "_pairs.csv").exists():
        curves = csv_table(named(csv, "_together.csv"))
        pairs = csv_table(named(csv, "_pairs.csv"))
        draw_both = functools.partial(figure_together, curves, pairs)
        save_figure(draw_both, named(csv, "_together.png"))


def read_tables(csv: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The CSV, with the columns `name` (L3H1), ci_all_lo_pct and ci_all_hi_pct (% of base loss),
    and its summary; whatever else they hold is left alone."""
    impacts = ["base_loss", "impact", "pct_impact", "rank", "n_seq"]
    uncertain = ["ci_all_lo", "ci_all_hi", "p_maxT"]
    table = read_table(csv, ["run", "mode"], ["layer", "head", *impacts], uncertain)
    path = named(csv, "_summary.csv")
    heroes = ["hero_layer", "hero_head", "unique_hero", "base_loss", "n_unit"]
    summary = read_table(path, ["run", "mode", "ranked_by", "unit"], heroes, ["noise_limit"])
    in_table = set(zip(table["run"], table["mode"], strict=True))
    in_summary = set(zip(summary["run"], summary["mode"], strict=True))
    if in_table != in_summary or not set(summary["ranked_by"]) <= set(summary["mode"]):
        fact = f"{path} is not the summary of {csv}: other runs or modes"
        raise HandoffError(f"{fact}; make both with: {REMEDY}")
    heads = zip(table["layer"], table["head"], strict=True)
    table["name"] = [f"L{layer}H{head}" for layer, head in heads]
    table["ci_all_lo_pct"] = 100 * table["ci_all_lo"] / table["base_loss"]
    table["ci_all_hi_pct"] = 100 * table["ci_all_hi"] / table["base_loss"]
    return table, summary


def read_table(
    path: Path, names: list[str], numbers: list[str], uncertain: list[str]
) -> pd.DataFrame:
    """A CSV of this script, checked to have the columns `names`, numbers in `numbers`, and numbers
    or nothing in `uncertain`."""
    try:
        table = csv_table(path)
        table[uncertain].astype(float)
        has_numbers = table[numbers].astype(float).notna().all(axis=None)
        if not has_numbers or table[names].isna().any(axis=None) or table.empty:
            raise ValueError("no rows, or empty cells")
    except (OSError, ValueError, KeyError) as e:
        fact = f"{path} is not a table of ablation_test.py ({e})"
        raise HandoffError(f"{fact}; make it with: {REMEDY}") from None
    return table


def named(csv: Path, end: str) -> Path:
    """An output beside the CSV: results.csv, _figure4.png -> results_figure4.png."""
    return csv.with_name(csv.stem + end)


def save(path: Path, text: str) -> None:
    """Writes a text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def table3(table: pd.DataFrame, ranking: pd.DataFrame) -> pd.DataFrame:
    """Table 3: the heads of largest impact in the ranking mode, beside their zero ablation and the
    published heads; intervals that hold for all heads at once, since the first ones are shown. A
    column that the CSV lacks is empty."""
    top = ranking.nlargest(len(PUBLISHED), "pct_impact").reset_index(drop=True)
    # The published numbers are of zero ablation
    zero = table[table["mode"] == "zero"].set_index(["run", "name"])["pct_impact"]
    heads = zip(top["run"], top["name"], strict=True)
    top["zero_pct_impact"] = [zero.get(head, math.nan) for head in heads]
    top["published_head"] = list(PUBLISHED)[: len(top)]
    top["published_zero_pct_impact"] = list(PUBLISHED.values())[: len(top)]
    identity = ["run", "name", "mode"]
    ours = ["pct_impact", "ci_all_lo_pct", "ci_all_hi_pct", "p_maxT", "p_top1", "n_seq"]
    ours += ["zero_pct_impact"]
    published = ["published_head", "published_zero_pct_impact"]
    return top.reindex(columns=[*identity, *ours, *published])


def as_markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown, numbers to four digits."""
    lines = [list(frame.columns), ["---"] * frame.shape[1]]
    for row in frame.to_numpy():
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row])
    rows = [[markdown_text(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def describe_units(summary: pd.DataFrame) -> str:
    """n of a figure, and what is missing where it is too small."""
    n = summary["n_unit"].iloc[0]
    few = f"; fewer than {MIN_UNITS}: no intervals, no p values" if n < MIN_UNITS else ""
    return f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n} {summary['unit'].iloc[0]}{few}"


def family_of(table: pd.DataFrame) -> str:
    """Which heads an interval holds for at once: those that were dropped have sequences of their
    own."""
    if "stage" in table and table["stage"].min() == 2:
        return " of the second stage"
    if "stage" not in table or table["stage"].nunique() < 2:
        return ""
    n_first, n_second = (table.loc[table["stage"] == stage, "n_seq"].max() for stage in (1, 2))
    return f" of a stage (first: {n_first:.0f} sequences, second: {n_second:.0f})"


def figure4(table: pd.DataFrame, summary: pd.DataFrame, is_stacked: bool = False) -> plt.Figure:
    """Figure 4: the impact of every head. A panel a run names the first heads in the ranking mode;
    a small panel a further mode shows all heads of all runs."""
    runs = list(table["run"].unique())
    ranked_by = summary["ranked_by"].iloc[0]
    others = [mode for mode in table["mode"].unique() if mode != ranked_by]
    n_rows = min(NAMED_HEADS, table.groupby(["run", "mode"]).size().max())
    tall = 1.3 + 0.19 * n_rows  # inches, of a panel with a line a head
    if is_stacked:
        panels = [[name] for name in [*runs, *others]]
        heights = [tall] * len(runs) + [2.6] * len(others)
        form: dict[str, Any] = {"figsize": (4.5, sum(heights) + 0.8), "height_ratios": heights}
    else:
        panels = [[*runs, mode] for mode in others] or [runs]
        width = 3.4 * len(runs) + 3.2 * bool(others)
        form = {"figsize": (max(6.2, width), max(tall, 2.3 * len(others), 3) + 0.6)}
    # Panels are numbered: a run may be called like a mode
    names = [*runs, *others]
    places = [[names.index(name) for name in line] for line in panels]
    fig, axes = plt.subplot_mosaic(places, layout="constrained", **form)

    for i, run in enumerate(runs):
        row = summary[(summary["run"] == run) & (summary["mode"] == ranked_by)].iloc[0]
        heads = table[(table["run"] == run) & (table["mode"] == ranked_by)]
        if i > 0:
            axes[i].sharex(axes[0])  # so that runs can be compared
        draw_heads(axes[i], heads.sort_values("rank"), row, COLORS[i % 2])
    for i, mode in enumerate(others):
        draw_ranks(axes[len(runs) + i], table[table["mode"] == mode], runs)
    note = f"Filled: above 0, p < .05 (max-T over the heads of a run); {describe_units(summary)}. "
    note += f"Bars, bands: 95 % intervals that hold for all heads{family_of(table)} at once. "
    note += "One training seed a run."
    fig.supxlabel(textwrap.fill(note, round(13 * fig.get_figwidth())), fontsize=8.5)
    return fig


def draw_heads(ax: plt.Axes, heads: pd.DataFrame, row: pd.Series, color: str) -> None:
    """The first heads of one run in Figure 4 (`heads`: the first one first), a line each, with
    their intervals; `row`: of the summary."""
    shown = heads.head(NAMED_HEADS)
    below = heads.iloc[NAMED_HEADS:]
    percent = shown["pct_impact"]  # of base loss
    y = np.arange(len(shown))
    bar = [percent - shown["ci_all_lo_pct"], shown["ci_all_hi_pct"] - percent]
    style: dict[str, Any] = {"color": color, "marker": "o", "ms": 5, "ls": "", "lw": 1}
    ax.errorbar(percent, y, xerr=np.maximum(bar, 0), markerfacecolor="white", **style)
    is_above = (shown["p_maxT"] < 0.05).to_numpy()
    ax.plot(percent[is_above], y[is_above], zorder=3, **style)
    ax.axvline(0, color="black", lw=0.8)
    ax.set(yticks=y, yticklabels=shown["name"], ylim=(len(shown) - 0.4, -0.6))
    ax.tick_params(axis="y", labelsize=8.5, length=2)
    title = f"{as_label(row['run'])}, {row['mode']} ablation"
    verdict = "stands out" if row["unique_hero"] else "not unique"
    ax.set_title(f"{title}\nfirst: {shown['name'].iloc[0]}, {verdict}", fontsize=10)
    label = "loss impact of removing the head\n(% of the loss)"
    if len(below):
        largest = max(0.0, below["pct_impact"].max())
        label += f"\n{len(below)} more heads, none above {largest:.2g} %"
    ax.set_xlabel(label)


def draw_ranks(ax: plt.Axes, table: pd.DataFrame, runs: list[str]) -> None:
    """All heads of all runs in one mode (`table`), sorted, in a small panel of Figure 4."""
    for i, run in enumerate(runs):
        heads = table[table["run"] == run].sort_values("rank")
        rank = np.arange(1, len(heads) + 1)
        first = heads.iloc[0]
        label = f"{as_label(run)}, first {first['name']}"
        color = COLORS[i % 2]
        ax.plot(rank, heads["pct_impact"], color=color, marker="o", ms=2.5, lw=0.8, label=label)
        # Of an interval that was not measured there is no band
        ends = heads[["ci_all_lo_pct", "ci_all_hi_pct"]].to_numpy()  # [R, 2]
        ax.fill_between(rank, ends[:, 0], ends[:, 1], color=color, alpha=0.2, lw=0)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_title(f"{table['mode'].iloc[0]} ablation", fontsize=10)
    ax.set(xlabel="rank of the head", ylabel="% of the loss")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.legend(fontsize=8.5, frameon=False)


def heatmap(ranking: pd.DataFrame, summary: pd.DataFrame, is_stacked: bool = False) -> plt.Figure:
    """Impact of every head, layers x heads, in the ranking mode; runs on one colour scale, with the
    same ticks."""
    runs = ranking["run"].unique()
    mode = ranking["mode"].iloc[0]
    layers = sorted(ranking["layer"].unique())
    heads = sorted(ranking["head"].unique())
    down, across = (len(runs), 1) if is_stacked else (1, len(runs))
    cell = 0.5 if len(layers) * len(heads) <= CELLS_WITH_NUMBERS else 0.3  # inches
    width = min(12.5, 2.4 + (0.8 + cell * len(heads)) * across)
    size = (4.5 if is_stacked else max(5.5, width), 1.6 + (0.9 + 0.3 * len(layers)) * down)
    fig, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    low = min(0.0, ranking["pct_impact"].min())
    high = max(ranking["pct_impact"].max(), 1e-12)
    norm = colors.Normalize(low, high)
    for ax, run in zip(axes.flat, runs, strict=True):
        of_run = ranking[ranking["run"] == run].set_index(["layer", "head"])
        cells = pd.MultiIndex.from_product([layers, heads])
        row = summary[(summary["run"] == run) & (summary["mode"] == mode)].iloc[0]
        image = draw_map(ax, of_run.reindex(cells), row, norm, has_numbers=cell == 0.5)
        # As many names as can be read, the same in every panel
        step = 1 + (len(heads) - 1) // (12 if is_stacked else 20)
        ax.set(xticks=range(0, len(heads), step), xticklabels=heads[::step])

    label = f"loss impact, {mode} ablation (% of the loss)"
    where = "bottom" if is_stacked else "right"
    thin = 20 if is_stacked else max(10, 5 * size[1])  # length over width
    bar = fig.colorbar(image, ax=axes, label=label, location=where, aspect=thin)
    # The limits of the scale, and some numbers between them
    between = ticker.MaxNLocator(5).tick_values(low, high)
    margin = 0.12 * (high - low)
    inner = between[(between > low + margin) & (between < high - margin)]
    bar.set_ticks([low, *inner, high])
    bar.set_ticklabels([f"{value:.3g}" for value in (low, *inner, high)])
    note = "Frame: first head (dotted: not unique). "
    if ranking["p_maxT"].notna().any():
        note += "Dot: above 0, p < .05 (max-T over the heads of a run). "
    note += f"{describe_units(summary)}."
    fig.supxlabel(textwrap.fill(note, round(13 * fig.get_figwidth())), fontsize=8.5)
    return fig


ORDERS = {  # of removal: colour, and how it is called
    "largest first": ("#D55E00", "largest impact first"),
    "smallest first": ("#0072B2", "smallest impact first"),
    "quietest first": ("#009E73", "least written first"),
}


def figure_together(
    curves: pd.DataFrame, pairs: pd.DataFrame, is_stacked: bool = False
) -> plt.Figure:
    """What heads cost when several go: two panels a run, the loss against the number removed, and
    what the first heads in pairs cost beyond what they cost alone."""
    runs = list(curves["run"].unique())
    across = 1 if is_stacked else 2
    down = 2 * len(runs) // across
    size = (4.5 if is_stacked else 9.5, 3.6 * down)
    fig, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for i, run in enumerate(runs):
        left, right = axes.reshape(-1, 2)[i]
        draw_removal(left, curves[curves["run"] == run])
        draw_pairs(right, pairs[pairs["run"] == run])
    n = curves["n_unit"].iloc[0]
    has_intervals = curves["ci_lo"].notna().any()
    bars = (
        "Bars: 95 %, each by itself" if has_intervals else f"Fewer than {MIN_UNITS}: no intervals"
    )
    note = f"n = {n} documents. {bars}; dotted: {SPARE:.0%} of the loss. "
    note += f"Grey: {RANDOM_ORDERS} random orders, least to most."
    if pairs["ci_lo"].notna().any():
        note += " Dot in a square: 95 % interval, for all pairs at once, leaves 0 out."
    fig.supxlabel(textwrap.fill(note, round(13 * fig.get_figwidth())), fontsize=8.5)
    return fig


def draw_removal(ax: plt.Axes, curves: pd.DataFrame) -> None:
    """Panel: cost of removing the first heads of each order, in % of the loss."""
    random_orders = curves[curves["order"].str.startswith("random")]
    band = random_orders.groupby("n_removed")["pct_cost"].agg(["min", "median", "max"])
    ax.fill_between(band.index, band["min"], band["max"], color="0.7", alpha=0.5, lw=0)
    ax.plot(band.index, band["median"], color="0.4", label="random order")
    for order, (color, label) in ORDERS.items():
        own = curves[curves["order"] == order].sort_values("n_removed")
        if own.empty:
            continue
        scale = 100 / own["base_loss"]
        below = scale * (own["cost"] - own["ci_lo"]).fillna(0)
        above = scale * (own["ci_hi"] - own["cost"]).fillna(0)
        ax.errorbar(
            own["n_removed"],
            own["pct_cost"],
            [below, above],
            color=color,
            marker="o",
            ms=4,
            label=label,
        )
    ax.axhline(0, color="black", lw=0.8)
    ax.set_title(f"{as_label(curves['run'].iloc[0])}: heads removed together", fontsize=10)
    ax.set(xlabel="heads removed", ylabel="rise of the loss (%)")
    ax.axhline(100 * SPARE, color="black", lw=0.8, ls=":")
    ax.set_yscale("symlog", linthresh=1)
    lowest = np.nanmin([curves["pct_cost"], 100 * curves["ci_lo"] / curves["base_loss"]])
    ax.set_ylim(bottom=min(-0.3, 1.2 * lowest))
    marks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    ax.yaxis.set_major_locator(ticker.FixedLocator([-mark for mark in marks] + [0, *marks]))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.legend(fontsize=8.5, edgecolor="none")  # on white, as a line passes behind it


def draw_pairs(ax: plt.Axes, pairs: pd.DataFrame) -> None:
    """Panel: what each pair costs beyond its two heads, in thousandths of a nat."""
    names = list(dict.fromkeys([*pairs["head_1"], *pairs["head_2"]]))
    table = np.full((len(names), len(names)), math.nan)
    for row in pairs.itertuples():
        table[names.index(row.head_2), names.index(row.head_1)] = 1000 * row.interaction
    most = max(np.nanmax(np.abs(table)), 1e-9)
    image = ax.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most)
    for row in pairs.itertuples():
        i, j = names.index(row.head_2), names.index(row.head_1)
        ink = "#eeeeee" if abs(table[i, j]) > 0.6 * most else "#111111"
        value = table[i, j]
        shown = f"{value:+.2g}" if abs(value) >= 0.1 else f"{value:+.1f}"  # as wide as its square
        ax.text(j, i, shown, ha="center", va="center", fontsize=8, color=ink)
        if row.ci_lo > 0 or row.ci_hi < 0:
            ax.plot(j + 0.36, i - 0.34, color=ink, marker="o", ms=2.5)
    ax.set(xticks=range(len(names) - 1), xticklabels=names[:-1])
    ax.set(yticks=range(1, len(names)), yticklabels=names[1:], ylim=(len(names) - 0.5, 0.5))
    ax.set_xlim(-0.5, len(names) - 1.5)
    ax.tick_params(labelsize=8.5)
    ax.set_title("both at once, beyond one by one\nred: each stands in for the other", fontsize=10)
    plt.colorbar(image, ax=ax, label="nats / 1000 a token")


def draw_map(
    ax: plt.Axes, heads: pd.DataFrame, row: pd.Series, norm: colors.Normalize, has_numbers: bool
) -> Any:
    """One run of the heatmap, its first head framed -> the image, for the colour bar. heads: by
    layer and head."""
    impact = heads["pct_impact"].unstack()  # [layers, H]
    p = heads["p_maxT"].unstack().to_numpy()  # [layers, H]
    image = ax.imshow(impact, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    digits = max(0, 1 - math.floor(math.log10(norm.vmax)))  # two of the largest
    for (i, j), value in np.ndenumerate(impact.to_numpy()):
        if math.isnan(value):
            continue
        # Not quite black or white: on a page those are the colours of its text and its ground
        ink = "#eeeeee" if norm(value) > 0.65 else "#111111"
        if has_numbers:
            number = f"{round(value, digits) + 0.0:.{digits}f}"
            ax.text(j, i, number, ha="center", va="center", fontsize=7.5, color=ink)
        if p[i, j] < 0.05:
            ax.plot(j + 0.36, i - 0.3, color=ink, marker="o", ms=2.5)
    # The frame around the first head
    left = impact.columns.get_loc(row["hero_head"]) - 0.5
    bottom = impact.index.get_loc(row["hero_layer"]) - 0.5
    line = "-" if row["unique_hero"] else ":"
    ax.add_patch(plt.Rectangle((left, bottom), 1, 1, fill=False, lw=2, ls=line, ec=COLORS[0]))
    ax.set(title=as_label(row["run"]), xlabel="head", ylabel="layer")
    ax.set(yticks=range(len(impact)), yticklabels=impact.index)
    return image


# ------------------------------------------------------------------------------------- command line
SCREEN_NOTE = (
    "CSV column first_order: mean over sequences of |sum of (substitute - z) dloss/dz|, "
    "a sensitivity from one backward pass"
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked; exits 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=SCREEN_NOTE,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_input_flags(parser)
    add_output_flags(parser)
    add_method_flags(parser)
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Models and text."""
    group = parser.add_argument_group("inputs")
    adaptive = "checkpoint (.pt), or a pretrained model: folder, hub name, .gguf; not for --redraw"
    control = "another checkpoint, measured on the same sequences"
    redraw = "no model: all but the .npz again from CSV's .npz (without it: figures)"
    dataset = "text, as for janus_adaptive.py; default: that of the checkpoint"
    tokenizer = "as for janus_adaptive.py; default: tokenizer.json beside the checkpoint"
    group.add_argument("--adaptive_model", type=Path, help=adaptive)
    group.add_argument("--control_model", type=Path, help=control)
    group.add_argument("--redraw", type=Path, metavar="CSV", help=redraw)
    group.add_argument("--dataset", help=dataset)
    group.add_argument("--tokenizer", help=tokenizer)
    add_bos_flag(group)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Where the results go."""
    group = parser.add_argument_group("outputs")
    csv = Path("results_ablation.csv")
    csv_help = "the CSV; the other names derive from it"
    group.add_argument("--save_file", type=Path, default=csv, help=csv_help)


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """What is ablated, how, and on how much text."""
    group = parser.add_argument_group("method")
    presets = ["auto", *PHASE_PRESETS]
    count = positive(int)
    preset = "sizes of this phase; auto: the checkpoint's preset"
    layers = "layers whose heads are ablated, counted from 0; default: all"
    mode = "what replaces z; of those given the first in the order above ranks the heads; default: "
    mode += f"{' '.join(DEFAULT_MODES)}; with --redraw: all that the .npz holds"
    n_seqs = "validation sequences, evenly spaced; 0: the whole split"
    confirm = "two stages: the heads that may still lead after --screen sequences get N fresh ones "
    confirm += "of other documents, which alone decide on the Hero Head"
    keep = "heads of the second stage at most; default: all that may still lead, with --minutes as "
    keep += f"many as it buys {N_FRESH} sequences each"
    minutes = "the same, with as many sequences in both stages as this time buys"
    n_linear = "validation sequences of the first-order effects, which steady the exact ones, "
    n_linear += "evenly spaced; those of --n_seqs are some of them; 0: the whole split"
    n_together = "validation sequences on which several heads are mean-ablated at once: cumulative "
    n_together += "curves, pairs of the first heads; 0: none"
    plain = "without them: the exact effects alone, with larger standard errors"
    n_mean = "training sequences behind the means"
    draws = "draws of a random mode (resample: other sequences of the same split)"
    group.add_argument("--preset", choices=presets, default="auto", help=preset)
    group.add_argument("--layers", type=integer, nargs="+", help=layers)
    group.add_argument("--mode", nargs="+", choices=MODES, help=mode)
    n_seqs += by_preset("n_seqs")
    group.add_argument("--n_seqs", "--screen", type=integer, help=n_seqs)
    group.add_argument("--confirm", type=count, metavar="N", help=confirm)
    group.add_argument("--keep", type=count, metavar="C", help=keep)
    group.add_argument("--minutes", type=positive(float), help=minutes)
    group.add_argument("--n_linear", type=integer, help=n_linear + by_preset("n_linear"))
    group.add_argument("--n_together", type=integer, help=n_together + by_preset("n_together"))
    group.add_argument("--plain", action="store_true", help=plain)
    group.add_argument("--n_mean", type=count, help=n_mean + by_preset("n_mean"))
    group.add_argument("--resample_draws", type=count, help=draws + by_preset("resample_draws"))
    group.add_argument("--bootstrap", type=count, default=10_000, help="bootstrap draws")
    sequences = "sequences a batch" + by_preset("batch_size")
    group.add_argument("--batch_size", type=count, help=sequences)


def by_preset(flag: str) -> str:
    """For the help of a flag: its value in every preset."""
    values = [f"{preset} {sizes[flag]}" for preset, sizes in PHASE_PRESETS.items()]
    return f"; by preset: {', '.join(values)}"


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks; exits 2 with one line. Puts --mode in the order of MODES."""
    if args.mode is None and not args.redraw:
        args.mode = DEFAULT_MODES
    if args.mode is not None:  # None: all modes of the .npz
        args.mode = [mode for mode in MODES if mode in args.mode]
    args.save_file = args.redraw or args.save_file
    if not args.redraw and not args.adaptive_model:
        parser.error("--adaptive_model is needed (or --redraw CSV)")
    if args.save_file.suffix != ".csv":
        parser.error(f"{args.save_file} must end in .csv")
    if args.n_seqs is not None and args.n_seqs < 8 and args.n_seqs != 0:
        expected = "expected at least 8 sequences, or 0 for the whole split"
        parser.error(f"--n_seqs {args.n_seqs}: {expected}")
    for flag in ("n_linear", "n_together"):
        if (getattr(args, flag) or 0) < 0:
            parser.error(f"--{flag} {getattr(args, flag)}: expected 0 or more")
    check_stages(parser, args)
    if args.bootstrap < 100 or args.seed < 0:
        found = f"--bootstrap {args.bootstrap} and --seed {args.seed}"
        parser.error(f"{found}: expected at least 100 draws, and a seed from 0")


def check_stages(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The flags of the second stage; exits 2 with one line."""
    if args.minutes and (args.confirm or args.n_seqs is not None):
        parser.error(
            "--minutes chooses the numbers of sequences: give it, or --screen and --confirm"
        )
    if args.keep == 1 or (args.keep and not has_second_stage(args)):
        parser.error(f"--keep {args.keep}: expected at least 2, and --confirm or --minutes")
    if args.confirm and args.confirm < MIN_UNITS:
        parser.error(f"--confirm {args.confirm}: expected at least {MIN_UNITS} sequences")
    fitted = [mode for mode in args.mode or [] if MODES[mode].fit]
    if has_second_stage(args) and fitted == args.mode:
        parser.error(f"--mode {' '.join(fitted)} needs another mode that chooses its heads")


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


# >>> shared: runtime ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script spells alike."""
    cache = os.environ.get("JANUS_CACHE", "~/.cache/janus_arc")
    devices = ["auto", "cpu", "cuda", "mps"]
    dtypes = ["auto", "float32", "bfloat16"]
    dtype_help = "of matrix products; auto: bfloat16 if fast"
    probe_help = "do not replay a checkpoint's golden probe (deliberate model variants)"
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=integer, default=42, help="seed of Python, NumPy and torch")
    group.add_argument("--device", choices=devices, default="auto", help="where to compute")
    group.add_argument("--dtype", choices=dtypes, default="auto", help=dtype_help)
    add_threads_flag(group)
    group.add_argument("--overwrite", action="store_true", help="replace existing output")
    group.add_argument("--cache_dir", default=cache, help="folder of the token cache")
    group.add_argument("--skip_probe", action="store_true", help=probe_help)
    add_version_flag(parser)


def set_up(args: argparse.Namespace) -> tuple[torch.device, Any]:
    """Seeds everything -> the device of --device and the autocast context of --dtype.

    auto: CUDA, else MPS, else the CPU; bfloat16 where the hardware multiplies it fast (GPUs, AMX
    and AVX512-BF16 CPUs). Raises HandoffError if the device is not there.
    """
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)  # noqa: NPY002 -- some libraries use the global generator
    torch.manual_seed(args.seed)

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    name = available[0] if args.device == "auto" else args.device
    if name not in available:
        found = ", ".join(available)
        raise HandoffError(f"--device {name} is not available here; found: {found}")
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's number of this process
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            fact = f"torchrun started process {local_rank} (from 0) where there are {n_gpus} GPUs"
            raise HandoffError(f"{fact}; give --nproc_per_node {n_gpus}")
        torch.cuda.set_device(local_rank)

    use_bfloat16 = args.dtype == "bfloat16"
    if args.dtype == "auto":
        use_bfloat16 = multiplies_bfloat16_fast(name)
    return torch.device(name), torch.autocast(name, dtype=torch.bfloat16, enabled=use_bfloat16)


def multiplies_bfloat16_fast(device_name: str) -> bool:
    """Whether the hardware has bfloat16 products, and torch may use them (ATEN_CPU_CAPABILITY can
    forbid it); elsewhere they are emulated, and slower."""
    if device_name == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_name == "cpu":
        features = torch.cpu.get_capabilities()
        has_products = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
        return has_products and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return False


# <<< shared: runtime


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


# >>> shared: sidecars ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def sidecar_path(path: str | Path) -> Path:
    """Where the description of an artefact lies: X -> X.json."""
    return Path(f"{path}.json")


def write_sidecar(path: str | Path, schema: str, inputs: list[Any], **facts: Any) -> None:
    """Describes the finished artefact `path` in `path`.json; written last, so that an unfinished
    artefact has none."""

    def size_and_hash(file: str | Path) -> dict[str, Any]:
        return {"bytes": Path(file).stat().st_size, "sha256": sha256(file)}

    described = [{"path": str(file), **size_and_hash(file)} for file in inputs]
    record = {"schema": schema, **size_and_hash(path), "inputs": described, **facts}
    write_json(sidecar_path(path), {**record, "producer": provenance()})


def read_sidecar(path: str | Path, schema: str, remedy: str) -> dict[str, Any]:
    """The description of a finished artefact, checked for schema and size.

    Raises HandoffError, naming `remedy` (the command that makes the artefact), if it is missing,
    unfinished or of another size.
    """
    path = Path(path)
    side = sidecar_path(path)
    if not path.is_file():
        fact = "is not a file" if path.exists() else "does not exist"
        raise HandoffError(f"{path} {fact}; make it with: {remedy}")
    if not side.is_file():
        fact = f"{path} has no sidecar {side.name}: the run that wrote it did not finish"
        fact += ", or it was moved without its sidecar"
        raise HandoffError(f"{fact}; make it with: {remedy}")
    try:
        record = json.loads(side.read_text(encoding="utf-8"))
        found_schema = record["schema"]
        expected_size = record["bytes"]
    except (ValueError, KeyError, TypeError):
        fact = f"{side} is not a readable sidecar"
        raise HandoffError(f"{fact}; remake {path.name} with: {remedy}") from None
    if found_schema != schema:
        fact = f"{path} is {found_schema!r}, expected {schema!r}"
        raise HandoffError(f"{fact}; make it with: {remedy}")
    size = path.stat().st_size
    if size != expected_size:
        fact = f"{path} has {size} bytes, its sidecar says {expected_size}: damaged"
        raise HandoffError(f"{fact}; remake it with: {remedy}")
    return record


def moved_with(named: str | Path, neighbour: Path, is_it: Callable[[Path], bool]) -> Path:
    """The file that `neighbour` names: where the name says, or at the same place beside a folder
    that holds `neighbour`, if both were moved, or named from another folder.

    `is_it` tells by the content. The name as it is, if nothing is it.
    """
    named = Path(named)
    parts = named.parts[1:] if named.is_absolute() else named.parts
    candidates = [named]
    for folder in neighbour.resolve().parents:  # the nearest first
        # Longest ends first: a name may be told by the folders that it lies in
        candidates += [folder.joinpath(*parts[i:]) for i in range(len(parts))]
    for candidate in candidates:
        if candidate.exists() and is_it(candidate):
            return candidate
    return named


def find_checkpoint(named: str | Path, digest: str, neighbour: Path) -> Path:
    """The checkpoint of this sha256 (or its beginning) that the file `neighbour` names."""

    def is_it(path: Path) -> bool:
        return path.is_file() and bool(digest) and sha256(path).startswith(digest)

    return moved_with(named, neighbour, is_it)


# <<< shared: sidecars


# >>> shared: processes ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def under_torchrun(work: Callable[[], int]) -> int:
    """Exit status of `work`. If torchrun started this process it first joins the others (gloo;
    nccl between GPUs), and only rank 0 prints.

    Of several processes that fail the first says why; torchrun then ends those that wait for it.
    """
    if not dist.is_torchelastic_launched():
        return work()
    store, rank, world = next(dist.rendezvous("env://"))
    forever = timedelta(days=30)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=forever)
    silence = io.StringIO()
    out = silence if rank else sys.stdout
    err = silence if rank else sys.stderr
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = work()
    except SystemExit:
        # --help or a wrong command line, the same for all: nobody ends before rank 0 has printed
        all_sum(torch.zeros(1))
        raise
    except BaseException:
        is_first = store.add("failed", 1) == 1
        if is_first:
            raise
        time.sleep(1)  # torchrun ends all when one has ended, and the first may still be printing
        return 1
    dist.destroy_process_group()
    return status


def rank_and_world() -> tuple[int, int]:
    """Number of this process, and how many torchrun started; without it 0 and 1."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def all_sum(*tensors: Tensor) -> None:
    """Replaces each tensor (of one dtype and device) by its sum over all processes, the same
    bits in each of them."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    totals = flat.split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, totals, strict=True):
        tensor.copy_(total.view_as(tensor))


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """The other processes enter the block when rank 0 has left it; if it fails there they never
    do."""
    rank, _ = rank_and_world()
    if rank:
        all_sum(torch.zeros(1))
    yield
    if not rank:
        all_sum(torch.zeros(1))


# <<< shared: processes


# >>> shared: model ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
CHECKPOINT_SCHEMA = "janus.checkpoint/1"


@dataclass
class GPTConfig:
    """Sizes of a NewGPT; saved in the checkpoint, from which every later phase rebuilds the
    model."""

    vocab_size: int
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int = 12  # fewer than n_heads: grouped-query attention
    d_head: int = 64
    d_ff: int = 2048
    seq_len: int = 512  # context, in tokens
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # unembedding = embedding
    dropout: float = 0.0
    # What other families compute (tools/import_hf.py sets it); the defaults are Llama's
    biases: tuple[str, ...] = ()  # of qkv, o, up, down, norm (the last one), unembedding
    centred: bool = False  # residual streams have mean 0, of which LayerNorm is the RMSNorm
    embedding_scale: float = 1.0
    learned_positions: bool = False  # added to the embedding
    # [2, K/2] radians a position, of layers that see all tokens and of those with a window
    rope_frequency: tuple[tuple[float, ...], ...] = ()  # none: by rope_theta
    windows: tuple[int, ...] = ()  # [L], tokens that a layer sees, its own included; 0: all
    qk_norm: str = ""  # RMSNorm of queries and of keys, over each "head" or over "all" heads
    score_cap: float = 0.0  # cap * tanh(score / cap); 0: none
    logit_cap: float = 0.0
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu
    gated: bool = True  # the activation multiplies a second product
    parallel: bool = False  # the MLP reads what attention reads
    norm_before: bool = True  # an RMSNorm of what attention and the MLP read
    norm_after: bool = False  # one of what they write


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019), and
    + bias if it has one."""

    def __init__(self, dim: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        inverse_rms = torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        h = h * inverse_rms * self.weight
        if self.bias is not None:
            h = h + self.bias
        return h.type_as(x)


def rope_tables(cfg: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [2, T, K/2] of the rotary angles, float32, of layers that see all tokens and of
    those with a window; frequency i turns by theta^(-2i/K) a position (Su et al. 2021)."""
    index = torch.arange(0, cfg.d_head, 2, dtype=torch.float32)
    frequency = (cfg.rope_theta ** (-index / cfg.d_head)).expand(2, -1)  # [2, K/2]
    if cfg.rope_frequency:
        frequency = torch.tensor(cfg.rope_frequency)
    position = torch.arange(cfg.seq_len, dtype=torch.float32)  # [T]
    angle = position[:, None] * frequency[:, None]  # [2, T, K/2]
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, H, T, K] by position in float32, in the half-split convention of Llama: the
    pairs are (i, i + K/2)."""
    a, b = x.float().chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # [B, H, T, K]


class Attention(nn.Module):
    """Causal self-attention that hands out z, the heads' outputs before the output projection."""

    def __init__(self, cfg: GPTConfig, window: int) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.n_kv = cfg.n_kv_heads
        self.d_head = cfg.d_head
        self.dropout = cfg.dropout
        self.window = window
        self.cfg = cfg
        n_columns = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
        self.w_qkv = nn.Linear(cfg.d_model, n_columns, bias="qkv" in cfg.biases)
        self.w_o = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias="o" in cfg.biases)
        if cfg.qk_norm:
            n_q, n_k = (1, 1) if cfg.qk_norm == "head" else (cfg.n_heads, cfg.n_kv_heads)
            self.norm_q = RMSNorm(n_q * cfg.d_head, cfg.norm_eps)
            self.norm_k = RMSNorm(n_k * cfg.d_head, cfg.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, want_pattern: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] (normed) -> z [B, T, H, K], and the pattern [B, H, T, T] if wanted."""
        q, k, v = self.qkv(x, cos, sin)  # [B, H, T, K] each
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):  # in the type that `qkv` chose
            if 0 < self.window < x.shape[1] or self.cfg.score_cap:  # which no kernel has
                z = self.pattern(q, k).to(v.dtype) @ v
            elif self.by_rows(x):
                z = self.attention_by_rows(q, k, v)
            else:
                z = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        pattern = self.pattern(q, k) if want_pattern else None
        return z.transpose(1, 2), pattern  # [B, T, H, K]

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] (normed) -> q, k, v [B, H, T, K], q and k rotated; grouped keys and
        values are repeated."""
        heads = self.w_qkv(x).unflatten(-1, (-1, self.d_head))  # [B, T, H + 2 H_kv, K]
        if self.cfg.qk_norm:
            heads = self.normed(heads)
        heads = heads.transpose(1, 2)  # [B, H + 2 H_kv, T, K]
        q, k, v = heads.split((self.n_heads, self.n_kv, self.n_kv), dim=1)
        # On a CPU in float32: the backward pass of bfloat16 attention takes three times as long.
        in_float32 = x.device.type == "cpu" and not self.by_rows(x)
        dtype = torch.float32 if in_float32 else v.dtype
        q = apply_rope(q, cos, sin).to(dtype)
        k = apply_rope(k, cos, sin).to(dtype)
        v = v.to(dtype)
        if self.n_kv != self.n_heads:
            repeats = self.n_heads // self.n_kv
            k = k.repeat_interleave(repeats, dim=1)  # [B, H, T, K]
            v = v.repeat_interleave(repeats, dim=1)  # [B, H, T, K]
        return q, k, v

    def normed(self, heads: Tensor) -> Tensor:
        """Queries, keys and values [B, T, H + 2 H_kv, K] with queries and keys normed."""
        q, k, v = heads.split((self.n_heads, self.n_kv, self.n_kv), dim=2)
        # One length a head, or one for all heads together: as many as the gains
        q = self.norm_q(q.reshape(*q.shape[:2], -1, len(self.norm_q.weight))).reshape(q.shape)
        k = self.norm_k(k.reshape(*k.shape[:2], -1, len(self.norm_k.weight))).reshape(k.shape)
        return torch.cat((q, k, v), dim=2)  # [B, T, H + 2 H_kv, K]

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention probabilities [B, H, T, T] in float32; only formed when somebody wants
        them."""
        score = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, T, T]
        if self.cfg.score_cap:
            score = self.cfg.score_cap * torch.tanh(score / self.cfg.score_cap)
        ones = torch.ones_like(score, dtype=torch.bool)
        hidden = ones.triu(1)  # what comes later
        if self.window:
            hidden = hidden | ones.tril(-self.window)  # and what is too far back
        return score.masked_fill(hidden, -math.inf).softmax(-1)

    def by_rows(self, x: Tensor) -> bool:
        """Whether `attention_by_rows` pays: compiled for a CPU it takes two thirds of the time
        of its attention kernels, but it keeps T^2 numbers a head, too many for a long context."""
        compiled_for_cpu = torch.compiler.is_compiling() and x.device.type == "cpu"
        return compiled_for_cpu and not self.dropout and x.shape[1] <= 1024

    @staticmethod
    def attention_by_rows(q: Tensor, k: Tensor, v: Tensor, blocks: int = 4) -> Tensor:
        """Causal attention [B, H, T, K], a quarter of the queries at a time, each with the keys
        that it may see: plain products and a fused softmax."""
        q = q.contiguous()
        k = k.contiguous()
        v = v.contiguous()
        n_tokens = q.shape[2]
        n_rows = -(-n_tokens // blocks)  # rounded up
        outputs = []
        for first in range(0, n_tokens, n_rows):
            end = min(n_tokens, first + n_rows)
            score = (q[:, :, first:end] @ k[:, :, :end].mT).float()  # [B, H, rows, end]
            score = score / math.sqrt(q.shape[-1])
            ones = torch.ones(end - first, end, dtype=torch.bool, device=q.device)
            later = ones.triu(first + 1)
            probability = score.masked_fill(later, -math.inf).softmax(-1).to(v.dtype)
            outputs.append(probability @ v[:, :, :end])  # [B, H, rows, K]
        return torch.cat(outputs, 2)


def activate(name: str, x: Tensor) -> Tensor:
    """silu, gelu and relu as torch calls them; gelu_tanh approximates gelu."""
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return getattr(F, name)(x)


class Block(nn.Module):
    """x + attention, then + SwiGLU (Shazeer 2020), each after an RMSNorm."""

    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()

        def norm(wanted: bool) -> nn.Module:
            return RMSNorm(cfg.d_model, cfg.norm_eps) if wanted else nn.Identity()

        self.norm_attn = norm(cfg.norm_before)
        self.attn = Attention(cfg, cfg.windows[layer] if cfg.windows else 0)
        self.norm_attn_out = norm(cfg.norm_after)
        self.norm_mlp = norm(cfg.norm_before)
        n_up = 2 * cfg.d_ff if cfg.gated else cfg.d_ff
        self.w_gate_up = nn.Linear(cfg.d_model, n_up, bias="up" in cfg.biases)
        self.w_down = nn.Linear(cfg.d_ff, cfg.d_model, bias="down" in cfg.biases)
        self.norm_mlp_out = norm(cfg.norm_after)
        self.drop = nn.Dropout(cfg.dropout)
        self.cfg = cfg

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: Tensor | None = None,
        keep: tuple[str, ...] = (),
    ) -> tuple[Tensor, dict]:
        """x [B, T, D] -> the next residual stream [B, T, D], and the activations named in
        `keep`."""
        z, pattern = self.attn(self.norm_attn(x), cos, sin, "pattern" in keep)
        if scale is not None:  # [H], of each head
            z = z * scale.to(z.dtype)[:, None]
        attn_out = self.write(z)
        mid = x + self.drop(attn_out)
        mlp_out = self.mlp(x if self.cfg.parallel else mid)
        out = mid + self.drop(mlp_out)
        seen = {
            "resid_pre": x,
            "z": z,
            "pattern": pattern,
            "attn_out": attn_out,
            "resid_mid": mid,
            "mlp_out": mlp_out,
            "resid_post": out,
        }
        return out, {name: seen[name] for name in keep}

    def write(self, z: Tensor) -> Tensor:
        """z [B, T, H, K] -> what the heads together add to the residual stream, attn_out [B, T,
        D]."""
        return self.norm_attn_out(self.attn.w_o(z.flatten(2)))

    def mlp(self, x: Tensor) -> Tensor:
        """Residual stream that the MLP reads [B, T, D] -> mlp_out [B, T, D]."""
        hidden = self.w_gate_up(self.norm_mlp(x))
        if self.cfg.gated:
            gate, up = hidden.chunk(2, dim=-1)  # [B, T, d_ff] each
            hidden = activate(self.cfg.activation, gate) * up
        else:
            hidden = activate(self.cfg.activation, hidden)
        return self.norm_mlp_out(self.w_down(hidden))

    def after_mlp(self, x: Tensor, mid: Tensor) -> Tensor:
        """Residual stream before the block and after its attention [B, T, D] each -> after its
        MLP. What was changed in attention reaches a parallel MLP only in the next block."""
        return mid + self.mlp(x if self.cfg.parallel else mid)


class TokenLoss(nn.Module):
    """Mean cross-entropy (nats) of logits [B, T, V] for targets [B, T]. A module, so that it is
    compiled in place like a block."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class NewGPT(nn.Module):
    """A decoder-only transformer with exactly Llama's computation: pre-RMSNorm, SwiGLU, RoPE, no
    biases. Options of `GPTConfig` make it that of another family.

    `tap` is a dict whose keys name the activations wanted, "<site>.<layer>"; the forward pass
    fills in the values: resid_pre, attn_out, resid_mid, mlp_out, resid_post [B, T, D], z [B, T,
    H, K], pattern [B, H, T, T]. `head_scale` [L, H] multiplies each head's z before the output
    projection: 1 leaves it alone, 0 ablates it.
    """

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.seq_len, cfg.d_model) if cfg.learned_positions else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps, bias="norm" in cfg.biases)
        has_bias = "unembedding" in cfg.biases
        self.unembedding = nn.Linear(cfg.d_model, cfg.vocab_size, bias=has_bias)
        self.drop = nn.Dropout(cfg.dropout)
        self.loss = TokenLoss()
        self.initialise()
        if cfg.tied:
            self.unembedding.weight = self.embedding.weight
        cos, sin = rope_tables(cfg)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def initialise(self) -> None:
        """As GPT-2: normal with sd 0.02; what writes to the residual stream smaller, by depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:  # norms stay 1
                continue
            writes_to_stream = "w_o" in name or "w_down" in name
            shrink = math.sqrt(2 * self.cfg.n_layers) if writes_to_stream else 1
            nn.init.normal_(parameter, std=0.02 / shrink)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        head_scale: Tensor | None = None,
        tap: dict | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, T] -> logits [B, T, V] and, with targets [B, T], the mean cross-entropy in
        nats (else None)."""
        x = self.embed(idx)
        x = self.run_blocks(x, head_scale=head_scale, tap=tap)
        logits = self.unembed(x)
        loss = None if targets is None else self.loss(logits, targets)
        return logits, loss

    def embed(self, idx: Tensor) -> Tensor:
        """Token ids [B, T] -> residual stream before block 0 [B, T, D]."""
        x = self.embedding(idx) * self.cfg.embedding_scale
        if self.positions is not None:
            x = x + self.positions.weight[: idx.shape[1]]
        if self.cfg.centred:
            x = x - x.mean(-1, keepdim=True)
        return self.drop(x)

    def rotary(self, layer: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K/2] by which a layer rotates the queries and keys of n_tokens."""
        block: Any = self.blocks[layer]
        is_local = int(block.attn.window > 0)
        return self.rope_cos[is_local, :n_tokens], self.rope_sin[is_local, :n_tokens]

    def run_blocks(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        head_scale: Tensor | None = None,
        tap: dict | None = None,
    ) -> Tensor:
        """Residual stream x [B, T, D] through blocks start..stop-1; a caller may run just a
        prefix or a suffix of the model."""
        stop = len(self.blocks) if stop is None else stop
        wanted = list(tap or ())
        for l in range(start, stop):
            end = f".{l}"
            keep = tuple(name.removesuffix(end) for name in wanted if name.endswith(end))
            scale = None if head_scale is None else head_scale[l]
            cos, sin = self.rotary(l, x.shape[1])
            x, seen = self.blocks[l](x, cos, sin, scale, keep)
            if tap is not None:
                tap.update({f"{site}.{l}": value for site, value in seen.items()})
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """Residual stream after the last block [B, T, D] -> logits [B, T, V]."""
        logits = self.unembedding(self.norm(x))
        if self.cfg.logit_cap:
            logits = self.cfg.logit_cap * torch.tanh(logits / self.cfg.logit_cap)
        return logits

    def n_params(self) -> tuple[int, int]:
        """Number of parameters: all (a tied embedding counted once), and without embeddings."""
        total = sum(parameter.numel() for parameter in self.parameters())
        n_rows = self.cfg.vocab_size * (1 if self.cfg.tied else 2)
        n_rows += self.cfg.seq_len if self.cfg.learned_positions else 0
        return total, total - n_rows * self.cfg.d_model


def golden_probe(model: NewGPT) -> dict[str, Any]:
    """What the model says, in float32 on the CPU, to 64 fixed tokens: loss in nats, and top-5
    logits at the last one.

    Stored in the checkpoint and replayed on every load: a script whose model has drifted is
    caught.
    """
    n_tokens = min(64, model.cfg.seq_len)
    idx = torch.arange(n_tokens + 1) * 7919 % model.cfg.vocab_size  # 7919 is prime: many kinds
    inputs = idx[None, :-1]  # [1, T]
    targets = idx[None, 1:]  # [1, T]
    weights = {name: w.detach().cpu().float() for name, w in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # making the twin must not move the run's random state
        twin = NewGPT(model.cfg).eval()
    twin.load_state_dict(weights)
    with torch.inference_mode():
        logits, loss = twin(inputs, targets)
    top = logits[0, -1].topk(5)
    return {
        "loss": loss.item(),
        "top_ids": top.indices.tolist(),
        "top_logits": top.values.tolist(),
    }


def load_checkpoint(
    path: str | Path, device: torch.device, skip_probe: bool
) -> tuple[NewGPT, dict[str, Any]]:
    """Reads a Janus checkpoint -> the model in eval mode on `device`, and the rest of the file.

    Raises HandoffError if the file is missing, unfinished, unreadable, of another kind, or
    disagrees with its golden probe.
    """
    remedy = checkpoint_remedy(Path(path))
    side = read_sidecar(path, CHECKPOINT_SCHEMA, remedy)
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        model = NewGPT(GPTConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["model"], strict=True)
        loss_then = ckpt["probe"]["loss"]
        numbers_then = [loss_then, *ckpt["probe"]["top_logits"]]
    except Exception as e:  # a damaged zip, a pickle, other names or shapes: many types
        fact = f"{path} cannot be read as a {CHECKPOINT_SCHEMA} file ({first_line(e, 160)})"
        raise HandoffError(f"{fact}; make it with: {remedy}") from None
    if not skip_probe:
        now = golden_probe(model)
        numbers_now = [now["loss"], *now["top_logits"]]
        if not np.allclose(numbers_now, numbers_then, rtol=1e-5, atol=1e-4):
            fact = f"{path}: the golden probe gives {now['loss']:.5f} nats"
            fact += f", the checkpoint says {loss_then:.5f}"
            # Whose fault it is: the file's, the weights', or the script's
            if sha256(path) != side.get("sha256"):
                cause = (
                    f"its bytes are not those that its sidecar describes; make it with: {remedy}"
                )
            elif not all(weight.isfinite().all() for weight in model.parameters()):
                cause = f"its weights hold NaN or infinity; make it with: {remedy}"
            else:
                cause = f"the model in {Path(__file__).name} is not the one that was trained"
                cause += "; run tools/check_copies.py, or pass --skip_probe where it is a flag"
            raise HandoffError(f"{fact}: {cause}")
    return model.to(device).eval(), ckpt


def finished_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints for --resume in a folder, oldest first: those of the size that their
    sidecars say."""
    finished = []
    for path in sorted(folder.glob("ckpt_*.pt")):
        with contextlib.suppress(HandoffError):
            read_sidecar(path, CHECKPOINT_SCHEMA, "")
            finished.append(path)
    return finished


def checkpoint_remedy(path: Path) -> str:
    """What makes a checkpoint that is missing or broken, by what lies beside it."""
    others = [other for other in finished_checkpoints(path.parent) if other != path]
    is_made_by_training = re.fullmatch(r"ckpt_\d+\.pt|janus_\w+_final\.pt", path.name)
    is_later = bool(others) and path.name > others[-1].name  # numbers have eight digits
    if is_made_by_training and is_later and (path.parent / "run.json").is_file():
        command = f"the command in {path.parent / 'run.json'} and --resume"
        return f"{command}, which goes on from {others[-1].name}"
    train = "python janus_adaptive.py --save_dir DIR"
    return f"{train}, or from a pretrained model with: python tools/import_hf.py MODEL DIR"


# <<< shared: model


# >>> shared: tools ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def run_tool(name: str, *argv: object) -> None:
    """Runs tools/NAME.py. Raises HandoffError with the last line of its errors, or where it is
    missing."""
    tool = Path(__file__).resolve().parent / "tools" / f"{name}.py"
    if not tool.is_file():
        origin = "it comes with the repository, not with the installed commands"
        raise HandoffError(f"{tool} is missing: {origin}")
    command = [sys.executable, str(tool), *map(str, argv)]
    done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{tool} failed"]
        raise HandoffError(lines[-1].removeprefix(f"{name}.py: error: "))


# <<< shared: tools


# >>> shared: pretrained ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def as_checkpoint(path: str | Path, cache_dir: str | Path, dataset: str | None = None) -> Path:
    """A Janus checkpoint (.pt) as it is; a pretrained model (folder, hub name, .gguf file or
    smollm2) is made into one in `cache_dir`.

    tools/import_hf.py does that, once for each state of the files. Raises HandoffError with its
    line where it cannot.
    """
    here = Path(path)
    is_gguf = here.suffix == ".gguf"
    if here.suffix == ".pt" or (here.is_file() and not is_gguf):
        return here
    is_local = is_gguf or str(path).startswith(("/", ".", "~")) or len(here.parts) > 2
    if is_local and not here.exists():
        kinds = "a checkpoint (.pt), a pretrained model: folder, hub name or .gguf file, or smollm2"
        raise HandoffError(f"{path} does not exist; give {kinds}")
    if here.is_dir() and not (here / "config.json").is_file():
        advice = "make a checkpoint with: python janus_adaptive.py --save_dir DIR"
        checkpoints = sorted(here.glob("janus_*_final.pt"))
        if checkpoints:
            advice = f"give the checkpoint in it: {checkpoints[0]}"
        fact = f"{path} is not a file, and holds no config.json of a pretrained model"
        raise HandoffError(f"{fact}; {advice}")

    # The checkpoint's folder is named by the state of the files that it is made of.
    files = []
    if here.exists():
        files = sorted(here.glob("*")) if here.is_dir() else [here]
    name = str(here.resolve()) if files else str(path)
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr([name, dataset, *states]).encode()).hexdigest()[:12]
    folder = Path(cache_dir).expanduser() / f"pretrained-{digest}"
    made = folder / "janus_pretrained_final.pt"
    if not sidecar_path(made).exists():
        text_flags = ["--dataset", dataset] if dataset else []
        run_tool("import_hf", name, folder, "--cache_dir", cache_dir, "--overwrite", *text_flags)
    return made


# <<< shared: pretrained


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


# >>> shared: hub ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
TEXT_ADVICE = "use --dataset builtin, or --dataset PATH with --tokenizer train:4096"


def from_hub(
    what: str, load: Callable[[], Any], advice: str = TEXT_ADVICE, seconds: float = 6.0
) -> Any:
    """Runs `load`, with the hub libraries offline (their cache only) if the hub does not answer
    within `seconds`.

    Raises HandoffError, which ends in `advice`: what to do without a network.
    """
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with contextlib.suppress(OSError, ValueError):
            with contextlib.suppress(urllib.error.HTTPError):  # it refused this, so it is there
                urllib.request.urlopen(request, timeout=seconds)
            answered.set()

    # In a thread, because `timeout` does not bound a silent name server
    threading.Thread(target=ask, daemon=True).start()
    if not answered.wait(seconds):  # the libraries read this when they are first imported
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        return load()
    except Exception as e:  # the hub libraries raise many types
        cause = first_line(e, 100) if answered.is_set() else f"no answer from {url}"
        fact = f"{what} cannot be had from the Hugging Face hub or its cache ({cause})"
        raise HandoffError(f"{fact}; {advice}") from None


# <<< shared: hub


# >>> shared: tokenizer ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without what its file may switch on: padding, truncation and dropout of
    merges would change the text, or make it another one at each reading."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A plain tokenizer from its tokenizer.json; HandoffError if it cannot be read."""
    try:
        return plain_tokenizer(Tokenizer.from_file(str(path)))
    except Exception as e:  # the library raises bare Exception
        fact = f"tokenizer {path} cannot be read ({first_line(e, 120)})"
        raise HandoffError(f"{fact}; expected a tokenizer.json") from None


def count_ids(tokenizer: Tokenizer) -> int:
    """Its largest id, and one: as many rows an embedding needs. The ids may have gaps, so there
    can be fewer tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def need_rows(n_ids: int, n_rows: int, model: object) -> None:
    """Raises HandoffError if token ids 0 to n_ids - 1 do not fit an embedding of n_rows. More rows
    than ids are common, and no harm."""
    if n_ids > n_rows:
        fact = f"{model}: token ids go up to {n_ids - 1}, its embedding has rows 0 to {n_rows - 1}"
        raise HandoffError(f"{fact}; use the tokenizer that the model was trained with")


# <<< shared: tokenizer


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


# >>> shared: text ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
HUB_DATASETS = {
    "wikitext-103-raw-v1": "Salesforce/wikitext",
    "wikitext-2-raw-v1": "Salesforce/wikitext",
}
TEXT_VERSION = 3  # raise it when reading or cutting changes: it is part of the token cache's names
# Of a dataset that has no splits: the shares where each begins and ends
SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


class HFWikiTextLoader:
    """One split of a text dataset as a flat, memory-mapped token stream, cut into windows of
    `seq_len` tokens.

    `bos`: the token (BOS) that every window begins with; None: none. A window has seq_len inputs
    and as many targets either way: with BOS the first token of its text is predicted, too.

    Tokenised once, with all cores, and cached in <cache_dir> as
    <dataset>-<TEXT_VERSION>-<tokenizer>-<split>.npy (uint16 or uint32), with <...>.documents.npy
    beside it. Attributes: tokenizer, tokens [n],
    document_starts [documents] (where in `tokens` each document begins), n_windows, and
    `description` (dataset, its key, tokenizer hash, ...) for sidecars.
    """

    bos: int | None = None

    def __init__(
        self,
        dataset: str,
        tokenizer: str,
        seq_len: int,
        split: str,
        cache_dir: str | Path,
        bos: int | None = None,
    ) -> None:
        cache = Path(cache_dir).expanduser()
        self.seq_len = seq_len
        self.bos = bos
        self.tokenizer = load_tokenizer(tokenizer, dataset, cache)
        serialised = self.tokenizer.to_str().encode()
        tokenizer_hash = hashlib.sha256(serialised).hexdigest()[:12]
        key = dataset_key(dataset)
        path = cache / f"{key}-{TEXT_VERSION}-{tokenizer_hash}-{split}.npy"
        starts_path = path.with_suffix(".documents.npy")
        if not (path.exists() and starts_path.exists()):
            texts = read_documents(dataset, split)
            tokens, text_starts = self.tokenise(texts, split)
            with atomic(starts_path) as temporary:
                np.save(temporary, text_starts[first_texts(texts)])
            with atomic(path) as temporary:
                np.save(temporary, tokens)
        self.tokens = np.load(path, mmap_mode="r")  # [n]
        self.document_starts = np.load(starts_path)  # [documents]
        n_targets = len(self.tokens) - (bos is None)  # without BOS nothing predicts the first
        self.n_windows = n_targets // seq_len
        self.description = {
            "dataset": dataset,
            "dataset_key": key,
            "split": split,
            "tokenizer_hash": tokenizer_hash,
            "n_tokens": len(self.tokens),
        }
        if self.n_windows < 1:
            found = f"{split} split of {dataset}: {len(self.tokens)} tokens"
            raise HandoffError(f"{found}, expected more than --seq_len {seq_len}; use more text")
        n_ids = count_ids(self.tokenizer)
        if bos is not None and not 0 <= bos < n_ids:
            fact = f"windows of text should begin with token {bos} (BOS)"
            raise HandoffError(f"{fact}, the tokenizer has 0 to {n_ids - 1}; pass --bos no")

    def tokenise(self, texts: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [n] of all texts, one after the other, an empty line between two; and where
        each text begins [texts]."""
        fits_16_bits = count_ids(self.tokenizer) <= 1 << 16
        dtype = np.uint16 if fits_16_bits else np.uint32
        ids = [np.zeros(0, dtype)]
        batches = range(0, len(texts), 1000)
        for first in tqdm(batches, desc=f"tokenising {split}", unit="kdoc", disable=None):
            batch = [text + "\n\n" for text in texts[first : first + 1000]]
            encodings = self.tokenizer.encode_batch(batch, add_special_tokens=False)
            ids += [np.asarray(encoding.ids, dtype) for encoding in encodings]
        lengths = [len(of_text) for of_text in ids]  # the first one is empty
        return np.concatenate(ids), np.cumsum(lengths[:-1])

    def spread(self, n: int) -> np.ndarray:
        """Numbers of n windows, evenly spaced over the split; of all if n is 0 or there are no
        more. The first windows alone would be those of a few documents."""
        n = min(n or self.n_windows, self.n_windows)
        return np.arange(n) * self.n_windows // n

    def documents(self, windows: np.ndarray) -> np.ndarray:
        """Number of the document of each input of these windows [B] -> [B, T]; BOS has that of the
        token after it."""
        first = np.asarray(windows)[:, None] * self.seq_len  # [B, 1]
        within = np.arange(self.seq_len)  # [T]
        if self.bos is not None:
            within = (within - 1).clip(0)
        places = first + within  # [B, T], in the stream
        return np.searchsorted(self.document_starts, places, side="right") - 1

    def batch(self, windows: np.ndarray, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Windows by number [B] -> inputs and targets, both int64 [B, T]; `offset` shifts all
        windows, in tokens."""
        starts = np.asarray(windows) * self.seq_len + offset
        n_read = self.seq_len + (self.bos is None)  # of the stream
        rows = [self.tokens[start : start + n_read] for start in starts]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T + 1], with BOS [B, T]
        if self.bos is not None:
            ids = F.pad(ids, (1, 0), value=self.bos)  # [B, T + 1]
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def shuffled(self, first: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Windows first..first+n-1 of an endless shuffled stream: inputs and targets, int64 [n,
        T].

        A pure function of its arguments, so the data cursor of a run is one number. Every epoch
        shuffles anew and moves the window borders by a random offset.
        """
        per_epoch = max(1, self.n_windows - 1)
        inputs = []
        targets = []
        while n > 0:
            epoch, position = divmod(first, per_epoch)
            rng = np.random.default_rng([seed % 2**32, epoch])
            offset = int(rng.integers(self.seq_len)) if self.n_windows > 1 else 0
            order = rng.permutation(per_epoch)
            x, y = self.batch(order[position : position + n], offset)
            inputs.append(x)
            targets.append(y)
            first += len(x)
            n -= len(x)
        return torch.cat(inputs), torch.cat(targets)


def load_tokenizer(tokenizer: str, dataset: str, cache: Path) -> Tokenizer:
    """`train:N` (byte-level BPE of N tokens, trained on the training split), a tokenizer.json, a
    folder, or a hub name.

    `auto` is gpt2 for WikiText and train:4096 for any other dataset.
    """
    if tokenizer == "auto":
        tokenizer = "gpt2" if dataset in HUB_DATASETS else "train:4096"
    if tokenizer.startswith("train:"):
        vocab_size = tokenizer.removeprefix("train:")
        if not vocab_size.isdecimal() or int(vocab_size) <= 256:
            raise HandoffError(f"--tokenizer {tokenizer}: expected train:N with N above 256 tokens")
        path = cache / f"{dataset_key(dataset)}-{TEXT_VERSION}-bpe{vocab_size}.json"
        if not path.exists():
            bpe = train_bpe(read_documents(dataset, "train"), int(vocab_size))
            with atomic(path) as temporary:
                bpe.save(str(temporary))
        tokenizer = str(path)
    if tokenizer.endswith(".json"):
        return read_tokenizer(tokenizer)
    name = "openai-community/gpt2" if tokenizer == "gpt2" else tokenizer

    def load() -> Tokenizer:
        auto = import_module("transformers").AutoTokenizer
        # Without a token for padding: transformers would give one an id of its own
        return auto.from_pretrained(name, pad_token=None).backend_tokenizer

    if not Path(name).is_dir():
        return plain_tokenizer(from_hub(f"tokenizer {tokenizer!r}", load))
    try:
        return plain_tokenizer(load())
    except Exception as e:  # transformers raises many types
        fact = f"--tokenizer {tokenizer} cannot be read: {first_line(e, 120)}"
        raise HandoffError(f"{fact}; expected a folder that transformers reads") from None


def train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) of `vocab_size` tokens: no text is
    unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def read_documents(dataset: str, split: str) -> list[str]:
    """The non-empty texts of one split: rows of a dataset, lines of a .txt, or documents of
    `builtin`.

    A dataset without splits is cut in order, 90 % train, 5 % validation, 5 % test (by
    characters); `builtin` by document. Raises HandoffError for a missing, unreadable or empty
    dataset.
    """
    low, high = SPLITS[split]
    if dataset == "builtin":
        texts = []
        for name, text in builtin_documents().items():
            digest = hashlib.sha256(name.encode()).hexdigest()
            share = int(digest, 16) % 1000 / 1000  # of a name, the same on every machine
            if low <= share < high:
                texts.append(text)
        return texts
    if dataset in HUB_DATASETS:
        repository = HUB_DATASETS[dataset]

        def load() -> Any:
            return import_module("datasets").load_dataset(repository, dataset, split=split)

        return only_texts(from_hub(f"dataset {dataset!r}", load)["text"], dataset)

    try:
        rows, has_splits = read_rows(Path(dataset), split)
    except UnicodeDecodeError as e:
        fact = f"--dataset {dataset} is not UTF-8 text (byte {e.start})"
        raise HandoffError(f"{fact}; convert it, e.g. with iconv -t UTF-8") from None
    except KeyError:
        raise HandoffError(f"--dataset {dataset} has no column `text`") from None
    except Exception as e:  # pandas, pyarrow and datasets raise many types
        raise HandoffError(f"--dataset {dataset} cannot be read: {first_line(e, 120)}") from None
    texts = only_texts(rows, dataset)
    if has_splits:
        return texts
    if len(texts) < 100:  # a few long texts: cut, so that every split gets its share
        length = max(20, sum(map(len, texts)) // 100 + 1)  # no ordinary word is cut
        pieces = []
        for text in texts:
            pieces += cut(text, length)
        texts = pieces
    lengths = [len(text) for text in texts]
    ends = np.cumsum(lengths) / max(1, sum(lengths))  # share of the characters so far
    return [text for text, end in zip(texts, ends, strict=True) if low < end <= high + 1e-9]


def only_texts(rows: Iterable[Any], dataset: str) -> list[str]:
    """The rows that hold more than white space. Missing ones are left out, and a line says how
    many; HandoffError for what is no text, as nothing is guessed."""
    texts = []
    n_missing = 0
    for number, row in enumerate(rows, 1):
        if row is None or row != row:  # null or NaN
            n_missing += 1
        elif not isinstance(row, str):
            fact = f"--dataset {dataset}: row {number} of column `text` is {row!r:.60}"
            raise HandoffError(f"{fact}, expected text (in quotes, or null)")
        elif row.strip():
            # Half of a surrogate pair, which JSON may hold, becomes U+FFFD: UTF-8 has no such thing
            pairs = row.encode("utf-16", "surrogatepass")
            texts.append(pairs.decode("utf-16", "replace"))
    if n_missing:
        say_once(f"note: {n_missing:,} rows of {dataset} have no text (null); they are left out")
    return texts


@functools.cache
def say_once(line: str) -> None:
    """Prints a line, and not again: every split is read from the same file."""
    print(line, flush=True)


def first_texts(texts: list[str]) -> list[int]:
    """Which texts begin a document: the titles of articles (" = Title = ", as WikiText marks
    them); where there are none, texts are lines or rows, and a document goes on until it has 2,000
    characters. Statistics hold out and resample whole documents."""
    titles = [i for i, text in enumerate(texts) if re.fullmatch(r"= [^=].*[^=] =", text.strip())]
    if titles:
        return sorted({0, *titles})  # what stands before the first title is a document too
    first = []
    n_characters = 2000  # of the document so far
    for i, text in enumerate(texts):
        if n_characters >= 2000:
            first.append(i)
            n_characters = 0
        n_characters += len(text)
    return first


def read_rows(path: Path, split: str) -> tuple[Any, bool]:
    """Column `text` of a local file or saved folder, and whether it is `split` of a folder that
    has splits (else it is everything, to be cut)."""
    if path.is_dir():
        # Without the format that it was saved with, which may hide columns
        saved = import_module("datasets").load_from_disk(str(path)).with_format(None)
        if not isinstance(saved, dict):
            return saved["text"], False
        if "train" not in saved:
            raise ValueError(f"it has the splits {', '.join(sorted(saved))}, expected train")
        if split in saved and (split != "train" or "validation" in saved):
            return saved[split]["text"], True
        if split == "test" and "validation" in saved:
            raise ValueError(f"it has the splits {', '.join(sorted(saved))}, and no test")
        # Training without validation: both come from what is there, and share nothing
        return saved["train"]["text"], False
    if path.suffix == ".parquet":  # not through pandas, which has two kinds of nothing
        return import_module("pyarrow.parquet").read_table(path)["text"].to_pylist(), False
    if path.suffix in (".jsonl", ".json"):
        return json_rows(path), False
    return read_lines(path), False


def json_rows(path: Path) -> list[Any]:
    """`text` of a JSON file: of objects, one a line or in an array, or of an object of columns.
    None where an object has no `text`; KeyError if none of them has."""
    lines = read_lines(path)
    try:
        rows = json.loads("\n".join(lines))
    except ValueError:
        rows = [json_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if isinstance(rows, dict):
        column = rows["text"]
        if isinstance(column, dict):  # {"text": {"0": ..., "1": ...}}, as pandas writes it
            column = list(column.values())
        return column if isinstance(column, list) else [column]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('expected objects like {"text": "..."}')
    if rows and not any("text" in row for row in rows):
        raise KeyError("text")
    return [row.get("text") for row in rows]


def json_line(line: str, number: int) -> Any:
    """The value of one line of JSON Lines; ValueError with the number of the line."""
    try:
        return json.loads(line)
    except ValueError as e:
        raise ValueError(f"line {number}: {e}") from None


def add_bos_flag(group: Any) -> None:
    """Adds --bos to a parser, or to a group of its flags."""
    text = "whether windows of text begin with the model's BOS token; auto: as the checkpoint says"
    group.add_argument("--bos", choices=["auto", "yes", "no"], default="auto", help=text)


def window_bos(choice: str, ckpt: dict[str, Any], checkpoint: object) -> int | None:
    """The token that windows of text begin with, by --bos and the checkpoint; None: none. Raises
    HandoffError where the checkpoint has none to begin with."""
    bos = ckpt.get("bos")
    if choice == "yes" and bos is None:
        fact = f"--bos yes: {checkpoint} names no BOS token"
        raise HandoffError(f"{fact}, its model reads text from the first word on; leave --bos out")
    return None if choice == "no" else bos


def find_text(ckpt: dict[str, Any], checkpoint: Path) -> str:
    """The text that a checkpoint was trained on: what it names, or a file of the same content
    that was moved with it."""
    named = ckpt["dataset"]
    if named == "builtin" or named in HUB_DATASETS:
        return named
    digest = ckpt["data"]["dataset_key"].rpartition("-")[2]

    def is_it(path: Path) -> bool:
        try:
            return dataset_key(str(path)).endswith(digest)
        except HandoffError:  # of no kind that is a text
            return False

    return str(moved_with(named, checkpoint, is_it))


def dataset_key(dataset: str) -> str:
    """A name for the content of a dataset: what it is called, and a hash of the bytes (or the
    versions) that it comes from."""
    path = Path(dataset)
    if dataset == "builtin":
        try:
            versions = [version(package) for package in BUILTIN_PACKAGES.values()]
        except PackageNotFoundError as e:
            fact = f"--dataset builtin reads the documentation of {e.name}, which is not installed"
            advice = "pip install -r requirements.txt, or give --dataset PATH"
            raise HandoffError(f"{fact}: {advice}") from e
        source = repr([BUILTIN_VERSION, platform.python_version(), versions])
    elif dataset in HUB_DATASETS:
        source = HUB_DATASETS[dataset]
    else:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
        if not files or not files[0].is_file():
            names = ", ".join([*HUB_DATASETS, "builtin"])
            raise HandoffError(f"--dataset {dataset}: no such file or folder, nor one of {names}")
        if not path.is_dir() and path.suffix not in (".txt", ".parquet", ".jsonl", ".json"):
            kinds = "a .txt, .parquet, .jsonl or .json file, or a folder"
            raise HandoffError(f"--dataset {dataset}: expected {kinds}")
        source = " ".join(sha256(file) for file in files)
    return f"{path.stem}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"


def text_identity(key: str) -> str:
    """Of a dataset key what stays when a file is renamed: its hash. A repository of the hub holds
    several datasets, which their names tell apart: there it is the whole key."""
    name, _, digest = key.rpartition("-")
    return key if name in HUB_DATASETS else digest


# <<< shared: text


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error of one line, 2 for a wrong command line."""
    return one_line_errors(lambda: under_torchrun(lambda: run(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())

"""Train sparse autoencoders (SAEs) on dumped activations (phase 3 of Janus Arc).

Question: into how many directions does what the heads compute decompose, at which reconstruction
error, and how much of the model's behaviour survives when the reconstruction takes the place of
the activation?

Reads   activations/<run>/L<layer>.<site>.npy [N, D] float16 or float32, raw units, and
        documents.npy [N]; for CE recovered also tokens.npy and the checkpoint
Writes  saes/<run>/L<layer>/ (--unit layer), saes/<run>/L<layer>/H<head>/ (--unit head);
        for a --site other than z: L<layer>.<site>/. In it
          cfg.json, sae_weights.safetensors   float32, folded: takes and gives raw activations
          training_state.pt                   for --resume
          ae.pt, config.json, sae.safetensors --arch topk: for dictionary_learning, eai-sparsify
          training.csv, latent_frequencies.csv, errors.csv (a held-out document a row)
          sae_weights.safetensors.json        the sidecar: last, with all metrics
        of several --k, --target_l0, --l1 or --seeds, below it: k16/, l0_16/, l1_0.001/, seed1/,
        k16/seed1/; with --nulls, below each SAE: null_gaussian/, null_decoder/
        saes/: sae_metrics.csv, table2.csv, table2.md, figure2_l0_by_depth.png and
        figure3_activation_frequency.png, of every finished SAE; sae_nulls.csv; of several
        settings sae_frontier.csv and .png; of several seeds seed_stability.csv, and beside each
        SAE latent_stability.csv; of several seeds with nulls sae_gains.csv
Held out are 5 % of the windows, those of whole documents, the same for every SAE of a run; training
sees no document of which a held-out window has a token. Intervals are over documents.
SAELens' SAE.load_from_disk(folder) loads an export; it encodes flat [N, D]. To splice a layer's SAE
into a HookedSAETransformer at hook_z [B, T, H, K], first call
sae.turn_on_forward_pass_hook_z_reshaping(); a head's SAE takes its own [..., K] as it is.

Quick   python train_sae.py --runs adaptive --layers 3 6 9 --preset smoke
        (3 s a layer on one CPU core)
Full    python train_sae.py --runs adaptive --layers 3 6 9
        (10M tokens a layer: 40 min on one core of an AMD EPYC with AVX512-BF16, 1.5 GB of memory,
        for D = 768, F = 12,288; the cost is printed first)
Study   python train_sae.py --runs adaptive control --layers 3 6 9 --preset published \\
          --arch relu --unit head
        (the study did not normalise its inputs: the same --l1 weighs differently here; it found
        L0 28 to 74)

Shapes  N tokens (dumped, or of a batch), D width of the activation (d_in), F latents (d_sae),
        n active entries of a batch, G groups of nested latents; T tokens a window, W windows,
        B sequences, H heads, K d_head, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

# Before torch: a thread that waits for another leaves its core to whoever needs it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import linalg, optimize, stats
from torch import Tensor, nn
from tqdm import tqdm

SAE_SCHEMA = "janus.sae/1"
WEIGHTS = "sae_weights.safetensors"
TWINS = ("sae.safetensors", "ae.pt", "config.json")  # beside WEIGHTS, for other libraries
SITES = ["z", "attn_out", "mlp_out", "resid_pre", "resid_post"]
BLOCK = 256  # neighbouring rows of a dump that are read in one go
POOL = 1 << 18  # rows that are shuffled together: memory does not grow with the dump
HELD_OUT = 0.05  # share of the windows, at least
FIRING_TOKENS = 100_000  # at least, on which is counted how often latents fire: rare ones need many
LEAST_DOCUMENTS = 16  # below, no interval over documents is right about 95 times in 100
CE_GAP = 0.02  # nats; where ablation costs less, "CE recovered" divides noise by noise
GROUP = ["run", "unit", "arch", "setting", "seed", "site", "layer"]  # what a row of table 2 is of
# fmt: off
PHASE_PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(
        expansion=16, k=32, l1=5e-3, tokens=10_000_000, batch_size=4096,
        learning_rate=6e-4, dead_tokens=1_000_000, eval_tokens=200_000),
    "published": dict(
        expansion=8, k=32, l1=3e-4, steps=5000, batch_size=4096,
        learning_rate=3e-4, dead_tokens=1_000_000, eval_tokens=200_000),
    "demo": dict(
        expansion=8, k=16, l1=1e-2, steps=540, batch_size=1024,
        learning_rate=2e-3, dead_tokens=100_000, eval_tokens=20_000),
    "smoke": dict(
        expansion=8, k=8, l1=2e-2, steps=150, batch_size=512,
        learning_rate=2e-3, dead_tokens=20_000, eval_tokens=8_000),
}
# fmt: on


# -------------------------------------------------------------------------------- method: edit here
# An SAE is trained on x = scale * (raw - mean): `mean` [D] is that of the training rows, and
# `scale` makes the mean norm of x sqrt(D). Everything here is in these trained units, unless it is
# called raw: those are the units of the dump.
#
# To add an architecture, write its forward beside these and enter it in ARCHITECTURES. A flag that
# it needs is one line in add_method_flags, and is `now.its_name` here. Where latents may be
# negative, `auxiliary_loss` needs another selection of the dead ones. To change an architecture
# that has a fast step (further below), change both, or train it with --plain.


class Weights(SimpleNamespace):
    """The parameters of an SAE by name: W_enc [F, D], b_enc [F], W_dec [F, D] with rows of norm 1,
    b_dec [D], and what the architecture adds (Architecture.extra), each [F]."""


class Now(argparse.Namespace):
    """What a forward may look at beside the weights: all arguments (now.k, now.l1, now.steps, ...)

    now.step: number of this step, from 1, of now.steps
    now.dead: [F] bool, latents that have been silent for --dead_tokens tokens
    now.cut: [], what `Output.cut` was on average in the last steps
    """


@dataclass
class Output:
    """What an architecture makes of a batch x [N, D].

    latents: [N, F], 0 where a latent does not fire
    reconstruction: [N, D], latents W_dec + b_dec
    loss: [], a mean over tokens
    cut: [], the smallest value that fires, where one cut serves all tokens; else None
    """

    latents: Tensor
    reconstruction: Tensor
    loss: Tensor
    cut: Tensor | None = None


def fires(latents: Tensor) -> Tensor:
    """Whether each latent is active (bool): wherever it is not 0, so that latents may be negative.
    L0, frequencies and dead latents all follow from this."""
    return latents != 0


# ---- the architectures, each as its paper writes it
def l1_weight(now: Now) -> float:
    """Weight of the L1 penalty at this step, here and in the fast steps."""
    return now.l1


def relu(x: Tensor, sae: Weights, now: Now) -> Output:
    """ReLU and an L1 penalty (Bricken et al. 2023)."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, F]
    latents = pre.relu()
    reconstruction = latents @ sae.W_dec + sae.b_dec  # [N, D]
    penalty = latents.sum(1).mean()  # W_dec has unit rows: no latent can shrink to evade it
    loss = F.mse_loss(reconstruction, x) + l1_weight(now) * penalty
    return Output(latents, reconstruction, loss)


def topk(x: Tensor, sae: Weights, now: Now) -> Output:
    """The k largest latents of each token (Gao et al. 2024)."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, F]
    largest = pre.topk(now.k)  # [N, k]
    latents = torch.zeros_like(pre).scatter(1, largest.indices, largest.values.relu())  # [N, F]
    reconstruction = latents @ sae.W_dec + sae.b_dec  # [N, D]
    loss = F.mse_loss(reconstruction, x) + auxiliary_loss(pre, reconstruction - x, sae, now)
    return Output(latents, reconstruction, loss)


def batchtopk(x: Tensor, sae: Weights, now: Now) -> Output:
    """The N k largest latents of a batch of N tokens: k on average (Bussmann et al. 2024)."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, F]
    latents, cut = largest_of_batch(pre, now.k)
    reconstruction = latents @ sae.W_dec + sae.b_dec  # [N, D]
    loss = F.mse_loss(reconstruction, x) + auxiliary_loss(pre, reconstruction - x, sae, now)
    return Output(latents, reconstruction, loss, cut)


def jumprelu(x: Tensor, sae: Weights, now: Now) -> Output:
    """A learned threshold a latent, and an L0 to aim at (Rajamanoharan et al. 2024b)."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, F]
    latents, active = Jump.apply(pre, sae.threshold)  # [N, F] each
    reconstruction = latents @ sae.W_dec + sae.b_dec  # [N, D]
    l0 = active.sum(1).mean()
    loss = F.mse_loss(reconstruction, x) + (l0 / now.target_l0 - 1).square()
    loss = loss + auxiliary_loss(pre, reconstruction - x, sae, now)
    return Output(latents, reconstruction, loss, sae.threshold.mean())


def gated(x: Tensor, sae: Weights, now: Now) -> Output:
    """A gate says what fires, another scale and bias how much (Rajamanoharan et al. 2024a)."""
    shared = (x - sae.b_dec) @ sae.W_enc.T  # [N, F]
    gate = shared + sae.b_enc
    magnitude = shared * sae.r_mag.exp() + sae.b_mag
    latents = magnitude.relu() * (gate > 0)  # [N, F]
    reconstruction = latents @ sae.W_dec + sae.b_dec  # [N, D]
    # a step has no gradient: the gate learns by reconstructing x itself, with the decoder held
    opened = gate.relu()
    by_gate = opened @ sae.W_dec.detach() + sae.b_dec.detach()  # [N, D]
    loss = F.mse_loss(reconstruction, x) + F.mse_loss(by_gate, x)
    loss = loss + l1_weight(now) * opened.sum(1).mean()
    return Output(latents, reconstruction, loss)


def matryoshka(x: Tensor, sae: Weights, now: Now) -> Output:
    """batchtopk whose first latents must also do without the others (Bussmann et al. 2025)."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, F]
    latents, cut = largest_of_batch(pre, now.k)
    losses = []
    for end in prefix_ends(len(sae.b_enc)):
        reconstruction = latents[:, :end] @ sae.W_dec[:end] + sae.b_dec  # [N, D]
        losses.append(F.mse_loss(reconstruction, x))
    # the last prefix is all latents
    loss = torch.stack(losses).mean() + auxiliary_loss(pre, reconstruction - x, sae, now)
    return Output(latents, reconstruction, loss, cut)


# ---- what several of them share
AUX = 1 / 32  # weight of the auxiliary loss
AUX_TOKENS = 1 / 8  # share of the batch that it sees
BANDWIDTH = 0.5  # jumprelu, in units of pre, whose standard deviation is about 1 at the start
PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)  # matryoshka, shares of the latents


def auxiliary_loss(pre: Tensor, error: Tensor, sae: Weights, now: Now) -> Tensor:
    """Dead latents fit what the others leave over, and so come back to life (Gao et al. 2024).

    From pre [N, F] and the error [N, D] of the reconstruction, which is held:
    AUX ||y_dead + error||^2 / ||error||^2, where y_dead is what the aux_k dead latents with the
    largest pre decode to, relu(pre): latents that may be negative need another selection here. 0
    where no latent is dead.
    """
    n_dead = int(now.dead.sum())
    if n_dead == 0 or now.aux_k == 0:
        return pre.new_zeros(())
    n_seen = math.ceil(len(pre) * AUX_TOKENS)  # batches are shuffled: the first rows are a sample
    error = error[:n_seen].detach()  # [n_seen, D]
    silent = pre[:n_seen, now.dead]  # [n_seen, n_dead]
    largest = silent.topk(n_auxiliary(now, n_dead, error.shape[1]))  # [n_seen, aux_k]
    latents = torch.zeros_like(silent).scatter(1, largest.indices, largest.values.relu())
    y_dead = latents @ sae.W_dec[now.dead]  # [n_seen, D]
    return AUX * (y_dead + error).square().sum() / error.square().sum().clamp(min=1e-9)


def n_auxiliary(now: Now, n_dead: int, d_in: int) -> int:
    """How many dead latents a token fit the error: --aux_k, by default half the dimensions."""
    wanted = d_in // 2 if now.aux_k < 0 else now.aux_k
    return min(n_dead, wanted)


def largest_of_batch(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """pre [N, F] -> the latents [N, F] that keep the N k largest positive values, and the smallest
    of these []: 0 where there are not as many."""
    positive = pre.relu()
    cut = positive.flatten().topk(k * len(pre)).values[-1]
    return positive * (positive >= cut), cut


def prefix_ends(n_latents: int) -> list[int]:
    """Where each of the nested sets of latents ends [G]."""
    return [round(n_latents * share) for share in PREFIXES]


class Jump(torch.autograd.Function):
    """pre [N, F], threshold [F] -> pre [pre > threshold] and [pre > threshold] as 0 or 1.

    Both jump at the threshold. Their derivatives by it are those of a ramp: a rectangle of width
    BANDWIDTH stands for the delta (Rajamanoharan et al. 2024b, equations 11 and 12).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Any:
        ctx.save_for_backward(pre, threshold)
        active = (pre > threshold).to(pre.dtype)
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, d_latents: Tensor, d_active: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < BANDWIDTH / 2
        d_threshold = near * (threshold * d_latents + d_active) / -BANDWIDTH  # [N, F]
        return d_latents * (pre > threshold), d_threshold.sum(0)


def begin_at_target(x: Tensor, sae: Weights, now: Now) -> None:
    """Sets all thresholds to where the L0 asked for comes out; then it is only held, as they move
    slowly."""
    pre = (x[:256] - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [256, F]
    n_active = now.target_l0 * len(pre)
    sae.threshold.fill_(nth_largest(pre[pre > 0], n_active))


def keep_positive(sae: Weights) -> None:
    """The rectangle around a threshold stays where pre is positive."""
    sae.threshold.clamp_(min=BANDWIDTH / 2)


# ---- how one of them is exported for other libraries
@dataclass
class Twins:
    """cfg: further entries of cfg.json; files: name -> content, each name one of TWINS."""

    cfg: dict[str, Any]
    files: dict[str, bytes]


def topk_twins(export: dict[str, Tensor], args: argparse.Namespace) -> Twins:
    """One folder for three libraries: eai-sparsify reads cfg.json and sae.safetensors,
    dictionary_learning config.json and ae.pt."""
    cfg: dict[str, Any] = {
        "k": args.k,
        "activation": "topk",
        "expansion_factor": args.expansion,
        "num_latents": len(export["b_enc"]),
        "normalize_decoder": True,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }
    shared = {
        "encoder.weight": export["W_enc"].T.contiguous(),  # [F, D]
        "encoder.bias": export["b_enc"],
        "b_dec": export["b_dec"],
    }
    sparsify = shared | {"W_dec": export["W_dec"]}
    dictionary = shared | {
        "decoder.weight": export["W_dec"].T.contiguous(),  # [D, F]
        "k": torch.tensor(args.k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),  # none
    }
    config = {"trainer": {"dict_class": "AutoEncoderTopK", "k": args.k}}
    files = {
        "sae.safetensors": safetensors.torch.save(sparsify),
        "ae.pt": torch_bytes(dictionary),
        "config.json": (json.dumps(config, indent=1) + "\n").encode(),
    }
    return Twins(cfg, files)


# ---- the table
@dataclass
class Architecture:
    """All that sets one --arch apart. Only the forward must be given.

    forward: (x, weights, now) -> Output
    l0_flag: the flag that asks for an L0, k or target_l0; None where L0 follows from a penalty
    extra: further parameters, each [F], and where they start
    unitless: those of them that do not scale with x, such as a gain
    extra_rate: their learning rate over that of the weights
    half_fires: half of the latents fire at the start; W_enc starts smaller, so that they sum to x
    clip: whether the norm of the gradient is limited
    begin: sets weights before the first step, from its batch; constrain: mends them after each step
    saelens: the one of ENCODERS that computes the same from the folded weights. Where there is
        none, only load_sae reads the folder and runs the forward, a chunk of tokens at a time: the
        latents of a token must not depend on other tokens
    renamed: what that class calls a parameter, where it is not the name here
    cut_as: what it calls the average cut, which serves single tokens; empty: it has none
    twins: the same SAE for other libraries
    fast: the same gradients by hand, see fast_step_of; int8: it can do with --int8
    memory: bytes that the fast step takes for an entry of pre [N, F]
    """

    forward: Callable[[Tensor, Weights, Now], Output]
    l0_flag: str | None = "k"
    extra: dict[str, float] = field(default_factory=dict)
    unitless: tuple[str, ...] = ()
    extra_rate: float = 1.0
    half_fires: bool = False
    clip: bool = True
    begin: Callable[[Tensor, Weights, Now], None] | None = None
    constrain: Callable[[Weights], None] | None = None
    saelens: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    cut_as: str = ""
    twins: Callable[[dict[str, Tensor], argparse.Namespace], Twins] | None = None
    fast: Callable[[Tensor, Weights, Now], Gradients] | None = None
    int8: bool = False
    memory: int = 12

    @property
    def about(self) -> str:
        """The first line of the forward's docstring."""
        return (self.forward.__doc__ or "").strip().partition("\n")[0].rstrip(".")


ARCHITECTURES = {
    "relu": Architecture(relu, l0_flag=None, half_fires=True, clip=False, saelens="standard"),
    "topk": Architecture(topk, saelens="topk", twins=topk_twins, int8=True),
    "batchtopk": Architecture(batchtopk, saelens="jumprelu", cut_as="threshold", int8=True),
    "jumprelu": Architecture(
        jumprelu,
        l0_flag="target_l0",
        extra={"threshold": 0.0},
        extra_rate=10,  # at 1, L0 stays far below its target for hundreds of steps
        begin=begin_at_target,
        constrain=keep_positive,
        saelens="jumprelu",
    ),
    "gated": Architecture(
        gated,
        l0_flag=None,
        extra={"r_mag": 0.0, "b_mag": 0.0},
        unitless=("r_mag",),
        half_fires=True,
        clip=False,  # with it, planted atoms are recovered less well
        saelens="gated",
        renamed={"b_enc": "b_gate"},
        memory=20,
    ),
    "matryoshka": Architecture(matryoshka, saelens="jumprelu", cut_as="threshold", int8=True),
}


# ---- training
CLIP = 1.0  # norm of D times the gradient, as in SAELens; Adam remembers large early ones for long
CUT_STEPS = 100  # memory of the moving average of the cut, at most a fifth of the steps so far


@dataclass
class Gradients:
    """What a step needs to know of a batch.

    by_name: of each parameter
    error: [N, D], reconstruction - x
    fired: [F] int64, tokens on which each latent fired
    cut: as in Output
    """

    by_name: dict[str, Tensor]
    error: Tensor
    fired: Tensor
    cut: Tensor | None = None


def plain_gradients(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """By autograd, from the forward of now.arch on x [N, D], in float32."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in vars(sae).items()}
    output = ARCHITECTURES[now.arch].forward(x, Weights(**leaves), now)
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), materialize_grads=True)
    return Gradients(
        by_name=dict(zip(leaves, gradients, strict=True)),
        error=(output.reconstruction - x).detach(),
        fired=fires(output.latents).sum(0),
        cut=None if output.cut is None else output.cut.detach(),
    )


class Trainer:
    """One SAE in training: Adam, on batches of raw rows, with rows of W_dec kept at norm 1.

    sae: its Weights; scale, mean [D]: x = scale * (raw - mean)
    axes: [D, R], what the first directions are combined of; None: any direction
    idle: [F] int64, tokens since each latent fired
    cut: [], moving average of Output.cut
    threads: that torch may use for its group of SAEs
    history: a dict every 50 steps, the rows of training.csv; board: a tensorboard for them
    """

    board: Any = None

    def __init__(
        self,
        args: argparse.Namespace,
        mean: Tensor,
        norm: float,
        device: torch.device,
        plain: bool = False,
        axes: Tensor | None = None,
    ) -> None:
        """mean [D], E||raw - mean|| and axes of the training rows; plain: without the fast step."""
        self.args = args
        self.architecture = ARCHITECTURES[args.arch]
        fast = None if plain else self.architecture.fast
        self.take_gradients = fast or plain_gradients
        self.mean = mean.to(device)
        self.scale = math.sqrt(len(mean)) / norm
        self.axes = axes
        self.sae = self.initial_weights(len(mean), device)
        shared = [self.sae.W_enc, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec]
        extra = [getattr(self.sae, name) for name in self.architecture.extra]
        self.params = [*shared, *extra]
        groups = [{"params": group} for group in (shared, extra) if group]
        fused = device.type != "mps"
        self.optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-9, fused=fused)
        n_latents = len(self.sae.b_enc)
        self.step_count = 0
        self.threads = torch.get_num_threads()
        self.idle = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.cut = torch.zeros((), device=device)
        self.history: list[dict[str, Any]] = []

    def initial_weights(self, d_in: int, device: torch.device) -> Weights:
        """Random unit directions, read and written alike; b_dec at the mean of the data, 0 here.

        Among the axes in which the data vary, if they are given: a direction in which there is
        nothing never fires (Active Subspace Initialization, arXiv 2508.16929).
        """
        n_latents = d_in * self.args.expansion
        generator = torch.Generator().manual_seed(self.args.seed)
        n_axes = d_in if self.axes is None else self.axes.shape[1]
        drawn = torch.randn(n_latents, n_axes, generator=generator)  # [F, R]
        if self.axes is not None:
            drawn = drawn @ self.axes.T  # [F, D]
        w_dec = F.normalize(drawn, dim=1)  # [F, D]
        # Of F directions among R axes those that fire, half, sum to F / 2R of what they read
        size = 2 * n_axes / n_latents if self.architecture.half_fires else 1
        weights = {
            "W_enc": w_dec * size,
            "b_enc": torch.zeros(n_latents),
            "W_dec": w_dec,
            "b_dec": torch.zeros(d_in),
        }
        for name, value in self.architecture.extra.items():
            weights[name] = torch.full((n_latents,), value)
        return Weights(**{name: w.to(device, copy=True) for name, w in weights.items()})

    def now(self) -> Now:
        """The moment of training, for forwards and fast steps."""
        dead = self.idle > self.args.dead_tokens  # [F]
        return Now(**vars(self.args), step=self.step_count, dead=dead, cut=self.cut)

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sets .grad of every parameter for x [N, D] -> mean squared error [], firings [F]."""
        found = self.take_gradients(x, self.sae, self.now())
        for name, gradient in found.by_name.items():
            getattr(self.sae, name).grad = gradient
        self.remember_cut(found.cut)
        # row by row: one sum over all would round differently with another number of threads
        return found.error.square().mean(1).mean(), found.fired

    def remember_cut(self, cut: Tensor | None) -> None:
        """Moves the mean cut of the last steps to that of one more, where there is one."""
        if cut is not None:
            memory = min(CUT_STEPS, max(1, self.step_count / 5))
            self.cut = self.cut.lerp(cut, 1 / memory)

    def step(self, raw: Tensor) -> None:
        """One optimiser step on raw rows [N, D]. HandoffError if the error is no finite number."""
        self.step_count += 1
        x = (raw.to(self.mean.device).float() - self.mean) * self.scale  # [N, D], trained units
        if self.step_count == 1 and self.architecture.begin:
            self.architecture.begin(x, self.sae, self.now())
        mse, fired = self.gradients(x)
        self.set_learning_rates()
        self.move()

        # a latent that fired on any token of the batch is alive
        self.idle = torch.where(fired > 0, 0, self.idle + len(raw))
        if not math.isfinite(mse):
            advice = f"try a --learning_rate below {self.args.learning_rate}"
            raise HandoffError(f"step {self.step_count}: the error is {mse:g}; {advice}")
        if self.step_count % 50 == 0 or self.step_count == self.args.steps:
            self.note_progress(mse, fired.sum() / len(raw))

    def move(self) -> None:
        """Follows the gradients, and brings weights back to where they are allowed."""
        if self.args.null == "decoder":
            self.sae.W_dec.grad.zero_()  # random directions as they were drawn
        if self.architecture.clip:
            torch.nn.utils.clip_grad_norm_(self.params, CLIP / len(self.mean))
        self.keep_decoder_gradient_on_sphere()
        self.stop_resting_latents()
        self.optimizer.step()
        self.sae.W_dec /= self.sae.W_dec.norm(dim=1, keepdim=True)
        if self.architecture.constrain:
            self.architecture.constrain(self.sae)

    def set_learning_rates(self) -> None:
        """Linear warm-up over --lr_warmup steps, linear fall to 0 over the last --lr_decay."""
        a = self.args
        warmup = self.step_count / max(1, a.lr_warmup)
        decay = 1.0
        if a.lr_decay:
            decay = (a.steps + 1 - self.step_count) / (a.lr_decay * a.steps)
        self.set_rates(min(1.0, warmup, decay))

    def set_rates(self, share: float) -> None:
        """Of the peak rates."""
        peak = self.args.learning_rate
        # the extra parameters of the architecture are the second group
        rates = [peak, self.architecture.extra_rate * peak]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * share

    def keep_decoder_gradient_on_sphere(self) -> None:
        """Takes out what would only change the norm of W_dec's rows."""
        w_dec = self.sae.W_dec
        radial = (w_dec.grad * w_dec).sum(1, keepdim=True)  # [F, 1]
        w_dec.grad.addcmul_(radial, w_dec, value=-1)

    def stop_resting_latents(self) -> None:
        """A latent without a gradient loses its momentum and stands still.

        Adam would drag it on for some ten steps after it last fired: at a high learning rate far
        enough for a rare latent to die of it. The price: at a low rate it learns more slowly. b_enc
        tells which have a gradient; an architecture that has no use for b_enc keeps all momentum.
        """
        rests = self.sae.b_enc.grad == 0  # [F]
        resting = rests.nonzero()[:, 0]
        if len(resting) == len(rests):
            return
        for weight in (self.sae.W_enc, self.sae.b_enc, self.sae.W_dec):
            state = self.optimizer.state.get(weight)
            if state:
                state["exp_avg"].index_fill_(0, resting, 0)

    def note_progress(self, mse: Tensor, l0: Tensor) -> None:
        """Adds a row to the history."""
        dead_share = (self.idle > self.args.dead_tokens).float().mean()
        row = {
            "step": self.step_count,
            "mse_normalised": mse.item(),  # trained units
            "l0": l0.item(),
            "dead_share": dead_share.item(),
            "threshold": self.cut.item(),
        }
        self.history.append(row)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, self.step_count)
            self.board.add_histogram("tokens since a latent fired", self.idle, self.step_count)
            self.board.flush()

    def weights(self, scale: float = 1.0, mean: Tensor | float = 0.0) -> dict[str, Tensor]:
        """The weights under the names of the export, W_enc [D, F]. With the trainer's scale and
        mean folded in they take and give raw activations, without them trained units."""
        folded = {
            "W_enc": self.sae.W_enc.T,
            "b_enc": self.sae.b_enc / scale,
            "W_dec": self.sae.W_dec,
            "b_dec": self.sae.b_dec / scale + mean,
        }
        for name in self.architecture.extra:
            weight = getattr(self.sae, name)
            folded[name] = weight if name in self.architecture.unitless else weight / scale
        if self.architecture.cut_as:
            folded[self.architecture.cut_as] = self.cut.expand_as(self.sae.b_enc) / scale
        exported = {}
        for name, weight in folded.items():
            name = self.architecture.renamed.get(name, name)
            exported[name] = weight.clone(memory_format=torch.contiguous_format)
        return exported


# ---- fast steps: the same gradients by hand
# Products leave out what is 0, all but the encoder's, and that one is in bfloat16 or int8. Which
# latents fire, float32 still decides.
def fast_step_of(name: str) -> Callable[[Any], Any]:
    """Decorator: the function does for this architecture what plain_gradients does. It is used
    unless --plain is given."""

    def enter(step: Any) -> Any:
        ARCHITECTURES[name].fast = step
        return step

    return enter


@fast_step_of("relu")
def fast_relu(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """Dense: half of the latents fire for a long time."""
    batch = encode_batch(x, sae, now)
    latents = batch.pre.relu()  # [N, F]
    error = (latents @ batch.w_dec).float() + sae.b_dec - x  # [N, D]
    dy = error * (2 / error.numel())  # [N, D]
    back = dense_backward(batch.low, latents, dy, batch.w_dec, l1_weight(now) / len(x))
    by_name = back._asdict()
    # the decoder adds b_dec, the encoder subtracts it
    by_name["b_dec"] = dy.sum(0) - back.b_enc @ sae.W_enc
    return Gradients(by_name, error, fires(latents).sum(0))


@fast_step_of("gated")
def fast_gated(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """Dense, twice: through what fires and through the gate."""
    batch = encode_batch(x, sae, now)
    dtype = batch.low.dtype
    gain = sae.r_mag.exp()  # [F]
    # exp(r_mag) (pre - b_enc) + b_mag, from pre as it is
    bias = (sae.b_mag - gain * sae.b_enc).to(dtype)
    latents = torch.addcmul(bias, batch.pre, gain.to(dtype)).relu_()  # [N, F]
    latents.mul_(batch.pre > 0)
    error = (latents @ batch.w_dec).float() + sae.b_dec - x  # [N, D]
    dy = error * (2 / error.numel())
    magnitude = dense_backward(batch.low, latents, dy, batch.w_dec)

    opened = batch.pre.relu()  # [N, F]
    gate_error = (opened @ batch.w_dec).float() + sae.b_dec - x  # [N, D]
    gate_dy = gate_error.mul_(2 / error.numel())
    gate = dense_backward(batch.low, opened, gate_dy, batch.w_dec, l1_weight(now) / len(x))

    by_magnitude = magnitude.W_enc * gain[:, None]  # [F, D]
    by_shared = gain * magnitude.b_enc + gate.b_enc  # [F], by (x - b_dec) W_enc^T
    by_name = {
        "W_enc": by_magnitude + gate.W_enc,
        "b_enc": gate.b_enc,
        "W_dec": magnitude.W_dec,  # of the gate's own reconstruction the decoder is held
        "b_dec": dy.sum(0) - by_shared @ sae.W_enc,
        "r_mag": (by_magnitude * sae.W_enc).sum(1),
        "b_mag": magnitude.b_enc,
    }
    return Gradients(by_name, error, fires(latents).sum(0))


@fast_step_of("topk")
def fast_topk(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """Sparse, k entries a token."""
    batch = encode_batch(x, sae, now)
    code = select_topk(batch.pre, now.k, batch.referee)
    found, _ = sparse_gradients(x, code, batch, sae, now)
    return found


@fast_step_of("batchtopk")
def fast_batchtopk(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """Sparse, k entries a token on average."""
    batch = encode_batch(x, sae, now)
    code, cut = select_batchtopk(batch.pre, now.k, 0.8 * now.cut, batch.referee)
    found, _ = sparse_gradients(x, code, batch, sae, now)
    found.cut = cut
    return found


@fast_step_of("jumprelu")
def fast_jumprelu(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """Sparse, what fires and what is about to."""
    batch = encode_batch(x, sae, now)
    # what lies in the rectangle below its threshold is in the code, too, with a value of 0
    code = select_above(batch.pre, sae.threshold - BANDWIDTH / 2)
    threshold = sae.threshold[code.latent]  # [n]
    over = code.value - threshold
    code = code._replace(value=code.value * (over > 0))
    found, d_value = sparse_gradients(x, code, batch, sae, now)

    # (L0 / target - 1)^2 pulls at each active entry
    l0 = found.fired.sum() / len(x)
    pull = 2 * (l0 / now.target_l0 - 1) / (now.target_l0 * len(x))
    near = over.abs() < BANDWIDTH / 2
    d_threshold = (threshold * d_value.float() + pull) * near / -BANDWIDTH  # [n]
    summed = torch.zeros_like(sae.threshold).index_add_(0, code.latent, d_threshold)  # [F]
    found.by_name["threshold"] = summed
    found.cut = sae.threshold.mean()
    return found


@fast_step_of("matryoshka")
def fast_matryoshka(x: Tensor, sae: Weights, now: Now) -> Gradients:
    """Sparse, each prefix a copy of the batch."""
    batch = encode_batch(x, sae, now)
    code, cut = select_batchtopk(batch.pre, now.k, 0.8 * now.cut, batch.referee)
    fired = count_firings(code, len(sae.b_enc))
    ends = torch.tensor(prefix_ends(len(sae.b_enc)), device=x.device)  # [G]
    n_groups = len(ends)
    code = nested(code.cast(batch.low.dtype), len(x), ends)

    # what is written from one end to the next
    parts = decode(code, batch.w_dec).view(n_groups, *x.shape)  # [G, N, D]
    errors = parts.cumsum(0) + sae.b_dec - x  # [G, N, D], of each prefix
    d_errors = errors * (2 / errors.numel())
    # a latent serves its own and all longer prefixes
    d_parts = d_errors.flip(0).cumsum(0).flip(0)  # [G, N, D]

    copies = batch.low.expand(n_groups, *x.shape).flatten(0, 1)  # [G N, D]
    d_flat = d_parts.flatten(0, 1)  # [G N, D]
    back, _ = sparse_backward(copies, code, d_flat, batch.w_dec, slope=fires(code.value))
    found = Gradients(back._asdict(), errors[-1], fired, cut)
    add_auxiliary(found, batch, sae, now)
    found.by_name["b_dec"] = d_parts[0].sum(0) - found.by_name["b_enc"] @ sae.W_enc
    return found


def sparse_gradients(
    x: Tensor, code: Code, batch: Batch, sae: Weights, now: Now
) -> tuple[Gradients, Tensor]:
    """Of the mean squared error of what `code` decodes to and of the auxiliary loss; and the
    gradient of each value of the code [n]."""
    fired = count_firings(code, len(sae.b_enc))
    code = code.cast(batch.low.dtype)
    error = decode(code, batch.w_dec) + sae.b_dec - x  # [N, D]
    dy = error * (2 / error.numel())  # [N, D]
    back, d_value = sparse_backward(batch.low, code, dy, batch.w_dec, slope=fires(code.value))
    found = Gradients(back._asdict(), error, fired)
    add_auxiliary(found, batch, sae, now)
    # the decoder adds b_dec, the encoder subtracts it
    found.by_name["b_dec"] = dy.sum(0) - found.by_name["b_enc"] @ sae.W_enc
    return found, d_value


def add_auxiliary(found: Gradients, batch: Batch, sae: Weights, now: Now) -> None:
    """Adds the gradients of auxiliary_loss, in place."""
    dead = now.dead.nonzero().flatten()  # [n_dead]
    if len(dead) == 0 or now.aux_k == 0:
        return
    n_tokens, d_in = found.error.shape
    n_seen = math.ceil(n_tokens * AUX_TOKENS)
    error = found.error[:n_seen]  # [n_seen, D]
    low = batch.low[:n_seen]
    w_dec = batch.w_dec[dead]  # [n_dead, D]
    if batch.order_only:
        silent = products(low, sae.W_enc[dead], sae.b_enc[dead])  # [n_seen, n_dead]
    else:
        silent = batch.pre[:n_seen, dead]
    largest = silent.topk(n_auxiliary(now, len(dead), d_in))  # [n_seen, aux_k]
    latents = torch.zeros_like(silent).scatter_(1, largest.indices, largest.values.relu())
    d_y = (latents @ w_dec).float() + error
    # row by row: one sum over all would round differently with another number of threads
    d_y *= 2 * AUX / error.square().sum(1).sum().clamp(min=1e-9)
    back = dense_backward(low, latents, d_y, w_dec)
    for name, gradient in back._asdict().items():
        found.by_name[name].index_add_(0, dead, gradient)


# ---- the encoder's product
@dataclass
class Batch:
    """A batch x [N, D] as the fast steps see it.

    low: [N, D], x - b_dec in the dtype of products
    pre: [N, F], in that dtype
    order_only: pre comes from int8 products: only the order of its values counts
    w_dec: [F, D], in that dtype
    referee: what float32 must decide; None where pre is float32
    """

    low: Tensor
    pre: Tensor
    order_only: bool
    w_dec: Tensor
    referee: Referee | None


def encode_batch(x: Tensor, sae: Weights, now: Now) -> Batch:
    """pre = (x - b_dec) W_enc^T + b_enc in now.dtype: float32, bfloat16 or int8."""
    is_int8 = now.dtype == "int8"
    dtype = torch.float32 if now.dtype == "float32" else torch.bfloat16
    centred = x - sae.b_dec  # [N, D]
    low = centred.to(dtype)
    if is_int8:
        pre = int8_products(centred, sae.W_enc, sae.b_enc)  # [N, F]
    else:
        pre = products(low, sae.W_enc, sae.b_enc)  # [N, F]
    referee = None
    if now.dtype in DOUBT:
        referee = Referee(*DOUBT[now.dtype], centred, sae)
    return Batch(low, pre, is_int8, sae.W_dec.to(dtype), referee)


def products(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x [N, D] w [F, D]^T + b [F] -> [N, F] in the dtype of x."""
    # the bias is one more input that is 1: addmm would first write it to all of the result
    inputs = torch.cat([x, x.new_ones(len(x), 1)], 1)  # [N, D + 1]
    weights = torch.cat([w.to(x.dtype), b[:, None].to(x.dtype)], 1)  # [F, D + 1]
    return inputs @ weights.T


def int8_products(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x [N, D] w [F, D]^T + b [F] -> [N, F] in bfloat16, from rows rounded to 255 levels each.

    On CPUs with VNNI twice as fast as bfloat16. The error is 1 % of |x| |w| / sqrt(D) where the
    entries of a row are alike, more where few of them are large.
    """
    x_levels, x_spacing = in_levels(x)  # [N, D], [N, 1]
    w_levels, w_spacing = in_levels(w)  # [F, D], [F, 1]
    sums = torch._int_mm(x_levels, w_levels.T).bfloat16().mul_(x_spacing)  # [N, F]
    return torch.addcmul(b.bfloat16(), sums, w_spacing.T, out=sums)


def in_levels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, D] as int8 multiples of a spacing of their own, and it [n, 1] in bfloat16."""
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))  # [n, 1]
    spacing = (largest / 127).clamp(min=1e-30)
    return (rows / spacing).round_().to(torch.int8), spacing.bfloat16()


# ---- which latents fire
# how many latents a token float32 must look at, above the cut and below it; int8: all above
DOUBT = {"bfloat16": (4, 4), "int8": (1 << 30, 8)}


class Code(NamedTuple):
    """The latents that fire in a batch, sparse, sorted by token: latent[e] fires with value[e] at
    token[e]."""

    latent: Tensor  # [n]
    value: Tensor  # [n]
    token: Tensor  # [n]
    start: Tensor  # [N], where the entries of each token begin

    def cast(self, dtype: torch.dtype) -> Code:
        return self._replace(value=self.value.to(dtype))


@dataclass
class Referee:
    """Decides in float32 between latents that pre, in bfloat16 or int8, may order wrongly.

    above, below: latents a token that it looks at: just large enough to fire, and just too small
    centred: [N, D] float32, x - b_dec
    """

    above: int
    below: int
    centred: Tensor
    sae: Weights

    def value(self, latent: Tensor, token: Tensor) -> Tensor:
        """pre [n] of these pairs in float32."""
        return pair_products(self.centred, self.sae.W_enc, latent, token) + self.sae.b_enc[latent]


def select_topk(pre: Tensor, k: int, referee: Referee | None = None) -> Code:
    """The positive ones among each token's k largest of pre [N, F]."""
    n_tokens, n_latents = pre.shape
    if referee is None:
        value, latent = row_topk(pre, k)  # [N, k]
    else:
        below = min(referee.below, n_latents - k)
        value, latent = row_topk(pre, k + below)  # [N, k + below]
        value, latent = settle_rows(value.float(), latent, k, referee)  # [N, k]
    token = torch.arange(n_tokens, device=pre.device).repeat_interleave(k)  # [N k]
    value = value.flatten()  # [N k]
    return sparse_code(latent.flatten(), value, token, value > 0, n_tokens)


def settle_rows(value: Tensor, latent: Tensor, k: int, referee: Referee) -> tuple[Tensor, Tensor]:
    """The k largest of each row of candidates [N, k + below], where the referee decides between
    those that are not sure -> values, latents [N, k]."""
    n_sure = max(k - referee.above, 0)
    if n_sure:
        value, order = value.sort(1, descending=True)
        latent = latent.gather(1, order)
    close = latent[:, n_sure:]  # [N, above + below]
    token = torch.arange(len(close), device=close.device).repeat_interleave(close.shape[1])
    exact = referee.value(close.flatten(), token).view_as(close)
    best, place = exact.topk(k - n_sure)  # [N, above]
    value = torch.cat([value[:, :n_sure], best], 1)  # [N, k]
    latent = torch.cat([latent[:, :n_sure], close.gather(1, place)], 1)
    return value, latent


def select_batchtopk(
    pre: Tensor, k: int, guess: Tensor | float = 0.0, referee: Referee | None = None
) -> tuple[Code, Tensor]:
    """The positive ones among the N k largest of pre [N, F], and the cut, the smallest of them.
    Exact whatever the `guess`, which is a fast lower bound of the cut."""
    n_tokens, n_latents = pre.shape
    below = min(referee.below, n_latents - k) if referee else 0
    token, latent = (pre > guess).nonzero(as_tuple=True)  # [n] each
    if len(token) < (k + below) * n_tokens:  # guessed too high
        token, latent = (pre > 0).nonzero(as_tuple=True)
    value = pre[token, latent]  # [n]
    if referee:
        value = value.float()
        n_sure = max(k - referee.above, 0)
        smallest = nth_largest(value, (k + below) * n_tokens)
        largest = nth_largest(value, n_sure * n_tokens)
        close = ((value >= smallest) & (value <= largest)).nonzero()[:, 0]
        value[close] = referee.value(latent[close], token[close])
    cut = nth_largest(value, k * n_tokens)
    fire = (value > 0) & (value >= cut)
    return sparse_code(latent, value, token, fire, n_tokens), cut.float()


def select_above(pre: Tensor, least: Tensor) -> Code:
    """All of pre [N, F] that exceed `least` [F], which is not negative; float32."""
    token, latent = (pre > least.to(pre.dtype)).nonzero(as_tuple=True)  # [n] each
    value = pre[token, latent].float()
    return sparse_code(latent, value, token, value > 0, len(pre))


def sparse_code(latent: Tensor, value: Tensor, token: Tensor, keep: Tensor, n_tokens: int) -> Code:
    """The entries [n] where `keep` is true, in order of their tokens."""
    count = torch.bincount(token[keep], minlength=n_tokens)  # [N]
    return Code(latent[keep], value[keep], token[keep], count.cumsum(0) - count)


def nested(code: Code, n_tokens: int, ends: Tensor) -> Code:
    """The code of G copies of the batch: what fires below ends[0] [G] at token t stays there, what
    fires below ends[g] goes to token g N + t."""
    group = torch.bucketize(code.latent, ends, right=True)  # [n]
    token, order = (group * n_tokens + code.token).sort(stable=True)
    count = torch.bincount(token, minlength=n_tokens * len(ends))  # [G N]
    return Code(code.latent[order], code.value[order], token, count.cumsum(0) - count)


def count_firings(code: Code, n_latents: int) -> Tensor:
    """On how many tokens each latent fires [F]."""
    return torch.bincount(code.latent[fires(code.value)], minlength=n_latents)


def row_topk(pre: Tensor, k: int, members: int = 16) -> tuple[Tensor, Tensor]:
    """The k largest of each row of pre [N, F] -> values, latents [N, k]. Exact, faster than topk.

    They lie in the k groups of `members` latents that have the largest maxima. Groups are strided,
    so that the maximum vectorises.
    """
    n_groups = pre.shape[1] // members
    if pre.shape[1] % members or n_groups < 2 * k:
        value, latent = pre.topk(k, sorted=False)
        return value, latent
    maxima = pre.view(len(pre), members, n_groups).amax(1)  # [N, groups]
    best = maxima.topk(k, sorted=False).indices  # [N, k]
    offsets = torch.arange(members, device=pre.device) * n_groups
    latent = (best[:, None] + offsets[:, None]).flatten(1)  # [N, members k]
    value, place = pre.gather(1, latent).topk(k, sorted=False)  # [N, k]
    return value, latent.gather(1, place)


def nth_largest(value: Tensor, n: int) -> Tensor:
    """The n-th largest of value [any]: infinity for n = 0, and 0 where there are not as many."""
    if n == 0:
        return value.new_full((), math.inf)
    if len(value) < n:
        return value.new_zeros(())
    return value.kthvalue(len(value) - n + 1).values


# ---- decoding and the way back
class Backward(NamedTuple):
    """Gradients in float32, but for b_dec."""

    W_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]


def decode(code: Code, w_dec: Tensor) -> Tensor:
    """What the code writes, without b_dec: [N, D] float32."""
    return F.embedding_bag(
        code.latent, w_dec, code.start, per_sample_weights=code.value, mode="sum"
    ).float()


def sparse_backward(
    x: Tensor, code: Code, dy: Tensor, w_dec: Tensor, slope: Tensor
) -> tuple[Backward, Tensor]:
    """Gradients, and those of the values [n], from that of the reconstruction of x, dy [N, D].

    slope [n]: derivative of each value by its pre; for a ReLU 1 where it fires, else 0.
    d_value = dy . w_dec[latent];  dW_dec[f] = sum of value dy and dW_enc[f] = sum of d_pre x, over
    the tokens where f fires. A sum over tokens grouped by latent is an embedding bag: no atomics,
    nothing of size [n, D] or [N, F].
    """
    low_dy = dy.to(x.dtype)
    d_value = pair_products(low_dy, w_dec, code.latent, code.token)  # [n]
    d_pre = d_value * slope  # [n]
    by_latent = code.latent.argsort(stable=True)  # [n]
    count = torch.bincount(code.latent, minlength=len(w_dec))  # [F]
    token = code.token[by_latent]
    start = count.cumsum(0) - count  # [F], where the entries of each latent begin

    def sum_over_tokens(rows: Tensor, weight: Tensor) -> Tensor:  # [N, D], [n] -> [F, D]
        weight = weight[by_latent]
        return F.embedding_bag(token, rows, start, per_sample_weights=weight, mode="sum").float()

    b_enc = torch.zeros(len(w_dec), device=x.device).index_add_(0, code.latent, d_pre.float())
    back = Backward(sum_over_tokens(x, d_pre), b_enc, sum_over_tokens(low_dy, code.value))
    return back, d_value


def dense_backward(
    x: Tensor, latents: Tensor, dy: Tensor, w_dec: Tensor, l1: float = 0.0
) -> Backward:
    """The same for dense latents = relu(pre) [N, F], with an L1 penalty of weight l1 on each."""
    low_dy = dy.to(x.dtype)
    d_pre = (low_dy @ w_dec.T + l1) * fires(latents)  # [N, F]
    w_enc = (d_pre.T @ x).float()
    return Backward(w_enc, d_pre.sum(0, dtype=torch.float32), (latents.T @ low_dy).float())


def pair_products(x: Tensor, w: Tensor, latent: Tensor, token: Tensor) -> Tensor:
    """x[token] . w[latent] [n] for x [N, D], w [F, D], tokens in order: without gathering rows, of
    which there are n D numbers."""
    count = torch.bincount(token, minlength=len(x))  # [N]
    start = count.cumsum(0) - count
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    if x.device.type == "cuda":  # where it has no bfloat16
        return backward(x.float(), w.float(), latent, start, token, 0, -1).to(x.dtype)
    return backward(x, w, latent, start, token, 0, -1)


# ---- the finished SAE
class SparseAutoencoder(NamedTuple):
    """An SAE in plain torch, as SAELens runs it: x [..., D] -> latents [..., F] -> x [..., D], in
    the units of its weights: raw where they are those of an export."""

    cfg: dict[str, Any]
    weights: dict[str, Tensor]

    def encode(self, x: Tensor) -> Tensor:
        return ENCODERS.get(self.cfg["architecture"], own_latents)(self, x)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.weights["W_dec"] + self.weights["b_dec"]


def standard_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    w = sae.weights
    return ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()


def topk_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    w = sae.weights
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # [..., F]
    top = pre.topk(sae.cfg["k"], sorted=False)
    return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())


def jumprelu_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    w = sae.weights
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # [..., F]
    return pre.relu() * (pre > w["threshold"])


def gated_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    w = sae.weights
    pre = (x - w["b_dec"]) @ w["W_enc"]  # [..., F]
    magnitude = pre * w["r_mag"].exp() + w["b_mag"]
    return magnitude.relu() * (pre + w["b_gate"] > 0)


def own_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Of an architecture that SAELens does not have: its forward, on the folded weights."""
    w_enc = sae.weights["W_enc"].T  # [F, D], as the forward has it
    weights = Weights(**sae.weights | {"W_enc": w_enc})
    arguments = sae.cfg["arguments"]
    dead = torch.zeros(len(w_enc), dtype=torch.bool, device=x.device)
    now = Now(**arguments, step=arguments["steps"], dead=dead, cut=x.new_zeros(()))
    name = sae.cfg["architecture"].removeprefix(OWN)
    output = ARCHITECTURES[name].forward(x.flatten(0, -2), weights, now)
    return output.latents.view(*x.shape[:-1], -1)  # [..., F]


OWN = "janus."  # before the name of an architecture in cfg.json, so that SAELens cannot mistake it
# what SAELens calls an architecture -> what it does for it
ENCODERS = {
    "standard": standard_latents,
    "topk": topk_latents,
    "jumprelu": jumprelu_latents,
    "gated": gated_latents,
}


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Reads an exported SAE folder; HandoffError if it is missing or damaged, or if this script has
    no architecture of its name."""
    folder = Path(folder)
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(folder / WEIGHTS, device=str(device))
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        fact = f"{folder} is not a readable SAE ({str(e)[:120]})"
        raise HandoffError(f"{fact}; make it with: python train_sae.py") from None
    name = cfg.get("architecture")
    known = [*ENCODERS, *(OWN + own for own in ARCHITECTURES)]
    if name not in known:
        raise HandoffError(f"{folder} is of architecture {name}, not of {', '.join(known)}")
    return SparseAutoencoder(cfg, weights)


# ---------------------------------------------------------------------------------------------- run
class Layout(NamedTuple):
    """How the training rows of a dump are dealt out."""

    block: int  # rows
    n_blocks: int
    n_pools: int  # an epoch
    batches_per_pool: int


def choose_held_out(documents: np.ndarray) -> np.ndarray:
    """Numbers of the documents to hold out, of documents [W], those of the windows.

    As many as have 5 % of the windows, evenly spread over the dump: in steps of the golden ratio
    each document falls into the widest gap between those before it.
    """
    numbers, n_windows = np.unique(documents, return_counts=True)  # [documents]
    golden = (math.sqrt(5) - 1) / 2
    order = np.argsort(np.arange(len(numbers)) * golden % 1)
    n_so_far = n_windows[order].cumsum()
    n_chosen = 1 + np.searchsorted(n_so_far, HELD_OUT * len(documents))
    return numbers[order[:n_chosen]]


class Moments(NamedTuple):
    """What the training rows are like; norm, variances and axes from a sample of 65,536 of them."""

    mean: Tensor  # [D]
    norm: float  # E||raw - mean||
    variances: Tensor  # [D], along the axes, the largest first
    axes: Tensor  # [D, D], the eigenvectors of the covariance, one a column

    def leading_axes(self, share: float) -> Tensor | None:
        """As many of the axes [D, R] as hold this share of the variance; None: all of them.

        At least a quarter of D, as far as the data vary at all: a single direction of massive
        activations (Sun et al. 2024, arXiv 2402.17762) may hold more than the share, and latents
        that all start along it stay alike.
        """
        if share >= 1:
            return None
        held = self.variances.clamp(min=0).cumsum(0)  # [D]
        n_axes = int((held < share * held[-1]).sum()) + 1
        n_varied = int((self.variances > 1e-7 * self.variances[0]).sum())  # the rest is rounding
        return self.axes[:, : max(n_axes, min(n_varied, math.ceil(len(held) / 4)))]


class Dump:
    """A dumped layer, or one head of it, in raw units.

    array: [N, D], memory-mapped; side: its sidecar
    documents: [W], number of the document of each window, which is that of its first token
    held_out: numbers of the windows of the documents held out
    trained: numbers of the windows that share no document with them; n_train: their rows
    columns: which columns of the dump D is
    """

    def __init__(self, folder: Path, layer: int, site: str, head: int | None = None) -> None:
        self.run = folder.name
        self.layer = layer
        self.site = site
        self.head = head
        self.path = folder / f"L{layer}.{site}.npy"
        self.remedy = f"python harvest_activations.py --run_name {self.run} --layers {layer}"
        self.side = read_sidecar(self.path, "janus.activations/1", self.remedy)
        whole = self.open_array()
        self.columns = slice(None)
        if head is not None:
            self.columns = slice(head * self.d_head, (head + 1) * self.d_head)
        self.array = whole[:, self.columns]
        self.hold_out(self.read_documents())
        self.pool: tuple[Any, Tensor] = (None, torch.empty(0))  # the last one, and what it is
        self.found: Moments | None = None

    def read_documents(self) -> np.ndarray:
        """Number of the document of each token [W, T]. HandoffError if they are not known, as in a
        dump of the first windows of a split, which is older."""
        path = self.path.with_name("documents.npy")
        layers = " ".join(map(str, dumped_layers(self.path.parent, self.site)))
        remedy = f"python harvest_activations.py --model_path {self.side.get('checkpoint')}"
        remedy += f" --run_name {self.run} --site {self.site} --layers {layers}"
        remedy += f" --save_dir {self.path.parent.parent} --overwrite"
        if not path.exists():
            fact = f"{self.path} has no {path.name} beside it, so no document can be held out"
            raise HandoffError(f"{fact}; harvest anew with: {remedy}")
        read_sidecar(path, "janus.documents/1", remedy)
        try:
            numbers = np.load(path, allow_pickle=False)  # [N]
        except (ValueError, EOFError):
            numbers = np.zeros(0)
        n_windows = len(self.array) // self.seq_len
        if numbers.shape != self.array.shape[:1] or n_windows == 0:
            fact = f"{path} {list(numbers.shape)} does not fit {self.path.name}"
            fact += f" ({len(self.array)} rows, windows of {self.seq_len})"
            raise HandoffError(f"{fact}; harvest anew with: {remedy}")
        return numbers[: n_windows * self.seq_len].reshape(n_windows, self.seq_len)

    def hold_out(self, by_token: np.ndarray) -> None:
        """Divides the windows by their documents, by_token [W, T]. HandoffError if that leaves
        nothing to train on."""
        self.documents = by_token[:, 0].copy()  # [W]
        chosen = choose_held_out(self.documents)
        is_held_out = np.isin(self.documents, chosen)  # [W]
        # A held-out window may end in the next document, which must not be trained on either
        unseen = np.unique(by_token[is_held_out])
        is_trained = ~np.isin(by_token, unseen).any(1)  # [W]
        self.held_out = np.flatnonzero(is_held_out)
        self.trained = np.flatnonzero(is_trained)
        self.n_train = len(self.trained) * self.seq_len
        if self.n_train == 0:
            n_documents = len(np.unique(self.documents))
            found = f"{self.path} has {len(self.documents)} windows of {n_documents} documents"
            raise HandoffError(f"{found}, too few to hold any out: harvest more, with --tokens")

    def open_array(self) -> np.ndarray:
        """All columns [N, H*K]; also reads seq_len and d_head. HandoffError if the sidecar says
        something else."""
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            self.seq_len, self.d_head = self.side["seq_len"], self.side["d_head"]
            known_type = array.dtype in (np.float16, np.float32)
            if list(array.shape) != self.side["shape"] or not known_type:
                found = f"found {array.dtype} {list(array.shape)}"
                raise ValueError(f"{found}, expected {self.side['dtype']} {self.side['shape']}")
        except (ValueError, KeyError, EOFError) as e:
            fact = f"{self.path} does not agree with its sidecar ({e})"
            raise HandoffError(f"{fact}; remake it with: {self.remedy}") from None
        return array

    def rows(self, numbers: np.ndarray) -> Tensor:
        """These rows [n, D], in ascending order, in the type of the dump. HandoffError that names
        the first one that is not finite."""
        first, last = numbers[0], numbers[-1]
        are_neighbours = last - first == len(numbers) - 1
        chosen = slice(first, last + 1) if are_neighbours else numbers  # a slice reads faster
        raw = torch.from_numpy(np.array(self.array[chosen]))  # [n, D]
        if not math.isfinite(raw.sum(dtype=torch.float64)):
            bad = (~raw.isfinite().all(1)).nonzero()
            fact = f"layer {self.layer}, row {numbers[int(bad[0])]} of {self.path}"
            raise HandoffError(f"{fact} is NaN or infinite; remake it with: {self.remedy}")
        return raw

    def training_rows(self, places: np.ndarray) -> Tensor:
        """Rows [n, D] by their places among the n_train rows to train on."""
        window, position = np.divmod(places, self.seq_len)
        return self.rows(self.trained[window] * self.seq_len + position)

    def evaluation(self, n_tokens: int) -> np.ndarray:
        """Held-out windows, evenly spaced, at most n_tokens tokens of them."""
        n = max(1, min(n_tokens // self.seq_len, len(self.held_out)))
        places = np.linspace(0, len(self.held_out) - 1, n).astype(int)
        return self.held_out[places]

    def mixture(self, n_tokens: int) -> np.ndarray:
        """Windows of held-out and of training documents, spread over the dump, with at least
        n_tokens tokens; all where there are not as many."""
        n_all = len(self.documents)
        n = min(n_all, math.ceil(n_tokens / self.seq_len))
        return np.arange(n) * n_all // n

    def windows(self, numbers: np.ndarray) -> Iterator[Tensor]:
        """The rows of these windows, float32 [n * T, D], a few windows at a time."""
        at_once = max(1, 4096 // self.seq_len)
        for i in range(0, len(numbers), at_once):
            starts = numbers[i : i + at_once, None] * self.seq_len  # [n, 1]
            rows = starts + np.arange(self.seq_len)  # [n, T]
            yield self.rows(rows.flatten()).float()

    def moments(self) -> Moments:
        """Of the training rows. Reads every row that is used once, so that a bad one is found
        before training; remembers what it found."""
        if self.found is None:
            self.found = self.measure()
        return self.found

    def measure(self) -> Moments:
        """The moments, anew."""
        total = torch.zeros(self.array.shape[1], dtype=torch.float64)
        for rows in self.windows(self.trained):
            total += rows.sum(0, dtype=torch.float64)
        for _ in self.windows(self.held_out):
            pass
        mean = (total / self.n_train).float()
        n = min(BLOCK, self.n_train)
        norms = []
        products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for start in np.linspace(0, self.n_train - n, 256).astype(int):
            rows = self.training_rows(start + np.arange(n)).float() - mean  # [n, D]
            norms.append(rows.norm(dim=1).mean())
            products += rows.T @ rows  # summed in float64: the last variances are small
        norm = float(np.mean(norms))
        if norm == 0:
            fact = f"{self.path} is the same in every row: nothing to decompose"
            raise HandoffError(f"{fact}; remake it with: {self.remedy}")
        variances, axes = torch.linalg.eigh(products / (256 * n))  # ascending
        return Moments(mean, norm, variances.flip(0), axes.flip(1).float())

    def layout(self, batch_size: int) -> Layout:
        """HandoffError if there are not enough rows for one batch a pool."""
        block = min(BLOCK, batch_size)
        n_blocks = self.n_train // block
        n_pools = math.ceil(self.n_train / POOL)
        batches_per_pool = n_blocks // n_pools * block // batch_size
        if batches_per_pool == 0:
            fact = f"the {self.n_train} training rows of {self.path}: harvest more"
            raise HandoffError(f"--batch_size {batch_size} is too large for {fact}")
        return Layout(block, n_blocks, n_pools, batches_per_pool)

    def batch(self, number: int, size: int, seed: int) -> Tensor:
        """Batch `number` [size, D] of an endless shuffled stream.

        A pure function of its arguments, so that the cursor of a run is one number. Every epoch
        deals blocks of neighbouring rows at random into pools; within a pool rows are shuffled.
        """
        layout = self.layout(size)
        seed = seed % 2**32  # NumPy takes no negative seed
        pool, place = divmod(number, layout.batches_per_pool)
        if self.pool[0] != (pool, size, seed):
            self.pool = (pool, size, seed), self.shuffled_pool(pool, layout, seed)
        return self.pool[1][place * size :][:size]

    def shuffled_pool(self, number: int, layout: Layout, seed: int) -> Tensor:
        """All rows of a pool, shuffled; pools are counted over all epochs."""
        epoch, place = divmod(number, layout.n_pools)
        dealt = np.random.default_rng([seed, epoch]).permutation(layout.n_blocks)
        blocks = np.sort(np.array_split(dealt, layout.n_pools)[place])
        starts = blocks * layout.block
        places = np.arange(layout.block)
        pool = torch.cat([self.training_rows(start + places) for start in starts])
        order = np.random.default_rng([seed, epoch, place]).permutation(len(pool))
        return pool[torch.from_numpy(order)]


NORMAL_ROWS = 2025  # a stream of random numbers that nothing else has


class GaussianDump(Dump):
    """Rows of the normal distribution that has mean and covariance of a dump's training rows, in
    its windows and documents: what an SAE makes of them, second moments alone explain."""

    def __init__(self, dump: Dump) -> None:
        vars(self).update(vars(dump))
        self.pool = (None, torch.empty(0))
        self.found = None
        self.real = dump
        self.dtype = dump.rows(np.arange(1)).dtype

    @functools.cached_property
    def normal(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and root [D, D] of the covariance; reads all training rows."""
        centre = self.real.moments().mean  # [D]
        covariance = torch.zeros(len(centre), len(centre), dtype=torch.float64)
        for rows in self.real.windows(self.trained):
            x = rows - centre  # [n, D]
            covariance += x.T @ x / self.n_train
        variances, axes = torch.linalg.eigh(covariance)  # [D], [D, D]
        return centre, (axes * variances.clamp(min=0).sqrt()).T.float()

    def rows(self, numbers: np.ndarray) -> Tensor:
        """These rows [n, D]: each the same whenever it is asked for."""
        centre, root = self.normal
        blocks, place = np.unique(numbers // BLOCK, return_inverse=True)
        drawn = []
        for block in blocks:
            # Not torch's, with whose numbers for a seed the directions of an SAE begin
            generator = np.random.default_rng([NORMAL_ROWS, block])
            normal = generator.standard_normal((BLOCK, len(centre)), np.float32)
            drawn.append(torch.from_numpy(normal))
        chosen = torch.from_numpy(place * BLOCK + numbers % BLOCK)
        return (centre + torch.cat(drawn)[chosen] @ root).to(self.dtype)


# ---- measures, all of raw activations
def ratio_interval(
    name: str, top: np.ndarray, bottom: np.ndarray | float, documents: np.ndarray
) -> dict[str, float]:
    """sum(top) / sum(bottom) over windows [W], and its 95 % interval (`ratio_of_sums`), for other
    documents of the same kind: the windows of one document are alike, so what those of a document
    [W] have is summed first.

    NaN below 16 documents, and where the ratio may be anything: where the sum of `bottom` is less
    than three of its standard errors, or nothing bounds the ratio.
    """
    _, unit = np.unique(documents, return_inverse=True)  # [W]
    tops = np.bincount(unit, top)  # [documents]
    bottoms = np.bincount(unit, np.broadcast_to(np.asarray(bottom, float), top.shape))
    ratio = ratio_of_sums(tops, bottoms, LEAST_DOCUMENTS)
    bottom_error = math.sqrt(len(bottoms)) * bottoms.std()  # of its sum
    if abs(bottoms.sum()) < 3 * bottom_error or not math.isfinite(ratio.high - ratio.low):
        ratio = Ratio(ratio.value, math.nan, math.nan)
    return {name: ratio.value, f"{name}_lo": ratio.low, f"{name}_hi": ratio.high}


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder, dump: Dump, chosen: np.ndarray
) -> tuple[dict[str, Any], pd.DataFrame]:
    """L0 and reconstruction error on the windows `chosen`; and the sums of each document, of the
    squared error and of the squared distance from the mean."""
    device = sae.weights["W_dec"].device
    total = torch.zeros(dump.array.shape[1], dtype=torch.float64)
    for rows in dump.windows(chosen):
        total += rows.sum(0, dtype=torch.float64)
    mean = (total / (len(chosen) * dump.seq_len)).float().to(device)  # [D]
    chunks = []
    for rows in dump.windows(chosen):
        raw = rows.to(device)  # [n, D]
        latents = sae.encode(raw)  # [n, F]
        error = (sae.decode(latents) - raw).square().sum(1)  # [n]
        variance = (raw - mean).square().sum(1)
        l0 = fires(latents).sum(1)
        chunks.append(torch.stack([l0, error, variance]).cpu().double())  # [3, n]
    by_window = torch.cat(chunks, 1).view(3, len(chosen), -1).numpy()  # [3, W, T]
    l0 = by_window[0]  # [W, T] each
    error = by_window[1]
    variance = by_window[2]

    documents = dump.documents[chosen]  # [W]
    metrics: dict[str, Any] = ratio_interval("l0", l0.mean(1), 1.0, documents)
    for q in (5, 50, 95):
        metrics[f"l0_p{q:02d}"] = float(np.percentile(l0, q))
    metrics |= ratio_interval("fvu", error.sum(1), variance.sum(1), documents)
    metrics |= ratio_interval("mse", error.mean(1) / len(mean), 1.0, documents)
    metrics["ev_legacy"] = float((1 - error / variance).mean())
    metrics["n_documents"] = len(np.unique(documents))
    metrics["n_windows"] = len(l0)
    metrics["n_rows"] = l0.size
    sums = {"document": documents, "error": error.sum(1), "variance": variance.sum(1)}
    return metrics, pd.DataFrame(sums).groupby("document", as_index=False).sum()


@torch.no_grad()
def count_on_windows(sae: SparseAutoencoder, dump: Dump, chosen: np.ndarray) -> np.ndarray:
    """On how many tokens of the windows `chosen` each latent fires [F]."""
    w_dec = sae.weights["W_dec"]
    fired = torch.zeros(len(w_dec), dtype=torch.int64, device=w_dec.device)  # [F]
    for rows in dump.windows(chosen):
        fired += fires(sae.encode(rows.to(w_dec.device))).sum(0)
    return fired.cpu().numpy()


def spliced(
    model: NewGPT, resid: Tensor, layer: int, site: str, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits [B, T, V] when `edit` replaces activation `site` of block `layer`, which reads resid
    [B, T, D]."""
    rotary = model.rotary(layer, resid.shape[1])
    block: Any = model.blocks[layer]

    def at(name: str, value: Tensor) -> Tensor:
        return edit(value) if name == site else value

    x = at("resid_pre", resid)  # [B, T, D]
    z = at("z", block.attn(block.norm_attn(x), *rotary)[0])  # [B, T, H, K]
    middle = x + at("attn_out", block.write(z))
    mlp_out = at("mlp_out", block.mlp(x if model.cfg.parallel else middle))
    x = at("resid_post", middle + mlp_out)
    return model.unembed(model.run_blocks(x, layer + 1))


@torch.no_grad()
def losses_with(
    model: NewGPT,
    saes: list[SparseAutoencoder],
    dump: Dump,
    tokens: np.ndarray,
    mean: Tensor,
    chosen: np.ndarray,
) -> dict[str, EditedLoss]:
    """What the model loses on the windows `chosen` as it is ("clean"), with the activation at zero
    or at its `mean` [D] over the training rows ("zero", "mean"), and with the reconstruction of
    each SAE in its place ("sae0", "sae1", ...). Float32."""
    edits: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda raw: raw,
        "zero": torch.zeros_like,
        "mean": lambda raw: 0 * raw + mean,
    }
    for i, sae in enumerate(saes):
        edits[f"sae{i}"] = functools.partial(reconstruct, sae)
    losses = {name: EditedLoss([], []) for name in edits}
    at_once = max(1, (1 << 24) // (dump.seq_len * model.cfg.vocab_size))
    for i in range(0, len(chosen), at_once):
        starts = [w * dump.seq_len for w in chosen[i : i + at_once]]
        windows = np.stack([tokens[start : start + dump.seq_len] for start in starts])
        idx = torch.from_numpy(windows.astype(np.int64)).to(mean.device)  # [B, T]
        for name, loss in edited_losses(model, dump, idx, edits).items():
            losses[name].ce.extend(loss.ce)
            losses[name].kl.extend(loss.kl)
    return losses


def reconstruct(sae: SparseAutoencoder, raw: Tensor) -> Tensor:
    """raw [N, D] through the SAE and back."""
    return sae.decode(sae.encode(raw))


def ce_recovered(
    losses: dict[str, EditedLoss], sae: str, documents: np.ndarray
) -> dict[str, float | bool]:
    """How much of the loss the SAE named `sae` in losses_with keeps, against zero and mean
    ablation; `documents` [W] of its windows.

    recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean), NaN where ablation costs nothing,
    so that there is nothing to recover; KL is KL(clean || edited).
    """
    names = {"clean": "clean", "sae": sae, "zero": "zero", "mean": "mean"}
    ce = {name: np.array(losses[key].ce) for name, key in names.items()}  # [W] each
    metrics: dict[str, Any] = {f"ce_{name}": ce[name].mean() for name in names}
    for name in ("sae", "zero", "mean"):
        metrics[f"kl_{name}"] = np.mean(losses[names[name]].kl)
    for base in ("zero", "mean"):
        kept = ce[base] - ce["sae"]
        lost = ce[base] - ce["clean"]
        found = ratio_interval(f"ce_recovered_{base}", kept, lost, documents)
        metrics |= found if lost.sum() > 0 else dict.fromkeys(found, math.nan)
    metrics["ce_informative"] = bool(metrics["ce_mean"] - metrics["ce_clean"] >= CE_GAP)
    metrics["n_ce_documents"] = len(np.unique(documents))
    metrics["n_ce_windows"] = len(documents)
    return metrics


class EditedLoss(NamedTuple):
    """Of every window, in nats a token, and KL(clean || edited)."""

    ce: list[float]
    kl: list[float]


def edited_losses(
    model: NewGPT, dump: Dump, idx: Tensor, edits: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, EditedLoss]:
    """Losses on idx [B, T] by the name of an edit; the first one must be clean."""
    losses = {}
    clean = None
    resid = model.run_blocks(model.embed(idx), 0, dump.layer)  # [B, T, D]
    for name, edit in edits.items():
        replace = on_columns(edit, dump.columns)
        # the last token has no next one
        logp = spliced(model, resid, dump.layer, dump.site, replace)[:, :-1].log_softmax(-1)
        if clean is None:
            clean = logp
        ce = -logp.gather(2, idx[:, 1:, None]).mean((1, 2))  # [B]
        kl = (clean.exp() * (clean - logp)).sum(-1).mean(1)  # [B]
        losses[name] = EditedLoss(ce.tolist(), kl.tolist())
    return losses


def on_columns(edit: Callable[[Tensor], Tensor], columns: slice) -> Callable[[Tensor], Tensor]:
    """`edit` on these columns of an activation only, heads side by side as in the dump."""

    def replace(value: Tensor) -> Tensor:  # z [B, T, H, K], or [B, T, D]
        flat = value.flatten(2).clone()  # [B, T, D]
        flat[..., columns] = edit(flat[..., columns])
        return flat.view_as(value)

    return replace


# ---- the last steps, on what the model makes of the reconstruction
FINISH_RATE = 0.1  # learning rate at their start, over that of training


def finish_on_kl(trainer: Trainer, dump: Dump, origin: Origin, stop: list[int]) -> None:
    """Trains on --finish_kl more tokens with the model in the loop: the reconstruction takes the
    place of the activation, and KL(model || spliced) at every token is added to the loss of the
    architecture, weighed to be as large (Karvonen 2025, arXiv 2503.17272).

    In float32 by autograd, at a rate that falls from FINISH_RATE of the training's to 0; the model
    is held. On windows of the training documents. A signal (in `stop`) ends it after the step.
    """
    a = trainer.args
    n_windows = max(1, a.batch_size // dump.seq_len)  # a step
    n_steps = math.ceil(a.finish_kl / (n_windows * dump.seq_len))
    rng = np.random.default_rng([a.seed % 2**32, n_steps])
    for step in tqdm(range(n_steps), "finish", unit="step", disable=None):
        chosen = rng.choice(dump.trained, n_windows)  # in no order: the first are a sample
        places = chosen[:, None] * dump.seq_len + np.arange(dump.seq_len)  # [W, T]
        idx = torch.from_numpy(origin.tokens[places].astype(np.int64)).to(trainer.mean.device)
        left = 1 - step / n_steps
        trainer.set_rates(FINISH_RATE * left)
        for name, gradient in kl_gradients(trainer, dump, origin.model, idx).items():
            getattr(trainer.sae, name).grad = gradient
        trainer.move()
        if stop:
            break


def kl_gradients(trainer: Trainer, dump: Dump, model: NewGPT, idx: Tensor) -> dict[str, Tensor]:
    """Gradients by the SAE's weights of KL(model || spliced) + the loss of the architecture, on
    idx [B, T]; the trainer remembers the cut."""
    leaves = {name: w.detach().requires_grad_() for name, w in vars(trainer.sae).items()}
    outputs: list[Output] = []

    def replace(raw: Tensor) -> Tensor:  # [B, T, D]
        x = (raw.flatten(0, 1) - trainer.mean) * trainer.scale  # [N, D], trained units
        outputs.append(trainer.architecture.forward(x, Weights(**leaves), trainer.now()))
        return (outputs[-1].reconstruction / trainer.scale + trainer.mean).view_as(raw)

    with torch.no_grad():
        resid = model.run_blocks(model.embed(idx), 0, dump.layer)  # [B, T, D]
        clean = spliced(model, resid, dump.layer, dump.site, lambda z: z).log_softmax(-1)
    logits = spliced(model, resid, dump.layer, dump.site, on_columns(replace, dump.columns))
    kl = (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1).mean()
    own = outputs[0].loss
    cut = outputs[0].cut
    trainer.remember_cut(cut if cut is None else cut.detach())
    # as large as the loss that Adam remembers
    weight = own.detach() / kl.detach().clamp(min=1e-9)
    loss = own + weight * kl
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


# ---- what there is to do
# A flag that takes several values -> the argument that has one of them, and how its folder begins
VARIED = {
    "k": ("k", "k"),
    "target_l0": ("target_l0", "l0_"),
    "l1": ("l1", "l1_"),
    "seeds": ("seed", "seed"),
}


class Origin(NamedTuple):
    """Where a dump comes from."""

    model: NewGPT
    tokens: np.ndarray  # [N]


def find_origin(
    dump: Dump, given: Path | None, args: argparse.Namespace, device: torch.device
) -> Origin | None:
    """The model and the tokens behind a dump; if the checkpoint that it names is gone or changed,
    None and a line that says so, or HandoffError where --finish_kl trains with the model."""
    expected = dump.side["checkpoint_sha256"]
    path = given or find_checkpoint(dump.side["checkpoint"], expected, dump.path)
    found = sha256(path) if path.is_file() else "no such file"
    if found != expected and given:
        fact = f"the checkpoint of run {dump.run} (sha256 {expected[:12]})"
        raise HandoffError(f"--model_path {path} ({found[:12]}) is not {fact}")
    if found != expected:
        fact = f"{path} is gone or not what was dumped"
        if args.finish_kl:
            need = f"--finish_kl trains with the model of run {dump.run} in the loop, but {fact}"
            raise HandoffError(f"{need}; name it with --model_path, or leave --finish_kl out")
        print(f"{dump.run}: CE recovered and KL stay empty, as {fact}; --model_path names another")
        return None
    file = dump.path.with_name("tokens.npy")
    read_sidecar(file, "janus.tokens/1", dump.remedy)
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        tokens = np.zeros(0)
    model, _ = load_checkpoint(path, device, args.skip_probe)
    if len(tokens) != len(dump.array) or tokens.max() >= model.cfg.vocab_size:
        fact = f"{file} does not fit {dump.path.name} ({len(dump.array)} rows) or the model"
        raise HandoffError(f"{fact}; remake both with: {dump.remedy}")
    return Origin(model, tokens)


# what --resume may change; every other argument, known today or not, decides the weights
# fmt: off
MAY_DIFFER = [
    "runs", "activations_dir", "layers", "site", "unit",  # hash of the dump and head stand for them
    "model_path", "skip_probe", "eval_tokens",  # only measure
    "save_dir", "save_interval", "tensorboard", "overwrite", "resume", "redraw", "cache_dir",
    "no_figures",
    "device", "threads", "int8",  # dtype says int8, too
    "preset", "tokens", "epochs",  # the sizes and steps that they stand for are there
    "nulls",  # whether there are others beside it
]
# fmt: on


class Job(NamedTuple):
    """An SAE to train."""

    args: argparse.Namespace  # with the sizes filled in
    dump: Dump
    folder: Path

    @property
    def trajectory(self) -> dict[str, Any]:
        """All that decides the weights, by name; without a decay of the learning rate, steps may be
        added."""
        differ = MAY_DIFFER if self.args.lr_decay else [*MAY_DIFFER, "steps"]
        kept: dict[str, Any] = {}
        for name, value in vars(self.args).items():
            if name not in differ:
                kept[name] = str(value) if isinstance(value, Path) else value
        kept["dump"] = self.dump.side["sha256"]
        kept["head"] = self.dump.head
        kept["held_out"] = "documents"
        if ARCHITECTURES[self.args.arch].half_fires:
            kept["start"] = "sums to x within its axes"  # before: within all
        return kept


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """One job an SAE. Opens every dump, so that a broken hand-off is found before any work."""
    dumped_runs = sorted(path.parent.name for path in args.activations_dir.glob("*/tokens.npy"))
    jobs = []
    for run_name in args.runs or dumped_runs or ["adaptive"]:
        folder = args.activations_dir / run_name
        dumped = dumped_layers(folder, args.site)
        for layer in args.layers or dumped or [None]:
            if layer not in dumped:
                fact = f"{folder} has no dumps of {args.site}"
                if dumped:
                    have = ", ".join(map(str, dumped))
                    fact = f"{folder} has dumps of {args.site} of layers {have}, not {layer}"
                remedy = f"python harvest_activations.py --run_name {shlex.quote(run_name)}"
                remedy += " --layers LAYERS --model_path CHECKPOINT"
                raise HandoffError(f"{fact}; make more with: {remedy}")
            jobs += jobs_of_layer(args, folder, layer)
    layers = sorted({job.dump.layer for job in jobs})
    for layer in args.nulls or []:
        if layer not in layers:
            fact = f"--nulls {layer}: no SAE of layer {layer} is asked for"
            raise HandoffError(f"{fact}; expected some of {', '.join(map(str, layers))}")
    for job in jobs:
        check_sizes(job)
    return jobs


def dumped_layers(folder: Path, site: str) -> list[int]:
    """The layers of which a run's folder has a dump, in order."""
    layers = []
    for path in folder.glob(f"L*.{site}.npy"):
        number = path.name.partition(".")[0].removeprefix("L")
        if number.isdecimal():
            layers.append(int(number))
    return sorted(layers)


def jobs_of_layer(args: argparse.Namespace, dumps: Path, layer: int) -> list[Job]:
    """One job, or one a head; of each as many as `variants` asks for, and its nulls."""
    dump = Dump(dumps, layer, args.site)
    name = f"L{layer}" if args.site == "z" else f"L{layer}.{args.site}"
    out = args.save_dir / dump.run / name
    places = {out: dump}
    if args.unit == "head":
        heads = range(dump.array.shape[1] // dump.d_head)
        places = {out / f"H{head}": Dump(dumps, layer, args.site, head) for head in heads}
    jobs = []
    for place, part in places.items():
        trained_on = {"": part}
        if args.nulls is not None and layer in (args.nulls or [layer]):
            trained_on |= {"gaussian": GaussianDump(part), "decoder": part}
        for below, chosen in variants(args):
            for null, rows in trained_on.items():
                filled = fill_in(chosen, rows)
                filled.null = null
                if null == "gaussian":
                    filled.finish_kl = 0  # its rows are no model's
                folder = place / below
                if null:
                    folder /= f"null_{null}"
                jobs.append(Job(filled, rows, folder))
    return jobs


def variants(args: argparse.Namespace) -> Iterator[tuple[Path, argparse.Namespace]]:
    """Every combination of the values of VARIED, as arguments with one value each, and the folder
    of its SAE: below the layer's, named by the flags that have several values."""
    asked = vars(args)
    given = {flag: asked[flag] for flag in VARIED if asked.get(flag)}
    for values in itertools.product(*given.values()):
        chosen = argparse.Namespace(**vars(args))
        below = Path()
        for flag, value in zip(given, values, strict=True):
            delattr(chosen, flag)
            argument, start = VARIED[flag]
            setattr(chosen, argument, value)
            if len(given[flag]) > 1:
                below /= f"{start}{value}"
        yield below, chosen


def fill_in(args: argparse.Namespace, dump: Dump) -> argparse.Namespace:
    """The arguments with the sizes of the preset, and --tokens or --epochs as steps."""
    given = vars(args)
    preset = dump.side.get("preset") if args.preset == "auto" else args.preset
    sizes = dict(PHASE_PRESETS[preset if preset in PHASE_PRESETS else "full"])
    if given.keys() & {"steps", "tokens", "epochs"}:  # one of them replaces the preset's
        sizes.pop("steps", None)
        sizes.pop("tokens", None)
    a = argparse.Namespace(**sizes | given | {"preset": preset})
    if "steps" not in a:
        n_tokens = a.tokens if "tokens" in a else a.epochs * dump.n_train
        a.steps = max(1, round(n_tokens / a.batch_size))
    a.tokens = a.steps * a.batch_size
    flag = ARCHITECTURES[a.arch].l0_flag
    if flag and flag not in a:  # --target_l0, which no preset has
        setattr(a, flag, a.k)
    a.null = ""
    return a


def check_sizes(job: Job) -> None:
    """HandoffError if more latents should fire than there are, or if a batch is too large."""
    a = job.args
    flag = ARCHITECTURES[a.arch].l0_flag
    n_latents = a.expansion * job.dump.array.shape[1]
    if flag and getattr(a, flag) > n_latents:
        fact = f"the {n_latents} latents that --expansion {a.expansion} gives {job.dump.path}"
        raise HandoffError(f"--{flag} {getattr(a, flag)} is more than {fact}")
    job.dump.layout(a.batch_size)


def takes_fast_step(args: argparse.Namespace) -> bool:
    """Whether gradients come from the fast step of --arch, not from autograd."""
    return ARCHITECTURES[args.arch].fast is not None and not args.plain


def check_fast_step(job: Job, device: torch.device) -> None:
    """HandoffError if the fast step is not what the forward says, as after an edit of only one.

    Compares gradients in float32 on a few rows of the first batch, with half of the latents dead.
    Some latents may differ: rounding decides whether one that is at its cut fires.
    """
    if not takes_fast_step(job.args):
        return
    a = argparse.Namespace(**vars(job.args) | {"dtype": "float32"})
    raw = job.dump.batch(0, a.batch_size, a.seed)[:256].float()  # [256, D]
    mean = raw.mean(0)  # [D]
    norm = (raw - mean).norm(dim=1).mean().clamp(min=1e-30)
    trainer = Trainer(a, mean, norm.item(), device)
    x = (raw.to(device) - trainer.mean) * trainer.scale  # [256, D], trained units
    trainer.step_count = 1
    trainer.idle[::2] = a.dead_tokens + 1
    if trainer.architecture.begin:
        trainer.architecture.begin(x, trainer.sae, trainer.now())
    plain = plain_gradients(x, trainer.sae, trainer.now()).by_name
    fast = trainer.take_gradients(x, trainer.sae, trainer.now()).by_name
    for name in sorted(plain.keys() - {"b_dec"}):  # which is no latent's
        by_forward = plain[name].view(len(plain[name]), -1)  # [F, D] or [F, 1]
        by_hand = fast[name].view_as(by_forward)
        gap = (by_hand - by_forward).norm(dim=1)  # [F]
        size = torch.maximum(by_hand.norm(dim=1), by_forward.norm(dim=1))
        rounding = 1e-6 * size.max()  # where what is summed cancels, nothing else is left
        wrong = (gap > 1e-3 * size + rounding)[size > 0].float().mean()
        if wrong > 0.05:
            fact = f"its fast step gives {wrong:.0%} of the latents another gradient of {name}"
            advice = "change both alike, or train with --plain"
            raise HandoffError(f"--arch {a.arch}: {fact} than its forward; {advice}")


def announce_cost(jobs: list[Job], device: torch.device) -> None:
    """Prints sizes and cost, measured on steps that leave no trace, and sets the number of threads;
    refuses to start if the disk is too small."""
    a, dump = jobs[0].args, jobs[0].dump
    architecture = ARCHITECTURES[a.arch]
    n_saes = len(jobs)
    d_in = dump.array.shape[1]
    n_latents = a.expansion * d_in
    trainer = Trainer(a, torch.zeros(d_in), math.sqrt(d_in), device, a.plain)
    seconds = choose_threads(lambda: trainer.step(dump.batch(0, a.batch_size, a.seed)), a.threads)
    n_steps, time_left = time_of(jobs, seconds)
    weights = 8 * n_latents * d_in  # bytes of W_enc and W_dec
    copies = 3 + 1  # the training state with both moments of Adam; the export
    if architecture.twins:
        copies += 2
    need_disk(a.save_dir, weights * (copies * n_saes + 3))  # a file is written beside the old one

    what = f"{n_saes} SAE{'s' * (n_saes > 1)} ({a.arch}, of a {a.unit})"
    n_nulls = sum(job.args.null != "" for job in jobs)
    if n_nulls:
        what += f", {n_nulls} of them nulls"
    where = f"on {device} in {a.dtype}, preset {a.preset}"
    print(f"{what}: D = {d_in}, F = {n_latents}, {where}")
    tokens = f"{a.tokens:,} tokens in {a.steps} steps each, {n_steps:,} steps in all"
    tokens += f", about {duration(time_left)}"
    if a.resume:
        tokens += " less what is done"
    if a.finish_kl:
        tokens += f" and the time of {a.finish_kl:,} more tokens each through the model"
    disk = f"{weights * copies * n_saes / 1e9:.2f} GB in {a.save_dir}"
    memory = f"about {memory_of(jobs, weights, device) / 1e9:.1f} GB of memory"
    print(f"cost: {tokens}; {disk}, {memory}", flush=True)
    firing = len(dump.mixture(FIRING_TOKENS)) * dump.seq_len
    print(f"{held_out_of(dump)}; latents are counted on {firing:,} tokens of all")
    if architecture.saelens is None:
        print(f"SAELens has no class for {a.arch}: its folders load with train_sae.load_sae only")


def time_of(jobs: list[Job], step_seconds: float) -> tuple[int, float]:
    """Steps of all processes, and seconds of the one that has most to do."""
    groups = groups_of(jobs)
    world = rank_and_world()[1]
    each = [work_of(groups[rank::world]) for rank in range(world)]
    # Measuring an SAE takes about as long as training it on as many tokens
    batch = jobs[0].args.batch_size
    seconds = step_seconds * max(work.steps + work.n_measured / batch for work in each)
    normal = [job.dump for job in jobs if isinstance(job.dump, GaussianDump)]
    if normal:
        some = np.arange(min(16 * BLOCK, normal[0].n_train))
        row_seconds = seconds_of(lambda: normal[0].training_rows(some)) / len(some)
        seconds += row_seconds * max(work.n_drawn for work in each)
    return sum(work.steps for work in each), seconds


def memory_of(jobs: list[Job], weights: int, device: torch.device) -> int:
    """Bytes, about, that the SAEs of a group take together; weights: bytes of those of one."""
    a, dump = jobs[0].args, jobs[0].dump
    d_in = dump.array.shape[1]
    n_held = max(len(group) for group in groups_of(jobs))  # trainers
    n_busy = 1  # at once
    if device.type == "cpu":
        n_busy = min(n_held, torch.get_num_threads())
    pool = 2 * dump.array.itemsize * d_in * min(POOL, dump.n_train)
    # of pre [N, F] and what has its shape; autograd keeps more of them
    entry = ARCHITECTURES[a.arch].memory if takes_fast_step(a) else 32
    return 8 * weights * n_held + pool + n_busy * entry * a.batch_size * a.expansion * d_in


class Work(NamedTuple):
    """What a process has to do."""

    steps: int  # of all its SAEs
    n_measured: int  # tokens that they encode when they are finished
    n_drawn: int  # normal rows


def work_of(groups: list[list[Job]]) -> Work:
    """Of all SAEs in these groups, nulls too, from their first step."""
    steps = n_measured = n_drawn = 0
    for group in groups:
        a, dump = group[0].args, group[0].dump
        held_out = len(dump.evaluation(a.eval_tokens)) * dump.seq_len
        counted = len(dump.mixture(FIRING_TOKENS)) * dump.seq_len
        steps += sum(job.args.steps for job in group)
        # as many of the training as of held-out documents
        n_measured += (2 * held_out + counted) * len(group)
        if isinstance(dump, GaussianDump):
            n_drawn += len(dump.array) + 256 * BLOCK  # for the moments
            layout = dump.layout(a.batch_size)
            n_pools = math.ceil(a.steps / layout.batches_per_pool)
            n_drawn += n_pools * layout.n_blocks // layout.n_pools * layout.block
            # of both kinds of documents once for the mean, once for what the SAE makes of them
            n_drawn += (4 * held_out + counted) * len(group)
    return Work(steps, n_measured, n_drawn)


def held_out_of(dump: Dump) -> str:
    """Which text is held out, in words."""
    documents = len(np.unique(dump.documents[dump.held_out]))
    share = len(dump.held_out) / len(dump.documents)
    beside = len(dump.documents) - len(dump.held_out) - len(dump.trained)
    windows = f"{len(dump.held_out):,} windows ({share:.1%}) of {documents:,} documents"
    text = f"the {dump.side.get('split')} split"
    return f"held out: {windows} of {text}, and {beside:,} windows that share one are not used"


# ---- the SAEs of a dump
def groups_of(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that are trained on the same batches, and so together."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault((id(job.dump), job.args.seed), []).append(job)
    return list(groups.values())


def train_group(
    group: list[Job], device: torch.device, stop: list[int], cores: int
) -> list[Trainer | None]:
    """Trains the SAEs of a group, or goes on with them -> a trainer each, None where it is finished
    already. A signal (in `stop`) ends it after the step."""
    a, dump = group[0].args, group[0].dump
    trainers = [begin(job, device) for job in group]
    busy = [(job, trainer) for job, trainer in zip(group, trainers, strict=True) if trainer]
    for _, trainer in busy:
        trainer.threads = torch.get_num_threads()
    done = min((trainer.step_count for _, trainer in busy), default=a.steps)
    folder = group[0].folder
    name = "/".join(folder.parts[-3:]) + (f" and {len(busy) - 1} more" if len(busy) > 1 else "")
    steps = range(done, a.steps)
    with side_by_side(len(group), device, cores) as pool:
        for step in tqdm(steps, name, initial=done, total=a.steps, unit="step", disable=None):
            raw = dump.batch(step, a.batch_size, a.seed)
            # not those that were stopped later than the others
            behind = [trainer for _, trainer in busy if trainer.step_count == step]
            list(pool.map(functools.partial(Trainer.step, raw=raw), behind))
            is_saved = (step + 1) % a.save_interval == 0 or step + 1 == a.steps
            if stop or is_saved:
                for job, trainer in busy:
                    save_sae(job, trainer)
            if stop:
                break
    return trainers


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Afterwards torch has as many threads as before."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@contextlib.contextmanager
def side_by_side(n: int, device: torch.device, cores: int) -> Iterator[ThreadPoolExecutor]:
    """Workers for the n SAEs of a group, finished ones too, which divide the threads of torch among
    them: an SAE on one thread waits for nobody. As many as there are `cores`, also where one SAE
    alone would be no faster on more than one thread. Where the threads of an SAE decide
    how sums round, as with --plain, the cores do not."""
    n_threads = torch.get_num_threads()
    n_workers = min(n, max(cores, n_threads)) if device.type == "cpu" else 1
    with threads_kept(), ThreadPoolExecutor(n_workers) as pool:
        torch.set_num_threads(n_threads // min(n, n_threads))
        yield pool


def begin(job: Job, device: torch.device) -> Trainer | None:
    """A new trainer, or as training_state.pt left it; None if the SAE is finished."""
    a, folder = job.args, job.folder
    trainer = resume_sae(job, device) if a.resume else None
    if trainer is None:
        found = job.dump.moments()
        axes = found.leading_axes(a.start_variance)
        trainer = Trainer(a, found.mean, found.norm, device, a.plain, axes)
    if trainer.step_count >= a.steps and sidecar_path(folder / WEIGHTS).exists():
        print(f"{folder} is finished; there is nothing to resume")
        return None
    if a.tensorboard:
        module = import_module("torch.utils.tensorboard")
        trainer.board = module.SummaryWriter(str(folder / "tensorboard"))
    return trainer


def save_sae(job: Job, trainer: Trainer) -> None:
    """Training state, folded export and its cfg.json, training.csv."""
    mark_unfinished(job.folder)
    with atomic(job.folder / "training_state.pt") as temporary:
        temporary.write_bytes(torch_bytes(training_state(job, trainer)))
    save_export(job, trainer)


def mark_unfinished(folder: Path) -> None:
    """Removes the sidecar, and what is made of the weights when they are finished."""
    for old in (f"{WEIGHTS}.json", "latent_stability.csv", *TWINS):
        (folder / old).unlink(missing_ok=True)


def save_export(job: Job, trainer: Trainer) -> None:
    """All of this but the training state."""
    folder = job.folder
    mark_unfinished(folder)
    weights = trainer.weights(trainer.scale, trainer.mean)
    export = {name: weight.cpu() for name, weight in weights.items()}
    files = {WEIGHTS: safetensors.torch.save(export)}
    cfg = saelens_config(job, trainer)
    twins = trainer.architecture.twins
    if twins:
        made = twins(export, job.args)
        cfg |= made.cfg
        files |= made.files
    for name, content in files.items():
        with atomic(folder / name) as temporary:
            temporary.write_bytes(content)
    write_json(folder / "cfg.json", cfg | {"metadata": saelens_metadata(job, trainer)})
    write_csv(folder / "training.csv", pd.DataFrame(trainer.history))


def torch_bytes(record: dict[str, Any]) -> bytes:
    """What torch.save would write."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    return buffer.getvalue()


def training_state(job: Job, trainer: Trainer) -> dict[str, Any]:
    """All that resume_sae needs; weights in trained units."""
    return {
        "schema": SAE_SCHEMA,
        "trajectory": job.trajectory,
        "step": trainer.step_count,
        "history": trainer.history,
        "scale": trainer.scale,
        "mean": trainer.mean,
        "params": trainer.params,
        "idle": trainer.idle,
        "tau": trainer.cut,
        "optimizer": trainer.optimizer.state_dict(),
        "threads": trainer.threads,
    }


def saelens_config(job: Job, trainer: Trainer) -> dict[str, Any]:
    """cfg.json of an export, but for its metadata."""
    known_as = trainer.architecture.saelens
    cfg: dict[str, Any] = {
        "architecture": known_as or OWN + job.args.arch,
        "d_in": len(trainer.mean),
        "d_sae": len(trainer.sae.b_enc),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if known_as is None:  # load_sae runs the forward, which looks at them
        cfg["arguments"] = job.trajectory | {"steps": job.args.steps}
    return cfg


def saelens_metadata(job: Job, trainer: Trainer) -> dict[str, Any]:
    """Where an SAE belongs, for SAELens."""
    a, dump = job.args, job.dump
    hook = "attn.hook_z" if dump.site == "z" else f"hook_{dump.site}"
    return {
        # without a version, SAELens takes the file for an old one and drops the metadata
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "hook_name": f"blocks.{dump.layer}.{hook}",
        "model_name": f"janus/{dump.run}",
        "hook_head_index": dump.head,
        "context_size": dump.seq_len,
        "prepend_bos": dump.side.get("bos") is not None,
        "dataset_path": dump.side.get("dataset"),
        "training_architecture": a.arch,
        "training_tokens": trainer.step_count * a.batch_size,
    }


def resume_sae(job: Job, device: torch.device) -> Trainer | None:
    """The trainer as training_state.pt left it; None if there is none. HandoffError if --resume
    would change the trajectory."""
    path = job.folder / "training_state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer = Trainer(job.args, state["mean"], 1.0, device, job.args.plain)
        change = first_change(job, state["trajectory"])
        if not change:
            restore(trainer, state)
            if job.args.threads is None and "threads" in state:
                # as many as before, for this group: with others, sums round differently
                torch.set_num_threads(state["threads"])
    except Exception as e:  # torch raises many types for a damaged file
        fact = f"{path} cannot be read ({str(e).strip()[:100]})"
        raise HandoffError(f"{fact}; train anew with --overwrite") from None
    if change:
        fact = f"--resume would change {change}"
        raise HandoffError(f"{fact}; use the same arguments")
    return trainer


def first_change(job: Job, then: dict[str, Any]) -> str:
    """The first argument that is not what it was then, in words; empty if there is none. An
    argument that an older checkpoint does not know had its default."""
    defaults = parse_args([])
    defaults.preset = job.args.preset
    default = Job(fill_in(defaults, job.dump), job.dump, job.folder).trajectory
    default["held_out"] = "the last windows"
    default["start_variance"] = 1.0  # latents started in any direction
    wanted = job.trajectory
    for name in {**wanted, **then}:
        if name in MAY_DIFFER:  # an older version kept it
            continue
        was = then[name] if name in then else default.get(name)
        if was != wanted.get(name):
            return f"{name} of {job.folder} from {was} to {wanted.get(name)}"
    return ""


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Puts what training_state saved into a new trainer."""
    for weight, saved in zip(trainer.params, state["params"], strict=True):
        weight.copy_(saved)
    trainer.idle.copy_(state["idle"])
    trainer.cut.copy_(state["tau"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scale = state["scale"]
    trainer.step_count = state["step"]
    trainer.history = state["history"]


def finish_group(
    group: list[Job],
    trainers: list[Trainer | None],
    origin: Origin | None,
    stop: list[int],
    cores: int,
) -> Iterator[str]:
    """Reads each export back, compares it with what was trained, measures it, writes the sidecar ->
    a line each for the user; none if a signal (in `stop`) ended a finish, which --resume begins
    anew."""
    trained = [(job, t) for job, t in zip(group, trainers, strict=True) if t]
    if not trained:
        return
    dump = trained[0][0].dump
    if isinstance(dump, GaussianDump):  # whose rows are no model's
        origin = None
    before = finish_with_model(trained, origin, stop)
    if stop:
        return
    losses = losses_now(trained, origin)
    with side_by_side(len(group), trained[0][1].mean.device, cores) as pool:
        measured = list(pool.map(measure_sae, *zip(*trained, strict=True)))
    for i, ((job, trainer), metrics) in enumerate(zip(trained, measured, strict=True)):
        documents = dump.documents[few_windows(job)]
        if losses:
            metrics |= ce_recovered(losses, f"sae{i}", documents)
        if before:
            metrics |= finish_gain(before, losses, f"sae{i}", documents)
        facts = names_of(job) | facts_of(job, trainer)
        inputs = [dump.path, dump.path.with_name("documents.npy")]
        write_sidecar(job.folder / WEIGHTS, SAE_SCHEMA, inputs, **facts, metrics=metrics)
        yield summary(job, metrics)


Trained = tuple[Job, Trainer]


def finish_with_model(
    trained: list[Trained], origin: Origin | None, stop: list[int]
) -> dict[str, EditedLoss]:
    """The steps of --finish_kl -> the losses from before them, or {} where there are none."""
    if origin is None or not trained[0][0].args.finish_kl:
        return {}
    for job, trainer in trained:
        save_export(job, trainer)  # a finish that was interrupted left its own
    before = losses_now(trained, origin)
    for job, trainer in trained:
        finish_on_kl(trainer, job.dump, origin, stop)
        if stop:
            break
        save_export(job, trainer)  # beside the state from before, to begin again with
    return before


def losses_now(trained: list[Trained], origin: Origin | None) -> dict[str, EditedLoss]:
    """What the model makes of held-out windows with the exported SAEs in it; {} without a model."""
    if origin is None:
        return {}
    first, trainer = trained[0]
    saes = [load_sae(job.folder, trainer.mean.device) for job, _ in trained]
    where = (first.dump, origin.tokens, trainer.mean, few_windows(first))
    return losses_with(origin.model, saes, *where)


def few_windows(job: Job) -> np.ndarray:
    """Held-out windows on which the model runs, which takes longer than an SAE does."""
    return job.dump.evaluation(job.args.eval_tokens // 6)


def measure_sae(job: Job, trainer: Trainer) -> dict[str, Any]:
    """What an exported SAE makes of held-out rows and how often its latents fire, without the
    model. Writes errors.csv and latent_frequencies.csv. HandoffError if the export is not what was
    trained."""
    sae = load_sae(job.folder, trainer.mean.device)
    chosen = job.dump.evaluation(job.args.eval_tokens)
    check_export(job, trainer, sae, next(job.dump.windows(chosen)))
    metrics, errors = evaluate(sae, job.dump, chosen)
    write_csv(job.folder / "errors.csv", errors)
    # Far below that of held-out documents: it knows its own by heart
    seen = job.dump.trained
    seen = seen[np.arange(len(chosen)) * len(seen) // len(chosen)]
    metrics["fvu_train"] = evaluate(sae, job.dump, seen)[0]["fvu"]
    return metrics | count_firings_of(job, trainer, sae)


def finish_gain(
    before: dict[str, EditedLoss], after: dict[str, EditedLoss], sae: str, documents: np.ndarray
) -> dict[str, float]:
    """What --finish_kl changed: the KL that is left of what it was, and by how much more of the
    loss is recovered, against mean ablation."""
    was, now = before[sae], after[sae]
    won = np.array(was.ce) - np.array(now.ce)  # [W]
    lost = np.array(after["mean"].ce) - np.array(after["clean"].ce)
    metrics = ratio_interval("finish_kl_left", np.array(now.kl), np.array(was.kl), documents)
    found = ratio_interval("finish_ce_recovered", won, lost, documents)
    return metrics | (found if lost.sum() > 0 else dict.fromkeys(found, math.nan))


def names_of(job: Job) -> dict[str, Any]:
    """Which SAE it is, in the columns that all tables have."""
    a, dump = job.args, job.dump
    return {
        "run": dump.run,
        "unit": a.unit,
        "arch": a.arch,
        "site": dump.site,
        "layer": dump.layer,
        "head": dump.head,
        "null": a.null,
    }


def count_firings_of(job: Job, trainer: Trainer, sae: SparseAutoencoder) -> dict[str, Any]:
    """How often its latents fire, on windows of all documents -> latent_frequencies.csv, and the
    shares that are dead."""
    dump = job.dump
    everywhere = dump.mixture(FIRING_TOKENS)
    fired = count_on_windows(sae, dump, everywhere)  # [F]
    n_rows = len(everywhere) * dump.seq_len
    latents = {
        "latent": np.arange(len(fired)),
        "n_fired": fired,
        "n_rows": n_rows,
        "frequency": fired / n_rows,
    }
    frame = pd.DataFrame(names_of(job) | latents)
    write_csv(job.folder / "latent_frequencies.csv", frame)
    return {
        "dead_share": float((fired == 0).mean()),
        "dead_share_tokens": n_rows,
        "dead_share_window": trainer.history[-1]["dead_share"],
    }


@torch.no_grad()
def check_export(job: Job, trainer: Trainer, sae: SparseAutoencoder, rows: Tensor) -> None:
    """HandoffError if the export makes of raw rows [n, D] anything but what the trained weights do,
    and the forward that they were trained with."""
    raw = rows.to(trainer.mean.device)
    x = (raw - trainer.mean) * trainer.scale  # [n, D], trained units
    found = (sae.decode(sae.encode(raw)) - trainer.mean) * trainer.scale  # [n, D]
    trained = SparseAutoencoder(sae.cfg, trainer.weights())
    expected = {"the SAE trained": trained.decode(trained.encode(x))}
    output = trainer.architecture.forward(x, trainer.sae, trainer.now())
    if output.cut is None:  # a cut of these rows together is not the average of the training
        own = f"the forward of --arch {job.args.arch} (is its `saelens` another function?)"
        expected[own] = output.reconstruction
    for what, reconstruction in expected.items():
        wrong = (reconstruction - found).norm(dim=1) > 1e-3 * x.norm(dim=1)  # [n]
        # within rounding of a threshold a latent may fall on either side
        if not wrong.float().mean() <= 0.01:
            fact = f"{int(wrong.sum())} of {len(x)} rows come out of the export unlike {what}"
            raise HandoffError(f"{job.folder} is not finished: {fact}")


def facts_of(job: Job, trainer: Trainer) -> dict[str, Any]:
    """What the sidecar says of an SAE beside its names and metrics."""
    a, dump = job.args, job.dump
    inherited = ["checkpoint", "checkpoint_sha256", "arm", "seq_len", "n_heads", "d_head"]
    inherited += ["tokenizer_hash", "dataset", "split", "windows", "bos", "step", "initial"]
    facts = {key: dump.side.get(key) for key in inherited}
    mean = np.asarray(dump.side["mean"], float)[dump.columns]  # [D]
    variance = np.asarray(dump.side["variance"], float)[dump.columns]
    flag = trainer.architecture.l0_flag
    facts |= {
        "gamma": np.linalg.norm(mean) / math.sqrt(variance.sum()),
        "scale": trainer.scale,
        "k": getattr(a, flag) if flag else None,
        "d_in": len(mean),
        "d_sae": len(trainer.sae.b_enc),
        "steps": a.steps,
        "tokens": a.tokens,
        "seed": a.seed,
        "preset": a.preset,
        "n_train": dump.n_train,
        "held_out_documents": np.unique(dump.documents[dump.held_out]).tolist(),
        "trajectory": job.trajectory,
        "latent_frequencies": "latent_frequencies.csv",
    }
    return facts


def summary(job: Job, metrics: dict[str, Any]) -> str:
    """One line for the user."""
    m = metrics
    fvu = f"FVU {m['fvu']:.3f}"
    if not math.isnan(m["fvu_lo"]):
        fvu += f" [{m['fvu_lo']:.3f}, {m['fvu_hi']:.3f}]"
    text = f"{m['n_documents']} held-out documents of the {job.dump.side.get('split')} split"
    line = f"{job.folder}: L0 {m['l0']:.1f}, {fvu} on {text}"
    line += f", never fired {m['dead_share']:.1%} on {m['dead_share_tokens']:,} tokens of all"
    if "kl_sae" not in m:
        return line
    recovered = []
    for base in ("zero", "mean"):
        share = m[f"ce_recovered_{base}"]
        recovered.append(f"{'none to recover' if math.isnan(share) else f'{share:.1%}'} ({base})")
    line += f", CE recovered {', '.join(recovered)}, KL {m['kl_sae']:.2g} nats"
    if not m["ce_informative"]:
        line += f"; mean ablation costs under {CE_GAP} nats, so CE recovered says little"
    return line


# ---- all of them
def collect_metrics(save_dir: Path) -> None:
    """sae_metrics.csv, a row for every finished SAE under save_dir; and the tables of nulls and of
    seeds, where there are any."""
    frame = latest(read_saes(save_dir)).sort_values([*GROUP, "head", "null"])
    frame.loc[is_untrained(frame), "null"] = "untrained"
    nulls = frame[frame["null"] != ""]
    frame = add_gains(frame[frame["null"] == ""], nulls, save_dir)
    tables = {
        "sae_metrics.csv": frame.drop(columns=["null", *SAME]),
        "sae_nulls.csv": nulls.drop(columns=SAME),
        "seed_stability.csv": stability_over_seeds(save_dir, frame),
        "sae_gains.csv": gains_over_seeds(save_dir, frame, nulls),
    }
    folders = [*frame["folder"], *nulls["folder"]]
    sidecars = [save_dir / folder / f"{WEIGHTS}.json" for folder in folders]
    for name, table in tables.items():
        if len(table):
            write_csv(save_dir / name, table)
            write_sidecar(save_dir / name, "janus.sae_metrics/1", sidecars)
        else:  # what is there is of SAEs that are gone
            (save_dir / name).unlink(missing_ok=True)
            sidecar_path(save_dir / name).unlink(missing_ok=True)


def read_saes(save_dir: Path) -> pd.DataFrame:
    """A row for every finished SAE under save_dir, out of its sidecar, nulls too. HandoffError if
    there is none."""
    columns = ["run", "unit", "arch", "site", "layer", "head", "arm", "split", "seed", "k", "d_in"]
    columns += ["d_sae", "steps", "tokens", "gamma", "n_train"]
    rows = []
    remedy = "python train_sae.py --overwrite"
    for side in sorted(save_dir.glob(f"*/L*/**/{WEIGHTS}.json")):
        with contextlib.suppress(HandoffError):  # another process is just replacing it
            record = read_sidecar(side.with_suffix(""), SAE_SCHEMA, remedy)
            if "held_out_documents" not in record:
                fact = f"{side.parent} is left out of the tables: it held out the last windows"
                print(f"{fact} of its dump, not documents; train it anew with --overwrite")
                continue
            row = {column: record[column] for column in columns}
            l1 = record["trajectory"].get("l1", math.nan)
            row["setting"] = setting_of(record["arch"], record["k"], l1)
            row["null"] = record.get("null", "")
            row["step"], row["initial"] = record.get("step"), record.get("initial")
            row["dump"], row["settings"] = record["trajectory"].get("dump"), settings_of(record)
            row["recipe"] = recipe_of(record)
            row["time"] = record["producer"]["time"]
            row["folder"] = side.parent.relative_to(save_dir).as_posix()
            rows.append(row | record["metrics"])
    if not rows:
        raise HandoffError(f"{save_dir} has no SAE to report; make one with: {remedy}")
    frame = pd.DataFrame(rows)
    for column in ("ce_recovered_zero", "ce_recovered_mean", "kl_sae"):
        if column not in frame:  # no model was there
            frame[column] = math.nan
    return frame


# Columns of the table while it is made: SAEs that are equal in both differ in seed or null at most
SAME = ["dump", "settings"]


def settings_of(record: dict[str, Any], *others: str) -> str:
    """All settings of a sidecar that decide the weights, but for the seed, which null it is, and
    `others`."""
    settings = {"finish_kl": 0, "steps": record["steps"]} | record["trajectory"]
    # An older version may have kept more
    for name in ("seed", "null", "dump", *MAY_DIFFER, *others):
        settings.pop(name, None)
    return json.dumps(settings, sort_keys=True)


def recipe_of(record: dict[str, Any]) -> str:
    """A name of all settings that decide the weights but unit, architecture, site, head, seed and
    the one that decides how many latents fire: SAEs that may share a curve have the same."""
    varied = [argument for argument, _ in VARIED.values()]
    text = settings_of(record, *varied, "head", "arch", "unit", "site")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"r{digest[:6]}"  # digits alone, or 12e34567, a CSV reader would take for a number


def setting_of(arch: str, k: float | None, l1: float = math.nan) -> str:
    """What decides how many latents of an SAE fire, and its value if that is known: "k 16". Where
    there is no k, --l1 does."""
    known = ARCHITECTURES.get(arch)
    flag = (known.l0_flag if known else None) or ("l1" if k is None else "k")
    value = l1 if k is None else k
    return flag if math.isnan(value) else f"{flag} {value:.15g}"


def is_untrained(frame: pd.DataFrame) -> pd.Series:
    """Which SAEs are of a run that others began with, and so their null; not the nulls of these."""
    begun = frame.loc[(frame["step"] != 0) & frame["initial"].notna(), "initial"]
    return (frame["step"] == 0) & frame["initial"].isin(begun) & (frame["null"] == "")


def latest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of SAEs with the same names in all columns, as --k 16 and --k 16 32 make them in two folders,
    the one that was finished last; without the column time."""
    names = [*GROUP, "head", "null"]
    is_older = frame.sort_values("time", kind="stable").duplicated(names, keep="last")
    for folder in frame.loc[is_older.sort_index(), "folder"]:
        fact = "one of the same names was finished later in another folder"
        print(f"{folder} is left out of the tables: {fact}")
    return frame[~is_older.sort_index()].drop(columns="time")


def add_gains(frame: pd.DataFrame, nulls: pd.DataFrame, save_dir: Path) -> pd.DataFrame:
    """Adds the gain of every SAE over each of its nulls, as columns gain_<null>, _lo and _hi."""
    frame = frame.copy()
    for pair in pairs_with_nulls(save_dir, frame, nulls):
        value, low, high = gain(pair.trained, pair.null)
        name = f"gain_{pair.name}"
        frame.loc[pair.index, [name, f"{name}_lo", f"{name}_hi"]] = value, low, high
    return frame


class Pair(NamedTuple):
    """An SAE and one of its nulls."""

    index: Any  # of the SAE, in the table
    name: str  # of the null
    trained: pd.DataFrame  # errors.csv of the SAE
    null: pd.DataFrame  # and of the null


def pairs_with_nulls(save_dir: Path, frame: pd.DataFrame, nulls: pd.DataFrame) -> Iterator[Pair]:
    """Every SAE of `frame` with each of its nulls: trained with the same settings and, but for the
    untrained model, on the same dump."""
    like = ["unit", "arch", "setting", "seed", "site", "layer", "head"]
    like += ["d_sae", "steps", "settings"]
    found = set()
    for _, null in nulls.iterrows():
        # the untrained model is a run of its own
        own = ["initial"] if null["null"] == "untrained" else ["run", "dump"]
        same = [*like, *own]
        is_its = (frame[same] == null[same]) | (frame[same].isna() & null[same].isna())
        for index in frame.index[is_its.all(axis=1)]:
            folder = save_dir / frame.loc[index, "folder"]
            if not (folder / "errors.csv").exists():  # of an older version
                continue
            if (index, null["null"]) in found:  # the untrained model under a second name
                continue
            found.add((index, null["null"]))
            errors = read_errors(folder), read_errors(save_dir / null["folder"])
            yield Pair(index, null["null"], *errors)


def gain(trained: pd.DataFrame, null: pd.DataFrame) -> tuple[float, float, float]:
    """1 - FVU / FVU of a null, from the errors.csv of both, and its 95 % interval over documents:
    NaN below 16 of them, or where they are not the same. It is about these two trainings: for
    others, see `gain_over_trainings`.

    Of the logarithm of the ratio, linearised document by document, so that what makes a document
    easy for both cancels; as far as bootstrap-t or Student's t reaches, whichever is further.
    """
    value = 1 - fvu_of(trained) / fvu_of(null)
    n = len(trained)
    if n < LEAST_DOCUMENTS or list(trained["document"]) != list(null["document"]):
        return value, math.nan, math.nan
    pull = pull_of_documents(trained, null)
    error = math.sqrt(n / (n - 1) * (pull**2).sum())
    t_low, t_high = np.quantile(bootstrap_t(pull), [0.025, 0.975], method="nearest")
    student = stats.t.ppf(0.975, n - 1)
    low = 1 - (1 - value) * math.exp(-min(t_low, -student) * error)
    high = 1 - (1 - value) * math.exp(-max(t_high, student) * error)
    return value, low, high


def pull_of_documents(trained: pd.DataFrame, null: pd.DataFrame) -> np.ndarray:
    """By how much each document [n] moves log(FVU / FVU of the null), to first order."""
    pull = share_of_sum(trained["error"]) - share_of_sum(trained["variance"])
    pull = pull - share_of_sum(null["error"]) + share_of_sum(null["variance"])
    return pull.to_numpy()


def gains_over_seeds(save_dir: Path, frame: pd.DataFrame, nulls: pd.DataFrame) -> pd.DataFrame:
    """A row for every null of SAEs of `frame` that differ in their seed alone: their mean gain,
    with an interval that counts trainings and documents."""
    same = [*[name for name in GROUP if name != "seed"], "head"]
    pairs = list(pairs_with_nulls(save_dir, frame, nulls))
    rows = []
    for key, saes in frame.groupby([*same, *SAME], dropna=False):
        for name in dict.fromkeys(pair.name for pair in pairs):
            its = [pair for pair in pairs if pair.name == name and pair.index in saes.index]
            if len(its) < 2:
                continue
            row = dict(zip(same, key, strict=False)) | {"null": name, "n_seeds": len(its)}
            rows.append(row | gain_over_trainings(its))
    return pd.DataFrame(rows)


def gain_over_trainings(pairs: list[Pair]) -> dict[str, float]:
    """1 - FVU / FVU of a null, of several trainings of both on the same data: the geometric mean of
    the ratios, its 95 % interval for other trainings and other documents, and `smallest`, the gain
    that would just be told from 0. NaN as in `gain`."""
    logs = [math.log(fvu_of(pair.trained) / fvu_of(pair.null)) for pair in pairs]
    mean = float(np.mean(logs))
    documents = [list(errors["document"]) for pair in pairs for errors in pair[2:]]
    half = math.nan
    if len(documents[0]) >= LEAST_DOCUMENTS and all(d == documents[0] for d in documents):
        pulls = [pull_of_documents(pair.trained, pair.null) for pair in pairs]
        half = float(half_width(np.array(logs), np.array(pulls)))
    return {
        "gain": 1 - math.exp(mean),
        "gain_lo": 1 - math.exp(mean + half),
        "gain_hi": 1 - math.exp(mean - half),
        "smallest": 1 - math.exp(-half),
    }


def half_width(logs: np.ndarray, pulls: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval [...] of the mean of g = log(FVU / FVU of a null), from its values
    [..., S] in S trainings and from what each of n documents pulls them by [..., S, n]
    (`pull_of_documents`).

    half^2 = t(S - 1)^2 V_trainings + t(n - 1)^2 V_documents, where t(m) is the .975 quantile of
    Student's t with m degrees of freedom and
    V_trainings = var(g) / S, over the trainings;
    V_documents = n / (n - 1) sum(mean pull^2) - n / (n - 1) sum(var(pull)) / S, not below 0: what
    documents pull all trainings by alike. What they pull single ones by is in var(g) already.

    One t for the sum of both, with Satterthwaite's degrees of freedom, holds the truth in 88 to
    95 % for S = 2 or 3: V_trainings is then too uncertain to weigh the two by. This holds it in 93
    to 98 %.
    """
    n_trainings, n = pulls.shape[-2:]
    over_trainings = logs.var(-1, ddof=1) / n_trainings  # [...]
    of_mean = n / (n - 1) * (pulls.mean(-2) ** 2).sum(-1)
    of_single = n / (n - 1) * pulls.var(-2, ddof=1).sum(-1) / n_trainings
    over_documents = np.maximum(0, of_mean - of_single)
    half_trainings = stats.t.ppf(0.975, n_trainings - 1) * np.sqrt(over_trainings)
    half_documents = stats.t.ppf(0.975, n - 1) * np.sqrt(over_documents)
    return np.hypot(half_trainings, half_documents)


def fvu_of(errors: pd.DataFrame) -> float:
    return errors["error"].sum() / errors["variance"].sum()


def share_of_sum(values: pd.Series) -> pd.Series:
    return values / values.sum()


def read_errors(folder: Path) -> pd.DataFrame:
    """Squared error and distance from the mean of each held-out document."""
    return read_csv(folder / "errors.csv", ["document", "error", "variance"])


# ---- the same latents again, from another seed?
def stability_over_seeds(save_dir: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for every two SAEs of `frame` that differ in their seed alone; writes
    latent_stability.csv beside each, and removes every other one: it is of seeds that are gone."""
    stale = set(save_dir.glob("*/L*/**/latent_stability.csv"))
    rows = []
    same = [*[name for name in GROUP if name != "seed"], "head"]
    for key, saes in frame.groupby([*same, *SAME], dropna=False):
        if len(saes) < 2:
            continue
        live = {row.seed: live_directions(save_dir / row.folder) for row in saes.itertuples()}
        cosines: dict[int, list[pd.Series]] = {seed: [] for seed in live}
        for a, b in itertools.combinations(live, 2):
            cosine, of_a, of_b = match(live[a].directions, live[b].directions)
            cosines[a].append(pd.Series(cosine, live[a].latents[of_a]))
            cosines[b].append(pd.Series(cosine, live[b].latents[of_b]))
            # Of many latents the mean hardly varies, and a draw takes a minute
            n_draws = 5 if len(cosine) < 4096 else 2
            both = live[a].directions, live[b].directions
            # The larger: of all heads together it forgets which latents are of one head alone
            parts = {1, live[a].n_heads}
            draws = [matched_by_chance(*both, a, n_draws, n_parts) for n_parts in parts]
            chance = max(draws, key=np.mean)
            row = dict(zip(same, key, strict=False))
            row |= {"seed": a, "other_seed": b, "n_matched": len(cosine)}
            row |= {"pw_mcc": cosine.mean(), "pw_mcc_null": chance.mean()}
            rows.append(row | {"null_sd": chance.std(ddof=1)})
        for sae in saes.itertuples():
            mean = pd.concat(cosines[sae.seed], axis=1).mean(axis=1).sort_index()
            table = mean.rename("stability").rename_axis("latent").reset_index()
            path = save_dir / sae.folder / "latent_stability.csv"
            write_csv(path, table)
            stale.discard(path)
    for path in stale:
        path.unlink()
    return pd.DataFrame(rows)


class Live(NamedTuple):
    """The latents of an SAE that fire at all."""

    latents: np.ndarray  # [n], their numbers
    directions: np.ndarray  # [n, D], what they write, of norm 1
    n_heads: int  # that D is the outputs of, side by side


def live_directions(folder: Path) -> Live:
    fires_often = read_frequencies(folder)["frequency"].to_numpy() > 0  # [F]
    w_dec = load_sae(folder).weights["W_dec"].numpy()  # [F, D]
    w_dec = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    side = read_sidecar(folder / WEIGHTS, SAE_SCHEMA, "python train_sae.py --overwrite")
    n_heads = w_dec.shape[1] // side["d_head"] if side["site"] == "z" else 1
    return Live(np.flatnonzero(fires_often), w_dec[fires_often], n_heads)


def match(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs unit vectors a [n, D] with b [m, D] one to one, so that the sum of their cosines is the
    largest -> the cosines of the pairs [min(n, m)], and their numbers in a and in b."""
    cosines = a @ b.T  # [n, m]
    in_a, in_b = optimize.linear_sum_assignment(cosines, maximize=True)
    return cosines[in_a, in_b], in_a, in_b


def matched_by_chance(
    a: np.ndarray, b: np.ndarray, seed: int, n: int = 5, n_parts: int = 1
) -> np.ndarray:
    """Mean cosines [n] after matching what a [., D] and b [., D] would be if nothing but where the
    data lie were common to both: in the axes of their joint second moments each vector keeps its
    sizes, and gets random signs. With n_parts, axes of each part of D by itself, as of heads side
    by side: each vector also keeps how much of it lies in which part."""
    rng = np.random.default_rng(seed % 2**32)
    both = np.concatenate([a, b])
    parts = np.split(both, n_parts, axis=1)  # [., D / n_parts] each
    axes = linalg.block_diag(*[np.linalg.eigh(part.T @ part)[1] for part in parts])  # [D, D]
    means = []
    for _ in range(n):
        signed = [rows @ axes * rng.choice([-1.0, 1.0], rows.shape) for rows in (a, b)]
        means.append(match(*signed)[0].mean())
    return np.array(means)


# ---- the whole run
def products_in(args: argparse.Namespace, bfloat16: bool) -> str:
    """What a training step multiplies in; bfloat16: whether that is wanted. Autograd: float32."""
    if args.int8:
        return "int8"
    return "bfloat16" if bfloat16 and takes_fast_step(args) else "float32"


def find_origins(
    jobs: list[Job], args: argparse.Namespace, device: torch.device
) -> dict[str, Origin | None]:
    """By the name of a run."""
    given = dict(zip(args.runs or [], args.model_path or [], strict=False))
    dumps = {job.dump.run: job.dump for job in jobs}
    origins = {}
    for name, dump in dumps.items():
        origins[name] = find_origin(dump, given.get(name), args, device)
    return origins


def train_all(
    groups: list[list[Job]],
    origins: dict[str, Origin | None],
    device: torch.device,
    stop: list[int],
    cores: int,
) -> bool:
    """Trains and measures one group of SAEs after the other, as many of its SAEs at once as there
    are cores -> whether all are finished: not if a signal in `stop` ended one."""
    for group in groups:
        dump = group[0].dump
        with threads_kept():
            trainers = train_group(group, device, stop, cores)
            if stop:
                return False
            for line in finish_group(group, trainers, origins[dump.run], stop, cores):
                print(line, flush=True)
            if stop:
                return False
        dump.pool = (None, torch.empty(0))  # frees its rows
    return True


def report(save_dir: Path, no_figures: bool = False) -> None:
    """Metrics, table and figures of all that is there, or the metrics alone; runs trained side by
    side report one after the other."""
    with open(save_dir / ".lock", "w") as lock:
        wait_for_turn(lock)
        collect_metrics(save_dir)
        if no_figures:
            return
        with drawing(
            [save_dir / "sae_metrics.csv"], ["train_sae.py", "--redraw", "--save_dir", save_dir]
        ):
            draw_report(save_dir)


def wait_for_turn(lock: IO[str]) -> None:
    """Waits until no other process holds this open file; at once where the system has no such
    locks (Windows)."""
    if find_spec("fcntl") is None:
        return
    fcntl = import_module("fcntl")
    fcntl.flock(lock, fcntl.LOCK_EX)


def catch_signals() -> list[int]:
    """From now on SIGINT and SIGTERM only go into this list: a step is finished, then saved."""
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: caught.append(n))
    return caught


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 128 + the number of the signal that stopped it."""
    if args.redraw:
        draw_report(args.save_dir)
        return 0
    keep_memory()
    rank, world = rank_and_world()
    device, autocast = set_up(args)
    args.dtype = products_in(args, autocast._enabled)
    if args.int8 and device.type != "cpu":
        advice = "give --device cpu, or leave --int8 out"
        raise HandoffError(f"--int8 runs on a CPU, found {device.type}; {advice}")

    # all that can be wrong is found before anything is written
    jobs = find_jobs(args)
    if not args.resume:
        names = (WEIGHTS, "training_state.pt")
        refuse_overwrite([job.folder / n for job in jobs for n in names], args.overwrite)
    origins = find_origins(jobs, args, device)
    cores = args.threads or torch.get_num_threads()
    check_fast_step(jobs[0], device)
    announce_cost(jobs, device)

    n_stopped = torch.zeros(())  # processes
    all_sum(n_stopped)  # nobody writes before all have looked at what is there
    stop = catch_signals()
    runs = {job.dump.run for job in jobs}
    place = args.save_dir / runs.pop() if len(runs) == 1 else args.save_dir
    recording: Any = contextlib.nullcontext({}) if rank else run_record(place, args)
    with recording as record:
        record["settings"] = {str(job.folder): vars(job.args) for job in jobs}
        # several processes deal the jobs out
        mine = groups_of(jobs)[rank::world]
        n_stopped += not train_all(mine, origins, device, stop, cores)
        all_sum(n_stopped)
        if n_stopped:
            number = stop[0] if stop else int(signal.SIGTERM)  # another process was stopped
            fact = f"what is unfinished in {args.save_dir} is saved"
            print(f"signal {number}: {fact}; continue with the same command and --resume")
            record["exit_status"] = 128 + number
            return record["exit_status"]
        if rank:
            return 0
        report(args.save_dir, args.no_figures)
    if args.no_figures:
        redraw = f"python train_sae.py --redraw --save_dir {shlex.quote(str(args.save_dir))}"
        print(f"see {args.save_dir / 'sae_metrics.csv'}; table and figures: {redraw}")
        return 0
    figures = "figure2_l0_by_depth.png and figure3_activation_frequency.png"
    print(f"see {args.save_dir / 'table2.md'}, and {figures} beside it")
    return 0


# ------------------------------------------------------------------------------- tables and figures
STUDY_TOKENS = 10_000_000  # a layer
STUDY_L0 = "L3 32.4 -> 28.4, L6 39.7 -> 45.5, L9 58.9 -> 73.9"
STUDY = f"""Published (ReLU + L1, one SAE a head; control -> adaptive): L0 {STUDY_L0};
MSE L3 .022 -> .020, L6 .029 -> .031, L9 .041 -> .051. \
(Batch)TopK fixes L0 by construction: compare its FVU."""
GAINS = """gain_: by which share less of the variance is left unexplained (1 - FVU / FVU) than \
by the same SAE trained on normal rows
of the same covariance (gaussian), with a frozen random decoder (decoder), or on the model before \
training (untrained);
_lo, _hi: 95 % over the held-out documents of this one training; another gives another gain: \
with --seeds, sae_gains.csv counts both.
Where they hold 0, the SAE has found no more than that null has. _saes: how many have an interval.
"""
COLORS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # one more than colours: 42 curves that differ
DASHES: list[Any] = ["-", "--", ":", "-.", (0, (1, 3))]
KIND = GROUP[:-1]  # what a curve stands for


def write_csv(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False)
    return frame


def read_csv(path: Path, needs: list[str]) -> pd.DataFrame:
    """A CSV of this script, checked for columns and rows."""
    remedy = "it is written by: python train_sae.py"
    try:
        frame = csv_table(path)
    except (OSError, ValueError) as e:
        raise HandoffError(f"{path} cannot be read ({str(e)[:100]}); {remedy}") from None
    missing = [column for column in needs if column not in frame]
    if not missing and len(frame) == 0:
        missing = ["any row"]
    if missing:
        raise HandoffError(f"{path} lacks {', '.join(missing)}; {remedy}")
    return frame


def table2(metrics: pd.DataFrame) -> pd.DataFrame:
    """A row a run and layer, on held-out documents; 95 % intervals over these.

    Of a layer with an SAE a head it has the mean over heads, and the mean of the ends of their
    intervals: too long if anything, as a mean varies no more than what it is of. CE recovered:
    over the heads that matter (ce_informative), or the ratio would be one of noise.
    """
    rows = []
    for key, saes in metrics.groupby(GROUP):
        row = dict(zip(GROUP, key, strict=True))
        row["n_saes"] = len(saes)
        row["split"] = " and ".join(sorted(saes["split"].unique()))
        row["n_documents"] = saes["n_documents"].iloc[0]
        for name in ("l0", "mse", "fvu"):
            row[name] = saes[name].mean()
            row[f"{name}_lo"] = saes[f"{name}_lo"].mean()
            row[f"{name}_hi"] = saes[f"{name}_hi"].mean()
            row[f"{name}_sd"] = saes[name].std()  # over heads
        row["dead_share"] = saes["dead_share"].mean()
        row["dead_share_tokens"] = saes["dead_share_tokens"].iloc[0]
        if {"d_sae", "d_in", "tokens"} <= set(saes):
            row["expansion"] = (saes["d_sae"] / saes["d_in"]).iloc[0]
            row["tokens"] = saes["tokens"].iloc[0]
        if "recipe" in saes:
            row["recipe"] = " and ".join(sorted(saes["recipe"].unique()))
        for name in ("ce_informative", "kl_sae", "fvu_train"):
            if name in saes:
                row[name] = saes[name].astype(float).mean()
        matter = saes
        if len(saes) > 1 and "ce_informative" in saes:
            matter = saes[saes["ce_informative"].fillna(False).astype(bool)]
        if "ce_recovered_zero" in saes:
            row["ce_recovered_zero"] = matter["ce_recovered_zero"].astype(float).mean()
        row |= mean_with_interval(matter, "ce_recovered_mean")
        for name in gains_in(saes):
            row |= mean_with_interval(saes, name)
        rows.append(row)
    return pd.DataFrame(rows)


def gains_in(frame: pd.DataFrame) -> list[str]:
    """The columns gain_<null>."""
    return [c for c in frame if c.startswith("gain_") and not c.endswith(("_lo", "_hi"))]


def mean_with_interval(saes: pd.DataFrame, name: str) -> dict[str, float]:
    """Means of a measure and of the ends of its interval, over the SAEs that have one, and how
    many these are; of the measure alone, over all, where none has."""
    if name not in saes:
        return {}
    columns = [name, f"{name}_lo", f"{name}_hi"]
    values = saes.reindex(columns=columns).astype(float)
    bounded = values.dropna()
    means = (values if bounded.empty else bounded).mean()
    return {**means, f"{name}_saes": len(bounded)}


def write_table2(path: Path, table: pd.DataFrame) -> None:
    """As Markdown."""
    lines = [list(table.columns), ["---"] * table.shape[1]]
    for row in table.to_numpy():
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append([markdown_text(cell) for cell in cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    with atomic(path) as temporary:
        note = "\n\nL0, MSE and FVU on held-out documents of the split, MSE in squared raw units; "
        note += "_sd: over SAEs of heads;\ndead_share: never fired on dead_share_tokens tokens of "
        note += "held-out and training documents.\n"
        if any(name.startswith("gain_") for name in table):
            note += GAINS
        note += f"{STUDY}\n"
        temporary.write_text(text + note, encoding="utf-8")


def draw_report(save_dir: Path) -> None:
    """Table 2 and figures 2 and 3, from sae_metrics.csv and the latent_frequencies.csv beside each
    SAE that it lists."""
    import matplotlib

    matplotlib.use("Agg")
    needs = [name for name in GROUP if name not in ("setting", "seed")]
    needs += ["folder", "l0", "l0_lo", "mse", "mse_lo", "fvu", "fvu_lo", "split"]
    needs += ["n_documents", "dead_share", "dead_share_tokens"]
    metrics = with_names_of_now(read_csv(save_dir / "sae_metrics.csv", needs))
    table = write_csv(save_dir / "table2.csv", table2(metrics))
    write_table2(save_dir / "table2.md", table)
    # A frequency table an SAE, so that both drawings of figure 3 read it once
    latents = {f: read_frequencies(save_dir / f) for f in metrics["folder"]}
    figures = {
        "figure2_l0_by_depth.png": functools.partial(draw_depth, table),
        "figure3_activation_frequency.png": functools.partial(draw_frequencies, latents, metrics),
    }
    tables = ["table2.csv", "table2.md"]
    for old in save_dir.glob("sae_frontier.*"):  # of SAEs that were there before
        old.unlink()
    frontier = frontier_of(table)
    if len(frontier):
        tables.append("sae_frontier.csv")
        write_csv(save_dir / "sae_frontier.csv", frontier)
        figures["sae_frontier.png"] = functools.partial(draw_frontier, frontier)
    for name, draw in figures.items():
        save_figure(draw, save_dir / name)
    for name in (*tables, *figures):
        write_sidecar(save_dir / name, "janus.report/1", [save_dir / "sae_metrics.csv"])


def with_names_of_now(metrics: pd.DataFrame) -> pd.DataFrame:
    """sae_metrics.csv with the columns of GROUP that older versions did not write."""
    metrics = metrics.copy()
    if "seed" not in metrics:
        metrics["seed"] = "unknown"
    if "setting" not in metrics:
        counts = metrics["k"] if "k" in metrics else pd.Series(math.nan, metrics.index)
        settings = []
        for arch, k in zip(metrics["arch"], counts, strict=True):
            settings.append(setting_of(arch, None if math.isnan(k) else k))
        metrics["setting"] = settings
    return metrics


def kinds_of(table: pd.DataFrame) -> dict[tuple, dict[str, Any]]:
    """Label, colour and marker of every curve: an architecture, of a run, a unit and a site."""
    kinds: dict[tuple, dict[str, Any]] = {}
    seeds = table["seed"].nunique()
    for kind in table.groupby(KIND).groups:
        run, unit, arch, setting, seed, site = kind
        label = f"{run} ({arch} {setting}, {site} of a {unit})"
        label += f", seed {seed}" if seeds > 1 else ""
        kinds[kind] = {"label": as_label(label)} | look_of(len(kinds))
    return kinds


def look_of(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a curve, counted from 0. Marker and dashes are enough to tell it
    from others, without its colour."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "ls": DASHES[number // len(COLORS) % len(DASHES)],
    }


def fixes_l0(arch: str) -> bool:
    """Whether an architecture keeps the k largest latents of a token or batch, whatever they
    are: then L0 by depth says nothing. One that this script does not know may not."""
    return arch in ARCHITECTURES and ARCHITECTURES[arch].l0_flag == "k"


def draw_depth(table: pd.DataFrame, is_stacked: bool = False) -> Any:
    """Figure 2, by layer, from table 2: L0 of the architectures that do not fix it, what an SAE
    keeps of the loss, and FVU."""
    import matplotlib.pyplot as plt

    kinds = kinds_of(table)
    is_fixed = table["arch"].map(fixes_l0)
    panels = {}
    if not is_fixed.all():
        panels["l0"] = "L0: active latents a token"
    if "ce_recovered_mean" in table and table["ce_recovered_mean"].notna().any():
        panels["ce_recovered_mean"] = "CE recovered (1: no loss is lost,\n0: as without the layer)"
    panels["fvu"] = "FVU: share of the variance\nnot explained"
    shown = {name: table for name in panels}
    if "l0" in panels:
        shown["l0"] = with_interval_over_heads(table[~is_fixed])
    of_layers = table[table["unit"] != "head"]
    if "ce_recovered_mean" in panels and of_layers["ce_recovered_mean"].notna().any():
        # without one head little is lost, and a ratio to that is noise
        shown["ce_recovered_mean"] = of_layers
    grid = (len(panels), 1) if is_stacked else (1, len(panels))
    more = 0.22 * max(0, len(kinds) - 2)  # inches of legend
    size = (max(5.5, 4.2 * len(panels)), 4.2 + more)
    if is_stacked:
        size = (4.5, 2.9 * len(panels) + 1 + more)
    figure, axes = plt.subplots(*grid, figsize=size, layout="constrained", squeeze=False)
    layers = sorted(table["layer"].unique())
    for ax, (name, label) in zip(axes.flat, panels.items(), strict=True):
        curves = shown[name].groupby(KIND)
        for i, (kind, rows) in enumerate(curves):
            # side by side, so that intervals do not hide each other
            step = min(0.12, 0.7 / len(curves))
            x = rows["layer"] + step * (i - (len(curves) - 1) / 2)
            draw_values(ax, x, rows, name, kinds[kind])
        # of values that may be alike, so the margin is small beside 0
        low, high = ax.get_ylim()
        ax.set(xlabel="layer", ylabel=label, ylim=(min(0, 1.05 * low), max(0, 1.05 * high)))
        ax.set_xticks(layers[:: 1 + (len(layers) - 1) // 16])
    # the last panel has every curve
    handles, labels = axes.flat[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", fontsize=9)
    note = depth_note(table, shown)
    figure.supxlabel(textwrap.fill(note, round(13 * size[0])), fontsize=8.5)
    return figure


def with_interval_over_heads(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of table 2 in which L0 of a layer with an SAE a head has the 95 % interval of the mean
    over heads (Student's t); none where there is one head."""
    is_of_heads = table["unit"] == "head"
    n_heads = table["n_saes"]
    half = stats.t.ppf(0.975, n_heads - 1) * table["l0_sd"] / np.sqrt(n_heads)
    return table.assign(
        l0_lo=table["l0_lo"].where(~is_of_heads, table["l0"] - half),
        l0_hi=table["l0_hi"].where(~is_of_heads, table["l0"] + half),
    )


def depth_note(table: pd.DataFrame, shown: dict[str, pd.DataFrame]) -> str:
    """What the bars of figure 2 are, and what was published; `shown`: the rows of each panel."""
    over = " or ".join(map(str, sorted(table["n_documents"].unique())))
    splits = " and ".join(sorted(table["split"].unique()))
    note = f"Bars: 95 % intervals over {over} held-out documents of the {splits} split."
    has_all_bars = all(
        f"{name}_lo" in rows and rows[f"{name}_lo"].notna().all() for name, rows in shown.items()
    )
    if not has_all_bars:
        note += " Open: no interval; the layer may matter too little for one."
    fixed = table[table["arch"].map(fixes_l0)]
    if len(fixed):
        span = f"{fixed['l0'].min():.3g} to {fixed['l0'].max():.3g}"
        note += f" L0 of {' and '.join(sorted(fixed['arch'].unique()))} is fixed: {span}."
    of_heads = shown.get("l0", table)[lambda rows: rows["unit"] == "head"]
    if "l0" not in shown or of_heads.empty:
        return note
    n_heads = " or ".join(map(str, sorted(of_heads["n_saes"].unique())))
    note += f" L0 of SAEs of heads: over the {n_heads} heads of a layer instead (Student's t)"
    if "tokens" in of_heads:
        expansions = " or ".join(f"{factor:g}" for factor in sorted(of_heads["expansion"].unique()))
        tokens = " or ".join(f"{n:,}" for n in sorted(of_heads["tokens"].unique()))
        size = "; small: " if of_heads["tokens"].max() < STUDY_TOKENS else "; "
        note += f"{size}{expansions} latents a dimension, {tokens} tokens each"
    study = "Published L0, not measured here (12 layers, ReLU, an SAE a head; control -> adaptive)"
    return f"{note}. {study}: {STUDY_L0}."


def same_on_a_curve(table: pd.DataFrame) -> list[str]:
    """The columns in which all SAEs of a curve of the frontier agree: all but their setting."""
    names = [*KIND, "expansion", "tokens", "recipe"]
    return [name for name in names if name in table and name != "setting"]


def frontier_of(table: pd.DataFrame) -> pd.DataFrame:
    """What reconstruction costs in L0: where rows of table 2 differ in setting alone, by L0."""
    kind = same_on_a_curve(table)
    curve = [*kind, "layer"]
    n_settings = table.groupby(curve)["setting"].transform("nunique")
    measures = ["l0", "fvu", "fvu_lo", "fvu_hi"]
    if "ce_recovered_mean_lo" in table:
        measures += ["ce_recovered_mean", "ce_recovered_mean_lo", "ce_recovered_mean_hi"]
    several = table[n_settings > 1]
    names = [*GROUP, *[name for name in kind if name not in GROUP]]
    return several[[*names, *measures, "split", "n_documents"]].sort_values([*curve, "l0"])


def draw_frontier(frontier: pd.DataFrame, is_stacked: bool = False) -> Any:
    """FVU and CE recovered against L0: a panel a layer, a line a run, architecture, seed, size."""
    import matplotlib.pyplot as plt

    measures = {"fvu": "FVU: share of the variance\nnot explained"}
    if "ce_recovered_mean" in frontier and frontier["ce_recovered_mean"].notna().any():
        measures["ce_recovered_mean"] = (
            "CE recovered (1: no loss is lost,\n0: as without the layer)"
        )
    layers = sorted(frontier["layer"].unique())
    panels = [(layer, name) for name in measures for layer in layers]
    n_columns = 1 if is_stacked else min(3, len(layers))
    n_rows = math.ceil(len(panels) / n_columns)
    curve = same_on_a_curve(frontier)
    kinds = looks_of_curves(frontier)
    more = 0.22 * max(0, len(kinds) - 2)  # inches of legend
    size = (4.5 if is_stacked else max(5.5, 3.8 * n_columns), 2.9 * n_rows + 1 + more)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=size, layout="constrained", squeeze=False
    )
    handles: Any = {}  # by their labels
    for ax, (layer, name) in zip(grid.flat, panels, strict=False):
        of_layer = frontier[frontier["layer"] == layer]
        for kind, rows in of_layer.groupby(curve):
            draw_values(ax, rows["l0"], rows, name, kinds[kind])
        drawn, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))  # a curve may be of some layers only
        rounded = of_layer["l0"].map(lambda l0: float(f"{l0:.0f}" if l0 >= 1 else f"{l0:.1g}"))
        ticks = sorted(rounded[rounded > 0].unique())  # the axis is logarithmic
        ax.set(xscale="log", xlabel="L0: active latents a token", ylabel=measures[name])
        ax.set(title=f"layer {layer}")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.minorticks_off()
    for ax in grid.flat[len(panels) :]:
        ax.axis("off")
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", fontsize=9)
    over = " or ".join(map(str, sorted(frontier["n_documents"].unique())))
    splits = " and ".join(sorted(frontier["split"].unique()))
    note = f"Bars: 95 % intervals over {over} held-out documents of the {splits} split."
    figure.supxlabel(textwrap.fill(note, round(13 * size[0])), fontsize=8.5)
    return figure


def looks_of_curves(frontier: pd.DataFrame) -> dict[tuple, dict[str, Any]]:
    """The label and look of each curve, by its values of `same_on_a_curve`; a label says what tells
    it from the others."""
    curve = same_on_a_curve(frontier)
    labels = {}
    for kind in frontier.groupby(curve).groups:
        one = dict(zip(curve, kind, strict=True))
        label = "{run} ({arch}, {site} of a {unit}), seed {seed}".format_map(one)
        if "expansion" in one and frontier["expansion"].nunique() > 1:
            label += f", {one['expansion']:g} latents a dimension"
        if "tokens" in one and frontier["tokens"].nunique() > 1:
            label += f", {one['tokens']:,} tokens"
        labels[kind] = label
    looks: dict[tuple, dict[str, Any]] = {}
    for kind, label in labels.items():
        if list(labels.values()).count(label) > 1:  # they differ in another flag
            label += f", recipe {dict(zip(curve, kind, strict=True))['recipe']}"
        looks[kind] = {"label": as_label(label)} | look_of(len(looks))
    return looks


def draw_values(ax: Any, x: pd.Series, rows: pd.DataFrame, name: str, kind: dict[str, Any]) -> None:
    """One curve of figure 2: a column of table 2 at x, with its interval where it has one; a value
    without interval is an open dot."""
    missing = pd.Series(math.nan, index=rows.index)
    low = rows.get(f"{name}_lo", missing).astype(float)
    high = rows.get(f"{name}_hi", missing).astype(float)
    bars = np.stack([rows[name] - low, high - rows[name]]).clip(min=0)  # [2, layers]
    style: dict[str, Any] = {"ms": 5, "capsize": 3, "lw": 1.4}
    ax.errorbar(x, rows[name], yerr=bars, **style, **kind)
    is_open = low.isna()
    open_dot: dict[str, Any] = {"mfc": "white", "mec": kind["color"], "zorder": 4}
    ax.plot(x[is_open], rows[name][is_open], marker=kind["marker"], ms=5, ls="", **open_dot)


def draw_frequencies(
    latents: dict[str, pd.DataFrame], metrics: pd.DataFrame, is_stacked: bool = False
) -> Any:
    """Figure 3: how often latents fire, a panel a layer; `latents`: of each SAE, by folder."""
    import matplotlib.pyplot as plt

    kinds = kinds_of(metrics)
    layers = sorted(metrics["layer"].unique())
    n_columns = 1 if is_stacked else min(3, len(layers))
    n_rows = math.ceil(len(layers) / n_columns)
    size = (4.5 if is_stacked else max(5.5, 3.8 * n_columns), 2.9 * n_rows + 1)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for ax, layer in zip(grid.flat, layers, strict=False):
        above: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "fontsize": 9}
        for kind, saes in metrics[metrics["layer"] == layer].groupby(KIND):
            number = list(kinds).index(kind)
            of_layer = pd.concat([latents[folder] for folder in saes["folder"]])
            # from below one firing to every token; what never fires is written into the panel
            edges = np.geomspace(0.7 / of_layer["n_rows"].max(), 1, 19)
            share = np.histogram(of_layer["frequency"], edges)[0] / len(of_layer)
            dashes = DASHES[number % len(DASHES)]
            label, color = kinds[kind]["label"], kinds[kind]["color"]
            ax.stairs(share, edges, lw=1.6, ls=dashes, color=color, label=label)
            never = (of_layer["frequency"] == 0).mean()
            # in the order of the legend, in every panel
            row, place = divmod(number, 4)
            ax.text(0.28 + 0.18 * place, 0.97 - 0.09 * row, f"{never:.1%}", color=color, **above)
        ax.text(0.02, 0.97, "never fire:", **above)
        ax.set(xscale="log", yscale="log", title=f"layer {layer}")
        ax.set_xlabel("share of tokens that a latent fires on")
    # room above the curves for these lines
    n_lines = math.ceil(len(kinds) / 4)
    low, top = grid[0, 0].get_ylim()
    free = min(0.6, 0.03 + 0.09 * n_lines)  # share of the panel
    grid[0, 0].set_ylim(low, low * (top / low) ** (1 / (1 - free)))
    for ax in grid[:, 0]:
        ax.set_ylabel("share of latents")
    for ax in grid.flat[len(layers) :]:
        ax.axis("off")
    handles: Any = {}  # by their labels
    for ax in grid.flat[: len(layers)]:
        drawn, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))  # a curve may be of some layers only
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", fontsize=9)
    n_tokens = metrics["dead_share_tokens"].max()
    note = f"{n_tokens:,} tokens of held-out and training documents; never: dead on all of them."
    figure.supxlabel(textwrap.fill(note, round(13 * size[0])), fontsize=8.5)
    return figure


def read_frequencies(folder: Path) -> pd.DataFrame:
    """How often each latent of an SAE fires."""
    return read_csv(folder / "latent_frequencies.csv", ["frequency", "n_rows"])


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_input_flags(parser)
    add_output_flags(parser)
    add_method_flags(parser)
    add_size_flags(parser)
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    runs_help = "run names, folders under --activations_dir; default: all that are there"
    layers_help = "layers, counted from 0; default: all that were dumped for --site"
    site_help = "activation; z: the heads' outputs, before W_O"
    model_help = "checkpoint of each of --runs; default: the dump's, if unchanged"
    resume_help = "go on with unfinished SAEs, keep finished ones; equals an uninterrupted run"
    redraw_help = "only rebuild table 2 and the figures from the CSVs in --save_dir"
    dumps = Path("activations")
    add = parser.add_argument_group("inputs").add_argument
    add("--runs", nargs="+", help=runs_help)
    add("--activations_dir", type=Path, default=dumps, help="where harvest_activations.py wrote")
    add("--layers", type=integer, nargs="+", help=layers_help)
    add("--site", choices=SITES, default="z", help=site_help)
    add("--model_path", type=Path, nargs="+", help=model_help)
    add("--resume", action="store_true", help=resume_help)
    add("--redraw", action="store_true", help=redraw_help)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    board_help = "also log to <SAE folder>/tensorboard (needs the package tensorboard)"
    save_help = "steps between saves of training state and export"
    later_help = "write metrics alone; --redraw makes table 2 and the figures later"
    add = parser.add_argument_group("outputs").add_argument
    add("--save_dir", type=Path, default=Path("saes"), help="output folder")
    add("--tensorboard", action="store_true", help=board_help)
    add("--no_figures", action="store_true", help=later_help)
    add("--save_interval", type=positive(int), default=500, help=save_help)


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """A flag entered here or among the sizes is in `now` by its name, and --resume keeps it."""
    arch_help = "; ".join(f"{name}: {arch.about}" for name, arch in ARCHITECTURES.items())
    arch_help = arch_help.replace("%", "%%")  # argparse would fill it in
    unit_help = "one SAE for all heads of a layer together, or one a head"
    finish_help = "then as many tokens on KL(model || spliced) + the loss, the model in the loop"
    nulls_help = (
        "also train on normal rows of the same covariance, and with a random decoder; in all "
        "layers, or in these"
    )
    start_help = (
        "latents start within the leading axes of the data that hold this share of its variance, "
        "at least a quarter of all; 1: in any direction"
    )
    plain_help = "by autograd in float32, from the forward alone; slower"
    aux_help = "not relu, gated: dead latents a token that fit the residual; 0: off, -1: D / 2"
    int8_help = (
        "CPU, archs with --k: int8 products propose, float32 decides; faster from D = 384 on"
    )
    decay_help = "last share of the steps, where the rate falls to 0; 0: --resume may add steps"
    warmup_help = "steps of linear learning-rate warm-up"
    add = parser.add_argument_group("method").add_argument
    add("--arch", choices=ARCHITECTURES, default="batchtopk", help=arch_help)
    add("--unit", choices=["layer", "head"], default="layer", help=unit_help)
    add("--nulls", nargs="*", type=integer, metavar="LAYER", help=nulls_help)
    add("--finish_kl", type=integer, default=0, metavar="TOKENS", help=finish_help)
    add("--plain", action="store_true", help=plain_help)
    add("--start_variance", type=positive(float), default=0.995, metavar="SHARE", help=start_help)
    add("--aux_k", type=integer, default=-1, help=aux_help)
    add("--int8", action="store_true", help=int8_help)
    add("--lr_warmup", type=integer, default=50, help=warmup_help)
    add("--lr_decay", type=finite, default=0.2, help=decay_help)


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    count, real = positive(int), positive(float)
    absent = argparse.SUPPRESS  # then fill_in takes the preset's
    auto_help = "auto: the preset of the model behind the dump"
    takes_k = [name for name, arch in ARCHITECTURES.items() if arch.l0_flag == "k"]
    k_help = f"active latents a token ({', '.join(takes_k)})"
    l0_help = "jumprelu: active latents a token to aim at; default: --k"
    l1_help = "relu, gated: weight of sum(f) against squared error / D, norms sqrt(D)"
    tokens_help = "training tokens, instead of --steps"
    epochs_help = "passes over the training tokens, instead of --steps"
    dead_help = "tokens without firing after which a latent counts as dead"
    eval_help = "held-out tokens for errors and L0; a sixth of them for CE recovered"
    group = parser.add_argument_group("sizes", "the preset's, unless given")
    add = group.add_argument
    add("--preset", choices=["auto", *PHASE_PRESETS], default="auto", help=auto_help)
    add("--expansion", type=count, default=absent, help="latents per input dimension, F / D")
    add("--k", type=count, nargs="+", default=absent, help=k_help)
    add("--target_l0", type=count, nargs="+", default=absent, help=l0_help)
    add("--l1", type=real, nargs="+", default=absent, help=l1_help)
    add("--seeds", type=integer, nargs="+", default=absent, help="several, in place of --seed")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, default=absent, help="optimiser steps")
    length.add_argument("--tokens", type=count, default=absent, help=tokens_help)
    length.add_argument("--epochs", type=real, default=absent, help=epochs_help)
    add("--batch_size", type=count, default=absent, help="tokens a step")
    add("--learning_rate", type=real, default=absent, help="peak rate of Adam, per step")
    add("--dead_tokens", type=count, default=absent, help=dead_help)
    add("--eval_tokens", type=count, default=absent, help=eval_help)


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits 2 where flags do not go together."""
    if args.unit == "head" and args.site != "z":
        parser.error(f"--unit head splits z by head; --site {args.site} has no heads")
    runs, paths = args.runs or [], args.model_path or []
    if paths and len(paths) != len(runs):
        found = f"--model_path names {len(paths)} files for {len(runs)} --runs"
        parser.error(f"{found}: give one each, in the same order")
    if not 0 <= args.lr_decay < 1 or args.lr_warmup < 0 or args.aux_k < -1:
        limits = "--lr_decay must lie in [0, 1), --lr_warmup must not be negative"
        parser.error(f"{limits}, --aux_k must be -1 or more")
    check_products(parser, args)
    counts = ARCHITECTURES[args.arch].l0_flag
    for flag, count in (("k", "k"), ("target_l0", "target_l0"), ("l1", None)):
        if len(getattr(args, flag, [])) > 1 and counts != count:
            parser.error(f"--{flag} has several values, of which --arch {args.arch} uses none")
    for flag in (*VARIED, "runs", "layers", "nulls"):
        values = getattr(args, flag, None) or []
        if len(set(values)) < len(values):
            parser.error(f"--{flag} has a value twice")
    if args.start_variance > 1:
        parser.error("--start_variance is a share, at most 1")
    if args.finish_kl < 0:
        parser.error("--finish_kl must not be negative")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with what --overwrite replaces: give one of them")
    if args.tensorboard and find_spec("tensorboard") is None:
        advice = "pip install tensorboard (the CSVs have the same numbers without it)"
        parser.error(f"--tensorboard needs a package: {advice}")


def check_products(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits 2 if the training step cannot multiply in what is asked for."""
    on_cpu = args.device in ("auto", "cpu")
    arch = ARCHITECTURES[args.arch]
    if args.int8 and not (arch.int8 and on_cpu and args.dtype != "float32"):
        able = ", ".join(name for name, arch in ARCHITECTURES.items() if arch.int8)
        found = f"found --arch {args.arch} --device {args.device} --dtype {args.dtype}"
        parser.error(f"--int8 takes one of {able}, a CPU and bfloat16; {found}")
    if not takes_fast_step(args) and (args.int8 or args.dtype == "bfloat16"):
        what = "--plain" if args.plain else f"--arch {args.arch}, which has no fast step,"
        parser.error(f"{what} computes in float32: leave --int8 and --dtype bfloat16 out")


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
    return one_line_errors(lambda: under_torchrun(lambda: run(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())

"""Train NewGPT while a Homeostat holds the similarity of its attention heads (phase 1 of Janus
Arc).

Question: what does it cost, and what does it change, to keep the heads of a transformer
decorrelated while it learns? sigma is the mean absolute cosine between the outputs z of a layer's
heads. A PID controller raises or relaxes a decorrelation penalty so that sigma stays at
--target_sigma. --pressure selects the arm: adaptive, control (none), constant:LAMBDA, or
replay:TELEMETRY.csv (the yoked arm: the lambda of another run, without the feedback).

Reads   text: --dataset (WikiText from the Hugging Face hub, a local file or folder, or `builtin`)
Writes  <save_dir>/janus_<arm>_final.pt   weights, optimiser, controller, random states, golden
                                          probe; sidecar .pt.json
        <save_dir>/ckpt_<step>.pt         the last three, for --resume
        <save_dir>/tokenizer.json         read by every later phase
        <save_dir>/telemetry.csv          a row every --control_interval steps; columns: METRICS.md
        <save_dir>/layers.csv             per layer at every validation;  training.png, run.json
        <save_dir>/validation.csv         loss of each window it validated on, at the end

Quick   python janus_adaptive.py --preset smoke --dataset builtin --save_dir checkpoints/smoke
        (a minute on two CPU cores)
Full    python janus_adaptive.py --save_dir ./checkpoints/v1 --target_sigma 0.0035
        (84.9M parameters without embeddings, 131M tokens of WikiText-103; meant for a GPU. Each run
        prints its time, memory and disk for this machine first.)

Shapes  B batch, T tokens, D d_model, H heads, P pairs of heads H(H-1)/2, K d_head, L layers,
        V vocabulary.
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
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before torch: a thread that waits for another leaves its core to whoever needs it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

# Sizes; every preset takes the same code path, and a flag given explicitly beats the preset.
# `published` is the configuration of the original study (Belanger 2026), its control law included.
# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(
        n_layers=12, d_model=768, n_heads=12, d_ff=2048, seq_len=512,
        batch_size=4, grad_accum=16, steps=4000, learning_rate=6e-4,
        pressure_warmup=400, val_interval=500, val_windows=0, save_interval=500),
    "published": dict(
        n_layers=12, d_model=512, n_heads=8, d_ff=1365, seq_len=512,
        batch_size=16, grad_accum=4, steps=4005, learning_rate=6.29e-4, schedule="constant",
        lr_warmup=0, weight_decay=1.34e-4, dropout=0.05,
        penalty="fro", layer_weights="cubic", law="linear", k_p=0.0, k_i=0.01,
        control_interval=50, filter_beta=0.0, pressure_warmup=1500,
        lambda_start=0.05, lambda_max=0.25,
        val_interval=500, val_windows=0, save_interval=500),
    "demo": dict(
        n_layers=6, d_model=192, n_heads=6, d_ff=512, seq_len=128,
        batch_size=16, grad_accum=1, steps=540, learning_rate=3e-3,
        pressure_warmup=60, val_interval=540, val_windows=960, save_interval=180),
    "smoke": dict(
        n_layers=12, d_model=48, n_heads=3, d_ff=128, seq_len=64,
        batch_size=8, grad_accum=1, steps=60, learning_rate=3e-3,
        pressure_warmup=10, val_interval=60, val_windows=512, save_interval=20),
}
# fmt: on


# -------------------------------------------------------------------------------- method: edit here
# ---- sigma: how alike the heads of a layer are
def head_gram(z: Tensor, w_o: Tensor | None = None) -> Tensor:
    """Inner products [H, H] of the heads' outputs z [B, T, H, K], flattened over batch, tokens
    and d_head; float32.

    With the output projection w_o [D, H*K]: of what the heads write to the residual stream, o_h =
    z_h W_O,h, without forming it: <o_i, o_j> = sum((z_i^T z_j) * (W_O,i W_O,j^T)). Unlike z, o
    does not depend on the basis that a head happens to use for its values. Gram matrices add up
    over batches, so sigma of a step does not depend on their size.
    """
    # bfloat16 could not tell cosines of 0.0035 apart near a diagonal of 1
    with torch.autocast(z.device.type, enabled=False):
        if w_o is None:
            by_head = z.float().permute(2, 0, 1, 3).flatten(1)  # [H, B*T*K]
            return by_head @ by_head.T  # [H, H]
        by_token = z.float().flatten(0, 1).flatten(1)  # [B*T, H*K]
        projection = w_o.float()  # [D, H*K]
        products = (by_token.T @ by_token) * (projection.T @ projection)  # [H*K, H*K]
        heads_and_dims = z.shape[2:]
        blocks = products.unflatten(0, heads_and_dims).unflatten(2, heads_and_dims)  # [H, K, H, K]
        return blocks.sum((1, 3))  # [H, H]


def sigma_of(grams: Tensor) -> Tensor:
    """sigma of each layer [L]: mean absolute cosine over the pairs of heads, from Gram matrices
    [L, H, H]."""
    return head_cosines(grams).abs().mean(-1)


# ---- the penalty: a function of the cosines and an entry in the table; --penalty takes its name,
# and its help what the docstring says before the first colon. The cosines come from head_cosines:
# every pair of heads once, without the diagonal.
def mean_square(cosines: Tensor) -> Tensor:
    """Mean cos^2: cosines [L, P] -> [L]. The derivative vanishes where heads are orthogonal."""
    return cosines.square().mean(-1)


def mean_absolute(cosines: Tensor) -> Tensor:
    """Mean |cos|, which is sigma itself: cosines [L, P] -> [L]."""
    return cosines.abs().mean(-1)


def frobenius_norm(cosines: Tensor) -> Tensor:
    """Frobenius norm ||C - I||_F, as published, of the cosine matrix C: cosines [L, P] -> [L]."""
    sum_of_squares = 2 * cosines.square().sum(-1)  # each pair stands twice in C
    return sum_of_squares.clamp_min(1e-20).sqrt()  # the root has no derivative at 0


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "cos2": mean_square,
    "abs": mean_absolute,
    "fro": frobenius_norm,
}


def decorrelation_penalty(grams: Tensor, kind: str) -> Tensor:
    """Penalty of each layer [L], of a kind of PENALTIES, from Gram matrices [L, H, H]."""
    return PENALTIES[kind](head_cosines(grams))


def layer_weights(kind: str, n_layers: int, device: torch.device) -> Tensor:
    """How much the penalty of each layer counts [L]: 1 (uniform), or ((l+1)/L)^3 (cubic)."""
    depth = torch.arange(1, n_layers + 1, device=device) / n_layers
    return depth**3 if kind == "cubic" else torch.ones_like(depth)


# ---- the controller
class Homeostat:
    """PID controller: measured head similarity sigma in, penalty weight lambda out.

    law "log" works on e = ln(sigma/target) and u = ln(lambda), where the gain of the loop is the
    same at every level; law "linear" on e = sigma - target and u = lambda.

        u = k_p e + I + k_d de/dt,   I += k_i e dt,   lambda from u clipped to the limits

    The derivative acts on the measurement (D does not kick on a setpoint step); a first-order
    filter smooths the measurement; a sample that is not finite is held, not integrated. Against
    wind-up, anti_windup is

        tracking   while u is beyond a limit, I gives back what the limit cuts off, over the
                   tracking time T_t = k_p / k_i (not below dt): a limit that holds empties I, one
                   wild sample hardly moves it
        clamp      I itself is clipped to the limits; the linear law is then simple_pid.PID with
                   its gains negated
        none

    Gains are per optimiser step, dt is in steps. All state is Python floats: in bfloat16 a slow
    integral rounds to nothing. (Astrom & Hagglund 2006, back-calculation: section 3.5; as a
    Lagrange multiplier: Stooke et al. 2020.)
    """

    def __init__(
        self,
        target: float,
        k_p: float,
        k_i: float,
        k_d: float,
        law: str = "log",
        dt: float = 10.0,
        filter_beta: float = 0.0,
        limits: tuple[float, float] = (1e-5, 1e4),
        anti_windup: str = "tracking",
    ) -> None:
        self.k_p = k_p
        self.k_i = k_i  # per step
        self.k_d = k_d  # times steps
        self.dt = dt  # steps between two samples
        self.beta = filter_beta  # 0: no filter
        self.anti_windup = anti_windup
        # Steps over which I follows a limit; without an integral gain nothing winds up
        self.tracking_time = max(dt, k_p / k_i) if k_i > 0 else math.inf
        self.log = law == "log"
        self.low = self.scaled(limits[0])  # of u
        self.high = self.scaled(limits[1])
        self.set_target(target)
        self.filtered: float | None = (
            None  # sigma or ln(sigma) after the filter; None: no sample yet
        )
        self.p = 0.0  # the three terms of u
        self.i = 0.0
        self.d = 0.0
        self.value = 0.0  # lambda
        self.saturated = False  # whether the last u was beyond a limit
        self.held = 0  # number of unusable samples

    def scaled(self, value: float) -> float:
        """A sigma or lambda on the scale of the control law."""
        return math.log(value) if self.log else value

    def set_target(self, target: float) -> None:
        """The sigma to hold from now on."""
        self.setpoint = self.scaled(target)

    def measure(self, sigma: float) -> float | None:
        """Takes one sample of sigma into the filter -> its slope per step, or None if unusable."""
        if not math.isfinite(sigma) or (self.log and sigma <= 0):
            self.held += 1
            return None
        sample = self.scaled(sigma)
        before = sample if self.filtered is None else self.filtered
        self.filtered = self.beta * before + (1 - self.beta) * sample
        return (self.filtered - before) / self.dt

    def hand_over(self, value: float) -> None:
        """Bumpless start of closed-loop control at lambda = `value`: the integral takes up what
        P does not give."""
        error = 0.0 if self.filtered is None else self.filtered - self.setpoint
        u = self.scaled(max(value, 1e-300) if self.log else value)
        self.p = self.k_p * error
        self.i = min(max(u, self.low), self.high) - self.p
        self.d = 0.0
        self.value = value

    def update(self, sigma: float, integrate: bool = True) -> float:
        """One sample of sigma -> lambda for the next dt steps. Without `integrate` I stands
        still."""
        slope = self.measure(sigma)
        if slope is None or self.filtered is None:
            return self.value  # hold
        error = self.filtered - self.setpoint  # above 0: heads too alike, press harder
        self.p = self.k_p * error
        self.d = self.k_d * slope
        if integrate:
            self.i += self.k_i * error * self.dt
            if self.anti_windup == "clamp":
                self.i = min(max(self.i, self.low), self.high)
        u = self.p + self.i + self.d
        limited = min(max(u, self.low), self.high)
        self.saturated = limited != u
        self.value = math.exp(limited) if self.log else limited
        if integrate and self.anti_windup == "tracking":  # from the next sample on
            self.i += (limited - u) * self.dt / self.tracking_time
        return self.value


def setpoint(step: int, args: argparse.Namespace) -> float:
    """The sigma that the loop should hold at `step` (from 1 to --steps). A rule that has a flag is
    known to --resume, which refuses to change it half-way."""
    if args.setpoint_step and step >= args.setpoint_step[0]:
        return args.setpoint_step[1]
    return args.target_sigma


class Pressure:
    """lambda at every step, by arm: adaptive, control, constant:LAMBDA, replay:TELEMETRY.csv.

    The adaptive arm ramps lambda from 0 to --lambda_start over --pressure_warmup steps, then
    hands over to one Homeostat (--per_layer: one a layer). All gains zero means no pressure at
    all: the control arm, bit for bit.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        arm, _, value = args.pressure.partition(":")
        has_gains = any((args.k_p, args.k_i, args.k_d))
        self.closed_loop = arm == "adaptive" and has_gains
        self.replayed = read_telemetry(value) if arm == "replay" else None
        self.fixed = float(value) if arm == "constant" else 0.0
        # warmup, auto or hold in the closed loop; else the arm's name, or off
        self.phase = arm
        if arm == "adaptive":
            self.phase = "warmup" if has_gains else "off"

        gains = (args.k_p, args.k_i, args.k_d)
        lowest = 1e-5 if args.law == "log" else 0.0  # ln(lambda) has no 0
        self.loops = []
        for _ in range(args.n_layers if args.per_layer else 1):
            loop = Homeostat(
                setpoint(1, args),
                *gains,
                law=args.law,
                dt=args.control_interval,
                filter_beta=args.filter_beta,
                limits=(lowest, args.lambda_max),
            )
            self.loops.append(loop)

    def weights(self, step: int) -> list[float]:
        """lambda in use at `step` (counted from 1): one value, or one a layer (--per_layer)."""
        if self.replayed is not None:
            # The lambda of the first row at or after this step
            last = len(self.replayed) - 1
            row = np.searchsorted(self.replayed["step"], step).clip(max=last)
            return [float(self.replayed["lambda"].iloc[row])]
        if self.phase == "warmup":
            share = min(1.0, step / max(1, self.args.pressure_warmup))
            return [self.args.lambda_start * share] * len(self.loops)
        if self.closed_loop:
            return [loop.value for loop in self.loops]
        return [self.fixed]

    def observe(self, step: int, sigmas: list[float], lr_share: float) -> None:
        """Shows the controller sigma of every layer [L], measured at `step`; `lr_share`:
        learning rate over its peak."""
        if not self.closed_loop:
            return
        # One loop sees the mean over the layers
        samples = sigmas if self.args.per_layer else [sum(sigmas) / len(sigmas)]
        lambdas = self.weights(step)
        is_ramping = self.phase == "warmup"
        if step >= self.args.pressure_warmup:
            # With a small learning rate the heads hardly respond, and the integral would wind up.
            self.phase = "auto" if lr_share >= 0.2 else "hold"
        for loop, sample, value in zip(self.loops, samples, lambdas, strict=True):
            loop.set_target(setpoint(step, self.args))
            if is_ramping:  # open loop, ready to take over at the lambda in use
                loop.measure(sample)
                loop.hand_over(value)
            else:
                loop.update(sample, integrate=self.phase == "auto")

    def state_dict(self) -> dict[str, Any]:
        """Phase, and the state of every loop, for a checkpoint."""
        keys = ("filtered", "p", "i", "d", "saturated", "held", "value")
        loops = []
        for loop in self.loops:
            loops.append({key: vars(loop)[key] for key in keys})
        return {"phase": self.phase, "loops": loops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.phase = state["phase"]
        for loop, saved in zip(self.loops, state["loops"], strict=True):
            vars(loop).update(saved)


# ---- the step
def training_step(
    model: NewGPT,
    batches: list[tuple[Tensor, Tensor]],
    weights: Tensor,
    args: argparse.Namespace,
    autocast: Any,
    measure: bool,
) -> tuple[float, Tensor | None]:
    """Accumulates the gradient of loss + sum_l weights[l] * penalty_l over micro-batches of
    inputs and targets [B, T].

    Returns the mean loss (nats) and, if measured or penalised, the Gram matrices of the whole
    step [L, H, H]. The penalty of a micro-batch uses its own Gram matrices; sigma, which the
    Homeostat sees, uses their sum. Gradients, Gram matrices and loss are those of the
    micro-batches of all processes. They are summed once, here: DistributedDataParallel would hand
    the blocks a copy of `tap`, and would have to be told which backward pass is the last.
    """
    is_pressed = bool(weights.any())
    # Every process computes as many micro-batches; the mean is over all of them
    n_batches = len(batches) * rank_and_world()[1]
    mean_loss = 0.0
    grams = None
    for x, y in batches:
        # Ask the model for z of every layer, if somebody needs it
        tap: dict | None = None
        if is_pressed or measure:
            tap = dict.fromkeys(f"z.{l}" for l in range(len(model.blocks)))
        with autocast:
            _, loss = model(x, y, tap=tap)
        objective = loss
        if tap is not None:
            # Without a penalty sigma is only watched: no gradient through it
            z_of_layers = list(tap.values()) if is_pressed else [z.detach() for z in tap.values()]
            gram = layer_grams(model, z_of_layers, args.sigma_space)  # [L, H, H]
            grams = gram.detach() if grams is None else grams + gram.detach()
            if is_pressed:
                penalty = decorrelation_penalty(gram, args.penalty)  # [L]
                objective = loss + (weights * penalty).sum()
        (objective / n_batches).backward()
        mean_loss += loss.item() / n_batches

    # The other processes had other micro-batches.
    sums = [p.grad for p in model.parameters() if p.grad is not None]
    if grams is not None:
        sums.append(grams)
    all_sum(*sums)
    total_loss = torch.tensor(mean_loss, dtype=torch.float64)
    all_sum(total_loss)
    return total_loss.item(), grams


def layer_grams(model: NewGPT, z_of_layers: list[Tensor], space: str) -> Tensor:
    """Gram matrices [L, H, H] of z [B, T, H, K] of every layer; `space` z: of the heads'
    outputs, resid: of what they write to the residual stream."""
    grams = []
    for block, z in zip(model.blocks, z_of_layers, strict=True):
        grams.append(head_gram(z, block.attn.w_o.weight if space == "resid" else None))
    return torch.stack(grams)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate at `step` (counted from 1): linear warm-up, then --schedule."""
    warmup = min(1.0, step / max(1, args.lr_warmup))  # 0 to 1
    done = max(0.0, (step - args.lr_warmup) / max(1, args.steps - args.lr_warmup))  # share, 0 to 1
    shapes = {
        "cosine": 0.55 + 0.45 * math.cos(math.pi * done),  # from 100 to 10 %
        "wsd": min(1.0, 5 * (1 + 1 / args.steps - done)),  # the last fifth falls to 0
        "constant": 1.0,
    }
    return args.learning_rate * shapes[args.schedule] * warmup


# ---- validation
@torch.no_grad()
def validate(
    model: NewGPT, data: HFWikiTextLoader, windows: np.ndarray, autocast: Any
) -> dict[str, Any]:
    """These windows [W] of the split, in eval mode: val_loss (nats a token), that of each window
    [W], and, of each layer [L], sigma_z, sigma_resid, and write_overlap."""
    cfg = model.cfg
    device = model.embedding.weight.device
    model.eval()
    # A CPU is fastest with what its caches hold; logits [B, T, V] are kept small everywhere
    n_tokens = 1024 if device.type == "cpu" else 8192
    n_tokens = min(n_tokens, 2**27 // cfg.vocab_size)  # 2^27 float32 are half a gigabyte
    batch_size = max(1, n_tokens // data.seq_len)

    # Sums over all windows, in float64: they are many
    shape = (cfg.n_layers, cfg.n_heads, cfg.n_heads)
    grams = {space: torch.zeros(shape, dtype=torch.float64) for space in ("z", "resid")}
    window_loss = torch.zeros(len(windows), dtype=torch.float64)  # [W]
    rank, world = rank_and_world()
    for first in range(rank * batch_size, len(windows), world * batch_size):
        rows = slice(first, first + batch_size)
        x, y = data.batch(windows[rows])  # [B, T] each
        tap: dict = dict.fromkeys(f"z.{l}" for l in range(cfg.n_layers))
        with autocast:
            logits, _ = model(x.to(device), tap=tap)
        flat = logits.float().flatten(0, 1)  # [B*T, V]
        token_loss = F.cross_entropy(flat, y.to(device).flatten(), reduction="none")  # [B*T]
        # A process fills in its own windows
        window_loss[rows] = token_loss.unflatten(0, x.shape).mean(1).cpu().double()
        # Gram matrices add up: sigma is that of all windows, not a mean over batches
        for space in grams:
            grams[space] += layer_grams(model, list(tap.values()), space).cpu().double()
    all_sum(window_loss, *grams.values())
    model.train()
    return {
        "val_loss": window_loss.mean().item(),
        "window_loss": window_loss.tolist(),
        "sigma_z": sigma_of(grams["z"]).tolist(),
        "sigma_resid": sigma_of(grams["resid"]).tolist(),
        "write_overlap": write_overlap(model).tolist(),
    }


def write_overlap(model: NewGPT) -> Tensor:
    """How much the subspaces that two heads write to overlap, mean over the pairs of a layer [L].

    ||U_i^T U_j||_F^2 / K with U an orthonormal basis of the rows of W_O,h: 1 for the same
    subspace, K/D for random ones.
    """
    n_heads = model.cfg.n_heads
    d_head = model.cfg.d_head
    # Columns of W_O belong to heads; QR gives each head's subspace an orthonormal basis
    matrices = [block.attn.w_o.weight for block in model.blocks]  # [D, H*K] each
    w_o = torch.stack(matrices).float()  # [L, D, H*K]
    by_head = w_o.unflatten(2, (n_heads, d_head)).transpose(1, 2)  # [L, H, D, K]
    bases, _ = torch.linalg.qr(by_head)  # [L, H, D, K]
    products = torch.einsum("lhdk,lgdm->lhgkm", bases, bases)  # [L, H, H, K, K]
    overlap = products.square().sum((-1, -2)) / d_head  # [L, H, H]
    i, j = torch.triu_indices(n_heads, n_heads, offset=1)
    return overlap[:, i, j].mean(-1)


# ---------------------------------------------------------------------------------------------- run
@dataclass
class Training:
    """A training run: what is trained, on what, and what was logged."""

    args: argparse.Namespace
    model: NewGPT
    optimizer: torch.optim.Optimizer
    pressure: Pressure
    train: HFWikiTextLoader  # the two splits
    validation: HFWikiTextLoader
    device: torch.device
    autocast: Any  # context of the forward pass, see --dtype
    facts: dict[str, Any]  # describe the run in checkpoints and sidecars
    sample: Tensor | None = None  # Gram matrices [L, H, H] of the sample of sigma being taken
    telemetry: list[dict[str, Any]] = field(default_factory=list)  # rows of telemetry.csv
    layers: list[dict[str, Any]] = field(default_factory=list)  # rows of layers.csv
    window_loss: list[float] = field(default_factory=list)  # of the last validation [W]
    steps_done: int = 0


def train_model(training: Training, signals: list[int]) -> int:
    """The training loop: step, clip, sample sigma, control, validate, save.

    Returns 0, or 128 + the number of the signal that ended it, after saving. Several processes
    take the same steps; rank 0 writes.
    """
    args = training.args
    model = training.model
    pressure = training.pressure
    rank, _ = rank_and_world()
    penalty_shares = layer_weights(args.layer_weights, args.n_layers, training.device)  # [L]
    clock = Clock(training.steps_done)
    written = time.perf_counter()
    board = open_board(args) if args.tensorboard and rank == 0 else None
    for step in progress(training):
        # Gradient of loss and penalty, over the micro-batches of the step
        rate = learning_rate(step, args)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        is_last = step == args.steps
        is_sample = step % args.control_interval == 0
        is_check = step % args.val_interval == 0 or is_last
        measure = is_check or is_sampled(step, args)
        lambdas = pressure.weights(step)
        weights = torch.tensor(lambdas, device=training.device) * penalty_shares  # [L]
        batches = micro_batches(training, step)
        loss, grams = training_step(model, batches, weights, args, training.autocast, measure)
        is_stopped = anybody_signalled(signals)
        norm = update_weights(training, step, loss)

        # Telemetry tells what was in use at this step; then the controller sees its sigma
        if is_sampled(step, args):
            grams = add_to_sample(training, grams)
        if is_sample or is_check:
            row = telemetry_row(step, args, loss, norm, grams, lambdas, pressure)
            row["tokens_per_s"] = clock.steps_per_s(step) * tokens_per_step(args)
            row["sigma_floor"] = sampling_floor(args, model.cfg.d_head)
            training.telemetry.append(row)
        if is_sample:
            pressure.observe(step, sigma_of(grams).tolist(), rate / args.learning_rate)
            training.sample = None
        if is_check:
            check(training, step, lambdas)
            clock.restart(step)  # validation is no training time
        if board is not None and (is_sample or is_check):
            show_live(board, step, training.telemetry[-1], grams)

        # What is kept
        is_save = is_stopped or is_last or step % args.save_interval == 0
        if rank == 0 and (is_check or is_save or time.perf_counter() - written > 10):
            written = time.perf_counter()
            write_tables(training)
        if rank == 0 and is_last:
            write_validation(training)
        if rank == 0 and is_save:
            save(training, step, is_last)
        if is_stopped and not is_last:
            return end_early(args, step, signals)
    return 0


def update_weights(training: Training, step: int, loss: float) -> float:
    """One step of the optimiser, with clipped gradients -> their norm before clipping. Raises
    HandoffError before loss or gradients that are not finite reach the weights."""
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), training.args.grad_clip).item()
    refuse_divergence(step, loss, norm, training.args)
    training.optimizer.step()
    if training.model.cfg.centred:
        keep_centred(training.model)
    training.optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def keep_centred(model: NewGPT) -> None:
    """Takes the mean over the residual stream's dimensions out of whatever writes to it: where
    LayerNorms were folded, they did."""
    blocks: list[Any] = list(model.blocks)
    for block in blocks:
        for writer in (block.attn.w_o, block.w_down):
            writer.weight -= writer.weight.mean(0)  # [D, inputs]
            if writer.bias is not None:
                writer.bias -= writer.bias.mean()


def is_sampled(step: int, args: argparse.Namespace) -> bool:
    """Whether the tokens of this step count in the next sample of sigma."""
    steps_to_sample = -step % args.control_interval
    return steps_to_sample < args.sample_steps


def sampling_floor(args: argparse.Namespace, d_head: int) -> float:
    """sigma_z that independent heads would show on the tokens of one sample, a cosine: the mean
    |cosine| of two random vectors in n dimensions, about sqrt(2 / (pi n)). An orientation, no
    bound: neighbouring tokens are alike, so that n is really less. NaN in the residual stream,
    where it depends on the model."""
    if args.sigma_space != "z":
        return math.nan
    n = args.sample_steps * tokens_per_step(args) * d_head
    return math.sqrt(2 / (math.pi * n))


def add_to_sample(training: Training, grams: Tensor | None) -> Tensor:
    """Gram matrices [L, H, H] of the sample so far, with those of one more step. They add up:
    sigma of a sample is that of the tokens of all its steps."""
    assert grams is not None  # a sampled step is measured
    training.sample = grams if training.sample is None else training.sample + grams
    return training.sample


def progress(training: Training) -> tqdm:
    """The steps that are left, counted from 1, with a bar."""
    done = training.steps_done
    last = training.args.steps
    arm = training.facts["arm"]
    steps = range(done + 1, last + 1)
    return tqdm(steps, initial=done, total=last, desc=arm, unit="step", disable=None)


class Clock:
    """How fast the steps are since the last time that somebody asked."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measures from now, when `step` steps are done."""
        self.step = step
        self.time = time.perf_counter()

    def steps_per_s(self, step: int) -> float:
        """Steps a second since the last call, or restart."""
        rate = (step - self.step) / (time.perf_counter() - self.time)
        self.restart(step)
        return rate


def tokens_per_step(args: argparse.Namespace) -> int:
    """Tokens that one optimiser step sees, of all processes."""
    return args.batch_size * args.grad_accum * args.seq_len  # --grad_accum counts all processes


def micro_batches(training: Training, step: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets [B, T] of the micro-batches of `step` that this process computes."""
    args = training.args
    rank, world = rank_and_world()
    if world > 1 and args.dropout:  # each process its own noise, which --resume can repeat
        torch.manual_seed((args.seed * args.steps + step) * world + rank)
    n_windows = args.batch_size * args.grad_accum
    x, y = training.train.shuffled((step - 1) * n_windows, n_windows, args.seed)
    # Process r takes micro-batches r, r + world, ...
    inputs = x.to(training.device).split(args.batch_size)
    targets = y.to(training.device).split(args.batch_size)
    return list(zip(inputs, targets, strict=True))[rank::world]


def anybody_signalled(signals: list[int]) -> bool:
    """Whether any process got a signal: so all of them stop at the same step."""
    number = torch.tensor(float(len(signals)))
    all_sum(number)
    return bool(number)


def refuse_divergence(step: int, loss: float, norm: float, args: argparse.Namespace) -> None:
    """Raises HandoffError if loss or gradient norm is not finite, before it reaches the
    weights."""
    if not math.isfinite(loss + norm):
        kept = finished_checkpoints(args.save_dir)
        last = f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        advice = f"try a --learning_rate below {args.learning_rate}"
        fact = f"step {step}: loss {loss}, gradient norm {norm}, not finite"
        raise HandoffError(f"{fact}; {last}; {advice}")


def check(training: Training, step: int, lambdas: list[float]) -> None:
    """Validates; the results go to the last row of telemetry, and a row a layer to `layers`."""
    args = training.args
    windows = training.validation.spread(args.val_windows)
    result = validate(training.model, training.validation, windows, training.autocast)
    row = training.telemetry[-1]
    row["val_loss"] = result.pop("val_loss")
    row["perplexity"] = math.exp(min(50.0, row["val_loss"]))
    training.window_loss = result.pop("window_loss")
    for name, values in result.items():
        row[f"val_{name}"] = sum(values) / len(values)  # mean over layers
    result["lambda"] = np.broadcast_to(lambdas, args.n_layers).tolist()
    for l in range(args.n_layers):
        of_layer = {name: values[l] for name, values in result.items()}
        training.layers.append({"step": step, "layer": l, **of_layer})


def end_early(args: argparse.Namespace, step: int, signals: list[int]) -> int:
    """Exit status of a run that a signal ended; the others wait here until rank 0 has saved."""
    # Without a signal of its own this process stops for another's
    number = int((signals or [signal.SIGTERM])[0])
    advice = "continue with the same command and --resume"
    print(f"signal {number}: saved step {step} in {args.save_dir}; {advice}")
    all_sum(torch.zeros(1))
    return 128 + number


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM do not interrupt; their numbers are appended to the
    list that it yields."""
    noted: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- checkpoints
# May differ between a run and its continuation; every other argument decides where the run goes.
MAY_CHANGE_ON_RESUME = {
    "save_dir",
    "resume",
    "redraw",
    "overwrite",
    "tensorboard",
    "cache_dir",
    "device",
    "skip_probe",
    "save_interval",
    "save_initial",
    "val_windows",
    "preset",
    "threads",
}


def trajectory(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide where a run goes; --resume refuses to change them."""
    everything = vars(args).items()
    return {name: value for name, value in everything if name not in MAY_CHANGE_ON_RESUME}


def save(training: Training, step: int, is_last: bool) -> None:
    """Writes the checkpoint of `step` and removes all but the last three of those before."""
    folder = training.args.save_dir
    name = f"janus_{training.facts['arm']}_final.pt" if is_last else f"ckpt_{step:08d}.pt"
    save_checkpoint(folder / name, training, step)
    for old in sorted(folder.glob("ckpt_*.pt"))[:-3]:
        sidecar_path(old).unlink(missing_ok=True)
        old.unlink()


def save_checkpoint(path: Path, training: Training, step: int) -> None:
    """Writes all that a later phase or --resume needs, then the sidecar."""
    facts = {**training.facts, "step": step}
    model = training.model
    config = asdict(model.cfg)
    ckpt = {
        # What later phases read
        "schema": CHECKPOINT_SCHEMA,
        "config": config,
        "model": model.state_dict(),
        "probe": golden_probe(model),
        **facts,
        # What --resume needs besides
        "optimizer": training.optimizer.state_dict(),
        "pressure": training.pressure.state_dict(),
        "sample": training.sample,
        "rng": random_states(),
        "logs": {"telemetry": training.telemetry, "layers": training.layers},
    }
    sidecar_path(path).unlink(missing_ok=True)  # it describes the old file
    with atomic(path) as temporary:
        try:
            torch.save(ckpt, temporary)
        except RuntimeError as e:  # torch's way to report a full disk
            raise OSError(28, "No space left on device", str(path)) from e
    write_sidecar(path, CHECKPOINT_SCHEMA, [], config=config, **facts)


def random_states() -> dict[str, Any]:
    """The state of every random generator."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 -- some libraries use it
    # As plain lists and text: a checkpoint must load with weights_only
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "python": repr(random.getstate()),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Sets what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002 -- some libraries use it
    random.setstate(ast.literal_eval(states["python"]))


def contents(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, str]:
    """Of the arguments that name a file: a hash of what it holds. `data` describes the text."""
    hashes = {
        "dataset": text_identity(data["dataset_key"]),
        "tokenizer": data["tokenizer_hash"],
    }
    # Other arguments name a file only sometimes
    arm, _, csv = args.pressure.partition(":")
    if arm == "replay":
        hashes["pressure"] = sha256(csv)
    if args.init_from:
        hashes["init_from"] = sha256(args.init_from)
    return hashes


def refuse_change(training: Training, ckpt: dict[str, Any]) -> None:
    """Raises HandoffError if an argument that decides the trajectory differs from those of a
    checkpoint: of a file, if its content does. An argument that the checkpoint does not know was
    at its default then."""
    # What was given now, and what then: typed, and as hashes of what the files hold
    now = trajectory(training.args)
    hashes_now = contents(training.args, training.train.description)
    known = ckpt["data"]
    hashes_then = {"tokenizer": known["tokenizer_hash"]}
    hashes_then |= ckpt.get("contents", {})  # an older checkpoint knows the text's alone
    hashes_then["dataset"] = text_identity(known["dataset_key"])
    defaults = build_parser()
    for name, value in now.items():
        then = ckpt["arguments"].get(name, defaults.get_default(name))
        is_same = value == then
        # A pretrained model that is imported anew has other bytes, and its weights count no more
        is_told = is_same and name == "init_from"
        if name in hashes_now and name in hashes_then and not is_told:
            is_same = hashes_now[name] == hashes_then[name]
        if not is_same:
            fact = f"--resume would change --{name} from {then} to {value}"
            if value == then:
                fact = f"--resume would change what --{name} {value} holds"
            raise HandoffError(f"{fact}; give the same arguments, or start in another --save_dir")
    # The same file may be read otherwise by another version of this script
    n_tokens = training.train.description["n_tokens"]
    if n_tokens != known["n_tokens"]:
        fact = f"--resume: n_tokens was {known['n_tokens']}, is {n_tokens}: the tokens are others"
        raise HandoffError(f"{fact} than it was trained on; start anew, in another --save_dir")
    # So may the same model, imported anew
    bos = training.train.bos
    if bos != ckpt.get("bos"):
        fact = f"--resume: windows began with BOS token {ckpt.get('bos')}, now with {bos}"
        raise HandoffError(f"{fact}; start anew, in another --save_dir")


def newest_readable(args: argparse.Namespace) -> tuple[Path, NewGPT, dict[str, Any]] | None:
    """The newest checkpoint of --save_dir that can be read, its model and the rest; None where
    there is no checkpoint. Raises HandoffError if none of them can be read."""
    checkpoints = sorted(args.save_dir.glob("ckpt_*.pt"))
    # A checkpoint without sidecar was not written to its end
    finished = [path for path in checkpoints if sidecar_path(path).exists()]
    errors = []  # of those that cannot be read
    for path in reversed(finished):  # the newest first
        try:
            saved, ckpt = load_checkpoint(path, torch.device("cpu"), args.skip_probe)
        except HandoffError as error:
            errors.append(error)
            continue
        # A newer one was damaged: said, since steps are done again
        if errors:
            cause = str(errors[0]).partition("; ")[0]
            print(f"note: {cause}; {path.name} is the newest that can be read")
        return path, saved, ckpt
    if errors:
        raise errors[0]
    return None


def resume(training: Training) -> None:
    """Restores the newest readable checkpoint of --save_dir in place, if there is one.

    Raises HandoffError if an argument that decides the trajectory differs.
    """
    found = newest_readable(training.args)
    if found is None:
        return
    path, saved, ckpt = found
    refuse_change(training, ckpt)
    if training.args.threads is None:  # as many as before: with others, sums round differently
        producer = json.loads(sidecar_path(path).read_text(encoding="utf-8"))["producer"]
        torch.set_num_threads(producer["hardware"]["threads"])
    training.model.load_state_dict(saved.state_dict())
    training.optimizer.load_state_dict(ckpt["optimizer"])
    training.pressure.load_state_dict(ckpt["pressure"])
    if ckpt.get("sample") is not None:  # a checkpoint between two samples
        training.sample = ckpt["sample"].to(training.device)
    restore_random_states(ckpt["rng"])
    # The CSVs are written whole, from the rows that the checkpoint kept
    training.telemetry = ckpt["logs"]["telemetry"]
    training.layers = ckpt["logs"]["layers"]
    training.steps_done = ckpt["step"]
    print(f"resumed {path} at step {ckpt['step']}", flush=True)


def is_finished(final: Path, args: argparse.Namespace) -> bool:
    """Whether the run that --resume should continue has its last checkpoint already.

    Raises HandoffError if that is broken, and there is no other one to go on from.
    """
    if not sidecar_path(final).exists():
        return False
    try:  # it may have been cut since
        read_sidecar(final, CHECKPOINT_SCHEMA, checkpoint_remedy(final))
    except HandoffError as error:
        if not finished_checkpoints(args.save_dir):
            raise
        print(f"note: {str(error).partition('; ')[0]}; it is made again")
        return False
    print(f"{final} is there, as long as its sidecar says; there is nothing to resume")
    return True


# ---- set-up
def start_from(args: argparse.Namespace) -> tuple[NewGPT, dict[str, Any]]:
    """--init_from -> that model with this run's context and dropout, and what its checkpoint says
    of where it came from, and of the token that windows begin with, by --bos. Sets its sizes and
    tokenizer in `args`.

    Raises HandoffError if it cannot be read, has one head, no positions for the context, or no BOS
    token for --bos yes.
    """
    with rank_0_first():
        args.init_from = str(as_checkpoint(args.init_from, args.cache_dir, args.dataset))
    saved, ckpt = load_checkpoint(args.init_from, torch.device("cpu"), args.skip_probe)
    bos = window_bos(args.bos, ckpt, args.init_from)
    if saved.cfg.n_heads < 2:
        expected = "expected at least 2, between which sigma is measured"
        raise HandoffError(f"{args.init_from} has one head a layer; {expected}")
    need_positions(args, saved.cfg, ckpt)
    model = NewGPT(replace(saved.cfg, seq_len=args.seq_len, dropout=args.dropout))
    weights = saved.state_dict()
    if saved.cfg.learned_positions:  # as many as the context has
        weights["positions.weight"] = weights["positions.weight"][: args.seq_len]
    model.load_state_dict(weights)
    # The flags of sizes say what is trained, and the tokenizer must be the model's own
    for size in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "tied"):
        setattr(args, size, getattr(saved.cfg, size))
    args.tokenizer = str(Path(args.init_from).resolve().with_name("tokenizer.json"))
    return model, {"pretrained": ckpt.get("pretrained"), "bos": bos}


def need_positions(args: argparse.Namespace, cfg: GPTConfig, ckpt: dict[str, Any]) -> None:
    """Raises HandoffError if the model of --init_from is none of a context of --seq_len tokens."""
    pretrained = ckpt.get("pretrained") or {}  # of tools/import_hf.py
    fact = f"--seq_len {args.seq_len}: {args.init_from}"
    longest = cfg.seq_len if cfg.learned_positions else pretrained.get("longest", args.seq_len)
    advice = "import it with the context that you want: python tools/import_hf.py MODEL DIR"
    if args.seq_len > longest:
        raise HandoffError(f"{fact} has {longest} positions, expected no more; or {advice}")
    if pretrained.get("length_dependent") and args.seq_len != cfg.seq_len:
        expected = f"rotates by what belongs to a context of {cfg.seq_len}, expected that"
        raise HandoffError(f"{fact} {expected}; or {advice}")


def new_model(args: argparse.Namespace, vocab_size: int) -> NewGPT:
    """A freshly initialised model of the sizes in `args`."""
    cfg = GPTConfig(
        vocab_size=vocab_size,
        n_layers=args.n_layers,
        d_model=args.d_model,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        d_head=args.d_model // args.n_heads,
        d_ff=args.d_ff,
        seq_len=args.seq_len,
        tied=args.tied,
        dropout=args.dropout,
    )
    return NewGPT(cfg)


def new_optimizer(model: NewGPT, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() < 2]
    # Two groups, which differ in the decay alone
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    fused = model.embedding.weight.device.type != "mps"
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=fused)


def prepare(args: argparse.Namespace) -> Training:
    """Text, model, optimiser and controller of a new run."""
    keep_memory()
    device, autocast = set_up(args)
    # A pretrained model brings its tokenizer, so it is opened before the text
    model, origin = start_from(args) if args.init_from else (None, {"bos": None})
    bos = origin["bos"]
    with rank_0_first():  # it fills the cache
        source = (args.dataset, args.tokenizer, args.seq_len)
        train = HFWikiTextLoader(*source, "train", args.cache_dir, bos)
        validation = HFWikiTextLoader(*source, "validation", args.cache_dir, bos)
    if model is None:
        model = new_model(args, count_ids(train.tokenizer))
    need_rows(count_ids(train.tokenizer), model.cfg.vocab_size, args.init_from)
    model = model.to(device).train()
    pressure = Pressure(args)
    facts = {
        "arm": args.pressure.partition(":")[0],
        "preset": args.preset,
        "seed": args.seed,
        "dataset": args.dataset,
        "data": train.description,
        "arguments": trajectory(args),
        "contents": contents(args, train.description),
        "initial": weights_hash(model),
        **origin,
    }
    optimizer = new_optimizer(model, args)
    return Training(args, model, optimizer, pressure, train, validation, device, autocast, facts)


def weights_hash(model: NewGPT) -> str:
    """Tells whether two runs began with the same weights."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def pays_to_compile(training: Training) -> bool:
    """Whether torch.compile is used, by --compile; auto: on a GPU, and on a CPU with a compiler
    in bfloat16, whose casts it saves, where the run has many minutes of work."""
    args = training.args
    _, n_inner = training.model.n_params()
    # 2 FLOPs a parameter and token forward, 4 backward
    flops = 6 * n_inner * args.steps * tokens_per_step(args)
    # Compiling takes a core up to a minute. In float32 a step then takes 6 to 12 % longer, in
    # bfloat16 a seventh less (preset demo, two CPU cores)
    is_long = training.autocast._enabled and flops > 1e14
    pays = training.device.type == "cuda" or (shutil.which("c++") is not None and is_long)
    return args.compile == "on" or (args.compile == "auto" and pays)


def announce(training: Training) -> None:
    """Prints sizes and cost, measured on one micro-batch that leaves no trace.

    Raises HandoffError if the disk is too small.
    """
    args = training.args
    model = training.model
    n_total, n_inner = model.n_params()
    # Three checkpoints, a temporary and the final one, each of float32 weights and two moments
    n_bytes = 5 * 12 * n_total
    need_disk(args.save_dir, n_bytes)

    # The same window over and over: only its time matters
    x, y = training.train.batch(np.zeros(args.batch_size, np.int64))
    batches = [(x.to(training.device), y.to(training.device))]
    weights = torch.ones(args.n_layers, device=training.device)

    def step() -> None:
        training_step(model, batches, weights, args, training.autocast, measure=True)
        model.zero_grad(set_to_none=True)

    with torch.random.fork_rng():
        seconds = choose_threads(step, args.threads)
        if pays_to_compile(training):
            for module in (*model.blocks, model.loss):
                module.compile()
            step()  # compiles
            seconds = seconds_of(step)

    # What is trained, on what, and what it will take
    dtype = "bfloat16" if training.autocast._enabled else "float32"
    sizes = f"{n_total / 1e6:.2f}M parameters, {n_inner / 1e6:.2f}M without embeddings"
    print(f"model: {sizes}, on {training.device} in {dtype}")
    text = training.train.description
    vocabulary = f"tokenizer {text['tokenizer_hash']}, {model.cfg.vocab_size:,} kinds"
    print(f"data: {text['dataset_key']}, {text['n_tokens']:,} training tokens; {vocabulary}")
    # A validation only goes forward: a third of a step for as many tokens
    n_checks = len({*range(args.val_interval, args.steps, args.val_interval), args.steps})
    n_tokens = len(training.validation.spread(args.val_windows)) * args.seq_len  # of each of them
    n_validation = n_checks * n_tokens / 3 / x.numel()  # in steps of one micro-batch
    n_steps = args.steps * args.grad_accum + n_validation
    time_left = duration(seconds * n_steps / rank_and_world()[1])
    work = f"{args.steps} steps, {args.steps * tokens_per_step(args):,} tokens"
    disk = f"up to {n_bytes / 1e9:.2f} GB in {args.save_dir}"
    print(f"cost: {work}, about {time_left}; {disk}", flush=True)


def run(args: argparse.Namespace) -> int:
    """One training run, from the text to the final checkpoint and its figure."""
    csv = args.save_dir / "telemetry.csv"
    if args.redraw:
        draw_training(args.redraw, args.target_sigma, args.save_dir / "training.png")
        return 0
    final = args.save_dir / f"janus_{args.pressure.partition(':')[0]}_final.pt"
    if args.resume and is_finished(final, args):
        return 0
    # An earlier run in this folder is only replaced on demand
    old_checkpoints = sorted(args.save_dir.glob("ckpt_*.pt*"))
    if not args.resume:
        refuse_overwrite([final, csv, *old_checkpoints], args.overwrite)
    if Path(args.dataset).exists():  # later phases may be started in another folder
        args.dataset = str(Path(args.dataset).resolve())

    training = prepare(args)
    announce(training)

    # Rank 0 alone writes
    rank, _ = rank_and_world()
    recording: Any = contextlib.nullcontext({}) if rank else run_record(args.save_dir, args)
    with recording as record:
        if rank == 0 and not args.resume:
            by_window = args.save_dir / "validation.csv"  # written at the end
            initial = final.with_name(initial_name(final))
            ends = [final, sidecar_path(final), initial, sidecar_path(initial)]
            for path in (*ends, by_window, *old_checkpoints):
                path.unlink(missing_ok=True)
        # From here on a signal ends the run after its step, with a checkpoint
        with noting_signals() as signals:
            if args.resume:
                resume(training)
            if rank == 0 and args.save_initial and training.steps_done == 0:
                save_checkpoint(final.with_name(initial_name(final)), training, 0)
            if rank == 0:
                with atomic(args.save_dir / "tokenizer.json") as temporary:
                    training.train.tokenizer.save(str(temporary))
            record["exit_status"] = train_model(training, signals)
        if rank == 0 and not record["exit_status"]:
            tell_end(args, final, csv)
    return record["exit_status"] or 0


def initial_name(final: Path) -> str:
    """janus_<arm>_initial.pt: the model before its first step."""
    return final.name.replace("_final", "_initial")


def tell_end(args: argparse.Namespace, final: Path, csv: Path) -> None:
    """The last line and the figure of a run, both from its CSV."""
    # The numbers first: a picture may fail
    end = read_telemetry(csv).iloc[-1]
    sigmas = f"sigma_z {end['val_sigma_z']:.5f}, sigma_resid {end['val_sigma_resid']:.5f}"
    print(f"{final}: validation loss {end['val_loss']:.4f} nats a token, {sigmas}", flush=True)
    redraw = ["janus_adaptive.py", "--redraw", csv, "--save_dir", args.save_dir]
    with drawing([final, csv], [*redraw, "--target_sigma", args.target_sigma]):
        draw_training([csv], args.target_sigma, args.save_dir / "training.png")


# ------------------------------------------------------------------------------- tables and figures
def telemetry_row(
    step: int,
    args: argparse.Namespace,
    loss: float,
    grad_norm: float,
    grams: Tensor | None,
    lambdas: list[float],
    pressure: Pressure,
) -> dict[str, Any]:
    """One row of telemetry.csv: values in use at `step`, before the controller sees its sigma."""
    sigmas = sigma_of(grams).tolist()  # type: ignore[arg-type]
    mean_sigma = sum(sigmas) / len(sigmas)
    loops = pressure.loops
    filtered = []  # before this sample
    for loop in loops:
        if loop.filtered is not None:
            filtered.append(math.exp(loop.filtered) if loop.log else loop.filtered)

    def mean_term(term: str) -> float:
        """P, I or D, mean over the loops; none while the loop is open."""
        if pressure.phase not in ("auto", "hold"):
            return math.nan
        return sum(vars(loop)[term] for loop in loops) / len(loops)

    return {
        "step": step,
        "tokens": step * tokens_per_step(args),  # seen so far
        "loss": loss,  # of the training batch, nats a token
        "val_loss": math.nan,  # filled in where the step validates
        "perplexity": math.nan,
        # The controller: what was in use, mean over the loops
        "lambda": sum(lambdas) / len(lambdas),
        "P": mean_term("p"),
        "I": mean_term("i"),
        "D": mean_term("d"),
        "saturated": int(any(loop.saturated for loop in loops)),
        "phase": pressure.phase,
        "setpoint": setpoint(step, args),
        # What it sees of this sample; sigma_filtered is from before it
        "sigma_z": mean_sigma if args.sigma_space == "z" else math.nan,
        "sigma_resid": mean_sigma if args.sigma_space == "resid" else math.nan,
        "max_layer_sigma": max(sigmas),
        "worst_layer": sigmas.index(max(sigmas)),
        "sigma_filtered": sum(filtered) / len(filtered) if filtered else math.nan,
        "lr": learning_rate(step, args),
        "grad_norm": grad_norm,
    }


def write_tables(training: Training) -> None:
    """telemetry.csv and layers.csv, whole."""
    tables = {"telemetry.csv": training.telemetry, "layers.csv": training.layers}
    for name, rows in tables.items():
        with atomic(training.args.save_dir / name) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)


def write_validation(training: Training) -> None:
    """validation.csv: of each window that was validated, the number of the document where it
    begins, and its loss in nats a token. Arms that share the text are paired by these rows."""
    windows = training.validation.spread(training.args.val_windows)
    # A document of many windows is one unit: their losses are alike
    table = {
        "window": windows,
        "document": training.validation.documents(windows)[:, 0],  # of [W, T]
        "loss_nats": training.window_loss,
    }
    with atomic(training.args.save_dir / "validation.csv") as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)


def open_board(args: argparse.Namespace) -> Any:
    """A TensorBoard writer in <save_dir>/tensorboard."""
    folder = args.save_dir / "tensorboard"
    return import_module("torch.utils.tensorboard").SummaryWriter(str(folder))


def show_live(board: Any, step: int, row: dict[str, Any], grams: Tensor | None) -> None:
    """One row of telemetry to TensorBoard; the cosines between heads as a histogram, and their
    absolute values as an image a layer."""
    for name, value in row.items():
        if isinstance(value, int | float) and math.isfinite(value):
            board.add_scalar(name, value, step)
    if grams is not None:
        inverse_norm = grams.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).rsqrt()  # [L, H]
        cosines = grams * inverse_norm[:, :, None] * inverse_norm[:, None]  # [L, H, H]
        board.add_histogram("cosines between heads", head_cosines(grams), step)
        images = cosines.abs()[:, None]  # [L, 1, H, H]
        board.add_images("abs(cosine) between heads, by layer", images, step)
    board.flush()  # so that a running TensorBoard shows it


def read_telemetry(path: str | Path) -> pd.DataFrame:
    """A telemetry.csv of this script; HandoffError if it is not one."""
    try:
        frame = pd.read_csv(path)
        # Raises if a column is missing, or any but the phase holds no numbers
        frame[["step", "lambda", "sigma_z", "loss", "val_loss"]]
        frame.drop(columns="phase", errors="ignore").astype(float)
        if frame["lambda"].isna().any() or not len(frame):
            raise ValueError("no rows, or rows without lambda")
    except (OSError, ValueError, KeyError) as e:
        fact = f"{path} is not a telemetry.csv ({e})"
        raise HandoffError(f"{fact}; it is written by: python janus_adaptive.py") from None
    return frame


ARM_COLOURS = {"adaptive": "#D55E00", "control": "#0072B2"}  # Okabe & Ito: safe if colour-blind
OTHER_COLOURS = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


@dataclass
class Curve:
    """One run in the figure of the training: its name, its telemetry, its colour."""

    label: str
    table: pd.DataFrame
    colour: str

    @property
    def thin(self) -> dict[str, Any]:
        """Style of a line through samples; pixels where they are thousands, in SVG too."""
        is_long = len(self.table) > 3000
        return {"color": self.colour, "lw": 0.8, "alpha": 0.5, "rasterized": is_long}

    @property
    def sigma(self) -> pd.Series:
        """What the Homeostat measures: one of the two columns is filled."""
        return self.table[self.table.columns.intersection(["sigma_z", "sigma_resid"])].max(axis=1)


def draw_training(csvs: list[str | Path], target: float, out: Path) -> None:
    """The figure of the training, one colour a run (labelled by its folder); from CSVs alone."""
    curves = []
    colours = iter(OTHER_COLOURS * len(csvs))
    folders = [Path(path).resolve().parent for path in csvs]
    names = [folder.name for folder in folders]
    for i, (path, folder) in enumerate(zip(csvs, folders, strict=True)):
        # Runs are told apart by the folders they lie in, A/adaptive from B/adaptive too
        is_alone = len({other for other in folders if other.name == folder.name}) == 1
        name = folder.name if is_alone else f"{folder.parent.name}/{folder.name}"
        # The arms keep their colours in every figure, the first of each
        own = None if folder.name in names[:i] else ARM_COLOURS.get(folder.name)
        curves.append(Curve(as_label(name), read_telemetry(path), own or next(colours)))
    save_figure(lambda is_stacked: training_figure(curves, target, is_stacked), out)


def training_figure(curves: list[Curve], target: float, is_stacked: bool) -> Any:
    """Loss, sigma and, where they say something, the difference of two losses and lambda, against
    steps. target: the setpoint of files that have no such column."""
    import matplotlib.pyplot as plt

    # The control arm alone has no penalty to draw
    pressed = [curve for curve in curves if (curve.table["lambda"] > 0).any()]
    panels: list[Callable[[Any], None]] = [lambda ax: draw_loss(ax, curves)]
    note = "Thin: samples; dots: the validation split."
    if len(curves) == 2:
        # What pressure costs: adaptive - control, in whatever order they are given
        is_reversed = curves[0].label == "control"
        first, second = reversed(curves) if is_reversed else curves
        panels.append(lambda ax: draw_difference(ax, first, second))
        note = "Thin: samples, in the difference smoothed; dots: the validation split."
    # What the loop measures, and what it answers
    panels.append(lambda ax: draw_sigma(ax, curves, target))
    if pressed:
        panels.append(lambda ax: draw_lambda(ax, pressed, target))

    # In rows of two or three, or below one another
    across = 1 if is_stacked else {2: 2, 3: 3, 4: 2}[len(panels)]
    down = len(panels) // across
    width = {2: 9.4, 3: 12.6, 4: 10.4}[len(panels)]  # inches
    size = (4.5, 2.9 * down + 0.5) if is_stacked else (width, 3.2 * down)
    fig, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for ax, draw in zip(axes.flat, panels, strict=True):
        draw(ax)
        ax.set_xlabel("optimiser step")
    if pressed:
        note += " Thick: what the controller acts on, sigma filtered."
    fig.supxlabel(textwrap.fill(note, 60 if is_stacked else 130), fontsize=8.5)
    return fig


def draw_loss(ax: Any, curves: list[Curve]) -> None:
    """Panel: the loss of every run."""
    for curve in curves:
        table = curve.table
        # Validations are rarer than samples, so their rows are picked out
        checks = table[["step", "val_loss"]].dropna()
        ax.plot(table["step"], table["loss"], **curve.thin)
        dots: dict[str, Any] = {"color": curve.colour, "marker": "o", "ms": 4}
        ax.plot(checks["step"], checks["val_loss"], label=curve.label, **dots)
    ax.set_title("Loss")
    ax.set_ylabel("cross-entropy (nats a token)")
    ax.legend(fontsize=9)


def draw_difference(ax: Any, first: Curve, second: Curve) -> None:
    """Panel: loss of one run minus that of the other, where both have a sample or a validation."""
    both = first.table.merge(second.table, on="step", suffixes=("", "_other"))
    difference = both["loss"] - both["loss_other"]
    # Both arms see the same batches, so most of the noise of a batch is gone; the rest is averaged
    n_samples = max(1, len(both) // 20)
    smooth = difference.rolling(n_samples, center=True, min_periods=1).mean()
    ax.plot(both["step"], smooth, color="black", lw=0.8)
    # The validation split needs no smoothing
    checks = both.assign(difference=both["val_loss"] - both["val_loss_other"])
    checks = checks[["step", "difference"]].dropna()
    ax.plot(checks["step"], checks["difference"], color="black", marker="o", ms=4)
    ax.axhline(0, color="0.5", lw=0.8, ls="--")
    ax.set_title(f"Loss: {first.label} minus {second.label}")
    ax.set_ylabel(f"difference (nats a token,\nmean of {n_samples} samples)")


def draw_sigma(ax: Any, curves: list[Curve], target: float) -> None:
    """Panel: sigma of every run, the setpoint, and when each loop closed and settled."""
    for curve in curves:
        table = curve.table.assign(sigma=curve.sigma)
        samples = table[["step", "sigma"]].dropna()
        ax.plot(samples["step"], samples["sigma"], **curve.thin)
        # What the controller acts on; the column came later
        if "sigma_filtered" in table:
            filtered = table[["step", "sigma_filtered"]].dropna()
            ax.plot(filtered["step"], filtered["sigma_filtered"], color=curve.colour, lw=1.8)
        # Over the validation split, so with less noise of sampling
        whole = "val_sigma_z" if table["sigma_z"].notna().any() else "val_sigma_resid"
        if whole in table:
            ax.plot(table["step"], table[whole], color=curve.colour, marker="o", ms=4, ls="")

    # What heads without any likeness would show on so few tokens; the column came later
    for curve in curves:
        floor = curve.table.get("sigma_floor", pd.Series(math.nan)).dropna()
        if len(floor):
            name = f"by chance {floor.iloc[-1]:.2g}"
            ax.axhline(floor.iloc[-1], color="0.45", ls=(0, (1, 2)), lw=1.2, label=name)
            break  # the arms are sampled alike

    # Only a loop has a setpoint to hold; a file from before the column of phases may be one
    for curve in curves:
        phases = set(curve.table.get("phase", ["auto"]))
        is_loop = phases & {"warmup", "auto", "hold"} and (curve.table["lambda"] > 0).any()
        if not is_loop:
            continue
        aims = setpoints(curve.table, target)
        name = f"setpoint {aims.iloc[-1]:g}"
        ax.step(curve.table["step"], aims, color="black", ls="--", where="post", lw=1, label=name)
        mark_loop(ax, curve, target, has_text=True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9)
    ax.set_title("σ: how alike the heads are", pad=16)
    ax.set(ylabel="σ, mean |cosine| between heads", yscale="log")
    use_plain_numbers(ax.yaxis)


def draw_lambda(ax: Any, pressed: list[Curve], target: float) -> None:
    """Panel: the weight of the penalty of every run that has one."""
    for curve in pressed:
        # A logarithmic axis has no 0
        shown = curve.table["lambda"].where(curve.table["lambda"] > 0)
        ax.plot(curve.table["step"], shown, color=curve.colour, lw=1.2)
        mark_loop(ax, curve, target, has_text=False)
    ax.set_title("λ: the weight of the penalty", pad=16)
    ax.set(ylabel="λ (none: control)", yscale="log")
    use_plain_numbers(ax.yaxis)


def setpoints(table: pd.DataFrame, target: float) -> pd.Series:
    """The setpoint of each row; a file from before the column has one, `target`."""
    return table["setpoint"] if "setpoint" in table else target + 0.0 * table["step"]


def loop_steps(table: pd.DataFrame, target: float) -> tuple[float, float]:
    """When the loop of a run closed, and when it settled: the first step from then on whose
    filtered sigma is within 10 % of the setpoint. NaN where there was none, or no such column."""
    if not {"phase", "sigma_filtered"} <= set(table):
        return math.nan, math.nan
    # Before that phase lambda follows a ramp, whatever sigma is
    relative = table["sigma_filtered"] / setpoints(table, target)
    is_closed = table["phase"] == "auto"
    is_within = is_closed & ((relative - 1).abs() <= 0.10)
    return table["step"][is_closed].min(), table["step"][is_within].min()


def mark_loop(ax: Any, curve: Curve, target: float, has_text: bool) -> None:
    """Lines where the loop of a run closed and settled, with words above the panel."""
    closed, settled = loop_steps(curve.table, target)
    # The words stand on either side, so that two close lines can be told apart
    marks = {"closed": (closed, "right", -2), "settled": (settled, "left", 2)}
    for what, (step, side, points) in marks.items():
        if math.isnan(step):
            continue
        ax.axvline(step, color=curve.colour, ls=":", lw=1.2)
        words = f"loop {what} at {step:g}"
        if what == "closed" and math.isnan(settled):
            words += "; never settled"
            side = "left"
        above: dict[str, Any] = {"xytext": (points, 3), "textcoords": "offset points"}
        if has_text:
            place = ax.get_xaxis_transform()
            ax.annotate(words, (step, 1), xycoords=place, ha=side, fontsize=8.5, **above)


def use_plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers: 1, 2, 5, 10, ...; powers of ten where there
    are many."""
    from matplotlib import ticker

    # Over three decades more than one number a decade would be too many
    low, high = axis.get_view_interval()
    steps = [1.0, 2.0, 5.0] if high < 1000 * low else [1.0]
    axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the sizes of --preset where a flag is not given."""
    parser = build_parser()
    # --preset is read first: it sets the defaults of other flags
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="full")
    preset = first.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def build_parser() -> argparse.ArgumentParser:
    """All flags, by groups."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_file_flags(parser)
    add_model_flags(parser)
    add_method_flags(parser)
    add_optimisation_flags(parser)
    add_runtime_flags(parser)
    return parser


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """What is read and written."""
    count = positive(int)
    data = "WikiText, builtin, or a .txt/.parquet/.jsonl file or saved folder"
    tokens = "gpt2, a hub name, folder or tokenizer.json, or train:N; auto: gpt2 or train:4096"
    init = "start from a checkpoint or pretrained model, with its sizes"
    again = "continue from the newest checkpoint in --save_dir; equals an uninterrupted run"
    redraw = "only redraw training.png in --save_dir from these telemetry files"
    board = "also log to <save_dir>/tensorboard (needs the package tensorboard)"
    folder = Path("checkpoints/v1")
    inputs = parser.add_argument_group("inputs")
    add = inputs.add_argument
    add("--dataset", default="wikitext-103-raw-v1", help=data)
    add("--tokenizer", default="auto", help=tokens)
    add("--init_from", type=model_name, metavar="MODEL", help=init)
    add_bos_flag(inputs)
    add("--resume", action="store_true", help=again)
    add("--redraw", nargs="+", metavar="CSV", help=redraw)
    add = parser.add_argument_group("outputs").add_argument
    add("--save_dir", type=Path, default=folder, help="output folder")
    add("--save_interval", type=count, help="steps between checkpoints")
    before = "also write the model before its first step, as janus_<arm>_initial.pt"
    spread = "windows of each validation, spread evenly over the split; 0: all"
    add("--save_initial", action="store_true", help=before)
    add("--tensorboard", action="store_true", help=board)
    add("--val_interval", type=count, help="steps between validations")
    add("--val_windows", type=integer, help=spread)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes of NewGPT."""
    count = positive(int)
    preset = "sizes; explicit flags beat it; defaults shown are its own"
    # The sizes have no default here: --preset sets them
    shared = "key/value heads a layer (grouped queries); 0: as many as heads"
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(PRESETS), default="full", help=preset)
    add("--n_layers", type=count, help="number of blocks")
    add("--d_model", type=count, help="width of the residual stream, dimensions")
    add("--n_heads", type=count, help="heads a layer")
    add("--n_kv_heads", type=integer, default=0, help=shared)
    add("--d_ff", type=count, help="width of the SwiGLU hidden layer, dimensions")
    add("--seq_len", type=count, help="context, tokens")
    add("--dropout", type=finite, default=0.0, help="dropout probability")
    add("--tied", action=yes_no, default=True, help="unembedding = embedding")


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Penalty and controller."""
    count = positive(int)
    real = positive(float)
    pressure = "adaptive, control, constant:LAMBDA or replay:TELEMETRY.csv"
    target = "setpoint of sigma, mean absolute cosine between heads"
    moved = "from optimiser step STEP on, hold SIGMA instead: how well does the loop follow?"
    sampled = "steps, the last ones before a sample, whose tokens it is measured on"
    space = "where: head outputs, or what heads write to the stream"
    penalty = "; ".join(f"{name}: {first_words(f)}" for name, f in PENALTIES.items())
    # Gains are per step, so they do not change with --control_interval
    law = "control law, on logarithms of sigma and lambda or on them"
    k_p = "proportional gain (log: per e-fold of sigma; linear: lambda per unit of sigma)"
    memory = "memory of the filter on sigma, share per sample, 0 (none) to below 1"
    ramp = "steps of the open-loop ramp of lambda, before the loop closes"
    limit = "upper limit of lambda; the lower one is 1e-5 (log) or 0 (linear)"
    layers = "of the penalty: 1, or ((l+1)/L)^3"
    add = parser.add_argument_group("method: pressure and Homeostat").add_argument
    add("--pressure", default="adaptive", help=pressure)
    add("--target_sigma", type=real, default=0.0035, help=target)
    add("--setpoint_step", nargs=2, type=real, metavar=("STEP", "SIGMA"), help=moved)
    add("--sigma_space", choices=["z", "resid"], default="z", help=space)
    add("--penalty", choices=list(PENALTIES), default="cos2", help=penalty)
    add("--layer_weights", choices=["uniform", "cubic"], default="uniform", help=layers)
    add("--law", choices=["log", "linear"], default="log", help=law)
    add("--k_p", type=finite, default=0.9, help=k_p)
    add("--k_i", type=finite, default=0.003, help="integral gain, as k_p but per step")
    add("--k_d", type=finite, default=0.0, help="derivative gain, as k_p times steps")
    add("--control_interval", type=count, default=10, help="steps between two samples of sigma")
    add("--sample_steps", type=count, default=1, help=sampled)
    add("--filter_beta", type=finite, default=0.9, help=memory)
    add("--pressure_warmup", type=integer, help=ramp)
    add("--lambda_start", type=finite, default=1.0, help="lambda at the end of the ramp")
    add("--lambda_max", type=real, default=1e4, help=limit)
    add("--per_layer", action="store_true", help="one loop and one lambda a layer")


def first_words(function: Callable) -> str:
    """What the docstring of an entry of a table says before its colon."""
    return (function.__doc__ or "").partition(":")[0]


def add_optimisation_flags(parser: argparse.ArgumentParser) -> None:
    """AdamW, its schedule, and how a step is computed."""
    count = positive(int)
    real = positive(float)
    warmup = "steps of linear learning-rate warm-up; -1: a twentieth of --steps"
    schedules = ["cosine", "wsd", "constant"]
    shapes = "cosine: to 10 %%; wsd: last fifth to 0"
    clip = "gradient norm above which gradients are scaled down"
    compiled = "torch.compile blocks and loss; auto: where it pays"
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=count, help="optimiser steps")
    add("--batch_size", type=count, help="sequences a micro-batch")
    add("--grad_accum", type=count, help="micro-batches a step")
    add("--learning_rate", type=real, help="peak learning rate of AdamW")
    add("--lr_warmup", type=integer, default=-1, help=warmup)
    add("--schedule", choices=schedules, default="cosine", help=shapes)
    add("--weight_decay", type=finite, default=0.1, help="AdamW weight decay, of matrices")
    add("--grad_clip", type=real, default=1.0, help=clip)
    add("--compile", choices=["auto", "on", "off"], default="auto", help=compiled)


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks (exit 2 with one line), and the defaults that follow from other flags."""
    # Defaults that depend on another flag
    args.n_kv_heads = args.n_kv_heads or args.n_heads
    if args.lr_warmup < 0:
        args.lr_warmup = args.steps // 20

    # What cannot work, with the reason
    if args.tensorboard and find_spec("tensorboard") is None:
        advice = "pip install tensorboard (the CSVs have the same numbers without it)"
        parser.error(f"--tensorboard needs a package: {advice}")
    _, world = rank_and_world()
    if args.grad_accum % world:
        fact = f"--grad_accum {args.grad_accum} must be a multiple of the {world} processes"
        parser.error(f"{fact}, which share the micro-batches of a step")
    if not is_pressure(args.pressure):
        arms = "adaptive, control, constant:LAMBDA (a number from 0) or replay:TELEMETRY.csv"
        parser.error(f"--pressure {args.pressure}: expected {arms}")
    # Rotary positions turn pairs of dimensions
    heads = f"--n_heads {args.n_heads}"
    if args.d_model % args.n_heads or args.d_model // args.n_heads % 2:
        parser.error(f"--d_model {args.d_model} must be {heads} times an even number")
    if args.n_heads < 2 or args.n_kv_heads < 1 or args.n_heads % args.n_kv_heads:
        multiple = f"a multiple of --n_kv_heads {args.n_kv_heads}"
        parser.error(f"{heads} must be at least 2 and {multiple}")
    if not 0 <= args.filter_beta < 1 or not 0 <= args.dropout < 1:
        shares = f"--filter_beta {args.filter_beta} and --dropout {args.dropout}"
        parser.error(f"{shares} must lie in [0, 1)")
    if args.sample_steps > args.control_interval:
        fact = f"--sample_steps {args.sample_steps}: expected at most --control_interval"
        parser.error(f"{fact} {args.control_interval}")
    gains = (args.k_p, args.k_i, args.k_d)
    counts = (args.pressure_warmup, args.val_windows)
    if not min(*gains, *counts, args.lambda_start, args.weight_decay) >= 0:
        others = "--pressure_warmup, --lambda_start, --weight_decay and --val_windows"
        parser.error(f"gains, {others} must not be negative")
    if args.bos != "auto" and not args.init_from:
        parser.error(f"--bos {args.bos} needs --init_from: a fresh model has no BOS token")
    if args.tokenizer.startswith("train:"):
        args.tokenizer = f"train:{trained_size(parser, args.tokenizer)}"


def model_name(text: str) -> str:
    """A name that is not empty: `--init_from "$MODEL"` must not train a fresh model."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected a checkpoint, a hub name or a folder")
    return text


def trained_size(parser: argparse.ArgumentParser, tokenizer: str) -> int:
    """N of --tokenizer train:N; exits 2 with one line if it is no vocabulary's size."""
    size = 0
    with contextlib.suppress(ValueError):
        size = integer(tokenizer.removeprefix("train:"))
    if size <= 256:
        parser.error(f"--tokenizer {tokenizer}: expected train:N with N above 256 tokens")
    return size


def is_pressure(text: str) -> bool:
    """Whether --pressure names an arm, with a value where the arm takes one."""
    arm, _, value = text.partition(":")
    if arm in ("adaptive", "control"):
        return not value
    if arm == "constant":
        try:
            return 0 <= float(value) < math.inf
        except ValueError:
            return False
    return arm == "replay" and bool(value)


# ----------------------------------------------------------------------------------- shared regions
# >>> shared: cosines ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def head_cosines(grams: Tensor) -> Tensor:
    """Gram matrices [..., H, H] -> cosine of every pair of heads [..., H(H-1)/2]; the diagonal
    is never formed."""
    inverse_norm = grams.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).rsqrt()  # [..., H]
    cosines = grams * inverse_norm[..., :, None] * inverse_norm[..., None, :]  # [..., H, H]
    n_heads = grams.shape[-1]
    i, j = torch.triu_indices(n_heads, n_heads, 1, device=grams.device)
    return cosines[..., i, j]


# <<< shared: cosines


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

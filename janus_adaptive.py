"""Train NewGPT while a Homeostat holds the similarity of its attention heads at a setpoint (phase 1 of Janus Arc).

Question: what does it cost, and what does it change, to keep the heads of a transformer decorrelated while it learns?
sigma is the mean absolute cosine between the outputs z of a layer's heads. A PID controller raises or relaxes a
decorrelation penalty so that sigma stays at --target_sigma. --pressure selects the arm: adaptive, control (none),
constant:LAMBDA, or replay:TELEMETRY.csv (the yoked arm: the lambda of another run, without the feedback).

Reads   text: --dataset (WikiText from the Hugging Face hub, a local file or folder, or `builtin`)
Writes  <save_dir>/janus_<arm>_final.pt   weights, optimiser, controller, random states, golden probe; sidecar .pt.json
        <save_dir>/ckpt_<step>.pt         the last three, for --resume
        <save_dir>/tokenizer.json         read by every later phase
        <save_dir>/telemetry.csv          a row every --control_interval steps; METRICS.md explains each column
        <save_dir>/layers.csv             per layer at every validation;  training.png, run.json

Quick   python janus_adaptive.py --preset smoke --dataset builtin --save_dir checkpoints/smoke     (a minute on two CPU cores)
Full    python janus_adaptive.py --save_dir ./checkpoints/v1 --target_sigma 0.0035   (84.9M parameters without embeddings,
        131M tokens of WikiText-103; meant for a GPU. Each run prints its time, memory and disk for this machine first.)

Shapes  B batch, T tokens, D d_model, H heads, K d_head, L layers, V vocabulary.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import functools
import gc
import hashlib
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

# Sizes; every preset takes the same code path, and a flag given explicitly beats the preset. `published` is the
# configuration of the original study (Belanger 2026), its control law included.
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(n_layers=12, d_model=768, n_heads=12, d_ff=2048, seq_len=512, batch_size=4, grad_accum=16, steps=4000,
                 learning_rate=6e-4, pressure_warmup=400, val_interval=500, save_interval=500),
    "published": dict(n_layers=12, d_model=512, n_heads=8, d_ff=1365, seq_len=512, batch_size=16, grad_accum=4, steps=4005,
                      learning_rate=6.29e-4, schedule="constant", lr_warmup=0, weight_decay=1.34e-4, dropout=0.05, penalty="fro",
                      layer_weights="cubic", law="linear", k_p=0.0, k_i=0.01, control_interval=50, filter_beta=0.0,
                      pressure_warmup=1500, lambda_start=0.05, lambda_max=0.25, val_interval=500, save_interval=500),
    "demo": dict(n_layers=6, d_model=192, n_heads=6, d_ff=512, seq_len=128, batch_size=16, grad_accum=1, steps=600,
                 learning_rate=3e-3, pressure_warmup=60, val_interval=200, save_interval=200),
    "smoke": dict(n_layers=12, d_model=48, n_heads=3, d_ff=128, seq_len=64, batch_size=8, grad_accum=1, steps=60,
                  learning_rate=3e-3, pressure_warmup=10, val_interval=60, save_interval=20),
}  # fmt: skip


# -------------------------------------------------------------------------------- method: edit here
def head_gram(z: Tensor, w_o: Tensor | None = None) -> Tensor:
    """Inner products [H, H] of the heads' outputs z [B, T, H, K], flattened over batch, tokens and d_head; float32.

    With the output projection w_o [D, H*K]: of what the heads write to the residual stream, o_h = z_h W_O,h, without
    forming it: <o_i, o_j> = sum((z_i^T z_j) * (W_O,i W_O,j^T)). Unlike z, o does not depend on the basis that a head
    happens to use for its values. Gram matrices add up over batches, so sigma of a step does not depend on their size.
    """
    with torch.autocast(
        z.device.type, enabled=False
    ):  # bfloat16 could not tell cosines of 0.0035 apart near a diagonal of 1
        if w_o is None:
            flat = z.float().permute(2, 0, 1, 3).flatten(1)
            return flat @ flat.T
        flat = z.float().flatten(0, 1).flatten(1)
        products = (flat.T @ flat) * (w_o.float().T @ w_o.float())
        return products.unflatten(0, z.shape[2:]).unflatten(2, z.shape[2:]).sum((1, 3))


def sigma_of(grams: Tensor) -> Tensor:
    """sigma of each layer [L]: mean absolute cosine over the pairs of heads, from Gram matrices [L, H, H]."""
    return head_cosines(grams).abs().mean(-1)


def decorrelation_penalty(grams: Tensor, kind: str) -> Tensor:
    """Penalty of each layer [L]: mean cos^2 (cos2), mean |cos| (abs), or ||cosines - I||_F (fro, the published one)."""
    cos = head_cosines(grams)
    if kind == "fro":
        return (2 * cos.square().sum(-1)).clamp_min(1e-20).sqrt()
    return cos.square().mean(-1) if kind == "cos2" else cos.abs().mean(-1)


class Homeostat:
    """PID controller: measured head similarity sigma in, penalty weight lambda out.

    law "log" works on e = ln(sigma/target) and u = ln(lambda), where the gain of the loop is the same at every level;
    law "linear" on e = sigma - target and u = lambda, and is then simple_pid.PID with its gains negated.
        u = k_p e + I + k_d de/dt,   I += k_i e dt,   u clipped to the limits
    The derivative acts on the measurement (no kick on a setpoint step); a first-order filter smooths the measurement;
    back-calculation ("tracking") or clamping of I prevents wind-up; a sample that is not finite is held, not integrated.
    Gains are per optimiser step, dt is in steps. All state is Python floats: in bfloat16 a slow integral rounds to nothing.
    (Astrom & Hagglund 2006; as a Lagrange multiplier: Stooke et al. 2020.)
    """

    def __init__(self, target: float, k_p: float, k_i: float, k_d: float, law: str = "log", dt: float = 10.0, filter_beta: float = 0.0,
                 limits: tuple[float, float] = (1e-5, 1e4), anti_windup: str = "tracking") -> None:  # fmt: skip
        self.k_p, self.k_i, self.k_d, self.dt, self.beta, self.anti_windup = (
            k_p,
            k_i,
            k_d,
            dt,
            filter_beta,
            anti_windup,
        )
        self.log = law == "log"
        self.setpoint, self.low, self.high = (
            math.log(v) if self.log else v for v in (target, *limits)
        )
        self.filtered: float | None = None
        self.p = self.i = self.d = self.value = 0.0
        self.saturated, self.held = False, 0

    def measure(self, sigma: float) -> float | None:
        """Takes one sample of sigma into the filter -> its slope per step, or None if the sample is unusable."""
        if not math.isfinite(sigma) or (self.log and sigma <= 0):
            self.held += 1
            return None
        sample = math.log(sigma) if self.log else sigma
        before = sample if self.filtered is None else self.filtered
        self.filtered = self.beta * before + (1 - self.beta) * sample
        return (self.filtered - before) / self.dt

    def hand_over(self, value: float) -> None:
        """Bumpless start of closed-loop control at lambda = `value`: the integral takes up what P does not give."""
        error = 0.0 if self.filtered is None else self.filtered - self.setpoint
        u = math.log(max(value, 1e-300)) if self.log else value
        self.i, self.value = min(max(u, self.low), self.high) - self.k_p * error, value

    def update(self, sigma: float, integrate: bool = True) -> float:
        """One sample of sigma -> lambda for the next dt steps. `integrate` False freezes the integral."""
        if (slope := self.measure(sigma)) is None or self.filtered is None:
            return self.value
        error = self.filtered - self.setpoint
        self.p, self.d = self.k_p * error, self.k_d * slope
        self.i += self.k_i * error * self.dt if integrate else 0.0
        if self.anti_windup == "clamp":
            self.i = min(max(self.i, self.low), self.high)
        u = self.p + self.i + self.d
        limited = min(max(u, self.low), self.high)
        self.saturated = limited != u
        if self.anti_windup == "tracking":
            self.i += limited - u
        self.value = math.exp(limited) if self.log else limited
        return self.value


class Pressure:
    """lambda at every step, by arm: adaptive, control, constant:LAMBDA, replay:TELEMETRY.csv.

    The adaptive arm ramps lambda from 0 to --lambda_start over --pressure_warmup steps, then hands over to one Homeostat
    (--per_layer: one a layer). All gains zero means no pressure at all: the control arm, bit for bit.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.arm, _, value = args.pressure.partition(":")
        self.warmup, self.start = args.pressure_warmup, args.lambda_start
        self.closed_loop = self.arm == "adaptive" and any((args.k_p, args.k_i, args.k_d))
        self.phase = "warmup" if self.closed_loop else "off" if self.arm == "adaptive" else self.arm
        self.replayed = read_telemetry(value) if self.arm == "replay" else None
        self.fixed = float(value) if self.arm == "constant" else 0.0
        limits = (1e-5 if args.law == "log" else 0.0, args.lambda_max)
        self.loops = [
            Homeostat(
                args.target_sigma,
                args.k_p,
                args.k_i,
                args.k_d,
                args.law,
                args.control_interval,
                args.filter_beta,
                limits,
            )
            for _ in range(args.n_layers if args.per_layer else 1)
        ]

    def weights(self, step: int) -> list[float]:
        """lambda in use at `step` (counted from 1): one value, or one a layer."""
        if self.replayed is not None:
            row = np.searchsorted(self.replayed["step"], step).clip(max=len(self.replayed) - 1)
            return [float(self.replayed["lambda"].iloc[row])]
        if self.phase == "warmup":
            return [self.start * min(1.0, step / max(1, self.warmup))] * len(self.loops)
        return [loop.value for loop in self.loops] if self.closed_loop else [self.fixed]

    def observe(self, step: int, sigmas: list[float], lr_share: float) -> None:
        """Shows the controller sigma of every layer [L], measured at `step`; `lr_share`: learning rate over its peak."""
        if not self.closed_loop:
            return
        samples = sigmas if len(self.loops) > 1 else [sum(sigmas) / len(sigmas)]
        in_use, ramping = self.weights(step), self.phase == "warmup"
        if (
            step >= self.warmup
        ):  # once the learning rate has decayed the heads hardly respond, and the integral would wind up
            self.phase = "auto" if lr_share >= 0.2 else "hold"
        for loop, sample, value in zip(self.loops, samples, in_use, strict=True):
            if not ramping:
                loop.update(sample, integrate=self.phase == "auto")
            else:
                loop.measure(sample)
                loop.hand_over(value)

    def state_dict(self) -> dict[str, Any]:
        keys = ("filtered", "p", "i", "d", "saturated", "held", "value")
        return {
            "phase": self.phase,
            "loops": [{k: vars(loop)[k] for k in keys} for loop in self.loops],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase = state["phase"]
        for loop, saved in zip(self.loops, state["loops"], strict=True):
            vars(loop).update(saved)


def training_step(model: NewGPT, batches: list[tuple[Tensor, Tensor]], weights: Tensor, args: argparse.Namespace, autocast: Any,
                  measure: bool) -> tuple[float, Tensor | None]:  # fmt: skip
    """Accumulates the gradient of loss + sum_l weights[l] * penalty_l over micro-batches of inputs and targets [B, T].

    Returns the mean loss (nats) and, if measured or penalised, the Gram matrices of the whole step [L, H, H]. The penalty
    of a micro-batch uses its own Gram matrices; sigma, which the Homeostat sees, uses their sum. Gradients, Gram matrices and
    loss are those of the micro-batches of all processes. They are summed once, here: DistributedDataParallel would hand the
    blocks a copy of `tap`, and would have to be told which backward pass is the last.
    """
    pressed, total, grams, n = bool(weights.any()), 0.0, None, len(batches) * rank_and_world()[1]
    for x, y in batches:
        tap: dict | None = (
            dict.fromkeys(f"z.{l}" for l in range(len(model.blocks)))
            if pressed or measure
            else None
        )
        with autocast:
            loss = objective = model(x, y, tap=tap)[1]
        if tap:
            w_o = [b.attn.w_o.weight if args.sigma_space == "resid" else None for b in model.blocks]
            gram = torch.stack(
                [
                    head_gram(z if pressed else z.detach(), w)
                    for z, w in zip(tap.values(), w_o, strict=True)
                ]
            )
            grams = gram.detach() if grams is None else grams + gram.detach()
            if pressed:
                objective = loss + (weights * decorrelation_penalty(gram, args.penalty)).sum()
        (objective / n).backward()
        total += loss.item() / n
    all_sum(
        *[p.grad for p in model.parameters() if p.grad is not None],
        *([] if grams is None else [grams]),
    )
    all_sum(whole := torch.tensor(total, dtype=torch.float64))
    return whole.item(), grams


@torch.no_grad()
def validate(
    model: NewGPT, data: HFWikiTextLoader, batch_size: int, autocast: Any
) -> dict[str, Any]:
    """The whole split in order, in eval mode: val_loss (nats a token) and, of each layer [L], sigma_z, sigma_resid, and
    write_overlap, the heads' mean ||U_i^T U_j||_F^2 / K (U: orthonormal basis of the rows of W_O; random: K/D)."""
    model.eval()
    # Without gradients more fits, and small models run faster; but logits [B, T, V] stay below half a gigabyte in float32
    batch_size = max(batch_size, min(8192, 2**27 // model.cfg.vocab_size) // data.seq_len)
    n_layers, n_heads, d_head, (rank, world) = (
        model.cfg.n_layers,
        model.cfg.n_heads,
        model.cfg.d_head,
        rank_and_world(),
    )
    grams = {
        space: torch.zeros(n_layers, n_heads, n_heads, dtype=torch.float64)
        for space in ("z", "resid")
    }
    loss, w_o = torch.zeros((), dtype=torch.float64), [b.attn.w_o.weight for b in model.blocks]
    for first in range(rank * batch_size, data.n_windows, world * batch_size):
        x, y = (
            t.to(w_o[0].device)
            for t in data.batch(np.arange(first, min(first + batch_size, data.n_windows)))
        )
        tap: dict = dict.fromkeys(f"z.{l}" for l in range(len(model.blocks)))
        with autocast:
            loss += model(x, y, tap=tap)[1].item() * len(x)
        for space in grams:
            gram = [
                head_gram(z, w if space == "resid" else None)
                for z, w in zip(tap.values(), w_o, strict=True)
            ]
            grams[space] += torch.stack(gram).double().cpu()
    all_sum(loss, *grams.values())
    model.train()
    bases = torch.linalg.qr(
        torch.stack(w_o).float().unflatten(2, (n_heads, d_head)).transpose(1, 2)
    )[0]  # [L, H, D, K]
    overlap = torch.einsum("lhdk,lgdm->lhgkm", bases, bases).square().sum((-1, -2)) / d_head
    i, j = torch.triu_indices(n_heads, n_heads, offset=1)
    layers = dict(
        sigma_z=sigma_of(grams["z"]),
        sigma_resid=sigma_of(grams["resid"]),
        write_overlap=overlap[:, i, j].mean(-1),
    )
    return {"val_loss": loss.item() / data.n_windows, **{k: v.tolist() for k, v in layers.items()}}


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate at `step` (counted from 1): linear warm-up, then --schedule."""
    done = max(0.0, (step - args.lr_warmup) / max(1, args.steps - args.lr_warmup))
    shape = {
        "cosine": 0.55 + 0.45 * math.cos(math.pi * done),
        "wsd": min(1.0, 5 * (1 + 1 / args.steps - done)),
        "constant": 1.0,
    }
    return args.learning_rate * shape[args.schedule] * min(1.0, step / max(1, args.lr_warmup))


# ---------------------------------------------------------------------------------------------- run
def trajectory(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide where a run goes; --resume refuses to change them."""
    free = {
        "save_dir",
        "resume",
        "redraw",
        "overwrite",
        "tensorboard",
        "cache_dir",
        "device",
        "skip_probe",
        "save_interval",
        "preset",
    }
    return {k: v for k, v in vars(args).items() if k not in free}


def save_checkpoint(
    path: Path,
    model: NewGPT,
    optimizer: torch.optim.Optimizer,
    pressure: Pressure,
    facts: dict,
    logs: dict,
) -> None:
    """Writes all that a later phase or --resume needs, then the sidecar."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    rng = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    rng |= {
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "python": repr(random.getstate()),
    }
    ckpt = {
        "schema": CHECKPOINT_SCHEMA,
        "config": asdict(model.cfg),
        "model": model.state_dict(),
        "probe": golden_probe(model),
        **facts,
    }
    ckpt |= {
        "optimizer": optimizer.state_dict(),
        "pressure": pressure.state_dict(),
        "rng": rng,
        "logs": logs,
    }
    sidecar_path(path).unlink(missing_ok=True)
    with atomic(path) as tmp:
        try:
            torch.save(ckpt, tmp)
        except RuntimeError as e:  # torch's way to report a full disk
            raise OSError(28, "No space left on device", str(path)) from e
    write_sidecar(path, CHECKPOINT_SCHEMA, [], config=ckpt["config"], **facts)


def resume(
    args: argparse.Namespace, model: NewGPT, optimizer: torch.optim.Optimizer, pressure: Pressure
) -> tuple[int, dict]:
    """Restores the newest finished checkpoint of --save_dir in place -> its step and logs; (0, empty logs) if there is none.

    Raises HandoffError if an argument that decides the trajectory differs.
    """
    finished = sorted(p for p in args.save_dir.glob("ckpt_*.pt") if sidecar_path(p).exists())
    if not finished:
        return 0, {"telemetry": [], "layers": []}
    saved, ckpt = load_checkpoint(finished[-1], torch.device("cpu"), args.skip_probe)
    for k, now in trajectory(args).items():
        if now != (then := ckpt["arguments"].get(k)):
            raise HandoffError(
                f"--resume would change --{k} from {then} to {now}; give the same arguments, or start in another --save_dir"
            )
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(ckpt["optimizer"])
    pressure.load_state_dict(ckpt["pressure"])
    rng = ckpt["rng"]
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available() and rng["cuda"]:
        torch.cuda.set_rng_state_all(rng["cuda"])
    np.random.set_state(tuple(rng["numpy"]))  # noqa: NPY002
    random.setstate(ast.literal_eval(rng["python"]))
    print(f"resumed {finished[-1]} at step {ckpt['step']}", flush=True)
    return ckpt["step"], ckpt["logs"]


def start_from(args: argparse.Namespace) -> NewGPT:
    """--init_from -> that model with this run's context and dropout. Sets its sizes and tokenizer in `args`.

    Raises HandoffError if it cannot be read or has one head.
    """
    with rank_0_first():
        args.init_from = str(as_checkpoint(args.init_from, args.cache_dir, args.dataset))
    saved, _ = load_checkpoint(args.init_from, torch.device("cpu"), args.skip_probe)
    if saved.cfg.n_heads < 2:
        raise HandoffError(
            f"{args.init_from} has one head a layer; expected at least 2, between which sigma is measured"
        )
    model = NewGPT(replace(saved.cfg, seq_len=args.seq_len, dropout=args.dropout))
    model.load_state_dict(saved.state_dict())
    for size in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "tied"):
        setattr(args, size, getattr(saved.cfg, size))
    args.tokenizer = str(Path(args.init_from).resolve().with_name("tokenizer.json"))
    return model


def announce(
    args: argparse.Namespace, model: NewGPT, train: HFWikiTextLoader, autocast: Any
) -> None:
    """Compiles blocks and loss (--compile), and prints sizes and cost, measured on one micro-batch that leaves no trace.

    Raises HandoffError if the disk is too small.
    """
    total, inner = model.n_params()
    device, d = model.embedding.weight.device, train.description
    need_disk(
        args.save_dir, gb := 5 * 12 * total
    )  # three checkpoints, a temporary and the final one, with two moments
    tokens = args.steps * args.batch_size * args.grad_accum * args.seq_len
    worth = device.type == "cuda" or (
        shutil.which("c++") is not None and 6 * inner * tokens > 1e13
    )  # FLOPs: minutes of work
    if args.compile == "on" or (args.compile == "auto" and worth):
        for part in (*model.blocks, model.loss):
            part.compile()
    with torch.random.fork_rng():
        batch = [tuple(t.to(device) for t in train.batch(np.zeros(args.batch_size, np.int64)))]
        for _ in range(2):  # the first one compiles, and touches its memory for the first time
            start = time.perf_counter()
            training_step(
                model, batch, torch.ones(args.n_layers, device=device), args, autocast, True
            )
            seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    where = f"{device} in {'bfloat16' if autocast._enabled else 'float32'}"
    print(
        f"model: {total / 1e6:.2f}M parameters, {inner / 1e6:.2f}M without embeddings, on {where}"
    )
    print(
        f"data: {d['dataset_key']}, {d['n_tokens']:,} training tokens; tokenizer {d['tokenizer_hash']}, {model.cfg.vocab_size:,} kinds"
    )
    minutes = seconds * args.steps * args.grad_accum / rank_and_world()[1] / 60
    print(
        f"cost: {args.steps} steps, {tokens:,} tokens, about {minutes:.1f} min; up to {gb / 1e9:.2f} GB in {args.save_dir}",
        flush=True,
    )


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM do not interrupt; their numbers are appended to the list that it yields."""
    noted: list[int] = []
    before = {
        n: signal.signal(n, lambda number, _: noted.append(number))
        for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_model(args: argparse.Namespace, model: NewGPT, optimizer: torch.optim.Optimizer, pressure: Pressure,
                data: tuple[HFWikiTextLoader, ...], autocast: Any, facts: dict[str, Any], signals: list[int]) -> int:  # fmt: skip
    """The training loop: step, clip, sample sigma, control, validate, save. `data`: training and validation split.

    Returns 0, or 128 + the number of the signal that ended it, after saving. Several processes take the same steps; rank 0 writes.
    """
    device, (train, val), (rank, world) = model.embedding.weight.device, data, rank_and_world()
    depth = torch.arange(1, args.n_layers + 1, device=device) / args.n_layers
    layer_weights = depth**3 if args.layer_weights == "cubic" else torch.ones_like(depth)
    first, logs = (
        resume(args, model, optimizer, pressure)
        if args.resume
        else (0, {"telemetry": [], "layers": []})
    )
    rows, n, told = logs["telemetry"], args.batch_size * args.grad_accum, first
    clock = written = time.perf_counter()
    wanted = args.tensorboard and rank == 0
    board = (
        import_module("torch.utils.tensorboard").SummaryWriter(str(args.save_dir / "tensorboard"))
        if wanted
        else None
    )
    for step in tqdm(
        range(first + 1, args.steps + 1),
        initial=first,
        total=args.steps,
        desc=facts["arm"],
        unit="step",
        disable=None,
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        lambdas, last = pressure.weights(step), step == args.steps
        sample, check = step % args.control_interval == 0, step % args.val_interval == 0 or last
        x, y = (
            t.to(device).split(args.batch_size)
            for t in train.shuffled((step - 1) * n, n, args.seed)
        )
        weights = torch.tensor(lambdas, device=device) * layer_weights
        if world > 1 and args.dropout:  # each process its own noise, which --resume can repeat
            torch.manual_seed((args.seed * args.steps + step) * world + rank)
        loss, grams = training_step(
            model,
            list(zip(x, y, strict=True))[rank::world],
            weights,
            args,
            autocast,
            sample or check,
        )
        all_sum(
            noted := torch.tensor(float(len(signals)))
        )  # so that all of them stop at the same step
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        if not math.isfinite(loss + norm):
            kept = f"the checkpoints in {args.save_dir} are good, try a --learning_rate below {args.learning_rate}"
            raise HandoffError(
                f"step {step}: loss {loss}, gradient norm {norm}, not finite; {kept}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if sample or check:
            now = time.perf_counter()
            rows.append(telemetry_row(step, args, loss, grams, lambdas, pressure))
            rows[-1] |= {
                "grad_norm": norm,
                "tokens_per_s": (step - told) * n * args.seq_len / (now - clock),
            }
            clock, told = now, step
        if sample:
            pressure.observe(
                step, sigma_of(grams).tolist(), learning_rate(step, args) / args.learning_rate
            )
        if check:
            result = validate(model, val, args.batch_size, autocast)
            rows[-1] |= {
                "val_loss": result["val_loss"],
                "perplexity": math.exp(min(50.0, result.pop("val_loss"))),
            }
            rows[-1] |= {f"val_{k}": sum(v) / len(v) for k, v in result.items()}
            result |= {"lambda": lambdas if len(lambdas) > 1 else lambdas * args.n_layers}
            logs["layers"] += [
                {"step": step, "layer": l, **{k: v[l] for k, v in result.items()}}
                for l in range(args.n_layers)
            ]
            clock = time.perf_counter()
        if board and (sample or check):
            show_live(board, step, rows[-1], grams)
        stop, save = bool(noted) and not last, bool(noted) or last or step % args.save_interval == 0
        if rank == 0 and (check or save or time.perf_counter() - written > 10):
            written = time.perf_counter()
            for name, table in (("telemetry.csv", rows), ("layers.csv", logs["layers"])):
                with atomic(args.save_dir / name) as tmp:
                    pd.DataFrame(table).to_csv(tmp, index=False)
        if rank == 0 and save:
            path = args.save_dir / (
                f"janus_{facts['arm']}_final.pt" if last else f"ckpt_{step:08d}.pt"
            )
            save_checkpoint(path, model, optimizer, pressure, {**facts, "step": step}, logs)
            for old in sorted(args.save_dir.glob("ckpt_*.pt"))[:-3]:
                sidecar_path(old).unlink(missing_ok=True)
                old.unlink()
        if stop:
            number = int((signals or [signal.SIGTERM])[0])
            print(
                f"signal {number}: saved step {step} in {args.save_dir}; continue with the same command and --resume"
            )
            all_sum(torch.zeros(1))  # the others wait until rank 0 has saved
            return 128 + number
    return 0


def run(args: argparse.Namespace) -> int:
    csv, arm, (rank, _) = (
        args.save_dir / "telemetry.csv",
        args.pressure.partition(":")[0],
        rank_and_world(),
    )
    if args.redraw:
        draw_training(args.redraw, args.target_sigma, args.save_dir / "training.png")
        return 0
    final = args.save_dir / f"janus_{arm}_final.pt"
    if args.resume and sidecar_path(final).exists():
        print(f"{final} is complete; there is nothing to resume")
        return 0
    old = sorted(args.save_dir.glob("ckpt_*.pt*"))
    if not args.resume:
        refuse_overwrite([final, csv, *old], args.overwrite)
    if Path(args.dataset).exists():
        args.dataset = str(
            Path(args.dataset).resolve()
        )  # later phases may be started in another folder

    keep_memory()
    device, autocast = set_up(args)
    model = start_from(args) if args.init_from else None
    with rank_0_first():  # it fills the cache
        train, val = (
            HFWikiTextLoader(args.dataset, args.tokenizer, args.seq_len, s, args.cache_dir)
            for s in ("train", "validation")
        )
    if model is None:
        sizes = {
            k: getattr(args, k)
            for k in (
                "n_layers",
                "d_model",
                "n_heads",
                "n_kv_heads",
                "d_ff",
                "seq_len",
                "tied",
                "dropout",
            )
        }
        model = NewGPT(
            GPTConfig(
                vocab_size=train.tokenizer.get_vocab_size(),
                d_head=args.d_model // args.n_heads,
                **sizes,
            )
        )
    model = model.to(device).train()
    split = {True: args.weight_decay, False: 0.0}  # matrices decay, norms do not
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == m], "weight_decay": decay}
        for m, decay in split.items()
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type != "mps"
    )
    pressure = Pressure(args)
    announce(args, model, train, autocast)

    recording: Any = contextlib.nullcontext({}) if rank else run_record(args.save_dir, args)
    with recording as record:
        if rank == 0:
            for path in [] if args.resume else [final, sidecar_path(final), *old]:
                path.unlink(missing_ok=True)
            with atomic(args.save_dir / "tokenizer.json") as tmp:
                train.tokenizer.save(str(tmp))
        facts = {
            "arm": arm,
            "preset": args.preset,
            "seed": args.seed,
            "dataset": args.dataset,
            "data": train.description,
        }
        facts["arguments"] = trajectory(args)
        with noting_signals() as signals:
            record["exit_status"] = train_model(
                args, model, optimizer, pressure, (train, val), autocast, facts, signals
            )
    if rank or record["exit_status"]:
        return record["exit_status"]
    draw_training([csv], args.target_sigma, args.save_dir / "training.png")
    end = read_telemetry(csv).iloc[-1]
    sigmas = f"sigma_z {end['val_sigma_z']:.5f}, sigma_resid {end['val_sigma_resid']:.5f}"
    print(f"{final}: validation loss {end['val_loss']:.4f} nats a token, {sigmas}")
    return 0


# ------------------------------------------------------------------------------- tables and figures
def show_live(board: Any, step: int, row: dict[str, Any], grams: Tensor | None) -> None:
    """One row of telemetry to TensorBoard; the cosines between heads as a histogram, and their absolute values as an image a layer."""
    for name, value in row.items():
        if isinstance(value, int | float) and math.isfinite(value):
            board.add_scalar(name, value, step)
    if grams is not None:
        scale = grams.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).rsqrt()
        board.add_histogram("cosines between heads", head_cosines(grams), step)
        board.add_images(
            "abs(cosine) between heads, by layer",
            (grams * scale[:, :, None] * scale[:, None]).abs()[:, None],
            step,
        )
    board.flush()


def read_telemetry(path: str | Path) -> pd.DataFrame:
    """A telemetry.csv of this script; HandoffError if it is not one."""
    try:
        frame = pd.read_csv(path)
        frame[["step", "lambda", "sigma_z", "loss", "val_loss"]].astype(float)
        if frame["lambda"].isna().any() or not len(frame):
            raise ValueError("no rows, or rows without lambda")
    except (OSError, ValueError, KeyError) as e:
        raise HandoffError(
            f"{path} is not a telemetry.csv ({e}); it is written by: python janus_adaptive.py"
        ) from None
    return frame


def telemetry_row(
    step: int,
    args: argparse.Namespace,
    loss: float,
    grams: Tensor | None,
    lambdas: list[float],
    pressure: Pressure,
) -> dict:
    """One row of telemetry.csv: values in use at `step`, before the controller sees its sigma."""
    sigmas, loops = sigma_of(grams).tolist(), pressure.loops  # type: ignore[arg-type]
    pid = {
        k.upper(): sum(vars(loop)[k] for loop in loops) / len(loops)
        if pressure.closed_loop
        else math.nan
        for k in "pid"
    }
    row = {
        "step": step,
        "tokens": step * args.batch_size * args.grad_accum * args.seq_len,
        "loss": loss,
    }
    row |= {
        "val_loss": math.nan,
        "perplexity": math.nan,
        "lambda": sum(lambdas) / len(lambdas),
        **pid,
        "saturated": int(any(loop.saturated for loop in loops)),
        "phase": pressure.phase,
    }
    space = "sigma_z" if args.sigma_space == "z" else "sigma_resid"
    row |= {
        "sigma_z": math.nan,
        "sigma_resid": math.nan,
        "max_layer_sigma": max(sigmas),
        "worst_layer": sigmas.index(max(sigmas)),
    }
    filtered = [
        math.exp(f) if loops[0].log else f for loop in loops if (f := loop.filtered) is not None
    ]  # before this sample
    row["sigma_filtered"] = sum(filtered) / len(filtered) if filtered else math.nan
    return row | {space: sum(sigmas) / len(sigmas), "lr": learning_rate(step, args)}


def draw_training(csvs: list[str | Path], target: float, out: Path) -> None:
    """Loss, sigma and lambda against steps, one colour a run (labelled by its folder); drawn from the CSVs alone."""
    import matplotlib.pyplot as plt

    runs = [(Path(path).resolve().parent.name, read_telemetry(path)) for path in csvs]
    pressed = any(
        (t["lambda"] > 0).any() for _, t in runs
    )  # the control arm alone has no penalty to draw
    fig, axes = plt.subplots(
        1, 2 + pressed, figsize=(13 if pressed else 9, 3.8), layout="constrained"
    )
    arms, others = (
        {"adaptive": "#D55E00", "control": "#0072B2"},
        iter(["#009E73", "#CC79A7", "#E69F00", "#56B4E9"] * len(csvs)),
    )
    for label, t in runs:
        color = arms.get(label) or next(others)
        axes[0].plot(t["step"], t["loss"], color=color, alpha=0.3, lw=0.8)
        axes[0].plot(
            *t[["step", "val_loss"]].dropna().to_numpy().T,
            color=color,
            marker="o",
            ms=4,
            label=label,
        )
        axes[1].plot(
            *t[["step", "sigma_z"]].dropna().to_numpy().T,
            color=color,
            lw=0.8,
            alpha=0.5,
            label=label,
        )
        if "sigma_filtered" in t:
            axes[1].plot(*t[["step", "sigma_filtered"]].dropna().to_numpy().T, color=color, lw=1.6)
        if (t["lambda"] > 0).any():
            axes[2].plot(
                t["step"], t["lambda"].where(t["lambda"] > 0), color=color, lw=1.2, label=label
            )
    axes[1].axhspan(
        0.9 * target, 1.1 * target, color="0.85", label=f"setpoint {target:g} $\\pm$ 10 %"
    )
    axes[0].set(
        title="Loss (thin: training, dots: validation)", ylabel="cross-entropy (nats a token)"
    )
    axes[1].set(
        title="What the Homeostat measures (thick: filtered)",
        ylabel=r"$\sigma$: mean |cosine| between heads",
        yscale="log",
    )
    if pressed:
        axes[2].set(
            title="What it does", ylabel=r"penalty weight $\lambda$ (none: control)", yscale="log"
        )
    for ax in axes:
        ax.set_xlabel("optimiser step")
        ax.legend(fontsize=8)
    with atomic(out) as tmp:
        fig.savefig(tmp, dpi=130)
    plt.close(fig)


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    p = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, real = positive(int), positive(float)
    # fmt: off
    g = p.add_argument_group("inputs")
    g.add_argument("--dataset", default="wikitext-103-raw-v1", help="WikiText, builtin, or a .txt/.parquet/.jsonl file or saved folder")
    g.add_argument("--tokenizer", default="auto", help="gpt2, a hub name, folder or tokenizer.json, or train:N; auto: gpt2 or train:4096")
    g.add_argument("--init_from", metavar="MODEL", help="start from a checkpoint or pretrained Llama, with its sizes")
    g.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --save_dir; equals an uninterrupted run")
    g.add_argument("--redraw", nargs="+", metavar="CSV", help="only redraw training.png in --save_dir from these telemetry files")
    g = p.add_argument_group("outputs")
    g.add_argument("--save_dir", type=Path, default=Path("checkpoints/v1"), help="output folder")
    g.add_argument("--save_interval", type=count, help="steps between checkpoints")
    g.add_argument("--tensorboard", action="store_true", help="also log to <save_dir>/tensorboard (needs the package tensorboard)")
    g.add_argument("--val_interval", type=count, help="steps between validations of the whole split")
    g = p.add_argument_group("model")
    g.add_argument("--preset", choices=list(PRESETS), default="full", help="sizes; explicit flags beat it; defaults shown are its own")
    g.add_argument("--n_layers", type=count, help="number of blocks")
    g.add_argument("--d_model", type=count, help="width of the residual stream, dimensions")
    g.add_argument("--n_heads", type=count, help="heads a layer")
    g.add_argument("--n_kv_heads", type=int, default=0, help="key/value heads a layer (grouped queries); 0: as many as heads")
    g.add_argument("--d_ff", type=count, help="width of the SwiGLU hidden layer, dimensions")
    g.add_argument("--seq_len", type=count, help="context, tokens")
    g.add_argument("--dropout", type=float, default=0.0, help="dropout probability")
    g.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True, help="unembedding = embedding")
    g = p.add_argument_group("method: pressure and Homeostat")
    g.add_argument("--pressure", default="adaptive", help="adaptive, control, constant:LAMBDA or replay:TELEMETRY.csv")
    g.add_argument("--target_sigma", type=real, default=0.0035, help="setpoint of sigma, mean absolute cosine between heads")
    g.add_argument("--sigma_space", choices=["z", "resid"], default="z", help="where: head outputs, or what heads write to the stream")
    g.add_argument("--penalty", choices=["cos2", "abs", "fro"], default="cos2", help="mean cos^2, mean |cos|, or Frobenius norm")
    g.add_argument("--layer_weights", choices=["uniform", "cubic"], default="uniform", help="of the penalty: 1, or ((l+1)/L)^3")
    g.add_argument("--law", choices=["log", "linear"], default="log", help="control law, on logarithms of sigma and lambda or on them")
    g.add_argument("--k_p", type=float, default=0.9, help="proportional gain (log: per e-fold of sigma; linear: lambda per unit of sigma)")
    g.add_argument("--k_i", type=float, default=0.003, help="integral gain, as k_p but per step")
    g.add_argument("--k_d", type=float, default=0.0, help="derivative gain, as k_p times steps")
    g.add_argument("--control_interval", type=count, default=10, help="steps between two samples of sigma")
    g.add_argument("--filter_beta", type=float, default=0.9, help="memory of the filter on sigma, share per sample, 0 (none) to below 1")
    g.add_argument("--pressure_warmup", type=int, help="steps of the open-loop ramp of lambda, before the loop closes")
    g.add_argument("--lambda_start", type=float, default=1.0, help="lambda at the end of the ramp")
    g.add_argument("--lambda_max", type=real, default=1e4, help="upper limit of lambda; the lower one is 1e-5 (log) or 0 (linear)")
    g.add_argument("--per_layer", action="store_true", help="one loop and one lambda a layer")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=count, help="optimiser steps")
    g.add_argument("--batch_size", type=count, help="sequences a micro-batch")
    g.add_argument("--grad_accum", type=count, help="micro-batches a step")
    g.add_argument("--learning_rate", type=real, help="peak learning rate of AdamW")
    g.add_argument("--lr_warmup", type=int, default=-1, help="steps of linear learning-rate warm-up; -1: a twentieth of --steps")
    g.add_argument("--schedule", choices=["cosine", "wsd", "constant"], default="cosine", help="cosine: to 10 %%; wsd: last fifth to 0")
    g.add_argument("--weight_decay", type=float, default=0.1, help="AdamW weight decay, of matrices")
    g.add_argument("--grad_clip", type=real, default=1.0, help="gradient norm above which gradients are scaled down")
    g.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile blocks and loss; auto: where it pays")
    # fmt: on
    add_runtime_flags(p)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="full")
    p.set_defaults(**PRESETS.get(first.parse_known_args(argv)[0].preset, {}))
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks (exit 2 with one line), and the defaults that follow from other flags."""
    if args.tensorboard and find_spec("tensorboard") is None:
        p.error(
            "--tensorboard needs a package: pip install tensorboard (the CSVs have the same numbers without it)"
        )
    arm, _, value = args.pressure.partition(":")
    args.n_kv_heads = args.n_kv_heads or args.n_heads
    args.lr_warmup = args.lr_warmup if args.lr_warmup >= 0 else args.steps // 20
    if args.grad_accum % (world := rank_and_world()[1]):
        p.error(
            f"--grad_accum {args.grad_accum} must be a multiple of the {world} processes, which share the micro-batches of a step"
        )
    number = value.replace(".", "", 1).replace("e-", "", 1).isdigit()
    if not {
        "adaptive": not value,
        "control": not value,
        "constant": number,
        "replay": bool(value),
    }.get(arm):
        p.error(
            f"--pressure {args.pressure}: expected adaptive, control, constant:LAMBDA (a number from 0) or replay:TELEMETRY.csv"
        )
    if args.d_model % args.n_heads or args.d_model // args.n_heads % 2:
        p.error(f"--d_model {args.d_model} must be --n_heads {args.n_heads} times an even number")
    if args.n_heads < 2 or args.n_kv_heads < 1 or args.n_heads % args.n_kv_heads:
        p.error(
            f"--n_heads {args.n_heads} must be at least 2 and a multiple of --n_kv_heads {args.n_kv_heads}"
        )
    if not 0 <= args.filter_beta < 1 or not 0 <= args.dropout < 1:
        p.error(f"--filter_beta {args.filter_beta} and --dropout {args.dropout} must lie in [0, 1)")
    if (
        not min(
            args.k_p, args.k_i, args.k_d, args.pressure_warmup, args.lambda_start, args.weight_decay
        )
        >= 0
    ):
        p.error("gains, --pressure_warmup, --lambda_start and --weight_decay must not be negative")
    if args.tokenizer.startswith("train:") and not (
        args.tokenizer[6:].isdigit() and int(args.tokenizer[6:]) > 256
    ):
        p.error(f"--tokenizer {args.tokenizer}: expected train:N with N above 256 tokens")


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


# >>> shared: runtime ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script spells alike."""
    cache = os.environ.get("JANUS_CACHE", "~/.cache/janus_arc")
    devices = ["auto", "cpu", "cuda", "mps"]
    dtypes = ["auto", "float32", "bfloat16"]
    dtype_help = "of matrix products; auto: bfloat16 if fast"
    probe_help = "do not replay a checkpoint's golden probe (deliberate model variants)"
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=int, default=42, help="seed of Python, NumPy and torch")
    group.add_argument("--device", choices=devices, default="auto", help="where to compute")
    group.add_argument("--dtype", choices=dtypes, default="auto", help=dtype_help)
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
    """Whether the hardware has bfloat16 products; elsewhere they are emulated, and slower."""
    if device_name == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_name == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
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
    unfinished or damaged.
    """
    path = Path(path)
    side = sidecar_path(path)
    if not path.is_file():
        fact = "is not a file" if path.exists() else "does not exist"
        raise HandoffError(f"{path} {fact}; make it with: {remedy}")
    if not side.is_file():
        fact = f"{path} has no sidecar {side.name}: the run that wrote it did not finish"
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


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        inverse_rms = torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * inverse_rms * self.weight).type_as(x)


def rope_tables(seq_len: int, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K/2] of the rotary angles, float32; frequency i turns by theta^(-2i/K) a
    position (Su et al. 2021)."""
    frequency = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)  # [K/2]
    position = torch.arange(seq_len, dtype=torch.float32)  # [T]
    angle = torch.outer(position, frequency)  # [T, K/2]
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, H, T, K] by position in float32, in the half-split convention of Llama: the
    pairs are (i, i + K/2)."""
    a, b = x.float().chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # [B, H, T, K]


class Attention(nn.Module):
    """Causal self-attention that hands out z, the heads' outputs before the output projection."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.n_kv = cfg.n_kv_heads
        self.d_head = cfg.d_head
        self.dropout = cfg.dropout
        n_columns = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
        self.w_qkv = nn.Linear(cfg.d_model, n_columns, bias=False)
        self.w_o = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, want_pattern: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] (normed) -> z [B, T, H, K], and the pattern [B, H, T, T] if wanted."""
        q, k, v = self.qkv(x, cos, sin)  # [B, H, T, K] each
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):  # in the type that `qkv` chose
            if self.by_rows(x):
                z = self.attention_by_rows(q, k, v)
            else:
                z = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        pattern = self.pattern(q, k) if want_pattern else None
        return z.transpose(1, 2), pattern  # [B, T, H, K]

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] (normed) -> q, k, v [B, H, T, K], q and k rotated; grouped keys and
        values are repeated."""
        heads = self.w_qkv(x).unflatten(-1, (-1, self.d_head))  # [B, T, H + 2 H_kv, K]
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

    @staticmethod
    def pattern(q: Tensor, k: Tensor) -> Tensor:
        """Attention probabilities [B, H, T, T] in float32; only formed when somebody wants
        them."""
        score = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, T, T]
        later = torch.ones_like(score, dtype=torch.bool).triu(1)
        return score.masked_fill(later, -math.inf).softmax(-1)

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


class Block(nn.Module):
    """x + attention, then + SwiGLU (Shazeer 2020), each after an RMSNorm."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.norm_attn = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.norm_mlp = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.w_gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_ff, bias=False)
        self.w_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)
        self.drop = nn.Dropout(cfg.dropout)

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
        mlp_out = self.mlp(mid)
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
        return self.attn.w_o(z.flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """Residual stream after attention [B, T, D] -> mlp_out [B, T, D]."""
        gate, up = self.w_gate_up(self.norm_mlp(x)).chunk(2, dim=-1)  # [B, T, d_ff] each
        return self.w_down(F.silu(gate) * up)


class TokenLoss(nn.Module):
    """Mean cross-entropy (nats) of logits [B, T, V] for targets [B, T]. A module, so that it is
    compiled in place like a block."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class NewGPT(nn.Module):
    """A decoder-only transformer with exactly Llama's computation: pre-RMSNorm, SwiGLU, RoPE, no
    biases.

    `tap` is a dict whose keys name the activations wanted, "<site>.<layer>"; the forward pass
    fills in the values: resid_pre, attn_out, resid_mid, mlp_out, resid_post [B, T, D], z [B, T,
    H, K], pattern [B, H, T, T]. `head_scale` [L, H] multiplies each head's z before the output
    projection: 1 leaves it alone, 0 ablates it.
    """

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.unembedding = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.drop = nn.Dropout(cfg.dropout)
        self.loss = TokenLoss()
        self.initialise()
        if cfg.tied:
            self.unembedding.weight = self.embedding.weight
        cos, sin = rope_tables(cfg.seq_len, cfg.d_head, cfg.rope_theta)
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
        return self.drop(self.embedding(idx))

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
        n_tokens = x.shape[1]
        cos = self.rope_cos[:n_tokens]
        sin = self.rope_sin[:n_tokens]
        wanted = list(tap or ())
        for l in range(start, stop):
            end = f".{l}"
            keep = tuple(name.removesuffix(end) for name in wanted if name.endswith(end))
            scale = None if head_scale is None else head_scale[l]
            x, seen = self.blocks[l](x, cos, sin, scale, keep)
            if tap is not None:
                tap.update({f"{site}.{l}": value for site, value in seen.items()})
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """Residual stream after the last block [B, T, D] -> logits [B, T, V]."""
        return self.unembedding(self.norm(x))

    def n_params(self) -> tuple[int, int]:
        """Number of parameters: all (a tied embedding counted once), and without embeddings."""
        total = sum(parameter.numel() for parameter in self.parameters())
        n_embeddings = 1 if self.cfg.tied else 2
        return total, total - n_embeddings * self.embedding.weight.numel()


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

    Raises HandoffError if the file is missing, unfinished, damaged, of another kind, or disagrees
    with its golden probe.
    """
    train = "python janus_adaptive.py --save_dir DIR"
    remedy = f"{train}, or from a pretrained Llama with: python tools/import_hf.py MODEL DIR"
    read_sidecar(path, CHECKPOINT_SCHEMA, remedy)
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        model = NewGPT(GPTConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["model"], strict=True)
        loss_then = ckpt["probe"]["loss"]
        numbers_then = [loss_then, *ckpt["probe"]["top_logits"]]
    except Exception as e:  # a damaged zip, a pickle, other names or shapes: many types
        fact = f"{path} cannot be read as a {CHECKPOINT_SCHEMA} file"
        raise HandoffError(f"{fact}: {first_line(e, 160)}") from None
    if not skip_probe:
        now = golden_probe(model)
        numbers_now = [now["loss"], *now["top_logits"]]
        if not np.allclose(numbers_now, numbers_then, rtol=1e-5, atol=1e-4):
            fact = f"the golden probe gives {now['loss']:.5f} nats"
            fact += f", the checkpoint says {loss_then:.5f}"
            cause = f"the model in {Path(__file__).name} is not the one that was trained"
            advice = "run tools/check_copies.py, or pass --skip_probe"
            raise HandoffError(f"{path}: {fact}: {cause}; {advice}")
    return model.to(device).eval(), ckpt


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
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{tool} failed"]
        raise HandoffError(lines[-1].removeprefix(f"{name}.py: error: "))


# <<< shared: tools


# >>> shared: pretrained ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
def as_checkpoint(path: str | Path, cache_dir: str | Path, dataset: str | None = None) -> Path:
    """A Janus checkpoint (.pt) as it is; a pretrained Llama (folder, hub name, .gguf file or
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
        kinds = "a checkpoint (.pt), a folder, hub name or .gguf file of a Llama model, or smollm2"
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


# >>> shared: text ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
HUB_DATASETS = {
    "wikitext-103-raw-v1": "Salesforce/wikitext",
    "wikitext-2-raw-v1": "Salesforce/wikitext",
}
# Of a dataset that has no splits: the shares where each begins and ends
SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


class HFWikiTextLoader:
    """One split of a text dataset as a flat, memory-mapped token stream, cut into windows of
    `seq_len` tokens.

    Tokenised once, with all cores, and cached as <cache_dir>/<dataset>-<tokenizer>-<split>.npy
    (uint16 or uint32). Attributes: tokenizer, tokens [n], n_windows, and `description` (dataset,
    its key, tokenizer hash, ...) for sidecars.
    """

    def __init__(
        self, dataset: str, tokenizer: str, seq_len: int, split: str, cache_dir: str | Path
    ) -> None:
        cache = Path(cache_dir).expanduser()
        self.seq_len = seq_len
        self.tokenizer = load_tokenizer(tokenizer, dataset, cache)
        serialised = self.tokenizer.to_str().encode()
        tokenizer_hash = hashlib.sha256(serialised).hexdigest()[:12]
        key = dataset_key(dataset)
        path = cache / f"{key}-{tokenizer_hash}-{split}.npy"
        if not path.exists():
            tokens = self.tokenise(read_documents(dataset, split), split)
            with atomic(path) as temporary:
                np.save(temporary, tokens)
        self.tokens = np.load(path, mmap_mode="r")  # [n]
        self.n_windows = (len(self.tokens) - 1) // seq_len  # the last token has no target
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

    def tokenise(self, texts: list[str], split: str) -> np.ndarray:
        """Token ids [n] of all texts, one after the other, an empty line between two."""
        fits_16_bits = self.tokenizer.get_vocab_size() <= 1 << 16
        dtype = np.uint16 if fits_16_bits else np.uint32
        ids = [np.zeros(0, dtype)]
        batches = range(0, len(texts), 1000)
        for first in tqdm(batches, desc=f"tokenising {split}", unit="kdoc", disable=None):
            batch = [text + "\n\n" for text in texts[first : first + 1000]]
            encodings = self.tokenizer.encode_batch(batch, add_special_tokens=False)
            ids += [np.asarray(encoding.ids, dtype) for encoding in encodings]
        return np.concatenate(ids)

    def batch(self, windows: np.ndarray, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Windows by number [B] -> inputs and targets, both int64 [B, T]; `offset` shifts all
        windows, in tokens."""
        starts = np.asarray(windows) * self.seq_len + offset
        rows = [self.tokens[start : start + self.seq_len + 1] for start in starts]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T + 1]
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
        path = cache / f"{dataset_key(dataset)}-bpe{vocab_size}.json"
        if not path.exists():
            bpe = train_bpe(read_documents(dataset, "train"), int(vocab_size))
            with atomic(path) as temporary:
                bpe.save(str(temporary))
        tokenizer = str(path)
    if tokenizer.endswith(".json"):
        try:
            return Tokenizer.from_file(tokenizer)
        except Exception as e:  # the library raises bare Exception
            fact = f"tokenizer {tokenizer} cannot be read ({e})"
            raise HandoffError(f"{fact}; expected a tokenizer.json") from None
    name = "openai-community/gpt2" if tokenizer == "gpt2" else tokenizer

    def load() -> Tokenizer:
        return import_module("transformers").AutoTokenizer.from_pretrained(name).backend_tokenizer

    return from_hub(f"tokenizer {tokenizer!r}", load)


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

        rows = from_hub(f"dataset {dataset!r}", load)["text"]
        return [row for row in rows if row.strip()]

    try:
        rows, has_splits = read_rows(Path(dataset), split)
        if has_splits:
            return [row for row in rows if row.strip()]
    except UnicodeDecodeError as e:
        fact = f"--dataset {dataset} is not UTF-8 text (byte {e.start})"
        raise HandoffError(f"{fact}; convert it, e.g. with iconv -t UTF-8") from None
    except KeyError:
        raise HandoffError(f"--dataset {dataset} has no column `text`") from None
    except Exception as e:  # pandas, pyarrow and datasets raise many types
        raise HandoffError(f"--dataset {dataset} cannot be read: {first_line(e, 120)}") from None
    texts = [str(row) for row in rows if str(row).strip()]
    if len(texts) < 100:  # a few long texts: cut between words, so that every split gets its share
        words = " ".join(texts).split(" ")
        n_words = len(words) // 100 + 1
        starts = range(0, len(words), n_words)
        texts = [" ".join(words[start : start + n_words]) for start in starts]
    lengths = [len(text) for text in texts]
    ends = np.cumsum(lengths) / max(1, sum(lengths))  # share of the characters so far
    return [text for text, end in zip(texts, ends, strict=True) if low < end <= high + 1e-9]


def read_rows(path: Path, split: str) -> tuple[Any, bool]:
    """Column `text` of a local file or saved folder, and whether it is `split` of a folder that
    has splits (else it is everything)."""
    if path.is_dir():
        saved = import_module("datasets").load_from_disk(str(path))
        if not isinstance(saved, dict):
            return saved["text"], False
        has_split = split in saved
        return saved[split if has_split else "train"]["text"], has_split
    if path.suffix == ".parquet":
        return pd.read_parquet(path)["text"], False
    if path.suffix in (".jsonl", ".json"):
        return pd.read_json(path, lines=path.suffix == ".jsonl")["text"], False
    return path.read_text(encoding="utf-8").splitlines(), False


def dataset_key(dataset: str) -> str:
    """A name for the content of a dataset: what it is called, and a hash of the bytes (or the
    versions) that it comes from."""
    path = Path(dataset)
    if dataset == "builtin":
        versions = [version(package) for package in BUILTIN_PACKAGES.values()]
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


# <<< shared: text


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error of one line, 2 for a wrong command line."""
    return one_line_errors(lambda: under_torchrun(lambda: run(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())

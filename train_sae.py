"""Train sparse autoencoders (SAEs) on dumped activations and measure what they keep (phase 3 of Janus Arc).

Question: into how many directions does what the heads compute decompose, at which reconstruction error, and how much of
the model's behaviour survives when the reconstruction takes the place of the activation?

Reads   activations/<run>/L<layer>.<site>.npy [N, D] float16 or float32, raw units; for CE recovered tokens.npy and the checkpoint
Writes  saes/<run>/L<layer>/ (--unit layer), saes/<run>/L<layer>/H<head>/ (--unit head); for a --site other than z L<layer>.<site>/:
          cfg.json, sae_weights.safetensors (float32, folded: takes and gives raw activations), training_state.pt (for --resume),
          --arch topk: ae.pt, config.json and sae.safetensors, for dictionary_learning and eai-sparsify,
          training.csv, latent_frequencies.csv, and last, with all metrics, the sidecar sae_weights.safetensors.json
        saes/sae_metrics.csv, table2.csv, table2.md, figure2_l0_by_depth.png, figure3_activation_frequency.png: every finished SAE
SAELens' SAE.load_from_disk(folder) loads an export; it encodes flat [N, D]. To splice a layer's SAE into a HookedSAETransformer
at hook_z [B, T, H, K], first call sae.turn_on_forward_pass_hook_z_reshaping(); a head's SAE takes its own [..., K] as it is.

Quick   python train_sae.py --runs adaptive --layers 3 6 9 --preset smoke      (3 s a layer on one CPU core)
Full    python train_sae.py --runs adaptive --layers 3 6 9                     (10M tokens a layer: 40 min on one core of an AMD EPYC
        with AVX512-BF16, 1.5 GB of memory, for D = 768, F = 12,288; the cost is printed first)
Study   python train_sae.py --runs adaptive control --layers 3 6 9 --preset published --arch relu --unit head
        (the study did not normalise its inputs: the same --l1 weighs differently here; it found L0 28 to 74)

Shapes  N tokens (dumped, or of a batch), D width of the activation (d_in), F latents (d_sae), n active entries of a batch;
        T tokens a window, W windows, B sequences, H heads, K d_head, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

SAE_SCHEMA, WEIGHTS = "janus.sae/1", "sae_weights.safetensors"
ARCHS = {
    "batchtopk": "jumprelu",
    "topk": "topk",
    "relu": "standard",
}  # and what SAELens calls the export
ARCHS |= {"jumprelu": "jumprelu", "gated": "gated", "matryoshka": "jumprelu"}
SPARSE_ARCHS = ("topk", "batchtopk", "matryoshka")  # the largest latents fire, k a token
L1_ARCHS = ("relu", "gated")  # their L0 follows from --l1, not from --k or --target_l0
TWINS = (
    "sae.safetensors",
    "ae.pt",
    "config.json",
)  # of a topk folder: what eai-sparsify and dictionary_learning read
SITES = ["z", "attn_out", "mlp_out", "resid_pre", "resid_post"]
BLOCK, POOL = (
    256,
    1 << 18,
)  # rows read in one go, rows shuffled together: memory does not grow with the dump
DOUBT = {
    "bfloat16": (4, 4),
    "int8": (1 << 30, 8),
}  # latents a token above, below the cut that float32 must look at; int8: all above
CE_GAP = 0.02  # nats; where ablation costs less, "CE recovered" divides noise by noise
GROUP = ["run", "unit", "arch", "site", "layer"]
PHASE_PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(expansion=16, k=32, l1=5e-3, tokens=10_000_000, batch_size=4096, learning_rate=6e-4, dead_tokens=1_000_000,
                 eval_tokens=200_000),
    "published": dict(expansion=8, k=32, l1=3e-4, steps=5000, batch_size=4096, learning_rate=3e-4, dead_tokens=1_000_000,
                      eval_tokens=200_000),
    "demo": dict(expansion=8, k=16, l1=1e-2, steps=500, batch_size=2048, learning_rate=2e-3, dead_tokens=100_000, eval_tokens=20_000),
    "smoke": dict(expansion=8, k=8, l1=2e-2, steps=150, batch_size=512, learning_rate=2e-3, dead_tokens=20_000, eval_tokens=8_000),
}  # fmt: skip


# -------------------------------------------------------------------------------- method: edit here
class Code(NamedTuple):
    """The latents that fire in a batch, sparse and sorted by token: entry e says that latent[e] fires with value[e] at token[e]."""

    latent: Tensor  # [n]
    value: Tensor  # [n]
    token: Tensor  # [n]
    start: Tensor  # [N], where the entries of each token begin


def row_topk(pre: Tensor, k: int, members: int = 16) -> tuple[Tensor, Tensor]:
    """The k largest of each row of pre [N, F] -> values, latents [N, k]. Exact and faster than topk: they lie in the k groups of
    `members` latents that have the largest maxima (strided groups, so that the maximum vectorises)."""
    groups = pre.shape[1] // members
    if pre.shape[1] % members or groups < 2 * k:
        value, latent = pre.topk(k, sorted=False)
        return value, latent
    best = pre.view(len(pre), members, groups).amax(1).topk(k, sorted=False).indices
    latent = (best[:, None] + torch.arange(members, device=pre.device)[:, None] * groups).flatten(1)
    value, at = pre.gather(1, latent).topk(k, sorted=False)
    return value, latent.gather(1, at)


def nth_largest(value: Tensor, n: int) -> Tensor:
    """The n-th largest of value [any]: infinity for n = 0, and 0 where there are not as many."""
    if n == 0:
        return value.new_full((), math.inf)
    return value.kthvalue(len(value) - n + 1).values if len(value) >= n else value.new_zeros(())


def products(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x [N, D] w [F, D]^T + b [F] -> [N, F] in the dtype of x. The bias is one more input that is 1: addmm would first write it."""
    ones = x.new_ones(len(x), 1)
    return torch.cat([x, ones], 1) @ torch.cat([w.to(x.dtype), b[:, None].to(x.dtype)], 1).T


def int8_products(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x [N, D] w [F, D]^T + b [F] -> [N, F] in bfloat16, from rows of x and w rounded to 255 levels each. On CPUs with VNNI twice as
    fast as bfloat16; the error is 1 % of |x| |w| / sqrt(D) where entries of a row are alike, more where few of them are large."""

    def levels(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = (
            torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True)) / 127
        ).clamp(min=1e-30)
        return (rows / scale).round_().to(torch.int8), scale.bfloat16()

    (x8, x_scale), (w8, w_scale) = levels(x), levels(w)
    sums = torch._int_mm(x8, w8.T).bfloat16().mul_(x_scale)
    return torch.addcmul(b.bfloat16(), sums, w_scale.T, out=sums)


def select(
    pre: Tensor,
    k: int,
    arch: str,
    guess: Tensor | float = 0.0,
    exact: Callable[[Tensor, Tensor], Tensor] | None = None,
    doubt: tuple[int, int] = (0, 0),
) -> tuple[Code, Tensor]:
    """pre [N, F] -> the positive ones among each token's k largest (topk), or the batch's N k largest (batchtopk, Bussmann et al.
    2024); and tau, the smallest value that fires (batchtopk). Exact whatever the `guess`, which is a fast lower bound of tau.
    jumprelu: all that exceed `guess` [F].

    pre in bfloat16 or int8 orders close values wrongly: where `exact` (latent [n], token [n] -> float32 values [n]) is given, it
    decides between the doubt[0] a token that are just large enough and the doubt[1] that are just too small."""
    n, sure, spare = len(pre), max(k - doubt[0], 0), min(doubt[1], pre.shape[1] - k)
    if arch == "topk":
        value, latent = row_topk(pre, k + spare)
        if exact:
            value = value.float()
            if sure:
                value, order = value.sort(1, descending=True)
                latent = latent.gather(1, order)
            close = latent[:, sure:]
            token = torch.arange(n, device=pre.device).repeat_interleave(close.shape[1])
            best, at = exact(close.flatten(), token).view_as(close).topk(k - sure)
            value, latent = (
                torch.cat([value[:, :sure], best], 1),
                torch.cat([latent[:, :sure], close.gather(1, at)], 1),
            )
        value, latent, token = (
            value.flatten(),
            latent.flatten(),
            torch.arange(n, device=pre.device).repeat_interleave(k),
        )
        tau = value.new_zeros(())
    else:
        token, latent = (pre > guess).nonzero(as_tuple=True)
        if arch != "jumprelu" and len(token) < (k + spare) * n:  # guessed too high
            token, latent = (pre > 0).nonzero(as_tuple=True)
        value, tau = pre[token, latent].to(torch.float32 if exact else pre.dtype), pre.new_zeros(())
        if arch != "jumprelu":
            if exact:
                close = (
                    (value >= nth_largest(value, (k + spare) * n))
                    & (value <= nth_largest(value, sure * n))
                ).nonzero()[:, 0]
                value[close] = exact(latent[close], token[close])
            tau = nth_largest(value, k * n)
    fires = (value > 0) & (value >= tau)
    count = torch.bincount(token[fires], minlength=n)
    return Code(latent[fires], value[fires], token[fires], count.cumsum(0) - count), tau.float()


def nested(code: Code, n: int, ends: Tensor) -> Code:
    """The code of G copies of the batch of n tokens: what fires below ends[0] [G] at token t stays, below ends[g] goes to g n + t."""
    token, order = (torch.bucketize(code.latent, ends, right=True) * n + code.token).sort(
        stable=True
    )
    count = torch.bincount(token, minlength=n * len(ends))
    return Code(code.latent[order], code.value[order], token, count.cumsum(0) - count)


def pair_products(x: Tensor, w: Tensor, latent: Tensor, token: Tensor) -> Tensor:
    """x[token] . w[latent] [n] for x [N, D], w [F, D], tokens in order: without gathering rows, of which there are n D numbers."""
    count = torch.bincount(token, minlength=len(x))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, w, latent, count.cumsum(0) - count, token, 0, -1
    )


def sparse_backward(
    x: Tensor, code: Code, dy: Tensor, w_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of W_enc [F, D], b_enc [F], W_dec [F, D] and of the values [n] from dy [N, D], that at the reconstruction of x [N, D].

    dvalue = dy . w_dec[latent];  dW_dec[f] = sum of value dy, dW_enc[f] = sum of dvalue x over the tokens where f fires. A sum over
    tokens grouped by latent is an embedding bag: no atomics, nothing of size [n, D] or [N, F]. A value of 0 did not fire.
    """
    d_value = pair_products(dy, w_dec, code.latent, code.token)
    order, count = (
        code.latent.argsort(stable=True),
        torch.bincount(code.latent, minlength=len(w_dec)),
    )
    token, start = code.token[order], count.cumsum(0) - count

    def bag(rows: Tensor, weight: Tensor) -> Tensor:
        return F.embedding_bag(
            token, rows, start, per_sample_weights=weight[order], mode="sum"
        ).float()

    d_pre = d_value * (code.value > 0)
    d_bias = torch.zeros(len(w_dec), device=x.device).index_add_(0, code.latent, d_pre.float())
    return bag(x, d_pre), d_bias, bag(dy, code.value), d_value


def dense_backward(
    x: Tensor, acts: Tensor, dy: Tensor, w_dec: Tensor, l1: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """As sparse_backward, for dense acts = relu(pre) [N, F] with an L1 penalty of weight l1 on each."""
    d_pre = (dy @ w_dec.T + l1) * (acts > 0)
    return (d_pre.T @ x).float(), d_pre.sum(0, dtype=torch.float32), (acts.T @ dy).float()


class Trainer:
    """One SAE in training, on x = scale * (raw - mean), with the scale that makes E||x|| = sqrt(D); rows of W_dec have unit norm.

    pre = (x - b_dec) W_enc^T + b_enc;   f = relu(pre) (relu), or its largest (select);   y = f W_dec + b_dec
    loss = ||y - x||^2 / D, + l1 sum(f) (relu), + AUX ||y_dead - (x - y)||^2 / ||x - y||^2 (topk, batchtopk; Gao et al. 2024), where
    y_dead is what the aux_k dead latents with the largest pre decode to. Means over tokens; gradients by hand, not by autograd.
    matryoshka (Bussmann et al. 2025): batchtopk, whose squared error is the mean over the PREFIXES of the latents, each alone.
    jumprelu (Rajamanoharan et al. 2024b): batchtopk with f = pre [pre > threshold] and + (L0 / target - 1)^2; a threshold learns
    through a rectangle of width BANDWIDTH in place of the step's delta, nothing else does.
    gated (Rajamanoharan et al. 2024a): with gate = pre, f = [gate > 0] relu(exp(r_mag) (x - b_dec) W_enc^T + b_mag) and
    + l1 sum(relu(gate)) + ||relu(gate) W_dec + b_dec - x||^2 / D, the decoder of this last term held.
    """

    AUX, AUX_TOKENS = 1 / 32, 1 / 8  # weight of the auxiliary loss, share of the batch that it sees
    CLIP = 1.0  # norm of D times the gradient, as in SAELens: large early gradients would stay in Adam's second moment for long
    BANDWIDTH = 0.5  # in units of pre; at the start a latent's pre has standard deviation 1
    THRESHOLD_RATE = 10  # learning rate of thresholds over that of weights; at 1, L0 stays far below its target for hundreds of steps
    PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)  # shares of the latents
    TAU_STEPS = 100  # memory of tau's moving average, at most a fifth of the steps so far

    def __init__(
        self, args: argparse.Namespace, mean: Tensor, norm: float, device: torch.device
    ) -> None:
        d, f = len(mean), len(mean) * args.expansion
        self.args, self.int8, self.step_count = args, args.dtype == "int8", 0
        self.dtype = torch.bfloat16 if self.int8 else getattr(torch, args.dtype)
        self.mean, self.scale = mean.to(device), math.sqrt(d) / norm
        w_dec = F.normalize(
            torch.randn(f, d, generator=torch.Generator().manual_seed(args.seed)), dim=1
        )
        w_enc = w_dec * (
            2 / args.expansion if args.arch in L1_ARCHS else 1
        )  # there the half that fires then adds up to x
        # b_dec starts at the mean of the data, which is 0 in these coordinates
        more = {"jumprelu": 1, "gated": 2}.get(args.arch, 0)  # threshold; r_mag, b_mag
        self.params = [
            t.to(device, copy=True)
            for t in (w_enc, torch.zeros(f), w_dec, torch.zeros(d), *[torch.zeros(f)] * more)
        ]
        self.W_enc, self.b_enc, self.W_dec, self.b_dec, *self.more = self.params
        shares = self.PREFIXES if args.arch == "matryoshka" else (1,)
        self.ends = torch.tensor([round(f * share) for share in shares], device=device)
        groups = [{"params": p} for p in (self.params[:4], self.more) if p]
        self.optimizer = torch.optim.Adam(
            groups, lr=args.learning_rate, eps=1e-9, fused=device.type != "mps"
        )
        self.idle = torch.zeros(f, dtype=torch.int64, device=device)  # tokens since a latent fired
        self.tau = torch.zeros((), device=device)
        self.history: list[dict[str, Any]] = []

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sets .grad of every parameter for the batch x [N, D] -> squared error a dimension, and firings [F]."""
        (n, d), a = x.shape, self.args
        w_dec, full = self.W_dec.to(self.dtype), x - self.b_dec
        low = full.to(self.dtype)
        pre = (
            int8_products(full, self.W_enc, self.b_enc)
            if self.int8
            else products(low, self.W_enc, self.b_enc)
        )
        more: tuple[Tensor, ...] = ()
        if a.arch == "gated":
            (r_mag, b_mag), gate = self.more, pre.relu()
            gain = r_mag.exp()
            acts = (
                torch.addcmul((b_mag - gain * self.b_enc).to(self.dtype), pre, gain.to(self.dtype))
                .relu_()
                .mul_(pre > 0)
            )
            error, gate_error = ((f @ w_dec).float() + self.b_dec - x for f in (acts, gate))
            dy, fired = error * (2 / (n * d)), (acts > 0).sum(0)
            d_mag, d_b_mag, d_dec = dense_backward(low, acts, dy.to(self.dtype), w_dec)
            d_gate, d_b_gate, _ = dense_backward(
                low, gate, gate_error.mul_(2 / (n * d)).to(self.dtype), w_dec, a.l1 / n
            )
            d_mag *= gain[:, None]
            grads, more = [d_mag + d_gate, d_b_gate, d_dec], ((d_mag * self.W_enc).sum(1), d_b_mag)
            d_shared = gain * d_b_mag + d_b_gate
        elif a.arch == "relu":
            acts = pre.relu()
            error = (acts @ w_dec).float() + self.b_dec - x
            dy, fired = error * (2 / (n * d)), (acts > 0).sum(0)
            grads = [*dense_backward(low, acts, dy.to(self.dtype), w_dec, a.l1 / n)]
            d_shared = grads[1]
        else:
            jump = a.arch == "jumprelu"
            guess = (self.more[0] - self.BANDWIDTH / 2).to(self.dtype) if jump else 0.8 * self.tau

            def exact(latent: Tensor, token: Tensor) -> Tensor:
                return pair_products(full, self.W_enc, latent, token) + self.b_enc[latent]

            doubt = (exact, DOUBT[a.dtype]) if a.dtype in DOUBT else ()
            code, tau = select(pre, a.k, a.arch, guess, *doubt)
            if jump:  # what the kernel reaches below the threshold is in the code with a value of 0
                threshold, tau = self.more[0][code.latent], self.more[0].mean()
                over = code.value.float() - threshold
                code = code._replace(value=code.value * (over > 0))
            self.tau = self.tau.lerp(tau, 1 / min(self.TAU_STEPS, max(1, self.step_count / 5)))
            fired = torch.bincount(code.latent[code.value > 0], minlength=len(w_dec))
            code = code._replace(value=code.value.to(self.dtype))
            code = nested(code, n, self.ends) if len(self.ends) > 1 else code
            y = (
                F.embedding_bag(
                    code.latent, w_dec, code.start, per_sample_weights=code.value, mode="sum"
                )
                .float()
                .view(-1, n, d)
            )
            errors = (
                (y.cumsum(0) if len(y) > 1 else y) + self.b_dec - x
            )  # [G, N, D], of each prefix
            dy = errors * (2 / errors.numel())
            dy = (
                dy.flip(0).cumsum(0).flip(0) if len(dy) > 1 else dy
            )  # a latent serves its own and all longer prefixes
            copies = low.expand(len(dy), n, d).flatten(0, 1)
            *grads, d_value = sparse_backward(copies, code, dy.flatten(0, 1).to(self.dtype), w_dec)
            d_shared, dy, error = grads[1], dy[0], errors[-1]
            if jump:
                pull = 2 * (fired.sum() / n / a.target_l0 - 1) / (a.target_l0 * n)
                slope = (
                    (threshold * d_value.float() + pull)
                    * (over.abs() < self.BANDWIDTH / 2)
                    / -self.BANDWIDTH
                )
                more = (torch.zeros_like(self.b_enc).index_add_(0, code.latent, slope),)
            if len(dead := (self.idle > a.dead_tokens).nonzero().flatten()) and a.aux_k:
                m = math.ceil(
                    n * self.AUX_TOKENS
                )  # the batch is shuffled: its first rows are a random sample
                # of int8 products only the order counts, here the values do
                silent = (
                    products(low[:m], self.W_enc[dead], self.b_enc[dead])
                    if self.int8
                    else pre[:m, dead]
                )
                top = silent.topk(min(len(dead), d // 2 if a.aux_k < 0 else a.aux_k))
                acts = torch.zeros_like(silent).scatter_(1, top.indices, top.values.relu())
                d_aux = ((acts @ w_dec[dead]).float() + error[:m]) * (
                    2 * self.AUX / error[:m].square().sum().clamp(min=1e-9)
                )
                for grad, part in zip(
                    grads,
                    dense_backward(low[:m], acts, d_aux.to(self.dtype), w_dec[dead]),
                    strict=True,
                ):
                    grad.index_add_(0, dead, part)
        # the decoder adds b_dec, the encoder subtracts it
        for p, grad in zip(
            self.params, (*grads, dy.sum(0) - d_shared @ self.W_enc, *more), strict=True
        ):
            p.grad = grad
        return error.square().mean(), fired

    def step(self, raw: Tensor) -> None:
        """One optimiser step on raw rows [N, D]: Adam, with the decoder's gradient kept along the sphere and its norm at 1.

        A latent without a gradient loses its momentum and stands still. Adam would drag it on for some ten steps after it last
        fired: at a high learning rate far enough for a rare latent to die of it."""
        a, self.step_count = self.args, self.step_count + 1
        x = (raw.to(self.mean.device).float() - self.mean) * self.scale
        if (
            a.arch == "jumprelu" and self.step_count == 1
        ):  # at the L0 asked for, which is then only held: the rate moves them little
            self.more[0].fill_(
                select(
                    (x[:256] - self.b_dec) @ self.W_enc.T + self.b_enc, a.target_l0, "batchtopk"
                )[1]
            )
        mse, fired = self.gradients(x)
        decay = (a.steps + 1 - self.step_count) / (a.lr_decay * a.steps) if a.lr_decay else 1.0
        for group, speed in zip(
            self.optimizer.param_groups,
            (1, self.THRESHOLD_RATE if a.arch == "jumprelu" else 1),
            strict=False,
        ):
            group["lr"] = (
                speed * a.learning_rate * min(1.0, self.step_count / max(1, a.lr_warmup), decay)
            )
        if a.arch not in L1_ARCHS:  # gated recovers planted atoms less well with it
            torch.nn.utils.clip_grad_norm_(self.params, self.CLIP / len(self.mean))
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)
        still = (self.b_enc.grad == 0).nonzero()[:, 0]
        for p in self.params[:3]:
            if state := self.optimizer.state.get(p):
                state["exp_avg"].index_fill_(0, still, 0)
        self.optimizer.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        if a.arch == "jumprelu":
            self.more[0].clamp_(min=self.BANDWIDTH / 2)  # the kernel stays where pre is positive
        self.idle = torch.where(fired > 0, 0, self.idle + len(raw))
        if not math.isfinite(mse):
            raise HandoffError(
                f"step {self.step_count}: the error is {mse:g}; try a --learning_rate below {a.learning_rate}"
            )
        if self.step_count % 50 == 0 or self.step_count == a.steps:
            dead = (self.idle > a.dead_tokens).float().mean()
            facts = {
                "mse_normalised": mse,
                "l0": fired.sum() / len(raw),
                "dead_share": dead,
                "threshold": self.tau,
            }
            self.history.append({"step": self.step_count} | {k: v.item() for k, v in facts.items()})

    def weights(self, scale: float = 1.0, mean: Tensor | float = 0.0) -> dict[str, Tensor]:
        """The weights in SAELens' layout; with the trainer's scale and mean folded in they take and give raw activations."""
        out = {
            "W_enc": self.W_enc.T,
            "b_enc": self.b_enc / scale,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec / scale + mean,
        }
        if self.args.arch == "gated":
            out |= {
                "b_gate": out.pop("b_enc"),
                "r_mag": self.more[0],
                "b_mag": self.more[1] / scale,
            }
        elif ARCHS[self.args.arch] == "jumprelu":
            out["threshold"] = (
                self.more[0] if self.more else self.tau.expand_as(self.b_enc)
            ) / scale
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in out.items()}


class SparseAutoencoder(NamedTuple):
    """An SAE in plain torch, as SAELens would run it: x [..., D] -> latents f [..., F] -> reconstruction [..., D]."""

    cfg: dict[str, Any]
    weights: dict[str, Tensor]

    def encode(self, x: Tensor) -> Tensor:
        pre = (x - self.weights["b_dec"]) @ self.weights["W_enc"]
        if self.cfg["architecture"] == "gated":
            magnitude = pre * self.weights["r_mag"].exp() + self.weights["b_mag"]
            return magnitude.relu() * (pre + self.weights["b_gate"] > 0)
        pre = pre + self.weights["b_enc"]
        if self.cfg["architecture"] == "topk":
            top = pre.topk(self.cfg["k"], sorted=False)
            return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
        return (
            pre.relu() * (pre > self.weights["threshold"])
            if self.cfg["architecture"] == "jumprelu"
            else pre.relu()
        )

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weights["W_dec"] + self.weights["b_dec"]


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Reads an exported SAE folder; HandoffError if it is missing or damaged."""
    try:
        cfg = json.loads((Path(folder) / "cfg.json").read_text(encoding="utf-8"))
        return SparseAutoencoder(
            cfg, safetensors.torch.load_file(Path(folder) / WEIGHTS, device=str(device))
        )
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise HandoffError(
            f"{folder} is not a readable SAE ({str(e)[:120]}); make it with: python train_sae.py"
        ) from None


# ---------------------------------------------------------------------------------------------- run
class Dump:
    """A dumped layer, or one head of it: `array` [N, D] memory-mapped, `n_train` training rows, then the `held_out` windows (5 %)."""

    def __init__(self, folder: Path, layer: int, site: str, head: int | None = None) -> None:
        self.run, self.layer, self.site, self.head, path = (
            folder.name,
            layer,
            site,
            head,
            folder / f"L{layer}.{site}.npy",
        )
        self.path, self.remedy = (
            path,
            f"python harvest_activations.py --run_name {self.run} --layers {layer}",
        )
        self.side = read_sidecar(path, "janus.activations/1", self.remedy)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            self.seq_len, self.d_head = self.side["seq_len"], self.side["d_head"]
            if list(array.shape) != self.side["shape"] or array.dtype not in (
                np.float16,
                np.float32,
            ):
                raise ValueError(
                    f"found {array.dtype} {list(array.shape)}, expected {self.side['dtype']} {self.side['shape']}"
                )
        except (ValueError, KeyError, EOFError) as e:
            raise HandoffError(
                f"{path} does not agree with its sidecar ({e}); remake it with: {self.remedy}"
            ) from None
        self.columns = (
            slice(None) if head is None else slice(head * self.d_head, (head + 1) * self.d_head)
        )
        self.array, n = array[:, self.columns], len(array) // self.seq_len
        if n < 2:
            raise HandoffError(
                f"{path} has {n} windows of {self.seq_len} tokens, expected at least 2 (one is held out): harvest more"
            )
        self.held_out = range(n - max(1, round(0.05 * n)), n)
        self.n_train = self.held_out.start * self.seq_len
        self.pool: tuple[Any, Tensor] = (None, torch.empty(0))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 [n, D] in the type of the dump. Raises HandoffError, naming the first that is not finite."""
        x = torch.from_numpy(np.array(self.array[start:stop]))
        if not math.isfinite(x.sum(dtype=torch.float64)):
            row = start + int((~x.isfinite().all(1)).nonzero()[0])
            raise HandoffError(
                f"layer {self.layer}, row {row} of {self.path} is NaN or infinite; remake it with: {self.remedy}"
            )
        return x

    def evaluation(self, n_tokens: int) -> list[int]:
        """Held-out windows, evenly spaced, at most n_tokens tokens of them."""
        n = max(1, min(n_tokens // self.seq_len, len(self.held_out)))
        return [self.held_out[i] for i in np.linspace(0, len(self.held_out) - 1, n).astype(int)]

    def windows(self, numbers: list[int]) -> Iterator[Tensor]:
        """The rows of these windows, float32 [n * T, D], a few windows at a time."""
        per = max(1, 4096 // self.seq_len)
        for i in range(0, len(numbers), per):
            yield torch.cat(
                [self.rows(w * self.seq_len, (w + 1) * self.seq_len) for w in numbers[i : i + per]]
            ).float()

    def moments(self) -> tuple[Tensor, float]:
        """Mean [D] and E||x - mean|| of the training rows. Reads every row once, so that a bad one is found before training."""
        total = torch.zeros(self.array.shape[1], dtype=torch.float64)
        for start in range(0, len(self.array), 4096):
            total += self.rows(start, start + 4096)[: max(0, self.n_train - start)].sum(
                0, dtype=torch.float64
            )
        mean, starts = (
            (total / self.n_train).float(),
            np.linspace(0, max(0, self.n_train - BLOCK), 256).astype(int),
        )
        norm = float(
            np.mean(
                [
                    (self.rows(s, min(s + BLOCK, self.n_train)).float() - mean).norm(dim=1).mean()
                    for s in starts
                ]
            )
        )
        if norm == 0:
            raise HandoffError(
                f"{self.path} is the same in every row: nothing to decompose; remake it with: {self.remedy}"
            )
        return mean, norm

    def layout(self, size: int) -> tuple[int, int, int, int]:
        """Rows a block, blocks, pools an epoch, and batches of `size` rows a pool."""
        block, pools = min(BLOCK, size), math.ceil(self.n_train / POOL)
        blocks = self.n_train // block
        if not (per_pool := blocks // pools * block // size):
            raise HandoffError(
                f"--batch_size {size} is too large for the {self.n_train} training rows of {self.path}: harvest more"
            )
        return block, blocks, pools, per_pool

    def batch(self, number: int, size: int, seed: int) -> Tensor:
        """Batch `number` [size, D] of an endless shuffled stream: a pure function of its arguments, so a run's cursor is one number.

        Every epoch deals blocks of neighbouring rows at random into pools; within a pool single rows are shuffled.
        """
        (block, blocks, pools, per_pool), seed = (
            self.layout(size),
            seed % 2**32,
        )  # NumPy takes no negative seed
        if self.pool[0] != (number // per_pool, size, seed):
            epoch, at = divmod(number // per_pool, pools)
            chosen = np.array_split(
                np.random.default_rng([seed, epoch]).permutation(blocks), pools
            )[at]
            x = torch.cat([self.rows(b * block, (b + 1) * block) for b in np.sort(chosen)])
            shuffle = torch.from_numpy(np.random.default_rng([seed, epoch, at]).permutation(len(x)))
            self.pool = (number // per_pool, size, seed), x[shuffle]
        return self.pool[1][number % per_pool * size :][:size]


def ratio_interval(
    name: str, top: np.ndarray, bottom: np.ndarray | float = 1.0
) -> dict[str, float]:
    """sum(top) / sum(bottom) over windows [W], and its 95 % percentile interval under resampling of windows (NaN below two)."""
    bottom = np.broadcast_to(np.asarray(bottom, float), top.shape)
    pick = np.random.default_rng(0).integers(len(top), size=(2000, len(top)))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, draws = top.sum() / bottom.sum(), top[pick].sum(1) / bottom[pick].sum(1)
    low, high = np.nanquantile(draws, [0.025, 0.975]) if len(top) > 1 else (math.nan, math.nan)
    return {name: float(value), f"{name}_lo": float(low), f"{name}_hi": float(high)}


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder, dump: Dump, chosen: list[int]
) -> tuple[dict[str, Any], np.ndarray]:
    """L0, reconstruction error and firing on the windows `chosen` -> metrics, and each latent's number of firings [F]."""
    device = sae.weights["W_dec"].device
    mean = torch.stack([x.mean(0) for w in chosen for x in dump.windows([w])]).mean(0).to(device)
    parts, fired = [], torch.zeros(len(sae.weights["W_dec"]), dtype=torch.int64, device=device)
    for x in (x.to(device) for x in dump.windows(chosen)):
        f = sae.encode(x)
        fired += (f > 0).sum(0)
        parts.append(
            torch.stack(
                [(f > 0).sum(1), (sae.decode(f) - x).square().sum(1), (x - mean).square().sum(1)]
            )
            .double()
            .cpu()
        )
    l0, error, variance = torch.cat(parts, 1).view(3, len(chosen), -1).numpy()  # each [W, T]
    out = ratio_interval("l0", l0.mean(1)) | {
        f"l0_p{q:02d}": float(np.percentile(l0, q)) for q in (5, 50, 95)
    }
    out |= ratio_interval("fvu", error.sum(1), variance.sum(1)) | ratio_interval(
        "mse", error.mean(1) / len(mean)
    )
    out |= {
        "ev_legacy": float((1 - error / variance).mean()),
        "dead_share_eval": float((fired == 0).float().mean()),
    }
    return out | {"n_windows": len(l0), "n_rows": l0.size}, fired.cpu().numpy()


def spliced(
    model: NewGPT, resid: Tensor, layer: int, site: str, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits [B, T, V] when `edit` replaces activation `site` of block `layer`, which reads resid [B, T, D]."""
    rope, swap = (model.rope_cos[: resid.shape[1]], model.rope_sin[: resid.shape[1]]), {site: edit}
    block: Any = model.blocks[layer]

    def at(name: str, value: Tensor) -> Tensor:
        return swap[name](value) if name in swap else value

    x = at("resid_pre", resid)
    mid = x + at("attn_out", block.write(at("z", block.attn(block.norm_attn(x), *rope)[0])))
    return model.unembed(
        model.run_blocks(at("resid_post", mid + at("mlp_out", block.mlp(mid))), layer + 1)
    )


@torch.no_grad()
def ce_recovered(
    model: NewGPT,
    sae: SparseAutoencoder,
    dump: Dump,
    tokens: np.ndarray,
    mean: Tensor,
    chosen: list[int],
) -> dict[str, Any]:
    """What the model loses (nats a token) when the reconstruction replaces the activation, against zero and mean ablation.

    recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean); KL is KL(clean || edited). Float32; the mean is that of training rows.
    """
    edits = {
        "clean": lambda v: v,
        "sae": lambda v: sae.decode(sae.encode(v)),
        "zero": torch.zeros_like,
        "mean": lambda v: 0 * v + mean,
    }
    ce: dict[str, list] = {name: [] for name in edits}
    kl: dict[str, list] = {name: [] for name in edits}
    per = max(1, (1 << 24) // (dump.seq_len * model.cfg.vocab_size))
    for i in range(0, len(chosen), per):
        windows = [tokens[w * dump.seq_len : (w + 1) * dump.seq_len] for w in chosen[i : i + per]]
        idx = torch.from_numpy(np.stack(windows).astype(np.int64)).to(mean.device)
        resid, clean = model.run_blocks(model.embed(idx), 0, dump.layer), None
        for name, new in edits.items():

            def edit(value: Tensor, new: Callable[[Tensor], Tensor] = new) -> Tensor:
                flat = value.flatten(
                    2
                ).clone()  # z [B, T, H, K] -> [B, T, D], heads side by side as in the dump
                flat[..., dump.columns] = new(flat[..., dump.columns])
                return flat.view_as(value)

            logp = spliced(model, resid, dump.layer, dump.site, edit)[:, :-1].log_softmax(-1)
            clean = logp if clean is None else clean
            ce[name] += (-logp.gather(2, idx[:, 1:, None]).mean((1, 2))).tolist()
            kl[name] += (clean.exp() * (clean - logp)).sum(-1).mean(1).tolist()
    loss = {name: np.array(v) for name, v in ce.items()}
    out = {f"ce_{n}": loss[n].mean() for n in edits} | {
        f"kl_{n}": np.mean(kl[n]) for n in ("sae", "zero", "mean")
    }
    for base in ("zero", "mean"):
        out |= ratio_interval(
            f"ce_recovered_{base}", loss[base] - loss["sae"], loss[base] - loss["clean"]
        )
    return out | {
        "ce_informative": bool(out["ce_mean"] - out["ce_clean"] >= CE_GAP),
        "n_ce_windows": len(chosen),
    }


def find_model(
    dump: Dump, given: Path | None, device: torch.device, skip_probe: bool
) -> tuple[NewGPT, np.ndarray] | None:
    """The model and the tokens behind a dump; None, and a line that says so, if the checkpoint it names is gone or changed."""
    path, expected, file = (
        given or Path(dump.side["checkpoint"]),
        dump.side["checkpoint_sha256"],
        dump.path.with_name("tokens.npy"),
    )
    found = sha256(path) if path.is_file() else "no such file"
    if found != expected and given:
        raise HandoffError(
            f"--model_path {path} ({found[:12]}) is not the checkpoint of run {dump.run} (sha256 {expected[:12]})"
        )
    if found != expected:
        print(
            f"{dump.run}: CE recovered and KL stay empty, as {path} is gone or not what was dumped; --model_path names another"
        )
        return None
    read_sidecar(file, "janus.tokens/1", dump.remedy)
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        tokens = np.zeros(0)
    model, _ = load_checkpoint(path, device, skip_probe)
    if len(tokens) != len(dump.array) or tokens.max() >= model.cfg.vocab_size:
        raise HandoffError(
            f"{file} does not fit {dump.path.name} ({len(dump.array)} rows) or the model; remake both with: {dump.remedy}"
        )
    return model, tokens


class Job(NamedTuple):
    args: argparse.Namespace  # with the sizes filled in
    dump: Dump
    folder: Path


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """One job an SAE. Opens every dump, so that a broken hand-off is found before any work."""
    jobs = []
    for run in (
        args.runs
        or sorted(p.parent.name for p in args.activations_dir.glob("*/tokens.npy"))
        or ["adaptive"]
    ):
        folder = args.activations_dir / run
        found = sorted(
            int(n[1:])
            for p in folder.glob(f"L*.{args.site}.npy")
            if (n := p.name.partition(".")[0])[1:].isdigit()
        )
        for layer in args.layers or found or [None]:
            if layer not in found:
                have = f"dumps of {args.site} of layers {', '.join(map(str, found)) or 'none'}" + (
                    "" if layer is None else f", not {layer}"
                )
                remedy = f"python harvest_activations.py --run_name {run} --layers LAYERS --model_path CHECKPOINT"
                raise HandoffError(f"{folder} has {have}; make more with: {remedy}")
            dump = Dump(folder, layer, args.site)
            out = (
                args.save_dir
                / dump.run
                / (f"L{layer}" if args.site == "z" else f"L{layer}.{args.site}")
            )
            heads = range(dump.array.shape[1] // dump.d_head) if args.unit == "head" else []
            jobs += [
                Job(fill_in(args, d := Dump(folder, layer, args.site, h)), d, out / f"H{h}")
                for h in heads
            ]
            jobs += [] if heads else [Job(fill_in(args, dump), dump, out)]
    return jobs


def fill_in(args: argparse.Namespace, dump: Dump) -> argparse.Namespace:
    """The arguments with the sizes of the preset, --tokens or --epochs as steps, and `trajectory`: all that decides the weights."""
    preset, given = dump.side.get("preset") if args.preset == "auto" else args.preset, vars(args)
    sizes = {**PHASE_PRESETS[preset if preset in PHASE_PRESETS else "full"]}
    if given.keys() & {"steps", "tokens", "epochs"}:
        sizes = {k: v for k, v in sizes.items() if k not in ("steps", "tokens")}
    a = argparse.Namespace(**sizes | given | {"preset": preset})
    if "steps" not in a:
        a.steps = max(
            1, round((a.tokens if "tokens" in a else a.epochs * dump.n_train) / a.batch_size)
        )
    a.tokens, d_in = a.steps * a.batch_size, dump.array.shape[1]
    a.target_l0 = given.get("target_l0", a.k)
    flag = "target_l0" if a.arch == "jumprelu" else "k"
    if a.arch not in L1_ARCHS and (k := getattr(a, flag)) > a.expansion * d_in:
        raise HandoffError(
            f"--{flag} {k} is more than the {a.expansion * d_in} latents that --expansion {a.expansion} gives {dump.path}"
        )
    dump.layout(a.batch_size)
    names = [
        "arch",
        "expansion",
        "k",
        "l1",
        "aux_k",
        "dead_tokens",
        "batch_size",
        "learning_rate",
        "lr_warmup",
        "lr_decay",
    ]
    names += [
        "seed",
        "dtype",
        *(["steps"] if a.lr_decay else []),
        *(["target_l0"] if a.arch == "jumprelu" else []),
    ]
    a.trajectory = {n: getattr(a, n) for n in names} | {
        "dump": dump.side["sha256"],
        "head": dump.head,
    }
    return a


def announce_cost(jobs: list[Job], device: torch.device) -> None:
    """Prints sizes and cost, measured on three steps that leave no trace; refuses to start if the disk is too small."""
    a, dump, _ = jobs[0]
    d, n, seconds = dump.array.shape[1], len(jobs), 0.0
    trainer = Trainer(a, torch.zeros(d), math.sqrt(d), device)
    for _ in range(3):
        start = time.perf_counter()
        trainer.step(dump.batch(0, a.batch_size, a.seed))
        seconds = time.perf_counter() - start
    copies = 6 if a.arch == "topk" else 4  # training state 3, exports
    minutes = seconds * a.steps * math.ceil(n / rank_and_world()[1]) / 60
    weights, pool = 8 * a.expansion * d * d, 2 * dump.array.itemsize * d * min(POOL, dump.n_train)
    need_disk(a.save_dir, weights * (copies * n + 3))
    print(
        f"{n} SAE{'s' * (n > 1)} ({a.arch}, of a {a.unit}): D = {d}, F = {a.expansion * d}, on {device} in {a.dtype}, preset {a.preset}"
    )
    memory = 8 * weights + pool + (20 if a.arch == "gated" else 12) * a.batch_size * a.expansion * d
    print(
        f"cost: {a.tokens:,} tokens in {a.steps} steps each, about {minutes:.1f} min in all",
        end="; ",
    )
    print(
        f"{weights * copies * n / 1e9:.2f} GB in {a.save_dir}, about {memory / 1e9:.1f} GB of memory",
        flush=True,
    )


def save_sae(job: Job, t: Trainer) -> None:
    """Training state, folded export and its cfg.json, training.csv. From here on the folder is unfinished, so a sidecar goes first."""
    a, dump, folder = job
    for old in (f"{WEIGHTS}.json", *TWINS):
        (folder / old).unlink(missing_ok=True)
    state = {
        "schema": SAE_SCHEMA,
        "trajectory": a.trajectory,
        "step": t.step_count,
        "history": t.history,
        "scale": t.scale,
        "mean": t.mean,
    }
    state |= {
        "params": t.params,
        "idle": t.idle,
        "tau": t.tau,
        "optimizer": t.optimizer.state_dict(),
    }
    torch.save(state, buffer := io.BytesIO())
    export = {name: w.cpu() for name, w in t.weights(t.scale, t.mean).items()}
    files = {"training_state.pt": buffer.getvalue(), WEIGHTS: safetensors.torch.save(export)}
    if a.arch == "topk":  # one folder for three libraries
        twin = {
            "encoder.weight": export["W_enc"].T.contiguous(),
            "encoder.bias": export["b_enc"],
            "b_dec": export["b_dec"],
        }
        files["sae.safetensors"] = safetensors.torch.save(twin | {"W_dec": export["W_dec"]})
        twin |= {
            "decoder.weight": export["W_dec"].T.contiguous(),
            "k": torch.tensor(a.k, dtype=torch.int32),
        }
        torch.save(twin | {"threshold": torch.tensor(-1.0)}, buffer := io.BytesIO())
        files["ae.pt"] = buffer.getvalue()
    for name, data in files.items():
        with atomic(folder / name) as tmp:
            tmp.write_bytes(data)
    hook = f"blocks.{dump.layer}." + ("attn.hook_z" if dump.site == "z" else f"hook_{dump.site}")
    # without a version, SAELens takes the file for an old one and drops the metadata
    metadata: dict[str, Any] = {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "hook_name": hook,
    }
    metadata |= {
        "model_name": f"janus/{dump.run}",
        "hook_head_index": dump.head,
        "context_size": dump.seq_len,
        "prepend_bos": False,
    }
    metadata |= {
        "dataset_path": dump.side.get("dataset"),
        "training_architecture": a.arch,
        "training_tokens": t.step_count * a.batch_size,
    }
    cfg = {
        "architecture": ARCHS[a.arch],
        "d_in": len(t.mean),
        "d_sae": len(t.b_enc),
        "dtype": "float32",
        "device": "cpu",
    }
    cfg |= {
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if a.arch == "topk":
        cfg |= {
            "k": a.k,
            "activation": "topk",
            "expansion_factor": a.expansion,
            "num_latents": len(t.b_enc),
            "normalize_decoder": True,
        }
        cfg |= dict.fromkeys(["multi_topk", "skip_connection", "transcode"], False)
        write_json(folder / "config.json", {"trainer": {"dict_class": "AutoEncoderTopK", "k": a.k}})
    write_json(folder / "cfg.json", cfg | {"metadata": metadata})
    write_csv(folder / "training.csv", pd.DataFrame(t.history))


def resume_sae(job: Job, device: torch.device) -> Trainer | None:
    """The trainer as training_state.pt left it; None if there is none. Raises HandoffError if --resume would change the trajectory."""
    a, dump, folder = job
    if not (path := folder / "training_state.pt").exists():
        return None
    try:
        s = torch.load(path, map_location="cpu", weights_only=True)
        then, t = s["trajectory"], Trainer(a, s["mean"], 1.0, device)
        if then == a.trajectory:
            for mine, saved in zip(
                [*t.params, t.idle, t.tau], [*s["params"], s["idle"], s["tau"]], strict=True
            ):
                mine.copy_(saved)
            t.optimizer.load_state_dict(s["optimizer"])
            t.scale, t.step_count, t.history = s["scale"], s["step"], s["history"]
    except Exception as e:  # torch raises many types for a damaged file
        raise HandoffError(
            f"{path} cannot be read ({str(e).strip()[:100]}); train anew with --overwrite"
        ) from None
    if differ := [n for n in {**a.trajectory, **then} if a.trajectory.get(n) != then.get(n)]:
        was, now = then.get(differ[0]), a.trajectory.get(differ[0])
        raise HandoffError(
            f"--resume would change {differ[0]} of {folder} from {was} to {now}; use the same arguments"
        )
    return t


def run_training(job: Job, device: torch.device, stop: list[int]) -> Trainer | None:
    """Trains one SAE, or goes on with it; None if it is finished already, or if a signal stopped it."""
    a, dump, folder = job
    t = (resume_sae(job, device) if a.resume else None) or Trainer(a, *dump.moments(), device)
    if t.step_count >= a.steps and sidecar_path(folder / WEIGHTS).exists():
        print(f"{folder} is finished; there is nothing to resume")
        return None
    board = (
        import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        if a.tensorboard
        else None
    )
    bar = tqdm(
        range(t.step_count, a.steps),
        initial=t.step_count,
        total=a.steps,
        desc="/".join(folder.parts[-3:]),
        unit="step",
        disable=None,
    )
    for step in bar:
        t.step(dump.batch(step, a.batch_size, a.seed))
        if board and t.history and t.history[-1]["step"] == step + 1:
            for name, value in t.history[-1].items():
                board.add_scalar(name, value, step + 1)
            board.add_histogram("tokens since a latent fired", t.idle, step + 1)
            board.flush()
        if stop or (step + 1) % a.save_interval == 0 or step + 1 == a.steps:
            save_sae(job, t)
        if stop:
            return None
    return t


def finish_sae(job: Job, t: Trainer, model: tuple[NewGPT, np.ndarray] | None) -> str:
    """Reads the export back, compares it with what was trained, measures it, writes the sidecar -> one line for the user."""
    a, dump, folder = job
    sae, chosen = load_sae(folder, t.mean.device), dump.evaluation(a.eval_tokens)
    x = next(dump.windows(chosen)).to(t.mean.device)
    twin, x_in = SparseAutoencoder(sae.cfg, t.weights()), (x - t.mean) * t.scale
    wrong = (twin.decode(twin.encode(x_in)) - (sae.decode(sae.encode(x)) - t.mean) * t.scale).norm(
        dim=1
    ) > 1e-3 * x_in.norm(dim=1)
    if (
        not wrong.float().mean() <= 0.01
    ):  # within rounding of a threshold a latent may fall on either side
        raise HandoffError(
            f"{folder} is not finished: {int(wrong.sum())} of {len(x)} rows come out of the export unlike the SAE trained"
        )
    m, fired = evaluate(sae, dump, chosen)
    m["dead_share_window"] = t.history[-1]["dead_share"]
    if model:
        m |= ce_recovered(
            model[0], sae, dump, model[1], t.mean, dump.evaluation(a.eval_tokens // 6)
        )
    names = {
        "run": dump.run,
        "unit": a.unit,
        "arch": a.arch,
        "site": dump.site,
        "layer": dump.layer,
        "head": dump.head,
    }
    latents = {
        "latent": np.arange(len(fired)),
        "n_fired": fired,
        "n_rows": m["n_rows"],
        "frequency": fired / m["n_rows"],
    }
    write_csv(folder / "latent_frequencies.csv", pd.DataFrame(names | latents))
    mean, variance = (
        np.asarray(dump.side[key], float)[dump.columns] for key in ("mean", "variance")
    )
    inherited = (
        "checkpoint",
        "checkpoint_sha256",
        "arm",
        "seq_len",
        "n_heads",
        "d_head",
        "tokenizer_hash",
        "dataset",
    )
    facts = {key: dump.side.get(key) for key in inherited} | {
        "gamma": np.linalg.norm(mean) / math.sqrt(variance.sum()),
        "scale": t.scale,
    }
    facts |= {
        "k": {"relu": None, "gated": None, "jumprelu": a.target_l0}.get(a.arch, a.k),
        "d_in": len(mean),
        "d_sae": len(fired),
    }
    facts |= {
        "steps": a.steps,
        "tokens": a.tokens,
        "seed": a.seed,
        "preset": a.preset,
        "trajectory": a.trajectory,
        "latent_frequencies": "latent_frequencies.csv",
    }
    write_sidecar(folder / WEIGHTS, SAE_SCHEMA, [dump.path], **names, **facts, metrics=m)
    line = f"{folder}: L0 {m['l0']:.1f}, FVU {m['fvu']:.3f} [{m['fvu_lo']:.3f}, {m['fvu_hi']:.3f}], never fired {m['dead_share_eval']:.1%}"
    if model:
        line += f", CE recovered {m['ce_recovered_zero']:.1%} (zero), {m['ce_recovered_mean']:.1%} (mean), KL {m['kl_sae']:.2g} nats"
        line += (
            ""
            if m["ce_informative"]
            else f"; mean ablation costs under {CE_GAP} nats, so CE recovered says little"
        )
    return line


def collect_metrics(save_dir: Path) -> None:
    """sae_metrics.csv: one row for every finished SAE under save_dir."""
    columns, rows = (
        [*GROUP, "head", "arm", "seed", "k", "d_in", "d_sae", "steps", "tokens", "gamma"],
        [],
    )
    for side in sorted(save_dir.glob(f"*/L*/**/{WEIGHTS}.json")):
        with contextlib.suppress(HandoffError):  # another process is just replacing it
            record = read_sidecar(
                side.with_suffix(""), SAE_SCHEMA, "python train_sae.py --overwrite"
            )
            rows.append(
                {c: record[c] for c in columns}
                | {"folder": side.parent.relative_to(save_dir).as_posix()}
                | record["metrics"]
            )
    frame = pd.DataFrame(rows).sort_values([*GROUP, "head"])
    absent = [
        c for c in ("ce_recovered_zero", "ce_recovered_mean", "kl_sae") if c not in frame
    ]  # empty columns where no model was there
    write_csv(save_dir / "sae_metrics.csv", frame.assign(**dict.fromkeys(absent, math.nan)))
    write_sidecar(
        save_dir / "sae_metrics.csv",
        "janus.sae_metrics/1",
        [save_dir / f / f"{WEIGHTS}.json" for f in frame["folder"]],
    )


def run(args: argparse.Namespace) -> int:
    if args.redraw:
        draw_report(args.save_dir)
        return 0
    keep_memory()
    (rank, world), (device, autocast) = rank_and_world(), set_up(args)
    args.dtype = "int8" if args.int8 else "bfloat16" if autocast._enabled else "float32"
    if args.int8 and device.type != "cpu":
        raise HandoffError(
            f"--int8 runs on a CPU, found {device.type}; give --device cpu, or leave --int8 out"
        )
    jobs = find_jobs(args)
    if not args.resume:
        refuse_overwrite(
            [job.folder / name for job in jobs for name in (WEIGHTS, "training_state.pt")],
            args.overwrite,
        )
    given = dict(zip(args.runs or [], args.model_path or [], strict=False))
    models = {
        run: find_model(dump, given.get(run), device, args.skip_probe)
        for run, dump in {j.dump.run: j.dump for j in jobs}.items()
    }
    announce_cost(jobs, device)
    all_sum(stopped := torch.zeros(()))  # nobody writes before all have looked at what is there
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))
    runs = {job.dump.run for job in jobs}
    recording: Any = run_record(
        args.save_dir / runs.pop() if len(runs) == 1 else args.save_dir, args
    )
    with contextlib.nullcontext({}) if rank else recording as record:
        record["settings"] = {str(job.folder): vars(job.args) for job in jobs}
        for job in jobs[rank::world]:  # several processes deal the jobs out
            trainer = run_training(job, device, stop)
            if stop:
                stopped += 1
                break
            if trainer:
                print(finish_sae(job, trainer, models[job.dump.run]), flush=True)
            job.dump.pool = (None, torch.empty(0))
        all_sum(stopped)
        if stopped:
            status = 128 + (stop or [signal.SIGTERM])[0]
            print(
                f"signal {status - 128}: what is unfinished in {args.save_dir} is saved; continue with the same command and --resume"
            )
            record["exit_status"] = status
            return status
        if rank:
            return 0
        with open(
            args.save_dir / ".lock", "w"
        ) as lock:  # runs trained side by side report one after the other
            fcntl.flock(lock, fcntl.LOCK_EX)
            collect_metrics(args.save_dir)
            draw_report(args.save_dir)
    print(
        f"see {args.save_dir / 'table2.md'}, and figure2_l0_by_depth.png and figure3_activation_frequency.png beside it"
    )
    return 0


# ------------------------------------------------------------------------------- tables and figures
STUDY = """Published (ReLU + L1, one SAE a head; control -> adaptive): L0 L3 32.4 -> 28.4, L6 39.7 -> 45.5, L9 58.9 -> 73.9;
MSE L3 .022 -> .020, L6 .029 -> .031, L9 .041 -> .051. (Batch)TopK fixes L0 by construction: compare its FVU."""


def write_csv(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    with atomic(path) as tmp:
        frame.to_csv(tmp, index=False)
    return frame


def read_csv(path: Path, needs: list[str]) -> pd.DataFrame:
    """A CSV of this script, checked for columns and rows."""
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as e:
        raise HandoffError(
            f"{path} cannot be read ({str(e)[:100]}); it is written by: python train_sae.py"
        ) from None
    if missing := [c for c in needs if c not in frame] or ([] if len(frame) else ["any row"]):
        raise HandoffError(
            f"{path} lacks {', '.join(missing)}; it is written by: python train_sae.py"
        )
    return frame


def table2(metrics: pd.DataFrame) -> pd.DataFrame:
    """A row a run and layer; 95 % intervals over heads (Student's t) or, where one SAE serves the layer, held-out windows."""
    rows = []
    for key, g in metrics.groupby(GROUP):
        n, over = (len(g), "heads") if len(g) > 1 else (g["n_windows"].iloc[0], "windows")
        row = dict(zip(GROUP, key, strict=True)) | {"interval_over": f"{n} {over}"}
        for name in ("l0", "mse", "fvu"):
            half = (
                stats.t.ppf(0.975, len(g) - 1) * g[name].std() / math.sqrt(len(g))
                if len(g) > 1
                else 0
            )
            low, high = (
                (g[name] - half, g[name] + half) if half else (g[f"{name}_lo"], g[f"{name}_hi"])
            )
            row |= {name: g[name].mean(), f"{name}_lo": low.mean(), f"{name}_hi": high.mean()}
        others = (
            "ce_recovered_zero",
            "ce_recovered_mean",
            "ce_informative",
            "kl_sae",
            "dead_share_eval",
        )
        rows.append(row | {c: g[c].astype(float).mean() for c in others if c in g})
    return pd.DataFrame(rows)


def draw_report(save_dir: Path) -> None:
    """Table 2 and figures 2 and 3, from sae_metrics.csv and the latent_frequencies.csv beside each SAE that it lists."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_csv(
        save_dir / "sae_metrics.csv",
        [*GROUP, "folder", "l0", "l0_lo", "mse", "mse_lo", "fvu", "fvu_lo", "n_windows"],
    )
    table = write_csv(save_dir / "table2.csv", table2(metrics))
    cells = [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.to_numpy()
    ]
    cells = [list(table.columns), ["---"] * table.shape[1], *cells]
    with atomic(save_dir / "table2.md") as tmp:
        tmp.write_text(
            "\n".join(f"| {' | '.join(row)} |" for row in cells)
            + f"\n\nMSE in squared raw units.\n{STUDY}\n",
            encoding="utf-8",
        )
    kinds = {
        kind: f"{kind[0]} ({kind[2]}, {kind[3]} of a {kind[1]})"
        for kind in table.groupby(GROUP[:-1]).groups
    }
    color = dict(
        zip(
            kinds,
            ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"] * len(kinds),
            strict=False,
        )
    )

    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    for i, (kind, t) in enumerate(table.groupby(GROUP[:-1])):
        for ax, name in zip(axes, ("l0", "fvu"), strict=True):
            bars = (
                (t[[f"{name}_lo", f"{name}_hi"]].sub(t[name], axis=0) * [-1, 1])
                .clip(lower=0)
                .to_numpy()
                .T
            )
            x = t["layer"] + 0.12 * (
                i - (len(kinds) - 1) / 2
            )  # side by side, so that intervals do not hide each other
            ax.errorbar(
                x,
                t[name],
                yerr=bars,
                marker="o",
                ms=5,
                capsize=3,
                lw=1.4,
                color=color[kind],
                label=kinds[kind],
            )
    for ax, label in zip(
        axes,
        ["L0: active latents a token", "FVU: share of the variance not explained"],
        strict=True,
    ):
        ax.set(xlabel="layer", ylabel=label, xticks=sorted(table["layer"].unique()), ylim=(0, None))
    axes[0].legend(fontsize=8)
    fig.suptitle("Sparsity and reconstruction error by depth, held-out tokens", fontsize=11)
    fig.supxlabel(
        f"Bars: 95 % intervals over {', '.join(sorted(table['interval_over'].unique()))}; a run is one training seed.\n{STUDY}",
        fontsize=7.5,
    )
    with atomic(save_dir / "figure2_l0_by_depth.png") as tmp:
        fig.savefig(tmp, dpi=130)

    layers = sorted(metrics["layer"].unique())
    n_cols, n_rows = min(3, len(layers)), math.ceil(len(layers) / 3)
    fig, grid = plt.subplots(
        n_rows,
        n_cols,
        figsize=(max(6, 4 * n_cols), 3.6 * n_rows),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for ax, layer in zip(grid.flat, layers, strict=False):
        for kind, g in metrics[metrics["layer"] == layer].groupby(GROUP[:-1]):
            latents = pd.concat(
                read_csv(save_dir / f / "latent_frequencies.csv", ["frequency", "n_rows"])
                for f in g["folder"]
            )
            edges = np.geomspace(0.7 / latents["n_rows"].max(), 1, 19)
            share = np.histogram(latents["frequency"], edges)[0] / len(latents)
            label = (
                f"{kinds[kind]}: {(latents['frequency'] == 0).mean():.1%} of {len(latents)} never"
            )
            ax.stairs(
                share,
                edges,
                lw=1.6,
                ls=["-", "--", ":"][list(kinds).index(kind) % 3],
                color=color[kind],
                label=label,
            )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="activation frequency (share of tokens)",
            title=f"layer {layer}",
        )
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)
    for ax in grid[:, 0]:
        ax.set_ylabel("share of latents in a bin")
    fig.suptitle(
        f"How often latents fire ({metrics['n_rows'].max():,} held-out tokens)", fontsize=11
    )
    with atomic(save_dir / "figure3_activation_frequency.png") as tmp:
        fig.savefig(tmp, dpi=130)
    plt.close("all")
    for name in (
        "table2.csv",
        "table2.md",
        "figure2_l0_by_depth.png",
        "figure3_activation_frequency.png",
    ):
        write_sidecar(save_dir / name, "janus.report/1", [save_dir / "sae_metrics.csv"])


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    p = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, real, by_preset = positive(int), positive(float), argparse.SUPPRESS
    g = p.add_argument_group("inputs")
    g.add_argument(
        "--runs",
        nargs="+",
        help="run names, folders under --activations_dir; default: all that are there",
    )
    g.add_argument(
        "--activations_dir",
        type=Path,
        default=Path("activations"),
        help="where harvest_activations.py wrote",
    )
    g.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="layers, counted from 0; default: all that were dumped for --site",
    )
    g.add_argument(
        "--site", choices=SITES, default="z", help="activation; z: the heads' outputs, before W_O"
    )
    g.add_argument(
        "--model_path",
        type=Path,
        nargs="+",
        help="checkpoint of each of --runs; default: the dump's, if unchanged",
    )
    g.add_argument(
        "--resume",
        action="store_true",
        help="go on with unfinished SAEs, keep finished ones; equals an uninterrupted run",
    )
    g.add_argument(
        "--redraw",
        action="store_true",
        help="only rebuild table 2 and the figures from the CSVs in --save_dir",
    )
    g = p.add_argument_group("outputs")
    g.add_argument("--save_dir", type=Path, default=Path("saes"), help="output folder")
    g.add_argument(
        "--tensorboard",
        action="store_true",
        help="also log to <SAE folder>/tensorboard (needs the package tensorboard)",
    )
    g.add_argument(
        "--save_interval",
        type=count,
        default=500,
        help="steps between saves of training state and export",
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--arch",
        choices=ARCHS,
        default="batchtopk",
        help="k on average, exactly k, L1, learned threshold, gated L1, nested k",
    )
    g.add_argument(
        "--unit",
        choices=["layer", "head"],
        default="layer",
        help="one SAE for all heads of a layer together, or one a head",
    )
    g.add_argument(
        "--aux_k",
        type=int,
        default=-1,
        help="not relu, gated: dead latents a token that fit the residual; 0: off, -1: D / 2",
    )
    g.add_argument(
        "--int8",
        action="store_true",
        help="CPU, archs with --k: int8 products propose, float32 decides; faster from D = 384 on",
    )
    g.add_argument(
        "--lr_warmup", type=int, default=50, help="steps of linear learning-rate warm-up"
    )
    g.add_argument(
        "--lr_decay",
        type=float,
        default=0.2,
        help="last share of the steps, where the rate falls to 0; 0: --resume may add steps",
    )
    g = p.add_argument_group("sizes", "the preset's, unless given")
    g.add_argument(
        "--preset",
        choices=["auto", *PHASE_PRESETS],
        default="auto",
        help="auto: the preset of the model behind the dump",
    )
    g.add_argument(
        "--expansion", type=count, default=by_preset, help="latents per input dimension, F / D"
    )
    g.add_argument(
        "--k",
        type=count,
        default=by_preset,
        help="active latents a token (topk, batchtopk, matryoshka)",
    )
    g.add_argument(
        "--target_l0",
        type=count,
        default=by_preset,
        help="jumprelu: active latents a token to aim at; default: --k",
    )
    g.add_argument(
        "--l1",
        type=real,
        default=by_preset,
        help="relu, gated: weight of sum(f) against squared error / D, norms sqrt(D)",
    )
    length = g.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, default=by_preset, help="optimiser steps")
    length.add_argument(
        "--tokens", type=count, default=by_preset, help="training tokens, instead of --steps"
    )
    length.add_argument(
        "--epochs",
        type=real,
        default=by_preset,
        help="passes over the training tokens, instead of --steps",
    )
    g.add_argument("--batch_size", type=count, default=by_preset, help="tokens a step")
    g.add_argument(
        "--learning_rate", type=real, default=by_preset, help="peak rate of Adam, per step"
    )
    g.add_argument(
        "--dead_tokens",
        type=count,
        default=by_preset,
        help="tokens without firing after which a latent counts as dead",
    )
    g.add_argument(
        "--eval_tokens",
        type=count,
        default=by_preset,
        help="held-out tokens for the metrics; a sixth of them for CE recovered",
    )
    add_runtime_flags(p)
    args = p.parse_args(argv)
    if args.unit == "head" and args.site != "z":
        p.error(f"--unit head splits z by head; --site {args.site} has no heads")
    if args.model_path and len(args.model_path) != len(args.runs or []):
        p.error(
            f"--model_path names {len(args.model_path)} files for {len(args.runs or [])} --runs: give one each, in the same order"
        )
    if not 0 <= args.lr_decay < 1 or args.lr_warmup < 0 or args.aux_k < -1:
        p.error(
            "--lr_decay must lie in [0, 1), --lr_warmup must not be negative, --aux_k must be -1 or more"
        )
    if args.int8 and (
        args.arch not in SPARSE_ARCHS
        or args.device not in ("auto", "cpu")
        or args.dtype == "float32"
    ):
        found = f"found --arch {args.arch} --device {args.device} --dtype {args.dtype}"
        p.error(f"--int8 takes one of {', '.join(SPARSE_ARCHS)}, a CPU and bfloat16; {found}")
    if args.resume and args.overwrite:
        p.error("--resume goes on with what --overwrite replaces: give one of them")
    if args.tensorboard and find_spec("tensorboard") is None:
        p.error(
            "--tensorboard needs a package: pip install tensorboard (the CSVs have the same numbers without it)"
        )
    return args


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


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error of one line, 2 for a wrong command line."""
    return one_line_errors(lambda: under_torchrun(lambda: run(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())

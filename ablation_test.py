"""Measure the loss impact of ablating each attention head, and test whether one Hero Head stands out (phase 4 of Janus Arc).

The output z of one head at a time is replaced by its mean over held-out text (mean: ranks the heads), by zero (the
published ablation), or by its z on other sequences (resample, loss averaged over draws). The loss is exact: only what
follows the head is computed again. The unit of replication is the sequence; all heads and both models see the same ones.
The first head is a Hero Head if it leads in 95 % of bootstrap draws, the interval of its lead and its own max-T p exclude
chance, and the model beats word frequencies; otherwise there is "no unique hero".

Reads   checkpoints of janus_adaptive.py with their tokenizer.json; the text they name (validation; for means: training)
Writes  <stem>.csv            a row per run, mode and head: impact (nats a token), interval, p values, rank; see METRICS.md
        <stem>.npz            behind it: loss, KL, top-1 flips, first-order effect, float64 [sequences, layers, H] each
        <stem>_summary.csv    a row per run and mode: Hero Head or none, cross-fitted impact, concentration and its null
        <stem>_figure4.png, <stem>_heatmap.png, <stem>_table3.csv, <stem>_table3.md, and run.json

Quick   python ablation_test.py --adaptive_model checkpoints/smoke/janus_adaptive_final.pt             (15 s on one CPU core)
Full    python ablation_test.py --adaptive_model ./checkpoints/v1/janus_adaptive_final.pt --save_file results_ablation.csv
        (144 heads x 10 passes over the validation split: meant for a GPU; prints its time on this machine first)

Shapes  B batch, T tokens, D d_model, H heads, K d_head, L layers, V vocabulary, n units of replication, R heads of all layers.
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
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colors
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

CSV_SCHEMA, LOSSES_SCHEMA = "janus.ablation/1", "janus.ablation_losses/1"
REMEDY = "python ablation_test.py --adaptive_model PATH"
MODES = (
    "mean",
    "zero",
    "resample",
)  # what replaces a head's z; the first one measured ranks the heads
# Sizes: sequences (0: all), held-out sequences behind a mean, draws, sequences a batch, consecutive sequences a unit.
PHASE_PRESETS: dict[str, dict[str, int]] = {
    "full": dict(n_seqs=0, n_mean=256, resample_draws=8, batch_size=4, block=8),
    "published": dict(n_seqs=0, n_mean=256, resample_draws=8, batch_size=4, block=8),
    "demo": dict(n_seqs=48, n_mean=128, resample_draws=1, batch_size=16, block=1),
    "smoke": dict(n_seqs=24, n_mean=24, resample_draws=2, batch_size=12, block=1),
}


# -------------------------------------------------------------------------------- method: edit here
SCORES = (
    "loss",
    "kl",
    "flip",
)  # of a token: cross-entropy and KL(clean || ablated), nats; whether the top prediction changed


def token_scores(model: NewGPT, final: Tensor, targets: Tensor) -> Tensor:
    """Last residual streams [1 + R, N, D], the clean one first, and targets [N] -> SCORES [3, 1 + R, N], float32.

    A few tokens at a time: the logits of all variants never exist at once. But 256 rows at least: with fewer a product reads all
    of a large unembedding for next to no work.
    """
    limit = 1 << (20 if final.device.type == "cpu" else 27)  # logits at once, about a cache
    step, parts = max(1, max(256, limit // model.cfg.vocab_size) // len(final)), []
    for x, y in zip(final.split(step, dim=1), targets.split(step), strict=True):
        log_q = model.unembed(x).float().log_softmax(-1)  # [1 + R, n, V]; row 0 is log p
        picked = log_q.gather(
            -1, torch.stack((y, log_q[0].argmax(-1)), -1).expand(len(log_q), -1, 2)
        )  # of target, of clean top
        with torch.autocast(x.device.type, enabled=False):  # it would take this product in bfloat16
            entropy = -torch.linalg.vecdot(
                log_q, log_q[0].exp()
            )  # cross-entropy of each variant under p
        parts.append(
            torch.stack(
                (-picked[..., 0], entropy - entropy[0], (picked[..., 1] < log_q.amax(-1)).float())
            )
        )
    return torch.cat(parts, dim=2)


def head_z(model: NewGPT, x: Tensor, layers: list[int]) -> list[Tensor]:
    """z [B, T, H, K] of each of `layers` on tokens x [B, T]; stops at the deepest."""
    tap: dict[str, Any] = {f"z.{l}": None for l in layers}
    model.run_blocks(model.embed(x), stop=max(layers) + 1, tap=tap)
    return [tap[f"z.{l}"] for l in layers]


@torch.no_grad()
def head_means(
    model: NewGPT, text: HFWikiTextLoader, args: argparse.Namespace, autocast: Any
) -> dict[int, Tensor]:
    """Mean z [H, K] of the heads of each of --layers over --n_mean windows of `text`, which is held out; float32."""
    windows, total = spaced(text.n_windows, args.n_mean), [torch.zeros(())] * len(args.layers)
    for chunk in np.array_split(windows, math.ceil(len(windows) / args.batch_size)):
        with autocast:
            z = head_z(model, text.batch(chunk)[0].to(model.embedding.weight.device), args.layers)
        total = [t.to(a.device) + a.float().sum((0, 1)) for t, a in zip(total, z, strict=True)]
    return {l: t / (len(windows) * text.seq_len) for l, t in zip(args.layers, total, strict=True)}


def clean_pass(
    model: NewGPT, x: Tensor, y: Tensor, layers: list[int]
) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
    """One forward and one backward pass on tokens x, targets y [B, T] -> z and resid_mid of `layers`; the last residual
    stream [B, T, D]; the gradient of each sequence's mean loss with respect to z [B, T, H, K], one a layer."""
    tap: dict[str, Any] = {f"{site}.{l}": None for l in layers for site in ("z", "resid_mid")}
    with torch.enable_grad():
        final = model.run_blocks(model.embed(x).requires_grad_(), tap=tap)
        loss = token_scores(model, final.flatten(0, 1)[None], y.flatten())[0].sum() / y.shape[1]
        slopes = torch.autograd.grad(loss, [tap[f"z.{l}"] for l in layers])
    return {name: t.detach() for name, t in tap.items()}, final.detach(), slopes


def ablate_layer(
    model: NewGPT, l: int, tap: dict[str, Tensor], final: Tensor, substitute: Tensor, y: Tensor
) -> Tensor:
    """Replaces z of each head of layer l in turn by `substitute` (broadcast to [B, T, H, K]) -> SCORES of every target of
    y [B, T], [3, 1 + H, B, T]; row 0 is the clean model.

    Exact without attention of layer l or anything before it: a variant starts from the clean residual stream after
    attention plus (substitute - z)_h W_O,h. The heads of the layer run as one batch.
    """
    block: Any = model.blocks[l]
    z = tap[f"z.{l}"]
    change = torch.einsum(
        "bthk,dhk->hbtd", substitute - z, block.attn.w_o.weight.unflatten(1, z.shape[2:])
    )
    mid = (tap[f"resid_mid.{l}"] + change).flatten(0, 1)  # [H * B, T, D]
    out = model.run_blocks(mid + block.mlp(mid), start=l + 1)
    variants = torch.cat((final, out)).unflatten(0, (-1, len(y))).flatten(1, 2)  # [1 + H, B * T, D]
    return token_scores(model, variants, y.flatten()).unflatten(2, y.shape)


@torch.no_grad()
def measure(model: NewGPT, text: HFWikiTextLoader, means: dict[int, Tensor], args: argparse.Namespace, windows: np.ndarray,
            modes: list[str], layers: list[int], autocast: Any, label: str | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """Ablates every head of `layers` on `windows` [n] of `text` -> "base" [n], the clean loss, and for each mode
    "<mode>.<score>" [n, layers, H] for SCORES and first_order = sum over tokens of (substitute - z) . dloss/dz; float64.
    Several processes share the batches; each returns all of it."""
    device, draws = model.embedding.weight.device, args.resample_draws if "resample" in modes else 0
    shift = np.random.default_rng(args.seed).integers(
        1, text.n_windows, size=(draws, text.n_windows)
    )[:, windows]
    donors = (
        (windows + shift) % text.n_windows
    )  # [draws, n], never the window itself; the same for every model and batch size
    shape, (rank, world) = (len(windows), len(layers), model.cfg.n_heads), rank_and_world()
    out = {"base": np.zeros(shape[0])} | {
        f"{mode}.{score}": np.zeros(shape) for mode in modes for score in (*SCORES, "first_order")
    }
    bar = tqdm(
        total=len(windows) * len(layers) // world,
        desc=label,
        unit="layer",
        disable=None if label else True,
    )
    for first in range(rank * args.batch_size, len(windows), world * args.batch_size):
        rows = slice(first, first + args.batch_size)
        x, y = (t.to(device) for t in text.batch(windows[rows]))
        with autocast:
            tap, final, slopes = clean_pass(model, x, y, layers)
            drawn = [head_z(model, text.batch(d[rows])[0].to(device), layers) for d in donors]
            for i, l in enumerate(layers):
                substitutes = {
                    "mean": [means[l]],
                    "zero": [torch.zeros_like(means[l])],
                    "resample": [z[i] for z in drawn],
                }
                for mode, substitute in ((m, s) for m in modes for s in substitutes[m]):
                    scores = ablate_layer(model, l, tap, final, substitute, y).mean(
                        -1
                    )  # [3, 1 + H, B]
                    linear = ((substitute - tap[f"z.{l}"]).float() * slopes[i].float()).sum(
                        (1, 3)
                    )  # [B, H]
                    for score, value in zip(
                        (*SCORES, "first_order"), (*scores[:, 1:].mT, linear), strict=True
                    ):
                        out[f"{mode}.{score}"][rows, i] += value.cpu().double().numpy() / len(
                            substitutes[mode]
                        )
                out["base"][rows] = scores[0, 0].cpu().double().numpy()
                bar.update(len(x))
    bar.close()
    all_sum(
        *map(torch.from_numpy, out.values())
    )  # in place; where another process measured, the arrays are still 0
    return out


def bfloat16_will_do(
    measured: Callable[..., dict], windows: np.ndarray, mode: str, layers: list[int], autocast: Any
) -> bool:
    """Whether bfloat16 moves no head's impact by more than a tenth of its standard error, on a few sequences and layers."""
    few, some = windows[:: math.ceil(len(windows) / 8)], layers[:: math.ceil(len(layers) / 3)]
    both = [
        measured(few, [mode], some, context) for context in (autocast, contextlib.nullcontext())
    ]
    half, full = (m[f"{mode}.loss"] - m["base"][:, None, None] for m in both)
    ratio = (
        np.abs(half.mean(0) - full.mean(0))
        / np.maximum(full.std(0, ddof=1) / math.sqrt(len(few)), 1e-12)
    ).max()
    print(
        f"bfloat16 against float32: some head's impact moves by {ratio:.2f} standard errors of {len(few)} sequences (accepted: 0.1)"
    )
    return ratio <= 0.1


def spaced(n_windows: int, n: int) -> np.ndarray:
    """n evenly spaced windows of a split that has n_windows; all of them if n is 0 or more than there are."""
    n = min(n or n_windows, n_windows)
    return np.arange(n) * n_windows // n


def units(values: np.ndarray, block: int) -> np.ndarray:
    """Per-sequence values [sequences, R] -> units of `block` consecutive sequences [n, R], with the same mean."""
    starts = np.arange(0, len(values), block)
    return np.add.reduceat(values, starts) * len(starts) / len(values)


def bootstrap_means(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means of columns [n, C] over resamples of the n units -> [draws, C]. One seed, one set of resamples: heads, modes and
    runs stay paired."""
    rng, n = np.random.default_rng(seed), len(columns)
    sizes = np.diff([*range(0, draws, 500), draws])
    return np.concatenate(
        [rng.multinomial(n, np.full(n, 1 / n), size=k) @ columns / n for k in sizes]
    )


def cross_fit(delta: np.ndarray, seed: int, halvings: int = 100) -> np.ndarray:
    """delta [n, R] -> [n], each unit's impact of the head that leads on the half without that unit, averaged over random
    halvings. Its mean is the first head's impact without the winner's curse: chosen on one half, measured on the other."""
    n = len(delta)
    half = np.random.default_rng(seed).permuted(
        np.tile(np.arange(n) % 2 == 0, (halvings, 1)), axis=1
    )
    on, off = (
        (half @ delta).argmax(1),
        (~half @ delta).argmax(1),
    )  # who leads in each half [halvings]
    return delta[np.arange(n), np.where(half, off[:, None], on[:, None])].mean(0)


def concentration(impact: np.ndarray) -> pd.DataFrame:
    """How unequal the heads are: measures of each row of impact [rows, R], negative impact counted as 0."""
    d = np.sort(np.maximum(impact, 0.0), axis=1)
    n, middle = d.shape[1], np.median(d, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = d / d.sum(1, keepdims=True)
        measures = {"max_share": share[:, -1], "top1_over_top2": d[:, -1] / d[:, -2]}
        measures["gini"] = (
            2 * share @ np.arange(1, n + 1) / n - (n + 1) / n
        )  # sum |d_i - d_j| / (2 n^2 mean)
        measures["participation_ratio"] = 1 / np.square(share).sum(
            1
        )  # (sum d)^2 / sum d^2, an effective number of heads
        measures["exp_entropy"] = np.exp(stats.entropy(share, axis=1))
        measures["robust_z"] = (d[:, -1] - middle) / (
            1.4826 * np.median(np.abs(d - middle[:, None]), axis=1)
        )
    return pd.DataFrame(measures).replace(np.inf, np.nan)


def head_statistics(
    delta: np.ndarray, draws: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Impact per unit delta [n, R], nats -> columns [R] of the CSV, one row of the summary, and the cross-fitted impact [n].

    Paired bootstrap over units; 95 % percentile intervals. p values are one-sided, for impact > 0, from the studentised
    bootstrap: p_maxT against the maximum over all R heads (family-wise), q_bh after Benjamini and Hochberg (false discovery).
    """
    (n, heads), mean, chosen = delta.shape, delta.mean(0), cross_fit(delta, seed)
    se = np.maximum(delta.std(0, ddof=1) / math.sqrt(n), 1e-12)  # the floor only guards divisions
    columns = np.hstack((delta, delta**2, chosen[:, None]))
    means, squares, chosen_means = np.split(
        bootstrap_means(columns, draws, seed), [heads, 2 * heads], axis=1
    )
    null = (means - mean) / np.maximum(np.sqrt(np.maximum(squares - means**2, 0) / (n - 1)), 1e-12)
    top_null, p = null.max(1), (1 + (null >= mean / se).sum(0)) / (draws + 1)
    table = {
        "impact": mean,
        "se": se,
        "ci_lo": np.quantile(means, 0.025, axis=0),
        "ci_hi": np.quantile(means, 0.975, axis=0),
    }
    table |= {
        "p_maxT": (1 + (top_null[:, None] >= mean / se).sum(0)) / (draws + 1),
        "q_bh": stats.false_discovery_control(p),
    }
    table |= {
        "share": np.maximum(mean, 0) / max(np.maximum(mean, 0).sum(), 1e-300),
        "rank": stats.rankdata(-mean, "ordinal").astype(int),
    }
    table["p_top1"] = np.bincount(means.argmax(1), minlength=heads) / draws

    hero, second = np.argsort(-mean, kind="stable")[:2]
    gaps = means[:, hero] - np.delete(means, hero, axis=1).max(
        1
    )  # to whichever other head leads in that resample
    row = {"hero": hero, "second": second, "n_unit": n, "delta": mean[hero]} | {
        k: table[k][hero] for k in ("p_top1", "p_maxT")
    }
    row |= {
        "gap": mean[hero] - mean[second],
        "gap_lo": np.quantile(gaps, 0.025),
        "gap_hi": np.quantile(gaps, 0.975),
    }
    row |= {
        "crossfit": chosen.mean(),
        "crossfit_lo": np.quantile(chosen_means, 0.025),
        "crossfit_hi": np.quantile(chosen_means, 0.975),
    }
    row["unique_hero"] = bool(row["p_top1"] >= 0.95 and row["gap_lo"] > 0 and row["p_maxT"] < 0.05)
    critical = np.quantile(
        top_null, 0.95
    )  # what a head of median noise needs to be told from 0, and to be found in 80 % of samples
    row |= {
        "noise_limit": critical * np.median(se),
        "min_detectable": (critical + stats.norm.ppf(0.8)) * np.median(se),
    }
    row |= {"n_negative": (mean < 0).sum(), "negative_sum": np.minimum(mean, 0).sum()}
    rng = np.random.default_rng(seed)
    null_impact = np.stack(
        [rng.permuted(delta, axis=1).mean(0) for _ in range(200)]
    )  # labels of heads shuffled in every unit
    value, resampled, shuffled = (concentration(x) for x in (mean[None], means, null_impact))
    for name in value:
        row |= {
            name: value[name][0],
            f"{name}_lo": resampled[name].quantile(0.025),
            f"{name}_hi": resampled[name].quantile(0.975),
        }
        row[f"{name}_null"] = shuffled[name].median()
    spread = (
        np.square(np.maximum(mean, 0)).sum() - np.square(se).sum()
    )  # noise adds its variance to the sum of squares
    row["participation_ratio_debiased"] = (
        np.maximum(mean, 0).sum() ** 2 / spread if spread > 0 else math.nan
    )
    return table, row, chosen


# ---------------------------------------------------------------------------------------------- run
def load_runs(
    args: argparse.Namespace, device: torch.device
) -> dict[str, tuple[NewGPT, dict[str, Any], Path]]:
    """{run: (model, checkpoint, path)}, named by arm (by flag if the arms are equal). Fills in the sizes that args leaves open."""
    given = {
        flag: path
        for flag, path in (("adaptive", args.adaptive_model), ("control", args.control_model))
        if path
    }
    with rank_0_first():
        paths = {
            flag: as_checkpoint(path, args.cache_dir, args.dataset) for flag, path in given.items()
        }
    found = {
        flag: (*load_checkpoint(path, device, args.skip_probe), path)
        for flag, path in paths.items()
    }
    facts = [
        {k: ckpt["config"][k] for k in ("n_layers", "seq_len", "vocab_size")}
        | {"tokenizer": ckpt["data"]["tokenizer_hash"]}
        for _, ckpt, _ in found.values()
    ]
    for key, value in facts[0].items():
        if value != facts[-1][key]:
            raise HandoffError(
                f"{args.control_model} has {key} {facts[-1][key]}, {args.adaptive_model} {value}: they do not read the same"
            )
    layers, first = facts[0]["n_layers"], found["adaptive"][1]
    args.layers = sorted({*(range(layers) if args.layers is None else args.layers)})
    if bad := [l for l in args.layers if not 0 <= l < layers]:
        raise HandoffError(
            f"--layers {bad[0]} is out of range: {args.adaptive_model} has layers 0 to {layers - 1}"
        )
    sizes = PHASE_PRESETS.get(
        first["preset"] if args.preset == "auto" else args.preset, PHASE_PRESETS["full"]
    )
    vars(args).update({k: v for k, v in sizes.items() if getattr(args, k) is None})
    arms = [ckpt["arm"] for _, ckpt, _ in found.values()]
    return dict(zip(arms if len({*arms}) == len(arms) else found, found.values(), strict=True))


def open_splits(
    args: argparse.Namespace, ckpt: dict[str, Any], path: Path
) -> list[HFWikiTextLoader]:
    """Training and validation split of the text that the checkpoint was trained on, or of --dataset."""
    source = (
        args.dataset or ckpt["dataset"],
        args.tokenizer or str(path.parent / "tokenizer.json"),
        ckpt["config"]["seq_len"],
    )
    splits = [HFWikiTextLoader(*source, split, args.cache_dir) for split in ("train", "validation")]
    found, trained = splits[0].description, ckpt["data"]
    if found["tokenizer_hash"] != trained["tokenizer_hash"]:
        raise HandoffError(
            f"tokenizer {source[1]} has hash {found['tokenizer_hash']}, {path} was trained with {trained['tokenizer_hash']}"
        )
    if found["dataset_key"] != trained["dataset_key"]:
        print(
            f"note: the text is {found['dataset_key']}, {path} was trained on {trained['dataset_key']}"
        )
    return splits


def measure_runs(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Ablates every head of every run -> the arrays of the .npz, and the facts of its sidecar."""
    keep_memory()
    device, autocast = set_up(args)
    runs = load_runs(args, device)
    with rank_0_first():  # it fills the cache
        train, val = open_splits(args, *next(iter(runs.values()))[1:])
    windows, float32 = (
        spaced(val.n_windows, args.n_seqs),
        torch.autocast(device.type, enabled=False),
    )
    if len(windows) < 4 * args.block:
        raise HandoffError(
            f"{len(windows)} validation sequences do not make 4 units of --block {args.block}: use more text, or --block 1"
        )
    counts = np.bincount(train.tokens, minlength=train.tokenizer.get_vocab_size()) + 1
    losses = {
        "windows": windows,
        "unigram": -np.log(counts / counts.sum())[val.batch(windows)[1].numpy()].mean(1),
    }
    facts = {k: getattr(args, k) for k in ("layers", "block", "n_mean", "resample_draws")} | {
        "modes": args.mode,
        "seq_len": val.seq_len,
    }
    facts |= {"data": val.description, "runs": {}}
    for run, (model, ckpt, path) in runs.items():
        measured = functools.partial(
            measure,
            model.requires_grad_(False),
            val,
            head_means(model, train, args, autocast),
            args,
        )
        context = autocast
        if (
            args.dtype == "auto"
            and autocast._enabled
            and not bfloat16_will_do(measured, windows, args.mode[0], args.layers, autocast)
        ):
            context = float32
            print("falling back to float32")
        start, some = time.perf_counter(), windows[: args.batch_size]
        measured(some, args.mode[:1], args.layers[len(args.layers) // 2 :][:1], context)
        passes = sum(args.resample_draws if mode == "resample" else 1 for mode in args.mode)
        minutes = (
            (time.perf_counter() - start)
            / 60
            * passes
            * len(args.layers)
            * len(windows)
            / len(some)
            / rank_and_world()[1]
        )
        heads = len(args.layers) * model.cfg.n_heads
        size = f"{len(windows)} sequences of {val.seq_len} tokens"
        print(
            f"{run}: {heads} heads x {passes} passes over {size}: at most about {minutes:.1f} min here",
            flush=True,
        )
        losses |= {
            f"{run}.{k}": v
            for k, v in measured(windows, args.mode, args.layers, context, run).items()
        }
        facts["runs"][run] = {
            "seed": ckpt["seed"],
            "checkpoint": str(path),
            "ckpt_sha": sha256(path),
            "n_heads": model.cfg.n_heads,
        }
        facts["runs"][run]["dtype"] = "bfloat16" if context._enabled else "float32"
    return losses, facts


def read_losses(npz: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The .npz of this script and the facts of its sidecar, checked."""
    facts = read_sidecar(npz, LOSSES_SCHEMA, REMEDY)
    if (found := sha256(npz)) != facts["sha256"]:
        raise HandoffError(
            f"{npz} has sha256 {found[:12]}, its sidecar says {facts['sha256'][:12]}: damaged; remake it with: {REMEDY}"
        )
    with np.load(npz, allow_pickle=False) as file:
        return {k: file[k] for k in file.files}, facts


def write_results(args: argparse.Namespace) -> None:
    """Statistics, tables and figures from the .npz; the sidecars of the CSVs last."""
    csv, npz = args.save_file, named(args.save_file, ".npz")
    table, summary = summarise(*read_losses(npz), args)
    frames = {csv: table, named(csv, "_summary.csv"): summary}
    texts = {
        path: frame.to_csv(index=False, float_format="%.10g") for path, frame in frames.items()
    }
    for path, text in texts.items():
        if (
            args.redraw
            and not args.overwrite
            and path.exists()
            and path.read_text(encoding="utf-8") != text
        ):
            raise HandoffError(
                f"{path} would change (another --mode, --bootstrap or --seed?); pass --overwrite to replace it"
            )
    for path, text in texts.items():
        sidecar_path(path).unlink(missing_ok=True)
        save(path, text)
    draw(csv)
    for path in texts:
        write_sidecar(
            path,
            CSV_SCHEMA,
            [npz],
            ranked_by=summary["ranked_by"][0],
            bootstrap=args.bootstrap,
            seed=args.seed,
        )
    tell(summary)


def run(args: argparse.Namespace) -> int:
    csv, npz = args.save_file, named(args.save_file, ".npz")
    if args.redraw:
        if csv.exists() and not npz.exists():
            draw(csv)
        else:
            write_results(args)
        return 0
    refuse_overwrite([csv, npz, named(csv, "_summary.csv")], args.overwrite)
    if rank_and_world()[0]:
        measure_runs(args)
        return 0
    with run_record(csv.parent, args):
        losses, facts = measure_runs(args)
        sidecar_path(npz).unlink(missing_ok=True)
        with atomic(npz) as tmp:
            np.savez(tmp, **losses)
        write_sidecar(
            npz, LOSSES_SCHEMA, [of["checkpoint"] for of in facts["runs"].values()], **facts
        )
        write_results(args)
    return 0


# ------------------------------------------------------------------------------- tables and figures
COLORS = ["#D55E00", "#0072B2"]  # Okabe-Ito


PUBLISHED = {
    "adaptive L9H1": 0.932,
    "adaptive L9H3": 0.438,
    "control L9H7": 0.367,
    "control L6H3": 0.361,
    "adaptive L9H5": 0.360,
}


COLUMNS = [
    "run",
    "seed",
    "checkpoint",
    "ckpt_sha",
    "layer",
    "head",
    "mode",
    "base_loss",
    "ablated_loss",
    "impact",
    "pct_impact",
]


COLUMNS += [
    "delta",
    "delta_pct",
    "se",
    "ci_lo",
    "ci_hi",
    "p_maxT",
    "q_bh",
    "delta_ppl",
    "share",
    "rank",
    "p_top1",
]


COLUMNS += ["kl_clean_ablated", "top1_flip_rate", "n_seq", "n_tok", "dtype", "first_order"]


def summarise(
    losses: dict[str, np.ndarray], facts: dict[str, Any], args: argparse.Namespace
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The .npz and its facts -> the CSV, a row per run, mode and head, and the summary, a row per run and mode."""
    tables, rows, leads = [], [], {}
    if not (modes := [mode for mode in facts["modes"] if mode in args.mode]):
        raise HandoffError(
            f"{args.save_file.with_suffix('.npz')} holds --mode {' '.join(facts['modes'])}, not {' '.join(args.mode)}"
        )
    for run, mode in ((run, mode) for run in facts["runs"] for mode in modes):
        of, base, unigram = facts["runs"][run], losses[f"{run}.base"], losses["unigram"].mean()
        score = {
            k: losses[f"{run}.{mode}.{k}"].reshape(len(base), -1) for k in (*SCORES, "first_order")
        }
        delta = units(score["loss"] - base[:, None], facts["block"])
        columns, row, leads[run, mode] = head_statistics(delta, args.bootstrap, args.seed)
        impact, loss, screen = columns["impact"], base.mean(), np.abs(score["first_order"]).mean(0)
        layer, head = (
            i.ravel() for i in np.meshgrid(facts["layers"], np.arange(of["n_heads"]), indexing="ij")
        )
        both = {"run": run, "mode": mode, "base_loss": loss, "n_seq": len(base)}
        table = {
            **of,
            **both,
            **columns,
            "layer": layer,
            "head": head,
            "ablated_loss": loss + impact,
            "delta": impact,
        }
        table |= {
            "pct_impact": 100 * impact / loss,
            "delta_pct": 100 * impact / loss,
            "delta_ppl": np.exp(loss + impact) - np.exp(loss),
        }
        table |= {
            "kl_clean_ablated": score["kl"].mean(0),
            "top1_flip_rate": score["flip"].mean(0),
            "first_order": screen,
        }
        tables.append(pd.DataFrame(table | {"n_tok": len(base) * facts["seq_len"]})[COLUMNS])
        # A model that does not beat word frequencies makes no use of its context: its heads differ, but none is a hero.
        row["unique_hero"] &= bool(loss < unigram)
        names = {
            f"{who}_{k}": ids[row[who]]
            for who in ("hero", "second")
            for k, ids in (("layer", layer), ("head", head))
        }
        row |= {
            "ranked_by": modes[0],
            "spearman_first_order": stats.spearmanr(screen, impact).statistic,
        }
        row["recall5_first_order"] = (
            len({*np.argsort(-screen)[:5]} & {*np.argsort(-impact)[:5]}) / 5
        )
        row["spearman_ranking_mode"] = stats.spearmanr(
            impact, next(t for t in tables if t["run"][0] == run)["impact"]
        ).statistic
        rows.append(
            both
            | {"unigram_loss": unigram}
            | names
            | {k: v for k, v in row.items() if k not in ("hero", "second")}
        )
    for row in rows if len(facts["runs"]) == 2 else []:
        difference = np.subtract(*(leads[run, row["mode"]] for run in facts["runs"]))
        draws = bootstrap_means(difference[:, None], args.bootstrap, args.seed)
        row |= {
            "difference": difference.mean(),
            "difference_lo": np.quantile(draws, 0.025),
            "difference_hi": np.quantile(draws, 0.975),
        }
    return pd.concat(tables), pd.DataFrame(rows)


def tell(summary: pd.DataFrame) -> None:
    """Prints of every run and mode the Hero Head, or that there is none, with its uncertainty; then how two runs compare."""

    def interval(name: str) -> str:
        return f"{r[name]:+.5f} [{r[f'{name}_lo']:+.5f}, {r[f'{name}_hi']:+.5f}]"

    for _, r in summary.iterrows():
        first, second = (
            f"L{r['hero_layer']}H{r['hero_head']}",
            f"L{r['second_layer']}H{r['second_head']}",
        )
        print(
            f"{r['run']}, {r['mode']} ablation: {'Hero Head' if r['unique_hero'] else 'no unique hero; the first head is'} {first}"
        )
        if not r["base_loss"] < r["unigram_loss"]:
            print(
                f"  the model does not beat word frequencies ({r['unigram_loss']:.4f} nats), so none of its heads can be a hero"
            )
        print(
            f"  impact {r['delta']:+.5f} nats a token, {100 * r['delta'] / r['base_loss']:+.3f} % of {r['base_loss']:.4f}; ",
            end="",
        )
        print(
            f"cross-fitted {interval('crossfit')}; p (max-T) {r['p_maxT']:.4f}; P(top-1) {r['p_top1']:.3f}; ",
            end="",
        )
        print(
            f"ahead of {second} by {interval('gap')}\n  n = {r['n_unit']} units: detects {r['min_detectable']:.5f} nats ",
            end="",
        )
        print("with 80 % power; with heads shuffled in brackets:", end=" ")
        values = {
            "top share": "max_share",
            "Gini": "gini",
            "effective heads": "participation_ratio",
        }
        print(", ".join(f"{name} {r[k]:.3g} ({r[f'{k}_null']:.3g})" for name, k in values.items()))
    if "difference" in summary:
        r, (one, two) = summary.iloc[0], summary["run"].unique()
        print(
            f"best head of {one} minus best of {two}, {r['mode']} ablation: {interval('difference')} nats over sequences; ",
            end="",
        )
        print("n=1 seed: descriptive only")


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV of this script, checked to have numbers in `columns`."""
    try:
        table = pd.read_csv(path)
        if not table[columns].astype(float).notna().all(axis=None) or table.empty:
            raise ValueError("no rows, or empty cells")
    except (OSError, ValueError, KeyError) as e:
        raise HandoffError(
            f"{path} is not a table of ablation_test.py ({e}); make it with: {REMEDY}"
        ) from None
    return table


def named(csv: Path, end: str) -> Path:
    """An output beside the CSV: results.csv, _figure4.png -> results_figure4.png."""
    return csv.with_name(csv.stem + end)


def save(path: Path, content: str | plt.Figure) -> None:
    """Writes a text or a figure atomically."""
    with atomic(path) as tmp:
        if isinstance(content, str):
            tmp.write_text(content, encoding="utf-8")
        else:
            content.savefig(tmp, dpi=150)
            plt.close(content)


def draw(csv: Path) -> None:
    """Table 3, Figure 4 and the heatmap, from the CSV and the summary alone."""
    table = read_table(
        csv,
        [
            "layer",
            "head",
            "base_loss",
            "impact",
            "pct_impact",
            "ci_lo",
            "ci_hi",
            "p_maxT",
            "p_top1",
            "rank",
            "n_seq",
        ],
    )
    summary = read_table(
        named(csv, "_summary.csv"),
        ["hero_layer", "hero_head", "unique_hero", "noise_limit", "base_loss"],
    )
    if {*zip(table["run"], table["mode"], strict=True)} != {
        *zip(summary["run"], summary["mode"], strict=True)
    }:
        raise HandoffError(
            f"{named(csv, '_summary.csv')} is not the summary of {csv}: other runs or modes; make both with: {REMEDY}"
        )
    table["name"] = [f"L{l}H{h}" for l, h in zip(table["layer"], table["head"], strict=True)]
    for k in ("ci_lo", "ci_hi"):
        table[f"{k}_pct"] = 100 * table[k] / table["base_loss"]
    ranking = table[table["mode"] == table["mode"].iloc[0]]
    zero = table[table["mode"] == "zero"].set_index(["run", "name"])["pct_impact"]
    top = ranking.nlargest(len(PUBLISHED), "pct_impact").reset_index(drop=True)
    top["zero_pct_impact"] = [
        zero.get(key, math.nan) for key in zip(top["run"], top["name"], strict=True)
    ]
    top["published_head"], top["published_zero_pct_impact"] = (
        list(PUBLISHED)[: len(top)],
        list(PUBLISHED.values())[: len(top)],
    )
    top = top[
        [
            "run",
            "name",
            "mode",
            "pct_impact",
            "ci_lo_pct",
            "ci_hi_pct",
            "p_maxT",
            "p_top1",
            "n_seq",
            *top.columns[-3:],
        ]
    ]
    cells = [
        top.columns,
        ["---"] * top.shape[1],
        *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in r] for r in top.to_numpy()),
    ]
    save(named(csv, "_table3.csv"), top.to_csv(index=False, float_format="%.10g"))
    save(named(csv, "_table3.md"), "".join(f"| {' | '.join(row)} |\n" for row in cells))
    save(named(csv, "_figure4.png"), figure4(table, summary))
    save(named(csv, "_heatmap.png"), heatmap(ranking, summary))


def noise_share(summary: pd.DataFrame) -> float:
    """Where logarithmic scales start: the impact (% of base loss) that noise hides, rounded up to a power of ten."""
    return 10.0 ** math.ceil(
        math.log10(max((100 * summary["noise_limit"] / summary["base_loss"]).median(), 1e-9))
    )


def figure4(table: pd.DataFrame, summary: pd.DataFrame) -> plt.Figure:
    """Figure 4: how the impact of ablation is distributed over heads; a panel a mode, runs side by side."""
    modes, runs = list(table["mode"].unique()), list(table["run"].unique())
    fig, axes = plt.subplots(
        1,
        len(modes),
        figsize=(max(6.2, 2 + 2.9 * len(modes)), 4.6),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for _, r in summary.iterrows():
        ax, x, color = (
            axes[0, modes.index(r["mode"])],
            runs.index(r["run"]),
            COLORS[runs.index(r["run"]) % 2],
        )
        heads = table[(table["run"] == r["run"]) & (table["mode"] == r["mode"])].sort_values("rank")
        y, first = heads["pct_impact"], heads.iloc[0]
        at = x + 0.5 * (
            np.arange(1, len(y)) * 0.618 % 1 - 0.5
        )  # spread, so that dots do not hide each other
        ax.boxplot(
            y,
            positions=[x],
            widths=0.75,
            showfliers=False,
            whis=(5, 95),
            manage_ticks=False,
            medianprops={"color": "black"},
        )
        ax.scatter(at, y[1:], s=15, color=color, alpha=0.65, lw=0)
        bar = [
            [first["pct_impact"] - first["ci_lo_pct"]],
            [first["ci_hi_pct"] - first["pct_impact"]],
        ]
        ax.errorbar(
            [x], [first["pct_impact"]], np.maximum(bar, 0), color=color, capsize=3, marker="o", ms=5
        )
        name = first["name"] + ("" if r["unique_hero"] else " (not unique)")
        ax.annotate(
            name,
            (x, max(y.max(), first["ci_hi_pct"])),
            (0, 5),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )
        ax.plot(
            [x - 0.45, x + 0.45],
            [100 * r["noise_limit"] / r["base_loss"]] * 2,
            color="black",
            ls=":",
            lw=1.2,
        )
        ax.set(
            title=f"{r['mode']} ablation",
            xticks=range(len(runs)),
            xticklabels=runs,
            xlim=(-0.6, len(runs) - 0.4),
        )
    if (linear := noise_share(summary)) < table[
        "pct_impact"
    ].abs().max():  # else symlog is linear anyway, with hardly a tick
        axes[0, 0].set_yscale("symlog", linthresh=linear)
    axes[0, 0].margins(y=0.12)
    axes[0, 0].set_ylabel(
        "loss impact of ablating one head\n(% of base loss; linear within the noise)"
    )
    fig.supxlabel(
        f"A dot is a head; n = {table['n_seq'].iloc[0]} sequences, one training seed a run. Box: quartiles; whiskers: 5-95 %;\n"
        "bar: 95 % CI of the first head. Above the dotted line a head of median noise differs from 0 (max-T, p < .05).\n"
        "Published first heads (zero ablation, 24 heads): control 0.367 %, adaptive 0.932 %.", fontsize=7.5)  # fmt: skip
    return fig


def heatmap(ranking: pd.DataFrame, summary: pd.DataFrame) -> plt.Figure:
    """Impact of every head, layers x heads, in the ranking mode; runs side by side on one colour scale."""
    runs, mode, limit = (
        ranking["run"].unique(),
        ranking["mode"].iloc[0],
        max(ranking["pct_impact"].abs().max(), 1e-12),
    )
    rows, columns = ranking["layer"].nunique(), ranking["head"].nunique()
    size = (max(5.5, 2.2 + (0.8 + 0.5 * columns) * len(runs)), 1.8 + 0.34 * rows)
    fig, axes = plt.subplots(1, len(runs), figsize=size, layout="constrained", squeeze=False)
    norm = colors.SymLogNorm(
        min(noise_share(summary), limit / 2), vmin=-limit, vmax=limit
    )  # one head must not bleach the rest
    for ax, run in zip(axes[0], runs, strict=True):
        impact, p = (
            ranking[ranking["run"] == run].pivot(index="layer", columns="head", values=k)
            for k in ("pct_impact", "p_maxT")
        )
        image = ax.imshow(impact, cmap="RdBu_r", norm=norm, aspect="auto")
        for (i, j), v in np.ndenumerate(impact.to_numpy()):
            style = {
                "color": "white" if abs(norm(v) - 0.5) > 0.35 else "black",
                "weight": "bold" if p.iloc[i, j] < 0.05 else "normal",
            }
            ax.text(
                j,
                i,
                f"{v:.2g}".replace("e-0", "e-"),
                ha="center",
                va="center",
                fontsize=6.5,
                **style,
            )
        r = summary[(summary["run"] == run) & (summary["mode"] == mode)].iloc[0]
        corner = (
            impact.columns.get_loc(r["hero_head"]) - 0.5,
            impact.index.get_loc(r["hero_layer"]) - 0.5,
        )
        ax.add_patch(
            plt.Rectangle(corner, 1, 1, fill=False, lw=2, ls="-" if r["unique_hero"] else ":")
        )
        ax.set(
            title=run,
            xlabel="head",
            ylabel="layer",
            xticks=range(impact.shape[1]),
            yticks=range(rows),
            yticklabels=impact.index,
        )
    fig.colorbar(image, ax=axes, label=f"loss impact, {mode} ablation\n(% of base loss)")
    note = f"Bold: above 0, p < .05 (max-T over the heads of a run, n = {ranking['n_seq'].iloc[0]} sequences).\n"
    fig.supxlabel(note + "Frame: first head (dotted: not unique).", fontsize=7.5)
    return fig


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter, count = argparse.ArgumentDefaultsHelpFormatter, positive(int)
    note = "CSV column first_order: mean over sequences of |sum of (substitute - z) dloss/dz|, a sensitivity from one backward pass"
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=note,
        allow_abbrev=False,
        formatter_class=formatter,
    )
    by = {
        k: "; by preset: "
        + ", ".join(f"{name} {sizes[k]}" for name, sizes in PHASE_PRESETS.items())
        for k in PHASE_PRESETS["full"]
    }
    g = p.add_argument_group("inputs")
    g.add_argument(
        "--adaptive_model",
        type=Path,
        help="checkpoint (.pt), or a pretrained Llama: folder, hub name, .gguf; not for --redraw",
    )
    g.add_argument(
        "--control_model", type=Path, help="another checkpoint, measured on the same sequences"
    )
    g.add_argument(
        "--redraw",
        type=Path,
        metavar="CSV",
        help="no model: all but the .npz again from CSV's .npz (without it: figures)",
    )
    g.add_argument(
        "--dataset", help="text, as for janus_adaptive.py; default: that of the checkpoint"
    )
    g.add_argument(
        "--tokenizer",
        help="as for janus_adaptive.py; default: tokenizer.json beside the checkpoint",
    )
    g = p.add_argument_group("outputs")
    g.add_argument(
        "--save_file",
        type=Path,
        default=Path("results_ablation.csv"),
        help="the CSV; the other names derive from it",
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--preset",
        choices=["auto", *PHASE_PRESETS],
        default="auto",
        help="sizes of this phase; auto: the checkpoint's preset",
    )
    g.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="layers whose heads are ablated, counted from 0; default: all",
    )
    g.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        default=list(MODES),
        help="the first given of mean, zero, resample ranks the heads",
    )
    g.add_argument(
        "--n_seqs",
        type=int,
        help="validation sequences, evenly spaced; 0: the whole split" + by["n_seqs"],
    )
    g.add_argument(
        "--n_mean", type=count, help="training sequences behind the means" + by["n_mean"]
    )
    g.add_argument(
        "--resample_draws",
        type=count,
        help="other sequences for each sequence, of the same split" + by["resample_draws"],
    )
    g.add_argument(
        "--block",
        type=count,
        help="consecutive sequences that make one unit of replication" + by["block"],
    )
    g.add_argument("--bootstrap", type=count, default=10_000, help="bootstrap draws")
    g.add_argument("--batch_size", type=count, help="sequences a batch" + by["batch_size"])
    add_runtime_flags(p)
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks; exits 2 with one line."""
    args.mode = [mode for mode in MODES if mode in args.mode]
    args.save_file = args.redraw or args.save_file
    if not args.redraw and not args.adaptive_model:
        p.error("--adaptive_model is needed (or --redraw CSV)")
    if args.save_file.suffix != ".csv":
        p.error(f"{args.save_file} must end in .csv")
    if args.n_seqs is not None and args.n_seqs < 8 and args.n_seqs != 0:
        p.error(f"--n_seqs {args.n_seqs}: expected at least 8 sequences, or 0 for the whole split")
    if args.bootstrap < 100 or args.seed < 0:
        p.error(
            f"--bootstrap {args.bootstrap} and --seed {args.seed}: expected at least 100 draws, and a seed from 0"
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

"""Harvest the activations of a trained NewGPT, and measure how alike its heads are (phase 2 of
Janus Arc).

Question: what do the heads of each layer put out, and do they do different things? The dumps feed
phase 3.

Reads   <model_path>, a checkpoint of janus_adaptive.py, and tokenizer.json beside it; the text that
        the checkpoint names, or --dataset
Writes  <save_dir>/<run_name>/
        L<layer>.<site>.npy  [N, D] float16, in stream order, unnormalised (D = H*K, head-major,
                             for z); tokens.npy, positions.npy and documents.npy [N] serve all
                             layers: token ids, places in the window, numbers of the documents
        topology_stats.csv   a row a layer and metric: value, 95 % interval, null; printed as Table
                             1 in table1_topology.txt
        head_cosines.csv     a row a layer and pair of heads; drawn as Figure 1 in
                             figure1_head_cosines.png
        run.json, and a sidecar <file>.json beside each file
Rows are whole windows, spread evenly over the split: its first windows alone would be those of a
few documents. tokens.reshape(-1, T) are the model's inputs, each window with its BOS token where
the checkpoint has one (--bos). A killed harvest goes on when its command is given again, to the
same bytes. Layers asked for later are added; --overwrite begins the run's folder anew.

Quick   python harvest_activations.py --model_path DIR/janus_adaptive_final.pt
        (smoke preset: 20,000 tokens x 12 layers; 23 MB, 0.5 GB of memory, 7 s on one core of a
        2-core x86 server)
Full    python harvest_activations.py --model_path checkpoints/v1/janus_adaptive_final.pt \\
            --run_name adaptive --layers 3 6 9
        (10M tokens x 3 layers x 768 dimensions: 46 GB; time and size are printed before the work
        starts)

Shapes  B batch, T tokens of a window, D width, H heads, K d_head, L layers, N dumped tokens,
        P pairs of heads H(H-1)/2, V vocabulary.
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
from dataclasses import dataclass
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
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

# What the sidecars say of the kind of their file
DUMP_SCHEMA = "janus.activations/1"
TOKENS_SCHEMA = "janus.tokens/1"
DOCUMENTS_SCHEMA = "janus.documents/1"
TABLE_SCHEMA = "janus.table/1"
FIGURE_SCHEMA = "janus.figure/1"

TOPOLOGY_CSV = "topology_stats.csv"
PAIRS_CSV = "head_cosines.csv"
PROGRESS = "progress.partial.json"  # which harvest an unfinished folder belongs to
WINDOWS = "spread over the split"  # which windows a sidecar describes; older ones: the first
# What all files of a run share
IDENTITY = (
    "checkpoint_sha256",
    "dataset_key",
    "tokenizer_hash",
    "split",
    "windows",
    "bos",  # older sidecars have none, and no BOS
    "n_tokens",
)

N_BLOCKS = 20  # of neighbouring documents: the unit of the jackknife, and of going on after a kill
N_HALVINGS = 12  # of the blocks, each into two halves
LEAST_DOCUMENTS = 40  # below, no interval is right about 95 times in 100
N_NULL_DRAWS = 10_000

# Tokens to harvest and windows a forward pass. Every preset takes the same code path, and a flag
# given explicitly beats the preset.
PHASE_PRESETS = {
    "full": {"tokens": 10_000_000, "batch_size": 16},
    "published": {"tokens": 10_000_000, "batch_size": 16},
    "demo": {"tokens": 240_000, "batch_size": 32},
    "smoke": {"tokens": 20_000, "batch_size": 32},
}


# -------------------------------------------------------------------------------- method: edit here
# ---- sites: what can be dumped
def unchanged(_model: NewGPT, _layer: int, activation: Tensor) -> Tensor:
    """For a site that NewGPT hands out as it is."""
    return activation


@dataclass(frozen=True)
class Site:
    """An activation that can be dumped, one row a token.

    shape: of one token, in the letters of the legend: "D", or "H K" (dumped head after head)
    reads: the activation that it is made from, one of those that NewGPT hands out to its `tap`
    take: (model, layer, that activation [B, T, ...]) -> what is dumped [B, T, *shape]
    """

    shape: str
    reads: str
    take: Callable[[NewGPT, int, Tensor], Tensor] = unchanged

    def sizes(self, cfg: GPTConfig) -> tuple[int, ...]:
        """The shape of one token in numbers."""
        letters = {"D": cfg.d_model, "H": cfg.n_heads, "K": cfg.d_head}
        return tuple(letters[axis] for axis in self.shape.split())

    def width(self, cfg: GPTConfig) -> int:
        """Numbers a row of the dump."""
        return math.prod(self.sizes(cfg))


# A site is an entry here; --site and the width of its dump follow. One that NewGPT does not hand
# out is made by a function of its own, `take`, from an activation that it does hand out. Such a
# function stands above this table; `heads_alone`, below, shows how to call a part of a block, and
# `Attention.qkv`, among the shared regions, has the queries, keys and values.
SITES = {
    "z": Site("H K", reads="z"),  # what each head puts out, before the output projection
    "attn_out": Site("D", reads="attn_out"),  # what the heads together add to the residual stream
    "resid_pre": Site("D", reads="resid_pre"),  # the residual stream before the block
    "resid_post": Site("D", reads="resid_post"),  # the residual stream after the block
    "mlp_out": Site("D", reads="mlp_out"),  # what the MLP adds to the residual stream
}
BEFORE_MLP = {"resid_pre", "z"}  # what can be read of a block without running its MLP


@torch.inference_mode()
def layer_activations(
    model: NewGPT, idx: Tensor, layers: list[int], site: str, autocast: Any
) -> dict[str, Tensor]:
    """Token ids [B, T] -> {"<site>.<layer>": float32 [B*T, D]}, of `site` and of z.

    z is always among them: the topology of the heads is measured on it. What comes after the
    deepest of these activations never runs.
    """
    reads = SITES[site].reads
    deepest = max(layers)
    wanted = []
    for l in layers:
        wanted += [f"{reads}.{l}", f"z.{l}"]
    tap: dict[str, Any] = dict.fromkeys(wanted)  # the model fills in the values

    found = {}  # [B, T, D] or [B, T, H, K] each
    with autocast:
        x = model.embed(idx)  # [B, T, D]
        if reads in BEFORE_MLP:
            x = model.run_blocks(x, stop=deepest, tap=tap)
            tap[f"resid_pre.{deepest}"] = x
            tap[f"z.{deepest}"] = heads_alone(model, deepest, x)
        else:
            model.run_blocks(x, stop=deepest + 1, tap=tap)
        # A site of its own making may multiply matrices too, so this is under autocast
        for l in layers:
            taken = SITES[site].take(model, l, tap[f"{reads}.{l}"])
            assert taken.shape == (*idx.shape, *SITES[site].sizes(model.cfg)), "[B, T, *shape]"
            found[f"{site}.{l}"] = taken
            found[f"z.{l}"] = tap[f"z.{l}"]
    rows = {}
    for name, activation in found.items():
        by_token = activation.flatten(0, 1)  # [B*T, D] or [B*T, H, K]
        rows[name] = by_token.flatten(1).float()  # [B*T, D]
    return rows


def heads_alone(model: NewGPT, layer: int, x: Tensor) -> Tensor:
    """z [B, T, H, K] of a block, from the residual stream before it [B, T, D]; no MLP runs."""
    block: Any = model.blocks[layer]
    z, _ = block.attn(block.norm_attn(x), *model.rotary(layer, x.shape[1]))  # [B, T, H, K]
    return z


def to_dump(x: Tensor, dtype: str, what: str) -> np.ndarray:
    """x [n, D] as `dtype`. Raises HandoffError if x is not finite, or beyond what the type can
    hold."""
    peak = x.abs().max().item()  # a NaN wins the maximum
    limit = float(np.finfo(dtype).max)
    if not math.isfinite(peak):
        cause = "the checkpoint's weights are not finite, or the model overflows (--dtype float32)"
        raise HandoffError(f"{what} holds {peak}: {cause}")
    if peak > limit:
        fact = f"{what} reaches {peak:.6g}, the largest {dtype} is {limit:.0f}"
        raise HandoffError(f"{fact}; pass --dump_dtype float32")
    return x.to(getattr(torch, dtype)).cpu().numpy()


# ---- sums over tokens, from which every statistic below follows
def sufficient_statistics(rows: np.ndarray, z: Tensor) -> dict[str, np.ndarray]:
    """Sums over the tokens of a batch, float64, of the dumped rows [n, D] and of z [n, H*K].

    x [D], x2 [D], norm []: of the rows, their squares and their lengths, for the sidecar.
    z [H*K], zz = Z^T Z [H*K, H*K]: for the topology of the heads.
    """
    x = torch.from_numpy(rows).double()  # [n, D], as rounded to the type of the dump
    square = x.square()  # [n, D]
    length = square.sum(1).sqrt()  # [n]
    sums = {
        "x": x.sum(0),
        "x2": square.sum(0),
        "norm": length.sum(),
        "z": z.cpu().double().sum(0),
        "zz": (z.T @ z).cpu().double(),  # in float32 within a batch, float64 over batches
    }
    return {name: total.numpy() for name, total in sums.items()}


@dataclass(frozen=True)
class BlockSums:
    """The sums of `sufficient_statistics` over b blocks of neighbouring documents, float64.

    n_tokens: of each block, b of them; n_documents: of all blocks
    x, x2 [b, D], norm [b]: of the dumped rows
    z [b, H*K], zz [b, H*K, H*K]: of the heads' outputs
    """

    n_tokens: list[int]
    n_documents: int
    x: Tensor
    x2: Tensor
    norm: Tensor
    z: Tensor
    zz: Tensor


def dump_moments(sums: BlockSums) -> dict[str, Any]:
    """What the sidecar says of the dumped values: mean [D], variance [D], mean length of a row, and
    gamma = ||mean|| / sqrt(sum of variances), how far the mean stands out of the spread."""
    n = sum(sums.n_tokens)  # tokens
    mean = sums.x.sum(0) / n  # [D]
    mean_square = sums.x2.sum(0) / n  # [D]
    variance = (mean_square - mean.square()).clamp_min(0)  # [D]
    spread = variance.sum().clamp_min(1e-300).sqrt()  # []
    return {
        "mean": mean.tolist(),
        "variance": variance.tolist(),
        "mean_norm": sums.norm.sum(0).item() / n,
        "gamma": (mean.norm() / spread).item(),
    }


# ---- topology: how alike the heads of a layer are
@dataclass(frozen=True)
class Heads:
    """What a metric of the topology is computed from.

    Leading axes "...": none for the heads as they are, [10,000] draws for the null.
    cosines_z: cosine of z of each pair of heads [..., P]
    cosines_o: cosine of o of each pair [..., P]; o_h is what head h writes to the residual stream,
        before a norm that may follow attention, and without the bias, which is no head's
    cka: linear CKA of z of each pair [P]; of the null [1], the same for all pairs
    singular_values: of Z [N, H*K], all heads side by side, not centred [H*K]
    """

    cosines_z: Tensor
    cosines_o: Tensor
    cka: Tensor
    singular_values: Tensor


def effective_rank(heads: Heads) -> Tensor:
    """(sum s)^2 / sum s^2 of the singular values s, as in the published Table 1: 1 to H*K."""
    s = heads.singular_values
    return s.sum().square() / s.square().sum()


def effective_rank_share(heads: Heads) -> Tensor:
    """The effective rank as a share of H*K."""
    return effective_rank(heads) / len(heads.singular_values)


# A metric is an entry here: a function of `Heads` that returns a number [...]. By being here it
# gets its row of topology_stats.csv, with a 95 % interval and a null, and its line of table 1. A
# layer that is harvested already keeps its rows: --overwrite measures it anew.
METRICS: dict[str, Callable[[Heads], Tensor]] = {
    # How alike the outputs are: sigma, the mean |cosine|, is what the Homeostat holds
    "mean_cosine": lambda heads: heads.cosines_z.mean(-1),
    "max_cosine": lambda heads: heads.cosines_z.amax(-1),
    "max_abs_cosine": lambda heads: heads.cosines_z.abs().amax(-1),
    "sigma_z": lambda heads: heads.cosines_z.abs().mean(-1),
    # The same of what they write, whatever basis each head uses for its values
    "sigma_resid": lambda heads: heads.cosines_o.abs().mean(-1),
    # In how many directions they put out something, together
    "effective_rank": effective_rank,
    "effective_rank_share": effective_rank_share,
    # How alike they are up to a rotation of each
    "linear_cka": lambda heads: heads.cka.mean(-1),
}


def measure(heads: Heads) -> dict[str, Tensor]:
    """Every metric of METRICS by name, each [...]."""
    return {name: metric(heads) for name, metric in METRICS.items()}


def topology(n: int, z: Tensor, zz: Tensor, w_o: Tensor, n_heads: int) -> dict[str, Tensor]:
    """The metrics [] of a layer's heads over n tokens.

    From z = sum_t z_t [H*K], zz = Z^T Z [H*K, H*K] and the output projection w_o [D, H*K], float64.
    CKA of a pair: ||C_ij||^2 / (||C_ii|| ||C_jj||), Frobenius norms of the centred covariances
    (Kornblith 2019). Not debiased: n >> K.
    """
    # n times the covariance of all dimensions; CKA does not depend on the factor
    covariance = zz - torch.outer(z, z) / n  # [H*K, H*K]
    heads = Heads(
        cosines_z=head_cosines(gram_of_z(zz, n_heads)),
        cosines_o=head_cosines(gram_of_o(zz, w_o, n_heads)),
        cka=head_cosines(sum_by_pair(covariance.square(), n_heads)),
        singular_values=singular_values(zz),
    )
    return measure(heads)


def gram_of_z(zz: Tensor, n_heads: int) -> Tensor:
    """<z_i, z_j> over all tokens and dimensions [H, H], from Z^T Z [H*K, H*K]."""
    # z_i and z_j meet where both have the same dimension: the diagonals of the blocks of Z^T Z
    d_head = len(zz) // n_heads
    same_dimension = torch.eye(d_head, dtype=zz.dtype).repeat(n_heads, n_heads)  # [H*K, H*K]
    return sum_by_pair(zz * same_dimension, n_heads)


def gram_of_o(zz: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    """<o_i, o_j> over all tokens [H, H], from Z^T Z [H*K, H*K] and w_o [D, H*K].

    o_h = z_h W_O,h is what head h writes to the residual stream, before a norm that may follow
    attention; it is not formed: <o_i, o_j> = tr(z_i^T z_j W_O,j W_O,i^T). Unlike z, it does not
    depend on the basis that a head happens to use for its values.
    """
    write_products = w_o.T @ w_o  # [H*K, H*K], W_O,i W_O,j^T of every pair
    return sum_by_pair(zz * write_products, n_heads)


def sum_by_pair(matrix: Tensor, n_heads: int) -> Tensor:
    """Sum of the block of each pair of heads: [H*K, H*K] -> [H, H]."""
    blocks = matrix.unflatten(0, (n_heads, -1)).unflatten(2, (n_heads, -1))  # [H, K, H, K]
    return blocks.sum((1, 3))


def singular_values(zz: Tensor) -> Tensor:
    """Singular values [H*K] of Z, from Z^T Z [H*K, H*K]."""
    eigenvalues = torch.linalg.eigvalsh(zz)  # [H*K]; those that are 0 may come out below it
    return eigenvalues.clamp_min(0).sqrt()


# ---- topology: the null
def null_topology(n: int, zz: Tensor, w_o: Tensor, n_heads: int, seed: int) -> dict[str, Tensor]:
    """The metrics, were the heads not aligned with each other at all: [10,000] draws of those of
    cosines, the expected value [] of the others.

    Cosines: every head does what it does, in a basis turned at random. <z_i R_i, z_j R_j> has mean
    0 and variance ||z_i^T z_j||^2 / K, and is nearly normal; turned in the residual stream,
    ||o_i^T o_j||^2 / D. Effective rank: the same heads, mutually uncorrelated (an upper limit).
    CKA: independent heads, K / (n + K).
    """
    d_model = len(w_o)
    d_head = len(zz) // n_heads
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(d_head, d_head, dtype=zz.dtype)
    within_heads = torch.block_diag(*[ones] * n_heads)  # [H*K, H*K], 1 where both are one head's
    write = (w_o.T @ w_o) * within_heads  # [H*K, H*K], W_O,h W_O,h^T of each head

    # How much two heads have in common in whatever basis
    square_z = sum_by_pair(zz * zz, n_heads)  # ||z_i^T z_j||^2 [H, H]
    square_o = sum_by_pair(write @ zz @ write * zz, n_heads)  # ||o_i^T o_j||^2 [H, H]
    # The lengths of z and o are those of the heads as they are
    gram_z = gram_of_z(zz, n_heads)
    gram_o = gram_of_o(zz, w_o, n_heads)
    heads = Heads(
        cosines_z=cosines_in_turned_bases(square_z / d_head, gram_z, generator),
        cosines_o=cosines_in_turned_bases(square_o / d_model, gram_o, generator),
        cka=zz.new_tensor([d_head / (n + d_head)]),
        singular_values=singular_values(zz * within_heads),
    )
    return measure(heads)


def cosines_in_turned_bases(variance: Tensor, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of the cosine of each pair [10,000, P]: normal, with the variance [H, H] of the inner
    product of turned heads, whose lengths are those of the Gram matrix [H, H]."""
    n_heads = len(gram)
    i, j = torch.triu_indices(n_heads, n_heads, offset=1)
    square_norm = gram.diagonal().clamp_min(1e-30)  # [H]
    relative = variance / torch.outer(square_norm, square_norm)  # [H, H]
    deviation = relative.sqrt()[i, j]  # [P]
    normal = torch.randn(N_NULL_DRAWS, len(i), generator=generator, dtype=deviation.dtype)
    return deviation * normal  # [10,000, P]


# ---- topology: intervals and the table
def block_bounds(documents: np.ndarray) -> np.ndarray:
    """Where blocks of windows begin and end [b + 1]: about 20 of like size, of whole documents.

    The windows of one document are alike, so it may not lie in two blocks: text that is left out
    must be text that the rest does not know. documents [n]: that of the first token of each window.
    """
    n_windows = len(documents)
    is_first = np.diff(documents, prepend=-1) > 0  # [n]
    begins = np.append(np.flatnonzero(is_first), n_windows)  # [documents + 1]
    wished = np.linspace(0, n_windows, N_BLOCKS + 1)
    nearest = np.abs(begins[:, None] - wished).argmin(0)  # [20 + 1]
    return np.unique(begins[nearest])


def topology_rows(sums: BlockSums, w_o: Tensor, n_heads: int, seed: int) -> list[dict[str, Any]]:
    """One row a metric: its value, 95 % interval and null. w_o [D, H*K] float64."""
    everything = np.arange(len(sums.n_tokens))
    measured = topology_of(sums, everything, w_o, n_heads)
    intervals = text_intervals(sums, measured, w_o, n_heads, seed)
    null = null_topology(sum(sums.n_tokens), sums.zz.sum(0), w_o, n_heads, seed)
    rows = []
    for metric, value in measured.items():
        null_lo, null_hi = null_interval(null[metric])
        row = {
            "metric": metric,
            "value": value.item(),
            **intervals[metric],
            "null_mean": null[metric].mean().item(),
            "null_lo": null_lo,
            "null_hi": null_hi,
        }
        rows.append(row)
    return rows


def topology_of(
    sums: BlockSums, blocks: np.ndarray, w_o: Tensor, n_heads: int
) -> dict[str, Tensor]:
    """The metrics [] over the tokens of the blocks of these numbers."""
    n = sum(sums.n_tokens[block] for block in blocks)
    return topology(n, sums.z[blocks].sum(0), sums.zz[blocks].sum(0), w_o, n_heads)


def text_intervals(
    sums: BlockSums, measured: dict[str, Tensor], w_o: Tensor, n_heads: int, seed: int
) -> dict[str, dict[str, float]]:
    """ci_lo, ci_hi of every metric: where it would lie on all text of this kind, 95 %; half_text:
    its mean over halves of the text. All NaN below 40 documents.

    The jackknife says how far a value moves from text to text. But a mean of absolute cosines, or a
    maximum, is also too large where the text is too little, and leaving out one block does not show
    it. Halving does: this bias falls with n as n^(-1/2) or faster, so that at most sqrt(2) + 1
    times the difference to the halves is left in the value. The interval reaches as far further, to
    the side where the truth may be.
    """
    everything = np.arange(len(sums.n_tokens))
    if sums.n_documents < LEAST_DOCUMENTS or len(everything) == 1:
        nothing = {"ci_lo": math.nan, "ci_hi": math.nan, "half_text": math.nan}
        return dict.fromkeys(measured, nothing)
    without = []  # for each block: the metrics of all tokens but those of the block
    for block in everything:
        without.append(topology_of(sums, np.delete(everything, block), w_o, n_heads))
    halves = mean_over_halves(sums, w_o, n_heads, seed)
    share = np.array(sums.n_tokens) / sum(sums.n_tokens)  # [b], of the tokens

    found = {}
    for metric, value in measured.items():
        whole = value.item()
        left_out = np.array([rest[metric].item() for rest in without])  # [b]
        half_width = jackknife(whole, left_out, share)
        bias = (math.sqrt(2) + 1) * (halves[metric] - whole)  # at most
        found[metric] = {
            "ci_lo": whole - half_width - max(bias, 0.0),
            "ci_hi": whole + half_width + max(-bias, 0.0),
            "half_text": halves[metric],
        }
    return found


def mean_over_halves(sums: BlockSums, w_o: Tensor, n_heads: int, seed: int) -> dict[str, float]:
    """The metrics on half of the blocks: mean over both halves of 12 random halvings, weighted by
    their tokens. What is linear in the text is the same as on all of it."""
    n_blocks = len(sums.n_tokens)
    share = np.array(sums.n_tokens) / sum(sums.n_tokens)  # [b], of the tokens
    rng = np.random.default_rng(seed % 2**32)  # NumPy takes no negative seed
    total: dict[str, float] = {}
    for _ in range(N_HALVINGS):
        for half in np.array_split(rng.permutation(n_blocks), 2):
            weight = share[half].sum() / N_HALVINGS
            for metric, value in topology_of(sums, half, w_o, n_heads).items():
                total[metric] = total.get(metric, 0.0) + weight * value.item()
    return total


def jackknife(value: float, without: np.ndarray, share: np.ndarray) -> float:
    """Half-width of the 95 % interval of `value`, from the values [b] with one of b > 1 blocks left
    out each, which has this share [b] of the tokens (Busing et al. 1999; Tukey 1958 where all have
    the same). NaN where a few blocks are nearly everything."""
    pseudo = value / share - (1 / share - 1) * without  # [b], what each block says
    centre = (share * pseudo).sum()
    variance = ((pseudo - centre) ** 2 / (1 / share - 1)).mean()
    n_equal = 1 / (share**2).sum()  # blocks of equal size that would say as much
    if n_equal < 8:
        return math.nan
    return stats.t.ppf(0.975, n_equal - 1) * math.sqrt(variance)


def null_interval(null: Tensor) -> tuple[float, float]:
    """2.5 and 97.5 % quantile of the draws of a null; NaN where it is one expected value []."""
    is_drawn = null.dim() > 0
    if not is_drawn:
        return math.nan, math.nan
    low, high = null.quantile(null.new_tensor([0.025, 0.975])).tolist()
    return low, high


# ---------------------------------------------------------------------------------------------- run
def run(args: argparse.Namespace) -> int:
    """Dumps the layers that are not there yet, and reports how alike their heads are."""
    if args.redraw:  # from the CSVs alone
        args.out = args.save_dir / args.run_name
        report(args)
        return 0

    # The model, and what its checkpoint says of the sizes and the text
    keep_memory()
    device, autocast = set_up(args)
    with rank_0_first():
        args.model_path = as_checkpoint(args.model_path, args.cache_dir, args.dataset)
    model, ckpt = load_checkpoint(args.model_path, device, args.skip_probe)
    resolve(args, ckpt, autocast)
    compared_csvs(args, PAIRS_CSV)  # a mistake in --compare should not cost a harvest

    # The text, in whole windows, and in blocks of whole documents
    with rank_0_first():  # it fills the cache
        bos = window_bos(args.bos, ckpt, args.model_path)
        data, n_windows = load_text(args, ckpt["data"], model.cfg, bos)
    documents = data.documents(data.spread(n_windows))[:, 0]  # [n], of the first token of a window
    facts = run_facts(args, ckpt, model.cfg, data, documents)
    bounds = block_bounds(documents)  # block b: places bounds[b] to bounds[b + 1]
    job = plan(args, facts)

    # Every process runs the model on its share of the blocks; the first alone writes the rest
    rank, _ = rank_and_world()
    with run_record(args.out, args) if rank == 0 else contextlib.nullcontext():
        if job["todo"]:
            try:
                harvest(args, model, data, autocast, job, bounds)
            except HandoffError:
                remove_partial(args)  # going on could not mend it
                raise
            all_sum(torch.zeros(1))  # every block is on disk
            if rank == 0:
                finish(args, model, data, job, bounds, facts)
        else:
            print(f"{args.out} has these layers already: nothing to harvest")
        if rank == 0:
            report(args)
    return 0


def resolve(args: argparse.Namespace, ckpt: dict[str, Any], autocast: Any) -> None:
    """Fills in what the command line left to the checkpoint. Raises HandoffError for a layer that
    the model does not have."""
    n_layers = ckpt["config"]["n_layers"]
    layers = range(n_layers) if args.layers is None else args.layers
    args.layers = sorted(set(layers))
    for l in args.layers:
        if not 0 <= l < n_layers:
            fact = f"--layers {l}: {args.model_path} has {n_layers} layers"
            raise HandoffError(f"{fact}, valid are 0 to {n_layers - 1}")
    # A flag that was not given: as in training, and in the sizes of a preset
    preset = PHASE_PRESETS[ckpt["preset"] if args.preset == "auto" else args.preset]
    args.run_name = args.run_name or ckpt["arm"]
    args.dataset = args.dataset or find_text(ckpt, args.model_path)
    args.tokenizer = args.tokenizer or str(args.model_path.parent / "tokenizer.json")
    args.tokens = args.tokens or preset["tokens"]
    args.batch_size = args.batch_size or preset["batch_size"]
    args.out = args.save_dir / args.run_name
    args.compute_dtype = "bfloat16" if autocast._enabled else "float32"


def load_text(
    args: argparse.Namespace, trained: dict[str, Any], cfg: GPTConfig, bos: int | None
) -> tuple[HFWikiTextLoader, int]:
    """The split to harvest, in windows that begin with the token `bos` (None: with their text), and
    how many of them. `trained` describes the checkpoint's text.

    Raises HandoffError if the tokenizer is not the checkpoint's.
    """
    seq_len = cfg.seq_len
    data = HFWikiTextLoader(args.dataset, args.tokenizer, seq_len, args.split, args.cache_dir, bos)
    # Ids of another tokenizer would be other words; another text is a question one may ask
    need_rows(count_ids(data.tokenizer), cfg.vocab_size, args.model_path)
    found = data.description
    if found["tokenizer_hash"] != trained["tokenizer_hash"]:
        hashes = f"hash {found['tokenizer_hash']}, the checkpoint's is {trained['tokenizer_hash']}"
        raise HandoffError(f"tokenizer {args.tokenizer}: {hashes}; leave --tokenizer out")
    if text_identity(found["dataset_key"]) != text_identity(trained["dataset_key"]):
        its_text = f"the model was trained on {trained['dataset_key']}"
        print(f"note: the text is {found['dataset_key']}, {its_text}")

    # The model has only seen whole windows
    n_windows = min(args.tokens // seq_len, data.n_windows)
    n_tokens = n_windows * seq_len
    if n_windows < 1:
        raise HandoffError(f"--tokens {args.tokens} is less than one window of {seq_len} tokens")
    if n_tokens != args.tokens:
        cause = f"whole windows of {seq_len}; the {args.split} split has {data.n_windows:,}"
        print(f"note: {n_tokens:,} tokens, not {args.tokens:,}: {cause}")
    print(f"text: {n_windows:,} of {data.n_windows:,} windows of the {args.split} split, {WINDOWS}")
    return data, n_windows


def run_facts(
    args: argparse.Namespace,
    ckpt: dict[str, Any],
    cfg: GPTConfig,
    data: HFWikiTextLoader,
    documents: np.ndarray,
) -> dict[str, Any]:
    """What every sidecar of this run says: text, model, sizes. documents [n]: that of each window.

    The windows are HFWikiTextLoader.spread(n_windows), of a split that has split_windows.
    """
    text = data.description
    n_windows = len(documents)
    return {
        "dataset": text["dataset"],
        "dataset_key": text["dataset_key"],
        "split": text["split"],
        "windows": WINDOWS,
        "bos": data.bos,
        "n_windows": n_windows,
        "split_windows": data.n_windows,
        "n_documents": len(np.unique(documents)),
        "tokenizer_hash": text["tokenizer_hash"],
        "run_name": args.run_name,
        "preset": ckpt["preset"],
        "arm": ckpt["arm"],
        "step": ckpt.get("step"),
        "initial": ckpt.get("initial"),
        "seed": args.seed,
        "checkpoint": args.model_path,
        "checkpoint_sha256": sha256(args.model_path),
        "n_heads": cfg.n_heads,
        "d_head": cfg.d_head,
        "seq_len": data.seq_len,
        "n_tokens": n_windows * data.seq_len,
    }


# ---- what is to do
def plan(args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """What this harvest is: all that must be equal for an unfinished one to be continued; "todo",
    the layers asked for that are not finished; "anew", whether the finished files go.

    Raises HandoffError if a harvest of something else, finished or not, is in the way.
    """
    common = {key: facts[key] for key in IDENTITY}
    job = {
        **common,
        "layers": args.layers,
        "site": args.site,
        "dump_dtype": args.dump_dtype,
        "compute_dtype": args.compute_dtype,
        "batch_size": args.batch_size,
    }
    if args.overwrite:
        return {**job, "todo": args.layers, "anew": True}

    # An unfinished harvest is continued if it is this one; a finished one is added to
    progress = args.out / PROGRESS
    if progress.is_file():
        unfinished = json.loads(progress.read_text(encoding="utf-8"))
        what = f"{args.out} holds an unfinished harvest (its own command finishes it) with"
        refuse_other(unfinished, job, what)
        return unfinished

    finished = finished_layers(args, common)
    todo = [l for l in args.layers if l not in finished]
    return {**job, "todo": todo, "anew": False}


def finished_layers(args: argparse.Namespace, common: dict[str, Any]) -> list[int]:
    """Which of the layers asked for are there already.

    Raises HandoffError if the folder holds a run of another model, other tokens or other types:
    the new layers could not join it.
    """
    remedy = "the same command with --overwrite"
    tokens = args.out / "tokens.npy"
    if tokens.exists():
        refuse_other(read_sidecar(tokens, TOKENS_SCHEMA, remedy), common, f"{tokens} has")
    for name in (TOPOLOGY_CSV, PAIRS_CSV):  # they get more rows
        csv = args.out / name
        if csv.exists():
            read_sidecar(csv, TABLE_SCHEMA, remedy)
    expected = {**common, "dtype": args.dump_dtype, "compute_dtype": args.compute_dtype}
    finished = []
    for l in args.layers:
        path = dump_path(args, l)
        if path.exists():
            refuse_other(read_sidecar(path, DUMP_SCHEMA, remedy), expected, f"{path} has")
            finished.append(l)
    return finished


def refuse_other(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raises HandoffError, which begins with `what`, if `found` differs in a key of `expected`."""
    for key, value in expected.items():
        is_same = found.get(key) == value
        if key == "dataset_key":  # the same text, perhaps under another name
            is_same = text_identity(found.get(key, "")) == text_identity(value)
        if not is_same:
            fact = f"{what} {key} {found.get(key)!r}, not {value!r}"
            raise HandoffError(f"{fact}; take another --run_name, or --overwrite")


def dump_path(args: argparse.Namespace, layer: int) -> Path:
    """The finished dump of a layer."""
    return args.out / f"L{layer}.{args.site}.npy"


def partial_path(args: argparse.Namespace, layer: int) -> Path:
    """The dump of a layer while it is written."""
    return args.out / f"L{layer}.{args.site}.partial.npy"


def sums_path(args: argparse.Namespace, block: int) -> Path:
    """The sums of a block; while they are there, the block's rows are in the partial dumps."""
    return args.out / f"block{block:02d}.partial.npz"


def remove(paths: Iterable[Path]) -> None:
    """Removes files, each sidecar before what it describes."""
    for path in paths:
        sidecar_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def remove_partial(args: argparse.Namespace) -> None:
    """Removes everything that an unfinished harvest left."""
    remove([*args.out.glob("*.partial.np[yz]"), args.out / PROGRESS])


# ---- the forward passes
def harvest(
    args: argparse.Namespace,
    model: NewGPT,
    data: HFWikiTextLoader,
    autocast: Any,
    job: dict[str, Any],
    bounds: np.ndarray,
) -> None:
    """Writes the dumps of the layers to do as partial files; block b has the windows at places
    bounds[b] to bounds[b + 1] of the dump.

    After each block the dumps and then its sums are forced to disk, so that a killed harvest goes
    on at the start of a block. Several processes deal the blocks out: they write to the same files,
    each its own rows and sums. Raises HandoffError for an activation that cannot be dumped, dumps
    that do not fit, or a damaged unfinished harvest.
    """
    layers = job["todo"]
    windows = data.spread(int(bounds[-1]))  # [n], numbers of the windows to harvest
    rank, world = rank_and_world()
    with rank_0_first():
        is_continued = (args.out / PROGRESS).exists() and not args.overwrite
        if rank == 0 and not is_continued:
            begin(args, model.cfg, job, n_tokens=int(bounds[-1]) * data.seq_len)
    # This process's share of the blocks, without those that were done before a kill
    own_blocks = range(rank, len(bounds) - 1, world)
    left = [block for block in own_blocks if not sums_path(args, block).exists()]
    dumps = open_partial_dumps(args, layers if left else [])

    n_left = sum(int(bounds[block + 1] - bounds[block]) for block in left)  # windows
    if left:
        first = bounds[left[0]]
        some = windows[first : first + math.ceil(args.batch_size / 4)]

        def part_of_a_batch() -> None:  # the first that will be written, to where it belongs
            write_batch(args, model, data, autocast, dumps, some, first)

        seconds = choose_threads(part_of_a_batch, args.threads, n=1) * n_left / len(some)
        where = f"layers {layers}, site {args.site}, on {model.embedding.weight.device}"
        print(f"time: about {duration(seconds)} for {where}", flush=True)
    with tqdm(total=n_left * data.seq_len, unit="tok", unit_scale=True, disable=None) as bar:
        for block in left:
            sums: dict[str, Any] = {}  # "<sum>.<layer>", of this block
            for first in range(bounds[block], bounds[block + 1], args.batch_size):
                end = min(first + args.batch_size, bounds[block + 1])
                found = write_batch(args, model, data, autocast, dumps, windows[first:end], first)
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
                bar.update((end - first) * data.seq_len)
            # The rows are on the disk before the sums say that they are
            for dump in dumps.values():
                dump.flush()
            with atomic(sums_path(args, block)) as temporary:
                np.savez(temporary, **sums)


def begin(args: argparse.Namespace, cfg: GPTConfig, job: dict[str, Any], n_tokens: int) -> None:
    """Reserves the partial dumps, and notes which harvest they belong to."""
    remove_partial(args)
    reserve(args, job["todo"], n_tokens, cfg)
    write_json(args.out / PROGRESS, job)


def reserve(args: argparse.Namespace, layers: list[int], n_tokens: int, cfg: GPTConfig) -> None:
    """Creates the partial dumps [n_tokens, width of the site] with all their disk blocks: a full
    disk is an error here, and never a SIGBUS while writing.

    Raises HandoffError if they are larger than --max_gb or than what the disk has.
    """
    width = SITES[args.site].width(cfg)
    shape = (n_tokens, width)
    dump_bytes = n_tokens * width * np.dtype(args.dump_dtype).itemsize
    # Z^T Z in float64, whatever the site; the other sums are small
    sums_bytes = N_BLOCKS * (cfg.n_heads * cfg.d_head) ** 2 * 8
    n_bytes = len(layers) * (dump_bytes + sums_bytes)
    if n_bytes > args.max_gb * 1e9:
        fact = f"layers {layers} of {n_tokens:,} tokens are {n_bytes / 1e9:.3f} GB"
        raise HandoffError(f"{fact}, --max_gb is {args.max_gb:g}: take fewer")
    bytes_beside = 12 * n_tokens  # tokens, positions, documents
    need_disk(args.out, n_bytes + bytes_beside)
    print(f"disk: {n_bytes / 1e9:.3f} GB in {args.out}")
    for l in layers:
        path = partial_path(args, l)
        try:
            # The file first, with holes; then the blocks of the disk that fill them
            np.lib.format.open_memmap(path, mode="w+", dtype=args.dump_dtype, shape=shape)
            with open(path, "rb+") as f:
                fill_holes(f.fileno(), path.stat().st_size)
        except OSError as e:
            fact = f"{path} cannot have {shape} {args.dump_dtype} numbers of disk"
            raise HandoffError(f"{fact}: {e.strerror}") from None


def fill_holes(file: int, n_bytes: int) -> None:
    """Gives an open file all its blocks of the disk. Not every system (macOS) and not every disk
    can: there a disk that fills up on the way ends the process."""
    cannot = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, n_bytes)
    except OSError as e:
        if e.errno not in cannot:
            raise


def open_partial_dumps(args: argparse.Namespace, layers: list[int]) -> dict[int, np.memmap]:
    """The partial dumps by layer, open for writing. Raises HandoffError if one is damaged."""
    dumps: dict[int, np.memmap] = {}
    try:
        # Opened for reading first: for writing, a truncated file would be lengthened without a word
        for path in args.out.glob("L*.partial.npy"):
            np.load(path, mmap_mode="r", allow_pickle=False)
        for l in layers:
            dumps[l] = np.lib.format.open_memmap(partial_path(args, l), mode="r+")
    except (OSError, ValueError) as e:
        fact = f"the unfinished harvest in {args.out} was damaged ({e}) and is now removed"
        raise HandoffError(f"{fact}; give the same command again, it begins anew") from None
    return dumps


def write_batch(
    args: argparse.Namespace,
    model: NewGPT,
    data: HFWikiTextLoader,
    autocast: Any,
    dumps: dict[int, np.memmap],
    windows: np.ndarray,
    place: int,
) -> dict[str, np.ndarray]:
    """Runs the model on the windows of these numbers [B] and writes the rows of every layer of
    `dumps`, from window `place` of the dump on -> their sufficient statistics, "<sum>.<layer>"."""
    idx, _ = data.batch(windows)  # [B, T]
    idx = idx.to(model.embedding.weight.device)
    seen = layer_activations(model, idx, list(dumps), args.site, autocast)
    # A token is a row, so windows are neighbouring rows
    first_row = place * data.seq_len
    end_row = first_row + idx.numel()
    sums = {}
    for l, dump in dumps.items():
        what = f"{args.site} of layer {l}, windows {windows[0]} to {windows[-1]} of the split,"
        rows = to_dump(seen[f"{args.site}.{l}"], args.dump_dtype, what)  # [B*T, D]
        dump[first_row:end_row] = rows
        for name, total in sufficient_statistics(rows, seen[f"z.{l}"]).items():
            sums[f"{name}.{l}"] = total
    return sums


# ---- from partial files to finished ones
@dataclass(frozen=True)
class LayerReport:
    """What is measured of one layer.

    topology: rows of topology_stats.csv
    pairs: rows of head_cosines.csv
    moments: what the sidecar of the dump says of its values
    """

    topology: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    moments: dict[str, Any]


def finish(
    args: argparse.Namespace,
    model: NewGPT,
    data: HFWikiTextLoader,
    job: dict[str, Any],
    bounds: np.ndarray,
    facts: dict[str, Any],
) -> None:
    """CSVs, tokens, positions and documents, then the dumps under their own names; each sidecar
    last. It can be interrupted and repeated."""
    # Everything is computed before the first file is replaced
    topology_table = []
    pair_table = []
    moments = {}  # by layer
    for l in tqdm(job["todo"], desc="topology", unit="layer", disable=None):
        layer = layer_report(args, model, l, bounds, facts)
        topology_table += layer.topology
        pair_table += layer.pairs
        moments[l] = layer.moments

    if job["anew"]:
        remove(path for path in args.out.glob("*.npy") if ".partial" not in path.name)
    publish_table(args, job, TOPOLOGY_CSV, topology_table)
    publish_table(args, job, PAIRS_CSV, pair_table)
    # Nothing old is left: if this is interrupted from here on, what is there now stays
    write_json(args.out / PROGRESS, {**job, "anew": False})

    windows = data.spread(facts["n_windows"])  # [n]
    position = np.arange(data.seq_len, dtype=np.uint32)  # [T]
    documents = data.documents(windows).astype(np.uint32)  # [n, T]
    positions = np.tile(position, len(windows))  # [N]
    publish_tokens(args, "tokens", inputs_of(data, windows), "token id", facts)
    publish_tokens(args, "positions", positions, "tokens into the window", facts)
    number = "number of the document in the split"
    publish_tokens(args, "documents", documents.flatten(), number, facts, DOCUMENTS_SCHEMA)
    for l in job["todo"]:
        publish_dump(args, l, moments[l], facts)
    remove_partial(args)


def inputs_of(data: HFWikiTextLoader, windows: np.ndarray) -> np.ndarray:
    """Token ids [N] that the model saw in these windows, BOS included; as the split stores them."""
    parts = []
    for some in np.array_split(windows, math.ceil(len(windows) / 4096)):  # ids are int64 on the way
        inputs, _ = data.batch(some)  # [n, T]
        parts.append(inputs.flatten().numpy().astype(data.tokens.dtype))
    return np.concatenate(parts)


def layer_report(
    args: argparse.Namespace,
    model: NewGPT,
    layer: int,
    bounds: np.ndarray,
    facts: dict[str, Any],
) -> LayerReport:
    """The statistics of one layer, from the sums of all blocks."""
    n_heads = model.cfg.n_heads
    w_o = model.state_dict()[f"blocks.{layer}.attn.w_o.weight"].cpu().double()  # [D, H*K]
    sums = read_sums(args, layer, bounds, facts)
    # The columns of a row: which layer of which run, the metric, and how much text it saw
    which = {"run": args.run_name, "layer": layer}
    text = {"split": facts["split"], "n_tokens": facts["n_tokens"]}
    size = {
        "n_windows": facts["n_windows"],
        "n_documents": facts["n_documents"],
        "n_blocks": len(sums.n_tokens),
    }
    topology_table = []
    for row in topology_rows(sums, w_o, n_heads, args.seed):
        topology_table.append({**which, **row, **text, **size})

    cosines = head_cosines(gram_of_z(sums.zz.sum(0), n_heads)).tolist()  # [P]
    pairs = torch.triu_indices(n_heads, n_heads, offset=1).T.tolist()  # [P, 2], in the same order
    pair_table = []
    for (i, j), cosine in zip(pairs, cosines, strict=True):
        pair_table.append({**which, "head_i": i, "head_j": j, "cosine": cosine, **text})
    return LayerReport(topology=topology_table, pairs=pair_table, moments=dump_moments(sums))


def read_sums(
    args: argparse.Namespace, layer: int, bounds: np.ndarray, facts: dict[str, Any]
) -> BlockSums:
    """The sums of one layer, of all blocks."""
    n_blocks = len(bounds) - 1
    files = [np.load(sums_path(args, block), allow_pickle=False) for block in range(n_blocks)]

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([file[f"{name}.{layer}"] for file in files]))

    return BlockSums(
        n_tokens=(np.diff(bounds) * facts["seq_len"]).tolist(),
        n_documents=facts["n_documents"],
        x=stacked("x"),
        x2=stacked("x2"),
        norm=stacked("norm"),
        z=stacked("z"),
        zz=stacked("zz"),
    )


def publish(
    path: Path, write: Callable[[Path], Any], schema: str, inputs: list[Any], **facts: Any
) -> None:
    """Replaces the artefact `path` by what `write` writes, then its sidecar; in between it has
    none, and so is not finished."""
    sidecar_path(path).unlink(missing_ok=True)
    with atomic(path) as temporary:
        write(temporary)
    write_sidecar(path, schema, inputs, **facts)


def publish_table(
    args: argparse.Namespace, job: dict[str, Any], name: str, rows: list[dict[str, Any]]
) -> None:
    """Writes a CSV; the rows of layers that were harvested earlier stay in it."""
    path = args.out / name
    table = pd.DataFrame(rows)
    if path.is_file() and not job["anew"]:
        # A layer to do may be there already, from a finish() that was interrupted
        earlier = csv_table(path)
        earlier = earlier[~earlier["layer"].isin(job["todo"])]
        table = pd.concat([earlier, table]).sort_values("layer", kind="stable")
    write = functools.partial(table.to_csv, index=False)
    facts = {"columns": list(table), "rows": len(table)}
    publish(path, write, TABLE_SCHEMA, [args.model_path], **facts)


def publish_tokens(
    args: argparse.Namespace,
    name: str,
    values: np.ndarray,
    unit: str,
    facts: dict[str, Any],
    schema: str = TOKENS_SCHEMA,
) -> None:
    """Writes an array [N] that all layers of the run share, unless an earlier harvest has."""
    path = args.out / f"{name}.npy"
    if sidecar_path(path).is_file():
        return
    own = {"axes": "N", "shape": [len(values)], "dtype": str(values.dtype), "unit": unit}
    write = functools.partial(np.save, arr=values)
    publish(path, write, schema, [args.model_path], **own, **facts)


def publish_dump(
    args: argparse.Namespace, layer: int, moments: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Gives the partial dump of a layer its own name, then its sidecar."""
    path = dump_path(args, layer)
    sidecar_path(path).unlink(missing_ok=True)
    partial = partial_path(args, layer)
    if partial.exists():  # else an interrupted finish() got as far as this
        os.replace(partial, path)
    own = {
        "layer": layer,
        "site": args.site,
        "axes": "N D",
        "shape": [facts["n_tokens"], len(moments["mean"])],
        "dtype": args.dump_dtype,
        "unit": "unnormalised",
        **moments,
        "compute_dtype": args.compute_dtype,
    }
    write_sidecar(path, DUMP_SCHEMA, [args.model_path], **own, **facts)


# ------------------------------------------------------------------------------- tables and figures
def report(args: argparse.Namespace) -> None:
    """Draws figure 1, and writes and prints table 1, of the runs compared; needs nothing but their
    CSV files."""
    table = args.out / "table1_topology.txt"
    csvs = compared_csvs(args, TOPOLOGY_CSV)
    text = table1(csvs)
    write = functools.partial(Path.write_text, data=text, encoding="utf-8")
    publish(table, write, TABLE_SCHEMA, csvs)
    print(text)

    figure = args.out / "figure1_head_cosines.png"
    csvs = compared_csvs(args, PAIRS_CSV)
    redraw = ["harvest_activations.py", "--redraw", "--run_name", args.run_name]
    redraw += ["--save_dir", args.save_dir, *(["--compare", *args.compare] if args.compare else [])]
    with drawing([table, *csvs], redraw):
        sidecar_path(figure).unlink(missing_ok=True)
        draw_cosines(csvs, figure)
        write_sidecar(figure, FIGURE_SCHEMA, csvs)
    print(f"see {figure} and {table}")


def compared_csvs(args: argparse.Namespace, name: str) -> list[Path]:
    """The file `name` of each run to show side by side: those of --compare, or every finished one,
    control first.

    Raises HandoffError if one that was named is not finished. Another run may be at work in the
    same --save_dir.
    """
    # The run itself counts, though its CSV may not be there yet
    found = {path.parent.name for path in args.save_dir.glob(f"*/{name}")} | {args.run_name}
    control_first = sorted(found, key=lambda run: (run != "control", run))
    csvs = []
    for run in args.compare or control_first:
        csv = args.save_dir / run / name
        is_being_written = run == args.run_name and not args.redraw
        try:
            if not is_being_written:
                remedy = f"python harvest_activations.py --model_path CHECKPOINT --run_name {run}"
                read_sidecar(csv, TABLE_SCHEMA, remedy)
                if "split" not in pd.read_csv(csv, nrows=0):
                    fact = f"{csv} has no column split: an older version took the first windows"
                    raise HandoffError(f"{fact}; make it with: {remedy} --overwrite")
            csvs.append(csv)
        except HandoffError:
            was_named = args.compare or run == args.run_name
            if was_named:
                raise
    return csvs


def side_by_side(csvs: list[Path]) -> pd.DataFrame:
    """Rows of all files, of the layers that every run has (if there is such a layer)."""
    frames = [csv_table(csv) for csv in csvs]
    common = set.intersection(*(set(frame["layer"]) for frame in frames))
    table = pd.concat(frames)
    return table[table["layer"].isin(common)] if common else table


def text_of(frame: pd.DataFrame) -> str:
    """Which text a table describes, in words."""
    splits = " and ".join(sorted(frame["split"].unique()))
    return f"{frame['n_tokens'].min():,} tokens of the {splits} split"


# Okabe & Ito: safe if colour-blind; the arms keep theirs in every figure
RUN_COLOURS = {"adaptive": "#D55E00", "control": "#0072B2"}
MORE_COLOURS = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
IN_FIGURE_1 = {  # metrics by depth; others are in table 1
    "sigma_resid": "How alike: what heads write",
    "sigma_z": "How alike: outputs z of heads",
}


def draw_cosines(csvs: list[Path], out: Path) -> None:
    """Figure 1, from the head_cosines.csv of each run and the topology_stats.csv beside it; where
    there is none, the matrices alone."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    tables = [csv.with_name(TOPOLOGY_CSV) for csv in csvs]
    found = [table for table in tables if table.is_file()]
    topology = side_by_side(found) if found else pd.DataFrame({"metric": []})
    topology = topology[topology["metric"].isin(list(IN_FIGURE_1))]
    save_figure(functools.partial(figure1, side_by_side(csvs), topology), out)


def figure1(pairs: pd.DataFrame, topology: pd.DataFrame, is_stacked: bool) -> Any:
    """How alike heads are by layer, with intervals and nulls (`topology`, if it has rows); below,
    the cosine of every pair, runs side by side, all on one colour scale."""
    plt = import_module("matplotlib.pyplot")
    runs = list(pairs["run"].unique())  # in the order of the files
    layers = sorted(pairs["layer"].unique())
    # The runs of a layer stay in one line of the matrices
    layers_across = max(1, (2 if is_stacked else 6) // len(runs))
    across = len(runs) * min(len(layers), layers_across)
    down = -(-len(layers) * len(runs) // across)  # rounded up
    metrics = [name for name in IN_FIGURE_1 if name in set(topology["metric"])]

    width = 4.5 if is_stacked else max(2.0 + 1.75 * across, 5.0 * len(metrics), 4.5)  # inches
    side = min(2.0, (width - 1.0) / across)  # of a matrix
    lines = len(metrics) if is_stacked else min(1, len(metrics))
    heights = [max(0.1, 2.9 * lines + 0.4), (side + 0.8) * down + 1.2]
    fig = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=heights)
    if metrics:
        grid = (len(metrics), 1) if is_stacked else (1, len(metrics))
        axes = top.subplots(*grid, squeeze=False)
        for ax, metric in zip(axes.flat, metrics, strict=True):
            draw_depth(ax, topology[topology["metric"] == metric], runs)
        axes[0, 0].legend(fontsize=8.5)
        note = "Too few documents for intervals. "
        if topology["ci_lo"].notna().any():
            note = "Bars: 95 % intervals over blocks of documents. "
        note += "Grey: 95 % of draws with each head's basis turned at random."
        top.supxlabel(textwrap.fill(note, round(13 * width)), fontsize=8.5)
    draw_matrices(bottom, pairs, (down, across))
    return fig


def draw_depth(ax: Any, stats_of: pd.DataFrame, runs: list[str]) -> None:
    """Panel: one metric by layer, a dot a run with its interval, and the null behind it."""
    layers = sorted(stats_of["layer"].unique())
    more = iter(MORE_COLOURS * len(runs))
    null: str | None = "null"
    for i, run in enumerate(runs):
        colour = RUN_COLOURS.get(run) or next(more)
        rows = stats_of[stats_of["run"] == run].sort_values("layer")
        # Side by side, so that intervals do not hide each other
        shift = 0.16 * (i - (len(runs) - 1) / 2)
        x = np.searchsorted(layers, rows["layer"]) + shift
        ax.vlines(x, rows["null_lo"], rows["null_hi"], color="0.6", lw=7, alpha=0.5, label=null)
        ends = [rows["value"] - rows["ci_lo"], rows["ci_hi"] - rows["value"]]
        style: dict[str, Any] = {"color": colour, "marker": "o", "ms": 4, "ls": "", "capsize": 2}
        ax.errorbar(x, rows["value"], yerr=np.maximum(ends, 0), label=as_label(run), **style)
        null = None  # one entry in the legend
    metric = stats_of["metric"].iloc[0]
    ax.set_title(IN_FIGURE_1[metric], fontsize=10)
    ax.set(xlabel="layer", ylabel=f"{metric}, mean |cosine|", ylim=(0, None))
    step = 1 + (len(layers) - 1) // 16
    ax.set(xticks=range(0, len(layers), step), xticklabels=layers[::step])
    ax.set_xlim(-0.6, len(layers) - 0.4)


def draw_matrices(fig: Any, pairs: pd.DataFrame, grid: tuple[int, int]) -> None:
    """The cosines of every pair of heads, a matrix a layer and run, on a grid of that many lines
    and columns."""
    axes = fig.subplots(*grid, squeeze=False)
    limit = max(1e-12, pairs["cosine"].abs().max())  # of the colour scale
    free_axes = iter(axes.flat)
    for layer in sorted(pairs["layer"].unique()):
        for run in pairs["run"].unique():
            shown = pairs[(pairs["run"] == run) & (pairs["layer"] == layer)]
            image = draw_panel(next(free_axes), as_label(f"{run}, layer {layer}"), shown, limit)
    for ax in free_axes:
        ax.axis("off")
    bar = fig.colorbar(image, ax=axes, location="bottom", aspect=30, shrink=0.7, pad=0.01)
    ends = [-limit, -limit / 2, 0, limit / 2, limit]
    bar.set_ticks(ends, labels=[f"{value:.2g}" for value in ends])
    fig.suptitle(f"Head against head, {text_of(pairs)}", fontsize=10)
    fig.supxlabel("cosine of z (grey: the diagonal)", fontsize=10)


def draw_panel(ax: Any, title: str, pairs: pd.DataFrame, limit: float) -> Any:
    """Draws the matrix of cosines of one layer, its rows of head_cosines.csv -> the image."""
    i = pairs["head_i"]
    j = pairs["head_j"]
    if pairs.empty:  # this run does not have this layer
        n_heads = 1
        span = "not harvested"
    else:
        n_heads = j.max() + 1
        span = f"{pairs['cosine'].min():+.2g} to {pairs['cosine'].max():+.2g}"
    matrix = np.full((n_heads, n_heads), np.nan)  # [H, H]; NaN is not painted
    matrix[i, j] = pairs["cosine"]
    matrix[j, i] = pairs["cosine"]
    ax.set_title(f"{title}\n{span}", fontsize=8.5)
    shades = import_module("matplotlib").colormaps["RdBu_r"].with_extremes(bad="0.7")
    image = ax.imshow(matrix, cmap=shades, vmin=-limit, vmax=limit, interpolation="nearest")
    ticks = range(0, n_heads, 1 + (n_heads - 1) // 8)
    ax.set(xticks=ticks, yticks=ticks)
    ax.tick_params(labelsize=8)
    return image


TABLE1_NOTES = """\
Interval: jackknife over blocks of whole documents, each cell for itself, longer on one side by the
bias that halves of the text show (half_text in the CSV); none below 40 documents. It holds for this
trained model and for text of this split. Between runs the unit is the training seed, n = 1 a run:
descriptive only. Null: cosines, each head's basis turned at random; effective rank, heads that are
uncorrelated (an upper limit); CKA, independent heads. A maximum is biased upwards by the choice of
the pair. Head numbers of different runs are unrelated. Published, 8 heads x 64, control ->
adaptive: max_cosine L3 .0218 -> .0146, L6 .0177 -> .0083, L9 .0305 -> .0121; effective_rank L3
280.4 -> 289.5, L6 282.1 -> 307.5, L9 286.9 -> 290.4; effective_rank_share .548 -> .565, .551 ->
.601, .560 -> .567.
"""


def table1(csvs: list[Path]) -> str:
    """Table 1 as text, from CSVs alone: every metric of every layer, runs side by side."""
    frame = side_by_side(csvs)
    show = "{value:.4g} [{ci_lo:.4g}, {ci_hi:.4g}] ({null_mean:.3g})"
    # A cell a layer, metric and run; those of one layer and metric side by side
    cells = [show.format(**row) for row in frame.to_dict("records")]
    frame["cell"] = [cell.replace("nan, nan", "none") for cell in cells]
    layers = sorted(frame["layer"].unique())
    metrics = frame["metric"].unique()  # in the order of the file
    lines = pd.MultiIndex.from_product([layers, metrics])
    table = frame.pivot(index=["layer", "metric"], columns="run", values="cell")
    table = table.reindex(index=lines, columns=frame["run"].unique())
    size = f"{frame['n_documents'].min():,} documents in {frame['n_blocks'].min()} blocks"
    title = f"Table 1. Heads of a layer: value [95 % interval] (null); {text_of(frame)}, {size}"
    notes = textwrap.fill(TABLE1_NOTES, width=135)  # about as wide as two runs
    return f"{title}\n{table.fillna('-').to_string()}\n{notes}\n"


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    # Every flag is in the function of its group; those of all scripts are in add_runtime_flags
    p = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_input_flags(p)
    add_output_flags(p)
    add_data_flags(p)
    add_method_flags(p)
    add_runtime_flags(p)
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def add_input_flags(p: argparse.ArgumentParser) -> None:
    model = (
        "checkpoint (.pt), or a pretrained model: folder, hub name, .gguf; needed unless --redraw"
    )
    compare = "runs in figure 1 and table 1; none: every finished run in --save_dir"
    redraw = "only redraw figure 1 and table 1 of --run_name, from the CSV files"
    g = p.add_argument_group("inputs")
    g.add_argument("--model_path", type=Path, help=model)
    g.add_argument("--compare", nargs="+", metavar="RUN", help=compare)
    g.add_argument("--redraw", action="store_true", help=redraw)


def add_output_flags(p: argparse.ArgumentParser) -> None:
    run = "folder of this run in --save_dir; none: the checkpoint's arm (adaptive, control, ...)"
    folder = "output folder of all runs"
    limit = "refuse to write more than this, GB"
    dtypes = ["float16", "float32"]
    dtype = "type of the dumps; float16 ends at 65504"
    g = p.add_argument_group("outputs")
    g.add_argument("--run_name", help=run)
    g.add_argument("--save_dir", type=Path, default=Path("activations"), help=folder)
    g.add_argument("--max_gb", type=positive(float), default=64.0, help=limit)
    g.add_argument("--dump_dtype", choices=dtypes, default="float16", help=dtype)


def add_data_flags(p: argparse.ArgumentParser) -> None:
    dataset = "as in janus_adaptive.py; none: that of the checkpoint"
    tokenizer = "as in janus_adaptive.py; none: tokenizer.json beside the checkpoint"
    tokens = "tokens to harvest, in whole windows spread over the split; none: by preset"
    g = p.add_argument_group("data")
    g.add_argument("--dataset", help=dataset)
    g.add_argument("--tokenizer", help=tokenizer)
    g.add_argument("--split", choices=list(SPLITS), default="train", help="split of the dataset")
    add_bos_flag(g)
    g.add_argument("--tokens", type=positive(int), help=tokens)


def add_method_flags(p: argparse.ArgumentParser) -> None:
    presets = ["auto", *PHASE_PRESETS]
    preset = "sizes of this phase; auto: the checkpoint's"
    layers = "layers, counted from 0; none: all"
    site = "z: the heads' outputs before the output projection"
    batch = "windows a forward pass; none: by preset"
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=presets, default="auto", help=preset)
    g.add_argument("--layers", type=integer, nargs="+", help=layers)
    g.add_argument("--site", choices=list(SITES), default="z", help=site)
    g.add_argument("--batch_size", type=positive(int), help=batch)


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks; exits 2 with one line."""
    if args.redraw and not args.run_name:
        p.error("--redraw needs --run_name")
    if not args.redraw and not args.model_path:
        p.error("--model_path is needed (or --redraw and --run_name)")
    # A run is a folder of --save_dir, and never a path out of it
    for name in [args.run_name or "run", *(args.compare or [])]:
        if not re.fullmatch(r"[\w+-][\w.+-]*", name):
            p.error(f"{name!r} is not a run name: expected letters, digits and . _ + -")


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

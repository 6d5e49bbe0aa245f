"""Harvest the activations of a trained NewGPT, and measure how alike its heads are (phase 2 of Janus Arc).

Question: what do the heads of each layer put out, and do they do different things? The dumps feed phase 3.

Reads   <model_path>, a checkpoint of janus_adaptive.py, and tokenizer.json beside it; the text it names, or --dataset
Writes  <save_dir>/<run_name>/
        L<layer>.<site>.npy [N, D] float16, in stream order, unnormalised (D = H*K, head-major, for z); tokens.npy, positions.npy [N]
        topology_stats.csv (a layer and metric: value, 95 % interval, null), printed as Table 1 in table1_topology.txt
        head_cosines.csv (a layer and pair of heads), drawn as Figure 1 in figure1_head_cosines.png; run.json; <file>.json
Rows are whole windows: tokens.reshape(-1, T) are the model's inputs. A killed harvest goes on when its command is given again, to
the same bytes. Layers asked for later are added; --overwrite begins the run's folder anew.

Quick   python harvest_activations.py --model_path DIR/janus_adaptive_final.pt    (smoke preset: 20,000 tokens x 12 layers;
        23 MB, 0.5 GB of memory, 7 s on one core of a 2-core x86 server)
Full    python harvest_activations.py --model_path checkpoints/v1/janus_adaptive_final.pt --run_name adaptive --layers 3 6 9
        (10M tokens x 3 layers x 768 dimensions: 46 GB; time and size are printed before the work starts)

Shapes  B batch, T tokens of a window, D width, H heads, K d_head, L layers, N dumped tokens, P pairs of heads, V vocabulary.
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
import re
import shutil
import subprocess
import sys
import sysconfig
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

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

DUMP_SCHEMA, TOKENS_SCHEMA, TABLE_SCHEMA, FIGURE_SCHEMA = (
    "janus.activations/1",
    "janus.tokens/1",
    "janus.table/1",
    "janus.figure/1",
)
IDENTITY = (
    "checkpoint_sha256",
    "dataset_key",
    "tokenizer_hash",
    "split",
    "n_tokens",
)  # what all files of a run share
TABLES = ("topology_stats.csv", "head_cosines.csv")
PROGRESS, N_BLOCKS = (
    "progress.partial.json",
    20,
)  # blocks of neighbouring windows: unit of the jackknife and of resuming
PHASE_PRESETS = dict.fromkeys(("full", "published"), dict(tokens=10_000_000, batch_size=16))
PHASE_PRESETS |= {
    "demo": dict(tokens=400_000, batch_size=32),
    "smoke": dict(tokens=20_000, batch_size=32),
}


# -------------------------------------------------------------------------------- method: edit here
@torch.inference_mode()
def layer_activations(
    model: NewGPT, idx: Tensor, layers: list[int], site: str, autocast: Any
) -> dict[str, Tensor]:
    """Token ids [B, T] -> {"<site>.<layer>": float32 [B*T, D]}, of `site` and of z; what comes after the deepest of them never runs."""
    deepest, (cos, sin) = (
        max(layers),
        (table[: idx.shape[1]] for table in (model.rope_cos, model.rope_sin)),
    )
    tap: dict[str, Any] = {
        f"{name}.{l}": None for l in layers for name in (site, "z") if l < deepest or site != "z"
    }
    with autocast:
        x = model.run_blocks(model.embed(idx), stop=deepest + (site != "z"), tap=tap)
        if site == "z":  # of the deepest block only the heads are needed
            block: Any = model.blocks[deepest]
            tap[f"z.{deepest}"], _ = block.attn(block.norm_attn(x), cos, sin)
    return {name: a.flatten(0, 1).flatten(1).float() for name, a in tap.items()}


def to_dump(x: Tensor, dtype: str, what: str) -> np.ndarray:
    """x [n, D] as `dtype`. Raises HandoffError if x is not finite, or beyond what the type can hold."""
    peak, limit = x.abs().max().item(), float(np.finfo(dtype).max)  # a NaN wins the maximum
    if not math.isfinite(peak):
        raise HandoffError(
            f"{what} holds {peak}: the checkpoint's weights are not finite, or the model overflows (--dtype float32)"
        )
    if peak > limit:
        raise HandoffError(
            f"{what} reaches {peak:.6g}, the largest {dtype} is {limit:.0f}; pass --dump_dtype float32"
        )
    return x.to(getattr(torch, dtype)).cpu().numpy()


def sufficient_statistics(rows: np.ndarray, z: Tensor) -> dict[str, np.ndarray]:
    """Sums over tokens, float64, from which mean and variance of the dumped rows [n, D] and the topology of z [n, H*K] follow."""
    x, z_total, zz = (
        torch.from_numpy(rows).double(),
        z.cpu().double().sum(0),
        (z.T @ z).cpu().double(),
    )
    square = x.square()
    sums = dict(x=x.sum(0), x2=square.sum(0), norm=square.sum(1).sqrt().sum(), z=z_total, zz=zz)
    return {name: v.numpy() for name, v in sums.items()}


def per_pair(m: Tensor, n_heads: int) -> Tensor:
    """Sum of the block of each pair of heads: [H*K, H*K] -> [H, H]."""
    return m.unflatten(0, (n_heads, -1)).unflatten(2, (n_heads, -1)).sum((1, 3))


def gram_matrices(zz: Tensor, w_o: Tensor, n_heads: int) -> list[Tensor]:
    """<z_i, z_j> and <o_i, o_j> over all tokens, [H, H] each, from zz = Z^T Z [H*K, H*K] and the output projection w_o [D, H*K].

    o_h = z_h W_O,h is what head h writes to the residual stream; it is not formed: <o_i, o_j> = tr(z_i^T z_j W_O,j W_O,i^T).
    Unlike z, it does not depend on the basis that a head happens to use for its values.
    """
    diagonals = torch.eye(len(zz) // n_heads, dtype=zz.dtype).repeat(n_heads, n_heads)
    return [per_pair(zz * diagonals, n_heads), per_pair(zz * (w_o.T @ w_o), n_heads)]


def metrics(cosines: list[Tensor], zz: Tensor, linear_cka: Tensor) -> dict[str, Tensor]:
    """Cosines of the pairs of heads [..., P], of z and of o; Z^T Z -> {metric: [...]}; sigma is the mean |cosine|.

    effective_rank: (sum s)^2 / sum s^2 of the singular values s of Z [N, H*K], not centred, as in the published Table 1.
    """
    s, (z, resid) = torch.linalg.eigvalsh(zz).clamp_min(0).sqrt(), cosines
    rank = s.sum().square() / s.square().sum()
    found = dict(
        mean_cosine=z.mean(-1),
        max_cosine=z.amax(-1),
        max_abs_cosine=z.abs().amax(-1),
        sigma_z=z.abs().mean(-1),
    )
    return found | dict(
        sigma_resid=resid.abs().mean(-1),
        effective_rank=rank,
        effective_rank_share=rank / len(zz),
        linear_cka=linear_cka,
    )


def topology(n: int, z: Tensor, zz: Tensor, w_o: Tensor, n_heads: int) -> dict[str, Tensor]:
    """How alike a layer's heads are over n tokens, from z = sum_t z_t [H*K] and zz = Z^T Z [H*K, H*K], float64.

    linear_cka: ||C_ij||^2 / (||C_ii|| ||C_jj||), Frobenius, C centred; mean over pairs (Kornblith 2019). Not debiased: n >> K.
    """
    cka = head_cosines(per_pair((zz - torch.outer(z, z) / n).square(), n_heads)).mean()
    return metrics([head_cosines(gram) for gram in gram_matrices(zz, w_o, n_heads)], zz, cka)


def null_topology(n: int, zz: Tensor, w_o: Tensor, n_heads: int, seed: int) -> dict[str, Tensor]:
    """The same metrics, were the heads not aligned with each other at all; 10,000 draws of those that are random.

    Cosines: every head does what it does, in a basis turned at random. <z_i R_i, z_j R_j> has mean 0 and variance
    ||z_i^T z_j||^2 / K, and is nearly normal; turned in the residual stream, ||o_i^T o_j||^2 / D. Effective rank: the same heads,
    mutually uncorrelated (an upper limit). CKA: independent heads, K / (n + K).
    """
    k, rng, cosines = len(zz) // n_heads, torch.Generator().manual_seed(seed), list[Tensor]()
    own = torch.block_diag(*[torch.ones(k, k, dtype=zz.dtype)] * n_heads)
    write, (i, j) = (w_o.T @ w_o) * own, torch.triu_indices(n_heads, n_heads, offset=1)
    for gram, square, width in zip(
        gram_matrices(zz, w_o, n_heads),
        (zz * zz, write @ zz @ write * zz),
        (k, len(w_o)),
        strict=True,
    ):
        norm2 = gram.diagonal().clamp_min(1e-30)
        sd = (per_pair(square, n_heads) / width / torch.outer(norm2, norm2)).sqrt()[i, j]
        cosines.append(sd * torch.randn(10_000, len(i), generator=rng, dtype=sd.dtype))
    return metrics(cosines, zz * own, zz.new_tensor(k / (n + k)))


def jackknife(without: Tensor) -> float:
    """Half-width of the 95 % interval, from the values [b] with one of b > 1 blocks of windows left out each (Tukey 1958)."""
    b = len(without)
    return stats.t.ppf(0.975, b - 1) * ((b - 1) * without.var(correction=0)).sqrt().item()


# ---------------------------------------------------------------------------------------------- run
def dump_path(args: argparse.Namespace, l: int, suffix: str = "") -> Path:
    return args.out / f"L{l}.{args.site}{suffix}.npy"


def sums_path(args: argparse.Namespace, block: int) -> Path:
    return args.out / f"block{block:02d}.partial.npz"


def plan(args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """What identifies this harvest, and "todo", the layers asked for that are not finished.

    Raises HandoffError if a harvest of something else, finished or not, is in the way.
    """
    remedy, tokens, common = (
        "the same command with --overwrite",
        args.out / "tokens.npy",
        {k: facts[k] for k in IDENTITY},
    )
    job = common | {
        k: getattr(args, k) for k in ("layers", "site", "dump_dtype", "compute_dtype", "batch_size")
    }
    if args.overwrite:
        return job | {"todo": args.layers, "anew": True}

    def same(found: dict[str, Any], expected: dict[str, Any], what: str) -> dict[str, Any]:
        for key in (k for k in expected if found.get(k) != expected[k]):
            raise HandoffError(
                f"{what} {key} {found.get(key)!r}, not {expected[key]!r}; take another --run_name, or --overwrite"
            )
        return found

    if (args.out / PROGRESS).is_file():
        saved = json.loads((args.out / PROGRESS).read_text(encoding="utf-8"))
        return same(
            saved, job, f"{args.out} holds an unfinished harvest (its own command finishes it) with"
        )
    if tokens.exists():
        same(read_sidecar(tokens, TOKENS_SCHEMA, remedy), common, f"{tokens} has")
    for csv in (
        p for p in (args.out / name for name in TABLES) if p.exists()
    ):  # the rows of new layers join those that are there
        read_sidecar(csv, TABLE_SCHEMA, remedy)
    there = [l for l in args.layers if dump_path(args, l).exists()]
    for path in (dump_path(args, l) for l in there):
        expected = common | {"dtype": args.dump_dtype, "compute_dtype": args.compute_dtype}
        same(read_sidecar(path, DUMP_SCHEMA, remedy), expected, f"{path} has")
    return job | {"todo": [l for l in args.layers if l not in there], "anew": False}


def remove(paths: Iterable[Path]) -> None:
    """Removes files, each sidecar before what it describes."""
    for path in paths:
        sidecar_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def reserve(args: argparse.Namespace, todo: list[int], shape: tuple[int, int]) -> None:
    """Creates the partial dumps with all their disk blocks: a full disk is an error here, and never a SIGBUS while writing.

    Raises HandoffError if they are larger than --max_gb or than what the disk has.
    """
    n_bytes = (
        len(todo)
        * shape[1]
        * (shape[0] * np.dtype(args.dump_dtype).itemsize + 8 * N_BLOCKS * shape[1])
    )  # dumps and sums
    if n_bytes > args.max_gb * 1e9:
        raise HandoffError(
            f"layers {todo} of {shape[0]:,} tokens are {n_bytes / 1e9:.3f} GB, --max_gb is {args.max_gb:g}: take fewer"
        )
    need_disk(args.out, n_bytes + 8 * shape[0])
    print(f"disk: {n_bytes / 1e9:.3f} GB in {args.out}")
    for path in (dump_path(args, l, ".partial") for l in todo):
        try:
            np.lib.format.open_memmap(path, mode="w+", dtype=args.dump_dtype, shape=shape)
            with open(path, "rb+") as f:
                os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
        except OSError as e:
            raise HandoffError(
                f"{path} cannot have {shape} {args.dump_dtype} numbers of disk: {e.strerror}"
            ) from None


def harvest(
    args: argparse.Namespace,
    model: NewGPT,
    data: HFWikiTextLoader,
    autocast: Any,
    job: dict,
    bounds: np.ndarray,
) -> None:
    """Writes the dumps of the layers to do as partial files, windows bounds[b] to bounds[b+1] a block.

    After each block the dumps and then its sums are forced to disk, so that a killed harvest goes on at the start of a block.
    Several processes deal the blocks out: they write to the same files, each its own rows and sums.
    Raises HandoffError for an activation that cannot be dumped, dumps that do not fit, or a damaged unfinished harvest.
    """
    t, todo, width = (
        data.seq_len,
        job["todo"],
        model.cfg.n_heads * model.cfg.d_head if args.site == "z" else model.cfg.d_model,
    )
    rank, world = rank_and_world()

    def measure(first: int, end: int) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
        idx = data.batch(np.arange(first, end))[0].to(model.embedding.weight.device)
        seen = layer_activations(model, idx, todo, args.site, autocast)
        for l in todo:
            rows = to_dump(
                seen[f"{args.site}.{l}"],
                args.dump_dtype,
                f"{args.site} of layer {l}, windows {first} to {end - 1},",
            )
            yield l, rows, sufficient_statistics(rows, seen[f"z.{l}"])

    with rank_0_first():
        if rank == 0 and (args.overwrite or not (args.out / PROGRESS).exists()):
            remove([*args.out.glob("*.partial.np[yz]"), args.out / PROGRESS])
            reserve(args, todo, (int(bounds[-1]) * t, width))
            write_json(args.out / PROGRESS, job)
    left = [b for b in range(rank, len(bounds) - 1, world) if not sums_path(args, b).exists()]
    try:
        for path in args.out.glob("L*.partial.npy"):
            np.load(
                path, mmap_mode="r", allow_pickle=False
            )  # a check: "r+" would lengthen a truncated file without a word
        dumps = {
            l: np.lib.format.open_memmap(dump_path(args, l, ".partial"), mode="r+")
            for l in todo
            if left
        }
    except (OSError, ValueError) as e:
        raise HandoffError(
            f"the unfinished harvest in {args.out} was damaged ({e}) and is now removed; start again"
        ) from None
    windows, start = int(np.diff(bounds)[left].sum()) if left else 0, time.perf_counter()
    with tqdm(total=windows * t, unit="tok", unit_scale=True, disable=None) as bar:
        for b in left:
            sums: dict[str, Any] = {}
            for first in range(bounds[b], bounds[b + 1], args.batch_size):
                end = min(first + args.batch_size, bounds[b + 1])
                for l, rows, found in measure(first, end):
                    dumps[l][first * t : end * t] = rows
                    for name, value in found.items():
                        sums[f"{name}.{l}"] = sums.get(f"{name}.{l}", 0.0) + value
                bar.update((end - first) * t)
                if (b, first) == (left[0], bounds[b]):
                    minutes = (time.perf_counter() - start) * windows / (end - first) / 60
                    where = f"layers {todo}, site {args.site}, on {model.embedding.weight.device}"
                    bar.write(f"time: at most about {minutes:.1f} min for {where}")
            for dump in dumps.values():
                dump.flush()
            with atomic(sums_path(args, b)) as tmp:
                np.savez(tmp, **sums)


def publish(
    path: Path, write: Callable[[Path], Any], schema: str, inputs: list[Any], **facts: Any
) -> None:
    """Replaces the artefact `path` by what `write` writes, then its sidecar; in between it has none, and so is not finished."""
    sidecar_path(path).unlink(missing_ok=True)
    with atomic(path) as tmp:
        write(tmp)
    write_sidecar(path, schema, inputs, **facts)


def layer_report(
    args: argparse.Namespace, model: NewGPT, l: int, bounds: np.ndarray
) -> tuple[list[dict], list[dict], dict[str, Any]]:
    """Rows of topology_stats.csv and of head_cosines.csv for one layer, and what the sidecar of its dump says of its values."""
    h, w_o = model.cfg.n_heads, model.state_dict()[f"blocks.{l}.attn.w_o.weight"].cpu().double()
    files = [np.load(sums_path(args, b), allow_pickle=False) for b in range(len(bounds) - 1)]
    part = {
        name: torch.from_numpy(np.stack([f[f"{name}.{l}"] for f in files]))
        for name in ("x", "x2", "norm", "z", "zz")
    }
    ns = (np.diff(bounds) * model.cfg.seq_len).tolist()
    n, (x, x2, norm, z, zz) = sum(ns), (v.sum(0) for v in part.values())
    whole, null = topology(n, z, zz, w_o, h), null_topology(n, zz, w_o, h, args.seed)
    without = [
        topology(n - m, z - zb, zz - zzb, w_o, h)
        for m, zb, zzb in zip(ns, part["z"], part["zz"], strict=True)
        if m < n
    ]
    who, rows = dict(run=args.run_name, layer=l), []
    for name, v in ((name, value.item()) for name, value in whole.items()):
        half = jackknife(torch.stack([other[name] for other in without])) if without else math.nan
        low, high = (
            null[name].quantile(z.new_tensor([0.025, 0.975])).tolist()
            if null[name].dim()
            else (math.nan, math.nan)
        )
        row = dict(
            metric=name,
            value=v,
            ci_lo=v - half,
            ci_hi=v + half,
            null_mean=null[name].mean().item(),
            null_lo=low,
            null_hi=high,
        )
        rows.append(who | row | dict(n_tokens=n, n_windows=int(bounds[-1]), n_blocks=len(ns)))
    ij, cosines = (
        torch.triu_indices(h, h, offset=1).T.tolist(),
        head_cosines(gram_matrices(zz, w_o, h)[0]).tolist(),
    )
    pairs = [
        who | dict(head_i=i, head_j=j, cosine=c) for (i, j), c in zip(ij, cosines, strict=True)
    ]
    mean, variance = x / n, (x2 / n - (x / n).square()).clamp_min(0)
    gamma = (
        mean.norm() / variance.sum().clamp_min(1e-300).sqrt()
    ).item()  # how far the mean stands out of the spread
    return (
        rows,
        pairs,
        dict(
            mean=mean.tolist(), variance=variance.tolist(), mean_norm=norm.item() / n, gamma=gamma
        ),
    )


def finish(
    args: argparse.Namespace,
    model: NewGPT,
    data: HFWikiTextLoader,
    job: dict,
    bounds: np.ndarray,
    facts: dict,
) -> None:
    """CSVs, tokens and positions, then the dumps under their own names; each sidecar last. It can be interrupted and repeated."""
    out, n, inputs = args.out, facts["n_tokens"], [args.model_path]
    layers = {
        l: layer_report(args, model, l, bounds)
        for l in tqdm(job["todo"], desc="topology", unit="layer", disable=None)
    }
    if job["anew"]:
        remove(p for p in out.glob("*.npy") if ".partial" not in p.name)
    for at, csv in enumerate(out / name for name in TABLES):
        table = pd.DataFrame([row for found in layers.values() for row in found[at]])
        if csv.is_file() and not job["anew"]:  # keep the layers of earlier harvests
            old = pd.read_csv(csv)
            table = pd.concat([old[~old["layer"].isin(job["todo"])], table]).sort_values(
                "layer", kind="stable"
            )
        publish(
            csv,
            functools.partial(table.to_csv, index=False),
            TABLE_SCHEMA,
            inputs,
            columns=list(table),
            rows=len(table),
        )
    write_json(out / PROGRESS, job | {"anew": False})  # the folder holds nothing old any more
    for name, values in (
        ("tokens", data.tokens[:n]),
        ("positions", np.tile(np.arange(data.seq_len, dtype=np.uint32), int(bounds[-1]))),
    ):
        if not sidecar_path(path := out / f"{name}.npy").is_file():
            own = dict(
                axes="N",
                shape=[n],
                dtype=str(values.dtype),
                unit="token id" if name == "tokens" else "tokens into the window",
            )
            publish(
                path, functools.partial(np.save, arr=values), TOKENS_SCHEMA, inputs, **own, **facts
            )
    for l, path in ((l, dump_path(args, l)) for l in job["todo"]):
        sidecar_path(path).unlink(missing_ok=True)
        if (
            partial := dump_path(args, l, ".partial")
        ).exists():  # else an interrupted finish() got as far as this
            os.replace(partial, path)
        own = dict(
            layer=l,
            site=args.site,
            axes="N D",
            shape=[n, len(layers[l][2]["mean"])],
            dtype=args.dump_dtype,
            unit="unnormalised",
        )
        write_sidecar(
            path,
            DUMP_SCHEMA,
            inputs,
            **own,
            **layers[l][2],
            compute_dtype=args.compute_dtype,
            **facts,
        )
    remove([*out.glob("*.partial.np[yz]"), out / PROGRESS])


def resolve(args: argparse.Namespace, ckpt: dict[str, Any], autocast: Any) -> None:
    """Fills in what the command line left to the checkpoint. Raises HandoffError for a layer that the model does not have."""
    preset, n_layers = (
        PHASE_PRESETS[ckpt["preset"] if args.preset == "auto" else args.preset],
        ckpt["config"]["n_layers"],
    )
    args.layers = sorted(set(range(n_layers) if args.layers is None else args.layers))
    for l in (l for l in args.layers if not 0 <= l < n_layers):
        raise HandoffError(
            f"--layers {l}: {args.model_path} has {n_layers} layers, valid are 0 to {n_layers - 1}"
        )
    args.run_name, args.dataset = args.run_name or ckpt["arm"], args.dataset or ckpt["dataset"]
    args.tokenizer = args.tokenizer or str(args.model_path.parent / "tokenizer.json")
    args.tokens, args.batch_size = (
        args.tokens or preset["tokens"],
        args.batch_size or preset["batch_size"],
    )
    args.out, args.compute_dtype = (
        args.save_dir / args.run_name,
        "bfloat16" if autocast._enabled else "float32",
    )


def load_text(
    args: argparse.Namespace, trained: dict[str, Any], cfg: GPTConfig
) -> tuple[HFWikiTextLoader, int]:
    """The split to harvest, and how many of its windows. Raises HandoffError if the tokenizer is not the checkpoint's."""
    t, data = (
        cfg.seq_len,
        HFWikiTextLoader(args.dataset, args.tokenizer, cfg.seq_len, args.split, args.cache_dir),
    )
    found, n_windows = data.description, min(args.tokens // t, data.n_windows)
    if found["tokenizer_hash"] != trained["tokenizer_hash"]:
        hashes = f"hash {found['tokenizer_hash']}, the checkpoint's is {trained['tokenizer_hash']}"
        raise HandoffError(f"tokenizer {args.tokenizer}: {hashes}; leave --tokenizer out")
    if found["dataset_key"] != trained["dataset_key"]:
        print(
            f"note: the text is {found['dataset_key']}, the model was trained on {trained['dataset_key']}"
        )
    if n_windows < 1:
        raise HandoffError(f"--tokens {args.tokens} is less than one window of {t} tokens")
    if n_windows * t != args.tokens:
        print(
            f"note: {n_windows * t:,} tokens, not {args.tokens:,}: whole windows of {t}; the {args.split} split has {data.n_windows:,}"
        )
    return data, n_windows


def run(args: argparse.Namespace) -> int:
    rank, _ = rank_and_world()
    if args.redraw:
        args.out = args.save_dir / args.run_name
        report(args)
        return 0
    keep_memory()
    device, autocast = set_up(args)
    with rank_0_first():
        args.model_path = as_checkpoint(args.model_path, args.cache_dir, args.dataset)
    model, ckpt = load_checkpoint(args.model_path, device, args.skip_probe)
    resolve(args, ckpt, autocast)
    compared_csvs(args, TABLES[1])  # a mistake in --compare should not cost a harvest
    with rank_0_first():  # it fills the cache
        data, n_windows = load_text(args, ckpt["data"], model.cfg)
    facts = {k: data.description[k] for k in ("dataset", "dataset_key", "split", "tokenizer_hash")}
    facts |= dict(run_name=args.run_name, preset=ckpt["preset"], arm=ckpt["arm"], seed=args.seed)
    facts |= dict(checkpoint=args.model_path, checkpoint_sha256=sha256(args.model_path))
    facts |= dict(
        n_heads=model.cfg.n_heads,
        d_head=model.cfg.d_head,
        seq_len=data.seq_len,
        n_tokens=n_windows * data.seq_len,
    )
    bounds = np.linspace(0, n_windows, min(N_BLOCKS, n_windows) + 1).astype(int)
    job = plan(args, facts)
    with contextlib.nullcontext() if rank else run_record(args.out, args):
        if job["todo"]:
            try:
                harvest(args, model, data, autocast, job, bounds)
            except HandoffError:
                remove(
                    [*args.out.glob("*.partial.np[yz]"), args.out / PROGRESS]
                )  # going on could not mend it
                raise
            all_sum(torch.zeros(1))  # every block is on disk
            if rank == 0:
                finish(args, model, data, job, bounds, facts)
        else:
            print(f"{args.out} has these layers already: nothing to harvest")
        if rank == 0:
            report(args)
    return 0


# ------------------------------------------------------------------------------- tables and figures
def compared_csvs(args: argparse.Namespace, name: str) -> list[Path]:
    """The file `name` of each run to show side by side: those of --compare, or every finished one, control first.

    Raises HandoffError if one that was named is not finished. Another run may be at work in the same --save_dir.
    """
    there = sorted(
        {p.parent.name for p in args.save_dir.glob(f"*/{name}")} | {args.run_name},
        key=lambda r: (r != "control", r),
    )
    csvs = []
    for run in args.compare or there:
        try:
            if run != args.run_name or args.redraw:
                remedy = f"python harvest_activations.py --model_path CHECKPOINT --run_name {run}"
                read_sidecar(args.save_dir / run / name, TABLE_SCHEMA, remedy)
            csvs.append(args.save_dir / run / name)
        except HandoffError:
            if args.compare or run == args.run_name:
                raise
    return csvs


def side_by_side(csvs: list[Path]) -> pd.DataFrame:
    """Rows of all files, of the layers that every run has (if there is such a layer)."""
    frames = [pd.read_csv(csv) for csv in csvs]
    both, frame = set.intersection(*(set(f["layer"]) for f in frames)), pd.concat(frames)
    return frame[frame["layer"].isin(both)] if both else frame


def draw_cosines(csvs: list[Path], out: Path) -> None:
    """Figure 1: the cosine of every pair of heads, runs side by side, all on one colour scale; from CSVs alone."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    plt = import_module("matplotlib.pyplot")
    frame = side_by_side(csvs)
    runs, layers, limit = (
        frame["run"].unique(),
        sorted(frame["layer"].unique()),
        max(1e-12, frame["cosine"].abs().max()),
    )
    panels, across = (
        [(layer, run) for layer in layers for run in runs],
        len(runs) * min(len(layers), max(1, 6 // len(runs))),
    )
    down = -(-len(panels) // across)
    fig, axes = plt.subplots(
        down,
        across,
        figsize=(2.4 + 2.3 * across, 1 + 2.6 * down),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (layer, run) in zip(axes.flat, panels, strict=False):
        rows = frame[(frame["run"] == run) & (frame["layer"] == layer)]
        ends = (rows["cosine"].min(), rows["cosine"].max())
        ax.set_title(
            f"{run}, layer {layer}\n"
            + ("{:+.3f} to {:+.3f}".format(*ends) if len(rows) else "not harvested"),
            fontsize=9,
        )
        n_heads, i, j = len(set(rows["head_i"])) + 1, rows["head_i"], rows["head_j"]
        matrix = np.full((n_heads, n_heads), np.nan)
        matrix[i, j] = matrix[j, i] = rows["cosine"]
        image = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set(
            facecolor="0.8",
            xticks=range(n_heads),
            yticks=range(n_heads),
            xlabel="head",
            ylabel="head",
        )
        ax.tick_params(labelsize=7)
    fig.colorbar(
        image, ax=axes, shrink=min(1.0, 1.6 / down), label="cosine of z (grey: the diagonal)"
    )
    published = "\n(published, layer 9: max .0305 control, .0121 adaptive)" if 9 in layers else ""
    fig.suptitle("Figure 1: heads against heads" + published, fontsize=9)
    fig.savefig(out, dpi=130)
    plt.close(fig)


def table1(csvs: list[Path]) -> str:
    """Table 1 as text, from CSVs alone: every metric of every layer, runs side by side."""
    frame, show = side_by_side(csvs), "{value:.4g} [{ci_lo:.4g}, {ci_hi:.4g}] ({null_mean:.3g})"
    frame["cell"] = [show.format(**row) for row in frame.to_dict("records")]
    index = pd.MultiIndex.from_product([sorted(frame["layer"].unique()), frame["metric"].unique()])
    table = frame.pivot(index=["layer", "metric"], columns="run", values="cell").reindex(
        index=index, columns=frame["run"].unique()
    )
    return f"""Table 1. Heads of a layer: value [95 % interval] (null); {frame["n_tokens"].min():,} tokens, {frame["n_blocks"].min()} blocks
{table.fillna("-").to_string()}
Interval: jackknife over blocks of neighbouring windows, each cell for itself; it holds for this trained model. Between runs the unit
is the training seed, n = 1 a run: descriptive only. Null: cosines, each head's basis turned at random; effective rank, heads that are
uncorrelated (an upper limit); CKA, independent heads. A maximum is biased upwards by the choice of the pair. Head numbers of different
runs are unrelated. Published, 8 heads x 64, control -> adaptive: max_cosine L3 .0218 -> .0146, L6 .0177 -> .0083, L9 .0305 -> .0121;
effective_rank L3 280.4 -> 289.5, L6 282.1 -> 307.5, L9 286.9 -> 290.4; effective_rank_share .548 -> .565, .551 -> .601, .560 -> .567.
"""


def report(args: argparse.Namespace) -> None:
    """Writes and prints table 1, and draws figure 1, for the runs compared; needs nothing but their CSV files."""
    figure, table = args.out / "figure1_head_cosines.png", args.out / "table1_topology.txt"
    csvs = compared_csvs(args, TABLES[1])
    publish(figure, functools.partial(draw_cosines, csvs), FIGURE_SCHEMA, csvs)
    csvs = compared_csvs(args, TABLES[0])
    publish(
        table,
        functools.partial(Path.write_text, data=table1(csvs), encoding="utf-8"),
        TABLE_SCHEMA,
        csvs,
    )
    print(f"{table1(csvs)}\nsee {figure} and {table}")


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    p = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, sites = positive(int), ["z", "attn_out", "resid_pre", "resid_post", "mlp_out"]
    g = p.add_argument_group("inputs")
    g.add_argument(
        "--model_path",
        type=Path,
        help="checkpoint (.pt), or a pretrained Llama: folder, hub name, .gguf; needed unless --redraw",
    )
    g.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        help="runs in figure 1 and table 1; none: every finished run in --save_dir",
    )
    g.add_argument(
        "--redraw",
        action="store_true",
        help="only redraw figure 1 and table 1 of --run_name, from the CSV files",
    )
    g = p.add_argument_group("outputs")
    g.add_argument(
        "--run_name",
        help="folder of this run in --save_dir; none: the checkpoint's arm (adaptive, control, ...)",
    )
    g.add_argument(
        "--save_dir", type=Path, default=Path("activations"), help="output folder of all runs"
    )
    g.add_argument(
        "--max_gb", type=positive(float), default=64.0, help="refuse to write more than this, GB"
    )
    g.add_argument(
        "--dump_dtype",
        choices=["float16", "float32"],
        default="float16",
        help="type of the dumps; float16 ends at 65504",
    )
    g = p.add_argument_group("data")
    g.add_argument("--dataset", help="as in janus_adaptive.py; none: that of the checkpoint")
    g.add_argument(
        "--tokenizer", help="as in janus_adaptive.py; none: tokenizer.json beside the checkpoint"
    )
    g.add_argument("--split", choices=list(SPLITS), default="train", help="split of the dataset")
    g.add_argument(
        "--tokens", type=count, help="tokens to harvest, cut to whole windows; none: by preset"
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--preset",
        choices=["auto", *PHASE_PRESETS],
        default="auto",
        help="sizes of this phase; auto: the checkpoint's",
    )
    g.add_argument("--layers", type=int, nargs="+", help="layers, counted from 0; none: all")
    g.add_argument(
        "--site",
        choices=sites,
        default="z",
        help="z: the heads' outputs before the output projection",
    )
    g.add_argument("--batch_size", type=count, help="windows a forward pass; none: by preset")
    add_runtime_flags(p)
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Cross-flag checks; exits 2 with one line."""
    if not (args.run_name if args.redraw else args.model_path):
        p.error(
            "--redraw needs --run_name"
            if args.redraw
            else "--model_path is needed (or --redraw and --run_name)"
        )
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

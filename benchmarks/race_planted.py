"""SAEs on activations whose features are known: how many of them train_sae.py finds, and SAELens.

    python benchmarks/race_planted.py [--quick]

Both get the same tokens in the same order, as many steps, the same learning rate and width, for
each architecture the same L0 to aim at, and count latents as dead after as many steps. Tokens come
less their mean: train_sae.py subtracts it, SAELens begins with b_dec = 0 and would spend its steps
and its most general latents on it. Scored on tokens that neither has seen, each as it is exported:
a latent of batchtopk and matryoshka fires above the average cut. Shapes: N tokens, D dimensions,
P planted features, F latents.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from race_sae import SAEShape, Schedule, lens_trainer, sae_args
from superposed import Planted, Score, plant, score
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_sae as ts  # noqa: E402

ARCHITECTURES = ["topk", "batchtopk", "jumprelu", "matryoshka"]


@dataclass(frozen=True)
class Study:
    """Sizes of a comparison."""

    n_features: int
    d: int
    l0: float  # features that fire in a token
    expansion: int
    n_tokens: int  # of a batch
    n_batches: int  # that are drawn; then again from the first
    steps: int
    n_test: int

    @property
    def shape(self) -> SAEShape:
        return SAEShape(self.d, self.expansion, round(self.l0), self.n_tokens)


DEAD_STEPS = 50  # without firing
FULL = Study(2048, 256, 16.0, 4, 1024, 300, 1500, 20_000)
QUICK = Study(128, 32, 4.0, 4, 256, 20, 100, 2_000)


class Tokens:
    """Batches of planted activations, and the tokens to test on."""

    def __init__(self, study: Study, seed: int) -> None:
        self.planted: Planted = plant(study.n_features, study.d, study.l0, seed)
        draws = [self.planted.draw(study.n_tokens, 1000 + i)[0] for i in range(study.n_batches)]
        drawn = torch.stack(draws)  # [batches, N, D]
        centre = drawn.mean((0, 1))  # [D]
        self.drawn = drawn - centre
        test, self.active = self.planted.draw(study.n_test, 1)
        self.test = test - centre
        rows = self.drawn.flatten(0, 1)
        variances, axes = torch.linalg.eigh((rows.T @ rows).double() / len(rows))  # ascending
        norm = float(rows.norm(dim=1).mean())
        self.moments = ts.Moments(centre, norm, variances.flip(0), axes.flip(1).float())

    def batches(self) -> Iterator[Tensor]:
        while True:
            yield from self.drawn


def ours(
    study: Study, tokens: Tokens, arch: str, dtype: str, rate: float, seed: int
) -> tuple[Score, float]:
    """Score, and seconds of training."""
    schedule = Schedule(study.steps, rate, seed)
    args = sae_args(study.shape, arch, dtype, schedule, dead_tokens=DEAD_STEPS * study.n_tokens)
    args.target_l0 = study.shape.k
    axes = tokens.moments.leading_axes(ts.parse_args([]).start_variance)
    middle = torch.zeros(study.d)  # tokens come less their mean
    trainer = ts.Trainer(args, middle, tokens.moments.norm, torch.device("cpu"), False, axes)
    start = time.perf_counter()
    for x, _ in zip(tokens.batches(), range(study.steps), strict=False):
        trainer.step(x)
    seconds = time.perf_counter() - start
    cfg = {"architecture": trainer.architecture.saelens, "k": args.k}
    sae = ts.SparseAutoencoder(cfg, trainer.weights(trainer.scale, trainer.mean))
    latents = sae.encode(tokens.test)
    return score(tokens.planted, tokens.active, latents, sae.weights["W_dec"]), seconds


def theirs(study: Study, tokens: Tokens, arch: str, rate: float, seed: int) -> tuple[Score, float]:
    """Score, and seconds of training, of SAELens in float32."""
    torch.manual_seed(seed)
    schedule = Schedule(study.steps, rate, seed)
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        trainer = lens_trainer(
            study.shape, arch, False, schedule, tokens.batches(), dead_steps=DEAD_STEPS
        )
        # which it would estimate from the first batches
        trainer.activation_scaler.scaling_factor = math.sqrt(study.d) / tokens.moments.norm
        coder: Any = trainer.fit()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        sae = exported(coder)
        latents = sae.encode(tokens.test)
    return score(tokens.planted, tokens.active, latents, sae.W_dec.detach()), seconds


def exported(coder: Any) -> Any:
    """What SAELens makes of an SAE in training for those who use it."""
    import sae_lens

    with tempfile.TemporaryDirectory() as folder:
        coder.save_inference_model(folder)
        return sae_lens.SAE.load_from_disk(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--archs", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, help="also as CSV")
    options = parser.parse_args(argv)
    study = QUICK if options.quick else FULL
    rows = []
    for seed in options.seeds:
        tokens = Tokens(study, seed)
        for arch in options.archs:
            for rate in options.rates:
                found = {"SAELens": theirs(study, tokens, arch, rate, seed)}
                for dtype in ("float32", "bfloat16", "int8"):
                    if dtype != "int8" or ts.ARCHITECTURES[arch].int8:
                        found[f"ours, {dtype}"] = ours(study, tokens, arch, dtype, rate, seed)
                for who, (result, seconds) in found.items():
                    names = {"seed": seed, "arch": arch, "rate": rate, "who": who}
                    rows.append(names | asdict(result) | {"seconds": seconds})
                    print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many latents of an SAE stay alive, by where they start: --start_variance of train_sae.py.

    python benchmarks/sae_start.py [--run runs/demo] [--starts 1 0.999 0.995 0.99 0.9]

Trains an SAE of each layer of both arms of `make demo`, for each start, architecture and seed, and
writes a row each: the shares of latents that never fire, and that fire on fewer than 1 in 100,000,
of at least 100,000 mixed tokens; and FVU on held-out documents. What a start changes is printed,
and in compared.csv beside it. The unit is the layer of an arm, its seeds averaged.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from harness import ROOT
from scipy import stats

sys.path.insert(0, str(ROOT))
import train_sae as ts  # noqa: E402

RARE = 1e-5  # of the tokens
LAYER = ["run", "layer"]  # the unit


def train(options: argparse.Namespace, arch: str, start: float) -> pd.DataFrame:
    """SAEs of one architecture and start, all layers, arms and seeds -> a row each."""
    folder = options.out.parent / f"{arch}_{start:g}"
    argv = ["--runs", "adaptive", "control", "--layers", *options.layers, "--arch", arch]
    argv += ["--activations_dir", str(options.run / "activations"), "--save_dir", str(folder)]
    argv += ["--start_variance", f"{start:g}", "--seeds", *options.seeds, "--overwrite"]
    if ts.main(argv):
        raise SystemExit(f"train_sae.py {' '.join(argv)} failed")
    rows = []
    for sae in pd.read_csv(folder / "sae_metrics.csv").itertuples():
        frequency = pd.read_csv(folder / sae.folder / "latent_frequencies.csv")["frequency"]
        alive = {"never": (frequency == 0).mean(), "rare": (frequency < RARE).mean()}
        about = {"arch": arch, "start": start, "run": sae.run, "layer": sae.layer}
        about |= {"seed": sae.seed, "steps": sae.steps, "n_tokens": sae.dead_share_tokens}
        rows.append(about | alive | {"fvu": sae.fvu, "l0": sae.l0})
    return pd.DataFrame(rows)


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """A row an architecture and start: shares of latents, mean and largest over SAEs; and by which
    share FVU is larger than with a start anywhere (1), same arm, layer and seed, 95 % by Student's
    t over layers; a difference below `smallest` could not have been told from 0."""
    table = []
    for arch, of_arch in rows.groupby("arch", sort=False):
        anywhere = of_arch[of_arch["start"] == 1].set_index([*LAYER, "seed"])["fvu"]
        for start, found in of_arch.groupby("start", sort=False):
            row = {"arch": arch, "start": start, "n_saes": len(found)}
            for name in ("never", "rare"):
                row |= {name: found[name].mean(), f"{name}_most": found[name].max()}
            ratio = np.log(found.set_index([*LAYER, "seed"])["fvu"] / anywhere).dropna()
            of_layer = ratio.groupby(level=LAYER).mean()
            row |= {"n_layers": len(of_layer), "more": np.expm1(of_layer.mean())}
            if start != 1 and len(of_layer) > 1:
                interval = stats.ttest_1samp(of_layer, 0).confidence_interval()
                row |= {"more_lo": np.expm1(interval.low), "more_hi": np.expm1(interval.high)}
                row["smallest"] = np.expm1((interval.high - interval.low) / 2)
            table.append(row)
    return pd.DataFrame(table)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Path("runs/sae_start/sae_start.csv")
    p.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    p.add_argument("--starts", nargs="+", type=float, default=[1, 0.999, 0.995, 0.99, 0.9])
    p.add_argument("--archs", nargs="+", default=["batchtopk", "topk"])
    p.add_argument("--layers", nargs="+", default=["0", "1", "2", "3", "4", "5"])
    p.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    p.add_argument("--out", type=Path, default=default, help="CSV, a row an SAE")
    options = p.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    every = itertools.product(options.archs, options.starts)
    rows = pd.concat([train(options, arch, start) for arch, start in every])
    ts.write_csv(options.out, rows)
    compared = ts.write_csv(options.out.with_name("compared.csv"), compare(rows))
    print(compared.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

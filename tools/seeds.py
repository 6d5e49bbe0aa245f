"""What holds over training runs: the two arms, paired by seed, with the seed as the unit of replication.

    python tools/seeds.py runs/seeds/1 runs/seeds/2 runs/seeds/3 --save_dir results

Each folder holds both arms of one seed and their ablation (`make seeds`). Writes seeds.csv (one measurement a row), seeds_summary.csv
(one paired difference a row) and seeds.png, and prints what they say. The demo's control loop was tuned on seed 42: leave that
seed out, it is no evidence about the loop.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from headlines import tracking  # noqa: E402
from scipy import stats  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from janus_adaptive import HandoffError, atomic, one_line_errors, read_telemetry  # noqa: E402

COLOURS = {"adaptive": "#d55e00", "control": "#0072b2"}
METRICS = {  # name: label; all are tested, so p-values and intervals are corrected for their number
    "val_loss": "validation loss (nats a token)",
    "val_sigma_z": "sigma_z, validation",
    "val_sigma_resid": "sigma_resid, validation",
    "max_share": "top head's share of all impact",
    "gini": "Gini index of the impacts",
    "crossfit": "top head's impact (nats, cross-fitted)",
}


def measure(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One seed -> its rows (seed, arm, metric, value), and how its loop tracked the setpoint. HandoffError if it is unfinished."""
    telemetry = {arm: read_telemetry(folder / arm / "telemetry.csv") for arm in COLOURS}
    rows, heroes = [], {}
    try:
        summary = pd.read_csv(folder / "results_ablation_summary.csv")
        summary = summary[summary["mode"] == summary["ranked_by"]].set_index("run")
        settings = {arm: json.loads((folder / arm / "run.json").read_text(encoding="utf-8"))["arguments"] for arm in COLOURS}
        seed, target = (settings["adaptive"][name] for name in ("seed", "target_sigma"))
        if settings["control"]["seed"] != seed:
            raise ValueError(f"the arms have the seeds {seed} and {settings['control']['seed']}, expected one")
        for arm, frame in telemetry.items():
            found = {m: frame[m].dropna().iloc[-1] if m in frame else summary.loc[arm, m] for m in METRICS}
            rows += [dict(seed=seed, arm=arm, metric=m, value=float(v)) for m, v in found.items()]
            hero = summary.loc[arm]
            heroes[arm] = f"L{hero['hero_layer']:.0f}H{hero['hero_head']:.0f}" + ("" if hero["unique_hero"] else " (not unique)")
    except (OSError, ValueError, KeyError, IndexError) as e:
        raise HandoffError(f"{folder} is not a pair of finished runs ({e!r}); make it with: make seeds") from None
    held = tracking(telemetry["adaptive"], target)
    free = telemetry["control"]
    free = free["sigma_z"][free["step"] >= held["settled_step"]].mean() / target  # the same metric, over the same steps
    return rows, dict(seed=seed, control_over_setpoint=free, **held, **{f"hero_{arm}": name for arm, name in heroes.items()})


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """adaptive - control of each metric over seeds: mean, t interval and p, p of the sign-flip permutation (the null: arms are
    exchangeable within a seed), all corrected for the number of metrics (Bonferroni)."""
    wide, out, m = rows.pivot(index="seed", columns=["metric", "arm"], values="value"), [], len(METRICS)
    for metric in METRICS:
        a, c = (wide[metric][arm].to_numpy() for arm in COLOURS)
        t = stats.ttest_rel(a, c)
        low, high = t.confidence_interval(1 - 0.05 / m)
        flips = stats.permutation_test((a - c,), np.mean, permutation_type="samples", n_resamples=9999)
        out.append(
            dict(metric=metric, n_seeds=len(a), adaptive=a.mean(), control=c.mean(), difference=(a - c).mean(), ci_lo=low, ci_hi=high)
            | dict(relative_percent=100 * (a / c - 1).mean(), p_t=min(1, m * t.pvalue), p_sign_flip=min(1, m * flips.pvalue))
        )
    return pd.DataFrame(out)


def draw(rows: pd.DataFrame, summary: pd.DataFrame) -> plt.Figure:
    """A panel a metric, a line a seed."""
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    for ax, (metric, label), s in zip(axes.flat, METRICS.items(), summary.itertuples(), strict=True):
        wide = rows[rows["metric"] == metric].pivot(index="seed", columns="arm", values="value")
        for seed, values in wide.iterrows():
            ax.plot([0, 1], values[list(COLOURS)], color="0.6", lw=1, zorder=1)
            ax.annotate(f"{seed}", (1, values["control"]), (6, 0), textcoords="offset points", va="center", fontsize=7, color="0.35")
        for at, (arm, colour) in enumerate(COLOURS.items()):
            ax.scatter([at] * len(wide), wide[arm], color=colour, zorder=2)
        ax.set(title=label, xticks=[0, 1], xticklabels=list(COLOURS), xlim=(-0.3, 1.3))
        ax.set_xlabel(f"difference {s.difference:+.3g} [{s.ci_lo:+.3g}, {s.ci_hi:+.3g}]", fontsize=9)
        ax.margins(y=0.15)
    n = summary["n_seeds"].iloc[0]
    fig.suptitle(f"{n} training seeds (numbers at the right), both arms each; intervals: paired t, 95 % over all {len(METRICS)} panels")
    return fig


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    p.add_argument("runs", type=Path, nargs="+", help="folders of `make seeds`, one a seed")
    p.add_argument("--save_dir", type=Path, default=Path("results"), help="output folder")
    args = p.parse_args(argv)
    found = [measure(folder) for folder in args.runs]
    rows, loops = pd.DataFrame([row for some, _ in found for row in some]), pd.DataFrame([loop for _, loop in found])
    if len(loops) < 2 or loops["seed"].duplicated().any():
        raise HandoffError(f"found the seeds {loops['seed'].tolist()}, expected at least two different ones; make more with: make seeds")
    summary = paired(rows)
    for name, table in dict(seeds=rows, seeds_summary=summary, seeds_loops=loops).items():
        with atomic(args.save_dir / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)
    with atomic(args.save_dir / "seeds.png") as tmp:
        draw(rows, summary).savefig(tmp, dpi=130)
    print(f"{len(loops)} seeds; adaptive - control, paired; intervals and p corrected for {len(METRICS)} metrics")
    print(f"the smallest p that flipping signs can give with {len(loops)} seeds: {min(1, len(METRICS) * 2 / 2 ** len(loops)):.3g}\n")
    print(summary.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    print(f"\nthe loop, seed by seed\n{loops.to_string(index=False, float_format=lambda v: f'{v:.3g}')}")
    good = loops[(loops["share"] >= 0.9) & (loops["control_over_setpoint"] >= 2)]
    print(f"\n{len(good)} of {len(loops)} seeds: 90 % of samples within 10 % of the setpoint, control at least 2 times above it")
    print(f"Read {args.save_dir / 'seeds.png'}, seeds.csv, seeds_summary.csv, seeds_loops.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What holds over training runs: the two arms, paired by seed.

    python tools/seeds.py runs/seeds/1 runs/seeds/2 runs/seeds/3 --save_dir results

The seed is the unit of replication: each folder holds both arms of one seed and their ablation
(`make seeds`). Writes seeds.csv (one measurement a row), seeds_summary.csv (one paired difference
a row), seeds_loops.csv (one control loop a row) and seeds.png, and prints what they say. The demo's
control loop was tuned on seed 42: leave that seed out, it is no evidence about the loop.
"""

import argparse
import functools
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from headlines import after_settling, last_value, tracking  # noqa: E402
from scipy import stats  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from janus_adaptive import (  # noqa: E402
    HandoffError,
    atomic,
    drawing,
    one_line_errors,
    read_telemetry,
    save_figure,
)

COLOURS = {"adaptive": "#d55e00", "control": "#0072b2"}
METRICS = {  # name: label; all are tested, so p-values and intervals are corrected for their number
    "val_loss": "validation loss (nats a token)",
    "val_sigma_z": "sigma_z, validation",
    "val_sigma_resid": "sigma_resid, validation",
    "max_share": "top head's share of all impact",
    "gini": "Gini index of the impacts",
    "crossfit": "top head's impact (nats, cross-fitted)",
}
BONFERRONI = len(METRICS)


# ------------------------------------------------------------------------------------------- method
def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the adaptive arm. Raises ValueError if the control has another seed."""
    arms = {}
    for arm in COLOURS:
        record = (folder / arm / "run.json").read_text(encoding="utf-8")
        arms[arm] = json.loads(record)["arguments"]
    seed, other = arms["adaptive"]["seed"], arms["control"]["seed"]
    if other != seed:
        raise ValueError(f"the arms have the seeds {seed} and {other}, expected one")
    return arms["adaptive"]


def name_hero(head: pd.Series) -> str:
    """L3H1, and whether another head could as well be the first (`head`: a row of the summary)."""
    name = f"L{head['hero_layer']:.0f}H{head['hero_head']:.0f}"
    return name if head["unique_hero"] else f"{name} (not unique)"


def measure(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One seed: its rows (seed, arm, metric, value), and how its loop tracked the setpoint.

    Raises HandoffError if the folder does not hold both arms of one seed and their ablation.
    """
    telemetry = {arm: read_telemetry(folder / arm / "telemetry.csv") for arm in COLOURS}
    rows = []
    heroes = {}
    try:
        summary = pd.read_csv(folder / "results_ablation_summary.csv")
        # Every mode of ablation has rows; heads are ranked by one of them
        summary = summary[summary["mode"] == summary["ranked_by"]].set_index("run")
        arguments = read_arguments(folder)
        seed, target = arguments["seed"], arguments["target_sigma"]
        filter_beta = arguments["filter_beta"]
        for arm, frame in telemetry.items():
            for metric in METRICS:
                # What training measured is in the telemetry, what ablation measured in its summary
                measured = metric in frame
                value = last_value(frame, metric) if measured else summary.loc[arm, metric]
                rows.append({"seed": seed, "arm": arm, "metric": metric, "value": float(value)})
            heroes[f"hero_{arm}"] = name_hero(summary.loc[arm])
    except (OSError, ValueError, KeyError, IndexError) as e:
        found = f"{folder} is not a pair of finished runs ({e!r})"
        raise HandoffError(f"{found}; make it with: make seeds") from None

    held = tracking(telemetry["adaptive"], target, filter_beta)
    free = after_settling(telemetry["control"], held)  # the same metric, over the same steps
    loop = {"seed": seed, "control_over_setpoint": free / target} | asdict(held) | heroes
    return rows, loop


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """adaptive - control of each metric over seeds: a row a metric, its p-values and interval.

    p_t and the 95 % interval are those of the paired t-test; p_sign_flip that of the permutation
    test whose null is that the arms are exchangeable within a seed. All are corrected for the
    number of metrics (Bonferroni).
    """
    # A row a seed, so that subtracting two columns pairs what shares initial weights and data
    wide = rows.pivot(index="seed", columns=["metric", "arm"], values="value")
    summary = []
    for metric in METRICS:
        adaptive = wide[metric]["adaptive"].to_numpy()  # [seeds]
        control = wide[metric]["control"].to_numpy()  # [seeds]
        difference = adaptive - control  # [seeds]
        t_test = stats.ttest_rel(adaptive, control)
        low, high = t_test.confidence_interval(1 - 0.05 / BONFERRONI)
        # If the arms were exchangeable, each seed's difference could as well have the other sign
        sign_flips = stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=9999
        )
        summary.append(
            {
                "metric": metric,
                "n_seeds": len(adaptive),
                "adaptive": adaptive.mean(),
                "control": control.mean(),
                "difference": difference.mean(),
                "ci_lo": low,
                "ci_hi": high,
                "relative_percent": 100 * (adaptive / control - 1).mean(),
                "p_t": min(1, BONFERRONI * t_test.pvalue),
                "p_sign_flip": min(1, BONFERRONI * sign_flips.pvalue),
            }
        )
    return pd.DataFrame(summary)


def measure_all(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and loops of all seeds. Raises HandoffError unless there are two different ones."""
    rows = []
    loops = []
    for folder in folders:
        of_seed, loop = measure(folder)
        rows += of_seed
        loops.append(loop)
    # Two runs of one seed are one observation, not two
    seeds = [loop["seed"] for loop in loops]
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        expected = "expected at least two different ones; make more with: make seeds"
        raise HandoffError(f"found the seeds {seeds}, {expected}")
    return pd.DataFrame(rows), pd.DataFrame(loops)


# ------------------------------------------------------------------------------ tables and figures
def draw(rows: pd.DataFrame, summary: pd.DataFrame, is_stacked: bool = False) -> plt.Figure:
    """A panel a metric, a line a seed."""
    grid, size = ((6, 1), (4.5, 17)) if is_stacked else ((2, 3), (11, 6.4))
    fig, axes = plt.subplots(*grid, figsize=size, layout="constrained")
    differences = summary.set_index("metric")
    for ax, (metric, label) in zip(axes.flat, METRICS.items(), strict=True):
        of_metric = rows[rows["metric"] == metric]
        wide = of_metric.pivot(index="seed", columns="arm", values="value")
        for seed, values in wide.iterrows():  # both arms of a seed share data and initial weights
            ax.plot([0, 1], values[list(COLOURS)], color="0.6", lw=1, zorder=1)
            beside = dict(xytext=(6, 0), textcoords="offset points", va="center")
            ax.annotate(f"{seed}", (1, values["control"]), fontsize=8, **beside)
        # The adaptive arm stands at 0, the control at 1: what the lines connect
        for place, (arm, colour) in enumerate(COLOURS.items()):
            ax.scatter([place] * len(wide), wide[arm], color=colour, zorder=2)
        ax.set(title=label, xticks=[0, 1], xticklabels=list(COLOURS), xlim=(-0.3, 1.3))
        found = differences.loc[metric]
        interval = f"[{found['ci_lo']:+.3g}, {found['ci_hi']:+.3g}]"
        ax.set_xlabel(f"difference {found['difference']:+.3g} {interval}", fontsize=9)
        ax.margins(y=0.15)  # the labels of the seeds stay in the frame
    n_seeds = summary["n_seeds"].iloc[0]
    note = f"{n_seeds} training seeds (numbers at the right), both arms each; difference: "
    note += f"adaptive - control, paired t interval, 95 % over all {len(METRICS)} panels"
    fig.supxlabel(textwrap.fill(note, round(13 * size[0])), fontsize=8.5)
    return fig


def tell(summary: pd.DataFrame, loops: pd.DataFrame) -> None:
    """Prints what the tables say."""
    n_seeds = len(loops)
    corrected = f"intervals and p corrected for {len(METRICS)} metrics"
    print(f"{n_seeds} seeds; adaptive - control, paired; {corrected}")
    # Two of the 2^n sign patterns are as extreme as all signs equal
    smallest = min(1, BONFERRONI * 2 / 2**n_seeds)
    print(f"the smallest p that flipping signs can give with {n_seeds} seeds: {smallest:.3g}\n")
    print(summary.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    table = loops.to_string(index=False, float_format=lambda v: f"{v:.3g}")
    print(f"\nthe loop, seed by seed\n{table}")
    # What the Homeostat claims: it holds its setpoint, and without it sigma would be elsewhere
    held = loops["share"] >= 0.9
    apart = loops["control_over_setpoint"] >= 2
    claim = "90 % of samples within 10 % of the setpoint, control at least 2 times above it"
    print(f"\n{(held & apart).sum()} of {n_seeds} seeds: {claim}")


def run(args: argparse.Namespace) -> int:
    rows, loops = measure_all(args.runs)
    summary = paired(rows)
    tables = {"seeds": rows, "seeds_summary": summary, "seeds_loops": loops}
    for name, table in tables.items():
        with atomic(args.save_dir / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)
    tell(summary, loops)
    again = ["tools/seeds.py", *args.runs, "--save_dir", args.save_dir]
    csvs = [args.save_dir / f"{name}.csv" for name in tables]
    picture = args.save_dir / "seeds.png"
    with drawing(csvs, again):
        save_figure(functools.partial(draw, rows, summary), picture)
    print(f"Read {picture}, seeds.csv, seeds_summary.csv, seeds_loops.csv")
    return 0


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.add_argument("runs", type=Path, nargs="+", help="folders of `make seeds`, one a seed")
    p.add_argument("--save_dir", type=Path, default=Path("results"), help="output folder")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

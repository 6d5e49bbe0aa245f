"""Do the intervals of ablation_test.py hold what they should? Against every window of the split.

    python ablation_test.py --adaptive_model runs/demo/adaptive/janus_adaptive_final.pt \\
        --n_seqs 0 --mode mean --n_together 0 --save_file runs/whole/results_ablation.csv
    python benchmarks/interval_coverage.py runs/whole/results_ablation.npz

The truth is the mean exact effect of each head over all windows of the validation split, every one
of them measured. From them some windows are drawn at random, again and again, and their effects
estimated twice: as they are (plain), and steadied by the first-order effects of the whole split.
Printed, for each estimate: how often the 95 % interval holds the truth, mean and least over heads;
the largest bias, in standard errors of the mean over draws; and by what factor steadying makes the
squared standard error and the squared error smaller. --heads prints them head by head.

The draws are of windows, while documents are the unit of the intervals: an interval is of the split
as it is, of which the windows are a sample without replacement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from harness import ROOT

sys.path.insert(0, str(ROOT))
import ablation_test as at  # noqa: E402

RESAMPLES = 1000  # of the bootstrap behind each interval


def draw_once(
    exact: np.ndarray, linear: np.ndarray, documents: np.ndarray, n: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Both estimates from n windows drawn from all N of them: {plain, steadied: {column: [R]}}.

    exact, linear [N, R]: effects of every head in every window; documents [N].
    """
    rng = np.random.default_rng(seed)
    # Without replacement, and in the order of the text
    some = np.sort(rng.choice(len(exact), n, replace=False))  # [n]
    values = {
        "plain": exact[some],
        "steadied": at.steady(exact[some], linear[some], linear.mean(0), documents[some]),
    }
    found = {}
    # As write_results() makes the CSV from them
    for name, of_window in values.items():
        units = at.units(of_window, documents[some])
        columns = at.uncertain_columns(units, at.bootstrap_units(units, RESAMPLES, seed))
        found[name] = {"impact": of_window.mean(0), **columns}
    return found


def table_of_heads(
    exact: np.ndarray, linear: np.ndarray, documents: np.ndarray, n: int, n_draws: int
) -> pd.DataFrame:
    """A row a head, two values a column: coverage, se (median over draws), rmse and bias (in
    standard errors of a mean over the draws), of both estimates."""
    truth = exact.mean(0)  # [R], no estimate: every window is in it
    # Both estimates see the same windows
    draws = [draw_once(exact, linear, documents, n, seed) for seed in range(n_draws)]
    columns = {"truth": truth}
    for name in ("plain", "steadied"):
        impact = np.array([draw[name]["impact"] for draw in draws])  # [draws, R]
        low = np.array([draw[name]["ci_lo"] for draw in draws])
        high = np.array([draw[name]["ci_hi"] for draw in draws])
        # An error that is the same in every draw is a bias
        error = impact - truth
        noise = impact.std(0, ddof=1) / np.sqrt(n_draws)
        columns[f"{name}_coverage"] = ((low <= truth) & (truth <= high)).mean(0)
        columns[f"{name}_se"] = np.median([draw[name]["se"] for draw in draws], axis=0)
        columns[f"{name}_rmse"] = np.sqrt((error**2).mean(0))
        columns[f"{name}_bias"] = error.mean(0) / np.maximum(noise, 1e-300)
    return pd.DataFrame(columns)


def tell(run: str, mode: str, n_windows: int, n: int, table: pd.DataFrame) -> None:
    """Prints what one run and mode come to."""
    print(f"{run}, {mode} ablation: {len(table)} heads, {n} of {n_windows:,} windows")
    for name in ("plain", "steadied"):
        coverage = table[f"{name}_coverage"]
        # Heads share their draws: the mean is worth fewer than draws times heads
        bias = table[f"{name}_bias"].abs().max()
        print(
            f"  {name}: the 95 % interval holds the truth in {coverage.mean():.1%} "
            f"(least {coverage.min():.0%}); largest bias {bias:.1f} standard errors"
        )
    # What an interval says of itself, and what is true of the estimate
    for column, what in (("se", "squared standard error"), ("rmse", "squared error")):
        ratio = (table[f"plain_{column}"] / table[f"steadied_{column}"]) ** 2
        print(f"  {what}, plain / steadied: median {ratio.median():.1f}, least {ratio.min():.2f}")


def main(argv: list[str] | None = None) -> int:
    """Prints the comparison of every run and mode in the file; 0, or 1 with a line of what is
    wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("npz", type=Path, help="of ablation_test.py --n_seqs 0")
    parser.add_argument(
        "--n", type=at.positive(int), default=48, help="windows a draw (default: 48)"
    )
    parser.add_argument("--draws", type=at.positive(int), default=20, help="draws (default: 20)")
    parser.add_argument("--heads", action="store_true", help="print a row a head too")
    options = parser.parse_args(argv)
    if options.n < at.MIN_UNITS or options.draws < 2:
        found = f"--n {options.n} --draws {options.draws}"
        parser.error(f"{found}: expected at least {at.MIN_UNITS} windows and 2 draws")
    try:
        losses, facts = at.read_losses(options.npz)
    except (at.HandoffError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for run in facts["runs"]:
        for mode in facts["modes"]:
            base = losses[f"{run}.base"]  # [N]
            n_windows = len(base)
            # With more windows to first order than exact ones there is no truth
            if f"{run}.split.{mode}.first_order" in losses:
                what = "windows, and more to first order; expected all: --n_seqs 0"
                print(f"{options.npz} holds {n_windows} {what}", file=sys.stderr)
                return 1
            if n_windows <= options.n:
                what = f"expected fewer than the {n_windows} windows of {options.npz}"
                print(f"--n {options.n}: {what}", file=sys.stderr)
                return 1
            # The effect of a head, and what the gradient says of it
            loss = losses[f"{run}.{mode}.loss"]  # [N, layers, H]
            exact = (loss - base[:, None, None]).reshape(n_windows, -1)
            linear = losses[f"{run}.{mode}.first_order"].reshape(n_windows, -1)
            documents = losses["documents"]
            table = table_of_heads(exact, linear, documents, options.n, options.draws)
            tell(run, mode, n_windows, options.n, table)
            if options.heads:
                print(table.to_string(float_format=lambda value: f"{value:.4g}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

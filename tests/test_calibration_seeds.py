"""What tools/seeds.py and tools/headlines.py print, in simulations with a known answer."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calibration import LONGER, record
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import seeds  # noqa: E402

SIMULATIONS = 150 * LONGER
# How many standard errors a share may be off: by chance any of the 24 compared here is in one run of a thousand
Z = stats.norm.isf(0.001 / 2 / 24)
NOISE = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "student 3": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),
}


def summaries(noise: str, n_seeds: int, effect: float) -> list[pd.DataFrame]:
    """Tables of `seeds.paired`: every metric differs between the arms by `effect` standard deviations of a difference,
    beside what both arms of a seed share."""
    rng = np.random.default_rng([n_seeds, len(noise)])
    arms = ("adaptive", "control")
    metrics = list(seeds.METRICS)
    index = [(seed, metric, arm) for seed in range(n_seeds) for metric in metrics for arm in arms]
    rows = pd.DataFrame(index, columns=["seed", "metric", "arm"])
    found = []
    for _ in range(SIMULATIONS):
        shared = rng.standard_normal((n_seeds, len(metrics), 1))
        own = NOISE[noise](rng, (n_seeds, len(metrics), 2)) / np.sqrt(2)
        own[:, :, 0] += effect
        found.append(seeds.paired(rows.assign(value=(10 + shared + own).ravel())))
    return found


@pytest.fixture(scope="module", params=[("normal", 4), ("normal", 8), ("student 3", 4), ("student 3", 8)], ids=str)  # fmt: skip
def null(request):
    """Tables where the arms do not differ."""
    noise, n_seeds = request.param
    return request.param, summaries(noise, n_seeds, 0.0)


def test_intervals_over_seeds_hold_all_differences_at_once(null):
    """95 % of the tables have no interval that misses: that is what dividing by the number of metrics is for."""
    setting, tables = null
    covered = np.mean([((t["ci_lo"] <= 0) & (t["ci_hi"] >= 0)).all() for t in tables])
    record("seeds: simultaneous interval", str(setting), coverage=covered, simulations=len(tables))
    error = np.sqrt(0.95 * 0.05 / len(tables))
    assert covered >= 0.95 - Z * error
    if setting[0] == "normal":  # Bonferroni over six independent metrics: .9508
        assert covered <= 0.951 + Z * error


def test_p_values_over_seeds_are_uniform_or_larger(null):
    setting, tables = null
    p = np.concatenate([t["p_t"].to_numpy() for t in tables]) / seeds.BONFERRONI  # at most 1 / 6
    below = {level: (p <= level).mean() for level in (0.01, 0.05, 0.1)}
    record("seeds: p_t", str(setting), **{f"p <= {level}": share for level, share in below.items()})
    for level, share in below.items():
        assert share <= level + Z * np.sqrt(level * (1 - level) / len(p))
        if setting[0] == "normal":
            assert share >= level - Z * np.sqrt(level * (1 - level) / len(p))
    flips = np.concatenate([t["p_sign_flip"].to_numpy() for t in tables]) / seeds.BONFERRONI
    for level in (0.01, 0.05, 0.1):
        assert (flips <= level).mean() <= level + Z * np.sqrt(level * (1 - level) / len(flips))


def test_power_over_seeds():
    """What four seeds can find: a difference of 6 standard deviations nearly always, one of 2 rarely."""
    power = {}
    for effect in (2.0, 6.0):
        tables = summaries("normal", 4, effect)[: SIMULATIONS // 4]
        power[effect] = np.mean([(t["p_t"] < 0.05).mean() for t in tables])
        # The noncentral t distribution says the same
        critical = stats.t.ppf(1 - 0.05 / seeds.BONFERRONI / 2, 3)
        expected = stats.nct.sf(critical, 3, effect * 2)
        record("seeds: power", f"n 4, effect {effect} sd", power=power[effect], expected=expected)
        error = np.sqrt(max(expected * (1 - expected), 0.01) / (6 * len(tables)))
        assert power[effect] == pytest.approx(expected, abs=4 * error)
    assert power[2.0] < 0.5 < 0.9 < power[6.0]

"""Every interval and p value that ablation_test.py prints, on data with a known answer: coverage,
error rates under the null, power at a planted effect.

A simulation draws delta [n units, 12 heads] around known impacts. Bounds are those of the binomial
distribution: what a statistic that keeps its promise would break once in a thousand runs.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from calibration import LONGER, record
from scipy import stats

import ablation_test as A

N_SIM = 40 * LONGER
DRAWS = 400
HEADS = 12
IMPACTS = {
    "null": np.zeros(HEADS),
    "clear": np.array([1.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0, 0]),
    "tied": np.array([1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
}


def noise(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Mean 0 and standard deviation 1 (ties: .4)."""
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "tails":  # lognormal, skewness 6.2
        return (rng.lognormal(size=shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    if kind == "left":  # skewness -2
        return 1 - rng.exponential(size=shape)
    if kind == "t3":  # infinite kurtosis
        return rng.standard_t(3, size=shape) / np.sqrt(3)
    assert kind == "ties"  # four in five are exactly 0
    return rng.normal(size=shape) * (rng.random(shape) < 0.2)


def simulate(impacts: str, kind: str, n: int) -> list[A.HeadStatistics]:
    rng = np.random.default_rng([n, len(impacts), len(kind)])
    found = []
    for seed in range(N_SIM):
        delta = IMPACTS[impacts] + noise(kind, rng, (n, HEADS))
        found.append(A.head_statistics(delta, DRAWS, seed))
    return found


def summaries(found: list[A.HeadStatistics]) -> pd.DataFrame:
    return pd.DataFrame([one.summary for one in found])


def columns(found: list[A.HeadStatistics], name: str) -> np.ndarray:
    """[simulations, heads]."""
    return np.stack([one.columns[name] for one in found])


def expected_impact_of_the_chosen(impacts: str, kind: str, n: int) -> float:
    """Brute force: the true impact of the head that leads on half of n units, on average."""
    rng = np.random.default_rng(n)
    mu = IMPACTS[impacts]
    draws = [(mu + noise(kind, rng, (n // 2, HEADS))).mean(0).argmax() for _ in range(3000)]
    return mu[draws].mean()


def at_least(hits: np.ndarray, share: float) -> bool:
    return bool(stats.binom.cdf(np.sum(hits), len(hits), share) > 1e-3)


def at_most(hits: np.ndarray, share: float) -> bool:
    return bool(stats.binom.sf(np.sum(hits) - 1, len(hits), share) > 1e-3)


def held(table: pd.DataFrame, name: str, truth: float | np.ndarray) -> np.ndarray:
    """Whether each interval of a summary holds the truth."""
    low = table[f"{name}_lo"].to_numpy()
    high = table[f"{name}_hi"].to_numpy()
    return (low <= truth) & (truth <= high)


# ------------------------------------------------------------------------------- the chosen head
@pytest.mark.parametrize(
    ("impacts", "kind"),
    [
        ("clear", "normal"),
        ("clear", "tails"),
        ("clear", "left"),
        ("tied", "normal"),
        ("tied", "tails"),
    ],
)
def test_intervals_of_the_first_head_hold_the_truth_in_95_percent(impacts: str, kind: str) -> None:
    every = {"crossfit": [], "difference": [], "gap": [], "effective": []}
    unique = []
    mu = IMPACTS[impacts]
    for n in (32, 48, 200):
        found = simulate(impacts, kind, n)
        table = summaries(found)
        hits = {
            "crossfit": held(table, "crossfit", expected_impact_of_the_chosen(impacts, kind, n)),
            # Two simulations are two models on the same units, of one expected impact
            "difference": differences_hold(found),
            "gap": held(table, "gap", leads(found, mu)),
            "effective": held(table, "effective_heads", mu.sum() ** 2 / np.square(mu).sum()),
        }
        setting = f"{impacts}, {kind}, n = {n}"
        for name, hit in hits.items():
            every[name].append(hit)
            record(f"interval of {name}", setting, coverage=hit.mean())
        unique.append(table["unique_hero"].to_numpy(bool))
        record("unique hero", setting, share=unique[-1].mean())
    coverage = {name: np.concatenate(hits) for name, hits in every.items()}
    lowest = 0.9 if kind == "left" else 0.92  # METRICS.md says so
    for name, hits in coverage.items():
        assert at_least(hits, lowest), (name, hits.mean())
    # The jackknife is wide where heads are tied, and logarithms are where noise is large
    assert at_most(coverage["crossfit"], 0.98)
    if impacts == "tied":
        assert at_most(np.concatenate(unique), 0.05)
    elif kind == "normal":  # and a head that is clearly ahead is found
        assert unique[0].mean() > 0.5 and unique[-1].all()


def differences_hold(found: list[A.HeadStatistics]) -> np.ndarray:
    args = SimpleNamespace(bootstrap=DRAWS, seed=0)
    pairs = zip(found[::2], found[1::2], strict=True)
    rows = [A.best_minus_best(one.crossfit, two.crossfit, args) for one, two in pairs]
    return held(pd.DataFrame(rows), "difference", 0)


def leads(found: list[A.HeadStatistics], mu: np.ndarray) -> np.ndarray:
    """By how much the head that each simulation puts first is truly ahead."""
    return np.array([mu[one.hero] - np.delete(mu, one.hero).max() for one in found])


@pytest.mark.parametrize("n_equal", [1, 6, HEADS])
def test_effective_heads_count_equal_heads_of_many(n_equal: int) -> None:
    rng = np.random.default_rng(n_equal)
    mu = np.where(np.arange(3 * HEADS) < n_equal, 0.8, 0)
    found = []
    for kind in ("normal", "tails"):
        for seed in range(2 * N_SIM):
            delta = mu + noise(kind, rng, (40, len(mu)))
            found.append(A.effective_heads(delta, DRAWS, seed))
    value, low, high = np.array(found).T
    is_told = np.isfinite(value)
    hits = (low[is_told] <= n_equal) & (n_equal <= high[is_told])
    record(
        "interval of effective_heads",
        f"{n_equal} equal heads of {len(mu)}, n = 40",
        coverage=hits.mean(),
        told=is_told.mean(),
        median=np.nanmedian(value),
    )
    assert at_least(hits, 0.92)
    if n_equal > 1:  # else noise hides it in many samples
        assert is_told.mean() > 0.9 and abs(np.nanmedian(value) / n_equal - 1) < 0.1


# ------------------------------------------------------------------------------------ every head
@pytest.mark.parametrize("kind", ["normal", "left", "t3", "ties"])
@pytest.mark.parametrize("n", [32, 200])
def test_without_an_effect_errors_are_as_rare_as_promised(kind: str, n: int) -> None:
    found = simulate("null", kind, n)
    p = columns(found, "p_maxT").min(1)
    q = columns(found, "q_bh").min(1)
    inside = (columns(found, "ci_lo") <= 0) & (columns(found, "ci_hi") >= 0)
    all_inside = ((columns(found, "ci_all_lo") <= 0) & (columns(found, "ci_all_hi") >= 0)).all(1)
    unique = summaries(found)["unique_hero"].to_numpy(bool)
    figures = {
        "any p_maxT < .05": (p < 0.05).mean(),
        "any q_bh < .05": (q < 0.05).mean(),
        "coverage of ci": inside.mean(),
        "all ci_all": all_inside.mean(),
        "unique hero": unique.mean(),
    }
    record("null", f"{kind}, n = {n}", **figures)
    assert at_most(p < 0.05, 0.05) and at_most(q < 0.05, 0.05) and at_most(unique, 0.05)
    assert at_least(inside.ravel(), 0.95 if kind == "normal" else 0.93)
    assert at_least(all_inside, 0.95)
    # Never smaller than a uniform p value, and near one where nothing is special
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3
    if (kind, n) == ("normal", 200):
        assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [32, 100])
def test_min_detectable_is_detected_in_80_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    detected = []
    for seed in range(2 * N_SIM):
        delta = rng.normal(size=(n, HEADS))
        smallest = A.head_statistics(delta, DRAWS, seed).summary["min_detectable"]
        again = rng.normal(size=(n, HEADS))
        again[:, 5] += smallest
        detected.append(A.head_statistics(again, DRAWS, seed).columns["p_maxT"][5] < 0.05)
    power = np.array(detected)
    record("power at min_detectable", f"normal, n = {n}", power=power.mean())
    assert at_least(power, 0.78) and at_most(power, 0.85)


@pytest.mark.parametrize("n", [2, 8, 16, 31])
def test_with_few_units_nothing_uncertain_is_printed(n: int) -> None:
    delta = np.random.default_rng(n).normal(size=(n, HEADS)) * 1e-3 + IMPACTS["clear"]
    found = A.head_statistics(delta, DRAWS, 0)
    assert not found.summary["unique_hero"] and found.hero == 0
    assert found.columns["impact"] == pytest.approx(delta.mean(0))
    assert set(found.columns) == set(enough_units().columns)
    assert set(found.summary) == set(enough_units().summary)
    empty = {name for name, values in found.columns.items() if np.isnan(values).all()}
    assert empty == {"se", "ci_lo", "ci_hi", "ci_all_lo", "ci_all_hi", "p_maxT", "q_bh", "p_top1"}
    assert not any(np.isfinite(found.summary[name]) for name in A.UNCERTAIN_SUMMARY)


def enough_units() -> A.HeadStatistics:
    rng = np.random.default_rng(0)
    return A.head_statistics(rng.normal(size=(40, HEADS)) + IMPACTS["clear"], DRAWS, 0)


# ------------------------------------------------------------------------- documents as the units
# Sequences of each of 35 documents, as 48 windows of the demo's validation split spread over it
SIZES = np.array([9, 3, 2, 2, 2, 2, *[1] * 28])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sequences_of_one_document_are_one_unit(share: float) -> None:
    """`share`: of the variance, that of the document."""
    rng = np.random.default_rng(int(10 * share))
    documents = np.repeat(np.arange(len(SIZES)) * 3 + 1, SIZES)  # [sequences]
    inside = []
    crossfits = []
    for seed in range(4 * N_SIM):
        of_document = rng.normal(size=(len(SIZES), HEADS))[np.repeat(np.arange(len(SIZES)), SIZES)]
        of_sequence = rng.normal(size=of_document.shape)
        values = np.sqrt(share) * of_document + np.sqrt(1 - share) * of_sequence
        delta = A.units(values, documents)
        low, high = A.interval(delta, A.bootstrap_units(delta, DRAWS, seed).t)
        inside.append((low <= 0) & (high >= 0))
        crossfits.append(A.cross_fit(delta, seed, halvings=10).mean())
    hits = np.concatenate(inside)
    record("interval of a head", f"{share:.0%} of variance of documents", coverage=hits.mean())
    assert at_least(hits.ravel(), 0.92)
    # No unit's value knows the others: without an effect the chosen head has none
    bias = np.mean(crossfits)
    assert abs(bias) < 3.3 * stats.sem(crossfits)

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
    # lognormal, skewness 6.2
    if kind == "tails":
        mean = np.exp(0.5)
        variance = (np.e - 1) * np.e
        return (rng.lognormal(size=shape) - mean) / np.sqrt(variance)
    # skewness -2
    if kind == "left":
        return 1 - rng.exponential(size=shape)
    # infinite kurtosis
    if kind == "t3":
        return rng.standard_t(3, size=shape) / np.sqrt(3)
    # four in five are exactly 0
    assert kind == "ties"
    values = rng.normal(size=shape)
    is_kept = rng.random(shape) < 0.2
    return values * is_kept


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
    true_impacts = []
    for _ in range(3000):
        half = mu + noise(kind, rng, (n // 2, HEADS))
        leader = half.mean(0).argmax()
        true_impacts.append(mu[leader])
    return np.mean(true_impacts)


def at_least(hits: np.ndarray, share: float) -> bool:
    """Whether so few hits may still be chance where each is one with at least that probability."""
    so_few = stats.binom.cdf(np.sum(hits), len(hits), share)
    return bool(so_few > 1e-3)


def at_most(hits: np.ndarray, share: float) -> bool:
    """Whether so many hits may still be chance where each is one with at most that probability."""
    so_many = stats.binom.sf(np.sum(hits) - 1, len(hits), share)
    return bool(so_many > 1e-3)


def inside(low: np.ndarray, high: np.ndarray, truth: float | np.ndarray) -> np.ndarray:
    """Whether each interval holds the truth."""
    return (low <= truth) & (truth <= high)


def held(table: pd.DataFrame, name: str, truth: float | np.ndarray) -> np.ndarray:
    """Whether each interval of a summary holds the truth."""
    low = table[f"{name}_lo"].to_numpy()
    high = table[f"{name}_hi"].to_numpy()
    return inside(low, high, truth)


# ------------------------------------------------------------------------------- the chosen head
def intervals_of_the_first_head(
    impacts: str, kind: str, n: int, found: list[A.HeadStatistics]
) -> dict[str, np.ndarray]:
    """By name of the interval: whether that of each simulation holds the truth."""
    table = summaries(found)
    mu = IMPACTS[impacts]
    chosen = expected_impact_of_the_chosen(impacts, kind, n)
    effective = mu.sum() ** 2 / np.square(mu).sum()
    return {
        "crossfit": held(table, "crossfit", chosen),
        "difference": differences_hold(found),
        "gap": held(table, "gap", leads(found, mu)),
        "effective": held(table, "effective_heads", effective),
    }


def differences_hold(found: list[A.HeadStatistics]) -> np.ndarray:
    """Two simulations are two models on the same units, of one expected impact."""
    args = SimpleNamespace(bootstrap=DRAWS, seed=0)
    rows = []
    for one, two in zip(found[::2], found[1::2], strict=True):
        rows.append(A.best_minus_best(one.crossfit, two.crossfit, args))
    return held(pd.DataFrame(rows), "difference", 0)


def leads(found: list[A.HeadStatistics], mu: np.ndarray) -> np.ndarray:
    """By how much the head that each simulation puts first is truly ahead."""
    ahead = []
    for one in found:
        others = np.delete(mu, one.hero)
        ahead.append(mu[one.hero] - others.max())
    return np.array(ahead)


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
    """A low cell of the short run is noise: .90 for effective heads at n = 200 (clear,
    normal) is .95 in 600 simulations, where the four intervals cover .95 to .99, tied ones too."""
    every = {"crossfit": [], "difference": [], "gap": [], "effective": []}
    unique = []
    for n in (32, 48, 200):
        found = simulate(impacts, kind, n)
        setting = f"{impacts}, {kind}, n = {n}"
        hits_by_name = intervals_of_the_first_head(impacts, kind, n, found)
        for name, hits in hits_by_name.items():
            every[name].append(hits)
            record(f"interval of {name}", setting, coverage=hits.mean())
        is_unique = summaries(found)["unique_hero"].to_numpy(bool)
        unique.append(is_unique)
        record("unique hero", setting, share=is_unique.mean())

    coverage = {name: np.concatenate(hits) for name, hits in every.items()}
    # METRICS.md says so
    lowest = 0.9 if kind == "left" else 0.92
    for name, hits in coverage.items():
        assert at_least(hits, lowest), (name, hits.mean())
    # The jackknife is wide where heads are tied, and logarithms are where noise is large
    assert at_most(coverage["crossfit"], 0.98)
    if impacts == "tied":
        assert at_most(np.concatenate(unique), 0.05)
    # A head that is clearly ahead is found
    elif kind == "normal":
        assert unique[0].mean() > 0.5
        assert unique[-1].all()


@pytest.mark.parametrize("kind", ["normal", "tails"])
def test_two_tied_heads_where_one_document_has_a_fifth_of_the_sequences(kind: str) -> None:
    """3 to 6 % in 600 simulations each of 32 and 48 documents."""
    rng = np.random.default_rng(len(kind))
    documents = np.concatenate((np.zeros(12, dtype=int), np.arange(1, 48)))
    is_unique = []
    for seed in range(3 * N_SIM):
        of_document = noise(kind, rng, (48, HEADS))
        own = noise(kind, rng, (len(documents), HEADS))
        delta = IMPACTS["tied"] + (of_document[documents] + own) / np.sqrt(2)
        found = A.head_statistics(A.units(delta, documents), DRAWS, seed)
        is_unique.append(found.summary["unique_hero"])
    setting = f"tied, {kind}, n = 48, one of them with a fifth"
    record("unique hero", setting, share=np.mean(is_unique))
    assert at_most(np.array(is_unique), 0.05)


@pytest.mark.parametrize("n_equal", [1, 6, HEADS])
def test_effective_heads_count_equal_heads_of_many(n_equal: int) -> None:
    rng = np.random.default_rng(n_equal)
    n_heads = 3 * HEADS
    mu = np.where(np.arange(n_heads) < n_equal, 0.8, 0)
    found = []
    for kind in ("normal", "tails"):
        for seed in range(2 * N_SIM):
            delta = mu + noise(kind, rng, (40, n_heads))
            found.append(A.effective_heads(delta, DRAWS, seed))
    value, low, high = np.array(found).T  # [simulations] each
    is_told = np.isfinite(value)
    hits = inside(low[is_told], high[is_told], n_equal)
    median = np.nanmedian(value)
    record(
        "interval of effective_heads",
        f"{n_equal} equal heads of {n_heads}, n = 40",
        coverage=hits.mean(),
        told=is_told.mean(),
        median=median,
    )
    assert at_least(hits, 0.92)
    # One head alone is hidden by noise in many samples
    if n_equal > 1:
        assert is_told.mean() > 0.9
        assert abs(median / n_equal - 1) < 0.1


# ------------------------------------------------------------------------------------ every head
@pytest.mark.parametrize("kind", ["normal", "left", "t3", "ties"])
@pytest.mark.parametrize("n", [32, 200])
def test_without_an_effect_errors_are_as_rare_as_promised(kind: str, n: int) -> None:
    found = simulate("null", kind, n)
    # The smallest of all heads, [simulations]
    p = columns(found, "p_maxT").min(1)
    q = columns(found, "q_bh").min(1)
    # Each head's own interval, and those of all heads at once
    own = inside(columns(found, "ci_lo"), columns(found, "ci_hi"), 0)
    together = inside(columns(found, "ci_all_lo"), columns(found, "ci_all_hi"), 0)
    all_inside = together.all(1)
    unique = summaries(found)["unique_hero"].to_numpy(bool)
    figures = {
        "any p_maxT < .05": (p < 0.05).mean(),
        "any q_bh < .05": (q < 0.05).mean(),
        "coverage of ci": own.mean(),
        "all ci_all": all_inside.mean(),
        "unique hero": unique.mean(),
    }
    record("null", f"{kind}, n = {n}", **figures)
    for error in (p < 0.05, q < 0.05, unique):
        assert at_most(error, 0.05)
    lowest = 0.95 if kind == "normal" else 0.93
    assert at_least(own.ravel(), lowest)
    assert at_least(all_inside, 0.95)
    # Never smaller than a uniform p value, and near one where nothing is special
    smaller = stats.kstest(p, "uniform", alternative="greater")
    assert smaller.pvalue > 1e-3
    if (kind, n) == ("normal", 200):
        either = stats.kstest(p, "uniform")
        assert either.pvalue > 1e-3


@pytest.mark.parametrize("n", [32, 100])
def test_min_detectable_is_detected_in_80_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    detected = []
    for seed in range(2 * N_SIM):
        delta = rng.normal(size=(n, HEADS))
        first = A.head_statistics(delta, DRAWS, seed)
        # The same experiment again, with an effect of that size in one head
        again = rng.normal(size=(n, HEADS))
        again[:, 5] += first.summary["min_detectable"]
        second = A.head_statistics(again, DRAWS, seed)
        detected.append(second.columns["p_maxT"][5] < 0.05)
    power = np.array(detected)
    record("power at min_detectable", f"normal, n = {n}", power=power.mean())
    assert at_least(power, 0.78)
    assert at_most(power, 0.85)


@pytest.mark.parametrize("n", [2, 8, 16, 31])
def test_with_few_units_nothing_uncertain_is_printed(n: int) -> None:
    rng = np.random.default_rng(n)
    delta = rng.normal(size=(n, HEADS)) * 1e-3 + IMPACTS["clear"]
    found = A.head_statistics(delta, DRAWS, 0)
    assert found.hero == 0
    assert not found.summary["unique_hero"]
    assert found.columns["impact"] == pytest.approx(delta.mean(0))
    # All columns are there, and those that say how uncertain something is are empty
    enough = enough_units()
    assert set(found.columns) == set(enough.columns)
    assert set(found.summary) == set(enough.summary)
    empty = {name for name, values in found.columns.items() if np.isnan(values).all()}
    intervals = {"ci_lo", "ci_hi", "ci_all_lo", "ci_all_hi"}
    assert empty == intervals | {"se", "p_maxT", "q_bh", "p_top1"}
    for name in A.UNCERTAIN_SUMMARY:
        assert not np.isfinite(found.summary[name])


def enough_units() -> A.HeadStatistics:
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(40, HEADS)) + IMPACTS["clear"]
    return A.head_statistics(delta, DRAWS, 0)


# ------------------------------------------------------------------------- documents as the units
# Sequences of each of 35 documents, as 48 windows of the demo's validation split spread over it
SIZES = np.array([9, 3, 2, 2, 2, 2, *[1] * 28])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sequences_of_one_document_are_one_unit(share: float) -> None:
    """`share`: of the variance, that of the document."""
    rng = np.random.default_rng(int(10 * share))
    number = np.repeat(np.arange(len(SIZES)), SIZES)  # [sequences]
    documents = 3 * number + 1
    covered = []
    crossfits = []
    for seed in range(4 * N_SIM):
        of_document = rng.normal(size=(len(SIZES), HEADS))[number]  # [sequences, heads]
        of_sequence = rng.normal(size=of_document.shape)
        values = np.sqrt(share) * of_document + np.sqrt(1 - share) * of_sequence
        delta = A.units(values, documents)  # [documents, heads]
        bootstrap = A.bootstrap_units(delta, DRAWS, seed)
        low, high = A.interval(delta, bootstrap.t)
        covered.append(inside(low, high, 0))
        crossfit = A.cross_fit(delta, seed, halvings=10)
        crossfits.append(crossfit.mean())
    hits = np.concatenate(covered)
    record("interval of a head", f"{share:.0%} of variance of documents", coverage=hits.mean())
    assert at_least(hits, 0.92)
    # No unit's value knows the others: without an effect the chosen head has none
    bias = np.mean(crossfits)
    assert abs(bias) < 3.3 * stats.sem(crossfits)

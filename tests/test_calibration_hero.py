"""The intervals of hero_head_analysis.py on simulated documents, where the answer is known.

Each true coverage must lie in [.92, .98] (nominal .95); a test fails where the measured one is three
binomial standard errors outside. Ratios to what may be zero, and corrections for several intervals,
may cover more. See tests/calibration.py for the longer version.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from calibration import LONGER, record

import hero_head_analysis as hero

N_SIM = 300 * LONGER


@dataclass
class Sample:
    """What is measured on the windows of a text, and the ratio of their expectations."""

    numerator: np.ndarray  # [windows]
    denominator: np.ndarray  # [windows]
    documents: np.ndarray  # [windows]
    truth: float


def as_text(documents: np.ndarray) -> hero.Text:
    idx = torch.zeros(len(documents), 2, dtype=torch.long)
    return hero.Text(idx, lambda ids: list(map(str, ids)), "validation", documents)


def standard_error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)


def coverage_of(draw: Callable[[np.random.Generator, int], Sample], n: int, tests: int = 1) -> dict:
    """Share of simulations whose interval holds the truth, and whose interval has an open end."""
    rng = np.random.default_rng([n, tests])
    held = 0
    unbounded = 0
    for _ in range(N_SIM):
        sample = draw(rng, n)
        text = as_text(sample.documents)
        found = hero.interval(text, sample.numerator, sample.denominator, tests)
        held += found.ci_low <= sample.truth <= found.ci_high
        unbounded += not math.isfinite(found.ci_high - found.ci_low)
    return {"coverage": held / N_SIM, "unbounded": unbounded / N_SIM}


def mean_of(rng: np.random.Generator, n: int, kind: str) -> Sample:
    """One window a document."""
    draws = {
        "normal": (lambda: rng.normal(1, 1, n), 1.0),
        "exponential": (lambda: rng.exponential(1, n), 1.0),
        "lognormal": (lambda: rng.lognormal(0, 1, n), math.exp(0.5)),
        "t3": (lambda: rng.standard_t(3, n), 0.0),
        "ties": (lambda: rng.binomial(3, 0.3, n) / 3, 0.3),
    }
    make, truth = draws[kind]
    return Sample(make(), np.ones(n), np.arange(n), truth)


def clusters(rng: np.random.Generator, n: int) -> Sample:
    """1 to 6 windows a document, of which the document explains half of the variance."""
    documents = np.repeat(np.arange(n), rng.integers(1, 7, size=n))
    of_document = rng.normal(size=n)[documents]
    return Sample(of_document + rng.normal(size=len(documents)), 1.0, documents, 0.0)


def share(rng: np.random.Generator, n: int, kind: str) -> Sample:
    """.7 of an impact is kept, more or less by document."""
    impacts = {
        "clear": lambda: rng.normal(1, 1, n),
        "heavy tails": lambda: rng.lognormal(0, 1, n),
        "near zero": lambda: rng.normal(1 / math.sqrt(n), 1, n),  # one standard error from it
    }
    impact = impacts[kind]()
    kept = 0.7 * impact + rng.normal(0, 0.5, n)
    return Sample(kept, impact, np.arange(n), 0.7)


def check(statistic: str, setting: str, found: dict) -> None:
    """Coverage of at least .92 of one interval, as far as so many simulations can tell."""
    record(statistic, setting, **found, simulations=N_SIM)
    assert found["coverage"] >= 0.92 - 3 * standard_error(0.92, N_SIM), (setting, found)


def check_exact(statistic: str, setting: str, found: dict) -> None:
    check(statistic, setting, found)
    assert found["coverage"] <= 0.98 + 3 * standard_error(0.98, N_SIM), (setting, found)


# --------------------------------------------------------------- one interval: impact, scores, parts
@pytest.mark.parametrize("n", [16, 48, 200])
@pytest.mark.parametrize("kind", ["normal", "exponential", "lognormal", "t3", "ties"])
def test_a_mean_over_documents(kind: str, n: int):
    found = coverage_of(functools.partial(mean_of, kind=kind), n)
    check_exact("hero: mean over documents", f"{kind}, {n} documents", found)


@pytest.mark.parametrize("n", [16, 48])
def test_a_mean_over_windows_of_unlike_documents(n: int):
    found = coverage_of(clusters, n)
    check_exact("hero: mean over documents", f"1 to 6 windows each, {n} documents", found)


@pytest.mark.parametrize("n", [16, 48, 200])
@pytest.mark.parametrize("kind", ["clear", "heavy tails"])
def test_a_share_of_the_impact(kind: str, n: int):
    found = coverage_of(functools.partial(share, kind=kind), n)
    check_exact("hero: share of the impact", f"{kind}, {n} documents", found)


@pytest.mark.parametrize("n", [16, 48])
def test_an_effect_in_few_documents(n: int):
    """One document in five has any effect. Where too few of them are in the sample its interval is
    open, else it would cover .85 of the time at 16 documents."""

    def draw(rng: np.random.Generator, n: int) -> Sample:
        effect = rng.exponential(1, n)
        has_one = rng.random(n) < 0.2
        return Sample(effect * has_one, 1.0, np.arange(n), 0.2)

    check("hero: an effect in few documents", f"{n} documents", coverage_of(draw, n))


@pytest.mark.parametrize("n", [16, 48, 200])
def test_a_share_of_an_impact_that_may_be_zero_is_left_open(n: int):
    """Its interval must hold the truth, and mostly say that it knows nothing."""
    found = coverage_of(functools.partial(share, kind="near zero"), n)
    check("hero: share of the impact", f"impact of one standard error, {n} documents", found)
    assert found["unbounded"] > 0.5


def test_with_fewer_documents_than_were_calibrated_there_is_no_interval():
    for n in (2, 8, 15):
        sample = mean_of(np.random.default_rng(n), n, "normal")
        found = hero.interval(as_text(sample.documents), sample.numerator)
        assert math.isnan(found.ci_low) and math.isnan(found.ci_high)


# --------------------------------------------------------- several at once: tables of scores, features
def several(rng: np.random.Generator, n: int, kind: str, n_tests: int = 9) -> np.ndarray:
    """Scores [n_tests, n] of the same documents, correlated by .5; their mean is 0."""
    common = rng.normal(size=n)
    own = rng.normal(size=(n_tests, n))
    scores = math.sqrt(0.5) * common + math.sqrt(0.5) * own
    if kind == "skewed":  # chi-squared of four degrees of freedom, skewness 1.4
        others = rng.normal(size=(3, n_tests, n))
        scores = scores**2 + np.square(others).sum(0) - 4
    return scores


@pytest.mark.parametrize(("kind", "n"), [("normal", 16), ("normal", 48), ("skewed", 48)])
def test_intervals_of_a_table_are_simultaneous(kind: str, n: int):
    rng = np.random.default_rng(n)
    text = as_text(np.arange(n))
    n_sim = N_SIM // 3
    all_held = 0
    for _ in range(n_sim):
        scores = several(rng, n, kind)
        found = [hero.interval(text, score, tests=len(scores)) for score in scores]
        all_held += all(one.ci_low <= 0 <= one.ci_high for one in found)
    coverage = all_held / n_sim
    record("hero: nine intervals at once", f"{kind}, {n} documents", coverage=coverage)
    assert coverage >= 0.92 - 3 * standard_error(0.92, n_sim)


# ----------------------------------------------------------------------- a score beside its null
def told_from_null(effect: float, n_sim: int) -> float:
    """How often any of nine scores of 48 documents is told from its null, as score_table does."""
    rng = np.random.default_rng(0)
    text = as_text(np.arange(48))
    told = 0
    for _ in range(n_sim):
        difference = several(rng, 48, "normal") - several(rng, 48, "normal")
        difference[0] += effect
        found = [hero.interval(text, one, tests=9) for one in difference]
        told += any(one.ci_low > 0 or one.ci_high < 0 for one in found)
    return told / n_sim


def test_scores_are_told_from_their_null_rarely_by_chance_and_often_by_an_effect():
    n_sim = N_SIM // 3
    false = told_from_null(0.0, n_sim)
    power = told_from_null(1.0, n_sim)  # .7 standard deviations of the difference
    record("hero: score against its null", "48 documents, 9 scores", false=false, power=power)
    assert false <= 0.08 + 3 * standard_error(0.08, n_sim)
    assert power >= 0.9 - 3 * standard_error(0.9, n_sim)


# ------------------------------------------------------------------------ the worst 1 % of tokens
def heavy_delta(rng: np.random.Generator, n: int, n_tokens: int = 60) -> np.ndarray:
    """Loss increases of tokens [n, n_tokens]: most gain a little, few lose much; some documents have
    more of those."""
    size = rng.gamma(4, 1 / 4, size=(n, 1))
    return size * rng.exponential(1, size=(n, n_tokens)) ** 2 - 1.5


@pytest.mark.parametrize("n", [48, 200])
def test_the_share_on_the_worst_tokens(n: int):
    everything = np.sort(heavy_delta(np.random.default_rng(99), 100_000).ravel())
    truth = everything[-len(everything) // 100 :].sum() / everything.sum()
    rng = np.random.default_rng(n)
    text = as_text(np.arange(n))
    held = 0
    for _ in range(N_SIM):
        row = hero.share_on_worst(text, heavy_delta(rng, n))
        held += row["on_top_low"] <= truth <= row["on_top_high"]
    check("hero: share on the worst 1 % of tokens", f"{n} documents", {"coverage": held / N_SIM})


# ---------------------------------------------------------------------------- correlations over heads
def planted_heads(rng: np.random.Generator, n: int, write: float, first: float) -> tuple:
    """Rows of head_types.csv and of phase 4 for n heads, of which the sizes of impact, norm and
    attention have normal ranks: Pearson `write` and -`first` with the impact's."""
    chosen = write * first  # no correlation but that through the impact
    correlation = [[1, write, -first], [write, 1, -chosen], [-first, -chosen, 1]]
    impact, norm, attention = rng.multivariate_normal(np.zeros(3), correlation, n).T
    types = []
    ranked = []
    for head in range(n):
        place = dict(run="adaptive", layer=0, head=head)
        types.append(place | dict(score="write_norm", value=math.exp(norm[head])))
        types.append(place | dict(score="first position", value=math.exp(attention[head])))
        ranked.append(place | dict(delta=rng.choice([-1, 1]) * math.exp(impact[head])))
    return types, pd.DataFrame(ranked)


@pytest.mark.parametrize(
    ("n", "write", "first"),
    [(16, 0.6, 0.1), (36, 0.0, 0.0), (36, 0.85, 0.6), (72, 0.7, 0.7)],
)
def test_rank_correlations_over_heads(n: int, write: float, first: float):
    """Both correlations and their difference, of which the truth is known: Spearman's is
    6 / pi asin(r / 2) where ranks are normal."""
    n_sim = 80 * LONGER
    rng = np.random.default_rng(n)
    truth = 6 / math.pi * np.arcsin(np.array([write, first]) / 2)
    truth = np.append(truth, truth[0] - truth[1])
    held = np.zeros(3)
    told = 0
    for _ in range(n_sim):
        rows = hero.scores_of_inactivity(*planted_heads(rng, n, write, first))
        found = pd.DataFrame(rows)
        held += (found["ci_low"] <= truth) & (truth <= found["ci_high"])
        told += found["ci_low"][2] > 0 or found["ci_high"][2] < 0
    coverage = held / n_sim
    for name, share in zip(("write_norm", "first position", "difference"), coverage, strict=True):
        setting = f"{n} heads, r {write} and {first}"
        record("hero: Spearman over heads", f"{setting}: {name}", coverage=share, n_sim=n_sim)
        assert share >= 0.92 - 3 * standard_error(0.92, n_sim), name
        assert share <= min(1, 0.98 + 3 * standard_error(0.98, n_sim)), name
    record("hero: Spearman over heads", f"{n} heads, r {write} and {first}", told=told / n_sim)
    if write == first:
        assert told / n_sim <= 0.08 + 3 * standard_error(0.08, n_sim)

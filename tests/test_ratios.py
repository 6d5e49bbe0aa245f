"""The interval of a ratio of sums, which three scripts share: against textbooks, and one another."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq

import energy_lens_minimal as lens
import hero_head_analysis as hero
import train_sae as ts


def of_hero(top: np.ndarray, bottom: np.ndarray) -> hero.Ratio:
    """As phase 5 has it, of one window a document."""
    idx = torch.zeros(len(top), 2, dtype=torch.long)
    text = hero.Text(idx, str, "validation", np.arange(len(top)))
    found = hero.interval(text, top, bottom)
    return hero.Ratio(found.value, found.ci_low, found.ci_high)


def of_sae(top: np.ndarray, bottom: np.ndarray) -> hero.Ratio:
    """As phase 3 has it, of one window a document."""
    documents = np.arange(len(top))
    found = ts.ratio_interval("m", top, bottom, documents)
    return hero.Ratio(found["m"], found["m_lo"], found["m_hi"])


def of_energy(top: np.ndarray, bottom: np.ndarray) -> hero.Ratio:
    """As Energy-Lens has it, of a group each."""
    found = lens.bootstrap_ratio(pd.Series(top), pd.Series(bottom))
    return hero.Ratio(found.mean, found.lo, found.hi)


WAYS = {"hero": of_hero, "sae": of_sae, "energy": of_energy}


@pytest.mark.parametrize("n", [16, 40, 300])
def test_three_scripts_give_one_interval(n: int) -> None:
    rng = np.random.default_rng(n)
    bottom = rng.uniform(1, 3, n)
    top = bottom * rng.lognormal(size=n)
    found = of_hero(top, bottom)
    assert of_sae(top, bottom) == found
    assert of_energy(top, bottom) == found


@pytest.mark.parametrize("way", WAYS)
def test_an_interval_of_a_mean_is_never_shorter_than_students(way: str) -> None:
    """Which heavy tails on both sides need: the bootstrap alone is too short there."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = rng.standard_t(3, 20)
        student = stats.ttest_1samp(values, 0).confidence_interval()
        found = WAYS[way](values, np.ones(20))
        assert found.value == pytest.approx(values.mean())
        assert found.low <= student.low + 1e-9
        assert found.high >= student.high - 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_an_interval_of_a_ratio_holds_all_of_students_fieller(way: str) -> None:
    """Fieller's ends by root finding: there top - r bottom has a mean of t standard errors."""
    rng = np.random.default_rng(3)
    bottom = rng.gamma(4, size=30)
    top = 0.7 * bottom + rng.normal(size=30)

    def t_of(r: float) -> float:
        difference = top - r * bottom
        return stats.ttest_1samp(difference, 0).statistic

    critical = stats.t.ppf(0.975, 29)
    lower = brentq(lambda r: t_of(r) - critical, -5, 5)
    upper = brentq(lambda r: t_of(r) + critical, -5, 5)
    found = WAYS[way](top, bottom)
    assert found.low <= lower + 1e-9
    assert found.high >= upper - 1e-9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_where_few_units_differ_nothing_is_said_of_the_largest(way: str, scale: float) -> None:
    """3 of 20 documents have an effect: 4 resamples in 100 have none of them, so that their t is
    infinite, and not a large number that rounding makes."""
    values = np.full(20, 0.1)
    values[:3] = [0.7, 1.3, 0.9]
    found = WAYS[way](scale * values, np.ones(20))
    assert found.value == pytest.approx(scale * values.mean())
    # SAEs have closed intervals only
    if way == "sae":
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    else:
        assert 0 < found.low < found.value
        assert found.high == math.inf


@pytest.mark.parametrize("way", WAYS)
def test_units_that_are_all_alike_leave_nothing_open(way: str) -> None:
    rng = np.random.default_rng(0)
    bottom = rng.uniform(1, 3, 24)
    for ratio in (0.0, 0.1, -1 / 3):
        found = WAYS[way](ratio * bottom, bottom)
        assert found.value == pytest.approx(ratio)
        assert found.low == found.value
        assert found.high == found.value


@pytest.mark.parametrize("way", WAYS)
def test_the_sign_of_both_sums_does_not_matter(way: str) -> None:
    rng = np.random.default_rng(1)
    bottom = rng.uniform(1, 3, 24)
    top = rng.normal(1, 1, 24)
    found = WAYS[way](top, bottom)
    negative = WAYS[way](-top, -bottom)
    assert negative.value == pytest.approx(found.value)
    assert negative.low == pytest.approx(found.low)
    assert negative.high == pytest.approx(found.high)


def test_very_many_units_get_fewer_resamples() -> None:
    few = hero.resamples(500)
    many = hero.resamples(8000)
    assert few.shape == (10_000, 500)
    assert many.shape == (1048, 8000)
    assert (few.sum(1) == 500).all()
    assert (many.sum(1) == 8000).all()
    # A unit is drawn a binomial number of times: mean 1, variance 1 - 1 / n
    assert few.var() == pytest.approx(1 - 1 / 500, rel=0.01)

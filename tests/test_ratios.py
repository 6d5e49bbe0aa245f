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


def of_hero(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float, float]:
    """As phase 5 has it, of one window a document."""
    idx = torch.zeros(len(top), 2, dtype=torch.long)
    text = hero.Text(idx, str, "validation", np.arange(len(top)))
    found = hero.interval(text, top, bottom)
    return found.value, found.ci_low, found.ci_high


def of_sae(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float, float]:
    """As phase 3 has it, of one window a document."""
    found = ts.ratio_interval("m", top, bottom, np.arange(len(top)))
    return found["m"], found["m_lo"], found["m_hi"]


def of_energy(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float, float]:
    return lens.bootstrap_ratio(pd.Series(top), pd.Series(bottom))


WAYS = {"hero": of_hero, "sae": of_sae, "energy": of_energy}


@pytest.mark.parametrize("n", [16, 40, 300])
def test_three_scripts_give_one_interval(n: int) -> None:
    rng = np.random.default_rng(n)
    bottom = rng.uniform(1, 3, n)
    top = bottom * rng.lognormal(size=n)
    assert of_sae(top, bottom) == of_hero(top, bottom) == of_energy(top, bottom)


@pytest.mark.parametrize("way", WAYS)
def test_an_interval_of_a_mean_is_never_shorter_than_students(way: str) -> None:
    """Which heavy tails on both sides need: the bootstrap alone is too short there."""
    for seed in range(20):
        values = np.random.default_rng(seed).standard_t(3, 20)
        student = stats.ttest_1samp(values, 0).confidence_interval()
        value, low, high = WAYS[way](values, np.ones(20))
        assert value == pytest.approx(values.mean())
        assert low <= student.low + 1e-9 and high >= student.high - 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_an_interval_of_a_ratio_holds_all_of_students_fieller(way: str) -> None:
    """Fieller's ends by root finding: there top - r bottom has a mean of t standard errors."""
    rng = np.random.default_rng(3)
    bottom = rng.gamma(4, size=30)
    top = 0.7 * bottom + rng.normal(size=30)

    def t_of(r: float) -> float:
        return stats.ttest_1samp(top - r * bottom, 0).statistic

    critical = stats.t.ppf(0.975, 29)
    _, low, high = WAYS[way](top, bottom)
    assert low <= brentq(lambda r: t_of(r) - critical, -5, 5) + 1e-9
    assert high >= brentq(lambda r: t_of(r) + critical, -5, 5) - 1e-9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_where_few_units_differ_nothing_is_said_of_the_largest(way: str, scale: float) -> None:
    """3 of 20 documents have an effect: 4 resamples in 100 have none of them, so that their t is
    infinite, and not a large number that rounding makes."""
    values = np.full(20, 0.1)
    values[:3] = [0.7, 1.3, 0.9]
    value, low, high = WAYS[way](scale * values, np.ones(20))
    assert value == pytest.approx(scale * values.mean())
    if way == "sae":  # which prints closed intervals only
        assert math.isnan(low) and math.isnan(high)
    else:
        assert 0 < low < value and high == math.inf


@pytest.mark.parametrize("way", WAYS)
def test_units_that_are_all_alike_leave_nothing_open(way: str) -> None:
    rng = np.random.default_rng(0)
    bottom = rng.uniform(1, 3, 24)
    for ratio in (0.0, 0.1, -1 / 3):
        value, low, high = WAYS[way](ratio * bottom, bottom)
        assert value == low == high == pytest.approx(ratio)


@pytest.mark.parametrize("way", WAYS)
def test_the_sign_of_both_sums_does_not_matter(way: str) -> None:
    rng = np.random.default_rng(1)
    bottom = rng.uniform(1, 3, 24)
    top = rng.normal(1, 1, 24)
    assert WAYS[way](-top, -bottom) == pytest.approx(WAYS[way](top, bottom))


def test_very_many_units_get_fewer_resamples() -> None:
    few = hero.resamples(500)
    many = hero.resamples(8000)
    assert few.shape == (10_000, 500) and many.shape == (1048, 8000)
    assert (few.sum(1) == 500).all() and (many.sum(1) == 8000).all()
    # A unit is drawn a binomial number of times: mean 1, variance 1 - 1 / n
    assert few.var() == pytest.approx(1 - 1 / 500, rel=0.01)

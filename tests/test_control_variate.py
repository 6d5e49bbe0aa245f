"""The control variate of ablation_test.py: the slope against scipy, the estimate against a split
that is known in full, and the arrays against the exact pass (--plain: test_ablation.py)."""

import numpy as np
import pytest
from calibration import LONGER, record
from scipy import stats
from test_ablation import ARGS, EXACT, random_model, text

import ablation_test as A


# ------------------------------------------------------------------------------------ the estimate
def test_the_slope_of_a_sequence_is_that_of_the_other_documents() -> None:
    rng = np.random.default_rng(0)
    documents = np.array([4, 4, 7, 9, 9, 9, 12, 13, 15, 16, 17, 18])
    x = rng.normal(size=(12, 3)) + 5
    y = np.array([2.0, -1.0, 0.0]) * x + rng.normal(size=x.shape)
    slopes = A.slope_of_others(x, y, documents)
    for sequence in range(12):
        others = documents != documents[sequence]
        for head in range(3):
            fit = stats.linregress(x[others, head], y[others, head])
            f = fit.rvalue**2 * (others.sum() - 2) / (1 - fit.rvalue**2)
            expected = fit.slope * max(0, 1 - 1 / f)
            np.testing.assert_allclose(slopes[sequence, head], expected, atol=1e-9)
    assert (A.slope_of_others(np.ones((12, 1)), y[:, :1], documents) == 0).all()


def split_of(rng: np.random.Generator, n: int, rho: np.ndarray, kind: str) -> tuple:
    """Exact and linear effects [n, R] of every window of a split, correlated by rho [R]."""
    if kind == "tails":
        shared, own = rng.lognormal(size=(2, n, len(rho)))
    else:
        shared, own = rng.normal(size=(2, n, len(rho)))
    return rho * shared + np.sqrt(1 - rho**2) * own + 0.3, 0.5 * shared - 0.1


@pytest.mark.parametrize("kind", ["normal", "tails"])
def test_the_steadied_mean_is_that_of_the_split_and_its_interval_holds_it(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    rho = np.array([0.96, 0.8, 0.3, 0.0])
    exact, linear = split_of(rng, 600, rho, kind)
    truth = exact.mean(0)
    errors = []
    plain_errors = []
    held = []
    held_plain = []
    claimed = []
    for _ in range(400 * LONGER):
        some = rng.choice(600, size=48, replace=False)
        values = A.steady(exact[some], linear[some], linear.mean(0), some)
        errors.append(values.mean(0) - truth)
        plain_errors.append(exact[some].mean(0) - truth)
        se = A.standard_error(values)
        claimed.append(se)
        held.append(np.abs(errors[-1]) < stats.t.ppf(0.975, 47) * se)
        plain_se = A.standard_error(exact[some])
        held_plain.append(np.abs(plain_errors[-1]) < stats.t.ppf(0.975, 47) * plain_se)
    spread = np.std(errors, axis=0)  # [R]
    # No bias: the mean error is within its own noise
    assert (np.abs(np.mean(errors, axis=0)) < 3.5 * spread / np.sqrt(len(errors))).all()
    gain = np.var(plain_errors, axis=0) / spread**2
    for r, head_gain, coverage in zip(rho, gain, np.mean(held, axis=0), strict=True):
        figures = {"variance_ratio": head_gain, "coverage": coverage}
        record("control variate", f"{kind}, correlation {r}, 48 of 600", **figures)
    # Where nothing can be gained, the text itself chooses between two estimates: no less coverage
    assert np.mean(held, axis=0)[-1] > np.mean(held_plain, axis=0)[-1] - 0.015
    # More than half of what theory allows, as the slope has to be fitted; and where nothing can be
    # gained next to nothing is lost
    assert (gain > 0.5 / (1 - rho**2)).all() and gain[-1] > 1 / 1.1
    if kind == "normal":
        # A finite split of 600 leaves 48 a little less room for error than the interval allows for
        assert (np.mean(held, axis=0) > 0.92).all() and (np.mean(held, axis=0) < 0.98).all()
        np.testing.assert_allclose(np.mean(claimed, axis=0), spread, rtol=0.12)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_the_lead_of_a_steadied_head_over_a_plain_one_is_in_its_interval(alike: float) -> None:
    """Two heads, of whose effects a share `alike` is the same in each window. First-order effects
    know the first head and say nothing of the second, which so keeps its exact effects."""
    rng = np.random.default_rng(5)
    shared = np.sqrt(alike) * rng.normal(size=(600, 1))
    exact = shared + np.sqrt(1 - alike) * rng.normal(size=(600, 2)) + np.array([0.4, 0.3])
    linear = rng.normal(size=(600, 2))
    linear[:, 0] = exact[:, 0] + 0.2 * rng.normal(size=600)
    truth = exact[:, 0].mean() - exact[:, 1].mean()
    held = []
    held_plain = []
    n_plain = 0
    for _ in range(400 * LONGER):
        some = rng.choice(600, size=48, replace=False)
        values = A.steady(exact[some], linear[some], linear.mean(0), some)
        assert not np.array_equal(values[:, 0], exact[some, 0])
        n_plain += np.array_equal(values[:, 1], exact[some, 1])
        for one, hits in ((values, held), (exact[some], held_plain)):
            lead = one[:, 0] - one[:, 1]
            half_width = stats.t.ppf(0.975, 47) * A.standard_error(lead[:, None])[0]
            hits.append(abs(lead.mean() - truth) < half_width)
    figures = {"coverage": np.mean(held), "coverage_plain": np.mean(held_plain)}
    record("control variate", f"lead over a plain head, alike {alike:g}, 48 of 600", **figures)
    assert n_plain > len(held) / 2
    assert 0.92 < np.mean(held) < 0.98


def test_for_other_documents_the_interval_is_wider_and_holds_their_mean() -> None:
    """Documents of 20 windows, of which 48 evenly spaced ones are measured exactly; half of the
    variance is the documents'. The truth is the mean of all documents that could have been."""
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(60), 20)
    rho = np.array([0.95, 0.5])
    some = np.arange(48) * 1200 // 48
    held = {"split": [], "elsewhere": []}
    for _ in range(400 * LONGER):
        shared = (rng.normal(size=(60, 2))[documents] + rng.normal(size=(1200, 2))) / np.sqrt(2)
        own = (rng.normal(size=(60, 2))[documents] + rng.normal(size=(1200, 2))) / np.sqrt(2)
        exact = rho * shared + np.sqrt(1 - rho**2) * own
        measured = (exact[some], shared[some])
        delta = A.units_elsewhere(*measured, shared, documents[some], documents)
        assert delta.shape == (60, 2)
        wide = stats.t.ppf(0.975, 47) * A.standard_error(delta)
        held["elsewhere"].append(np.abs(delta.mean(0)) < wide)
        values = A.steady(*measured, shared.mean(0), documents[some])
        narrow = stats.t.ppf(0.975, 47) * A.standard_error(A.units(values, documents[some]))
        held["split"].append(np.abs(values.mean(0)) < narrow)
    for scope, hits in held.items():
        record(
            "control variate", f"other documents, interval of the {scope}", coverage=np.mean(hits)
        )
    assert 0.91 < np.mean(held["elsewhere"]) < 0.98
    # Why there are two: that of the split is none of other documents
    assert np.mean(held["split"], axis=0)[0] < 0.9


def test_documents_that_only_the_exact_effects_know_are_units_too() -> None:
    """Few windows to first order may miss a document: the estimate is what the formula says, and
    the document has a value of its own."""
    rng = np.random.default_rng(3)
    exact = rng.normal(size=(6, 2))
    linear = exact + 0.1 * rng.normal(size=(6, 2))
    shared = rng.normal(size=(4, 2))
    delta = A.units_elsewhere(exact, linear, shared, np.arange(6), np.array([0, 1, 1, 4]))
    assert delta.shape == (6, 2)
    slope = [np.polyfit(linear[:, r], exact[:, r], 1)[0] for r in range(2)]
    expected = exact.mean(0) + slope * (shared.mean(0) - linear.mean(0))
    assert np.allclose(delta.mean(0), expected)


# --------------------------------------------------------------------------------------- the arrays
def test_the_first_order_pass_says_what_the_exact_pass_says() -> None:
    model = random_model()
    data = text()
    means = A.training_means(model, data, ARGS, EXACT)
    given = (model, data, means, ARGS, np.arange(9), ["mean", "zero"], [0, 2], EXACT)
    exact = A.measure(*given)
    cheap = A.measure(*given, None, A.FIRST_ORDER)
    assert set(cheap) == {"base", "mean.first_order", "zero.first_order"}
    for name, values in cheap.items():
        np.testing.assert_allclose(values, exact[name], atol=1e-5, err_msg=name)


def test_a_linear_model_needs_one_sequence() -> None:
    """Where the exact effect is its first-order effect, every sequence tells that of the split."""
    rng = np.random.default_rng(1)
    linear = rng.normal(size=(600, 5))
    some = np.arange(0, 600, 15)
    values = A.steady(linear[some], linear[some], linear.mean(0), some)
    np.testing.assert_allclose(values, np.tile(linear.mean(0), (40, 1)), atol=1e-9)

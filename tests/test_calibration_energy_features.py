"""Intervals over features and over groups of them, on data whose answer is known: do they cover?

Near-copies among the features are the point: a cluster of copies is one thing, seen many times.
"""

import math

import numpy as np
import pandas as pd
import pytest
from calibration import LONGER, record
from scipy import stats

import energy_lens_minimal as lens


def allowed(share: float, n_sim: int) -> float:
    """Three binomial standard errors of a share found in n_sim simulations."""
    return 3 * math.sqrt(share * (1 - share) / n_sim)


def covers(hits: int, n_sim: int, low: float = 0.92, high: float = 0.98) -> bool:
    """Whether a coverage is within [low, high], as far as n_sim simulations can tell."""
    found = hits / n_sim
    return low - allowed(low, n_sim) <= found <= high + allowed(high, n_sim)


# ------------------------------------------------------------------------------------ Spearman over features
# What a predictor is worth is a property of clusters: z is drawn once a cluster, copies scatter around it.
SETTINGS = {
    # clusters, copies a cluster, correlation of two predictors, sequences a feature, noise, heavy tails
    "8 clusters of 3": (8, 3, (0.9, 0.3), 8, 0.2, False),
    "12 clusters of 4, heavy tails": (12, 4, (0.9, 0.6), 4, 0.5, True),
    "30 clusters of 4, heavy tails": (30, 4, (0.7, 0.7), 12, 0.3, True),
    "60 single features": (60, 1, (0.8, 0.5), 8, 0.3, False),
}
JITTER = 0.2  # of a copy around its cluster
N_SEQUENCES = 40


def draw(setting, r, jitter=JITTER):
    """Effects as `ablate` gives them, and the table of features with two predictors."""
    n_clusters, copies, (one, two), n_seq, noise, heavy = setting
    correlation = [[1, one, two], [one, 1, one * two], [two, one * two, 1]]
    z = r.multivariate_normal(np.zeros(3), correlation, n_clusters)
    sizes = r.geometric(1 / copies, n_clusters)
    cluster = np.repeat(np.arange(n_clusters), sizes)
    n = len(cluster)
    values = math.sqrt(1 - jitter**2) * z[cluster] + jitter * r.standard_normal((n, 3))
    change = np.sinh(1.5 * values[:, 0]) if heavy else values[:, 0]
    # A sequence acts on all features that it activates, on each in its own way
    effect = r.standard_normal((N_SEQUENCES, 3))
    loading = r.standard_normal((n, 3)) / math.sqrt(3)
    shared = 0.7 * loading @ effect.T + math.sqrt(0.51) * r.standard_normal((n, N_SEQUENCES))
    sequence = r.random((n, N_SEQUENCES)).argsort(1)[:, :n_seq]
    seen = np.take_along_axis(shared, sequence, 1) * noise * math.sqrt(n_seq)
    n_active = r.integers(1, 4, sequence.shape)
    effects = pd.DataFrame(
        {
            "feature": np.repeat(np.arange(n), n_seq),
            "eps": 1.0,
            "sequence": sequence.ravel(),
            "energy_change": ((change[:, None] + seen) * n_active).ravel(),
            "n_active": n_active.ravel(),
        }
    )
    features = {"feature": np.arange(n), "cluster": cluster, "aligned": False}
    features |= {"attribution_a": values[:, 1], "efas_a": values[:, 2]}
    return effects, pd.DataFrame(features)


def spearman(effects, features):
    """Of both predictors, and the difference, from scipy's ranks; a feature's rows are together."""
    n = len(features)
    total = effects.energy_change.to_numpy().reshape(n, -1).sum(1)
    change = stats.rankdata(total / effects.n_active.to_numpy().reshape(n, -1).sum(1))
    ranks = stats.rankdata(features[["attribution_a", "efas_a"]], axis=0)
    both = np.corrcoef(np.column_stack([change, ranks]).T)[0, 1:]
    return np.array([*both, both[0] - both[1]])


@pytest.fixture
def two_predictors(monkeypatch):
    kept = {name: lens.PREDICTORS[name] for name in ("attribution_a", "efas_a")}
    monkeypatch.setattr(lens, "PREDICTORS", kept)


def coverage_of_spearman(setting, n_sim, seed, alone=False):
    """How often the intervals of two correlations and of their difference hold what new clusters give on average.

    alone: as if no feature had a copy, which is what resampling features assumes.
    """
    r = np.random.default_rng(seed)
    truth = np.mean([spearman(*draw(setting, r)) for _ in range(400)], 0)
    hits = np.zeros(3, dtype=int)
    for _ in range(n_sim):
        effects, features = draw(setting, r)
        if alone:
            features["cluster"] = np.arange(len(features))
        scores, _ = lens.predicted_versus_actual(effects, features, 0)
        row = scores[scores.scale == "signed"].set_index("predictor")
        lo = [*row.ci_lo, row.minus_efas_lo["attribution_a"]]
        hi = [*row.ci_hi, row.minus_efas_hi["attribution_a"]]
        hits += (np.array(lo) <= truth) & (truth <= np.array(hi))
    return hits


@pytest.mark.parametrize("name", SETTINGS)
def test_spearman_over_features_with_copies(name, two_predictors):
    n_sim = 60 * LONGER
    hits = coverage_of_spearman(SETTINGS[name], n_sim, 1)
    for what, found in zip(("first", "second", "difference"), hits, strict=True):
        record("Spearman over features", f"{name}, {what}", coverage=found / n_sim, n_sim=n_sim)
        assert covers(found, n_sim), (what, found / n_sim)


def test_copies_taken_for_features_cover_too_little(two_predictors):
    """The failure that clusters mend: in the same setting, each copy a feature of its own."""
    n_sim = 30 * LONGER
    name = "30 clusters of 4, heavy tails"
    hits = coverage_of_spearman(SETTINGS[name], n_sim, 2, alone=True)
    record("Spearman, copies as features", name, coverage=hits.mean() / n_sim, n_sim=n_sim)
    assert (hits / n_sim < 0.92 - allowed(0.92, n_sim)).all()


def test_a_difference_between_predictors_is_found(two_predictors):
    """Power: .9 against .3 in 50 clusters, of which copies leave 30 to count with, is seen; of equals
    little more than 5 % differ."""
    r = np.random.default_rng(3)
    n_sim = 30 * LONGER
    found = {}
    for what, pair in (("planted", (0.9, 0.3)), ("equal", (0.7, 0.7))):
        n_found = 0
        for _ in range(n_sim):
            scores, _ = lens.predicted_versus_actual(*draw((50, 3, pair, 8, 0.2, False), r), 0)
            row = scores[(scores.scale == "signed") & (scores.predictor == "attribution_a")].iloc[0]
            n_found += row.minus_efas_lo > 0 or row.minus_efas_hi < 0
        found[what] = n_found / n_sim
    record("Spearman, difference", "50 clusters of 3", n_sim=n_sim, **found)
    assert found["planted"] >= 0.8
    assert found["equal"] <= 0.08 + allowed(0.08, n_sim)


def test_a_correlation_near_one_has_a_narrow_interval(two_predictors):
    """Fisher's z alone has none: one exchange of neighbours near 1 is a long way there."""
    r = np.random.default_rng(9)
    limits = []
    for _ in range(20 * LONGER):
        scores, _ = lens.predicted_versus_actual(
            *draw((40, 1, (0.9999, 0.5), 8, 0.003, False), r, jitter=0.003), 0
        )
        row = scores[(scores.scale == "signed") & (scores.predictor == "attribution_a")].iloc[0]
        assert row.spearman > 0.99
        limits.append(row.ci_lo)
    record("Spearman near 1", "40 features", lowest_limit=min(limits), n_sim=len(limits))
    assert min(limits) > 0.95


def test_no_interval_below_eight_clusters(two_predictors):
    r = np.random.default_rng(0)
    scores, _ = lens.predicted_versus_actual(*draw((7, 4, (0.9, 0.3), 8, 0.2, False), r), 0)
    limits = scores[scores.predictor == "attribution_a"].filter(regex="_lo$|_hi$")
    assert limits.isna().all(axis=None) and scores.spearman.notna().all()


def test_chance_gives_copies_one_number():
    """A random predictor correlates by chance like a property of clusters does, not like one of features."""
    r = np.random.default_rng(5)
    effects, features = draw((20, 6, (0.9, 0.3), 8, 0.2, False), r)
    left = lens.leave_out(
        effects.assign(attribution=0, integrated_gradients=0, f=0, f2=0),
        features.set_index("feature").cluster,
    )
    actual = left.means["energy_change"][0]
    nothing = lens.Correlations(np.zeros(1), np.zeros(1), np.zeros(1), np.ones((1, 1)))
    lens.set_to_chance(nothing, 0, lens.PREDICTORS["random"], actual, left, r)
    by_hand = []
    for _ in range(2000):
        random = r.standard_normal(20)[features.cluster]
        by_hand.append(stats.spearmanr(random, actual).statistic)
    lo, hi = np.quantile(by_hand, [0.025, 0.975])
    # the standard error of a 2.5 % quantile of 1,000 and of 2,000 draws, as if normal
    sd = np.std(by_hand)
    error = 3 * sd * math.sqrt(0.025 * 0.975 * (1 / 1000 + 1 / 2000)) / stats.norm.pdf(1.96)
    assert abs(nothing.lo[0] - lo) < error and abs(nothing.hi[0] - hi) < error
    assert hi - lo > 1.5 * 2 * 1.96 / math.sqrt(len(features)), (
        "as if 120 features were independent"
    )


# ------------------------------------------------------------------------------------ the median |EFAS|
@pytest.mark.parametrize("n_clusters, copies", [(12, 6), (40, 4), (150, 1)])
def test_the_median_over_features_with_copies(n_clusters, copies):
    n_sim = 100 * LONGER
    noise = 0.02  # of EFAS, by the sequences
    r = np.random.default_rng(n_clusters)

    def efas():
        cluster = np.repeat(np.arange(n_clusters), r.geometric(1 / copies, n_clusters))
        size = r.gamma(2, 0.1, n_clusters)[cluster] * r.choice([-1, 1], n_clusters)[cluster]
        return size + 0.02 * r.standard_normal(len(cluster)), cluster

    def seen(values):
        return values + noise * r.standard_normal(values.shape)

    truth = np.mean([np.median(np.abs(seen(efas()[0]))) for _ in range(2000)])
    hits = {"clusters": 0, "features": 0}
    for _ in range(n_sim):
        values, cluster = efas()
        found = seen(values)
        boot = seen(np.tile(found, (lens.N_BOOT, 1)))  # as resampling sequences does
        for what, groups in (("clusters", cluster), ("features", np.arange(len(cluster)))):
            interval = lens.median_interval(boot, pd.Series(found), pd.Series(groups))
            hits[what] += interval["median_ci_lo"] <= truth <= interval["median_ci_hi"]
    setting = f"{n_clusters} clusters of {copies}"
    record(
        "median |EFAS|",
        setting,
        coverage=hits["clusters"] / n_sim,
        copies_as_features=hits["features"] / n_sim,
        n_sim=n_sim,
    )
    assert covers(hits["clusters"], n_sim)
    if copies > 1:
        assert hits["features"] / n_sim < 0.92 - allowed(0.92, n_sim)


# ------------------------------------------------------------------------------------ means and ratios over groups
TAILS = {
    "normal": (lambda r, n: r.standard_normal(n), 0.0),
    "exponential": (lambda r, n: r.exponential(1, n), 1.0),
    "t with 3 degrees of freedom": (lambda r, n: r.standard_t(3, n), 0.0),
    "lognormal": (lambda r, n: r.lognormal(0, 1, n), math.exp(0.5)),
}


@pytest.mark.parametrize("n", [8, 16, 50, 200])
@pytest.mark.parametrize("tails", TAILS)
def test_means_over_groups(tails, n):
    """One heavy tail in few groups covers .90 to .92; less than percentiles it never is."""
    draw_groups, truth = TAILS[tails]
    r = np.random.default_rng(n)
    n_sim = 150 * LONGER
    hits = 0
    hits_percentiles = 0
    for _ in range(n_sim):
        size = r.integers(1, 4, n)
        values = pd.Series(np.repeat(draw_groups(r, n), size))
        groups = pd.Series(np.repeat(np.arange(n), size))
        interval = lens.bootstrap_mean(values, groups)
        hits += interval.lo <= truth <= interval.hi
        mean = values.groupby(groups).first().to_numpy()
        times = lens.bootstrap_counts(n, 200, r)
        drawn = times @ (mean * size) / (times @ size)
        lo, hi = np.quantile(drawn, [0.025, 0.975])
        hits_percentiles += lo <= truth <= hi
    coverage = hits / n_sim
    record(
        "mean over groups",
        f"{tails}, {n} groups",
        coverage=coverage,
        percentiles=hits_percentiles / n_sim,
        n_sim=n_sim,
    )
    lowest = 0.90 if tails == "lognormal" and n < 50 else 0.92
    assert covers(hits, n_sim, low=lowest)
    assert n > 16 or hits >= hits_percentiles


def test_a_mean_needs_eight_groups():
    values = pd.Series(np.arange(14.0))
    found = lens.bootstrap_mean(values, values // 2)
    assert found.mean == 6.5 and math.isnan(found.lo) and math.isnan(found.hi)
    found = lens.bootstrap_mean(values * 0 + 3, values)
    assert found == (3, 3, 3)


# ------------------------------------------------------------------------------------ passing against matched features
def test_pairs_of_equals_do_not_differ():
    """The table of passing features: where the passing ones are like their matches, 5 % of intervals say otherwise."""
    r = np.random.default_rng(7)
    n_sim = 100 * LONGER
    n_wrong = 0
    for _ in range(n_sim):
        rows = {
            "group": ["aligned"] * 20 + ["matched"] * 20,
            "pair": [*range(20), *range(20)],
            "layer": 0,
            "cluster": np.arange(40) // 2 * 1.0,
            "energy_change": np.repeat(r.exponential(1, 20), 2) + r.exponential(0.3, 40),
        }
        table = pd.DataFrame(rows)
        for name in ("distinct_share", "token_entropy", "top_token_share"):
            table[name] = 0.5
        found = lens.against_matched(table).set_index("quantity").loc["energy_change"]
        n_wrong += not found.ci_lo <= 0 <= found.ci_hi
    record("passing minus matched", "20 pairs in 10 clusters", wrong=n_wrong / n_sim, n_sim=n_sim)
    assert covers(n_sim - n_wrong, n_sim, high=0.99)

"""Energy-Lens: every p value and interval of its reports, against simulations with a known answer."""

import argparse
import math

import numpy as np
import pandas as pd
import pytest
import torch
from calibration import LONGER, record
from scipy import stats

import energy_lens_minimal as lens


def rng(seed=0):
    return np.random.default_rng(seed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def upper_limit(share, n):
    """What a share of n independent trials stays below in all but one of 1,000 repetitions."""
    return stats.binom.ppf(0.999, n, share) / n


# ---------------------------------------------------------------- random directions
def quadratic_states(seed, dim, sequences=150, length=20):
    """Gaussian states and the gradient of E = x^T H x / 2, H = diag(+1, .., -1, ..): EFAS of a direction u
    is a constant times u^T H u, so that no random direction goes as far as an axis."""
    x = tensor(rng(seed).standard_normal((sequences, length, dim)))  # [S, L, D]
    signs = torch.ones(dim)
    signs[dim // 2 :] = -1
    return x, x * signs


def dictionary(x, directions, n_active):
    """An SAE of tied directions [K, D], each firing on n_active [K] of the tokens of x."""
    projection = (x.flatten(0, 1) @ directions.T).sort(0, descending=True).values  # [N, K]
    threshold = projection[n_active, torch.arange(len(directions))]
    return lens.SAE(
        directions.T.contiguous(), -threshold, directions, torch.zeros(directions.shape[1])
    )


def unit_vectors(r, k, dim):
    return torch.nn.functional.normalize(tensor(r.standard_normal((k, dim))), dim=-1)


def direction_table(x, gx, sae, n, seed):
    """The rows of features.csv that concern random directions."""
    f = sae.encode(x)
    a = lens.feature_gradient(gx, sae.w_dec)
    table = lens.efas_table(torch.arange(f.shape[-1]), f, a)
    lens.compare_with_directions(table, x, gx, sae, n, rng(seed))
    return table


@pytest.mark.parametrize("case", ["one rate", "a few rates far from the others"])
def test_p_against_random_directions_is_uniform_for_random_directions(case):
    """Twelve shares are looked at, of 30 features or of all. The largest is 5 of 30 below .05: so
    many are found in one of 60 shares where p is uniform, in one of six looks at twelve."""
    dim, k = 24, 800
    x, gx = quadratic_states(0, dim)
    r = rng(1)
    n_active = np.full(k, 150)
    if case != "one rate":
        far = np.exp(r.uniform(math.log(30), math.log(2500), 100))
        n_active = np.concatenate([r.integers(100, 150, k - 100), far]).astype(int)
    directions = unit_vectors(r, k, dim)
    sae = dictionary(x, directions, torch.tensor(n_active))
    p = direction_table(x, gx, sae, 4000, 2).p_direction.to_numpy()
    uniform = stats.kstest(p, "uniform").pvalue
    # The rate of the feature itself must be met: at either end of the rates as well
    ends = np.argsort(n_active)
    shares = {}
    for name, some in (("all", ends), ("rarest", ends[:30]), ("most frequent", ends[-30:])):
        for level in (0.05, 0.01):
            shares[f"below_{level:g}, {name}"] = (p[some] < level).mean()
            assert (p[some] < level).mean() <= upper_limit(level, len(some)), (name, level)
    record("p_direction", case, n=k, ks_p=uniform, **shares)
    assert uniform > 1e-3


@pytest.mark.parametrize("planted", [1, 2, 5, 12, 20])
def test_few_planted_features_are_found_among_many(planted):
    """The axes have more EFAS than any random direction. Counting 4,000 directions needs 6 of them among 600."""
    dim, k, n = 48, 600, 4000
    assert lens.fewest_findable(lens.smallest_p(n)[0], k) == 6
    assert lens.fewest_findable(lens.smallest_p(n)[1], k) == 1
    x, gx = quadratic_states(3, dim)
    directions = unit_vectors(rng(4), k, dim)
    directions[:planted] = torch.eye(dim)[torch.linspace(0, dim - 1, planted).long()]
    table = direction_table(x, gx, dictionary(x, directions, torch.full((k,), 300)), n, 5)
    found = lens.fdr(table.p_direction.to_numpy()) < 0.05
    false = int(found[planted:].sum())
    record("q_direction", f"{planted} planted of {k}", found=found[:planted].sum(), false=false)
    assert found[:planted].all()
    # Benjamini and Hochberg: at most 5 % of what is found is false on average
    assert false <= stats.binom.ppf(0.999, planted + false, 0.05)


LAWS = {
    "normal": stats.norm(),
    "bounded": stats.beta(3, 9),
    "skewed": stats.gamma(2),
    "heavy, t with 3 degrees": stats.t(3),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [300, 2000, 20_000])
def test_the_fitted_tail_promises_no_more_than_the_law_holds(law, n):
    """How often a feature from the null's own law falls below a level: exactly, from the law, averaged over draws."""
    n_sim = (5 if n > 2000 else 40) * LONGER
    draws = tensor(LAWS[law].rvs((n_sim, n), random_state=rng(6)))
    counted, fitted = lens.smallest_p(n)
    for level in (10 * counted, counted, counted / 3, fitted):
        if level < fitted:  # so few draws that no tail is fitted
            continue
        level *= 1 + 1e-9  # a p that equals its floor is at the level
        low, high = critical_values(draws, level, LAWS[law].ppf(1e-9), LAWS[law].isf(1e-9))
        true = LAWS[law].cdf(low) + LAWS[law].sf(high)
        error = true.std() / math.sqrt(n_sim)
        setting = f"{law}, {n} draws, {level / counted:.1g} x the smallest counted p"
        record("p of a fitted tail", setting, true_over_level=true.mean() / level, se=error / level)
        assert true.mean() <= level + 2 * error, (level, true.mean(), error)


def critical_values(draws, level, lowest, highest):
    """The values at which p falls to the level, on both sides of draws [B, n], by bisection."""
    edges = []
    for end in (lowest, highest):
        inner = draws.median(1).values.double()
        outer = torch.full_like(inner, end)
        for _ in range(20):
            middle = (inner + outer) / 2
            rejected = lens.direction_p(middle, draws)[1] <= level
            outer = torch.where(rejected, middle, outer)
            inner = torch.where(rejected, inner, middle)
        edges.append(outer.numpy())
    return edges


def test_the_fitted_tail_meets_a_hundred_thousand_directions():
    """The law of a real null is not known: 50 times as many directions are counted instead."""
    dim, n, n_many = 16, 2000, 100_000
    x, gx = (y.flatten(0, 1)[:400] for y in quadratic_states(7, dim))
    number, everywhere = torch.tensor([60]), torch.ones(400, dtype=torch.bool)
    many = lens.direction_null(x, gx, everywhere, number, n_many, rng(8)).at(number)[0].double()
    level = lens.smallest_p(n)[0] / 3
    beyond = []
    for seed in range(6 * LONGER):
        few = lens.direction_null(x, gx, everywhere, number, n, rng(100 + seed)).at(number)
        low, high = critical_values(few, level, -1, 1)
        beyond.append(((many <= low.item()).sum() + (many >= high.item()).sum()).item())
    ratio = np.mean(beyond) / n_many / level
    error = np.std(beyond) / n_many / level / math.sqrt(len(beyond))
    record("p of a fitted tail", "random directions, 1/3 of it", true_over_level=ratio, se=error)
    # The count has an error of its own too
    assert ratio <= 1 + 2 * math.hypot(error, (n_many * level) ** -0.5)


def test_fdr_against_random_directions_holds_with_near_copies():
    """No feature is special; each stands there twenty times, hardly changed."""
    dim, n_sim = 24, 12 * LONGER
    shares = []
    for seed in range(n_sim):
        x, gx = quadratic_states(seed, dim, sequences=50)
        r = rng(1000 + seed)
        originals = unit_vectors(r, 15, dim).repeat_interleave(20, 0)
        copies = torch.nn.functional.normalize(originals + 0.02 * unit_vectors(r, 300, dim), dim=-1)
        table = direction_table(x, gx, dictionary(x, copies, torch.full((300,), 60)), 1000, seed)
        shares.append((lens.fdr(table.p_direction.to_numpy()) < 0.05).any())
    record("q_direction", "null, 15 features in 20 copies", fdr=np.mean(shares), n_sim=n_sim)
    assert np.mean(shares) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / n_sim)


# ---------------------------------------------------------------- documents permuted, signs flipped
def documents(
    seed, k, sequences=120, length=32, active=0.05, shared=0.0, within=0.0, heavy=False, rho=0.7
):
    """f >= 0 and A [S, L, k]: AR(1) tokens; what documents share has `shared` sd in both; A holds `within` of f's
    own tokens; 30 % of either's variance is a document's own."""
    r = rng(seed)

    def series():
        noise = r.standard_normal((sequences, length, k))
        for t in range(1, length):
            noise[:, t] = rho * noise[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
        return math.sqrt(0.7) * noise + math.sqrt(0.3) * r.standard_normal((sequences, 1, k))

    topic = shared * r.standard_normal((sequences, 1, k))
    own = series()
    f = np.maximum(own + topic - stats.norm.isf(active), 0)
    a = series() + topic + within * (own - own.mean(1, keepdims=True))
    a = np.sign(a) * np.abs(a) ** 2 if heavy else a
    return tensor(f), tensor(a)


def both_tests(f, a, strata=None):
    """p of permuted documents and p of flipped signs, [K] each."""
    strata = torch.zeros(len(f)) if strata is None else strata
    score = lens.rank_normal(a)
    moments = lens.seqperm_moments(f, score, strata)
    z = moments.z_of(moments.observed).numpy()
    within = lens.signflip_p(lens.document_covariances(f, score, strata)).numpy()
    return 2 * stats.norm.sf(np.abs(z)), within


SETTINGS = {
    "40 documents": dict(sequences=40, active=0.1),
    "120 documents, heavy tails": dict(heavy=True),
    "200 documents, rare": dict(sequences=200, active=0.008),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_p_of_both_tests_is_uniform_without_association(setting):
    right, within = [], []
    for seed in range(4 * LONGER):
        f, a = documents(seed, 200, **SETTINGS[setting])
        enough = lens.efas(f, a)["eligible"].numpy()
        p, q = both_tests(f, a)
        right.append(p[enough])
        within.append(q[enough])
    for name, p in (("p_token", np.concatenate(right)), ("p_within", np.concatenate(within))):
        figures = dict(n=len(p), ks_p=stats.kstest(p, "uniform").pvalue)
        for level in (0.05, 0.01, 1e-3, 1e-4):
            figures[f"below_{level:g}"] = (p < level).mean()
        record(name, setting, **figures)
        for level in (0.05, 0.01, 1e-3, 1e-4):
            assert (p < level).mean() <= upper_limit(level, len(p)), (name, level)
        assert figures["ks_p"] > 1e-3


def test_a_shared_document_effect_passes_permuted_documents_and_no_flipped_signs():
    """.25 sd of f and of A belong to the document, and within a document nothing follows anything."""
    false, found = [], []
    for seed in range(8 * LONGER):
        r = rng(seed)
        topic = 0.25 * r.standard_normal((400, 1, 40), dtype=np.float32)
        f = topic + r.standard_normal((400, 48, 40), dtype=np.float32)
        a = topic + r.standard_normal((400, 48, 40), dtype=np.float32)
        p, within = both_tests(tensor(f - stats.norm.isf(0.1)).relu(), tensor(a))
        found.append((lens.fdr(p) < 0.05).mean())
        false.append((lens.fdr(within) < 0.05).any())
    n_sim = len(false)
    record("q_within", "document effect .25 sd, nothing within", fdr=np.mean(false), n_sim=n_sim)
    record("q_token", "document effect .25 sd, nothing within", passing=np.mean(found))
    assert np.mean(found) > 0.9
    assert np.mean(false) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / n_sim)


def test_an_association_within_documents_is_found():
    f, a = documents(50, 80, sequences=320, active=0.05, within=0.2)
    f_null, a_null = documents(51, 80, sequences=320, active=0.05)
    _, within = both_tests(torch.cat([f, f_null], -1), torch.cat([a, a_null], -1))
    found = lens.fdr(within) < 0.05
    power, false = found[:80].mean(), found[80:].sum() / max(1, found.sum())
    record("q_within", "A holds .2 of f's own, half of 160 features", power=power, false=false)
    assert power > 0.9
    assert found[80:].sum() <= stats.binom.ppf(0.999, found.sum(), 0.05)


def test_flipped_signs_equal_brute_force():
    """All 2^14 flips, of covariances that are computed by hand."""
    n_seq, k = 14, 40
    f, a = documents(52, k, sequences=n_seq, active=0.3, within=0.4)
    strata = torch.tensor([0] * 8 + [1] * 6)
    c = lens.document_covariances(f, a, strata)
    p = lens.signflip_p(c).numpy()
    signs = 1 - 2 * ((np.arange(2**n_seq)[:, None] >> np.arange(n_seq)) & 1)
    exact = []
    for i in range(k):
        own = [f[..., i].double(), a[..., i].double()]
        for y in own:
            y -= y.mean(1, keepdim=True)
            for stratum in (0, 1):
                y[strata == stratum] -= y[strata == stratum].mean(0)
        by_hand = (own[0] * own[1]).sum(1).numpy()
        sums = np.abs(signs @ by_hand)
        assert c.sum(0)[i].item() == pytest.approx(
            by_hand.sum() / np.sqrt((sums**2).mean()), rel=1e-4
        )
        exact.append((sums >= abs(by_hand.sum()) * (1 - 1e-9)).mean())
    ratio = p / np.array(exact)
    record("p_within", "14 documents, over all flips", smallest=ratio.min(), largest=ratio.max())
    assert min(exact) < 0.01
    # A saddlepoint is smooth where flips are few: at the very end one flip is as much as p itself
    one = 2 / 2**n_seq
    assert np.all(np.abs(p - exact) <= 0.15 * np.array(exact) + one)


def test_fdr_of_both_tests_holds_with_near_copies():
    n_sim = 20 * LONGER
    false = {"q_token": [], "q_within": []}
    for seed in range(n_sim):
        f, a = documents(200 + seed, 10, sequences=80)
        r = rng(300 + seed)
        f = f.repeat_interleave(15, -1) * tensor(r.uniform(0.8, 1.2, (*f.shape[:2], 150)))
        a = a.repeat_interleave(15, -1) + 0.1 * tensor(r.standard_normal((*a.shape[:2], 150)))
        for name, p in zip(false, both_tests(f, a), strict=True):
            false[name].append((lens.fdr(p) < 0.05).any())
    for name, shares in false.items():
        record(name, "null, 10 features in 15 copies", fdr=np.mean(shares), n_sim=n_sim)
        assert np.mean(shares) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / n_sim)


def settings(**changes):
    return argparse.Namespace(**dict(permutations=400, directions=400, seed=0) | changes)


def test_monte_carlo_and_familywise_p_hold_their_level():
    n_sim, k = 15 * LONGER, 60
    counted, familywise = [], []
    for seed in range(n_sim):
        f, a = documents(400 + seed, k, sequences=60, heavy=True, active=0.1)
        draws = lens.resample(torch.zeros(60), 400, rng(seed))
        found = lens.feature_statistics(f, a, torch.zeros(60, 32), draws)
        counted.append(found.columns["p_mc"].numpy())
        z = pd.Series(found.columns["z_token"].numpy())
        familywise.append(min(lens.familywise_p(z, found.max_z)))
    p = np.concatenate(counted)
    record("p_mc", "60 documents, heavy tails", n=len(p), ks_p=stats.kstest(p, "uniform").pvalue)
    record("p_maxt", "60 features", below_05=np.mean(np.array(familywise) < 0.05), n_sim=n_sim)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert np.mean(np.array(familywise) < 0.05) <= upper_limit(0.05, n_sim)


# ---------------------------------------------------------------- intervals and concepts
@pytest.mark.parametrize("law", ["normal", "lognormal"])
@pytest.mark.parametrize("n", [8, 40])
def test_the_interval_of_a_mean_over_features_covers_it(law, n):
    covered = []
    for seed in range(150 * LONGER):
        r = rng(600 + seed)
        means = r.standard_normal(n) if law == "normal" else r.lognormal(0, 0.7, n)
        true = 0.0 if law == "normal" else math.exp(0.7**2 / 2)
        values = pd.Series(np.repeat(means, 3) + 0.3 * r.standard_normal(3 * n))
        interval = lens.bootstrap_mean(values, pd.Series(np.repeat(np.arange(n), 3)))
        covered.append(interval.lo <= true <= interval.hi)
    coverage, n_sim = np.mean(covered), len(covered)
    record("bootstrap_mean", f"{law}, {n} features", coverage=coverage, n_sim=n_sim)
    stated = 0.95 if law == "normal" else 0.90  # one heavy tail in eight groups
    assert coverage >= stated - 3 * math.sqrt(stated * (1 - stated) / n_sim)
    # Eight normal groups cover .97: the further of two ends
    assert coverage <= 0.98 + 3 * math.sqrt(0.02 * 0.98 / n_sim)


CLASS_SETTINGS = {
    "common class": dict(base_rate=0.2, active=0.05),
    "rare class, rare feature": dict(base_rate=0.02, active=0.01),
}


@pytest.mark.parametrize("setting", CLASS_SETTINGS)
def test_p_of_concepts_is_uniform_without_association(setting):
    """Uniform up to .7. Where a rare class meets no active token of a rare feature, which is the
    least that can be, p is 1: 22 % of 2,400. That alone sets ks_p far below any level (5e-26), on
    the safe side: no p is smaller than uniform ones are (ks_p_smaller)."""
    case = CLASS_SETTINGS[setting]
    ps = []
    for seed in range(3 * LONGER):
        f, _ = documents(700 + seed, 200, sequences=240, active=case["active"])
        enough = lens.efas(f, f)["eligible"].numpy()
        members = rng(seed).random(f.shape[:2]) < case["base_rate"]
        perms = lens.permutations(torch.zeros(240), 2000, rng(seed))
        table = lens.concept_features(f, {"word": members}, torch.zeros(240), perms, np.arange(200))
        ps.append(table.p.to_numpy()[enough])
    p = np.concatenate(ps)
    figures = {f"below_{level:g}": (p < level).mean() for level in (0.05, 0.01, 1e-3)}
    figures["ks_p"] = stats.kstest(p, "uniform").pvalue
    figures["ks_p_smaller"] = stats.kstest(p, "uniform", alternative="greater").pvalue
    record("concepts p", setting, n=len(p), **figures)
    assert figures["ks_p_smaller"] > 1e-3
    for level in (0.05, 0.01, 1e-3):
        assert (p < level).mean() <= upper_limit(level, len(p)), level

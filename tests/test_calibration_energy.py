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


@pytest.mark.parametrize("case", ["one rate", "rates over a factor of 60"])
def test_p_against_random_directions_is_uniform_for_random_directions(case):
    dim, k = 24, 400
    x, gx = quadratic_states(0, dim)
    r = rng(1)
    n_active = torch.full((k,), 150)
    if case != "one rate":
        n_active = torch.tensor(np.exp(r.uniform(math.log(30), math.log(1800), k)).astype(int))
    table = direction_table(
        x, gx, dictionary(x, unit_vectors(r, k, dim), n_active), 4000 * LONGER, 2
    )
    p = table.p_direction.to_numpy()
    uniform = stats.kstest(p, "uniform").pvalue
    share = (p < 0.05).mean()
    record("p_direction", case, n=k, ks_p=uniform, below_05=share, below_01=(p < 0.01).mean())
    assert uniform > 1e-3
    assert share <= upper_limit(0.05, k)
    # The rate of a feature, and not only that of its neighbours, must be met: at either end as well.
    rarest, most = np.argsort(n_active.numpy())[:40], np.argsort(n_active.numpy())[-40:]
    assert (p[rarest] < 0.05).mean() <= upper_limit(0.05, 40)
    assert (p[most] < 0.05).mean() <= upper_limit(0.05, 40)


@pytest.mark.parametrize("planted", [1, 2, 5, 12, 20])
def test_few_planted_features_are_found_among_many(planted):
    """The axes have more EFAS than any random direction. Counting 2,000 directions needs 13 of them among 600."""
    dim, k, n = 48, 600, 2000
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
    "heavy, t with 4 degrees": stats.t(4),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [300, 2000, 20_000])
def test_the_fitted_tail_promises_no_more_than_the_law_holds(law, n):
    """How often a feature from the null's own law falls below a level: exactly, from the law, averaged over draws."""
    n_sim = (10 if n > 2000 else 60) * LONGER
    draws = tensor(LAWS[law].rvs((n_sim, n), random_state=rng(6)))
    for level in (1e-2, 1e-3, 1e-4, 1e-5):
        if level < lens.smallest_p(n)[1]:
            continue
        low, high = critical_values(draws, level)
        true = LAWS[law].cdf(low) + LAWS[law].sf(high)
        error = true.std() / math.sqrt(n_sim)
        record(
            "p_direction, tail", f"{law}, {n} draws, level {level:g}", true=true.mean(), se=error
        )
        assert true.mean() <= level + 2 * error, (level, true.mean(), error)


def critical_values(draws, level):
    """The values at which p falls to the level, on both sides of draws [B, n], by bisection."""
    edges = []
    for sign in (-1, 1):
        inner = draws.median(1).values.double()
        outer = inner + sign * 1e4
        for _ in range(60):
            middle = (inner + outer) / 2
            rejected = lens.direction_p(middle, draws)[1] <= level
            outer = torch.where(rejected, middle, outer)
            inner = torch.where(rejected, inner, middle)
        edges.append(outer.numpy())
    return edges


def test_the_fitted_tail_meets_two_hundred_thousand_directions():
    """The law of a real null is not known: 100 times as many directions are counted instead."""
    dim, n = 16, 2000
    x, gx = (y.flatten(0, 1)[:500] for y in quadratic_states(7, dim))
    number = torch.tensor([60])
    many = lens.direction_null(x, gx, number, 200_000, rng(8)).at(number)[0].double()
    ratios = []
    for seed in range(10 * LONGER):
        few = lens.direction_null(x, gx, number, n, rng(100 + seed)).at(number)
        low, high = critical_values(few, 1e-4)
        ratios.append(
            ((many <= low.item()).sum() + (many >= high.item()).sum()).item() / 2e5 / 1e-4
        )
    error = np.std(ratios) / math.sqrt(len(ratios))
    record("p_direction, tail", "directions, level 1e-4", true_over_level=np.mean(ratios), se=error)
    # The count of 200,000 has an error of its own: 20 directions are expected beyond the level
    assert np.mean(ratios) <= 1 + 2 * math.hypot(error, 20**-0.5)


def test_fdr_against_random_directions_holds_with_near_copies():
    """No feature is special; each stands there twenty times, hardly changed."""
    dim, n_sim = 24, 15 * LONGER
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
    z_within = lens.signflip_z(f, score, strata).numpy()
    return 2 * stats.norm.sf(np.abs(z)), 2 * stats.norm.sf(np.abs(z_within))


SETTINGS = {
    "40 documents": dict(sequences=40, active=0.1),
    "120 documents": dict(),
    "120 documents, heavy tails": dict(heavy=True),
    "200 documents, rare": dict(sequences=200, active=0.008),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_p_of_both_tests_is_uniform_without_association(setting):
    right, within = [], []
    for seed in range(8 * LONGER):
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
    for seed in range(20 * LONGER):
        f, a = documents(seed, 100, sequences=320, active=0.1, shared=0.25)
        p, within = both_tests(f, a)
        found.append((lens.fdr(p) < 0.05).mean())
        false.append((lens.fdr(within) < 0.05).any())
    n_sim = len(false)
    record("q_within", "document effect .25 sd, nothing within", fdr=np.mean(false), n_sim=n_sim)
    record("q_token", "document effect .25 sd, nothing within", passing=np.mean(found))
    assert np.mean(found) > 0.5
    assert np.mean(false) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / n_sim)


def test_an_association_within_documents_is_found():
    f, a = documents(50, 200, sequences=320, active=0.05, within=0.15)
    f_null, a_null = documents(51, 200, sequences=320, active=0.05)
    _, within = both_tests(torch.cat([f, f_null], -1), torch.cat([a, a_null], -1))
    found = lens.fdr(within) < 0.05
    power, false = found[:200].mean(), found[200:].sum() / max(1, found.sum())
    record("q_within", "A holds .15 of f's own, half of 400 features", power=power, false=false)
    assert power > 0.9
    assert found[200:].sum() <= stats.binom.ppf(0.999, found.sum(), 0.05)


def test_flipped_signs_equal_brute_force():
    f, a = documents(52, 3, sequences=12, active=0.3)
    strata = torch.tensor([0] * 7 + [1] * 5)
    z = lens.signflip_z(f, a, strata)
    for k in range(3):
        c = []
        own = [f[..., k].double(), a[..., k].double()]
        for y in own:
            y -= y.mean(1, keepdim=True)
            for stratum in (0, 1):
                y[strata == stratum] -= y[strata == stratum].mean(0)
        c = (own[0] * own[1]).sum(1).numpy()
        signs = 1 - 2 * ((np.arange(4096)[:, None] >> np.arange(12)) & 1)  # all of them
        sums = signs @ c
        assert abs(sums.mean()) < 1e-9
        assert z[k].item() == pytest.approx(c.sum() / sums.std(), rel=1e-5)


def test_fdr_of_both_tests_holds_with_near_copies():
    n_sim = 30 * LONGER
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
    n_sim, k = 25 * LONGER, 60
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
def test_the_interval_of_the_median_covers_it():
    """Features of true EFAS .1 to .5, tokens of a document alike: the median over the features of this dictionary."""
    k, covered = 40, []
    for seed in range(60 * LONGER):
        r = rng(500 + seed)
        strength = np.linspace(0.1, 0.5, k)
        document = r.standard_normal((100, 1, k))
        f = math.sqrt(0.5) * document + math.sqrt(0.5) * r.standard_normal((100, 20, k))
        noise = math.sqrt(0.5) * r.standard_normal((100, 1, k))
        noise = noise + math.sqrt(0.5) * r.standard_normal((100, 20, k))
        a = strength * f + np.sqrt(1 - strength**2) * noise  # Pearson(f, A) = strength
        draws = lens.resample(torch.zeros(100), 2, r)
        found = lens.pearson(lens.sequence_sums(tensor(f), tensor(a)), draws.weights[2:])
        whole = lens.pearson(lens.sequence_sums(tensor(f), tensor(a)))[0]
        own = pd.DataFrame(dict(efas=whole.numpy()))
        lo, hi = lens.median_interval(own.efas, found.numpy())
        covered.append(lo <= np.median(strength) <= hi)
    coverage, n_sim = np.mean(covered), len(covered)
    record("median_ci", "true EFAS .1 to .5, 100 documents", coverage=coverage, n_sim=n_sim)
    assert coverage >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / n_sim)


@pytest.mark.parametrize("law", ["normal", "lognormal"])
@pytest.mark.parametrize("n", [8, 40])
def test_the_interval_of_a_mean_over_features_covers_it(law, n):
    covered = []
    for seed in range(150 * LONGER):
        r = rng(600 + seed)
        means = r.standard_normal(n) if law == "normal" else r.lognormal(0, 0.7, n)
        true = 0.0 if law == "normal" else math.exp(0.7**2 / 2)
        values = pd.Series(np.repeat(means, 3) + 0.3 * r.standard_normal(3 * n))
        interval = lens.bootstrap_mean(values, pd.Series(np.repeat(np.arange(n), 3)), seed)
        covered.append(interval.lo <= true <= interval.hi)
    record("bootstrap_mean", f"{law}, {n} features", coverage=np.mean(covered), n_sim=len(covered))


CLASS_SETTINGS = {
    "common class": dict(base_rate=0.2, active=0.05),
    "rare class, rare feature": dict(base_rate=0.02, active=0.01),
}


@pytest.mark.parametrize("setting", CLASS_SETTINGS)
def test_p_of_concepts_is_uniform_without_association(setting):
    case = CLASS_SETTINGS[setting]
    ps = []
    for seed in range(4 * LONGER):
        f, _ = documents(700 + seed, 200, sequences=240, active=case["active"])
        enough = lens.efas(f, f)["eligible"].numpy()
        members = rng(seed).random(f.shape[:2]) < case["base_rate"]
        table = lens.concept_features(f, {"word": members}, torch.zeros(240), np.arange(200))
        ps.append(table.p.to_numpy()[enough])
    p = np.concatenate(ps)
    figures = {f"below_{level:g}": (p < level).mean() for level in (0.05, 0.01, 1e-3)}
    record("concepts p", setting, n=len(p), ks_p=stats.kstest(p, "uniform").pvalue, **figures)
    for level in (0.05, 0.01, 1e-3):
        assert (p < level).mean() <= upper_limit(level, len(p)), level

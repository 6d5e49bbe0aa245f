"""Energy-Lens against closed forms, brute force, and data whose answer is known."""

import argparse
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import stats

import energy_lens_minimal as lens

S, L = 120, 32


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def et():
    """A small Energy Transformer in float64, its synapses strong enough to matter."""
    torch.manual_seed(0)
    net = lens.EnergyTransformer(50, 12, d=24, heads=2, d_head=8, memories=40)
    for p in (net.wq, net.wk, net.xi):
        p.data *= 4
    net.delta.data.normal_(0, 0.3)
    net.gamma.data.fill_(0.8)
    return net.double().requires_grad_(False)


@pytest.fixture
def field_and_state(et):
    torch.manual_seed(1)
    b = et.field(torch.randint(50, (5, 12)))
    return b, b + torch.randn_like(b)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def structured(seed, k, heavy=True, active=0.05, sequences=S, seq_share=0.3, rho=0.7):
    """Independent f and A [S, L, k] with AR(1) tokens, a sequence effect, sparsity, and heavy tails in A."""
    r = rng(seed)

    def series():
        noise = r.standard_normal((sequences, L, k))
        for t in range(1, L):
            noise[:, t] = rho * noise[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
        return math.sqrt(1 - seq_share) * noise + math.sqrt(seq_share) * r.standard_normal(
            (sequences, 1, k)
        )

    f = np.maximum(series() - stats.norm.isf(active), 0)
    a = series()
    a = np.sign(a) * np.abs(a) ** 2 if heavy else a
    return torch.tensor(f, dtype=torch.float32), torch.tensor(a, dtype=torch.float32)


# ------------------------------------------------------------------------------------ the Energy Transformer
def test_gradients_are_those_of_the_energy(et, field_and_state):
    b, x = field_and_state
    x = x.requires_grad_()
    auto = torch.autograd.grad(et.energy(x, b).sum(), x)[0]
    assert (et.grad_x(x, b) - auto).abs().max() < 1e-10 and torch.equal(et.autograd_x(x, b), auto)
    assert (
        torch.autograd.grad(et.lagrangian(x).sum(), x)[0] - et.activation(x)
    ).abs().max() < 1e-10
    terms = et.energy_terms(x, b)
    synapses = torch.autograd.grad((terms["attention"] + terms["hopfield"]).sum(), x)[
        0
    ]  # = J d(E_att + E_hn)/dg
    jacobian = torch.autograd.functional.jacobian(lambda y: et.activation(y), x[0, 0].detach())
    v = et.grad_g(x, b) - x + b
    assert (jacobian @ v[0, 0] - synapses[0, 0]).abs().max() < 1e-10
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    assert (
        eigenvalues.min() > -1e-12 and (eigenvalues > 1e-8).sum() == x.shape[-1] - 2 + 1
    )  # eps lifts one of the two null directions
    assert torch.allclose(jacobian, jacobian.T)


def test_energy_symmetries_and_masked_diagonal(et, field_and_state):
    b, x = field_and_state
    order = torch.randperm(12)
    assert torch.allclose(et.energy(x[:, order], b[:, order]), et.energy(x, b))
    shifted, here = et.energy_terms(x + 3.0, b), et.energy_terms(x, b)
    assert all(torch.allclose(shifted[k], here[k]) for k in ("attention", "hopfield", "field"))
    g = et.activation(x)[0]
    by_hand = 0.0
    for h in range(2):
        q, k = g @ et.wq[h].T, g @ et.wk[h].T
        for i in range(12):
            by_hand -= (
                torch.logsumexp(
                    torch.stack([et.beta * q[i] @ k[j] for j in range(12) if j != i]), 0
                )
                / et.beta
            )
    assert torch.allclose(here["attention"][0].sum(), by_hand)


def test_energy_falls_as_predicted_and_reaches_a_fixed_point(et, field_and_state):
    b, x = field_and_state
    v, small = et.grad_g(x, b), 1e-5
    change = (et.energy(x - small * v, b) - et.energy(x, b)).sum()
    assert change == pytest.approx((-small * (v * et.grad_x(x, b)).sum()).item(), rel=1e-3)
    stable, table = lens.largest_step(et, torch.arange(36).reshape(3, 12))
    assert stable >= 0.1 and table.rising.iloc[0] == 0
    star, residual = lens.relax(et, x, b, min(stable, 0.5), max_steps=4000)
    assert (residual <= 1e-3).double().mean() >= 0.95
    assert (et.grad_g(star, b).norm(dim=-1).amax(1) <= 1.1e-3).double().mean() >= 0.95
    assert (et.energy(star, b) <= et.energy(x, b)).all()


def test_clamp_holds_its_readout_while_the_rest_relaxes(et, field_and_state):
    b, x = field_and_state
    w = torch.nn.functional.normalize(torch.randn(5, 24, dtype=torch.float64), dim=-1)
    mask = torch.zeros(5, 12, dtype=torch.bool)
    mask[:, 3] = True
    clamp = lens.Clamp(
        w,
        torch.zeros(5).double(),
        w,
        torch.full((5, 12), 2.5).double(),
        mask,
        torch.zeros(5, dtype=torch.bool),
    )
    held, _ = lens.relax(et, x, b, 0.3, max_steps=2000, hold=clamp)
    assert torch.allclose(
        torch.einsum("sld,sd->sl", held, w)[:, 3], torch.tensor(2.5).double(), atol=1e-6
    )
    free, _ = lens.relax(et, x, b, 0.3, max_steps=2000)
    assert (held - free)[:, 4:].norm() > 0


def test_finite_difference_along_features_equals_the_gradient(et, field_and_state):
    b, x = field_and_state
    d = torch.nn.functional.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    a, fd = (
        lens.feature_gradient(et.grad_x(x, b), d),
        lens.finite_difference(lambda y: et.energy(y, b), x, d),
    )
    assert ((a - fd).abs().max() / a.abs().max()) < 1e-6


class DoubleWell:
    """Stands in for the model: E = (x^2 - 1)^2 per sequence, two minima, barrier 1."""

    activation = staticmethod(lambda x: x)
    energy = staticmethod(lambda x, _b: ((x**2 - 1) ** 2).sum((1, 2)))
    grad_g = staticmethod(lambda x, _b: 4 * x * (x**2 - 1))


def test_merge_tree_finds_the_wells_and_their_barriers():
    tree = lens.merge_tree(
        DoubleWell(), torch.tensor([[0.3, -0.2]]).double(), 0.02, rng(3), starts=80, neighbours=6
    )
    assert (
        np.isinf(tree.depth.iloc[0]) and (tree.depth > 0.5).sum() == 4
    )  # two coordinates, four wells
    assert (
        tree.depth.iloc[1:4].between(0.95, 2.0).all()
    )  # the saddle lies at E = 1; the graph can only overestimate it


# ------------------------------------------------------------------------------------ EFAS: known answers
def quadratic(h, seed=0, n=4000, theta=0.4):
    """Gaussian x, E = x^T H x / 2, one ReLU feature w, decoder d: f, A [S, L, 1] and the closed form of EFAS (Stein's lemma)."""
    r, dim = rng(seed), len(h)
    root = r.standard_normal((dim, dim)) / math.sqrt(dim)
    sigma = root @ root.T
    w, d = r.standard_normal(dim), r.standard_normal(dim)
    x = r.standard_normal((n, 100, dim)) @ root.T
    f, a = np.maximum(x @ w - theta, 0)[..., None], -(x @ h @ d)[..., None]
    s = math.sqrt(w @ sigma @ w)
    t = theta / s
    p, density = stats.norm.sf(t), stats.norm.pdf(t)
    mean = s * (density - t * p)
    variance = s * s * ((1 + t * t) * p - t * density) - mean**2
    return (
        torch.tensor(f),
        torch.tensor(a),
        -p * (w @ sigma @ h @ d) / math.sqrt(variance * (d @ h @ sigma @ h @ d)),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_efas_equals_its_closed_form(seed):
    m = rng(seed + 10).standard_normal((6, 6))
    f, a, expected = quadratic(m + m.T, seed, n=1000)
    r = lens.efas(f, a)["efas"].item()
    blocks = [lens.efas(x, y)["efas"].item() for x, y in zip(f.split(50), a.split(50), strict=True)]
    assert abs(r - expected) < 3 * np.std(blocks) / math.sqrt(len(blocks))


def test_efas_signs_and_invariances():
    r = rng(5)
    x, w = r.standard_normal((100, 20, 6)), r.standard_normal((6, 4))
    f = torch.tensor(np.maximum(x @ w, 0))
    pull = torch.tensor(x @ w)  # H = I, d = w: A = -x.w
    assert (lens.efas(f, -pull)["efas"] < -0.5).all() and (lens.efas(f, pull)["efas"] > 0.5).all()
    base = lens.efas(f, pull)
    order = torch.randperm(100)
    for changed in (
        lens.efas(3 * f, pull),
        lens.efas(f, 2 * pull),
        lens.efas(f[order], pull[order]),
        lens.efas(f, pull + 0.0),
    ):
        assert torch.allclose(changed["efas"], base["efas"]) and torch.allclose(
            changed["efas_on"], base["efas_on"]
        )
    assert torch.allclose(lens.efas(f, -pull)["attribution"], -base["attribution"])
    on = (f > 0)[..., 0]
    assert base["efas_on"][0] == pytest.approx(
        stats.pearsonr(f[..., 0][on], pull[..., 0][on]).statistic
    )
    assert base["attribution"][0] == pytest.approx((f * pull)[..., 0][on].mean().item())


def settings(**changes):
    return argparse.Namespace(**dict(permutations=200, directions=400, seed=0) | changes)


def planted(seed=0, k=100, n_planted=20):
    """x independent of E's background; E = E0 - sum_k a_k f_k(x) on the first features, all directions orthogonal."""
    r = rng(seed)
    q = np.linalg.qr(r.standard_normal((k + 20, k + 20)))[0][:k]
    background = r.standard_normal((S, L, k + 20)) + r.standard_normal((S, 1, k + 20))
    x = r.standard_normal((S, L, k + 20)) + 0.5 * r.standard_normal((S, 1, k + 20))
    x, q = torch.tensor(x, dtype=torch.float32), torch.tensor(q, dtype=torch.float32)
    sae = lens.SAE(q.T.contiguous(), torch.full((k,), -1.2), q, torch.zeros(k + 20))
    strength = torch.zeros(k)
    strength[:n_planted] = torch.linspace(1, 2, n_planted)
    gx = torch.tensor(background, dtype=torch.float32) - ((sae.encode(x) > 0) * strength) @ q
    return x, gx, sae, strength


def test_the_gradient_of_the_tokens_has_the_same_bits_every_time_on_two_threads():
    """Indexing a parameter would add up its gradient in whatever order the threads come (atomically), to other bits each time."""
    before, found = torch.get_num_threads(), set()
    ids = torch.randint(0, 60, (64, 32), generator=torch.Generator().manual_seed(1))
    try:
        torch.set_num_threads(2)
        for _ in range(40):
            torch.manual_seed(0)
            et = lens.EnergyTransformer(2000, 32)
            et.field(ids).square().sum().backward()
            found.add(et.emb.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_planted_features_are_found_with_their_attribution():
    shares = []
    for seed in range(8):
        x, gx, sae, strength = planted(seed)
        f = sae.encode(x)
        found = lens.fdr(p_values(f, lens.feature_gradient(gx, sae.w_dec))) < 0.05
        shares.append((found[:20].mean(), found[20:].sum() / max(1, found.sum())))
    power, false = np.array(shares).T
    assert power.mean() > 0.9 and false.mean() <= 0.05

    layer = lens.analyse_layer(0, x, gx, torch.randn(S, L), sae, torch.zeros(S), settings())
    table, summary = lens.call_aligned([layer])
    found = (table.q_token < 0.05).to_numpy()
    f = sae.encode(x)
    expected = (strength * f.sum((0, 1)) / (f > 0).sum((0, 1)))[:20].numpy()
    pull = lens.feature_gradient(gx, sae.w_dec)
    for half, rows in (
        ("efas_a", slice(0, None, 2)),
        ("efas_b", slice(1, None, 2)),
    ):  # interventions use the odd rows, unseen by efas_a
        assert np.allclose(
            table[half], lens.pearson(lens.sequence_sums(f[rows], pull[rows]))[0], atol=1e-6
        )
    per_sequence = (f * lens.feature_gradient(gx, sae.w_dec)).sum(1)[:, :20]
    error = per_sequence.std(0).numpy() * math.sqrt(S) / table.n_active[:20].to_numpy()
    assert (np.abs(table.attribution[:20] - expected) < 4 * error).all()
    assert (table.efas[:20] > 0).all() and table.replicates[:20].all()
    assert summary.token_null.iloc[0] == found.sum()
    assert np.corrcoef(table.p_mc, table.p_token)[0, 1] > 0.99


def p_values(f, a, strata=None):
    moments = lens.seqperm_moments(
        f, lens.rank_normal(a), torch.zeros(len(f)) if strata is None else strata
    )
    return 2 * stats.norm.sf(moments.z_of(moments.observed).abs().numpy())


def iid_p_values(f, a):
    """The wrong null: tokens exchanged freely."""
    y, n = lens.rank_normal(a).double(), f.shape[0] * f.shape[1]
    z = ((f * y).sum((0, 1)) - f.sum((0, 1)) * y.mean((0, 1))) / (
        math.sqrt(n) * f.double().std((0, 1)) * y.std((0, 1))
    )
    return 2 * stats.norm.sf(z.abs().numpy())


def test_null_is_calibrated_and_the_iid_null_is_not():
    right, wrong, false = [], [], 0
    for seed in range(20):
        f, a = structured(seed, 200)
        p = p_values(f, a)
        right.append(p)
        wrong.append(iid_p_values(f, a))
        false += (lens.fdr(p) < 0.05).any()
    assert stats.kstest(np.concatenate(right), "uniform").pvalue > 1e-3
    assert false / 20 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 20)
    assert stats.kstest(np.concatenate(wrong), "uniform").pvalue < 1e-6
    assert (np.concatenate(wrong) < 0.05).mean() > 0.07


def test_closed_form_moments_equal_monte_carlo_and_brute_force():
    f, a = structured(3, 24)
    strata = torch.tensor([0] * 80 + [1] * 40)
    perms = lens.permutations(strata, 6000, rng())
    assert all((strata[row.long()] == strata).all() for row in perms[:50])
    moments = lens.seqperm_moments(f, a, strata)
    t = lens.seqperm_mc(f, a, perms, chunk=7, block=9).double()
    assert np.median((t.var(0) / moments.var).numpy()) == pytest.approx(1, abs=0.05)
    assert ((t.mean(0) - moments.mean).abs() < 4.5 * (moments.var / len(perms)).sqrt()).all()
    plain = lens.permuted_sums(f, a, perms[:20])
    assert torch.allclose(t[:20].float(), plain, rtol=1e-3, atol=1e-2)


def test_dead_constant_and_rare_features_are_excluded():
    x, gx, sae, _ = planted(k=30, n_planted=3)
    sae.b_enc[5], sae.w_enc[:, 5] = -1.0, 0.0  # dead
    sae.b_enc[6], sae.w_enc[:, 6] = 1.0, 0.0  # constant
    top = (x @ sae.w_enc[:, 7]).max()
    sae.b_enc[7] = -(top - 1e-4)  # one active token
    layer = lens.analyse_layer(0, x, gx, torch.randn(S, L), sae, torch.zeros(S), settings())
    table, _ = lens.call_aligned([layer])
    bad = table.iloc[[5, 6, 7]]
    assert (
        not bad.eligible.any()
        and not bad.aligned.any()
        and bad[["efas", "p_token", "q_token", "q_direction"]].isna().all(axis=None)
    )
    assert table.n_active[7] == 1 and table.q_token[table.eligible].notna().all()
    sae.b_enc[:] = -1e6
    nothing = lens.analyse_layer(0, x, gx, torch.randn(S, L), sae, torch.zeros(S), settings())
    table, summary = lens.call_aligned([nothing])
    assert summary.eligible.iloc[0] == 0 and not table.aligned.any()


def test_finite_differences_give_the_same_table():
    x, _, sae, _ = planted(k=12, n_planted=0)
    x, h = x[:60], torch.linspace(-1, 1, 32)

    def energy(y):
        return (h * y**2 / 2 + 0.1 * y**3).sum((1, 2))

    gx, strata, few = h * x + 0.3 * x**2, torch.zeros(60), torch.tensor([1, 4, 7])
    args = (0, x, gx, torch.randn(60, L), sae, strata, settings())
    slow = lens.analyse_layer(
        *args, slope=lambda d: lens.finite_difference(energy, x.double(), d), features=few
    ).features
    fast = lens.analyse_layer(*args).features.set_index("feature").loc[few.numpy()]
    assert len(slow) == 3 and slow.eligible.all()
    for name in ("efas", "efas_on", "attribution", "z_token"):
        assert np.allclose(slow[name], fast[name], rtol=1e-3, atol=1e-3)


def test_random_directions_do_not_pass_the_direction_null():
    r = rng(8)
    mix = r.standard_normal((16, 16))
    x = torch.tensor(r.standard_normal((S, L, 16)) @ mix, dtype=torch.float32)
    gx = -torch.tanh(x) * 3 + 0.1 * x.roll(
        1, 1
    )  # a strong structural bias, of which the token null sees an effect everywhere
    u = torch.nn.functional.normalize(
        torch.tensor(r.standard_normal((300, 16)) @ mix, dtype=torch.float32), dim=-1
    )
    scale = (x.flatten(0, 1) @ u.T).std(0)
    sae = lens.SAE(u.T.contiguous(), -1.5 * scale, u, torch.zeros(16))
    layer = lens.analyse_layer(
        0, x, gx, torch.randn(S, L), sae, torch.zeros(S), settings(directions=1500)
    )
    table, _ = lens.call_aligned([layer])
    assert (table.q_token < 0.05).mean() > 0.9
    assert stats.kstest(table.p_direction.dropna(), "uniform").pvalue > 1e-3
    assert table.aligned.mean() <= 0.05


def test_random_directions_equal_explicit_features():
    """Each direction as a feature of its own: thresholded by sorting, correlated by NumPy."""
    r = rng(9)
    n_tokens, dim, n = 700, 8, 250
    x = tensor(r.standard_normal((n_tokens, dim)) @ r.standard_normal((dim, dim)) + 3)
    gx = torch.tanh(x) - 0.3 * x.roll(1, 1) + 1
    n_active = torch.tensor([30, 41, 97, 333, 640])  # some lie between the numbers of the table
    inside = torch.arange(n_tokens) % 14 > 0  # the others fire nowhere, but are tokens
    null = lens.direction_null(x, gx, inside, n_active, n, rng(1))
    u = lens.random_directions(x[inside] - x[inside].mean(0), n, rng(1))
    assert torch.allclose(u.norm(dim=1), torch.ones(n), atol=1e-5)
    found = null.at(n_active)
    for k, number in enumerate(n_active.tolist()):
        for i in range(0, n, 25):
            projection = (x @ u[i]).double().numpy()
            threshold = np.sort(projection[inside])[::-1][number]
            f = np.maximum(projection - threshold, 0) * inside.numpy()
            pull = -(gx @ u[i]).double().numpy()
            by_hand = np.corrcoef(f, pull)[0, 1]
            exact = number in null.n_active.tolist()
            assert found[k, i].item() == pytest.approx(by_hand, abs=2e-5 if exact else 0.02)


def test_random_directions_have_the_covariance_of_the_states():
    r = rng(10)
    x = tensor(r.standard_normal((60, 5)) @ r.standard_normal((5, 5)))
    centred = x - x.mean(0)
    u = lens.random_directions(centred, 20_000, rng(2)).double()
    mixes = torch.nn.functional.normalize(tensor(r.standard_normal((20_000, 60))) @ centred, dim=-1)
    expected = (mixes.T @ mixes / len(mixes)).double()
    assert torch.allclose(u.T @ u / len(u), expected, atol=5 * 20_000**-0.5)


@pytest.mark.parametrize(
    "n, family, fewest", [(2000, 6144, 123), (24_000, 2048, 4), (24_000, 6144, 11), (300, 296, 40)]
)
def test_the_fewest_that_counting_can_find(n, family, fewest):
    """Benjamini and Hochberg themselves: of `family` tests, so many at the smallest p there is."""
    smallest = 2 / (1 + n)
    assert lens.smallest_p(n)[0] == smallest
    assert lens.fewest_findable(smallest, family) == fewest
    for at_floor, passing in ((fewest - 1, 0), (fewest, fewest)):
        p = np.full(family, 0.999)
        p[:at_floor] = smallest
        assert (lens.fdr(p) < 0.05).sum() == passing


def test_mutual_information_of_known_cases():
    r = rng(2)
    f = torch.tensor(np.maximum(r.standard_normal((8000, 3)) - 0.5, 0), dtype=torch.float32)
    a = torch.tensor(r.standard_normal((8000, 3)), dtype=torch.float32)
    a[:, 1] = f[:, 1]
    mi, h = lens.mi_binned(f, lens.rank_normal(a[:, None])[:, 0])
    assert abs(mi[0]) < 1.5e-3 and mi[1] > 0.75 * h[1]
    p = np.array([(f[:, 0] == 0).double().mean()])
    low = (1 - p) / 2
    assert h[0] == pytest.approx(-(p * np.log(p) + 2 * low * np.log(low)).item(), abs=2e-3)


def test_fdr_ignores_nan():
    p = np.array([0.001, np.nan, 0.02, 0.9])
    q = lens.fdr(p)
    assert np.isnan(q[1]) and q[[0, 2, 3]] == pytest.approx(
        stats.false_discovery_control(p[[0, 2, 3]])
    )
    assert np.isnan(lens.fdr(np.array([np.nan]))).all()


def test_noise_line_is_the_null_of_r_at_eight_tokens():
    r = rng(0)
    x, y = r.standard_normal((2, 40000, 8))
    c = np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(x[:8000], y[:8000], strict=True)])
    mean, q95 = (float(v) for v in __import__("re").findall(r"0\.\d{3,}", lens.noise_line()))
    assert mean == pytest.approx(c[c > 0.1].mean(), abs=0.01) and q95 == pytest.approx(
        np.quantile(c[c > 0.1], 0.95), abs=0.015
    )


# ------------------------------------------------------------------------------------ SAE and interventions
@pytest.mark.parametrize("optimiser", ["lbfgs", "adam"])
def test_sae_explains_a_sparse_dictionary(optimiser):
    r = rng(4)
    atoms = r.standard_normal((24, 12))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    code = r.uniform(1, 3, (3000, 24)) * (r.random((3000, 24)) < 0.06)
    x = torch.tensor(5 + 7 * code @ atoms, dtype=torch.float32)
    # Adam needs 180 iterations to find the atoms from any seed, not only from a good one.
    iterations = 60 if optimiser == "lbfgs" else 180
    sae = lens.train_sae(x[:2000], 48, 0.4, iterations, optimiser, 0)
    score = sae.score(x[2000:])
    assert score["fvu"] < 0.2 and score["l0"] < (8 if optimiser == "lbfgs" else 14)
    assert torch.allclose(sae.w_dec.norm(dim=1), torch.ones(48), atol=1e-5)
    assert (sae.w_dec @ torch.tensor(atoms.T, dtype=torch.float32)).max(0).values.median() > 0.9


def test_report_says_where_the_sae_explains_nothing():
    """Tokens that share nothing but their noise: fitted on 64 of them, an SAE of 512 atoms predicts others worse than the mean."""
    g = torch.Generator().manual_seed(0)
    noise, good = (
        torch.randn(2, 64, 16, generator=g),
        torch.randn(2048, 3, generator=g).relu() @ torch.randn(3, 16, generator=g),
    )
    poor, rich = (
        lens.train_sae(noise[0], 512, 3.0, 30, "lbfgs", 0),
        lens.train_sae(good[:1024], 64, 3.0, 100, "lbfgs", 0),
    )
    fvu = {3: poor.score(noise[1])["fvu"], 5: rich.score(good[1024:])["fvu"]}
    rows = [dict(layer=l, dictionary="SAE, lbfgs", n_fit_tokens=64, fvu=x) for l, x in fvu.items()]
    table = pd.DataFrame(
        rows + [dict(layer=l, dictionary="one atom a token id + position", fvu=0.5) for l in fvu]
    )
    said = lens.sae_line(table)
    assert "At layer 3 the SAE explains nothing" in said and "at 1 of 2 layers" in said
    assert "explains nothing" not in lens.sae_line(table[table.layer == 5])


def test_sae_refuses_bad_states():
    with pytest.raises(lens.HandoffError, match="smaller than the state"):
        lens.train_sae(torch.randn(50, 8), 4, 0.1, 2, "lbfgs", 0)
    with pytest.raises(lens.HandoffError, match="NaN"):
        lens.train_sae(torch.full((50, 8), math.nan), 16, 0.1, 2, "lbfgs", 0)


def test_integrated_gradients_are_complete_and_attribution_is_first_order(et, field_and_state):
    b, x = field_and_state
    d = torch.nn.functional.normalize(torch.randn(6, 24), dim=-1)
    sae = lens.SAE(d.T.contiguous(), torch.zeros(6), d, torch.zeros(24))
    features = pd.DataFrame(dict(feature=range(6)))
    t = lens.ablate(
        lambda y, i: et.energy(y, b[i]),
        lambda y, i: et.grad_x(y, b[i]),
        x,
        et.grad_x(x, b),
        sae,
        features,
        5,
        steps=16,
        doses=(1e-4, 1.0),
    )
    small, full = t[t.eps < 1], t[t.eps == 1]
    assert np.allclose(small.attribution, small.energy_change, rtol=1e-2, atol=1e-7)
    assert np.allclose(full.integrated_gradients, full.energy_change, rtol=2e-2, atol=0.05)


def test_concepts_find_a_planted_class():
    r = rng(1)
    classes = np.where(r.random((S, L)) < 0.1, "number", "word")
    f = torch.tensor(
        np.stack(
            [
                (classes == "number") * r.random((S, L)),
                np.maximum(r.standard_normal((S, L)) - 1, 0),
            ],
            -1,
        ),
        dtype=torch.float32,
    )
    members = {name: classes == name for name in lens.CLASSES}
    perms = lens.permutations(torch.zeros(S), 2000, rng(2))
    t = lens.concept_features(f, members, torch.zeros(S), perms, np.array([3, 9])).set_index(
        ["token_class", "feature"]
    )
    floor = 1 / 2001 / lens.REACH  # the smallest p of 2,000 permutations and their tail
    assert t.auroc["number", 3] > 0.99 and t.lift["number", 3] > 8
    assert t.p["number", 3] == pytest.approx(floor) and t.q["number", 3] <= floor * len(t)
    assert abs(t.auroc["number", 9] - 0.5) < 0.06 and t.q["number", 9] > 0.01


# ------------------------------------------------------------------------------------ corpus and command line
def test_corpus_is_split_by_document():
    texts = {f"doc{i}": f"name{i} " * 40 for i in range(400)}
    corpus = lens.build_corpus(texts, 60, 0, vocab_size=600)
    words = {corpus.vocab[i] for i in corpus.test.flatten().tolist()} & {
        f"name{i}" for i in range(400)
    }
    train = {corpus.vocab[i] for i in corpus.train.flatten().tolist()}
    assert not words & train and len(corpus.test) == 60 and (corpus.strata == 1).sum() == 15
    with pytest.raises(lens.HandoffError, match="not enough data"):
        lens.build_corpus({"a": "few words"}, 60, 0)


def test_classes_see_tokens_as_they_are_written(monkeypatch):
    """The model's tokens are lower-cased; a class more is an entry more, and leaves the others as they are."""
    texts = {
        f"doc{i}": "Berlin and \u0130zmir lie at 12\u212a , rivers do (too) " * 8
        for i in range(400)
    }
    corpus = lens.build_corpus(texts, 60, 0)
    tokens = [[corpus.vocab[i] for i in row] for row in corpus.test.tolist()]
    assert all(
        form.lower() == token
        for form, token in zip(corpus.written.ravel(), np.ravel(tokens), strict=True)
    )
    before = lens.class_members(corpus.test, corpus.written)
    monkeypatch.setitem(lens.CLASSES, "capitalised", r"[A-Z][a-z]*")
    members = lens.class_members(corpus.test, corpus.written)
    assert set(corpus.written[members["capitalised"]]) >= {"Berlin", "K"}
    assert all((members[name] == before[name]).all() for name in before)
    assert (
        set(corpus.written[members["number"]]) >= {"12"} and "(" in corpus.written[members["regex"]]
    )
    corpus.test[0, 0] = lens.UNK
    assert not any(
        member[0, 0] for member in lens.class_members(corpus.test, corpus.written).values()
    )


def test_a_predictor_is_one_function_and_one_entry(et, field_and_state, monkeypatch, tmp_path):
    b, x = field_and_state
    d = torch.nn.functional.normalize(
        torch.randn(6, 24, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    sae = lens.SAE(d.T.contiguous(), torch.zeros(6), d, torch.zeros(24))
    features = pd.DataFrame(
        dict(
            feature=range(6),
            efas_a=np.linspace(-1, 1, 6),
            efas_on_a=0.1,
            attribution_a=np.linspace(2, -1, 6),
            magnitude_a=np.linspace(1, 3, 6),
            n_active_a=np.arange(6) + 30,
            aligned=False,
            cluster=np.arange(6),
        )
    )

    def run():
        energy, slope = (lambda y, i: et.energy(y, b[i])), (lambda y, i: et.grad_x(y, b[i]))
        effects = lens.ablate(energy, slope, x, et.grad_x(x, b), sae, features, 5)
        return effects, *lens.predicted_versus_actual(effects, features, 0)

    before = run()

    def gradient_norm(ablation):
        return (ablation.gradient.norm(dim=-1) * (ablation.active.f > 0)).sum(1)

    new = lens.Predictor("|dE/dx|", gradient_norm, "tokens", signed=False, drawn=True)
    monkeypatch.setitem(lens.PREDICTORS, "gradient_norm", new)
    effects, scores, points = run()
    for table, old in zip((effects, points), (before[0], before[2]), strict=True):
        assert (table.gradient_norm >= 0).all() and table.gradient_norm.any()
        pd.testing.assert_frame_equal(table.drop(columns="gradient_norm"), old)
    pd.testing.assert_frame_equal(
        scores[scores.predictor != "gradient_norm"].reset_index(drop=True), before[1]
    )
    assert set(scores[scores.predictor == "gradient_norm"].scale) == {"absolute"}
    drawn = []
    save_figure = lens.save_figure
    monkeypatch.setattr(
        lens, "save_figure", lambda draw, path: [drawn.append(draw(False)), save_figure(draw, path)]
    )
    lens.draw_predicted(points, scores, tmp_path / "p.png")
    # The same quantity stands on the y axis of all panels
    assert len({ax.get_ylim() for ax in drawn[0].axes}) == 1 < len(drawn[0].axes)
    assert "|dE/dx|" in (tmp_path / "p.svg").read_text()  # a panel of its own


TINY = (
    "--preset smoke --train_steps 4 --sequences 48 --sae_dict_size 128 --sae_iterations 3 --permutations 60 --directions 60 "
    "--energy_layers 1 --intervened 4 --relaxed 2"
)


def test_the_command_writes_everything_it_names(tmp_path):
    out = tmp_path / "out"
    argv = [*TINY.split(), "--save_dir", str(out), "--cache_dir", str(tmp_path)]
    assert lens.main(argv) == 0
    report = (out / "research_report.md").read_text()
    for headline in ("496", "0.8559", "0.3775", "0.7388", "7 regex", "0.67", "30 minutes"):
        assert headline in report
    layers = pd.read_csv(out / "layers.csv").iloc[0]
    assert f"{int(layers.fewest_counted)} must lie beyond all of them" in report
    assert f"{int(layers.fewest)} could have passed" in report
    assert "with the document as the unit" in report and "Within documents" in report
    page = (out / "research_report.html").read_text()
    assert page.count('<div class="wide"><svg') == report.count("![") >= 3
    assert "<img" not in page and 'src="http' not in page
    raw = json.loads((out / "raw_results.json").read_text())
    assert (
        len(raw["tables"]["features"]) == 128
        and json.loads((out / "run.json").read_text())["exit_status"] == 0
    )
    assert lens.main(argv) == 1  # refuses to overwrite


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_legend_of_the_distribution_is_not_clipped(layers, tmp_path):
    rows = [
        (layer, s, x, 1.0)
        for layer in range(layers)
        for s in ("features", "sequences permuted", "random directions")
        for x in (-1, 1)
    ]
    path = tmp_path / "d.png"
    lens.draw_distribution(
        pd.DataFrame(rows, columns=["layer", "source", "efas", "density"]), path, "block"
    )
    picture = plt.imread(path)[..., :3]
    assert (
        (picture[:, [0, -1]] == 1).all() and (picture[[0, -1]] == 1).all() and picture.min() < 0.2
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--energy_layers 99",
        "--sae_dict_size 5",
        "--sequences 12",
        "--permutations 0",
        "--optimiser sgd",
        "--step_size nan",
    ],
)
def test_bad_flags_exit_2(flags, tmp_path):
    with pytest.raises(SystemExit) as e:
        lens.main([*flags.split(), "--save_dir", str(tmp_path / "x")])
    assert e.value.code == 2 and not (tmp_path / "x").exists()


def test_missing_corpus_is_one_line(tmp_path, capsys):
    assert (
        lens.main(
            [
                "--preset",
                "smoke",
                "--corpus",
                str(tmp_path / "no.txt"),
                "--save_dir",
                str(tmp_path / "x"),
            ]
        )
        == 1
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be read" in error and "Traceback" not in error


# ------------------------------------------------------------------------------------ copies among the features
def test_the_dictionary_starts_at_tokens_drawn_without_replacement(monkeypatch):
    """Unfitted, the decoder is the start: as many latents as tokens start at all of them."""
    monkeypatch.setitem(lens.OPTIMISERS, "none", lambda *_: None)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
    for n_latents, n_distinct in ((256, 256), (100, 100), (400, 256)):
        start = lens.train_sae(x, n_latents, 0.1, 1, "none", 3).w_dec
        nearest = (start @ z.T).argmax(1)
        assert (start * z[nearest]).sum(1).min() > 0.95
        assert len(nearest.unique()) == n_distinct


def near_copies(n_clusters, n_each, d=64, noise=0.15, seed=0):
    """Unit directions [n_clusters * n_each, D]: noisy copies, with either sign, of orthogonal ones."""
    r = rng(seed)
    centres = np.linalg.qr(r.standard_normal((d, d)))[0][:n_clusters]
    copies = np.repeat(centres, n_each, 0)
    copies = copies + noise * r.standard_normal(copies.shape) / math.sqrt(d)
    copies *= r.choice([-1, 1], (len(copies), 1))
    return torch.nn.functional.normalize(torch.tensor(copies, dtype=torch.float32), dim=-1)


@pytest.mark.parametrize("noise", [0.0, 0.15, 0.5, 3.0])
def test_clusters_are_those_of_single_linkage(noise):
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    d = near_copies(12, 9, noise=noise)[torch.randperm(108)]
    distance = 1 - (d @ d.T).abs().double().numpy()
    np.fill_diagonal(distance, 0)
    expected = fcluster(
        linkage(squareform(distance, checks=False).clip(0), "single"), 0.1, "distance"
    )
    found = lens.copy_clusters(d)
    pairs = set(zip(found.tolist(), expected.tolist(), strict=True))
    assert len(pairs) == len(set(found)) == len(set(expected))  # the same partition
    assert set(found) == set(range(len(set(found))))
    eigenvalues = np.linalg.eigvalsh((d @ d.T).double().numpy())
    ratio = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert lens.participation_ratio(d) == pytest.approx(ratio, rel=1e-4)
    if noise < 0.2:
        assert len(set(found)) == 12
        assert lens.participation_ratio(d) == pytest.approx(12, abs=0.5)
    assert lens.participation_ratio(torch.eye(7)) == pytest.approx(7)
    assert lens.participation_ratio(torch.zeros(0, 7)) == 0


def copied_features(n_each=10, seed=0):
    """x, gx, an SAE and the planted clusters: 5 directions with n_each near-copies that the energy
    pulls along, and 5 with as many that it does not."""
    r = rng(seed)
    d = near_copies(10, n_each, seed=seed)
    x = r.standard_normal((S, L, 64)) + 0.5 * r.standard_normal((S, 1, 64))
    x = torch.tensor(x, dtype=torch.float32)
    sae = lens.SAE(d.T.contiguous(), torch.full((len(d),), -1.2), d, torch.zeros(64))
    pulled = d[: 5 * n_each : n_each]  # one copy of each of the first five
    noise = torch.tensor(r.standard_normal((S, L, 64)), dtype=torch.float32)
    gx = noise - 8 * torch.relu(x @ pulled.T - 1.2) @ pulled
    return x, gx, sae


def test_a_count_of_features_has_its_clusters_beside_it():
    x, gx, sae = copied_features()
    layer = lens.analyse_layer(0, x, gx, torch.randn(S, L), sae, torch.zeros(S), settings())
    table, summary = lens.call_aligned([layer])
    row = summary.iloc[0]
    assert table.cluster.nunique() == 10 == row.eligible_clusters
    assert row.eligible == 100
    assert row.eligible_participation == pytest.approx(10, abs=0.5)
    passing = table[table.q_token < 0.05]
    assert row.token_null == len(passing) > row.token_null_clusters == passing.cluster.nunique()
    for name in ("token_null", "token_null_by", "token_null_maxt", "direction_null", "aligned"):
        assert row[f"{name}_participation"] <= row[f"{name}_clusters"] + 0.5 <= row[name] + 0.5
    shown = lens.upright(summary).set_index("layer")["0"]
    said = f"{row.token_null:g} ({row.token_null_clusters:g}; {row.token_null_participation:.1f})"
    assert shown["token_null (clusters; participation ratio)"] == said
    assert not shown.index.str.contains("_clusters").any()


def test_few_clusters_are_not_hidden_by_many_copies():
    """The interval of the median |EFAS|: copies add nothing to what is known."""
    r = rng(0)
    efas = np.repeat(r.uniform(0, 0.5, 8), 40)
    clusters = pd.Series(np.repeat(np.arange(8), 40))
    boot = np.tile(efas, (200, 1))
    many = lens.median_interval(boot, pd.Series(efas), clusters)
    few = lens.median_interval(boot[:, ::40], pd.Series(efas[::40]), clusters[::40])
    width = [i["median_ci_hi"] - i["median_ci_lo"] for i in (many, few)]
    assert width[0] > 0.7 * width[1] > 0.05


# ------------------------------------------------------------------------------------ prediction on equal terms
def test_predictors_of_the_other_half_are_blind_to_what_is_intervened_on():
    x, gx, sae, _ = planted(k=30, n_planted=10)
    args = (torch.randn(S, L), sae, torch.zeros(S), settings())
    before = lens.analyse_layer(0, x, gx, *args).features
    other_x = x.clone()
    other_gx = gx.clone()
    other_x[1::2] = other_x[1::2].roll(1, 0) * 1.3
    other_gx[1::2] = torch.randn(S // 2, L, gx.shape[-1])
    after = lens.analyse_layer(0, other_x, other_gx, *args).features
    assert not np.allclose(before.attribution, after.attribution)
    blind = lens.predictors_of("feature")
    assert {"efas_a", "attribution_a", "magnitude_a"} <= set(blind)
    for name, predictor in blind.items():
        values = predictor.function(before).to_numpy()
        assert np.isfinite(values).all(), name
        assert np.array_equal(values, predictor.function(after).to_numpy()), name
    # by hand
    f = sae.encode(x[::2])
    a = -(gx[::2] @ sae.w_dec.T)
    mean = [(f[..., k] * a[..., k])[f[..., k] > 0].mean().item() for k in range(30)]
    square = [(f[..., k] ** 2)[f[..., k] > 0].mean().item() for k in range(30)]
    on = [
        stats.pearsonr(f[..., k][f[..., k] > 0], a[..., k][f[..., k] > 0]).statistic
        for k in range(30)
    ]
    assert np.allclose(before.attribution_a, mean, rtol=1e-4)
    assert np.allclose(before.magnitude_a, square, rtol=1e-4)
    assert np.allclose(before.efas_on_a, on, atol=1e-4)
    assert np.array_equal(before.n_active_a, (f > 0).sum((0, 1)))


def made_up_effects(n_features=40, n_seq=12, seed=0):
    """Ablations whose change per token is that of the feature, and features that predict it."""
    r = rng(seed)
    change = r.standard_normal(n_features)
    rows = []
    for eps in (0.05, 1.0):
        for k in range(n_features):
            for s in r.choice(60, n_seq, replace=False):
                n = r.integers(1, 5)
                noise = 0.1 * r.standard_normal()
                rows.append((k, eps, s, n * (eps * change[k] + noise), n, 0.0, 0.0, 0.0, 0.0))
    names = "feature eps sequence energy_change n_active attribution integrated_gradients f f2"
    rows = [(*row[:5], row[3], row[3], row[4], row[4]) for row in rows]
    effects = pd.DataFrame(rows, columns=names.split())
    columns = {
        "feature": np.arange(n_features),
        "efas_a": change + r.standard_normal(n_features),
        "attribution_a": change + 0.3 * r.standard_normal(n_features),
        "efas_on_a": r.standard_normal(n_features),
        "magnitude_a": np.abs(change),
        "n_active_a": r.integers(30, 40, n_features),
        "aligned": False,
        "cluster": np.arange(n_features) // 2,
    }
    return effects, pd.DataFrame(columns)


def test_the_difference_of_two_predictors_has_an_interval_from_the_same_draws():
    effects, features = made_up_effects()
    scores, _ = lens.predicted_versus_actual(effects, features, 0)
    signed = scores[scores.scale == "signed"].set_index(["eps", "predictor"])
    for eps in (0.05, 1.0):
        own = effects[effects.eps == eps].groupby("feature")[["energy_change", "n_active"]].sum()
        change = own.energy_change / own.n_active
        by_hand = {
            name: stats.spearmanr(features[name], change).statistic
            for name in ("efas_a", "attribution_a")
        }
        row = signed.loc[eps, "attribution_a"]
        assert row.spearman == pytest.approx(by_hand["attribution_a"])
        assert row.minus_efas == pytest.approx(by_hand["attribution_a"] - by_hand["efas_a"])
        assert row.minus_efas_lo < row.minus_efas < row.minus_efas_hi
        reference = signed.loc[eps, "efas_a"]
        assert reference[["minus_efas", "minus_efas_lo", "minus_efas_hi"]].tolist() == [0, 0, 0]
    assert (scores.n_clusters == 20).all()
    seen = scores.set_index("predictor").documents
    assert set(seen["attribution"]) == {"intervened tokens"}
    assert set(seen["attribution_a"]) == set(seen["efas_a"]) == {"other half"}
    table = lens.prediction_table(scores)
    doses = [f"eps {eps}{what}" for eps in ("0.05", "1") for what in ("", ", minus efas_a")]
    assert list(table.columns) == ["scale", "predictor", "documents", *doses]
    assert not table.isna().any(axis=None)
    assert len(table) == len(scores) / 2


def test_leaving_out_a_cluster_or_a_sequence_is_what_it_says():
    effects, features = made_up_effects()
    effects = effects[effects.eps == 1]
    left = lens.leave_out(effects, features.set_index("feature").cluster)
    predicted = features.set_index("feature").efas_a[left.numbers].to_numpy()
    rows = 1 + left.n_clusters + left.n_seq
    rho = lens.rank_correlation(
        np.tile(predicted, (rows, 1)), left.means["energy_change"], left.kept
    )

    def by_hand(own):
        sums = own.groupby("feature")[["energy_change", "n_active"]].sum()
        change = sums.energy_change / sums.n_active
        return stats.spearmanr(features.efas_a[change.index], change).statistic

    cluster = features.cluster[effects.feature].to_numpy()
    expected = [by_hand(effects)]
    expected += [by_hand(effects[cluster != c]) for c in range(20)]
    expected += [by_hand(effects[effects.sequence != s]) for s in effects.sequence.unique()]
    assert np.allclose(rho, expected)
    assert lens.rank_correlation(np.ones((1, 4)), np.arange(4.0)[None], np.ones((1, 4), bool)) == 0


# ------------------------------------------------------------------------------------ equal tokens
def test_both_dictionaries_see_the_same_tokens(tmp_path):
    argv = [*TINY.split(), "--sae_tokens", "500", "--save_dir", str(tmp_path / "o")]
    argv += ["--cache_dir", str(tmp_path)]
    args = lens.parse_args(argv)
    texts = lens.documents(args.corpus, args.cache_dir)
    corpus = lens.build_corpus(texts, args.sequences, args.seed)
    et = lens.untrained(corpus, 0).requires_grad_(False)
    study = lens.Study(args, et, et, corpus, math.nan, rng(), {})
    descents = lens.descend_corpus(study)
    assert descents.fit_ids.numel() == 512  # 500, in whole windows
    sae = lens.fit_sae(descents.fit_xs[1], args)
    rows = lens.dictionary_rows(1, descents, sae, corpus.test, args)
    table = pd.DataFrame(rows).set_index("dictionary")
    assert set(table.n_fit_tokens) == {512}

    # The trivial dictionary by hand, on those tokens
    fit = pd.DataFrame(descents.fit_xs[1].flatten(0, 1).numpy())
    position = np.tile(np.arange(32), len(descents.fit_ids))
    rest = fit - fit.groupby(position).transform("mean")
    atoms = rest.groupby(descents.fit_ids.flatten().numpy()).mean()
    ids = corpus.test.flatten().numpy()
    x = descents.xs[1].flatten(0, 1).numpy()
    by_position = fit.groupby(position).mean().to_numpy()[np.tile(np.arange(32), len(corpus.test))]
    error = x - by_position - atoms.reindex(ids).fillna(0).to_numpy()
    expected = (error**2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert table.fvu[lens.TOKEN_DICTIONARY] == pytest.approx(expected, rel=1e-3)
    said = lens.sae_line(pd.DataFrame(rows))
    assert "the same 512 tokens" in said


# ------------------------------------------------------------------------------------ passing features, one by one
def feature_table(n=60, n_aligned=12, layers=(0, 1), seed=0):
    """Rows of features.csv: aligned ones in clusters of three, the others each on its own."""
    r = rng(seed)
    tables = []
    for layer in layers:
        cluster = np.concatenate([np.arange(n_aligned) // 3, np.arange(n_aligned, n)])
        columns = {
            "layer": layer,
            "feature": r.permutation(n),
            "cluster": cluster.astype(float),
            "aligned": np.arange(n) < n_aligned,
            "eligible": True,
            "n_active": r.integers(30, 900, n),
            "n_seq": 20,
            "mean_active": r.uniform(1, 2, n),
            "efas": r.uniform(-1, 1, n),
            "z_direction": r.standard_normal(n),
            "q_direction": r.random(n),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def test_passing_features_are_of_many_clusters_and_have_matches():
    features = feature_table()
    found = lens.passing_and_matched(features, 8, rng())
    passing = found[found.group == "aligned"].set_index(["layer", "pair"])
    matched = found[found.group == "matched"].set_index(["layer", "pair"])
    assert len(passing) == len(matched) == 8
    assert passing.aligned.all() and not matched.aligned.any()
    assert not passing.reset_index().duplicated(["layer", "cluster"]).any()
    assert not found.duplicated(["layer", "feature"]).any()
    apart = np.abs(np.log(passing.n_active) - np.log(matched.n_active.loc[passing.index]))
    rates = np.log(features.n_active.to_numpy())
    assert apart.mean() < 0.5 * np.abs(rates[:, None] - rates).mean()

    none = features.assign(aligned=False)
    found = lens.passing_and_matched(none, 5, rng())
    strongest = found[found.group == "strongest"]
    one_a_cluster = none.assign(size=none.z_direction.abs()).sort_values("size", ascending=False)
    one_a_cluster = one_a_cluster.drop_duplicates(["layer", "cluster"]).head(5)
    assert set(strongest.z_direction) == set(one_a_cluster.z_direction)
    assert not found.aligned.any() and (found.group == "matched").sum() == 5
    own = strongest[["layer", "cluster"]].apply(tuple, axis=1)
    others = found[found.group == "matched"][["layer", "cluster"]].apply(tuple, axis=1)
    assert not set(own) & set(others), "a match is no copy"
    assert not len(lens.passing_and_matched(features.assign(eligible=False), 5, rng()))


def test_what_a_feature_fires_on_is_told_as_it_is():
    ids = torch.randint(5, 50, (30, 16), generator=torch.Generator().manual_seed(0))
    f = torch.zeros(30, 16, 2)
    f[..., 0] = (ids == 7) * 1.0  # one token
    f[..., 1] = torch.rand(30, 16, generator=torch.Generator().manual_seed(1)) < 0.2
    f[3, 5, 1] = 9.0
    chosen = feature_table(layers=(0,)).iloc[[0, 20]].assign(group=["aligned", "matched"], pair=0)
    numbers = chosen.feature.to_list()
    rows = []
    for k, changes in zip(numbers, ([2.0, 4.0, 6.0], [1.0, -1.0, 0.0]), strict=True):
        for s, change in enumerate(4 * changes):
            rows.append(dict(feature=k, sequence=s, energy_change=change, n_active=2))
    found = lens.look_at(chosen, f, ids, lambda some: [f" {i}" for i in some], pd.DataFrame(rows))
    one = found.iloc[0]
    assert one.distinct_share == pytest.approx(1 / (ids == 7).sum().item())
    assert one.token_entropy == 0 and one.top_token == " 7" and one.top_token_share == 1
    assert one.context_1.count("« 7»") == 1
    assert one.energy_change == 2 and one.ci_lo < 2 < one.ci_hi and one.n_seq_ablated == 12
    many = found.iloc[1]
    fired = ids[f[..., 1] > 0].numpy()
    shares = np.unique(fired, return_counts=True)[1] / len(fired)
    assert many.token_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert many.distinct_share == pytest.approx(len(shares) / len(fired))
    row = [f" {i}" for i in ids[3].tolist()]
    assert many.context_1 == "".join(row[:5]) + f"«{row[5]}»" + "".join(row[6:14])
    assert many.ci_lo <= 0 <= many.ci_hi

    apart = lens.against_matched(found).set_index("quantity")
    assert apart.difference["energy_change"] == 2 and apart.n_pairs.unique() == [1]
    assert math.isnan(apart.ci_lo["energy_change"]), "one pair has no interval"
    blocks = lens.looked_at_section(found, "energy", "This took 1 s")
    assert any("per active token" in str(value) for _, value in blocks)


def test_features_that_are_active_everywhere_are_ablated_in_different_sequences():
    x = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(0))
    d = torch.eye(16)[:10]
    sae = lens.SAE(d.T.contiguous(), torch.full((10,), 5.0), d, torch.zeros(16))
    used = [lens.where_active(sae, k, x, 4).sequences for k in range(10)]
    assert all(len(own) == 4 == len(own.unique()) for own in used)
    assert len(torch.cat(used).unique()) == 40
    rare = lens.SAE(d.T.contiguous(), torch.full((10,), -1.8), d, torch.zeros(16))
    for k in range(10):
        own = lens.where_active(rare, k, x, 30)
        expected = ((x[..., k] - 1.8) > 0).any(1).nonzero()[:, 0]
        assert len(expected) <= 30 and torch.equal(own.sequences, expected)
        assert torch.allclose(own.f, (own.x[..., k] - 1.8).relu())


# ---- texts and tokens as they are
def test_paragraphs_end_at_empty_lines_of_any_kind(tmp_path):
    path = tmp_path / "a.txt"
    for gap in ("\n\n", "\n \n", "\r\n\r\n", "\n\t\n \n"):  # " " is how WikiText writes it
        content = gap.join(f"Paragraph {i}\u2028 and its\f end." for i in range(150))
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        found = list(lens.documents(str(path), tmp_path).values())
        assert found == [f"Paragraph {i}\u2028 and its\f end." for i in range(150)], repr(gap)


@pytest.mark.parametrize("text", ["x" * 300_000, "深い " * 90_000, "rain\n" * 60_000])
def test_a_file_of_one_paragraph_is_cut_into_documents(text, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    found = lens.documents(str(path), tmp_path)
    assert len(found) >= 130 and max(map(len, found.values())) <= 2000
    assert "".join(found.values()).replace(" ", "") == text.replace(" ", "")


def test_a_context_shows_whole_letters_around_its_peak():
    """Token 3 is a letter's last byte, tokens 1 and 2 are the others, as a spelling gives them."""
    texts = [" a", "", "", "日", " b", " c"]
    ids = torch.arange(6)[None]
    for peak, expected in (
        (0, "« a»日 b c"),
        (2, " a«日» b c"),
        (3, " a«日» b c"),
        (5, " a日 b« c»"),
    ):
        f = torch.zeros(1, 6)
        f[0, peak] = 1.0
        found = lens.contexts(f, ids, lambda some: [texts[i] for i in some], n=1)
        assert found == {"context_1": expected}

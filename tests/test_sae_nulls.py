"""What an SAE is compared with: nulls, other seeds, other sparsities. Against planted features, numpy
and simulations with a known answer."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import train_sae as ts

ROOT = Path(ts.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import superposed  # noqa: E402

T = 32  # tokens a window
N_WINDOWS = 800  # each a document
D = 24
FLAGS = ["--preset", "smoke", "--threads", "1", "--dtype", "float32", "--device", "cpu"]
FLAGS += ["--expansion", "4", "--k", "3", "--steps", "400", "--batch_size", "256"]


def write_dump(root: Path, rows: np.ndarray) -> Path:
    """Writes rows [N, D] as activations/made/L0.z.npy, a document a window; no model behind it."""
    folder = root / "activations" / "made"
    folder.mkdir(parents=True)
    n_windows = len(rows) // T
    np.save(folder / "L0.z.npy", rows.astype(np.float32))
    np.save(folder / "documents.npy", np.arange(n_windows, dtype=np.uint32).repeat(T))
    facts = {
        "n_heads": 3,
        "d_head": rows.shape[1] // 3,
        "seq_len": T,
        "dtype": "float32",
        "split": "train",
        "checkpoint": "none.pt",
        "checkpoint_sha256": "none",
        "arm": "made",
        "mean": rows.mean(0).tolist(),
        "variance": rows.var(0).tolist(),
    }
    shape = list(rows.shape)
    ts.write_sidecar(folder / "L0.z.npy", "janus.activations/1", [], shape=shape, **facts)
    ts.write_sidecar(folder / "documents.npy", "janus.documents/1", [], shape=shape[:1], **facts)
    return root


def train(root: Path, *more: str) -> pd.DataFrame:
    """Trains on the dump of `root` -> sae_metrics.csv."""
    assert ts.main([*places_of(root), *FLAGS, *more]) == 0
    return pd.read_csv(root / "saes" / "sae_metrics.csv")


@pytest.fixture(scope="module")
def planted() -> superposed.Planted:
    return superposed.plant(48, D, 2.5, seed=1)


@pytest.fixture(scope="module")
def of_features(planted, tmp_path_factory) -> Path:
    """A dump of planted features."""
    rows, _ = planted.draw(N_WINDOWS * T, 0)
    return write_dump(tmp_path_factory.mktemp("features"), rows.numpy())


@pytest.fixture(scope="module")
def of_noise(tmp_path_factory) -> Path:
    """A dump of normal rows of a covariance that falls off."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((D, D)) * np.geomspace(2, 0.1, D)[:, None]
    rows = rng.standard_normal((N_WINDOWS * T, D)) @ mixing + 1
    return write_dump(tmp_path_factory.mktemp("noise"), rows)


# ------------------------------------------------------------------------------ nulls
def test_normal_rows_have_mean_and_covariance_of_the_training_rows(of_features):
    dump = ts.Dump(of_features / "activations/made", 0, "z")
    null = ts.GaussianDump(dump)
    real = torch.cat(list(dump.windows(dump.trained))).numpy()
    drawn = torch.cat(list(null.windows(null.trained))).numpy()
    n = len(real)
    error = np.sqrt(real.var(0) / n)
    assert np.abs((drawn.mean(0) - real.mean(0)) / error).max() < 5
    expected, found = np.cov(real.T), np.cov(drawn.T)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    direction = np.random.default_rng(0).standard_normal(D)
    along = drawn @ direction
    assert stats.kstest((along - along.mean()) / along.std(), "norm").pvalue > 1e-3
    along = real @ direction
    assert stats.kstest((along - along.mean()) / along.std(), "norm").pvalue < 1e-6


def test_a_normal_row_is_the_same_whenever_it_is_read(of_features):
    null = ts.GaussianDump(ts.Dump(of_features / "activations/made", 0, "z"))
    some = np.array([3, 255, 256, 700])
    assert torch.equal(null.rows(some), null.rows(np.arange(800))[some])
    whole = null.rows(np.arange(800))
    assert len(np.unique(whole.numpy(), axis=0)) == 800


def test_normal_rows_are_not_the_numbers_with_which_directions_of_an_sae_begin(of_features):
    null = ts.GaussianDump(ts.Dump(of_features / "activations/made", 0, "z"))
    centre, root = null.normal
    block = 3
    drawn = (null.rows(np.arange(256) + 256 * block) - centre) @ torch.linalg.pinv(root)
    for seed in (block, block + 2**31):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(256, D, generator=generator)
        assert abs(np.corrcoef(drawn.flatten(), directions.flatten())[0, 1]) < 0.05


@pytest.fixture(scope="module")
def features_and_nulls(of_features) -> pd.DataFrame:
    return train(of_features, "--nulls")


def test_features_are_a_large_gain_over_low_rank_and_over_random_directions(
    of_features, features_and_nulls
):
    [trained] = features_and_nulls.itertuples()
    assert trained.gain_gaussian_lo > 0.3
    assert trained.gain_decoder_lo > 0.3
    nulls = pd.read_csv(of_features / "saes/sae_nulls.csv").set_index("null")["fvu"]
    assert trained.gain_gaussian == pytest.approx(1 - trained.fvu / nulls["gaussian"])
    assert trained.gain_decoder == pytest.approx(1 - trained.fvu / nulls["decoder"])


def test_of_normal_rows_the_gain_over_low_rank_is_nothing(of_noise, tmp_path, monkeypatch):
    """Of one training, where latents start anywhere; over several draws of the null."""
    root = write_copy(of_noise, tmp_path / "a")
    flags = ["--nulls", "--start_variance", "1", "--overwrite"]
    gains = []
    held = 0
    for draw in range(6):
        monkeypatch.setattr(ts, "NORMAL_ROWS", draw)
        [trained] = train(root, *flags).itertuples()
        gains.append(trained.gain_gaussian)
        held += trained.gain_gaussian_lo < 0 < trained.gain_gaussian_hi
    assert held >= 5
    assert abs(stats.ttest_1samp(gains, 0).statistic) < stats.t.ppf(0.995, 5)
    assert np.std(gains, ddof=1) < 0.05


def test_of_normal_rows_the_gain_over_trainings_is_nothing(of_noise):
    """Where they start within the leading axes, by default: there one training of 24 dimensions differs from the
    next by up to .08 of its FVU."""
    train(of_noise, "--nulls", "--seeds", "1", "2", "3")
    gains = pd.read_csv(of_noise / "saes/sae_gains.csv").set_index("null").loc["gaussian"]
    assert gains["gain_lo"] < 0 < gains["gain_hi"]
    assert gains["smallest"] < 0.25, "of features it is above .3"


def test_a_null_of_other_settings_is_none_of_its(of_features, tmp_path):
    root = write_copy(of_features, tmp_path / "a")
    trained = train(root, "--nulls", "--steps", "60")
    assert trained["gain_gaussian"].notna().all() and trained["gain_decoder"].notna().all()
    anew = train(root, "--steps", "60", "--learning_rate", "1e-3", "--overwrite")
    assert not {"gain_gaussian", "gain_decoder"} & set(anew.dropna(axis=1, how="all"))


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_random_decoder_stays_as_it_was_drawn(of_features, tmp_path, share):
    """In any direction, or within the axes of --start_variance."""
    root = write_copy(of_features, tmp_path / "a")
    train(root, "--nulls", "--start_variance", str(share), "--steps", "200")
    folder = root / "saes/made/L0/null_decoder"
    sae = ts.load_sae(folder)
    generator = torch.Generator().manual_seed(42)
    if share == 1:
        drawn = torch.randn(4 * D, D, generator=generator)  # [F, D]
    else:
        axes = ts.Dump(root / "activations/made", 0, "z").moments().leading_axes(share)  # [D, R]
        assert axes.shape[1] < D
        drawn = torch.randn(4 * D, axes.shape[1], generator=generator) @ axes.T  # [F, D]
    drawn = F.normalize(drawn, dim=1)
    torch.testing.assert_close(sae.weights["W_dec"], drawn, rtol=1e-5, atol=1e-6)
    assert (sae.weights["W_enc"].T - drawn).norm() > 1
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert state["trajectory"]["null"] == "decoder"


def simulate_documents(rng: np.random.Generator, n: int, fvu: float, hardness: np.ndarray):
    """An errors.csv of n documents, of which the FVU of all possible ones is fvu."""
    variance = rng.gamma(2.0, 100.0, n)
    noise = rng.lognormal(-0.02, 0.2, n)
    document = np.arange(n)
    error = variance * fvu * hardness * noise
    return pd.DataFrame({"document": document, "error": error, "variance": variance})


@pytest.mark.parametrize("n", [20, 58])
def test_the_interval_of_a_gain_holds_the_truth_in_95_percent(n):
    rng = np.random.default_rng(n)
    held, low = 0, []
    for _ in range(1500):
        hardness = rng.lognormal(-0.125, 0.5, n)  # mean 1, the same for both
        trained = simulate_documents(rng, n, 0.06, hardness)
        null = simulate_documents(rng, n, 0.10, hardness)
        value, lo, hi = ts.gain(trained, null)
        held += lo < 1 - 0.06 / 0.10 < hi
        low.append((lo > value) or (hi < value))
    assert 0.93 <= held / 1500 <= 0.975
    assert not any(low)


def test_below_sixteen_documents_or_of_others_a_gain_has_no_interval():
    rng = np.random.default_rng(0)
    few = simulate_documents(rng, 15, 0.1, np.ones(15))
    assert ts.gain(few, few)[0] == 0
    assert np.isnan(ts.gain(few, few)[1:]).all()
    many = simulate_documents(rng, 20, 0.1, np.ones(20))
    others = many.assign(document=many["document"] + 1)
    assert np.isnan(ts.gain(many, others)[1:]).all()


# ------------------------------------------------------------------------------ every sparsity at once
def test_each_sae_of_several_is_the_one_trained_alone(of_features, tmp_path):
    together = train(write_copy(of_features, tmp_path / "a"), "--k", "2", "4", "--seeds", "0", "1")
    assert sorted(together["folder"]) == [
        f"made/L0/k{k}/seed{seed}" for k in (2, 4) for seed in (0, 1)
    ]
    train(write_copy(of_features, tmp_path / "b"), "--k", "4", "--seed", "1")
    for name in ("sae_weights.safetensors", "latent_frequencies.csv", "errors.csv", "training.csv"):
        of_several = (tmp_path / "a/saes/made/L0/k4/seed1" / name).read_bytes()
        assert of_several == (tmp_path / "b/saes/made/L0" / name).read_bytes(), name
    frontier = pd.read_csv(tmp_path / "a/saes/sae_frontier.csv")
    assert list(frontier["setting"]) == ["k 2", "k 4"] * 2
    assert not (tmp_path / "b/saes/sae_frontier.csv").exists()
    assert (frontier["fvu"].diff()[1::2] < 0).all(), "more latents, less error"


def write_copy(root: Path, to: Path) -> Path:
    """A folder with the same dump."""
    to.mkdir()
    (to / "activations").symlink_to(root / "activations")
    return to


def test_several_values_that_an_architecture_does_not_use_are_refused(capsys):
    with pytest.raises(SystemExit):
        ts.main(["--arch", "relu", "--k", "2", "4"])
    assert "--k has several values, of which --arch relu uses none" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the same again?
def test_a_dictionary_matches_itself_in_another_order():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = rng.permutation(40)
    cosine, in_a, in_b = ts.match(rows, rows[order])
    np.testing.assert_allclose(cosine, 1)
    assert (order[in_b] == in_a).all()


def test_unrelated_dictionaries_match_as_by_chance():
    z = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scale = np.geomspace(1, 0.05, 16)  # they lie in few dimensions
        a, b = (rng.standard_normal((60, 16)) * scale for _ in range(2))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b /= np.linalg.norm(b, axis=1, keepdims=True)
        chance = ts.matched_by_chance(a, b, seed, n=20)
        z.append((ts.match(a, b)[0].mean() - chance.mean()) / chance.std())
    assert abs(np.mean(z)) < 1, "no bias beyond the null's own spread"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
def test_unrelated_latents_of_single_heads_match_as_by_chance(share):
    """Each has this share of its norm in one of six heads: what its signs in axes over all heads
    forget, and two of one head match better than two of any."""
    n_heads, size = 6, 8
    above = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        both = []
        for _ in range(2):
            rows = rng.standard_normal((150, n_heads, size))
            own = np.arange(150)[:, None] % n_heads == np.arange(n_heads)  # [150, H]
            rows /= np.linalg.norm(rows, axis=2, keepdims=True)
            rows *= np.where(own, share, (1 - share) / (n_heads - 1))[:, :, None] ** 0.5
            both.append(rows.reshape(150, -1))
        chance = [ts.matched_by_chance(*both, seed, 5, n_parts).mean() for n_parts in (1, n_heads)]
        found = ts.match(*both)[0].mean()
        above.append(found - np.array(chance))
    together, by_head = np.mean(above, axis=0)
    # The larger of both may be a little too high, which hides what is little, and is not too low
    assert -0.03 < min(together, by_head) < 0.005
    if share == 0.8:
        assert together > 0.05, "why the axes of each head are looked at by themselves"


def test_a_negative_seed_is_a_seed():
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    assert np.isfinite(ts.matched_by_chance(rows[:6], rows[6:], -1)).all()


def test_two_seeds_find_planted_features_again(tmp_path):
    """As many latents as features, not superposed: one solution."""
    planted = superposed.plant(D, D, 2.0, seed=3)
    directions = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    rows, _ = superposed.Planted(**vars(planted) | {"directions": directions}).draw(
        N_WINDOWS * T, 0
    )
    root = write_dump(tmp_path, rows.numpy())
    flags = ["--expansion", "1", "--k", "2", "--steps", "1500", "--learning_rate", "5e-3"]
    train(root, *flags, "--seeds", "1", "2", "3")
    table = pd.read_csv(root / "saes/seed_stability.csv")
    assert len(table) == 3
    assert (table["pw_mcc"] > 0.9).all()
    assert (table["pw_mcc"] > table["pw_mcc_null"] + 5 * table["null_sd"]).all()
    latents = pd.read_csv(root / "saes/made/L0/seed1/latent_stability.csv")
    assert latents["stability"].mean() == pytest.approx(
        table.query("seed == 1")["pw_mcc"].mean(), abs=0.02
    )


# ------------------------------------------------------------------------------ the planted truth itself
def test_features_fire_as_often_as_they_should_and_children_beside_their_parents(planted):
    _, active = planted.draw(200_000, 5)
    parent = planted.parent
    assert (parent >= 0).sum() >= 8
    for child in (parent >= 0).nonzero()[:, 0].tolist():
        assert not (active[:, child] & ~active[:, parent[child]]).any()
    roots = parent < 0
    rate = active.float().mean(0)
    error = (planted.probability * (1 - planted.probability) / 200_000).sqrt()
    assert ((rate - planted.probability)[roots].abs() < 5 * error[roots]).all()
    together = np.corrcoef(active[:, roots].float().T)
    assert np.abs(together - np.eye(len(together))).max() > 0.05, "some fire together"


def test_the_score_of_the_truth_is_one_and_of_random_directions_little(planted):
    x, active = planted.draw(5000, 6)
    perfect = superposed.score(planted, active, active.float(), planted.directions)
    assert perfect.cosine == pytest.approx(1) and perfect.found == perfect.f1 == 1
    assert perfect.l0 == pytest.approx(active.sum(1).float().mean())
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = superposed.score(
        planted, active, active.float()[:, order], planted.directions[order]
    )
    assert shuffled.f1 == 1
    random = F.normalize(torch.randn(96, D, generator=torch.Generator().manual_seed(1)), dim=1)
    latents = (x @ random.T).relu()
    assert superposed.score(planted, active, latents, random).f1 < 0.3


def test_planted_features_are_found(planted, of_features, features_and_nulls):
    x, active = planted.draw(5000, 7)
    found = {}
    for null in ("", "null_gaussian", "null_decoder"):
        sae = ts.load_sae(of_features / "saes/made/L0" / null)
        w_dec = sae.weights["W_dec"]
        found[null] = superposed.score(planted, active, sae.encode(x), w_dec).cosine
    assert found[""] > 0.7
    assert found[""] > max(found["null_gaussian"], found["null_decoder"]) + 0.2


def test_the_sidecar_says_which_null_it_is(of_features, features_and_nulls):
    for null in ("", "gaussian", "decoder"):
        folder = of_features / "saes/made/L0" / (f"null_{null}" if null else "")
        side = json.loads((folder / "sae_weights.safetensors.json").read_text())
        assert side["null"] == null


# ---- where latents start
def test_latents_start_where_the_data_vary(tmp_path):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((D, 5)))  # [D, 5]
    rows = rng.standard_normal((N_WINDOWS * T, 5)) @ basis.T + 0.01  # [N, D]
    dump = ts.Dump(write_dump(tmp_path, rows) / "activations" / "made", 0, "z")
    found = dump.moments()
    axes = found.leading_axes(0.99)
    assert axes.shape == (D, 5)
    assert found.leading_axes(1.0) is None
    args = ts.parse_args([*FLAGS, "--seed", "3"])
    args.dtype = "float32"
    args = ts.fill_in(args, dump)
    cpu = torch.device("cpu")
    sae = ts.Trainer(args, found.mean, found.norm, cpu, axes=axes).sae
    w_dec = sae.W_dec.numpy()  # [F, D]
    assert np.allclose(np.linalg.norm(w_dec, axis=1), 1, atol=1e-5)
    outside = w_dec - w_dec @ basis @ basis.T
    assert np.abs(outside).max() < 1e-3
    # evenly in all directions of the five, not along one
    share = np.linalg.eigvalsh(w_dec.T @ w_dec / len(w_dec))[-5:]
    assert share.min() > 0.1
    # and in any direction where all axes are asked for
    anywhere = ts.Trainer(args, found.mean, found.norm, cpu).sae.W_dec.numpy()
    assert np.linalg.norm(anywhere - anywhere @ basis @ basis.T, axis=1).mean() > 0.7


@pytest.mark.parametrize("arch", ["relu", "topk"])
def test_latents_that_fire_at_the_start_sum_to_what_they_read(tmp_path, arch):
    """Within the axes in which they start; or the first steps undo an overshoot."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((D, 5)))  # [D, 5]
    rows = rng.standard_normal((N_WINDOWS * T, 5)) @ basis.T
    dump = ts.Dump(write_dump(tmp_path, rows) / "activations" / "made", 0, "z")
    found = dump.moments()
    args = ts.parse_args([*FLAGS, "--arch", arch, "--expansion", "64"])
    args.dtype = "float32"
    args = ts.fill_in(args, dump)
    axes = found.leading_axes(0.99)
    sae = ts.Trainer(args, found.mean, found.norm, torch.device("cpu"), axes=axes).sae
    x = torch.from_numpy(rows[:200]).float()
    summed = (x @ sae.W_enc.T).relu() @ sae.W_dec  # [200, D]
    along = ((summed * x).sum() / x.square().sum()).item()
    half_of_all = 64 * D / (2 * 5)
    assert along == pytest.approx(1 if arch == "relu" else half_of_all, rel=0.05)


def test_a_few_massive_rows_do_not_decide_where_latents_start(tmp_path):
    """As the first token of a window in pretrained models: its direction alone holds 99.8 % of the
    variance, and the mean is so far from the other rows that they, too, lie along it."""
    rows = np.random.default_rng(0).standard_normal((N_WINDOWS * T, D))
    rows[::T, 0] = 2000.0
    dump = ts.Dump(write_dump(tmp_path, rows) / "activations" / "made", 0, "z")
    values = torch.cat(list(dump.windows(dump.trained))).numpy()
    variances = np.linalg.eigvalsh(np.cov(values.T))
    assert variances[-1] / variances.sum() > 0.998
    assert dump.moments().leading_axes(0.995).shape[1] >= D / 4


def test_axes_are_those_of_the_covariance(of_noise):
    dump = ts.Dump(of_noise / "activations" / "made", 0, "z")
    found = dump.moments()
    rows = torch.cat(list(dump.windows(dump.trained))).double().numpy()  # all training rows
    # the sample that they are of: 256 stretches of 256 rows
    starts = np.linspace(0, len(rows) - 256, 256).astype(int)
    sample = np.concatenate([rows[start : start + 256] for start in starts]) - rows.mean(0)
    expected = np.linalg.eigvalsh(sample.T @ sample / len(sample))[::-1]
    # rounding in float32 is relative to the largest
    np.testing.assert_allclose(found.variances, expected, rtol=1e-4, atol=1e-6 * expected[0])
    along = sample @ found.axes.double().numpy()  # [n, D]
    np.testing.assert_allclose((along**2).mean(0), expected, rtol=1e-3, atol=1e-6 * expected[0])
    variances = np.linalg.eigvalsh(np.cov(rows.T))[::-1]  # of all training rows
    for share in (0.5, 0.9, 0.99):
        n_axes = found.leading_axes(share).shape[1]
        held = variances.cumsum() / variances.sum()
        assert held[n_axes - 1] > share - 0.01
        assert n_axes == math.ceil(D / 4) or held[n_axes - 2] < share + 0.01


# ------------------------------------------------------------------------------ gains over trainings
class Trainings(NamedTuple):
    """Simulated errors.csv of S trainings and as many of their null on the same n documents."""

    trained: np.ndarray  # [simulations, S, n] squared error
    null: np.ndarray  # [simulations, S, n]
    variance: np.ndarray  # [simulations, 1, n]


def simulate_trainings(
    n_simulations: int, n_seeds: int, n: int, noise: float, taste: float = 0.0
) -> Trainings:
    """The FVU of each training is .06 or .10 times a random factor of its own; with `taste`,
    documents suit the trained ones more or less than the null."""
    rng = np.random.default_rng(n_seeds)
    of_documents = (n_simulations, 1, n)
    of_trainings = (n_simulations, n_seeds, 1)
    of_both = (n_simulations, n_seeds, n)
    hardness = rng.lognormal(-0.125, 0.5, of_documents)  # the same documents for all
    suits = rng.lognormal(-(taste**2) / 2, taste, of_documents)
    variance = rng.gamma(2.0, 100.0, of_documents)
    errors = []
    for fvu in (0.06, 0.10):
        of_training = fvu * rng.lognormal(0, noise, of_trainings)
        errors.append(variance * of_training * hardness * rng.lognormal(-0.02, 0.2, of_both))
    return Trainings(suits * errors[0], errors[1], variance)


def half_widths(made: Trainings) -> tuple[np.ndarray, np.ndarray]:
    """Mean of log(FVU / FVU of the null) and half of its interval [simulations]."""
    logs = np.log(made.trained.sum(2) / made.null.sum(2))  # [simulations, S]
    pulls = made.trained / made.trained.sum(2, keepdims=True)
    pulls = pulls - made.null / made.null.sum(2, keepdims=True)  # that of the variance cancels
    return logs.mean(1), ts.half_width(logs, pulls)


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize(("noise", "taste"), [(0.03, 0.0), (0.2, 0.0), (0.03, 0.4), (0.1, 0.4)])
def test_the_interval_over_trainings_holds_the_truth_in_95_percent(n_seeds, noise, taste):
    """Of which the truth is the mean of the logarithm: log(.06 / .10). Of two trainings the variance
    is so uncertain that the sum of both half widths is rather too long."""
    mean, half = half_widths(simulate_trainings(4000, n_seeds, 40, noise, taste))
    held = (abs(mean - math.log(0.06 / 0.10)) < half).mean()
    assert 0.93 <= held <= (0.98 if n_seeds == 2 else 0.975)


def tables_of(made: Trainings, number: int) -> list:
    """Pairs of errors.csv of one simulation, a pair a training."""
    pairs = []
    for trained, null in zip(made.trained[number], made.null[number], strict=True):
        sums = {"document": np.arange(len(trained)), "variance": made.variance[number, 0]}
        tables = [pd.DataFrame(sums | {"error": error}) for error in (trained, null)]
        pairs.append(ts.Pair(0, "gaussian", *tables))
    return pairs


def test_the_mean_gain_of_several_trainings_has_their_interval():
    made = simulate_trainings(1, 3, 40, 0.1, 0.2)
    pairs = tables_of(made, 0)
    found = ts.gain_over_trainings(pairs)
    mean, half = half_widths(made)
    assert found["gain"] == pytest.approx(1 - math.exp(mean[0]))
    assert found["gain_lo"] == pytest.approx(1 - math.exp(mean[0] + half[0]))
    assert found["gain_hi"] == pytest.approx(1 - math.exp(mean[0] - half[0]))
    # a gain of this size would just be told from 0
    assert math.log(1 - found["smallest"]) + half[0] == pytest.approx(0)
    assert np.isnan(
        ts.gain_over_trainings(tables_of(simulate_trainings(1, 3, 15, 0.1), 0))["smallest"]
    )


def test_an_interval_over_documents_alone_misses_other_trainings():
    """Why there is one over trainings: with their noise the other holds the truth too seldom."""
    made = simulate_trainings(400, 1, 40, 0.2)
    held = 0
    for number in range(400):
        [pair] = tables_of(made, number)
        _, low, high = ts.gain(pair.trained, pair.null)
        held += low < 1 - 0.06 / 0.10 < high
    assert held / 400 < 0.5


@pytest.fixture(scope="module")
def of_two_seeds(of_features, tmp_path_factory) -> Path:
    root = write_copy(of_features, tmp_path_factory.mktemp("two") / "a")
    train(root, "--nulls", "--seeds", "1", "2", "--steps", "100")
    return root


def test_gains_of_several_seeds_are_in_a_table_of_their_own(of_two_seeds):
    metrics = pd.read_csv(of_two_seeds / "saes/sae_metrics.csv")
    gains = pd.read_csv(of_two_seeds / "saes/sae_gains.csv").set_index("null")
    assert sorted(gains.index) == ["decoder", "gaussian"]
    assert (gains["n_seeds"] == 2).all() and (gains["setting"] == "k 3").all()
    assert {"run", "unit", "arch", "site", "layer", "head"} <= set(gains)
    for null, row in gains.iterrows():
        expected = 1 - math.exp(np.log(1 - metrics[f"gain_{null}"]).mean())
        assert row["gain"] == pytest.approx(expected)
        assert row["gain_lo"] < row["gain"] < row["gain_hi"] and 0 < row["smallest"] < 1


def test_tables_of_seeds_that_are_gone_are_removed(of_two_seeds, tmp_path):
    shutil.copytree(of_two_seeds / "saes", tmp_path / "saes")
    of_seeds = ["sae_gains.csv", "seed_stability.csv", "made/L0/seed1/latent_stability.csv"]
    ts.report(tmp_path / "saes")
    assert all((tmp_path / "saes" / name).exists() for name in of_seeds)
    shutil.rmtree(tmp_path / "saes/made/L0/seed2")
    ts.report(tmp_path / "saes")
    assert not any((tmp_path / "saes" / name).exists() for name in of_seeds)
    assert len(pd.read_csv(tmp_path / "saes/sae_metrics.csv")) == 1


def test_without_figures_the_metrics_are_the_same_and_redraw_makes_the_rest(of_two_seeds, tmp_path):
    shutil.copytree(of_two_seeds / "saes", tmp_path / "saes")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "saes").glob("table2.*")}
    metrics = (tmp_path / "saes/sae_metrics.csv").read_bytes()
    for path in [*(tmp_path / "saes").glob("table2.*"), *(tmp_path / "saes").glob("figure*")]:
        path.unlink()
    ts.report(tmp_path / "saes", no_figures=True)
    assert not list((tmp_path / "saes").glob("table2.*"))
    assert (tmp_path / "saes/sae_metrics.csv").read_bytes() == metrics
    assert ts.main(["--redraw", "--save_dir", str(tmp_path / "saes")]) == 0
    for name in ("table2.csv", "table2.md"):
        assert (tmp_path / "saes" / name).read_bytes() == drawn[name]
    assert (tmp_path / "saes/figure2_l0_by_depth.png").exists()


# ------------------------------------------------------------------------------ what it costs
@pytest.mark.parametrize("processes", [1, 2])
def test_the_steps_that_are_announced_are_those_taken(
    of_features, tmp_path, capsys, monkeypatch, processes
):
    root = write_copy(of_features, tmp_path / "a")
    flags = ["--nulls", "--k", "2", "4", "--seeds", "1", "2", "--steps", "60"]
    train(root, *flags)
    out = capsys.readouterr().out
    taken = [pd.read_csv(path)["step"].iloc[-1] for path in root.rglob("training.csv")]
    assert len(taken) == 12 and f" {sum(taken):,} steps in all" in out
    assert "12 SAEs (batchtopk, of a layer), 8 of them nulls" in out
    # the process that has most to do
    jobs = ts.find_jobs(parse(root, *flags))
    groups = ts.groups_of(jobs)
    assert len(groups) == 4, "two seeds, on rows of the dump and on normal ones"
    each = [ts.work_of(groups[rank::processes]) for rank in range(processes)]
    assert sum(work.steps for work in each) == 12 * 60


def test_the_normal_rows_that_are_announced_are_those_drawn(of_features, tmp_path, monkeypatch):
    root = write_copy(of_features, tmp_path / "a")
    flags = ["--nulls", "--k", "2", "4", "--steps", "60"]
    groups = ts.groups_of(ts.find_jobs(parse(root, *flags)))
    drawn = [0]
    draw = ts.GaussianDump.rows

    def counted(self, numbers):
        drawn[0] += len(numbers)
        return draw(self, numbers)

    monkeypatch.setattr(ts.GaussianDump, "rows", counted)
    monkeypatch.setattr(ts, "announce_cost", lambda *_: None)  # which draws some to measure it
    train(root, *flags)
    assert drawn[0] == pytest.approx(ts.work_of(groups).n_drawn, rel=0.1)


def test_nulls_of_a_layer_that_is_not_trained_are_one_line_before_any_work(of_features, capsys):
    for layer in ("7", "-1"):
        assert ts.main([*places_of(of_features), *FLAGS, "--nulls", "0", layer]) == 1
        line = f"--nulls {layer}: no SAE of layer {layer} is asked for; expected some of 0"
        assert line in capsys.readouterr().err
    nulls = [job.args.null for job in ts.find_jobs(parse(of_features, "--nulls", "0"))]
    assert nulls == ["", "gaussian", "decoder"]


def places_of(root: Path) -> list[str]:
    places = ["--runs", "made", "--activations_dir", str(root / "activations")]
    return [*places, "--save_dir", str(root / "saes")]


def parse(root: Path, *more: str):
    """The arguments of `train`."""
    args = ts.parse_args([*places_of(root), *FLAGS, *more])
    args.dtype = "float32"
    return args


# ------------------------------------------------------------------------------ threads
def test_a_resumed_sae_leaves_the_threads_as_they_were(of_features, tmp_path, monkeypatch):
    """And is, in a group that is otherwise finished, what it would have been."""
    monkeypatch.setattr(ts, "choose_threads", lambda step, wanted: step() or 1.0)
    threads = FLAGS.index("--threads")
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", FLAGS[:threads] + FLAGS[threads + 2 :])
    whole = write_copy(of_features, tmp_path / "whole")
    parts = write_copy(of_features, tmp_path / "parts")
    flags = ["--k", "2", "4", "--lr_decay", "0", "--steps"]
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(whole, *flags, "100")
        train(parts, *flags, "50")
        shutil.rmtree(parts / "saes/made/L0/k2")
        shutil.copytree(whole / "saes/made/L0/k2", parts / "saes/made/L0/k2")
        torch.set_num_threads(1)
        train(parts, *flags, "100", "--resume")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(n_threads)
    for root in (whole, parts):
        folder = root / "saes/made/L0/k4"
        assert torch.load(folder / "training_state.pt", weights_only=True)["threads"] == 2
    for name in ("sae_weights.safetensors", "training.csv", "errors.csv"):
        found, expected = (root / "saes/made/L0/k4" / name for root in (parts, whole))
        assert found.read_bytes() == expected.read_bytes(), name


@pytest.mark.parametrize(
    ("n", "threads", "cores", "workers", "each"),
    [(4, 2, 2, 2, 1), (4, 1, 2, 2, 1), (1, 2, 2, 1, 2), (1, 1, 2, 1, 1), (2, 4, 4, 2, 2)],
)
def test_saes_of_a_group_have_a_core_each(n, threads, cores, workers, each):
    """Also where one alone is as fast on one thread; how many threads an SAE has does not depend on
    the cores."""
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with ts.side_by_side(n, torch.device("cpu"), cores) as pool:
            assert pool._max_workers == workers
            assert torch.get_num_threads() == each
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(n_threads)


FAST = [(arch, dtype) for arch in ts.ARCHITECTURES for dtype in ("float32", "bfloat16")]
FAST += [(arch, "int8") for arch, one in ts.ARCHITECTURES.items() if one.int8]


@pytest.mark.parametrize(("arch", "dtype"), FAST)
def test_an_sae_does_not_depend_on_its_threads(arch, dtype):
    """Those of `--k 16 32`, a core each, are the ones that have all cores alone. Wide enough that
    torch divides a sum over the batch, and its first eighth, among threads."""
    width, n = 320, 1024
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(
        n, 8, generator=generator
    )  # so many latents die, and enter the auxiliary loss
    rows = few @ torch.randn(8, width, generator=generator) / math.sqrt(8 * width)
    given = ["--preset", "smoke", "--arch", arch, "--expansion", "2", "--learning_rate", "0.01"]
    args = ts.parse_args([*given, "--steps", "50", "--dead_tokens", "2048", "--aux_k", "8"])
    vars(args).update(dtype=dtype, null="", k=4, target_l0=4, l1=0.03)
    made = []
    n_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            trainer = ts.Trainer(args, torch.zeros(width), 1.0, torch.device("cpu"))
            for _ in range(args.steps):
                trainer.step(rows)
            made.append(trainer)
    finally:
        torch.set_num_threads(n_threads)
    one, two = made
    for name, weight in vars(one.sae).items():
        assert torch.equal(weight, getattr(two.sae, name)), name
    assert one.history == two.history
    has_auxiliary = arch in ("topk", "batchtopk", "matryoshka")
    assert not has_auxiliary or one.history[-1]["dead_share"] > 0


# ------------------------------------------------------------------------------ the model in the loop
def test_a_finish_without_its_model_is_refused_before_any_training(of_features, tmp_path, capsys):
    root = write_copy(of_features, tmp_path / "a")
    places = ["--runs", "made", "--activations_dir", str(root / "activations")]
    places += ["--save_dir", str(root / "saes")]
    assert ts.main([*places, *FLAGS, "--finish_kl", "1000"]) == 1
    shown = capsys.readouterr()
    [line] = shown.err.strip().splitlines()
    assert "--finish_kl trains with the model of run made" in line and "--model_path" in line
    assert shown.out == "" and not (root / "saes").exists()


# ------------------------------------------------------------------------------ tables and figures
@pytest.mark.parametrize("flags", [["--layers", "3", "3"], ["--runs", "a", "b", "a"]])
def test_a_layer_or_a_run_that_is_named_twice_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        ts.main(flags)
    assert f"{flags[0]} has a value twice" in capsys.readouterr().err


def test_a_dump_that_is_known_by_heart_is_told_by_its_training_rows(tmp_path):
    """Windows whose rows are nearly the same, fewer than there are latents: on other documents
    nothing of it holds."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((120, D)), T, axis=0)
    rows += 0.01 * rng.standard_normal(rows.shape)  # no ties
    flags = ["--expansion", "16", "--k", "1", "--steps", "600", "--learning_rate", "1e-2"]
    [trained] = train(write_dump(tmp_path / "few", rows), *flags).itertuples()
    assert trained.fvu_train < 0.5 * trained.fvu
    # by hand, on the same rows
    folder = tmp_path / "few"
    dump = ts.Dump(folder / "activations/made", 0, "z")
    n = trained.n_windows
    seen = dump.trained[np.arange(n) * len(dump.trained) // n]
    raw = torch.from_numpy(rows.reshape(-1, T, D)[seen].reshape(-1, D)).float()
    sae = ts.load_sae(folder / "saes/made/L0")
    error = (sae.decode(sae.encode(raw)) - raw).square().sum()
    variance = (raw - raw.mean(0)).square().sum()
    assert trained.fvu_train == pytest.approx((error / variance).item(), rel=1e-4)
    assert not set(dump.documents[seen]) & set(dump.documents[dump.held_out])


def test_of_many_rows_those_of_training_are_rebuilt_no_better(of_features, features_and_nulls):
    [trained] = features_and_nulls.itertuples()
    assert trained.fvu_train == pytest.approx(trained.fvu, rel=0.1)


def test_saes_of_other_flags_are_other_curves(of_features, tmp_path):
    root = write_copy(of_features, tmp_path / "a")
    train(root, "--k", "2", "4", "--steps", "60", "--seeds", "1")
    frontier = pd.read_csv(root / "saes/sae_frontier.csv")
    assert frontier["recipe"].nunique() == 1
    train(root, "--k", "3", "6", "--steps", "60", "--seeds", "1", "--learning_rate", "1e-2")
    frontier = pd.read_csv(root / "saes/sae_frontier.csv")
    settings = frontier.groupby("recipe")["setting"].agg(list).tolist()
    assert sorted(settings) == [["k 2", "k 4"], ["k 3", "k 6"]]
    # the fewest active latents are none, and less than one a token
    frontier.loc[frontier["l0"] < 2.5, "l0"] = 0.3
    frontier.loc[frontier["setting"] == "k 4", "l0"] = 0.0
    figure = ts.draw_frontier(frontier)
    assert all((ax.get_xticks() > 0).all() for ax in figure.axes if ax.has_data())
    assert 0.3 in figure.axes[0].get_xticks()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close(figure)
    assert len(set(labels)) == 2 and all("recipe r" in label for label in labels)


def test_figures_that_come_later_change_no_sae(of_features, tmp_path):
    root = write_copy(of_features, tmp_path / "a")
    flags = ["--steps", "60", "--save_interval", "30"]
    train(root, *flags, "--seeds", "1", "--no_figures")
    # as an older version kept it
    folder = root / "saes/made/L0/seed1"
    if not folder.exists():
        folder = root / "saes/made/L0"
    side = folder / "sae_weights.safetensors.json"
    record = json.loads(side.read_text())
    assert "no_figures" not in record["trajectory"]
    record["trajectory"]["no_figures"] = True
    side.write_text(json.dumps(record))
    state = torch.load(folder / "training_state.pt", weights_only=True)
    state["trajectory"]["no_figures"] = True
    torch.save(state, folder / "training_state.pt")
    train(root, *flags, "--seeds", "1", "--nulls", "--resume")
    assert "gain_decoder" in pd.read_csv(root / "saes/sae_metrics.csv")


def test_of_heads_those_count_whose_removal_costs_something():
    heads = []
    for head, (recovered, matters) in enumerate([(0.9, True), (3.5, False), (0.7, True)]):
        row = dict(run="a", unit="head", arch="relu", setting="l1 1", seed=0, site="z", layer=0)
        row |= dict(head=head, split="train", n_documents=20, dead_share=0.0)
        row |= {f"{name}{end}": 1.0 for name in ("l0", "mse", "fvu") for end in ("", "_lo", "_hi")}
        row |= dict(ce_recovered_zero=recovered, ce_recovered_mean=recovered, kl_sae=0.1)
        heads.append(row | dict(ce_informative=matters, dead_share_tokens=100))
    [row] = ts.table2(pd.DataFrame(heads)).itertuples()
    assert row.ce_recovered_mean == pytest.approx(0.8)
    assert row.ce_recovered_zero == pytest.approx(0.8)
    assert row.ce_informative == pytest.approx(2 / 3)


def test_where_ablation_costs_nothing_there_is_nothing_to_recover():
    rng = np.random.default_rng(0)
    clean = rng.uniform(3, 5, 20)
    losses = {
        "clean": ts.EditedLoss(list(clean), [0.0] * 20),
        "sae0": ts.EditedLoss(list(clean + 0.05), [0.1] * 20),
        "zero": ts.EditedLoss(list(clean + rng.uniform(0.1, 0.2, 20)), [0.3] * 20),
        "mean": ts.EditedLoss(list(clean - rng.uniform(0.01, 0.02, 20)), [0.2] * 20),
    }
    found = ts.ce_recovered(losses, "sae0", np.arange(20))
    assert 0 < found["ce_recovered_zero"] < 1
    assert math.isnan(found["ce_recovered_mean"]) and math.isnan(found["ce_recovered_mean_lo"])
    assert not found["ce_informative"]


@pytest.mark.parametrize("costs", [0.3, -0.3])
def test_a_finish_wins_a_share_of_what_ablation_costs_and_nothing_where_it_costs_nothing(costs):
    rng = np.random.default_rng(0)
    clean, kl = rng.uniform(3, 5, 20), rng.uniform(0.1, 0.2, 20)
    ablated = clean + costs * rng.uniform(0.9, 1.1, 20)
    before = {"sae0": ts.EditedLoss(list(clean + 0.05), list(kl))}
    after = {
        "clean": ts.EditedLoss(list(clean), [0.0] * 20),
        "sae0": ts.EditedLoss(list(clean + 0.02), list(0.8 * kl)),
        "mean": ts.EditedLoss(list(ablated), [0.2] * 20),
    }
    found = ts.finish_gain(before, after, "sae0", np.arange(20))
    assert found["finish_kl_left"] == pytest.approx(0.8)
    won = found["finish_ce_recovered"]
    if costs > 0:
        assert won == pytest.approx(0.03 * 20 / (ablated - clean).sum())
        assert found["finish_ce_recovered_lo"] < won < found["finish_ce_recovered_hi"]
    else:
        assert math.isnan(won) and math.isnan(found["finish_ce_recovered_hi"])


def test_the_line_of_an_sae_says_where_there_is_nothing_to_recover():
    job = SimpleNamespace(folder="saes/a/L0", dump=SimpleNamespace(side={"split": "train"}))
    metrics = dict(l0=16.0, fvu=0.1, fvu_lo=math.nan, n_documents=3, dead_share=0.01)
    metrics |= dict(dead_share_tokens=1000, kl_sae=0.002, ce_informative=False)
    metrics |= dict(ce_recovered_zero=0.9, ce_recovered_mean=math.nan)
    line = ts.summary(job, metrics)
    assert "CE recovered 90.0% (zero), none to recover (mean)" in line
    assert "FVU 0.100 on 3" in line and "CE recovered says little" in line


def test_table_2_averages_a_measure_over_the_saes_that_have_its_interval():
    nan = math.nan
    rows = pd.DataFrame(
        {
            "ce_recovered_mean": [0.9, 0.7, 5.0],
            "ce_recovered_mean_lo": [0.8, 0.6, nan],
            "ce_recovered_mean_hi": [1.0, 0.8, nan],
            "gain_decoder": [0.1, 0.3, 0.5],
        }
    )
    found = ts.mean_with_interval(rows, "ce_recovered_mean")
    assert found["ce_recovered_mean"] == pytest.approx(0.8)
    assert found["ce_recovered_mean_lo"] == pytest.approx(0.7)
    assert found["ce_recovered_mean_saes"] == 2
    # none has one
    found = ts.mean_with_interval(rows, "gain_decoder")
    assert found["gain_decoder"] == pytest.approx(0.3) and found["gain_decoder_saes"] == 0
    assert ts.mean_with_interval(rows, "gain_gaussian") == {}


def test_every_curve_of_the_frontier_looks_unlike_the_others():
    rows = []
    for run, arch, seed, k in itertools.product("ab", ("topk", "relu"), (0, 1, 2), (8, 16)):
        names = dict(run=run, unit="layer", arch=arch, setting=f"k {k}", seed=seed, site="z")
        for layer in (0, 1):
            if (run, arch, layer) == ("a", "relu", 0):
                continue  # a curve of some layers only
            numbers = dict(l0=k, fvu=1 / k, fvu_lo=0.9 / k, fvu_hi=1.1 / k)
            rows.append(names | {"layer": layer} | numbers | dict(split="train", n_documents=20))
    figure = ts.draw_frontier(pd.DataFrame(rows))
    looks: dict[str, set] = {}
    for ax in figure.axes:
        for bars in ax.containers:
            line = bars.lines[0]
            look = (line.get_color(), line.get_marker(), line.get_linestyle())
            looks.setdefault(bars.get_label(), set()).add(look)
    assert len(looks) == 12
    assert all(len(look) == 1 for look in looks.values()), "the same in every panel"
    drawn = set.union(*looks.values())
    assert len(drawn) == 12 and len({look[1:] for look in drawn}) == 12, "without colours too"
    assert len(figure.legends[0].get_texts()) == 12
    plt.close(figure)

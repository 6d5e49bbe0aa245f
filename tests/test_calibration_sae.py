"""Coverage of the intervals that harvest_activations.py and train_sae.py print, on simulated documents whose truth is known.

Binomial: with n_sim simulations an interval that covers 92 to 98 % of the time gives a count between the bounds of `allowed`
but for once in 1,000 each.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibration import LONGER, record
from scipy import stats

import harvest_activations as h
import train_sae as ts


def allowed(n_sim: int, low: float = 0.92, high: float = 0.98) -> tuple[float, float]:
    """Bounds of the share of n_sim intervals that cover, if they do so with a probability from low to high."""
    least = stats.binom.ppf(0.001, n_sim, low)
    most = stats.binom.ppf(0.999, n_sim, high) if high < 1 else n_sim
    return least / n_sim, most / n_sim


# ---------------------------------------------------------------------------------------------- documents of one kind
def levels(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """What sets documents apart [n], of mean 1: normal, with tails on both sides, or skewed to the right."""
    if kind == "normal":
        return 1 + 0.3 * rng.normal(size=n)
    if kind == "t3":
        return 1 + 0.3 * rng.standard_t(3, size=n)
    spread = {"skewed": 0.5, "very skewed": 1.0}[kind]
    return rng.lognormal(-(spread**2) / 2, spread, size=n)


def window_counts(n: int, rng: np.random.Generator) -> np.ndarray:
    """Windows a document [n], from 1 on, 3 on average."""
    return rng.geometric(1 / 3, size=n)


# ------------------------------------------------------------------------------------------------------ SAEs: ratios
def simulated_windows(
    what: str, kind: str, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | float, np.ndarray]:
    """top [W], bottom and documents [W]; sum(top) / sum(bottom) is 1 in truth."""
    documents = np.repeat(np.arange(n), window_counts(n, rng))
    level = levels(kind, n, rng)[documents]
    noise = rng.normal(size=(2, len(documents)))
    if what == "mean":  # as l0 and mse
        return level + 0.1 * noise[0], 1.0, documents
    if what == "ratio":  # as fvu: documents differ in what there is to explain, too
        variance = levels("skewed", n, rng)[documents] * np.exp(0.2 * noise[1])
        return level * variance * np.exp(0.1 * noise[0] - 0.005), variance, documents
    # as CE recovered: what ablation costs, in nats, and nearly all of it regained
    lost = 0.05 * level + 0.02 * noise[0]
    return lost + 0.005 * noise[1], lost, documents


KINDS = ["normal", "t3", "skewed", "very skewed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["mean", "ratio", "CE"])
@pytest.mark.parametrize("n", [16, 48, 200])
def test_intervals_over_documents_cover(what, kind, n):
    n_sim = LONGER * (40 if n == 200 else 200)
    rng = np.random.default_rng(n)
    hits = printed = 0
    for _ in range(n_sim):
        found = ts.ratio_interval("m", *simulated_windows(what, kind, n, rng))
        printed += not math.isnan(found["m_lo"])
        hits += found["m_lo"] <= 1 <= found["m_hi"]
    record(
        "SAE: ratio over documents",
        f"{what}, {kind}, n = {n}",
        coverage=hits / printed,
        printed=printed / n_sim,
    )
    # As METRICS.md says: less where one document weighs many times the others
    least, most = allowed(printed, low=0.9 if kind == "very skewed" else 0.92)
    assert printed > n_sim / 2 and least <= hits / printed <= most


@pytest.mark.parametrize("n", [16, 48, 200])
def test_a_ratio_of_noise_gets_no_interval(n):
    """Where ablation costs nothing, CE recovered is noise over noise: what is printed must still cover."""
    n_sim = LONGER * 100
    rng = np.random.default_rng(n)
    printed = 0
    for _ in range(n_sim):
        documents = np.repeat(np.arange(n), window_counts(n, rng))
        lost = 0.001 * rng.normal(size=len(documents))
        found = ts.ratio_interval("m", lost, 0.001 * rng.normal(size=len(documents)), documents)
        printed += not math.isnan(found["m_lo"])
    record("SAE: ratio of noise", f"n = {n}", printed=printed / n_sim)
    assert printed / n_sim <= allowed(n_sim, 0, 0.02)[1]


# ---------------------------------------------------------------------------------------------- topology: a dump's heads
H, K = 4, 3
PAIRS = np.triu_indices(H, 1)


class Population:
    """Heads whose outputs are alike, or not, and move together from document to document.

    A token's z [H*K] is A (x + 0.7 sqrt(s) g): x of the token, the level s and the vector g of its document, with
    E(s) = 1; so that E(z z^T) = 1.49 A A^T. Without `alike` A is the identity, and all cosines are noise.
    """

    def __init__(self, alike: float, kind: str) -> None:
        rng = np.random.default_rng(7)
        self.kind = kind
        self.a = np.eye(H * K) + alike * rng.normal(size=(H * K, H * K)) / math.sqrt(H * K)
        self.zz = 1.49 * self.a @ self.a.T
        self.w_o = torch.from_numpy(rng.normal(size=(H * K, H * K)))

    def truth(self) -> dict[str, float]:
        zz = torch.from_numpy(self.zz) * 10**9  # of so many tokens; their sum is 0
        found = h.topology(10**9, torch.zeros(H * K, dtype=torch.float64), zz, self.w_o, H)
        return {metric: value.item() for metric, value in found.items()}

    def sigma_z(self) -> float:
        """Independent of the script: the mean absolute cosine of the heads, from the definition."""
        blocks = self.zz.reshape(H, K, H, K)
        inner = np.einsum("ikjk->ij", blocks)
        norm = np.sqrt(inner.diagonal())
        return np.abs(inner / np.outer(norm, norm))[PAIRS].mean()

    def draw(self, documents: np.ndarray, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """z [W, n_tokens, H*K] of windows of these documents [W]."""
        n = documents.max() + 1
        size = np.sqrt(levels(self.kind, n, rng).clip(0))  # [documents]
        shared = 0.7 * size[:, None] * rng.normal(size=(n, H * K))
        x = rng.normal(size=(len(documents), n_tokens, H * K))
        return (x + shared[documents, None]) @ self.a.T


def block_sums(z: np.ndarray, documents: np.ndarray) -> h.BlockSums:
    """What a harvest of the windows z [W, T, H*K] leaves behind."""
    bounds = h.block_bounds(documents)
    n_tokens, sums, products = [], [], []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        rows = z[first:end].reshape(-1, H * K)
        n_tokens.append(len(rows))
        sums.append(rows.sum(0))
        products.append(rows.T @ rows)
    nothing = torch.zeros(len(n_tokens), 1)
    z_sums = torch.from_numpy(np.array(sums))
    zz = torch.from_numpy(np.array(products))
    n_documents = len(np.unique(documents))
    return h.BlockSums(n_tokens, n_documents, nothing, nothing, nothing[:, 0], z_sums, zz)


def covered(population: Population, z: np.ndarray, documents: np.ndarray) -> dict[str, bool]:
    sums = block_sums(z, documents)
    measured = h.topology_of(sums, np.arange(len(sums.n_tokens)), population.w_o, H)
    intervals = h.text_intervals(sums, measured, population.w_o, H, seed=0)
    truth = population.truth()
    return {
        metric: interval["ci_lo"] <= truth[metric] <= interval["ci_hi"]
        for metric, interval in intervals.items()
    }


@pytest.mark.parametrize("kind", ["t3", "skewed"])
@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_topology_intervals_cover(kind, n, alike):
    """Of heads that are alike, and of heads that are not, whose measured cosines are all noise."""
    population = Population(alike, kind)
    assert population.truth()["sigma_z"] == pytest.approx(population.sigma_z(), abs=1e-8)
    n_sim = LONGER * 100
    rng = np.random.default_rng(n)
    hits: dict[str, int] = dict.fromkeys(h.METRICS, 0)
    for _ in range(n_sim):
        documents = np.repeat(np.arange(n), window_counts(n, rng))
        z = population.draw(documents, 8, rng)
        for metric, hit in covered(population, z, documents).items():
            hits[metric] += hit
    for metric, hit in hits.items():
        record("topology", f"{metric}, alike {alike:g}, {kind}, n = {n}", coverage=hit / n_sim)
    # Where little text biases a metric its interval is longer, and may cover more often
    least, _ = allowed(n_sim)
    assert all(hit / n_sim >= least for hit in hits.values()), hits


def test_spread_windows_describe_their_split_and_first_windows_do_not():
    """40 packages of 10 documents, alike within; an eighth of the windows is harvested."""
    population = Population(1.0, "normal")
    n_sim = LONGER * 60
    rng = np.random.default_rng(0)
    hits = {"first": 0, "spread": 0}
    for _ in range(n_sim):
        documents = np.repeat(np.arange(400), window_counts(400, rng))
        z = population.draw(documents // 10, 8, rng)
        split = SimpleNamespace(n_windows=len(z))
        n = len(z) // 8
        chosen = {"first": np.arange(n), "spread": h.HFWikiTextLoader.spread(split, n)}
        for way, windows in chosen.items():
            hits[way] += covered(population, z[windows], documents[windows])["sigma_z"]
    for way, hit in hits.items():
        record("topology", f"sigma_z of the split from its {way} windows", coverage=hit / n_sim)
    assert hits["spread"] / n_sim >= allowed(n_sim)[0]
    # What the audit saw: the jackknife does not know of other packages
    assert hits["first"] / n_sim < 0.8


@pytest.mark.parametrize("metric", ["mean_cosine", "max_cosine", "max_abs_cosine", "sigma_z"])
def test_the_null_holds_what_turned_bases_give(metric):
    """null_lo and null_hi: 95 % of heads whose value bases are turned at random lie between."""
    population = Population(1.0, "normal")
    n_sim = LONGER * 400
    rng = np.random.default_rng(1)
    zz = torch.from_numpy(population.zz) * 1000
    null = h.null_topology(1000, zz, population.w_o, H, seed=0)
    low, high = h.null_interval(null[metric])
    blocks = population.zz.reshape(H, K, H, K)
    norm = np.sqrt(np.einsum("ikik->i", blocks))
    hits = 0
    for _ in range(n_sim):
        turn = np.linalg.qr(rng.normal(size=(H, K, K)))[0]
        turned = np.einsum("ikjl,ikm,jlm->ij", blocks, turn, turn)
        cosine = (turned / np.outer(norm, norm))[PAIRS]
        size = np.abs(cosine)
        value = {
            "mean_cosine": cosine.mean(),
            "max_cosine": cosine.max(),
            "max_abs_cosine": size.max(),
            "sigma_z": size.mean(),
        }[metric]
        hits += low <= value <= high
    record("topology: null", metric, coverage=hits / n_sim)
    least, most = allowed(n_sim)
    assert least <= hits / n_sim <= most

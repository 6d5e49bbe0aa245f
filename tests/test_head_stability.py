"""Heads matched over seeds (tools/seeds.py), against exact symmetries, random models, scipy and
simulations with a known answer."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from calibration import LONGER, record
from PIL import Image
from scipy import stats
from test_ablation import random_model, save_checkpoint
from test_seeds import write as plant_seed

import janus_adaptive as janus

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import seeds  # noqa: E402

N_LAYERS, N_HEADS = 3, 4
ORDER = [2, 0, 3, 1]  # head i of the twin is head ORDER[i] of the model


# ---------------------------------------------------------------------------------------- models
def twin_of(model: janus.NewGPT) -> janus.NewGPT:
    """The same function by other weights: in each layer the heads in another order, and the values
    of each head in another basis, which W_O takes back."""
    generator = torch.Generator().manual_seed(3)
    twin = type(model)(model.cfg).eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    d_head = model.cfg.d_head
    for block in twin.blocks:
        read = block.attn.w_qkv.weight.view(3, N_HEADS, d_head, -1)
        write = block.attn.w_o.weight.view(-1, N_HEADS, d_head)
        read.copy_(read[:, ORDER].clone())
        write.copy_(write[:, ORDER].clone())
        for head in range(N_HEADS):
            turn = torch.linalg.qr(torch.randn(d_head, d_head, generator=generator))[0]
            read[2, head] = turn @ read[2, head]
            write[:, head] = write[:, head] @ turn.T
    return twin


def model_of(seed: int, **changes: int) -> janus.NewGPT:
    """A model of random weights, so large that every head writes something of its own."""
    model = random_model(**changes)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            spread = weight.std().item()
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return model


def windows(n: int, vocabulary: int = 61, seq_len: int = 16) -> torch.Tensor:
    return torch.randint(vocabulary, (n, seq_len), generator=torch.Generator().manual_seed(9))


def no_impact() -> pd.DataFrame:
    places = itertools.product(range(N_LAYERS), range(N_HEADS))
    rows = [(layer, head, "mean", 0.0) for layer, head in places]
    return pd.DataFrame(rows, columns=["layer", "head", "mode", "impact"])


def matched(models: dict[int, janus.NewGPT]) -> pd.DataFrame:
    """The table of these models, one a seed."""
    runs = [seeds.Trained(seed, model, no_impact()) for seed, model in models.items()]
    return seeds.match_seeds(runs, windows(128))


# --------------------------------------------------------------------------------------- matching
def test_permuted_and_rotated_heads_are_matched_with_stability_1():
    model = model_of(0)
    twin = twin_of(model)
    torch.testing.assert_close(twin(windows(4))[0], model(windows(4))[0], atol=1e-3, rtol=1e-3)
    table = matched({1: model, 2: twin})
    assert len(table) == 2 * N_LAYERS * N_HEADS
    assert (table["match_layer"] == table["layer"]).all()
    for seed, layer, head, match in table[["seed", "layer", "head", "match_head"]].to_numpy():
        # From the twin to the model as it was permuted, and back
        expected = ORDER[head] if seed == 2 else ORDER.index(head)
        assert match == expected, (seed, layer, head)
    np.testing.assert_allclose(table["cka"], 1, atol=1e-4)
    np.testing.assert_allclose(table["stability"], 1, atol=1e-3)
    assert (table["null_hi"] < 0.9).all()
    assert (table["depth"] == table["layer"] / (N_LAYERS - 1)).all()


def test_models_of_random_weights_lie_within_their_null():
    """Nothing was learned, so of heads 1 in 20 lies above all 19 draws, and 1 in 20 below all; yet
    they are far above the null of another text, which is why that one is not used."""
    table = matched({seed: model_of(seed) for seed in range(6)})
    pairs = table.groupby(["seed", "other_seed"])
    above = (table["cka"] > table["null_hi"]).groupby(table["seed"]).mean()
    below = (table["cka"] < table["null_lo"]).groupby(table["seed"]).mean()
    for share in (above, below):  # the model is the unit
        assert abs(share.mean() - 1 / 20) < 3.5 * max(share.sem(), 0.02)
    assert abs(pairs["stability"].mean().mean()) < 0.03
    assert (table["cka"] > table["null_text"]).mean() > 0.9


def test_what_is_learned_twice_is_above_the_null_and_the_rest_within():
    """Layer 0 is the same in both models, the other layers are not."""
    model = model_of(1)
    other = model_of(2)
    other.embedding.weight.copy_(model.embedding.weight)
    other.blocks[0].load_state_dict(model.blocks[0].state_dict())
    table = matched({1: model, 2: other})
    shared = table["layer"] == 0
    assert (table.loc[shared, "stability"] > 0.999).all()
    assert (table.loc[shared, "match_layer"] == 0).all()
    assert table.loc[~shared, "stability"].mean() < 0.3


def test_cka_is_that_of_its_definition():
    """Hilbert-Schmidt products of centred Gram matrices (Kornblith 2019, eq. 3), pair by pair, and
    what `match_by_function` says."""
    idx = windows(16)
    with torch.no_grad():
        mine = seeds.head_writes(model_of(1), idx, 1)  # [N, L, H, K]
        theirs = seeds.head_writes(model_of(2), idx, 1)
    found = seeds.largest_cka(mine, theirs)

    def gram(writes: torch.Tensor) -> np.ndarray:
        x = writes.double().numpy()
        x = x - x.mean(0)
        return x @ x.T

    heads = list(itertools.product(range(N_LAYERS), range(N_HEADS)))
    others = [gram(theirs[:, layer, head]) for layer, head in heads]
    for layer, head in heads:
        own = gram(mine[:, layer, head])
        by_pair = []
        for other in others:
            size = np.linalg.norm(own) * np.linalg.norm(other)
            by_pair.append((own * other).sum() / size)
        assert found[layer, head] == pytest.approx(max(by_pair), rel=1e-4)
        match = seeds.match_by_function(mine[:, layer, head], theirs)
        assert match.cka == pytest.approx(max(by_pair), rel=1e-4)
        assert heads[int(np.argmax(by_pair))] == (match.layer, match.head)


def test_random_heads_read_as_much_in_other_directions():
    generator = torch.Generator().manual_seed(0)
    turns = torch.stack([seeds.random_rotation(5, generator) for _ in range(2000)])
    torch.testing.assert_close(turns @ turns.mT, torch.eye(5).expand_as(turns), atol=1e-5, rtol=0)
    # Uniform: every entry has mean 0 and variance 1 / 5, also those on the diagonal
    assert turns.mean(0).abs().max() < 0.05
    assert (turns.var(0) - 1 / 5).abs().max() < 0.03
    # Not turned, they are the heads themselves
    model = model_of(4)
    idx = windows(8)
    inputs = seeds.head_inputs(model, idx)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "random_rotation", lambda size, _: torch.eye(size))
        same = seeds.random_writes(model, inputs, 2, seed=0)
    torch.testing.assert_close(same, seeds.head_writes(model, idx, 2), atol=1e-4, rtol=1e-4)
    other = seeds.random_writes(model, inputs, 2, seed=0)
    assert (other - same).abs().max() > 0.1


# ------------------------------------------------------------------------------ claims over seeds
def heads_of_pair(stability: np.ndarray, impact: np.ndarray, n_layers: int) -> pd.DataFrame:
    """A pair of seeds: heads [R] in as many layers, in their order."""
    layer = np.repeat(np.arange(n_layers), len(impact) // n_layers)
    depth = layer / max(1, n_layers - 1)
    columns = {"layer": layer, "depth": depth, "stability": stability, "impact": impact}
    return pd.DataFrame(columns)


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    stability, impact = rng.normal(size=(2, 36)).round(1)  # with ties
    heads = heads_of_pair(stability, impact, 6)
    of_all = stats.spearmanr(stability, impact).statistic
    assert seeds.stability_and_impact(heads) == pytest.approx(of_all)
    one_layer = heads_of_pair(stability, impact, 1)
    assert seeds.within_layers(one_layer) == pytest.approx(of_all)
    # Heads that were not ablated do not count
    heads.loc[3:9, "impact"] = np.nan
    kept = heads["impact"].notna()
    expected = stats.spearmanr(stability[kept], impact[kept]).statistic
    assert seeds.stability_and_impact(heads) == pytest.approx(expected)


def test_depth_alone_is_no_correlation_within_layers():
    """Both fall with depth, and within a layer less stable heads are the more important."""
    layer = np.repeat(np.arange(6), 6)
    rank = np.tile(np.arange(6), 6)
    heads = heads_of_pair(-10.0 * layer + rank, -10.0 * layer - rank, 6)
    assert seeds.stability_and_impact(heads) > 0.8
    assert seeds.within_layers(heads) == pytest.approx(-1)
    # Layers 2 and 3 of 6 are the middle: -10 layer is -25 there, -25 elsewhere
    assert seeds.middle_minus_others(heads) == pytest.approx(0)
    heads["stability"] = heads["layer"].isin([2, 3]).astype(float)
    assert seeds.middle_minus_others(heads) == 1
    assert np.isnan(seeds.middle_minus_others(heads_of_pair(rank[:12], rank[:12], 2)))


def by_pairs(square: np.ndarray) -> pd.Series:
    """[n, n] -> a number of each ordered pair, as a Series."""
    pairs = itertools.permutations(range(len(square)), 2)
    return pd.Series({(one, two): square[one, two] for one, two in pairs})


def test_of_what_seeds_add_the_interval_is_that_of_the_t_test():
    """Where a pair is a sum of what its seeds have, its mean is twice theirs, and leaving out seeds
    gives the error of that mean exactly."""
    own = np.random.default_rng(1).normal(size=5)
    found = seeds.over_seeds(by_pairs(own[:, None] + own), tests=6)
    low, high = stats.ttest_1samp(2 * own, 0).confidence_interval(1 - 0.05 / 6)
    assert (found.value, found.n_seeds) == (pytest.approx(2 * own.mean()), 5)
    assert found.ci_lo == pytest.approx(low)
    assert found.ci_hi == pytest.approx(high)
    # The smallest effect: t tests of samples that far from 0, in units of their standard error
    distance = found.smallest / (2 * stats.sem(own))
    samples = np.random.default_rng(2).normal(distance / np.sqrt(5), 1, size=(20_000, 5))
    p = stats.ttest_1samp(samples, 0, axis=1).pvalue
    assert (p < 0.05 / 6).mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / 20_000))


def test_two_seeds_have_no_interval():
    found = seeds.over_seeds(by_pairs(np.array([[0, 0.2], [0.4, 0]])))
    assert found.value == pytest.approx(0.3)
    assert np.isnan([found.ci_lo, found.ci_hi, found.smallest]).all()
    assert np.isnan(seeds.over_seeds(by_pairs(np.full((3, 3), np.nan))).value)


def expected_spearman(r: float, n: int) -> float:
    """Of n pairs of normal numbers with correlation r (Moran 1948)."""
    return 6 / (np.pi * (n + 1)) * (np.arcsin(r) + (n - 2) * np.arcsin(r / 2))


SETTINGS = [  # seeds, correlation of a seed's stable part with its impact: least and largest
    *((3, 0.0, 0.0), (4, 0.0, 0.0), (8, 0.0, 0.0)),
    *((4, -0.6, -0.6), (4, -0.9, 0.3), (8, -0.9, 0.3)),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_interval_over_seeds_holds_the_correlation(setting):
    """Studies of n seeds with 24 heads: what is stable of a head is its own, the same beside every
    other seed, and some of it is the pair's. So pairs that share a seed are alike; taking them for
    replicates misses more often than leaving out seeds."""
    n, least, largest = setting
    rng = np.random.default_rng([n, int(100 * least + 100)])
    n_heads = 24
    share = 0.8  # of the variance of stability that is the head's own
    correlations = np.linspace(least, largest, 201) * np.sqrt(share)
    truth = expected_spearman(correlations, n_heads).mean()
    missed = []
    missed_by_pairs = []
    for _ in range(300 * LONGER):
        r = rng.uniform(least, largest, size=(n, 1))
        own = rng.normal(size=(n, n_heads))
        impact = r * own + np.sqrt(1 - r**2) * rng.normal(size=(n, n_heads))
        of_pair = rng.normal(size=(n, n, n_heads))
        stability = np.sqrt(share) * own[:, None] + np.sqrt(1 - share) * of_pair  # [n, n, heads]
        # Spearman's for all pairs at once: without ties, by the differences of ranks
        difference = stability.argsort(-1).argsort(-1) - impact.argsort(-1).argsort(-1)[:, None]
        rho = 1 - 6 * np.square(difference).sum(-1) / (n_heads**3 - n_heads)  # [n, n]
        values = by_pairs(rho)
        found = seeds.over_seeds(values)
        missed.append(not found.ci_lo <= truth <= found.ci_hi)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        missed_by_pairs.append(not low <= truth <= high)
    expected = stats.spearmanr(stability[0, 1], impact[0]).statistic
    assert rho[0, 1] == pytest.approx(expected)
    miss, naive = np.mean(missed), np.mean(missed_by_pairs)
    record("seeds: correlation over heads", str(setting), coverage=1 - miss, pairs=1 - naive)
    assert miss <= 0.05 + 3.5 * np.sqrt(0.05 * 0.95 / len(missed))
    assert naive > miss


# -------------------------------------------------------------------------------- the whole script
def plant(root: Path, n_seeds: int, text: Path, cache: Path) -> list[str]:
    """Folders as `make seeds` leaves them: the adaptive arms of all seeds are one function, the
    controls are not."""
    tokenizer = janus.HFWikiTextLoader(str(text), "train:512", 16, "train", cache).tokenizer
    model = model_of(0, vocab_size=512)
    folders = []
    for seed in range(1, n_seeds + 1):
        folder = root / str(seed)
        plant_seed(folder, seed)
        rows = []
        models = {
            "adaptive": twin_of(model) if seed % 2 else model,
            "control": model_of(seed, vocab_size=512),
        }
        for arm, of_arm in models.items():
            tokenizer.save(str(folder / arm / "tokenizer.json"))
            path = save_checkpoint(folder / arm, of_arm, arm, text, cache)
            rng = np.random.default_rng(seed)
            about = {"run": arm, "checkpoint": str(path), "ckpt_sha": janus.sha256(path)}
            for layer, head in itertools.product(range(N_LAYERS), range(N_HEADS)):
                place = {"layer": layer, "head": head}
                rows.append(about | place | {"mode": "mean", "delta": rng.normal()})
                rows.append(about | place | {"mode": "zero", "delta": 99.0})
        pd.DataFrame(rows).to_csv(folder / "results_ablation.csv", index=False)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def planted(tmp_path_factory, text_file, cache_dir):
    """The folders of three seeds, and what the tool makes of them."""
    root = tmp_path_factory.mktemp("seeds")
    folders = plant(root, 3, text_file, cache_dir)
    out = root / "out"
    argv = [*folders, "--save_dir", str(out), "--cache_dir", str(cache_dir)]
    assert seeds.main(argv) == 0
    return folders, out


def test_folders_of_make_seeds_give_a_table_and_a_figure(planted):
    folders, out = planted
    table = pd.read_csv(out / "head_stability.csv")
    assert set(table) >= seeds.STABILITY_COLUMNS
    assert len(table) == 2 * 6 * N_LAYERS * N_HEADS  # arms, ordered pairs, heads
    # Only the mode that ranks heads, and each head's own impact beside each of the others
    assert (table["mode"] == "mean").all()
    ablation = pd.read_csv(Path(folders[1]) / "results_ablation.csv")
    ablation = ablation[(ablation["run"] == "control") & (ablation["mode"] == "mean")]
    of_seed = table[(table["arm"] == "control") & (table["seed"] == 2) & (table["other_seed"] == 3)]
    np.testing.assert_allclose(of_seed["impact"], ablation["delta"], rtol=1e-5)
    same = table["arm"] == "adaptive"
    assert (table.loc[same, "stability"] > 0.99).all()
    assert table.loc[~same, "stability"].abs().mean() < 0.3
    assert Image.open(out / "head_stability.png").size[0] > 1000
    assert (out / "head_stability.narrow.svg").is_file()


def test_redraw_needs_the_csv_alone(planted, tmp_path, capsys):
    _, out = planted
    (tmp_path / "head_stability.csv").write_bytes((out / "head_stability.csv").read_bytes())
    assert seeds.main(["--redraw", "--save_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "cannot tell: 3 seeds" in said
    assert "above all 19 draws of random heads: 100 % (by chance 5 %)" in said.replace("%", " %")
    for name in ("head_stability.svg", "head_stability.narrow.svg"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert not (tmp_path / "seeds.png").exists()


def test_two_seeds_are_told_to_be_one_pair(planted, tmp_path, cache_dir, capsys):
    folders, _ = planted
    argv = [*folders[:2], "--save_dir", str(tmp_path), "--cache_dir", str(cache_dir)]
    assert seeds.main(argv) == 0
    said = capsys.readouterr().out
    assert "cannot tell: 2 seeds are one pair" in said
    assert (tmp_path / "head_stability.png").is_file()


def test_wrong_inputs_are_one_line_and_older_folders_work(planted, tmp_path, cache_dir, capsys):
    folders, out = planted

    def says(status: int, *argv: str) -> str:
        assert seeds.main([*argv, "--save_dir", str(tmp_path)]) == status
        said = capsys.readouterr()
        assert said.err.count("\n") == status
        return said.out + said.err

    # Folders without checkpoints: all that there was before, and what lacks
    older = []
    for seed in (1, 2):
        plant_seed(tmp_path / f"older{seed}", seed)
        older.append(str(tmp_path / f"older{seed}"))
    assert "has no results_ablation.csv" in says(0, *older)
    assert (tmp_path / "seeds.png").is_file()
    for folder, source in zip(older, folders, strict=False):
        table = pd.read_csv(Path(source) / "results_ablation.csv")
        gone = table.assign(ckpt_sha="0" * 64)
        gone.to_csv(Path(folder) / "results_ablation.csv", index=False)
        # Read as a number it would be 0, with which one hash in sixteen begins
        assert set(seeds.read_impacts(Path(folder))["ckpt_sha"]) == {"0" * 64}
    assert "the checkpoint of the adaptive arm of" in says(0, *older)
    table.drop(columns="delta").to_csv(Path(older[0]) / "results_ablation.csv", index=False)
    assert "cannot be read" in says(1, *older)

    # Tables that are none
    csv = tmp_path / "head_stability.csv"
    pd.read_csv(out / "head_stability.csv").drop(columns="cka").to_csv(csv, index=False)
    assert "has no columns ['cka']" in says(1, "--redraw")
    csv.write_text("")
    assert "is not a CSV" in says(1, "--redraw")
    with pytest.raises(SystemExit, match="2"):
        seeds.main([])
    empty = tmp_path / "empty"
    assert seeds.main(["--redraw", "--save_dir", str(empty)]) == 1
    assert "no seeds.csv and no head_stability.csv" in capsys.readouterr().err

"""Every head's type (hero_head_analysis.py): a model made by hand, whose heads are known, and plain
computations with numpy and scipy."""

import math
import re
import shutil
from pathlib import Path

import hero_tables
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from scipy import stats
from test_hero import (
    WORDS,
    as_text,
    make_model,
    run,
    some_head,
    windows,
    write_checkpoint,
    write_csv,
    write_text,
)

import hero_head_analysis as hero

PREVIOUS = (0, 0)  # layer and head
INDUCTION = (1, 1)


# ------------------------------------------------------------------------- a model made by hand
def hand_made() -> hero.NewGPT:
    """Two layers of two heads: L0H0 attends to the previous token and writes which it is, L1H1 to
    what followed an earlier copy of the current one; the others are noise.

    The residual stream: a constant, the token [V], the token before [V].
    """
    n_vocab = len(WORDS) + 1
    shape = dict(n_layers=2, d_model=64, n_heads=2, n_kv_heads=2, d_head=64, d_ff=16)
    cfg = hero.GPTConfig(vocab_size=n_vocab, seq_len=40, rope_theta=1e6, **shape)
    torch.manual_seed(0)
    model = hero.NewGPT(cfg).eval().requires_grad_(False)
    tokens = torch.arange(n_vocab)
    token = 1 + tokens
    before = 1 + n_vocab + tokens
    model.embedding.weight.zero_()
    model.embedding.weight[:, 0] = 1
    model.embedding.weight[tokens, token] = 1

    # L0H0: the score of a key d tokens back is a sum of cos((d - 1) frequency), largest at d = 1
    attn = model.blocks[0].attn
    frequency = 1e6 ** (-torch.arange(16) / 32)  # the fast half of the rotary pairs (i, i + 32)
    w_q, _, w_k, _, w_v, _ = attn.w_qkv.weight.view(6, 64, 64)  # [K, D] each
    for weights in (w_q, w_k, w_v):
        weights.zero_()
    w_q[:16, 0] = 2.5
    w_k[:16, 0] = 2.5 * frequency.cos()
    w_k[32:48, 0] = 2.5 * frequency.sin()
    w_v[tokens, token] = 1
    attn.w_o.weight[:, :64] = 0
    attn.w_o.weight[before, tokens] = (2 / 64) ** 0.5  # the rms of an embedding

    # L1H1: the current token meets a key that says the same of the token before it
    attn = model.blocks[1].attn
    slow = torch.cat((torch.arange(16, 32), torch.arange(48, 64)))[:n_vocab]  # hardly turn
    _, w_q, _, w_k, _, w_v = attn.w_qkv.weight.view(6, 64, 64)
    for weights in (w_q, w_k, w_v):
        weights.zero_()
    w_q[slow, token] = 2.5
    w_k[slow, before] = 2.5
    w_v[tokens, token] = 1
    attn.w_o.weight[:, 64:] = 0
    attn.w_o.weight[token, 64 + tokens] = 1
    return model


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The outputs of the whole analysis of that model. Its ablation CSV has the columns of the
    first versions only."""
    root = tmp_path_factory.mktemp("made")
    model = hand_made()
    write_text(root / "text.txt")
    checkpoint = write_checkpoint(root / "adaptive", model, "adaptive", root / "text.txt")
    write_csv(
        root / "results_ablation.csv", {"adaptive": checkpoint}, model, {"adaptive": INDUCTION}
    )
    assert run(root) == 0
    return root / "out"


@pytest.fixture(scope="module")
def types(done: Path) -> pd.DataFrame:
    return pd.read_csv(done / "head_types.csv")


@pytest.mark.parametrize(
    ("score", "place"),
    [
        ("previous token", PREVIOUS),
        ("induction", INDUCTION),
        ("induction, random tokens", INDUCTION),
    ],
)
def test_the_planted_heads_are_found(types: pd.DataFrame, score: str, place: tuple[int, int]):
    of_score = types[types["score"] == score].set_index(["layer", "head"])
    value = of_score["value"].sort_values(ascending=False)
    assert value.index[0] == place
    assert value.iloc[0] > 0.8 and value.iloc[1] < 0.3
    # Shuffled text moves what follows a copy; what stands before a token stays there
    null = of_score["null"][place]
    if place == INDUCTION:
        assert null < 0.3
    else:
        assert null == pytest.approx(value.iloc[0], abs=0.02)


def test_every_head_stands_once_for_every_score(types: pd.DataFrame, done: Path):
    names = [score.name for score in hero.SCORES] + ["write_norm"]
    expected = {(layer, head, name) for layer in (0, 1) for head in (0, 1) for name in names}
    places = list(types[["layer", "head", "score"]].itertuples(index=False, name=None))
    assert len(places) == len(expected) and set(places) == expected
    assert list(types.columns) == ["run", "layer", "head", "score", "value", "null", "role"]
    assert types["value"].notna().all()
    assert (types["null"].isna() == (types["score"] == "write_norm")).all()
    # The heads that are studied have the same numbers in their own table
    studied = pd.read_csv(done / "hero_scores.csv").dropna(subset=["rank"])
    both = studied.merge(types, on=["run", "layer", "head", "score"])
    assert len(both) == len(studied)
    np.testing.assert_allclose(both["value_x"], both["value_y"], rtol=1e-5)
    np.testing.assert_allclose(both["null_x"], both["null_y"], rtol=1e-5, atol=1e-7)
    assert (both["role_x"] == both["role_y"]).all()
    by_place = types.drop_duplicates(["layer", "head"]).set_index(["layer", "head"])
    assert by_place["role"][INDUCTION] == "hero"


@pytest.mark.parametrize(("n", "stride"), [(12, 1), (300, 2)])
def test_the_norm_of_what_a_head_writes(n: int, stride: int):
    model = make_model()
    idx = windows(model, n)
    tap = {f"z.{layer}": None for layer in range(3)}
    model(idx, tap=tap)
    found = hero.write_norms(model, as_text(idx)).numpy()
    assert found.shape == (3, 4)
    for layer in range(3):
        w_o = model.blocks[layer].attn.w_o.weight.numpy().astype(float)  # [D, H K]
        z = tap[f"z.{layer}"].numpy().astype(float)[:, ::stride].reshape(-1, 4, 6)  # [N, H, K]
        for head in range(4):
            said = z[:, head] - z[:, head].mean(0)
            written = said @ w_o[:, 6 * head : 6 * head + 6].T  # [N, D]
            norm = np.sqrt((written**2).sum(1)).mean()
            assert found[layer, head] == pytest.approx(norm, rel=1e-4)


# ----------------------------------------------------------- which score finds heads that do nothing
def test_a_resampled_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(6, size=20).astype(float)  # with ties
    y = x + rng.normal(size=20)
    found = hero.resampled_spearman(x, y)
    assert found[0] == pytest.approx(stats.spearmanr(x, y).statistic)
    for draw in (0, 1, 17, 999):
        times = hero.resamples(20)[draw].astype(int)
        expected = stats.spearmanr(np.repeat(x, times), np.repeat(y, times)).statistic
        assert found[1 + draw] == pytest.approx(expected)
    with pytest.warns(stats.ConstantInputWarning):
        assert np.isnan(stats.spearmanr(0 * x, y).statistic)
    assert np.isnan(hero.resampled_spearman(0 * x, y)).all()


def made_up(n_layers: int, write_noise: float, first_noise: float) -> tuple[list, pd.DataFrame]:
    """Rows of head_types.csv and of phase 4: six heads a layer; impact goes with what they write
    and against the attention on the first position, each with its noise."""
    rng = np.random.default_rng(1)
    types = []
    ranked = []
    for layer, head in np.ndindex(n_layers, 6):
        size = rng.exponential()
        sign = rng.choice([-1, 1])  # an impact below 0 is an impact
        place = dict(run="adaptive", layer=layer, head=head)
        ranked.append(place | dict(mode="mean", delta=sign * size))
        write = size + write_noise * rng.normal()
        first = -size + first_noise * rng.normal()
        types.append(place | dict(score="write_norm", value=write))
        types.append(place | dict(score="first position", value=first))
    return types, pd.DataFrame(ranked)


def inactive(n_layers: int, write_noise: float, first_noise: float) -> pd.DataFrame:
    return pd.DataFrame(hero.scores_of_inactivity(*made_up(n_layers, write_noise, first_noise)))


def test_both_scores_speak_for_doing_nothing_and_are_compared_by_pairs():
    types, ranked = made_up(6, 0.1, 1.0)
    found = pd.DataFrame(hero.scores_of_inactivity(types, ranked)).set_index("score")
    size = ranked["delta"].abs()
    values = pd.DataFrame(types).pivot(index=["layer", "head"], columns="score", values="value")
    write = stats.spearmanr(values["write_norm"], size).statistic
    first = stats.spearmanr(-values["first position"], size).statistic
    assert write > first > 0
    expected = [write, first, write - first]
    np.testing.assert_allclose(found["spearman"], expected)
    assert (found["n"] == 36).all() and (found["unit"] == "head").all()
    assert ((found["ci_low"] < found["spearman"]) & (found["spearman"] < found["ci_high"])).all()
    # Phase 4 may have measured some layers only, and another run may be none of these
    some = ranked[ranked["layer"] < 4].assign(extra=1)
    other = some.assign(run="other")
    found = pd.DataFrame(hero.scores_of_inactivity(types, pd.concat([some, other])))
    assert (found["n"] == 24).all() and set(found["run"]) == {"adaptive"}
    # The hero's run comes first, whatever it is called; the sentence is about it
    twice = [row | {"run": "z"} for row in types] + types
    found = pd.DataFrame(
        hero.scores_of_inactivity(twice, pd.concat([ranked, some.assign(run="z")]))
    )
    assert found["run"].unique().tolist() == ["z", "adaptive"]
    assert "over 24 heads" in hero.what_finds_inactive(found)


def test_the_sentence_says_which_is_better_or_that_it_cannot_tell():
    said = hero.what_finds_inactive(inactive(6, 0.1, 3.0))
    assert said.startswith("Writing little finds them better") and "36 heads" in said
    said = hero.what_finds_inactive(inactive(6, 3.0, 0.1))
    assert said.startswith("Attention to the first position finds them better")
    assert hero.what_finds_inactive(inactive(6, 1.0, 1.0)).startswith("Not told")
    few = inactive(2, 0.1, 3.0)
    assert few["ci_low"].isna().all() and few["spearman"].notna().all()
    said = hero.what_finds_inactive(few)
    assert said.startswith("Cannot tell") and f"{hero.MIN_HEADS} heads" in said


def test_an_older_ablation_csv_is_enough(done: Path):
    table = pd.read_csv(done / "hero_inactive.csv")
    assert table["score"].tolist() == ["write_norm", "first position", "difference"]
    assert (table["n"] == 4).all()
    assert "Cannot tell" in (done / "hero_report.md").read_text()


# -------------------------------------------------------------------------------- figure and page
def two_runs(folder: Path) -> pd.DataFrame:
    """head_types.csv of two runs, the second with more heads."""
    rng = np.random.default_rng(0)
    rows = []
    for run_name, n_heads in {"adaptive": 4, "control": 6}.items():
        for layer, head in np.ndindex(3, n_heads):
            for score in ("previous token", "write_norm"):
                row = dict(run=run_name, layer=layer, head=head, score=score)
                rows.append(row | dict(value=rng.random(), null=0.1, role=""))
    table = pd.DataFrame(rows)
    hero_rows = (table["run"] == "adaptive") & (table["layer"] == 2) & (table["head"] == 1)
    other = (table["run"] == "control") & (table["layer"] == 0) & (table["head"] == 5)
    table.loc[hero_rows, "role"] = "hero"
    table.loc[other, "role"] = "match in control; hero of control"
    table.loc[table["score"] == "previous token", "value"] /= 2
    table.to_csv(folder / "head_types.csv", index=False)
    return table


def test_the_figure_has_one_scale_a_score_and_outlines_the_studied_heads(tmp_path, monkeypatch):
    table = two_runs(tmp_path)
    kept = []
    monkeypatch.setattr(plt, "close", lambda figure="all": kept.append(figure))
    hero.draw_head_types(tmp_path)
    for figure in kept:  # wide and narrow
        panels = [ax for ax in figure.axes if "0 to" in ax.get_title()]
        assert len(panels) == 2
        for ax, (score, rows) in zip(panels, table.groupby("score", sort=False), strict=True):
            (image,) = ax.images  # of both runs
            assert image.get_clim() == pytest.approx((0, rows["value"].max()))
            values = [
                part.pivot(index="layer", columns="head", values="value")
                for _, part in rows.groupby("run")
            ]
            drawn = image.get_array().filled(np.nan)
            np.testing.assert_allclose(drawn[:, :4], values[0])
            np.testing.assert_allclose(drawn[:, 5:], values[1])
            assert np.isnan(drawn[:, 4]).all()
            upper = rows["value"].max() * (1 if score == "write_norm" else 100)
            written = float(ax.get_title().rpartition("0 to ")[2].removesuffix(" %"))
            assert written == pytest.approx(upper, rel=0.02)
            # The second map begins one column after the four heads of the first
            places = {p.get_xy() for p in ax.patches if isinstance(p, Rectangle)}
            assert places == {(0.5, 1.5), (5 + 4.5, -0.5)}
    assert {path.name for path in tmp_path.iterdir()} == {
        "head_types.csv",
        "head_types.png",
        "head_types.svg",
        "head_types.narrow.svg",
    }


def test_it_is_redrawn_from_its_csv_and_shown_on_the_page(done: Path, tmp_path: Path, capsys):
    page = (done / "hero_report.html").read_text()
    assert len(page) < 5e6
    card = re.search(r'<details class="section" id="head_types".*?</details>', page, re.DOTALL)
    assert card and card[0].count("<svg") == 2 and "<img" not in card[0]
    assert 'id="inactive"' in page and '"norm of what it writes"' in page
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    before = (copy / "head_types.svg").read_bytes()
    for name in ("head_types.png", "head_types.svg", "head_types.narrow.svg"):
        (copy / name).unlink()
    assert hero.main(["--redraw", "--save_dir", str(copy)]) == 0
    assert (copy / "head_types.svg").read_bytes() == before
    (copy / "head_types.csv").unlink()
    assert hero.main(["--redraw", "--save_dir", str(copy)]) == 1
    assert "head_types.csv cannot be drawn" in capsys.readouterr().err


def test_a_score_that_no_head_has_is_left_out_of_the_table_for_people():
    types, _ = made_up(1, 0.1, 0.1)
    table = pd.DataFrame(types).assign(null=math.nan)
    table.loc[table["score"] == "first position", "value"] = math.nan
    shown = hero.types_for_people(table)
    assert shown["score"].tolist() == ["norm of what it writes"]
    largest = table.dropna(subset=["value"]).sort_values("value").iloc[-1]
    assert shown["head"].item() == f"L{largest['layer']}H{largest['head']}"
    assert hero_tables.report(["a"]).tables["head_types"]["score"].tolist() == ["a"]


def test_roles_of_one_head_are_joined():
    model = make_model()
    heads = [some_head(model, 1, 2), some_head(model, 0, 1, "a"), some_head(model, 0, 1, "b")]
    scored = hero.score_models(heads, as_text(windows(model, 4)))
    table = pd.DataFrame(hero.head_types(heads, scored))
    roles = table.drop_duplicates(["layer", "head"]).set_index(["layer", "head"])["role"]
    assert roles[(1, 2)] == "hero" and roles[(0, 1)] == "a; b" and (roles == "").sum() == 10

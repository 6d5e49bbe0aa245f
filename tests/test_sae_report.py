"""What report, headlines and figure 2 say of SAEs beside their nulls, other seeds and sparsities: from
tables of known numbers, and as before where there are none."""

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import train_sae as ts

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(ts.__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import headlines  # noqa: E402
import report  # noqa: E402

NAN = float("nan")
GAINS = {  # by layer: value, low, high
    "gaussian": [(-0.04, -0.06, -0.02), (0.25, 0.2, 0.3), (0.39, 0.3, 0.45)],
    "decoder": [(0.42, 0.4, 0.44), (0.7, 0.6, 0.8), (0.74, -0.1, 0.9)],
}


def saes_of(arm: str, unit: str = "layer", arch: str = "batchtopk", **more) -> pd.DataFrame:
    """Rows of sae_metrics.csv, three layers with an SAE each, of a head two."""
    rows = []
    for layer in range(3):
        for head in (0, 1) if unit == "head" else (NAN,):
            row = dict(run=arm, unit=unit, arch=arch, setting="k 16", seed=42, site="z")
            row |= dict(layer=layer, head=head, split="train", n_documents=58, n_windows=156)
            row |= dict(l0=16.0, fvu=0.1 * (layer + 1), fvu_lo=0.05, fvu_hi=0.4)
            row |= dict(l0_lo=15.0, l0_hi=17.0, mse=1.0, mse_lo=0.9, mse_hi=1.1)
            row |= dict(d_in=32, d_sae=256, tokens=204_800, dead_share=0.0)
            rows.append(row | dict(dead_share_tokens=100_000, folder="x") | more)
    return pd.DataFrame(rows)


def with_gains(table: pd.DataFrame, gains=GAINS) -> pd.DataFrame:
    table = table.copy()
    for null, values in gains.items():
        columns = [f"gain_{null}{end}" for end in ("", "_lo", "_hi")]
        table[columns] = np.array(values)[table["layer"]]
    return table


def run_of(folder: Path, metrics: pd.DataFrame, **tables: pd.DataFrame) -> report.Run:
    """A run with SAEs: sae_metrics.csv, table2.csv of it, figure 2, and more tables of saes/."""
    (folder / "adaptive").mkdir(parents=True)
    (folder / "adaptive" / "telemetry.csv").touch()
    (folder / "saes").mkdir()
    plt.imsave(folder / "saes" / "figure2_l0_by_depth.png", np.zeros((2, 2)))
    for name, table in {"sae_metrics": metrics, "table2": ts.table2(metrics), **tables}.items():
        table.to_csv(folder / "saes" / f"{name}.csv", index=False)
    return report.Run(folder)


# ------------------------------------------------------------------------------ what was learnt
def test_the_sentence_about_nulls_has_their_range_and_in_how_many_layers_they_differ(tmp_path):
    metrics = pd.concat([with_gains(saes_of("adaptive")), saes_of("control")])
    figure_2, learnt = report.saes(run_of(tmp_path, metrics))
    assert learnt.reading == (
        "Any SAE rebuilds something, so each is compared with the same SAE where there was nothing "
        "to learn: on normal rows of the same covariance or with random directions that stay. The "
        "gain is by which share less it leaves unexplained. In the adaptive arm the SAEs learned "
        "more than the covariance alone gives in 2 of 3 layers: the gain over normal rows is -4 "
        "to 39 % (interval without 0 in 3 of 3 layers, in 1 more is left); the gain over a random "
        "decoder is 42 to 74 % (interval without 0 in 2 of 3 layers). Intervals are over the "
        "documents of this one training: another training may give another gain."
    )
    assert learnt.table.to_dict("list") == {
        "layer": [0, 1, 2],
        "arm": ["adaptive"] * 3,
        "gain over normal rows, %": ["-4 [-6, -2]", "25 [20, 30]", "39 [30, 45]"],
        "gain over a random decoder, %": [
            "42 [40, 44]",
            "70 [60, 80]",
            "74 [-10, 90]",
        ],
    }


def test_the_untrained_model_and_what_has_no_interval_are_told(tmp_path):
    gains = {"untrained": [(0.2, NAN, NAN), (0.2, 0.1, 0.3), (0.2, 0.1, 0.3)]}
    metrics = with_gains(saes_of("adaptive"), gains)
    _, learnt = report.saes(run_of(tmp_path, metrics))
    assert "to learn: on the model before its training. The gain" in learnt.reading
    assert "In the adaptive arm, the gain over the model before training is 20 %" in learnt.reading
    excludes = "(interval without 0 in 2 of 3 layers; 1 without interval)"
    assert f"before training is 20 % {excludes}." in learnt.reading


def test_kinds_of_saes_are_told_apart_and_several_of_a_layer_are_no_layers(tmp_path):
    of_layers = [with_gains(saes_of("adaptive", setting=f"k {k}")) for k in (16, 32)]
    of_heads = saes_of("adaptive", "head", "relu", setting="l1 0.01", l0=40.0, fvu=0.02)
    metrics = pd.concat([*of_layers, of_heads])
    figure_2, learnt = report.saes(run_of(tmp_path, metrics))
    layer_first = "batchtopk, an SAE a layer: adaptive 0.200 (layers 0.100 to 0.300), L0 16.0; "
    layer_first += "relu, an SAE a head: adaptive 0.020 (layers 0.020 to 0.020), L0 40.0."
    assert figure_2.reading.endswith(layer_first)
    assert "unexplained. In the adaptive arm" in learnt.reading, "only one kind has nulls"
    assert "in 6 of 6 SAEs, in 2 more is left" in learnt.reading and "relu" not in learnt.reading
    assert learnt.table["setting"].tolist() == ["k 16", "k 32"] * 3
    metrics = pd.concat([*of_layers, with_gains(of_heads), with_gains(saes_of("control"))])
    _, learnt = report.saes(run_of(tmp_path / "both", metrics))
    parts = ["batchtopk, an SAE a layer: In the adaptive arm", ". In the control arm"]
    parts.append(". relu, an SAE a head: In the adaptive arm")
    places = [learnt.reading.index(part) for part in parts]
    assert places == sorted(places) and learnt.reading.count("batchtopk") == 1


@pytest.mark.parametrize(
    "low, high, words",
    [
        (0.21, 0.45, "21 to 45 %"),
        (-0.04, 0.39, "-4 to 39 %"),
        (-0.2, -0.1, "-20 to -10 %"),
        (-0.1, -0.1, "-10 %"),
        (0.096, 0.104, "10 %"),
        (0.0, 0.0, "0 %"),
        (-0.001, 0.02, "0 to 2 %"),
    ],
)
def test_a_range_in_words(low, high, words):
    assert report.per_cent_range(low, high) == words


def test_without_nulls_seeds_and_sparsities_there_is_figure_2_alone(tmp_path):
    run = run_of(tmp_path, saes_of("adaptive"))
    [figure_2] = report.saes(run)
    assert figure_2.title.startswith("Figure 2")
    assert figure_2.reading.endswith(
        "Unexplained variance: adaptive 0.200 (layers 0.100 to 0.300), L0 16.0."
    )
    (tmp_path / "saes" / "table2.csv").unlink()
    assert len(report.saes(run)) == 1


def page_of(run: report.Run) -> str:
    """The section alone, as the page shows it."""
    [section] = [one for one in report.SECTIONS if one.exhibits is report.saes]
    part = report.section_of_run(run, 0, section, several=False)
    assert not part.missing
    none = pd.DataFrame({"what": []})
    values = dict(title="t", runs=[], headlines=none, sections=[(section, [part])])
    return report.render_page("report.html", show=report.show, **values)


def test_the_page_shows_the_table_of_gains(tmp_path):
    page = page_of(run_of(tmp_path / "with", with_gains(saes_of("adaptive"))))
    assert "<td>39 [30, 45]</td>" in page and "is 42 to 74 %" in page
    for null in ("normal rows", "a random decoder"):
        assert re.search(rf'<abbr tabindex="0" title="[^"]+">gain over {null}</abbr>', page), null
    page = page_of(run_of(tmp_path / "without", saes_of("adaptive")))
    assert "gain over" not in page and "that is not there" not in page


# ------------------------------------------------------------------------------ frontier and seeds
def test_the_frontier_is_shown_where_there_is_one(tmp_path):
    metrics = []
    for k, fvu in {8: 0.3, 16: 0.2, 32: 0.1}.items():
        metrics.append(saes_of("adaptive", setting=f"k {k}", l0=float(k), fvu=fvu))
    metrics = pd.concat(metrics)
    table = ts.frontier_of(ts.table2(metrics))
    run = run_of(tmp_path, metrics, sae_frontier=table)
    assert len(report.saes(run)) == 1, "a table without its figure"
    plt.imsave(tmp_path / "saes" / "sae_frontier.png", np.zeros((2, 2)))
    _, shown = report.saes(run)
    assert shown.image == "saes/sae_frontier.png"
    told = "adaptive 0.300 at L0 8.0, 0.200 at L0 16.0, 0.100 at L0 32.0."
    assert shown.reading.endswith(told)


def test_saes_of_other_sizes_are_other_curves(tmp_path):
    """Or a wider SAE, and one that was trained longer, would look like a sparser one."""
    metrics = []
    for d_sae, tokens, k, fvu in ((64, 1e6, 8, 0.3), (64, 1e6, 16, 0.2), (128, 1e6, 32, 0.1)):
        one = saes_of("adaptive", setting=f"k {k}", l0=float(k), fvu=fvu)
        metrics.append(one.assign(d_in=16, d_sae=d_sae, tokens=int(tokens)))
    table = ts.frontier_of(ts.table2(pd.concat(metrics)))
    assert sorted(table["setting"].unique()) == ["k 16", "k 8"], "one of another size is no curve"

    longer = [one.assign(tokens=2_000_000, fvu=0.05) for one in metrics[:2]]
    both = [one.assign(seed=1) for one in longer]  # of one seed the later would replace the other
    table = ts.frontier_of(ts.table2(pd.concat([*metrics, *both])))
    figure = ts.draw_frontier(table)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close(figure)
    sizes = sorted(label[label.index(", seed") :].split(", ")[2] for label in labels)
    assert sizes == ["1,000,000 tokens", "2,000,000 tokens"]
    run = run_of(tmp_path, pd.concat(metrics), sae_frontier=table)
    plt.imsave(tmp_path / "saes" / "sae_frontier.png", np.zeros((2, 2)))
    told = report.saes(run)[-1].reading
    assert "adaptive, tokens 1,000,000: 0.300 at L0 8.0, 0.200 at L0 16.0" in told
    assert "adaptive, tokens 2,000,000: 0.050 at L0 8.0, 0.050 at L0 16.0" in told


def test_pw_mcc_is_told_beside_its_null(tmp_path):
    pairs = pd.DataFrame(dict(run="adaptive", unit="layer", arch="batchtopk", layer=range(3)))
    pairs = pairs.assign(
        pw_mcc=[0.9, 0.6, 0.31], pw_mcc_null=0.3, null_sd=0.01, n_matched=[9, 8, 7]
    )
    _, told = report.saes(run_of(tmp_path, saes_of("adaptive"), seed_stability=pairs))
    both = "adaptive 0.60 (0.31 to 0.90), 0.30 by chance: 0.01 to 0.60 above it, pair by pair."
    assert told.reading.endswith(both)
    assert told.n == "3 pairs of SAEs, at least 7 features matched"


# ------------------------------------------------------------------------------ verdict, headlines
def test_the_verdict_compares_like_with_like(tmp_path):
    """SAEs of heads, and a sparsity that one arm alone has, change nothing."""
    better = saes_of("adaptive").assign(fvu=[0.09, 0.18, 0.28])
    alone = report.judge_saes(run_of(tmp_path / "alone", pd.concat([better, saes_of("control")])))
    more = [
        saes_of("adaptive", setting="k 64", fvu=0.01),
        saes_of("control", "head", "relu", fvu=9),
    ]
    more.append(saes_of("adaptive", "head", "relu", fvu=0.001))
    metrics = pd.concat([*more, better, saes_of("control")])
    [found] = report.judge_saes(run_of(tmp_path / "more", metrics))
    assert (found.word, found.evidence) == (alone[0].word, alone[0].evidence)
    assert "-0.0167" in found.evidence and "over 3 layers" in found.evidence


def test_the_headline_counts_layers_and_tells_the_gain_where_there_is_one(tmp_path):
    run_of(tmp_path / "plain", saes_of("adaptive"))
    [plain] = headlines.sae_quality(tmp_path / "plain")
    assert plain[1] == "adaptive 0.200 +- 0.058 (s.e. over 3 layers), L0 16.0"
    several = [with_gains(saes_of("adaptive", seed=seed)) for seed in (1, 2)]
    run_of(tmp_path / "more", pd.concat([*several, saes_of("adaptive", "head", "relu", fvu=9)]))
    fvu, gain = headlines.sae_quality(tmp_path / "more")
    assert fvu == plain
    assert gain[1] == "adaptive 20 % (layers -4 to 39)"
    one = with_gains(saes_of("adaptive"))
    one.loc[one["layer"] != 1, [c for c in one if c.startswith("gain_")]] = NAN
    run_of(tmp_path / "one", one)
    _, gain = headlines.sae_quality(tmp_path / "one")
    row = 100 * one.set_index("layer").loc[1]
    interval = f"[{row['gain_gaussian_lo']:.0f}, {row['gain_gaussian_hi']:.0f}]"
    assert gain[1] == f"adaptive {row['gain_gaussian']:.0f} % {interval}, layer 1"


# ------------------------------------------------------------------------------ figure 2
def of_heads(arm: str, n_heads: int) -> pd.DataFrame:
    """SAEs of heads whose L0 grows with the layer."""
    rng = np.random.default_rng(len(arm))
    one = saes_of(arm, "head", "relu", setting="l1 0.01")
    table = pd.concat([one[one["head"] == 0].assign(head=head) for head in range(n_heads)])
    return table.assign(l0=20.0 + 10 * table["layer"] + rng.normal(0, 3, len(table)))


def bars(ax) -> dict[str, np.ndarray]:
    """Of each curve by label: the ends of its bars [layers, 2]."""
    found = {}
    for drawn in ax.containers:
        [collection] = drawn[2]
        found[drawn.get_label()] = np.array([line[:, 1] for line in collection.get_segments()])
    return found


def test_figure_2_draws_l0_of_heads_with_an_interval_over_them_and_no_l0_that_is_fixed():
    metrics = [of_heads("adaptive", 6), of_heads("control", 6)]
    metrics += [saes_of("adaptive"), saes_of("control")]
    table = ts.table2(pd.concat(metrics))
    figure = ts.draw_depth(table)
    l0, fvu = figure.axes
    assert l0.get_ylabel().startswith("L0") and fvu.get_ylabel().startswith("FVU")
    drawn = bars(l0)
    assert len(drawn) == 2 and len(bars(fvu)) == 4
    assert len(figure.legends[0].get_texts()) == 4, "of all curves, not those of the first panel"
    for arm, heads in {"adaptive": metrics[0], "control": metrics[1]}.items():
        by_layer = [rows["l0"] for _, rows in heads.groupby("layer")]
        ends = [stats.t.interval(0.95, 5, x.mean(), stats.sem(x)) for x in by_layer]
        [label] = [label for label in drawn if label.startswith(arm)]
        np.testing.assert_allclose(drawn[label], ends)
    note = " ".join(figure.get_supxlabel().split())
    assert "L0 of batchtopk is fixed: 16 to 16." in note
    assert "over the 6 heads of a layer instead (Student's t); small: 8 latents" in note
    assert "204,800 tokens each" in note
    published = "control -> adaptive): L3 32.4 -> 28.4, L6 39.7 -> 45.5, L9 58.9 -> 73.9."
    assert "Published L0, not measured here" in note and note.endswith(published)
    plt.close(figure)


def test_figure_2_draws_what_a_layer_recovers_and_not_the_noise_of_single_heads():
    recovered = dict(ce_recovered_zero=0.9, ce_recovered_mean=0.9, ce_informative=True)
    recovered |= dict(ce_recovered_mean_lo=0.8, ce_recovered_mean_hi=1.0)
    heads = of_heads("adaptive", 6).assign(**recovered)
    figure = ts.draw_depth(ts.table2(pd.concat([heads, saes_of("adaptive", **recovered)])))
    assert [ax.get_ylabel()[:2] for ax in figure.axes] == ["L0", "CE", "FV"]
    assert [len(ax.containers) for ax in figure.axes] == [1, 1, 2]
    assert "batchtopk" in figure.axes[1].containers[0].get_label()
    plt.close(figure)
    figure = ts.draw_depth(ts.table2(heads))
    assert [len(ax.containers) for ax in figure.axes] == [1, 1, 1], "rather than none"
    plt.close(figure)


@pytest.mark.parametrize("recovered", [-0.3, -10.0, 0.9])
def test_the_frame_of_figure_2_has_zero_and_every_interval(recovered):
    ends = dict(ce_recovered_mean_lo=1.02 * recovered, ce_recovered_mean_hi=0.98 * recovered)
    found = dict(ce_recovered_zero=0.9, ce_recovered_mean=recovered, ce_informative=True)
    figure = ts.draw_depth(ts.table2(saes_of("adaptive", **found | ends)))
    low, high = figure.axes[0].get_ylim()
    assert low <= min(0, *ends.values()) < max(0, *ends.values()) <= high and low < high
    plt.close(figure)


def test_figure_2_of_one_head_has_no_interval_and_large_ones_are_not_called_small():
    table = ts.table2(of_heads("adaptive", 1).assign(tokens=20_000_000))
    figure = ts.draw_depth(table)
    [drawn] = figure.axes[0].containers
    assert not any(line.size for line in drawn[2][0].get_segments())
    note = figure.get_supxlabel()
    assert "Open: no interval" in note and "small" not in note
    plt.close(figure)


def test_figure_2_without_heads_is_as_before():
    figure = ts.draw_depth(ts.table2(saes_of("adaptive")))
    assert [ax.get_ylabel()[:3] for ax in figure.axes] == ["FVU"]
    note = " ".join(figure.get_supxlabel().split())
    assert note.endswith("is fixed: 16 to 16.") and "Published" not in note
    plt.close(figure)
    # L0 of a layer that nothing fixes keeps its interval over documents
    figure = ts.draw_depth(ts.table2(saes_of("adaptive", arch="relu")))
    np.testing.assert_allclose(bars(figure.axes[0]).popitem()[1], [[15, 17]] * 3)
    plt.close(figure)


def test_table_2_explains_gains_where_there_are_some(tmp_path):
    table = ts.table2(with_gains(saes_of("adaptive")))
    assert table["expansion"].tolist() == [8] * 3 and table["tokens"].tolist() == [204_800] * 3
    ts.write_table2(tmp_path / "with.md", table)
    assert "gain_: by which share less" in (tmp_path / "with.md").read_text()
    ts.write_table2(tmp_path / "without.md", ts.table2(saes_of("adaptive")))
    assert "gain_" not in (tmp_path / "without.md").read_text()

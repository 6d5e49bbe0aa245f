"""What the page of Energy-Lens says, from hand-made tables: in both directions, and where it cannot tell."""

import math
import re

import pandas as pd
import pytest
import torch

import energy_lens_minimal as lens
import real_model_extension as real


def layers(**changes):
    """A row of layers.csv."""
    row = dict(
        layer=2,
        eligible=500,
        aligned=0,
        aligned_clusters=0,
        aligned_positive=0,
        rule_passes=450,
        rule_false_directions=487.0,
        directions=1000,
        family=500,
        fewest=1,
        efas_alone_below=-0.5,
        efas_alone_above=0.4,
    )
    return pd.DataFrame([row | changes])


def features(*aligned):
    return pd.DataFrame({"layer": 2, "feature": range(100)}).assign(
        aligned=lambda t: t.feature.isin(aligned)
    )


def test_aligned_features_are_named_or_none_is():
    none = lens.aligned_line(layers(), features(), "step", "energy")
    assert none == "No feature is aligned with the energy: of 500 tested none passes."
    some = dict(aligned=3, aligned_clusters=2, aligned_positive=1)
    three = lens.aligned_line(layers(**some), features(7, 9, 41), "step", "entropy")
    assert three.startswith("3 of the 500 features tested are aligned with the entropy (2 rest")
    assert "1 amplifying" in three and "they are 2." in three and "features 7, 9, 41" in three


def test_nothing_is_claimed_where_nothing_could_have_been_found():
    untested = lens.aligned_line(layers(eligible=0, fewest=math.nan), features(), "step", "energy")
    assert untested.startswith("Cannot tell") and "none was tested" in untested
    hopeless = lens.aligned_line(layers(fewest=501), features(), "step", "energy")
    assert hopeless.startswith("Cannot tell whether a feature is aligned: with so few")


@pytest.mark.parametrize(("by_chance", "said"), [(487, "tells nothing"), (45, "(10% of that")])
def test_the_old_rule_stands_beside_random_directions(by_chance, said):
    line = lens.rule_line(layers(rule_false_directions=by_chance))
    assert "passes 450 of these 500" in line and said in line and f"pass {by_chance}" in line
    assert ("tells nothing" in line) == (by_chance >= 450)


def test_the_weakest_alignment_that_could_be_found():
    alone = lens.least_line(layers(), "step")
    assert "EFAS is above 0.4 or below -0.5." in alone
    three = lens.least_line(layers(fewest=3, efas_alone_above=math.nan), "step")
    assert three.startswith("No feature can be found alone: at least 3 of 500")
    assert "beyond all 1,000 random directions" in three


def models(own, lo, hi, columns=True):
    """models.csv: unigram at 5.02 nats, and an Energy Transformer."""
    table = pd.DataFrame(
        {"model": ["unigram", "Energy Transformer, 4 steps"], "masked_nats": [5.02, own]}
    ).assign(n_masked=196, n_seq=32)
    return table.assign(minus_unigram=own - 5.02, ci_lo=lo, ci_hi=hi) if columns else table


@pytest.mark.parametrize(
    ("own", "lo", "hi", "said"),
    [
        (5.42, 0.28, 0.50, "The model is worse than unigram: it knows less"),
        (4.62, -0.5, -0.28, "The model is better than unigram."),
        (5.12, -0.1, 0.3, "Cannot tell whether the model is better than unigram (it is worse here"),
        (4.92, -0.3, 0.1, "Cannot tell whether the model is better than unigram (it is better he"),
        (4.62, math.nan, math.nan, "Cannot tell whether the model is better than unigram: too few"),
    ],
)
def test_what_the_model_is_worth(own, lo, hi, said):
    line = lens.worth_line(models(own, lo, hi))
    assert line.startswith(said)
    assert f"{own:.2f} nats a token, unigram 5.02, over 196 tokens" in line


def test_a_run_without_intervals_says_so():
    """The demo of the first runs: 5.42 nats beside 5.02."""
    line = lens.worth_line(models(5.42, 0, 0, columns=False))
    assert "worse than unigram here" in line and "not known how surely" in line


def scores(efas, attribution=(-1.0, 1.0), n=(13, 13, 13), eps=(0.05, 0.25, 1.0)):
    """predictors.csv: `efas` holds an interval a dose, `attribution` one of what it has over EFAS."""
    rows = []
    for dose, (lo, hi), n_features in zip(eps, efas, n, strict=True):
        shared = dict(eps=dose, scale="signed", n_features=n_features, n_clusters=10, n_seq=48)
        own = dict(predictor="efas_a", spearman=(lo + hi) / 2, ci_lo=lo, ci_hi=hi)
        rows.append(shared | own)
        less = dict(minus_efas_lo=attribution[0], minus_efas_hi=attribution[1])
        rows.append(shared | own | less | dict(predictor="attribution_a"))
        whole = dict(predictor="integrated_gradients", spearman=1.0, ci_lo=1.0, ci_hi=1.0)
        rows.append(shared | whole)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("efas", "said"),
    [
        ([(0.3, 0.7)] * 3, "is above 0 in all 3 cases"),
        ([(-0.7, -0.3)] * 3, "is below 0, the wrong way, in all 3 cases"),
        ([(-0.3, 0.7)] * 3, "cannot be told from 0 in any of 3 cases"),
        ([(-0.3, 0.7), (-0.3, 0.7), (0.21, 0.92)], "is above 0 in 1 of 3 cases, and cannot be"),
        ([(math.nan, math.nan)] * 3, "too few features or documents for an interval"),
    ],
)
def test_whether_efas_predicts_an_ablation(efas, said):
    line = lens.prediction_line(scores(efas), "step", "energy")
    assert said in line
    for dose in ("5 %", "25 %", "100 %"):
        assert f"with {dose} removed" in line


def test_the_number_of_features_is_that_of_the_table():
    """A page printed n 96, the sequences, where the table has 13 features."""
    line = lens.prediction_line(scores([(-0.3, 0.7)] * 3), "step", "energy")
    assert "n = 13 features in 10 clusters, 48 documents" in line and "96" not in line
    own = scores([(-0.3, 0.7)] * 3, n=(13, 12, 11))
    assert "n = 11 to 13 features" in lens.prediction_line(own, "step", "energy")


@pytest.mark.parametrize(
    ("over_efas", "said"),
    [
        ((0.1, 0.5), "predicts better in 3 of 3 cases, worse in 0"),
        ((-0.5, -0.1), "predicts better in 0 of 3 cases, worse in 3"),
        ((-0.5, 0.1), "neither better nor worse, as far as can be told"),
    ],
)
def test_attribution_is_compared_with_efas(over_efas, said):
    assert said in lens.prediction_line(scores([(0.3, 0.7)] * 3, over_efas), "step", "energy")


def test_identities_are_sentences():
    table = scores([(0.3, 0.7)] * 3)
    assert "predicts nothing" in lens.identity_line(table)
    table.loc[table.predictor == "integrated_gradients", "spearman"] = 0.8
    assert "as low as 0.80" in lens.identity_line(table)
    assert lens.identity_line(table[table.predictor == "efas_a"]) == ""


def test_null_results_are_sentences_and_others_are_not():
    basin = pd.DataFrame(dict(sigma=[0.1, 2.0], returned=1.0, ci_lo=0.68, ci_hi=1.0, n=8))
    assert "8 of 8 at each strength, 95 % interval from 0.68" in lens.returned_line(basin)
    assert lens.returned_line(basin.assign(returned=[1.0, 0.5])) == ""
    tree = pd.DataFrame(dict(depth=[math.inf, math.inf], sequence=[0, 1]))
    assert lens.merged_line(tree).startswith("Of 2 documents")
    assert lens.merged_line(tree.assign(depth=[math.inf, 0.5])) == ""
    ends = pd.DataFrame(dict(n_seq=4, converged=1.0, max_distance=[0.0, 1e-6]))
    assert "all 4 documents end in the attractor" in lens.one_attractor_line(ends)
    assert lens.one_attractor_line(ends.assign(max_distance=0.8)) == ""
    assert lens.one_attractor_line(ends.assign(converged=0.9)) == ""


@pytest.mark.parametrize(
    ("star", "said"),
    [(0.01, "no more than chance"), (0.1, "no more than the input"), (0.3, "cannot be told")],
)
def test_what_attractors_tell_of_the_classes(star, said):
    table = pd.DataFrame(
        dict(clusters_of=["attractor g*", "input field"], ami=[star, 0.2], permuted_q95=0.02)
    )
    assert said in lens.class_line(table)


def test_a_step_down_another_energy_is_told_by_its_name():
    rows = []
    for layer in (1, 2):
        rows.append(dict(layer=layer, energy="final", final_change=-0.8, n_seq=16))
        rows.append(dict(layer=layer, energy="logit", final_change=0.3 - 0.2 * layer, n_seq=16))
    said = real.descends_line(pd.DataFrame(rows), "logit")
    assert "down the logit lens' loss lowers the model's own loss at 1 of 2 blocks" in said
    assert "The energy is the model's own loss" in real.descends_line(pd.DataFrame(rows), "final")


def test_unigram_has_not_seen_the_sequence_that_it_is_asked_about():
    ids = torch.tensor([[5, 5, 5], [5, 9, 5], [9, 9, 9]])
    nats = real.unigram_nats(ids)
    # The first sequence: the others hold two 5s and four 9s, and each is counted once more
    assert torch.allclose(nats[0], -torch.tensor([3 / 8, 3 / 8], dtype=torch.float64).log())
    table = real.worth_table("folder/m", torch.full((3, 2), 0.1), ids)
    assert table.model.tolist() == ["unigram", "m"] and table.n_masked.tolist() == [6, 6]
    assert math.isnan(table.ci_lo[1])  # three documents have no interval
    assert lens.worth_line(table).startswith("Cannot tell")


def test_z_of_random_directions_is_in_their_own_units():
    null = torch.randn(8, 4000, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    layer = lens.Layer.__new__(lens.Layer)
    layer.facts, layer.null = {"layer": 2}, null
    table = lens.z_table(features().assign(eligible=True), [layer])
    assert table.share.sum() == pytest.approx(1)
    mean = (table.z * table.share).sum()
    assert abs(mean) < 0.02 and ((table.z - mean) ** 2 * table.share).sum() == pytest.approx(1, 0.1)


def test_closed_sections_are_closed_and_hostile_words_stay_text(tmp_path):
    blocks = [
        ("lead", ("What?", "<b>seen</b> at once")),
        ("h", "Shown"),
        ("p", "open"),
        ("closed", "<i>More</i>"),
        ("p", "hidden"),
    ]
    path = tmp_path / "report.md"
    lens.write_report("title", blocks, path)
    markdown = path.read_text()
    assert "**What?** <b>seen</b> at once" in markdown and "## <i>More</i>" in markdown
    page = path.with_suffix(".html").read_text()
    assert "&lt;b&gt;seen" in page and "<i>" not in page and "<b>" not in page
    closed = re.search(r"<details.*?</details>", page, re.DOTALL)[0]
    assert "hidden" in closed and "open" not in closed.replace("<details", "")
    assert page.index("seen") < page.index("Shown") < page.index("<details")
    assert 'id="theme"' in page and "switchTheme" in page


def last_panels(monkeypatch):
    """A list of the figures that are closed after they were written."""
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    return kept


def test_random_directions_are_not_cut_where_features_are_far_apart(tmp_path, monkeypatch):
    kept = last_panels(monkeypatch)
    table = features(35).assign(eligible=True, z_direction=lambda t: 3 + t.feature / 2.0)
    null = pd.DataFrame(dict(layer=table.layer.iloc[0], z=[-1.0, 0.0, 1.0], share=[0.2, 0.6, 0.2]))
    lens.draw_z(table, null, tmp_path / "z.png", "step")
    assert kept[-1].axes[0].get_ylim()[1] > 0.6 * len(table)


def test_a_dose_that_nothing_bounds_has_a_band_to_the_edge(tmp_path, monkeypatch):
    kept = last_panels(monkeypatch)
    shifts = [[0.5] + [0.0] * 9, [0.1 * i for i in range(10)]]
    rows = []
    for dose, of_dose in enumerate(shifts):
        for cluster, shift in enumerate(of_dose):
            row = dict(arm="feature", dose=float(dose), cluster=cluster, attractor_shift=shift)
            rows.append(row | dict(flip_rate=0.0, collateral=0.0))
    clamps = pd.DataFrame(rows)
    first = clamps[clamps.dose == 0]
    known = lens.bootstrap_mean(first.attractor_shift, first.cluster)
    assert math.isinf(known.hi), "else this tests nothing"
    lens.draw_dose(clamps, tmp_path / "d.png")
    ax = kept[-1].axes[0]
    [band] = ax.collections
    [path] = band.get_paths()
    at_first = path.vertices[path.vertices[:, 0] == 0.0, 1]
    assert at_first.max() == pytest.approx(ax.get_ylim()[1]) and at_first.min() < known.mean
    assert ax.get_ylim()[1] < 5


def test_older_runs_are_drawn_again(tmp_path):
    """Without z_distribution.csv and without the range of the change of energy."""
    table = features(3).assign(eligible=True, z_direction=lambda t: t.feature / 10.0 - 5)
    lens.draw_z(table, None, tmp_path / "z.png", "step")
    assert "random directions" in (tmp_path / "z.narrow.svg").read_text()
    descent = pd.DataFrame(dict(step=[0, 1, 0, 1], term=["total", "total", "field", "field"]))
    lens.draw_descent(descent.assign(mean=[-5.0, -6.0, 1.0, 2.0]), tmp_path / "d.png")
    assert "E(t) − E(0), energy per token" in (tmp_path / "d.svg").read_text()

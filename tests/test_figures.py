"""Figures: drawn from CSVs alone, wide and stacked; what their panels hold."""

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import ablation_test as ablation
import harvest_activations as harvest
import janus_adaptive as janus
import train_sae as sae

ROOT = Path(__file__).resolve().parents[1]


def drawn(png: Path) -> bool:
    """Whether a figure is there as PNG, for wide and for narrow screens, and narrower there."""
    narrow = png.with_suffix(".narrow.svg").read_text()
    wide = png.with_suffix(".svg").read_text()
    width = [float(text.partition('width="')[2].partition("pt")[0]) for text in (narrow, wide)]
    assert width[0] <= 4.6 * 72 and "<text" in narrow and "<text" in wide
    return png.stat().st_size > 5_000


def telemetry(arm: str, n: int = 60) -> pd.DataFrame:
    """A loop that closes at step 50 and comes within 10 % of its setpoint, .01, at step 110."""
    step = 5 * np.arange(1, n + 1)
    sigma = 0.01 * (1 + np.clip((111 - step) / 10, 0, None) * 0.1)
    is_adaptive = arm == "adaptive"
    table = pd.DataFrame({"step": step, "loss": 5.0 + 0.1 * is_adaptive, "sigma_z": sigma})
    table["sigma_resid"] = np.nan
    table["sigma_filtered"] = sigma
    table["setpoint"] = 0.01
    table["lambda"] = 2.0 * is_adaptive
    table["phase"] = np.where(step < 50, "warmup", "auto") if is_adaptive else "control"
    table["val_loss"] = np.where(step % 100 == 0, 5.0 + 0.2 * is_adaptive, np.nan)
    table["val_sigma_z"] = table["val_loss"] / 500
    table["sigma_floor"] = 0.0014
    return table


def training_csvs(folder: Path) -> list[str]:
    paths = []
    for arm in ("control", "adaptive"):
        (folder / arm).mkdir(parents=True)
        telemetry(arm).to_csv(folder / arm / "telemetry.csv", index=False)
        paths.append(str(folder / arm / "telemetry.csv"))
    return paths


def curves(*arms: str) -> list[janus.Curve]:
    return [janus.Curve(arm, telemetry(arm), "black") for arm in arms]


def impacts(n_layers: int, n_heads: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results.csv and its summary of two runs and two modes; impacts fall from 2 % to -0.1 %."""
    rows = []
    summary = []
    n = n_layers * n_heads
    for run in ("adaptive", "control"):
        for mode in ("mean", "zero"):
            for i, percent in enumerate(np.linspace(2, -0.1, n)):
                row = dict(run=run, mode=mode, layer=i // n_heads, head=i % n_heads, base_loss=4.0)
                row |= dict(impact=percent * 0.04, pct_impact=percent, rank=i + 1, n_seq=50)
                ends = dict(ci_all_lo=(percent - 0.5) * 0.04, ci_all_hi=(percent + 0.5) * 0.04)
                rows.append(row | ends | dict(p_maxT=0.01 if percent > 0.6 else 0.5))
            row = dict(run=run, mode=mode, ranked_by="mean", unit="documents", n_unit=50)
            row |= dict(hero_layer=0, hero_head=0, unique_hero=run == "adaptive", base_loss=4.0)
            summary.append(row | dict(noise_limit=0.02))
    return pd.DataFrame(rows), pd.DataFrame(summary)


def ablation_tables(folder: Path, n_layers: int, n_heads: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    table, summary = impacts(n_layers, n_heads)
    table.to_csv(folder / "r.csv", index=False)
    summary.to_csv(folder / "r_summary.csv", index=False)
    return ablation.read_tables(folder / "r.csv")


def harvest_tables(folder: Path) -> None:
    for run in ("control", "adaptive"):
        out = folder / run
        out.mkdir(parents=True)
        pairs = []
        rows = []
        text = dict(split="train", n_tokens=640, n_windows=40, n_documents=40, n_blocks=20)
        for layer in (0, 2):
            ends = dict(ci_lo=0.04, ci_hi=0.06, null_mean=0.01, null_lo=0.005, null_hi=0.02)
            for metric in ("max_cosine", "sigma_z", "sigma_resid"):
                rows.append(dict(run=run, layer=layer, metric=metric, value=0.05) | ends | text)
            pairs.append(dict(run=run, layer=layer, head_i=0, head_j=1, cosine=0.1) | text)
        for name, table in {"topology_stats.csv": rows, "head_cosines.csv": pairs}.items():
            pd.DataFrame(table).to_csv(out / name, index=False)
            harvest.write_sidecar(out / name, harvest.TABLE_SCHEMA, [])


def sae_tables(folder: Path) -> pd.DataFrame:
    rows = []
    for run in ("adaptive", "control"):
        for layer in (0, 1):
            out = folder / run / f"L{layer}"
            out.mkdir(parents=True)
            latents = pd.DataFrame({"frequency": [0.0, 0.1, 0.5, 0.2], "n_rows": 100})
            latents.to_csv(out / "latent_frequencies.csv", index=False)
            row = dict(run=run, unit="layer", arch="batchtopk", setting="k 16", seed=42, site="z")
            row |= dict(layer=layer, head=np.nan)
            for name in ("l0", "mse", "fvu"):
                row |= {name: 0.5, f"{name}_lo": 0.4, f"{name}_hi": 0.6}
            row |= dict(dead_share=0.25, dead_share_tokens=100, n_documents=50, split="train")
            row |= dict(ce_recovered_zero=0.9, ce_recovered_mean=0.9, ce_informative=layer == 1)
            bar = (0.8, 1.0) if layer else (np.nan, np.nan)
            row |= dict(ce_recovered_mean_lo=bar[0], ce_recovered_mean_hi=bar[1])
            rows.append(row | {"folder": f"{run}/L{layer}"})
    pd.DataFrame(rows).to_csv(folder / "sae_metrics.csv", index=False)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------ from the CSVs alone
def test_training_is_drawn_again_from_its_csvs(tmp_path):
    csvs = training_csvs(tmp_path)
    assert janus.main(["--redraw", *csvs, "--save_dir", str(tmp_path)]) == 0
    assert drawn(tmp_path / "training.png")


def test_figure_1_is_drawn_again_from_its_csvs(tmp_path):
    harvest_tables(tmp_path)
    assert harvest.main(["--redraw", "--run_name", "adaptive", "--save_dir", str(tmp_path)]) == 0
    assert drawn(tmp_path / "adaptive" / "figure1_head_cosines.png")
    # Without the statistics, the matrices alone
    csv = shutil.copy(tmp_path / "adaptive" / "head_cosines.csv", tmp_path)
    harvest.draw_cosines([Path(csv)], tmp_path / "f.png")
    assert drawn(tmp_path / "f.png") and "sigma" not in (tmp_path / "f.svg").read_text()


def test_noise_of_the_layout_does_not_reach_the_file(tmp_path, monkeypatch):
    """The solver of the layout may differ in its last digits from process to process."""
    draw_plainly = matplotlib.figure.Figure.draw_without_rendering
    rng = np.random.default_rng(0)

    def noisy(values) -> np.ndarray:
        return np.asarray(values) + 1e-9 * rng.normal(size=np.shape(values))

    def draw(figure) -> None:
        draw_plainly(figure)
        for part in figure.subfigs:
            part.bbox_relative.set_points(noisy(part.bbox_relative.get_points()))
            for text in part.texts:
                text.set_position(noisy(text.get_position()))
        for ax in figure.axes:
            ax.set_position(noisy(ax.get_position(original=True).bounds))

    monkeypatch.setattr(matplotlib.figure.Figure, "draw_without_rendering", draw)

    def panels(is_stacked: bool) -> plt.Figure:
        figure = plt.figure(layout="constrained")
        for part in figure.subfigures(2, 1):
            part.suptitle("a title")
            part.supxlabel("below")
            part.subplots().plot([1, 2], [3, 5])
        return figure

    harvest.save_figure(panels, tmp_path / "one.png")
    once = (tmp_path / "one.svg").read_bytes()
    for _ in range(5):
        harvest.save_figure(panels, tmp_path / "one.png")
        assert (tmp_path / "one.svg").read_bytes() == once


def test_figures_2_and_3_are_drawn_again_from_their_csvs(tmp_path):
    sae_tables(tmp_path)
    assert sae.main(["--redraw", "--save_dir", str(tmp_path)]) == 0
    assert drawn(tmp_path / "figure2_l0_by_depth.png")
    assert drawn(tmp_path / "figure3_activation_frequency.png")


def test_figure_4_and_the_heatmap_are_drawn_again_from_their_csvs(tmp_path):
    ablation_tables(tmp_path, 2, 3)
    assert ablation.main(["--redraw", str(tmp_path / "r.csv")]) == 0
    assert drawn(tmp_path / "r_figure4.png") and drawn(tmp_path / "r_heatmap.png")


# --------------------------------------------------------------------------------- what they hold
def test_the_loop_closes_and_settles_as_the_headlines_say():
    sys.path.insert(0, str(ROOT / "tools"))
    from headlines import tracking

    table = telemetry("adaptive")
    closed, settled = janus.loop_steps(table, 0.01)
    assert (closed, settled) == (50, 105)
    assert settled == tracking(table, 0.01, 0.8).settled_step
    never = janus.loop_steps(table.assign(setpoint=1.0), 0.01)
    assert never[0] == 50 and np.isnan(never[1])
    assert np.isnan(janus.loop_steps(table.drop(columns="phase"), 0.01)).all()
    assert np.isnan(janus.loop_steps(telemetry("control"), 0.01)).all()


@pytest.mark.parametrize("arms", [("control", "adaptive"), ("adaptive", "control")])
def test_the_difference_is_adaptive_minus_control_in_either_order(arms):
    figure = janus.training_figure(curves(*arms), 0.01, False)
    panel = figure.axes[1]
    assert panel.get_title() == "Loss: adaptive minus control"
    trained, validated = panel.lines[:2]
    np.testing.assert_allclose(trained.get_ydata(), 0.1)
    np.testing.assert_allclose(validated.get_ydata(), 0.2)
    words = [text.get_text() for text in figure.axes[2].texts]
    assert words == ["loop closed at 50", "loop settled at 105"]
    plt.close(figure)


def named(panel) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


@pytest.mark.parametrize("column", ["sigma_floor", "sigma_filtered", "setpoint"])
def test_words_in_a_column_of_numbers_are_one_line(column, tmp_path, capsys):
    path = tmp_path / "telemetry.csv"
    telemetry("adaptive").assign(**{column: "about .006"}).to_csv(path, index=False)
    assert janus.main(["--redraw", str(path), "--save_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "is not a telemetry.csv" in said


def test_an_older_file_has_no_sampling_floor():
    curve = janus.Curve("a", telemetry("control").drop(columns="sigma_floor"), "black")
    figure = janus.training_figure([curve], 0.01, False)
    assert figure.axes[1].get_legend() is None
    plt.close(figure)


def test_one_run_has_no_difference_and_the_control_no_marks():
    figure = janus.training_figure(curves("control"), 0.01, False)
    assert len(figure.axes) == 2 and not figure.axes[1].texts
    assert named(figure.axes[1]) == ["by chance 0.0014"], "the control arm has no setpoint"
    plt.close(figure)


def test_a_constant_penalty_has_no_setpoint():
    table = telemetry("adaptive")
    for phase, has_one in (("constant", False), ("warmup", True)):
        curve = janus.Curve("a", table.assign(phase=phase), "black")
        figure = janus.training_figure([curve], 0.01, True)
        assert len(figure.axes) == 3
        assert ("setpoint 0.01" in named(figure.axes[1])) == has_one
        plt.close(figure)


@pytest.mark.parametrize(("n_layers", "n_heads", "named"), [(2, 3, 6), (6, 8, 30), (30, 9, 30)])
@pytest.mark.parametrize("is_stacked", [False, True])
def test_figure_4_names_the_first_heads_and_counts_the_rest(
    n_layers, n_heads, named, is_stacked, tmp_path
):
    table, summary = ablation_tables(tmp_path, n_layers, n_heads)
    figure = ablation.figure4(table, summary, is_stacked)
    figure.canvas.draw()
    first, second, zero = figure.axes
    assert first.get_xscale() == zero.get_yscale() == "linear"
    assert first.get_xlim() == second.get_xlim()
    labels = first.get_yticklabels()
    assert len(labels) == named and labels[0].get_text() == "L0H0"
    # No two names on one another, no interval cut off
    boxes = [label.get_window_extent() for label in labels]
    assert all(low.y0 >= high.y1 - 1 for low, high in zip(boxes[1:], boxes, strict=False)) or all(
        high.y0 >= low.y1 - 1 for low, high in zip(boxes[1:], boxes, strict=False)
    )
    assert first.get_xlim()[1] > 2.5
    left_out = n_layers * n_heads - named
    assert (f"{left_out} more heads" in first.get_xlabel()) == (left_out > 0)
    assert "L0H0, stands out" in first.get_title() and "not unique" in second.get_title()
    plt.close(figure)


def test_the_heatmap_writes_its_limits_and_marks_by_max_t_alone(tmp_path):
    table, summary = ablation_tables(tmp_path, 2, 3)
    ranking = table[table["mode"] == "mean"]
    figure = ablation.heatmap(ranking, summary)
    figure.canvas.draw()
    bar = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert bar[0] == "-0.1" and bar[-1] == "2"
    assert len(figure.axes[0].lines) == (ranking["p_maxT"] < 0.05).sum() / 2
    plt.close(figure)
    figure = ablation.heatmap(ranking.assign(p_maxT=np.nan), summary)
    assert not figure.axes[0].lines and "max-T" not in figure.get_supxlabel()
    plt.close(figure)


def test_two_runs_of_one_arm_are_told_apart(tmp_path, monkeypatch):
    paths = []
    for run in ("a", "b"):
        folder = tmp_path / run / "adaptive"
        folder.mkdir(parents=True)
        telemetry("adaptive").to_csv(folder / "telemetry.csv", index=False)
        paths.append(folder / "telemetry.csv")
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    janus.draw_training(paths, 0.004, tmp_path / "training.png")
    legend = kept[-1].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a/adaptive", "b/adaptive"]
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(set(colours)) == 2 and colours[0] == janus.ARM_COLOURS["adaptive"]


def test_figure_1_shows_sigma_resid_first_with_the_null(tmp_path):
    harvest_tables(tmp_path)
    csvs = [tmp_path / run / "topology_stats.csv" for run in ("control", "adaptive")]
    topology = harvest.side_by_side(csvs)
    pairs = harvest.side_by_side([csv.with_name("head_cosines.csv") for csv in csvs])
    for is_stacked in (False, True):
        figure = harvest.figure1(pairs, topology, is_stacked)
        labels = [ax.get_ylabel().partition(",")[0] for ax in figure.axes[:2]]
        assert labels == ["sigma_resid", "sigma_z"]
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert sorted(legend) == ["adaptive", "control", "null"]
        plt.close(figure)


def test_figure_2_draws_no_interval_where_there_is_none(tmp_path):
    table = sae.table2(sae_tables(tmp_path))
    assert table["ce_recovered_mean_lo"].isna().tolist() == [True, False] * 2
    figure = sae.draw_depth(table)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels[0].startswith("CE recovered") and labels[1].startswith("FVU")
    assert "Open: no interval" in figure.get_supxlabel()
    plt.close(figure)


def test_figure_3_has_one_legend_and_the_dead_share_as_text(tmp_path):
    metrics = sae_tables(tmp_path)
    latents = {name: sae.read_frequencies(tmp_path / name) for name in metrics["folder"]}
    figure = sae.draw_frequencies(latents, metrics)
    assert len(figure.legends) == 1
    for ax in figure.axes:
        assert ax.get_legend() is None
        assert [text.get_text() for text in ax.texts] == ["25.0%"] * 2 + ["never fire:"]
    plt.close(figure)


def test_figure_3_names_every_curve_and_writes_above_them(tmp_path):
    """One arm is of one layer alone; latents that fire on nearly every token reach into the corner."""
    metrics = sae_tables(tmp_path)
    arm, layer = metrics["run"].iloc[0], metrics["layer"].iloc[0]
    metrics = metrics[(metrics["run"] != arm) | (metrics["layer"] != layer)]
    always = pd.DataFrame(dict(frequency=[0.9] * 8, n_rows=[1000] * 8))
    figure = sae.draw_frequencies(dict.fromkeys(metrics["folder"], always), metrics)
    assert len(figure.legends[0].get_texts()) == 2
    figure.canvas.draw()
    places = {(text.get_color(), text.get_position()) for ax in figure.axes for text in ax.texts}
    assert len(places) == 3, "a share stands where its curve is in the legend, in every panel"
    for ax in figure.axes:
        curves = [patch.get_window_extent() for patch in ax.patches]
        for text in ax.texts:
            assert not any(text.get_window_extent().overlaps(curve) for curve in curves)
    plt.close(figure)

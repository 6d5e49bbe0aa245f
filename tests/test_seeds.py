"""What is said over seeds, against scipy on planted differences and against counting by hand."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import seeds  # noqa: E402

TARGET = 0.01  # the setpoint
STEPS = np.arange(5, 505, 5)  # of the samples of sigma


def write_arm(folder: Path, arm: str, seed: int, values: dict[str, float]) -> None:
    """Telemetry and record of one arm. values: what validation measured at the last step."""
    # sigma of the adaptive arm falls to the setpoint, that of the control stays above it
    if arm == "adaptive":
        sigma = TARGET * (1 + 2 * np.exp(-STEPS / 40))
    else:
        sigma = np.full(len(STEPS), 2.5 * TARGET)
    frame = pd.DataFrame({"step": STEPS, "loss": values["val_loss"], "lambda": 1.0})
    frame["phase"] = "auto"
    frame["sigma_z"] = sigma
    frame["sigma_resid"] = np.nan
    frame["sigma_filtered"] = sigma
    for name, value in values.items():
        frame[name] = np.nan
        frame.loc[frame.index[-1], name] = value
    (folder / arm).mkdir(parents=True)
    frame.to_csv(folder / arm / "telemetry.csv", index=False)
    record = {"arguments": {"seed": seed, "target_sigma": TARGET, "filter_beta": 0.8}}
    (folder / arm / "run.json").write_text(json.dumps(record))


def write(
    folder: Path, seed: int, effect: float = 0.05, control_seed: int | None = None
) -> dict[str, float]:
    """A folder as `make seeds` leaves it, with a planted difference of the losses; the losses."""
    g = np.random.default_rng(seed)
    losses = {}
    rows = []
    for arm in seeds.COLOURS:
        adaptive = arm == "adaptive"
        loss = 4.4 + g.normal(0, 0.01) + effect * adaptive
        values = {
            "val_loss": loss,
            "val_sigma_z": TARGET * (1 if adaptive else 2.5) + g.normal(0, 1e-3),
            "val_sigma_resid": 0.1 + g.normal(0, 0.01),
        }
        own_seed = seed if adaptive or control_seed is None else control_seed
        write_arm(folder, arm, own_seed, values)
        row = {
            "run": arm,
            "mode": "mean",
            "ranked_by": "mean",
            "hero_layer": 3,
            "hero_head": 1,
            "unique_hero": not adaptive,
            "max_share": 0.1 + g.normal(0, 0.01),
            "gini": 0.5 + g.normal(0, 0.01),
            "crossfit": 0.03,
        }
        rows.append(row)
        rows.append(row | {"mode": "zero", "max_share": 9.0})  # not what heads are ranked by
        losses[arm] = loss
    pd.DataFrame(rows).to_csv(folder / "results_ablation_summary.csv", index=False)
    return losses


def test_a_planted_difference_is_found_with_scipys_interval(tmp_path, capsys):
    n = 6
    losses = [write(tmp_path / str(seed), seed) for seed in range(1, n + 1)]
    folders = [str(tmp_path / str(seed)) for seed in range(1, n + 1)]
    out = tmp_path / "out"
    assert seeds.main([*folders, "--save_dir", str(out)]) == 0

    # The t interval, by its formula
    d = np.array([loss["adaptive"] - loss["control"] for loss in losses])  # [seeds]
    row = pd.read_csv(out / "seeds_summary.csv").set_index("metric").loc["val_loss"]
    half = stats.t.ppf(1 - 0.05 / 6 / 2, n - 1) * d.std(ddof=1) / np.sqrt(n)
    assert row["difference"] == pytest.approx(d.mean())
    assert row["ci_lo"] == pytest.approx(d.mean() - half)
    assert row["ci_hi"] == pytest.approx(d.mean() + half)
    assert row["ci_lo"] > 0

    # The sign-flip test, by all 64 patterns of signs
    as_extreme = []
    for signs in itertools.product((1, -1), repeat=n):
        as_extreme.append(abs(np.mean(d * signs)) >= abs(d.mean()) - 1e-12)
    assert row["p_sign_flip"] == pytest.approx(6 * np.mean(as_extreme))

    said = capsys.readouterr().out
    assert "6 of 6 seeds: 90 %" in said and "L3H1 (not unique)" in said
    loops = pd.read_csv(out / "seeds_loops.csv")
    # sigma enters the band where 2 exp(-step / 40) <= 0.1, at step 40 ln 20 = 119.8
    assert (loops["settled_step"] == 120).all()
    assert (loops["share"] == 1).all()
    assert np.allclose(loops["control_over_setpoint"], 2.5)
    assert Image.open(out / "seeds.png").size[0] > 1000


def test_without_a_difference_the_interval_covers_zero_as_often_as_it_says():
    """400 studies of 5 seeds without any effect: some interval of the six misses zero in about
    5 % of them."""
    g = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        rows = []
        for seed, arm, metric in itertools.product(range(5), seeds.COLOURS, seeds.METRICS):
            value = g.normal(1, 0.1)
            rows.append({"seed": seed, "arm": arm, "metric": metric, "value": value})
        found = seeds.paired(pd.DataFrame(rows))
        missed += bool(((found["ci_lo"] > 0) | (found["ci_hi"] < 0)).any())
    assert stats.binomtest(missed, 400, 0.05).pvalue > 0.001


def test_wrong_inputs_are_one_line(tmp_path, capsys):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, control_seed=3)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def says(*argv: str) -> str:
        assert seeds.main([*argv, "--save_dir", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    missing = "nothing/adaptive/telemetry.csv is not a telemetry.csv"
    assert missing in says(str(tmp_path / "nothing"))
    assert "found the seeds [1], expected at least two" in says(a)
    assert "found the seeds [1, 1]" in says(a, a)
    assert "the arms have the seeds 2 and 3" in says(a, b)
    (tmp_path / "b/results_ablation_summary.csv").unlink()
    error = says(a, b)
    assert "is not a pair of finished runs" in error and "make seeds" in error
    (tmp_path / "a/control/telemetry.csv").unlink()
    assert "telemetry.csv" in says(a, b)


def test_one_arm_alone_is_one_line(tmp_path):
    (tmp_path / "seeds.csv").write_text("seed,arm,metric,value\n1,adaptive,val_loss,2\n")
    with pytest.raises(seeds.HandoffError, match="has the arms adaptive; expected"):
        seeds.redraw(tmp_path)


def test_arms_that_were_validated_on_other_windows_are_refused(tmp_path):
    """As --val_windows and --resume can make them: their difference is one of texts, too."""
    folder = tmp_path / "1"
    write(folder, 1)
    for arm, windows in (("adaptive", [0, 2]), ("control", [0, 1, 2, 3])):
        pd.DataFrame({"window": windows}).to_csv(folder / arm / "validation.csv", index=False)
    with pytest.raises(seeds.HandoffError, match="other windows of the split"):
        seeds.measure(folder)

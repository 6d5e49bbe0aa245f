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

TARGET = 0.01


def write(folder: Path, seed: int, effect: float = 0.05, control_seed: int | None = None) -> dict[str, np.ndarray]:
    """A folder as `make seeds` leaves it, with a planted difference of the losses."""
    g, out = np.random.default_rng(seed), {}
    rows = []
    for arm in seeds.COLOURS:
        step = np.arange(5, 505, 5)
        sigma = TARGET * (1 + 2 * np.exp(-step / 40)) if arm == "adaptive" else np.full(len(step), 2.5 * TARGET)
        loss = 4.4 + g.normal(0, 0.01) + effect * (arm == "adaptive")
        frame = pd.DataFrame({"step": step, "loss": loss, "lambda": 1.0, "phase": "auto", "sigma_z": sigma, "sigma_filtered": sigma})
        for name, value in dict(val_loss=loss, val_sigma_z=sigma[-1] + g.normal(0, 1e-3), val_sigma_resid=0.1 + g.normal(0, 0.01)).items():
            frame[name] = np.where(step == 500, value, np.nan)
        (folder / arm).mkdir(parents=True)
        frame.to_csv(folder / arm / "telemetry.csv", index=False)
        record = dict(seed=seed if arm == "adaptive" or control_seed is None else control_seed, target_sigma=TARGET)
        (folder / arm / "run.json").write_text(json.dumps({"arguments": record}))
        rows.append(dict(run=arm, mode="mean", ranked_by="mean", hero_layer=3, hero_head=1, unique_hero=arm == "control"))
        rows[-1] |= dict(max_share=0.1 + g.normal(0, 0.01), gini=0.5 + g.normal(0, 0.01), crossfit=0.03)
        rows.append(rows[-1] | dict(mode="zero", max_share=9.0))  # not what heads are ranked by
        out[arm] = loss
    pd.DataFrame(rows).to_csv(folder / "results_ablation_summary.csv", index=False)
    return out


def test_a_planted_difference_is_found_with_scipys_interval(tmp_path, capsys):
    losses = [write(tmp_path / str(s), s) for s in range(1, 7)]
    folders = [str(tmp_path / str(s)) for s in range(1, 7)]
    assert seeds.main([*folders, "--save_dir", str(tmp_path / "out")]) == 0
    d = np.array([x["adaptive"] - x["control"] for x in losses])
    row = pd.read_csv(tmp_path / "out/seeds_summary.csv").set_index("metric").loc["val_loss"]
    half = stats.t.ppf(1 - 0.05 / 6 / 2, 5) * d.std(ddof=1) / np.sqrt(6)
    assert (row["difference"], row["ci_lo"], row["ci_hi"]) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    flips = [abs(np.mean(d * s)) >= abs(d.mean()) - 1e-12 for s in itertools.product((1, -1), repeat=6)]
    assert row["p_sign_flip"] == pytest.approx(6 * np.mean(flips)) and row["ci_lo"] > 0
    said = capsys.readouterr().out
    assert "6 of 6 seeds: 90 %" in said and "L3H1 (not unique)" in said
    loops = pd.read_csv(tmp_path / "out/seeds_loops.csv")
    # sigma enters the band where 2 exp(-step / 40) <= 0.1, at step 40 ln 20 = 119.8
    assert (loops["settled_step"] == 120).all() and (loops["share"] == 1).all() and np.allclose(loops["control_over_setpoint"], 2.5)
    assert Image.open(tmp_path / "out/seeds.png").size[0] > 1000


def test_without_a_difference_the_interval_covers_zero_as_often_as_it_says():
    """400 studies of 5 seeds without any effect: some interval of the six misses zero in about 5 % of them."""
    g, missed = np.random.default_rng(0), 0
    for _ in range(400):
        rows = [dict(seed=s, arm=a, metric=m, value=g.normal(1, 0.1)) for s in range(5) for a in seeds.COLOURS for m in seeds.METRICS]
        found = seeds.paired(pd.DataFrame(rows))
        missed += bool(((found["ci_lo"] > 0) | (found["ci_hi"] < 0)).any())
    assert stats.binomtest(missed, 400, 0.05).pvalue > 0.001


def test_wrong_inputs_are_one_line(tmp_path, capsys):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, control_seed=3)
    out = ["--save_dir", str(tmp_path / "out")]

    def says(*argv: str) -> str:
        assert seeds.main([*argv, *out]) == 1 and not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "nothing/adaptive/telemetry.csv is not a telemetry.csv" in says(str(tmp_path / "nothing"))
    assert "found the seeds [1], expected at least two" in says(str(tmp_path / "a"))
    assert "found the seeds [1, 1]" in says(str(tmp_path / "a"), str(tmp_path / "a"))
    assert "the arms have the seeds 2 and 3" in says(str(tmp_path / "a"), str(tmp_path / "b"))
    (tmp_path / "b/results_ablation_summary.csv").unlink()
    assert "is not a pair of finished runs" in (text := says(str(tmp_path / "a"), str(tmp_path / "b"))) and "make seeds" in text
    (tmp_path / "a/control/telemetry.csv").unlink()
    assert "telemetry.csv" in says(str(tmp_path / "a"), str(tmp_path / "b"))

"""tools/loops.py on loops with a known answer, and on folders that are none."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import loops  # noqa: E402


def write_run(folder: Path, seed: int, filtered: list[float], setpoint: list[float], **arguments: object) -> None:  # fmt: skip
    """A run whose filtered sigma was this, against this setpoint, sampled every ten steps."""
    folder.mkdir()
    n = len(filtered)
    losses = {"loss": 5.0, "val_loss": [math.nan] * (n - 1) + [4.5]}
    sigma = {"sigma_z": filtered, "sigma_resid": math.nan, "sigma_filtered": filtered}
    table = {"step": range(10, 10 * n + 10, 10), "lambda": 1.0, "phase": "auto", **losses, **sigma}
    pd.DataFrame(table | {"setpoint": setpoint}).to_csv(folder / "telemetry.csv", index=False)
    given = {"seed": seed, "dtype": "auto", "target_sigma": 1.0, "filter_beta": 0.8} | arguments
    (folder / "run.json").write_text(json.dumps({"arguments": given}))


def test_a_step_and_a_loop_of_known_size(tmp_path, capsys):
    write_run(tmp_path / "held", 1, [3, 1.05, 1.2, 0.95, 1.0], [1.0] * 5)
    moved = [1.0] * 2 + [2.0] * 6
    filtered = [1.0, 1.0, 1.2, 1.6, 1.9, 2.3, 2.1, 2.0]
    write_run(tmp_path / "step", 2, filtered, moved, setpoint_step=[30.0, 2.0])
    folders = [str(tmp_path / "held"), str(tmp_path / "step")]
    assert loops.main([*folders, "--save_dir", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out/loops.csv").iloc[0]
    assert (table["settled_step"], table["n"], table["share"]) == (20, 4, 0.75)
    step = pd.read_csv(tmp_path / "out/setpoint_steps.csv").iloc[0]
    assert (step["step"], step["before"], step["after"]) == (30, 1, 2)
    assert step["settles_after"] == 20 and step["share"] == 0.75  # 1.9 is within 10 % of 2
    assert step["overshoot"] == pytest.approx(0.15)
    assert "0 of 1 runs" in capsys.readouterr().out


def test_overshoot_is_in_the_direction_of_the_step():
    table = {"step": [10, 20, 30, 40], "setpoint": [2, 1, 1, 1], "sigma_filtered": [2, 1.5, 0.9, 1]}
    down = loops.step_response(pd.DataFrame(table), seed=1)
    assert down.overshoot == pytest.approx(0.1)
    never = {"step": [10, 20], "setpoint": [1, 9], "sigma_filtered": [1.0, 1.0]}
    response = loops.step_response(pd.DataFrame(never), seed=1)
    assert np.isnan(response.settles_after) and response.share == 0 and response.overshoot == 0


@pytest.mark.parametrize(
    ("broken", "says"),
    [("nothing", "is not a telemetry.csv"), ("control", "was never closed"), ("json", "run.json")],
)
def test_what_is_no_adaptive_run_is_one_line(broken, says, tmp_path, capsys):
    folder = tmp_path / "run"
    if broken != "nothing":
        write_run(folder, 1, [1.0, 1.0], [1.0, 1.0])
    if broken == "json":
        (folder / "run.json").write_text("{")
    if broken == "control":
        table = pd.read_csv(folder / "telemetry.csv")
        table.assign(phase="control").to_csv(folder / "telemetry.csv", index=False)
    assert loops.main([str(folder), "--save_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1

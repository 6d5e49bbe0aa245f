"""How well the control loop of each of several runs held its setpoint, and followed a step.

    python tools/loops.py runs/loops/1 runs/loops/2 runs/loops/step

Each folder holds the telemetry.csv and run.json of one adaptive run (`make loops`: one a seed). A
run is the unit. Writes loops.csv, one run a row, and for runs with --setpoint_step
setpoint_steps.csv; prints both.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from headlines import is_within, tracking

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from janus_adaptive import HandoffError, atomic, one_line_errors, read_telemetry  # noqa: E402


# ------------------------------------------------------------------------------------------- method
@dataclass
class StepResponse:
    """How a loop followed its setpoint from one sigma to another."""

    seed: int  # of the run
    step: int  # where the setpoint moved
    before: float  # setpoint, sigma
    after: float
    settles_after: float  # steps until filtered sigma is within 10 % for the first time; nan: never
    share: float  # of the samples from there on that are within 10 %
    overshoot: float  # of filtered sigma beyond the new setpoint, as a share of it


def step_response(telemetry: pd.DataFrame, seed: int) -> StepResponse:
    """The response to the one step in the column `setpoint`."""
    before = telemetry["setpoint"].iloc[0]
    later = telemetry[telemetry["setpoint"] != before]
    start = later["step"].iloc[0]
    after = later["setpoint"].iloc[0]
    relative = later["sigma_filtered"] / after  # [samples], 1 is the new setpoint
    inside = is_within(relative)
    # Past the new setpoint as seen from the old one: above it after a step up, below after one down
    beyond = relative - 1 if after > before else 1 - relative  # [samples]
    settles_after = np.nan
    share = 0.0
    if inside.any():
        first = int(inside.argmax())
        settles_after = later["step"].iloc[first] - start
        share = inside[first:].mean()
    return StepResponse(seed, start, before, after, settles_after, share, max(0.0, beyond.max()))


def read_run(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Telemetry and arguments of a run. Raises HandoffError if it is not an adaptive one."""
    telemetry = read_telemetry(folder / "telemetry.csv")
    # The setpoint and the filter stand in the arguments alone
    try:
        record = (folder / "run.json").read_text(encoding="utf-8")
        arguments = json.loads(record)["arguments"]
    except (OSError, ValueError, KeyError) as e:
        raise HandoffError(f"{folder}/run.json cannot be read ({e!r}); make: make loops") from None
    if "auto" not in set(telemetry["phase"]):
        raise HandoffError(f"{folder}: its loop was never closed, expected an adaptive run")
    return telemetry, arguments


# --------------------------------------------------------------------------------------------- run
def run(args: argparse.Namespace) -> int:
    loops = []
    steps = []
    for folder in args.runs:
        telemetry, arguments = read_run(folder)
        # A run whose setpoint moved is judged by how it followed, not by how it held
        if arguments.get("setpoint_step"):
            steps.append(asdict(step_response(telemetry, arguments["seed"])))
            continue
        held = tracking(telemetry, arguments["target_sigma"], arguments["filter_beta"])
        losses = telemetry["val_loss"].dropna()
        facts = {"seed": arguments["seed"], "dtype": arguments["dtype"]}
        loops.append(facts | asdict(held) | {"val_loss": losses.iloc[-1]})

    # Two tables: a run is a row of one of them
    for name, rows in {"loops": loops, "setpoint_steps": steps}.items():
        if not rows:
            continue
        table = pd.DataFrame(rows)
        with atomic(args.save_dir / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)
        print(f"{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}\n")
    if loops:
        n_held = sum(loop["share"] >= 0.9 for loop in loops)
        claim = "at least 90 % of the filtered samples within 10 % of the setpoint"
        print(f"{n_held} of {len(loops)} runs: {claim}")
    return 0


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.add_argument("runs", type=Path, nargs="+", help="folders of adaptive runs")
    p.add_argument("--save_dir", type=Path, default=Path("results"), help="output folder")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

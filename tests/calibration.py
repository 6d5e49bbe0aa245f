"""What the calibration tests have in common: how long they run, and where their figures go.

    JANUS_LONG_CALIBRATION=1 JANUS_CALIBRATION_CSV=calibration.csv python -m pytest tests/test_calibration_*.py

runs ten times as many simulations and writes a row for each, from which the table in RESULTS.md is made.
"""

import csv
import os
from pathlib import Path

# Simulations are repeated this many times more often in the long version
LONGER = 10 if os.environ.get("JANUS_LONG_CALIBRATION") else 1


def record(statistic: str, setting: str, **figures: float) -> None:
    """Appends a row a figure to the CSV that JANUS_CALIBRATION_CSV names, if it names one."""
    name = os.environ.get("JANUS_CALIBRATION_CSV")
    if not name:
        return
    path = Path(name)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        if is_new:
            rows.writerow(["statistic", "setting", "figure", "value"])
        for figure, value in figures.items():
            rows.writerow([statistic, setting, figure, f"{value:.4g}"])

#!/usr/bin/env python3
"""One page about one or more finished pipelines: what was run, what came out, and what that
supports.

    python tools/report.py --runs runs/demo             # `make report`; the end of `make demo`
    python tools/report.py --runs runs/demo runs/mine   # two runs side by side

Reads   each folder as `make demo` leaves it: run.json, CSVs and figures. What is missing is named,
        with the command that makes it; the template pages/report.html
Writes  --out (results/report.html), one HTML file that needs no network: first what was found and
        how sure it is, then a picture a claim with its n, interval, null, command and CSV

The figures are those of the phases, and each sentence is built from numbers of their CSVs. What an
interval does not tell from its null is called "cannot tell".
"""

import argparse
import base64
import gzip
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
from headlines import Price, Tracking, after_settling, price, tracking  # noqa: E402

from hero_head_analysis import about_content, render_page, three_digits  # noqa: E402
from janus_adaptive import (  # noqa: E402
    HandoffError,
    atomic,
    csv_table,
    one_line_errors,
    read_telemetry,
)

MAX_BYTES = 5_000_000  # of the page
COMPRESS_BYTES = 300_000  # a CSV of more is embedded compressed
EMBED_BYTES = 400_000  # a CSV that still has more is only named
ARMS = ["adaptive", "control"]
MODES = ["mean", "zero", "resample"]  # of ablation, in the order of the buttons
FEWEST_SAMPLES = 20  # of sigma in time; of fewer no share of 90 % can be told
BOOTSTRAP = "95 % over documents (bootstrap-t, at least Student's t), Bonferroni within the table"


@dataclass
class Exhibit:
    """A figure of one run, and what a reader needs to judge it."""

    title: str  # as the paper numbers it
    image: str  # paths are relative to the run's folder; empty: words, or `drawing`
    csv: str  # what the figure is drawn from, and the numbers of `reading` are taken from
    reading: str  # what it shows in this run, in numbers of the CSV
    n: str  # of what is the unit of the interval
    interval: str  # its level, method and correction, or why there is none
    null: str  # what it would look like if there were nothing to see
    command: str  # that draws it again
    drawing: "Drawing | None" = None  # instead of an image
    table: pd.DataFrame | None = None  # small, below the words


class Run:
    """The folder of one pipeline, and what lies in it. A missing table raises FileNotFoundError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        if not (path / "adaptive" / "telemetry.csv").is_file():
            fact = f"{path} has no adaptive/telemetry.csv; expected the folder of a pipeline"
            raise HandoffError(f"{fact}: make demo RUN={path}")

    def table(self, name: str) -> pd.DataFrame:
        return csv_table(self.path / name)

    def record(self, name: str) -> dict[str, Any]:
        """The run.json of a part."""
        path = self.path / name / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            remedy = "the phase that wrote it writes it anew"
            raise HandoffError(f"{path} is not JSON ({e}); {remedy}") from None

    @cached_property
    def telemetry(self) -> dict[str, pd.DataFrame]:
        """Of each arm that was trained."""
        paths = {arm: self.path / arm / "telemetry.csv" for arm in ARMS}
        return {arm: read_telemetry(path) for arm, path in paths.items() if path.is_file()}

    @cached_property
    def target(self) -> float:
        """The setpoint of sigma."""
        return float(self.record("adaptive")["arguments"]["target_sigma"])

    @cached_property
    def held(self) -> Tracking:
        """How the adaptive arm's loop held its setpoint."""
        arguments = self.record("adaptive")["arguments"]
        return tracking(self.telemetry["adaptive"], self.target, arguments["filter_beta"])

    @cached_property
    def price(self) -> Price:
        """What the pressure costs, as in headlines.csv."""
        return price(self.path)

    def last(self, arm: str, column: str) -> float:
        """The last value of a column of the telemetry that is only filled now and then."""
        return float(self.telemetry[arm][column].dropna().iloc[-1])


# ------------------------------------------------------------------------------------ drawings
@dataclass
class Dot:
    """A measured value with its interval (NaN: none)."""

    value: float
    low: float = math.nan
    high: float = math.nan
    label: str = ""  # of its row; dots of one label share a row
    series: str = ""  # adaptive | control: its colour


@dataclass
class Mark:
    """A value to compare with: a threshold of the claim, or what nothing would give (is_null)."""

    value: float
    label: str
    is_null: bool = False


@dataclass
class DrawnDot:
    """Where a dot stands in the drawing, and its numbers."""

    x: float
    y: float  # from the top
    left: float  # ends of its line; the dot itself where it has no interval
    right: float
    series: str  # adaptive | control, or empty
    label: str  # of the row, at its left
    numbers: str  # value and interval, or the values of the row
    numbers_at: "Text"


@dataclass
class Text:
    """Where a text stands; anchor: start | middle | end."""

    x: float
    y: float
    anchor: str


@dataclass
class DrawnMark:
    """A vertical line and its label, above the axis for thresholds, below it for nulls."""

    x: float
    label: str
    label_at: Text
    kind: str  # threshold | null


@dataclass
class Drawing:
    """Dots, intervals and marks on one axis, as the template draws them (pixels)."""

    width: int
    height: float  # with the labels below the axis
    top: float  # of the marks' lines
    bottom: float
    dots: list[DrawnDot]
    marks: list[DrawnMark]
    unit: str  # what the axis measures
    words: str  # what is seen, for those who cannot see it


WIDTH = 340  # pixels of a drawing
LETTER = 6.2  # pixels of an average letter at 11 pixels
ROW = 17  # pixels of a row, where there are several
TOP = 18  # room for the labels of thresholds


def draw(dots: list[Dot], marks: list[Mark], unit: str) -> Drawing:
    """An axis with `dots`, a row a label, and `marks`. A single dot has its numbers above it; a
    list has the values of a row at its end."""
    rows: dict[str, list[Dot]] = {}
    for dot in dots:
        rows.setdefault(dot.label, []).append(dot)
    is_list = len(rows) > 1
    # What stands at the right of each row of a list
    ends = [" / ".join(three_digits(dot.value) for dot in of_row) for of_row in rows.values()]
    # Room for the words at either side
    left = 10 + LETTER * max(map(len, rows))
    right = WIDTH - 10 - (LETTER * max(map(len, ends)) if is_list else 0)
    # What has no end is drawn to the border
    known = [mark.value for mark in marks]
    for dot in dots:
        known += [value for value in (dot.value, dot.low, dot.high) if math.isfinite(value)]
    lowest = min(known)
    span = (max(known) - lowest) or 1.0

    def place(value: float) -> float:
        return left + (right - left) * min(1.0, max(0.0, (value - lowest) / span))

    # A single row has its numbers above the dot
    height = ROW if is_list else 2 * ROW
    drawn = []
    for number, of_row in enumerate(rows.values()):
        middle = TOP + height * (number + (0.5 if is_list else 0.75))
        for order, dot in enumerate(of_row):
            # Dots of one row stand below one another, so that none hides another
            x = place(dot.value)
            y = middle + 6 * (order - (len(of_row) - 1) / 2)
            at = Text(WIDTH, middle + 4, "end") if is_list else beside(x, y - 9, interval_text(dot))
            shown_dot = DrawnDot(x, y, x, x, dot.series, "", "", at)
            if not math.isnan(dot.low):
                shown_dot.left = place(dot.low)
                shown_dot.right = place(dot.high)
            if order == 0:  # said once a row
                shown_dot.label = dot.label
                shown_dot.numbers = ends[number] if is_list else interval_text(dot)
            drawn.append(shown_dot)
    bottom = TOP + height * len(rows)
    return Drawing(
        width=WIDTH,
        height=bottom + 34,
        top=TOP,
        bottom=bottom,
        dots=drawn,
        marks=[draw_mark(mark, place(mark.value), bottom) for mark in marks],
        unit=unit,
        words=tell_drawing(dots, marks, unit),
    )


def draw_mark(mark: Mark, x: float, bottom: float) -> DrawnMark:
    kind = "null" if mark.is_null else "threshold"
    y = bottom + 14 if mark.is_null else TOP - 6
    return DrawnMark(x, mark.label, beside(x, y, mark.label), kind)


def beside(x: float, y: float, text: str) -> Text:
    """Where a text stands that belongs to x: in its middle, or as near as the border allows."""
    # A text near a border ends there
    half = LETTER * len(text) / 2
    if x < half:
        return Text(0, y, "start")
    if x > WIDTH - half:
        return Text(WIDTH, y, "end")
    return Text(x, y, "middle")


def interval_text(dot: Dot) -> str:
    if math.isnan(dot.low):
        return three_digits(dot.value)
    return f"{three_digits(dot.value)} [{three_digits(dot.low)}, {three_digits(dot.high)}]"


def tell_drawing(dots: list[Dot], marks: list[Mark], unit: str) -> str:
    told = []
    for dot in dots:
        told.append(f"{dot.label} {dot.series} {interval_text(dot)}".strip())
    told += [mark.label for mark in marks if mark.label]
    return " ".join(f"{unit}: {'; '.join(told)}".split())


# ------------------------------------------------------------------ the sections, from the CSVs
def training(run: Run) -> list[Exhibit]:
    """How the loop held its setpoint; both arms in one figure."""
    held = run.held
    # Only what the closed loop answers for: from the first sample near the setpoint on.
    if held.n:
        loop = (
            f"From step {held.settled_step:.0f} on the filtered sigma is {held.mean:.3f} "
            f"± {held.sd:.3f} of its setpoint {run.target:g}, "
            f"within 10 % at {held.share:.0%} of {held.n} samples "
            f"({held.raw_share:.0%} unfiltered; noise of their size alone, filtered, "
            f"would give {held.noise_share:.0%})"
        )
    else:
        loop = (
            f"The filtered sigma never came within 10 % of its setpoint {run.target:g} "
            "while the loop was closed"
        )
    ends = []
    for arm in run.telemetry:
        sigma = run.last(arm, "val_sigma_z")
        loss = run.last(arm, "val_loss")
        ends.append(f"{arm} sigma {sigma:.4f}, loss {loss:.4f}")
    telemetry = " ".join(f"{run.path}/{arm}/telemetry.csv" for arm in run.telemetry)
    redraw = f"python janus_adaptive.py --redraw {telemetry}"
    seed = run.record("adaptive")["arguments"]["seed"]  # the same in both arms
    exhibit = Exhibit(
        title="Did it hold, and what did it cost?",
        image="training.png",
        csv="adaptive/telemetry.csv",
        reading=f"{loop}; validation split at the end: {', '.join(ends)}.",
        n=f"one training run an arm, seed {seed}",
        interval="none: one run; ± is over samples in time",
        null="the control arm, without pressure",
        command=f"{redraw} --save_dir {run.path} --target_sigma {run.target:g}",
    )
    return [exhibit]


def layer_differences(run: Run) -> pd.DataFrame:
    """sigma_resid by layer: of both arms, adaptive - control and its interval; a row a layer.

    The interval adds the variances of the arms, which is wide for arms of one text, and allows for
    as many layers as there are (Bonferroni).
    """
    tables = []
    for arm in ARMS:
        table = run.table(f"activations/{arm}/topology_stats.csv").query("metric == 'sigma_resid'")
        columns = table.set_index("layer")[["value", "ci_lo", "ci_hi", "n_blocks"]]
        tables.append(columns.add_suffix(f"_{arm}"))
    # Layers that only one arm has cannot be compared
    both = tables[0].join(tables[1], how="inner")
    degrees = both[["n_blocks_adaptive", "n_blocks_control"]].min(axis=1) - 1
    # The intervals of the table are each of one layer
    wider = stats.t.ppf(1 - 0.025 / len(both), degrees) / stats.t.ppf(0.975, degrees)
    difference = both.value_adaptive - both.value_control
    # Half the length of the interval, each way
    below = np.hypot(
        both.value_adaptive - both.ci_lo_adaptive, both.ci_hi_control - both.value_control
    )
    above = np.hypot(
        both.ci_hi_adaptive - both.value_adaptive, both.value_control - both.ci_lo_control
    )
    return both.assign(
        difference=difference, low=difference - wider * below, high=difference + wider * above
    )


def told_by_layer(layers: pd.DataFrame) -> str:
    """In how many layers what the heads write is less alike, more alike, or neither."""
    # Where the interval holds 0 it is neither
    less = int((layers.high < 0).sum())
    more = int((layers.low > 0).sum())
    # The last part only where there is something that cannot be told
    parts = [f"less alike in {less} of {len(layers)} layers", f"more alike in {more}"]
    if less + more < len(layers):
        parts.append(f"cannot tell in {len(layers) - less - more}")
    return ", ".join(parts)


def topology(run: Run) -> list[Exhibit]:
    layers = layer_differences(run)
    dots = []
    for number, layer in layers.iterrows():
        # Two dots a row, so that the arms of a layer stand together
        for arm in ARMS:
            value = layer[f"value_{arm}"]
            ends = layer[f"ci_lo_{arm}"], layer[f"ci_hi_{arm}"]
            dots.append(Dot(value, *ends, f"layer {number}", arm))
    tables = [run.table(f"activations/{arm}/topology_stats.csv") for arm in ARMS]
    sigma = pd.concat(tables).query("metric == 'sigma_resid'")
    null = sigma.null_mean.mean()
    marks = [Mark(null, f"bases turned at random {null:.2g}", True)]
    unit = "sigma_resid: mean |cosine| between what two heads write"
    # The smallest of the arms and layers, so that no n is overstated
    n_windows = int(sigma.n_windows.min())
    n_documents = int(sigma.n_documents.min())
    n_tokens = int(sigma.n_tokens.min())
    exhibit = Exhibit(
        title="How alike is what the heads write, layer by layer?",
        image="",
        csv="activations/adaptive/topology_stats.csv",
        reading=f"What the heads write under pressure is {told_by_layer(layers)}.",
        n=f"{n_windows:,} windows of {n_documents:,} documents, {n_tokens:,} tokens a layer",
        interval="95 % jackknife over blocks of documents (topology_stats.csv)",
        null="the basis of every head turned at random, independently (null_* of the CSV)",
        command=f"python tools/report.py --runs {run.path}",
        drawing=draw(dots, marks, unit),
    )
    return [exhibit]


def figure_1(run: Run) -> list[Exhibit]:
    """Of the outputs z, which is what the loop measures."""
    sigma = run.table("activations/adaptive/topology_stats.csv").query("metric == 'sigma_z'")
    span = f"{three_digits(sigma.value.min())} to {three_digits(sigma.value.max())}"
    redraw = "python harvest_activations.py --redraw --run_name adaptive"  # needs no model
    exhibit = Exhibit(
        title="Figure 1: cosines between the outputs of two heads",
        image="activations/adaptive/figure1_head_cosines.png",
        csv="activations/adaptive/head_cosines.csv",
        reading=f"Their mean absolute value in the adaptive arm, by layer: {span}.",
        n=f"{int(sigma.n_tokens.min()):,} tokens a layer",
        interval="none a pair; of the mean in topology_stats.csv",
        null="the basis of every head turned at random (null_* of topology_stats.csv)",
        command=f"{redraw} --save_dir {run.path}/activations --compare control adaptive",
    )
    return [exhibit]


def saes(run: Run) -> list[Exhibit]:
    """Figure 2, and what the tables and figures say that only some trainings make."""
    table = run.table("saes/sae_metrics.csv")  # a row an SAE
    unexplained = []
    for kind, of_kind in kinds_of_saes(table):
        arms = []
        for arm, of_arm in of_kind.groupby("run"):
            fvu = of_arm.groupby("layer")["fvu"].mean()
            span = f"layers {fvu.min():.3f} to {fvu.max():.3f}"
            arms.append(f"{arm} {fvu.mean():.3f} ({span}), {tell_l0(of_arm)}")
        unexplained.append(f"{kind}{'; '.join(arms)}")
    by_depth = Exhibit(
        title="Figure 2: how much do the SAEs leave unexplained?",
        image="saes/figure2_l0_by_depth.png",
        csv="saes/sae_metrics.csv",
        reading=f"{WHAT_AN_SAE_IS} Unexplained variance: {'; '.join(unexplained)}.",
        n=count_saes(table),
        interval="95 % over documents; L0 of SAEs of heads: over the heads of a layer",
        null="zero and mean ablation of the same activations (ce_recovered_* in the CSV)",
        command=f"python train_sae.py --redraw --save_dir {run.path}/saes",
    )
    return [by_depth, *gains(run), *frontier(run), *stability(run)]


WHAT_AN_SAE_IS = (
    "A sparse autoencoder (SAE) rebuilds what the heads of a layer give out from a dictionary of "
    "features, of which few may be active at once: L0 says how many are, FVU which share of the "
    "variance is not rebuilt."
)


def kinds_of_saes(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The SAEs of each unit and architecture, those of whole layers first; the words that name
    them are empty where there is one kind."""
    if not {"unit", "arch"} <= set(table):  # as older versions wrote it
        return [("", table)]
    kinds = sorted(table.groupby(["unit", "arch"]), key=lambda kind: kind[0][0] != "layer")
    if len(kinds) == 1:
        return [("", table)]
    return [(f"{arch}, an SAE a {unit}: ", of_kind) for (unit, arch), of_kind in kinds]


def tell_l0(table: pd.DataFrame) -> str:
    """Mean of L0, or its range where the SAEs differ in it by more than a quarter."""
    if table.l0.max() < 1.25 * table.l0.min():
        return f"L0 {table.l0.mean():.1f}"
    return f"L0 {table.l0.min():.1f} to {table.l0.max():.1f}"


# ---- what an SAE learned, beside what it would have without anything to learn
NULLS = {  # a column gain_<name> of table2.csv: (what the null is, what the gain is called)
    "gaussian": ("on normal rows of the same covariance", "gain over normal rows"),
    "decoder": ("with random directions that stay", "gain over a random decoder"),
    "untrained": ("on the model before its training", "gain over the model before training"),
}


def gains(run: Run) -> list[Exhibit]:
    """How much less is left unexplained than by each null; none where there are no nulls."""
    if not (run.path / "saes" / "table2.csv").is_file():
        return []
    table = gains_over_seeds(run, run.table("saes/table2.csv"))  # a row a layer, arm, kind of SAE
    nulls = [name for name in NULLS if has_gain(table, name)]
    if not nulls:
        return []
    columns = [f"gain_{name}" for name in nulls]
    table = table.dropna(subset=columns, how="all")
    told = []
    for kind, of_kind in kinds_of_saes(table):
        arms = []
        for arm, of_arm in of_kind.groupby("run"):
            found = [tell_gain(of_arm, name) for name in nulls if has_gain(of_arm, name)]
            arms.append(f"{where_learnt(arm, of_arm)}{'; '.join(found)}.")
        told.append(f"{kind}{' '.join(arms)}")
    *most, last = [NULLS[name][0] for name in nulls]
    compared = f"{', '.join(most)} or {last}" if most else last
    exhibit = Exhibit(
        title="What did the SAEs learn that is not there anyway?",
        image="",
        csv="saes/table2.csv",
        reading="Any SAE rebuilds something, so each is compared with the same SAE where there was "
        f"nothing to learn: {compared}. The gain is by which share less it leaves unexplained. "
        f"{' '.join(told)} {what_intervals_hold(table)}{how_nulls_differ(run)}",
        n=f"{int(table.n_documents.min()):,} held-out documents, the same for both; "
        f"{tell_trainings(table)}",
        interval="95 %, each by itself; of one training: over documents (bootstrap-t, at least "
        "Student's t); of several: over trainings and documents (sae_gains.csv)",
        null=f"0 %: no less than the null leaves ({', '.join(columns)} of the CSV)",
        command=f"python train_sae.py --redraw --save_dir {run.path}/saes",
        table=gains_table(table, nulls),
    )
    return [exhibit]


def gains_over_seeds(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of table 2, of which those that were trained with several seeds are replaced by one
    of their mean gain, with its interval over trainings and documents; n_seeds says of how many."""
    table = table.assign(n_seeds=1)
    if not (run.path / "saes" / "sae_gains.csv").is_file():
        return table
    several = run.table("saes/sae_gains.csv")  # a row an SAE but for its seed, and a null
    several = several[several["n_seeds"] > 1]
    if several.empty:
        return table
    names = ["run", "unit", "arch", "setting", "site", "layer"]
    sae = [*names, "head", "n_seeds"]
    shown = several[sae].drop_duplicates()
    for null, of_null in several.groupby("null"):
        columns = {"gain": f"gain_{null}", "smallest": f"smallest_{null}"}
        columns |= {f"gain_{end}": f"gain_{null}_{end}" for end in ("lo", "hi")}
        of_null = of_null[[*sae, *columns]].rename(columns=columns)
        shown = shown.merge(of_null, on=sae, how="left")
    # Documents are those of table 2, and its other rows stay
    of_documents = table.groupby(names)["n_documents"].min().reset_index()
    shown = shown.merge(of_documents, on=names, how="left")
    is_replaced = table[names].apply(tuple, axis=1).isin(shown[names].apply(tuple, axis=1))
    # A null that was trained with one seed alone keeps its row
    rest = table[is_replaced].copy()
    for null in several["null"].unique():
        rest[[c for c in rest if c.startswith(f"gain_{null}")]] = math.nan
    rest = rest.dropna(subset=[c for c in rest if c in {f"gain_{n}" for n in NULLS}], how="all")
    rest = rest[~rest.duplicated(names, keep=False)]
    return pd.concat([table[~is_replaced], rest, shown], ignore_index=True)


def what_intervals_hold(table: pd.DataFrame) -> str:
    """Over what the intervals of gains are, a sentence."""
    one = (
        "Intervals are over the documents of this one training: another training may give "
        "another gain."
    )
    n_seeds = sorted(table["n_seeds"].unique())
    if n_seeds == [1]:
        return one
    several = f"Gains are means over {tell_trainings(table)}, and intervals are over trainings and "
    several += "documents."
    if n_seeds[0] == 1:
        several += " Where there is one training, the interval is over its documents alone."
    return several


def how_nulls_differ(run: Run) -> str:
    """Where a null is not as sparse as its SAE, or knows its own documents by heart: sentences."""
    if not (run.path / "saes" / "sae_nulls.csv").is_file():
        return ""
    nulls = run.table("saes/sae_nulls.csv")  # a row an SAE, as in sae_metrics.csv
    saes = run.table("saes/sae_metrics.csv")
    told = []
    for name, of_null in nulls.groupby("null"):
        # The model before training is a run of its own, with which others began
        same = ["initial" if name == "untrained" else "run", "unit", "arch", "setting", "seed"]
        same += ["site", "layer", "head", "recipe"]
        same = [column for column in same if column in saes and column in nulls]
        pairs = saes.merge(of_null, on=same, suffixes=("", "_null"))  # an SAE and its null
        _, gain = NULLS[name]
        l0 = pairs["l0_null"] / pairs["l0"]
        l0 = l0[np.isfinite(l0)]
        if len(l0) and (l0 - 1).abs().max() > SAME_L0:
            span = per_cent_range(l0.min(), l0.max())
            told.append(f" For the {gain}, L0 of the null is {span} of that of its SAE.")
        if "fvu_train_null" not in pairs:
            continue
        by_heart = pairs[pairs["fvu_null"] > BY_HEART * pairs["fvu_train_null"]]
        if len(by_heart):
            seen, unseen = (f"{by_heart[f'{one}_null'].mean():.3f}" for one in ("fvu_train", "fvu"))
            told.append(
                f" For the {gain}, the null leaves {seen} on documents that it was trained on and "
                f"{unseen} on others (mean of {len(by_heart)} of {len(pairs)}): that gain is also "
                "one of carrying over to new documents."
            )
    return "".join(told)


SAME_L0 = 0.05  # as much may another L0 differ
BY_HEART = 1.2  # FVU on held-out documents over that on those of the training


def tell_trainings(table: pd.DataFrame) -> str:
    """One training, 3 trainings; 1 to 3 trainings where the rows differ."""
    fewest, most = int(table["n_seeds"].min()), int(table["n_seeds"].max())
    if most == 1:
        return "one training"
    return f"{most if fewest == most else f'{fewest} to {most}'} trainings"


def has_gain(table: pd.DataFrame, null: str) -> bool:
    return f"gain_{null}" in table and bool(table[f"gain_{null}"].notna().any())


def tell_gain(table: pd.DataFrame, null: str) -> str:
    """The range of a gain over the rows of one arm, and in how many its interval excludes 0."""
    _, name = NULLS[null]
    rows = table.dropna(subset=f"gain_{null}")
    gain = rows[f"gain_{null}"]
    if len(rows) == 1:
        [row] = rows.to_dict("records")
        ends = (row[f"gain_{null}{end}"] for end in ("", "_lo", "_hi"))
        told = f"the {name} is {interval_text(Dot(*(100 * value for value in ends)))} %"
        holds_0 = row[f"gain_{null}_lo"] <= 0 <= row[f"gain_{null}_hi"]
        smallest = row.get(f"smallest_{null}", math.nan)
        if holds_0 and not math.isnan(smallest):
            told += f" (one below {100 * smallest:.0f} % could not be told)"
        return told
    is_more = rows[f"gain_{null}_lo"] > 0
    is_less = rows[f"gain_{null}_hi"] < 0
    n_off_zero = int((is_more | is_less).sum())
    excludes = f"interval without 0 in {n_off_zero} of {count_of(rows)}"
    if is_less.any():
        excludes += f", in {int(is_less.sum())} more is left"
    has_interval = rows[f"gain_{null}_lo"].notna()
    if not has_interval.all():
        excludes += f"; {int((~has_interval).sum())} without interval"
    missed = rows[has_interval & ~is_more & ~is_less]
    if f"smallest_{null}" in missed and missed[f"smallest_{null}"].notna().any():
        largest = 100 * missed[f"smallest_{null}"].max()
        excludes += f"; with 0 in it, a gain below {largest:.0f} % could not be told"
    return f"the {name} is {per_cent_range(gain.min(), gain.max())} ({excludes})"


def count_of(rows: pd.DataFrame) -> str:
    """How many layers these rows of table 2 are of one arm, or SAEs where a layer has several."""
    return f"{len(rows)} {'layers' if rows['layer'].is_unique else 'SAEs'}"


def where_learnt(arm: str, table: pd.DataFrame) -> str:
    """In how many layers of one arm an SAE found what the covariance does not explain, if that null
    was trained: the start of a sentence."""
    begin = f"In the {arm} arm"
    if not has_gain(table, "gaussian"):
        return f"{begin}, "
    rows = table.dropna(subset="gain_gaussian")
    n_learnt = int((rows["gain_gaussian_lo"] > 0).sum())
    what = "learned more than the covariance alone gives"
    if len(rows) > 1:
        return f"{begin} the SAEs {what} in {n_learnt} of {count_of(rows)}: "
    the_sae = f"the SAE of layer {rows['layer'].iloc[0]}"
    if n_learnt:
        return f"{begin} {the_sae} {what}: "
    return f"{begin} it is not shown that {the_sae} {what}: "


def per_cent_range(low: float, high: float) -> str:
    """A range of gains: 21 to 45 %."""
    few, many = (f"{round(100 * value)}" for value in (low, high))
    return f"{few} to {many} %" if few != many else f"{few} %"


def gains_table(table: pd.DataFrame, nulls: list[str]) -> pd.DataFrame:
    """A row a row of table 2: the gain over each null with its interval, in per cent."""
    shown = pd.DataFrame({"layer": table["layer"], "arm": table["run"]})
    # What tells rows of one layer and arm apart
    for name in ("unit", "arch", "setting", "seed", "head", "n_seeds"):
        if name in table and table[name].nunique() > 1:
            shown[name] = [as_cell(value) for value in table[name]]
    for null in nulls:
        _, name = NULLS[null]
        columns = [f"gain_{null}", f"gain_{null}_lo", f"gain_{null}_hi"]
        shown[f"{name}, %"] = [
            interval_text(Dot(*(100 * float(value) for value in row)))
            for row in table[columns].to_numpy()
        ]
    return shown.sort_values(["layer", "arm"], kind="stable")


def as_cell(value: Any) -> str:
    """A name or whole number as text; a gap is empty."""
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.15g}"


def frontier(run: Run) -> list[Exhibit]:
    """Reconstruction against L0; none where every SAE has the same sparsity."""
    paths = [run.path / "saes" / f"sae_frontier.{ending}" for ending in ("csv", "png")]
    if not all(path.is_file() for path in paths):
        return []
    table = run.table("saes/sae_frontier.csv")  # a row a layer, arm, setting
    # SAEs of one curve have one width and one length of training: named where there are several
    columns = [name for name in ("expansion", "tokens") if name in table]
    varied = [name for name in columns if table[name].nunique() > 1]
    if "recipe" in table and table.groupby(["arch", "unit", *varied])["recipe"].nunique().max() > 1:
        varied.append("recipe")
    told = []
    for kind, of_kind in kinds_of_saes(table):
        for (arm, *values), of_curve in of_kind.groupby(["run", *varied]):
            named = []
            for name, value in zip(varied, values, strict=True):
                named.append(f"{name} {value}" if name == "recipe" else f"{name} {value:,.0f}")
            title = kind + ", ".join([arm, *named]) + (":" if named else "")
            by_setting = of_curve.groupby("setting")[["l0", "fvu"]].mean().sort_values("l0")
            points = [f"{row.fvu:.3f} at L0 {row.l0:.1f}" for row in by_setting.itertuples()]
            told.append(f"{title} {', '.join(points)}")
    exhibit = Exhibit(
        title="What does each further feature buy?",
        image="saes/sae_frontier.png",
        csv="saes/sae_frontier.csv",
        reading="Unexplained variance by how many features may be active at once (L0), a mean "
        f"over layers: {'; '.join(told)}.",
        n=f"{int(table.n_documents.min()):,} held-out documents, the same for every SAE",
        interval="95 % over documents, each SAE by itself",
        null="of FVU 1: nothing is rebuilt; of CE recovered 0: as without the layer",
        command=f"python train_sae.py --redraw --save_dir {run.path}/saes",
    )
    return [exhibit]


def stability(run: Run) -> list[Exhibit]:
    """Whether other seeds find the same features; none where one was trained."""
    if not (run.path / "saes" / "seed_stability.csv").is_file():
        return []
    table = run.table("saes/seed_stability.csv")  # a row a pair of SAEs
    told = []
    for kind, of_kind in kinds_of_saes(table):
        for arm, pairs in of_kind.groupby("run"):
            mean = pairs[["pw_mcc", "pw_mcc_null"]].mean()
            span = f"{pairs.pw_mcc.min():.2f} to {pairs.pw_mcc.max():.2f}"
            by_chance = f"{mean.pw_mcc_null:.2f} by chance"
            more = (pairs.pw_mcc - pairs.pw_mcc_null).agg(["min", "max"])
            above = f"{more['min']:.2f} to {more['max']:.2f} above it, pair by pair"
            told.append(f"{kind}{arm} {mean.pw_mcc:.2f} ({span}), {by_chance}: {above}")
    exhibit = Exhibit(
        title="Does another seed find the same features?",
        image="",
        csv="saes/seed_stability.csv",
        reading="The SAEs were trained again from other random numbers, and the features of two "
        "were matched one to one; mean cosine between what partners write (PW-MCC; 1: the same "
        f"features): {'; '.join(told)}.",
        n=f"{len(table)} pairs of SAEs, at least {int(table.n_matched.min()):,} features matched",
        interval="none: pairs share SAEs. The null of a pair varies between draws by "
        f"{table.null_sd.max():.3f} at most (standard deviation)",
        null="the same with random signs in the axes of the data's own subspace (pw_mcc_null)",
        command=f"python train_sae.py --seeds 1 2 3 --activations_dir {run.path}/activations "
        f"--save_dir {run.path}/saes",
    )
    return [exhibit]


def count_saes(table: pd.DataFrame) -> str:
    """How many SAEs, of what if there are several kinds, and on how much text."""
    counted = []
    for kind, of_kind in kinds_of_saes(table):
        windows = f"{int(of_kind.n_windows.min()):,} windows"
        documents = f"{int(of_kind.n_documents.min()):,} held-out documents"
        counted.append(f"{kind}{len(of_kind)} SAEs on {windows} of {documents}")
    return "; ".join(counted)


def figure_3(run: Run) -> list[Exhibit]:
    table = run.table("saes/sae_metrics.csv")
    dead = []  # the latents that an SAE pays for in vain
    for kind, of_kind in kinds_of_saes(table):
        for arm, of_arm in of_kind.groupby("run"):
            dead.append(f"{kind}{arm} {of_arm.dead_share.mean():.1%}")
    on_tokens = int(table.dead_share_tokens.min())  # on more tokens, more latents fire
    how_often = Exhibit(
        title="Figure 3: how often latents fire",
        image="saes/figure3_activation_frequency.png",
        csv="saes/sae_metrics.csv",
        reading=f"Latents that never fire on {on_tokens:,} mixed tokens: {', '.join(dead)}.",
        n=count_saes(table),
        interval="none",
        null="none: a description",
        command=f"python train_sae.py --redraw --save_dir {run.path}/saes",
    )
    return [how_often]


def impact_of_first(arm: Any) -> str:
    """Cross-fitted impact of an arm's first head; where there are too few units, as measured."""
    if math.isnan(arm.crossfit):
        return f"{arm.delta:+.4f} nats, no interval: {arm.n_unit} {units_of(arm)} are too few"
    interval = f"[{arm.crossfit_lo:+.4f}, {arm.crossfit_hi:+.4f}]"
    return f"{arm.crossfit:+.4f} nats {interval}, in front in {arm.p_top1:.0%} of resamples"


def units_of(arm: Any) -> str:
    """What the units of replication are; files of an older version had sequences."""
    return getattr(arm, "unit", "sequences")


def ablation(run: Run) -> list[Exhibit]:
    summary = run.table("results_ablation_summary.csv")
    # A row an arm and mode; the hero is the first under the mode that the heads are ranked by.
    summary = summary[summary["mode"] == summary["ranked_by"]]
    parts = []
    for arm in summary.itertuples():
        who = "the unique hero is" if arm.unique_hero else "no unique hero, first is"
        head = f"L{arm.hero_layer:.0f}H{arm.hero_head:.0f}"
        parts.append(f"{arm.run}: {who} {head}, {impact_of_first(arm)}")
    no_effect = "no effect of any head (max-T over all heads)"
    exhibit = Exhibit(
        title="Figure 4: what does removing each head cost?",
        image="results_ablation_figure4.png",
        csv="results_ablation.csv",
        reading="; ".join(parts) + ".",
        n=f"{arm.n_unit} {units_of(arm)}, every head",
        interval=f"95 % over {units_of(arm)}, with the first head chosen again",
        null=f"{no_effect}; first head chosen on one half of them, measured on the other",
        command=f"python ablation_test.py --redraw {run.path}/results_ablation.csv",
    )
    return [exhibit]


def scores_beside_others(scores: pd.DataFrame) -> str:
    """The two scores in which the hero is furthest from all comparison heads (random ones of its
    model), those in which it has more of it first; with what the same score on shuffled text
    says."""
    others = scores[scores.role.str.startswith("random")]
    standing_out = []  # (whether it has more, distance, sentence)
    for row in scores[scores.role == "hero"].itertuples():
        # The same score of the heads that it is compared with
        values = others[others.score == row.score].value
        # Interval off the values of all others. A score of the weights has no interval over text
        is_of_text = row.unit == "document"
        low = row.ci_low if is_of_text else row.value
        high = row.ci_high if is_of_text else row.value
        has_more = low > values.max()
        if not (has_more or high < values.min()):  # also where there is no interval
            continue
        # All scores are shares: of attention, or of the largest possible value
        distance = low - values.max() if has_more else values.min() - high
        span = f"{three_digits(values.min())} to {three_digits(values.max())}"
        told = f"{row.score} {three_digits(row.value)}, {len(values)} comparison heads {span}"
        standing_out.append((has_more, distance, f"{told}; {tell_shuffled(row)}"))
    if not standing_out:
        return "In none of its scores is it told from the comparison heads."
    # Two are enough for a first look; the hero page has all
    standing_out.sort(reverse=True)
    sentences = [f"{told[0].upper()}{told[1:]}." for _, _, told in standing_out[:2]]
    return " ".join(sentences)


def tell_shuffled(row: Any) -> str:
    """What a score's null, the same score on shuffled text, means; as on the page of the hero."""
    # The interval is that of value - null, window by window; the column came later
    if math.isnan(getattr(row, "above_null_low", math.nan)):
        return "not measured on shuffled text"
    return about_content(pd.Series(row._asdict()))


def share_explained(preserving: pd.DataFrame, name: str) -> str:
    """What attending to one kind of key alone keeps of the head's impact, beside as many random
    keys: the kind that keeps most. Rows of the hero; those about SAE features are no mechanism."""
    keys = preserving[preserving.mechanism.str.startswith("keys:")]
    # The best of several, whose intervals are corrected for their number
    claimed = keys[keys.kind == "claimed"].sort_values("value")
    if claimed.empty:
        return f"No kind of key was tried on {name}."
    best = claimed.iloc[-1]
    kind = best.mechanism.removeprefix("keys: ")
    # A share of what may be nothing; written so that it holds where there is no interval too
    if not (best.impact_low > 0 or best.impact_high < 0):
        vague = f"The loss impact of {name} is not told from 0 on these sequences"
        return f"{vague}, so shares of it mean nothing."
    random = keys[keys.kind == "matched-random"].set_index("mechanism")
    share = f"{best.value:.0%} [{best.ci_low:.0%}, {best.ci_high:.0%}]"
    # What any attention to as many keys would keep
    beside = "no random keys were tried"
    verdict = ""
    if best.mechanism in random.index:
        chance = random.loc[best.mechanism]
        beside = (
            f"as many random keys {chance.value:.0%} [{chance.ci_low:.0%}, {chance.ci_high:.0%}]"
        )
        if not best.ci_low > chance.ci_high:  # also where one of them has no interval
            verdict = " It cannot be told from random keys."
    kept = f"Attending to “{kind}” alone keeps {share} of the loss impact of {name}"
    return f"{kept}; {beside}.{verdict}"


def tell_impact(impact: Any, name: str) -> str:
    """What the head costs on the windows that it was looked at."""
    cost = f"{impact.value:+.4f} nats a token"
    if math.isnan(impact.ci_low):
        few = f"no interval: {impact.n:.0f} documents are too few"
        return f"Removing {name} changes the loss by {cost} ({few})."
    # From here on the sentence hangs on where 0 lies
    cost += f" [{impact.ci_low:+.4f}, {impact.ci_high:+.4f}]"
    if impact.ci_low > 0:
        return f"Removing {name} raises the loss by {cost}."
    if impact.ci_high < 0:
        return f"Removing {name} lowers the loss, by {cost}."
    return f"These windows show no effect of {name}: {cost}. Nothing below explains anything."


def hero(run: Run) -> list[Exhibit]:
    folder = "hero_analysis"
    head = run.record(folder).get("hero") or {}
    name = f"L{head.get('layer')}H{head.get('head')} of {head.get('run')}"
    preserving = run.table(f"{folder}/hero_preserving.csv").query("role == 'hero'")
    impact = run.table(f"{folder}/hero_impact.csv").iloc[0]  # the hero; then its controls
    scores = run.table(f"{folder}/hero_scores.csv")
    n = f"{impact.sequences:.0f} sequences of {impact.n:.0f} documents of the {impact.split} split"
    command = f"python hero_head_analysis.py --redraw --save_dir {run.path}/{folder}"
    does_it_matter = Exhibit(
        title="Does it matter?",
        image="",
        csv=f"{folder}/hero_impact.csv",
        reading=tell_impact(impact, name),
        n=n,
        interval=BOOTSTRAP,
        null="matched and random heads of the same model, in the CSV",
        command=command,
    )
    kind = Exhibit(
        title="What kind of head is it?",
        image="",
        csv=f"{folder}/hero_scores.csv",
        reading=scores_beside_others(scores),
        n=n,
        interval=BOOTSTRAP,
        null="random heads of the same model; the same score on text with its tokens shuffled",
        command=command,
    )
    explained = Exhibit(
        title="How much of it is explained?",
        image=f"{folder}/hero_preserving.png",
        csv=f"{folder}/hero_preserving.csv",
        reading=share_explained(preserving, name),
        n=n,
        interval=BOOTSTRAP,
        null="as many keys or features, drawn at random (grey)",
        command=command,
    )
    return [does_it_matter, kind, explained]


class Worth(NamedTuple):
    """What the energy model is worth as a language model."""

    told: str
    is_worse: bool  # than the unigram


def model_worth(models: pd.DataFrame) -> Worth:
    """The best number of descent steps against a model that knows only frequencies. Rows of
    models.csv: loss on masked tokens."""
    losses = models.set_index("model").masked_nats
    unigram = losses["unigram"]
    # Of the numbers of steps that were tried
    best = losses[losses.index.str.startswith("Energy Transformer")].min()
    n = int(models.n_masked.iloc[0])
    values = f"{best:.2f} nats a masked token, unigram {unigram:.2f}, {n:,} masked tokens"
    # Equal is not better
    if not best < unigram:
        return Worth(f"The model is worse than one that knows only frequencies ({values})", True)
    return Worth(f"The model is better than one that knows only frequencies ({values})", False)


def tell_predictor(row: Any) -> str:
    """Whether a predictor's rank correlation is told from 0."""
    names = {"efas_a": "EFAS", "attribution_a": "attribution"}
    numbers = f"{names[row.predictor]} {row.spearman:.2f} [{row.ci_lo:.2f}, {row.ci_hi:.2f}]"
    if row.ci_lo > 0:
        return f"{numbers}, yes"
    if row.ci_hi < 0:
        return f"{numbers}, the wrong way round"
    return f"{numbers}, cannot tell from 0"


def tell_doses(predictors: pd.DataFrame) -> str:
    """What predicts the change of energy, at the smallest and at the largest dose: rows of
    predictors.csv, of the two predictors that are measured on other sequences."""
    doses = []
    # First-order predictions are meant for small doses; large ones show where they end
    for eps in sorted({predictors.eps.min(), predictors.eps.max()}):
        rows = predictors[predictors.eps == eps]
        told = "; ".join(tell_predictor(row) for row in rows.itertuples())
        doses.append(f"when {eps:.0%} of a feature is taken away: {told}")
    return f"Rank correlation with the change of energy, {'. And '.join(doses)}."


def efas(run: Run) -> list[Exhibit]:
    folder = "energy_lens"
    layers = run.table(f"{folder}/layers.csv")  # a row a descent step
    preset = run.record(folder)["arguments"]["preset"]
    untrained = run.table(f"{folder}/untrained.csv").iloc[0]  # the same model before training
    worth = ""
    if (run.path / folder / "models.csv").is_file():
        worth = f"{model_worth(run.table(f'{folder}/models.csv')).told}. "
    sequences = f"{int(layers.n_seq.iloc[0])} held-out sequences, one a document"
    save = f"--save_dir {run.path}/{folder} --overwrite"
    command = f"python energy_lens_minimal.py --preset {preset} {save}"
    against_nulls = Exhibit(
        title="Is a feature aligned with the energy?",
        image=f"{folder}/efas_distribution.png",
        csv=f"{folder}/features.csv",
        reading=(
            f"{worth}{int(layers.aligned.sum())} of {int(layers.eligible.sum())} eligible features "
            f"are aligned. |EFAS| > 0.1 alone passes {int(layers.rule_passes.sum())}, and "
            f"{layers.rule_false_directions.sum():.0f} of as many random directions; "
            f"untrained model: {int(untrained.aligned)} of {int(untrained.eligible)}."
        ),
        n=f"{sequences}; preset {preset}, one seed",
        interval="95 % bootstrap over sequences (layers.csv)",
        null=(
            "whole sequences permuted, and random directions with the states' covariance; "
            "false discovery rate 5 % over all layers"
        ),
        command=command,
    )
    # A row a predictor, dose (eps) and scale: Spearman with what the intervention did.
    predictors = run.table(f"{folder}/predictors.csv")
    measured = predictors[
        (predictors.scale == "signed") & predictors.predictor.isin(["attribution_a", "efas_a"])
    ]
    if measured.empty:  # too few features for an intervention
        return [against_nulls]
    predicts = Exhibit(
        title="Does it predict an intervention?",
        image=f"{folder}/predicted_actual.png",
        csv=f"{folder}/predictors.csv",
        reading=tell_doses(measured),
        n=f"{count_intervened(measured.iloc[0])}; preset {preset}, one seed",
        interval="95 % jackknife over sequences and clusters of features",
        null="a random predictor (same CSV)",
        command=command,
    )
    return [against_nulls, predicts]


def count_intervened(row: pd.Series) -> str:
    """Of what a correlation is; older files do not count clusters or sequences."""
    counts = {"n_clusters": "clusters of features", "n_seq": "sequences"}
    told = [f"{int(row.n_features)} features"]
    told += [f"{int(row[name])} {what}" for name, what in counts.items() if name in row]
    return ", ".join(told)


class Section(NamedTuple):
    """A section of the page."""

    heading: str
    exhibits: Callable[[Run], list[Exhibit]]
    remedy: str  # the command that makes what is missing
    is_closed: bool = False  # until a reader opens it, at the end of the page

    @property
    def id(self) -> str:
        """Its name in an address."""
        return re.sub(r"\W+", "-", self.heading.lower())


SECTIONS = [
    Section("Control loop", training, "make train figures"),
    Section("What became less alike", topology, "make harvest figures"),
    Section("Sparse autoencoders", saes, "make sae figures"),
    Section("Every head", ablation, "make ablate"),
    Section("The first head", hero, "make hero"),
    Section("Energy", efas, "make energy"),
    Section("Figure 1", figure_1, "make harvest figures", is_closed=True),
    Section("Figure 3", figure_3, "make sae figures", is_closed=True),
]


# -------------------------------------------------------------------------------- the verdict
@dataclass
class Verdict:
    """A claim of the original studies, and what one run says about it."""

    claim: str
    word: str  # supported | not supported | cannot tell | in 4 of 6 layers
    evidence: str
    drawing: Drawing | None = None

    @property
    def tone(self) -> str:
        """Its colour: only what is supported is green."""
        return {"supported": "good", "not supported": "bad"}.get(self.word, "open")


def word_of(is_supported: Any, is_refuted: Any) -> str:
    """Neither, also where an interval is NaN: cannot tell."""
    if is_supported:
        return "supported"
    return "not supported" if is_refuted else "cannot tell"


def judge_control(run: Run) -> list[Verdict]:
    held = run.held
    claim = "The loop holds sigma within 10 % of its setpoint, nine tenths of the time"
    closed = run.telemetry["adaptive"].phase == "auto"
    # No sample was taken with the loop closed
    if not closed.any():
        return [Verdict(claim, "cannot tell", "the loop was never closed: too few steps")]
    if not held.n:
        never = f"none of {closed.sum()} filtered samples came within 10 %"
        return [Verdict(claim, "not supported", f"{never}; one run")]
    share = f"{held.share:.0%} of {held.n} filtered samples after it settled, one run"
    # The line lies between the limits just where the claim holds
    values = nearest_samples(run)
    dots = [Dot(held.mean, values.min(), values.max())]
    marks = [Mark(0.9, ""), Mark(1.1, "setpoint ± 10 %")]
    if "control" in run.telemetry:
        free = after_settling(run.telemetry["control"], held) / run.target
        marks.append(Mark(free, f"no pressure {free:.3g}", True))
    unit = "sigma over its setpoint; line: the nearest 90 % of samples"
    drawing = draw(dots, marks, unit)
    if held.n < FEWEST_SAMPLES:
        few = f"{share}: too few, {FEWEST_SAMPLES} are needed"
        return [Verdict(claim, "cannot tell", few, drawing)]
    noise = "a loop that holds the mean exactly, with the noise of these samples, would have"
    noise += f" {held.noise_share:.0%}"
    word = word_of(held.share >= 0.9, held.share < 0.9)
    return [Verdict(claim, word, f"{share}; {noise}", drawing)]


def nearest_samples(run: Run) -> np.ndarray:
    """The nine tenths of the settled filtered samples that are nearest to the setpoint, over it:
    within 10 % just where nine tenths of the samples are."""
    telemetry = run.telemetry["adaptive"]
    is_settled = (telemetry.phase == "auto") & (telemetry.step >= run.held.settled_step)
    aim = telemetry.get("setpoint", run.target)
    relative = (telemetry.sigma_filtered / aim)[is_settled].to_numpy()
    # Nearest first
    order = np.argsort(np.abs(relative - 1))
    return relative[order][: math.ceil(0.9 * len(order))]


def judge_price(run: Run) -> list[Verdict]:
    """By the limits of the interval."""
    paid = run.price
    # Value and both ends
    percent = 100 * np.array([paid.relative.value, paid.relative.low, paid.relative.high])
    word = word_of(percent[2] < 2, percent[1] > 2)
    evidence = f"{percent[0]:+.2f} % {paid.interval}, over {paid.measured_on}; one seed"
    marks = [Mark(2, "limit 2 %"), Mark(0, "no cost", True)]
    drawing = draw([Dot(*percent)], marks, "per cent of the control's loss")
    return [Verdict("The pressure costs at most 2 % of the loss", word, evidence, drawing)]


def judge_writes(run: Run) -> list[Verdict]:
    layers = layer_differences(run)
    less = int((layers.high < 0).sum())
    more = int((layers.low > 0).sum())
    # A mean over layers would hide those that go the other way
    word = word_of(less == len(layers), more and not less)
    if less and less < len(layers):
        word = f"in {less} of {len(layers)} layers"
    claim = "What the heads write to the residual stream is less alike"
    evidence = f"{told_by_layer(layers)}; intervals corrected for {len(layers)} layers, one seed"
    dots = []
    for number, layer in layers.iterrows():
        # Left of 0: less alike under pressure
        dots.append(Dot(layer.difference, layer.low, layer.high, f"layer {number}"))
    unit = "sigma_resid, adaptive - control: left is less alike"
    drawing = draw(dots, [Mark(0, "no difference", True)], unit)
    return [Verdict(claim, word, evidence, drawing)]


def judge_saes(run: Run) -> list[Verdict]:
    """By a t interval of the difference between the arms; the layers are the units."""
    table = run.table("saes/sae_metrics.csv")
    _, table = kinds_of_saes(table)[0]  # of whole layers, where there are any: their L0 is alike
    # Like with like: two arms may have other settings
    pairs = ["layer", *[name for name in ("setting", "seed", "site") if name in table]]
    fvu = table.pivot_table(index=pairs, columns="run", values="fvu")  # [SAEs, arms]
    difference = (fvu["adaptive"] - fvu["control"]).dropna().groupby("layer").mean()
    claim = "Decorrelated heads are easier for sparse autoencoders"
    if len(difference) < 2:
        few = f"too few: {len(difference)} layer that both arms have"
        return [Verdict(claim, "cannot tell", few)]
    mean = difference.mean()  # below 0: fewer of the adaptive model's activations unexplained
    # Student's t: layers are few
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.sem()
    word = word_of(mean + half < 0, mean - half > 0)
    interval = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
    evidence = f"FVU adaptive - control {interval} over {len(difference)} layers, one seed"
    marks = [Mark(0, "no difference", True)]
    unit = "FVU, adaptive - control: left is easier"
    drawing = draw([Dot(mean, mean - half, mean + half)], marks, unit)
    return [Verdict(claim, word, evidence, drawing)]


def judge_heroes(run: Run) -> list[Verdict]:
    """One an arm."""
    verdicts = []
    for arm in first_heads(run).itertuples():
        claim = f"One head of the {arm.run} model stands out (a Hero Head)"
        evidence = f"{name_of(arm)} {impact_of_first(arm)}; {why_not_unique(arm)}"
        if math.isnan(arm.crossfit):  # none could have been found
            verdicts.append(Verdict(claim, "cannot tell", evidence))
            continue
        rows = [(arm.crossfit, arm.crossfit_lo, arm.crossfit_hi, name_of(arm))]
        rows.append((arm.gap, arm.gap_lo, arm.gap_hi, "its lead"))
        dots = []
        for value, low, high, label in rows:
            dots.append(Dot(1000 * value, 1000 * low, 1000 * high, label))
        unit = "rise of the loss without it, millinats a token"
        drawing = draw(dots, [Mark(0, "no effect, no lead", True)], unit)
        # A lead whose interval holds 0 is neither found nor ruled out
        word = word_of(arm.unique_hero, arm.gap_hi < 0)
        verdicts.append(Verdict(claim, word, evidence, drawing))
    return verdicts


def first_heads(run: Run) -> pd.DataFrame:
    """Rows of the summary: of each arm, under the mode that heads are ranked by."""
    summary = run.table("results_ablation_summary.csv")
    return summary[summary["mode"] == summary["ranked_by"]]


def name_of(arm: Any) -> str:
    return f"L{arm.hero_layer:.0f}H{arm.hero_head:.0f}"


def why_not_unique(arm: Any) -> str:
    """How far the first head leads, and if it does not stand out, what fails."""
    if math.isnan(arm.crossfit):
        return "so no head can be told from another"
    second = f"L{arm.second_layer:.0f}H{arm.second_head:.0f}"
    lead = f"{arm.gap:+.4f} [{arm.gap_lo:+.4f}, {arm.gap_hi:+.4f}] ahead of {second}"
    if arm.unique_hero:
        return lead
    return f"{lead}{what_fails(arm)}"


def what_fails(arm: Any) -> str:
    """The condition of a Hero Head that fails first, in the order in which one would ask."""
    if not arm.base_loss < arm.unigram_loss:
        return "; the model fails: it is worse than a unigram"
    if not arm.gap_lo > 0:
        return ", so another could as well be first"
    if not getattr(arm, "gap_elsewhere_lo", math.inf) > 0:
        return " in this text, but in other documents another could be first"
    if getattr(arm, "p_missed", 0.0) >= 0.05:
        dropped = f"one of {arm.n_dropped:.0f} heads dropped after {arm.n_screen:.0f} sequences"
        return f", but {dropped} may be larger"
    return ", but its effect is not told from chance among all heads"


def judge_alignment(run: Run) -> list[Verdict]:
    layers = run.table("energy_lens/layers.csv")  # a row a descent step
    preset = run.record("energy_lens")["arguments"]["preset"]
    n_aligned = int(layers.aligned.sum())
    n_eligible = int(layers.eligible.sum())
    claim = "Features of the Energy Transformer are aligned with its energy"
    evidence = f"{n_aligned} of {n_eligible} eligible features pass both nulls, preset {preset}"
    why = why_unaligned(run, preset, n_eligible)
    # What the old rule would pass if features were random directions
    n_random = layers.rule_false_directions.sum()
    dots = [Dot(n_aligned, label="pass both nulls")]
    dots.append(Dot(layers.rule_passes.sum(), label="pass |EFAS| > 0.1"))
    dots.append(Dot(round(n_random), label="random ones do"))
    marks = [Mark(0, "none", True), Mark(n_eligible, "all eligible", True)]
    drawing = draw(dots, marks, "features, and random directions in their place")
    # A model that has learned nothing says nothing about features
    if why:
        return [Verdict(claim, "cannot tell", f"{evidence}; {why}", drawing)]
    word = word_of(n_aligned > 0, n_aligned == 0)
    return [Verdict(claim, word, evidence, drawing)]


def why_unaligned(run: Run, preset: str, n_eligible: int) -> str:
    """Why a model cannot tell whether features are aligned; empty where it can."""
    # All that apply are said
    reasons = []
    if preset == "smoke":  # a check that it runs, on a model that has learned nothing
        reasons.append("too small to tell: python energy_lens_minimal.py")
    if (run.path / "energy_lens" / "models.csv").is_file():
        worth = model_worth(run.table("energy_lens/models.csv"))
        if worth.is_worse:
            reasons.append(f"it fails: {worth.told[0].lower()}{worth.told[1:]}")
    if not n_eligible:
        reasons.append("no feature fires often enough")
    return "; ".join(reasons)


def judge_seeds(run: Run) -> list[Verdict]:
    seed = run.record("adaptive")["arguments"]["seed"]
    claim = "Differences between the arms hold for other seeds"
    evidence = f"one training seed an arm ({seed}); make seeds trains others"
    return [Verdict(claim, "cannot tell", evidence)]


CLAIMS = [
    judge_control,
    judge_price,
    judge_writes,
    judge_saes,
    judge_heroes,
    judge_alignment,
    judge_seeds,
]


def verdict(run: Run) -> list[Verdict]:
    """What the original studies claim, as far as this run can say."""
    return [found for claim in CLAIMS for found in if_measured(claim, run)]


def if_measured(tell: Callable[[Run], list[Any]], run: Run) -> list[Any]:
    """What a function says of a run; nothing if the tables that it needs, or an arm, were not
    made."""
    try:
        return tell(run)
    except (OSError, KeyError):
        return []


# -------------------------------------------------------------------------- the first paragraph
def lead_control(run: Run) -> list[str]:
    """Did the loop hold?"""
    [found] = judge_control(run)
    held = run.held
    if found.word == "cannot tell":
        return [f"Whether the Homeostat holds sigma, this run cannot tell: {found.evidence}."]
    if found.word == "not supported":
        return [f"The Homeostat did not hold sigma at its setpoint {run.target:g}."]
    compared = ""
    if "control" in run.telemetry:
        free = after_settling(run.telemetry["control"], held) / held.mean / run.target
        compared = f"; without pressure it is {free:.2g} times that"
    held_at = f"held sigma, how alike the heads are, at its setpoint {run.target:g}"
    return [f"The Homeostat {held_at}{compared}."]


def lead_price(run: Run) -> list[str]:
    """What did it cost?"""
    relative = run.price.relative
    cost = f"{100 * relative.value:+.2f} % of the loss {run.price.interval}"
    if math.isnan(relative.low):
        return [f"What the pressure costs, this run cannot tell ({cost})."]
    if relative.low <= 0 <= relative.high:
        return [f"No cost of the pressure is told from zero ({cost})."]
    if relative.high < 0:
        return [f"The pressure lowered the loss ({cost})."]
    [found] = judge_price(run)
    # The same words as the verdict below it
    limits = {"supported": "below", "not supported": "above"}
    limit = limits.get(found.word, "which may be below or above")
    return [f"The pressure cost {cost}, {limit} the limit of 2 %."]


def lead_writes(run: Run) -> list[str]:
    """What became less alike?"""
    return [
        f"What its heads add to the residual stream is {told_by_layer(layer_differences(run))}."
    ]


def lead_hero(run: Run) -> list[str]:
    """Which head matters, and does it stand out?"""
    arms = first_heads(run)
    # A run without the adaptive arm has one all the same
    arm = next(arms[arms.run == "adaptive"].itertuples(), None) or next(arms.itertuples())
    name = name_of(arm)
    if math.isnan(arm.crossfit):
        return [f"Which head matters, {arm.n_unit} {units_of(arm)} are too few to tell."]
    cost = f"{arm.crossfit:+.4f} nats [{arm.crossfit_lo:+.4f}, {arm.crossfit_hi:+.4f}]"
    if not arm.crossfit_lo > 0:
        return [f"No head of the {arm.run} model is told to matter; first is {name}, {cost}."]
    on = "on text that had no part in choosing it"
    first = f"The head that the {arm.run} model can least do without is {name} ({cost}, {on})"
    if arm.unique_hero:
        return [f"{first}, and it stands out."]
    second = f"L{arm.second_layer:.0f}H{arm.second_head:.0f}"
    # It leads, but something else fails
    if arm.gap_lo > 0:
        return [f"{first}; whether it stands out cannot be told."]
    return [f"{first}; it cannot be told from the next, {second}."]


def lead_seeds(run: Run) -> list[str]:
    """For how many seeds?"""
    seed = run.record("adaptive")["arguments"]["seed"]
    return [f"All this is of one training seed ({seed}); another may give other numbers."]


LEAD = [lead_control, lead_price, lead_writes, lead_hero, lead_seeds]


def lead(run: Run) -> list[str]:
    """The first paragraph: what was found and how sure it is, as far as it was measured."""
    return [sentence for tell in LEAD for sentence in if_measured(tell, run)]


# ------------------------------------------------------------------------ what the page is made of
@dataclass
class Picture:
    """A picture that an address carries."""

    address: str  # data:image/webp
    width: int  # pixels, so that the page does not jump when it loads
    height: int


@dataclass
class Download:
    """A CSV that a click saves without a network; without an address it is too large for that."""

    name: str  # of the saved file; of the CSV where it is not in the page
    size: str  # with its unit
    address: str = ""


@dataclass
class Card:
    """An exhibit with its picture and data."""

    label: str  # its title, with the name of the run where there are several
    exhibit: Exhibit
    data: Download  # its CSV
    picture: Picture | None = None  # of an image that has no drawing beside it
    drawn: Path | None = None  # of one that has: it is drawn in the colours of the page


@dataclass
class GridCell:
    """The loss impact of one head."""

    millinats: str  # what the cell shows
    share: str  # of the largest impact of the mode, 0 to 1: how deep the cell is coloured
    tell: str  # what it says when it is pointed at


@dataclass
class GridTable:
    """The heads of one arm under one mode of ablation."""

    mode: str
    caption: str
    heads: list[int]  # the columns
    layers: dict[int, list[GridCell]]  # a cell a head


@dataclass
class Grid:
    """Impact of every head: a table an arm and mode, of which the page shows one mode."""

    id: str  # in the page
    modes: list[str]  # a button each
    tables: list[GridTable]


@dataclass
class SectionOfRun:
    """What a section shows of one run. `missing` says what is not there; then nothing else is."""

    run: str  # its name
    cards: list[Card] = field(default_factory=list)
    grid: Grid | None = None  # of the ablation section
    tokens: pd.DataFrame | None = None  # of the hero section
    missing: str = ""
    remedy: str = ""  # the command that makes it


@dataclass
class PageRun:
    """What the page says of a run as a whole."""

    path: Path
    lead: list[str]  # sentences
    links: list["Link"]
    verdicts: list[Verdict]
    setting: str  # data, seed, machine, versions
    commands: pd.DataFrame  # a row a part of the pipeline


@dataclass
class Link:
    """Another page about the run."""

    words: str
    address: str  # relative to this page


def data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def read_picture(path: Path) -> Picture:
    """A PNG as a lossless WebP: a third of the bytes."""
    webp = io.BytesIO()
    with Image.open(path) as image:
        width, height = image.size
        # Nothing is lost, so that quality is only the effort of packing
        image.convert("RGB").save(webp, "WEBP", lossless=True, quality=60)
    return Picture(data_address("image/webp", webp.getvalue()), width, height)


def read_download(path: Path) -> Download:
    content = path.read_bytes()
    name = path.name
    kind = "text/csv"
    if len(content) > COMPRESS_BYTES:
        content = gzip.compress(content, mtime=0)  # without the time: the same bytes always
        name = f"{path.name}.gz"  # the reader's browser saves it as it is
        kind = "application/gzip"
    if len(content) > EMBED_BYTES:
        return Download(str(path), f"{path.stat().st_size / 1e6:.1f} MB")
    return Download(name, f"{len(content) / 1e3:.0f} kB", data_address(kind, content))


def grid_table(run: Run, mode: str, arm: str, heads: pd.DataFrame, largest: float) -> GridTable:
    """`heads`: the rows of results_ablation.csv for one arm and mode; `largest`: impact, nats."""
    layers = {}
    for layer, of_layer in heads.groupby("layer"):
        cells = []  # a head each
        for row in of_layer.sort_values("head").to_dict("records"):
            # Each interval is of its head alone, not corrected for the other cells
            impact = f"{row['delta']:+.4f} nats"
            if not math.isnan(row["ci_lo"]):  # else too few documents for an interval
                impact += f" [{row['ci_lo']:+.4f}, {row['ci_hi']:+.4f}]"
            head = f"{run.name}, {arm}, {mode}: L{layer}H{row['head']}"
            cell = GridCell(
                millinats=f"{1000 * row['delta']:.1f}",
                share=f"{max(0.0, row['delta']) / largest:.3f}",
                tell=f"{head} {impact}, rank {row['rank']:.0f}",
            )
            cells.append(cell)
        layers[layer] = cells
    return GridTable(
        mode=mode,
        caption=f"{arm}, {mode} ablation: rise of the loss, millinats a token",
        heads=sorted(heads["head"].unique()),
        layers=layers,
    )


def impact_grid(run: Run, number: int) -> Grid:
    """`number` of the run in the page."""
    impacts = run.table("results_ablation.csv")  # a row an arm, mode and head
    modes = [mode for mode in MODES if (impacts["mode"] == mode).any()]
    tables = []
    # Of all modes, of which the page shows one at a time
    for mode in modes:
        of_mode = impacts[impacts["mode"] == mode]
        largest = max(of_mode.delta.max(), 1e-12)  # one colour scale for all arms
        for arm, heads in of_mode.groupby("run"):
            tables.append(grid_table(run, mode, arm, heads, largest))
    return Grid(f"grid{number}", modes, tables)


def hero_tokens(run: Run) -> pd.DataFrame:
    """The five tokens whose loss needs the hero most."""
    table = run.table("hero_analysis/hero_tokens.csv").head(5)  # the largest delta_nats first
    names = {
        "delta_nats": "loss without it, nats",
        "context": "text before",
        "next": "token",
        "attends_to": "the head attends to",
    }
    return table[list(names)].rename(columns=names)


def section_of_run(run: Run, number: int, section: Section, several: bool) -> SectionOfRun:
    """What a section shows of a run, the `number`-th of the page; `several`: it has others too."""
    shown = SectionOfRun(run.name)
    try:
        for exhibit in section.exhibits(run):
            label = f"{run.name}: {exhibit.title}" if several else exhibit.title
            # A picture that was drawn for pages takes their colours
            card = Card(label, exhibit, read_download(run.path / exhibit.csv))
            image = run.path / exhibit.image
            if exhibit.image and image.with_suffix(".narrow.svg").is_file():
                card.drawn = image
            elif exhibit.image:
                card.picture = read_picture(image)
            shown.cards.append(card)
        if section.exhibits is ablation:
            shown.grid = impact_grid(run, number)
        if section.exhibits is hero:
            shown.tokens = hero_tokens(run)
    # A file that is missing, a table without the column, without rows, or that is no CSV.
    except (OSError, KeyError, IndexError, ValueError) as error:
        remedy = f"{section.remedy} RUN={run.path}"
        return SectionOfRun(run.name, missing=what_is_missing(error), remedy=remedy)
    return shown


def what_is_missing(error: Exception) -> str:
    """What an error says, in words: of a file, of a column, or of a table that is no such table."""
    name = getattr(error, "filename", None)
    if name and not Path(name).exists():
        return f"{name} is missing"
    if isinstance(error, KeyError):
        return f"a table has no column {error}"
    return f"{name or 'a table'} cannot be used ({error})"


def records(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """What was run, in order of time: (part, its run.json), of every folder that has one."""
    found = []
    for path in run.path.rglob("run.json"):
        part = path.parent.relative_to(run.path).as_posix()
        found.append((part, run.record(part)))
    # The ablation shares its folder with others, who may have written a run.json after it
    scripts = [record["script"] for _, record in found]
    sidecar = run.path / "results_ablation.csv.json"
    if sidecar.is_file() and "ablation_test.py" not in scripts:
        found.append((".", json.loads(sidecar.read_text(encoding="utf-8"))["producer"]))
    named = []
    for part, record in found:
        is_ablation = record["script"] == "ablation_test.py"
        named.append(("ablation" if is_ablation else part, record))
    return sorted(named, key=lambda one: one[1]["time"])


def links(run: Run, page: Path) -> list[Link]:
    """The other pages about the run, of those that are there; `page`: where this one will be."""
    places = [
        ("The head that matters most, in detail", run.path / "hero_analysis" / "hero_report.html")
    ]
    for path in sorted((run.path / "saes").glob("**/features*.html")):
        part = path.parent.relative_to(run.path / "saes").as_posix()
        words = "Features of an SAE" if part == "." else f"Features of the SAE {part}"
        places.append((words, path))
    places.append(
        ("The energy model, in detail", run.path / "energy_lens" / "research_report.html")
    )
    found = []
    for words, path in places:
        # Pages are written by other tools, some of them on demand
        if path.is_file():
            address = os.path.relpath(path.resolve(), page.resolve().parent)
            found.append(Link(words, quote(Path(address).as_posix())))
    return found


def commands_table(run: Run) -> pd.DataFrame:
    """Command, time and commit of each part that was run."""
    rows = []
    for name, record in records(run):
        seconds = float("nan")
        if record.get("end"):  # else it was interrupted
            took = pd.Timestamp(record["end"]) - pd.Timestamp(record["time"])
            seconds = took.total_seconds()
        commit = record["git"]["commit"][:10] or "no repository"
        if record["git"]["dirty"]:
            commit += " + edits"
        rows.append(
            {
                "part": name,
                "command": shlex.join(record["argv"]),
                "seconds": "" if math.isnan(seconds) else f"{seconds:.0f}",
                "commit": commit,
                "exit": record.get("exit_status", ""),
            }
        )
    return pd.DataFrame(rows)


def describe_setting(run: Run) -> str:
    """Data, seed, machine and versions of the training."""
    record = run.record("adaptive")
    arguments = record["arguments"]
    hardware = record["hardware"]
    versions = record["versions"]
    tokens = run.telemetry["adaptive"].tokens.iloc[-1]
    return (
        f"{run.path}: {tokens:,.0f} training tokens of {arguments['dataset']} an arm, "
        f"seed {arguments['seed']}, on {hardware['machine']}, {hardware['cpus']} CPUs, "
        f"{hardware['gpu'] or 'no GPU'}; "
        f"Python {versions['python']}, torch {versions['torch']}."
    )


def headline_table(runs: list[Run]) -> pd.DataFrame:
    """The numbers of tools/headlines.py, a column a run."""
    columns = {}
    for run in runs:
        try:
            columns[run.name] = run.table("headlines.csv").set_index("what")["number"]
        except OSError:  # the last step of `make demo`, which a smaller run leaves out
            command = f"python tools/headlines.py {run.path}"
            columns[run.name] = pd.Series({"headlines": f"not computed; {command}"})
    return pd.DataFrame(columns).fillna("").rename_axis("what").reset_index()


def show(value: Any) -> str:
    """A value of a table: three significant digits, nothing where there is none."""
    if isinstance(value, float):
        return "" if pd.isna(value) else three_digits(value)
    return str(value)


def render(runs: list[Run], page: Path) -> str:
    """The page, to be written to the path `page`. The template escapes whatever comes from a file:
    a token is never markup."""
    # What is said once a run, above the figures
    page_runs = []
    for run in runs:
        said = PageRun(
            path=run.path,
            lead=lead(run),
            links=links(run, page),
            verdicts=verdict(run),
            setting=describe_setting(run),
            commands=commands_table(run),
        )
        page_runs.append(said)
    # The figures: a section holds those of all runs, side by side
    sections = []  # (section, what it shows of each run)
    for section in SECTIONS:
        parts = []
        for number, run in enumerate(runs):
            parts.append(section_of_run(run, number, section, several=len(runs) > 1))
        sections.append((section, parts))
    return render_page(
        "report.html",
        title="Results of " + " and ".join(run.name for run in runs),
        runs=page_runs,
        headlines=headline_table(runs),
        sections=sections,
        show=show,
    )


# ---------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=" ".join((__doc__ or "").partition("\n\n")[0].split()),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("runs/demo")],
        help="folders of finished pipelines, side by side",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/report.html"),
        help="the page; replaced if it is there",
    )
    return parser.parse_args(argv)


def write_page(args: argparse.Namespace) -> int:
    page = render([Run(path) for path in args.runs], args.out)
    megabytes = len(page) / 1e6
    if len(page) > MAX_BYTES:
        advice = f"with fewer --runs it stays below {MAX_BYTES / 1e6:.0f}"
        print(f"the page has {megabytes:.1f} MB; {advice}", file=sys.stderr)
    with atomic(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: write_page(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""One page about one or more finished pipelines: what was run, what came out, and what that
supports.

    python tools/report.py --runs runs/demo             # `make report`; the end of `make demo`
    python tools/report.py --runs runs/demo runs/mine   # two runs side by side

Reads   each folder as `make demo` leaves it: run.json, CSVs and figures. What is missing is named,
        with the command that makes it; the template pages/report.html
Writes  --out (results/report.html), one HTML file that needs no network; every figure with its
        reading, n, interval, null, command and CSV

Nothing is computed again: the figures are those of the phases, and each sentence states numbers of
their CSVs.
"""

import argparse
import base64
import gzip
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image
from scipy import stats

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
from headlines import Tracking, tracking  # noqa: E402

from hero_head_analysis import render_page  # noqa: E402
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
PARTS = [  # folders with a run.json, in the order in which they are made
    "adaptive",
    "control",
    "activations/adaptive",
    "activations/control",
    "saes/adaptive",
    "saes/control",
    "saes",  # where several runs were given to one command
    ".",  # the ablation, whose CSV lies in the folder of the run
    "energy_lens",
    "hero_analysis",
]
BOOTSTRAP = "95 % over documents (bootstrap-t, at least Student's t), Bonferroni within the table"


@dataclass
class Exhibit:
    """A figure of one run, and what a reader needs to judge it."""

    title: str  # as the paper numbers it
    image: str  # paths are relative to the run's folder
    csv: str  # what the figure is drawn from, and the numbers of `reading` are taken from
    reading: str  # what it shows in this run, in numbers of the CSV
    n: str  # of what is the unit of the interval
    interval: str  # its level, method and correction, or why there is none
    null: str  # what it would look like if there were nothing to see
    command: str  # that draws it again


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

    def last(self, arm: str, column: str) -> float:
        """The last value of a column of the telemetry that is only filled now and then."""
        return float(self.telemetry[arm][column].dropna().iloc[-1])


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
        title="The control loop",
        image="training.png",
        csv="adaptive/telemetry.csv",
        reading=f"{loop}; whole validation split at the end: {', '.join(ends)}.",
        n=f"one training run an arm, seed {seed}",
        interval="none: one run; ± is over samples in time",
        null="the control arm, without pressure",
        command=f"{redraw} --save_dir {run.path} --target_sigma {run.target:g}",
    )
    return [exhibit]


def topology(run: Run) -> list[Exhibit]:
    arms = [arm for arm in run.telemetry if (run.path / "activations" / arm).is_dir()]
    tables = [run.table(f"activations/{arm}/topology_stats.csv") for arm in arms]
    # Of the residual writes: unlike z, they do not depend on the basis of a head's values.
    sigma = pd.concat(tables).query("metric == 'sigma_resid'")
    parts = []
    # Layers are not replicates: their span is shown instead of an interval of the mean.
    for arm, layers in sigma.groupby("run"):  # a row a layer
        span = f"layers {layers.value.min():.4f} to {layers.value.max():.4f}"
        null = f"bases turned at random: {layers.null_mean.mean():.4f}"
        parts.append(f"{arm}: {layers.value.mean():.4f} ({span}; {null})")
    # In words: the page is read without METRICS.md
    what = "Mean absolute cosine between what the heads write (sigma_resid), mean over layers. "
    # The smallest of the arms and layers, so that no n is overstated
    n_windows = int(sigma.n_windows.min())
    n_documents = int(sigma.n_documents.min())
    n_tokens = int(sigma.n_tokens.min())
    redraw = "python harvest_activations.py --redraw --run_name adaptive"  # needs no model
    exhibit = Exhibit(
        title="Figure 1: head-by-head cosines",
        image="activations/adaptive/figure1_head_cosines.png",
        csv="activations/adaptive/topology_stats.csv",
        reading=what + "; ".join(parts) + ".",
        n=f"{n_windows:,} windows of {n_documents:,} documents, {n_tokens:,} tokens a layer",
        interval="95 % jackknife over blocks of documents (topology_stats.csv)",
        null="the basis of every head turned at random, independently (null_* of the CSV)",
        command=f"{redraw} --save_dir {run.path}/activations --compare control adaptive",
    )
    return [exhibit]


def saes(run: Run) -> list[Exhibit]:
    table = run.table("saes/sae_metrics.csv")  # a row an SAE: arm and layer
    # What an SAE does not explain, and the latents that it pays for in vain
    unexplained = []
    dead = []
    for arm, layers in table.groupby("run"):
        span = f"layers {layers.fvu.min():.3f} to {layers.fvu.max():.3f}"
        unexplained.append(f"{arm} {layers.fvu.mean():.3f} ({span}), L0 {layers.l0.mean():.1f}")
        dead.append(f"{arm} {layers.dead_share.mean():.1%}")
    n = (
        f"{len(table)} SAEs on {int(table.n_windows.min()):,} windows "
        f"of {int(table.n_documents.min()):,} held-out documents"
    )
    on_tokens = int(table.dead_share_tokens.min())  # on more tokens, more latents fire
    command = f"python train_sae.py --redraw --save_dir {run.path}/saes"
    by_depth = Exhibit(
        title="Figure 2: L0 and FVU by depth",
        image="saes/figure2_l0_by_depth.png",
        csv="saes/sae_metrics.csv",
        reading=f"Unexplained variance: {'; '.join(unexplained)}.",
        n=n,
        interval="95 % over documents",
        null="zero and mean ablation of the same activations (ce_recovered_* in the CSV)",
        command=command,
    )
    how_often = Exhibit(
        title="Figure 3: how often latents fire",
        image="saes/figure3_activation_frequency.png",
        csv="saes/sae_metrics.csv",
        reading=f"Latents that never fire on {on_tokens:,} mixed tokens: {', '.join(dead)}.",
        n=n,
        interval="none",
        null="none: a description",
        command=command,
    )
    return [by_depth, how_often]


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
        title="Figure 4: what removing each head costs",
        image="results_ablation_figure4.png",
        csv="results_ablation.csv",
        reading="; ".join(parts) + ".",
        n=f"{arm.n_unit} {units_of(arm)}, every head",
        interval=f"95 % over {units_of(arm)}, with the first head chosen again",
        null=f"{no_effect}; first head chosen on one half of them, measured on the other",
        command=f"python ablation_test.py --redraw {run.path}/results_ablation.csv",
    )
    return [exhibit]


def scores_outside_null(run: Run) -> str:
    """The hero's three scores that are furthest from their null, of those told from it."""
    scores = run.table("hero_analysis/hero_scores.csv").query("role == 'hero'")
    # Told from the null: the interval of value - null, window by window, leaves out 0
    outside = scores[(scores.above_null_low > 0) | (scores.above_null_high < 0)]
    gap = (outside.value - outside.null).abs()
    furthest = outside.assign(gap=gap).sort_values("gap").tail(3)[::-1]
    told = [f"{row.score} {row.value:.3g} (null {row.null:.3g})" for row in furthest.itertuples()]
    return ", ".join(told) or "none is told from it"


def share_explained(best: pd.Series, preserving: pd.DataFrame, name: str) -> str:
    """What keeping the best described part of the head keeps of its impact, beside chance."""
    if best.impact_low <= 0 <= best.impact_high:  # a share of what may be nothing
        vague = f"The loss impact of {name} is not told from 0 on these sequences"
        return f"{vague}, so shares of it mean nothing."
    # As many keys or features, drawn at random: what keeping anything would keep
    matched = preserving[preserving.kind == "matched-random"].set_index("mechanism").value
    at_random = matched.get(best.mechanism, float("nan"))
    # The interval is corrected for the number of mechanisms tried
    share = f"{best.value:.0%} [{best.ci_low:.0%}, {best.ci_high:.0%}]"
    kept = f"Keeping only “{best.mechanism}” keeps {share} of the loss impact of {name}"
    return f"{kept}; as many at random {at_random:.0%}."


def hero(run: Run) -> list[Exhibit]:
    folder = "hero_analysis"
    head = run.record(folder).get("hero") or {}
    name = f"L{head.get('layer')}H{head.get('head')} of {head.get('run')}"
    # A row a mechanism: the share of the hero's impact that is kept when only it may vary.
    preserving = run.table(f"{folder}/hero_preserving.csv").query("role == 'hero'")
    best = preserving[preserving.kind == "claimed"].sort_values("value").iloc[-1]
    impact = run.table(f"{folder}/hero_impact.csv").iloc[0]  # the hero; then its controls
    cost = f"{impact.value:.4f} nats a token [{impact.ci_low:.4f}, {impact.ci_high:.4f}]"
    attention = f"Attention of {name} on the text of the command"
    n = f"{best.sequences:.0f} sequences of {best.n:.0f} documents of the {best.split} split"
    command = f"python hero_head_analysis.py --redraw --save_dir {run.path}/{folder}"
    where = Exhibit(
        title="Where the hero sits",
        image=f"{folder}/hero_importance.png",
        csv=f"{folder}/hero_importance.csv",
        reading=f"{name}: its mean ablation costs {cost}.",
        n=n,
        interval=BOOTSTRAP,
        null="matched and random heads of the same model, in hero_impact.csv",
        command=command,
    )
    looks_at = Exhibit(
        title="What it looks at, in one text",
        image=f"{folder}/hero_attention.png",
        csv=f"{folder}/hero_attention.csv",
        reading=f"{attention}, beside its functional match in the other arm.",
        n="one text",
        interval="none",
        null="none: an illustration",
        command=command,
    )
    kind = Exhibit(
        title="What kind of head it is",
        image=f"{folder}/hero_scores.png",
        csv=f"{folder}/hero_scores.csv",
        reading=f"Scores furthest from their null: {scores_outside_null(run)}.",
        n=n,
        interval=BOOTSTRAP,
        null="the same score with tokens shuffled",
        command=command,
    )
    explained = Exhibit(
        title="How much of it is explained",
        image=f"{folder}/hero_preserving.png",
        csv=f"{folder}/hero_preserving.csv",
        reading=share_explained(best, preserving, name),
        n=n,
        interval=BOOTSTRAP,
        null="as many keys or features, drawn at random (grey)",
        command=command,
    )
    return [where, looks_at, kind, explained]


def efas(run: Run) -> list[Exhibit]:
    folder = "energy_lens"
    layers = run.table(f"{folder}/layers.csv")  # a row a descent step
    preset = run.record(folder)["arguments"]["preset"]
    untrained = run.table(f"{folder}/untrained.csv").iloc[0]  # the same model before training
    sequences = f"{int(layers.n_seq.iloc[0])} held-out sequences, one a document"
    n = f"{sequences}; preset {preset}, one seed"
    save = f"--save_dir {run.path}/{folder} --overwrite"
    command = f"python energy_lens_minimal.py --preset {preset} {save}"
    against_nulls = Exhibit(
        title="EFAS against its nulls",
        image=f"{folder}/efas_distribution.png",
        csv=f"{folder}/features.csv",
        reading=(
            f"{int(layers.aligned.sum())} of {int(layers.eligible.sum())} eligible features are "
            f"aligned; |EFAS| > 0.1 alone passes {int(layers.rule_passes.sum())}, "
            f"{layers.rule_false_directions.sum():.0f} expected of random directions; "
            f"untrained model: {int(untrained.aligned)} of {int(untrained.eligible)}."
        ),
        n=n,
        interval="95 % bootstrap over sequences (layers.csv)",
        null=(
            "whole sequences permuted, and random directions with the states' covariance; "
            "false discovery rate 5 % over all layers"
        ),
        command=command,
    )
    # A row a predictor, dose (eps) and scale: Spearman with what the intervention did.
    predictors = run.table(f"{folder}/predictors.csv")
    small = predictors[
        (predictors.scale == "signed") & predictors.predictor.isin(["attribution_a", "efas_a"])
    ]
    # The smallest intervention: only there is a first-order prediction meant to hold.
    small = small[small.eps == small.eps.min()]
    if small.empty:  # too few features for an intervention
        return [against_nulls]
    told = []
    for row in small.itertuples():
        told.append(f"{row.predictor} {row.spearman:.2f} [{row.ci_lo:.2f}, {row.ci_hi:.2f}]")
    predicts = Exhibit(
        title="Does it predict an intervention?",
        image=f"{folder}/predicted_actual.png",
        csv=f"{folder}/predictors.csv",
        reading=f"Spearman with the energy change of a small ablation: {'; '.join(told)}.",
        n=f"{int(small.n_features.iloc[0])} features, {n}",
        interval="95 % jackknife over sequences and clusters of features",
        null="a random predictor (same CSV)",
        command=command,
    )
    return [against_nulls, predicts]


class Section(NamedTuple):
    """A section of the page."""

    heading: str
    exhibits: Callable[[Run], list[Exhibit]]
    remedy: str  # the command that makes what is missing

    @property
    def id(self) -> str:
        """Its name in an address."""
        return re.sub(r"\W+", "-", self.heading.lower())


SECTIONS = [
    Section("Training and control loop", training, "make train figures"),
    Section("Topology of the heads", topology, "make harvest figures"),
    Section("Sparse autoencoders", saes, "make sae figures"),
    Section("Ablation", ablation, "make ablate"),
    Section("The hero", hero, "make hero"),
    Section("EFAS", efas, "make energy"),
]


# -------------------------------------------------------------------------------- the verdict
class Verdict(NamedTuple):
    """A claim of the original studies, and what one run says about it."""

    claim: str
    word: str  # supported | not supported | not told
    evidence: str


def judge(claim: str, holds: bool, evidence: str) -> Verdict:
    return Verdict(claim, "supported" if holds else "not supported", evidence)


def judge_control(run: Run) -> list[Verdict]:
    held = run.held
    claim = "The Homeostat holds sigma within 10 % of its setpoint for 90 % of the time"
    evidence = (
        f"{held.share:.0%} of {held.n} filtered samples, one run; "
        f"noise alone would give {held.noise_share:.0%}, so this is about their mean"
    )
    return [judge(f"{claim} after settling", held.share >= 0.9, evidence)]


def judge_loss(run: Run) -> list[Verdict]:
    change = run.last("adaptive", "val_loss") / run.last("control", "val_loss") - 1
    evidence = f"{change:+.2%} on the validation split, one seed an arm"
    return [judge("The pressure costs at most 2 % of the loss", change <= 0.02, evidence)]


def judge_writes(run: Run) -> list[Verdict]:
    control = run.last("control", "val_sigma_resid")
    adaptive = run.last("adaptive", "val_sigma_resid")
    claim = "What the heads write is less alike too (sigma_resid, which no change of basis moves)"
    numbers = f"adaptive {adaptive:.4f}, control {control:.4f}"
    evidence = f"{numbers}; one seed an arm, so a description of these two models"
    return [judge(claim, adaptive < control, evidence)]


def judge_saes(run: Run) -> list[Verdict]:
    """By a t interval of the difference between the arms; the layers are the units."""
    table = run.table("saes/sae_metrics.csv")
    fvu = table.pivot_table(index="layer", columns="run", values="fvu")  # [layers, arms]
    difference = fvu["adaptive"] - fvu["control"]
    mean = difference.mean()  # below 0: fewer of the adaptive model's activations unexplained
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.sem()
    claim = "Decorrelated heads are easier for sparse autoencoders"
    interval = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
    layers = f"over {len(difference)} layers of one model an arm"
    evidence = f"FVU adaptive - control {interval} {layers}"
    if not abs(mean) > half:  # also where one layer has no interval
        return [Verdict(claim, "not told", evidence)]
    return [judge(claim, mean < 0, evidence)]


def judge_heroes(run: Run) -> list[Verdict]:
    """One an arm."""
    summary = run.table("results_ablation_summary.csv")
    verdicts = []
    for arm in summary[summary["mode"] == summary["ranked_by"]].itertuples():
        head = f"L{arm.hero_layer:.0f}H{arm.hero_head:.0f}"
        claim = f"The {arm.run} model has a Hero Head"
        evidence = f"{head} {impact_of_first(arm)}"
        if math.isnan(arm.crossfit):  # none could have been found
            verdicts.append(Verdict(claim, "not told", evidence))
            continue
        gap = f"{arm.gap:.4f} [{arm.gap_lo:+.4f}, {arm.gap_hi:+.4f}] ahead of the second"
        verdicts.append(judge(claim, arm.unique_hero, f"{evidence}, {gap}"))
    return verdicts


def judge_alignment(run: Run) -> list[Verdict]:
    layers = run.table("energy_lens/layers.csv")  # a row a descent step
    preset = run.record("energy_lens")["arguments"]["preset"]
    n_aligned = int(layers.aligned.sum())
    n_eligible = int(layers.eligible.sum())
    claim = "Features of the Energy Transformer are aligned with its energy"
    evidence = f"{n_aligned} of {n_eligible} eligible pass both nulls, preset {preset}"
    if layers.fewest.notna().any():  # none without an eligible feature
        evidence += f"; no fewer than {layers.fewest.max():.0f} could have passed"
    if preset == "smoke":  # a check that it runs, on a model that has learned nothing
        remedy = "python energy_lens_minimal.py"
        return [Verdict(claim, "not told", f"{evidence}, which is too small to tell: {remedy}")]
    return [judge(claim, n_aligned > 0, evidence)]


def judge_seeds(run: Run) -> list[Verdict]:  # noqa: ARG001 -- no run can say it
    claim = "Differences between the arms hold for other seeds"
    evidence = "one training seed an arm"
    return [Verdict(claim, "not told", evidence)]


CLAIMS = [
    judge_control,
    judge_loss,
    judge_writes,
    judge_saes,
    judge_heroes,
    judge_alignment,
    judge_seeds,
]


def verdict(run: Run) -> list[Verdict]:
    """What the original studies claim, as far as this run can say."""
    verdicts = []
    for claim in CLAIMS:
        try:
            verdicts += claim(run)
        except (OSError, KeyError):  # the tables that it needs, or an arm, were not made
            continue
    return verdicts


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
    picture: Picture
    data: Download  # its CSV


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
    verdicts: list[Verdict]
    setting: str  # data, seed, machine, versions
    commands: pd.DataFrame  # a row a part of the pipeline


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
    """The ten tokens whose loss needs the hero most."""
    table = run.table("hero_analysis/hero_tokens.csv").head(10)  # the largest delta_nats first
    return table[["delta_nats", "context", "next", "attends_to"]]


def section_of_run(run: Run, number: int, section: Section, several: bool) -> SectionOfRun:
    """What a section shows of a run, the `number`-th of the page; `several`: it has others too."""
    shown = SectionOfRun(run.name)
    try:
        for exhibit in section.exhibits(run):
            label = f"{run.name}: {exhibit.title}" if several else exhibit.title
            picture = read_picture(run.path / exhibit.image)
            data = read_download(run.path / exhibit.csv)
            shown.cards.append(Card(label, exhibit, picture, data))
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


def commands_table(run: Run) -> pd.DataFrame:
    """Command, time and commit of each part that was run."""
    rows = []
    for part in PARTS:
        try:
            record = run.record(part)
        except (OSError, ValueError):  # this part was not run
            continue
        seconds = float("nan")
        if record.get("end"):  # else it was interrupted
            took = pd.Timestamp(record["end"]) - pd.Timestamp(record["time"])
            seconds = took.total_seconds()
        commit = record["git"]["commit"][:10] or "no repository"
        if record["git"]["dirty"]:
            commit += " + edits"
        # Other scripts may have written there too: the record says which it was
        name = "ablation" if record["script"] == "ablation_test.py" else part
        rows.append(
            {
                "part": name,
                "command": shlex.join(record["argv"]),
                "seconds": f"{seconds:.0f}",
                "commit": commit,
                "exit": record["exit_status"],
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
    """A value of a table: four significant digits, nothing where there is none."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def render(runs: list[Run]) -> str:
    """The page. The template escapes whatever comes from a file: a token is never markup."""
    # What is said once a run, above the figures
    page_runs = []
    for run in runs:
        page_runs.append(
            PageRun(run.path, verdict(run), describe_setting(run), commands_table(run))
        )
    # The figures: a section holds those of all runs, side by side
    sections = []  # (section, what it shows of each run)
    for section in SECTIONS:
        parts = []
        for number, run in enumerate(runs):
            parts.append(section_of_run(run, number, section, several=len(runs) > 1))
        sections.append((section, parts))
    return render_page(
        "report.html",
        title="Janus Arc and Energy-Lens: " + " beside ".join(run.name for run in runs),
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
    page = render([Run(path) for path in args.runs])
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

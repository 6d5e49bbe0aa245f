#!/usr/bin/env python3
"""One page about one or more finished pipelines: what was run, what came out, and what that supports.

    python tools/report.py --runs runs/demo                  # results/report.html; `make report`, and the end of `make demo`
    python tools/report.py --runs runs/demo runs/mine        # two runs side by side

Reads   each folder as `make demo` leaves it: run.json, CSVs and figures. What is missing is named, with the command that makes it
Writes  --out, one HTML file that needs no network; every figure with its reading, n, interval, null, command and CSV

Nothing is computed again: the figures are those of the phases, and each sentence states numbers of their CSVs.
"""

import argparse
import base64
import gzip
import html
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from scipy import stats

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from headlines import tracking  # noqa: E402

from janus_adaptive import HandoffError, atomic, one_line_errors, read_telemetry  # noqa: E402

MAX_BYTES = 5_000_000  # of the page
BIG_CSV, MAX_CSV = 300_000, 400_000  # bytes: from here on a CSV is embedded compressed; is only named if it still has more
ARMS = ("adaptive", "control")
MODES = ("mean", "zero", "resample")


@dataclass
class Exhibit:
    """A figure of one run, and what a reader needs to judge it."""

    title: str
    image: str  # paths are relative to the run's folder
    csv: str
    reading: str
    n: str
    interval: str
    null: str
    command: str


class Run:
    """The folder of one pipeline, and what lies in it. A missing table raises FileNotFoundError."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        if not (path / "adaptive" / "telemetry.csv").is_file():
            raise HandoffError(f"{path} has no adaptive/telemetry.csv; expected the folder of a pipeline: make demo RUN={path}")

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.path / name)

    def record(self, name: str) -> dict[str, Any]:
        path = self.path / name / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise HandoffError(f"{path} is not JSON: damaged; the phase that wrote it writes it anew") from None

    @cached_property
    def telemetry(self) -> dict[str, pd.DataFrame]:
        arms = [arm for arm in ARMS if (self.path / arm / "telemetry.csv").is_file()]
        return {arm: read_telemetry(self.path / arm / "telemetry.csv") for arm in arms}

    @cached_property
    def target(self) -> float:
        return float(self.record("adaptive")["arguments"]["target_sigma"])

    def last(self, arm: str, column: str) -> float:
        return float(self.telemetry[arm][column].dropna().iloc[-1])


# ------------------------------------------------------------------------------------- the sections, from the CSVs
def training(r: Run) -> list[Exhibit]:
    held, seed = tracking(r.telemetry["adaptive"], r.target), r.record("adaptive")["arguments"]["seed"]
    loop = (
        f"From step {held['settled_step']:.0f} on the filtered sigma is {held['mean']:.3f} ± {held['sd']:.3f} of its setpoint "
        f"{r.target:g}, within 10 % at {held['share']:.0%} of {held['n']} samples"
        if held["n"]
        else f"The filtered sigma never came within 10 % of its setpoint {r.target:g} while the loop was closed"
    )
    ends = (f"{arm} sigma {r.last(arm, 'val_sigma_z'):.4f}, loss {r.last(arm, 'val_loss'):.4f}" for arm in r.telemetry)
    reading = f"{loop}; whole validation split at the end: {', '.join(ends)}."
    arms = " ".join(f"{r.path}/{arm}/telemetry.csv" for arm in r.telemetry)
    command = f"python janus_adaptive.py --redraw {arms} --save_dir {r.path} --target_sigma {r.target:g}"
    n = f"one training run an arm, seed {seed}"
    return [
        Exhibit("The control loop", "training.png", "adaptive/telemetry.csv", reading, n, "none: one run; ± is over samples in time",
                "the control arm, without pressure", command)
    ]  # fmt: skip


def topology(r: Run) -> list[Exhibit]:
    arms = [arm for arm in r.telemetry if (r.path / "activations" / arm).is_dir()]
    t = pd.concat([r.table(f"activations/{arm}/topology_stats.csv") for arm in arms]).query("metric == 'sigma_resid'")
    parts = [
        f"{run}: {g.value.mean():.4f} (layers {g.value.min():.4f} to {g.value.max():.4f}; bases turned at random: {g.null_mean.mean():.4f})"
        for run, g in t.groupby("run")
    ]
    n = f"{int(t.n_windows.min()):,} windows, {int(t.n_tokens.min()):,} tokens a layer"
    command = f"python harvest_activations.py --redraw --run_name adaptive --save_dir {r.path}/activations --compare control adaptive"
    reading = "Mean absolute cosine between what the heads write (sigma_resid), mean over layers. " + "; ".join(parts) + "."
    null = "the basis of every head turned at random, independently (null_* of the CSV)"
    interval = "95 % jackknife over blocks of windows (topology_stats.csv)"
    return [
        Exhibit("Figure 1: head-by-head cosines", "activations/adaptive/figure1_head_cosines.png",
                "activations/adaptive/topology_stats.csv", reading, n, interval, null, command)
    ]  # fmt: skip


def saes(r: Run) -> list[Exhibit]:
    t = r.table("saes/sae_metrics.csv")
    parts = [
        f"{run} {g.fvu.mean():.3f} (layers {g.fvu.min():.3f} to {g.fvu.max():.3f}), L0 {g.l0.mean():.1f}" for run, g in t.groupby("run")
    ]
    dead = ", ".join(f"{run} {g.dead_share_eval.mean():.1%}" for run, g in t.groupby("run"))
    n = f"{len(t)} SAEs on {int(t.n_windows.min()):,} held-out windows"
    interval, command = "95 % bootstrap over windows", f"python train_sae.py --redraw --save_dir {r.path}/saes"
    null = "zero and mean ablation of the same activations (ce_recovered_* in the CSV)"
    return [
        Exhibit("Figure 2: L0 and FVU by depth", "saes/figure2_l0_by_depth.png", "saes/sae_metrics.csv",
                f"Unexplained variance: {'; '.join(parts)}.", n, interval, null, command),
        Exhibit("Figure 3: how often latents fire", "saes/figure3_activation_frequency.png", "saes/sae_metrics.csv",
                f"Latents that never fire on the held-out tokens: {dead}.", n, "none", "none: a description", command),
    ]  # fmt: skip


def ablation(r: Run) -> list[Exhibit]:
    s = r.table("results_ablation_summary.csv")
    s = s[s["mode"] == s["ranked_by"]]
    parts = [
        f"{x.run}: {'the unique hero is' if x.unique_hero else 'no unique hero, first is'} L{x.hero_layer:.0f}H{x.hero_head:.0f}, "
        f"{x.crossfit:+.4f} nats [{x.crossfit_lo:+.4f}, {x.crossfit_hi:+.4f}], first in {x.p_top1:.0%} of bootstrap draws"
        for x in s.itertuples()
    ]
    n, command = f"{s.n_seq.iloc[0]:.0f} sequences, every head", f"python ablation_test.py --redraw {r.path}/results_ablation.csv"
    null = "no effect of any head (max-T over all heads); hero chosen on one half of the sequences, measured on the other"
    interval = "95 % paired bootstrap over sequences"
    return [
        Exhibit("Figure 4: what removing each head costs", "results_ablation_figure4.png", "results_ablation.csv",
                "; ".join(parts) + ".", n, interval, null, command)
    ]  # fmt: skip


def hero(r: Run) -> list[Exhibit]:
    folder, who = "hero_analysis", r.record("hero_analysis").get("hero") or {}
    name = f"L{who.get('layer')}H{who.get('head')} of {who.get('run')}"
    command = f"python hero_head_analysis.py --redraw --save_dir {r.path}/{folder}"
    parts = r.table(f"{folder}/hero_preserving.csv").query("role == 'hero'")
    claimed = parts[parts.kind == "claimed"].sort_values("value")
    chance = parts[parts.kind == "matched-random"].set_index("mechanism").value
    best = claimed.iloc[-1]
    random = chance.get(best.mechanism, float("nan"))
    kept = (
        f"Keeping only “{best.mechanism}” keeps {best.value:.0%} [{best.ci_low:.0%}, {best.ci_high:.0%}] of the loss impact of {name}; "
        f"as many at random {random:.0%}."
    )
    if best.impact_low <= 0 <= best.impact_high:
        kept = f"The loss impact of {name} is not told from 0 on these sequences, so shares of it mean nothing."
    impact = r.table(f"{folder}/hero_impact.csv").iloc[0]
    scores = r.table(f"{folder}/hero_scores.csv").query("role == 'hero'")
    outside = scores[(scores.null < scores.ci_low) | (scores.null > scores.ci_high)]
    top = outside.assign(gap=(outside.value - outside.null).abs()).sort_values("gap").tail(3)
    told = ", ".join(f"{x.score} {x.value:.3g} (null {x.null:.3g})" for x in top[::-1].itertuples()) or "none is told from it"
    n = f"{best.n:.0f} sequences"
    boot = "95 % bootstrap over sequences, Bonferroni within the table"
    return [
        Exhibit("Where the hero sits", f"{folder}/hero_importance.png", f"{folder}/hero_importance.csv",
                f"{name}: its mean ablation costs {impact.value:.4f} nats a token [{impact.ci_low:.4f}, {impact.ci_high:.4f}].", n, boot,
                "matched and random heads of the same model, in hero_impact.csv", command),
        Exhibit("What it looks at, in one text", f"{folder}/hero_attention.png", f"{folder}/hero_attention.csv",
                f"Attention of {name} on the text of the command, beside its functional match in the other arm.", "one text", "none",
                "none: an illustration", command),
        Exhibit("What kind of head it is", f"{folder}/hero_scores.png", f"{folder}/hero_scores.csv",
                f"Scores furthest from their null: {told}.", n, boot, "the same score with tokens shuffled", command),
        Exhibit("How much of it is explained", f"{folder}/hero_preserving.png", f"{folder}/hero_preserving.csv", kept, n, boot,
                "as many keys or features, drawn at random (grey)", command),
    ]  # fmt: skip


def efas(r: Run) -> list[Exhibit]:
    folder, f = "energy_lens", r.table("energy_lens/layers.csv")
    record = r.record(folder)["arguments"]
    untrained, p = r.table(f"{folder}/untrained.csv").iloc[0], r.table(f"{folder}/predictors.csv")
    command = f"python energy_lens_minimal.py --preset {record['preset']} --save_dir {r.path}/{folder} --overwrite"
    n = f"{int(f.n_seq.iloc[0])} held-out sequences, one a document; preset {record['preset']}, one seed"
    reading = (
        f"{int(f.aligned.sum())} of {int(f.eligible.sum())} eligible features are aligned; |EFAS| > 0.1 alone passes "
        f"{int(f.rule_passes.sum())}, {f.rule_false_directions.sum():.0f} expected of random directions; "
        f"untrained model: {int(untrained.aligned)} of {int(untrained.eligible)}."
    )
    null = "whole sequences permuted, and random directions with the states' covariance; false discovery rate 5 % over all layers"
    small = p[(p.scale == "signed") & p.predictor.isin(["attribution", "efas_a"])]
    small = small[small.eps == small.eps.min()].set_index("predictor")
    told = "; ".join(f"{k} {x.spearman:.2f} [{x.ci_lo:.2f}, {x.ci_hi:.2f}]" for k, x in small.iterrows())
    out = [
        Exhibit("EFAS against its nulls", f"{folder}/efas_distribution.png", f"{folder}/features.csv", reading, n,
                "95 % bootstrap over sequences (layers.csv)", null, command)
    ]  # fmt: skip
    if len(small):
        out.append(
            Exhibit("Does it predict an intervention?", f"{folder}/predicted_actual.png", f"{folder}/predictors.csv",
                    f"Spearman with the energy change of a small ablation: {told}.", f"{int(small.n_features.iloc[0])} features, {n}",
                    "95 % bootstrap over sequences and features", "a random predictor (same CSV)", command)
        )  # fmt: skip
    return out


SECTIONS: dict[str, tuple[Callable[[Run], list[Exhibit]], str]] = {
    "Training and control loop": (training, "make train figures"),
    "Topology of the heads": (topology, "make harvest figures"),
    "Sparse autoencoders": (saes, "make sae figures"),
    "Ablation": (ablation, "make ablate"),
    "The hero": (hero, "make hero"),
    "EFAS": (efas, "make energy"),
}


# ------------------------------------------------------------------------------------------------------ the verdict
def verdict(r: Run) -> list[tuple[str, str, str]]:
    """(claim, supported | not supported | not told, evidence) for what the original studies claim, as far as this run can say."""
    held, out = tracking(r.telemetry["adaptive"], r.target), []

    def judge(claim: str, yes: bool | None, evidence: str) -> None:
        out.append((claim, {True: "supported", False: "not supported", None: "not told"}[yes], evidence))

    judge(
        "The Homeostat holds sigma within 10 % of its setpoint for 90 % of the time after settling",
        held["share"] >= 0.9,
        f"{held['share']:.0%} of {held['n']} samples, one run",
    )
    if "control" in r.telemetry:
        change = r.last("adaptive", "val_loss") / r.last("control", "val_loss") - 1
        judge("The pressure costs at most 2 % of the loss", change <= 0.02, f"{change:+.2%} on the validation split, one seed an arm")
        free, own = r.last("control", "val_sigma_resid"), r.last("adaptive", "val_sigma_resid")
        judge(
            "What the heads write is less alike too (sigma_resid, which no change of basis moves)",
            own < free,
            f"adaptive {own:.4f}, control {free:.4f}; one seed an arm, so a description of these two models",
        )
    try:
        t = r.table("saes/sae_metrics.csv").pivot_table(index="layer", columns="run", values="fvu")
        gap = t["adaptive"] - t["control"]
        half = stats.t.ppf(0.975, len(gap) - 1) * gap.sem()  # the layers are the units
        told = abs(gap.mean()) > half
        judge(
            "Decorrelated heads are easier for sparse autoencoders",
            None if not told else bool(gap.mean() < 0),
            f"FVU adaptive - control {gap.mean():+.4f} [{gap.mean() - half:+.4f}, {gap.mean() + half:+.4f}] over {len(gap)} layers of "
            "one model an arm",
        )
    except (OSError, KeyError):
        pass
    try:
        s = r.table("results_ablation_summary.csv")
        for x in s[s["mode"] == s["ranked_by"]].itertuples():
            who = f"L{x.hero_layer:.0f}H{x.hero_head:.0f}"
            judge(
                f"The {x.run} model has a Hero Head",
                bool(x.unique_hero),
                f"{who} {x.crossfit:+.4f} nats [{x.crossfit_lo:+.4f}, {x.crossfit_hi:+.4f}], first in {x.p_top1:.0%} of draws, "
                f"{x.gap:.4f} [{x.gap_lo:+.4f}, {x.gap_hi:+.4f}] ahead of the second",
            )
    except OSError:
        pass
    try:
        f, preset = r.table("energy_lens/layers.csv"), r.record("energy_lens")["arguments"]["preset"]
        judge(
            "Features of the Energy Transformer are aligned with its energy",
            None if preset == "smoke" else bool(f.aligned.sum()),
            f"{int(f.aligned.sum())} of {int(f.eligible.sum())} eligible pass both nulls, preset {preset}"
            + (", which is too small to tell: python energy_lens_minimal.py" if preset == "smoke" else ""),
        )
    except OSError:
        pass
    judge("Differences between the arms hold for other seeds", None, "one training seed an arm; RESULTS.md says what was tried")
    return out


# --------------------------------------------------------------------------------------------------------- the page
def esc(x: Any) -> str:
    return html.escape(str(x))


def picture(path: Path) -> str:
    """A PNG as a lossless WebP data address: a third of the bytes."""
    out = io.BytesIO()
    with Image.open(path) as im:
        size = im.size
        im.convert("RGB").save(out, "WEBP", lossless=True, quality=60)
    return f'width="{size[0]}" height="{size[1]}" src="data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"'


def download(path: Path) -> str:
    """A link that saves the CSV without a network; its name alone if it is too large even when compressed."""
    raw, name, kind = path.read_bytes(), path.name, "text/csv"
    if len(raw) > BIG_CSV:
        raw, name, kind = gzip.compress(raw, mtime=0), f"{path.name}.gz", "application/gzip"
    if len(raw) > MAX_CSV:
        return f"<code>{esc(path)}</code> ({path.stat().st_size / 1e6:.1f} MB, not in this page)"
    return f'<a download="{esc(name)}" href="data:{kind};base64,{base64.b64encode(raw).decode()}">{esc(name)}</a> ({len(raw) / 1e3:.0f} kB)'


def card(r: Run, e: Exhibit, side_by_side: bool) -> str:
    label = f"{r.name}: {e.title}" if side_by_side else e.title
    facts = {"n": e.n, "interval": e.interval, "null": e.null}
    rows = "".join(f"<dt>{k}</dt><dd>{esc(v)}</dd>" for k, v in facts.items())
    return (
        f'<figure><h3>{esc(label)}</h3><img loading="lazy" alt="{esc(label)}. {esc(e.reading)}" {picture(r.path / e.image)}>'
        f"<figcaption><p>{esc(e.reading)}</p><dl>{rows}<dt>data</dt><dd>{download(r.path / e.csv)}</dd></dl>"
        f"<details><summary>Command that redraws it</summary><pre>{esc(e.command)}</pre></details></figcaption></figure>"
    )


def as_table(t: pd.DataFrame, caption: str) -> str:
    cells = t.map(lambda v: "" if v != v else f"{v:.4g}" if isinstance(v, float) else str(v))
    inner = re.sub("^<table[^>]*>", "", cells.to_html(index=False, border=0))
    return f'<div class="scroll"><table><caption>{esc(caption)}</caption>{inner}</div>'


def grid(r: Run, number: int) -> str:
    """Impact of every head, layer by head, one table a run and mode; a cell tells its interval when pointed at or focused."""
    t, out = r.table("results_ablation.csv"), []
    for mode in [m for m in MODES if (t["mode"] == m).any()]:
        top = max(t.delta[t["mode"] == mode].max(), 1e-12)  # one colour scale for all arms
        for arm, g in t[t["mode"] == mode].groupby("run"):
            cells = g.set_index(["layer", "head"])
            rows = ""
            for layer in sorted(g.layer.unique()):
                rows += f'<tr><th scope="row">L{layer}</th>'
                for head in sorted(g["head"].unique()):
                    x = cells.loc[(layer, head)]
                    impact = f"{x.delta:+.4f} nats [{x.ci_lo:+.4f}, {x.ci_hi:+.4f}], rank {x['rank']:.0f}"
                    tell = f"{r.name}, {arm}, {mode}: L{layer}H{head} {impact}"
                    share = max(0.0, x.delta) / top
                    rows += (
                        f'<td tabindex="0" title="{esc(tell)}" data-tell="{esc(tell)}" style="--s:{share:.3f}">{1000 * x.delta:.1f}</td>'
                    )
                rows += "</tr>"
            heads = "".join(f'<th scope="col">H{h}</th>' for h in sorted(g["head"].unique()))
            hidden = "" if mode == MODES[0] else " hidden"
            out.append(
                f'<div class="scroll heat" data-mode="{mode}"{hidden}><table><caption>{esc(arm)}, {mode} ablation: '
                f"rise of the loss, millinats a token</caption><tr><th></th>{heads}</tr>{rows}</table></div>"
            )
    modes = [m for m in MODES if (t["mode"] == m).any()]
    buttons = "".join(f'<button type="button" data-show="{m}" aria-pressed="{str(m == modes[0]).lower()}">{m}</button>' for m in modes)
    return (
        f'<div class="grid" id="grid{number}"><p role="group" aria-label="how a head is removed">{buttons}</p>'
        f'<div class="pair">{"".join(out)}</div>'
        f'<p class="tell" aria-live="polite">Point at a head, or move to it with Tab.</p></div>'
    )


def what_was_run(r: Run) -> str:
    rows = []
    for name in ("adaptive", "control", "activations/adaptive", "saes/adaptive", "energy_lens", "hero_analysis"):
        try:
            x = r.record(name)
        except (OSError, ValueError):
            continue
        took = (pd.Timestamp(x["end"]) - pd.Timestamp(x["time"])).total_seconds() if x.get("end") else float("nan")
        commit = (x["git"]["commit"][:10] or "no repository") + (" + edits" if x["git"]["dirty"] else "")
        rows.append(dict(part=name, command=shlex.join(x["argv"]), seconds=f"{took:.0f}", commit=commit, exit=x["exit_status"]))
    a, m = r.record("adaptive"), r.telemetry["adaptive"]
    text = (
        f"{r.path}: {m.tokens.iloc[-1]:,.0f} training tokens of {a['arguments']['dataset']} an arm, seed {a['arguments']['seed']}, on "
        f"{a['hardware']['machine']}, {a['hardware']['cpus']} CPUs, {a['hardware']['gpu'] or 'no GPU'}; Python {a['versions']['python']}, "
        f"torch {a['versions']['torch']}."
    )
    return f"<p>{esc(text)}</p>" + as_table(pd.DataFrame(rows), "Commands, time and commit of each part (two may have run at once)")


def headline_table(runs: list[Run]) -> str:
    columns = {}
    for r in runs:
        try:
            columns[r.name] = r.table("headlines.csv").set_index("what")["number"]
        except OSError:
            columns[r.name] = pd.Series({"headlines": f"not computed; python tools/headlines.py {r.path}"})
    return as_table(pd.DataFrame(columns).fillna("").rename_axis("what").reset_index(), "Headline numbers, with their uncertainty")


def render(runs: list[Run]) -> str:
    """The page. Everything that comes from a file is escaped: a token is never markup."""
    both, body = len(runs) > 1, []
    title = "Janus Arc and Energy-Lens: " + " beside ".join(r.name for r in runs)
    box = ""
    for r in runs:
        rows = "".join(
            f'<tr><th scope="row">{esc(c)}</th><td class="{v.replace(" ", "-")}">{v}</td><td>{esc(e)}</td></tr>' for c, v, e in verdict(r)
        )
        head = f"<caption>{esc(r.path)}</caption><tr><th>claim</th><th>verdict</th><th>evidence</th></tr>"
        box += f'<div class="scroll"><table>{head}{rows}</table></div>'
    body.append(f'<section id="verdict" class="box"><h2>What the data support, and what they do not</h2>{box}</section>')
    body.append(f'<section id="run"><h2>What was run</h2>{"".join(map(what_was_run, runs))}{headline_table(runs)}</section>')
    for heading, (section, remedy) in SECTIONS.items():
        columns = []
        for i, r in enumerate(runs):
            try:
                cards = [card(r, e, both) for e in section(r)]
                cards += [grid(r, i)] if section is ablation else []
                if section is hero:
                    tokens = r.table("hero_analysis/hero_tokens.csv").head(10)[["delta_nats", "context", "next", "attends_to"]]
                    cards.append(as_table(tokens, "Where the loss needs the hero most: context, next token, what the head attends to"))
            except (OSError, KeyError, IndexError, ValueError) as e:
                reason = f"{getattr(e, 'filename', None) or e} is missing"
                cards = [
                    f'<p class="missing">{esc(r.name)}: not there ({esc(reason)}). Make it with: '
                    f"<code>{esc(remedy)} RUN={esc(r.path)}</code></p>"
                ]
            columns.append(f"<div>{''.join(cards)}</div>")
        where = re.sub(r"\W+", "-", heading.lower())
        body.append(
            f'<section id="{where}"><h2>{esc(heading)}</h2><div class="{"pair" if both else "one"}">{"".join(columns)}</div></section>'
        )
    links = "".join(f'<a href="#{re.sub(chr(92) + "W+", "-", h.lower())}">{esc(h)}</a>' for h in SECTIONS)
    fill = dict(TITLE=esc(title), NAV=f'<a href="#verdict">Verdict</a><a href="#run">What was run</a>{links}', BODY="".join(body))
    return re.sub("@(TITLE|NAV|BODY)@", lambda m: fill[m[1]], PAGE)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><style>
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--soft:#595959;--line:#ccc;
--box:#f4f6f8;--link:#0b5cad;--good:#00664d;--bad:#8f3b00;--heat:0,114,178}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--bg:#16181b;--fg:#e9e9e9;--soft:#b0b0b0;--line:#444;
--box:#212529;--link:#7ab8f5;--good:#4fd1ab;--bad:#f4a261;--heat:86,180,233}}
:root[data-theme=dark]{color-scheme:dark;--bg:#16181b;--fg:#e9e9e9;--soft:#b0b0b0;--line:#444;
--box:#212529;--link:#7ab8f5;--good:#4fd1ab;--bad:#f4a261;--heat:86,180,233}
:root[data-theme=light]{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:break-word}
a{color:var(--link)}nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.5rem 0 1rem}h1{font-size:1.5rem;line-height:1.2}
h2{border-bottom:1px solid var(--line);margin-top:2.2rem}h3{margin:.2rem 0 .5rem;font-size:1.05rem}
.box{background:var(--box);border:1px solid var(--line);border-radius:.5rem;padding:.2rem 1rem 1rem}.box h2{border:0;margin:.6rem 0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.85rem;margin:.6rem 0}caption{text-align:left;color:var(--soft);padding:.2rem 0}
th,td{border-bottom:1px solid var(--line);padding:.25rem .5rem;text-align:left;vertical-align:top;font-weight:400}
thead th,tr:first-child>th{font-weight:600}.supported{color:var(--good);font-weight:600}
.not-supported{color:var(--bad);font-weight:600}.not-told{color:var(--soft);font-weight:600}
figure{margin:1rem 0 2rem}img{max-width:100%;height:auto;background:#fff;border-radius:.3rem}figcaption p{margin:.5rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .8rem;font-size:.88rem;margin:.4rem 0}dt{color:var(--soft)}
dd{margin:0;min-width:0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem}.pair>div,.one>div{min-width:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--box);padding:.5rem}code{overflow-wrap:anywhere}
button{font:inherit;padding:.25rem .8rem;border:1px solid var(--line);border-radius:.3rem;background:var(--box);color:var(--fg);
cursor:pointer}button[aria-pressed=true]{border-color:var(--link);box-shadow:inset 0 0 0 1px var(--link)}
.heat td{background:rgba(var(--heat),calc(var(--s)*.55));text-align:right;cursor:default}
:focus-visible{outline:3px solid var(--link);outline-offset:1px}.tell{min-height:1.5em;color:var(--soft)}.missing{color:var(--bad)}
@media(max-width:40rem){dl{grid-template-columns:1fr}dt{margin-top:.3rem}body{padding:.7rem}
.box tr,.box th,.box td{display:block;border:0;padding:.1rem 0}.box tr{border-bottom:1px solid var(--line);padding:.4rem 0}
.box tr:first-child{display:none}}
@media print{nav,button,.tell{display:none}details{display:none}figure,tr{break-inside:avoid}body{max-width:none;font-size:11px}}
</style></head><body><h1>@TITLE@</h1><button type="button" id="theme">Light or dark</button>
<nav aria-label="sections">@NAV@</nav><main>@BODY@</main><script>
"use strict";
document.getElementById("theme").onclick=()=>{const e=document.documentElement,d=matchMedia("(prefers-color-scheme: dark)").matches;
e.dataset.theme=(e.dataset.theme||(d?"dark":"light"))==="dark"?"light":"dark"};
for(const g of document.querySelectorAll(".grid")){const tell=g.querySelector(".tell");
g.addEventListener("click",e=>{const m=e.target.dataset.show;if(!m)return;
for(const b of g.querySelectorAll("button"))b.setAttribute("aria-pressed",String(b===e.target));
for(const t of g.querySelectorAll(".heat"))t.hidden=t.dataset.mode!==m});
for(const kind of["mouseover","focusin"])g.addEventListener(kind,e=>{if(e.target.dataset.tell)tell.textContent=e.target.dataset.tell})}
</script></body></html>
"""


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--runs", nargs="+", type=Path, default=[Path("runs/demo")], help="folders of finished pipelines, side by side")
    p.add_argument("--out", type=Path, default=Path("results/report.html"), help="the page; replaced if it is there")
    args = p.parse_args(argv)
    page = render([Run(path) for path in args.runs])
    if len(page) > MAX_BYTES:
        print(f"the page has {len(page) / 1e6:.1f} MB; with fewer --runs it stays below {MAX_BYTES / 1e6:.0f}", file=sys.stderr)
    with atomic(args.out) as tmp:
        tmp.write_text(page, encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

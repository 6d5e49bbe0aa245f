"""What README.md and RESULTS.md show of the files kept in docs/numbers: a function a block.

A block stands in a document between `<!-- numbers: NAME -->` and `<!-- end -->`. Its function takes
the kept files and returns Markdown. tools/check_numbers.py puts it there, and checks that it is
still the same. A block more is a function and an entry in BLOCKS; a command more an entry in
SOURCES. Each function names the columns that it reads in one place.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

NUMBERS = Path("docs") / "numbers"  # below the root of the repository
PROVENANCE = "provenance.json"  # in the folder of a command: where its files come from


# ------------------------------------------------------------------------------------------- source
@dataclass(frozen=True)
class Source:
    """A command, and which of the files that it writes are kept. Paths are patterns below
    `folder`."""

    command: str
    folder: str  # where the command writes, from the root of the repository
    # Files with a sidecar X.json, which vouches for their bytes
    files: tuple[str, ...] = ()
    # Files without one -> the run.json of the runs that they were made from
    bare: dict[str, str] = field(default_factory=dict)
    records: str = "**/run.json"  # of all runs of the command


# Files that several commands write, by the names that their scripts give them
ABLATION = "results_ablation_summary.csv"
TABLE_3 = "results_ablation_table3.csv"
PRESERVING = "hero_analysis/hero_preserving.csv"
LENS = ("layers.csv", "sae.csv", "predictors.csv")

# Small files only: what a table of README or RESULTS shows, not what it was computed from
SOURCES = {
    "demo": Source(
        "make demo",
        "runs/demo",
        (
            ABLATION,
            "activations/*/topology_stats.csv",
            "saes/table2.csv",
            "saes/sae_nulls.csv",
            PRESERVING,
        ),
        # The picture of README is kept, too, so that it does not outlive its run
        {"headlines.csv": "**/run.json", TABLE_3: "run.json", "training.png": "adaptive/run.json"},
    ),
    # The same where products have neither bfloat16 nor AVX-512: what does rounding alone change?
    "demo32": Source(
        "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 make demo RUN=runs/demo32",
        "runs/demo32",
        bare={"headlines.csv": "**/run.json"},
    ),
    "seeds": Source(
        "make seeds",
        ".",  # tables and runs lie in two folders, results/ and runs/seeds/
        bare={
            "results/seeds.csv": "runs/seeds/*/*/run.json",
            "results/seeds_summary.csv": "runs/seeds/*/*/run.json",
            "results/seeds_loops.csv": "runs/seeds/*/*/run.json",
        },
        records="runs/seeds/*/*/run.json",
    ),
    "loops": Source(
        "make loops",
        "runs/loops",
        bare={"loops.csv": "*/run.json", "setpoint_steps.csv": "step*/run.json"},
    ),
    # The same seeds where products have neither bfloat16 nor AVX-512
    "loops32": Source(
        "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 make loops32",
        "runs/loops32",
        bare={"loops.csv": "*/run.json"},
    ),
    "energy": Source(
        "python energy_lens_minimal.py",
        "energy_lens_results",
        bare=dict.fromkeys((*LENS, "models.csv", "untrained.csv"), "run.json"),
        records="run.json",
    ),
    "real": Source(
        "python real_model_extension.py --model_name smollm2",
        "real_energy_lens_results",
        bare=dict.fromkeys((*LENS, "validity.csv"), "run.json"),
        records="run.json",
    ),
    "sae_start": Source(
        "python benchmarks/sae_start.py",
        "runs/sae_start",
        bare={"sae_start.csv": "", "compared.csv": ""},
        records="",
    ),
    "smollm2": Source("make demo-smollm2", "runs/smollm2", (ABLATION,), {TABLE_3: "run.json"}),
    # Written by tests, which keep no record: its own time and commit stand for one
    "calibration": Source(
        "JANUS_CALIBRATION_CSV=runs/calibration/calibration.csv python -m pytest tests",
        "runs/calibration",
        bare={"calibration.csv": ""},
        records="",
    ),
}


# -------------------------------------------------------------------------------------------- files
class NumbersError(Exception):
    """What is wrong, in one line."""


class NotKeptError(NumbersError):
    """A block needs a file of a command that was not run on this version."""

    def __init__(self, source: str) -> None:
        super().__init__(f"*Not run yet on this version: `{SOURCES[source].command}`.*")


class Kept:
    """The kept files of a repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / NUMBERS

    def table(self, source: str, name: str, columns: list[str]) -> pd.DataFrame:
        """These columns of a CSV. Raises NotKeptError if there is none, NumbersError if it is
        another kind."""
        path = self.folder / source / name
        if not path.exists():
            raise NotKeptError(source)
        table = pd.read_csv(path)
        # A column that was renamed is an error, never an empty cell
        missing = [column for column in columns if column not in table]
        if missing:
            where = "tools/number_blocks.py asks for it"
            raise NumbersError(f"{path} has no column {', '.join(missing)}; {where}")
        return table[columns]

    def provenance(self, source: str) -> dict[str, Any]:
        """Where the files of a command come from. Raises NotKeptError."""
        path = self.folder / source / PROVENANCE
        if not path.exists():
            raise NotKeptError(source)
        return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- format
def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    # Cells are not padded: a longer number would change every line of the diff
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bounds(low: float, high: float, spec: str) -> str:
    """An interval: [low, high]."""
    return f"[{low:{spec}}, {high:{spec}}]"


def span(values: pd.Series, spec: str) -> str:
    """The smallest and the largest of some values."""
    # Compared as text: what looks the same to a reader is one number
    low = f"{values.min():{spec}}"
    high = f"{values.max():{spec}}"
    return low if low == high else f"{low} to {high}"


def layer_names(layers: pd.Series) -> str:
    """Numbers of layers, each once: 0 1 2 4 6."""
    return " ".join(f"{layer:.0f}" for layer in sorted(layers.unique()))


def only(table: pd.DataFrame, **values: Any) -> pd.Series:
    """The one row in which columns have these values. Raises NumbersError unless there is one."""
    # Of two rows the reader would see one, and never know which
    for column, value in values.items():
        table = table[table[column] == value]
    if len(table) != 1:
        raise NumbersError(f"{len(table)} rows with {values}, expected one")
    return table.iloc[0]


# --------------------------------------------------------------------------------------- provenance
def where_from(kept: Kept) -> str:
    """A row a command: when, from which commit and on which machine its files were written."""
    rows = []
    # Commands that were not run have a row, too: the reader sees what is missing
    for name, source in SOURCES.items():
        try:
            rows.append([f"`{source.command}`", *origin(kept.provenance(name))])
        except NotKeptError:
            rows.append([f"`{source.command}`", "not run yet on this version", "", "", ""])
    header = ["command", "began", "commit", "machine", "torch"]
    return markdown(header, rows)


def origin(record: dict[str, Any]) -> list[str]:
    """Date, commit, machine and torch of the runs of a command."""
    runs = record["runs"]
    # More than one where an edited phase was run again
    commits = []
    for run in runs:
        commit = run["commit"][:8] + (" with changes" if run["dirty"] else "")
        if commit not in commits:
            commits.append(commit)
    flags = ", ".join(record["cpu_flags"]) or "no fast bfloat16"
    machine = f"{record['cpu']}, {record['cpus']} cores, {flags}"
    # Rounding differs between machines and versions, and with it every trained model
    gpus = sorted({run["gpu"] for run in runs if run["gpu"]})
    torch = sorted({run["torch"] for run in runs})
    began = min(run["time"] for run in runs)[:10]
    return [began, ", ".join(commits), ", ".join([machine, *gpus]), ", ".join(torch)]


# --------------------------------------------------------------------------------------------- demo
PHASES = {  # what it does: the script and other words of its command
    "1 train, an arm": ("janus_adaptive.py",),
    "2 harvest, an arm": ("harvest_activations.py",),
    "2 harvest of the model before training": ("harvest_activations.py", "untrained"),
    "3 SAEs, an arm": ("train_sae.py",),
    "3 SAEs with their nulls, an arm": ("train_sae.py", "--nulls"),
    "3 SAEs of single heads, both arms": ("train_sae.py", "head"),
    "3 SAEs of the model before training": ("train_sae.py", "untrained"),
    "4 ablation, both arms": ("ablation_test.py",),
    "5 hero analysis": ("hero_head_analysis.py",),
    "Energy-Lens, smallest size": ("energy_lens_minimal.py",),
}


def phase_of(run: pd.Series) -> str:
    """What a run did: the phase that has most words of its command, empty if none has."""
    fitting = [
        about for about, words in PHASES.items() if {*words} <= {run["script"], *run["argv"]}
    ]
    return max(fitting, key=lambda about: len(PHASES[about]), default="")


def demo_phases(kept: Kept) -> str:
    """How long each phase took."""
    runs = pd.DataFrame(kept.provenance("demo")["runs"])
    phase = runs.apply(phase_of, axis=1)
    rows = []
    # A phase of both arms has two runs, and perhaps two times
    for about in PHASES:
        own = runs[phase == about]
        # A phase that make did not need to run again left no record
        if len(own):
            minutes = span(own["seconds"] / 60, ".1f")
            rows.append([about, f"{minutes} min", f"{own['threads'].max():.0f}"])
    return markdown(["phase, demo size", "took", "threads"], rows)


def demo_headlines(kept: Kept) -> str:
    """The last lines of `make demo`."""
    headlines = kept.table("demo", "headlines.csv", ["what", "number"])
    # Word for word what the terminal showed, so that a reader can compare
    lines = [f"{what}: {number}" for what, number in headlines.itertuples(index=False)]
    return "\n".join(["```", *lines, "```"])


def demo_elsewhere(kept: Kept) -> str:
    """The last lines of `make demo`, shortened, beside those in another precision."""
    columns = ["what", "number"]
    here = kept.table("demo", "headlines.csv", columns).set_index("what")["number"]
    there = kept.table("demo32", "headlines.csv", columns).set_index("what")["number"]
    rows = []
    # Also what only one of them prints: a hero need not be explained in both
    for what in here.index.union(there.index, sort=False):
        found = [short_headline(numbers.get(what, "-")) for numbers in (here, there)]
        rows.append([what, *found])
    return markdown(["seed 42", "bfloat16, AVX-512", "float32, AVX2"], rows)


def short_headline(number: str) -> str:
    """A headline without its n, its null and its notes, which stand where it is quoted whole."""
    number = number.partition("; ")[0]
    return number.partition(" (95 %")[0]


def demo_homeostat(kept: Kept) -> str:
    """The headlines about the loop and its price."""
    headlines = kept.table("demo", "headlines.csv", ["what", "number"])
    # The rest have tables of their own
    elsewhere = headlines["what"].str.startswith(("SAE", "Hero", "explained"))
    rows = headlines[~elsewhere].to_numpy().tolist()
    return markdown(["criterion", "found"], rows)


def demo_topology(kept: Kept) -> str:
    """Similarity of heads by layer, control -> adaptive."""
    columns = ["layer", "metric", "value", "ci_lo", "ci_hi"]
    arms = {}
    # In the order of the cells: what is, and what the pressure makes of it
    for arm in ("control", "adaptive"):
        arms[arm] = kept.table("demo", f"activations/{arm}/topology_stats.csv", columns)
    metrics = ["sigma_z", "sigma_resid", "linear_cka"]
    rows = []
    for layer in sorted(arms["control"]["layer"].unique()):
        cells = [f"{layer}"]
        for metric in metrics:
            found = []  # of both arms
            for table in arms.values():
                row = only(table, layer=layer, metric=metric)
                interval = bounds(row["ci_lo"], row["ci_hi"], ".3g")
                found.append(f"{row['value']:.3g} {interval}")
            cells.append(" -> ".join(found))
        rows.append(cells)
    return markdown(["layer", *[f"{name}, control -> adaptive" for name in metrics]], rows)


def demo_saes(kept: Kept) -> str:
    """What the SAE of each layer leaves unexplained, and which of its latents are silent. Not those
    of single heads, whose rows are means over heads."""
    columns = ["run", "unit", "layer", "n_documents", "l0", "fvu", "fvu_lo", "fvu_hi"]
    columns += ["dead_share", "dead_share_tokens"]
    # Layers are the units, so they stand one by one
    table = kept.table("demo", "saes/table2.csv", columns)
    rows = []
    for _, sae in table[table["unit"] == "layer"].iterrows():
        fvu = f"{sae['fvu']:.3f} {bounds(sae['fvu_lo'], sae['fvu_hi'], '.3f')}"
        rows.append(
            [
                sae["run"],
                f"{sae['layer']}",
                f"{fvu}, {sae['n_documents']} documents",
                f"{sae['l0']:.1f}",
                f"{sae['dead_share']:.1%} (on {sae['dead_share_tokens']:,} tokens)",
            ]
        )
    return markdown(["arm", "layer", "FVU", "L0", "latents that never fired"], rows)


def demo_nulls(kept: Kept) -> str:
    """What share less is left unexplained than by each null, of the layers that have them."""
    columns = ["run", "unit", "layer"]
    nulls = {"gaussian": "normal rows", "decoder": "random decoder", "untrained": "before training"}
    for name in nulls:
        columns += [f"gain_{name}", f"gain_{name}_lo", f"gain_{name}_hi"]
    table = kept.table("demo", "saes/table2.csv", columns)
    rows = []
    for _, sae in table[(table["unit"] == "layer") & table["gain_gaussian"].notna()].iterrows():
        row = [sae["run"], f"{sae['layer']}"]
        for name in nulls:
            interval = bounds(sae[f"gain_{name}_lo"], sae[f"gain_{name}_hi"], ".0%")
            row.append(f"{sae[f'gain_{name}']:.0%} {interval}")
        rows.append(row)
    table = kept.table("demo", "saes/sae_nulls.csv", ["null", "layer", "fvu", "fvu_train"])
    seen = []
    for _, null in table[table["null"] == "untrained"].iterrows():
        new = f"{null['fvu']:.3f} on these documents"
        seen.append(f"{new}, {null['fvu_train']:.3f} on those that it was trained on")
    return (
        f"{markdown(['arm', 'layer', *nulls.values()], rows)}\n\n"
        "The last column is also one of carrying over to new documents. What the SAE of the model "
        f"before training leaves unexplained: {'; '.join(seen)}."
    )


def sae_start(kept: Kept) -> str:
    """Latents that stay alive, and FVU, by where latents start."""
    columns = ["arch", "start", "n_saes", "n_layers", "never", "never_most", "rare", "rare_most"]
    columns += ["more", "more_lo", "more_hi"]
    table = []
    for _, row in kept.table("sae_start", "compared.csv", columns).iterrows():
        more = "0"
        if row["start"] != 1:
            more = f"{row['more']:+.1%} {bounds(row['more_lo'], row['more_hi'], '+.1%')}"
        table.append(
            [
                row["arch"],
                "anywhere" if row["start"] == 1 else f"{row['start']:.1%}",
                f"{row['never']:.2%} ({row['never_most']:.2%})",
                f"{row['rare']:.2%} ({row['rare_most']:.2%})",
                f"{more}, {row['n_layers']} layers, {row['n_saes']} SAEs",
            ]
        )
    never = "never fire, mean (most)"
    rare = "below 1 in 100,000"
    return markdown(["architecture", "start", never, rare, "FVU, more than anywhere"], table)


# --------------------------------------------------------------------------------------------- hero
# Of the original study, .932 % and .367 % of its loss
PUBLISHED_DIFFERENCE = 0.018  # nats: best head of the adaptive model minus that of the control


def first_heads(kept: Kept, source: str) -> str:
    """The first head of each run, by the mode of ablation that heads are ranked by."""
    columns = ["run", "mode", "ranked_by", "hero_layer", "hero_head", "unique_hero"]
    columns += ["n_seq", "n_unit", "unit", "base_loss", "delta", "p_maxT"]
    columns += ["crossfit", "crossfit_lo", "crossfit_hi"]
    table = kept.table(source, ABLATION, columns)
    rows = []
    # Every mode has rows; the ranking, and so the first head, comes from one of them
    for _, arm in table[table["mode"] == table["ranked_by"]].iterrows():
        unique = "yes" if arm["unique_hero"] else "no"
        interval = bounds(arm["crossfit_lo"], arm["crossfit_hi"], "+.4f")
        # Picked on one half of the documents, measured on the other
        fitted = f"{arm['crossfit']:+.4f} {interval}"
        # Corrected for the number of heads among which it was the first
        p = f"{arm['p_maxT']:.3g}"
        if math.isnan(arm["crossfit"]):
            fitted = p = "none: too few documents"
        rows.append(
            [
                arm["run"],
                f"L{arm['hero_layer']:.0f}H{arm['hero_head']:.0f}",
                unique,
                f"{arm['delta'] / arm['base_loss']:+.2%}",
                fitted,
                p,
                f"{arm['n_unit']:.0f} {arm['unit']}, {arm['n_seq']:.0f} sequences",
            ]
        )
    header = ["run", "first head", "unique", "of the loss", "cross-fitted, nats", "p (max-T)", "n"]
    return markdown(header, rows)


def demo_steadied(kept: Kept) -> str:
    """By what factor the first-order effects make standard errors smaller, mode by mode."""
    columns = ["run", "mode", "n_seq", "n_linear", "se_ratio", "se_ratio_lo", "se_ratio_hi"]
    rows = []
    # The square says how many more sequences would have done the same
    for _, row in kept.table("demo", ABLATION, columns).iterrows():
        spread = bounds(row["se_ratio_lo"], row["se_ratio_hi"], ".2f")
        rows.append(
            [
                row["run"],
                row["mode"],
                f"{row['n_seq']:.0f}, {row['n_linear']:,.0f} to first order",
                f"{row['se_ratio']:.2f} {spread}",
                f"{row['se_ratio'] ** 2:.1f}",
            ]
        )
    smaller = "standard error smaller by, median [least, most] over heads"
    return markdown(["run", "ablation", "sequences", smaller, "median of squares"], rows)


def demo_hero(kept: Kept) -> str:
    """The first head of both arms, and whether one is stronger."""
    columns = ["mode", "ranked_by", "difference", "difference_lo", "difference_hi"]
    table = kept.table("demo", ABLATION, columns)
    # The difference is of both arms, and stands in the rows of each
    ranking = table[table["mode"] == table["ranked_by"]].iloc[0]
    low, high = ranking["difference_lo"], ranking["difference_hi"]
    # One seed: the interval is over documents, and so is the verdict
    verdict = direction(low, high, PUBLISHED_DIFFERENCE, "of this one training of each arm")
    return (
        f"{first_heads(kept, 'demo')}\n\n"
        f"Best head of the adaptive model minus best of the control: {ranking['difference']:+.4f} "
        f"{bounds(low, high, '+.4f')} nats over documents, one seed; published "
        f"{PUBLISHED_DIFFERENCE:+.3f}. A stronger hero under pressure is {verdict}; another seed, "
        "or a CPU that rounds otherwise, trains others and may turn it round."
    )


def direction(low: float, high: float, published: float, where: str) -> str:
    """What a 95 % interval says of a published, positive difference; `where`: it was measured."""
    # Its lower end alone decides what is shown, its upper end what is excluded
    if low > 0:
        return f"shown {where}"
    if high < 0:
        return f"contradicted {where}"
    # An interval that holds both zero and what was published tells them not apart
    if high >= published:
        return "neither shown nor excluded"
    return f"not shown, and one as large as published is excluded {where}"


def demo_ranking(kept: Kept) -> str:
    """The strongest heads of both arms beside the published ones."""
    columns = ["run", "name", "pct_impact", "ci_all_lo_pct", "ci_all_hi_pct"]
    published = ["published_head", "published_zero_pct_impact"]
    table = kept.table("demo", TABLE_3, columns + published)
    rows = []
    # The two columns share ranks and nothing else: other model, other size, other ablation
    for _, head in table.iterrows():
        interval = bounds(head["ci_all_lo_pct"], head["ci_all_hi_pct"], ".3f")
        impact = f"{head['pct_impact']:.3f} % {interval}"
        theirs = f"{head['published_head']}: {head['published_zero_pct_impact']:.3f} %"
        rows.append([f"{head['run']} {head['name']}", impact, theirs])
    return markdown(["head", "share of the loss", "published, zero ablation"], rows)


def demo_mechanism(kept: Kept) -> str:
    """How much of the hero's impact is left when one kind of key or feature is all it has."""
    columns = ["role", "run", "layer", "head", "mechanism", "kind"]
    columns += ["value", "ci_low", "ci_high", "n", "unit", "sequences"]
    table = kept.table("demo", PRESERVING, columns)
    hero = table[table["role"] == "hero"]
    # As many keys or features drawn at random preserve what any would
    chance = hero[hero["kind"] == "matched-random"].set_index("mechanism")["value"]
    rows = []
    for _, found in hero[hero["kind"] == "claimed"].iterrows():
        interval = bounds(found["ci_low"], found["ci_high"], ".0%")
        rows.append(
            [
                found["mechanism"],
                f"{found['value']:.0%} {interval}",
                f"{chance[found['mechanism']]:.0%}",
                f"{found['sequences']:.0f} sequences of {found['n']:.0f} {found['unit']}s",
            ]
        )
    # One hero: its name stands in every row
    who = f"L{hero['layer'].iloc[0]}H{hero['head'].iloc[0]} of {hero['run'].iloc[0]}"
    return markdown([f"{who} keeps only", "impact left", "as much at random", "n"], rows)


def smollm2_hero(kept: Kept) -> str:
    """The first head of SmolLM2, and what the first of the two stages left out."""
    columns = ["mode", "ranked_by", "n_screen", "n_dropped", "p_missed", "n_needed"]
    table = kept.table("smollm2", ABLATION, columns)
    # A head that went out early may still be the first: the reader gets the chance of that
    row = table[table["mode"] == table["ranked_by"]].iloc[0]
    sentences = [
        f"{row['n_dropped']:.0f} heads went out after {row['n_screen']:.0f} other sequences; "
        f"p that one of them is in truth the first: {row['p_missed']:.2g}."
    ]
    if row["n_needed"] > 0:  # empty with too few documents
        sentences.append(
            "To tell the first head from the second with 80 % power, if its lead is as measured: "
            f"{row['n_needed']:,.0f} sequences."
        )
    return f"{first_heads(kept, 'smollm2')}\n\n{' '.join(sentences)}"


# -------------------------------------------------------------------------------------------- seeds
METRICS = {  # as seeds_summary.csv names them
    "val_loss": "validation loss, nats a token",
    "val_sigma_z": "sigma_z, validation",
    "val_sigma_resid": "sigma_resid, validation",
    "max_share": "top head's share of all impact",
    "gini": "Gini index of the impacts",
    "crossfit": "top head's impact, cross-fitted, nats",
}


def seeds_summary(kept: Kept) -> str:
    """adaptive - control over seeds, a row a metric."""
    columns = ["metric", "n_seeds", "adaptive", "control"]
    columns += ["difference", "ci_lo", "ci_hi", "relative_percent", "p_t"]
    table = kept.table("seeds", "results/seeds_summary.csv", columns)
    rows = []
    # Intervals are over seeds: what one run says of its documents does not enter
    for _, found in table.iterrows():
        interval = bounds(found["ci_lo"], found["ci_hi"], "+.3g")
        rows.append(
            [
                METRICS.get(found["metric"], found["metric"]),  # a new metric keeps its own name
                f"{found['n_seeds']}",  # the unit of replication
                f"{found['adaptive']:.4g}",
                f"{found['control']:.4g}",
                f"{found['difference']:+.3g} {interval}",
                f"{found['relative_percent']:+.1f} %",
                f"{found['p_t']:.2g}",
            ]
        )
    header = ["adaptive - control", "seeds", "adaptive", "control"]
    text = markdown([*header, "difference", "relative", "p (t, corrected)"], rows)
    # Cross-fitted, because the impact of a head that was picked for its impact is too large
    hero = only(table, metric="crossfit")
    verdict = direction(hero["ci_lo"], hero["ci_hi"], PUBLISHED_DIFFERENCE, "over these seeds")
    return (
        f"{text}\n\nA stronger hero under pressure (published {PUBLISHED_DIFFERENCE:+.3f} nats) is "
        f"{verdict}."
    )


def seeds_each(kept: Kept) -> str:
    """adaptive - control of every seed, a row a metric."""
    columns = ["seed", "arm", "metric", "value"]
    table = kept.table("seeds", "results/seeds.csv", columns)
    # A row a metric, so that subtracting the arms pairs what shares a seed
    wide = table.pivot(index="metric", columns=["arm", "seed"], values="value")
    difference = wide["adaptive"] - wide["control"]  # [metrics, seeds]
    rows = []
    # In the order of the file, which is that of the summary
    for metric in table["metric"].unique():
        of_seeds = difference.loc[metric]
        cells = [f"{value:+.3g}" for value in of_seeds]
        n_positive = (of_seeds > 0).sum()
        rows.append([METRICS.get(metric, metric), *cells, f"{n_positive} of {len(of_seeds)}"])
    seeds = [f"seed {seed}" for seed in difference.columns]
    return markdown(["adaptive - control", *seeds, "above 0"], rows)


def seeds_loops(kept: Kept) -> str:
    """How each seed's loop held its setpoint, and its first heads."""
    columns = ["seed", "settled_step", "share", "n", "mean", "sd"]
    columns += ["control_over_setpoint", "hero_adaptive", "hero_control"]
    rows = []
    # A row a seed: a mean over seeds would hide the one that does not hold
    table = kept.table("seeds", "results/seeds_loops.csv", columns)
    for _, loop in table.iterrows():
        rows.append(
            [
                f"{loop['seed']}",
                f"{loop['settled_step']:.0f}",
                f"{loop['share']:.0%} ({loop['n']})",
                f"{loop['mean']:.3f} +- {loop['sd']:.3f}",
                f"{loop['control_over_setpoint']:.2f}",
                loop["hero_adaptive"],
                loop["hero_control"],
            ]
        )
    header = [
        "seed",
        "settled at step",
        "filtered sigma within 10 % (n)",
        "mean +- sd, of setpoint",
    ]
    header += ["control, of setpoint", "first head, adaptive", "first head, control"]
    # What the demo asks of a loop
    n_held = (table["share"] >= 0.9).sum()
    held = f"At least 90 % of the samples within 10 %: on {n_held} of {len(table)} seeds."
    return f"{markdown(header, rows)}\n\n{held}"


def loop_table(kept: Kept, source: str) -> str:
    """How the loop of every seed held its setpoint."""
    columns = ["seed", "settled_step", "n", "share", "raw_share", "noise_share", "mean", "sd"]
    table = kept.table(source, "loops.csv", columns)
    rows = []
    # Beside what was held, what noise alone would leave: 100 % cannot be reached
    for _, loop in table.iterrows():
        rows.append(
            [
                f"{loop['seed']:.0f}",
                f"{loop['settled_step']:.0f}",
                f"{loop['share']:.0%} ({loop['n']:.0f})",
                f"{loop['raw_share']:.0%}",
                f"{loop['noise_share']:.0%}",
                f"{loop['mean']:.3f} +- {loop['sd']:.3f}",
            ]
        )
    header = ["seed", "settled at step", "filtered, within 10 % (n)", "unfiltered"]
    header += ["noise alone, filtered", "mean +- sd, of setpoint"]
    # Counted as seeds_loops() does
    n_held = (table["share"] >= 0.9).sum()
    held = f"At least 90 % of the filtered samples within 10 %: on {n_held} of {len(table)} seeds."
    return f"{markdown(header, rows)}\n\n{held}"


def loops_held(kept: Kept) -> str:
    """The loop on seeds that it was not tuned for, in the arithmetic of the machine."""
    return loop_table(kept, "loops")


def loops32_held(kept: Kept) -> str:
    """The same in float32 without AVX-512."""
    return loop_table(kept, "loops32")


def loops_steps(kept: Kept) -> str:
    """How the loop followed a step of its setpoint."""
    columns = ["seed", "step", "before", "after", "settles_after", "share", "overshoot"]
    rows = []
    # Seeds are the unit, so no mean hides one that was slow
    for _, moved in kept.table("loops", "setpoint_steps.csv", columns).iterrows():
        rows.append(
            [
                f"{moved['seed']:.0f}",
                f"{moved['before']:g} -> {moved['after']:g} at step {moved['step']:.0f}",
                f"{moved['settles_after']:.0f} steps",
                f"{moved['overshoot']:.0%}",
                f"{moved['share']:.0%}",
            ]
        )
    header = ["seed", "setpoint", "within 10 % after", "overshoot", "within 10 % from then on"]
    return markdown(header, rows)


def seeds_brief(kept: Kept) -> str:
    """In a sentence, which metrics the arms differ in."""
    columns = ["metric", "n_seeds", "difference", "ci_lo", "ci_hi"]
    table = kept.table("seeds", "results/seeds_summary.csv", columns)
    # Written from the intervals, so that the sentence turns when they do
    differ: list[str] = []
    same: list[str] = []
    for _, found in table.iterrows():
        label = METRICS.get(found["metric"], found["metric"])
        interval = bounds(found["ci_lo"], found["ci_hi"], "+.3g")
        # Corrected for their number, so that all of them may be looked at
        apart = found["ci_lo"] > 0 or found["ci_hi"] < 0
        said = f"{label} {found['difference']:+.3g} {interval}"
        (differ if apart else same).append(said)
    n_seeds = table["n_seeds"].iloc[0]
    intro = f"Over {n_seeds} seeds (`make seeds`), adaptive - control, paired t intervals, 95 % "
    intro += f"over all {len(table)} metrics together."
    told = f"Told from zero: {'; '.join(differ) or 'nothing'}."
    return f"{intro} {told} Not told from zero: {'; '.join(same) or 'nothing'}."


# -------------------------------------------------------------------------------------- Energy-Lens
# Both scripts write the same tables; a layer is a descent step of one, a block of the other
MODELS = {"energy": "Energy Transformer", "real": "SmolLM2-135M (4-bit file), loss energy"}
STATES = {"energy": "descent steps", "real": "blocks"}
NOT_RUN = "not run yet on this version"


def energy_lens(kept: Kept) -> str:
    """What was measured on both models, a column a model."""
    columns = []
    for source in MODELS:
        try:
            columns.append(lens_facts(kept, source))
        except NotKeptError:
            command = f"`{SOURCES[source].command}`, {NOT_RUN}"
            columns.append({"command": command})
    # A model that was not run has none of the rows, so the other one names them
    labels = dict.fromkeys(label for facts in columns for label in facts)
    rows = []
    for label in labels:  # a row a label, a cell a model
        rows.append([label, *[facts.get(label, "") for facts in columns]])
    return markdown(["measured, one seed", *MODELS.values()], rows)


def lens_facts(kept: Kept, source: str) -> dict[str, str]:
    """The column of a model: label -> what was found."""
    facts = {"command": f"`{SOURCES[source].command}`"}
    facts |= lens_counts(kept, source)
    facts["the same on an untrained model"] = untrained_count(kept, source)
    facts |= lens_prediction(kept, source)
    run = kept.provenance(source)["runs"][0]  # there is one
    facts["time, memory"] = run["cost"]
    return facts


def lens_counts(kept: Kept, source: str) -> dict[str, str]:
    """How many features pass what, over all layers."""
    columns = ["layer", "n_seq", "n_tokens", "latents", "eligible", "split_half_r"]
    columns += ["rule_passes", "rule_false_directions", "token_null", "direction_null"]
    columns += ["within_documents", "aligned", "aligned_positive", "aligned_clusters"]
    columns += ["aligned_participation", "directions", "fewest"]
    # Counts of features, and of clusters of near-copies: copies pass a null as a block
    layers = kept.table(source, "layers.csv", columns)
    total = layers.sum()  # a feature of two layers is two features: one family over all
    sae = kept.table(source, "sae.csv", ["dictionary", "fvu"])
    of_sae = sae[sae["dictionary"].str.startswith("SAE")]["fvu"]
    # The trivial dictionary: where it explains more, a feature need be no more than a token
    of_tokens = sae[sae["dictionary"].str.startswith("one atom a token")]["fvu"]
    aligned = f"{total['aligned']:,.0f}, in {total['aligned_clusters']:,.0f} clusters of copies"
    dimensions = f"worth {total['aligned_participation']:.0f} directions"
    return {
        "sequences (the unit of every test), tokens": (
            f"{layers['n_seq'].max():,}, {layers['n_tokens'].max():,}"
        ),
        "states": f"{STATES[source]} {layer_names(layers['layer'])}",
        "SAE, unexplained variance; one atom a token": (
            f"{span(of_sae, '.2f')}; {span(of_tokens, '.2g')}"
        ),
        "eligible features": f"{total['eligible']:,.0f} of {total['latents']:,.0f}",
        "\\|EFAS\\| > 0.1 (the original rule); random directions would give": (
            f"{total['rule_passes']:,.0f}; {total['rule_false_directions']:,.1f}"
        ),
        "pass: sequences permuted": f"{total['token_null']:,.0f}",
        "pass: signs flipped within documents": f"{total['within_documents']:,.0f}",
        "pass: random directions": f"{total['direction_null']:,.0f}",
        "fewest that could have passed; random directions a layer": (
            f"{layers['fewest'].max():,}; {layers['directions'].max():,}"
        ),
        "**aligned** (both, and same sign in both halves)": (
            f"**{aligned}**, {dimensions}; {total['aligned_positive']:,.0f} amplifying"
        ),
        "split-half correlation of EFAS": span(layers["split_half_r"], ".2f"),
    }


def untrained_count(kept: Kept, source: str) -> str:
    """Aligned features of a model that was never trained; the pretrained ones have no such twin."""
    # Its weights would have to be drawn as those of its authors were
    if source != "energy":
        return "not measured"
    columns = ["layer", "eligible", "aligned", "fewest"]
    # One step was analysed. What also appears there owes nothing to training
    found = kept.table(source, "untrained.csv", columns).iloc[0]
    count = f"{found['aligned']:,.0f} of {found['eligible']:,.0f}"
    return f"{count} (step {found['layer']:.0f}; fewest {found['fewest']:,.0f})"


PREDICTIONS = {  # predictor: how the table calls it
    "efas_a": "EFAS, other half",
    "attribution_a": "attribution, other half",
    "attribution": "attribution, the tokens themselves",
    "integrated_gradients": "integrated gradients, the tokens themselves",
}


def lens_prediction(kept: Kept, source: str) -> dict[str, str]:
    """Spearman of each predictor with what ablations do, the slightest and the full one; of a
    pretrained model by block."""
    columns = ["eps", "predictor", "scale", "spearman", "ci_lo", "ci_hi"]
    columns += ["minus_efas", "minus_efas_lo", "minus_efas_hi"]
    table = kept.table(source, "predictors.csv", columns)
    # The sign is half of what a predictor says
    table = table[table["scale"] == "signed"]
    facts = {}
    for dose, eps in (("slight", table["eps"].min()), ("full", table["eps"].max())):
        at_dose = table[table["eps"] == eps]  # the doses in between are in the report
        for predictor, label in PREDICTIONS.items():
            found = []
            for _, row in at_dose[at_dose["predictor"] == predictor].iterrows():
                interval = bounds(row["ci_lo"], row["ci_hi"], ".2f")
                found.append(f"{row['spearman']:.2f} {interval}")
            if not found:
                raise NumbersError(f"{source}: predictors.csv has no predictor {predictor}")
            facts[f"{dose} ablation, Spearman: {label}"] = ", ".join(found)
        # On equal terms: both from the half of the documents that is not intervened on
        more = []
        for _, row in at_dose[at_dose["predictor"] == "attribution_a"].iterrows():
            interval = bounds(row["minus_efas_lo"], row["minus_efas_hi"], "+.2f")
            more.append(f"{row['minus_efas']:+.2f} {interval}")
        facts[f"{dose} ablation: attribution minus EFAS, other half"] = ", ".join(more)
        facts[f"eps of a {dose} ablation"] = f"{eps:g}"
    return facts


def energy_models(kept: Kept) -> str:
    """Masked-token loss of the Energy Transformer beside other models."""
    columns = ["model", "masked_nats", "accuracy", "n_masked"]
    # The unigram among them says what a model costs that sees no context at all
    rows = []
    for _, model in kept.table("energy", "models.csv", columns).iterrows():
        loss, accuracy = f"{model['masked_nats']:.2f}", f"{model['accuracy']:.1%}"
        rows.append([model["model"], loss, accuracy, f"{model['n_masked']:,}"])
    return markdown(["model", "loss on masked tokens, nats", "accuracy", "tokens"], rows)


def energy_layers(kept: Kept) -> str:
    """EFAS by descent step of the Energy Transformer."""
    return lens_layers(kept, "energy")


def real_layers(kept: Kept) -> str:
    """EFAS by block of SmolLM2."""
    return lens_layers(kept, "real")


def lens_layers(kept: Kept, source: str) -> str:
    """What passes, a row a layer."""
    columns = ["layer", "eligible", "token_null", "direction_null", "aligned", "aligned_clusters"]
    columns += ["aligned_participation", "median_abs_efas", "median_ci_lo", "median_ci_hi"]
    rows = []
    for _, layer in kept.table(source, "layers.csv", columns).iterrows():
        counts = [f"{layer[name]:,.0f}" for name in columns[:7]]  # the layer, then what passes
        interval = bounds(layer["median_ci_lo"], layer["median_ci_hi"], ".3f")
        rows.append([*counts, f"{layer['median_abs_efas']:.3f} {interval}"])
    # The median says how far EFAS is from 0, which no count does
    header = [STATES[source].rstrip("s"), "eligible", "pass: sequences", "pass: directions"]
    return markdown([*header, "aligned", "clusters", "worth", "median \\|EFAS\\|"], rows)


def real_validity(kept: Kept) -> str:
    """How far each energy of SmolLM2 is one."""
    columns = ["layer", "energy", "nats", "cosine_with_true_gradient", "own_change", "final_change"]
    # A random direction is one of the rows: what a step does that knows nothing
    rows = []
    for _, found in kept.table("real", "validity.csv", columns).iterrows():
        # An energy is one as far as lowering it lowers the loss
        changes = [f"{found[name]:+.3f}" for name in columns[4:]]  # of it, of the loss
        cosine = f"{found['cosine_with_true_gradient']:.2f}"
        rows.append(
            [f"{found['layer']}", found["energy"], f"{found['nats']:.2f}", cosine, *changes]
        )
    header = ["block", "a step down", "nats", "cosine with the loss gradient"]
    return markdown([*header, "change of that energy", "change of the loss"], rows)


# -------------------------------------------------------------------------------------- calibration
def calibration(kept: Kept) -> str:
    """What the simulations measured, a row a statistic and figure; the CSV has every setting."""
    columns = ["statistic", "setting", "figure", "value"]
    table = kept.table("calibration", "calibration.csv", columns)
    table = table[~table["figure"].isin(["n", "n_sim", "simulations"])]  # how many, not what
    rows = []
    # The worst cases are what a reader asks for, so each end says in which setting it was
    for (statistic, figure), own in table.groupby(["statistic", "figure"]):
        lowest = own.loc[own["value"].idxmin()]
        highest = own.loc[own["value"].idxmax()]
        low = f"{lowest['value']:.3g} ({lowest['setting']})"
        high = f"{highest['value']:.3g} ({highest['setting']})"
        rows.append([statistic, figure, f"{len(own)}", low, high])
    header = ["statistic", "figure", "settings", "lowest (where)", "highest (where)"]
    # A | in a cell would end it
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    every = "[calibration.csv](docs/numbers/calibration/calibration.csv)"
    return f"{markdown(header, cells)}\n\nEvery setting: {every}."


# -------------------------------------------------------------------------------------------- bench
TARGETS = "targets.csv"  # what is asked for; benchmarks/results.json has what was measured


def bench(kept: Kept) -> str:
    """Targets and what was measured."""
    path = kept.root / "benchmarks" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))  # its own record of machine and commit
    measured = pd.DataFrame(results["rows"])  # a row a variant of a race
    rows = []
    for _, target in pd.read_csv(kept.folder / TARGETS).iterrows():
        own = measured[measured["what"] == target["what"]]
        # The same work is measured at several sizes; without one named, there is one
        if isinstance(target["shape"], str):
            own = own[own["shape"].str.startswith(target["shape"])]
        rows.append(against_target(target, own))
    machine = results["machine"]
    facts = f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['features'])}"
    when = f"{machine['time'][:10]}, commit {machine['git']['commit'][:8]}"
    table = markdown(["work", "target", "measured", "met"], rows)
    return f"{table}\n\nOn {facts}; {when}."


def against_target(target: pd.Series, own: pd.DataFrame) -> list[str]:
    """A row of the table; `own`: the measurements of its work."""
    found = only(own, variant=target["variant"])
    # Lowest and highest round: the machine's speed drifts
    spread = bounds(found["low"], found["high"], ".3g")
    # times_peer: against the best that is not ours; times: against the variant named there
    if target["show"] == "times_peer":
        judged = found["ratio_to_best_peer"]
        shown = f"{judged:.2f} times"
    elif target["show"] == "times":
        judged = found["median"] / only(own, variant=target["against"])["median"]
        shown = f"{judged:.2f} times"
    else:
        judged = found[target["show"]]  # the median, or the highest
        several = f" {spread}" if found["n"] > 1 else ""
        shown = f"{found['median']:.3g}{several} {found['unit']}"
    if target["better"] == "higher":
        return [
            target["work"],
            f"at least {target['target']:g}",
            shown,
            yes(judged >= target["target"]),
        ]
    return [target["work"], f"at most {target['target']:g}", shown, yes(judged <= target["target"])]


def yes(met: bool) -> str:
    """Whether a target is met."""
    return "yes" if met else "no"


# ------------------------------------------------------------------------------------------- blocks
@dataclass(frozen=True)
class Block:
    """Which document a block stands in, and what writes it."""

    document: str
    render: Callable[[Kept], str]


# A block stands in one document only: two places would be two sentences to read
README = "README.md"
RESULTS = "RESULTS.md"
BLOCKS = {
    "demo-phases": Block(README, demo_phases),
    "demo-headlines": Block(README, demo_headlines),
    "demo-elsewhere": Block(README, demo_elsewhere),
    "seeds-brief": Block(README, seeds_brief),
    "energy-lens": Block(README, energy_lens),
    "where-from": Block(RESULTS, where_from),
    "demo-homeostat": Block(RESULTS, demo_homeostat),
    "loops-held": Block(RESULTS, loops_held),
    "loops32-held": Block(RESULTS, loops32_held),
    "loops-steps": Block(RESULTS, loops_steps),
    "seeds-loops": Block(RESULTS, seeds_loops),
    "seeds-summary": Block(RESULTS, seeds_summary),
    "seeds-each": Block(RESULTS, seeds_each),
    "demo-topology": Block(RESULTS, demo_topology),
    "demo-saes": Block(RESULTS, demo_saes),
    "demo-nulls": Block(RESULTS, demo_nulls),
    "sae-start": Block(RESULTS, sae_start),
    "demo-hero": Block(RESULTS, demo_hero),
    "demo-steadied": Block(RESULTS, demo_steadied),
    "demo-ranking": Block(RESULTS, demo_ranking),
    "demo-mechanism": Block(RESULTS, demo_mechanism),
    "energy-models": Block(RESULTS, energy_models),
    "energy-layers": Block(RESULTS, energy_layers),
    "real-layers": Block(RESULTS, real_layers),
    "real-validity": Block(RESULTS, real_validity),
    "smollm2-hero": Block(RESULTS, smollm2_hero),
    "calibration": Block(RESULTS, calibration),
    "bench": Block(RESULTS, bench),
}


def render(name: str, kept: Kept) -> str:
    """The text of a block; where its files are missing, the line that says so."""
    try:
        return BLOCKS[name].render(kept)
    except NotKeptError as missing:
        return str(missing)


def render_all(root: Path) -> dict[str, str]:
    """The text of every block, by name."""
    kept = Kept(root)
    return {name: render(name, kept) for name in BLOCKS}

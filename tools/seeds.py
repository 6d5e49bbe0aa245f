"""What holds over training runs: the two arms, paired by seed, and the heads, matched over seeds.

    python tools/seeds.py runs/seeds/1 runs/seeds/2 runs/seeds/3 --save_dir results
    python tools/seeds.py --redraw --save_dir results

The seed is the unit of replication: each folder holds both arms of one seed and their ablation
(`make seeds`). Writes seeds.csv (one measurement a row), seeds_summary.csv (one paired difference
a row), seeds_loops.csv (one control loop a row) and seeds.png, and prints what they say. The demo's
control loop was tuned on seed 42: leave that seed out, it is no evidence about the loop.

Where the folders hold the checkpoints too, also head_stability.csv (one head of one seed beside one
other seed a row) and head_stability.png. Does another seed grow the same head? A head's match is
the head of the other seed that writes most nearly the same on the same validation tokens (linear
CKA; all heads of all layers are candidates). The largest of many is large by chance, and larger
still because both models read the same text. So its null is the same search among as many heads
that read random directions of the other seed's own residual stream: what is above it was learned
twice. Pairing tokens with those of another text (null_text) is the weaker null: any two heads that
read the same token beat it. The text is fixed: intervals are over seeds alone.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from headlines import after_settling, last_value, tracking  # noqa: E402
from scipy import optimize, stats  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hero_head_analysis import (  # noqa: E402
    head_writes,
    match_by_function,
    read_batches,
    write_basis,
    write_rms,
)
from janus_adaptive import (  # noqa: E402
    HandoffError,
    HFWikiTextLoader,
    NewGPT,
    atomic,
    csv_table,
    drawing,
    find_checkpoint,
    find_text,
    load_checkpoint,
    one_line_errors,
    read_telemetry,
    save_figure,
    sha256,
)

COLOURS = {"adaptive": "#d55e00", "control": "#0072b2"}
METRICS = {  # name: label; all are tested, so p-values and intervals are corrected for their number
    "val_loss": "validation loss (nats a token)",
    "val_sigma_z": "sigma_z, validation",
    "val_sigma_resid": "sigma_resid, validation",
    "max_share": "top head's share of all impact",
    "gini": "Gini index of the impacts",
    "crossfit": "top head's impact (nats, cross-fitted)",
}
BONFERRONI = len(METRICS)

N_POSITIONS = 2048  # tokens, about, on which what heads write is compared
N_WINDOWS = 32  # at least, spread over the validation split: neighbouring tokens are alike
N_RANDOM = 19  # draws of random heads: to be above all of them has a chance of 1 in 20
MIN_SEEDS = 3  # two are one pair: nothing says how far another pair would lie
STABILITY_COLUMNS = {  # of head_stability.csv, which is all that is drawn and told from
    *("arm", "seed", "other_seed", "layer", "head", "depth"),
    *("cka", "null", "null_lo", "null_hi", "null_text", "stability", "impact"),
}


# ------------------------------------------------------------------------------------------- method
def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the adaptive arm. Raises ValueError if the control has another seed."""
    arms = {}
    for arm in COLOURS:
        record = (folder / arm / "run.json").read_text(encoding="utf-8")
        arms[arm] = json.loads(record)["arguments"]
    seed, other = arms["adaptive"]["seed"], arms["control"]["seed"]
    if other != seed:
        raise ValueError(f"the arms have the seeds {seed} and {other}, expected one")
    return arms["adaptive"]


def name_hero(head: pd.Series) -> str:
    """L3H1, and whether another head could as well be the first (`head`: a row of the summary)."""
    name = f"L{head['hero_layer']:.0f}H{head['hero_head']:.0f}"
    return name if head["unique_hero"] else f"{name} (not unique)"


def windows_of(arm: Path) -> tuple[int, ...]:
    """The validation windows that the losses of a run are of; empty: it is older than that list."""
    path = arm / "validation.csv"
    return tuple(pd.read_csv(path)["window"]) if path.is_file() else ()


def measure(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One seed: its rows (seed, arm, metric, value), and how its loop tracked the setpoint.

    Raises HandoffError if the folder does not hold both arms of one seed and their ablation.
    """
    telemetry = {arm: read_telemetry(folder / arm / "telemetry.csv") for arm in COLOURS}
    rows = []
    heroes = {}
    try:
        summary = pd.read_csv(folder / "results_ablation_summary.csv")
        # Every mode of ablation has rows; heads are ranked by one of them
        summary = summary[summary["mode"] == summary["ranked_by"]].set_index("run")
        arguments = read_arguments(folder)
        seed, target = arguments["seed"], arguments["target_sigma"]
        filter_beta = arguments["filter_beta"]
        for arm, frame in telemetry.items():
            for metric in METRICS:
                # What training measured is in the telemetry, what ablation measured in its summary
                measured = metric in frame
                value = last_value(frame, metric) if measured else summary.loc[arm, metric]
                rows.append({"seed": seed, "arm": arm, "metric": metric, "value": float(value)})
            heroes[f"hero_{arm}"] = name_hero(summary.loc[arm])
    except (OSError, ValueError, KeyError, IndexError) as e:
        found = f"{folder} is not a pair of finished runs ({e!r})"
        raise HandoffError(f"{found}; make it with: make seeds") from None

    windows = [windows_of(folder / arm) for arm in COLOURS]
    if windows[0] != windows[1]:
        found = f"{folder} has arms that were validated on other windows of the split"
        raise HandoffError(f"{found}, expected the same --val_windows; remove it, then: make seeds")

    held = tracking(telemetry["adaptive"], target, filter_beta)
    free = after_settling(telemetry["control"], held)  # the same metric, over the same steps
    loop = {"seed": seed, "control_over_setpoint": free / target} | asdict(held) | heroes
    return rows, loop


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """adaptive - control of each metric over seeds: a row a metric, its p-values and interval.

    p_t and the 95 % interval are those of the paired t-test; p_sign_flip that of the permutation
    test whose null is that the arms are exchangeable within a seed. All are corrected for the
    number of metrics (Bonferroni).
    """
    # A row a seed, so that subtracting two columns pairs what shares initial weights and data
    wide = rows.pivot(index="seed", columns=["metric", "arm"], values="value")
    summary = []
    for metric in METRICS:
        adaptive = wide[metric]["adaptive"].to_numpy()  # [seeds]
        control = wide[metric]["control"].to_numpy()  # [seeds]
        difference = adaptive - control  # [seeds]
        t_test = stats.ttest_rel(adaptive, control)
        low, high = t_test.confidence_interval(1 - 0.05 / BONFERRONI)
        # If the arms were exchangeable, each seed's difference could as well have the other sign
        sign_flips = stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=9999
        )
        summary.append(
            {
                "metric": metric,
                "n_seeds": len(adaptive),
                "adaptive": adaptive.mean(),
                "control": control.mean(),
                "difference": difference.mean(),
                "ci_lo": low,
                "ci_hi": high,
                "relative_percent": 100 * (adaptive / control - 1).mean(),
                "p_t": min(1, BONFERRONI * t_test.pvalue),
                "p_sign_flip": min(1, BONFERRONI * sign_flips.pvalue),
            }
        )
    return pd.DataFrame(summary)


def measure_all(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and loops of all seeds. Raises HandoffError unless there are two different ones."""
    rows = []
    loops = []
    for folder in folders:
        of_seed, loop = measure(folder)
        rows += of_seed
        loops.append(loop)
    # Two runs of one seed are one observation, not two
    seeds = [loop["seed"] for loop in loops]
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        expected = "expected at least two different ones; make more with: make seeds"
        raise HandoffError(f"found the seeds {seeds}, {expected}")
    return pd.DataFrame(rows), pd.DataFrame(loops)


# ---- heads over seeds: which head of another seed does the same
@dataclass
class Trained:
    """The trained model of one arm of one seed, and what each of its heads is worth."""

    seed: int
    model: NewGPT
    impact: pd.DataFrame  # layer, head, mode (that ranks heads), impact (nats a token)


def match_seeds(runs: list[Trained], idx: Tensor) -> pd.DataFrame:
    """Windows [n, T] that the models of several seeds read -> head_stability.csv without the arm: a
    row a head and other seed."""
    stride = math.ceil(idx.numel() / N_POSITIONS)
    writes = [head_writes(run.model, idx, stride) for run in runs]  # [N, L, H, K] each
    tables = []
    for target, theirs in zip(tqdm(runs, desc="matching", disable=None), writes, strict=True):
        # The null is made from the model that is searched: once for all that search it
        inputs = head_inputs(target.model, idx)
        random = [random_writes(target.model, inputs, stride, draw) for draw in range(N_RANDOM)]
        for source, mine in zip(runs, writes, strict=True):
            if source is target:
                continue
            # Ordered pairs: the match of a head need not have that head as its own match
            heads = match_heads(mine, theirs, random)
            heads.insert(0, "seed", source.seed)
            heads.insert(1, "other_seed", target.seed)
            tables.append(heads.merge(source.impact, on=["layer", "head"], how="left"))
    return pd.concat(tables, ignore_index=True)


def match_heads(mine: Tensor, theirs: Tensor, random: list[Tensor]) -> pd.DataFrame:
    """Writes [N, L, H, K] of a model's heads, of another's, and of draws of random heads in the
    other's place -> a row a head: its match, and what the same search finds by chance."""
    n_layers, n_heads = mine.shape[1:3]
    by_chance = torch.stack([largest_cka(mine, draw) for draw in random])  # [draws, L, H]
    rows = []
    for layer, head in itertools.product(range(n_layers), range(n_heads)):
        match = match_by_function(mine[:, layer, head], theirs)
        null = by_chance[:, layer, head]  # [draws]
        expected = null.mean().item()
        rows.append(
            {
                "layer": layer,
                "head": head,
                "depth": layer / max(1, n_layers - 1),  # 0 is the first layer, 1 the last
                "match_layer": match.layer,
                "match_head": match.head,
                "cka": match.cka,
                "null": expected,
                "null_lo": null.min().item(),
                "null_hi": null.max().item(),
                "null_text": match.null,
                # Corrected for chance as kappa is: 1 is the same head, 0 what random ones reach
                "stability": (match.cka - expected) / max(1e-9, 1 - expected),
            }
        )
    return pd.DataFrame(rows)


def largest_cka(mine: Tensor, others: Tensor) -> Tensor:
    """Largest linear CKA of each head with any of another model's, from centred writes [N, L, H, K]
    of both: [L, H]. What `match_by_function` finds, for all heads in one product."""
    n_layers, n_heads = mine.shape[1:3]
    d_head = mine.shape[3]
    products = mine.flatten(1).T @ others.flatten(1)  # [L H K, L H K]
    by_head = products.unflatten(0, (-1, d_head)).unflatten(2, (-1, others.shape[-1]))
    shared = by_head.square().sum((1, 3))  # [L H, L H]
    size = torch.outer(own_size(mine), own_size(others))  # [L H, L H]
    cka = shared / size.clamp_min(1e-20)
    return cka.amax(1).view(n_layers, n_heads)


def own_size(writes: Tensor) -> Tensor:
    """Frobenius norm of the covariance of each head's writes [N, L, H, K]: [L H]."""
    covariance = torch.einsum("nlhk,nlhj->lhkj", writes, writes)  # [L, H, K, K]
    return covariance.flatten(2).norm(dim=-1).flatten()


def head_inputs(model: NewGPT, idx: Tensor) -> list[Tensor]:
    """What the heads of each layer read of idx [n, T]: the residual stream, normed where a norm
    stands before attention, [n, T, D] each."""
    layers = range(model.cfg.n_layers)
    batches: list[list[Tensor]] = [[] for _ in layers]
    for batch in read_batches(model, idx, ["resid_pre"], layers):
        for layer, x in enumerate(batch.sites["resid_pre"]):
            block: Any = model.blocks[layer]
            batches[layer].append(block.norm_attn(x))  # [B, T, D]
    return [torch.cat(of_layer) for of_layer in batches]


def random_writes(model: NewGPT, inputs: list[Tensor], stride: int, seed: int) -> Tensor:
    """As `head_writes`, of as many random heads [N, L, H, K]. Each layer's heads keep their weights
    and read `inputs` [n, T, D] turned at random: as sharp and of as many dimensions as those that
    were trained, on the same text and stream, but nothing was learned about what to read."""
    generator = torch.Generator().manual_seed(seed)
    by_layer = []
    for layer, x in enumerate(inputs):
        block: Any = model.blocks[layer]
        attention = block.attn
        cos, sin = model.rotary(layer, x.shape[1])
        turn = random_rotation(x.shape[-1], generator).to(x)  # [D, D]
        # x turned, then read, is x read by turned weights
        turned = {"w_qkv.weight": attention.w_qkv.weight @ turn}
        z, _ = torch.func.functional_call(attention, turned, (x, cos, sin))  # [n, T, H, K]
        z = z[:, ::stride]
        isometric = torch.einsum("nthk,hjk->nthj", z, write_basis(model, layer))
        isometric = isometric / write_rms(block, z)[..., None]
        by_layer.append(isometric.flatten(0, 1))  # [N, H, K]
    writes = torch.stack(by_layer, 1)  # [N, L, H, K]
    return writes - writes.mean(0)


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], uniform over all of them (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return q * r.diagonal().sign()


# ---- heads over seeds: what is said of them. A new claim: a function and an entry in CLAIMS.
def middle_minus_others(heads: pd.DataFrame) -> float:
    """Mean stability in the middle third of the layers - in the others; nan: no middle layer."""
    in_middle = heads["depth"].between(1 / 3, 2 / 3)
    stability = heads["stability"]
    return stability[in_middle].mean() - stability[~in_middle].mean()


def stability_and_impact(heads: pd.DataFrame) -> float:
    """Spearman correlation over all heads whose ablation was measured."""
    measured = heads.dropna(subset=["impact"])
    return measured["stability"].rank().corr(measured["impact"].rank())


def within_layers(heads: pd.DataFrame) -> float:
    """The same among heads of one layer: correlation of the ranks in the layer, less their mean.
    Depth alone, which may move both, moves nothing here."""
    measured = heads.dropna(subset=["impact"])
    columns = ["stability", "impact"]
    # A layer may have few heads: the ranks of all layers make one correlation
    ranks = measured.groupby("layer")[columns].rank()
    centred = ranks - ranks.groupby(measured["layer"]).transform("mean")
    return centred["stability"].corr(centred["impact"])


@dataclass
class Claim:
    """A number of each pair of seeds, -1 to 1, and what it says if its interval is on one side of
    0."""

    label: str
    of_pair: Callable[[pd.DataFrame], float]  # from the heads of one seed beside another seed
    below: str
    above: str


# All are tested in each arm, so intervals are corrected for their number
CLAIMS = {
    "middle": Claim(
        "stability, middle third of the layers - the others",
        middle_minus_others,
        "heads of middle layers are the less stable",
        "heads of middle layers are the more stable",
    ),
    "impact": Claim(
        "Spearman, stability and impact, all heads",
        stability_and_impact,
        "less stable heads are the more important",
        "more stable heads are the more important",
    ),
    "impact_within": Claim(
        "Spearman, stability and impact, within layers",
        within_layers,
        "less stable heads are the more important of their layer",
        "more stable heads are the more important of their layer",
    ),
}


@dataclass
class OverSeeds:
    """A mean over pairs of seeds, with the interval over seeds; nan with fewer than MIN_SEEDS."""

    value: float
    ci_lo: float
    ci_hi: float
    n_seeds: int
    smallest: float  # distance from 0 that would be told from it in 80 % of such studies


def over_seeds(pairs: pd.Series, tests: int = 1) -> OverSeeds:
    """A number of each ordered pair of seeds (index: seed, other_seed) -> its mean and t interval,
    Bonferroni-corrected for `tests` intervals.

    Pairs that share a seed are alike, so n (n - 1) of them are no replicates. The mean over pairs
    is a U-statistic, and its error that of leaving out each seed in turn, with all of its pairs
    (jackknife; Arvesen 1969), which on average is not too small (Efron and Stein 1981).
    """
    # A row a seed whose heads look for a match, a column a seed where they look
    square = pairs.unstack().to_numpy(copy=True)  # [n, n]
    np.fill_diagonal(square, 0)  # no seed is its own pair
    n = len(square)
    total = square.sum()
    value = total / (n * (n - 1))
    if n < MIN_SEEDS:  # without any seed of two there is no pair
        return OverSeeds(value, np.nan, np.nan, n, np.nan)
    without = total - square.sum(0) - square.sum(1)  # [n], of the pairs that lack a seed
    without = without / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    critical = stats.t.isf(0.025 / tests, n - 1)
    half = critical * error
    return OverSeeds(value, value - half, value + half, n, error * found_in_80(n - 1, critical))


@functools.cache
def found_in_80(df: int, critical: float) -> float:
    """How many standard errors from 0 a mean must lie for |t| to exceed `critical` in 80 %."""

    def missing(distance: float) -> float:
        return stats.nct.sf(critical, df, distance) - 0.8

    return optimize.brentq(missing, 0, 10 * critical)


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """Of head_stability.csv each claim in each arm: its mean over pairs, with its interval."""
    arms = list(table["arm"].unique())
    rows = []
    for arm, name in itertools.product(arms, CLAIMS):
        pairs = table[table["arm"] == arm].groupby(["seed", "other_seed"])
        of_pairs = {pair: CLAIMS[name].of_pair(heads) for pair, heads in pairs}
        found = over_seeds(pd.Series(of_pairs), len(arms) * len(CLAIMS))
        rows.append({"arm": arm, "claim": name} | asdict(found))
    verdicts = pd.DataFrame(rows)
    # What is beyond the largest that there can be says nothing more
    ends = ["ci_lo", "ci_hi"]
    verdicts[ends] = verdicts[ends].clip(-1, 1)
    return verdicts


def verdict(found: pd.Series) -> str:
    """What a row of `judge` says, in words."""
    claim = CLAIMS[found["claim"]]
    n = f"{found['n_seeds']} seeds"
    if found["n_seeds"] < MIN_SEEDS:
        few = f"{n} are one pair, and an interval needs {MIN_SEEDS}"
        return f"cannot tell: {few}; no effect, however large, could have been found"
    if found["ci_hi"] < 0:
        return f"{claim.below} ({n})"
    if found["ci_lo"] > 0:
        return f"{claim.above} ({n})"
    if np.isnan(found["value"]):
        return f"cannot tell: not measured in every pair of {n}"
    if found["smallest"] > 1:
        return f"cannot tell: {n} would miss any effect, even 1, in more than 20 %"
    return f"cannot tell: {n} find {found['smallest']:.2g} or more in 80 %"


# ---- heads over seeds: what is read
def read_impacts(folder: Path) -> pd.DataFrame:
    """The heads of both arms in the mode that ranks them. Raises HandoffError if unreadable."""
    path = folder / "results_ablation.csv"
    try:
        # A name and a hash are text, though they may look like a number
        heads = csv_table(path, {"checkpoint": str, "ckpt_sha": str})
        summary = csv_table(folder / "results_ablation_summary.csv")
        # One ablation ranks the heads, others are beside it
        ranked_by = summary.groupby("run")["ranked_by"].first()
        of_mode = heads[heads["mode"] == heads["run"].map(ranked_by)]
        columns = ["run", "checkpoint", "ckpt_sha", "layer", "head", "mode", "delta"]
        return of_mode[columns].rename(columns={"delta": "impact"})
    except (OSError, ValueError, KeyError) as e:
        raise HandoffError(f"{path} cannot be read ({e!r}); make it with: make seeds") from None


def checkpoint_of(folder: Path, heads: pd.DataFrame) -> Path | None:
    """The checkpoint that these heads are of, told by its content; None if it is not there."""
    named = str(heads["checkpoint"].iloc[0])
    digest = str(heads["ckpt_sha"].iloc[0])
    path = find_checkpoint(named, digest, folder / "results_ablation.csv")
    return path if path.is_file() and sha256(path).startswith(digest) else None


def why_not_matched(folders: list[Path]) -> str:
    """What the folders lack to match heads over seeds; empty if nothing."""
    for folder in folders:
        if not (folder / "results_ablation.csv").is_file():
            return f"{folder} has no results_ablation.csv"
        heads = read_impacts(folder)
        for arm in COLOURS:
            of_arm = heads[heads["run"] == arm]
            if of_arm.empty or checkpoint_of(folder, of_arm) is None:
                return f"the checkpoint of the {arm} arm of {folder} is not there"
    return ""


def read_models(folders: list[Path], arm: str, cache_dir: str) -> tuple[list[Trained], Tensor]:
    """The models of one arm, and the validation windows [n, T] that all of them read. Raises
    HandoffError where they cannot read the same text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = []
    texts = {}  # tokenizer and context: one pair, or the models differ
    for folder in folders:
        heads = read_impacts(folder)
        heads = heads[heads["run"] == arm].drop(columns="run")
        path = checkpoint_of(folder, heads)
        model, ckpt = load_checkpoint(path, device, skip_probe=False)
        impact = heads.drop(columns=["checkpoint", "ckpt_sha"])
        runs.append(Trained(read_arguments(folder)["seed"], model.requires_grad_(False), impact))
        texts[ckpt["data"]["tokenizer_hash"], model.cfg.seq_len] = (path, ckpt)
    if len(texts) > 1:
        differ = " and ".join([str(path) for path, _ in texts.values()])
        raise HandoffError(f"{differ} differ in tokenizer or context: no text is read by both")

    # All seeds learned from the same text, in another order
    path, ckpt = next(iter(texts.values()))
    tokenizer = str(path.with_name("tokenizer.json"))
    seq_len = ckpt["config"]["seq_len"]
    where = (seq_len, "validation", cache_dir, ckpt.get("bos"))
    val = HFWikiTextLoader(find_text(ckpt, path), tokenizer, *where)
    windows = val.spread(max(N_WINDOWS, math.ceil(N_POSITIONS / seq_len)))
    idx, _ = val.batch(windows)  # [n, T]
    return runs, idx.to(device)


@torch.no_grad()
def match_arms(folders: list[Path], cache_dir: str) -> pd.DataFrame:
    """head_stability.csv: both arms, each matched over seeds within itself."""
    tables = []
    for arm in COLOURS:
        runs, idx = read_models(folders, arm, cache_dir)
        table = match_seeds(runs, idx)
        table.insert(0, "arm", arm)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


# ------------------------------------------------------------------------------ tables and figures
def draw(rows: pd.DataFrame, summary: pd.DataFrame, is_stacked: bool = False) -> plt.Figure:
    """A panel a metric, a line a seed."""
    grid, size = ((6, 1), (4.5, 17)) if is_stacked else ((2, 3), (11, 6.4))
    fig, axes = plt.subplots(*grid, figsize=size, layout="constrained")
    differences = summary.set_index("metric")
    for ax, (metric, label) in zip(axes.flat, METRICS.items(), strict=True):
        of_metric = rows[rows["metric"] == metric]
        wide = of_metric.pivot(index="seed", columns="arm", values="value")
        for seed, values in wide.iterrows():  # both arms of a seed share data and initial weights
            ax.plot([0, 1], values[list(COLOURS)], color="0.6", lw=1, zorder=1)
            beside = dict(xytext=(6, 0), textcoords="offset points", va="center")
            ax.annotate(f"{seed}", (1, values["control"]), fontsize=8, **beside)
        # The adaptive arm stands at 0, the control at 1: what the lines connect
        for place, (arm, colour) in enumerate(COLOURS.items()):
            ax.scatter([place] * len(wide), wide[arm], color=colour, zorder=2)
        ax.set(title=label, xticks=[0, 1], xticklabels=list(COLOURS), xlim=(-0.3, 1.3))
        found = differences.loc[metric]
        interval = f"[{found['ci_lo']:+.3g}, {found['ci_hi']:+.3g}]"
        ax.set_xlabel(f"difference {found['difference']:+.3g} {interval}", fontsize=9)
        ax.margins(y=0.15)  # the labels of the seeds stay in the frame
    n_seeds = summary["n_seeds"].iloc[0]
    note = f"{n_seeds} training seeds (numbers at the right), both arms each; difference: "
    note += f"adaptive - control, paired t interval, 95 % over all {len(METRICS)} panels"
    fig.supxlabel(textwrap.fill(note, round(13 * size[0])), fontsize=8.5)
    return fig


def tell(summary: pd.DataFrame, loops: pd.DataFrame) -> None:
    """Prints what the tables say."""
    n_seeds = len(loops)
    corrected = f"intervals and p corrected for {len(METRICS)} metrics"
    print(f"{n_seeds} seeds; adaptive - control, paired; {corrected}")
    # Two of the 2^n sign patterns are as extreme as all signs equal
    smallest = min(1, BONFERRONI * 2 / 2**n_seeds)
    print(f"the smallest p that flipping signs can give with {n_seeds} seeds: {smallest:.3g}\n")
    print(summary.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    table = loops.to_string(index=False, float_format=lambda v: f"{v:.3g}")
    print(f"\nthe loop, seed by seed\n{table}")
    # What the Homeostat claims: it holds its setpoint, and without it sigma would be elsewhere
    held = loops["share"] >= 0.9
    apart = loops["control_over_setpoint"] >= 2
    claim = "90 % of samples within 10 % of the setpoint, control at least 2 times above it"
    print(f"\n{(held & apart).sum()} of {n_seeds} seeds: {claim}")


def draw_stability(table: pd.DataFrame, is_stacked: bool = False) -> plt.Figure:
    """Two panels an arm: stability by depth beside its null, and impact against stability."""
    arms = list(table["arm"].unique())
    across = 1 if is_stacked else len(arms)
    size = (4.5, 15.5) if is_stacked else (10.5, 7.6)
    grid = (2 * len(arms) // across, across)
    fig, axes = plt.subplots(*grid, figsize=size, layout="constrained", squeeze=False)
    verdicts = judge(table).set_index(["arm", "claim"])
    for i, arm in enumerate(arms):
        upper, lower = axes.reshape(2, -1)[:, i]
        heads = table[table["arm"] == arm]
        draw_depth(upper, heads)
        draw_impact(lower, heads, verdicts.loc[(arm, "impact_within")])
    n_seeds = table["seed"].nunique()
    note = f"{n_seeds} training seeds. A head's match: the head of another seed that writes most "
    note += "nearly the same on the same tokens. Pale dots: heads, means over the "
    note += "other seeds; line: mean of the layer. Grey: the same search among random heads, the "
    note += f"mean (dashed) and the lowest to the highest of {N_RANDOM} draws. Stability: 0 is "
    note += "that mean, 1 the same head. "
    if n_seeds < MIN_SEEDS:
        note += f"No intervals: fewer than {MIN_SEEDS} seeds."
    else:
        note += "Bars: 95 % over seeds, each by itself; of rho for all claims together."
    fig.supxlabel(textwrap.fill(note, round(13 * size[0])), fontsize=8.5)
    return fig


def draw_depth(ax: plt.Axes, heads: pd.DataFrame) -> None:
    """Panel: CKA of heads with their matches, by relative depth, with the null's band."""
    arm = heads["arm"].iloc[0]
    # The band is that of one head's search, averaged over heads and pairs
    null = heads.groupby("depth")[["null_lo", "null", "null_hi"]].mean()
    ax.fill_between(null.index, null["null_lo"], null["null_hi"], color="0.7", lw=0, alpha=0.6)
    ax.plot(null.index, null["null"], color="0.45", ls="--")
    by_head = heads.groupby(["seed", "layer", "head"])[["depth", "cka"]].mean()
    ax.scatter(by_head["depth"], by_head["cka"], s=14, color=COLOURS[arm], alpha=0.4, lw=0)

    # Of each layer the mean over its heads and all pairs of seeds
    found = []
    for _, of_layer in heads.groupby("depth"):
        found.append(over_seeds(of_layer.groupby(["seed", "other_seed"])["cka"].mean()))
    mean = np.array([layer.value for layer in found])  # [L]
    low = np.array([layer.ci_lo for layer in found]).clip(0, 1)  # [L], no CKA lies outside
    high = np.array([layer.ci_hi for layer in found]).clip(0, 1)  # [L]
    bars = None if np.isnan(low).all() else [mean - low, high - mean]
    style = dict(color=COLOURS[arm], marker="o", ms=5, elinewidth=1, capsize=2.5)
    ax.errorbar(null.index, mean, bars, **style)
    ax.set(xlabel="relative depth (0: first layer, 1: last)", ylabel="CKA with the match")
    ax.set_ylim(0, 1.03)
    ax.set_title(f"{arm}: does another seed grow the same head?", fontsize=10)


def draw_impact(ax: plt.Axes, heads: pd.DataFrame, found: pd.Series) -> None:
    """Panel: impact of heads against their stability, and their correlation within layers."""
    # A head has one impact, and a stability beside each other seed
    columns = ["depth", "stability", "impact"]
    by_head = heads.groupby(["seed", "layer", "head"])[columns].mean()
    style = dict(c=by_head["depth"], cmap="viridis", vmin=0, vmax=1, s=22)
    dots = ax.scatter(by_head["stability"], by_head["impact"], **style)
    ax.figure.colorbar(dots, ax=ax, label="relative depth")
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_ylabel("impact (nats a token)")
    rho = with_interval(found, 2)
    ax.set_xlabel(f"stability over seeds\nwithin layers: Spearman rho {rho}")
    ax.set_title(f"{heads['arm'].iloc[0]}: are less stable heads the more important?", fontsize=10)


def tell_stability(table: pd.DataFrame) -> None:
    """Prints what head_stability.csv says."""
    for arm, heads in table.groupby("arm", sort=False):
        above = heads["cka"] > heads["null_hi"]
        n_seeds = heads["seed"].nunique()
        print(f"\n{arm}: heads of {n_seeds} seeds, each with its best match in every other seed")
        chance = f"by chance {1 / (N_RANDOM + 1):.0%}"
        print(f"above all {N_RANDOM} draws of random heads: {above.mean():.0%} ({chance})")
        by_layer = heads.assign(above_null=above).groupby(["layer", "depth"])
        columns = ["cka", "null", "null_hi", "null_text", "stability", "above_null"]
        means = by_layer[columns].mean().reset_index()
        print(means.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    verdicts = judge(table)
    print(f"\nover seeds (95 %, t on the jackknife over seeds, corrected for {len(verdicts)})")
    for _, found in verdicts.iterrows():
        print(f"{found['arm']}: {CLAIMS[found['claim']].label}")
        print(f"    {with_interval(found, 3)}: {verdict(found)}")


def with_interval(found: pd.Series, digits: int) -> str:
    """A mean over pairs as text, with its interval where there is one."""
    text = f"{found['value']:+.{digits}f}"
    if np.isnan(found["ci_lo"]):
        return text
    return f"{text} [{found['ci_lo']:+.{digits}f}, {found['ci_hi']:+.{digits}f}]"


# --------------------------------------------------------------------------------------------- run
def run(args: argparse.Namespace) -> int:
    if args.redraw:
        return redraw(args.save_dir)
    rows, loops = measure_all(args.runs)
    summary = paired(rows)
    tables = {"seeds": rows, "seeds_summary": summary, "seeds_loops": loops}
    for name, table in tables.items():
        with atomic(args.save_dir / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)
    tell(summary, loops)
    again = ["tools/seeds.py", "--redraw", "--save_dir", args.save_dir]
    csvs = [args.save_dir / f"{name}.csv" for name in tables]
    picture = args.save_dir / "seeds.png"
    with drawing(csvs, again):
        save_figure(functools.partial(draw, rows, summary), picture)
    print(f"Read {picture}, seeds.csv, seeds_summary.csv, seeds_loops.csv")

    # Heads last: what is said of the arms needs no checkpoint
    lacking = why_not_matched(args.runs)
    if lacking:
        print(f"Heads were not matched over seeds: {lacking}")
        return 0
    n_pairs = len(args.runs) * (len(args.runs) - 1)
    cost = "for the demo's models some 5 s of one core each"
    print(f"\nMatching heads over seeds: {n_pairs} ordered pairs an arm, {cost}")
    table = match_arms(args.runs, args.cache_dir)
    csv = args.save_dir / "head_stability.csv"
    with atomic(csv) as tmp:
        table.to_csv(tmp, index=False, float_format="%.6g")
    table = read_csv(csv, STABILITY_COLUMNS)  # as --redraw has it
    tell_stability(table)
    with drawing([*csvs, csv], again):
        save_figure(functools.partial(draw_stability, table), csv.with_suffix(".png"))
    print(f"Read {csv.with_suffix('.png')}, {csv.name}")
    return 0


def read_csv(path: Path, columns: set[str]) -> pd.DataFrame:
    """A table of this tool. Raises HandoffError if it is not one."""
    try:
        table = csv_table(path)
    except ValueError as e:
        raise HandoffError(f"{path} is not a CSV ({e}); make it with: make seeds") from None
    lacking = sorted(columns - set(table))
    if lacking or table.empty:
        fact = f"has no columns {lacking}" if lacking else "has no rows"
        raise HandoffError(f"{path} {fact}; make it with: make seeds")
    return table


def redraw(folder: Path) -> int:
    """Draws what there is a CSV of. Raises HandoffError if there is none."""
    drawn = []
    of_arms = folder / "seeds.csv"
    if of_arms.is_file():
        rows = read_csv(of_arms, {"seed", "arm", "metric", "value"})
        if set(rows["arm"]) != {"adaptive", "control"}:
            found = ", ".join(sorted(map(str, set(rows["arm"]))))
            fact = f"{of_arms} has the arms {found}; expected adaptive and control"
            raise HandoffError(f"{fact}; make it with: make seeds")
        wanted = {"metric", "n_seeds", "difference", "ci_lo", "ci_hi"}
        summary = read_csv(folder / "seeds_summary.csv", wanted)
        drawn.append(of_arms.with_suffix(".png"))
        save_figure(functools.partial(draw, rows, summary), drawn[-1])
    # Older folders, and those without checkpoints, have no heads
    of_heads = folder / "head_stability.csv"
    if of_heads.is_file():
        table = read_csv(of_heads, STABILITY_COLUMNS)
        tell_stability(table)
        drawn.append(of_heads.with_suffix(".png"))
        save_figure(functools.partial(draw_stability, table), drawn[-1])
    if not drawn:
        missing = f"{folder} has no seeds.csv and no head_stability.csv"
        raise HandoffError(f"{missing}; make them with: make seeds")
    print(f"Read {', '.join(map(str, drawn))}")
    return 0


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    cache = os.environ.get("JANUS_CACHE", "~/.cache/janus_arc")
    redraw_help = "only draw again what --save_dir has the CSVs of, without any run"
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.add_argument("runs", type=Path, nargs="*", help="folders of `make seeds`, one a seed")
    p.add_argument("--save_dir", type=Path, default=Path("results"), help="output folder")
    p.add_argument("--redraw", action="store_true", help=redraw_help)
    p.add_argument("--cache_dir", default=cache, help="folder of the token cache")
    args = p.parse_args(argv)
    if not args.runs and not args.redraw:
        p.error("folders of runs are needed (or --redraw)")
    return args


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

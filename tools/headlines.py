"""Print the headline numbers of a finished pipeline, each with its uncertainty.

    python tools/headlines.py runs/demo

They come from the CSVs alone, and from one bigram model of the training text. The folder holds
<arm>/telemetry.csv and validation.csv of both arms, results_ablation*.csv, saes/sae_metrics.csv
and hero_analysis/.
What is printed is also written to <folder>/headlines.csv, one number a row.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hero_head_analysis import MIN_DOCUMENTS, Ratio, ratio_of_sums  # noqa: E402
from janus_adaptive import (  # noqa: E402
    CHECKPOINT_SCHEMA,
    HandoffError,
    HFWikiTextLoader,
    atomic,
    count_ids,
    one_line_errors,
    read_sidecar,
    read_telemetry,
)

ARMS = ("adaptive", "control")
Headline = tuple[str, str]  # what was measured, and the number with its uncertainty


# ------------------------------------------------------------------------------------------- method
def bigram_loss(train: np.ndarray, inputs: np.ndarray, targets: np.ndarray, n_kinds: int) -> float:
    """Loss (nats a token) of a bigram model of `train` [N] for targets [n], each after its input
    [n]; token ids below n_kinds.

    Interpolated with an add-one unigram, as Witten and Bell (1991) do. With u(v) the number of
    kinds of token seen after v:  p(w | v) = (c(v, w) + u(v) p(w)) / (c(v) + u(v)).
    """
    train = np.asarray(train, np.int64)
    v = np.asarray(inputs, np.int64)
    w = np.asarray(targets, np.int64)
    unigram = (np.bincount(train, minlength=n_kinds) + 1) / (len(train) + n_kinds)  # [V], p(w)

    # The pair (v, w) as one number v V + w: those of `train`, sorted, each with its count c(v, w)
    pairs, pair_counts = np.unique(train[:-1] * n_kinds + train[1:], return_counts=True)
    kinds_after = np.bincount(pairs // n_kinds, minlength=n_kinds)  # [V], u(v)
    count = np.bincount(train[:-1], minlength=n_kinds)  # [V], c(v)

    wanted = v * n_kinds + w
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)  # [n], c(v, w)
    interpolated = (seen + kinds_after[v] * unigram[w]) / np.maximum(count[v] + kinds_after[v], 1)
    p = np.where(count[v] > 0, interpolated, unigram[w])  # nothing is known of what follows a new v
    return float(-np.log(p).mean())


@dataclass
class Tracking:
    """How well a closed loop held its setpoint.

    Of the n samples from settled_step on, the first one within 10 % after the hand-over: the share
    within 10 % of the setpoint, filtered (share) and as measured (raw_share); what white noise
    around the setpoint, of the size of the samples' own, would give through the same filter with
    no loop at all (noise_share); mean and standard deviation of the filtered sigma over the
    setpoint. hold_mean: its mean while the integral was frozen. NaN where there was no sample.
    """

    settled_step: float
    n: int
    share: float
    raw_share: float
    noise_share: float
    mean: float
    sd: float
    hold_mean: float


def tracking(telemetry: pd.DataFrame, target: float, filter_beta: float) -> Tracking:
    """How the closed loop (phase auto) of a run held `target`, or the setpoint of each row."""
    aim = telemetry.get("setpoint", target)
    filtered = telemetry["sigma_filtered"] / aim  # what the controller acts on; 1 is the setpoint
    measured = telemetry[["sigma_z", "sigma_resid"]].max(axis=1) / aim  # one of them is filled
    # hold: the learning rate has decayed, heads hardly respond, and the integral stands still
    hold_mean = filtered[telemetry["phase"] == "hold"].mean()
    # auto: the loop is closed, so this is what the controller answers for
    auto = telemetry["phase"] == "auto"
    inside = is_within(filtered[auto])  # [samples]
    if not inside.any():
        nothing = math.nan
        return Tracking(nothing, 0, 0.0, nothing, nothing, nothing, nothing, hold_mean)
    first = int(inside.argmax())  # the approach before it says nothing about how well it holds
    settled = filtered[auto].iloc[first:]
    raw = measured[auto].iloc[first:]
    return Tracking(
        settled_step=float(telemetry["step"][auto].iloc[first]),
        n=len(settled),
        share=inside[first:].mean(),
        raw_share=is_within(raw).mean(),
        noise_share=share_of_noise(raw, filter_beta),
        mean=settled.mean(),
        sd=settled.std(ddof=0),
        hold_mean=hold_mean,
    )


def is_within(relative: pd.Series) -> np.ndarray:
    """Which values, relative to the setpoint, are within 10 % of it [samples]."""
    return np.abs(relative.to_numpy() - 1) <= 0.10


def share_of_noise(relative: pd.Series, filter_beta: float) -> float:
    """Share within 10 % of the setpoint of filtered white noise around it, as large as that of
    these samples (normal in ln sigma). The noise is half of the squared difference of neighbours
    (von Neumann 1941), which slow changes hardly touch."""
    differences = np.diff(np.log(relative.to_numpy()))
    noise = math.sqrt(np.square(differences).mean() / 2) if len(differences) else math.nan
    filtered = noise * math.sqrt((1 - filter_beta) / (1 + filter_beta))
    return stats.norm.cdf(math.log(1.1) / filtered) - stats.norm.cdf(math.log(0.9) / filtered)


def after_settling(telemetry: pd.DataFrame, held: Tracking) -> float:
    """Mean sigma of an arm over the steps in which the other's loop had settled (`held`)."""
    sigma = telemetry[["sigma_z", "sigma_resid"]].max(axis=1)  # one of them is filled
    return sigma[telemetry["step"] >= held.settled_step].mean()


def last_value(telemetry: pd.DataFrame, column: str) -> float:
    """The last number of a column that is measured every so many steps only."""
    return telemetry[column].dropna().iloc[-1]


# -------------------------------------------------------------------------------------------- files
def read(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV of the pipeline. Raises HandoffError if it is missing, empty, or another kind."""
    try:
        frame = pd.read_csv(path)
        if frame[columns].empty:
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError) as e:
        advice = "make it with: make demo"
        raise HandoffError(f"{path} is missing or incomplete ({e}); {advice}") from None
    return frame


def bigram_of(folder: Path, arguments: dict[str, Any]) -> float:
    """Bigram loss on the validation windows that the arms of this folder were measured on."""
    tokenizer = str(folder / "adaptive" / "tokenizer.json")
    checkpoint = folder / "adaptive" / "janus_adaptive_final.pt"
    # Windows that begin with a token of their own (--bos) have their targets one place earlier
    bos = read_sidecar(checkpoint, CHECKPOINT_SCHEMA, "make demo").get("bos")

    def split(name: str) -> HFWikiTextLoader:
        dataset, seq_len = arguments["dataset"], arguments["seq_len"]
        return HFWikiTextLoader(dataset, tokenizer, seq_len, name, arguments["cache_dir"], bos)

    train = split("train")
    val = split("validation")
    windows = np.arange(val.n_windows)
    csv = folder / "adaptive" / "validation.csv"
    if csv.is_file():  # runs of before it was written took them all
        windows = read(csv, ["window"])["window"].to_numpy()
    inputs, targets = val.batch(windows)  # [W, T] each
    n_kinds = count_ids(train.tokenizer)
    return bigram_loss(train.tokens, inputs.flatten().numpy(), targets.flatten().numpy(), n_kinds)


def paired_losses(folder: Path) -> tuple[pd.DataFrame, str]:
    """Losses of both arms on the same windows: columns document, adaptive, control; a row a window.
    And in words which windows: those that phase 1 validated on, or, in runs of before
    validation.csv, those of the ablation. Raises HandoffError where the arms were validated on
    different texts."""
    paths = [folder / arm / "validation.csv" for arm in ARMS]
    if not all(path.is_file() for path in paths):
        # Phase 4 took the same sequences through both models
        with np.load(folder / "results_ablation.npz", allow_pickle=False) as npz:
            table = {arm: npz[f"{arm}.base"] for arm in ARMS}  # [sequences] each, nats a token
            which = "sequences of the ablation, not the whole split: no validation.csv"
            return pd.DataFrame({"document": npz["documents"], **table}), which
    # Written by phase 1, of the model as it was at the end
    adaptive, control = (read(path, ["window", "document", "loss_nats"]) for path in paths)
    places = ["window", "document"]
    # Rows are paired by their place
    if not adaptive[places].equals(control[places]):
        found = f"{paths[0]} and {paths[1]} are of different windows"
        raise HandoffError(f"{found}; expected arms of one text; train both again: make retrain")
    losses = {"adaptive": adaptive["loss_nats"], "control": control["loss_nats"]}
    # --val_windows leaves gaps between them
    is_whole = adaptive["window"].tolist() == list(range(len(adaptive)))
    which = "windows: the whole validation split"
    if not is_whole:
        which = "windows spread over the validation split"
    return pd.DataFrame({"document": adaptive["document"], **losses}), which


@dataclass
class Price:
    """What the pressure costs: loss of the adaptive arm - loss of the control, on the same windows.

    nats, relative: the difference a token, and as a share of the control's loss, each with its 95 %
    interval over documents; NaN ends where there are too few.
    """

    nats: Ratio
    relative: Ratio
    n_documents: int
    n_windows: int
    which: str  # windows they are, in words

    @property
    def measured_on(self) -> str:
        """In words, which windows they are."""
        return f"{self.n_documents:,} documents, {self.n_windows:,} {self.which}"

    @property
    def interval(self) -> str:
        """Of the share, in per cent."""
        # The ends are missing together
        if math.isnan(self.relative.low):
            return f"no interval: {self.n_documents} documents are too few"
        return f"[{100 * self.relative.low:+.2f}, {100 * self.relative.high:+.2f}]"


def price(folder: Path) -> Price:
    """The price of the pressure, paired by window. Documents are the units: the windows of one are
    alike, and a document of many windows weighs more."""
    losses, which = paired_losses(folder)
    # Both arms read the same windows, so what makes a text hard cancels
    difference = losses["adaptive"] - losses["control"]  # [windows], nats a token
    sums = losses.assign(difference=difference, windows=1.0).groupby("document").sum()
    of_document = {name: sums[name].to_numpy() for name in sums}  # [documents] each
    # Sums, not means: a document weighs as much as it is long
    extra = of_document["difference"]
    return Price(
        nats=ratio_of_sums(extra, of_document["windows"], MIN_DOCUMENTS),
        relative=ratio_of_sums(extra, of_document["control"], MIN_DOCUMENTS),
        n_documents=len(sums),
        n_windows=len(losses),
        which=which,
    )


# ---------------------------------------------------------------------------------------- headlines
def losses(folder: Path, telemetry: dict[str, pd.DataFrame], bigram: float) -> list[Headline]:
    """Validation loss of both arms, and what the pressure costs, paired by document."""
    loss = {arm: last_value(telemetry[arm], "val_loss") for arm in ARMS}
    paid = price(folder)
    # Without an interval the price is only described
    in_nats = ""
    if not math.isnan(paid.nats.low):
        in_nats = f" [{paid.nats.low:+.4f}, {paid.nats.high:+.4f}]"
    share = f"{100 * paid.relative.value:+.2f} % {paid.interval} of the loss"
    return [
        (
            "validation loss, nats a token",
            f"adaptive {loss['adaptive']:.4f}, control {loss['control']:.4f}; "
            f"interpolated bigram {bigram:.4f}",
        ),
        (
            "price of the pressure, nats a token",
            f"{paid.nats.value:+.4f}{in_nats}, {share} (95 % CI over {paid.measured_on}; one seed)",
        ),
    ]


def sigma_against_setpoint(
    telemetry: dict[str, pd.DataFrame], arguments: dict[str, Any]
) -> Headline:
    """How the loop held the adaptive arm, and how far above the setpoint the control stays."""
    target = arguments["target_sigma"]
    held = tracking(telemetry["adaptive"], target, arguments["filter_beta"])
    control = telemetry["control"]
    whole = {arm: last_value(telemetry[arm], "val_sigma_z") for arm in ARMS}
    if held.n:
        free = after_settling(control, held)
        hold = ""
        if not np.isnan(held.hold_mean):
            hold = f" (mean {held.hold_mean:.2f} in the hold phase at the end)"
        loop = (
            f"filtered sigma {held.mean:.3f} +- {held.sd:.3f} of it "
            f"from step {held.settled_step:.0f} on, "
            f"{held.share:.0%} of {held.n} samples within 10 %{hold}, "
            f"{held.raw_share:.0%} unfiltered; "
            f"noise of their size alone, filtered, would give {held.noise_share:.0%}; "
        )
    else:
        free = control["sigma_z"].mean()  # nothing settled, so over the whole run
        loop = "filtered sigma never came within 10 % of it; "
    return (
        f"sigma against its setpoint {target:g}",
        f"{loop}control {free:.4f}, {free / target:.2f} times the setpoint "
        "(validation split, where sampling adds less: "
        f"adaptive {whole['adaptive']:.4f}, control {whole['control']:.4f})",
    )


def sae_quality(folder: Path) -> list[Headline]:
    """Mean unexplained variance of each arm's SAEs of layers, with its standard error over layers;
    and the gain over normal rows of the same covariance, where those were trained on. Where there
    are SAEs of single heads alone, of these."""
    columns = ["run", "layer", "l0", "fvu", "fvu_lo", "fvu_hi"]
    saes = read(folder / "saes" / "sae_metrics.csv", columns)
    unit = "layer"
    if "unit" in saes and (saes["unit"] == "layer").any():
        saes = saes[saes["unit"] == "layer"]  # those of single heads have an L0 of their own
    elif "unit" in saes:
        unit = saes["unit"].iloc[0]
    # Layers are the units, also where each has several SAEs
    by_layer = saes.groupby(["run", "layer"]).mean(numeric_only=True)
    over_layers = by_layer["fvu"].groupby("run").agg(["mean", "sem", "count"])
    arms = []
    for run, fvu in over_layers.iterrows():
        spread = f"(s.e. over {fvu['count']:.0f} layers)"
        arms.append(f"{run} {fvu['mean']:.3f} +- {fvu['sem']:.3f} {spread}")
    number = f"{'; '.join(arms)}, L0 {saes['l0'].mean():.1f}"
    found = [(f"SAE of a {unit}: unexplained variance (FVU)", number)]
    if "gain_gaussian" in by_layer:
        gains = []
        for run, of_run in by_layer.dropna(subset="gain_gaussian").groupby("run"):
            gain = 100 * of_run["gain_gaussian"]
            span = f"(layers {gain.min():.0f} to {gain.max():.0f})"
            if len(gain) == 1:
                low, high = 100 * of_run[["gain_gaussian_lo", "gain_gaussian_hi"]].iloc[0]
                span = f"[{low:.0f}, {high:.0f}], layer {gain.index[0][1]}"
            gains.append(f"{run} {gain.mean():.0f} % {span}")
        found.append((f"SAE of a {unit}: gain over normal rows", "; ".join(gains)))
    return found


def hero_heads(folder: Path) -> list[Headline]:
    """The head that each arm would miss most, by the mode of ablation that heads are ranked by."""
    columns = ["run", "mode", "hero_layer", "unique_hero", "crossfit", "n_unit", "unit"]
    summary = read(folder / "results_ablation_summary.csv", columns)
    found = []
    # Every mode has rows; the ranking, and so the hero, comes from one of them
    for _, arm in summary[summary["mode"] == summary["ranked_by"]].iterrows():
        head = f"L{arm['hero_layer']:.0f}H{arm['hero_head']:.0f}"
        n = f"{arm['n_unit']:.0f} {arm['unit']}, {arm['n_seq']:.0f} sequences"
        if np.isnan(arm["crossfit"]):  # too few documents to say more
            verdict = f"no unique hero (first: {head}), no interval: {n}"
            found.append((f"Hero Head, {arm['run']}", verdict))
            continue
        verdict = head if arm["unique_hero"] else f"no unique hero (first: {head})"
        interval = f"[{arm['crossfit_lo']:+.4f}, {arm['crossfit_hi']:+.4f}]"
        # Cross-fitted: picked on one half of the documents, measured on the other
        impact = f"{arm['crossfit']:+.4f} {interval} nats (cross-fitted)"
        leads = f"in front in {arm['p_top1']:.0%} of resamples"
        found.append((f"Hero Head, {arm['run']}", f"{verdict}: {impact}, {leads}; {n}"))
    return found


def best_mechanism(folder: Path) -> Headline:
    """What the hero attends to: the kind of keys that alone preserve most of its impact."""
    columns = ["role", "kind", "mechanism", "value", "ci_low", "ci_high", "sequences", "tests"]
    parts = read(folder / "hero_analysis" / "hero_preserving.csv", columns)
    # Of the hero's mechanisms, those that keep its attention to one kind of key and nothing else
    keys = parts[(parts["role"] == "hero") & parts["mechanism"].str.startswith("keys:")]
    claimed = keys[keys["kind"] == "claimed"].set_index("mechanism")
    # As many keys drawn at random preserve what any attention would
    chance = keys[keys["kind"] == "matched-random"].set_index("mechanism")
    name = claimed["value"].idxmax()
    best = claimed.loc[name]
    interval = f"{best['value']:.0%} [{best['ci_low']:.0%}, {best['ci_high']:.0%}]"
    return (
        f"explained by attending to {name.removeprefix('keys: ')}",
        f"{interval} of its impact; random keys {chance.loc[name, 'value']:.0%}; "
        f"{best['sequences']:.0f} sequences of {best['n']:.0f} documents "
        f"of the {best['split']} split, "
        f"best of {len(claimed)}, interval simultaneous for {best['tests']:.0f}",
    )


def headlines(folder: Path) -> list[Headline]:
    """Every headline of a finished pipeline. Raises HandoffError where a phase is missing."""
    telemetry = {arm: read_telemetry(folder / arm / "telemetry.csv") for arm in ARMS}
    # Both arms were trained with the same arguments but --pressure
    record = (folder / "adaptive" / "run.json").read_text(encoding="utf-8")
    arguments = json.loads(record)["arguments"]
    bigram = bigram_of(folder, arguments)
    return [
        *losses(folder, telemetry, bigram),
        sigma_against_setpoint(telemetry, arguments),
        *sae_quality(folder),
        *hero_heads(folder),
        best_mechanism(folder),
    ]


WHERE_TO_LOOK = {
    "training.png": "what the Homeostat did",
    "activations": "figure 1, table 1",
    "saes": "figures 2 and 3, table 2",
    "results_ablation_figure4.png": "figure 4; table 3 beside it",
    "hero_analysis/hero_report.html": "the hero: open in a browser",
}


def run(args: argparse.Namespace) -> int:
    numbers = headlines(args.folder)
    print(f"\nHeadlines of {args.folder}")
    for what, number in numbers:
        print(f"  {what}: {number}")
    with atomic(args.folder / "headlines.csv") as tmp:
        pd.DataFrame(numbers, columns=["what", "number"]).to_csv(tmp, index=False)
    print("\nWhere to look")
    for name, about in WHERE_TO_LOOK.items():
        print(f"  {args.folder / name}: {about}")
    return 0


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.add_argument("folder", type=Path, help="output folder of the pipeline, e.g. runs/demo")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

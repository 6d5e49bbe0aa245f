"""Print the headline numbers of a finished pipeline, each with its uncertainty, from the CSVs alone (and one bigram model).

    python tools/headlines.py runs/demo

The folder holds <arm>/telemetry.csv of both arms, results_ablation*.csv, saes/sae_metrics.csv and hero_analysis/. What is
printed is also written to <folder>/headlines.csv, one number a row.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from janus_adaptive import HandoffError, HFWikiTextLoader, atomic, one_line_errors, read_telemetry  # noqa: E402


def bigram_loss(train: np.ndarray, val: np.ndarray, n_kinds: int) -> float:
    """Loss (nats a token) on `val` [n + 1] of a bigram model of `train`, interpolated with an add-one unigram.

    Witten-Bell: p(w | v) = (c(v, w) + u(v) p(w)) / (c(v) + u(v)), u(v) the number of kinds of token seen after v.
    """
    train, val = np.asarray(train, np.int64), np.asarray(val, np.int64)
    unigram = (np.bincount(train, minlength=n_kinds) + 1) / (len(train) + n_kinds)
    pairs, counts = np.unique(train[:-1] * n_kinds + train[1:], return_counts=True)
    kinds, total = np.bincount(pairs // n_kinds, minlength=n_kinds), np.bincount(train[:-1], minlength=n_kinds)
    v, w = val[:-1], val[1:]
    at = np.minimum(np.searchsorted(pairs, v * n_kinds + w), len(pairs) - 1)
    seen = np.where(pairs[at] == v * n_kinds + w, counts[at], 0)
    p = np.where(total[v] > 0, (seen + kinds[v] * unigram[w]) / np.maximum(total[v] + kinds[v], 1), unigram[w])
    return float(-np.log(p).mean())


def tracking(telemetry: pd.DataFrame, target: float) -> dict[str, float]:
    """How well the filtered sigma, which the controller acts on, was held while the loop was closed (phase auto).

    settled_step: the first sample within 10 % of target after the hand-over; of the n samples from there on, the share within
    10 %, and mean and standard deviation relative to the target. hold_mean: mean while the integral was frozen.
    """
    relative = telemetry["sigma_filtered"] / target
    hold_mean = relative[telemetry["phase"] == "hold"].mean()
    auto = telemetry["phase"] == "auto"
    step, relative = telemetry["step"][auto].to_numpy(), relative[auto].to_numpy()
    inside = np.abs(relative - 1) <= 0.10
    first = int(inside.argmax()) if inside.any() else len(inside)
    if not inside.any():
        return {"settled_step": np.nan, "share": 0.0, "mean": np.nan, "sd": np.nan, "n": 0, "hold_mean": hold_mean}
    held = {"settled_step": float(step[first]), "share": inside[first:].mean(), "n": len(relative) - first, "hold_mean": hold_mean}
    return held | {"mean": relative[first:].mean(), "sd": relative[first:].std()}


def read(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV of the pipeline; HandoffError if it is missing or another kind."""
    try:
        frame = pd.read_csv(path)
        return frame if len(frame[columns]) else frame.iloc[:0][["no rows"]]
    except (OSError, ValueError, KeyError) as e:
        raise HandoffError(f"{path} is missing or incomplete ({e}); make it with: make demo") from None


def headlines(folder: Path) -> list[tuple[str, str]]:
    """(what, number with its uncertainty) for every headline."""
    telemetry = {arm: read_telemetry(folder / arm / "telemetry.csv") for arm in ("adaptive", "control")}
    record = json.loads((folder / "adaptive" / "run.json").read_text())["arguments"]
    train, val = (
        HFWikiTextLoader(record["dataset"], str(folder / "adaptive" / "tokenizer.json"), record["seq_len"], s, record["cache_dir"])
        for s in ("train", "validation")
    )
    bigram = bigram_loss(train.tokens, val.tokens[: val.n_windows * val.seq_len + 1], train.tokenizer.get_vocab_size())
    loss = {arm: t["val_loss"].dropna().iloc[-1] for arm, t in telemetry.items()}
    with np.load(folder / "results_ablation.npz", allow_pickle=False) as npz:
        paired = npz["adaptive.base"] - npz["control.base"]
    half = 1.96 * paired.std(ddof=1) / np.sqrt(len(paired))
    out = [
        (
            "validation loss, nats a token",
            f"adaptive {loss['adaptive']:.4f}, control {loss['control']:.4f}; interpolated bigram {bigram:.4f}",
        ),
        (
            "price of the pressure, nats a token",
            f"{paired.mean():+.4f} [{paired.mean() - half:+.4f}, {paired.mean() + half:+.4f}] (95 % CI over {len(paired)} sequences; "
            f"{100 * (loss['adaptive'] / loss['control'] - 1):+.2f} % on the whole split; one seed)",
        ),
    ]
    held, target = tracking(telemetry["adaptive"], record["target_sigma"]), record["target_sigma"]
    hold = "" if np.isnan(held["hold_mean"]) else f" (mean {held['hold_mean']:.2f} in the hold phase at the end)"
    control = telemetry["control"]
    same = control["step"] >= held["settled_step"] if held["n"] else control["step"] > 0
    free = control["sigma_z"][same].mean()  # the same metric, over the same steps
    whole = {arm: t["val_sigma_z"].dropna().iloc[-1] for arm, t in telemetry.items()}
    loop = "filtered sigma never came within 10 % of it; "
    if held["n"]:
        loop = (
            f"filtered sigma {held['mean']:.3f} +- {held['sd']:.3f} of it from step {held['settled_step']:.0f} on, {held['share']:.0%} of "
            f"{held['n']} samples within 10 %{hold}; "
        )
    out.append(
        (
            f"sigma against its setpoint {target:g}",
            f"{loop}control {free:.4f}, {free / target:.2f} times the setpoint (whole validation split, where sampling adds less: adaptive "
            f"{whole['adaptive']:.4f}, control {whole['control']:.4f})",
        )
    )
    saes = read(folder / "saes" / "sae_metrics.csv", ["run", "layer", "l0", "fvu", "fvu_lo", "fvu_hi"])
    means = saes.groupby("run")["fvu"].agg(["mean", "sem", "count"])
    text = "; ".join(f"{run} {r['mean']:.3f} +- {r['sem']:.3f} (s.e. over {r['count']:.0f} layers)" for run, r in means.iterrows())
    out.append(("SAE: unexplained variance (FVU)", f"{text}, L0 {saes['l0'].mean():.1f}"))
    summary = read(folder / "results_ablation_summary.csv", ["run", "mode", "hero_layer", "unique_hero", "crossfit"])
    for _, r in summary[summary["mode"] == summary["ranked_by"]].iterrows():
        name = f"L{r['hero_layer']:.0f}H{r['hero_head']:.0f}"
        verdict = name if r["unique_hero"] else f"no unique hero (first: {name})"
        interval = f"[{r['crossfit_lo']:+.4f}, {r['crossfit_hi']:+.4f}]"
        out.append(
            (
                f"Hero Head, {r['run']}",
                f"{verdict}: {r['crossfit']:+.4f} {interval} nats (cross-fitted), P(top-1) {r['p_top1']:.2f}, n = {r['n_seq']:.0f}",
            )
        )
    parts = read(folder / "hero_analysis" / "hero_preserving.csv", ["role", "kind", "mechanism", "value", "ci_low", "ci_high"])
    parts = parts[(parts["role"] == "hero") & parts["mechanism"].str.startswith("keys:")]
    claimed, chance = (parts[parts["kind"] == kind].set_index("mechanism") for kind in ("claimed", "matched-random"))
    name = claimed["value"].idxmax()
    best = claimed.loc[name]
    interval = f"{best['value']:.0%} [{best['ci_low']:.0%}, {best['ci_high']:.0%}]"
    text = f"{interval} of its impact; random keys {chance.loc[name, 'value']:.0%}; n = {best['n']:.0f} sequences, best of {len(claimed)}"
    out.append((f"explained by attending to {name.removeprefix('keys: ')}", text))
    return out


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    p.add_argument("folder", type=Path, help="output folder of the pipeline, e.g. runs/demo")
    folder = p.parse_args(argv).folder
    numbers = headlines(folder)
    print(f"\nHeadlines of {folder}")
    for what, number in numbers:
        print(f"  {what}: {number}")
    with atomic(folder / "headlines.csv") as tmp:
        pd.DataFrame(numbers, columns=["what", "number"]).to_csv(tmp, index=False)
    print("\nWhere to look")
    pictures = [("training.png", "what the Homeostat did"), ("activations", "figure 1, table 1"), ("saes", "figures 2 and 3, table 2")]
    pictures += [
        ("results_ablation_figure4.png", "figure 4; table 3 beside it"),
        ("hero_analysis/hero_report.html", "the hero: open in a browser"),
    ]
    for name, about in pictures:
        print(f"  {folder / name}: {about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

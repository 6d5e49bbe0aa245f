"""The price of the pressure: its interval over documents, and where it comes from."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calibration import LONGER, record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import headlines  # noqa: E402

import hero_head_analysis as hero  # noqa: E402
import janus_adaptive as ja  # noqa: E402

DOCUMENTS = 93  # of the validation split of the demo


def write(folder: Path, arm: str, losses: np.ndarray, documents: np.ndarray) -> None:
    (folder / arm).mkdir(exist_ok=True)
    table = {"window": np.arange(len(losses)), "document": documents, "loss_nats": losses}
    pd.DataFrame(table).to_csv(folder / arm / "validation.csv", index=False)


def write_ablation(folder: Path, adaptive: np.ndarray, control: np.ndarray) -> None:
    arrays = {"adaptive.base": adaptive, "control.base": control}
    np.savez(folder / "results_ablation.npz", documents=np.arange(len(control)) // 2, **arrays)


def test_the_price_is_that_of_the_whole_split_where_training_kept_it(tmp_path):
    """The table that misled: an interval of a few sequences beside the change on the whole split."""
    rng = np.random.default_rng(0)
    documents = np.sort(rng.integers(40, size=400))
    control = rng.normal(4.4, 0.3, 400)
    adaptive = 1.01 * control + rng.normal(0, 0.01, 400)
    write(tmp_path, "adaptive", adaptive, documents)
    write(tmp_path, "control", control, documents)
    write_ablation(tmp_path, control[:48] * 1.5, control[:48])
    found = headlines.price(tmp_path)
    assert found.nats.value == pytest.approx((adaptive - control).mean())
    assert found.relative.value == pytest.approx(adaptive.mean() / control.mean() - 1)
    assert found.relative.low < found.relative.value < found.relative.high < 0.02
    assert (found.n_documents, found.n_windows) == (len(set(documents)), 400)
    assert "the whole validation split" in found.measured_on
    # What is said holds the value that is said beside it
    telemetry = {}
    for arm, loss in {"adaptive": adaptive, "control": control}.items():
        telemetry[arm] = pd.DataFrame({"val_loss": [loss.mean()]})
    said = dict(headlines.losses(tmp_path, telemetry, 5.0))["price of the pressure, nats a token"]
    assert found.interval in said and f"{100 * found.relative.value:+.2f} %" in said


def test_a_run_of_before_falls_back_and_says_on_what(tmp_path):
    control = np.full(48, 4.0)
    write_ablation(tmp_path, control + np.linspace(0.01, 0.03, 48), control)
    (tmp_path / "adaptive").mkdir()
    found = headlines.price(tmp_path)
    assert found.nats.value == pytest.approx(0.02)
    assert found.measured_on == (
        "24 documents, 48 sequences of the ablation, not the whole split: no validation.csv"
    )


def test_few_documents_give_no_interval(tmp_path):
    for arm in headlines.ARMS:
        write(tmp_path, arm, np.arange(20.0) + 1, np.arange(20) // 2)
    found = headlines.price(tmp_path)
    assert math.isnan(found.relative.low)
    assert found.interval == "no interval: 10 documents are too few"


def test_arms_of_different_texts_are_not_paired(tmp_path):
    write(tmp_path, "adaptive", np.ones(40), np.arange(40))
    write(tmp_path, "control", np.ones(40), np.arange(40) // 2)
    with pytest.raises(ja.HandoffError, match="different windows"):
        headlines.price(tmp_path)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_the_interval_of_the_price_covers_what_it_says(spread):
    """Documents of very different length, whose price differs, as in the demo's split."""
    rng = np.random.default_rng(int(spread))
    n_draws = 200 * LONGER
    below = 0
    above = 0
    for _ in range(n_draws):
        windows = np.ceil(rng.lognormal(2, spread, DOCUMENTS))
        control = rng.normal(4.4, 0.6, DOCUMENTS)
        extra = rng.normal(0.05, 0.06, DOCUMENTS) + rng.normal(0, 0.1, DOCUMENTS) / windows**0.5
        found = hero.ratio_of_sums(extra * windows, control * windows, hero.MIN_DOCUMENTS)
        below += found.low > 0.05 / 4.4
        above += found.high < 0.05 / 4.4
    covered = 1 - (below + above) / n_draws
    record("price of the pressure", f"{DOCUMENTS} documents, spread {spread}", coverage=covered)
    assert covered >= 0.92
    assert max(below, above) / n_draws <= 0.06


def test_windows_spread_over_the_split_are_not_called_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    for arm in headlines.ARMS:
        write(tmp_path, arm, rng.normal(4, 0.3, 80), np.arange(80) // 2)
        csv = tmp_path / arm / "validation.csv"
        table = pd.read_csv(csv)
        table.assign(window=3 * table["window"]).to_csv(csv, index=False)
    found = headlines.price(tmp_path)
    assert found.measured_on == "40 documents, 80 windows spread over the validation split"


@pytest.mark.parametrize(("stride", "bos"), [(1, None), (3, None), (3, 7)])
def test_the_bigram_is_measured_on_the_windows_of_the_validation(
    smoke_checkpoint, tmp_path, stride, bos
):
    whole = smoke_checkpoint.parent
    (tmp_path / "adaptive").mkdir()
    (tmp_path / "adaptive" / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    checkpoint = tmp_path / "adaptive" / smoke_checkpoint.name
    checkpoint.write_bytes(smoke_checkpoint.read_bytes())
    sidecar = json.loads(ja.sidecar_path(smoke_checkpoint).read_text())
    ja.sidecar_path(checkpoint).write_text(json.dumps({**sidecar, "bos": bos}))
    table = pd.read_csv(whole / "validation.csv")[::stride]
    table.to_csv(tmp_path / "adaptive" / "validation.csv", index=False)
    arguments = json.loads((whole / "run.json").read_text())["arguments"]
    train, val = (
        ja.HFWikiTextLoader(
            arguments["dataset"],
            str(whole / "tokenizer.json"),
            arguments["seq_len"],
            split,
            arguments["cache_dir"],
        )
        for split in ("train", "validation")
    )
    # Each window has a target one token beyond its last input; with BOS all its tokens are targets
    length = arguments["seq_len"]
    inputs, targets = [], []
    for window in table["window"]:
        text = val.tokens[window * length : (window + 1) * length + 1]
        inputs.append(text[:-1] if bos is None else np.append([bos], text[:-2]))
        targets.append(text[1:] if bos is None else text[:-1])
    n_kinds = ja.count_ids(train.tokenizer)
    expected = headlines.bigram_loss(
        train.tokens, np.concatenate(inputs), np.concatenate(targets), n_kinds
    )
    assert headlines.bigram_of(tmp_path, arguments) == pytest.approx(expected, rel=1e-12)


def test_training_writes_the_loss_of_every_window_of_the_split(smoke_checkpoint):
    table = pd.read_csv(smoke_checkpoint.parent / "validation.csv")
    telemetry = pd.read_csv(smoke_checkpoint.parent / "telemetry.csv")
    last = telemetry.val_loss.dropna().iloc[-1]
    assert table.loss_nats.mean() == pytest.approx(last, rel=1e-4)
    assert table.columns.tolist() == ["window", "document", "loss_nats"]
    assert table.window.tolist() == list(range(len(table)))
    assert table.document.is_monotonic_increasing

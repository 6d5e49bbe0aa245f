"""Gains of SAEs in report and headlines: of one training and of several, from tables of known numbers."""

import sys
from pathlib import Path

import pandas as pd
import pytest
from test_sae_report import GAINS, NAN, run_of, saes_of, with_gains

import train_sae as ts

sys.path.insert(0, str(Path(ts.__file__).parent / "tools"))
import headlines  # noqa: E402
import report  # noqa: E402

ONE = (
    "Intervals are over the documents of this one training: another training may give another gain."
)


def gains_of(arm: str, null: str, values: list[tuple[float, float, float]], **more) -> pd.DataFrame:
    """Rows of sae_gains.csv, as train_sae.py writes them of two or more --seeds."""
    rows = []
    for layer, (value, low, high) in enumerate(values):
        row = dict(run=arm, unit="layer", arch="batchtopk", setting="k 16", site="z", layer=layer)
        row |= dict(head=NAN, null=null, n_seeds=3, gain=value, gain_lo=low, gain_hi=high)
        rows.append(row | dict(smallest=(high - low) / 2) | more)
    return pd.DataFrame(rows)


def of_seeds(arm: str, n: int) -> pd.DataFrame:
    return pd.concat([with_gains(saes_of(arm, seed=seed)) for seed in range(n)])


def test_one_training_says_that_another_may_give_another_gain(tmp_path):
    _, learnt = report.saes(run_of(tmp_path, with_gains(saes_of("adaptive"))))
    assert learnt.reading.endswith(ONE)
    assert learnt.n == "58 held-out documents, the same for both; one training"


def test_several_trainings_are_told_with_their_number_and_the_smallest_gain(tmp_path):
    """The rows of single seeds, whose gains are other ones, are replaced."""
    several = [
        gains_of("adaptive", "gaussian", [(0.1, -0.05, 0.25), (0.2, 0.1, 0.3), (0.3, 0.2, 0.4)]),
        gains_of("adaptive", "decoder", [(0.5, 0.4, 0.6)] * 3),
    ]
    run = run_of(tmp_path, of_seeds("adaptive", 3), sae_gains=pd.concat(several))
    _, learnt = report.saes(run)
    assert (
        "learned more than the covariance alone gives in 2 of 3 layers: the gain over normal rows "
        "is 10 to 30 % (interval without 0 in 2 of 3 layers; with 0 in it, a gain below 15 % could "
        "not be told); the gain over a random decoder is 50 % (interval without 0 in 3 of 3 "
        "layers). Gains are means over 3 trainings, and intervals are over trainings and documents."
    ) in learnt.reading
    assert ONE not in learnt.reading
    assert learnt.n == "58 held-out documents, the same for both; 3 trainings"
    columns = ["layer", "arm", "gain over normal rows, %", "gain over a random decoder, %"]
    assert learnt.table.columns.tolist() == columns
    assert learnt.table[columns[2]].tolist() == ["10 [-5, 25]", "20 [10, 30]", "30 [20, 40]"]


def test_one_layer_is_told_with_its_interval(tmp_path):
    metrics = with_gains(saes_of("adaptive"))
    _, learnt = report.saes(run_of(tmp_path / "one", metrics[metrics["layer"] == 2]))
    assert (
        "In the adaptive arm the SAE of layer 2 learned more than the covariance alone gives: the "
        "gain over normal rows is 39 [30, 45] %;" in learnt.reading
    )
    of_seeds = gains_of("adaptive", "gaussian", [(0.1, -0.05, 0.25)])
    run = run_of(tmp_path / "seeds", metrics[metrics["layer"] == 0], sae_gains=of_seeds)
    assert (
        "it is not shown that the SAE of layer 0 learned more than the covariance alone gives: the "
        "gain over normal rows is 10 [-5, 25] % (one below 15 % could not be told)"
    ) in report.saes(run)[1].reading


def test_the_reading_says_where_a_null_is_not_as_sparse_or_knows_its_text_by_heart(tmp_path):
    """Each null beside its own SAE: the arms differ in L0, and on average they do not."""
    saes = saes_of("adaptive", fvu_train=0.1, initial="ab")
    sparser = saes_of("control", fvu_train=0.1, initial="ab", l0=8.0)
    equal = saes.assign(null="decoder", l0=16.5, fvu=0.30, fvu_train=0.28)
    other = saes.assign(null="gaussian", l0=[16.0, 24.0, 8.0], fvu=0.2, fvu_train=0.2)
    by_heart = saes.assign(run="untrained", null="untrained", l0=12.0, fvu=0.3, fvu_train=0.1)
    of_no_sae = by_heart.assign(null="decoder", seed=7)
    tables = {"equal": [equal, of_no_sae], "all": [equal, other, by_heart]}
    readings = {}
    for name, nulls in tables.items():
        metrics = pd.concat([with_gains(saes), sparser])
        run = run_of(tmp_path / name, metrics, sae_nulls=pd.concat(nulls))
        readings[name] = report.saes(run)[1].reading
    assert readings["equal"].endswith("another training may give another gain.")
    assert readings["all"].endswith(
        "another gain. For the gain over normal rows, L0 of the null is 50 to 150 % of that of its "
        "SAE. For the gain over the model before training, L0 of the null is 75 to 150 % of that "
        "of its SAE. For the gain over the model before training, the null leaves 0.100 on "
        "documents that it was trained on and 0.300 on others (mean of 6 of 6): that gain is also "
        "one of carrying over to new documents."
    )


def test_an_arm_of_one_training_stays_beside_one_of_several(tmp_path):
    metrics = pd.concat([of_seeds("adaptive", 2), with_gains(saes_of("control", seed=7))])
    several = gains_of("adaptive", "gaussian", [(0.2, 0.1, 0.3)] * 3, n_seeds=2)
    _, learnt = report.saes(run_of(tmp_path, metrics, sae_gains=several))
    assert "In the control arm the SAEs learned more" in learnt.reading
    assert learnt.reading.endswith(
        "Gains are means over 1 to 2 trainings, and intervals are over trainings and documents. "
        "Where there is one training, the interval is over its documents alone."
    )
    assert len(learnt.table) == 6
    assert learnt.table["n_seeds"].tolist() == ["2", "1"] * 3


def test_heads_of_several_trainings_are_rows_of_their_own(tmp_path):
    heads = [saes_of("adaptive", "head", "relu", setting="l1 0.01", seed=seed) for seed in (1, 2)]
    metrics = pd.concat([with_gains(table) for table in heads])
    one = gains_of("adaptive", "gaussian", GAINS["gaussian"], unit="head", arch="relu")
    several = pd.concat([one.assign(head=head, setting="l1 0.01") for head in (0, 1)])
    _, learnt = report.saes(run_of(tmp_path, metrics, sae_gains=several))
    assert "in 4 of 6 SAEs" in learnt.reading
    assert learnt.table["head"].tolist() == ["0", "1"] * 3


def test_a_table_of_gains_of_single_trainings_changes_nothing(tmp_path):
    metrics = with_gains(saes_of("adaptive"))
    one = gains_of("adaptive", "gaussian", [(0.9, 0.8, 1.0)] * 3, n_seeds=1)
    _, plain = report.saes(run_of(tmp_path / "plain", metrics))
    _, beside = report.saes(run_of(tmp_path / "beside", metrics, sae_gains=one))
    assert beside.reading == plain.reading and beside.table.equals(plain.table)


@pytest.mark.parametrize("unit", ["layer", "head"])
def test_headlines_name_the_unit(tmp_path, unit):
    run_of(tmp_path, with_gains(saes_of("adaptive", unit)))
    names = [what for what, _ in headlines.sae_quality(tmp_path)]
    assert names == [
        f"SAE of a {unit}: unexplained variance (FVU)",
        f"SAE of a {unit}: gain over normal rows",
    ]


def test_what_the_exhibits_say_of_three_nulls_and_of_two_kinds_of_saes(tmp_path):
    gains = {null: GAINS["gaussian"] for null in ("gaussian", "decoder", "untrained")}
    heads = saes_of("adaptive", "head", "relu", n_documents=31, n_windows=39)
    run = run_of(tmp_path, pd.concat([with_gains(saes_of("adaptive"), gains), heads]))
    figure_2, learnt = report.saes(run)
    assert figure_2.n == (
        "batchtopk, an SAE a layer: 3 SAEs on 156 windows of 58 held-out documents; "
        "relu, an SAE a head: 6 SAEs on 39 windows of 31 held-out documents"
    )
    assert (
        "on normal rows of the same covariance, with random directions that stay or on the model "
        "before its training."
    ) in learnt.reading


def test_a_null_of_one_seed_keeps_its_row_beside_gains_of_several(tmp_path):
    """Nulls of all three seeds for normal rows; the model before training has one SAE."""
    metrics = of_seeds("adaptive", 3)
    for end in ("", "_lo", "_hi"):
        value = 0.5 + {"": 0, "_lo": -0.1, "_hi": 0.1}[end]
        metrics[f"gain_untrained{end}"] = metrics["seed"].map({0: value})
    several = pd.concat(
        [
            gains_of("adaptive", null, [(0.1, -0.05, 0.25), (0.2, 0.1, 0.3), (0.3, 0.2, 0.4)])
            for null in ("gaussian", "decoder")
        ]
    )
    run = run_of(tmp_path, metrics, sae_gains=several)
    table = report.gains_over_seeds(run, run.table("saes/table2.csv"))
    alone = table[table["n_seeds"] == 1]
    assert len(table) == 6 and alone["layer"].tolist() == [0, 1, 2]
    assert (alone["gain_untrained"] == 0.5).all() and alone["gain_gaussian"].isna().all()
    _, learnt = report.saes(run)
    assert "the gain over the model before training is 50 %" in learnt.reading

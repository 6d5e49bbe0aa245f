"""ablation_test.py in two stages, and optimal ablation: planted heroes, scipy's optimum, a hand-made
second stage."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from calibration import LONGER, record
from scipy import stats
from test_ablation import random_model, text

import ablation_test as A


def test_a_mode_that_learns_can_be_the_only_one() -> None:
    """Precision is chosen before anything is learned, so with another mode."""
    asked = []

    def measure_arm(windows: np.ndarray, modes: list[str], *_: object) -> dict[str, np.ndarray]:
        asked.extend(modes)
        effects = np.random.default_rng(0).normal(size=(len(windows), 2, 3))
        return {"base": np.zeros(len(windows)), f"{modes[0]}.loss": effects}

    low = torch.autocast("cpu", torch.bfloat16)
    args = A.argparse.Namespace(dtype="auto", mode=["optimal"], layers=[0, 1])
    assert A.choose_precision(measure_arm, np.arange(16), args, low) is low
    assert set(asked) == {"mean"}


# ----------------------------------------------------------------------------------- who goes on
def first_stage(rng: np.random.Generator, impact: np.ndarray, n: int) -> np.ndarray:
    """Heads that go on, by n sequences with noise of deviation 1."""
    return A.may_lead(impact + rng.normal(size=(n, len(impact))))


@pytest.mark.parametrize("n", [8, 16, 32])
@pytest.mark.parametrize("n_tied", [2, 20])
def test_the_first_head_is_lost_no_more_often_than_is_said(n: int, n_tied: int) -> None:
    rng = np.random.default_rng([n, n_tied])
    impact = np.r_[np.full(n_tied, 1.0), np.zeros(40 - n_tied)]
    impact[0] += 1e-9  # the first one, by a hair
    n_draws = 400 * LONGER
    n_lost = sum(0 not in first_stage(rng, impact, n) for _ in range(n_draws))
    record("two stages", f"{n_tied} tied heads of 40, {n} sequences", lost=n_lost / n_draws)
    # As many as this or fewer in 99.9 % of tests, if it is 1 % as said
    assert n_lost <= stats.binom.ppf(0.999, n_draws, A.CHANCE_LOST)


def test_of_one_document_and_of_two_copies_no_head_is_let_go() -> None:
    impact = np.array([[0.1, 0.9, 0.5]])
    assert A.may_lead(impact).tolist() == [1, 2, 0]  # the likeliest first
    noise = np.random.default_rng(0).normal(size=(20, 1))
    kept = A.may_lead(np.hstack((noise - 9.0, 1.0 + noise, 1.0 + noise)))
    assert sorted(kept) == [1, 2]


def verdict(rng: np.random.Generator, impact: np.ndarray) -> tuple[bool, bool, float]:
    """Two stages of 16 and 64 sequences: whether head 0 is named a Hero Head, whether any is, and
    the cost as a share of 80 sequences of all heads."""
    kept = first_stage(rng, impact, 16)
    fresh = impact[kept] + rng.normal(size=(64, len(kept)))
    found = A.head_statistics(fresh, draws=400, seed=0)
    is_named = bool(found.summary["unique_hero"])
    cost = (16 * len(impact) + 64 * len(kept)) / (80 * len(impact))
    return is_named and kept[found.hero] == 0, is_named, cost


def test_a_hero_among_200_weak_heads_is_named_at_a_quarter_of_the_cost() -> None:
    rng = np.random.default_rng(0)
    impact = np.r_[3.0, np.full(200, 0.1)]
    draws = np.array([verdict(rng, impact) for _ in range(50)])
    named, _, cost = draws.mean(0)
    record("two stages", "hero of 3 standard deviations among 200 heads", named=named, cost=cost)
    assert named >= 0.95 and cost <= 0.25


def test_two_equal_heroes_are_called_one_no_more_often_than_is_said() -> None:
    rng = np.random.default_rng(1)
    impact = np.r_[3.0, 3.0, np.full(60, 0.1)]
    n_draws = 200 * LONGER
    n_named = sum(verdict(rng, impact)[1] for _ in range(n_draws))
    record("two stages", "two equal heroes, one is named", rate=n_named / n_draws)
    assert n_named <= stats.binom.ppf(0.999, n_draws, 0.05)


def missed(rng: np.random.Generator, of_dropped: float) -> float:
    """p value after 9 heads of impact .5 and below were measured again on 64 sequences, and 60 of
    impact 0 and one of `of_dropped` were dropped after 9."""
    confirmed = np.r_[0.5, np.full(8, 0.3)] + rng.normal(size=(64, 9))
    dropped = np.r_[of_dropped, np.zeros(60)] + rng.normal(size=(9, 61))
    return A.p_missed(confirmed, dropped)


def test_that_a_dropped_head_leads_is_ruled_out_no_more_often_than_is_said() -> None:
    rng = np.random.default_rng(2)
    n_draws = 400 * LONGER
    n_ruled_out = sum(missed(rng, 0.5) < 0.05 for _ in range(n_draws))
    record("two stages", "a dropped head leads, ruled out", rate=n_ruled_out / n_draws)
    assert n_ruled_out <= stats.binom.ppf(0.999, n_draws, 0.05)


def test_that_a_dropped_head_leads_is_ruled_out_where_the_first_is_far_above() -> None:
    rng = np.random.default_rng(3)
    confirmed = np.r_[5.0, np.full(8, 0.3)] + rng.normal(size=(64, 9))
    dropped = 0.3 * rng.normal(size=(9, 61))
    assert A.p_missed(confirmed, dropped) < 0.001
    assert A.p_missed(confirmed, dropped[:, :0]) == 0  # nothing was dropped
    # The least certain of the dropped decides, times the heads among which the first was picked
    t = stats.ttest_ind(confirmed[:, 0], dropped[:, 7], equal_var=False, alternative="greater")
    np.testing.assert_allclose(A.p_missed(confirmed, dropped[:, [7]]), 9 * t.pvalue)


# -------------------------------------------------------------------------------------- as it is run
@pytest.fixture(scope="module")
def measured(smoke_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a run in two stages, optimal ablation in the second."""
    csv = tmp_path_factory.mktemp("stages") / "out.csv"
    flags = ["--mode", "mean", "optimal", "--screen", "8", "--confirm", "32", "--n_linear", "40"]
    flags += ["--n_together", "0", "--batch_size", "8", "--bootstrap", "200", "--dtype", "float32"]
    assert A.main(["--adaptive_model", str(smoke_checkpoint), *flags, "--save_file", str(csv)]) == 0
    return csv


def test_the_second_stage_has_other_documents_and_its_rows_come_first(measured: Path) -> None:
    arrays = np.load(measured.with_suffix(".npz"))
    assert len(arrays["windows"]) == 8 and len(arrays["confirm.windows"]) == 32
    assert not set(arrays["documents"]) & set(arrays["confirm.documents"])
    table = pd.read_csv(measured)
    heads = table[table["mode"] == "mean"]
    summary = pd.read_csv(measured.with_name("out_summary.csv")).set_index("mode").loc["mean"]
    assert not heads.duplicated(["layer", "head"]).any() and len(heads) == 36
    stage = heads.set_index("rank").sort_index()["stage"]
    n_kept = (stage == 2).sum()
    assert n_kept >= 2 and (stage.iloc[:n_kept] == 2).all() and (stage.iloc[n_kept:] == 1).all()
    assert summary["n_dropped"] == 36 - n_kept and summary["n_screen"] == 8
    first = heads[heads["rank"] == 1].iloc[0]
    assert (first["layer"], first["head"]) == (summary["hero_layer"], summary["hero_head"])
    # Its impact is that of the fresh sequences alone
    run = first["run"]
    exact = arrays[f"{run}.confirm.mean.loss"] - arrays[f"{run}.confirm.base"][:, None, None]
    assert np.isnan(exact[0]).sum() == 36 - n_kept
    linear = arrays[f"{run}.confirm.mean.first_order"].reshape(32, 36)
    split = arrays[f"{run}.split.mean.first_order"].reshape(-1, 36)
    number = 3 * int(first["layer"]) + int(first["head"])
    values = exact.reshape(32, 36)[:, [number]]
    if first["n_linear"]:
        control = (linear[:, [number]], split[:, [number]].mean(0), arrays["confirm.documents"])
        values = A.steady(values, *control)
    np.testing.assert_allclose(first["impact"], values.mean(), rtol=1e-8)


def test_a_mode_of_the_second_stage_says_nothing_of_all_heads(measured: Path) -> None:
    """Optimal ablation, which only heads that mean ablation kept have."""
    summary = pd.read_csv(measured.with_name("out_summary.csv")).set_index("mode")
    mean, optimal = summary.loc["mean"], summary.loc["optimal"]
    for name in ("n_screen", "n_dropped", "p_missed", "chosen_by"):
        assert optimal[name] == mean[name]
    assert optimal["chosen_by"] == "mean"
    assert optimal[["max_share", "gini", "effective_heads", "n_negative"]].isna().all()
    assert mean[["max_share", "gini", "n_negative"]].notna().all()


def test_ranks_of_few_heads_are_whole_numbers() -> None:
    few = pd.DataFrame({"run": "one", "name": ["L5H2", "L5H1"], "rank": [1, 2], "mode": "mean"})
    few = few.assign(pct_impact=[0.4, 0.3], ci_all_lo_pct=np.nan, ci_all_hi_pct=np.nan)
    _, ax = A.plt.subplots(figsize=(4, 3))
    A.draw_ranks(ax, few, ["one"])
    ticks = ax.get_xticks()
    A.plt.close()
    assert len(ticks) > 1 and (ticks == ticks.round()).all()


@pytest.mark.parametrize(("p_missed", "is_unique"), [(0.3, False), (0.01, True)])
def test_such_a_mode_names_no_hero_where_a_dropped_head_may_be_the_first(
    p_missed: float, is_unique: bool
) -> None:
    chose = A.Result(2, pd.DataFrame(), {}, np.empty(0), np.empty((0, 0)))
    chose.row |= {"p_missed": p_missed, "n_screen": 16, "n_dropped": 30, "chosen_by": "mean"}
    alone = A.replace(chose, row={"unique_hero": True, "gini": 0.5})
    row = A.of_kept_heads(alone, chose).row
    assert row["unique_hero"] is is_unique and row["n_dropped"] == 30 and np.isnan(row["gini"])


@pytest.mark.parametrize("n_linear", [0, 7, 40, 200, 384])
def test_no_document_is_in_both_stages_however_many_windows_are_linear(n_linear: int) -> None:
    """Of a split whose documents have 1 to 4 windows, so that some of them lie between those chosen."""
    rng = np.random.default_rng(0)
    of_window = np.repeat(np.arange(400), rng.integers(1, 5, 400))
    split = SimpleNamespace(
        n_windows=len(of_window),
        documents=lambda windows: of_window[windows][:, None],
        spread=lambda n: np.arange(n or len(of_window)) * len(of_window) // (n or len(of_window)),
    )
    args = SimpleNamespace(n_seqs=24, n_linear=n_linear, n_together=0, plain=False)
    args.mode, args.confirm, args.minutes = ["mean"], 96, None
    args.keep = None
    text = A.choose_windows(args, split)
    fresh = A.choose_fresh({}, split, 0.0, args)
    assert len(fresh) == 96 and len(text.exact) == 24
    assert n_linear == 0 or np.isin(text.exact, text.linear).all()
    assert not set(of_window[text.exact]) & set(of_window[fresh])


def test_the_halves_are_of_the_split_and_not_of_the_windows_asked_for(capsys) -> None:
    """Of 20 windows of 40 documents all begin in the first half; of 30 too few do."""
    split = SimpleNamespace(
        n_windows=400,
        documents=lambda windows: (windows // 10)[:, None],
        spread=lambda n: np.arange(n or 400) * 400 // (n or 400),
    )
    args = SimpleNamespace(n_seqs=20, n_together=0, plain=False, mode=["mean"])
    args.confirm, args.minutes, args.keep = 48, None, None
    for args.n_linear in (20, 30):
        text = A.choose_windows(args, split)
        assert len(text.exact) == 20
        fresh = A.choose_fresh({}, split, 0.0, args)
        assert not set(text.exact // 10) & set(fresh // 10)
    assert np.isin(text.exact, text.linear).all() and len(text.linear) >= 30
    assert "(the same again: --screen 20 --n_linear 30 --confirm 48)" in capsys.readouterr().out
    split.documents = lambda windows: np.zeros((len(windows), 1), dtype=int)
    with pytest.raises(A.HandoffError, match="one document"):
        A.choose_windows(args, split)


def one_stage(rng: np.random.Generator, n: int) -> A.Ablation:
    """Two heads that cost 1 in n sequences, a document each: the first-order effect of the
    first one knows its noise, that of the second is other noise, of heavy tails."""
    linear = np.stack((rng.normal(size=n), rng.standard_t(2, size=n)), 1)  # [n, 2]
    exact = np.stack((1 + linear[:, 0], np.ones(n)), 1) + rng.normal(0, 0.3, (n, 2))
    split_linear = np.stack((rng.normal(size=n), rng.standard_t(2, size=n)), 1)
    split = A.Split(np.zeros(n), split_linear, np.arange(n), np.zeros(n))
    return A.Ablation(
        about={"n_heads": 2},
        run="made",
        mode="mean",
        stage=1,
        base_loss=np.zeros(n),
        score={"loss": exact, "first_order": linear},
        documents=np.arange(n),
        unit="documents",
        unigram=np.zeros(n),
        split=split,
        is_steadied=np.ones(2, bool),
        layer=np.zeros(2, int),
        head=np.arange(2),
    )


def test_a_head_that_the_first_stage_could_not_steady_is_plain_in_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its standard error is then that of the plain mean, and covers as it should."""
    rng = np.random.default_rng(5)
    losses = {"made.mean.loss": np.empty(0), "made.confirm.mean.loss": np.empty(0)}
    n_draws = 300 * LONGER
    held = np.zeros(2)
    n_plain = 0
    for _ in range(n_draws):
        stages = {"": one_stage(rng, 16), "confirm.": one_stage(rng, 64)}
        monkeypatch.setattr(A, "read_ablation", lambda *a, stages=stages: stages[a[-1]])
        args = A.argparse.Namespace(plain=False)
        first, second = A.read_stages(losses, {}, "made", "mean", args)
        assert first.is_steadied[0] and second.is_steadied[0]
        assert first.is_steadied[1] or not second.is_steadied[1]
        n_plain += not second.is_steadied[1]
        if not second.is_steadied[1]:
            np.testing.assert_array_equal(second.steadied()[:, 1], second.plain()[:, 1])
            np.testing.assert_allclose(second.elsewhere()[:, 1].mean(), second.plain()[:, 1].mean())
        # The truth of this text: what the control says of the split is known exactly
        truth = np.array([1 + second.split.linear[:, 0].mean(), 1.0])
        values = second.steadied()
        error = abs(values.mean(0) - truth) / A.standard_error(values)
        held += error < stats.t.ppf(0.975, 63)
    steadied, plain = held / n_draws
    record("two stages", "coverage", steadied=steadied, plain=plain)
    assert n_plain > n_draws / 2
    low, high = stats.binom.ppf([0.0005, 0.9995], n_draws, 0.95)
    assert (low <= held).all() and (held <= high).all()


def test_in_one_stage_no_head_is_less_certain_than_without_the_control_variate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does the interval suffer by that choice, which its own text makes."""
    rng = np.random.default_rng(6)
    losses = {"made.mean.loss": np.empty(0)}
    n_draws = 600 * LONGER
    held = np.zeros(2)
    n_plain = 0
    for _ in range(n_draws):
        made = one_stage(rng, 48)
        monkeypatch.setattr(A, "read_ablation", lambda *a, made=made: made)
        [found] = A.read_stages(losses, {}, "made", "mean", A.argparse.Namespace(plain=False))
        values = found.steadied()
        se, plain_se = A.standard_error(values), A.standard_error(found.plain())
        # Of the formula in METRICS.md, whatever was chosen
        exact, linear = found.score["loss"], found.score["first_order"]
        slope = A.slope_of_others(linear, exact, found.documents)
        formula = exact - slope * (linear - made.split.linear.mean(0))
        formula_se = formula.std(0, ddof=1) / np.sqrt(48)
        np.testing.assert_allclose(se, np.minimum(formula_se, plain_se))
        n_plain += formula_se[1] > plain_se[1]
        truth = np.array([1 + made.split.linear[:, 0].mean(), 1.0])
        held += abs(values.mean(0) - truth) / se < stats.t.ppf(0.975, 47)
    steadied, chosen = held / n_draws
    record("one stage", "coverage", steadied=steadied, chosen=chosen)
    assert n_plain > n_draws / 5
    low, high = stats.binom.ppf([0.0005, 0.9995], n_draws, 0.95)
    assert (low <= held).all() and (held <= high).all()


@pytest.mark.parametrize(
    ("layers", "bought"),
    [
        (range(12), 5),  # of layer 0, which cost twice those of layer 6: 1 s
        ([0, 9, 11], 2),  # of layer 0 again, four times those of layer 9
        ([8, 9, 10], 7),  # of layer 8, a third more than those of layer 9
    ],
)
def test_time_buys_heads_of_the_first_layer_their_sequences(layers, bought: int) -> None:
    """The heads that lead may all be of the layer that takes longest. 0.5 s a sequence are shared,
    and the time is for 10.5 s a sequence of each head."""
    cfg = SimpleNamespace(n_layers=12, n_heads=4)
    arm = SimpleNamespace(model=SimpleNamespace(cfg=cfg))
    benches = {"made": SimpleNamespace(arm=arm, cost=A.Cost(shared=0.5, of_layer=4.0))}
    args = A.argparse.Namespace(
        minutes=1.0, confirm=None, mode=["mean"], layers=list(layers), resample_draws=1
    )
    assert A.heads_in_time(benches, 10.5 * A.N_FRESH, args) == bought


def test_where_no_head_is_steadied_all_is_of_the_exact_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss too: that of the split belongs to impacts of the split."""
    made = one_stage(np.random.default_rng(1), 48)
    made.base_loss[:] = 3.0
    monkeypatch.setattr(A, "read_ablation", lambda *a: made)
    monkeypatch.setattr(A.Ablation, "better_steadied", lambda self: np.zeros(2, bool))
    losses = {"made.mean.loss": np.empty(0)}
    [found] = A.read_stages(losses, {}, "made", "mean", A.argparse.Namespace(plain=False))
    assert found.loss() == 3.0 and found.split is None
    np.testing.assert_array_equal(found.elsewhere(), found.plain())


def test_no_more_heads_go_on_than_are_wanted(
    smoke_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    csv = tmp_path / "out.csv"
    flags = ["--mode", "mean", "--screen", "8", "--confirm", "32", "--keep", "3"]
    flags += ["--n_linear", "40", "--n_together", "0", "--bootstrap", "200", "--dtype", "float32"]
    assert A.main(["--adaptive_model", str(smoke_checkpoint), *flags, "--save_file", str(csv)]) == 0
    heads = pd.read_csv(csv)
    summary = pd.read_csv(csv.with_name("out_summary.csv")).iloc[0]
    assert (heads["stage"] == 2).sum() == 3 and summary["n_dropped"] == 33
    assert 0 <= summary["p_missed"] <= 1
    # A hardly trained model after 8 sequences: some dropped head may well be the first
    assert not summary["unique_hero"]
    told = capsys.readouterr().out
    assert "the 3 likeliest go on" in told and "--keep 3" in told


def test_drawn_again_the_tables_are_the_same(measured: Path) -> None:
    before = measured.read_bytes()
    assert A.main(["--redraw", str(measured), "--bootstrap", "200"]) == 0
    assert measured.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--confirm", "8"], "expected at least 32"),
        (["--confirm", "40", "--mode", "optimal"], "needs another mode"),
        (["--minutes", "5", "--screen", "8"], "give it, or --screen and --confirm"),
        (["--minutes", "-1"], "not a number above 0"),
        (["--keep", "5"], "and --confirm or --minutes"),
        (["--confirm", "40", "--keep", "1"], "expected at least 2"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as e:
        A.main(["--adaptive_model", "x.pt", *flags])
    assert e.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_too_few_minutes_are_refused_with_what_it_takes(
    smoke_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--adaptive_model", str(smoke_checkpoint), "--save_file", str(tmp_path / "x.csv")]
    assert A.main([*flags, "--mode", "mean", "--minutes", "1e-4"]) == 1
    assert "expected 8: give --minutes" in capsys.readouterr().err


# --------------------------------------------------------------------------------- optimal ablation
def test_the_constant_says_what_holds_everywhere_in_the_text() -> None:
    """Every other token is token 5, which the random model does not know: a constant can say so."""
    model = random_model()
    data = text(A.FIT_CHECK + A.FIT_STEPS * A.FIT_BATCH + 48)
    data.tokens[::2] = 5
    order = np.arange(data.n_windows)
    x, y = data.batch(order[-48:])  # held out
    clean = A.clean_pass(model, x, y, [1])
    mean = {1: clean.z[1].mean((0, 1))}
    fitted = A.fit_constants(model, *data.batch(order[:-48]), mean, {1: [0, 2]})
    torch.testing.assert_close(fitted[1][[1, 3]], mean[1][[1, 3]])  # not chosen: the mean

    def losses(constant: torch.Tensor) -> np.ndarray:
        """[sequences, 2] with each of the two heads replaced."""
        scores = A.ablate_layer(model, clean, 1, constant, [0, 2])
        return scores["loss"][1:].mean(-1).T.double().numpy()

    for other in (mean[1], torch.zeros(4, 8)):
        better = losses(other) - losses(fitted[1])  # on held-out text, paired
        assert (better.mean(0) > 3 * A.standard_error(better)).all()


def test_optimal_is_at_most_mean_and_zero(smoke_checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--adaptive_model", str(smoke_checkpoint), "--mode", "mean", "zero", "optimal"]
    flags += ["--n_seqs", "48", "--plain", "--layers", "1", "11", "--dtype", "float32"]
    flags += ["--n_together", "0", "--bootstrap", "200", "--save_file", str(tmp_path / "out.csv")]
    assert A.main(flags) == 0
    # Not at least 0: this model has hardly been trained, and a constant teaches it word frequencies
    arrays = np.load(tmp_path / "out.npz")
    name = "adaptive"
    losses = {
        mode: arrays[f"{name}.{mode}.loss"].reshape(48, 6) for mode in A.MODES if mode != "resample"
    }
    for mode in ("mean", "zero"):
        excess = losses["optimal"] - losses[mode]  # [48, 6], paired
        assert (excess.mean(0) < 3 * A.standard_error(excess)).all(), mode

"""The benchmark: its races, its comparisons, and that its training step is that of janus_adaptive.py."""

import copy
import importlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

import ablation_test
import janus_adaptive as janus
import train_sae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import ab  # noqa: E402
import bench  # noqa: E402
import compare  # noqa: E402
import harness  # noqa: E402
import interval_coverage  # noqa: E402
import race_ablation  # noqa: E402
import race_sae  # noqa: E402
import race_training  # noqa: E402
import sae_start  # noqa: E402


def test_a_race_takes_turns_and_a_peer_that_fails_is_skipped(monkeypatch):
    calls: list[str] = []
    # Each call takes 1/32 s, so that a round has a handful
    monkeypatch.setattr(time, "perf_counter", lambda: len(calls) / 32)

    def timed(name: str) -> None:
        calls.append(name)

    def broken() -> None:
        raise ValueError("no\nsuch kernel")

    harness.SKIPPED.clear()
    variants = {"ours": lambda: timed("A"), "theirs": broken, "other": lambda: timed("B")}
    times = harness.race(variants, 0.0)
    assert {name: len(rounds) for name, rounds in times.items()} == {"ours": 3, "other": 3}
    assert harness.SKIPPED == ["theirs: ValueError: no such kernel"]
    # After two warm-up calls each, three rounds of a tenth of a second
    assert "".join(calls[4:]) == "".join(variant * 4 for variant in "ABBAAB")
    assert times["ours"] == [1 / 32] * 3
    with pytest.raises(ValueError):  # but ours must not fail silently
        harness.race({"ours": broken}, 0.0)


def test_rates_and_ratios():
    times = {
        "ours, x": [2.0, 4.0, 1.0],
        "theirs": [4.0, 4.0, 5.0],
        "slow": [9.0, 8.0, 7.0],
        "bound": [1.0, 1.0, 1.0],
    }
    ours, theirs, slow, _ = harness.rates("s", "w", "", times, 40, "tokens/s")
    assert (ours["median"], ours["low"], ours["high"], ours["n"]) == (20, 10, 40, 3)
    assert ours["ratio_to_best_peer"] == 2
    assert theirs["ratio_to_best_peer"] == 1
    assert slow["ratio_to_best_peer"] == 0.5


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf"])
def test_seconds_must_be_positive(seconds, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--seconds", seconds])
    assert "--seconds is" in capsys.readouterr().err


def test_compare_finds_what_became_worse(tmp_path, capsys):
    def row(variant, values, better, ratio=math.nan):
        return harness.row("s", "w", "", variant, values, "u", better, ratio)

    rows = [
        row("ours, fast", [90, 100, 110], "higher", 2.0),
        row("ours, memory", [3.9, 4, 4.1], "lower"),
        row("theirs", [50], "higher", 1.0),
    ]
    old = {"rows": [*rows, row("profile", [1], "")]}
    new = {"rows": copy.deepcopy(rows)}
    for changed, scale in zip(new["rows"], (0.5, 1.01, 0.1), strict=True):
        for name in ("median", "low", "high"):
            changed[name] *= scale
    new["rows"][0]["ratio_to_best_peer"] = 2.5
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    janus.write_json(files[0], old)
    janus.write_json(files[1], new)

    assert compare.main([*files, "--fail_above", "1.9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" 10.00x worse")
    assert lines[1].startswith("  2.00x worse: s | w |  | ours, fast")
    assert lines[2].startswith("  1.01x worse (within the spread)")
    assert "1 of ours" in lines[-1]  # a slower peer is no regression
    assert compare.main([*files, "--fail_above", "2.1"]) == 0
    assert compare.main([*files, "--relative", "--fail_above", "1.0"]) == 0
    assert "  0.80x better" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        compare.main([files[0], str(tmp_path)])
    assert e.value.code == 2


@pytest.mark.parametrize("section", ab.COMMANDS)
def test_the_scripts_know_the_commands_that_ab_times(section, tmp_path):
    script, *flags = ab.command_line(section, tmp_path / "two words", ab.FULL)
    args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    assert str(args.cache_dir) == str(tmp_path / "two words" / "cache") and args.overwrite


def test_ab_gives_the_median_of_the_rounds_and_refuses_what_is_no_checkout(tmp_path, capsys):
    found = ab.median_interval([1.02, 0.99, 1.01, 1.0, 1.04])
    assert found.median == 1.01 and 0.99 <= found.low < 1.01 < found.high <= 1.04
    with pytest.raises(SystemExit) as e:
        ab.main(["--old", str(tmp_path)])
    assert e.value.code == 2 and "is no checkout" in capsys.readouterr().err


def test_a_section_writes_both_files(tmp_path):
    assert bench.main(["--quick", "--sections", "machine", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["skipped"] == []
    for row in results["rows"]:
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["n"] >= 3
        assert row["variant"] in (tmp_path / "RESULTS.md").read_text()
    same = str(tmp_path / "results.json")
    assert compare.main([same, same, "--fail_above", "1"]) == 0


def test_the_bound_multiplies_what_a_step_multiplies():
    """Three products of 2 n K N FLOPs a linear layer: 6 FLOPs a token and weight, the embedding
    counted once."""
    config = janus.GPTConfig(
        vocab_size=32,
        n_layers=2,
        d_model=16,
        n_heads=2,
        n_kv_heads=2,
        d_head=8,
        d_ff=24,
        seq_len=8,
    )
    net = janus.NewGPT(config)
    with FlopCounterMode(display=False) as count:
        race_training.gemm_bound(net, 8)()
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert count.get_total_flops() == 6 * 8 * weights


def test_the_step_measured_is_the_step_of_the_script(smoke_args, smoke_checkpoint):
    args = janus.parse_args(smoke_args)
    _, autocast = janus.set_up(args)
    data = janus.HFWikiTextLoader(
        args.dataset, args.tokenizer, args.seq_len, "train", args.cache_dir
    )
    ckpt = torch.load(smoke_checkpoint, weights_only=True)
    model = janus.NewGPT(janus.GPTConfig(**ckpt["config"])).train()
    optimizer = janus.new_optimizer(model, args)
    pressure = janus.Pressure(args)
    training = race_training.JanusTraining(model, optimizer, pressure, args, autocast)
    for step in range(1, args.steps + 1):
        x, y = data.shuffled((step - 1) * args.batch_size, args.batch_size, args.seed)
        training.step(step, x, y, measure=step % args.control_interval == 0)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, ckpt["model"][name]), name
    assert pressure.state_dict() == ckpt["pressure"]


def test_what_a_steadied_mean_needs_for_the_variance_of_a_plain_one():
    """Against the script's own steadied mean of simulated effects, a document a sequence; 20,000
    experiments tell a variance to 1 %. Its slopes are fitted out of fold, which costs some more."""
    rng = np.random.default_rng(0)
    rho, n_exact = 0.98, race_ablation.FEWEST_EXACT
    n_linear = race_ablation.n_linear_for(rho, n_plain=48, n_exact=n_exact)
    linear = rng.normal(size=(n_linear, 20_000))
    exact = rho * linear + math.sqrt(1 - rho**2) * rng.normal(size=linear.shape)
    few = slice(n_exact)
    steadied = ablation_test.steady(
        exact[few], linear[few], linear.mean(0), documents=np.arange(n_exact)
    )
    expected = race_ablation.variance_with(rho, n_exact, n_linear)
    assert 0.96 * expected < steadied.mean(0).var() < 1.05 * expected
    # As sure as 48 plain sequences, and one sequence fewer would not do
    assert expected <= 1 / 48 < race_ablation.variance_with(rho, n_exact, n_linear - 1)
    # No number is enough where the exact ones alone are too few
    assert race_ablation.n_linear_for(0.3, n_plain=48, n_exact=8) == 480


def test_the_cheapest_sizes_are_those_of_a_search_over_all():
    for rho, ratio in ((0.9, 10.0), (0.98, 12.0), (0.98, 3.0), (0.5, 12.0)):
        n_exact, n_linear = race_ablation.cheapest(rho, 48, ratio, 1.0)
        found = n_exact * ratio + n_linear - n_exact
        for other in range(race_ablation.FEWEST_EXACT, 49):
            for many in range(other, 480):
                if race_ablation.variance_with(rho, other, many) <= 1 / 48:
                    assert found <= other * ratio + many - other
                    break


def test_coverage_is_judged_by_a_split_that_is_known_in_full():
    rng = np.random.default_rng(1)
    linear = rng.normal(size=(600, 3)) + 1
    rho = np.array([0.95, 0.5, 0.0])
    exact = rho * linear + np.sqrt(1 - rho**2) * rng.normal(size=linear.shape)
    table = interval_coverage.table_of_heads(exact, linear, np.arange(600), n=48, n_draws=60)
    np.testing.assert_allclose(table["truth"], exact.mean(0))
    for name in ("plain", "steadied"):
        assert (table[f"{name}_coverage"] > 0.85).all()
        assert (table[f"{name}_bias"].abs() < 4).all()
    gain = (table["plain_rmse"] / table["steadied_rmse"]) ** 2
    # Theory: 1 / (1 - rho^2); an F test bounds what 60 draws may make of it
    assert gain[0] > 0.5 / (1 - rho[0] ** 2) and 0.8 < gain[2] < 1.25


@pytest.mark.parametrize("flags", [["--n", "8"], ["--draws", "1"], ["--n", "0"]])
def test_coverage_needs_draws_that_have_intervals(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        interval_coverage.main([str(tmp_path / "r.npz"), *flags])
    assert flags[1] in capsys.readouterr().err


# ------------------------------------------------------------------------------------ what SAEs come out
def test_held_out_rows_are_whole_documents_from_all_over_the_dump(tmp_path):
    rng = np.random.default_rng(0)
    documents = rng.integers(5, 40, 200).cumsum().searchsorted(np.arange(4000), "right")
    rows = rng.normal(size=(4000, 6)) * np.arange(6, 0, -1) + 3
    rows[:, 0] = documents  # so that a row tells of which it is
    np.save(tmp_path / "L0.z.npy", rows.astype(np.float32))
    np.save(tmp_path / "documents.npy", documents.astype(np.uint32))
    data = race_sae.read_activations(train_sae, tmp_path / "L0.z.npy", None, 1000)
    held, trained = (set(part[:, 0].int().tolist()) for part in (data.held, data.train))
    assert not held & trained and len(data.held) + len(data.train) == 4000
    assert 1000 <= len(data.held) < 1040
    assert max(held) > 0.8 * max(documents) and min(held) < 0.2 * max(documents)
    np.testing.assert_allclose(data.moments.mean, data.train.mean(0), rtol=1e-5)
    expected = np.linalg.eigvalsh(np.cov(data.train[::5].numpy().T))[::-1]
    np.testing.assert_allclose(data.moments.variances, expected, rtol=0.05)


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_the_score_of_an_sae_is_that_of_a_loop_over_tokens(monkeypatch, arch):
    monkeypatch.setattr(race_sae, "CHUNK", 32)
    rng = np.random.default_rng(0)
    held, centre = rng.normal(size=(90, 4)).astype(np.float32), rng.normal(size=4)
    made = {"W_enc": (4, 10), "b_enc": 10, "W_dec": (10, 4), "b_dec": 4}
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in made.items()}
    made["b_enc"][3] = -100  # never fires
    pre = np.maximum((held - made["b_dec"]) @ made["W_enc"] + made["b_enc"], 0)  # [90, 10]
    least = np.sort(pre, 1)[:, -2:-1] if arch == "topk" else np.sort(pre.ravel())[-2 * 90]
    latents = np.where(pre >= least, pre, 0)
    error = latents @ made["W_dec"] + made["b_dec"] - held
    data = race_sae.RealActivations(torch.empty(0), torch.from_numpy(held), centre, "made")
    found = data.score({name: torch.from_numpy(w) for name, w in made.items()}, 2, arch)
    assert found.fvu == pytest.approx((error**2).sum() / ((held - held.mean(0)) ** 2).sum())
    assert found.never == found.rare == pytest.approx((latents == 0).all(0).mean())
    assert found.never >= 0.1


def test_starts_are_compared_layer_by_layer():
    """FVU 10 % less in each layer but for noise, whose interval is scipy's."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 6)
    rows = []
    for start, (layer, seed) in itertools.product((1.0, 0.9), itertools.product(range(6), (1, 2))):
        fvu = (0.05 + 0.01 * layer + 0.001 * seed) * (
            0.9 * np.exp(noise[layer]) if start < 1 else 1
        )
        alive = {"never": 0.1 if layer == 3 else 0.0, "rare": 0.2, "fvu": fvu}
        rows.append(
            {"arch": "topk", "start": start, "run": "a", "layer": layer, "seed": seed} | alive
        )
    anywhere, within = sae_start.compare(pd.DataFrame(rows)).to_dict("records")
    assert anywhere["more"] == 0 and math.isnan(anywhere["more_lo"])
    assert within["n_layers"] == 6 and within["n_saes"] == 12
    assert within["never"] == pytest.approx(0.1 / 6) and within["never_most"] == 0.1
    low, high = stats.t.interval(0.95, 5, math.log(0.9) + noise.mean(), stats.sem(noise))
    assert within["more_lo"] == pytest.approx(math.expm1(low))
    assert within["more_hi"] == pytest.approx(math.expm1(high))
    assert within["smallest"] == pytest.approx(math.expm1((high - low) / 2))


@pytest.mark.parametrize("spread", ["normal", "skewed"])
def test_the_interval_over_layers_holds_the_truth(spread):
    """Twelve layers, whose effects differ, and three seeds: FVU is 5 % less in the mean of layers.
    Of 400 intervals 92 to 98 % hold it, but for once in 1,000 each."""
    rng = np.random.default_rng(0)
    places = itertools.product((1.0, 0.9), ("a", "b"), range(6), (1, 2, 3))
    table = pd.DataFrame(places, columns=["start", "run", "layer", "seed"])
    table = table.assign(arch="topk", never=0.0, rare=0.0)
    is_within = table["start"] < 1
    layer_of_row = table.groupby(["run", "layer"]).ngroup()
    n_sim = 400
    held = 0
    for _ in range(n_sim):
        effects = rng.normal(size=12) if spread == "normal" else rng.exponential(size=12) - 1
        log_fvu = rng.normal(-3, 1, 12)[layer_of_row] + rng.normal(0, 0.02, len(table))
        log_fvu += is_within * (math.log(0.95) + 0.03 * effects[layer_of_row])
        _, within = sae_start.compare(table.assign(fvu=np.exp(log_fvu))).to_dict("records")
        held += within["more_lo"] <= -0.05 <= within["more_hi"]
    low = 0.92 if spread == "normal" else 0.88  # of skewed effects Student's t holds fewer
    assert stats.binom.ppf(0.001, n_sim, low) <= held <= stats.binom.ppf(0.999, n_sim, 0.98)

"""ablation_test.py against independent computations: naive forwards, hooks, autograd, scipy, hand
values, planted truth."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tokenizers import Tokenizer
from tokenizers import models as token_models
from tokenizers import pre_tokenizers as pre

import ablation_test as A

EXACT = torch.autocast("cpu", enabled=False)
BFLOAT16 = torch.autocast("cpu", dtype=torch.bfloat16)
ARGS = SimpleNamespace(n_mean=8, layers=[0, 1, 2], batch_size=4, resample_draws=3, seed=0)
HERO = (1, 2)  # layer and head of the planted hero
COLUMNS = [  # of the CSV
    *("run", "seed", "checkpoint", "ckpt_sha", "layer", "head", "mode"),
    *("base_loss", "ablated_loss", "impact", "pct_impact", "delta", "delta_pct"),
    *("se", "ci_lo", "ci_hi", "ci_all_lo", "ci_all_hi", "p_maxT", "q_bh"),
    *("delta_ppl", "share", "rank", "p_top1"),
    *("kl_clean_ablated", "top1_flip_rate", "n_seq", "n_tok", "dtype", "first_order"),
    *("rho", "n_exact", "n_linear", "se_plain", "se_elsewhere", "stage"),
]
FILES = {  # of a finished run
    *("out.csv", "out.csv.json", "out.npz", "out.npz.json", "run.json"),
    *("out_summary.csv", "out_summary.csv.json", "out_table3.csv", "out_table3.md"),
    *("out_figure4.png", "out_figure4.svg", "out_figure4.narrow.svg"),
    *("out_heatmap.png", "out_heatmap.svg", "out_heatmap.narrow.svg"),
}


def random_model(**changes: int) -> A.NewGPT:
    """3 layers x 4 heads x 8, with weights so large that every head changes every prediction."""
    torch.manual_seed(0)
    heads = dict(n_heads=4, n_kv_heads=4, d_head=8)
    sizes = dict(vocab_size=61, n_layers=3, d_model=32, d_ff=48, seq_len=16, tied=False, **heads)
    model = A.NewGPT(A.GPTConfig(**(sizes | changes))).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(4 if p.dim() > 1 else 1)
    return model


def text(n_windows: int = 9, seq_len: int = 16, vocabulary: int = 61) -> A.HFWikiTextLoader:
    """A loader of random tokens, without files."""
    loader = A.HFWikiTextLoader.__new__(A.HFWikiTextLoader)
    loader.tokens = np.random.default_rng(1).integers(0, vocabulary, n_windows * seq_len + 1)
    loader.n_windows = n_windows
    loader.seq_len = seq_len
    return loader


def token_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def naive(
    model: A.NewGPT, x: torch.Tensor, l: int, h: int, substitute: torch.Tensor
) -> torch.Tensor:
    """Logits of a full forward pass in which a hook overwrites the slice of head h at the input of
    layer l's output projection."""
    k = model.cfg.d_head

    def edit(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = inputs[0].clone()
        z[..., h * k : (h + 1) * k] = substitute
        return (z,)

    handle = model.blocks[l].attn.w_o.register_forward_pre_hook(edit)
    try:
        return model(x)[0]
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "tied": True}],
    ids=["heads", "grouped", "one key"],
)
def test_prefix_cached_zero_ablation_equals_full_forward_with_head_scale(
    changes: dict[str, int],
) -> None:
    model = random_model(**changes)
    x, y = text().batch(np.arange(5))
    clean_pass = A.clean_pass(model, x, y, [0, 1, 2])
    clean = model(x)[0]
    for l in range(3):
        scores = A.ablate_layer(model, clean_pass, l, torch.zeros(4, 8))
        loss, kl, flip = (scores[name] for name in ("loss", "kl", "flip"))
        torch.testing.assert_close(loss[0], token_loss(clean, y), atol=1e-5, rtol=0)
        assert kl[0].abs().max() < 1e-5 and flip[0].sum() == 0
        for h in range(4):
            scale = torch.ones(3, 4)
            scale[l, h] = 0
            logits = model(x, head_scale=scale)[0]
            torch.testing.assert_close(loss[1 + h], token_loss(logits, y), atol=1e-5, rtol=0)
            log_q, log_p = logits.log_softmax(-1), clean.log_softmax(-1)
            expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            torch.testing.assert_close(kl[1 + h], expected, atol=1e-5, rtol=0)
            assert torch.equal(flip[1 + h].bool(), logits.argmax(-1) != clean.argmax(-1))
        # The comparison is not one of nothing with nothing
        assert (loss[1:] - loss[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kv", [4, 2])
def test_mean_and_resample_ablation_equal_a_hook_edit(kv: int) -> None:
    model, data = random_model(n_kv_heads=kv), text(2)
    means = A.training_means(model, text(9), ARGS, EXACT)
    modes, windows = ["mean", "resample"], np.arange(2)
    measured = A.measure(model, data, means, ARGS, windows, modes, [0, 1, 2], EXACT)
    x, y = data.batch(np.arange(2))
    base = token_loss(model(x)[0], y).mean(1).numpy()
    z = A.head_z(model, x, [0, 1, 2])
    np.testing.assert_allclose(measured["base"], base, atol=1e-5)
    for l in range(3):
        for h in range(4):
            mean = token_loss(naive(model, x, l, h, means[l][h]), y).mean(1)
            np.testing.assert_allclose(measured["mean.loss"][:, l, h], mean, atol=1e-5)
            # With two windows, the other sequence is always the other one, in every draw
            other = token_loss(naive(model, x, l, h, z[l].flip(0)[:, :, h]), y).mean(1)
            np.testing.assert_allclose(measured["resample.loss"][:, l, h], other, atol=1e-5)


def test_training_means_are_means_of_z() -> None:
    model, data = random_model(), text(9)
    means = A.training_means(model, data, ARGS, EXACT)
    tap = {f"z.{l}": None for l in range(3)}
    model(data.batch(np.arange(8) * 9 // 8)[0], tap=tap)
    for l in range(3):
        torch.testing.assert_close(means[l], tap[f"z.{l}"].mean((0, 1)), atol=1e-6, rtol=0)


def test_ablating_the_only_head_or_every_head_removes_attention() -> None:
    x, y = text().batch(np.arange(3))
    for l in range(3):
        model = random_model(n_heads=1, n_kv_heads=1)
        clean = A.clean_pass(model, x, y, [l])
        loss = A.ablate_layer(model, clean, l, torch.zeros(1, 8))["loss"][1]
        four = random_model()
        scale = torch.ones(3, 4)
        scale[l] = 0
        ablated = four(x, head_scale=scale)[0]
        for m in (model, four):
            m.blocks[l].attn.w_o.weight.zero_()
        torch.testing.assert_close(loss, token_loss(model(x)[0], y), atol=1e-5, rtol=0)
        torch.testing.assert_close(ablated, four(x)[0], atol=1e-5, rtol=0)


def test_a_constant_head_costs_nothing_by_its_mean_and_something_by_zero() -> None:
    model, data = random_model(), text()
    # Embeddings of one length, with dimension 0 the same for all tokens; head 0 reads that alone
    rows = F.normalize(model.embedding.weight[:, 1:], dim=1)
    model.embedding.weight.copy_(torch.cat((torch.ones(61, 1), rows), 1))
    value = model.blocks[0].attn.w_qkv.weight[2 * 32 : 2 * 32 + 8]
    value[:, 1:] = 0
    means = A.training_means(model, text(5), ARGS, EXACT)
    out = A.measure(model, data, means, ARGS, np.arange(9), ["mean", "zero"], [0], EXACT)
    assert np.abs(out["mean.loss"][:, 0, 0] - out["base"]).max() < 1e-5
    assert np.abs(out["zero.loss"][:, 0, 0] - out["base"]).max() > 1e-2
    assert np.abs(out["mean.loss"][:, 0, 1] - out["base"]).max() > 1e-2


def test_first_order_is_the_derivative_of_the_loss_along_the_ablation() -> None:
    model, data = random_model(), text()
    means = A.training_means(model, data, ARGS, EXACT)
    out = A.measure(model, data, means, ARGS, np.arange(9), ["zero"], [0, 2], EXACT)
    x, y = data.batch(np.arange(9))
    scale = torch.ones(9, 3, 4, requires_grad=True)
    loss = torch.zeros(())
    for i in range(9):
        logits = model(x[i : i + 1], head_scale=scale[i])[0]
        loss = loss + token_loss(logits, y[i : i + 1]).mean()
    slope = torch.autograd.grad(loss, scale)[0]
    np.testing.assert_allclose(out["zero.first_order"], -slope[:, [0, 2]].numpy(), atol=1e-5)


def test_nothing_depends_on_the_batch_size_nor_on_which_sequences_are_asked_for() -> None:
    model, data = random_model(), text()
    means = A.training_means(model, data, ARGS, EXACT)

    def measure(batch_size: int, windows: np.ndarray) -> dict[str, np.ndarray]:
        args = SimpleNamespace(**(vars(ARGS) | {"batch_size": batch_size}))
        modes = [mode for mode in A.MODES if not A.MODES[mode].fit]
        return A.measure(model, data, means, args, windows, modes, [1], EXACT)

    one = measure(2, np.arange(9))
    two = measure(5, np.array([1, 4, 8]))
    assert one.keys() == two.keys()
    for k in one:
        np.testing.assert_allclose(one[k][[1, 4, 8]], two[k], atol=1e-5, err_msg=k)


def test_scores_are_taken_in_float32_under_bfloat16() -> None:
    model, y = random_model(), torch.arange(20)
    final = torch.randn(3, 20, 32)
    with BFLOAT16:
        scores = A.token_scores(model, final, y)
        log_q = model.unembed(final).double().log_softmax(-1)
    loss = -log_q[:, torch.arange(20), y]
    kl = (log_q[0].exp() * (log_q[0] - log_q)).sum(-1)
    torch.testing.assert_close(scores["loss"].double(), loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores["kl"].double(), kl, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shift", "accepted"), [(0.09, True), (0.11, False)])
def test_bfloat16_is_accepted_only_within_a_tenth_of_a_standard_error(
    shift: float, accepted: bool
) -> None:
    full = np.random.default_rng(0).normal(size=(8, 2, 3))
    se = full.std(0, ddof=1) / np.sqrt(8)
    one_head = np.arange(6).reshape(2, 3) == 4
    moved = full + shift * se * one_head

    def measured(_w: object, modes: list[str], _l: object, context: object) -> dict:
        low = getattr(context, "_enabled", False)
        return {"base": np.zeros(8), f"{modes[0]}.loss": moved if low else full}

    assert A.bfloat16_will_do(measured, np.arange(8), "mean", [0, 1], BFLOAT16) == accepted


# -------------------------------------------------------------------------------------- statistics
def resampled_t(delta: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Studentised means of resamples, one by one, [draws, R]."""
    rng = np.random.default_rng(seed)
    t = []
    for _ in range(draws):
        sample = delta[rng.integers(len(delta), size=len(delta))]
        t.append((sample.mean(0) - delta.mean(0)) / stats.sem(sample))
    return np.array(t)


def test_intervals_are_the_wider_of_student_and_the_studentised_bootstrap() -> None:
    rng = np.random.default_rng(3)
    delta = rng.exponential(size=(60, 4)) + np.array([0, 0.2, 0.5, 2])
    table = A.head_statistics(delta, 20_000, 0).columns
    np.testing.assert_allclose(table["se"], stats.sem(delta), rtol=1e-12)
    np.testing.assert_allclose(table["impact"], delta.mean(0), rtol=1e-12)
    t = resampled_t(delta, 20_000, 4)
    student = stats.ttest_1samp(delta, 0).confidence_interval()
    low = np.minimum(delta.mean(0) - np.quantile(t, 0.975, axis=0) * stats.sem(delta), student.low)
    high = np.maximum(
        delta.mean(0) - np.quantile(t, 0.025, axis=0) * stats.sem(delta), student.high
    )
    near = 0.1 * stats.sem(delta).max()
    np.testing.assert_allclose(table["ci_lo"], low, atol=near)
    np.testing.assert_allclose(table["ci_hi"], high, atol=near)
    assert (table["ci_hi"] > student.high + near).any()  # the bootstrap tells of the skew
    # All heads at once: the largest t of a resample, or Bonferroni
    highest = max(np.quantile(t.max(1), 0.975), stats.t.ppf(1 - 0.025 / 4, 59))
    expected = delta.mean(0) - highest * stats.sem(delta)
    np.testing.assert_allclose(table["ci_all_lo"], expected, atol=near)
    assert (table["ci_all_hi"] > table["ci_hi"]).all()


def test_resamples_stay_paired() -> None:
    delta = np.random.default_rng(3).normal(size=(60, 4))
    all_heads = A.bootstrap_means(delta, 700, 5)
    two_heads = A.bootstrap_means(delta[:, 2:], 700, 5)
    np.testing.assert_allclose(all_heads[:, 2:], two_heads, rtol=1e-12)
    assert A.bootstrap_means(np.ones((9, 1)), 700, 5) == pytest.approx(1)


def test_benjamini_hochberg_equals_its_definition_and_scipy() -> None:
    effect = np.array([0, 0, 0, 0.2, 0.3, 0.4, 0.5, 0.6, 1])
    delta = np.random.default_rng(4).normal(size=(40, 9)) + effect
    table = A.head_statistics(delta, 3000, 1).columns
    boot = A.bootstrap_means(np.hstack((delta, delta**2)), 3000, 1)
    means, squares = boot[:, :9], boot[:, 9:]
    t = (means - delta.mean(0)) / np.sqrt((squares - means**2) / 39)
    observed = delta.mean(0) / stats.sem(delta)
    # By chance so many of all heads have as large a t
    p = np.array([(1 + (t >= one).sum()) / (27_000 + 1) for one in observed])
    order = np.argsort(p)
    q = np.empty(9)
    q[order] = np.minimum.accumulate((p[order] * 9 / np.arange(1, 10))[::-1])[::-1].clip(max=1)
    np.testing.assert_allclose(table["q_bh"], q, rtol=1e-9)
    np.testing.assert_allclose(table["q_bh"], stats.false_discovery_control(p), rtol=1e-9)
    assert 0.5 < np.median(p / stats.ttest_1samp(delta, 0, alternative="greater").pvalue) < 2
    anywhere = [(1 + (t.max(1) >= one).sum()) / 3001 for one in observed]
    np.testing.assert_allclose(table["p_maxT"], anywhere, rtol=1e-9)


def test_without_an_effect_heroes_and_discoveries_are_as_rare_as_promised() -> None:
    rng, n = np.random.default_rng(5), 100
    found = [A.head_statistics(rng.normal(size=(40, 12)), 400, i) for i in range(n)]
    discoveries = sum(f.columns["p_maxT"].min() < 0.05 for f in found)
    assert stats.binomtest(discoveries, n, 0.05).pvalue > 1e-3  # family-wise error of 5 %
    assert sum(f.summary["unique_hero"] for f in found) <= 3
    over_null = [f.summary["max_share"] / f.summary["max_share_null"] for f in found]
    assert abs(np.mean(over_null) - 1) < 0.15


def test_planted_effect_is_the_hero_and_equal_effects_are_not() -> None:
    delta = np.random.default_rng(6).normal(size=(50, 12)) * 0.01
    delta[:, 7] += 0.05
    found = A.head_statistics(delta, 2000, 0)
    assert found.summary["unique_hero"] and found.hero == 7
    assert found.summary["p_top1"] == 1 and found.columns["rank"][7] == 1

    delta[:, 3] += 0.05
    found = A.head_statistics(delta, 2000, 0)
    assert not found.summary["unique_hero"] and found.summary["p_top1"] < 0.95
    assert found.columns["p_maxT"][[3, 7]].max() < 0.05

    # The first head leads for sure, but its ablation does not hurt
    delta[:, 3] -= 0.05
    row = A.head_statistics(delta - 0.06, 2000, 0).summary
    assert row["p_top1"] == 1 and row["gap_lo"] > 0
    assert row["p_maxT"] > 0.05 and not row["unique_hero"]


def test_cross_fitting_removes_the_winners_curse() -> None:
    rng = np.random.default_rng(7)
    data = [rng.normal(size=(30, 20)) for _ in range(100)]
    assert np.mean([d.mean(0).max() for d in data]) > 0.25
    assert abs(np.mean([A.cross_fit(d, 0).mean() for d in data])) < 0.05
    one, two = A.cross_fit(data[0], 0), A.cross_fit(data[0], 1)
    assert not np.allclose(one, two)  # the halves are random
    clear = data[0] + 9 * (np.arange(20) == 4)
    np.testing.assert_allclose(A.cross_fit(clear, 0), clear[:, 4])


@pytest.mark.parametrize("n", [8, 11])
def test_cross_fit_equals_its_definition_and_chooses_again_without_each_unit(n: int) -> None:
    delta = np.random.default_rng(n).normal(size=(n, 5))
    values = A.cross_fit(delta, 3, halvings=20)
    rng = np.random.default_rng(3)
    halves = [rng.permutation(np.arange(n) % 2 == 0) for _ in range(20)]

    def estimate(kept: list[int]) -> float:
        """Each unit's delta of the head that leads in the other half, one by one."""
        found = []
        for half in halves:
            for i in kept:
                others = [j for j in kept if half[j] != half[i]]
                found.append(delta[i, delta[others].mean(0).argmax()])
        return float(np.mean(found))

    everything = list(range(n))
    assert values.mean() == pytest.approx(estimate(everything))
    without = np.array([estimate([j for j in everything if j != i]) for i in everything])
    jackknife = (n - 1) / n * np.square(without - without.mean()).sum()
    assert stats.sem(values) == pytest.approx(np.sqrt(jackknife))


def test_concentration_has_its_hand_values() -> None:
    d = np.array([[0, 0, 0, 1.0], [1, 1, 1, 1], [-5, 1, 3, 0], [0, 0, 0, 0]])
    c = A.concentration(d)
    assert c["gini"][:2].tolist() == pytest.approx([0.75, 0])
    assert c["exp_entropy"][:2].tolist() == pytest.approx([1, 4])
    assert c["max_share"][:3].tolist() == pytest.approx([1, 0.25, 0.75])
    assert c["top1_over_top2"][1:3].tolist() == pytest.approx([1, 3])
    assert c.iloc[3].isna().all()
    x = np.abs(np.random.default_rng(8).normal(size=9))
    c = A.concentration(x[None])
    gini = np.abs(x[:, None] - x).sum() / (2 * 81 * x.mean())
    assert c["gini"][0] == pytest.approx(gini)
    robust_z = (x.max() - np.median(x)) / stats.median_abs_deviation(x, scale="normal")
    assert c["robust_z"][0] == pytest.approx(robust_z, rel=1e-3)


def test_squared_means_are_means_over_pairs() -> None:
    values = np.random.default_rng(9).normal(size=(7, 3))
    found = A.squared_means(values)
    for left_out in [None, *range(7)]:
        kept = [i for i in range(7) if i != left_out]
        pairs = [values[i] * values[j] for i in kept for j in kept if i != j]
        row = 0 if left_out is None else left_out + 1
        np.testing.assert_allclose(found[row], np.mean(pairs, axis=0), atol=1e-12)


def test_effective_heads_of_equal_heads() -> None:
    equal = np.where(np.arange(36) < 6, 1.0, 0) + np.zeros((40, 36))
    assert A.effective_heads(equal, 200, 0) == pytest.approx((6, 6, 6))
    noise = np.random.default_rng(0).normal(size=(40, 36))
    value, low, high = A.effective_heads(equal + noise, 200, 0)
    assert low < 6 < high and 4 < value < 9
    assert np.isnan(A.effective_heads(noise, 200, 0)).all()


def test_a_unit_is_a_document_and_the_mean_stays() -> None:
    values = np.random.default_rng(9).normal(size=(11, 3))
    np.testing.assert_allclose(A.units(values, np.arange(11) * 5), values)
    documents = np.array([2, 2, 2, 2, 2, 7, 7, 9, 9, 9, 12])
    of_units = A.units(values, documents)
    assert of_units.shape == (4, 3)
    np.testing.assert_allclose(of_units.mean(0), values.mean(0))
    # The standard error is that of a ratio of sums, linearised (Cochran 1977, 6.2)
    sizes = np.array([5, 2, 3, 1])
    means = np.array([values[documents == number].mean(0) for number in (2, 7, 9, 12)])
    residual = sizes[:, None] * (means - values.mean(0))
    expected = np.sqrt(np.square(residual).sum(0) / (4 - 1) / 4) / sizes.mean()
    np.testing.assert_allclose(stats.sem(of_units), expected)
    # Documents of one size: their means
    even = np.repeat([4, 1, 0], 3)
    found = A.units(values[:9], even)
    np.testing.assert_allclose(
        found, [values[6:9].mean(0), values[3:6].mean(0), values[:3].mean(0)]
    )


# -------------------------------------------------------------------------------- the whole script
def ablate(*argv: object) -> int:
    """Exit status of the command."""
    return A.main([str(word) for word in argv])


def fails(capsys: pytest.CaptureFixture[str], argv: list[object], *words: str) -> None:
    """The command exits 1 (2: usage) with one line that has all `words`."""
    try:
        status = ablate(*argv)
    except SystemExit as e:
        status = e.code
    error = capsys.readouterr().err.strip().splitlines()
    assert status in (1, 2) and "error: " in error[-1] and (status == 2 or len(error) == 1), error
    assert all(w in error[-1] for w in words), error[-1]


def save_checkpoint(folder: Path, model: A.NewGPT, arm: str, data: Path, cache: Path) -> Path:
    """A checkpoint as janus_adaptive.py writes it, of a model that was not trained; tokenizer.json
    must be in `folder`."""
    tokenizer = str(folder / "tokenizer.json")
    loader = A.HFWikiTextLoader(str(data), tokenizer, model.cfg.seq_len, "train", cache)
    run = {"arm": arm, "preset": "smoke", "seed": 0, "step": 0}
    facts = run | {"dataset": str(data), "data": loader.description}
    weights = {"model": model.state_dict(), "config": asdict(model.cfg)}
    weights["probe"] = A.golden_probe(model)
    path = folder / f"janus_{arm}_final.pt"
    torch.save({"schema": A.CHECKPOINT_SCHEMA, **weights, **facts}, path)
    A.write_sidecar(path, A.CHECKPOINT_SCHEMA, [], **facts)
    return path


def random_walk(words: int) -> str:
    """A text in which a word almost decides the next one: a thousand articles of two windows."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(1000):
        word = 0
        line = []
        for _ in range(61):
            word = (3 * word + 1) % words if rng.random() < 0.9 else int(rng.integers(words))
            line.append(f"w{word}")
        lines += ["= w0 =", " ".join(line)]
    return "\n".join(lines)


def plant(model: A.NewGPT, words: int) -> None:
    """Makes one head of a model with 4 heads x 16, and no other, map a word to its successor."""
    layer, h = HERO
    attn = model.blocks[layer].attn
    model.embedding.weight.copy_(torch.eye(9, 64))
    model.unembedding.weight.copy_(0.5 * torch.eye(9, 64))
    # Queries, keys and values are the word itself, so the head attends to that word
    for part in range(3):
        attn.w_qkv.weight[part * 64 + h * 16 : part * 64 + (h + 1) * 16] = torch.eye(16, 64)
    attn.w_o.weight[:, h * 16 : (h + 1) * 16] = 0
    for word in range(words):
        attn.w_o.weight[(3 * word + 1) % words, h * 16 + word] = 0.4


def write_walk(folder: Path, words: int) -> Path:
    """A text of a random walk over so many words; its tokenizer lies beside it."""
    data = folder / "walk.txt"
    data.write_text(random_walk(words))
    vocabulary = {f"w{i}": i for i in range(words)} | {"?": words}
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return data


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints on the random walk: `adaptive`, in which one head knows it, and `control`, at
    its random initialisation."""
    folder, words = tmp_path_factory.mktemp("planted"), 8
    data = write_walk(folder, words)

    heads = dict(n_heads=4, n_kv_heads=4, d_head=16)
    sizes = dict(vocab_size=9, n_layers=3, d_model=64, d_ff=32, seq_len=32, tied=False, **heads)
    torch.manual_seed(0)
    control = A.NewGPT(A.GPTConfig(**sizes)).eval().requires_grad_(False)
    adaptive = A.NewGPT(A.GPTConfig(**sizes)).eval().requires_grad_(False)
    plant(adaptive, words)
    cache = folder / "cache"
    return (
        save_checkpoint(folder, adaptive, "adaptive", data, cache),
        save_checkpoint(folder, control, "control", data, cache),
    )


@pytest.fixture(scope="session")
def results(planted: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the planted pair, into a folder that did not exist; tests copy it before
    they damage it."""
    csv = tmp_path_factory.mktemp("results") / "made" / "here" / "out.csv"
    models = ["--adaptive_model", planted[0], "--control_model", planted[1]]
    flags = ["--bootstrap", 1000, "--dtype", "float32", "--cache_dir", planted[0].parent / "cache"]
    sizes = ["--n_seqs", 72, "--n_linear", 0]
    assert ablate(*models, *flags, *sizes, "--save_file", csv) == 0
    return csv


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    for f in results.parent.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    return tmp_path / "out.csv"


def test_planted_hero_is_found_and_a_random_model_has_none(results: Path) -> None:
    summary = pd.read_csv(results.with_name("out_summary.csv")).set_index(["run", "mode"])
    for mode in A.DEFAULT_MODES:
        hero = summary.loc["adaptive", mode]
        assert (hero["hero_layer"], hero["hero_head"]) == HERO, mode
        assert hero["unique_hero"] and hero["p_top1"] == 1, mode
        assert hero["crossfit_lo"] > 0.5 and hero["max_share"] > 0.9 and hero["difference_lo"] > 0.5
        assert hero["effective_heads_hi"] < 1.1
        assert not summary.loc["control", mode]["unique_hero"]
    table = pd.read_csv(results)
    assert list(table.columns) == COLUMNS and len(table) == 2 * 3 * 12
    first = table[(table["run"] == "adaptive") & (table["rank"] == 1)]
    assert (first[["layer", "head"]].to_numpy() == HERO).all() and (first["p_maxT"] < 0.05).all()
    base, impact = table["base_loss"], table["impact"]
    np.testing.assert_allclose(table["ablated_loss"] - base, impact, atol=1e-7)
    np.testing.assert_allclose(table["pct_impact"], 100 * impact / base, atol=1e-7)


def test_everything_is_printed_written_and_described(
    results: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("--redraw", copy, "--bootstrap", 1000) == 0
    said = capsys.readouterr().out
    assert "adaptive, mean ablation: Hero Head L1H2" in said
    assert "control, mean ablation: no unique hero" in said
    assert "n=1 seed: descriptive only" in said and "does not beat word frequencies" in said
    assert copy.read_bytes() == results.read_bytes()  # the statistics are a function of the .npz
    assert {f.name for f in results.parent.iterdir()} == FILES
    side = json.loads(results.with_name("out.csv.json").read_text())
    assert side["schema"] == "janus.ablation/1" and side["sha256"] == A.sha256(results)
    assert side["ranked_by"] == "mean"
    with np.load(results.with_suffix(".npz")) as f:
        loss = f["adaptive.mean.loss"]
        documents = f["documents"]
    assert loss.shape == (72, 3, 4) and loss.dtype == np.float64
    n_units = pd.read_csv(results.with_name("out_summary.csv"))["n_unit"]
    assert (n_units == len(np.unique(documents))).all() and 40 < n_units[0] < 60
    assert f"n = {n_units[0]} documents of 72 sequences" in said
    top = pd.read_csv(results.with_name("out_table3.csv"))
    assert len(top) == 5 and top["name"][0] == "L1H2"
    assert top["published_zero_pct_impact"][0] == 0.932


def test_smoke_checkpoints_go_through(
    smoke_checkpoint: Path, control_checkpoint: Path, tmp_path: Path, cache_dir: Path
) -> None:
    models = ["--adaptive_model", smoke_checkpoint, "--control_model", control_checkpoint]
    sizes = ["--layers", 11, 0, "--n_seqs", 8, "--bootstrap", 200]
    csv = tmp_path / "r.csv"
    assert ablate(*models, *sizes, "--cache_dir", cache_dir, "--save_file", csv) == 0
    table = pd.read_csv(csv)
    assert sorted(table["layer"].unique()) == [0, 11]
    assert list(table["run"].unique()) == ["adaptive", "control"]
    numbers = table.select_dtypes("number")
    assert len(table) == 2 * 3 * 2 * 3
    uncertain = [*A.UNCERTAIN_COLUMNS, *A.ERRORS_BESIDE]
    assert np.isfinite(numbers.drop(columns=uncertain)).all(axis=None)
    assert table[uncertain].isna().all(axis=None)  # eight sequences tell nothing of noise
    assert (table["n_tok"] == 8 * 64).all()
    assert table["ckpt_sha"].iloc[0] == A.sha256(smoke_checkpoint)


def test_few_documents_are_measured_and_nothing_uncertain_is_said(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npz = copy.with_suffix(".npz")
    arrays = dict(np.load(npz))
    again = ["--redraw", copy, "--plain", "--bootstrap", 1000, "--overwrite"]
    assert ablate(*again) == 0
    before = pd.read_csv(copy)
    capsys.readouterr()
    store(npz, arrays | {"documents": arrays["documents"] // 2})
    assert ablate(*again) == 0
    said = capsys.readouterr().out
    assert "documents of 72 sequences: no interval, no p value and no Hero Head" in said
    assert "nan" not in said and "no unique hero; the first head is L1H2" in said
    table = pd.read_csv(copy)
    assert table[A.UNCERTAIN_COLUMNS].isna().all(axis=None)
    np.testing.assert_allclose(table["impact"], before["impact"])
    # And the figures are drawn without intervals, from the CSVs alone too
    npz.unlink()
    copy.with_name("out_figure4.png").unlink()
    assert ablate("--redraw", copy) == 0
    assert copy.with_name("out_figure4.png").stat().st_size > 10_000
    assert pd.read_csv(copy.with_name("out_table3.csv"))["p_maxT"].isna().all()


# --------------------------------------------------------------------- additions, and older files
def rotate(batch: A.Batch) -> dict[int, torch.Tensor]:
    """A mode: z of another position of the same sequence."""
    return {layer: z.roll(batch.draw + 1, dims=1) for layer, z in batch.z.items()}


def top3_share(d: np.ndarray) -> np.ndarray:
    """A measure of concentration: share of the first three heads."""
    return A.shares(d)[:, -3:].sum(1)


def test_a_mode_and_a_measure_are_a_function_and_a_line_in_a_table(
    planted: tuple[Path, Path], copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(A.MODES, "rotate", A.Mode(rotate, random=True))
    monkeypatch.setitem(A.CONCENTRATION, "top3_share", top3_share)
    good = ["--adaptive_model", planted[0], "--cache_dir", planted[0].parent / "cache"]
    # The new mode joins nobody's default run
    assert A.parse_args([str(word) for word in good]).mode == ["mean", "zero", "resample"]

    csv = tmp_path / "new" / "r.csv"
    flags = ["--mode", "rotate", "mean", "--bootstrap", 300, "--dtype", "float32", "--n_seqs", 72]
    assert ablate(*good, *flags, "--save_file", csv) == 0
    table = pd.read_csv(csv)
    assert list(table["mode"].unique()) == ["mean", "rotate"] and table.notna().all(axis=None)
    first = table[(table["mode"] == "rotate") & (table["rank"] == 1)].iloc[0]
    assert (first["layer"], first["head"]) == HERO and first["impact"] > 0.5
    assert csv.with_name("r_figure4.png").stat().st_size > 10_000
    summary = pd.read_csv(csv.with_name("r_summary.csv"))
    assert (summary["top3_share"] > summary["max_share"]).all()
    assert (summary["top3_share_null"] < 0.9).all()

    # A script with the measure redraws what one without it has measured
    assert ablate("--redraw", copy, "--bootstrap", 1000, "--overwrite") == 0
    assert "top3_share_null" in pd.read_csv(copy.with_name("out_summary.csv"))
    assert set(pd.read_csv(copy)["mode"]) == {"mean", "zero", "resample"}

    # And the other way round: the mode is a row of the .npz like any other
    monkeypatch.undo()
    assert ablate("--redraw", csv, "--bootstrap", 300, "--overwrite") == 0
    assert set(pd.read_csv(csv)["mode"]) == {"mean", "rotate"}
    assert "top3_share" not in pd.read_csv(csv.with_name("r_summary.csv"))


@pytest.mark.parametrize("substitute", [{}, None, {0: torch.zeros(4, 8)}])
def test_a_mode_that_replaces_nothing_is_an_error(
    substitute: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = random_model(), text()
    means = A.training_means(model, data, ARGS, EXACT)
    monkeypatch.setitem(A.MODES, "lazy", A.Mode(lambda batch: substitute))
    with pytest.raises((KeyError, TypeError)):
        A.measure(model, data, means, ARGS, np.arange(9), ["lazy"], [0, 1], EXACT)


def test_a_random_mode_without_draws_is_an_error() -> None:
    model, data = random_model(), text()
    means = A.training_means(model, data, ARGS, EXACT)
    args = SimpleNamespace(**(vars(ARGS) | {"resample_draws": 0}))
    with pytest.raises(AssertionError, match="without a draw"):
        A.measure(model, data, means, args, np.arange(9), ["resample"], [0, 1], EXACT)


def test_a_window_has_the_same_draws_in_every_measurement() -> None:
    """A control variate of other draws would have noise that no standard error holds."""
    model, data = random_model(), text()
    means = A.training_means(model, data, ARGS, EXACT)
    given = (np.arange(9), ["resample"], [0, 1, 2], EXACT, None)
    exact = A.measure(model, data, means, ARGS, *given)
    linear = A.measure(model, data, means, ARGS, *given, A.FIRST_ORDER)
    name = "resample.first_order"
    np.testing.assert_allclose(linear[name], exact[name], rtol=1e-5, atol=1e-6)
    # Which several draws have, and one alone has not
    one = SimpleNamespace(**(vars(ARGS) | {"resample_draws": 1}))
    of_one = A.measure(model, data, means, one, *given, A.FIRST_ORDER)
    assert np.abs(of_one[name] - exact[name]).max() > 1e-3


def test_effects_that_are_no_numbers_are_refused_and_drop_no_head() -> None:
    effects = np.zeros((9, 3, 4))
    A.need_finite("mean.loss", effects)
    effects[4, 1, 2] = np.nan
    effects[5] = np.inf
    with pytest.raises(A.HandoffError, match="mean.loss: no finite number in 2 of 9 sequences"):
        A.need_finite("mean.loss", effects)


def store(npz: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replaces the arrays of an .npz, and describes it in its sidecar."""
    with npz.open("wb") as f:
        np.savez(f, **arrays)
    side = A.sidecar_path(npz)
    facts = {"bytes": npz.stat().st_size, "sha256": A.sha256(npz), "of_the_future": 1}
    A.write_json(side, json.loads(side.read_text()) | facts)


def test_an_npz_of_another_version_is_read_for_what_it_holds(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npz = copy.with_suffix(".npz")
    again = ["--redraw", copy, "--bootstrap", 1000, "--overwrite"]
    assert ablate(*again, "--plain") == 0
    arrays, before = dict(np.load(npz)), pd.read_csv(copy)
    older = {k: v for k, v in arrays.items() if not k.endswith((".kl", ".first_order"))}
    store(npz, older | {"adaptive.mean.of_the_future": np.zeros(3)})
    assert ablate(*again) == 0
    gone = ["kl_clean_ablated", "first_order", "rho"]
    table = pd.read_csv(copy)
    assert table[gone].isna().all(axis=None)
    pd.testing.assert_frame_equal(table.drop(columns=gone), before.drop(columns=gone))
    assert pd.read_csv(copy.with_name("out_summary.csv"))["spearman_first_order"].isna().all()

    # Without the documents each sequence is a unit, and it says so
    capsys.readouterr()
    store(npz, {k: v for k, v in arrays.items() if k != "documents"})
    assert ablate(*again) == 0
    said = capsys.readouterr().out
    assert said.count("does not say which document") == 1 and "n = 72 sequences" in said
    summary = pd.read_csv(copy.with_name("out_summary.csv"))
    assert (summary["n_unit"] == 72).all() and (summary["unit"] == "sequences").all()
    np.testing.assert_allclose(pd.read_csv(copy)["impact"], before["impact"])

    # Without these there is nothing to say
    for needed in ("control.zero.loss", "adaptive.base", "unigram"):
        store(npz, {k: v for k, v in arrays.items() if k != needed and "split." not in k})
        fails(capsys, again, f"no array {needed}")


def test_a_csv_of_another_version_is_read_for_what_it_holds(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy.with_suffix(".npz").unlink()
    table = pd.read_csv(copy)
    older = table.drop(columns=["p_top1", "delta_ppl"])
    older.assign(of_the_future="x").to_csv(copy, index=False)
    assert ablate("--redraw", copy) == 0
    assert pd.read_csv(copy.with_name("out_table3.csv"))["p_top1"].isna().all()
    for needed in ("p_maxT", "run"):
        table.drop(columns=needed).to_csv(copy, index=False)
        fails(capsys, ["--redraw", copy], needed, "ablation_test.py")


# ------------------------------------------------------------------------------------ wrong inputs
def test_wrong_models_and_flags_are_one_line(
    planted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, csv = planted[0], tmp_path / "new" / "r.csv"
    good = ["--adaptive_model", model, "--save_file", csv, "--cache_dir", model.parent / "cache"]
    no_file = tmp_path / "none.pt"
    fails(capsys, [], "--adaptive_model is needed")
    fails(capsys, [*good, "--layers", 0, 3], "--layers 3", "layers 0 to 2")
    fails(capsys, [*good, "--layers", -1], "--layers -1", "layers 0 to 2")
    missing = ["none.pt does not exist", "janus_adaptive.py"]
    fails(capsys, [*good, "--control_model", no_file], *missing)
    fails(capsys, [*good, "--adaptive_model", tmp_path], "is not a file")
    fails(capsys, [*good, "--n_seqs", 3], "at least 8")
    fails(capsys, [*good, "--bootstrap", 10], "at least 100")
    fails(capsys, [*good, "--mode", "median"], "invalid choice")
    fails(capsys, [*good, "--save_file", tmp_path / "r.txt"], ".csv")
    fails(capsys, [*good, "--dataset", tmp_path / "none.txt"], "none.txt")
    fails(capsys, [*good, "--tokenizer", tmp_path / "tokenizer.json"], "tokenizer")
    assert not csv.exists()


def test_one_head_alone_is_one_line(
    planted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = planted[0].parent / "cache"
    model = random_model(n_heads=1, n_kv_heads=1, vocab_size=9, seq_len=32)
    tokenizer = planted[0].with_name("tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    path = save_checkpoint(tmp_path, model, "adaptive", planted[0].with_name("walk.txt"), cache)
    one = ["--adaptive_model", path, "--layers", 1, "--cache_dir", cache]
    fails(capsys, [*one, "--save_file", tmp_path / "r.csv"], "layer 1", "one head", "--layers")


def test_a_control_that_reads_other_text_is_refused(
    planted: tuple[Path, Path],
    smoke_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ["--adaptive_model", planted[0], "--control_model", smoke_checkpoint]
    fails(capsys, [*models, "--save_file", tmp_path / "r.csv"], "n_layers 12", "3")


def test_existing_results_are_kept(
    planted: tuple[Path, Path], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f.name: f.read_bytes() for f in copy.parent.iterdir()}
    fails(capsys, ["--adaptive_model", planted[0], "--save_file", copy], "exists", "--overwrite")
    redraw = ["--redraw", copy, "--mode", "zero", "--bootstrap", 1000]
    fails(capsys, redraw, "would change", "--overwrite")
    assert before == {f.name: f.read_bytes() for f in copy.parent.iterdir()}
    assert ablate(*redraw, "--overwrite") == 0
    assert set(pd.read_csv(copy)["mode"]) == {"zero"}
    assert json.loads(copy.with_name("out.csv.json").read_text())["ranked_by"] == "zero"


def test_a_damaged_npz_is_one_line_on_redraw(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npz, side = copy.with_suffix(".npz"), copy.with_name("out.npz.json")
    whole, before = npz.read_bytes(), copy.read_bytes()
    half = len(whole) // 2
    npz.write_bytes(whole[:half])
    fails(capsys, ["--redraw", copy], "bytes", "damaged")
    npz.write_bytes(whole[:half] + bytes(len(whole) - half))  # the right size, and still damaged
    fails(capsys, ["--redraw", copy], "sha256", "damaged")
    with npz.open("wb") as f:
        np.savez(f, windows=np.array([{"a": object}], dtype=object))
    A.write_json(side, json.loads(side.read_text()) | {"bytes": npz.stat().st_size})
    fails(capsys, ["--redraw", copy], "sha256", "damaged")
    side.unlink()
    fails(capsys, ["--redraw", copy], "no sidecar")
    assert copy.read_bytes() == before


def test_damaged_csvs_are_one_line_on_redraw(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy.with_suffix(".npz").unlink()  # the CSVs alone are enough for the figures
    copy.with_name("out.npz.json").unlink()
    figure = copy.with_name("out_figure4.png")
    figure.unlink()
    assert ablate("--redraw", copy) == 0 and figure.stat().st_size > 10_000
    summary = copy.with_name("out_summary.csv")
    summary.write_text("".join(summary.read_text().splitlines(True)[:2]))
    fails(capsys, ["--redraw", copy], "not the summary")
    copy.write_text(copy.read_text().replace("0.", "x", 1))
    fails(capsys, ["--redraw", copy], "out.csv", "ablation_test.py")
    copy.write_text("")
    fails(capsys, ["--redraw", copy], "out.csv", "ablation_test.py")
    copy.write_text("run,mode\n")
    fails(capsys, ["--redraw", copy], "out.csv", "ablation_test.py")
    fails(capsys, ["--redraw", copy.with_name("absent.csv")], "does not exist")


# ------------------------------------------------------------------------------------ the control variate
def test_plain_is_a_run_without_it(
    planted: tuple[Path, Path], results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steadied = pd.read_csv(results)
    assert (steadied["n_exact"] == 72).all() and (steadied["n_linear"] > 72).all()
    assert (steadied["rho"].abs() <= 1).all()

    csv = tmp_path / "plain.csv"
    flags = ["--bootstrap", 1000, "--dtype", "float32", "--cache_dir", planted[0].parent / "cache"]
    models = ["--adaptive_model", planted[0], "--control_model", planted[1]]
    assert ablate(*models, *flags, "--n_seqs", 72, "--plain", "--save_file", csv) == 0
    assert "first-order effects of" not in capsys.readouterr().out
    plain = pd.read_csv(csv)
    assert (plain["n_linear"] == 0).all()
    np.testing.assert_array_equal(plain["se"], plain["se_plain"])
    # The same from the file of the steadied run, bit for bit
    again = tmp_path / "again.csv"
    for end in (".csv", ".npz", "_summary.csv"):
        A.named(again, end).write_bytes(A.named(results, end).read_bytes())
    A.sidecar_path(A.named(again, ".npz")).write_bytes(
        A.sidecar_path(A.named(results, ".npz")).read_bytes()
    )
    assert ablate("--redraw", again, "--plain", "--bootstrap", 1000, "--overwrite") == 0
    pd.testing.assert_frame_equal(pd.read_csv(again), plain, check_exact=True)
    # What is steadied is the same quantity
    gap = (steadied["impact"] - plain["impact"]) / plain["se_plain"]
    assert gap.abs().max() < 3.5
    np.testing.assert_array_equal(steadied["kl_clean_ablated"], plain["kl_clean_ablated"])


def test_of_the_whole_split_there_is_nothing_to_steady(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    csv = tmp_path / "all.csv"
    flags = ["--layers", 1, "--mode", "mean", "--bootstrap", 200, "--dtype", "float32"]
    flags += ["--cache_dir", planted[0].parent / "cache", "--n_seqs", 0, "--save_file", csv]
    assert ablate("--adaptive_model", planted[0], *flags) == 0
    table = pd.read_csv(csv)
    assert (table["n_linear"] == 0).all() and (table["se"] == table["se_plain"]).all()


def test_the_loss_and_its_rise_are_of_the_same_windows(results: Path) -> None:
    """impact is of the split, and so must be the loss that it is a per cent of."""
    arrays = np.load(results.with_suffix(".npz"))
    table = pd.read_csv(results)
    for run in ("adaptive", "control"):
        of_run = table[table["run"] == run]
        np.testing.assert_allclose(of_run["base_loss"], arrays[f"{run}.split.base"].mean())
    assert (np.diff(arrays["split.windows"]) > 0).all()
    assert set(arrays["windows"]) <= set(arrays["split.windows"])

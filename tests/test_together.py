"""What heads do together (ablation_test.py): the joint loss against the model's own head_scale, two
copies of one head, and planted curves."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from calibration import LONGER, record
from scipy import stats
from test_ablation import (
    EXACT,
    ablate,
    random_model,
    save_checkpoint,
    text,
    token_loss,
    write_walk,
)

import ablation_test as A


def test_the_joint_loss_is_that_of_the_model_with_these_heads_at_zero() -> None:
    model = random_model()
    tokens, targets = text().batch(np.arange(4))
    zero = {layer: torch.zeros(4, 8) for layer in range(3)}
    rng = np.random.default_rng(0)
    sets = torch.from_numpy(rng.random((6, 3, 4)) < 0.4)  # [S, L, H]
    sets[0] = False
    removed = {layer: sets[:, layer] for layer in range(3)}
    found = A.joint_loss(model, tokens, targets, zero, removed)
    for row, heads in zip(found, sets, strict=True):
        logits, _ = model(tokens, head_scale=(~heads).float())
        expected = token_loss(logits, targets).mean(1)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_files_of_an_earlier_run_of_the_same_name_are_no_part_of_this_one(tmp_path: Path) -> None:
    csv = tmp_path / "out.csv"
    ends = ["_together.csv", "_pairs.csv", "_together.png", "_together.svg"]
    for end in [*ends, "_figure4.png"]:
        A.named(csv, end).write_text("of before")
        A.sidecar_path(A.named(csv, end)).write_text("{}")
    A.remove_together(csv)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["out_figure4.png", "out_figure4.png.json"]


def test_one_head_together_is_that_head_alone() -> None:
    model = random_model()
    data = text()
    means = A.training_means(model, data, A_ARGS, EXACT)
    windows = np.arange(9)
    exact = A.measure(model, data, means, A_ARGS, windows, ["mean"], [0, 1, 2], EXACT)
    sets = np.vstack((np.zeros(12), np.eye(12))).astype(bool)
    loss = A.measure_sets(model, data, means, A_ARGS, windows, sets, EXACT, "x")  # [9, 13]
    np.testing.assert_allclose(loss[:, 0], exact["base"], atol=1e-5)
    np.testing.assert_allclose(loss[:, 1:], exact["mean.loss"].reshape(9, 12), atol=1e-5)


def test_the_sets_are_what_their_names_say() -> None:
    impact = np.array([0.1, 0.5, -0.2, 0.3, 0.0, 0.2, 0.4, 0.05, 0.01])
    size = np.arange(9)[::-1]  # of those behind, 8, 4 and 2, the last writes most
    kinds, sets = A.plan_sets(impact, size, seed=0)
    assert kinds[0] == "none" and not sets[0].any()
    order = np.argsort(-impact)
    orders = {"largest first": order, "smallest first": order[::-1]}
    for kind, ranked in (orders | {"quietest first": np.arange(9)[::-1]}).items():
        own = [row for name, row in zip(kinds, sets, strict=True) if name == kind]
        assert [row.sum() for row in own] == [2, 3, 4, 6, 8, 9]
        for row in own:
            assert set(np.flatnonzero(row)) == set(ranked[: row.sum()])
    pairs = [row for name, row in zip(kinds, sets, strict=True) if name == "pair"]
    assert len(pairs) == 28 and set(np.flatnonzero(pairs[0])) == set(order[:2])
    alone = [row.argmax() for name, row in zip(kinds, sets, strict=True) if name == "alone"]
    assert alone == [*order[:6], 2, 4]
    random = {kind for kind in kinds if kind.startswith("random")}
    assert len(random) == A.RANDOM_ORDERS
    sizes = [row.sum() for name, row in zip(kinds, sets, strict=True) if name == "random 3"]
    assert sizes == [3, 6]


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_what_a_head_writes_is_what_the_output_matrix_makes_of_it_alone(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    model = random_model()
    data = text()
    torch.manual_seed(1)
    means = {layer: torch.randn(4, 8) for layer in range(3)}
    seen: dict[int, torch.Tensor] = {}  # what each output matrix is given [B, T, H K]
    hooks = []
    for layer, block in enumerate(model.blocks):
        keep = lambda module, inputs, layer=layer: seen.update({layer: inputs[0]})  # noqa: E731
        hooks.append(block.attn.w_o.register_forward_pre_hook(keep))
    model(data.batch(np.arange(9))[0])
    for hook in hooks:
        hook.remove()
    expected = []
    for layer, z in seen.items():
        for head in range(4):
            columns = slice(8 * head, 8 * head + 8)
            alone = torch.zeros_like(z)
            alone[..., columns] = z[..., columns] - means[layer][head]
            expected.append(model.blocks[layer].attn.w_o(alone).norm(dim=-1).mean())

    found = []
    monkeypatch.setattr(A, "plan_sets", lambda impact, size, seed: (found.append(size), []))
    monkeypatch.setattr(A, "measure_sets", lambda *given: np.zeros((9, 1)))
    arrays = {"mean.loss": np.zeros((1, 3, 4)), "base": np.zeros(1)}
    bench = SimpleNamespace(arm=SimpleNamespace(model=model), mean_z=means, arrays=arrays)
    bench.precision = EXACT
    args = A.argparse.Namespace(**vars(A_ARGS) | {"batch_size": batch_size, "mode": ["mean"]})
    A.measure_together("x", bench, SimpleNamespace(together=np.arange(9)), data, args)
    np.testing.assert_allclose(found[0], torch.stack(expected).numpy(), rtol=1e-5)


def test_how_many_heads_can_go_is_read_off_the_curve() -> None:
    sizes = np.array([2, 4, 6, 8])
    cost = np.array([0.0, 0.01, 0.03, 0.5])
    assert A.heads_to_spare(cost, sizes, 0.02) == 5.0
    assert A.heads_to_spare(cost, sizes, 1.0) == 8.0
    assert A.heads_to_spare(cost, sizes, 0.005) == 3.0


def test_an_interaction_is_what_both_cost_beyond_each() -> None:
    alone = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    both = np.array([[3.0, 5.0, 9.0], [1.0, -1.0, 0.0]])
    np.testing.assert_allclose(A.interactions(alone, both), [[0, 0, 3], [1, -1, 0]])


def test_the_backup_of_the_first_head_is_told_or_bounded_or_left_open() -> None:
    """The first head need not stand first: the pairs are ordered by the exact effects alone."""
    row = dict(head_1=["L0H1", "L0H1", "L2H3"], head_2=["L2H3", "L1H0", "L1H0"])
    row |= dict(interaction=[0.03, 0.5, 0.01], ci_lo=[0.02, 0.4, -0.01], ci_hi=[0.04, 0.6, 0.03])
    pairs = pd.DataFrame(row)
    found = A.backup_columns(pairs, "L2H3")
    assert found == {"backup": "L0H1", "backup_interaction": 0.03, "backup_at_most": 0.04}
    assert "L0H1 stands in" in A.tell_backup(pd.Series(found))
    found = A.backup_columns(pairs.assign(ci_lo=-0.01), "L2H3")
    assert found["backup"] == "none" and found["backup_at_most"] == 0.04
    assert "at most +0.04" in A.tell_backup(pd.Series(found))
    for left_open in (
        A.backup_columns(pairs.assign(ci_lo=np.nan, ci_hi=np.nan), "L2H3"),
        A.backup_columns(pairs, "L5H5"),
    ):
        assert left_open["backup"] == "" and np.isnan(left_open["backup_interaction"])
        assert "cannot be told" in A.tell_backup(pd.Series(left_open))


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_of_pairs_without_interaction_a_backup_is_rarely_told(kind: str) -> None:
    """28 pairs in 35 documents, which have something in common; all intervals at once."""
    n_sim = 150 * LONGER
    n_held = n_told = 0
    for seed in range(n_sim):
        rng = np.random.default_rng([seed, len(kind)])
        own = rng.normal(size=(35, 28)) if kind == "normal" else rng.exponential(size=(35, 28)) - 1
        values = own + 0.7 * rng.normal(size=(35, 1))
        args = A.argparse.Namespace(bootstrap=1000, seed=seed)
        limits = A.with_limits(values, args, together=True)
        n_held += ((limits["ci_lo"] <= 0) & (limits["ci_hi"] >= 0)).all()
        n_told += (limits["ci_lo"] > 0).any()
    record("pairs", f"{kind}, n = 35", coverage=n_held / n_sim, told=n_told / n_sim)
    # As many errors as this or fewer in 99.9 % of tests, if they are 5 % in all, as said
    assert n_sim - n_held <= stats.binom.ppf(0.999, n_sim, 0.05)
    assert n_told <= stats.binom.ppf(0.999, n_sim, 0.05)


def test_the_interval_of_the_heads_to_spare_holds_the_truth() -> None:
    """Of a straight line with noise that all sizes share."""
    sizes = np.arange(1, 9) * 4
    rng = np.random.default_rng(0)
    held = []
    for seed in range(100 * LONGER):
        noise = rng.normal(size=(48, 1)) + 0.3 * rng.normal(size=(48, 8))
        cost = sizes / 32 * (1 + noise)  # 1 at all heads
        means = A.bootstrap_means(cost, 400, seed)
        draws = [A.heads_to_spare(mean, sizes, 0.5) for mean in means]
        low, high = np.quantile(draws, [0.025, 0.975])
        held.append(low <= 16 <= high)
    record("heads to spare", "straight line, n = 48", coverage=np.mean(held))
    assert np.mean(held) > 0.87  # 95 % less what 48 documents and a percentile interval may lack


A_ARGS = A.argparse.Namespace(
    n_mean=8, layers=[0, 1, 2], batch_size=4, resample_draws=3, seed=0, bootstrap=400
)


# ------------------------------------------------------------------------- two copies of one head
COPIES = ["L1H2", "L1H3"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which two heads write the next word, each loud enough for both."""
    folder, words = tmp_path_factory.mktemp("copies"), 8
    data = write_walk(folder, words)
    heads = dict(n_heads=4, n_kv_heads=4, d_head=16)
    sizes = dict(vocab_size=9, n_layers=3, d_model=64, d_ff=32, seq_len=32, tied=False, **heads)
    torch.manual_seed(0)
    model = A.NewGPT(A.GPTConfig(**sizes)).eval().requires_grad_(False)
    model.embedding.weight.copy_(torch.eye(9, 64))
    model.unembedding.weight.copy_(0.5 * torch.eye(9, 64))
    attn = model.blocks[1].attn
    for h in (2, 3):
        for part in range(3):
            rows = slice(part * 64 + h * 16, part * 64 + (h + 1) * 16)
            attn.w_qkv.weight[rows] = torch.eye(16, 64)
        attn.w_o.weight[:, h * 16 : (h + 1) * 16] = 0
        for word in range(words):
            attn.w_o.weight[(3 * word + 1) % words, h * 16 + word] = 40.0
    return save_checkpoint(folder, model, "adaptive", data, folder / "cache")


def test_two_copies_of_one_head_are_an_interaction_and_not_nothing(
    copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "r.csv"
    flags = ["--mode", "mean", "--bootstrap", 500, "--dtype", "float32", "--n_seqs", 48]
    flags += ["--n_together", 60, "--cache_dir", copies.parent / "cache", "--save_file", csv]
    assert ablate("--adaptive_model", copies, *flags) == 0
    table = pd.read_csv(csv).assign(name=lambda t: [f"L{r.layer}H{r.head}" for r in t.itertuples()])
    both_out = pd.read_csv(A.named(csv, "_pairs.csv"))
    pair = both_out[both_out["head_1"].isin(COPIES) & both_out["head_2"].isin(COPIES)].iloc[0]
    assert pair["interaction"] > 10 * max(abs(pair["alone_1"]), abs(pair["alone_2"]), 1e-3)
    assert pair["ci_lo"] > 0
    assert table.set_index("name").loc[COPIES, "impact"].abs().max() < 0.1 * pair["both"]
    others = both_out.drop(index=pair.name)
    assert others["interaction"].abs().max() < 0.1 * pair["interaction"]
    said = capsys.readouterr().out
    assert "heads can go together for 1% of the loss" in said
    for end in ("_together.png", "_together.svg", "_together.narrow.svg", "_together.csv"):
        assert A.named(csv, end).exists()
    # From the CSVs alone
    before = A.named(csv, "_together.svg").read_bytes()
    A.named(csv, ".npz").unlink()
    A.named(csv, "_together.svg").unlink()
    assert ablate("--redraw", csv) == 0
    assert A.named(csv, "_together.svg").read_bytes() == before

"""harvest_activations.py: the dumps, their statistics, interruption and refusals, each against something independent."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import harvest_activations as h

H, K, T, L = 3, 8, 16, 4
N = 20 * 2 * T  # tokens: 20 blocks of two windows


def write_checkpoint(folder: Path, text: Path, cache: Path, edit=None) -> Path:
    """A small random checkpoint and its tokenizer.json; `edit` may change the model first."""
    tokenizer = h.load_tokenizer("train:300", str(text), cache)
    torch.manual_seed(0)
    model = h.NewGPT(h.GPTConfig(tokenizer.get_vocab_size(), L, H * K, H, H, K, 32, T))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(
                    8
                )  # so that attention and residual stream differ visibly from layer to layer
        if edit:
            edit(model)
    data = h.HFWikiTextLoader(str(text), "train:300", T, "train", cache)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "janus_control_final.pt"
    ckpt = {
        "schema": h.CHECKPOINT_SCHEMA,
        "config": asdict(model.cfg),
        "model": model.state_dict(),
        "probe": h.golden_probe(model),
    }
    torch.save(
        ckpt
        | {"preset": "smoke", "arm": "control", "dataset": str(text), "data": data.description},
        path,
    )
    h.write_sidecar(path, h.CHECKPOINT_SCHEMA, [])
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with text.txt, cache/ and ck/janus_control_final.pt."""
    root = tmp_path_factory.mktemp("harvest")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(300)]
    lines = [" ".join(rng.choice(words, 12)) + "." for _ in range(4000)]
    (root / "text.txt").write_text("\n".join(lines))
    write_checkpoint(root / "ck", root / "text.txt", root / "cache")
    return root


def command(
    world: Path, save_dir: Path, *flags: str, ckpt: Path | None = None, tokens: int = N
) -> list[str]:
    fixed = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--batch_size",
        "1",
        "--cache_dir",
        str(world / "cache"),
    ]
    model = [
        "--model_path",
        str(ckpt or world / "ck" / "janus_control_final.pt"),
        "--tokens",
        str(tokens),
    ]
    return [*model, "--save_dir", str(save_dir), *fixed, *flags]


@pytest.fixture
def run(world, tmp_path, capsys, monkeypatch):
    """Runs main -> (exit status, stdout, stderr); output in tmp_path/out. Without the figure, which is slow and has its own test."""
    monkeypatch.setattr(h, "draw_cosines", lambda _, out: out.write_bytes(b""))

    def call(*flags: str, save_dir: Path | None = None, **kw) -> tuple[int, str, str]:
        try:
            status = h.main(command(world, save_dir or tmp_path / "out", *flags, **kw))
        except SystemExit as e:
            status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def test_the_time_is_estimated_once(run):
    status, out, _ = run("--layers", "0")
    assert status == 0 and out.count("time: about") == 1


@pytest.fixture(scope="session")
def finished(world):
    """A finished float32 harvest of all layers, for reading only."""
    assert h.main(command(world, world / "ref", "--dump_dtype", "float32", "--run_name", "r")) == 0
    return world / "ref" / "r"


@pytest.fixture(scope="session")
def model(world):
    return h.load_checkpoint(world / "ck" / "janus_control_final.pt", torch.device("cpu"), False)[0]


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for pattern in patterns
        for p in sorted(folder.glob(pattern))
    }


def heads(folder: Path, l: int) -> np.ndarray:
    """Dumped z of one layer, [H, N, K] float64."""
    return np.load(folder / f"L{l}.z.npy").astype(np.float64).reshape(-1, H, K).transpose(1, 0, 2)


def cosines(z: np.ndarray) -> np.ndarray:
    """Cosines of the pairs (0,1) (0,2) (1,2) of z [H, N, anything]."""
    flat = z.reshape(len(z), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(z), 1)]


def stat(folder: Path, l: int, metric: str) -> pd.Series:
    frame = pd.read_csv(folder / "topology_stats.csv").set_index(["layer", "metric"])
    return frame.loc[(l, metric)]


# ------------------------------------------------------------------------------------------------------------- dumps
def test_dumps_equal_what_the_output_projection_is_given(finished, model):
    idx = torch.from_numpy(np.load(finished / "tokens.npy").astype(np.int64)).reshape(-1, T)
    seen = {}
    hooks = [
        b.attn.w_o.register_forward_pre_hook(lambda _, x, l=l: seen.__setitem__(l, x[0]))
        for l, b in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model(idx)
    for hook in hooks:
        hook.remove()
    for l in range(L):
        np.testing.assert_allclose(
            np.load(finished / f"L{l}.z.npy"),
            seen[l].reshape(N, H * K).numpy(),
            rtol=1e-4,
            atol=1e-5,
        )


def stream_of(world: Path) -> tuple[list[int], list[int]]:
    """Token ids of the training split, and the document of each, counted here: a document is as many lines as have
    2,000 characters."""
    tokenizer = h.Tokenizer.from_file(str(world / "ck" / "tokenizer.json"))
    lines = (world / "text.txt").read_text().splitlines()
    ends = np.cumsum([len(line) for line in lines])
    stream, document, number, length = [], [], 0, 0
    for line, end in zip(lines, ends, strict=True):
        if end > 0.9 * ends[-1]:
            break
        if length >= 2000:
            number, length = number + 1, 0
        length += len(line)
        ids = tokenizer.encode(line + "\n\n").ids
        stream += ids
        document += [number] * len(ids)
    return stream, document


def test_rows_are_windows_spread_over_the_split_and_know_their_documents(finished, world):
    stream, document = stream_of(world)
    n_windows = (len(stream) - 1) // T
    chosen = [i * n_windows // 40 for i in range(40)]
    rows = [w * T + t for w in chosen for t in range(T)]
    assert chosen[-1] > 0.95 * n_windows  # the old harvest ended at window 39
    assert np.load(finished / "tokens.npy").tolist() == [stream[row] for row in rows]
    assert np.load(finished / "positions.npy").tolist() == [n % T for n in range(N)]
    documents = np.load(finished / "documents.npy")
    assert documents.dtype == np.uint32 and documents.tolist() == [document[row] for row in rows]
    assert len(np.unique(documents)) >= 40
    side = json.loads((finished / "documents.npy.json").read_text())
    assert side["schema"] == "janus.documents/1" and side["shape"] == [N]
    for name in ("documents.npy", "tokens.npy", "L0.z.npy"):
        side = json.loads((finished / f"{name}.json").read_text())
        assert (side["split"], side["windows"]) == ("train", "spread over the split")
        assert (side["n_windows"], side["split_windows"]) == (40, n_windows)
        assert side["n_documents"] == len(np.unique(documents[::T]))
    table = pd.read_csv(finished / "topology_stats.csv")
    assert set(table["split"]) == {"train"} and set(table["n_documents"]) == {40}


def test_all_windows_are_harvested_where_there_are_no_more(run, tmp_path, world):
    status, out, _ = run("--layers", "0", "--split", "validation", tokens=10**6)
    assert status == 0
    n = len(np.load(tmp_path / "out" / "control" / "tokens.npy")) // T
    assert f"text: {n} of {n} windows of the validation split" in out
    n_blocks = stat(tmp_path / "out" / "control", 0, "sigma_z")["n_blocks"]
    documents = np.load(tmp_path / "out" / "control" / "documents.npy")[::T]
    assert n_blocks == len(np.unique(documents)) < 20  # fewer documents than blocks


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_whole_documents_of_about_equal_size(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.geometric(rng.choice([0.02, 0.1, 0.9]), size=rng.integers(1, 300))
    documents = np.repeat(np.sort(rng.choice(1000, len(sizes), replace=False)), sizes)
    bounds = h.block_bounds(documents)
    assert bounds[0] == 0 and bounds[-1] == len(documents) and (np.diff(bounds) > 0).all()
    inner = bounds[1:-1]
    assert (documents[inner - 1] < documents[inner]).all()
    # No border is further from an even one than half of the largest document
    wished = np.linspace(0, len(documents), 21)
    assert np.abs(bounds[:, None] - wished).min(1).max() <= sizes.max() / 2
    assert len(bounds) == 21 or sizes.max() >= len(documents) / 40


def test_sites_add_up_to_the_residual_stream(run, tmp_path, finished, model):
    dump = {"z": lambda l: np.load(finished / f"L{l}.z.npy")}
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        assert run("--site", site, "--layers", "0", "1", "--dump_dtype", "float32")[0] == 0
        dump[site] = lambda l, site=site: np.load(tmp_path / "out" / "control" / f"L{l}.{site}.npy")
    w_o = model.blocks[1].attn.w_o.weight.detach().numpy()
    embedding = model.embedding.weight.detach().numpy()
    np.testing.assert_array_equal(dump["resid_pre"](0), embedding[np.load(finished / "tokens.npy")])
    np.testing.assert_allclose(dump["attn_out"](1), dump["z"](1) @ w_o.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dump["resid_post"](0), dump["resid_pre"](1))
    total = dump["resid_pre"](1) + dump["attn_out"](1) + dump["mlp_out"](1)
    np.testing.assert_allclose(dump["resid_post"](1), total, rtol=1e-4, atol=1e-4)


def test_float16_is_the_rounded_float32(run, tmp_path, finished):
    assert run("--layers", "2")[0] == 0
    half = np.load(tmp_path / "out" / "control" / "L2.z.npy")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, np.load(finished / "L2.z.npy").astype(np.float16))


@pytest.mark.parametrize(("site", "mlps"), [("z", 1), ("resid_post", 2)])
def test_what_comes_after_the_deepest_activation_never_runs(run, monkeypatch, site, mlps):
    heads, after = set(), set()
    forward, mlp = h.Attention.forward, h.Block.mlp
    monkeypatch.setattr(
        h, "golden_probe", lambda _: {"loss": 0.0}
    )  # it runs a whole model of its own
    monkeypatch.setattr(
        h.Attention, "forward", lambda self, *a: heads.add(id(self)) or forward(self, *a)
    )
    monkeypatch.setattr(h.Block, "mlp", lambda self, x: after.add(id(self)) or mlp(self, x))
    assert run("--layers", "1", "--site", site, "--skip_probe")[0] == 0
    assert (len(heads), len(after)) == (2, mlps)


def test_sidecar_statistics_equal_numpy(finished):
    for l in range(L):
        x, side = (
            np.load(finished / f"L{l}.z.npy").astype(np.float64),
            json.loads((finished / f"L{l}.z.npy.json").read_text()),
        )
        np.testing.assert_allclose(side["mean"], x.mean(0), atol=1e-9)
        np.testing.assert_allclose(side["variance"], x.var(0), rtol=1e-6, atol=1e-12)
        assert side["mean_norm"] == pytest.approx(np.linalg.norm(x, axis=1).mean())
        assert side["gamma"] == pytest.approx(np.linalg.norm(x.mean(0)) / np.sqrt(x.var(0).sum()))
        assert (side["schema"], side["shape"], side["dtype"], side["axes"]) == (
            "janus.activations/1",
            [N, H * K],
            "float32",
            "N D",
        )
        assert (side["layer"], side["site"], side["seq_len"], side["n_heads"], side["d_head"]) == (
            l,
            "z",
            T,
            H,
            K,
        )
        assert side["sha256"] == hashlib.sha256((finished / f"L{l}.z.npy").read_bytes()).hexdigest()
        assert side["checkpoint_sha256"] == side["inputs"][0]["sha256"]


# ---------------------------------------------------------------------------------------------------------- topology
def test_cosines_and_sigma_equal_numpy_of_the_dump(finished, model):
    pairs = pd.read_csv(finished / "head_cosines.csv")
    for l in range(L):
        c = cosines(heads(finished, l))
        np.testing.assert_allclose(pairs[pairs["layer"] == l]["cosine"], c, atol=1e-6)
        for metric, value in dict(
            mean_cosine=c.mean(),
            max_cosine=c.max(),
            max_abs_cosine=abs(c).max(),
            sigma_z=abs(c).mean(),
        ).items():
            assert stat(finished, l, metric)["value"] == pytest.approx(value, abs=1e-6)
        w = model.blocks[l].attn.w_o.weight.detach().double().numpy().reshape(H * K, H, K)
        o = np.einsum("hnk,dhk->hnd", heads(finished, l), w)  # formed here, not in the script
        assert stat(finished, l, "sigma_resid")["value"] == pytest.approx(
            abs(cosines(o)).mean(), abs=1e-6
        )


def test_effective_rank_equals_an_svd_and_cka_equals_its_kernel_form(finished):
    for l in range(L):
        z = heads(finished, l)
        s = np.linalg.svd(z.transpose(1, 0, 2).reshape(N, H * K), compute_uv=False)
        assert stat(finished, l, "effective_rank")["value"] == pytest.approx(
            s.sum() ** 2 / (s**2).sum(), rel=1e-5
        )
        assert stat(finished, l, "effective_rank_share")["value"] == pytest.approx(
            s.sum() ** 2 / (s**2).sum() / (H * K), rel=1e-5
        )
        centre = np.eye(N) - 1 / N
        kernels = [centre @ x @ x.T @ centre for x in z]
        hsic = np.array([[(a * b).sum() for b in kernels] for a in kernels])
        cka = (hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal())))[
            np.triu_indices(H, 1)
        ].mean()
        assert stat(finished, l, "linear_cka")["value"] == pytest.approx(cka, rel=1e-5)


def test_interval_is_the_jackknife_and_what_halves_show(finished):
    z = heads(finished, 3).reshape(H, 20, -1)
    without = np.array([abs(cosines(np.delete(z, b, axis=1))).mean() for b in range(20)])
    half = 2.093024 * np.sqrt(
        19 / 20 * ((without - without.mean()) ** 2).sum()
    )  # Student's t, 19 degrees of freedom
    row = stat(finished, 3, "sigma_z")
    # The bias: of some random halves of the blocks; the script's own are among the 184,756 that there are
    rng = np.random.default_rng(0)
    halves = []
    for _ in range(300):
        order = rng.permutation(20)
        halves += [abs(cosines(z[:, part])).mean() for part in (order[:10], order[10:])]
    assert row["half_text"] == pytest.approx(np.mean(halves), abs=4 * np.std(halves) / np.sqrt(6))
    more = (1 + np.sqrt(2)) * (row["half_text"] - row["value"])
    assert row["ci_hi"] - row["value"] == pytest.approx(half + max(0, -more), rel=1e-3)
    assert row["value"] - row["ci_lo"] == pytest.approx(half + max(0, more), rel=1e-3)
    assert (row["n_tokens"], row["n_windows"], row["n_blocks"]) == (N, N // T, 20)


def test_sigma_equals_what_training_logged(smoke_checkpoint, cache_dir, tmp_path, capsys):
    """The whole validation split: janus_adaptive.py measured the same with code of its own, layer by layer."""
    flags = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--cache_dir",
        str(cache_dir),
        "--split",
        "validation",
        "--layers",
        "0",
        "3",
        "9",
    ]
    assert (
        h.main(
            [
                "--model_path",
                str(smoke_checkpoint),
                "--save_dir",
                str(tmp_path),
                "--tokens",
                "10000000",
                *flags,
            ]
        )
        == 0
    )
    assert "tokens, not 10,000,000" in capsys.readouterr().out
    logged = (
        pd.read_csv(smoke_checkpoint.parent / "layers.csv")
        .query("step == step.max()")
        .set_index("layer")
    )
    for l in (0, 3, 9):
        for metric in ("sigma_z", "sigma_resid"):
            assert stat(tmp_path / "adaptive", l, metric)["value"] == pytest.approx(
                logged.loc[l, metric], rel=1e-3
            )


@pytest.mark.parametrize("sizes", [[5] * 20, [1, 2, 3, 4, 10, 3, 2, 8, 7, 6, 5, 5, 4, 9, 2]])
def test_jackknife_covers_the_true_mean(sizes):
    """Blocks of equal and of unequal size, in which all values are alike: each block is one observation."""
    rng, sizes = np.random.default_rng(1), np.array(sizes)
    hits = 0
    for _ in range(400):
        block = rng.normal(size=len(sizes)) + rng.normal(size=len(sizes)) / np.sqrt(sizes)  # means
        total = (block * sizes).sum()
        without = (total - block * sizes) / (sizes.sum() - sizes)
        value = total / sizes.sum()
        hits += abs(value) < h.jackknife(value, without, sizes / sizes.sum())
    assert 0.92 < hits / 400 < 0.98


def test_jackknife_with_equal_blocks_is_tukeys():
    without = np.random.default_rng(2).normal(size=20)
    variance = 19 / 20 * ((without - without.mean()) ** 2).sum()
    half = h.jackknife(without.mean(), without, np.full(20, 1 / 20))
    assert half == pytest.approx(2.093024 * np.sqrt(variance), rel=1e-6)


def test_null_equals_heads_whose_bases_are_turned_at_random(finished, model):
    z, rng = heads(finished, 1), np.random.default_rng(0)
    turns = np.linalg.qr(rng.normal(size=(2000, H, K, K)))[0]
    c = np.array(
        [cosines(np.einsum("hnk,hkm->hnm", z[:, ::4], t)) for t in turns]
    )  # every 4th token: faster
    sub = torch.from_numpy(z[:, ::4].transpose(1, 0, 2).reshape(-1, H * K))
    w_o = model.blocks[1].attn.w_o.weight.detach().double()
    null = h.null_topology(len(sub), sub.T @ sub, w_o, H, seed=0)
    assert null["sigma_z"].mean().item() == pytest.approx(abs(c).mean(), rel=0.06)
    assert null["max_cosine"].mean().item() == pytest.approx(c.max(1).mean(), rel=0.08)
    assert null["max_cosine"].quantile(0.975).item() == pytest.approx(
        np.quantile(c.max(1), 0.975), rel=0.08
    )
    o = np.einsum("hnk,dhk->hnd", z[:, ::4], w_o.numpy().reshape(H * K, H, K))
    turns = np.linalg.qr(rng.normal(size=(300, H, H * K, H * K)))[0]
    c = np.array([cosines(np.einsum("hnk,hkm->hnm", o, t)) for t in turns])
    assert null["sigma_resid"].mean().item() == pytest.approx(abs(c).mean(), rel=0.12)
    assert (
        null["effective_rank"].item()
        >= h.topology(len(sub), sub.sum(0), sub.T @ sub, w_o, H)["effective_rank"].item()
    )


def test_gauge_changes_sigma_z_and_nothing_else(finished, model):
    """Turning each head's value basis, undone by W_O, changes no output of the model: only sigma_z sees it."""
    z, w_o = (
        torch.from_numpy(np.load(finished / "L1.z.npy")).double(),
        model.blocks[1].attn.w_o.weight.detach().double(),
    )
    turn = torch.block_diag(
        *torch.linalg.qr(
            torch.randn(H, K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        )[0]
    )
    before = h.topology(N, z.sum(0), z.T @ z, w_o, H)
    z = z @ turn
    after = h.topology(N, z.sum(0), z.T @ z, w_o @ turn, H)
    for metric in ("sigma_resid", "linear_cka", "effective_rank"):
        assert after[metric].item() == pytest.approx(before[metric].item(), rel=1e-9)
    assert after["sigma_z"].item() != pytest.approx(before["sigma_z"].item(), rel=0.01)


def test_planted_heads():
    """Two equal heads and one that is independent of them."""
    x = torch.randn(4000, 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, w_o = torch.cat([x[:, 0], x[:, 0], x[:, 1]], 1), torch.eye(H * K, dtype=torch.float64)
    found = h.topology(4000, z.sum(0), z.T @ z, w_o, H)
    assert found["max_cosine"].item() == pytest.approx(1)
    assert found["linear_cka"].item() == pytest.approx(1 / 3, abs=0.01)
    s = np.sqrt([2.0] * K + [1.0] * K + [0.0] * K)
    assert found["effective_rank"].item() == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=0.01)
    assert found["sigma_resid"].item() < 0.02  # W_O writes the equal heads to different dimensions


# ------------------------------------------------------------------------------------------------ interrupted harvests
def test_killed_harvest_goes_on_to_the_same_bytes(world, tmp_path, finished):
    flags = command(world, tmp_path, "--dump_dtype", "float32", "--run_name", "r")
    # The process kills itself as soon as the fifth block is written, whatever else the machine does
    program = """
import os, signal, sys, numpy as np, harvest_activations as h
real = np.savez
def savez(file, **arrays):
    if "block05" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, **arrays)
np.savez = savez
sys.exit(h.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(h.__file__).parent,
        stderr=subprocess.DEVNULL,
    )
    assert done.returncode == -signal.SIGKILL
    left = sorted(p.name for p in (tmp_path / "r").iterdir())
    assert "block04.partial.npz" in left and "block19.partial.npz" not in left
    assert not [name for name in left if name.endswith((".npy.json", ".csv.json"))]
    torch.set_num_threads(1)
    assert h.main(flags) == 0
    assert digests(tmp_path / "r", "*.npy", "*.csv") == digests(finished, "*.npy", "*.csv")
    assert not list((tmp_path / "r").glob("*partial*"))


@pytest.mark.parametrize("moment", [1, 2, 7, 20])
def test_stopped_at_any_batch(run, tmp_path, monkeypatch, finished, moment):
    with monkeypatch.context() as m:
        calls, real = [], h.layer_activations

        def stop(*a):
            calls.append(1)
            if len(calls) > moment:
                raise KeyboardInterrupt
            return real(*a)

        m.setattr(h, "layer_activations", stop)
        assert run("--dump_dtype", "float32", "--run_name", "r")[0] == 1
        partial = list((tmp_path / "out" / "r").glob("L*.partial.npy"))
        assert len(partial) == L and all(
            p.stat().st_blocks * 512 >= p.stat().st_size for p in partial
        )  # the disk is ours already
        assert not list((tmp_path / "out" / "r").glob("*.npy.json"))
    assert run("--dump_dtype", "float32", "--run_name", "r")[0] == 0
    assert digests(tmp_path / "out" / "r", "*.npy", "*.csv") == digests(finished, "*.npy", "*.csv")


@pytest.mark.parametrize(
    ("before", "moment"),
    [([], 1), ([], 3), ([], 4), ([], 6), ([], 8), (["0"], 1), (["0"], 2), (["0"], 4)],
)
def test_stopped_while_finishing(run, tmp_path, monkeypatch, finished, before, moment):
    """Two CSVs, tokens, positions and the dumps: at no moment does a sidecar describe what is not there."""
    out, flags = tmp_path / "out" / "r", ["--dump_dtype", "float32", "--run_name", "r"]
    if before:
        assert run(*flags, "--layers", *before)[0] == 0
    with monkeypatch.context() as m:
        calls, real = [], h.write_sidecar

        def stop(*a, **kw):
            calls.append(1)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return real(*a, **kw)

        m.setattr(h, "write_sidecar", stop)
        assert run(*flags)[0] == 1
        for side in set(out.glob("*.json")) - {out / "run.json", out / h.PROGRESS}:
            assert (
                hashlib.sha256(side.with_suffix("").read_bytes()).hexdigest()
                == json.loads(side.read_text())["sha256"]
            )
    assert run(*flags)[0] == 0
    assert digests(out, "*.npy", "*.csv") == digests(finished, "*.npy", "*.csv")
    assert len(list(out.glob("L*.npy.json"))) == L


def test_layers_asked_for_later_are_added(run, tmp_path, finished):
    out = tmp_path / "out" / "r"
    assert run("--layers", "3", "0", "--dump_dtype", "float32", "--run_name", "r")[0] == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.npy*")}
    assert sorted(before) == sorted(
        f"{n}.npy{s}"
        for n in ("L0.z", "L3.z", "tokens", "positions", "documents")
        for s in ("", ".json")
    )
    assert run("--layers", "1", "2", "3", "--dump_dtype", "float32", "--run_name", "r")[0] == 0
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert digests(out, "*.npy", "*.csv") == digests(finished, "*.npy", "*.csv")
    status, text, _ = run("--layers", "1", "--dump_dtype", "float32", "--run_name", "r")
    assert status == 0 and "nothing to harvest" in text


@pytest.mark.parametrize(
    "flags", [["--split", "validation"], ["--dump_dtype", "float32"], ["--tokens", str(N // 2)]]
)
def test_other_output_is_in_the_way(run, tmp_path, flags):
    assert run("--layers", "0", "1")[0] == 0
    before = digests(tmp_path / "out" / "control", "*.npy*", "*.csv*")
    status, _, err = run("--layers", "0", *flags)
    assert status == 1 and "--overwrite" in err and err.count("\n") == 1
    assert digests(tmp_path / "out" / "control", "*.npy*", "*.csv*") == before
    assert run("--layers", "0", *flags, "--overwrite")[0] == 0
    assert not (
        tmp_path / "out" / "control" / "L1.z.npy"
    ).exists()  # it belonged to other tokens or another type
    assert set(pd.read_csv(tmp_path / "out" / "control" / "topology_stats.csv")["layer"]) == {0}


def test_an_unfinished_harvest_is_not_continued_with_other_settings(run, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(h, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--layers", "0")[0] == 1
    before = digests(tmp_path / "out" / "control", "*.np*")
    status, _, err = run("--layers", "0", "--dump_dtype", "float32")
    assert status == 1 and "unfinished" in err and "dump_dtype" in err
    assert digests(tmp_path / "out" / "control", "*.np*") == before
    assert run("--layers", "0", "--dump_dtype", "float32", "--overwrite")[0] == 0


def without_windows(path: Path) -> None:
    """What a version that harvested the first windows of a split wrote."""
    record = json.loads(path.read_text())
    record.pop("windows")
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("unfinished", [True, False])
def test_a_harvest_of_the_first_windows_is_not_continued(run, tmp_path, monkeypatch, unfinished):
    out = tmp_path / "out" / "control"
    with monkeypatch.context() as m:
        if unfinished:
            m.setattr(h, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--layers", "0")[0] == unfinished
    without_windows(out / (h.PROGRESS if unfinished else "tokens.npy.json"))
    before = digests(out, "*.np*", "*.csv*")
    status, _, err = run("--layers", "0", "1")
    assert status == 1 and err.count("\n") == 1 and "--overwrite" in err
    assert "windows None, not 'spread over the split'" in err
    assert digests(out, "*.np*", "*.csv*") == before


def test_a_damaged_unfinished_harvest_is_one_line(run, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(h.np, "savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--layers", "0")[0] == 1
    partial = tmp_path / "out" / "control" / "L0.z.partial.npy"
    partial.write_bytes(partial.read_bytes()[:1000])
    status, _, err = run("--layers", "0")
    assert status == 1 and "damaged" in err and err.count("\n") == 1
    assert run("--layers", "0")[0] == 0


# -------------------------------------------------------------------------------------------------------------- report
def test_figure_and_table_come_from_the_csvs_alone(tmp_path, finished):
    for name in ("a", "control"):
        (tmp_path / "out" / name).mkdir(parents=True)
        for csv in ("head_cosines.csv", "topology_stats.csv"):
            pd.read_csv(finished / csv).assign(run=name).query("layer > 1").to_csv(
                tmp_path / "out" / name / csv, index=False
            )
            h.write_sidecar(tmp_path / "out" / name / csv, h.TABLE_SCHEMA, [])
    redraw = ["--redraw", "--run_name", "a", "--save_dir", str(tmp_path / "out")]
    assert h.main(redraw) == 0
    first = digests(tmp_path / "out" / "a", "*.png", "*.txt")
    text = (tmp_path / "out" / "a" / "table1_topology.txt").read_text()
    assert (
        text.index("control") < text.index(" a\n")
        and f"{stat(finished, 2, 'max_cosine')['value']:.4g}" in text
    )
    assert h.main(redraw) == 0 and digests(tmp_path / "out" / "a", "*.png", "*.txt") == first
    assert h.main([*redraw, "--compare", "a"]) == 0
    assert (
        "control  "
        not in (tmp_path / "out" / "a" / "table1_topology.txt").read_text().partition("Interval")[0]
    )
    (tmp_path / "out" / "control" / "head_cosines.csv.json").unlink()  # as if it were being written
    assert h.main(redraw) == 0 and h.main([*redraw, "--compare", "a", "control"]) == 1
    assert f"{N} tokens of the train split, 40 documents in 20 blocks" in text
    csv = tmp_path / "out" / "a" / "head_cosines.csv"
    pd.read_csv(csv).assign(cosine=0.1).to_csv(csv, index=False)
    h.write_sidecar(csv, h.TABLE_SCHEMA, [])
    assert h.main(redraw) == 0
    assert (
        digests(tmp_path / "out" / "a", "*.png")["figure1_head_cosines.png"]
        != first["figure1_head_cosines.png"]
    )


# -------------------------------------------------------------------------------------------------------- wrong inputs
@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--layers", "4"], 1, "valid are 0 to 3"),
        (["--layers", "-1"], 1, "valid are 0 to 3"),
        (["--layers", "x"], 2, "--layers"),
        (["--tokens", "5"], 1, "less than one window of 16"),
        (["--tokens", "0"], 2, "--tokens"),
        (["--max_gb", "1e-6"], 1, "--max_gb"),
        (["--model_path", "nothing.pt"], 1, "does not exist"),
        (["--dataset", "nothing.txt"], 1, "nothing.txt"),
        (["--tokenizer", "train:280"], 1, "leave --tokenizer out"),
        (["--tokenizer", "nothing.json"], 1, "nothing.json"),
        (["--run_name", "../up"], 2, "not a run name"),
        (["--compare", "nobody"], 1, "nobody"),
        (["--redraw"], 2, "--redraw needs --run_name"),
        (["--redraw", "--run_name", "nobody"], 1, "nobody"),
        (["--site", "q"], 2, "--site"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(run, tmp_path, flags, status, says):
    found, _, err = run(*flags)
    assert found == status and says in err and "Traceback" not in err
    assert status == 2 or err.count("\n") == 1
    assert not list(tmp_path.glob("out/**/*.np*"))


def test_no_model(capsys):
    with pytest.raises(SystemExit) as e:
        h.main([])
    assert e.value.code == 2 and "--model_path" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "pickle", "unfinished"])
def test_damaged_checkpoint(run, world, tmp_path, damage):
    shutil.copytree(world / "ck", tmp_path / "ck")
    path = tmp_path / "ck" / "janus_control_final.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"model": os.system}, path)
        h.write_sidecar(path, h.CHECKPOINT_SCHEMA, [])
    else:
        h.sidecar_path(path).unlink()
    status, _, err = run(ckpt=path)
    assert status == 1 and err.count("\n") == 1 and "janus_control_final.pt" in err


def scale_values(model, factor: float) -> None:
    for block in model.blocks:
        block.attn.w_qkv.weight[2 * H * K :] *= factor


@pytest.mark.parametrize("probe", [[], ["--skip_probe"]])
def test_weights_that_are_not_finite(run, world, tmp_path, probe):
    path = write_checkpoint(
        tmp_path / "nan",
        world / "text.txt",
        world / "cache",
        lambda m: scale_values(m, float("nan")),
    )
    status, _, err = run(*probe, ckpt=path)
    assert status == 1 and "nan" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/**/*.np*"))


def test_overflow_of_float16_names_the_flag_that_helps(run, world, tmp_path):
    path = write_checkpoint(
        tmp_path / "big", world / "text.txt", world / "cache", lambda m: scale_values(m, 1e5)
    )
    status, _, err = run(ckpt=path)
    assert status == 1 and "--dump_dtype float32" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/**/*.np*"))
    assert run("--dump_dtype", "float32", ckpt=path)[0] == 0
    assert np.abs(np.load(tmp_path / "out" / "control" / "L0.z.npy")).max() > 65504


def test_disk_too_small(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        h.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    )
    status, _, err = run()
    assert status == 1 and "GB free" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/**/*.np*"))


def test_disk_blocks_that_cannot_be_had(run, tmp_path):
    """A real refusal of the operating system, while the dumps of a finished run are there."""
    assert run("--layers", "0")[0] == 0
    before = digests(tmp_path / "out" / "control", "*.npy*", "*.csv*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (N * H * K * 2 - 1000, limits[1])
    )  # a little less than one dump
    try:
        status, _, err = run("--layers", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and "L1.z" in err and err.count("\n") == 1
    assert digests(tmp_path / "out" / "control", "*.npy*", "*.csv*") == before
    assert not list((tmp_path / "out" / "control").glob("*partial*"))
    assert run("--layers", "1")[0] == 0


def test_tables_of_first_windows_are_not_shown_as_others(tmp_path, finished, capsys):
    out = tmp_path / "out"
    for name in ("a", "old"):
        (out / name).mkdir(parents=True)
        for csv in ("head_cosines.csv", "topology_stats.csv"):
            table = pd.read_csv(finished / csv).assign(run=name)
            table.drop(columns=["split"] if name == "old" else []).to_csv(
                out / name / csv, index=False
            )
            h.write_sidecar(out / name / csv, h.TABLE_SCHEMA, [])
    redraw = ["--redraw", "--run_name", "a", "--save_dir", str(out)]
    assert h.main(redraw) == 0
    assert not re.search(r"\bold\b", (out / "a" / "table1_topology.txt").read_text())
    capsys.readouterr()
    assert h.main([*redraw, "--compare", "a", "old"]) == 1
    err = capsys.readouterr().err
    assert (
        "no column split: an older version took the first windows" in err and err.count("\n") == 1
    )

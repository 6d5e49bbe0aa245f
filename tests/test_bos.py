"""Windows that begin with BOS, in all phases: against windows made by hand, torch's own cross
entropy, and hooks on the output projections."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import ablation_test as ablation
import harvest_activations as harvest
import hero_head_analysis as hero
import janus_adaptive as janus
import real_model_extension as real
import train_sae

LAYER = 3
N_HEADS = 3
T = 64  # tokens a window of the smoke preset
N_WINDOWS = 60  # that are harvested


class World(NamedTuple):
    """A checkpoint without BOS, the same one with it, and the text that both read."""

    plain: Path
    with_bos: Path
    bos: int  # a token that the text does not hold
    streams: dict[str, np.ndarray]  # by split, its tokens [n]
    starts: dict[str, np.ndarray]  # by split, where documents begin
    text: str
    cache: Path


def rewritten(checkpoint: Path, folder: Path, bos: int) -> Path:
    """A copy of a checkpoint that says that windows begin with a token."""
    folder.mkdir()
    shutil.copy(checkpoint.with_name("tokenizer.json"), folder)
    ckpt = torch.load(checkpoint, weights_only=True) | {"bos": bos}
    path = folder / checkpoint.name
    torch.save(ckpt, path)
    janus.write_sidecar(path, janus.CHECKPOINT_SCHEMA, [], config=ckpt["config"], bos=bos)
    return path


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Phases 1, 2 and 4 draw nothing here: it takes longer than what they measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "report", lambda args: None)
        patch.setattr(ablation, "draw", lambda csv: None)
        patch.setattr(janus, "draw_training", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def world(
    smoke_checkpoint: Path,
    text_file: Path,
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    tokenizer = str(smoke_checkpoint.with_name("tokenizer.json"))
    streams, starts = {}, {}
    for split in ("train", "validation"):
        data = janus.HFWikiTextLoader(str(text_file), tokenizer, T, split, cache_dir)
        streams[split] = np.array(data.tokens).astype(int)
        starts[split] = data.document_starts
    occurs = np.isin(np.arange(512), np.concatenate(list(streams.values())))
    bos = int(np.flatnonzero(~occurs)[0])
    folder = tmp_path_factory.mktemp("bos") / "checkpoint"
    with_bos = rewritten(smoke_checkpoint, folder, bos)
    return World(smoke_checkpoint, with_bos, bos, streams, starts, str(text_file), cache_dir)


def by_hand(stream: np.ndarray, windows: np.ndarray, bos: int | None):
    """Inputs and targets [n, T] of windows by number, as they are defined."""
    inputs, targets = [], []
    for window in windows.tolist():
        first = window * T
        if bos is None:
            inputs.append(stream[first : first + T].tolist())
            targets.append(stream[first + 1 : first + T + 1].tolist())
        else:
            inputs.append([bos, *stream[first : first + T - 1].tolist()])
            targets.append(stream[first : first + T].tolist())
    return torch.tensor(inputs), torch.tensor(targets)


def losses(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each window [n], nats a token."""
    logits, _ = model(inputs)
    by_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return by_token.view(targets.shape).mean(1)


def model_of(checkpoint: Path) -> janus.NewGPT:
    return janus.load_checkpoint(checkpoint, torch.device("cpu"), False)[0].requires_grad_(False)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which is one line."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0]


# ------------------------------------------------------------------------------------------ windows
@pytest.mark.parametrize("n_more", [0, 1, 5])
def test_a_window_with_bos_uses_t_tokens_and_predicts_the_first_of_them(
    world: World, n_more: int
) -> None:
    tokenizer = str(world.plain.with_name("tokenizer.json"))
    data = janus.HFWikiTextLoader(world.text, tokenizer, T, "validation", world.cache, world.bos)
    stream = world.streams["validation"]
    assert data.n_windows == len(stream) // T
    windows = np.array([0, 7, data.n_windows - 1])
    inputs, targets = by_hand(stream, windows, world.bos)
    x, y = data.batch(windows)
    assert torch.equal(x, inputs) and torch.equal(y, targets)
    # Shifted windows, as training takes them, and as the cursor deals them out
    x, y = data.batch(windows[:2], offset=n_more)
    inputs, targets = by_hand(stream[n_more:], windows[:2], world.bos)
    assert torch.equal(x, inputs) and torch.equal(y, targets)
    x, y = data.shuffled(n_more, 2 * data.n_windows, seed=3)  # over the end of an epoch
    assert x.shape == y.shape == (2 * data.n_windows, T)
    assert (x[:, 0] == world.bos).all() and torch.equal(x[:, 1:], y[:, :-1])
    # The document of BOS is that of its window
    of_stream = np.zeros(len(stream), int)
    of_stream[world.starts["validation"]] = 1
    document = of_stream.cumsum() - 1  # [n], of each token
    expected = [[document[w * T], *document[w * T : w * T + T - 1]] for w in windows]
    np.testing.assert_array_equal(data.documents(windows), expected)


def test_a_token_that_the_tokenizer_lacks_is_one_line(world: World) -> None:
    tokenizer = str(world.plain.with_name("tokenizer.json"))
    with pytest.raises(janus.HandoffError, match="token 512 .BOS., the tokenizer has 0 to 511"):
        janus.HFWikiTextLoader(world.text, tokenizer, T, "validation", world.cache, 512)


# ------------------------------------------------------------------------------------------ phase 2
def harvest_command(world: World, checkpoint: Path, save_dir: Path, *flags: str) -> list[str]:
    fixed = ["--dtype", "float32", "--cache_dir", str(world.cache), "--save_dir", str(save_dir)]
    sizes = ["--layers", str(LAYER), "--tokens", str(N_WINDOWS * T), "--dump_dtype", "float32"]
    return ["--model_path", str(checkpoint), *fixed, *sizes, *flags]


@pytest.fixture(scope="module")
def dumps(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Harvests: adaptive, with BOS; without, of the checkpoint with BOS; plain, of the other."""
    root = tmp_path_factory.mktemp("dumps")
    assert harvest.main(harvest_command(world, world.with_bos, root)) == 0
    without = harvest_command(world, world.with_bos, root, "--bos", "no", "--run_name", "without")
    assert harvest.main(without) == 0
    assert harvest.main(harvest_command(world, world.plain, root, "--run_name", "plain")) == 0
    return root


@pytest.mark.parametrize("run", ["adaptive", "without", "plain"])
def test_harvest_is_a_forward_pass_on_windows_made_by_hand(
    world: World, dumps: Path, run: str
) -> None:
    bos = world.bos if run == "adaptive" else None
    stream = world.streams["train"]
    n_all = (len(stream) - (bos is None)) // T
    windows = np.arange(N_WINDOWS) * n_all // N_WINDOWS
    inputs, _ = by_hand(stream, windows, bos)
    seen: list[torch.Tensor] = []
    model = model_of(world.with_bos)
    projection = model.blocks[LAYER].attn.w_o
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(inputs)
    hook.remove()

    folder = dumps / run
    tokens = np.load(folder / "tokens.npy")
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens.reshape(-1, T), inputs)
    assert ((tokens == world.bos).sum() == N_WINDOWS) == (bos is not None)
    np.testing.assert_array_equal(np.load(folder / "positions.npy"), np.tile(range(T), N_WINDOWS))
    z = np.load(folder / f"L{LAYER}.z.npy").reshape(N_WINDOWS, T, -1)
    np.testing.assert_allclose(z, seen[0], rtol=0, atol=1e-5 * np.abs(z).max())
    documents = np.load(folder / "documents.npy").reshape(N_WINDOWS, T)
    first = np.searchsorted(world.starts["train"], windows * T, side="right") - 1
    np.testing.assert_array_equal(documents[:, 0], first)
    for name in ("tokens.npy", "documents.npy", f"L{LAYER}.z.npy"):
        assert json.loads((folder / f"{name}.json").read_text())["bos"] == bos


def test_without_bos_the_bytes_are_those_of_a_checkpoint_that_has_none(dumps: Path) -> None:
    for name in ("tokens.npy", "positions.npy", "documents.npy", f"L{LAYER}.z.npy"):
        assert (dumps / "without" / name).read_bytes() == (dumps / "plain" / name).read_bytes()


def test_a_harvest_with_other_windows_is_not_added_to(
    world: World, dumps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = harvest_command(world, world.with_bos, dumps, "--bos", "no", "--layers", "4")
    assert harvest.main(more) == 1
    assert f"bos {world.bos}, not None" in one_line(capsys)


def test_an_unfinished_harvest_goes_on_with_its_own_windows_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(harvest, "finish", killed)
        assert harvest.main(harvest_command(world, world.with_bos, tmp_path)) == 1
        assert harvest.main(harvest_command(world, world.plain, tmp_path, "--run_name", "old")) == 1
    capsys.readouterr()
    command = harvest_command(world, world.with_bos, tmp_path, "--bos", "no")
    assert harvest.main(command) == 1
    assert "unfinished harvest" in (line := one_line(capsys)) and "bos" in line
    # One of before there was BOS is the same as one without it
    progress = tmp_path / "old" / harvest.PROGRESS
    job = json.loads(progress.read_text())
    assert job.pop("bos") is None
    harvest.write_json(progress, job)
    monkeypatch.setattr(harvest, "begin", killed)  # it would begin anew
    assert harvest.main(harvest_command(world, world.plain, tmp_path, "--run_name", "old")) == 0
    assert not progress.exists()


# ------------------------------------------------------------------------------------------ phase 4
def ablation_command(world: World, checkpoint: Path, csv: Path, *flags: str) -> list[str]:
    fixed = ["--dtype", "float32", "--cache_dir", str(world.cache), "--save_file", str(csv)]
    few = ["--n_seqs", "8", "--n_linear", "40", "--layers", str(LAYER), "--bootstrap", "200"]
    model = ["--adaptive_model", str(checkpoint)]
    return [*model, *fixed, *few, "--mode", "mean", "zero", *flags]


@pytest.fixture(scope="module")
def tables(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CSVs of phase 4: with BOS, and without it of the same checkpoint."""
    root = tmp_path_factory.mktemp("tables")
    csvs = {"with": root / "with" / "a.csv", "without": root / "without" / "a.csv"}
    assert ablation.main(ablation_command(world, world.with_bos, csvs["with"])) == 0
    no = ["--bos", "no"]
    assert ablation.main(ablation_command(world, world.with_bos, csvs["without"], *no)) == 0
    return csvs


@pytest.mark.parametrize("name", ["with", "without"])
def test_ablation_losses_are_cross_entropies_on_windows_made_by_hand(
    world: World, tables: dict[str, Path], name: str
) -> None:
    bos = world.bos if name == "with" else None
    arrays = np.load(tables[name].with_suffix(".npz"))
    stream = world.streams["validation"]
    model = model_of(world.plain)
    inputs, targets = by_hand(stream, arrays["split.windows"], bos)
    base = losses(model, inputs, targets)
    np.testing.assert_allclose(arrays["adaptive.split.base"], base, rtol=0, atol=1e-5)

    # Each head's columns of what the output projection reads are 0
    inputs, targets = by_hand(stream, arrays["windows"], bos)
    np.testing.assert_allclose(
        arrays["adaptive.base"], losses(model, inputs, targets), rtol=0, atol=1e-5
    )
    for head in range(N_HEADS):

        def without(_: object, args: tuple[torch.Tensor], head: int = head) -> torch.Tensor:
            z = args[0].unflatten(-1, (N_HEADS, -1)).clone()
            z[:, :, head] = 0
            return z.flatten(-2)

        hook = model.blocks[LAYER].attn.w_o.register_forward_pre_hook(without)
        expected = losses(model, inputs, targets)
        hook.remove()
        found = arrays["adaptive.zero.loss"][:, 0, head]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    # BOS is no word whose frequency counts
    train = world.streams["train"]
    counts = np.bincount(train, minlength=512) + 1
    unigram = -np.log(counts / counts.sum())[targets].mean(1)
    np.testing.assert_allclose(arrays["unigram"], unigram, rtol=1e-6)
    for file in (tables[name], tables[name].with_suffix(".npz")):
        assert json.loads(Path(f"{file}.json").read_text())["bos"] == bos


def test_without_bos_a_table_is_that_of_a_checkpoint_that_has_none(
    world: World, tables: dict[str, Path], tmp_path: Path
) -> None:
    assert ablation.main(ablation_command(world, world.plain, tmp_path / "a.csv")) == 0
    plain = np.load(tmp_path / "a.npz")
    without = np.load(tables["without"].with_suffix(".npz"))
    assert list(plain) == list(without)
    for name in plain:
        np.testing.assert_array_equal(plain[name], without[name])


def test_two_models_that_begin_otherwise_are_not_compared(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ablation_command(world, world.with_bos, tmp_path / "a.csv")
    assert ablation.main([*command, "--control_model", str(world.plain)]) == 1
    assert f"has BOS token None, {world.with_bos} {world.bos}" in one_line(capsys)


# ------------------------------------------------------------------------------------------ phase 3
@pytest.fixture(scope="module")
def saes(world: World, dumps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of the dump with BOS."""
    root = tmp_path_factory.mktemp("saes")
    where = ["--activations_dir", str(dumps), "--save_dir", str(root), "--runs", "adaptive"]
    sizes = ["--preset", "smoke", "--steps", "40", "--layers", str(LAYER)]
    assert train_sae.main([*where, *sizes, "--cache_dir", str(world.cache)]) == 0
    return root


def test_ce_recovered_reads_what_the_model_saw(world: World, dumps: Path, saes: Path) -> None:
    folder = saes / "adaptive" / f"L{LAYER}"
    side = json.loads((folder / "sae_weights.safetensors.json").read_text())
    assert side["bos"] == world.bos
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["prepend_bos"] is True

    dump = train_sae.Dump(dumps / "adaptive", LAYER, "z")
    chosen = dump.evaluation(train_sae.PHASE_PRESETS["smoke"]["eval_tokens"] // 6)
    stream = world.streams["train"]
    windows = (np.arange(N_WINDOWS) * (len(stream) // T) // N_WINDOWS)[chosen]
    inputs, _ = by_hand(stream, windows, world.bos)
    logits, _ = model_of(world.plain)(inputs)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    assert side["metrics"]["ce_clean"] == pytest.approx(expected.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------ phase 5
def hero_command(world: World, csv: Path, dumps: Path, saes: Path, out: Path, *flags: str):
    places = ["--activations_dir", str(dumps), "--saes_dir", str(saes), "--save_dir", str(out)]
    sizes = ["--n_seqs", "20", "--n_features", "2", "--cache_dir", str(world.cache)]
    return ["--ablation_csv", str(csv), *places, *sizes, *flags]


def test_hero_page_shows_bos_and_does_not_count_it(
    world: World, tables: dict[str, Path], dumps: Path, saes: Path, tmp_path: Path
) -> None:
    text = ["--text", "the quick fox and the quick dog"]
    command = hero_command(world, tables["with"], dumps, saes, tmp_path / "out", *text)
    assert hero.main(command) == 0
    tokenizer = hero.read_tokenizer(world.plain.with_name("tokenizer.json"))
    shown = hero.visible_texts(tokenizer, [world.bos])[0]

    def table(name: str) -> pd.DataFrame:
        return hero.csv_table(tmp_path / "out" / f"hero_{name}.csv")

    # Windows, that of --text too, begin with it: nothing predicts it, and it predicts the first
    pieces = table("windows")
    of_text = pieces[pieces["chosen"] == "--text"].reset_index(drop=True)
    assert of_text["token"][0] == shown and "".join(of_text["token"][1:]).startswith("the·quick")
    assert of_text["delta_nats"].isna().tolist() == [True] + [False] * (len(of_text) - 1)
    assert of_text["key_token_1"][1] == shown
    # It is no token that the head reads, looks for, or that is common
    sides = {"ov": ["source"], "qk_pairs": ["query", "key"]}
    for name, columns in sides.items():
        assert not table(name)[columns].isin([shown]).any(axis=None)
    report = (tmp_path / "out" / "hero_report.md").read_text(encoding="utf-8")
    assert "BOS token" in report
    side = json.loads((tmp_path / "out" / "hero_impact.csv.json").read_text())
    assert side["bos"] == world.bos

    # The loss that the hero saves, by hand: mean of z over training windows in its place
    impact = table("impact").iloc[0]
    model = model_of(world.plain)
    seen: list[torch.Tensor] = []
    projection = model.blocks[LAYER].attn.w_o
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    windows = {split: len(stream) // T for split, stream in world.streams.items()}
    chosen = {split: np.arange(20) * n // 20 for split, n in windows.items()}
    model(by_hand(world.streams["train"], chosen["train"], world.bos)[0])
    hook.remove()
    mean = seen[0].unflatten(-1, (N_HEADS, -1)).mean((0, 1))[impact["head"]]  # [K]

    def replaced(_: object, args: tuple[torch.Tensor]) -> torch.Tensor:
        z = args[0].unflatten(-1, (N_HEADS, -1)).clone()
        z[:, :, impact["head"]] = mean
        return z.flatten(-2)

    inputs, _ = by_hand(world.streams["validation"], chosen["validation"], world.bos)
    before = losses(model, inputs[:, :-1], inputs[:, 1:])
    projection.register_forward_pre_hook(replaced)
    after = losses(model, inputs[:, :-1], inputs[:, 1:])
    assert impact["value"] == pytest.approx((after - before).mean().item(), abs=1e-6)


def test_an_ablation_and_a_dump_that_disagree_are_one_line(
    world: World, tables: dict[str, Path], dumps: Path, saes: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    # The table without BOS, the dump with it: refused whichever of them --bos agrees with
    assert hero.main(hero_command(world, tables["without"], dumps, saes, out)) == 1
    line = one_line(capsys)
    assert "a.csv was made from windows that begin with their text, without BOS" in line
    assert f"expected BOS token {world.bos}; remake it with: python ablation_test.py" in line
    no = ["--bos", "no"]
    assert hero.main(hero_command(world, tables["without"], dumps, saes, out, *no)) == 1
    line = one_line(capsys)
    assert f"L{LAYER}.z.npy was made from windows that begin with BOS token {world.bos}" in line
    assert "expected their text, without BOS" in line
    assert "python harvest_activations.py" in line and line.endswith("--bos no")
    assert not out.exists()


def test_bos_is_no_previous_and_no_duplicate_word() -> None:
    bos, a, b = 0, 1, 2
    idx = torch.tensor([[bos, a, b, a, bos, bos]])  # a text may hold the token as well
    text = hero.Text(idx, str, "validation", np.zeros(1, int), bos=bos)

    def pairs(kind: hero.KindOfKey) -> list[list[int]]:
        return kind(text)[0].nonzero().tolist()  # (query, key)

    assert pairs(hero.first_position) == [[q, 0] for q in range(6)]
    assert pairs(hero.previous_token) == [[2, 1], [3, 2], [4, 3], [5, 4]]
    assert pairs(hero.duplicate_token) == [[3, 1], [5, 4]]
    assert pairs(hero.after_duplicate) == [[3, 2]]
    near = [[q, k] for q in range(6) for k in range(1, q + 1)]
    assert pairs(hero.up_to_5_back) == [[0, 0], *near]  # what reads BOS is BOS itself


def test_shuffled_and_random_texts_begin_with_bos_too() -> None:
    idx = torch.randint(1, 30, (5, 12), generator=torch.Generator().manual_seed(0))
    idx[:, 0] = 0
    texts = hero.score_texts(hero.Text(idx, str, "validation", np.arange(5), bos=0), 30)
    shuffled = texts[hero.Reads.ANALYSED].shuffled
    assert (shuffled[:, 0] == 0).all() and not torch.equal(shuffled, idx)
    assert torch.equal(shuffled.sort(1).values, idx.sort(1).values)
    repeated = texts[hero.Reads.REPEATED]
    for ids in (repeated.text.idx, repeated.shuffled):
        assert (ids[:, 0] == 0).all() and (ids[:, 1:] > 0).all()
    assert torch.equal(repeated.text.idx[:, 1:6], repeated.text.idx[:, 6:])
    assert repeated.text.bos == 0


# ---------------------------------------------------------------------------------- the flag, phase 1
def test_yes_needs_a_checkpoint_that_names_a_token(world: World, tmp_path: Path, capsys) -> None:
    yes = ["--bos", "yes"]
    assert harvest.main(harvest_command(world, world.plain, tmp_path / "a", *yes)) == 1
    assert f"--bos yes: {world.plain} names no BOS token" in one_line(capsys)
    assert ablation.main(ablation_command(world, world.plain, tmp_path / "b.csv", *yes)) == 1
    assert f"--bos yes: {world.plain} names no BOS token" in one_line(capsys)
    fresh = ["--preset", "smoke", "--dataset", world.text, "--save_dir", str(tmp_path / "c")]
    assert janus.main([*fresh, "--init_from", str(world.plain), *yes]) == 1
    assert f"--bos yes: {world.plain} names no BOS token" in one_line(capsys)
    for choice in ("yes", "no"):
        with pytest.raises(SystemExit) as stopped:
            janus.main([*fresh, "--bos", choice])
        assert stopped.value.code == 2 and "--init_from" in one_line(capsys)


def test_yes_in_phase_5_needs_it_too(world: World, tmp_path: Path, capsys) -> None:
    assert ablation.main(ablation_command(world, world.plain, tmp_path / "a.csv")) == 0
    capsys.readouterr()
    nothing = tmp_path / "none"
    command = hero_command(world, tmp_path / "a.csv", nothing, nothing, tmp_path / "out")
    assert hero.main([*command, "--bos", "yes"]) == 1
    assert "--bos yes: " in (line := one_line(capsys)) and "names no BOS token" in line


@pytest.mark.parametrize("choice", ["auto", "no"])
def test_training_goes_on_with_the_windows_of_its_model(
    world: World, tmp_path: Path, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--preset", "smoke", "--steps", "2", "--save_interval", "1", "--seq_len", str(T)]
    data = ["--dataset", world.text, "--cache_dir", str(world.cache), "--dtype", "float32"]
    command = ["--init_from", str(world.with_bos), *sizes, *data, "--save_dir", str(tmp_path)]
    assert janus.main([*command, "--bos", choice]) == 0
    bos = world.bos if choice == "auto" else None
    final = tmp_path / "janus_adaptive_final.pt"
    assert torch.load(final, weights_only=True)["bos"] == bos
    # The loss of each window of the whole split
    table = pd.read_csv(tmp_path / "validation.csv")
    inputs, targets = by_hand(world.streams["validation"], table["window"].to_numpy(), bos)
    expected = losses(model_of(final), inputs, targets)
    np.testing.assert_allclose(table["loss_nats"], expected, rtol=0, atol=1e-5)
    # A run does not go on with other windows
    other = "no" if choice == "auto" else "auto"
    janus.sidecar_path(final).unlink()
    final.unlink()
    capsys.readouterr()
    assert janus.main([*command, "--bos", other, "--resume"]) == 1
    assert f"--resume would change --bos from {choice} to {other}" in one_line(capsys)


# ---------------------------------------------------------------------------------------- Energy-Lens
def test_energy_lens_reads_a_checkpoint_as_it_says(world: World) -> None:
    plain = real.load_janus_model(str(world.plain))
    with_bos = real.load_janus_model(str(world.with_bos))
    text = "the quick fox"
    assert with_bos.encode(text) == [world.bos, *plain.encode(text)]
    assert (plain.bos, with_bos.bos) == (None, world.bos)
    ids = torch.tensor([[9, 1, 2], [9, 1, 1]])
    nats = real.unigram_nats(ids, begins_with_bos=True)
    # Sequence 0 is asked for 1 and 2, by counts 2 + 1 and 0 + 1; sequence 1 twice for 1, by 1 + 1
    expected = -np.log([[3 / 4, 1 / 4], [2 / 4, 2 / 4]])
    np.testing.assert_allclose(nats, expected)

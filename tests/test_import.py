"""Pretrained Llamas as Janus checkpoints: against transformers and TransformerLens, through phases
1 to 5, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import ablation_test
import harvest_activations
import hero_head_analysis
import janus_adaptive as janus
import train_sae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import export_hf  # noqa: E402
import import_hf  # noqa: E402

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
THETA = {"rope_type": "default", "rope_theta": 100_000.0}


def build(folder: Path, tokenizer: Path, rope: dict = THETA, **more) -> Path:
    """A folder with a random Llama and a tokenizer."""
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(fast), rope_parameters=rope, **SIZES | more)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def build_bloom(folder: Path) -> Path:
    """A folder with a random model of an architecture that NewGPT does not compute."""
    config = BloomConfig(vocab_size=512, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(smoke_checkpoint) -> Path:
    return smoke_checkpoint.with_name("tokenizer.json")


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), tokenizer, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def text_flags(text_file, cache_dir) -> list[str]:
    return ["--dataset", str(text_file), "--cache_dir", str(cache_dir)]


@pytest.fixture(scope="module")
def imported(source, text_flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported")
    assert import_hf.main([str(source), str(out), "--seq_len", "32", *text_flags]) == 0
    return out / "janus_pretrained_final.pt"


def validation_text(checkpoint: Path, cache_dir: Path) -> janus.HFWikiTextLoader:
    dataset = json.loads(Path(f"{checkpoint}.json").read_text())["dataset"]
    tokenizer = str(checkpoint.with_name("tokenizer.json"))
    return janus.HFWikiTextLoader(dataset, tokenizer, 32, "validation", cache_dir)


def windows(n: int, checkpoint: Path, cache_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The validation windows that ablation_test.py takes for --n_seqs n: inputs, targets [n, T]."""
    data = validation_text(checkpoint, cache_dir)
    return data.batch(data.spread(n))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied, tokenizer, text_flags, tmp_path, capsys):
    folder = build(tmp_path / "in", tokenizer, tie_word_embeddings=tied)
    out = tmp_path / "out"
    assert import_hf.main([str(folder), str(out), "--seq_len", "32", *text_flags]) == 0
    model, ckpt = janus.load_checkpoint(out / "janus_pretrained_final.pt", CPU, False)
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    x = torch.randint(512, (3, 32))
    with torch.inference_mode():
        assert (model(x)[0] - theirs(x).logits).abs().max() <= 1e-4
    assert model.n_params()[0] == sum(p.numel() for p in theirs.parameters())
    assert model.cfg.tied is tied
    assert model.cfg.rope_theta == 1e5 and model.cfg.norm_eps == 1e-6
    assert ckpt["arm"] == "pretrained"

    # "letters: 7.73991 nats a token, transformers 7.73991"
    words = capsys.readouterr().out.split("letters: ")[1].replace(",", "").split()
    ours, of_transformers = float(words[0]), float(words[5])
    assert abs(ours - of_transformers) <= 1e-3


def test_it_can_be_exported_again(source, imported, tmp_path):
    """The same weights come out; the card says that none of its tokens were seen here."""
    out = tmp_path / "out"
    assert export_hf.main([str(imported), str(out)]) == 0
    before = LlamaForCausalLM.from_pretrained(source).state_dict()
    after = LlamaForCausalLM.from_pretrained(out).state_dict()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    card = (out / "README.md").read_text()
    assert "pretrained arm, step 0" in card and " 0 tokens seen of" in card


def test_zero_ablation_is_that_of_transformer_lens(source, imported, cache_dir, tmp_path):
    """The same heads in the same order, deltas within 1e-3 nats: TransformerLens zeroes hook_z of
    the original folder."""
    from transformer_lens.model_bridge import TransformerBridge

    argv = ["--adaptive_model", str(imported), "--mode", "zero", "--n_seqs", "8"]
    # --plain: of these eight sequences, as theirs are
    argv += ["--bootstrap", "200", "--dtype", "float32", "--plain", "--cache_dir", str(cache_dir)]
    assert ablation_test.main([*argv, "--save_file", str(tmp_path / "r.csv")]) == 0
    table = pd.read_csv(tmp_path / "r.csv").set_index(["layer", "head"])
    bridge = TransformerBridge.boot_transformers(str(source), device="cpu")
    x, y = windows(8, imported, cache_dir)

    def loss(hooks: list) -> float:
        with torch.inference_mode():
            logits = bridge.run_with_hooks(x, fwd_hooks=hooks)
        return cross_entropy(logits.flatten(0, 1), y.flatten()).item()

    def without(layer: int, head: int) -> float:
        def zero(z: torch.Tensor, hook: object) -> torch.Tensor:
            return z.index_fill(2, torch.tensor([head]), 0.0)

        return loss([(f"blocks.{layer}.attn.hook_z", zero)])

    base = loss([])
    assert table["base_loss"].iloc[0] == pytest.approx(base, abs=1e-3)
    theirs = {key: without(*key) - base for key in np.ndindex(3, 4)}  # (layer, head)
    delta = np.array([theirs[key] for key in table.index])
    assert np.abs(table["delta"] - delta).max() <= 1e-3 and np.abs(delta).max() > 0.02
    strongest = sorted(theirs, key=theirs.get, reverse=True)[:5]
    assert list(table.sort_values("rank").index[:5]) == strongest


def test_phases_2_to_5_run_on_it(imported, cache_dir, tmp_path, capsys):
    quick = ["--cache_dir", str(cache_dir), "--dtype", "float32"]
    csv = tmp_path / "r.csv"
    ablate = ["--adaptive_model", str(imported), "--save_file", str(csv), "--mode", "mean"]
    sizes = ["--n_seqs", "8", "--n_mean", "8", "--bootstrap", "200"]
    assert ablation_test.main([*ablate, *sizes, *quick]) == 0
    layer = str(pd.read_csv(csv).query("rank == 1")["layer"].iloc[0])

    dumps, saes = str(tmp_path / "activations"), str(tmp_path / "saes")
    harvest = ["--model_path", str(imported), "--layers", layer, "--save_dir", dumps]
    assert harvest_activations.main([*harvest, "--tokens", "2560", *quick]) == 0
    sae = ["--activations_dir", dumps, "--save_dir", saes, "--steps", "20"]
    assert train_sae.main([*sae, "--batch_size", "256", *quick]) == 0

    hero = ["--ablation_csv", str(csv), "--saes_dir", saes, "--activations_dir", dumps]
    hero += ["--n_seqs", "8", "--n_features", "2", "--save_dir", str(tmp_path / "hero"), *quick]
    assert hero_head_analysis.main([*hero, "--features", "99999"]) == 1
    assert "has features 0 to" in capsys.readouterr().err
    assert hero_head_analysis.main([*hero, "--features", "3", "5"]) == 0
    assert f"L{layer}H" in (tmp_path / "hero" / "hero_report.md").read_text()
    page = (tmp_path / "hero" / "hero_features.html").read_text()
    assert "Feature 3:" in page and "Feature 5:" in page
    assert (tmp_path / "hero" / "hero_features.html.json").is_file()


def test_training_starts_from_it_and_presses_its_heads(
    source, imported, text_flags, cache_dir, tmp_path
):
    """With next to no learning rate the validation loss is transformers' own; with one, the
    pressure lowers sigma below the control's."""
    common = [*text_flags, "--dtype", "float32", "--preset", "smoke", "--seq_len", "32"]
    common += ["--init_from", str(imported), "--control_interval", "5"]
    common += ["--val_interval", "20", "--save_interval", "20"]
    still = ["--steps", "1", "--learning_rate", "1e-12", "--weight_decay", "0"]
    out = tmp_path / "still"
    assert janus.main([*common, *still, "--pressure", "control", "--save_dir", str(out)]) == 0
    model, ckpt = janus.load_checkpoint(out / "janus_control_final.pt", CPU, False)
    # Sizes are the pretrained model's, not the preset's
    assert model.cfg.rope_theta == 1e5 and model.cfg.n_kv_heads == 2 and not model.cfg.tied

    data = validation_text(imported, cache_dir)
    x, y = data.batch(np.arange(data.n_windows))
    with torch.inference_mode():
        logits = LlamaForCausalLM.from_pretrained(source).eval()(x).logits
    theirs = cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert ckpt["logs"]["telemetry"][-1]["val_loss"] == pytest.approx(theirs, abs=1e-4)

    sigma = {}
    for pressure in ("control", "constant:20"):
        out = tmp_path / pressure.partition(":")[0]
        run = ["--steps", "40", "--pressure", pressure, "--save_dir", str(out)]
        assert janus.main([*common, *run]) == 0
        telemetry = janus.read_telemetry(out / "telemetry.csv")
        sigma[pressure] = telemetry["val_sigma_z"].dropna().iloc[-1]
    assert sigma["constant:20"] < 0.7 * sigma["control"], sigma


def test_a_folder_is_taken_as_a_model_path(source, imported, text_flags, tmp_path, capfd):
    """Phases 1, 2 and 4 import it themselves, once, and what they then do is what they do with the
    checkpoint."""
    flags = ["--layers", "1", "--tokens", "640", "--dtype", "float32", *text_flags]

    def harvest(model: Path, out: str, *more: str) -> None:
        argv = ["--model_path", str(model), "--save_dir", str(tmp_path / out)]
        assert harvest_activations.main([*argv, *flags, *more]) == 0

    harvest(source, "theirs", "--batch_size", "4")
    harvest(imported, "ours")
    side = json.loads((tmp_path / "theirs/pretrained/L1.z.npy.json").read_text())
    model, _ = janus.load_checkpoint(side["checkpoint"], CPU, False)
    assert model.cfg.seq_len == 64, "the model's own context"
    ours, _ = janus.load_checkpoint(imported, CPU, False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name

    capfd.readouterr()
    ablate = ["--adaptive_model", str(source), "--n_seqs", "8", "--n_mean", "4", "--mode", "zero"]
    ablate += ["--bootstrap", "200", "--layers", "1", "--save_file", str(tmp_path / "r.csv")]
    assert ablation_test.main([*ablate, "--dtype", "float32", *text_flags]) == 0
    assert "parameters" not in capfd.readouterr().out, "imported once"


class Phase(NamedTuple):
    """A phase that takes a model: its script, its flags for the model and its output, the latter."""

    script: Any
    model_flag: str
    out_flag: str
    out: str

    def on(self, model: object, folder: Path, *more: str) -> int:
        """Exit status of the phase on `model`."""
        out = str(folder / self.out)
        return self.script.main([self.model_flag, str(model), self.out_flag, out, *more])


PHASES = [
    Phase(harvest_activations, "--model_path", "--save_dir", "out"),
    Phase(ablation_test, "--adaptive_model", "--save_file", "r.csv"),
    Phase(janus, "--init_from", "--save_dir", "out"),
]


def test_what_no_phase_can_take_is_one_line(smoke_checkpoint, tmp_path, cache_dir, capfd):
    no_file, no_folder = tmp_path / "no.gguf", tmp_path / "no_folder"
    says = {
        build_bloom(tmp_path / "bloom"): "is a bloom model: ALiBi; expected one of: llama, ",
        smoke_checkpoint.parent: f"give the checkpoint in it: {smoke_checkpoint}",
        no_file: "no.gguf does not exist",
        no_folder: "no_folder does not exist; give a checkpoint",
        "../nothing": "../nothing does not exist",
    }
    text = ["--dataset", "builtin", "--cache_dir", str(cache_dir)]
    for path, expected in says.items():
        for phase in PHASES:
            capfd.readouterr()
            assert phase.on(path, tmp_path, *text) == 1
            lines = capfd.readouterr().err.splitlines()
            errors = [line for line in lines if "error:" in line]
            assert len(errors) == 1 and expected in errors[0]
            assert not (tmp_path / "r.csv").exists()


def test_a_script_without_tools_says_what_it_lacks(source, tmp_path, monkeypatch, capsys):
    text = ["--dataset", "builtin", "--cache_dir", str(tmp_path / "cache")]
    for phase in PHASES:
        monkeypatch.setattr(phase.script, "__file__", str(tmp_path / "alone.py"))
        assert phase.on(source, tmp_path, *text) == 1
        err = capsys.readouterr().err
        assert "import_hf.py is missing" in err and err.count("\n") == 1, err


@pytest.fixture
def says(tmp_path, capsys):
    """Runs the import of a model that it must refuse, and gives the one line that it says."""

    def refused(model: Path, *more: str) -> str:
        assert import_hf.main([str(model), str(tmp_path / "out"), *more]) == 1
        err = capsys.readouterr().err
        errors = [line for line in err.splitlines() if "error:" in line]
        assert "Traceback" not in err and len(errors) == 1, err
        assert not (tmp_path / "out" / "janus_pretrained_final.pt").exists()
        return err

    return refused


def test_what_newgpt_does_not_compute_is_refused(source, tokenizer, tmp_path, says):
    assert "is a bloom model: ALiBi" in says(build_bloom(tmp_path / "bloom"))
    odd = build(tmp_path / "odd", tokenizer, hidden_act="tanh")
    assert "the activation 'tanh', expected one of: silu" in says(odd)
    assert "the context of" in says(source, "--seq_len", "65")


def test_what_is_missing_or_damaged_is_refused(source, tmp_path, says):
    mute = tmp_path / "mute"
    shutil.copytree(source, mute, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in says(mute)

    torn = tmp_path / "torn"
    shutil.copytree(source, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "torn" in says(torn)

    nan = tmp_path / "nan"
    shutil.copytree(source, nan)
    broken = LlamaForCausalLM.from_pretrained(source)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(nan)
    assert "differ from transformers' by nan" in says(nan)

    assert "does not exist" in says(tmp_path / "no.gguf")


def test_a_gguf_of_another_model_is_refused(tmp_path, says):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "other.gguf" in says(tmp_path / "other.gguf")


def resized(source: Path, folder: Path, n_rows: int) -> Path:
    """The same tokenizer beside a random Llama whose embedding has another number of rows."""
    shutil.copytree(source, folder)
    config = LlamaConfig.from_pretrained(source)
    config.vocab_size = n_rows
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_token_ids_above_the_embedding_are_one_line_at_import(source, tmp_path, says):
    n_ids = LlamaConfig.from_pretrained(source).vocab_size
    line = says(resized(source, tmp_path / "small", n_ids - 1))
    assert f"token ids go up to {n_ids - 1}" in line and f"rows 0 to {n_ids - 2}" in line


def test_an_embedding_with_more_rows_than_ids_is_taken(source, text_flags, tmp_path, capsys):
    """Many models round their embedding up; a row without a token is shown by its number."""
    n_ids = LlamaConfig.from_pretrained(source).vocab_size
    folder = resized(source, tmp_path / "large", n_ids + 24)
    assert import_hf.main([str(folder), str(tmp_path / "out"), "--seq_len", "32", *text_flags]) == 0
    model, _ = janus.load_checkpoint(tmp_path / "out/janus_pretrained_final.pt", CPU, False)
    assert model.cfg.vocab_size == n_ids + 24
    tokenizer = janus.read_tokenizer(tmp_path / "out/tokenizer.json")
    shown = hero_head_analysis.visible_texts(tokenizer, [n_ids + 3])
    assert shown == [f"<{n_ids + 3}>"]


def test_padding_of_the_models_tokenizer_does_not_come_along(
    source, imported, text_flags, tmp_path
):
    padded = tmp_path / "padded"
    shutil.copytree(source, padded)
    tokenizer = janus.Tokenizer.from_file(str(padded / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(padded / "tokenizer.json"))
    out = tmp_path / "out"
    assert import_hf.main([str(padded), str(out), "--seq_len", "32", *text_flags]) == 0
    saved = json.loads((out / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None
    expected = json.loads(Path(f"{imported}.json").read_text())["data"]
    found = json.loads((out / "janus_pretrained_final.pt.json").read_text())["data"]
    assert found["n_tokens"] == expected["n_tokens"]


def test_a_tied_flag_that_lies_is_looked_up_in_the_weights(source, tmp_path):
    """The file has an unembedding of its own, its config says that it has none: what transformers computes counts."""
    lying = tmp_path / "lying"
    shutil.copytree(source, lying)
    model = LlamaForCausalLM.from_pretrained(source)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(lying)
    config = json.loads((lying / "config.json").read_text())
    (lying / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    theirs = LlamaForCausalLM.from_pretrained(lying).eval()
    ours = import_hf.as_newgpt(theirs, 64)
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)
    same = torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert ours.cfg.tied == same


def test_what_is_said_of_differing_logits_was_looked_up(source, tmp_path, says, monkeypatch):
    broken = LlamaForCausalLM.from_pretrained(source)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    shutil.copy(source / "tokenizer.json", tmp_path / "nan")
    shutil.copy(source / "tokenizer_config.json", tmp_path / "nan")
    assert "model.norm.weight holds NaN" in says(tmp_path / "nan")
    # Finite weights, another model: no word of a damaged file
    monkeypatch.setattr(janus.F, "silu", torch.relu)
    monkeypatch.setattr(import_hf.F, "silu", torch.relu, raising=False)
    llama = LlamaForCausalLM.from_pretrained(source).eval()
    ours = import_hf.as_newgpt(llama, 64)
    ours.norm.weight.data *= 2
    with pytest.raises(janus.HandoffError, match="weights are finite, so NewGPT does not compute"):
        import_hf.compare("x", ours, llama, list(range(20)))

"""Pretrained Llamas as Janus checkpoints: against transformers and TransformerLens, through phases 2 to 5, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ablation_test
import harvest_activations
import hero_head_analysis
import janus_adaptive as janus
import train_sae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import import_hf  # noqa: E402

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
SIZES |= dict(max_position_embeddings=64, rms_norm_eps=1e-6, initializer_range=0.3)
THETA = {"rope_type": "default", "rope_theta": 100_000.0}


def build(folder: Path, tokenizer: Path, rope: dict = THETA, **more) -> Path:
    """A folder with a random Llama and a tokenizer."""
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(fast), rope_parameters=rope, bos_token_id=None, eos_token_id=None, **SIZES | more)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(smoke_checkpoint) -> Path:
    return smoke_checkpoint.with_name("tokenizer.json")


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), tokenizer, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def imported(source, text_file, cache_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported")
    assert import_hf.main([str(source), str(out), "--seq_len", "32", "--dataset", str(text_file), "--cache_dir", str(cache_dir)]) == 0
    return out / "janus_pretrained_final.pt"


def windows(n: int, checkpoint: Path, cache_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The validation windows that ablation_test.py takes for --n_seqs n."""
    side = json.loads(Path(f"{checkpoint}.json").read_text())
    data = janus.HFWikiTextLoader(side["dataset"], str(checkpoint.with_name("tokenizer.json")), 32, "validation", cache_dir)
    return data.batch(ablation_test.spaced(data.n_windows, n))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied, tokenizer, text_file, cache_dir, tmp_path, capsys):
    folder = build(tmp_path / "in", tokenizer, tie_word_embeddings=tied)
    argv = [str(folder), str(tmp_path / "out"), "--seq_len", "32", "--dataset", str(text_file), "--cache_dir", str(cache_dir)]
    assert import_hf.main(argv) == 0
    model, ckpt = janus.load_checkpoint(tmp_path / "out/janus_pretrained_final.pt", torch.device("cpu"), False)
    theirs, x = LlamaForCausalLM.from_pretrained(folder).eval(), torch.randint(512, (3, 32))
    with torch.inference_mode():
        assert (model(x)[0] - theirs(x).logits).abs().max() <= 1e-4
    assert model.n_params()[0] == sum(p.numel() for p in theirs.parameters()) and model.cfg.rope_theta == 1e5
    assert model.cfg.tied is tied and ckpt["arm"] == "pretrained" and model.cfg.norm_eps == 1e-6
    nats = [float(w) for w in capsys.readouterr().out.split("letters: ")[1].replace(",", "").split()[0:6:5]]
    assert abs(nats[0] - nats[1]) <= 1e-3


def test_zero_ablation_is_that_of_transformer_lens(source, imported, cache_dir, tmp_path):
    """The same heads in the same order, deltas within 1e-3 nats: TransformerLens zeroes hook_z of the original folder."""
    from transformer_lens.model_bridge import TransformerBridge

    argv = ["--adaptive_model", str(imported), "--mode", "zero", "--n_seqs", "8", "--bootstrap", "200", "--dtype", "float32"]
    assert ablation_test.main([*argv, "--save_file", str(tmp_path / "r.csv"), "--cache_dir", str(cache_dir)]) == 0
    table = pd.read_csv(tmp_path / "r.csv").set_index(["layer", "head"])
    bridge, (x, y) = TransformerBridge.boot_transformers(str(source), device="cpu"), windows(8, imported, cache_dir)

    def loss(hooks: list) -> float:
        with torch.inference_mode():
            return F.cross_entropy(bridge.run_with_hooks(x, fwd_hooks=hooks).flatten(0, 1), y.flatten()).item()

    base, theirs = loss([]), {}
    for l in range(3):
        for h in range(4):

            def zero(z: torch.Tensor, hook: object, h: int = h) -> torch.Tensor:
                return z.index_fill(2, torch.tensor([h]), 0.0)

            theirs[l, h] = loss([(f"blocks.{l}.attn.hook_z", zero)]) - base
    assert table["base_loss"].iloc[0] == pytest.approx(base, abs=1e-3)
    delta = np.array([theirs[key] for key in table.index])
    assert np.abs(table["delta"] - delta).max() <= 1e-3 and np.abs(delta).max() > 0.02
    assert list(table.sort_values("rank").index[:5]) == sorted(theirs, key=theirs.get, reverse=True)[:5]


def test_phases_2_to_5_run_on_it(imported, cache_dir, tmp_path, capsys):
    quick, csv = ["--cache_dir", str(cache_dir), "--dtype", "float32"], tmp_path / "r.csv"
    ablate = ["--adaptive_model", str(imported), "--n_seqs", "8", "--n_mean", "8", "--bootstrap", "200", "--mode", "mean"]
    assert ablation_test.main([*ablate, "--save_file", str(csv), *quick]) == 0
    layer = str(pd.read_csv(csv).query("rank == 1")["layer"].iloc[0])
    harvest = ["--model_path", str(imported), "--layers", layer, "--tokens", "2560", "--save_dir", str(tmp_path / "activations")]
    assert harvest_activations.main([*harvest, *quick]) == 0
    sae = ["--activations_dir", str(tmp_path / "activations"), "--save_dir", str(tmp_path / "saes"), "--steps", "20"]
    assert train_sae.main([*sae, "--batch_size", "256", *quick]) == 0
    where = ["--saes_dir", str(tmp_path / "saes"), "--activations_dir", str(tmp_path / "activations")]
    hero = ["--ablation_csv", str(csv), *where, "--n_seqs", "8", "--n_features", "2", "--save_dir", str(tmp_path / "hero")]
    assert hero_head_analysis.main([*hero, "--features", "99999", *quick]) == 1 and "has features 0 to" in capsys.readouterr().err
    assert hero_head_analysis.main([*hero, "--features", "3", "5", *quick]) == 0
    assert f"L{layer}H" in (tmp_path / "hero" / "hero_report.md").read_text()
    page = (tmp_path / "hero" / "hero_features.html").read_text()
    assert "Feature 3:" in page and "Feature 5:" in page and (tmp_path / "hero" / "hero_features.html.json").is_file()


def test_training_starts_from_it_and_presses_its_heads(source, imported, text_file, cache_dir, tmp_path):
    """With next to no learning rate the validation loss is transformers' own; with one, the pressure lowers sigma below the control's."""
    data = ["--dataset", str(text_file), "--cache_dir", str(cache_dir), "--dtype", "float32", "--preset", "smoke", "--seq_len", "32"]
    common = [*data, "--init_from", str(imported), "--val_interval", "20", "--save_interval", "20", "--control_interval", "5"]
    still = ["--steps", "1", "--learning_rate", "1e-12", "--weight_decay", "0", "--pressure", "control"]
    assert janus.main([*common, *still, "--save_dir", str(tmp_path / "still")]) == 0
    model, ckpt = janus.load_checkpoint(tmp_path / "still/janus_control_final.pt", torch.device("cpu"), False)
    assert model.cfg.rope_theta == 1e5 and model.cfg.n_kv_heads == 2 and not model.cfg.tied, "sizes are the pretrained model's"
    n = janus.HFWikiTextLoader(str(text_file), str(imported.with_name("tokenizer.json")), 32, "validation", cache_dir).n_windows
    x, y = windows(n, imported, cache_dir)
    with torch.inference_mode():
        theirs = F.cross_entropy(LlamaForCausalLM.from_pretrained(source).eval()(x).logits.flatten(0, 1), y.flatten()).item()
    assert ckpt["logs"]["telemetry"][-1]["val_loss"] == pytest.approx(theirs, abs=1e-4)
    sigma = {}
    for pressure in ("control", "constant:20"):
        out = tmp_path / pressure.partition(":")[0]
        assert janus.main([*common, "--steps", "40", "--pressure", pressure, "--save_dir", str(out)]) == 0
        sigma[pressure] = janus.read_telemetry(out / "telemetry.csv")["val_sigma_z"].dropna().iloc[-1]
    assert sigma["constant:20"] < 0.7 * sigma["control"], sigma


def test_a_folder_is_taken_as_a_model_path(source, imported, text_file, cache_dir, tmp_path, capfd):
    """Phases 1, 2 and 4 import it themselves, once, and what they then do is what they do with the checkpoint."""
    flags = ["--layers", "1", "--tokens", "640", "--dtype", "float32", "--cache_dir", str(cache_dir), "--dataset", str(text_file)]
    for name, model in (("theirs", source), ("ours", imported)):
        extra = ["--batch_size", "4"] if name == "theirs" else []
        argv = ["--model_path", str(model), *flags, *extra, "--save_dir", str(tmp_path / name)]
        assert harvest_activations.main(argv) == 0
    side = json.loads((tmp_path / "theirs/pretrained/L1.z.npy.json").read_text())
    model, _ = janus.load_checkpoint(side["checkpoint"], torch.device("cpu"), False)
    assert model.cfg.seq_len == 64, "the model's own context"
    ours, _ = janus.load_checkpoint(imported, torch.device("cpu"), False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True))
    capfd.readouterr()
    small = ["--adaptive_model", str(source), "--n_seqs", "8", "--n_mean", "4", "--mode", "zero", "--bootstrap", "200", "--layers", "1"]
    assert ablation_test.main([*small, *flags[4:], "--save_file", str(tmp_path / "r.csv")]) == 0
    assert "parameters" not in capfd.readouterr().out, "imported once"


def test_what_no_phase_can_take_is_one_line(smoke_checkpoint, tmp_path, cache_dir, capfd):
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    says = {tmp_path / "gpt2": "gpt2 model (LayerNorm, learned positions, biases), expected llama"}
    says |= {smoke_checkpoint.parent: f"give the checkpoint in it: {smoke_checkpoint}", tmp_path / "no.gguf": "no.gguf does not exist"}
    says |= {tmp_path / "no_folder": "no_folder does not exist; give a checkpoint", "../nothing": "../nothing does not exist"}
    for path, text in says.items():
        for script, flag in ((harvest_activations, "--model_path"), (ablation_test, "--adaptive_model"), (janus, "--init_from")):
            out = ["--save_file", str(tmp_path / "r.csv")] if script is ablation_test else ["--save_dir", str(tmp_path / "out")]
            capfd.readouterr()
            assert script.main([flag, str(path), "--dataset", "builtin", "--cache_dir", str(cache_dir), *out]) == 1
            error = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
            assert len(error) == 1 and text in error[0] and not (tmp_path / "r.csv").exists()


def test_a_script_without_tools_says_what_it_lacks(source, tmp_path, monkeypatch, capsys):
    for script, flag in ((harvest_activations, "--model_path"), (ablation_test, "--adaptive_model"), (janus, "--init_from")):
        monkeypatch.setattr(script, "__file__", str(tmp_path / "alone.py"))
        out = ["--save_file", str(tmp_path / "r.csv")] if script is ablation_test else ["--save_dir", str(tmp_path / "out")]
        assert script.main([flag, str(source), "--dataset", "builtin", "--cache_dir", str(tmp_path / "cache"), *out]) == 1
        err = capsys.readouterr().err
        assert "import_hf.py is missing" in err and err.count("\n") == 1, err


def test_what_is_refused_is_one_line(source, tokenizer, tmp_path, capsys):
    def says(model: Path, *more: str) -> str:
        assert import_hf.main([str(model), str(tmp_path / "out"), *more]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err and len([line for line in err.splitlines() if "error:" in line]) == 1, err
        assert not (tmp_path / "out" / "janus_pretrained_final.pt").exists()
        return err

    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    assert "gpt2 model (LayerNorm, learned positions, biases), expected llama" in says(tmp_path / "gpt2")
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert "rope scaling 'linear'" in says(build(tmp_path / "scaled", tokenizer, rope=scaled))
    assert "biases in attention" in says(build(tmp_path / "biased", tokenizer, attention_bias=True))
    shutil.copytree(source, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in says(tmp_path / "mute")
    shutil.copytree(source, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "torn" in says(tmp_path / "torn")
    shutil.copytree(source, tmp_path / "nan")
    broken = LlamaForCausalLM.from_pretrained(source)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    assert "differ from transformers' by nan" in says(tmp_path / "nan")
    assert "does not exist" in says(tmp_path / "no.gguf")
    assert "the context of" in says(source, "--seq_len", "65")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "other.gguf" in says(tmp_path / "other.gguf")

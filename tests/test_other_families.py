"""Models of other families from end to end: TransformerLens' order of heads, training under the
Homeostat and back into transformers, the README's commands, and what is refused."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import ablation_test
import janus_adaptive as janus

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import export_hf  # noqa: E402
import import_hf  # noqa: E402

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module")
def tokenizer(smoke_checkpoint) -> Path:
    return smoke_checkpoint.with_name("tokenizer.json")


def build(family: str, folder: Path, tokenizer: Path, **more: Any) -> Path:
    """A folder with a random model of a family, of which every weight counts, and a tokenizer."""
    fast = hf.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    sizes = SIZES | OPTIONS.get(family, {}) | {"vocab_size": len(fast)} | more
    torch.manual_seed(0)
    net = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() == 1:  # those of a new model are 1 and 0
                weight += 0.2 * torch.randn_like(weight)
    net.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory) -> Path:
    return build("gpt2", tmp_path_factory.mktemp("gpt2"), tokenizer)


@pytest.fixture(scope="module")
def text_flags(text_file, cache_dir) -> list[str]:
    return ["--dataset", str(text_file), "--cache_dir", str(cache_dir)]


@pytest.mark.parametrize("family", OPTIONS)
def test_first_heads_are_those_of_transformer_lens(
    family, tokenizer, text_flags, cache_dir, tmp_path
):
    """The first five heads by zero ablation in the same order, deltas within 1e-4 nats."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = build(family, tmp_path / "in", tokenizer)
    out = tmp_path / "out"
    assert import_hf.main([str(folder), str(out), "--seq_len", "32", *text_flags]) == 0
    checkpoint = out / "janus_pretrained_final.pt"
    argv = ["--adaptive_model", str(checkpoint), "--mode", "zero", "--n_seqs", "8", "--plain"]
    argv += ["--bootstrap", "200", "--dtype", "float32", "--cache_dir", str(cache_dir)]
    assert ablation_test.main([*argv, "--save_file", str(tmp_path / "r.csv")]) == 0
    table = pd.read_csv(tmp_path / "r.csv").set_index(["layer", "head"])

    dataset = json.loads(Path(f"{checkpoint}.json").read_text())["dataset"]
    words = str(out / "tokenizer.json")
    data = janus.HFWikiTextLoader(dataset, words, 32, "validation", cache_dir)
    x, y = data.batch(data.spread(8))
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")

    def loss(hooks: list) -> float:
        with torch.inference_mode():
            logits = bridge.run_with_hooks(x, fwd_hooks=hooks)
        return cross_entropy(logits.flatten(0, 1), y.flatten()).item()

    def without(layer: int, head: int) -> float:
        def zero(z: torch.Tensor, hook: object) -> torch.Tensor:
            heads = z.unflatten(-1, (4, -1)).clone() if z.dim() == 3 else z.clone()
            heads[:, :, head] = 0.0
            return heads.view_as(z)

        return loss([(f"blocks.{layer}.attn.hook_z", zero)])

    base = loss([])
    theirs = {key: without(*key) - base for key in np.ndindex(3, 4)}  # (layer, head)
    delta = np.array([theirs[key] for key in table.index])
    assert np.abs(delta).max() > 0.02
    assert np.abs(table["delta"] - delta).max() <= 1e-4
    strongest = sorted(theirs, key=theirs.get, reverse=True)[:5]
    assert list(table.sort_values("rank").index[:5]) == strongest


def test_pressed_gpt2_is_a_gpt2_again(gpt2, text_flags, tmp_path):
    """Twenty steps under the Homeostat, exported, loaded by transformers: the same logits, other
    weights."""
    out = tmp_path / "pressed"
    argv = ["--init_from", str(gpt2), "--preset", "smoke", "--steps", "20", "--seq_len", "32"]
    argv += ["--dtype", "float32", "--control_interval", "5", "--save_dir", str(out)]
    assert janus.main([*argv, *text_flags]) == 0
    checkpoint = out / "janus_adaptive_final.pt"
    exported = tmp_path / "exported"
    assert export_hf.main([str(checkpoint), str(exported)]) == 0
    theirs = hf.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    ours, ckpt = janus.load_checkpoint(checkpoint, CPU, False)
    idx = torch.randint(ours.cfg.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(idx).logits
        before = hf.AutoModelForCausalLM.from_pretrained(gpt2).eval()(idx).logits
        expected = ours(idx)[0]
    assert (found - expected).abs().max() <= 1e-4
    assert (before - expected).abs().max() > 0.01, "it was trained"
    assert ckpt["logs"]["telemetry"][-1]["lambda"] > 0, "under pressure"
    # What writes to the residual stream has no mean, as when it was imported
    for block in ours.blocks:
        assert block.w_down.weight.mean(0).abs().max() <= 1e-6
        assert block.attn.w_o.bias.mean().abs() <= 1e-6
    card = (exported / "README.md").read_text()
    assert "gpt2" in card and "adaptive arm, step 20" in card


def readme_commands() -> list[list[str]]:
    """The three commands of "Your model in three commands"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### Your model in three commands")[2]
    block = re.search(r"```\n(.*?)```", section, re.S)
    return [shlex.split(line) for line in block[1].strip().splitlines()]


def test_the_three_commands_of_the_readme(gpt2, text_flags, tmp_path):
    """Word for word, but for the model's folder, another text, and less of it."""
    commands = readme_commands()
    assert len(commands) == 3
    more = {
        "tools/import_hf.py": text_flags,
        "ablation_test.py": ["--n_mean", "8", "--bootstrap", "200", "--dtype", "float32"],
        "hero_head_analysis.py": ["--n_seqs", "8", "--dtype", "float32"],
    }
    place = {"my_model/": str(gpt2), "128": "32", "15": "0.05"}
    for python, script, *flags in commands:
        assert python == "python"
        argv = [place.get(flag, flag) for flag in flags]
        cache = [] if script == "tools/import_hf.py" else text_flags[2:]
        command = [sys.executable, str(ROOT / script), *argv, *more[script], *cache]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "hero_analysis" / "hero_report.html").read_text(encoding="utf-8")
    first = pd.read_csv(tmp_path / "results_ablation.csv").query("rank == 1").iloc[0]
    assert f"L{first['layer']}H{first['head']}" in page


@pytest.fixture
def says(tmp_path, capsys):
    """Runs the import of a model that it must refuse, and gives the one line that it says."""

    def refused(model: Path, *more: str) -> str:
        assert import_hf.main([str(model), str(tmp_path / "out"), *more]) == 1
        err = capsys.readouterr().err
        errors = [line for line in err.splitlines() if "error:" in line]
        assert "Traceback" not in err and len(errors) == 1, err
        assert not (tmp_path / "out" / "janus_pretrained_final.pt").exists()
        return errors[0]

    return refused


def test_what_is_not_computed_is_named(tokenizer, tmp_path, says):
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = tmp_path / "t5"
    hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, **small)).save_pretrained(t5)
    assert "is a t5 model: an encoder and a decoder; expected one of" in says(t5)

    moe = {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 2}
    mixtral = build("mixtral", tmp_path / "mixtral", tokenizer, **moe)
    assert "is a mixtral model: a mixture of experts; expected one of" in says(mixtral)

    bloom = hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    hf.BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    assert "is a bloom model: ALiBi; expected one of" in says(tmp_path / "bloom")

    mamba = hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    hf.MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    assert "is a mamba model: linear attention or another" in says(tmp_path / "mamba")

    after = {"do_layer_norm_before": False, "ffn_dim": 32}
    late = build("opt", tmp_path / "late", tokenizer, **after)
    assert "has norms after the residual sum (do_layer_norm_before False)" in says(late)


def test_files_that_do_not_fit_are_refused(gpt2, tokenizer, tmp_path, says):
    short = build("gpt2", tmp_path / "short", tokenizer, vocab_size=100)
    assert "token ids go up to 511, its embedding has rows 0 to 99" in says(short)
    assert "--seq_len 65: expected 2 to 64, the context of" in says(gpt2, "--seq_len", "65")

    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        (mute / name).write_bytes((gpt2 / name).read_bytes())
    assert "tokenizer" in says(mute)


def test_the_file_decides_whether_the_head_is_the_embedding(
    tokenizer, text_flags, tmp_path, capsys
):
    """A config that claims tied weights over a file with a head of its own: one line says so."""
    folder = build("gpt_neox", tmp_path / "in", tokenizer, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    out = tmp_path / "out"
    assert import_hf.main([str(folder), str(out), "--seq_len", "32", *text_flags]) == 0
    assert "its file has an output head of its own: untied" in capsys.readouterr().out
    model, _ = janus.load_checkpoint(out / "janus_pretrained_final.pt", CPU, False)
    assert not model.cfg.tied
    head = load_file(folder / "model.safetensors")["embed_out.weight"]
    assert torch.equal(model.unembedding.weight, head)

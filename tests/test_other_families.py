"""Models of other families from end to end: TransformerLens' order of heads, training under the
Homeostat and back into transformers, the README's commands, and what is refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
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


def test_a_special_token_that_no_embedding_has_is_not_exported(gpt2, tmp_path):
    """transformers would add it to the exported tokenizer, with an id beyond the last row."""
    folder = shutil.copytree(gpt2, tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sep_token": "[NEVER]"}))
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    assert import_hf.main([str(folder), str(imported), "--seq_len", "32"]) == 0
    checkpoint = imported / "janus_pretrained_final.pt"
    assert janus.load_checkpoint(checkpoint, CPU, False)[1]["pretrained"]["special_tokens"]
    assert export_hf.main([str(checkpoint), str(exported)]) == 0
    rows = hf.AutoConfig.from_pretrained(exported).vocab_size
    assert len(hf.AutoTokenizer.from_pretrained(exported)) <= rows


@pytest.mark.parametrize("name", ["bos_token", "cls_token"])
def test_what_begins_a_text_is_found_whatever_it_is_called(name):
    words = Tokenizer(WordLevel({"<s>": 0, "a": 1, "</s>": 2}, unk_token="a"))
    fast = {name: "<s>", "unk_token": "a"}
    plain = hf.PreTrainedTokenizerFast(tokenizer_object=words, **fast)
    assert import_hf.bos_of(plain) is None
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    ends = hf.PreTrainedTokenizerFast(tokenizer_object=words, **fast)
    assert import_hf.bos_of(ends) is None
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    begins = hf.PreTrainedTokenizerFast(tokenizer_object=words, **fast)
    assert import_hf.bos_of(begins) == 0


def test_an_empty_name_is_no_fresh_model(text_flags, tmp_path, capsys):
    argv = ["--init_from", "", "--preset", "smoke", "--steps", "2", "--compile", "off"]
    with pytest.raises(SystemExit) as stopped:
        janus.main([*argv, "--save_dir", str(tmp_path / "run"), *text_flags])
    assert stopped.value.code == 2
    assert "--init_from: '': expected a checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


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


def test_a_weight_that_the_file_lacks_is_never_made_up(gpt2, tokenizer, tmp_path, says, capsys):
    """transformers draws it at random, and would then agree with itself."""
    for name, change in {
        "short": lambda key: None if key.endswith("h.1.mlp.c_fc.weight") else key,
        "prefix": lambda key: f"module.{key}",
    }.items():
        folder = tmp_path / name
        shutil.copytree(gpt2, folder)
        weights = load_file(folder / "model.safetensors")
        renamed = {change(key): weight for key, weight in weights.items() if change(key)}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        assert " of the weights that its config asks for (" in says(folder)
    # One that the config does not ask for is said
    folder = tmp_path / "shallow"
    shutil.copytree(gpt2, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    flags = ["--seq_len", "32", "--dataset", str(tmp_path / "none")]
    assert import_hf.main([str(folder), str(tmp_path / "less"), *flags]) == 1
    assert "are not of the model that its config describes: left out" in capsys.readouterr().out
    # And what failed at the text has left no tokenizer
    assert not (tmp_path / "less" / "tokenizer.json").exists()


def test_nothing_of_others_is_replaced(gpt2, smoke_checkpoint, text_flags, tmp_path, says, capsys):
    beside = tmp_path / "out"
    beside.mkdir()
    tokenizer = beside / "tokenizer.json"
    tokenizer.write_bytes(smoke_checkpoint.with_name("tokenizer.json").read_bytes() + b"\n")
    before = tokenizer.read_bytes()
    assert "tokenizer.json exists; pass --overwrite" in says(gpt2)
    assert tokenizer.read_bytes() == before

    original = tmp_path / "original"
    shutil.copytree(gpt2, original)
    assert export_hf.main([str(smoke_checkpoint), str(original), "--overwrite"]) == 1
    assert "was not written by this tool" in capsys.readouterr().err
    assert (original / "model.safetensors").read_bytes() == (
        gpt2 / "model.safetensors"
    ).read_bytes()


def test_sizes_that_are_none_of_a_model(gpt2, tokenizer, tmp_path, says):
    odd = build("gpt2", tmp_path / "odd", tokenizer, hidden_size=36)
    assert "has heads of 9 dimensions" in says(odd)
    config = json.loads((gpt2 / "config.json").read_text())
    flat = tmp_path / "flat"
    shutil.copytree(gpt2, flat)
    (flat / "config.json").write_text(json.dumps(config | {"n_layer": 0}))
    assert "has 0 layers, 4 heads" in says(flat)
    empty = tmp_path / "empty"
    shutil.copytree(gpt2, empty)
    words = json.loads((empty / "tokenizer.json").read_text())
    words["model"] |= {"vocab": {}, "merges": []}
    (empty / "tokenizer.json").write_text(json.dumps(words | {"added_tokens": []}))
    assert "it makes 0 tokens of 'The attention heads o'" in says(empty)
    infinite = tmp_path / "infinite"
    shutil.copytree(gpt2, infinite)
    net = hf.AutoModelForCausalLM.from_pretrained(gpt2)
    unseen = set(range(512)) - set(net_ids(infinite))
    net.transformer.wte.weight.data[max(unseen), 0] = float("inf")
    net.save_pretrained(infinite)
    assert "holds NaN or infinity" in says(infinite)


def net_ids(folder: Path) -> list[int]:
    """The token ids that the import looks at."""
    return import_hf.encode_probe("it", janus.read_tokenizer(folder / "tokenizer.json"))


def test_training_goes_on_only_in_a_context_that_the_model_has(
    gpt2, tokenizer, text_flags, tmp_path, capsys
):
    factors = [1.0, 1.5, 2.0, 3.0]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": factors, "long_factor": [2 * factor for factor in factors]}
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "rope_parameters": rope}
    long = build("llama", tmp_path / "long", tokenizer, **sizes)
    mistral = {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 20}
    local = build("mistral", tmp_path / "local", tokenizer, **mistral)
    cases = {"gpt2": (gpt2, 32, 48), "long": (long, 32, 48), "local": (local, 16, 65)}
    for name, (folder, imported, wanted) in cases.items():
        out = tmp_path / f"imported_{name}"
        argv = [str(folder), str(out), "--seq_len", str(imported), *text_flags]
        assert import_hf.main(argv) == 0
        run = ["--init_from", str(out / "janus_pretrained_final.pt"), "--preset", "smoke"]
        run += ["--seq_len", str(wanted), "--save_dir", str(tmp_path / "run"), *text_flags]
        assert janus.main(run) == 1
        assert f"--seq_len {wanted}: " in capsys.readouterr().err
    # A window that was longer than the context of the import is still there in a longer one
    model, _ = janus.load_checkpoint(out / "janus_pretrained_final.pt", CPU, False)
    twin = janus.NewGPT(replace(model.cfg, seq_len=48))
    twin.load_state_dict(model.state_dict())
    idx = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf.AutoModelForCausalLM.from_pretrained(local).eval()(idx).logits
        found = twin.eval()(idx)[0]
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


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

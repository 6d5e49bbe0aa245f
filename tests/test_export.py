"""Exported models in transformers, TransformerLens and, with an SAE spliced in, SAELens."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import harvest_activations
import janus_adaptive as janus
import train_sae as ts
from tools import export_hf


@pytest.fixture(scope="module")
def folder(smoke_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "janus"
    assert export_hf.main([str(smoke_checkpoint), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def ours(smoke_checkpoint):
    return janus.load_checkpoint(smoke_checkpoint, torch.device("cpu"), False)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def text(smoke_args, ours):
    """Validation windows: inputs and targets [8, T]."""
    dataset, tokenizer, cache = (smoke_args[smoke_args.index(f"--{k}") + 1] for k in ("dataset", "tokenizer", "cache_dir"))
    data = janus.HFWikiTextLoader(dataset, tokenizer, ours.cfg.seq_len, "validation", cache)
    return data.batch(np.arange(8))


def test_transformers_gives_the_same_logits_and_tokens(folder, ours, text, smoke_checkpoint):
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    x, y = text
    with torch.inference_mode():
        out = theirs(input_ids=x, labels=y, shift_labels=y)
        logits, loss = ours(x, y)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert (out.logits - logits).abs().max() <= 1e-4 and abs(out.loss - loss) <= 1e-5
    start = tokenizer("The import statement", return_tensors="pt").input_ids
    greedy = start
    for _ in range(10):
        greedy = torch.cat((greedy, ours(greedy)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(theirs.generate(start, do_sample=False, max_new_tokens=10), greedy)
    words = "Any text, with ünïcode and  two spaces."
    mine = janus.Tokenizer.from_file(str(smoke_checkpoint.with_name("tokenizer.json")))
    assert tokenizer(words).input_ids == mine.encode(words).ids and tokenizer.decode(tokenizer(words).input_ids) == words


@pytest.mark.parametrize("tied", [True, False])
def test_grouped_queries_and_an_untied_head_survive(tied, smoke_args, tmp_path, ours):
    argv = [*smoke_args, "--n_heads", "4", "--n_kv_heads", "2", "--steps", "2", "--tied" if tied else "--no-tied"]
    assert janus.main([*argv, "--save_dir", str(tmp_path / "run")]) == 0
    assert export_hf.main([str(tmp_path / "run/janus_adaptive_final.pt"), str(tmp_path / "out")]) == 0
    theirs, model = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), janus.load_checkpoint(
        tmp_path / "run/janus_adaptive_final.pt", torch.device("cpu"), False
    )[0]  # fmt: skip
    x = torch.randint(model.cfg.vocab_size, (2, 32))
    assert (theirs(x).logits - model(x)[0]).abs().max() <= 1e-4
    assert sum(p.numel() for p in theirs.parameters()) == model.n_params()[0]


def test_transformer_lens_gives_the_same_loss_and_z(folder, ours, text):
    from transformer_lens.model_bridge import TransformerBridge

    bridge, (x, y) = TransformerBridge.boot_transformers(str(folder), device="cpu"), text
    tap = dict.fromkeys(["z.5"])
    with torch.inference_mode():
        logits, cache = bridge.run_with_cache(x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        assert abs(loss - ours(x, y, tap=tap)[1]) <= 1e-3
    assert (cache["blocks.5.attn.hook_z"] - tap["z.5"]).abs().max() <= 1e-4


def test_an_sae_spliced_in_by_saelens_costs_what_ours_costs(folder, ours, smoke_checkpoint, text, tmp_path):
    """SAELens attaches the exported SAE to the exported model at hook_z; the loss is that of our own splice, 1e-4."""
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    acts, saes = tmp_path / "activations", tmp_path / "saes"
    harvest = ["--model_path", str(smoke_checkpoint), "--layers", "2", "--tokens", "10000", "--dtype", "float32"]
    assert harvest_activations.main([*harvest, "--save_dir", str(acts)]) == 0
    argv = ["--activations_dir", str(acts), "--save_dir", str(saes), "--steps", "40", "--dtype", "float32"]
    assert ts.main(argv) == 0
    x, y = text
    mine, theirs = ts.load_sae(saes / "adaptive/L2"), SAE.load_from_disk(str(saes / "adaptive/L2"))
    theirs.turn_on_forward_pass_hook_z_reshaping()
    bridge = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    with torch.inference_mode():
        clean = bridge(x)
        logits = bridge.run_with_saes(x, saes=[theirs])

    def edit(z: torch.Tensor) -> torch.Tensor:
        return mine.decode(mine.encode(z.flatten(2))).view_as(z)

    with torch.inference_mode():
        spliced = ts.spliced(ours, ours.run_blocks(ours.embed(x), 0, 2), 2, "z", edit)
    loss = [torch.nn.functional.cross_entropy(v.flatten(0, 1), y.flatten()).item() for v in (logits, spliced)]
    assert abs(loss[0] - loss[1]) <= 1e-5 and (logits - spliced).abs().max() <= 1e-4
    assert (logits - clean).abs().max() > 20e-4  # the SAE is really there


def test_the_card_says_what_it_is(folder, smoke_checkpoint):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "adaptive arm, step 30" in card
    rows = torch.load(smoke_checkpoint, weights_only=True)["logs"]["telemetry"]
    assert f"{rows[-1]['tokens']:,} tokens seen" in card and f"| {rows[-1]['step']} | {rows[-1]['loss']:.4f} |" in card
    assert f"{rows[-1]['val_loss']:.4f} nats" in card and "nan" not in card
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] is None and config["rope_parameters"]["rope_theta"] == 10000.0


def test_wrong_inputs_are_one_line_and_lose_nothing(folder, smoke_checkpoint, tmp_path, capsys):
    def says(*argv) -> str:
        assert export_hf.main([str(a) for a in argv]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        return err

    before = sorted((p.name, p.stat().st_size) for p in folder.iterdir())
    assert "--overwrite" in says(smoke_checkpoint, folder)
    assert "does not exist" in says(tmp_path / "no.pt", folder, "--overwrite")
    assert sorted((p.name, p.stat().st_size) for p in folder.iterdir()) == before  # put back
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert "was not written by this tool" in says(smoke_checkpoint, tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    for name in (smoke_checkpoint.name, f"{smoke_checkpoint.name}.json"):
        shutil.copy(smoke_checkpoint.with_name(name), tmp_path / name)
    assert "tokenizer.json" in says(tmp_path / smoke_checkpoint.name, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

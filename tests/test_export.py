"""Exported models in transformers, TransformerLens and, with an SAE spliced in, SAELens."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import harvest_activations
import janus_adaptive as janus
import train_sae as ts
from tools import export_hf

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(smoke_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "janus"
    assert export_hf.main([str(smoke_checkpoint), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def ours(smoke_checkpoint):
    model, _ = janus.load_checkpoint(smoke_checkpoint, CPU, False)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def text(smoke_args, ours):
    """Validation windows: inputs and targets [8, T]."""
    args = janus.parse_args(smoke_args)
    seq_len = ours.cfg.seq_len
    data = janus.HFWikiTextLoader(
        args.dataset, args.tokenizer, seq_len, "validation", args.cache_dir
    )
    return data.batch(np.arange(8))


def test_transformers_gives_the_same_logits_and_tokens(folder, ours, text, smoke_checkpoint):
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    x, y = text
    with torch.inference_mode():
        out = theirs(input_ids=x, labels=y, shift_labels=y)
        logits, loss = ours(x, y)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert (out.logits - logits).abs().max() <= 1e-4
    assert abs(out.loss - loss) <= 1e-5

    # Ten tokens, each the likeliest after those before it
    start = tokenizer("The import statement", return_tensors="pt").input_ids
    greedy = start
    for _ in range(10):
        likeliest = ours(greedy)[0][:, -1:].argmax(-1)
        greedy = torch.cat((greedy, likeliest), 1)
    assert torch.equal(theirs.generate(start, do_sample=False, max_new_tokens=10), greedy)

    words = "Any text, with ünïcode and  two spaces."
    mine = janus.Tokenizer.from_file(str(smoke_checkpoint.with_name("tokenizer.json")))
    ids = tokenizer(words).input_ids
    assert ids == mine.encode(words).ids and tokenizer.decode(ids) == words


@pytest.mark.parametrize("tied", [True, False])
def test_grouped_queries_and_an_untied_head_survive(tied, smoke_args, tmp_path, ours):
    sizes = ["--n_heads", "4", "--n_kv_heads", "2", "--tied" if tied else "--no-tied"]
    run = tmp_path / "run"
    assert janus.main([*smoke_args, *sizes, "--steps", "2", "--save_dir", str(run)]) == 0
    checkpoint = run / "janus_adaptive_final.pt"
    assert export_hf.main([str(checkpoint), str(tmp_path / "out")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, _ = janus.load_checkpoint(checkpoint, CPU, False)
    x = torch.randint(model.cfg.vocab_size, (2, 32))
    assert (theirs(x).logits - model(x)[0]).abs().max() <= 1e-4
    assert sum(p.numel() for p in theirs.parameters()) == model.n_params()[0]


def test_transformer_lens_gives_the_same_loss_and_z(folder, ours, text):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    x, y = text
    tap = dict.fromkeys(["z.5"])
    with torch.inference_mode():
        logits, cache = bridge.run_with_cache(x)
        loss = cross_entropy(logits.flatten(0, 1), y.flatten())
        assert abs(loss - ours(x, y, tap=tap)[1]) <= 1e-3
    assert (cache["blocks.5.attn.hook_z"] - tap["z.5"]).abs().max() <= 1e-4


def train_an_sae(checkpoint, folder):
    """The folder of an SAE on z of layer 2, trained for 40 steps."""
    acts, saes = folder / "activations", folder / "saes"
    harvest = ["--model_path", str(checkpoint), "--layers", "2", "--tokens", "10000"]
    out = ["--dtype", "float32", "--save_dir", str(acts)]
    assert harvest_activations.main([*harvest, *out]) == 0
    train = ["--activations_dir", str(acts), "--save_dir", str(saes)]
    assert ts.main([*train, "--steps", "40", "--dtype", "float32"]) == 0
    return saes / "adaptive" / "L2"


def test_an_sae_spliced_in_by_saelens_costs_what_ours_costs(
    folder, ours, smoke_checkpoint, text, tmp_path
):
    """SAELens attaches the exported SAE to the exported model at hook_z; the loss is that of our
    own splice, 1e-4."""
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    sae = train_an_sae(smoke_checkpoint, tmp_path)
    x, y = text
    mine, theirs = ts.load_sae(sae), SAE.load_from_disk(str(sae))
    theirs.turn_on_forward_pass_hook_z_reshaping()
    bridge = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    with torch.inference_mode():
        clean = bridge(x)
        logits = bridge.run_with_saes(x, saes=[theirs])

    def edit(z: torch.Tensor) -> torch.Tensor:
        flat = z.flatten(2)  # [B, T, H K]
        return mine.decode(mine.encode(flat)).view_as(z)

    with torch.inference_mode():
        before = ours.run_blocks(ours.embed(x), 0, 2)
        spliced = ts.spliced(ours, before, 2, "z", edit)
    their_loss = cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    our_loss = cross_entropy(spliced.flatten(0, 1), y.flatten()).item()
    assert abs(their_loss - our_loss) <= 1e-5
    assert (logits - spliced).abs().max() <= 1e-4
    assert (logits - clean).abs().max() > 20e-4  # the SAE is really there


def test_the_card_says_what_it_is(folder, smoke_checkpoint):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "adaptive arm, step 30" in card
    last = torch.load(smoke_checkpoint, weights_only=True)["logs"]["telemetry"][-1]
    assert f"{last['tokens']:,} tokens seen" in card
    assert f"| {last['step']} | {last['loss']:.4f} |" in card
    assert f"{last['val_loss']:.4f} nats" in card and "nan" not in card
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] is None
    assert config["rope_parameters"]["rope_theta"] == 10000.0


def test_wrong_inputs_are_one_line_and_lose_nothing(folder, smoke_checkpoint, tmp_path, capsys):
    def says(*argv) -> str:
        assert export_hf.main([str(word) for word in argv]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        return err

    def files() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_size) for path in folder.iterdir())

    before = files()
    assert "--overwrite" in says(smoke_checkpoint, folder)
    assert "does not exist" in says(tmp_path / "no.pt", folder, "--overwrite")
    assert files() == before  # put back

    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("all of it")
    assert "was not written by this tool" in says(smoke_checkpoint, thesis.parent, "--overwrite")
    assert thesis.read_text() == "all of it"

    # A checkpoint that was moved without its tokenizer
    for name in (smoke_checkpoint.name, f"{smoke_checkpoint.name}.json"):
        shutil.copy(smoke_checkpoint.with_name(name), tmp_path / name)
    assert "tokenizer.json" in says(tmp_path / smoke_checkpoint.name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))  # no half-made folder


def test_padding_in_the_tokenizer_file_is_not_exported(smoke_checkpoint, tmp_path):
    """As an older version left it beside the checkpoint."""
    for name in (smoke_checkpoint.name, f"{smoke_checkpoint.name}.json"):
        shutil.copy(smoke_checkpoint.with_name(name), tmp_path / name)
    tokenizer = janus.Tokenizer.from_file(str(smoke_checkpoint.with_name("tokenizer.json")))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert export_hf.main([str(tmp_path / smoke_checkpoint.name), str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None


def test_a_tokenizer_with_more_ids_than_the_model_is_one_line(smoke_checkpoint, tmp_path):
    for name in (smoke_checkpoint.name, "tokenizer.json"):
        shutil.copy(smoke_checkpoint.with_name(name), tmp_path / name)
    for sidecar in smoke_checkpoint.parent.glob(f"{smoke_checkpoint.name}.json"):
        shutil.copy(sidecar, tmp_path / sidecar.name)
    tokenizer = janus.read_tokenizer(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(janus.HandoffError, match="token ids go up to"):
        export_hf.export(tmp_path / smoke_checkpoint.name, tmp_path / "out")
    assert not (tmp_path / "out").exists()

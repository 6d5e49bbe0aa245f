"""Energy-Lens on pretrained models, against transformers alone, finite differences, and the published snippet."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import energy_lens_minimal as lens
import real_model_extension as real
from energy_lens import EnergyLensAnalyzer, EnergyLensConfig

TEXTS = {
    "regex_text": "The regex \\d+ matches numbers",
    "natural_text": "The quick brown fox jumps over the lazy dog",
}
SMALL = dict(
    corpus="topics",
    corpus_tokens=1600,
    seq_len=24,
    sae_dict_size=64,
    sae_iterations=3,
    permutations=100,
    directions=100,
    intervened=4,
)


@pytest.fixture(scope="session")
def lm(gpt2):
    return real.load_language_model(str(gpt2))


@pytest.fixture
def ids():
    return torch.randint(600, (3, 10), generator=torch.Generator().manual_seed(1))


def test_logit_energies_equal_transformers_alone(lm, ids):
    blocks = []
    handles = [
        b.register_forward_hook(
            lambda _m, _i, out: blocks.append(out[0] if isinstance(out, tuple) else out)
        )
        for b in lm.model.transformer.h
    ]
    with torch.no_grad():
        out = lm.model(ids, output_hidden_states=True)
    for h in handles:
        h.remove()
    assert not torch.allclose(
        out.hidden_states[-1], blocks[-1]
    )  # transformers' last one is normed: it must not be used
    states = real.states_and_gradients(lm, ids, [0, 1, 2, 3])
    for l in range(4):
        with torch.no_grad():
            logits = lm.model.lm_head(lm.model.transformer.ln_f(blocks[l]))
            by_hand = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            assert torch.allclose(
                real.LossEnergy(lm, l, "logit").energy(states.h[l], ids), by_hand, atol=1e-4
            )
            assert torch.allclose(
                real.LossEnergy(lm, l, "final").energy(states.h[l], ids), states.loss, atol=1e-5
            )
    assert torch.allclose(states.last, blocks[-1], atol=1e-6)


def test_one_backward_serves_all_layers(lm, ids):
    states = real.states_and_gradients(lm, ids, [0, 2, 3])
    for l in (0, 2, 3):
        assert torch.allclose(
            real.LossEnergy(lm, l, "final").grad(states.h[l], ids),
            states.loss_gradient[l],
            atol=1e-5,
        )


@pytest.mark.parametrize("mode", real.ENERGIES)
def test_gradients_equal_finite_differences(gpt2, ids, mode):
    lm = real.load_language_model(str(gpt2))
    lm.model.double()
    h = real.states_and_gradients(lm, ids, [1]).h[1]
    energy = real.LossEnergy(lm, 1, mode)
    if mode == "tuned":
        energy.fit(h.flatten(0, 1), h.flatten(0, 1).roll(1, 0))
    g = energy.grad(h, ids)
    d = F.normalize(
        torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    fd = lens.finite_difference(lambda y: energy.energy(y, ids).sum(1), h, d, h=1e-5)
    a = lens.feature_gradient(g, d)
    assert (fd - a).abs().max() / a.abs().max() < 1e-5


def test_translator_recovers_an_affine_map(lm):
    g = torch.Generator().manual_seed(0)
    h, m = torch.randn(2000, 32, generator=g), torch.randn(32, 32, generator=g)
    energy = real.LossEnergy(lm, 1, "tuned").fit(h, h @ m + 3)
    mu, a, c = energy.translate
    assert torch.allclose(h + (h - mu) @ a + c, h @ m + 3, atol=0.3)
    assert torch.equal(energy.translate.apply(h), h + (h - mu) @ a + c)
    with pytest.raises(lens.HandoffError, match="fit"):
        real.LossEnergy(lm, 1, "tuned").energy(h[None, :5], torch.zeros(1, 5, dtype=torch.long))


def test_an_energy_is_an_entry_of_the_table(gpt2, monkeypatch):
    """A function and an entry: the flag, the validity table, EFAS and the traces of texts follow."""

    def entropy(block, h, ids):
        logits = block.lm.run(ids, replace={block.layer: h})[0][:, :-1]
        return torch.distributions.Categorical(logits=logits).entropy()

    entry = real.Energy(
        "entropy of P(next token)", "block l's own output", entropy, quantity="entropy"
    )
    monkeypatch.setitem(real.ENERGIES, "entropy", entry)
    argv = ["--model_name", str(gpt2), "--energy", "entropy", "--energy_layers", "2"]
    argv += [str(word) for name, value in SMALL.items() for word in (f"--{name}", value)]
    config = real.config_of(real.parse_args(argv))
    analyzer = EnergyLensAnalyzer(config)
    results = analyzer.run_comprehensive_analysis(TEXTS)
    assert list(results.to_dataframe("validity").energy) == [
        "final",
        "random direction",
        "tuned",
        "logit",
        "entropy",
    ]

    # The text trace is the entropy of the model's own distribution
    ids = torch.tensor(analyzer.lm.encode(TEXTS["natural_text"]))[None]
    p = analyzer.lm.run(ids)[0][0, :-1].softmax(-1)
    trace = results.to_dataframe("text_energy").query("text == 'natural_text'").energy[:-1]
    assert np.allclose(trace, -(p * p.log()).sum(-1), atol=1e-4)


def test_replacing_a_state_leaves_the_model_as_it_was(lm, ids):
    before = lm.run(ids)[0]

    def state():
        return [(len(b._forward_hooks), vars(b).get("forward")) for b in lm.blocks]

    was = state()
    h = real.states_and_gradients(lm, ids, [2]).h[2]
    assert torch.allclose(lm.run(ids, replace={2: h})[0], before, atol=1e-5)
    assert not torch.allclose(lm.run(ids, replace={2: 1.5 * h})[0], before, atol=1e-2)
    assert torch.equal(lm.run(ids)[0], before) and state() == was


def test_published_snippet(gpt2, tmp_path, monkeypatch, capsys):
    """The published calls with a local folder; sizes are reduced here, the full sizes take minutes."""
    monkeypatch.chdir(tmp_path)
    config = EnergyLensConfig(model_name=str(gpt2), energy_layers=[1, 2], **SMALL)
    analyzer = EnergyLensAnalyzer(config)
    results = analyzer.run_comprehensive_analysis(TEXTS)
    analyzer.generate_research_report(results, "energy_lens_report.md")
    report = (tmp_path / "energy_lens_report.md").read_text()
    assert "few for statistics" in capsys.readouterr().out and "no attractors" in report
    for text in TEXTS:
        assert text in report
    frame = results.to_dataframe()
    assert set(frame.layer) == {1, 2} and len(frame) == 128
    record = json.loads(results.to_json(tmp_path / "raw.json"))
    assert record["facts"]["cost"] and len(record["tables"]["validity"]) == 8
    trace = results.to_dataframe("text_energy").query("text == 'natural_text' and layer == 1")
    ids = torch.tensor(analyzer.lm.encode(TEXTS["natural_text"]))[None]
    nats = real.next_token_nats(analyzer.lm.run(ids)[0], ids)[0]
    assert np.allclose(trace.energy[:-1], nats, atol=1e-4) and math.isnan(trace.energy.iloc[-1])


def test_ablated_texts_change_the_loss_by_what_is_reported(gpt2):
    results = EnergyLensAnalyzer(
        EnergyLensConfig(model_name=str(gpt2), energy_layers=[2], **SMALL)
    ).run_comprehensive_analysis(TEXTS)
    t = results.to_dataframe("interventions")
    own = t[(t.arm == "feature") & (t.eps == 0.25)]
    assert np.corrcoef(own.integrated_gradients, own.energy_change)[0, 1] > 0.95
    assert {"feature", "random direction"} == set(t.arm)


def test_a_janus_checkpoint(smoke_checkpoint):
    results = EnergyLensAnalyzer(
        EnergyLensConfig(model_name=str(smoke_checkpoint), energy_layers=[5], **SMALL)
    ).run_comprehensive_analysis()
    nats = results.to_dataframe("validity").query("energy == 'final'").nats.iloc[0]
    assert 2 < nats < 8 and results.to_dataframe("layers").n_seq.iloc[0] == 66


def test_the_builtin_energy_transformer(tmp_path, monkeypatch):
    tiny = dict(
        train_steps=4, sequences=48, energy_layers=[1], sae_tokens=1024, relaxed=2, intervened=4
    )
    monkeypatch.setitem(lens.PRESETS, "smoke", lens.PRESETS["smoke"] | tiny)
    config = EnergyLensConfig(
        "energy-transformer",
        128,
        corpus="topics",
        permutations=60,
        directions=60,
        sae_iterations=3,
        preset="smoke",
    )
    analyzer = EnergyLensAnalyzer(config)
    results = analyzer.run_comprehensive_analysis(TEXTS)
    report = analyzer.generate_research_report(results, tmp_path / "report.md").read_text()
    assert "Attractors and basins" in report and "`natural_text` has 9 tokens" in report
    assert set(results.to_dataframe("text_energy").text) == set(TEXTS)


def test_settings_validate_themselves():
    for bad in (
        dict(energy="raw"),
        dict(optimiser="sgd"),
        dict(corpus_tokens=100),
        dict(energy_layers=[]),
        dict(energy_layers=[-1]),
        dict(sae_dict_size=0),
        dict(seq_len=2),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EnergyLensConfig(**bad)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(model_name="/nowhere/model.gguf"), "does not exist"),
        (dict(energy_layers=[9]), "4 blocks"),
        (dict(seq_len=400, corpus_tokens=40000), "context"),
        (dict(sae_dict_size=16), "smaller than the state"),
        (dict(corpus="/nowhere.txt"), "cannot be read"),
        (dict(corpus_tokens=2_000_000), "not enough data"),
    ],
)
def test_bad_settings_are_one_line(gpt2, change, said):
    with pytest.raises(lens.HandoffError, match=said) as e:
        EnergyLensAnalyzer(
            EnergyLensConfig(**dict(model_name=str(gpt2), energy_layers=[1]) | SMALL | change)
        ).run_comprehensive_analysis(TEXTS)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, said", [("", "0 tokens"), ("a", "1 tokens"), ("long words here " * 200, "context")]
)
def test_bad_texts_are_one_line(gpt2, text, said):
    analyzer = EnergyLensAnalyzer(
        EnergyLensConfig(model_name=str(gpt2), energy_layers=[1], **SMALL)
    )
    with pytest.raises(lens.HandoffError, match=said):
        analyzer.run_comprehensive_analysis({"t": text})


def test_nan_weights_are_refused(lm, gpt2):
    model = real.load_language_model(str(gpt2)).model
    next(model.parameters()).data[0, 0] = math.nan
    with pytest.raises(lens.HandoffError, match="NaN"):
        real.LanguageModel("x", model, lm.blocks, lm.norm, lm.unembedding, lm.encode, lm.spell, 128)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "nothing.gguf"])
def test_a_path_that_does_not_exist_is_no_hub_name(name):
    with pytest.raises(lens.HandoffError, match=f"{name} does not exist; expected"):
        real.pretrained_source(name)
    assert real.pretrained_source("owner/model") == ("owner/model", {})


def test_unknown_model_exits_1_with_one_line(tmp_path):
    """In a process of its own: the hub libraries read their settings when they are imported."""
    script = Path(real.__file__)
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [
        sys.executable,
        str(script),
        "--model_name",
        "no/such-model",
        "--save_dir",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert (
        done.returncode == 1
        and "no/such-model" in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "x" / "research_report.md").exists()


def test_too_little_data_exits_2():
    with pytest.raises(SystemExit) as e:
        real.main(["--model_name", "gpt2", "--corpus_tokens", "64"])
    assert e.value.code == 2


def test_tokens_are_spelled_where_they_stand(lm):
    """Joined they are the text, whatever the bytes of a letter are spread over."""
    text = " The naïve 日本 fox\u2028 👩 jumps"
    ids = lm.encode(text)
    assert len(ids) > len(text)  # of a vocabulary of 600, letters take several tokens
    shown = lm.spell(ids)
    assert len(shown) == len(ids) and "".join(shown) == text
    assert not any("\ufffd" in of_token for of_token in shown)


@pytest.mark.parametrize("scheme", ["llama", "metaspace"])
def test_sentencepiece_tokens_keep_their_spaces(scheme, tmp_path):
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["▁or", "▁module", "▁scope", ",", "▁but", "▁not", "▁stored", "."]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    to_bytes = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    llama = decoders.Sequence([*to_bytes, decoders.Strip(" ", 1, 0)])
    tokenizer.decoder = llama if scheme == "llama" else decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(names), **sizes)).save_pretrained(tmp_path)
    model = real.load_language_model(str(tmp_path))
    ids = [vocabulary[word] for word in words]
    assert "".join(model.spell(ids)) == " or module scope, but not stored."
    assert [model.spell([i])[0] for i in ids] == model.spell(ids)


def test_token_ids_above_the_embedding_are_one_line(gpt2, tmp_path):
    """Also where the vocabulary alone is too large: ids that no text has do no harm."""
    shutil.copytree(gpt2, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    tokenizer = real.Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save(str(path))
    model = real.load_language_model(str(tmp_path / "m"))
    assert model.encode("The fox")
    with pytest.raises(real.HandoffError, match="token ids go up to 600, its embedding has rows 0"):
        model.encode("The <new> fox")


def test_padding_of_a_tokenizer_does_not_touch_the_tokens(gpt2, smoke_checkpoint, lm, tmp_path):
    shutil.copytree(gpt2, tmp_path / "m")
    for name in (smoke_checkpoint.name, f"{smoke_checkpoint.name}.json", "tokenizer.json"):
        shutil.copy(smoke_checkpoint.with_name(name), tmp_path / name)
    for path in (tmp_path / "m" / "tokenizer.json", tmp_path / "tokenizer.json"):
        tokenizer = real.Tokenizer.from_file(str(path))
        tokenizer.enable_padding(length=64)
        tokenizer.enable_truncation(5)
        tokenizer.save(str(path))
    text = "The quick brown fox jumps over the lazy dog"
    assert real.load_language_model(str(tmp_path / "m")).encode(text) == lm.encode(text)
    janus = real.load_language_model(str(tmp_path / smoke_checkpoint.name))
    plain = real.load_language_model(str(smoke_checkpoint))
    assert janus.encode(text) == plain.encode(text)


def test_lines_of_texts_end_at_line_ends(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\u2028still one\r\n\r\nthree\fstill".encode())
    assert real.read_texts(path) == {"line 1": "one\u2028still one", "line 3": "three\fstill"}
    named = tmp_path / "texts.json"
    named.write_bytes('\ufeff{"a": "one\u2028still one"}'.encode())
    assert real.read_texts(named) == {"a": "one\u2028still one"}


def test_a_letter_that_begins_in_the_first_token_is_shown_whole(monkeypatch):
    """Activations of the first and last token are left out, their text is not."""
    test = SimpleNamespace(ids=torch.arange(12).view(2, 6), h={3: torch.ones(2, 6, 4)})
    block = SimpleNamespace(gradient=None, sae=SimpleNamespace(encode=lambda h, _: h[..., :1] * 2))
    monkeypatch.setattr(real, "ablation_of", lambda *_: lambda *_, **__: None)
    shown = {}

    def look_at(chosen, f, ids, spell, removed):  # noqa: ARG001
        shown.update(f=f, ids=ids)

    monkeypatch.setattr(real.lens, "look_at", look_at)
    chosen = pd.DataFrame({"layer": [3], "feature": [0]})
    real.look_at_block(SimpleNamespace(spell=None), chosen, block, test)
    assert torch.equal(shown["ids"], test.ids)
    assert torch.equal(shown["f"][..., 0], torch.tensor([[0.0, 2, 2, 2, 2, 0]] * 2))


def test_no_name_ends_the_code_that_it_stands_in():
    assert real.lens.as_code("f_$x^$`<i>") == "`f_$x^$'<i>`"

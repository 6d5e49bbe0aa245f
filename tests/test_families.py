"""Every family of decoders as NewGPT: tiny random models of transformers, whose logits, losses,
greedy text, heads' outputs and ablations must be theirs."""

import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy

import ablation_test
import harvest_activations
import janus_adaptive as janus

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import export_hf  # noqa: E402
import import_hf  # noqa: E402
from families import FAMILIES  # noqa: E402

N_TOKENS = 48  # of a window: longer than the local windows below
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GATED = {"intermediate_size": 48}
GROUPED = {"num_key_value_heads": 2}
FULL = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}


def rope(kind: str, theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 9.0]}
LONGROPE = rope("longrope", original_max_position_embeddings=32, **LONG)
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


class Case(NamedTuple):
    """A tiny model: its family, what tells it from others, and its options."""

    family: str
    name: str
    options: dict[str, Any]


CASES = [
    Case("llama", "grouped", GATED | GROUPED | UNTIED | rope("default", 1e5)),
    Case("llama", "full_biased", GATED | FULL | TIED | {"attention_bias": True, "mlp_bias": True}),
    Case("llama", "linear", GATED | FULL | UNTIED | rope("linear", factor=4.0)),
    Case("llama", "dynamic", GATED | FULL | UNTIED | rope("dynamic", factor=4.0)),
    Case("llama", "yarn", GATED | GROUPED | TIED | YARN),
    Case("llama", "llama3", GATED | GROUPED | UNTIED | LLAMA3 | {"head_dim": 12}),
    Case("llama", "longrope", GATED | GROUPED | UNTIED | LONGROPE),
    Case("mistral", "window", GATED | GROUPED | UNTIED | {"sliding_window": 10}),
    Case("mistral", "full", GATED | FULL | TIED | {"sliding_window": None, "head_dim": 16}),
    Case("qwen2", "grouped", GATED | GROUPED | TIED),
    Case(
        "qwen2",
        "windows",
        GATED
        | FULL
        | UNTIED
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    Case("qwen3", "grouped", GATED | GROUPED | TIED | {"head_dim": 12}),
    Case("qwen3", "biased", GATED | FULL | UNTIED | {"head_dim": 8, "attention_bias": True}),
    Case("gemma", "single", GATED | {"num_key_value_heads": 1, "head_dim": 12}),
    Case("gemma", "full", GATED | FULL | {"head_dim": 8, "hidden_act": "gelu_pytorch_tanh"}),
    Case("gemma2", "grouped", GATED | GROUPED | {"head_dim": 12, "sliding_window": 7}),
    Case(
        "gemma2",
        "caps",
        GATED
        | FULL
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 9,
        },
    ),
    Case("gemma3_text", "local", GATED | GROUPED | MIXED | GEMMA3_ROPE | {"sliding_window": 9}),
    Case("gemma3_text", "wide", GATED | FULL | MIXED | {"sliding_window": 4096, "head_dim": 12}),
    Case("olmo2", "grouped", GATED | GROUPED | UNTIED),
    Case("olmo2", "full", GATED | FULL | TIED | {"attention_bias": True}),
    Case("phi3", "grouped", GATED | GROUPED | UNTIED),
    Case(
        "phi3",
        "partial_long",
        GATED
        | FULL
        | TIED
        | {"hidden_size": 64, "sliding_window": 11, "original_max_position_embeddings": 32}
        | {"rope_parameters": LONGROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    ),
    Case("phi", "partial", GATED | FULL | UNTIED | rope("default", partial_rotary_factor=0.5)),
    Case("phi", "grouped", GATED | GROUPED | UNTIED | {"hidden_act": "gelu"}),
    Case("gpt_neox", "parallel", GATED | UNTIED | rope("default", partial_rotary_factor=0.25)),
    Case(
        "gpt_neox",
        "sequential",
        GATED
        | TIED
        | {"use_parallel_residual": False, "hidden_act": "gelu_fast"}
        | rope("default", partial_rotary_factor=1.0),
    ),
    Case("gpt2", "tied", {}),
    Case(
        "gpt2",
        "scaled",
        UNTIED
        | {
            "activation_function": "gelu",
            "scale_attn_by_inverse_layer_idx": True,
            "n_inner": 40,
        },
    ),
    Case("opt", "relu", {"ffn_dim": 48}),
    Case("opt", "bare", {"ffn_dim": 40, "enable_bias": False} | UNTIED),
]


def build(case: Case) -> Any:
    """A random model whose norms and biases are random, too: those of a new one are 1 and 0."""
    config = hf.AutoConfig.for_model(case.family, **SIZES | case.options)
    torch.manual_seed(0)
    net = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            spread = 0.3 if weight.dim() == 1 else 0.2
            noise = spread * torch.randn_like(weight)
            is_gain = weight.dim() == 1 and "weight" in name
            offset = 1 - FAMILIES[case.family].gain_offset if is_gain else 0.0
            weight.copy_(offset + noise)
    return net


class Pair(NamedTuple):
    """transformers' model, the same as NewGPT, and some tokens [2, T]."""

    theirs: Any
    ours: janus.NewGPT
    idx: Tensor
    o_names: list[str]  # of transformers' output projections, by layer


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.family}-{case.name}")
def pair(request) -> Pair:
    net = build(request.param)
    family = import_hf.family_of("it", net.config)
    ours = import_hf.as_newgpt(net, N_TOKENS)
    ours.requires_grad_(False)
    idx = torch.randint(
        SIZES["vocab_size"], (2, N_TOKENS), generator=torch.Generator().manual_seed(1)
    )
    names = [f"{family.block.format(l)}.{family.o}" for l in range(net.config.num_hidden_layers)]
    return Pair(net, ours, idx, names)


def their_z(pair: Pair) -> list[Tensor]:
    """What goes into the output projection of each layer [2, T, H, K], by hooks."""
    seen: list[Tensor] = []
    hooks = []
    for name in pair.o_names:
        module = pair.theirs.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        pair.theirs(pair.idx, use_cache=False)
    for hook in hooks:
        hook.remove()
    n_heads = pair.ours.cfg.n_heads
    return [z.view(*pair.idx.shape, n_heads, -1) for z in seen]


def test_logits_and_loss(pair):
    targets = pair.idx.roll(-1, 1)
    with torch.no_grad():
        theirs = pair.theirs(pair.idx, use_cache=False).logits
        ours, loss = pair.ours(pair.idx, targets)
    assert theirs.std() > 0.1, "a model that says nothing shows nothing"
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max())
    expected = cross_entropy(theirs.flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_greedy_text(pair):
    """With the frequencies of the text's length: some rules depend on it."""
    ours = import_hf.as_newgpt(pair.theirs, 28)
    prompt = pair.idx[:1, :8]
    expected = pair.theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=False,
    )
    text = prompt
    with torch.no_grad():
        for _ in range(20):
            best = ours(text)[0][:, -1].argmax(-1, keepdim=True)
            text = torch.cat((text, best), 1)
    assert text.tolist() == expected.tolist()


def test_harvested_z(pair):
    expected = their_z(pair)
    layers = list(range(len(expected)))
    autocast = torch.autocast("cpu", enabled=False)
    rows = harvest_activations.layer_activations(pair.ours, pair.idx, layers, "z", autocast)
    for l, z in enumerate(expected):
        ours = rows[f"z.{l}"].view_as(z)
        assert (ours - z).abs().max() <= 1e-4 * max(1.0, z.abs().max())


def test_zero_ablation_of_every_head(pair):
    """Each token's loss, against a hook on the input of transformers' own output projection."""
    targets = pair.idx.roll(-1, 1)
    layers = list(range(len(pair.o_names)))
    clean = ablation_test.clean_pass(pair.ours, pair.idx, targets, layers)
    d_head = pair.ours.cfg.d_head
    largest = 0.0
    for layer, name in enumerate(pair.o_names):
        scores = ablation_test.ablate_layer(
            pair.ours, clean, layer, torch.zeros_like(clean.z[layer])
        )
        for head in range(pair.ours.cfg.n_heads):
            columns = slice(head * d_head, (head + 1) * d_head)

            def without(_module, args, columns=columns):
                z = args[0].clone()
                z[..., columns] = 0
                return (z, *args[1:])

            hook = pair.theirs.get_submodule(name).register_forward_pre_hook(without)
            with torch.no_grad():
                logits = pair.theirs(pair.idx, use_cache=False).logits
            hook.remove()
            expected = cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [2, T]
            found = scores["loss"][1 + head]
            assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.max())
            largest = max(largest, (expected - scores["loss"][0]).abs().max().item())
    assert largest > 0.01, "an ablation that changes nothing shows nothing"


def test_every_family_has_two_cases():
    for family in FAMILIES:
        assert sum(case.family == family for case in CASES) >= 2, family


def test_exported_again(pair, tmp_path):
    """The same logits from a folder of the same family, after its weights have changed."""
    model = copy.deepcopy(pair.ours)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    if model.cfg.centred:
        janus.keep_centred(model)
    family = pair.theirs.config.model_type
    pretrained = {"family": family, "config": pair.theirs.config.to_json_string()}
    export_hf.family_model(model, pretrained).save_pretrained(tmp_path)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is type(pair.theirs)
    with torch.no_grad():
        expected = model(pair.idx)[0]
        found = theirs(pair.idx, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())

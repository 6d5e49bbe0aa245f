"""Where transformers keeps what NewGPT needs, family by family; tools/import_hf.py reads by it,
tools/export_hf.py writes by it.

A family more is an entry in FAMILIES: the names of its modules, where they are not Llama's, the
options of its config that give them biases, and those that NewGPT does not compute; two cases in
tests/test_families.py, and its name in README. What only some models of a family do is read from
the model itself, in tools/import_hf.py: sizes, windows, frequencies, norms, scales of scores.
"""

from dataclasses import dataclass, field
from typing import Any

LLAMA_BIASES = {"attention_bias": ("qkv", "o"), "mlp_bias": ("up", "down")}


@dataclass(frozen=True)
class Family:
    """Names of transformers' modules; empty where the family has none. Those of a block are below
    `block`. Several names are matrices whose rows NewGPT stacks, a gate's first."""

    embedding: str = "model.embed_tokens"
    positions: str = ""  # learned ones
    first_position: int = 0  # the row of `positions` that belongs to the first token
    rotary: str = "model.rotary_emb"
    block: str = "model.layers.{}"
    norm: str = "model.norm"  # after the last block
    # Of a block
    attention: str = "self_attn"
    norm_attn: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    norm_q: str = ""
    norm_k: str = ""
    o: str = "self_attn.o_proj"
    norm_attn_out: str = ""
    norm_mlp: str = "post_attention_layernorm"
    up: tuple[str, ...] = (
        "mlp.gate_proj",
        "mlp.up_proj",
    )  # with a gate there are two, or both in one
    down: str = "mlp.down_proj"
    norm_mlp_out: str = ""
    # What the modules do with their weights
    gated: bool = True
    # Attention and MLP read the same residual stream; a config's use_parallel_residual decides
    parallel: bool = False
    qkv_by_head: bool = False  # rows: q, k, v of the first head, then of the second, ...; all full
    gain_offset: float = 0.0  # a norm multiplies by this + weight
    # Of the config: an option that gives modules a bias -> which of NewGPT's (GPTConfig.biases).
    # A LayerNorm's bias is folded into what reads it, which must be able to have one
    bias_options: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(LLAMA_BIASES))
    # Of the config: what NewGPT computes; another value is refused in these words
    needs: dict[str, tuple[bool, str]] = field(default_factory=dict)


QK_NORM = {"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm"}
FOUR_NORMS = {
    "norm_attn_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
}
CAUSAL = {"use_bidirectional_attention": (False, "attention to later tokens")}

FAMILIES = {  # model_type of the config -> Family
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(**QK_NORM),
    "olmo2": Family(
        norm_attn="",
        norm_attn_out="post_attention_layernorm",
        norm_mlp="",
        norm_mlp_out="post_feedforward_layernorm",
        **QK_NORM,
    ),
    "phi3": Family(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    "gemma": Family(gain_offset=1.0, needs=CAUSAL),
    "gemma2": Family(gain_offset=1.0, needs=CAUSAL, **FOUR_NORMS),
    "gemma3_text": Family(gain_offset=1.0, needs=CAUSAL, **FOUR_NORMS, **QK_NORM),
    "phi": Family(
        norm="model.final_layernorm",
        o="self_attn.dense",
        norm_mlp="input_layernorm",  # one norm, read by both
        up=("mlp.fc1",),
        down="mlp.fc2",
        gated=False,
        parallel=True,
        needs={"qk_layernorm": (False, "LayerNorm of queries and keys")},
    ),
    "gpt_neox": Family(
        embedding="gpt_neox.embed_in",
        rotary="gpt_neox.rotary_emb",
        block="gpt_neox.layers.{}",
        norm="gpt_neox.final_layer_norm",
        attention="attention",
        qkv=("attention.query_key_value",),
        qkv_by_head=True,
        o="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        gated=False,
        parallel=True,
    ),
    "gpt2": Family(
        embedding="transformer.wte",
        positions="transformer.wpe",
        rotary="",
        block="transformer.h.{}",
        norm="transformer.ln_f",
        attention="attn",
        norm_attn="ln_1",
        qkv=("attn.c_attn",),
        o="attn.c_proj",
        norm_mlp="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        gated=False,
        needs={"add_cross_attention": (False, "cross-attention")},
    ),
    "opt": Family(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        first_position=2,
        rotary="",
        block="model.decoder.layers.{}",
        norm="model.decoder.final_layer_norm",
        norm_attn="self_attn_layer_norm",
        o="self_attn.out_proj",
        norm_mlp="final_layer_norm",
        up=("fc1",),
        down="fc2",
        gated=False,
        bias_options={"enable_bias": ("qkv", "o", "up", "down")},
        needs={
            "do_layer_norm_before": (True, "norms after the residual sum"),
            "_remove_final_layer_norm": (False, "no last norm"),
        },
    ),
}


def why_not(config: Any) -> str:
    """What a model of no family here has that NewGPT does not compute, by its config."""
    if config.is_encoder_decoder:
        return "an encoder and a decoder"
    attention = getattr(config, "attn_config", None)  # of MPT
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi"
    if config.model_type == "bloom":
        return "ALiBi"
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in experts):
        return "a mixture of experts"
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = ("mamba", "mamba2", "rwkv", "recurrent_gemma", "xlstm")
    if "linear_attention" in kinds or config.model_type in recurrent:
        return "linear attention or another recurrence"
    return "an architecture that NewGPT does not compute"

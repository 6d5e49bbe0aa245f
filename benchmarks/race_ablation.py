"""Zero ablation: ablation_test.py in a race with TransformerLens, and what bfloat16 changes in it.

Shapes: n sequences, T tokens, L layers, H heads, D d_model, K d_head.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import (
    CPU,
    Calls,
    Row,
    autocast,
    bfloat16_is_fast,
    peer,
    race,
    rates,
    row,
    seconds_of,
    skip,
)
from torch import Tensor


# --------------------------------------------------------------------- one model, in both libraries
class Text:
    """Random tokens [n, T + 1], handed out as the loader of the scripts hands out its windows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.n_windows = len(rows)
        self.seq_len = rows.shape[1] - 1

    @property
    def n_tokens(self) -> int:
        return self.n_windows * self.seq_len

    def spread(self, n: int) -> np.ndarray:
        return np.arange(n) * self.n_windows // n

    def batch(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.rows[windows, :-1], self.rows[windows, 1:]


def small_model(script: Any, quick: bool) -> tuple[Any, str]:
    """An untrained model of a script, and its shape; weights three times as large as usual, so
    that its heads matter."""
    sizes = dict(n_layers=12, d_model=384, n_heads=6, vocab_size=16384, seq_len=256)
    if quick:
        sizes = dict(n_layers=2, d_model=48, n_heads=3, vocab_size=512, seq_len=32)
    d_model, n_heads = sizes["d_model"], sizes["n_heads"]
    cfg = script.GPTConfig(
        n_kv_heads=n_heads, d_head=d_model // n_heads, d_ff=d_model * 8 // 3, **sizes
    )
    torch.manual_seed(0)
    model = script.NewGPT(cfg).eval().requires_grad_(False)
    for parameter in model.blocks.parameters():
        if parameter.dim() > 1:  # not the gains of the norms
            parameter.mul_(3.0)
    size = f"{cfg.n_layers}x{d_model}, {n_heads} heads"
    return model, f"{size}, V={cfg.vocab_size:,}, T={cfg.seq_len}"


def hooked_config(lens: Any, cfg: Any) -> Any:
    """The configuration of TransformerLens (`lens`) for our sizes."""
    return lens.HookedTransformerConfig(
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_ff,
        d_vocab=cfg.vocab_size,
        n_ctx=cfg.seq_len,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=cfg.norm_eps,
        device="cpu",
        positional_embedding_type="rotary",
        rotary_dim=cfg.d_head,
    )


def hooked_block(block: Any, n_heads: int, d_head: int) -> dict[str, Tensor]:
    """Weights of one block under TransformerLens' names."""
    w_q, w_k, w_v = block.attn.w_qkv.weight.chunk(3)  # [H K, D] each
    gate, up = block.w_gate_up.weight.chunk(2)  # [d_ff, D] each

    def by_head(w: Tensor) -> Tensor:
        return w.unflatten(0, (n_heads, d_head)).mT  # [H, D, K]

    return {
        "attn.W_Q": by_head(w_q),
        "attn.W_K": by_head(w_k),
        "attn.W_V": by_head(w_v),
        "attn.W_O": block.attn.w_o.weight.T.unflatten(0, (n_heads, d_head)),  # [H, K, D]
        "ln1.w": block.norm_attn.weight,
        "mlp.W_gate": gate.T,  # [D, d_ff]
        "mlp.W_in": up.T,
        "mlp.W_out": block.w_down.weight.T,  # [d_ff, D]
        "ln2.w": block.norm_mlp.weight,
    }


def hooked(model: Any) -> Any:
    """The same weights in TransformerLens; None if it is not installed."""
    lens = peer("transformer_lens")
    if not lens:
        return None
    cfg = model.cfg
    # Its matrices multiply from the right, torch's from the left
    state = {
        "embed.W_E": model.embedding.weight,  # [V, D]
        "unembed.W_U": model.unembedding.weight.T,  # [D, V]
        "ln_final.w": model.norm.weight,
    }
    for l, block in enumerate(model.blocks):
        for name, weight in hooked_block(block, cfg.n_heads, cfg.d_head).items():
            state[f"blocks.{l}.{name}"] = weight
    net = lens.HookedTransformer(hooked_config(lens, cfg))
    net.load_state_dict(state, strict=False)  # what is not named here are biases, which are zero
    return net.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------- race
def zero_ablation(
    at: Any, model: Any, text: Text, layers: list[int], batch_size: int, low: bool
) -> dict[str, np.ndarray]:
    """Losses of every sequence as ablation_test.py (`at`) measures them, without and with each
    head of `layers`: base [n], zero.loss [n, layers, H], and more."""
    cfg = model.cfg
    zeros = {l: torch.zeros(cfg.n_heads, cfg.d_head) for l in layers}
    # What measure() reads of the script's arguments
    args = argparse.Namespace(seed=0, batch_size=batch_size, resample_draws=0)
    windows = np.arange(text.n_windows)
    return at.measure(model, text, zeros, args, windows, ["zero"], list(layers), autocast(low))


@torch.inference_mode()
def hooked_ablation(
    net: Any, x: Tensor, y: Tensor, heads: list[tuple[int, int]], low: bool
) -> Tensor:
    """Losses [n, heads] of TransformerLens with the z of one (layer, head) after another zero."""
    losses = []
    for layer, head in heads:

        def zero(z: Tensor, hook: Any, head: int = head) -> Tensor:  # noqa: ARG001
            return z.index_fill(2, torch.tensor([head]), 0.0)  # [n, T, H, K]

        with autocast(low):
            logits = net.run_with_hooks(x, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)])
        loss = F.cross_entropy(logits.float().mT, y, reduction="none")  # [n, T]
        losses.append(loss.mean(1))
    return torch.stack(losses, 1)


def hooked_calls(net: Any, x: Tensor, y: Tensor, heads: list[tuple[int, int]]) -> Calls:
    """TransformerLens' variants of the race."""
    calls: Calls = {"TransformerLens, float32": lambda: hooked_ablation(net, x, y, heads, False)}
    if bfloat16_is_fast():
        name = "TransformerLens, bfloat16 autocast"
        calls[name] = lambda: hooked_ablation(net, x, y, heads, True)
    return calls


def ablation(options: argparse.Namespace) -> list[Row]:
    """Zero ablation of every head, ours (with KL, flips and first-order effects) and
    TransformerLens (loss only)."""
    import ablation_test as at

    model, shape = small_model(at, options.quick)
    cfg = model.cfg
    n = 2 if options.quick else 4
    text = Text(torch.randint(cfg.vocab_size, (n, cfg.seq_len + 1)))
    # Two layers stand for all: what follows an ablated layer is run anew, so cost goes by depth
    early = (cfg.n_layers - 1) // 3
    layers = [early, cfg.n_layers - 1 - early]  # their mean depth is that of all
    heads = [(l, l % cfg.n_heads) for l in layers]  # every head costs TransformerLens the same
    x, y = text.batch(np.arange(n))

    def ours(low: bool) -> dict[str, np.ndarray]:
        return zero_ablation(at, model, text, layers, n, low)

    calls: Calls = {"ours, float32": lambda: ours(False)}
    if bfloat16_is_fast():
        calls["ours, bfloat16"] = lambda: ours(True)
    # In heads times tokens: ours takes every head of both layers, theirs one head of each
    work = dict.fromkeys(calls, len(layers) * cfg.n_heads * text.n_tokens)
    net = hooked(model)
    theirs = hooked_calls(net, x, y, heads) if net else {}
    work |= dict.fromkeys(theirs, len(heads) * text.n_tokens)

    what = f"every head of layers {' '.join(map(str, layers))}, zero ablation"
    times = race(calls | theirs, options.seconds)
    rows = rates("ablation", what, shape, times, work, "head-tokens/s")
    if net:
        # That both compute the same, without which a race means nothing
        losses = ours(False)["zero.loss"]  # [n, layers, H]
        mine = losses[:, range(len(heads)), [head for _, head in heads]]  # [n, heads]
        worst = np.abs(mine - hooked_ablation(net, x, y, heads, False).numpy()).max()
        what = "largest difference to TransformerLens in a sequence's loss"
        rows.append(row("ablation", what, shape, "ours, float32", [worst], "nats", "lower"))
    return rows + equal_errors(options, at) + bfloat16_errors(options, at)


def demo_tokens(options: argparse.Namespace) -> Path:
    """Where the tokens of a trained model lie."""
    return options.run / "activations" / "control" / "tokens.npy"


def demo_model(options: argparse.Namespace, at: Any, n: int) -> tuple[Any, Text]:
    """The trained control model of the demo, and n sequences of its own text."""
    checkpoint = options.run / "control" / "janus_control_final.pt"
    model, _ = at.load_checkpoint(checkpoint, CPU, False)
    model.requires_grad_(False)
    window = model.cfg.seq_len + 1  # a target is one token further
    ids = np.load(demo_tokens(options), mmap_mode="r")
    n = min(n, len(ids) // window)
    rows = ids[: n * window].astype(np.int64)
    return model, Text(torch.from_numpy(rows).view(-1, window))


# Sequences: with fewer, slopes fitted out of fold make a mean less sure than variance_of_rest says
FEWEST_EXACT = 8


def variance_with(rho: Any, n_exact: int, n_linear: int) -> Any:
    """Variance of a steadied mean over documents, in variances of one sequence: what the
    first-order effect explains is averaged over n_linear sequences, the rest over n_exact. rho: the
    correlation of both effects, of a head or an array."""
    return rho**2 / n_linear + variance_of_rest(rho, n_exact)


def variance_of_rest(rho: Any, n_exact: int) -> Any:
    """What is left of it with endless first-order effects. The slope is an estimate, too: that of
    two normal variables makes it 1 + 1 / (n - 3) times as large."""
    return (1 - rho**2) / n_exact * (1 + 1 / (n_exact - 3))


def n_linear_for(rho: float, n_plain: int, n_exact: int) -> int:
    """Sequences to first order that give the variance of a plain mean over n_plain; at most ten
    times n_plain."""
    left = 1 / n_plain - variance_of_rest(rho, n_exact)  # variance that they may have
    if left <= rho**2 / (10 * n_plain):
        return 10 * n_plain
    return max(n_exact, math.ceil(rho**2 / left))


def cheapest(rho: float, n_plain: int, cost_exact: float, cost_linear: float) -> tuple[int, int]:
    """Sequences to measure exactly, and in all to first order, that give the variance of a plain
    mean over n_plain for the least cost; the costs are those of as many sequences."""

    def cost(sizes: tuple[int, int]) -> float:
        n_exact, n_linear = sizes
        # the exact ones know their first-order effects
        return n_exact * cost_exact + (n_linear - n_exact) * cost_linear

    possible = range(FEWEST_EXACT, n_plain + 1)
    return min(((n, n_linear_for(rho, n_plain, n)) for n in possible), key=cost)


def correlations(measured: dict[str, np.ndarray]) -> np.ndarray:
    """How closely the first-order effect of each head goes with its effect, over sequences [R];
    `measured`: zero ablations of every head."""
    n = len(measured["base"])
    effects = (measured["zero.loss"] - measured["base"][:, None, None]).reshape(n, -1)  # [n, R]
    first_order = measured["zero.first_order"].reshape(n, -1)
    pairs = zip(effects.T, first_order.T, strict=True)
    return np.array([np.corrcoef(effect, own)[0, 1] for effect, own in pairs])


def equal_errors(options: argparse.Namespace, at: Any) -> list[Row]:
    """The race to one standard error, for that of few and of more sequences."""
    if not demo_tokens(options).is_file():
        skip("ablation to an equal standard error", f"needs {demo_tokens(options)} (make demo)")
        return []
    sizes = [16] if options.quick else [48, 96]
    model, text = demo_model(options, at, 10 * max(sizes))
    net = hooked(model)
    if not net:
        return []
    rows = []
    for n in sizes:
        rows += race_to_error(options, Ours(at, model, text, n), net)
    return rows


@dataclass
class Ours:
    """What ablation_test.py measures of every head of a model, a batch being n sequences, as large
    as TransformerLens gets it."""

    at: Any
    model: Any
    text: Text
    n: int

    def measure(self, windows: np.ndarray, *kind: Any) -> dict[str, np.ndarray]:
        cfg = self.model.cfg
        layers = list(range(cfg.n_layers))
        zeros = {layer: torch.zeros(cfg.n_heads, cfg.d_head) for layer in layers}
        args = argparse.Namespace(seed=0, batch_size=self.n, resample_draws=0)
        sizes = (args, windows, ["zero"], layers, autocast(False))
        return self.at.measure(self.model, self.text, zeros, *sizes, *kind)

    def exact(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Effects, with those to first order beside them."""
        return self.measure(windows)

    def linear(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Effects to first order alone."""
        return self.measure(windows, None, self.at.FIRST_ORDER)


def enough_windows(ours: Ours) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows to measure exactly, and further ones to first order, that give the median head the
    standard error of n sequences; and the correlations [R] that say so. A pilot, not counted."""
    n = ours.n
    windows = ours.text.spread(n)
    rho = correlations(ours.exact(windows))  # [R]
    half = windows[: n // 2]
    costs = seconds_of(lambda: ours.exact(half)), seconds_of(lambda: ours.linear(half))
    n_exact, n_linear = cheapest(float(np.median(rho)), n, *costs)
    to_first_order = ours.text.spread(n_linear)
    few = to_first_order[np.arange(n_exact) * n_linear // n_exact]  # spread over them
    return few, np.setdiff1d(to_first_order, few), rho


def race_to_error(options: argparse.Namespace, ours: Ours, net: Any) -> list[Row]:
    """TransformerLens (`net`) ablates every head of a trained model on n sequences; ours on fewer,
    steadied by the first-order effects of some more."""
    cfg, n = ours.model.cfg, ours.n
    few, others, rho = enough_windows(ours)

    def steadied() -> None:
        ours.exact(few)
        ours.linear(others)

    # Every head costs TransformerLens the same: one a layer stands for all
    heads = [(layer, layer % cfg.n_heads) for layer in range(cfg.n_layers)]
    x, y = ours.text.batch(ours.text.spread(n))
    name = "ours, steadied, float32"
    calls: Calls = {
        name: steadied,
        "TransformerLens, float32": lambda: hooked_ablation(net, x, y, heads, False),
    }
    tokens = n * cfg.seq_len
    work = dict.fromkeys(calls, len(heads) * tokens)
    work[name] = rho.size * tokens  # what it is worth in plain sequences
    what = f"every head to the standard error of {n} sequences (median head), zero ablation"
    n_linear = len(few) + len(others)
    few_and_many = f"ours {len(few)} exact, {n_linear} to first order"
    shape = f"trained demo model, {rho.size} heads; {few_and_many}"
    rows = rates("ablation", what, shape, race(calls, options.seconds), work, "head-tokens/s")
    gains = 1 / n / variance_with(rho, len(few), n_linear)
    what = f"variance of {n} sequences, plain over ours, each head"
    rows.append(row("ablation", what, shape, name, gains, "times", "higher"))
    return rows


def bfloat16_errors(options: argparse.Namespace, at: Any) -> list[Row]:
    """What bfloat16 changes in the impact of each head of the demo model, on its own text."""
    tokens = demo_tokens(options)
    if not tokens.is_file() or not bfloat16_is_fast():
        needs = f"needs fast bfloat16, and a trained model and its tokens: {tokens} (make demo)"
        skip("ablation in bfloat16", needs)
        return []
    model, text = demo_model(options, at, 8 if options.quick else 48)

    def impact(low: bool) -> np.ndarray:
        found = zero_ablation(at, model, text, list(range(model.cfg.n_layers)), 16, low)
        return found["zero.loss"] - found["base"][:, None, None]  # [n, L, H], nats

    low, full = impact(True), impact(False)
    # Beside what the choice of sequences does to an impact, an error below 1 does not show
    standard_error = full.std(0, ddof=1) / math.sqrt(len(full))  # [L, H]
    error = np.abs(low.mean(0) - full.mean(0)) / standard_error
    what = f"impact in bfloat16 minus float32, standard errors over {len(full)} sequences"
    of = f"trained demo model, {error.size} heads"
    unit = "standard errors"
    return [row("ablation", what, of, "ours, bfloat16", error.flatten(), unit, "lower")]

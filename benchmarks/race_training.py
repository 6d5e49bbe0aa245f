"""A training step: that of janus_adaptive.py in a race with transformers' Llama in a plain loop.

Shapes: B batch, T tokens, L layers, N = B T tokens of a step.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from harness import CPU, Calls, Row, autocast, bfloat16_is_fast, breakdown, race, rates, row, skip
from torch import Tensor, nn

import janus_adaptive as janus

KERNELS = {  # kind: what the name of a kernel contains; the first that fits
    "attention (where compiled: its products)": ("attention", "bmm"),
    "matrix products": ("mm", "linear", "gemm", "matmul"),
    "optimiser": ("adam",),
    "loss": ("softmax", "nll", "cross_entropy"),
}
Batches = Iterator[tuple[Tensor, Tensor]]  # inputs and targets [B, T], without end


@dataclass(frozen=True)
class TrainingShape:
    """Sizes of a model, and of a step on `batch` windows of `seq_len` tokens."""

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    seq_len: int
    batch: int

    @property
    def n_tokens(self) -> int:
        """Of one step."""
        return self.batch * self.seq_len

    def __str__(self) -> str:
        model = f"{self.n_layers}x{self.d_model}, V={self.vocab_size:,}, T={self.seq_len}"
        return f"{model}, {self.n_tokens:,} tokens a step"

    def model_config(self) -> janus.GPTConfig:
        sizes = asdict(self)
        del sizes["batch"]  # all the others are the model's
        d_head = self.d_model // self.n_heads
        return janus.GPTConfig(n_kv_heads=self.n_heads, d_head=d_head, **sizes)

    def arguments(self, *more: str) -> argparse.Namespace:
        """Those of janus_adaptive.py for these sizes, and for the flags `more`."""
        flags = ["--batch_size", str(self.batch), "--grad_accum", "1"]
        for name in ("n_layers", "d_model", "n_heads", "d_ff", "seq_len"):
            flags += [f"--{name}", str(getattr(self, name))]
        return janus.parse_args([*flags, *more])

    def random_batches(self, n: int) -> Batches:
        """`n` batches of random tokens, over and over."""
        size = (self.batch, self.seq_len)
        batches = []
        for _ in range(n):
            x = torch.randint(self.vocab_size, size)
            batches.append((x, torch.randint(self.vocab_size, size)))
        return itertools.cycle(batches)


FULL = TrainingShape(
    n_layers=12, d_model=768, n_heads=12, d_ff=2048, vocab_size=50257, seq_len=512, batch=4
)
MIDDLE = TrainingShape(
    n_layers=8, d_model=256, n_heads=8, d_ff=688, vocab_size=8192, seq_len=256, batch=16
)
QUICK = TrainingShape(
    n_layers=2, d_model=64, n_heads=4, d_ff=128, vocab_size=512, seq_len=32, batch=4
)


# --------------------------------------------------------------------------------------------- ours
@dataclass
class JanusTraining:
    """What a training step of janus_adaptive.py takes, apart from its data.

    args: the script's; autocast: the context that set_up() makes of them.
    """

    model: janus.NewGPT
    optimizer: torch.optim.Optimizer
    pressure: janus.Pressure
    args: argparse.Namespace
    autocast: Any

    def step(self, number: int, x: Tensor, y: Tensor, measure: bool) -> float:
        """Step `number` on inputs and targets [B, T] as train_model() takes it; the loss, nats.

        measure: whether the Homeostat sees sigma of this step.
        """
        args = self.args
        rate = janus.learning_rate(number, args)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        # The gradient of the loss, and of the penalty that lambda weights in each layer
        shares = janus.layer_weights(args.layer_weights, args.n_layers, CPU)  # [L]
        weights = torch.tensor(self.pressure.weights(number)) * shares  # [L], or of every layer
        # One of them, because --batch_size is the batch; the script may take several
        micro_batches = zip(x.split(args.batch_size), y.split(args.batch_size), strict=True)
        loss, grams = janus.training_step(
            self.model, list(micro_batches), weights, args, self.autocast, measure
        )
        # The script reads the norm too, to stop at one that is not finite
        nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if measure:
            sigma = janus.sigma_of(grams).tolist()  # [L]
            self.pressure.observe(number, sigma, rate / args.learning_rate)
        return loss


# -------------------------------------------------------------------------------- peer, and a bound
def llama(cfg: janus.GPTConfig) -> nn.Module:
    """transformers' model of the same sizes; tests/test_model.py checks that it is the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        max_position_embeddings=cfg.seq_len,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def same_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """That of janus.new_optimizer, which takes no other model: matrices decay, gains do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


@dataclass
class PlainLoop:
    """A training loop as anybody would write it around transformers' model."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, forward: Any, x: Tensor, y: Tensor, low: bool) -> None:
        """One step on inputs and targets [B, T]. forward: the model, or its compiled twin. low: in
        bfloat16."""
        with autocast(low):
            # shift_labels: the targets are shifted already
            loss = forward(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss
        loss.backward()
        loss.item()  # any loop wants to know it
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def gemm_bound(model: nn.Module, n: int) -> Callable[[], None]:
    """All matrix products of one step on n tokens, and nothing else.

    Of every linear layer [outputs, inputs]: forward, gradient of the input, of the weight.
    """
    dtype = torch.bfloat16 if bfloat16_is_fast() else torch.float32
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    products = []
    # Layers of one shape share their matrices, so that this fits beside the models
    for shape, count in Counter(linear.weight.shape for linear in linears).items():
        n_out, n_in = shape
        w = torch.randn(n_out, n_in).to(dtype)
        x = torch.randn(n, n_in).to(dtype)
        dy = torch.randn(n, n_out).to(dtype)
        products.append((count, x, w.T, torch.empty(n, n_out, dtype=dtype)))  # y
        products.append((count, dy, w, torch.empty(n, n_in, dtype=dtype)))  # dx
        products.append((count, dy.T, x, torch.empty(n_out, n_in, dtype=dtype)))  # dw

    def run() -> None:
        for count, a, b, out in products:
            for _ in range(count):
                torch.mm(a, b, out=out)

    return run


# --------------------------------------------------------------------------------------------- race
def our_calls(model: janus.NewGPT, shape: TrainingShape, data: Batches) -> Calls:
    """A step of each arm. Both train the one `model`: they differ in nothing but the pressure."""
    optimizer = janus.new_optimizer(model, shape.arguments())
    numbers = itertools.count(1)  # of the steps, which the learning rate and lambda go by

    def arm(name: str) -> Callable[[], float]:
        args = shape.arguments("--pressure", name)
        _, context = janus.set_up(args)
        training = JanusTraining(model, optimizer, janus.Pressure(args), args, context)
        measure = name == "adaptive"  # in every step, where the script samples every tenth
        return lambda: training.step(next(numbers), *next(data), measure=measure)

    return {"ours, control": arm("control"), "ours, adaptive": arm("adaptive")}


def peer_calls(model: nn.Module, shape: TrainingShape, data: Batches, backend: str) -> Calls:
    """A step of transformers' model in each of the ways that its users have."""
    loop = PlainLoop(model, same_optimizer(model, shape.arguments()))
    calls: Calls = {"transformers, float32": lambda: loop.step(model, *next(data), low=False)}
    low = bfloat16_is_fast()
    precision = "bfloat16 autocast" if low else "float32"
    if low:
        name = "transformers, bfloat16 autocast"
        calls[name] = lambda: loop.step(model, *next(data), low=True)
    if has_compiler():
        compiled = torch.compile(model, backend=backend)
        name = f"transformers, {precision}, torch.compile"
        calls[name] = lambda: loop.step(compiled, *next(data), low=low)
    else:
        skip("transformers, torch.compile", "no C++ compiler; apt-get install g++")
    return calls


def has_compiler() -> bool:
    return shutil.which("c++") is not None


def pair_rows(times: dict[str, list[float]], bound: str, shape: str) -> list[Row]:
    """Differences of two variants, round by round, so that the machine's ups and downs cancel."""
    control = np.array(times["ours, control"])  # [rounds], seconds
    adaptive = np.array(times["ours, adaptive"])  # [rounds]
    more = 100 * (adaptive / control - 1)
    what = "Homeostat, sigma and penalty in every step"
    pair = "ours, adaptive against control"
    rows = [row("training", what, shape, pair, more, "% more time", "lower")]
    share = np.array(times[bound]) / control  # 1: a step is nothing but its matrix products
    what = "share of the matrix-product bound"
    rows.append(row("training", what, shape, "ours, control", share, "share", "higher"))
    return rows


def training_race(shape: TrainingShape, backend: str, seconds: float) -> list[Row]:
    """Rows of one shape: both arms, transformers three times, the bound, and a profile of ours."""
    cfg = shape.model_config()
    model = janus.NewGPT(cfg).train()
    theirs = llama(cfg)
    # A smaller model would win any race
    assert sum(p.numel() for p in theirs.parameters()) == model.n_params()[0]
    if has_compiler():
        for part in (*model.blocks, model.loss):  # as the script does; a whole model takes minutes
            part.compile(backend=backend)

    # Several batches, so that no variant finds its tokens' embeddings in the cache
    data = shape.random_batches(4)
    calls = our_calls(model, shape, data)
    calls |= peer_calls(theirs, shape, data, backend)
    bound = f"bound: matrix products only, {'bfloat16' if bfloat16_is_fast() else 'float32'}"
    calls[bound] = gemm_bound(model, shape.n_tokens)

    size = str(shape)
    times = race(calls, seconds)
    rows = rates("training", "step", size, times, shape.n_tokens, "tokens/s")
    rows += pair_rows(times, bound, size)
    # Of the control: the Homeostat's share stands in its own row
    for kind, share in breakdown(calls["ours, control"], KERNELS).items():
        rows.append(row("training", f"profile: {kind}", size, "ours, control", [share], "share"))
    return rows


def training(options: argparse.Namespace) -> list[Row]:
    """A training step, ours (both arms) and transformers' Llama in a plain loop."""
    backend = "aot_eager" if options.quick else "inductor"  # compiling takes minutes
    # The size that people train, and one whose steps are short enough for overhead to show
    rows = []
    for shape in [QUICK] if options.quick else [FULL, MIDDLE]:
        rows += training_race(shape, backend, options.seconds)
        torch.compiler.reset()  # the next shape gets kernels of its own
    return rows

"""How the speed of training, SAE training and ablation goes with one size at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import CPU, Row, race, rates
from race_ablation import Text, zero_ablation
from race_sae import ENDLESS, SAEShape, default_dtype, sae_args
from race_training import JanusTraining, TrainingShape

import janus_adaptive as janus


@dataclass
class Job:
    """Something to time: `call`, which does `work` (tokens, or tokens of every head)."""

    work: float
    call: Callable[[], Any]


def training_job(quick: bool, n_layers: int = 6, batch: int = 8) -> Job:
    """A training step, not compiled, with the Homeostat in it."""
    sizes = dict(d_model=256, n_heads=8, d_ff=688)
    if quick:
        sizes = dict(d_model=32, n_heads=8, d_ff=64)
    shape = TrainingShape(n_layers=n_layers, vocab_size=4096, seq_len=128, batch=batch, **sizes)
    args = shape.arguments()
    threads = torch.get_num_threads()
    _, context = janus.set_up(args)
    torch.set_num_threads(threads)  # set_up chose its own
    model = janus.NewGPT(shape.model_config()).train()
    # Not compiled: each size would take a minute for it
    optimizer = janus.new_optimizer(model, args)
    training = JanusTraining(model, optimizer, janus.Pressure(args), args, context)
    x, y = torch.randint(4096, (2, batch, 128))  # [B, T] each
    return Job(shape.n_tokens, lambda: training.step(1, x, y, measure=True))


def sae_job(quick: bool, latents: int = 6144, n: int = 2048) -> Job:
    """A step of a topk SAE on n tokens."""
    import train_sae as ts

    d = 64 if quick else 768
    x = torch.randn(n, d)  # [N, D]
    # 32 active latents, whatever their number: what a larger SAE is made for
    args = sae_args(SAEShape(d, latents // d, 32, n), "topk", default_dtype(), ENDLESS)
    trainer = ts.Trainer(args, x.mean(0), float(x.norm(dim=1).mean()), CPU)
    return Job(n, lambda: trainer.step(x))


def ablation_job(quick: bool, n_heads: int = 8) -> Job:
    """Zero ablation of every head, in float32."""
    import ablation_test as at

    n, length, n_layers = 4, 128, 6
    d = 32 if quick else 256
    # More heads are narrower ones: the model's weights stay as many
    cfg = at.GPTConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d // n_heads,
        d_model=d,
        d_ff=2 * d,
        vocab_size=4096,
        seq_len=length,
    )
    model = at.NewGPT(cfg).eval().requires_grad_(False)
    text = Text(torch.randint(4096, (n, length + 1)))
    layers = list(range(n_layers))
    work = n_layers * n_heads * n * length  # tokens of every head
    # In float32, which every processor multiplies
    return Job(work, lambda: zero_ablation(at, model, text, layers, batch_size=n, low=False))


@dataclass(frozen=True)
class Family:
    """Jobs that differ in one size: `make(quick, **{name: size})`, their speed in `unit`."""

    what: str
    unit: str
    make: Callable[..., Job]
    name: str
    sizes: tuple[int, ...]


FAMILIES = [  # around the sizes of the demo, each fourfold up and down, or twofold
    Family("training step", "tokens/s", training_job, "n_layers", (3, 6, 12)),
    Family("training step", "tokens/s", training_job, "batch", (2, 8, 32)),
    Family("SAE training step", "tokens/s", sae_job, "latents", (1536, 6144, 24576)),
    Family("SAE training step", "tokens/s", sae_job, "n", (512, 2048, 8192)),
    Family("ablation of every head", "head-tokens/s", ablation_job, "n_heads", (4, 8, 16)),
]


def size_rows(family: Family, options: argparse.Namespace) -> list[Row]:
    """A race of the sizes of one family."""
    # In one race, so that a change of the machine's speed does not look like a law
    jobs = {}
    for size in family.sizes:
        variant = f"ours, {family.name} = {size:,}"
        jobs[variant] = family.make(options.quick, **{family.name: size})
    calls = {variant: job.call for variant, job in jobs.items()}
    work = {variant: job.work for variant, job in jobs.items()}
    times = race(calls, options.seconds / 10)
    return rates("scaling", family.what, f"{family.name} changed", times, work, family.unit)


def thread_rows(family: Family, options: argparse.Namespace) -> list[Row]:
    """A race of the family's middle size on one thread and on all."""
    threads = torch.get_num_threads()
    job = family.make(options.quick)  # each size as the defaults have it

    def on(count: int) -> Callable[[], None]:
        def call() -> None:
            # In every call, because the variants take turns
            torch.set_num_threads(count)
            job.call()

        return call

    # On one core both are the same
    calls = {f"ours, {count} threads": on(count) for count in sorted({1, threads})}
    times = race(calls, options.seconds / 10)
    torch.set_num_threads(threads)  # whatever the last call had
    return rates("scaling", family.what, "threads changed", times, job.work, family.unit)


def scaling(options: argparse.Namespace) -> list[Row]:
    """One size changed at a time: training (not compiled), SAE training, and ablation of every
    head."""
    rows = []
    for family in FAMILIES:
        rows += size_rows(family, options)
    # Two families change two sizes of one job, whose default is the same
    different = {family.what: family for family in FAMILIES}
    for family in different.values():
        rows += thread_rows(family, options)
    return rows

"""Energy-Lens: its permutation nulls in a race with scipy, its gradients with plain transformers.

Shapes: S sequences, T tokens of each, F features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import Calls, Row, race, rates


@dataclass(frozen=True)
class NullSizes:
    """Sequences, tokens of each, features, and permutations of sequences that make the null."""

    n_seqs: int
    length: int
    n_features: int
    n_perm: int


FULL_NULL = NullSizes(n_seqs=313, length=32, n_features=2048, n_perm=10_000)
QUICK_NULL = NullSizes(n_seqs=40, length=8, n_features=64, n_perm=200)


def scipy_null(feature: np.ndarray, alignment: np.ndarray, n_perm: int) -> Callable[[], Any]:
    """scipy's permutation test of one feature and its alignment, [S, T] each."""
    from scipy import stats

    def statistic(order: np.ndarray, axis: int = -1) -> np.ndarray:
        """Sum of products for orders of the sequences [..., S], which scipy permutes."""
        permuted = alignment[order.astype(int)]  # [..., S, T]
        return (feature * permuted).sum((axis - 1, axis))

    return lambda: stats.permutation_test(
        (np.arange(len(feature)),),
        statistic,
        permutation_type="pairings",
        n_resamples=n_perm,
        vectorized=True,
        batch=500,  # all orders at once would not fit in memory
        rng=np.random.default_rng(1),
    )


def nulls(options: argparse.Namespace) -> list[Row]:
    """Sequence-permutation nulls of Energy-Lens beside scipy.stats.permutation_test, which takes
    one feature at a time."""
    import energy_lens_minimal as lens

    sizes = QUICK_NULL if options.quick else FULL_NULL
    g = torch.Generator().manual_seed(0)
    shape = (sizes.n_seqs, sizes.length, sizes.n_features)
    fires = torch.rand(shape, generator=g) < 0.01  # rarely, as features do
    features = fires * torch.rand(shape, generator=g)  # [S, T, F]
    alignment = torch.randn(shape, generator=g)  # [S, T, F]
    strata = torch.zeros(sizes.n_seqs)  # one: every sequence may change places with every other
    orders = lens.permutations(strata, sizes.n_perm, np.random.default_rng(0))  # [n_perm, S]

    def ours() -> None:
        lens.seqperm_moments(features, alignment, strata)
        lens.seqperm_mc(features, alignment, orders)

    peer = "scipy.stats.permutation_test"
    first = features[..., 0].numpy(), alignment[..., 0].numpy()
    calls: Calls = {"ours": ours, peer: scipy_null(*first, sizes.n_perm)}
    times = race(calls, options.seconds / 4)
    size = f"{sizes.n_seqs * sizes.length:,} tokens, {sizes.n_perm:,} permutations"
    work = {"ours": sizes.n_features, peer: 1}  # features a call
    return rates("nulls", "sequence permutations", size, times, work, "features/s")


def gradients(options: argparse.Namespace) -> list[Row]:
    """States and energy gradients of three blocks of a pretrained model, beside what transformers
    alone would take for them."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    import real_model_extension as real

    width, vocab = (32, 500) if options.quick else (384, 16384)
    n_seqs, length = (4, 16) if options.quick else (8, 128)
    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=length,
        n_embd=width,
        n_layer=12,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    # Two of them: ours freezes its weights
    net = GPT2LMHeadModel(config).eval()
    their_net = GPT2LMHeadModel(config).eval()
    body = net.transformer
    lm = real.LanguageModel("gpt2", net, body.h, body.ln_f, net.lm_head, list, str, length)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (n_seqs, length), generator=g)  # [S, T]
    layers = [3, 7, 10]  # an early, a middle and a late one

    def block_by_block() -> None:
        for layer in layers:
            _, states = lm.run(ids, keep=(layer,))
            real.LossEnergy(lm, layer, "final").grad(states[layer], ids)

    # What training would take, and a user who wants gradients of states has at hand
    def plain() -> None:
        their_net(input_ids=ids, labels=ids).loss.backward()
        their_net.zero_grad(set_to_none=True)

    calls: Calls = {
        "ours, three blocks at once": lambda: real.states_and_gradients(lm, ids, layers),
        "ours, a block at a time": block_by_block,
        "transformers, one forward and backward, with weight gradients": plain,
    }
    times = race(calls, options.seconds / 2)
    shape = f"12x{width}, V={vocab:,}, {n_seqs} x {length} tokens"
    what = "states and gradients of three blocks"
    return rates("gradients", what, shape, times, ids.numel(), "tokens/s")

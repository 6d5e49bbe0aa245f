"""Both token nulls at full size, 2,048 features x 10,000 tokens x 10,000 permutations, beside scipy
on two of the features. How fast they are is for benchmarks/ to say."""

import numpy as np
import torch
from scipy import stats

import energy_lens_minimal as lens


def test_nulls_agree_with_scipy_at_full_size():
    g = torch.Generator().manual_seed(0)
    n_seq, length, k, n_perm = 313, 32, 2048, 10_000
    f = (torch.rand(n_seq, length, k, generator=g) < 0.01) * torch.rand(
        n_seq, length, k, generator=g
    )
    a = torch.randn(n_seq, length, k, generator=g)
    strata = torch.zeros(n_seq)
    perms = lens.permutations(strata, n_perm, np.random.default_rng(0))
    moments = lens.seqperm_moments(f, a, strata)
    t = lens.seqperm_mc(f, a, perms)
    p_exact = 2 * torch.special.ndtr(-moments.z_of(moments.observed).abs())
    reached = (t - moments.mean).abs() >= (moments.observed - moments.mean).abs()
    p_mc = (1 + reached.sum(0)) / (1 + n_perm)

    for i in range(2):  # scipy permutes the sequences of one feature
        fi, table = f[..., i].numpy(), a[..., i].numpy()

        def statistic(order, axis=-1, fi=fi, table=table):
            return (fi * table[order.astype(int)]).sum((axis - 1, axis))

        done = stats.permutation_test(
            (np.arange(n_seq),),
            statistic,
            permutation_type="pairings",
            n_resamples=n_perm,
            vectorized=True,
            batch=500,
            rng=np.random.default_rng(1),
        )
        assert (
            abs(done.pvalue - p_mc[i].item()) < 0.03 and abs(done.pvalue - p_exact[i].item()) < 0.03
        )

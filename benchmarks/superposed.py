"""Superposed features with a known dictionary, and how much of it an SAE finds.

In the manner of SynthSAEBench (2602.14687): more features than dimensions, a few of them common and
most of them rare, correlated in firing, some of them only where a parent fires.

Shapes: N tokens, D dimensions, P planted features, F latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor

N_FACTORS = 8  # hidden causes that make features fire together
CORRELATION = 0.4  # share of the variance of what makes a feature fire that they explain
CHILDREN = 0.25  # share of the features that need a parent
LEAST_FIRINGS = 20  # of a planted feature in the tokens of a test, to be asked for


@dataclass(frozen=True)
class Planted:
    """The truth.

    directions: [P, D], of norm 1
    probability: [P], that it fires; of a child: where its parent does
    parent: [P] int64, a feature further to the front; -1: none
    loadings: [P, N_FACTORS], rows of norm sqrt(CORRELATION)
    size: [P], its mean activation; bias: [D]
    """

    directions: Tensor
    probability: Tensor
    parent: Tensor
    loadings: Tensor
    size: Tensor
    bias: Tensor

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Activations [N, D] of n tokens, and which features fire in each [N, P] (bool)."""
        g = torch.Generator().manual_seed(seed)
        n_features = len(self.probability)
        factors = torch.randn(n, N_FACTORS, generator=g)
        own = torch.randn(n, n_features, generator=g)
        drive = factors @ self.loadings.T + math.sqrt(1 - CORRELATION) * own  # [N, P], N(0, 1)
        active = drive > torch.special.ndtri(1 - self.probability)
        for child in (self.parent >= 0).nonzero()[:, 0].tolist():
            active[:, child] &= active[:, self.parent[child]]
        # between a half and one and a half of its mean
        strength = self.size * (0.5 + torch.rand(n, n_features, generator=g))
        return (active * strength) @ self.directions + self.bias, active


def plant(n_features: int, d: int, l0: float, seed: int = 0) -> Planted:
    """n_features in d dimensions, of which l0 fire in a token on average: number i with a
    probability that falls as 1 / (i + 10)."""
    g = torch.Generator().manual_seed(seed)
    frequency = 1 / (torch.arange(n_features) + 10.0)
    frequency = (frequency * l0 / frequency.sum()).clamp(max=0.5)
    parent = torch.full((n_features,), -1)
    probability = frequency.clone()
    n_children = round(CHILDREN * n_features)
    for child in torch.randperm(n_features - 10, generator=g)[:n_children].sort().values + 10:
        possible = (frequency > 1.5 * frequency[child]) & (parent < 0)
        choices = possible[:child].nonzero()[:, 0]
        if len(choices):
            parent[child] = choices[torch.randint(len(choices), (), generator=g)]
            probability[child] = frequency[child] / frequency[parent[child]]
    loadings = F.normalize(torch.randn(n_features, N_FACTORS, generator=g), dim=1)
    return Planted(
        directions=F.normalize(torch.randn(n_features, d, generator=g), dim=1),
        probability=probability,
        parent=parent,
        loadings=math.sqrt(CORRELATION) * loadings,
        size=0.7 + 0.6 * torch.rand(n_features, generator=g),
        bias=torch.randn(d, generator=g),
    )


@dataclass(frozen=True)
class Score:
    """How much of the truth an SAE has: of each planted feature that fires often enough.

    cosine: with the decoder row of its latent, latents given to features one to one, mean
    found: share of the features with a cosine above 0.9
    f1: of its latent's firing as a detector of the feature, mean
    l0: active latents a token
    """

    cosine: float
    found: float
    f1: float
    l0: float


def score(planted: Planted, active: Tensor, latents: Tensor, w_dec: Tensor) -> Score:
    """Of an SAE with decoder w_dec [F, D] that makes latents [N, F] of tokens in which `active`
    [N, P] features fire."""
    asked = active.sum(0) >= LEAST_FIRINGS
    directions = planted.directions[asked]
    cosines = directions @ F.normalize(w_dec, dim=1).T  # [P, F]
    feature, latent = optimize.linear_sum_assignment(cosines.numpy(), maximize=True)
    cosine = torch.zeros(len(directions))
    cosine[feature] = cosines[feature, latent]
    truth = active[:, asked][:, feature].float()  # [N, matched]
    fires = (latents[:, latent] != 0).float()
    hits = (truth * fires).sum(0)
    f1 = torch.zeros(len(directions))
    f1[feature] = 2 * hits / (truth.sum(0) + fires.sum(0)).clamp(min=1)
    return Score(
        cosine=cosine.mean().item(),
        found=(cosine > 0.9).float().mean().item(),
        f1=f1.mean().item(),
        l0=(latents != 0).float().sum(1).mean().item(),
    )

"""Importances: how much each surviving connection of one layer counts.

An importance is a function of one 1-D float64 tensor, the absolute values of a layer's surviving weights, to a tensor
of the same length. It must depend on nothing else; pruning compares its values over all layers. The five of the paper
(Vandersmissen and Oramas, arXiv 2302.11244) are `magnitude`, `l1`, `l2`, `softmax` and `min_max`; `lamp` (Lee et al.,
arXiv 2010.07611) and `random` are references to compare with.

In what follows w are the absolute values of one layer's n surviving weights. An empty layer has an empty importance,
and none of the functions overflows, whatever the finite weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tombola.streams import generator


@dataclass(frozen=True)
class Seeded:
    """An importance that draws random numbers: `function(weights, generator)`.

    Pruning hands it a generator of its own for each layer and each round, derived from the seed.

    Args:
        function: (weights, generator) -> importances; weights of shape (n,), float64.

    >>> coin = Seeded(lambda w, g: torch.randint(2, w.shape, generator=g))
    >>> bool((coin(torch.ones(8), seed=1) == coin(torch.ones(8), seed=1)).all())
    True
    """

    function: Callable[[Tensor, torch.Generator], Tensor]

    def __call__(self, weights: Tensor, seed: int = 0) -> Tensor:
        """Return the importances that a seed gives."""
        return self.function(weights, generator(seed, "importance"))


Importance: TypeAlias = Callable[[Tensor], Tensor] | Seeded


def magnitude(weights: Tensor) -> Tensor:
    """Return w: the usual importance of the lottery ticket hypothesis.

    >>> magnitude(torch.tensor([3.0, 1.0]))
    tensor([3., 1.])
    """
    return weights


def l1(weights: Tensor) -> Tensor:
    """Return w / sum(w), in 0..1; a layer's importances sum to one.

    A layer whose weights are all zero has importance 0 throughout.

    >>> l1(torch.tensor([3.0, 1.0]))
    tensor([0.7500, 0.2500])
    """
    total = weights.sum()
    if 0 < total < torch.inf:
        return weights / total
    scaled = _divided_by_largest(weights)
    return scaled / scaled.sum() if scaled.any() else scaled


def l2(weights: Tensor) -> Tensor:
    """Return w^2 / sum(w^2), in 0..1; a layer's importances sum to one.

    A layer whose weights are all zero has importance 0 throughout.

    >>> l2(torch.tensor([3.0, 1.0]))
    tensor([0.9000, 0.1000])
    """
    return l1(_divided_by_largest(weights).square())


def softmax(weights: Tensor) -> Tensor:
    """Return exp(w) / sum(exp(w)), in 0..1; a layer's importances sum to one.

    Computed as exp(w - max w) / sum(exp(w - max w)), which is the same and cannot overflow.

    >>> softmax(torch.tensor([1.0, 1.0]))
    tensor([0.5000, 0.5000])
    """
    return torch.softmax(weights, dim=0)


def min_max(weights: Tensor) -> Tensor:
    """Return (w - min w) / (max w - min w), in 0..1.

    Every layer has at least one 0 and one 1. A layer whose weights are all equal (one survivor, say) has importance 1
    throughout.

    >>> min_max(torch.tensor([3.0, 1.0, 2.0]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    if weights.numel() == 0:
        return weights
    least, largest = weights.min(), weights.max()
    if least == largest:
        return torch.ones_like(weights)
    return (weights - least) / (largest - least)


def lamp(weights: Tensor) -> Tensor:
    """Return w_j^2 / sum of w_k^2 over all k with w_k >= w_j, in 0..1: LAMP (Lee et al., arXiv 2010.07611).

    Equal weights have equal importance. A layer whose weights are all zero has importance 0 throughout.

    >>> lamp(torch.tensor([3.0, 1.0, 2.0]))
    tensor([1.0000, 0.0714, 0.3077])
    """
    squares = _divided_by_largest(weights).square()
    descending = squares.sort(descending=True).values
    # From the large end: the total minus the sum of what is smaller would cancel.
    at_or_above = descending.cumsum(0)
    last_equal = torch.searchsorted(-descending, -squares, right=True) - 1
    return torch.where(squares > 0, squares / at_or_above[last_equal], 0.0)


def _random(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers, uniform in [0, 1), whatever w: what pruning without any knowledge gives.

    >>> _random(torch.tensor([3.0, 1.0]), torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    return torch.rand(weights.shape, dtype=torch.float64, generator=generator)


random = Seeded(_random)
"""Uniform in [0, 1), independent of the weights: what pruning without any knowledge gives."""


def _divided_by_largest(weights: Tensor) -> Tensor:
    """Return weights / max(weights), so that neither sums nor squares overflow; zeros stay zeros."""
    if weights.numel() == 0 or not (largest := weights.max()) > 0:
        return torch.zeros_like(weights)
    return weights / largest


IMPORTANCES: dict[str, Importance] = {
    "magnitude": magnitude,
    "l1": l1,
    "l2": l2,
    "softmax": softmax,
    "min_max": min_max,
    "lamp": lamp,
    "random": random,
}

"""Scores: ratings of the connections of one layer, before the layers are made comparable.

A score is a function of the surviving connections of one layer. It returns one number for each of them, as a float64
tensor of shape (n,) in flat order. A higher score means a more important connection. Scores that need the network, a
loss and examples are in `tombola.importance.network_scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tombola.errors import ImportanceError


def _no_signs() -> Tensor:
    raise ImportanceError("it needs the weights with their signs, and only their absolute values are known here")


def _no_rewind_point() -> Tensor:
    raise ImportanceError("it needs the weights at the rewind point, which are not given")


@dataclass(frozen=True)
class Survivors:
    """The n surviving connections of one layer, in flat order, and a random generator: all that a score may use.

    Args:
        magnitudes: the absolute values |w| of their weights, float64 of shape (n,), finite. The memory is reused for
            the next layer, so a score that keeps them for later has to copy them.
        generator: the random stream of this layer in this round of pruning.
        weights: a function that returns the weights w with their signs, float64 of shape (n,).
        rewound: a function that returns the weights at the rewind point, float64 of shape (n,).
    """

    magnitudes: Tensor
    generator: torch.Generator
    weights: Callable[[], Tensor] = _no_signs
    rewound: Callable[[], Tensor] = _no_rewind_point


Score: TypeAlias = Callable[[Survivors], Tensor]


def magnitude(survivors: Survivors) -> Tensor:
    """Return |w|, the usual score of the lottery ticket hypothesis (Frankle and Carbin, arXiv 1803.03635).

    >>> magnitude(Survivors(torch.tensor([3.0, 1.0]), torch.Generator()))
    tensor([3., 1.])
    """
    return survivors.magnitudes


def movement(survivors: Survivors) -> Tensor:
    """Return |w - w_rewind|, how far training moved the weight (Zhou et al., arXiv 1905.01067).

    >>> weights, rewound = torch.tensor([3.0, -1.0]), torch.tensor([2.5, 1.0])
    >>> movement(Survivors(weights.abs(), torch.Generator(), lambda: weights, lambda: rewound))
    tensor([0.5000, 2.0000])
    """
    return (survivors.weights() - survivors.rewound()).abs_()


def initial(survivors: Survivors) -> Tensor:
    """Return |w_rewind|, the absolute weight at the rewind point (Zhou et al., arXiv 1905.01067).

    >>> weights, rewound = torch.tensor([3.0, -1.0]), torch.tensor([2.5, 1.0])
    >>> initial(Survivors(weights.abs(), torch.Generator(), lambda: weights, lambda: rewound))
    tensor([2.5000, 1.0000])
    """
    return survivors.rewound().abs()


def random(survivors: Survivors) -> Tensor:
    """Return random numbers, uniform in [0, 1) and independent of the weights: pruning without any knowledge.

    >>> random(Survivors(torch.tensor([3.0, 1.0]), torch.Generator().manual_seed(0))).shape
    torch.Size([2])
    """
    return torch.rand(survivors.magnitudes.shape, dtype=torch.float64, generator=survivors.generator)


LAYER_SCORES: dict[str, Score] = {each.__name__: each for each in (magnitude, movement, initial, random)}
"""The scores of one layer's connections by name."""

"""Scores: ratings of the connections of one layer, before the layers are made comparable.

A score is a function of the surviving connections of one layer. It returns one number for each of them, as a float64
tensor of shape (n,) in flat order. A higher score means a more important connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Survivors:
    """The n surviving connections of one layer, in flat order, and a random generator: all that a score may use.

    Args:
        magnitudes: the absolute values |w| of their weights, float64 of shape (n,), finite. The memory is reused for
            the next layer, so a score that keeps them for later has to copy them.
        generator: the random stream of this layer in this round of pruning.
    """

    magnitudes: Tensor
    generator: torch.Generator


Score: TypeAlias = Callable[[Survivors], Tensor]


def magnitude(survivors: Survivors) -> Tensor:
    """Return |w|, the usual score of the lottery ticket hypothesis (Frankle and Carbin, arXiv 1803.03635).

    >>> magnitude(Survivors(torch.tensor([3.0, 1.0]), torch.Generator()))
    tensor([3., 1.])
    """
    return survivors.magnitudes


def random(survivors: Survivors) -> Tensor:
    """Return random numbers, uniform in [0, 1) and independent of the weights: pruning without any knowledge.

    >>> random(Survivors(torch.tensor([3.0, 1.0]), torch.Generator().manual_seed(0))).shape
    torch.Size([2])
    """
    return torch.rand(survivors.magnitudes.shape, dtype=torch.float64, generator=survivors.generator)


SCORES: dict[str, Score] = {each.__name__: each for each in (magnitude, random)}
"""The scores by name."""

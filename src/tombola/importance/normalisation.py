"""Normalisations: make the scores of different layers comparable (Vandersmissen and Oramas, arXiv 2302.11244).

A normalisation is a function of the scores of one layer. It takes a float64 tensor of shape (n,) and returns another
tensor of that shape, in the same order. It must depend on nothing else, it must not change its argument, and it must
not give a lower value to a higher score: the order of the connections within a layer is that of their scores.

Below, x are the n scores of a layer, which are finite. Most scores are never negative. For those that may be, such as
`grasp`, the functions say what happens to the sign. For a layer without survivors, each function returns an empty
tensor. None of the functions overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tombola.errors import ImportanceError

Normalisation: TypeAlias = Callable[[Tensor], Tensor]


def identity(scores: Tensor) -> Tensor:
    """Return x, the scores as they are.

    >>> identity(torch.tensor([3.0, 1.0]))
    tensor([3., 1.])
    """
    return scores


def l1(scores: Tensor) -> Tensor:
    """Return x / sum(x), in 0..1; the values of a layer sum to one.

    If a score is negative, it is x / sum(|x|), in -1..1. A layer whose scores are all zero gives 0 throughout.

    >>> l1(torch.tensor([3.0, 1.0])), l1(torch.tensor([3.0, -1.0]))
    (tensor([0.7500, 0.2500]), tensor([ 0.7500, -0.2500]))
    """
    total = (scores.abs() if _has_negative(scores) else scores).sum()
    if 0 < total < torch.inf:
        return scores / total
    scaled = _scale_to_one(scores)
    return scaled / scaled.abs().sum() if scaled.any() else scaled


def l2(scores: Tensor) -> Tensor:
    """Return x^2 / sum(x^2), in 0..1; the values of a layer sum to one.

    A negative score keeps its sign: it gives -x^2 / sum(x^2). A layer whose scores are all zero gives 0 throughout.

    >>> l2(torch.tensor([3.0, 1.0])), l2(torch.tensor([3.0, -1.0]))
    (tensor([0.9000, 0.1000]), tensor([ 0.9000, -0.1000]))
    """
    shares = l1(_scale_to_one(scores).square())
    return shares.copysign(scores) if _has_negative(scores) else shares


def softmax(scores: Tensor) -> Tensor:
    """Return exp(x) / sum(exp(x)), in 0..1; the values of a layer sum to one.

    It is computed as exp(x - max x) / sum(exp(x - max x)), which is equal and cannot overflow.

    >>> softmax(torch.tensor([1.0, 1.0]))
    tensor([0.5000, 0.5000])
    """
    return torch.softmax(scores, dim=0)


def min_max(scores: Tensor) -> Tensor:
    """Return (x - min x) / (max x - min x), in 0..1.

    Every layer has at least one 0 and one 1, unless its scores are all equal (for example, if it has one survivor):
    then all values are 1.

    >>> min_max(torch.tensor([3.0, 1.0, 2.0]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    if scores.numel() == 0:
        return scores
    least, largest = scores.min(), scores.max()
    if least == largest:
        return torch.ones_like(scores)
    return (scores - least) / (largest - least)


def rank(scores: Tensor) -> Tensor:
    """Return the share of scores that are lower, in 0..1: each layer gives the same values, whatever its scores.

    The value is (number of lower scores + number of equal other scores / 2) / (n - 1), so equal scores give equal
    values, and the mean is 1/2. A layer with one survivor gives 1, as with min-max.

    >>> rank(torch.tensor([3.0, 1.0, 2.0, 2.0]))
    tensor([1.0000, 0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    count = scores.numel()
    if count < 2:
        return torch.ones(count, dtype=torch.float64)
    ordered = scores.sort().values
    lower, up_to = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    return (lower + up_to - 1).double() / (2 * (count - 1))


def lamp(scores: Tensor) -> Tensor:
    """Return x_j^2 / sum of x_k^2 over all k with x_k >= x_j, in 0..1: LAMP (Lee et al., arXiv 2010.07611).

    Equal scores give equal values. A layer whose scores are all zero gives 0 throughout.

    Raises:
        ImportanceError: if a score is negative, because the squares are then in another order than the scores.

    >>> lamp(torch.tensor([3.0, 1.0, 2.0]))
    tensor([1.0000, 0.0714, 0.3077])
    """
    if _has_negative(scores):
        raise ImportanceError("the score has negative values, which lamp cannot normalise; use identity, l1 or rank")
    squares = _scale_to_one(scores).square()
    descending = squares.sort(descending=True).values
    # Sum from the largest down, because the total minus the sum of the smaller squares would lose digits.
    at_or_above = descending.cumsum(0)
    last_equal = torch.searchsorted(-descending, -squares, right=True) - 1
    return torch.where(squares > 0, squares / at_or_above[last_equal], 0.0)


def _scale_to_one(scores: Tensor) -> Tensor:
    """Return x / max(|x|), so that neither sums nor squares overflow; if all scores are zero, return zeros."""
    if scores.numel() == 0:
        return torch.zeros_like(scores)
    largest = torch.maximum(scores.max(), -scores.min()) if _has_negative(scores) else scores.max()
    return scores / largest if largest > 0 else torch.zeros_like(scores)


def _has_negative(scores: Tensor) -> bool:
    return scores.numel() > 0 and bool(scores.min() < 0)


NORMALISATIONS: dict[str, Normalisation] = {
    each.__name__: each for each in (identity, l1, l2, softmax, min_max, lamp, rank)
}
"""The normalisations by name."""

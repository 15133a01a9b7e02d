"""Selection: how many connections a round of pruning removes from each layer, and which.

Three selections fix the number for each layer, see `apportion`. The paper's, `global`, does not: it removes the lowest
scores of all layers together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tombola.errors import RoundError, UserError, did_you_mean, expect, short

SELECTIONS = ("global", "uniform", "erk", "shares")
"""The names of the selections."""

_KEPT = 1 << 24  # up to this many scores are kept (128 MiB); more are computed twice, which takes less time
_SAMPLED = 1 << 20  # size of the sample of scores that gives bounds of the threshold


def select(
    scores: Callable[[str], Tensor], sizes: Mapping[str, int], count: int, numbers: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Select exactly `count` connections: the lowest of all layers together, or of each layer if `numbers` says so.

    Args:
        scores: a function layer -> scores, see `select_lowest`.
        sizes: layer -> number of connections.
        count: the number of connections to select, in 0..sum of sizes.
        numbers: layer -> how many of them are in this layer; None if the scores decide.

    Returns:
        layer -> a bool tensor of shape (sizes[layer],), True if selected.

    >>> scores = {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.9, 0.8])}
    >>> select(scores.__getitem__, {"a": 3, "b": 2}, 2, {"a": 1, "b": 1})
    {'a': tensor([False,  True, False]), 'b': tensor([False,  True])}
    """
    if numbers is None:
        return select_lowest(scores, sizes, count)
    return {layer: select_lowest(scores, {layer: size}, numbers[layer])[layer] for layer, size in sizes.items()}


def check_selection(selection: str) -> None:
    """Raise `UserError` unless a selection is one of `SELECTIONS`."""
    expect(selection, str, "selection", "a text")
    if selection not in SELECTIONS:
        raise UserError(f"selection: unknown {selection!r}; {did_you_mean(selection, SELECTIONS)}")


def apportion(
    selection: str,
    alive: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    shares: Mapping[str, float] | None = None,
) -> dict[str, int] | None:
    """Return how many of the `count` connections a round removes from each layer; None if the scores decide.

    - `global` (the paper's): the scores decide.
    - `uniform`: the same share of each layer, count / (sum of alive).
    - `erk` (Erdos-Renyi kernel, Evci et al., arXiv 1911.11134): as many stay in each layer as c * (sum of the weight's
      dimensions), at most all that are alive, with the c for which `count` are removed. The density of a layer is then
      proportional to (inputs + outputs + kernel height + kernel width) / (its number of connections). Scalars have no
      dimensions and go first; among themselves they are alike.
    - `shares`: a share of each layer that is proportional to shares[layer].

    Whole numbers come from the method of largest remainders; of equal remainders, that of the earlier layer counts.

    Args:
        selection: one of `SELECTIONS`.
        alive: layer -> number of connections that are alive and may be pruned.
        shapes: layer -> the shape of its weight.
        count: the number of connections to remove, in 0..sum of alive.
        shares: layer -> its share relative to the others, 0 or more; 1 for layers that are not named.

    Raises:
        UserError: if the selection is unknown, or if a share is of no layer or no number from 0.
        RoundError: if a layer would have to lose more connections than it has.

    >>> alive, shapes = {"a": 80, "b": 20}, {"a": (8, 10), "b": (2, 10)}
    >>> apportion("uniform", alive, shapes, 20), apportion("shares", alive, shapes, 20, {"b": 2.0})
    ({'a': 16, 'b': 4}, {'a': 13, 'b': 7})
    >>> apportion("erk", alive, shapes, 70)  # 30 stay: 18 and 12, as 8 + 10 is to 2 + 10
    {'a': 62, 'b': 8}
    """
    check_selection(selection)
    expect(shares, Mapping | None, "shares", "numbers by the names of layers")
    for layer, share in (shares or {}).items():
        if layer not in shapes:
            raise UserError(f"shares: {layer!r} is no layer of the mask; {did_you_mean(str(layer), shapes)}")
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 <= share < math.inf:
            raise UserError(f"shares: {layer!r} has the share {short(share)}; expected a number from 0")
    if selection == "global":
        return None
    if selection == "erk":
        ideal = _erk(alive, shapes, count)
    else:
        given = shares or {} if selection == "shares" else {}
        exact = {each: int(share) if isinstance(share, Integral) else float(share) for each, share in given.items()}
        weights = {layer: number * Fraction(exact.get(layer, 1)) for layer, number in alive.items()}
        whole = sum(weights.values())
        if count and not whole:
            raise RoundError("shares: all layers that have connections left have share 0; give one of them a share")
        ideal = {layer: count * weight / whole if count else Fraction(0) for layer, weight in weights.items()}
    for layer, number in ideal.items():
        if number > alive[layer]:
            raise RoundError(
                f"shares: layer {layer!r} would lose {math.ceil(number)} connections in a round and has only "
                f"{alive[layer]}; give it a smaller share, or use fewer levels"
            )
    return _round_to_sum(ideal, count)


def _erk(alive: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], count: int) -> dict[str, Fraction]:
    """Return how many connections each layer loses so that what stays is proportional to the sum of its dimensions.

    A layer for which more would stay than it has loses none, and the proportion is solved again for the others.
    """
    stay = sum(alive.values()) - count
    full: set[str] = set()
    while True:
        free = {layer: sum(shapes[layer]) for layer in alive if layer not in full}
        if not any(free.values()):
            free = dict.fromkeys(free, 1)  # only scalars, which have no dimensions
        left = stay - sum(alive[layer] for layer in full)
        scale = Fraction(left, sum(free.values())) if free else Fraction(0)
        over = {layer for layer, size in free.items() if scale * size > alive[layer]}
        if not over:
            return {layer: alive[layer] - scale * free[layer] if layer in free else Fraction(0) for layer in alive}
        full |= over


def _round_to_sum(ideal: Mapping[str, Fraction], count: int) -> dict[str, int]:
    """Round numbers whose sum is `count` to whole numbers with the same sum: the method of largest remainders.

    Fewer are missing after rounding down than numbers have a remainder, so that none is rounded up that is whole.
    """
    numbers = {layer: math.floor(number) for layer, number in ideal.items()}
    by_remainder = sorted(ideal, key=lambda layer: numbers[layer] - ideal[layer])  # the largest remainder first
    for layer in by_remainder[: count - sum(numbers.values())]:
        numbers[layer] += 1
    return numbers


def select_lowest(scores: Callable[[str], Tensor], sizes: Mapping[str, int], count: int) -> dict[str, Tensor]:
    """Select exactly the `count` connections with the lowest scores over all layers.

    Ties are broken by layer, in the order of `sizes`, then by index: the lower one is selected.

    Args:
        scores: a function layer -> scores, float64 of shape (sizes[layer],) on the CPU; they may be infinite, but not
            NaN. It is called once per layer, or several times if there are too many scores to keep, so it has to return
            the same scores each time. It may return them in the same memory each time.
        sizes: layer -> number of connections.
        count: the number of connections to select, in 0..sum of sizes.

    Returns:
        layer -> a bool tensor of shape (sizes[layer],), True if selected.

    >>> import torch
    >>> scores = {"a": torch.tensor([0.5, 0.1, 0.3]), "b": torch.tensor([0.3, 0.2])}
    >>> select_lowest(scores.__getitem__, {"a": 3, "b": 2}, 3)
    {'a': tensor([False,  True,  True]), 'b': tensor([False,  True])}
    """
    total = sum(sizes.values())
    scores = scores if total > _KEPT else _keep(scores)
    step = total // _SAMPLED + 1
    sample = np.concatenate([np.zeros(0), *(scores(layer)[::step].numpy().copy() for layer in sizes)])
    if count == 0:
        return {layer: torch.zeros(size, dtype=torch.bool) for layer, size in sizes.items()}

    for low, high in _bound_threshold(sample, count / total):
        selected, undecided = {}, {}
        for layer in sizes:
            values = scores(layer)
            selected[layer] = values < low
            where = ((values >= low) & (values <= high)).nonzero().flatten()
            undecided[layer] = where, values[where]
        candidates = np.concatenate([values.numpy() for _, values in undecided.values()])
        missing = count - sum(int(below.count_nonzero()) for below in selected.values())
        if 0 < missing <= len(candidates):
            break

    threshold = float(np.partition(candidates, missing - 1)[missing - 1])
    ties = missing - int(np.count_nonzero(candidates < threshold))
    for layer, (where, values) in undecided.items():
        tied = where[values == threshold][:ties]
        ties -= len(tied)
        selected[layer][where[values < threshold]] = True
        selected[layer][tied] = True
    return selected


def _keep(scores: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Return a function that computes the scores of each layer only once and keeps a copy of them."""

    @functools.cache
    def compute(layer: str) -> Tensor:
        return scores(layer).clone()

    return compute


def _bound_threshold(sample: npt.NDArray[np.float64], share: float) -> Iterator[tuple[float, float]]:
    """Yield closed intervals that may contain the threshold, the score below which this share of all scores lies.

    The first interval is estimated from the sample: it contains the threshold with high probability, and few scores.
    The last interval contains all scores.
    """
    rank = round(share * len(sample))
    for margin in (4 * math.isqrt(len(sample)) + 1, len(sample) // 8, len(sample)):
        ends = rank - margin, rank + margin
        inside = [end for end in ends if 0 <= end < len(sample)]
        ordered = np.partition(sample, inside) if inside else sample
        low, high = (float(ordered[end]) if end in inside else None for end in ends)
        yield -math.inf if low is None else low, math.inf if high is None else high

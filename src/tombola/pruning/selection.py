"""Selection: find the connections with the lowest scores of all layers, which a round of pruning removes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_KEPT = 1 << 24  # up to this many scores are kept (128 MiB); more are computed twice, which takes less time
_SAMPLED = 1 << 20  # size of the sample of scores that gives bounds of the threshold


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

"""Pruning of one round: the connections of the lowest importance are removed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tombola.errors import ImportanceError, UserError, describe_exception, did_you_mean
from tombola.importance import Importance, Seeded
from tombola.pruning.mask import Mask, pack, resolve_layers
from tombola.streams import generator


def prune(
    weights: Mapping[str, Tensor],
    mask: Mask,
    importance: Importance,
    fraction: float,
    *,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> Mask:
    """Return `mask` without the connections of the lowest importance: step 3b and 3c of the paper's Algorithm 2.

    Each layer's importances are computed, in float64, from the absolute values of its surviving weights; then exactly
    round(fraction x alive) connections are removed, those with the lowest importance over all layers. Ties go first
    to the earlier layer, then to the lower flat index.

    Args:
        weights: parameter name -> weights; must have every layer of the mask, and may have more.
        mask: the connections that are alive.
        importance: see `tombola.importance`.
        fraction: of the connections that are alive, in (0, 1).
        exclude: layers to leave alone in this round, by layer or parameter name.
        seed: of the random stream that a `Seeded` importance draws from.

    Raises:
        UserError: naming the layer, where weights are missing, of another shape, NaN or infinite, or where the
            importance raises, returns another length or NaN; where `fraction` is out of range.

    >>> mask = Mask.from_tensors({"w": torch.ones(5, dtype=torch.bool)})
    >>> prune({"w": torch.tensor([0.5, -0.1, 0.3, -0.9, 0.2])}, mask, lambda w: w, 0.4)["w"]
    tensor([ True, False,  True,  True, False])
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction must lie between 0 and 1, both excluded, got {fraction}")
    left_out = resolve_layers(mask, exclude)
    names = [name for name in mask if name not in left_out]
    with _one_thread(), torch.no_grad():
        counts = mask.counts
        total = sum(counts[name] for name in names)
        count = round(fraction * total)
        kept: dict[str, Tensor] = {}
        # One piece of memory for the survivors of all layers: touching new memory takes longer than computing.
        buffer = torch.empty(max((counts[name] for name in names), default=0), dtype=torch.float64)

        def scores(name: str) -> Tensor:
            if name in kept:
                return kept[name]
            if total > _KEPT:
                return _scores(name, weights, mask, importance, seed, buffer)
            kept[name] = _scores(name, weights, mask, importance, seed, torch.empty(counts[name], dtype=torch.float64))
            return kept[name]

        sample = np.concatenate(
            [np.zeros(0), *(scores(name)[:: total // _SAMPLED + 1].numpy().copy() for name in names)]
        )
        if count == 0:
            return mask
        for low, high in _intervals(sample, count / total):
            lower, within = {}, {}
            for name in names:
                layer = scores(name)
                lower[name] = layer < low
                where = ((layer >= low) & (layer <= high)).nonzero().flatten()
                within[name] = where, layer[where]
            candidates = np.concatenate([values.numpy() for _, values in within.values()])
            missing = count - sum(int(removed.count_nonzero()) for removed in lower.values())
            if 0 < missing <= len(candidates):
                break
        threshold = float(np.partition(candidates, missing - 1)[missing - 1])
        ties_to_remove = missing - int(np.count_nonzero(candidates < threshold))
        bits = mask.bits
        for name in names:
            removed, (where, values) = lower.pop(name), within.pop(name)
            ties = where[values == threshold][:ties_to_remove]
            ties_to_remove -= len(ties)
            removed[where[values < threshold]] = True
            removed[ties] = True
            alive = mask[name]
            bits[name] = pack(~removed if alive.all() else alive.masked_scatter(alive, ~removed))
    return Mask(mask.shapes, bits)


_KEPT = 1 << 24  # importances that are few enough to be kept (128 MiB); more are computed twice, which takes less time
_SAMPLED = 1 << 20


def _intervals(sample: npt.NDArray[np.float64], share: float) -> Iterator[tuple[float, float]]:
    """Yield the ends of intervals in which the number lies that has this share of all at or below it.

    Probably in the first, which few lie in; certainly in the last, which all lie in.
    """
    rank = round(share * len(sample))
    for margin in (4 * math.isqrt(len(sample)) + 1, len(sample) // 8, len(sample)):
        ends = rank - margin, rank + margin
        inside = [end for end in ends if 0 <= end < len(sample)]
        ordered = np.partition(sample, inside) if inside else sample
        low, high = (float(ordered[end]) if end in inside else None for end in ends)
        yield -math.inf if low is None else low, math.inf if high is None else high


def _scores(
    name: str, weights: Mapping[str, Tensor], mask: Mask, importance: Importance, seed: int, buffer: Tensor
) -> Tensor:
    """Return the importances, float64 of shape (survivors,), of one layer's surviving weights in flat order.

    They may lie in `buffer`, where the survivors are put.
    """
    if name not in weights:
        raise UserError(f"no weights for layer {name!r} of the mask; {did_you_mean(name, weights)}")
    weight = weights[name].detach().cpu()
    if tuple(weight.shape) != mask.shapes[name]:
        raise UserError(f"layer {name!r}: the weights have shape {tuple(weight.shape)}, the mask {mask.shapes[name]}")
    alive = mask[name]
    values = weight.flatten() if alive.all() else weight[alive]
    length = len(values)
    survivors = buffer[:length].copy_(values).abs_()
    if length and not survivors.max().isfinite():
        raise UserError(f"layer {name!r}: its weights are not all finite (NaN or infinite), so they cannot be compared")
    label = f"importance {getattr(importance, '__name__', type(importance).__name__)!r}, layer {name!r}"
    try:
        if isinstance(importance, Seeded):
            scores = importance.function(survivors, generator(seed, "importance", name))
        else:
            scores = importance(survivors)
    except Exception as error:
        raise ImportanceError(f"{label}: it raised {describe_exception(error)}") from error
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (length,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ImportanceError(f"{label}: expected a tensor of shape ({length},), one number a survivor, got {got}")
    scores = scores.detach().to("cpu", torch.float64).contiguous()
    if length and scores.min().isnan():  # the least of numbers is NaN where one of them is
        raise ImportanceError(f"{label}: it returned NaN")
    return scores


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: a sum's order, and so its last bit, would depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

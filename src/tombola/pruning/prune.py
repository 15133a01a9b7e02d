"""One round of pruning: score, normalise, select."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from numbers import Integral, Real
from typing import TypeAlias

import torch
from torch import Tensor

from tombola.errors import ImportanceError, RoundError, UserError, did_you_mean, expect, short
from tombola.exits import attribute_failure
from tombola.importance import NORMALISATIONS, Importance, NetworkScore, Normalisation, Survivors, as_importance
from tombola.pruning.eligible import resolve_layers
from tombola.pruning.mask import Mask, pack, positions, resolve_kept_dense
from tombola.pruning.selection import apportion, select
from tombola.streams import generator
from tombola.threads import one_thread

ScoreNetwork: TypeAlias = Callable[[NetworkScore, Mask, Collection[str], int], Mapping[str, Tensor]]
"""A function (score, mask, prunable, removed) -> {layer: scores of the weight's shape}.

It knows the network, the loss and the data. `prunable` are the layers whose connections may be removed, and `removed`
is the number of connections that are removed by these scores.
"""


def prune(
    weights: Mapping[str, Tensor],
    mask: Mask,
    importance: Importance | Normalisation,
    fraction: float,
    *,
    exclude: Collection[str] = (),
    keep_dense: Collection[str] = (),
    selection: str = "global",
    shares: Mapping[str, float] | None = None,
    rewound: Mapping[str, Tensor] | None = None,
    score_network: ScoreNetwork | None = None,
    seed: int = 0,
) -> Mask:
    """Return `mask` without the connections of the lowest importance: steps 3b and 3c of the paper's Algorithm 2.

    Algorithm 2 is that of Vandersmissen and Oramas (arXiv 2302.11244). The importance rates each layer's surviving
    connections, in float64. Exactly round(fraction x alive) connections are removed: those with the lowest importance
    over all layers, or of each layer if the selection says so. Ties are broken by layer, then by flat index: the lower
    one is removed. The number of connections alive includes those of the layers that are kept dense; the removed ones
    all come from the other layers.

    Args:
        weights: parameter name -> weights; it must have every layer of the mask, and may have more.
        mask: the connections that are alive.
        importance: a score with its normalisation, or a function of a layer's absolute surviving weights, see
            `tombola.importance`.
        fraction: the fraction of the alive connections to remove, in (0, 1).
        exclude: the layers that this round neither prunes nor counts, by layer or parameter name.
        keep_dense: the layers that are counted but not pruned, by layer or parameter name.
        selection: how many connections each layer loses: `global`, `uniform`, `erk` or `shares`, see
            `tombola.pruning.selection.apportion`.
        shares: the shares of layers for the selection `shares`, by parameter name.
        rewound: the weights at the rewind point, by parameter name; a score such as `movement` needs them.
        score_network: a function (score, mask, prunable, removed) that computes the scores of a whole network, such as
            `taylor`, see `tombola.training.scoring.score_network`.
        seed: the seed of the random numbers that the importance may draw; every layer has its own stream.

    Raises:
        ImportanceError: if the importance raises, if it does not return one number per connection, without NaN, or if
            the normalisation changes the order of the scores.
        UserError: if the weights of a layer are missing, have another shape, are sparse, complex or without values, or
            are NaN or infinite; if `fraction` is out of range; or if a layer to exclude or to keep dense is not in the
            mask.
        RoundError: if more connections of a layer would have to be removed than it has.

    >>> mask = Mask.from_tensors({"w": torch.ones(5, dtype=torch.bool)})
    >>> prune({"w": torch.tensor([0.5, -0.1, 0.3, -0.9, 0.2])}, mask, lambda w: w, 0.4)["w"]
    tensor([ True, False,  True,  True, False])
    """
    check_fraction(fraction)
    importance = as_importance(importance)
    expect(weights, Mapping, "weights", "tensors by the names of layers")
    expect(mask, Mask, "mask", "a tombola.Mask")
    expect(rewound, Mapping | None, "rewound", "tensors by the names of layers")
    expect(seed, Integral, "seed", "a whole number")
    left_out = resolve_layers(mask, exclude, "exclude")
    kept_dense = resolve_kept_dense(mask, keep_dense) - left_out
    counted = {layer: count for layer, count in mask.counts.items() if layer not in left_out}
    layers = [layer for layer in counted if layer not in kept_dense]
    for layer in layers:
        _check_weights(layer, weights, rewound if rewound and importance.reads_rewind_point else {})
    count = count_to_remove(sum(counted.values()), fraction)
    prunable = sum(counted[layer] for layer in layers)
    if count > prunable:
        raise RoundError(
            f"keep_dense: a fraction of {fraction} of the {sum(counted.values())} connections alive is {count}, and "
            f"only {prunable} are in layers that may be pruned"
        )
    with one_thread(), torch.no_grad():
        for part in _split(count, importance, prunable):
            sizes = {layer: mask.counts[layer] for layer in layers}
            numbers = apportion(selection, sizes, mask.shapes, part, shares)
            compute = _importance_of_layer(weights, mask, importance, sizes, part, rewound, score_network, seed)
            mask = _remove(mask, select(compute, sizes, part, numbers))
    return mask


def _check_weights(layer: str, *of_networks: Mapping[str, Tensor]) -> None:
    """Raise `UserError` if the weights of a layer, where they are given, cannot be compared by their magnitudes."""
    for tensor in (weights[layer] for weights in of_networks if layer in weights):
        expect(tensor, Tensor, f"layer {layer!r}: its weights", "a tensor")
        if tensor.is_complex() or tensor.is_meta or tensor.layout is not torch.strided:
            raise UserError(
                f"layer {layer!r}: expected its weights as a dense tensor of real numbers, got one of {tensor.dtype}, "
                f"{tensor.layout}, on the device {str(tensor.device)!r}"
            )


def _split(count: int, importance: Importance, alive: int) -> list[int]:
    """Return the number of connections to remove in each step of a round; each step removes about the same fraction.

    A score of the whole network is not asked for a step that removes nothing.
    """
    if not isinstance(importance.score, NetworkScore):
        return [count]
    steps = importance.score.steps
    left = [alive * ((alive - count) / alive) ** (step / steps) if alive else 0.0 for step in range(1, steps)]
    ends = [0, *(alive - round(each) for each in left), count]
    return [end - begin for begin, end in pairwise(ends) if end > begin]


def _importance_of_layer(
    weights: Mapping[str, Tensor],
    mask: Mask,
    importance: Importance,
    sizes: Mapping[str, int],
    removed: int,
    rewound: Mapping[str, Tensor] | None,
    score_network: ScoreNetwork | None,
    seed: int,
) -> Callable[[str], Tensor]:
    """Return a function layer -> the importances of its surviving connections, float64 in flat order."""
    # All layers share one buffer for their survivors: touching new memory takes longer than the computation.
    memory = torch.empty(max(sizes.values(), default=0), dtype=torch.float64)
    score = importance.score
    if isinstance(score, NetworkScore):
        if score_network is None:
            raise UserError(f"importance {importance.name!r} needs the network, its loss and data, not weights alone")
        found = _score_layers(score_network, importance, mask, sizes, removed)

    def compute(layer: str) -> Tensor:
        magnitudes = _read_magnitudes(weights, mask, layer, memory[: sizes[layer]])
        with _attribute_failure(importance, layer):
            if isinstance(score, NetworkScore):
                scores = _check(_take_alive(found, mask, layer), sizes[layer])
            else:
                rewind_point = {} if rewound is None else {"rewound": partial(_read_alive, rewound, mask, layer)}
                read = partial(_read_alive, weights, mask, layer)
                survivors = Survivors(magnitudes, generator(seed, "importance", layer), read, **rewind_point)
                scores = score(survivors)
                if scores is not magnitudes:
                    scores = _check(scores, sizes[layer])
            if importance.normalise in NORMALISATIONS.values():
                return _check(importance.normalise(scores), sizes[layer])
            values = _check(importance.normalise(scores.clone()), sizes[layer])  # a user's function may change it
            _check_order(scores, values)
            return values

    return compute


def _score_layers(
    score_network: ScoreNetwork, importance: Importance, mask: Mask, layers: Collection[str], removed: int
) -> Mapping[str, Tensor]:
    """Return the scores of a whole network, with a tensor of the weight's shape for each of these layers."""
    assert isinstance(importance.score, NetworkScore)
    with _attribute_failure(importance):
        found = score_network(importance.score, mask, layers, removed)
        if not isinstance(found, Mapping):
            raise ImportanceError(f"expected a dict, layer -> scores, got {type(found).__name__}")
    for layer in layers:
        with _attribute_failure(importance, layer):
            _check_shape(found.get(layer), mask.shapes[layer], "score per connection")
    return found


def count_to_remove(alive: int, fraction: float) -> int:
    """Return how many connections a round removes: round(fraction x alive), halves to even.

    >>> count_to_remove(10, 0.2), count_to_remove(5, 0.5)
    (2, 2)
    """
    return round(fraction * alive)


def check_fraction(fraction: float) -> None:
    """Raise `UserError` if a fraction is not in (0, 1)."""
    expect(fraction, Real, "fraction", "a number between 0 and 1, both excluded")
    if not 0 < fraction < 1:
        raise UserError(f"fraction must lie between 0 and 1, both excluded, got {short(fraction)}")


def _read_alive(weights: Mapping[str, Tensor], mask: Mask, layer: str) -> Tensor:
    """Return a copy of a layer's surviving weights as float64, in flat order; a score may change it."""
    return _take_alive(weights, mask, layer).to(torch.float64, copy=True)


def _take_alive(tensors: Mapping[str, Tensor], mask: Mask, layer: str) -> Tensor:
    """Return the values of a layer's alive connections, in flat order, as they are stored."""
    if layer not in tensors:
        raise UserError(f"no weights for layer {layer!r} of the mask; {did_you_mean(layer, map(str, tensors))}")
    tensor = tensors[layer].detach().cpu()
    if tuple(tensor.shape) != mask.shapes[layer]:
        raise UserError(f"layer {layer!r}: the weights have shape {tuple(tensor.shape)}, the mask {mask.shapes[layer]}")
    alive = mask[layer]
    return tensor.flatten() if alive.all() else tensor.flatten().index_select(0, positions(alive))


def _read_magnitudes(weights: Mapping[str, Tensor], mask: Mask, layer: str, out: Tensor) -> Tensor:
    """Write the absolute values of a layer's surviving weights, in flat order, to `out`, and return it."""
    out.copy_(_take_alive(weights, mask, layer)).abs_()
    if len(out) and not out.max().isfinite():  # the maximum is NaN if one of the numbers is
        raise UserError(
            f"layer {layer!r}: its weights are not all finite (NaN or infinite), so they cannot be compared"
        )
    return out


@contextmanager
def _attribute_failure(importance: Importance, layer: str | None = None) -> Iterator[None]:
    """Turn an exception of an importance into an `ImportanceError` that names the importance and the layer."""
    label = f"importance {importance.name!r}" + ("" if layer is None else f", layer {layer!r}")
    try:
        with attribute_failure(f"{label}: it"):
            yield
    except UserError as error:
        text = str(error)
        raise ImportanceError(text if text.startswith(label) else f"{label}: {text}") from error


def _check_shape(values: object, shape: tuple[int, ...], what: str) -> None:
    """Raise `ImportanceError` if the values of an importance are not a tensor of this shape."""
    if not isinstance(values, Tensor) or tuple(values.shape) != shape:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ImportanceError(f"expected a tensor of shape {shape}, one {what}, got {got}")


def _check(values: Tensor, length: int) -> Tensor:
    """Return the values of an importance as float64 on the CPU; raise `ImportanceError` if they cannot be compared."""
    _check_shape(values, (length,), "number per survivor")
    if values.is_complex():
        raise ImportanceError("it returned complex numbers, which have no order; return for example their magnitudes")
    values = values.detach().to("cpu", torch.float64).contiguous()
    if length and values.min().isnan():  # the minimum is NaN if one of the numbers is
        raise ImportanceError("it returned NaN")
    return values


def _check_order(scores: Tensor, values: Tensor) -> None:
    """Raise `ImportanceError` if a normalisation gives a lower value to a higher score, beyond rounding."""
    order = scores.argsort()
    ordered, found = scores[order], values[order]
    highest = found.cummax(0).values[:-1] if len(found) else found
    least = torch.where(highest.isfinite(), highest - 1e-9 * highest.abs(), highest)
    broken = ((ordered[1:] > ordered[:-1]) & (found[1:] < least)).nonzero()
    if len(broken):
        at = int(broken[0])
        raise ImportanceError(
            f"the normalisation gives the score {ordered[at + 1]:.6g} a lower value than a lower score; it must keep "
            "the order of the scores of a layer (a function that changes the order is a score)"
        )


def _remove(mask: Mask, removed: dict[str, Tensor]) -> Mask:
    """Return `mask` without the connections that are True in `removed`, which lists the alive ones in flat order.

    The dict `removed` is emptied, to save memory.
    """
    bits = mask.bits
    for layer in list(removed):
        gone, alive = removed.pop(layer), mask[layer].flatten()
        stay = ~gone if alive.all() else alive.index_fill(0, positions(alive).index_select(0, positions(gone)), False)
        bits[layer] = pack(stay)
    return Mask(mask.shapes, bits)

"""One round of pruning: score, normalise, select."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tombola.errors import ImportanceError, UserError, describe_exception, did_you_mean
from tombola.importance import Importance, Normalisation, Survivors, as_importance
from tombola.pruning.mask import Mask, pack, resolve_kept_dense, resolve_layers
from tombola.pruning.selection import select_lowest
from tombola.streams import generator


def prune(
    weights: Mapping[str, Tensor],
    mask: Mask,
    importance: Importance | Normalisation,
    fraction: float,
    *,
    exclude: Collection[str] = (),
    keep_dense: Collection[str] = (),
    seed: int = 0,
) -> Mask:
    """Return `mask` without the connections of the lowest importance: steps 3b and 3c of the paper's Algorithm 2.

    Algorithm 2 is that of Vandersmissen and Oramas (arXiv 2302.11244). The importance rates each layer's surviving
    connections, in float64. Exactly round(fraction x alive) connections are removed: those with the lowest importance
    over all layers. Ties are broken by layer, then by flat index: the lower one is removed. The number of connections
    alive includes those of the layers that are kept dense; the removed ones all come from the other layers.

    Args:
        weights: parameter name -> weights; it must have every layer of the mask, and may have more.
        mask: the connections that are alive.
        importance: a score with its normalisation, or a function of a layer's absolute surviving weights, see
            `tombola.importance`.
        fraction: the fraction of the alive connections to remove, in (0, 1).
        exclude: the layers that this round neither prunes nor counts, by layer or parameter name.
        keep_dense: the layers that are counted but not pruned, by layer or parameter name.
        seed: the seed of the random numbers that the importance may draw; every layer has its own stream.

    Raises:
        ImportanceError: if the importance raises, or if it does not return one number per connection, without NaN.
        UserError: if the weights of a layer are missing, have another shape, or are NaN or infinite; if `fraction` is
            out of range; if a layer to exclude or to keep dense is not in the mask; or if fewer connections may be
            pruned than the round has to remove.

    >>> mask = Mask.from_tensors({"w": torch.ones(5, dtype=torch.bool)})
    >>> prune({"w": torch.tensor([0.5, -0.1, 0.3, -0.9, 0.2])}, mask, lambda w: w, 0.4)["w"]
    tensor([ True, False,  True,  True, False])
    """
    check_fraction(fraction)
    importance = as_importance(importance)
    left_out = resolve_layers(mask, exclude, "exclude")
    kept_dense = resolve_kept_dense(mask, keep_dense) - left_out
    counted = {layer: count for layer, count in mask.counts.items() if layer not in left_out}
    counts = {layer: count for layer, count in counted.items() if layer not in kept_dense}
    count = count_to_remove(sum(counted.values()), fraction)
    if count > sum(counts.values()):
        raise UserError(
            f"keep_dense: a fraction of {fraction} of the {sum(counted.values())} connections alive is {count}, and "
            f"only {sum(counts.values())} are in layers that may be pruned"
        )
    # All layers share one buffer for their survivors: touching new memory takes longer than the computation.
    memory = torch.empty(max(counts.values(), default=0), dtype=torch.float64)

    def compute_importance(layer: str) -> Tensor:
        magnitudes = _read_magnitudes(weights, mask, layer, memory[: counts[layer]])
        with _attribute_failure(importance, layer):
            scores = importance.score(Survivors(magnitudes, generator(seed, "importance", layer)))
            return _check(importance.normalise(scores), counts[layer])

    with _one_thread(), torch.no_grad():
        removed = select_lowest(compute_importance, counts, count)
        return _remove(mask, removed)


def count_to_remove(alive: int, fraction: float) -> int:
    """Return how many connections a round removes: round(fraction x alive), halves to even.

    >>> count_to_remove(10, 0.2), count_to_remove(5, 0.5)
    (2, 2)
    """
    return round(fraction * alive)


def check_fraction(fraction: float) -> None:
    """Raise `UserError` if a fraction is not in (0, 1)."""
    if not 0 < fraction < 1:
        raise UserError(f"fraction must lie between 0 and 1, both excluded, got {fraction}")


def _read_magnitudes(weights: Mapping[str, Tensor], mask: Mask, layer: str, out: Tensor) -> Tensor:
    """Write the absolute values of a layer's surviving weights, in flat order, to `out`, and return it."""
    if layer not in weights:
        raise UserError(f"no weights for layer {layer!r} of the mask; {did_you_mean(layer, weights)}")
    weight = weights[layer].detach().cpu()
    if tuple(weight.shape) != mask.shapes[layer]:
        raise UserError(f"layer {layer!r}: the weights have shape {tuple(weight.shape)}, the mask {mask.shapes[layer]}")
    alive = mask[layer]
    out.copy_(weight.flatten() if alive.all() else weight[alive]).abs_()
    if len(out) and not out.max().isfinite():  # the maximum is NaN if one of the numbers is
        raise UserError(
            f"layer {layer!r}: its weights are not all finite (NaN or infinite), so they cannot be compared"
        )
    return out


@contextmanager
def _attribute_failure(importance: Importance, layer: str) -> Iterator[None]:
    """Turn an exception of an importance into an `ImportanceError` that names the importance and the layer."""
    label = f"importance {importance.name!r}, layer {layer!r}"
    try:
        yield
    except ImportanceError as error:
        raise ImportanceError(f"{label}: {error}") from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a user's code may raise anything
        raise ImportanceError(f"{label}: it raised {describe_exception(error)}") from error


def _check(values: Tensor, length: int) -> Tensor:
    """Return the values of an importance as float64 on the CPU; raise `ImportanceError` if they cannot be compared."""
    if not isinstance(values, Tensor) or tuple(values.shape) != (length,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ImportanceError(f"expected a tensor of shape ({length},), one number per survivor, got {got}")
    values = values.detach().to("cpu", torch.float64).contiguous()
    if length and values.min().isnan():  # the minimum is NaN if one of the numbers is
        raise ImportanceError("it returned NaN")
    return values


def _remove(mask: Mask, removed: dict[str, Tensor]) -> Mask:
    """Return `mask` without the connections that are True in `removed`, which lists the alive ones in flat order.

    The dict `removed` is emptied, to save memory.
    """
    bits = mask.bits
    for layer in list(removed):
        stay, alive = ~removed.pop(layer), mask[layer]
        bits[layer] = pack(stay if alive.all() else alive.masked_scatter(alive, stay))
    return Mask(mask.shapes, bits)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread, since the number of threads affects the order of a sum and so its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

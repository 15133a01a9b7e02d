"""Masks: which connections are alive, one bit each; and the pruning of one round."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tombola.errors import UserError, did_you_mean
from tombola.importance import Importance, Seeded
from tombola.references import told
from tombola.streams import generator

Bits = npt.NDArray[np.uint8]


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that may be pruned: those of every linear and convolution layer, by parameter name.

    A weight that several layers share is named once.

    >>> list(prunable(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    ['0.weight', '2.weight']
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}


class Mask(Mapping[str, Tensor]):
    """Which connections of each layer are alive: an immutable mapping from parameter names to bool tensors.

    Held as one bit a connection. `mask[name]` gives a layer as a bool tensor of its weight's shape, True where alive.
    Masks of the same layers combine with `&`, `|` and `^` and compare with `==`.

    >>> a = Mask.from_tensors({"w": torch.tensor([[True, False], [True, True]])})
    >>> b = Mask.from_tensors({"w": torch.tensor([[True, True], [False, True]])})
    >>> (a & b)["w"]
    tensor([[ True, False],
            [False,  True]])
    >>> (a | b).density, (a ^ b).counts
    (1.0, {'w': 2})
    """

    __slots__ = ("_bits", "_hash", "shapes")

    shapes: dict[str, tuple[int, ...]]

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, Bits]) -> None:
        """Take the layers' shapes and bits as `numpy.packbits(..., bitorder="little")` gives them (see `bits`).

        Raises:
            UserError: where a layer's bits do not fit its shape.
        """
        self.shapes = dict(shapes)
        self._bits: dict[str, Bits] = {}
        self._hash: str | None = None
        for name, shape in self.shapes.items():
            packed = np.array(bits[name], dtype=np.uint8)
            size = math.prod(shape)
            spare = -size % 8
            if packed.shape != ((size + 7) // 8,) or (spare and packed[-1] >> (8 - spare)):
                raise UserError(f"mask of layer {name!r}: its bits do not fit the shape {shape}")
            packed.flags.writeable = False
            self._bits[name] = packed

    @classmethod
    def ones_like(cls, model: nn.Module, exclude: Collection[str] = ()) -> Mask:
        """Return the mask of the dense network: every prunable weight of `model` alive (see `prunable`).

        Args:
            model: any module.
            exclude: layers that are never pruned, by layer or parameter name (`"fc"` or `"fc.weight"`).

        Raises:
            UserError: where a name in `exclude` is no prunable layer, or nothing prunable is left.
        """
        weights = prunable(model)
        left_out = _excluded(weights, exclude)
        if unknown := [name for name, w in weights.items() if torch.nn.parameter.is_lazy(w)]:
            raise UserError(f"layer {unknown[0]!r} is lazy and has no shape yet: run the model once on an input first")
        shapes = {name: tuple(w.shape) for name, w in weights.items() if name not in left_out}
        if not shapes:
            left = " besides those excluded" if left_out else ""
            raise UserError(f"{type(model).__name__} has no linear or convolution weight to prune{left}")
        return cls.from_tensors({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Mask:
        """Return the mask whose layers are these bool tensors, True where alive.

        Raises:
            UserError: where a tensor is not bool.
        """
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise UserError(f"mask of layer {name!r}: expected a bool tensor, got {tensor.dtype}")
        return cls(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            {name: _pack(tensor) for name, tensor in tensors.items()},
        )

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        bits = np.unpackbits(self._bits[name], count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def bits(self) -> dict[str, Bits]:
        """Each layer's connections in flat order, eight a byte, the first in the lowest bit; spare bits are 0."""
        return dict(self._bits)

    @property
    def sizes(self) -> dict[str, int]:
        """Each layer's number of connections."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Each layer's number of connections that are alive."""
        return {name: int(np.bitwise_count(bits).sum(dtype=np.int64)) for name, bits in self._bits.items()}

    @property
    def total(self) -> int:
        """The number of connections."""
        return sum(self.sizes.values())

    @property
    def alive(self) -> int:
        """The number of connections that are alive."""
        return sum(self.counts.values())

    @property
    def density(self) -> float:
        """Alive / total, in 0..1."""
        return self.alive / self.total

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The layers with no connection alive."""
        return tuple(name for name, count in self.counts.items() if count == 0)

    @property
    def hash(self) -> str:
        """SHA-256 over the layers' names, shapes and bits, as 64 hexadecimal digits."""
        if self._hash is None:
            digest = hashlib.sha256(json.dumps(list(self.shapes.items())).encode())
            for bits in self._bits.values():
                digest.update(bits.tobytes())
            self._hash = digest.hexdigest()
        return self._hash

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_or)

    def __xor__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_xor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.hash == other.hash

    def __hash__(self) -> int:
        return int(self.hash[:15], 16)

    def __repr__(self) -> str:
        return f"<Mask of {len(self)} layers: {self.alive} of {self.total} connections alive>"

    def _combined(self, other: Mask, operation: Callable[[Bits, Bits], Bits]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.shapes != other.shapes:
            differing = sorted({name for name, _ in set(self.shapes.items()) ^ set(other.shapes.items())})
            raise UserError(f"masks of different networks cannot be combined: they differ in {', '.join(differing)}")
        return Mask(self.shapes, {name: operation(self._bits[name], other._bits[name]) for name in self})


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
    left_out = _excluded(mask, exclude)
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
            bits[name] = _pack(~removed if alive.all() else alive.masked_scatter(alive, ~removed))
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
        raise UserError(f"{label}: it raised {told(error)}") from error
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (length,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"{label}: expected a tensor of shape ({length},), one number a survivor, got {got}")
    scores = scores.detach().to("cpu", torch.float64).contiguous()
    if length and scores.min().isnan():  # the least of numbers is NaN where one of them is
        raise UserError(f"{label}: it returned NaN")
    return scores


def _pack(alive: Tensor) -> Bits:
    return np.packbits(alive.detach().cpu().flatten().numpy(), bitorder="little")


def _excluded(names: Collection[str], exclude: Collection[str]) -> set[str]:
    """Return the parameter names that `exclude` means, each given as such or as its layer's name."""
    by_layer = {name.removesuffix(".weight"): name for name in names}
    chosen = set()
    for name in exclude:
        if name not in names and name not in by_layer:
            raise UserError(f"exclude: {name!r} is no prunable layer; {did_you_mean(name, list(by_layer))}")
        chosen.add(name if name in names else by_layer[name])
    return chosen


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: a sum's order, and so its last bit, would depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

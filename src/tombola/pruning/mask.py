"""Masks: one bit for each connection, which is set if the connection is alive."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tombola.errors import UserError, as_texts, expect
from tombola.pruning.eligible import describe_computed, list_frozen, list_shared, prunable, resolve_layers

Bits = npt.NDArray[np.uint8]

NOTHING_TO_PRUNE = "no linear, convolution, recurrent or attention weight to prune"


class Mask(Mapping[str, Tensor]):
    """The connections that are alive in each layer: an immutable mapping from parameter names to bool tensors.

    A mask takes one bit per connection. `mask[name]` is a bool tensor of the weight's shape, True if alive. Masks of
    the same layers can be combined with `&`, `|` and `^` and compared with `==`.

    >>> a = Mask.from_tensors({"w": torch.tensor([[True, False], [True, True]])})
    >>> b = Mask.from_tensors({"w": torch.tensor([[True, True], [False, True]])})
    >>> (a & b)["w"]
    tensor([[ True, False],
            [False,  True]])
    >>> (a | b).density, (a ^ b).counts
    (1.0, {'w': 2})
    """

    __slots__ = ("_bits", "_counts", "_hash", "_load", "shapes")

    shapes: dict[str, tuple[int, ...]]

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, Bits]) -> None:
        """Make a mask from the layers' shapes and their bits, as `numpy.packbits(..., bitorder="little")` packs them.

        Raises:
            UserError: if a layer's bits do not fit its shape.
        """
        self.shapes = dict(shapes)
        self._bits: dict[str, Bits] = {}
        self._hash: str | None = None
        self._counts: dict[str, int] | None = None
        self._load: Callable[[], Mask] | None = None
        for name, shape in self.shapes.items():
            packed = np.array(bits[name], dtype=np.uint8)
            size = math.prod(shape)
            spare = -size % 8
            if packed.shape != ((size + 7) // 8,) or (spare and packed[-1] >> (8 - spare)):
                raise UserError(f"mask of layer {name!r}: its bits do not fit the shape {shape}")
            packed.flags.writeable = False
            self._bits[name] = packed

    @classmethod
    def ones_like(cls, model: nn.Module, exclude: Collection[str] = (), prune: Sequence[str] = ()) -> Mask:
        """Return the mask of the dense network: every prunable weight of `model` is alive (see `prunable`).

        Args:
            model: a module.
            exclude: layers that are left out: they are neither pruned nor counted, see `resolve_layers`.
            prune: patterns of the parameters that are prunable, see `prunable`.

        Raises:
            UserError: if a name in `exclude` is not a prunable layer, if a pattern matches nothing, or if no prunable
                layer is left.
        """
        weights = prunable(model, prune)
        left_out = resolve_layers(weights, exclude, "exclude", shared=list_shared(model))
        if unknown := [name for name, w in weights.items() if torch.nn.parameter.is_lazy(w)]:
            raise UserError(f"layer {unknown[0]!r} is lazy and has no shape yet: run the model once on an input first")
        shapes = {name: tuple(w.shape) for name, w in weights.items() if name not in left_out}
        if not shapes:
            left = " besides those excluded" if left_out else ""
            named = [name for name, each in model.named_parameters() if each.ndim > 1 and name not in weights]
            which = "a frozen one" if named and named[0] in list_frozen(model) else "another parameter"
            others = f'; prune = ["{named[0]}"] would prune {which}' if named else ""
            computed = describe_computed(model)
            raise UserError(f"{type(model).__name__} has {NOTHING_TO_PRUNE}{left}{computed or others}")
        return cls.from_tensors({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Mask:
        """Return the mask whose layers are these bool tensors, True if alive.

        Raises:
            UserError: if a tensor is not bool.
        """
        expect(tensors, Mapping, "Mask.from_tensors", "bool tensors by the names of layers")
        for name, tensor in tensors.items():
            expect(tensor, Tensor, f"mask of layer {name!r}", "a bool tensor")
            if tensor.dtype != torch.bool:
                raise UserError(f"mask of layer {name!r}: expected a bool tensor, got {tensor.dtype}")
        return cls(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            {name: pack(tensor) for name, tensor in tensors.items()},
        )

    def unload(self, load: Callable[[], Mask]) -> Mask:
        """Return an equal mask that keeps only its hash and counts in memory.

        Args:
            load: a function that returns a mask with the same bits. It is called each time that the bits are used.

        >>> mask = Mask.from_tensors({"w": torch.tensor([True, False])})
        >>> on_disk = mask.unload(lambda: mask)
        >>> on_disk == mask, on_disk["w"]
        (True, tensor([ True, False]))
        """
        other = Mask({}, {})
        other.shapes, other._hash, other._counts, other._load = self.shapes, self.hash, self.counts, load
        return other

    def load(self) -> Mask:
        """Return a mask with its bits in memory: this mask itself, unless `unload` made it."""
        return self if self._load is None else self._load().load()

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        bits = np.unpackbits(self.load()._bits[name], count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def bits(self) -> dict[str, Bits]:
        """The bits of each layer in flat order, eight per byte, the first in the lowest bit; unused bits are 0."""
        return dict(self.load()._bits)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of connections of each layer."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def counts(self) -> dict[str, int]:
        """The number of alive connections of each layer."""
        if self._counts is None:
            self._counts = {n: int(np.bitwise_count(bits).sum(dtype=np.int64)) for n, bits in self._bits.items()}
        return dict(self._counts)

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
        """The density, alive / total, in 0..1.

        Raises:
            UserError: if the mask has no connection.
        """
        if not self.total:
            raise UserError("a mask without connections has no density; expected one layer or more")
        return self.alive / self.total

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The layers in which no connection is alive."""
        return tuple(name for name, count in self.counts.items() if count == 0)

    @property
    def hash(self) -> str:
        """The SHA-256 over the layers' names, shapes and bits, as 64 hexadecimal digits."""
        if self._hash is None:
            digest = hashlib.sha256(json.dumps(list(self.shapes.items())).encode())
            for bits in self._bits.values():
                digest.update(bits.tobytes())
            self._hash = digest.hexdigest()
        return self._hash

    def __and__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_or)

    def __xor__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_xor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.hash == other.hash

    def __hash__(self) -> int:
        return int(self.hash[:15], 16)

    def __repr__(self) -> str:
        return f"<Mask of {len(self)} layers: {self.alive} of {self.total} connections alive>"

    def _combine(self, other: Mask, operation: Callable[[Bits, Bits], Bits]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.shapes != other.shapes:
            differing = sorted({name for name, _ in set(self.shapes.items()) ^ set(other.shapes.items())})
            raise UserError(f"masks of different networks cannot be combined: they differ in {', '.join(differing)}")
        ours, theirs = self.bits, other.bits
        return Mask(self.shapes, {name: operation(ours[name], theirs[name]) for name in self})


def pack(alive: Tensor) -> Bits:
    """Pack a bool tensor in flat order, eight values per byte, the first in the lowest bit; unused bits are 0.

    >>> pack(torch.tensor([[True, False, True], [True, False, False]])).tolist()
    [13]
    """
    return np.packbits(alive.detach().cpu().flatten().numpy(), bitorder="little")


def positions(alive: Tensor) -> Tensor:
    """Return the positions of the connections that are alive, in flat order.

    >>> positions(torch.tensor([[True, False, True], [True, False, False]]))
    tensor([0, 2, 3])
    """
    return torch.from_numpy(np.flatnonzero(alive.numpy()))  # takes a tenth of the time of `alive.flatten().nonzero()`


def resolve_kept_dense(
    mask: Mask,
    layers: Collection[str],
    left_out: Collection[str] = (),
    shared: Mapping[str, Collection[str]] | None = None,
) -> frozenset[str]:
    """Return the layers of a dense network's mask that are kept dense: counted, and never pruned.

    Args:
        mask: the mask of the dense network.
        layers: names of layers, see `resolve_layers`.
        left_out: prunable layers that are not in the mask; they may be among `layers`, and stay left out.

    Raises:
        UserError: if one of `layers` matches no layer of the mask, or if no layer would be left to prune.

    >>> mask = Mask.from_tensors({"fc1.weight": torch.ones(4).bool(), "fc.weight": torch.ones(2).bool()})
    >>> sorted(resolve_kept_dense(mask, ["fc"]))
    ['fc.weight']
    """
    layers = as_texts(layers, "keep_dense", "names of layers")
    kept = resolve_layers([*mask, *left_out], layers, "keep_dense", shared=shared) - set(left_out)
    if kept == set(mask):
        match = "matches" if len(layers) == 1 else "match"
        named = ", ".join(map(repr, layers))
        raise UserError(f"keep_dense: {named} {match} all {len(mask)} layers; leave one to prune")
    return kept

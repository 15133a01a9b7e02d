"""Packed networks: activations that stay in the kernels' layout from one sparse convolution to the next.

A convolution reads blocks of samples with zeros around each image. `Packing` records what a forward pass does with the
outputs of sparse convolutions, as long as it is batch normalisation, ReLU, addition, max pooling, the mean over all
pixels or another sparse convolution. The recorded operations are computed when their result is read by anything else,
all of them in one function of autograd: activations are then packed once and unpacked once, and normalisation,
addition and ReLU are one pass over memory. The forward pass itself runs in Python at each step, so it may decide by
data or by its own state.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tombola.kernels import layers, recording
from tombola.kernels.layers import STATISTICS, can_compute, empty, is_plain, is_readable

if TYPE_CHECKING:
    from tombola.kernels._sparse import PackedImages

Size = tuple[int, int, int, int]
"""(batch, channels, height, width)."""


@dataclass(eq=False)
class Value:
    """The images that an operation results in, and where they are.

    Whoever records a layer keeps its settings, because the layer may have others when it is computed.

    Args:
        size: batch, channels, height and width.
        how: what computes them: "source", "convolution", "norm", "relu", "sum", "pool" or "average".
        of: the values that they are computed from.
        kernel: the kernel of a convolution, the window of max pooling, or the settings of batch normalisation.
        tensors: the positions of the layer's parameters among the tensors of the segment; -1 for no bias.
    """

    size: Size
    how: str
    of: tuple[Value, ...] = ()
    kernel: Any = None
    tensors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Norm:
    """Settings of batch normalisation, and the running statistics, which it updates."""

    epsilon: float
    momentum: float
    mean: Tensor
    variance: Tensor
    batches: Tensor | None


@dataclass(eq=False)
class Operation:
    """Values that are computed at once: the last one of them, from `x`, and from `other` which is added.

    Normalisation, an addition and a ReLU make one operation if nothing else reads what is between them.
    """

    result: Value
    x: Value
    other: Value | None
    first: Value
    relu: bool


class Memory:
    """Memory for packed images, which is used again. The zeros around the images are written once.

    What is given back may be taken by another thread at once, so its last use must be over.

    Args:
        instruction_set: one of `instruction_sets()`; by default the best of this machine.
    """

    def __init__(self, instruction_set: str | None = None) -> None:
        self.instruction_set = instruction_set
        self.block: int = layers.extension.block(instruction_set)
        self._free: defaultdict[tuple[Size, int], list[PackedImages]] = defaultdict(list)
        self._taken: set[tuple[Size, int]] = set()
        self._kind: object = None

    def prepare(self, kind: object) -> None:
        """Forget the memory that is left from inputs of another kind, and that of sizes which were not taken since."""
        for key in set(self._free) if kind != self._kind else self._free.keys() - self._taken:
            del self._free[key]
        self._taken.clear()
        self._kind = kind

    def take(self, size: Size, border: int) -> PackedImages:
        """Return memory for images of a size; the border is zero, and the images may hold old values."""
        self._taken.add(key := (size, border))
        free = self._free[key]
        if free:
            return free.pop()
        images: PackedImages = layers.extension.PackedImages(size, border, self.instruction_set)
        return images

    def __reduce__(self) -> tuple[type[Memory], tuple[str | None]]:
        return Memory, (self.instruction_set,)  # a copy has memory of its own

    def give(self, images: PackedImages) -> None:
        """Take memory back."""
        self._free[images.size, images.border].append(images)


class Segment:
    """Recorded operations: values in order, and the tensors that they are computed from.

    Args:
        memory: where memory comes from, and goes to when the segment is no longer needed.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.values: list[Value] = []
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        self.needs: list[bool] = []
        self.results: list[weakref.ref[Packed]] = []
        self._positions: dict[tuple[int, bool], int] = {}
        self._sources: dict[tuple[int, bool], Value] = {}
        self._operations: list[Operation] = []
        self._buffers: dict[Value, PackedImages] = {}
        self._statistics: dict[Value, Tensor] = {}
        self._borders: dict[Value, int] = {}
        self._delta_borders: dict[Value, int] = {}
        self._before: dict[Value, Any] = {}
        self._behind: dict[Value, Any] = {}

    def __del__(self) -> None:
        for images in reversed(self._buffers.values()):
            self.memory.give(images)

    def tensor(self, tensor: Tensor | None) -> int:
        """Return the position of a tensor among those of the segment; -1 for None."""
        if tensor is None:
            return -1
        key = id(tensor), tensor.requires_grad
        if key not in self._positions:
            self._positions[key] = len(self.tensors)
            self.tensors.append(tensor)
            self.versions.append(tensor._version)
            self.needs.append(tensor.requires_grad)
        return self._positions[key]

    def knows(self, x: Tensor) -> bool:
        """Return whether a tensor is a source."""
        return (id(x), x.requires_grad) in self._sources

    def source(self, x: Tensor) -> Value:
        """Return the value of a tensor that is no result of this segment."""
        key = id(x), x.requires_grad
        if key not in self._sources:
            batch, channels, height, width = x.shape
            value = Value((batch, channels, height, width), "source", tensors=(self.tensor(x),))
            self._sources[key] = value
            self.values.append(value)
        return self._sources[key]

    def check(self, positions: Iterable[int]) -> None:
        """Raise `RuntimeError` if one of these tensors was changed in place since it was recorded."""
        if any(at >= 0 and self.tensors[at]._version != self.versions[at] for at in positions):
            raise RuntimeError("a tensor was changed in place after a sparse convolution, and before it was computed")

    def compute(self) -> None:
        """Compute all values, and give those that are still of use to the tensors that stand for them."""
        results = [result for reference in self.results if (result := reference()) is not None]
        outputs = list(dict.fromkeys(result._value for result in results))
        self._plan(outputs)
        with torch.inference_mode(mode=False), torch.enable_grad(), self._as_recorded() as tensors:
            found = dict(zip(outputs, _compute(self, outputs, *tensors), strict=True))
        for result in results:
            result._plain = found[result._value]
        norms = [value.kernel for value in self.values if value.how == "norm"]
        increment_version([statistics for norm in norms for statistics in (norm.mean, norm.variance)])
        if counters := [norm.batches for norm in norms if norm.batches is not None]:
            torch._foreach_add_(counters, 1)
        self._positions, self._sources = {}, {}

    @contextmanager
    def _as_recorded(self) -> Iterator[list[Tensor]]:
        """Give the tensors, those with a gradient that had one when they were recorded."""
        frozen = [x for x, needs in zip(self.tensors, self.needs, strict=True) if needs and not x.requires_grad]
        for tensor in frozen:
            tensor.requires_grad_()
        try:
            yield [x if needs else x.detach() for x, needs in zip(self.tensors, self.needs, strict=True)]
        finally:
            for tensor in frozen:
                tensor.requires_grad_(False)

    def _plan(self, outputs: Sequence[Value]) -> None:
        """Group the values into operations, and decide how many zeros are around each.

        Where normalisation is the only reader of a convolution without a bias, or a convolution that of normalisation,
        channels without connections stay out of memory: before the first they are zero, behind the second not read.
        """
        uses: defaultdict[Value, list[Value]] = defaultdict(list)
        for value in self.values:
            for source in value.of:
                uses[source].append(value)
        free = set(outputs)
        inner: dict[Value, Operation] = {}  # by the last value so far
        for value in self.values:
            joined = None
            for number, source in enumerate(value.of):
                before = inner[source]
                if before.result is not source or uses[source] != [value] or source in free or before.relu:
                    continue
                if value.how == "relu" and before.first.how in ("norm", "sum"):
                    joined, before.relu = before, True
                elif value.how == "sum" and before.first.how == "norm" and before.other is None:
                    joined, before.other = before, value.of[1 - number]
                if joined is not None:
                    joined.result = value
                    break
            if joined is None:
                other = value.of[1] if value.how == "sum" else None
                joined = Operation(value, value.of[0] if value.of else value, other, value, value.how == "relu")
            inner[value] = joined
        order = {value: number for number, value in enumerate(self.values)}
        self._operations = sorted(set(inner.values()), key=lambda operation: order[operation.result])
        for operation in self._operations:
            kernel: Any = operation.first.kernel
            convolution = operation.first.how == "convolution"
            if convolution:
                self._borders[operation.x] = max(self._borders.get(operation.x, 0), kernel.border)
            read = [self._delta_borders[each] for each in (operation.x, operation.other) if each in self._delta_borders]
            passed = max(read, default=0) if operation.first.how in ("norm", "sum", "relu") else 0
            self._delta_borders[operation.result] = kernel.delta_border if convolution else passed
            if operation.first.how == "norm":
                x, result = operation.x, operation.result
                if x.how == "convolution" and x.tensors[1] < 0 and uses[x] == [operation.first] and x not in free:
                    self._before[x] = x.kernel
                how = [each.how for each in uses[result]]
                if how == ["convolution"] and operation.other is None and result not in free:
                    self._behind[result] = uses[result][0].kernel

    def forward(self, outputs: Sequence[Value]) -> list[Tensor]:
        """Compute all operations, and return these values as plain tensors."""
        tensors, buffers, native = self.tensors, self._buffers, layers.extension
        calls = native.Calls()
        for operation in self._operations:
            first, result = operation.first, operation.result
            y = buffers[result] = self.memory.take(result.size, self._borders.get(result, 0))
            if first.how == "source":
                calls.put(native.pack_images, tensors[first.tensors[0]], y)
                continue
            x, other = buffers[operation.x], buffers[operation.other] if operation.other else None
            parameters = [None if at < 0 else tensors[at] for at in first.tensors]
            if first.how == "convolution":
                calls.put(first.kernel.forward_images, *parameters, x, y, result not in self._before)
            elif first.how == "norm":
                statistics = self._statistics[first] = tensors[0].new_empty((3, result.size[1]))
                before, behind = self._before.get(operation.x), self._behind.get(result)
                epsilon, relu = first.kernel.epsilon, operation.relu
                calls.put(native.normalise_packed, x, *parameters, epsilon, statistics, other, relu, y, before, behind)
            elif first.how == "pool":
                calls.put(native.max_pool_packed, first.kernel, x, y)
            elif first.how == "average":
                calls.put(native.average_packed, x, y)
            else:
                calls.put(native.sum_packed, x, other, operation.relu, y)
        for value in self.values:
            if value.how == "norm":  # in order, since layers may share running statistics
                norm, statistics = value.kernel, self._statistics[value]
                x = buffers[value.of[0]]
                calls.put(native.update_statistics, x, statistics, norm.momentum, norm.mean, norm.variance)
        calls.run()
        return [empty(value.size) for value in outputs]  # written when they are read: variables may outlive their use

    def unpack(self, value: Value, to: Tensor) -> None:
        """Write a value that is computed into a plain tensor."""
        layers.extension.unpack_images(self._buffers[value], to)

    def backward(
        self, outputs: Sequence[Value], deltas: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of the tensors that need one, given those of the outputs."""
        return _Backward(self, needs).run(outputs, deltas)

    @property
    def operations(self) -> list[Operation]:
        """The operations in order."""
        return self._operations


class _Backward:
    """The backward pass of a segment. Memory that is no longer needed stays with it until its calls have run."""

    def __init__(self, segment: Segment, needs: Sequence[bool]) -> None:
        self.segment, self.memory, self.buffers = segment, segment.memory, segment._buffers
        self.tensors, self.needs = segment.tensors, needs
        self.gradients: list[Tensor | None] = [None] * len(needs)
        self.deltas: dict[Value, PackedImages] = {}
        self.free: defaultdict[tuple[Size, int], list[PackedImages]] = defaultdict(list)
        self.needed: set[Value] = set()
        for value in segment.values:
            if any(needs[at] for at in value.tensors if at >= 0) or any(each in self.needed for each in value.of):
                self.needed.add(value)
        self.native = layers.extension
        self.calls = self.native.Calls()

    def run(self, outputs: Sequence[Value], deltas: Sequence[Tensor | None]) -> list[Tensor | None]:
        for value, delta in zip(outputs, deltas, strict=True):
            if delta is not None and value in self.needed:
                self.deltas[value] = self.take(value)
                self.calls.put(self.native.pack_images, delta.resolve_neg(), self.deltas[value])
        for operation in reversed(self.segment.operations):
            if (found := self.deltas.pop(operation.result, None)) is not None:
                getattr(self, f"_{operation.first.how}")(operation, found)
        self.calls.run()
        for left in self.free.values():
            for images in left:
                self.memory.give(images)
        return self.gradients

    def take(self, value: Value) -> PackedImages:
        """Return memory for the gradient of a value."""
        border = self.segment._delta_borders.get(value, 0)
        free = self.free[value.size, border]
        return free.pop() if free else self.memory.take(value.size, border)

    def give(self, delta: PackedImages) -> None:
        """Take memory back, for gradients that are computed after all that were recorded so far."""
        self.free[delta.size, delta.border].append(delta)

    def add(self, value: Value, delta: PackedImages, *, last: bool) -> None:
        """Add to the gradient of a value; the memory is kept if this is its last use."""
        if value not in self.needed:
            pass
        elif value in self.deltas:
            every = self.deltas[value]
            self.calls.put(self.native.sum_packed, every, delta, False, every)
        elif last and delta.border >= self.segment._delta_borders.get(value, 0):
            self.deltas[value] = delta
            return
        else:
            new = self.deltas[value] = self.take(value)
            self.calls.put(self.native.sum_packed, delta, None, False, new)
        if last:
            self.give(delta)

    def accumulate(self, at: int, gradient: Tensor) -> None:
        """Add to the gradient of a tensor."""
        if at < 0 or not self.needs[at]:
            return
        before = self.gradients[at]
        if before is not None:
            self.calls.run()  # the sum needs both gradients
            gradient = before + gradient
        self.gradients[at] = gradient

    def _source(self, operation: Operation, delta: PackedImages) -> None:
        value = operation.result
        gradient = empty(value.size)
        self.calls.put(self.native.unpack_images, delta, gradient)
        self.accumulate(value.tensors[0], gradient)
        self.give(delta)

    def _convolution(self, operation: Operation, delta: PackedImages) -> None:
        kernel, x, positions = operation.first.kernel, operation.x, operation.first.tensors
        weights, bias = (self.tensors[at] if at >= 0 else None for at in positions)
        of_weights, of_images = any(self.needs[at] for at in positions if at >= 0), x in self.needed
        learned = (weights, bias) if of_weights else (None, None)
        gradients = [None if tensor is None else torch.empty_like(tensor) for tensor in learned]
        if of_images:
            add, every = x in self.deltas, x not in self.segment._behind
            if not add:
                self.deltas[x] = self.take(x)
            dx = self.deltas[x]
        if of_weights and of_images:
            self.calls.put(kernel.gradients_images, weights, self.buffers[x], delta, *gradients, dx, add, every)
        elif of_weights:
            self.calls.put(kernel.weight_gradient_images, self.buffers[x], delta, *gradients)
        elif of_images:
            self.calls.put(kernel.input_gradient_images, weights, delta, dx, add, every)
        for at, gradient in zip(positions, gradients, strict=True):
            if gradient is not None:
                self.accumulate(at, gradient)
        self.give(delta)

    def _norm(self, operation: Operation, delta: PackedImages) -> None:
        norm, result, x, other = operation.first, operation.result, operation.x, operation.other
        weight, bias = (self.tensors[at] for at in norm.tensors)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        own = other is None and delta.border >= self.segment._delta_borders.get(x, 0)
        dx = delta if own else self.take(x)
        self.calls.put(
            self.native.normalise_gradient_packed,
            self.buffers[x],
            delta,
            weight,
            bias,
            self.segment._statistics[norm],
            operation.relu,
            self.buffers[result] if operation.relu and other else None,
            dx,
            dweight,
            dbias,
            self.segment._before.get(x),
            self.segment._behind.get(result),
        )
        self.accumulate(norm.tensors[0], dweight)
        self.accumulate(norm.tensors[1], dbias)
        self.add(x, dx, last=True)
        if other is not None:
            self.add(other, delta, last=True)
        elif not own:
            self.give(delta)

    def _sum(self, operation: Operation, delta: PackedImages) -> None:
        if operation.relu:
            self._gate(operation, delta)
        assert operation.other is not None
        self.add(operation.other, delta, last=False)
        self.add(operation.x, delta, last=True)

    def _relu(self, operation: Operation, delta: PackedImages) -> None:
        self._gate(operation, delta)
        self.add(operation.x, delta, last=True)

    def _pool(self, operation: Operation, delta: PackedImages) -> None:
        value, x = operation.result, operation.x
        y, dx = self.buffers[value], self.take(x)
        self.calls.put(self.native.max_pool_gradient_packed, value.kernel, self.buffers[x], y, delta, dx)
        self.give(delta)
        self.add(x, dx, last=True)

    def _average(self, operation: Operation, delta: PackedImages) -> None:
        x = operation.x
        dx = self.take(x)
        self.calls.put(self.native.average_gradient_packed, delta, dx)
        self.give(delta)
        self.add(x, dx, last=True)

    def _gate(self, operation: Operation, delta: PackedImages) -> None:
        self.calls.put(self.native.gate_packed, delta, self.buffers[operation.result])


class _Compute(torch.autograd.Function):
    """The outputs of a segment as a function of its tensors."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, outputs: list[Value], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.segment, ctx.outputs = segment, outputs
        segment.check(range(len(tensors)))
        ctx.set_materialize_grads(False)
        return tuple(segment.forward(outputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.segment.check({at for value in ctx.segment.values if value.how != "source" for at in value.tensors})
        gradients = ctx.segment.backward(ctx.outputs, deltas, ctx.needs_input_grad[2:])
        return (None, None, *gradients)


_compute: Callable[..., tuple[Tensor, ...]] = _Compute.apply


_CPU = torch.device("cpu")


class Packed(Tensor):
    """A tensor that is recorded and not computed yet. It is computed when anything but a recorded operation reads it.

    Its type and shape are those of the tensor that it stands for.
    """

    _packing: Packing
    _segment: Segment | None
    _value: Value
    _plain: Tensor | None

    @staticmethod
    def of(packing: Packing, segment: Segment, value: Value) -> Packed:
        """Return the tensor of a value."""
        tensor: Packed = Tensor._make_wrapper_subclass(Packed, value.size, dtype=torch.float32, device=_CPU)
        tensor._packing, tensor._segment, tensor._value, tensor._plain = packing, segment, value, None
        segment.results.append(weakref.ref(tensor))
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (recorded := _RECORDED.get(func)) is not None and (result := recorded(*args, **kwargs)) is not None:
            return result
        if _apply is None and func is Tensor.view_as and not torch.is_grad_enabled():
            raise RuntimeError(_READ_BY_FUNCTION)  # by the function that has returned it: no code of it is in a frame
        args, kwargs = tree_map(compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(_compute_below_autograd, (args, kwargs or {}))
        return func(*args, **kwargs)


def compute(x: Any) -> Any:
    """Return the plain tensor of a recorded one, which is computed if it is not yet; anything else as it is."""
    if type(x) is not Packed:
        return x
    if x._plain is None or x._segment is not None:
        with x._packing.lock:  # threads of the network's own may read it at once
            if x._plain is None:
                x._packing.compute()
            assert x._plain is not None
            if x._segment is not None:
                x._segment.unpack(x._value, x._plain.detach())
                x._segment = None
    if x._plain.requires_grad and _is_within_function(x._packing):
        raise RuntimeError(_READ_BY_FUNCTION)
    return x._plain


def _compute_below_autograd(x: Any) -> Any:
    """Return what `compute` does for code that PyTorch's overrides do not reach, which would lose the gradient."""
    plain = compute(x)
    if plain is not x and plain.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("compiled code of the network's own reads a tensor that is recorded")
    return plain


_READ_BY_FUNCTION = "a torch.autograd.Function of the network's own reads a tensor that is recorded"


# The code that applies any function of autograd; None from torch 2.14 on, where it is compiled and so in no frame.
_apply: FunctionType | None = getattr(torch.autograd.Function.apply, "__func__", None)
_APPLY = set() if _apply is None else {id(_apply.__code__)}  # the id, since hashing a code object is slow


def _is_within_function(packing: Packing) -> bool:
    """Return whether a `torch.autograd.Function` runs, which takes a recorded tensor for one without a gradient.

    What has called the network of this packing does not count.
    """
    codes = _APPLY if _APPLY else {id(code) for code in _list_forwards(torch.autograd.Function)}
    frame: FrameType | None = sys._getframe(2)
    network = packing.frame
    while frame is not None and frame is not network:
        if id(frame.f_code) in codes:
            return True
        frame = frame.f_back
    return False


def _list_forwards(function: type[torch.autograd.Function]) -> Iterator[CodeType]:
    """Yield the code of the forward pass of each function of autograd, without its decorators."""
    own: type[torch.autograd.Function]
    for own in function.__subclasses__():
        if code := getattr(inspect.unwrap(own.forward), "__code__", None):
            yield code
        yield from _list_forwards(own)


_DESCRIPTIONS: set[Any] = {
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "ndim", "dtype", "device", "is_cpu")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
}


def _recorded_relu(input: Any, inplace: bool = False) -> Tensor | None:
    packing: Packing = input._packing
    return packing.apply("relu", (input,), input if inplace else None)


def _recorded_relu_(input: Any) -> Tensor | None:
    return _recorded_relu(input, inplace=True)


def _recorded_sum(input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Tensor | None:
    first = input if type(input) is Packed else other
    if type(first) is not Packed or alpha != 1 or out is not None:
        return None
    return first._packing.apply("sum", (input, other), None)


def _recorded_sum_(input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    if type(input) is not Packed or alpha != 1:
        return None
    packing: Packing = input._packing
    return packing.apply("sum", (input, other), input)


def _recorded_mean(
    input: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None, **others: Any
) -> Tensor | None:
    """Record the mean over all pixels; their dimensions may be in any order, each from either end."""
    axes = sorted(dim) if _are_whole(dim) else None
    if axes not in ([2, 3], [-1, 2], [-2, 3], [-2, -1]) or dtype not in (None, torch.float32) or out is not None:
        return None
    if input is None or others:  # NumPy's names of arguments, which PyTorch takes too
        return None
    packing: Packing = input._packing
    averages = packing.average(input)
    return averages if averages is None or keepdim else averages.flatten(1)


def _recorded_average(input: Any, output_size: Any) -> Tensor | None:
    sides = (output_size, output_size) if type(output_size) is int else output_size
    packing: Packing = input._packing
    return packing.average(input) if _are_whole(sides) and list(sides) == [1, 1] else None


def _are_whole(numbers: Any) -> bool:
    return isinstance(numbers, (tuple, list)) and all(type(number) is int for number in numbers)


_RECORDED: dict[Any, Callable[..., Tensor | None]] = {
    torch.relu: _recorded_relu,
    Tensor.relu: _recorded_relu,
    functional.relu: _recorded_relu,
    torch.relu_: _recorded_relu_,
    Tensor.relu_: _recorded_relu_,
    torch.add: _recorded_sum,
    Tensor.add: _recorded_sum,
    Tensor.__add__: _recorded_sum,
    Tensor.__radd__: _recorded_sum,
    Tensor.add_: _recorded_sum_,
    Tensor.__iadd__: _recorded_sum_,
    torch.mean: _recorded_mean,
    Tensor.mean: _recorded_mean,
    functional.adaptive_avg_pool2d: _recorded_average,
}


class Packing:
    """Records what follows sparse convolutions, and computes it with packed activations.

    Args:
        memory: where memory comes from.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.lock = RLock()
        self.frame: FrameType | None = None  # the frame of `record` while it runs
        self._segment: Segment | None = None

    def record(self, forward: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a forward pass returns, tensors that are computed; its operations are recorded on the way."""
        before, self.frame = self.frame, sys._getframe()
        try:
            with recording.record(self):
                outputs = forward(*arguments)
            self.compute()
            return tree_map(compute, outputs)
        finally:
            self.frame = before  # the frame refers to this object: they would keep each other

    def compute(self) -> None:
        """Compute what is recorded so far."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.compute()

    def convolve(self, layer: Any, x: Tensor) -> Tensor | None:
        """Record a sparse convolution; return None if the kernels do not support it."""
        if not (self._records(x) and layer.instruction_set == self.memory.instruction_set):
            return None
        parameters = layer.values, layer.bias
        if not _are_readable(*parameters):
            return None
        batch, *size = _size_of(x)
        kernel = layer.kernel(tuple(size))
        if kernel is None or kernel.block != self.memory.block:
            return None
        return self._record((batch, layer.shape[0], *layer.output_size(size)), "convolution", (x,), kernel, parameters)

    def normalise(self, layer: Any, x: Tensor) -> Tensor | None:
        """Record batch normalisation; return None unless it normalises by the batch and knows how to update."""
        mean, variance, batches = (layer._buffers[name] for name in STATISTICS)  # may be out of date by now
        if (
            type(x) is not Packed
            or not self._records(x)
            or not layer.training
            or layer.momentum is None
            or not layer.affine
            or not layer.track_running_stats
            or mean is None
            or variance is None
        ):
            return None
        size, parameters = x._value.size, (layer.weight, layer.bias)
        batch, channels, height, width = size
        if (
            channels != layer.num_features
            or batch * height * width < 2
            or not _are_readable(*parameters, mean, variance)
        ):
            return None
        return self._record(
            size, "norm", (x,), Norm(float(layer.eps), float(layer.momentum), mean, variance, batches), parameters
        )

    def pool(self, layer: Any, x: Tensor) -> Tensor | None:
        """Record max pooling; return None if the kernels do not support it."""
        if type(x) is not Packed or not self._records(x) or layer.return_indices or layer.ceil_mode:
            return None
        if _pair(layer.dilation) != (1, 1):
            return None
        size, padding = _pair(layer.kernel_size), _pair(layer.padding)
        step = size if layer.stride in ((), []) else _pair(layer.stride)
        batch, channels, *image = x._value.size
        reach = [image[axis] + 2 * padding[axis] - size[axis] for axis in (0, 1)]
        if any(each < 0 for each in reach) or any(2 * padding[axis] > size[axis] for axis in (0, 1)):
            return None
        rows, columns = (reach[axis] // step[axis] + 1 for axis in (0, 1))
        return self._record((batch, channels, rows, columns), "pool", (x,), tuple(map(int, (*size, *step, *padding))))

    def average(self, x: Packed) -> Packed | None:
        """Record the mean over the pixels of each channel, images of one pixel; return None if it is not recorded."""
        if not (self._has_value(x) and self._records(x)):
            return None
        batch, channels, *_ = x._value.size
        return self._record((batch, channels, 1, 1), "average", (x,))

    def apply(self, how: str, of: tuple[Any, ...], target: Packed | None) -> Tensor | None:
        """Record a ReLU or an addition, in place if there is a target; return None if it cannot be recorded."""
        fitting = all(self._has_value(x) and self._records(x) and _size_of(x) == _size_of(of[0]) for x in of)
        if not fitting or (target is not None and target._plain is not None):
            return None
        result = self._record(_size_of(of[0]), how, of)
        if target is None:
            return result
        target._value, target._segment = result._value, result._segment
        return target

    def _record(
        self,
        size: Size,
        how: str,
        of: tuple[Tensor, ...],
        kernel: Any = None,
        parameters: tuple[Tensor | None, ...] = (),
    ) -> Packed:
        if self._segment is None:
            self._segment = Segment(self.memory)
        segment = self._segment
        values = tuple(self._value_of(segment, x) for x in of)
        value = Value(size, how, values, kernel, tuple(segment.tensor(each) for each in parameters))
        segment.values.append(value)
        return Packed.of(self, segment, value)

    def _has_value(self, x: Any) -> bool:
        """Return whether x has a value in this segment; others are not read later, when they may have been changed."""
        if type(x) is Packed:
            return x._plain is None or (self._segment is not None and self._segment.knows(x._plain))
        return isinstance(x, Tensor) and self._segment is not None and self._segment.knows(x)

    @staticmethod
    def _value_of(segment: Segment, x: Tensor) -> Value:
        if type(x) is Packed:
            if x._plain is None and x._segment is segment:
                return x._value
            x = compute(x)
        return segment.source(x)

    def _records(self, x: Tensor) -> bool:
        """Return whether an operation on this tensor can be recorded."""
        if recording.current() is not self or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if _is_within_function(self) or _are_saved_tensors_watched():
            return False
        return type(x) is Packed or (x.dim() == 4 and can_compute(x))


def _size_of(x: Tensor) -> Size:
    """Return the size of images; to ask a recorded tensor for its shape takes several times as long."""
    return x._value.size if type(x) is Packed else (x.shape[0], x.shape[1], x.shape[2], x.shape[3])


def _pair(numbers: int | Sequence[int]) -> tuple[int, int]:
    return (numbers, numbers) if isinstance(numbers, int) else (numbers[0], numbers[-1])


def _are_readable(*tensors: Tensor | None) -> bool:
    return all(each is None or (is_readable(each) and each.is_contiguous()) for each in tensors)


def _are_saved_tensors_watched() -> bool:
    """Return whether code wants to know what autograd saves, such as checkpoints that compute it again."""
    return _top_hooks is None or _top_hooks(True) is not None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 has none


class _Tracer(fx.Tracer):
    """Traces a network, and refuses to without gradients, as in a function of autograd."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise RuntimeError("an operation without gradients")
        return super().create_node(*args, **kwargs)


class _OwnTensors(TorchFunctionMode):
    """Refuses operations on the parameters and buffers of a network, whose layers may not have been computed yet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PROPERTIES and any(id(each) in self._own for each in tree_leaves((args, kwargs))):
            raise RuntimeError("an operation on a parameter or a buffer")
        return func(*args, **kwargs or {})


_PROPERTIES = {*_DESCRIPTIONS, Tensor.__hash__, vars(torch._C.TensorBase)["requires_grad"].__get__}


def can_pack(model: nn.Module) -> bool:
    """Return whether outputs of a network's sparse convolutions may be recorded, see `Packing`.

    All networks of PyTorch's own modules without hooks may be. One with modules of the user must be one that `torch.fx`
    can trace, with gradients throughout, and whose graph consists of PyTorch's modules, of parameters and of the
    functions in `_KNOWN`: others could read or change a tensor unnoticed, or ask for gradients in between. Its own code
    may not compute with parameters and buffers beside the graph: it could copy running statistics, for example, before
    they are updated. No output may be recorded with a torch that does not say whether code watches what autograd saves.
    """
    if _top_hooks is None or not all(map(is_plain, model.modules())):
        return False
    if all(type(module).__module__.startswith(("torch.nn.", "tombola.")) for module in model.modules()):
        return True
    try:
        copied = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), _OwnTensors(copied):
            graph = _Tracer().trace(copied)
    except Exception:  # code of the user may fail in any way when it gets a symbol for a tensor
        return False
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = {"placeholder": True, "output": True, "call_module": True}  # PyTorch's modules: others are traced
    return all(
        known.get(node.op, node.target in (parameters if node.op == "get_attr" else _KNOWN)) for node in graph.nodes
    )


_KNOWN: set[Any] = {
    *(torch.relu, torch.add, torch.mul, torch.cat, torch.flatten, torch.mean, torch.sigmoid, torch.tanh),
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv, operator.getitem),
    *(functional.relu, functional.relu_, functional.gelu, functional.silu, functional.hardswish, functional.leaky_relu),
    *(functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, functional.pad, functional.dropout),
    *(functional.softmax, functional.log_softmax, functional.interpolate, functional.linear),
    *("relu", "relu_", "add", "add_", "mul", "sigmoid", "tanh", "mean", "sum", "size", "dim", "view", "reshape"),
    *("flatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous", "chunk", "expand"),
}
"""Functions and methods without side effects, in a network whose sparse convolutions are recorded."""

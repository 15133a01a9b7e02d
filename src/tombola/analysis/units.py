"""Units: which axes of a network's tensors belong to the same hidden units, and what another order of them changes.

The hidden units of a layer, the neurons of a linear layer or the channels of a convolution, carry no names. If they
change places together with the weights that enter and leave them, the network computes the same function. Axes whose
entries have to change places together form a *group*: the outputs of a layer, its batch norm, the inputs of
the next layer, and all layers whose outputs are added to each other (Ainsworth et al., Git Re-Basin, ICLR 2023,
arXiv 2209.04836).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from tombola.errors import UserError

Orders: TypeAlias = Mapping[int, npt.NDArray[np.int64]]
"""group -> an order of its units: the old number of the unit that takes each place."""

_ELEMENTWISE = (
    *(nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
_ELEMENTWISE_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid"),
    *("softplus", "hardtanh", "hardswish", "hardsigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("contiguous", "clone", "float", "double", "neg", "square", "abs"),
}
_ARITHMETIC_NAMES = {*("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "truediv", "div")}
_POOLING = (
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
_POOLING_NAMES = {
    f"{prefix}{kind}_pool{n}d" for prefix in ("", "adaptive_") for kind in ("max", "avg") for n in (1, 2, 3)
}
_SHAPE_NAMES = {*("flatten", "view", "reshape", "squeeze", "unsqueeze")}
_SYMMETRIC_NAMES = {*("mean", "sum", "amax", "amin")}


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor along which the entries belong to hidden units.

    Args:
        group: the group of the units.
        block: the number of consecutive entries that belong to one unit: 1, or more where a convolution's output is
            flattened before a linear layer.
    """

    group: int
    block: int


Axes: TypeAlias = tuple[Axis | None, ...]
"""What each axis of a tensor belongs to; None for an axis whose entries keep their places."""


@dataclass(frozen=True)
class Units:
    """The hidden units of a network.

    Args:
        sizes: the number of units of each group.
        axes: the axes of each parameter and buffer that changes with the order of units, by its name in `state_dict`.
        inputs: the groups whose units enter a linear or convolution layer, by the name of the layer: the group and the
            axis of the layer's input.
    """

    sizes: Mapping[int, int]
    axes: Mapping[str, Axes]
    inputs: Mapping[str, tuple[Axis, int]]

    def permute(self, tensors: Mapping[str, Tensor], orders: Orders) -> dict[str, Tensor]:
        """Return a network's tensors with its units in another order.

        Args:
            tensors: a state, or the layers of a mask, by parameter name.
            orders: the orders of some groups; the units of all others keep their places.

        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> units = find_units(model, (1,))
        >>> state = {"0.weight": torch.tensor([[1.0], [2.0]]), "2.weight": torch.tensor([[3.0, 4.0]])}
        >>> {name: tensor.tolist() for name, tensor in units.permute(state, {0: np.array([1, 0])}).items()}
        {'0.weight': [[2.0], [1.0]], '2.weight': [[4.0, 3.0]]}
        """
        found = {}
        for name, tensor in tensors.items():
            for number, axis in enumerate(self.axes.get(name, ())):
                if axis is not None and axis.group in orders:
                    entries = orders[axis.group][:, None] * axis.block + np.arange(axis.block)
                    tensor = tensor.index_select(number, torch.from_numpy(entries.ravel()))
            found[name] = tensor
        return found


def find_units(model: nn.Module, input_shape: Sequence[int]) -> Units:
    """Return the hidden units of a network, from its graph.

    The units of inputs and outputs keep their places. So do those of a convolution with groups, unless each group has
    one input channel (a depthwise convolution), whose outputs belong to the units of its inputs.

    Args:
        model: a network of linear layers, convolutions, norms, elementwise activations, dropout, pooling, sums and
            changes of shape, which `torch.fx` can trace. It is put into evaluation mode.
        input_shape: shape of one example.

    Raises:
        UserError: if the graph cannot be traced, or if it has an operation that does not say where its units go. The
            error names it.

    >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2))
    >>> find_units(model, (1, 4, 4)).axes["2.weight"]
    (None, Axis(group=0, block=4))
    """
    name = type(model).__name__
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = fx.Tracer().trace(model.eval())
            kind = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
            _Shapes(model, graph).run(torch.zeros(2, *input_shape, dtype=kind))
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"the units of {name} cannot be matched, its graph cannot be traced: {reason}; {_LEFT}"
        ) from error
    follower = _Follower(model)
    for node in graph.nodes:
        try:
            follower.follow(node)
        except UserError as error:
            raise UserError(f"the units of {name} cannot be matched: {error}{_after(node)}; {_LEFT}") from None
    return follower.units()


def _after(node: fx.Node) -> str:
    """Return which layer an operation follows, for a message; nothing if the operation is a layer."""
    while node.op != "call_module" and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op == "call_module":
            return f", after its layer {node.target!r}"
    return ""


_LEFT = "its tickets can be compared without matching, by their overlap"


class _Follower:
    """Follows units through a graph, node by node; the groups that turn out to be the same are joined (union-find)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, list[str]] = {}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            self._names.setdefault(id(tensor), []).append(name)
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._axes: dict[fx.Node, Axes] = {}
        self._tensors: dict[str, list[Axis | None]] = {}
        self._inputs: dict[str, tuple[Axis, int]] = {}
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._fixed: set[int] = set()

    def units(self) -> Units:
        """Return what was found; groups are numbered from 0 in the order in which the graph meets them."""
        roots = [self._root(group) for group in range(len(self._parents))]
        fixed = {self._root(group) for group in self._fixed}
        numbers = {root: i for i, root in enumerate(dict.fromkeys(root for root in roots if root not in fixed))}

        def settle(axis: Axis | None) -> Axis | None:
            number = None if axis is None else numbers.get(self._root(axis.group))
            return None if axis is None or number is None else Axis(number, axis.block)

        axes = {name: tuple(settle(axis) for axis in found) for name, found in self._tensors.items()}
        inputs = {name: (settle(axis), number) for name, (axis, number) in self._inputs.items()}
        return Units(
            {number: self._sizes[root] for root, number in numbers.items()},
            {name: found for name, found in axes.items() if any(found)},
            {name: (axis, number) for name, (axis, number) in inputs.items() if axis is not None},
        )

    def follow(self, node: fx.Node) -> None:
        """Set the axes of what a node computes.

        Raises:
            UserError: if it is unknown where the units go.
        """
        if node.op == "placeholder":
            self._axes[node] = (None,) * len(_shape(node) or ())
        elif node.op == "output":
            for given in node.all_input_nodes:
                self._fix(self._axes.get(given, ()))
        elif node.op == "get_attr":
            raise UserError(f"it uses {node.target!r} outside of a layer")
        elif _shape(node) is None:  # a size, for example
            if any(any(self._axes.get(given, ())) for given in node.all_input_nodes) and node.target not in _SIZES:
                raise UserError(f"its operation {node.name!r} does not return a tensor")
        elif node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            self._axes[node] = self._through_module(node, module)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            self._axes[node] = self._through_function(node, name)

    def _through_module(self, node: fx.Node, module: nn.Module) -> Axes:
        given, shape = self._given(node)
        if isinstance(module, nn.Linear):
            self._enter(module, given[-1], len(given) - 1)
            return (*given[:-1], self._weigh(module, given[-1], out=0))
        if isinstance(module, nn.modules.conv._ConvNd):
            return self._through_convolution(node, module, given)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                self._set(tensor, (given[1],))
            return given
        if isinstance(module, nn.LayerNorm):
            for tensor in (module.weight, module.bias):
                self._set(tensor, given[len(given) - len(module.normalized_shape) :])
            return given
        if isinstance(module, nn.GroupNorm):
            if module.num_groups not in (1, module.num_channels):
                self._fix(given)
            for tensor in (module.weight, module.bias):
                self._set(tensor, (given[1],))
            return given
        if isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._set(module.weight, (given[1],))
            return given
        if isinstance(module, _ELEMENTWISE):
            return given
        if isinstance(module, _POOLING) and not getattr(module, "return_indices", False):
            return self._pool(node, given)
        if isinstance(module, nn.Flatten):
            return self._reshape(node, given, shape)
        raise UserError(f"its module {node.target!r} is a {type(module).__name__}")

    def _through_convolution(self, node: fx.Node, module: nn.modules.conv._ConvNd, given: Axes) -> Axes:
        self._pool(node, given)
        channel = len(given) - len(module.kernel_size) - 1
        first, out = given[channel], cast(Axis | None, None)
        if module.groups == 1:
            self._enter(module, first, channel)
            out = self._weigh(module, first, out=int(module.transposed))
        elif module.groups == module.in_channels:  # each channel has outputs of its own, one after another
            multiple = module.out_channels // module.groups
            out = None if first is None else Axis(first.group, first.block * multiple)
            own = first if module.transposed else out
            self._set(module.weight, (own, *(None,) * (module.weight.ndim - 1)))
            self._set(module.bias, (out,))
        else:
            self._fix(given)
        return (*given[:channel], out, *given[channel + 1 :])

    def _through_function(self, node: fx.Node, name: str) -> Axes:
        if name in _ARITHMETIC_NAMES:
            return self._combine(node)
        if name not in _ELEMENTWISE_NAMES | _POOLING_NAMES | _SHAPE_NAMES | _SYMMETRIC_NAMES:
            raise UserError(f"it calls {name!r}")
        given, shape = self._given(node)
        if name in _ELEMENTWISE_NAMES:
            return given
        if name in _POOLING_NAMES:
            return self._pool(node, given)
        if name in _SHAPE_NAMES:
            return self._reshape(node, given, shape)
        return self._reduce(node, given, shape)

    def _given(self, node: fx.Node) -> tuple[Axes, tuple[int, ...]]:
        first = node.args[0] if node.args else None
        shape = _shape(first) if isinstance(first, fx.Node) else None
        if not isinstance(first, fx.Node) or shape is None:
            raise UserError(f"the first argument of its operation {node.name!r} is not a tensor")
        others = [each for each in node.all_input_nodes if each is not first and any(self._axes.get(each, ()))]
        if others:
            raise UserError(f"its operation {node.name!r} takes several tensors")
        return self._axes[first], shape

    def _combine(self, node: fx.Node) -> Axes:
        """Arithmetic of two tensors, of which one may be a number: units that meet are the same."""
        tensors = [each for each in node.args if isinstance(each, fx.Node) and _shape(each) is not None]
        pairs = [list(zip(self._axes[each], _shape(each) or (), strict=True))[::-1] for each in tensors]
        found = []
        for met in zip_longest(*pairs, fillvalue=(None, 1)):
            axes = [axis for axis, size in met if size > 1] or [None]
            for other in axes[1:]:
                self._join(axes[0], other)
            found.append(next((each for each in axes if each is not None), None))
        return tuple(found[::-1])

    def _pool(self, node: fx.Node, given: Axes) -> Axes:
        """Pooling over the positions of an image."""
        if any(given[2:]):
            raise UserError(f"its operation {node.name!r} goes over hidden units as if they were positions")
        return given

    def _reshape(self, node: fx.Node, given: Axes, shape: tuple[int, ...]) -> Axes:
        """Axes that are merged: the first of them may have units, of which each becomes a block."""
        found: list[Axis | None] = []
        rest = list(zip(given, shape, strict=True))
        for size in _shape(node) or ():
            merged: list[tuple[Axis | None, int]] = []
            while rest and math.prod(length for _, length in merged) < size:
                merged.append(rest.pop(0))
            whole = [(axis, length) for axis, length in merged if length > 1]
            taken = math.prod(length for _, length in whole)
            if taken != size:  # an axis is divided
                if any(axis for axis, _ in merged):
                    raise UserError(f"its operation {node.name!r} divides an axis of hidden units")
                rest.insert(0, (None, taken // size))
                found.append(None)
                continue
            if any(axis for axis, _ in whole[1:]):
                raise UserError(f"its operation {node.name!r} merges an axis of hidden units into the one before it")
            first = whole[0][0] if whole else None
            found.append(None if first is None else Axis(first.group, first.block * taken // whole[0][1]))
        return tuple(found)

    def _reduce(self, node: fx.Node, given: Axes, shape: tuple[int, ...]) -> Axes:
        """A mean or sum over some axes, whose value does not depend on the order along them."""
        dims = cast(Any, node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None))
        over = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
        if len(_shape(node) or ()) == len(shape):
            return tuple(None if number in over else axis for number, axis in enumerate(given))
        return tuple(axis for number, axis in enumerate(given) if number not in over)

    def _weigh(self, module: nn.Linear | nn.modules.conv._ConvNd, given: Axis | None, out: int) -> Axis:
        """Set the axes of a layer's weight and bias; return its outputs' units, which are new at its first call."""
        own = Axis(self._new_group(module.weight.shape[out]), 1)
        both = (own, given) if out == 0 else (given, own)
        self._set(module.weight, (*both, *(None,) * (module.weight.ndim - 2)))
        self._set(module.bias, (own,))
        return own

    def _enter(self, module: nn.Module, axis: Axis | None, number: int) -> None:
        if axis is not None:
            self._inputs[self._modules[id(module)]] = (axis, number)

    def _set(self, tensor: Tensor | None, axes: Sequence[Axis | None]) -> None:
        for name in self._names.get(id(tensor), ()) if tensor is not None else ():
            for one, other in zip(self._tensors.get(name, axes), axes, strict=True):
                self._join(one, other)
            self._tensors.setdefault(name, list(axes))

    def _new_group(self, size: int) -> int:
        self._parents.append(len(self._parents))
        self._sizes.append(size)
        return len(self._parents) - 1

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _join(self, one: Axis | None, other: Axis | None) -> None:
        """Let two axes have the same units; they keep their places if the axes do not have the same structure."""
        if one is None or other is None or one.block != other.block:
            self._fix((one, other))
        else:
            first, second = sorted((self._root(one.group), self._root(other.group)))
            self._parents[second] = first

    def _fix(self, axes: Sequence[Axis | None]) -> None:
        self._fixed.update(axis.group for axis in axes if axis is not None)


_SIZES = ("size", "dim", getattr)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of what a node computes; None if it is not a tensor."""
    return node.meta.get("tombola_shape")


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of each tensor at the node that computes it."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["tombola_shape"] = tuple(result.shape)
        return result

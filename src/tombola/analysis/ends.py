"""Ends: which layers of a network touch its inputs and its outputs, found by following what it computes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tombola.inputs import Forward, Tensors, call, convert, list_tensors, select
from tombola.pruning.eligible import list_matrices
from tombola.streams import ambient
from tombola.study.planner import Planner
from tombola.training.batches import normalisation

_JOINS = {"add", "sub", "rsub", "cat", "stack", "where", "copy", "lerp"}
"""Operations in which a weight is added to activations or stands beside them, which it does not stop."""


@dataclass(frozen=True)
class Ends:
    """The layers of a network that touch its inputs and its outputs, by parameter name.

    Args:
        inputs: the weights that are applied to the inputs before any other layer is.
        outputs: the weights whose results become the outputs without another layer.
        fault: a sentence on what stands by order because it is not known; empty if both ends are known.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fault: str = ""

    @classmethod
    def by_order(cls, layers: Collection[str], error: Exception | None = None) -> Ends:
        """Return the first and the last of some layers, for a network that cannot be followed because of an error.

        >>> Ends.by_order(["a", "b", "c"], ValueError()).outputs
        ('c',)
        """
        names, why = tuple(layers), "" if error is None else f" ({type(error).__name__})"
        return cls(
            names[:1],
            names[-1:],
            f"What the network computes cannot be followed{why}: its first and its last layer by order stand for those "
            f"of the inputs and of the outputs.",
        )


def of_network(planner: Planner) -> Ends:
    """Return the ends of a study's network, whose layers are those that density counts."""
    problem = planner.problem
    with ambient(0):
        model = problem.build()
    inputs = normalisation(problem.data)(select(problem.data.train_inputs, slice(2)))
    return find_ends(model, inputs, tuple(planner.dense), problem.forward)


def find_ends(model: nn.Module, inputs: Tensors, layers: Collection[str], forward: Forward = call) -> Ends:
    """Return the layers that touch the inputs and the outputs of a network, in evaluation mode.

    A layer is any of `layers`, an embedding, or a layer that is prunable by default. One that is tied, such as the head
    of a language model that is its embedding too, may be at both ends. A skip connection is no layer: it takes the
    inputs, or the results of several layers, further on, if it adds them or puts them together. Comparisons, such as
    those that make masks, take nothing on, and masks that are inputs do not take the inputs on.
    The weights of a recurrent layer that torch computes as one are at the same ends.

    Args:
        model: the network.
        inputs: the inputs of one example or more.
        layers: the names of weights that are layers; an end that has none is the first or the last of these.
        forward: a function (model, inputs) -> outputs.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
    >>> find_ends(model, torch.ones(1, 2), ["0.weight", "2.weight", "3.weight"])
    Ends(inputs=('0.weight',), outputs=('3.weight',), fault='')
    """
    names = {id(each): name for name, each in model.named_parameters()}
    kinds = (nn.Embedding, nn.EmbeddingBag)
    weights: list[Tensor] = [each for module in model.modules() for _, each in list_matrices(module)]
    weights += [module.weight for module in model.modules() if isinstance(module, kinds)]
    weights += [each for name, each in model.named_parameters() if name in layers]
    follower = _Follower({id(each): names[id(each)] for each in weights if id(each) in names}, model)
    given = convert(torch.clone, inputs)
    for tensor in list_tensors(given).values():
        follower.keep(tensor, _Trace(fresh=True, reached=True))
    try:
        with (
            ambient(0),
            torch.enable_grad(),
            warnings.catch_warnings(),
            _uncompiled(),
            follower,
        ):  # without gradients, layers are fused
            warnings.simplefilter("ignore")
            outputs = forward(model.eval(), given)
    except Exception as error:  # an operation that does not run under the follower
        return Ends.by_order(layers, error)
    last = {name for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) for name in follower.of(leaf).last}
    order = list(names.values())
    inputs_at, outputs_at = (tuple(sorted(found, key=order.index)) for found in (follower.first, last))
    if inputs_at and outputs_at:
        return Ends(inputs_at, outputs_at)
    known = Ends.by_order(layers)
    if not inputs_at and not outputs_at:
        return known
    end, place = ("outputs", "last") if inputs_at else ("inputs", "first")
    fault = f"No layer was found that touches the {end}: the {place} layer by order stands for it."
    return Ends(inputs_at or known.inputs, outputs_at or known.outputs, fault)


def _uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled parts of a network run as they are written, which can be followed.

    Where nothing is compiled, it does not load the compiler of torch, which would take longer than all else here.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


@dataclass(frozen=True)
class _Trace:
    """Where a tensor comes from.

    Args:
        reached: whether it depends on the inputs.
        fresh: whether it depends on them without a layer between.
        last: the last layers that it comes from.
        weights: the layers whose weights it holds, if it depends on these alone.
    """

    reached: bool = False
    fresh: bool = False
    last: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()


def _place(tensor: Tensor) -> StorageWeakRef:
    """Return the identity of the memory of a tensor, which its views share.

    It frees the memory with the last tensor and is not given to another memory while it exists.
    """
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


@dataclass
class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows each tensor of a network from the inputs, operation by operation.

    Args:
        names: the names of weights that are layers, by the identity of the parameter.
        model: the network.
        first: the layers that were found to touch the inputs.
    """

    names: Mapping[int, str]
    model: nn.Module
    first: set[str] = field(default_factory=set)
    traces: dict[StorageWeakRef, _Trace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for parameter in self.model.parameters():
            if id(parameter) in self.names:
                self.keep(parameter, _Trace(weights=frozenset([self.names[id(parameter)]])))

    def keep(self, tensor: Tensor, trace: _Trace) -> None:
        """Remember where a tensor and its views come from."""
        self.traces[_place(tensor)] = trace

    def of(self, tensor: Tensor) -> _Trace:
        """Return where a tensor comes from."""
        return self.traces.get(_place(tensor), _Trace())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not load its compiler to keep it from this class, see `_uncompiled`."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        traces = [self.of(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        weights = frozenset().union(*(each.weights for each in traces))
        joins = func.overloadpacket.__name__.strip("_") in _JOINS
        reached, passed = any(each.reached for each in traces), any(each.reached and not each.fresh for each in traces)
        fresh = any(each.fresh for each in traces)
        if reached and fresh:
            self.first |= weights
        last = frozenset().union(*(each.last for each in traces))
        if not reached:
            trace = _Trace(weights=weights)
        elif weights and not joins:
            trace = _Trace(reached=True, last=weights)
        else:
            trace = _Trace(reached, fresh and (joins or not passed), last | weights)
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.keep(result, _Trace() if result.dtype == torch.bool else trace)
        return results

"""Weights: the complete state of a network, identified by the hash of its content."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tombola.errors import UserError, expect, shorten
from tombola.exits import attribute_failure
from tombola.pruning.fit import find_weights, fit_state
from tombola.pruning.mask import Mask

State: TypeAlias = dict[str, Tensor]
"""A module's `state_dict()`: parameters and buffers by name."""


class Weights:
    """The state of a network and its hash; the state may stay on disk until `load` reads it.

    Unless it is given, the hash is computed when it is first asked for, of what `load` returns then.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> weights = Weights.of(model.state_dict())
    >>> before = model.weight.tolist()
    >>> _ = nn.init.zeros_(model.weight)
    >>> weights.load()["weight"].tolist() == before
    True
    """

    def __init__(self, hash: str | None, load: Callable[[], State]) -> None:
        self._hash = hash
        self._load = load

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Weights:
        """Return weights that keep a copy of this state in memory: training the model does not change them."""
        expect(state, Mapping, "Weights.of", "tensors by name, such as a state_dict()")
        for name, tensor in state.items():
            expect(tensor, Tensor, f"Weights.of: {name!r}", "a tensor")
        held = {name: tensor.detach().clone() for name, tensor in state.items()}
        return cls(None, lambda: held)

    @property
    def hash(self) -> str:
        """The SHA-256 of the state, see `state_hash`."""
        if self._hash is None:
            self._hash = state_hash(self._load())
        return self._hash

    def load(self) -> State:
        """Return the state, which must not be changed; each call may read it from disk."""
        return self._load()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names, types, shapes and bytes of the entries, sorted by name.

    >>> strided = {"b": torch.zeros(2), "a": torch.tensor([1.0, 0.0, 2.0])[::2]}
    >>> state_hash(strided) == state_hash({"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)})
    True
    >>> state_hash({"a": torch.zeros(2)}) == state_hash({"a": torch.zeros(2, dtype=torch.int32)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


Shared: TypeAlias = Mapping[str, tuple[str, ...]]
"""The other names of tensors that modules share, by their first names, see `tombola.pruning.eligible.list_shared`."""


def apply_mask(state: Mapping[str, Tensor], mask: Mask, shared: Shared = MappingProxyType({})) -> State:
    """Return a copy of the state in which pruned weights are exactly 0.0.

    Args:
        state: parameters and buffers by name.
        mask: the connections that are alive.
        shared: the other names of the mask's layers, under which the state has them too.

    >>> mask = Mask.from_tensors({"w": torch.tensor([True, False])})
    >>> state = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    >>> found = apply_mask(state, mask)
    >>> found, found["b"] is state["b"]
    ({'w': tensor([1., 0.]), 'b': tensor([3.])}, False)
    >>> apply_mask({"w": torch.ones(2), "v": torch.ones(2)}, mask, {"w": ("v",)})["v"]
    tensor([1., 0.])
    """
    layers = {name: name for name in mask} | {other: name for name in mask for other in shared.get(name, ())}
    return {
        name: _keep(mask[layers[name]].to(tensor.device), tensor) if name in layers else tensor.clone()
        for name, tensor in state.items()
    }


def _keep(alive: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy of weights in which those that are pruned are exactly 0.0."""
    kind = _INTEGERS.get(tensor.element_size())
    if kind is None:
        return torch.where(alive, tensor, 0.0)
    # The bits of each weight times 1 or 0: on a CPU, `torch.where` takes up to fifteen times as long.
    return (tensor.detach().view(kind) * alive).view(tensor.dtype)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes."""


def zero_pruned(model: nn.Module, mask: Mask) -> None:
    """Set a model's pruned weights to 0.0.

    Call it after `load_state_dict`, even if the state was masked before: a weight that several layers share has one
    name in a mask and several names in a state, and the model takes the value of the last name.

    Raises:
        UserError: if the mask belongs to another network.
    """
    for name, weight in find_weights(model, mask).items():
        with torch.no_grad():
            weight.copy_(_keep(mask[name].to(weight.device), weight))


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model; raise `UserError` if something that it holds, such as a lock, cannot be copied."""
    with attribute_failure(f"{type(model).__name__}: copying it, as copy.deepcopy does,"):
        return copy.deepcopy(model)


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a complete state into a model; wrappers of the model, such as `DistributedDataParallel`, do not matter.

    Args:
        model: a module.
        state: its parameters and buffers by name.
        what: what the state is called in a message, such as `the ticket`.

    Raises:
        UserError: if the state belongs to another network; the message says which entries differ and how.
    """
    fitted = fit_state(model, state, what)
    try:
        model.load_state_dict(fitted)
    except RuntimeError as error:
        raise UserError(f"{what} does not fit the model: {shorten(' '.join(str(error).split()), 300)}") from error

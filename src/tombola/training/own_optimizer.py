"""An optimizer of the user: any `torch.optim.Optimizer` whose state consists of tensors and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tombola.errors import UserError
from tombola.exits import attribute_failure
from tombola.streams import ambient
from tombola.training.weights import State

MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
"""A function (parameters, learning rate) -> optimizer."""

_NUMBERS = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}
"""The types of numbers in a state, each with the type of the tensor that keeps it in a checkpoint."""


class OwnOptimizer:
    """An optimizer of the user, with the methods of `tombola.training.optimizer.Optimizer`.

    The learning rate of each of its groups is multiplied by the schedule's factor: what the group began with, times
    the learning rate of the iteration over that of the recipe.

    Args:
        make: a function (parameters, learning rate) -> optimizer.
        lr: the learning rate of the recipe.
        parameters: the parameters to update.
        tensors: the state to resume from, as `tensors()` returns it; by default the optimizer starts without state.
        name: what messages call the function.

    Raises:
        UserError: if the function fails or does not return an optimizer.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> optimizer = OwnOptimizer(torch.optim.RMSprop, 0.5, [weight])
    >>> optimizer.step(0.25)
    >>> sorted(optimizer.tensors())
    ['0.square_avg', '0.step']
    """

    def __init__(
        self,
        make: MakeOptimizer,
        lr: float,
        parameters: list[nn.Parameter],
        tensors: State | None = None,
        name: str = "optimizer",
    ) -> None:
        self.parameters, self._lr, self._name = parameters, lr, name
        with attribute_failure(name):
            self._optimizer = make(parameters, lr)
        if not isinstance(self._optimizer, torch.optim.Optimizer):
            kind = type(self._optimizer).__name__
            raise UserError(f"{name}: expected a torch.optim.Optimizer, got {kind}")
        self._groups = [dict(group) for group in self._optimizer.param_groups]
        for key, tensor in (tensors or {}).items():
            self._restore(key, tensor)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of parameters that it updates."""
        return self._optimizer.param_groups

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, lr: float) -> None:
        """Update the parameters, with the learning rate of each group scaled by `lr` over that of the recipe."""
        for group, first in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = first["lr"] * (lr / self._lr)
        with attribute_failure(f"{self._name}: its step"):
            self._optimizer.step()

    def tensors(self) -> State:
        """Return a copy of the state on the CPU: `<number of the parameter>.<name>`, or `group<number>.<name>`.

        A number is kept as a tensor, with its type in the name.

        Raises:
            UserError: if something in the state is neither a tensor nor a number.
        """
        return dict(self._list_state())

    def _list_state(self) -> Iterator[tuple[str, Tensor]]:
        for number, parameter in enumerate(self.parameters):
            for name, value in self._optimizer.state.get(parameter, {}).items():
                yield self._encode(f"{number}.{name}", value, parameter.device)
        for number, (group, first) in enumerate(zip(self._optimizer.param_groups, self._groups, strict=True)):
            for name, value in group.items():
                if name not in ("params", "lr") and not _is_same(value, first.get(name)):
                    yield self._encode(f"group{number}.{name}", value, self.parameters[0].device)

    def _encode(self, key: str, value: Any, device: torch.device) -> tuple[str, Tensor]:
        """Return the name and the tensor that keep a value of the state."""
        if isinstance(value, Tensor) and value.layout is torch.strided:
            elsewhere = "" if value.device == device else "@cpu"
            return f"{key}{elsewhere}", value.detach().to("cpu", copy=True)
        if value is None:
            return f"{key}#none", torch.empty(0)
        kind = type(value).__name__
        if kind not in _NUMBERS or (kind == "int" and abs(value) >= 2**63):
            raise UserError(
                f"{self._name}: its state has {key.partition('.')[2]!r} of type {kind}; an optimizer whose trainings "
                f"can be resumed keeps only tensors and numbers in its state"
            )
        return f"{key}#{kind}", torch.tensor(value, dtype=_NUMBERS[kind])

    def _restore(self, key: str, tensor: Tensor) -> None:
        place, _, name = key.partition(".")
        name, _, kind = name.partition("#")
        name, elsewhere, _ = name.partition("@cpu")
        if place.startswith("group"):
            there, like = self._optimizer.param_groups[int(place.removeprefix("group"))], self.parameters[0].detach()
        else:
            parameter = self.parameters[int(place)]
            there, like = self._optimizer.state[parameter], parameter.detach()
        if kind:
            there[name] = None if kind == "none" else tensor.item()
        elif elsewhere:
            there[name] = tensor.clone()
        elif tensor.shape == like.shape:  # in the layout of its parameter, so that sums have the same order
            there[name] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        else:
            there[name] = tensor.to(like.device, copy=True)


def check_optimizer(make: MakeOptimizer, lr: float, parameters: list[nn.Parameter], name: str) -> None:
    """Raise `UserError` unless an optimizer goes on with the same bits from a copy of its state.

    Args:
        make: a function (parameters, learning rate) -> optimizer.
        lr: the learning rate.
        parameters: parameters with gradients; they are changed.
        name: what messages call the function.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> check_optimizer(torch.optim.LBFGS, 0.1, [weight], "lbfgs")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: lbfgs: its step raised TypeError: ...
    """
    optimizer = OwnOptimizer(make, lr, parameters, name=name)
    optimizer.step(lr)
    state, before = optimizer.tensors(), [parameter.detach().clone() for parameter in parameters]
    after = []
    for each in (optimizer, OwnOptimizer(make, lr, parameters, state, name)):
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        with ambient(0):
            each.step(lr / 2)
        after.append([parameter.detach().clone() for parameter in parameters])
    if not all(one.equal(other) or (one.isnan() & other.isnan()).any() for one, other in zip(*after, strict=True)):
        raise UserError(
            f"{name}: from a copy of its state it does not go on with the same bits; what it remembers between steps "
            f"belongs in the state of its parameters, so that a training can be resumed"
        )


def _is_same(value: Any, other: Any) -> bool:
    """Return whether an entry of a group is what it was in the beginning."""
    if isinstance(value, Tensor) or type(value) is not type(other):
        return False
    return bool(value == other)

"""The optimizers, which call torch's fused kernels directly.

`torch.optim` computes the same bits by the same kernels, but spends up to ten times as long in Python as the kernels
take for a small or sparse network. The kernels are private functions of torch: `make test-torch` compares them with
`torch.optim` for the oldest and the newest torch that `pyproject.toml` allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tombola.errors import UserError, shorten
from tombola.kernels.stretch import Stretch
from tombola.training.recipe import Recipe
from tombola.training.weights import State

_EPSILON = 1e-8  # the default of torch.optim.Adam

_Updated: TypeAlias = tuple[nn.Parameter, Tensor, dict[str, Tensor]]
"""A parameter, its gradient, and its state, which is empty at first."""


def find_decayed(
    names: Sequence[str], no_decay: Sequence[str], shared: Mapping[str, Sequence[str]] | None = None
) -> list[bool]:
    """Return for each parameter whether it has weight decay: all have except those that a pattern of `no_decay` names.

    Args:
        names: the names of the parameters.
        no_decay: patterns of names.
        shared: the other names of parameters that modules share, which patterns may use too, by their first names.

    Raises:
        UserError: if a pattern matches no parameter.

    >>> find_decayed(["fc.weight", "fc.bias"], ["*.bias"])
    [True, False]
    """
    called = [(name, *(shared or {}).get(name, ())) for name in names]
    every = [name for several in called for name in several]
    for pattern in no_decay:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise UserError(f"recipe.no_decay: no parameter matches {pattern!r}; there are {shorten(', '.join(every))}")
    return [not any(fnmatchcase(name, pattern) for pattern in no_decay for name in several) for several in called]


class Optimizer:
    """An optimizer: it updates parameters by their gradients and keeps its state (momentum, or Adam's moments).

    Args:
        recipe: the recipe with the optimizer and its hyperparameters.
        parameters: the parameters to update; a parameter without a gradient is not changed.
        tensors: the state to resume from, as `tensors()` returns it; by default the optimizer starts without state.
        decayed: for each parameter, whether it has weight decay; by default all have.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> Optimizer(Recipe(epochs=1), [weight]).step(0.25)
    >>> weight.item()
    0.75
    """

    def __init__(
        self,
        recipe: Recipe,
        parameters: list[nn.Parameter],
        tensors: State | None = None,
        decayed: Sequence[bool] | None = None,
    ) -> None:
        self.recipe = recipe
        self._decayed = [True] * len(parameters) if decayed is None else list(decayed)
        self._groups = sorted(set(self._decayed), reverse=True)
        self.parameters = parameters
        self._state: list[dict[str, Tensor]] = [{} for _ in parameters]
        for key, tensor in (tensors or {}).items():
            number, name = key.split(".", 1)
            parameter = parameters[int(number)]
            # The fused kernels traverse memory in order, so a tensor must have the layout of its parameter.
            like = parameter.detach() if tensor.shape == parameter.shape else tensor
            self._state[int(number)][name] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters that have a gradient, with learning rate `lr`."""
        step = self._step_sgd if self.recipe.optimizer == "sgd" else self._step_adam
        for decayed in self._groups:
            step(lr, self.recipe.weight_decay if decayed else 0.0, self._with_gradients(decayed=decayed))

    def prepare(self, stretch: Stretch) -> None:
        """Let a stretch update the parameters that have a gradient, as `step` does when the state is made.

        Args:
            stretch: iterations that compute the gradients which the parameters have now.
        """
        recipe = self.recipe
        for decayed in self._groups:
            updated = self._with_gradients(decayed=decayed)
            parameters, gradients = [each[0] for each in updated], [each[1] for each in updated]
            decay = recipe.weight_decay if decayed else 0.0
            if not updated:
                continue
            if recipe.optimizer == "sgd":
                momenta = [state["momentum_buffer"] for _, _, state in updated] if recipe.momentum else []
                stretch.sgd(parameters, gradients, momenta, decay, recipe.momentum, recipe.nesterov)
                continue
            means, squares = ([state[name] for _, _, state in updated] for name in ("exp_avg", "exp_avg_sq"))
            steps = [state["step"] for _, _, state in updated]
            (beta1, beta2), decoupled = recipe.betas, recipe.optimizer == "adamw"
            stretch.adam(parameters, gradients, means, squares, steps, beta1, beta2, decay, _EPSILON, decoupled)

    def tensors(self) -> State:
        """Return a copy of the state on the CPU, by `<number of the parameter>.<name>`."""
        return {
            f"{number}.{name}": tensor.to("cpu", copy=True)
            for number, state in enumerate(self._state)
            for name, tensor in state.items()
        }

    def _with_gradients(self, *, decayed: bool) -> list[_Updated]:
        """Return the parameters with a gradient, and with weight decay or without, with their gradient and state."""
        parts = zip(self.parameters, self._state, self._decayed, strict=True)
        return [
            (parameter, parameter.grad, state)
            for parameter, state, decays in parts
            if decays == decayed and parameter.grad is not None
        ]

    def _step_sgd(self, lr: float, weight_decay: float, parameters: list[_Updated]) -> None:
        momentum = self.recipe.momentum
        later = [each for each in parameters if not momentum or each[2]]
        first = [each for each in parameters if momentum and not each[2]]
        for parameter, _, state in first:
            state["momentum_buffer"] = torch.empty_like(parameter)
        for group, is_first in ((later, False), (first, True)):
            if group:
                torch._fused_sgd_(
                    [parameter for parameter, _, _ in group],
                    [gradient for _, gradient, _ in group],
                    [state["momentum_buffer"] for _, _, state in group] if momentum else [],
                    weight_decay=weight_decay,
                    momentum=momentum,
                    lr=lr,
                    dampening=0.0,
                    nesterov=self.recipe.nesterov,
                    maximize=False,
                    is_first_step=is_first,
                )

    def _step_adam(self, lr: float, weight_decay: float, parameters: list[_Updated]) -> None:
        update = torch._fused_adam_ if self.recipe.optimizer == "adam" else torch._fused_adamw_
        beta1, beta2 = self.recipe.betas
        if not parameters:
            return
        for parameter, _, state in parameters:
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        steps = [state["step"] for _, _, state in parameters]
        torch._foreach_add_(steps, 1)
        update(
            [parameter for parameter, _, _ in parameters],
            [gradient for _, gradient, _ in parameters],
            [state["exp_avg"] for _, _, state in parameters],
            [state["exp_avg_sq"] for _, _, state in parameters],
            [],
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=_EPSILON,
            amsgrad=False,
            maximize=False,
        )

"""The optimizers, which call torch's fused kernels directly.

`torch.optim` computes the same bits by the same kernels, but spends up to ten times as long in Python as the kernels
take for a small or sparse network. The kernels are private functions of torch: `make test-torch` compares them with
`torch.optim` for the oldest and the newest torch that `pyproject.toml` allows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tombola.training.recipe import Recipe
from tombola.training.weights import State

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam


class Optimizer:
    """An optimizer: it updates parameters by their gradients and keeps its state (momentum, or Adam's moments).

    Args:
        recipe: the recipe with the optimizer and its hyperparameters.
        parameters: the parameters to update; a parameter without a gradient is not changed.
        tensors: the state to resume from, as `tensors()` returns it; by default the optimizer starts without state.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> Optimizer(Recipe(epochs=1), [weight]).step(0.25)
    >>> weight.item()
    0.75
    """

    def __init__(self, recipe: Recipe, parameters: list[nn.Parameter], tensors: State | None = None) -> None:
        self.recipe = recipe
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
        if self.recipe.optimizer == "sgd":
            self._step_sgd(lr)
        else:
            self._step_adam(lr)

    def tensors(self) -> State:
        """Return a copy of the state on the CPU, by `<number of the parameter>.<name>`."""
        return {
            f"{number}.{name}": tensor.to("cpu", copy=True)
            for number, state in enumerate(self._state)
            for name, tensor in state.items()
        }

    def _with_gradients(self) -> list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]]:
        """Return the parameters that have a gradient, each with its gradient and its state."""
        pairs = zip(self.parameters, self._state, strict=True)
        return [(parameter, parameter.grad, state) for parameter, state in pairs if parameter.grad is not None]

    def _step_sgd(self, lr: float) -> None:
        momentum, parameters = self.recipe.momentum, self._with_gradients()
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
                    weight_decay=self.recipe.weight_decay,
                    momentum=momentum,
                    lr=lr,
                    dampening=0.0,
                    nesterov=self.recipe.nesterov,
                    maximize=False,
                    is_first_step=is_first,
                )

    def _step_adam(self, lr: float) -> None:
        update = torch._fused_adam_ if self.recipe.optimizer == "adam" else torch._fused_adamw_
        parameters = self._with_gradients()
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
            beta1=_BETA1,
            beta2=_BETA2,
            weight_decay=self.recipe.weight_decay,
            eps=_EPSILON,
            amsgrad=False,
            maximize=False,
        )

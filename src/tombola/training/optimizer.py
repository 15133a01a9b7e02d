"""The optimizers of a recipe, stepping with torch's fused kernels called directly.

`torch.optim` computes the same bits by the same kernels, but spends up to ten times as long in Python as the kernels
take for a small or sparse network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tombola.training.recipe import Recipe
from tombola.training.weights import State

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's own


class Optimizer:
    """Steps parameters along their gradients and keeps the tensors that this needs: momentum, or Adam's moments.

    Args:
        recipe: names the optimizer and its settings.
        parameters: what to step; one that has no gradient is left as it is.
        tensors: what `tensors()` returned before, to go on from there.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> Optimizer(Recipe(epochs=1), [weight]).step(0.25)
    >>> weight.item()
    0.75
    """

    def __init__(self, recipe: Recipe, parameters: list[nn.Parameter], tensors: State | None = None) -> None:
        self.recipe = recipe
        self.parameters = parameters
        self._kept: list[dict[str, Tensor]] = [{} for _ in parameters]
        for key, tensor in (tensors or {}).items():
            number, name = key.split(".", 1)
            parameter = parameters[int(number)]
            # The fused steps go through memory in order: a tensor must lie there as its parameter does.
            like = parameter.detach() if tensor.shape == parameter.shape else tensor
            self._kept[int(number)][name] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Step all parameters that have a gradient, at learning rate `lr`."""
        if self.recipe.optimizer in ("adam", "adamw"):
            self._adam(lr)
        else:
            self._sgd(lr)

    def tensors(self) -> State:
        """Return a copy, on the CPU, of what is kept, by `<parameter's number>.<name>`."""
        return {
            f"{number}.{name}": tensor.to("cpu", copy=True)
            for number, kept in enumerate(self._kept)
            for name, tensor in kept.items()
        }

    def _stepped(self) -> list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]]:
        """The parameters that have a gradient, with it and with what is kept for them."""
        return [(p, p.grad, kept) for p, kept in zip(self.parameters, self._kept, strict=True) if p.grad is not None]

    def _sgd(self, lr: float) -> None:
        momentum = 0.0 if self.recipe.optimizer == "sgd" else self.recipe.momentum
        stepped = self._stepped()
        begun = [each for each in stepped if not momentum or each[2]]
        first = [each for each in stepped if momentum and not each[2]]
        for parameter, _, kept in first:
            kept["momentum_buffer"] = torch.empty_like(parameter)
        for group, is_first in ((begun, False), (first, True)):
            if group:
                torch._fused_sgd_(
                    [parameter for parameter, _, _ in group],
                    [gradient for _, gradient, _ in group],
                    [kept["momentum_buffer"] for _, _, kept in group] if momentum else [],
                    weight_decay=self.recipe.weight_decay,
                    momentum=momentum,
                    lr=lr,
                    dampening=0.0,
                    nesterov=self.recipe.optimizer == "nesterov",
                    maximize=False,
                    is_first_step=is_first,
                )

    def _adam(self, lr: float) -> None:
        step = torch._fused_adam_ if self.recipe.optimizer == "adam" else torch._fused_adamw_
        stepped = self._stepped()
        for parameter, _, kept in stepped:
            if not kept:
                kept["step"] = torch.zeros((), device=parameter.device)
                kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if stepped:
            steps = [kept["step"] for _, _, kept in stepped]
            torch._foreach_add_(steps, 1)
            step(
                [parameter for parameter, _, _ in stepped],
                [gradient for _, gradient, _ in stepped],
                [kept["exp_avg"] for _, _, kept in stepped],
                [kept["exp_avg_sq"] for _, _, kept in stepped],
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

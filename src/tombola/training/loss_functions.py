"""Loss functions: the built-in losses by name, each the mean over a batch."""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from tombola.errors import UserError, did_you_mean
from tombola.inputs import OwnStep, Tensors, count_examples
from tombola.kernels import Loss
from tombola.training.metrics import IGNORED
from tombola.training.recipe import Recipe


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error over all numbers.

    Raises:
        UserError: if outputs and targets differ in shape, where torch would compare each output with each target.

    >>> import torch
    >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    return functional.mse_loss(outputs, _like(outputs, targets))


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute error over all numbers.

    Raises:
        UserError: if outputs and targets differ in shape.

    >>> import torch
    >>> mae(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1.)
    """
    return functional.l1_loss(outputs, _like(outputs, targets))


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over all numbers of e^2 / 2 for errors up to 1, and of |e| - 1/2 beyond.

    Raises:
        UserError: if outputs and targets differ in shape.

    >>> import torch
    >>> huber(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(0.7500)
    """
    return functional.huber_loss(outputs, _like(outputs, targets))


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over all numbers of the cross-entropy of sigmoid(output) and a target in 0..1.

    Raises:
        UserError: if outputs and targets differ in shape.

    >>> import torch
    >>> binary_cross_entropy(torch.tensor([0.0]), torch.tensor([1]))
    tensor(0.6931)
    """
    return functional.binary_cross_entropy_with_logits(outputs, _like(outputs, targets))


LOSSES: dict[str, Loss] = {
    "cross_entropy": functional.cross_entropy,
    "mse": mse,
    "mae": mae,
    "huber": huber,
    "binary_cross_entropy": binary_cross_entropy,
}
"""The built-in losses by name. Outputs of `binary_cross_entropy` are logits, those of `cross_entropy` too."""


def are_positions(targets: Tensors, loss: Loss) -> TypeGuard[Tensor]:
    """Return whether a loss is a mean over those targets that it does not ignore, as cross-entropy of classes is.

    >>> are_positions(torch.tensor([[1, IGNORED]]), functional.cross_entropy)
    True
    """
    return loss is functional.cross_entropy and isinstance(targets, Tensor) and not targets.is_floating_point()


def count_positions(loss: Loss, targets: Tensors) -> int:
    """Return the number of positions over which a loss is a mean, see `are_positions`; else that of the examples.

    >>> count_positions(functional.cross_entropy, torch.tensor([[1, IGNORED], [2, 0]]))
    3
    >>> count_positions(mse, torch.ones(2, 5))
    2
    """
    return int((targets != IGNORED).sum()) if are_positions(targets, loss) else count_examples(targets)


def find_loss(name: str) -> Loss:
    """Return a built-in loss; raise `UserError` if there is none of this name.

    >>> find_loss("mse") is mse
    True
    """
    if name not in LOSSES:
        raise UserError(f"loss: unknown loss {name!r}; {did_you_mean(name, LOSSES)} (or give a function of your own)")
    return LOSSES[name]


def training_loss(recipe: Recipe, loss: Loss, step: OwnStep | None = None) -> Loss:
    """Return the loss that training minimises: `loss`, with the recipe's label smoothing.

    Raises:
        UserError: if the recipe asks for label smoothing of another loss than cross-entropy.
    """
    if not recipe.label_smoothing:
        return loss
    if loss is not functional.cross_entropy or step is not None:
        own = "a step of your own" if step is not None else "the loss is another"
        raise UserError(f"recipe.label_smoothing: it is for the loss cross_entropy, and here {own}; remove it")
    return functools.partial(functional.cross_entropy, label_smoothing=recipe.label_smoothing)


def describe_misfit(loss: Loss, targets: Tensor) -> str | None:
    """Return why a built-in loss cannot take the targets of a split; None if nothing is known against it.

    >>> import torch
    >>> describe_misfit(binary_cross_entropy, torch.tensor([0.0, 2.0]))
    'it needs targets in 0..1, got 0..2'
    >>> describe_misfit(binary_cross_entropy, torch.tensor([-1.0, 1.0]))
    'it needs targets in 0..1, got -1..1'
    >>> describe_misfit(functional.cross_entropy, torch.tensor([[0.0, 1.0]])) is None
    True
    >>> describe_misfit(mse, torch.tensor([[1.0, 2.0], [1.0, float("nan")]]))
    'the target of example 1 is NaN or infinite; leave the example out, or give a loss of your own'
    """
    if loss in LOSSES.values() and targets.is_floating_point() and not targets.isfinite().all():
        first = int((~targets.isfinite()).flatten(1).any(1).nonzero()[0]) if targets.ndim > 1 else None
        first = int((~targets.isfinite()).nonzero()[0]) if first is None else first
        return f"the target of example {first} is NaN or infinite; leave the example out, or give a loss of your own"
    if (
        loss is functional.cross_entropy
        and targets.dtype != torch.int64
        and (targets.ndim == 1 or not targets.is_floating_point())
    ):
        return f"it needs class numbers (int64) as targets, got {targets.dtype}; choose another loss, such as mse"
    if loss is functional.cross_entropy and targets.is_floating_point() and (least := float(targets.min())) < 0:
        return f"it needs class numbers, or probabilities of the classes, and a target is {least:g}; mse is for numbers"
    if loss is binary_cross_entropy and not targets.is_complex():
        low, high = float(targets.min()), float(targets.max())
        if low < 0 or high > 1:
            return f"it needs targets in 0..1, got {low:g}..{high:g}"
    return None


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the type of the outputs; raise `UserError` unless there is one for each output."""
    if outputs.shape != targets.shape:
        raise UserError(
            f"it needs one output for each target, got outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}; give one of them the shape of the other"
        )
    return targets.to(outputs.dtype)

"""Trial: a network and a loss on a few examples, so that a mistake is found before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset
from tombola.errors import UserError
from tombola.exits import attribute_failure
from tombola.streams import ambient
from tombola.training.batches import batches, normalisation
from tombola.training.evaluation import Loss
from tombola.training.recipe import Recipe

Result = TypeVar("Result")


def try_network(
    build: Callable[[], nn.Module], loss: Loss, data: Dataset, recipe: Recipe, *, model_name: str, loss_name: str
) -> None:
    """Raise `UserError` if a network, a loss and a data set do not work together.

    The check runs a forward and a backward pass on the smallest batch of the training (at most two examples), then a
    forward pass on two examples of the test set.

    Args:
        build: a function that returns the network.
        loss: a function of outputs and labels that returns the mean over the batch.
        data: the data set.
        recipe: the hyperparameters of the training.
        model_name, loss_name: what network and loss are called in messages.
    """
    last = len(data.train_inputs) % recipe.batch_size or recipe.batch_size
    inputs, labels = next(batches(data, recipe.model_copy(update={"batch_size": min(2, last)}), 0, 0, 1))
    with ambient(0):
        model = build()
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{model_name}: its initial {name!r} is not finite (NaN or infinite)")
        outputs = _outputs(model, inputs, data, model_name)
        value: Any = guard(loss_name, partial(loss, outputs, labels))()
        if not isinstance(value, Tensor) or value.shape != ():
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{loss_name}: expected one number, the mean over the batch, got {got}")
        what = f"{loss_name}: at the first step, with the initial weights of {model_name.removeprefix('task.model ')}"
        if not value.isfinite():
            wrong = "" if outputs.isfinite().all() else ", as are outputs of the model"
            raise UserError(f"{what}, the loss is NaN or infinite{wrong}: every training would diverge")
        guard(f"{loss_name}: going backward", value.backward)()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None and not (gradient.to_dense() if gradient.is_sparse else gradient).isfinite().all():
                raise UserError(f"{what}, the gradient of {name!r} is NaN or infinite: every training would diverge")
        with torch.no_grad():
            outputs = _outputs(model.eval(), normalisation(data)(data.test_inputs[:2].clone()), data, model_name)
        if outputs.isnan().any():
            raise UserError(f"{model_name}: in evaluation mode, its outputs on the test set are NaN")


def _outputs(model: nn.Module, inputs: Tensor, data: Dataset, name: str) -> Tensor:
    """Return a model's outputs; raise `UserError` unless they have one number for each class."""
    classes = len(data.classes)
    given = f"inputs of shape {tuple(inputs.shape)} from {data.name!r}"
    outputs = guard(f"{name}: on {given} it", partial(model, inputs), Tensor, "a tensor")()
    shape = tuple(outputs.shape)
    if len(shape) != 2 or shape[0] != len(inputs) or shape[1] < classes:
        raise UserError(
            f"{name}: for {given} it should give outputs of shape ({len(inputs)}, {classes}), "
            f"one number for each of the {classes} classes, got shape {shape}"
        )
    return cast(Tensor, outputs)


def guard(
    what: str, function: Callable[..., Result], kind: type | None = None, kind_name: str = ""
) -> Callable[[], Result]:
    """Wrap a function: the result raises `UserError` if the function fails or returns another type than `kind`."""

    def call() -> Result:
        with attribute_failure(what):
            result = function()
            if inspect.iscoroutine(result):
                result.close()  # it is refused below
        if kind is not None and not isinstance(result, kind):
            raise UserError(f"{what.removesuffix(' it')}: expected {kind_name}, got {type(result).__name__}")
        return result

    return call

"""Trial: a network and a loss on a few examples, so that a mistake is found before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset
from tombola.errors import UserError
from tombola.exits import attribute_failure
from tombola.streams import ambient
from tombola.training.batches import batches, normalisation
from tombola.training.evaluation import Loss, measure
from tombola.training.loss_functions import describe_misfit
from tombola.training.metrics import ACCURACY, Metric
from tombola.training.recipe import Recipe

Result = TypeVar("Result")

_TRIED = 64  # examples on which the metrics are tried


def try_network(
    build: Callable[[], nn.Module],
    loss: Loss,
    data: Dataset,
    recipe: Recipe,
    metrics: Sequence[Metric] = (ACCURACY,),
    *,
    model_name: str,
    loss_name: str,
) -> None:
    """Raise `UserError` if a network, a loss, metrics and a data set do not work together.

    The check runs a forward and a backward pass on the smallest batch of the training (at most two examples), then the
    loss and the metrics on a few examples of the test set, and of the validation set if there is one.

    Args:
        build: a function that returns the network.
        loss: a function of outputs and labels that returns the mean over the batch.
        data: the data set.
        recipe: the hyperparameters of the training.
        metrics: the metrics of the trained network.
        model_name, loss_name: what network and loss are called in messages.
    """
    for split in data.splits:
        if misfit := describe_misfit(loss, getattr(data, f"{split}_labels")):
            raise UserError(f"{loss_name}: {misfit} ({split} set of {data.name!r})")
    last = len(data.train_inputs) % recipe.batch_size or recipe.batch_size
    inputs, labels = next(batches(data, recipe.model_copy(update={"batch_size": min(2, last)}), 0, 0, 1))
    with ambient(0):
        model = build()
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{model_name}: its initial {name!r} is not finite (NaN or infinite)")
        of_classes = bool(data.classes) and any(metric.of_classes for metric in metrics)
        outputs = _outputs(model, inputs, data, model_name, of_classes)
        value: Any = _name_loss(loss_name, partial(loss, outputs, labels))
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
        for split in data.splits[1:]:
            few = _spread(data, split)
            with torch.no_grad():
                inputs = normalisation(data)(getattr(few, f"{split}_inputs")[:2].clone())
                outputs = _outputs(model.eval(), inputs, data, model_name, of_classes)
            if outputs.isnan().any():
                raise UserError(f"{model_name}: in evaluation mode, its outputs on the {split} set are NaN")
            values, _ = _name_loss(loss_name, partial(measure, model, few, loss, metrics, split))
            for metric in metrics:
                if values[metric.key] is None:
                    raise UserError(
                        f"task.metrics {metric.name!r}: on a few examples of the {split} set, with the initial weights "
                        f"of {model_name.removeprefix('task.model ')}, it is NaN or infinite"
                    )


def _spread(data: Dataset, split: str) -> Dataset:
    """Return a data set of which a split has only a few examples, at even distances, as examples may be sorted."""
    inputs, labels = f"{split}_inputs", f"{split}_labels"
    count = len(getattr(data, inputs))
    chosen = torch.linspace(0, count - 1, min(count, _TRIED)).long()
    return replace(data, **{name: getattr(data, name)[chosen] for name in (inputs, labels)})


def _name_loss(name: str, compute: Callable[[], Result]) -> Result:
    """Call the loss; put its name before the message of every exception, except for those about metrics."""
    try:
        return guard(name, compute)()
    except UserError as error:
        if str(error).startswith((name, "task.metrics ")):
            raise
        raise UserError(f"{name}: {error}") from error


def _outputs(model: nn.Module, inputs: Tensor, data: Dataset, name: str, of_classes: bool) -> Tensor:
    """Return a model's outputs; raise `UserError` unless they have one number for each class, if they are to."""
    classes = len(data.classes)
    given = f"inputs of shape {tuple(inputs.shape)} from {data.name!r}"
    outputs = guard(f"{name}: on {given} it", partial(model, inputs), Tensor, "a tensor")()
    shape = tuple(outputs.shape)
    if shape[:1] != (len(inputs),):
        raise UserError(
            f"{name}: for {given} its outputs should have {len(inputs)} rows, one for each input, got shape {shape}"
        )
    if not of_classes:
        return cast(Tensor, outputs)
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

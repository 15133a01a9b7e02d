"""Trial: a network and a loss on a few examples, so that a mistake is found before anything is trained."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.datasets.dataset import Dataset
from tombola.errors import UserError
from tombola.exits import attribute_failure
from tombola.inputs import (
    Forward,
    OwnStep,
    Tensors,
    call,
    concatenate,
    convert,
    count_examples,
    describe,
    list_tensors,
    select,
)
from tombola.pruning.eligible import list_shared
from tombola.pruning.mask import Mask
from tombola.pruning.start import check_step
from tombola.streams import ambient
from tombola.training.batches import Batch, batches, device_of, normalisation
from tombola.training.convolutions import sound_convolutions
from tombola.training.evaluation import Loss, measure, predict
from tombola.training.loss_functions import LOSSES, describe_misfit, training_loss
from tombola.training.metrics import ACCURACY, LOSS, Metric, check_names
from tombola.training.optimizer import find_decayed
from tombola.training.own_optimizer import MakeOptimizer, OwnOptimizer, check_optimizer
from tombola.training.recipe import Recipe, Schedule

Result = TypeVar("Result")

_TRIED = 64  # examples on which the metrics are tried


def try_network(
    build: Callable[[], nn.Module],
    loss: Loss,
    data: Dataset,
    recipe: Recipe,
    metrics: Sequence[Metric] = (ACCURACY,),
    *,
    forward: Forward = call,
    step: OwnStep | None = None,
    optimizer: MakeOptimizer | None = None,
    schedule: Schedule | None = None,
    dense: Mask | None = None,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Raise `UserError` if a network, a loss, metrics and a data set do not work together.

    Returns the names of the parameters that are trained and get no gradient, as the loss does not depend on them.

    The check runs a forward and a backward pass on the smallest batch of the training (at most two examples), then the
    loss and the metrics on a few examples of the test set, and of the validation set if there is one.

    Args:
        build: a function that returns the network.
        loss: a function of outputs and labels that returns the mean over the batch.
        data: the data set.
        recipe: the hyperparameters of the training.
        metrics: the metrics of the trained network.
        forward: a function (model, inputs) -> outputs.
        step: a function (model, inputs, labels) -> loss, instead of `forward` and `loss`; None for these.
        optimizer, schedule: the functions that the recipe names, if it names some of the user.
        dense: the mask of the dense network, whose weights the network may not mask itself; None for no check.
        names: what messages call the `model`, the `loss`, the `forward` and the `step`; by default so.
    """
    called = {part: (names or {}).get(part, part) for part in ("model", "loss", "forward", "step")}
    called["outputs"] = called["model" if forward is call else "forward"]
    _check_device(data)
    check_names(metrics)
    if step is None or LOSS in metrics:
        _check_targets(loss, data, called["loss"])
    of_classes = bool(data.classes) and any(metric.of_classes for metric in metrics)
    with ambient(0), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")  # of outputs that would be broadcast
        model = build()
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{called['model']}: its initial {name!r} is not finite (NaN or infinite)")
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        find_decayed(trained, recipe.no_decay, list_shared(model))
        start = {name: each.detach().clone() for name, each in model.named_parameters() if dense and name in dense}
        with sound_convolutions(model, "cpu"):
            tried = _try_step(
                model, loss, data, recipe, forward=forward, step=step, called=called, of_classes=of_classes
            )
        if dense is not None:
            few = _spread(data, "test", 8)

            def evaluate() -> Tensor:
                outputs = predict(model, few, forward).flatten()
                with torch.inference_mode():
                    return torch.cat([forward(model, convert(torch.clone, tried)).float().flatten(), outputs])

            check_step(model, dense, start, guard(called["outputs"], evaluate), called["model"])
        unused = [name for name in trained if model.get_parameter(name).grad is None]
        if ":" in recipe.optimizer and optimizer is not None:
            _try_optimizer(model, optimizer, recipe)
        total = recipe.total_iterations(data.train_examples)
        for iteration in {0, total // 2, total - 1}:
            recipe.lr_at(iteration, data.train_examples, schedule)
        for split in data.splits[1:]:
            _try_evaluation(model, loss, data, split, metrics, forward=forward, called=called, of_classes=of_classes)
    return unused


def _try_step(
    model: nn.Module,
    loss: Loss,
    data: Dataset,
    recipe: Recipe,
    *,
    forward: Forward,
    step: OwnStep | None,
    called: Mapping[str, str],
    of_classes: bool,
) -> Tensors:
    """Try the first step of a training, see `try_network`; the gradients are kept. Return the inputs of the step."""
    minimised, loss_name, finite = training_loss(recipe, loss, step), called["loss"], True
    inputs, labels = _draw_smallest(recipe, data)
    if forward is call and step is None:
        _check_arguments(model, inputs, called["model"])
    value: Any
    before = dict(model.named_parameters())
    with _batch_norm_of_one(model, inputs, recipe, data), _types(model, inputs, called["model"]):
        if step is None:
            outputs = _outputs(partial(forward, model), inputs, data, called["outputs"], of_classes)
            _check_classes_of(outputs, labels, loss, data, loss_name)
            value = _name_loss(loss_name, partial(minimised, outputs, labels))
            _check_mean(minimised, outputs.detach(), labels, value, loss_name)
            finite = bool(outputs.isfinite().all())
        else:
            loss_name = called["step"]
            value = guard(loss_name, partial(step, model, inputs, labels))()
    after = dict(model.named_parameters())
    if changed := [name for name in before | after if before.get(name) is not after.get(name)]:
        raise UserError(
            f"{called['model']}: a step adds, removes or replaces its parameter {changed[0]!r}, and the optimizer goes "
            "on with those that it had; make all parameters when the model is built, and change them in place"
        )
    if not isinstance(value, Tensor) or value.shape != ():
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{loss_name}: expected one number, the mean over the batch, got {got}")
    what = f"{loss_name}: at the first step, with the initial weights of {called['model'].removeprefix('task.model ')}"
    if not value.isfinite():
        wrong = "" if finite else ", as are outputs of the model"
        raise UserError(f"{what}, the loss is NaN or infinite{wrong}: every training would diverge")
    if not value.requires_grad:
        raise UserError(f"{what}, the loss does not depend on any parameter that is trained (requires_grad)")
    guard(f"{loss_name}: going backward", value.backward)()
    if all(parameter.grad is None for parameter in model.parameters()):
        raise UserError(f"{what}, no weight has a gradient: the loss does not depend on the network")
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not (gradient.to_dense() if gradient.is_sparse else gradient).isfinite().all():
            raise UserError(f"{what}, the gradient of {name!r} is NaN or infinite: every training would diverge")
    return inputs


def _check_mean(loss: Loss, outputs: Tensor, labels: Tensors, value: object, name: str) -> None:
    """Raise `UserError` if a loss of the user is a sum over the examples: twice as large for all of them twice."""
    if loss in LOSSES.values() or isinstance(loss, partial) or not isinstance(value, Tensor) or value.shape != ():
        return
    with torch.no_grad():
        again, twice = (
            _name_loss(name, partial(loss, concatenate([outputs] * count), concatenate([labels] * count)))  # type: ignore[arg-type]
            for count in (1, 2)
        )
    if again.isfinite() and again != 0 and torch.isclose(twice, 2 * again, rtol=1e-4, atol=0):
        raise UserError(
            f"{name}: expected the mean over the batch, and it is a sum: for the same examples twice it is twice as "
            f"large, {float(twice):.4g} and not {float(again):.4g}; divide it by the number of examples"
        )


def _try_optimizer(model: nn.Module, optimizer: MakeOptimizer, recipe: Recipe) -> None:
    """Try an optimizer of the user on the gradients of a step; the parameters get their values back."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    values = [parameter.detach().clone() for parameter in trained]
    what = f"recipe.optimizer {recipe.optimizer!r}"
    groups = OwnOptimizer(optimizer, recipe.lr, trained, name=what).groups
    updated = {id(parameter) for group in groups for parameter in group["params"]}
    if left := [name for name, parameter in named.items() if id(parameter) not in updated]:
        raise UserError(
            f"{what}: it does not update {len(left)} of the {len(named)} parameters that it is given, such as "
            f"{left[0]!r}; give all to the optimizer, or let the model set requires_grad = False for those that stay"
        )
    check_optimizer(optimizer, recipe.lr, trained, what)
    with torch.no_grad():
        for parameter, before in zip(trained, values, strict=True):
            parameter.copy_(before)


def _try_evaluation(
    model: nn.Module,
    loss: Loss,
    data: Dataset,
    split: str,
    metrics: Sequence[Metric],
    *,
    forward: Forward,
    called: Mapping[str, str],
    of_classes: bool,
) -> None:
    """Try the loss and the metrics on a few examples of a split, see `try_network`."""
    few = _spread(data, split)
    with torch.no_grad():
        inputs = normalisation(data)(convert(torch.clone, select(getattr(few, f"{split}_inputs"), slice(2))))
        copies = convert(torch.clone, inputs)  # a model may change its inputs
        outputs = _outputs(lambda given: forward(model.eval(), given), copies, data, called["outputs"], of_classes)
        repeated = forward(model, convert(torch.clone, inputs))
    equal = guard(called["outputs"], lambda: torch.equal(outputs.nan_to_num(), repeated.nan_to_num()))
    if not equal():  # outputs of a class of the user may fail here
        raise UserError(
            f"{called['model']}: in evaluation mode, it gives different outputs in two calls for the same inputs; "
            f"draw random numbers only while it is in training mode (self.training)"
        )
    if outputs.isnan().any():
        raise UserError(f"{called['model']}: in evaluation mode, its outputs on the {split} set are NaN")
    compute = partial(measure, model, few, loss, metrics, split, forward)
    (values, _), (again, _) = (_name_loss(called["loss"], compute) for _ in range(2))
    for metric in metrics:
        if values[metric.key] != again[metric.key]:
            raise UserError(
                f"task.metrics {metric.name!r}: it gives different values in two calls, for the same outputs and "
                f"targets: {values[metric.key]} and {again[metric.key]}; draw random numbers with a fixed seed"
            )
        if values[metric.key] is None:
            raise UserError(
                f"task.metrics {metric.name!r}: on a few examples of the {split} set, with the initial weights "
                f"of {called['model'].removeprefix('task.model ')}, it is NaN or infinite"
            )


def spread(count: int, most: int) -> Tensor:
    """Return at most so many of the indices 0..count-1, at even distances, with the first and the last.

    >>> spread(10, 4).tolist(), spread(2, 4).tolist()
    ([0, 3, 6, 9], [0, 1])
    """
    number = min(count, most)
    return torch.tensor([index * (count - 1) // max(1, number - 1) for index in range(number)], dtype=torch.int64)


def _spread(data: Dataset, split: str, most: int = _TRIED) -> Dataset:
    """Return a data set of which a split has only a few examples, at even distances, as examples may be sorted."""
    inputs, labels = f"{split}_inputs", f"{split}_labels"
    count = data.count(split)
    chosen = spread(count, most)
    parts: dict[str, Any] = {name: select(getattr(data, name), chosen) for name in (inputs, labels)}
    return replace(data, **parts)


def _name_loss(name: str, compute: Callable[[], Result]) -> Result:
    """Call the loss; put its name before the message of every exception, except for those about metrics."""
    try:
        return guard(name, compute)()
    except UserError as error:
        if str(error).startswith((name, "task.metrics ")):
            raise
        raise UserError(f"{name}: {error}") from error


def _check_targets(loss: Loss, data: Dataset, name: str) -> None:
    """Raise `UserError` if a built-in loss cannot take the targets of a split."""
    for split in data.splits:
        targets = getattr(data, f"{split}_labels")
        if isinstance(targets, Tensor) and (misfit := describe_misfit(loss, targets)):
            raise UserError(f"{name}: {misfit} ({split} set of {data.name!r})")


def _draw_smallest(recipe: Recipe, data: Dataset) -> Batch:
    """Return a batch as small as the smallest of a training, of at most two examples."""
    last = 0 if recipe.drop_last else data.train_examples % recipe.batch_size
    size = min(2, last or recipe.batch_size)
    if data.drawn is None:
        return next(batches(data, recipe.model_copy(update={"batch_size": size, "accumulate": 1}), 0, 0, 1))
    inputs, labels = next(batches(data, recipe, 0, 0, 1))
    return select(inputs, slice(size)), select(labels, slice(size))


def _check_device(data: Dataset) -> None:
    """Raise `UserError` unless the data are on the CPU, where models are built and tried out."""
    if device_of(data).type != "cpu":
        raise UserError(
            f"data set {data.name!r}: its tensors are on the device {str(device_of(data))!r}; load them on 'cpu', a "
            f"training on a GPU copies them there"
        )


def _check_arguments(model: nn.Module, inputs: Tensors, name: str) -> None:
    """Raise `UserError` if a model does not take several inputs, by position or by name."""
    if isinstance(inputs, Tensor):
        return
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # it is not written in Python
        return
    try:
        call(signature.bind, inputs)
    except TypeError as error:
        given = ", ".join(map(repr, inputs)) if isinstance(inputs, dict) else f"{len(inputs)} tensors"
        raise UserError(
            f"{name}: its forward does not take the inputs of the data set: {error}; it takes "
            f"{', '.join(signature.parameters) or 'nothing'}, and the inputs are {given}"
        ) from error


@contextmanager
def _batch_norm_of_one(model: nn.Module, inputs: Tensors, recipe: Recipe, data: Dataset) -> Iterator[None]:
    """Say in a sentence that batch norm cannot train on a batch of one example, if it fails for this reason."""
    try:
        yield
    except UserError as error:
        if "Expected more than 1 value per channel" not in str(error) or count_examples(inputs) > 1:
            raise
        raise UserError(
            f"recipe.batch_size: batches of {recipe.batch_size} of the {data.train_examples} training examples of "
            f"{data.name!r} leave a last batch of one example, of which batch norm has no variance; set "
            f"recipe.drop_last = true, or choose another batch size"
        ) from error


@contextmanager
def _types(model: nn.Module, inputs: Tensors, name: str) -> Iterator[None]:
    """Say in a sentence that weights and inputs have different types, such as float64 and float32, if a step fails."""
    try:
        yield
    except UserError as error:
        every = {each.dtype for each in list_tensors(inputs).values()}
        given = {each for each in every if each.is_floating_point} or every
        own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if "dtype" not in str(error) or not given or not own or given == own:
            raise
        ours, theirs = (
            " and ".join(sorted(str(each).removeprefix("torch.") for each in some)) for some in (own, given)
        )
        raise UserError(
            f"{name}: its parameters are {ours} and the inputs of the data set {theirs}; convert them to "
            f"float32, by model.float() or tensor.float()"
        ) from error


def _check_classes_of(outputs: Tensor, labels: Tensors, loss: Loss, data: Dataset, name: str) -> None:
    """Raise `UserError` if a target of cross-entropy is the number of a class for which there is no output."""
    if loss is not functional.cross_entropy:
        return
    if outputs.dim() < 2:
        raise UserError(
            f"{name}: it needs outputs of shape (examples, classes), got shape {tuple(outputs.shape)}; for one number "
            "of each example, choose binary_cross_entropy or mse"
        )
    if outputs.dim() > 2 and isinstance(labels, Tensor) and tuple(outputs.shape[:-1]) == tuple(labels.shape):
        raise UserError(
            f"{name}: cross-entropy takes the classes as the second dimension, and in outputs of shape "
            f"{tuple(outputs.shape)} for targets of shape {tuple(labels.shape)} they are the last; let the network "
            f"return outputs.transpose(1, 2) for outputs of three dimensions"
        )
    shape = tuple(outputs.shape)
    numbers = shape[0], *shape[2:]
    if isinstance(labels, Tensor) and tuple(labels.shape) != (shape if labels.is_floating_point() else numbers):
        advice = ""
        if tuple(labels.shape) == shape:
            advice = "; targets in one-hot coding become class numbers by targets.argmax(1)"
        elif labels.numel() == math.prod(numbers):
            advice = f"; targets.reshape({(-1, *numbers[1:])}) gives them this shape"
        raise UserError(
            f"{name}: for outputs of shape {shape} it needs class numbers (int64) of shape {numbers}, or "
            f"probabilities of the classes, got targets of shape {tuple(labels.shape)} and type {labels.dtype}{advice}"
        )
    if data.classes:
        return
    ignored, count = -100, outputs.shape[1]
    for split in data.splits:
        labels = getattr(data, f"{split}_labels")
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            wrong = ((labels < 0) & (labels != ignored)) | (labels >= count)
            if wrong.any():
                raise UserError(
                    f"{name}: target {int(labels[wrong][0])} of example {int(wrong.nonzero()[0][0])} of the {split} "
                    f"set is out of range, expected 0..{count - 1} for outputs of shape {tuple(outputs.shape)}"
                )


def _outputs(
    forward: Callable[[Tensors], Tensor], inputs: Tensors, data: Dataset, name: str, of_classes: bool
) -> Tensor:
    """Return a model's outputs; raise `UserError` unless they fit the examples, and the classes if they are to."""
    examples, classes = count_examples(inputs), len(data.classes)
    given = f"inputs of {describe(inputs)} from {data.name!r}"
    outputs: Any = guard(f"{name}: on {given} it", partial(forward, inputs))()
    if not isinstance(outputs, Tensor):
        raise UserError(
            f"{name}: on {given}: expected a tensor, got {_describe_outputs(outputs)}; name a function "
            f"(model, inputs) -> tensor as the task's forward"
        )
    check_dense(outputs, f"{name}: on {given}")
    shape = tuple(outputs.shape)
    if of_classes and (len(shape) != 2 or shape[0] != examples or shape[1] < classes):
        raise UserError(
            f"{name}: for {given} it should give outputs of shape ({examples}, {classes}), "
            f"one number for each of the {classes} classes, got shape {shape}"
        )
    if not shape or shape[0] != examples:
        raise UserError(
            f"{name}: for {given} it should give outputs whose first dimension counts the {examples} examples, "
            f"got shape {shape}"
        )
    return outputs


def check_dense(outputs: Tensor, what: str) -> None:
    """Raise `UserError` if a model's outputs are nested, sparse or without values; the message begins with `what`."""
    kind = "nested" if outputs.is_nested else "sparse" if outputs.layout is not torch.strided else ""
    if outputs.is_meta or kind:
        raise UserError(f"{what}: expected a dense tensor with values, got one that is {kind or 'on device meta'}")


def _describe_outputs(outputs: object) -> str:
    """Return what a model gave instead of a tensor, with the names of what is in it."""
    kind = type(outputs).__name__
    if isinstance(outputs, Mapping):
        return f"{kind} of {', '.join(map(repr, outputs))}"
    return f"{kind} of {len(outputs)}" if isinstance(outputs, tuple | list) else kind


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

"""Problem: the loaded data set, model and loss of a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn import functional

from tombola import datasets, models
from tombola.datasets.dataset import Dataset
from tombola.errors import UserError, did_you_mean
from tombola.importance import Importance, as_importance, find
from tombola.study.functions import resolve, source_hash
from tombola.study.schema import Study, Task
from tombola.training.evaluation import Loss
from tombola.training.train import check_device, check_recipe_fits
from tombola.training.trial import guard, try_network

BUILT_IN = 1
"""Version of the built-in models and losses as a part of a training's name: increase it if their outputs change."""


@dataclass(frozen=True)
class Problem:
    """The loaded data set, model and loss of a task.

    Args:
        data: the data set.
        build: a function that builds the model; its random numbers come from torch's global generator.
        loss: a function of outputs and labels that returns the mean over the batch.
        identity: a document of JSON types that identifies all of these; it is a part of the name of a training.

    >>> load_problem(Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64})).data.input_shape
    (1, 8, 8)
    """

    data: Dataset
    build: Callable[[], nn.Module]
    loss: Loss
    identity: Mapping[str, Any]


def load_problem(task: Task, directory: Path | None = None) -> Problem:
    """Load the data set, model and loss that a task names.

    Args:
        task: the names and arguments of data set, model and loss.
        directory: the folder of the data sets.

    Raises:
        UserError: if something cannot be found or loaded; the message names the field.

    >>> load_problem(Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64})).data.name
    'digits'
    """
    data = _load_data(task, directory)
    model, model_identity = _function("model", task.model, models.MODELS, task.model_arguments)
    build = guard(f"task.model {task.model!r}", model, nn.Module, "a torch module")
    loss, loss_identity = _function("loss", task.loss, {"cross_entropy": functional.cross_entropy}, {})
    identity = {"data": data.fingerprint, "model": model_identity, "loss": loss_identity}
    return Problem(data, build, loss, identity)


def resolve_importance(name: str) -> Importance:
    """Return the importance that has this name or that `module:function` refers to.

    Raises:
        UserError: if there is no such importance.

    >>> resolve_importance("l1").name
    'l1'
    """
    if ":" in name:
        return as_importance(resolve(name, "importance"))
    try:
        return find(name)
    except UserError as error:
        raise UserError(f"importances: {error} (or give module:function of your own)") from None


def try_out(problem: Problem, study: Study) -> None:
    """Raise `UserError` if data, model, loss and recipe do not work together.

    The check runs a forward and a backward pass on the smallest batch of the training (at most two examples), then a
    forward pass on two examples of the test set.
    """
    task, recipe, data = study.task, study.recipe, problem.data
    check_recipe_fits(recipe, data)
    check_device(study.device)
    names = {"model_name": f"task.model {task.model!r}", "loss_name": f"task.loss {task.loss!r}"}
    try_network(problem.build, problem.loss, data, recipe, **names)


def _load_data(task: Task, directory: Path | None) -> Dataset:
    what = f"task.dataset {task.dataset!r}"
    if ":" not in task.dataset:
        return guard(what, partial(datasets.load, task.dataset, directory, **task.dataset_arguments))()
    function = _call(what, resolve(task.dataset, "task.dataset"), task.dataset_arguments)
    data: Dataset = guard(what, function, Dataset, "a tombola.Dataset")()
    return data


def _function(
    field: str, name: str, known: Mapping[str, Callable[..., Any]], arguments: Mapping[str, Any]
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """Return the function that a field of the task names, with its arguments bound, and its identity."""
    identity: dict[str, Any] = {"name": name, "arguments": dict(arguments)}
    if ":" in name:
        function = resolve(name, f"task.{field}")
        identity["source"] = source_hash(name)
    elif name in known:
        function = known[name]
        identity["version"] = BUILT_IN
    else:
        raise UserError(
            f"task.{field}: unknown {field} {name!r}; {did_you_mean(name, known)} (or give module:function of your own)"
        )
    return _call(f"task.{field} {name!r}", function, arguments) if arguments else function, identity


def _call(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Bind these arguments to the function; raise `UserError` if it does not accept them."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions that are not written in Python have no signature
        return partial(function, **arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no arguments"
        given = ", ".join(f"{name} = {value!r}" for name, value in arguments.items()) or "none"
        raise UserError(f"{what}: {error}; it takes {takes}, its arguments in the study: {given}") from error
    return partial(function, **arguments)

"""Problem: a task's data set, model and loss, loaded; what a training works on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tombola import datasets, models
from tombola.batches import batches
from tombola.datasets.dataset import Dataset
from tombola.errors import UserError, did_you_mean
from tombola.importance import IMPORTANCES, Importance
from tombola.references import resolve, source_hash
from tombola.streams import ambient
from tombola.study import Study, Task
from tombola.training import Loss, check

BUILT_IN = 1
"""Version of the built-in models and losses as a part of a training's name: to be raised where their outputs change."""


@dataclass(frozen=True)
class Problem:
    """A task, loaded.

    Args:
        data: the data set.
        build: makes the model; its random numbers come from torch's own generator.
        loss: of outputs and labels.
        identity: all of these as JSON's types, for a training's name.
    """

    data: Dataset
    build: Callable[[], nn.Module]
    loss: Loss
    identity: Mapping[str, Any]


def load_problem(task: Task, directory: Path | None = None) -> Problem:
    """Load the data set, model and loss that a task names.

    Args:
        task: see `Task`.
        directory: where data sets lie.

    Raises:
        UserError: naming the field, where something cannot be found or loaded.

    >>> load_problem(Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64})).data.name
    'digits'
    """
    data = _load_data(task, directory)
    build, model_identity = _function("model", task.model, models.MODELS, task.model_arguments)
    loss, loss_identity = _function("loss", task.loss, {"cross_entropy": functional.cross_entropy}, {})
    identity = {"data": data.fingerprint, "model": model_identity, "loss": loss_identity}
    return Problem(data, build, loss, identity)


def resolve_importance(name: str) -> Importance:
    """Return the importance that a name or `module:function` means.

    Raises:
        UserError: where there is none.

    >>> resolve_importance("l1").__name__
    'l1'
    """
    if ":" in name:
        return resolve(name, "importance")
    if name not in IMPORTANCES:
        raise UserError(
            f"unknown importance {name!r}; {did_you_mean(name, IMPORTANCES)} (or give module:function of your own)"
        )
    return IMPORTANCES[name]


def try_out(problem: Problem, study: Study) -> None:
    """Raise `UserError` where data, model, loss and recipe do not work together, before anything is trained.

    One small batch goes forward and backward.
    """
    check(study.recipe, problem.data)
    if study.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' was asked for, and torch finds no GPU here; use --device cpu")
    few = study.recipe.model_copy(update={"batch_size": min(2, len(problem.data.train_inputs))})
    inputs, labels = next(batches(problem.data, few, 0, 0, 1))
    task = study.task
    with ambient(0):
        try:
            model = problem.build()
        except Exception as error:
            raise UserError(f"task.model {task.model!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise UserError(f"task.model {task.model!r}: expected a torch module, got {type(model).__name__}")
        shape = tuple(inputs.shape)
        try:
            outputs = model(inputs)
        except Exception as error:
            raise UserError(
                f"task.model {task.model!r} fails on inputs of shape {shape} from {problem.data.name!r}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        classes = len(problem.data.classes)
        if task.loss == "cross_entropy" and (outputs.ndim != 2 or outputs.shape[1] < classes):
            raise UserError(
                f"task.model {task.model!r} gives outputs of shape {tuple(outputs.shape)} for inputs of shape {shape}, "
                f"expected ({len(inputs)}, {classes}): one number for each of the {classes} classes"
            )
        try:
            problem.loss(outputs, labels).backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            raise UserError(
                f"task.loss {task.loss!r} fails on outputs of shape {tuple(outputs.shape)}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error


def _load_data(task: Task, directory: Path | None) -> Dataset:
    if ":" not in task.dataset:
        return datasets.load(task.dataset, directory, **task.dataset_arguments)
    data = _call(f"task.dataset {task.dataset!r}", resolve(task.dataset, "task.dataset"), task.dataset_arguments)()
    if not isinstance(data, Dataset):
        raise UserError(f"task.dataset {task.dataset!r}: expected a tombola.Dataset, got {type(data).__name__}")
    return data


def _function(
    field: str, name: str, known: Mapping[str, Callable[..., Any]], arguments: Mapping[str, Any]
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """Return the function that a field of the task names, with its arguments, and its identity."""
    identity: dict[str, Any] = {"name": name, "arguments": dict(arguments)}
    if ":" in name:
        function = resolve(name, f"task.{field}")
        identity["source"] = source_hash(name)
    elif name in known:
        function = known[name]
        identity["version"] = BUILT_IN
    else:
        raise UserError(f"task.{field}: unknown {field} {name!r}; {did_you_mean(name, known)}")
    return _call(f"task.{field} {name!r}", function, arguments) if arguments else function, identity


def _call(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function with its arguments, which must be its own."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{what}: its arguments {dict(arguments)} do not fit: {error}") from error
    return partial(function, **arguments)

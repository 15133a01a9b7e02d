"""Problem: the loaded data set, model and loss of a task."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import datasets, models
from tombola.datasets.dataset import Dataset
from tombola.errors import UserError, did_you_mean, short
from tombola.importance import Importance, NetworkScore, as_importance, find
from tombola.importance.importances import find_normalisation, find_score
from tombola.study.code import steady_source
from tombola.study.functions import is_here, resolve, source_hash
from tombola.study.schema import Study, Task
from tombola.training.evaluation import Loss
from tombola.training.train import check_device, check_recipe_fits
from tombola.training.trial import guard, try_network

COPIES = 4
"""A training keeps weights, gradients, initial weights and trained weights of a network, if not more."""

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
    with steady_source([name for name in task.own_code if not is_here(name)]):
        data = load_data(task, directory)
        model, model_identity = _function("model", task.model, models.MODELS, task.model_arguments)
        loss, loss_identity = _function("loss", task.loss, {"cross_entropy": functional.cross_entropy}, {})
    build = _checked(f"task.model {task.model!r}", model)
    if task.model in models.MODELS:
        _check_memory(task.model, build)
    identity = {"data": data.fingerprint, "model": model_identity, "loss": loss_identity}
    return Problem(data, build, loss, identity)


def resolve_importance(name: str) -> Importance:
    """Return the importance that has this name, or whose score or normalisation is a function of the user.

    These names are possible: a name or a pair `score/normalisation` that `tombola.importance.find` knows; such a pair
    in which `module:function` takes the place of the score or of the normalisation; and `module:function` alone, which
    is a `NetworkScore` or an `Importance`, or else a function of a layer's absolute weights.

    Raises:
        UserError: if there is no such importance.

    >>> resolve_importance("l1").name, resolve_importance("taylor/torch:sqrt").name
    ('l1', 'taylor/sqrt')
    """
    if ":" not in name:
        try:
            return find(name)
        except UserError as error:
            raise UserError(f"importances: {error} (or give module:function of your own)") from None
    score, slash, normalise = name.partition("/")
    if not slash:
        own = resolve(name, "importance")
        return Importance(own) if isinstance(own, NetworkScore) else as_importance(own)
    own = resolve(score, "importance") if ":" in score else find_score(score, name)
    if isinstance(own, Importance):
        raise UserError(f"importance {name!r}: {score!r} is an importance, with a normalisation already; name it alone")
    return Importance(
        own,
        resolve(normalise, "importance") if ":" in normalise else find_normalisation(normalise, name),
    )


def load_importance(name: str) -> tuple[Importance, dict[str, str]]:
    """Return an importance and the hashes of the source code of a user's own score and normalisation, by reference.

    Raises:
        UserError: if there is no such importance, or if its source is not the one that was imported.

    >>> load_importance("l1")[1]
    {}
    """
    own = [reference for reference in name.split("/") if ":" in reference]
    with steady_source([reference for reference in own if not is_here(reference)]):
        return resolve_importance(name), {reference: source_hash(reference) for reference in own}


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


def _check_memory(name: str, build: Callable[[], nn.Module]) -> None:
    """Raise `UserError` if a training of this built-in model needs more memory than this machine has."""
    with torch.device("meta"):  # needs no memory
        parameters = list(build().parameters())
    needed, there = COPIES * sum(parameter.nbytes for parameter in parameters), _memory()
    if needed > there:
        count = sum(parameter.numel() for parameter in parameters)
        raise UserError(
            f"task.model {name!r}: its {count} parameters need about {needed / 1e9:.0f} GB of memory in a training, "
            f"this machine has {there / 1e9:.0f} GB"
        )


def _memory() -> int:
    """Return the memory that this process may use at most, in bytes."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no limit, or none of this kind
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def load_data(task: Task, directory: Path | None = None) -> Dataset:
    """Load the data set that a task names.

    Args:
        task: the task.
        directory: the folder of the data sets.

    Raises:
        UserError: if it cannot be loaded.

    >>> load_data(Task(dataset="digits", model="lenet_300_100")).name
    'digits'
    """
    what = f"task.dataset {task.dataset!r}"
    if ":" not in task.dataset:
        return guard(what, partial(datasets.load, task.dataset, directory, **task.dataset_arguments))()
    function = _call(what, resolve(task.dataset, "task.dataset"), task.dataset_arguments)
    data: Dataset = guard(what, function, Dataset, "a tombola.Dataset")()
    if type(data).fingerprint is not Dataset.fingerprint:
        raise UserError(f"{what}: {type(data).__name__} has a fingerprint of its own, under which any data could be")
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
        given = ", ".join(f"{name} = {short(value)}" for name, value in arguments.items()) or "none"
        raise UserError(f"{what}: {error}; it takes {takes}, its arguments in the study: {given}") from error
    return partial(function, **arguments)


def _checked(what: str, build: Callable[[], object]) -> Callable[[], nn.Module]:
    """Wrap a function that builds a model: it raises `UserError` unless the model's state consists of dense tensors."""

    def build_and_check() -> nn.Module:
        model = cast(nn.Module, guard(what, build, nn.Module, "a torch module")())
        for name, value in guard(what, partial(model.state_dict, keep_vars=True))().items():
            if fault := _fault_of(value):
                raise UserError(f"{what}: {name!r} of its state {fault}")
        return model

    return build_and_check


def _fault_of(value: object) -> str | None:
    """Return what prevents an entry of a state from being stored and trained; None if nothing does."""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}; keep it in a buffer, which is a tensor"
    if torch.nn.parameter.is_lazy(value):
        return "is lazy: its shape is not known before the first batch; give the sizes of the layer"
    if value.is_meta and torch.get_default_device().type != "meta":
        return "is on the device 'meta', where it has no values; build the model on the CPU"
    if value.layout is not torch.strided or value.is_quantized:
        return "is sparse or quantised; expected a dense tensor"
    return None

"""Problem: the loaded data set, model and loss of a task."""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import datasets, models
from tombola.datasets.dataset import Dataset, split_validation
from tombola.datasets.drawn import Drawn
from tombola.datasets.own_batches import dataset_of_batches
from tombola.errors import UserError, did_you_mean, expect, short
from tombola.files import open_regular
from tombola.importance import Importance, NetworkScore, as_importance, find
from tombola.importance.importances import find_normalisation, find_score
from tombola.inputs import Forward, OwnStep, call
from tombola.own.code import steady_source
from tombola.own.functions import is_here, resolve, source_hash
from tombola.pruning.mask import Mask
from tombola.pruning.start import check_registered, check_start
from tombola.store.names import name_of
from tombola.streams import ambient
from tombola.study.depends import identify_all
from tombola.study.schema import Study, Task
from tombola.training.behaviour import Behaviour, observe
from tombola.training.evaluation import Loss
from tombola.training.loss_functions import LOSSES
from tombola.training.metrics import ACCURACY, Measure, Metric, as_metric, check_names
from tombola.training.metrics import find as find_metric
from tombola.training.recipe import Recipe
from tombola.training.train import check_device, check_recipe_fits, initial_state
from tombola.training.trial import guard, try_network
from tombola.training.weights import State, load_state

COPIES = 4
"""A training keeps weights, gradients, initial weights and trained weights of a network, if not more."""

BUILT_IN = 1
"""Version of the built-in models and losses as a part of a training's name: increase it if their outputs change."""


class UnusedWarning(UserWarning):
    """Density counts weights on which the loss does not depend."""


@dataclass(frozen=True)
class Problem:
    """The loaded data set, model and loss of a task.

    Args:
        data: the data set.
        build: a function that builds the model; its random numbers come from torch's global generator.
        loss: a function of outputs and labels that returns the mean over the batch.
        forward: a function (model, inputs) -> outputs; by default it calls the model.
        step: a function (model, inputs, labels) -> loss, which training uses instead; None for forward and loss.
        checkpoint: the initial state of all seeds; None if each seed draws its own.
        identity: a document of JSON types that identifies all of these; it is a part of the name of a training.
        metrics: the metrics, of which the first decides. They are no part of the name of a training: a metric that a
            stored result does not have is computed from its weights.

    >>> load_problem(Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64})).data.input_shape
    (1, 8, 8)
    """

    data: Dataset
    build: Callable[[], nn.Module]
    loss: Loss
    identity: Mapping[str, Any]
    forward: Forward = call
    step: OwnStep | None = None
    checkpoint: State | None = None
    metrics: tuple[Metric, ...] = (ACCURACY,)

    def initial(self, seed: int) -> State:
        """Return the initial state of a seed: that of the checkpoint, or one that is drawn."""
        return initial_state(self.build, seed) if self.checkpoint is None else self.checkpoint

    def begin(self) -> nn.Module:
        """Build the model with the weights of the checkpoint, or else with random ones."""
        model = self.build()
        if self.checkpoint is not None:
            model.load_state_dict(self.checkpoint)
        return model

    @cached_property
    def behaviour(self) -> Behaviour:
        """What the network and the loss compute on a few examples, see `tombola.training.behaviour.observe`."""
        parts = [part for part in ("model", "loss", "forward", "step") if part in self.identity]
        names = {part: f"task.{part} {self.identity[part]['name']!r}" for part in parts}
        return observe(self.begin, self.loss, self.data, forward=self.forward, step=self.step, names=names)

    @property
    def of_classes(self) -> bool:
        """Whether the targets are classes: of examples, or of positions such as the tokens of a text."""
        labels = self.data.test_labels
        whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
        by_use = self.loss is functional.cross_entropy or any(metric.of_classes for metric in self.metrics)
        return bool(self.data.classes) or (whole and by_use)

    @property
    def measure(self) -> Measure:
        """What tickets are judged by: the first metric, on the validation set if there is one, else on the test set."""
        return self.metrics[0].on(self.data.judged_on)

    @property
    def measures(self) -> list[Measure]:
        """All metrics on all splits that are evaluated, the one that tickets are judged by first."""
        splits = dict.fromkeys((self.data.judged_on, "test"))
        return [metric.on(split) for split in splits for metric in self.metrics]


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
    expect(task, Task, "task", "a tombola.Task")
    with steady_source([name for name in task.own_code if not is_here(name)]):
        data = load_data(task, directory)
        model, model_identity = _function("model", task.model, models.MODELS, task.model_arguments)
        loss, loss_identity = _function("loss", task.loss, LOSSES, {})
        metrics = tuple(_load_metric(name) for name in task.metrics)
        own = {
            field: _function(field, name, {}, {})
            for field, name in (("forward", task.forward), ("step", task.step))
            if name is not None
        }
    check_names(metrics)
    if task.model in models.MODELS:
        _check_memory(task.model, model)
    build = _checked(f"task.model {task.model!r}", model)
    identity: dict[str, Any] = {"data": data.fingerprint, "model": model_identity, "loss": loss_identity}
    identity |= {field: about for field, (_, about) in own.items()}
    if task.depends:
        identity["depends"] = identify_all(task.depends)
    functions = {field: function for field, (function, _) in own.items()}
    checkpoint = None if task.checkpoint is None else _load_checkpoint(task.checkpoint, build)
    return Problem(data, build, loss, identity, **functions, checkpoint=checkpoint, metrics=metrics)


def _load_checkpoint(path: str, build: Callable[[], nn.Module]) -> State:
    """Return the complete state of a model from a safetensors file; of tied weights, the file may hold one name.

    Raises:
        UserError: if the file cannot be read, is another kind of file, or does not fit the model.
    """
    where = f"task.checkpoint {path!r}"
    try:
        with open_regular(Path(path)) as file:
            begins = file.read(4)
    except (OSError, ValueError) as error:  # ValueError: the path has a null character
        raise UserError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        state = safetensors.torch.load_file(path)  # maps the file into memory, whatever its size is
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        if begins.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(
                f"{where}: it is a pickled file, which may run any code when it is read; if you trust it, convert: "
                f'safetensors.torch.save_file(torch.load("file.pt", weights_only=True), "file.safetensors")'
            ) from error
        raise UserError(f"{where}: it is not a safetensors file: {error}") from error
    with ambient(0):
        model = build()
    tied: dict[int, Tensor] = {}
    own = model.state_dict()
    for name in own.keys() & state.keys():
        if own[name].numel():
            tied[own[name].data_ptr()] = state[name]
    state |= {
        name: tied[each.data_ptr()] for name, each in own.items() if name not in state and each.data_ptr() in tied
    }
    load_state(model, state, where)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _load_metric(name: str) -> Metric:
    """Return a metric by its name, or a user's own by its reference; its key has the hash of its source."""
    if ":" not in name:
        try:
            return find_metric(name)
        except UserError as error:
            raise UserError(f"task.metrics: {error} (or give module:function of your own)") from None
    if name.startswith("torchmetrics") and importlib.util.find_spec("torchmetrics") is None:
        raise UserError(f"task.metrics {name!r}: torchmetrics is not installed: pip install 'tombola[metrics]'")
    function = resolve(name, "task.metrics")
    label = str(getattr(function, "__name__", None) or name.rpartition(":")[2]).replace("<lambda>", "metric")
    try:
        return as_metric(function, label, f"{name} {source_hash(name)[:16]}")
    except UserError as error:
        raise UserError(f"task.metrics {name!r}: {error}") from error


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


def load_recipe(recipe: Recipe) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Return the user's own optimizer and schedule that a recipe names, and the hashes of their source, by field.

    Raises:
        UserError: if there is no such function, or if its source is not the one that was imported.

    >>> load_recipe(Recipe(epochs=1))
    ({}, {})
    """
    own = recipe.own_code
    with steady_source([name for name in own.values() if not is_here(name)]):
        functions = {field: resolve(name, f"recipe.{field}") for field, name in own.items()}
        return functions, {field: source_hash(name) for field, name in own.items()}


def try_out(problem: Problem, study: Study) -> None:
    """Raise `UserError` if data, model, loss and recipe do not work together, or if the model does not start dense.

    The check runs a forward and a backward pass on the smallest batch of the training (at most two examples), then a
    forward pass on two examples of the test set.

    Warns:
        UnusedWarning: if the loss does not depend on a weight that density counts.
    """
    task, recipe, data = study.task, study.recipe, problem.data
    check_recipe_fits(recipe, data)
    check_device(study.device)
    named = {field: getattr(task, field) for field in ("model", "loss", "forward", "step")}
    names = {field: f"task.{field} {name!r}" for field, name in named.items() if name is not None}
    functions, _ = load_recipe(recipe)
    with ambient(0):
        model = problem.begin()
    dense = Mask.ones_like(model, study.exclude, study.prune)
    check_start(model, dense, study.prune, names["model"])
    if data.drawn is not None:
        _check_drawn(data, data.drawn, study)
    unused = try_network(
        problem.begin,
        problem.loss,
        data,
        recipe,
        names=names,
        optimizer=functions.get("optimizer"),
        schedule=functions.get("schedule"),
        forward=problem.forward,
        step=problem.step,
        metrics=problem.metrics,
        dense=dense,
    )
    for name in unused:
        if name in dense:
            warnings.warn(
                f"{names['model']}: the loss does not depend on {name!r} in the step that was tried out, and density "
                f"counts it; if it never does, leave it out: exclude = [{name!r}]",
                UnusedWarning,
                stacklevel=2,
            )


def _check_drawn(data: Dataset, drawn: Drawn, study: Study) -> None:
    """Raise `UserError` unless another epoch has as many batches, and scores see as many examples as they should."""
    for _ in drawn.epoch(seed=1, epoch=1):
        pass
    if data.held_examples < min(study.score_examples, data.train_examples):
        raise UserError(
            f"score_examples: {study.score_examples} are more than the {data.held_examples} examples that are kept of "
            f"{data.name!r}, whose batches are drawn"
        )


def _check_memory(name: str, build: Callable[[], nn.Module]) -> None:
    """Raise `UserError` if a training of this built-in model needs more memory than this machine has."""
    with torch.device("meta"):  # needs no memory
        parameters = list(guard(f"task.model {name!r}", build, nn.Module, "a torch module")().parameters())
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
    data: Dataset
    if ":" in task.dataset:
        data = _load_own_data(what, task)
    else:
        data = guard(what, partial(datasets.load, task.dataset, directory, **task.dataset_arguments))()
    return data if task.validation is None else split_validation(data, task.validation)


def _load_own_data(what: str, task: Task) -> Dataset:
    """Return the data set that a function of the user gives, or whose batches it draws."""
    function = _call(what, resolve(task.dataset, "task.dataset"), task.dataset_arguments)
    found: Any = guard(what, function)()
    if isinstance(found, Dataset):
        if type(found).fingerprint is not Dataset.fingerprint:
            raise UserError(
                f"{what}: {type(found).__name__} has a fingerprint of its own, under which any data could be"
            )
        return found
    if not callable(found):
        raise UserError(
            f"{what}: expected a tombola.Dataset, or a function (seed, epoch, split) that gives batches, got "
            f"{type(found).__name__}"
        )
    return dataset_of_batches(task.dataset, found, name_of([source_hash(task.dataset), task.dataset_arguments]))


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
    elif not known:
        raise UserError(f"task.{field}: expected module:function, such as my_module:my_{field}, got {name!r}")
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
        guard(what, partial(check_registered, model, what))()
        for name, value in guard(what, partial(model.state_dict, keep_vars=True))().items():
            if name != name.encode(errors="replace").decode():
                raise UserError(f"{what}: the name {name!a} of its state has half of a character (a surrogate)")
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
    if value.is_meta:
        return "is on the device 'meta', where it has no values; build the model on the CPU"
    if value.layout is not torch.strided or value.is_quantized:
        return "is sparse or quantised; expected a dense tensor"
    if value.is_inference():
        return "was made in torch.inference_mode, so that it cannot be trained; build the model outside of it"
    if any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride(), strict=True)):
        return "has several elements in one place of memory, as after expand; give it a copy of its own (clone)"
    return None

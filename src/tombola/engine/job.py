"""Jobs as a worker receives them, and their outcomes as the worker returns them, both as bytes and plain data.

A job is a training, or a round of pruning whose importance scores the whole network.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from tombola.datasets.dataset import Dataset
from tombola.engine.machine import device_name, machine
from tombola.errors import RoundError, UserError
from tombola.importance import Importance
from tombola.inputs import list_tensors
from tombola.kernels import NoKernelsWarning
from tombola.lottery.rule import Rule
from tombola.pruning.mask import Mask
from tombola.settings import refuse_settings
from tombola.streams import ambient
from tombola.study.rounds import compute_mask
from tombola.study.schema import Study
from tombola.study.task import Problem, load_importance, load_recipe
from tombola.study.trainings import Round, Training
from tombola.training.behaviour import Behaviour, agree, observe_recipe
from tombola.training.history import Checkpoint, History, OnEpoch, Trained, Watch
from tombola.training.recipe import Recipe
from tombola.training.train import train
from tombola.training.weights import Weights

Loaded: TypeAlias = tuple[Importance, Mapping[str, str]]
"""An importance and the hashes of its source, see `tombola.study.task.load_importance`."""

LoadedRecipe: TypeAlias = tuple[Mapping[str, Callable[..., Any]], Mapping[str, str]]
"""The recipe's own functions and the hashes of their source, by field, see `tombola.study.task.load_recipe`."""

_EDITED = "its source was edited after the run began; run the study again"
_PARTS = ("data", "model", "loss", "forward", "step", "depends")
"""The parts of a problem's identity, see `tombola.study.task.Problem`."""


@dataclass(frozen=True)
class Job:
    """The arguments of a training; of the problem, which each worker loads itself, only the identity."""

    key: str
    problem: Mapping[str, Any]
    initial: bytes
    shapes: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, bytes]
    recipe: Mapping[str, Any]
    seed: int
    begin: int
    end: int
    device: str
    sparse: Sequence[str]
    packed: bool
    sources: Mapping[str, str]
    behaviour: Behaviour = ()
    tells_epochs: bool = False

    @classmethod
    def of(cls, training: Training, study: Study, *, tells_epochs: bool = False) -> Job:
        """Make the job for a training of a study; `tells_epochs` says whether the losses of each epoch are reported."""
        return cls(
            training.key,
            {part: training.identity.get(part) for part in _PARTS},
            _state_to_bytes(training.initial),
            training.mask.shapes,
            _mask_to_bytes(training.mask),
            study.recipe.model_dump(),
            training.seed,
            training.begin,
            training.end,
            study.device,
            training.identity["sparse"],
            "packed" in training.identity,
            training.identity.get("sources", {}),
            training.behaviour,
            tells_epochs,
        )


@dataclass(frozen=True)
class RoundJob:
    """The arguments of a round of pruning, except for the problem and the importance, which each worker loads itself.

    Of these, the job has only the identities, which the worker compares with those of what it has loaded.
    """

    key: str
    problem: Mapping[str, Any]
    sources: Mapping[str, str]
    initial: bytes
    shapes: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, bytes]
    study: Study
    rule: Rule
    level: int
    importance: str
    seed: int
    behaviour: Behaviour = ()

    @classmethod
    def of(cls, pruning: Round, study: Study, rule: Rule) -> RoundJob:
        """Make the job for a round of pruning of a study."""
        return cls(
            pruning.key,
            {part: pruning.others["network"].get(part) for part in _PARTS},
            pruning.others.get("sources", {}),
            _state_to_bytes(pruning.weights),
            pruning.mask.shapes,
            _mask_to_bytes(pruning.mask),
            study,
            replace(rule, fraction=pruning.fraction),
            pruning.level,
            pruning.importance,
            pruning.seed,
            pruning.behaviour,
        )


@dataclass(frozen=True)
class Pruned:
    """The result of a round of pruning: the bits of the mask, or the message of the importance's failure."""

    key: str
    shapes: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, bytes] | str

    @property
    def mask(self) -> Mask | str:
        """The mask, or the message of the failure."""
        return self.bits if isinstance(self.bits, str) else _mask_from_bytes(self.shapes, self.bits)


@dataclass(frozen=True)
class Outcome:
    """The result of a job: final state and losses as safetensors, the history, and the record of how it ran."""

    key: str
    state: bytes
    losses: bytes
    history: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def trained(self) -> Trained:
        """The training's result."""
        losses = safetensors.torch.load(self.losses)["losses"]
        return Trained(Weights.of(safetensors.torch.load(self.state)), History.from_json(dict(self.history)), losses)


def perform(
    job: Job,
    problem: Problem,
    resume: Checkpoint | None,
    watch: Watch,
    on_epoch: OnEpoch | None = None,
    own: LoadedRecipe | None = None,
    *,
    watch_every: float = 0.0,
) -> Outcome:
    """Do the training of a job.

    Args:
        job: the training.
        problem: the data set, model, loss and metrics.
        resume: the checkpoint to resume from; None to start at the beginning.
        watch: a function that is called after every iteration, or after several, see `watch_every` of `train`.
        on_epoch: a function that is called after every epoch, if the job tells epochs.
        own: the recipe's own functions and the hashes of their source; by default they are loaded by their names.
        watch_every: as for `train`.

    Raises:
        UserError: if the problem is not the one that the training is named after, or if the user's code fails.
    """
    recipe = Recipe.model_validate(job.recipe)
    functions, sources = own or load_recipe(recipe)
    _check_problem(job, problem, recipe, functions)
    for field in sources:
        if sources[field] != job.sources.get(field):
            raise UserError(f"recipe.{field} {recipe.own_code[field]!r}: {_EDITED}")
    clock = _Clock(watch)
    mask = _mask_from_bytes(job.shapes, job.bits)
    with ambient(0):  # for what a user's model draws beside its state
        model = problem.build()
    with warnings.catch_warnings(), _unchanged(problem.data), refuse_settings("a training: the code of the task"):
        warnings.simplefilter("ignore", NoKernelsWarning)  # the run has already warned once
        trained = train(
            model,
            safetensors.torch.load(job.initial),
            mask,
            problem.data,
            recipe,
            job.seed,
            begin=job.begin,
            end=job.end,
            loss=problem.loss,
            forward=problem.forward,
            step=problem.step,
            optimizer=functions.get("optimizer"),
            schedule=functions.get("schedule"),
            metrics=problem.metrics,
            device=job.device,
            kernels=job.sparse,
            packed=job.packed,
            resume=resume,
            watch=clock,
            watch_every=watch_every,
            on_epoch=on_epoch if job.tells_epochs else None,
        )
    record = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(clock.seconds, 3),
        "iterations": job.begin + len(trained.batch_losses) - (resume.iteration if resume else job.begin),
        "seconds_per_iteration": clock.seconds_per_iteration,
        "threads": torch.get_num_threads(),
        "device": device_name(job.device),
        "machine": machine(),
    }
    losses = safetensors.torch.save({"losses": trained.batch_losses})
    return Outcome(job.key, safetensors.torch.save(trained.weights.load()), losses, trained.history.to_json(), record)


def perform_round(
    job: RoundJob, problem: Problem, loaded: Loaded | None = None, own: LoadedRecipe | None = None
) -> Pruned:
    """Do a round of pruning.

    Args:
        job: the round.
        problem: the data set, model and loss.
        loaded: the importance and the hashes of its source; by default it is loaded by its name.
        own: as for `perform`.

    Raises:
        UserError: if the problem or the importance is not the one that the mask is named after.
    """
    recipe = job.study.recipe
    _check_problem(job, problem, recipe, (own or load_recipe(recipe))[0])
    importance, sources = loaded or load_importance(job.importance)
    if sources != job.sources:
        raise UserError(f"importance {job.importance!r}: {_EDITED}")
    weights = Weights.of(safetensors.torch.load(job.initial))
    mask = _mask_from_bytes(job.shapes, job.bits)
    pruning = Round(job.key, weights, weights, mask, job.level, job.importance, job.seed, job.rule.fraction)
    try:
        found = compute_mask(pruning, problem, job.study, job.rule, importance)
    except RoundError as error:
        return Pruned(job.key, {}, str(error))
    return Pruned(job.key, found.shapes, _mask_to_bytes(found))


def _state_to_bytes(weights: Weights) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.load().items()})


def _mask_to_bytes(mask: Mask) -> dict[str, bytes]:
    return {name: bits.tobytes() for name, bits in mask.bits.items()}


def _mask_from_bytes(shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, bytes]) -> Mask:
    return Mask(shapes, {name: np.frombuffer(each, np.uint8) for name, each in bits.items()})


def _check_problem(
    job: Job | RoundJob, problem: Problem, recipe: Recipe, functions: Mapping[str, Callable[..., Any]]
) -> None:
    """Raise `UserError` unless this process has loaded the problem that the training is named after.

    Otherwise the result of edited code, of code that reads other files, or of other data, would be stored under the
    name of the former.
    """
    now = problem.identity
    for part in _PARTS:
        if job.problem[part] == now.get(part):
            continue
        if part == "data":
            raise UserError(
                f"the data set {problem.data.name!r} is not the same each time it is loaded, as the names of trainings "
                f"require: it was edited since the run began, or it is drawn without a fixed seed"
            )
        if part == "depends":
            raise UserError("task.depends: a file or a variable has changed since the run began; run the study again")
        name = (now.get(part) or {}).get("name")
        raise UserError(f"task.{part} {name!r}: {_EDITED}")
    if job.behaviour and not agree(job.behaviour, problem.behaviour + observe_recipe(recipe, functions)):
        name = problem.identity["model"]["name"]
        raise UserError(
            f"task.model {name!r}: in a worker, the network, the loss or the recipe's functions compute something else "
            f"than when the run began: a file or an environment variable that they use has changed, or is not the same "
            f"on every machine"
        )


@contextmanager
def _unchanged(data: Dataset) -> Iterator[None]:
    """Raise `UserError` if a tensor of the data set is changed in place inside the block.

    Later trainings would have other data. torch counts the changes of a tensor, so that this check reads no data.
    """
    parts = [value for value in vars(data).values() if isinstance(value, Tensor | tuple | dict)]
    found = [each for part in parts for each in list_tensors(part).values() if isinstance(each, Tensor)]
    tensors = [tensor for tensor in found if not tensor.is_inference()]
    before = [tensor._version for tensor in tensors]
    yield
    if [tensor._version for tensor in tensors] != before:
        raise UserError("the model or the loss changed the data set in place during a training; change a copy instead")


class _Clock:
    """A watch that times all iterations except the first, which also loads libraries and allocates memory."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._started = time.perf_counter()
        self._marks: list[tuple[int, float]] = []

    def __call__(self, iteration: int, checkpoint: Callable[[], Checkpoint]) -> None:
        self._marks[1:] = [(iteration, time.perf_counter())]
        self._watch(iteration, checkpoint)

    @property
    def seconds(self) -> float:
        """The seconds since this clock was created."""
        return time.perf_counter() - self._started

    @property
    def seconds_per_iteration(self) -> float | None:
        """The mean seconds of an iteration; None if this watch was called less than twice."""
        if len(self._marks) < 2 or self._marks[0][0] == self._marks[1][0]:
            return None
        (first, begin), (last, end) = self._marks
        return (end - begin) / (last - first)

"""Jobs: a training as a worker receives it, and its outcome as the worker returns it, both as bytes and plain data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from tombola.datasets.dataset import Dataset
from tombola.engine.machine import device_name, machine
from tombola.errors import UserError
from tombola.kernels import NoKernelsWarning
from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.study.schema import Study
from tombola.study.task import Problem
from tombola.study.trainings import Training
from tombola.training.history import Checkpoint, History, Trained, Watch
from tombola.training.recipe import Recipe
from tombola.training.train import train
from tombola.training.weights import Weights

_PARTS = ("data", "model", "loss")
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

    @classmethod
    def of(cls, training: Training, study: Study) -> Job:
        """Make the job for a training of a study."""
        return cls(
            training.key,
            {part: training.identity.get(part) for part in _PARTS},
            safetensors.torch.save({name: t.contiguous() for name, t in training.initial.load().items()}),
            training.mask.shapes,
            {name: bits.tobytes() for name, bits in training.mask.bits.items()},
            study.recipe.model_dump(),
            training.seed,
            training.begin,
            training.end,
            study.device,
        )


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


def perform(job: Job, problem: Problem, resume: Checkpoint | None, watch: Watch) -> Outcome:
    """Do the training of a job.

    Args:
        job: the training.
        problem: the data set, model and loss.
        resume: the checkpoint to resume from; None to start at the beginning.
        watch: a function that is called after every iteration.

    Raises:
        UserError: if the problem is not the one that the training is named after, or if the user's code fails.
    """
    _check_problem(job, problem)
    clock = _Clock(watch)
    mask = Mask(job.shapes, {name: np.frombuffer(bits, np.uint8) for name, bits in job.bits.items()})
    with ambient(0):  # for what a user's model draws beside its state
        model = problem.build()
    with warnings.catch_warnings(), _unchanged(problem.data):
        warnings.simplefilter("ignore", NoKernelsWarning)  # the run has already warned once
        trained = train(
            model,
            safetensors.torch.load(job.initial),
            mask,
            problem.data,
            Recipe.model_validate(job.recipe),
            job.seed,
            begin=job.begin,
            end=job.end,
            loss=problem.loss,
            device=job.device,
            resume=resume,
            watch=clock,
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


def _check_problem(job: Job, problem: Problem) -> None:
    """Raise `UserError` unless this process has loaded the problem that the training is named after.

    Otherwise the result of edited code, or of other data, would be stored under the name of the former.
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
        name = (now.get(part) or {}).get("name")
        raise UserError(f"task.{part} {name!r}: its source was edited after the run began; run the study again")


@contextmanager
def _unchanged(data: Dataset) -> Iterator[None]:
    """Raise `UserError` if a tensor of the data set is changed in place inside the block.

    Later trainings would have other data. torch counts the changes of a tensor, so that this check reads no data.
    """
    tensors = [value for value in vars(data).values() if isinstance(value, Tensor) and not value.is_inference()]
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
        """The mean seconds of an iteration; None for a training of one iteration."""
        if len(self._marks) < 2 or self._marks[0][0] == self._marks[1][0]:
            return None
        (first, begin), (last, end) = self._marks
        return (end - begin) / (last - first)

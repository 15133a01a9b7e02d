"""Workers: the interface of an engine, which does the trainings of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

from tombola.engine.job import Job, Outcome, Pruned, RoundJob
from tombola.errors import UserError, describe_exception
from tombola.store.checkpoints import checkpoint_to_bytes
from tombola.training.history import Checkpoint, Watch

CHECKPOINT_EVERY = 30.0
"""Seconds between two checkpoints of a training: the work that is lost at most if a process dies."""

TRIES = 3
"""The number of times that a job is started before it fails, if its process is killed each time."""

_TELL_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class At:
    """The event that a job has reached an iteration; with the mean losses of its epochs so far if it tells them."""

    key: str
    iteration: int
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The event that a job has failed."""

    key: str
    reason: str

    @classmethod
    def by(cls, key: str, error: BaseException) -> Failed:
        """Describe an error that a job raised; for an error in the user's code, name the file and the line."""
        return cls(key, str(error) if isinstance(error, UserError) else describe_exception(error))


Event: TypeAlias = At | Outcome | Pruned | Failed


class Workers(Protocol):
    """Do jobs in parallel; restart a job from its last checkpoint if its process or machine is lost."""

    @property
    def count(self) -> int:
        """The number of jobs that run at the same time."""

    are_here: bool
    """Whether all workers are on this machine."""

    in_other_processes: bool
    """Whether this process may compute something else while the workers train."""

    @property
    def idle(self) -> bool:
        """Whether another job can start now."""

    def submit(self, job: Job | RoundJob) -> None:
        """Start a job. Call it only while `idle`."""

    def events(self, timeout: float) -> Iterator[Event]:
        """Yield the events of the workers, after waiting for at most `timeout` seconds."""

    def cancel(self, key: str) -> None:
        """End a job that is running; no event of it follows."""

    def pause(self) -> AbstractContextManager[None]:
        """Let nothing that this process does inside the block change what the workers compute."""

    def __enter__(self) -> Self:
        """Return the workers, ready for jobs."""

    def __exit__(self, *_: object) -> None:
        """Stop all jobs that are running."""


def make_watch(
    tell: Callable[[int], None],
    keep: Callable[[bytes], None] | None,
    checkpoint_every: float,
    clock: Callable[[], float] = time.monotonic,
    kind: str | None = None,
    key: str | None = None,
) -> Watch:
    """Return a watch that regularly passes the iteration of a training to `tell` and its checkpoints to `keep`.

    Args:
        tell: a function that is called with the next iteration, at most five times a second.
        keep: a function that is called with a checkpoint; None for no checkpoints.
        checkpoint_every: the seconds between two checkpoints; 0 for one after each iteration.
        clock: a function that returns the time in seconds.
        kind: the kind of this machine, which the checkpoints name.
        key: the name of the training, which the checkpoints name too.
    """
    last_tell = last_keep = clock()

    def watch(iteration: int, checkpoint: Callable[[], Checkpoint]) -> None:
        nonlocal last_tell, last_keep
        now = clock()
        if now - last_tell > _TELL_EVERY:
            tell(iteration)
            last_tell = now
        if keep is not None and now - last_keep >= checkpoint_every:
            keep(checkpoint_to_bytes(checkpoint(), kind, key))
            last_keep = clock()

    return watch

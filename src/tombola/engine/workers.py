"""Workers: what an engine is, seen from the run that uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

from tombola.engine.job import Job, Outcome
from tombola.errors import UserError, describe_exception
from tombola.store.store import checkpoint_to_bytes
from tombola.training.history import Checkpoint, Watch

CHECKPOINT_EVERY = 30.0
"""Seconds between two checkpoints of a training: the most that is lost with a process."""

TRIES = 3
"""Times that a job is begun, before it is taken for what kills its process."""

_TOLD_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class At:
    """A job has come to an iteration."""

    key: str
    iteration: int


@dataclass(frozen=True)
class Failed:
    """A job cannot be done."""

    key: str
    reason: str

    @classmethod
    def by(cls, key: str, error: Exception) -> Failed:
        """The job raised an error: the user's mistake, or one in the user's code, told with its file and line."""
        return cls(key, str(error) if isinstance(error, UserError) else describe_exception(error))


Event: TypeAlias = At | Outcome | Failed


class Workers(Protocol):
    """Do jobs side by side; a job whose process or machine is lost is done again from its last checkpoint."""

    @property
    def count(self) -> int:
        """How many jobs are done at a time."""

    @property
    def idle(self) -> bool:
        """Whether a job could be begun at once."""

    def submit(self, job: Job) -> None:
        """Begin a job; only where `idle`."""

    def events(self, timeout: float) -> Iterator[Event]:
        """Yield what the workers have told, after waiting for it for at most `timeout` seconds."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Stop what is running."""


def watching(
    tell: Callable[[int], None],
    keep: Callable[[bytes], None] | None,
    checkpoint_every: float,
    clock: Callable[[], float] = time.monotonic,
) -> Watch:
    """Return a function that tells of a training's progress, and gives its checkpoints to `keep`, by time.

    Args:
        tell: is given the iteration, five times a second.
        keep: is given checkpoints; None for none.
        checkpoint_every: seconds between two checkpoints; 0: after each iteration.
        clock: tells the seconds.
    """
    said = kept = clock()

    def watch(iteration: int, checkpoint: Callable[[], Checkpoint]) -> None:
        nonlocal said, kept
        now = clock()
        if now - said > _TOLD_EVERY:
            tell(iteration)
            said = now
        if keep is not None and now - kept >= checkpoint_every:
            keep(checkpoint_to_bytes(checkpoint()))
            kept = clock()

    return watch

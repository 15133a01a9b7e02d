"""The local engine: processes on this machine, one training at a time each."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tombola.engine.job import Job, Outcome, perform
from tombola.errors import UserError
from tombola.planning import THREADS
from tombola.problem import load_problem
from tombola.store import Store
from tombola.study import Task
from tombola.training import Checkpoint

_TOLD_EVERY = 0.2  # seconds
_CHECKPOINT_EVERY = 30.0  # seconds
_TRIES = 3


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


class LocalWorkers:
    """Processes that each do one training at a time, with one thread, and outlive any job.

    A worker that dies is replaced and its job done again, from its last checkpoint.

    Args:
        count: how many.
        task: what is trained; each worker loads it for itself.
        directory: where data sets lie.
        store: the folder of the store, for checkpoints.
    """

    def __init__(self, count: int, task: Task, directory: Path | None, store: Path) -> None:
        self._arguments = (task, directory, store)
        self._workers: list[_Worker] = []
        self._tries: dict[str, int] = {}
        self.count = count

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    @property
    def idle(self) -> bool:
        """Whether a job could be begun at once."""
        return self._busy() < self.count

    def submit(self, job: Job) -> None:
        """Begin a job; only where `idle`."""
        worker = next((worker for worker in self._workers if worker.job is None), None)
        if worker is None:
            worker = _Worker.start(self._arguments)
            self._workers.append(worker)
        self._tries[job.key] = self._tries.get(job.key, 0) + 1
        worker.job = job
        try:
            worker.connection.send(job)
        except OSError:
            pass  # the worker is dead, which `events` will see

    def events(self, timeout: float) -> Iterator[At | Outcome | Failed]:
        """Yield what the workers have told, after waiting for it for at most `timeout` seconds."""
        for ready in wait([worker.connection for worker in self._workers], timeout):
            worker = next(worker for worker in self._workers if worker.connection is ready)
            try:
                event: At | Outcome | Failed = worker.connection.recv()
            except (EOFError, OSError):
                yield from self._replace(worker)
                continue
            if not isinstance(event, At):
                worker.job = None
            yield event

    def _replace(self, worker: _Worker) -> Iterator[Failed]:
        worker.process.join()
        self._workers.remove(worker)
        if worker.job is None:
            return
        if self._tries[worker.job.key] < _TRIES:
            self.submit(worker.job)
            return
        code = worker.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        yield Failed(worker.job.key, f"its process was ended {how}, {_TRIES} times; is there enough memory?")

    def _busy(self) -> int:
        return sum(worker.job is not None for worker in self._workers)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None

    @classmethod
    def start(cls, arguments: tuple[Any, ...]) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)


def _work(connection: Connection, task: Task, directory: Path | None, store_root: Path) -> None:
    """Do jobs until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    torch.set_num_threads(THREADS)
    store = Store(store_root, create=False)
    try:
        problem = load_problem(task, directory)
        while True:
            job: Job = connection.recv()
            try:
                resume = store.checkpoint(job.key)
                connection.send(perform(job, problem, resume, _watch(job, connection, store)))
            except (EOFError, OSError):
                raise
            except UserError as error:
                connection.send(Failed(job.key, str(error)))
            except Exception as error:
                text = " ".join(str(error).split())
                connection.send(Failed(job.key, f"{type(error).__name__}: {text}"))
    except (EOFError, OSError):
        sys.exit(0)  # nobody waits for results any more


def _watch(job: Job, connection: Connection, store: Store) -> Callable[[int, Callable[[], Checkpoint]], None]:
    """Return a function that tells of progress and stores checkpoints, by time."""
    told = saved = time.monotonic()

    def watch(iteration: int, checkpoint: Callable[[], Checkpoint]) -> None:
        nonlocal told, saved
        now = time.monotonic()
        if now - told > _TOLD_EVERY:
            connection.send(At(job.key, iteration))
            told = now
        if now - saved > _CHECKPOINT_EVERY:
            store.put_checkpoint(job.key, checkpoint())
            saved = now

    return watch

"""The local engine: processes on this machine that each do one training at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tombola.engine.job import Job, perform
from tombola.engine.machine import kind_here
from tombola.engine.workers import CHECKPOINT_EVERY, TRIES, At, Event, Failed, make_watch
from tombola.store.store import Store
from tombola.study.schema import Task
from tombola.study.task import Problem, load_problem
from tombola.study.trainings import THREADS

_PRELOADED = ["tombola.engine.local", "torch._dynamo"]  # torch imports the latter at an optimizer's first step


@dataclass(frozen=True)
class _Setting:
    """The settings that every worker receives.

    Args:
        task: the task, which each worker loads.
        directory: the folder of the data sets.
        store: the folder of the store, for checkpoints; None for no checkpoints.
        checkpoint_every: the seconds between two checkpoints of a training.
    """

    task: Task
    directory: Path | None
    store: Path | None
    checkpoint_every: float


class LocalWorkers:
    """Processes that each do one training after another, with one thread.

    They are forked from a process that has imported all modules, so that a worker starts quickly. A worker that dies is
    replaced, and its job continues from its last checkpoint. If their parent dies, the workers exit by themselves.

    Args:
        count: the number of processes.
        task: the task, which each worker loads.
        directory: the folder of the data sets.
        store: the folder of the store, for checkpoints; None for no checkpoints.
        checkpoint_every: the seconds between two checkpoints of a training.
    """

    def __init__(
        self,
        count: int,
        task: Task,
        directory: Path | None,
        store: Path | None,
        *,
        checkpoint_every: float = CHECKPOINT_EVERY,
    ) -> None:
        self._setting = _Setting(task, directory, store, checkpoint_every)
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

    are_here = True

    @property
    def idle(self) -> bool:
        """Whether another job can start now."""
        return sum(worker.job is not None for worker in self._workers) < self.count

    def submit(self, job: Job) -> None:
        """Start a job. Call it only while `idle`."""
        worker = next((worker for worker in self._workers if worker.job is None), None)
        if worker is None:
            worker = _Worker.start(self._setting)
            self._workers.append(worker)
        self._tries[job.key] = self._tries.get(job.key, 0) + 1
        worker.job = job
        with contextlib.suppress(OSError):  # if the worker is dead, `events` will notice it
            worker.connection.send(job)

    def events(self, timeout: float) -> Iterator[Event]:
        """Yield the events of the workers, after waiting for at most `timeout` seconds."""
        for ready in wait([worker.connection for worker in self._workers], timeout):
            worker = next(worker for worker in self._workers if worker.connection is ready)
            try:
                event: Event = worker.connection.recv()
            except (EOFError, OSError):
                yield from self._replace(worker)
                continue
            if not isinstance(event, At):
                worker.job = None
            yield event

    def _replace(self, worker: _Worker) -> Iterator[Failed]:
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.job is None:
            return
        if self._tries[worker.job.key] < TRIES:
            self.submit(worker.job)
            return
        code = worker.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        yield Failed(worker.job.key, f"its process was ended {how}, {TRIES} times; is there enough memory?")


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None

    @classmethod
    def start(cls, setting: _Setting) -> _Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, setting), daemon=True)
        with _no_ctrl_c(), _no_script():
            process.start()
        theirs.close()
        return cls(process, ours)


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Block SIGINT inside the block, so that processes started there never receive it, not even while they load."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _no_script() -> Iterator[None]:
    """Hide the script that runs inside the block, so that processes started there do not run it too.

    They need nothing of it. Without this, a script would need the guard `if __name__ == "__main__"`.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _work(connection: Connection, setting: _Setting) -> None:
    """Do jobs until the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops this process
    with contextlib.suppress(OSError):  # there may be no standard error
        os.dup2(2, 1)  # what a user's code prints goes there: standard output belongs to the command
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(THREADS)
    store = None if setting.store is None else Store(setting.store, create=False)
    problem: Problem | None = None
    try:
        while True:
            job: Job = connection.recv()
            try:
                problem = problem or load_problem(setting.task, setting.directory)
                connection.send(_perform(job, problem, store, setting.checkpoint_every, connection))
            except (EOFError, BrokenPipeError, ConnectionError):
                raise
            except Exception as error:
                connection.send(Failed.by(job.key, error))
    except (EOFError, OSError):
        sys.exit(0)  # the parent has exited


def _perform(job: Job, problem: Problem, store: Store | None, checkpoint_every: float, connection: Connection) -> Event:
    def tell(iteration: int) -> None:
        connection.send(At(job.key, iteration))

    if store is None:
        return perform(job, problem, None, make_watch(tell, None, checkpoint_every))
    keep, kind = partial(store.checkpoints.put, job.key), str(kind_here(job.device))
    watch = make_watch(tell, keep, checkpoint_every, kind=kind, key=job.key)
    return perform(job, problem, store.checkpoints.get(job.key, kind), watch)


def _end_with_parent() -> None:
    """Wait until the parent exits, then exit at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

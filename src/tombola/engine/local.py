"""The local engine: processes on this machine that each do one training at a time."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tombola.engine.job import Job, RoundJob, perform, perform_round
from tombola.engine.machine import kind_here
from tombola.engine.workers import CHECKPOINT_EVERY, TRIES, At, Event, Failed, make_watch
from tombola.errors import UserError, describe_exception, refuse_windows
from tombola.exits import end_at_once, watch_exits
from tombola.store.store import Store
from tombola.study.schema import Task
from tombola.study.task import Problem, load_problem
from tombola.study.trainings import THREADS

_SAFE_PATH = "PYTHONSAFEPATH"

_LONGEST_FOLDER = 70
"""The longest path of a folder, in bytes, in which multiprocessing can create a socket: a socket's has 107 at most."""

_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC}
"""The errors of a system that allows no more files, memory or processes: trying again is in vain."""

_FILES = 16
"""Files that the start of a process needs for a moment, and some more."""

_PAUSE = 0.5  # seconds until a worker whose start failed is started again
PRELOADED = ["tombola.engine.local", "torch._dynamo"]  # torch imports the latter at an optimizer's first step
"""Modules that the process imports of which the workers are copies."""


@dataclass(frozen=True)
class _Setting:
    """The settings that every worker receives.

    Args:
        task: the task, which each worker loads.
        directory: the folder of the data sets.
        store: the folder of the store, for checkpoints; None for no checkpoints.
        checkpoint_every: the seconds between two checkpoints of a training.
        environment: the value of `PYTHONSAFEPATH` for the programs that the worker starts; None if it is not set.
    """

    task: Task
    directory: Path | None
    store: Path | None
    checkpoint_every: float
    environment: str | None


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
        store = store and store.absolute()  # a user's code may change the directory of a worker
        self._setting = _Setting(task, directory, store, checkpoint_every, os.environ.get(_SAFE_PATH))
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
    in_other_processes = True

    @property
    def idle(self) -> bool:
        """Whether another job can start now."""
        return sum(worker.job is not None for worker in self._workers) < self.count

    def submit(self, job: Job | RoundJob) -> None:
        """Start a job. Call it only while `idle`.

        Raises:
            UserError: if the system does not allow another process.
        """
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
            worker = next((worker for worker in self._workers if worker.connection is ready), None)
            if worker is None:  # its job was cancelled meanwhile
                continue
            try:
                event: Event = worker.connection.recv()
            except (EOFError, OSError):
                yield from self._replace(worker)
                continue
            if not isinstance(event, At):
                worker.job = None
            yield event

    def pause(self) -> contextlib.nullcontext[None]:
        """Let nothing that this process does inside the block change what the workers compute."""
        return contextlib.nullcontext()

    def cancel(self, key: str) -> None:
        """End a job that is running; no event of it follows."""
        for worker in [each for each in self._workers if each.job is not None and each.job.key == key]:
            worker.process.kill()
            self._remove(worker)

    def _remove(self, worker: _Worker) -> None:
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)

    def _replace(self, worker: _Worker) -> Iterator[Failed]:
        self._remove(worker)
        if worker.job is None:
            return
        if self._tries[worker.job.key] < TRIES:
            self.submit(worker.job)
            return
        yield Failed(worker.job.key, _explain_end(worker.process.exitcode))


def _explain_end(status: int | None) -> str:
    """Explain why a job failed whose process has ended each time that it was started.

    Args:
        status: the exit status of the process, or minus the number of the signal that ended it.

    >>> _explain_end(-9)
    'its process was ended by SIGKILL, 3 times; is there enough memory?'
    """
    if status is not None and status < 0:
        names = {each.value: each.name for each in signal.Signals}
        by = names.get(-status, f"signal {-status}")
        return f"its process was ended by {by}, {TRIES} times; is there enough memory?"
    return f"its process ended itself with status {status}, {TRIES} times; does the code of the task end the program?"


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | RoundJob | None = None

    @classmethod
    def start(cls, setting: _Setting) -> _Worker:
        """Start a worker. If the process that workers are forked from was killed, another one is started."""
        refuse_windows("processes that train")
        for left in reversed(range(TRIES)):
            try:
                return cls._start(setting)
            except (EOFError, OSError) as error:
                if not left or getattr(error, "errno", None) in _LIMITS:
                    why = getattr(error, "strerror", None) or describe_exception(error)
                    raise UserError(
                        f"a process that trains cannot be started: {why}; fewer workers need fewer files and memory"
                    ) from error
                time.sleep(_PAUSE)  # a process that is being killed takes a moment to end
        raise AssertionError

    @classmethod
    def _start(cls, setting: _Setting) -> _Worker:
        _check_files()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        try:
            process = context.Process(target=_work, args=(theirs, setting), daemon=True)
            with _no_ctrl_c(), _safe_path(), _no_script():
                _shorten_temporary_folder()
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours)


def _check_files() -> None:
    """Raise `OSError` if the start of a process could lack files.

    If they lacked in the middle of it, the process that workers are forked from would end with a traceback.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(_FILES):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Let Python not search the working directory for modules in processes that are started inside the block.

    A file of the user whose name is that of a module of the standard library, such as `random.py`, would be imported
    in its place. Workers get the module path of their parent.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        resource_tracker.ensure_running()
        yield
    finally:
        _restore_safe_path(before)


def _restore_safe_path(value: str | None) -> None:
    if value is None:
        os.environ.pop(_SAFE_PATH, None)
    else:
        os.environ[_SAFE_PATH] = value


def _shorten_temporary_folder() -> None:
    """Choose the system's folder for temporary files if the path of a socket in the user's would be too long."""
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER:
        return
    before, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        util.get_temp_dir()  # multiprocessing remembers it
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Block SIGINT inside the block, so that processes started there never receive it, not even while they load."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    with _safe_path():  # it starts the resource tracker; starting it later would unblock SIGINT
        pass
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
    _restore_safe_path(setting.environment)
    # What a user's code forks must not keep the connection open: the end of this process would go unnoticed.
    os.register_at_fork(after_in_child=connection.close)
    watch = threading.Thread(target=_end_with_parent, daemon=True)
    torch.set_num_threads(THREADS)
    problem: Problem | None = None
    store: Store | None = None
    try:
        while True:
            job: Job | RoundJob = connection.recv()
            event: Event
            try:
                with watch_exits():
                    if watch.ident is None:
                        watch.start()
                    problem = problem or load_problem(setting.task, setting.directory)
                    if store is None and setting.store is not None:
                        store = Store(setting.store, create=False)  # it may have been damaged since the run began
                    event = _perform(job, problem, store, setting.checkpoint_every, connection)
            except BaseException as error:  # a user's code may raise anything
                event = Failed.by(job.key, error)
            connection.send(event)
    except (EOFError, OSError):
        sys.exit(0)  # the parent has exited


def _perform(
    job: Job | RoundJob, problem: Problem, store: Store | None, checkpoint_every: float, connection: Connection
) -> Event:
    if isinstance(job, RoundJob):
        return perform_round(job, problem)

    def tell(iteration: int, losses: tuple[float, ...] = ()) -> None:
        connection.send(At(job.key, iteration, losses))

    if store is None:
        watch = make_watch(tell, None, checkpoint_every)
        return perform(job, problem, None, watch, tell, watch_every=checkpoint_every)
    keep, kind = partial(store.checkpoints.put, job.key), str(kind_here(job.device))
    watch = make_watch(tell, keep, checkpoint_every, kind=kind, key=job.key)
    resume = store.checkpoints.get(job.key, kind)
    return perform(job, problem, resume, watch, tell, watch_every=checkpoint_every)


def _end_with_parent() -> None:
    """Wait until the parent exits, then exit at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    end_at_once(1)

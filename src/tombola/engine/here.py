"""The engine of this process: one training at a time, in a thread, for functions that no other process can import."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from tombola.engine.job import Job, Outcome, RoundJob, perform, perform_round
from tombola.engine.machine import kind_here
from tombola.engine.workers import CHECKPOINT_EVERY, At, Event, Failed, make_watch
from tombola.store.store import Store
from tombola.study.task import Problem
from tombola.threads import one_thread
from tombola.training.history import Checkpoint


class _Stopped(Exception):  # noqa: N818 (it is no error)
    """The run is over or the training was cancelled, so the training that is running ends."""


class WorkersHere:
    """One worker in this process. It runs in a thread, so that a display stays live and Ctrl-C works.

    Args:
        problem: the data set, model and loss.
        store: the store, for checkpoints.
        checkpoint_every: the seconds between two checkpoints of a training.
    """

    count = 1
    are_here = True
    in_other_processes = False

    def __init__(self, problem: Problem, store: Store, *, checkpoint_every: float = CHECKPOINT_EVERY) -> None:
        self._problem, self._store, self._checkpoint_every = problem, store, checkpoint_every
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._turn = threading.Condition()
        self._pauses = self._computes = False

    def __enter__(self) -> WorkersHere:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether another job can start now."""
        return self._thread is None

    def submit(self, job: Job | RoundJob) -> None:
        """Start a job. Call it only while `idle`."""
        self._computes = True
        self._thread = threading.Thread(target=self._work, args=(job,), daemon=True)
        self._thread.start()

    def events(self, timeout: float) -> Iterator[Event]:
        """Yield the events of the worker, after waiting for at most `timeout` seconds."""
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return
        if not isinstance(event, At) and self._thread is not None:
            self._thread.join()
            self._thread = None
        yield event

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let nothing that this process does inside the block change what the workers compute.

        A training waits where its watch is called next, and torch's global generator is restored: both share it.
        """
        self._pauses = True
        try:
            with self._turn:
                self._turn.wait_for(lambda: not self._computes)
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                yield
        finally:
            with self._turn:
                self._pauses = False
                self._turn.notify_all()

    def cancel(self, key: str) -> None:
        """End the job that is running; no event of it follows."""
        self.__exit__()
        self._thread, self._stop, self._events = None, threading.Event(), queue.SimpleQueue()

    def _work(self, job: Job | RoundJob) -> None:
        with one_thread():
            try:
                self._events.put(perform_round(job, self._problem) if isinstance(job, RoundJob) else self._train(job))
            except _Stopped:
                pass
            except BaseException as error:  # a user's code may raise anything
                self._events.put(Failed.by(job.key, error))
            finally:
                self._computing(now=False)

    def _computing(self, *, now: bool) -> None:
        with self._turn:
            self._computes = now
            self._turn.notify_all()

    def _train(self, job: Job) -> Outcome:
        def tell(iteration: int, losses: tuple[float, ...] = ()) -> None:
            self._events.put(At(job.key, iteration, losses))

        checkpoints, kind = self._store.checkpoints, str(kind_here(job.device))
        keep = partial(checkpoints.put, job.key)
        regular = make_watch(tell, keep, self._checkpoint_every, kind=kind, key=job.key)

        def watch(iteration: int, checkpoint: Callable[[], Checkpoint]) -> None:
            if self._pauses:
                self._computing(now=False)
                with self._turn:
                    self._turn.wait_for(lambda: not self._pauses)
                    self._computes = True
            if self._stop.is_set():
                raise _Stopped
            regular(iteration, checkpoint)

        return perform(
            job, self._problem, checkpoints.get(job.key, kind), watch, tell, watch_every=self._checkpoint_every
        )

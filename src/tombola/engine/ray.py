"""The Ray engine: trainings run as tasks of a Ray cluster, whose machines need no shared disk.

Arguments and results are sent through Ray. The problem (data set, model, loss) is put into Ray's object store once,
with the user's own modules, and so are weights that many tickets are rewound to. Results and checkpoints are sent back
to the process that runs the study, and only this process reads and writes the store. A training whose process or
machine is lost continues from its last checkpoint on another machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tombola.engine.job import Job, Loaded, LoadedRecipe, Outcome, Pruned, RoundJob, perform, perform_round
from tombola.engine.machine import differences, kind_here, machine
from tombola.engine.workers import CHECKPOINT_EVERY, TRIES, At, Event, Failed, make_watch
from tombola.errors import ClusterError, UserError, describe_exception
from tombola.exits import watch_exits
from tombola.own.code import own_modules
from tombola.store.checkpoints import checkpoint_from_bytes
from tombola.store.store import Store
from tombola.study.schema import Study
from tombola.study.task import Problem, load_importance, load_recipe
from tombola.study.trainings import THREADS

_MUST_AGREE = ("versions", "commit", "python")

_LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
    exceptions.LocalRayletDiedError,
)


class RayWorkers:
    """Tasks of a Ray cluster that each do one training, with one thread or on a share of a GPU.

    Args:
        count: the number of parallel tasks; None for as many as the cluster has processors (or shares of GPUs).
        problem: the data set, model and loss.
        study: the study to run.
        store: the store for checkpoints.
        address: the address of the cluster; None for the one in the environment variable RAY_ADDRESS, or a new Ray on
            this machine if the variable is not set.
        per_gpu: the number of parallel trainings on one GPU, if the study's device is "cuda".
        checkpoint_every: the seconds between two checkpoints of a training.

    Raises:
        ClusterError: if the cluster cannot be reached.
        UserError: if the code of the study cannot be sent to other processes.
    """

    def __init__(
        self,
        count: int | None,
        problem: Problem,
        study: Study,
        store: Store,
        *,
        address: str | None = None,
        per_gpu: int = 1,
        checkpoint_every: float = CHECKPOINT_EVERY,
    ) -> None:
        for name in _own_modules(study) & set(sys.modules):
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])
        importances = {name: load_importance(name) for name in study.importances}
        alone = replace(problem)  # without what this process has computed of it: workers compare what they compute
        packed = _pack((alone, importances, load_recipe(study.recipe)))
        self._started = not ray.is_initialized()
        if self._started:
            given = address if address not in (None, "auto") else os.environ.get("RAY_ADDRESS", "")
            try:
                _reach(given)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (OSError, ValueError, RuntimeError) as error:
                text = f"the Ray cluster {given} cannot be reached: {error}"
                raise ClusterError(" ".join(text.split())) from error
        self._store = store
        self._every = checkpoint_every
        gpu = study.device == "cuda"
        self._needs: dict[str, Any] = {"num_gpus": 1 / per_gpu, "num_cpus": 0} if gpu else {"num_cpus": THREADS}
        there = ray.cluster_resources()
        fitting = int(there.get("GPU", 0)) * per_gpu if gpu else int(there.get("CPU", 0)) // THREADS
        self.count = count or max(1, fitting)
        self._problem = ray.put(packed)
        self._post = self._new_post()
        self._initial: dict[str, Any] = {}
        self._running: dict[Any, Job | RoundJob] = {}
        self._tries: dict[str, int] = {}

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._running:
            with contextlib.suppress(exceptions.RayError):
                ray.cancel(reference, force=True)
        if self._started:
            ray.shutdown()

    are_here = False
    in_other_processes = True

    @property
    def idle(self) -> bool:
        """Whether another job can start now."""
        return len(self._running) < self.count

    def submit(self, job: Job | RoundJob) -> None:
        """Start a job. Call it only while `idle`."""
        self._tries[job.key] = self._tries.get(job.key, 0) + 1
        task = ray.remote(_train).options(max_retries=0, **self._needs)  # this class retries from the last checkpoint
        reference = task.remote(
            replace(job, initial=b""),
            self._put(job.initial),
            [self._problem],
            self._store.checkpoints.read(job.key),
            self._post,
            self._every,
            machine(),
        )
        self._running[reference] = job

    def events(self, timeout: float) -> Iterator[Event]:
        """Yield the events of the workers, after waiting for at most `timeout` seconds."""
        if not self._running:
            time.sleep(timeout)
            return
        ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=timeout)
        yield from self._collect()
        for reference in ready:
            job = self._running.pop(reference, None)
            if job is None:  # it was cancelled meanwhile
                continue
            try:
                outcome: Outcome | Pruned | Failed = ray.get(reference)
            except _LOST as error:
                if isinstance(error, exceptions.NodeDiedError):
                    self._tries[job.key] -= 1  # the job did not cause the failure
                if self._tries[job.key] < TRIES:
                    self.submit(job)
                    continue
                text = " ".join(str(error).split())
                outcome = Failed(
                    job.key, f"its process was lost {TRIES} times; is there enough memory? Ray says: {text}"
                )
            except exceptions.RayError as error:
                outcome = Failed(job.key, f"{type(error).__name__}: {' '.join(str(error).split())}")
            yield outcome

    def pause(self) -> contextlib.nullcontext[None]:
        """Let nothing that this process does inside the block change what the workers compute."""
        return contextlib.nullcontext()

    def cancel(self, key: str) -> None:
        """End a job that is running; no event of it follows."""
        for reference in [each for each, job in self._running.items() if job.key == key]:
            del self._running[reference]
            with contextlib.suppress(exceptions.RayError):
                ray.cancel(reference, force=True)

    def _collect(self) -> Iterator[At]:
        """Yield the iterations that jobs have reached, and store their checkpoints."""
        running = {job.key for job in self._running.values()}
        try:
            at, checkpoints = ray.get(self._post.empty.remote())
        except exceptions.RayError:  # the mailbox was on the machine that was lost
            self._post = self._new_post()
            return
        for key, content in checkpoints.items():
            if key in running:
                self._store.checkpoints.put(key, content)
        yield from (each for key, each in at.items() if key in running)

    @staticmethod
    def _new_post() -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return ray.remote(_Post).options(num_cpus=0, scheduling_strategy=here).remote()

    def _put(self, content: bytes) -> Any:
        """Return a reference to these bytes in Ray's object store; put equal bytes there only once."""
        name = hashlib.sha256(content).hexdigest()
        if name not in self._initial:
            self._initial[name] = ray.put(content)
        return self._initial[name]


def _reach(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT. Without this check, Ray would retry, and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _pack(content: tuple[Problem, Mapping[str, Loaded], LoadedRecipe]) -> bytes:
    """Return what workers need of a study as bytes. Ray would print pages about what cannot be."""
    try:
        packed: bytes = ray.cloudpickle.dumps(content)
    except Exception as error:  # a user's objects may raise any
        raise UserError(
            f"the code of the study cannot be sent to other processes: {describe_exception(error)}; create such an "
            "object when it is needed, not when the module is imported"
        ) from error
    return packed


def _own_modules(study: Study) -> set[str]:
    """Return the names of the user's own modules, whose code is sent to the workers with the problem."""
    scores = [part for name in study.importances for part in name.split("/") if ":" in part]
    own = [*study.task.own_code, *study.recipe.own_code.values(), *scores]
    return {name for reference in own for name in own_modules(reference.partition(":")[0])}


class _Post:
    """A mailbox for the iterations and checkpoints of tasks, which the run empties regularly."""

    def __init__(self) -> None:
        self._at: dict[str, At] = {}
        self._checkpoints: dict[str, bytes] = {}

    def tell(self, at: At) -> None:
        before = self._at.get(at.key, at)
        self._at[at.key] = replace(at, losses=max(at.losses, before.losses, key=len))

    def keep(self, key: str, checkpoint: bytes) -> None:
        self._checkpoints[key] = checkpoint

    def empty(self) -> tuple[dict[str, At], dict[str, bytes]]:
        content = self._at, self._checkpoints
        self._at, self._checkpoints = {}, {}
        return content


def _train(
    job: Job | RoundJob,
    initial: bytes,
    problem: list[Any],
    stopped: bytes | None,
    post: Any,
    checkpoint_every: float,
    driver: dict[str, Any],
) -> Outcome | Pruned | Failed:
    """Do a job on a machine of the cluster."""
    torch.set_num_threads(THREADS)
    if other := differences({name: driver[name] for name in _MUST_AGREE}, machine()):
        return Failed(job.key, f"a machine of the cluster has other software than this one: {'; '.join(other)}")
    if (driver["kernels"] is None) != (machine()["kernels"] is None):
        return Failed(job.key, "compiled kernels are installed on one machine of the cluster and not on another")

    def tell(iteration: int, losses: tuple[float, ...] = ()) -> None:
        post.tell.remote(At(job.key, iteration, losses))

    def keep(checkpoint: bytes) -> None:
        post.keep.remote(job.key, checkpoint)

    try:
        with watch_exits():
            job = replace(job, initial=initial)
            loaded, importances, own = _load(problem[0])
            if isinstance(job, RoundJob):
                return perform_round(job, loaded, importances[job.importance], own)
            kind = str(kind_here(job.device))
            resume = None if stopped is None else checkpoint_from_bytes(stopped, kind, job.key)
            watch = make_watch(tell, keep, checkpoint_every, kind=kind, key=job.key)
            return perform(job, loaded, resume, watch, tell, own, watch_every=checkpoint_every)
    except BaseException as error:  # a user's code may raise anything
        return Failed.by(job.key, error)


@functools.lru_cache(maxsize=1)
def _load(reference: Any) -> tuple[Problem, dict[str, Loaded], LoadedRecipe]:
    """Return the problem, the importances and the recipe's own functions; each process fetches them only once."""
    found: tuple[Problem, dict[str, Loaded], LoadedRecipe] = ray.cloudpickle.loads(ray.get(reference))
    return found

"""What tests of stores and engines share: a study of a second, and stores compared byte for byte."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tombola.analysis import uniqueness
from tombola.engine.job import Job, RoundJob, perform, perform_round
from tombola.engine.local import LocalWorkers
from tombola.engine.run import Status, run
from tombola.engine.workers import At, Event
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.schema import Study, Task
from tombola.study.task import Problem, load_problem
from tombola.study.tickets import Tickets
from tombola.training.recipe import Recipe

MANY = 1000
"""Times that a run may ask workers without a job for news."""

RECORD = {"device", "finished", "iterations", "machine", "seconds", "seconds_per_iteration", "threads"}
"""What a result's record has."""

TASK = Task(dataset="tiny_task:dataset", model="tiny_task:model")


def problem(task: Task = TASK) -> Problem:
    return _problem(task.model_dump_json())


@functools.cache
def _problem(task: str) -> Problem:
    return load_problem(Task.model_validate_json(task))


def study(
    importances: Sequence[str] = ("magnitude", "l1"), seeds: Sequence[int] = (0,), levels: int = 1, **recipe: Any
) -> Study:
    """Return a study whose trainings take a tenth of a second; with momentum, so that a checkpoint must hold it."""
    recipe = {"momentum": 0.9, "batch_size": 32, "iterations": 60, "rewind": 10, "lr": 0.05} | recipe
    return Study(
        task=TASK,
        recipe=Recipe(**recipe),
        importances=tuple(importances),
        seeds=tuple(seeds),
        levels=levels,
        fraction=0.5,
    )


def planner(root: Path, of: Study | None = None) -> Planner:
    of = of or study()
    return Planner(of, problem(of.task), Store(root))


def describe_uniqueness(tickets: Tickets, *which: Any, **how: Any) -> list[str]:
    """Return the sentences on the tables of `tombola.analysis.uniqueness.collect`, whose arguments it takes."""
    tables, of = uniqueness.collect(tickets, *which, **how), tickets.planner
    return uniqueness.describe(tables, of.problem.measure, of.study.recipe.rewind)


def run_study(root: Path, of: Study | None = None, workers: int = 2, **how: Any) -> Status:
    plan = planner(root, of)
    with LocalWorkers(workers, plan.study.task, None, root, **how) as processes:
        return run(plan, processes, lambda *_: None)


class InTurn:
    """One worker in this very process, that does the jobs it is given in an order of its own."""

    count = 4
    are_here = True
    in_other_processes = True

    def __init__(self, *, last_first: bool, works_on: Problem | None = None) -> None:
        self._jobs: list[Job | RoundJob] = []
        self._problem = works_on or problem()
        self._last_first = last_first
        self._looks = 0
        self.order: list[str] = []

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def idle(self) -> bool:
        return len(self._jobs) < self.count

    def submit(self, job: Job | RoundJob) -> None:
        self._jobs.append(job)

    def events(self, timeout: float) -> Iterator[Event]:
        if self._jobs:
            self._looks = 0
            job = self._jobs.pop(-1 if self._last_first else 0)
            self.order.append(job.key)
            if isinstance(job, RoundJob):
                yield perform_round(job, self._problem)
                return
            yield At(job.key, job.begin)
            yield perform(job, self._problem, None, lambda *_: None)
        else:
            self._looks += 1
            assert self._looks < MANY, "a run waits for what nobody does"


def write_study(folder: Path, of: Study | None = None) -> list[str]:
    """Write a study and its task's module into a folder; return the command that runs it there."""
    of = of or study()
    for module in ("tiny_task.py", "gated_task.py"):
        shutil.copy(Path(__file__).with_name(module), folder)
    lists = {name: json.dumps(list(getattr(of, name))) for name in ("importances", "seeds")}
    lines = [f"{name} = {value}" for name, value in lists.items()]
    lines += [f"levels = {of.levels}", f"fraction = {of.fraction}", "[task]"]
    lines += [f"{name} = {_as_toml(value)}" for name, value in of.task.model_dump(exclude_defaults=True).items()]
    lines += ["[recipe]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in of.recipe.model_dump(exclude_defaults=True).items()]
    (folder / "small.toml").write_text("\n".join(lines))
    return [str(Path(sys.executable).with_name("tombola")), "run", "small.toml"]


def _as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_as_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


def content(root: Path) -> dict[str, bytes]:
    """Return every file of a store but the records of times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "record.json"
    }


def results(root: Path) -> list[Path]:
    """Return the folders of the results."""
    return sorted((root / "results").glob("??/*"))


def records(root: Path) -> list[dict[str, Any]]:
    store = Store(root, create=False)
    return [store.results.record(folder.name) for folder in results(root)]

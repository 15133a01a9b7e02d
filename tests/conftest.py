"""Fixtures shared by the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from small_study import STUDY


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tombola() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line in a process of its own."""

    def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from tombola.cli import main; raise SystemExit(main())", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tombola: Callable[..., subprocess.CompletedProcess[str]]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which `tombola run` has run `STUDY` with two workers, and what it said; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run = tombola("run", *STUDY, "--workers", "2", folder=folder)
    assert run.returncode == 0, run.stderr
    return folder, run


@pytest.fixture(scope="session")
def finished(finished_run: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The store in which every training of `STUDY` is; not to be changed."""
    return finished_run[0] / "tombola-store"


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tombola run` do its trainings in this process, which needs no time to start others."""
    from tombola.engine.job import Job, Outcome, perform
    from tombola.engine.workers import Failed
    from tombola.study.schema import Task
    from tombola.study.task import Problem, load_problem

    class Here:
        count = 1

        def __init__(self, count: int, task: Task, directory: Path | None, store: Path) -> None:
            self.problem: Problem = load_problem(task, directory)
            self.jobs: list[Job] = []

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def idle(self) -> bool:
            return not self.jobs

        def submit(self, job: Job) -> None:
            self.jobs.append(job)

        def events(self, timeout: float) -> Iterator[Outcome | Failed]:
            while self.jobs:
                job = self.jobs.pop()
                try:
                    yield perform(job, self.problem, None, lambda iteration, checkpoint: None)
                except Exception as error:
                    yield Failed.by(job.key, error)

    monkeypatch.setattr("tombola.engine.local.LocalWorkers", Here)
    monkeypatch.setattr(
        "tombola.engine.estimate._time_iterations", lambda *_: (0.001, 0.1)
    )  # seconds an iteration, and before

"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock

from processes import LONG, kill_children, run_command
from small_study import STUDY

# The examples are the same each time. To try others, and twenty times as many: pytest --hypothesis-profile explore
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # also for what fixtures compute before the first test
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what runs in the background ignore it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped, why, and how to have it run."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section("not run")
    reasons = Counter((report.nodeid.partition("::")[0], reason_of(report)) for report in skipped)
    for (file, reason), count in sorted(reasons.items()):
        why, _, how = reason.partition("; to run: ")
        terminalreporter.line(f"{count:4} of {Path(file).name}: {why}")
        terminalreporter.line(f"     to run: {how or 'nobody has said how'}")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why something was skipped."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_children() -> Iterator[None]:
    yield
    kill_children()


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which `tombola run` has run `STUDY` with two workers, and what it said; not to be changed.

    It runs once, for all processes in which tests run.
    """
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        root = root.parent
    folder = root / "finished"
    with FileLock(root / "finished.lock", timeout=2 * LONG):
        if not folder.exists():
            new = root / "unfinished"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            run = run_command(new, ["tombola", "run", *STUDY, "--workers", "2"])
            assert run.returncode == 0, run.stderr
            (new / "said.json").write_text(json.dumps([run.args, run.returncode, run.stdout, run.stderr]))
            new.rename(folder)
    return folder, subprocess.CompletedProcess(*json.loads((folder / "said.json").read_text()))


@pytest.fixture(scope="session")
def finished(finished_run: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The store in which every training of `STUDY` is; not to be changed."""
    return finished_run[0] / "tombola-store"


@pytest.fixture(scope="session")
def importable_torchvision() -> None:
    """Let libraries import torchvision, which most of them do where it is installed.

    PyPI's is compiled for CUDA: beside torch for the CPU its operators do not load, and importing it fails, since it
    describes two of them. Nothing here calls one, so that it is enough to name these two.
    """
    if find_spec("torchvision") is None:
        return
    with warnings.catch_warnings(action="ignore"):
        try:
            import torchvision
        except RuntimeError:
            for name in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            import torchvision  # noqa: F401


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tombola run` do its trainings in this process, which needs no time to start others."""
    from tombola.engine.job import Job, Outcome, Pruned, RoundJob, perform, perform_round
    from tombola.engine.workers import Failed
    from tombola.study.schema import Task
    from tombola.study.task import Problem, load_problem

    class Here:
        count = 1
        are_here = True
        in_other_processes = True

        def __init__(self, count: int, task: Task, directory: Path | None, store: Path) -> None:
            self.problem: Problem = load_problem(task, directory)
            self.jobs: list[Job | RoundJob] = []

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def idle(self) -> bool:
            return not self.jobs

        def submit(self, job: Job | RoundJob) -> None:
            self.jobs.append(job)

        def pause(self) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

        def events(self, timeout: float) -> Iterator[Outcome | Pruned | Failed]:
            while self.jobs:
                job = self.jobs.pop()
                try:
                    if isinstance(job, RoundJob):
                        yield perform_round(job, self.problem)
                    else:
                        yield perform(job, self.problem, None, lambda iteration, checkpoint: None)
                except Exception as error:
                    yield Failed.by(job.key, error)

    for module in ("tombola.engine.local", "tombola.workbench.runs"):
        monkeypatch.setattr(f"{module}.LocalWorkers", Here)
    monkeypatch.setattr(
        "tombola.engine.estimate._time_iterations", lambda *_, **__: (0.001, 0.1)
    )  # seconds an iteration, and before

"""Hooks: what they are told, that a run is the same with and without them, and how they end a chain."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_task
import tombola
from tombola import Recipe, Store, Study, Task, UserError
from tombola.cli.run import open_writer
from tombola.engine.here import WorkersHere
from tombola.engine.job import Job
from tombola.hooks import Report, StopTraining, writers
from tombola.study.chains import Chain
from tombola.study.trainings import Training
from tombola.workbench.studies import open_planner


def study(**fields: Any) -> Study:
    """A study of two importances in three epochs, whose functions only this process has."""
    given: dict[str, Any] = {
        "task": Task(dataset=tiny_task.dataset(), model=lambda: tiny_task.model()),  # type: ignore[arg-type]
        "recipe": Recipe(epochs=3, batch_size=40, lr=0.1),
        "importances": ["magnitude", "l1"],
        "seeds": [0],
        "levels": 1,
        "fraction": 0.5,
    }
    return Study(**given | fields)


def run(store: Path, *hooks: Any, **fields: Any) -> list[tuple[str, int]]:
    """Run the study with hooks that are told epochs; return the tickets that the store then has."""
    found = tombola.run(study(**fields), store=store, progress=False, hooks=hooks, epochs=True)
    return list(found.select("importance", "level").iter_rows())


def stored(root: Path) -> dict[str, str]:
    """Return the hashes of all trained weights, by the names of the trainings."""
    results = Store(root).results
    return {key: results.get(key).weights.hash for key in results}  # type: ignore[union-attr]


def of_chain(told: list[Report], importance: str) -> list[Report]:
    return [report for report in told if report.chain.importance == importance]


def test_a_hook_is_told_each_epoch_and_level_of_each_chain_in_order(tmp_path: Path) -> None:
    told: list[Report] = []
    found = tombola.run(study(), store=tmp_path, progress=False, hooks=[told.append], epochs=True)
    for name in ("magnitude", "l1"):
        own = of_chain(told, name)
        assert {report.chain for report in own} == {Chain(0, name)}
        assert [(report.level, report.epoch) for report in own] == [
            (level, epoch) for level in (0, 1) for epoch in (1, 2, 3, None)
        ]
        assert [len(report.losses) for report in own] == [1, 2, 3, 3] * 2
        assert own[2].losses == own[3].losses
        levels = [report for report in own if report.epoch is None]
        assert [report.density for report in levels] == [1.0, 0.5] == [own[0].density, own[4].density]
        assert [report.metrics["test accuracy"] for report in levels] == found.filter(importance=name)[
            "test_accuracy"
        ].to_list()
        assert all(sorted(report.metrics) == ["test accuracy", "test loss"] for report in levels)
        assert not any(report.diverged for report in own)
    again: list[Report] = []
    run(tmp_path, again.append)
    assert all(of_chain(again, name) == of_chain(told, name) for name in ("magnitude", "l1")), "it is all stored"
    levels_only: list[Report] = []
    tombola.run(study(), store=tmp_path, progress=False, hooks=[levels_only.append])
    assert levels_only == [report for report in again if report.epoch is None]


def test_a_rewind_point_is_told_as_no_level(tmp_path: Path) -> None:
    told: list[Report] = []
    recipe = Recipe(epochs=3, batch_size=40, lr=0.1, rewind=10)  # an epoch of 10 iterations
    run(tmp_path, told.append, recipe=recipe, importances=["l1"])
    assert [(report.level, report.epoch) for report in told] == [(0, 1), (0, 2), (0, None), (1, 1), (1, 2), (1, None)]


def test_a_training_that_diverges_has_no_metrics(tmp_path: Path) -> None:
    told: list[Report] = []
    run(tmp_path, told.append, recipe=Recipe(epochs=3, batch_size=32, lr=1e30), importances=["l1"])
    assert (told[-1].level, told[-1].diverged, told[-1].metrics) == (0, True, {})


def test_a_hook_changes_neither_names_nor_bits_if_it_draws_random_numbers(tmp_path: Path) -> None:
    def hook(report: Report) -> None:
        torch.manual_seed(report.level)
        torch.rand(3)

    tombola.run(study(), store=tmp_path / "without", progress=False)
    run(tmp_path / "with", hook)
    assert stored(tmp_path / "with") == stored(tmp_path / "without")
    assert len(stored(tmp_path / "with")) == 3


def test_a_training_waits_while_a_hook_runs(tmp_path: Path) -> None:
    planner = open_planner(study(), store=tmp_path)
    need = planner.progress(planner.chains[0]).waits_for
    assert isinstance(need, Training)
    with WorkersHere(planner.problem, Store(tmp_path)) as workers:
        workers.submit(Job.of(need, planner.study, tells_epochs=True))
        with workers.pause():
            assert not workers._computes
            before = torch.get_rng_state()
            torch.rand(1)
            assert not torch.get_rng_state().equal(before)
        workers.cancel(need.key)
        assert workers.idle
        assert list(workers.events(timeout=0)) == []


@pytest.mark.parametrize("here", [True, False], ids=["here", "in a process"])
def test_an_epoch_ends_a_training_which_is_not_stored(tmp_path: Path, here: bool) -> None:
    told: list[tuple[int, int | None]] = []

    def hook(report: Report) -> None:
        told.append((report.level, report.epoch))
        if told[-1] == (1, 2):
            raise StopTraining("it is good enough")

    elsewhere = {} if here else {"task": Task(dataset="tiny_task:dataset", model="tiny_task:model")}
    of = study(importances=["l1"], **elsewhere)
    found = tombola.run(of, store=tmp_path / "s", workers=1, progress=False, hooks=[hook], epochs=True)
    assert found["level"].to_list() == [0]
    assert told == [(0, 1), (0, 2), (0, 3), (0, None), (1, 1), (1, 2)]
    halted = stored(tmp_path / "s")
    assert len(halted) == 1, "the dense network"
    if here:
        assert run(tmp_path / "s", importances=["l1"]) == [("l1", 0), ("l1", 1)], "a run without the hook goes on"
        run(tmp_path / "other", importances=["l1"])
        assert halted.items() <= stored(tmp_path / "s").items()
        assert stored(tmp_path / "s") == stored(tmp_path / "other")


def test_a_level_ends_a_chain_and_the_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hook(report: Report) -> None:
        if report.level == 0 and report.chain.importance == "l1":
            raise StopTraining("the accuracy fell")

    for _ in range(2):  # the second time, all that it stops at is stored
        found = tombola.run(study(), store=tmp_path, hooks=[lambda _: None, hook])
        shown = capsys.readouterr()
        assert "tombola: l1, seed 0 was stopped after level 0: the accuracy fell\n" in shown.err
        assert found.select("importance", "level").rows() == [("magnitude", 0), ("magnitude", 1), ("l1", 0)]
    assert "[2/2]" not in shown.out


def test_what_stops_the_shared_training_of_one_chain_lets_the_other_go_on(tmp_path: Path) -> None:
    def hook(report: Report) -> None:
        if report.chain.importance == "l1":
            raise StopTraining

    assert run(tmp_path, hook)[:2] == [("magnitude", 0), ("magnitude", 1)]
    assert len(stored(tmp_path)) == 2


def test_every_hook_is_told_before_one_stops_the_chain(tmp_path: Path) -> None:
    def stop(report: Report) -> None:
        raise StopTraining("enough")

    told: list[Report] = []
    with pytest.raises(UserError, match="no result of this study is in"):
        run(tmp_path, stop, told.append)
    assert [(report.level, report.epoch) for report in told] == [(0, 1), (0, 1)]


def test_another_exception_of_a_hook_ends_the_run(tmp_path: Path) -> None:
    def fail(report: Report) -> None:
        raise LookupError("a mistake in the hook")

    with pytest.raises(LookupError, match="a mistake in the hook"):
        run(tmp_path, fail)
    assert stored(tmp_path) == {}


@pytest.mark.parametrize(
    ("hooks", "got"), [("tensorboard", "str instead of a list of them"), (["tensorboard"], "str$"), ([None], "None")]
)
def test_what_is_no_hook_is_refused_before_anything_is_trained(tmp_path: Path, hooks: Any, got: str) -> None:
    with pytest.raises(UserError, match=rf"^hooks: expected functions of a report, such as .*, got {got}"):
        tombola.run(study(), store=tmp_path / "store", hooks=hooks)
    assert not (tmp_path / "store").exists()


# TensorBoard and MLflow, by modules that stand in for them.


class Board:
    """The writer of TensorBoard, which notes what it is given."""

    logged: list[tuple[str, str, float, int]]
    closed: list[str]

    def __init__(self, folder: str) -> None:
        self.run = Path(folder).name

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.logged.append((self.run, key, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed.append(self.run)


class Client:
    """The client of MLflow, which notes what it is given."""

    logged: list[tuple[str, str, float, int]]
    closed: list[str]

    def __init__(self, tracking_uri: str) -> None:
        if tracking_uri == "http://nowhere":
            raise ConnectionError("no route")

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "0"

    def create_run(self, place: str, run_name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def log_param(self, run: str, name: str, value: object) -> None:
        assert (name, value) in {("importance", "l1"), ("seed", 0), ("data_seed", 0)}

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.logged.append((run, key, value, step))

    def set_terminated(self, run: str, status: str) -> None:
        self.closed.append(f"{run} {status}")


@pytest.fixture(params=[Board, Client])
def noted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, member in (("torch.utils.tensorboard", "SummaryWriter"), ("mlflow", "MlflowClient")):
        module = ModuleType(name)
        setattr(module, member, Board if member == "SummaryWriter" else Client)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(request.param, "logged", [], raising=False)
    monkeypatch.setattr(request.param, "closed", [], raising=False)
    return request.param


def test_a_writer_logs_levels_and_epochs_of_each_chain(tmp_path: Path, noted: Any) -> None:
    writer = open_writer(f"tensorboard={tmp_path}" if noted is Board else "mlflow=http://here")
    told: list[Report] = []
    run(tmp_path / "store", writer, told.append, importances=["l1"])
    keys = {(key, step) for run, key, _, step in noted.logged if run == "l1 seed 0"}
    assert keys == {
        *((f"loss of level {level}", epoch) for level in (0, 1) for epoch in (1, 2, 3)),
        *((key, level) for level in (0, 1) for key in ("density", "train loss", "test accuracy", "test loss")),
    }
    values = {(key, step): value for _, key, value, step in noted.logged}
    assert values["density", 1] == 0.5
    assert values["loss of level 1", 2] == told[-1].losses[1]
    assert values["train loss", 1] == told[-1].losses[-1]
    assert values["test accuracy", 1] == told[-1].metrics["test accuracy"]
    assert noted.closed == (["l1 seed 0"] if noted is Board else ["l1 seed 0 FINISHED"])


def test_the_runs_of_two_importances_have_two_names() -> None:
    assert writers._name(Chain(0, "a/b")) != writers._name(Chain(0, "a-b"))


def test_a_run_that_fails_is_closed_as_one_that_failed(tmp_path: Path, noted: Any) -> None:
    def fail(report: Report) -> None:
        raise LookupError("a mistake in the hook")

    writer = tombola.hooks.tensorboard(tmp_path) if noted is Board else tombola.hooks.mlflow("http://here")
    with pytest.raises(LookupError):
        run(tmp_path / "store", writer, fail, importances=["l1"])
    assert noted.closed == (["l1 seed 0"] if noted is Board else ["l1 seed 0 FAILED"])


@pytest.mark.usefixtures("noted")
def test_a_server_that_cannot_be_reached_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^hooks: MLflow at http://nowhere cannot be written: ConnectionError: no rou"):
        run(tmp_path / "store", tombola.hooks.mlflow("http://nowhere"), importances=["l1"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^hooks: TensorBoard in \S+ cannot be written: NotADirectoryError: "):
        run(tmp_path / "store", tombola.hooks.tensorboard(tmp_path / "file" / "runs"), importances=["l1"])
    for place, said in (
        (tmp_path / "file", "FileExistsError"),
        ("/proc", "(PermissionError|FileNotFoundError|OSError)"),
    ):
        with pytest.raises(UserError, match=rf"^hooks: TensorBoard in \S+ cannot be written: {said}: "):
            run(tmp_path / "store", tombola.hooks.tensorboard(place), importances=["l1"])
    assert stored(tmp_path / "store") == {}


@pytest.mark.usefixtures("noted")
def test_a_database_needs_the_whole_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"^MLflow at sqlite:///a\.db: a database needs more than mlflow-skinny: pip ins"
    ):
        writers.mlflow("sqlite:///a.db")


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"^{name} is not installed: pip install 'tombola\[{name}\]'$"):
        getattr(writers, name)("place")


@pytest.mark.parametrize("text", ["wandb=here", "tensorboard", "tensorboard=", "=runs"])
def test_a_writer_that_the_command_line_does_not_have(text: str) -> None:
    with pytest.raises(UserError, match=r"^--log: expected tensorboard=FOLDER or mlflow=URI, got"):
        open_writer(text)

"""Results of a network that computes something else by now, although its source is the same."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from changing_task import CONFIGURATION, Network, dataset, loss
from stores import InTurn
from stores import study as small_study
from tombola.cli import main
from tombola.engine.job import Job, RoundJob, perform, perform_round
from tombola.engine.run import run
from tombola.errors import UserError
from tombola.store.check import list_damage
from tombola.store.store import Store
from tombola.study.behaviour import StaleResultsWarning
from tombola.study.depends import identify_all
from tombola.study.planner import Planner
from tombola.study.repeatable import check_repeatable
from tombola.study.schema import Study, Task
from tombola.study.task import Problem, load_problem
from tombola.training.behaviour import TOLERANCE, agree, observe, observe_recipe
from tombola.training.recipe import Recipe
from tombola.training.trial import spread


@pytest.fixture(autouse=True)
def configuration() -> Iterator[None]:
    CONFIGURATION.clear()
    yield
    CONFIGURATION.clear()


def study(importances: tuple[str, ...] = ("magnitude",)) -> Study:
    task = Task(dataset="changing_task:dataset", model="changing_task:Network", loss="changing_task:loss")
    return small_study(importances, levels=1, rewind=0, iterations=5).model_copy(update={"task": task})


def problem() -> Problem:
    return load_problem(study().task)


def planner(root: Path, importances: tuple[str, ...] = ("magnitude",)) -> Planner:
    return Planner(study(importances), problem(), Store(root))


def run_all(root: Path, importances: tuple[str, ...] = ("magnitude",)) -> Planner:
    plan = planner(root, importances)
    with InTurn(last_first=False, works_on=plan.problem) as workers:
        run(plan, workers, lambda *_: None)
    return plan


def keys(plan: Planner) -> list[str]:
    return [training.key for chain in plan.chains for training in plan.progress(chain).trainings]


CHANGES = pytest.mark.parametrize(
    ("name", "value"), [("activation", torch.tanh), ("dropout", 0.2), ("smoothing", 0.01)]
)


@CHANGES
def test_results_of_what_the_network_computed_before_are_not_used(tmp_path: Path, name: str, value: object) -> None:
    importances = ("magnitude", "taylor")  # the masks of the second depend on the network too
    before = keys(run_all(tmp_path, importances))
    masks = Store(tmp_path).entries()
    assert len(before) == 4
    assert sum(entry.kind == "mask" for entry in masks) == 2
    CONFIGURATION[name] = value
    with pytest.warns(StaleResultsWarning, match="computes something else than when results of this study were stored"):
        assert keys(planner(tmp_path, importances)) == []
    with pytest.warns(StaleResultsWarning):
        after = keys(run_all(tmp_path, importances))
    assert len(after) == 4
    assert not set(after) & set(before)
    assert keys(planner(tmp_path, importances)) == after  # known now: nothing is said
    CONFIGURATION.clear()
    assert keys(planner(tmp_path, importances)) == before


def test_a_store_without_behaviours_is_used_as_it_is_and_gets_one(tmp_path: Path) -> None:
    before = keys(run_all(tmp_path))
    [path] = (tmp_path / "behaviours").iterdir()
    path.unlink()
    assert keys(planner(tmp_path)) == before
    assert not path.exists()  # looking does not write
    assert keys(run_all(tmp_path)) == before
    assert path.exists()


def test_rounding_is_no_change(tmp_path: Path) -> None:
    before = keys(run_all(tmp_path))
    CONFIGURATION["activation"] = lambda x: torch.relu(x) * (1 + 1e-6)
    assert keys(planner(tmp_path)) == before


def test_two_runs_that_notice_different_behaviours_at_once_take_two_numbers(tmp_path: Path) -> None:
    first = planner(tmp_path)
    assert first.identity == first.problem.identity
    CONFIGURATION["activation"] = torch.tanh
    other = planner(tmp_path)
    assert other.identity == first.identity  # the store knows none of the two
    other.keep_behaviour()
    CONFIGURATION.clear()
    with pytest.warns(StaleResultsWarning):
        first.keep_behaviour()
    assert first.identity["behaviour"] == 1
    assert "behaviour" not in other.identity


def test_a_worker_whose_network_computes_something_else_refuses_the_training(tmp_path: Path) -> None:
    plan = planner(tmp_path)
    [need] = plan.progress(plan.chains[0]).needs
    job = Job.of(need, plan.study)  # type: ignore[arg-type]
    assert perform(job, problem(), None, lambda *_: None).key == need.key
    CONFIGURATION["activation"] = torch.tanh
    with pytest.raises(
        UserError, match="in a worker, the network, the loss or the recipe's functions compute something else"
    ):
        perform(job, problem(), None, lambda *_: None)


def test_a_damaged_behaviour_is_found_and_nothing_is_trained_again_for_it(tmp_path: Path) -> None:
    before = keys(run_all(tmp_path))
    [path] = (tmp_path / "behaviours").iterdir()
    sound = path.read_bytes()
    other = json.loads(sound)
    other["computes"][0][0] += 0.5
    changed = json.dumps(other).encode()
    for content in (b"", b"[]", b'{"name": "x", "number": 0, "computes": [[1.0]]}', changed):
        path.write_bytes(content)
        assert [(damage.kind, damage.name) for damage in list_damage(Store(tmp_path))] == [("behaviour", path.name)]
        with pytest.raises(UserError, match="is damaged, so that it is not known whether its results are still valid"):
            keys(planner(tmp_path))
    path.unlink()
    assert keys(planner(tmp_path)) == before
    path.write_bytes(sound)
    path.with_name(path.name.replace(".0.", ".00.")).write_bytes(b"")  # the name of no behaviour
    assert keys(planner(tmp_path)) == before
    del other["hash"]  # as earlier versions wrote it
    path.write_bytes(json.dumps(other).encode())
    assert not list(list_damage(Store(tmp_path)))


def test_a_worker_that_scores_another_network_refuses_the_round(tmp_path: Path) -> None:
    plan = planner(tmp_path, ("taylor",))
    job = RoundJob.of(plan.first_round("taylor"), plan.study, plan.rule)
    assert perform_round(job, problem()).key == job.key
    CONFIGURATION["activation"] = torch.tanh
    with pytest.raises(UserError, match="in a worker, the network, the loss or the recipe's functions compute"):
        perform_round(job, problem())


def test_results_from_a_checkpoint_are_compared_with_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Network().state_dict(), tmp_path / "start.safetensors")
    of = study().model_copy(
        update={"task": study().task.model_copy(update={"checkpoint": str(tmp_path / "start.safetensors")})}
    )
    plan = Planner(of, load_problem(of.task), Store(tmp_path / "s"))
    with InTurn(last_first=False, works_on=plan.problem) as workers:
        run(plan, workers, lambda *_: None)
    CONFIGURATION.update(activation=torch.tanh, scale=2.0)  # the weights that the model draws are others too
    with pytest.warns(StaleResultsWarning):
        assert keys(Planner(of, load_problem(of.task), Store(tmp_path / "s"))) == []


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.8), ("slope", 0.6)])
def test_functions_of_a_recipe_are_observed_too(tmp_path: Path, name: str, value: float) -> None:
    own = {"optimizer": "changing_task:optimizer", "schedule": "changing_task:schedule", "momentum": 0.0}
    of = study().model_copy(update={"recipe": study().recipe.model_copy(update=own)})

    def plan() -> Planner:
        return Planner(of, load_problem(of.task), Store(tmp_path))

    with InTurn(last_first=False, works_on=plan().problem) as workers:
        run(plan(), workers, lambda *_: None)
    assert len(keys(plan())) == 2
    CONFIGURATION[name] = value
    with pytest.warns(StaleResultsWarning):
        assert keys(plan()) == []


def test_a_schedule_may_give_negative_numbers_where_its_warm_up_is_longer_than_what_is_observed() -> None:
    recipe = Recipe(iterations=1000, schedule="own:schedule")

    def schedule(iteration: int, end: int) -> float:
        return (end - iteration) / (end - 500)

    assert observe_recipe(recipe, {"schedule": schedule})
    with pytest.raises(UserError, match=r"expected a finite number from 0, got -0\.25 at iteration 0 of 100"):
        recipe.own_factor(schedule, 0, 100)


def test_a_network_that_does_not_repeat_is_refused(tmp_path: Path) -> None:
    count = iter(range(1000))
    plan = planner(tmp_path)
    check_repeatable(plan)
    CONFIGURATION["activation"] = lambda x: x + next(count)
    with pytest.raises(UserError, match="different outputs"):
        check_repeatable(plan)


def test_a_network_that_does_not_repeat_in_training_alone_is_refused(tmp_path: Path) -> None:
    count = iter(range(1000))
    CONFIGURATION["dropout"] = 0.0

    def drift(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + next(count)) if torch.is_grad_enabled() else x

    CONFIGURATION["activation"] = drift
    with pytest.raises(UserError, match="different outputs in training"):
        check_repeatable(planner(tmp_path))


def test_the_command_line_says_once_that_results_are_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(tmp_path / "store")
    (tmp_path / "s.toml").write_text(
        'importances = ["magnitude"]\nseeds = [0]\nlevels = 1\nfraction = 0.5\n[task]\n'
        'dataset = "changing_task:dataset"\nmodel = "changing_task:Network"\nloss = "changing_task:loss"\n'
        "[recipe]\nmomentum = 0.9\nbatch_size = 32\niterations = 5\nlr = 0.05\n"
    )
    command = ["results", str(tmp_path / "s.toml"), "--store", str(tmp_path / "store")]
    with warnings.catch_warnings():  # the command line ignores what it has printed
        assert main(command) == 0
        assert "note" not in capsys.readouterr().err
        CONFIGURATION["activation"] = torch.tanh
        assert main(command) == 2
    printed = capsys.readouterr().err
    assert printed.count("note: task.model 'changing_task:Network'") == 1
    assert "no result of this study" in printed


# Behaviours as numbers


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(-0.9, 0.9))
def test_behaviours_agree_within_the_tolerance_of_the_largest_number(numbers: list[float], share: float) -> None:
    scale = max(map(abs, numbers))
    moved = [number + share * TOLERANCE * scale for number in numbers]
    assert agree((tuple(numbers),), (tuple(moved),))
    far = [*numbers[:-1], numbers[-1] + math.copysign(3 * TOLERANCE * scale + 1e-3, numbers[-1])]
    assert not agree((tuple(numbers),), (tuple(far),))


def test_numbers_that_are_not_finite_agree_with_each_other_alone() -> None:
    assert agree(((None, 1.0),), ((None, 1.0),))
    assert not agree(((None, 1.0),), ((1.0, 1.0),))
    assert not agree(((1.0,),), ((1.0, 1.0),))
    assert not agree(((1.0,),), ((1.0,), (1.0,)))


def test_what_a_network_computes_is_observed_without_a_trace() -> None:
    data = dataset()
    inputs, labels, stream = data.train_inputs.clone(), data.train_labels.clone(), torch.random.get_rng_state()

    def overwrite(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels.zero_()
        return outputs.mean()

    seen = observe(Network, overwrite, data)
    assert seen == observe(Network, overwrite, data)
    assert torch.equal(data.train_inputs, inputs)
    assert torch.equal(data.train_labels, labels)
    assert torch.equal(torch.random.get_rng_state(), stream)


def test_a_step_that_needs_derivatives_and_large_outputs_are_observed() -> None:
    def penalise(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs.requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return slope.square().mean()

    assert len(observe(Network, loss, dataset(), step=penalise)) == 2
    assert spread(2**24 + 4, 3).tolist() == [0, 2**23 + 1, 2**24 + 3]


def test_outputs_that_are_not_dense_are_not_observed() -> None:
    with pytest.raises(UserError, match="expected a dense tensor with values, got one that is sparse"):
        observe(Network, loss, dataset(), forward=lambda model, inputs: model(inputs).to_sparse())


# What a study names


def test_a_study_depends_on_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "a.yaml", tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    file.write_text("1")
    (folder / "inner" / "b").write_text("2")
    monkeypatch.setenv("NAMED", "3")
    names = [str(file), str(folder), "env:NAMED", "env:NOT_SET", "package:torch", "value:4"]

    def identity() -> object:
        return load_problem(study().task.model_copy(update={"depends": tuple(names)})).identity["depends"]

    seen = [identity()]
    assert identity_of_plain() == {}
    for change in (
        lambda: file.write_text("5"),
        lambda: (folder / "inner" / "b").write_text("5"),
        lambda: (folder / "inner" / "b").rename(folder / "c"),
        lambda: monkeypatch.setenv("NAMED", "5"),
        lambda: monkeypatch.setenv("NOT_SET", "5"),
        lambda: names.__setitem__(-1, "value:5"),
    ):
        change()
        seen.append(identity())
    assert all(one != other for number, one in enumerate(seen) for other in seen[:number])


def identity_of_plain() -> object:
    return load_problem(study().task).identity.get("depends", {})


@pytest.mark.parametrize("name", ["missing.yaml", "package:not-installed", "package:", "nul\0"])
def test_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^task\.depends: "):
        identify_all([name])


def test_what_a_run_writes_into_a_folder_does_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("1")
    before = identify_all([str(tmp_path)])
    for folder in ("__pycache__", ".tombola-cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.pyc").write_text("2")
    (tmp_path / "inner").mkdir()
    Store(tmp_path / "inner" / "store")
    assert identify_all([str(tmp_path)]) == before
    with pytest.raises(UserError, match="store' is a store, which changes with each run"):
        identify_all([str(tmp_path / "inner" / "store")])
    (tmp_path / "inner" / "store.json").write_text("{}")
    assert identify_all([str(tmp_path)]) != before, "it is no store"


def test_a_worker_with_another_file_refuses_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMED", "1")
    of = study().model_copy(update={"task": study().task.model_copy(update={"depends": ("env:NAMED",)})})
    plan = Planner(of, load_problem(of.task), Store(tmp_path))
    [need] = plan.progress(plan.chains[0]).needs
    monkeypatch.setenv("NAMED", "2")
    with pytest.raises(UserError, match=r"task\.depends: a file or a variable has changed"):
        perform(replace(Job.of(need, of)), load_problem(of.task), None, lambda *_: None)  # type: ignore[arg-type]

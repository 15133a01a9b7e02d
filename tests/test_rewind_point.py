"""Basins, rewind points and early masks: what is trained, the figures in another way, and what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import tombola
from stores import InTurn, describe_uniqueness, planner, results, study
from tombola.analysis import basins, connectivity, early, rewind_point, uniqueness
from tombola.cli import main
from tombola.engine import estimate as estimates
from tombola.engine.forecast import Speed
from tombola.engine.run import run
from tombola.errors import NothingStoredError, UserError
from tombola.pruning.mask import Mask
from tombola.reporting.contents import FURTHER, gather
from tombola.reporting.sections import sections
from tombola.study.chains import Chain
from tombola.study.controls import list_combinations, list_controls, list_transfers
from tombola.study.early import list_snapshots, plan_snapshots, prune_at_once
from tombola.study.needs import list_needs
from tombola.study.planner import Planner
from tombola.study.rewind_point import list_planners, list_rewind_points, plan_rewind_points
from tombola.study.schema import Study
from tombola.study.singles import name_dense
from tombola.study.tickets import Tickets
from tombola.training.evaluation import evaluate
from tombola.training.train import train

pytestmark = pytest.mark.xdist_group("rewind_point")  # one study for all

STUDY = study(seeds=(0, 1), levels=2, iterations=12, rewind=2)
AT = [0, 5]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a study, its rewind points at two iterations, and its networks at two iterations."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("points") / "store"
    finish(planner(root, STUDY))
    for each in list_planners(plan_rewind_points(open_tickets(root), AT, 1, "l1")):
        finish(each)
    finish(plan_snapshots(open_tickets(root), [3, 7]).planner)
    return root


def finish(of: Planner) -> None:
    run(of, InTurn(last_first=False), lambda *_: None)


def open_tickets(root: Path, of: Study = STUDY) -> Tickets:
    return Tickets(planner(root, of))


def measure_error(of: Planner, state: dict[str, torch.Tensor]) -> float:
    model = of.problem.build()
    model.load_state_dict(state)
    connectivity.recompute_statistics(model, of.problem.data)
    return 1 - evaluate(model, of.problem.data, of.problem.loss, of.problem.forward)[0]


def measure_barrier(of: Planner, one: Any, other: Any) -> float:
    """Return the barrier over three points, computed apart."""
    first, second = one.load_trained(), other.load_trained()
    middle = {name: (t + second[name]) / 2 if t.is_floating_point() else t for name, t in first.items()}
    ends = (measure_error(of, first) + measure_error(of, second)) / 2
    return max(0.0, measure_error(of, middle) - ends)


# Basins.


def test_barriers_to_the_next_level_and_to_the_dense_network_in_another_way(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, evaluate = list[object](), connectivity.evaluate
    monkeypatch.setattr(connectivity, "evaluate", lambda *given: asked.append(given) or evaluate(*given))
    tickets = open_tickets(root)
    table = basins.of_study(tickets, ["l1"], points=3, tolerance=0.1)
    assert table.select("importance", "seed", "level").rows() == [("l1", s, n) for s in (0, 1) for n in (0, 1, 2)]
    assert len(asked) == 2 * (3 + 3), "of each seed, three tickets and the middle of each of three lines"
    dense, first, second = tickets.progress(Chain(1, "l1")).tickets
    of = tickets.planner
    (line,) = table.filter(seed=1, level=1).to_dicts()
    assert line["next"] == pytest.approx(measure_barrier(of, first, second))
    assert line["dense"] == pytest.approx(measure_barrier(of, dense, first))
    assert line["other_order"] is None
    assert table["connected"].to_list() == [
        None if barrier is None else barrier <= 0.1 for barrier in table["next"].to_list()
    ]
    assert table.filter(level=2)["next"].to_list() == [None, None]
    assert table.filter(level=0)["dense"].to_list() == [None, None]
    means = basins.summarise(table, tickets, tolerance=0.1)
    assert means.filter(level=1)["next"][0] == pytest.approx(table.filter(level=1)["next"].to_numpy().mean())
    assert means["seeds"].to_list() == [2, 2, 0]
    assert means["keeps"].to_list()[0] is True


@pytest.mark.parametrize(
    ("connected", "keeps", "text"),
    [
        ([True, True, None], [True, True, False], "the accuracy falls first, by 1 level."),
        ([True, False, None], [True, True, True], "the connection is lost first, by 1 level."),
        ([False, True, None], [True, False, True], "no level is connected; level 0 alone keeps the accuracy: the two"),
    ],
)
def test_the_two_verdicts_are_compared(connected: list[bool | None], keeps: list[bool], text: str) -> None:
    table = pl.DataFrame({"importance": ["l1"] * 3, "level": [0, 1, 2], "connected": connected, "keeps": keeps})
    (sentence,) = basins.describe(table)
    assert text in sentence


# Rewind points.


def test_two_data_orders_share_all_before_the_rewind_point(root: Path) -> None:
    for point in plan_rewind_points(open_tickets(root), AT, 1, "l1"):
        orders, places = point.plan_orders()
        assert sorted(places) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for (seed, level), chain in places.items():
            (other,) = orders.progress(chain).trainings
            own = point.tickets.progress(Chain(seed, "l1"))
            (training,) = [each for each in own.trainings if each.mask == other.mask and each.end == 12]
            assert (other.begin, other.end, training.begin) == (point.iteration, 12, point.iteration)
            assert other.initial.hash == training.initial.hash == own.tickets[level].rewind.hash
            assert (training.seed, other.seed) == (seed, 2)


def test_barriers_of_two_data_orders_in_another_way(root: Path) -> None:
    points = plan_rewind_points(open_tickets(root), AT, 1, "l1")
    table = rewind_point.of_points(points, 3)
    assert len(table) == 2 * 2 * 2
    orders, places = points[1].plan_orders()
    (line,) = table.filter(iteration=5, seed=1, level=1).to_dicts()
    first = points[1].tickets.progress(Chain(1, "l1")).tickets[1]
    (second,) = Tickets(orders).progress(places[1, 1]).tickets
    assert line["barrier"] == pytest.approx(measure_barrier(points[1].planner, first, second))
    assert line["first"] == pytest.approx(measure_error(points[1].planner, first.load_trained()))
    assert line["jaccard"] is None
    dense = points[1].tickets.progress(Chain(1, "l1")).tickets[0]
    (other,) = Tickets(orders).progress(places[1, 0]).tickets
    one, two = (
        prune_at_once(points[1].planner, each.trained.weights, each.rewind, "l1", 0.25, 1)
        for each in (dense, other)
        if each.trained is not None
    )
    (line,) = table.filter(iteration=5, seed=1, level=0).to_dicts()
    assert line["jaccard"] == (one & two).alive / (one | two).alive
    assert 0 < line["chance"] < line["jaccard"] < 1
    means = rewind_point.summarise(table, tolerance=1.0)
    assert rewind_point.find_earliest(means) == {0: 0, 1: 0}
    assert rewind_point.advise(means)[-1] == "write into the study: recipe.rewind = 0"
    half = table.with_columns(barrier=pl.lit(0.5))
    assert rewind_point.summarise(half, tolerance=0.5)["connected"].all()
    none = rewind_point.advise(rewind_point.summarise(half))
    assert none == [
        f"two data orders of {what} are not connected from iteration 5 on, the last that was tried"
        for what in ("the dense network", "tickets of level 1")
    ]


def test_the_advice_is_that_of_the_sparsest_level() -> None:
    connected = {(0, 5): True, (0, 9): True, (1, 5): False, (1, 9): True}
    means = pl.DataFrame(
        [(*where, found) for where, found in connected.items()], ["level", "iteration", "connected"], orient="row"
    )
    assert rewind_point.advise(means)[-1] == "write into the study: recipe.rewind = 9"


def test_stored_rewind_points_are_found_and_kept(root: Path) -> None:
    tickets = open_tickets(root)
    assert list_rewind_points(tickets) == [(AT, 1, "l1")]
    assert rewind_point.of_study(tickets).equals(rewind_point.of_points(plan_rewind_points(tickets, AT, 1, "l1")))
    assert early.of_study(tickets)["iteration"].unique().sort().to_list() == [2, 3, 7, 12]
    assert {folder.name for folder in results(root)} <= list_needs(tickets)
    written = STUDY.model_copy(update={"recipe": STUDY.recipe.model_copy(update={"rewind": 5})})
    progress = Tickets(planner(root, written)).progress(Chain(0, "l1"))
    assert len(progress.tickets) == 2, "who writes the rewind point into the study has these trainings"


def test_notes_name_the_dense_network_before_and_after_its_training(root: Path, tmp_path: Path) -> None:
    of = study(["snip"], levels=1, rewind=0, iterations=2).model_copy(update={"score_at": "rewind"})
    before = name_dense(open_tickets(tmp_path / "store", of))
    finish(planner(tmp_path / "store", of))
    progress = Tickets(planner(tmp_path / "store", of)).progress(Chain(0, "snip"))
    assert before == name_dense(open_tickets(tmp_path / "store", of)) == [progress.trainings[0].key]
    of_root = Tickets(planner(root, STUDY)).progress(Chain(0, "l1"))
    assert of_root.trainings[0].key in name_dense(open_tickets(root))


def test_a_study_of_level_0_alone_has_rewind_points_without_masks(root: Path) -> None:
    points = plan_rewind_points(open_tickets(root, study(seeds=(0, 1), levels=0, iterations=12, rewind=2)), AT)
    table = rewind_point.of_points(points, measure_points=3)
    assert table["barrier"].null_count() == 0
    assert table["jaccard"].null_count() == len(table) == 4


def test_a_report_has_them_on_request(root: Path) -> None:
    contents = gather(planner(root, STUDY), "s", ["s"], costly=FURTHER, level=1)
    found = {section.name: section for section in sections(contents) if section.name in FURTHER}
    assert list(found) == list(FURTHER)
    for name, rows in (("basins", 6), ("rewind-point", 4), ("early", 8)):
        (part,) = found[name].parts
        assert len(part.table) == rows
        assert "high" in part.table.columns
    assert set(found["basins"].parts[0].table["keeps"]) <= {"yes", "no"}
    assert not {section.name for section in sections(gather(planner(root, STUDY), "s", ["s"]))} & set(FURTHER)
    assert describe_uniqueness(open_tickets(root)) == [], "rewind points are evaluated where they are asked for"
    first, second, masks = describe_uniqueness(open_tickets(root), asked=["rewind-point"])
    assert first.startswith("Two data orders of the dense network are connected from ")
    assert second.startswith("Two data orders of tickets of level 1 are connected from ")
    assert masks.startswith("Masks of two data orders overlap by ")
    ends = uniqueness.collect(open_tickets(root), asked=["rewind-point"], points=2, tolerance=0.0)["rewind-point"]
    assert ends["barrier"].to_list() == [0.0] * 4, "a line of two points has its ends alone"
    line = uniqueness.collect(open_tickets(root), asked=["rewind-point"], tolerance=0.0)["rewind-point"]
    assert line["barrier"].to_list() != [0.0] * 4
    assert line["connected"].to_list() == [barrier == 0 for barrier in line["barrier"]]


def test_what_cannot_be(root: Path) -> None:
    tickets = open_tickets(root)
    elsewhere = open_tickets(root, study(seeds=(7,), iterations=12, rewind=2))
    trained = open_tickets(root, study(rewind_to="learning_rate", iterations=12, rewind=2))
    for call, text in [
        (lambda: plan_rewind_points(tickets, [12]), "rewind point: iteration 12 is not within the training, which has"),
        (lambda: plan_rewind_points(tickets, []), "rewind point: no iterations to try; name at least one"),
        (lambda: plan_rewind_points(tickets, level=3), "level: the study has no level 3"),
        (lambda: plan_rewind_points(tickets, importance="l2"), "importances: the study has no importance 'l2'"),
        (lambda: plan_rewind_points(trained), "tickets are not rewound to an iteration"),
        (lambda: plan_snapshots(tickets, [2]), "early masks: expected iterations of the dense network after 2 and "),
        (lambda: plan_snapshots(elsewhere), "level 0 is not in"),
        (lambda: early.of_study(elsewhere), "no networks of intermediate iterations are in"),
        (lambda: early.of_study(tickets, level=0), "early masks: expected tickets of a level from 1 on"),
        (lambda: early.of_study(tickets, level=3), "the study has no level 3"),
        (lambda: basins.of_study(elsewhere), "no level from 1 on is in"),
        (lambda: basins.of_study(tickets, tolerance=2.0), "tolerance: expected a share of the test set, in 0 to 1"),
        (lambda: rewind_point.of_study(elsewhere), "no rewind points are in"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            call()
        assert text in str(caught.value)
    with pytest.raises(NothingStoredError):
        plan_snapshots(elsewhere)


_ODD = {"level": 1, "importances": ["l1"], "over": "orders", "kinds": ["?"]}
_ODD["trainings"] = [{"kind": kind, "importance": "l1", "seed": 0, "key": "0" * 64} for kind in ("?", "transferred")]


@pytest.mark.parametrize("verb", ["controls", "combine", "early", "rewind-point", "transfer"])
@pytest.mark.parametrize("note", [{}, _ODD])
def test_an_odd_note_in_a_record_is_passed_over(root: Path, tmp_path: Path, verb: str, note: dict[str, Any]) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    tickets = open_tickets(store)
    for folder in results(store):
        path = folder / "record.json"
        record = json.loads(path.read_text()) | {"further": {"verb": verb, "of": name_dense(tickets), **note}}
        path.write_text(json.dumps(record))
    assert list_combinations(tickets) == []
    assert all(kinds == () for kinds, _ in list_controls(tickets).values())
    assert list_snapshots(tickets) == []
    assert list_transfers(tickets) == []
    assert list_rewind_points(tickets) == []
    assert describe_uniqueness(tickets, asked=["rewind-point"]) == []


# Early masks.


def test_a_snapshot_has_the_bits_of_the_whole_training_at_its_iteration(root: Path) -> None:
    tickets = open_tickets(root)
    plan = plan_snapshots(tickets, [7])
    (snapshot,) = plan.planner.progress(plan.chains[1, 7]).tickets
    problem, dense = tickets.planner.problem, tickets.progress(Chain(1, "l1")).tickets[0]
    seen: dict[int, dict[str, torch.Tensor]] = {}
    trained = train(
        problem.build(),
        dense.rewind.load(),
        tickets.planner.dense,
        problem.data,
        STUDY.recipe,
        1,
        begin=2,
        watch=lambda iteration, checkpoint: seen.update({iteration: dict(checkpoint().state)}),
    )
    assert dense.trained is not None
    assert trained.weights.hash == dense.trained.weights.hash
    state = snapshot.load_trained()
    assert all(torch.equal(state[name], tensor) for name, tensor in seen[7].items())


def test_early_masks_in_another_way(root: Path) -> None:
    tickets = open_tickets(root)
    table = early.of_study(tickets, ["l1"])
    assert table.select("seed", "iteration").rows() == [(s, k) for s in (0, 1) for k in (2, 3, 7, 12)]
    assert table["level"].unique().to_list() == [2]
    for line in table.filter(iteration=12).iter_rows(named=True):
        assert (line["known"], line["distance"]) == (1.0, 0.0)
    of, ticket = tickets.planner, tickets.progress(Chain(0, "l1")).tickets[2]
    dense = tickets.progress(Chain(0, "l1")).tickets[0]
    assert dense.trained is not None

    def largest(state: dict[str, torch.Tensor]) -> Mask:
        scores = {name: state[name].double().abs() / state[name].double().abs().sum() for name in of.dense}
        least = (
            torch.cat([each.flatten() for each in scores.values()]).sort(descending=True).values[ticket.mask.alive - 1]
        )
        return Mask.from_tensors({name: each >= least for name, each in scores.items()})

    begin, end = largest(dense.rewind.load()), largest(dense.trained.weights.load())
    assert prune_at_once(of, dense.trained.weights, dense.rewind, "l1", ticket.mask.density, 0) == end
    (line,) = table.filter(seed=0, iteration=2).to_dicts()
    assert line["known"] == (begin & end).alive / end.alive
    assert line["distance"] == (begin ^ end).alive / of.dense.total
    assert line["ticket"] == (begin & ticket.mask.load()).alive / ticket.mask.alive
    by_chance = sum(
        a * b / n for a, b, n in zip(begin.counts.values(), end.counts.values(), begin.sizes.values(), strict=True)
    )
    assert line["chance"] == pytest.approx(by_chance / end.alive)


# The command line and Python.


@pytest.mark.usefixtures("workers_here")
def test_verbs_train_and_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [
        "digits",
        "--levels",
        "1",
        "--recipe.epochs",
        "1",
        "--importances",
        "l1",
        "--data-seeds",
        "--store",
        str(tmp_path),
    ]
    few += ["--task.dataset-arguments", "train_per_class=10", "test_per_class=5"]
    monkeypatch.setattr(estimates, "measure_speed", lambda *_, **__: Speed({1.0: 0.5}, 0.0, 0.0, "made up"))
    each = ["--workers", "1", "--plan", "--format", "csv"]
    assert main(["rewind-point", *few, "--at", "0", "1", *each]) == 0
    told = "0,0,4,4.0\n1,0,6,3.0\n"  # a training has two iterations of half a second
    assert capsys.readouterr().out == "iteration,trainings_there,trainings_to_do,seconds\n" + told
    assert main(["rewind-point", *few, "--at", "0", "1", "--tolerance", "100"]) == 0
    told = capsys.readouterr().out
    assert "write into the study: recipe.rewind = 0" in told
    assert main(["rewind-point", *few, "--at", "0", "1", "--plan"]) == 0
    assert main(["early", *few, "--at", "1"]) == 2
    told = capsys.readouterr()
    assert "level 1 is not in" in told.err
    assert "rewind point" not in told.out, "it is told before anything is trained"
    assert main(["run", *few]) == 0
    assert "[2/2]" in capsys.readouterr().out, "level 0 was trained for the rewind point 0"
    assert main(["basins", *few]) == 0
    assert "l1: " in capsys.readouterr().out
    assert main(["early", *few, "--at", "1"]) == 0
    assert "of the mask at the end is known" in capsys.readouterr().out
    assert main(["early", *few, "--at", "1", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith(
        "importance,seed,level,iteration,connections,alive,distance,known,chance,"
    )
    assert main(["rewind-point", *few, "--importances", "l1", "l2"]) == 2
    assert "--importances: name the one importance whose tickets are tried" in capsys.readouterr().err
    assert main(["early", *few, "--at", "50"]) == 2
    assert (
        "expected iterations of the dense network after 0 and before 2, got 50; the masks of" in capsys.readouterr().err
    )
    overrides = {"levels": 1, "recipe.epochs": 1, "importances": ["l1"], "data_seeds": []}
    overrides["task.dataset_arguments"] = {"train_per_class": 10, "test_per_class": 5}
    table = tombola.rewind_point("digits", overrides, iterations=[0], store=tmp_path, progress=False)
    assert table["iteration"].to_list() == [0, 0]

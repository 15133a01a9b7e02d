"""Rounds of pruning of a study: selections, scores that workers compute, and masks from the rewind point alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stores import InTurn, content, planner, problem, results, run_study, study
from tombola import Mask, find_tickets, prune
from tombola.engine import estimate as estimates
from tombola.engine.forecast import Speed, paths_ahead, steps_ahead
from tombola.engine.job import Job, Outcome
from tombola.engine.run import run
from tombola.errors import UserError
from tombola.importance import Network, NetworkScore, magnitude
from tombola.lottery.rule import Rule, check_rule, resolve_shares
from tombola.pruning.selection import SELECTIONS, apportion
from tombola.streams import ambient
from tombola.study.chains import Chain, Diverged, Finished, Stopped, Waiting
from tombola.study.needs import list_chain_needs
from tombola.study.planner import Planner
from tombola.study.repeatable import check_repeatable
from tombola.study.schema import Study
from tombola.study.task import resolve_importance
from tombola.study.tickets import Tickets
from tombola.study.trainings import Round, Training

sizes = st.lists(st.integers(0, 60), min_size=1, max_size=5)


def variant(importances: tuple[str, ...] = ("taylor", "taylor/l1"), levels: int = 2, **fields: Any) -> Study:
    return Study.model_validate(study(importances, levels=levels).model_dump() | fields)


def finish(of: Planner) -> None:
    run(of, InTurn(last_first=False), lambda *_: None)


# How many connections each layer loses


@pytest.mark.parametrize("selection", SELECTIONS)
@given(counts=sizes, fraction=st.floats(0.01, 0.99), data=st.data())
def test_every_selection_removes_exactly_what_is_asked(
    selection: str, counts: list[int], fraction: float, data: st.DataObject
) -> None:
    alive = {f"layer{number}": count for number, count in enumerate(counts)}
    shapes = {layer: (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))) for layer in alive}
    count = round(fraction * sum(counts))
    numbers = apportion(selection, alive, shapes, count)
    if selection == "global":
        assert numbers is None
        return
    assert numbers is not None
    assert sum(numbers.values()) == count
    assert all(0 <= numbers[layer] <= alive[layer] for layer in alive)
    if selection in ("uniform", "shares"):
        share = count / max(1, sum(counts))
        assert all(abs(numbers[layer] - share * alive[layer]) < 1 for layer in alive)


@given(counts=st.lists(st.integers(1, 400), min_size=1, max_size=5), fraction=st.floats(0.01, 0.99), data=st.data())
def test_erk_keeps_as_many_as_is_proportional_to_the_dimensions(
    counts: list[int], fraction: float, data: st.DataObject
) -> None:
    alive = {f"layer{number}": count for number, count in enumerate(counts)}
    shapes = {layer: (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))) for layer in alive}
    count = round(fraction * sum(counts))
    numbers = apportion("erk", alive, shapes, count)
    assert numbers is not None
    stay = {layer: alive[layer] - numbers[layer] for layer in alive}
    per_dimension = {layer: stay[layer] / sum(shapes[layer]) for layer in alive if stay[layer] < alive[layer]}
    highest = max(per_dimension.values(), default=0.0)
    for layer in alive:  # where more than rounding would stay, the layer loses nothing
        least = min(alive[layer], highest * sum(shapes[layer]))
        assert stay[layer] >= least - 1 - sum(shapes[layer]) / min(map(sum, shapes.values()))


def test_erk_makes_layers_over_one_dense_and_solves_again() -> None:
    """LeNet-300-100 at density .1: the classifier would have a density above 1."""
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc": (10, 100)}
    alive = {layer: a * b for layer, (a, b) in shapes.items()}
    total = sum(alive.values())
    numbers = apportion("erk", alive, shapes, total - 26_620)
    assert numbers is not None
    stay = {layer: alive[layer] - numbers[layer] for layer in alive}
    scale = (26_620 - 1000) / (1084 + 400)
    assert stay == {"fc1": round(1084 * scale), "fc2": round(400 * scale), "fc": 1000}


@pytest.mark.parametrize(
    ("alive", "count", "expected"),
    [((10, 1, 1), 0, (0, 0, 0)), ((10, 1, 1), 3, (1, 1, 1)), ((0, 1, 1), 1, (0, 1, 0)), ((0, 0, 1), 0, (0, 0, 0))],
)
def test_erk_removes_scalars_first_and_no_more_than_are_asked_for(
    alive: tuple[int, ...], count: int, expected: tuple[int, ...]
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"vector": (10,), "scale": (), "shift": ()}
    numbers = apportion("erk", dict(zip(shapes, alive, strict=True)), shapes, count)
    assert numbers == dict(zip(shapes, expected, strict=True))
    scalars: dict[str, tuple[int, ...]] = {"scale": (), "shift": ()}
    assert apportion("erk", {"scale": 1, "shift": 1}, scalars, 1) == {"scale": 1, "shift": 0}
    assert apportion("erk", {}, scalars, 0) == {}, "all layers are kept dense"


def test_shares_of_layers_that_are_not_pruned_are_allowed() -> None:
    shapes = {"a": (4,), "kept dense": (4,)}
    assert apportion("shares", {"a": 4}, shapes, 2, {"kept dense": 2.0}) == {"a": 2}


def test_shares_are_relative_and_zero_protects_a_layer() -> None:
    alive = dict.fromkeys("abc", 100)
    shapes = dict.fromkeys("abc", (10, 10))
    assert apportion("shares", alive, shapes, 60, {"a": 0.0, "c": 2.0}) == {"a": 0, "b": 20, "c": 40}
    with pytest.raises(UserError, match="shares: layer 'c' would lose 120 connections in a round and has only 100"):
        apportion("shares", alive, shapes, 130, {"a": 0.0, "b": 1.0, "c": 12.0})
    with pytest.raises(UserError, match="all layers that have connections left have share 0"):
        apportion("shares", alive, shapes, 1, dict.fromkeys("abc", 0.0))
    assert apportion("shares", alive, shapes, 0, dict.fromkeys("abc", 0.0)) == dict.fromkeys("abc", 0)
    assert apportion("shares", alive, shapes, 60, dict.fromkeys("abc", 10**400)) == dict.fromkeys("abc", 20)


@given(seed=st.integers(0, 99), fraction=st.floats(0.05, 0.9), selection=st.sampled_from(["uniform", "erk"]))
def test_the_lowest_of_each_layer_are_removed(seed: int, fraction: float, selection: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(8, 5, generator=draw), "b": torch.randn(3, 4, generator=draw)}
    dense = Mask.from_tensors({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()})
    found = prune(weights, dense, magnitude, fraction, selection=selection)
    assert found.alive == dense.alive - round(fraction * dense.alive)
    for layer, weight in weights.items():
        gone, stay = weight.abs()[~found[layer]], weight.abs()[found[layer]]
        assert not len(gone) or not len(stay) or gone.max() <= stay.min()


def test_a_rule_is_checked_for_all_levels_before_any_training(tmp_path: Path) -> None:
    dense = Mask.from_tensors({"a": torch.ones(80).bool(), "b": torch.ones(20).bool()})
    for rule, levels, text in (
        (Rule(0.2, selection="shares", shares={"b": 9.0}), 9, "levels: 9 are too many, at most 1 is possible; shares"),
        (Rule(0.2, selection="unform"), 1, "selection: unknown 'unform'; did you mean 'uniform'"),
        (Rule(0.2, shares={"b": 3.0}), 1, "shares: they are for the selection 'shares', and the selection is 'global'"),
        (Rule(0.5), 7, "levels: 7 are too many, after level 6 only 1 of 100 connections are alive"),
    ):
        with pytest.raises(UserError, match=text):
            check_rule(rule, dense, levels)
    share: Any = np.int64(2)  # a number of another library
    assert resolve_shares(dense, {"a": share}) == {"a": 2}
    assert apportion("shares", dense.sizes, dense.shapes, 10, {"a": share}) == {"a": 9, "b": 1}
    with pytest.raises(UserError, match="shares: 'a': expected a number from 0, got True"):
        resolve_shares(dense, {"a": True})
    with pytest.raises(UserError, match="shares: 'nothing' is no prunable layer"):
        planner(tmp_path, variant(("l1",), selection="shares", shares={"nothing": 1.0}))
    with pytest.raises(UserError, match=r"shares: 'fc' has the share -1.0; expected a number from 0"):
        planner(tmp_path, variant(("l1",), selection="shares", shares={"fc": -1.0}))


# Names


def test_each_thing_that_decides_a_mask_is_in_its_name(tmp_path: Path) -> None:
    names = []
    for importance, fields in (
        ("l1", {}),
        ("l1", {"selection": "uniform"}),
        ("l1", {"selection": "erk"}),
        ("l1", {"selection": "shares"}),
        ("l1", {"selection": "shares", "shares": {"*": 2.0}}),
        ("initial", {}),
        ("taylor", {}),
        ("taylor", {"score_examples": 5}),
        ("taylor/l1", {}),
        ("test_rounds:own_score", {}),
    ):
        plan = planner(tmp_path, variant((importance,), **fields))
        names.append(plan._name(plan.initial(0), plan.dense, 0, plan.initial(0), Chain(0, importance)))
    assert len(set(names)) == len(names)
    plan = planner(tmp_path, variant(("l1",), score_examples=5, levels=1, score_at="rewind"))
    same = plan._name(plan.initial(0), plan.dense, 0, plan.initial(0), Chain(0, "l1"))
    assert same == names[0], "what does not decide a mask is not in its name"


def test_the_rewind_point_names_only_masks_that_depend_on_it(tmp_path: Path) -> None:
    for importance, same in (("l1", True), ("random", True), ("taylor", True), ("movement", False), ("initial", False)):
        plan = planner(tmp_path, variant((importance,)))
        one, other = plan.initial(0), plan.initial(1)
        names = {plan._name(one, plan.dense, 0, rewind, Chain(0, importance)) for rewind in (one, other)}
        assert (len(names) == 1) == same


# Scores that workers compute


def own(network: Network) -> Mapping[str, Tensor]:
    """A user's own score of the whole network."""
    return {layer: weight.detach().square() for layer, weight in network.weights.items()}


own_score = NetworkScore(own)


def test_a_chain_waits_for_its_scores(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", variant(("taylor",), levels=1))
    chain = of.chains[0]
    workers = InTurn(last_first=False)
    kinds = []
    for _ in range(3):
        need = of.progress(chain).waits_for
        assert need is not None
        kinds.append(type(need))
        assert isinstance(need, Training)
        finish_one(of, need, workers)
        if isinstance(of.progress(chain).waits_for, Round):
            break
    end = of.progress(chain).end
    assert isinstance(end, Waiting)
    assert isinstance(end.need, Round)
    assert (end.remaining, end.shared) == (1, 0)
    assert end.need.key in list_chain_needs(Tickets(of)), "the mask is kept by gc"
    finish(of)
    assert isinstance(planner(tmp_path / "store", of.study).progress(chain).end, Finished)


def finish_one(of: Planner, training: Training, workers: InTurn) -> None:
    workers.submit(Job.of(training, of.study))
    for event in [*workers.events(0.0)]:
        if isinstance(event, Outcome):
            of.store.results.put(training.key, training.identity, training.mask, event.trained, event.record)


def test_workers_and_find_tickets_give_the_same_masks(tmp_path: Path) -> None:
    of = variant(("taylor", "synflow/l1", "movement", "fisher/rank"), selection="uniform")
    assert of.recipe.rewind > 0
    run_study(tmp_path / "store", of)
    task = problem()
    for name in of.importances:
        chain = planner(tmp_path / "store", of).progress(Chain(0, name))
        with ambient(0, "initialisation"):
            model = task.build()
        found = find_tickets(
            model, task.data, of.recipe, resolve_importance(name), levels=2, fraction=0.5, selection="uniform"
        )
        assert [ticket.mask.hash for ticket in found] == [ticket.mask.hash for ticket in chain.tickets]


def test_a_second_run_computes_no_score_again_and_a_lost_mask_is_computed_again(tmp_path: Path) -> None:
    root, of = tmp_path / "store", variant(("taylor",))
    finish(planner(root, of))
    before = content(root)
    again = InTurn(last_first=False)
    run(planner(root, of), again, lambda *_: None)
    assert again.order == []
    for path in (root / "masks").rglob("*.safetensors"):
        path.unlink()
    run(planner(root, of), again, lambda *_: None)
    assert len(again.order) == of.levels, "one job for each round, and no training"
    assert content(root) == before


def test_a_round_whose_worker_is_killed_while_it_scores_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    (tmp_path / "fatal_score.py").write_text(
        "import multiprocessing, os, pathlib, signal\n"
        "from tombola.importance import NetworkScore\n"
        "from tombola.importance.network_scores import taylor\n"
        f"KILLED = pathlib.Path({str(killed)!r})\n"
        "def score(network):\n"
        "    if multiprocessing.parent_process() and not KILLED.exists():\n"
        "        KILLED.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return taylor(network)\n"
        "own = NetworkScore(score)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    of = study(("fatal_score:own",), rewind=0, iterations=5)
    run_study(tmp_path / "resumed", of, workers=1)
    assert killed.exists()
    run_study(tmp_path / "undisturbed", of, workers=1)
    assert content(tmp_path / "resumed") == content(tmp_path / "undisturbed")


def test_masks_from_scores_are_verified_like_all_others(tmp_path: Path) -> None:
    root, of = tmp_path / "store", variant(("taylor",), levels=1)
    finish(planner(root, of))
    again = Planner(of, problem(), planner(root, of).store, remember=False).progress(Chain(0, "taylor"))
    assert again.tickets[1].mask == planner(root, of).progress(Chain(0, "taylor")).tickets[1].mask


def test_a_score_that_fails_on_a_worker_ends_its_chain_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = planner(tmp_path / "store", variant(("l1", "test_rounds:broken")))
    monkeypatch.setattr("test_rounds.TRAINED", True)
    finish(of)
    assert isinstance(of.progress(Chain(0, "l1")).end, Finished)
    end = of.progress(Chain(0, "test_rounds:broken")).end
    assert isinstance(end, Stopped)
    assert end.reason.startswith("importance 'test_rounds:broken': it raised ValueError: no gradients today (in ")


TRAINED = False


def _broken(network: Network) -> Mapping[str, Tensor]:
    """Fails only once the network is trained."""
    if TRAINED:
        raise ValueError("no gradients today")
    return own(network)


broken = NetworkScore(_broken)


def test_scores_of_the_whole_network_are_tried_out_before_any_training(tmp_path: Path) -> None:
    check_repeatable(planner(tmp_path, variant(("taylor", "grasp/l1", "test_rounds:own_score/l2"))))
    with pytest.raises(UserError, match=r"importance 'grasp/lamp', layer '.*': the score has negative values"):
        check_repeatable(planner(tmp_path, variant(("grasp/lamp",))))
    with pytest.raises(UserError, match="importance 'test_rounds:changing': it changed the network"):
        check_repeatable(planner(tmp_path, variant(("test_rounds:changing",))))


def changes(network: Network) -> Mapping[str, Tensor]:
    """A score that changes the network."""
    return {layer: weight.data.mul_(2) for layer, weight in network.weights.items()}


changing = NetworkScore(changes)


def test_importances_of_a_users_own_functions() -> None:
    assert resolve_importance("test_rounds:own_score").name == "own"
    assert resolve_importance("test_rounds:own_score/l1").name == "own/l1"
    assert resolve_importance("taylor/torch:sqrt").name == "taylor/sqrt"
    for name, text in (
        ("test_rounds:own_score/l3", "importance 'test_rounds:own_score/l3': unknown normalisation 'l3'"),
        ("taylr/torch:sqrt", "importance 'taylr/torch:sqrt': unknown score 'taylr'; did you mean 'taylor'?"),
        ("test_rounds:nothing/l1", "importance 'test_rounds:nothing': module 'test_rounds' .* has no function"),
    ):
        with pytest.raises(UserError, match=text):
            resolve_importance(name)


# Masks from the rewind point alone


def test_masks_from_the_rewind_point_need_no_training(tmp_path: Path) -> None:
    of = variant(("magnitude", "snip"), levels=3, score_at="rewind")
    root = tmp_path / "store"
    workers = InTurn(last_first=True)  # the sparsest first, which leaves gaps
    run(planner(root, of), workers, lambda *_: None)
    plan = planner(root, of)
    for chain in plan.chains:
        progress = plan.progress(chain)
        assert isinstance(progress.end, Finished)
        rewind = progress.tickets[0].rewind
        mask = plan.dense
        for ticket in progress.tickets[1:]:
            assert ticket.rewind.hash == rewind.hash
            assert (ticket.mask.load() & mask) == ticket.mask
            mask = ticket.mask.load()
    masks = [plan.progress(Chain(0, "magnitude")).tickets[level].mask for level in range(4)]
    for before, after in pairwise(masks):
        assert prune(rewind.load(), before.load(), magnitude, 0.5) == after
    assert len(results(root)) == 1 + 1 + 2 * 3, "the rewind point and level 0 are shared"


def test_all_levels_can_be_trained_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = planner(tmp_path / "store", variant(("magnitude",), levels=3, score_at="rewind"))
    chain = of.chains[0]
    first = of.progress(chain)
    assert isinstance(first.waits_for, Training)
    assert (first.waits_for.end, first.remaining, first.shared, len(first.needs)) == (10, 5, 2, 1)
    speed = Speed({1.0: 1.0}, 0.0, 0.0, "made up")
    assert [len(path) for path in paths_ahead(of, chain, first, speed)] == [2] * 4
    finish_one(of, first.waits_for, InTurn(last_first=False))
    then = of.progress(chain)
    assert (then.remaining, len(then.needs)) == (4, 4)
    assert [len(path) for path in paths_ahead(of, chain, then, speed)] == [1] * 4
    last = then.needs[-1]
    assert isinstance(last, Training)
    finish_one(of, last, InTurn(last_first=False))
    after = of.progress(chain)
    assert (after.remaining, len(after.needs), after.tickets) == (3, 3, ())
    assert last.key in list_chain_needs(Tickets(of)), "a level after a gap is not lost"
    monkeypatch.setattr(estimates, "measure_speed", lambda *_, **__: speed)
    expected = estimates.estimate(of, 3)
    assert (expected.chains, expected.to_train) == (((chain, 1, 3),), 3), "nor is it planned again"
    assert expected.seconds == of.end - 10
    assert [step.density for step in steps_ahead(of, chain, after, speed)] == pytest.approx([1, 0.5, 0.25], abs=0.01)


def test_what_makes_no_sense_at_the_rewind_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="score_at: at the rewind point, the score of 'movement/l1' is 0"):
        planner(tmp_path, variant(("movement/l1",), score_at="rewind"))
    task = problem()
    for importance, score_at, text in (
        ("movement", "rewind", "the score of 'movement' is 0"),
        ("l1", "ends", "score_at: expected 'end' or 'rewind', got 'ends'"),
    ):
        with pytest.raises(UserError, match=text):
            find_tickets(
                task.build(),
                task.data,
                study().recipe,
                resolve_importance(importance),
                levels=1,
                score_at=score_at,  # type: ignore[arg-type]
            )


def test_a_lost_mask_does_not_hide_the_trainings_after_it_from_a_collection(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", variant(("taylor",)))
    finish(of)
    before = {folder.name for folder in results(tmp_path / "store")}
    for path in (tmp_path / "store" / "masks").rglob("*.safetensors"):
        path.unlink()
    again = planner(tmp_path / "store", of.study)
    assert len(again.progress(Chain(0, "taylor")).tickets) == 1
    assert before <= list_chain_needs(Tickets(again))


def test_a_rewind_point_that_diverged_ends_its_chains(tmp_path: Path) -> None:
    diverging = study(("magnitude",), lr=1e30)
    of = planner(tmp_path / "store", Study.model_validate(diverging.model_dump() | {"score_at": "rewind"}))
    finish(of)
    progress = of.progress(Chain(0, "magnitude"))
    assert (progress.tickets, progress.end) == ((), Diverged())


def test_a_failure_at_the_rewind_point_leaves_the_levels_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = planner(tmp_path / "store", variant(("test_rounds:broken",), score_at="rewind", levels=3))
    monkeypatch.setattr("test_rounds.TRAINED", True)
    totals: list[tuple[int, int]] = []
    run(of, InTurn(last_first=False), lambda status, _: totals.append((status.done, status.total)))
    progress = of.progress(Chain(0, "test_rounds:broken"))
    assert isinstance(progress.end, Stopped)
    assert len(progress.tickets) == 1


def test_the_documentation_of_importances_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "importances.md").read_text()
    blocks = re.findall(r'^```python title="mine.py"\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    (tmp_path / "mine.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))  # so that it is gone afterwards
    del sys.modules["mine"]
    names = re.findall(r"--importances (magnitude/mine.*)", page)[0].split()
    assert len(names) == 4
    plan = planner(tmp_path / "store", variant(tuple(names), levels=1))
    check_repeatable(plan)
    finish(plan)
    assert all(isinstance(plan.progress(chain).end, Finished) for chain in plan.chains)
    assert len({plan.progress(chain).tickets[1].mask.hash for chain in plan.chains}) >= 3

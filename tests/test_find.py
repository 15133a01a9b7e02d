"""Searches for a ticket: strategies as pure plans, their trainings in a store, budgets, verdicts and the verb."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import InTurn, planner, results, study
from tombola import Ticket, UserError, find, load_study
from tombola.analysis import frontier
from tombola.analysis.frontier import chance_outside, most_outside
from tombola.cli.main import main
from tombola.engine import search_estimate
from tombola.engine.forecast import Speed, steps_ahead
from tombola.engine.run import run
from tombola.engine.search import Budget, Walk, follow, search
from tombola.engine.search_estimate import _list_stages, _sum_iterations, estimate_search
from tombola.engine.verify import list_places
from tombola.lottery.search import (
    STRATEGIES,
    Ask,
    Candidate,
    End,
    Known,
    bisect,
    early,
    find_strategy,
    imagine,
    plan,
    race,
    step,
)
from tombola.store.store import Store
from tombola.study.chains import Chain
from tombola.study.needs import list_needs
from tombola.study.planner import Planner
from tombola.study.schema import Study
from tombola.study.searches import list_chains, list_planners, shorten_study
from tombola.study.task import load_problem
from tombola.study.tickets import Tickets
from tombola.workbench.find import conclude, read_budget, work_of_rounds

pytestmark = pytest.mark.xdist_group("find")  # one study for all

Gain = Callable[[Candidate, int], float]
"""The gain of a ticket in a trial."""


def simulate(gain: Gain, strategy: str, levels: int, importances: tuple[str, ...] = ("l1",), trials: int = 1) -> Any:
    """Search among made-up tickets; return the end, what is known, and the number of trainings of each trial."""
    known = Known(importances, levels, 0.0, trials, {})
    counts = [0] * trials
    for _ in range(20 * levels * len(importances)):
        asked = plan(known, find_strategy(strategy))
        if isinstance(asked, End):
            return asked, known, counts
        gains = {each: dict(one) for each, one in known.gains.items()}
        for trial in asked.trials:
            for candidate in asked.candidates:
                for stage in candidate.stages:
                    if trial not in gains.setdefault(stage, {}):
                        gains[stage][trial] = gain(stage, trial)
                        counts[trial] += 1
        assert gains != known.gains, "it asked for what is known"
        known = Known(importances, levels, 0.0, trials, gains)
    raise AssertionError("the search does not end")


# strategies


@settings(max_examples=30)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(1, 40), st.data())
def test_every_strategy_finds_the_last_level_that_keeps_the_metric(
    strategy: str, levels: int, data: st.DataObject
) -> None:
    last = data.draw(st.integers(0, levels))
    end, known, counts = simulate(lambda each, _: float(last - each.level), strategy, levels)
    assert (end.found.level if end.found else 0) == last
    most = {
        "rounds": levels,
        "bisect": 2 * math.isqrt(levels) + math.ceil(math.log2(levels + 1)) + 2,
        "one-shot": math.ceil(math.log2(levels + 1)) + 2,
        "race": math.ceil(math.log2(levels + 1)) + 2,
        "short": math.ceil(math.log2(levels + 1)) + 2,
        "early": math.ceil(math.log2(levels + 1)) + 2,
    }
    assert counts[0] <= most[strategy]
    assert (known.best is None) == (last == 0)


@settings(max_examples=60)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(1, 12), st.integers(1, 3), st.data())
def test_a_search_ends_where_the_next_level_was_tried_and_tells_no_more_than_the_world_holds(
    strategy: str, levels: int, trials: int, data: st.DataObject
) -> None:
    names = ("l1", "l2", "softmax")[: data.draw(st.integers(1, 3))]
    share = st.integers(-20, 10).map(lambda points: points / 10)
    curves = {(name, level): data.draw(share) for name in names for level in range(1, levels + 1)}
    luck = [0.0, *(data.draw(share) for _ in range(trials - 1))]
    loss = data.draw(st.sampled_from([0.0, 0.1, 0.5]))  # of a round for each level that it skips

    def gain(candidate: Candidate, trial: int) -> float:
        skipped = [b - a - 1 for a, b in pairwise((0, *candidate.path))]
        return curves[candidate.importance, candidate.level] + luck[trial] - loss * max(skipped)

    end, known, _ = simulate(gain, strategy, levels, names, trials)

    def keeps(candidate: Candidate) -> bool:
        return (
            math.fsum(gain(candidate, trial) for trial in range(1 if known.judged(candidate) else 0, trials)) >= -1e-9
        )

    found = end.found
    if found is None:
        assert not any(keeps(each) for each in known.gains)
        tried = {each.level for each in known.gains if each.importance == names[-1]}
        assert 1 in tried or len(names) > 1, "the densest ticket was not tried"
        return
    assert keeps(found)
    assert set(known.gains[found]) == set(range(trials))
    assert not any(keeps(each) and each.level > found.level for each in known.gains)
    if found.level < levels:
        following = [
            each for each in known.gains if (each.importance, each.level) == (found.importance, found.level + 1)
        ]
        judged = any(known.judged(each) for each in following)
        assert judged or any(each.path[:-1] == found.path for each in following), "the next level was not tried"


@settings(max_examples=30)
@given(st.lists(st.integers(0, 24), min_size=2, max_size=6, unique=True))
def test_a_race_finds_what_all_importances_together_find_with_fewer_trainings(last: list[int]) -> None:
    names = tuple(f"importance {number}" for number in range(len(last)))

    def gain(candidate: Candidate, trial: int) -> float:
        return float(last[names.index(candidate.importance)] - candidate.level)

    raced, _, counts = simulate(gain, "race", 24, names)
    alone, _, others = simulate(gain, "one-shot", 24, names)
    assert raced.found is not None
    assert alone.found is not None
    assert raced.found.level == alone.found.level == max(last)
    assert counts[0] < others[0]


@pytest.mark.parametrize("strategy", ["bisect", "one-shot", "race"])
def test_a_level_that_was_refuted_by_a_large_round_is_tried_again_by_a_small_one(strategy: str) -> None:
    def gain(candidate: Candidate, trial: int) -> float:
        largest = max(b - a for a, b in zip((0, *candidate.path), candidate.path, strict=False))
        return 0.0 if candidate.level <= 9 and largest <= 3 else -1.0

    end, _, _ = simulate(gain, strategy, 10)
    assert end.found is not None
    assert end.found.level == 9


@settings(max_examples=30)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(2, 20), st.integers(0, 20))
def test_other_trials_refute_what_the_first_has_found_by_chance(strategy: str, levels: int, last: int) -> None:
    end, known, _ = simulate(
        lambda each, trial: 0.0 if trial == 0 else float(last - each.level), strategy, levels, trials=3
    )
    found = end.found.level if end.found else 0
    assert found <= last
    assert found == min(last, levels) or strategy != "rounds"
    if end.found is not None:
        assert set(known.gains[end.found]) == {0, 1, 2}


def test_trials_that_are_not_all_known_do_not_refute() -> None:
    ticket = Candidate("l1", (2,))
    assert Known(("l1",), 4, 0.0, 3, {ticket: {0: 0.0, 1: -1.0}}).keeps(ticket)
    assert not Known(("l1",), 4, 0.0, 3, {ticket: {0: 0.0, 1: -1.0, 2: 0.5}}).keeps(ticket)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Candidate("l1", (1,)), "asks again for"),
        (Candidate("l1", (2, 1)), "increasing levels from 1 to 4"),
        (Candidate("l1", (-1, 2)), "increasing levels from 1 to 4"),
        (Candidate("l1", (5,)), "increasing levels from 1 to 4"),
        (Candidate("l1", ()), "increasing levels from 1 to 4"),
        (Candidate("l2", (2,)), "an importance of the study"),
        ("l1", "expected a Candidate"),
    ],
)
def test_a_strategy_that_asks_for_what_is_known_or_cannot_be_is_refused(asked: Any, message: str) -> None:
    known = Known(("l1",), 4, 0.0, 1, {Candidate("l1", (1,)): {0: 0.0}})
    with pytest.raises(UserError, match=f"strategy: it .*{message}"):
        plan(known, lambda _: [asked])


def test_rounds_end_where_a_training_diverges_alone() -> None:
    end, known, _ = simulate(lambda each, _: -9.0 if each.level == 3 else 0.0, "rounds", 6)
    assert end.found == Candidate("l1", (1, 2, 3, 4, 5, 6)), "a ticket that loses is no end"
    end, known, _ = simulate(lambda each, _: -math.inf if each.level == 3 else 0.0, "rounds", 6)
    assert end.found == Candidate("l1", (1, 2))
    assert max(each.level for each in known.gains) == 3


def test_a_race_drops_half_after_each_ticket_and_takes_up_who_is_first_again() -> None:
    names = ("a", "b", "c", "d")
    first = {Candidate(name, (6,)): {0: 0.1 * number} for number, name in enumerate(names)}
    known = Known(names, 10, 0.0, 1, first)
    assert [each.importance for each in race(known)] == ["d", "c"]
    more = first | {Candidate("d", (6, 9)): {0: -1.0}, Candidate("c", (6, 9)): {0: 0.0}}
    assert race(Known(names, 10, 0.0, 1, more)) == [Candidate("c", (6, 9, 10))]
    over = more | {Candidate("c", (6, 9, 10)): {0: -1.0}}
    assert race(Known(names, 10, 0.0, 1, over)) == [], "the second cannot pass the first"
    assert race(Known(names[:3], 10, 0.0, 1, over)) == [Candidate("b", (6, 10))], "a last chance of the second"


def test_bisect_takes_steps_of_about_the_root_of_the_levels() -> None:
    assert [each.path for each in bisect(Known(("l1",), 24, 0.0, 1, {}))] == [(5,)]
    assert step(Known(("l1",), 1, 0.0, 1, {Candidate("l1", (1,)): {0: 0.0}}), "l1", 1) is None


# searches in a store

STUDY = study(["l1"], seeds=(0, 1, 2), levels=4, rewind=0, iterations=20)
SHOW: Any = lambda *_: None  # noqa: E731


def walk(root: Path, strategy: str = "one-shot", of: Study = STUDY, margin: float = 0.05, **how: Any) -> Walk:
    own = planner(root, of)
    trials = [(own, seed) for seed in of.seeds]
    return search(trials, InTurn(last_first=False), SHOW, find_strategy(strategy), margin=margin, **how)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a search."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("find") / "store"
    walk(root)
    return root


def test_a_search_is_repeated_from_the_store(root: Path) -> None:
    before = results(root)
    again = walk(root)
    assert (again.done, results(root)) == (0, before)
    assert again.work == len(before)
    assert again.end.found is not None
    assert set(again.known.gains[again.end.found]) == {0, 1, 2}


def test_a_search_by_rounds_leaves_nothing_for_a_study_to_train(tmp_path: Path) -> None:
    of = study(seeds=(0,), levels=2, rewind=10)
    found = walk(tmp_path / "s", "rounds", of, margin=1.0)
    assert found.work == pytest.approx((10 + 50 * 5) / 60)  # a rewind point, level 0, 2 levels of each
    assert run(planner(tmp_path / "s", of), InTurn(last_first=False), SHOW).total == 0


def test_a_large_round_leaves_as_many_connections_as_the_rounds_that_it_replaces(root: Path) -> None:
    of = planner(root, STUDY)
    tickets = Tickets(of).progress(Chain(0, "l1", path=(2,))).tickets
    assert [ticket.level for ticket in tickets] == [0, 2]
    assert tickets[1].mask.alive == pytest.approx(of.dense.total / 4, abs=1)
    assert tickets[1].provenance["path"] == [2]


def test_a_worker_prunes_a_large_round_by_a_score_of_the_whole_network(tmp_path: Path) -> None:
    of = study(["snip"], levels=4, rewind=0, iterations=5)
    own = planner(tmp_path / "s", of)
    run(own, InTurn(last_first=False), SHOW, [Chain(0, "snip", path=(3,))])
    ticket = own.progress(Chain(0, "snip", path=(3,))).tickets[-1]
    assert (ticket.level, ticket.mask.alive) == (3, own.dense.total - round(own.dense.total * (1 - 0.5**3)))


def test_a_collection_keeps_what_a_search_has_trained(root: Path) -> None:
    assert {folder.name for folder in results(root)} <= list_needs(Tickets(planner(root, STUDY)))


@pytest.mark.parametrize("trainings", [4])
def test_a_budget_of_trainings_is_kept_and_a_larger_one_goes_on(tmp_path: Path, root: Path, trainings: int) -> None:
    part = walk(tmp_path / "s", budget=Budget(trainings=trainings, text=f"{trainings} trainings"))
    assert 0 < part.done <= trainings
    assert part.unknown
    assert "budget" in part.end.reason
    whole = walk(tmp_path / "s")
    assert (whole.end, whole.work) == (walk(root).end, part.done + whole.done)


def test_trainings_that_judge_are_reserved(tmp_path: Path) -> None:
    of = study(["l1"], seeds=(0, 1), levels=8, rewind=0, iterations=5)
    part = walk(tmp_path / "s", "rounds", of, margin=1.0, budget=Budget(trainings=6, text="6"))
    assert part.end.found == Candidate("l1", (1, 2))  # 3 trainings, 3 more to judge it
    assert part.judged
    assert part.done == 6


def test_a_budget_of_time_is_kept(tmp_path: Path) -> None:
    now = [0.0]

    def tick(*_: object) -> None:
        now[0] += 1.0

    own = planner(tmp_path / "s", STUDY)
    trials = [(own, seed) for seed in STUDY.seeds]
    how: dict[str, Any] = {"margin": 0.05, "clock": lambda: now[0]}
    part = search(
        trials, InTurn(last_first=False), tick, find_strategy("rounds"), budget=Budget(seconds=10, text="10s"), **how
    )
    assert part.unknown
    assert part.done < 15
    assert now[0] <= 11


def test_a_budget_below_the_first_ticket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"budget: 1 training is not enough; .* need the work of 2 trainings of 20 iterations"
    ):
        walk(tmp_path / "s", budget=Budget(trainings=1, text="1 training"))
    assert not results(tmp_path / "s")


def test_a_dense_network_that_diverges_has_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the dense network of seed 0 has no accuracy: its training diverged"):
        walk(tmp_path / "s", of=study(["l1"], lr=1e30, rewind=0))


def test_short_trainings_search_and_complete_ones_judge(tmp_path: Path) -> None:
    of = study(["l1"], seeds=(0, 1), levels=4, rewind=0, iterations=10)
    own = planner(tmp_path / "s", of)
    scout = planner(tmp_path / "s", shorten_study(of, "short"))
    trials = [(scout, 0), (own, 0), (own, 1)]
    found = search(trials, InTurn(last_first=False), SHOW, find_strategy("short"), margin=1.0)
    assert found.end.found is not None
    steps = len(found.end.found.path)
    tried = sum(each.trial == 0 for each in found.tried)
    assert found.work == pytest.approx(2 / 10 * (1 + tried) + 2 * (1 + steps))
    stored = {folder.name for folder in results(tmp_path / "s")}
    assert stored <= list_needs(Tickets(own)), "a collection keeps them"
    verified = list_places(list_planners(planner(tmp_path / "s", of)))
    assert {place.training.key for place in verified} == stored
    assert {place.level for place in verified} == {0, *found.end.found.path}
    assert len(set(map(str, verified))) == len(verified), "complete and shorter trainings are told apart"
    assert "l1, seed 0, by levels 3, level 3, 2 iterations" in map(str, verified)


def test_masks_are_taken_early_and_tickets_trained_in_full(tmp_path: Path) -> None:
    of = study(["l1"], seeds=(0, 1), levels=4, rewind=2, iterations=10)
    own = planner(tmp_path / "s", of)
    assert own.early_end == 4
    found = walk(tmp_path / "s", "early", of, margin=1.0)
    assert found.end.found == Candidate("l1", (3, 4), early=True)
    assert [each.candidate.path for each in found.tried] == [(3,), (3, 4), (3, 4)]
    # of each seed: the rewind point and the dense network, 2 early trainings, and the tickets of level 3 and 4
    assert found.work == pytest.approx((10 + 2 * 2 + 8 + 8 + 10 + 2 * 2 + 8) / 10)
    assert walk(tmp_path / "s", "early", of, margin=1.0).done == 0
    stored = {folder.name for folder in results(tmp_path / "s")}
    assert stored <= list_needs(Tickets(own)), "a collection keeps them"
    verified = list_places(list_planners(planner(tmp_path / "s", of)))
    assert {place.training.key for place in verified} == stored
    assert len(set(map(str, verified))) == len(verified)
    assert "l1, seed 1, by levels 3, 4, masks taken early, level 3, 4 iterations" in map(str, verified)
    ticket = conclude(found, 1.0).ticket
    assert (ticket.level, ticket.provenance["path"], ticket.provenance["early_end"]) == (4, [3, 4], 4)
    assert ticket.mask.alive == pytest.approx(own.dense.total / 16, abs=2)


def test_masks_are_not_taken_early_where_no_trained_weights_are_scored_and_rewound(tmp_path: Path) -> None:
    of = study(["l1"], levels=2, rewind=0, iterations=5, rewind_to="nothing")
    with pytest.raises(UserError, match=r"early: masks .* recipe\.rewind_to = 'nothing', so name another strategy"):
        walk(tmp_path / "s", "early", of)
    assert not results(tmp_path / "s")


def test_a_density_at_which_a_layer_has_too_few_connections_is_not_reached(tmp_path: Path) -> None:
    of = study(["l1"], levels=4, rewind=0, iterations=5).model_copy(
        update={"selection": "shares", "shares": {"4": 1.3}}  # 1120 connections at once would be 275 of its 256
    )
    seen = walk(tmp_path / "s", of=of, margin=1.0)
    assert seen.tried[0].candidate.path == (3,)
    assert seen.tried[0].why.startswith("cannot be reached: shares: layer '4.weight' would lose 275 connections in a ")
    assert seen.end.found == Candidate("l1", (2, 3, 4))


# what is expected


@pytest.mark.parametrize("strategy", [name for name in sorted(STRATEGIES) if name != "short"])  # which plans as race
def test_the_longest_search_that_the_judges_agree_with_is_imagined(strategy: str) -> None:
    names, levels = ("l1", "l2"), 4
    worlds = [(last, largest) for last in range(levels + 1) for largest in range(1, max(last, 1) + 1)]
    counts = []
    for both in product(worlds, repeat=2):
        up_to = dict(zip(names, both, strict=True))

        def gain(candidate: Candidate, _: int, up_to: dict[str, tuple[int, int]] = up_to) -> float:
            last, largest = up_to[candidate.importance]
            round_ = max(b - a for a, b in pairwise((0, *candidate.path)))
            return 0.0 if candidate.level <= last and round_ <= largest else -1.0

        counts.append(sum(simulate(gain, strategy, levels, names, trials=2)[2]))
    most = max(
        len({(trial, stage) for ask in case for trial in ask.trials for one in ask.candidates for stage in one.stages})
        for case in imagine(find_strategy(strategy), names, levels, 2)
    )
    assert max(counts) == most


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed({1.0: 1.0}, 0.0, 0.5, "as the test says")
    monkeypatch.setattr(search_estimate, "measure_speed", lambda *_, **__: speed)


@pytest.mark.usefixtures("timed")
def test_an_estimate_counts_the_dense_networks_and_what_is_there(tmp_path: Path, root: Path) -> None:
    strategy, trials = find_strategy("one-shot"), [(planner(tmp_path / "s", STUDY), seed) for seed in STUDY.seeds]
    new = estimate_search(trials, strategy, 1)
    assert [(part.seed, part.iterations, part.there) for part in new.parts] == [(seed, 20, 0) for seed in STUDY.seeds]
    assert new.work == new.to_do == sum(part.trainings for part in new.parts)
    assert new.seconds == 0.5 + 20 * new.work
    assert estimate_search(trials, strategy, 2).seconds < new.seconds  # type: ignore[operator]
    begun = estimate_search([(planner(root, STUDY), seed) for seed in STUDY.seeds], strategy, 1)
    assert [part.there for part in begun.parts] != [0, 0, 0]
    assert begun.work == new.work == begun.to_do + sum(part.there for part in begun.parts)
    assert walk(root).work <= new.work


@pytest.mark.usefixtures("timed")
def test_an_estimate_counts_an_early_training_as_the_part_that_it_is(tmp_path: Path) -> None:
    of = study(["l1"], seeds=(0, 1), levels=2, rewind=2, iterations=10)
    seen = estimate_search([(planner(tmp_path / "s", of), seed) for seed in of.seeds], early, 1)
    # the rewind point, the dense network and 2 iterations of it, levels 2 and 1 and 2 iterations of 1, levels 1 and 2;
    # the judge has no need of level 2 at once
    assert [part.trainings for part in seen.parts] == pytest.approx([(10 + 2 + 3 * 8 + 2) / 10, (10 + 2 + 16 + 2) / 10])
    assert seen.work == pytest.approx(sum(part.trainings for part in seen.parts))


@pytest.mark.usefixtures("timed")
def test_a_learned_mask_counts_as_the_training_that_sees_as_many_examples(tmp_path: Path) -> None:
    of = study(["concrete"], levels=2, rewind=0, iterations=10).model_copy(update={"score_examples": 32})
    own = planner(tmp_path / "s", of)  # it learns in 20 batches of 32 examples, which is twice a training
    expected = estimate_search([(own, 0)], bisect, 1)
    assert (expected.work, expected.seconds) == (work_of_rounds(own), 0.5 + 10 * 7)
    how: dict[str, Any] = {"strategy": "bisect", "of": of, "margin": 1.0}
    with pytest.raises(UserError, match=r"3 is not enough; the dense .* need the work of 4 trainings of 10 iterations"):
        walk(tmp_path / "s", budget=Budget(trainings=3, text="3"), **how)
    part = walk(tmp_path / "s", budget=Budget(trainings=6, text="6"), **how)
    whole = walk(tmp_path / "s", **how)
    assert [each.work for each in whole.tried] == [4, 7], "levels 1 and 2"
    assert (part.done, whole.done, whole.work, walk(tmp_path / "s", **how).done) == (4, 3, 7, 0)


# verdicts


def test_the_frontier_has_a_row_for_each_ticket_and_the_mean_of_its_judges(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = walk(root)
    table = frontier.of_walk(seen)
    assert table.height == sum(not each.trial for each in seen.tried)
    assert table["work"].is_sorted()
    row = table.filter("found").row(0, named=True)
    verdict = frontier.verdict(seen, 0.05)
    assert (row["judges"], verdict["judges"], verdict["seeds"]) == (2, [1, 2], 2)
    assert row["mean"] == pytest.approx(verdict["difference"])
    assert row["low"] == pytest.approx(verdict["low"])
    assert verdict["test"] == pytest.approx(verdict["accuracy"])  # there is no validation set
    assert verdict["dense_test"] == pytest.approx(verdict["dense_accuracy"])
    assert verdict["keeps"]
    problem = seen.trials[-1][0].problem
    monkeypatch.setattr(frontier, "chance_outside", lambda gains, margin, step: step)
    assert frontier.verdict(seen, 0.05)["outside"] == 1 / problem.data.count("test")
    monkeypatch.setattr(type(problem), "measure", replace(problem.measure, percent=False))
    assert frontier.verdict(seen, 0.05)["outside"] == 0.0, "only shares are rounded to steps"


def test_the_chance_of_a_further_seed_is_that_of_students_distribution() -> None:
    judged = [0.1, 0.4, -0.2]  # mean 0.1, standard deviation 0.3
    margin = 3 * 0.3 * math.sqrt(4 / 3) - 0.1  # 3 predictive standard deviations below the mean
    assert chance_outside(judged, margin) == pytest.approx(0.0477, abs=1e-4)  # of Student's t, 2 degrees of freedom
    assert chance_outside([0.1, -math.inf], 1.0) is None


def test_the_limit_of_that_chance_is_too_low_for_one_in_twenty_samples() -> None:
    samples = (0.5 + torch.randn(2000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).tolist()
    chance = 0.5 * math.erfc(0.5 / math.sqrt(2))  # of a normal variable with mean 0.5 to be below 0
    too_low = [most_outside(sample, 0.0) < chance for sample in samples]  # type: ignore[operator]
    assert sum(too_low) / 2000 == pytest.approx(0.05, abs=0.015)
    among = [most_outside(sample, 0.0, choice=10) < chance for sample in samples]  # type: ignore[operator]
    assert sum(among) / 2000 == pytest.approx(0.005, abs=0.005)
    assert most_outside([0.0, 0.0], 0.0) == pytest.approx(1 - math.sqrt(0.05)), "equal gains say no more than successes"
    assert most_outside([-1.0, -1.0], 0.0) == 1.0
    assert most_outside([0.1, -math.inf], 1.0) is None


def test_gains_that_differ_by_less_than_a_step_say_no_more_than_equal_ones() -> None:
    equal, nearly = [0.01] * 3, [0.01, 0.01, 0.01 + 1e-6]
    for statement in (chance_outside, most_outside):
        assert statement(nearly, 0.01, 0.01) == pytest.approx(statement(equal, 0.01, 0.01), abs=1e-3)
        apart = [0.0, 0.02, 0.04]  # a standard deviation of two steps
        assert statement(apart, 0.01, 0.01) == statement(apart, 0.01)


def test_a_verdict_takes_the_step_of_a_share_from_the_number_of_examples(root: Path) -> None:
    seen = walk(root)
    assert seen.end.found is not None
    problem = seen.trials[-1][0].problem
    step = 1 / problem.data.count("test")
    gains = dict.fromkeys(range(3), step)
    same = replace(seen, known=replace(seen.known, gains={**seen.known.gains, seen.end.found: gains}))
    stated = frontier.verdict(same, 0.0)
    judged = sum(map(same.known.judged, same.known.gains))
    assert stated["outside"] == chance_outside([step, step], 0.0, step) > 0.1
    assert stated["outside_most"] == most_outside([step, step], 0.0, step, judged) > 0.5
    alone = replace(seen, known=replace(seen.known, gains={**seen.known.gains, seen.end.found: {0: step}}))
    assert frontier.verdict(alone, 0.0)["judges"] == [], "nobody has judged what the first seed alone has tried"


def test_the_ticket_is_of_the_first_seed_that_keeps_the_metric_itself(root: Path) -> None:
    seen = walk(root)
    assert seen.end.found is not None
    gains = {**seen.known.gains, seen.end.found: {0: -1.0, 1: -0.06, 2: 0.0}}
    lucky = replace(seen, known=replace(seen.known, gains=gains))
    assert conclude(lucky, 0.05).ticket.provenance["seed"] == 2
    # A budget that ended while the complete trainings judged a ticket of short ones, of which the first has lost it.
    short, complete = seen.trials[0], seen.trials[-1]
    cut = {**seen.known.gains, seen.end.found: {0: 0.0, 1: -1.0}}
    own = planner(complete[0].store.root, complete[0].study)
    ended = replace(
        seen, known=replace(seen.known, gains=cut), trials=(short, *((own, seed) for _, seed in seen.trials[1:]))
    )
    with pytest.raises(UserError, match="no complete training of it has kept it yet; give a larger budget"):
        conclude(ended, 0.05)


def test_judges_overrule_the_first_seed_and_judge_the_next_level() -> None:
    """The first seed is unlucky at every level from 3 on; the others keep the metric up to level 5."""

    def gain(candidate: Candidate, trial: int) -> float:
        return float((5 if trial else 2) - candidate.level)

    for strategy in ("bisect", "one-shot", "race", "early"):
        end, known, _ = simulate(gain, strategy, 8, trials=3)
        assert end.found.level == 5
        assert any(known.judged(each) and each.level == 6 for each in known.gains)
    assert simulate(gain, "race", 8, trials=1)[0].found.level == 2, "nothing has judged it"


# the verb

FEW: dict[str, Any] = {
    "levels": 2,
    "seeds": [0, 1, 2],
    "data_seeds": [],
    "importances": ["l1"],
    "recipe.epochs": 1,
    "task.dataset_arguments": {"train_per_class": 20, "test_per_class": 5},
    "task.validation": 0.25,
}
WORDS = [
    *("digits", "--levels", "2", "--seeds", "0", "1", "2", "--data-seeds", "--importances", "l1"),
    *("--recipe.epochs", "1", "--task.dataset-arguments", "train_per_class=20", "test_per_class=5"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all trainings that a search with a margin of everything needs, with and without validation."""
    root = tmp_path_factory.mktemp("find") / "small"
    for fields in (FEW, {name: value for name, value in FEW.items() if name != "task.validation"}):
        of = load_study("digits", fields)
        problem = load_problem(of.task)
        own = Planner(of, problem, Store(root))
        trials = [(own, seed) for seed in of.seeds]
        how: dict[str, Any] = {"margin": 1.0}
        search(trials, InTurn(last_first=False, works_on=problem), SHOW, find_strategy("race"), **how)
    return root


def call(small: Path, *words: str, validation: bool = True) -> int:
    own = ["--task.validation", "0.25"] if validation else []
    return main(["find", *WORDS, *own, "--store", str(small), "--workers", "1", "--strategy", "race", *words])


def test_the_verb_writes_the_ticket_and_the_picture(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket, picture = tmp_path / "ticket.safetensors", tmp_path / "walk.svg"
    assert call(small, "--within", "100", "-o", str(ticket), "--picture", str(picture)) == 0
    out = " ".join(capsys.readouterr().out.split())  # sentences are wrapped
    read = Ticket.load(ticket)
    assert (read.level, read.trained is not None) == (2, True)
    assert picture.read_text().startswith("<svg")
    for text in (
        "found: l1, level 2",
        "over seeds 1, 2",
        "95 % interval",
        "the chance that a further seed is outside the margin is about",
        "with a confidence of 95 %, it is at most",
        "test accuracy:",
        "0.0 of them now",
    ):
        assert text in out, text
    assert "level 2 is the last level of the study" in out


@pytest.mark.usefixtures("timed")
def test_the_verb_says_what_it_would_train_at_most(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(small)
    assert call(small, "--plan", "--budget", "1 training") == 0
    out = capsys.readouterr().out
    for text in (" complete trainings, ", "all rounds of the study are 9", "time: at most about "):
        assert text in out, text
    assert "The budget of 1 training may end the search before that." in out
    assert call(small, "--plan", "--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [part["seed"] for part in document["parts"]] == [0, 1, 2]
    assert document["work"] == sum(part["trainings"] for part in document["parts"])
    assert results(small) == before


def test_the_verb_writes_json_and_csv(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(small, "--within", "100", "--format", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"]["level"] == 2
    assert 0 <= document["verdict"]["outside"] <= 1
    assert [row["found"] for row in document["frontier"]] == [True]
    assert call(small, "--within", "100", "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("importance,path,level,density,work,dense_accuracy,accuracy,difference")


def test_without_a_validation_set_the_verb_says_what_is_used(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(small, "--within", "100", validation=False) == 0
    captured = capsys.readouterr()
    assert "chosen on the test set, which makes them look better" in captured.err
    assert "test accuracy" in captured.out


def test_find_in_python_gives_the_ticket_and_the_table(small: Path) -> None:
    found = find("digits", FEW, within=1.0, strategy="race", store=small, progress=False)
    assert (found.ticket.level, found.walk.done, found.table.height) == (2, 0, 1)
    assert found.chart().to_dict()["layer"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--within", "-1"], "--within: expected percentage points of accuracy, 0 to 100, got '-1'"),
        (["--strategy", "bisekt"], "unknown --strategy 'bisekt'; did you mean 'bisect'?"),
        (["--budget", "0.5"], "--budget: 0.5 is less than one training"),
        (["--budget", "soon"], "--budget: expected a time such as 90m or 2h, or a number of trainings such as 12"),
        (["--budget", "0s"], "--budget: expected a time above 0"),
        (["--picture", "walk.gif"], "--picture walk.gif: the name of a picture ends in .svg, .png, .pdf or .html"),
        (["-o", "missing/ticket.safetensors"], "--output missing"),
        (["--levels", "0"], "levels: the study has level 0 alone"),
        (["--seeds", "9", "--budget", "1 training"], "--budget: 1 training is not enough; the dense network and the"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    words: list[str], message: str, small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(small, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_margin_that_no_level_keeps_says_how_far_the_densest_fell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="within: expected a number in 0 to 1"):
        find("digits", within=-0.1)
    own = planner(tmp_path / "s", study(["l1"], seeds=(0, 1), levels=2, rewind=0, iterations=5))
    trials = [(own, 0), (own, 1)]
    lost = search(trials, InTurn(last_first=False), SHOW, find_strategy("one-shot"), margin=-2.0)
    expected = r"no ticket keeps the test accuracy within -200 points; the densest ticket that was tried \(l1, level"
    with pytest.raises(
        UserError, match=expected + r" 1\) has [\d.]+ %, and the dense network [\d.]+ %, a difference of"
    ):
        conclude(lost, -2.0)


def test_the_verb_says_how_far_the_densest_ticket_fell(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tombola.engine.search.measure_gain", lambda *_: -0.5)
    assert call(small, "--within", "1") == 2
    assert re.search(
        r"--within: no ticket keeps the validation accuracy within 1 points; the densest ticket that was tried \(l1, "
        r"level 1\) has [\d.]+ %, and the dense network [\d.]+ %, a difference of [+-][\d.]+ points\n",
        capsys.readouterr().err,
    )


def test_a_metric_without_direction_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aimless.py").write_text("def aim(outputs, targets):\n    return 0.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"which way is better; set aim.higher_is_better = True or False"):
        find("digits", {"task.metrics": ["aimless:aim"]}, store=tmp_path / "s", progress=False)


def test_budgets_are_read_in_all_their_forms() -> None:
    assert read_budget("90m") == Budget(seconds=5400, text="90m")
    assert read_budget(12).trainings == read_budget("12 trainings").trainings == 12
    assert read_budget(None) == Budget()
    assert isinstance(plan(Known(("l1",), 3, 0.0, 1, {}), find_strategy("race")), Ask)


def test_a_budget_counts_each_training_of_a_search_once(tmp_path: Path) -> None:
    """Where nothing is trained, importances share the rewind point, and the dense network, complete and early."""
    own = planner(tmp_path / "s", study(["l1", "random"], seeds=(0,), levels=4, rewind=2, iterations=10))
    unit = Speed({1.0: 1.0}, 0.0, 0.0, "")
    for strategy in (race, early):
        asked = plan(Known(own.study.importances, 4, 0.0, 1, {}), strategy)
        assert isinstance(asked, Ask)
        chains = dict.fromkeys(chain for each in asked.candidates for chain in list_chains(each, 0))
        steps = {
            step.name: step.seconds for chain in chains for step in steps_ahead(own, chain, follow(own, chain), unit)
        }
        stages = _list_stages([(own, 0)], [asked])
        assert (sum(steps.values()), len(steps)) == (_sum_iterations(stages), len(stages))

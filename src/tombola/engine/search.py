"""Searches: do the trainings that a strategy asks for, within a budget, and note what is known after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tombola.engine.estimate import speed_of
from tombola.engine.forecast import Speed, makespan, paths_ahead, steps_ahead
from tombola.engine.run import Status, run
from tombola.engine.workers import Workers
from tombola.errors import BudgetError, DamagedResultError, UserError
from tombola.lottery.search import Ask, Candidate, End, Known, Strategy, plan
from tombola.study.chains import Chain, Progress
from tombola.study.planner import Planner
from tombola.study.searches import list_chains, read_tickets
from tombola.study.tickets import Tickets
from tombola.study.trainings import Training
from tombola.training.history import Trained
from tombola.training.metrics import Measure

Show = Callable[[Status, Training | None], None]
"""A function that shows the status of a run, see `tombola.engine.run.run`."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend on trainings that the store does not have; None for no limit.

    Args:
        trainings: the work, in complete trainings.
        seconds: the time since the search began.
        text: how the user has written it.
    """

    trainings: float | None = None
    seconds: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Tried:
    """A ticket that a search has trained in one trial.

    Args:
        candidate: the ticket.
        trial: the number of the trial.
        seed: its seed.
        density: alive / all connections, in 0..1; None if the ticket was not reached.
        value, dense: what tickets are judged by, of the ticket and of the dense network of the same seed; None if the
            training diverged or was not reached.
        gain: how much better the ticket is, see `tombola.lottery.search.Known`.
        work: the work of the search until it was known, in complete trainings, whether or not the store had them.
        why: why there is no value; empty if there is one.
    """

    candidate: Candidate
    trial: int
    seed: int
    density: float | None
    value: float | None
    dense: float
    gain: float
    work: float
    why: str = ""


@dataclass
class Walk:
    """A search: what it has tried, what it has found, and what it does not know.

    Args:
        known: what is known of the tickets tried.
        trials: the planner and the seed of each trial; the first is that of the search.
        tried: the tickets tried in each trial, in the order in which they became known.
        end: the ticket that was found and the reason why the search ended.
        work: the work of all trainings of the search, and of the learning of masks, in complete trainings.
        done: the work of those that the store did not have.
        unknown: sentences on what the search would have trained next, if the budget ended it.
        notes: sentences for the user.
    """

    known: Known
    trials: Sequence[tuple[Planner, int]]
    tried: list[Tried] = field(default_factory=list)
    end: End = field(default_factory=lambda: End(None, "nothing was tried"))
    work: float = 0.0
    done: float = 0.0
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether the ticket that was found is trained in all trials."""
        return self.end.found is not None and len(self.known.gains[self.end.found]) == self.known.trials


class _TimeIsUp(Exception):  # noqa: N818 (it is no error)
    """The time of the budget is over, so the trainings that are running end."""


def search(
    trials: Sequence[tuple[Planner, int]],
    workers: Workers,
    show: Show,
    strategy: Strategy,
    *,
    margin: float,
    budget: Budget = Budget(),
    speed: Speed | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Walk:
    """Search for the sparsest ticket that keeps the metric; finished trainings are stored, so that a search resumes.

    A training is not begun if the budget is not expected to suffice for it; what is reserved for judging the best
    ticket so far is not spent on further ones. If the time of the budget is over, trainings that are running end, and
    go on from their checkpoints in another search.

    Args:
        trials: a planner and a seed for each trial, see `tombola.lottery.search.Known`. All planners have the same
            importances and levels; the last one's complete training is the unit of work.
        workers: the workers that do the trainings.
        show: a function that is called with the status of each run.
        strategy: the strategy.
        margin: by how much a ticket may be worse than the dense network, see `tombola.analysis.winners.by_level`.
        budget: what may be spent.
        speed: the speed of trainings as known before the search; needed for a budget of time alone.
        clock: a function that returns the time in seconds.

    Raises:
        UserError: if the budget does not suffice for the first ticket, if a dense network diverged, or if a training
            fails. The results of all finished trainings are stored.
    """
    study = trials[0][0].study
    walk = Walk(Known(study.importances, study.levels, margin, len(trials), {}), trials)
    return _Search(walk, workers, show, budget, speed, clock).run(strategy)


class _Search:
    """The state of a search: what it has spent, and how fast trainings are."""

    def __init__(
        self,
        walk: Walk,
        workers: Workers,
        show: Show,
        budget: Budget,
        speed: Speed | None,
        clock: Callable[[], float],
    ) -> None:
        self._walk, self._workers, self._show, self._budget = walk, workers, show, budget
        self._speed, self._clock, self._began = speed, clock, clock()
        self._whole = walk.trials[-1][0].end
        self._work: dict[str, float] = {}
        self._learned: set[str] = set()
        self._seen: dict[str, tuple[Planner, Progress]] = {}

    def run(self, strategy: Strategy) -> Walk:
        """Do what the strategy asks for until it ends, or until the budget does not suffice for more."""
        walk = self._walk
        goes_on = True
        while isinstance(asked := plan(walk.known, strategy if goes_on else _stop), Ask):
            searches = asked.trials == (0,)
            within = self._fit(asked, self._judge_best() if searches else {})
            if within is not None and self._train(within):
                continue
            if not walk.known.gains:
                self._refuse(asked)
            walk.unknown.append(_describe(asked, walk))
            if not (goes_on and searches):
                break
            goes_on = False
        walk.end = asked if isinstance(asked, End) and goes_on else End(walk.known.best, self._end_of_budget())
        return walk

    def _fit(self, asked: Ask, reserved: Mapping[Chain, Planner]) -> Ask | None:
        """Return as many of the tickets as the budget suffices for; None if for none."""
        for count in range(len(asked.candidates), 0, -1):
            some = replace(asked, candidates=asked.candidates[:count])
            if self._suffices({**self._list_chains(some), **reserved}):
                return some
        return self._fit(asked, {}) if reserved and not self._suffices(reserved) else None

    def _judge_best(self) -> dict[Chain, Planner]:
        """Return the chains of the best ticket so far in the trials that judge it."""
        best = self._walk.known.best
        trials = tuple(range(1, self._walk.known.trials))
        return self._list_chains(Ask((best,), trials)) if best and trials else {}

    def _list_chains(self, asked: Ask) -> dict[Chain, Planner]:
        return {chain: self._walk.trials[trial][0] for trial in asked.trials for chain in self._chains_of(trial, asked)}

    def _chains_of(self, trial: int, asked: Ask) -> list[Chain]:
        seed = self._walk.trials[trial][1]
        return list(dict.fromkeys(chain for each in asked.candidates for chain in list_chains(each, seed)))

    def _suffices(self, chains: Mapping[Chain, Planner]) -> bool:
        """Return whether the budget is expected to suffice for chains of trainings."""
        trainings, seconds = self._budget.trainings, self._budget.seconds
        work = self._measure_work(chains) if self._budget != Budget() else 0.0
        if not work:
            return True
        if trainings is not None and self._walk.done + work > trainings + 1e-9:
            return False
        return seconds is None or self._clock() - self._began + self._measure_time(chains) <= seconds

    def _measure_work(self, chains: Mapping[Chain, Planner]) -> float:
        """Return the missing work of chains, in complete trainings."""
        unit = Speed({1.0: 1 / self._whole}, 0.0, 0.0, "work")
        steps = {
            (planner.end, step.name): step.seconds
            for chain, planner in chains.items()
            for step in steps_ahead(planner, chain, follow(planner, chain), unit)
        }
        return sum(steps.values())

    def _measure_time(self, chains: Mapping[Chain, Planner]) -> float:
        """Return the expected seconds of the missing trainings of chains; 0 if no speed is known."""
        speed = speed_of(self._walk.trials[-1][0], [progress for _, progress in self._seen.values()]) or self._speed
        if speed is None:
            return 0.0
        paths = [
            path
            for chain, planner in chains.items()
            for path in paths_ahead(planner, chain, follow(planner, chain), speed)
        ]
        return makespan(paths, self._workers.count)

    def _train(self, asked: Ask) -> bool:
        """Do the trainings of these tickets and note what is known then; return False if the time is over."""
        note = {"search": [_describe_path(each) for each in asked.candidates]}
        try:
            for planner in dict.fromkeys(
                planner for planner, _ in (self._walk.trials[trial] for trial in asked.trials)
            ):
                trials = [trial for trial in asked.trials if self._walk.trials[trial][0] is planner]
                chains = [chain for trial in trials for chain in self._chains_of(trial, asked)]
                planner.about = note
                status = run(planner, self._workers, self._watch, chains)
                self._walk.notes += [text for text in status.notes if text not in self._walk.notes]
        except _TimeIsUp:
            return False
        for trial in asked.trials:
            for candidate in asked.candidates:
                self._note(trial, candidate)
        return True

    def _watch(self, status: Status, finished: Training | None) -> None:
        if finished is not None:
            self._walk.done += (finished.end - finished.begin) / self._whole
        for key in status.pruned.keys() - self._learned:
            self._learned.add(key)
            self._walk.done += self._measure_learning(status.pruned[key])
        self._show(status, finished)
        seconds = self._budget.seconds
        if seconds is not None and status.done < status.total and self._clock() - self._began > seconds:
            raise _TimeIsUp

    def _measure_learning(self, importance: str) -> float:
        """Return the work in which a round of an importance learns its mask, in complete trainings."""
        return self._walk.trials[-1][0].learning_length(importance) / self._whole

    def _note(self, trial: int, candidate: Candidate) -> None:
        """Note the results of a ticket, and of the tickets on its path that are not known yet."""
        planner, seed = self._walk.trials[trial]
        tickets = Tickets(planner)
        for chain in list_chains(candidate, seed):
            progress = tickets.progress(chain)
            self._seen[f"{planner.end} {chain}"] = planner, progress
            for training in progress.trainings:
                self._work[training.key] = (training.end - training.begin) / self._whole
            if learning := self._measure_learning(chain.importance):
                learned = progress.tickets if progress.stopped else progress.tickets[:-1]  # it learned until it failed
                masks = planner.name_masks(chain, learned)
                self._work |= dict.fromkeys(masks, learning)
        self._walk.work = sum(self._work.values())
        measure = planner.problem.measure
        found = read_tickets(tickets, candidate, seed)
        dense, others = next(iter(found), None), found[1:]
        before = dense.trained.history.value(measure) if dense is not None and dense.trained is not None else None
        if before is None:
            raise UserError(f"the dense network of seed {seed} has no {measure.label}: its training diverged")
        gains = {each: dict(known) for each, known in self._walk.known.gains.items()}
        for number, stage in enumerate(candidate.stages):
            if trial in gains.setdefault(stage, {}):
                continue
            ticket = others[number] if number < len(others) else None
            value = ticket.trained.history.value(measure) if ticket is not None and ticket.trained is not None else None
            gain = -math.inf if value is None else measure_gain(value, before, measure)
            gains[stage][trial] = gain
            why = "" if value is not None else _explain(progress)
            density = ticket.mask.density if ticket is not None else None
            self._walk.tried.append(Tried(stage, trial, seed, density, value, before, gain, self._walk.work, why))
        self._walk.known = replace(self._walk.known, gains=gains)

    def _refuse(self, asked: Ask) -> None:
        """Raise `BudgetError`, because the budget does not suffice for the first ticket."""
        chains = self._list_chains(replace(asked, candidates=asked.candidates[:1]))
        work = self._measure_work(chains)
        needed = f"the work of {work:.3g} training{'s' if work != 1 else ''} of {self._whole} iterations"
        if self._budget.seconds is not None:
            needed += f", about {self._measure_time(chains):.3g} seconds"
        raise BudgetError(
            f"budget: {self._budget.text} is not enough; the dense network and the first ticket need {needed}, which "
            "the store does not have"
        )

    def _end_of_budget(self) -> str:
        return f"the budget of {self._budget.text} does not suffice for more"


def measure_gain(value: float, dense: float, measure: Measure) -> float:
    """Return by how much a value is better than the dense network's: a difference of shares, or a share of its |value|.

    >>> measure_gain(0.5, 0.75, Measure()), measure_gain(3.0, 4.0, Measure(higher_is_better=False, percent=False))
    (-0.25, 0.25)
    """
    gain = measure.gain(value, dense)
    if measure.percent or not gain:
        return gain
    return gain / abs(dense) if dense else math.copysign(math.inf, gain)


def _explain(progress: Progress) -> str:
    """Return why a chain has no value at its last level."""
    return f"cannot be reached: {progress.stopped}" if progress.stopped else "its training diverged"


def follow(planner: Planner, chain: Chain) -> Progress:
    """Return the progress of a chain; a damaged result is missing, because a run repeats its training."""

    def get(key: str) -> Trained | None:
        try:
            return planner.store.results.get(key)
        except DamagedResultError:
            return None

    return planner.progress(chain, get)


def _describe_path(candidate: Candidate) -> dict[str, Any]:
    """Return the note on a candidate in the records of the trainings that it asks for."""
    note: dict[str, Any] = {"importance": candidate.importance, "path": list(candidate.path)}
    return note | {"early": True} if candidate.early else note


def _stop(known: Known) -> Sequence[Candidate]:
    """Search no further."""
    return ()


def _describe(asked: Ask, walk: Walk) -> str:
    """Return a sentence on what was not trained."""
    tickets = ", ".join(f"{each.importance} at level {each.level}" for each in asked.candidates)
    if asked.trials == (0,):
        return f"not tried: {tickets}"
    seeds = ", ".join(str(walk.trials[trial][1]) for trial in asked.trials)
    return f"not judged: {tickets} with seed {seeds}"

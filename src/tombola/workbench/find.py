"""Find: the sparsest ticket of a study that keeps the metric of its dense network, with few trainings."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from tombola.analysis import frontier
from tombola.analysis.defaults import MARGIN
from tombola.analysis.winners import FLATTERS
from tombola.engine.estimate import dense_speed, recorded_speed
from tombola.engine.here import WorkersHere
from tombola.engine.search import Budget, Walk, search
from tombola.engine.search_estimate import Outlook, estimate_search
from tombola.errors import UserError, expect_flags, short
from tombola.exits import watch_exits
from tombola.lottery.search import DEFAULT, SHARES, Strategy, find_strategy
from tombola.lottery.ticket import Ticket
from tombola.store.layout import STORE
from tombola.study.planner import Planner
from tombola.study.searches import shorten_study
from tombola.study.tickets import Tickets
from tombola.threads import one_thread
from tombola.workbench.pictures import check_installed
from tombola.workbench.progress import show_nothing, show_progress
from tombola.workbench.runs import check_workers, count_workers, open_run, open_workers
from tombola.workbench.studies import AnyStudy, Overrides

if TYPE_CHECKING:
    from tombola.reporting.look import Chart

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(?:\d+(?:\.\d+)? *(?:s|min|m|h|d) *)+")
_TRAININGS = re.compile(r"(\d+(?:\.\d+)?) *(?:trainings?)?")


class FlattersWarning(UserWarning):
    """Tickets are chosen on the test set, because the data has no validation set."""


@dataclass(frozen=True)
class Found:
    """A ticket that a search has found.

    Args:
        ticket: the ticket of the first seed that keeps the metric itself, with its trained weights.
        verdict: how sure it is, see `tombola.analysis.frontier.verdict`.
        table: what was tried, see `tombola.analysis.frontier.of_walk`.
        reason: why the search ended.
        unknown: sentences on what is not known, because the budget ended the search or there are too few seeds.
        walk: the search.
    """

    ticket: Ticket
    verdict: dict[str, Any]
    table: pl.DataFrame
    reason: str
    unknown: tuple[str, ...]
    walk: Walk

    def chart(self) -> Chart:
        """Return the chart of what was tried, which a notebook shows inline.

        Raises:
            UserError: if the extra `report` is not installed.
        """
        with check_installed():
            from tombola.reporting.look import inline

            return inline(draw(self.walk), "What the search has tried")


def find(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    within: float = MARGIN,
    strategy: str | Strategy = DEFAULT,
    budget: str | float | None = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Found:
    """Find the sparsest ticket of a study that keeps the metric of its dense network, with few trainings.

    The search goes by the results of the first seed of the study, on the validation set. What it finds is trained with
    the other seeds, which judge it; if they refute it, the search goes on. Trainings are stored and shared with those
    of the study and of other searches, so that a search which is interrupted, or whose budget is spent, goes on where
    it stopped.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values, such as `{"seeds": [0, 1, 2], "task.validation": 0.2}`.
        within: by how much a ticket may be worse, in 0..1: for accuracies and other shares on their own scale (0.005 is
            half a percentage point), for all other metrics as a share of the dense network's |value|.
        strategy: the name of a strategy: `rounds`, `bisect`, `one-shot`, `race`, `short` or `early`; or a function, see
            `tombola.lottery.search`.
        budget: what may be spent on trainings that the store does not have: a time such as `"90m"` or `"2h"`, or a
            number of complete trainings such as `12` or `"12 trainings"`. By default there is no limit.
        store: the folder of the store; it is created if it is missing.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Raises:
        UserError: if the study, the margin, the strategy or the budget is invalid, if the budget does not suffice for
            the first ticket, or if no ticket that was tried keeps the metric; finished trainings are kept.

    Warns:
        FlattersWarning: if the data has no validation set, so that tickets are chosen on the test set.

    >>> from tombola.workbench.example import finished
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", FlattersWarning)
    ...     found = find(**finished(), within=1.0, progress=False)
    >>> found.ticket.level, found.table.columns[:3]
    (1, ['importance', 'path', 'level'])
    """
    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        check_margin(within)
        allowed = read_budget(budget)
        find_strategy(strategy)
        planner = open_run(study, overrides, store, data)
        if planner.problem.measure.split == "test":
            warnings.warn(FLATTERS, FlattersWarning, stacklevel=2)
        folder = None if data is None else Path(data)
        walk = walk_study(planner, within, strategy, allowed, workers, folder, progress=progress)
        return conclude(walk, within)


def check_margin(within: float) -> None:
    """Raise `UserError` unless a margin is a number in 0..1."""
    if isinstance(within, bool) or not isinstance(within, int | float) or not 0 <= within <= 1:
        raise UserError(f"within: expected a number in 0 to 1, such as 0.005 for half a point, got {short(within)}")


def read_budget(budget: str | float | None) -> Budget:
    """Return a budget from how a user writes it.

    Raises:
        UserError: if it is neither a time nor a number of trainings, or if it is less than one training.

    >>> read_budget("1h 30m").seconds, read_budget("12 trainings").trainings, read_budget(3).text
    (5400.0, 12.0, '3 trainings')
    """
    if budget is None:
        return Budget()
    text = str(budget).strip()
    if found := _TRAININGS.fullmatch(text):
        number = float(found[1])
        if number < 1:
            raise UserError(f"budget: {number:g} is less than one training; give 2 or more, or a time such as 90m")
        return Budget(trainings=number, text=f"{number:g} training{'s' if number != 1 else ''}")
    if not _TIME.fullmatch(text):
        raise UserError(
            f"budget: expected a time such as 90m or 2h, or a number of trainings such as 12, got {short(budget)}"
        )
    parts = re.findall(r"(\d+(?:\.\d+)?) *([a-z]+)", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds < math.inf:
        raise UserError(f"budget: expected a time above 0, got {short(budget)}")
    return Budget(seconds=seconds, text=text)


def walk_study(
    planner: Planner,
    within: float,
    strategy: str | Strategy,
    budget: Budget,
    workers: int | None,
    data: Path | None,
    *,
    progress: bool = True,
) -> Walk:
    """Search for the sparsest ticket of a study that keeps the metric, see `tombola.engine.search.search`.

    Args:
        planner: the planner of the study, with a store that can be written to.
        within: by how much a ticket may be worse.
        strategy: the strategy or its name.
        budget: what may be spent.
        workers: the number of trainings at the same time.
        data: the folder of the data sets.
        progress: whether to show the progress.

    Raises:
        UserError: see `list_trials` and `tombola.engine.search.search`.
    """
    trials = list_trials(planner, strategy)
    with open_workers(planner, workers, data) as opened:
        timed = budget.seconds is not None and not isinstance(opened, WorkersHere)
        speed = recorded_speed(Tickets(planner)) or dense_speed(planner, data) if timed else None
        with show_progress(planner, opened.count) if progress else show_nothing() as show:
            return search(trials, opened, show, find_strategy(strategy), margin=within, budget=budget, speed=speed)


def list_trials(planner: Planner, strategy: str | Strategy) -> list[tuple[Planner, int]]:
    """Return the planner and the seed of each trial of a search, see `tombola.engine.search.search`.

    Raises:
        UserError: if the study has no level from 1 on.
    """
    study = planner.study
    if not study.levels:
        raise UserError("levels: the study has level 0 alone, and a ticket is found at a level from 1 on")
    trials = [(planner, seed) for seed in study.seeds]
    if isinstance(strategy, str) and strategy in SHARES:
        shorter = shorten_study(study, strategy)
        if shorter != study:
            trials = [(Planner(shorter, planner.problem, planner.store), study.seeds[0]), *trials]
    return trials


def outlook(planner: Planner, strategy: str | Strategy, workers: int | None, data: Path | None) -> Outlook:
    """Return what a search of a study trains at most, and how long it takes; see `find`.

    Raises:
        UserError: see `list_trials` and `tombola.workbench.runs.check_workers`.
    """
    here = check_workers(planner, workers)
    count = 1 if here else count_workers(workers, planner.study.device)
    return estimate_search(list_trials(planner, strategy), find_strategy(strategy), count, data, here=here)


def conclude(walk: Walk, within: float) -> Found:
    """Return what a search has found.

    Raises:
        UserError: if it has found no ticket; the message says how far the densest one fell.
    """
    if walk.end.found is None:
        raise UserError(describe_failure(walk))
    found = walk.end.found
    gains = walk.known.gains[found]
    complete = [number for number in sorted(gains) if walk.trials[number][0] is walk.trials[-1][0]]
    keeping = [number for number in complete if walk.known.within(gains[number])]
    if not keeping:
        done = "no complete training of it has kept it yet" if complete else "was not trained in full"
        raise UserError(
            f"{walk.end.reason}: {found.importance} at level {found.level} keeps the metric in short trainings, and "
            f"{done}; give a larger budget, and the search goes on"
        )
    ticket = frontier.read_tickets(walk, found, keeping[0])[1]
    unknown = (*walk.unknown, *_list_unknown(walk))
    return Found(ticket, frontier.verdict(walk, within), frontier.of_walk(walk), walk.end.reason, unknown, walk)


def describe_failure(walk: Walk) -> str:
    """Return a sentence that says that no ticket keeps the metric, and how far the densest one fell."""
    measure = walk.trials[-1][0].problem.measure
    densest = min(walk.tried, key=lambda each: (each.candidate.level, -each.gain))
    where = f"the densest ticket that was tried ({densest.candidate.importance}, level {densest.candidate.level})"
    if densest.value is None:
        fell = f"{where} has no {measure.label}: {densest.why}"
    else:
        fell = (
            f"{where} has {measure.text(densest.value)}, and the dense network {measure.text(densest.dense)}, a "
            f"difference of {measure.figure(densest.value - densest.dense, sign=True)} {measure.unit}"
        )
    ended = f"; {walk.end.reason}, and {'; '.join(walk.unknown)}" if walk.unknown else ""
    return f"within: no ticket keeps the {measure.split} {measure.label} within {name_margin(walk)}; {fell}{ended}"


def name_margin(walk: Walk) -> str:
    """Return the margin of a search as text: in points, or in percent of the dense network's value."""
    points = walk.trials[-1][0].problem.measure.percent
    return f"{100 * walk.known.margin:g} {'points' if points else '% of the dense value'}"


def draw(walk: Walk) -> Chart:
    """Return the chart of what a search has tried, without colours and size."""
    from tombola.reporting.charts import frontier as chart

    planner = walk.trials[-1][0]
    dense = next((each.dense for each in walk.tried), None)
    return chart(frontier.of_walk(walk), planner.study.importances, dense, walk.known.margin, planner.problem.measure)


def _list_unknown(walk: Walk) -> Sequence[str]:
    judges = walk.known.trials - 1
    if judges == 0:
        return ["not judged: the study has one seed, by whose results the ticket was chosen; more seeds judge it"]
    if judges == 1:
        return ["no interval: one seed has judged the ticket, and an interval needs two; give the study one more seed"]
    return []


def work_of_rounds(planner: Planner) -> float:
    """Return the work of the study's own rounds, in complete trainings, without those that chains share by chance.

    Args:
        planner: the planner of the study.
    """
    study = planner.study
    learning = sum(map(planner.learning_length, study.importances)) / planner.end
    return len(study.seeds) * (1 + study.levels * (len(study.importances) + learning))

"""Searches: the chains of a study that searches for a ticket have tried."""

from __future__ import annotations

from tombola.lottery.search import SHARES
from tombola.study.planner import Chain, Planner
from tombola.study.schema import Study
from tombola.study.tickets import Tickets
from tombola.training.recipe import shorten


def shorten_study(study: Study, strategy: str) -> Study:
    """Return a study with the shorter trainings of a strategy, see `tombola.lottery.search.SHARES`."""
    return study.model_copy(update={"recipe": shorten(study.recipe, SHARES[strategy])})


def list_planners(planner: Planner) -> list[tuple[Planner, list[Chain]]]:
    """Return the chains of a study, and of all searches for a ticket of it, with the planner of each.

    The first planner is that of the study, with its own chains and those of searches. The others are those of shorter
    trainings.
    """
    searched = list_searched(Tickets(planner))
    shorter = [shorten_study(planner.study, strategy) for strategy in SHARES if searched]
    return [
        (planner, [*planner.chains, *planner.repeats, *searched]),
        *((Planner(study, planner.problem, planner.store), searched) for study in shorter),
    ]


def list_searched(tickets: Tickets) -> list[Chain]:
    """Return the chains of a study that searches have tried, as the records of their trainings say."""
    study, notes = tickets.study, tickets.planner.store.results.notes("search")
    paths = {(note["importance"], tuple(note["path"])) for each in notes.values() for note in each}
    return [
        Chain(seed, importance, path=path)
        for importance, path in sorted(paths)
        if importance in study.importances and path[-1] <= study.levels and list(path) == sorted(set(path))
        for seed in study.seeds
    ]

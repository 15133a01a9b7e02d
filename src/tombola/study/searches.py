"""Searches: the chains of a study that searches for a ticket have tried."""

from __future__ import annotations

from dataclasses import replace

from tombola.lottery.search import SHARES, Candidate
from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain
from tombola.study.planner import Planner, can_prune_early
from tombola.study.schema import Study
from tombola.study.tickets import Tickets
from tombola.training.recipe import shorten


def shorten_study(study: Study, strategy: str) -> Study:
    """Return a study with the shorter trainings of a strategy, see `tombola.lottery.search.SHARES`."""
    return study.model_copy(update={"recipe": shorten(study.recipe, SHARES[strategy])})


def list_chains(candidate: Candidate, seed: int) -> tuple[Chain, ...]:
    """Return the chains of a candidate: the first has the complete dense network, and the last has the candidate.

    >>> [str(chain) for chain in list_chains(Candidate("l1", (4, 6), early=True), 0)]
    ['l1, seed 0, dense network', 'l1, seed 0, by levels 4, 6, masks taken early']
    """
    own = Chain(seed, candidate.importance, path=candidate.path, early=candidate.early)
    return (replace(own, path=()), own) if candidate.early else (own,)


def read_tickets(tickets: Tickets, candidate: Candidate, seed: int) -> list[Ticket]:
    """Return the dense network and the tickets of a candidate's stages, with all metrics, as far as they are trained.

    Raises:
        DamagedResultError: if a stored result is damaged.
    """
    chains = list_chains(candidate, seed)
    dense, found = tickets.measure(chains[0])[:1], tickets.measure(chains[-1])
    levels = len(candidate.path) - len(candidate.stages) + 1  # the first levels of a path whose masks are taken early
    return [*dense, *found[levels:]] if dense else []


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
    found = {
        (note["importance"], tuple(note["path"]), note.get("early", False)) for each in notes.values() for note in each
    }
    return [
        Chain(seed, importance, path=path, early=early)
        for importance, path, early in sorted(found)
        if importance in study.importances and path[-1] <= study.levels and list(path) == sorted(set(path))
        if can_prune_early(study) or not early
        for seed in study.seeds
    ]

"""Needs: the names of everything that a study needs from its store."""

from __future__ import annotations

from collections.abc import Sequence

from tombola.study.planner import Chain
from tombola.study.reinitialisation import list_notes, plan_again
from tombola.study.searches import list_planners
from tombola.study.singles import list_single_needs
from tombola.study.tickets import Tickets
from tombola.study.trainings import Round


def list_needs(tickets: Tickets) -> set[str]:
    """Return the names of the results, masks and checkpoints that a study needs or may need next.

    The chains of the study, those of its searches, also with shorter trainings, and those of its partial
    reinitialisations are included, and the stored trainings of other further analyses. Each chain needs its trainings
    that the store has, the training that it waits for, and the masks that its tickets are pruned to.

    Args:
        tickets: the tickets of the study.

    Raises:
        DamagedResultError: if a stored result is damaged, so that its chain cannot be followed to its end.
    """
    planners = list_planners(tickets.planner)
    needs = set[str]().union(*(list_chain_needs(Tickets(planner), chains) for planner, chains in planners))
    for (level, importances), draws in list_notes(tickets).items():
        for seed in tickets.study.seeds:
            found = plan_again(tickets, level, draws, importances, seed)
            if found is not None:
                needs |= list_chain_needs(Tickets(found.planner))
    return needs | list_single_needs(tickets, needs)


def list_chain_needs(tickets: Tickets, chains: Sequence[Chain] | None = None) -> set[str]:
    """Return the names that chains need, by default those of the study; see `list_needs`."""
    planner = tickets.planner
    chains = [*planner.chains, *planner.repeats] if chains is None else chains
    needs = set[str]()
    for chain in chains:
        progress = tickets.progress(chain)
        while isinstance(need := progress.waits_for, Round):
            planner.compute(need)  # a lost mask must not hide the trainings after it
            progress = tickets.progress_now(chain)
        needs |= {training.key for training in progress.trainings}
        needs |= set(planner.name_masks(chain, progress.tickets))
        needs |= {need.key for need in progress.needs}
    return needs

"""Needs: the names of everything that a study needs from its store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tombola.store.names import name_of
from tombola.study.chains import Chain
from tombola.study.reinitialisation import Plan, list_notes, plan_again
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
    plans = [
        plan_again(tickets, level, draws, importances, seed)
        for (level, importances), draws in list_notes(tickets).items()
        for seed in tickets.study.seeds
    ]
    needs |= _list_reinitialised_needs(tickets, [each for each in plans if each is not None])
    return needs | list_single_needs(tickets, needs)


def _list_reinitialised_needs(tickets: Tickets, plans: Sequence[Plan]) -> set[str]:
    """Return the names that partial reinitialisations need.

    The draws are followed up to the first of which the store has nothing: a record may say any number of draws, and the
    initial weights of each take time. As a run that was interrupted may have done later draws first, all stored
    trainings that could be draws of this seed are kept then.
    """
    results, needs, interrupted = tickets.planner.store.results, set[str](), set[str]()
    for plan in plans:
        planner = plan.planner
        for chains in plan.draws():
            draw = list_chain_needs(Tickets(planner), chains)
            needs |= draw
            if not any(key in results for key in draw):
                own = planner.training(plan.seed, planner.initial(1), planner.dense, 0, planner.end)
                interrupted.add(_name_family(own.identity))
                break
    for key in results.notes("reinit") if interrupted else ():
        document = results.document(key)
        if document is not None and _name_family(document.identity) in interrupted:
            needs.add(key)
    return needs


def _name_family(identity: Mapping[str, Any]) -> str:
    """Return a name that the trainings of all draws and levels of one seed of a study have in common."""
    of_each = {"initial", "mask", "begin", "end", "sparse", "packed"}
    return name_of({field: value for field, value in identity.items() if field not in of_each})


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

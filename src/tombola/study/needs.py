"""Needs: the names of everything that a study needs from its store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from tombola.study.planner import Chain
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
    for (level, importances), draws in list_notes(tickets).items():
        for seed in tickets.study.seeds:
            found = plan_again(tickets, level, draws, importances, seed)
            if found is not None:
                needs |= _list_draws_needs(found)
    return needs | list_single_needs(tickets, needs)


def _list_draws_needs(plan: Plan) -> set[str]:
    """Return the names that the partial reinitialisations of one seed need.

    The draws are followed up to the first of which the store has nothing: a record may say any number of draws, and the
    initial weights of each take time. As a run that was interrupted may have done later draws first, all trainings
    with the study's identity and this seed that a partial reinitialisation asked for are kept then.
    """
    planner, needs = plan.planner, set[str]()
    for _, chains in groupby(planner.chains, key=attrgetter("seed")):
        draw = list_chain_needs(Tickets(planner), list(chains))
        needs |= draw
        if not any(key in planner.store.results for key in draw):
            return needs | _list_reinitialised(plan)
    return needs


def _list_reinitialised(plan: Plan) -> set[str]:
    """Return the names of the stored trainings that could be draws of one seed, whatever draws these are."""
    planner, found = plan.planner, set[str]()
    own = planner.training(plan.seed, planner.initial(1), planner.dense, 0, planner.end).identity
    same = own.keys() - {"initial", "mask", "begin", "end", "sparse", "packed"}
    for key in planner.store.results.notes("reinit"):
        document = planner.store.results.document(key)
        if document is not None and all(document.identity.get(name) == own[name] for name in same):
            found.add(key)
    return found


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

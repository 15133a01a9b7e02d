"""Partial reinitialisations: plan the trainings that test whether pruning finds shared connections again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import and_, attrgetter
from types import MappingProxyType

import torch

from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.streams import derive
from tombola.study.chains import Chain, select_chains
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets, check_draws, check_level
from tombola.training.train import initial_state
from tombola.training.weights import Shared, State, Weights


@dataclass(frozen=True)
class Plan:
    """The trainings of the partial reinitialisations of one seed.

    Args:
        seed: the seed of the initialisation that is kept in part, and of the data order and all other random choices.
        kept: the connections that keep their initial weights, namely those that the compared tickets share.
        planner: the planner of the trainings, which differ from those of the study only in their initial weights. The
            seed of each chain is the number of a draw (1, 2, ...), and its data seed is `seed`.
    """

    seed: int
    kept: Mask
    planner: Planner

    def draws(self) -> Iterator[list[Chain]]:
        """Yield the chains of each draw. Nothing of a draw is computed before a chain is followed."""
        return (list(chains) for _, chains in groupby(self.planner.chains, key=attrgetter("seed")))


def plan(
    tickets: Tickets,
    level: int,
    draws: int,
    importances: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Plan]:
    """Return the trainings of a study's partial reinitialisations, for each seed.

    Args:
        tickets: the tickets of the study.
        level: the level of the tickets whose shared connections are kept; tickets are found again up to this level.
        draws: the number of reinitialisations of the remaining weights, 1 to 1000.
        importances: the names of two or more importances to compare; by default all importances of the study.
        seeds: some seeds of the study; by default all.

    Raises:
        UserError: if the level or the importances are invalid, or if the tickets share no connection.
        NothingStoredError: if the store does not have the tickets yet.
        DamagedResultError: if a stored result is damaged.
    """
    seeds = tickets.study.seeds if seeds is None else seeds
    chains = [chain for chain in select_chains(tickets.study, importances, at_least=2) if chain.seed in seeds]
    names = tuple(dict.fromkeys(chain.importance for chain in chains))
    check_level(tickets.study, level)
    if level < 1:
        raise UserError(
            "partial reinitialisation: expected a level from 1 on; tickets of level 0 share all connections"
        )
    check_draws(draws)
    tickets.require([level], chains)
    found = []
    for seed in dict.fromkeys(chain.seed for chain in chains):
        kept = share(tickets, level, seed, names)
        if kept is None or not kept.alive:
            raise UserError(f"partial reinitialisation: tickets of seed {seed} share no connection at level {level}")
        found.append(plan_draws(tickets.planner, level, names, seed, kept, draws))
    return found


def plan_again(tickets: Tickets, level: int, draws: int, importances: Sequence[str], seed: int) -> Plan | None:
    """Return the trainings of the partial reinitialisations of one seed; None if tickets are missing or share nothing.

    Args:
        tickets, level, draws, importances: the arguments of `plan`; they must be valid.
        seed: a seed of the study.

    Raises:
        DamagedResultError: if a stored result is damaged.
    """
    kept = share(tickets, level, seed, importances)
    return (
        plan_draws(tickets.planner, level, importances, seed, kept, draws) if kept is not None and kept.alive else None
    )


def share(tickets: Tickets, level: int, seed: int, importances: Sequence[str]) -> Mask | None:
    """Return the connections that the tickets of one seed share at a level; None if one of the tickets is missing."""
    found = tickets.at(level, [Chain(seed, name) for name in importances])
    return reduce(and_, (ticket.mask for ticket in found.values())) if len(found) == len(importances) else None


def plan_draws(planner: Planner, level: int, importances: Sequence[str], seed: int, kept: Mask, draws: int) -> Plan:
    """Return the trainings of the partial reinitialisations of one seed.

    Args:
        planner: the planner of the study.
        level: the last level to which tickets are found again.
        importances: the names of the importances.
        seed: a seed of the study.
        kept: the connections that keep their initial weights.
        draws: the number of reinitialisations.
    """
    numbers = range(1, draws + 1)

    def initialise(draw: int) -> Weights:
        drawn = initial_state(planner.problem.build, new_seed(seed, draw))
        return Weights.of(reinitialise(planner.initial(seed).load(), drawn, kept, planner.shared))

    fields = {"seeds": tuple(numbers), "data_seeds": (), "importances": tuple(importances), "levels": level}
    other = Planner(
        planner.study.model_copy(update=fields),
        planner.problem,
        planner.store,
        initial=initialise,
        chains=[Chain(number, name, seed) for number in numbers for name in importances],
        about={"reinit": {"level": level, "draws": draws, "importances": list(importances)}},
    )
    return Plan(seed, kept, other)


def new_seed(seed: int, draw: int) -> int:
    """Return the seed of the weights that a draw reinitialises."""
    return derive(seed, "reinitialisation", draw)


def reinitialise(initial: State, drawn: State, kept: Mask, shared: Shared = MappingProxyType({})) -> State:
    """Return the state `drawn`, but with the weights of `initial` for the connections in `kept`.

    Args:
        initial: the initial state.
        drawn: another initial state of the same network.
        kept: the connections that keep their weights.
        shared: the other names of weights that modules share, under which the states have them too.

    >>> kept = Mask.from_tensors({"w": torch.tensor([True, False])})
    >>> reinitialise({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}, kept)
    {'w': tensor([1., 4.])}
    """
    layers = {name: name for name in kept} | {other: name for name in kept for other in shared.get(name, ())}
    return {
        name: torch.where(kept[layers[name]], initial[name], tensor) if name in layers else tensor
        for name, tensor in drawn.items()
    }


def list_notes(tickets: Tickets) -> dict[tuple[int, tuple[str, ...]], int]:
    """List the partial reinitialisations of a study that its store has trainings of.

    Returns:
        (level, importances in the study's order) -> the largest number of draws; sorted by level, then by the number of
        importances, the largest first.
    """
    study = tickets.study
    found: dict[tuple[int, tuple[str, ...]], int] = {}
    for note in tickets.planner.store.results.notes("reinit").values():
        if note["level"] <= study.levels and set(note["importances"]) <= set(study.importances):
            names = tuple(name for name in study.importances if name in note["importances"])
            found[note["level"], names] = max(note["draws"], found.get((note["level"], names), 0))
    return dict(sorted(found.items(), key=lambda each: (each[0][0], -len(each[0][1]), each[0][1])))

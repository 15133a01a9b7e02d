"""Gathering: the tickets that an analysis compares, one level of a study's chains at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import polars as pl

from tombola.errors import NothingStoredError
from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain, select_chains
from tombola.study.schema import Study
from tombola.study.tickets import Tickets

ALL = "(all)"
"""The value of the column `layer` for all layers together."""

PRUNABLE = "(prunable)"
"""The value of the column `layer` for the layers together that may be pruned, where other layers are kept dense."""

IMPORTANCES, DATA_ORDER, SEEDS = "importances", "data order", "seeds"
"""The values of the column `kind`: what differs between the tickets that a row compares."""


NO_PAIRS = (
    "expected two seeds, two data orders, or two importances at a level from 1 on; run another seed, data order or "
    "importance"
)
"""What a study needs for `pairs`, as the end of a message."""


def label(chain: Chain) -> str:
    """Return the name of a chain's tickets in tables: its importance and, after `@`, its data order if that is another.

    >>> label(Chain(0, "l1")), label(Chain(0, "l1", 100))
    ('l1', 'l1@100')
    """
    return chain.importance if chain.data_seed is None else f"{chain.importance}@{chain.data_seed}"


def repeats(study: Study, importances: Sequence[str] | None) -> list[Chain]:
    """Return the chains of the study's other data orders, of these importances or of all of the study's.

    Where several importances are compared, those of the study's first are among them, which are the noise floor.
    """
    names = dict.fromkeys(study.importances if importances is None else importances)
    return [
        Chain(seed, name, order)
        for seed in study.seeds
        for name in dict.fromkeys([*study.importances[: len(names) > 1], *names])
        for order in study.data_seeds
    ]


def by_level(
    tickets: Tickets, chains: Sequence[Chain], levels: Collection[int] | None = None, optional: Sequence[Chain] = ()
) -> Iterator[tuple[int, dict[Chain, Ticket]]]:
    """Yield each level with its tickets; the masks of one level at a time are in memory.

    Args:
        tickets: of the study.
        chains: whose tickets.
        levels: only these, which each of `chains` must have; by default all levels that any of them has.
        optional: further chains, whose tickets are left out where the store does not have them.

    Raises:
        UserError: where one of `levels` is not the study's.
        NothingStoredError: where one of `levels`, or every level, is missing.
    """
    if levels is not None:
        tickets.require(levels, chains)
    for level in range(tickets.study.levels + 1) if levels is None else sorted(set(levels)):
        found = tickets.at(level, [*chains, *optional])
        if not any(chain in found for chain in chains):
            if level == 0:
                raise NothingStoredError.of_study(tickets.planner.store.root)
            return
        yield level, found


def last_level(tickets: Tickets, chains: Sequence[Chain]) -> int:
    """Return the sparsest level that all of these chains have.

    Raises:
        NothingStoredError: where they have no level in common.
    """
    last = tickets.last_level(chains)
    if last is None:
        root = tickets.planner.store.root
        if not any(tickets.progress(chain).tickets for chain in chains):
            raise NothingStoredError.of_study(root)
        raise NothingStoredError(f"level 0 is not in {root} for every seed")
    return last


def choose_levels(tickets: Tickets, chains: Sequence[Chain], levels: Collection[int] | None) -> list[int]:
    """Return these levels in order, each once; by default the sparsest that all of these chains have.

    Raises:
        UserError: where one of `levels` is not the study's.
        NothingStoredError: where one of them is missing, or the chains have no level in common.
    """
    if levels is None:
        return [last_level(tickets, chains)]
    tickets.require(levels, chains)
    return sorted(set(levels))


@dataclass(frozen=True)
class Group:
    """Tickets of one level and seed that are compared with each other.

    Args:
        level, seed: whose tickets.
        kind: what differs between them, `IMPORTANCES` or `DATA_ORDER`.
        tickets: two or more, by name (see `label`).
        complete: whether the store has all of them.
    """

    level: int
    seed: int
    kind: str
    tickets: dict[str, Ticket]
    complete: bool


def groups(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    levels: Collection[int] | None = None,
    at_least: int = 2,
) -> Iterator[Group]:
    """Yield the tickets that are compared at each level: those of each seed by importance, and by data order alone.

    Args:
        tickets: of the study.
        importances: which; by default all.
        levels: which; by default all that the store has.
        at_least: the smallest allowed number of importances.

    Raises:
        UserError: where the study does not have the importances or levels.
        NothingStoredError: where the store does not have them yet.
    """
    study = tickets.study
    chains = select_chains(study, importances, at_least)
    names = {chain.importance for chain in chains}
    others = repeats(study, importances)
    repeated = [name for name in study.importances if name in {chain.importance for chain in others}]
    own_orders = [chain for chain in tickets.planner.chains if chain not in chains and chain.importance in repeated]
    for level, found in by_level(tickets, chains, levels, [*own_orders, *others]):
        for seed in study.seeds:
            compared = {
                chain.importance: ticket
                for chain, ticket in found.items()
                if chain.seed == seed and chain.data_seed is None and chain.importance in names
            }
            if len(compared) > 1:
                yield Group(level, seed, IMPORTANCES, compared, len(compared) == len(names))
            for name in repeated:
                orders = {
                    label(chain): ticket
                    for chain, ticket in found.items()
                    if chain.seed == seed and chain.importance == name
                }
                if len(orders) > 1 and (level > 0 or name == repeated[0]):  # level 0 is the same for all importances
                    yield Group(level, seed, DATA_ORDER, orders, True)


def pairs(
    tickets: Tickets, importances: Sequence[str] | None, levels: Collection[int]
) -> Iterator[tuple[dict[str, Any], tuple[Ticket, Ticket]]]:
    """Yield each two tickets of a level that are compared, within seeds as in `groups`, and across seeds.

    Each comes with its level, its seed (None for two seeds), its kind and the names of the tickets; those of one
    importance and two seeds are named `l1, seed 0`. The dense networks of a seed are the same for all importances, so
    level 0 has only data orders and seeds.

    Args:
        tickets: of the study.
        importances: the importances to compare, one or more; None for all.
        levels: the levels, which every chain must have.

    Raises:
        UserError: where importances or levels are not the study's.
        NothingStoredError: where the store does not have them yet.
    """
    chains = select_chains(tickets.study, importances)
    names = list(dict.fromkeys(chain.importance for chain in chains))
    for group in groups(tickets, importances, levels, at_least=1):
        for pair in combinations(group.tickets, 2) if group.level or group.kind == DATA_ORDER else ():
            where = {"level": group.level, "seed": group.seed, "kind": group.kind, "tickets": list(pair)}
            yield where, (group.tickets[pair[0]], group.tickets[pair[1]])
    for level, found in by_level(tickets, chains, levels):
        for name in names if level else names[:1]:
            of_seeds = [(f"{name}, seed {chain.seed}", one) for chain, one in found.items() if chain.importance == name]
            for (first, one), (second, other) in combinations(of_seeds, 2):
                yield {"level": level, "seed": None, "kind": SEEDS, "tickets": [first, second]}, (one, other)


def after(table: pl.DataFrame, **where: object) -> pl.DataFrame:
    """Return a table with further columns in front that have the same value in every row.

    >>> after(pl.DataFrame({"b": [2]}), a=1).rows()
    [(1, 2)]
    """
    return table.select(*(pl.lit(value).alias(name) for name, value in where.items()), pl.all())

"""Gathering: the tickets that an analysis compares, out of a study's chains, one level at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from tombola.errors import UserError, did_you_mean
from tombola.lottery.ticket import Ticket
from tombola.store.store import DamagedResultError
from tombola.study.planner import Chain, MissingError, Planner

ALL = "(all)"
"""Stands in the column `layer` for all layers together."""

IMPORTANCES, DATA_ORDER, SEEDS = "importances", "data order", "seeds"
"""In the column `kind`: what differs between the tickets that a row compares."""


def label(chain: Chain) -> str:
    """Return what a ticket is called in tables: its importance, and where it has another data order, `@` that.

    >>> label(Chain(0, "l1")), label(Chain(0, "l1", 100))
    ('l1', 'l1@100')
    """
    return chain.importance if chain.data_seed is None else f"{chain.importance}@{chain.data_seed}"


def select_chains(planner: Planner, importances: Sequence[str] | None, at_least: int = 1) -> list[Chain]:
    """Return the chains of these importances of the study, or of all.

    Raises:
        UserError: for an importance that the study has not, or fewer than `at_least`.
    """
    known = planner.study.importances
    names = known if importances is None else list(dict.fromkeys(importances))
    for name in names:
        if name not in known:
            raise UserError(f"importances: the study has no importance {name!r}; {did_you_mean(name, known)}")
    if len(names) < at_least:
        raise UserError(f"importances: at least {at_least} are compared, got {', '.join(names)}")
    return [Chain(seed, name) for seed in planner.study.seeds for name in names]


def repeats(planner: Planner, importances: Sequence[str] | None) -> list[Chain]:
    """Return the chains of other data orders that the study asks for, of these importances or of all that it names."""
    names = planner.study.importances if importances is None else importances
    return [
        Chain(seed, name, order)
        for seed in planner.study.seeds
        for name in dict.fromkeys([*planner.study.importances[:1], *names])
        for order in planner.study.data_seeds
    ]


def by_level(
    planner: Planner, chains: Sequence[Chain], levels: Collection[int] | None = None, optional: Sequence[Chain] = ()
) -> Iterator[tuple[int, dict[Chain, Ticket]]]:
    """Yield each level with the tickets of it that the store has; only one level's masks are held at a time.

    Args:
        planner: follows the chains.
        chains: which.
        levels: only these, which each of `chains` must have; by default all levels that any of them has.
        optional: further chains, of which there is what there is.

    Raises:
        UserError: where one of `levels`, or any level at all, is not there.
    """
    if levels is not None:
        _check_range(planner, levels)
    last = planner.study.levels if levels is None else max(levels)
    following = {chain: planner.tickets(chain) for chain in [*chains, *optional]}
    for level in range(last + 1):
        tickets: dict[Chain, Ticket] = {}
        for chain, found in list(following.items()):
            try:
                tickets[chain] = next(found)
            except (StopIteration, MissingError):
                del following[chain]
            except DamagedResultError:
                raise
            except UserError:  # of the importance, which ends its chain
                del following[chain]
        if levels is not None and (missing := [chain for chain in chains if chain not in tickets]):
            raise _not_there(min(each for each in levels if each >= level), level, missing, planner)
        if not any(chain in tickets for chain in chains):
            if level == 0:
                raise UserError(
                    f"no result of this study is in {planner.store.root}; do its trainings with: tombola run"
                )
            return
        if levels is None or level in levels:
            yield level, tickets


def last_level(planner: Planner, chains: Sequence[Chain]) -> int:
    """Return the sparsest level that all of these chains have.

    Raises:
        UserError: where there is none.
    """
    last = -1
    for level, tickets in by_level(planner, chains):
        if len(tickets) < len(chains):
            break
        last = level
    if last < 0:
        raise UserError(f"level 0 is not there for every seed in {planner.store.root}; finish it with: tombola run")
    return last


@dataclass(frozen=True)
class Group:
    """Tickets of one level and seed that are compared with each other.

    Args:
        level, seed: whose tickets.
        kind: what differs between them, `IMPORTANCES` or `DATA_ORDER`.
        tickets: two or more, by what they are called (see `label`).
        complete: whether all that the study is to have are there.
    """

    level: int
    seed: int
    kind: str
    tickets: dict[str, Ticket]
    complete: bool


def groups(
    planner: Planner, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> Iterator[Group]:
    """Yield what is compared at each level: the tickets of each seed by importance, and those by data order alone.

    Args:
        planner: of the study.
        importances: which, two or more; by default all.
        levels: which; by default all that are there.

    Raises:
        UserError: where importances or levels are not there.
    """
    chains = select_chains(planner, importances, at_least=2)
    names = {chain.importance for chain in chains}
    others = repeats(planner, importances)
    repeated = {chain.importance for chain in others}
    own_orders = [chain for chain in planner.chains if chain not in chains and chain.importance in repeated]
    for level, tickets in by_level(planner, chains, levels, [*own_orders, *others]):
        for seed in planner.study.seeds:
            compared = {
                chain.importance: ticket
                for chain, ticket in tickets.items()
                if chain.seed == seed and chain.data_seed is None and chain.importance in names
            }
            if len(compared) > 1:
                yield Group(level, seed, IMPORTANCES, compared, len(compared) == len(names))
            for name in planner.study.importances:
                orders = {
                    label(chain): ticket
                    for chain, ticket in tickets.items()
                    if chain.seed == seed and chain.importance == name
                }
                first = name == planner.study.importances[0]  # whose level 0 is that of all
                if name in repeated and len(orders) > 1 and (level > 0 or first):
                    yield Group(level, seed, DATA_ORDER, orders, True)


def after(table: pl.DataFrame, **where: object) -> pl.DataFrame:
    """Return the table after columns that are the same in every row.

    >>> after(pl.DataFrame({"b": [2]}), a=1).rows()
    [(1, 2)]
    """
    return table.select(*(pl.lit(value).alias(name) for name, value in where.items()), pl.all())


def _check_range(planner: Planner, levels: Collection[int]) -> None:
    for level in levels:
        if not 0 <= level <= planner.study.levels:
            raise UserError(f"level {level} is not one of the study's, which are 0 to {planner.study.levels}")


def _not_there(level: int, had: int, missing: Sequence[Chain], planner: Planner) -> UserError:
    there = f"levels 0 to {had - 1} are" if had > 1 else "level 0 is" if had else "none is"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return UserError(
        f"level {level} is not in {planner.store.root} yet for {missing[0]}{more}; "
        f"{there} there for all that is compared"
    )

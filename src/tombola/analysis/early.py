"""Early masks: how early in training is it known which connections survive?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from tombola.analysis import overlap
from tombola.analysis.gather import ALL, PRUNABLE
from tombola.analysis.values import over_seeds
from tombola.errors import NothingStoredError, UserError
from tombola.study.chains import Chain, select_chains
from tombola.study.early import Snapshots, list_snapshots, plan_snapshots, prune_at_once
from tombola.study.tickets import Tickets, check_level
from tombola.training.weights import Weights

KNOWN = 0.9
"""The share of the mask at the end from which on it counts as known."""


def of_study(tickets: Tickets, importances: Sequence[str] | None = None, level: int | None = None) -> pl.DataFrame:
    """Return the table of `of_snapshots` for all intermediate iterations of a study that its store has.

    Args:
        tickets: the tickets of the study.
        importances, level: as for `of_snapshots`.

    Raises:
        NothingStoredError: if the store has none.
        DamagedResultError: if a stored result is damaged.
    """
    iterations = list_snapshots(tickets)
    if not iterations:
        raise NothingStoredError(f"no networks of intermediate iterations are in {tickets.planner.store.root}")
    return of_snapshots(plan_snapshots(tickets, iterations), importances, level)


def find_level(tickets: Tickets, chains: Sequence[Chain], level: int | None = None) -> int:
    """Return the level of the tickets, by default the last that all chains have, once all of them are stored.

    Raises:
        UserError: if the level is not one of the study from 1 on.
        NothingStoredError: if the store does not have the tickets.
    """
    if level is None:
        level = tickets.last_level(chains) or 1
    check_level(tickets.study, level)
    if level < 1:
        raise UserError("early masks: expected tickets of a level from 1 on; level 0 is the dense network")
    tickets.require([level], chains)
    return level


def of_snapshots(
    snapshots: Snapshots, importances: Sequence[str] | None = None, level: int | None = None
) -> pl.DataFrame:
    """Return how much of the mask at the end of training, and of the ticket, is known at each iteration.

    At each iteration the dense network is pruned in one round to the density of the tickets of a level. One row for
    each importance, seed and iteration, from the rewind point to the end of training, with the columns

    - importance, seed, level, iteration. connections, alive: of the layers that may be pruned, and of the mask in them.
    - distance: the share of these connections in which the mask differs from that at the end (normalised Hamming
      distance, as for early-bird tickets, arXiv 1909.11957), in 0..1.
    - known: the share of the connections of the mask that are in the mask at the end. chance: that of a random mask
      with the same number of connections in each layer.
    - ticket: the share of the connections of the ticket that are in the mask. ticket_chance: the same of a random mask.

    Args:
        snapshots: of `tombola.study.early.plan_snapshots`; iterations that are not trained yet are left out.
        importances: the importances; by default all.
        level: the level of the tickets, from 1 on; by default the last that all have.

    Raises:
        UserError: if an argument is invalid.
        NothingStoredError: if the store does not have the tickets.
        DamagedResultError: if a stored result is damaged.
    """
    tickets, planner = snapshots.tickets, snapshots.tickets.planner
    chains = select_chains(tickets.study, importances)
    level = find_level(tickets, chains, level)
    own = Tickets(snapshots.planner)
    lines: list[dict[str, Any]] = []
    for chain in chains:
        first = tickets.progress(Chain(chain.seed, tickets.study.importances[0])).tickets[0]
        ticket = tickets.progress(chain).tickets[level].mask.load()
        assert first.trained is not None
        states: dict[int, Weights] = {tickets.study.recipe.rewind: first.rewind}
        for (seed, iteration), each in snapshots.chains.items():
            found = own.progress(each).tickets if seed == chain.seed else ()
            if found and found[0].trained is not None:
                states[iteration] = found[0].trained.weights
        states[planner.end] = first.trained.weights
        masks = {
            iteration: prune_at_once(planner, weights, first.rewind, chain.importance, ticket.density, chain.order_seed)
            for iteration, weights in sorted(states.items())
        }
        last = masks[planner.end]
        for iteration, mask in masks.items():
            known, chance, line = _compare({"mask": mask, "end": last}, planner.kept_dense)
            of_ticket, ticket_chance, _ = _compare({"mask": ticket, "end": mask}, planner.kept_dense)
            where = {"importance": chain.importance, "seed": chain.seed, "level": level, "iteration": iteration}
            figures = {"distance": (mask ^ last).alive / line["connections"], "known": known, "chance": chance}
            lines.append(
                where
                | {name: line[name] for name in ("connections", "alive")}
                | figures
                | {"ticket": of_ticket, "ticket_chance": ticket_chance}
            )
    kinds: dict[str, Any] = {"importance": pl.String, "connections": pl.Int64}
    kinds |= dict.fromkeys(("seed", "level", "iteration"), pl.Int64)
    return pl.DataFrame(lines, {name: kinds.get(name, pl.Float64) for name in lines[0]})


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_snapshots`, with the 95 % interval of `known`.

    Args:
        table: of `of_snapshots`.
    """
    others = ["distance", "chance", "ticket", "ticket_chance"]
    return over_seeds(table, ["level", "importance", "iteration"], "known", others, (0.0, 1.0))


def describe(means: pl.DataFrame) -> list[str]:
    """Return for each importance a sentence on the iteration from which on the mask is known.

    Args:
        means: of `summarise`.

    >>> table = pl.DataFrame({"importance": ["l1"] * 3, "iteration": [0, 5, 20], "known": [0.8, 0.95, 1.0],
    ...                       "ticket": [0.6, 0.8, 0.85]})
    >>> describe(table)
    ['l1: from iteration 5 of 20 on, 90 % of the mask at the end is known; that mask has 85.00 % of the ticket.']
    """
    sentences = []
    for (name,), lines in means.sort("iteration").group_by("importance", maintain_order=True):
        rows = lines.select("iteration", "known", "ticket").rows()
        last, _, ticket = rows[-1]
        known = last
        for iteration, share, _ in reversed(rows):
            if share < KNOWN:
                break
            known = iteration
        sentences.append(
            f"{name}: from iteration {known} of {last} on, {100 * KNOWN:.0f} % of the mask at the end is known; that "
            f"mask has {100 * ticket:.2f} % of the ticket."
        )
    return sentences


def _compare(masks: dict[str, Any], kept_dense: frozenset[str]) -> tuple[float, float, dict[str, Any]]:
    """Return which share of the first mask is in the second, by chance too, over the layers that may be pruned."""
    table = overlap.relative_to_ticket(overlap.of_masks(masks, kept_dense))
    line = table.filter(pl.col("layer") == (PRUNABLE if kept_dense else ALL)).row(0, named=True)
    return line["shared_of_ticket"], line["layers_expected"], line

"""Controls: what a ticket loses if one thing about it is changed; and tickets combined, or trained elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from tombola.analysis.values import mean_or_none, over_seeds, value_at, value_at_density
from tombola.errors import NothingStoredError
from tombola.study.chains import Chain, select_chains
from tombola.study.controls import (
    Part,
    Plan,
    list_combinations,
    list_controls,
    list_transfers,
    plan_combinations,
    plan_controls,
)
from tombola.study.tickets import Tickets
from tombola.training.metrics import Measure


def of_study(tickets: Tickets) -> pl.DataFrame:
    """Return the table of `of_controls` for all controls of a study that its store has.

    Args:
        tickets: the tickets of the study.

    Raises:
        NothingStoredError: if the store has none.
        DamagedResultError: if a stored result is damaged.
    """
    tables = []
    for (level, names), (kinds, draws) in list_controls(tickets).items():
        if _has(tickets, level, names):
            tables.append(of_controls(plan_controls(tickets, level, kinds, draws, names)))
    found = [table for table in tables if len(table)]
    if not found:
        raise NothingStoredError(f"no controls are in {tickets.planner.store.root}")
    return pl.concat(found).unique(["level", "kind", "importance", "seed"], keep="first", maintain_order=True)


def of_controls(plan: Plan) -> pl.DataFrame:
    """Return what each control loses against the ticket, or what else tickets are judged by than accuracy.

    One row for each kind of control, importance and seed of which a training is stored, with the columns

    - level, kind, importance, seed. draws: the number of stored draws.
    - density: that of the control's mask, alive / connections; it is the ticket's.
    - dense, ticket, value: the accuracy of the dense network, of the ticket, and of the control, the mean over draws.
      Null if a training diverged.
    - lost: how much worse the control is than the ticket, ticket - value; where lower is better, value - ticket.

    The control `other-seed` is compared with the ticket of the seed whose weights it has: only the mask differs.

    Args:
        plan: of `tombola.study.controls.plan_controls`; what is not trained yet is left out.

    Raises:
        DamagedResultError: if a stored result is damaged.
    """
    own, measure = Tickets(plan.planner), plan.tickets.planner.problem.measure
    groups: dict[tuple[str, str, int], list[Part]] = {}
    for part in plan.parts:
        if own.progress(part.chain).tickets:
            groups.setdefault((part.kind, part.importance, part.seed), []).append(part)
    lines = []
    for (kind, importance, seed), parts in groups.items():
        chain = Chain(seed, importance)
        value = mean_or_none([value_at(own, part.chain) for part in parts])
        ticket = value_at(plan.tickets, chain, plan.level)
        where = {"level": plan.level, "kind": kind, "importance": importance, "seed": seed, "draws": len(parts)}
        figures = {
            "density": own.progress(parts[0].chain).tickets[0].mask.density,
            "dense": value_at(plan.tickets, chain),
            "ticket": ticket,
            "value": value,
            "lost": _gain(measure, ticket, value),
        }
        lines.append(where | figures)
    return _to_frame(
        lines, ("level", "kind", "importance", "seed", "draws", "density", "dense", "ticket", "value", "lost")
    )


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_controls`, with the 95 % interval of what is lost.

    Args:
        table: of `of_controls`, or a part of it.
    """
    return over_seeds(table, ["level", "kind", "importance"], "lost", ["density", "dense", "ticket", "value"])


def combinations_of_study(tickets: Tickets) -> pl.DataFrame:
    """Return the table of `of_combinations` for all combinations of a study that its store has.

    Args:
        tickets: the tickets of the study.

    Raises:
        NothingStoredError: if the store has none.
        DamagedResultError: if a stored result is damaged.
    """
    tables = []
    for level, over, names in list_combinations(tickets):
        if _has(tickets, level, names):
            tables.append(of_combinations(plan_combinations(tickets, level, over, names)))
    found = [table for table in tables if len(table)]
    if not found:
        raise NothingStoredError(f"no combinations are in {tickets.planner.store.root}")
    return pl.concat(found)


def of_combinations(plan: Plan) -> pl.DataFrame:
    """Return how unions and intersections of tickets do, compared with these tickets and with others as sparse.

    One row for each stored training, with the columns

    - level, kind ("union" or "intersection"), tickets: the names of the combined ones. seed: that of the weights.
    - density: alive / connections of the combination.
    - ticket: the mean accuracy (or what else tickets are judged by) of the combined tickets. value: that of the
      combination; null if it diverged.
    - same_density: the accuracy of a ticket of the same seed as dense as the combination, between two levels (linear in
      log density), the mean over the combined importances; null if no levels enclose it.
    - difference: value - same_density; where lower is better, same_density - value. Above 0, the combination is better
      than a ticket of its density.

    Args:
        plan: of `tombola.study.controls.plan_combinations`; what is not trained yet is left out.

    Raises:
        DamagedResultError: if a stored result is damaged.
    """
    own, measure = Tickets(plan.planner), plan.tickets.planner.problem.measure
    lines = []
    for part in plan.parts:
        if not (found := own.progress(part.chain).tickets):
            continue
        density, value = found[0].mask.density, value_at(own, part.chain)
        importances = dict.fromkeys(chain.importance for chain in part.tickets)
        chains = [Chain(part.seed, name) for name in importances]
        alike = mean_or_none([value_at_density(plan.tickets, chain, density) for chain in chains])
        lines.append(
            {
                "level": plan.level,
                "kind": part.kind,
                "tickets": [
                    f"{c.importance}, seed {c.seed}" if part.importance else c.importance for c in part.tickets
                ],
                "seed": part.seed,
                "density": density,
                "ticket": mean_or_none([value_at(plan.tickets, chain, plan.level) for chain in part.tickets]),
                "value": value,
                "same_density": alike,
                "difference": _gain(measure, value, alike),
            }
        )
    columns = ("level", "kind", "tickets", "seed", "density", "ticket", "value", "same_density", "difference")
    return _to_frame(lines, columns)


def summarise_combinations(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_combinations`, with the 95 % interval of the difference.

    Args:
        table: of `of_combinations`, or a part of it.
    """
    by = ["level", "kind", "tickets"]
    figures = [pl.col(name).mean() for name in ("density", "ticket", "value")]
    means = table.group_by(by, maintain_order=True).agg(pl.col("value").count().cast(pl.Int64).alias("seeds"), *figures)
    compared = over_seeds(table, by, "difference", ["same_density"]).drop("seeds")
    return means.join(compared, on=by, how="left", maintain_order="left")


def transfers_of_study(tickets: Tickets) -> pl.DataFrame:
    """Return the table of `of_transfers` for all transfers to a study that its store has.

    Trainings of earlier versions, whose records do not say where their masks come from, are left out.

    Args:
        tickets: the tickets of the study.

    Raises:
        NothingStoredError: if the store has none.
        DamagedResultError: if a stored result is damaged.
    """
    found = [table for table in map(of_transfers, list_transfers(tickets)) if len(table)]
    if not found:
        raise NothingStoredError(f"no transfers are in {tickets.planner.store.root}")
    where = ["source", "level", "importance", "seed"]
    return (
        pl.concat(found).unique(where, keep="first", maintain_order=True).sort("level", "source", maintain_order=True)
    )


def of_transfers(plan: Plan) -> pl.DataFrame:
    """Return how masks of another study do in the networks of a study.

    One row for each importance and seed whose trainings are stored, with the columns

    - source: how the study of the mask differs from this one, such as `recipe.lr = 0.01`. level: that of the mask in
      its study. importance, seed. density: alive / connections.
    - dense: the accuracy (or what else tickets are judged by) of the study's dense network.
    - own: that of the study's own ticket of this importance at the same density, between two levels; null if the study
      does not have it.
    - value, shuffled: that of the mask, and of the same mask shuffled within layers, which is chance.
    - gained: how much better the mask is than the shuffled one, value - shuffled. difference: value - own. Both have
      the other sign where lower is better.

    Args:
        plan: of `tombola.study.controls.plan_transfers`; what is not trained yet is left out.

    Raises:
        DamagedResultError: if a stored result is damaged.
    """
    own, tickets = Tickets(plan.planner), plan.tickets
    measure = tickets.planner.problem.measure
    lines = []
    for part, other in zip(plan.parts[::2], plan.parts[1::2], strict=True):
        found = own.progress(part.chain).tickets
        if not found or not own.progress(other.chain).tickets:
            continue
        density, value, shuffled = found[0].mask.density, value_at(own, part.chain), value_at(own, other.chain)
        alike = value_at_density(tickets, Chain(part.seed, part.importance), density)
        lines.append(
            {
                "source": plan.source,
                "level": plan.level,
                "importance": part.importance,
                "seed": part.seed,
                "density": density,
                "dense": value_at(tickets, Chain(part.seed, tickets.study.importances[0])),
                "own": alike,
                "value": value,
                "shuffled": shuffled,
                "gained": _gain(measure, value, shuffled),
                "difference": _gain(measure, value, alike),
            }
        )
    numbers = ("density", "dense", "own", "value", "shuffled", "gained", "difference")
    return _to_frame(lines, ("source", "level", "importance", "seed", *numbers))


def summarise_transfers(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_transfers`, with the 95 % interval of what is gained.

    Args:
        table: of `of_transfers`, or a part of it.
    """
    others = ["density", "dense", "own", "value", "shuffled", "difference"]
    return over_seeds(table, ["source", "level", "importance"], "gained", others)


def _has(tickets: Tickets, level: int, importances: Sequence[str]) -> bool:
    """Return whether all chains of some importances have a level."""
    return level <= (tickets.last_level(select_chains(tickets.study, importances)) or 0)


def _gain(measure: Measure, value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else measure.gain(value, other)


def _to_frame(lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> pl.DataFrame:
    """Return lines as a table; what is neither a name nor a whole number is a float, if only nulls are there."""
    kinds: dict[str, Any] = dict.fromkeys(("kind", "importance", "source"), pl.String)
    kinds["tickets"] = pl.List(pl.String)
    kinds |= dict.fromkeys(("level", "seed", "draws"), pl.Int64)
    return pl.DataFrame(lines, {name: kinds.get(name, pl.Float64) for name in columns})

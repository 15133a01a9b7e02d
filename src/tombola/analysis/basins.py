"""Basins: up to which level is a ticket's solution connected to the next one's, and to the dense network?

A round of pruning and rewinding finds a matching ticket if it stays in the basin of the level before, says a finding of
Paul et al. (arXiv 2210.03044). This compares that level with the one at which the accuracy begins to fall.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import polars as pl

from tombola.analysis.accuracy import rows
from tombola.analysis.connectivity import Lines
from tombola.analysis.defaults import MARGIN, POINTS, TOLERANCE
from tombola.analysis.gather import repeats
from tombola.analysis.values import over_seeds
from tombola.analysis.winners import by_level
from tombola.errors import NothingStoredError, UserError
from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain, select_chains
from tombola.study.tickets import Tickets
from tombola.threads import map_in_threads


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, points: int = POINTS, tolerance: float = TOLERANCE
) -> pl.DataFrame:
    """Return for each ticket the barriers to the next level and to the dense network.

    One row for each importance, seed and level, with the columns

    - importance, seed, level. density: alive / connections.
    - next: the barrier between the trained ticket and that of the next level, see
      `tombola.analysis.connectivity.along_line`; null for the last stored level. dense: that between the dense network
      and the ticket; null at level 0. other_order: that between the ticket and the ticket of another data order, which
      is how far noise alone carries; null where the store has none, the mean if it has several. The two share their
      initialisation alone: their orders differ from iteration 0 on, before a later rewind point too, whereas those of
      `tombola.analysis.rewind_point` share the iterations before it.
    - connected: whether `next` is at most the tolerance; null where it is.

    The statistics of batch norm are computed again at every point, as for `tombola.analysis.connectivity`. Networks
    without batch norm are evaluated as they are: REPAIR (arXiv 2211.08403) would rescale their activations.

    Args:
        tickets: the tickets of the study.
        importances: the importances; by default all.
        points: the number of points on each line, including both ends.
        tolerance: the largest barrier of networks that count as connected, in 0..1.

    Raises:
        UserError: if an importance is not in the study, if an argument is out of range, or if labels are no classes.
        NothingStoredError: if the store has no level 1 of them.
        DamagedResultError: if a stored result is damaged.
    """
    if not 0 <= tolerance <= 1:
        raise UserError(f"tolerance: expected a share of the test set, in 0 to 1, got {tolerance}")
    chains = select_chains(tickets.study, importances)
    if not any(len(tickets.progress(chain).tickets) > 1 for chain in chains):
        raise NothingStoredError(f"no level from 1 on is in {tickets.planner.store.root}")
    between = Lines(tickets.planner, points)
    others = repeats(tickets.study, importances)

    def compare(chain: Chain) -> list[dict[str, Any]]:
        own = [ticket for ticket in tickets.progress(chain).tickets if _is_trained(ticket)]
        orders = [other for other in others if (other.seed, other.importance) == (chain.seed, chain.importance)]
        lines = []
        for level, ticket in enumerate(own):
            following = _barrier(ticket, own[level + 1], between) if level + 1 < len(own) else None
            noise = [_barrier(ticket, other, between) for other in _at(tickets, orders, level)]
            lines.append(
                {
                    "importance": chain.importance,
                    "seed": chain.seed,
                    "level": level,
                    "density": ticket.mask.density,
                    "next": following,
                    "dense": _barrier(own[0], ticket, between) if level else None,
                    "other_order": sum(noise) / len(noise) if noise else None,
                    "connected": None if following is None else following <= tolerance,
                }
            )
        return lines

    # A thread computes a whole chain, because neighbouring levels of a chain need the same line.
    lines = list(itertools.chain.from_iterable(map_in_threads(compare, chains)))
    kinds: dict[str, Any] = {"importance": pl.String, "seed": pl.Int64, "level": pl.Int64, "connected": pl.Boolean}
    return pl.DataFrame(lines, {name: kinds.get(name, pl.Float64) for name in lines[0]})


def summarise(
    table: pl.DataFrame, tickets: Tickets, tolerance: float = TOLERANCE, margin: float = MARGIN
) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_study`, with two verdicts for each level.

    The columns, after importance and level: seeds, density, dense, other_order and next (means), low and high (the 95 %
    interval of the mean of `next` over seeds), connected (whether the mean of `next` is at most the tolerance), and
    keeps (whether the ticket keeps the accuracy, or what else tickets are judged by, see
    `tombola.analysis.winners.by_level`).

    Args:
        table: of `of_study`.
        tickets: the tickets of the study.
        tolerance: the largest barrier of networks that count as connected.
        margin: by how much a ticket may be worse than the dense network.
    """
    by = ["importance", "level"]
    means = over_seeds(table, by, "next", [], (0.0, 1.0))
    whole = table.group_by(by, maintain_order=True).agg(pl.col("density", "dense", "other_order").mean())
    names = set(table["importance"])
    kept = by_level([row for row in rows(tickets) if row.importance in names], margin=margin).select(*by, "keeps")
    found = whole.join(means, on=by, how="left", maintain_order="left").join(
        kept, on=by, how="left", maintain_order="left"
    )
    return found.with_columns(connected=pl.col("next") <= tolerance)


def describe(means: pl.DataFrame) -> list[str]:
    """Return for each importance a sentence that compares the two verdicts.

    Args:
        means: of `summarise`.

    >>> table = pl.DataFrame({"importance": ["l1"] * 4, "level": [0, 1, 2, 3], "connected": [True, True, False, None],
    ...                       "keeps": [True, True, True, False]})
    >>> describe(table)
    ['l1: levels 0 to 2 are connected, each to the next; levels 0 to 2 keep the accuracy: the two agree.']
    """
    sentences = []
    for (name,), lines in means.group_by("importance", maintain_order=True):
        connected = _run(lines["connected"].to_list())
        keeps = _run(lines["keeps"].to_list()) - 1
        differ = connected - keeps
        verdict = "the two agree"
        if differ:
            first = "the accuracy falls first" if differ > 0 else "the connection is lost first"
            verdict = f"{first}, by {abs(differ)} level{'s' if abs(differ) > 1 else ''}"
        what = f"levels 0 to {connected} are connected, each to the next" if connected else "no level is connected"
        kept = f"levels 0 to {keeps} keep" if keeps > 0 else "level 0 alone keeps"
        sentences.append(f"{name}: {what}; {kept} the accuracy: {verdict}.")
    return sentences


def _run(answers: Sequence[bool | None]) -> int:
    """Return how many answers are True, up to the first that is not."""
    return next((number for number, answer in enumerate(answers) if not answer), len(answers))


def _barrier(first: Ticket, second: Ticket, between: Lines) -> float:
    return float(between(first, second)["barrier"][0])


def _at(tickets: Tickets, chains: Sequence[Chain], level: int) -> list[Ticket]:
    found = [tickets.progress(chain).tickets[level : level + 1] for chain in chains]
    return [ticket for each in found for ticket in each if _is_trained(ticket)]


def _is_trained(ticket: Ticket) -> bool:
    return ticket.trained is not None and ticket.trained.history.diverged_at is None

"""Values: the metric by which tickets are judged, of one ticket or between two; means over seeds, and quantiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tombola.analysis.winners import UNBOUNDED, Bounds, mean_with_interval
from tombola.study.chains import Chain
from tombola.study.tickets import Tickets


def value_at(tickets: Tickets, chain: Chain, place: int = 0) -> float | None:
    """Return the value of a ticket, such as its accuracy; None if its training diverged or is missing.

    Args:
        tickets: the tickets of a study, or single trainings.
        chain: the chain.
        place: the place of the ticket in its chain: its level, or 0 for a single training.
    """
    found = tickets.measure(chain)
    trained = found[place].trained if place < len(found) else None
    return None if trained is None else trained.history.value(tickets.planner.problem.measure)


def value_at_density(tickets: Tickets, chain: Chain, density: float) -> float | None:
    """Return the value of a chain's tickets at a density, linear in log density between two levels.

    Args:
        tickets: the tickets of a study.
        chain: the chain.
        density: the density, in 0..1.

    Returns:
        The value; None if the chain has no tickets on both sides, or if the nearest of one side diverged.
    """
    known = [(ticket.mask.density, value_at(tickets, chain, ticket.level)) for ticket in tickets.measure(chain)]
    points = sorted((math.log(each), math.nan if value is None else value) for each, value in known if each > 0)
    if not points or density <= 0 or not points[0][0] <= math.log(density) <= points[-1][0]:
        return None
    found = float(np.interp(math.log(density), [each for each, _ in points], [value for _, value in points]))
    return None if math.isnan(found) else found


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean of values; None if there are none, or if one of them is None.

    >>> mean_or_none([1.0, 2.0]), mean_or_none([1.0, None]), mean_or_none([])
    (1.5, None, None)
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def over_seeds(
    table: pl.DataFrame, by: Sequence[str], column: str, others: Sequence[str], within: Bounds = UNBOUNDED
) -> pl.DataFrame:
    """Return the means over seeds of a table with one row for each seed.

    The columns are those of `by`; seeds, the number of rows in which `column` is not null; the means of `others` and
    of `column`, and low and high, its 95 % interval by Student's t (null for fewer than two seeds).

    Args:
        table: the table.
        by: the columns that say what a row is about.
        column: the column whose interval is wanted.
        others: further columns, whose means are over the rows in which `column` is not null.
        within: the smallest and the largest possible mean of `column`, which the interval does not leave.

    >>> table = pl.DataFrame({"kind": ["a", "a", "b"], "lost": [0.1, 0.1, None], "value": [1.0, 2.0, 3.0]})
    >>> over_seeds(table, ["kind"], "lost", ["value"]).rows()
    [('a', 2, 1.5, 0.1, 0.1, 0.1), ('b', 0, None, None, None, None)]
    """
    there = pl.col(column).is_not_null()
    means = table.group_by(by, maintain_order=True).agg(
        pl.col(column).count().cast(pl.Int64).alias("seeds"),
        *(pl.col(other).filter(there).mean() for other in others),
    )
    found = intervals(table, by, {column: within}).select(pl.exclude(by))
    return means.hstack(found).rename({f"{column}_{bound}": bound for bound in ("low", "high")})


def intervals(table: pl.DataFrame, by: Sequence[str], columns: Mapping[str, Bounds]) -> pl.DataFrame:
    """Return the means over seeds of some columns, each with its 95 % interval, of a table with one row for each seed.

    The columns are those of `by`, in the order in which their values first occur; then for each of `columns`, such as
    `kl`: kl, its mean over the rows in which it is not null, and kl_low and kl_high, the interval of this mean by
    Student's t (null for fewer than two of these rows).

    Args:
        table: the table.
        by: the columns that say what a row is about.
        columns: the columns of numbers, each with the smallest and the largest possible mean, which its interval does
            not leave.

    >>> table = pl.DataFrame({"kind": ["a", "a", "b"], "kl": [0.1, 0.1, None]})
    >>> intervals(table, ["kind"], {"kl": (0.0, math.inf)}).rows()
    [('a', 0.1, 0.1, 0.1), ('b', None, None, None)]
    """
    lines = table.group_by(by, maintain_order=True).agg(pl.col(*columns).drop_nulls())
    found = [lines.select(by)]
    for name, within in columns.items():
        rows = [mean_with_interval(each, within) if len(each) else (None, None, None) for each in lines[name].to_list()]
        schema = dict.fromkeys((name, f"{name}_low", f"{name}_high"), pl.Float64)
        found.append(pl.DataFrame(rows, schema, orient="row"))
    return pl.concat(found, how="horizontal")


def quantile_of_sorted(ordered: npt.NDArray[Any], q: float) -> float:
    """Return a quantile of sorted numbers with the bits of `numpy.quantile`, which would sort them again.

    >>> quantile_of_sorted(np.array([1.0, 2.0, 4.0]), 0.75)
    3.0
    """
    if math.isnan(ordered[-1]):  # where sorting puts it
        return math.nan
    place = q * (len(ordered) - 1)
    part, below = math.modf(place)
    low, high = float(ordered[int(below)]), float(ordered[math.ceil(place)])
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)

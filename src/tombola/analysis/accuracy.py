"""Accuracy, or another metric that tickets are judged by: of every ticket, and in a table like the paper's Table 2."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import polars as pl

from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain
from tombola.study.tickets import Tickets
from tombola.training.metrics import TEST_ACCURACY, Measure


@dataclass(frozen=True)
class Row:
    """One ticket's result.

    Args:
        importance, seed, level: which ticket.
        density: alive / all connections, in 0..1.
        value: of what tickets are judged by, at the end of training, such as the test accuracy in 0..1; None where it
            diverged, or where the value is not finite.
        alive: connections alive.
        test_loss: at the end of training; None where it diverged.
        diverged: whether the training diverged.
        collapsed: the layers with no connection alive.
        train_loss: mean over the last epoch; None where it diverged.
        measure: what tickets are judged by.
        others: all other metrics by the names of their columns, such as `test_f1`.
    """

    importance: str
    seed: int
    level: int
    density: float
    value: float | None
    alive: int
    test_loss: float | None
    diverged: bool
    collapsed: tuple[str, ...] = ()
    train_loss: float | None = None
    measure: Measure = TEST_ACCURACY
    others: Mapping[str, float | None] = field(default_factory=dict, hash=False)

    @property
    def test_accuracy(self) -> float | None:
        """The accuracy on the test set; None where the training diverged, or if it is not among the metrics."""
        accuracy = TEST_ACCURACY.column
        return self.value if self.measure.column == accuracy else self.others.get(accuracy)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON's types, with a column for each metric, such as `test_accuracy`."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("measure", "others")}
        document = {self.measure.column if name == "value" else name: value for name, value in own.items()}
        return document | {"collapsed": list(self.collapsed)} | dict(self.others)


def rows(tickets: Tickets, chains: Sequence[Chain] | None = None) -> list[Row]:
    """Return the results that the store has, by importance, seed and level.

    Args:
        tickets: of the study.
        chains: whose results; by default those of the study, without its other data orders.

    Raises:
        tombola.errors.DamagedResultError: where a stored result is damaged.
    """
    order = tickets.study.importances
    return [
        row_of(chain, ticket, tickets.planner.problem.measures)
        for chain in sorted(
            tickets.planner.chains if chains is None else chains, key=lambda chain: order.index(chain.importance)
        )
        for ticket in tickets.measure(chain)
    ]


def to_frame(results: Sequence[Row]) -> pl.DataFrame:
    """Return results as a table with the columns of `Row.to_json`; `collapsed` is a list of names.

    >>> to_frame([Row("l1", 0, 1, 0.8, None, 8, None, True)]).columns[:4]
    ['importance', 'seed', 'level', 'density']
    """
    metrics = [name for row in results[:1] for name in (row.measure.column, *row.others)]
    schema: dict[str, Any] = dict.fromkeys(("density", "test_loss", "train_loss", *metrics), pl.Float64)
    schema |= dict.fromkeys(("seed", "level", "alive"), pl.Int64) | {"collapsed": pl.List(pl.String)}
    return pl.DataFrame([row.to_json() for row in results], schema_overrides=schema)


def row_of(chain: Chain, ticket: Ticket, measures: Sequence[Measure] = (TEST_ACCURACY,)) -> Row:
    """Return the result of a chain's ticket, which has been trained, with these metrics; the first decides."""
    assert ticket.trained is not None
    history = ticket.trained.history
    return Row(
        chain.importance,
        chain.seed,
        ticket.level,
        ticket.mask.density,
        history.value(measures[0]),
        ticket.mask.alive,
        history.test_loss,
        history.diverged_at is not None,
        ticket.mask.collapsed,
        history.losses[-1] if history.losses and history.diverged_at is None else None,
        measures[0],
        {measure.column: history.value(measure) for measure in measures[1:]},
    )


def of_test_accuracy(results: Sequence[Row]) -> list[Row]:
    """Return results with the accuracy on the test set as their value, whatever tickets are judged by."""
    return [replace(row, value=row.test_accuracy, measure=TEST_ACCURACY) for row in results]


def summarise(results: Sequence[Row]) -> pl.DataFrame:
    """Return the value of each importance and level over seeds, in the order of the results.

    Columns: importance, level, density (mean), value (mean, of what tickets are judged by), std (n - 1; null for fewer
    than two seeds), seeds (the number of values) and diverged (the number of trainings that diverged, which have no
    value). The value is null where all diverged.

    >>> summarise([Row("l1", seed, 1, 0.8, 0.9, 8, 0.1, False) for seed in (0, 1)]).row(0)
    ('l1', 1, 0.8, 0.9, 0.0, 2, 0)
    """
    schema = {"importance": pl.String, "level": pl.Int64, "density": pl.Float64, "value": pl.Float64}
    frame = pl.DataFrame(
        [(row.importance, row.level, row.density, row.value, row.diverged) for row in results],
        schema | {"diverged": pl.Boolean},
        orient="row",
    )
    return frame.group_by("importance", "level", maintain_order=True).agg(
        pl.col("density").mean(),
        pl.col("value").mean(),
        std=pl.col("value").std(),
        seeds=pl.col("value").count().cast(pl.Int64),
        diverged=pl.col("diverged").sum().cast(pl.Int64),
    )


@dataclass(frozen=True)
class Cell:
    """One cell of Table 2: the values of an importance at a level, over the seeds.

    Args:
        values: of the seeds whose trainings are stored and did not diverge.
        diverged: the number of seeds whose training diverged.
        collapsed: the layers that collapsed in any of them.
    """

    values: tuple[float, ...] = ()
    diverged: int = 0
    collapsed: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """The mean value, such as an accuracy in 0..1."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Table2:
    """The paper's Table 2: accuracy, or what else tickets are judged by, by level (down) and importance (across).

    Args:
        importances: the columns.
        levels: the rows, each with its density.
        cells: by (level, importance).
        measure: what tickets are judged by.
    """

    importances: tuple[str, ...]
    levels: tuple[tuple[int, float], ...]
    cells: dict[tuple[int, str], Cell]
    measure: Measure = TEST_ACCURACY

    def best(self, level: int) -> set[str]:
        """Return those of the most seeds that have the best mean at a level; none where all are equal."""
        known = {name: cell for name in self.importances if (cell := self.cells[level, name]).values}
        most = max((len(cell.values) for cell in known.values()), default=0)
        means = {name: statistics.fmean(cell.values) for name, cell in known.items() if len(cell.values) == most}
        extreme = max if self.measure.higher_is_better else min
        best = {name for name, mean in means.items() if mean == extreme(means.values())}
        return best if len(best) < len(known) else set()

    @property
    def collapses(self) -> dict[str, dict[str, int]]:
        """By importance, the layers that lose all connections in some seed -> the first level at which they have."""
        found: dict[str, dict[str, int]] = {}
        for (level, importance), cell in sorted(self.cells.items()):
            for layer in cell.collapsed:
                found.setdefault(importance, {}).setdefault(layer, level)
        return {importance: found[importance] for importance in self.importances if importance in found}


def table2(results: Sequence[Row], importances: Sequence[str]) -> Table2:
    """Return the table of these results: mean and standard deviation over seeds.

    >>> row = Row("l1", 0, 1, 0.8, 0.9, 8, 0.1, False, ())
    >>> table2([row], ["l1"]).cells[1, "l1"].mean
    0.9
    """
    densities = {row.level: row.density for row in results}
    cells = {}
    for level in densities:
        for importance in importances:
            at = [row for row in results if (row.level, row.importance) == (level, importance)]
            cells[level, importance] = Cell(
                tuple(row.value for row in at if row.value is not None),
                sum(row.diverged for row in at),
                tuple(sorted({layer for row in at for layer in row.collapsed})),
            )
    measure = results[0].measure if results else TEST_ACCURACY
    return Table2(tuple(importances), tuple(sorted(densities.items())), cells, measure)

"""Winners: the sparsest tickets that keep the accuracy (or metric) of the dense network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

import polars as pl
from scipy import special

from tombola.analysis.accuracy import Row, rows
from tombola.analysis.defaults import MARGIN
from tombola.errors import NothingStoredError, UserError, kind_of
from tombola.study.chains import select_chains
from tombola.study.tickets import Tickets
from tombola.training.metrics import TEST_ACCURACY, Measure

FLATTERS = (
    "The data has no validation set, so winners are chosen on the test set, which makes them look better than they are "
    "on new data; task.validation = 0.1 holds back a tenth of the training examples to choose on."
)
"""What is said where winners are chosen without a validation set."""


def schema(measure: Measure = TEST_ACCURACY) -> dict[str, Any]:
    """Return the columns of `by_level` for what tickets are judged by."""
    return {
        "importance": pl.String,
        "level": pl.Int64,
        "density": pl.Float64,
        "seeds": pl.Int64,
        f"dense_{measure.name}": pl.Float64,
        measure.name: pl.Float64,
        "difference": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "keeps": pl.Boolean,
        "surely": pl.Boolean,
    }


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, *, margin: float = MARGIN, surely: bool = False
) -> pl.DataFrame:
    """Return the winning ticket of each importance: the sparsest level that keeps the dense network's accuracy.

    Tickets are judged by the first metric of the task, on the validation set if there is one, else on the test set.

    One row for each importance, with the columns of `by_level`. A level must be stored for all
    of the study's seeds.

    Args:
        tickets: of the study.
        importances: which; by default all.
        margin: by how much a ticket may be worse, see `by_level`.
        surely: whether the whole interval of the difference must lie within the margin, not only its mean.

    Raises:
        UserError: where the study does not have the importances, or `surely` is asked of a single seed.
        NothingStoredError: where there are no results to compare.
    """
    names = list(dict.fromkeys(chain.importance for chain in select_chains(tickets.study, importances)))
    seeds = len(tickets.study.seeds)
    if surely and seeds < 2:
        raise UserError("surely: an interval needs two seeds or more, and the study has one; run another seed")
    found = by_level([row for row in rows(tickets) if row.importance in names], margin=margin)
    found = found.filter(pl.col("seeds") == seeds)
    if not len(found):
        raise NothingStoredError(f"level 0 is not in {tickets.planner.store.root} for every seed")
    return select_winners(found, surely=surely)


def select_winners(levels: pl.DataFrame, *, surely: bool = False) -> pl.DataFrame:
    """Return the rows of the table of `by_level` with the highest level of each importance that keeps the accuracy."""
    kept = levels.filter("surely" if surely else "keeps")
    return kept.filter(pl.col("level") == pl.col("level").max().over("importance"))


def by_level(results: Sequence[Row], *, margin: float = MARGIN) -> pl.DataFrame:
    """Return how the accuracy, or what else tickets are judged by, compares with the dense network's at each level.

    One row for each importance and level, with the columns

    - importance, level. density: the mean over seeds. seeds: how many have this level and level 0.
    - dense_accuracy, accuracy: the mean over these seeds, in 0..1; null where a training diverged. For another metric
      the columns have its name, such as dense_r2 and r2.
    - difference: accuracy - dense_accuracy, in -1..1. low, high: its 95 % interval, the mean of the seeds' differences
      -+ t s / sqrt(n), with t of Student's distribution (Biometrika 6, 1908) for n - 1 degrees of freedom; null for
      fewer than two seeds.
    - keeps: whether difference >= -margin. surely: whether low >= -margin; null where there is no interval. Where lower
      is better, keeps is difference <= margin, and surely is high <= margin.

    Args:
        results: of any importances, seeds and levels, level 0 among them.
        margin: by how much a ticket may be worse, in 0..1: for accuracies and other shares on their own scale, for all
            other metrics as a share of the dense network's |value|.

    Raises:
        UserError: where the margin is not in 0..1.

    >>> results = [Row("l1", seed, level, 0.8**level, 0.89 - 0.01 * level, 1, 0.1, False, ())
    ...            for seed in (0, 1) for level in (0, 1)]
    >>> by_level(results, margin=0.005).select("level", "accuracy", "keeps").row(1)
    (1, 0.88, False)
    >>> by_level(results[1:], margin=0.005)["seeds"].to_list()  # the dense network of seed 0 is not there
    [1, 1]
    """
    if not isinstance(margin, int | float) or not 0 <= margin <= 1:
        raise UserError(f"margin: expected a share of the test set, in 0 to 1, got {kind_of(margin)}")
    measure = results[0].measure if results else TEST_ACCURACY
    dense = {(row.importance, row.seed): row.value for row in results if row.level == 0}
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in results:
        if (row.importance, row.seed) in dense:
            groups.setdefault((row.importance, row.level), []).append(row)
    lines = []
    for (importance, level), group in groups.items():
        before = [dense[importance, row.seed] for row in group]
        after = [row.value for row in group]
        pairs = [(a, b) for a, b in zip(after, before, strict=True) if a is not None and b is not None]
        line = [importance, level, statistics.fmean(row.density for row in group), len(group)]
        whole = len(pairs) == len(group)
        lines.append(line + (_compare(pairs, margin, measure) if whole else [*[None] * 5, False, None]))
    return pl.DataFrame(lines, schema(measure), orient="row")


def _compare(pairs: Sequence[tuple[float, float]], margin: float, measure: Measure) -> list[float | bool | None]:
    """Return dense value, value, difference, low, high, keeps and surely of (value, dense value) pairs."""
    value, dense = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    mean, low, high = mean_with_interval([after - before for after, before in pairs])
    allowed = margin if measure.percent else margin * abs(dense)
    least = -allowed - 1e-9 * max(1.0, allowed)  # shares are whole numbers of examples; their differences are rounded
    worst = low if measure.higher_is_better else high
    surely = None if worst is None else measure.gain(worst, 0.0) >= least
    return [dense, value, mean, low, high, measure.gain(mean, 0.0) >= least, surely]


Bounds: TypeAlias = tuple[float, float]
"""The smallest and the largest possible value."""

UNBOUNDED: Bounds = (-math.inf, math.inf)


def mean_with_interval(values: Sequence[float], within: Bounds = UNBOUNDED) -> tuple[float, float | None, float | None]:
    """Return the mean of independent values and its 95 % interval by Student's t.

    The interval is None for fewer than two values, or if one of them is not finite.

    Args:
        values: the values.
        within: the smallest and the largest possible mean, which the interval does not leave.

    >>> mean_with_interval([1.0, 1.0]), mean_with_interval([0.5])
    ((1.0, 1.0, 1.0), (0.5, None, None))
    >>> mean_with_interval([0.1, 0.9], within=(0.0, 1.0))
    (0.5, 0.0, 1.0)
    >>> mean_with_interval([1.0, math.nan])
    (nan, None, None)
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return sum(values) / len(values), None, None
    mean = statistics.fmean(values)
    half = float(special.stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, max(within[0], mean - half), min(within[1], mean + half)

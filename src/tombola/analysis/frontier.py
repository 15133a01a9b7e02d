"""Frontier: what a search for a ticket has tried, and how sure it is of what it has found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import polars as pl
from scipy import special

from tombola.analysis.accuracy import row_of
from tombola.analysis.winners import by_level, mean_with_interval
from tombola.engine.search import Walk
from tombola.lottery.search import Candidate
from tombola.lottery.ticket import Ticket
from tombola.study import searches
from tombola.study.chains import Chain
from tombola.study.tickets import Tickets


def of_walk(walk: Walk) -> pl.DataFrame:
    """Return the tickets that a search has tried, in its order.

    One row for each ticket, with the columns

    - importance. path: the levels at which it was trained on the way, as text. level: its own. density: in 0..1; null
      if it was not reached.
    - work: the work of the search until the ticket was known, in complete trainings, whether or not the store had them;
      masks that are learned count, see `tombola.study.planner.Planner.learning_length`.
    - dense_accuracy, accuracy: of the first trial, which decides where the search goes; null where a training diverged.
      For another metric the columns have its name.
    - difference: accuracy - dense_accuracy.
    - judges: the number of seeds that have judged the ticket; mean, low, high: the mean of their differences and its
      95 % interval by Student's t; null without judges, and the interval for one.
    - keeps: whether it keeps the metric as far as is known. found: whether it is what the search has found.
    - why: why there is no value; empty if there is one.
    """
    measure = walk.trials[-1][0].problem.measure
    names = [f"dense_{measure.name}", measure.name]
    lines = []
    for tried in walk.tried:
        if tried.trial:
            continue
        pairs = [(each.value, each.dense) for each in walk.tried if each.trial and each.candidate == tried.candidate]
        whole = [value - dense for value, dense in pairs if value is not None]
        judged = mean_with_interval(whole) if whole and len(whole) == len(pairs) else (None, None, None)
        path = " ".join(map(str, tried.candidate.path))
        difference = None if tried.value is None else tried.value - tried.dense
        where = [tried.candidate.importance, path, tried.candidate.level, tried.density, tried.work]
        values = [tried.dense, tried.value, difference, len(pairs), *judged]
        states = [walk.known.keeps(tried.candidate), tried.candidate == walk.end.found, tried.why]
        lines.append([*where, *values, *states])
    numbers = dict.fromkeys([*names, "difference"], pl.Float64)
    schema: dict[str, Any] = {"importance": pl.String, "path": pl.String, "level": pl.Int64, "density": pl.Float64}
    schema |= {"work": pl.Float64, **numbers, "judges": pl.Int64}
    schema |= dict.fromkeys(("mean", "low", "high"), pl.Float64)
    schema |= {"keeps": pl.Boolean, "found": pl.Boolean, "why": pl.String}
    return pl.DataFrame(lines, schema, orient="row")


def verdict(walk: Walk, margin: float) -> dict[str, Any]:
    """Return how sure a search is of the ticket that it has found.

    The seeds that have judged the ticket are compared with the dense networks of the same seeds. The ticket is the
    sparsest that they have not refuted, so that their mean flatters it a little. If there are none, this is the seed of
    the search, which flatters it more.

    Args:
        walk: a search that has found a ticket.
        margin: by how much a ticket may be worse.

    Returns:
        The columns of `tombola.analysis.winners.by_level` for the ticket, and

        - path: the levels at which it is trained, and judges: the seeds that have judged it.
        - outside: the chance that a further seed is outside the margin, in 0..1, by Student's predictive distribution
          (mean + t s sqrt(1 + 1/n)); None for fewer than two judges. For shares, s is at least 1 / examples.
        - outside_most: the limit which that chance does not exceed, with a confidence of 95 %, see `most_outside`.
        - test and dense_test: the metric of the ticket and of the dense network on the test set, the mean over the same
          seeds; None if it is not finite.
        - work, done: the work of the search, and of those of its trainings that the store did not have, in complete
          trainings.
    """
    found = walk.end.found
    assert found is not None
    trials = [trial for trial in sorted(walk.known.gains[found]) if trial] or [0]
    read = [(walk.trials[trial][1], *read_tickets(walk, found, trial)) for trial in trials]
    problem = walk.trials[-1][0].problem
    rows = [
        row_of(Chain(seed, found.importance), ticket, problem.measures) for seed, *tickets in read for ticket in tickets
    ]
    line = by_level(rows, margin=margin).filter(level=found.level).row(0, named=True)
    test = problem.metrics[0].on("test")
    tested = [
        [ticket.trained.history.value(test) if ticket.trained else None for ticket in tickets] for _, *tickets in read
    ]
    gains = [walk.known.gains[found][trial] for trial in trials]
    choice = sum(map(walk.known.judged, walk.known.gains))
    step = 1 / problem.data.count(problem.measure.split) if problem.measure.percent else 0.0
    return line | {
        "path": list(found.path),
        "judges": [seed for seed, *_ in read] if trials != [0] else [],
        "outside": chance_outside(gains, margin, step),
        "outside_most": most_outside(gains, margin, step, choice),
        "test": _mean([each[1] for each in tested]),
        "dense_test": _mean([each[0] for each in tested]),
        "work": walk.work,
        "done": walk.done,
    }


def chance_outside(gains: Sequence[float], margin: float, step: float = 0.0) -> float | None:
    """Return the chance that a further gain is below -margin, by Student's predictive distribution; None for few.

    Args:
        gains: the gains of the judging seeds.
        margin: the margin.
        step: the step of the metric, such as 1 / examples for a share. The standard deviation is at least that: gains
            are rounded to steps, so that a smaller one may be due to the rounding.

    >>> chance_outside([0.0, 0.01, -0.01], 0.0), chance_outside([0.5, 0.5], 0.0), chance_outside([0.5], 0.0)
    (0.5, 0.0, None)
    >>> chance_outside([0.5, 0.5], -0.5)
    0.0
    """
    if len(gains) < 2 or not all(map(math.isfinite, gains)):
        return None
    mean, spread = statistics.fmean(gains), max(statistics.stdev(gains), step) * math.sqrt(1 + 1 / len(gains))
    if spread == 0:
        return float(mean < -margin)
    return float(special.stdtr(len(gains) - 1, (-margin - mean) / spread))


def most_outside(gains: Sequence[float], margin: float, step: float = 0.0, choice: int = 1) -> float | None:
    """Return the upper confidence limit of the chance that a further gain is below -margin; None for few gains.

    For normal gains, t = sqrt(n) (mean + margin) / s has a noncentral t distribution with a noncentrality d, and the
    chance is Phi(-d / sqrt(n)). The limit is that of the d for which the t observed, or a larger one, has a probability
    of 5 %; a t above 30 counts as 30, which makes the limit too high. If all gains are equal and no step is known, it
    is that of n successes in a row, 1 - 0.05^(1/n).

    Args:
        gains: the gains of the judging seeds.
        margin: the margin.
        step: the step of the metric, see `chance_outside`.
        choice: the number of tickets among which the judges have chosen; the 5 % are divided among them (Bonferroni).

    >>> [round(most_outside(each, 0.0), 2) for each in ([0.01, 0.02, 0.03], [0.01, 0.02, 0.03, 0.02], [0.01] * 3)]
    [0.45, 0.27, 0.63]
    >>> [round(most_outside(each, 0.0, step=0.01), 2) for each in ([0.03, 0.03, 0.03], [0.03, 0.03, 0.04])]
    [0.33, 0.29]
    """
    if len(gains) < 2 or not all(map(math.isfinite, gains)):
        return None
    mean, spread, count = statistics.fmean(gains), max(statistics.stdev(gains), step), len(gains)
    error = 0.05 / max(1, choice)
    if spread == 0:
        return 1 - error ** (1 / count) if mean >= -margin else 1.0
    seen = max(-30.0, min(30.0, math.sqrt(count) * (mean + margin) / spread))  # for larger ones, scipy does not end
    return float(special.ndtr(-special.nctdtrinc(count - 1, 1 - error, seen) / math.sqrt(count)))


def read_tickets(walk: Walk, candidate: Candidate, trial: int) -> tuple[Ticket, Ticket]:
    """Return the dense network and a ticket of a search in one of its trials, with all metrics."""
    planner, seed = walk.trials[trial]
    dense, *_, ticket = searches.read_tickets(Tickets(planner), candidate, seed)
    return dense, ticket


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None

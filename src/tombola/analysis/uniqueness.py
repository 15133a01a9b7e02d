"""Uniqueness: what stored controls and rewind points add to the paper's claim that tickets are unique."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tombola.analysis import controls, rewind_point
from tombola.analysis.winners import mean_with_interval
from tombola.errors import NothingStoredError
from tombola.study.tickets import Tickets
from tombola.training.metrics import Measure

_WORDS = {
    "new-order": "another data order",
    "signs": "new magnitudes",
    "new-weights": "new weights",
    "other-seed": "the mask of another seed",
    "shuffled": "a shuffled mask",
    "random": "a shuffled mask with new weights",
}


def describe(tickets: Tickets, importances: Sequence[str] | None = None) -> list[str]:
    """Return sentences on controls and rewind points of a study, as far as its store has them.

    Args:
        tickets: the tickets of the study.
        importances: the importances whose controls count; by default all.

    Raises:
        DamagedResultError: if a stored result is damaged.
    """
    sentences = []
    try:
        table = controls.of_study(tickets)
    except NothingStoredError:
        pass
    else:
        names = tickets.study.importances if importances is None else importances
        own = table.filter(pl.col("importance").is_in(list(names)))
        sentences += describe_controls(own, tickets.planner.problem.measure)
    try:
        points = rewind_point.summarise(rewind_point.of_study(tickets))
    except NothingStoredError:
        return sentences
    return sentences + describe_points(points, tickets.study.recipe.rewind)


def describe_controls(table: pl.DataFrame, measure: Measure) -> list[str]:
    """Return for each level a sentence on what a ticket loses if one thing about it is changed, over all importances.

    Args:
        table: of `tombola.analysis.controls.of_controls`.
        measure: what tickets are judged by.

    >>> table = pl.DataFrame({"level": [1, 1], "kind": ["signs"] * 2, "seed": [0, 1], "lost": [0.01, 0.01]})
    >>> describe_controls(table, Measure())
    ['At level 1, a ticket loses with new magnitudes +1.00 (95 % +1.00 to +1.00) points.']
    """
    sentences = []
    for (level,), rows in table.drop_nulls("lost").sort("level").group_by("level", maintain_order=True):
        parts = []
        for kind, words in _WORDS.items():
            by_seed = (
                rows.filter(pl.col("kind") == kind).group_by("seed", maintain_order=True).agg(pl.col("lost").mean())
            )
            if not len(by_seed):
                continue
            mean, low, high = mean_with_interval(by_seed["lost"].to_list())
            text = f"with {words} {measure.figure(mean, sign=True)}"
            if low is not None and high is not None:
                text += f" (95 % {measure.figure(low, sign=True)} to {measure.figure(high, sign=True)})"
            parts.append(text)
        unit = " points" if measure.percent else ""
        sentences.append(f"At level {level}, a ticket loses {', '.join(parts)}{unit}.")
    return sentences


def describe_points(means: pl.DataFrame, rewind: int) -> list[str]:
    """Return a sentence on the iteration from which on two data orders are connected, and on the noise floor of masks.

    Args:
        means: of `tombola.analysis.rewind_point.summarise`.
        rewind: the rewind point of the study.
    """
    sentences = []
    for level, earliest in rewind_point.find_earliest(means).items():
        what = "the dense network" if level == 0 else f"tickets of level {level}"
        there = (
            "from none of the iterations that were tried on" if earliest is None else f"from iteration {earliest} on"
        )
        sentences.append(f"Two data orders of {what} are connected {there}; the study rewinds to {rewind}.")
    masks = means.drop_nulls("jaccard").sort("iteration").select("iteration", "jaccard", "chance").rows()
    if len(masks) > 1:
        (first, before, _), (last, after, chance) = masks[0], masks[-1]
        sentences.append(
            f"Masks of two data orders overlap by {100 * before:.2f} % if they share {first} iterations, and by "
            f"{100 * after:.2f} % if they share {last}; random masks by {100 * chance:.2f} %."
        )
    return sentences

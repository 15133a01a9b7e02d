"""The rewind point: from which iteration on do two data orders stay connected, and how alike are their tickets?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from tombola.analysis import overlap
from tombola.analysis.connectivity import along_line, build_measure
from tombola.analysis.defaults import POINTS, TOLERANCE
from tombola.analysis.gather import ALL, PRUNABLE
from tombola.analysis.values import over_seeds
from tombola.errors import NothingStoredError
from tombola.study.chains import Chain
from tombola.study.early import prune_at_once
from tombola.study.rewind_point import Point, list_rewind_points, plan_rewind_points
from tombola.study.tickets import Tickets
from tombola.training.weights import Weights


def of_study(tickets: Tickets, measure_points: int = POINTS) -> pl.DataFrame:
    """Return the table of `of_points` for all rewind points of a study that its store has.

    Args:
        tickets: the tickets of the study.
        measure_points: the number of points on each line, including both ends.

    Raises:
        NothingStoredError: if the store has none.
        DamagedResultError: if a stored result is damaged.
    """
    tables = [
        of_points(plan_rewind_points(tickets, tried, level, name), measure_points)
        for tried, level, name in list_rewind_points(tickets)
    ]
    found = [table for table in tables if len(table)]
    if not found:
        raise NothingStoredError(f"no rewind points are in {tickets.planner.store.root}")
    return pl.concat(found).unique(["iteration", "level", "importance", "seed"], keep="first", maintain_order=True)


def of_points(points: Sequence[Point], measure_points: int = POINTS) -> pl.DataFrame:
    """Return the barrier between two data orders that share the first iterations.

    One row for each iteration, level and seed whose trainings are stored, with the columns

    - iteration: the k that both share. level: 0 for the dense network. importance: of the ticket; of level 0, too.
    - seed. density: alive / connections.
    - first, second: the test errors of the networks of the two data orders, in 0..1. barrier: the highest error on the
      line between them, above the line between the errors at its ends, see `tombola.analysis.connectivity.along_line`.
    - jaccard, chance: of the dense network, the overlap of the masks that one round prunes the two to, at the density
      of the study's last level, over the layers that may be pruned, and that of random masks with the same number of
      connections in each layer. This is the noise floor of a mask. Null for tickets, which share their mask,
      and for a study that has level 0 alone.

    Args:
        points: of `tombola.study.rewind_point.plan_rewind_points`; what is not trained yet is left out.
        measure_points: the number of points on each line, including both ends.

    Raises:
        UserError: if labels are no classes.
        DamagedResultError: if a stored result is damaged.
    """
    lines: list[dict[str, Any]] = []
    for point in points:
        measure = build_measure(point.planner)
        planner, places = point.plan_orders()
        others = Tickets(planner)
        for (seed, level), chain in places.items():
            (own,) = [each for each in point.chains if each.seed == seed]
            found = others.progress(chain).tickets
            first = point.tickets.progress(own).tickets[level]
            pair = [each.trained for each in (first, *found)]
            if len(pair) < 2 or any(each is None or each.history.diverged_at is not None for each in pair):
                continue
            weights = [each.weights for each in pair if each]
            masks = (None, None) if level or point.density == 1 else _compare_masks(point, own, weights)
            table = along_line(first.load_trained(), found[0].load_trained(), measure, measure_points)
            lines.append(
                {
                    "iteration": point.iteration,
                    "level": level,
                    "importance": own.importance,
                    "seed": seed,
                    "density": first.mask.density,
                    "first": float(table["error"][0]),
                    "second": float(table["error"][-1]),
                    "barrier": float(table["barrier"][0]),
                    "jaccard": masks[0],
                    "chance": masks[1],
                }
            )
    kinds: dict[str, Any] = {"iteration": pl.Int64, "level": pl.Int64, "importance": pl.String, "seed": pl.Int64}
    kinds |= dict.fromkeys(("density", "first", "second", "barrier", "jaccard", "chance"), pl.Float64)
    return pl.DataFrame(lines, kinds)


def summarise(table: pl.DataFrame, tolerance: float = TOLERANCE) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_points`.

    The columns, after level, importance and iteration: seeds; density, first, second, jaccard, chance and barrier
    (means); low and high (the 95 % interval of the mean barrier over seeds); connected: whether that mean is at
    most the tolerance.

    Args:
        table: of `of_points`.
        tolerance: the largest barrier of networks that count as connected, in 0..1.
    """
    by = ["level", "importance", "iteration"]
    others = ["density", "first", "second", "jaccard", "chance"]
    means = over_seeds(table.sort("level", "iteration", "seed"), by, "barrier", others, (0.0, 1.0))
    return means.with_columns(connected=pl.col("barrier") <= tolerance)


def _compare_masks(point: Point, chain: Chain, weights: Sequence[Weights]) -> tuple[float, float]:
    """Return the Jaccard index of the masks that one round prunes two dense networks to, and that of random masks."""
    planner, rewind = point.planner, point.tickets.progress(chain).tickets[0].rewind
    masks = {
        str(number): prune_at_once(planner, each, rewind, chain.importance, point.density, chain.order_seed)
        for number, each in enumerate(weights)
    }
    kept = planner.kept_dense
    line = overlap.of_masks(masks, kept).filter(layer=PRUNABLE if kept else ALL).row(0, named=True)
    return line["jaccard"], line["layers_jaccard"]


def find_earliest(means: pl.DataFrame) -> dict[int, int | None]:
    """Return for each level the earliest iteration from which on all are connected; None if the last is not.

    Args:
        means: of `summarise`.

    >>> means = {"level": [0] * 4, "iteration": [0, 5, 9, 20], "connected": [True, False, True, True]}
    >>> find_earliest(pl.DataFrame(means))
    {0: 9}
    """
    found: dict[int, int | None] = {}
    for (level,), lines in means.sort("level", "iteration").group_by("level", maintain_order=True):
        earliest = None
        for iteration, connected in reversed(lines.select("iteration", "connected").rows()):
            if not connected:
                break
            earliest = iteration
        found[int(str(level))] = earliest
    return found


def advise(means: pl.DataFrame) -> list[str]:
    """Return a sentence for each level that says from where on two data orders are connected, and what to write.

    Args:
        means: of `summarise`.
    """
    sentences = []
    earliest = find_earliest(means)
    last = means["iteration"].to_list()[-1] if len(means) else 0
    for level, iteration in earliest.items():
        what = "the dense network" if level == 0 else f"tickets of level {level}"
        if iteration is None:
            sentences.append(
                f"two data orders of {what} are not connected from iteration {last} on, the last that was tried"
            )
        else:
            sentences.append(f"two data orders of {what} are connected from iteration {iteration} on")
    decides = earliest.get(max(earliest)) if earliest else None
    if decides is not None:
        sentences.append(f"write into the study: recipe.rewind = {decides}")
    return sentences

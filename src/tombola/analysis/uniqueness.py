"""Uniqueness: up to what are tickets unique? What further analyses add to the paper's claim.

Up to the order of hidden units (`matching`), up to the noise of a training (`rewind_point`), up to a basin of the loss
(`basins`), and up to what of a ticket does not matter (`controls`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import polars as pl

from tombola.analysis import basins, controls, matching, rewind_point
from tombola.analysis.defaults import MARGIN, POINTS, TOLERANCE
from tombola.analysis.gather import DATA_ORDER, IMPORTANCES, SEEDS
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
    "random": "a shuffled mask and new weights",
}

_KINDS = {IMPORTANCES: "importances", DATA_ORDER: "data orders", SEEDS: "seeds"}

ASKED = ("matching", "basins", "rewind-point")
"""Analyses that take time even where all trainings are stored, and are computed only if they are asked for."""

PARTS = ("matching", "rewind-point", "basins", "controls")
"""The analyses that say up to what tickets are unique, in the order of their sentences."""


def collect(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    asked: Collection[str] = (),
    level: int | None = None,
    tolerance: float = TOLERANCE,
    margin: float = MARGIN,
    points: int = POINTS,
) -> dict[str, pl.DataFrame]:
    """Return the table of the stored controls of a study, and those of what is asked for besides.

    Rewind points are left out if none are stored.

    Args:
        tickets: the tickets of the study.
        importances: the importances whose tickets count; by default all.
        asked: which of `ASKED` are computed, too.
        level: the level whose tickets are matched; by default the last that all have.
        tolerance: the largest barrier of networks that count as connected, in 0..1.
        margin: by how much a ticket may be worse than the dense network and keep the accuracy, in 0..1.
        points: the number of points on each line between two networks, including both ends.

    Raises:
        UserError: if what is asked for cannot be computed.
        DamagedResultError: if a stored result is damaged.
    """
    names = list(tickets.study.importances if importances is None else importances)
    tables: dict[str, pl.DataFrame] = {}
    with suppress(NothingStoredError):
        own = controls.of_study(tickets).filter(pl.col("importance").is_in(names))
        tables |= {"controls": own} if len(own) else {}
    if "rewind-point" in asked:
        with suppress(NothingStoredError):
            barriers = rewind_point.of_study(tickets, points)
            tables["rewind-point"] = rewind_point.summarise(barriers, tolerance)
    if "matching" in asked:
        tables["matching"] = matching.of_study(tickets, importances, None if level is None else [level])
    if "basins" in asked:
        barriers = basins.of_study(tickets, importances, points, tolerance)
        tables["basins"] = basins.summarise(barriers, tickets, tolerance, margin)
    return tables


def describe(tables: Mapping[str, pl.DataFrame], measure: Measure, rewind: int) -> list[str]:
    """Return sentences that say what the tables add to the claim that tickets are unique.

    Args:
        tables: by the names of `PARTS`, those of `tombola.analysis.matching`, of `tombola.analysis.rewind_point` and of
            `tombola.analysis.basins` (the means of both), and of `tombola.analysis.controls`; those that are missing
            are passed over.
        measure: what tickets are judged by.
        rewind: the rewind point of the study.
    """
    sentences = []
    if "matching" in tables:
        sentences += describe_matching(tables["matching"])
    if "rewind-point" in tables:
        sentences += describe_points(tables["rewind-point"], rewind)
    if "basins" in tables:
        sentences += basins.describe(tables["basins"])
    if "controls" in tables:
        sentences += describe_controls(tables["controls"], measure)
    return sentences


def describe_matching(table: pl.DataFrame) -> list[str]:
    """Return for each level sentences on whether tickets are the same up to the order of their hidden units.

    They are compared with the range of random tickets, whose units are matched in the same way, see
    `tombola.analysis.matching.summarise`. Within a seed, the order of units explains nothing if matching raises the
    overlap by no more than that of random tickets.

    Args:
        table: of `tombola.analysis.matching.of_study`.

    >>> columns = {"level": [4], "kind": ["seeds"], "by": ["weights"], "layer": ["(all)"], "jaccard": [0.1],
    ...            "layers_jaccard": [0.1], "matched_jaccard": [0.12], "chance_jaccard": [0.11], "chance_sd": [0.01],
    ...            "draws": [3], "moved": [0.9], "tickets": [["l1, seed 0", "l1, seed 1"]]}
    >>> for part in describe_matching(pl.DataFrame(columns))[0].split(": "):
    ...     print(part)
    Tickets of two seeds overlap at level 4 by 10.00 %, and by 12.00 % with their units matched by weights
    no more than random tickets (11.00 %, 95 % 6.03 to 15.97), so the order of units does not make them alike.
    """
    sentences = []
    for row in matching.summarise(table, "level", "by", "kind").to_dicts():
        raw, matched, chance = (100 * row[name] for name in ("jaccard", "matched_jaccard", "chance_jaccard"))
        if row["chance_high"] is None:
            verdict = f"random tickets {chance:.2f} %, of one draw, which does not say how much they vary"
        else:
            low, high = 100 * row["chance_low"], 100 * row["chance_high"]
            random = f"random tickets ({chance:.2f} %, 95 % {low:.2f} to {high:.2f})"
            verdict = f"no more than {random}, so the order of units does not make them alike"
            if matched > high:
                verdict = f"{matched - chance:.2f} points more than {random}"
                raised_by_chance = max(0.0, chance - 100 * row["layers_jaccard"])
                if row["kind"] != SEEDS and matched - raw <= raised_by_chance:
                    verdict += "; the order of units does not explain in what they differ"
        sentences.append(
            f"Tickets of two {_KINDS[row['kind']]} overlap at level {row['level']} by {raw:.2f} %, and by "
            f"{matched:.2f} % with their units matched by {row['by']}: {verdict}."
        )
    return sentences


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

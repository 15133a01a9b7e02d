"""Findings: the main results of a study, each as a number with a short text that states only what the number shows."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import polars as pl

from tombola.analysis.winners import FLATTERS
from tombola.engine.machine import count_kinds, describe_kinds
from tombola.errors import list_first
from tombola.reporting import tables
from tombola.reporting.contents import Contents
from tombola.reporting.tables import NOISE, TWO
from tombola.training.metrics import TEST_ACCURACY, Measure


@dataclass(frozen=True)
class Finding:
    """One result.

    Args:
        title: the subject.
        figure: the number.
        text: one or more sentences that explain the number.
    """

    title: str
    figure: str
    text: str


def findings(contents: Contents) -> list[Finding]:
    """Return the findings, the most important first, without those that cannot be computed yet."""
    if not contents.results:
        return [verification(contents)]
    found = [dense(contents), *overlaps(contents), collapse(contents), machines(contents), verification(contents)]
    return [finding for finding in found if finding is not None]


def dense(contents: Contents) -> Finding | None:
    """Return the accuracy of the dense network, its standard deviation over seeds and its standard error.

    If tickets are judged by another metric, it is that metric, without the standard error.
    """
    values, measure = list(dense_values(contents).values()), contents.measure
    if not values:
        return None
    mean, examples = statistics.fmean(values), contents.about_data[measure.split]
    text = f"{measure.split.capitalize()} {measure.label} of the dense network, before any pruning, "
    text += _of_seeds(len(values))
    if len(values) > 1:
        text += f", standard deviation {measure.spread(statistics.stdev(values))}{_unit(measure)}"
    if measure.name == "accuracy":
        text += f". The standard error of one such accuracy is {100 * standard_error(mean, examples):.2f} points, for "
        text += f"{examples} {measure.split} examples"
    return Finding("Dense network", measure.text(mean), f"{text}.")


def standard_error(accuracy: float, examples: int) -> float:
    """Return the standard error of an accuracy p on n examples, both in 0..1: sqrt(p (1 - p) / n).

    >>> round(standard_error(0.9, 900), 4)
    0.01
    """
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def dense_values(contents: Contents) -> dict[int, float]:
    """Return the accuracy (or metric) of the dense network of each seed, without those that diverged."""
    return {row.seed: row.value for row in contents.results if row.level == 0 and row.value is not None}


def _unit(measure: Measure) -> str:
    """Return the unit of a difference."""
    return " points" if measure.percent else ""


@dataclass(frozen=True)
class Keeps:
    """The sparsest ticket of each importance that keeps the accuracy.

    Args:
        meaning: what "keeps the accuracy" means.
        findings: one for each importance of the study, in its order, with its name as title.
        table: the same in numbers.
    """

    meaning: str
    findings: tuple[Finding, ...]
    table: pl.DataFrame


def keeps(contents: Contents) -> Keeps | None:
    """Return the sparsest ticket of each importance that keeps the accuracy; None if nothing can be compared."""
    winners = contents.tables.get("winners")
    if winners is None:
        return None
    seeds, measure = len(contents.study.seeds), contents.measure
    margin = f"{100 * contents.margin:g} {'points' if measure.percent else '% of its absolute value'}"
    side = "below" if measure.higher_is_better else "above"
    meaning = (
        f"A ticket keeps the {measure.label} if its mean {measure.label} is at most {margin} {side} the dense network's"
        ". The table shows the sparsest such level among those that are stored for every seed. Some denser levels may "
        f"not keep the {measure.label}. "
    )
    if measure.split == "test":
        meaning += f"{FLATTERS} "

    if seeds > 1:
        meaning += f"Intervals are 95 % intervals of the mean difference over {seeds} seeds (Student's t)."
    else:
        meaning += "From one seed no interval can be given, so a difference may be due to chance."
    by_name = {row["importance"]: row for row in winners.to_dicts()}
    there = [name for name in contents.study.importances if name in by_name]
    found = tuple(_describe_kept(contents, name, by_name.get(name)) for name in contents.study.importances)
    table = pl.DataFrame([by_name[name] for name in there], winners.schema).select(
        "importance",
        "level",
        (100 * pl.col("density")).alias("alive %"),
        (100 * (1 - pl.col("density"))).alias("sparsity %"),
        (measure.scale * pl.col(measure.name)).alias(measure.heading),
        (measure.scale * pl.col("difference")).alias("difference, points" if measure.percent else "difference"),
        *[(measure.scale * pl.col(end)).alias(name) for end, name in _INTERVAL.items() if seeds > 1],
    )
    return Keeps(meaning, found, table)


_INTERVAL = {"low": "95 % from", "high": "95 % to"}


def _describe_kept(contents: Contents, name: str, row: dict[str, Any] | None) -> Finding:
    """Return the finding on one importance, from its row in the table of `tombola.analysis.winners`."""
    measure = contents.measure
    if row is None:
        return Finding(
            name,
            "–",
            f"Nothing can be compared: the {measure.label} of the dense network is not stored for every seed.",
        )
    last = max(each.level for each in contents.results if each.importance == name)
    level, share = row["level"], row["density"]
    if level == 0:
        return Finding(name, "none", f"No ticket of {name} up to level {last} keeps the {measure.label}.")
    text = (
        f"{name} keeps the {measure.label} at level {level} with {_percent(100 * share)} of the connections "
        f"({1 / share:,.1f} times fewer): {measure.text(row[measure.name])}, and "
        f"{measure.text(row[f'dense_{measure.name}'])} for the dense network. The difference is "
        f"{_points(row['difference'], measure)}{_unit(measure)}"
    )
    if row["low"] is not None and row["high"] - row["low"] < 1e-9 * max(1.0, abs(row["low"])):
        text += ", the same for every seed, so no interval can be given"
    elif row["low"] is not None:
        within = "fully within the margin" if row["surely"] else "partly outside the margin"
        text += f" (95 % interval {_points(row['low'], measure)} to {_points(row['high'], measure)}, {within})"
    text += ". No sparser ticket is stored." if level == last else "."
    return Finding(name, f"{_percent(100 * share)} alive", text)


def _points(difference: float, measure: Measure = TEST_ACCURACY) -> str:
    """Return a difference of accuracies in percentage points, or of another metric, with its sign.

    >>> _points(-0.0022), _points(0.0), _points(-1e-9)
    ('−0.22', '0.00', '0.00')
    """
    text = measure.figure(abs(difference))
    return text if float(text) == 0 else f"{'−' if difference < 0 else '+'}{text}"


def overlaps(contents: Contents) -> list[Finding]:
    """Return the overlap of tickets at the level that the report shows, with chance and the noise floor."""
    overlap, level = contents.tables.get("overlap"), contents.level
    if overlap is None or level is None:
        return []
    k = len(contents.study.importances)
    rows = tables.overlap(overlap, k).filter((pl.col("level") == level) & pl.col("shared %").is_not_null())
    at = {row["comparison"]: row for row in rows.to_dicts()}
    found = []
    where = f"at level {level} ({_percent(next(iter(at.values()))['alive %'])} alive)" if at else ""
    for name in (tables.together(k), TWO):
        if name not in at:
            continue
        row = at[name]
        who = "two tickets of the same seed (mean over pairs)" if name == TWO else f"the tickets of {name}"
        text = f"Share of a ticket's connections that {who} have in common {where}. " + _chance(row)
        if name == TWO and row["lowest %"] != row["highest %"]:
            text += f" Pairs range from {_percent(row['lowest %'])} to {_percent(row['highest %'])}."
        title = "Shared by all" if name != TWO else "Shared by two importances"
        found.append(Finding(title, _percent(row["shared %"]), text))
    if NOISE in at:
        row = at[NOISE]
        text = (
            f"Share of a ticket's connections that two tickets of one importance have in common {where} if they differ "
            f"only in the data order ({', '.join(contents.study.repeated)}). {_chance(row)}"
        )
        if TWO in at:
            two = at[TWO]["shared %"]
            order = "less than" if two < row["shared %"] else "more than" if two > row["shared %"] else "as much as"
            text += f" Two importances share {order} this ({_percent(two)})."
        found.append(Finding("Noise floor", _percent(row["shared %"]), text))
    return found


def _chance(row: dict[str, float]) -> str:
    return (
        f"Random tickets with the same number of connections in each layer would share "
        f"{_percent(row['chance, by layers %'])}; with the same number in the whole network, "
        f"{_percent(row['chance, overall %'])}."
    )


def collapse(contents: Contents) -> Finding | None:
    """Return which layers have lost all their connections, and at which level."""
    first: dict[str, dict[str, int]] = {}
    for row in contents.results:
        for layer in row.collapsed:
            layers = first.setdefault(row.importance, {})
            layers[layer] = min(row.level, layers.get(layer, row.level))
    last = max(row.level for row in contents.results)
    names = [name for name in contents.study.importances if name in first]
    if not names:
        return Finding("Collapsed layers", "0", f"Up to level {last}, no layer has lost all its connections.")
    parts = []
    for name in names:
        ordered = sorted(first[name].items(), key=lambda item: item[1])
        parts.append(f"{name}: {list_first([f'{layer} from level {level}' for layer, level in ordered])}")
    collapsed = {layer for layers in first.values() for layer in layers}
    without = [name for name in contents.study.importances if name not in first]
    text = "Layers that have lost all their connections in at least one seed. " + "; ".join(parts) + "."
    if without:
        text += f" None for {', '.join(without)} in the levels that are stored."
    return Finding("Collapsed layers", str(len(collapsed)), text)


def verification(contents: Contents) -> Finding:
    """Return how many stored trainings were repeated with the same bits, and when."""
    found = contents.verified
    title, figure = "Bits confirmed", f"{found.confirmed} of {found.trainings}"
    if found.when is None:
        return Finding(
            title, figure, "No stored training has been repeated to compare its bits; tombola verify does this."
        )
    text = (
        f"tombola verify repeated {found.confirmed} of {found.trainings} stored trainings with the same bits of "
        f"weights, mask and history; last on {_day(found.when)}."
    )
    if found.contradicted:
        text += f" {found.contradicted} gave other bits when last repeated"
        text += ", on another machine or with other versions than recorded." if found.elsewhere else "."
    return Finding(title, figure, text)


def machines(contents: Contents) -> Finding | None:
    """Return on how many kinds of machine the trainings ran; None where all ran on one and that is recorded."""
    kinds = count_kinds(contents.records)
    text = describe_kinds(kinds)
    if text is None:
        return None
    return Finding(
        "Kinds of machine", str(len([kind for kind in kinds if kind is not None])), f"{text[0].upper()}{text[1:]}."
    )


def progress(contents: Contents) -> str | None:
    """Return how much of a study is done; None if it is finished."""
    parts = []
    if contents.trainings_left:
        share = 100 * contents.tickets // max(1, contents.expected)
        parts.append(
            f"This study is not finished: {contents.tickets} of {contents.expected} tickets are stored ({share} %), "
            f"and {contents.trainings_left} trainings remain. This page shows the tickets that are stored"
        )
    if contents.stopped:
        stopped = "; ".join(f"{chain}: {why}" for chain, why in contents.stopped.items())
        parts.append(f"Some tickets cannot be computed ({stopped})")
    if diverged := sum(row.diverged for row in contents.results):
        parts.append(f"{diverged} {'training' if diverged == 1 else 'trainings'} diverged and ended its chain")
    return ". ".join(parts) + "." if parts else None


def _of_seeds(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else "from one seed"


def _percent(value: float) -> str:
    """Return a percentage with at least three significant digits.

    >>> _percent(98.314), _percent(0.1234), _percent(100.0), _percent(1e-9), _percent(0.0)
    ('98.3 %', '0.123 %', '100 %', 'less than 0.001 %', '0 %')
    """
    if 0 < value < 0.001:
        return "less than 0.001 %"
    return f"{value:.0f} %" if value == 100 else f"{value:.1f} %" if value >= 10 else f"{value:.3g} %"


def _day(when: str) -> str:
    return f"{when[:10]} {when[11:16]} UTC" if len(when) > 15 else when

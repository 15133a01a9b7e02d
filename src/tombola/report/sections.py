"""Sections: the charts of each analysis with their tables, and a line on how to read them."""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from tombola.analysis.gather import ALL
from tombola.report import charts, tables
from tombola.report.contents import COSTLY, Contents
from tombola.report.findings import dense_accuracies
from tombola.report.look import Chart
from tombola.report.paper import CITATION

MEASURES = {
    "sd": "standard deviation of the trained weight over levels",
    "flips": "changes of sign from level to level",
    "flips_from_start": "levels at which the sign is not the rewind point's",
    "movement": "distance of the trained from the initial weight",
}
"""What `tombola.analysis.stability` measures, in words."""

QUANTITIES = {"initial": "initial weights", "rewind": "weights at the rewind point", "end": "trained weights"}
"""What `tombola.analysis.weights` looks at, in words."""


@dataclass(frozen=True)
class Part:
    """One chart and its numbers.

    Args:
        name: of letters, digits and `-`: the chart's id and its file's name.
        title: a few words.
        chart: of `tombola.report.charts`; None where there are only numbers.
        table: the numbers that the chart shows, percentages in 0..100.
        more: further tables, by what they are called.
    """

    name: str
    title: str
    chart: Chart | None
    table: pl.DataFrame
    more: Mapping[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """What one analysis shows.

    Args:
        name: of letters and `-`.
        title: a few words.
        reading: how to read it.
        parts: the charts.
        absent: why it is not there, where it is not; then `command` does what is missing.
    """

    name: str
    title: str
    reading: str
    parts: tuple[Part, ...] = ()
    absent: str = ""
    command: str = ""


def sections(contents: Contents) -> list[Section]:
    """Return all sections in the order of the page; those without parts say how to come by them."""
    found = [_accuracy(contents)]
    for name, title, verb, parts, about in _ANALYSES:
        reading, table = about.format(level=contents.level), contents.tables.get(name)
        if table is None:
            found.append(_absent_section(name, title, reading, contents, verb.format(level=contents.level or 1)))
        else:
            found.append(Section(name, title, reading, tuple(parts(contents, table))))
    return found


def _accuracy(contents: Contents) -> Section:
    reading = (
        "Each line is an importance, each mark a level; the further right, the sparser. The dotted line is the "
        "dense network's accuracy."
    )
    if len(contents.study.seeds) > 1:
        reading += " Bands are one standard deviation over seeds to either side of the mean."
    names = contents.study.importances
    if not contents.results:
        return _absent_section("accuracy", "Accuracy against sparsity", reading, contents, "run")
    table = tables.accuracy(contents.results)
    accuracies = list(dense_accuracies(contents).values())
    dense = 100 * statistics.fmean(accuracies) if accuracies else None
    reported = tables.paper(contents.paper, table) if contents.paper is not None else None
    if reported is not None and len(reported):
        reading += f" Large hollow marks with bars are the paper's: {CITATION}; mean and standard deviation of 3 seeds."
    else:
        reported = None
    parts = [Part("accuracy", "All levels", charts.accuracy(table, names, dense, reported), table)]
    if dense is not None:
        near = table.filter(pl.col("accuracy %") >= dense - 2)
        close = None if reported is None else reported.filter(pl.col("paper %") >= dense - 2)
        chart = charts.accuracy(table, names, dense, close, within=2)
        parts.append(Part("accuracy-near-dense", "The same within 2 points of the dense network", chart, near))
    if reported is not None:
        parts.append(Part("paper", "Beside the paper's figures", None, reported))
    return Section("accuracy", "Accuracy against sparsity", reading, tuple(parts))


def _overlap(contents: Contents, table: pl.DataFrame) -> list[Part]:
    k = len(contents.study.importances)
    assert contents.level is not None
    pairs, over_levels = tables.pairs(table), tables.overlap(table, k)
    layers = tables.overlap_by_layer(table, contents.level, k)
    levels = pairs["level"].unique().sort().to_list()
    matrix = charts.matrix(pairs, contents.labels, contents.level, levels)
    by_layer = f"Layer by layer at level {contents.level}; the bars stand where chance is, by layers"
    there = layers["shared %"].is_not_null().any()
    return [
        Part("overlap-matrix", "Every two tickets, in % of a ticket's connections", matrix, pairs),
        Part("overlap", "Over all levels", charts.overlap(over_levels), over_levels),
        Part("overlap-by-layer", by_layer, charts.overlap_by_layer(layers) if there else None, layers),
    ]


def _layers(contents: Contents, table: pl.DataFrame) -> list[Part]:
    alive = table.filter(pl.col("density") > 0)["density"]
    least = max(0.01, 100 * float(alive.to_numpy().min()))
    parts = []
    for number, name in enumerate(contents.study.importances):
        own = tables.layers(table, name)
        if not len(own):
            continue
        numbers = tables.by_level(own, tables.DENSITY)
        more = {}
        if own["on paths %"].is_not_null().any():
            more["Connections on a path from input to output, %"] = tables.by_level(own, "on paths %")
        if (own["collapsed"] > 0).any():
            more["In how many seeds the layer has collapsed"] = tables.by_level(own, "collapsed")
        chart = charts.layers(own, min(least, 50))
        parts.append(Part(f"layers-{number + 1}-{slug(name)}", name, chart, numbers, more))
    return parts


def _stability(contents: Contents, table: pl.DataFrame) -> list[Part]:
    parts, names = [], contents.study.importances
    for measure, words in MEASURES.items():
        own = tables.stability(table, measure)
        parts.append(Part(f"stability-{slug(measure)}", words, charts.stability(own, names), own))
        if own["effect"].is_not_null().any():
            chart = charts.effects(own, names, "effect: shared lower ← 0 → shared higher")
            shown = own.select("importance", "layer", "effect")
            parts.append(Part(f"effect-{slug(measure)}", f"Effect on: {words}", chart, shown))
    return parts


def _reinit(contents: Contents, table: pl.DataFrame) -> list[Part]:
    parts: list[Part] = []
    for (level, compared), rows in table.group_by("level", "compared", maintain_order=True):
        own = tables.reinit(rows)
        there = own["more than chance, %"].is_not_null().any()
        chart = charts.reinit(own, contents.study.importances) if there else None
        who = (
            tables.together(len(compared)) if len(compared) == len(contents.study.importances) else join_names(compared)
        )
        title = f"Level {level}, what the tickets of {who} share; {_several(own['draws'][0], 'draw')}"
        if len(contents.study.seeds) > 1:
            title += f", each of {_several(own['seeds'][0], 'seed')}"
        parts.append(Part(f"reinit-{len(parts) + 1}-level-{level}", title, chart, own))
    return parts


def _weights(contents: Contents, table: pl.DataFrame) -> list[Part]:
    parts, names = [], contents.study.importances
    for quantity, words in QUANTITIES.items():
        if quantity == "rewind" and not contents.study.recipe.rewind:
            continue  # they are the initial ones
        own = tables.weights(table, quantity).filter(pl.col("layer") != ALL)
        chart = charts.weights(own, names) if own["median"].is_not_null().any() else None
        parts.append(Part(f"weights-{quantity}", words, chart, own))
    own = tables.weights(table, "score")
    for number, name in enumerate(names):
        shown = own.filter(pl.col("importance") == name).drop("importance")
        chart = charts.scores(own, name, names) if (shown["95 %"].fill_null(0) > 0).any() else None
        parts.append(Part(f"importance-{number + 1}-{slug(name)}", f"Importance: {name}", chart, shown))
    return parts


def _connectivity(_: Contents, table: pl.DataFrame) -> list[Part]:
    own = tables.connectivity(table)
    return [Part("connectivity", "Error between tickets", charts.connectivity(own), own)]


def _functions(_: Contents, table: pl.DataFrame) -> list[Part]:
    own = tables.functions(table)
    return [Part("functions", "Agreement", charts.functions(own), own)]


_ANALYSES: tuple[tuple[str, str, str, Callable[[Contents, pl.DataFrame], list[Part]], str], ...] = (
    (
        *("overlap", "Overlap of the tickets", "overlap", _overlap),
        "Of a ticket's connections, how many does another ticket of the same seed have too? Chance is what random "
        "tickets share: with as many connections in each layer (by layers), or with as many in all (overall). The "
        "noise floor is what two tickets of one importance share that saw the data in two orders; it is there where "
        "the study has a second data order (--data-seeds).",
    ),
    (
        *("layers", "Density of the layers", "layers", _layers),
        "A row is a layer, from the input down to the output; a column is a level. Bright is dense, dark is sparse "
        "(log scale); × marks a layer that has collapsed in a seed: no connection is left.",
    ),
    (
        *("stability", "Stability of shared and other connections", "stability", _stability),
        "For the tickets at level {level}: filled marks are the connections that the tickets of all importances "
        "share, hollow ones the ticket's others; marks are means, bars the middle half. Beside them, layer by layer, "
        "the effect (Cliff's delta): left of 0, shared connections have the lower values. Connections of one network "
        "are not independent, so no p value is given here.",
    ),
    (
        *("reinit", "Partial reinitialisation", "reinit --level {level}", _reinit),
        "The connections that the tickets of a level share keep their initial weights, all others are drawn anew, and "
        "the tickets are found again. Right of 0, kept connections survive more often than by chance; bars are 95 % "
        "intervals over draws.",
    ),
    (
        *("weights", "Weights and importances", "weights", _weights),
        "For the connections of the tickets at level {level}: thin bars reach from 5 % to 95 % of the weights, thick "
        "ones hold the middle half, marks are medians; means over seeds. The next round compares the importances over "
        "all layers and prunes the lowest.",
    ),
    (
        *("connectivity", "Linear mode connectivity", "report --with connectivity", _connectivity),
        "The test error of networks on the straight line between two trained tickets at level {level}; where a line "
        "stays flat, the two lie in one basin. The barrier is how far it rises above the line between its ends.",
    ),
    (
        *("functions", "Agreement of predictions", "report --with functions", _functions),
        "How often two trained tickets at level {level} predict the same class; bars are 95 % intervals over test "
        "examples, the widest of the seeds. Dense networks that differ in the data order or the seed are there to "
        "compare with.",
    ),
)
"""Sections that show a table of that name: name, title, what computes it, what makes its parts, how to read it."""


def _absent_section(name: str, title: str, reading: str, contents: Contents, verb: str) -> Section:
    why = contents.absent.get(name, "")
    if contents.level is None and name != "accuracy":
        why, verb = "no level from 1 on is there for all importances and seeds yet", "run"
    elif len(contents.study.importances) < 2 and name not in ("accuracy", "layers", "weights"):
        own = contents.study.importances[0]
        why = "it compares two importances or more, and the study has one"
        verb = f"run --importances {own} {'magnitude' if own == 'l1' else 'l1'}"
    elif name in COSTLY and not why:
        why = "it asks the networks for predictions, which takes time, so it is done only when asked for"
    return Section(name, title, reading, (), why, command(contents, verb))


def command(contents: Contents, verb: str) -> str:
    """Return a command about the study: the verb, the study, then the verb's options and what overrides the study.

    >>> from tombola.study.schema import load_study
    >>> digits = load_study("digits")
    >>> contents = Contents("d", digits, ("digits", "--levels", "3"), {}, (0, 0), (), (), None, 0.0, {}, {})
    >>> command(contents, "reinit --level 2")
    'tombola reinit digits --level 2 --levels 3'
    """
    first, *options = verb.split()
    name, *overrides = contents.command
    if "--importances" in options and "--importances" in overrides:
        start = overrides.index("--importances")
        values = itertools.takewhile(lambda each: not each.startswith("--"), overrides[start + 1 :])
        del overrides[start : start + 1 + len(list(values))]
    return shlex.join(["tombola", first, name, *options, *overrides])


def join_names(names: Sequence[str]) -> str:
    """Return names as a sentence lists them.

    >>> join_names(["l1"]), join_names(["magnitude", "l1", "l2"])
    ('l1', 'magnitude, l1 and l2')
    """
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def slug(text: str) -> str:
    """Return a text as a part of a file's name.

    >>> slug("mine:Cubic <b>"), slug("min_max")
    ('mine-cubic-b', 'min-max')
    """
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def select_charts(found: Sequence[Section]) -> list[Part]:
    """Return the parts of all sections that have a chart."""
    return [part for section in found for part in section.parts if part.chart is not None]

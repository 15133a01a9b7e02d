"""Sections: the charts and tables of each analysis, with a text on how to read them."""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from tombola.analysis import similarity
from tombola.analysis.gather import ALL, PRUNABLE
from tombola.analysis.reference import PAPER, compare, describe
from tombola.reporting import charts, further, tables
from tombola.reporting.contents import COSTLY, FURTHER, Contents
from tombola.reporting.findings import dense_values
from tombola.reporting.look import Chart
from tombola.training.metrics import TEST_ACCURACY

MEASURES = {
    "sd": "standard deviation of the trained weight over levels",
    "flipped": "connections whose trained weight changes its sign at least once, as a share",
    "flips": "number of changes of sign from one level to the next",
    "flips_from_start": "levels at which the sign differs from the rewind point's",
    "movement": "distance between trained and initial weight",
}
"""What `tombola.analysis.stability` measures, in words."""

QUANTITIES = {"initial": "initial weights", "rewind": "weights at the rewind point", "end": "trained weights"}
"""The weights that `tombola.analysis.weights` describes, in words."""


@dataclass(frozen=True)
class Part:
    """One chart and its numbers.

    Args:
        name: letters, digits and `-`; the id of the chart and the name of its file.
        title: a few words.
        chart: made by `tombola.reporting.charts`; None if there are only numbers.
        table: the numbers that the chart shows, percentages in 0..100.
        more: further tables, by title.
    """

    name: str
    title: str
    chart: Chart | None
    table: pl.DataFrame
    more: Mapping[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """The charts and tables of one analysis.

    Args:
        name: letters and `-`.
        title: a few words.
        reading: how to read it.
        parts: the charts.
        absent: the reason, if there are no parts. `command` then computes what is missing.
    """

    name: str
    title: str
    reading: str
    parts: tuple[Part, ...] = ()
    absent: str = ""
    command: str = ""


def sections(contents: Contents) -> list[Section]:
    """Return all sections in the order of the page; a section without parts names the command that computes it."""
    found = [_accuracy(contents)]
    for name, title, verb, parts, about in _ANALYSES:
        reading, table = about.format(level=contents.level), contents.tables.get(name)
        if table is None and name in _ON_REQUEST:
            continue
        if table is None:
            found.append(_absent_section(name, title, reading, contents, verb.format(level=contents.level or 1)))
        else:
            found.append(Section(name, title, reading, tuple(parts(contents, table))))
    return found


def _accuracy(contents: Contents) -> Section:
    """Return the section on the accuracy, or on what else tickets are judged by."""
    measure = contents.measure
    title = f"{measure.label[0].upper()}{measure.label[1:]} against sparsity"
    reading = (
        "Each line shows one importance, each mark one level. Sparsity grows to the right. The dotted line is the "
        f"{measure.label} of the dense network."
    )
    if len(contents.study.seeds) > 1:
        reading += " Bands show the mean plus and minus one standard deviation over seeds."
    names = contents.study.importances
    if not contents.results:
        return _absent_section(measure.name, title, reading, contents, "run")
    if not measure.higher_is_better:
        reading += " Lower is better."
    table = tables.accuracy(contents.results)
    values = list(dense_values(contents).values())
    dense = measure.scale * statistics.fmean(values) if values else None
    compared = [(one, found) for one in contents.references if len(found := compare(contents.results, one.table))]
    reported = next((tables.comparison(found, PAPER) for one, found in compared if one.name == PAPER), None)
    if measure != TEST_ACCURACY:  # the paper's marks are accuracies on the test set
        reported = None
    if reported is not None:
        reading += " Large hollow marks with bars show the paper's mean and standard deviation over 3 seeds."
    chart = charts.accuracy(table, names, dense, reported, measure=measure)
    parts = [Part(measure.name, "All levels", chart, table)]
    if dense is not None and measure.percent and measure.higher_is_better:
        near = table.filter(pl.col(measure.heading) >= dense - 2)
        close = None if reported is None else reported.filter(pl.col("paper %") >= dense - 2)
        chart = charts.accuracy(table, names, dense, close, within=2, measure=measure)
        parts.append(Part(f"{measure.name}-near-dense", "Detail: up to 2 points below the dense network", chart, near))
    for one, found in compared:
        whose = f"the {one.name}"
        reading += f" Compared with {whose} ({one.source}): {describe(found)}"
        parts.append(Part(one.name, f"Comparison with {whose}", None, tables.comparison(found, one.name)))
    return Section(measure.name, title, reading, tuple(parts))


_WITHOUT_KEPT = "All levels, without the layers that are kept dense, which all tickets share"


def _overlap(contents: Contents, table: pl.DataFrame) -> list[Part]:
    k = len(contents.study.importances)
    assert contents.level is not None
    pairs, over_levels = tables.pairs(table), tables.overlap(table, k)
    without_kept = tables.overlap(table, k, PRUNABLE)
    layers = tables.overlap_by_layer(table, contents.level, k)
    levels = pairs["level"].unique().sort().to_list()
    matrix = charts.matrix(pairs, contents.labels, contents.level, levels)
    by_layer = f"Each layer at level {contents.level}; black bars show chance, by layers"
    there = layers["shared %"].is_not_null().any()
    return [
        Part("overlap-matrix", "Each pair of tickets, in % of a ticket's connections", matrix, pairs),
        Part("overlap", "All levels", charts.overlap(over_levels), over_levels),
        *(
            [Part("overlap-prunable", _WITHOUT_KEPT, charts.overlap(without_kept), without_kept)]
            if len(without_kept)
            else []
        ),
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
            more["Number of seeds in which the layer has collapsed"] = tables.by_level(own, "collapsed")
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
            parts.append(Part(f"effect-{slug(measure)}", f"Effect size: {words}", chart, shown))
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
        title = f"Level {level}, connections shared by the tickets of {who}; {_several(own['draws'][0], 'draw')}"
        if len(contents.study.seeds) > 1:
            title += f" for each of {_several(own['seeds'][0], 'seed')}"
        parts.append(Part(f"reinit-{len(parts) + 1}-level-{level}", title, chart, own))
    return parts


def _weights(contents: Contents, table: pl.DataFrame) -> list[Part]:
    parts, names = [], contents.study.importances
    for quantity, words in QUANTITIES.items():
        if quantity == "rewind" and not contents.study.recipe.rewind:
            continue  # they are the initial weights
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
    return [Part("connectivity", "Test error between pairs of tickets", charts.connectivity(own), own)]


def _functions(_: Contents, table: pl.DataFrame) -> list[Part]:
    own = tables.functions(table)
    return [Part("functions", "Agreement", charts.functions(own), own)]


def _matching(_: Contents, table: pl.DataFrame) -> list[Part]:
    return [Part("matching", "Overlap after matching", None, further.matching(table))]


def _initial(_: Contents, table: pl.DataFrame) -> list[Part]:
    return [Part("initial", "The largest weights that are kept", None, further.initial(table))]


def _similarity(_: Contents, table: pl.DataFrame) -> list[Part]:
    means = similarity.summarise(table)
    return [
        Part("similarity", "Predictions", None, further.similarity(means)),
        Part("calibration", "Accuracy and calibration", None, further.calibration(means)),
        Part("alignment", "Alignment of layers", None, further.alignment(means)),
    ]


def _controls(contents: Contents, table: pl.DataFrame) -> list[Part]:
    parts = []
    for (level,), rows in table.group_by("level", maintain_order=True):
        own = further.controls(rows, contents.measure)
        there = own.filter(pl.col("lost").is_not_null())
        chart = charts.controls(there, contents.study.importances, contents.measure) if len(there) else None
        parts.append(Part(f"controls-level-{level}", f"Level {level}", chart, own))
    return parts


def _combinations(contents: Contents, table: pl.DataFrame) -> list[Part]:
    return [
        Part(f"combinations-level-{level}", f"Level {level}", None, further.combinations(rows, contents.measure))
        for (level,), rows in table.group_by("level", maintain_order=True)
    ]


def _transfers(contents: Contents, table: pl.DataFrame) -> list[Part]:
    return [
        Part(f"transfers-{number}", f"Level {level} of the study with {source}", None, own)
        for number, ((source, level), rows) in enumerate(table.group_by("source", "level", maintain_order=True), 1)
        for own in [further.transfers(rows, contents.measure)]
    ]


def _basins(_: Contents, means: pl.DataFrame) -> list[Part]:
    return [Part("basins", "Barriers of each level", None, further.basins(means))]


def _rewind_point(_: Contents, means: pl.DataFrame) -> list[Part]:
    return [Part("rewind-point", "Barriers of two data orders", None, further.rewind_point(means))]


def _early(_: Contents, table: pl.DataFrame) -> list[Part]:
    return [Part("early", "Masks during training", None, further.early(table))]


_INTERVAL = "Low and high bound the 95 % interval of the mean over seeds."

_ANALYSES: tuple[tuple[str, str, str, Callable[[Contents, pl.DataFrame], list[Part]], str], ...] = (
    (
        *("overlap", "Overlap of the tickets", "overlap", _overlap),
        "The share of a ticket's connections that other tickets of the same seed also have. Chance is the share of "
        "random tickets: with the same number of connections in each layer (by layers), or in the whole network "
        "(overall). The noise floor is the share of two tickets of the same importance that saw the data in different "
        "orders; it is shown if the study has a second data order (its field data_seeds).",
    ),
    (
        *("layers", "Density of the layers", "layers", _layers),
        "Each row is a layer, from input (top) to output; each column is a level. Bright cells are dense, dark cells "
        "are sparse (log scale). A × marks a layer that has collapsed in at least one seed: it has no connection left.",
    ),
    (
        *("stability", "Stability of shared and other connections", "stability", _stability),
        "For the tickets at level {level}. Filled marks: connections that the tickets of all importances share. Hollow "
        "marks: the other connections of the ticket. Marks are means; bars show the middle half of the values. The "
        "effect size (Cliff's delta) is given for each layer: below 0, shared connections have lower values. No p "
        "values are given, because connections of one network are not independent.",
    ),
    (
        *("reinit", "Partial reinitialisation", "reinit --level {level}", _reinit),
        "Connections that the tickets of a level share keep their initial weights, all others are reinitialised, and "
        "the search for tickets is repeated. Above 0, kept connections survive more often than by chance. Bars show "
        "95 % intervals over draws.",
    ),
    (
        *("weights", "Weights and importances", "weights", _weights),
        "For the connections of the tickets at level {level}. Thin bars reach from the 5 % to the 95 % quantile, thick "
        "bars show the middle half, marks show the median; all are means over seeds. The next round compares the "
        "importances of all layers and prunes the lowest.",
    ),
    (
        *("connectivity", "Linear mode connectivity", "report --with connectivity", _connectivity),
        "The test error on the straight line between the weights of two trained tickets at level {level}. If the error "
        "stays flat, both tickets lie in one basin of the loss. The barrier is the largest rise of the error above the "
        "straight line between the errors at both ends.",
    ),
    (
        *("functions", "Agreement of predictions", "report --with functions", _functions),
        "The share of test examples for which two trained tickets at level {level} predict the same class. Bars show "
        "95 % intervals over test examples, from the lowest to the highest bound of all seeds. For comparison, dense "
        "networks are shown that differ in the data order or in the seed.",
    ),
    (
        *("initial", "Largest initial weights", "initial", _initial),
        "For the tickets at level {level}. Of a layer with n connections alive, the share of the n connections that "
        "have the largest weights at initialisation, or at the rewind point, and are in the ticket. An excess of 1 "
        "means that the initial weights decide which connections survive in a layer, 0 that they have no influence. "
        + _INTERVAL,
    ),
    (
        *("matching", "Overlap up to the order of units", "report --with matching", _matching),
        "For the tickets at level {level}. Hidden units carry no names: two tickets may be the same with their units "
        "in another order. Matching puts the units of one network into the order that brings its weights nearest to "
        "the other's. It raises the overlap of random tickets, too: tickets are alike up to the order of units if they "
        "share more after matching than random tickets do: in 95 % of cases these share from low to high.",
    ),
    (
        *("similarity", "Networks as functions", "report --with similarity", _similarity),
        "For two trained tickets at level {level}, and for dense networks that differ in the data order or in the "
        "seed: the share of test examples for which their predictions differ, the mean divergences of the predicted "
        "probabilities in nats (KL is the mean of both directions), the linear centred kernel alignment (CKA) of "
        "outputs and layers, what the mean of the two predictions gains in accuracy, and the expected calibration "
        "error. " + _INTERVAL,
    ),
    (
        *("controls", "Controls", "controls --level {level}", _controls),
        "One thing about each ticket is changed, and the result is trained: what a control loses is what the ticket "
        "owes to the thing that was changed. The ticket with another data order is the noise of a training. Bars show "
        "95 % intervals over seeds.",
    ),
    (
        *("combinations", "Unions and intersections of tickets", "combine --level {level}", _combinations),
        "The union and the intersection of tickets, trained as tickets of their own, beside tickets of their density, "
        "between two levels. A difference above 0 is in favour of the combination. " + _INTERVAL,
    ),
    (
        *("transfers", "Masks of other studies", "transfer --level {level}", _transfers),
        "The masks of another study, which differs from this one as stated, are trained in the networks of this one, "
        "with its data and recipe. A shuffled mask with the same layer densities is chance, and the own ticket is that "
        "of this study at the same density. A mask transfers if it is better than the shuffled one. " + _INTERVAL,
    ),
    (
        *("basins", "Connected levels", "report --with basins", _basins),
        "The barrier of the test error between a trained ticket and that of the next level, and between the dense "
        "network and the ticket. Levels are connected if the barrier is at most 2 points. A level keeps what tickets "
        "are judged by if it loses no more than the margin. " + _INTERVAL,
    ),
    (
        *("rewind-point", "Rewind point", "report --with rewind-point", _rewind_point),
        "Two networks share the first iterations, and see the data in different orders from then on. They are "
        "connected if the barrier of the test error between them is at most 2 points. The overlap is that of the masks "
        "that one round prunes the two to. " + _INTERVAL,
    ),
    (
        *("early", "How early a mask is known", "report --with early", _early),
        "At each iteration the dense network is pruned in one round to the density of the tickets of the last level. "
        "The share of this mask that is in the mask at the end of training, and the share of the ticket that is in it. "
        + _INTERVAL,
    ),
)
"""One section per analysis: name of the table and section, title, verb that computes it, parts, how to read it."""

_ON_REQUEST = ("controls", "combinations", "transfers", *FURTHER)
"""Analyses that have a section only if their results are there."""


def _absent_section(name: str, title: str, reading: str, contents: Contents, verb: str) -> Section:
    why = contents.absent.get(name, "")
    own_metric = name == contents.measure.name
    if contents.level is None and not own_metric:
        why, verb = "no level from 1 on is stored for all importances and seeds yet", "run"
    elif (
        len(contents.study.importances) < 2
        and not own_metric
        and name
        not in (
            *("layers", "weights", "initial"),
            *(("matching", "similarity") if len(contents.study.seeds) > 1 or contents.study.data_seeds else ()),
        )
    ):
        own = contents.study.importances[0]
        why = "it compares two or more importances, and the study has one"
        verb = f"run --importances {own} {'magnitude' if own == 'l1' else 'l1'}"
    elif name in COSTLY and not why:
        why = "it evaluates the networks, which takes time, and is only computed on request"
    return Section(name, title, reading, (), why, command(contents, verb))


def command(contents: Contents, verb: str) -> str:
    """Return a command line: the verb, the study, the options of the verb, and the options that override fields.

    >>> from tombola.study.schema import load_study
    >>> digits = load_study("digits")
    >>> contents = Contents("d", digits, ("digits", "--levels", "3"), {}, "", (), (), None, 0.0, {}, {})
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
    """Join names for a sentence.

    >>> join_names(["l1"]), join_names(["magnitude", "l1", "l2"])
    ('l1', 'magnitude, l1 and l2')
    """
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def slug(text: str) -> str:
    """Return a text in a form that can be part of a file name.

    >>> slug("mine:Cubic <b>"), slug("min_max")
    ('mine-cubic-b', 'min-max')
    """
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def select_charts(found: Sequence[Section]) -> list[Part]:
    """Return the parts of all sections that have a chart."""
    return [part for section in found for part in section.parts if part.chart is not None]

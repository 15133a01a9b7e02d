"""The verbs of further analyses, which ask what the paper does not ask."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tombola.cli.analysis import open_compared, show_view
from tombola.cli.options import Verbs, add_margin, add_tolerance, print_note, warnings_as_notes, whole_number
from tombola.terminal import say

if TYPE_CHECKING:
    import polars as pl

_MOST = 10_000
_LEVELS = "compare only tickets of these levels (default: of the last level that all chains have)"


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    for verb in (matching, initial, similarity):
        added = verbs.add(verb.__name__, verb, verbs.study, verbs.table)
        added.add_argument("--level", type=whole_number(0, _MOST), nargs="+", metavar="N", help=_LEVELS)
        if verb is matching:
            added.add_argument(
                "--by",
                choices=("weights", "activations"),
                default="weights",
                help="match hidden units by their weights or by their activations (default: %(default)s)",
            )
            added.add_argument(
                "--draws",
                type=whole_number(1, 1000),
                default=3,
                metavar="N",
                help="how many pairs of random tickets are matched for each pair of tickets (default: %(default)s)",
            )

    added = verbs.add("basins", basins, verbs.study, verbs.table)
    added.add_argument(
        "--points",
        type=whole_number(2, 1001),
        default=11,
        metavar="N",
        help="the number of points on each line (default: %(default)s)",
    )
    add_tolerance(added)
    add_margin(added)


def matching(options: argparse.Namespace) -> int:
    """Show the overlap of tickets after their hidden units are put into the same order, also across seeds."""
    from tombola.analysis import matching

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = matching.of_study(tickets, names, options.level, options.by, options.draws)
    if options.format == "table":
        if len(tickets.study.seeds) < 2:
            print_note(
                "tickets of different initialisations are not compared: the study has one seed; add others with --seeds"
            )
        if not (table["kind"] == "data order").any():
            print_note("no noise floor: no two data orders are compared; add some with --data-seeds")
    show_view(table, options.format, _matching)
    return 0


def initial(options: argparse.Namespace) -> int:
    """Show how many of the connections with the largest initial weights are in the tickets, compared with chance."""
    from tombola.analysis import initial

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = initial.of_study(tickets, names, options.level)
    show_view(table, options.format, _initial)
    return 0


def similarity(options: argparse.Namespace) -> int:
    """Show how similar trained tickets are as functions: their predictions, calibration and layers."""
    from tombola.analysis import similarity

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = similarity.of_study(tickets, names, options.level)
    show_view(table, options.format, _similarity)
    if options.format == "table":
        say("\nLinear CKA of each layer:")
        show_view(table, options.format, _alignment)
    return 0


def basins(options: argparse.Namespace) -> int:
    """Show up to which level each ticket is connected to the next, and at which level the accuracy begins to fall."""
    from tombola.analysis import basins

    tickets, names = open_compared(options)
    tolerance = options.tolerance / 100
    with warnings_as_notes(Warning):
        table = basins.of_study(tickets, names, options.points, tolerance)
    if options.format != "table":
        show_view(table, options.format, _basins)
        return 0
    if len(tickets.study.seeds) < 2:
        print_note("no interval: the study has one seed, and an interval needs two or more; add others with --seeds")
    means = basins.summarise(table, tickets, tolerance, options.margin / 100)
    show_view(means, options.format, _basins)
    for sentence in basins.describe(means):
        say(sentence)
    return 0


def _basins(means: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each importance and level."""
    from tombola.cli.tables import percent, percent_range, yes_or_no

    return means.select(
        *("importance", "level", "seeds"),
        percent("density").alias("density %"),
        percent("next").alias("barrier to the next level, points"),
        percent_range("low", "high").alias("95 %"),
        percent("dense").alias("to the dense network"),
        percent("other_order").alias("to another data order"),
        yes_or_no("connected"),
        yes_or_no("keeps").alias("keeps the accuracy"),
    )


def _matching(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each comparison, over all layers that may be pruned; means over the seeds."""
    from tombola.analysis import matching
    from tombola.cli.tables import percent, percent_range

    return matching.summarise(table).select(
        *("level", "kind", "tickets", "pairs"),
        percent("jaccard").alias("Jaccard %"),
        percent("layers_jaccard").alias("chance"),
        percent("matched_jaccard").alias("matched: Jaccard %"),
        percent("chance_jaccard").alias("chance, matched"),
        percent_range("chance_low", "chance_high").alias("95 %"),
        percent("moved").alias("units moved %"),
    )


def _initial(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each importance and layer, with means over seeds."""
    from tombola.analysis import initial
    from tombola.cli.tables import number, percent, percent_range

    return initial.summarise(table).select(
        *("level", "importance", "quantity", "layer", "seeds"),
        percent("density").alias("density %"),
        percent("kept").alias("largest kept %"),
        percent_range("low", "high").alias("95 %"),
        percent("expected").alias("chance"),
        number("excess").alias("excess"),
    )


def _similarity(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each comparison, about the outputs; means over the seeds."""
    import polars as pl

    from tombola.analysis import similarity
    from tombola.cli.tables import number, percent

    return similarity.summarise(table.filter(pl.col("layer") == similarity.OUTPUTS)).select(
        *("level", "kind", "tickets", "pairs"),
        percent("disagreement").alias("disagreement %"),
        percent("expected").alias("if independent"),
        number("kl", "{:.4f}").alias("KL"),
        number("js", "{:.4f}").alias("JS"),
        number("cka").alias("CKA"),
        percent("accuracy").alias("accuracy %"),
        percent("gain", sign=True).alias("ensemble gain"),
        percent("ece").alias("ECE %"),
        percent("ensemble_ece").alias("of the ensemble"),
    )


def _alignment(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each comparison, and a column for each layer; means over the seeds."""
    import polars as pl

    from tombola.analysis import similarity
    from tombola.cli.tables import number

    means = similarity.summarise(table.filter(pl.col("layer") != similarity.OUTPUTS))
    layers = means["layer"].unique(maintain_order=True).to_list()
    wide = means.pivot(on="layer", index=["level", "kind", "tickets"], values="cka")
    return wide.select("level", "kind", "tickets", *(number(layer) for layer in layers))

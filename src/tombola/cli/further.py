"""The verbs of further analyses, which ask what the paper does not ask."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tombola.analysis.defaults import DRAWS
from tombola.cli.analysis import has_data_orders, note_no_floor, note_no_interval, open_compared, show_view
from tombola.cli.options import (
    Verbs,
    add_margin,
    add_points,
    add_tolerance,
    print_note,
    warnings_as_notes,
    whole_number,
)
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
                default=DRAWS,
                metavar="N",
                help="how many pairs of random tickets are matched for each pair of tickets (default: %(default)s)",
            )

    added = verbs.add("basins", basins, verbs.study, verbs.table)
    add_points(added)
    add_tolerance(added)
    add_margin(added)


def matching(options: argparse.Namespace) -> int:
    """Show the overlap of tickets after their hidden units are put into the same order, also across seeds."""
    from tombola.analysis import matching

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = matching.of_study(tickets, names, options.level, options.by, options.draws)
    if options.format == "table" and len(tickets.study.seeds) < 2:
        print_note(
            "tickets of different initialisations are not compared: the study has one seed; "
            "find the tickets of others with `tombola run --seeds`"
        )
    note_no_floor(tickets, options, there=has_data_orders(table))
    show_view(table, options.format, _matching)
    return 0


def initial(options: argparse.Namespace) -> int:
    """Show how many of the connections with the largest initial weights are in the tickets, compared with chance."""
    from tombola.analysis import initial

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = initial.of_study(tickets, names, options.level)
    note_no_interval(tickets, options)
    show_view(table, options.format, _initial)
    return 0


def similarity(options: argparse.Namespace) -> int:
    """Show how similar trained tickets are as functions: their predictions, calibration and layers."""
    from tombola.analysis import similarity

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = similarity.of_study(tickets, names, options.level)
    if options.format != "table":
        show_view(table, options.format, _predictions)
        return 0
    note_no_interval(tickets, options)
    note_no_floor(tickets, options, there=has_data_orders(table))
    means = similarity.summarise(table)
    show_view(means, options.format, _predictions)
    say("\nAccuracy and calibration, of two networks and of the mean of their predicted probabilities:")
    show_view(means, options.format, _ensembles)
    say("\nLinear CKA of each layer:")
    show_view(means, options.format, _alignment)
    return 0


def basins(options: argparse.Namespace) -> int:
    """Show up to which level each ticket is connected to the next, and at which level the accuracy begins to fall."""
    from tombola.analysis import basins
    from tombola.cli.tables import wrap

    tickets, names = open_compared(options)
    tolerance = options.tolerance / 100
    with warnings_as_notes(Warning):
        table = basins.of_study(tickets, names, options.points, tolerance)
    if options.format != "table":
        show_view(table, options.format, _basins)
        return 0
    note_no_interval(tickets, options)
    of_tickets = table.filter(table["level"] > 0)  # level 0 is the same for all importances
    orders = bool(of_tickets["other_order"].is_not_null().any())
    note_no_floor(tickets, options, there=orders)
    means = basins.summarise(table, tickets, tolerance, options.margin / 100)
    show_view(means, options.format, _basins)
    if orders and (rewind := tickets.study.recipe.rewind):
        say(
            wrap(
                "Tickets of two data orders share their initialisation alone, and differ from iteration 0 on; "
                f"`tombola rewind-point` compares orders that share the first {rewind} iterations."
            )
        )
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


def _predictions(means: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each comparison, on how the predictions differ; means over the seeds, with their intervals."""
    from tombola.analysis import similarity
    from tombola.cli.tables import number, number_range, percent, percent_range

    return similarity.select_outputs(means).select(
        *("level", "kind", "tickets", "pairs"),
        percent("disagreement").alias("disagreement %"),
        percent_range("disagreement_low", "disagreement_high").alias("95 %"),
        percent("expected").alias("if independent"),
        number("kl", "{:.4f}").alias("KL"),
        number_range("kl_low", "kl_high", "{:.4f}").alias("95 % "),
        number("js", "{:.4f}").alias("JS"),
        number_range("js_low", "js_high", "{:.4f}").alias("95 %  "),
    )


def _ensembles(means: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each comparison, on how good the predictions are; means over the seeds, with intervals."""
    from tombola.analysis import similarity
    from tombola.cli.tables import percent, percent_range

    return similarity.select_outputs(means).select(
        *("level", "kind", "tickets", "pairs"),
        percent("accuracy").alias("accuracy %"),
        percent_range("accuracy_low", "accuracy_high").alias("95 %"),
        percent("gain", sign=True).alias("ensemble gain"),
        percent_range("gain_low", "gain_high", sign=True).alias("95 % "),
        percent("ece").alias("ECE %"),
        percent_range("ece_low", "ece_high").alias("95 %  "),
        percent("ensemble_ece").alias("of the ensemble"),
        percent_range("ensemble_ece_low", "ensemble_ece_high").alias("95 %   "),
    )


def _alignment(means: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each comparison and layer; means over the seeds, with their intervals."""
    from tombola.cli.tables import number, number_range

    return means.select(
        *("level", "kind", "tickets", "layer", "pairs"),
        number("cka").alias("CKA"),
        number_range("cka_low", "cka_high").alias("95 %"),
    )

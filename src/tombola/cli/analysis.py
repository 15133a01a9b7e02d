"""The verbs that analyse a study's tickets: each prints one table of `tombola.analysis`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from tombola.cli.options import (
    Verbs,
    add_margin,
    add_points,
    add_tolerance,
    open_planner,
    overrides,
    print_note,
    warnings_as_notes,
    whole_number,
)
from tombola.errors import UserError
from tombola.store.layout import STORE
from tombola.terminal import say

if TYPE_CHECKING:
    import polars as pl

    from tombola.analysis.evidence import Evidence
    from tombola.analysis.verdict import Claim
    from tombola.study.tickets import Tickets
    from tombola.training.metrics import Measure


_ASKED = ("matching", "basins", "rewind-point")

_UNKNOWN = {
    "matching": "whether the order of units makes tickets alike",
    "rewind-point": "from which iteration on two data orders are connected",
    "basins": "which levels are connected",
    "controls": "what of a ticket matters",
}
"""What is not known without an analysis that says up to what tickets are unique."""

_LIMITS = {"tolerance": ("basins", "rewind-point"), "margin": ("basins",), "points": ("basins", "rewind-point")}
"""Options of `claims`, and the analyses that they are for."""

_LEVELS = 10_000  # more levels than any network can have

_FIRST_ORDER = 100  # the data order of the presets, at which no further seed arrives


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    added = verbs.add("claims", claims, verbs.study, verbs.table)
    added.add_argument(
        "--level",
        type=whole_number(1, _LEVELS),
        metavar="N",
        help="the level that is compared (default: the one nearest to the paper's sparsity, 96.48 %%)",
    )
    added.add_argument(
        "--with",
        dest="asked",
        nargs="+",
        choices=_ASKED,
        default=[],
        metavar="NAME",
        help=f"also compute these analyses, which take time, to say up to what tickets are unique: {', '.join(_ASKED)}",
    )
    for name, add in {"tolerance": add_tolerance, "margin": add_margin, "points": add_points}.items():
        add(added, only=f"with `--with {' or '.join(_LIMITS[name])}`: ")
    added.set_defaults(**dict.fromkeys(_LIMITS))
    for verb in (overlap, layers, stability, winners, weights, functions, connectivity, reinit):
        added = verbs.add(verb.__name__, verb, verbs.study, verbs.table)
        if verb is reinit:
            added.add_argument(
                "--level",
                type=whole_number(0, _LEVELS),
                required=True,
                metavar="N",
                help="the level whose shared connections are kept",
            )
            added.add_argument(
                "--draws",
                type=whole_number(1, 1000),
                default=3,
                metavar="N",
                help="how many reinitialisations are drawn for each seed (default: %(default)s)",
            )
            added.add_argument("--plan", action="store_true", help="show what would be trained, and train nothing")
        elif verb is not winners:
            added.add_argument(
                "--level",
                type=whole_number(0, _LEVELS),
                nargs="+",
                metavar="N",
                help="show only these levels (default: all)",
            )
        if verb is winners:
            add_margin(added)
            added.add_argument(
                "--surely", action="store_true", help="require that the whole 95 %% interval is within the margin"
            )
        if verb is stability:
            added.add_argument("--layer", nargs="+", metavar="NAME", help="show only these layers (default: all)")
        if verb is connectivity:
            add_points(added)


def claims(options: argparse.Namespace) -> int:
    """Show whether each claim of the paper holds for the tickets of the study, with intervals over seeds."""
    from tombola.analysis import claims, uniqueness, verdict
    from tombola.analysis.evidence import collect
    from tombola.study.rewind_point import list_rewind_points

    given = _limits(options)
    limits = {name: value if name == "points" else value / 100 for name, value in given.items()}
    for name in limits:
        if not set(_LIMITS[name]) & set(options.asked):
            raise UserError(f"--{name} is for --with {' or '.join(_LIMITS[name])}, which is missing")
    tickets, names = open_compared(options)
    options.importances = names  # for the commands that are printed
    if options.data_seeds_for is not None and names is not None:
        options.data_seeds_for = [name for name in options.data_seeds_for if name in names] or None
    with warnings_as_notes(Warning):
        evidence = collect(tickets, names, options.level)
    found = claims.judge(evidence)
    if options.format == "table":
        _print_claims(evidence, found, tickets, options)
        with warnings_as_notes(Warning):
            tables = uniqueness.collect(tickets, names, options.asked, evidence.level, **limits)
        sentences = uniqueness.describe(tables, tickets.planner.problem.measure, tickets.study.recipe.rewind)
        missing = [name for name in uniqueness.PARTS if name not in tables]
        trained = [name for name in _ASKED if name != "rewind-point" or list_rewind_points(tickets)]
        _print_uniqueness(sentences, missing, trained, evidence.level, options)
    else:
        if options.asked:
            print_note(f"--with {' '.join(options.asked)}: only --format table says up to what tickets are unique")
        show_view(verdict.to_frame(found), options.format, lambda table: table)
    return 0


def overlap(options: argparse.Namespace) -> int:
    """Show how many connections tickets share, compared with chance and with the noise floor."""
    from tombola.analysis import overlap
    from tombola.analysis.gather import PRUNABLE
    from tombola.cli.tables import wrap

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = overlap.of_study(tickets, names, options.level)
    note_no_floor(tickets, options, there=has_data_orders(table))
    if options.level is not None:
        show_view(table, options.format, _overlap_at_levels)
        return 0
    show_view(table, options.format, _overlap_by_level)
    if options.format == "table":
        say(wrap(tickets.planner.describe_counted()))
        if tickets.planner.kept_dense:
            say("\nThe same without the layers that are kept dense:")
            show_view(table, options.format, partial(_overlap_by_level, total=PRUNABLE))
    return 0


def layers(options: argparse.Namespace) -> int:
    """Show the density of each layer, collapsed layers, and connections on a path from the input to the output."""
    from tombola.analysis import layers
    from tombola.cli.tables import wrap

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = layers.of_study(tickets, names, options.level)
    show_view(table, options.format, _layers)
    if options.format == "table":
        say(wrap(tickets.planner.describe_counted()))
    return 0


def stability(options: argparse.Namespace) -> int:
    """Show how much the weights of shared and of other connections change from one level to the next."""
    from tombola.analysis import stability

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = stability.of_study(tickets, names, options.level, options.layer)
    show_view(table, options.format, _stability)
    return 0


def winners(options: argparse.Namespace) -> int:
    """Show the sparsest ticket of each importance that keeps the accuracy (or metric) of the dense network."""
    from tombola.analysis import winners

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = winners.of_study(tickets, names, margin=options.margin / 100, surely=options.surely)
    note_no_interval(tickets, options)
    measure = tickets.planner.problem.measure
    if options.format == "table" and measure.split == "test":
        print_note(winners.FLATTERS)
    show_view(table, options.format, partial(_winners, measure))
    return 0


def weights(options: argparse.Namespace) -> int:
    """Show the distribution of weights and importances in each layer."""
    from tombola.analysis import weights

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = weights.of_study(tickets, names, options.level)
    show_view(table, options.format, _weights)
    return 0


def functions(options: argparse.Namespace) -> int:
    """Show how often two tickets make the same prediction."""
    from tombola.analysis import functions

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = functions.of_study(tickets, names, options.level)
    show_view(table, options.format, _functions)
    return 0


def connectivity(options: argparse.Namespace) -> int:
    """Show how much the test error rises on the straight line between the weights of two tickets."""
    from tombola.analysis import connectivity

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        table = connectivity.of_study(tickets, names, options.level, options.points)
    show_view(table, options.format, _connectivity)
    return 0


def reinit(options: argparse.Namespace) -> int:
    """Reinitialise all but the shared connections, find tickets again, and show how many shared ones survive."""
    from tombola.analysis import reinit
    from tombola.cli.run import show_plan
    from tombola.engine.estimate import estimate
    from tombola.study.reinitialisation import plan as plan_draws
    from tombola.workbench.runs import count_workers, run_further

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        plans = plan_draws(tickets, options.level, options.draws, names)
    count = count_workers(options.workers, tickets.study.device)
    if options.plan:
        for plan in plans:
            say(f"seed {plan.seed}: {plan.kept.alive} of {plan.kept.total} connections kept")
            expected = estimate(plan.planner, count, options.data, beside=tickets)
            show_plan(plan.planner, expected, count, options.format)
        return 0
    with progress_elsewhere(options.format):
        run_further(tickets, [plan.planner for plan in plans], options.workers, options.data)
    with warnings_as_notes(Warning):
        table = reinit.of_plans(plans)
    show_view(table, options.format, _reinit)
    return 0


def progress_elsewhere(form: str) -> redirect_stdout[Any]:
    """Show the progress on standard error inside the block, if the output is for other programs."""
    return redirect_stdout(sys.stdout if form == "table" else sys.stderr)


def open_compared(options: argparse.Namespace) -> tuple[Tickets, list[str] | None]:
    """Return the tickets and the names of the importances to compare; None means all importances of the study.

    `--importances` selects some importances of the study. It may also name others with which the study was run before,
    whose results are in the store.
    """
    from tombola.workbench.studies import with_importances

    names, options.importances = options.importances, None
    return with_importances(open_planner(options), names), names or None


def note_no_interval(tickets: Tickets, options: argparse.Namespace) -> None:
    """Print a note on how to get an interval over seeds, if a table for people lacks it."""
    if options.format == "table" and len(tickets.study.seeds) < 2:
        print_note(
            "no interval: the study has one seed, and an interval needs two or more; "
            "find the tickets of others with `tombola run --seeds`"
        )


def note_no_floor(tickets: Tickets, options: argparse.Namespace, *, there: bool) -> None:
    """Print a note on how to get a noise floor, if a table for people lacks it.

    Args:
        tickets: of the study.
        options: of the verb.
        there: whether the table has two data orders of the same ticket.
    """
    if options.format == "table" and not there:
        missing = (
            "the tickets of other data orders are missing; find them with `tombola run`, whose --data-seeds-for names "
            "their importances"
        )
        none = "the study has one data order; find the tickets of others with `tombola run --data-seeds`"
        print_note(f"no noise floor: {missing if tickets.planner.repeats else none}")


def has_data_orders(table: pl.DataFrame) -> bool:
    """Return whether a table compares two data orders at its last level; level 0 is the same for all importances."""
    return bool((table.filter(table["level"] == table["level"].max())["kind"] == "data order").any())


def show_view(table: pl.DataFrame, form: str, view: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Print a table: in csv and json with all columns, on a terminal with a selection of them."""
    from tombola.cli.tables import show_frame

    show_frame(view(table) if form == "table" else table, form)


def _print_claims(evidence: Evidence, found: Sequence[Claim], tickets: Tickets, options: argparse.Namespace) -> None:
    """Print the three sentences, then each claim with its verdict, ours, chance, noise floor and the paper's number.

    Below a claim that is not testable is the command that makes the missing evidence, if there is one.
    """
    from tombola.analysis.claims import summarise
    from tombola.analysis.verdict import describe
    from tombola.cli.tables import wrap
    from tombola.study.controls import list_orders

    say(wrap(" ".join(summarise(found))))
    say()
    say(wrap(evidence.describe()))
    for claim in found:
        say(f"\n{claim.number:3} {wrap(claim.statement, 4)}")
        for name, text in describe(claim).items():
            say(wrap(f"    {name}: {text}", 6))
        if claim.needs:
            field, *values = claim.needs.split()
            if field == "reinit":
                command = _name_command(options, "reinit", "--level", *values, importances=evidence.compared)
            else:
                known = tickets.study.data_seeds or [max(_FIRST_ORDER, *list_orders(tickets.study, 1))]
                orders = {"data_seeds": known} if field == "data_seeds_for" else {}
                command = _name_command(options, "run", **orders, **{field: values})
            say(f"    to test it: {command}")  # in one line, which can be copied
    if any(claim.needs for claim in found):
        say("\nGive `claims` the options of such a command, too.")


def _print_uniqueness(
    sentences: Sequence[str],
    missing: Sequence[str],
    trained: Sequence[str],
    level: int,
    options: argparse.Namespace,
) -> None:
    """Print up to what tickets are unique, and the commands that tell the rest.

    Args:
        sentences: what is known.
        missing: the names of the analyses that tell the rest.
        trained: the names of those that `claims` can do without further trainings.
        level: the level whose tickets are compared.
        options: of the verb.
    """
    from tombola.cli.tables import wrap

    say("\nUnique up to what?")
    for sentence in sentences:
        say(wrap(f"  - {sentence}", 4))
    at = ("--level", str(level))
    limits = [word for name, value in _limits(options).items() for word in (f"--{name}", str(value))]
    for name in missing:
        verb, words = name, at if name == "controls" else ()
        if name in trained:
            verb, words = "claims", ("--with", *options.asked, name, *at, *limits)
        say(f"  - Not known is {_UNKNOWN[name]}; run\n    {_name_command(options, verb, *words)}")


def _limits(options: argparse.Namespace) -> dict[str, Any]:
    """Return those of `_LIMITS` that are given."""
    return {name: value for name in _LIMITS if (value := getattr(options, name)) is not None}


def _name_command(options: argparse.Namespace, verb: str, *words: str, **fields: Any) -> str:
    """Return a command for the study of these options, with other values of some of its fields."""
    from tombola.workbench.pictures import flags

    places = ["--store", str(options.store)] if options.store != STORE else []
    places += ["--data", str(options.data)] if options.data is not None else []
    return shlex.join(["tombola", verb, options.study, *words, *flags(overrides(options) | fields), *places])


def _overlap_by_level(table: pl.DataFrame, total: str = "(all)") -> pl.DataFrame:
    """Return one row for each level: overlap of all tickets, of pairs and by chance, and the noise floor.

    Args:
        table: of `tombola.analysis.overlap`.
        total: the layers together that the overlap is about, see `tombola.analysis.gather`.
    """
    import polars as pl

    from tombola.analysis import overlap
    from tombola.analysis.gather import DATA_ORDER, IMPORTANCES
    from tombola.cli.tables import percent

    means = overlap.summarise(table.filter(pl.col("layer") == total), "kind", "k", "level")
    by_importance = means.filter(pl.col("kind") == IMPORTANCES)
    largest = max(by_importance["k"].to_list(), default=0)
    together = by_importance.filter(pl.col("k") == largest)
    pairs = by_importance.filter(pl.col("k") == 2)
    floor = means.filter((pl.col("kind") == DATA_ORDER) & (pl.col("k") == 2))
    jaccard = ("level", "jaccard", "layers_jaccard")
    lines = (
        together.drop("jaccard", "layers_jaccard")
        .join(pairs.select(*jaccard), on="level", how="right")
        .join(floor.select(*jaccard), on="level", how="left", suffix="_floor")
        .sort("level")
        .with_columns(sparsity=1 - pl.col("density"))
    )
    return lines.select(
        pl.col("level"),
        percent("sparsity").alias("sparsity %"),
        percent("shared_of_ticket").alias(f"% of a ticket shared by {largest}"),
        percent("layers_expected").alias("chance: layers"),
        percent("global_expected").alias("chance: density"),
        percent("jaccard").alias("Jaccard % of two importances"),
        percent("layers_jaccard").alias("chance"),
        percent("jaccard_floor").alias("noise floor: of two data orders"),
        percent("layers_jaccard_floor").alias("chance "),
    )


def _overlap_at_levels(table: pl.DataFrame) -> pl.DataFrame:
    """Return every comparison over all layers; layer by layer only the overlap of all tickets and the noise floor."""
    import polars as pl

    from tombola.analysis import overlap
    from tombola.analysis.gather import ALL, DATA_ORDER, IMPORTANCES, PRUNABLE
    from tombola.cli.tables import number, percent, percent_range

    largest = max(table.filter(pl.col("kind") == IMPORTANCES)["k"].to_list(), default=0)
    detailed = (pl.col("k") == largest) | (pl.col("kind") == DATA_ORDER)
    return overlap.relative_to_ticket(table.filter(pl.col("layer").is_in([ALL, PRUNABLE]) | detailed)).select(
        *("level", "seed", "kind", "tickets", "layer", "connections", "shared"),
        percent("shared_of_ticket").alias("% of a ticket"),
        percent("layers_expected").alias("chance: layers"),
        percent_range("layers_low", "layers_high").alias("95 %"),
        percent("global_expected").alias("chance: density"),
        percent_range("global_low", "global_high").alias("95 % "),
        percent("jaccard").alias("Jaccard %"),
        number("kappa").alias("kappa"),
    )


def _layers(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each ticket and layer, with means over seeds."""
    import polars as pl

    from tombola.analysis import layers
    from tombola.cli.tables import percent

    return layers.summarise(table).select(
        *("level", "importance", "layer", "connections"),
        percent("density").alias("density %"),
        percent("ahead", sign=True).alias("sparser than the network, points"),
        percent("effective_density").alias("effective density %"),
        pl.when(pl.col("collapsed") > 0)
        .then(pl.format("{} of {} seeds", "collapsed", "seeds"))
        .otherwise(pl.lit(""))
        .alias("collapsed"),
    )


def _stability(table: pl.DataFrame) -> pl.DataFrame:
    from tombola.cli.tables import number

    return table.select(
        *("level", "importance", "seed", "layer", "measure", "shared", "other"),
        number("shared_mean", "{:.4g}"),
        number("other_mean", "{:.4g}"),
        number("shared_q50", "{:.4g}").alias("shared median"),
        number("other_q50", "{:.4g}").alias("other median"),
        number("effect", "{:+.3f}"),
        number("p", "{:.2g}"),
    )


def _winners(measure: Measure, table: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    from tombola.cli.tables import figure, figure_range, percent

    return table.with_columns(sparsity=1 - pl.col("density")).select(
        *("importance", "level"),
        percent("sparsity").alias("sparsity %"),
        "seeds",
        figure(f"dense_{measure.name}", measure).alias(f"dense {measure.heading}"),
        figure(measure.name, measure).alias(measure.heading),
        figure("difference", measure, sign=True).alias("difference, points" if measure.percent else "difference"),
        figure_range("low", "high", measure).alias("95 %"),
        pl.when("surely").then(pl.lit("yes")).otherwise(pl.lit("no")).alias("surely within the margin"),
    )


def _weights(table: pl.DataFrame) -> pl.DataFrame:
    from tombola.cli.tables import number

    figures = ("min", "q05", "q25", "q50", "q75", "q95", "max")
    return table.select(
        *("level", "importance", "seed", "quantity", "layer", "count"), *(number(name, "{:.4g}") for name in figures)
    )


def _functions(table: pl.DataFrame) -> pl.DataFrame:
    from tombola.cli.tables import number, percent, percent_range

    return table.select(
        *("level", "seed", "kind", "tickets"),
        percent("agreement").alias("agreement %"),
        percent_range("low", "high").alias("95 %"),
        number("kappa"),
        percent("accuracy").alias("mean accuracy %"),
        percent("ensemble_accuracy").alias("ensemble accuracy %"),
    )


def _connectivity(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each pair of tickets."""
    from tombola.analysis import connectivity
    from tombola.cli.tables import percent

    return connectivity.summarise(table).select(
        *("level", "seed", "kind", "tickets"),
        percent("first").alias("error of the first %"),
        percent("second").alias("error of the second %"),
        percent("highest").alias("highest on the line %"),
        percent("barrier").alias("barrier, points"),
    )


def _reinit(table: pl.DataFrame) -> pl.DataFrame:
    from tombola.cli.tables import number, percent, percent_range

    return table.select(
        *("level", "importance", "seed", "layer", "connections", "kept", "draws"),
        number("survived", "{:.1f}"),
        number("expected", "{:.1f}").alias("by chance"),
        percent("excess", 1, sign=True).alias("more than chance, %"),
        percent_range("low", "high", 1, sign=True).alias("95 %"),
        percent_range("chance_low", "chance_high", 1, sign=True).alias("one draw by chance, 95 %"),
    )

"""The verbs that output the tickets of a study: `results` and `export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tombola.cli.options import Verbs, open_planner, open_study, parse_path, whole_number
from tombola.errors import NothingStoredError, UserError
from tombola.terminal import say, visible

if TYPE_CHECKING:
    import polars as pl
    from rich.text import Text

    from tombola.analysis.accuracy import Cell, Row, Table2
    from tombola.study.schema import Study
    from tombola.study.tickets import Tickets
    from tombola.training.metrics import Measure


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    shown = verbs.add("results", results, verbs.study, verbs.table).add_mutually_exclusive_group()
    shown.add_argument(
        "--against",
        choices=("paper", "reference"),
        metavar="NAME",
        help="compare with the accuracies of the paper (paper), or with those that come with tombola (reference)",
    )
    shown.add_argument(
        "--reference",
        action="store_true",
        help="show only the accuracies that come with tombola for this preset; the store is not read",
    )
    added = verbs.add("export", export, verbs.study)
    added.add_argument("--importance", required=True, metavar="NAME", help="the importance of the ticket")
    added.add_argument("--seed", type=whole_number(0), required=True, metavar="N", help="the seed of the ticket")
    added.add_argument("--level", type=whole_number(0), required=True, metavar="N", help="the level of the ticket")
    added.add_argument("-o", "--output", type=parse_path, required=True, metavar="FILE", help="the file to write")
    added.add_argument("--trained", action="store_true", help="include the trained weights")


def results(options: argparse.Namespace) -> int:
    """Show the accuracy of every ticket (the paper's Table 2), or the first metric of the task."""
    from tombola.study.tickets import Tickets

    if options.reference:
        _show_reference(options)
    elif options.against:
        _show_comparison(options)
    else:
        show_results(Tickets(open_planner(options)), options.format)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write one ticket to a safetensors file: its mask, its rewound weights, and the study that it is from."""
    from tombola.files import check_output
    from tombola.study.chains import Chain
    from tombola.workbench.tickets import ticket_of

    with _begin_with("--output "):
        check_output(options.output)
    planner = open_planner(options)
    with _begin_with("--", ("importance: ", "seed: ", "level: ")):
        ticket = ticket_of(planner, options.importance, options.seed, options.level)
    ticket.save(options.output, trained=options.trained)
    chain = Chain(options.seed, options.importance)
    say(f"{options.output}: {chain}, level {ticket.level}, {ticket.mask.alive} of {ticket.mask.total} connections")
    return 0


def show_results(tickets: Tickets, form: str) -> None:
    """Print the stored results of a study.

    Raises:
        NothingStoredError: if the store has no result of the study.
    """
    from tombola.analysis.accuracy import rows
    from tombola.engine.machine import count_kinds, describe_kinds

    found = rows(tickets)
    kinds = describe_kinds(count_kinds(tickets.records().values()))
    if not found:
        raise NothingStoredError.of_study(tickets.planner.store.root)
    planner = tickets.planner
    expected = len(planner.chains) * (planner.study.levels + 1)
    if form == "table":
        _print_results(found, planner.study, planner.problem.data.name, planner.describe_counted())
        if len(found) < expected:
            say(f"the store has {len(found)} of {expected} tickets")
    else:
        _show_rows(found, form)
    if kinds:
        say(kinds, file=sys.stdout if form == "table" else sys.stderr)


def _show_reference(options: argparse.Namespace) -> None:
    """Print the published reference of a study; its store and its data set are not needed."""
    from tombola.analysis.reference import published

    with _begin_with("--reference: "):
        reference = published(open_study(options))
    about = reference.about
    if options.format == "table":
        _print_results(reference.tickets, reference.study, about["data"]["name"], about["counted"])
    else:
        _show_rows(reference.tickets, options.format)
    say(f"reference: {reference.source}", file=sys.stdout if options.format == "table" else sys.stderr)


def _show_comparison(options: argparse.Namespace) -> None:
    """Print the stored results of a study beside those of the paper, or of its published reference."""
    import polars as pl

    from tombola.analysis.reference import describe, of_study, paper, published
    from tombola.cli.tables import percent, show_frame
    from tombola.study.tickets import Tickets

    study = open_study(options)
    with _begin_with(f"--against {options.against}: "):
        reference = {"paper": paper, "reference": published}[options.against](study)  # before the data set is loaded
    planner = open_planner(options, study)
    with _begin_with(f"--against {options.against}: "):
        compared = of_study(Tickets(planner), reference)
    if options.format != "table":
        show_frame(compared, options.format)
        return
    table = compared.with_columns(twice=2 * pl.col("standard_error")).select(
        "importance",
        "level",
        _mean("accuracy", "std", "seeds").alias("ours (seeds)"),
        _mean("reference_accuracy", "reference_std", "reference_seeds").alias(f"{reference.name} (seeds)"),
        percent("difference", sign=True),
        percent("twice").alias("2 SE"),
        "verdict",
    )
    say(f"test accuracy in % on {planner.problem.data.name}, mean ± std; SE: standard error of the difference")
    show_frame(table, "table")
    say(describe(compared))
    say(f"{reference.name}: {reference.source}")


def _mean(accuracy: str, std: str, seeds: str) -> pl.Expr:
    """Return columns of means, standard deviations and numbers of seeds as text in percent."""
    import polars as pl

    from tombola.cli.tables import percent

    deviation = pl.when(pl.col(std).is_null()).then(pl.lit("")).otherwise(pl.lit("±") + percent(std))
    return percent(accuracy) + deviation + pl.format(" ({})", seeds)


@contextmanager
def _begin_with(option: str, starts: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Put an option, or only its dashes, before the message of a `UserError` that starts in one of these ways."""
    try:
        yield
    except NothingStoredError:
        raise  # it is not about the option
    except UserError as error:
        if not str(error).startswith(starts):
            raise
        raise UserError(f"{option}{error}") from error


def _show_rows(found: Sequence[Row], form: str) -> None:
    """Print results as csv or json."""
    from tombola.cli.tables import emit, show_table

    if form == "json":
        emit(json.dumps([row.to_json() for row in found], indent=1))
    else:
        lines = [row.to_json() for row in found]
        show_table(list(lines[0]), [list(line.values()) for line in lines], form)


def _print_results(found: Sequence[Row], study: Study, data: str, counted: str) -> None:
    """Print results as a table.

    Args:
        found: the results.
        study: whose they are.
        data: the name of its data set.
        counted: see `Planner.describe_counted`.
    """
    from tombola.analysis.accuracy import table2
    from tombola.cli.tables import wrap

    table = table2(found, study.importances)
    seeds = f"mean ± std over {len(study.seeds)} seeds" if len(study.seeds) > 1 else f"seed {study.seeds[0]}"
    best = "; best " + ("bold" if sys.stdout.isatty() else "*") if len(study.importances) > 1 else ""
    measure = table.measure
    if best and not measure.higher_is_better:
        best += " (lowest)"
    say(f"{measure.split} {measure.label}{' in %' if measure.percent else ''} on {data}, {seeds}{best}")
    _print_table2(table, study.importances, len(study.seeds))
    say(wrap(counted))
    diverged: dict[str, list[str]] = {}
    for (level, importance), cell in table.cells.items():
        if cell.diverged:
            diverged.setdefault(importance, []).append(f"{level} ({cell.diverged} of {len(study.seeds)} seeds)")
    for importance, levels in diverged.items():
        say(f"diverged, {importance}: level {', '.join(levels)}; these chains end there")
    for importance, layers in table.collapses.items():
        text = ", ".join(f"{layer} from level {level}" for layer, level in layers.items())
        say(f"collapsed layers, {importance}: {text}")


def _print_table2(results: Table2, importances: Sequence[str], seeds: int) -> None:
    """Print the columns of some importances; in several tables if one would be too wide for the terminal."""
    from tombola.cli.tables import print_table, too_wide
    from tombola.workbench.text import empty_table

    plain = not sys.stdout.isatty()
    table = empty_table()
    for title in ("level", "sparsity", *importances):
        table.add_column(visible(title), justify="right")
    for level, density in results.levels:
        best = results.best(level)
        cells = [_cell(results.cells[level, name], results.measure, name in best, plain, seeds) for name in importances]
        table.add_row(str(level), f"{100 * (1 - density):.2f}", *cells)
    half = len(importances) // 2
    if half and too_wide(table):
        _print_table2(results, importances[:-half], seeds)
        _print_table2(results, importances[-half:], seeds)
    else:
        print_table(table)


def _cell(cell: Cell, measure: Measure, best: bool, plain: bool, seeds: int) -> Text:
    from rich.text import Text

    from tombola.cli.tables import BLANK

    there = len(cell.values)
    if cell.mean is None:
        return Text(("diverged" if cell.diverged else "-") + (BLANK if plain else ""))
    text = measure.figure(cell.mean) + (f"±{measure.spread(cell.std)}" if cell.std is not None else "")
    text += f" ({there} of {seeds})" if there < seeds else ""
    return Text(text + (("*" if best else BLANK) if plain else ""), style="bold" if best else "")

"""The verbs that output the tickets of a study: `results` and `export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tombola.cli.options import Verbs, open_planner, whole_number
from tombola.errors import NothingStoredError, UserError

if TYPE_CHECKING:
    from rich.text import Text

    from tombola.analysis.accuracy import Cell, Row, Table2
    from tombola.study.planner import Planner
    from tombola.study.tickets import Tickets


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    verbs.add("results", results, verbs.study, verbs.table)
    added = verbs.add("export", export, verbs.study)
    added.add_argument("--importance", required=True, metavar="NAME", help="the importance of the ticket")
    added.add_argument("--seed", type=whole_number(0), required=True, metavar="N", help="the seed of the ticket")
    added.add_argument("--level", type=whole_number(0), required=True, metavar="N", help="the level of the ticket")
    added.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    added.add_argument("--trained", action="store_true", help="include the trained weights")


def results(options: argparse.Namespace) -> int:
    """Show the accuracy of every ticket (the paper's Table 2)."""
    from tombola.study.tickets import Tickets

    show_results(Tickets(open_planner(options)), options.format)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write one ticket to a safetensors file: its mask, its rewound weights, and the study that it is from."""
    from tombola.study.planner import Chain

    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}; make it first")
    planner = open_planner(options)
    study = planner.study
    known: Sequence[str | int]
    for what, value, known in (
        ("importance", options.importance, study.importances),
        ("seed", options.seed, study.seeds),
    ):
        if value not in known:
            raise UserError(f"--{what}: the study has no {what} {value!r}, it has {', '.join(map(str, known))}")
    if options.level > study.levels:
        raise UserError(f"--level: the study has no level {options.level}, it has levels 0 to {study.levels}")
    chain = Chain(options.seed, options.importance)
    progress = planner.progress(chain)
    if options.level >= len(progress.tickets):
        there = f"levels 0 to {len(progress.tickets) - 1} are" if progress.tickets else "none of its levels is"
        ended = progress.stopped or "its training diverged"
        cure = "`tombola run` finds the rest" if progress.waits_for else f"it ends there ({ended})"
        raise UserError(f"--level: level {options.level} of {chain} is not in {planner.store.root}, {there}; {cure}")
    ticket = progress.tickets[options.level]
    ticket.save(options.output, trained=options.trained)
    print(f"{options.output}: {chain}, level {ticket.level}, {ticket.mask.alive} of {ticket.mask.total} connections")
    return 0


def show_results(tickets: Tickets, form: str) -> None:
    """Print the stored results of a study.

    Raises:
        NothingStoredError: if the store has no result of the study.
    """
    from tombola.analysis.accuracy import Row, rows
    from tombola.cli.tables import show_table
    from tombola.engine.machine import count_kinds, describe_kinds

    found = rows(tickets)
    kinds = describe_kinds(count_kinds(tickets.records().values()))
    if not found:
        raise NothingStoredError(f"no result of this study is in {tickets.planner.store.root}")
    if form == "json":
        print(json.dumps([row.to_json() for row in found], indent=1))
    elif form == "csv":
        names = list(Row.__dataclass_fields__)
        show_table(names, [[getattr(row, name) for name in names] for row in found], "csv")
    else:
        _print_results(tickets.planner, found)
    if kinds:
        print(kinds, file=sys.stdout if form == "table" else sys.stderr)


def _print_results(planner: Planner, found: Sequence[Row]) -> None:
    from tombola.analysis.accuracy import table2

    study = planner.study
    table = table2(found, study.importances)
    seeds = f"mean ± std over {len(study.seeds)} seeds" if len(study.seeds) > 1 else f"seed {study.seeds[0]}"
    best = "; best " + ("bold" if sys.stdout.isatty() else "*") if len(study.importances) > 1 else ""
    print(f"test accuracy in % on {planner.problem.data.name}, {seeds}{best}")
    _print_table2(table, study.importances, len(study.seeds))
    print(planner.describe_counted())
    expected = len(planner.chains) * (study.levels + 1)
    diverged: dict[str, list[str]] = {}
    for (level, importance), cell in table.cells.items():
        if cell.diverged:
            diverged.setdefault(importance, []).append(f"{level} ({cell.diverged} of {len(study.seeds)} seeds)")
    for importance, levels in diverged.items():
        print(f"diverged, {importance}: level {', '.join(levels)}; these chains end there")
    for importance, layers in table.collapses.items():
        text = ", ".join(f"{layer} from level {level}" for layer, level in layers.items())
        print(f"collapsed layers, {importance}: {text}")
    if len(found) < expected:
        print(f"the store has {len(found)} of {expected} tickets")


def _print_table2(results: Table2, importances: Sequence[str], seeds: int) -> None:
    """Print the columns of some importances; in several tables if one would be too wide for the terminal."""
    from tombola.cli.tables import empty_table, print_table, too_wide

    plain = not sys.stdout.isatty()
    table = empty_table()
    for title in ("level", "sparsity", *importances):
        table.add_column(title, justify="right")
    for level, density in results.levels:
        best = results.best(level)
        cells = [_cell(results.cells[level, name], name in best, plain, seeds) for name in importances]
        table.add_row(str(level), f"{100 * (1 - density):.2f}", *cells)
    half = len(importances) // 2
    if half and too_wide(table):
        _print_table2(results, importances[:-half], seeds)
        _print_table2(results, importances[-half:], seeds)
    else:
        print_table(table)


def _cell(cell: Cell, best: bool, plain: bool, seeds: int) -> Text:
    from rich.text import Text

    from tombola.cli.tables import BLANK

    there = len(cell.accuracies)
    if cell.mean is None:
        return Text(("diverged" if cell.diverged else "-") + (BLANK if plain else ""))
    text = f"{100 * cell.mean:.2f}" + (f"±{100 * cell.std:.2f}" if cell.std is not None else "")
    text += f" ({there} of {seeds})" if there < seeds else ""
    return Text(text + (("*" if best else BLANK) if plain else ""), style="bold" if best else "")

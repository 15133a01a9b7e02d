"""Display: tables and live progress, on a terminal or plain."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tombola.analysis.accuracy import Cell, Row, Table2, rows, table2
from tombola.engine.estimate import estimate
from tombola.engine.machine import count_kinds, describe_kinds
from tombola.engine.run import Status
from tombola.errors import NothingStoredError
from tombola.lottery.ticket import Ticket
from tombola.study.planner import Chain, Planner
from tombola.study.tickets import Tickets
from tombola.study.trainings import Training

_NO_STAR = "\ue000"
"""Stands where others have a star; rich would take a space away, and align the rest."""


def _console() -> Console:
    """Return a console that is as wide as the terminal, or as whatever is printed needs where there is none."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def show_table(header: Sequence[str], lines: Sequence[Sequence[Any]], form: str) -> None:
    """Print a table as a table, csv or json; csv and json have the header's words joined by `_`."""
    keys = [title.replace(" ", "_") for title in header]
    if form == "json":
        print(json.dumps([dict(zip(keys, line, strict=True)) for line in lines], indent=1))
    elif form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([keys, *([_in_csv(value) for value in line] for line in lines)])
        print(out.getvalue(), end="")
    else:
        table = _table()
        for title, values in zip(header, zip(*lines, strict=True), strict=True):
            table.add_column(title, justify="right" if all(isinstance(value, int) for value in values) else "left")
        for line in lines:
            table.add_row(*map(str, line))
        _print(table)


def _in_csv(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else value


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _print(table: Table) -> None:
    console = _console()
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().replace(_NO_STAR, " ").splitlines()
    print("\n".join(line.rstrip().removeprefix(" ") for line in lines if line.strip()))


def show_results(tickets: Tickets, form: str) -> None:
    """Print the results of a study that are there.

    Raises:
        NothingStoredError: where none is.
    """
    found = rows(tickets)
    if not found:
        raise NothingStoredError(f"no result of this study is in {tickets.planner.store.root}")
    if form == "json":
        print(json.dumps([row.to_json() for row in found], indent=1))
    elif form == "csv":
        names = list(Row.__dataclass_fields__)
        show_table(names, [[getattr(row, name) for name in names] for row in found], "csv")
    else:
        _print_results(tickets.planner, found)
        if kinds := describe_kinds(count_kinds(tickets.records().values())):
            print(kinds)


def _print_results(planner: Planner, found: Sequence[Row]) -> None:
    study = planner.study
    table = table2(found, study.importances)
    seeds = f"mean ± sd over {len(study.seeds)} seeds" if len(study.seeds) > 1 else f"seed {study.seeds[0]}"
    best = "; best " + ("bold" if sys.stdout.isatty() else "*") if len(study.importances) > 1 else ""
    print(f"test accuracy in % on {planner.problem.data.name}, {seeds}{best}")
    _print_table2(table, study.importances, len(study.seeds))
    expected = len(planner.chains) * (study.levels + 1)
    diverged: dict[str, list[str]] = {}
    for (level, importance), cell in table.cells.items():
        if cell.diverged:
            diverged.setdefault(importance, []).append(f"{level} ({cell.diverged} of {len(study.seeds)} seeds)")
    for importance, levels in diverged.items():
        print(f"diverged, {importance}: level {', '.join(levels)}; there is nothing to prune by after that")
    for importance, layers in table.collapses.items():
        text = ", ".join(f"{layer} from level {level}" for layer, level in layers.items())
        print(f"collapsed layers, {importance}: {text}")
    if len(found) < expected:
        print(f"{len(found)} of {expected} tickets are there")


def _print_table2(results: Table2, importances: Sequence[str], seeds: int) -> None:
    """Print the columns of some importances; in several tables where one would be too wide for the terminal."""
    plain = not sys.stdout.isatty()
    table = _table()
    for title in ("level", "sparsity", *importances):
        table.add_column(title, justify="right")
    for level, density in results.levels:
        best = results.best(level)
        cells = [_cell(results.cells[level, name], name in best, plain, seeds) for name in importances]
        table.add_row(str(level), f"{100 * (1 - density):.2f}", *cells)
    console = _console()
    half = len(importances) // 2
    if half and Measurement.get(console, console.options.update(max_width=10_000), table).maximum > console.width:
        _print_table2(results, importances[:-half], seeds)
        _print_table2(results, importances[-half:], seeds)
    else:
        _print(table)


def _cell(cell: Cell, best: bool, plain: bool, seeds: int) -> Text:
    count = len(cell.accuracies)
    if cell.mean is None:
        return Text(("diverged" if cell.diverged else "-") + (_NO_STAR if plain else ""))
    text = f"{100 * cell.mean:.2f}" + (f"±{100 * cell.sd:.2f}" if cell.sd is not None else "")
    text += f" ({count} of {seeds})" if count < seeds else ""
    return Text(text + (("*" if best else _NO_STAR) if plain else ""), style="bold" if best else "")


def show_plan(planner: Planner, workers: int, form: str, data: Path | None = None) -> None:
    """Print what a run would train, what exists, and the time and disk it will take."""
    expected = estimate(planner, workers, data)
    lines = [
        [chain.importance, chain.seed, chain.seed if chain.data_seed is None else chain.data_seed, there, to_find]
        for chain, there, to_find in expected.chains
    ]
    header = ["importance", "seed", "data seed", "tickets there", "tickets to find"]
    if form == "json":
        keys = [title.replace(" ", "_") for title in header]
        document = {
            "existing": expected.existing,
            "to_train": expected.to_train,
            "seconds_per_training": expected.seconds_each,
            "seconds": expected.seconds,
            "critical_seconds": expected.critical[1] if expected.critical else 0.0,
            "critical_chain": str(expected.critical[0]) if expected.critical else None,
            "workers": workers,
            "bytes": expected.bytes,
            "chains": [dict(zip(keys, line, strict=True)) for line in lines],
        }
        print(json.dumps(document, indent=1))
        return
    show_table(header, lines, form)
    if form == "csv":
        return
    if not expected.to_train:
        print(f"all {expected.existing} trainings are in {planner.store.root}: nothing is left to do")
        return
    print(f"{_counted(expected.to_train, 'training')} to do, {expected.existing} in {planner.store.root} already")
    print(f"time: about {duration(expected.seconds)} on {_counted(workers, 'worker')}, ", end="")
    print(f"{duration(expected.seconds_each)} a training ({expected.source})")
    if expected.critical:
        chain, seconds = expected.critical
        print(f"critical path: {chain}, {duration(seconds)} however many workers there are")
    print(f"disk: about {size(expected.bytes)}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def duration(seconds: float) -> str:
    """Return a duration as people say it.

    >>> duration(3.21), duration(75), duration(7320), duration(200000)
    ('3.2 s', '1 min 15 s', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for big, small, length, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= length:
            return f"{int(seconds // length)} {big} {int(seconds % length // part)} {small}"
    raise AssertionError


def size(count: float) -> str:
    """Return a number of bytes as people say it.

    >>> size(1_234_567)
    '1.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def showing(planner: Planner) -> Iterator[Callable[[Status, Training | None], None]]:
    """Show a run's progress: live on a terminal, otherwise one line a training."""
    told = 0

    def tell_notes(status: Status) -> None:
        nonlocal told
        for note in status.notes[told:]:
            print(f"tombola: {note}", file=sys.stderr)
        told = len(status.notes)

    if not sys.stdout.isatty():

        def print_line(status: Status, finished: Training | None) -> None:
            tell_notes(status)
            if finished is not None:
                print(_line(status, finished, planner), flush=True)

        yield print_line
        return
    console = _console()
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def draw(status: Status, finished: Training | None) -> None:
            tell_notes(status)
            live.update(_live(status, planner, console.height))

        yield draw


def _line(status: Status, finished: Training, planner: Planner) -> str:
    count = f"[{status.done}/{status.total}]"
    left = f", {duration(status.seconds_left)} left" if status.seconds_left and status.done < status.total else ""
    found = {}
    for chain, progress in status.chains.items():
        seed = chain.seed if chain.data_seed is None else chain.data_seed
        for ticket in progress.tickets[-1:]:
            arguments = ticket.mask, ticket.rewind.hash, seed, planner.end
            if arguments == (finished.mask, finished.initial.hash, finished.seed, finished.end):
                found[chain] = ticket
    if not found:
        return f"{count} seed {finished.seed}: rewind point{left}"
    chain, ticket = next(iter(found.items()))
    names = ", ".join(chain.importance for chain in found)
    order = "" if chain.data_seed is None else f", data order {chain.data_seed}"
    where = f"seed {chain.seed}{order}, level {ticket.level}, density {100 * ticket.mask.density:.2f} %"
    return f"{count} {where}: {_accuracy(ticket)} ({names}){left}"


def _accuracy(ticket: Ticket) -> str:
    accuracy = ticket.trained.history.test_accuracy if ticket.trained else None
    return "diverged" if accuracy is None else f"accuracy {100 * accuracy:.2f} %"


def _live(status: Status, planner: Planner, height: int) -> Group:
    """Draw how far a run is: trainings done of all, and of each chain the last ticket and what is under way.

    Where there are more chains than lines on the terminal, those at work come first and the rest is left out.
    """
    bar = Table.grid(padding=(0, 1))
    left = "" if status.seconds_left is None else f"{duration(status.seconds_left)} left"
    progress_bar = ProgressBar(total=max(1, status.total), completed=status.done, width=30)
    bar.add_row(f"{status.done} of {status.total} trainings", progress_bar, left)
    table = _table()
    for title in ("importance", "seed", "level", "last ticket", "now"):
        table.add_column(title, justify="right" if title in ("seed", "level") else "left", no_wrap=True)
    chains = list(status.chains)
    lines = max(1, height - 5)
    if len(chains) > lines:
        chains.sort(key=lambda chain: not _running(status, chain))
    for chain in chains[:lines]:
        tickets = status.chains[chain].tickets
        order = "" if chain.data_seed is None else f", order {chain.data_seed}"
        level = f"{tickets[-1].level} of {planner.study.levels}" if tickets else "-"
        last = _accuracy(tickets[-1]) if tickets else "-"
        table.add_row(chain.importance + order, str(chain.seed), level, last, _running(status, chain))
    return Group(bar, table)


def _running(status: Status, chain: Chain) -> str:
    """Say how far the training is that a chain waits for; empty where it does not run."""
    waits_for = status.chains[chain].waits_for
    if waits_for is None or waits_for.key not in status.running:
        return ""
    training, iteration = status.running[waits_for.key]
    return f"training: {100 * (iteration - training.begin) // max(1, training.end - training.begin)} %"

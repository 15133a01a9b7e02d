"""Display: tables and live progress, on a terminal or plain."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tombola.engine.estimate import Estimate, estimate
from tombola.engine.run import Status
from tombola.errors import UserError
from tombola.planning import Chain, Planner, Training
from tombola.results import Cell, Row, rows, table2
from tombola.store import DamagedResultError


def _console(stream: Any = None) -> Console:
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False, soft_wrap=False)


def show_table(header: Sequence[str], lines: Sequence[Sequence[Any]], form: str) -> None:
    """Print a table as a table, csv or json."""
    if form == "json":
        keys = [title.split(" ")[0] for title in header]
        print(json.dumps([dict(zip(keys, line, strict=True)) for line in lines], indent=1))
    elif form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([[title.split(" ")[0] for title in header], *lines])
        print(out.getvalue(), end="")
    else:
        table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
        for line in lines:
            table.add_row(*map(str, line))
        _print(table)


def _print(table: Table) -> None:
    console = _console()
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))


def show_results(planner: Planner, form: str) -> None:
    """Print the results of a study that are there."""
    try:
        found = rows(planner)
    except DamagedResultError as damage:
        raise UserError(f"store {planner.store.root}: {damage}; `tombola run` does it again") from damage
    if form == "json":
        print(json.dumps([row.to_json() for row in found], indent=1))
    elif form == "csv":
        _csv(found)
    else:
        _print_table2(planner, found)


def _csv(found: Sequence[Row]) -> None:
    names = list(Row.__dataclass_fields__)
    lines = [[*(getattr(row, name) for name in names[:-1]), " ".join(row.collapsed)] for row in found]
    show_table(names, lines, "csv")


def _print_table2(planner: Planner, found: Sequence[Row]) -> None:
    study = planner.study
    expected = len(planner.chains) * (study.levels + 1)
    if not found:
        print(f"no result of this study is in {planner.store.root}; do its trainings with: tombola run")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("level", justify="right")
    table.add_column("sparsity %", justify="right")
    for importance in study.importances:
        table.add_column(importance, justify="right")
    results = table2(found, study.importances)
    plain = not sys.stdout.isatty()
    for level, density in results.levels:
        best = results.best(level)
        cells = [_cell(results.cells[level, name], name in best, plain) for name in study.importances]
        table.add_row(str(level), f"{100 * (1 - density):.2f}", *cells)
    data = planner.problem.data
    print(
        f"test accuracy in % on {data.name}: mean ± sd over {len(study.seeds)} seeds; best {'*' if plain else 'bold'}"
    )
    _print(table)
    if len(found) < expected:
        print(f"not finished: {len(found)} of {expected} tickets are there")
    for (level, importance), cell in results.cells.items():
        if cell.diverged:
            print(f"diverged: {importance}, level {level}, {cell.diverged} of {len(study.seeds)} seeds")
    _print_collapse(found, study.importances)


def _print_collapse(found: Sequence[Row], importances: Sequence[str]) -> None:
    """Say which layers have no connection left, from which level on."""
    for importance in importances:
        first: dict[str, int] = {}
        for row in found:
            for layer in row.collapsed if row.importance == importance else ():
                first[layer] = min(row.level, first.get(layer, row.level))
        if first:
            layers = ", ".join(f"{layer} from level {level}" for layer, level in first.items())
            print(f"collapsed layers, {importance}: {layers}")


def _cell(cell: Cell, best: bool, plain: bool) -> Text:
    if cell.mean is None:
        return Text("diverged" if cell.diverged else "-")
    text = f"{100 * cell.mean:.2f}" + (f" ± {100 * cell.sd:.2f}" if cell.sd is not None else "")
    if plain:
        return Text(text + ("*" if best else " "))
    return Text(text, style="bold" if best else "")


def show_plan(planner: Planner, workers: int, form: str) -> None:
    """Print what a run would train, what exists, and the time and disk it will take."""
    expected = estimate(planner, workers)
    if form != "table":
        lines = [
            [chain.importance, chain.seed, chain.data_seed, done, missing] for chain, done, missing in expected.chains
        ]
        document = {
            "existing": expected.existing,
            "to_train": expected.to_train,
            "seconds_per_training": expected.seconds_each,
            "seconds": expected.seconds,
            "workers": workers,
            "bytes": expected.bytes,
        }
        if form == "json":
            keys = ("importance", "seed", "data_seed", "existing", "to_train")
            print(json.dumps(document | {"chains": [dict(zip(keys, line, strict=True)) for line in lines]}, indent=1))
        else:
            show_table(["importance", "seed", "data_seed", "existing", "to_train"], lines, "csv")
        return
    _print_plan(planner, expected, workers)


def _print_plan(planner: Planner, expected: Estimate, workers: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("importance", "seed", "data order", "tickets there", "to find"):
        table.add_column(title, justify="left" if title == "importance" else "right")
    for chain, existing, missing in expected.chains:
        table.add_row(
            chain.importance, str(chain.seed), str(chain.data_seed or chain.seed), str(existing), str(missing)
        )
    _print(table)
    print(f"trainings that exist: {expected.existing}, to do: {expected.to_train}")
    if expected.to_train:
        print(f"each takes about {duration(expected.seconds_each)} ({expected.source})")
        print(f"all take about {duration(expected.seconds)} on {workers} workers")
        print(f"and about {size(expected.bytes)} of disk in {planner.store.root}")


def duration(seconds: float) -> str:
    """Return a duration as people say it.

    >>> duration(3.21), duration(75), duration(7320), duration(200000)
    ('3.2 s', '1 min 15 s', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
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
    with Live(console=_console(), refresh_per_second=4, transient=True) as live:

        def draw(status: Status, finished: Training | None) -> None:
            tell_notes(status)
            live.update(_live(status, planner))

        yield draw


def _line(status: Status, finished: Training, planner: Planner) -> str:
    where = []
    for chain, progress in status.chains.items():
        for ticket in progress.tickets[-1:]:
            seed = chain.seed if chain.data_seed is None else chain.data_seed
            if ticket.mask == finished.mask and seed == finished.seed and finished.end == planner.end:
                assert ticket.trained is not None
                where.append((chain, ticket.level, ticket.mask.density, ticket.trained.history.test_accuracy))
    left = (
        "" if status.seconds_left is None or status.done >= status.total else f", {duration(status.seconds_left)} left"
    )
    count = f"[{status.done}/{status.total}]"
    if not where:
        return f"{count} seed {finished.seed}: rewind point{left}"
    names = ", ".join(chain.importance for chain, *_ in where)
    chain, level, density, accuracy = where[0]
    names += "" if chain.data_seed is None else f" in another data order, {chain.data_seed}"
    result = "diverged" if accuracy is None else f"accuracy {100 * accuracy:.2f} %"
    return f"{count} seed {chain.seed}, level {level}, density {100 * density:.2f} %: {result} ({names}){left}"


def _live(status: Status, planner: Planner) -> Group:
    bar = Table.grid(padding=(0, 1))
    left = "" if status.seconds_left is None else f"{duration(status.seconds_left)} left"
    bar.add_row(
        f"{status.done} of {status.total} trainings",
        ProgressBar(total=max(1, status.total), completed=status.done, width=40),
        left,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("seed", justify="right")
    for importance in planner.study.importances:
        table.add_column(importance)
    for seed in planner.study.seeds:
        cells = [_chain_cell(Chain(seed, importance), status) for importance in planner.study.importances]
        table.add_row(str(seed), *cells)
    for chain in planner.repeats:
        table.add_row(f"{chain.seed}, data order {chain.data_seed}", _chain_cell(chain, status))
    return Group(bar, table)


def _chain_cell(chain: Chain, status: Status) -> str:
    progress = status.chains[chain]
    text = "waiting"
    if progress.tickets:
        last = progress.tickets[-1]
        accuracy = last.trained.history.test_accuracy if last.trained else None
        text = f"level {last.level}: " + ("diverged" if accuracy is None else f"{100 * accuracy:.2f} %")
    if progress.waits_for is not None and progress.waits_for.key in status.running:
        training, iteration = status.running[progress.waits_for.key]
        text += f"  {100 * (iteration - training.begin) // max(1, training.end - training.begin)} %"
    return text

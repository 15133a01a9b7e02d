"""The progress of a run: a live display on a terminal and in a notebook, otherwise one line for each training."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tombola.engine.run import Show, Status
from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.study.trainings import Training
from tombola.terminal import say, visible
from tombola.workbench.text import count, duration, empty_table, open_console

_CELL_LINES, _CELL_WIDTH = 40, 100
"""The size of the display in a notebook's cell."""


@contextmanager
def show_progress(planner: Planner, workers: int) -> Iterator[Show]:
    """Show the progress of a run.

    Args:
        planner: the planner of the study.
        workers: the number of workers.
    """
    printed = 0

    def print_notes(status: Status) -> None:
        nonlocal printed
        for note in status.notes[printed:]:
            say(f"tombola: {note}", file=sys.stderr)
        printed = len(status.notes)

    if (cell := _open_cell()) is not None:

        def draw_cell(status: Status, finished: Training | None) -> None:
            print_notes(status)
            cell(live_display(status, planner, _CELL_LINES, workers))

        yield draw_cell
        return
    if not sys.stdout.isatty():
        begun = False

        def print_lines(status: Status, finished: Training | None) -> None:
            nonlocal begun
            print_notes(status)
            if not begun and (text := expectation(status, workers)):
                say(text, flush=True)
            begun = True
            if finished is not None:
                say(line(status, finished, planner), flush=True)

        yield print_lines
        return
    console = open_console()
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def draw(status: Status, finished: Training | None) -> None:
            print_notes(status)
            live.update(live_display(status, planner, console.height, workers))

        yield draw


@contextmanager
def show_nothing() -> Iterator[Show]:
    """Show nothing of a run."""
    yield lambda status, finished: None


def _open_cell() -> Callable[[Group], None] | None:
    """Return a function that replaces the output of a notebook's cell; None if this is no notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    shown = ""

    def draw(group: Group) -> None:
        nonlocal shown
        file = io.StringIO()
        Console(file=file, width=_CELL_WIDTH, color_system=None, force_jupyter=False, highlight=False).print(group)
        if (text := file.getvalue().rstrip()) != shown:
            handle.update({"text/plain": text}, raw=True)
            shown = text

    return draw


def expectation(status: Status, workers: int) -> str:
    """Return a line with the expected duration of a run; empty if it is not known or nothing is to be done."""
    if status.seconds_left is None or not status.total:
        return ""
    return f"{count(status.total, 'training')}: about {duration(status.seconds_left)} on {count(workers, 'worker')}"


def line(status: Status, finished: Training, planner: Planner) -> str:
    """Return the line about a training that has just finished."""
    done = f"[{status.done}/{status.total}]"
    left = f", {duration(status.seconds_left)} left" if status.seconds_left and status.done < status.total else ""
    found = {}
    for chain, progress in status.chains.items():
        for ticket in progress.tickets[-1:]:
            there = any(training.key == finished.key for training in progress.trainings)
            if there and (ticket.mask, ticket.rewind.hash) == (finished.mask, finished.initial.hash):
                found[chain] = ticket
    if not found:
        return f"{done} seed {finished.seed}: rewind point{left}"
    chain, ticket = next(iter(found.items()))
    names = ", ".join(chain.importance for chain in found)
    order = "" if chain.data_seed is None else f", data order {chain.data_seed}"
    where = f"seed {chain.seed}{order}, level {ticket.level}, density {100 * ticket.mask.density:.2f} %"
    where += f", {finished.end - finished.begin} iterations" if finished.end < planner.end else ""
    return f"{done} {where}: {_result(ticket, planner)} ({names}){left}"


def live_display(status: Status, planner: Planner, height: int, workers: int) -> Group:
    """Return the live display: the number of finished trainings, and for each chain its last ticket and running
    training.

    If there are more chains than lines on the terminal, chains with a running training come first and others are left
    out.
    """
    bar = Table.grid(padding=(0, 1))
    left = f"about {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    progress_bar = ProgressBar(total=max(1, status.total), completed=status.done, width=20)
    on = f"on {count(workers, 'worker')}" if left else ""
    bar.add_row(f"{status.done} of {status.total} trainings", progress_bar, left, on)
    table = empty_table()
    for title in ("importance", "seed", "level", "last ticket", "now"):
        table.add_column(title, justify="right" if title in ("seed", "level") else "left", no_wrap=True)
    chains = list(status.chains)
    lines = max(1, height - 5)
    if len(chains) > lines:
        chains.sort(key=lambda chain: not _state(status, chain))
    for chain in chains[:lines]:
        tickets = status.chains[chain].tickets
        order = "" if chain.data_seed is None else f", order {chain.data_seed}"
        level = f"{tickets[-1].level} of {max(tickets[-1].level, planner.levels(chain)[-1])}" if tickets else "-"
        last = _result(tickets[-1], planner) if tickets else "-"
        table.add_row(visible(chain.importance) + order, str(chain.seed), level, last, _state(status, chain))
    return Group(bar, table)


def _result(ticket: Ticket, planner: Planner) -> str:
    """Return the value that a ticket is judged by, such as its accuracy."""
    if ticket.trained is None or ticket.trained.history.diverged_at is not None:
        return "diverged"
    measure = planner.problem.measure
    value = ticket.trained.history.value(measure)
    split = "" if measure.split == "test" else f"{measure.split} "
    return f"{split}{measure.label} {'unknown' if value is None else measure.text(value)}"


def _state(status: Status, chain: Chain) -> str:
    """Return the progress of the jobs that a chain waits for; empty if none is running."""
    running = [status.running[need.key] for need in status.chains[chain].needs if need.key in status.running]
    trainings = [(need, iteration) for need, iteration in running if isinstance(need, Training)]
    if not trainings:
        return "scoring" if running else ""
    reached = [100 * (at - each.begin) // max(1, each.end - each.begin) for each, at in trainings]
    return f"training: {', '.join(f'{each} %' for each in reached)}"

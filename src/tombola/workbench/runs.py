"""Running: do the trainings of a study that its store does not have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tombola import kernels
from tombola.cores import count_cores
from tombola.engine.estimate import prior_speed, recorded_speed
from tombola.engine.here import WorkersHere
from tombola.engine.local import LocalWorkers
from tombola.engine.run import Show, Status
from tombola.engine.run import run as run_trainings
from tombola.engine.workers import Workers
from tombola.errors import UserError, expect_flags, expect_whole
from tombola.exits import watch_exits
from tombola.hooks.hook import Hook
from tombola.hooks.tell import check_hooks, tell_hooks
from tombola.importance import NetworkScore
from tombola.lottery.ticket import Ticket
from tombola.own.functions import is_here
from tombola.store.layout import STORE
from tombola.store.store import Store
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.study.reinitialisation import plan
from tombola.study.repeatable import check_repeatable
from tombola.study.schema import Task
from tombola.study.task import resolve_importance, try_out
from tombola.study.tickets import Tickets
from tombola.study.trainings import Training
from tombola.threads import one_thread
from tombola.training.replaceable import OwnLayersWarning
from tombola.workbench import tables
from tombola.workbench.progress import show_nothing, show_progress
from tombola.workbench.studies import (
    AnyStudy,
    Importances,
    Overrides,
    name_importances,
    open_planner,
    open_tickets,
)

if TYPE_CHECKING:
    import polars as pl


OnTicket: TypeAlias = Callable[[Chain, Ticket], object]
"""A function that is called with each ticket that a run finds, and with the chain that it belongs to."""


def run(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    on_ticket: OnTicket | None = None,
    hooks: Sequence[Hook] = (),
    epochs: bool = False,
) -> pl.DataFrame:
    """Run the trainings of a study that the store does not have, and return the accuracy of every ticket.

    The task is tried out on a few examples first. A training is done once: a run that is interrupted goes on where it
    stopped, and a run that is finished returns at once. Trainings run in processes of their own. Functions that other
    processes cannot import, because a notebook or the script itself defines them, are trained in this process, one
    training at a time.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values, such as `{"recipe.epochs": 2, "importances": ["l1", my_importance]}`.
        store: the folder of the store; it is created if it is missing.
        data: the folder of the data sets.
        workers: the number of trainings at the same time; by default one for each core, and one on a GPU.
        progress: whether to show the progress: live on a terminal and in a notebook, otherwise a line per training.
        on_ticket: a function that is called with the chain and the ticket as soon as a ticket is found, for example to
            log it elsewhere; it is not called for tickets that were stored before. An exception that it raises ends
            the run.
        hooks: functions that are told every level, and may stop a chain, see `tombola.hooks`; for example
            `[tombola.hooks.tensorboard("runs")]`.
        epochs: whether the hooks are told every epoch too.

    Returns:
        The columns of `results`.

    Raises:
        UserError: if the study is invalid, if the task fails, or if an importance does; finished trainings are kept.

    >>> import tempfile
    >>> from torch import nn
    >>> def network():
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    >>> few = {"levels": 1, "seeds": [0], "data_seeds": [], "importances": ["l1"], "recipe.epochs": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     mine = {"task.model": network, "task.model_arguments": {}}
    ...     found = run("digits", few | mine, store=folder + "/store", progress=False)
    >>> found["level"].to_list()
    [0, 1]
    """
    check_hooks(hooks)
    expect_flags(progress=progress, epochs=epochs)
    with one_thread(), watch_exits():
        planner = open_run(study, overrides, store, data)
        folder = None if data is None else Path(data)
        with open_workers(planner, workers, folder) as opened:
            speed = None if isinstance(opened, WorkersHere) else prior_speed(planner, opened.count, folder)
            with (
                show_progress(planner, opened.count) if progress else show_nothing() as show,
                tell_hooks(tell_tickets(show, on_ticket), hooks, planner, opened, epochs=epochs) as tell,
            ):
                status = run_trainings(planner, opened, tell, speed=speed, tells_epochs=epochs)
        if stopped := describe_stopped(status):
            raise UserError(f"{stopped}; all other results are kept")
        return tables.of_tickets(Tickets(planner))


def reinit(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    level: int,
    draws: int = 3,
    importances: Importances = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Keep the connections that tickets share, reinitialise all others, find tickets again, and return what survives.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        level: the level whose shared connections are kept.
        draws: the number of reinitialisations of each seed, 1 to 1000.
        importances: the importances whose tickets are compared; by default all.
        store: the folder of the store.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Returns:
        The columns of `tombola.analysis.reinit.of_plans`.

    Raises:
        UserError: if the store does not have the tickets of the level, see `run`.

    >>> from tombola.workbench.example import finished
    >>> reinit(**finished(), level=1, draws=1, progress=False)["kept"].min() > 0
    True
    """
    from tombola.analysis import reinit as analysis

    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        plans = plan(tickets, level, draws, name_importances(importances))
        run_further(tickets, [each.planner for each in plans], workers, data, progress=progress)
        return analysis.of_plans(plans)


def run_further(
    tickets: Tickets,
    planners: Iterable[Planner],
    workers: int | None = None,
    data: str | Path | None = None,
    *,
    progress: bool = True,
) -> None:
    """Do the trainings that a further analysis of a study needs and that the store does not have.

    Args:
        tickets: the tickets of the study.
        planners: the planners of these trainings, one after the other; each may be made when its turn comes.
        workers: the number of trainings at the same time.
        data: the folder of the data sets.
        progress: whether to show the progress.

    Raises:
        UserError: if a training fails, or if an importance does; finished trainings are kept.
    """
    speed = recorded_speed(tickets)
    with open_workers(tickets.planner, workers, None if data is None else Path(data)) as opened:
        for planner in planners:
            with show_progress(planner, opened.count) if progress else show_nothing() as show:
                status = run_trainings(planner, opened, show, speed=speed)
            if stopped := describe_stopped(status):
                raise UserError(f"{stopped}; all other results are kept")


def tell_tickets(show: Show, on_ticket: OnTicket | None) -> Show:
    """Return a function that calls `show`, and `on_ticket` once for each ticket that is found from then on."""
    if on_ticket is None:
        return show
    told: dict[Chain, int] = {}

    def both(status: Status, finished: Training | None) -> None:
        show(status, finished)
        before = dict(told)
        for chain, each in status.chains.items():
            told[chain] = len(each.tickets)
            for ticket in each.tickets[before.get(chain, len(each.tickets)) :]:
                on_ticket(chain, ticket)

    return both


def open_run(study: AnyStudy, overrides: Overrides, store: str | Path, data: str | Path | None) -> Planner:
    """Return the planner of a study that can be run: its task was tried out, and its store can be written to.

    Raises:
        UserError: if the study is invalid, if the task fails, or if the store cannot be written to.

    Warns:
        NoKernelsWarning, OwnLayersWarning: in the name of the caller's caller, if sparse networks train at dense speed.
    """
    planner = open_planner(study, overrides, store=store, data=data)
    try_study(planner)
    prepare_store(planner, Path(store))
    if planner.study.device == "cpu" and not kernels.available():
        warnings.warn(kernels.MISSING, kernels.NoKernelsWarning, stacklevel=3)
    if planner.kernel_fault is not None:
        warnings.warn(planner.kernel_fault, OwnLayersWarning, stacklevel=3)
    return planner


def try_study(planner: Planner, device: str | None = None) -> None:
    """Try a study out on a few examples, before anything is trained.

    Args:
        planner: the planner of the study.
        device: the device to try it out on; by default that of the study.

    Raises:
        UserError: if the task fails, or if the user's own functions give something else each time.
    """
    study = planner.study if device is None else planner.study.model_copy(update={"device": device})
    try_out(planner.problem, study)
    check_repeatable(planner, study.device)


def prepare_store(planner: Planner, root: Path) -> None:
    """Create the store of a planner if it is missing.

    Raises:
        UserError: if the store cannot be written to.
    """
    planner.store = Store(root)
    planner.store.check_writable()


def open_workers(planner: Planner, workers: int | None, data: Path | None) -> Workers:
    """Return processes for the trainings of a planner, or this process if others cannot import its functions.

    Raises:
        UserError: if the number of processes is invalid, or if others cannot do what several of them are to do.
    """
    count = count_workers(workers, planner.study.device)
    if check_workers(planner, workers):
        return WorkersHere(planner.problem, planner.store)
    return LocalWorkers(count, planner.study.task, data, planner.store.root)


def check_workers(planner: Planner, workers: int | None) -> bool:
    """Return whether only this process can do the trainings of a planner.

    Raises:
        UserError: if several processes are to do them.
    """
    here = list_here(planner)
    if here and workers not in (None, 1):
        raise UserError(
            f"workers: {workers} processes cannot import {', '.join(here)}, which only this process has; put it "
            "into a module, or leave out workers for one training at a time"
        )
    return bool(here)


def list_here(planner: Planner) -> list[str]:
    """Return what workers need and only this process has: data set, model, loss, scores of the whole network.

    All other importances are computed in this process anyway.
    """
    task: Task = planner.study.task
    of_network = [
        part
        for name in planner.study.importances
        if isinstance(resolve_importance(name).score, NetworkScore)
        for part in name.split("/")
    ]
    return [name for name in (*task.own_code, *planner.study.recipe.own_code.values(), *of_network) if is_here(name)]


def count_workers(workers: int | None, device: str) -> int:
    """Return the number of parallel trainings: the given one, or one for each core that this process may use.

    On a GPU it is 1 by default, because several trainings at once take as long as one after the other.

    Args:
        workers: the number; None for the default.
        device: the device of the study.

    Raises:
        UserError: if the number is not a whole number from 1 on.
    """
    if workers is not None:
        expect_whole(workers, "workers", 1)
    return workers or (1 if device == "cuda" else count_cores())


def describe_stopped(status: Status) -> str:
    """Return why chains of a run stopped before their last level; empty if none did."""
    return "; ".join(sorted({f"{chain}: {end.stopped}" for chain, end in status.chains.items() if end.stopped}))

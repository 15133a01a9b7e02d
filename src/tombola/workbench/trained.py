"""Further analyses that train networks: each does the trainings that the store does not have, and returns a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import polars as pl

from tombola.analysis import controls as controls_analysis
from tombola.analysis import early as early_analysis
from tombola.analysis import rewind_point as rewind_analysis
from tombola.errors import expect_flags
from tombola.exits import watch_exits
from tombola.store.layout import STORE
from tombola.study.chains import select_chains
from tombola.study.controls import Over, Plan, check_size, plan_combinations, plan_controls, plan_transfers
from tombola.study.early import plan_snapshots
from tombola.study.rewind_point import list_planners, plan_rewind_points
from tombola.study.tickets import Tickets
from tombola.threads import one_thread
from tombola.workbench.runs import prepare_store, run_further, try_study
from tombola.workbench.studies import (
    AnyImportance,
    AnyStudy,
    Importances,
    Overrides,
    name_importances,
    open_planner,
    open_tickets,
)


def controls(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    level: int,
    kinds: Collection[str] | None = None,
    draws: int = 1,
    importances: Importances = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Change one thing about each ticket of a level, train what results, and return what it loses.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        level: the level of the tickets, from 1 on.
        kinds: the controls, see `tombola.study.controls.KINDS`; by default all that the study can have.
        draws: the number of random draws of each control and seed, 1 to 1000; with all kinds, importances and seeds,
            these may be up to 10 000 trainings.
        importances: the importances; by default all.
        store: the folder of the store.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Returns:
        The columns of `tombola.analysis.controls.of_controls`.

    Raises:
        UserError: if an argument is invalid, or if the store does not have the tickets of the level, see `run`.

    >>> from tombola.workbench.example import finished
    >>> table = controls(**finished(), level=1, kinds=["signs"], importances=["l1"], progress=False)
    >>> table.select("kind", "importance", "density").rows()
    [('signs', 'l1', 0.8)]
    """
    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        names = name_importances(importances)
        check_size(tickets.study, kinds, draws, names)
        plan = plan_controls(tickets, level, kinds, draws, names)
        return controls_analysis.of_controls(_train(plan, workers, data, progress=progress))


def combine(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    level: int,
    over: Over = "importances",
    importances: Importances = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Train the union and the intersection of tickets as tickets of their own, and return how they do.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        level: the level of the tickets, from 1 on.
        over: whether the tickets of all `"importances"` are combined, or those of all `"seeds"`.
        importances: the importances; by default all.
        store: the folder of the store.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Returns:
        The columns of `tombola.analysis.controls.of_combinations`.

    Raises:
        UserError: if an argument is invalid, or if the store does not have the tickets of the level, see `run`.

    >>> from tombola.workbench.example import finished
    >>> combine(**finished(), level=1, progress=False)["kind"].to_list()
    ['union', 'intersection']
    """
    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        plan = plan_combinations(tickets, level, over, name_importances(importances))
        return controls_analysis.of_combinations(_train(plan, workers, data, progress=progress))


def transfer(
    study: AnyStudy,
    other: AnyStudy,
    overrides: Overrides = None,
    *,
    level: int,
    importances: Importances = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Train the masks of another study in the networks of a study, and return how they do.

    Args:
        study: the study whose networks, data set and recipe are used: a `Study`, the name of a preset, or the path of a
            TOML file.
        other: the study whose masks are used. Its network has to have the same layers, and its store is the same.
        overrides: fields of `study` with other values.
        level: the level of the masks, from 1 on.
        importances: the importances; by default those that both studies have.
        store: the folder of the store.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Returns:
        The columns of `tombola.analysis.controls.of_transfers`.

    Raises:
        UserError: if the networks differ, or if the store does not have the masks or the dense networks, see `run`.

    >>> from tombola.workbench.example import finished
    >>> few = finished()
    >>> table = transfer(few["study"], few["study"], level=1, store=few["store"], importances=["l1"], progress=False)
    >>> table["own"].equals(table["value"].rename("own"))
    True
    """
    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        others = open_tickets(other, store=store, data=data, importances=importances)
        plan = plan_transfers(tickets, others, level, name_importances(importances))
        return controls_analysis.of_transfers(_train(plan, workers, data, progress=progress))


def rewind_point(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    iterations: Sequence[int] | None = None,
    level: int | None = None,
    importance: AnyImportance | None = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Train with two data orders from several iterations on, and return the barrier between the two.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        iterations: the iterations to try; by default seven between the first and the middle of a training.
        level: the level of tickets to try besides the dense network; they are found anew for each iteration.
        importance: the importance of these tickets; by default the first of the study.
        store: the folder of the store; it is created if it is missing.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Returns:
        The columns of `tombola.analysis.rewind_point.of_points`; `tombola.analysis.rewind_point.summarise` and
        `find_earliest` give the earliest iteration from which on the two stay connected.

    Raises:
        UserError: if an argument is invalid, or if a training fails, see `run`.

    >>> from tombola.workbench.example import finished
    >>> rewind_point(**finished(), iterations=[0], progress=False).select("iteration", "level").rows()
    [(0, 0)]
    """
    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        tickets = Tickets(open_planner(study, overrides, store=store, data=data))
        name = None if importance is None else name_importances([importance])
        try_study(tickets.planner)
        prepare_store(tickets.planner, Path(store))
        points = plan_rewind_points(tickets, iterations, level, name[0] if name else None)
        run_further(tickets, list_planners(points), workers, data, progress=progress)
        return rewind_analysis.of_points(points)


def early(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    level: int | None = None,
    iterations: Sequence[int] | None = None,
    importances: Importances = None,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Train the dense networks up to several iterations, and return how much of mask and ticket is known there.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        level: the level of the tickets, from 1 on; by default the last that all have.
        iterations: the iterations; by default six between the rewind point and the middle of a training.
        importances: the importances; by default all.
        store: the folder of the store.
        data: the folder of the data sets.
        workers: the number of trainings at the same time.
        progress: whether to show the progress.

    Returns:
        The columns of `tombola.analysis.early.of_snapshots`.

    Raises:
        UserError: if an argument is invalid, or if the store does not have the tickets of the level, see `run`.

    >>> from tombola.workbench.example import finished
    >>> early(**finished(), iterations=[1], importances=["l1"], progress=False)["known"].to_list()[-1]
    1.0
    """
    expect_flags(progress=progress)
    with one_thread(), watch_exits():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        plan = plan_snapshots(tickets, iterations)
        names = name_importances(importances)
        early_analysis.find_level(tickets, select_chains(tickets.study, names), level)
        run_further(tickets, [plan.planner], workers, data, progress=progress)
        return early_analysis.of_snapshots(plan, names, level)


def _train(plan: Plan, workers: int | None, data: str | Path | None, *, progress: bool) -> Plan:
    """Do the trainings of a plan, and return it."""
    run_further(plan.tickets, [plan.planner], workers, data, progress=progress)
    return plan

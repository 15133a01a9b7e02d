"""Further analyses of a study as polars frames, see `tombola.workbench.tables`."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tombola import analysis
from tombola.analysis.defaults import DRAWS, POINTS, TOLERANCE
from tombola.analysis.matching import By
from tombola.store.layout import STORE
from tombola.threads import one_thread
from tombola.workbench.studies import AnyStudy, Importances, Overrides, name_importances, open_tickets
from tombola.workbench.tables import Levels


def matching(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
    by: By = "weights",
    draws: int = DRAWS,
) -> pl.DataFrame:
    """Return the overlap of each two tickets, as they are and after their hidden units are put into the same order.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default the last that all have.
        by: whether units are matched by `"weights"` or by `"activations"`.
        draws: the number of pairs of random tickets that are matched for each pair of tickets, 1 or more.

    Returns:
        The columns of `tombola.analysis.matching.of_study`.

    Raises:
        UserError: if the store does not have what is compared, or if the units of the network cannot be matched.

    >>> from tombola.workbench.example import finished
    >>> matching(**finished(), draws=1)["moved"].max() <= 1
    True
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.matching.of_study(tickets, name_importances(importances), levels, by, draws)


def initial(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
) -> pl.DataFrame:
    """Return how many of the connections that begin with the largest weights are in the tickets, beside chance.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances; by default all.
        levels: the levels; by default the last that all have.

    Returns:
        The columns of `tombola.analysis.initial.of_study`.

    Raises:
        UserError: if the store does not have the tickets.

    >>> from tombola.workbench.example import finished
    >>> initial(**finished())["kept"].max() <= 1
    True
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.initial.of_study(tickets, name_importances(importances), levels)


def similarity(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
) -> pl.DataFrame:
    """Return how alike each two trained tickets are as functions: their predictions, calibration and layers.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default the last that all have.

    Returns:
        The columns of `tombola.analysis.similarity.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> similarity(**finished())["layer"].unique().sort().to_list()
    ['(outputs)', 'fc', 'fc1', 'fc2']
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.similarity.of_study(tickets, name_importances(importances), levels)


def basins(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    points: int = POINTS,
    tolerance: float = TOLERANCE,
) -> pl.DataFrame:
    """Return for each ticket the barriers to the ticket of the next level and to the dense network.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances; by default all.
        points: the number of points on each line, including both ends.
        tolerance: the largest barrier of networks that count as connected, in 0..1.

    Returns:
        The columns of `tombola.analysis.basins.of_study`.

    Raises:
        UserError: if an argument is invalid, or if the store does not have the tickets.

    >>> from tombola.workbench.example import finished
    >>> basins(**finished())["level"].unique().to_list()
    [0, 1]
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.basins.of_study(tickets, name_importances(importances), points, tolerance)

"""Tables: the results of a study and their analyses as polars frames."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import polars as pl

from tombola import analysis
from tombola.analysis import accuracy, reference
from tombola.analysis import claims as claims_analysis
from tombola.analysis.defaults import MARGIN, POINTS
from tombola.errors import NothingStoredError, UserError, did_you_mean, expect_flags
from tombola.store.layout import STORE
from tombola.study.tickets import Tickets
from tombola.threads import one_thread
from tombola.workbench.studies import (
    AnyStudy,
    Importances,
    Overrides,
    name_importances,
    open_study,
    open_tickets,
)

Names = Sequence[str] | None
Levels = Collection[int] | None


def results(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
) -> pl.DataFrame:
    """Return the accuracy of every ticket that the store has, one row for each.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.

    Returns:
        The columns of `tombola.analysis.accuracy.Row`.

    Raises:
        UserError: if the store has no result of the study.

    >>> from tombola.workbench.example import finished
    >>> results(**finished()).select("importance", "level", "density").head(2).rows()
    [('magnitude', 0, 1.0), ('magnitude', 1, 0.8)]
    """
    with one_thread():
        return of_tickets(open_tickets(study, overrides, store=store, data=data))


def of_tickets(tickets: Tickets) -> pl.DataFrame:
    """Return the accuracy of every ticket, see `results`."""
    found = accuracy.rows(tickets)
    if not found:
        raise NothingStoredError.of_study(tickets.planner.store.root)
    return accuracy.to_frame(found)


def overlap(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
) -> pl.DataFrame:
    """Return how many connections tickets share, compared with chance and with the noise floor.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default all that are stored.

    Returns:
        The columns of `tombola.analysis.overlap.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> overlap(**finished())["jaccard"].max() <= 1
    True
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.overlap.of_study(tickets, name_importances(importances), levels)


def layers(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
) -> pl.DataFrame:
    """Return the density of each layer, the collapsed layers, and the share of connections on paths.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default all that are stored.

    Returns:
        The columns of `tombola.analysis.layers.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> layers(**finished())["density"].max()
    1.0
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.layers.of_study(tickets, name_importances(importances), levels)


def stability(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
    layers: Names = None,
) -> pl.DataFrame:
    """Return how much shared and other connections change from one level to the next.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default all that are stored.
        layers: the layers; by default all.

    Returns:
        The columns of `tombola.analysis.stability.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> stability(**finished())["level"].max()
    1
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.stability.of_study(tickets, name_importances(importances), levels, layers)


def winners(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    margin: float = MARGIN,
    surely: bool = False,
) -> pl.DataFrame:
    """Return the sparsest ticket of each importance that keeps the accuracy of the dense network.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        margin: by how much the accuracy may be lower, on the scale 0..1.
        surely: whether the whole 95 % interval has to be within the margin.

    Returns:
        The columns of `tombola.analysis.winners.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> winners(**finished(), margin=1.0)["level"].to_list()
    [1, 1]
    """
    expect_flags(surely=surely)
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.winners.of_study(tickets, name_importances(importances), margin=margin, surely=surely)


def weights(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
) -> pl.DataFrame:
    """Return the distributions of weights and importances in each layer.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default all that are stored.

    Returns:
        The columns of `tombola.analysis.weights.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> weights(**finished())["quantity"].unique().sort().to_list()
    ['end', 'initial', 'rewind', 'score']
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.weights.of_study(tickets, name_importances(importances), levels)


def functions(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
) -> pl.DataFrame:
    """Return how often two tickets make the same prediction.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default all that are stored.

    Returns:
        The columns of `tombola.analysis.functions.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> functions(**finished())["level"].max()
    1
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.functions.of_study(tickets, name_importances(importances), levels)


def connectivity(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    levels: Levels = None,
    points: int = POINTS,
) -> pl.DataFrame:
    """Return the test error on the line between the weights of two tickets.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        levels: the levels; by default all that are stored.
        points: the number of points on each line, 2 or more.

    Returns:
        The columns of `tombola.analysis.connectivity.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> connectivity(**finished(), points=3)["level"].max()
    1
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return analysis.connectivity.of_study(tickets, name_importances(importances), levels, points)


def claims(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
    level: int | None = None,
) -> pl.DataFrame:
    """Return a verdict on each claim of the paper, by the tickets of the study.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        importances: the importances to compare; by default all.
        level: the level to compare; by default the one nearest to the paper's.

    Returns:
        The columns of `tombola.analysis.claims.of_study`.

    Raises:
        UserError: if the store does not have what is compared.

    >>> from tombola.workbench.example import finished
    >>> claims(**finished()).height > 10
    True
    """
    with one_thread():
        tickets = open_tickets(study, overrides, store=store, data=data, importances=importances)
        return claims_analysis.of_study(tickets, name_importances(importances), level)


def compare(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    against: str = "reference",
    store: str | Path = STORE,
    data: str | Path | None = None,
) -> pl.DataFrame:
    """Return the accuracies of a study beside those of the paper, or beside published ones, with a verdict for each.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        against: `"paper"`, or `"reference"` for the results that tombola publishes for its presets.
        store: the folder of the store.
        data: the folder of the data sets.

    Returns:
        The columns of `tombola.analysis.reference.of_study`.

    Raises:
        UserError: if there is nothing to compare the study with, or if the store has no result of it.

    >>> compare("digits", against="papers")
    Traceback (most recent call last):
    tombola.errors.UserError: against: unknown reference 'papers'; did you mean 'paper'?
    """
    references = {"paper": reference.paper, "reference": reference.published}
    if against not in references:
        raise UserError(f"against: unknown reference {against!r}; {did_you_mean(against, references)}")
    with one_thread():
        found = references[against](open_study(study, overrides))  # before the data set is loaded
        tickets = open_tickets(study, overrides, store=store, data=data)
        return reference.of_study(tickets, found)

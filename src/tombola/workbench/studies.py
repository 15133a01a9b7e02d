"""Studies: from what a user names to the planner and the stored tickets of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tombola.errors import UserError, as_path, as_texts, did_you_mean, expect
from tombola.own.functions import refer
from tombola.store.layout import STORE
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.schema import Study, load_study, override
from tombola.study.task import load_problem
from tombola.study.tickets import Tickets
from tombola.workbench.path import find_modules

AnyStudy: TypeAlias = Study | str | Path
"""A study, the name of a preset, or the path of a TOML file."""

Overrides: TypeAlias = Mapping[str, Any] | None
"""Fields of the study with other values, by dotted name, such as `{"recipe.epochs": 2}`."""


AnyImportance: TypeAlias = str | Callable[..., Any]
"""An importance by its name, an `Importance`, or a function of one's own."""

Importances: TypeAlias = Sequence[AnyImportance] | None
"""Some importances; None for all of the study's."""


def open_study(study: AnyStudy, overrides: Overrides = None) -> Study:
    """Return a study with some fields overridden.

    Raises:
        UserError: if there is no such study, or if a field is invalid.

    >>> open_study("digits", {"levels": 3}).levels
    3
    """
    if isinstance(study, (str, Path)):
        return load_study(study, overrides)
    if not isinstance(study, Study):
        raise UserError(
            "study: expected a tombola.Study, the name of a preset or the path of a TOML file, "
            f"got {type(study).__name__}"
        )
    return study if overrides is None or (isinstance(overrides, dict) and not overrides) else override(study, overrides)


def open_planner(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    beside: Path | None = None,
) -> Planner:
    """Return the planner of a study; a missing store is not created.

    Modules of the user are found beside the study's file and in the current folder.

    Args:
        study: a study, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        beside: the file of the study, if `study` is what was loaded from it.

    Raises:
        UserError: if the study is invalid, or if its data set, model or loss cannot be loaded.
    """
    loaded = open_study(study, overrides)
    folder = None if data is None else as_path(data, "data")
    file = beside if isinstance(study, Study) else Path(study)
    find_modules([*([] if file is None else [file.resolve().parent]), Path.cwd()])
    opened = Store(as_path(store, "store"), create=False)  # fail early if the store cannot be read
    return Planner(loaded, load_problem(loaded.task, folder), opened)


def open_tickets(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    importances: Importances = None,
) -> Tickets:
    """Return the stored tickets of a study, see `open_planner` and `with_importances`."""
    return with_importances(open_planner(study, overrides, store=store, data=data), name_importances(importances))


def name_importances(importances: Importances) -> list[str] | None:
    """Return the names that a study has for importances; None for None.

    >>> from tombola.importance import l1
    >>> name_importances(["magnitude", l1])
    ['magnitude', 'l1']
    """
    if importances is None:
        return None
    if isinstance(importances, str):
        raise UserError(f"importances: expected a list, got the text {importances!r}; write [{importances!r}]")
    expect(importances, Iterable, "importances", "a list of names or functions")
    return as_texts([refer(each, "importances") for each in importances], "importances", "names or functions")


def with_importances(planner: Planner, names: Sequence[str] | None) -> Tickets:
    """Return the stored tickets of a study, with those of further importances.

    Args:
        planner: the planner of the study.
        names: importances to compare. They may include others than the study's, with which it was run before and whose
            results are in the store.

    Raises:
        UserError: if the store has no result of an importance that is not the study's.
    """
    known = planner.study.importances
    others = [name for name in names or () if name not in known]
    if not others:
        return Tickets(planner)
    more = override(planner.study, {"importances": [*known, *others]})
    tickets = Tickets(Planner(more, planner.problem, planner.store))
    for name in others:
        chains = [chain for chain in tickets.planner.chains if chain.importance == name]
        if not any(len(tickets.progress(chain).tickets) > 1 for chain in chains):
            raise UserError(
                f"importances: the study has no importance {name!r}, and no result of it is in {planner.store.root}; "
                f"run the study with it first, or {did_you_mean(name, known)}"
            )
    return tickets

"""Tickets: one ticket of a study from its store."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

from tombola.errors import NothingStoredError, UserError, short
from tombola.lottery.ticket import Ticket
from tombola.own.functions import refer
from tombola.store.layout import STORE
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.study.tickets import check_level
from tombola.threads import one_thread
from tombola.workbench.studies import AnyImportance, AnyStudy, Overrides, open_planner


def read_ticket(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    importance: AnyImportance,
    seed: int,
    level: int,
    store: str | Path = STORE,
    data: str | Path | None = None,
) -> Ticket:
    """Return a ticket of a study, with its trained weights.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        importance: the importance of the ticket.
        seed: the seed of the ticket.
        level: the level of the ticket.
        store: the folder of the store.
        data: the folder of the data sets.

    Raises:
        UserError: if the study has no such ticket, or if the store does not have it.

    >>> from tombola.workbench.example import finished
    >>> read_ticket(importance="l1", seed=0, level=1, **finished()).mask.density
    0.8
    """
    with one_thread():
        planner = open_planner(study, overrides, store=store, data=data)
        return ticket_of(planner, refer(importance, "importance"), seed, level)


def ticket_of(planner: Planner, importance: str, seed: int, level: int) -> Ticket:
    """Return a stored ticket of a planner's study, see `read_ticket`."""
    study = planner.study
    known: Sequence[str | int]
    for what, value, known in (("importance", importance, study.importances), ("seed", seed, study.seeds)):
        if isinstance(value, bool) or not isinstance(value, str | Integral) or value not in known:
            raise UserError(f"{what}: the study has no {what} {short(value)}, it has {', '.join(map(str, known))}")
    check_level(study, level)
    chain = Chain(int(seed), importance)
    progress = planner.progress(chain)
    if level >= len(progress.tickets):
        there = f"levels 0 to {len(progress.tickets) - 1} are" if progress.tickets else "none of its levels is"
        text = f"level {level} of {chain} is not in {planner.store.root}, {there}"
        if progress.waits_for:
            raise NothingStoredError(text)
        raise UserError(f"level: {text}; it ends there ({progress.stopped or 'its training diverged'})")
    return progress.tickets[level]

"""Contents: all that a report shows of a study, gathered from its store."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import polars as pl

from tombola import __version__
from tombola.analysis import connectivity, functions, layers, overlap, reinit, stability, weights, winners
from tombola.analysis.accuracy import Row, rows
from tombola.analysis.gather import label
from tombola.engine.run import count_remaining
from tombola.errors import UserError
from tombola.report import paper
from tombola.study.planner import Planner, select_chains
from tombola.study.schema import Study
from tombola.study.tickets import Tickets

COSTLY = ("functions", "connectivity")
"""Analyses that evaluate networks and store nothing, so that they take time again for every report."""


@dataclass(frozen=True)
class Verification:
    """How many of a study's stored trainings were repeated, and with which outcome.

    Args:
        trainings: the number of stored trainings.
        confirmed: how many of them gave the same bits when they were last repeated.
        contradicted: how many of them gave other bits when they were last repeated.
        when: the last time that one was repeated, in ISO format; None where none was.
        elsewhere: whether one that gave other bits was repeated on another machine than the first time.
    """

    trainings: int = 0
    confirmed: int = 0
    contradicted: int = 0
    when: str | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class Contents:
    """What a report shows of a study.

    Args:
        name: the study's.
        study: all of it.
        command: of the command line, how the study is named there: its name and what overrides it, without a verb.
        about_data: name, classes and the numbers of examples for training and testing.
        parameters: of the network, those that may be pruned and all.
        labels: the names of tickets: the importances, and those of other data orders.
        results: every ticket's.
        level: the level of what is shown of one level only; None where not all chains have level 1.
        margin: by how much the accuracy of a ticket that keeps it may be lower, on the scale 0..1.
        tables: the analyses' tables by name; see `tombola.analysis`.
        absent: why an analysis is not among them.
        paper: see `tombola.report.paper.of_study`.
        tickets, expected: the number of tickets in the store and of all of the study, with those of other data orders.
        trainings_left: the number of trainings that are still to be done.
        stopped: chains whose importance failed, and how.
        verified: see `Verification`.
        records: of each stored training, when, where and how long it ran.
        version: tombola's own.
        made: when this was gathered.
    """

    name: str
    study: Study
    command: tuple[str, ...]
    about_data: Mapping[str, Any]
    parameters: tuple[int, int]
    labels: tuple[str, ...]
    results: tuple[Row, ...]
    level: int | None
    margin: float
    tables: Mapping[str, pl.DataFrame]
    absent: Mapping[str, str]
    paper: pl.DataFrame | None = None
    tickets: int = 0
    expected: int = 0
    trainings_left: int = 0
    stopped: Mapping[str, str] = field(default_factory=dict)
    verified: Verification = Verification()
    records: tuple[Mapping[str, Any], ...] = ()
    version: str = __version__
    made: str = ""


def gather(
    planner: Planner,
    name: str,
    command: Sequence[str],
    *,
    costly: Collection[str] = (),
    level: int | None = None,
    margin: float = 0.005,
) -> Contents:
    """Gather what the store has of a study, which may be unfinished or not begun.

    Args:
        planner: of the study.
        name: what the study is called.
        command: how the command line names it, see `Contents`.
        costly: which of the analyses in `COSTLY` to do.
        level: the level of what is shown of one level only; by default the sparsest at which every importance keeps
            the dense network's accuracy, or where there is none, the last that all chains have.
        margin: see `tombola.analysis.winners`.

    Raises:
        UserError: where not every chain has the level.
        tombola.errors.DamagedResultError: where a stored result is damaged.
    """
    tickets = Tickets(planner)
    progress = tickets.all()
    results = tuple(rows(tickets))
    tables: dict[str, pl.DataFrame] = {}
    absent: dict[str, str] = {}

    def add(analysis: str, table: Callable[[], pl.DataFrame]) -> None:
        try:
            tables[analysis] = table()
        except UserError as error:
            absent[analysis] = str(error).replace(str(planner.store.root), "the store")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be followed is null in the tables, which is shown
        add("winners", lambda: winners.of_study(tickets, margin=margin))
        add("layers", lambda: layers.of_study(tickets))
        shown = _choose_level(tickets, level, tables.get("winners"))
        if shown is not None:
            add("overlap", lambda: overlap.of_study(tickets))
            add("weights", lambda: weights.of_study(tickets, levels=[shown]))
            add("stability", lambda: stability.of_study(tickets, levels=[shown]))
            if "functions" in costly:
                add("functions", lambda: functions.of_study(tickets, levels=[shown]))
            if "connectivity" in costly:
                add("connectivity", lambda: connectivity.of_study(tickets, levels=[shown]))
        add("reinit", lambda: reinit.of_study(tickets))
    records = tuple(tickets.records().values())
    data = planner.problem.data
    return Contents(
        name=name,
        study=planner.study,
        command=tuple(command),
        about_data={
            "name": data.name,
            "classes": data.classes,
            "train": len(data.train_inputs),
            "test": len(data.test_inputs),
            "shape": tuple(data.input_shape),
        },
        parameters=(planner.dense.total, sum(each.numel() for each in planner.model.parameters())),
        labels=(*planner.study.importances, *dict.fromkeys(label(chain) for chain in planner.repeats)),
        results=results,
        level=shown,
        margin=margin,
        tables=tables,
        absent=absent,
        paper=paper.of_study(planner.study),
        tickets=sum(len(each.tickets) for each in progress.values()),
        expected=len(progress) * (planner.study.levels + 1),
        trainings_left=count_remaining(list(progress.values())),
        stopped={str(chain): each.stopped for chain, each in progress.items() if each.stopped},
        verified=summarise_verification(records),
        records=records,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def summarise_verification(records: Sequence[Mapping[str, Any]]) -> Verification:
    """Return how many of the trainings with these records were repeated, and with which outcome.

    >>> summarise_verification([{"confirmed": [{"when": "2026-01-02"}]}, {}])
    Verification(trainings=2, confirmed=1, contradicted=0, when='2026-01-02', elsewhere=False)
    """
    confirmed = contradicted = 0
    elsewhere = False
    times = []
    for record in records:
        notes = [(note["when"], name, note) for name in ("confirmed", "contradicted") for note in record.get(name, ())]
        if not notes:
            continue
        when, outcome, note = max(notes, key=lambda each: each[:2])
        times.append(when)
        confirmed += outcome == "confirmed"
        contradicted += outcome == "contradicted"
        elsewhere |= outcome == "contradicted" and note.get("machine") != record.get("machine")
    return Verification(len(records), confirmed, contradicted, max(times, default=None), elsewhere)


def _choose_level(tickets: Tickets, level: int | None, best: pl.DataFrame | None) -> int | None:
    """Return the level of what is shown of one level, see `gather`."""
    study = tickets.study
    last = tickets.last_level(select_chains(study, None)) or 0
    if level is not None:
        if not 1 <= level <= last:
            there = f"levels 1 to {last}" if last else "no level"
            raise UserError(
                f"level {level}: expected a level from 1 on that all importances and seeds have, they have {there}"
            )
        return level
    if last < 1:
        return None
    if best is not None and set(best["importance"]) == set(study.importances):
        sparsest = int(best["level"].to_numpy().min())
        if 1 <= sparsest <= last:
            return sparsest
    return last

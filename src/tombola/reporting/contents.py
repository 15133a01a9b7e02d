"""Contents: all the data that a report shows about a study, gathered from its store."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from numbers import Integral
from typing import Any

import polars as pl

from tombola import __version__
from tombola.analysis import (
    basins,
    claims,
    connectivity,
    controls,
    early,
    functions,
    initial,
    layers,
    matching,
    overlap,
    reference,
    reinit,
    rewind_point,
    similarity,
    stability,
    uniqueness,
    weights,
    winners,
)
from tombola.analysis.accuracy import Row, rows
from tombola.analysis.defaults import MARGIN
from tombola.analysis.evidence import Evidence, collect
from tombola.analysis.gather import label
from tombola.analysis.reference import Reference
from tombola.analysis.verdict import Claim
from tombola.engine.machine import differences
from tombola.engine.run import count_remaining
from tombola.errors import UserError, expect
from tombola.pruning.coverage import Coverage
from tombola.study.chains import select_chains
from tombola.study.planner import Planner
from tombola.study.schema import Study
from tombola.study.tickets import Tickets, check_level
from tombola.training.metrics import TEST_ACCURACY, Measure

COSTLY = ("functions", "connectivity", "matching", "similarity")
"""Analyses that evaluate the networks and store nothing; a report computes them only on request."""

FURTHER = ("basins", "rewind-point", "early")
"""Further analyses that a report has only on request, and does not name otherwise."""


@dataclass(frozen=True)
class Verification:
    """What verification has found about a study's stored trainings.

    Args:
        trainings: number of stored trainings.
        confirmed: number of trainings that gave the same bits when they were last repeated.
        contradicted: number of trainings that gave other bits when they were last repeated.
        when: time of the last repetition, in ISO format; None if there was none.
        elsewhere: whether a training that gave other bits was repeated on another machine than the first time.
    """

    trainings: int = 0
    confirmed: int = 0
    contradicted: int = 0
    when: str | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class Contents:
    """All the data that a report shows about a study.

    Args:
        name: the name of the study.
        study: the study itself.
        command: how the command line names the study: its name and the options that override fields, without a verb.
        about_data: name, classes and the numbers of examples of each split.
        counted: a sentence on the parameters that density counts, see `Planner.describe_counted`.
        labels: names of the tickets: the importances, and those with other data orders.
        results: one row per ticket.
        level: the level of all charts that show a single level; None if no level from 1 on is stored.
        margin: a ticket keeps the accuracy, or what else tickets are judged by, if it loses at most this much, see
            `tombola.analysis.winners.by_level`.
        tables: the analyses' tables by name; see `tombola.analysis`.
        absent: for analyses without a table, the reason.
        claims: the paper's claims with the verdicts of the study's tickets; empty if nothing can be compared yet.
        compared: a sentence on the tickets that decide on the claims.
        unique: sentences that say up to what tickets are unique, see `tombola.analysis.uniqueness.describe`.
        references: accuracies to compare the study's with: the paper's, and the published ones unless they are its own.
        tickets, expected: number of stored tickets, and of all tickets of the study, including other data orders.
        trainings_left: number of trainings that remain.
        stopped: chains that cannot continue, with the reason.
        verified: see `Verification`.
        records: when, where and how long each stored training ran.
        coverage: the parameters that are pruned, kept dense, left out and not chosen, in numbers.
        version: version of tombola.
        made: when the contents were gathered, in ISO format.
        measure: what tickets are judged by.
    """

    name: str
    study: Study
    command: tuple[str, ...]
    about_data: Mapping[str, Any]
    counted: str
    labels: tuple[str, ...]
    results: tuple[Row, ...]
    level: int | None
    margin: float
    tables: Mapping[str, pl.DataFrame]
    absent: Mapping[str, str]
    claims: tuple[Claim, ...] = ()
    compared: str = ""
    unique: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    tickets: int = 0
    expected: int = 0
    trainings_left: int = 0
    stopped: Mapping[str, str] = field(default_factory=dict)
    verified: Verification = Verification()
    records: tuple[Mapping[str, Any], ...] = ()
    coverage: Coverage | None = None
    version: str = __version__
    made: str = ""
    measure: Measure = TEST_ACCURACY


def gather(
    planner: Planner,
    name: str,
    command: Sequence[str],
    *,
    costly: Collection[str] = (),
    level: int | None = None,
    margin: float = MARGIN,
) -> Contents:
    """Gather what is stored of a study, which may be unfinished or not begun.

    Args:
        planner: of the study.
        name: the name of the study.
        command: how the command line names it, see `Contents`.
        costly: those of the analyses in `COSTLY` and `FURTHER` that are to be computed.
        level: the level of all charts that show a single level. By default, the sparsest level at which every
            importance keeps the dense network's accuracy; if there is none, the last level that all have.
        margin: see `tombola.analysis.winners`.

    Raises:
        UserError: where not every chain has the level.
        tombola.errors.DamagedResultError: where a stored result is damaged.
    """
    tickets = Tickets(planner)
    progress = tickets.all()
    results = tuple(rows(tickets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network whose graph cannot be traced has nulls in the tables
        tables, absent, shown = _tabulate(tickets, costly, level, margin)
        evidence = _collect_evidence(tickets, tables)
    records = tuple(tickets.records().values())
    data = planner.problem.data
    return Contents(
        name=name,
        study=planner.study,
        command=tuple(command),
        about_data={
            "name": data.name,
            "classes": data.classes,
            **{split: data.count(split) for split in data.splits},
            "shape": [" × ".join(map(str, shape)) for shape in data.input_shapes.values()],
        },
        counted=planner.describe_counted(),
        coverage=planner.coverage,
        labels=(*planner.study.importances, *dict.fromkeys(label(chain) for chain in planner.repeats)),
        results=results,
        measure=planner.problem.measure,
        level=shown,
        margin=margin,
        tables=tables,
        absent={analysis: why.replace(str(planner.store.root), "the store") for analysis, why in absent.items()},
        claims=() if evidence is None else tuple(claims.judge(evidence)),
        compared="" if evidence is None else evidence.describe(),
        unique=tuple(uniqueness.describe(tables, planner.problem.measure, planner.study.recipe.rewind)),
        references=tuple(_list_references(planner, results)),
        tickets=sum(len(each.tickets) for each in progress.values()),
        expected=len(progress) * (planner.study.levels + 1),
        trainings_left=count_remaining(list(progress.values())),
        stopped={str(chain): each.stopped for chain, each in progress.items() if each.stopped},
        verified=summarise_verification(records),
        records=records,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _tabulate(
    tickets: Tickets, costly: Collection[str], level: int | None, margin: float
) -> tuple[dict[str, pl.DataFrame], dict[str, str], int | None]:
    """Return the table of each analysis, why others have none, and the level of those of a single level."""
    tables: dict[str, pl.DataFrame] = {}
    absent: dict[str, str] = {}

    def add(analysis: str, table: Callable[[], pl.DataFrame]) -> None:
        if analysis in (*COSTLY, *FURTHER) and analysis not in costly:
            return
        try:
            tables[analysis] = table()
        except UserError as error:
            absent[analysis] = str(error)

    add("winners", lambda: winners.of_study(tickets, margin=margin))
    add("layers", lambda: layers.of_study(tickets))
    shown = _choose_level(tickets, level, tables.get("winners"))
    if shown is not None:
        at = [shown]
        add("overlap", lambda: overlap.of_study(tickets))
        add("weights", lambda: weights.of_study(tickets, levels=at))
        add("stability", lambda: stability.of_study(tickets, levels=at))
        add("functions", lambda: functions.of_study(tickets, levels=at))
        add("connectivity", lambda: connectivity.of_study(tickets, levels=at))
        add("initial", lambda: initial.of_study(tickets, levels=at))
        add("matching", lambda: matching.of_study(tickets, levels=at))
        add("similarity", lambda: similarity.of_study(tickets, levels=at))
    add("reinit", lambda: reinit.of_study(tickets))
    add("controls", lambda: controls.of_study(tickets))
    add("combinations", lambda: controls.combinations_of_study(tickets))
    add("transfers", lambda: controls.transfers_of_study(tickets))
    add("basins", lambda: basins.summarise(basins.of_study(tickets), tickets, margin=margin))
    add("rewind-point", lambda: rewind_point.summarise(rewind_point.of_study(tickets)))
    add("early", lambda: early.of_study(tickets))
    return tables, absent, shown


def _list_references(planner: Planner, results: Collection[Row]) -> Iterator[Reference]:
    """Yield the paper's accuracies and the published ones, if there are any of this study."""
    with suppress(UserError):
        yield reference.paper(planner.study)
    with suppress(UserError):
        found = reference.published(planner.study)
        reference.check_data(found, planner.problem.data.fingerprint)
        if not set(results) <= set(found.tickets):
            yield found


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
        elsewhere |= outcome == "contradicted" and bool(differences(record.get("machine", {}), note.get("machine", {})))
    return Verification(len(records), confirmed, contradicted, max(times, default=None), elsewhere)


def _collect_evidence(tickets: Tickets, tables: Mapping[str, pl.DataFrame]) -> Evidence | None:
    """Return what decides on the paper's claims; None where fewer than two importances have a level from 1 on."""
    try:
        return collect(tickets, tables=tables) if "layers" in tables else None
    except UserError:
        return None


def _choose_level(tickets: Tickets, level: int | None, best: pl.DataFrame | None) -> int | None:
    """Return the level of what is shown of one level, see `gather`."""
    study = tickets.study
    last = tickets.last_level(select_chains(study, None)) or 0
    if level is not None:
        expect(level, Integral, "level", "a whole number")
        if not 1 <= level <= last:
            there = f"levels 1 to {last}" if last else "no level"
            raise UserError(
                f"level {level}: expected a level from 1 on that all importances and seeds have, they have {there}"
            )
        check_level(study, level)
        return int(level)
    if last < 1:
        return None
    if best is not None and set(best["importance"]) == set(study.importances):
        sparsest = int(best["level"].to_numpy().min())
        if 1 <= sparsest <= last:
            return sparsest
    return last

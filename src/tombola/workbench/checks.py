"""What a run would do, and whether its results can be repeated."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from tombola.engine.estimate import Estimate, estimate
from tombola.engine.here import WorkersHere
from tombola.engine.local import LocalWorkers
from tombola.engine.verify import Finding, draw_sample, list_places, verify_chains, verify_trainings
from tombola.engine.workers import Workers
from tombola.errors import expect_flags
from tombola.exits import watch_exits
from tombola.store.layout import STORE
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.searches import list_planners
from tombola.threads import one_thread
from tombola.workbench.runs import check_workers, count_workers, try_study
from tombola.workbench.studies import AnyStudy, Overrides, open_planner


def plan(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    workers: int | None = None,
) -> Estimate:
    """Return what a run would train, what the store has already, and the time and disk space that a run takes.

    The task is tried out first. The time is that of the study's finished trainings, or of a few iterations that are
    timed now.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store; it is not created.
        data: the folder of the data sets.
        workers: the number of trainings at the same time, see `run`.

    Raises:
        UserError: if the study is invalid, or if the task fails.

    >>> from tombola.workbench.example import finished
    >>> found = plan(**finished())
    >>> found.existing, found.to_train, [there for chain, there, missing in found.chains]
    (3, 0, [2, 2])
    """
    with one_thread(), watch_exits():
        planner = open_planner(study, overrides, store=store, data=data)
        try_study(planner)
        here = check_workers(planner, workers)
        count = 1 if here else count_workers(workers, planner.study.device)
        return estimate(planner, count, None if data is None else Path(data), here=here)


def verify(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    sample: int | None = None,
    chains: bool = False,
    workers: int | None = None,
) -> pl.DataFrame:
    """Repeat stored trainings, compare every bit with the stored results, and return a row for each.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        sample: the number of trainings, or of chains, to repeat, drawn with a fixed seed; by default all.
        chains: whether to repeat whole chains, from their initial weights on.
        workers: the number of trainings at the same time, see `run`.

    Returns:
        A frame with the columns training, key, equal (whether all bits are), difference (the first; null if they are
        equal) and machine (the differences between this machine and the recorded one).

    Raises:
        UserError: if the store has no result of the study, or if a training fails.

    >>> from tombola.workbench.example import finished
    >>> verify(**finished(), sample=1).select("equal").rows()
    [(True,)]
    """
    expect_flags(chains=chains)
    with one_thread(), watch_exits():
        planner = open_planner(study, overrides, store=store, data=data)
        with _open_fresh(planner, workers, None if data is None else Path(data)) as fresh:
            findings = repeat(planner, fresh, sample=sample, chains=chains)
        rows = [(f.what, f.key, f.difference is None, f.difference, "; ".join(f.machine)) for f in findings]
        types = {"training": pl.String, "key": pl.String, "equal": pl.Boolean, "difference": pl.String}
        return pl.DataFrame(rows, {**types, "machine": pl.String}, orient="row")


def repeat(
    planner: Planner,
    fresh: Workers,
    tell: Callable[[int, int], None] = lambda *_: None,
    *,
    sample: int | None = None,
    chains: bool = False,
) -> list[Finding]:
    """Repeat stored trainings of a study and of its searches, and return the outcome of each; see `verify`.

    Args:
        planner: the planner of the study.
        fresh: the workers, without checkpoints.
        tell: a function that is called with the number of finished trainings and the number of all trainings.
        sample: the number of trainings, or of chains, to repeat.
        chains: whether to repeat whole chains.
    """
    planners = list_planners(planner)
    places = list_places(planners)
    findings = []
    if not chains:
        chosen = draw_sample(places, sample)
        for finding in verify_trainings(chosen, fresh):
            findings.append(finding)
            tell(len(findings), len(chosen))
        return findings
    stored = {(place.planner, place.chain) for place in places}
    there = draw_sample([(own, chain) for own, every in planners for chain in every if (own, chain) in stored], sample)
    for own, _ in planners:
        if mine := [chain for each, chain in there if each is own]:
            findings += verify_chains(own, mine, fresh, tell, planner.end)
    return findings


@contextmanager
def _open_fresh(planner: Planner, workers: int | None, data: Path | None) -> Iterator[Workers]:
    """Yield workers that begin each training anew, without the checkpoints of a store."""
    if check_workers(planner, workers):
        with (
            tempfile.TemporaryDirectory(prefix="tombola-verify-") as folder,
            WorkersHere(planner.problem, Store(Path(folder))) as here,
        ):
            yield here
        return
    with LocalWorkers(count_workers(workers, planner.study.device), planner.study.task, data, None) as others:
        yield others

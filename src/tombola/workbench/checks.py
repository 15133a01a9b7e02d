"""What a run would do, and whether its results can be repeated."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from tombola.engine.estimate import Estimate, estimate
from tombola.engine.here import WorkersHere
from tombola.engine.local import LocalWorkers
from tombola.engine.verify import draw_sample, list_places, verify_chains, verify_trainings
from tombola.engine.workers import Workers
from tombola.exits import watch_exits
from tombola.store.layout import STORE
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
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
    with one_thread(), watch_exits():
        planner = open_planner(study, overrides, store=store, data=data)
        tickets = Tickets(planner)
        every = list(tickets.all())
        with _open_fresh(planner, workers, None if data is None else Path(data)) as fresh:
            if chains:
                there = [chain for chain in every if tickets.progress(chain).tickets]
                list_places(tickets, there)
                findings = list(verify_chains(planner, draw_sample(there, sample), fresh, lambda *_: None))
            else:
                findings = list(verify_trainings(planner, draw_sample(list_places(tickets, every), sample), fresh))
        rows = [(f.what, f.key, f.difference is None, f.difference, "; ".join(f.machine)) for f in findings]
        types = {"training": pl.String, "key": pl.String, "equal": pl.Boolean, "difference": pl.String}
        return pl.DataFrame(rows, {**types, "machine": pl.String}, orient="row")


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

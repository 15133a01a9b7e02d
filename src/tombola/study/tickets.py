"""Tickets: the tickets of a study in its store, each read once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from tombola.errors import NothingStoredError, UserError, kind_of
from tombola.lottery.ticket import Ticket
from tombola.store.documents import MOST_DRAWS
from tombola.streams import ambient
from tombola.study.chains import Chain, Progress
from tombola.study.planner import Planner
from tombola.study.schema import Study
from tombola.training.history import History, Trained
from tombola.training.train import check_device, evaluate_state


def check_draws(draws: int) -> None:
    """Raise `UserError` unless a number of random draws is one that the store takes.

    >>> check_draws(0)
    Traceback (most recent call last):
    tombola.errors.UserError: draws: expected a whole number from 1 to 1000, got 0
    """
    if not isinstance(draws, int) or isinstance(draws, bool) or not 1 <= draws <= MOST_DRAWS:
        raise UserError(f"draws: expected a whole number from 1 to {MOST_DRAWS}, got {draws!r}")


def check_level(study: Study, level: int) -> None:
    """Check that a study has a level.

    Raises:
        UserError: if the level is no whole number, or if it is not one of the study's levels.
    """
    if not isinstance(level, Integral) or isinstance(level, bool):
        raise UserError(f"level: expected a whole number, got {kind_of(level)}")
    if not 0 <= level <= study.levels:
        raise UserError(f"level: the study has no level {level}, it has levels 0 to {study.levels}")


class Tickets:
    """The tickets of a study that its store has. Each chain is followed once, and each result is read once.

    A chain is read when it is first used and does not change afterwards. To see results that are stored later, make
    another `Tickets`.
    The masks and the weights of the tickets stay on disk.

    Args:
        planner: the planner of the study.

    >>> import pathlib, tempfile
    >>> from tombola import Store, load_problem, load_study
    >>> study = load_study("digits")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tickets = Tickets(Planner(study, load_problem(study.task), Store(pathlib.Path(folder) / "store")))
    ...     len(tickets.progress(Chain(0, "l1")).tickets)
    0
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._progress: dict[Chain, Progress] = {}
        self._results: dict[str, Trained] = {}
        self._measured: dict[str, History] = {}

    @property
    def study(self) -> Study:
        """The study."""
        return self.planner.study

    def progress(self, chain: Chain) -> Progress:
        """Return the progress of a chain.

        Raises:
            DamagedResultError: if a stored result is damaged.
        """
        if chain not in self._progress:
            self._progress[chain] = self.planner.progress(chain, self._find)
        return self._progress[chain]

    def progress_now(self, chain: Chain) -> Progress:
        """Return the progress of a chain after something of it has been stored or computed.

        Raises:
            DamagedResultError: if a stored result is damaged.
        """
        self._progress.pop(chain, None)
        return self.progress(chain)

    def all(self) -> dict[Chain, Progress]:
        """Return the progress of every chain of the study, including the chains with other data orders.

        Raises:
            DamagedResultError: if a stored result is damaged.
        """
        return {chain: self.progress(chain) for chain in [*self.planner.chains, *self.planner.repeats]}

    def measure(self, chain: Chain) -> tuple[Ticket, ...]:
        """Return the tickets of a chain with all metrics of the task.

        Metrics that a stored result does not have, because they were not among those of the study that trained it, are
        computed from its weights, and kept in the store.

        Raises:
            UserError: if a metric cannot take the outputs of the network.
            DamagedResultError: if a stored result is damaged.
        """
        progress = self.progress(chain)
        trainings = [training for training in progress.trainings if not self.planner.is_rewind_point(training)]
        return tuple(
            replace(ticket, trained=self._add_metrics(training.key, ticket.trained))
            for ticket, training in zip(progress.tickets, trainings, strict=False)
            if ticket.trained is not None
        )

    def _add_metrics(self, key: str, trained: Trained) -> Trained:
        wanted = self.planner.problem.measures
        if all(trained.history.has(measure) for measure in wanted):
            return trained
        if key not in self._measured:
            results = self.planner.store.results
            history = _add(trained.history, results.metrics(key))
            if not all(history.has(measure) for measure in wanted):
                found = self._evaluate(trained)
                results.add_metrics(key, found)
                history = _add(history, found)
            self._measured[key] = history
        return replace(trained, history=self._measured[key])

    def _evaluate(self, trained: Trained) -> dict[str, dict[str, float | None]]:
        problem, study = self.planner.problem, self.study
        check_device(study.device)
        with ambient(0):
            model = problem.build()
        return evaluate_state(
            model,
            trained.weights.load(),
            problem.data,
            problem.loss,
            problem.metrics,
            forward=problem.forward,
            device=study.device,
            precision=study.recipe.precision,
        )

    def at(self, level: int, chains: Iterable[Chain]) -> dict[Chain, Ticket]:
        """Return the tickets of a level for the chains that have one, with their masks in memory.

        Raises:
            DamagedResultError: if a stored result is damaged.
        """
        found = {chain: self.progress(chain).tickets[level : level + 1] for chain in chains}
        return {chain: replace(one, mask=one.mask.load()) for chain, tickets in found.items() for one in tickets}

    def require(self, levels: Collection[int], chains: Collection[Chain]) -> None:
        """Check that all levels belong to the study and that all chains have them.

        Raises:
            UserError: if there is no level, if one does not belong to the study, or if a chain ends before it.
            NothingStoredError: if a chain does not have a level yet.
            DamagedResultError: if a stored result is damaged.
        """
        if not isinstance(levels, Collection):
            raise UserError(f"levels: expected several, such as [{levels!r}], got {levels!r}")
        if not len(levels):
            raise UserError("levels: expected one or more, got none")
        for level in levels:
            check_level(self.study, level)
        for chain in chains:
            end = self.progress(chain)
            if end.waits_for is None and len(end.tickets) <= max(levels):
                why = end.stopped or "its training diverged"
                raise UserError(f"{chain} has no level {max(levels)}: it ends at level {len(end.tickets) - 1} ({why})")
        have = {chain: len(self.progress(chain).tickets) for chain in chains}
        least = min(have.values(), default=0)
        if too_high := [level for level in levels if level >= least]:
            without = [chain for chain, count in have.items() if count <= min(too_high)]
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            there = f"levels 0 to {least - 1}" if least > 1 else "level 0" if least else "no level"
            raise NothingStoredError(
                f"level {min(too_high)} is not in {self.planner.store.root} yet for {without[0]}{more}; "
                f"{there} can be compared"
            )

    def last_level(self, chains: Collection[Chain]) -> int | None:
        """Return the highest level that all of these chains have; None if one of them has no level.

        Raises:
            DamagedResultError: if a stored result is damaged.
        """
        last = min((len(self.progress(chain).tickets) for chain in chains), default=0) - 1
        return last if last >= 0 else None

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the records of all trainings of the study that the store has, by name, sorted by name.

        Raises:
            DamagedResultError: if a stored result is damaged.
        """
        keys = {training.key for progress in self.all().values() for training in progress.trainings}
        return {key: self.planner.store.results.record(key) for key in sorted(keys)}

    def _find(self, key: str) -> Trained | None:
        if key not in self._results:
            found = self.planner.store.results.get(key)
            if found is None:
                return None
            self._results[key] = found
        return self._results[key]


def _add(history: History, metrics: Mapping[str, Mapping[str, float | None]]) -> History:
    """Return a history with further metrics; those that it has stay."""
    both = {
        split: {**metrics.get(split, {}), **history.metrics.get(split, {})} for split in {**metrics, **history.metrics}
    }
    return replace(history, metrics=both)

"""Evidence: the tables of a study that decide on the paper's claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import polars as pl

from tombola.analysis import layers, overlap, reinit, stability, weights
from tombola.analysis.accuracy import Row, rows
from tombola.analysis.ends import Ends, of_network
from tombola.analysis.gather import DATA_ORDER, last_level
from tombola.analysis.verdict import Verdict, need
from tombola.errors import NothingStoredError, UserError
from tombola.study.chains import Chain, select_chains
from tombola.study.tickets import Tickets

ALIKE = ("magnitude", "l1", "l2")
"""The importances that the paper's claims compare."""

SPARSITY = 0.9648
"""The sparsity at which the paper compares tickets: that of level 15, after rounds of 20 %."""


@dataclass(frozen=True)
class Evidence:
    """The tables of a study that decide on its claims.

    Args:
        compared: the importances whose tickets are compared.
        importances: the importances of the study that have tickets from level 1 on.
        level: the level at which tickets are compared.
        results: the result of each ticket of these importances.
        order_results: the results of tickets with other data orders.
        shapes: the shapes of the layers, in order, by parameter name.
        kept_dense: the layers that are counted and never pruned.
        guess: the accuracy of a random guess, in 0..1.
        layers, overlap, stability, reinit: tables of the analyses with these names; None if they are not stored.
        ends: the layers that touch the inputs and the outputs; None for the first and the last by order.
        ranges: the ranges of the dense network's weights, see `tombola.analysis.weights.ranges`; None if not known.
        data_seeds: the data orders of the study, which no further seed may have.
    """

    compared: tuple[str, ...]
    importances: tuple[str, ...]
    level: int
    results: tuple[Row, ...]
    order_results: tuple[Row, ...]
    shapes: Mapping[str, tuple[int, ...]]
    kept_dense: frozenset[str]
    guess: float
    layers: pl.DataFrame
    overlap: pl.DataFrame
    stability: pl.DataFrame
    reinit: pl.DataFrame | None = None
    ends: Ends | None = None
    ranges: pl.DataFrame | None = None
    data_seeds: tuple[int, ...] = ()

    def describe(self) -> str:
        """Return a sentence on what was compared."""
        density = statistics.fmean(row.density for row in self.results if row.level == self.level)
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed, so that there are no intervals"
        return (
            f"Tickets of {', '.join(self.compared)} are compared at level {self.level} (sparsity "
            f"{100 * (1 - density):.2f} %), from {seeds}.{self._describe_ends()}"
        )

    def _describe_ends(self) -> str:
        """Return what is to be said of the input and the output layers, with a space before each sentence."""
        if self.ends is None:
            return ""
        found = {"input": self.ends.inputs, "output": self.ends.outputs}
        uncounted = [
            f"Density does not count the {end} layer ({', '.join(names)}), so that no claim is judged by it."
            for end, names in found.items()
            if names and not self.shapes.keys() & set(names)
        ]
        return "".join(f" {sentence}" for sentence in (self.ends.fault, *uncounted) if sentence)

    @property
    def other_metric(self) -> str | None:
        """Why a claim about accuracy cannot be judged, if tickets are judged by another metric; else None."""
        measure = self.results[0].measure
        if measure.name == "accuracy":
            return None
        return f"the paper says this of accuracy, and these tickets are judged by {measure.label}"

    @property
    def seeds(self) -> list[int]:
        """The seeds that have a result at the compared level, in order."""
        return sorted({row.seed for row in self.results if row.level == self.level})

    def last_level(self, importance: str) -> int:
        """Return the last level that an importance has for every seed."""
        return min(
            max((row.level for row in self.results if (row.importance, row.seed) == (importance, seed)), default=0)
            for seed in self.seeds
        )

    @property
    def common_level(self) -> int:
        """The last level that all importances have for every seed."""
        return min(self.last_level(name) for name in self.importances)

    @property
    def more_seeds(self) -> str:
        """The seeds that would give narrower intervals: those of the study, and as many as make three or one more."""
        seeds = self.seeds
        others = (seed for seed in count(max(seeds, default=-1) + 1) if seed not in self.data_seeds)
        return need("seeds", *seeds, *islice(others, max(1, 3 - len(seeds))))

    @property
    def no_floor(self) -> tuple[Verdict, str, str]:
        """The verdict on a claim that lacks the noise floor, with what would give it."""
        names = ", ".join(self.compared)
        reason = f"there is no second data order of {names}, which gives the noise floor"
        return "not testable", reason, need("data_seeds_for", self.compared[0])

    def more_importances(self, *names: str) -> str:
        """Return the importances of the study that have tickets, and those of these names that it lacks."""
        return need("importances", *dict.fromkeys((*self.importances, *names)))

    def more_levels(self, sparsity: float) -> str:
        """Return the number of levels with which all importances reach a sparsity.

        It is empty if that is not known, or if the layers that are kept dense do not allow it.
        """
        if (last := self.common_level) < 1:
            return ""
        before, reached = (
            statistics.fmean(row.density for row in self.results if row.level == level) for level in (last - 1, last)
        )
        if not 0 < reached < before:
            return ""
        further = max(1, math.ceil(math.log((1 - sparsity) / reached, reached / before)))
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        if reached * (reached / before) ** further * sum(sizes.values()) <= sum(
            sizes[name] for name in self.kept_dense
        ):
            return ""
        return need("levels", last + further)

    @property
    def convolutional(self) -> bool:
        """Whether the network has convolutions."""
        return any(len(shape) > 2 for shape in self.shapes.values())

    @property
    def prunable(self) -> list[str]:
        """The layers of all `groups`."""
        return [name for name in self.shapes if any(name in names for names in self.groups.values())]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The layers that may be pruned: the input layer, the output layer, 1x1 shortcuts, and the other layers."""
        if len(self.shapes) < 2:
            return {"input layer": [], "output layer": [], "1x1 shortcuts": [], "other layers": []}
        ends = self.ends or Ends.by_order(self.shapes)
        inputs, outputs = ([name for name in self.shapes if name in end] for end in (ends.inputs, ends.outputs))
        inner = [name for name in self.shapes if name not in (*inputs, *outputs)]
        shortcuts = [name for name in inner if self.shapes[name][2:] in {(1, 1), (1,)}]
        others = [name for name in inner if name not in shortcuts]
        found = {"input layer": inputs, "output layer": outputs, "1x1 shortcuts": shortcuts, "other layers": others}
        return {group: [name for name in names if name not in self.kept_dense] for group, names in found.items()}


def collect(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    level: int | None = None,
    *,
    tables: Mapping[str, pl.DataFrame] | None = None,
) -> Evidence:
    """Collect the tables that decide on the claims; see `tombola.analysis.claims.of_study`.

    Args:
        tickets, importances, level: the arguments of `tombola.analysis.claims.of_study`.
        tables: by default, the tables "layers" and "reinit" are computed. If tables are given, those are used, and a
            partial reinitialisation that is not among them is taken as not stored.
    """
    study, planner = tickets.study, tickets.planner
    if importances is None:
        known = [name for name in ALIKE if name in study.importances]
        importances = known if len(known) > 1 else study.importances
    chains = select_chains(study, importances, at_least=2)
    compared = tuple(dict.fromkeys(chain.importance for chain in chains))
    last = _last_sound_level(tickets, chains)
    if last < 1:
        for chain in chains:
            for ticket in tickets.progress(chain).tickets:
                if ticket.trained is not None and ticket.trained.history.diverged_at is not None:
                    raise UserError(f"nothing can be compared: {chain} diverged at level {ticket.level}")
        raise NothingStoredError(f"no level from 1 on is in {planner.store.root} for {', '.join(compared)}")
    results = _with_pruned(rows(tickets))
    if level is None:
        level = min(range(1, last + 1), key=lambda each: distance(results, each, SPARSITY))
    elif not 1 <= level <= last:
        if 1 <= level <= study.levels:
            tickets.require([level], chains)  # raises an error that says which level is not stored
        raise UserError(f"level {level}: expected a level from 1 to {last}, which all of {', '.join(compared)} have")
    return Evidence(
        compared=compared,
        importances=tuple(name for name in study.importances if any(row.importance == name for row in results)),
        level=level,
        results=tuple(results),
        order_results=tuple(rows(tickets, planner.repeats)),
        shapes=planner.dense.shapes,
        kept_dense=planner.kept_dense,
        guess=1 / max(1, len(planner.problem.data.classes)),
        layers=layers.of_chains(tickets, select_chains(study, None)) if tables is None else tables["layers"],
        overlap=_drop_other_floors(overlap.of_study(tickets, compared, [level]), compared),
        stability=stability.of_study(tickets, compared, [level]),
        reinit=_select_reinit(_find_reinit(tickets) if tables is None else tables.get("reinit"), compared),
        ends=of_network(planner),
        ranges=weights.ranges(tickets, compared[0]),
        data_seeds=study.data_seeds,
    )


def _with_pruned(results: Sequence[Row]) -> list[Row]:
    """Return the results of the chains that have pruned; the dense network of a seed is that of all importances.

    >>> chains = [("l1", 0, 0), ("l1", 0, 1), ("l1", 1, 0), ("l2", 0, 0)]
    >>> results = [Row(name, seed, level, 0.8**level, 0.9, 8, 0.1, False) for name, seed, level in chains]
    >>> [(row.importance, row.seed, row.level) for row in _with_pruned(results)]
    [('l1', 0, 0), ('l1', 0, 1)]
    """
    pruned = {(row.importance, row.seed) for row in results if row.level}
    return [row for row in results if (row.importance, row.seed) in pruned]


def _last_sound_level(tickets: Tickets, chains: Sequence[Chain]) -> int:
    """Return the last level that all chains have, and at which no training diverged."""
    last_level(tickets, chains)  # raises an error if there is none
    lengths = []
    for chain in chains:
        histories = [ticket.trained.history for ticket in tickets.progress(chain).tickets if ticket.trained]
        lengths.append(sum(history.diverged_at is None for history in histories))
    return min(lengths) - 1


def distance(results: Sequence[Row], level: int, sparsity: float) -> float:
    """Return the distance between a sparsity and the mean sparsity of the tickets of a level."""
    return abs(1 - sparsity - statistics.fmean(row.density for row in results if row.level == level))


def _drop_other_floors(table: pl.DataFrame, compared: Collection[str]) -> pl.DataFrame:
    """Return a table of overlap without the data orders of importances that are not compared."""
    importance = pl.col("tickets").list.first().str.split("@").list.first()
    return table.filter((pl.col("kind") != DATA_ORDER) | importance.is_in(compared))


def _find_reinit(tickets: Tickets) -> pl.DataFrame | None:
    try:
        return reinit.of_study(tickets)
    except NothingStoredError:
        return None


def _select_reinit(table: pl.DataFrame | None, compared: Collection[str]) -> pl.DataFrame | None:
    """Return the sparsest partial reinitialisation of these importances; None if there is none."""
    if table is None:
        return None
    own = table.filter((pl.col("compared").list.sort() == pl.lit(sorted(compared))) & (pl.col("draws") > 0))
    return own.filter(pl.col("level") == pl.col("level").max()) if len(own) else None

"""Stability: how much trained weights change from level to level, for shared and for other connections."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import and_

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy  # loads scipy.stats when it is first used
from torch import Tensor

from tombola.analysis.gather import ALL, after, by_level, choose_levels
from tombola.analysis.values import quantile_of_sorted
from tombola.errors import UserError, as_texts
from tombola.pruning.mask import Mask
from tombola.study.chains import Chain, select_chains
from tombola.study.tickets import Tickets
from tombola.threads import check_stopped, map_in_threads
from tombola.training.weights import State

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SMALL = 8  # up to this size of a group, scipy takes the exact distribution of U if there are no ties
MEASURES = ("sd", "flipped", "flips", "flips_from_start", "movement")

Values = npt.NDArray[np.float64]
Numbers = Values | npt.NDArray[np.int64]


def of_study(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    levels: Collection[int] | None = None,
    layers: Collection[str] | None = None,
) -> pl.DataFrame:
    """Return how stable the shared connections of each ticket are, compared with its other connections.

    Shared connections are alive in all compared tickets. The columns are level, importance and seed, then those of
    `of_ticket`.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare, two or more; by default all.
        levels: the levels of the tickets, 1 or more; by default the last that all have.
        layers: the layers to return, by parameter name; by default each, and all together.

    Raises:
        UserError: if importances, levels or layers are not in the study, or not stored.
    """
    chains = select_chains(tickets.study, importances, at_least=2)
    wanted = choose_levels(tickets, chains, levels)
    if wanted[0] < 1:
        raise UserError("stability: it compares levels, so it needs a level from 1 on")
    layers = None if layers is None else as_texts(layers, "layers", "names of layers")
    for layer in layers or ():
        if layer not in [*tickets.planner.dense, ALL]:
            raise UserError(f"layers: there is no layer {layer!r}, there are {', '.join(tickets.planner.dense)}")
    masks = {(level, c): t.mask for level, ts in by_level(tickets, chains, wanted) for c, t in ts.items()}
    tables = []
    for level in wanted:
        for seed in tickets.study.seeds:
            own = [chain for chain in chains if chain.seed == seed]
            shared = reduce(and_, (masks[level, chain] for chain in own))
            first = tickets.progress(own[0]).tickets[0]  # the same for all importances
            compare = partial(
                _of_chain,
                level=level,
                tickets=tickets,
                masks={chain: masks[level, chain] for chain in own},
                shared=shared,
                dense=first.load_trained(),
                rewind=first.rewind.load(),
            )
            for chain, table in zip(own, map_in_threads(compare, own), strict=True):
                table = table if layers is None else table.filter(pl.col("layer").is_in(layers))
                tables.append(after(table, level=level, importance=chain.importance, seed=seed))
    return pl.concat(tables)


def _of_chain(
    chain: Chain, level: int, tickets: Tickets, masks: Mapping[Chain, Mask], shared: Mask, dense: State, rewind: State
) -> pl.DataFrame:
    """Return the table of `of_ticket` for the ticket of a chain."""

    def load() -> Iterator[State]:
        yield dense
        for ticket in tickets.progress(chain).tickets[1 : level + 1]:
            check_stopped()
            yield ticket.load_trained()

    initial = tickets.planner.initial(chain.seed).load()
    kept_dense = tickets.planner.kept_dense
    return of_ticket(load(), rewind, initial, masks[chain], shared, kept_dense)


def of_ticket(
    trained: Iterable[State],
    rewind: State,
    initial: State,
    mask: Mask,
    shared: Mask,
    kept_dense: Collection[str] = (),
) -> pl.DataFrame:
    """Return how stable a ticket's shared connections are, compared with its other connections.

    One row for each measure and layer, and one for all layers together ("(all)"). The latter leaves out the layers that
    are kept dense, whose connections are all shared by construction. The columns are

    - layer; measure, of a connection:
      - sd: the standard deviation (n - 1) of its trained weight over levels 0 to the ticket's.
      - flipped: 1 if at least one of its trained weights over these levels has another sign than the others, else 0.
        This is how the paper counts changes of sign; the mean is the share of such connections.
      - flips: number of levels at which its trained weight has another sign than at the level before; in 0..level.
      - flips_from_start: number of levels at which its trained weight has another sign than its weight at the rewind
        point, where each of these trainings began; in 0..level + 1.
      - movement: |trained weight of the ticket - initial weight|.
      A weight of exactly 0 has the sign 0.
    - shared, other: number of connections of the ticket that are alive in all compared tickets, and of the others.
    - shared_mean, shared_q05, q25, q50, q75, q95, and the same for other: mean and quantiles of the measure; null
      without connections.
    - effect: Cliff's delta (Psychological Bulletin 114, 1993), P(shared > other) - P(shared < other) for one
      random connection of each group; in -1..1, negative if shared connections have lower values.
    - p: p value of the two-sided Mann-Whitney U test (Annals of Mathematical Statistics 18, 1947). The test assumes
      independent connections. Those of one network are not independent, so prefer the effect.
      Both are null if one of the groups is empty.

    Args:
        trained: trained weights of levels 0, 1, .. up to the ticket's.
        rewind: weights at the rewind point.
        initial: initial weights.
        mask: mask of the ticket.
        shared: connections alive in all compared tickets; a subset of the mask.
        kept_dense: the layers that are counted and never pruned, by parameter name.
    """
    places, sizes = {}, {}
    for name, alive in mask.items():  # the places of shared connections come before those of the others
        at = np.flatnonzero(alive.numpy())
        is_shared = shared[name].numpy().take(at)
        places[name], sizes[name] = np.concatenate([at[is_shared], at[~is_shared]]), int(is_shared.sum())
    at_first = {name: _take(rewind[name], at) for name, at in places.items()}
    before: dict[str, Values] = {}
    mean = {name: np.zeros(len(values)) for name, values in at_first.items()}
    squares = {name: np.zeros(len(values)) for name, values in at_first.items()}
    flips = {name: np.zeros(len(values), np.int64) for name, values in at_first.items()}
    from_start = {name: np.zeros(len(values), np.int64) for name, values in at_first.items()}
    flipped = {name: np.zeros(len(values), np.int64) for name, values in at_first.items()}
    count = 0
    for state in trained:
        count += 1
        for name, at in places.items():
            values = _take(state[name], at)
            delta = values - mean[name]
            mean[name] += delta / count  # Welford's algorithm keeps the weights of one level in memory
            squares[name] += delta * (values - mean[name])
            from_start[name] += np.sign(values) != np.sign(at_first[name])
            if count > 1:
                changed = np.sign(values) != np.sign(before[name])
                flips[name] += changed
                flipped[name] = np.maximum(flipped[name], changed)
            before[name] = values
    measures: dict[str, Mapping[str, Numbers]] = {
        "sd": {name: np.sqrt(each / max(1, count - 1)) for name, each in squares.items()},
        "flipped": flipped,
        "flips": flips,
        "flips_from_start": from_start,
        "movement": {name: np.abs(each - _take(initial[name], places[name])) for name, each in before.items()},
    }
    pruned = [name for name in mask if name not in kept_dense]
    lines = []
    for measure, by_layer in measures.items():
        shared_ones = {name: numbers[: sizes[name]] for name, numbers in by_layer.items()}
        others = {name: numbers[sizes[name] :] for name, numbers in by_layer.items()}
        for each in (shared_ones, others):
            each[ALL] = np.concatenate([each[name] for name in pruned])
        lines += [{"layer": name, "measure": measure} | _compare(shared_ones[name], others[name]) for name in others]
    texts, counts = ("layer", "measure"), ("shared", "other")
    figures = {name: pl.Float64 for name in lines[0] if name not in (*texts, *counts)}  # also where all are null
    return pl.DataFrame(lines, schema_overrides=figures, infer_schema_length=None)


def _compare(shared: Numbers, other: Numbers) -> dict[str, float | None]:
    """Return the columns that compare two groups of numbers, which are sorted in place."""
    groups = {"shared": shared, "other": other}
    line: dict[str, float | None] = {name: len(group) for name, group in groups.items()}
    for name, group in groups.items():
        line[f"{name}_mean"] = float(group.mean()) if len(group) else None
        group.sort()
        line |= {f"{name}_q{100 * q:02.0f}": quantile_of_sorted(group, q) if len(group) else None for q in QUANTILES}
    effect = p = None
    if all(len(group) for group in groups.values()):
        statistic, p = _mann_whitney(*groups.values())
        effect = float(2 * statistic / (len(groups["shared"]) * len(groups["other"])) - 1)
    return line | {"effect": effect, "p": p}


def _mann_whitney(first: Numbers, second: Numbers) -> tuple[float, float]:
    """Return U of the first group, and the p value of the two-sided test; 1 if all values are equal.

    Args:
        first, second: sorted numbers, so that ranking them takes one merge. Whole numbers have few values, so these are
            counted: the ranks, their ties and the approximation by a normal distribution are those of scipy.
    """
    n1, n2 = len(first), len(second)
    if min(n1, n2) <= _SMALL:
        test = scipy.stats.mannwhitneyu(first, second)
        return float(test.statistic), float(test.pvalue) if np.isfinite(test.pvalue) else 1.0
    n = n1 + n2
    if first.dtype == np.float64:
        if math.isnan(first[-1]) or math.isnan(second[-1]):
            return math.nan, 1.0
        u = _count_above(first, second) if n1 < n2 else n1 * n2 - _count_above(second, first)
        both = np.sort(np.concatenate([first, second]), kind="stable")  # a merge
        begins = np.flatnonzero(np.concatenate([[True], both[1:] != both[:-1], [True]]))
        ties = np.diff(begins).astype(np.float64)
    else:
        size = 1 + int(max(first[-1], second[-1]))
        one, two = np.bincount(first, minlength=size), np.bincount(second, minlength=size)
        u = float((one * (two.cumsum() - two / 2)).sum())
        ties = (one + two).astype(np.float64)
    if ties.max() == n:  # all values are equal
        return u, 1.0
    ties = ties[ties > 1]
    spread = math.sqrt(n1 * n2 / 12 * (n + 1 - float((ties**3 - ties).sum()) / (n * (n - 1))))
    z = (max(u, n1 * n2 - u) - n1 * n2 / 2 - 0.5) / spread
    return u, min(1.0, 2 * float(scipy.special.ndtr(-z)))


def _count_above(few: Numbers, many: Numbers) -> float:
    """Return in how many pairs the value of the first group is above that of the second; equal values count half.

    Args:
        few, many: sorted numbers. Each of the first group is looked up in the second, so the first should be smaller.
    """
    below = np.searchsorted(many, few)
    tied = many.take(below, mode="clip") == few
    equal = np.searchsorted(many, few[tied], "right") - below[tied]
    return float(below.sum() + equal.sum() / 2)


def _take(weights: Tensor, places: npt.NDArray[np.intp]) -> Values:
    return weights.numpy().take(places).astype(np.float64)

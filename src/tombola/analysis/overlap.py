"""Overlap: how many connections tickets share, against chance and against the noise floor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tombola.analysis.chance import Counts, Numbers, interval, interval_of_two, moments, support
from tombola.analysis.gather import ALL, PRUNABLE, after, groups
from tombola.errors import NothingStoredError, UserError
from tombola.pruning.mask import Mask
from tombola.study.tickets import Tickets

_BLOCK = 1 << 13  # words of 64 connections per step, so that those of 15 masks fit in the cache


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return the overlap of the tickets of each seed and level: of each pair, and of all together.

    These columns come before those of `of_masks`:

    - level, seed: of the tickets.
    - kind: what differs between the tickets: "importances", or "data order". The latter is the noise floor: tickets of
      the same importance and the same initial weights that saw the data in different orders (the study's `data_seeds`).

    A ticket has the name of its importance; `l1@100` is the ticket of l1 in data order 100.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare, two or more; by default all.
        levels: the levels; by default all that are stored.

    Raises:
        UserError: if importances or levels are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    tables = []
    for group in groups(tickets, importances, levels):
        masks = {name: ticket.mask for name, ticket in group.tickets.items()}
        where = {"level": group.level, "seed": group.seed, "kind": group.kind}
        compared = _compare(masks, tickets.planner.kept_dense, together=group.complete)
        tables.append(after(compared, **where))
    if not tables:
        raise NothingStoredError(f"no two of these tickets are stored in {tickets.planner.store.root} yet")
    return pl.concat(tables)


def of_masks(masks: Mapping[str, Mask], kept_dense: Collection[str] = ()) -> pl.DataFrame:
    """Return the overlap of masks: of each pair, and of all together; in each layer and in total.

    One row for each comparison and layer, with the columns

    - tickets: names of the compared masks. k: their number.
    - layer: name of the parameter; "(all)" for the total of all counted layers, and "(prunable)" for the total without
      the layers that are kept dense, if there are any. connections: number of connections of the layer.
    - alive: connections alive in a mask (mean over the k masks).
    - shared: connections alive in all k masks.
    - shared_of_all: shared / connections, in 0..1.
    - shared_of_ticket: shared / alive, in 0..1; null if no connection is alive.
    - jaccard: shared / (connections alive in any mask), in 0..1; null if no connection is alive.
    - kappa: (A - E) / (1 - E), where A is the share of connections on which two masks agree (both alive or both
      pruned), and E the expectation of A for independent masks of the same densities. Both are averaged over all pairs
      of the k masks: Cohen's kappa
      (Educational and Psychological Measurement 20, 1960) for two, Conger's (Psychological Bulletin 88, 1980) for more.
      1 for equal masks, 0 for chance; null if E = 1.
    - layers_expected, layers_low, layers_high, layers_jaccard: chance with the same layer densities, that is, for
      independent uniformly random masks with the same number of alive connections in each layer: the expectation of
      `shared`, its central 95 % interval, and expected shared / expected alive in any.
    - global_expected, global_low, global_high, global_jaccard: chance with the same global density, that is, for masks
      with the same number of alive connections in the whole network. Layers that are kept dense are alive in these
      masks, too, and the other layers together have as many connections alive as in the masks that are compared.

    Expectations are exact. Intervals are exact (hypergeometric) for two masks, for a layer by its densities and for the
    total by the global density. All other intervals have the exact mean and variance, see
    `tombola.analysis.chance.interval`.

    Args:
        masks: name -> mask, two or more, of the same layers.
        kept_dense: the layers that are counted and never pruned, by parameter name.

    Raises:
        UserError: if there are fewer than two masks, if they belong to different networks, or if a connection of a
            layer that is kept dense is not alive.

    >>> import torch
    >>> a = Mask.from_tensors({"w": torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()})
    >>> b = Mask.from_tensors({"w": torch.tensor([0, 1, 1, 1, 0, 0, 0, 0]).bool()})
    >>> of_masks({"a": a, "b": b}).select("layer", "shared", "jaccard", "layers_expected").rows()
    [('w', 2, 0.5, 1.125), ('(all)', 2, 0.5, 1.125)]
    """
    return _compare(masks, kept_dense, together=True)


def relative_to_ticket(table: pl.DataFrame) -> pl.DataFrame:
    """Return a table of `of_study` or `of_masks` in which the counts that chance gives are shares of a ticket.

    That is, `layers_expected`, `layers_low`, `layers_high` and the same of `global` are divided by `alive`, as
    `shared_of_ticket` is; null where nothing is alive.
    """
    bounds = [f"{name}_{bound}" for name in ("layers", "global") for bound in ("expected", "low", "high")]
    return table.with_columns((pl.col(*bounds) / pl.col("alive")).fill_nan(None))


def summarise(table: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Return the means over seeds and comparisons of a table of `of_study`: one row for each value of `by`.

    The columns, after those of `by`, in the order in which they first occur:

    - connections: of the layer. density: the mean of alive / connections. comparisons: how many rows there were.
    - shared_of_ticket, lowest, highest: mean, least and greatest `shared_of_ticket`.
    - layers_expected, global_expected: the means of what chance gives, as shares of a ticket, see `relative_to_ticket`.
    - jaccard, layers_jaccard: their means.

    Args:
        table: of `of_study`, or a part of it.
        by: the columns whose values are kept apart.

    >>> import torch
    >>> a = Mask.from_tensors({"w": torch.tensor([1, 1, 0, 0]).bool()})
    >>> b = Mask.from_tensors({"w": torch.tensor([0, 1, 1, 0]).bool()})
    >>> summarise(of_masks({"a": a, "b": b}), "layer").select("layer", "density", "layers_expected").rows()
    [('w', 0.5, 0.5), ('(all)', 0.5, 0.5)]
    """
    share = pl.col("shared_of_ticket")
    return (
        relative_to_ticket(table)
        .group_by(*by, maintain_order=True)
        .agg(
            pl.col("connections").first(),
            (pl.col("alive") / pl.col("connections")).mean().alias("density"),
            pl.len().cast(pl.Int64).alias("comparisons"),
            share.mean(),
            share.min().alias("lowest"),
            share.max().alias("highest"),
            pl.col("layers_expected", "global_expected", "jaccard", "layers_jaccard").mean(),
        )
    )


def _compare(masks: Mapping[str, Mask], kept_dense: Collection[str], *, together: bool) -> pl.DataFrame:
    """Return the table of `of_masks`, for pairs only or also for all masks together."""
    if len(masks) < 2:
        raise UserError(f"overlap: expected at least two masks, got {len(masks)}")
    names, held = list(masks), list(masks.values())
    for other in held[1:]:
        if other.shapes != held[0].shapes:
            held[0] & other  # raises an error that names the layers that differ
    kept = np.array([layer in kept_dense for layer in held[0]])
    layers = [*held[0], ALL, *([PRUNABLE] if kept.any() else [])]
    sizes = np.array(list(held[0].sizes.values()), dtype=np.int64)
    common, in_all, in_any = _count(held)
    if (in_all < sizes)[kept].any():
        raise UserError(f"overlap: {', '.join(kept_dense)} should be kept dense, and have pruned connections")
    pairs = np.array(list(combinations(range(len(held)), 2)))
    first, second = pairs.T
    alive = common[range(len(held)), range(len(held))]
    shared = common[first, second]
    members = np.stack([alive[first], alive[second]])
    parts = [_columns(sizes, kept, members, shared, members.sum(axis=0) - shared, shared)]
    compared = [[names[i], names[j]] for i, j in pairs]
    if together and len(held) > 2:
        compared.append(names)
        parts.append(_columns(sizes, kept, alive[:, None], in_all[None], in_any[None], shared.mean(axis=0)[None]))
    columns = {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}
    about = pl.DataFrame({"tickets": compared}).with_columns(k=pl.col("tickets").list.len().cast(pl.Int64))
    rows = about[np.repeat(np.arange(about.height), len(layers))]
    rows = rows.with_columns(pl.Series("layer", layers * len(compared)))
    table = rows.hstack([pl.Series(name, values) for name, values in columns.items()])
    return table.with_columns(pl.col(pl.Float64).fill_nan(None))


def _count(masks: Sequence[Mask]) -> tuple[Counts, Counts, Counts]:
    """Count alive connections per layer: in masks i and j, (k, k, layers); in all and in any mask, (layers,)."""
    k, layers = len(masks), list(masks[0])
    common = np.zeros((k, k, len(layers)), dtype=np.int64)
    in_all, in_any = np.zeros((2, len(layers)), dtype=np.int64)
    bits = [mask.bits for mask in masks]
    for number, layer in enumerate(layers):
        words = np.stack([_words(each[layer]) for each in bits])
        for start in range(0, words.shape[1], _BLOCK):
            block = words[:, start : start + _BLOCK]
            for i in range(k):
                counts = _bits_set(block[i] & block[i:])
                common[i, i:, number] += counts
            in_all[number] += _bits_set(np.bitwise_and.reduce(block, axis=0)[None])[0]
            in_any[number] += _bits_set(np.bitwise_or.reduce(block, axis=0)[None])[0]
    return common, in_all, in_any


def _words(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    spare = -len(bits) % 8
    return (np.pad(bits, (0, spare)) if spare else bits).view(np.uint64)


def _bits_set(words: npt.NDArray[np.uint64]) -> Counts:
    counts: Counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return counts


def _columns(
    sizes: Counts,
    kept: npt.NDArray[np.bool_],
    members: Counts,
    shared: Counts,
    in_any: Counts,
    shared_by_two: npt.NDArray[Any],
) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of several comparisons, each of shape (comparisons, layers + totals); the totals are last.

    Args:
        sizes: connections of each layer, (layers,).
        kept: whether a layer is kept dense, (layers,).
        members: connections alive in each of the k masks, (k, comparisons, layers).
        shared, in_any: connections alive in all and in any of the masks, (comparisons, layers).
        shared_by_two: connections alive in both masks of a pair, mean over pairs, (comparisons, layers).
    """
    with_totals = partial(_with_totals, kept=kept)
    size = np.broadcast_to(with_totals(sizes), (members.shape[1], len(with_totals(sizes))))
    sets, common, union, by_two = map(with_totals, (members, shared, in_any, shared_by_two))
    alive = sets.mean(axis=0)
    mean, variance = moments(sizes, members)
    low, high = _intervals(sizes, kept, members, mean, variance)
    expected_union = with_totals(sizes * (1 - np.prod(1 - members / sizes, axis=0)))
    expected = with_totals(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = sets / size
        in_two = _mean_over_pairs(density)
        agree = 1 - 2 * (alive - by_two) / size
        by_chance = 1 - 2 * (density.mean(axis=0) - in_two)
        return {
            "connections": size,
            "alive": alive,
            "shared": common,
            "shared_of_all": common / size,
            "shared_of_ticket": common / alive,
            "jaccard": common / union,
            "kappa": np.where(by_chance < 1, (agree - by_chance) / (1 - by_chance), np.nan),
            "layers_expected": expected,
            "layers_low": low,
            "layers_high": high,
            "layers_jaccard": expected / expected_union,
            **_global_chance(sizes, kept, members),
        }


def _global_chance(sizes: Counts, kept: npt.NDArray[np.bool_], members: Counts) -> dict[str, npt.NDArray[Any]]:
    """Return the columns on chance with the same global density, for the arguments of `_columns`.

    The layers that are not kept dense form one set of connections, from which each mask takes as many at random as are
    alive in it. A layer is a further subset of this set; a layer that is kept dense is a constant.
    """
    with_totals = partial(_with_totals, kept=kept)
    dense = with_totals(np.where(kept, sizes, 0))  # in each layer and total, connections alive for certain
    others = np.broadcast_to(with_totals(np.where(kept, 0, sizes)), (members.shape[1], len(dense)))
    network = np.broadcast_to(sizes[~kept].sum(), others.shape)
    alive = np.broadcast_to(members[..., ~kept].sum(axis=-1, keepdims=True), (len(members), *others.shape))
    with_layer = np.concatenate([others[None], alive])
    mean, variance = moments(network, with_layer)
    low, high = interval(mean, variance, *support(network, with_layer))
    if len(members) == 2:
        totals = slice(len(sizes), None)
        low[:, totals], high[:, totals] = interval_of_two(network[:, totals], alive[..., totals])
    union = dense + others * (1 - np.prod(1 - alive / network, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "global_expected": dense + mean,
            "global_low": dense + low,
            "global_high": dense + high,
            "global_jaccard": (dense + mean) / union,
        }


def _intervals(
    sizes: Counts, kept: npt.NDArray[np.bool_], members: Counts, mean: Numbers, variance: Numbers
) -> tuple[Counts, Counts]:
    """Return the intervals for the densities of the layers, (comparisons, layers + totals)."""
    least, largest = support(sizes, members)
    low, high = interval(*(_with_totals(each, kept) for each in (mean, variance, least, largest)))
    if len(members) == 2:
        layers = slice(len(sizes))
        low[:, layers], high[:, layers] = interval_of_two(np.broadcast_to(sizes, members.shape[1:]), members)
    return low, high


def _with_totals(values: npt.NDArray[Any], kept: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Append the total of all layers, and that of the layers which are not kept dense if some are."""
    totals = [values.sum(axis=-1, keepdims=True)]
    if kept.any():
        totals.append(values[..., ~kept].sum(axis=-1, keepdims=True))
    return np.concatenate([values, *totals], axis=-1)


def _mean_over_pairs(density: Numbers) -> Numbers:
    """Return the mean of p_i p_j over the pairs i < j, from the sum of all p_i p_j."""
    k = len(density)
    mean: Numbers = (density.sum(axis=0) ** 2 - (density**2).sum(axis=0)) / (k * (k - 1))
    return mean

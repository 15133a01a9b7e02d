"""Overlap: how many connections tickets share, against chance and against the noise floor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tombola.analysis.chance import Counts, Numbers, interval, interval_of_two, moments, support
from tombola.analysis.gather import ALL, after, groups
from tombola.errors import NothingStoredError, UserError
from tombola.pruning.mask import Mask
from tombola.study.tickets import Tickets

_BLOCK = 1 << 13  # words of 64 connections that are compared in one go: those of 15 masks stay in the cache


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how much the tickets of each seed and level overlap: every two, and all together.

    The columns of `of_masks`, after these:

    - level, seed: whose tickets.
    - kind: what differs between them. "importances", or "data order": the noise floor, two or more tickets of the same
      importance and the same initial weights that saw the data in other orders (`data_seeds` of the study).

    Tickets are called by their importance; `l1@100` is that of l1 in data order 100.

    Args:
        tickets: of the study.
        importances: which to compare, two or more; by default all.
        levels: which; by default all that are there.

    Raises:
        UserError: where the study does not have the importances or levels.
        NothingStoredError: where the store does not have them yet.
    """
    tables = []
    for group in groups(tickets, importances, levels):
        masks = {name: ticket.mask for name, ticket in group.tickets.items()}
        where = {"level": group.level, "seed": group.seed, "kind": group.kind}
        tables.append(after(_compare(masks, together=group.complete), **where))
    if not tables:
        raise NothingStoredError(f"no two of these tickets are in {tickets.planner.store.root} yet")
    return pl.concat(tables)


def of_masks(masks: Mapping[str, Mask]) -> pl.DataFrame:
    """Return how much masks overlap: every two, and all together; layer by layer and in total.

    One row for each comparison and layer, with the columns

    - tickets: the names of the masks compared; k: how many.
    - layer: its parameter's name; "(all)" for the total. connections: how many it has.
    - alive: connections alive in a mask (the mean over the k masks).
    - shared: connections alive in all k masks.
    - shared_of_all: shared / connections, in 0..1.
    - shared_of_ticket: shared / alive, in 0..1; null where nothing is alive.
    - jaccard: shared / (connections alive in any), in 0..1; null where nothing is alive.
    - kappa: (A - E) / (1 - E) with A the share of connections on which two masks agree (both alive or both pruned), E
      what independence with the same densities gives, both averaged over all pairs of the k masks: Cohen's kappa
      (Educational and Psychological Measurement 20, 1960) for two, Conger's (Psychological Bulletin 88, 1980) for more.
      1 for equal masks, 0 for chance; null where E = 1.
    - layers_expected, layers_low, layers_high, layers_jaccard: what chance gives with the same layer densities, that is
      for independent uniformly random masks with as many connections alive in each layer: the expected `shared`, its
      central 95 % interval, and expected shared / expected alive in any.
    - global_expected, global_low, global_high, global_jaccard: the same with the global density alone, that is for
      masks with as many connections alive anywhere in the network.

    Expectations are exact. So are the intervals for two masks, of a layer by its densities and of the total by the
    global density: hypergeometric. The others have exact first two moments, see `tombola.analysis.chance.interval`.

    Args:
        masks: name -> mask, two or more, of the same layers.

    Raises:
        UserError: where there are fewer than two, or they are of different networks.

    >>> import torch
    >>> a = Mask.from_tensors({"w": torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()})
    >>> b = Mask.from_tensors({"w": torch.tensor([0, 1, 1, 1, 0, 0, 0, 0]).bool()})
    >>> of_masks({"a": a, "b": b}).select("layer", "shared", "jaccard", "layers_expected").rows()
    [('w', 2, 0.5, 1.125), ('(all)', 2, 0.5, 1.125)]
    """
    return _compare(masks, together=True)


def _compare(masks: Mapping[str, Mask], *, together: bool) -> pl.DataFrame:
    """Return the table of `of_masks`, with all of them together or only every two."""
    if len(masks) < 2:
        raise UserError(f"overlap: at least two masks are compared, got {len(masks)}")
    names, held = list(masks), list(masks.values())
    for other in held[1:]:
        if other.shapes != held[0].shapes:
            held[0] & other  # says in which layers they differ
    layers = [*held[0], ALL]
    sizes = np.array(list(held[0].sizes.values()), dtype=np.int64)
    common, in_all, in_any = _count(held)
    pairs = np.array(list(combinations(range(len(held)), 2)))
    first, second = pairs.T
    alive = common[range(len(held)), range(len(held))]
    shared = common[first, second]
    members = np.stack([alive[first], alive[second]])
    parts = [_columns(sizes, members, shared, members.sum(axis=0) - shared, shared)]
    compared = [[names[i], names[j]] for i, j in pairs]
    if together and len(held) > 2:
        compared.append(names)
        parts.append(_columns(sizes, alive[:, None], in_all[None], in_any[None], shared.mean(axis=0)[None]))
    columns = {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}
    about = pl.DataFrame({"tickets": compared}).with_columns(k=pl.col("tickets").list.len().cast(pl.Int64))
    rows = about.select(pl.all().repeat_by(len(layers)).explode(empty_as_null=False))
    rows = rows.with_columns(pl.Series("layer", layers * len(compared)))
    table = rows.hstack([pl.Series(name, values) for name, values in columns.items()])
    return table.with_columns(pl.col(pl.Float64).fill_nan(None))


def _count(masks: Sequence[Mask]) -> tuple[Counts, Counts, Counts]:
    """Count for each layer the connections alive in masks i and j, (k, k, layers), in all and in any, (layers,)."""
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
    sizes: Counts, members: Counts, shared: Counts, in_any: Counts, shared_by_two: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Return the numbers of some comparisons, each of shape (comparisons, layers + 1), the total last.

    Args:
        sizes: connections of each layer, (layers,).
        members: connections alive in each of the k masks, (k, comparisons, layers).
        shared, in_any: connections alive in all and in any of them, (comparisons, layers).
        shared_by_two: connections alive in two of them, the mean over pairs, (comparisons, layers).
    """
    k = len(members)
    size = np.broadcast_to(_with_total(sizes), (members.shape[1], len(sizes) + 1))
    sets, common, union, by_two = map(_with_total, (members, shared, in_any, shared_by_two))
    alive = sets.mean(axis=0)
    mean, variance = moments(sizes, members)
    low, high = _intervals(sizes, members, mean, variance)
    everywhere = np.broadcast_to(sets[..., -1:], sets.shape)  # the total of each mask, for every layer
    with_layer = np.concatenate([size[None], everywhere])  # a layer is one more set of the network's connections
    network = size[:, -1:]
    global_mean, global_variance = moments(network, with_layer)
    bounds = support(np.broadcast_to(network, size.shape), with_layer)
    global_low, global_high = interval(global_mean, global_variance, *bounds)
    if k == 2:
        global_low[:, -1], global_high[:, -1] = interval_of_two(size[:, -1], sets[..., -1])
    expected_union = _with_total(sizes * (1 - np.prod(1 - members / sizes, axis=0)))
    global_union = size * (1 - np.prod(1 - everywhere / network, axis=0))
    expected = _with_total(mean)
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
            "global_expected": global_mean,
            "global_low": global_low,
            "global_high": global_high,
            "global_jaccard": global_mean / global_union,
        }


def _intervals(sizes: Counts, members: Counts, mean: Numbers, variance: Numbers) -> tuple[Counts, Counts]:
    """Return the intervals by the layers' densities, (comparisons, layers + 1)."""
    least, largest = support(sizes, members)
    low, high = interval(*map(_with_total, (mean, variance, least, largest)))
    if len(members) == 2:
        low[:, :-1], high[:, :-1] = interval_of_two(np.broadcast_to(sizes, members.shape[1:]), members)
    return low, high


def _with_total(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([values, values.sum(axis=-1, keepdims=True)], axis=-1)


def _mean_over_pairs(density: Numbers) -> Numbers:
    """Return the mean of p_i p_j over the pairs i < j, from the sum of all p_i p_j."""
    k = len(density)
    mean: Numbers = (density.sum(axis=0) ** 2 - (density**2).sum(axis=0)) / (k * (k - 1))
    return mean

"""Layers: the density of each layer of a ticket, and the share of it that lies on paths from input to output."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import polars as pl

from tombola.analysis.gather import ALL, PRUNABLE, after, by_level
from tombola.analysis.paths import Paths
from tombola.errors import UserError
from tombola.inputs import select
from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.study.chains import Chain, select_chains
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.threads import map_in_threads
from tombola.training.batches import normalisation


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return the density of each layer of each ticket.

    The columns are level, importance and seed, then those of `of_mask`. If the paths of the network cannot be followed,
    the effective counts are null and a warning gives the reason.

    Args:
        tickets: tickets of the study.
        importances: the importances; by default all.
        levels: the levels; by default all that are stored.

    Raises:
        UserError: if importances or levels are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    chains = select_chains(tickets.study, importances)
    return of_chains(tickets, chains, levels, trace_paths(tickets.planner))


def of_chains(
    tickets: Tickets, chains: Sequence[Chain], levels: Collection[int] | None = None, paths: Paths | None = None
) -> pl.DataFrame:
    """Return the table of `of_study` for the tickets of some chains; without paths, the effective counts are null.

    Args:
        tickets: tickets of the study.
        chains: whose tickets.
        levels: the levels; by default all that are stored.
        paths: the network's paths, see `trace_paths`.

    Raises:
        UserError: if levels are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    tables = []
    for level, found in by_level(tickets, chains, levels):
        masks = dict.fromkeys(ticket.mask for ticket in found.values())  # all dense networks have the same
        with warnings.catch_warnings():  # here too, because threads share the filters that `Paths` sets and resets
            warnings.simplefilter("ignore")
            of_each = map_in_threads(lambda mask: of_mask(mask, paths, tickets.planner.kept_dense), masks)
        of_masks = dict(zip(masks, of_each, strict=True))
        for chain, ticket in found.items():
            tables.append(after(of_masks[ticket.mask], level=level, importance=chain.importance, seed=chain.seed))
    return pl.concat(tables)


def of_mask(mask: Mask, paths: Paths | None = None, kept_dense: Collection[str] = ()) -> pl.DataFrame:
    """Return the density of each layer of a mask.

    One row for each layer, one for all counted layers together ("(all)"), and one for those that are not kept dense
    ("(prunable)") if some are, with the columns

    - layer: name of the parameter. connections: number of its connections. alive: number of those that are alive.
    - density: alive / connections, in 0..1.
    - ahead: density of the network - density of the layer, in -1..1; positive if the layer is sparser than the network.
    - collapsed: whether no connection is alive; in a row for several layers, whether any of them has collapsed.
    - effective: alive connections that lie on a path from input to output. effective_density: effective / connections.
      Null without `paths`. 1 - effective_density is the effective sparsity of Vysogorets and Kempe (arXiv 2107.02306).

    Args:
        mask: the mask of a ticket.
        paths: the network's paths, see `Paths`.
        kept_dense: the layers that are counted and never pruned, by parameter name.

    >>> import torch
    >>> mask = Mask.from_tensors({"a": torch.tensor([True, True]), "b": torch.tensor([False, False])})
    >>> of_mask(mask).select("layer", "density", "ahead", "collapsed").rows()
    [('a', 1.0, -0.5, False), ('b', 0.0, 0.5, True), ('(all)', 0.5, 0.0, True)]
    """
    on_paths = paths.effective(mask).counts if paths is not None else None
    rows = {layer: [layer] for layer in mask} | {ALL: list(mask)}
    if kept_dense:
        rows[PRUNABLE] = [layer for layer in mask if layer not in kept_dense]
    counts, sizes = mask.counts, mask.sizes
    table = pl.DataFrame(
        [
            {
                "layer": row,
                "connections": sum(sizes[layer] for layer in layers),
                "alive": sum(counts[layer] for layer in layers),
                "collapsed": any(counts[layer] == 0 for layer in layers),
                "effective": None if on_paths is None else sum(on_paths[layer] for layer in layers),
            }
            for row, layers in rows.items()
        ],
        schema_overrides={"effective": pl.Int64},
    )
    density = pl.col("alive") / pl.col("connections")
    return table.select(
        "layer",
        "connections",
        "alive",
        density=density,
        ahead=mask.density - density,
        collapsed="collapsed",
        effective="effective",
        effective_density=pl.col("effective") / pl.col("connections"),
    )


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_study`: one row for each level, importance and layer.

    The columns, after level, importance and layer:

    - connections, and the means of density, ahead and effective_density.
    - seeds: how many there are. collapsed: in how many of them nothing is alive; in any layer, where the row is of all.

    Args:
        table: of `of_study`, or a part of it.
    """
    return table.group_by("level", "importance", "layer", maintain_order=True).agg(
        pl.col("connections").first(),
        pl.col("density", "ahead", "effective_density").mean(),
        pl.len().cast(pl.Int64).alias("seeds"),
        pl.col("collapsed").sum().cast(pl.Int64),
    )


def trace_paths(planner: Planner) -> Paths | None:
    """Return the paths of a study's network. If they cannot be followed, warn with the reason and return None."""
    problem = planner.problem
    try:
        with ambient(0):
            model = problem.build()
        inputs = normalisation(problem.data)(select(problem.data.train_inputs, slice(1)))
        return Paths(model, inputs, planner.dense, problem.forward)
    except UserError as error:
        warnings.warn(f"effective sparsity is not computed: {error}", stacklevel=2)
        return None

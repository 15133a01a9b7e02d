"""Layers: how dense each layer of a ticket is, against the whole, and how much of it lies on paths."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import polars as pl

from tombola.analysis.gather import ALL, after, by_level
from tombola.analysis.paths import Paths
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.study.planner import Planner, select_chains
from tombola.study.tickets import Tickets


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how dense each layer of each ticket is.

    The columns of `of_mask`, after level, importance and seed. Where the paths of the network cannot be followed, the
    effective ones are null and a warning says why.

    Args:
        tickets: of the study.
        importances: which; by default all.
        levels: which; by default all that are there.

    Raises:
        UserError: where the study does not have the importances or levels.
        NothingStoredError: where the store does not have them yet.
    """
    chains = select_chains(tickets.study, importances)
    paths = trace_paths(tickets.planner)
    tables = []
    for level, found in by_level(tickets, chains, levels):
        for chain, ticket in found.items():
            table = of_mask(ticket.mask, paths)
            tables.append(after(table, level=level, importance=chain.importance, seed=chain.seed))
    return pl.concat(tables)


def of_mask(mask: Mask, paths: Paths | None = None) -> pl.DataFrame:
    """Return how dense each layer of a mask is.

    One row for each layer, and one for all ("(all)"), with the columns

    - layer: its parameter's name. connections: how many it has. alive: of these.
    - density: alive / connections, in 0..1.
    - ahead: density of the whole - density of the layer, in -1..1: how far the layer's sparsity is ahead of the global
      sparsity; below 0 it is behind.
    - collapsed: whether nothing is alive; in the last row, whether any layer has collapsed.
    - effective: connections alive that lie on a path from input to output. effective_density: effective / connections.
      Null without `paths`. 1 - effective_density is the effective sparsity of Vysogorets and Kempe (arXiv 2107.02306).

    Args:
        mask: of a ticket.
        paths: the network's graph, see `Paths`.

    >>> import torch
    >>> mask = Mask.from_tensors({"a": torch.tensor([True, True]), "b": torch.tensor([False, False])})
    >>> of_mask(mask).select("layer", "density", "ahead", "collapsed").rows()
    [('a', 1.0, -0.5, False), ('b', 0.0, 0.5, True), ('(all)', 0.5, 0.0, True)]
    """
    counts, sizes = mask.counts, mask.sizes
    effective = paths.effective(mask).counts if paths is not None else None
    table = pl.DataFrame(
        {
            "layer": [*counts, ALL],
            "connections": [*sizes.values(), mask.total],
            "alive": [*counts.values(), mask.alive],
            "effective": [None] * (len(counts) + 1)
            if effective is None
            else [*effective.values(), sum(effective.values())],
        },
        schema_overrides={"effective": pl.Int64},
    )
    density = pl.col("alive") / pl.col("connections")
    return table.select(
        "layer",
        "connections",
        "alive",
        density=density,
        ahead=mask.density - density,
        collapsed=(pl.col("alive") == 0) | ((pl.col("layer") == ALL) & bool(mask.collapsed)),
        effective="effective",
        effective_density=pl.col("effective") / pl.col("connections"),
    )


def trace_paths(planner: Planner) -> Paths | None:
    """Return the graph of a study's network; None, with a warning that says why, where it cannot be followed."""
    try:
        with ambient(0):
            model = planner.problem.build()
        return Paths(model, planner.problem.data.input_shape)
    except UserError as error:
        warnings.warn(f"effective sparsity is left out: {error}", stacklevel=2)
        return None

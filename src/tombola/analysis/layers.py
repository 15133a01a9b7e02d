"""Layers: how dense each layer of a ticket is, against the whole, and how much of it lies on paths."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import polars as pl

from tombola.analysis.gather import ALL, after, by_level, select_chains
from tombola.analysis.paths import Paths
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.study.planner import Planner


def of_study(
    planner: Planner, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how dense each layer of each ticket is.

    The columns of `of_mask`, after level, importance and seed. Where the paths of the network cannot be followed, the
    effective ones are null and a warning says why.

    Args:
        planner: of the study.
        importances: which; by default all.
        levels: which; by default all that are there.

    Raises:
        UserError: where importances or levels are not there.
    """
    chains = select_chains(planner, importances)
    paths = trace_paths(planner)
    tables = []
    for level, tickets in by_level(planner, chains, levels):
        for chain, ticket in tickets.items():
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
    """Return the graph of a study's network; None, with a warning that says why, where it cannot be followed."""
    try:
        return Paths(planner.problem.build(), planner.problem.data.input_shape)
    except UserError as error:
        warnings.warn(f"effective sparsity is left out: {error}", stacklevel=2)
        return None

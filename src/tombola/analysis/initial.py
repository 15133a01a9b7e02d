"""Initial weights: how many of the connections that begin with the largest weights are in the ticket."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import polars as pl
import torch

from tombola.analysis import overlap
from tombola.analysis.gather import after, by_level, choose_levels
from tombola.analysis.values import intervals
from tombola.pruning.mask import Mask
from tombola.study.chains import select_chains
from tombola.study.tickets import Tickets
from tombola.training.weights import State


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how many of the largest initial weights of each layer are in each ticket.

    These columns come before those of `of_state`:

    - level, importance, seed: of the ticket.
    - quantity: "initial" or "rewind": the largest weights at initialisation, or at the rewind point. There are no rows
      of the latter if the study rewinds to initialisation.

    Args:
        tickets: tickets of the study.
        importances: the importances; by default all.
        levels: the levels; by default the last that all have.

    Raises:
        UserError: if importances or levels are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    chains = select_chains(tickets.study, importances)
    wanted = choose_levels(tickets, chains, levels)
    kept = tickets.planner.kept_dense
    tables = []
    for level, found in by_level(tickets, chains, wanted):
        for chain, ticket in found.items():
            states = {"initial": tickets.planner.initial(chain.seed)}
            if tickets.study.recipe.rewind:
                states["rewind"] = ticket.rewind
            for quantity, weights in states.items():
                table = of_state(weights.load(), ticket.mask, kept)
                where = {"level": level, "importance": chain.importance, "seed": chain.seed, "quantity": quantity}
                tables.append(after(table, **where))
    return pl.concat(tables)


def of_state(state: State, mask: Mask, kept_dense: Collection[str] = ()) -> pl.DataFrame:
    """Return how many of the largest weights of each layer are alive in a mask.

    Of a layer with a of n connections alive, the a connections with the largest |w| are looked at. If the weights had
    decided alone, all of them would be alive; if they had no influence, a / n of them, as by chance.

    One row for each layer and total, with the columns

    - layer, connections, alive: as in `tombola.analysis.overlap.of_masks`. A total is the sum over the layers, each
      with its own largest weights.
    - kept: the share of these a connections that is alive, in 0..1; null if a = 0.
    - expected, low, high: the expectation of `kept` for a uniformly random mask with a connections alive, and its
      central 95 % interval (hypergeometric).
    - excess: (kept - expected) / (1 - expected): 0 for chance, 1 if the weights decide; null if expected is 1.

    Args:
        state: parameter name -> weights.
        mask: the alive connections.
        kept_dense: the layers that are counted and never pruned, by parameter name.

    >>> mask = Mask.from_tensors({"w": torch.tensor([True, True, False, False])})
    >>> of_state({"w": torch.tensor([-4.0, 1.0, 3.0, 0.0])}, mask).select("kept", "expected", "excess").row(0)
    (0.5, 0.5, 0.0)
    """
    largest = Mask.from_tensors({name: _select_largest(state[name], mask.counts[name]) for name in mask})
    table = overlap.relative_to_ticket(overlap.of_masks({"ticket": mask, "largest": largest}, kept_dense))
    found = table.select(
        *("layer", "connections", "alive"),
        pl.col("shared_of_ticket").alias("kept"),
        *(pl.col(f"layers_{name}").alias(name) for name in ("expected", "low", "high")),
    )
    kept, expected = pl.col("kept"), pl.col("expected")
    return found.with_columns(excess=pl.when(expected < 1).then((kept - expected) / (1 - expected)))


def _select_largest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the `count` weights of largest magnitude are; of equal ones, the first are taken."""
    values = weights.abs().flatten().numpy()
    chosen = np.zeros(len(values), dtype=np.bool_)
    if count:
        least = np.partition(values, len(values) - count)[len(values) - count]
        chosen = values > least
        chosen[np.flatnonzero(values == least)[: count - int(chosen.sum())]] = True
    return torch.from_numpy(chosen).view_as(weights)


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_study`: one row for each level, importance, quantity and layer.

    The columns, after these: seeds, density (mean of alive / connections), the means of kept, expected and excess, and
    low and high, the 95 % interval of the mean of kept over seeds (Student's t; null for one seed).

    Args:
        table: of `of_study`, or a part of it.
    """
    by = ["level", "importance", "quantity", "layer"]
    means = table.group_by(by, maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("seeds"),
        (pl.col("alive") / pl.col("connections")).mean().alias("density"),
        pl.col("kept", "expected", "excess").mean(),
    )
    found = intervals(table, by, {"kept": (0.0, 1.0)})
    return means.with_columns(found["kept_low"].alias("low"), found["kept_high"].alias("high"))

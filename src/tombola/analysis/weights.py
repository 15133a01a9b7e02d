"""Weights: how the weights and the importances of each layer are distributed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from tombola.analysis.gather import after, by_level, last_level
from tombola.importance import Importance, Seeded
from tombola.pruning.mask import Mask
from tombola.streams import derive, generator
from tombola.study.planner import select_chains
from tombola.study.task import resolve_importance
from tombola.study.tickets import Tickets
from tombola.training.weights import State

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how weights and importances are distributed in each layer of each ticket.

    The columns of `of_state`, after these:

    - level, importance, seed: of the ticket.
    - quantity: "initial", "rewind" or "end": the weights at initialisation, at the rewind point and at the end of the
      ticket's training; or "score": the importance of each weight at the end, which the next round prunes by.

    Args:
        tickets: of the study.
        importances: which; by default all.
        levels: which; by default the last that all have.

    Raises:
        UserError: where the study does not have the importances or levels.
        NothingStoredError: where the store does not have them yet.
    """
    chains = select_chains(tickets.study, importances)
    wanted = sorted(levels) if levels is not None else [last_level(tickets, chains)]
    tables = []
    for level, found in by_level(tickets, chains, wanted):
        for chain, ticket in found.items():
            assert ticket.trained is not None
            end = ticket.trained.weights.load()
            scores = of_importance(
                end, ticket.mask, resolve_importance(chain.importance), derive(chain.seed, "pruning", level)
            )
            for quantity, table in (
                ("initial", of_state(tickets.planner.initial(chain.seed).load(), ticket.mask)),
                ("rewind", of_state(ticket.rewind.load(), ticket.mask)),
                ("end", of_state(end, ticket.mask)),
                ("score", scores),
            ):
                where = {"level": level, "importance": chain.importance, "seed": chain.seed, "quantity": quantity}
                tables.append(after(table, **where))
    return pl.concat(tables)


def of_state(state: State, mask: Mask) -> pl.DataFrame:
    """Return how the weights of a mask's connections are distributed.

    One row for each layer, with the columns layer, count (of connections alive), mean, sd (n - 1), min, q01, q05, q25,
    q50, q75, q95, q99 and max; null where there are no weights. Quantiles are interpolated linearly (type 7 of Hyndman
    and Fan, The American Statistician 50, 1996).

    Args:
        state: parameter name -> weights.
        mask: which of them.

    >>> import torch
    >>> mask = Mask.from_tensors({"w": torch.tensor([True, True, True, False])})
    >>> of_state({"w": torch.tensor([1.0, 2.0, 3.0, 9.0])}, mask).select("count", "mean", "q50", "max").rows()
    [(3, 2.0, 2.0, 3.0)]
    """
    return _table({name: state[name][mask[name]].double().numpy() for name in mask})


def of_importance(state: State, mask: Mask, importance: Importance, seed: int = 0) -> pl.DataFrame:
    """Return how an importance is distributed in each layer, over the connections alive; columns as of `of_state`.

    Args:
        state: parameter name -> weights.
        mask: which are alive.
        importance: see `tombola.importance`.
        seed: of a `Seeded` importance's random stream, as in `tombola.prune`.

    >>> import torch
    >>> from tombola.importance import l1
    >>> mask = Mask.from_tensors({"w": torch.tensor([True, True, False])})
    >>> of_importance({"w": torch.tensor([1.0, -3.0, 9.0])}, mask, l1).select("min", "max").rows()
    [(0.25, 0.75)]
    """
    scores = {}
    for name in mask:
        survivors = state[name][mask[name]].double().abs()
        if isinstance(importance, Seeded):
            scores[name] = importance.function(survivors, generator(seed, "importance", name)).numpy()
        else:
            scores[name] = importance(survivors).numpy()
    return _table(scores)


def _table(layers: dict[str, npt.NDArray[np.float64]]) -> pl.DataFrame:
    quantiles = [f"q{100 * q:02.0f}" for q in QUANTILES]
    names = ["layer", "count", "mean", "sd", "min", *quantiles, "max"]
    lines = []
    for name, values in layers.items():
        n = len(values)
        spread = float(values.std(ddof=1)) if n > 1 else None
        middle = [None] * len(QUANTILES) if n == 0 else np.quantile(values, QUANTILES).tolist()
        ends = (None, None) if n == 0 else (float(values.min()), float(values.max()))
        lines.append([name, n, float(values.mean()) if n else None, spread, ends[0], *middle, ends[1]])
    schema = dict.fromkeys(names, pl.Float64) | {"layer": pl.String, "count": pl.Int64}
    return pl.DataFrame(lines, schema, orient="row")

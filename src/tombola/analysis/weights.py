"""Weights: the distributions of weights and importances in each layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import polars as pl
import torch

from tombola.analysis.gather import after, by_level, choose_levels
from tombola.analysis.values import quantile_of_sorted
from tombola.importance import Importance, NetworkScore, Normalisation, Survivors, as_importance
from tombola.lottery.rule import pruning_seed
from tombola.lottery.ticket import Ticket
from tombola.pruning.mask import Mask
from tombola.streams import generator
from tombola.study.chains import Chain, select_chains
from tombola.study.task import resolve_importance
from tombola.study.tickets import Tickets
from tombola.threads import check_stopped, map_in_threads
from tombola.training.weights import State

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return the distributions of weights and importances in each layer of each ticket.

    These columns come before those of `of_state`:

    - level, importance, seed: of the ticket.
    - quantity: "initial", "rewind" or "end": the weights at initialisation, at the rewind point and at the end of the
      ticket's training; or "score": the importance of each weight, by which the next round prunes. Importances that
      score the whole network, such as taylor, have no rows of this quantity, because only their masks are stored.

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
    tables = []
    for level, at_level in by_level(tickets, chains, wanted):
        found = map_in_threads(lambda item: _of_ticket(tickets, *item), at_level.items())
        for chain, of_quantities in zip(at_level, found, strict=True):
            for quantity, table in of_quantities.items():
                where = {"level": level, "importance": chain.importance, "seed": chain.seed, "quantity": quantity}
                tables.append(after(table, **where))
    return pl.concat(tables)


def _of_ticket(tickets: Tickets, chain: Chain, ticket: Ticket) -> dict[str, pl.DataFrame]:
    """Return the distributions of each quantity of a ticket, by its name."""
    assert ticket.trained is not None
    weights = {
        "initial": tickets.planner.initial(chain.seed),
        "rewind": ticket.rewind,
        "end": ticket.trained.weights,
    }
    places = _find_alive(ticket.mask)
    alive = {each.hash: _take(each.load(), places) for each in weights.values()}
    check_stopped()
    tables = {name: _describe(values) for name, values in alive.items()}
    found = {quantity: tables[each.hash] for quantity, each in weights.items()}
    importance = resolve_importance(chain.importance)
    if not isinstance(importance.score, NetworkScore):
        at_rewind = alive[ticket.rewind.hash]
        scored = alive[weights["end"].hash] if tickets.study.score_at == "end" else at_rewind
        check_stopped()
        numbers = pruning_seed(chain.order_seed, ticket.level)
        found["score"] = _describe(_score(scored, importance, numbers, at_rewind))
    return found


def ranges(tickets: Tickets, importance: str) -> pl.DataFrame:
    """Return the range, maximum - minimum, of the dense network's weights in each layer, by seed.

    The columns are seed, layer, and the ranges `initial` and `end`, at initialisation and after the training.

    Args:
        tickets: tickets of the study.
        importance: an importance of the study whose first training, which all importances share, is stored.
    """
    found = []
    for chain in select_chains(tickets.study, [importance]):
        trained = tickets.progress(chain).tickets[0].trained
        if trained is None:
            continue
        initial, end = tickets.planner.initial(chain.seed).load(), trained.weights.load()
        found += [
            (chain.seed, name, *(float(state[name].max() - state[name].min()) for state in (initial, end)))
            for name in tickets.planner.dense
        ]
    kinds = {"seed": pl.Int64, "layer": pl.String, "initial": pl.Float64, "end": pl.Float64}
    return pl.DataFrame(found, kinds, orient="row")


def of_state(state: State, mask: Mask) -> pl.DataFrame:
    """Return the distribution of the weights of a mask's alive connections.

    One row for each layer, with the columns layer, count (of alive connections), mean, sd (n - 1), min, q01, q05, q25,
    q50, q75, q95, q99 and max; null if there are no weights. Quantiles are interpolated linearly (type 7 of Hyndman
    and Fan, The American Statistician 50, 1996).

    Args:
        state: parameter name -> weights.
        mask: selects the weights.

    >>> import torch
    >>> mask = Mask.from_tensors({"w": torch.tensor([True, True, True, False])})
    >>> of_state({"w": torch.tensor([1.0, 2.0, 3.0, 9.0])}, mask).select("count", "mean", "q50", "max").rows()
    [(3, 2.0, 2.0, 3.0)]
    """
    return _describe(_take(state, _find_alive(mask)))


def of_importance(
    state: State,
    mask: Mask,
    importance: Importance | Normalisation,
    seed: int = 0,
    *,
    rewound: State | None = None,
) -> pl.DataFrame:
    """Return the distribution of an importance over the alive connections of each layer; columns as in `of_state`.

    Args:
        state: parameter name -> weights.
        mask: selects the alive connections.
        importance: see `tombola.importance`.
        seed: seed of the random stream that the importance may draw from, as in `tombola.prune`.
        rewound: the weights at the rewind point, for scores that need them, such as `movement`.

    >>> import torch
    >>> from tombola.importance import l1
    >>> mask = Mask.from_tensors({"w": torch.tensor([True, True, False])})
    >>> of_importance({"w": torch.tensor([1.0, -3.0, 9.0])}, mask, l1).select("min", "max").rows()
    [(0.25, 0.75)]
    """
    places = _find_alive(mask)
    at_rewind = None if rewound is None else _take(rewound, places)
    return _describe(_score(_take(state, places), as_importance(importance), seed, at_rewind))


def _find_alive(mask: Mask) -> State:
    """Return the places of the alive connections of each layer, in flat order."""
    return {name: torch.from_numpy(np.flatnonzero(alive.numpy())) for name, alive in mask.items()}


def _take(state: State, places: State) -> State:
    """Return the weights of each layer at some places."""
    return {name: state[name].take(at) for name, at in places.items()}


def _score(alive: State, importance: Importance, seed: int, rewound: State | None) -> State:
    """Return the importance of each alive connection; see `of_importance`."""
    scores = {}
    for name, each in alive.items():
        weights = each.double()
        start = {} if rewound is None else {"rewound": rewound[name].double().clone}
        survivors = Survivors(weights.abs(), generator(seed, "importance", name), weights.clone, **start)
        scores[name] = importance.of(survivors)
    return scores


def _describe(layers: State) -> pl.DataFrame:
    """Return the distribution of the numbers of each layer; columns as in `of_state`."""
    quantiles = [f"q{100 * q:02.0f}" for q in QUANTILES]
    names = ["layer", "count", "mean", "sd", "min", *quantiles, "max"]
    lines = []
    for name, numbers in layers.items():
        values = numbers.double().numpy()
        ordered, n = np.sort(values), len(values)
        spread = float(values.std(ddof=1)) if n > 1 else None
        middle = [quantile_of_sorted(ordered, q) if n else None for q in QUANTILES]
        ends = (None, None) if n == 0 else (float(values.min()), float(values.max()))
        lines.append([name, n, float(values.mean()) if n else None, spread, ends[0], *middle, ends[1]])
    schema = dict.fromkeys(names, pl.Float64) | {"layer": pl.String, "count": pl.Int64}
    return pl.DataFrame(lines, schema, orient="row")

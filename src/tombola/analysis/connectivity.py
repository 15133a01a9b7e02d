"""Connectivity: the error along the straight line between the weights of two trained tickets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

import polars as pl
import torch
from torch import Tensor, nn

from tombola.analysis.gather import after, groups, last_level
from tombola.datasets.dataset import Dataset
from tombola.errors import NothingStoredError, UserError
from tombola.lottery.ticket import Ticket
from tombola.streams import ambient
from tombola.study.planner import Planner, select_chains
from tombola.study.tickets import Tickets
from tombola.training.batches import normalisation
from tombola.training.evaluation import evaluate
from tombola.training.weights import State

POINTS = 11
_EXAMPLES = 10_000  # of the training set, for the statistics of batch norm
_AT_ONCE = 500

Measure = Callable[[State], tuple[float, float | None]]
"""Test error, in 0..1, and test loss of a state."""


def of_study(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    levels: Collection[int] | None = None,
    points: int = POINTS,
) -> pl.DataFrame:
    """Return the error along the line between every two trained tickets of a seed and level.

    The columns of `along_line`, after these:

    - level, seed: of the tickets.
    - kind: what differs between them: "importances" or "data order".
    - tickets: the two.

    The statistics of batch norm are computed anew at every point, the ends too, from (the first 10,000 examples of) the
    training set without augmentation.

    Args:
        tickets: of the study.
        importances: which to compare, two or more; by default all.
        levels: which; by default the last that all have.
        points: on the line, both ends among them.

    Raises:
        UserError: where the study does not have the importances or levels.
        NothingStoredError: where the store does not have them yet.
    """
    wanted = set(levels) if levels is not None else {last_level(tickets, select_chains(tickets.study, importances))}
    measure = make_measure(tickets.planner)
    tables = []
    for group in groups(tickets, importances, wanted):
        for pair in combinations(group.tickets, 2):
            first, second = (_trained(group.tickets[name]) for name in pair)
            table = along_line(first, second, measure, points)
            named = table.select(pl.Series("tickets", [list(pair)] * len(table)), pl.all())
            tables.append(after(named, level=group.level, seed=group.seed, kind=group.kind))
    if not tables:
        raise NothingStoredError(f"no two of these tickets are in {tickets.planner.store.root} yet")
    return pl.concat(tables)


def along_line(first: State, second: State, measure: Measure, points: int = POINTS) -> pl.DataFrame:
    """Return the error at the points (1 - alpha) first + alpha second.

    One row for each point, with the columns

    - alpha: in 0..1. error: of the test set, in 0..1. loss: the test loss; null where it is not finite.
    - barrier: in every row the same, the largest over alpha of error(alpha) - ((1 - alpha) error(0) + alpha error(1)),
      at least 0, which it is at both ends (Entezari et al., arXiv 2110.06296; where both ends have the same error it is
      the instability of Frankle et al., arXiv 1912.05671).

    Args:
        first, second: states of one network. What is no floating-point number is taken from `first`.
        measure: gives error and loss of a state.
        points: how many, both ends among them.

    Raises:
        UserError: where the states are of different networks, or points are fewer than two.

    >>> one, other = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
    >>> along_line(one, other, lambda state: (float(state["w"] * (1 - state["w"])), 0.0), points=3)["barrier"].to_list()
    [0.25, 0.25, 0.25]
    """
    if points < 2:
        raise UserError(f"points: expected 2 or more, got {points}")
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        raise UserError("connectivity: the two states are of different networks")
    lines = []
    for number in range(points):
        alpha = number / (points - 1)
        error, loss = measure({name: _between(tensor, second[name], alpha) for name, tensor in first.items()})
        lines.append((alpha, error, loss))
    ends = lines[0][1], lines[-1][1]
    barrier = max(error - ((1 - alpha) * ends[0] + alpha * ends[1]) for alpha, error, _ in lines)
    schema = {"alpha": pl.Float64, "error": pl.Float64, "loss": pl.Float64}
    return pl.DataFrame(lines, schema, orient="row").with_columns(barrier=pl.lit(barrier))


def make_measure(planner: Planner) -> Measure:
    """Return the function that gives a state's error and loss on the study's test set."""
    with ambient(0):
        model = planner.problem.build()

    def measure(state: State) -> tuple[float, float | None]:
        model.load_state_dict(state)
        recompute_statistics(model, planner.problem.data)
        accuracy, loss = evaluate(model, planner.problem.data, planner.problem.loss)
        return 1 - accuracy, loss

    return measure


def recompute_statistics(model: nn.Module, data: Dataset) -> None:
    """Set the running statistics of the model's batch norms to the means over batches of the training set."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    inputs, normalise = data.train_inputs[:_EXAMPLES], normalisation(data)
    with torch.inference_mode():
        for part in inputs.chunk(-(-len(inputs) // _AT_ONCE)):
            model(normalise(part))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if not first.is_floating_point() or alpha == 0:
        return first
    return second if alpha == 1 else torch.lerp(first, second, alpha)


def _trained(ticket: Ticket) -> State:
    assert ticket.trained is not None
    return ticket.trained.weights.load()

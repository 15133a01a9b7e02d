"""Connectivity: the error along the straight line between the weights of two trained tickets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

import polars as pl
import torch
from torch import Tensor, nn

from tombola.analysis.defaults import POINTS
from tombola.analysis.gather import after, choose_levels, groups
from tombola.analysis.networks import Networks
from tombola.datasets.dataset import Dataset
from tombola.errors import NothingStoredError, UserError
from tombola.inputs import Forward, call, select
from tombola.lottery.ticket import Ticket
from tombola.study.chains import select_chains
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.threads import Kept, check_stopped, map_in_threads
from tombola.training.batches import normalisation
from tombola.training.evaluation import evaluate
from tombola.training.weights import State, Weights

_EXAMPLES = 10_000  # number of training examples for the statistics of batch norm
_AT_ONCE = 500
_ROOM = 1 << 29  # bytes of the states in memory

Measure = Callable[[State], tuple[float, float | None]]
"""A function that returns the test error, in 0..1, and the test loss of a state."""


def of_study(
    tickets: Tickets,
    importances: Sequence[str] | None = None,
    levels: Collection[int] | None = None,
    points: int = POINTS,
) -> pl.DataFrame:
    """Return the error along the line between each pair of trained tickets of a seed and level.

    These columns come before those of `along_line`:

    - level, seed: of the tickets.
    - kind: what differs between the tickets: "importances" or "data order".
    - tickets: names of the two.

    The statistics of batch norm are recomputed at every point, including the ends, from the first 10,000 examples of
    the training set (or all, if there are fewer) without augmentation.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare, two or more; by default all.
        levels: the levels; by default the last that all have.
        points: number of points on the line, including both ends.

    Raises:
        UserError: if importances or levels are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    wanted = choose_levels(tickets, select_chains(tickets.study, importances), levels)
    line = Lines(tickets.planner, points)
    tables = []
    for group in groups(tickets, importances, wanted):
        found = map_in_threads(lambda pair: line(*pair), combinations(group.tickets.values(), 2))
        for pair, table in zip(combinations(group.tickets, 2), found, strict=True):
            named = table.select(pl.Series("tickets", [list(pair)] * len(table)), pl.all())
            tables.append(after(named, level=group.level, seed=group.seed, kind=group.kind))
    if not tables:
        raise NothingStoredError(f"no two of these tickets are stored in {tickets.planner.store.root} yet")
    return pl.concat(tables)


class Lines:
    """The lines between trained tickets of a study, see `along_line`.

    A ticket is evaluated once, on however many lines it is, and each line is computed once. Several threads may ask for
    lines at the same time.

    Args:
        planner: the planner of the study.
        points: number of points on each line, including both ends.

    Raises:
        UserError: if labels are no classes, or there are fewer than two points.
    """

    def __init__(self, planner: Planner, points: int = POINTS) -> None:
        _check_points(points)
        self._measure, self._points = build_measure(planner), points
        self._states: Kept[Weights, State] = Kept(lambda weights: weights.load(), _count_bytes, _ROOM)
        self._ends, self._lines = Kept(self._measure), Kept(self._compute)

    def __call__(self, first: Ticket, second: Ticket) -> pl.DataFrame:
        """Return the error at the points between two trained tickets."""
        assert first.trained is not None
        assert second.trained is not None
        one, other = first.trained.weights, second.trained.weights
        return self._lines((one.hash, other.hash), (one, other))

    def _compute(self, pair: tuple[Weights, Weights]) -> pl.DataFrame:
        states, ends = dict[str, State](), dict[str, tuple[float, float | None]]()
        # An end that another thread is evaluating comes last, so that this thread does not wait in the meantime.
        for weights in sorted(pair, key=lambda weights: weights.hash in self._ends):
            states[weights.hash] = self._states(weights.hash, weights)
            ends[weights.hash] = self._ends(weights.hash, states[weights.hash])
        first, second = (weights.hash for weights in pair)
        return along_line(states[first], states[second], self._measure, self._points, [ends[first], ends[second]])


def along_line(
    first: State,
    second: State,
    measure: Measure,
    points: int = POINTS,
    ends: Sequence[tuple[float, float | None]] = (),
) -> pl.DataFrame:
    """Return the error at the points (1 - alpha) first + alpha second.

    One row for each point, with the columns

    - alpha: position on the line, in 0..1. error: test error, in 0..1. loss: test loss; null if it is not finite.
    - barrier: the maximum over alpha of error(alpha) - ((1 - alpha) error(0) + alpha error(1)), the same in every row.
      It is at least 0, its value at both ends (Entezari et al., arXiv 2110.06296). If both ends have the same error, it
      is the instability of Frankle et al. (arXiv 1912.05671).

    Args:
        first, second: states of one network. Between the two, tensors that are not floating point are those of `first`.
        measure: returns error and loss of a state.
        points: number of points, including both ends.
        ends: error and loss of the two states, if they are known.

    Raises:
        UserError: if the states belong to different networks, or there are fewer than two points.

    >>> one, other = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
    >>> along_line(one, other, lambda state: (float(state["w"] * (1 - state["w"])), 0.0), points=3)["barrier"].to_list()
    [0.25, 0.25, 0.25]
    """
    _check_points(points)
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        raise UserError("connectivity: the two states belong to different networks")
    lines = []
    for number in range(points):
        alpha = number / (points - 1)
        if ends and alpha in (0, 1):
            error, loss = ends[int(alpha)]
        else:
            error, loss = measure({name: _between(tensor, second[name], alpha) for name, tensor in first.items()})
        lines.append((alpha, error, loss))
    begin, end = lines[0][1], lines[-1][1]
    barrier = max(error - ((1 - alpha) * begin + alpha * end) for alpha, error, _ in lines)
    schema = {"alpha": pl.Float64, "error": pl.Float64, "loss": pl.Float64}
    return pl.DataFrame(lines, schema, orient="row").with_columns(barrier=pl.lit(barrier))


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each line of a table of `of_study`.

    The columns, after level, seed, kind and tickets: first and second, the error of the two tickets; highest, the
    highest error on the line; barrier.

    Args:
        table: of `of_study`, or a part of it.
    """
    error = pl.col("error")
    lines = table.group_by("level", "seed", "kind", "tickets", maintain_order=True)
    return lines.agg(first=error.first(), second=error.last(), highest=error.max(), barrier=pl.col("barrier").first())


def build_measure(planner: Planner) -> Measure:
    """Return a function that computes the error and the loss of a state on the study's test set, in any thread."""
    if not planner.problem.of_classes:
        raise UserError(
            "connectivity: its error is that of predicted classes, and the labels of this data are no classes"
        )
    networks, problem = Networks(planner.problem), planner.problem

    def measure(state: State) -> tuple[float, float | None]:
        with networks.holding(state) as model:
            recompute_statistics(model, problem.data, problem.forward)
            accuracy, loss = evaluate(model, problem.data, problem.loss, problem.forward)
        return 1 - accuracy, loss

    return measure


def recompute_statistics(model: nn.Module, data: Dataset, forward: Forward = call) -> None:
    """Set the running statistics of the model's batch norms to the means over batches of the training set."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    count, normalise = min(_EXAMPLES, data.held_examples), normalisation(data)
    with torch.inference_mode():
        for part in torch.arange(count).chunk(-(-count // _AT_ONCE)):
            check_stopped()
            examples = slice(int(part[0]), int(part[-1]) + 1)
            forward(model, normalise(select(data.train_inputs, examples)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _count_bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _check_points(points: int) -> None:
    if points < 2:
        raise UserError(f"points: expected 2 or more, got {points}")


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if not first.is_floating_point() or alpha == 0:
        return first
    return second if alpha == 1 else torch.lerp(first, second, alpha)

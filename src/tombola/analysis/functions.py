"""Functions: how often tickets make the same prediction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import cast

import polars as pl
import torch
from torch import Tensor

from tombola.analysis.gather import DATA_ORDER, IMPORTANCES, SEEDS, after, choose_levels, groups
from tombola.analysis.networks import Networks
from tombola.errors import UserError
from tombola.lottery.ticket import Ticket
from tombola.study.chains import select_chains
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.threads import Kept, map_in_threads
from tombola.training.evaluation import predict
from tombola.training.metrics import flatten_classes, list_classes
from tombola.training.weights import Weights

_REMEMBERED = 16  # number of networks whose outputs are kept: those of one level


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how often the trained tickets of each seed and level make the same prediction on the test set.

    These columns come before those of `of_outputs`:

    - level, seed: of the tickets; seed is null if the tickets have different seeds.
    - kind: what differs between the tickets: "importances", "data order" (the same importance and initial weights) or,
      for level 0, "seeds". Level 0 is always included for comparison. Its tickets are the dense networks, of which a
      seed has only one for all importances.

    Where classes are those of positions, such as the tokens of a text, each position counts as an example.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare, two or more; by default all.
        levels: the levels; by default the last that all have.

    Raises:
        UserError: if importances or levels are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    wanted = choose_levels(tickets, select_chains(tickets.study, importances), levels)
    ask = _Outputs(tickets.planner)
    dense: dict[str, Ticket] = {}
    tables = []
    for group in groups(tickets, importances, {0, *wanted}):
        if group.level == 0 and group.kind == IMPORTANCES:
            dense[f"seed {group.seed}"] = next(iter(group.tickets.values()))
        if group.level in wanted or group.kind == DATA_ORDER:
            tables.append(after(ask.compare(group.tickets), level=group.level, seed=group.seed, kind=group.kind))
    if len(dense) > 1:
        tables.append(after(ask.compare(dense), level=0, seed=None, kind=SEEDS))
    return pl.concat([table.with_columns(pl.col("seed").cast(pl.Int64)) for table in tables]).sort(
        "level", maintain_order=True
    )


def of_outputs(outputs: Mapping[str, Tensor], labels: Tensor) -> pl.DataFrame:
    """Return how often networks make the same prediction: each pair, and all together.

    One row for each comparison, with the columns

    - tickets: names of the compared networks. k: their number. examples: number of test examples.
    - agreement: share of the examples for which all k predict the same class, in 0..1. low, high: its 95 % interval
      over examples (Wilson, Journal of the American Statistical Association 22, 1927).
    - expected: the agreement of independent predictions: sum over classes of the product of the shares of examples for
      which each network predicts the class.
    - kappa: (agreement - expected) / (1 - expected), Cohen's kappa (1960) for two; null if expected is 1.
    - accuracy: mean of the k accuracies, in 0..1.
    - ensemble_accuracy: accuracy of the mean of the k predicted probabilities (softmax), in 0..1.

    Where an output of an example is NaN, as after a training that diverged, no class is predicted.

    Args:
        outputs: name -> outputs before softmax, shape (examples, classes); two or more.
        labels: the true classes, shape (examples,).

    Raises:
        UserError: if there are fewer than two outputs, or their shapes differ.

    >>> one, other = torch.eye(4), torch.eye(4)[[0, 1, 2, 2]]
    >>> of_outputs({"a": one, "b": other}, torch.arange(4)).select("agreement", "accuracy").rows()
    [(0.75, 0.875)]
    """
    shapes = {tuple(each.shape) for each in outputs.values()}
    if len(outputs) < 2 or len(shapes) > 1:
        raise UserError(f"functions: expected two outputs or more of one shape, got {len(outputs)} of shapes {shapes}")
    return of_probabilities({name: each.double().softmax(1) for name, each in outputs.items()}, labels)


def of_probabilities(probabilities: Mapping[str, Tensor], labels: Tensor) -> pl.DataFrame:
    """Return the table of `of_outputs` for the probabilities that networks predict.

    Args:
        probabilities: name -> probabilities, shape (examples, classes), float64; two or more of one shape.
        labels: the true classes, shape (examples,).

    >>> one, other = torch.eye(4).double(), torch.eye(4).double()[[0, 1, 2, 2]]
    >>> of_probabilities({"a": one, "b": other}, torch.arange(4)).select("agreement", "accuracy").rows()
    [(0.75, 0.875)]
    """
    names = list(probabilities)
    groups = list(combinations(names, 2)) + ([tuple(names)] if len(names) > 2 else [])
    classes = {name: _predict(each) for name, each in probabilities.items()}
    number = next(iter(probabilities.values())).shape[1]
    counts = {name: torch.bincount(each, minlength=number)[:number] for name, each in classes.items()}
    shares = {name: each.double() / len(labels) for name, each in counts.items()}
    accuracies = {name: float((each == labels).double().mean()) for name, each in classes.items()}
    lines = []
    for group in groups:
        first = classes[group[0]]
        same = torch.stack([classes[name] == first for name in group]).all(0) & (first < number)
        agreement = float(same.double().mean())
        expected = float(torch.stack([shares[name] for name in group]).prod(0).sum())
        ensemble = _predict(reduce(torch.add, (probabilities[name] for name in group)))
        lines.append(
            {
                "tickets": list(group),
                "k": len(group),
                "examples": len(labels),
                "agreement": agreement,
                **dict(zip(("low", "high"), wilson(int(same.sum()), len(labels)), strict=True)),
                "expected": expected,
                "kappa": (agreement - expected) / (1 - expected) if expected < 1 else None,
                "accuracy": sum(accuracies[name] for name in group) / len(group),
                "ensemble_accuracy": float((ensemble == labels).double().mean()),
            }
        )
    return pl.DataFrame(lines, schema_overrides={"kappa": pl.Float64})


def _predict(probabilities: Tensor) -> Tensor:
    """Return the predicted class of each example; the number of classes, which is none of them, where one is NaN."""
    return probabilities.argmax(1).masked_fill_(probabilities.isnan().any(1), probabilities.shape[1])


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability from `successes` in `trials` (Wilson 1927).

    >>> tuple(round(bound, 4) for bound in wilson(8, 10))
    (0.4902, 0.9433)
    """
    z = 1.959963984540054
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return (max(0.0, (centre - half) / (1 + z * z / trials)), min(1.0, (centre + half) / (1 + z * z / trials)))


class _Outputs:
    """Computes the outputs of trained tickets on the test set, and keeps those of the last few networks."""

    def __init__(self, planner: Planner) -> None:
        if not planner.problem.of_classes:
            raise UserError("functions: it compares predicted classes, and the labels of this data are no classes")
        self._labels = cast(Tensor, planner.problem.data.test_labels)
        self._data, self._forward = planner.problem.data, planner.problem.forward
        self._networks = Networks(planner.problem)
        self._known = Kept(self._compute, lambda _: 1, _REMEMBERED)

    def __call__(self, ticket: Ticket) -> Tensor:
        assert ticket.trained is not None
        return self._known(ticket.trained.weights.hash, ticket.trained.weights)

    def _compute(self, weights: Weights) -> Tensor:
        with self._networks.holding(weights.load()) as model:
            return flatten_classes(predict(model, self._data, self._forward), self._labels)[0]

    def compare(self, tickets: Mapping[str, Ticket]) -> pl.DataFrame:
        """Return the table of `of_outputs` for the outputs of trained tickets on the test set."""
        outputs = dict(zip(tickets, map_in_threads(self, tickets.values()), strict=True))
        return of_outputs(outputs, list_classes(self._labels))

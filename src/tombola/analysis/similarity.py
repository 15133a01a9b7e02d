"""Similarity: how alike trained networks are as functions, in their predictions and in each layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import polars as pl
import torch
from torch import Tensor, nn

from tombola.analysis.functions import of_probabilities
from tombola.analysis.gather import NO_PAIRS, SEEDS, after, choose_levels, pairs
from tombola.analysis.networks import Networks
from tombola.analysis.values import intervals
from tombola.analysis.winners import Bounds
from tombola.errors import UserError
from tombola.inputs import convert, count_examples, select
from tombola.lottery.ticket import Ticket
from tombola.study.chains import select_chains
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.threads import Kept, map_in_threads
from tombola.training.batches import normalisation
from tombola.training.evaluation import predict
from tombola.training.metrics import flatten_classes, list_classes
from tombola.training.weights import Weights

OUTPUTS = "(outputs)"
"""The value of the column `layer` for what the network returns."""

EXAMPLES = 256
"""The number of test examples on which layers are compared."""

BINS = 15

_WITHIN: dict[str, Bounds] = {
    **dict.fromkeys(("cka", "kappa", "gain"), (-1.0, 1.0)),
    "kl": (0.0, math.inf),
    "js": (0.0, math.log(2)),
}
"""The smallest and the largest value of figures that are not in 0..1."""

_LEAST = torch.finfo(torch.float64).min
_VALUES = 4096  # of an example, whose products are added up in the precision of the outputs
_ROWS = 64  # examples at once: only one of the two products of two examples in different blocks is computed
_ROOM = 1 << 30  # bytes of the answers that are kept


@dataclass(frozen=True)
class Answers:
    """What a network answers to test examples.

    Args:
        outputs: before softmax, shape (examples, classes).
        layers: the similarities of some examples in each layer, see `compare_examples`, each of shape (n, n).
    """

    outputs: Tensor
    layers: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """The number of bytes of the outputs, the probabilities, their logarithms, and the similarities."""
        return 20 * self.outputs.numel() + sum(8 * each.numel() for each in self.layers.values())

    @cached_property
    def log_probabilities(self) -> Tensor:
        """The logarithms of the predicted probabilities, float64; finite, so that 0 log 0 = 0."""
        exact = self.outputs.double()
        return (exact - exact.logsumexp(1, keepdim=True)).clamp_(min=_LEAST)

    @cached_property
    def probabilities(self) -> Tensor:
        """The predicted probabilities, float64."""
        return self.log_probabilities.exp()

    @cached_property
    def entropy(self) -> float:
        """The mean over examples of the entropy of the predicted probabilities, in nats."""
        return _entropy(self.probabilities)


def of_study(
    tickets: Tickets, importances: Sequence[str] | None = None, levels: Collection[int] | None = None
) -> pl.DataFrame:
    """Return how alike each two trained tickets are as functions.

    These columns come before those of `of_pair`:

    - level, seed: of the tickets; seed is null if they have different seeds. Level 0, the dense networks, is always
      included for comparison.
    - kind: what differs between the tickets: "importances", "data order" or "seeds" (tickets of one importance from
      different initialisations; they are called `l1, seed 0`).
    - tickets: names of the two.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare; by default all. One is enough where the study has several seeds.
        levels: the levels; by default the last that all have.

    Raises:
        UserError: if importances or levels are not in the study, or if there are no two tickets to compare.
        NothingStoredError: if they are not stored yet.
    """
    chains = select_chains(tickets.study, importances)
    wanted = choose_levels(tickets, chains, levels)
    ask = _Networks(tickets.planner)
    labels = list_classes(cast(Tensor, tickets.planner.problem.data.test_labels))

    def compare(found: tuple[dict[str, Any], tuple[Ticket, Ticket]]) -> pl.DataFrame:
        where, (one, other) = found
        names = where.pop("tickets")
        table = of_pair(ask(one), ask(other), labels)
        return after(table.select(pl.Series("tickets", [names] * len(table)), pl.all()), **where)

    tables = map_in_threads(compare, pairs(tickets, importances, {0, *wanted}))
    if not tables:
        raise UserError(f"there are no two networks to compare: {NO_PAIRS}")
    found = pl.concat([table.with_columns(pl.col("seed").cast(pl.Int64)) for table in tables])
    return found.sort("level", maintain_order=True)


def of_pair(first: Answers, second: Answers, labels: Tensor) -> pl.DataFrame:
    """Return how alike two networks are as functions.

    One row for the outputs, and one for each layer, with the columns

    - layer: "(outputs)", or the name of a linear or convolution layer. A layer has only the column cka.
    - cka: linear centred kernel alignment, HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), of the layer's outputs on the
      first 256 test examples (Kornblith et al., arXiv 1905.00414), with the unbiased estimator of HSIC (Song et al.,
      Journal of Machine Learning Research 13, 2012), which is 0 on average for independent layers of any width; at most
      1, which it is for outputs that are equal up to a rotation and scale. Null where a layer's outputs are constant. A
      layer whose outputs do not have one entry for each example in the first place has no row.
    - disagreement: share of the test examples for which the two predict different classes, in 0..1. low, high: its 95 %
      interval over examples (Wilson). expected: that of independent predictions. kappa: Cohen's, see
      `tombola.analysis.functions.of_outputs`.
    - kl: mean over examples of (KL(p || q) + KL(q || p)) / 2 of the predicted probabilities p and q, in nats.
    - js: mean over examples of the Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 = H(m) - (H(p) + H(q)) / 2
      with m = (p + q) / 2 and the entropy H, in nats, in 0..ln 2.
    - accuracy: mean of the two accuracies, in 0..1. gain: accuracy of the mean of the two predicted probabilities,
      minus accuracy.
    - ece, ensemble_ece: mean of the two expected calibration errors, and that of the mean of the two predicted
      probabilities, see `calibration_error`.

    Args:
        first, second: the answers of the networks to the same examples.
        labels: the true classes, shape (examples,).

    >>> one, other = torch.eye(4), torch.eye(4)[[0, 1, 2, 2]]
    >>> of_pair(Answers(one, {}), Answers(other, {}), torch.arange(4)).select("disagreement", "accuracy").rows()
    [(0.25, 0.875)]
    """
    p, q = first.probabilities, second.probabilities
    middle = (p + q).div_(2)
    agreed = of_probabilities({"first": p, "second": q}, labels).row(0, named=True)
    figures = {
        "disagreement": 1 - agreed["agreement"],
        "low": 1 - agreed["high"],
        "high": 1 - agreed["low"],
        "expected": 1 - agreed["expected"],
        "kappa": agreed["kappa"],
        "kl": float((p - q).flatten() @ (first.log_probabilities - second.log_probabilities).flatten()) / (2 * len(p)),
        "js": max(_entropy(middle) - (first.entropy + second.entropy) / 2, 0.0),  # below 0 only by rounding; may be NaN
        "accuracy": agreed["accuracy"],
        "gain": agreed["ensemble_accuracy"] - agreed["accuracy"],
        "ece": sum(calibration_error(each, labels) for each in (p, q)) / 2,
        "ensemble_ece": calibration_error(middle, labels),
    }
    unknown = dict.fromkeys(figures)
    lines = [
        {"layer": name, "cka": _align(first.layers, second.layers, name), **(figures if name == OUTPUTS else unknown)}
        for name in dict.fromkeys([OUTPUTS, *first.layers])
    ]
    return pl.DataFrame(lines, schema={name: pl.String if name == "layer" else pl.Float64 for name in lines[0]})


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum()) / len(probabilities)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: sum over bins of |B| / n * |accuracy(B) - confidence(B)|, in 0..1.

    The bins divide 0..1 evenly by the probability of the predicted class (Guo et al., arXiv 1706.04599).

    Args:
        probabilities: shape (n, classes).
        labels: the true classes, shape (n,).
        bins: their number.

    >>> calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    0.25
    """
    confidence, predicted = probabilities.double().max(1)
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = (predicted == labels).double() - confidence
    return float(torch.zeros(bins, dtype=torch.float64).index_add(0, number, surplus).abs().sum() / len(labels))


def compare_examples(outputs: Tensor) -> Tensor:
    """Return the products of a layer's outputs for each two examples, U-centred (Szekely and Rizzo 2014), float64.

    K = X X^T has its diagonal set to 0, and its row and column means subtracted such that each row sums to 0. The
    sum of the products of two such matrices, divided by n (n - 3), is the unbiased estimator of HSIC.

    Args:
        outputs: shape (n, ...), n of 4 or more. The products of 4096 values at a time are added up in its precision, or
            in single precision if it has less.

    >>> compare_examples(torch.randn(6, 3)).sum(0).abs().max() < 1e-9
    tensor(True)
    """
    flat, n = outputs.flatten(1).to(torch.promote_types(outputs.dtype, torch.float32)), len(outputs)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part in torch.split(flat, _VALUES, 1):
        shifted = part - part[0]  # exactly 0 where all examples are alike, as in a dead layer
        shifted -= shifted.mean(0)  # like the line before, it changes nothing but the rounding
        for row in range(0, n, _ROWS):
            gram[row : row + _ROWS, row:] += shifted[row : row + _ROWS] @ shifted[row:].T
    gram = gram.triu(1)
    gram += gram.T.clone()
    rows = gram.sum(0) / (n - 2)
    centred = gram - rows[:, None] - rows[None, :] + gram.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0.0)


def _align(first: Mapping[str, Tensor], second: Mapping[str, Tensor], layer: str) -> float | None:
    if layer not in first or layer not in second:
        return None
    one, other = first[layer], second[layer]
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size > 0 else None


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Return the means over seeds of a table of `of_study`: one row for each level, two tickets and layer.

    The columns are level, kind, tickets (of two seeds: their importance, or dense), layer, pairs (how many were
    averaged), and for each figure of `of_pair`, such as kl: kl, the mean over seeds, after the mean over the pairs of a
    seed; and kl_low and kl_high, its 95 % interval over seeds, see `tombola.analysis.values.intervals`. They are null
    for one seed, and for tickets of two seeds, whose pairs share seeds and are not independent.

    Args:
        table: of `of_study`, or a part of it.
    """
    dense = pl.col("level") == 0
    together = pl.col("tickets").list.join(" & ")
    of_one = pl.col("tickets").list.first().str.replace(r", seed -?\d+$", "")
    figures = [name for name in table.columns[table.columns.index("layer") + 1 :] if name not in ("low", "high")]
    by = ["level", "kind", "tickets", "layer"]
    of_seeds = (
        table.with_columns(
            tickets=pl.when(dense).then(pl.lit("dense")).when(pl.col("kind") == SEEDS).then(of_one).otherwise(together)
        )
        .group_by(*by, "seed", maintain_order=True)
        .agg(pl.len().cast(pl.Int64).alias("pairs"), pl.col(*figures).mean())
    )
    pairs = of_seeds.group_by(by, maintain_order=True).agg(pl.col("pairs").sum())
    means = intervals(of_seeds, by, {name: _WITHIN.get(name, (0.0, 1.0)) for name in figures})
    return pairs.hstack(means.select(pl.exclude(by))).sort("level", "kind", maintain_order=True)


def select_outputs(means: pl.DataFrame) -> pl.DataFrame:
    """Return the rows about the outputs, without those about layers.

    Args:
        means: of `summarise`.
    """
    return means.filter(pl.col("layer") == OUTPUTS)


class _Networks:
    """Asks trained tickets for their answers to the test set, and keeps those of the last networks."""

    def __init__(self, planner: Planner) -> None:
        self._data, self._forward = planner.problem.data, planner.problem.forward
        if not planner.problem.of_classes:
            raise UserError(
                f"similarity: it compares predicted classes, and the labels of {self._data.name!r} are no classes"
            )
        self._networks = Networks(planner.problem)
        few = convert(torch.clone, select(self._data.test_inputs, slice(EXAMPLES)))
        self._inputs = normalisation(self._data)(few)
        self._known = Kept(self._compute, lambda answers: answers.size, _ROOM)

    def __call__(self, ticket: Ticket) -> Answers:
        assert ticket.trained is not None
        return self._known(ticket.trained.weights.hash, ticket.trained.weights)

    def _compute(self, weights: Weights) -> Answers:
        with self._networks.holding(weights.load()) as model:
            outputs, layers = self._look(model)
            if count_examples(self._data.test_inputs) > EXAMPLES:
                outputs = torch.cat([outputs, predict(model, self._data, self._forward, begin=EXAMPLES)])
        scores, _ = flatten_classes(outputs, cast(Tensor, self._data.test_labels))
        return Answers(scores, layers)

    def _look(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the outputs for the first examples, and their similarities in each layer, in the order of the calls.

        There are none of fewer than four examples, and none of outputs that do not have one entry for each example in
        the first place, such as those of a layer that is given the positions of a sequence first.
        """
        found: dict[str, Tensor] = {}
        examples = count_examples(self._inputs)
        compared = examples >= 4
        hooks = []
        for name, module in model.named_modules() if compared else ():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):

                def note(_: nn.Module, __: object, outputs: Tensor, name: str = name) -> None:
                    if len(outputs) == examples:
                        found[name] = compare_examples(outputs)

                hooks.append(module.register_forward_hook(note))
        try:
            with torch.inference_mode():
                outputs = self._forward(model.eval(), convert(torch.clone, self._inputs))
                if compared:
                    found[OUTPUTS] = compare_examples(outputs)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs.float(), found

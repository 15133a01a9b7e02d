"""Similarity of networks as functions: by hand, and in another way."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import polars as pl
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tombola import Dataset, Planner, Problem
from tombola.analysis.similarity import (
    EXAMPLES,
    OUTPUTS,
    Answers,
    _Networks,
    calibration_error,
    compare_examples,
    of_pair,
    summarise,
)
from tombola.training.weights import Weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(one: Tensor, other: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """Return the figures of two networks' outputs."""
    labels = torch.zeros(len(one), dtype=torch.int64) if labels is None else labels
    line = of_pair(Answers(one, {}), Answers(other, {}), labels).row(0, named=True)
    return {name: value for name, value in line.items() if name != "layer"}


def align(one: Tensor, other: Tensor) -> float | None:
    first, second = ({"x": compare_examples(each)} for each in (one, other))
    outputs = torch.eye(2)
    table = of_pair(Answers(outputs, first), Answers(outputs, second), torch.arange(2))
    assert table["layer"].to_list() == [OUTPUTS, "x"]
    assert table["disagreement"].to_list() == [0.0, None]
    found: float | None = table["cka"][1]
    return found


def test_divergences_are_those_of_scipy() -> None:
    one, other = random(20, 5), random(20, 5, seed=1)
    p, q = (each.softmax(1).numpy() for each in (one, other))
    found = compare(one, other)
    assert found["kl"] == pytest.approx((entropy(p, q, axis=1) + entropy(q, p, axis=1)).mean() / 2)
    assert found["js"] == pytest.approx((jensenshannon(p, q, axis=1) ** 2).mean())


def test_equal_networks_differ_in_nothing_and_opposite_ones_in_all() -> None:
    one = 100 * torch.eye(2, dtype=torch.float64)
    same = compare(one, one, torch.arange(2))
    assert {name: same[name] for name in ("disagreement", "kl", "js", "gain")} == dict.fromkeys(
        ("disagreement", "kl", "js", "gain"), 0.0
    )
    opposite = compare(1e4 * one, 1e4 * one.flip(0), torch.arange(2))  # probabilities that are exactly 0 and 1
    assert (opposite["disagreement"], opposite["kl"], opposite["accuracy"]) == (1.0, 1e6, 0.5)
    assert opposite["js"] == pytest.approx(math.log(2))


def test_no_divergence_is_below_zero_by_rounding() -> None:
    """Of outputs that differ by a constant; for some of them H(m) - (H(p) + H(q)) / 2 is less than 0."""
    for seed in range(50):
        one = random(20, 5, seed=seed)
        assert 0 <= compare(one, one + 1)["js"] < 1e-12


def test_predictions_by_hand() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    one = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])  # predicts 0 1 0 0
    other = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 9.0], [0.0, 1.0]])  # predicts 0 1 1 1
    found = compare(one, other, labels)
    assert (found["disagreement"], found["accuracy"], found["gain"]) == (0.5, 0.75, 0.25)
    assert found["low"] < 0.5 < found["high"]
    assert found["expected"] == pytest.approx(1 - 2 * 3 / 4 * 1 / 4)


def test_a_summary_has_means_over_pairs_and_no_intervals_over_examples() -> None:
    one, labels = random(20, 5), torch.zeros(20, dtype=torch.int64)
    pairs = [of_pair(Answers(one, {}), Answers(random(20, 5, seed=seed), {}), labels) for seed in (1, 2)]
    tickets = pl.Series("tickets", [["l1, seed 0", "l1, seed 1"]])
    where = [pl.lit(1).alias("level"), pl.lit(None, pl.Int64).alias("seed"), pl.lit("seeds").alias("kind"), tickets]
    table = pl.concat([pair.select(*where, pl.all()) for pair in pairs])
    found = summarise(table)
    assert "low" not in found.columns
    assert "high" not in found.columns
    assert found.select("tickets", "pairs", "kl").row(0) == ("l1", 2, pytest.approx(table["kl"].mean()))


def test_of_three_examples_no_layer_is_compared() -> None:
    inputs, labels = random(3, 4).float(), torch.tensor([0, 1, 0])
    problem = Problem(Dataset("few", inputs, labels, inputs, labels), lambda: nn.Linear(4, 2), cross_entropy, {})
    weights = Weights.of(nn.Linear(4, 2).state_dict())
    ticket: Any = SimpleNamespace(trained=SimpleNamespace(weights=weights))
    assert _Networks(cast(Planner, SimpleNamespace(problem=problem)))(ticket).layers == {}


def test_a_layer_that_is_given_positions_first_is_not_compared() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, self.last(self.first(inputs.transpose(0, 1)).mean(0)))

    inputs, labels = random(6, 15).float().reshape(6, 5, 3), torch.arange(6) % 2
    problem = Problem(Dataset("turned", inputs, labels, inputs, labels), Turned, cross_entropy, {})
    ticket: Any = SimpleNamespace(trained=SimpleNamespace(weights=Weights.of(Turned().state_dict())))
    assert list(_Networks(cast(Planner, SimpleNamespace(problem=problem)))(ticket).layers) == ["last", OUTPUTS]


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.15, 0.85], [0.55, 0.45], [0.56, 0.44]])
    labels = torch.tensor([0, 0, 0, 1])
    # one bin for each of 0.95 and 0.85; 0.55 and 0.56 share one with accuracy 0.5 and confidence 0.555
    assert calibration_error(probabilities, labels, 10) == pytest.approx((0.05 + 0.85 + 2 * 0.055) / 4)
    assert calibration_error(probabilities, labels, 1) == pytest.approx(abs(0.5 - (0.95 + 0.85 + 0.55 + 0.56) / 4))
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0.0
    edge = torch.tensor([[0.75, 0.25], [0.875, 0.125]])  # a bin contains its upper end, so 0.75 has one of its own
    assert calibration_error(edge, torch.tensor([1, 0]), 4) == (0.75 + 0.125) / 2


def test_the_calibration_error_in_another_way() -> None:
    probabilities, labels = (3 * random(200, 4)).softmax(1), torch.arange(200) % 4
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert calibration_error(probabilities, labels) == pytest.approx(expected)


def test_alignment_is_that_of_the_unbiased_estimator() -> None:
    """HSIC_1 as Song et al. write it: traces and sums of the Gram matrices without their diagonals."""

    def hsic(one: Tensor, other: Tensor) -> float:
        a, b = ((each @ each.T).fill_diagonal_(0.0) for each in (one, other))
        n = len(a)
        rest = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
        return float(((a @ b).trace() + rest) / (n * (n - 3)))

    one, other = random(70, 3), random(70, 3) + random(70, 3, seed=1)  # of two blocks of examples
    expected = hsic(one, other) / math.sqrt(hsic(one, one) * hsic(other, other))
    assert align(one, other) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_alignment_does_not_change_by_rotation_scale_and_shift() -> None:
    one = random(10, 4)
    turned = 3 * one @ torch.linalg.qr(random(4, 4, seed=1)).Q + 7
    assert align(one, turned) == pytest.approx(1.0)
    assert align(one.view(10, 2, 2), one) == pytest.approx(1.0)  # an image is as many values


def test_products_of_wide_layers_in_single_precision_are_those_in_double() -> None:
    """The values have a mean that is large beside their differences, as those after a bias may have."""
    wide = random(8, 3, 70, 50).float() + 300
    exact, found = compare_examples(wide.double()), compare_examples(wide)
    assert found.equal(found.T)
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    other_order = compare_examples(wide.double().flatten(1).flip(1))
    assert (other_order - exact).abs().max() < 1e-9 * exact.abs().max()


def test_outputs_of_half_precision_are_multiplied_in_single() -> None:
    """The products overflow in half precision, which has no number above 65504."""
    few = (1000 * random(8, 50)).half()
    exact, found = compare_examples(few.double()), compare_examples(few)
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_layer_with_the_same_outputs_for_all_examples_is_aligned_with_none() -> None:
    """As a layer without connections, whose outputs are its bias: rounding errors must not be compared."""
    dead = random(1, 40).float().expand(25, 40)
    assert compare_examples(dead).count_nonzero() == 0
    assert align(dead, random(25, 40, seed=1).float()) is None


def test_an_impossible_class_counts_nothing() -> None:
    one = torch.tensor([[0.0, 1.0, -math.inf], [1.0, 0.0, -math.inf]])
    found, without = (compare(each, each.flip(0), torch.arange(2)) for each in (one, one[:, :2]))
    assert found["kl"] == pytest.approx(without["kl"])
    assert found["js"] == pytest.approx(without["js"])


def test_independent_layers_of_any_width_are_not_aligned() -> None:
    """The usual estimator would give more than 0.9 for layers this wide."""
    found = [align(random(40, 800, seed=2 * seed), random(40, 800, seed=2 * seed + 1)) for seed in range(10)]
    assert abs(sum(each or 0.0 for each in found)) / 10 < 0.03


def test_a_constant_layer_has_no_alignment() -> None:
    assert align(torch.zeros(5, 3), random(5, 3)) is None


def test_each_example_is_evaluated_once() -> None:
    seen: list[int] = []

    def forward(model: nn.Module, inputs: Any) -> torch.Tensor:
        seen.append(len(inputs))
        return cast(torch.Tensor, model(inputs))

    inputs, network = random(EXAMPLES + 44, 4).float(), nn.Linear(4, 2)
    labels = torch.arange(len(inputs)) % 2
    data = Dataset("many", inputs, labels, inputs, labels)
    problem = Problem(data, lambda: nn.Linear(4, 2), cross_entropy, {}, forward=forward)
    ticket: Any = SimpleNamespace(trained=SimpleNamespace(weights=Weights.of(network.state_dict())))
    answers = _Networks(cast(Planner, SimpleNamespace(problem=problem)))(ticket)
    assert seen == [EXAMPLES, 44]
    assert torch.allclose(answers.outputs, network(inputs), atol=1e-6)
    assert {name: len(layer) for name, layer in answers.layers.items()} == {"": EXAMPLES, OUTPUTS: EXAMPLES}

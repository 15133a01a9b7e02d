"""Every importance through one suite of properties, and each against its formula taken literally."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tombola import Mask, UserError, Weights, prune
from tombola.importance import (
    IMPORTANCES,
    NORMALISATIONS,
    SCORES,
    Importance,
    Seeded,
    as_importance,
    find,
    is_built_in,
    l1,
    l2,
    lamp,
    magnitude,
    min_max,
    normalisation,
    random,
    rank,
    scores,
    softmax,
)
from tombola.lottery.rule import Rule, prune_round

EPSILON = 2.0**-52

often = settings(deadline=None, max_examples=40)


@dataclass(frozen=True)
class Traits:
    """What holds for an importance."""

    sums_to_one: bool = False
    scale: str = "none"  # what scaling all weights does: "invariant", "proportional" or "none" of these
    by_weight: bool = True  # it depends on the weights, and on nothing else


TRAITS = {
    "magnitude": Traits(scale="proportional"),
    "l1": Traits(sums_to_one=True, scale="invariant"),
    "l2": Traits(sums_to_one=True, scale="invariant"),
    "softmax": Traits(sums_to_one=True),
    "min_max": Traits(scale="invariant"),
    "lamp": Traits(scale="invariant"),
    "rank": Traits(),  # invariant, but rounding can make two weights equal
    "random": Traits(by_weight=False),
}

every = pytest.mark.parametrize("name", IMPORTANCES)


def those(holds: Callable[[Traits], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, traits in TRAITS.items() if holds(traits)])


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


finite = st.floats(min_value=0, max_value=1.7e308)
"""Any finite absolute weight: 0, those below the normal range, and the largest."""

usual = st.floats(min_value=1e-3, max_value=1e3)
layers = st.lists(finite | st.sampled_from([0.0, 0.5, 1.0]), max_size=40).map(tensor)
"""Layers of every length from 0, with weights that repeat."""

usual_layers = st.lists(usual | st.just(0.0), min_size=1, max_size=40).filter(any).map(tensor)


def test_the_table_has_every_importance() -> None:
    assert set(TRAITS) == set(IMPORTANCES)


@every
@often
@given(weights=layers)
def test_one_finite_float64_for_each_weight_which_stays_as_it_was(name: str, weights: Tensor) -> None:
    before = weights.clone()
    scores = IMPORTANCES[name](weights)
    assert scores.shape == weights.shape
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert weights.equal(before)


@pytest.mark.parametrize("name", NORMALISATIONS)
@often
@given(scores=layers)
def test_a_normalisation_keeps_number_and_order_and_is_repeatable(name: str, scores: Tensor) -> None:
    before = scores.clone()
    values = NORMALISATIONS[name](scores)
    assert values.shape == scores.shape
    assert values.dtype == torch.float64
    assert values.isfinite().all()
    ascending = values[scores.argsort()]
    assert (ascending[1:] >= ascending[:-1]).all()
    assert values.equal(NORMALISATIONS[name](scores))
    assert scores.equal(before)


@those(lambda traits: traits.by_weight)
@often
@given(weights=layers, copies=st.integers(2, 5))
def test_equal_weights_count_the_same(name: str, weights: Tensor, copies: int) -> None:
    scores = IMPORTANCES[name](weights.repeat(copies)).view(copies, -1)
    assert (scores == scores[0]).all()


@those(lambda traits: traits.by_weight)
@often
@given(weights=usual_layers, draw=st.randoms(use_true_random=False))
def test_permuted_weights_have_permuted_importances(name: str, weights: Tensor, draw: Random) -> None:
    permutation = list(range(len(weights)))
    draw.shuffle(permutation)
    # Sums may be in another order, so the last bits may differ.
    scores = IMPORTANCES[name](weights[permutation])
    torch.testing.assert_close(scores, IMPORTANCES[name](weights)[permutation], rtol=len(weights) * EPSILON, atol=0)


@those(lambda traits: traits.sums_to_one)
@often
@given(weights=layers.filter(lambda weights: bool(weights.any())))
def test_a_layer_sums_to_one(name: str, weights: Tensor) -> None:
    total = math.fsum(IMPORTANCES[name](weights).tolist())
    assert abs(total - 1) <= (len(weights) + 3) * EPSILON


@those(lambda traits: traits.scale == "invariant")
@often
@given(weights=usual_layers, exponent=st.integers(-500, 500), factor=usual)
def test_scale_does_not_matter(name: str, weights: Tensor, exponent: int, factor: float) -> None:
    scores = IMPORTANCES[name](weights)
    assert IMPORTANCES[name](weights * 2.0**exponent).equal(scores), "a power of two changes no bit"
    if name != "min_max":  # where rounding of the product is magnified by the difference
        torch.testing.assert_close(IMPORTANCES[name](weights * factor), scores, rtol=1e-13, atol=0)


@those(lambda traits: traits.scale == "proportional")
@often
@given(weights=usual_layers, exponent=st.integers(-500, 500))
def test_scale_is_kept(name: str, weights: Tensor, exponent: int) -> None:
    assert IMPORTANCES[name](weights * 2.0**exponent).equal(IMPORTANCES[name](weights) * 2.0**exponent)


def test_scale_matters_to_softmax() -> None:
    weights = tensor([1.0, 2.0])
    assert softmax(weights)[1] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-15)
    assert softmax(2 * weights)[1] == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-15)


# What the paper defines, taken literally and, but for exp, in exact arithmetic.


def exact_l1(weights: list[Fraction]) -> list[Fraction]:
    return [w / sum(weights) for w in weights]


def exact_l2(weights: list[Fraction]) -> list[Fraction]:
    return [w**2 / sum(v**2 for v in weights) for w in weights]


def exact_min_max(weights: list[Fraction]) -> list[Fraction]:
    return [(w - min(weights)) / (max(weights) - min(weights)) for w in weights]


def exact_lamp(weights: list[Fraction]) -> list[Fraction]:
    return [w**2 / sum(v**2 for v in weights if v >= w) if w else w for w in weights]


def exact_rank(weights: list[Fraction]) -> list[Fraction]:
    others = len(weights) - 1
    return [(sum(v < w for v in weights) + Fraction(weights.count(w) - 1, 2)) / others for w in weights]


@pytest.mark.parametrize(
    ("importance", "exact"),
    [(l1, exact_l1), (l2, exact_l2), (min_max, exact_min_max), (lamp, exact_lamp), (rank, exact_rank)],
)
@often
@given(weights=usual_layers.filter(lambda weights: bool((weights != weights[0]).any())))
def test_formulas(
    importance: Callable[[Tensor], Tensor], exact: Callable[[list[Fraction]], list[Fraction]], weights: Tensor
) -> None:
    expected = exact([Fraction(w) for w in weights.tolist()])
    # One rounding for each term of a sum, and a few for the rest: nothing may cancel.
    allowed = (len(weights) + 6) * Fraction(EPSILON)
    for score, value in zip(importance(weights).tolist(), expected, strict=True):
        assert abs(Fraction(score) - value) <= allowed * value


@often
@given(weights=st.lists(st.floats(0, 50), min_size=1, max_size=40))
def test_softmax_formula(weights: list[float]) -> None:
    powers = [math.exp(w) for w in weights]
    expected = tensor([power / math.fsum(powers) for power in powers])
    torch.testing.assert_close(softmax(tensor(weights)), expected, rtol=1e-14, atol=0)


def test_magnitude_is_the_weight() -> None:
    assert magnitude(tensor([3.0, 0.0, 1e-300])).tolist() == [3.0, 0.0, 1e-300]


def test_the_sums_of_lamp_do_not_cancel() -> None:
    # The total minus the sum of what is smaller would be off by the rounding of the total, which is 100,000 times as
    # large as the sum over the few largest.
    weights = torch.rand(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest, where = weights.topk(10)
    squares = largest.square().tolist()
    expected = [square / math.fsum(squares[: place + 1]) for place, square in enumerate(squares)]
    assert lamp(weights)[where].tolist() == pytest.approx(expected, rel=1e-14, abs=0)


TINY, HUGE = 1e-300, 1e300
SMALLEST = 5e-324

DEGENERATE: dict[str, tuple[list[float], dict[str, list[float]]]] = {
    "empty": ([], {name: [] for name in IMPORTANCES}),
    "one survivor": (
        [0.3],
        {"magnitude": [0.3], "l1": [1], "l2": [1], "softmax": [1], "min_max": [1], "lamp": [1], "rank": [1]},
    ),
    "all equal": (
        [0.3] * 4,
        {
            "magnitude": [0.3] * 4,
            "l1": [0.25] * 4,
            "l2": [0.25] * 4,
            "softmax": [0.25] * 4,
            "min_max": [1] * 4,
            "lamp": [0.25] * 4,
            "rank": [0.5] * 4,
        },
    ),
    "all zero": (
        [0, 0],
        {
            "magnitude": [0, 0],
            "l1": [0, 0],
            "l2": [0, 0],
            "softmax": [0.5, 0.5],
            "min_max": [1, 1],
            "lamp": [0, 0],
            "rank": [0.5, 0.5],
        },
    ),
    "one survivor, zero": (
        [0],
        {"magnitude": [0], "l1": [0], "l2": [0], "softmax": [1], "min_max": [1], "lamp": [0], "rank": [1]},
    ),
    "huge": (
        [HUGE, 0, HUGE],
        {
            "magnitude": [HUGE, 0, HUGE],
            "l1": [0.5, 0, 0.5],
            "l2": [0.5, 0, 0.5],
            "softmax": [0.5, 0, 0.5],
            "min_max": [1, 0, 1],
            "lamp": [0.5, 0, 0.5],
            "rank": [0.75, 0, 0.75],
        },
    ),
    "tiny": (
        [TINY, 3 * TINY],
        {
            "magnitude": [TINY, 3 * TINY],
            "l1": [0.25, 0.75],
            "l2": [0.1, 0.9],
            "softmax": [0.5, 0.5],
            "min_max": [0, 1],
            "lamp": [0.1, 1],
            "rank": [0, 1],
        },
    ),
    "the smallest there is": (
        [SMALLEST, SMALLEST, 0],
        {
            "magnitude": [SMALLEST, SMALLEST, 0],
            "l1": [0.5, 0.5, 0],
            "l2": [0.5, 0.5, 0],
            "softmax": [1 / 3, 1 / 3, 1 / 3],
            "min_max": [1, 1, 0],
            "lamp": [0.5, 0.5, 0],
            "rank": [0.75, 0.75, 0],
        },
    ),
    "tiny beside huge": (
        [TINY, HUGE],
        {
            "magnitude": [TINY, HUGE],
            "l1": [0, 1],
            "l2": [0, 1],
            "softmax": [0, 1],
            "min_max": [0, 1],
            "lamp": [0, 1],
            "rank": [0, 1],
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        pytest.param(name, weights, expected, id=f"{name}, {case}")
        for case, (weights, by_name) in DEGENERATE.items()
        for name, expected in by_name.items()
    ],
)
def test_degenerate_layers(name: str, weights: list[float], expected: list[float]) -> None:
    assert IMPORTANCES[name](tensor(weights)).tolist() == pytest.approx(expected, rel=4 * EPSILON, abs=0)


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_layers_are_defined_for_every_importance(case: str) -> None:
    assert set(DEGENERATE[case][1]) | {"random"} == set(IMPORTANCES)


# Names.


@pytest.mark.parametrize("name", IMPORTANCES)
def test_names(name: str) -> None:
    assert IMPORTANCES[name].name == name


def own(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("importance", "name", "description"),
    [
        (Importance(scores.magnitude), "magnitude", "|w|, the usual score of the lottery ticket hypothesis "
                                                    "(Frankle and Carbin, arXiv 1803.03635)"),
        (l1, "l1", "x / sum(x), in 0..1; the values of a layer sum to one"),
        (Importance(scores.random, normalisation.softmax), "random/softmax",
         "exp(x) / sum(exp(x)), in 0..1; the values of a layer sum to one, of the score random"),
        (as_importance(own), "own", "own"),
        (Importance(scores.random, own), "random/own", "own, of the score random"),
        (Seeded(lambda w, g: w), "<lambda>", "<lambda>"),
        (as_importance(nn.Identity()), "Identity", None),
    ],
)  # fmt: skip
def test_names_and_descriptions_of_combinations(importance: Importance, name: str, description: str | None) -> None:
    assert importance.name == name
    if description is not None:
        assert importance.description == description


def test_an_importance_stays_as_it_is() -> None:
    assert as_importance(l1) is l1
    assert as_importance(own) == as_importance(own)
    assert as_importance(own).name == "own"
    assert as_importance(own)(torch.ones(2)).equal(own(torch.ones(2)))


# Random numbers.


def test_random_is_repeatable_by_seed() -> None:
    weights = torch.ones(50, dtype=torch.float64)
    assert random(weights, seed=3).equal(random(weights, seed=3))
    assert not random(weights, seed=3).equal(random(weights, seed=4))
    assert ((random(weights) >= 0) & (random(weights) < 1)).all()


def test_random_does_not_depend_on_the_weights() -> None:
    assert random(torch.ones(50, dtype=torch.float64)).equal(random(torch.arange(50, dtype=torch.float64)))


def _random_masks(seed: int, level: int) -> Mask:
    state = {name: torch.ones(10, 10) for name in ("first.weight", "second.weight")}
    dense = Mask.from_tensors({name: weight.bool() for name, weight in state.items()})
    weights = Weights.of(state)
    return prune_round(weights, dense, level, weights, importance=random, rule=Rule(0.5), seed=seed)


def test_random_is_another_in_each_layer_and_round() -> None:
    assert _random_masks(seed=0, level=0) == _random_masks(seed=0, level=0)
    assert _random_masks(seed=0, level=0) != _random_masks(seed=0, level=1)
    assert _random_masks(seed=0, level=0) != _random_masks(seed=1, level=0)
    mask = _random_masks(seed=0, level=0)
    assert not mask["first.weight"].equal(mask["second.weight"])


def test_what_random_draws_for_a_layer_does_not_depend_on_the_others() -> None:
    weights = {name: torch.ones(40) for name in ("a", "b")}
    seen: list[list[float]] = []

    def recorded(survivors: Tensor, draw: torch.Generator) -> Tensor:
        numbers = torch.rand(survivors.shape, generator=draw)
        seen.append(numbers.tolist())
        return numbers

    both = Mask.from_tensors({name: weight.bool() for name, weight in weights.items()})
    prune(weights, both, Seeded(recorded), 0.5, seed=7)
    prune(weights, Mask.from_tensors({"b": both["b"]}), Seeded(recorded), 0.5, seed=7)
    assert seen[1] == seen[2] != seen[0]


def test_pruning_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    _random_masks(seed=0, level=0)
    assert torch.get_rng_state().equal(before)


def test_what_random_removes_is_frozen() -> None:
    """The stream of a layer is named by ("importance", layer): under another name stored chains would not go on."""
    weights = {"a": torch.ones(3, 4), "b": torch.ones(9)}
    dense = Mask.from_tensors({name: weight.bool() for name, weight in weights.items()})
    pruned = prune(weights, dense, random, 0.5, seed=5)
    assert pruned["a"].flatten().int().tolist() == [0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    assert pruned["b"].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 1, 1]


def test_a_new_normalisation_is_found_by_the_name_that_its_importance_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study keeps `magnitude/doubled` as `doubled`."""

    def doubled(scores: Tensor) -> Tensor:
        return 2 * scores

    monkeypatch.setitem(NORMALISATIONS, "doubled", doubled)
    importance = find("magnitude/doubled")
    assert find(importance.name) == importance
    with pytest.raises(UserError, match="unknown importance 'identity'"):
        find("identity")


def test_any_score_with_any_normalisation() -> None:
    for name in ("magnitude", "l1", "rank", "random", "random/l1", "random/rank", "taylor", "grasp/min_max"):
        assert find(name).name == name
        assert is_built_in(name)
    assert find("magnitude/lamp") == lamp
    assert find("random/identity") == random
    for name, text in (
        ("rnk", "unknown importance 'rnk'; did you mean 'rank'?"),
        ("random/rnk", "importance 'random/rnk': unknown normalisation 'rnk'; did you mean 'rank'?"),
        ("randon/l1", "importance 'randon/l1': unknown score 'randon'; did you mean 'random'?"),
        ("l1/random", f"importance 'l1/random': unknown score 'l1'; choose from {', '.join(map(repr, SCORES))}"),
    ):
        assert not is_built_in(name)
        with pytest.raises(UserError) as error:
            find(name)
        assert str(error.value) == text


@often
@given(weights=usual_layers, exponent=st.integers(-500, 500))
def test_ranks_stay_the_same_under_scaling_without_rounding(weights: Tensor, exponent: int) -> None:
    assert torch.equal(rank(weights * 2.0**exponent), rank(weights))

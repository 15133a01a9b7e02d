"""Masks as sets of connections, and the pruning of one round."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tombola import Mask, UserError, prunable, prune
from tombola.errors import ImportanceError
from tombola.importance import IMPORTANCES, Importance, Seeded, Survivors, l1, magnitude, normalisation, scores
from tombola.pruning.selection import select_lowest

often = settings(deadline=None, max_examples=50)

Layers = dict[str, npt.NDArray[np.bool_]]

shapes = st.dictionaries(
    st.sampled_from(["a.weight", "b.weight", "c.weight"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    min_size=1,
)


@st.composite
def networks(draw: st.DrawFn, count: int = 1) -> list[Layers]:
    """Draw which connections are alive, `count` times for one network."""
    network = draw(shapes)

    def layer(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        size = math.prod(shape)
        return np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool).reshape(shape)

    return [{name: layer(shape) for name, shape in network.items()} for _ in range(count)]


def mask_of(layers: Layers) -> Mask:
    return Mask.from_tensors({name: torch.from_numpy(alive.copy()) for name, alive in layers.items()})


def alive(**layers: Any) -> Mask:
    return Mask.from_tensors({name: torch.tensor(bits, dtype=torch.bool) for name, bits in layers.items()})


def dense(weights: dict[str, Tensor]) -> Mask:
    return Mask.from_tensors({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})


# Masks as sets.


@often
@given(networks(2))
def test_masks_are_sets_of_connections(pair: list[Layers]) -> None:
    a, b = pair
    for combined, expected in (
        (mask_of(a) & mask_of(b), {name: a[name] & b[name] for name in a}),
        (mask_of(a) | mask_of(b), {name: a[name] | b[name] for name in a}),
        (mask_of(a) ^ mask_of(b), {name: a[name] ^ b[name] for name in a}),
    ):
        assert list(combined) == list(expected)
        for name, bits in expected.items():
            assert combined[name].dtype == torch.bool
            np.testing.assert_array_equal(combined[name].numpy(), bits)


@often
@given(networks(3))
def test_algebraic_laws(three: list[Layers]) -> None:
    a, b, c = map(mask_of, three)
    every = mask_of({name: np.ones_like(bits) for name, bits in three[0].items()})
    none = every ^ every
    assert none.alive == 0
    assert a & b == b & a
    assert a | b == b | a
    assert a ^ b == b ^ a
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    assert (a ^ b) ^ c == a ^ (b ^ c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert a & (a | b) == a == a | (a & b)
    assert a & every == a == a | none
    assert a & none == none
    assert a ^ b == (a | b) ^ (a & b)
    assert every ^ (a & b) == (every ^ a) | (every ^ b)
    assert a.alive + b.alive == (a & b).alive + (a | b).alive


def test_a_mask_without_connections_has_no_density() -> None:
    with pytest.raises(UserError, match="a mask without connections has no density; expected one layer or more"):
        _ = Mask.from_tensors({"w": torch.zeros(0, 5, dtype=torch.bool)}).density


@often
@given(networks())
def test_counts(one: list[Layers]) -> None:
    (layers,) = one
    mask = mask_of(layers)
    assert mask.counts == {name: int(bits.sum()) for name, bits in layers.items()}
    assert mask.sizes == {name: bits.size for name, bits in layers.items()}
    assert mask.shapes == {name: bits.shape for name, bits in layers.items()}
    assert mask.alive == sum(int(bits.sum()) for bits in layers.values())
    assert mask.total == sum(bits.size for bits in layers.values())
    assert mask.density == mask.alive / mask.total
    assert mask.collapsed == tuple(name for name, bits in layers.items() if not bits.any())


@often
@given(networks(2))
def test_round_trips(pair: list[Layers]) -> None:
    mask, other = map(mask_of, pair)
    for again in (
        Mask.from_tensors(mask),
        Mask(mask.shapes, mask.bits),
        copy.deepcopy(mask),
        pickle.loads(pickle.dumps(mask)),
        (mask ^ other) ^ other,
    ):
        assert again == mask
        assert again.hash == mask.hash
        assert hash(again) == hash(mask)
        assert all(again[name].equal(mask[name]) for name in mask)
    same = all(np.array_equal(pair[0][name], pair[1][name]) for name in mask)
    assert (mask == other) == (mask.hash == other.hash) == same


def test_counts_of_a_large_layer() -> None:
    bits = np.random.default_rng(0).random(70_001) < 0.3
    mask = mask_of({"w": bits})
    assert mask.alive == bits.sum()
    np.testing.assert_array_equal(mask["w"].numpy(), bits)


def test_one_bit_a_connection_the_first_in_the_lowest() -> None:
    mask = alive(w=[[1, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert mask.bits["w"].tolist() == [0b00001101, 0b00000001]
    assert mask.bits["w"].dtype == np.uint8


def test_layers_of_one_connection_and_of_none() -> None:
    mask = Mask.from_tensors({"scalar": torch.tensor(True), "none": torch.ones(0, 3, dtype=torch.bool)})
    assert mask.counts == {"scalar": 1, "none": 0}
    assert mask["scalar"].shape == ()
    assert mask["none"].shape == (0, 3)


def test_hash_is_frozen() -> None:
    """A training is named by the hash of its mask: were this to change, no stored result would be found again."""
    mask = alive(**{"fc1.weight": [[True, False, True], [False, False, True]], "fc.weight": [[True], [False]]})
    assert mask.hash == "8c5186fcf75c10d864d11729181d0891b0fbd23459b4019c8f0f935010f4390b"


def test_hash_tells_names_shapes_order_and_bits_apart() -> None:
    masks = [
        alive(a=[1, 0, 1, 1], b=[1]),
        alive(a=[1, 0, 1, 0], b=[1]),
        alive(a=[[1, 0], [1, 1]], b=[1]),
        alive(a=[1, 0, 1, 1], c=[1]),
        alive(b=[1], a=[1, 0, 1, 1]),
        alive(a=[1, 0, 1, 1, 0], b=[1]),
        alive(a=[1, 0, 1, 1]),
    ]
    assert len({mask.hash for mask in masks}) == len(masks)
    assert len(set(masks)) == len(masks)


def test_a_mask_is_a_mapping() -> None:
    mask = alive(a=[1, 0], b=[1])
    assert list(mask) == ["a", "b"]
    assert len(mask) == 2
    assert "a" in mask
    assert "c" not in mask
    assert dict(mask)["a"].tolist() == [True, False]
    with pytest.raises(KeyError):
        mask["c"]
    assert repr(mask) == "<Mask of 2 layers: 2 of 3 connections alive>"


def test_equality_with_something_else() -> None:
    mask = alive(a=[1, 0])
    assert mask != {"a": mask["a"]}
    assert mask != "a"
    with pytest.raises(TypeError):
        mask & {"a": mask["a"]}  # type: ignore[operator]


def test_nothing_changes_a_mask() -> None:
    given_tensor = torch.tensor([True, False, True])
    given_bits = np.array([0b101], dtype=np.uint8)
    for mask in (Mask.from_tensors({"w": given_tensor}), Mask({"w": (3,)}, {"w": given_bits})):
        before = mask.hash
        given_tensor.fill_(False)
        given_bits.fill(0)
        mask["w"].fill_(False)
        with pytest.raises(ValueError, match="read-only"):
            mask.bits["w"][0] = 0
        mask.bits.clear()
        mask.sizes.clear()
        mask.counts.clear()
        with pytest.raises(TypeError):
            mask["w"] = given_tensor  # type: ignore[index]
        assert mask["w"].tolist() == [True, False, True]
        assert mask.counts == {"w": 2}
        assert Mask.from_tensors(mask).hash == before
        given_tensor.copy_(torch.tensor([True, False, True]))
        given_bits.fill(0b101)


@pytest.mark.parametrize("bits", [[], [1, 0], [0b1000], [255]], ids=["few", "many", "a spare bit", "spare bits"])
def test_bits_that_do_not_fit(bits: list[int]) -> None:
    with pytest.raises(UserError, match=r"mask of layer 'w': its bits do not fit the shape \(3,\)"):
        Mask({"w": (3,)}, {"w": np.array(bits, dtype=np.uint8)})


def test_a_mask_is_made_of_bools() -> None:
    with pytest.raises(UserError, match=r"mask of layer 'w': expected a bool tensor, got torch\.float32"):
        Mask.from_tensors({"w": torch.ones(3)})


def test_masks_of_different_networks() -> None:
    with pytest.raises(UserError, match="masks of different networks cannot be combined: they differ in b, c"):
        alive(a=[1], b=[1, 0], c=[1]) & alive(a=[1], b=[[1, 0]])
    with pytest.raises(UserError, match=r"masks of different networks cannot be combined: they differ in b$"):
        alive(a=[1], b=[1, 0]) | alive(a=[1], b=[[1, 0]])


def test_a_mask_on_disk_has_its_counts_and_may_be_read_in_steps() -> None:
    mask = alive(a=[1, 0], b=[1])
    on_disk = mask.unload(lambda: mask)
    assert on_disk.counts == {"a": 1, "b": 1}
    assert mask.unload(lambda: on_disk)["a"].tolist() == [True, False]


# What may be pruned.


class Tied(nn.Module):
    """A decoder that shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(3, 2), ["weight"]),
        (
            nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 1)),
            ["0.weight", "1.weight", "2.weight"],
        ),
        (nn.Sequential(nn.ConvTranspose1d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3, groups=1)), ["0.weight", "1.weight"]),
        (nn.Sequential(nn.Sequential(nn.ModuleDict({"x": nn.Linear(1, 1)}))), ["0.0.x.weight"]),
        (nn.Sequential(nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.BatchNorm2d(4), nn.PReLU(4)), ["0.weight"]),
        (nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2), OwnLinear(2, 2)), ["2.weight"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.TransformerEncoderLayer(4, 2, 8),
            ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
        ),
        (nn.Sequential(nn.LSTM(2, 2), nn.GroupNorm(1, 2)), ["0.weight_ih_l0", "0.weight_hh_l0"]),
        (Tied(), ["encoder.weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_prunable(model: nn.Module, expected: list[str]) -> None:
    weights = prunable(model)
    assert list(weights) == expected
    assert all(weights[name] is model.get_parameter(name) for name in expected)


def test_a_frozen_weight_is_prunable() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    assert list(prunable(layer)) == ["weight"]


def test_ones_like_is_dense() -> None:
    mask = Mask.ones_like(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(4, 5)))
    assert mask.shapes == {"0.weight": (3, 2, 3, 3), "2.weight": (5, 4)}
    assert mask.density == 1


@pytest.mark.parametrize("exclude", [("0",), ("0.weight",), ["0", "0.weight"]])
def test_ones_like_excludes_by_layer_or_parameter(exclude: Sequence[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(Mask.ones_like(model, exclude)) == ["1.weight"]


@pytest.mark.parametrize(
    ("model", "exclude", "text"),
    [
        (nn.Sequential(nn.ReLU()), (), "Sequential has no linear, convolution, recurrent or attention weight to prune"),
        (
            nn.Sequential(nn.Linear(1, 1)),
            ("0",),
            "Sequential has no linear, convolution, recurrent or attention weight to prune",
        ),
        (Tied(), ("encodr",), "exclude: 'encodr' is no prunable layer; did you mean 'encoder', 'decoder'?"),
        (
            nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2)),
            (),
            "layer '0.weight' is lazy and has no shape yet: run the model once",
        ),
    ],
)
def test_ones_like_says_what_is_wrong(model: nn.Module, exclude: Sequence[str], text: str) -> None:
    with pytest.raises(UserError) as error:
        Mask.ones_like(model, exclude)
    assert text in str(error.value)


# Pruning one round.

fractions = st.floats(0.01, 0.99)
monotone = {name: importance for name, importance in IMPORTANCES.items() if name != "random"}


@st.composite
def prunings(draw: st.DrawFn) -> tuple[dict[str, Tensor], Mask]:
    """Draw weights, many of them equal and of either sign, and the connections that are alive."""
    (layers,) = draw(networks())
    weights = {
        name: torch.tensor(
            draw(st.lists(st.integers(-4, 4), min_size=bits.size, max_size=bits.size)), dtype=torch.float32
        ).reshape(bits.shape)
        / 4
        for name, bits in layers.items()
    }
    return weights, mask_of(layers)


def pruned_literally(
    weights: dict[str, Tensor], mask: Mask, importance: Callable[[Tensor], Tensor], count: int
) -> Mask:
    """Sort every surviving connection by (importance, layer, flat index) and drop the first `count`."""
    ranked = []
    kept = {name: mask[name].flatten() for name in mask}
    for number, name in enumerate(mask):
        flat = weights[name].flatten().double().abs()
        survivors = [index for index in range(len(flat)) if kept[name][index]]
        scores = importance(flat[survivors])
        ranked += [(float(score), number, index) for score, index in zip(scores, survivors, strict=True)]
    names = list(mask)
    for _, number, index in sorted(ranked)[:count]:
        kept[names[number]][index] = False
    return Mask.from_tensors({name: bits.reshape(mask.shapes[name]) for name, bits in kept.items()})


@pytest.mark.parametrize("name", monotone)
@often
@given(drawn=prunings(), fraction=fractions)
def test_the_least_important_connections_are_removed(
    name: str, drawn: tuple[dict[str, Tensor], Mask], fraction: float
) -> None:
    weights, mask = drawn
    importance = monotone[name]
    count = round(fraction * mask.alive)
    assert prune(weights, mask, importance, fraction) == pruned_literally(weights, mask, importance, count)


@often
@given(drawn=prunings(), fraction=fractions)
def test_exact_counts_at_random(drawn: tuple[dict[str, Tensor], Mask], fraction: float) -> None:
    weights, mask = drawn
    pruned = prune(weights, mask, IMPORTANCES["random"], fraction)
    assert pruned.alive == mask.alive - round(fraction * mask.alive)
    assert pruned & mask == pruned, "nothing comes back"


@pytest.mark.parametrize(
    ("alive_before", "fraction", "removed"),
    [(5, 0.5, 2), (7, 0.5, 4), (7, 0.2, 1), (10, 0.25, 2), (3, 0.9, 3), (2, 0.2, 0)],
)
def test_exact_counts(alive_before: int, fraction: float, removed: int) -> None:
    weights = {"w": torch.arange(1.0, alive_before + 1)}
    assert prune(weights, dense(weights), magnitude, fraction).alive == alive_before - removed


def test_where_nothing_is_removed_the_mask_is_the_same() -> None:
    weights = {"w": torch.ones(4)}
    mask = dense(weights)
    assert prune(weights, mask, magnitude, 0.1) == mask


@pytest.mark.parametrize("name", monotone)
def test_ties_go_to_the_earlier_layer_then_to_the_lower_index(name: str) -> None:
    # Layers of one size and all weights equal: every importance is equal everywhere.
    weights = {"late": torch.full((2, 2), 0.5), "early": torch.full((2, 2), -0.5), "last": torch.full((4,), 0.5)}
    pruned = prune(weights, dense(weights), IMPORTANCES[name], 0.5)
    assert pruned["late"].tolist() == [[False, False], [False, False]]
    assert pruned["early"].tolist() == [[False, False], [True, True]]
    assert pruned["last"].tolist() == [True] * 4


def test_ties_among_survivors() -> None:
    weights = {"a": torch.tensor([1.0, 5.0, 1.0, 1.0]), "b": torch.tensor([0.5, 1.0, 1.0])}
    pruned = prune(weights, alive(a=[0, 1, 1, 1], b=[1, 1, 1]), magnitude, 0.5)
    assert pruned == alive(a=[0, 1, 0, 0], b=[0, 1, 1])


def test_zeros_of_both_signs_tie() -> None:
    scores = iter([torch.tensor([0.0, -0.0, 1.0]), torch.tensor([-0.0, 0.0])])
    weights = {"a": torch.ones(3), "b": torch.ones(2)}
    assert prune(weights, dense(weights), lambda w: next(scores), 0.6) == alive(a=[0, 0, 1], b=[0, 1])


@pytest.mark.parametrize("name", IMPORTANCES)
def test_masks_are_nested_over_rounds(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(20, 30, generator=draw), "b": torch.randn(7, 20, generator=draw) * 3}
    mask = dense(weights)
    left = mask.total
    for level in range(8):
        pruned = prune(weights, mask, IMPORTANCES[name], 0.2, seed=level)
        left -= round(0.2 * left)
        assert pruned.alive == left
        assert pruned & mask == pruned
        mask = pruned


@pytest.mark.parametrize("one", ["magnitude", "l1", "l2"])
@pytest.mark.parametrize("other", monotone)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), fraction=fractions)
def test_from_one_network_masks_of_monotone_importances_are_nested_in_each_layer(
    one: str, other: str, seed: int, fraction: float
) -> None:
    # Distinct within a layer, so that ties do not decide.
    draw = torch.Generator().manual_seed(seed)
    weights = {
        name: (torch.randperm(200, generator=draw)[:size] + 1) * scale / 200
        for name, size, scale in (("a", 60, 1.0), ("b", 25, 0.2), ("c", 5, -3.0))
    }
    masks = [prune(weights, dense(weights), IMPORTANCES[name], fraction) for name in (one, other)]
    shared = masks[0] & masks[1]
    for name in weights:
        assert shared.counts[name] == min(mask.counts[name] for mask in masks)


@often
@given(drawn=prunings(), fraction=fractions)
def test_an_importance_sees_the_survivors_of_a_layer_in_flat_order(
    drawn: tuple[dict[str, Tensor], Mask], fraction: float
) -> None:
    weights, mask = drawn
    seen = []

    def recorded(survivors: Tensor) -> Tensor:
        assert survivors.dtype == torch.float64
        seen.append(survivors.tolist())
        return survivors

    # What is pruned does not count, be it huge or not a number.
    spoilt = {name: torch.where(mask[name], w, torch.nan) for name, w in weights.items()}
    pruned = prune(spoilt, mask, recorded, fraction)
    assert seen == [weights[name][mask[name]].abs().tolist() for name in mask]
    assert pruned == prune(weights, mask, magnitude, fraction)


def test_a_pruned_connection_is_not_a_part_of_its_layers_sum() -> None:
    weights = {"a": torch.tensor([100.0, 1.0, 1.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    # Of the survivors each of a's is 1/2 and each of b's 1/3; with the pruned weight a's would be less than 1/100.
    assert prune(weights, alive(a=[0, 1, 1], b=[1, 1, 1]), l1, 0.2) == alive(a=[0, 1, 1], b=[0, 1, 1])


@pytest.mark.parametrize("rounds", [1, 4])
def test_agrees_with_torch_on_global_magnitude(rounds: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(30, 20), nn.Linear(20, 3))
    weights = {name: w.detach().clone() for name, w in prunable(model).items()}
    values = torch.cat([w.abs().flatten() for w in weights.values()]).tolist()
    assert len(set(values)) == len(values), "no ties, where the two differ"
    mask = Mask.ones_like(model)
    layers = [(model.get_submodule(name.removesuffix(".weight")), "weight") for name in weights]
    for _ in range(rounds):
        mask = prune(weights, mask, magnitude, 0.3)
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.3)
        for (layer, _), name in zip(layers, weights, strict=True):
            theirs = layer.weight_mask
            assert isinstance(theirs, Tensor)
            assert theirs.bool().equal(mask[name])


def test_a_layer_may_collapse_and_later_rounds_go_on() -> None:
    weights = {"a": torch.tensor([0.1, 0.2]), "b": torch.arange(1.0, 9.0)}
    mask = prune(weights, dense(weights), magnitude, 0.2)
    assert mask.collapsed == ("a",)
    for name, importance in IMPORTANCES.items():
        assert prune(weights, mask, importance, 0.25).counts == {"a": 0, "b": 6}, name


@pytest.mark.parametrize("exclude", [("b",), ("b.weight",)])
def test_excluded_layers_are_left_alone_and_not_counted(exclude: tuple[str, ...]) -> None:
    weights = {"a.weight": torch.arange(1.0, 11.0), "b.weight": torch.full((90,), 0.01)}
    pruned = prune(weights, dense(weights), magnitude, 0.5, exclude=exclude)
    assert pruned.counts == {"a.weight": 5, "b.weight": 90}
    assert pruned["a.weight"].tolist() == [False] * 5 + [True] * 5


def test_where_all_is_excluded_nothing_is_pruned() -> None:
    weights = {"a.weight": torch.arange(1.0, 11.0)}
    assert prune(weights, dense(weights), magnitude, 0.5, exclude=["a"]) == dense(weights)


def test_an_unknown_layer_to_exclude() -> None:
    weights = {"fc1.weight": torch.ones(3)}
    with pytest.raises(UserError, match=r"exclude: 'fc2' is no prunable layer; did you mean 'fc1'\?"):
        prune(weights, dense(weights), magnitude, 0.5, exclude=["fc2"])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    weights = {"w": torch.ones(3)}
    with pytest.raises(UserError, match=f"fraction must lie between 0 and 1, both excluded, got {fraction}"):
        prune(weights, dense(weights), magnitude, fraction)


# Importances of a user's own.


def wrong_length(weights: Tensor) -> Tensor:
    return weights[:-1]


def wrong_shape(weights: Tensor) -> Tensor:
    return weights[:, None]


def no_tensor(weights: Tensor) -> Any:
    return weights.tolist()


def not_a_number(weights: Tensor) -> Tensor:
    return weights / 0 * 0


def complex_numbers(weights: Tensor) -> Tensor:
    return weights * 1j


def raising(weights: Tensor) -> Tensor:
    raise KeyError("missing")


def seeded_wrongly(weights: Tensor, draw: torch.Generator) -> Tensor:
    return torch.rand(1, generator=draw)


@pytest.mark.parametrize(
    ("importance", "text"),
    [
        (wrong_length, "'wrong_length', layer 'fc.weight': expected a tensor of shape (4,), one number per survivor, "
                       "got shape (3,)"),
        (wrong_shape, "'wrong_shape', layer 'fc.weight': expected a tensor of shape (4,), one number per survivor, "
                      "got shape (4, 1)"),
        (no_tensor, "'no_tensor', layer 'fc.weight': expected a tensor of shape (4,), one number per survivor, "
                    "got list"),
        (not_a_number, "'not_a_number', layer 'fc.weight': it returned NaN"),
        (complex_numbers, "'complex_numbers', layer 'fc.weight': it returned complex numbers, which have no "
                          "order; return for example their magnitudes"),
        (raising, "'raising', layer 'fc.weight': it raised KeyError: 'missing' (in "),
        (Seeded(seeded_wrongly), "'seeded_wrongly', layer 'fc.weight': expected a tensor of shape (4,), one number per "
                                 "survivor, got shape (1,)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_importances_that_do_not_keep_to_the_contract(importance: Callable[[Tensor], Any], text: str) -> None:
    weights = {"fc.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    with pytest.raises(ImportanceError) as error:
        prune(weights, dense(weights), importance, 0.5)
    said, where_it_raised = str(error.value), text.endswith("(in ")
    assert said.startswith(f"importance {text}") if where_it_raised else said == f"importance {text}"


def test_a_normalisation_that_fails_is_named_with_its_score() -> None:
    weights = {"w": torch.ones(3)}
    with pytest.raises(
        ImportanceError, match=r"^importance 'random/raising', layer 'w': it raised KeyError: 'missing'"
    ):
        prune(weights, dense(weights), Importance(scores.random, raising), 0.5)


def test_an_importance_that_says_itself_what_failed() -> None:
    def demanding(weights: Tensor) -> Tensor:
        raise ImportanceError("it needs two weights or more")

    weights = {"w": torch.ones(3)}
    with pytest.raises(ImportanceError, match=r"^importance 'demanding', layer 'w': it needs two weights or more$"):
        prune(weights, dense(weights), demanding, 0.5)


def test_a_score_that_changes_what_it_reads_changes_no_weights() -> None:
    def careless(survivors: Survivors) -> Tensor:
        return survivors.weights().abs_() + survivors.rewound().abs_()

    weights = {"w": torch.tensor([-3.0, 1.0], dtype=torch.float64)}
    rewound = {"w": torch.tensor([-1.0, 2.0], dtype=torch.float64)}
    assert prune(weights, dense(weights), Importance(careless), 0.5, rewound=rewound)["w"].tolist() == [True, False]
    assert (weights["w"].tolist(), rewound["w"].tolist()) == ([-3.0, 1.0], [-1.0, 2.0])


@pytest.mark.parametrize("kept", [0, 1 << 24])
def test_an_importance_that_returns_its_own_buffer(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """What it gave for the layers before stays as it was, though the buffer is used again."""
    monkeypatch.setattr("tombola.pruning.selection._KEPT", kept)
    buffer = torch.zeros(10, dtype=torch.float64)

    def lazy(weights: Tensor) -> Tensor:
        return buffer[: len(weights)].copy_(weights)

    weights = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([2.0, 6.0]), "c": torch.tensor([3.0, 7.0, 8.0])}
    assert prune(weights, dense(weights), lazy, 0.5) == alive(a=[1, 0, 0], b=[0, 1], c=[0, 1, 1])


def test_a_score_with_a_normalisation_of_ones_choice() -> None:
    weights = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([10.0, 30.0])}
    assert prune(weights, dense(weights), Importance(scores.magnitude, normalisation.l1), 0.4) == prune(
        weights, dense(weights), l1, 0.4
    )
    # Within a layer the order of random numbers stays, whatever their normalisation.
    pruned = [prune(weights, dense(weights), Importance(scores.random, n), 0.4, seed=2, exclude=["b"])
              for n in (normalisation.identity, normalisation.l2)]  # fmt: skip
    assert pruned[0] == pruned[1]


def in_place(weights: Tensor) -> Tensor:
    return weights.neg_()


def as_integers(weights: Tensor) -> Tensor:
    return (-weights * 10).to(torch.int32)


def as_float32(weights: Tensor) -> Tensor:
    return -weights.float()


def every_second(weights: Tensor) -> Tensor:
    return torch.stack([-weights, weights], dim=1)[:, 0]


def with_gradient(weights: Tensor) -> Tensor:
    return -weights * torch.ones(1, requires_grad=True)


@pytest.mark.parametrize("importance", [in_place, as_integers, as_float32, every_second, with_gradient])
def test_importances_in_any_form(importance: Callable[[Tensor], Tensor]) -> None:
    """The importance is the negative weight throughout: the largest goes first."""
    weights = {"w": torch.tensor([0.5, -0.1, 0.3, -0.9, 0.2], dtype=torch.float64)}
    before = weights["w"].clone()
    assert prune(weights, dense(weights), importance, 0.4) == alive(w=[0, 1, 1, 0, 1])
    assert weights["w"].equal(before)


def test_one_number_for_all_survivors() -> None:
    weights = {"w": torch.ones(4)}
    assert prune(weights, dense(weights), lambda w: torch.zeros(1).expand(4), 0.5) == alive(w=[0, 0, 1, 1])


def test_infinite_importances_are_the_least_and_the_most() -> None:
    weights = {"w": torch.ones(4)}
    scores = torch.tensor([torch.inf, 1.0, -torch.inf, 0.0])
    assert prune(weights, dense(weights), lambda w: scores, 0.25) == alive(w=[1, 1, 0, 1])
    assert prune(weights, dense(weights), lambda w: scores, 0.75) == alive(w=[1, 0, 0, 0])


# Weights.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, value, 0.0])}
    with pytest.raises(UserError, match=r"^layer 'b': its weights are not all finite \(NaN or infinite\)") as error:
        prune(weights, dense(weights), magnitude, 0.5)
    assert not isinstance(error.value, ImportanceError), "the importance is not to blame"


def test_weights_that_are_missing_or_of_another_shape() -> None:
    mask = alive(first=[1, 1], second=[1, 1])
    with pytest.raises(UserError, match=r"no weights for layer 'second' of the mask; did you mean 'seconds'\?"):
        prune({"first": torch.ones(2), "seconds": torch.ones(2)}, mask, magnitude, 0.5)
    with pytest.raises(UserError, match=r"layer 'second': the weights have shape \(1, 2\), the mask \(2,\)"):
        prune({"first": torch.ones(2), "second": torch.ones(1, 2)}, mask, magnitude, 0.5)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(2, dtype=torch.complex64), "as a dense tensor of real numbers, got one of torch.complex64"),
        (torch.ones(2).to_sparse(), "got one of torch.float32, torch.sparse_coo, on the device 'cpu'"),
        (torch.ones(2, device="meta"), "got one of torch.float32, torch.strided, on the device 'meta'"),
        (torch.ones(2).numpy(), "layer 'w': its weights: expected a tensor, got ndarray"),
    ],
)
def test_weights_that_cannot_be_compared(weight: torch.Tensor, said: str) -> None:
    """Of complex numbers, the real parts were compared."""
    with pytest.raises(UserError, match=said):
        prune({"w": weight}, alive(w=[1, 1]), magnitude, 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_float64_whatever_the_weights_are(dtype: torch.dtype) -> None:
    weight = (torch.randperm(100, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    seen = []

    def recorded(survivors: Tensor) -> Tensor:
        seen.append(survivors)
        return survivors

    pruned = prune({"w": -weight}, dense({"w": weight}), recorded, 0.3)
    assert seen[0].dtype == torch.float64
    assert seen[0].equal(weight.double())
    assert pruned["w"].equal(weight > 30)


def test_float64_weights_are_told_apart_beyond_float32() -> None:
    weights = {"w": torch.tensor([1 + 3e-12, 1 + 1e-12, 1 + 2e-12, 1], dtype=torch.float64)}
    assert prune(weights, dense(weights), l1, 0.5) == alive(w=[1, 0, 1, 0])


@pytest.mark.parametrize("arranged", [lambda w: w.to(memory_format=torch.channels_last), nn.Parameter])
def test_the_layout_in_memory_does_not_matter(arranged: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    some = prune({"w": weight}, dense({"w": weight}), magnitude, 0.5)
    for mask in (dense({"w": weight}), some):
        assert prune({"w": arranged(weight)}, mask, magnitude, 0.5) == prune({"w": weight}, mask, magnitude, 0.5)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_the_number_of_threads_does_not_matter() -> None:
    weight = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    sums = set()

    def recorded(survivors: Tensor) -> Tensor:
        assert torch.get_num_threads() == 1
        sums.add(float(survivors.sum()))
        return survivors / survivors.sum()

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        prune({"w": weight}, dense({"w": weight}), recorded, 0.2)
        assert torch.get_num_threads() == threads, "it is as it was"
        with pytest.raises(UserError):
            prune({"w": weight}, dense({"w": weight}), raising, 0.2)
        assert torch.get_num_threads() == threads, "it is as it was after an error too"
    assert len(sums) == 1


# Networks of so many connections that importances are not kept and few of them are looked at first.


@pytest.mark.parametrize("kept", [0, 1 << 24])
@pytest.mark.parametrize("sampled", [1, 3, 1 << 20])
@often
@given(drawn=prunings(), fraction=fractions)
def test_a_sample_never_decides(
    kept: int, sampled: int, drawn: tuple[dict[str, Tensor], Mask], fraction: float
) -> None:
    weights, mask = drawn
    count = round(fraction * mask.alive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tombola.pruning.selection._KEPT", kept)
        patch.setattr("tombola.pruning.selection._SAMPLED", sampled)
        assert prune(weights, mask, magnitude, fraction) == pruned_literally(weights, mask, magnitude, count)


@pytest.mark.parametrize("order", ["random", "sample all low", "sample all high", "ties", "infinite"])
@pytest.mark.parametrize("fraction", [0.00001, 0.2, 0.5, 0.99999])
def test_many_connections(monkeypatch: pytest.MonkeyPatch, order: str, fraction: float) -> None:
    """Also where the connections that are looked at first are not like the others."""
    monkeypatch.setattr("tombola.pruning.selection._KEPT", 0)
    monkeypatch.setattr("tombola.pruning.selection._SAMPLED", 1000)
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(300_000, generator=draw) + 1
    every = len(weights) // 1000 + 1
    if order.startswith("sample"):
        weights[::every] = 0.5 if order.endswith("low") else 2.5
    if order == "ties":
        weights = (4 * weights).round()
    scores = weights.double()
    if order == "infinite":
        scores = torch.where(scores > 1.5, torch.inf, -torch.inf)
    count = round(fraction * len(weights))
    expected = torch.ones(len(weights), dtype=torch.bool)
    expected[scores.argsort(stable=True)[:count]] = False
    whole = dense({"w": weights})
    assert torch.equal(prune({"w": weights}, whole, lambda _: scores.clone(), fraction)["w"], expected)
    halves = {"a": weights[:100_001], "b": weights[100_001:]}
    if order != "infinite":
        pruned = prune(halves, dense(halves), magnitude, fraction)
        assert torch.equal(torch.cat([pruned["a"], pruned["b"]]), expected)


def test_as_many_below_the_first_estimate_as_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tombola.pruning.selection._SAMPLED", 100)  # of 300, every fourth
    place = torch.arange(300)
    scores = torch.where(place % 4 == 0, 2.5, torch.where(place < 240, 1.0, 5.0)).double()
    found = select_lowest({"w": scores}.__getitem__, {"w": 300}, 180)["w"]
    assert torch.equal(found, scores == 1)


def test_importances_are_computed_once_if_they_are_few_and_twice_if_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No more often: the sample of all layers says well enough where the limit lies."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: scale * torch.rand(20_000, generator=draw) for name, scale in [("a", 1.0), ("b", 3.0), ("c", 0.1)]}
    calls: list[int] = []

    def counted(survivors: Tensor) -> Tensor:
        calls.append(len(survivors))
        return survivors

    few = prune(weights, dense(weights), counted, 0.3)
    assert len(calls) == 3
    monkeypatch.setattr("tombola.pruning.selection._KEPT", 0)
    assert prune(weights, dense(weights), counted, 0.3) == few
    assert len(calls) == 3 + 6


# Selection alone.

values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.25, 0.5, 1.0, math.inf]) | st.floats(allow_nan=False)
rated = st.dictionaries(
    st.sampled_from(["c", "a", "b"]), st.lists(values, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))
)


@pytest.mark.parametrize(("kept", "sampled"), [(0, 1), (0, 4), (1 << 24, 1 << 20)])
@often
@given(layers=rated, draw=st.data())
def test_select_lowest_sorts_by_score_layer_and_index(
    kept: int, sampled: int, layers: dict[str, Tensor], draw: st.DataObject
) -> None:
    sizes = {layer: len(x) for layer, x in layers.items()}
    count = draw.draw(st.integers(0, sum(sizes.values())))
    shared = torch.zeros(12, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tombola.pruning.selection._KEPT", kept)
        patch.setattr("tombola.pruning.selection._SAMPLED", sampled)
        selected = select_lowest(lambda layer: shared[: sizes[layer]].copy_(layers[layer]), sizes, count)
    ranked = sorted(
        (float(x), number, index, layer)
        for number, (layer, of_layer) in enumerate(layers.items())
        for index, x in enumerate(of_layer)
    )
    lowest = {(layer, index) for _, _, index, layer in ranked[:count]}
    assert list(selected) == list(layers)
    for layer, size in sizes.items():
        assert selected[layer].dtype == torch.bool
        assert selected[layer].tolist() == [(layer, index) in lowest for index in range(size)]


def test_select_lowest_selects_any_number() -> None:
    """Also where an end of the interval that is tried first is the first score of all, or one past the last."""
    x = torch.randperm(100, generator=torch.Generator().manual_seed(0)).double()
    for count in range(101):
        assert select_lowest(lambda _: x, {"w": 100}, count)["w"].equal(x < count)


def test_an_importance_that_changes_the_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def wandering(weights: Tensor) -> Tensor:
        os.chdir("/")
        return weights

    weights = {"w": torch.ones(3)}
    root = re.escape(os.path.abspath("/"))  # on Windows, with the letter of a drive
    with pytest.raises(
        ImportanceError, match=f"importance 'wandering', layer 'w': it changed the working directory to {root};"
    ):
        prune(weights, dense(weights), wandering, 0.4)
    assert Path.cwd() == tmp_path

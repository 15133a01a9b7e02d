"""Hidden units: networks with their units in another order, and tickets that are matched by their units."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.analysis import matching, uniqueness
from tombola.analysis.units import Axis, Units, find_units
from tombola.errors import UserError
from tombola.models import lenet_300_100, resnet18, resnet20, vgg16
from tombola.pruning.mask import Mask


class Forward(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[[Forward, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network whose biases, norms and statistics are random, too, so that each has an influence."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point() and tensor.ndim < 2:
                    tensor.uniform_(0.5, 1.5)
    return model.double().eval()


def draw(units: Units, seed: int = 0) -> dict[int, np.ndarray]:
    """Draw an order of each group's units in which none keeps its place."""
    random = np.random.default_rng(seed)
    orders = {}
    for group, size in units.sizes.items():
        cycle = random.permutation(size)
        orders[group] = np.empty_like(cycle)
        orders[group][cycle] = np.roll(cycle, 1)
    return orders


def separable() -> nn.Module:
    """A stem, a depthwise convolution with two outputs for each channel, a pointwise one, and other norms."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.GroupNorm(1, 6), nn.PReLU(6), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU()),
        *(nn.Conv2d(12, 5, 1), nn.InstanceNorm2d(5, affine=True), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(20, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.5), nn.Linear(7, 3)),
    )


def gated() -> nn.Module:
    """Channels that are multiplied by gates, and a layer that is used twice, each time added to its inputs."""

    def forward(self: Forward, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.first(inputs))
        hidden = hidden * torch.sigmoid(self.gate(hidden.mean((2, 3)))).view(inputs.size(0), 4, 1, 1)
        hidden = functional.max_pool2d(hidden, 2).flatten(1)
        hidden = self.down(hidden)
        hidden = hidden + 0.5 * self.twice(hidden)
        return self.out((hidden - self.twice(hidden)).relu())

    modules = {"first": nn.Conv2d(2, 4, 3), "gate": nn.Linear(4, 4), "down": nn.Linear(36, 5)}
    return Forward(forward, **modules, twice=nn.Linear(5, 5), out=nn.Linear(5, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet": (lambda: lenet_300_100(inputs=64), (1, 8, 8), 2),
    "vgg": (lambda: vgg16(width=3), (3, 16, 16), 13),
    "resnet20": (lambda: resnet20(width=3), (3, 4, 4), 12),
    "resnet18": (lambda: resnet18(width=3, classes=5), (3, 16, 16), 12),
    "separable": (separable, (2, 12, 12), 3),
    "gated": (gated, (2, 8, 8), 2),
}
"""Name -> a network, the shape of an input, and the number of its groups of units."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_with_its_units_in_another_order(name: str) -> None:
    make, shape, groups = NETWORKS[name]
    model, other = seeded(make), seeded(make)
    units = find_units(model, shape)
    assert len(units.sizes) == groups
    orders = draw(units)
    other.load_state_dict(units.permute(model.state_dict(), orders))
    changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, other.state_dict()[n])]
    assert set(changed) == set(units.axes)
    inputs = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(inputs.clone()), other(inputs.clone())
    assert torch.allclose(expected, found, rtol=1e-9, atol=1e-9)
    assert expected.std() > 1e-3
    right, original = other.state_dict(), {name: each.clone() for name, each in model.state_dict().items()}
    for group in orders:  # and something else if a tensor of a group is left as it was
        held = next(name for name, axes in units.axes.items() if any(axis and axis.group == group for axis in axes))
        model.load_state_dict({**right, held: original[held]})
        with torch.no_grad():
            assert not torch.allclose(expected, model(inputs.clone()), rtol=1e-6, atol=1e-6)


def test_residual_sums_tie_the_units_of_a_stage_and_shortcuts_begin_another() -> None:
    axes = find_units(resnet20(width=4), (3, 8, 8)).axes
    stream = axes["conv1.weight"][0]
    assert stream is not None
    assert axes["blocks.0.conv2.weight"][0] == axes["blocks.2.conv2.weight"][0] == stream
    assert axes["blocks.3.shortcut.0.weight"][1] == stream
    assert axes["blocks.3.shortcut.0.weight"][0] == axes["blocks.3.conv2.weight"][0] == axes["blocks.5.bn2.bias"][0]
    assert axes["blocks.3.conv2.weight"][0] != stream
    assert axes["blocks.0.conv1.weight"][0] not in (stream, axes["blocks.1.conv1.weight"][0])
    assert axes["conv1.weight"][1] is None
    assert axes["fc.weight"] == (None, axes["blocks.8.bn2.weight"][0])
    assert "fc.bias" not in axes


def test_a_unit_is_a_block_of_inputs_after_flatten() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    assert find_units(model, (1, 4, 4)).axes["2.weight"] == (None, Axis(0, 4))


def test_units_of_a_convolution_with_groups_keep_their_places() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 1, 1))
    assert find_units(model, (1, 2, 2)).axes == {
        "2.weight": (Axis(0, 1), None, None, None),
        "2.bias": (Axis(0, 1),),
        "3.weight": (None, Axis(0, 1), None, None),
    }


def test_units_that_are_added_to_the_inputs_keep_their_places() -> None:
    model = Forward(lambda self, x: self.b(x + self.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    assert find_units(model, (3,)).sizes == {}


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (
            lambda self, x: self.b(torch.cat([self.a(x), self.a(x)], 1)[:, :4]),
            "it calls 'cat', after its layer 'a'; its",
        ),
        (lambda self, x: self.b(self.a(x)) if x.sum() > 0 else x, "its graph cannot be traced"),
        (lambda self, x: self.b(self.a(x) * self.a.bias), "it uses 'a.bias' outside of a layer"),
        (lambda self, x: self.b(self.a(x).view(-1, 2, 2).flatten(1)), "divides an axis of hidden units"),
        (lambda self, x: self.b(self.c(self.a(x))), "its module 'c' is a Softshrink"),
        (lambda self, x: self.b(self.a(x).cumsum(1)), "it calls 'cumsum', after its layer 'a'; its"),
    ],
)
def test_what_cannot_be_matched_is_named(forward: Callable[[Forward, Tensor], Tensor], words: str) -> None:
    model = Forward(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), c=nn.Softshrink())
    with pytest.raises(UserError) as found:
        find_units(model, (4,))
    assert str(found.value).startswith("the units of Forward cannot be matched")
    assert words in str(found.value)
    assert str(found.value).endswith("its tickets can be compared without matching, by their overlap")


@pytest.mark.parametrize("name", ["lenet", "vgg", "resnet20", "separable", "gated"])
def test_matching_by_weights_finds_the_order_that_was_drawn(name: str) -> None:
    make, shape, _ = NETWORKS[name]
    model = seeded(make)
    units = find_units(model, shape)
    orders = draw(units)
    other = units.permute(model.state_dict(), orders)
    found = matching.match_weights(units, model.state_dict(), other)
    assert {group: order.tolist() for group, order in found.items()} == {
        group: np.argsort(order).tolist() for group, order in orders.items()
    }


def test_matching_by_activations_finds_the_order_that_was_drawn() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 2))

    model, other = seeded(make), seeded(make)
    units = find_units(model, (2, 4, 4))
    orders = draw(units)
    other.load_state_dict(units.permute(model.state_dict(), orders))
    inputs = torch.randn(200, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = matching.match_activations(units, model, other, inputs)
    assert {group: order.tolist() for group, order in found.items()} == {
        group: np.argsort(order).tolist() for group, order in orders.items()
    }


def test_matching_by_weights_is_the_best_of_all_orders() -> None:
    model, other = (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.normal_()
    units = find_units(model, (3,))
    one, two = model.state_dict(), other.state_dict()

    def distance(order: tuple[int, ...]) -> float:
        moved = units.permute(two, {0: np.array(order)})
        return sum(float(((one[name] - moved[name]) ** 2).sum()) for name in one)

    best = min(itertools.permutations(range(5)), key=distance)
    assert matching.match_weights(units, one, two)[0].tolist() == list(best) != list(range(5))


def test_matching_never_brings_weights_further_apart() -> None:
    """Also where a layer's inputs and outputs are the same units, so that the sum is quadratic in their order."""
    make, shape, _ = NETWORKS["gated"]
    model = seeded(make)
    units = find_units(model, shape)
    assert any(axes.count(axes[0]) > 1 and axes[0] for axes in units.axes.values())
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            other = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
        orders = matching.match_weights(units, model.state_dict(), other)
        moved = units.permute(other, orders)

        def product(state: dict[str, Tensor]) -> float:
            return sum(float((tensor * state[name]).sum()) for name, tensor in model.state_dict().items())

        assert product(moved) > product(other)


def test_the_overlap_of_a_pair_by_hand() -> None:
    units = find_units(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)), (2,))
    one = Mask.from_tensors({"0.weight": torch.tensor([[1, 1], [0, 0]]) > 0, "2.weight": torch.tensor([[1, 1]]) > 0})
    two = Mask.from_tensors({"0.weight": torch.tensor([[0, 0], [1, 0]]) > 0, "2.weight": torch.tensor([[0, 1]]) > 0})
    swap, stay = {0: np.array([1, 0])}, {0: np.array([0, 1])}
    table = matching.of_pair((one, two), swap, units, [((one, two), swap), ((one, two), stay)])
    assert table.select("layer", "shared", "jaccard", "matched_shared", "matched_jaccard", "moved").rows() == [
        ("0.weight", 0, 0.0, 1, 0.5, 1.0),
        ("2.weight", 1, 0.5, 1, 0.5, 1.0),
        ("(all)", 1, 0.2, 2, 0.5, 1.0),
    ]
    assert table["chance_shared"].to_list() == [0.5, 1.0, 1.5]
    assert table["chance_jaccard"].to_list() == [0.25, 0.5, 0.35]
    assert table["chance_sd"].to_list() == pytest.approx([0.125**0.5, 0.0, 0.045**0.5])
    without = matching.of_pair((one, two), stay, units)
    assert without["matched_jaccard"].to_list() == without["jaccard"].to_list()
    assert without["chance_jaccard"].to_list() == without["chance_sd"].to_list() == [None] * 3
    assert without["moved"].to_list() == [0.0] * 3


def test_the_range_of_random_tickets_by_hand() -> None:
    """Two pairs with three draws each: t of 4 degrees of freedom is 2.776, and both the pair and its mean vary."""
    line = {
        **{"level": 3, "by": "weights", "layer": "(all)", "jaccard": 0.2, "layers_jaccard": 0.1, "moved": 0.5},
        **{"kind": "seeds", "matched_jaccard": 0.3, "draws": 3},
    }
    pairs = [
        line | {"tickets": ["l1, seed 0", "l1, seed 1"], "chance_jaccard": 0.10, "chance_sd": 0.03},
        line | {"tickets": ["magnitude, seed 0", "magnitude, seed 1"], "chance_jaccard": 0.20, "chance_sd": 0.04},
    ]
    both = matching.summarise(pl.DataFrame(pairs), "kind").row(0, named=True)
    half = 2.7764451 * (4 / 3 * (0.03**2 + 0.04**2)) ** 0.5 / 2
    assert (both["pairs"], both["chance_jaccard"]) == (2, pytest.approx(0.15))
    assert (both["chance_low"], both["chance_high"]) == pytest.approx((0.15 - half, 0.15 + half))
    (sentence,) = uniqueness.describe_matching(pl.DataFrame(pairs))
    assert sentence.endswith(": 15.00 points more than random tickets (15.00 %, 95 % 6.99 to 23.01).")
    (sentence,) = uniqueness.describe_matching(pl.DataFrame(pairs).with_columns(matched_jaccard=0.23))
    assert "no more than random tickets" in sentence  # more than their mean, and within their range
    within = pl.DataFrame(pairs).with_columns(kind=pl.lit("importances"))  # matching raises random tickets by 5 points
    for matched, explains in ((0.24, False), (0.26, True)):
        (sentence,) = uniqueness.describe_matching(within.with_columns(matched_jaccard=matched))
        assert sentence.endswith("; the order of units does not explain in what they differ.") is not explains
    wide = matching.summarise(pl.DataFrame(pairs).with_columns(draws=2, chance_sd=0.3), "kind").row(0, named=True)
    assert (wide["chance_low"], wide["chance_high"]) == (0.0, 1.0)  # no overlap lies outside
    once = pl.DataFrame(pairs).with_columns(draws=1, chance_sd=pl.lit(None, pl.Float64))
    assert matching.summarise(once)["chance_high"].to_list() == [None, None]
    assert "of one draw" in uniqueness.describe_matching(once)[0]


def test_a_random_ticket_has_the_same_connections_and_values_in_each_layer() -> None:
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(7, 5, generator=random) for name in ("a", "b")}
    mask = Mask.from_tensors({name: tensor > 0.3 for name, tensor in weights.items()})
    state = {name: tensor * mask[name] for name, tensor in weights.items()} | {"bias": torch.ones(2)}
    drawn, other = matching.shuffle(state, mask, 0, "x")
    assert other.counts == mask.counts
    assert other != mask
    assert drawn["bias"] is state["bias"]
    for name in mask:
        assert torch.equal(drawn[name] != 0, other[name])
        assert torch.equal(drawn[name].flatten().sort().values, state[name].flatten().sort().values)
    assert matching.shuffle(state, mask, 0, "x")[1] == other
    assert matching.shuffle(state, mask, 1, "x")[1] != other


def test_matching_ends_no_lower_where_all_weights_have_the_same_units_on_both_sides() -> None:
    units = Units({0: 5}, {"w": (Axis(0, 1), Axis(0, 1))}, {})
    for seed in range(30):
        random = torch.Generator().manual_seed(seed)
        one, other = ({"w": torch.randn(5, 5, generator=random)} for _ in range(2))
        moved = units.permute(other, matching.match_weights(units, one, other))
        assert (one["w"] * moved["w"]).sum() >= (one["w"] * other["w"]).sum()

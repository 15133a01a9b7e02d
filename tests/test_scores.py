"""Scores of whole networks, each against a second way of computing it, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tombola import Dataset, Mask, loops, prune
from tombola.errors import ImportanceError, UserError
from tombola.importance import NORMALISATIONS, SCORES, Importance, Network, NetworkScore, find, normalisation
from tombola.importance.network_scores import NETWORK_SCORES, _sample, taylor
from tombola.training.scoring import score_network

EXAMPLES = 12
BATCH = 5


class Small(nn.Module):
    """Convolutions of every kind that is told apart (strides, groups, padding, dilation), batch norm, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, (2, 1), groups=2, dilation=(1, 2), padding="same", padding_mode="circular")
        self.drop = nn.Dropout(0.5)
        self.conv3 = nn.Conv1d(4, 3, 3, padding=1, groups=1, bias=False)
        self.row = nn.Linear(9, 4)
        self.fc = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.softplus(self.conv2(self.bn(self.conv1(inputs))))
        hidden = self.drop(self.conv3(hidden.flatten(2)))
        outputs: Tensor = self.fc(torch.tanh(self.row(hidden)).flatten(1))
        return outputs


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Small()
    with torch.no_grad():  # running statistics that differ from those of any batch
        model.bn.running_mean.copy_(torch.randn(4))
        model.bn.running_var.copy_(torch.rand(4) + 0.5)
    return model


def images() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(EXAMPLES, 2, 6, 6, generator=draw), torch.arange(EXAMPLES) % 3
    return Dataset("small", inputs, labels, inputs, labels, classes=("a", "b", "c"))


def half(model: nn.Module) -> Mask:
    draw = torch.Generator().manual_seed(2)
    dense = Mask.ones_like(model)
    return Mask.from_tensors({name: torch.rand(shape, generator=draw) < 0.6 for name, shape in dense.shapes.items()})


def scores(
    score: NetworkScore,
    model: nn.Module,
    mask: Mask,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    examples: int = EXAMPLES,
) -> Mapping[str, Tensor]:
    return score_network(
        score,
        mask,
        removed=20,
        model=model,
        state=model.state_dict(),
        data=images(),
        loss=loss or functional.cross_entropy,
        seed=3,
        examples=examples,
        batch_size=BATCH,
    )


class Reference:
    """The same network in float64, evaluated by hand: batch by batch with batch norm as in training."""

    def __init__(
        self, model: nn.Module, mask: Mask, batches: list[tuple[Tensor, Tensor]], temperature: float = 1.0
    ) -> None:
        self.temperature = temperature
        self.model = copy.deepcopy(model).double()
        self.model.eval()
        self.model.get_submodule("bn").train()
        self.names = list(mask)
        with torch.no_grad():
            for name in mask:
                self.model.get_parameter(name).mul_(mask[name])
        self.weights = {name: self.model.get_parameter(name).detach().clone() for name in mask}
        self.batches = [(inputs.double(), labels) for inputs, labels in batches]

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        total = sum(len(inputs) for inputs, _ in self.batches)
        losses = [
            functional.cross_entropy(
                torch.func.functional_call(self.model, dict(weights), (inputs,)) / self.temperature, labels
            )
            * (len(inputs) / total)
            for inputs, labels in self.batches
        ]
        return torch.stack(losses).sum()

    def along(self, direction: Mapping[str, Tensor], step: float) -> float:
        moved = {name: self.weights[name] + step * direction[name] for name in self.names}
        return float(self.loss(moved).detach())


@pytest.fixture(scope="module")
def seen() -> list[tuple[Tensor, Tensor]]:
    """The batches that a score sees."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(network: Network) -> Mapping[str, Tensor]:
        found.extend(network.batches)
        return {}

    model = build()
    scores(NetworkScore(look), model, half(model))
    return found


def one_weight(reference: Reference, layer: str, index: int) -> dict[str, Tensor]:
    direction = {name: torch.zeros_like(weight) for name, weight in reference.weights.items()}
    direction[layer].view(-1)[index] = 1.0
    return direction


def some(mask: Mask) -> list[tuple[str, int]]:
    """Three alive connections of each layer."""
    return [(name, int(index)) for name in mask for index in mask[name].flatten().nonzero()[::7].flatten()[:3]]


def test_examples_are_drawn_once_in_batches_of_about_equal_size(
    seen: list[tuple[Tensor, Tensor]],
) -> None:
    assert [len(inputs) for inputs, _ in seen] == [4, 4, 4]
    data = images()
    found = torch.cat([inputs for inputs, _ in seen])
    places = [int((data.train_inputs == each).flatten(1).all(1).nonzero()) for each in found]
    assert sorted(places) == list(range(EXAMPLES))
    assert places != list(range(EXAMPLES))
    assert torch.cat([labels for _, labels in seen]).equal(data.train_labels[torch.tensor(places)])


def test_as_many_examples_are_drawn_as_are_asked_for() -> None:
    counts: list[int] = []

    def look(network: Network) -> Mapping[str, Tensor]:
        counts.extend(len(network.outputs(inputs)) for inputs, _ in network.batches)  # no running statistics change
        return {}

    scores(NetworkScore(look), model := build(), half(model), examples=7)
    assert counts == [4, 3]


@pytest.mark.parametrize("name", ["taylor", "snip"])
def test_first_order_scores_are_the_slope_of_the_loss(name: str, seen: list[tuple[Tensor, Tensor]]) -> None:
    model = build()
    mask = half(model)
    found, reference = scores(NETWORK_SCORES[name], model, mask), Reference(model, mask, seen)
    for layer, index in some(mask):
        direction = one_weight(reference, layer, index)
        slope = (reference.along(direction, 1e-5) - reference.along(direction, -1e-5)) / 2e-5
        expected = abs(slope * float(reference.weights[layer].view(-1)[index]))
        assert float(found[layer].flatten()[index]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_grasp_is_the_slope_of_half_the_squared_gradient(seen: list[tuple[Tensor, Tensor]]) -> None:
    """H g is the gradient of |g|^2 / 2."""
    model = build()
    mask = half(model)
    found, reference = scores(NETWORK_SCORES["grasp"], model, mask), Reference(model, mask, seen, temperature=200)

    def half_square(weights: Mapping[str, Tensor]) -> float:
        moving = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        slopes = torch.autograd.grad(reference.loss(moving), list(moving.values()))
        alive = [slope[mask[name]] for name, slope in zip(moving, slopes, strict=True)]  # the pruned ones do not train
        return float(sum(slope.square().sum() for slope in alive)) / 2

    for layer, index in some(mask):
        ends = []
        for step in (1e-5, -1e-5):
            direction = one_weight(reference, layer, index)
            ends.append(half_square({name: reference.weights[name] + step * direction[name] for name in mask}))
        expected = (ends[0] - ends[1]) / 2e-5 * float(reference.weights[layer].view(-1)[index])
        assert float(found[layer].flatten()[index]) == pytest.approx(expected, rel=2e-3, abs=1e-9)
    assert any(bool((each < 0).any()) for each in found.values()), "grasp has a sign"


def test_fisher_sums_the_squared_gradients_of_the_examples(seen: list[tuple[Tensor, Tensor]]) -> None:
    model = build()
    model.bn = nn.Identity()  # otherwise the gradient of one example depends on the others
    mask = half(model)
    found = scores(NETWORK_SCORES["fisher"], model, mask)
    squares = {name: torch.zeros(mask.shapes[name], dtype=torch.float64) for name in mask}
    with torch.no_grad():
        for name in mask:
            model.get_parameter(name).mul_(mask[name])
    model.double().eval()
    for inputs, labels in seen:
        for each, label in zip(inputs.double(), labels, strict=True):
            model.zero_grad()
            functional.cross_entropy(model(each[None]), label[None]).backward()
            for name in mask:
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                squares[name] += gradient.square()
    for name in mask:
        expected = model.get_parameter(name).detach().square() * squares[name] / EXAMPLES
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("side", [2, 3])  # with 2 and with 8 positions, as few are summed in another way
def test_fisher_and_wanda_rate_convolutions_of_volumes(side: int) -> None:
    model = nn.Sequential(
        nn.Conv3d(1, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 1, 0)), nn.Flatten(), nn.LazyLinear(2)
    )
    inputs, labels = torch.randn(9, 1, side, 2, side), torch.arange(9) % 2
    model(inputs)
    weight = model[0].weight
    alive = {"0.weight": torch.ones_like(weight, dtype=torch.bool)}
    network = Network(model, alive, [(inputs, labels)], functional.cross_entropy, torch.Generator())
    expected = torch.zeros_like(weight)
    for each, label in zip(inputs, labels, strict=True):
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(each[None]), label[None]), [weight])
        expected += gradient.square() * weight.detach().square() / 9
    torch.testing.assert_close(NETWORK_SCORES["fisher"](network)["0.weight"], expected)
    ones = torch.zeros_like(weight)  # the outputs of each connection alone are its inputs
    for at in range(weight[0].numel()):
        one = torch.zeros_like(weight[:1]).view(-1)
        one[at] = 1
        heard = functional.conv3d(inputs, one.view_as(weight[:1]), stride=(1, 2, 1), padding=(0, 1, 0))
        ones.flatten(1)[:, at] = heard.norm()
    torch.testing.assert_close(NETWORK_SCORES["wanda"](network)["0.weight"], (weight * ones).abs().detach())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_wanda_multiplies_weights_by_the_norm_of_their_inputs(seen: list[tuple[Tensor, Tensor]]) -> None:
    """The outputs of a layer with one weight of 1 and all others 0 are the inputs of that connection."""
    model = build()
    mask = half(model)
    found = scores(NETWORK_SCORES["wanda"], model, mask)
    reference = Reference(model, mask, seen)
    heard: dict[str, list[Tensor]] = {}
    modules = {name: reference.model.get_submodule(name.removesuffix(".weight")) for name in mask}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: heard.setdefault(name, []).append(inputs[0]))
    reference.loss(reference.weights)
    for name, index in some(mask):
        alone = copy.deepcopy(modules[name])
        alone._forward_pre_hooks.clear()
        with torch.no_grad():
            alone.weight.zero_().view(-1)[index] = 1.0
            if alone.bias is not None:
                alone.bias.zero_()
            square = sum(float(alone(inputs).square().sum()) for inputs in heard[name])
        expected = abs(float(reference.weights[name].view(-1)[index])) * square**0.5
        assert float(found[name].flatten()[index]) == pytest.approx(expected, rel=1e-4)


def test_hessian_is_its_diagonal_where_the_hessian_is_diagonal() -> None:
    """With a loss of sum(a_i w_i^2) / 2, every draw of signs gives the diagonal a exactly."""
    model = nn.Linear(3, 1, bias=False)
    factors = torch.tensor([[1.0, -2.0, 3.0]])
    network = Network(
        model,
        {"weight": torch.ones(1, 3, dtype=torch.bool)},
        [(torch.ones(4, 3), torch.zeros(4))],
        lambda outputs, _: (factors * model.weight.square()).sum() / 2 + 0 * outputs.sum(),
        torch.Generator(),
    )
    expected = model.weight.detach().square() * factors.abs() / 2
    torch.testing.assert_close(dict(NETWORK_SCORES["hessian"](network))["weight"], expected)


def test_synflow_counts_paths() -> None:
    """In a network of linear layers, it is the sum over all paths through a weight of the product of |w| along them."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    mask = half(model)
    first, last = (model[place].weight.detach().double().abs() * mask[f"{place}.weight"] for place in (0, 2))
    data = Dataset(
        "rows", torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), torch.randn(2, 3), torch.tensor([0, 1]), ("a", "b")
    )
    arguments = {"model": model, "state": model.state_dict(), "data": data, "loss": functional.cross_entropy, "seed": 0}
    found = score_network(NETWORK_SCORES["synflow"], mask, **arguments)  # type: ignore[arg-type]
    paths = torch.einsum("oh,hi->ohi", last, first)
    torch.testing.assert_close(found["0.weight"], paths.sum(0))
    torch.testing.assert_close(found["2.weight"], paths.sum(2))


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_mask_has_the_least_loss_of_all_masks(seed: int) -> None:
    """A large weight of the wrong sign is in no mask of little loss."""
    weights, best = torch.tensor([3, -2, 1, 0.8, 0.5]), torch.tensor([-3, -2, 1, 0.8, 0])
    model = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weights)
    batches = 10 * [(torch.eye(5), best[:, None])]
    alive = {"weight": torch.ones(1, 5, dtype=torch.bool)}
    network = Network(model, alive, batches, functional.mse_loss, torch.Generator().manual_seed(seed))
    learned = NETWORK_SCORES["concrete"](replace(network, removed=3))["weight"].flatten()

    def loss_of(pair: Sequence[int]) -> float:
        mask = torch.zeros(5).index_fill(0, torch.tensor(pair), 1)
        return float((weights * mask - best).square().sum())

    assert set(learned.topk(2).indices.tolist()) == set(min(itertools.combinations(range(5), 2), key=loss_of))


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_masks_are_drawn_from_the_concrete_distribution(quantile: float) -> None:
    """The probability that a sample is less than q is sigmoid(T log(q / (1 - q)) - a), by its inverse."""
    count, logit = 40_000, 0.5
    drawn = _sample(torch.full((count,), logit), torch.Generator().manual_seed(0))
    expected = float(torch.sigmoid(torch.tensor(2 / 3 * math.log(quantile / (1 - quantile)) - logit)))
    assert float((drawn < quantile).float().mean()) == pytest.approx(expected, abs=4 * (0.25 / count) ** 0.5)


@pytest.mark.parametrize("removed", [10, 30, 50])
def test_learned_probabilities_have_the_density_that_is_left(removed: int) -> None:
    model = build()
    mask = half(model)
    arguments = {"model": model, "state": model.state_dict(), "data": images(), "loss": functional.cross_entropy}
    for kept_dense in (set(), {"fc.weight", "conv3.weight"}):
        layers = mask.keys() - kept_dense
        found = score_network(NETWORK_SCORES["concrete"], mask, layers, removed, **arguments, seed=3, batch_size=BATCH)  # type: ignore[arg-type]
        kept, alive = (sum(float(each[layer][mask[layer]].sum()) for layer in layers) for each in (found, mask))
        assert kept == pytest.approx(alive - removed, rel=0.1)
        assert all(0 <= float(each.min()) <= float(each.max()) <= 1 for each in found.values())
        assert all(found[layer].eq(1).all() for layer in kept_dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_are_learned_for_weights_of_other_types(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 3).to(dtype)
    batches = [(torch.randn(4, 6).to(dtype), torch.tensor([0, 1, 2, 0]))]
    after = loops.prune(
        model, Mask.ones_like(model), find("concrete"), 0.5, loss=functional.cross_entropy, batches=batches
    )
    assert after.counts == {"weight": 9}


def test_a_round_that_removes_nothing_asks_no_score() -> None:
    model = nn.Linear(6, 3)
    dense, batches = Mask.ones_like(model), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    after = loops.prune(model, dense, find("concrete"), 0.01, loss=functional.cross_entropy, batches=batches)
    assert after.counts == dense.counts
    with pytest.raises(ImportanceError, match="it learns which of 18 connections to keep, and 0 are removed"):
        NETWORK_SCORES["concrete"](
            Network(model, dense, batches, functional.cross_entropy, torch.Generator(), prunable=["weight"])
        )


def test_a_score_knows_how_many_connections_a_round_removes() -> None:
    model, asked = build(), []

    def note(network: Network) -> Mapping[str, Tensor]:
        assert set(network.prunable or ()) == dense.keys() - {"fc.weight"}
        asked.append((sum(int(each.sum()) for each in network.alive.values()), network.removed))
        return {layer: weight.detach().abs() for layer, weight in network.weights.items()}

    importance = Importance(NetworkScore(note, steps=2), NORMALISATIONS["identity"])
    dense = Mask.ones_like(model)
    compute = partial(
        score_network, model=model, state=model.state_dict(), data=images(), loss=functional.cross_entropy, seed=3
    )
    after = prune(dict(model.named_parameters()), dense, importance, 0.36, keep_dense=["fc"], score_network=compute)
    (first, removed), (second, rest) = asked
    assert (first, second, second - rest) == (dense.total, first - removed, after.alive)
    assert 0 < removed < dense.total - after.alive
    whole, last = dense.counts["fc.weight"], after.alive
    assert (last, after.counts["fc.weight"]) == (first - round(0.36 * first), whole)
    assert second - whole == round(math.sqrt((first - whole) * (last - whole))), "both steps remove the same fraction"
    asked.clear()
    batches = [(images().train_inputs, images().train_labels)]
    alone = loops.prune(
        model, dense, importance, 0.36, keep_dense=["fc"], loss=functional.cross_entropy, batches=batches
    )
    assert (alone.counts, asked) == (after.counts, [(first, removed), (second, rest)])


@pytest.mark.parametrize("name", NETWORK_SCORES)
def test_scores_leave_the_network_and_global_random_numbers_alone(name: str) -> None:
    model = build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    numbers = torch.rand(3)
    torch.manual_seed(7)
    one, other = (scores(NETWORK_SCORES[name], model, half(model)) for _ in range(2))
    assert torch.rand(3).equal(numbers)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(one[layer].equal(other[layer]) for layer in one), "equal arguments give equal bits"


@pytest.mark.parametrize("name", NETWORK_SCORES)
def test_scores_are_blind_to_pruned_connections(name: str) -> None:
    model = build()
    mask = half(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in mask:
            changed.get_parameter(layer).masked_fill_(~mask[layer], 1e3)
    one, other = (scores(NETWORK_SCORES[name], each, mask) for each in (model, changed))
    assert all(one[layer][mask[layer]].equal(other[layer][mask[layer]]) for layer in mask)


@pytest.mark.parametrize("name", [name for name in NETWORK_SCORES if name != "synflow"])
def test_scores_with_data_do_not_depend_on_running_statistics(name: str) -> None:
    model = build()
    other = copy.deepcopy(model)
    other.bn.running_mean.zero_()
    mask = half(model)
    assert all(
        one.equal(two)
        for one, two in zip(
            scores(NETWORK_SCORES[name], model, mask).values(),
            scores(NETWORK_SCORES[name], other, mask).values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("normalise", [name for name in NORMALISATIONS if name != "lamp"])  # no negative scores
def test_any_score_with_any_normalisation_removes_exactly_what_is_asked(name: str, normalise: str) -> None:
    model = build()
    mask = half(model)
    state = model.state_dict()
    rewound = {key: tensor + 0.1 for key, tensor in state.items()}
    found = prune(state, mask, find(f"{name}/{normalise}"), 0.3, rewound=rewound, score_network=scorer(model))
    assert found.alive == mask.alive - round(0.3 * mask.alive)
    assert (found & mask) == found


def scorer(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy):  # type: ignore[no-untyped-def]
    return partial(
        score_network, model=model, state=model.state_dict(), data=images(), loss=loss, seed=3, batch_size=BATCH
    )


def test_a_score_of_several_steps_is_computed_again_before_each() -> None:
    model = build()
    seen: list[int] = []

    def count(network: Network) -> dict[str, Tensor]:
        seen.append(sum(int(alive.sum()) for alive in network.alive.values()))
        return {layer: weight.detach().abs() for layer, weight in network.weights.items()}

    dense = Mask.ones_like(model)
    stepwise = prune(model.state_dict(), dense, Importance(NetworkScore(count, 4)), 0.5, score_network=scorer(model))
    assert seen == [dense.total, *(round(dense.total * 0.5 ** (step / 4)) for step in (1, 2, 3))]
    assert stepwise == prune(model.state_dict(), dense, find("magnitude"), 0.5), "magnitudes do not depend on the mask"
    uniform: dict[str, Any] = {"selection": "uniform", "score_network": scorer(model)}
    assert prune(model.state_dict(), dense, Importance(NetworkScore(count, 4)), 0.5, **uniform).alive == stepwise.alive


MISTAKES: dict[str, tuple[Callable[[Network], object], str]] = {
    "no dict": (lambda network: 1, "expected a dict, layer -> scores, got int"),
    "no layer": (lambda network: {}, "layer 'conv1.weight': expected a tensor of shape (4, 2, 3, 3), one score per "),
    "shape": (lambda n: {layer: w.detach()[0] for layer, w in n.weights.items()}, "got shape (2, 3, 3)"),
    "nan": (lambda n: {layer: w.detach() * float("nan") for layer, w in n.weights.items()}, "it returned NaN"),
    "raises": (lambda network: network.nothing, "AttributeError: 'Network' object has no attribute 'nothing'"),
    "changes weights": (
        lambda n: {layer: w.data.mul_(2) for layer, w in n.weights.items()},
        "it changed the network; a score has to leave weights and buffers as they are",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_a_score(case: str) -> None:
    function, sentence = MISTAKES[case]
    model = build()
    with pytest.raises(ImportanceError) as error:
        prune(
            model.state_dict(),
            half(model),
            Importance(NetworkScore(function)),  # type: ignore[arg-type]
            0.3,
            score_network=scorer(model),
        )
    assert sentence in str(error.value)
    assert str(error.value).startswith("importance '")


@pytest.mark.parametrize("name", ["taylor", "snip", "grasp", "hessian", "fisher"])
def test_a_loss_that_is_not_finite_is_refused(name: str) -> None:
    model = build()
    with pytest.raises(ImportanceError, match=f"importance '{name}': the loss is nan at the weights that are scored"):
        prune(
            model.state_dict(),
            half(model),
            find(name),
            0.3,
            score_network=scorer(model, lambda o, _: o.sum() * float("nan")),
        )


def test_what_a_score_needs_is_asked_for() -> None:
    model = build()
    state, mask = model.state_dict(), half(model)
    with pytest.raises(UserError, match="importance 'taylor' needs the network, its loss and data, not weights alone"):
        prune(state, mask, find("taylor"), 0.3)
    with pytest.raises(
        ImportanceError, match=r"importance 'movement', layer .*: it needs the weights at the rewind point, which"
    ):
        prune(state, mask, find("movement"), 0.3)
    with pytest.raises(ImportanceError, match="lamp cannot normalise"):
        prune(state, mask, find("grasp/lamp"), 0.3, score_network=scorer(model))
    transposed = nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.Flatten(), nn.Linear(108, 3))
    with pytest.raises(
        ImportanceError, match=r"it rates only weights of linear and convolution layers, and .* is of a ConvTranspose"
    ):
        prune(transposed.state_dict(), Mask.ones_like(transposed), find("wanda"), 0.3, score_network=scorer(transposed))


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_l1_and_l2_keep_signs_and_order(values: list[float]) -> None:
    numbers = torch.tensor(values, dtype=torch.float64)
    for function in (normalisation.l1, normalisation.l2):
        found = function(numbers)
        assert not ((found != 0) & (found.sign() != numbers.sign())).any()
        order = numbers.argsort()
        assert (found[order].diff() >= -1e-15).all()
        assert float(found.abs().sum()) == pytest.approx(1.0 if numbers.any() else 0.0)


def test_a_normalisation_may_not_change_the_order() -> None:
    weights = {"w": torch.tensor([1.0, 2.0, 3.0, 0.0])}
    dense = Mask.from_tensors({"w": torch.ones(4, dtype=torch.bool)})
    magnitude = find("magnitude").score
    for reverse in (lambda scores: -scores, lambda scores: scores.neg_(), lambda scores: 1 / scores):
        with pytest.raises(ImportanceError, match="it must keep the order of the scores of a layer"):
            prune(weights, dense, Importance(magnitude, reverse), 0.25)
    assert prune(weights, dense, lambda magnitudes: -magnitudes, 0.25)["w"].tolist() == [True, True, False, True]
    prune(weights, dense, Importance(magnitude, lambda scores: scores**0.5 / 7 + 1e-12), 0.25)


@pytest.mark.parametrize(
    ("weights", "values", "kept"),
    [([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], True), ([1.0, 1.0, 2.0], [5.0, 4.0, 6.0], True),
     ([1.0, 2.0, 3.0], [1.0, 2.0, 2 - 1e-12], True), ([1.0, 2.0, 3.0], [1.0, 2.0, 2 - 1e-5], False)],
    ids=["two equal values", "two equal scores", "rounding", "more than rounding"],
)  # fmt: skip
def test_an_order_is_changed_only_by_a_lower_value_for_a_higher_score(
    weights: list[float], values: list[float], kept: bool
) -> None:
    importance = Importance(find("magnitude").score, lambda _: torch.tensor(values, dtype=torch.float64))
    dense = Mask.from_tensors({"w": torch.ones(3, dtype=torch.bool)})
    with contextlib.nullcontext() if kept else pytest.raises(ImportanceError, match="it must keep the order"):
        prune({"w": torch.tensor(weights)}, dense, importance, 0.3)


def test_a_score_that_is_not_a_number_is_found_whatever_the_normalisation() -> None:
    dense = Mask.from_tensors({"w": torch.ones(3, dtype=torch.bool)})
    importance = Importance(lambda survivors: survivors.weights() * math.nan, NORMALISATIONS["rank"])
    with pytest.raises(ImportanceError, match="it returned NaN"):
        prune({"w": torch.ones(3)}, dense, importance, 0.3)


def test_a_layer_that_is_called_twice_or_not_at_all_is_refused_by_scores_that_watch_layers() -> None:
    class Odd(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.times = times

        def forward(self, inputs: Tensor) -> Tensor:
            hidden: Tensor = self.first(inputs)
            for _ in range(self.times):
                hidden = self.second(hidden)
            return hidden

    def network(times: int) -> Network:
        model = Odd(times)
        alive = {name: torch.ones(2, 2, dtype=torch.bool) for name in ("first.weight", "second.weight")}
        batches = [(torch.randn(3, 2), torch.tensor([0, 1, 0]))]
        return Network(model, alive, batches, functional.cross_entropy, torch.Generator())

    for times in (0, 2):
        with pytest.raises(ImportanceError, match="it rates only layers that the network calls once, and not 'second"):
            NETWORK_SCORES["fisher"](network(times))
    with pytest.raises(ImportanceError, match=r"the network calls, and not .second"):
        NETWORK_SCORES["wanda"](network(0))
    assert set(NETWORK_SCORES["wanda"](network(2))) == {"first.weight", "second.weight"}


@pytest.mark.parametrize("name", NETWORK_SCORES)
def test_frozen_weights_are_scored_like_others(name: str) -> None:
    model = build()
    mask = half(model)
    expected = scores(NETWORK_SCORES[name], model, mask)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = scores(NETWORK_SCORES[name], model, mask)
    assert all(found[layer].equal(expected[layer]) for layer in mask)


def test_taylor_of_a_dense_network_that_no_weight_of_a_layer_reaches_is_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    network = Network(
        model,
        {"weight": torch.ones(2, 2, dtype=torch.bool)},
        [(torch.ones(3, 2), torch.zeros(3))],
        lambda outputs, _: outputs.sum() * 0,
        torch.Generator(),
    )
    assert not taylor(network)["weight"].any()


class Named(nn.Module):
    """A network that gives a layer its input by name, or calls it without gradients."""

    def __init__(self, *, with_gradients: bool = True) -> None:
        super().__init__()
        self.first, self.fc, self.with_gradients = nn.Linear(4, 5), nn.Linear(5, 3), with_gradients

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.with_gradients and torch.is_grad_enabled()):
            hidden = self.first(input=inputs)
        outputs: Tensor = self.fc(hidden)
        return outputs


def score_named(
    score: str,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    **how: int,
) -> Mapping[str, Tensor]:
    inputs, labels = torch.linspace(-1, 1, 48).reshape(12, 4), torch.arange(12) % 3
    data = Dataset("named", inputs, labels, inputs, labels, ("a", "b", "c"))
    mask, state = Mask.ones_like(model), model.state_dict()
    return score_network(SCORES[score], mask, model=model, state=state, data=data, loss=loss, seed=0, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["fisher", "wanda"])
def test_a_layer_may_get_its_input_by_name(score: str) -> None:
    model = Named()
    plain = nn.Sequential(model.first, model.fc)
    assert all(map(torch.equal, score_named(score, model).values(), score_named(score, plain).values()))


def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(ImportanceError, match=r"calls without gradients \(no_grad\): 'first.weight'"):
        score_named("fisher", Named(with_gradients=False))
    losses: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
        (lambda outputs, labels: torch.tensor(1.0), "the loss does not depend on the weights"),
        (lambda outputs, labels: outputs.detach().sum(), "the loss does not depend on the weights"),
        (partial(functional.cross_entropy, reduction="none"), r"as the loss, the mean over the batch, got .*\(12,\)"),
        (lambda outputs, labels: 1.0, "as the loss, the mean over the batch, got float"),  # type: ignore[return-value]
    ]
    for score in ("taylor", "snip", "grasp", "hessian", "fisher"):
        for loss, said in losses:
            with pytest.raises(ImportanceError, match=said):
                score_named(score, Named(), loss)
    for name in ("examples", "batch_size"):
        with pytest.raises(UserError, match=f"{name}: expected a number from 1, got 0"):
            score_named("taylor", Named(), **{name: 0})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"selection": "Erk"}, "selection: unknown 'Erk'; did you mean 'erk'"),
        ({"shares": {"a": float("nan")}}, "shares: 'a' has the share nan; expected a number from 0"),
        ({"shares": {"a": float("inf")}}, "shares: 'a' has the share inf"),
        ({"shares": {"a": -1.0}}, "shares: 'a' has the share -1.0"),
        ({"shares": {"a": "1"}}, "shares: 'a' has the share '1'"),
        ({"shares": {"a": True}}, "shares: 'a' has the share True"),
        ({"shares": {"aa": 1.0}}, "shares: 'aa' is no layer of the mask; did you mean 'a'"),
        ({"fraction": "0.5"}, "fraction: expected a number between 0 and 1, both excluded, got '0.5'"),
        ({"fraction": torch.tensor(0.2)}, "fraction: expected a number between 0 and 1, both excluded, got Tensor"),
    ],
)
def test_a_round_that_asks_for_something_odd_is_refused(how: dict[str, object], said: str) -> None:
    mask = Mask.from_tensors({"a": torch.ones(4).bool(), "b": torch.ones(6).bool()})
    arguments: dict[str, object] = {"fraction": 0.5, "selection": "shares"} | how
    with pytest.raises(UserError, match=said):
        prune({"a": torch.ones(4), "b": torch.ones(6)}, mask, find("magnitude"), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{"passes": "20"}, {"passes": -20}, {"steps": 0}, {"steps": 1.5}])
def test_a_score_with_impossible_numbers_is_refused(numbers: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(numbers))}: expected a whole number"):
        NetworkScore(lambda network: {}, **numbers)  # type: ignore[arg-type]

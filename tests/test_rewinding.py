"""The paper's Algorithm 2, call by call and against a loop by hand; and the tickets that it finds."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tombola import (
    Dataset,
    History,
    Mask,
    Recipe,
    Ticket,
    Trained,
    UserError,
    Weights,
    find_tickets,
    lottery_ticket_rewinding,
    prune,
    train,
)
from tombola.importance import IMPORTANCES, l1, magnitude
from tombola.lottery.rule import Rule, check_levels, prune_round
from tombola.streams import generator
from tombola.training.train import initial_state
from tombola.training.weights import State, apply_mask, state_hash

EXAMPLES = 26  # with batches of 8: 4 iterations an epoch, the last of 2 examples


def _digits() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(EXAMPLES) % 3
    inputs = torch.rand(EXAMPLES, 6, generator=draw) + functional.one_hot(labels, 6) * 0.5
    return Dataset("three", inputs, labels, inputs[:9], labels[:9], ("a", "b", "c"))


DATA = _digits()


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def _initialise() -> nn.Module:
    model = _network()
    model.load_state_dict(initial_state(_network, 0))
    return model


# Algorithm 2, call by call.


class Notebook:
    """Notes the calls of `train` and `prune`; weights are named by what they were trained from."""

    def __init__(self, diverges: str | None = None, missing: str | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.diverges = diverges
        self.missing = missing

    def train(self, initial: Weights, mask: Mask, begin: int, end: int) -> Trained | None:
        self.calls.append(("train", initial.hash, mask.alive, begin, end))
        name = f"{initial.hash} {mask.alive}:{begin}-{end}"
        if name == self.missing:
            return None
        return Trained(_name(name), History(diverged_at=3 if name == self.diverges else None))

    def prune(self, weights: Weights, mask: Mask, level: int, rewind: Weights) -> Mask:
        self.calls.append(("prune", weights.hash, mask.alive, level))
        bits = mask["w"].clone()
        bits[int(bits.nonzero()[0])] = False
        return Mask.from_tensors({"w": bits})

    def tickets(self, rewind: int, levels: int) -> list[Ticket]:
        dense = Mask.from_tensors({"w": torch.ones(4, dtype=torch.bool)})
        return list(
            lottery_ticket_rewinding(
                self.train, self.prune, _name("theta_0"), dense, rewind=rewind, end=9, levels=levels
            )
        )


def _name(name: str) -> Weights:
    return Weights(name, dict)


def test_from_the_beginning() -> None:
    notebook = Notebook()
    tickets = notebook.tickets(rewind=0, levels=2)
    assert notebook.calls == [
        ("train", "theta_0", 4, 0, 9),
        ("prune", "theta_0 4:0-9", 4, 0),
        ("train", "theta_0", 3, 0, 9),
        ("prune", "theta_0 3:0-9", 3, 1),
        ("train", "theta_0", 2, 0, 9),
    ]
    assert [(t.level, t.mask.alive, t.rewind.hash, t.trained and t.trained.weights.hash) for t in tickets] == [
        (0, 4, "theta_0", "theta_0 4:0-9"),
        (1, 3, "theta_0", "theta_0 3:0-9"),
        (2, 2, "theta_0", "theta_0 2:0-9"),
    ]


def test_from_a_later_iteration() -> None:
    notebook = Notebook()
    tickets = notebook.tickets(rewind=5, levels=1)
    theta_k = "theta_0 4:0-5"
    assert notebook.calls == [
        ("train", "theta_0", 4, 0, 5),
        ("train", theta_k, 4, 5, 9),
        ("prune", f"{theta_k} 4:5-9", 4, 0),
        ("train", theta_k, 3, 5, 9),
    ]
    assert [ticket.rewind.hash for ticket in tickets] == [theta_k, theta_k]


def test_without_rounds_there_is_the_dense_network() -> None:
    notebook = Notebook()
    assert [ticket.level for ticket in notebook.tickets(rewind=0, levels=0)] == [0]
    assert notebook.calls == [("train", "theta_0", 4, 0, 9)]


@pytest.mark.parametrize(
    ("diverges", "levels"),
    [("theta_0 4:0-9", [0]), ("theta_0 3:0-9", [0, 1]), ("theta_0 1:0-9", [0, 1, 2, 3])],
    ids=["at once", "later", "at the end"],
)
def test_a_training_that_diverges_ends_it(diverges: str, levels: list[int]) -> None:
    notebook = Notebook(diverges)
    tickets = notebook.tickets(rewind=0, levels=3)
    assert [ticket.level for ticket in tickets] == levels
    assert [ticket.trained.history.diverged_at for ticket in tickets if ticket.trained] == [None] * levels[-1] + [3]
    assert ("prune", diverges, tickets[-1].mask.alive, levels[-1]) not in notebook.calls


@pytest.mark.parametrize(
    ("missing", "levels"),
    [
        ("theta_0 4:0-5", []),
        ("theta_0 4:0-5 4:5-9", []),
        ("theta_0 4:0-5 3:5-9", [0]),
        ("theta_0 4:0-5 2:5-9", [0, 1]),
    ],
    ids=["the rewind point", "the dense network", "level 1", "level 2"],
)
def test_it_ends_before_a_training_that_there_is_not(missing: str, levels: list[int]) -> None:
    notebook = Notebook(missing=missing)
    assert [ticket.level for ticket in notebook.tickets(rewind=5, levels=2)] == levels
    kind, initial, alive, begin, end = notebook.calls[-1]
    assert (kind, f"{initial} {alive}:{begin}-{end}") == ("train", missing), "and nothing is done after it"


def test_it_is_found_level_by_level() -> None:
    notebook = Notebook()
    dense = Mask.from_tensors({"w": torch.ones(4, dtype=torch.bool)})
    found = lottery_ticket_rewinding(notebook.train, notebook.prune, _name("theta_0"), dense, rewind=0, end=9, levels=3)
    assert notebook.calls == []
    next(found)
    assert len(notebook.calls) == 1
    next(found)
    assert len(notebook.calls) == 3


# Against a loop by hand.


def _by_hand(recipe: Recipe, levels: int, fraction: float, seed: int) -> list[tuple[State, State]]:
    """Return (masks, trained state) of each level: magnitude and plain SGD, in plain PyTorch."""
    model = _initialise()
    per_epoch = math.ceil(EXAMPLES / recipe.batch_size)
    total = recipe.total_iterations(EXAMPLES)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}

    def go(begin: int, end: int) -> None:
        for iteration in range(begin, end):
            epoch, step = divmod(iteration, per_epoch)
            order = torch.randperm(EXAMPLES, generator=generator(seed, "data order", epoch))
            chosen = order[step * recipe.batch_size :][: recipe.batch_size]
            model.zero_grad()
            functional.cross_entropy(model(DATA.train_inputs[chosen]), DATA.train_labels[chosen]).backward()  # type: ignore[no-untyped-call]
            lr = recipe.lr * (0.1 if epoch >= 2 else 1.0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    parameter.sub_(lr * parameter.grad)
                    if name in masks:
                        parameter.mul_(masks[name])

    go(0, recipe.rewind)
    rewind_point = copy.deepcopy(model.state_dict())
    found = []
    for level in range(levels + 1):
        model.load_state_dict(rewind_point)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
        go(recipe.rewind, total)
        found.append((copy.deepcopy(masks), copy.deepcopy(model.state_dict())))
        if level == levels:
            break
        everything = sorted(
            (weight.flatten()[i].abs().item(), number, i)
            for number, (name, weight) in enumerate(weights.items())
            for i in range(weight.numel())
            if masks[name].flatten()[i]
        )
        for _, number, i in everything[: round(fraction * len(everything))]:
            masks[list(weights)[number]].view(-1)[i] = False
    return found


@pytest.mark.parametrize("rewind", [0, 6])
def test_equals_a_loop_by_hand(rewind: int) -> None:
    recipe = Recipe(lr=0.5, schedule="milestones", milestones=(2,), batch_size=8, epochs=3, rewind=rewind)
    expected = _by_hand(recipe, levels=5, fraction=0.3, seed=4)
    tickets = list(find_tickets(_initialise(), DATA, recipe, magnitude, levels=5, fraction=0.3, seed=4))
    assert len(tickets) == len(expected) == 6
    for ticket, (masks, state) in zip(tickets, expected, strict=True):
        assert all(ticket.mask[name].equal(alive) for name, alive in masks.items())
        assert ticket.trained is not None
        # The product with the learning rate may be rounded or not before it is subtracted.
        torch.testing.assert_close(ticket.trained.weights.load(), state, rtol=1e-5, atol=1e-6)
    assert tickets[-1].mask != tickets[0].mask


# Tickets of a network.

RECIPE = Recipe(momentum=0.9, lr=0.05, batch_size=8, epochs=2, rewind=3)


def _tickets(**changes: Any) -> list[Ticket]:
    arguments: dict[str, Any] = {"recipe": RECIPE, "importance": l1, "levels": 3, "model": _initialise()}
    return list(find_tickets(data=DATA, **(arguments | changes)))


def test_densities_of_the_levels() -> None:
    tickets = _tickets(levels=8)
    alive = 6 * 12 + 12 * 3
    for level, ticket in enumerate(tickets):
        assert ticket.level == level
        assert ticket.mask.alive == alive
        assert ticket.mask.density == pytest.approx(0.8**level, abs=0.01)
        if level:
            assert ticket.mask & tickets[level - 1].mask == ticket.mask
        alive -= round(0.2 * alive)


def test_a_ticket_is_the_rewind_point_and_what_was_trained_from_it() -> None:
    model = _initialise()
    dense = Mask.ones_like(model)
    point = train(model, model.state_dict(), dense, DATA, RECIPE, 0, end=3)
    mask = dense
    tickets = _tickets()
    assert len(tickets) > 1
    for ticket in tickets:
        assert ticket.rewind.hash == point.weights.hash
        assert ticket.mask == mask
        torch.testing.assert_close(ticket.rewound, apply_mask(point.weights.load(), mask), rtol=0, atol=0)
        trained = train(model, ticket.rewound, ticket.mask, DATA, RECIPE, 0, begin=3)
        assert ticket.trained is not None
        assert ticket.trained.weights.hash == trained.weights.hash
        assert ticket.trained.history == trained.history
        mask = prune_round(trained.weights, mask, ticket.level, ticket.rewind, importance=l1, rule=Rule(0.2), seed=0)


def test_equal_arguments_find_equal_tickets_and_change_nothing() -> None:
    model = _initialise()
    before = state_hash(model.state_dict())
    names = [[(t.mask.hash, t.rewind.hash, t.trained and t.trained.weights.hash) for t in _tickets(model=model)]]
    torch.manual_seed(3)
    names.append([(t.mask.hash, t.rewind.hash, t.trained and t.trained.weights.hash) for t in _tickets(model=model)])
    assert names[0] == names[1]
    assert state_hash(model.state_dict()) == before
    assert _tickets(seed=1)[1].mask.hash != names[0][1][0]


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_finds_tickets(name: str) -> None:
    tickets = _tickets(importance=IMPORTANCES[name], levels=2)
    assert [ticket.mask.alive for ticket in tickets] == [108, 86, 69]


def test_excluded_layers_stay_dense() -> None:
    tickets = _tickets(exclude=["2"])
    assert all(list(ticket.mask) == ["0.weight"] for ticket in tickets)
    assert tickets[-1].mask.alive == round(round(round(72 * 0.8) * 0.8) * 0.8)
    assert tickets[-1].trained is not None
    assert (tickets[-1].trained.weights.load()["2.weight"] != 0).all()


def test_a_loss_of_ones_own() -> None:
    def distance(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - functional.one_hot(labels, 3)).square().mean()

    own, usual = _tickets(loss=distance)[0].trained, _tickets()[0].trained
    assert own is not None
    assert usual is not None
    assert own.weights.hash != usual.weights.hash


@pytest.mark.parametrize("rewind", [0, 3])
def test_divergence_is_the_last_ticket(rewind: int) -> None:
    tickets = _tickets(recipe=Recipe(lr=1e30, batch_size=8, epochs=40, rewind=rewind))
    assert [ticket.level for ticket in tickets] == [0]
    assert tickets[0].trained is not None
    assert tickets[0].trained.history.diverged_at is not None
    assert tickets[0].trained.history.test_accuracy is None


def test_layers_may_be_named_by_a_generator() -> None:
    """It can be read once, and what it names is pruned, left out and written down."""
    named = {"prune": ["*.weight"], "exclude": ["2"], "keep_dense": [], "shares": {"0": np.float32(1)}}
    once = {name: (each for each in layers) for name, layers in named.items() if name != "shares"}
    ticket = _tickets(levels=1, selection="shares", seed=np.int64(0), **named | once)[-1]
    assert list(ticket.mask) == ["0.weight"]
    written = json.loads(json.dumps(ticket.provenance))
    assert written | named == written


# Errors.


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"levels": -1}, "levels must be 0 or more, got -1"),
        ({"fraction": 1.0}, "fraction must lie between 0 and 1, both excluded, got 1.0"),
        ({"exclude": ["3"]}, "exclude: '3' is no prunable layer; choose from '0', '2'"),
        (
            {"recipe": Recipe(batch_size=8, epochs=1, rewind=4)},
            "recipe.rewind: iteration 4 is not within the training, which has 4",
        ),
        (
            {"levels": 40},
            "levels: 40 are too many, after level 17 only 2 of 108 connections are alive and a fraction of 0.2 of them "
            "is 0; at most 17 levels are possible",
        ),
    ],
    ids=["levels", "fraction", "exclude", "rewind", "too many levels"],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        _tickets(**changes)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("connections", "fraction", "levels", "text"),
    [
        (10, 0.0, 1, "fraction must lie between 0 and 1, both excluded, got 0.0"),
        (10, math.nan, 0, "fraction must lie between 0 and 1, both excluded, got nan"),
        (10, 0.2, -2, "levels must be 0 or more, got -2"),
        (10, 0.5, 4, "levels: 4 are too many, after level 3 only 1 of 10 connections are alive and a fraction of 0.5 "
                     "of them is 0; at most 3 levels are possible"),
        (10, 0.9, 2, "levels: 2 are too many, after level 1 only 1 of 10 connections are alive and a fraction of 0.9 "
                     "of them is 1; at most 1 level is possible"),
        (2, 0.2, 1, "levels: 1 are too many, after level 0 only 2 of 2 connections are alive and a fraction of 0.2 of "
                    "them is 0; at most 0 levels are possible"),
    ],
)  # fmt: skip
def test_levels_that_are_not_possible(connections: int, fraction: float, levels: int, text: str) -> None:
    with pytest.raises(UserError) as error:
        check_levels(connections, fraction, levels)
    assert str(error.value) == text


@settings(deadline=None, max_examples=60)
@given(connections=st.integers(1, 400), fraction=st.floats(0.01, 0.99), levels=st.integers(0, 30))
def test_levels_are_possible_where_each_round_removes_some_and_leaves_some(
    connections: int, fraction: float, levels: int
) -> None:
    weights = {"w": torch.arange(1.0, connections + 1)}
    masks = [Mask.from_tensors({"w": torch.ones(connections, dtype=torch.bool)})]
    for _ in range(levels):
        masks.append(prune(weights, masks[-1], magnitude, fraction))
    alive = [mask.alive for mask in masks]
    if all(after < before for before, after in itertools.pairwise(alive)) and alive[-1] > 0:
        check_levels(connections, fraction, levels)
    else:
        with pytest.raises(UserError, match=f"levels: {levels} are too many"):
            check_levels(connections, fraction, levels)


# Tickets in files and in models.


def _ticket(level: int = 2) -> Ticket:
    ticket = _tickets()[level]
    return Ticket(level, ticket.mask, ticket.rewind, ticket.trained, {"importance": "l1", "seeds": [0, 1]})


@pytest.mark.parametrize("trained", [False, True])
def test_a_ticket_comes_back_from_its_file(tmp_path: Path, trained: bool) -> None:
    ticket = _ticket()
    ticket.save(tmp_path / "t.safetensors", trained=trained)
    again = Ticket.load(tmp_path / "t.safetensors")
    assert again.level == 2
    assert again.mask == ticket.mask
    assert list(again.mask) == list(ticket.mask)
    assert again.provenance == {"importance": "l1", "seeds": [0, 1]}
    torch.testing.assert_close(again.rewound, ticket.rewound, rtol=0, atol=0)
    assert again.rewind.hash == state_hash(ticket.rewound)
    assert ticket.trained is not None
    if trained:
        assert again.trained is not None
        assert again.trained.history == ticket.trained.history
        assert again.trained.weights.hash == ticket.trained.weights.hash
    else:
        assert again.trained is None


def test_a_tickets_file_is_plain_safetensors(tmp_path: Path) -> None:
    ticket = _ticket()
    ticket.save(tmp_path / "t.safetensors", trained=True)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    with safetensors.safe_open(tmp_path / "t.safetensors", "pt") as file:
        about = json.loads(file.metadata()["tombola"])
        keys = list(file.keys())
        assert sorted(keys) == sorted(
            ["mask.0.weight", "mask.2.weight", *(f"{kind}.{name}" for kind in ("rewind", "trained") for name in names)]
        )
        alive = file.get_tensor("mask.0.weight")
        assert alive.dtype == torch.bool
        for kind in ("rewind", "trained"):
            assert (file.get_tensor(f"{kind}.0.weight")[~alive] == 0).all()
    assert about["level"] == 2
    assert about["history"]["test_accuracy"] == ticket.trained.history.test_accuracy  # type: ignore[union-attr]


def test_a_ticket_trains_on_after_its_file_and_a_model_as_before(tmp_path: Path) -> None:
    ticket = _ticket()
    ticket.save(tmp_path / "t.safetensors")
    again = Ticket.load(tmp_path / "t.safetensors")
    model = _network()
    again.apply(model)
    trained = train(model, model.state_dict(), again.mask, DATA, RECIPE, 0, begin=3)
    assert ticket.trained is not None
    assert trained.weights.hash == ticket.trained.weights.hash


def test_apply() -> None:
    ticket = _ticket()
    model = _network()
    ticket.apply(model)
    torch.testing.assert_close(dict(model.state_dict()), ticket.rewound, rtol=0, atol=0)
    ticket.apply(model, trained=True)
    assert ticket.trained is not None
    torch.testing.assert_close(dict(model.state_dict()), ticket.trained.weights.load(), rtol=0, atol=0)
    assert state_hash(ticket.rewind.load()) == ticket.rewind.hash, "the ticket is as it was"


class Tied(nn.Module):
    """Two layers with one weight, which a state holds twice and a mask once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_apply_prunes_a_weight_that_layers_share() -> None:
    mask = Mask.from_tensors({"first.weight": torch.eye(3, dtype=torch.bool)})
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    model = Tied()
    Ticket(0, mask, Weights.of(state), None).apply(model)
    assert (model.second.weight[~mask["first.weight"]] == 0).all()
    assert model.second.weight.diag().equal(state["first.weight"].diag())


def test_apply_to_another_network() -> None:
    ticket = _ticket()
    with pytest.raises(
        UserError, match=r"^the ticket does not fit .* '2.weight' of shape \(3, 12\), .* of shape \(4, 12\)"
    ):
        ticket.apply(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)))
    with pytest.raises(
        UserError, match=r"^the ticket does not fit the model: it lacks '3.weight', which the model has;"
    ):
        ticket.apply(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3), nn.Linear(3, 3)))


def test_apply_to_a_network_of_which_a_weight_cannot_be_written_to() -> None:
    ticket, model = _ticket(), _network()
    first, last = model.get_submodule("0"), model.get_submodule("2")
    last.weight = nn.Parameter(torch.zeros(1, 12).expand(3, 12))
    first.weight = nn.Parameter(torch.zeros(12, 6))
    with pytest.raises(UserError, match=r"^the model's '2.weight' cannot be written to: it was made in"):
        ticket.apply(model)
    assert not model.get_parameter("0.weight").any(), "nothing was changed"


def test_a_ticket_without_trained_weights(tmp_path: Path) -> None:
    ticket = _ticket()
    ticket.save(tmp_path / "t.safetensors")
    again = Ticket.load(tmp_path / "t.safetensors")
    for use in (partial(again.apply, _network(), trained=True), partial(again.save, tmp_path / "u", trained=True)):
        with pytest.raises(UserError, match="the ticket of level 2 has no trained weights"):
            use()
    assert not (tmp_path / "u").exists()


def _no_metadata(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, path)


def _no_mask(path: Path) -> None:
    about = {"level": 0, "layers": ["w"], "history": History().to_json(), "provenance": {}}
    safetensors.torch.save_file({"rewind.w": torch.ones(1)}, path, {"tombola": json.dumps(about)})


def _no_level(path: Path) -> None:
    about = {"layers": [], "history": History().to_json(), "provenance": {}}
    safetensors.torch.save_file({"rewind.w": torch.ones(1)}, path, {"tombola": json.dumps(about)})


def _nothing(path: Path) -> None:
    pass


def _something_else(path: Path) -> None:
    path.write_bytes(b"no ticket")


def _cut(path: Path) -> None:
    _ticket().save(path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("write", [_nothing, _something_else, _cut, _no_metadata, _no_mask, _no_level])
def test_a_file_that_is_no_ticket(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    with pytest.raises(UserError) as error:
        Ticket.load(path)
    assert str(error.value).startswith(f"{path}: cannot be read as a ticket that tombola saved: ")


def test_a_ticket_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "t.safetensors"
    with pytest.raises(UserError) as error:
        _ticket().save(path)
    assert str(error.value) == f"{path}: cannot be written: No such file or directory"


# Weights.


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2)},
        {"a": torch.zeros(3)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.zeros(2, dtype=torch.float64)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": -torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.zeros(0)},
        {},
    ],
)
def test_weights_are_named_by_their_content(other: State) -> None:
    assert state_hash(other) != state_hash({"a": torch.zeros(2)})


def test_the_name_of_weights() -> None:
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    reordered: Sequence[str] = ["c", "a", "b"]
    assert state_hash({name: state[name] for name in reordered}) == state_hash(state)
    assert state_hash({**state, "b": state["b"].T.contiguous().T}) == state_hash(state), "however it lies in memory"
    # Frozen: stored results are named by the weights that a training starts from.
    assert state_hash(state) == "ffae7c3d57040168c9fc9d0c27d0ab251fc010209ca495e6908fe6e4ae531a9b"

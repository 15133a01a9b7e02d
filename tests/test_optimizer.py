"""Optimizers: the bits of torch.optim's, whichever parameters have gradients, and going on from a copy.

`make test-torch` runs this file with the oldest and the newest torch that pyproject.toml allows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tombola import Recipe
from tombola.training.optimizer import Optimizer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
}
SHAPES = [(3, 4), (5,), (2, 3, 3, 3), (0, 2)]


def of_torch(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the public optimizer that a recipe names."""
    decay = recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, weight_decay=decay, fused=True)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.lr, weight_decay=decay, fused=True)
    momentum, nesterov = recipe.momentum, recipe.nesterov
    return torch.optim.SGD(parameters, recipe.lr, momentum, weight_decay=decay, nesterov=nesterov, fused=True)


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    made = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    made[2] = nn.Parameter(made[2].detach().to(memory_format=torch.channels_last))
    return made


Steps = list[tuple[float, set[int]]]
"""The learning rate of each step, and which parameters have a gradient."""


def compare(recipe: Recipe, steps: Steps, copied_at: int | None = None) -> None:
    """Assert that our steps have the bits of torch's, also where ours goes on from a copy of its state."""
    ours, theirs = parameters(), parameters()
    optimizer, reference = Optimizer(recipe, ours), of_torch(recipe, theirs)
    draw = torch.Generator().manual_seed(2)
    for number, (lr, having) in enumerate(steps):
        optimizer.zero_grad()
        reference.zero_grad()
        before = [parameter.detach().clone() for parameter in ours]
        for index in sorted(having):
            gradient = torch.randn(SHAPES[index], generator=draw)
            for each in (ours[index], theirs[index]):
                each.grad = torch.empty_like(each.detach()).copy_(gradient)
        if number == copied_at:
            optimizer = Optimizer(recipe, ours, optimizer.tensors())
        optimizer.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(one, other), (number, index)
            moved = bool(lr) and index in having and one.numel() > 0
            assert torch.equal(one, before[index]) != moved, (number, index)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("fields", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_first_and_later_steps_have_the_bits_of_torch(fields: dict[str, Any], decay: float) -> None:
    everything = set(range(len(SHAPES)))
    rates = [0.1, 0.1, 0.05, 0.01, 0.3, 0.2]
    compare(Recipe(epochs=1, weight_decay=decay, **fields), [(lr, everything) for lr in rates])


@settings(deadline=None)
@given(
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.tuples(st.floats(0.001, 1), st.sets(st.integers(0, len(SHAPES) - 1))), min_size=1, max_size=5),
    st.integers(0, 5),
)
def test_steps_have_the_bits_of_torch_whichever_parameters_have_gradients(
    name: str, decay: float, steps: Steps, copied_at: int
) -> None:
    recipe = Recipe(epochs=1, weight_decay=decay, **OPTIMIZERS[name])
    if recipe.momentum:  # torch's fused one begins with all parameters at once
        steps = [
            (lr, set(range(len(SHAPES))) - (without if number else set())) for number, (lr, without) in enumerate(steps)
        ]
    compare(recipe, steps, copied_at)


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_of_a_parameter_begins_with_its_first_gradient(name: str) -> None:
    recipe = Recipe(epochs=1, **OPTIMIZERS[name])
    late, alone = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    other = nn.Parameter(torch.ones(2))
    both, one = Optimizer(recipe, [other, late]), Optimizer(recipe, [alone])
    other.grad = torch.ones(2)
    both.step(0.1)
    for gradient in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])):
        late.grad, alone.grad = gradient.clone(), gradient.clone()
        both.step(0.1)
        one.step(0.1)
    assert torch.equal(late, alone)
    assert not torch.equal(late, other)


def test_its_state_is_copied() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Optimizer(Recipe(epochs=1, momentum=0.9), [weight])
    weight.grad = torch.ones(2)
    optimizer.step(0.1)
    state = optimizer.tensors()
    assert list(state) == ["0.momentum_buffer"]
    optimizer.step(0.1)
    assert state["0.momentum_buffer"].tolist() == [1.0, 1.0]
    assert optimizer.tensors()["0.momentum_buffer"].tolist() != [1.0, 1.0]

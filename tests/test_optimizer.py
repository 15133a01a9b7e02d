"""Optimizers: the bits of torch.optim's, whichever parameters have gradients, and going on from a copy."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tombola import Recipe
from tombola.training.optimizer import Optimizer

SHAPES = [(3, 4), (5,), (2, 3, 3, 3), (0, 2)]


def of_torch(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    momentum, nesterov = 0.0 if recipe.optimizer == "sgd" else recipe.momentum, recipe.optimizer == "nesterov"
    return torch.optim.SGD(
        parameters, recipe.lr, momentum, weight_decay=recipe.weight_decay, nesterov=nesterov, fused=True
    )


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    made = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    made[2] = nn.Parameter(made[2].detach().to(memory_format=torch.channels_last))
    return made


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.tuples(st.floats(0, 1), st.sets(st.integers(0, len(SHAPES) - 1))), min_size=1, max_size=5),
    st.integers(0, 5),
)
def test_it_steps_as_torch_does(name: Name, decay: float, steps: list[tuple[float, set[int]]], copied_at: int) -> None:
    """Also where some parameters have no gradient in some steps, and where it goes on from a copy of its tensors."""
    recipe = Recipe(epochs=1, optimizer=name, lr=0.1, weight_decay=decay)
    ours, theirs = parameters(), parameters()
    optimizer, reference = Optimizer(recipe, ours), of_torch(recipe, theirs)
    if name in ("momentum", "nesterov"):  # torch's fused one begins with all parameters at once
        steps = [
            (lr, set(range(len(SHAPES))) - (without if number else set())) for number, (lr, without) in enumerate(steps)
        ]
    draw = torch.Generator().manual_seed(2)
    for number, (lr, having) in enumerate(steps):
        optimizer.zero_grad()
        reference.zero_grad()
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
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_of_a_parameter_begins_with_its_first_gradient(name: Name) -> None:
    recipe = Recipe(epochs=1, optimizer=name, lr=0.1, momentum=0.5)
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


def test_what_it_keeps_is_copied() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Optimizer(Recipe(epochs=1, optimizer="momentum"), [weight])
    weight.grad = torch.ones(2)
    optimizer.step(0.1)
    kept = optimizer.tensors()
    assert list(kept) == ["0.momentum_buffer"]
    optimizer.step(0.1)
    assert kept["0.momentum_buffer"].tolist() == [1.0, 1.0]
    assert optimizer.tensors()["0.momentum_buffer"].tolist() != [1.0, 1.0]

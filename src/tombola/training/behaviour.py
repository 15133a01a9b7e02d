"""Behaviour: what a network and a loss compute on a few examples, so that a change of them is noticed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from tombola.datasets.dataset import Dataset
from tombola.inputs import Forward, OwnStep, Tensors, call, convert, select
from tombola.streams import ambient
from tombola.training.batches import normalisation
from tombola.training.evaluation import Loss
from tombola.training.own_optimizer import OwnOptimizer
from tombola.training.recipe import Recipe
from tombola.training.trial import check_dense, guard, spread

EXAMPLES = 8
"""The number of training examples on which a network is observed."""

NUMBERS = 32
"""The most numbers of a tensor that are kept."""

TOLERANCE = 1e-4
"""The largest difference, relative to the largest number beside it, that kinds of machines and versions of torch may
make. It is a thousand times the precision of float32, because a network passes rounding errors on."""

Behaviour: TypeAlias = tuple[tuple[float | None, ...], ...]
"""Some numbers of each tensor that was computed; None stands for a number that is not finite."""


def observe(
    build: Callable[[], nn.Module],
    loss: Loss,
    data: Dataset,
    *,
    forward: Forward = call,
    step: OwnStep | None = None,
    names: Mapping[str, str] | None = None,
) -> Behaviour:
    """Return what a network computes with the weights that it is built with, from the same random numbers each time.

    The network sees the first training examples: once as in evaluation, and once as in training, where dropout and
    batch norm show. The loss of the second outputs is the last tensor; with a step of the user, its loss is.

    Args:
        build: a function that builds the network.
        loss: a function of outputs and labels that returns the mean over the batch.
        data: the data set.
        forward: a function (model, inputs) -> outputs.
        step: a function (model, inputs, labels) -> loss, instead of `forward` and `loss`; None for these.
        names: what messages call the `model`, the `loss`, the `forward` and the `step`; by default so.

    Raises:
        UserError: if the network or the loss fails.

    >>> from tombola import datasets
    >>> from torch.nn import functional
    >>> network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> digits = datasets.load("digits", None)
    >>> len(observe(network, functional.cross_entropy, digits))
    3
    """
    called = {part: (names or {}).get(part, part) for part in ("model", "loss", "forward", "step")}
    outputs_of = called["model" if forward is call else "forward"]
    normalise = normalisation(data)

    def copy_few(tensors: Tensors) -> Tensors:  # what a user's code may change in place
        return convert(torch.clone, select(tensors, slice(EXAMPLES)))

    with ambient(0), torch.no_grad():
        model = build()
        few = partial(forward, model.eval(), normalise(copy_few(data.train_inputs)))
        outputs = guard(outputs_of, few, Tensor, "a tensor")()
        check_dense(outputs, outputs_of)
        seen = [outputs.clone()]  # a network may write later outputs into the same tensor
        inputs, labels = normalise(copy_few(data.train_inputs)), copy_few(data.train_labels)
        if step is None:
            seen.append(guard(outputs_of, partial(forward, model.train(), inputs), Tensor, "a tensor")())
            seen.append(guard(called["loss"], partial(loss, seen[-1], labels))())
        else:
            with torch.enable_grad():  # a step may need derivatives
                seen.append(guard(called["step"], partial(step, model.train(), inputs, labels))())
    return tuple(_sample(tensor) for part in seen for tensor in _tensors(part))


def observe_recipe(recipe: Recipe, functions: Mapping[str, Callable[..., Any]]) -> Behaviour:
    """Return what the user's own functions of a recipe compute: factors of a schedule, steps of an optimizer.

    Args:
        recipe: the recipe.
        functions: its own `optimizer` and `schedule`, if it names some, see `tombola.study.task.load_recipe`.

    Raises:
        UserError: if a function fails.

    >>> observe_recipe(Recipe(epochs=1), {})
    ()
    """
    found: list[Tensor] = []
    if (schedule := functions.get("schedule")) is not None:
        least = -sys.float_info.max  # a schedule may give any number where its warm-up is longer than 100 iterations
        factors = [recipe.own_factor(schedule, iteration, 100, least) for iteration in (0, 1, 25, 50, 99)]
        found.append(torch.tensor(factors))
    if (optimizer := functions.get("optimizer")) is not None:
        weight = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        updater = OwnOptimizer(optimizer, recipe.lr, [weight], name="recipe.optimizer")
        for _ in range(2):
            weight.grad = torch.linspace(1, 2, 6).reshape(2, 3)
            updater.step(recipe.lr)
            found.append(weight.detach().clone())
    return tuple(map(_sample, found))


def agree(one: Behaviour, other: Behaviour) -> bool:
    """Return whether two behaviours are equal within `TOLERANCE`.

    >>> agree(((1.0, 100.0),), ((1.001, 100.0),)), agree(((1.0, 100.0),), ((1.1, 100.0),))
    (True, False)
    """
    return len(one) == len(other) and all(_agree(*pair) for pair in zip(one, other, strict=True))


def _agree(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    if len(one) != len(other) or [number is None for number in one] != [number is None for number in other]:
        return False
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    scale = max((max(abs(a), abs(b)) for a, b in pairs), default=0.0)
    return all(abs(a - b) <= TOLERANCE * scale for a, b in pairs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in trees.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _sample(tensor: Tensor) -> tuple[float | None, ...]:
    """Return some numbers of a tensor at equal distances, and before them the root of the mean square of all."""
    flat = tensor.detach().flatten()
    chosen = flat[spread(len(flat), NUMBERS)].double()
    square = flat.to(torch.promote_types(flat.dtype, torch.float32)).abs().square().mean(dtype=torch.float64)
    numbers = [float(square.sqrt()), *chosen.tolist()] if len(flat) else []
    return tuple(number if math.isfinite(number) else None for number in numbers)

"""Trainings and pruned masks by name: each is named by the hash of all that decides its bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tombola.pruning.mask import Mask
from tombola.store.names import name_of
from tombola.training.recipe import Recipe
from tombola.training.weights import Weights

SCHEME = 2
"""Version of how trainings are named and done: to be raised where `train` comes to give other bits."""

PRUNING = 1
"""Version of `prune` and the built-in importances: to be raised where they come to give other masks."""

THREADS = 1
"""Threads of a training: a part of its name, since they decide the order of sums."""


@dataclass(frozen=True)
class Training:
    """One training: its name and its arguments.

    Args:
        key: SHA-256 of the identity.
        identity: all that decides the bits of its result, as JSON's types.
        initial: the weights it starts from.
        mask: the connections that are alive.
        seed: of data order and every other random choice.
        begin, end: its iterations are begin..end-1.
    """

    key: str
    identity: dict[str, Any]
    initial: Weights
    mask: Mask
    seed: int
    begin: int
    end: int


def name_training(
    problem: Mapping[str, Any],
    recipe: Recipe,
    initial: Weights,
    mask: Mask,
    *,
    seed: int,
    begin: int,
    end: int,
    device: str,
    sparse: Sequence[str],
) -> Training:
    """Return the training with these arguments, with its name.

    Args:
        problem: the identity of data set, model and loss, see `tombola.study.task.Problem`.
        recipe: how to train.
        initial: the weights it starts from.
        mask: the connections that are alive.
        seed: of data order and every other random choice.
        begin, end: its iterations are begin..end-1.
        device: "cpu" or "cuda".
        sparse: the weights that are trained by sparse kernels, see `tombola.kernels.sparse_layers`.

    >>> import torch
    >>> mask = Mask.from_tensors({"w": torch.tensor([True])})
    >>> arguments = {"seed": 0, "begin": 0, "end": 9, "device": "cpu", "sparse": []}
    >>> name_training({}, Recipe(epochs=1), Weights("0" * 64, dict), mask, **arguments).identity["end"]
    9
    """
    identity = {
        "scheme": SCHEME,
        **problem,
        "recipe": recipe.identity(),
        "seed": seed,
        "initial": initial.hash,
        "mask": mask.hash,
        "begin": begin,
        "end": end,
        "threads": THREADS,
        "device": device,
        "sparse": list(sparse),
    }
    return Training(name_of(identity), identity, initial, mask, seed, begin, end)


def name_mask(weights: Weights, mask: Mask, level: int, *, importance: str, fraction: float, seed: int) -> str:
    """Return the name of the mask that a round of pruning by a built-in importance gives.

    Args:
        weights: the trained weights of `level`.
        mask: their mask.
        level: the level that is pruned.
        importance: the name of the importance.
        fraction: of the connections alive that the round removes, in (0, 1).
        seed: of the importance's random numbers.
    """
    return name_of([PRUNING, weights.hash, mask.hash, importance, fraction, seed, level])

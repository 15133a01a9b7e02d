"""Names of trainings and of pruned masks: each name is the hash of everything that determines the bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tombola.pruning.mask import Mask
from tombola.store.names import name_of
from tombola.training.behaviour import Behaviour
from tombola.training.recipe import Recipe
from tombola.training.weights import Weights

SCHEME = 2
"""Version of the naming and of `train`: increase it if `train` gives other bits than before."""

PACKED = 4
"""Version of the computation with packed activations: increase it if these trainings alone give other bits."""

PERCEPTRON = 1
"""Version of the computation of `tombola.kernels.Perceptron`: increase it if these trainings alone give other bits."""

PRUNING = 1
"""Version of `prune`, its scores and normalisations: increase it if they give other masks than before."""

THREADS = 1
"""Number of threads of a training. It is a part of the name, because it determines the order of summation."""


@dataclass(frozen=True)
class Training:
    """One training: its name and its arguments.

    Args:
        key: the SHA-256 of the identity, as 64 hexadecimal digits.
        identity: a document of JSON types with everything that determines the bits of the result.
        initial: the weights at the start.
        mask: the connections that are alive.
        seed: the seed of the data order and of every other random choice.
        begin, end: the range of iterations, begin..end-1.
        behaviour: what the network computes on a few examples, which workers compare; it is not a part of the name.
    """

    key: str
    identity: dict[str, Any]
    initial: Weights
    mask: Mask
    seed: int
    begin: int
    end: int
    behaviour: Behaviour = ()


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
    packed: bool = False,
    perceptron: bool = False,
    positions: bool = False,
    sources: Mapping[str, str] | None = None,
    behaviour: Behaviour = (),
) -> Training:
    """Return the training that has these arguments, with its name.

    Args:
        problem: the identity of data set, model and loss, see `tombola.study.task.Problem`.
        recipe: the hyperparameters of the training.
        initial: the weights at the start.
        mask: the connections that are alive.
        seed: the seed of the data order and of every other random choice.
        begin, end: the range of iterations, begin..end-1.
        device: the device to train on, "cpu" or "cuda".
        sparse: the names of the weights that sparse kernels train, see `tombola.kernels.sparse_layers`.
        packed: whether activations stay packed between sparse convolutions, see `tombola.kernels.are_packed`.
        perceptron: whether the network may be trained as a perceptron, see `tombola.kernels.find_perceptron`.
        positions: whether batches count by positions, see `tombola.training.accumulation.counts_positions`.
        sources: the hashes of the source of the recipe's own functions, see `tombola.study.task.load_recipe`.
        behaviour: what the network computes on a few examples, which workers compare.

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
    if packed:
        identity["packed"] = PACKED
    if perceptron:
        identity["perceptron"] = PERCEPTRON
    if positions:
        identity["positions"] = True
    if sources:
        identity["sources"] = dict(sources)
    return Training(name_of(identity), identity, initial, mask, seed, begin, end, behaviour)


@dataclass(frozen=True)
class Round:
    """One round of pruning: the name of the mask that results from it, and its arguments.

    Args:
        key: the SHA-256 of everything that determines the mask, as 64 hexadecimal digits.
        weights: the weights to score.
        rewind: the weights of the rewind point.
        mask: the mask of the ticket that is pruned.
        level: the level of this ticket.
        importance: the name of the importance.
        seed: the seed of the random numbers of this round and of all others.
        fraction: the fraction of the alive connections that the round removes, in (0, 1).
        others: what determines the mask besides, see `name_mask`.
        behaviour: what the network computes on a few examples, for a score of the whole network, see `Training`.
    """

    key: str
    weights: Weights
    rewind: Weights
    mask: Mask
    level: int
    importance: str
    seed: int
    fraction: float
    others: Mapping[str, Any] = field(default_factory=dict)
    behaviour: Behaviour = ()


def name_mask(
    weights: Weights,
    mask: Mask,
    level: int,
    *,
    importance: str,
    fraction: float,
    seed: int,
    kept_dense: Collection[str] = (),
    others: Mapping[str, Any] | None = None,
) -> str:
    """Return the name of the mask that results from a round of pruning.

    Args:
        weights: the weights that are scored.
        mask: the mask of the ticket at `level`.
        level: the level whose ticket is pruned.
        importance: the name of the importance.
        fraction: the fraction of the alive connections that the round removes, in (0, 1).
        seed: the seed of the random numbers that the importance draws.
        kept_dense: the layers that the round does not prune, by parameter name.
        others: everything else that determines the mask, for importances and selections other than the paper's.
    """
    identity = [PRUNING, weights.hash, mask.hash, importance, fraction, seed, level]
    identity += [sorted(kept_dense)] if kept_dense else []
    return name_of([*identity, others] if others else identity)

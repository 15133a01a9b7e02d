"""Behaviour: notice that a network with the same source computes something else than when its results were stored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tombola.errors import UserError
from tombola.store.names import name_of
from tombola.store.store import Store
from tombola.study.task import Problem, load_recipe
from tombola.training.behaviour import Behaviour, agree, observe_recipe
from tombola.training.recipe import Recipe
from tombola.training.weights import state_hash


class StaleResultsWarning(UserWarning):
    """A network computes something else than when results were stored under the name of its source."""


@dataclass(frozen=True)
class Observed:
    """What the code of a study computes, and the name under which a store keeps it.

    Args:
        name: the hash of what identifies the code, and of the weights with which the network was observed.
        identity: what identifies data, network and loss, see `tombola.study.task.Problem`.
        computes: what the network, the loss, and the recipe's own functions compute on a few examples.
    """

    name: str
    identity: Mapping[str, Any]
    computes: Behaviour


def observe_study(problem: Problem, model: nn.Module, recipe: Recipe) -> Observed:
    """Observe what the code of a study computes.

    Args:
        problem: the data set, model and loss.
        model: the network as `problem.build` returns it after `ambient(0)`.
        recipe: the hyperparameters, which may name functions of the user.

    Raises:
        UserError: if code of the user fails.
    """
    functions, sources = load_recipe(recipe)
    state = model.state_dict() if problem.checkpoint is None else problem.checkpoint
    own = [sources, recipe.identity()] if sources else []
    name = name_of(["behaviour", dict(problem.identity), state_hash(state), *own])
    return Observed(name, problem.identity, problem.behaviour + observe_recipe(recipe, functions))


def identify(observed: Observed, store: Store) -> Mapping[str, Any]:
    """Return what identifies data, network and loss in the names of trainings.

    It is the problem's identity. If the store has results of a network of the same identity that computes something
    else on the same examples, `behaviour` is added: the number under which the store knows this behaviour, or that it
    will get. Behaviours are compared within the tolerance of float32, because the bits differ between processors. A
    store that knows no behaviour yet was made by an earlier version, and its results are taken as they are.

    Raises:
        UserError: if a behaviour in the store is damaged, and none of the others is this one.

    Warns:
        StaleResultsWarning: if the store knows other behaviours of this network, and not this one.
    """
    known = store.behaviours.all(observed.name)
    number = 0
    if known:
        found = [n for n, numbers in known.items() if numbers is not None and agree(numbers, observed.computes)]
        number = found[0] if found else max(known) + 1
        if not found:
            if None in known.values():
                raise UserError(
                    f"store {store.root}: what the network of this study computed is damaged, so that it is not known "
                    f"whether its results are still valid; restore behaviours/{observed.name[:12]}..., or remove it to "
                    f"take the results as they are"
                )
            model_name, loss_name = (observed.identity[part]["name"] for part in ("model", "loss"))
            warnings.warn(
                f"task.model {model_name!r} or task.loss {loss_name!r} computes something else than when results of "
                f"this study were stored, with the same source: a file, an environment variable or a package that it "
                f"uses has changed. Those results are not used. Name what it uses in task.depends",
                StaleResultsWarning,
                stacklevel=2,
            )
    return {**observed.identity, "behaviour": number} if number else observed.identity


def keep_behaviour(observed: Observed, store: Store, identity: Mapping[str, Any]) -> bool:
    """Store what the code of a study computes, before results of it are stored.

    Args:
        observed, store: see `identify`.
        identity: what `identify` returned.

    Returns:
        Whether the identity still holds: another run may have stored another behaviour under the same number.
    """
    number = identity.get("behaviour", 0)
    known = store.behaviours.all(observed.name).get(number)
    if known is not None:
        return agree(known, observed.computes)
    return store.behaviours.add(observed.name, number, observed.computes)

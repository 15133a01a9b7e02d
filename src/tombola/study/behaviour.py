"""Results of a network that computes something else by now, although its source is the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from tombola.store.names import name_of
from tombola.store.store import Store
from tombola.study.task import Problem
from tombola.training.behaviour import agree
from tombola.training.weights import state_hash


class StaleResultsWarning(UserWarning):
    """A network computes something else than when results were stored under the name of its source."""


def name_network(problem: Problem, model: nn.Module) -> str:
    """Return the name under which a store keeps what a network computes.

    Args:
        problem: the data set, model and loss.
        model: the network as `problem.build` returns it after `ambient(0)`.
    """
    return name_of(["behaviour", dict(problem.identity), state_hash(model.state_dict())])


def identify(problem: Problem, model: nn.Module, store: Store) -> Mapping[str, Any]:
    """Return what identifies data, network and loss in the names of trainings.

    It is the problem's identity. If the store has results of a network of the same identity that computes something
    else on the same examples, `behaviour` is added: the number under which the store knows this behaviour, or that it
    will get. Behaviours are compared within the tolerance of float32, because the bits differ between processors. A
    store that knows no behaviour yet was made by an earlier version, and its results are taken as they are.

    Warns:
        StaleResultsWarning: if the store knows other behaviours of this network, and not this one.
    """
    known = store.behaviours.all(name_network(problem, model))
    number = 0
    if known:
        found = [n for n, numbers in known.items() if numbers is not None and agree(numbers, problem.behaviour)]
        number = found[0] if found else max(known) + 1
        if not found:
            model_name, loss_name = (problem.identity[part]["name"] for part in ("model", "loss"))
            warnings.warn(
                f"task.model {model_name!r} or task.loss {loss_name!r} computes something else than when results of "
                f"this study were stored, with the same source: a file, an environment variable or a package that it "
                f"uses has changed. Those results are not used. Name what it uses in task.depends",
                StaleResultsWarning,
                stacklevel=2,
            )
    return {**problem.identity, "behaviour": number} if number else problem.identity


def keep_behaviour(problem: Problem, model: nn.Module, store: Store, identity: Mapping[str, Any]) -> bool:
    """Store what a network computes, before results of it are stored.

    Args:
        problem, model, store: see `identify`.
        identity: what `identify` returned.

    Returns:
        Whether the identity still holds: another run may have stored another behaviour under the same number.
    """
    name, number = name_network(problem, model), identity.get("behaviour", 0)
    known = store.behaviours.all(name).get(number)
    if known is not None:
        return agree(known, problem.behaviour)
    return store.behaviours.add(name, number, problem.behaviour)

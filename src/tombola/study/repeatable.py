"""Repeatability: find out before a run whether the user's own code gives the same each time that it is called.

A training is named by its arguments. If these are drawn anew each time, no stored result is ever found again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from tombola.errors import UserError
from tombola.exits import attribute_failure
from tombola.importance import NetworkScore, is_built_in
from tombola.inputs import convert, select
from tombola.store.names import name_of
from tombola.streams import ambient
from tombola.study.planner import Planner
from tombola.study.rounds import compute_mask
from tombola.study.schema import Task
from tombola.study.task import Problem, load_data, load_recipe, resolve_importance
from tombola.training.batches import normalisation
from tombola.training.scoring import TRIED
from tombola.training.weights import state_hash


def check_repeatable(planner: Planner, device: str | None = None) -> None:
    """Compute everything twice that the user's own functions give, and compare the bits.

    The data set is loaded a second time; the model is initialised, and applied to a few examples, twice with the same
    seed; the importances prune the initial network twice. Nothing of this is done for built-in functions, except that
    scores of the whole network prune once, on a few examples, to find out whether they can rate this network.

    Args:
        planner: the planner of the study.
        device: the device to compute scores on; by default that of the study.

    Raises:
        UserError: if a function gives something else the second time; the message names it.
    """
    problem, task = planner.problem, planner.study.task
    if ":" in task.dataset and load_data(task).fingerprint != problem.data.fingerprint:
        raise UserError(
            f"task.dataset {task.dataset!r}: {_ELSE.format('data')} in two calls; draw random numbers with a fixed seed"
        )
    if any(":" in (name or "") for name in (task.model, task.loss, task.forward, task.step)):
        for one, other in zip_longest(_compute(problem, task), _compute(problem, task)):
            if one != other:
                raise UserError((one or other)[0])
        if ":" in task.model:
            _check_state(problem, task)
    study = planner.study
    if (schedule := load_recipe(study.recipe)[0].get("schedule")) is not None:
        for iteration in range(0, planner.end, max(1, planner.end // _ASKED)):
            if schedule(iteration, planner.end) != schedule(iteration, planner.end):
                raise UserError(f"recipe.schedule {study.recipe.schedule!r}: {_ELSE.format('factors')} in two calls")
    few = study.model_copy(
        update={"score_examples": min(TRIED, study.score_examples), "device": device or study.device}
    )
    for name in planner.study.importances:
        importance, own = resolve_importance(name), not is_built_in(name)
        if own or isinstance(importance.score, NetworkScore):
            again = partial(compute_mask, planner.first_round(name), problem, few, planner.rule, importance)
            mask = again()
            if own and again() != mask:
                raise UserError(
                    f"importance {name!r}: {_ELSE.format('scores')} in two calls; draw random numbers from the "
                    "generator that it is given"
                )


_ASKED = 50  # iterations of which a schedule is asked twice

_ELSE = "it gives different {}"
_DRAW = "in two calls with the same seed; draw random numbers only from torch's global generator"


def _compute(problem: Problem, task: Task) -> Iterator[tuple[str, str]]:
    """Yield the hash of each tensor that model and loss give, after the message for the case that it differs."""
    model_gives = f"task.model {task.model!r}: {_ELSE} {_DRAW}"
    data, two = problem.data, slice(2)
    few = normalisation(data)(convert(torch.clone, select(data.test_inputs, two)))
    labels = select(data.test_labels, two)
    with ambient(0):
        model = problem.build()
        yield model_gives.format("orders of parameters"), name_of([name for name, _ in model.named_parameters()])
        for name, tensor in model.state_dict().items():
            yield model_gives.format(f"initial values of {name!r}"), state_hash({"": tensor})
        with torch.no_grad():
            outputs = problem.forward(model.eval(), few)
        gives = model_gives if task.forward is None else f"task.forward {task.forward!r}: {_ELSE} {_DRAW}"
        yield gives.format("outputs"), state_hash({"": outputs})
        with torch.no_grad():
            loss = problem.loss(outputs, convert(torch.clone, labels))
        yield f"task.loss {task.loss!r}: {_ELSE.format('values')} {_DRAW}", state_hash({"": loss})
        if problem.step is None:
            with ambient(0):
                outputs = problem.forward(model.train(), few).detach()
            yield gives.format("outputs in training"), state_hash({"": outputs})
        else:
            with ambient(0):
                loss = problem.step(model.train(), few, convert(torch.clone, labels)).detach()
            yield f"task.step {task.step!r}: {_ELSE.format('losses')} {_DRAW}", state_hash({"": loss})


def _check_state(problem: Problem, task: Task) -> None:
    """Raise `UserError` if a network that has been applied differs from a new one with the same parameters and buffers.

    Two networks that share a weight are refused too: all seeds would begin with what was trained before. Only
    parameters and buffers are stored: with anything else that a network keeps, a resumed training would have other
    bits, and analyses would apply another network than the one that was trained.
    """
    few = normalisation(problem.data)(convert(torch.clone, select(problem.data.train_inputs, slice(2))))
    labels = select(problem.data.train_labels, slice(2))

    def train(model: nn.Module) -> Tensor:
        model.train()
        if problem.step is not None:
            return problem.step(model, convert(torch.clone, few), convert(torch.clone, labels)).detach()
        return problem.forward(model, convert(torch.clone, few)).detach()

    with ambient(0):
        used, new = problem.build(), problem.build()
        weights = {id(weight) for weight in used.parameters() if weight.requires_grad}
        for name, weight in new.named_parameters():
            if id(weight) in weights:
                raise UserError(
                    f"task.model {task.model!r}: it gives the same {name!r} each time; build a new model in each call"
                )
        for _ in range(2):
            train(used)
        with attribute_failure(f"task.model {task.model!r}: a new one that gets its state by load_state_dict"):
            new.load_state_dict({name: tensor.clone() for name, tensor in used.state_dict().items()})
        outputs = []
        for model in (used, new):
            with ambient(0):
                outputs.append((train(model), problem.forward(model.eval(), convert(torch.clone, few)).detach()))
    if any(state_hash({"": one}) != state_hash({"": other}) for one, other in zip(*outputs, strict=True)):
        raise UserError(
            f"task.model {task.model!r}: its outputs depend on something that it keeps from one batch to the next "
            "outside its parameters and buffers, which are all that is stored; keep it in a buffer (register_buffer, "
            "persistent)"
        )

"""The tickets of one network, found in Python: Algorithm 2 with the trainings and the rounds of this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal

from torch import nn
from torch.nn import functional

from tombola.datasets.dataset import Dataset
from tombola.datasets.progress import Bar
from tombola.errors import (
    UserError,
    as_list,
    as_texts,
    expect,
    expect_flags,
    expect_functions,
    expect_functions_or_none,
    expect_whole,
)
from tombola.importance import Importance, Normalisation, as_importance
from tombola.inputs import Forward, OwnStep, call
from tombola.lottery.rewinding import ScoreAt, lottery_ticket_rewinding
from tombola.lottery.rule import Rule, check_rule, check_score_at, prune_round, pruning_seed, resolve_shares
from tombola.lottery.ticket import Ticket
from tombola.pruning.eligible import list_shared, prunable
from tombola.pruning.mask import Mask, resolve_kept_dense
from tombola.pruning.start import check_registered, check_start
from tombola.training.evaluation import Loss
from tombola.training.history import Checkpoint, Trained
from tombola.training.loss_functions import find_loss
from tombola.training.metrics import ACCURACY, Metric, load_metric
from tombola.training.own_optimizer import MakeOptimizer
from tombola.training.recipe import Recipe, Schedule
from tombola.training.replaceable import OwnLayersWarning, find_fault, read_kernels
from tombola.training.scoring import EXAMPLES, TRIED, score_network
from tombola.training.stretches import LONGEST
from tombola.training.train import check_device, check_own_functions, check_recipe_fits, train
from tombola.training.trial import try_network
from tombola.training.weights import Weights, copy_model


@dataclass(frozen=True)
class _Setting:
    """What all trainings and all rounds of `find_tickets` have in common; its arguments, with names looked up."""

    model: nn.Module
    data: Dataset
    recipe: Recipe
    importance: Importance
    rule: Rule
    dense: Mask
    seed: int
    score_examples: int
    loss: Loss
    forward: Forward
    step: OwnStep | None
    optimizer: MakeOptimizer | None
    schedule: Schedule | None
    metrics: tuple[Metric, ...]
    device: str


def find_tickets(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    importance: Importance | Normalisation,
    *,
    levels: int,
    fraction: float = 0.2,
    seed: int = 0,
    prune: Sequence[str] = (),
    exclude: Collection[str] = (),
    keep_dense: Collection[str] = (),
    selection: str = "global",
    shares: Mapping[str, float] | None = None,
    score_at: ScoreAt = "end",
    score_examples: int = EXAMPLES,
    loss: Loss | str = functional.cross_entropy,
    forward: Forward = call,
    step: OwnStep | None = None,
    optimizer: MakeOptimizer | None = None,
    schedule: Schedule | None = None,
    metrics: Sequence[Metric | str | Callable[..., Any]] = (ACCURACY,),
    device: str = "cpu",
    kernels: Literal["auto", "off"] = "auto",
    progress: bool = True,
) -> Iterator[Ticket]:
    """Find the tickets of a network: return an iterator that yields the ticket of each level as soon as it is trained.

    The network, the loss and the importance are tried out at once, before anything is trained.

    Args:
        model: a module with its initial weights; it is not changed.
        data: the data set to train and test on.
        recipe: the hyperparameters of the training.
        importance: the importance that decides which connections are pruned, see `tombola.importance`.
        levels: the number of rounds of pruning.
        fraction: the fraction of the alive connections that each round removes, in (0, 1).
        seed: the seed of the data order, the augmentation and every other random choice.
        prune: patterns of the parameters that are prunable, see `tombola.prunable`.
        exclude: layers that are left out: they are neither pruned nor counted, such as `["fc"]`.
        keep_dense: layers that are counted and never pruned.
        selection: how many connections each layer loses: `global`, `uniform`, `erk` or `shares`, see
            `tombola.pruning.selection.apportion`.
        shares: the shares of layers for the selection `shares`, by layer or parameter name.
        score_at: the weights that are scored: those at the end of the training, or those of the rewind point.
        score_examples: the number of training examples that a score with data sees, such as `taylor`.
        loss: a function of outputs and labels that returns the mean over the batch, or the name of a built-in loss.
        forward: a function (model, inputs) -> outputs; by default the model is called, see `tombola.inputs.call`.
        step: a function (model, inputs, labels) -> loss, which training uses instead of `forward` and `loss`.
        optimizer, schedule: the functions that the recipe names, if it names some of the user (`module:function`); by
            default they are found by their names.
        metrics: the metrics of each trained ticket: names such as "r2", or functions of outputs and targets, see
            `tombola.training.metrics.as_metric`.
        device: the device to train on, "cpu" or "cuda".
        kernels: whether layers that are faster sparse are replaced on the CPU: "auto" unless the network reaches into
            its own layers, or "off" for none, see `tombola.train`.
        progress: whether to show a bar for each training, if standard error is a terminal.

    Raises:
        UserError: if the arguments do not fit together, or if the network, the loss or the importance fails.

    Warns:
        OwnLayersWarning: if the network reaches into its own layers, so that none is replaced.

    >>> from tombola import datasets, models
    >>> from tombola.importance import l1
    >>> digits = datasets.load("digits", None)
    >>> for ticket in find_tickets(models.lenet_300_100(inputs=64), digits, Recipe(epochs=1), l1, levels=2):
    ...     print(ticket.level, round(ticket.mask.density, 3), ticket.provenance["importance"])
    0 1.0 l1
    1 0.8 l1
    2 0.64 l1
    """
    _check_types(model, data, recipe, levels, seed)
    expect_whole(score_examples, "score_examples", 1)
    expect_flags(progress=progress)
    importance, loss = as_importance(importance), find_loss(loss) if isinstance(loss, str) else loss
    expect_functions(loss=loss, forward=forward)
    expect_functions_or_none(step=step, optimizer=optimizer, schedule=schedule)
    measured = tuple(map(load_metric, as_list(metrics, "metrics", "names of metrics or functions")))
    check_score_at(score_at, importance, recipe.rewind_to)
    check_recipe_fits(recipe, data)
    check_own_functions(recipe, optimizer=optimizer, schedule=schedule)
    optimizer, schedule = optimizer or recipe.load_own("optimizer"), schedule or recipe.load_own("schedule")
    check_device(device)
    expect(kernels, str, "kernels", "'auto' or 'off'")
    read_kernels(kernels)
    exclude = as_texts(exclude, "exclude", "names of layers")
    keep_dense = as_texts(keep_dense, "keep_dense", "names of layers")
    prune = as_texts(prune, "prune", "patterns")
    shares = {} if shares is None else shares

    check_registered(model, "model")
    dense = Mask.ones_like(model, exclude, prune)
    check_start(model, dense, prune, "model")
    shared = list_shared(model)
    kept = resolve_kept_dense(dense, keep_dense, prunable(model, prune).keys() - dense.keys(), shared)
    rule = Rule(fraction, kept, selection, resolve_shares(dense, shares))
    check_rule(rule, dense, levels)
    setting = _Setting(
        model=model, data=data, recipe=recipe, importance=importance, rule=rule, dense=dense, seed=seed,
        score_examples=score_examples, loss=loss, forward=forward, step=step, optimizer=optimizer, schedule=schedule,
        metrics=measured, device=device,
    )  # fmt: skip
    theta_0 = Weights.of(model.state_dict())
    kernels = "off" if step is not None else kernels
    _try_training(setting)
    replaceable = _list_replaceable(setting, kernels)
    if levels:
        _prune_network(setting, theta_0, dense, 0, theta_0, examples=min(TRIED, score_examples))
    provenance = _describe(setting) | {
        "prune": prune,
        "exclude": exclude,
        "keep_dense": keep_dense,
        "selection": selection,
        "shares": {name: share if isinstance(share, int) else float(share) for name, share in shares.items()},
        "score_at": score_at,
        "device": device,
        "kernels": kernels,
    }
    tickets = lottery_ticket_rewinding(
        partial(_train_network, setting, replaceable, progress),
        partial(_prune_network, setting),
        theta_0,
        dense,
        rewind=recipe.rewind,
        end=recipe.total_iterations(data.train_examples),
        levels=levels,
        score_at=score_at,
        rewind_to=recipe.rewind_to,
    )
    shared = {name: others for name, others in shared.items() if name in dense}
    return (replace(ticket, provenance=provenance, shared=shared) for ticket in tickets)


def _check_types(model: object, data: object, recipe: object, levels: object, seed: object) -> None:
    """Raise `UserError` unless these arguments of `find_tickets` have the types that it takes."""
    if not isinstance(model, nn.Module) or not isinstance(data, Dataset):
        raise UserError(
            f"find_tickets: expected a torch module and a tombola.Dataset, got {type(model).__name__} and "
            f"{type(data).__name__}"
        )
    expect(recipe, Recipe, "recipe", "a tombola.Recipe")
    expect(levels, Integral, "levels", "a whole number")
    expect(seed, Integral, "seed", "a whole number")


def _describe(setting: _Setting) -> dict[str, Any]:
    """Return what decides the trainings, as the provenance of a ticket has it."""
    return {
        "model": type(setting.model).__name__,
        "data": {"name": setting.data.name, "fingerprint": setting.data.fingerprint},
        "recipe": setting.recipe.model_dump(mode="json"),
        "importance": setting.importance.name,
        "fraction": float(setting.rule.fraction),
        "seed": int(setting.seed),
    }


def _try_training(setting: _Setting) -> None:
    """Raise `UserError` if the network, the loss, the metrics and the data set do not work together."""
    try_network(
        partial(copy_model, setting.model),
        setting.loss,
        setting.data,
        setting.recipe,
        setting.metrics,
        forward=setting.forward,
        step=setting.step,
        optimizer=setting.optimizer,
        schedule=setting.schedule,
        dense=setting.dense,
    )


def _list_replaceable(setting: _Setting, kernels: str) -> list[str]:
    """Return the weights whose layers may be replaced by sparse ones: all, or none.

    Warns:
        OwnLayersWarning: in the name of the caller of `find_tickets`, if the network reaches into its own layers.
    """
    if kernels == "off":
        return []
    fault = find_fault(
        setting.model, setting.data, setting.recipe, setting.loss, setting.device, forward=setting.forward
    )
    if fault is None:
        return list(setting.dense)
    warnings.warn(fault, OwnLayersWarning, stacklevel=3)
    return []


def _train_network(
    setting: _Setting, replaceable: list[str], progress: bool, initial: Weights, mask: Mask, begin: int, end: int
) -> Trained:
    """Train a ticket, see `tombola.lottery.rewinding.Train`, with a bar for its iterations."""
    with Bar(f"density {100 * mask.density:.1f} %", total=end - begin, shown=progress) as bar:
        done = begin

        def advance(iteration: int, _: Callable[[], Checkpoint]) -> None:
            nonlocal done
            bar.update(iteration - done)
            done = iteration

        return train(
            setting.model,
            initial.load(),
            mask,
            setting.data,
            setting.recipe,
            setting.seed,
            begin=begin,
            end=end,
            loss=setting.loss,
            forward=setting.forward,
            step=setting.step,
            optimizer=setting.optimizer,
            schedule=setting.schedule,
            metrics=setting.metrics,
            device=setting.device,
            kernels=replaceable,
            watch=advance,
            watch_every=LONGEST,
        )


def _prune_network(
    setting: _Setting, weights: Weights, mask: Mask, level: int, rewind: Weights, *, examples: int | None = None
) -> Mask:
    """Prune a ticket, see `tombola.lottery.rewinding.Prune`; `examples` are those of a score with data."""
    score = partial(
        score_network,
        model=setting.model,
        state=weights.load(),
        data=setting.data,
        loss=setting.loss,
        forward=setting.forward,
        step=setting.step,
        seed=pruning_seed(setting.seed, level),
        examples=examples or setting.score_examples,
        batch_size=setting.recipe.batch_size,
        device=setting.device,
    )
    return prune_round(
        weights,
        mask,
        level,
        rewind,
        importance=setting.importance,
        rule=setting.rule,
        seed=setting.seed,
        score_network=score,
    )

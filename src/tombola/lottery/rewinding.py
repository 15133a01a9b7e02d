"""Lottery ticket rewinding with an importance: the paper's Algorithm 2."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Protocol, TypeAlias

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
from tombola.importance.scores import movement
from tombola.inputs import Forward, OwnStep, call
from tombola.lottery.ticket import Ticket
from tombola.pruning.eligible import list_shared, prunable, resolve_layers
from tombola.pruning.mask import Mask, resolve_kept_dense
from tombola.pruning.prune import ScoreNetwork, check_fraction, count_to_remove, prune
from tombola.pruning.selection import apportion, check_selection
from tombola.pruning.start import check_start
from tombola.streams import derive
from tombola.training.evaluation import Loss
from tombola.training.history import Trained
from tombola.training.loss_functions import find_loss
from tombola.training.metrics import ACCURACY, Metric, load_metric
from tombola.training.own_optimizer import MakeOptimizer
from tombola.training.recipe import Recipe, RewindTo, Schedule
from tombola.training.replaceable import OwnLayersWarning, find_fault, read_kernels
from tombola.training.scoring import EXAMPLES, TRIED, score_network
from tombola.training.train import check_device, check_own_functions, check_recipe_fits, train
from tombola.training.trial import try_network
from tombola.training.weights import Weights

ScoreAt: TypeAlias = Literal["end", "rewind"]
"""The weights that are scored: those at the end of a training, or those of the rewind point."""

_FEWEST_LEFT = 1 / 8
"""What a round has to leave at least, relative to what it leaves without layers that are kept dense."""


class Train(Protocol):
    """A function that trains a network."""

    def __call__(self, initial: Weights, mask: Mask, begin: int, end: int) -> Trained | None:
        """Train the connections alive in `mask` from `initial`, iterations begin..end-1.

        Returns:
            The trained network, or None if the training has not been done yet.
        """


class Prune(Protocol):
    """A function that does one round of pruning."""

    def __call__(self, weights: Weights, mask: Mask, level: int, rewind: Weights) -> Mask | None:
        """Return `mask` without the connections of the lowest importance.

        Args:
            weights: the weights to score: the trained weights of `level`, or those of the rewind point.
            mask: the mask of the ticket at `level`.
            level: the level whose ticket is pruned.
            rewind: the weights of the rewind point.

        Returns:
            The mask of the next level, or None if the scores have not been computed yet.
        """


@dataclass(frozen=True)
class Rule:
    """What all rounds of a study have in common, besides the importance; see `tombola.prune`.

    Args:
        fraction: the fraction of the alive connections that each round removes, in (0, 1).
        keep_dense: the layers that are counted and never pruned, by parameter name.
        selection: how many connections each layer loses, see `tombola.pruning.selection.apportion`.
        shares: the shares of layers for the selection `shares`, by parameter name.
    """

    fraction: float
    keep_dense: Collection[str] = ()
    selection: str = "global"
    shares: Mapping[str, float] = field(default_factory=dict)


def lottery_ticket_rewinding(
    train: Train,
    prune: Prune,
    theta_0: Weights,
    dense: Mask,
    *,
    rewind: int,
    end: int,
    levels: int,
    score_at: ScoreAt = "end",
    rewind_to: RewindTo = "weights",
    early: int | None = None,
) -> Iterator[Ticket]:
    """Yield the ticket of each level: Algorithm 2 of the paper (arXiv 2302.11244).

    The last ticket is that of level `levels`. If a training diverged, its ticket is the last, because its weights
    cannot decide what is pruned next. If `train` returns None, there is no ticket for that training, and none after it.

    Scores at the rewind point, as in SNIP (arXiv 1810.02340), need no trained weights: all masks follow from the rewind
    point, round by round. Then every level has a ticket, and the result of its training is None if `train` returns
    None. There is no ticket if the training to the rewind point diverged.

    Renda et al. (arXiv 2003.02389) compare three ways to go on after a round. The paper's rewinds the weights and the
    learning-rate schedule. The other two keep the trained weights: learning-rate rewinding repeats the iterations k..m
    of the schedule, and fine-tuning trains on for m - k iterations with the last learning rate. Then the weights from
    which a ticket is trained are those that the level before ended with.

    You et al. (arXiv 1909.11957) find that masks are known early in training. Trainings that are only to decide what is
    pruned next may therefore end early; then the last ticket alone is trained in full.

    Args:
        train: a function that trains a network, or looks up the result of an earlier training.
        prune: a function that does one round of pruning.
        theta_0: the initial weights.
        dense: the mask of the dense network.
        rewind: the iteration k to whose weights tickets are rewound, 0 <= k < m.
        end: the number m of iterations of a complete training.
        levels: the number n of rounds, 0 or more.
        score_at: the weights that are scored: those at the end of the training ("end", the paper's), or those of the
            rewind point ("rewind", for `rewind_to="weights"` only).
        rewind_to: what is rewound after a round: "weights", with the schedule; "learning_rate", the schedule alone; or
            "nothing", which is fine-tuning.
        early: the iteration at which the trainings of all levels but the last end, for scores of trained weights and
            `rewind_to="weights"` only; None if all trainings are complete.

    An example with a training that does not change the weights:

    >>> import torch
    >>> from tombola.training.history import History
    >>> theta_0 = Weights.of({"w": torch.tensor([4.0, 1.0, 3.0, 2.0])})
    >>> tickets = lottery_ticket_rewinding(
    ...     lambda initial, mask, begin, end: Trained(initial, History()),
    ...     lambda weights, mask, level, rewind: prune(weights.load(), mask, lambda w: w, 0.5),
    ...     theta_0, Mask.from_tensors({"w": torch.ones(4, dtype=torch.bool)}), rewind=0, end=1, levels=2)
    >>> [ticket.mask["w"].tolist() for ticket in tickets][1:]
    [[True, False, True, False], [True, False, False, False]]
    """
    theta_k, mask = theta_0, dense  # step 1
    if rewind > 0:
        rewind_point = train(theta_0, dense, 0, rewind)  # step 2
        if rewind_point is None:
            return
        if score_at == "rewind" and rewind_point.history.diverged_at is not None:
            return
        theta_k = rewind_point.weights
    begin, last = rewind, end
    for level in range(levels + 1):
        stop = last if early is None or level == levels else early
        trained = train(theta_k, mask, begin, stop)  # step 3a; starting from theta_k is the rewinding of step 3d
        if trained is None and score_at == "end":
            return
        yield Ticket(level, mask, theta_k, trained)
        if level == levels or (score_at == "end" and trained is not None and trained.history.diverged_at is not None):
            return
        scored = trained.weights if trained is not None and score_at == "end" else theta_k
        pruned = prune(scored, mask, level, theta_k)  # steps 3b and 3c
        if pruned is None:
            return
        mask = pruned
        if rewind_to != "weights":
            assert trained is not None
            theta_k = trained.weights
        if rewind_to == "nothing":
            begin, last = last, last + end - rewind


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
    if not isinstance(model, nn.Module) or not isinstance(data, Dataset):
        raise UserError(
            f"find_tickets: expected a torch module and a tombola.Dataset, got {type(model).__name__} and "
            f"{type(data).__name__}"
        )
    expect(recipe, Recipe, "recipe", "a tombola.Recipe")
    expect(levels, Integral, "levels", "a whole number")
    expect(seed, Integral, "seed", "a whole number")
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
    read_kernels(kernels)
    exclude, keep_dense = (
        as_texts(layers, what, "names of layers") for what, layers in (("exclude", exclude), ("keep_dense", keep_dense))
    )
    prune = as_texts(prune, "prune", "patterns")
    dense = Mask.ones_like(model, exclude, prune)
    check_start(model, dense, prune, "model")
    shared = list_shared(model)
    kept = resolve_kept_dense(dense, keep_dense, prunable(model, prune).keys() - dense.keys(), shared)
    rule = Rule(fraction, kept, selection, resolve_shares(dense, {} if shares is None else shares))
    check_rule(rule, dense, levels)
    end = recipe.total_iterations(data.train_examples)
    theta_0 = Weights.of(model.state_dict())

    def prune_network(
        weights: Weights, mask: Mask, level: int, rewind: Weights, *, examples: int = score_examples
    ) -> Mask:
        score = partial(
            score_network,
            model=model,
            state=weights.load(),
            data=data,
            loss=loss,
            forward=forward,
            step=step,
            seed=pruning_seed(seed, level),
            examples=examples,
            batch_size=recipe.batch_size,
            device=device,
        )
        return prune_round(
            weights, mask, level, rewind, importance=importance, rule=rule, seed=seed, score_network=score
        )

    try_network(
        partial(copy.deepcopy, model),
        loss,
        data,
        recipe,
        measured,
        forward=forward,
        step=step,
        optimizer=optimizer,
        schedule=schedule,
        dense=dense,
    )
    if step is not None:
        kernels = "off"
    fault = find_fault(model, data, recipe, loss, device, forward=forward) if kernels == "auto" else None
    if fault is not None:
        warnings.warn(fault, OwnLayersWarning, stacklevel=2)
    allowed = [] if fault is not None or kernels == "off" else list(dense)
    if levels:
        prune_network(theta_0, dense, 0, theta_0, examples=min(TRIED, score_examples))
    provenance = {
        "model": type(model).__name__,
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "recipe": recipe.model_dump(mode="json"),
        "importance": importance.name,
        "fraction": float(fraction),
        "seed": int(seed),
        "prune": prune,
        "exclude": exclude,
        "keep_dense": keep_dense,
        "selection": selection,
        "shares": {name: share if isinstance(share, int) else float(share) for name, share in (shares or {}).items()},
        "score_at": score_at,
        "device": device,
        "kernels": kernels,
    }

    def train_network(initial: Weights, mask: Mask, begin: int, end: int) -> Trained:
        with Bar(f"density {100 * mask.density:.1f} %", total=end - begin, shown=progress) as bar:

            def advance(iteration: int, checkpoint: object) -> None:
                bar.update(1)

            return train(
                model,
                initial.load(),
                mask,
                data,
                recipe,
                seed,
                begin=begin,
                end=end,
                loss=loss,
                forward=forward,
                step=step,
                optimizer=optimizer,
                schedule=schedule,
                metrics=measured,
                device=device,
                kernels=allowed,
                watch=advance,
            )

    tickets = lottery_ticket_rewinding(
        train_network,
        prune_network,
        theta_0,
        dense,
        rewind=recipe.rewind,
        end=end,
        levels=levels,
        score_at=score_at,
        rewind_to=recipe.rewind_to,
    )
    shared = {name: others for name, others in shared.items() if name in dense}
    return (replace(ticket, provenance=provenance, shared=shared) for ticket in tickets)


def prune_round(
    weights: Weights,
    mask: Mask,
    level: int,
    rewind: Weights,
    *,
    importance: Importance | Normalisation,
    rule: Rule,
    seed: int,
    score_network: ScoreNetwork | None = None,
) -> Mask:
    """Prune the ticket of `level`, see `Prune` and `tombola.prune`; each level has its own random numbers."""
    importance = as_importance(importance)
    return prune(
        weights.load(),
        mask,
        importance,
        rule.fraction,
        keep_dense=rule.keep_dense,
        selection=rule.selection,
        shares=rule.shares,
        rewound=rewind.load() if importance.reads_rewind_point else None,
        score_network=score_network,
        seed=pruning_seed(seed, level),
    )


def check_score_at(score_at: str, importance: Importance, rewind_to: RewindTo = "weights") -> None:
    """Raise `UserError` if an importance cannot be computed from the weights that are scored.

    >>> from tombola.importance import find
    >>> check_score_at("rewind", find("movement/l1"))
    Traceback (most recent call last):
    tombola.errors.UserError: score_at: at the rewind point, the score of 'movement/l1' is 0 for every connection
    """
    if score_at not in ("end", "rewind"):
        raise UserError(f"score_at: expected 'end' or 'rewind', got {score_at!r}")
    if score_at == "rewind" and rewind_to != "weights":
        raise UserError(
            f"score_at: scores at the rewind point are for recipe.rewind_to = 'weights', and it is {rewind_to!r}"
        )
    if score_at == "rewind" and importance.score is movement:
        raise UserError(f"score_at: at the rewind point, the score of {importance.name!r} is 0 for every connection")


def pruning_seed(seed: int, level: int) -> int:
    """Return the seed of the random numbers that pruning the ticket of a level draws."""
    return derive(seed, "pruning", level)


def resolve_shares(mask: Mask, shares: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each layer that `shares` names, by parameter name; a later name overrides an earlier one.

    Args:
        mask: the mask of the dense network.
        shares: layer -> share, see `tombola.pruning.eligible.resolve_layers` for the names.

    Raises:
        UserError: if a name matches no layer, or if a share is negative or not finite.

    >>> import torch
    >>> mask = Mask.from_tensors({"fc1.weight": torch.ones(4).bool(), "fc2.weight": torch.ones(2).bool()})
    >>> resolve_shares(mask, {"*": 1.0, "fc2": 0.5})
    {'fc1.weight': 1.0, 'fc2.weight': 0.5}
    """
    found: dict[str, float] = {}
    expect(shares, Mapping, "shares", "numbers by the names of layers")
    for name, share in shares.items():
        expect(share, Real, f"shares: {name!r}", "a number from 0")
        if not 0 <= share < math.inf:
            raise UserError(f"shares: {name!r} has the share {share}; expected a number from 0")
        found |= dict.fromkeys(sorted(resolve_layers(mask, [name], "shares")), share)
    return found


def check_rule(rule: Rule, dense: Mask, levels: int) -> None:
    """Check that each of `levels` rounds can remove what the rule asks for, see `check_levels` for the total.

    Args:
        rule: what all rounds have in common.
        dense: the mask of the dense network.
        levels: the number of rounds, 0 or more.

    Raises:
        UserError: if a round cannot, if there is no such selection, or if shares are given for another selection.

    >>> import torch
    >>> dense = Mask.from_tensors({"a": torch.ones(80).bool(), "b": torch.ones(20).bool()})
    >>> check_rule(Rule(0.2, selection="uniform"), dense, 9)
    >>> check_rule(Rule(0.2, selection="shares", shares={"b": 9.0}), dense, 9)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: levels: 9 are too many, at most 1 is possible; shares: layer 'b' would lose ...
    """
    selection, shares = rule.selection, rule.shares
    check_selection(selection)
    if shares and selection != "shares":
        raise UserError(f"shares: they are for the selection 'shares', and the selection is {selection!r}")
    kept = sum(dense.sizes[layer] for layer in rule.keep_dense)
    check_levels(dense.total, rule.fraction, levels, kept_dense=kept)
    alive = {layer: size for layer, size in dense.sizes.items() if layer not in rule.keep_dense}
    for level in range(1, levels + 1):
        count = count_to_remove(kept + sum(alive.values()), rule.fraction)
        try:
            numbers = apportion(selection, alive, dense.shapes, count, shares)
        except UserError as error:
            possible = f"at most {level - 1} {'is' if level == 2 else 'are'} possible"
            raise UserError(f"levels: {levels} are too many, {possible}; {error}") from None
        if numbers is None:
            return
        alive = {layer: number - numbers[layer] for layer, number in alive.items()}


def check_levels(connections: int, fraction: float, levels: int, *, kept_dense: int = 0) -> None:
    """Check that each of `levels` rounds removes at least one alive connection and leaves enough of them.

    A round leaves (1 - fraction) of the connections that may be pruned, and fewer if layers are kept dense, because the
    fraction is that of all connections. It has to leave at least an eighth of this share: after a round that removes
    nearly all connections of the layers that may be pruned, hardly any path leads through them. LeNet-300-100 with a
    dense classifier can have 24 levels of 20 % and VGG-16 can have 35: the paper's tables end there.

    Args:
        connections: the number of connections that are counted.
        fraction: the fraction of the alive connections that each round removes, in (0, 1).
        levels: the number of rounds, 0 or more.
        kept_dense: how many of the connections are in layers that are never pruned.

    Raises:
        UserError: if a round does not, or if `fraction` or `levels` is out of range.

    >>> check_levels(connections=266_200, fraction=0.2, levels=24, kept_dense=1000)
    >>> check_levels(connections=100, fraction=0.5, levels=7)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: levels: 7 are too many, after level 6 only 1 of 100 connections are alive ...
    """
    check_fraction(fraction)
    expect(levels, Integral, "levels", "a whole number")
    if levels < 0:
        raise UserError(f"levels must be 0 or more, got {levels}")
    alive = connections
    for level in range(1, levels + 1):
        removed, prunable = count_to_remove(alive, fraction), alive - kept_dense
        too_many = f"levels: {levels} are too many, after level {level - 1} only {alive} of {connections} connections"
        possible = f"at most {level - 1} levels are possible"
        if kept_dense and _FEWEST_LEFT * (1 - fraction) * prunable > prunable - removed:
            raise UserError(
                f"{too_many} are alive, {kept_dense} of them in layers that are kept dense, and the next round would "
                f"remove {min(removed, prunable)} of the other {prunable}; {possible}"
            )
        if removed == 0 or removed == alive:
            raise UserError(f"{too_many} are alive and a fraction of {fraction} of them is {removed}; {possible}")
        alive -= removed

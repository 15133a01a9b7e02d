"""The rule of a round of pruning: what all rounds of a study have in common, and what a rule can ask for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from tombola.errors import UserError, expect
from tombola.importance import Importance, Normalisation, as_importance
from tombola.importance.scores import movement
from tombola.pruning.eligible import resolve_layers
from tombola.pruning.mask import Mask
from tombola.pruning.prune import ScoreNetwork, check_fraction, count_to_remove, prune
from tombola.pruning.selection import apportion, check_selection
from tombola.streams import derive
from tombola.training.recipe import RewindTo
from tombola.training.weights import Weights

_FEWEST_LEFT = 1 / 8
"""What a round has to leave at least, relative to what it leaves without layers that are kept dense."""


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
        possible = f"at most {level - 1} {'level is' if level == 2 else 'levels are'} possible"
        if kept_dense and _FEWEST_LEFT * (1 - fraction) * prunable > prunable - removed:
            raise UserError(
                f"{too_many} are alive, {kept_dense} of them in layers that are kept dense, and the next round would "
                f"remove {min(removed, prunable)} of the other {prunable}; {possible}"
            )
        if removed == 0 or removed == alive:
            raise UserError(f"{too_many} are alive and a fraction of {fraction} of them is {removed}; {possible}")
        alive -= removed

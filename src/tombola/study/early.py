"""Early masks: plan the trainings that give the weights of a dense network at intermediate iterations.

A training up to an iteration is a training of its own, with the same bits as the first part of the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.study.chains import Chain, Start
from tombola.study.planner import Planner
from tombola.study.rounds import compute_mask
from tombola.study.singles import find_training, list_notes, plan_singles
from tombola.study.task import load_importance
from tombola.study.tickets import Tickets
from tombola.study.trainings import Round
from tombola.training.weights import Weights

PARTS = (64, 32, 16, 8, 4, 2)
"""By default, the iterations are the length of a training divided by these numbers."""


@dataclass(frozen=True)
class Snapshots:
    """The trainings of a dense network up to intermediate iterations.

    Args:
        tickets: the tickets of the study.
        planner: the planner of the trainings.
        chains: the chains of the planner by seed and iteration.
    """

    tickets: Tickets
    planner: Planner
    chains: dict[tuple[int, int], Chain]


def plan_snapshots(tickets: Tickets, iterations: Sequence[int] | None = None) -> Snapshots:
    """Return the trainings of the dense network of each seed up to intermediate iterations.

    Args:
        tickets: the tickets of the study.
        iterations: the iterations, after that of the rewind point and before the last; by default fractions of a
            training, see `PARTS`.

    Raises:
        UserError: if an iteration is not between these two.
        NothingStoredError: if the store does not have the dense networks yet.
        DamagedResultError: if a stored result is damaged.
    """
    study, planner = tickets.study, tickets.planner
    begin, end = study.recipe.rewind, planner.end
    if iterations is None:
        found = sorted({begin + round((end - begin) / part) for part in PARTS} - {begin, end})
    else:
        found = sorted(set(iterations))
    for each in found:
        if not begin < each < end:
            raise UserError(
                f"early masks: expected iterations of the dense network after {begin} and before {end}, got {each}; "
                "the masks of these two are always shown"
            )
    dense = [Chain(seed, study.importances[0]) for seed in study.seeds]
    tickets.require([0], dense)
    starts: dict[Chain, Start] = {}
    chains: dict[tuple[int, int], Chain] = {}
    for chain in dense:
        ticket, training = find_training(tickets, chain, 0)
        for each in found:
            own = Chain(chain.seed, f"dense network to iteration {each}")
            starts[own] = Start(0, ticket.rewind, ticket.mask, training.begin, each)
            chains[chain.seed, each] = own
    note = {"verb": "early", "iterations": found}
    return Snapshots(tickets, plan_singles(tickets, starts, note), chains)


def list_snapshots(tickets: Tickets) -> list[int]:
    """Return the intermediate iterations of a study that its store has trainings of."""
    known = {each for note in list_notes(tickets, "early") for each in note["iterations"]}
    return sorted(each for each in known if tickets.study.recipe.rewind < each < tickets.planner.end)


def prune_at_once(
    planner: Planner, weights: Weights, rewind: Weights, importance: str, density: float, seed: int
) -> Mask:
    """Return the mask that one round prunes a dense network to, instead of a round for each level.

    Args:
        planner: the planner of the study.
        weights: the weights to score.
        rewind: the weights of the rewind point.
        importance: the name of the importance.
        density: the density of the mask, in (0, 1).
        seed: the seed of the random numbers that the importance draws.

    Raises:
        UserError: if the selection of the study cannot remove as many connections in one round.
    """
    loaded, _ = load_importance(importance)
    rule = replace(planner.rule, fraction=1 - density)
    pruning = Round("", weights, rewind, planner.dense, 0, importance, seed, rule.fraction)
    return compute_mask(pruning, planner.problem, planner.study, rule, loaded)

"""Lottery ticket rewinding with an importance: the paper's Algorithm 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, TypeAlias

from tombola.lottery.ticket import Ticket
from tombola.pruning.mask import Mask
from tombola.training.history import Trained
from tombola.training.recipe import RewindTo
from tombola.training.weights import Weights

ScoreAt: TypeAlias = Literal["end", "rewind"]
"""The weights that are scored: those at the end of a training, or those of the rewind point."""


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
    >>> from tombola import prune
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

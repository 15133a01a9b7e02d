"""Rounds of pruning of a study, computed from their arguments."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tombola.errors import ImportanceError
from tombola.importance import Importance, NetworkScore
from tombola.lottery.rule import Rule, prune_round, pruning_seed
from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.study.schema import Study
from tombola.study.task import Problem
from tombola.study.trainings import Round
from tombola.training.scoring import score_network


def compute_mask(pruning: Round, problem: Problem, study: Study, rule: Rule, importance: Importance) -> Mask:
    """Return the mask that results from a round of pruning.

    Args:
        pruning: the pruning.
        problem: the data set, model and loss, for a score that needs the network.
        study: the study, for how such a score is computed.
        rule: what all rounds have in common; the round has its own fraction.
        importance: the importance that the round names.

    Raises:
        RoundError: if the importance fails, or if a layer would lose more connections than it has. The message names
            the importance as the study does.
    """
    score = None
    if isinstance(importance.score, NetworkScore):
        with ambient(0):
            model = problem.build()
        score = partial(
            score_network,
            model=model,
            state=pruning.weights.load(),
            data=problem.data,
            loss=problem.loss,
            forward=problem.forward,
            step=problem.step,
            seed=pruning_seed(pruning.seed, pruning.level),
            examples=study.score_examples,
            batch_size=study.recipe.batch_size,
            device=study.device,
        )
    try:
        return prune_round(
            pruning.weights,
            pruning.mask,
            pruning.level,
            pruning.rewind,
            importance=importance,
            rule=replace(rule, fraction=pruning.fraction),
            seed=pruning.seed,
            score_network=score,
        )
    except ImportanceError as error:
        text = str(error).removeprefix(f"importance {importance.name!r}")
        raise ImportanceError(f"importance {pruning.importance!r}{text}") from error

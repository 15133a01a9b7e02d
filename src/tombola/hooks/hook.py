"""Hooks: the function that follows a run, the report that it is called with, and the exception that ends a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from tombola.study.chains import Chain


class StopTraining(Exception):  # noqa: N818 (it is no error)
    """What a hook raises to end the chain that it was told about; its text is the reason, which the run shows.

    >>> raise StopTraining("the metric fell")
    Traceback (most recent call last):
    tombola.hooks.hook.StopTraining: the metric fell
    """


@dataclass(frozen=True)
class Report:
    """What a hook is told: a level that is trained, or an epoch of its training.

    Args:
        chain: the chain, with its importance, seed and data seed.
        level: the level, from 0, the dense network.
        density: alive / counted connections at this level, in 0..1.
        epoch: how many epochs of the level's training are done, from 1; None once the level is trained.
        losses: the mean training loss of each epoch so far. If the recipe has a rewind point, level 0 is trained from
            it on, and its losses begin there.
        metrics: once the level is trained, the metrics by split and name, such as "test accuracy"; None for one that is
            not finite. Empty before, and for a training that diverged.
        diverged: whether the training diverged.

    >>> Report(Chain(0, "l1"), level=1, density=0.8, epoch=2, losses=(0.9, 0.5)).chain.importance
    'l1'
    """

    chain: Chain
    level: int
    density: float
    epoch: int | None = None
    losses: tuple[float, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    diverged: bool = False


Hook: TypeAlias = Callable[[Report], object]
"""A function of a report. If it is a context manager too, it is entered for the run."""

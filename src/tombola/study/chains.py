"""Chains of tickets: what names one, and how far it has come.

A study has one chain for each importance and seed. The planner follows it through the store, see
`tombola.study.planner.Planner.progress`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tombola.errors import UserError, did_you_mean
from tombola.lottery.ticket import Ticket
from tombola.pruning.mask import Mask
from tombola.study.schema import Study
from tombola.study.trainings import Round, Training
from tombola.training.weights import Weights


@dataclass(frozen=True)
class Chain:
    """The sequence of tickets that one importance gives for one seed.

    Args:
        seed: the seed of the initialisation, and by default of the data order and every other random choice.
        importance: the name of the importance that decides which connections are pruned.
        data_seed: the seed of all random choices except the initialisation; None if it is `seed`.
        path: the levels of the chain's tickets after level 0, increasing: a round may prune several levels at once.
            Empty for every level of the study.
        early: whether the trainings of all levels but the last end early, see `Planner.early_end`. Then an empty path
            is the dense network alone.

    >>> str(Chain(0, "l1")), str(Chain(0, "l1", 100)), str(Chain(0, "l1", path=(4, 6)))
    ('l1, seed 0', 'l1, seed 0, data order 100', 'l1, seed 0, by levels 4, 6')
    >>> str(Chain(0, "l1", path=(4, 6), early=True)), str(Chain(0, "l1", early=True))
    ('l1, seed 0, by levels 4, 6, masks taken early', 'l1, seed 0, dense network')
    """

    seed: int
    importance: str
    data_seed: int | None = None
    path: tuple[int, ...] = ()
    early: bool = False

    @property
    def order_seed(self) -> int:
        """The seed of the data order and of every other random choice except the initialisation."""
        return self.seed if self.data_seed is None else self.data_seed

    def __str__(self) -> str:
        other = "" if self.data_seed is None else f", data order {self.data_seed}"
        path = f", by levels {', '.join(map(str, self.path))}" if self.path else ""
        early = "" if not self.early else ", masks taken early" if self.path else ", dense network"
        return f"{self.importance}, seed {self.seed}{other}{path}{early}"


@dataclass(frozen=True)
class Start:
    """What a single training begins with: one outside Algorithm 2, such as the training of a control.

    Args:
        level: the level of the ticket that it belongs to.
        weights: the weights at the start.
        mask: the connections that are alive.
        begin, end: the range of iterations, begin..end-1.
    """

    level: int
    weights: Weights
    mask: Mask
    begin: int
    end: int


Need: TypeAlias = Training | Round
"""What a chain may wait for: a training, or a round of pruning whose scores a worker computes."""


@dataclass(frozen=True)
class Waiting:
    """The chain waits for a training or for a round of pruning.

    Args:
        need: the training or the round to do next.
        remaining: the number of trainings that the chain still needs.
        shared: how many of these trainings, from the first on, are needed by all chains that wait for `need`.
        beside: further trainings that can be done at the same time.
    """

    need: Need
    remaining: int
    shared: int
    beside: tuple[Training, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The store has the tickets of all levels of the chain."""


@dataclass(frozen=True)
class Diverged:
    """The training of the last ticket diverged, so its weights cannot decide what is pruned next."""


@dataclass(frozen=True)
class Stopped:
    """The round of pruning after the last ticket cannot be done, for example because the importance failed.

    Args:
        reason: the message of the failure.
    """

    reason: str


@dataclass(frozen=True)
class Halted:
    """A run was asked to end the chain here.

    Args:
        reason: why.
    """

    reason: str


End: TypeAlias = Waiting | Finished | Diverged | Stopped | Halted
"""Why a chain has no further tickets."""


@dataclass(frozen=True)
class Progress:
    """The progress of a chain.

    Args:
        tickets: the tickets whose trainings are done, from level 0 on. Their masks and weights stay on disk.
        trainings: the trainings that the store has: that of the rewind point, if any, those of the tickets, and those
            of later levels if levels are trained side by side.
        end: the reason why there are no further tickets.
    """

    tickets: tuple[Ticket, ...]
    trainings: tuple[Training, ...]
    end: End

    @property
    def waits_for(self) -> Need | None:
        """The training or the round to do next; None if the chain does not wait for one."""
        return self.end.need if isinstance(self.end, Waiting) else None

    @property
    def needs(self) -> tuple[Need, ...]:
        """All trainings and rounds that can be done now."""
        return (self.end.need, *self.end.beside) if isinstance(self.end, Waiting) else ()

    @property
    def remaining(self) -> int:
        """The number of trainings that the chain still needs."""
        return self.end.remaining if isinstance(self.end, Waiting) else 0

    @property
    def shared(self) -> int:
        """How many of these trainings are needed by all chains that wait for the same training."""
        return self.end.shared if isinstance(self.end, Waiting) else 0

    @property
    def stopped(self) -> str | None:
        """The message of the importance's failure; None if it did not fail."""
        return self.end.reason if isinstance(self.end, Stopped) else None


def select_chains(study: Study, importances: Sequence[str] | None, at_least: int = 1) -> list[Chain]:
    """Return the chains of some importances of a study, or of all of them, for each of its seeds.

    Args:
        study: the study.
        importances: the names of the importances; None for all importances of the study.
        at_least: the smallest allowed number of importances.

    Raises:
        UserError: if the study does not have one of the importances, or if there are fewer than `at_least`.

    >>> from tombola.study.schema import load_study
    >>> [str(chain) for chain in select_chains(load_study("digits"), ["l1"])]
    ['l1, seed 0', 'l1, seed 1']
    """
    known = study.importances
    names = known if importances is None else list(dict.fromkeys(importances))
    for name in names:
        if name not in known:
            raise UserError(f"importances: the study has no importance {name!r}; {did_you_mean(name, known)}")
    if len(names) < at_least:
        more = next(name for name in (*known, "magnitude", "l1") if name not in names)
        whose = "" if more in known else ", and run the study with it"
        raise UserError(
            f"importances: expected at least {at_least} to compare, got {', '.join(names) or 'none'}; "
            f"add another one, such as {more}{whose}"
        )
    return [Chain(seed, name) for seed in study.seeds for name in names]

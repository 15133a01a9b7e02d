"""Search: the sparsest ticket that keeps the metric of the dense network, with few trainings.

A search tries tickets one after another. Each is named by its path, the levels at which it was trained on the way: the
paper's 20 % rounds to level 8 are the path 1, 2, ..., 8, and the path 5, 8 prunes the dense network to level 5 at once,
trains, and prunes to level 8. A *strategy* is a pure function of what is known of the tickets tried so far; it returns
the tickets to try next, or none if it has ended. `plan` adds what all strategies have in common: the ticket that is
found is trained with further seeds, which judge it. If they refute it, the strategy goes on with that knowledge; if
they do not, they judge the next level, which the first seed may have refuted by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from tombola.errors import UserError, did_you_mean, short

_ROUNDING = 1e-9  # shares are whole numbers of examples; their differences are rounded


@dataclass(frozen=True)
class Candidate:
    """A ticket that may be tried.

    Args:
        importance: the importance that decides which connections are pruned.
        path: the levels at which it is trained on the way from the dense network, increasing; the last is its own.
        early: whether the trainings before the last, which decide what is pruned, end after a part of their iterations,
            see `EARLY`.

    >>> Candidate("l1", (5, 8)).level, [each.path for each in Candidate("l1", (5, 8)).stages]
    (8, [(5,), (5, 8)])
    """

    importance: str
    path: tuple[int, ...]
    early: bool = False

    @property
    def level(self) -> int:
        """Its level."""
        return self.path[-1]

    @property
    def stages(self) -> list[Candidate]:
        """The tickets that are trained in full on its path, of which it is the last."""
        if self.early:
            return [self]
        return [Candidate(self.importance, self.path[: number + 1]) for number in range(len(self.path))]


@dataclass(frozen=True)
class Known:
    """What is known in the course of a search.

    A trial is a repetition of all trainings. The first decides where the search goes. The others judge what it finds,
    and then the first has no say in it.

    Args:
        importances: the importances to search.
        levels: the highest level.
        margin: by how much a ticket may be worse than the dense network, 0 or more.
        trials: the number of trials, 1 or more.
        gains: the gain of each trained ticket in each trial, by the number of the trial: by how much its metric is
            better than that of the trial's dense network, on the scale of the margin; -inf if it has none, because its
            training diverged or its importance failed.

    >>> first, second = Candidate("l1", (4,)), Candidate("l1", (4, 8))
    >>> known = Known(("l1",), 10, 0.005, 2, {first: {0: 0.01, 1: 0.0}, second: {0: -0.001, 1: -0.02}})
    >>> known.keeps(first), known.keeps(second), known.keeps(Candidate("l1", (5,)))
    (True, False, None)
    >>> known.best.path
    (4,)
    """

    importances: tuple[str, ...]
    levels: int
    margin: float
    trials: int
    gains: Mapping[Candidate, Mapping[int, float]]

    def keeps(self, candidate: Candidate) -> bool | None:
        """Return whether a ticket keeps the metric, as far as is known; None if it has not been tried.

        The mean of its gains over all trials but the first has to be at least -margin; until all of them are known, its
        gain in the first trial.
        """
        gains = self.gains.get(candidate, {})
        if self.judged(candidate):
            return self.within(math.fsum(gains[trial] for trial in gains if trial) / (self.trials - 1))
        return self.within(gains[0]) if 0 in gains else None

    def judged(self, candidate: Candidate) -> bool:
        """Return whether all trials but the first are known of a ticket, and there are some."""
        return self.trials > 1 and self.gains.get(candidate, {}).keys() >= set(range(1, self.trials))

    @property
    def best(self) -> Candidate | None:
        """The sparsest ticket that keeps the metric, as far as is known.

        Of several, it is one that is judged, and the one with the largest gain in the first trial.
        """
        return self._sparsest([each for each in self.gains if self.keeps(each)])

    def bounds(self, importance: str) -> tuple[Candidate | None, int]:
        """Return the sparsest ticket of an importance that keeps the metric, and the next level that was refuted.

        Without a refuted level, the next is the one after the last.
        """
        own = [each for each in self.gains if each.importance == importance]
        kept = self._sparsest([each for each in own if self.keeps(each)])
        least = kept.level if kept else 0
        refuted = [each.level for each in own if self.keeps(each) is False and each.level > least]
        return kept, min(refuted, default=self.levels + 1)

    def within(self, gain: float) -> bool:
        """Return whether a gain is at least -margin."""
        return gain >= -self.margin - _ROUNDING * max(1.0, self.margin)

    def _sparsest(self, candidates: Sequence[Candidate]) -> Candidate | None:
        return max(candidates, key=lambda each: (each.level, self.judged(each), self.gains[each][0]), default=None)


Strategy: TypeAlias = Callable[[Known], Sequence[Candidate]]
"""A function that returns the tickets to try next in the first trial; none if the search has ended."""


def rounds(known: Known) -> list[Candidate]:
    """Try every level, one after another: the paper's rounds of pruning, to which other strategies are compared.

    >>> rounds(Known(("l1",), 2, 0.0, 1, {Candidate("l1", (1,)): {0: -0.5}}))
    [Candidate(importance='l1', path=(1, 2), early=False)]
    """
    found = []
    for importance in known.importances:
        for stage in Candidate(importance, tuple(range(1, known.levels + 1))).stages if known.levels else ():
            gains = known.gains.get(stage)
            if gains is None:
                found.append(stage)
            if gains is None or gains[0] == -math.inf:
                break
    return found


def bisect(known: Known) -> list[Candidate]:
    """Prune by about the square root of the levels at once as long as tickets keep the metric, then halve the gap.

    With n levels, this takes at most about 2 sqrt(n) trainings, see `step`.
    """
    return _step_each(known, max(1, round(math.sqrt(known.levels))))


def one_shot(known: Known) -> list[Candidate]:
    """Halve the gap from the beginning: first prune the dense network to the middle of all levels at once.

    With n levels, this takes about log2(n) trainings and one more for each round that is repeated, see `step`.

    >>> one_shot(Known(("l1", "l2"), 24, 0.0, 1, {}))
    [Candidate(importance='l1', path=(13,), early=False), Candidate(importance='l2', path=(13,), early=False)]
    """
    return _step_each(known, known.levels)


def race(known: Known) -> list[Candidate]:
    """Search with all importances as `one_shot` does, and drop those that fall behind.

    Importances are ranked by the sparsest ticket that keeps the metric, then by its gain. After each ticket that the
    first has tried, half of the importances are left. Those that cannot pass the first are dropped at once. When the
    race is over, the second may still pass the first, by one level.

    >>> gains = {Candidate("l1", (5,)): {0: 0.0}, Candidate("l2", (5,)): {0: -0.1}}
    >>> race(Known(("l1", "l2"), 10, 0.0, 1, gains))
    [Candidate(importance='l1', path=(5, 8), early=False)]
    """
    order = sorted(known.importances, key=lambda each: _rank(known, each), reverse=True)
    first = order[0]
    level = _level(known.bounds(first)[0])
    tried = sum(each.importance == first for each in known.gains)
    left = order[: math.ceil(len(order) / 2**tried)]
    going = [each for each in left if each == first or known.bounds(each)[1] > level]
    asked = [found for each in going if (found := step(known, each, known.levels)) is not None]
    return asked or [found for each in order[1:2] if (found := _pass(known, each, level + 1)) is not None]


def early(known: Known) -> list[Candidate]:
    """Search as `race` does, with masks that are taken early (early-bird tickets, You et al., arXiv 1909.11957).

    The trainings that only decide what is pruned next end after a part of their iterations, see `EARLY`. A ticket of n
    rounds then takes a complete training and n parts, beside the dense network, instead of n complete trainings.

    >>> early(Known(("l1",), 10, 0.0, 1, {Candidate("l1", (5,), early=True): {0: 0.0}}))
    [Candidate(importance='l1', path=(5, 8), early=True)]
    """
    complete = {replace(each, early=False): gains for each, gains in known.gains.items()}
    return [replace(each, early=True) for each in race(replace(known, gains=complete))]


STRATEGIES: dict[str, Strategy] = {
    "rounds": rounds,
    "bisect": bisect,
    "one-shot": one_shot,
    "race": race,
    "short": race,
    "early": early,
}
"""The strategies by name."""

SHARES = {"short": 0.25}
"""Strategies whose first trial has shorter trainings: their length as a share of the complete ones."""

EARLY = 0.25
"""The part of its iterations after which a training ends that only decides what is pruned next."""

DEFAULT = "race"
"""The strategy that is used if none is named, see docs/find.md for the comparison."""


def find_strategy(name: str | Strategy) -> Strategy:
    """Return a strategy by its name; a function is one already.

    Raises:
        UserError: if there is none of this name.

    >>> find_strategy("bisekt")
    Traceback (most recent call last):
    tombola.errors.UserError: strategy: unknown 'bisekt'; did you mean 'bisect'?
    """
    if callable(name):
        return name
    if not isinstance(name, str) or name not in STRATEGIES:
        raise UserError(f"strategy: unknown {short(name)}; {did_you_mean(str(name), STRATEGIES)}")
    return STRATEGIES[name]


def step(known: Known, importance: str, most: int) -> Candidate | None:
    """Return the ticket of an importance to try next; None if the search with it has ended.

    The next ticket is pruned from the sparsest one that keeps the metric, at level a. It lies in the middle between a
    and the level b that was refuted (of two levels, it is the sparser), but at most `most` levels ahead. If no level
    lies between, b is tried again unless it was pruned from a or refuted by the other trials: a ticket that was pruned
    from a denser one, by more connections at once, is no proof that b cannot be reached.

    Args:
        known: what is known.
        importance: the importance.
        most: the largest number of levels to prune at once, 1 or more.

    >>> a, b = Candidate("l1", (4,)), Candidate("l1", (6,))
    >>> step(Known(("l1",), 10, 0.0, 1, {b: {0: -1.0}, a: {0: 0.0}}), "l1", 10)
    Candidate(importance='l1', path=(4, 5), early=False)
    """
    kept, refuted = known.bounds(importance)
    path, level = (kept.path, kept.level) if kept else ((), 0)
    if level >= known.levels:
        return None
    ahead = level + min(most, (refuted - level + 1) // 2)
    if any(known.judged(each) for each in known.gains if (each.importance, each.level) == (importance, ahead)):
        return None
    found = Candidate(importance, (*path, ahead))
    return found if known.keeps(found) is None else None


@dataclass(frozen=True)
class Ask:
    """What to train next: some tickets, and all that are on their paths.

    Args:
        candidates: the tickets.
        trials: the numbers of the trials in which to train them.
    """

    candidates: tuple[Candidate, ...]
    trials: tuple[int, ...]


@dataclass(frozen=True)
class End:
    """The end of a search.

    Args:
        found: the sparsest ticket that keeps the metric; None if no ticket that was tried does.
        reason: why the search ended, as a sentence.
    """

    found: Candidate | None
    reason: str


def plan(known: Known, strategy: Strategy) -> Ask | End:
    """Return what to train next, or the ticket that was found.

    If the strategy asks for nothing, the ticket that was found is trained in the other trials. If these refute it, the
    strategy is asked again. If they do not, they judge its next level, unless they have judged one of that importance.

    Raises:
        UserError: if the strategy asks for a ticket that cannot be, or only for those that it knows.

    >>> found = Candidate("l1", (1,))
    >>> plan(Known(("l1",), 1, 0.0, 3, {found: {0: 0.0}}), one_shot)
    Ask(candidates=(Candidate(importance='l1', path=(1,), early=False),), trials=(1, 2))
    >>> plan(Known(("l1",), 1, 0.0, 1, {found: {0: 0.0}}), one_shot).reason
    'level 1 is the last level of the study, and sparser tickets were not tried'
    """
    if asked := strategy(known):
        _check_asked(asked, known)
        return Ask(tuple(asked), (0,))
    best = known.best
    if best is None:
        return End(None, "no ticket that was tried keeps the metric")
    for each in (best, *_next_to_judge(known, best)):
        if missing := tuple(trial for trial in range(known.trials) if trial not in known.gains.get(each, {})):
            return Ask((each,), missing)
    if best.level >= known.levels:
        return End(best, f"level {best.level} is the last level of the study, and sparser tickets were not tried")
    return End(best, f"level {best.level} keeps the metric, and no sparser ticket that was tried does")


def imagine(strategy: Strategy, importances: Sequence[str], levels: int, trials: int) -> Iterator[list[Ask]]:
    """Yield what a search asks for, one after another, in each of many imagined cases.

    In each case, a ticket of any importance, or of the last one alone, keeps the metric up to a certain level, if no
    round on its path is larger than a certain number of levels, and the other trials agree with the first.

    Args:
        strategy: the strategy.
        importances: the importances to search.
        levels: the highest level.
        trials: the number of trials.

    >>> max(len({stage for ask in case for each in ask.candidates for stage in each.stages})
    ...     for case in imagine(bisect, ["l1"], 9, 1))
    14
    """
    for good in dict.fromkeys((tuple(importances), tuple(importances[-1:]))):
        for last in range(levels + 1):
            for largest in range(1, last + 1) if last else (1,):
                gains, asks, too_large = dict[Candidate, dict[int, float]](), list[Ask](), False
                known = Known(tuple(importances), levels, 0.0, trials, gains)
                while isinstance(asked := plan(known, strategy), Ask):
                    asks.append(asked)
                    for stage in (stage for each in asked.candidates for stage in each.stages):
                        gap = max(after - before for before, after in pairwise((0, *stage.path)))
                        too_large |= gap > largest
                        keeps = stage.importance in good and stage.level <= last and gap <= largest
                        gains.setdefault(stage, {}).update(dict.fromkeys(asked.trials, 0.0 if keeps else -1.0))
                yield asks
                if not too_large:
                    break  # larger rounds are not tried, so whether they keep the metric does not matter


def _check_asked(asked: Sequence[Candidate], known: Known) -> None:
    """Raise `UserError` if a strategy asks for a ticket that cannot be, or only for those that it knows."""
    for each in asked:
        rising = isinstance(each, Candidate) and [0, *each.path] == sorted({0, *each.path}) and len(each.path) > 0
        if not rising or each.importance not in known.importances or each.level > known.levels:
            raise UserError(
                f"strategy: it asks for {short(each)}; expected a Candidate with an importance of the study and "
                f"increasing levels from 1 to {known.levels}"
            )
    if all(known.keeps(each) is not None for each in asked):
        raise UserError(f"strategy: it asks again for {asked[0]}, which is known; return none to end the search")


def _step_each(known: Known, most: int) -> list[Candidate]:
    return [found for each in known.importances if (found := step(known, each, most)) is not None]


def _pass(known: Known, importance: str, level: int) -> Candidate | None:
    """Return the ticket of an importance at a level, pruned from its sparsest one; None if it is refuted there."""
    kept, refuted = known.bounds(importance)
    if level > known.levels or level >= refuted:
        return None
    return Candidate(importance, (*(kept.path if kept else ()), level))


def _next_to_judge(known: Known, best: Candidate) -> list[Candidate]:
    """Return the ticket of the level after the best one, if there are judges who have not judged that level."""
    level = best.level + 1
    same = [each for each in known.gains if (each.importance, each.level) == (best.importance, level)]
    if known.trials == 1 or level > known.levels or any(map(known.judged, same)):
        return []
    return [replace(best, path=(*best.path, level))]


def _rank(known: Known, importance: str) -> tuple[float, ...]:
    """Return the rank of an importance in a race, which is higher for a better one."""
    kept, refuted = known.bounds(importance)
    gain = known.gains[kept][0] if kept else 0.0
    tries = [gains[0] for each, gains in known.gains.items() if each.importance == importance and each.level == refuted]
    return _level(kept), gain, refuted, max(tries, default=-math.inf)


def _level(candidate: Candidate | None) -> int:
    return candidate.level if candidate else 0

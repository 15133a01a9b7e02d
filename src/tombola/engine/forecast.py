"""Forecasts: the duration of trainings by density, and the time until workers have finished chains of trainings.

All of these are computed from speeds and from the progress of chains; `tombola.engine.estimate` measures the speeds.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from tombola.study.chains import Chain, Need, Progress
from tombola.study.planner import Planner
from tombola.study.trainings import Training

_RECOMPUTED_EVERY = 1.0  # seconds
_SAME_DENSITY = 0.01  # relative; a level's density is rounded to a whole number of connections
_OBSERVED_FOR = 1.0  # seconds that a training must have run for before its iterations are timed


@dataclass(frozen=True)
class Speed:
    """The speed of trainings.

    Args:
        iteration: the seconds of one iteration, by density in 0..1.
        beside: the seconds of a training outside its iterations: loading, testing, storing.
        start: the seconds until the workers' processes run.
        source: the source of these numbers, for the user.
    """

    iteration: Mapping[float, float]
    beside: float
    start: float
    source: str

    @cached_property
    def iteration_at(self) -> Callable[[float], float]:
        """The seconds of an iteration at a density: linear between the known densities, else constant."""
        known = sorted(self.iteration)
        seconds = [self.iteration[density] for density in known]
        return cache(lambda density: float(np.interp(density, known, seconds)))  # most trainings share their density

    def training(self, density: float, iterations: int, learning: int = 0) -> float:
        """Return the seconds of a training with this density and number of iterations.

        Before it, its mask is learned in as many iterations of the dense network as `learning` says.
        """
        return self.beside + iterations * self.iteration_at(density) + learning * self.iteration_at(1.0)


@dataclass(frozen=True)
class Timing:
    """The measured times of one training.

    Args:
        density: the density of its mask, in 0..1.
        iteration: the seconds of an iteration.
        beside: the seconds outside its iterations; None if they are not known yet.
    """

    density: float
    iteration: float
    beside: float | None = None

    @classmethod
    def of(cls, density: float, record: Mapping[str, Any]) -> Timing | None:
        """Read the times from the record of a training; return None if it has no time of an iteration."""
        each, seconds, iterations = (record.get(name) for name in ("seconds_per_iteration", "seconds", "iterations"))
        if each is None or seconds is None or iterations is None:
            return None
        return cls(density, each, max(0.0, seconds - each * iterations))


def refine(speed: Speed, timings: Iterable[Timing]) -> Speed:
    """Correct a speed by the measured times of trainings.

    At a density that was measured, the new time of an iteration is the median of the measured times. At the other
    densities of `speed`, it is the earlier time multiplied by the ratio of measured to earlier time. This ratio is
    known at the densities that were measured and that `speed` has too; it is interpolated between them. Other measured
    densities give no ratio: between two densities of `speed` a network may change to sparse layers, so an interpolated
    earlier time would be wrong.

    >>> before = Speed({1.0: 10.0, 0.1: 2.0}, beside=1.0, start=0.0, source="timed")
    >>> refine(before, [Timing(1.0, 5.0, 3.0)])
    Speed(iteration={1.0: 5.0, 0.1: 1.0}, beside=3.0, start=0.0, source='timed')
    """
    found: dict[float, list[float]] = {}
    beside = []
    for timing in timings:
        found.setdefault(timing.density, []).append(timing.iteration)
        if timing.beside is not None:
            beside.append(timing.beside)
    if not found:
        return speed
    medians = {density: statistics.median(found[density]) for density in sorted(found)}
    ratios = {
        density: medians[near] / each
        for density, each in sorted(speed.iteration.items())
        for near in medians
        if abs(near / density - 1) < _SAME_DENSITY
    }
    followed = {
        density: each * float(np.interp(density, list(ratios), list(ratios.values()))) if ratios else each
        for density, each in speed.iteration.items()
    }
    return replace(
        speed, iteration={**followed, **medians}, beside=statistics.median(beside) if beside else speed.beside
    )


@dataclass(frozen=True)
class Step:
    """A training that is still to be done, after the learning of its mask, if that is learned and not known yet.

    Its `name` is the same in all chains that share it.
    """

    name: tuple[str, int]
    seconds: float
    density: float = 1.0


def steps_ahead(planner: Planner, chain: Chain, progress: Progress, speed: Speed) -> list[Step]:
    """Return the trainings that a chain still needs, in their order: those that are known, then its last levels."""
    if progress.waits_for is None:
        return []
    known = [need for need in progress.needs if isinstance(need, Training)]
    steps = [
        Step((need.key, 0), speed.training(need.mask.density, need.end - need.begin), need.mask.density)
        for need in known
    ]
    levels, named = planner.levels(chain), str(chain)
    for number in range(len(known), progress.remaining):
        level = levels[len(levels) - progress.remaining + number]
        length = planner.length(chain, level)
        dense = f"{progress.waits_for.key} {length}"  # shared by several chains, after the rewind point
        name = (named if level else dense, level)
        density = (1 - planner.study.fraction) ** level
        learning = planner.learning_length(chain.importance) if level > 0 else 0
        steps.append(Step(name, speed.training(density, length, learning), density))
    return steps


def paths_ahead(planner: Planner, chain: Chain, progress: Progress, speed: Speed) -> list[list[Step]]:
    """Return the trainings that a chain still needs, in sequences that can be done side by side."""
    steps = steps_ahead(planner, chain, progress, speed)
    if planner.study.score_at == "end" or not steps:
        return [steps]
    first = steps[:1] if progress.shared == 2 else []  # the rewind point comes before all levels
    return [[*first, step] for step in steps[len(first) :]]


def makespan(
    chains: Sequence[Sequence[Step]], workers: int, running: Mapping[tuple[str, int], float] | None = None
) -> float:
    """Return the seconds until workers have done all steps, started in the order of `run`: longest chain first.

    Args:
        chains: the missing steps of each chain, in their order.
        workers: the number of workers.
        running: the steps that are running, with the remaining seconds of each.

    >>> a, b, c = (Step((name, 0), 1.0) for name in "abc")
    >>> makespan([[a, b], [a, c]], 1), makespan([[a, b], [a, c]], 2), makespan([[a, b], [a, c]], 9)
    (3.0, 2.0, 2.0)
    >>> makespan([[a, b], [a, c]], 2, {("a", 0): 0.25})
    1.25
    """
    at_work = [(seconds, name) for name, seconds in (running or {}).items()]
    heapq.heapify(at_work)
    begun = {name for _, name in at_work}
    waiting: dict[tuple[str, int], list[int]] = {}  # step -> the chains whose next step it is
    place = [0] * len(chains)
    ready: list[tuple[int, int, float, tuple[str, int]]] = []

    def wait(group: Iterable[int]) -> None:
        """Add chains to the lists of those that wait for their next steps."""
        for number in group:
            if place[number] < len(chains[number]):
                step = chains[number][place[number]]
                waiting.setdefault(step.name, []).append(number)
                if step.name not in begun:
                    length = len(chains[number]) - place[number]
                    heapq.heappush(ready, (-length, number, step.seconds, step.name))

    wait(range(len(chains)))
    now = 0.0
    while True:
        while ready and len(at_work) < workers:
            _, _, seconds, name = heapq.heappop(ready)
            if name not in begun:
                begun.add(name)
                heapq.heappush(at_work, (now + seconds, name))
        if not at_work:
            return now
        now, done = heapq.heappop(at_work)
        group = waiting.pop(done, [])
        for number in group:
            place[number] += 1
        wait(group)


@dataclass
class _Mark:
    """The iteration of a running training at the first and at the last observation that it had advanced."""

    begin: int
    began: float
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None

    def advance(self, iteration: int, now: float) -> None:
        """Note that the training has reached an iteration."""
        if iteration > (self.last[0] if self.last else self.begin):
            self.last = iteration, now
            self.first = self.first or self.last

    def iteration(self) -> float | None:
        """Return the seconds of an iteration; None if the training was not observed for long enough."""
        if self.first is None or self.last is None or self.last[1] - self.first[1] < _OBSERVED_FOR:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])


class Forecast:
    """The estimate of the time that a run still takes. It improves with each training that has finished or run a while.

    Args:
        planner: the planner of the study.
        workers: the number of workers.
        speed: the speed of the trainings as known before the run; None if nothing is known.
        clock: a function that returns the time in seconds.
    """

    def __init__(
        self, planner: Planner, workers: int, speed: Speed | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._planner = planner
        self._workers = workers
        self._prior = speed or Speed({}, 0.0, 0.0, "nothing is known yet")
        self._clock = clock
        self._timings: list[Timing] = []
        self._marks: dict[str, _Mark] = {}
        self._begun = False
        self._computed: tuple[float, float] | None = None  # time of the last computation, and the seconds left then

    def add(self, training: Training, record: Mapping[str, Any]) -> None:
        """Add the measured times of a finished training.

        Args:
            training: the training.
            record: the stored record of when and how long it ran.
        """
        if timing := Timing.of(training.mask.density, record):
            self._timings.append(timing)

    def seconds_left(self, chains: Mapping[Chain, Progress], running: Mapping[str, tuple[Need, int]]) -> float | None:
        """Return the seconds until all chains are finished; None if no speed is known yet.

        Args:
            chains: the progress of each chain.
            running: the running jobs and the iteration that each training has reached, by key.
        """
        now = self._clock()
        trainings = {key: (need, at) for key, (need, at) in running.items() if isinstance(need, Training)}
        self._watch(trainings, now)
        if self._computed is not None and now - self._computed[0] < _RECOMPUTED_EVERY:
            return max(0.0, self._computed[1] - (now - self._computed[0]))
        speed = refine(self._prior, [*self._timings, *self._time_running(trainings)])
        if not speed.iteration:
            return None
        at_work = {(key, 0): self._left(key, training, speed, now) for key, (training, _) in trainings.items()}
        ahead = [
            path for chain, progress in chains.items() for path in paths_ahead(self._planner, chain, progress, speed)
        ]
        seconds = makespan(ahead, self._workers, at_work) + (0.0 if self._begun else speed.start)
        self._computed = now, seconds
        return seconds

    def _watch(self, running: Mapping[str, tuple[Training, int]], now: float) -> None:
        """Note the iterations of the running trainings; discard the last computation if other trainings run now."""
        if running.keys() != self._marks.keys():
            self._computed = None
        self._begun = self._begun or bool(running)
        self._marks = {key: self._marks.get(key) or _Mark(iteration, now) for key, (_, iteration) in running.items()}
        for key, (_, iteration) in running.items():
            self._marks[key].advance(iteration, now)

    def _time_running(self, running: Mapping[str, tuple[Training, int]]) -> list[Timing]:
        """Return the measured times of the running trainings."""
        rates = ((training, self._marks[key].iteration()) for key, (training, _) in running.items())
        return [Timing(training.mask.density, rate) for training, rate in rates if rate is not None]

    def _left(self, key: str, training: Training, speed: Speed, now: float) -> float:
        """Return the seconds that a running training still takes."""
        mark = self._marks[key]
        iteration, since = mark.last or (mark.begin, mark.began)
        whole = speed.training(training.mask.density, training.end - iteration)
        return max(0.0, whole - (now - since))

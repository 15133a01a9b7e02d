"""Estimates: how long a study will take and how much disk."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tombola.engine.job import Job
from tombola.engine.local import LocalWorkers
from tombola.engine.run import count_remaining
from tombola.engine.workers import At
from tombola.pruning.mask import Mask
from tombola.study.planner import Chain, Planner, Progress
from tombola.study.tickets import Tickets
from tombola.training.evaluation import predict

_TIMED_SECONDS = 1.0
_PATIENCE = 60.0  # seconds after which a training that has not come far enough to be timed is taken as it is
_MOST_TIMED_AT_ONCE = 8


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Args:
        chains: for each chain the tickets that are there and those to be found.
        existing: trainings that are there.
        to_train: trainings to do, as far as can be told: chains that come to the same mask share more.
        seconds_each: of one training, on average.
        source: how that is known.
        seconds: of the whole on the workers asked for.
        critical: the chain that takes longest, in seconds: no number of workers makes it shorter.
        bytes: of the results to come.
    """

    chains: tuple[tuple[Chain, int, int], ...]
    existing: int
    to_train: int
    seconds_each: float
    source: str
    seconds: float
    critical: tuple[Chain, float] | None
    bytes: int


@dataclass(frozen=True)
class Speed:
    """How fast trainings are.

    Args:
        iteration: seconds of one, by density.
        beside: seconds of a training beside its iterations: loading, testing, storing.
        start: seconds until workers are there.
        source: how that is known.
    """

    iteration: dict[float, float]
    beside: float
    start: float
    source: str

    def training(self, density: float, iterations: int) -> float:
        """Return the seconds of a training; between densities that are known, speed changes evenly."""
        known = sorted(self.iteration)
        return self.beside + iterations * float(np.interp(density, known, [self.iteration[one] for one in known]))


@dataclass(frozen=True)
class Step:
    """A training to come: `name` is the same for chains that share it."""

    name: tuple[str, int]
    seconds: float


def estimate(planner: Planner, workers: int, directory: Path | None = None) -> Estimate:
    """Estimate a study's run from the trainings of it that are done, or from a few iterations timed now.

    Args:
        planner: of the study.
        workers: how many.
        directory: where data sets lie.
    """
    progress = Tickets(planner).all()
    keys = {training.key for p in progress.values() for training in p.trainings}
    to_train = count_remaining(list(progress.values()))
    chains = tuple((chain, len(p.tickets), planner.study.levels + 1 - len(p.tickets)) for chain, p in progress.items())
    if not to_train:
        return Estimate(chains, len(keys), 0, 0.0, "nothing to do", 0.0, None, 0)
    speed = _speed(planner, list(progress.values()), workers, directory)
    ahead = {chain: _ahead(planner, chain, p, speed) for chain, p in progress.items() if p.waits_for is not None}
    total = sum(step.seconds for step in {step.name: step for steps in ahead.values() for step in steps}.values())
    longest = max(ahead, key=lambda chain: sum(step.seconds for step in ahead[chain]))
    seconds = speed.start + makespan(list(ahead.values()), workers)
    missing = [
        level for p in progress.values() if p.waits_for for level in range(len(p.tickets), planner.study.levels + 1)
    ]
    sizes = sum(_bytes(planner, level) for level in missing) * to_train // max(1, len(missing))
    critical = longest, sum(step.seconds for step in ahead[longest])
    return Estimate(chains, len(keys), to_train, total / to_train, speed.source, seconds, critical, sizes)


def makespan(chains: Sequence[Sequence[Step]], workers: int) -> float:
    """Return the seconds that workers take for chains of steps, each begun as `run` begins them: longest chain first.

    >>> a, b, c = (Step((name, 0), 1.0) for name in "abc")
    >>> makespan([[a, b], [a, c]], 1), makespan([[a, b], [a, c]], 2), makespan([[a, b], [a, c]], 9)
    (3.0, 2.0, 2.0)
    """
    place = [0] * len(chains)
    running: list[tuple[float, tuple[str, int]]] = []
    begun: set[tuple[str, int]] = set()
    now = 0.0
    while True:
        ready = {
            chain[at].name: (len(chain) - at, chain[at].seconds)
            for chain, at in sorted(zip(chains, place, strict=True), key=lambda pair: len(pair[0]) - pair[1])
            if at < len(chain) and chain[at].name not in begun
        }
        for name, (_, seconds) in sorted(ready.items(), key=lambda item: -item[1][0])[: workers - len(running)]:
            begun.add(name)
            heapq.heappush(running, (now + seconds, name))
        if not running:
            return now
        now, done = heapq.heappop(running)
        place = [at + (at < len(chain) and chain[at].name == done) for chain, at in zip(chains, place, strict=True)]


def _ahead(planner: Planner, chain: Chain, progress: Progress, speed: Speed) -> list[Step]:
    """Return the trainings that a chain still needs, in order."""
    assert progress.waits_for is not None
    rewind, end = planner.study.recipe.rewind, planner.end
    first = planner.study.levels + 1 - progress.remaining  # level of the first, or -1 for the rewind point
    steps = []
    for number, level in enumerate(range(first, planner.study.levels + 1)):
        name = (progress.waits_for.key, number) if number < progress.shared else (str(chain), level)
        density = (1 - planner.study.fraction) ** max(0, level)
        steps.append(Step(name, speed.training(density, end - rewind if level >= 0 else rewind)))
    return steps


def _speed(planner: Planner, chains: Sequence[Progress], workers: int, directory: Path | None) -> Speed:
    """Find out how fast trainings are: from those of the study that are done, or by timing a few iterations."""
    by_density: dict[float, list[float]] = {}
    beside = []
    seen: set[str] = set()
    for progress in chains:
        for training in progress.trainings:
            record = planner.store.results.record(training.key)
            each = record.get("seconds_per_iteration")
            if each is not None and training.key not in seen:
                seen.add(training.key)
                by_density.setdefault(training.mask.density, []).append(each)
                beside.append(max(0.0, record["seconds"] - each * record["iterations"]))
    if by_density:
        _, start = _timed(planner, planner.dense, 1, directory)
        known = {density: statistics.median(times) for density, times in by_density.items()}
        return Speed(known, statistics.median(beside), start, f"from the {len(seen)} that are done")
    known, start = {}, 0.0
    count = min(workers, _MOST_TIMED_AT_ONCE)
    for level in sorted({0, planner.study.levels // 2, planner.study.levels}):
        density = (1 - planner.study.fraction) ** level
        known[density], started = _timed(planner, _thinned(planner.dense, density), count, directory)
        start = max(start, started)  # the first time: then the process that workers are copies of is there
    return Speed(known, _testing(planner), start, "from a few iterations timed now")


def _timed(planner: Planner, mask: Mask, count: int, directory: Path | None) -> tuple[float, float]:
    """Return the seconds of an iteration where `count` trainings go side by side, and those until they go."""
    seed = planner.study.seeds[0]
    endless = 10**9
    training = planner.training(seed, planner.initial(planner.chains[0].seed), mask, 0, endless)
    marks: dict[str, list[tuple[int, float]]] = {f"{number}": [] for number in range(count)}
    with LocalWorkers(count, planner.study.task, directory, None) as workers:
        began = time.perf_counter()
        for key in marks:
            workers.submit(replace(Job.of(training, planner.study), key=key))
        while time.perf_counter() - began < _PATIENCE:
            for event in workers.events(timeout=0.1):
                if not isinstance(event, At):
                    marks[event.key] += [(0, began), (1, time.perf_counter())]  # it diverged, or cannot be done
                else:
                    marks[event.key].append((event.iteration, time.perf_counter()))
            if all(len(at) > 1 and at[-1][1] - at[0][1] > _TIMED_SECONDS for at in marks.values()):
                break
    each = [(at[-1][1] - at[0][1]) / max(1, at[-1][0] - at[0][0]) for at in marks.values() if len(at) > 1]
    seconds = statistics.median(each) if each else _PATIENCE
    starts = [at[0][1] - began - at[0][0] * seconds for at in marks.values() if at]
    return seconds, max(0.0, statistics.median(starts)) if starts else 0.0


def _thinned(mask: Mask, density: float) -> Mask:
    """Return a mask in which about this share of the connections is alive, at random."""
    generator = torch.Generator().manual_seed(0)
    return Mask.from_tensors(
        {name: torch.rand(shape, generator=generator) < density for name, shape in mask.shapes.items()}
    )


def _testing(planner: Planner) -> float:
    """Return the seconds that testing takes after a training, from a part of the test set."""
    data = planner.problem.data
    few = min(500, len(data.test_inputs))
    part = replace(data, test_inputs=data.test_inputs[:few], test_labels=data.test_labels[:few])
    model = planner.problem.build()
    predict(model, part)
    began = time.perf_counter()
    predict(model, part)
    return (time.perf_counter() - began) * len(data.test_inputs) / few


def _bytes(planner: Planner, level: int) -> int:
    """Return about how much a result of a level takes: weights alive, a bit a connection, losses, all the rest."""
    state = planner.initial(planner.study.seeds[0]).load()
    rest = sum(t.nbytes for name, t in state.items() if name not in planner.dense)
    alive = planner.dense.total * (1 - planner.study.fraction) ** level
    losses = 4 * (planner.end - planner.study.recipe.rewind)
    return int(4 * alive + planner.dense.total / 4 + rest + losses) + 4000

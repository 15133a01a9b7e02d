"""Estimates: how much time and disk space a study will take."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tombola.engine.forecast import Speed, Step, Timing, makespan, paths_ahead, refine, steps_ahead
from tombola.engine.here import WorkersHere
from tombola.engine.job import Job, Outcome
from tombola.engine.local import LocalWorkers
from tombola.engine.run import count_remaining
from tombola.engine.workers import At, Failed, Workers
from tombola.errors import DamagedResultError, UserError
from tombola.inputs import select
from tombola.pruning.mask import Mask
from tombola.study.chains import Chain, Progress
from tombola.study.planner import Planner
from tombola.study.rewind_point import Point
from tombola.study.tickets import Tickets
from tombola.training.evaluation import predict

_TIMED_SECONDS = 1.0
_PATIENCE = 60.0  # seconds to wait for a training that is timed
_MOST_TIMED_AT_ONCE = 8
_WORTH_TIMING = 60.0  # seconds of a run from which on a few seconds of timing do not matter
_STEP_OF_FORWARD = 3.0  # approximate cost of a dense training step, in forward passes


class DivergedError(Exception):
    """A training diverged while it was timed."""


@dataclass(frozen=True)
class Estimate:
    """The expected work, time and disk space of a run.

    Args:
        chains: (chain, number of tickets that are trained, number of those that are not) for each chain.
        existing: the number of stored trainings.
        to_train: the number of missing trainings. It may turn out lower, as chains that reach the same mask share them.
        seconds_each: the mean duration of a training in seconds; None if a training diverges while it is timed.
        source: the source of the durations, for the user.
        seconds: the duration of the whole run in seconds, on the given number of workers; None as above.
        critical: the chain that takes longest and its seconds; more workers cannot make the run shorter than this.
        bytes: the size of the results to come.
    """

    chains: tuple[tuple[Chain, int, int], ...]
    existing: int
    to_train: int
    seconds_each: float | None
    source: str
    seconds: float | None
    critical: tuple[Chain, float] | None
    bytes: int


def estimate(
    planner: Planner,
    workers: int,
    directory: Path | None = None,
    *,
    here: bool = False,
    beside: Tickets | None = None,
) -> Estimate:
    """Estimate the run of a study from its finished trainings, or from a few iterations that are timed now.

    Args:
        planner: the planner of the study.
        workers: the number of workers.
        directory: the folder of the data sets.
        here: whether only this process can train, by functions of its own.
        beside: the study that a further analysis is about, whose finished trainings tell the speed, too.
    """
    progress = Tickets(planner).all()
    keys = {training.key for p in progress.values() for training in p.trainings}
    to_train = count_remaining(list(progress.values()))
    rewind, levels = planner.study.recipe.rewind, planner.study.levels + 1
    trained = {chain: sum(training.end > rewind for training in p.trainings) for chain, p in progress.items()}
    chains = tuple((chain, there, levels - there) for chain, there in trained.items())
    if not to_train:
        return Estimate(chains, len(keys), 0, 0.0, "nothing to do", 0.0, None, 0)

    def list_ahead(speed: Speed) -> list[tuple[Chain, list[Step]]]:
        return [
            (chain, path) for chain, p in progress.items() for path in paths_ahead(planner, chain, p, speed) if path
        ]

    def count_bytes(ahead: Sequence[tuple[Chain, Sequence[Step]]]) -> int:
        densities = Counter(step.density for step in _each_once(ahead))
        return sum(count * result_bytes(planner, density) for density, count in densities.items())

    known = [*progress.values(), *(beside.all().values() if beside else ())]
    try:
        speed = measure_speed(planner, known, workers, directory, here=here)
    except DivergedError as error:
        ahead = list_ahead(Speed({1.0: 0.0}, 0.0, 0.0, ""))
        return Estimate(chains, len(keys), to_train, None, str(error), None, None, count_bytes(ahead))
    ahead = list_ahead(speed)
    total = sum(step.seconds for step in _each_once(ahead))
    lengths = [(chain, sum(step.seconds for step in steps)) for chain, steps in ahead]
    seconds = speed.start + makespan([steps for _, steps in ahead], workers)
    critical = max(lengths, key=lambda each: each[1])
    size = count_bytes(ahead)
    return Estimate(chains, len(keys), to_train, total / to_train, speed.source, seconds, critical, size)


@dataclass(frozen=True)
class PointEstimate:
    """The expected work of one iteration that is tried as the rewind point.

    Args:
        iteration: the iteration.
        existing: the number of stored trainings.
        to_train: the number of missing trainings.
        seconds: the duration of the missing trainings on the given number of workers; None if one diverges while it is
            timed.
    """

    iteration: int
    existing: int
    to_train: int
    seconds: float | None


def estimate_points(
    tickets: Tickets, points: Sequence[Point], workers: int, directory: Path | None = None
) -> tuple[list[PointEstimate], str]:
    """Estimate the trainings that find the rewind point, which are done one iteration after the other.

    Args:
        tickets: the tickets of the study.
        points: of `tombola.study.rewind_point.plan_rewind_points`.
        workers: the number of workers.
        directory: the folder of the data sets.

    Returns:
        The estimate of each point, and the source of the durations, for the user.
    """
    works = []
    for point in points:
        planner, places = point.plan_orders()
        own, orders = Tickets(point.planner).all(), Tickets(planner).all()
        later = [  # trainings with another data order, whose networks are not there yet
            (chain.seed, level) for chain in point.chains for level in point.levels if (chain.seed, level) not in places
        ]
        works.append((point, own, planner, orders, later))
    known = [progress for _, own, _, orders, _ in works for progress in (*own.values(), *orders.values())]
    counts = [
        (
            len({training.key for progress in (*own.values(), *orders.values()) for training in progress.trainings}),
            count_remaining([*own.values()]) + count_remaining([*orders.values()]) + len(later),
        )
        for _, own, _, orders, later in works
    ]
    speed, source = None, "nothing to do"
    if any(to_train for _, to_train in counts):
        try:
            speed = measure_speed(tickets.planner, [*known, *tickets.all().values()], workers, directory, here=False)
            source = speed.source
        except DivergedError as error:
            source = str(error)
    found = []
    for (point, own, planner, orders, later), (existing, to_train) in zip(works, counts, strict=True):
        seconds = None
        if speed is not None:
            each = point.planner.end - point.iteration
            paths = [
                *([step] for progress in orders.items() for step in steps_ahead(planner, *progress, speed)),
                *(
                    [Step((str(seed), level), speed.training((1 - tickets.study.fraction) ** level, each))]
                    for seed, level in later
                ),
            ]
            mine = [path for progress in own.items() for path in paths_ahead(point.planner, *progress, speed)]
            seconds = makespan(mine, workers) + makespan(paths, workers)
        found.append(PointEstimate(point.iteration, existing, to_train, seconds if to_train else 0.0))
    return found, source


def _each_once(ahead: Iterable[tuple[Chain, Sequence[Step]]]) -> list[Step]:
    """Return the trainings of several chains, those that chains share once."""
    return list({step.name: step for _, steps in ahead for step in steps}.values())


def prior_speed(planner: Planner, workers: int, directory: Path | None = None) -> Speed | None:
    """Return the speed of a study's trainings as far as it is known before the run; None if nothing is left to do.

    The speed comes from the finished trainings of the study, or from a few iterations that are timed now. If the run
    takes less than about a minute, nothing is timed, so as not to delay it: the speed then has no times of iterations.

    Args:
        planner: the planner of the study.
        workers: the number of workers.
        directory: the folder of the data sets.
    """
    progress: list[Progress] = []
    damaged = 0
    for chain in [*planner.chains, *planner.repeats]:
        try:
            progress.append(planner.progress(chain))
        except DamagedResultError:  # the run repeats it
            damaged = planner.study.levels + 1
    to_train = max(count_remaining(progress), damaged)
    if not to_train:
        return None
    if recorded := speed_of(planner, progress):
        return recorded
    testing = _time_testing(planner)
    step = _STEP_OF_FORWARD * testing * planner.study.recipe.batch_size / planner.problem.data.test_examples
    if to_train * planner.end * step / workers < _WORTH_TIMING:
        return Speed({}, testing, 0.0, "not known yet")
    with suppress(DivergedError):
        return _timed_speed(planner, workers, directory, testing)
    return None


def recorded_speed(tickets: Tickets) -> Speed | None:
    """Return the speed of a study's stored trainings, from their records; None if there are none."""
    return speed_of(tickets.planner, list(tickets.all().values()))


def dense_speed(planner: Planner, directory: Path | None = None) -> Speed:
    """Return the speed of trainings of the dense network, from a few iterations that are timed now.

    Args:
        planner: the planner of the study.
        directory: the folder of the data sets.
    """
    each, start = _time_iterations(planner, planner.dense, 1, directory, here=False)
    return Speed({1.0: each}, _time_testing(planner), start, "from a few iterations timed now")


def measure_speed(
    planner: Planner, chains: Sequence[Progress], workers: int, directory: Path | None, *, here: bool
) -> Speed:
    """Return the speed of trainings, from the finished trainings of chains or from a few iterations timed now.

    Raises:
        DivergedError: if a training diverges while it is timed.
    """
    if recorded := speed_of(planner, chains):
        _, start = _time_iterations(planner, planner.dense, 1, directory, here=here)
        return replace(recorded, start=start)
    return _timed_speed(planner, workers, directory, _time_testing(planner), here=here)


def speed_of(planner: Planner, chains: Iterable[Progress]) -> Speed | None:
    """Return the speed of the finished trainings of chains, from their records; None if there are none."""
    timings: dict[str, Timing] = {}
    for progress in chains:
        for training in progress.trainings:
            timing = Timing.of(training.mask.density, planner.store.results.record(training.key))
            if timing is not None:
                timings[training.key] = timing
    source = f"from the {len(timings)} finished trainings"
    return refine(Speed({}, 0.0, 0.0, source), timings.values()) if timings else None


def _timed_speed(
    planner: Planner, workers: int, directory: Path | None, testing: float, *, here: bool = False
) -> Speed:
    """Time iterations at some of the levels and return the speed of trainings."""
    known, start = {}, 0.0
    count = min(workers, _MOST_TIMED_AT_ONCE)
    for level in sorted({0, planner.study.levels // 2, planner.study.levels}):
        density = (1 - planner.study.fraction) ** level
        known[density], started = _time_iterations(planner, _thin(planner.dense, density), count, directory, here=here)
        start = max(start, started)  # only the first includes the start of the process that workers are forked from
    return Speed(known, testing, start, "from a few iterations timed now")


def _time_iterations(
    planner: Planner, mask: Mask, count: int, directory: Path | None, *, here: bool
) -> tuple[float, float]:
    """Return the seconds of an iteration while `count` trainings run in parallel, and the seconds until they start."""
    seed = planner.study.seeds[0]
    endless = 10**9
    training = planner.training(seed, planner.initial(planner.chains[0].seed), mask, 0, endless)
    marks: dict[str, list[tuple[int, float]]] = {f"{number}": [] for number in range(count)}
    opened: Workers
    if here:
        opened = WorkersHere(planner.problem, planner.store)
    else:
        opened = LocalWorkers(count, planner.study.task, directory, None)
    with opened as workers:
        began = time.perf_counter()
        for key in marks:
            workers.submit(replace(Job.of(training, planner.study), key=key))
        while time.perf_counter() - began < _PATIENCE:
            for event in workers.events(timeout=0.1):
                if isinstance(event, Failed):
                    raise UserError(f"a training that was tried out failed: {event.reason}")
                if isinstance(event, Outcome):
                    at = event.history["diverged_at"]
                    raise DivergedError(f"a training that was timed diverged at iteration {at}; lower recipe.lr")
                if isinstance(event, At):
                    marks[event.key].append((event.iteration, time.perf_counter()))
            if all(len(at) > 1 and at[-1][1] - at[0][1] > _TIMED_SECONDS for at in marks.values()):
                break
    each = [(at[-1][1] - at[0][1]) / max(1, at[-1][0] - at[0][0]) for at in marks.values() if len(at) > 1]
    seconds = statistics.median(each) if each else _PATIENCE
    starts = [at[0][1] - began - at[0][0] * seconds for at in marks.values() if at]
    return seconds, max(0.0, statistics.median(starts)) if starts else 0.0


def _thin(mask: Mask, density: float) -> Mask:
    """Return a random mask of about this density, with the shapes of `mask`."""
    generator = torch.Generator().manual_seed(0)
    return Mask.from_tensors(
        {name: torch.rand(shape, generator=generator) < density for name, shape in mask.shapes.items()}
    )


def _time_testing(planner: Planner) -> float:
    """Return the seconds of the test after a training, extrapolated from a part of the test set."""
    data = planner.problem.data
    few = min(500, data.test_examples)
    part = replace(
        data, test_inputs=select(data.test_inputs, slice(few)), test_labels=select(data.test_labels, slice(few))
    )
    model, forward = planner.problem.build(), planner.problem.forward
    predict(model, part, forward)
    began = time.perf_counter()
    predict(model, part, forward)
    return (time.perf_counter() - began) * data.test_examples / few


def result_bytes(planner: Planner, density: float) -> int:
    """Return the approximate size of a result in bytes: alive weights, mask, losses and other tensors."""
    state = planner.initial(planner.study.seeds[0]).load()
    rest = sum(t.nbytes for name, t in state.items() if name not in planner.dense)
    alive = planner.dense.total * density
    losses = 4 * (planner.end - planner.study.recipe.rewind)
    return int(4 * alive + planner.dense.total / 4 + rest + losses) + 4000

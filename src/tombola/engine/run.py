"""Running a study: follow its chains, have done what they wait for, store it, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tombola.engine.forecast import Forecast, Speed
from tombola.engine.job import Job, Outcome
from tombola.engine.workers import At, Failed, Workers
from tombola.errors import UserError
from tombola.store.claims import Claims
from tombola.store.store import DamagedResultError
from tombola.study.planner import Chain, Planner, Progress, Training

_LOOKED_EVERY = 1.0  # seconds after which results and claims of other runs are looked at


@dataclass
class Status:
    """How far a run is; what a display shows.

    Args:
        total: trainings that the chains need and that were not there when the run began, as far as can be told.
        done: of these.
        chains: each chain's progress.
        running: iteration that each running training has come to, by its key.
        seconds_left: an estimate; None where nothing is known yet.
        notes: what the user should be told.
    """

    total: int
    done: int = 0
    chains: dict[Chain, Progress] = field(default_factory=dict)
    running: dict[str, tuple[Training, int]] = field(default_factory=dict)
    seconds_left: float | None = None
    notes: list[str] = field(default_factory=list)


def run(
    planner: Planner,
    workers: Workers,
    show: Callable[[Status, Training | None], None],
    chains: Sequence[Chain] | None = None,
    speed: Speed | None = None,
) -> Status:
    """Have every training done that the study needs and the store does not have.

    Trainings that another run on the same store is doing are left to it; their results are taken when they appear.

    Args:
        planner: follows the study's chains.
        workers: do the trainings.
        show: called now and then with how far the run is, and with the training that was just done, if one was.
        chains: which; by default all of the study's.
        speed: what is known of how fast the trainings are, see `tombola.engine.estimate.prior_speed`; the estimate of
            the time left begins with it.

    Raises:
        UserError: where a training cannot be done. What was done is in the store.
    """
    with Claims(planner.store.root) as claims:
        planner.store.sweep(claims.alone)
        wanted = [*planner.chains, *planner.repeats] if chains is None else chains
        status = _run(planner, workers, claims, show, wanted, speed)
        planner.store.sweep(claims.alone)  # what killed workers have left
        return status


def _run(
    planner: Planner,
    workers: Workers,
    claims: Claims,
    show: Callable[[Status, Training | None], None],
    chains: Sequence[Chain],
    speed: Speed | None,
) -> Status:
    status = Status(0)
    for chain in chains:
        _follow(planner, chain, status)
    _check(planner, status)
    status.total = remaining(list(status.chains.values()))
    forecast = Forecast(planner, workers.count, speed)
    status.seconds_left = forecast.seconds_left(status.chains, status.running)
    looked = 0.0
    show(status, None)  # before workers are started, which takes a while
    while waiting := _waiting(status):
        if time.monotonic() - looked > _LOOKED_EVERY:
            looked = time.monotonic()
            for key in waiting.keys() - status.running.keys():
                if key in planner.store:  # another run did it
                    _go_on(planner, key, status)
            waiting = _waiting(status)
        for training in sorted(waiting.values(), key=lambda t: -_remaining_behind(t, status)):
            if not workers.idle:
                break
            if training.key not in status.running and claims.take(training.key):
                if training.key in planner.store:  # another run did it, just now
                    claims.release(training.key)
                    _go_on(planner, training.key, status)
                    break
                status.running[training.key] = (training, training.begin)
                workers.submit(Job.of(training, planner.study))
        _say_who(status, claims, waiting)
        finished = None
        for event in workers.events(timeout=0.2):
            training, _ = status.running[event.key]
            match event:
                case At(key, iteration):
                    status.running[key] = (training, iteration)
                case Failed(_, reason):
                    raise UserError(f"the training {_describe(training, status)} failed: {reason}")
                case Outcome() as outcome:
                    record = {**outcome.record, **planner.about}
                    planner.store.put(training.key, training.identity, training.mask, outcome.trained, record)
                    planner.store.discard_checkpoint(training.key)
                    claims.release(training.key)
                    del status.running[training.key]
                    forecast.add(training, record)
                    _go_on(planner, training.key, status)
                    finished = training
            status.done = status.total - remaining(list(status.chains.values()))
            status.seconds_left = forecast.seconds_left(status.chains, status.running)
            show(status, finished)
        status.done = status.total - remaining(list(status.chains.values()))
        show(status, None)
    return status


def _say_who(status: Status, claims: Claims, waiting: dict[str, Training]) -> None:
    """Note once who is doing what this run waits for, where it has nothing else to do."""
    if status.running:
        return
    for key in waiting:
        if (owner := claims.owner(key)) and (note := f"{owner} is at work on this study too") not in status.notes:
            status.notes.append(note)


def remaining(chains: list[Progress]) -> int:
    """Return how many trainings chains still need; one that several wait for counts once.

    Before level 0 is there, chains of one seed share all up to it.
    """
    groups: dict[str, list[Progress]] = {}
    for progress in chains:
        if progress.waits_for is not None:
            groups.setdefault(progress.waits_for.key, []).append(progress)
    count = 0
    for group in groups.values():
        count += group[0].shared + sum(progress.remaining - progress.shared for progress in group)
    return count


def _go_on(planner: Planner, key: str, status: Status) -> None:
    """Follow the chains that waited for a training."""
    for chain, progress in list(status.chains.items()):
        if progress.waits_for is not None and progress.waits_for.key == key:
            _follow(planner, chain, status)


def _follow(planner: Planner, chain: Chain, status: Status) -> None:
    """Follow a chain as far as results are there; a damaged one is removed, to be done again."""
    while True:
        try:
            status.chains[chain] = planner.progress(chain)
            return
        except DamagedResultError as damage:
            status.notes.append(str(damage))
            planner.store.discard(damage.key)


def _check(planner: Planner, status: Status) -> None:
    """Read every byte of what is there of the chains; a damaged result is removed, to be done again."""
    intact: set[str] = set()
    for chain in status.chains:
        for key in planner.keys(chain):
            try:
                if key not in intact:
                    planner.store.check(key)
                intact.add(key)
            except DamagedResultError as damage:
                status.notes.append(str(damage))
                planner.store.discard(key)
    for chain in status.chains:
        _follow(planner, chain, status)


def _waiting(status: Status) -> dict[str, Training]:
    waited_for = (progress.waits_for for progress in status.chains.values())
    return {training.key: training for training in waited_for if training is not None}


def _remaining_behind(training: Training, status: Status) -> int:
    """The longest chain of trainings that begins with this one."""
    return max(p.remaining for p in status.chains.values() if p.waits_for and p.waits_for.key == training.key)


def _describe(training: Training, status: Status) -> str:
    for chain, progress in status.chains.items():
        if progress.waits_for is not None and progress.waits_for.key == training.key:
            return f"of {chain}, level {len(progress.tickets)}"
    return training.key[:12]

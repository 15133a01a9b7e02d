"""Running a study: follow its chains, have done what they wait for, store it, go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tombola.engine.job import Job, Outcome
from tombola.engine.local import At, Failed, LocalWorkers
from tombola.errors import UserError
from tombola.planning import Chain, Planner, Progress, Training
from tombola.store import DamagedResultError


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


def run(planner: Planner, workers: LocalWorkers, show: Callable[[Status, Training | None], None]) -> Status:
    """Have every training done that the study needs and the store does not have.

    Args:
        planner: follows the study's chains.
        workers: do the trainings.
        show: called now and then with how far the run is, and with the training that was just done, if one was.

    Raises:
        UserError: where a training cannot be done. What was done is in the store.
    """
    status = Status(0)
    for chain in [*planner.chains, *planner.repeats]:
        _follow(planner, chain, status)
    status.total = remaining(list(status.chains.values()))
    began = time.monotonic()
    while waiting := _waiting(status):
        for training in sorted(waiting.values(), key=lambda t: -_remaining_behind(t, status)):
            if training.key not in status.running and workers.idle:
                status.running[training.key] = (training, training.begin)
                workers.submit(Job.of(training, planner.study))
        finished = None
        for event in workers.events(timeout=0.2):
            training, _ = status.running[event.key]
            match event:
                case At(key, iteration):
                    status.running[key] = (training, iteration)
                case Failed(_, reason):
                    raise UserError(f"the training {_describe(training, status)} failed: {reason}")
                case Outcome() as outcome:
                    planner.store.put(training.key, training.identity, training.mask, outcome.trained, outcome.record)
                    planner.store.discard_checkpoint(training.key)
                    del status.running[training.key]
                    for chain, progress in list(status.chains.items()):
                        if progress.waits_for is not None and progress.waits_for.key == training.key:
                            _follow(planner, chain, status)
                    finished = training
            status.done = status.total - remaining(list(status.chains.values()))
            _estimate(status, time.monotonic() - began, workers.count)
            show(status, finished)
        show(status, None)
    return status


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


def _follow(planner: Planner, chain: Chain, status: Status) -> None:
    """Follow a chain as far as results are there; a damaged one is removed, to be done again."""
    while True:
        try:
            status.chains[chain] = planner.progress(chain)
            return
        except DamagedResultError as damage:
            status.notes.append(f"{damage}; it is done again")
            planner.store.discard(damage.key)


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


def _estimate(status: Status, elapsed: float, workers: int) -> None:
    """Estimate the time left: the work divided among the workers, but not less than the longest chain takes."""
    begun = sum(iteration - training.begin for training, iteration in status.running.values())
    length = max((t.end - t.begin for t in _waiting(status).values()), default=1)
    finished = status.done + begun / length
    if finished > 0 and elapsed > 0:
        each = elapsed * min(workers, max(1, len(status.running))) / finished
        longest = max((p.remaining for p in status.chains.values()), default=0)
        left = status.total - finished
        status.seconds_left = max(left / workers, longest - begun / length / max(1, len(status.running))) * each

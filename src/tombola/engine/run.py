"""The main loop of a run: follow chains, let workers do the trainings, store the results, and continue the chains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from tombola.engine.forecast import Forecast, Speed
from tombola.engine.job import Job, Outcome, Pruned, RoundJob
from tombola.engine.machine import Kind, kind, kind_here
from tombola.engine.workers import At, Event, Failed, Workers
from tombola.errors import DamagedResultError, UserError
from tombola.store.claims import Claims
from tombola.study.chains import Chain, Halted, Need, Progress, Waiting
from tombola.study.planner import Planner
from tombola.study.trainings import Round, Training

_WAIT = 0.2  # seconds between two checks whether another process still removes results

_LOOK_EVERY = 1.0  # seconds between two checks for results and claims of other runs


@dataclass
class Status:
    """The progress of a run, for a display.

    Args:
        total: the number of trainings that the chains need and that the store did not have when the run began. It may
            decrease, because chains that reach the same mask share trainings.
        done: the number of these trainings that are done.
        chains: the progress of each chain.
        running: the running trainings and the iteration that each has reached, by key; for a round of pruning, it is 0.
        seconds_left: the estimated remaining seconds; None if nothing is known yet.
        notes: sentences for the user.
        losses: the mean losses of the epochs so far, by the key of a running training, if epochs are told.
        to_halt: the chains that end where they are, and why; whoever is shown the status may add to them.
        pruned: the importances of the rounds of pruning that workers have done in this run, by key.
    """

    total: int
    done: int = 0
    chains: dict[Chain, Progress] = field(default_factory=dict)
    running: dict[str, tuple[Need, int]] = field(default_factory=dict)
    seconds_left: float | None = None
    notes: list[str] = field(default_factory=list)
    losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    to_halt: dict[Chain, str] = field(default_factory=dict)
    pruned: dict[str, str] = field(default_factory=dict)


Show: TypeAlias = Callable[[Status, Training | None], None]
"""A function that shows the status of a run and the training that has just finished, if any."""


def run(
    planner: Planner,
    workers: Workers,
    show: Show,
    chains: Sequence[Chain] | None = None,
    speed: Speed | None = None,
    *,
    tells_epochs: bool = False,
) -> Status:
    """Do every training that the study needs and the store does not have.

    A training that another run on the same store is doing is not repeated: this run waits for its result.

    Args:
        planner: the planner of the study.
        workers: the workers that do the trainings.
        show: a function that is called several times a second with the status and the training that has just finished
            (or None).
        chains: the chains to run; by default all chains of the study.
        speed: the known speed of the trainings, see `tombola.engine.estimate.prior_speed`; the first estimate of the
            remaining time is based on it.
        tells_epochs: whether the status has the losses of each epoch of the running trainings.

    Raises:
        UserError: if a training fails. The results of all finished trainings are in the store.
    """
    with Claims(planner.store.root) as claims:
        notes = _wait_for_collector(claims)
        planner.store.sweep(claims.alone)
        planner.keep_behaviour()
        wanted = [*planner.chains, *planner.repeats] if chains is None else chains
        status = _run(planner, workers, claims, show, wanted, speed, notes, tells_epochs=tells_epochs)
        planner.store.sweep(claims.alone)  # remove the files of killed workers
        return status


def _wait_for_collector(claims: Claims) -> list[str]:
    """Wait while another process removes results from the store, which ends as soon as it sees this run."""
    owners: dict[str, str] = {}
    while owner := claims.collector():
        owners[owner] = f"{owner} was removing results from the store; this run has waited for it"
        time.sleep(_WAIT)
    return list(owners.values())


def _run(
    planner: Planner,
    workers: Workers,
    claims: Claims,
    show: Show,
    chains: Sequence[Chain],
    speed: Speed | None,
    notes: list[str],
    *,
    tells_epochs: bool,
) -> Status:
    status = Status(0, notes=notes)
    for chain in chains:
        _follow(planner, chain, status)
    _check(planner, status)
    _note_kinds(planner, workers, status, [p for p in status.chains.values() if p.waits_for is not None])
    status.total = count_remaining(list(status.chains.values()))
    forecast = Forecast(planner, workers.count, speed)
    status.seconds_left = forecast.seconds_left(status.chains, status.running)
    looked = 0.0

    def tell(finished: Training | None = None) -> None:
        show(status, finished)
        if _halt(workers, claims, status):
            show(status, None)

    tell()  # before the workers start, which takes a while
    while waiting := _list_needs(status):
        if time.monotonic() - looked > _LOOK_EVERY and (workers.in_other_processes or workers.idle):
            looked = time.monotonic()
            _take_results_of_other_runs(planner, waiting, status)
            waiting = _list_needs(status)
        _submit(planner, workers, claims, waiting, status, tells_epochs=tells_epochs)
        _note_other_runs(status, claims, waiting)
        for event in workers.events(timeout=0.2):
            if event.key not in status.running:  # it was cancelled
                continue
            finished = _handle(event, planner, workers, claims, forecast, status)
            status.done = status.total - count_remaining(list(status.chains.values()))
            status.seconds_left = forecast.seconds_left(status.chains, status.running)
            tell(finished)
        status.done = status.total - count_remaining(list(status.chains.values()))
        tell()
    return status


def _halt(workers: Workers, claims: Claims, status: Status) -> bool:
    """End the chains that are to halt, and cancel the jobs that no other chain waits for; return whether any did."""
    notes = len(status.notes)
    for chain, reason in status.to_halt.items():
        progress = status.chains[chain]
        if not isinstance(progress.end, Waiting):
            continue
        before = count_remaining(list(status.chains.values()))
        status.chains[chain] = replace(progress, end=Halted(reason))
        status.total -= before - count_remaining(list(status.chains.values()))
        last = f"after level {len(progress.tickets) - 1}" if progress.tickets else "before its first ticket"
        status.notes.append(f"{chain} was stopped {last}: {reason}")
    for key in status.running.keys() - _list_needs(status).keys():
        workers.cancel(key)
        claims.release(key)
        del status.running[key]
    return len(status.notes) > notes


def _take_results_of_other_runs(planner: Planner, waiting: dict[str, Need], status: Status) -> None:
    """Follow the chains whose trainings another run on the store has done.

    This computes masks, which seeds torch's global generator, so a training in this process must not run meanwhile.
    """
    for key in waiting.keys() - status.running.keys():
        if planner.has(waiting[key]):
            _go_on(planner, key, status)


def _submit(
    planner: Planner,
    workers: Workers,
    claims: Claims,
    waiting: dict[str, Need],
    status: Status,
    *,
    tells_epochs: bool,
) -> None:
    """Give trainings and rounds to idle workers, those with the most trainings behind them first."""
    for need in sorted(waiting.values(), key=lambda each: -_remaining_behind(each, status)):
        if not workers.idle:
            return
        if need.key in status.running or not claims.take(need.key):
            continue
        if planner.has(need):  # another run did it before the claim was ours
            claims.release(need.key)
            _go_on(planner, need.key, status)
            return  # other trainings are waited for now
        if isinstance(need, Training):
            status.running[need.key] = need, need.begin
            workers.submit(Job.of(need, planner.study, tells_epochs=tells_epochs))
        else:
            status.running[need.key] = need, 0
            workers.submit(RoundJob.of(need, planner.study, planner.rule))


def _handle(
    event: Event, planner: Planner, workers: Workers, claims: Claims, forecast: Forecast, status: Status
) -> Training | None:
    """Note how far a training is, or store its result and follow its chains; return the training if it is done.

    Raises:
        UserError: if the training failed.
    """
    need, _ = status.running[event.key]
    match event:
        case At(key, iteration, losses):
            status.running[key] = (need, iteration)
            status.losses[key] = max(losses, status.losses.get(key, ()), key=len)
            return None
        case Failed(_, reason):
            raise UserError(f"{_describe(need, status)} failed: {reason}")
        case Pruned(key) as pruned:
            assert isinstance(need, Round)
            status.pruned[key] = need.importance
            if isinstance(mask := pruned.mask, str):
                planner.fail(key, mask)
            else:
                planner.keep(key, mask)
            _release(planner, key, claims, status)
            return None
        case Outcome() as outcome:
            assert isinstance(need, Training)
            record = {**outcome.record, **planner.about, **planner.about_each.get(need.key, {})}
            planner.store.results.put(need.key, need.identity, need.mask, outcome.trained, record)
            planner.store.checkpoints.discard(need.key)
            forecast.add(need, record)
            _release(planner, need.key, claims, status)
            _note_kinds(planner, workers, status, _chains_with(need, status))
            return need


def _release(planner: Planner, key: str, claims: Claims, status: Status) -> None:
    """Give back the claim on a job that is done, and follow the chains that waited for it."""
    claims.release(key)
    del status.running[key]
    status.losses.pop(key, None)
    _go_on(planner, key, status)


def _note_other_runs(status: Status, claims: Claims, waiting: dict[str, Need]) -> None:
    """If this run has nothing else to do, note once which other run does the trainings that it waits for."""
    if status.running:
        return
    for key in waiting:
        if (owner := claims.owner(key)) and (note := f"{owner} is running this study too") not in status.notes:
            status.notes.append(note)


def count_remaining(chains: list[Progress]) -> int:
    """Count the trainings that chains still need; a training that several chains wait for counts once.

    As long as the store does not have level 0, chains of one seed share all trainings up to that level.
    """
    ready: set[str] = set()
    shared_later: dict[str, int] = {}
    count = 0
    for progress in chains:
        if progress.waits_for is not None:
            now = {need.key for need in progress.needs if isinstance(need, Training)}
            later = max(0, progress.shared - 1)
            ready |= now
            shared_later[progress.waits_for.key] = later
            count += progress.remaining - len(now) - later
    return count + len(ready) + sum(shared_later.values())


def _go_on(planner: Planner, key: str, status: Status) -> None:
    """Follow the chains that waited for a training or a round of pruning."""
    for chain, progress in list(status.chains.items()):
        if any(need.key == key for need in progress.needs):
            _follow(planner, chain, status)


def _follow(planner: Planner, chain: Chain, status: Status) -> None:
    """Follow a chain; remove damaged results on the way, so that their trainings are repeated."""
    while True:
        try:
            status.chains[chain] = planner.progress(chain)
            return
        except DamagedResultError as damage:
            _remove(planner, damage, status)


def _check(planner: Planner, status: Status) -> None:
    """Read every byte of the chains' results; remove damaged results, so that their trainings are repeated."""
    found = [training.key for progress in status.chains.values() for training in progress.trainings]
    before = len(status.notes)
    for key in dict.fromkeys(found):
        try:
            planner.store.results.check(key)
        except DamagedResultError as damage:
            _remove(planner, damage, status)
    if len(status.notes) > before:
        for chain in status.chains:
            _follow(planner, chain, status)


def _remove(planner: Planner, damage: DamagedResultError, status: Status) -> None:
    status.notes.append(f"{damage}; it is removed and its training is repeated")
    planner.store.results.discard(damage.key)


def _note_kinds(planner: Planner, workers: Workers, status: Status, chains: Iterable[Progress]) -> None:
    """Note once if chains have trainings of several kinds of machine, the workers' own kind included if they go on.

    Workers on a cluster may be of any kind, which is known when their first training is done.
    """
    here = kind_here() if workers.are_here and planner.study.device == "cpu" else None
    mixed: set[Kind] = set()
    unknown = set()
    for progress in chains:
        kinds = {training.key: kind(planner.store.results.record(training.key)) for training in progress.trainings}
        unknown |= {key for key, each in kinds.items() if each is None}
        to_come = here if progress.waits_for is not None else None
        known = {each for each in (*kinds.values(), to_come) if each is not None}
        mixed |= known if kinds and len(known) > 1 else set()
    if mixed:
        names = ", ".join(sorted(map(str, mixed)))
        _note(
            status,
            f"this run continues chains on another kind of machine than they were begun on, so that their "
            f"tickets mix the bits of several kinds: {names}",
        )
    if unknown:
        _note(status, f"this run continues chains with {len(unknown)} trainings whose kind of machine is not recorded")


def _chains_with(training: Training, status: Status) -> list[Progress]:
    """Return the chains that a training, which is done, belongs to."""
    return [p for p in status.chains.values() if any(each.key == training.key for each in p.trainings)]


def _note(status: Status, text: str) -> None:
    """Add a note that begins like no other: each is given once, with what was known at first."""
    if not any(note[:30] == text[:30] for note in status.notes):
        status.notes.append(text)


def _list_needs(status: Status) -> dict[str, Need]:
    """Return the trainings and rounds of pruning that chains wait for, by name."""
    return {need.key: need for progress in status.chains.values() for need in progress.needs}


def _remaining_behind(need: Need, status: Status) -> int:
    """Return the length of the longest chain of trainings that begins with this one."""
    return max(_length_behind(need, progress) for progress in status.chains.values())


def _length_behind(need: Need, progress: Progress) -> int:
    if not any(each.key == need.key for each in progress.needs):
        return 0
    return progress.remaining if progress.waits_for is not None and progress.waits_for.key == need.key else 1


def _describe(need: Need, status: Status) -> str:
    for chain, progress in status.chains.items():
        if any(each.key == need.key for each in progress.needs):
            if isinstance(need, Round):
                return f"the scoring of {chain}, level {need.level}"
            one = len(progress.needs) == 1  # otherwise the levels are trained side by side
            where = f"level {len(progress.tickets)}" if one else f"density {100 * need.mask.density:.2f} %"
            return f"the training of {chain}, {where}"
    return f"the training {need.key[:12]}"

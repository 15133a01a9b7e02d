"""Verification: repeat trainings from their arguments, and compare every bit with the stored result."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tombola.engine.job import Job, Outcome
from tombola.engine.machine import Kind, differences, kind
from tombola.engine.run import run
from tombola.engine.workers import Failed, Workers
from tombola.errors import DamagedResultError, NothingStoredError, UserError
from tombola.pruning.mask import Mask
from tombola.store.store import Store
from tombola.study.chains import Chain, Progress
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.study.trainings import Training
from tombola.training.history import History, Trained
from tombola.training.weights import State


@dataclass(frozen=True)
class Finding:
    """The outcome of verifying one training.

    Args:
        key: the training's name.
        what: a description of the training for the user.
        difference: the first difference; None if all bits are equal.
        machine: the differences between this machine and the recorded one, one phrase for each field.
        kinds: the kinds of machine of the stored result and of the repetition; None unless both are known and differ.
    """

    key: str
    what: str
    difference: str | None
    machine: tuple[str, ...] = ()
    kinds: tuple[Kind, Kind] | None = None


@dataclass(frozen=True)
class Place:
    """A training of a study that the store has, and its place in a chain.

    Args:
        planner: the planner of the study, or that of the shorter trainings of a search.
        training: the training.
        chain: a chain that the training belongs to.
        level: the level of the training; None for the rewind point.
        whole: the iterations of a complete training of the study, the rewind point included.
    """

    planner: Planner
    training: Training
    chain: Chain
    level: int | None
    whole: int

    def __str__(self) -> str:
        if self.level is None:
            where, shorter = "rewind point", self.planner.end < self.whole
        else:
            where, shorter = f"level {self.level}", self.training.end < self.whole
        return f"{self.chain}, {where}" + (f", {self.training.end} iterations" if shorter else "")


def list_places(planners: Sequence[tuple[Planner, Sequence[Chain]]]) -> list[Place]:
    """Return the stored trainings of the chains of planners, each once.

    Raises:
        NothingStoredError: if the store has none of them.
        DamagedResultError: if a stored result is damaged.
    """
    found: dict[str, Place] = {}
    for planner, chains in planners:
        tickets = Tickets(planner)
        for chain in chains:
            for place in _places(planner, chain, tickets.progress(chain), planners[0][0].end):
                found.setdefault(place.training.key, place)
    if not found:
        raise NothingStoredError.of_study(planners[0][0].store.root)
    return list(found.values())


def draw_sample(things: Sequence[Any], count: int | None) -> list[Any]:
    """Draw `count` of the things with a fixed seed, in their original order; return all if `count` is None.

    >>> draw_sample("abcdef", 2) == draw_sample("abcdef", 2), draw_sample("ab", None)
    (True, ['a', 'b'])
    """
    if count is None or count >= len(things):
        return list(things)
    numbers = set(random.Random(0).sample(range(len(things)), count))
    return [thing for number, thing in enumerate(things) if number in numbers]


def verify_trainings(places: Sequence[Place], workers: Workers) -> Iterator[Finding]:
    """Repeat trainings, each from its beginning, and yield the outcome of each when it is done.

    Masks that the store remembers are also recomputed from the stored weights and compared.

    Args:
        places: the trainings to repeat.
        workers: the workers that repeat them, without checkpoints.

    Raises:
        UserError: if a training fails.
    """
    waiting = list(places)
    forgetful = {
        planner: Planner(planner.study, planner.problem, planner.store, remember=False)
        for planner in dict.fromkeys(place.planner for place in places)
    }
    for planner, chain in dict.fromkeys((place.planner, place.chain) for place in places):
        try:
            remembered, progress = planner.progress(chain).trainings, forgetful[planner].progress(chain)
            # A training by a wrong mask has another name: with the right one, the chain waits for it.
            computed = [*progress.trainings, *(need for need in progress.needs if isinstance(need, Training))]
        except DamagedResultError as damage:
            yield Finding(damage.key, str(chain), str(damage))
            waiting = [place for place in waiting if place.training.key != damage.key]
            continue
        for one, other in zip(remembered, computed, strict=False):
            if one.mask != other.mask:
                difference = first_in_masks(one.mask, other.mask)
                yield Finding(one.key, str(chain), f"a remembered mask is not the one that pruning gives: {difference}")
                break
    running: dict[str, Place] = {}
    while waiting or running:
        while waiting and workers.idle:
            place = waiting.pop(0)
            running[place.training.key] = place
            workers.submit(Job.of(place.training, place.planner.study))
        for event in workers.events(timeout=0.2):
            if isinstance(event, Failed):
                raise UserError(f"verifying {running[event.key]} failed: {event.reason}")
            if isinstance(event, Outcome):
                place = running.pop(event.key)
                yield _compare(place, event.trained, place.training.mask, event.record)


def verify_chains(
    planner: Planner,
    chains: Sequence[Chain],
    workers: Workers,
    tell: Callable[[int, int], None],
    whole: int | None = None,
) -> Iterator[Finding]:
    """Repeat whole chains from their initial weights in an empty store, and compare every training.

    Args:
        planner: the planner of the study; its store need not have all trainings.
        chains: the chains to repeat.
        workers: the workers that do the trainings, without checkpoints.
        tell: a function that is called with the number of finished trainings and the number of all trainings.
        whole: the iterations of a complete training of the study, if the planner is that of shorter ones.

    Raises:
        UserError: if a training fails.
        DamagedResultError: if a stored result is damaged.
    """
    tickets = Tickets(planner)
    levels = max(len(tickets.progress(chain).tickets) - 1 for chain in chains)
    with tempfile.TemporaryDirectory(prefix="tombola-verify-") as folder:
        study = planner.study.model_copy(update={"levels": max(0, levels)})
        again = Planner(study, planner.problem, Store(Path(folder) / "store"))
        run(again, workers, lambda status, _: tell(status.done, status.total), chains)
        results = again.store.results
        seen: set[str] = set()
        for chain in chains:
            places = _places(planner, chain, tickets.progress(chain), whole or planner.end)
            for place, other in zip(places, again.progress(chain).trainings, strict=False):
                if place.training.key in seen:
                    continue
                seen.add(place.training.key)
                trained = results.get(other.key)
                assert trained is not None
                trained = replace(trained, batch_losses=results.batch_losses(other.key))
                finding = _compare(place, trained, other.mask, results.record(other.key), whole_chain=True)
                yield finding
                if finding.difference:
                    break  # all later differences in the chain follow from this one


def _places(planner: Planner, chain: Chain, progress: Progress, whole: int) -> list[Place]:
    """Return the stored trainings of a chain with their levels."""
    trainings = progress.trainings
    first = -1 if trainings and planner.is_rewind_point(trainings[0]) else 0  # the rewind point comes before level 0
    trainings = trainings[: len(progress.tickets) - first]  # without later levels that are trained side by side
    levels = planner.levels(chain)
    return [
        Place(planner, one, chain, levels[number] if number >= 0 else None, whole)
        for number, one in enumerate(trainings, first)
    ]


def _compare(
    place: Place,
    again: Trained,
    mask: Mask,
    record: Mapping[str, Any],
    *,
    whole_chain: bool = False,
) -> Finding:
    """Compare a stored result with that of the repeated training, and add the outcome to the stored record."""
    key, results = place.training.key, place.planner.store.results
    try:
        trained = results.get(key)
        assert trained is not None
        weights = first_in_states(trained.weights.load(), again.weights.load())
        difference = (
            first_in_masks(results.mask(key), mask)
            or first_in_losses(results.batch_losses(key), again.batch_losses, place.training.begin)
            or first_in_histories(trained.history, again.history)
            or weights
        )
        if difference and weights and weights != difference:
            difference += f"; at the end, {weights}"
    except DamagedResultError as damage:
        difference = str(damage)
    then = results.record(key)
    machine = differences(then.get("machine", {}), record["machine"])
    machine += differences({name: then[name] for name in ("threads", "device") if name in then}, record)
    note: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "whole_chain": whole_chain,
        "machine": record["machine"],
    }
    with contextlib.suppress(UserError, OSError):  # the store may be read-only
        if difference is None:
            results.confirm(key, note)
        else:
            results.contradict(key, note | {"difference": difference})
    before, now = kind(then), kind(record)
    kinds = (before, now) if before is not None and now is not None and before != now else None
    return Finding(key, str(place), difference, tuple(machine), kinds)


def first_in_masks(stored: Mask, again: Mask) -> str | None:
    """Return the first connection that is alive in only one of two masks; None if they are equal."""
    stored, again = stored.load(), again.load()
    for name in sorted(set(stored) | set(again)):
        if name not in stored or name not in again:
            return f"only one of the masks has layer {name}"
        if stored[name].shape != again[name].shape:
            return f"layer {name} of the mask has shape {tuple(stored[name].shape)} and {tuple(again[name].shape)}"
        unequal = (stored[name] ^ again[name]).flatten().nonzero()
        if len(unequal):
            index = _index(int(unequal[0]), stored[name].shape)
            state = "alive" if stored[name].flatten()[int(unequal[0])] else "pruned"
            return f"mask of {name}{index}: {state} in the store, not now ({len(unequal)} connections differ)"
    return None


def first_in_losses(stored: Tensor, again: Tensor, begin: int) -> str | None:
    """Return the first iteration at which the training losses differ; None if all bits are equal.

    Args:
        stored, again: the training loss of every iteration, shape (iterations,).
        begin: the number of the first iteration.
    """
    common = min(len(stored), len(again))
    unequal = (_bits(stored[:common]) != _bits(again[:common])).any(dim=1).nonzero()
    if len(unequal):
        first = int(unequal[0])
        values = stored[first].item(), again[first].item()
        return f"the training loss of iteration {begin + first}: {values[0]!r} in the store, {values[1]!r} now"
    if len(stored) != len(again):
        return f"the training has {len(stored)} iterations in the store, {len(again)} now"
    return None


def first_in_histories(stored: History, again: History) -> str | None:
    """Return the first difference of two histories, in the metrics that both have; None if all bits are equal."""
    before, after = _flatten(stored), _flatten(again)
    for name, then in before.items():
        if name in after and repr(then) != repr(now := after[name]):
            return f"{name}: {then!r} in the store, {now!r} now"
    return None


def _flatten(history: History) -> dict[str, Any]:
    """Return the parts of a history by name; without the accuracy if the task does not have it."""
    document = history.to_json()
    for split, values in document.pop("metrics", {}).items():
        document |= {f"{split} {key}": value for key, value in values.items()}
    if history.test_accuracy is None and history.diverged_at is None:
        del document["test_accuracy"]
    return document


def first_in_states(stored: State, again: State) -> str | None:
    """Return the first number of two states whose bits differ; None if all bits are equal."""
    for name in sorted(set(stored) | set(again)):
        if name not in stored or name not in again:
            return f"only one of the states has tensor {name}"
        then, now = stored[name], again[name]
        if (then.dtype, then.shape) != (now.dtype, now.shape):
            return f"tensor {name}: {then.dtype} {tuple(then.shape)} in the store, {now.dtype} {tuple(now.shape)} now"
        unequal = (_bits(then) != _bits(now)).any(dim=1).nonzero()
        if len(unequal):
            first = int(unequal[0])
            values = [tensor.flatten()[first].item() for tensor in (then, now)]
            where = f"tensor {name}{_index(first, then.shape)}"
            return f"{where}: {values[0]!r} in the store, {values[1]!r} now ({len(unequal)} of {then.numel()} differ)"
    return None


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of each element, shape (elements, bytes per element)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _index(flat: int, shape: Sequence[int]) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return index

"""Verifying: trainings are done again from their arguments, and every bit is compared with what is stored."""

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
from tombola.engine.machine import differences
from tombola.engine.run import run
from tombola.engine.workers import Failed, Workers
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.store.store import DamagedResultError, Store
from tombola.study.planner import Chain, Planner, Training
from tombola.training.history import History, Trained
from tombola.training.weights import State


@dataclass(frozen=True)
class Finding:
    """What verifying one training came to.

    Args:
        key: the training's name.
        what: which training it is, for people.
        difference: what differed first; None where every bit is equal.
        machine: what of the machine is another than the one recorded.
    """

    key: str
    what: str
    difference: str | None
    machine: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A training of a study that the store has, and which it is."""

    training: Training
    chain: Chain
    level: int | None

    def __str__(self) -> str:
        return f"{self.chain}, " + ("rewind point" if self.level is None else f"level {self.level}")


def stored(planner: Planner, chains: Sequence[Chain]) -> list[Stored]:
    """Return the trainings of chains that the store has, each once.

    Raises:
        UserError: where there is none, or the store is damaged.
    """
    found: dict[str, Stored] = {}
    try:
        for chain in chains:
            for one in _of_chain(planner, chain):
                found.setdefault(one.training.key, one)
    except DamagedResultError as damage:
        raise UserError(f"store {planner.store.root}: {damage}") from damage
    if not found:
        raise UserError(f"no result of this study is in {planner.store.root}; do its trainings with: tombola run")
    return list(found.values())


def sample(things: Sequence[Any], count: int | None) -> list[Any]:
    """Return `count` of the things, spread at random but the same ones each time; all where `count` is None."""
    if count is None or count >= len(things):
        return list(things)
    chosen = set(random.Random(0).sample(range(len(things)), count))
    return [thing for number, thing in enumerate(things) if number in chosen]


def verify_trainings(planner: Planner, chosen: Sequence[Stored], workers: Workers) -> Iterator[Finding]:
    """Do each training again, from its beginning, and yield what came of it, as it comes.

    Masks are derived anew from the stored weights, not taken as they were remembered.

    Args:
        planner: names the trainings.
        chosen: which.
        workers: do them; without checkpoints.
    """
    anew = Planner(planner.study, planner.problem, planner.store, remember=False)
    waiting = list(chosen)
    for chain in dict.fromkeys(one.chain for one in chosen):
        try:
            remembered, derived = planner.trainings(chain), anew.trainings(chain)
        except DamagedResultError as damage:
            yield Finding(damage.key, str(chain), str(damage))
            waiting = [one for one in waiting if one.training.key != damage.key]
            continue
        for one, other in zip(remembered, derived, strict=False):
            if difference := first_in_masks(one.mask, other.mask):
                yield Finding(one.key, str(chain), f"a remembered mask is not the one that pruning gives: {difference}")
                break
    running: dict[str, Stored] = {}
    while waiting or running:
        while waiting and workers.idle:
            one_more = waiting.pop(0)
            running[one_more.training.key] = one_more
            workers.submit(Job.of(one_more.training, planner.study))
        for event in workers.events(timeout=0.2):
            if isinstance(event, Failed):
                raise UserError(f"verifying {running[event.key]} failed: {event.reason}")
            if isinstance(event, Outcome):
                stored_one = running.pop(event.key)
                yield _compared(planner, stored_one, event.trained, stored_one.training.mask, event.record)


def verify_chains(
    planner: Planner, chains: Sequence[Chain], workers: Workers, tell: Callable[[int, int], None]
) -> Iterator[Finding]:
    """Find the tickets of whole chains again, from their initial weights, in an empty store, and compare the two.

    Args:
        planner: names the trainings; the store need not have all of them.
        chains: which.
        workers: do the trainings; without checkpoints.
        tell: told how many of how many trainings are done.
    """
    levels = max(len(planner.progress(chain).tickets) - 1 for chain in chains)
    with tempfile.TemporaryDirectory(prefix="tombola-verify-") as folder:
        study = planner.study.model_copy(update={"levels": max(0, levels)})
        again = Planner(study, planner.problem, Store(Path(folder) / "store"))
        run(again, workers, lambda status, _: tell(status.done, status.total), chains)
        seen: set[str] = set()
        for chain in chains:
            for one, other in zip(_of_chain(planner, chain), again.trainings(chain), strict=False):
                if one.training.key in seen:
                    continue
                seen.add(one.training.key)
                trained = again.store.get(other.key)
                assert trained is not None
                trained = replace(trained, batch_losses=again.store.batch_losses(other.key))
                finding = _compared(planner, one, trained, other.mask, again.store.record(other.key), whole_chain=True)
                yield finding
                if finding.difference:
                    break  # what comes after it in the chain follows from it


def _of_chain(planner: Planner, chain: Chain) -> list[Stored]:
    trainings = planner.trainings(chain)
    first = None if trainings and trainings[0].end < planner.end else 0
    levels = [first, *range(1 if first == 0 else 0, len(trainings))]
    return [Stored(training, chain, level) for training, level in zip(trainings, levels, strict=False)]


def _compared(
    planner: Planner,
    one: Stored,
    again: Trained,
    mask: Mask,
    record: Mapping[str, Any],
    *,
    whole_chain: bool = False,
) -> Finding:
    """Compare a stored result with that of the training done again, and note in the store what came of it."""
    key, store = one.training.key, planner.store
    try:
        trained = store.get(key)
        assert trained is not None
        difference = (
            first_in_masks(store.alive(key), mask)
            or first_in_losses(store.batch_losses(key), again.batch_losses, one.training.begin)
            or first_in_histories(trained.history, again.history)
            or first_in_states(trained.weights.load(), again.weights.load())
        )
        weights = first_in_states(trained.weights.load(), again.weights.load())
        if difference and weights and weights != difference:
            difference += f"; at the end, {weights}"
    except DamagedResultError as damage:
        difference = str(damage)
    then = store.record(key)
    machine = differences(then.get("machine", {}), record["machine"])
    machine += differences({name: then[name] for name in ("threads", "device") if name in then}, record)
    note: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "whole_chain": whole_chain,
        "machine": record["machine"],
    }
    with contextlib.suppress(UserError, OSError):  # a store that can be read only
        if difference is None:
            store.confirm(key, note)
        else:
            store.contradict(key, note | {"difference": difference})
    return Finding(key, str(one), difference, tuple(machine))


def first_in_masks(stored: Mask, again: Mask) -> str | None:
    """Return which connection is the first that only one of two masks has alive; None where they are equal."""
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
    """Return at which iteration the training losses differ first; None where they are equal to the bit.

    Args:
        stored, again: the loss of every iteration.
        begin: the first iteration.
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
    """Return what differs first between two histories; None where they are equal to the bit."""
    for name, then in stored.to_json().items():
        if repr(then) != repr(now := again.to_json()[name]):
            return f"{name}: {then!r} in the store, {now!r} now"
    return None


def first_in_states(stored: State, again: State) -> str | None:
    """Return which number of two states is the first that differs in its bits; None where they are equal."""
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
    """Return the bytes of each element, shape (elements, bytes each)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _index(flat: int, shape: Sequence[int]) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return index

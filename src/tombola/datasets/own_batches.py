"""A data set from batches that a function of the user draws."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from tombola.datasets.dataset import Dataset, digest_of_part
from tombola.datasets.drawn import Draw, Drawn, list_batches
from tombola.errors import UserError
from tombola.inputs import Tensors, concatenate, count_examples, list_tensors
from tombola.streams import ambient

HELD = 4096
"""The number of examples of the first epoch that are kept, for scores and for tables that need some examples."""

MOST_BATCHES = 1_000_000
"""The number of batches that an epoch may have; a function that never ends would be waited for."""

_COMPARED = 3  # batches that are drawn twice and compared


def dataset_of_batches(name: str, draw: Draw, source: str) -> Dataset:
    """Return the data set of the batches that a function draws.

    The batches of epoch 0 of seed 0 are drawn once, hashed and counted. The test set is kept in memory, and so is the
    validation set, which is drawn if the function has the attribute `validation = True`. What identifies the data set
    is the source of the user's code, which decides all seeds and epochs, and the content of these; or, instead of the
    content, the attribute `fingerprint` of an object that has one.

    Args:
        name: the name of the data set.
        draw: a function (seed, epoch, split) -> batches. Equal arguments have to give equal batches, whatever the state
            of global random numbers. An object may have a `fingerprint`, a text, and `validation`, a bool.
        source: the hash of the source of the function.

    Raises:
        UserError: if the function fails, or if its batches do not repeat or do not fit together.

    >>> import torch
    >>> def draw(seed, epoch, split):
    ...     numbers = torch.arange(8.0) + seed + epoch
    ...     return [(part[:, None], part) for part in numbers.split(4)]
    >>> data = dataset_of_batches("numbers", draw, "")
    >>> data.train_examples, data.test_examples, data.drawn.per_epoch
    (8, 8, 2)
    """
    where = f"data set {name!r}"
    _check_repeats(where, draw)
    splits = {"train": _read(where, draw, "train", HELD), "test": _read(where, draw, "test")}
    if getattr(draw, "validation", False):
        splits["validation"] = _read(where, draw, "validation")
    train = splits["train"]
    given = getattr(draw, "fingerprint", None)
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: its fingerprint is a {type(given).__name__}, expected a text")
    content = [given] if given is not None else [each.digests for each in splits.values()]
    fingerprint = hashlib.sha256(json.dumps([source, len(train.sizes), *content]).encode()).hexdigest()
    drawn = Drawn(where, draw, len(train.sizes), train.sizes[0], train.sizes[-1], fingerprint)
    held = {
        f"{split}_{part}": _join(where, [batch[number] for batch in read.held])
        for split, read in splits.items()
        for number, part in enumerate(("inputs", "labels"))
    }
    return Dataset(name, drawn=drawn, **held)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Read:
    """The batches of an epoch of a split: those that are held, and the digest and the number of examples of each."""

    held: list[tuple[Tensors, Tensors]]
    digests: list[str]
    sizes: list[int]


def _read(where: str, draw: Draw, split: str, most: float = math.inf) -> _Read:
    """Read the batches of epoch 0 of seed 0, and hold the first ones, which have `most` examples or a few more.

    Raises:
        UserError: if there are none or too many, or if a batch has changed when the next one is there.
    """
    read, count = _Read([], [], []), 0
    for batch in list_batches(where, draw, 0, 0, split):
        if len(read.sizes) == MOST_BATCHES:
            raise UserError(
                f"{where}: its epoch 0 of seed 0, {split}, has more than {MOST_BATCHES} batches; let the function end "
                "after one epoch, or give larger batches"
            )
        if count < most:
            read.held.append(batch)
        read.digests.append(_digest(batch))
        read.sizes.append(count_examples(batch[0]))
        count += read.sizes[-1]
    if not read.sizes:
        raise UserError(f"{where}: its batches of seed 0, epoch 0, {split}: there are none")
    if [_digest(batch) for batch in read.held] != read.digests[: len(read.held)]:
        raise UserError(f"{where}: it changes a batch after it has given it; give a copy of each")
    return read


def _check_repeats(where: str, draw: Draw) -> None:
    """Raise `UserError` unless the first batches are the same in two calls, with other global random numbers."""
    found = []
    for state in (0, 1):
        with ambient(state):
            found.append([_digest(batch) for batch in islice(list_batches(where, draw, 0, 0, "train"), _COMPARED)])
    if found[0] != found[1]:
        raise UserError(
            f"{where}: its batches do not repeat: two calls with seed 0, epoch 0 give different ones; draw random "
            f"numbers from a generator that is made of seed and epoch"
        )


def _digest(batch: Iterable[Tensors]) -> str:
    return hashlib.sha256(json.dumps([digest_of_part(part) for part in batch]).encode()).hexdigest()


def _join(where: str, parts: list[Tensors]) -> Tensors:
    """Return the examples of several batches one after the other."""
    named = [list_tensors(part) for part in parts]
    forms = [{key: (tensor.dtype, tensor.shape[1:]) for key, tensor in each.items()} for each in named]
    if any(form != forms[0] for form in forms) or len({type(part) for part in parts}) > 1:
        raise UserError(
            f"{where}: its batches differ in structure, type or shape of an example; pad the examples to one shape"
        )
    return concatenate(parts)

"""Batches that a function of the user draws, instead of a train set in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from tombola.errors import UserError, short
from tombola.exits import attribute_failure
from tombola.inputs import Tensors, count_examples, list_tensors

Draw: TypeAlias = Callable[[int, int, str], Iterable[tuple[Tensors, Tensors]]]
"""A function (seed, epoch, split) -> batches (inputs, targets); the split is "train", "test" or "validation"."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """The batches of the train set, drawn by a function of the user for each seed and epoch.

    Args:
        name: what messages call the data set.
        draw: the function; equal arguments have to give equal batches.
        per_epoch: the number of batches in an epoch, the same for all seeds and epochs.
        batch_size: the number of examples in a batch; only the last one of an epoch may be smaller.
        smallest: the number of examples in the last batch of an epoch.
        fingerprint: what identifies the batches.

    >>> import torch
    >>> drawn = Drawn("ones", lambda seed, epoch, split: [(torch.ones(2), torch.ones(2))] * 3, 3, 2, 2, "")
    >>> len(list(drawn.epoch(seed=0, epoch=5)))
    3
    """

    name: str
    draw: Draw
    per_epoch: int
    batch_size: int
    smallest: int
    fingerprint: str

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensors, Tensors]]:
        """Yield the batches of an epoch.

        Raises:
            UserError: if the function fails, or if there are fewer or more batches than in the first epoch.
        """
        count = 0
        for batch in list_batches(self.name, self.draw, seed, epoch, "train"):
            count += 1
            if count > self.per_epoch:
                break
            size = count_examples(batch[0])
            if size != self.batch_size and count < self.per_epoch:
                raise UserError(
                    f"{self.name}: batch {count} of epoch {epoch} of seed {seed} has {size} examples and the first of "
                    f"all {self.batch_size}; only the last batch of an epoch may have another number"
                )
            yield batch
        if count != self.per_epoch:
            more = "more than " if count > self.per_epoch else f"{count} and not "
            raise UserError(
                f"{self.name}: epoch {epoch} of seed {seed} has {more}{self.per_epoch} batches, as the first epoch of "
                f"seed 0 has; all epochs need the same number"
            )


def list_batches(name: str, draw: Draw, seed: int, epoch: int, split: str) -> Iterator[tuple[Tensors, Tensors]]:
    """Yield the batches of an epoch as a function of the user gives them.

    Raises:
        UserError: if the function fails, or if what it gives is not a batch.
    """
    what = f"{name}: its batches of seed {seed}, epoch {epoch}, {split}"
    with attribute_failure(what):
        batches = iter(draw(seed, epoch, split))
    while True:
        with attribute_failure(what):
            batch: Any = next(batches, None)
        if batch is None:
            return
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(map(_is_of_tensors, batch)):
            raise UserError(
                f"{what}: expected pairs (inputs, targets) of tensors, or of tuples or dictionaries of tensors, got "
                f"{short(batch)}"
            )
        inputs, targets = batch
        sizes = {len(tensor) for part in batch for tensor in list_tensors(part).values()}
        if len(sizes) != 1 or sizes == {0}:
            raise UserError(f"{what}: the tensors of a batch have {sorted(sizes)} examples; all need the same number")
        yield inputs, targets


def _is_of_tensors(part: object) -> bool:
    """Return whether inputs or targets are tensors with a dimension that counts examples."""
    several: list[Any] = list(part.values()) if isinstance(part, dict) else [part]
    if isinstance(part, tuple):
        several = list(part)
    return bool(several) and all(isinstance(each, Tensor) and each.ndim > 0 for each in several)

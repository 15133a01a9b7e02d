"""The losses of a training: recorded for every iteration, averaged over epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHECK_EVERY = 50  # iterations between two checks whether the loss is finite


class Losses:
    """The training loss of every iteration so far.

    Losses stay on the device where they were computed until they are needed, because reading one has to wait for
    the GPU.

    Args:
        begin, end: the range of iterations of the training, begin..end-1.
        per_epoch: the number of iterations in an epoch.
        device: the device on which losses are computed.

    >>> losses = Losses(begin=0, end=3, per_epoch=2)
    >>> for loss in (3.0, 1.0, 0.5):
    ...     losses.append(torch.tensor(loss))
    >>> losses.iteration, losses.end_an_epoch, losses.epoch_means()
    (3, True, (2.0, 0.5))
    """

    def __init__(self, begin: int, end: int, per_epoch: int, device: str = "cpu") -> None:
        self.begin, self.end, self.per_epoch = begin, end, per_epoch
        self.iteration = begin  # the next iteration
        self._recorded = torch.empty(end - begin, dtype=torch.float32, device=device)
        self._latest: list[Tensor] = []

    def resume(self, iteration: int, batch_losses: Tensor) -> None:
        """Continue at an iteration, with the losses of the iterations before it."""
        self.iteration = iteration
        self._recorded[: iteration - self.begin] = batch_losses

    def append(self, losses: Tensor) -> None:
        """Record the losses of the next iterations, a tensor of one element each without a graph."""
        self._latest.append(losses)
        self.iteration += losses.numel()

    def values(self) -> Tensor:
        """Return a view of the losses of all iterations so far, float32, on the device."""
        done = self.iteration - self.begin
        if self._latest:
            latest = torch.cat([losses.reshape(-1) for losses in self._latest])
            self._recorded[done - len(latest) : done] = latest
            self._latest.clear()
        return self._recorded[:done]

    @property
    def end_an_epoch(self) -> bool:
        """Whether an epoch, or the training, ends before the next iteration."""
        return self.iteration % self.per_epoch == 0 or self.iteration == self.end

    @property
    def next_check(self) -> int:
        """The iteration before which `have_diverged` looks at the losses next."""
        epoch_end = (self.iteration // self.per_epoch + 1) * self.per_epoch
        return min(epoch_end, (self.iteration // _CHECK_EVERY + 1) * _CHECK_EVERY, self.end)

    def have_diverged(self) -> bool:
        """Return whether a loss is not finite; the check is done only after each epoch and every 50 iterations."""
        due = self.end_an_epoch or self.iteration % _CHECK_EVERY == 0
        return due and not bool(self.values().isfinite().all())

    def epoch_means(self) -> tuple[float, ...]:
        """Return the mean loss of each epoch, up to the first that is incomplete or has a loss that is not finite."""
        return tuple(self._epoch_means(self.values().tolist()))

    def _epoch_means(self, losses: list[float]) -> Iterator[float]:
        first = self.begin
        while first < self.end:
            after = min((first // self.per_epoch + 1) * self.per_epoch, self.end)
            epoch = losses[first - self.begin : after - self.begin]
            if len(epoch) < after - first or not all(map(math.isfinite, epoch)):
                return
            yield sum(epoch) / len(epoch)
            first = after

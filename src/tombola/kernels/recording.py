"""The recorder of this thread: sparse layers hand it their calls instead of computing, see `tombola.kernels.packed`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor


class Recorder(Protocol):
    """Records calls of layers, to compute several of them at once."""

    def convolve(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the outputs of a sparse convolution, which are computed when they are read; None if not recorded."""

    def normalise(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the outputs of batch normalisation; None if not recorded."""

    def pool(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the outputs of max pooling; None if not recorded."""

    def compute(self) -> None:
        """Compute what is recorded so far."""


class _Local(threading.local):
    recorder: Recorder | None = None


_local = _Local()


def current() -> Recorder | None:
    """Return the recorder of this thread; None outside of `record`."""
    return _local.recorder


@contextmanager
def record(recorder: Recorder | None) -> Iterator[None]:
    """Let this thread's layers use a recorder, or none, within the context."""
    before, _local.recorder = _local.recorder, recorder
    try:
        yield
    finally:
        _local.recorder = before

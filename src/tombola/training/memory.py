"""Memory of the process: how the C library keeps what a training frees."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST = 2**25  # the highest threshold that glibc reaches by itself


@contextmanager
def keep_memory() -> Iterator[None]:
    """Let memory that is freed inside the block stay with the process, which uses it again.

    By default, glibc gives a block of more than 32 MB back to the system when it is freed. A network's large
    activations are allocated and freed in each iteration, and the system would set them to zero each time, page by
    page: a fourteenth of a step of VGG-16. After the block, glibc's thresholds are those that it reaches by itself in
    a process that has freed such blocks. This does nothing with another C library, or if the environment sets up the
    allocator (`MALLOC_...` or `GLIBC_TUNABLES`).

    >>> with keep_memory():
    ...     print("an iteration")
    an iteration
    """
    mallopt = _find_mallopt()
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # no threshold
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


def _find_mallopt() -> Callable[[int, int], Any]:
    """Return glibc's function that sets a parameter of its allocator, or one that does nothing."""
    is_set_up = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    library = ctypes.CDLL(None) if sys.platform == "linux" and not is_set_up else None
    found: Callable[[int, int], Any] = getattr(library, "mallopt", lambda _, __: 0)
    return found

"""Memory of the process: how the C library keeps what a training frees."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tombola.threads import Shared

# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST = 2**25  # the highest threshold that glibc reaches by itself


class _Usage(ctypes.Structure):
    """What glibc's `mallinfo2` returns: ten numbers, of which `fordblks` are the bytes that are free."""

    _fields_ = [("before", 8 * ctypes.c_size_t), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


@contextmanager
def keep_memory() -> Iterator[None]:
    """Let memory that is freed inside the block stay with the process, which uses it again.

    By default, glibc gives a block of more than 32 MB back to the system when it is freed. A network's large
    activations are allocated and freed in each iteration, and the system would set them to zero each time, page by
    page: a fourteenth of a step of VGG-16. After the block, glibc's thresholds are those that it reaches by itself in a
    process that has freed such blocks, also if the process had set others. Free memory is given back to the system if
    it is more than glibc would keep then, 64 MB; the next training of a small network takes what is left at once. The
    setting is that of the whole process: of several blocks at the same time, in other threads or inside one another,
    the last to end ends it. This does nothing with another C library, or if the environment sets up the allocator
    (`MALLOC_...` or `GLIBC_TUNABLES`).

    >>> with keep_memory():
    ...     print("an iteration")
    an iteration
    """
    with _kept.block():
        yield


@contextmanager
def _keep() -> Iterator[None]:
    """Let glibc keep what is freed inside the block; do nothing where its allocator shall stay as it is."""
    glibc = _find_glibc()
    if glibc is None:
        yield
        return
    glibc.mallopt(_MMAP_MAX, 0)
    glibc.mallopt(_TRIM_THRESHOLD, -1)  # no threshold
    try:
        yield
    finally:
        glibc.mallopt(_MMAP_MAX, 65536)
        glibc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        glibc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        if _count_free(glibc) > 2 * _LARGEST:
            glibc.malloc_trim(0)


_kept = Shared(_keep)


def _count_free(glibc: Any) -> float:
    """Return the bytes that are free in the memory of the allocator; infinity if glibc (before 2.33) cannot say it."""
    try:
        count = glibc.mallinfo2
    except AttributeError:
        return math.inf
    count.restype = _Usage
    return float(count().fordblks)


def _find_glibc() -> Any:
    """Return glibc, or None if its allocator shall stay as it is."""
    is_set_up = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or is_set_up or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)

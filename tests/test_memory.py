"""What a training frees stays with the process until the training ends, and then goes back to the system."""

from __future__ import annotations

import ctypes
import math
import os
import resource
from types import SimpleNamespace

import pytest
import torch

from tombola import Dataset, Mask, Recipe, train
from tombola.training import memory
from tombola.training.memory import keep_memory

SIZE = 2**26  # bytes of a block


@pytest.fixture
def glibc(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The C library, if it is glibc and its allocator is not set up by the environment."""
    for name in os.environ:
        if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    library: ctypes.CDLL | None = memory._find_glibc()
    if library is None:
        pytest.skip("a C library other than glibc")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    return library


def _faults() -> int:
    """The pages that the system has given to the process, among others after setting them to zero."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _resident() -> int:
    """The bytes of the process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.usefixtures("glibc")
def test_a_large_block_is_used_again() -> None:
    faults = []
    with keep_memory():
        for _ in range(5):
            before = _faults()
            torch.ones(SIZE, dtype=torch.uint8)
            faults.append(_faults() - before)
    assert min(faults[1:]) < 10


def test_what_was_freed_goes_back_to_the_system_at_the_end(glibc: ctypes.CDLL) -> None:
    with keep_memory():
        large = glibc.malloc(4 * SIZE)
        ctypes.memset(large, 1, 4 * SIZE)
        behind = glibc.malloc(1000)  # above the large block, so that the end of the heap stays in use
        glibc.free(large)
        kept = _resident()
    assert kept - _resident() > 3 * SIZE
    glibc.free(behind)


def test_what_is_free_is_counted(glibc: ctypes.CDLL) -> None:
    if not hasattr(glibc, "mallinfo2"):
        assert memory._count_free(glibc) == math.inf
        return
    with keep_memory():
        block = glibc.malloc(SIZE)
        used = memory._count_free(glibc)
        glibc.free(block)
        assert SIZE / 2 < memory._count_free(glibc) - used < 2 * SIZE


class Calls(list[tuple[int, ...]]):
    """What a C library that does nothing was asked for; it says that `free` bytes are free, unless it cannot say it."""

    def __init__(self, free: int | None = None) -> None:
        super().__init__()
        self.library = SimpleNamespace(mallopt=self._note, malloc_trim=self._note)
        if free is not None:
            self.library.mallinfo2 = lambda: SimpleNamespace(fordblks=free)

    def _note(self, *call: int) -> None:
        self.append(call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of the C library."""
    noted = Calls()
    monkeypatch.setattr(memory, "_find_glibc", lambda: noted.library)
    return noted


BEGIN, END = [(-4, 0), (-1, -1)], [(-4, 65536), (-3, 2**25), (-1, 2**26), (0,)]


def test_the_last_block_that_ends_gives_memory_back(calls: Calls) -> None:
    first, second, later = keep_memory(), keep_memory(), keep_memory()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert calls == BEGIN
    second.__exit__(None, None, None)
    assert calls == BEGIN + END
    with later:
        assert calls == BEGIN + END + BEGIN
    assert calls == 2 * (BEGIN + END)


@pytest.mark.parametrize(("free", "given_back"), [(2**26, []), (2**26 + 1, [(0,)])])
def test_more_than_glibc_would_keep_goes_back(
    free: int, given_back: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Calls(free)
    monkeypatch.setattr(memory, "_find_glibc", lambda: noted.library)
    with keep_memory():
        pass
    assert noted == BEGIN + END[:-1] + given_back


@pytest.mark.parametrize("label", [0, 2])
def test_a_training_sets_the_thresholds_that_glibc_reaches_by_itself(label: int, calls: Calls) -> None:
    """Also if it fails: its second label is none of the two classes of its network."""
    x, y = torch.ones(4, 3), torch.tensor([0, label, 0, 0])
    data, model = Dataset("four", x, y, x, y, ("a", "b", "c")), torch.nn.Sequential(torch.nn.Linear(3, 2))
    failed = False
    try:
        train(model, model.state_dict(), Mask.ones_like(model), data, Recipe(iterations=1, batch_size=4), 0)
    except (IndexError, RuntimeError):
        failed = True
    assert failed == (label == 2)
    assert calls == BEGIN + END


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_allocator_that_the_environment_sets_up_stays_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1000000")
    assert memory._find_glibc() is None

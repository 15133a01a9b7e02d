"""What a training frees stays with the process, and what it has set for this is no longer set afterwards."""

from __future__ import annotations

import resource

import pytest
import torch

from tombola import Dataset, Mask, Recipe, train
from tombola.training import memory
from tombola.training.memory import keep_memory


def _faults() -> int:
    """The pages that the system has given to the process, among others after setting them to zero."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(memory._find_mallopt()(memory._MMAP_MAX, 65536) != 1, reason="a C library other than glibc")
def test_a_large_block_is_used_again() -> None:
    size, faults = 2**26, []
    with keep_memory():
        for _ in range(5):
            before = _faults()
            torch.ones(size, dtype=torch.uint8)
            faults.append(_faults() - before)
    assert min(faults[1:]) < 10


@pytest.mark.parametrize("label", [0, 2])
def test_a_training_sets_the_thresholds_that_glibc_reaches_by_itself(
    label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it fails: its second label is none of the two classes of its network."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_find_mallopt", lambda: lambda *call: calls.append(call))
    x, y = torch.ones(4, 3), torch.tensor([0, label, 0, 0])
    data, model = Dataset("four", x, y, x, y, ("a", "b", "c")), torch.nn.Sequential(torch.nn.Linear(3, 2))
    failed = False
    try:
        train(model, model.state_dict(), Mask.ones_like(model), data, Recipe(iterations=1, batch_size=4), 0)
    except (IndexError, RuntimeError):
        failed = True
    assert failed == (label == 2)
    assert calls == [(-4, 0), (-1, -1), (-4, 65536), (-3, 2**25), (-1, 2**26)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_allocator_that_the_environment_sets_up_stays_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1000000")
    assert memory._find_mallopt()(memory._MMAP_MAX, 65536) == 0

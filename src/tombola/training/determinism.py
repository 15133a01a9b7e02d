"""Determinism: seeds of random layers and settings of torch that make a training repeatable to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tombola.streams import derive


def seed_random_layers(seed: int, iteration: int, device: str) -> None:
    """Seed torch's global generators, which dropout draws from, for one iteration of a training."""
    number = derive(seed, "random layers", iteration)
    torch.default_generator.manual_seed(number)
    if device == "cuda":
        torch.cuda.manual_seed(number)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Replace numbers below float32's normal range by 0 inside the block; they are slow, and no training needs them."""
    before = float(torch.tensor(1e-40) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def deterministic_algorithms(device: str) -> Iterator[None]:
    """On a GPU, allow only deterministic algorithms in full float32 inside the block.

    cuBLAS reads the setting of its workspace from the environment when it is first used: see `tombola/__init__.py`.
    """
    if device != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    filled_before = memory.fill_uninitialized_memory
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, False, False
    torch.use_deterministic_algorithms(True)
    # Otherwise torch fills every tensor with NaN before the kernel that computes it: a launch and a pass over memory.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before[:3]
        torch.use_deterministic_algorithms(before[3] > 0, warn_only=before[3] == 1)
        memory.fill_uninitialized_memory = filled_before

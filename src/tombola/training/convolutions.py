"""Convolutions that torch computes out of bounds on a CPU, and another way to compute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def sound_convolutions(model: nn.Module, device: str) -> Iterator[None]:
    """Inside the block, compute the convolutions of a model without oneDNN if it would write out of bounds.

    For a convolution of 1 x 1 with a stride, channels-last, oneDNN writes past the end of its workspace when it
    computes the gradient of the weight, if there are fewer input channels than a vector has numbers. Then the process
    ends, or results are wrong: https://github.com/uxlfoundation/oneDNN/issues/6035. Torch's own convolutions take about
    twice as long.

    Args:
        model: the model; layers whose sparse replacements compute them do not count.
        device: the device of the model, "cpu" or "cuda".

    >>> with sound_convolutions(nn.Conv2d(4, 8, 1, stride=2), "cpu"):
    ...     torch.backends.mkldnn.enabled
    False
    """
    onednn: Any = torch.backends.mkldnn
    if device != "cpu" or not onednn.enabled or not overruns(model):
        yield
        return
    onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = True


def overruns(model: nn.Module) -> bool:
    """Return whether the model has a convolution whose gradient oneDNN may write out of bounds.

    >>> overruns(nn.Conv2d(4, 8, 1, stride=2)), overruns(nn.Conv2d(16, 8, 1, stride=2)), overruns(nn.Conv2d(4, 8, 1))
    (True, False, False)
    """
    short = torch.backends.cpu.get_cpu_capability() == "AVX2" and not torch.cpu._is_avx512_supported()
    vector = 8 if short else 16
    return any(
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and set(module.stride) != {1}
        and module.in_channels // module.groups < vector
        for module in model.modules()
    )

"""Convolutions that torch computes out of bounds on a CPU, and another way to compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.threads import Shared


@contextmanager
def sound_convolutions(model: nn.Module, device: str) -> Iterator[None]:
    """Inside the block, compute the convolutions of a model that oneDNN would compute out of bounds in another way.

    For a convolution of 1 x 1 with a stride, channels-last, oneDNN writes past the end of its workspace when it
    computes the gradient of the weight, if there are fewer input channels than a vector has numbers. Then the process
    ends, or results are wrong: https://github.com/uxlfoundation/oneDNN/issues/6035. The pixels that such a convolution
    reads are therefore taken first, and convolved without a stride, which is the same. Inside the block,
    `torch.nn.functional.conv2d`, which layers call, does so in all threads, and in parts of a forward pass that are
    computed again for the gradient.

    Args:
        model: the model; layers whose sparse replacements compute them do not count.
        device: the device of the model, "cpu" or "cuda".

    >>> layer, image = nn.Conv2d(4, 8, 1, stride=2), torch.ones(1, 4, 5, 5)
    >>> with sound_convolutions(layer, "cpu"):
    ...     layer(image).shape
    torch.Size([1, 8, 3, 3])
    """
    if device != "cpu" or not torch.backends.mkldnn.enabled or not overruns(model):
        yield
        return
    with _sound.block():
        yield


def overruns(model: nn.Module) -> bool:
    """Return whether the model has a convolution whose gradient oneDNN may write out of bounds.

    >>> overruns(nn.Conv2d(4, 8, 1, stride=2)), overruns(nn.Conv2d(16, 8, 1, stride=2)), overruns(nn.Conv2d(4, 8, 1))
    (True, False, False)
    """
    return any(
        isinstance(module, nn.Conv2d)
        and _overruns(module.in_channels // module.groups, module.kernel_size, module.stride)
        for module in model.modules()
    )


def _overruns(channels: int, kernel: Sequence[int], stride: Sequence[int]) -> bool:
    short = torch.backends.cpu.get_cpu_capability() == "AVX2" and not torch.cpu._is_avx512_supported()
    return set(kernel) == {1} and set(stride) != {1} and channels < (8 if short else 16)


@contextmanager
def _replace_convolutions() -> Iterator[None]:
    """Let `_convolve` stand in the place of `torch.nn.functional.conv2d` inside the block."""
    replaced = functional.conv2d
    functional.conv2d = partial(_convolve, replaced)
    try:
        yield
    finally:
        functional.conv2d = replaced


_sound = Shared(_replace_convolutions)


def _convolve(
    conv2d: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Return `conv2d` of the other arguments, without a stride where it would be out of bounds with it."""
    (down, right), (rows, columns) = _pair(stride), (0, 0) if padding == "valid" else _pair(padding)
    refused = min(down, right) < 1 or min(rows, columns) < 0
    if refused or not _overruns(weight.shape[1], weight.shape[2:], (down, right)):
        return conv2d(input, weight, bias, stride, padding, dilation, groups)
    padded = functional.pad(input, (columns, columns, rows, rows)) if rows or columns else input
    return conv2d(padded[..., ::down, ::right], weight, bias, groups=groups)


def _pair(number: Any) -> tuple[int, int]:
    """Return the numbers for rows and columns, which may be given as one; (-1, -1) for what is neither."""
    numbers = (number,) if isinstance(number, int) else tuple(number)
    pairs = {1: numbers * 2, 2: numbers}
    return pairs[len(numbers)] if len(numbers) in pairs and all(isinstance(each, int) for each in numbers) else (-1, -1)

"""Convolutions that torch computes out of bounds on a CPU, and another way to compute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def sound_convolutions(model: nn.Module, device: str) -> Iterator[None]:
    """Inside the block, compute the convolutions of a model that oneDNN would compute out of bounds in another way.

    For a convolution of 1 x 1 with a stride, channels-last, oneDNN writes past the end of its workspace when it
    computes the gradient of the weight, if there are fewer input channels than a vector has numbers. Then the process
    ends, or results are wrong: https://github.com/uxlfoundation/oneDNN/issues/6035. The pixels that such a convolution
    reads are therefore taken first, and convolved without a stride, which is the same.

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
    with _PixelsFirst():
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


def _overruns(channels: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    short = torch.backends.cpu.get_cpu_capability() == "AVX2" and not torch.cpu._is_avx512_supported()
    return set(kernel) == {1} and set(stride) != {1} and channels < (8 if short else 16)


class _PixelsFirst(TorchFunctionMode):
    """Takes the pixels that a convolution of 1 x 1 with a stride reads, and convolves them without a stride."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            return _convolve(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Return `torch.conv2d` of the arguments."""
    steps = _both(stride)
    if not _overruns(weight.shape[1], tuple(weight.shape[2:]), steps):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    rows, columns = (0, 0) if padding == "valid" else _both(padding)
    padded = functional.pad(input, (columns, columns, rows, rows)) if rows or columns else input
    return torch.conv2d(padded[..., :: steps[0], :: steps[1]], weight, bias, groups=groups)


def _both(number: Any) -> tuple[int, ...]:
    """Return the numbers for rows and columns, which may be given as one."""
    return (number, number) if isinstance(number, int) else tuple(number)

"""Training that takes less time as a network gets sparser, on the CPU.

`accelerate` is the door: it gives a model's training step, as fast as a mask allows. Behind it, `choices` says which
layers are faster sparse, `sparsify` replaces them by layers of their surviving weights, and `dense_state` gives the
state back under the names and shapes of the model as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tombola.kernels import layers
from tombola.kernels.choice import (
    MISSING,
    NoKernelsWarning,
    available,
    choices,
    choose,
    instruction_set,
    warn_if_missing,
)
from tombola.kernels.door import Loss, Precision, Step, accelerate, sparse_layers
from tombola.kernels.layers import BatchNorm2d, MaxPool2d, SparseConv2d
from tombola.kernels.linear import Perceptron, SparseLinear
from tombola.kernels.replace import dense_state, sparsify

__all__ = [
    "MISSING",
    "BatchNorm2d",
    "Loss",
    "MaxPool2d",
    "NoKernelsWarning",
    "Perceptron",
    "Precision",
    "SparseConv2d",
    "SparseLinear",
    "Step",
    "accelerate",
    "available",
    "choices",
    "choose",
    "dense_state",
    "instruction_set",
    "normalized",
    "normalized_images",
    "sparse_layers",
    "sparsify",
    "warn_if_missing",
]


def normalized(images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return `(images - mean) * scale` in float32."""
    return images.to(torch.float32).sub_(mean).mul_(scale)


def normalized_images(images: Tensor, chosen: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return `(images[chosen] - mean) * scale` in one pass over memory; without kernels in three, of the same bits.

    Args:
        images: uint8, (n, channels, height, width).
        chosen: int64, (m,), numbers of images.
        mean, scale: float32, (channels, 1, 1).

    """
    tensors = (images, chosen, mean, scale)
    if layers.extension is None or not all(t.is_cpu and t.is_contiguous() for t in tensors):
        return normalized(images.index_select(0, chosen), mean, scale)
    count, (_, channels, height, width) = len(chosen), images.shape
    result = torch.empty((count, channels, height, width))
    addresses = [t.data_ptr() for t in (mean, scale, result)]
    layers.extension.normalized_images(
        images.data_ptr(), chosen.data_ptr(), count, channels, height * width, *addresses
    )
    return result

"""Sparse training on the CPU: a training step takes less time as a network gets sparser.

The entry point is `accelerate`, which returns the training step of a model, as fast as a mask allows. It uses `choices`
to select the layers that are faster sparse, and `sparsify` to replace them by layers that hold only their surviving
weights. `dense_state` returns the state under the names and shapes of the original model.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from tombola.kernels.layers import BatchNorm2d, MaxPool2d, SparseConv2d
from tombola.kernels.likeness import find_difference, is_own
from tombola.kernels.linear import Perceptron, SparseLinear
from tombola.kernels.packed import can_pack
from tombola.kernels.replace import dense_names, dense_state, sparsify, sparsify_to_infer
from tombola.kernels.step import (
    Loss,
    Precision,
    Step,
    accelerate,
    are_packed,
    find_perceptron,
    have_convolutions,
    sparse_layers,
)
from tombola.kernels.stretch import Stretch, can_stretch

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
    "Stretch",
    "accelerate",
    "are_packed",
    "augment_images",
    "available",
    "can_pack",
    "can_stretch",
    "choices",
    "choose",
    "dense_names",
    "dense_state",
    "find_difference",
    "find_perceptron",
    "have_convolutions",
    "instruction_set",
    "is_own",
    "normalise",
    "normalise_images",
    "sparse_layers",
    "sparsify",
    "sparsify_to_infer",
    "warn_if_missing",
]


def normalise(images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return `(images - mean) * scale` in float32."""
    return images.to(torch.float32).sub_(mean).mul_(scale)


def normalise_images(images: Tensor, indices: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return `(images[indices] - mean) * scale` in one pass over memory; without kernels, in three passes.

    Both ways give the same bits.

    Args:
        images: uint8, (n, channels, height, width).
        indices: int64, (m,), each from 0 to n - 1.
        mean, scale: float32, (channels, 1, 1).

    Raises:
        IndexError: if an index is out of range.

    """
    tensors = (images, indices, mean, scale)
    if layers.extension is None or not _are_readable(tensors, (torch.uint8, torch.int64, torch.float32, torch.float32)):
        return normalise(images.index_select(0, indices), mean, scale)
    result = mean.new_empty((len(indices), *images.shape[1:]))
    layers.extension.normalise_images(images, indices, mean, scale, result)
    return result


def augment_images(
    images: Tensor, indices: Tensor, offsets: Tensor, flips: Tensor, crop: int, mean: Tensor, scale: Tensor
) -> Tensor | None:
    """Return `(changed - mean) * scale` for the images of these indices, changed as an augmentation says.

    An image gets `crop` rows and columns of zeros on each side, is mirrored where `flips` says so, and is cropped to
    its size from the row and the column on that `offsets` has for it.

    Args:
        images: uint8, (n, channels, height, width).
        indices: int64, (m,), each from 0 to n - 1.
        offsets: int64, (n, 2), each from 0 to 2 * crop.
        flips: bool, (n,).
        crop: the number of zeros on each side, 0 or more.
        mean, scale: float32, (channels, 1, 1).

    Returns:
        float32, (m, channels, height, width), channels-last; None without kernels, or if they do not support the
        tensors.

    Raises:
        IndexError: if an index or an offset is out of range.
        ValueError: if sizes do not fit, or a crop is negative or larger than 1,048,576 pixels.

    """
    tensors, floats = (images, indices, offsets, flips, mean, scale), torch.float32
    dtypes = (torch.uint8, torch.int64, torch.int64, torch.bool, floats, floats)
    if layers.extension is None or not _are_readable(tensors, dtypes):
        return None
    _, channels, height, width = images.shape
    result = mean.new_empty((len(indices), height, width, channels))
    layers.extension.augment_images(images, indices, offsets, flips, crop, mean, scale, result)
    return result.permute(0, 3, 1, 2)


def _are_readable(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    """Return whether tensors have these types and lie in the memory of the CPU, contiguous."""
    return all(layers.is_readable(t, dtype) and t.is_contiguous() for t, dtype in zip(tensors, dtypes, strict=True))

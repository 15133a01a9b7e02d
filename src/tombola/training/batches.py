"""Batches: the examples of each iteration, augmented and normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.streams import generator
from tombola.training.recipe import Augmentation, Recipe


def batches(data: Dataset, recipe: Recipe, seed: int, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) for the iterations begin..end-1.

    Each epoch uses a new random permutation of the training set; its last batch may be smaller. The examples of an
    iteration depend on seed and iteration alone, and the augmentation of an example on seed, epoch and example alone,
    so a training that is resumed sees the same batches.
    """
    count = len(data.train_inputs)
    per_epoch = recipe.iterations_per_epoch(count)
    augmented = recipe.augmentation != Augmentation()
    images = data.train_inputs.dtype == torch.uint8
    mean, scale = _mean_and_scale(data)
    device = data.train_inputs.device
    for iteration in range(begin, end):
        epoch, step = divmod(iteration, per_epoch)
        if step == 0 or iteration == begin:
            # Both are copied to a GPU once an epoch: a copy in each iteration would wait for the GPU.
            order = torch.randperm(count, generator=generator(seed, "data order", epoch)).to(device)
            changes = Changes(seed, epoch, count, recipe.augmentation, device) if augmented else None
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        if changes is not None:
            changed = changes.apply(data.train_inputs.index_select(0, chosen), chosen)
            inputs = kernels.normalise(changed, mean, scale)
        elif images:
            inputs = kernels.normalise_images(data.train_inputs, chosen, mean, scale)
        else:
            inputs = data.train_inputs.index_select(0, chosen)
        yield inputs, data.train_labels.index_select(0, chosen)


class Changes:
    """The augmentation of one epoch: for every example, whether it is mirrored and where it is cropped.

    Args:
        seed, epoch: the identity of the stream from which the random numbers are drawn.
        examples: the number of examples in the training set.
        augmentation: the possible changes of an image.
        device: the device of the images.
    """

    def __init__(
        self, seed: int, epoch: int, examples: int, augmentation: Augmentation, device: torch.device | str = "cpu"
    ) -> None:
        self.crop = augmentation.crop
        draw = generator(seed, "augmentation", epoch)
        self.offsets = torch.randint(2 * self.crop + 1, (examples, 2), generator=draw).to(device)
        self.flips = torch.randint(2, (examples,), generator=draw).bool().to(device)
        if not augmentation.flip:
            self.flips.zero_()

    def apply(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Return the images of the `chosen` examples, shape (n, channels, height, width), augmented."""
        height, width = images.shape[2:]
        offsets, flips = self.offsets[chosen], self.flips[chosen]
        rows = offsets[:, :1] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        columns = offsets[:, 1:] + torch.where(flips[:, None], columns.flip(0), columns)
        padded = torch.nn.functional.pad(images, [self.crop] * 4).permute(0, 2, 3, 1)
        example = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalisation(data: Dataset) -> Callable[[Tensor], Tensor]:
    """Return a function that converts the inputs of a data set to the inputs of a network.

    uint8 images become float32, (pixel / 255 - mean) / std for each channel; other inputs stay as they are. Each batch
    is converted when it is needed: gathering bytes instead of floats saves more time than the conversion takes.
    """
    if data.train_inputs.dtype != torch.uint8:
        return lambda inputs: inputs
    mean, scale = _mean_and_scale(data)
    return lambda inputs: kernels.normalise(inputs, mean, scale)


def _mean_and_scale(data: Dataset) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / std of each channel on the scale 0..255, both of shape (channels, 1, 1)."""
    device = data.train_inputs.device
    mean = torch.tensor(data.mean, dtype=torch.float32, device=device)[:, None, None] * 255
    return mean, 1 / (torch.tensor(data.std, dtype=torch.float32, device=device)[:, None, None] * 255)

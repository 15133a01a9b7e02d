"""Batches: the examples of each iteration, augmented and normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import TypeAlias, cast

import torch
from torch import Tensor

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.datasets.drawn import Drawn
from tombola.inputs import Tensors, convert, list_tensors, select
from tombola.streams import generator
from tombola.training.recipe import Augmentation, Recipe

Batch: TypeAlias = tuple[Tensors, Tensors]
"""The inputs and the targets of some examples, as a network and a loss receive them."""


def batches(data: Dataset, recipe: Recipe, seed: int, begin: int, end: int) -> Iterator[Batch]:
    """Yield (inputs, labels) for the iterations begin..end-1, see `iterations`."""
    return chain.from_iterable(iterations(data, recipe, seed, begin, end))


def iterations(data: Dataset, recipe: Recipe, seed: int, begin: int, end: int) -> Iterator[list[Batch]]:
    """Yield the batches (inputs, labels) of each of the iterations begin..end-1: one, or `recipe.accumulate`.

    Each epoch uses a new random permutation of the training set; its last batch may be smaller, and its last iteration
    may have fewer batches. The examples of an iteration depend on seed and iteration alone, and the augmentation of an
    example on seed, epoch and example alone, so a training that is resumed sees the same batches.
    """
    if data.drawn is not None:
        yield from _iterations_drawn(data, data.drawn, recipe, seed, begin, end)
        return
    count, examples = data.train_examples, recipe.batch_size * recipe.accumulate
    per_epoch = recipe.iterations_per_epoch(count)
    augmented = recipe.augmentation != Augmentation()
    changes: Changes | None = None
    device = device_of(data)
    mean, scale = mean_and_scale(data) if data.has_images else (torch.empty(0), torch.empty(0))

    def read(chosen: Tensor) -> Batch:
        labels = select(data.train_labels, chosen)
        if not data.has_images:
            return select(data.train_inputs, chosen), labels
        images = cast(Tensor, data.train_inputs)
        if changes is None:
            return kernels.normalise_images(images, chosen, mean, scale), labels
        return changes.read(images, chosen, mean, scale), labels

    for iteration in range(begin, end):
        epoch, step = divmod(iteration, per_epoch)
        if step == 0 or iteration == begin:
            # Both are copied to a GPU once an epoch: a copy in each iteration would wait for the GPU.
            order = data_order(count, seed, epoch).to(device)
            changes = Changes(seed, epoch, count, recipe.augmentation, device) if augmented else None
        chosen = order[step * examples : (step + 1) * examples]
        parts = [chosen] if recipe.accumulate == 1 else torch.split(chosen, recipe.batch_size)
        yield [read(part) for part in parts]


def data_order(examples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the examples in an epoch, a permutation of 0..examples-1."""
    return torch.randperm(examples, generator=generator(seed, "data order", epoch))


def _iterations_drawn(
    data: Dataset, drawn: Drawn, recipe: Recipe, seed: int, begin: int, end: int
) -> Iterator[list[Batch]]:
    """Yield the batches of each iteration as a function of the user draws them, on the device of the data set.

    They are copied, because a model may change its inputs, and they may be views of the function's data.
    """
    per_epoch, device = recipe.iterations_per_epoch(data.train_examples), device_of(data)

    def move(part: Tensors) -> Tensors:
        return convert(lambda tensor: tensor.to(device, copy=True), part)

    for iteration in range(begin, end):
        epoch, step = divmod(iteration, per_epoch)
        if step == 0 or iteration == begin:
            left = drawn.epoch(seed, epoch)
            for _ in islice(left, step * recipe.accumulate):
                pass
        yield [(move(inputs), move(labels)) for inputs, labels in islice(left, recipe.accumulate)]
        if step == per_epoch - 1 and not recipe.drop_last:
            next(left, None)  # which says that there are more


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

    def read(self, images: Tensor, chosen: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Return the images of the `chosen` examples, augmented and normalised; kernels do not change the bits."""
        made = kernels.augment_images(images, chosen, self.offsets, self.flips, self.crop, mean, scale)
        if made is not None:
            return made
        return kernels.normalise(self.apply(images.index_select(0, chosen), chosen), mean, scale)

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


def normalisation(data: Dataset) -> Callable[[Tensors], Tensors]:
    """Return a function that converts the inputs of a data set to the inputs of a network.

    uint8 images become float32, (pixel / 255 - mean) / std for each channel; other inputs stay as they are. Each batch
    is converted when it is needed: gathering bytes instead of floats saves more time than the conversion takes.
    """
    if not data.has_images:
        return lambda inputs: inputs
    mean, scale = mean_and_scale(data)
    return partial(convert, lambda images: kernels.normalise(images, mean, scale))


def device_of(data: Dataset) -> torch.device:
    """Return the device of the training set."""
    return next(iter(list_tensors(data.train_inputs).values())).device


def mean_and_scale(data: Dataset) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / std of each channel on the scale 0..255, both of shape (channels, 1, 1)."""
    device = device_of(data)
    mean = torch.tensor(data.mean, dtype=torch.float32, device=device)[:, None, None] * 255
    return mean, 1 / (torch.tensor(data.std, dtype=torch.float32, device=device)[:, None, None] * 255)

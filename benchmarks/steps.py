"""A training step of `tombola.train` against the same step in a loop by hand, eager PyTorch over tensors in memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tombola import Augmentation, Dataset, Mask, Recipe, prune, train
from tombola.batches import batches, normalisation
from tombola.importance import magnitude
from tombola.models import lenet_300_100, resnet20, vgg16

BATCH = 128


@dataclass(frozen=True)
class System:
    """What is trained, and for how many iterations at a time."""

    build: Callable[[], nn.Module]
    data: Dataset
    recipe: Recipe

    def mask(self, density: float) -> Mask:
        """Return the mask of a density, pruned by magnitude over all layers."""
        model = self.build()
        mask = Mask.ones_like(model)
        return mask if density == 1 else prune(model.state_dict(), mask, magnitude, 1 - density)


def lenet(iterations: int = 200) -> System:
    """LeNet-300-100 on images of MNIST's shape."""
    return System(lenet_300_100, _random_images(30_000, (1, 28, 28)), Recipe(iterations=iterations, batch_size=BATCH))


def convolutional(build: Callable[[], nn.Module], iterations: int) -> System:
    """A network on images of CIFAR-10's shape, with the paper's recipe."""
    recipe = Recipe(
        optimizer="momentum",
        weight_decay=1e-4,
        iterations=iterations,
        batch_size=BATCH,
        augmentation=Augmentation(flip=True, crop=4),
    )
    return System(build, _random_images(4000, (3, 32, 32)), recipe)


def cifar_resnet() -> System:
    """ResNet-20."""
    return convolutional(resnet20, 7)


def cifar_vgg() -> System:
    """VGG-16."""
    return convolutional(vgg16, 4)


def ours(system: System, mask: Mask) -> float:
    """Return the seconds of one step of tombola's training."""
    model = system.build()
    marks: list[float] = []
    train(
        model,
        model.state_dict(),
        mask,
        system.data,
        system.recipe,
        seed=0,
        watch=lambda *_: marks.append(time.perf_counter()),
    )
    return _step(marks)


def by_hand(system: System, mask: Mask, *, channels_last: bool = False) -> float:
    """Return the seconds of one step of the loop by hand: the mask multiplied in before each forward pass."""
    model = system.build()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = system.recipe
    momentum = 0.0 if recipe.optimizer == "sgd" else recipe.momentum
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum, weight_decay=recipe.weight_decay)
    parameters = dict(model.named_parameters())
    pruned = [(parameters[name], alive.float()) for name, alive in mask.items() if not alive.all()]
    marks: list[float] = []
    inputs_of = _ready_batches(system)
    for iteration in range(recipe.iterations or 0):
        inputs, labels = inputs_of(iteration)
        inputs = inputs.contiguous(memory_format=torch.channels_last) if channels_last else inputs.contiguous()
        with torch.no_grad():
            for weight, ones in pruned:
                weight.mul_(ones)
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        marks.append(time.perf_counter())
    return _step(marks)


def input_side(system: System) -> float:
    """Return the seconds that one batch takes to be gathered, augmented and normalised."""
    made = batches(system.data, system.recipe, 0, 0, 20)
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        next(made)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _ready_batches(system: System) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the input side of the loop by hand: normalised in advance where nothing is augmented, else as ours."""
    data = system.data
    if system.recipe.augmentation != Augmentation():
        made = batches(data, system.recipe, 0, 0, system.recipe.iterations or 0)
        return lambda _: next(made)
    inputs = normalisation(data)(data.train_inputs)
    order = torch.randperm(len(inputs))

    def batch(iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = order[iteration * BATCH : (iteration + 1) * BATCH]
        return inputs[chosen], data.train_labels[chosen]

    return batch


def _random_images(count: int, shape: tuple[int, int, int]) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=draw, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=draw)
    channels = shape[0]
    classes = tuple(map(str, range(10)))
    return Dataset("random", images, labels, images[:10], labels[:10], classes, (0.5,) * channels, (0.25,) * channels)


def _step(marks: list[float]) -> float:
    """Return the median time between marks, after a warm-up."""
    return statistics.median(after - before for before, after in itertools.pairwise(marks[len(marks) // 10 :]))

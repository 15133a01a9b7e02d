"""A ResNet-20 training step at batch 128, one thread, and its input side, against a loop by hand."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch.nn import functional

from tombola import Dataset, Mask, Recipe, train
from tombola.batches import batches
from tombola.models import resnet20
from tombola.recipe import Augmentation

BATCH = 128
RECIPE = Recipe(
    optimizer="momentum",
    weight_decay=1e-4,
    batch_size=BATCH,
    iterations=8,
    augmentation=Augmentation(flip=True, crop=4),
)


def data() -> Dataset:
    """Return random images and labels of CIFAR-10's shapes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4000, 3, 32, 32), generator=draw, dtype=torch.uint8)
    labels = torch.randint(10, (4000,), generator=draw)
    classes = tuple(map(str, range(10)))
    return Dataset("random", images, labels, images[:10], labels[:10], classes, (0.5,) * 3, (0.25,) * 3)


def ours(dataset: Dataset) -> float:
    """Return the seconds of one step of tombola's training, augmentation included."""
    model = resnet20()
    marks: list[float] = []
    mask = Mask.ones_like(model)
    train(model, model.state_dict(), mask, dataset, RECIPE, 0, watch=lambda *_: marks.append(time.perf_counter()))
    return statistics.median(after - before for before, after in itertools.pairwise(marks[1:]))


def by_hand(dataset: Dataset) -> float:
    """Return the seconds of one step of a loop by hand: eager, contiguous, the same input side."""
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    marks: list[float] = []
    for inputs, labels in batches(dataset, RECIPE, 0, 0, RECIPE.iterations or 0):
        loss = functional.cross_entropy(model(inputs.contiguous()), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        marks.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(marks[1:]))


def input_side(dataset: Dataset) -> float:
    """Return the seconds that the batch of one step takes: gathered, augmented, normalised."""
    return statistics.median(_times(batches(dataset, RECIPE, 0, 0, RECIPE.iterations or 0)))


def _times(made: Iterator[object]) -> list[float]:
    times = []
    for _ in range(RECIPE.iterations or 0):
        begun = time.perf_counter()
        next(made)
        times.append(time.perf_counter() - begun)
    return times[1:]

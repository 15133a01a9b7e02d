"""Dense LeNet-300-100, batch 128, one thread: a step of `tombola.train` against a good loop by hand."""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional

from tombola import Dataset, Mask, Recipe, train
from tombola.models import lenet_300_100

BATCH = 128
ITERATIONS = 200


def data() -> Dataset:
    """Return a data set of MNIST's shapes, its size apart: random images and labels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30_000, 1, 28, 28), generator=draw, dtype=torch.uint8)
    labels = torch.randint(10, (30_000,), generator=draw)
    classes = tuple(map(str, range(10)))
    return Dataset("random", images, labels, images[:10], labels[:10], classes, (0.1307,), (0.3081,))


def ours(dataset: Dataset, mask: Mask | None = None) -> float:
    """Return the seconds of one step of tombola's training."""
    model = lenet_300_100()
    recipe = Recipe(iterations=ITERATIONS, batch_size=BATCH)
    mask = mask or Mask.ones_like(model)
    marks: list[float] = []
    train(model, model.state_dict(), mask, dataset, recipe, 0, watch=lambda *_: marks.append(time.perf_counter()))
    return _step(marks)


def by_hand(inputs: Tensor, labels: Tensor, mask: Mask | None = None) -> float:
    """Return the seconds of one step of a loop by hand over tensors in memory, eager, a mask multiplied in."""
    model = lenet_300_100()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = dict(model.named_parameters())
    masks = [(parameters[name], mask[name].float()) for name in mask] if mask else []
    marks: list[float] = []
    order = torch.randperm(len(inputs))
    for iteration in range(ITERATIONS):
        chosen = order[iteration * BATCH : (iteration + 1) * BATCH]
        with torch.no_grad():
            for weight, ones in masks:
                weight.mul_(ones)
        loss = functional.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        marks.append(time.perf_counter())
    return _step(marks)


def _step(marks: list[float]) -> float:
    """Return the median time between marks, after a warm-up."""
    return statistics.median(after - before for before, after in itertools.pairwise(marks[9:]))

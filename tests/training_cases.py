"""What is trained in tests: two tiny data sets, three tiny networks, and the cases made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tombola import Augmentation, Dataset, Mask, Recipe, kernels, prune
from tombola.training.train import initial_state
from tombola.training.weights import State

EXAMPLES = 22  # with batches of 5: 5 iterations an epoch, the last of 2 examples


def images() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(EXAMPLES) % 3
    inputs = torch.randint(100, (EXAMPLES, 2, 6, 6), generator=draw) + 50 * labels.view(-1, 1, 1, 1)
    inputs = inputs.to(torch.uint8)
    return Dataset("images", inputs, labels, inputs[:9], labels[:9], ("a", "b", "c"), (0.4, 0.5), (0.2, 0.3))


def vectors() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(EXAMPLES) % 3
    inputs = torch.randn(EXAMPLES, 4, generator=draw) + labels.view(-1, 1)
    return Dataset("vectors", inputs, labels, inputs[:9], labels[:9], ("a", "b", "c"))


IMAGES, VECTORS = images(), vectors()


def tensors_of(data: Dataset) -> list[Tensor]:
    return [data.train_inputs, data.train_labels, data.test_inputs, data.test_labels]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3))


def wide_perceptron() -> nn.Module:
    """So many weights that oneDNN multiplies those of two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 1000), nn.ReLU(), nn.Linear(1000, 80), nn.ReLU(), nn.Linear(80, 3))


def convolutions() -> nn.Module:
    """Everything that a training's state could forget: buffers, random layers, another layout in memory."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Conv2d(4, 3, 1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(48, 3),
    )


def wide_convolutions() -> nn.Module:
    """So many channels that packed images are read in several bands of rows and pieces of channels."""
    return nn.Sequential(
        nn.Conv2d(2, 32, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(3136, 3),
    )


def even_convolutions() -> nn.Module:
    """Images of 8 x 8 pixels, which AVX-512 reads eight at a time for the gradients of weights."""
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(1024, 3),
    )


def averaged_convolutions() -> nn.Module:
    """The mean over pixels, too, is computed on packed images."""
    return nn.Sequential(
        nn.Conv2d(2, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )


def watched_convolutions() -> nn.Module:
    """The same with a hook, which keeps activations from staying packed between sparse convolutions."""
    model = convolutions()
    model.register_forward_hook(ignore)
    return model


def ignore(*_: object) -> None:
    """Do nothing."""


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def setting_of(build: Callable[[], nn.Module], fraction: float = 0.5) -> tuple[nn.Module, State, Mask]:
    """Return a model, an initial state that is not the model's own, and a mask with a part of each layer pruned."""
    model, initial = build(), initial_state(build, 3)
    return model, initial, prune(initial, Mask.ones_like(model), rank, fraction)


def rank(weights: Tensor) -> Tensor:
    return weights.argsort().argsort() / len(weights)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, how much of it is pruned, and how it is trained; 10 iterations."""

    build: Callable[[], nn.Module]
    fraction: float = 0.5
    batch_size: int = 5
    iterations: int = 10
    sparse: bool = False  # by the kernels, which take over from some batch size and sparsity on

    def setting(self) -> tuple[nn.Module, State, Mask]:
        model, initial, mask = setting_of(self.build, self.fraction)
        if self.sparse and not kernels.available():
            pytest.skip(
                "tombola was built without its kernels; to run: make .venv/installed-tests, with a C++ compiler"
            )
        assert bool(kernels.sparse_layers(model, mask, batch_size=self.batch_size)) == self.sparse
        return model, initial, mask

    def recipe(self, **fields: Any) -> Recipe:
        length = {} if "epochs" in fields else {"iterations": self.iterations}
        return Recipe(**{"batch_size": self.batch_size, **length, **fields})


CASES = {
    "perceptron": Case(perceptron),
    "wide perceptron": Case(wide_perceptron),
    "convolutions": Case(convolutions),
    "sparse perceptron": Case(perceptron, 0.92, 16, 4, sparse=True),
    "sparse convolutions": Case(watched_convolutions, 0.92, 16, 4, sparse=True),
    "packed convolutions": Case(convolutions, 0.92, 16, 4, sparse=True),
    "packed wide convolutions": Case(wide_convolutions, 0.92, 16, 4, sparse=True),
    "packed even convolutions": Case(even_convolutions, 0.92, 16, 4, sparse=True),
    "packed averaged convolutions": Case(averaged_convolutions, 0.92, 16, 4, sparse=True),
}
AUGMENTED = Augmentation(flip=True, crop=1)

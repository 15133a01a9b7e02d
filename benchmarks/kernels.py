"""Time of a training step by density: layers of survivors against eager PyTorch with the mask multiplied in.

    python benchmarks/kernels.py lenet|resnet20|vgg16 [density ...]

Both steps run in turns in one process and on one thread; what is printed are medians and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tombola import kernels


class LeNet(nn.Sequential):
    """LeNet-300-100."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """The ResNet of 20 layers for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class VGG16(nn.Sequential):
    """VGG-16 with batch normalisation for CIFAR-10."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for stage in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, 10))


# name -> model, image shape, densities of the targets, repetitions
WORK: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[float], int]] = {
    "lenet": (LeNet, (1, 28, 28), [0.5, 0.2, 0.1, 0.05, 0.01], 200),
    "resnet20": (ResNet20, (3, 32, 32), [0.1, 0.02], 5),
    "vgg16": (VGG16, (3, 32, 32), [0.1, 0.02], 2),
}


class FusedSGD:
    """SGD with momentum in one call for all parameters, without the generality that a step of torch.optim pays."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters and forgets their gradients."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._fused_sgd_(
            self.parameters, gradients, self.momenta,
            lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        for p in self.parameters:
            p.grad = None


def dense_step(model: nn.Module, mask: dict[str, Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    """What is replaced: an eager loop that multiplies the mask in before each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    masks = {name: alive.float() for name, alive in mask.items()}
    parameters = dict(model.named_parameters())

    def step() -> None:
        with torch.no_grad():
            for name, alive in masks.items():
                parameters[name].mul_(alive)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimizer.step()

    return step


def sparse_step(model: nn.Module, mask: dict[str, Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    """The same step over the survivors."""
    model = kernels.sparsify(model, mask, len(x))
    optimizer = FusedSGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimizer.step()

    return step


def interleaved(steps: list[Callable[[], None]], repetitions: int) -> list[float]:
    """Median seconds of each step."""
    times: list[list[float]] = [[] for _ in steps]
    for repetition in range(-2, repetitions):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if repetition >= 0:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Prints a line per density."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("density", nargs="*", type=float)
    arguments = parser.parse_args()
    make, shape, densities, repetitions = WORK[arguments.work]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(f"{arguments.work}, batch 128, {kernels.instruction_set()}\ndensity  dense ms  sparse ms  ratio")
    for density in arguments.density or densities:
        torch.manual_seed(0)
        model, x, y = make(), torch.randn(128, *shape), torch.randint(10, (128,))
        mask = {name: torch.rand_like(p) < density for name, p in model.named_parameters() if p.dim() > 1}
        sparse = sparse_step(copy.deepcopy(model), mask, x, y)
        if len(shape) == 3 and shape[0] == 3:
            x = x.to(memory_format=torch.channels_last)
            for parameter in model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)
        dense, own = interleaved([dense_step(model, mask, x, y), sparse], repetitions)
        print(f"{density:7.3g} {dense * 1e3:9.2f} {own * 1e3:10.2f} {own / dense:6.2f}", flush=True)


if __name__ == "__main__":
    main()

"""A training step of `tombola.train` against the same step in a loop by hand, eager PyTorch over tensors in memory."""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from tombola import Augmentation, Dataset, Mask, Recipe, find_tickets, prune, train
from tombola.importance import magnitude
from tombola.importance.network_scores import NETWORK_SCORES
from tombola.models import lenet_300_100, resnet18, resnet20, vgg16
from tombola.training.batches import batches, normalisation
from tombola.training.scoring import score_network

BATCH = 128

if "BENCHMARK_KERNELS" in os.environ:  # of run.py
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import golden

    _FORCED = golden.force_kernels(os.environ["BENCHMARK_KERNELS"])  # kept: what is forced ends with it
    _FORCED.__enter__()


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


def lenet(iterations: int = 200, images: int = 30_000) -> System:
    """LeNet-300-100 on images of MNIST's shape."""
    return System(lenet_300_100, random_images(images, (1, 28, 28)), Recipe(iterations=iterations, batch_size=BATCH))


def convolutional(build: Callable[[], nn.Module], iterations: int, side: int = 32) -> System:
    """A network on square images, by default of CIFAR-10's shape, with the paper's recipe."""
    recipe = Recipe(
        momentum=0.9,
        weight_decay=1e-4,
        iterations=iterations,
        batch_size=BATCH,
        augmentation=Augmentation(flip=True, crop=4),
    )
    return System(build, random_images(4000, (3, side, side)), recipe)


def cifar_resnet() -> System:
    """ResNet-20."""
    return convolutional(resnet20, 7)


def cifar_vgg() -> System:
    """VGG-16."""
    return convolutional(vgg16, 4)


def imagenet_resnet() -> System:
    """ResNet-18 with the stem for ImageNet, on images of Tiny ImageNet's shape."""
    return convolutional(resnet18, 4, 64)


def ours(system: System, mask: Mask) -> float:
    """Return the seconds of one step of tombola's training."""
    model = system.build()
    marks: list[tuple[int, float]] = []
    train(
        model,
        model.state_dict(),
        mask,
        system.data,
        system.recipe,
        seed=0,
        watch=lambda iteration, _: marks.append((iteration, time.perf_counter())),
        watch_every=0.1,
    )
    return _step(marks)


def by_hand(system: System, mask: Mask, *, channels_last: bool = False) -> float:
    """Return the seconds of one step of the loop by hand: the mask multiplied in before each forward pass."""
    model = system.build()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = system.recipe
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    parameters = dict(model.named_parameters())
    pruned = [(parameters[name], alive.float()) for name, alive in mask.items() if not alive.all()]
    return _step(enumerate(_trained_by_hand(system, model, optimizer, pruned, channels_last=channels_last)))


def _trained_by_hand(
    system: System,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruned: list[tuple[nn.Parameter, torch.Tensor]],
    *,
    channels_last: bool = False,
    batches_ready: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> list[float]:
    """Train by the loop by hand, masks multiplied into weights before each step; return the time after each."""
    marks: list[float] = []
    inputs_of = batches_ready or _ready_batches(system)
    for iteration in range(system.recipe.iterations or 0):
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
    return marks


def score(system: System, name: str, batches: int) -> float:
    """Return the seconds of a score of the dense network on so many batches."""
    model = system.build()
    mask, state = Mask.ones_like(model), model.state_dict()
    begun = time.perf_counter()
    score_network(
        NETWORK_SCORES[name],
        mask,
        model=model,
        state=state,
        data=system.data,
        loss=functional.cross_entropy,
        seed=0,
        examples=batches * BATCH,
        batch_size=BATCH,
    )
    return time.perf_counter() - begun


def by_peer(system: System, mask: Mask, replace: Callable[[nn.Linear], nn.Module]) -> float:
    """Return the seconds of one step of the loop by hand with each linear layer replaced by another package's."""
    model = system.build()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, alive in mask.items():
            parameters[name].mul_(alive)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, replace(layer))
    optimizer = torch.optim.SGD(model.parameters(), system.recipe.lr)
    return _step(enumerate(_trained_by_hand(system, model, optimizer, [])))


def small_resnet() -> System:
    """ResNet-20 of half the width on batches of 64, as in the preset `resnet20-cifar10-small`, for 40 iterations."""
    system = convolutional(functools.partial(resnet20, width=8, batchnorm_init="uniform"), 40)
    return replace(system, recipe=system.recipe.model_copy(update={"batch_size": 64}))


def chain(system: System, levels: int, fraction: float, *, channels_last: bool = False) -> tuple[float, float]:
    """Return the seconds of lottery ticket rewinding: ours, and those of the same in a loop by hand."""
    model = system.build()
    begun = time.perf_counter()
    found = find_tickets(model, system.data, system.recipe, magnitude, levels=levels, fraction=fraction, seed=0)
    assert len(list(found)) == levels + 1
    ours = time.perf_counter() - begun
    begun = time.perf_counter()
    _chain_by_hand(system, levels, fraction, channels_last=channels_last)
    return ours, time.perf_counter() - begun


def _chain_by_hand(system: System, levels: int, fraction: float, *, channels_last: bool) -> None:
    model, recipe = system.build(), system.recipe
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    masks = [torch.ones_like(weight, requires_grad=False) for weight in weights]
    ready = _ready_batches(system, levels + 1)
    for level in range(levels + 1):
        model.load_state_dict(initial)
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        masked = list(zip(weights, masks, strict=True))
        _trained_by_hand(system, model, optimizer, masked, channels_last=channels_last, batches_ready=ready)
        if level < levels:
            alive = torch.cat([w.detach().abs()[m > 0] for w, m in zip(weights, masks, strict=True)])
            threshold = alive.kthvalue(round(fraction * len(alive))).values
            masks = [m * (w.detach().abs() > threshold) for w, m in zip(weights, masks, strict=True)]


def limit(system: System, mask: Mask) -> float:
    """Return the seconds below which no step can be: its products at the measured peak, or its inputs read once.

    Products: those of the surviving weights, forward and backward, at the measured peak, see `peak_products`.
    Memory: the bytes of the batch and of the surviving weights, their gradients and the network's activations, once
    each.
    """
    model = system.build()
    inputs = torch.randn(BATCH, *system.data.train_inputs.shape[1:])
    work: dict[str, int] = {}
    activations = 0

    def count(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            nonlocal activations
            activations += output.numel()
            pixels = output.numel() // output.shape[1]
            first = not work
            work[name] = 2 * pixels * int(mask[f"{name}.weight"].count_nonzero()) * (2 if first else 3)

        return hook

    for name, module in model.named_modules():
        if f"{name}.weight" in mask:
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model(inputs)
    moved = 4 * (inputs.numel() + 2 * activations + 3 * mask.alive)
    return max(sum(work.values()) / peak_products(), moved / peak_memory())


@functools.cache
def peak_products() -> float:
    """Return the operations a second of a product of two matrices or of a convolution, the higher one, measured.

    On processors of AMD, MKL multiplies matrices by AVX2 alone, and oneDNN computes convolutions by AVX-512.
    """
    size, channels, side, images = 1536, 256, 16, 32
    a, b, c = (torch.randn(size, size) for _ in range(3))
    matrices = 2 * size**3 / _best(lambda: torch.mm(a, b, out=c), 7)
    x = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    work = 2 * images * side**2 * weight.numel()
    return max(matrices, work / _best(lambda: functional.conv2d(x, weight, padding=1), 7))


@functools.cache
def peak_memory() -> float:
    """Return the bytes a second at which memory is copied (read and written), measured."""
    a = torch.randn(1 << 26)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / _best(lambda: b.copy_(a), 7)


def _best(function: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def input_side(system: System) -> float:
    """Return the seconds that one batch takes to be gathered, augmented and normalised."""
    made = batches(system.data, system.recipe, 0, 0, 20)
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        next(made)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _ready_batches(system: System, trainings: int = 1) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the input side of the loop by hand: normalised in advance where nothing is augmented, else as ours."""
    data = system.data
    if system.recipe.augmentation != Augmentation():
        made = batches(data, system.recipe, 0, 0, trainings * (system.recipe.iterations or 0))
        return lambda _: next(made)
    inputs = normalisation(data)(data.train_inputs)
    order = torch.randperm(len(inputs))

    def batch(iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = order[iteration * BATCH : (iteration + 1) * BATCH]
        return inputs[chosen], data.train_labels[chosen]

    return batch


def random_images(count: int, shape: tuple[int, int, int]) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=draw, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=draw)
    channels = shape[0]
    classes = tuple(map(str, range(10)))
    return Dataset("random", images, labels, images[:10], labels[:10], classes, (0.5,) * channels, (0.25,) * channels)


def _step(marks: Iterable[tuple[int, float]]) -> float:
    """Return the median time of an iteration between two marks, each an iteration and a time, after a warm-up."""
    pairs = list(itertools.pairwise(marks))
    return statistics.median(
        (then - begun) / (end - begin)
        for (begin, begun), (end, then) in pairs[min(math.ceil(len(pairs) / 10), len(pairs) - 1) :]
    )

"""Training steps on a GPU: the times of the four networks at batch 128, then those of several trainings at once.

Each time is the median of a step, with the least and the greatest in brackets. The variants take turns; each turn
begins with steps that are not timed. The images are in the GPU's memory. Convolutional networks are channels-last, and
their batches are cropped and flipped, by tombola's own code for all variants.

  by hand                PyTorch as it is installed: SGD with momentum, the mask multiplied in after each step
  by hand, float32       the same without TF32
  graph by hand          the same, and the whole step is one CUDA graph, whose learning rate is fixed
  graph by hand, equal   the same with deterministic algorithms
  tombola, no graph      `tombola.train` of a network that it does not record as a CUDA graph
  tombola                `tombola.train`
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from steps import BATCH, System, random_images
from tombola import Augmentation, Dataset, Mask, Recipe, train
from tombola.models import lenet_300_100, resnet18, resnet20, vgg16
from tombola.training.batches import batches, normalisation
from tombola.training.determinism import deterministic_algorithms
from tombola.training.weights import state_hash

DEVICE = "cuda"
DENSITY = 0.2
UNTIMED = 12  # steps at the beginning of a turn
BLOCKS = 4  # in a turn; the steps of a block are timed together
TURNS = 3

Precision: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Network:
    """A network, the shape and the number of its images, and the number of steps in a block."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    images: int
    block: int


NETWORKS = {
    "LeNet-300-100": Network(lenet_300_100, (1, 28, 28), 60_000, 100),
    "ResNet-20": Network(resnet20, (3, 32, 32), 50_000, 40),
    "VGG-16": Network(vgg16, (3, 32, 32), 50_000, 20),
    "ResNet-18": Network(resnet18, (3, 64, 64), 20_000, 6),
}


@cache
def system(name: str, precision: Precision = "float32", blocks: int = BLOCKS) -> System:
    """Return what is trained. The data set of a network is one object, which `train` copies to the GPU once."""
    network = NETWORKS[name]
    recipe = Recipe(
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        batch_size=BATCH,
        iterations=UNTIMED + blocks * network.block,
        augmentation=Augmentation() if network.shape[0] == 1 else Augmentation(flip=True, crop=4),
        precision=precision,
    )
    return System(network.build, _images(network.images, network.shape), recipe)


_images = cache(random_images)


@cache
def mask(name: str) -> Mask:
    """Return the mask of a network, the same in each process."""
    torch.manual_seed(0)
    return system(name).mask(DENSITY)


@dataclass
class Clock:
    """Notes the time after each block of steps, when the GPU has done them."""

    block: int
    steps: int = 0
    marks: list[float] = field(default_factory=list)
    tf32: str = ""

    def tick(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps >= UNTIMED and (self.steps - UNTIMED) % self.block == 0:
            synchronize()
            self.marks.append(time.perf_counter())
            convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            self.tf32 = f"convolutions {'on' if convolutions else 'off'}, products {'on' if products else 'off'}"

    def milliseconds(self) -> list[float]:
        """Return the time of a step in each block."""
        return [1e3 * (after - before) / self.block for before, after in itertools.pairwise(self.marks)]


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ours(system: System, mask: Mask, clock: Clock, *, recorded: bool = True) -> str:
    """Train by tombola; return the hash of the weights."""
    torch.manual_seed(0)
    model = system.build()
    if not recorded:
        model.register_forward_hook(lambda *_: None)  # Python code that a recorded step would not repeat
    watch = lambda *_: clock.tick()  # noqa: E731
    trained = train(model, model.state_dict(), mask, system.data, system.recipe, 0, device=DEVICE, watch=watch)
    return trained.weights.hash


class ByHand:
    """The step of a loop by hand."""

    def __init__(self, system: System, mask: Mask) -> None:
        torch.manual_seed(0)
        self.system = system
        self.model = system.build().to(DEVICE)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        recipe, parameters = system.recipe, dict(self.model.named_parameters())
        self.optimizer = torch.optim.SGD(
            parameters.values(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.pruned = [(parameters[name], alive.float().to(DEVICE)) for name, alive in mask.items()]
        bfloat16 = recipe.precision == "bfloat16"
        self.autocast = torch.autocast(DEVICE, torch.bfloat16) if bfloat16 else nullcontext()
        self.apply_mask()

    @torch.no_grad()
    def apply_mask(self) -> None:
        for weight, alive in self.pruned:
            weight.mul_(alive)

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        with self.autocast:
            loss = functional.cross_entropy(self.model(inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.apply_mask()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a training: normalised in advance where nothing is augmented, else by tombola."""
        recipe, data = self.system.recipe, _on_device(self.system.data)
        iterations = recipe.iterations or 0
        if recipe.augmentation != Augmentation():
            for inputs, labels in batches(data, recipe, 0, 0, iterations):
                yield inputs.contiguous(memory_format=torch.channels_last), labels
            return
        inputs = normalisation(data)(data.train_inputs)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        for iteration in range(iterations):
            chosen = order[iteration * BATCH % len(inputs) :][:BATCH]
            yield inputs[chosen], data.train_labels[chosen]


@cache
def _on_device(data: Dataset) -> Dataset:
    return replace(data, train_inputs=data.train_inputs.to(DEVICE), train_labels=data.train_labels.to(DEVICE))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether convolutions may use TF32; torch allows it unless told otherwise, and not in matrix products."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def by_hand(system: System, mask: Mask, clock: Clock, *, with_tf32: bool = True) -> None:
    """Train by the loop by hand."""
    with tf32(with_tf32):
        loop = ByHand(system, mask)
        for inputs, labels in loop.batches():
            loop.step(inputs, labels)
            clock.tick()


def graph_by_hand(system: System, mask: Mask, clock: Clock, *, deterministic: bool = False) -> None:
    """Train by the loop by hand, the whole step as one CUDA graph."""
    with tf32(False), deterministic_algorithms(DEVICE if deterministic else "cpu"):
        loop = ByHand(system, mask)
        inputs, labels = (tensor.clone() for tensor in next(loop.batches()))
        graph = record(loop, inputs, labels)
        for new_inputs, new_labels in loop.batches():
            inputs.copy_(new_inputs)
            labels.copy_(new_labels)
            graph.replay()
            clock.tick()


def record(
    loop: ByHand, inputs: Tensor, labels: Tensor, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """Record a step as a CUDA graph after three others, which run on another stream, as torch's manual says."""
    aside = stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            loop.step(inputs, labels)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    loop.optimizer.zero_grad()
    with torch.cuda.graph(graph, stream=aside):
        loop.step(inputs, labels)
    return graph


Variant: TypeAlias = Callable[[System, Mask, Clock], object]

FLOAT32: dict[str, Variant] = {
    "by hand": by_hand,
    "by hand, float32": partial(by_hand, with_tf32=False),
    "graph by hand": graph_by_hand,
    "graph by hand, equal": partial(graph_by_hand, deterministic=True),
    "tombola, no graph": partial(ours, recorded=False),
    "tombola": ours,
}
BFLOAT16 = {name: variant for name, variant in FLOAT32.items() if name not in ("by hand, float32", "graph by hand")}


def table(networks: list[str], precision: Precision, variants: dict[str, Variant], turns: int = TURNS) -> None:
    """Print the time of a step of each network by each variant."""
    for name in networks:
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        used: dict[str, str] = {}
        for _ in range(turns):
            for variant, run in variants.items():
                clock = Clock(NETWORKS[name].block)
                run(system(name, precision), mask(name), clock)
                times[variant] += clock.milliseconds()
                used[variant] = clock.tf32
        first = statistics.median(next(iter(times.values())))
        for variant, each in times.items():
            median = statistics.median(each)
            figures = f"{median:8.3f} ms ({min(each):7.3f} to {max(each):7.3f})  ratio {median / first:5.2f}"
            print(f"{name:14s} {precision:9s} {variant:21s} {figures}  TF32: {used[variant]}", flush=True)


SMALL: dict[tuple[str, Precision], int] = {
    ("LeNet-300-100", "float32"): 40,
    ("ResNet-20", "float32"): 8,
    ("ResNet-20", "bfloat16"): 16,
}
"""The networks and precisions of which several trainings run at once, and the number of blocks of each."""


def in_processes(name: str, precision: Precision, counts: tuple[int, ...], *, recorded: bool = True) -> None:
    """Print the time of a step for each number of equal trainings at once, one process each, and compare their bits."""
    how = "processes" if recorded else "processes, no graph"
    alone: tuple[Any, ...] | None = None
    for count in counts:
        command = [sys.executable, __file__, "--one", name, precision, "graph" if recorded else "none"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate()[0].split() for process in processes]
        median = statistics.median(float(milliseconds) for milliseconds, _ in printed)
        weights = {each for _, each in printed}
        alone = alone or (median, weights)
        _print_several(name, precision, f"{count} {how}", median, count * alone[0] / median, weights == alone[1])


def one(name: str, precision: Precision, graph: Literal["graph", "none"]) -> None:
    """Train once: print "ready", wait for a line, then print the time of a step and the hash of the weights."""
    clock = _Waiting(NETWORKS[name].block)
    weights = ours(system(name, precision, SMALL[name, precision]), mask(name), clock, recorded=graph == "graph")
    print(statistics.median(clock.milliseconds()), weights)


def in_streams(name: str, precision: Precision, counts: tuple[int, ...], rounds: int = 300) -> None:
    """Print the time of a step of each of several graphs by hand, each on a stream of its own, and compare their bits.

    Each graph trains on one batch. Nothing else happens, so this is the most that several trainings in one process can
    gain.
    """
    alone: tuple[Any, ...] | None = None
    for count in counts:
        with deterministic_algorithms(DEVICE):
            loops = [ByHand(system(name, precision), mask(name)) for _ in range(count)]
            streams = [torch.cuda.Stream() for _ in loops]  # type: ignore[no-untyped-call]
            kept = [tuple(tensor.clone() for tensor in next(loop.batches())) for loop in loops]
            graphs = [
                record(loop, inputs, labels, stream)
                for loop, (inputs, labels), stream in zip(loops, kept, streams, strict=True)
            ]
            synchronize()
            begun = time.perf_counter()
            for _ in range(rounds):
                for graph, stream in zip(graphs, streams, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
            synchronize()
            each = 1e3 * (time.perf_counter() - begun) / rounds
        weights = {state_hash(loop.model.state_dict()) for loop in loops}
        alone = alone or (each, weights)
        _print_several(name, precision, f"{count} streams", each, count * alone[0] / each, weights == alone[1])


def _print_several(name: str, precision: Precision, how: str, each: float, ratio: float, equal: bool) -> None:
    bits = "each with the bits it has alone" if equal else "OTHER BITS THAN ALONE"
    print(
        f"{name:14s} {precision:9s} {how:21s} {each:7.3f} ms, {ratio:5.2f} times the steps of one, {bits}", flush=True
    )


class _Waiting(Clock):
    """A clock that waits for a line before the first block."""

    def tick(self) -> None:
        if self.steps + 1 == UNTIMED:
            print("ready", flush=True)
            sys.stdin.readline()
        super().tick()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    table(list(NETWORKS), "float32", FLOAT32)
    table(list(NETWORKS), "bfloat16", BFLOAT16)
    for name, precision in SMALL:
        in_streams(name, precision, (1, 2, 4))
        in_processes(name, precision, (1, 2, 4))
    in_processes("ResNet-20", "bfloat16", (1, 2, 4), recorded=False)


if __name__ == "__main__":
    main()

"""All benchmarks: prints a table and writes `results.json` beside this file, or `results-avx2.json`.

Each line is our time (or memory) against what it replaces, in the same run, the two in turn; the ratio is of the
medians, smaller is better. Steps are timed in one process pinned to one processor and one thread. With `--avx2`, both
use AVX2 at most, also on a processor that has AVX-512; this needs what the tests need.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "BENCHMARK_KERNELS": "avx2",  # which steps.py reads
}
"""The limits of torch, MKL, oneDNN and the kernels for `--avx2`."""


@dataclass(frozen=True)
class Line:
    """One line of the table; `ratio` is ours / theirs, `limit` the least that the machine could take, where known."""

    name: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    target: float
    limit: float | None = None


def line(
    name: str, ours: list[float], theirs: list[float], unit: str, target: float, limit: float | None = None
) -> Line:
    """Return the line of measurements that were made in turn."""
    our_median, their_median = statistics.median(ours), statistics.median(theirs)
    ratio = round(our_median / their_median, 3)
    return Line(name, round(our_median, 4), round(their_median, 4), unit, ratio, target, limit and round(limit, 4))


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Measure the two in turn."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def dense_steps() -> Iterator[Line]:
    """The dense steps of LeNet-300-100 and ResNet-20, and the input side."""
    import steps

    lenet, resnet = steps.lenet(), steps.cifar_resnet()
    ones = lenet.mask(1)
    ours, theirs = in_turn(lambda: 1e3 * steps.ours(lenet, ones), lambda: 1e3 * steps.by_hand(lenet, ones), 11)
    yield line("LeNet-300-100 step, dense, against a loop by hand", ours, theirs, "ms", 1.0)
    ones = resnet.mask(1)
    ours, theirs = in_turn(lambda: 1e3 * steps.ours(resnet, ones), lambda: 1e3 * steps.by_hand(resnet, ones), 3)
    yield line("ResNet-20 step, dense, against a loop by hand", ours, theirs, "ms", 0.8)
    inputs = [1e3 * steps.input_side(resnet) for _ in range(5)]
    yield line("ResNet-20's input side, against the whole step", inputs, ours, "ms", 0.03)


def sparse_steps() -> Iterator[Line]:
    """Steps by density, against eager PyTorch with the mask multiplied in (channels-last for convolutions)."""
    import steps

    targets = {
        "LeNet-300-100": (steps.lenet(), 7, {1: 0.9, 0.5: 0.75, 0.2: 0.4, 0.1: 0.14, 0.05: 0.1, 0.01: 0.05}),
        "ResNet-20": (steps.cifar_resnet(), 3, {0.5: 0.9, 0.1: 0.45, 0.02: 0.22, 0.005: 0.17}),
        "VGG-16": (steps.cifar_vgg(), 1, {0.5: 0.95, 0.1: 0.5, 0.02: 0.25, 0.005: 0.15}),
        "ResNet-18, 64 x 64,": (steps.imagenet_resnet(), 1, {0.1: 0.5, 0.02: 0.25}),
    }
    for name, (system, rounds, by_density) in targets.items():
        for density, target in by_density.items():
            mask = system.mask(density)
            ours, theirs = in_turn(
                lambda system=system, mask=mask: 1e3 * steps.ours(system, mask),  # type: ignore[misc]
                lambda system=system, mask=mask, last=name != "LeNet-300-100": (
                    1e3  # type: ignore[misc]
                    * steps.by_hand(system, mask, channels_last=last)
                ),
                rounds,
            )
            least = 1e3 * steps.limit(system, mask)
            yield line(f"{name} step, density {density}, against masked eager", ours, theirs, "ms", target, least)


def scores() -> Iterator[Line]:
    """Scores of the whole network, against training steps by hand on as many examples."""
    import steps

    systems = {
        "LeNet-300-100": (steps.lenet(), 8, 7),
        "ResNet-20": (steps.cifar_resnet(), 2, 3),
        "VGG-16": (steps.cifar_vgg(), 1, 2),
    }
    for name, (system, batches, rounds) in systems.items():
        ones, last = system.mask(1), name != "LeNet-300-100"
        for score in (each for each in steps.NETWORK_SCORES if each != "concrete"):  # which learns over many steps
            ours, theirs = in_turn(
                lambda system=system, score=score, batches=batches: (  # type: ignore[misc]
                    1e3 * steps.score(system, score, batches) / batches
                ),
                lambda system=system, ones=ones, last=last: 1e3 * steps.by_hand(system, ones, channels_last=last),  # type: ignore[misc]
                rounds,
            )
            yield line(f"{name}, {score} of a batch, against a training step", ours, theirs, "ms", 1.5)


def whole_chain() -> Iterator[Line]:
    """A chain of LeNet-300-100, one epoch a level on as many images as MNIST has, and one of a small ResNet-20."""
    import steps

    ours, theirs = steps.chain(steps.lenet(469, 60_000), 24, 0.2)
    yield line("LeNet-300-100, a chain of 24 levels, against a loop by hand", [ours], [theirs], "s", 0.2)
    ours, theirs = steps.chain(steps.small_resnet(), 10, 0.5, channels_last=True)
    yield line("small ResNet-20, a chain of 10 levels, against masked eager", [ours], [theirs], "s", 0.5)


PEERS = ("sparseprop==0.1.14", "sparselab==0.2.2")


def peers() -> Iterator[Line]:
    """Steps against those of other packages, which are installed into a folder of the benchmark's own."""
    folder = HERE / ".peers"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    if not (folder / "installed").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder]
        subprocess.run([*install, "pybind11", "setuptools<81", "wheel"], check=True)
        subprocess.run([*install, "--no-build-isolation", "--no-deps", *PEERS], check=True, env=environment)
        (folder / "installed").touch()
    command = [sys.executable, "-W", "ignore", HERE / "peers.py"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    targets = {"0.2": 0.22, "0.1": 0.2, "0.01": 0.1}
    for density, rounds in json.loads(printed.splitlines()[-1]).items():
        ours, prop, lab = ([each[index] for each in rounds] for index in range(3))
        name, theirs = min(("SparseProp", prop), ("SparseLab", lab), key=lambda one: statistics.median(one[1]))
        title = f"LeNet-300-100 step, density {density}, against {name}, the faster of two"
        yield line(title, ours, theirs, "ms", targets[density])


def pruning() -> Iterator[Line]:
    """One round of pruning, each in a process of its own."""

    def measure(which: str) -> tuple[float, float]:
        printed = subprocess.run(
            [sys.executable, HERE / "pruning.py", which], check=True, capture_output=True, text=True
        ).stdout
        seconds, extra = json.loads(printed)
        return seconds, extra / 1e9

    rounds = [{which: measure(which) for which in ("magnitude", "l1", "torch")} for _ in range(2)]
    for importance in ("magnitude", "l1"):
        for index, what, unit, target in ((0, "time", "s", 1 / 6), (1, "extra memory", "GB", 1 / 4)):
            ours = [each[importance][index] for each in rounds]
            theirs = [each["torch"][index] for each in rounds]
            name = f"pruning 125 M weights by {importance}, {what}, against torch's by magnitude"
            yield line(name, ours, theirs, unit, round(target, 3))


def workers() -> Iterator[Line]:
    """Trainings an hour with two workers against one: seconds a training, between the first and the last one done."""

    def measure(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = ["tombola", "run", "digits", "--store", f"{folder}/store", "--workers", str(count)]
            command += ["--recipe.epochs", "40", "--levels", "2", "--data-seeds", "--seeds", "0", "1"]
            command[0] = str(Path(sys.executable).with_name("tombola"))
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                marks = [time.perf_counter() for printed in process.stdout if re.match(r"\[\d+/", printed)]
        skipped = 4  # until both workers are at work
        return (marks[-1] - marks[skipped]) / (len(marks) - 1 - skipped)

    ours, theirs = in_turn(lambda: measure(2), lambda: measure(1), 2)
    yield line("seconds a training with 2 workers, against 1", ours, theirs, "s", round(1 / 1.8, 3))


def help_text() -> Iterator[Line]:
    """`tombola --help` against half a second."""
    command = [str(Path(sys.executable).with_name("tombola")), "--help"]
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    yield line("tombola --help, against half a second", seconds, [0.5], "s", 1.0)


def _machine() -> str:
    """Return what one thread of this machine can do at most; measured in a process of its own, as all else is."""
    measure = (
        "import torch, steps; torch.set_num_threads(1); print(steps.peak_products() / 1e9, steps.peak_memory() / 1e9)"
    )
    command = [sys.executable, "-c", measure]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE).stdout
    products, memory = map(float, printed.split())
    return f"one thread of this machine: {products:.0f} Gflop/s in products, {memory:.1f} GB/s in a copy"


PINNED = {"dense": dense_steps, "sparse": sparse_steps, "scores": scores, "chain": whole_chain}
FREE = {"pruning": pruning, "workers": workers, "help": help_text, "peers": peers}


def main() -> None:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *PINNED, *FREE], help="which to run; all by default")
    parser.add_argument("--avx2", action="store_true", help="use AVX2 at most, on both sides")
    options = parser.parse_args()
    chosen = options.names or [*FREE, *PINNED]
    if options.avx2:
        os.environ |= AVX2  # before torch is loaded, which reads them then
    lines: list[Line] = []
    if set(chosen) & set(PINNED):
        print(_machine(), flush=True)
    for name in sorted(chosen, key=[*FREE, *PINNED].index):
        if name in PINNED:
            import torch

            import tombola

            torch.set_num_threads(1)
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            assert tombola.__version__
        for made in {**FREE, **PINNED}[name]():
            verdict = "met" if made.ratio <= made.target else "MISSED"
            figures = f"{made.ours:9.4g} {made.theirs:9.4g} {made.unit:3s}"
            least = f"  the machine's limit {made.limit:.3g} {made.unit}" if made.limit else ""
            ratios = f"ratio {made.ratio:5.3f}  target {made.target:5.3f}  {verdict:6s}"
            print(f"{made.name:75s} {figures} {ratios}{least}", flush=True)
            lines.append(made)
    results = HERE / ("results-avx2.json" if options.avx2 else "results.json")
    results.write_text(json.dumps([asdict(made) for made in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()

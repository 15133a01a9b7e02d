"""All benchmarks: prints a table and writes `results.json` beside this file.

Each line is our time (or memory) against what it replaces, in the same run, the two in turn; the ratio is of the
medians, smaller is better. Steps are timed in one process pinned to one processor and one thread.
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


@dataclass(frozen=True)
class Line:
    """One line of the table; `ratio` is ours / theirs."""

    name: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    target: float


def line(name: str, ours: list[float], theirs: list[float], unit: str, target: float) -> Line:
    """Return the line of measurements that were made in turn."""
    our_median, their_median = statistics.median(ours), statistics.median(theirs)
    return Line(name, round(our_median, 4), round(their_median, 4), unit, round(our_median / their_median, 3), target)


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Measure the two in turn."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def dense_steps() -> Iterator[Line]:
    """The dense steps of LeNet-300-100 and ResNet-20, and the input side."""
    import steps

    lenet, resnet = steps.lenet(), steps.cifar_resnet()
    ones = lenet.mask(1)
    ours, theirs = in_turn(lambda: 1e3 * steps.ours(lenet, ones), lambda: 1e3 * steps.by_hand(lenet, ones), 15)
    yield line("LeNet-300-100 step, dense, against a loop by hand", ours, theirs, "ms", 1.0)
    ones = resnet.mask(1)
    ours, theirs = in_turn(lambda: 1e3 * steps.ours(resnet, ones), lambda: 1e3 * steps.by_hand(resnet, ones), 5)
    yield line("ResNet-20 step, dense, against a loop by hand", ours, theirs, "ms", 0.8)
    inputs = [1e3 * steps.input_side(resnet) for _ in range(5)]
    yield line("ResNet-20's input side, against the whole step", inputs, ours, "ms", 0.03)


def sparse_steps() -> Iterator[Line]:
    """Steps by density, against eager PyTorch with the mask multiplied in (channels-last for convolutions)."""
    import steps

    targets = {
        "LeNet-300-100": (steps.lenet(), 9, {1: 0.9, 0.5: 0.75, 0.2: 0.4, 0.1: 0.3, 0.05: 0.22, 0.01: 0.15}),
        "ResNet-20": (steps.cifar_resnet(), 3, {0.1: 0.85, 0.02: 0.6}),
        "VGG-16": (steps.cifar_vgg(), 1, {0.1: 0.7, 0.02: 0.3}),
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
            yield line(f"{name} step, density {density}, against masked eager", ours, theirs, "ms", target)


def pruning() -> Iterator[Line]:
    """One round of pruning, each in a process of its own."""

    def measured(which: str) -> tuple[float, float]:
        printed = subprocess.run(
            [sys.executable, HERE / "pruning.py", which], check=True, capture_output=True, text=True
        ).stdout
        seconds, extra = json.loads(printed)
        return seconds, extra / 1e9

    rounds = [{which: measured(which) for which in ("magnitude", "l1", "torch")} for _ in range(3)]
    for importance in ("magnitude", "l1"):
        for index, what, unit, target in ((0, "time", "s", 1 / 6), (1, "extra memory", "GB", 1 / 4)):
            ours = [each[importance][index] for each in rounds]
            theirs = [each["torch"][index] for each in rounds]
            name = f"pruning 125 M weights by {importance}, {what}, against torch's by magnitude"
            yield line(name, ours, theirs, unit, round(target, 3))


def workers() -> Iterator[Line]:
    """Trainings an hour with two workers against one: seconds a training, between the first and the last one done."""

    def measured(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = ["tombola", "run", "digits", "--store", f"{folder}/store", "--workers", str(count)]
            command += ["--recipe.epochs", "60", "--levels", "2", "--data-seeds", "--seeds", "0", "1"]
            command[0] = str(Path(sys.executable).with_name("tombola"))
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                marks = [time.perf_counter() for printed in process.stdout if re.match(r"\[\d+/", printed)]
        skipped = 4  # until both workers are at work
        return (marks[-1] - marks[skipped]) / (len(marks) - 1 - skipped)

    ours, theirs = in_turn(lambda: measured(2), lambda: measured(1), 3)
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


PINNED = {"dense": dense_steps, "sparse": sparse_steps}
FREE = {"pruning": pruning, "workers": workers, "help": help_text}


def main() -> None:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *PINNED, *FREE], help="which to run; all by default")
    chosen = parser.parse_args().names or [*FREE, *PINNED]
    lines: list[Line] = []
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
            print(
                f"{made.name:75s} {figures} ratio {made.ratio:5.3f}  target {made.target:5.3f}  {verdict}", flush=True
            )
            lines.append(made)
    (HERE / "results.json").write_text(json.dumps([asdict(made) for made in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()

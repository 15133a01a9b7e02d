"""The analyses that train nothing, of 15 tickets of ResNet-18 with 200 classes: the seconds that each takes.

    python benchmarks/analyses.py [--store DIR] [ANALYSIS ...]

Five importances and three seeds, at one level of density 0.1. The networks are trained for one step each, on 64 images
of 64 x 64 pixels; the test set has 64, too. A store that is given is kept, so that a later call trains nothing. Each
analysis runs in a process of its own, as a user runs it, and reads the tickets from the store. Printed are the seconds
that pass, and the processor time of all its threads. Of the latter, the part in which networks compute their outputs is
printed too: it grows with the number of images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
from torch import nn

import tombola
from tombola import Dataset, Study
from tombola.models.resnet import ResNet


def images() -> Dataset:
    """Return 64 training and 64 test images of random pixels, whose classes are random, too."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (128, 3, 64, 64), generator=random, dtype=torch.uint8)
    labels = torch.randint(200, (128,), generator=random)
    classes = tuple(f"class {number}" for number in range(200))
    return Dataset("random", pixels[:64], labels[:64], pixels[64:], labels[64:], classes, (0.5,) * 3, (0.25,) * 3)


def study() -> Study:
    """Return the study of the tickets: 15 of level 1, and the dense networks of three seeds."""
    return tombola.load_study(
        "resnet18-tinyimagenet",
        {
            "task.dataset": "analyses:images",
            "task.dataset_arguments": {},
            "data_seeds": [],
            "levels": 1,
            "fraction": 0.9,
            "recipe.epochs": 1,
            "recipe.schedule": "constant",
            "recipe.milestones": [],
            "recipe.batch_size": 64,
            "recipe.rewind": 0,
        },
    )


ANALYSES: dict[str, Callable[[Path], pl.DataFrame]] = {
    "overlap": lambda store: tombola.overlap(study(), store=store, levels=[1]),
    "winners": lambda store: tombola.winners(study(), store=store),
    "initial": lambda store: tombola.initial(study(), store=store),
    "weights": lambda store: tombola.weights(study(), store=store),
    "layers": lambda store: tombola.layers(study(), store=store),
    "functions": lambda store: tombola.functions(study(), store=store),
    "stability": lambda store: tombola.stability(study(), store=store),
    "connectivity, 2 points": lambda store: tombola.connectivity(study(), store=store, levels=[1], points=2),
    "similarity": lambda store: tombola.similarity(study(), store=store),
    "basins, 2 points": lambda store: tombola.basins(study(), store=store, points=2),
    "claims": lambda store: tombola.claims(study(), store=store),
    "matching, 3 pairs": lambda store: tombola.matching(study(), store=store, importances=["magnitude"], draws=1),
}


def main(root: Path, names: list[str]) -> None:
    """Train what the store does not have, and measure each analysis."""
    tombola.run(study(), store=root, workers=1)
    for name in names or ANALYSES:
        subprocess.run([sys.executable, __file__, "--store", str(root), "--here", name], check=True)


def measure(root: Path, name: str) -> None:
    """Print how long an analysis takes, and how long its networks compute their outputs."""
    begun, outputs = threading.local(), list[float]()

    def before(module: nn.Module, given: object) -> None:
        if isinstance(module, ResNet):
            begun.at = time.thread_time()

    def after(module: nn.Module, given: object, output: object) -> None:
        if isinstance(module, ResNet):
            outputs.append(time.thread_time() - begun.at)

    nn.modules.module.register_module_forward_pre_hook(before)
    nn.modules.module.register_module_forward_hook(after)
    begin, begin_here = time.process_time(), time.perf_counter()
    table = ANALYSES[name](root)
    whole, passed = time.process_time() - begin, time.perf_counter() - begin_here
    networks = f"{sum(outputs):.1f} s of it in networks"
    print(f"{name}: {passed:.1f} s; {whole:.1f} s of processor time, {networks}; {len(table)} rows", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="the folder of a store that is kept")
    parser.add_argument("--here", action="store_true", help="measure in this process, with the store as it is")
    parser.add_argument("analyses", nargs="*", metavar="ANALYSIS", help=f"some of: {'; '.join(ANALYSES)}")
    options = parser.parse_args()
    if unknown := [name for name in options.analyses if name not in ANALYSES]:
        parser.error(f"unknown analyses: {'; '.join(unknown)}; choose from: {'; '.join(ANALYSES)}")
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        if options.here:
            for name in options.analyses:
                measure(store, name)
        else:
            main(store, options.analyses)

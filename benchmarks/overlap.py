"""The overlap table of 15 tickets of ResNet-18 size at 25 levels, from masks on disk: seconds and peak memory.

python benchmarks/overlap.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from tombola import Mask, Store
from tombola.analysis import overlap

TICKETS, LEVELS, FRACTION = 15, 25, 0.2


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the 21 prunable layers of ResNet-18: 11.3 M connections."""
    yield "conv1.weight", (64, 3, 3, 3)
    channels = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            yield f"layer{stage}.{block}.conv1.weight", (width, channels, 3, 3)
            yield f"layer{stage}.{block}.conv2.weight", (width, width, 3, 3)
            if channels != width:
                yield f"layer{stage}.{block}.shortcut.weight", (width, channels, 1, 1)
            channels = width
    yield "fc.weight", (200, channels)


def write(store: Store) -> None:
    """Store masks at random whose layers differ in density."""
    layers = dict(shapes())
    random = np.random.default_rng(0)
    for ticket in range(TICKETS):
        for level in range(LEVELS):
            bits = {}
            for name, shape in layers.items():
                density = (1 - FRACTION) ** level * random.uniform(0.3, 1)
                drawn = random.random(int(np.prod(shape)), dtype=np.float32) < density
                bits[name] = np.packbits(drawn, bitorder="little")
            store.masks.put(f"{ticket}.{level}", Mask(layers, bits))


def measure(store: Store) -> None:
    """Print how long the table takes, and how much memory the process came to."""
    wall, cpu = time.perf_counter(), time.process_time()
    tables = []
    for level in range(LEVELS):
        masks = {f"t{ticket}": store.masks.get(f"{ticket}.{level}") for ticket in range(TICKETS)}
        tables.append(overlap.of_masks({name: mask for name, mask in masks.items() if mask is not None}))
    table = pl.concat(tables)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{len(table)} rows: {wall:.1f} s, {cpu:.1f} s of processor time, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(Store(Path(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write(Store(Path(folder)))
            subprocess.run([sys.executable, __file__, folder], check=True)

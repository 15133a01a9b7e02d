"""CIFAR-10, from the official binary version.

A file holds records of 3073 bytes: the label, then the image's red, green and blue values, row by row.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tombola.datasets.cache import About, Fill, load_cached
from tombola.datasets.dataset import Dataset
from tombola.datasets.files import find_or_download, folders
from tombola.datasets.tree import Tree, open_tree, stamp
from tombola.errors import UserError

NAMES = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")
"""Names of the files of the version for Python."""

TRAIN, TEST = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
MEAN, SD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the train set, on the scale where a pixel lies in 0..1."""


def cifar10(directory: Path | None = None) -> Dataset:
    """Return CIFAR-10: 50,000 and 10,000 images, uint8 of shape (3, 32, 32).

    Args:
        directory: holds the folder `cifar-10-batches-bin` or `cifar-10-binary.tar.gz`, itself or in a folder `cifar10`;
            where neither is there, the archive is downloaded into that folder. None looks in `data/` and in the user's
            cache folder, and downloads into it.

    Raises:
        UserError: for files that are damaged, or missing and cannot be downloaded, and for the version for Python.
            That version consists of pickles, which are never loaded, because a pickle can run any program.
    """
    looked = folders(directory, "cifar10")
    if not any((folder / name).exists() for folder in looked for name in (*NAMES, TRAIN[0])):
        for pickled in (folder / name for folder in looked for name in PICKLED):
            if pickled.exists():
                raise UserError(
                    f"{pickled}: this is CIFAR-10's version for Python, made of pickles, which are never loaded: "
                    f"get the binary version, {URL}, and put it into {pickled.parent}"
                )
    source = find_or_download("cifar10", directory, NAMES, TRAIN[0], URL, SHA256)
    files = {*TRAIN, *TEST}
    return load_cached(source, directory, "", stamp(source, files), lambda: _read(open_tree(source, files)))


def _read(tree: Tree) -> tuple[About, Fill]:
    """Read the binary version."""
    lacking = {*TRAIN, *TEST} - set(tree.names)
    if lacking:
        raise UserError(f"{tree.path}: {min(lacking)!r} is missing, expected the binary version of CIFAR-10")
    batches = {name: _records(tree, name, content) for name, content in tree.contents((*TRAIN, *TEST))}
    train, test = (np.concatenate([batches[name] for name in names]) for names in (TRAIN, TEST))

    def fill(pixels: int) -> None:
        with os.fdopen(pixels, "wb", closefd=False) as file:
            for batch in (train, test):
                file.write(np.ascontiguousarray(batch[:, 1:]).data)

    train_labels, test_labels = (tuple(batch[:, 0].tolist()) for batch in (train, test))
    return About("cifar10", SHAPE, train_labels, test_labels, CLASSES, MEAN, SD), fill


def _records(tree: Tree, name: str, content: bytes) -> npt.NDArray[np.uint8]:
    """Return the records of a file, shape (n, 3073)."""
    where = f"{tree.path}: {name!r}"
    if not content or len(content) % RECORD:
        raise UserError(f"{where} is cut short: expected records of {RECORD} bytes, got {len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    wrong = records[:, 0] >= len(CLASSES)
    if wrong.any():
        index = int(wrong.argmax())
        raise UserError(f"{where}: label {records[index, 0]} of example {index} is out of range, expected 0..9")
    return records

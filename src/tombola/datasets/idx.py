"""MNIST and Fashion-MNIST, from the official IDX files.

The format, big-endian: two zero bytes, one byte for the type of the numbers (8: unsigned byte), one byte for the number
of dimensions, four bytes for the length of each dimension, then the numbers. A file may be gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tombola.datasets.dataset import Dataset
from tombola.datasets.files import absence_error, download, download_folder, folders
from tombola.errors import UserError
from tombola.files import open_regular

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""The official names, the same for both data sets; '.gz' may follow."""

LARGEST = 1 << 30
"""Maximum number of bytes of a file; the largest official one has 47 million."""

LARGEST_RATIO = 1032
"""The largest ratio of gzip's compression."""

UNSIGNED_BYTE = 8
"""The code for unsigned bytes in an IDX file."""


@dataclass(frozen=True)
class _Source:
    """One data set in IDX files: its names, its source and its contents."""

    name: str
    subfolders: tuple[str, ...]
    url: str
    sha256: Mapping[str, str]
    """Of the official gzipped files. Downloads must have it; the user's own files need not."""
    labels_sha256: str
    """Of the official train labels. It distinguishes the two data sets, whose files have the same names."""
    classes: tuple[str, ...]
    mean: float
    std: float
    elsewhere: tuple[Path, ...] = ()


MNIST = _Source(
    name="mnist",
    subfolders=("mnist", "MNIST/raw"),
    url="https://ossci-datasets.s3.amazonaws.com/mnist",
    sha256={
        "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    labels_sha256="1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    classes=tuple("0123456789"),
    mean=0.1307,
    std=0.3081,
)

FASHION_MNIST = _Source(
    name="fashion-mnist",
    subfolders=("fashion-mnist", "FashionMNIST/raw"),
    url="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    sha256={
        "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    labels_sha256="657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    mean=0.2860,
    std=0.3530,
    elsewhere=(Path("/usr/share/datasets/fashion-mnist"),),  # Debian's package dataset-fashion-mnist
)


def mnist(directory: Path | None = None) -> Dataset:
    """Return MNIST: 60,000 and 10,000 handwritten digits, uint8 images of shape (1, 28, 28).

    Args:
        directory: holds the four IDX files, or has a folder `mnist` that does; files that are in neither are
            downloaded into that folder. None looks in `data/` and in the user's cache folder, and downloads into it.

    Raises:
        UserError: for files that are missing and cannot be downloaded, are damaged, or do not fit together.
    """
    return _load(MNIST, directory)


def fashion_mnist(directory: Path | None = None) -> Dataset:
    """Return Fashion-MNIST: 60,000 and 10,000 pieces of clothing, uint8 images of shape (1, 28, 28).

    Args:
        directory: as for `mnist`, the folder's name being `fashion-mnist`; the folder of Debian's package
            `dataset-fashion-mnist` is tried before anything is downloaded.

    Raises:
        UserError: for files that are missing and cannot be downloaded, are damaged, or do not fit together.
    """
    return _load(FASHION_MNIST, directory)


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Args:
        path: the file.
        dimensions: required number of dimensions: 3 for images (n, height, width), 1 for labels (n,).

    Raises:
        UserError: if the file is not such a file; it names the file, what was expected and what was found.
    """
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    with _open(path) as (file, most):
        raw = file.read(header)
        if raw[:4] != magic:
            raise UserError(
                f"{path}: not an IDX file of unsigned bytes with {dimensions} dimension{'s' * (dimensions > 1)}: "
                f"expected it to begin with {magic.hex(' ')}, got {raw[:4].hex(' ') or 'nothing'}"
            )
        if len(raw) < header:
            raise UserError(f"{path}: cut short: expected a header of {header} bytes, got {len(raw)}")
        shape = struct.unpack(f">{dimensions}I", raw[4:])
        size = math.prod(shape)
        expected = f"expected {header + size} bytes for the shape {shape}"
        if header + size > most:  # before memory is used
            got = f"at most {most}" if isinstance(file, gzip.GzipFile) else most
            raise UserError(f"{path}: cut short: {expected}, got {got}")
        if size > LARGEST:
            raise UserError(f"{path}: {expected}, which are more than the {LARGEST} of the largest data set")
        content = file.read(size)
        if len(content) < size:
            raise UserError(f"{path}: cut short: {expected}, got {header + len(content)}")
        if file.read(1):
            raise UserError(f"{path}: too long: {expected}, got more")
    if 0 in shape:
        raise UserError(f"{path}: it holds no example, its shape is {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file, decompressed if it is gzipped; yield it and the largest number of bytes that it can have.

    Raises:
        UserError: if it is not a regular file, or what is read of it is damaged.
    """
    try:
        with open_regular(path) as raw:
            size = os.fstat(raw.fileno()).st_size
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                yield raw, size
                return
            try:
                with gzip.GzipFile(fileobj=raw) as file:
                    yield cast(IO[bytes], file), LARGEST_RATIO * size
            except EOFError as error:
                raise UserError(f"{path}: cut short: the gzip file ends before its end marker") from error
            except (OSError, zlib.error) as error:
                raise UserError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _load(source: _Source, directory: Path | None) -> Dataset:
    paths = _find(source, directory)
    train_inputs, train_labels = _read_split(source, *paths[:2])
    test_inputs, test_labels = _read_split(source, *paths[2:])
    if train_inputs.shape[1:] != test_inputs.shape[1:]:
        (_, *train), (_, *test) = train_inputs.shape[1:], test_inputs.shape[1:]
        raise UserError(
            f"{paths[2]}: its images are of {test[0]} x {test[1]} pixels, those of {paths[0].name} of "
            f"{train[0]} x {train[1]}"
        )
    return Dataset(
        source.name,
        train_inputs,
        train_labels,
        test_inputs,
        test_labels,
        classes=source.classes,
        mean=(source.mean,),
        std=(source.std,),
    )


def _read_split(source: _Source, images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    """Return the images (n, 1, height, width) and labels (n,) of the train or the test set."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: {len(labels)} labels, but {images_path} holds {len(images)} images")
    if labels.max() >= len(source.classes):
        index = int(np.argmax(labels >= len(source.classes)))
        raise UserError(
            f"{labels_path}: label {labels[index]} of example {index} is out of range, "
            f"expected 0..{len(source.classes) - 1}"
        )
    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    for other in (MNIST, FASHION_MNIST):
        if other is not source and digest == other.labels_sha256:
            raise UserError(
                f"{labels_path}: these are the files of {other.name!r}, not of {source.name!r}: "
                f"put those of {source.name!r} into a folder {source.name!r} of the data directory"
            )
    return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))


def _find(source: _Source, directory: Path | None) -> list[Path]:
    """Return the paths of the four files, after a download if some are missing."""
    looked = [*folders(directory, *source.subfolders), *source.elsewhere]
    best = max(
        looked, key=lambda folder: len(_present(folder))
    )  # the first folder among those with most of the four files
    found = _present(best)
    folder = best if found else download_folder(directory, source.name)
    for name in FILES:
        if name in found:
            continue
        try:
            found[name] = download(f"{source.url}/{name}.gz", source.sha256[name], folder)
        except UserError as error:
            absent = [f"{each}.gz" for each in FILES if each not in found]
            into = folder if found else looked[0]
            raise absence_error(source.name, [folder] if found else looked, error, absent, into) from error
    return [found[name] for name in FILES]


def _present(folder: Path) -> dict[str, Path]:
    """Return those of the four files that are in `folder`, by their official name."""
    paths = {name: [folder / name, folder / f"{name}.gz"] for name in FILES}
    return {name: path for name, choices in paths.items() for path in choices[::-1] if path.is_file()}

"""Decoded images on disk, from where later runs map them into memory.

An entry is a folder of two files: `pixels`, the train and then the test images as raw bytes, and `about.json`,
everything else. It is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock

from tombola.datasets.dataset import Dataset, digest_of, fingerprint_of
from tombola.datasets.files import cache_folder
from tombola.errors import UserError
from tombola.files import sync_folder

SCHEME = 1
"""Version of the files' layout and of how images are decoded: an entry of another one is never used."""

FOLDER = ".tombola-cache"
"""What the cache is called in a data directory."""

CHUNK = 4 << 20
"""Bytes that are in memory at a time where the pixels are gone through."""


@dataclass(frozen=True)
class About:
    """What a data set of images is besides its pixels.

    Args:
        name: the data set's.
        shape: of an image: channels, height, width.
        train_labels, test_labels: one an image.
        classes: the classes' names.
        mean, sd: one number a channel; empty where they are to be computed from the train set.
    """

    name: str
    shape: tuple[int, int, int]
    train_labels: tuple[int, ...]
    test_labels: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    sd: tuple[float, ...] = ()

    @property
    def image_bytes(self) -> int:
        """Bytes in an image."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def bytes(self) -> int:
        """Bytes in all images."""
        return self.image_bytes * (len(self.train_labels) + len(self.test_labels))


Fill = Callable[[int], None]
"""Writes all pixels to a file, given its descriptor, that has the right size already."""


def cached(
    source: Path, directory: Path | None, variant: str, stamp: str, make: Callable[[], tuple[About, Fill]]
) -> Dataset:
    """Return a data set of images from the cache, into which it is first written where it is not there.

    Args:
        source: the folder or archive that the images come from.
        directory: the data directory, None for the folder that the source is in; the cache is in it where it can be
            written to, else in the user's cache folder.
        variant: what was asked for; entries for one source that differ in it stand side by side.
        stamp: tells the source's state; an entry for another state is replaced.
        make: called where there is no entry, says what belongs into it.

    Raises:
        UserError: where the cache cannot be written, as on a full disk, and whatever `make` raises. Nothing is left of
            an entry then.
    """
    source = source.resolve()
    home = directory.resolve() if directory and directory.is_dir() else source.parent
    name = f"{source.name}-{_hash(os.path.relpath(source, home), variant)[:8]}"
    folder = f"{name}-{_hash(str(SCHEME), stamp)[:32]}"
    for cache in (home / FOLDER, cache_folder() / "pictures"):
        dataset = _open(cache / folder)
        if dataset:
            return dataset
    cache = home / FOLDER if _writable(home) else cache_folder() / "pictures"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            dataset = _open(cache / folder)  # another process may have written it while this one waited
            if dataset:
                return dataset
            for old in cache.glob(f"{glob.escape(name)}-*"):  # of another state, or of a process that was killed
                shutil.rmtree(old)
            about, fill = make()
            _write(cache, folder, about, fill)
            dataset = _open(cache / folder)
    except OSError as error:
        raise UserError(f"{cache}: decoded images cannot be kept here: {error.strerror or error}") from error
    assert dataset is not None
    return dataset


def _write(cache: Path, folder: str, about: About, fill: Fill) -> None:
    """Write an entry, whole or not at all."""
    partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{folder}-", suffix=".partial"))
    try:
        with (partial / "pixels").open("w+b") as pixels:
            reserve(pixels.fileno(), about.bytes)
            fill(pixels.fileno())
            os.fsync(pixels.fileno())
            about, fingerprint = _measured(about, pixels)
        with (partial / "about.json").open("w") as file:
            json.dump(asdict(about) | {"fingerprint": fingerprint}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o755)
        sync_folder(partial)
        partial.rename(cache / folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{cache}: the decoded images, {about.bytes / 1e6:.1f} MB, cannot be written here: "
            f"{error.strerror or error}; nothing of them was left"
        ) from error
    sync_folder(cache)


def _open(entry: Path) -> Dataset | None:
    """Map an entry's pixels into memory; None where there is no whole entry."""
    try:
        content = json.loads((entry / "about.json").read_text())
        fingerprint = content.pop("fingerprint")
        fields: dict[str, Any] = {key: tuple(value) if key != "name" else value for key, value in content.items()}
        about = About(**fields)
        if (entry / "pixels").stat().st_size != about.bytes:
            return None
        pixels = torch.from_file(str(entry / "pixels"), shared=False, size=about.bytes, dtype=torch.uint8)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    images = pixels.view(-1, *about.shape)
    train = len(about.train_labels)
    return Dataset(
        about.name,
        images[:train],
        torch.tensor(about.train_labels),
        images[train:],
        torch.tensor(about.test_labels),
        classes=about.classes,
        mean=about.mean,
        sd=about.sd,
    ).remember(fingerprint)


def reserve(pixels: int, size: int) -> None:
    """Give a file its size and, where the system can, its room on the disk, so that a full disk is noticed at once."""
    os.truncate(pixels, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(pixels, 0, size)


def _measured(about: About, pixels: BinaryIO) -> tuple[About, str]:
    """Return what is known of a data set, with mean and sd, and its fingerprint, in one pass over the pixels."""
    shape = about.shape
    totals, squares = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    digests = []
    pixels.seek(0)
    for labels, is_train in ((about.train_labels, True), (about.test_labels, False)):
        digest = hashlib.sha256()
        for count in _chunks(len(labels), max(1, CHUNK // about.image_bytes)):
            content = pixels.read(count * about.image_bytes)
            digest.update(content)
            if is_train and not about.mean:
                values = np.frombuffer(content, np.uint8).reshape(count, shape[0], -1)
                totals += values.sum((0, 2), dtype=np.int64)
                squares += np.einsum("ncp,ncp->c", values, values, dtype=np.int64)
        inputs = [str(torch.uint8), str((len(labels), *shape)), digest.hexdigest()]
        digests += [inputs, digest_of(torch.tensor(labels))]
    if not about.mean:
        mean, sd = mean_and_sd(totals.tolist(), squares.tolist(), len(about.train_labels) * shape[1] * shape[2])
        about = replace(about, mean=mean, sd=sd)
    return about, fingerprint_of(len(about.classes), about.mean, about.sd, digests)


def mean_and_sd(
    totals: Sequence[int], squares: Sequence[int], count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of pixels on the scale 0..1, exact but for one rounding each.

    Args:
        totals: the sum of the values 0..255 of each channel.
        squares: the sum of their squares.
        count: how many pixels each channel has.

    Returns:
        One number a channel; the standard deviation of a channel whose pixels are all equal is given as 1.

    >>> mean_and_sd([255], [255 * 255], 2)
    ((0.5,), (0.5,))
    """
    pairs = list(zip(totals, squares, strict=True))
    mean = tuple(total / (255 * count) for total, _ in pairs)
    sd = tuple(math.sqrt(count * square - total * total) / (255 * count) or 1.0 for total, square in pairs)
    return mean, sd


def _chunks(count: int, most: int) -> list[int]:
    """Split `count` into numbers of at most `most`."""
    return [min(most, count - start) for start in range(0, count, most)]


def _writable(directory: Path) -> bool:
    """Tell whether the cache can be in this directory; one that nobody may write to is left alone by root as well."""
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK | os.X_OK)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()

"""Decoded images on disk, from where later runs map them into memory.

An entry is a folder of two files: `pixels`, the train and then the test images as raw bytes, and `about.json`,
everything else, with a hash of it and of the entry's name. It is written under another name and renamed when it is
whole. Whenever it is mapped, the fingerprint of what is mapped is computed: an entry that has been changed since it was
written, or that is that of another data set, is written again. This takes about 0.7 seconds for each GB on a processor
with instructions for SHA-256.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
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
from tombola.files import read_regular, remove_path, sync_folder

SCHEME = 1
"""Version of the files' layout and of how images are decoded: an entry of another one is never used."""

FOLDER = ".tombola-cache"
"""Name of the cache folder in a data directory."""

LARGEST_ABOUT = 1 << 28
"""Maximum size of `about.json` in bytes."""

CHUNK = 4 << 20
"""Bytes per read when all pixels are read in sequence."""


class CacheWarning(UserWarning):
    """Decoded images on disk were not those that were written, and images are decoded again."""


@dataclass(frozen=True)
class About:
    """What a data set of images is besides its pixels.

    Args:
        name: the data set's.
        shape: of an image: channels, height, width.
        train_labels, test_labels: one an image.
        classes: the classes' names.
        mean, std: one number a channel; empty where they are to be computed from the train set.
    """

    name: str
    shape: tuple[int, int, int]
    train_labels: tuple[int, ...]
    test_labels: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

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
"""A function that writes all pixels to a file of the right size, given its descriptor."""


def load_cached(
    source: Path, directory: Path | None, variant: str, stamp: str, make: Callable[[], tuple[About, Fill]]
) -> Dataset:
    """Return a data set of images from the cache, into which it is first written where it is not there.

    Args:
        source: the folder or archive that the images come from.
        directory: the data directory, None for the folder that the source is in; the cache is in it where it can be
            written to, else in the user's cache folder.
        variant: identifies the options; one source may have several entries that differ in it.
        stamp: identifies the state of the source; an entry for another state is replaced.
        make: returns the content of a new entry; called only if there is no entry.

    Warns:
        CacheWarning: if an entry is damaged and images are decoded again.

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
    cache = home / FOLDER if _is_writable(home) else cache_folder() / "pictures"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            dataset = _open(cache / folder)  # another process may have written it while this one waited
            if dataset:
                return dataset
            if os.path.lexists(cache / folder):
                text = f"{cache / folder}: these decoded images are not those that were written; they are decoded again"
                warnings.warn(text, CacheWarning, stacklevel=2)
            for old in cache.glob(f"{glob.escape(name)}-*"):  # of another state, or of a process that was killed
                remove_path(old)
            about, fill = make()
            _write(cache, folder, about, fill)
            dataset = _open(cache / folder)
    except OSError as error:
        raise UserError(f"{cache}: decoded images cannot be kept here: {error.strerror or error}") from error
    assert dataset is not None
    return dataset


def _write(cache: Path, folder: str, about: About, fill: Fill) -> None:
    """Write an entry atomically."""
    free = shutil.disk_usage(cache).free
    if about.bytes > free:
        raise UserError(
            f"{cache}: the decoded images, {about.bytes / 1e6:.1f} MB, cannot be written here: "
            f"only {free / 1e6:.1f} MB of the disk are free"
        )
    partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{folder}-", suffix=".partial"))
    try:
        with (partial / "pixels").open("w+b") as pixels:
            reserve(pixels.fileno(), about.bytes)
            fill(pixels.fileno())
            os.fsync(pixels.fileno())
            about, fingerprint = _measure(about, pixels)
        with (partial / "about.json").open("w") as file:
            document = asdict(about) | {"fingerprint": fingerprint}
            json.dump(document | {"hash": _seal(folder, document)}, file)
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
    """Map an entry's pixels into memory; None if there is no complete entry, or it is not what was written."""
    try:
        content = json.loads(read_regular(entry / "about.json", LARGEST_ABOUT))
        if content.pop("hash", None) not in (None, _seal(entry.name, content)):  # earlier versions wrote none
            return None
        fingerprint = content.pop("fingerprint")
        if "sd" in content:  # its name in entries of tombola's first version
            content["std"] = content.pop("sd")
        fields: dict[str, Any] = {key: tuple(value) if key != "name" else value for key, value in content.items()}
        about = About(**fields)
        if (entry / "pixels").stat().st_size != about.bytes:
            return None
        pixels = torch.from_file(str(entry / "pixels"), shared=False, size=about.bytes, dtype=torch.uint8)
        images, train = pixels.view(-1, *about.shape), len(about.train_labels)
        dataset = Dataset(
            about.name,
            images[:train],
            torch.tensor(about.train_labels),
            images[train:],
            torch.tensor(about.test_labels),
            classes=about.classes,
            mean=about.mean,
            std=about.std,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError):
        return None
    return dataset if dataset.fingerprint == fingerprint else None


def reserve(pixels: int, size: int) -> None:
    """Set the size of a file and, if the system supports it, allocate its disk space: a full disk fails at once."""
    os.truncate(pixels, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(pixels, 0, size)


def _measure(about: About, pixels: BinaryIO) -> tuple[About, str]:
    """Return `about` with mean and std, and the fingerprint of the data set, in one pass over the pixels."""
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
        mean, std = mean_and_std(totals.tolist(), squares.tolist(), len(about.train_labels) * shape[1] * shape[2])
        about = replace(about, mean=mean, std=std)
    return about, fingerprint_of(len(about.classes), about.mean, about.std, digests)


def mean_and_std(
    totals: Sequence[int], squares: Sequence[int], count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels on the scale 0..1, computed exactly and rounded once.

    Args:
        totals: sum of the values 0..255 of each channel.
        squares: sum of the squares of these values, for each channel.
        count: number of pixels of each channel.

    Returns:
        One number per channel. The standard deviation of a channel whose pixels are all equal is 1.

    >>> mean_and_std([255], [255 * 255], 2)
    ((0.5,), (0.5,))
    """
    pairs = list(zip(totals, squares, strict=True))
    mean = tuple(total / (255 * count) for total, _ in pairs)
    std = tuple(math.sqrt(count * square - total * total) / (255 * count) or 1.0 for total, square in pairs)
    return mean, std


def _chunks(count: int, most: int) -> list[int]:
    """Split `count` into numbers of at most `most`."""
    return [min(most, count - start) for start in range(0, count, most)]


def _is_writable(directory: Path) -> bool:
    """Return whether the cache can be in this directory. Root, too, respects a directory without write permission."""
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK | os.X_OK)


def _seal(entry: str, document: dict[str, Any]) -> str:
    """Return the hash of the name of an entry and of what its `about.json` says."""
    return _hash(entry, json.dumps(document, sort_keys=True))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()

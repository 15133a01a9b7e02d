"""Folders and archives of images: listed, decoded by all processors, kept in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tombola.cores import count_cores
from tombola.datasets import decoder
from tombola.datasets.cache import About, Fill, load_cached
from tombola.datasets.dataset import Dataset
from tombola.datasets.decoder import Form, TroubleError
from tombola.datasets.files import require
from tombola.datasets.progress import Bar
from tombola.datasets.tree import Tree, open_tree, read_file, stamp
from tombola.errors import UserError

FEW = 500
"""So many images are decoded sooner by this process than others are started."""

MOST = 16
"""More processes than this are not fed fast enough to be of use."""

LARGEST_SIDE = 4096
"""Maximum height and width of the images of a data set, in pixels."""

SUFFIXES = (".png", ".jpg", ".jpeg")
"""How the names of images end, in small or large letters."""


@dataclass(frozen=True)
class Listing:
    """Which images make a data set.

    Args:
        classes: the classes' names.
        train, test: for each image its name in the tree and the number of its class, in the data set's order.
    """

    classes: tuple[str, ...]
    train: Sequence[tuple[str, int]]
    test: Sequence[tuple[str, int]]


def image_set(
    name: str,
    source: Path,
    directory: Path | None,
    entries: Collection[str],
    listing: Callable[[Tree], Listing],
    size: int | None = None,
    fit: bool = False,
    channels: int = 3,
) -> Dataset:
    """Return a data set made of image files, from the cache or decoded into it.

    Args:
        name: the data set's.
        source: the folder or archive.
        directory: the data directory, where the cache is; None for the folder that the source is in.
        entries: the files and folders of interest at the top of the source.
        listing: tells which images there are; called only where they must be decoded.
        size: their height and width; None takes those of the first image.
        fit: bring others to this size, instead of refusing them.
        channels: 3 for colours, 1 for grey.

    Raises:
        UserError: for whatever is wrong with the source, naming the image, and a cache that cannot be written.
    """

    def make() -> tuple[About, Fill]:
        require("PIL", f"decoding the images of {source}")
        tree = open_tree(source, entries)
        listed = listing(tree)
        names = [image for image, _ in [*listed.train, *listed.test]]
        form = Form(channels, size, size, fit) if size else _form_of_first(tree, names, channels)
        train, test = (tuple(label for _, label in part) for part in (listed.train, listed.test))
        about = About(name, (channels, form.height, form.width), train, test, listed.classes)
        return about, lambda pixels: _decode_all(tree, names, form, pixels)

    return load_cached(source, directory, f"{size} {fit} {channels}", stamp(source, entries), make)


def is_image(name: str) -> bool:
    """Tell from a file's name whether it is an image that can be read.

    >>> is_image("a/b.JPEG"), is_image("a/b.txt")
    (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def _form_of_first(tree: Tree, names: Sequence[str], channels: int) -> Form:
    """Return the form of images that are all of the size of the one that can be read first."""
    name, content = next(tree.contents(names))
    try:
        height, width = decoder.size_of(content)
    except TroubleError as trouble:
        raise _trouble(tree, name, str(trouble)) from trouble
    if max(height, width) > LARGEST_SIDE:
        most = f"at most {LARGEST_SIDE} x {LARGEST_SIDE}"
        raise _trouble(tree, name, f"is {width} x {height} pixels, expected {most}: 'size' brings all to one size")
    return Form(channels, height, width, why=f" as {name!r} is: 'size' brings all to one size")


def _decode_all(tree: Tree, names: Sequence[str], form: Form, pixels: int) -> None:
    """Decode all images into a file, given by its descriptor; each has the place there that it has in `names`."""
    processes = min(count_cores(), MOST)
    with Bar(f"decoding {tree.path.name}", total=len(names)) as bar:
        contents = _Shared(tree, names, bar)
        if len(names) < FEW or processes == 1 or sys.platform == "win32":  # it has no files to hand on
            answers = [decoder.work(contents, pixels, form)]
        else:
            answers = _by_processes(processes, contents, pixels, form)
    for answer in answers:
        if "disk" in answer:
            raise OSError(answer["disk"], os.strerror(answer["disk"]))
    troubles = [answer for answer in answers if answer]
    if troubles:
        first = min(troubles, key=lambda answer: answer["place"])
        raise _trouble(tree, names[first["place"]], first["trouble"])


def _by_processes(processes: int, contents: _Shared, pixels: int, form: Form) -> list[dict[str, Any]]:
    """Have images decoded by several processes, each fed by a thread; return the answers of all."""
    command = decoder.command(pixels, form)

    def feed(_: int) -> dict[str, Any]:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[pixels]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError), process.stdin as pipe:  # one that has found trouble reads no more
                for place, content in contents:
                    decoder.send(pipe, place, content)
            said = process.stdout.read()
        answer: dict[str, Any] | None = json.loads(said) if process.returncode == 0 else None
        if answer != {}:
            contents.stop()
        if answer is None:
            raise UserError(f"a process that decodes images ended early, with status {process.returncode}")
        return answer

    with ThreadPoolExecutor(processes) as pool:
        try:
            return list(pool.map(feed, range(processes)))
        except BaseException:
            contents.stop()
            raise


class _Shared:
    """Images, each with its place, handed out once among the threads that go through this."""

    def __init__(self, tree: Tree, names: Sequence[str], bar: Bar) -> None:
        self._tree, self._bar = tree, bar
        self._places = {name: place for place, name in enumerate(names)}
        self._contents = tree.read(names)
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        while item := self._next():
            name, content = item
            try:
                yield self._places[name], read_file(content) if isinstance(content, Path) else content
            except OSError as error:
                raise _trouble(self._tree, name, f"cannot be read: {error.strerror}") from error

    def _next(self) -> tuple[str, Path | bytes] | None:
        with self._lock:
            item = None if self._stopped else next(self._contents, None)
            if item:
                self._bar.update(1)
            return item

    def stop(self) -> None:
        """Hand out no more."""
        self._stopped = True


def _trouble(tree: Tree, name: str, trouble: str) -> UserError:
    return UserError(f"{tree.path}: the image {name!r} {trouble}")

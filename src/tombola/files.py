"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from tombola.errors import UserError


def write_atomically(path: Path, content: bytes, within: Path | None = None) -> None:
    """Replace a file atomically: at any moment, the path holds either the complete new content or what it held before.

    A symbolic link stays, and the file that it names is replaced. A device or a pipe stays, and is written to.

    Args:
        path: the file.
        content: the new content.
        within: folder for the unfinished file, on the same file system; by default, the folder of `path`.

    Raises:
        UserError: if the folder cannot be written to.
    """
    try:
        if path.is_symlink():
            path = path.resolve()  # raises an error for a loop of links
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb", buffering=0) as special:
                _write_all(special.fileno(), content)
            return
        handle, temporary = tempfile.mkstemp(dir=within or path.parent, prefix=f".{path.name[:40]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write_durably(file.fileno(), content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.11 and 3.12 raise it for a loop of links
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def write_durably(handle: int, content: bytes) -> None:
    """Write all of `content` to an open file and call fsync."""
    _write_all(handle, content)
    os.fsync(handle)


def _write_all(handle: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]


def sync_folder(folder: Path) -> None:
    """Call fsync on a directory, so that the names of the files in it are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from tombola.errors import UserError


def write_atomically(path: Path, content: bytes, within: Path | None = None) -> None:
    """Write a file so that at any moment it is there whole or, as before, not at all.

    Args:
        path: the file.
        content: what it is to hold.
        within: a folder on the same file system for the unfinished file; by default the one that `path` is in.

    Raises:
        UserError: where the folder cannot be written to.
    """
    try:
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
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_durably(handle: int, content: bytes) -> None:
    """Write to an open file, and wait until that is on the disk."""
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

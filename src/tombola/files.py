"""Files: write a file completely or not at all, and read regular files only."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from tombola.errors import UserError, shorten


class IrregularFileError(OSError):
    """Something else than a regular file lies where one is expected, or the file is larger than allowed."""


_IRREGULAR = {errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR}
"""The errors of opening a loop of links, a path through something that is no folder, a socket, a folder."""

_READ = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):  # Windows has only the last, other systems the others
    _READ |= getattr(os, _flag, 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Nothing is waited for, whatever lies there: a pipe could wait for ever.

    Raises:
        IrregularFileError: if something else lies there, for example a folder, a pipe or a loop of links.
        OSError: if the file is missing or cannot be opened.
    """
    try:
        handle = os.open(path, _READ)
    except OSError as error:
        if error.errno in _IRREGULAR:
            raise IrregularFileError(error.errno, "it is not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise IrregularFileError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most so many bytes.

    Raises:
        IrregularFileError: if something else lies there, or the file is larger.
        OSError: if the file is missing or cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise IrregularFileError(errno.EFBIG, f"it has {size} bytes, expected at most {most}", str(path))
        return file.read()


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes, within: Path | None = None) -> None:
    """Replace a file atomically: at any moment, the path holds either the complete new content or what it held before.

    Args:
        path: the file.
        content: the new content.
        within: folder for the unfinished file, on the same file system; by default, the folder of `path`.

    Raises:
        UserError: if the folder cannot be written to.
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
    except (OSError, ValueError) as error:  # ValueError: the name has a null character
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


STORE_FILE = "store.json"
"""The file that makes a folder a store."""


def is_store(folder: Path) -> bool:
    """Return whether a folder is a store, as far as can be told from its file `store.json`."""
    try:
        return read_regular(folder / STORE_FILE, 100).startswith(b'{"store"')
    except OSError:
        return False


_SOURCES = {".py", ".toml", ".ipynb"}
"""The endings of files that users write themselves."""


def check_output(path: Path) -> None:
    """Raise `UserError` if this file cannot or should not be written; call this before anything is loaded."""
    try:
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file in it")
    except OSError as error:  # for example, a name that is too long
        raise UserError(f"{shorten(str(path))}: cannot be written: {error.strerror or error}") from error
    _check_not_precious(path)


def _check_not_precious(path: Path) -> None:
    """Raise `UserError` if this is a source file that is there already, or if it lies in a store."""
    try:
        for file in (path, path.resolve()):  # a link stays, and the file that it names is replaced
            if file.suffix.lower() in _SOURCES and path.is_file():
                raise UserError(f"{path}: is a {file.suffix} file, which is not replaced; name another file")
        for folder in path.resolve().parents:
            if is_store(folder):
                raise UserError(f"{path}: lies in the store {folder}; name a file in another folder")
    except (OSError, RuntimeError):  # it cannot be looked at, as with a loop of links; writing it will say so
        return
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: cannot be written: {error}") from error


def write_output(path: Path, content: bytes) -> None:
    """Write a file that a user has named, atomically if it is a regular file.

    A symbolic link stays, and the file that it names is replaced. A device or a pipe stays, and is written to, and so
    is a file that is open already, such as `/dev/stdout`. A file that users write themselves (.py, .toml, .ipynb) and
    what lies in a store is not replaced.

    Raises:
        UserError: if it cannot be written.
    """
    _check_not_precious(path)
    try:
        if (handle := _open_already(path)) is not None:
            _write_all(handle, content)
            return
        if path.is_symlink():
            path = path.resolve()  # raises an error for a loop of links
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():
            with path.open("wb", buffering=0) as special:
                _write_all(special.fileno(), content)
            return
    except (OSError, RuntimeError, OverflowError) as error:  # RuntimeError: a loop of links in Python 3.11 and 3.12
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    write_atomically(path, content)


def _open_already(path: Path) -> int | None:
    """Return the number of the open file that a path stands for, such as 1 for `/dev/stdout`; None for other paths."""
    if path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) and path.name.isdecimal():
        return int(path.name)
    return {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))


def write_durably(handle: int, content: bytes) -> None:
    """Write all of `content` to an open file and call fsync."""
    _write_all(handle, content)
    os.fsync(handle)


def _write_all(handle: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]


def sync_folder(folder: Path) -> None:
    """Call fsync on a directory, so that the names of the files in it are on the disk; Windows cannot."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

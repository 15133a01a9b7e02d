"""A tree of files: a folder, or a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip archive that is read like a folder.

Nothing is unpacked to disk. An archive is refused if it contains links, or names that lead out of the archive, or if
it is much larger when unpacked than a data set may be. The limits are checked before memory is used.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, TypeVar, cast

from tombola.errors import UserError
from tombola.files import IrregularFileError, open_regular, read_regular

_Item = TypeVar("_Item")

DEEPEST = 6
"""Maximum depth of folders. It stops at links that lead back to a parent folder."""

MOST_FILES = 2_000_000
"""Maximum number of files and folders; ImageNet has 1.3 million."""

LARGEST_FILE = 64 << 20
"""Maximum size of a file in bytes. A photograph has up to 50 MB, a file of CIFAR-10 has 31 MB."""

LONGEST_NAME = 4096
"""Maximum length of a name, as on most file systems."""

LARGEST_RATIO, ALWAYS_ALLOWED = 20, 1 << 29
"""Files of an archive may unpack to 20 times the archive's size, and to 512 MiB in any case. Images hardly compress."""

_LARGEST_HEADER = 1 << 20
"""Maximum size of what precedes a file in an archive, in bytes."""

_UTF_8, _NAME_AT = 0x800, 30
"""In a .zip archive: the flag of a name in UTF-8, and the place of the name in the header of a file."""

_LARGEST_DIRECTORY = 100 * MOST_FILES
"""Maximum size of the directory of a .zip archive, in bytes."""

_DAMAGED = (
    *(OSError, EOFError, RuntimeError, ValueError, OverflowError),
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, struct.error),
)
"""Exceptions that a damaged or encrypted archive may raise."""

_COMPRESSIONS: tuple[tuple[bytes, Callable[[BinaryIO], IO[bytes]]], ...] = (
    (b"\x1f\x8b", lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file))),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
)
"""The first bytes of compressed files, and how they are opened."""


@dataclass(frozen=True)
class Tree:
    """The contents of a folder or an archive.

    Args:
        path: the folder or the archive.
        top: the folder of an archive that contains everything else, with a slash; '' if there is none.
        names: sorted names, with slashes between the parts; the names of folders end with a slash. Hidden files are
            omitted.
        ranges: in a .tar archive, offset and size in bytes of each file.
    """

    path: Path
    top: str
    names: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def read(self, files: Collection[str]) -> Iterator[tuple[str, Path | bytes]]:
        """Yield each of `files` once, as the path in a folder or the bytes in an archive, in the fastest order.

        Raises:
            UserError: where the archive is damaged.
        """
        if self.path.is_dir():
            yield from ((name, self.path / name) for name in files)
            return
        with _refusals(self.path):
            yield from self._read_tar(files) if self.ranges else self._read_zip(files)

    def contents(self, files: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield each of `files` once, with its bytes.

        Raises:
            UserError: if a file cannot be read.
        """
        for name, content in self.read(files):
            try:
                yield name, read_file(content) if isinstance(content, Path) else content
            except OSError as error:
                raise UserError(f"{self.path / name}: cannot be read: {error.strerror}") from error

    def _read_zip(self, files: Collection[str]) -> Iterator[tuple[str, bytes]]:
        members = {self.top + name: name for name in files}
        with _open_zip(self.path) as (archive, file):
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                name = members.get(_clean_name(info.filename))
                if name is not None:
                    file.allowed = LARGEST_FILE + _LARGEST_HEADER
                    yield name, _read_member(archive, info)

    def _read_tar(self, files: Collection[str]) -> Iterator[tuple[str, bytes]]:
        with _open_tar(self.path) as (_, file):
            for name in sorted(files, key=lambda name: self.ranges[name]):
                start, size = self.ranges[name]
                file.seek(start)
                file.allowed = size
                content = file.read(size)
                if len(content) < size:
                    raise EOFError("it ends before its end marker")
                yield name, content


class _TooLargeError(Exception):
    """An archive asks for more than the limits; the text is the end of a sentence that begins with the archive."""


class _Bounded:
    """An open file that is not read beyond a limit, nor more than `allowed` bytes until that is set again.

    tarfile and zipfile read a header or a directory as a whole, of whatever size the archive says that it has.

    Args:
        file: the file; what is read of it is decompressed.
        end: the offset of the last byte that may be read.
        is_plain: whether the bytes of the file are not compressed.
    """

    def __init__(self, file: IO[bytes], end: int, is_plain: bool = True) -> None:
        self._file, self._end, self.is_plain = file, end, is_plain
        self.allowed = _LARGEST_HEADER
        self.tell, self.seekable = file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        size = self.allowed if size == -1 else size
        if not 0 <= size <= self.allowed:
            raise _TooLargeError("a header in it is too large")
        content = self._file.read(size)
        self.allowed -= len(content)
        self._check(self._file.tell())
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._check(offset)
        return self._file.seek(offset, whence)

    def _check(self, offset: int) -> None:
        if offset > self._end and self.is_plain:
            raise EOFError("it ends before a file that it lists")
        if offset > self._end:
            raise _TooLargeError(f"it unpacks to more than {self._end / 1e9:.1f} GB")


def open_tree(path: Path, entries: Collection[str]) -> Tree:
    """List the contents of a folder or an archive.

    Args:
        path: the folder or the archive.
        entries: the files and folders to list at the top; others are omitted.

    Raises:
        UserError: if the path is neither, or the archive is damaged, or contains links or names that lead out of it.
    """
    if path.is_dir():
        return Tree(path, "", tuple(sorted(_check_name(path, name) for name, _ in _walk(path, entries))))
    with _refusals(path):
        members = (_list_zip if _is_zip(path) else _list_tar)(path)
        listed = [(_check_name(path, name), size, start) for name, size, start in _count(path, members)]
    for name, count in Counter(name for name, *_ in listed).items():
        if count > 1 and not name.endswith("/"):
            raise UserError(f"{path}: this archive holds {name!r} {count} times")
    files = {name: (start, size) for name, size, start in sorted(listed) if not _is_hidden(name)}
    tops = {name.partition("/")[0] for name in files}
    top = f"{tops.pop()}/" if len(tops) == 1 and not tops & set(entries) else ""
    inside = {name.removeprefix(top): place for name, place in files.items()}
    kept = {name: place for name, place in inside.items() if name.partition("/")[0] in entries}
    for name, (_, size) in kept.items():
        if size > LARGEST_FILE:
            raise _refusal(path, f"{name!r} in it has {size} bytes, more than the {LARGEST_FILE} of the largest image")
    if sum(size for _, size in kept.values()) > (most := _largest_total(path.stat().st_size)):
        raise _refusal(path, f"it unpacks to more than {most / 1e9:.1f} GB")
    ranges = {name: (start, size) for name, (start, size) in kept.items() if start is not None}
    return Tree(path, top, tuple(kept), ranges)


def read_file(path: Path) -> bytes:
    """Return the content of a file in a folder.

    Raises:
        OSError: if it cannot be read, is not a regular file, or has more than `LARGEST_FILE` bytes.
    """
    return read_regular(path, LARGEST_FILE)


def stamp(path: Path, entries: Collection[str]) -> str:
    """Return a hash that changes whenever a file in a folder or an archive changes.

    It covers the name, the size and the times of each file. One of these times is the change time of the file system
    (ctime), which also changes when a file is replaced by another one of equal size and date.
    """
    found = _walk(path, entries) if path.is_dir() else [("", path.stat())]
    lines = sorted(
        f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}" if status else name
        for name, status in found
    )
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _walk(root: Path, entries: Collection[str]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the name and status of each file below the entries of a folder; None for the status of a folder."""

    def below(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, os.stat_result | None]]:
        with os.scandir(folder) as children:
            for child in children:
                if _is_hidden(child.name) or (depth == 0 and child.name not in entries):
                    continue
                name = prefix + child.name
                if not child.is_dir():
                    yield name, child.stat()
                elif depth < DEEPEST:
                    yield f"{name}/", None
                    yield from below(Path(child.path), f"{name}/", depth + 1)

    try:
        yield from _count(root, below(root, "", 0))
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}") from error


def _list_zip(path: Path) -> Iterator[tuple[str, int, None]]:
    """Yield the name and the size of each member."""
    with _open_zip(path) as (archive, file):
        for info in archive.infolist():
            file.allowed = _LARGEST_HEADER
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _link_error(path, info.filename)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile decompresses those of other methods without a limit
                raise _refusal(path, f"{info.filename!r} in it is compressed, but not by the method 'deflate'")
            name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF_8 else "cp437")
            file.seek(info.header_offset)
            if file.read(_NAME_AT + len(name))[_NAME_AT:] != name:  # no checksum protects the names of the directory
                raise zipfile.BadZipFile(f"the name {info.filename[:200]!r} is not the one before that file")
            if b"\0" in name:  # zipfile would end the name there, so that an image would not be counted as one
                raise _refusal(path, f"the name {info.orig_filename[:200]!r} in it has a null character")
            yield info.filename, info.file_size, None


def _list_tar(path: Path) -> Iterator[tuple[str, int, int | None]]:
    """Yield the name and the size in bytes of each member and, for a file, its offset."""
    with _open_tar(path) as (archive, file):
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined] # it would keep all that it has read of each member
            file.allowed = _LARGEST_HEADER
            if not (info.isdir() or info.isreg()) or info.issparse():
                raise _link_error(path, info.name)
            if info.size < 0:
                raise _refusal(path, f"{info.name!r} in it has a size below 0")
            yield (f"{info.name or '.'}/", 0, None) if info.isdir() else (info.name, info.size, info.offset_data)
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise EOFError("it ends before its end marker")
        if not file.is_plain:
            while file.read(1 << 16):  # to the end, where compressed files have their checksums
                file.allowed = 1 << 16


@contextmanager
def _open_zip(path: Path) -> Iterator[tuple[zipfile.ZipFile, _Bounded]]:
    with open_regular(path) as raw:
        file = _Bounded(raw, os.fstat(raw.fileno()).st_size)
        file.allowed = _LARGEST_DIRECTORY
        with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            yield archive, file


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, _Bounded]]:
    with open_regular(path) as raw:
        begin = raw.read(8)
        raw.seek(0)
        opener = next((opener for magic, opener in _COMPRESSIONS if begin.startswith(magic)), None)
        end = _largest_total(os.fstat(raw.fileno()).st_size)
        file = _Bounded(opener(raw) if opener else raw, end, is_plain=opener is None)
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive:
            yield archive, file


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member of a .zip archive, which must have the size that the archive says."""
    info = copy.copy(info)
    size, info.file_size = info.file_size, info.file_size + 1  # else zipfile would stop there, whatever follows
    with archive.open(info) as file:
        content = file.read(size + 1)
    if len(content) != size:
        raise zipfile.BadZipFile(f"{info.filename!r} does not have the {size} bytes that it should have")
    return content


def _largest_total(size: int) -> int:
    """Return how many bytes an archive of this size may unpack to."""
    return max(ALWAYS_ALLOWED, LARGEST_RATIO * size)


def _count(path: Path, found: Iterable[_Item]) -> Iterator[_Item]:
    """Yield what is found, at most `MOST_FILES`."""
    for number, item in enumerate(found):
        if number == MOST_FILES:
            raise UserError(f"{path}: it has more than {MOST_FILES} files")
        yield item


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Raise `UserError` for what a damaged or hostile archive raises."""
    try:
        yield
    except UserError:
        raise
    except _TooLargeError as error:
        raise _refusal(path, str(error)) from None
    except UnicodeError:
        raise _refusal(path, "the names in it are not UTF-8: pack it again with names that are") from None
    except _DAMAGED as error:
        raise _damage_error(path, error) from error


def _is_zip(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(2) == b"PK"


def _clean_name(name: str) -> str:
    """Return a member's name without './' and doubled slashes; the name of a folder keeps its final slash."""
    return str(PurePosixPath(name)) + "/" * name.endswith("/")


def _check_name(path: Path, name: str) -> str:
    """Return the name of a file; raise `UserError` if it leads out of the archive, or is no text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name {name[:200]!r} in it is not UTF-8: rename the file") from None
    if len(name) > LONGEST_NAME:
        raise UserError(f"{path}: the name {name[:60]!r}... in it has more than {LONGEST_NAME} characters")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name):
        raise _refusal(path, f"the name {name[:200]!r} in it leads out of it")
    return _clean_name(name)


def _is_hidden(name: str) -> bool:
    """Return whether a path is hidden or was added by a file manager, or is in such a folder."""
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in name.split("/"))


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: this archive is refused, {reason}")


def _link_error(path: Path, name: str) -> UserError:
    return _refusal(path, f"{name[:200]!r} in it is a link or a special file, not a plain file")


def _damage_error(path: Path, error: Exception) -> UserError:
    if isinstance(error, IrregularFileError):
        return UserError(f"{path}: {error.strerror}, expected a folder or an archive")
    if isinstance(error, tarfile.ReadError):
        return UserError(f"{path}: neither a folder nor a whole .tar, .tar.gz, .tar.xz or .zip archive")
    return UserError(f"{path}: this archive is damaged or cut short: {' '.join(str(error).split())[:200]}")

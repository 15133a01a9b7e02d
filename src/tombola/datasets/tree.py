"""A tree of files: a folder, or a .tar, .tar.gz, .tar.xz or .zip archive that is read like a folder.

Nothing is unpacked to disk. Still, an archive is refused if it contains links, or names that lead out of the archive.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tombola.errors import UserError

DEEPEST = 6
"""Maximum depth of folders. It stops at links that lead back to a parent folder."""

_DAMAGED = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError)
"""Exceptions that a damaged or encrypted archive may raise."""


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
        try:
            yield from self._read_tar(files) if self.ranges else self._read_zip(files)
        except _DAMAGED as error:
            raise _damage_error(self.path, error) from error

    def contents(self, files: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield each of `files` once, with its bytes.

        Raises:
            UserError: if a file cannot be read.
        """
        for name, content in self.read(files):
            try:
                yield name, content.read_bytes() if isinstance(content, Path) else content
            except OSError as error:
                raise UserError(f"{self.path / name}: cannot be read: {error.strerror}") from error

    def _read_zip(self, files: Collection[str]) -> Iterator[tuple[str, bytes]]:
        members = {self.top + name: name for name in files}
        with zipfile.ZipFile(self.path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                name = members.get(_clean_name(info.filename))
                if name is not None:
                    yield name, archive.read(info)

    def _read_tar(self, files: Collection[str]) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(self.path) as archive:
            assert archive.fileobj is not None
            for name in sorted(files, key=lambda name: self.ranges[name]):
                start, size = self.ranges[name]
                archive.fileobj.seek(start)
                yield name, archive.fileobj.read(size)


def open_tree(path: Path, entries: Collection[str]) -> Tree:
    """List the contents of a folder or an archive.

    Args:
        path: the folder or the archive.
        entries: the files and folders to list at the top; others are omitted.

    Raises:
        UserError: if the path is neither, or the archive is damaged, or contains links or names that lead out of it.
    """
    if path.is_dir():
        return Tree(path, "", tuple(sorted(name for name, _ in _walk(path, entries))))
    try:
        listed = [(_check_name(path, name), span) for name, span in (_list_zip if _is_zip(path) else _list_tar)(path)]
    except _DAMAGED as error:
        raise _damage_error(path, error) from error
    for name, count in Counter(name for name, _ in listed).items():
        if count > 1 and not name.endswith("/"):
            raise UserError(f"{path}: this archive holds {name!r} {count} times")
    spans = {name: span for name, span in sorted(listed) if not _is_hidden(name)}
    tops = {name.partition("/")[0] for name in spans}
    top = f"{tops.pop()}/" if len(tops) == 1 and not tops & set(entries) else ""
    inside = {name.removeprefix(top): span for name, span in spans.items()}
    kept = {name: span for name, span in inside.items() if name.partition("/")[0] in entries}
    return Tree(path, top, tuple(kept), {name: span for name, span in kept.items() if span})


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
        yield from below(root, "", 0)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}") from error


def _list_zip(path: Path) -> Iterator[tuple[str, None]]:
    """Yield the name of each member."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _link_error(path, info.filename)
            yield info.filename, None


def _list_tar(path: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the name of each member and, for a file, its offset and its size in bytes."""
    with tarfile.open(path) as archive:
        for info in archive:
            if not (info.isdir() or info.isreg()) or info.issparse():
                raise _link_error(path, info.name)
            yield (f"{info.name}/", None) if info.isdir() else (info.name, (info.offset_data, info.size))
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise EOFError("it ends before its end marker")
        while archive.fileobj.read(1 << 20):  # to the end, where compressed files have their checksums
            pass


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _clean_name(name: str) -> str:
    """Return a member's name without './' and doubled slashes; the name of a folder keeps its final slash."""
    return str(PurePosixPath(name)) + "/" * name.endswith("/")


def _check_name(path: Path, name: str) -> str:
    """Return a member's name; raise `UserError` if it leads out of the archive."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{path}: this archive is refused, the name {name!r} in it leads out of it")
    return _clean_name(name)


def _is_hidden(name: str) -> bool:
    """Return whether a path is hidden or was added by a file manager, or is in such a folder."""
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in name.split("/"))


def _link_error(path: Path, name: str) -> UserError:
    return UserError(f"{path}: this archive is refused, {name!r} in it is a link or a special file, not a plain file")


def _damage_error(path: Path, error: Exception) -> UserError:
    if isinstance(error, tarfile.ReadError):
        return UserError(f"{path}: neither a folder nor a whole .tar, .tar.gz, .tar.xz or .zip archive")
    return UserError(f"{path}: this archive is damaged or cut short: {error}")

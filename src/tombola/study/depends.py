"""What a study depends on besides its own source: files, environment variables, versions of packages, values."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from tombola.datasets.cache import FOLDER
from tombola.errors import UserError
from tombola.files import is_store, open_regular

_BLOCK = 2**20  # bytes that are read at a time
_WRITTEN = {"__pycache__", FOLDER}
"""The names of folders that Python and tombola write."""

_EXPECTED = "a file, a folder, env:NAME, package:NAME or value:TEXT"


def identify_all(names: Iterable[str]) -> dict[str, str | None]:
    """Return what identifies each thing that a study depends on, by its name in the study.

    Args:
        names: `env:NAME` is the value of an environment variable, `package:NAME` the version of an installed package,
            and `value:TEXT` the text itself; everything else is the path of a file or of a folder.

    Returns:
        The value; None for a variable that is not set; the version; or the SHA-256 of the file, or of the names and
        contents of all files in the folder, without those that Python compiles (`__pycache__`), decoded images and
        stores, which a run writes.

    Raises:
        UserError: if there is no such file or package, or if the folder is a store itself.

    >>> identify_all(["value:run 2"])
    {'value:run 2': 'run 2'}
    """
    return {name: _identify(name) for name in names}


def _identify(name: str) -> str | None:
    kind, colon, rest = name.partition(":")
    if name in ("", "env:"):
        raise UserError(f"task.depends: {name!r} names nothing; expected {_EXPECTED}")
    if colon and kind == "value":
        return rest
    if colon and kind == "env":
        return os.environ.get(rest)
    if colon and kind == "package":
        try:
            return metadata.version(rest)
        except (metadata.PackageNotFoundError, ValueError) as error:
            raise UserError(f"task.depends: the package {rest!r} is not installed") from error
    path = Path(name)
    try:
        if path.is_dir():
            if is_store(path):
                raise UserError(
                    f"task.depends: {name!r} is a store, which changes with each run; name what it depends on"
                )
            files = sorted(each for each in _list_files(path) if each.is_file())
            parts = [f"{each.relative_to(path).as_posix()} {_hash_file(each)}\n" for each in files]
            return hashlib.sha256("".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
        return _hash_file(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"task.depends: {name!r} cannot be read: {reason}; expected {_EXPECTED}") from error


def _list_files(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder that no run writes: without compiled modules, decoded images and stores."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each not in _WRITTEN and not is_store(Path(parent, each))]
        yield from (Path(parent, each) for each in names)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

"""Behaviours: what the networks and losses of stored results computed, so that a change of them is noticed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt, StrictStr

from tombola.errors import UserError
from tombola.files import write_atomically, write_durably
from tombola.store.documents import describe, read_document
from tombola.store.layout import list_files, temporary_folder
from tombola.store.names import canonical, name_of
from tombola.training.behaviour import Behaviour


class Behaviours:
    """What a network with its loss has computed, by the name of the network and a number.

    A network whose source has not changed may still compute something else than before, for example because it reads a
    file. Its behaviours are numbered in the order in which they were noticed.

    Args:
        root: the store's folder.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     behaviours = Behaviours(Path(folder))
    ...     behaviours.add("0" * 64, 0, ((1.0, 2.0),)), behaviours.add("0" * 64, 0, ((3.0,),))
    ...     behaviours.all("0" * 64)
    (True, False)
    {0: ((1.0, 2.0),)}
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def all(self, name: str) -> dict[int, Behaviour | None]:
        """Return the behaviours of a network, by number; None stands for one that is damaged."""
        found: dict[int, Behaviour | None] = {}
        for path in list_files(self._root, "behaviours"):
            if path.name.startswith(name):
                try:
                    found[_number(path)] = _read(path)
                except (OSError, ValueError):
                    found[_number(path)] = None
        return found

    def add(self, name: str, number: int, numbers: Behaviour) -> bool:
        """Store a behaviour; return whether this number was free.

        Raises:
            UserError: if it cannot be written.
        """
        path = self._root / "behaviours" / f"{name}.{number}.json"
        document = canonical({"name": name, "number": number, "computes": numbers, "hash": name_of(numbers)})
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=temporary_folder(self._root)) as unfinished:
                write_durably(unfinished.fileno(), document)
                try:
                    os.link(unfinished.name, path)  # fails if another run has written this number meanwhile
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                        raise
                    write_atomically(path, document, temporary_folder(self._root))  # there are no hard links
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        return True

    def check(self) -> Iterator[tuple[str, str]]:
        """Read all behaviours, and yield the name and the damage of each that is damaged."""
        for path in list_files(self._root, "behaviours"):
            try:
                _read(path)
            except (OSError, ValueError) as error:
                yield path.name, describe(error)


class _Document(BaseModel):
    """The schema of a behaviour; earlier versions wrote no hash of what is computed."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    number: StrictInt
    computes: tuple[tuple[StrictFloat | None, ...], ...]
    hash: StrictStr | None = None


def _read(path: Path) -> Behaviour:
    document = _Document.model_validate(read_document(path))
    if path.name != f"{document.name}.{document.number}.json":
        raise ValueError(f"it holds what another network computes, {document.name[:12]}")
    if document.hash not in (None, name_of(document.computes)):
        raise ValueError("it does not match its hash")
    return document.computes


def _number(path: Path) -> int:
    return int(path.name.split(".")[1])

"""Checking a store: every file of it is read and compared with its checksum, its schema and its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tombola.errors import DamagedResultError, UserError
from tombola.store.claims import check_claims
from tombola.store.documents import describe, read_record
from tombola.store.layout import list_no_folders
from tombola.store.store import Entry, Store


@dataclass(frozen=True)
class Damage:
    """What is wrong with one part of a store.

    Args:
        kind: "result", "mask", "checkpoint", "behaviour", "record", "run", "claim" or "folder".
        name: the name of the part; a record has the name of its result, a folder its path in the store.
        reason: what is wrong with it.
    """

    kind: str
    name: str
    reason: str


def list_damage(store: Store) -> Iterator[Damage]:
    """Read every result, mask, checkpoint, behaviour, record and claim of a store, and yield what is damaged.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     list(list_damage(Store(pathlib.Path(folder) / "store")))
    []
    """
    for path in list_no_folders(store.root):
        yield Damage("folder", path.relative_to(store.root).as_posix(), "it is not a folder")
    for entry in store.entries():
        if reason := _check_entry(store, entry):
            yield Damage(entry.kind, entry.name, reason)
        if entry.kind == "result" and (reason := _check_record(store, entry)):
            yield Damage("record", entry.name, reason)
    for name, reason in store.behaviours.check():
        yield Damage("behaviour", name, reason)
    for path, reason in check_claims(store.root):
        yield Damage(path.parent.name.removesuffix("s"), path.name, reason)


def _check_entry(store: Store, entry: Entry) -> str | None:
    if entry.kind == "mask":
        return store.masks.check(entry.name)
    if entry.kind == "checkpoint":
        return store.checkpoints.check(entry.name)
    try:
        store.results.check(entry.name)
    except DamagedResultError as damage:
        return damage.reason
    except UserError as error:
        return str(error)
    return None


def _check_record(store: Store, entry: Entry) -> str | None:
    if not entry.path.is_dir():
        return None
    try:
        read_record(store.results.folder(entry.name) / "record.json")
    except (OSError, ValueError) as error:
        return f"it is lost: {describe(error)}"
    return None

"""Checking a store: every file of it is read and compared with its checksum, its schema and its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from tombola.errors import DamagedResultError, UserError
from tombola.store.claims import check_claims
from tombola.store.documents import describe, read_metrics, read_record
from tombola.store.layout import list_no_folders
from tombola.store.store import Entry, Store


@dataclass(frozen=True)
class Damage:
    """What is wrong with one part of a store.

    Args:
        kind: "result", "mask", "checkpoint", "behaviour", "record", "metrics", "run", "claim" or "folder".
        name: the name of the part; a record and metrics have the name of their result, a folder its path in the store.
        reason: what is wrong with it.
    """

    kind: str
    name: str
    reason: str


def list_damage(store: Store) -> Iterator[Damage]:
    """Read all results, masks, checkpoints, behaviours, records, metrics and claims of a store; yield what is damaged.

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
        if entry.kind == "result" and entry.path.is_dir():
            if reason := _check_record(entry):
                yield Damage("record", entry.name, reason)
            if reason := _check_metrics(entry):
                yield Damage("metrics", entry.name, reason)
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


def _check_record(entry: Entry) -> str | None:
    try:
        read_record(entry.path / "record.json")
    except (OSError, ValueError) as error:
        return f"it is lost: {describe(error)}"
    return None


def _check_metrics(entry: Entry) -> str | None:
    path = entry.path / "metrics.json"
    try:
        if os.path.lexists(path):
            read_metrics(path, entry.name)
    except (OSError, ValueError) as error:
        return f"they are computed again: {describe(error)}"
    return None

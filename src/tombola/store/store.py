"""Store: a folder with the results of trainings, remembered masks and checkpoints.

    STORE/store.json                      the version of this layout
    STORE/results/ab/abcd.../result.json          identity and history of a training, and the shapes of its mask
                             weights.safetensors  the weights at the end (only alive weights of pruned layers)
                                                  and the training loss of every iteration
                             SHA256SUMS           checksums of the two files, in the format of `sha256sum -c`
                             record.json          when, where and how long the training ran; not a part of the result
                             metrics.json         metrics that were computed from the weights later; may be missing
    STORE/masks/ab/abcd....safetensors    masks that pruning computed, kept so that they need not be recomputed; each
                                          holds its own name, as does a checkpoint
    STORE/checkpoints/abcd....safetensors the states of unfinished trainings
    STORE/behaviours/abcd....0.json       what a network computes on a few examples: see `tombola.store.behaviours`
    STORE/runs/, STORE/claims/            which process does which training: see `tombola.store.claims`
    STORE/tmp/                            files that are being written

A result is written into a folder in `tmp`, flushed to the disk and then renamed, so that the store has all of it or
nothing. Files that a killed process leaves in `tmp` do no harm; the next run that is alone in the store removes them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, StrictInt

from tombola.errors import StoreError, UserError, as_path, expect_flags
from tombola.files import STORE_FILE, remove_path, write_atomically
from tombola.store.behaviours import Behaviours
from tombola.store.checkpoints import Checkpoints
from tombola.store.documents import describe, read_document
from tombola.store.layout import VERSION, list_files, temporary_folder, unfinished_markers
from tombola.store.masks import Masks
from tombola.store.names import canonical
from tombola.store.results import Results


@dataclass(frozen=True)
class Entry:
    """One result, mask or checkpoint of a store; it may be damaged, or something else may lie in its place.

    Args:
        kind: "result", "mask" or "checkpoint".
        name: the key of a result or of a checkpoint, or the name of a mask.
        path: the file or folder of the entry.
        bytes: the size of the entry on disk.
    """

    kind: str
    name: str
    path: Path
    bytes: int


class Store:
    """A store in one folder.

    Args:
        root: the folder of the store.
        create: whether to create the folder if it is missing.

    Attributes:
        results: the results of trainings.
        masks: the masks that pruning computed.
        checkpoints: the states of unfinished trainings.
        behaviours: what the networks compute on a few examples; they are small, and kept for ever.

    Raises:
        StoreError: if the folder is not a store or another version of tombola made it.
        UserError: if the folder cannot be read or created.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Store(Path(folder) / "store").results.get("0" * 64) is None
    True
    """

    def __init__(self, root: str | Path, *, create: bool = True) -> None:
        root = self.root = as_path(root, "store")
        expect_flags(create=create)
        self.results = Results(root)
        self.masks = Masks(root)
        self.checkpoints = Checkpoints(root)
        self.behaviours = Behaviours(root)
        version = self._read_version()
        if version is None and root.is_dir() and any(path not in unfinished_markers(root) for path in root.iterdir()):
            # Another process may have made the store since: it writes the marker before anything else.
            version = self._read_version()
            if version is None:
                raise StoreError(f"store {root}: the folder is not empty and is not a store")
        if version is None and create:
            self._make()
        elif version not in (None, VERSION):
            raise StoreError(
                f"store {root}: it has version {version} and this tombola reads version {VERSION}; "
                f"use the tombola that made it"
            )

    @property
    def _marker(self) -> Path:
        return self.root / STORE_FILE

    def _read_version(self) -> int | None:
        """Return the version of the store; None if the folder is no store yet."""
        try:
            return _Marker.model_validate(read_document(self._marker)).store
        except FileNotFoundError:
            return None
        except OSError as error:
            if os.path.exists(self.root) and not os.path.isdir(self.root):  # both are False for a long name
                raise UserError(f"store {self.root}: it is not a folder; name another one") from error
            raise UserError(f"store {self.root}: {self._marker.name} cannot be read: {describe(error)}") from error
        except ValueError as error:
            message = f"store {self.root}: {self._marker} is damaged, expected {{'store': {VERSION}}}"
            raise StoreError(message) from error

    def _make(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"store {self.root}: the folder cannot be made: {error.strerror or error}") from error
        except RecursionError as error:
            raise UserError(f"store {self.root}: the folder cannot be made: it is in too many others") from error
        try:
            write_atomically(self._marker, canonical({"store": VERSION}))
        except UserError:
            # Another process has made the store at the same time, and its sweep has removed our unfinished marker.
            if self._read_version() != VERSION:
                raise

    def check_writable(self) -> None:
        """Raise `UserError` if the store is not writable."""
        try:
            handle, name = tempfile.mkstemp(dir=temporary_folder(self.root), prefix="writable.")
            os.close(handle)
            Path(name).unlink(missing_ok=True)  # the sweep of another process may have removed it
        except OSError as error:
            raise UserError(f"store {self.root}: it cannot be written to: {error.strerror or error}") from error

    def sweep(self, alone: Callable[[], bool]) -> None:
        """Remove the files that killed processes have left, if no other process uses the store.

        Args:
            alone: a function that returns whether no other process uses the store. It is called after the files to
                remove were listed, so that a process that starts later loses nothing.
        """
        left = [*temporary_folder(self.root).iterdir(), *unfinished_markers(self.root)]
        left += [path for path in list_files(self.root, "checkpoints") if path.stem in self.results]
        if alone():
            for path in left:
                remove_path(path)

    def entries(self) -> Iterator[Entry]:
        """Yield every result, mask and checkpoint, ordered by kind and name."""
        for key in self.results:
            folder = self.results.folder(key)
            yield Entry("result", key, folder, _size(folder))
        for kind in ("mask", "checkpoint"):
            for path in list_files(self.root, f"{kind}s"):
                yield Entry(kind, path.stem, path, _size(path))

    def remove(self, entry: Entry) -> None:
        """Remove an entry from the store.

        Raises:
            UserError: if it cannot be removed.
        """
        try:
            if entry.kind == "result":
                self.results.discard(entry.name)
            else:
                remove_path(entry.path)
        except OSError as error:
            raise UserError(f"store {self.root}: {entry.path} cannot be removed: {describe(error)}") from error


class _Marker(BaseModel):
    """The schema of `store.json`."""

    store: StrictInt


def _size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder; 0 for what another process has just removed."""
    try:
        return sum(inner.lstat().st_size for inner in path.iterdir()) if path.is_dir() else path.lstat().st_size
    except OSError:
        return 0

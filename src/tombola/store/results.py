"""Results of trainings, each named by the hash of everything that determines its bits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tombola.errors import DamagedResultError, UserError
from tombola.files import IrregularFileError, read_regular, sync_folder, write_atomically, write_durably
from tombola.pruning.mask import Mask
from tombola.store.documents import (
    LARGEST,
    ResultDocument,
    check_tensors,
    describe,
    parse_json,
    read_metrics,
    read_record,
    read_tensors,
)
from tombola.store.layout import list_results, temporary_folder
from tombola.store.names import canonical, name_of
from tombola.training.history import History, Trained
from tombola.training.weights import State, Weights, state_hash

Shapes = Mapping[str, tuple[int, ...]]
_Content = TypeVar("_Content")


class Results:
    """The results of a store, each in a folder of its own; see `tombola.store.store` for its files.

    Args:
        root: the store's folder.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Results(Path(folder)).get("0" * 64) is None
    True
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, key: str) -> Path:
        """Return the folder of a result."""
        return self._root / "results" / key[:2] / key

    def __contains__(self, key: str) -> bool:
        return os.path.lexists(self.folder(key))

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all results, sorted; files and folders with other names are no results."""
        return (folder.name for folder in list_results(self._root))

    def get(self, key: str) -> Trained | None:
        """Return a training's result, whose weights stay on disk; None if the store does not have it.

        Raises:
            DamagedResultError: if `result.json` is damaged, or is that of another training.
            UserError: if it cannot be read.
        """
        document = self.document(key)
        if document is None:
            return None
        load = partial(self._load_weights, key, document)
        return Trained(Weights(document.weights, load), History.from_json(document.history.model_dump()))

    def document(self, key: str) -> ResultDocument | None:
        """Return the content of a result's `result.json`; None if the store does not have the result.

        Raises:
            DamagedResultError: if `result.json` is damaged, or is that of another training.
            UserError: if it cannot be read, or something else lies in the place of a folder of results.
        """
        if key not in self:
            self._check_folders(key)
            return None
        try:
            content = self._read(key, "result.json")
        except DamagedResultError:
            if key not in self:  # another run has just removed it
                return None
            raise
        try:
            document = ResultDocument.model_validate(parse_json(content))
            named = name_of(document.identity)
        except ValueError as error:
            raise DamagedResultError(key, f"result.json does not describe a result: {describe(error)}") from None
        if named != key:
            raise DamagedResultError(key, f"it is the result of another training, {named[:12]}")
        return document

    def record(self, key: str) -> dict[str, Any]:
        """Return the record of when, where and how long a training ran; an empty record if it is lost."""
        try:
            return read_record(self.folder(key) / "record.json")
        except (OSError, ValueError):
            return {}

    def notes(self, name: str) -> dict[str, Any]:
        """Return the notes of a kind, by the result in whose record they are: which verb asked for it, and why.

        Args:
            name: the field of the record.
        """
        records = ((key, self.record(key)) for key in self)
        return {key: record[name] for key, record in records if name in record}

    def put(self, key: str, identity: Mapping[str, Any], mask: Mask, trained: Trained, record: Any) -> None:
        """Store the result of a training atomically. A result that the store already has is not changed.

        Raises:
            UserError: if the result cannot be written.
        """
        if key in self:
            return
        result = {
            "identity": identity,
            "history": trained.history.to_json(),
            "mask": [[name, list(shape)] for name, shape in mask.shapes.items()],
            "alive": mask.counts,
            "weights": trained.weights.hash,
        }
        files = {
            "result.json": canonical(result),
            "weights.safetensors": safetensors.torch.save(
                pack_state(trained.weights.load(), mask) | {"losses": trained.batch_losses}
            ),
        }
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
        files |= {"SHA256SUMS": sums.encode(), "record.json": canonical(record)}
        folder = self.folder(key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent.parent)
            temporary = Path(tempfile.mkdtemp(dir=temporary_folder(self._root), prefix=f"{key[:12]}."))
            try:
                temporary.chmod(0o755)
                for name, content in files.items():
                    with (temporary / name).open("wb", buffering=0) as file:
                        write_durably(file.fileno(), content)
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
            except BaseException as error:
                shutil.rmtree(temporary, ignore_errors=True)
                if not isinstance(error, OSError) or key not in self:  # another run may have stored it first
                    raise
        except OSError as error:
            raise UserError(
                f"store {self._root}: result {key[:12]} cannot be written: {error.strerror or error}; "
                f"all results that were stored before are kept, and the same run continues from them"
            ) from error

    def discard(self, key: str) -> None:
        """Remove a result, if the store has it."""
        temporary = Path(tempfile.mkdtemp(dir=temporary_folder(self._root), prefix=f"{key[:12]}."))
        with contextlib.suppress(FileNotFoundError):
            self.folder(key).rename(temporary / key)
        shutil.rmtree(temporary, ignore_errors=True)  # what is left is in `tmp`, and removed with all that lies there

    def check(self, key: str) -> None:
        """Read every byte of a result, and compare checksums, name, the hash of the weights and the sizes of the mask.

        Raises:
            DamagedResultError: if a checksum differs, or if it is the result of another training.
            UserError: if a file cannot be read.
        """
        document = self.document(key)
        if document is not None:
            self._load_weights(key, document)

    def mask(self, key: str) -> Mask:
        """Return the mask that a result was trained with, after a check of all bytes of the result.

        Raises:
            DamagedResultError: if the result is damaged.
        """
        document = self.document(key)
        assert document is not None
        return self._unpack(key, partial(unpack_mask, shapes=document.shapes))

    def read_mask(self, key: str, shapes: Shapes) -> Mask:
        """Return the mask that a result was trained with; read only its bytes, without a check.

        Raises:
            DamagedResultError: if the mask cannot be read.
        """
        path = self.folder(key) / "weights.safetensors"
        try:
            check_tensors(path)
            with safetensors.safe_open(path, "np") as file:
                return Mask(shapes, {name: file.get_tensor(f"mask.{name}") for name in shapes})
        except (FileNotFoundError, IrregularFileError) as error:
            raise DamagedResultError(key, f"its mask cannot be read: {describe(error)}") from error
        except (safetensors.SafetensorError, UserError) as error:
            raise DamagedResultError(key, f"its mask cannot be read: {error}") from error
        except OSError as error:
            raise UserError(f"store {self._root}: {path} cannot be read: {describe(error)}") from error

    def batch_losses(self, key: str) -> Tensor:
        """Return the training loss of every iteration of a result, float32.

        Raises:
            DamagedResultError: if the result is damaged.
        """
        return self._unpack(key, lambda packed: packed["losses"])

    def metrics(self, key: str) -> dict[str, dict[str, float | None]]:
        """Return the metrics that were computed from a result's weights afterwards, by split and by key of the metric.

        If they are lost or damaged, there are none: they can be computed again.
        """
        try:
            return read_metrics(self.folder(key) / "metrics.json", key)
        except (OSError, ValueError):
            return {}

    def add_metrics(self, key: str, metrics: Mapping[str, Mapping[str, float | None]]) -> None:
        """Add metrics that were computed from a result's weights; nothing is stored if the store cannot be written."""
        known = self.metrics(key)
        found = {split: known.get(split, {}) | dict(metrics.get(split, {})) for split in {**known, **metrics}}
        content = canonical({"hash": name_of([key, found]), "metrics": found})
        with contextlib.suppress(OSError, UserError):
            write_atomically(self.folder(key) / "metrics.json", content, temporary_folder(self._root))

    def confirm(self, key: str, confirmation: Mapping[str, Any]) -> None:
        """Add to a result's record when and on which machine its training was repeated with equal bits.

        If the record is lost, this begins a new one.
        """
        self._note(key, "confirmed", confirmation)

    def contradict(self, key: str, contradiction: Mapping[str, Any]) -> None:
        """Add to a result's record when and where its training was repeated with different bits, and with which."""
        self._note(key, "contradicted", contradiction)

    def _note(self, key: str, name: str, note: Mapping[str, Any]) -> None:
        record = self.record(key)
        record[name] = [*record.get(name, []), note]
        write_atomically(self.folder(key) / "record.json", canonical(record), temporary_folder(self._root))

    def _read(self, key: str, name: str) -> bytes:
        """Return the content of one file of a result, after a comparison with its checksum.

        Raises:
            DamagedResultError: if the file or the checksums are missing or damaged.
            UserError: if they cannot be read for another reason, such as a lack of permission.
        """
        lines = self._read_part(key, "SHA256SUMS").decode(errors="replace").splitlines()
        sums = {file: checksum for checksum, _, file in (line.partition("  ") for line in lines)}
        content = self._read_part(key, name)
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            raise DamagedResultError(key, f"{name} does not match its checksum")
        return content

    def _check_folders(self, key: str) -> None:
        """Raise `UserError` if something else lies in the place of a folder of results, which may have been full."""
        of_key = self.folder(key).parent
        if of_key.is_dir():
            return
        for folder in (of_key.parent, of_key):
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(f"store {self._root}: {folder} is not a folder; remove it, or restore the folder")

    def _read_part(self, key: str, name: str) -> bytes:
        path = self.folder(key) / name
        try:
            return read_tensors(path) if path.suffix == ".safetensors" else read_regular(path, LARGEST)
        except FileNotFoundError:
            raise DamagedResultError(key, f"{name} is missing") from None
        except IrregularFileError as error:
            raise DamagedResultError(key, f"{name}: {describe(error)}") from None
        except OSError as error:
            raise UserError(f"store {self._root}: {path} cannot be read: {describe(error)}") from error

    def _unpack(self, key: str, unpack: Callable[[State], _Content]) -> _Content:
        content = self._read(key, "weights.safetensors")
        try:
            return unpack(safetensors.torch.load(content))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedResultError(key, f"weights.safetensors does not fit the result: {error}") from error

    def _load_weights(self, key: str, document: ResultDocument) -> State:
        """Return the weights of a result, which are those that its document names, whatever the checksums say."""

        def unpack(packed: State) -> State:
            state = unpack_state(packed, document.shapes)
            if state_hash(state) != document.weights:
                raise ValueError("it has the weights of another result")
            if unpack_mask(packed, document.shapes).counts != document.alive:
                raise ValueError("its mask has other numbers of alive connections")
            return state

        return self._unpack(key, unpack)


def pack_state(state: State, mask: Mask) -> State:
    """Return a state in which each layer of the mask is replaced by its mask bits and the values of its alive weights.

    >>> mask = Mask.from_tensors({"w": torch.tensor([True, False, True])})
    >>> packed = pack_state({"w": torch.tensor([1.0, 0.0, 2.0])}, mask)
    >>> packed
    {'alive.w': tensor([1., 2.]), 'mask.w': tensor([5], dtype=torch.uint8)}
    >>> unpack_state(packed, mask.shapes)
    {'w': tensor([1., 0., 2.])}
    """
    packed = {f"state.{name}": tensor.contiguous() for name, tensor in state.items() if name not in mask}
    packed |= {f"alive.{name}": state[name][mask[name]] for name in mask}
    packed |= {f"mask.{name}": torch.from_numpy(bits.copy()) for name, bits in mask.bits.items()}
    return packed


def unpack_state(packed: State, shapes: Shapes) -> State:
    """Return the state that `pack_state` packed, given the shapes of the mask's layers."""
    mask = unpack_mask(packed, shapes)
    state = {name.removeprefix("state."): t for name, t in packed.items() if name.startswith("state.")}
    for name, alive in mask.items():
        values, count = packed[f"alive.{name}"], mask.counts[name]
        if values.shape != (count,):
            raise ValueError(f"weights of {name}: {values.numel()}, but connections that are alive: {count}")
        state[name] = torch.zeros(alive.shape, dtype=values.dtype).masked_scatter_(alive, values)
    return state


def unpack_mask(packed: State, shapes: Shapes) -> Mask:
    """Return the mask with which `pack_state` packed a state, given the shapes of its layers."""
    return Mask(shapes, {name: packed[f"mask.{name}"].numpy() for name in shapes})

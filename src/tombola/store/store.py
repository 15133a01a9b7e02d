"""Store: the results of trainings on disk, each named by the hash of all that decides its bits.

    STORE/store.json                      which version of the layout this is
    STORE/results/ab/abcd.../result.json          identity and history of a training, and its mask's shapes
                             weights.safetensors  the weights at its end, of a pruned layer only those alive; and
                                                  the training loss of every iteration
                             SHA256SUMS           of the two, as `sha256sum -c` reads them
                             record.json          when, where and how long; no part of the result
    STORE/masks/ab/abcd....safetensors    masks derived before, so that they need not be derived again
    STORE/checkpoints/abcd....safetensors trainings that were stopped in the middle
    STORE/runs/, STORE/claims/            who works on what: see `tombola.store.claims`
    STORE/tmp/                            what is being written

A result is written into a folder of another name, made to last, then renamed: it is there whole or not at all. What a
killed process leaves in `tmp` harms nobody, and the next run that is alone in the store sweeps it out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from tombola.errors import UserError
from tombola.files import sync_folder, write_atomically, write_durably
from tombola.pruning.mask import Mask
from tombola.store.names import canonical, name_of
from tombola.training.history import Checkpoint, History, Trained
from tombola.training.weights import State, Weights, state_hash

VERSION = 1


class DamagedResultError(UserError):
    """A stored result whose bytes are not those that were written."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"result {key[:12]} is damaged ({reason}), `tombola run` does it again")
        self.key, self.reason = key, reason


@dataclass(frozen=True)
class Entry:
    """Something that lies in a store.

    Args:
        kind: "result", "mask" or "checkpoint".
        name: its key or name.
        path: where it lies.
        bytes: how much it takes.
    """

    kind: str
    name: str
    path: Path
    bytes: int


class Store:
    """Results on disk below one folder.

    Args:
        root: the folder; it is made where it is not there, unless `create` is False.

    Raises:
        UserError: where the folder is no store, cannot be written to, or was made by a newer version.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Store(Path(folder) / "store").get("0" * 64) is None
    True
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        self.asked_for: set[str] = set()
        """Keys of results and names of masks that were asked for: what a study needs, once it is followed."""
        marker = root / "store.json"
        try:
            text = marker.read_text(errors="replace")
        except FileNotFoundError:
            text = None
        except OSError as error:
            raise UserError(f"store {root}: {marker} cannot be read: {error.strerror or error}") from error
        if text is None:
            if root.is_dir() and any(path not in _unfinished_markers(root) for path in root.iterdir()):
                raise UserError(f"store {root}: the folder is not empty and no store; name another with --store")
            if create:
                try:
                    root.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"store {root}: the folder cannot be made: {error.strerror or error}") from error
                write_atomically(marker, canonical({"store": VERSION}))
            return
        try:
            version = json.loads(text)["store"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"store {root}: {marker} is damaged, expected {{'store': {VERSION}}}") from error
        if version != VERSION:
            raise UserError(
                f"store {root}: it has version {version} and this tombola reads version {VERSION}; "
                f"use the tombola that made it, or name another folder with --store"
            )

    def check_writable(self) -> None:
        """Raise `UserError` where nothing can be written."""
        try:
            handle, name = tempfile.mkstemp(dir=self._unfinished, prefix="writable.")
            os.close(handle)
            Path(name).unlink()
        except OSError as error:
            raise UserError(f"store {self.root}: it cannot be written to: {error.strerror or error}") from error

    def sweep(self, alone: Callable[[], bool]) -> None:
        """Remove what killed processes have left, where nobody else works in the store.

        Args:
            alone: says whether nobody else does. It is asked after this has looked at what there is, so that whoever
                comes later has nothing to lose.
        """
        left = [*self._unfinished.iterdir(), *_unfinished_markers(self.root)]
        left += [path for path in self._files("checkpoints") if path.stem in self]
        if alone():
            for path in left:
                _remove(path)

    def folder(self, key: str) -> Path:
        """The folder of a result."""
        return self.root / "results" / key[:2] / key

    def __contains__(self, key: str) -> bool:
        return self.folder(key).is_dir()

    def get(self, key: str) -> Trained | None:
        """Return a training's result, its weights still on disk; None where it is not there.

        Raises:
            DamagedResultError: where its bytes are not those that were written.
        """
        self.asked_for.add(key)
        document = self.document(key)
        if document is None:
            return None
        shapes = {name: tuple(shape) for name, shape in document["mask"]}
        load = partial(self._load_weights, key, shapes)
        return Trained(Weights(document["weights"], load), History.from_json(document["history"]))

    def document(self, key: str) -> dict[str, Any] | None:
        """Return a result's `result.json`, checked; None where it is not there."""
        try:
            content = self._checked(key, "result.json")
        except FileNotFoundError:
            if key in self:
                raise DamagedResultError(key, "a file is missing") from None
            return None
        document: dict[str, Any] = json.loads(content)
        return document

    def record(self, key: str) -> dict[str, Any]:
        """Return what is known of when, where and how long a training ran; empty where that is lost."""
        try:
            record: dict[str, Any] = json.loads((self.folder(key) / "record.json").read_text())
        except (OSError, ValueError):
            return {}
        return record

    def put(self, key: str, identity: Mapping[str, Any], mask: Mask, trained: Trained, record: Any) -> None:
        """Store a training's result, whole or not at all. A result that is there already stays as it is.

        Raises:
            UserError: where it cannot be written.
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
                _packed(trained.weights.load(), mask) | {"losses": trained.batch_losses}
            ),
        }
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
        files |= {"SHA256SUMS": sums.encode(), "record.json": canonical(record)}
        folder = self.folder(key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent.parent)
            temporary = Path(tempfile.mkdtemp(dir=self._unfinished, prefix=f"{key[:12]}."))
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
                if not isinstance(error, OSError) or key not in self:  # another run may have been faster
                    raise
        except OSError as error:
            raise UserError(
                f"store {self.root}: result {key[:12]} cannot be written: {error.strerror or error}; "
                f"what was stored before is kept, the same command goes on from there"
            ) from error

    def discard(self, key: str) -> None:
        """Remove a result, if it is there."""
        temporary = Path(tempfile.mkdtemp(dir=self._unfinished, prefix=f"{key[:12]}."))
        with contextlib.suppress(FileNotFoundError):
            self.folder(key).rename(temporary / key)
        shutil.rmtree(temporary)

    def check(self, key: str) -> None:
        """Read every byte of a result.

        Raises:
            DamagedResultError: where they are not those that were written.
        """
        for name in ("result.json", "weights.safetensors"):
            try:
                self._checked(key, name)
            except FileNotFoundError as error:
                raise DamagedResultError(key, f"{Path(error.filename).name} is missing") from None

    def alive(self, key: str) -> Mask:
        """Return the mask that a result was trained with, as it was stored.

        Raises:
            DamagedResultError: where its bytes are not those that were written.
        """
        document = self.document(key)
        assert document is not None
        packed = safetensors.torch.load(self._checked(key, "weights.safetensors"))
        return _mask_in(packed, {name: tuple(shape) for name, shape in document["mask"]})

    def batch_losses(self, key: str) -> Tensor:
        """Return the training loss of every iteration of a result, float32.

        Raises:
            DamagedResultError: where its bytes are not those that were written.
        """
        packed = safetensors.torch.load(self._checked(key, "weights.safetensors"))
        if "losses" not in packed:
            raise DamagedResultError(key, "it has no losses")
        return packed["losses"]

    def confirm(self, key: str, confirmation: Mapping[str, Any]) -> None:
        """Note in a result's record that doing its training again gave the same bits, and when and where."""
        self._note(key, "confirmed", confirmation)

    def contradict(self, key: str, contradiction: Mapping[str, Any]) -> None:
        """Note in a result's record that doing its training again gave other bits: which, when and where."""
        self._note(key, "contradicted", contradiction)

    def _note(self, key: str, name: str, note: Mapping[str, Any]) -> None:
        record = self.record(key)
        record[name] = [*record.get(name, []), note]
        write_atomically(self.folder(key) / "record.json", canonical(record), self._unfinished)

    def entries(self) -> Iterator[Entry]:
        """Yield all that lies in the store, by kind and name."""
        for folder in sorted((self.root / "results").glob("??/*")):
            yield Entry("result", folder.name, folder, sum(path.stat().st_size for path in folder.iterdir()))
        for kind in ("mask", "checkpoint"):
            for path in self._files(f"{kind}s"):
                yield Entry(kind, path.stem, path, path.stat().st_size)

    def remove(self, entry: Entry) -> None:
        """Remove something from the store."""
        if entry.kind == "result":
            self.discard(entry.name)
        else:
            _remove(entry.path)

    def mask(self, name: str) -> Mask | None:
        """Return a mask that `put_mask` stored; None where it is not there or damaged: it can be derived again."""
        self.asked_for.add(name)
        try:
            with safetensors.safe_open(self._mask_path(name), "np") as file:
                about = json.loads(file.metadata()["mask"])
                mask = Mask(
                    {layer: tuple(shape) for layer, shape in about["layers"]},
                    {layer: file.get_tensor(layer) for layer, _ in about["layers"]},
                )
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None
        return mask if mask.hash == about["hash"] else None

    def put_mask(self, name: str, mask: Mask) -> None:
        """Store a mask under a name; where the store is not there or cannot be written to, it is not stored."""
        if not (self.root / "store.json").exists():
            return
        about = {"hash": mask.hash, "layers": [[layer, list(shape)] for layer, shape in mask.shapes.items()]}
        path = self._mask_path(name)
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = safetensors.numpy.save(mask.bits, {"mask": canonical(about).decode()})
            write_atomically(path, content, self._unfinished)

    def checkpoint(self, key: str) -> Checkpoint | None:
        """Return where a training was stopped; None where it was not, or the file is not whole."""
        content = self.checkpoint_bytes(key)
        return None if content is None else checkpoint_from_bytes(content)

    def checkpoint_bytes(self, key: str) -> bytes | None:
        """Return a checkpoint as `checkpoint_to_bytes` gave it, unless it was damaged; None where there is none."""
        try:
            return self._checkpoint_path(key).read_bytes()
        except OSError:
            return None

    def put_checkpoint(self, key: str, content: bytes) -> None:
        """Store where a training is, as `checkpoint_to_bytes` gives it; not where it cannot be written."""
        path = self._checkpoint_path(key)
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content, self._unfinished)

    def discard_checkpoint(self, key: str) -> None:
        """Remove a checkpoint, if there is one."""
        self._checkpoint_path(key).unlink(missing_ok=True)

    @property
    def _unfinished(self) -> Path:
        """Where files and folders are written before they get their names; on the same file system."""
        folder = self.root / "tmp"
        folder.mkdir(exist_ok=True)
        return folder

    def _files(self, kind: str) -> list[Path]:
        return sorted((self.root / kind).glob("**/*.safetensors"))

    def _mask_path(self, name: str) -> Path:
        return self.root / "masks" / name[:2] / f"{name}.safetensors"

    def _checkpoint_path(self, key: str) -> Path:
        return self.root / "checkpoints" / f"{key}.safetensors"

    def _checked(self, key: str, name: str) -> bytes:
        """Return the content of one of a result's files, which must be as it was written."""
        folder = self.folder(key)
        content = (folder / name).read_bytes()
        lines = (folder / "SHA256SUMS").read_text(errors="replace").splitlines()
        sums = {file: checksum for checksum, _, file in (line.partition("  ") for line in lines)}
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            raise DamagedResultError(key, f"{name} does not have its checksum")
        return content

    def _load_weights(self, key: str, shapes: dict[str, tuple[int, ...]]) -> State:
        try:
            return _unpacked(safetensors.torch.load(self._checked(key, "weights.safetensors")), shapes)
        except FileNotFoundError:
            raise DamagedResultError(key, "weights.safetensors is missing") from None


def checkpoint_to_bytes(checkpoint: Checkpoint) -> bytes:
    """Return a checkpoint as safetensors, with a checksum."""
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in checkpoint.state.items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in checkpoint.optimizer.items()}
    tensors["losses"] = checkpoint.batch_losses
    about = {"iteration": checkpoint.iteration}
    checksum = name_of([about, state_hash(tensors)])
    return safetensors.torch.save(tensors, {"checkpoint": json.dumps(about), "checksum": checksum})


def checkpoint_from_bytes(content: bytes) -> Checkpoint | None:
    """Return the checkpoint of which `checkpoint_to_bytes` gave this; None where it is not whole."""
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        about = json.loads(metadata["checkpoint"])
        if metadata["checksum"] != name_of([about, state_hash(tensors)]):
            return None
        losses = tensors["losses"]
    except (safetensors.SafetensorError, ValueError, KeyError):
        return None
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    return Checkpoint(about["iteration"], state, optimizer, losses)


def _unfinished_markers(root: Path) -> list[Path]:
    """What is left of a store.json that somebody was killed at writing, or is just writing."""
    return list(root.glob(".store.json.*"))


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _packed(state: State, mask: Mask) -> State:
    """Return the state with each pruned layer as its bits and the 1-D values of those alive."""
    packed = {f"state.{name}": tensor.contiguous() for name, tensor in state.items() if name not in mask}
    packed |= {f"alive.{name}": state[name][mask[name]] for name in mask}
    packed |= {f"mask.{name}": torch.from_numpy(bits.copy()) for name, bits in mask.bits.items()}
    return packed


def _unpacked(packed: State, shapes: dict[str, tuple[int, ...]]) -> State:
    """Return the state of which `_packed` made this, given the shapes of the mask's layers."""
    mask = _mask_in(packed, shapes)
    state = {name.removeprefix("state."): t for name, t in packed.items() if name.startswith("state.")}
    for name, shape in shapes.items():
        values = packed[f"alive.{name}"]
        state[name] = torch.zeros(shape, dtype=values.dtype)
        state[name][mask[name]] = values
    return state


def _mask_in(packed: State, shapes: dict[str, tuple[int, ...]]) -> Mask:
    return Mask(shapes, {name: packed[f"mask.{name}"].numpy() for name in shapes})

"""Checkpoints: the states of unfinished trainings, from which the trainings are resumed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from tombola.errors import UserError
from tombola.files import remove_path, write_atomically
from tombola.store.documents import describe, parse_json, read_metadata, read_tensors
from tombola.store.layout import temporary_folder
from tombola.store.names import name_of
from tombola.training.history import Checkpoint
from tombola.training.weights import State, state_hash


class Checkpoints:
    """The checkpoints of a store, each under the name of its training.

    Args:
        root: the store's folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Checkpoints(Path(folder)).get("0" * 64) is None
    True
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str, kind: str | None = None) -> Checkpoint | None:
        """Return the checkpoint of a training; None without one that `checkpoint_from_bytes` reads."""
        content = self.read(key)
        return None if content is None else checkpoint_from_bytes(content, kind, key)

    def read(self, key: str) -> bytes | None:
        """Return the bytes of a checkpoint, which may be damaged; None if it is missing or cut short."""
        try:
            return read_tensors(self._path(key))
        except OSError:
            return None

    def check(self, key: str) -> str | None:
        """Read every byte of a checkpoint; return what is wrong with it, or None."""
        try:
            _parse(read_tensors(self._path(key)), key)
        except (OSError, ValueError) as error:
            return describe(error)
        return None

    def put(self, key: str, content: bytes) -> None:
        """Store the bytes that `checkpoint_to_bytes` returned; do nothing if the store is not writable."""
        path = self._path(key)
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content, temporary_folder(self._root))

    def discard(self, key: str) -> None:
        """Remove the checkpoint of a training, if it has one."""
        remove_path(self._path(key))

    def _path(self, key: str) -> Path:
        return self._root / "checkpoints" / f"{key}.safetensors"


def checkpoint_to_bytes(checkpoint: Checkpoint, kind: str | None = None, key: str | None = None) -> bytes:
    """Serialise a checkpoint as safetensors, with a checksum.

    Args:
        checkpoint: the checkpoint.
        kind: the kind of machine that made it, if it is to be resumed on that kind only.
        key: the name of the training, if no other training is to be resumed from it.

    >>> import torch
    >>> content = checkpoint_to_bytes(Checkpoint(3, {"w": torch.ones(2)}))
    >>> checkpoint_from_bytes(content).iteration, checkpoint_from_bytes(content[:-1])
    (3, None)
    """
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in checkpoint.state.items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in checkpoint.optimizer.items()}
    tensors["losses"] = checkpoint.batch_losses
    named = {name: value for name, value in (("kind", kind), ("key", key)) if value is not None}
    about: dict[str, Any] = {"iteration": checkpoint.iteration} | named
    checksum = name_of([about, state_hash(tensors)])
    return safetensors.torch.save(tensors, {"checkpoint": json.dumps(about), "checksum": checksum})


def checkpoint_from_bytes(content: bytes, kind: str | None = None, key: str | None = None) -> Checkpoint | None:
    """Read a checkpoint from the bytes that `checkpoint_to_bytes` returned.

    Args:
        content: the bytes.
        kind: the kind of machine that resumes the training; None for any.
        key: the name of the training that is resumed; None for any.

    Returns:
        the checkpoint; None if the bytes are damaged, or are of another training, or another kind of machine made it. A
        training that is resumed on another kind would have neither kind's bits.
    """
    try:
        about, tensors = _parse(content, key)
    except ValueError:
        return None
    if kind is not None and about.kind not in (None, kind):
        return None
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    return Checkpoint(about.iteration, state, optimizer, tensors["losses"])


class _About(BaseModel):
    """The metadata of a checkpoint; earlier versions wrote no key, and the first no kind."""

    model_config = ConfigDict(strict=True)

    iteration: NonNegativeInt
    kind: str | None = None
    key: str | None = None


def _parse(content: bytes, key: str | None) -> tuple[_About, State]:
    """Return the metadata and the tensors of a checkpoint of the training with this key.

    Raises:
        ValueError: if the bytes are damaged, or are of another training.
    """
    try:
        metadata = read_metadata(content)
        document = parse_json(metadata["checkpoint"])
        about, tensors = _About.model_validate(document), safetensors.torch.load(content)
        whole = "losses" in tensors and metadata["checksum"] == name_of([document, state_hash(tensors)])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        raise ValueError("it does not hold a checkpoint") from None
    if not whole:
        raise ValueError("its bytes do not match their checksum")
    if key is not None and about.key not in (None, key):
        raise ValueError(f"it holds the checkpoint of another training, {about.key[:12]}")
    return about, tensors

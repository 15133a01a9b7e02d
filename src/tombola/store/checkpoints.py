"""Checkpoints: the states of unfinished trainings, from which the trainings are resumed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from tombola.errors import UserError
from tombola.files import write_atomically
from tombola.store.layout import temporary_folder
from tombola.store.names import name_of
from tombola.training.history import Checkpoint
from tombola.training.weights import state_hash


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
        return None if content is None else checkpoint_from_bytes(content, kind)

    def read(self, key: str) -> bytes | None:
        """Return the bytes of a checkpoint, which may be damaged; None if it is missing."""
        try:
            return self._path(key).read_bytes()
        except OSError:
            return None

    def put(self, key: str, content: bytes) -> None:
        """Store the bytes that `checkpoint_to_bytes` returned; do nothing if the store is not writable."""
        path = self._path(key)
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content, temporary_folder(self._root))

    def discard(self, key: str) -> None:
        """Remove the checkpoint of a training, if it has one."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._root / "checkpoints" / f"{key}.safetensors"


def checkpoint_to_bytes(checkpoint: Checkpoint, kind: str | None = None) -> bytes:
    """Serialise a checkpoint as safetensors, with a checksum.

    Args:
        checkpoint: the checkpoint.
        kind: the kind of machine that made it, if it is to be resumed on that kind only.

    >>> import torch
    >>> content = checkpoint_to_bytes(Checkpoint(3, {"w": torch.ones(2)}))
    >>> checkpoint_from_bytes(content).iteration, checkpoint_from_bytes(content[:-1])
    (3, None)
    """
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in checkpoint.state.items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in checkpoint.optimizer.items()}
    tensors["losses"] = checkpoint.batch_losses
    about: dict[str, Any] = {"iteration": checkpoint.iteration} | ({} if kind is None else {"kind": kind})
    checksum = name_of([about, state_hash(tensors)])
    return safetensors.torch.save(tensors, {"checkpoint": json.dumps(about), "checksum": checksum})


def checkpoint_from_bytes(content: bytes, kind: str | None = None) -> Checkpoint | None:
    """Read a checkpoint from the bytes that `checkpoint_to_bytes` returned.

    Args:
        content: the bytes.
        kind: the kind of machine that resumes the training; None for any.

    Returns:
        the checkpoint; None if the bytes are damaged, or another kind of machine made it. A training that is resumed on
        another kind would have neither kind's bits.
    """
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        about = json.loads(metadata["checkpoint"])
        if metadata["checksum"] != name_of([about, state_hash(tensors)]):
            return None
        losses = tensors["losses"]
        if kind is not None and about.get("kind", kind) != kind:
            return None
    except (safetensors.SafetensorError, ValueError, KeyError):
        return None
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    return Checkpoint(about["iteration"], state, optimizer, losses)

"""Masks that a store remembers, so that they need not be computed again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import safetensors
import safetensors.numpy

from tombola.errors import UserError
from tombola.files import write_atomically
from tombola.pruning.mask import Mask
from tombola.store.layout import temporary_folder
from tombola.store.names import canonical


class Masks:
    """The masks of a store, each under the hash of everything that determines it.

    A lost mask does no harm: it is computed again.

    Args:
        root: the store's folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Masks(Path(folder)).get("0" * 64) is None
    True
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, name: str) -> Mask | None:
        """Return a mask that `put` stored; None if it is missing or damaged."""
        try:
            with safetensors.safe_open(self._path(name), "np") as file:
                about = json.loads(file.metadata()["mask"])
                mask = Mask(
                    {layer: tuple(shape) for layer, shape in about["layers"]},
                    {layer: file.get_tensor(layer) for layer, _ in about["layers"]},
                )
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None
        return mask if mask.hash == about["hash"] else None

    def put(self, name: str, mask: Mask) -> None:
        """Store a mask under a name, unless the store does not exist or is not writable."""
        if not (self._root / "store.json").exists():
            return
        about = {"hash": mask.hash, "layers": [[layer, list(shape)] for layer, shape in mask.shapes.items()]}
        path = self._path(name)
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = safetensors.numpy.save(mask.bits, {"mask": canonical(about).decode()})
            write_atomically(path, content, temporary_folder(self._root))

    def _path(self, name: str) -> Path:
        return self._root / "masks" / name[:2] / f"{name}.safetensors"

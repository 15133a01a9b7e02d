"""Masks that a store remembers, so that they need not be computed again."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.numpy
from pydantic import BaseModel, StrictInt, StrictStr

from tombola.errors import UserError
from tombola.files import STORE_FILE, write_atomically
from tombola.pruning.mask import Mask
from tombola.store.documents import describe, parse_json, read_metadata, read_tensors
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
        """Return a mask that `put` stored; None if it is missing or damaged, or is that of another name."""
        try:
            return self._read(name)
        except (OSError, ValueError):
            return None

    def check(self, name: str) -> str | None:
        """Read every byte of a mask; return what is wrong with it, or None."""
        try:
            self._read(name)
        except (OSError, ValueError) as error:
            return describe(error)
        return None

    def _read(self, name: str) -> Mask:
        content = read_tensors(self._path(name))
        try:
            about = _About.model_validate(parse_json(read_metadata(content)["mask"]))
            bits = safetensors.numpy.load(content)
            mask = Mask(dict(about.layers), {layer: bits[layer] for layer, _ in about.layers})
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            raise ValueError("it does not hold a mask") from None
        if about.name not in (None, name):
            raise ValueError(f"it holds the mask of another name, {about.name[:12]}")
        if mask.hash != about.hash:
            raise ValueError("its bits do not match their checksum")
        return mask

    def put(self, name: str, mask: Mask) -> bool:
        """Store a mask under a name; return whether it is stored: the store may not exist or not be writable."""
        if not (self._root / STORE_FILE).exists():
            return False
        layers = [[layer, list(shape)] for layer, shape in mask.shapes.items()]
        about = {"hash": mask.hash, "layers": layers, "name": name}
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = safetensors.numpy.save(mask.bits, {"mask": canonical(about).decode()})
            write_atomically(path, content, temporary_folder(self._root))
        except (OSError, UserError):
            return False
        return True

    def _path(self, name: str) -> Path:
        return self._root / "masks" / name[:2] / f"{name}.safetensors"


class _About(BaseModel):
    """The metadata of a mask; earlier versions wrote no name."""

    hash: StrictStr
    layers: list[tuple[StrictStr, tuple[StrictInt, ...]]]
    name: StrictStr | None = None

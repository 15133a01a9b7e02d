"""The layout of a store's folder: its version, and the folder for files that are being written."""

from __future__ import annotations

from pathlib import Path

VERSION = 1


def temporary_folder(root: Path) -> Path:
    """Return the folder in which files get their content before they are renamed; create it if it is missing.

    The folder is inside the store, because a rename is atomic only within one file system.
    """
    folder = root / "tmp"
    folder.mkdir(exist_ok=True)
    return folder


def unfinished_markers(root: Path) -> list[Path]:
    """Return the temporary files of `store.json`, left by a process that is writing it or was killed meanwhile."""
    return list(root.glob(".store.json.*"))


def list_files(root: Path, kind: str) -> list[Path]:
    """Return the safetensors files below one of the store's folders, in the order of their names."""
    return sorted((root / kind).glob("**/*.safetensors"))

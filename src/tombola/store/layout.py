"""The layout of a store's folder: its version, where its files lie, and the folder for files that are being written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

STORE = Path("tombola-store")
"""The folder of the store, unless another is named."""

VERSION = 1

RUN = re.compile(r".+\.[0-9]+\.[0-9a-f]{8}")
"""The name of a run's file, see `tombola.store.claims`."""

KEY = re.compile("[0-9a-f]{64}")
"""The name of a result, of a mask, of a checkpoint or of a claim."""

_SPREAD = "(?P<first>[0-9a-f]{2})/(?P=first)[0-9a-f]{62}"
_FOLDER = re.compile("results|masks|checkpoints|behaviours|runs|claims|tmp|(results|masks)/[0-9a-f]{2}")
_RESULT = re.compile(f"results/{_SPREAD}")
_FILES = {
    "masks": re.compile(rf"masks/{_SPREAD}\.safetensors"),
    "checkpoints": re.compile(rf"checkpoints/{KEY.pattern}\.safetensors"),
    "behaviours": re.compile(rf"behaviours/{KEY.pattern}\.(0|[1-9][0-9]{{0,3}})\.json"),
}
_PLACES = [
    _FOLDER,
    _RESULT,
    *_FILES.values(),
    re.compile(rf"results/{_SPREAD}/(result\.json|weights\.safetensors|SHA256SUMS|record\.json|metrics\.json)"),
    re.compile(f"runs/{RUN.pattern}"),
    re.compile(f"claims/{KEY.pattern}"),
    re.compile(r"store\.json|\.store\.json\..+"),
]


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
    """Return what is named as a mask, a checkpoint or a behaviour, sorted; it need not be a regular file.

    Args:
        root: the store's folder.
        kind: "masks", "checkpoints" or "behaviours".
    """
    pattern = "*/*" if kind == "masks" else "*"
    return sorted(path for path in (root / kind).glob(pattern) if _FILES[kind].fullmatch(_name(root, path)))


def list_results(root: Path) -> list[Path]:
    """Return what is named as the folder of a result, sorted; it need not be a folder."""
    return sorted(path for path in (root / "results").glob("*/*") if _RESULT.fullmatch(_name(root, path)))


def list_strays(root: Path) -> list[Path]:
    """Return the files and folders that have no place in a store, such as those of a file manager, sorted."""
    return sorted(path for path, name in _walk(root) if not any(place.fullmatch(name) for place in _PLACES))


def list_no_folders(root: Path) -> list[Path]:
    """Return what is named as one of the store's own folders and is none, sorted."""
    return sorted(path for path, name in _walk(root) if _FOLDER.fullmatch(name) and not path.is_dir())


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield everything in a store with its name in it, except what lies in `tmp` or in a folder without a place."""
    for folder, folders, files in os.walk(root):
        found = [Path(folder) / name for name in (*folders, *files)]
        yield from ((path, _name(root, path)) for path in found)
        inner = [_name(root, Path(folder) / name) for name in folders]
        folders[:] = [
            each
            for each, name in zip(folders, inner, strict=True)
            if name != "tmp" and (_FOLDER.fullmatch(name) or _RESULT.fullmatch(name))
        ]


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()

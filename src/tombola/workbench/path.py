"""The module path: where a study's own modules are found."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import tombola
from tombola.errors import UserError

_INSTALLED = ("site-packages", "dist-packages")
_EXTRAS = {"completion", "data", "metrics", "mlflow", "ray", "report", "tensorboard"}


def find_modules(folders: list[Path]) -> None:
    """Add these folders to the module path, after the standard library and before installed packages.

    Raises:
        UserError: if a module in one of them has the name of a package that tombola needs, and would be imported
            instead of it.
    """
    for folder in dict.fromkeys(folders):
        for name, path in _list_hiding(folder):
            raise UserError(f"{path}: its name hides the package {name!r}, which tombola needs; rename this file")
    place = next((i for i, entry in enumerate(sys.path) if entry.endswith(_INSTALLED)), len(sys.path))
    sys.path[place:place] = [str(folder) for folder in dict.fromkeys(folders) if str(folder) not in sys.path]


def _list_hiding(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the modules of a folder whose names are those of packages that tombola needs."""
    installed = [entry for entry in sys.path if entry.endswith(_INSTALLED)]
    try:
        names = sorted({path.name.partition(".")[0] for path in folder.iterdir() if path.suffix in ("", ".py", ".so")})
    except OSError:
        return
    needed: set[str] | None = None
    for name in names:
        if name != "tombola" and _origin(name, installed) is None:
            continue
        path = _origin(name, [str(folder)])
        if path is None or path.is_relative_to(Path(tombola.__file__).parent) or str(folder) in installed:
            continue
        needed = _list_needed() if needed is None else needed
        if name in needed:
            yield name, path


def _origin(name: str, folders: list[str]) -> Path | None:
    """Return the file of a top-level module that is found in these folders; None for a folder without `__init__.py`."""
    spec = PathFinder.find_spec(name, folders)
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.has_location else None


def _list_needed() -> set[str]:
    """Return the names of the top-level modules of tombola and of the packages that it needs."""
    waiting, found = ["tombola"], set()
    while waiting:
        name = _normalised(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [re.split(r"[^\w.-]", each)[0] for each in requirements if "extra ==" not in each or _is_ours(each)]
    packages = metadata.packages_distributions()
    return {"tombola"} | {top for top, owners in packages.items() if any(_normalised(one) in found for one in owners)}


def _is_ours(requirement: str) -> bool:
    """Return whether a requirement belongs to one of tombola's optional parts."""
    extra = re.search(r"""extra == ["'](\w+)["']""", requirement)
    return extra is not None and extra[1] in _EXTRAS


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

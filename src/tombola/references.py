"""References to a user's own code, `module:function`, and the hash of the source that they mean."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tombola.errors import UserError


def resolve(reference: str, what: str) -> Callable[..., Any]:
    """Return the function that `module:function` names; the module is looked for as by `import`.

    Args:
        reference: such as `my_package.models:mlp`.
        what: what it is, for the error message.

    Raises:
        UserError: where there is no such module or function, or the module fails while it is imported.

    >>> resolve("math:sqrt", "importance")(9.0)
    3.0
    """
    module_name, _, function_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{what} {reference!r}: importing {module_name!r} failed: {error}") from error
        raise UserError(
            f"{what} {reference!r}: there is no module {module_name!r} here or on Python's path; "
            f"expected module:function, with the module in this folder, beside the study or installed"
        ) from error
    except Exception as error:
        raise UserError(
            f"{what} {reference!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{what} {reference!r}: {module_name!r} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def source_hash(reference: str) -> str:
    """Return SHA-256 of the source that decides what `module:function` does.

    The source of its module, of every module that it imports, directly or not, and of the packages that these are in,
    except the standard library, tombola and installed packages (other than its own). So an edit of any of these gives
    another hash, comments included. What is imported under a name that is computed is not seen.
    """
    root = reference.partition(":")[0]
    digest = hashlib.sha256()
    for name, path in sorted(_own_modules(root).items()):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _own_modules(root: str) -> dict[str, Path]:
    """Return the files of `root` and of what it imports of the user's own, by module name."""
    found: dict[str, Path] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in found or top == "tombola" or (top in sys.stdlib_module_names and not _shadows(top)):
            continue
        path = _source(name)
        if path is not None and top != root.partition(".")[0] and _installed(path):
            continue
        if path is not None:
            found[name] = path
            waiting += _imports(name, path)
        waiting.append(name.rpartition(".")[0])  # importing a module runs its package's __init__.py first
    return found


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # looking for a.b imports a, which may raise anything; what is imported only at times may be absent
        return None
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    path = Path(spec.origin)
    return path if path.is_file() else None


def _shadows(top: str) -> bool:
    """Say whether a module of the user's own is found under a name of the standard library's."""
    path = _source(top)
    return path is not None and not _installed(path)


def _installed(path: Path) -> bool:
    folders = {sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    if {"site-packages", "dist-packages"} & set(path.parts):  # also those of the user, and of another Python's
        return True
    return any(path.is_relative_to(folder) for folder in folders)


def _imports(module: str, path: Path) -> Iterator[str]:
    """Yield every module that the file may import: also names from packages, which may be modules."""
    if path.suffix != ".py":
        return
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            yield base
            for alias in node.names:
                yield f"{base}.{alias.name}"

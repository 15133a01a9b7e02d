"""References to the user's own code, `module:function`, and the hash of its source."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tombola.errors import UserError, describe_exception, did_you_mean, is_installed


def resolve(reference: str, what: str) -> Callable[..., Any]:
    """Import a module and return the function that `module:function` names.

    Args:
        reference: the module and the function, such as `my_package.models:mlp`.
        what: the name of the reference in error messages.

    Raises:
        UserError: if there is no such module or function, or if importing the module fails.

    >>> resolve("math:sqrt", "importance")(9.0)
    3.0
    """
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{what} {reference!r}: expected module:function, such as my_module:my_function")
    failed = f"{what} {reference!r}: importing {module_name!r} raised"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{failed} {describe_exception(error)}") from error
        raise UserError(
            f"{what} {reference!r}: there is no module {module_name!r} here or on Python's path; "
            f"expected module:function, with the module in this folder, beside the study or installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{failed} {describe_exception(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or "built into Python"
        near = did_you_mean(function_name, [name for name, value in vars(module).items() if callable(value)])
        raise UserError(
            f"{what} {reference!r}: module {module_name!r} ({where}) has no function {function_name!r}"
            + (f"; {near}" if near.startswith("did") else "")
        )
    return function  # type: ignore[no-any-return]


def source_hash(reference: str) -> str:
    """Return the SHA-256 of the source code that determines what `module:function` does.

    The hash covers the module, every module that it imports directly or indirectly, and their packages. It does not
    cover the standard library, tombola or installed packages (other than the module's own). Every edit, even of a
    comment, changes the hash. A module whose name is computed when it is imported is not found.
    """
    root = reference.partition(":")[0]
    digest = hashlib.sha256()
    for name, path in sorted(own_modules(root).items()):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def own_modules(root: str) -> dict[str, Path]:
    """Return the files of a module and of the user's own modules that it imports, by module name."""
    found: dict[str, Path] = {}
    own = root.partition(".")[0]
    seen = {""}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or (top != own and (top == "tombola" or _of_python(top))):
            continue
        seen.add(name)
        path = _source(name)
        if path is not None and top != own and is_installed(path):
            continue
        if path is not None:
            found[name] = path
            waiting += _imports(name, path)
        waiting.append(name.rpartition(".")[0])  # importing a module runs its package's __init__.py first
    return found


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit):  # `find_spec` imports a to find a.b, and this may raise anything
        return None
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    path = Path(spec.origin)
    return path if path.is_file() else None


def _of_python(top: str) -> bool:
    """Return whether a name belongs to the standard library and is not hidden by a module of the user."""
    if top not in sys.stdlib_module_names:
        return False
    path = _source(top)
    return path is None or is_installed(path)


def _imports(module: str, path: Path) -> Iterator[str]:
    """Yield every module that the file may import; a name imported from a package may be a module too."""
    if path.suffix != ".py":
        return
    is_package = path.name == "__init__.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # importing this file fails, and the module that imports it may handle that
        return
    for node in ast.walk(tree):
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

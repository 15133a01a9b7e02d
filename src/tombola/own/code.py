"""References to the user's own code, `module:function`, the hash of its source, and its failures."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import sys
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tombola.errors import UserError, did_you_mean, is_installed
from tombola.exits import attribute_failure
from tombola.settings import restore_settings


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
    if not module_name or module_name.startswith(".") or not function_name:
        raise UserError(f"{what} {reference!r}: expected module:function, such as my_module:my_function")
    with attribute_failure(f"{what} {reference!r}: importing {module_name!r}"), restore_settings():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"{what} {reference!r}: there is no module {module_name!r} here or on Python's path; "
                f"expected module:function, with the module in this folder, beside the study or installed"
            ) from error
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
    cover the standard library, tombola, torch or installed packages (other than the module's own). Every edit, even of
    a comment, changes the hash. A module whose name is computed when it is imported is not found.
    """
    root = reference.partition(":")[0]
    digest = hashlib.sha256()
    for name, path in sorted(own_modules(root).items()):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(_read(path)).digest())
    return digest.hexdigest()


_IMPORTED: weakref.WeakKeyDictionary[ModuleType, str] = weakref.WeakKeyDictionary()
"""The hash of each own module's file when it was first seen after the import."""


@contextmanager
def steady_source(references: Collection[str]) -> Iterator[None]:
    """Check that the source which is hashed inside the block is the source which was imported.

    Args:
        references: the modules and the functions that are imported inside the block.

    Raises:
        UserError: if a file was edited or removed inside the block, or after it was seen in an earlier block; if a
            function of an imported module is not in its file; or if Python imported a compiled copy of another source.
    """
    roots = {reference.partition(":")[0] for reference in references}
    before = _hash_own(roots)
    yield
    found = _hash_own(roots)
    seen = before.keys() | {root for root in roots if sys.modules.get(root) in _IMPORTED}
    for name in sorted(seen - found.keys()):  # its source could not be a part of names
        if name in before and before[name][0].is_file():
            raise UserError(
                f"module {name!r}: it puts another object in its place in sys.modules, so that trainings cannot be "
                "named after its source; give this object a name in the module, and import that"
            )
        raise UserError(f"module {name!r}: its file was removed after it was imported; put it back, and start again")
    for name, (path, digest) in found.items():
        module = sys.modules.get(name)
        imported = digest if module is None else _IMPORTED.setdefault(module, digest)
        if module is not None and _is_stale(name, path):
            raise UserError(
                f"module {name!r}: Python has imported a compiled copy of another source than {path}; "
                f"remove {importlib.util.cache_from_source(str(path))}"
            )
        same = imported == digest and before.get(name, (path, digest)) == (path, digest)
        if not same or (module is not None and not _is_of(module, path)):
            raise UserError(
                f"module {name!r} was edited after it was imported ({path}); start again, with the file as it is now"
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: this module cannot be read: {error.strerror or error}") from error


def _hash_own(roots: Collection[str]) -> dict[str, tuple[Path, str]]:
    """Return the file of each own module and the hash of its content; installed modules are left out."""
    found = {name: path for root in roots for name, path in own_modules(root).items() if not is_installed(path)}
    return {name: (path, hashlib.sha256(_read(path)).hexdigest()) for name, path in found.items()}


def _is_stale(name: str, path: Path) -> bool:
    """Return whether the compiled copy of a module that Python would import is that of another source.

    Python takes a copy for valid if the time and the size of the source are those that the copy was compiled from. The
    time has a resolution of a second.
    """
    if path.suffix != ".py":
        return False
    loader = SourceFileLoader(name, str(path))
    try:
        compiled = loader.get_code(name)
        return compiled is not None and not _is_same(compiled, loader.source_to_code(_read(path), str(path)))
    except SyntaxError:  # there is no compiled copy of it
        return False


def _is_of(module: ModuleType, path: Path) -> bool:
    """Return whether every function of an imported module is in its file; what else the file did is not known."""
    loader = module.__loader__
    if type(loader) is not SourceFileLoader:  # another loader may change the code, as that of pytest does
        return True
    try:
        there = list(list_codes(loader.source_to_code(_read(path), str(path))))
    except SyntaxError:
        return False
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    members = [member for each in (module, *classes) for member in vars(each).values()]
    functions = [each.__func__ if isinstance(each, (staticmethod, classmethod)) else each for each in members]
    running = [each.__code__ for each in functions if isinstance(each, FunctionType)]
    outermost = {_outermost(each) for each in there}
    return all(
        any(code.co_firstlineno == each.co_firstlineno and _is_same(code, each) for each in there)
        for code in running
        if code.co_filename == str(path) and not ("<locals>" in code.co_qualname and _outermost(code) not in outermost)
    )


def _outermost(code: CodeType) -> str:
    """Return the name of the outermost function or class around code; that of a library may claim to be in this file.

    For example, `given` of hypothesis gives the file and the line of the function that it wraps to its own code.
    """
    return code.co_qualname.partition(".")[0]


def list_codes(compiled: CodeType) -> Iterator[CodeType]:
    """Yield compiled code, and that of the functions and classes in it."""
    yield compiled
    for const in compiled.co_consts:
        if isinstance(const, CodeType):
            yield from list_codes(const)


def _is_same(one: CodeType, other: CodeType) -> bool:
    """Return whether two codes do the same; `==` is not enough, since a constant may be NaN, and 1 equals True."""
    if (one.co_code, one.co_names, len(one.co_consts)) != (other.co_code, other.co_names, len(other.co_consts)):
        return False
    return all(_is_same_constant(*pair) for pair in zip(one.co_consts, other.co_consts, strict=True))


def _is_same_constant(one: object, other: object) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return _is_same(one, other)
    return one == other if isinstance(one, frozenset) else repr(one) == repr(other)


def own_modules(root: str) -> dict[str, Path]:
    """Return the files of a module and of the user's own modules that it imports, by module name."""
    found: dict[str, Path] = {}
    own = root.partition(".")[0]
    if own == "torch":  # its version is recorded with each result, as it is for all studies
        return {}
    seen = {""}
    waiting = [root]
    known: dict[str, ModuleSpec | None] = {}  # of this call alone: a file may come to be before the next one
    of_python = functools.cache(lambda top: _of_python(top, known))
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or (top != own and (top == "tombola" or of_python(top))):
            continue
        seen.add(name)
        path = find_source(name, known)
        if path is not None and top != own and is_installed(path):
            continue
        if path is not None:
            found[name] = path
            waiting += _imports(name, path)
        waiting.append(name.rpartition(".")[0])  # importing a module runs its package's __init__.py first
    return found


def find_source(module: str, known: dict[str, ModuleSpec | None] | None = None) -> Path | None:
    """Return the file of a module; None if there is none. Neither the module nor its packages are imported.

    Args:
        module: the module's name.
        known: the modules that were found before, to which this one and its packages are added.
    """
    spec = _find_spec(module, {} if known is None else known)
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    path = Path(spec.origin)
    return path if path.is_file() else None


def _find_spec(module: str, known: dict[str, ModuleSpec | None]) -> ModuleSpec | None:
    """Return what Python knows of a module, from `known` where it is there."""
    if module not in known:
        known[module] = _look_up_spec(module, known)
    return known[module]


def _look_up_spec(module: str, known: dict[str, ModuleSpec | None]) -> ModuleSpec | None:
    """Return what Python knows of a module: `importlib.util.find_spec` would import `a` to find `a.b`.

    That is done after all where the package has no file, so that no code runs, or where it may look elsewhere for its
    modules, which only its code knows.
    """
    package = module.rpartition(".")[0]
    try:
        if package and module not in sys.modules and package not in sys.modules:
            parent = _find_spec(package, known)
            if parent is None or parent.submodule_search_locations is None:  # it is no package
                return None
            if parent.origin is not None and b"__path__" not in Path(parent.origin).read_bytes():
                folders = parent.submodule_search_locations
                found = (finder.find_spec(module, folders) for finder in sys.meta_path if hasattr(finder, "find_spec"))
                return next((spec for spec in found if spec is not None), None)
        return importlib.util.find_spec(module)
    except KeyboardInterrupt:
        raise
    except BaseException:  # importing a package, or a finder of the user, may raise anything
        return None


def _of_python(top: str, known: dict[str, ModuleSpec | None]) -> bool:
    """Return whether a name belongs to the standard library and is not hidden by a module of the user."""
    if top not in sys.stdlib_module_names:
        return False
    path = find_source(top, known)
    return path is None or is_installed(path)


def _imports(module: str, path: Path) -> tuple[str, ...]:
    """Return every module that the file may import; a name imported from a package may be a module too."""
    if path.suffix != ".py":
        return ()
    is_package = path.name == "__init__.py"
    try:
        return _list_imports(_read(path), module if is_package else module.rpartition(".")[0])
    except (RecursionError, MemoryError):  # as of a file that cannot be imported; not kept, since the stack decides it
        return ()


@functools.lru_cache(maxsize=4096)
def _list_imports(source: bytes, package: str) -> tuple[str, ...]:
    """Return every module that the source of a module in a package may import."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # importing this file fails, and the module that imports it may handle that
        return ()
    found = []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parents = parts[: len(parts) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield every statement in the order of `ast.walk`, which takes ten times as long, since it visits expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, block, ()))

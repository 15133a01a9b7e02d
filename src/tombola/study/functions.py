"""Functions of the user as references: those of modules by name, those of a script, a notebook or a closure by content.

A study names functions by strings, `module:function`, which every process can import. A function that only this process
has, because a script, a cell of a notebook or another function defines it, gets a name too. Its identity is then
the hash of its own source and of what it uses. It is trained in this process, see `tombola.engine.here`.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tombola.errors import UserError, is_installed
from tombola.study import code

_HERE: dict[str, Any] = {}
"""What only this process has and Python has no name for, by the reference that `refer` returned."""

_SCRIPT = "__main__"

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def refer(value: Any, what: str) -> Any:
    """Return the reference of a function, of an importance or of a data set; return anything else unchanged.

    Args:
        value: a function, a class, a `functools.partial`, an `Importance` or a `Dataset`; strings stay as they are.
        what: the name of the field, for messages.

    Raises:
        UserError: if the function uses something whose content cannot be identified.

    >>> import math
    >>> refer(math.sqrt, "importances"), refer("l1", "importances")
    ('math:sqrt', 'l1')
    >>> refer(lambda weights: weights**3, "importances").rpartition("-")[0]
    'tombola.study.functions:<lambda>'
    """
    if isinstance(value, str) or not (callable(value) or hasattr(value, "fingerprint")):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        raise UserError(f"{what}: expected a function that returns a module, got a module ({type(value).__name__})")
    if (built_in := _name_of_built_in(value)) is not None:
        return built_in
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and name and "." not in name and getattr(sys.modules.get(module), name, None) is value:
        return f"{module}:{name}"
    digest = _hash(value, what)
    label = name or getattr(getattr(value, "func", value), "__qualname__", None) or getattr(value, "name", None)
    reference = f"{module or _SCRIPT}:{(label or type(value).__name__).rpartition('.')[2]}-{digest[:8]}"
    _HERE[reference] = value
    return reference


def is_here(reference: str) -> bool:
    """Return whether a reference is of what only this process has, so that a worker cannot import it."""
    return reference in _HERE or reference.startswith(f"{_SCRIPT}:")


def resolve(reference: str, what: str) -> Callable[..., Any]:
    """Return the function that a reference names, see `tombola.study.code.resolve`.

    Raises:
        UserError: if there is no such module or function, or if importing the module fails.
    """
    if reference not in _HERE:
        return code.resolve(reference, what)
    value = _HERE[reference]
    return value if callable(value) else lambda: value


def source_hash(reference: str) -> str:
    """Return the SHA-256 of what determines the function that a reference names.

    For a function of a module, that is the source of the module and of what it imports from the user, see
    `tombola.study.code.source_hash`. For one that only this process has, it is the source of the function itself and
    the content of every function, class, module and constant that it uses.

    Raises:
        UserError: if the function uses something whose content cannot be identified.
    """
    if not is_here(reference):
        return code.source_hash(reference)
    return _hash(resolve(reference, reference), reference)


def _name_of_built_in(value: Any) -> str | None:
    """Return the name of a data set, model, loss or importance of tombola; None for anything else."""
    modules = {name: sys.modules.get(name) for name in ("tombola.importance", "tombola.models", "tombola.datasets")}
    importance, models, datasets = modules.values()
    if importance is not None and isinstance(value, importance.Importance):
        known = importance.is_built_in(value.name) and importance.find(value.name) == value
        return str(value.name) if known else None
    functional = sys.modules.get("torch.nn.functional")
    tables = [models.MODELS if models else {}, datasets.DATASETS if datasets else {}]
    tables.append({"cross_entropy": functional.cross_entropy} if functional else {})
    return next((name for table in tables for name, each in table.items() if each is value), None)


def _hash(value: Any, what: str) -> str:
    digest = hashlib.sha256()
    for part in _describe(value, what, {}):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _describe(value: Any, what: str, seen: dict[int, int]) -> Iterator[bytes]:
    """Yield everything that determines what a value does, each thing once.

    Args:
        value: a function, a class or a constant.
        what: the name of the field, for messages.
        seen: the numbers of the values that have been described, by identity.
    """
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if id(value) in seen:
        yield f"again {seen[id(value)]}".encode()
        return
    seen[id(value)] = len(seen)
    if isinstance(value, types.ModuleType):
        yield _describe_module(value)
    elif isinstance(value, functools.partial):
        yield from _describe((value.func, value.args, value.keywords), what, seen)
    elif isinstance(value, types.MethodType):
        yield from _describe((value.__func__, value.__self__), what, seen)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _describe(value.__func__, what, seen)
    elif isinstance(value, property):
        yield from _describe((value.fget, value.fset), what, seen)
    elif (name := _importable(value)) is not None:
        yield name
    elif isinstance(value, types.FunctionType):
        yield from _describe_function(value, what, seen)
    elif isinstance(value, type):
        yield f"class {value.__qualname__}".encode()
        own = {key: member for key, member in vars(value).items() if key not in _OF_EVERY_CLASS}
        yield from _describe((value.__bases__, own), what, seen)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _describe(key, what, seen)
            yield from _describe(each, what, seen)
    elif isinstance(value, (tuple, list)):
        yield f"{type(value).__name__} of {len(value)}".encode()
        for each in value:
            yield from _describe(each, what, seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(part for each in value for part in _describe(each, what, seen))
    elif hasattr(value, "fingerprint"):  # a Dataset
        yield f"data {value.fingerprint}".encode()
    elif hasattr(value, "__array__") and hasattr(value, "dtype"):
        array = (value.detach().cpu() if hasattr(value, "detach") else value).__array__()
        yield f"array {array.dtype} {array.shape}".encode()
        yield array.tobytes()
    elif callable(value) and hasattr(value, "__dict__"):  # an object with a method `__call__`, such as an Importance
        yield from _describe((type(value), vars(value)), what, seen)
    else:
        raise UserError(
            f"{what}: it uses a {type(value).__name__}, whose content cannot be identified, so that its trainings "
            "would have no name; create that inside the function, or put the function into a module"
        )


_OF_EVERY_CLASS = {
    "__module__", "__qualname__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__classcell__",
}  # fmt: skip


def _importable(value: Any) -> bytes | None:
    """Describe a function or class that a module other than the script defines; None for anything else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(value, types.BuiltinFunctionType):
        return f"{module} {name}".encode()
    if not isinstance(value, (type, types.FunctionType)) or not module or not name or module == _SCRIPT:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return None
    return _describe_module(sys.modules[module]) + f":{name}".encode()


def _describe_module(module: types.ModuleType) -> bytes:
    """Describe a module: one of the user by its source, another by its name."""
    name, path = module.__name__, getattr(module, "__file__", None)
    own = path is not None and name.partition(".")[0] != "tombola" and name != _SCRIPT
    if own and not is_installed(Path(str(path))) and name.partition(".")[0] not in sys.stdlib_module_names:
        return f"{name} {code.source_hash(name)}".encode()
    return name.encode()


def _describe_function(function: types.FunctionType, what: str, seen: dict[int, int]) -> Iterator[bytes]:
    """Yield the source of a function, its defaults, and what it uses from around it."""
    compiled = function.__code__
    try:
        yield inspect.cleandoc(inspect.getsource(function)).encode()
        has_source = function.__name__ != "<lambda>"  # the source of a lambda is its line, which may have others
    except (OSError, TypeError):
        has_source = False
    if not has_source:
        for each in _nested(compiled):
            yield each.co_code
            yield repr([const for const in each.co_consts if not isinstance(const, types.CodeType)]).encode()
            yield repr((each.co_names, each.co_varnames)).encode()
    yield from _describe((function.__defaults__, function.__kwdefaults__), what, seen)
    for name, value in _list_used(function, compiled):
        yield name.encode()
        yield from _describe(value, f"{what}: {function.__name__}: {name}", seen)


def _list_used(function: types.FunctionType, compiled: types.CodeType) -> Iterable[tuple[str, Any]]:
    """Yield the variables of the closure and of the module that a function uses, with their values, by name."""
    for name, cell in zip(compiled.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":
            try:
                yield name, cell.cell_contents
            except ValueError:  # it is not assigned yet
                continue
    names = {
        instruction.argval
        for each in _nested(compiled)
        for instruction in dis.get_instructions(each)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for name in sorted(names & function.__globals__.keys()):
        yield name, function.__globals__[name]


def _nested(compiled: types.CodeType) -> Iterator[types.CodeType]:
    yield compiled
    for const in compiled.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested(const)

"""Functions of the user as references: those of modules by name, those of a script, a notebook or a closure by content.

A study names functions by strings, `module:function`, which every process can import. A function that only this process
has, because a script, a cell of a notebook or another function defines it, gets a name too. Its identity is then
the hash of its own code and of what it uses. It is trained in this process, see `tombola.engine.here`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from tombola.errors import UserError, is_installed
from tombola.own import code

if TYPE_CHECKING:
    from torch import Tensor

_HERE: dict[str, Any] = {}
"""The functions that only this process has and Python has no name for, by the reference that `refer` returned."""

_DATA: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The same for data sets, which are large: `keep_data` keeps them as long as a task names them."""

_SCRIPT = "__main__"

_PLAIN = (bool, int, float, complex, str, bytes, range, PurePath, types.NoneType, types.EllipsisType)
_PLAIN_OF_TORCH = {"torch.dtype", "torch.device", "torch.layout", "torch.memory_format"}

_Seen: TypeAlias = dict[int, tuple[int, Any]]
"""The number of each value that has been described, and the value: Python reuses the identity of one that is freed."""


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
    'tombola.own.functions:<lambda>'
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
    reference = f"{(name and module) or _SCRIPT}:{_label(value)}-{digest[:8]}"
    if callable(value):
        _HERE[reference] = value
    else:
        _DATA.setdefault(reference, value)  # an equal one may be named by a task that lives longer than this value
    return reference


def keep_data(reference: str, owner: object) -> None:
    """Keep a data set that only this process has as long as `owner` lives, which names it by this reference."""
    if reference in _DATA:
        weakref.finalize(owner, lambda _: None, _DATA[reference]).atexit = False


def _label(value: Any) -> str:
    """Return a name of a value for tables and charts, without the marks that separate the parts of a reference."""
    inner = getattr(value, "func", None) or getattr(value, "function", None)  # of a partial; of a NetworkScore
    named = [getattr(value, "__name__", None), getattr(inner, "__name__", None), getattr(value, "name", None)]
    label = next(filter(None, named), type(value).__name__)
    return str(label).replace("/", "-").replace(":", "-")


def is_here(reference: str) -> bool:
    """Return whether a reference is of what only this process has, so that a worker cannot import it."""
    return reference in _HERE or reference in _DATA or reference.startswith(f"{_SCRIPT}:")


def resolve(reference: str, what: str) -> Callable[..., Any]:
    """Return the function that a reference names, see `tombola.own.code.resolve`.

    Raises:
        UserError: if there is no such module or function, or if importing the module fails.
    """
    if (data := _DATA.get(reference)) is not None:
        return lambda: data
    return _HERE[reference] if reference in _HERE else code.resolve(reference, what)


def source_hash(reference: str) -> str:
    """Return the SHA-256 of what determines the function that a reference names.

    For a function of a module, that is the source of the module and of what it imports from the user, see
    `tombola.own.code.source_hash`. For one that only this process has, it is the compiled code of the function itself
    and the content of every function, class, module and constant that it uses.

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


def _hash(value: Any, what: str, seen: _Seen | None = None) -> str:
    digest = hashlib.sha256()
    for part in _describe(value, what, {} if seen is None else seen):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _describe(value: Any, what: str, seen: _Seen) -> Iterator[bytes]:
    """Yield everything that determines what a value does, each thing once.

    Args:
        value: a function, a class or a constant.
        what: the name of the field, for messages.
        seen: the values that have been described.
    """
    kind = type(value).__name__
    own = _list_own_parts(value)
    plain = next((base for base in _PLAIN if isinstance(value, base)), None)
    if not own and (plain is not None or f"{type(value).__module__}.{kind}" in _PLAIN_OF_TORCH):
        yield f"{kind} {value!r}".encode()
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}".encode()
        return
    seen[id(value)] = len(seen), value
    if plain is not None:  # of a class of the user, whose `__repr__` may say anything
        yield f"{kind} {plain.__repr__(value)}".encode()  # type: ignore[call-arg]
    elif isinstance(value, types.ModuleType):
        yield _describe_module(value)
    elif isinstance(value, types.BuiltinFunctionType):
        yield f"{value.__module__} {value.__qualname__}".encode()
    elif _is_importable(value):
        yield from _describe(sys.modules[value.__module__], what, seen)
        yield f":{value.__qualname__}".encode()
    elif isinstance(value, types.FunctionType):
        used = dict(_list_used(value))
        _warn_of_computed_names(value, what)
        yield f"{kind} of {len(used)}".encode()
        yield from _describe((value.__code__, value.__defaults__, value.__kwdefaults__), what, seen)
        for name, each in used.items():
            yield name.encode()
            yield from _describe(each, f"{what}: {value.__name__}: {name}", seen)
        for name in _list_imports(value):
            yield from _describe_import(name)
    elif isinstance(value, (set, frozenset)):
        yield f"{kind} of {len(value)}".encode()
        yield from sorted(_hash(each, what, dict(seen)).encode() for each in value)
    elif (parts := _list_parts(value)) is not None:
        yield f"{kind} of {len(parts)}".encode()
        for each in parts:
            yield from _describe(each, what, seen)
    else:
        raise UserError(
            f"{what}: it uses a {kind}, whose content cannot be identified, so that its trainings "
            "would have no name; create that inside the function, or put the function into a module"
        )
    if own:
        yield from _describe(own, what, seen)


def _list_own_parts(value: Any) -> list[Any]:
    """Return what a value has besides its content: attributes, and the methods that a class of the user gives it.

    An object with a method `__call__` is left out, because all of it is described, see `_list_parts`.
    """
    if isinstance(value, (types.FunctionType, functools.partial)):
        attributes = {name: each for name, each in vars(value).items() if name != "__wrapped__"}
        return [attributes] if attributes else []
    classes = [base for base in type(value).__mro__ if _is_of_user(base.__module__, _file_of(base.__module__))]
    if not classes or (callable(value) and not isinstance(value, type)):
        return []
    members = {f"{base.__qualname__}.{name}": each for base in classes for name, each in _list_methods(base)}
    attributes = {} if isinstance(value, (type, Enum)) else dict(getattr(value, "__dict__", {}))
    return [part for part in (members, attributes) if part]


def _list_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the methods and properties that a class defines itself, without those that are made for it."""
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        own = isinstance(function, types.FunctionType) and function.__module__ == kind.__module__
        if own and not _is_of_dataclass(function):
            yield name, member


def _list_parts(value: Any) -> Sequence[Any] | None:
    """Return the values that, in this order, determine another; None if they are not known."""
    torch = sys.modules.get("torch")
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, Enum):
        return value.name, value.value
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    if isinstance(value, types.CodeType):
        return [getattr(value, name) for name in _OF_CODE]
    if isinstance(value, type):
        own = {
            key: _list_parts_of_dataclass(value) if key == "__dataclass_fields__" else member
            for key, member in vars(value).items()
            if key not in _OF_EVERY_CLASS and not _is_of_dataclass(member) and type(member) is not _SLOT
        }
        return value.__qualname__, value.__bases__, own
    if torch is not None and isinstance(value, torch.Tensor):
        return _list_parts_of_tensor(value)
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        return None if value.dtype.hasobject else (str(value.dtype), value.shape, value.tobytes())
    if hasattr(value, "fingerprint"):  # a Dataset
        return (value.fingerprint,)
    if callable(value) and hasattr(value, "__dict__"):  # an object with a method `__call__`, such as an Importance
        return type(value), vars(value)
    if dataclasses.is_dataclass(value):
        return type(value), [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _list_parts_of_dataclass(kind: type) -> list[Any]:
    """Return what the decorator was given, from which it makes the methods of a data class."""
    fields: dict[str, dataclasses.Field[Any]] = vars(kind)["__dataclass_fields__"]
    missing = dataclasses.MISSING
    found: list[Any] = [repr(vars(kind)["__dataclass_params__"])]
    for field in fields.values():
        given = [value for value in (field.default, field.default_factory) if value is not missing]
        flags = field.init, field.repr, field.hash, field.compare, field.kw_only
        found.append((field.name, repr(getattr(field, "_field_type", None)), flags, dict(field.metadata), given))
    return found


def _is_of_dataclass(member: Any) -> bool:
    """Return whether a member of a class is one that the decorator of data classes has made, or its parameters."""
    function = getattr(member, "__code__", None)
    made = function is not None and function.co_qualname.startswith("__create_fn__.")
    within = function is not None and function.co_filename == dataclasses.__file__
    return made or within or type(member).__name__ == "_DataclassParams"


def _list_parts_of_tensor(tensor: Tensor) -> list[str] | None:
    from tombola.datasets.dataset import digest_of  # it imports torch, which the command line's `--help` does not need

    try:
        frozen = tensor.requires_grad != isinstance(tensor, sys.modules["torch"].nn.Parameter)
        return None if tensor.is_quantized else digest_of(tensor.detach()) + ["requires_grad differs"] * frozen
    except RuntimeError:  # it has no bytes of its own, as it is sparse, a view or on the device 'meta'
        return None


_OF_CODE = (
    "co_code", "co_exceptiontable", "co_flags", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars",
    "co_argcount", "co_posonlyargcount", "co_kwonlyargcount",
)  # fmt: skip
"""What compiled code does; not the text of its file, which may have been edited since it was compiled."""

_SLOT = types.MemberDescriptorType
"""The type of the members that `__slots__`, which is described too, gives a class."""

_OF_EVERY_CLASS = {
    "__module__", "__qualname__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__classcell__",
}  # fmt: skip


def _is_importable(value: Any) -> bool:
    """Return whether a value is a function or class that a module other than the script defines."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(value, (type, types.FunctionType)) or not module or not name or module == _SCRIPT:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _describe_module(module: types.ModuleType) -> bytes:
    """Describe a module: one of the user by its source, another by its name."""
    name = module.__name__
    if name != _SCRIPT and _is_of_user(name, getattr(module, "__file__", None)):
        return _describe_source(name)
    return name.encode()


def _describe_import(name: str) -> Iterator[bytes]:
    """Describe a module of the user that a function imports when it is called; the name may be that of no module."""
    if name != _SCRIPT and _is_of_user(name, code.find_source(name)):
        yield _describe_source(name)


def _describe_source(module: str) -> bytes:
    with code.steady_source([module]):
        return f"{module} {code.source_hash(module)}".encode()


def _is_of_user(module: str, path: str | Path | None) -> bool:
    """Return whether a module is the user's script, or a file that is not installed."""
    top = module.partition(".")[0]
    if top == "tombola" or top in sys.stdlib_module_names:
        return False
    return module == _SCRIPT or (path is not None and not is_installed(Path(path)))


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _list_imports(function: types.FunctionType) -> Iterator[str]:
    """Yield the modules that a function imports when it is called; a name from a package may be a module too."""
    package = function.__globals__.get("__package__")
    for each in code.list_codes(function.__code__):
        steps = list(dis.get_instructions(each))
        for level, names, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                dots = "." * level.argval
                with contextlib.suppress(ImportError):  # a relative import in a script, which will fail
                    base = importlib.util.resolve_name(dots + step.argval, package)
                    yield from (base, *(f"{base}.{name}" for name in names.argval or ()))


class ComputedNameWarning(UserWarning):
    """A function uses something under a name that it computes, so that the identity of the function is without it."""


_COMPUTE_NAMES = {"eval", "exec", "globals", "__import__", "import_module"}
"""The functions with which code finds something whose name does not stand in it."""


def _warn_of_computed_names(function: types.FunctionType, what: str) -> None:
    steps = [step for each in code.list_codes(function.__code__) for step in dis.get_instructions(each)]
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}  # model.eval is another
    if found := sorted(names & _COMPUTE_NAMES - function.__globals__.keys() | (names | attributes) & {"import_module"}):
        warnings.warn(
            f"{what}: {function.__name__} calls {found[0]}, and what it finds by that is not in the names of its "
            "trainings; name what it uses directly, or in task.depends",
            ComputedNameWarning,
            stacklevel=2,
        )


def _list_used(function: types.FunctionType) -> Iterable[tuple[str, Any]]:
    """Yield the variables of the closure and of the module that a function uses, with their values, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":
            try:
                yield name, cell.cell_contents
            except ValueError:  # it is not assigned yet
                continue
    names = {
        instruction.argval
        for each in code.list_codes(function.__code__)
        for instruction in dis.get_instructions(each)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for name in sorted(names & function.__globals__.keys()):
        yield name, function.__globals__[name]

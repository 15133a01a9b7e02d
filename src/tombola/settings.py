"""Settings that hold for a whole process or thread, so that a user's code must not leave them changed.

Those of torch decide the bits of every later computation: the number of threads, the types and the device of new
tensors, whether gradients are computed, autocast, the precision with which products of float32 are computed, and
whether oneDNN is used. Those of Python decide what is stored, and whether a run can be stopped: functions that are
replaced, an alarm, Ctrl-C, and files that are closed. This module does not import torch.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

from tombola.errors import UserError

_NAMES: dict[str, tuple[ModuleType, str]] = {
    f"Python's {module.__name__}.{name}": (module, name)
    for module, names in {
        builtins: ("open", "print"),
        hashlib: ("sha256",),
        json: ("dumps", "loads"),
        os: ("fsync", "link", "rename", "replace", "unlink", "write"),
        sys: ("stdout", "stderr"),
    }.items()
    for name in names
}
"""The functions with which results are named and stored, and the streams to which they are printed."""

_ALARM = "an alarm of the process"

_Setting: TypeAlias = tuple[Any, Callable[[Any], object]]
"""The value of a setting, and a function that sets it."""


@contextmanager
def restore_settings() -> Iterator[None]:
    """Give the settings back the values that they had before the block.

    >>> import torch
    >>> with restore_settings():
    ...     torch.set_grad_enabled(False)
    torch.autograd.grad_mode.set_grad_enabled(mode=False)
    >>> torch.is_grad_enabled()
    True
    """
    before = _read()
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def refuse_settings(what: str) -> Iterator[None]:
    """Give the settings back their values after the block; raise `UserError` if the block has changed one.

    Args:
        what: the beginning of the message, which goes on with " changed ...".

    >>> import torch
    >>> with refuse_settings("my_module"):
    ...     torch.set_default_dtype(torch.float64)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: my_module changed torch's default type of numbers from torch.float32 to torch.float64...
    """
    before, spare = _read(), _open_spare()
    try:
        yield
    finally:
        spared = spare is None or _close(spare)
        changed = _restore(before)
    if not spared:
        raise UserError(f"{what} closed files that are not its own; close only what it has opened itself")
    if changed:
        raise UserError(
            f"{what} changed {changed}, which would change what is computed or stored later; leave it as it is, or set "
            "it back"
        )


def _open_spare() -> int | None:
    """Open a file that nobody needs, and return its number; whoever closes it has closed others too."""
    try:
        return os.dup(2)
    except OSError:  # standard error is closed, or there are too many files
        return None


def _close(handle: int) -> bool:
    """Close a file; return whether it was open."""
    try:
        os.close(handle)
    except OSError:
        return False
    return True


def _read() -> dict[str, _Setting]:
    """Return the settings by name; none of torch if it is not imported."""
    found: dict[str, _Setting] = {
        name: (getattr(module, function), partial(setattr, module, function))
        for name, (module, function) in _NAMES.items()
    }
    if threading.current_thread() is threading.main_thread():  # no other thread can change these
        if (handler := signal.getsignal(signal.SIGINT)) is not None:
            found["Python's answer to Ctrl-C"] = handler, partial(signal.signal, signal.SIGINT)
        if hasattr(signal, "setitimer"):  # Windows has none
            alarm = signal.getitimer(signal.ITIMER_REAL)[0] > 0
            found[_ALARM] = alarm, lambda _: signal.setitimer(signal.ITIMER_REAL, 0)
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_default_device"):  # not imported, or only in part
        return found
    return found | {
        "torch's number of threads": (torch.get_num_threads(), torch.set_num_threads),
        "torch's default type of numbers": (torch.get_default_dtype(), torch.set_default_dtype),
        "torch's default device": (
            default_device(torch),
            lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        ),
        "torch's grad mode": (torch.is_grad_enabled(), torch.set_grad_enabled),
        "torch's autocast": (
            torch.is_autocast_enabled("cpu"),
            lambda enabled: torch.set_autocast_enabled("cpu", enabled),
        ),
        "torch's deterministic debug mode": (  # also says whether `use_deterministic_algorithms` only warns
            torch.get_deterministic_debug_mode(),
            lambda mode: torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1),
        ),
        "torch.backends.mkldnn.enabled": (torch.backends.mkldnn.enabled, torch._C._set_mkldnn_enabled),
        **_read_precisions(torch),
    }


def default_device(torch: Any) -> Any:
    """Return torch's default device, which torch 2.6 does not tell after `torch.set_default_device(None)`."""
    try:
        return torch.get_default_device()
    except AttributeError:
        return torch.device("cpu")


def _read_precisions(torch: Any) -> dict[str, _Setting]:
    """Return the precisions of float32 products on the CPU; torch 2.9 and newer have one for each kind of operation.

    What is set for no operation in particular, or by `torch.set_float32_matmul_precision`, is restored with them. An
    operation that inherited its precision may have one of its own then.
    """
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    write = getattr(torch._C, "_set_fp32_precision_setter", None)
    if read is None or write is None:
        common = torch.get_float32_matmul_precision()
        return {"torch.get_float32_matmul_precision()": (common, torch.set_float32_matmul_precision)}
    operations = [("mkldnn", operation) for operation in ("matmul", "conv", "rnn")]
    on_gpus = "cuda", "matmul"
    before = {place: read(*place) for place in (("generic", "all"), ("mkldnn", "all"), *operations, on_gpus)}

    def used(precision: str) -> str:
        return "ieee" if precision == "none" else precision

    def restore(_: str) -> None:
        if read(*on_gpus) != before[on_gpus]:  # by the function that sets both
            common = {"ieee": "highest", "tf32": "high", "bf16": "medium"}[used(before["mkldnn", "matmul"])]
            torch.set_float32_matmul_precision(common)
        for place, precision in before.items():
            write(*place, precision)
        for place in operations:
            if used(read(*place)) != used(before[place]):  # the precision of all could not be restored
                write(*place, used(before[place]))

    return {f"torch.backends.mkldnn.{each[1]}.fp32_precision": (used(before[each]), restore) for each in operations}


def _restore(before: dict[str, _Setting]) -> str:
    """Restore the settings; return how the first of those that were changed had changed, or an empty text."""
    after = _read()
    changed = [name for name, (value, _) in before.items() if name in after and after[name][0] != value]
    changed = [name for name in changed if name != _ALARM or not before[name][0]]  # one set before may have gone off
    for name in changed:
        value, set_value = before[name]
        set_value(value)
    if not changed:
        return ""
    first, (old, _), (new, _) = changed[0], before[changed[0]], after[changed[0]]
    return first if first.startswith("Python's") else f"{first} from {old} to {new}"

"""Settings of torch that hold for a whole process or thread, so that a user's code must not leave them changed.

They decide the bits of every later computation: the number of threads, the types and the device of new tensors,
whether gradients are computed, and autocast. This module does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tombola.errors import UserError


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
    before = _read()
    try:
        yield
    finally:
        changed = _restore(before)
    if changed:
        raise UserError(
            f"{what} changed torch's {changed}, which would change what is computed later; leave it as it is, or set "
            "it back"
        )


def _read() -> dict[str, Any]:
    """Return the settings by name; none of them if torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_default_device"):  # not imported, or only in part
        return {}
    return {
        "number of threads": torch.get_num_threads(),
        "default type of numbers": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def _restore(before: dict[str, Any]) -> str:
    """Restore the settings; return how the first of those that were changed had changed, or an empty text."""
    after = _read()
    changed = [name for name, value in before.items() if after[name] != value]
    if not changed:
        return ""
    torch: Any = sys.modules["torch"]
    set_value = {
        "number of threads": torch.set_num_threads,
        "default type of numbers": torch.set_default_dtype,
        "default device": lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        "grad mode": torch.set_grad_enabled,
        "autocast": lambda enabled: torch.set_autocast_enabled("cpu", enabled),
    }
    for name in changed:
        set_value[name](before[name])
    return f"{changed[0]} from {before[changed[0]]} to {after[changed[0]]}"

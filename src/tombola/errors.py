"""Exceptions: mistakes of a user, each said in one sentence, and damage to what is stored."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave: its text says what, where, what was expected and what to do.

    The command line prints the text as one sentence and exits with status 2.

    >>> raise UserError("levels must be 0 or more, got -1")
    Traceback (most recent call last):
    tombola.errors.UserError: levels must be 0 or more, got -1
    """


class ImportanceError(UserError):
    """An importance that failed on a layer: it raised, or returned what cannot be compared."""


class NothingStoredError(UserError):
    """Results that are asked for and that the store does not have yet: their trainings are still to be done."""


class StoreError(UserError):
    """A folder that cannot be used as a store: it is none, or another version of tombola wrote it."""


class ClusterError(UserError):
    """A cluster of machines that cannot be reached."""


class DamagedResultError(Exception):
    """A stored result whose bytes are not those that were written.

    This is no mistake of the user's: the result can be removed and its training repeated.

    Args:
        key: the result's name.
        reason: what is wrong with it.

    >>> str(DamagedResultError("0123456789abcdef", "a file is missing"))
    'result 0123456789ab is damaged (a file is missing)'
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"result {key[:12]} is damaged ({reason})")
        self.key, self.reason = key, reason


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a clause that names the choices nearest to `name`, or all of them where none is near.

    >>> did_you_mean("magnitud", ["magnitude", "l1"])
    "did you mean 'magnitude'?"
    >>> did_you_mean("LeNet", ["resnet20", "lenet_300_100"])
    "did you mean 'lenet_300_100'?"
    >>> did_you_mean("xyz", ["magnitude", "l1"])
    "choose from 'magnitude', 'l1'"
    """
    known = list(choices)
    folded = {choice.casefold(): choice for choice in known}
    near = [choice for choice in known if name and choice.casefold().startswith(name.casefold())]
    near = near or [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]
    quoted = ", ".join(repr(choice) for choice in (near or known))
    return f"did you mean {quoted}?" if near else f"choose from {quoted}"


def describe_exception(error: BaseException) -> str:
    """Return what an exception in a user's code says, in one line, and the line of that code which it came from.

    >>> describe_exception(ValueError("no such thing"))
    'ValueError: no such thing'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    package = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not is_installed(path) and not path.is_relative_to(package):
            return f"{text} (in {path}, line {frame.lineno})"
    return text


def is_installed(path: Path) -> bool:
    """Say whether a file belongs to an installed package or to Python itself."""
    folders = {sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    if {"site-packages", "dist-packages"} & set(path.parts):  # also those of the user, and of another Python's
        return True
    return any(path.is_relative_to(folder) for folder in folders)

"""Exceptions: a user's mistakes, each explained in one sentence, and damaged results in a store."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any

_LONGEST = 500  # characters of the message of a user's exception
_LONGEST_PATH = 4095  # bytes, as on Linux


class UserError(ValueError):
    """A mistake in the user's input. The message says what is wrong, where, what was expected and what to do.

    The command line prints the message as one sentence and exits with status 2.

    >>> raise UserError("levels must be 0 or more, got -1")
    Traceback (most recent call last):
    tombola.errors.UserError: levels must be 0 or more, got -1
    """


def refuse_windows(what: str) -> None:
    """Raise `UserError` on Windows, which lacks file locks and copies of processes as a run of a study needs them.

    Args:
        what: what is not done there, in the plural.
    """
    if sys.platform == "win32":
        raise UserError(
            f"{what} need Linux or macOS; on Windows use its subsystem for Linux (WSL). "
            "find_tickets, prune, tickets and your own training loops need no WSL"
        )


class RoundError(UserError):
    """A round of pruning cannot be done, so a chain of tickets ends before it."""


class ImportanceError(RoundError):
    """An importance failed on a layer: it raised an exception, or returned values that cannot be compared."""


class BudgetError(UserError):
    """The budget of a search does not suffice for its first ticket."""


class NothingStoredError(UserError):
    """The store does not have the requested results yet: their trainings have not been run."""

    @classmethod
    def of_study(cls, store: Path) -> NothingStoredError:
        """Return the error of a store that has no result of a study.

        >>> NothingStoredError.of_study(Path("here"))
        NothingStoredError('no result of this study is in here')
        """
        return cls(f"no result of this study is in {store}")


class StoreError(UserError):
    """A folder cannot be used as a store: it is not a store, or another version of tombola wrote it."""


class ClusterError(UserError):
    """The cluster of machines cannot be reached."""


class DamagedResultError(Exception):
    """The bytes of a stored result differ from those that were written.

    This is not a mistake of the user: the result can be removed and its training can be repeated.

    Args:
        key: the name of the result.
        reason: what is wrong with it.

    >>> str(DamagedResultError("0123456789abcdef", "a file is missing"))
    'result 0123456789ab is damaged (a file is missing)'
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"result {key[:12]} is damaged ({reason})")
        self.key, self.reason = key, reason


def shorten(text: str, most: int = 100) -> str:
    """Return a text of a user for a message, cut off after `most` characters.

    >>> shorten("0123456789", 4)
    '0123 ...'
    """
    return text if len(text) <= most else f"{text[:most]} ..."


def list_first(texts: Sequence[str], most: int = 3) -> str:
    """Return the first texts of several, and how many others there are.

    >>> list_first(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def short(value: object, most: int = 100) -> str:
    """Return `repr(value)` for a message, in one line and cut off after `most` characters.

    >>> short("a" * 100, most=6), short(10**5000)
    ("'aaaaa ...", 'a number of more than 4300 digits')
    """
    try:
        return shorten(" ".join(repr(value).split()), most)
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "a number of more than 4300 digits"


def kind_of(value: object) -> str:
    """Return what a value of a wrong type is called in a message: numbers and texts as they are, others by their type.

    Numbers are those of other libraries too, such as NumPy's.

    >>> kind_of(3), kind_of("l1"), kind_of([1]), kind_of(Path), kind_of(None)
    ('3', "'l1'", 'list', 'the class Path', 'None')
    """
    if value is None or isinstance(value, str | bytes | int):
        return short(value)
    if isinstance(value, Number):
        return shorten(str(value))
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def expect(value: object, kind: Any, what: str, expected: str) -> None:
    """Raise `UserError` unless a value is of a type, or of one of several; True and False are no numbers.

    Args:
        value: what the user gave.
        kind: a type, or several, as `isinstance` takes them.
        what: what the user calls the value.
        expected: what it should be, for the message.

    >>> expect("2", int, "levels", "a whole number")
    Traceback (most recent call last):
    tombola.errors.UserError: levels: expected a whole number, got '2'
    """
    if not isinstance(value, kind) or (kind in (int, Integral, Real) and isinstance(value, bool)):
        raise UserError(f"{what}: expected {expected}, got {kind_of(value)}")


def expect_whole(value: object, what: str, least: int = 0) -> None:
    """Raise `UserError` unless a value is a whole number, `least` or more.

    >>> expect_whole(1.5, "seed")
    Traceback (most recent call last):
    tombola.errors.UserError: seed: expected a whole number from 0 on, got 1.5
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise UserError(f"{what}: expected a whole number from {least} on, got {kind_of(value)}")


def expect_functions(**functions: object) -> None:
    """Raise `UserError` unless all values are functions; their names are what the user calls them.

    >>> expect_functions(loss=len, forward="mine")
    Traceback (most recent call last):
    tombola.errors.UserError: forward: expected a function, got 'mine'
    """
    for what, function in functions.items():
        if not callable(function):
            raise UserError(f"{what}: expected a function, got {kind_of(function)}")


def expect_functions_or_none(**functions: object) -> None:
    """Raise `UserError` unless all values are functions or None; their names are what the user calls them.

    >>> expect_functions_or_none(step=None, schedule="mine")
    Traceback (most recent call last):
    tombola.errors.UserError: schedule: expected a function, got 'mine'
    """
    expect_functions(**{what: function for what, function in functions.items() if function is not None})


def expect_flags(**flags: object) -> None:
    """Raise `UserError` unless all values are True or False, of Python or NumPy; their names are for the user.

    >>> expect_flags(trained=True, progress="no")
    Traceback (most recent call last):
    tombola.errors.UserError: progress: expected True or False, got 'no'
    """
    for what, flag in flags.items():
        if not isinstance(flag, bool) and type(flag).__name__ not in ("bool", "bool_"):  # the names of NumPy's type
            raise UserError(f"{what}: expected True or False, got {kind_of(flag)}")


def as_path(value: object, what: str) -> Path:
    """Return a path that the user gave.

    Args:
        value: a text, or another path, which is no bytes.
        what: what the user calls it.

    Raises:
        UserError: if it is neither, or no path, see `find_fault_of_path`.

    >>> as_path(3, "store")
    Traceback (most recent call last):
    tombola.errors.UserError: store: expected a path, got 3
    >>> as_path("", "store")
    Traceback (most recent call last):
    tombola.errors.UserError: store: expected a path, got an empty text
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        raise UserError(f"{what}: expected a path, got {kind_of(value)}")
    if fault := find_fault_of_path(text):
        raise UserError(f"{what}: {fault}")
    return Path(text)


def find_fault_of_path(text: str) -> str:
    """Return why a text is no path, or an empty text if it is one: `Path("")` would be the current folder.

    >>> find_fault_of_path(""), find_fault_of_path("store")
    ('expected a path, got an empty text', '')
    """
    if not text:
        return "expected a path, got an empty text"
    if "\0" in text:
        return f"{short(text)} is no path, because it has a null character"
    if len(os.fsencode(text)) > _LONGEST_PATH:
        return f"{short(text)} is no path, because it has more than {_LONGEST_PATH} bytes"
    return ""


def as_texts(value: object, what: str, each: str) -> list[str]:
    """Return the texts of a list that the user gave, which is no single text.

    Args:
        value: a list, a set or another collection.
        what: what the user calls it.
        each: what each text is, for the message.

    Raises:
        UserError: if it is no collection of texts.

    >>> as_texts("fc1", "exclude", "names of layers")
    Traceback (most recent call last):
    tombola.errors.UserError: exclude: expected a list of names of layers, got 'fc1'; write ['fc1']
    """
    found = as_list(value, what, each)
    for text in found:
        expect(text, str, what, f"a list of {each}")
    return found


def as_list(value: object, what: str, each: str) -> list[Any]:
    """Return the list of what the user gave, which is no single text; a generator can be read only once.

    Args:
        value: a list, a set, a generator or another collection.
        what: what the user calls it.
        each: what each of its elements is, for the message.

    Raises:
        UserError: if it is no collection.

    >>> as_list((x for x in "ab"), "metrics", "metrics")
    ['a', 'b']
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        advice = f"; write [{short(value)}]" if isinstance(value, str) else ""
        raise UserError(f"{what}: expected a list of {each}, got {kind_of(value)}{advice}")
    return list(value)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a clause that names the choices nearest to `name`, or all of them if none is near.

    >>> did_you_mean("magnitud", ["magnitude", "l1"])
    "did you mean 'magnitude'?"
    >>> did_you_mean("LeNet", ["resnet20", "lenet_300_100"])
    "did you mean 'lenet_300_100'?"
    >>> did_you_mean("xyz", ["magnitude", "l1"])
    "choose from 'magnitude', 'l1'"
    >>> did_you_mean("xyz", [])
    'there is none to choose from'
    """
    import difflib

    name, known = name[:_LONGEST], list(choices)
    folded = {choice.casefold(): choice for choice in known}
    near = [choice for choice in known if name and choice.casefold().startswith(name.casefold())]
    near = near or [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]
    if not known:
        return "there is none to choose from"
    quoted = ", ".join(repr(choice) for choice in (near or known))
    return f"did you mean {quoted}?" if near else f"choose from {quoted}"


def describe_exception(error: BaseException) -> str:
    """Describe an exception in a user's code in one line, with the file and line of that code if they are known.

    >>> describe_exception(ValueError("no such thing"))
    'ValueError: no such thing'
    """
    import traceback

    text = f"{type(error).__name__}: {_message_of(error)}".removesuffix(": ")
    package = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not is_installed(path) and not path.is_relative_to(package):
            return f"{text} (in {path}, line {frame.lineno})"
    return text


def is_of_own_code(error: BaseException) -> bool:
    """Return whether an exception was raised in a user's code, or in a function that a user's code called."""
    import traceback

    package = Path(__file__).parent
    paths = {Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(path.is_file() and not is_installed(path) and not path.is_relative_to(package) for path in paths)


def _message_of(error: BaseException) -> str:
    """Return an exception's message in one line of at most 500 characters."""
    try:
        text = " ".join(str(error).split())
    except BaseException as another:  # a user's class may do anything here
        return f"(its message raised {type(another).__name__})"
    return shorten(text, _LONGEST)


def is_installed(path: Path) -> bool:
    """Say whether a file belongs to an installed package or to Python itself."""
    if {"site-packages", "dist-packages"} & set(path.parts):  # also folders of the user and of another Python
        return True
    return any(folder in path.parents for folder in _installed_folders())


@functools.cache
def _installed_folders() -> frozenset[Path]:
    return frozenset(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib", "platstdlib"))

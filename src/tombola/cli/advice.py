"""Advice: add to an error of the library what the user can type to solve it."""

from __future__ import annotations

import re

from tombola.errors import ClusterError, DamagedResultError, NothingStoredError, StoreError, shorten

_LONGEST = 2000  # characters of a message, which may contain any value of a user
_WORD = re.compile(r"\S{301,}")  # such a value, without spaces

_ADVICE: dict[type[Exception], str] = {
    NothingStoredError: "{}; `tombola run` does the trainings that are missing",
    DamagedResultError: "{}; `tombola run` (or the verb that trained it) removes it and repeats its training",
    StoreError: "{}; name another folder with --store",
    ClusterError: "--address: {}",
}


def add_advice(error: Exception) -> str:
    """Return an error's message as one line, followed by advice on what to type if there is any.

    >>> add_advice(StoreError("store x: the folder is not empty and is not a store"))
    'store x: the folder is not empty and is not a store; name another folder with --store'
    """
    text = _WORD.sub(lambda found: shorten(found[0]), " ".join(str(error).splitlines()))
    text = shorten(text, _LONGEST)
    return _ADVICE.get(type(error), "{}").replace("{}", text, 1)

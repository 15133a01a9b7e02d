"""Terminal: print text in which names and messages of a user may be, and none of whose characters steers a terminal."""

from __future__ import annotations

import re
from typing import TextIO

_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def say(*texts: object, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    r"""Print texts like `print`, with control characters as escapes. Everything that a person reads is printed here.

    >>> say("layer", "fc\x1b[31m")
    layer fc\x1b[31m
    """
    print(*(visible_lines(str(text)) for text in texts), file=file, end=end, flush=flush)


def visible(text: str) -> str:
    r"""Return a text in which characters that cannot be drawn, or steer a terminal, are escapes as in Python.

    These are control characters, separators of lines, marks that change the direction of writing, and what is no
    character. They may be in the names of a user's layers, classes, importances and files, and in a user's exceptions.

    >>> visible("fc\x001"), visible("fc 1 \N{GRINNING FACE}")
    ('fc\\x001', 'fc 1 😀')
    """
    if text.isprintable():
        return text  # soon told, and true of nearly every text
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_lines(text: str) -> str:
    r"""Return a text like `visible`, in which ends of lines stay.

    >>> visible_lines("fc\x001\nfc 2")
    'fc\\x001\nfc 2'
    """
    return "\n".join(map(visible, text.split("\n")))

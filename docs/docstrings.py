"""Docstrings on the site: what begins with `>>>` is an example, which would otherwise be read as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives the examples of each docstring a section of their own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object when it has been read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^>>> .*\Z", _indent, obj.docstring.value, flags=re.MULTILINE | re.DOTALL)


def _indent(examples: re.Match[str]) -> str:
    return "Examples:\n" + textwrap.indent(examples[0], "    ")

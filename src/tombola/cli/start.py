"""The verb `init`, which writes a study file to begin with."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.cli.options import Verbs, parse_path
from tombola.errors import UserError, did_you_mean, shorten
from tombola.terminal import say

if TYPE_CHECKING:
    from pydantic import BaseModel

_WRITTEN = {
    "importances": ["magnitude", "l1"],
    "seeds": [0, 1],
    "levels": 10,
    "recipe.lr": 0.1,
    "recipe.momentum": 0.9,
    "recipe.batch_size": 128,
    "recipe.epochs": 10,
}
"""The fields that a new study sets, besides those of its task; all others are comments with their default values."""


def add_verbs(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    added = verbs.add("init", init)
    added.usage = "tombola init [FILE] [option ...]"
    added.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=parse_path,
        default=Path("study.toml"),
        help="the file to write (default: %(default)s)",
    )
    added.add_argument(
        "--model",
        metavar="NAME",
        default="mine:network",
        help="the function that returns your model, as module:function (default: %(default)s)",
    )
    added.add_argument(
        "--dataset",
        metavar="NAME",
        default="mine:data",
        help="the function that returns your data set, as module:function (default: %(default)s)",
    )


def init(options: argparse.Namespace) -> int:
    """Write a study file for a model of your own, in which every field is explained."""
    from tombola.files import write_atomically
    from tombola.study.schema import Study

    path: Path = options.file
    if path.suffix != ".toml":
        raise UserError(f"{path}: the name of a study file ends in .toml")
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; name another file, or remove it")
    for option, name in (("--model", options.model), ("--dataset", options.dataset)):
        _check_name(option, name)
    written = _WRITTEN | {"task.dataset": options.dataset, "task.model": options.model}
    write_atomically(path, "\n".join(_list_lines(Study, written)).encode())
    modules = dict.fromkeys(name.partition(":")[0] for name in (options.model, options.dataset) if ":" in name)
    if missing := [f"{name}.py" for name in modules if not (path.parent / f"{name}.py").exists()]:
        say(f"put your functions into {' and '.join(missing)} beside {path}, then:")
    else:
        say("next:")
    say(f"  tombola plan {path}    try the task out, and see how long it takes")
    say(f"  tombola run {path}")
    return 0


def _check_name(option: str, name: str) -> None:
    """Raise `UserError` unless this is module:function or the name of a built-in model or data set.

    The module need not exist yet.
    """
    if not name.isprintable():
        raise UserError(f"{option} {shorten(name)!a}: expected a name without control characters")
    module, colon, function = name.partition(":")
    if colon:
        sound = all(part.isidentifier() for each in (module, function) for part in each.split("."))
        if not sound or module.endswith(".py"):
            raise UserError(f"{option} {shorten(name)!r}: expected module:function, such as mine:network for mine.py")
    else:
        from tombola.datasets import DATASETS
        from tombola.models import MODELS

        known = [*(MODELS if option == "--model" else DATASETS)]
        if name not in known:
            choices = did_you_mean(name, known)
            raise UserError(
                f"{option} {shorten(name)!r}: no such name; {choices} (or give module:function of your own)"
            )


def _list_lines(model: type[BaseModel], written: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the lines of a study file: the fields of one table, then the tables in it."""
    from pydantic import BaseModel

    if not prefix:
        yield "# A study: which network is trained on which data, and which of its connections are pruned."
        yield "# Lines that begin with # show a default value. Remove the # to set another.\n"
    tables = []
    fields = model.model_fields.items()
    for name, info in sorted(fields, key=lambda each: f"{prefix}{each[0]}" not in written):
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            tables.append((name, info.annotation))
            continue
        full = f"{prefix}{name}"
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        value = _to_toml(written.get(full, default))
        yield f"{'' if full in written else '# '}{name} = {value}  # {info.description}"
    for name, table in tables:
        inner = f"{prefix}{name}."
        yield f"\n{'' if any(field.startswith(inner) for field in written) else '# '}[{prefix}{name}]"
        yield from _list_lines(table, written, inner)
    if not prefix:
        yield ""


def _to_toml(value: Any) -> str:
    """Return a value as TOML; a field without a default value has none to show."""
    if value is None:
        return "..."
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_to_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)

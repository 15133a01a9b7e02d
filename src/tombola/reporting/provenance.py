"""Provenance: how the results of a study were computed, and the commands that compute them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from tombola.reporting.contents import COSTLY, FURTHER, Contents
from tombola.reporting.sections import command
from tombola.study.schema import Study, fields


def commands(contents: Contents) -> list[tuple[str, str]]:
    """Return (purpose, command) for the commands that compute the results, check them and write this report again."""
    level = [] if contents.level is None else [f"--level {contents.level}"]
    costly = [name for name in (*COSTLY, *FURTHER) if name in contents.tables]
    options = " ".join(["report", *level, *(["--with", *costly] if costly else [])])
    found = [
        ("runs the trainings that are not stored yet", command(contents, "run")),
        ("repeats stored trainings and compares every bit", command(contents, "verify")),
    ]
    if (drawn := contents.tables.get("reinit")) is not None:
        for level, names, draws in drawn.select("level", "compared", "draws").unique(maintain_order=True).rows():
            whose = "" if len(names) == len(contents.study.importances) else f" --importances {' '.join(names)}"
            verb = f"reinit --level {level} --draws {draws}{whose}"
            found.append(("partial reinitialisation", command(contents, verb)))
    return [*found, ("writes this report", command(contents, options))]


def study_fields(study: Study) -> list[tuple[str, str, str]]:
    """Return (name, value, description) of every field of a study.

    >>> from tombola.study.schema import load_study
    >>> study_fields(load_study("digits"))[0][:2]
    ('task.dataset', '"digits"')
    """
    found = []
    for name, _, description in fields():
        value: Any = study
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            found.append((name, _toml(value), description))
    return found


def as_toml(study: Study) -> str:
    """Return a study as a TOML file that `tombola` reads as the same study.

    >>> from tombola.study.schema import load_study
    >>> print(as_toml(load_study("digits"))[:44])
    importances = ["magnitude", "l1", "l2", "sof
    """
    values = {name: getattr(study, name) for name in type(study).model_fields}
    plain = [f"{name} = {_toml(value)}" for name, value in values.items() if not isinstance(value, BaseModel)]
    tables = []
    for name, value in values.items():
        if isinstance(value, BaseModel):
            lines = [f"{key} = {_toml(each)}" for key, each in value if each is not None]
            tables.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(["\n".join(plain), *tables]) + "\n"


def _toml(value: Any) -> str:
    """Return a value in TOML; strings, numbers and lists are written as in JSON."""
    if isinstance(value, BaseModel):
        value = {name: each for name, each in value if each is not None}
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(each)}" for key, each in value.items()) + " }" if value else "{}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def machines(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each kind of machine: its properties, the number of trainings, their time and dates.

    >>> machines([{"machine": {"python": "3.12"}, "threads": 1, "seconds": 2.0, "finished": "2026-01-02"}])
    [{'python': '3.12', 'threads': '1', 'trainings': '1', 'hours of training': '0.00', 'finished': '2026-01-02'}]
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        about = {
            **record.get("machine", {}),
            **{name: record[name] for name in ("threads", "device") if name in record},
        }
        groups.setdefault(json.dumps(dict(_flat(about))), []).append(record)
    found = []
    for text, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        times = sorted(record["finished"] for record in members if "finished" in record)
        hours = sum(record.get("seconds", 0.0) for record in members) / 3600
        when = " to ".join(dict.fromkeys(time[:16].replace("T", " ") for time in (times[:1] + times[-1:])))
        counts = {"trainings": str(len(members)), "hours of training": f"{hours:.2f}", "finished": when}
        found.append({**json.loads(text), **counts})
    return found


def _flat(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in about.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif value not in (None, ""):
            yield name.replace("_", " "), str(value)

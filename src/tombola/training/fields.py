"""Models of pydantic whose mistakes are told in one sentence, with the field and what was expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tombola.errors import UserError, did_you_mean, short, shorten

if TYPE_CHECKING:  # the arguments of a model have the types of its fields, which pydantic's metaclass says

    class Fields(BaseModel):
        """The base class of what a user writes down: a study, its task and its recipe."""

else:

    class _Told(type(BaseModel)):
        """The type of models that raise `UserError` for invalid arguments, and not for data that pydantic validates."""

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise UserError(f"{cls.__name__}: {explain(error, values, cls)}") from None

    class Fields(BaseModel, metaclass=_Told):
        """The base class of what a user writes down: a study, its task and its recipe."""


def explain(error: ValidationError, document: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Describe each mistake once, with its field; mistakes in the values of a field come before those of the field.

    Args:
        error: what pydantic says.
        document: the values that were given.
        model: the model that they are of.
    """
    missing, others = list[str](), list[str]()
    seen, keys, choices = set[str](), _keys(document), set[str]()
    problems = sorted(error.errors(include_url=False), key=lambda problem: -len(problem["loc"]))
    kinds: dict[str, list[str]] = {}  # a value may be of one of several
    for problem in problems:
        kinds.setdefault(_where(problem, keys), []).append(_KINDS.get(problem["type"], ""))
    for problem in problems:
        if len(others) == _MOST:
            return "; ".join([*others, "and more"])
        names, where = _names(problem), _where(problem, keys)
        if any(place.startswith(f"{where}.") for place in seen) and where:
            continue
        if problem["type"] == "missing":
            missing.append(".".join(names))
            continue
        if problem["type"] == "extra_forbidden":
            advice = did_you_mean(str(problem["loc"][-1]), _siblings(model, problem["loc"][:-1]))
            sentence = f"unknown field {short('.'.join(names))}" + (f"; {advice}" if advice not in choices else "")
            choices.add(advice)
        else:
            sentence = f"{where}: {_describe(problem, kinds[where])}".removeprefix(": ")
        if where not in seen:
            others.append(sentence)
        seen.add(where)
    if missing:
        fields = f"field {missing[0]!r} is" if len(missing) == 1 else f"fields {', '.join(map(repr, missing))} are"
        others.append(f"the {fields} missing")
    return "; ".join(others)


def _names(problem: ErrorDetails) -> list[str]:
    return [part for part in problem["loc"] if isinstance(part, str) and "[" not in part]


def _where(problem: ErrorDetails, keys: set[str]) -> str:
    """Return the place of a mistake in the document, without the parts by which pydantic names kinds of values."""
    location = [part for part in problem["loc"] if isinstance(part, int) or part in keys]
    return ".".join(shorten(str(part)) for part in location) or ".".join(_names(problem))


_MOST = 4
"""Mistakes that a message lists."""

_KINDS = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a table",
    "string_type": "a text",
    "tuple_type": "a list",
}


_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("from", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("up to", "le"),
}


def _describe(problem: ErrorDetails, kinds: list[str]) -> str:
    """Describe what a field should have been, perhaps one of several kinds of values, and what it is."""
    value, about = problem["input"], problem.get("ctx", {})
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        choices = re.findall("'([^']+)'", about["expected"])
        return f"unknown {as_toml(value)}; {did_you_mean(str(value), choices)}"
    if problem["type"] == "too_short":
        least = about["min_length"]
        return "at least one is needed" if least == 1 else f"expected {least} values, got {about['actual_length']}"
    if problem["type"] == "too_long":
        return f"expected at most {about['max_length']} values, got {about['actual_length'] or 'more'}"
    kind = _KINDS.get(problem["type"])
    if kind and all(kinds):
        *first, kind = dict.fromkeys(kinds)
        kind = f"{', '.join(first)} or {kind}" if first else kind
    if problem["type"] in _LIMITS:
        text, limit = _LIMITS[problem["type"]]
        kind = f"a number {text} {about[limit]:g}"
    expected = f"expected {kind}" if kind else problem["msg"].replace("Input should", "it should")
    return expected if isinstance(value, (dict, BaseModel)) else f"{expected}, got {as_toml(value)}"


def _keys(value: Any) -> set[str]:
    found, left = set[str](), [value]
    while left:
        if isinstance(each := left.pop(), Mapping):
            found |= each.keys()
            left.extend(each.values())
    return found


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def as_toml(value: Any) -> str:
    """Return a value as a study's file has it, shortened.

    >>> as_toml(True), as_toml((1, 2))
    ('true', '[1, 2]')
    """
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return shorten(str(list(value)) if isinstance(value, tuple) else repr(value))
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or a list of lists of lists
        return f"a value of type {type(value).__name__} that is too long to print"

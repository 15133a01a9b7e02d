"""Options: the parser, the types of options, and the loading of the study that the options name."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from tombola.analysis.defaults import MARGIN, POINTS, TOLERANCE
from tombola.errors import UserError, did_you_mean, find_fault_of_path, shorten
from tombola.store.layout import STORE
from tombola.terminal import say

if TYPE_CHECKING:
    from tombola.study.planner import Planner
    from tombola.study.schema import Study

MOST = 2**63 - 1
"""The largest whole number of an option that has no limit of its own."""

_DIGITS = 1000  # more digits than any option needs

Verb = Callable[[argparse.Namespace], int]
"""A function that runs a verb with its options and returns the exit status."""

_OF_STUDY = "fields of the study"
"""The title of the options that override fields; the help lists them only if it is asked to."""


@functools.cache
def _fields() -> dict[str, tuple[Any, str]]:
    """Return the type and the description of each field of a study, which takes time that `tombola --help` has not."""
    from tombola.study.schema import fields

    return {name: (annotation, text) for name, annotation, text in fields()}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence that names the nearest verbs and options."""

    def format_help(self) -> str:
        """Return the help without the fields of a study, and a line that says how to see them."""
        short = [group for group in self._action_groups if group.title != _OF_STUDY]
        hidden = len(short) < len(self._action_groups)
        whole, self._action_groups = self._action_groups, short
        text = super().format_help()
        self._action_groups = whole
        return text + (f"\n{_OF_STUDY}: see {self.prog} --help-fields\n" if hidden else "")

    def print_whole_help(self) -> None:
        """Print the help with the fields of a study."""
        print(super().format_help(), end="")  # noqa: T201

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, and refuse unknown ones here, where the options of this verb are known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"unexpected argument {name!r}")
            known = [option for action in self._actions for option in action.option_strings]
            near = did_you_mean(name, known)
            self.error(f"unknown option {name!r}" + (f"; {near}" if near.startswith("did") else ""))
        return options, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse `--option=--`, which argparse takes for an option without a value."""
        if arg_strings == ["--"] and action.option_strings:
            raise argparse.ArgumentError(action, "expected a value, got '--'")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            plain = "verb" if isinstance(action, argparse._SubParsersAction) else str(action.metavar).lower()
            what = next(iter(action.option_strings), plain)
            near = did_you_mean(str(value), [str(choice) for choice in action.choices])
            self.error(f"unknown {what} {shorten(str(value))!r}; {near}")

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, as for every mistake of a user."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} {'are' if ',' in missing else 'is'} missing"
            if "STUDY" in missing:
                message += ", it comes first, before the options"
        raise UserError(f"{shorten(message.removeprefix('argument '), 400)} (see {self.prog} --help)")


def study_options() -> Parser:
    """Return the options of a verb that is about a study."""
    from tombola.study.schema import is_list

    parser = Parser(add_help=False)
    study = parser.add_argument(
        "study", metavar="STUDY", help="the name of a preset (see `tombola presets`), or the path of a TOML file"
    )
    study.completer = _complete_study  # type: ignore[attr-defined]  # where argcomplete looks for it
    add_store(parser)
    parser.add_argument(
        "--data",
        type=parse_path,
        metavar="DIR",
        help="the folder with the data sets (default: data/, then the user's cache folder)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1, 10_000),
        metavar="N",
        help="how many trainings run at the same time (default: one for each processor core, or one on a GPU)",
    )
    parser.add_argument(
        "--help-fields", action=_WholeHelp, help="show this help message with the fields of a study, and exit"
    )
    overrides = parser.add_argument_group(_OF_STUDY, "Each of these options replaces a value of the study.")
    for name, (annotation, text) in _fields().items():
        kind: dict[str, Any] = {"type": parse_value}
        if get_origin(annotation) is dict:
            kind = {"nargs": "+", "action": Arguments}
        elif is_list(annotation):
            kind = {"nargs": "*", "type": parse_value}
        flag = f"--{name.replace('_', '-')}"
        overrides.add_argument(flag, dest=name, metavar=metavar(annotation), help=text, **kind)
    return parser


def _complete_study(prefix: str, **_: Any) -> list[str]:
    """Return what can be typed for a study: the presets, the folders and the TOML files here."""
    from argcomplete.completers import FilesCompleter

    from tombola.study.schema import presets

    return [*presets(), *FilesCompleter(["toml"])(prefix)]


def table_options() -> Parser:
    """Return the options of a verb that prints a table."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--format",
        choices=("table", "csv", "json"),
        default="table",
        help="the format of the output (default: %(default)s)",
    )
    return parser


def store_options() -> Parser:
    """Return the options of a verb that is about a store."""
    parser = Parser(add_help=False)
    add_store(parser)
    return parser


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the option `--store`."""
    parser.add_argument(
        "--store",
        type=parse_path,
        default=STORE,
        metavar="DIR",
        help="the folder of the store, which keeps all results (default: %(default)s)",
    )


def add_margin(parser: argparse.ArgumentParser, name: str = "--margin", *, only: str = "") -> None:
    """Add the option `--margin`, under this or another name, and say first of which other option it is a part."""
    parser.add_argument(
        name,
        type=percentage_points,
        default=100 * MARGIN,
        metavar="X",
        help=f"{only}a ticket keeps the accuracy if it loses at most X percentage points (default: {100 * MARGIN}); "
        "for a metric that is not a share, X is a percentage of the dense network's value",
    )


def add_tolerance(parser: argparse.ArgumentParser, *, only: str = "") -> None:
    """Add the option `--tolerance`, and say first of which other option it is a part."""
    parser.add_argument(
        "--tolerance",
        type=percentage_points,
        default=100 * TOLERANCE,
        metavar="X",
        help=f"{only}networks are connected if the barrier between them is at most X percentage points "
        f"(default: {100 * TOLERANCE})",
    )


def add_points(parser: argparse.ArgumentParser, *, only: str = "") -> None:
    """Add the option `--points`, and say first of which other option it is a part."""
    parser.add_argument(
        "--points",
        type=whole_number(2, 1001),
        default=POINTS,
        metavar="N",
        help=f"{only}the number of points on each line (default: {POINTS})",
    )


class Verbs(NamedTuple):
    """The verbs of the command line, to which each module adds its own.

    Args:
        parsers: the subparsers of argparse.
        study: the options of a verb that is about a study.
        table: the options of a verb that prints a table.
        store: the options of a verb that is about a store.
        texts: the first paragraph about each verb, by its name.
    """

    parsers: Any
    study: Parser
    table: Parser
    store: Parser
    texts: dict[str, str]

    def add(self, name: str, verb: Verb, *parents: Parser) -> Parser:
        """Add a verb with the options of `parents`; its help is its docstring. Return its parser."""
        text = (verb.__doc__ or "").strip()
        study = " STUDY" if self.study in parents else ""
        first = text.partition("\n\n")[0]
        parser: Parser = self.parsers.add_parser(
            name.rpartition(" ")[2],
            prog=f"tombola {name}",
            parents=parents,
            usage=f"tombola {name}{study} [option ...]",
            description=text,
            allow_abbrev=False,
            **({"help": first} if " " in name else {}),  # the help of `tombola` lists its verbs in groups
        )
        parser.set_defaults(verb=verb)
        self.texts[name] = first
        return parser

    def add_group(self, name: str, verb: Verb, choices: str) -> Verbs:
        """Add a verb that has verbs of its own, and return these. `verb` runs if none of them is named."""
        parser = self.add(name, verb)
        parser.usage = f"tombola {name} {choices} [option ...]"
        parsers = parser.add_subparsers(required=True, metavar=choices, parser_class=Parser)
        return Verbs(parsers, self.study, self.table, self.store, {})


def open_study(options: argparse.Namespace) -> Study:
    """Return the study that the options name."""
    from tombola.study.schema import OldFieldWarning, load_study

    with warnings_as_notes(OldFieldWarning):
        return load_study(options.study, overrides(options))


@contextmanager
def warnings_as_notes(always: type[Warning]) -> Iterator[None]:
    """Print warnings as notes, those of one kind always, also if the block raises."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", always)
        try:
            yield
        finally:
            for note in notes:
                print_note(str(note.message))


def print_note(text: str) -> None:
    """Print a note to standard error."""
    say(f"note: {text}", file=sys.stderr)


def open_planner(options: argparse.Namespace, study: Study | None = None) -> Planner:
    """Return the planner of the study that the options name; do not create a missing store.

    Args:
        options: of the verb.
        study: what `open_study` returned for them, if it has been called.
    """
    study = study or open_study(options)
    import torch

    from tombola.datasets.cache import CacheWarning
    from tombola.study.behaviour import StaleResultsWarning
    from tombola.study.trainings import THREADS
    from tombola.workbench.studies import open_planner

    torch.set_num_threads(THREADS)
    with warnings_as_notes(CacheWarning):
        planner = open_planner(study, store=options.store, data=options.data, beside=Path(options.study))
    with warnings_as_notes(StaleResultsWarning), contextlib.suppress(UserError):
        _ = planner.identity  # a network that fails is reported by those who use it
    warnings.simplefilter("ignore", StaleResultsWarning)  # the note is printed once
    return planner


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the study that the options override."""
    return {name: value for name, value in vars(options).items() if name in _fields() and value is not None}


class _WholeHelp(argparse.Action):
    """The argparse action that prints the help with the fields of a study, and exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the help."""
        parser.print_whole_help()
        parser.exit()


class Arguments(argparse.Action):
    """The argparse action that collects NAME=VALUE arguments in a dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set the dict of names and values."""
        collected = {}
        for item in values:
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise argparse.ArgumentError(self, f"expected NAME=VALUE, got {shorten(item)!r}")
            try:
                collected[name] = parse_value(value)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, collected)


def with_dashes(argument: str) -> str:
    """Return an option spelt with dashes, so that TOML's spelling of a field (`--recipe.batch_size`) works too.

    >>> with_dashes("--recipe.batch_size=64"), with_dashes("--task.model=my_models:mlp"), with_dashes("min_max")
    ('--recipe.batch-size=64', '--task.model=my_models:mlp', 'min_max')
    """
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value


def parse_value(text: str) -> Any:
    """Parse a value as TOML; if it is not valid TOML, parse it as a Python number, or else take it as a string.

    >>> parse_value("[1, 2]"), parse_value("1e-3"), parse_value(".5"), parse_value("l1")
    ([1, 2], 0.001, 0.5, 'l1')
    """
    import tomllib

    try:
        document = tomllib.loads(f"value = {text}")
    except RecursionError:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is nested too deeply") from None
    except ValueError:  # it is not TOML, or it is a whole number of thousands of digits
        for number in (int, float):
            with contextlib.suppress(ValueError):
                found = number(text)
                return text if math.isinf(found) and "inf" not in text.casefold() else found
        return text
    value = document["value"]
    if len(document) > 1:  # the text has several lines, and the others are not a value
        return text
    return value if isinstance(value, (bool, int, float, str, list, dict)) else text


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return a parser of options that are whole numbers in least..most.

    >>> whole_number(1)("12")
    12
    """
    up_to = "on" if most == MOST else f"to {most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > _DIGITS or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} {up_to}, got {shorten(text)!r}")
        return int(text)

    return parse


def parse_path(text: str) -> Path:
    """Parse a path, which is not empty: an unset variable of the shell gives an empty text.

    >>> parse_path("store").name
    'store'
    """
    if fault := find_fault_of_path(text):
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


def percentage_points(text: str) -> float:
    """Parse a difference of accuracies in percentage points, in 0..100.

    >>> percentage_points("0.5")
    0.5
    """
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    if not 0 <= points <= 100:
        raise argparse.ArgumentTypeError(f"expected percentage points of accuracy, 0 to 100, got {shorten(text)!r}")
    return points


def metavar(annotation: Any) -> str:
    """Return the placeholder of a field's value in the help.

    >>> metavar(int | None), metavar(tuple[str, ...]), metavar(Literal["cpu", "cuda"])
    ('N', 'NAME', '{cpu,cuda}')
    """
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}"
    if get_origin(annotation) is dict:
        return "NAME=VALUE"
    if arguments := get_args(annotation):
        return metavar(arguments[0])
    return {int: "N", float: "X", bool: "true|false"}.get(annotation, "NAME")

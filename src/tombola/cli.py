"""The command line: verbs that parse, call and print; what they do is elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tombola import __version__
from tombola.errors import UserError, did_you_mean
from tombola.study import fields, is_list, load_study, presets

if TYPE_CHECKING:
    from tombola.planning import Planner
    from tombola.study import Study

STORE = Path("tombola-store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(arguments)
        verb: Callable[[argparse.Namespace], int] = options.verb
        return verb(options)
    except UserError as error:
        print(f"tombola: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntombola: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(options: argparse.Namespace) -> int:
    """Do the trainings of a study that are not done yet."""
    from tombola.display import show_results, showing
    from tombola.engine.local import LocalWorkers
    from tombola.engine.run import run as run_study

    planner, study = _planner(options, to_write=True)
    count = options.workers or os.cpu_count() or 1
    planner.store.check_writable()
    with LocalWorkers(count, study.task, options.data, planner.store.root) as workers, showing(planner) as show:
        try:
            status = run_study(planner, workers, show)
        except KeyboardInterrupt:
            again = " ".join(["tombola", *sys.argv[1:]])
            print(
                f"\ntombola: stopped; what is done is kept in {planner.store.root}, go on with: {again}",
                file=sys.stderr,
            )
            return 130
    if status.done == 0 and not status.notes:
        print(f"every training of this study is in {planner.store.root} already; nothing was trained")
    show_results(planner, "table")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Say what a run would train, what exists already, and the time and disk it will take."""
    from tombola.display import show_plan

    planner, _ = _planner(options, to_write=False)
    show_plan(planner, options.workers or os.cpu_count() or 1, options.format)
    return 0


def results(options: argparse.Namespace) -> int:
    """Print the accuracy of every ticket: the paper's Table 2."""
    from tombola.display import show_results

    planner, _ = _planner(options, to_write=False)
    show_results(planner, options.format)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write one ticket as safetensors."""
    from tombola.planning import Chain

    planner, study = _planner(options, to_write=False)
    for what, value, known in (
        ("importance", options.importance, study.importances),
        ("seed", options.seed, study.seeds),
    ):
        if value not in known:
            raise UserError(f"--{what}: the study has no {what} {value!r}, it has {', '.join(map(str, known))}")
    tickets = planner.progress(Chain(options.seed, options.importance)).tickets
    if not 0 <= options.level < len(tickets):
        there = f"levels 0 to {len(tickets) - 1} are" if tickets else "none is"
        raise UserError(
            f"--level: level {options.level} of {options.importance}, seed {options.seed} is not there, {there}"
        )
    tickets[options.level].save(options.output, trained=options.trained)
    print(f"{options.output}: level {options.level}, {tickets[options.level].mask!r}")
    return 0


def importances(options: argparse.Namespace) -> int:
    """List the importances."""
    from tombola.display import show_table
    from tombola.importance import IMPORTANCES

    show_table(["importance", "of one layer's surviving weights w, absolute"], _described(IMPORTANCES), options.format)
    return 0


def list_presets(options: argparse.Namespace) -> int:
    """List the studies that come with tombola."""
    from tombola.display import show_table

    rows = [[name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")] for name, path in presets().items()]
    show_table(["preset", "what it is"], rows, options.format)
    return 0


def _described(functions: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, function in functions.items():
        text = function.function.__doc__ if hasattr(function, "function") else function.__doc__
        rows.append([name, text.strip().splitlines()[0].removeprefix("Return ").rstrip(".")])
    return rows


def _planner(options: argparse.Namespace, *, to_write: bool) -> tuple[Planner, Study]:
    """Return the planner of the study that the options name."""
    study = load_study(options.study, _overrides(options))
    sys.path[:0] = [str(Path(options.study).resolve().parent), str(Path.cwd())]  # where a user's own modules are
    if not to_write and not (options.store / "store.json").exists() and options.store.exists():
        pass
    import torch

    from tombola.planning import THREADS, Planner
    from tombola.problem import load_problem, try_out
    from tombola.store import Store

    torch.set_num_threads(THREADS)
    store = Store(options.store, create=to_write)
    problem = load_problem(study.task, options.data)
    if to_write:
        try_out(problem, study)
    return Planner(study, problem, store), study


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name in _FIELDS and value is not None}


_FIELDS = {name: (annotation, text) for name, annotation, text in fields()}


class _Parser(argparse.ArgumentParser):
    """Names the nearest options and verbs where one is unknown, and says one sentence."""

    def error(self, message: str) -> NoReturn:
        _, marker, unknown = message.partition("unrecognized arguments: ")
        if marker:
            name = unknown.split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option {name!r}; {did_you_mean(name, known)}"
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tombola",
        description="Find the lottery tickets of a neural network under any importance, and tell how alike they are.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tombola {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=_Parser)

    study = _Parser(add_help=False)
    study.add_argument("study", metavar="STUDY", help="a preset's name (see `tombola presets`) or a TOML file")
    study.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="where results lie (%(default)s)")
    study.add_argument("--data", type=Path, metavar="DIR", help="where data sets lie (data/, then the user's cache)")
    overrides = study.add_argument_group("fields of the study", "each overrides what the study says")
    for name, (annotation, text) in _FIELDS.items():
        flag = f"--{name.replace('_', '-')}"
        if str(annotation).startswith("dict"):
            overrides.add_argument(flag, dest=name, nargs="+", action=_Arguments, metavar="NAME=VALUE", help=text)
        elif is_list(annotation):
            overrides.add_argument(flag, dest=name, nargs="*", type=_value, metavar="VALUE", help=text)
        else:
            overrides.add_argument(flag, dest=name, type=_value, metavar="VALUE", help=text)
    workers = _Parser(add_help=False)
    workers.add_argument("--workers", type=_count, metavar="N", help="trainings side by side (one a processor core)")
    listing = _Parser(add_help=False)
    listing.add_argument("--format", choices=("table", "csv", "json"), default="table", help="(%(default)s)")

    def verb(name: str, function: Callable[[argparse.Namespace], int], *parents: _Parser) -> _Parser:
        text = (function.__doc__ or "").strip()
        added = verbs.add_parser(name, parents=parents, help=text, description=text, allow_abbrev=False)
        added.set_defaults(verb=function)
        return added

    verb("run", run, study, workers)
    verb("plan", plan, study, workers, listing)
    verb("results", results, study, listing)
    exporting = verb("export", export, study)
    exporting.add_argument("--importance", required=True, help="of which importance")
    exporting.add_argument("--seed", type=int, required=True, help="of which seed")
    exporting.add_argument("--level", type=int, required=True, help="of which level")
    exporting.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
    exporting.add_argument("--trained", action="store_true", help="add the trained weights")
    verb("importances", importances, listing)
    verb("presets", list_presets, listing)
    return parser


class _Arguments(argparse.Action):
    """Collects NAME=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        collected = {}
        for item in values:
            name, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"{option_string}: expected NAME=VALUE, got {item!r}")
            collected[name] = _value(value)
        setattr(namespace, self.dest, collected)


def _value(text: str) -> Any:
    """Read a value as TOML would; what TOML would not take is a string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (bool, int, float, str, list, dict)) else text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--workers: expected a whole number from 1 on, got {text!r}")
    return int(text)

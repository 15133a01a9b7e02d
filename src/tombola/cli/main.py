"""The command line: verbs that parse, call and print; what they do is elsewhere."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from tombola import __version__
from tombola.cli import engine as cli_engine
from tombola.cli import report as cli_report
from tombola.cli import store as cli_store
from tombola.cli.advice import add_advice
from tombola.cli.analysis import add_analysis_verbs
from tombola.errors import DamagedResultError, UserError, did_you_mean
from tombola.study.schema import fields, is_list, load_study, presets

if TYPE_CHECKING:
    from tombola.study.planner import Planner, Progress
    from tombola.study.schema import Study

STORE = Path("tombola-store")

EXAMPLES = """\
for example:
  tombola run digits                        the whole experiment, in a minute
  tombola results digits --format csv       its results, for other programs
  tombola run digits --importances magnitude my_module:my_importance
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: in place of the program's own.

    Returns:
        The exit status: 0, 2 for a user's mistake, 130 for Ctrl-C, 141 where the reader of the output has gone.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            options = _parser().parse_args([_dashed(argument) for argument in given])
            verb: Callable[[argparse.Namespace], int] = options.verb
            return verb(options)
        finally:
            sys.stdout.flush()
    except (UserError, DamagedResultError) as error:
        print(f"tombola: {add_advice(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as by `head`; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        again = "; what is done is kept, go on with: " + shlex.join(["tombola", *given]) if given[:1] == ["run"] else ""
        print(f"\ntombola: stopped{again}", file=sys.stderr, flush=True)
        if arguments is None:
            os._exit(130)  # at once: to take torch apart can take seconds
        return 130


def run(options: argparse.Namespace) -> int:
    """Do the trainings of a study that are not done yet, and print the results."""
    from tombola import kernels
    from tombola.cli.display import show_results, showing
    from tombola.engine.run import run as run_study
    from tombola.store.store import Store
    from tombola.study.task import try_out
    from tombola.study.tickets import Tickets

    planner, study = _planner(options)
    here = study if options.engine == "local" else study.model_copy(update={"device": "cpu"})  # GPUs may be elsewhere
    try_out(planner.problem, here)
    planner.store = Store(options.store)
    planner.store.check_writable()
    if here.device == "cpu" and not kernels.available():
        print(f"note: {kernels.MISSING}", file=sys.stderr)
    with (
        cli_engine.workers_of(options, planner, _workers(options)) as workers,
        showing(planner) as show,
    ):
        status = run_study(planner, workers, show)
    stopped = {f"{chain}: {progress.stopped}" for chain, progress in status.chains.items() if progress.stopped}
    if status.done == 0 and not stopped:
        print(f"every training of this study is in {planner.store.root} already; nothing was trained")
    show_results(Tickets(planner), "table")
    if stopped:
        raise UserError("; ".join(sorted(stopped)) + "; all other results are kept")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Say what a run would train, what exists already, and the time and disk it will take."""
    from tombola.cli.display import show_plan
    from tombola.study.task import try_out

    planner, study = _planner(options)
    try_out(planner.problem, study)
    show_plan(planner, _workers(options), options.format, options.data)
    return 0


def results(options: argparse.Namespace) -> int:
    """Print the accuracy of every ticket: the paper's Table 2."""
    from tombola.cli.display import show_results
    from tombola.study.tickets import Tickets

    planner, _ = _planner(options)
    show_results(Tickets(planner), options.format)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write one ticket as safetensors: its mask, its rewound weights and where it came from."""
    from tombola.study.planner import Chain

    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}; make it first")
    planner, study = _planner(options)
    known: Sequence[str | int]
    for what, value, known in (
        ("importance", options.importance, study.importances),
        ("seed", options.seed, study.seeds),
    ):
        if value not in known:
            raise UserError(f"--{what}: the study has no {what} {value!r}, it has {', '.join(map(str, known))}")
    if options.level > study.levels:
        raise UserError(f"--level: the study has no level {options.level}, it has levels 0 to {study.levels}")
    chain = Chain(options.seed, options.importance)
    progress = planner.progress(chain)
    if options.level >= len(progress.tickets):
        there = f"levels 0 to {len(progress.tickets) - 1} are" if progress.tickets else "none of its levels is"
        cure = "`tombola run` finds the rest" if progress.waits_for else f"it ends there ({_why(progress)})"
        raise UserError(f"--level: level {options.level} of {chain} is not in {planner.store.root}, {there}; {cure}")
    ticket = progress.tickets[options.level]
    ticket.save(options.output, trained=options.trained)
    print(f"{options.output}: {chain}, level {ticket.level}, {ticket.mask.alive} of {ticket.mask.total} connections")
    return 0


def importances(options: argparse.Namespace) -> int:
    """List the importances."""
    from tombola.cli.display import show_table
    from tombola.importance import IMPORTANCES

    if options.format == "table":
        print("what is compared over all layers; w are the absolute values of one layer's surviving weights")
    show_table(["importance", "description"], _described(IMPORTANCES), options.format)
    return 0


def list_presets(options: argparse.Namespace) -> int:
    """List the studies that come with tombola."""
    from tombola.cli.display import show_table

    lines = []
    for name, path in presets().items():
        study = load_study(name)
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append([name, study.levels, len(study.seeds), len(study.importances), first])
    show_table(["preset", "levels", "seeds", "importances", "description"], lines, options.format)
    return 0


def _described(functions: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, function in functions.items():
        text = function.function.__doc__ if hasattr(function, "function") else function.__doc__
        rows.append([name, text.strip().splitlines()[0].removeprefix("Return ").rstrip(".")])
    return rows


def _planner(options: argparse.Namespace) -> tuple[Planner, Study]:
    """Return the planner of the study that the options name, and the study; a store that is not there is not made."""
    study = load_study(options.study, _overrides(options))
    _find_modules([Path(options.study).resolve().parent, Path.cwd()])
    import torch

    from tombola.store.store import Store
    from tombola.study.planner import Planner
    from tombola.study.task import load_problem
    from tombola.study.trainings import THREADS

    torch.set_num_threads(THREADS)
    store = Store(options.store, create=False)  # whether it can be read, before anything is loaded
    return Planner(study, load_problem(study.task, options.data), store), study


def _find_modules(folders: list[Path]) -> None:
    """Let a user's own modules be found in these folders: after the standard library, before installed packages."""
    installed = ("site-packages", "dist-packages")
    place = next((i for i, entry in enumerate(sys.path) if entry.endswith(installed)), len(sys.path))
    sys.path[place:place] = [str(folder) for folder in dict.fromkeys(folders) if str(folder) not in sys.path]


def _workers(options: argparse.Namespace) -> int:
    """Return how many trainings go side by side: as asked for, or one a core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return options.workers or cores or 1


def _why(progress: Progress) -> str:
    return progress.stopped or "its training diverged"


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name in _FIELDS and value is not None}


_FIELDS = {name: (annotation, text) for name, annotation, text in fields()}


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong, and names the nearest verbs and options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is not known: here, where this verb's own options are."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"{name!r} is one too many")
            known = [option for action in self._actions for option in action.option_strings]
            near = did_you_mean(name, known)
            self.error(f"unknown option {name!r}" + (f"; {near}" if near.startswith("did") else ""))
        return options, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.option_strings[0] if action.option_strings else str(action.metavar).lower()
            self.error(f"unknown {what} {value!r}; {did_you_mean(value, [str(choice) for choice in action.choices])}")

    def error(self, message: str) -> NoReturn:
        """Raise the one exception that stands for a user's mistake."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} {'are' if ',' in missing else 'is'} missing"
            if "STUDY" in missing:
                message += ", it comes first, before the options"
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tombola",
        usage="tombola VERB ...",
        description="Find the lottery tickets of a neural network under any importance,\nand tell how alike they are.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tombola {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=_Parser)

    study = _Parser(add_help=False)
    study.add_argument("study", metavar="STUDY", help="a preset's name (see `tombola presets`) or a TOML file")
    study.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="where results lie (%(default)s)")
    study.add_argument("--data", type=Path, metavar="DIR", help="where data sets lie (data/, then the user's cache)")
    study.add_argument("--workers", type=_from(1), metavar="N", help="trainings side by side (one a processor core)")
    overrides = study.add_argument_group("fields of the study", "each overrides what the study says")
    for name, (annotation, text) in _FIELDS.items():
        kind: dict[str, Any] = {"type": _value}
        if get_origin(annotation) is dict:
            kind = {"nargs": "+", "action": _Arguments}
        elif is_list(annotation):
            kind = {"nargs": "*", "type": _value}
        flag = f"--{name.replace('_', '-')}"
        overrides.add_argument(flag, dest=name, metavar=_metavar(annotation), help=text, **kind)
    listing = _Parser(add_help=False)
    listing.add_argument("--format", choices=("table", "csv", "json"), default="table", help="(%(default)s)")

    def verb(name: str, function: Callable[[argparse.Namespace], int], *parents: _Parser) -> _Parser:
        text = (function.__doc__ or "").strip()
        usage = f"tombola {name}{' STUDY' if study in parents else ''} [option ...]"
        added = verbs.add_parser(
            name, prog=f"tombola {name}", parents=parents, usage=usage, help=text, description=text, allow_abbrev=False
        )
        added.set_defaults(verb=function)
        return added

    cli_engine.add_options(verb("run", run, study))
    verb("plan", plan, study, listing)
    verb("results", results, study, listing)
    exporting = verb("export", export, study)
    exporting.add_argument("--importance", required=True, metavar="NAME", help="of which importance")
    exporting.add_argument("--seed", type=_from(0), required=True, metavar="N", help="of which seed")
    exporting.add_argument("--level", type=_from(0), required=True, metavar="N", help="of which level")
    exporting.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
    exporting.add_argument("--trained", action="store_true", help="add the trained weights")
    add_analysis_verbs(verb, study, listing, _planner, _workers)
    cli_report.add_verbs(verb, study, _planner, _overrides)
    verb("importances", importances, listing)
    verb("presets", list_presets, listing)
    cli_store.add_verbs(verb, study, listing, lambda options: _planner(options)[0], _workers, STORE)
    return parser


class _Arguments(argparse.Action):
    """Collects NAME=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        collected = {}
        for item in values:
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise argparse.ArgumentError(self, f"expected NAME=VALUE, got {item!r}")
            collected[name] = _value(value)
        setattr(namespace, self.dest, collected)


def _dashed(argument: str) -> str:
    """Return an option spelt with dashes; TOML's spelling of a field, `--recipe.batch_size`, is as good.

    >>> _dashed("--recipe.batch_size=64"), _dashed("--task.model=my_models:mlp"), _dashed("min_max")
    ('--recipe.batch-size=64', '--task.model=my_models:mlp', 'min_max')
    """
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value


def _value(text: str) -> Any:
    """Read a value as TOML would; what TOML would not take is a number as Python writes it, or a string.

    >>> _value("[1, 2]"), _value("1e-3"), _value(".5"), _value("l1")
    ([1, 2], 0.001, 0.5, 'l1')
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
        return text
    return value if isinstance(value, (bool, int, float, str, list, dict)) else text


def _from(least: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number, `least` or more."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return count


def _metavar(annotation: Any) -> str:
    """Return what stands for a field's value in the help.

    >>> _metavar(int | None), _metavar(tuple[str, ...]), _metavar(Literal["cpu", "cuda"])
    ('N', 'NAME', '{cpu,cuda}')
    """
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}"
    if get_origin(annotation) is dict:
        return "NAME=VALUE"
    if arguments := get_args(annotation):
        return _metavar(arguments[0])
    return {int: "N", float: "X", bool: "true|false"}.get(annotation, "NAME")

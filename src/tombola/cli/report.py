"""The command line's verbs that show a study as a whole: `report`, `figures` and `watch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.errors import NothingStoredError, UserError
from tombola.study.schema import presets

if TYPE_CHECKING:
    from tombola.report.contents import Contents
    from tombola.study.planner import Planner
    from tombola.study.schema import Study

Open = Callable[..., tuple["Planner", "Study"]]
"""Gives the planner and the study that options name."""


def add_verbs(
    verb: Callable[..., Any], study: Any, open_study: Open, overrides: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Add the verbs to the command line.

    Args:
        verb: adds one: (name, function, *parents) -> its parser.
        study: the options of a verb that is about a study.
        open_study: gives the planner of the study that the options name.
        overrides: gives the fields of the study that the options override.
    """
    for function in (report, figures, watch):
        added = verb(function.__name__, function, study)
        added.set_defaults(open_study=open_study, overrides=overrides)
        added.add_argument("--level", type=int, metavar="N", help="of what is shown of one level")
        added.add_argument(
            "--with",
            dest="costly",
            nargs="+",
            choices=("functions", "connectivity"),
            default=[],
            metavar="NAME",
            help="also functions or connectivity, which take time",
        )
        added.add_argument(
            "--margin", type=float, default=0.5, metavar="X", help="points of accuracy in %% to keep it (%(default)s)"
        )
        if function is report:
            added.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
        if function is figures:
            added.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where to write them")
            added.add_argument(
                "--format", nargs="+", choices=("pdf", "svg", "png"), default=["pdf"], help="(pdf)", metavar="NAME"
            )
            added.add_argument(
                "--columns", type=int, choices=(1, 2), default=1, help="of a two-column paper's width (%(default)s)"
            )
        if function is watch:
            added.add_argument("--port", type=int, default=0, metavar="N", help="where to serve it (any that is free)")


def report(options: argparse.Namespace) -> int:
    """Write one page with all that was found in a study: a file that needs no network."""
    with _installed():
        from tombola.report.page import page
    from tombola.cli.display import size
    from tombola.files import write_atomically

    _check(options, options.output.parent)
    planner, _ = options.open_study(options)
    contents = _contents(options, planner)
    if not contents.results:
        raise NothingStoredError(f"no result of this study is in {planner.store.root}")
    content = page(contents).encode()
    write_atomically(options.output, content)
    print(f"{options.output}: {size(len(content))}, {contents.tickets} of {contents.expected} tickets")
    return 0


def figures(options: argparse.Namespace) -> int:
    """Write the charts of a study as files, sized for a paper of two columns."""
    with _installed():
        from tombola.report.figures import write
    from tombola.report.look import BOTH_COLUMNS, COLUMN
    from tombola.report.sections import charted, sections

    _check(options)
    planner, _ = options.open_study(options)
    contents = _contents(options, planner)
    if not contents.results:
        raise NothingStoredError(f"no result of this study is in {planner.store.root}")
    inches = COLUMN if options.columns == 1 else BOTH_COLUMNS
    paths = write(charted(sections(contents)), options.output, list(dict.fromkeys(options.format)), inches)
    print("\n".join(map(str, paths)))
    return 0


def watch(options: argparse.Namespace) -> int:
    """Serve the page of a study to this machine alone, and keep it fresh while the study runs."""
    with _installed():
        from tombola.report.page import page
    from tombola.report.watch import ADDRESS, keep_fresh, serving
    from tombola.study.tickets import Tickets

    _check(options)
    planner, _ = options.open_study(options)

    def state() -> object:
        """The names of the study's results, and of whatever else has been written about them."""
        records = [planner.store.results.folder(key) / "record.json" for key in Tickets(planner).records()]
        return [(path.parent.name, path.stat().st_mtime_ns) for path in records if path.exists()]

    def make() -> str:
        return page(_contents(options, planner), refreshed=ADDRESS)

    with serving(options.port) as served:
        try:
            served.show(make())
            print(f"{served.url} shows the study as it is; Ctrl-C ends this", flush=True)
            keep_fresh(state, make, served.show, seconds=2.0)
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return 0


def _contents(options: argparse.Namespace, planner: Planner) -> Contents:
    from tombola.report.contents import gather

    name = options.study if options.study in presets() else Path(options.study).name
    command = [name, *_flags(options.overrides(options))]
    return gather(
        planner,
        name.removesuffix(".toml"),
        command,
        costly=options.costly,
        level=options.level,
        margin=options.margin / 100,
    )


def _flags(overrides: dict[str, Any]) -> list[str]:
    """Return the options that override these fields of a study.

    >>> _flags({"levels": 3, "seeds": [0, 1], "task.model_arguments": {"width": 8}})
    ['--levels', '3', '--seeds', '0', '1', '--task.model-arguments', 'width=8']
    """
    flags = []
    for name, value in overrides.items():
        flags.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            flags += [f"{key}={_plain(each)}" for key, each in value.items()]
        else:
            flags += [_plain(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    return flags


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(options: argparse.Namespace, folder: Path | None = None) -> None:
    """Raise `UserError` for what can be known to be wrong before anything is loaded."""
    if not 0 <= options.margin <= 100:
        raise UserError(f"--margin: expected points of accuracy in %, 0 to 100, got {options.margin:g}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {folder}; make it first")
    if folder is not None and options.output.is_dir():
        raise UserError(f"--output {options.output}: is a folder; name a file in it")


@contextmanager
def _installed() -> Iterator[None]:
    """Say what to install where the charting library is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("altair", "jinja2", "vl_convert"):
            raise
        raise UserError(f"charts need {error.name}, which is not installed: pip install 'tombola[report]'") from error

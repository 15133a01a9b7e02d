"""The verbs that show a study as a whole: `report`, `figures` and `watch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tombola.cli.options import Verbs, add_margin, flags, open_planner, overrides, whole_number
from tombola.errors import NothingStoredError, UserError
from tombola.study.schema import presets

if TYPE_CHECKING:
    from tombola.report.contents import Contents
    from tombola.study.planner import Planner


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    for verb in (report, figures, watch):
        added = verbs.add(verb.__name__, verb, verbs.study)
        added.add_argument(
            "--level", type=whole_number(0, 10_000), metavar="N", help="the level of the tables of one level"
        )
        added.add_argument(
            "--with",
            dest="costly",
            nargs="+",
            choices=("functions", "connectivity"),
            default=[],
            metavar="NAME",
            help="include functions or connectivity, which take time",
        )
        add_margin(added)
        if verb is report:
            added.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
        if verb is figures:
            added.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write to")
            added.add_argument(
                "--format",
                nargs="+",
                choices=("pdf", "svg", "png"),
                default=["pdf"],
                help="the formats of the files (pdf)",
                metavar="NAME",
            )
            added.add_argument(
                "--columns",
                type=int,
                choices=(1, 2),
                default=1,
                help="width in columns of a two-column paper (%(default)s)",
            )
        if verb is watch:
            added.add_argument(
                "--port",
                type=whole_number(0, 65535),
                default=0,
                metavar="N",
                help="the port to serve on (any free port)",
            )


def report(options: argparse.Namespace) -> int:
    """Write a report on a study: one HTML file that needs no network."""
    with _check_installed():
        from tombola.report.page import page
    from tombola.cli.tables import size
    from tombola.files import write_output

    _check_output(options.output)
    planner = open_planner(options)
    contents = _gather_results(options, planner)
    content = page(contents).encode()
    write_output(options.output, content)
    print(f"{options.output}: {size(len(content))}, {contents.tickets} of {contents.expected} tickets")
    return 0


def figures(options: argparse.Namespace) -> int:
    """Write the charts of a study as files, in the widths of a two-column paper."""
    with _check_installed():
        from tombola.report.figures import write
    from tombola.report.look import BOTH_COLUMNS, COLUMN
    from tombola.report.sections import sections, select_charts

    contents = _gather_results(options, open_planner(options))
    inches = COLUMN if options.columns == 1 else BOTH_COLUMNS
    paths = write(select_charts(sections(contents)), options.output, list(dict.fromkeys(options.format)), inches)
    print("\n".join(map(str, paths)))
    return 0


def watch(options: argparse.Namespace) -> int:
    """Serve the report of a study on this machine, and update it while the study runs."""
    with _check_installed():
        from tombola.report.page import page
    from tombola.report.watch import ADDRESS, keep_fresh, serve
    from tombola.study.tickets import Tickets

    planner = open_planner(options)

    def state() -> object:
        """Return the names of the study's results, and of whatever else has been written about them."""
        found = Tickets(planner).all().values()
        keys = sorted({training.key for progress in found for training in progress.trainings})
        records = [planner.store.results.folder(key) / "record.json" for key in keys]
        return [(path.parent.name, path.stat().st_mtime_ns) for path in records if path.exists()]

    def make() -> str:
        return page(_gather(options, planner), refreshed=ADDRESS)

    with serve(options.port) as served:
        try:
            served.show(make())
            print(f"{served.url} shows the current state of the study; press Ctrl-C to stop", flush=True)
            keep_fresh(state, make, served.show, seconds=2.0)
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return 0


def _gather(options: argparse.Namespace, planner: Planner) -> Contents:
    from tombola.report.contents import gather

    name = options.study if options.study in presets() else Path(options.study).name
    return gather(
        planner,
        _escape(name.removesuffix(".toml")),
        [_escape(word) for word in (name, *flags(overrides(options)))],
        costly=options.costly,
        level=options.level,
        margin=options.margin / 100,
    )


def _escape(text: str) -> str:
    r"""Return a text of the command line in which bytes that are not UTF-8 are written as escapes.

    >>> _escape("study\udcff")
    'study\\udcff'
    """
    return text.encode(errors="backslashreplace").decode()


def _gather_results(options: argparse.Namespace, planner: Planner) -> Contents:
    """Gather the stored results of a study.

    Raises:
        NothingStoredError: if the store has no result of the study.
    """
    contents = _gather(options, planner)
    if not contents.results:
        raise NothingStoredError(f"no result of this study is in {planner.store.root}")
    return contents


def _check_output(path: Path) -> None:
    """Raise `UserError` if this file cannot be written; call this before anything is loaded."""
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file in it")


@contextmanager
def _check_installed() -> Iterator[None]:
    """If the charting library is missing, raise `UserError` with what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("altair", "jinja2", "vl_convert"):
            raise
        raise UserError(f"charts need {error.name}, which is not installed: pip install 'tombola[report]'") from error

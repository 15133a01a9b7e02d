"""The verbs that show a study as a whole: `report`, `figures` and `watch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.cli.options import Verbs, add_margin, open_planner, overrides, parse_path, whole_number
from tombola.errors import UserError
from tombola.terminal import say

if TYPE_CHECKING:
    from tombola.reporting.contents import Contents
    from tombola.study.planner import Planner


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    for verb in (report, figures, watch):
        added = verbs.add(verb.__name__, verb, verbs.study)
        added.add_argument(
            "--level",
            type=whole_number(0, 10_000),
            metavar="N",
            help="the level of those tables that show a single level",
        )
        added.add_argument(
            "--with",
            dest="costly",
            nargs="+",
            choices=("functions", "connectivity", "matching", "similarity", "basins", "rewind-point", "early"),
            default=[],
            metavar="NAME",
            help="also include these analyses, which take time: functions, connectivity, matching, similarity, basins, "
            "rewind-point, early",
        )
        add_margin(added)
        if verb is report:
            added.add_argument(
                "-o", "--output", type=parse_path, required=True, metavar="FILE", help="the file to write"
            )
        if verb is figures:
            added.add_argument(
                "-o", "--output", type=parse_path, required=True, metavar="DIR", help="the folder to write to"
            )
            added.add_argument(
                "--format",
                nargs="+",
                choices=("pdf", "svg", "png"),
                default=["pdf"],
                help="the formats of the files (default: pdf)",
                metavar="NAME",
            )
            added.add_argument(
                "--columns",
                type=int,
                choices=(1, 2),
                default=1,
                help="the width of a figure, in columns of a two-column paper (default: %(default)s)",
            )
        if verb is watch:
            added.add_argument(
                "--port",
                type=whole_number(0, 65535),
                default=0,
                metavar="N",
                help="the port of the server (default: any free port)",
            )


def report(options: argparse.Namespace) -> int:
    """Write a report on a study as one HTML file, which can be read without the Internet."""
    from tombola.cli.tables import size
    from tombola.files import check_output, write_output
    from tombola.workbench.pictures import check_installed

    with check_installed():
        from tombola.reporting.page import page
    try:
        check_output(options.output)
    except UserError as error:
        raise UserError(f"--output {error}") from error
    planner = open_planner(options)
    contents = _gather_results(options, planner)
    content = page(contents).encode()
    write_output(options.output, content)
    say(f"{options.output}: {size(len(content))}, {contents.tickets} of {contents.expected} tickets")
    return 0


def figures(options: argparse.Namespace) -> int:
    """Write the charts of a study as files that fit a two-column paper."""
    from tombola.workbench.pictures import check_installed

    with check_installed():
        from tombola.reporting.figures import write
    from tombola.reporting.look import BOTH_COLUMNS, COLUMN
    from tombola.reporting.sections import sections, select_charts

    contents = _gather_results(options, open_planner(options))
    inches = COLUMN if options.columns == 1 else BOTH_COLUMNS
    paths = write(select_charts(sections(contents)), options.output, list(dict.fromkeys(options.format)), inches)
    say("\n".join(map(str, paths)))
    return 0


def watch(options: argparse.Namespace) -> int:
    """Serve the report of a study on this machine, and update it while the study runs."""
    from tombola.workbench.pictures import check_installed

    with check_installed():
        from tombola.reporting.page import page
    from tombola.reporting.watch import ADDRESS, keep_fresh, serve
    from tombola.study.tickets import Tickets

    planner = open_planner(options)

    def state() -> object:
        """Return the names of the study's results, and of whatever else has been written about them."""
        found = Tickets(planner).all().values()
        keys = sorted({training.key for progress in found for training in progress.trainings})
        return [(key, _changed_at(planner.store.results.folder(key) / "record.json")) for key in keys]

    def make() -> str:
        return page(_gather(options, planner), refreshed=ADDRESS)

    with serve(options.port) as served:
        try:
            served.show(make())
            say(f"{served.url} shows the current state of the study; press Ctrl-C to stop", flush=True)
            keep_fresh(state, make, served.show, seconds=2.0)
        except KeyboardInterrupt:
            say(file=sys.stderr)
    return 0


def _changed_at(path: Path) -> int | None:
    """Return when a file was changed; None if it is not there, as another process may remove it at any moment."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _gather(options: argparse.Namespace, planner: Planner) -> Contents:
    from tombola.reporting.contents import gather
    from tombola.workbench.pictures import name_study

    name, words = name_study(options.study, overrides(options))
    return gather(planner, name, words, **_choices(options))


def _gather_results(options: argparse.Namespace, planner: Planner) -> Contents:
    from tombola.workbench.pictures import gather_stored, name_study

    return gather_stored(planner, *name_study(options.study, overrides(options)), **_choices(options))


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    return {"costly": options.costly, "level": options.level, "margin": options.margin / 100}

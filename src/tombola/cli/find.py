"""The verb `find`, which searches for the sparsest ticket that keeps the metric."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.cli.options import Verbs, add_margin, open_planner, parse_path, print_note, warnings_as_notes
from tombola.errors import BudgetError, UserError
from tombola.terminal import say

if TYPE_CHECKING:
    import polars as pl

    from tombola.engine.search import Budget
    from tombola.study.planner import Planner
    from tombola.training.metrics import Measure
    from tombola.workbench.find import Found

_PICTURES = ("svg", "png", "pdf", "html")

_STRATEGIES = ("rounds", "bisect", "one-shot", "race", "short", "early")


def add_verbs(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    added = verbs.add("find", find, verbs.study, verbs.table)
    add_margin(added, "--within")
    added.add_argument(
        "--strategy",
        choices=_STRATEGIES,
        default="race",
        metavar="NAME",
        help=f"the way to search: {', '.join(_STRATEGIES)} (default: %(default)s)",
    )
    added.add_argument(
        "--budget",
        metavar="TEXT",
        help="how much the search may train: a time such as 90m or 2h, or a number of trainings (default: no limit)",
    )
    added.add_argument("-o", "--output", type=parse_path, metavar="FILE", help="the file that the ticket is written to")
    added.add_argument(
        "--picture",
        type=parse_path,
        metavar="FILE",
        help="the file that a chart of the tickets tried is written to: .svg, .png, .pdf or .html",
    )
    added.add_argument("--plan", action="store_true", help="show what would be trained at most, and train nothing")


def find(options: argparse.Namespace) -> int:
    """Find the sparsest ticket that keeps the accuracy (or metric) of the dense network, with few trainings."""
    from tombola import kernels
    from tombola.analysis.frontier import of_walk
    from tombola.analysis.winners import FLATTERS
    from tombola.files import check_output
    from tombola.study.task import UnusedWarning
    from tombola.workbench.find import conclude, describe_failure, read_budget, walk_study
    from tombola.workbench.runs import prepare_store, try_study

    plain = options.format == "table"
    try:
        budget = read_budget(options.budget)
        _check_pictures(options.picture)
        for name, path in (("output", options.output), ("picture", options.picture)):
            if path is not None:
                _check(name, path, check_output)
        files = [os.path.realpath(path) for path in (options.output, options.picture) if path is not None]
        if len(files) > len(set(files)):
            raise UserError(f"picture {options.picture}: the ticket would be written there too; name another file")
    except UserError as error:
        raise UserError(f"--{error}") from error
    planner = open_planner(options)
    with warnings_as_notes(UnusedWarning):
        try_study(planner)
    if options.plan:
        _show_plan(planner, budget, options)
        return 0
    prepare_store(planner, options.store)
    measure = planner.problem.measure
    if planner.study.device == "cpu" and not kernels.available():
        print_note(kernels.MISSING)
    if planner.kernel_fault is not None:
        print_note(planner.kernel_fault)
    if measure.split == "test":
        print_note(FLATTERS)
    try:
        walk = walk_study(planner, options.within / 100, options.strategy, budget, options.workers, options.data)
    except BudgetError as error:
        raise UserError(f"--{error}") from error
    if options.picture is not None:
        _write_picture(walk, options.picture)
    if walk.end.found is None:
        _show(of_walk(walk), measure, options.format)
        raise UserError(f"--{describe_failure(walk)}")
    found = conclude(walk, options.within / 100)
    if options.output is not None:
        found.ticket.save(options.output, trained=True)
    if options.format == "json":
        _emit(found)
        return 0
    _show(found.table, measure, options.format)
    for line in _describe(found, measure):
        say(line, file=sys.stdout if plain else sys.stderr)
    if options.output is not None and plain:
        say(f"{options.output}: the ticket of seed {found.ticket.provenance['seed']}, with trained weights")
    return 0


def _show_plan(planner: Planner, budget: Budget, options: argparse.Namespace) -> None:
    """Print what a search would train at most, what the store has of it, and the time and disk space that it takes."""
    from tombola.cli.tables import emit, show_table, size, wrap
    from tombola.workbench.find import outlook, work_of_rounds
    from tombola.workbench.runs import count_workers
    from tombola.workbench.text import count, duration

    seen = outlook(planner, options.strategy, options.workers, options.data)
    workers = count_workers(options.workers, planner.study.device)
    lines = [
        ["judges" if number else "search", part.seed, part.iterations, part.trainings, part.there]
        for number, part in enumerate(seen.parts)
    ]
    header = ["part", "seed", "iterations", "trainings at most", "there"]
    if options.format == "json":
        rows = [dict(zip(["part", "seed", "iterations", "trainings", "there"], line, strict=True)) for line in lines]
        document = {"work": seen.work, "to_do": seen.to_do, "seconds": seen.seconds, "workers": workers}
        emit(json.dumps({**document, "bytes": seen.bytes, "parts": rows}, indent=1))
        return
    show_table(header, [[*line[:3], *(f"{each:.1f}" for each in line[3:])] for line in lines], options.format)
    if options.format == "csv":
        return
    said = [
        f"at most {seen.work:.1f} complete trainings, {seen.work - seen.to_do:.1f} of them in {planner.store.root} "
        f"already; all rounds of the study are {_number(work_of_rounds(planner))}"
    ]
    if seen.seconds is None:
        said.append(f"time: not known: {seen.source}")
    elif seen.to_do:
        said.append(f"time: at most about {duration(seen.seconds)} on {count(workers, 'worker')} ({seen.source})")
        said.append(f"disk: at most about {size(seen.bytes)}")
    if len(seen.parts) > 1:
        said.append("A ticket that the judges refute takes more: the search goes on, and they judge another one.")
    spent = seen.seconds if budget.seconds is not None else seen.to_do
    limit = budget.seconds if budget.seconds is not None else budget.trainings
    if limit is not None and spent is not None:
        enough = "suffices for all of it" if spent <= limit else "may end the search before that"
        said.append(f"The budget of {budget.text} {enough}.")
    say("\n".join(map(wrap, said)))


def _check(name: str, path: Path, check: Any) -> None:
    try:
        check(path)
    except UserError as error:
        raise UserError(f"{name} {error}") from error


def _check_pictures(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.removeprefix(".") not in _PICTURES:
        raise UserError(f"picture {path}: the name of a picture ends in .svg, .png, .pdf or .html")
    from tombola.workbench.pictures import check_installed

    with check_installed():
        import tombola.reporting.figures  # noqa: F401


def _write_picture(walk: Any, path: Path) -> None:
    from tombola.files import write_output
    from tombola.reporting.figures import draw
    from tombola.reporting.look import BOTH_COLUMNS
    from tombola.workbench.find import draw as chart

    write_output(path, draw(chart(walk), path.suffix.removeprefix("."), BOTH_COLUMNS))


def _emit(found: Found) -> None:
    from tombola.cli.tables import emit

    document = {
        "verdict": found.verdict,
        "reason": found.reason,
        "unknown": list(found.unknown),
        "frontier": found.table.to_dicts(),
    }
    emit(json.dumps(document, indent=1))


def _show(table: pl.DataFrame, measure: Measure, form: str) -> None:
    """Print what was tried."""
    import polars as pl

    from tombola.cli.tables import figure, figure_range, percent, show_frame

    if form != "table":
        show_frame(table, form)
        return
    points = ", points" if measure.percent else ""
    shown = table.select(
        "importance",
        pl.col("path").alias("path"),
        percent("density").alias("density %"),
        pl.col("work").map_elements("{:.1f}".format, return_dtype=pl.String),
        figure(measure.name, measure).alias(f"{measure.split} {measure.heading}"),
        figure("difference", measure, sign=True).alias(f"difference{points}"),
        "judges",
        figure("mean", measure, sign=True).alias("their mean"),
        figure_range("low", "high", measure).alias("95 %"),
        pl.when("found")
        .then(pl.lit("found"))
        .when("keeps")
        .then(pl.lit("keeps it"))
        .when(pl.col("why") != "")
        .then("why")
        .otherwise(pl.lit("does not"))
        .alias("verdict"),
    )
    show_frame(shown, "table")


def _number(work: float) -> str:
    """Write work in complete trainings, with one digit after the point unless it is a whole number of them."""
    return f"{work:.1f}".removesuffix(".0")


def _describe(found: Found, measure: Measure) -> list[str]:
    """Return sentences on what was found, how sure it is, and what it took."""
    from tombola.cli.tables import wrap
    from tombola.workbench.find import name_margin, work_of_rounds

    seen = found.verdict
    study = found.walk.trials[-1][0].study
    lines = [
        f"found: {seen['importance']}, level {seen['level']} (path {' '.join(map(str, seen['path']))}), density "
        f"{100 * seen['density']:.2f} %"
    ]
    judges = ", ".join(map(str, seen["judges"]))
    several = "s" if len(seen["judges"]) > 1 else ""
    over = f"over seed{several} {judges}" if judges else f"of seed {study.seeds[0]}, by whose result it was chosen"
    value, dense = seen[measure.name], seen[f"dense_{measure.name}"]
    difference = f"{measure.figure(seen['difference'], sign=True)} {measure.unit}"
    interval = ""
    if seen["low"] is not None:
        interval = (
            f", 95 % interval {measure.figure(seen['low'], sign=True)} .. {measure.figure(seen['high'], sign=True)}, "
            f"{'within' if seen['surely'] else 'not surely within'} the margin of {name_margin(found.walk)}"
        )
    lines.append(
        f"{measure.split} {measure.label}: {measure.text(value)}, dense {measure.text(dense)}, difference {difference} "
        f"{over}{interval}"
    )
    if seen["outside"] is not None:
        lines.append(
            f"the chance that a further seed is outside the margin is about {100 * seen['outside']:.0f} %; with a "
            f"confidence of 95 %, it is at most {100 * seen['outside_most']:.0f} %"
        )
    if measure.split != "test" and seen["test"] is not None and seen["dense_test"] is not None:
        lines.append(f"test {measure.label}: {measure.text(seen['test'])}, dense {measure.text(seen['dense_test'])}")
    tried, complete = found.walk.trials[0][0].end, found.walk.trials[-1][0].end
    if tried < complete:
        lines.append(
            f"the search used trainings of {tried} of the {complete} iterations, after which the table shows the "
            f"{measure.label} and the differences; the judges and the ticket that was found were trained in full"
        )
    if found.walk.end.found is not None and found.walk.end.found.early:
        planner, rewind = found.walk.trials[-1][0], study.recipe.rewind
        lines.append(
            f"masks were taken after {planner.early_end - rewind} of {planner.end - rewind} iterations; the dense "
            "networks and all tickets of the table were trained in full"
        )
    rounds = _number(work_of_rounds(found.walk.trials[-1][0]))
    lines.append(
        f"work: {seen['work']:.1f} complete trainings, {seen['done']:.1f} of them now; all rounds of the study are "
        f"{rounds}"
    )
    lines.append(f"end: {found.reason}")
    lines += [f"not known: {each}" for each in found.unknown]
    return [wrap(line) for line in lines]

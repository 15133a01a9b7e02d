"""The verbs of further analyses that train networks, planned, stored and resumed like those of a study."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tombola.cli.analysis import note_no_interval, open_compared, progress_elsewhere, show_view
from tombola.cli.options import Verbs, add_tolerance, print_note, warnings_as_notes, whole_number
from tombola.errors import UserError
from tombola.terminal import say

if TYPE_CHECKING:
    import polars as pl

    from tombola.study.controls import Plan
    from tombola.study.early import Snapshots
    from tombola.study.rewind_point import Point
    from tombola.study.tickets import Tickets
    from tombola.training.metrics import Measure

_MOST = 10_000
_KINDS = ("new-order", "signs", "new-weights", "shuffled", "other-seed", "random")
_MANY = 100  # more networks than these are announced before they are drawn


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    for verb in (controls, combine, transfer):
        added = verbs.add(verb.__name__, verb, verbs.study, verbs.table)
        added.add_argument(
            "--level", type=whole_number(0, _MOST), required=True, metavar="N", help="the level of the tickets"
        )
        if verb is controls:
            added.add_argument(
                "--kinds",
                nargs="+",
                choices=_KINDS,
                metavar="KIND",
                help=f"the kinds of controls (default: all of {', '.join(_KINDS)})",
            )
            added.add_argument(
                "--draws",
                type=whole_number(1, 1000),
                default=1,
                metavar="N",
                help="how many random draws of each control are trained for each seed (default: %(default)s)",
            )
        if verb is combine:
            added.add_argument(
                "--over",
                choices=("importances", "seeds"),
                default="importances",
                help="combine the tickets of all importances of a seed, or of all seeds of an importance "
                "(default: %(default)s)",
            )
        if verb is transfer:
            added.add_argument(
                "--from", dest="other", required=True, metavar="STUDY", help="the study whose masks are trained"
            )
        _add_plan(added)

    added = verbs.add("rewind-point", rewind_point, verbs.study, verbs.table)
    _add_places(
        added,
        at="the iterations to try as rewind points",
        level="find tickets of level N for each of the iterations, and try these too",
    )
    add_tolerance(added)
    _add_plan(added)
    added = verbs.add("early", early, verbs.study, verbs.table)
    _add_places(
        added,
        at="the iterations at which the mask is taken",
        level="the level of the tickets (default: the last that all chains have)",
    )
    _add_plan(added)


def _add_places(parser: argparse.ArgumentParser, *, at: str, level: str) -> None:
    """Add the options `--at` and `--level` with these help texts."""
    parser.add_argument("--at", type=whole_number(0), nargs="+", metavar="K", help=at)
    parser.add_argument("--level", type=whole_number(1, _MOST), metavar="N", help=level)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the option `--plan`."""
    parser.add_argument("--plan", action="store_true", help="show what would be trained, and train nothing")


def controls(options: argparse.Namespace) -> int:
    """Train tickets of which one thing is changed (weights, mask or signs), and show how much accuracy that costs."""
    from tombola.analysis import controls
    from tombola.study.controls import DRAWN, check_size, plan_controls

    tickets, names = open_compared(options)
    check_size(tickets.study, options.kinds, options.draws, names)
    networks = options.draws * len(tickets.study.seeds)
    if networks > _MANY and set(DRAWN).intersection(options.kinds or _KINDS):
        print_note(
            f"the weights of {networks} networks are drawn to name the trainings; this takes minutes for large networks"
        )
    with warnings_as_notes(Warning):
        plan = plan_controls(tickets, options.level, options.kinds, options.draws, names)
    if options.format == "table" and len(tickets.study.seeds) < 2:
        print_note(
            "no interval and no mask of another seed: the study has one seed; "
            "find the tickets of others with `tombola run --seeds`"
        )
    if _do(plan, options):
        view = partial(_controls, tickets.planner.problem.measure)
        show_view(controls.of_controls(plan), options.format, view)
    return 0


def combine(options: argparse.Namespace) -> int:
    """Train the union and the intersection of tickets, and compare them with tickets of the same density."""
    from tombola.analysis import controls
    from tombola.study.controls import plan_combinations

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        plan = plan_combinations(tickets, options.level, options.over, names)
    note_no_interval(tickets, options)
    if _do(plan, options):
        view = partial(_combinations, tickets.planner.problem.measure)
        show_view(controls.of_combinations(plan), options.format, view)
    return 0


def transfer(options: argparse.Namespace) -> int:
    """Train the masks of another study in the networks of this one, and compare them with its own tickets."""
    from tombola.analysis import controls
    from tombola.cli.tables import wrap
    from tombola.study.controls import plan_transfers
    from tombola.workbench.studies import open_tickets

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        others = open_tickets(options.other, store=options.store, data=options.data, importances=names)
        plan = plan_transfers(tickets, others, options.level, names)
    note_no_interval(tickets, options)
    if _do(plan, options):
        if options.format == "table":
            say(wrap(f"Masks of the study with {plan.source}, trained here:"))
        view = partial(_transfers, tickets.planner.problem.measure)
        show_view(controls.of_transfers(plan), options.format, view)
    return 0


def rewind_point(options: argparse.Namespace) -> int:
    """Find the iteration from which on two data orders lead to connected networks, and show the rewind point to set."""
    from tombola.analysis import rewind_point
    from tombola.cli.options import open_planner
    from tombola.study.rewind_point import list_planners, plan_rewind_points
    from tombola.study.tickets import Tickets
    from tombola.workbench.runs import prepare_store, run_further, try_study

    names, options.importances = options.importances, None
    tickets = Tickets(open_planner(options))
    if names and len(names) > 1:
        raise UserError("--importances: name the one importance whose tickets are tried")
    if not options.plan:
        with warnings_as_notes(Warning):
            try_study(tickets.planner)
        prepare_store(tickets.planner, options.store)
    with warnings_as_notes(Warning):
        points = plan_rewind_points(tickets, options.at, options.level, names[0] if names else None)
    if options.plan:
        _show_points(tickets, points, options)
        return 0
    with progress_elsewhere(options.format):
        run_further(tickets, list_planners(points), options.workers, options.data)
    table = rewind_point.of_points(points)
    if options.format != "table":
        show_view(table, options.format, _points)
        return 0
    note_no_interval(tickets, options)
    means = rewind_point.summarise(table, options.tolerance / 100)
    show_view(means, options.format, _points)
    say("\n".join(rewind_point.advise(means)))
    return 0


def early(options: argparse.Namespace) -> int:
    """Show how early in training the final mask is known, and how much of the ticket is in it."""
    from tombola.analysis import early
    from tombola.study.chains import select_chains
    from tombola.study.early import plan_snapshots

    tickets, names = open_compared(options)
    with warnings_as_notes(Warning):
        plan = plan_snapshots(tickets, options.at)
    note_no_interval(tickets, options)
    if not options.plan:
        early.find_level(tickets, select_chains(tickets.study, names), options.level)
    if _do(plan, options):
        table = early.of_snapshots(plan, names, options.level)
        show_view(table, options.format, _early)
        if options.format == "table":
            say("\n".join(early.describe(early.summarise(table))))
    return 0


def _show_points(tickets: Tickets, points: Sequence[Point], options: argparse.Namespace) -> None:
    """Print how many trainings each iteration takes, how many of them the store has, and how long the others take."""
    from tombola.cli.tables import show_table, wrap
    from tombola.engine.estimate import estimate_points
    from tombola.workbench.runs import count_workers
    from tombola.workbench.text import count, duration

    workers = count_workers(options.workers, tickets.study.device)
    found, source = estimate_points(tickets, points, workers, options.data)
    known = [each.seconds for each in found if each.seconds is not None]
    rows = [[each.iteration, each.existing, each.to_train, each.seconds] for each in found]
    if options.format != "table":
        show_table(["iteration", "trainings there", "trainings to do", "seconds"], rows, options.format)
        return
    show_table(["iteration", "trainings there", "trainings to do"], [row[:3] for row in rows], options.format)
    if len(known) < len(found):
        say(wrap(f"time: not known: {source}"))
    elif any(each.to_train for each in found):
        say(f"time: about {duration(sum(known))} on {count(workers, 'worker')} ({source})")


def _do(plan: Plan | Snapshots, options: argparse.Namespace) -> bool:
    """Do the trainings of a plan, or show them if the options ask for it; return whether they are done."""
    from tombola.cli.run import show_plan
    from tombola.engine.estimate import estimate
    from tombola.workbench.runs import count_workers, run_further

    if options.plan:
        count = count_workers(options.workers, plan.tickets.study.device)
        expected = estimate(plan.planner, count, options.data, beside=plan.tickets)
        show_plan(plan.planner, expected, count, options.format)
        return False
    with progress_elsewhere(options.format):
        run_further(plan.tickets, [plan.planner], options.workers, options.data)
    return True


def _controls(measure: Measure, table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each kind of control and importance; means over seeds."""
    import polars as pl

    from tombola.analysis import controls
    from tombola.cli.tables import figure, figure_range
    from tombola.study.controls import KINDS

    points = ", points" if measure.percent else ""
    return controls.summarise(table).select(
        *("level", "kind"),
        pl.col("kind").replace(KINDS).alias("trained"),
        *("importance", "seeds"),
        figure("dense", measure).alias(f"dense {measure.heading}"),
        figure("ticket", measure).alias(f"ticket {measure.heading}"),
        figure("value", measure).alias(f"control {measure.heading}"),
        figure("lost", measure, sign=True).alias(f"lost{points}"),
        figure_range("low", "high", measure).alias("95 %"),
    )


def _combinations(measure: Measure, table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each union and intersection; means over seeds."""
    from tombola.analysis import controls
    from tombola.cli.tables import figure, figure_range, percent

    return controls.summarise_combinations(table).select(
        *("level", "kind", "tickets", "seeds"),
        percent("density").alias("density %"),
        figure("ticket", measure).alias(f"tickets {measure.heading}"),
        figure("value", measure).alias(f"combined {measure.heading}"),
        figure("same_density", measure).alias("tickets as dense"),
        figure("difference", measure, sign=True).alias("better by"),
        figure_range("low", "high", measure).alias("95 %"),
    )


def _transfers(measure: Measure, table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each importance; means over seeds."""
    from tombola.analysis import controls
    from tombola.cli.tables import figure, figure_range, percent

    return controls.summarise_transfers(table).select(
        *("level", "importance", "seeds"),
        percent("density").alias("density %"),
        figure("dense", measure).alias(f"dense {measure.heading}"),
        figure("own", measure).alias(f"own ticket {measure.heading}"),
        figure("value", measure).alias(f"transferred {measure.heading}"),
        figure("shuffled", measure).alias("shuffled"),
        figure("gained", measure, sign=True).alias("better than shuffled by"),
        figure_range("low", "high", measure).alias("95 %"),
        figure("difference", measure, sign=True).alias("better than own by"),
    )


def _points(means: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each level and iteration."""
    from tombola.cli.tables import percent, percent_range, yes_or_no

    return means.select(
        *("level", "importance", "iteration", "seeds"),
        percent("first").alias("error of one order %"),
        percent("second").alias("of the other %"),
        percent("barrier").alias("barrier, points"),
        percent_range("low", "high").alias("95 %"),
        yes_or_no("connected"),
        percent("jaccard").alias("overlap of masks %"),
        percent("chance").alias("chance"),
    )


def _early(table: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each importance and iteration; means over seeds."""
    from tombola.analysis import early
    from tombola.cli.tables import percent, percent_range

    return early.summarise(table).select(
        *("level", "importance", "iteration", "seeds"),
        percent("distance").alias("distance to the end %"),
        percent("known").alias("of the mask at the end, known %"),
        percent_range("low", "high").alias("95 %"),
        percent("chance").alias("chance"),
        percent("ticket").alias("of the ticket, known %"),
        percent("ticket_chance").alias("chance "),
    )

"""The command line's verbs of analysis: each prints one table of `tombola.analysis`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tombola.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

    from tombola.study.planner import Planner
    from tombola.study.schema import Study
    from tombola.study.tickets import Tickets

Open = Callable[..., tuple["Planner", "Study"]]
"""Gives the planner and the study that options name."""


class AddVerb(Protocol):
    """Adds a verb to the command line."""

    def __call__(self, name: str, function: Callable[[argparse.Namespace], int], *parents: Any) -> Any:
        """Return the verb's parser."""


def add_analysis_verbs(verb: AddVerb, study: Any, listing: Any, open_study: Open, workers: Any) -> None:
    """Add the verbs of analysis.

    Args:
        verb: adds one.
        study, listing: parents of their parsers, with the options of a study and of a table.
        open_study: gives the planner of the study that the options name.
        workers: gives the number of workers that the options name.
    """
    for function in (overlap, layers, stability, winners, weights, functions, connectivity, reinit):
        added = verb(function.__name__, function, study, listing)
        added.set_defaults(open_study=open_study, count_workers=workers)
        if function is reinit:
            added.add_argument(
                "--level", type=int, required=True, metavar="N", help="whose shared connections are kept"
            )
            added.add_argument("--draws", type=int, default=3, metavar="N", help="of the other weights (%(default)s)")
            added.add_argument("--plan", action="store_true", help="say what would be trained, and train nothing")
        elif function is not winners:
            added.add_argument("--level", type=int, nargs="+", metavar="N", help="which levels")
        if function is winners:
            added.add_argument(
                "--margin", type=float, default=0.5, metavar="X", help="points of accuracy in %% (%(default)s)"
            )
            added.add_argument("--surely", action="store_true", help="the whole 95 %% interval must lie within it")
        if function is stability:
            added.add_argument("--layer", nargs="+", metavar="NAME", help="only of these layers")
        if function is connectivity:
            added.add_argument("--points", type=int, default=11, metavar="N", help="on each line (%(default)s)")


def overlap(options: argparse.Namespace) -> int:
    """Say how many connections tickets share, against chance and the noise floor."""
    from tombola.analysis import overlap

    tickets, names = _open(options)
    with _noted():
        table = overlap.of_study(tickets, names, options.level)
    if options.format == "table" and not tickets.planner.repeats:
        _note("no noise floor: the study has no other data order; ask for one with --data-seeds")
    elif options.format == "table" and not (table["kind"] == "data order").any():
        _note("no noise floor yet: the other data orders are not there; find them with: tombola run")
    _show(table, options.format, _overlap_by_level if options.level is None else _overlap_at_level)
    return 0


def layers(options: argparse.Namespace) -> int:
    """Say how dense each layer of each ticket is, what has collapsed, and what lies on no path."""
    from tombola.analysis import layers

    tickets, names = _open(options)
    with _noted():
        table = layers.of_study(tickets, names, options.level)
    _show(table, options.format, _layers)
    return 0


def stability(options: argparse.Namespace) -> int:
    """Say whether shared connections change less from level to level than others."""
    from tombola.analysis import stability

    tickets, names = _open(options)
    with _noted():
        table = stability.of_study(tickets, names, options.level, options.layer)
    _show(table, options.format, _stability)
    return 0


def winners(options: argparse.Namespace) -> int:
    """Say which is the sparsest ticket of each importance that keeps the dense network's accuracy."""
    from tombola.analysis import winners

    if not 0 <= options.margin <= 100:
        raise UserError(f"--margin: expected points of accuracy in %, 0 to 100, got {options.margin:g}")
    tickets, names = _open(options)
    with _noted():
        table = winners.of_study(tickets, names, margin=options.margin / 100, surely=options.surely)
    if options.format == "table" and len(tickets.study.seeds) < 2:
        _note("no interval: the study has one seed, it needs two or more")
    _show(table, options.format, _winners)
    return 0


def weights(options: argparse.Namespace) -> int:
    """Say how weights and importances are distributed in each layer."""
    from tombola.analysis import weights

    tickets, names = _open(options)
    with _noted():
        table = weights.of_study(tickets, names, options.level)
    _show(table, options.format, _weights)
    return 0


def functions(options: argparse.Namespace) -> int:
    """Say how alike tickets are in what they predict."""
    from tombola.analysis import functions

    tickets, names = _open(options)
    with _noted():
        table = functions.of_study(tickets, names, options.level)
    _show(table, options.format, _functions)
    return 0


def connectivity(options: argparse.Namespace) -> int:
    """Say how high the error rises on the line between two tickets."""
    from tombola.analysis import connectivity

    tickets, names = _open(options)
    with _noted():
        table = connectivity.of_study(tickets, names, options.level, options.points)
    _show(table, options.format, _connectivity)
    return 0


def reinit(options: argparse.Namespace) -> int:
    """Keep what tickets share, draw all other weights anew, find tickets again; say what survives."""
    from tombola.analysis import reinit
    from tombola.cli.display import show_plan, showing
    from tombola.engine.local import LocalWorkers
    from tombola.engine.run import run
    from tombola.study.reinitialisation import plan as plan_draws

    tickets, names = _open(options)
    with _noted():
        plans = plan_draws(tickets, options.level, options.draws, names)
    count = options.count_workers(options)
    if options.plan:
        for plan in plans:
            print(f"seed {plan.seed}: {plan.kept.alive} of {plan.kept.total} connections kept")
            show_plan(plan.planner, count, options.format)
        return 0
    with LocalWorkers(count, tickets.study.task, options.data, tickets.planner.store.root) as workers:
        for plan in plans:
            with showing(plan.planner) as show, _printing_to(sys.stderr if options.format != "table" else sys.stdout):
                run(plan.planner, workers, show)
    with _noted():
        table = reinit.of_plans(plans)
    _show(table, options.format, _reinit)
    return 0


def _open(options: argparse.Namespace) -> tuple[Tickets, list[str] | None]:
    """Return the tickets and the importances to compare: those asked for, None for all of the study's.

    What `--importances` names is compared, out of the study's. The study may also have been run with others than its
    file says; then they are in the store.
    """
    from tombola.study.tickets import Tickets

    names, options.importances = options.importances, None
    planner, study = options.open_study(options)
    others = [name for name in names or () if name not in study.importances]
    if not others:
        return Tickets(planner), names or None
    known = study.importances
    options.importances = [*known, *others]
    planner, study = options.open_study(options)
    tickets = Tickets(planner)
    for name in others:
        if not any(len(tickets.progress(chain).tickets) > 1 for chain in planner.chains if chain.importance == name):
            raise UserError(
                f"--importances: the study has no importance {name!r}, and no result of it is in {planner.store.root}; "
                f"{did_you_mean(name, known)}"
            )
    return tickets, names


@contextmanager
def _noted() -> Iterator[None]:
    """Print warnings as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        _note(str(warning.message))


def _note(text: str) -> None:
    print(f"tombola: {text}", file=sys.stderr)


@contextmanager
def _printing_to(stream: Any) -> Iterator[None]:
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before


def _show(table: pl.DataFrame, form: str, shown: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Print a table: as csv or json with all its columns, as a table what fits."""
    import polars as pl

    from tombola.cli.display import show_table

    if form == "table":
        table = shown(table)
        columns = [_aligned(series) for series in table]
        show_table([name.replace("_", " ") for name in table.columns], list(zip(*columns, strict=True)), form)
        return
    if form == "csv":
        table = table.with_columns(pl.col(pl.List(pl.String)).list.join(" & "))
    show_table(table.columns, table.rows(), form)


def _aligned(series: pl.Series) -> list[str]:
    """Return a column as text, numbers to the right, `-` for what is not known."""
    cells = ["-" if value is None else str(value) for value in series]
    width = max(map(len, cells), default=0)
    return cells if series.name in _WORDS else [cell.rjust(width) for cell in cells]


_WORDS = {"importance", "kind", "tickets", "layer", "measure", "quantity", "collapsed"}


def _percent(column: str, digits: int = 2, *, sign: bool = False) -> pl.Expr:
    import polars as pl

    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return (pl.col(column) * 100).map_elements(form.format, return_dtype=pl.String)


def _number(column: str, form: str = "{:.3f}") -> pl.Expr:
    import polars as pl

    return pl.col(column).map_elements(form.format, return_dtype=pl.String)


def _range(low: str, high: str, form: str = "{:.2f}") -> pl.Expr:
    import polars as pl

    def text(pair: dict[str, Any]) -> str:
        first, last = pair.values()
        if first is None or last is None:
            return "-"
        return form.format(first) + " .. " + form.format(last)

    return pl.struct(low, high).map_elements(text, return_dtype=pl.String)


def _overlap_by_level(table: pl.DataFrame) -> pl.DataFrame:
    """One line a level, means over seeds: all tickets together, the pairs, the noise floor; each with its chance."""
    import polars as pl

    whole = table.filter(pl.col("layer") == "(all)")
    by_importance = whole.filter(pl.col("kind") == "importances")
    largest = max(by_importance["k"].to_list(), default=0)
    together = by_importance.filter(pl.col("k") == largest)
    parts = [
        together.group_by("level", maintain_order=True).agg(
            sparsity=1 - (pl.col("alive") / pl.col("connections")).mean(),
            together=pl.col("shared_of_ticket").mean(),
            by_layers=(pl.col("layers_expected") / pl.col("alive")).mean(),
            by_density=(pl.col("global_expected") / pl.col("alive")).mean(),
        )
    ]
    for name, rows in (
        ("pairs", by_importance.filter(pl.col("k") == 2)),
        ("floor", whole.filter((pl.col("kind") == "data order") & (pl.col("k") == 2))),
    ):
        parts.append(
            rows.group_by("level").agg(
                pl.col("jaccard").mean().alias(name), pl.col("layers_jaccard").mean().alias(f"{name}_chance")
            )
        )
    joined = parts[1].join(parts[0], on="level", how="left").join(parts[2], on="level", how="left").sort("level")
    return joined.select(
        pl.col("level"),
        _percent("sparsity").alias("sparsity %"),
        _percent("together").alias(f"% of a ticket shared by {largest}"),
        _percent("by_layers").alias("chance: layers"),
        _percent("by_density").alias("chance: density"),
        _percent("pairs").alias("Jaccard % of two importances"),
        _percent("pairs_chance").alias("chance"),
        _percent("floor").alias("noise floor: of two data orders"),
        _percent("floor_chance").alias("chance "),
    )


def _overlap_at_level(table: pl.DataFrame) -> pl.DataFrame:
    """Every comparison in total; layer by layer what all share, and the noise floor."""
    import polars as pl

    largest = max(table.filter(pl.col("kind") == "importances")["k"].to_list(), default=0)
    detailed = (pl.col("k") == largest) | (pl.col("kind") == "data order")
    shown = table.filter((pl.col("layer") == "(all)") | detailed)
    for side in ("layers_low", "layers_high", "global_low", "global_high", "layers_expected", "global_expected"):
        shown = shown.with_columns((pl.col(side) * 100 / pl.col("alive")).fill_nan(None))
    return shown.select(
        "level",
        "seed",
        "kind",
        pl.col("tickets").list.join(" & "),
        "layer",
        "connections",
        "shared",
        _percent("shared_of_ticket").alias("% of a ticket"),
        _number("layers_expected", "{:.2f}").alias("chance: layers"),
        _range("layers_low", "layers_high").alias("95 %"),
        _number("global_expected", "{:.2f}").alias("chance: density"),
        _range("global_low", "global_high").alias("95 % "),
        _percent("jaccard").alias("Jaccard %"),
        _number("kappa").alias("kappa"),
    )


def _layers(table: pl.DataFrame) -> pl.DataFrame:
    """One line a ticket and layer, means over seeds."""
    import polars as pl

    means = table.group_by("level", "importance", "layer", maintain_order=True).agg(
        pl.col("density", "ahead", "effective_density").mean(),
        pl.col("connections").first(),
        pl.col("alive").mean(),
        pl.col("collapsed").sum(),
        pl.len().alias("seeds"),
    )
    return means.select(
        "level",
        "importance",
        "layer",
        "connections",
        _percent("density").alias("density %"),
        _percent("ahead", sign=True).alias("ahead of the whole, points"),
        _percent("effective_density").alias("effective density %"),
        pl.when(pl.col("collapsed") > 0)
        .then(pl.format("{} of {} seeds", "collapsed", "seeds"))
        .otherwise(pl.lit(""))
        .alias("collapsed"),
    )


def _stability(table: pl.DataFrame) -> pl.DataFrame:
    return table.select(
        "level",
        "importance",
        "seed",
        "layer",
        "measure",
        "shared",
        "other",
        _number("shared_mean", "{:.4g}"),
        _number("other_mean", "{:.4g}"),
        _number("shared_q50", "{:.4g}").alias("shared median"),
        _number("other_q50", "{:.4g}").alias("other median"),
        _number("effect", "{:+.3f}"),
        _number("p", "{:.2g}"),
    )


def _winners(table: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    table = table.with_columns(pl.col("low") * 100, pl.col("high") * 100, sparsity=1 - pl.col("density"))
    return table.select(
        "importance",
        "level",
        _percent("sparsity").alias("sparsity %"),
        "seeds",
        _percent("dense_accuracy").alias("dense accuracy %"),
        _percent("accuracy").alias("accuracy %"),
        _percent("difference", sign=True).alias("difference, points"),
        _range("low", "high", "{:+.2f}").alias("95 %"),
        pl.when("surely").then(pl.lit("yes")).otherwise(pl.lit("no")).alias("surely within the margin"),
    )


def _weights(table: pl.DataFrame) -> pl.DataFrame:
    figures = ("min", "q05", "q25", "q50", "q75", "q95", "max")
    return table.select(
        "level", "importance", "seed", "quantity", "layer", "count", *(_number(name, "{:.4g}") for name in figures)
    )


def _functions(table: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    return table.with_columns(pl.col("low") * 100, pl.col("high") * 100).select(
        "level",
        "seed",
        "kind",
        pl.col("tickets").list.join(" & "),
        _percent("agreement").alias("agreement %"),
        _range("low", "high").alias("95 %"),
        _number("kappa"),
        _percent("accuracy").alias("mean accuracy %"),
        _percent("ensemble_accuracy").alias("of the ensemble %"),
    )


def _connectivity(table: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    lines = (
        table.with_columns(pl.col("tickets").list.join(" & "))
        .group_by("level", "seed", "kind", "tickets", maintain_order=True)
        .agg(
            first=pl.col("error").first(),
            second=pl.col("error").last(),
            highest=pl.col("error").max(),
            barrier=pl.col("barrier").first(),
        )
    )
    return lines.select(
        *("level", "seed", "kind", "tickets"),
        _percent("first").alias("error of the first %"),
        _percent("second").alias("of the second %"),
        _percent("highest").alias("highest on the line %"),
        _percent("barrier").alias("barrier, points"),
    )


def _reinit(table: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    for side in ("low", "high", "chance_low", "chance_high"):
        table = table.with_columns(pl.col(side) * 100)
    return table.select(
        *("level", "importance", "seed", "layer", "connections", "kept", "draws"),
        _number("survived", "{:.1f}"),
        _number("expected", "{:.1f}").alias("by chance"),
        _percent("excess", 1, sign=True).alias("more than chance, %"),
        _range("low", "high", "{:+.1f}").alias("95 %"),
        _range("chance_low", "chance_high", "{:+.1f}").alias("one draw by chance, 95 %"),
    )

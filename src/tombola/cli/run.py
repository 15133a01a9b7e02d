"""The verbs that run a study: `run` and `plan`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from tombola.cli.options import Verbs, open_planner, print_note, warnings_as_notes, whole_number
from tombola.errors import UserError
from tombola.terminal import say

if TYPE_CHECKING:
    from tombola.engine.estimate import Estimate
    from tombola.engine.workers import Workers
    from tombola.hooks import Hook
    from tombola.pruning.coverage import Coverage
    from tombola.study.planner import Planner


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    engine = verbs.add("run", run, verbs.study).add_argument_group(
        "engine", "Where the trainings run, and what they write to other programs."
    )
    engine.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="run on this machine or on a Ray cluster (default: %(default)s)",
    )
    engine.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the address of the Ray cluster (default: RAY_ADDRESS; without it, Ray is started on this machine)",
    )
    engine.add_argument(
        "--per-gpu",
        type=whole_number(1, 1000),
        metavar="N",
        help="how many trainings share one GPU, with Ray (default: 1)",
    )
    engine.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="WRITER=PLACE",
        help="write metrics, density and losses of each level to tensorboard=FOLDER or mlflow=URI; may be given twice",
    )
    engine.add_argument("--log-epochs", action="store_true", help="with --log, write the losses of each epoch too")
    verbs.add("plan", plan, verbs.study, verbs.table)


def run(options: argparse.Namespace) -> int:
    """Run the trainings of a study that are not in the store yet, and show the accuracy of every ticket."""
    from tombola import kernels
    from tombola.cli.results import show_results
    from tombola.engine.estimate import prior_speed
    from tombola.engine.run import run as run_study
    from tombola.hooks.tell import tell_hooks
    from tombola.study.task import UnusedWarning
    from tombola.study.tickets import Tickets
    from tombola.workbench.progress import show_progress
    from tombola.workbench.runs import count_workers, describe_stopped, prepare_store, try_study

    _check_together(options)
    hooks = [open_writer(each) for each in options.log]
    planner = open_planner(options)
    study, local = planner.study, options.engine == "local"
    device = study.device if local else "cpu"  # GPUs may be on other machines
    with warnings_as_notes(UnusedWarning):
        try_study(planner, device)
    prepare_store(planner, options.store)
    if device == "cpu" and not kernels.available():
        say(f"note: {kernels.MISSING}", file=sys.stderr)
    if planner.kernel_fault is not None:
        print_note(planner.kernel_fault)
    speed = prior_speed(planner, count_workers(options.workers, study.device), options.data) if local else None
    epochs = options.log_epochs
    with (
        open_workers(options, planner) as workers,
        show_progress(planner, workers.count) as show,
        tell_hooks(show, hooks, planner, workers, epochs=epochs) as tell,
    ):
        status = run_study(planner, workers, tell, speed=speed, tells_epochs=epochs)
    stopped = describe_stopped(status)
    if status.done == 0 and not stopped:
        say(f"every training of this study is in {planner.store.root} already; nothing was trained")
    show_results(Tickets(planner), "table")
    if stopped:
        raise UserError(f"{stopped}; all other results are kept")
    return 0


def _check_together(options: argparse.Namespace) -> None:
    """Raise `UserError` if an option is given without the one that it belongs to."""
    for option, value in (("--address", options.address), ("--per-gpu", options.per_gpu)):
        if value is not None and options.engine == "local":
            raise UserError(f"{option} is for --engine ray")
    if options.log_epochs and not options.log:
        raise UserError("--log-epochs is for --log WRITER=PLACE, which is missing")


def open_writer(text: str) -> Hook:
    """Return the hook that `--log WRITER=PLACE` asks for.

    >>> open_writer("wandb=here")
    Traceback (most recent call last):
    tombola.errors.UserError: --log: expected tensorboard=FOLDER or mlflow=URI, got 'wandb=here'
    """
    from tombola import hooks

    name, _, place = text.partition("=")
    if name not in ("tensorboard", "mlflow") or not place:
        raise UserError(f"--log: expected tensorboard=FOLDER or mlflow=URI, got {text!r}")
    return hooks.tensorboard(place) if name == "tensorboard" else hooks.mlflow(place)


def plan(options: argparse.Namespace) -> int:
    """Show which trainings a run would do, which are in the store already, and the time and disk space of the run."""
    from tombola.engine.estimate import estimate
    from tombola.study.task import UnusedWarning
    from tombola.workbench.runs import count_workers, try_study

    planner = open_planner(options)
    with warnings_as_notes(UnusedWarning):
        try_study(planner)
    if planner.kernel_fault is not None:
        print_note(planner.kernel_fault)
    workers = count_workers(options.workers, planner.study.device)
    show_plan(planner, estimate(planner, workers, options.data), workers, options.format)
    return 0


def show_plan(planner: Planner, expected: Estimate, workers: int, form: str) -> None:
    """Print which trainings a run would do, which exist already, and the expected time and disk space."""
    from tombola.cli.tables import emit, show_table, size, wrap
    from tombola.workbench.text import count, duration

    lines = [
        [chain.importance, chain.seed, chain.order_seed, there, to_find] for chain, there, to_find in expected.chains
    ]
    header = ["importance", "seed", "data seed", "tickets there", "tickets to find"]
    if form == "json":
        keys = [title.replace(" ", "_") for title in header]
        document = {
            "existing": expected.existing,
            "to_train": expected.to_train,
            "seconds_per_training": expected.seconds_each,
            "seconds": expected.seconds,
            "critical_seconds": expected.critical[1]
            if expected.critical
            else None
            if expected.seconds is None
            else 0.0,
            "critical_chain": str(expected.critical[0]) if expected.critical else None,
            "workers": workers,
            "bytes": expected.bytes,
            "coverage": _coverage_to_json(planner.coverage),
            "chains": [dict(zip(keys, line, strict=True)) for line in lines],
        }
        emit(json.dumps(document, indent=1))
        return
    show_table(header, lines, form)
    if form == "csv":
        return
    say(wrap(planner.describe_counted()))
    print_coverage(planner.coverage)
    if planner.study.score_at == "rewind":
        say(wrap("The rewind point alone decides the masks, so all levels of a chain can be trained side by side."))
    if not expected.to_train:
        say(f"all {expected.existing} trainings are in {planner.store.root}: nothing is left to do")
        return
    say(f"{count(expected.to_train, 'training')} to do, {expected.existing} in {planner.store.root} already")
    if expected.seconds is None or expected.seconds_each is None:
        say(f"time: not known: {expected.source}")
    else:
        say(f"time: about {duration(expected.seconds)} on {count(workers, 'worker')}, ", end="")
        say(f"{duration(expected.seconds_each)} per training ({expected.source})")
    if expected.critical:
        chain, seconds = expected.critical
        say(f"critical path: {chain}, {duration(seconds)} with any number of workers")
    say(f"disk: about {size(expected.bytes)}")


def _coverage_to_json(coverage: Coverage) -> dict[str, Any]:
    keys = ("role", "tensors", "parameters", "share", "largest")
    return {
        "parameters": coverage.total,
        "counted": coverage.counted,
        "warning": coverage.warn() or None,
        "parts": [dict(zip(keys, row, strict=True)) for row in coverage.tabulate()],
    }


def print_coverage(coverage: Coverage) -> None:
    """Print which tensors are pruned, kept dense, left out and not chosen."""
    from tombola.cli.tables import show_table

    rows = [(*row[:3], f"{100 * row[3]:.2f}", row[4]) for row in coverage.tabulate()]
    show_table(["parameters that are", "tensors", "parameters", "%", "the largest"], rows, "table")


def open_workers(options: argparse.Namespace, planner: Planner) -> Workers:
    """Return the workers that the options select.

    Args:
        options: the options of the command line.
        planner: the planner of the study.
    """
    if options.engine == "local":
        from tombola.workbench.runs import open_workers

        return open_workers(planner, options.workers, options.data)
    try:
        from tombola.engine.ray import RayWorkers
    except ImportError as error:
        raise UserError(f"--engine ray: {error}; install it with: pip install 'tombola[ray]'") from error
    return RayWorkers(
        options.workers,
        planner.problem,
        planner.study,
        planner.store,
        address=options.address,
        per_gpu=options.per_gpu or 1,
    )

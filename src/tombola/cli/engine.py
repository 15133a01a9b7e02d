"""The options of `tombola run` that say who does the trainings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tombola.errors import UserError

if TYPE_CHECKING:
    from tombola.engine.workers import Workers
    from tombola.study.planner import Planner


def add_options(run: argparse.ArgumentParser) -> None:
    """Add the options to the verb `run`."""
    engine = run.add_argument_group("engine", "who does the trainings")
    engine.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    engine.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster (RAY_ADDRESS, or a Ray of its own)")
    engine.add_argument("--per-gpu", type=_from_one, default=1, metavar="N", help="trainings side by side on one GPU")


def workers_of(options: argparse.Namespace, planner: Planner, cores: int) -> Workers:
    """Return the workers that the options ask for.

    Args:
        options: of the command line.
        planner: of the study.
        cores: how many trainings go side by side on this machine.
    """
    task, store = planner.study.task, planner.store
    if options.engine == "local":
        if options.address is not None:
            raise UserError("--address is for --engine ray")
        from tombola.engine.local import LocalWorkers

        return LocalWorkers(cores, task, options.data, store.root)
    try:
        from tombola.engine.ray import RayWorkers
    except ImportError as error:
        raise UserError(f"--engine ray: {error}; install it with: pip install 'tombola[ray]'") from error
    return RayWorkers(
        options.workers, planner.problem, planner.study, store, address=options.address, per_gpu=options.per_gpu
    )


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)

"""Estimates: how long a study will take and how much disk."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from tombola.engine.run import remaining
from tombola.planning import Chain, Planner
from tombola.training import Checkpoint, train

_TIMED_ITERATIONS = 30
_TIMED_SECONDS = 5.0


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Args:
        chains: for each chain the tickets that are there and those to be found.
        existing: trainings that are there.
        to_train: trainings to do, as far as can be told: chains that come to the same mask share more.
        seconds_each: of one training.
        source: how that is known.
        seconds: of the whole on the workers asked for.
        bytes: of the results to come.
    """

    chains: tuple[tuple[Chain, int, int], ...]
    existing: int
    to_train: int
    seconds_each: float
    source: str
    seconds: float
    bytes: int


def estimate(planner: Planner, workers: int) -> Estimate:
    """Estimate a study's run from the trainings of it that are done, or from a few iterations timed now."""
    progress = {chain: planner.progress(chain) for chain in [*planner.chains, *planner.repeats]}
    keys = set()
    speeds = []
    for chain in progress:
        for key in planner.keys(chain):
            if key not in keys and (record := planner.store.record(key)).get("iterations"):
                speeds.append(record["seconds"] / record["iterations"])
            keys.add(key)
    to_train = remaining(list(progress.values()))
    length = planner.end - planner.study.recipe.rewind
    if not to_train:
        each, source = 0.0, "nothing to do"
    elif speeds:
        each, source = statistics.median(speeds) * length, f"from the {len(speeds)} that are done"
    else:
        each, source = _timed(planner) * length, "from a few iterations timed now"
    longest = max(each_progress.remaining for each_progress in progress.values())
    chains = tuple((chain, len(p.tickets), planner.study.levels + 1 - len(p.tickets)) for chain, p in progress.items())
    missing = [
        level for p in progress.values() if p.waits_for for level in range(len(p.tickets), planner.study.levels + 1)
    ]
    sizes = sum(_bytes(planner, level) for level in missing) * to_train // max(1, len(missing))
    return Estimate(chains, len(keys), to_train, each, source, each * max(to_train / workers, longest), sizes)


def _timed(planner: Planner) -> float:
    """Return the seconds of one iteration of the dense network, one thread, after a first one."""
    seed = planner.study.seeds[0]
    marks: list[float] = []

    class _EnoughError(Exception):
        pass

    def watch(iteration: int, checkpoint: Callable[[], Checkpoint]) -> None:
        marks.append(time.perf_counter())
        if len(marks) > _TIMED_ITERATIONS or (len(marks) > 1 and marks[-1] - marks[0] > _TIMED_SECONDS):
            raise _EnoughError

    problem, recipe = planner.problem, planner.study.recipe
    try:
        train(problem.build(), planner.initial(seed).state, planner.dense, problem.data, recipe, seed,
              loss=problem.loss, device=planner.study.device, watch=watch)  # fmt: skip
    except _EnoughError:
        pass
    return statistics.median(after - before for before, after in itertools.pairwise(marks))


def _bytes(planner: Planner, level: int) -> int:
    """Return about how much a result of a level takes: weights that are alive, a bit a connection, all the rest."""
    state = planner.initial(planner.study.seeds[0]).state
    rest = sum(t.nbytes for name, t in state.items() if name not in planner.dense)
    alive = planner.dense.total * (1 - planner.study.fraction) ** level
    return int(4 * alive + planner.dense.total / 4 + rest) + 4000

"""Estimates of searches: what a search trains at most, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tombola.engine.estimate import DivergedError, measure_speed, result_bytes
from tombola.engine.forecast import Speed, Step, makespan
from tombola.engine.search import follow
from tombola.lottery.search import Ask, Strategy, imagine
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.study.searches import list_chains

Stage = tuple[int, str, int, int, int]
"""A training of a search: the number of its trial, the path to it with its importance, its level, -1 for the rewind
point, its iterations, and those in which its mask is learned before."""


@dataclass(frozen=True)
class Part:
    """The trainings of one trial of a search.

    Args:
        seed: the seed.
        iterations: the iterations of a complete training.
        trainings: all of them at most, in complete trainings: one that ends early counts as the part that it is, and a
            mask that is learned as the training that sees as many examples.
        there: those that the store has, in complete trainings.
    """

    seed: int
    iterations: int
    trainings: float
    there: float


@dataclass(frozen=True)
class Outlook:
    """What a search trains at most, see `tombola.lottery.search.imagine`, if no ticket is refuted by the judges.

    Args:
        parts: the trainings of each trial; the first is that of the search.
        work: all of them, in complete trainings.
        to_do: those that the store does not have, in complete trainings.
        seconds: the time of these on the given number of workers; None if a training diverges while it is timed.
        source: the source of the time, for the user.
        bytes: the size of the results to come.
    """

    parts: tuple[Part, ...]
    work: float
    to_do: float
    seconds: float | None
    source: str
    bytes: int


def estimate_search(
    trials: Sequence[tuple[Planner, int]],
    strategy: Strategy,
    workers: int,
    directory: Path | None = None,
    *,
    here: bool = False,
) -> Outlook:
    """Estimate a search from finished trainings of its chains, or from a few iterations that are timed now.

    Args:
        trials: a planner and a seed for each trial, see `tombola.engine.search.search`.
        strategy: the strategy.
        workers: the number of workers.
        directory: the folder of the data sets.
        here: whether only this process can train, by functions of its own.
    """
    planner = trials[-1][0]
    study = planner.study
    cases = imagine(strategy, study.importances, study.levels, len(trials))
    asks = max(cases, key=lambda case: _sum_iterations(_list_stages(trials, case)))
    stages = _list_stages(trials, asks)
    there = _list_stored(trials, asks)
    missing = [stage for stage in stages if stage not in there]
    parts = []
    for number, (own, seed) in enumerate(trials):
        mine = [stage for stage in stages if stage[0] == number]
        stored = [stage for stage in mine if stage in there]
        parts.append(Part(seed, own.end, *(_sum_iterations(some) / own.end for some in (mine, stored))))
    work, to_do = (_sum_iterations(some) / planner.end for some in (stages, missing))
    densities = [(1 - study.fraction) ** max(0, level) for _, _, level, *_ in missing]
    size = sum(result_bytes(trials[stage[0]][0], density) for stage, density in zip(missing, densities, strict=True))
    if not missing:
        return Outlook(tuple(parts), work, 0.0, 0.0, "nothing to do", 0)
    try:
        chains = [follow(trials[trial][0], chain) for ask in asks for trial, chain in _list_chains(trials, ask)]
        speed = measure_speed(planner, chains, workers, directory, here=here)
    except DivergedError as error:
        return Outlook(tuple(parts), work, to_do, None, str(error), size)
    return Outlook(tuple(parts), work, to_do, _measure_time(trials, asks, there, speed, workers), speed.source, size)


def _list_chains(trials: Sequence[tuple[Planner, int]], ask: Ask) -> list[tuple[int, Chain]]:
    """Return the chains that are asked for, each with the number of its trial."""
    return [
        (trial, chain)
        for trial in ask.trials
        for each in ask.candidates
        for chain in list_chains(each, trials[trial][1])
    ]


def _list_path(planner: Planner, trial: int, chain: Chain) -> list[Stage]:
    """Return the trainings of a chain; all importances share the dense network."""
    levels = planner.levels(chain)
    stages = [(trial, "", -1, planner.length(chain, -1), 0)] if planner.study.recipe.rewind else []
    for number, level in enumerate(levels):
        name = f"{chain.importance} {list(levels[1 : number + 1])} {chain.early}" if level else ""
        learning = planner.learning_length(chain.importance) if level else 0
        stages.append((trial, name, level, planner.length(chain, level), learning))
    return stages


def _list_stages(trials: Sequence[tuple[Planner, int]], asks: Sequence[Ask]) -> list[Stage]:
    """Return all trainings of a search, each once, in their order."""
    return list(
        dict.fromkeys(
            stage
            for ask in asks
            for trial, chain in _list_chains(trials, ask)
            for stage in _list_path(trials[trial][0], trial, chain)
        )
    )


def _list_stored(trials: Sequence[tuple[Planner, int]], asks: Sequence[Ask]) -> set[Stage]:
    """Return the trainings of a search that the store has."""
    found = set[Stage]()
    for ask in asks:
        for trial, chain in _list_chains(trials, ask):
            planner = trials[trial][0]
            found |= set(_list_path(planner, trial, chain)[: len(follow(planner, chain).trainings)])
    return found


def _sum_iterations(stages: Sequence[Stage]) -> int:
    return sum(iterations + learning for *_, iterations, learning in stages)


def _measure_time(
    trials: Sequence[tuple[Planner, int]], asks: Sequence[Ask], there: set[Stage], speed: Speed, workers: int
) -> float:
    """Return the seconds of a search, whose tickets are trained side by side if they are asked for together."""
    seconds, done = speed.start, set(there)
    for ask in asks:
        paths = []
        for trial, chain in _list_chains(trials, ask):
            planner = trials[trial][0]
            paths.append(
                [
                    Step(
                        (f"{trial} {name} {iterations}", level),
                        speed.training((1 - planner.study.fraction) ** max(0, level), iterations, learning),
                    )
                    for stage in _list_path(planner, trial, chain)
                    if stage not in done
                    for _, name, level, iterations, learning in [stage]
                ]
            )
        seconds += makespan(paths, workers)
        done |= set(_list_stages(trials, [ask]))
    return seconds

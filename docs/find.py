"""Measure the strategies of `tombola find`: the tables of docs/find.md.

    python docs/find.py strategies STUDY [STORE] [--data DIR]    what each strategy finds, and its work
    python docs/find.py seeds [STORE]                            how often fresh seeds refute what is found on digits

Everything is stored, so that a second call only reads. The unit of work is one complete training.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from tombola.analysis.frontier import chance_outside
from tombola.engine.search import Budget, search
from tombola.lottery.search import Candidate, Known, find_strategy
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.schema import load_study
from tombola.study.task import load_problem
from tombola.threads import one_thread
from tombola.workbench import find, run, winners
from tombola.workbench.find import work_of_rounds
from tombola.workbench.runs import open_workers

STRATEGIES = ("race", "short", "one-shot", "bisect", "rounds")

STUDIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "digits": ("digits", {"seeds": [0, 1, 2], "data_seeds": [], "task.validation": 0.3}, 0.01),
    "lenet-mnist": (
        "lenet-mnist",
        {
            "importances": ["magnitude", "l1"],
            "data_seeds": [],
            "data_seeds_for": [],
            "levels": 16,
            "recipe.epochs": 6,
            "task.dataset_arguments": {"train_per_class": 400, "test_per_class": 200},
            "task.validation": 0.3,
        },
        0.01,
    ),
}
"""By name: the preset, the fields that are overridden, and the margin."""

CHECKED = {
    "importances": ["magnitude"],
    "seeds": list(range(10)),
    "data_seeds": [],
    "task.validation": 0.3,
    "recipe.epochs": 5,
}
"""The study whose finds are checked with fresh seeds."""


def measure_strategies(name: str, store: Path, data: str | None) -> None:
    """Run the whole study, then search with each strategy, and print a line for each."""
    preset, fields, margin = STUDIES[name]
    where = {"store": store, "data": data, "workers": 1}
    run(preset, fields, progress=False, **where)
    best = winners(preset, fields, store=store, data=data, margin=margin).sort("level").row(-1, named=True)
    whole = work_of_rounds(load_study(preset, fields))
    print(
        f"all rounds: {best['importance']}, level {best['level']}, difference {100 * best['difference']:+.2f}, {whole}"
    )
    for strategy in STRATEGIES:
        found = find(preset, fields, within=margin, strategy=strategy, progress=False, **where)
        seen = found.verdict
        path = " ".join(map(str, seen["path"]))
        print(
            f"| `{strategy}` | {seen['importance']} | {seen['level']} ({path}) | {100 * seen['difference']:+.2f} | "
            f"{100 * seen['low']:+.2f} .. {100 * seen['high']:+.2f} | "
            f"{100 * (seen['test'] - seen['dense_test']):+.2f} | "
            f"{seen['work']:.1f} | {100 * seen['work'] / whole:.0f} % |",
            flush=True,
        )


def ask_once(candidate: Candidate, known: Known) -> tuple[Candidate, ...]:
    """Ask for one ticket, as a strategy."""
    return () if known.gains else (candidate,)


def check_seeds(store: Path, margin: float = 0.01, judges: int = 3) -> None:
    """Search on digits from each of ten seeds, with the next three as judges, and ask the other six about the find."""
    study = load_study("digits", CHECKED)
    planner = Planner(study, load_problem(study.task), Store(store))
    measure = planner.problem.measure
    seeds, outside, expected, inside, unseen = study.seeds, [], [], [], []
    with open_workers(planner, 1, None) as workers:
        for first in seeds:
            turn = [seeds[(first + step) % len(seeds)] for step in range(len(seeds))]
            trials = [(planner, seed) for seed in turn[: 1 + judges]]
            walk = search(trials, workers, lambda *_: None, find_strategy("race"), margin=margin, budget=Budget())
            found = walk.end.found
            if found is None:
                print(f"seed {first}: nothing found")
                continue
            judged = [walk.known.gains[found][trial] for trial in range(1, 1 + judges)]
            everyone = [(planner, seed) for seed in turn]
            asked = search(everyone, workers, lambda *_: None, partial(ask_once, found), margin=1.0)
            fresh = [asked.known.gains[found][trial] for trial in range(1 + judges, len(seeds))]
            refuted = [gain < -margin - 1e-9 for gain in fresh]
            chance = chance_outside(judged, margin)
            outside += refuted
            expected.append(chance)
            mean = statistics.fmean(fresh)
            spread = statistics.stdev(judged) / len(judged) ** 0.5
            low, high = (statistics.fmean(judged) + sign * 4.303 * spread for sign in (-1, 1))
            inside.append(low <= mean <= high)
            unseen.append(mean)
            print(
                f"| {first} | {found.level} | {100 * statistics.fmean(judged):+.2f} | "
                f"{100 * low:+.2f} .. {100 * high:+.2f} | {100 * mean:+.2f} | {100 * chance:.0f} % | "
                f"{sum(refuted)} of {len(refuted)} |",
                flush=True,
            )
    print(
        f"{measure.label}: outside the margin {sum(outside)} of {len(outside)} "
        f"({100 * statistics.fmean(outside):.0f} %), stated {100 * statistics.fmean(expected):.0f} %; "
        f"mean of fresh seeds in the interval {sum(inside)} of {len(inside)}"
    )


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("strategies", "seeds"))
    parser.add_argument("study", nargs="?", choices=sorted(STUDIES), default="digits")
    parser.add_argument("--store", type=Path, default=Path("find-store"))
    parser.add_argument("--data")
    options = parser.parse_args()
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options.what == "strategies":
            measure_strategies(options.study, options.store, options.data)
        else:
            check_seeds(options.store)


if __name__ == "__main__":
    main()

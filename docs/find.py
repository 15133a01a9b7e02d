"""Measure the strategies of `tombola find`: the tables of docs/find.md.

    python docs/find.py strategies STUDY    what each strategy finds, and its work
    python docs/find.py order STUDY         whether short trainings rank levels and importances as complete ones do
    python docs/find.py shared STUDY        whether connections that importances share make better tickets
    python docs/find.py learned STUDY       whether masks that are learned at the rewind point make better tickets
    python docs/find.py seeds               how often fresh seeds refute what is found on digits

Everything is stored, so that a second call only reads. The unit of work is one complete training.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

import tombola
from tombola.analysis.frontier import verdict
from tombola.engine.run import run
from tombola.engine.search import Budget, measure_gain, search
from tombola.lottery.search import Candidate, Known, find_strategy
from tombola.pruning.mask import Mask
from tombola.store.store import Store
from tombola.study.chains import Chain, Start
from tombola.study.early import prune_at_once
from tombola.study.planner import Planner
from tombola.study.schema import Study, load_study
from tombola.study.searches import shorten_study
from tombola.study.singles import plan_singles
from tombola.study.task import load_problem
from tombola.study.tickets import Tickets
from tombola.threads import one_thread
from tombola.workbench.find import work_of_rounds
from tombola.workbench.runs import open_workers, prepare_store
from tombola.workbench.studies import open_planner

STRATEGIES = ("race", "early", "short", "one-shot", "bisect", "rounds")

SMALL_LENET: dict[str, Any] = {
    "importances": ["magnitude", "l1"],
    "data_seeds": [],
    "data_seeds_for": [],
    "levels": 16,
    "recipe.epochs": 6,
    "task.dataset_arguments": {"train_per_class": 400, "test_per_class": 200},
    "task.validation": 0.3,
}
"""The fields of a LeNet preset that are overridden to make it small."""

SMALL_RESNET: dict[str, Any] = {
    "importances": ["magnitude", "l1"],
    "seeds": [0, 1, 2],
    "data_seeds": [],
    "data_seeds_for": [],
    "fraction": 0.2,
    "levels": 20,
    "task.dataset": "image-folder",
    "task.dataset_arguments": {
        "path": "cifar10-images.tar.xz",
        "train_per_class": 500,
        "test_per_class": 200,
        "normalisation": "imagenet",
    },
    "task.validation": 0.3,
}
"""The fields of resnet20-cifar10-small that are overridden: rounds of 20 %, and the images as files."""


def diabetes() -> tombola.Dataset:
    """Return the data of docs/examples/tabular-regression.md."""
    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    inputs, targets = ((part - part.mean(0)) / part.std(0) for part in (inputs, targets[:, None]))
    return tombola.Dataset("diabetes", inputs[:350], targets[:350], inputs[350:], targets[350:], classes=())


def regressor() -> nn.Module:
    """Return the network of docs/examples/tabular-regression.md."""
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def rows() -> tombola.Dataset:
    """Return the data of docs/examples/lstm.md: digits of 8 x 8 pixels as sequences of 8 rows."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    inputs, labels = images.float().view(-1, 8, 8) / 16, labels.long()
    return tombola.Dataset("rows", inputs[:1200], labels[:1200], inputs[1200:], labels[1200:], tuple("0123456789"))


class Reader(nn.Module):
    """The LSTM of docs/examples/lstm.md."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the class scores of sequences, shape (examples, 10)."""
        states, _ = self.lstm(rows)
        return self.out(states.mean(1))


def define(name: str) -> tuple[Study, float]:
    """Return the study of a name, and the margin."""
    if name == "digits":
        return load_study(name, {"seeds": [0, 1, 2], "data_seeds": [], "task.validation": 0.3}), 0.01
    if name == "diabetes":
        task = tombola.Task(dataset=diabetes, model=regressor, loss="mse", metrics=["r2"], validation=0.3)
        recipe = tombola.Recipe(optimizer="adamw", lr=3e-3, epochs=8, batch_size=28)
        study = Study(task=task, recipe=recipe, importances=["magnitude", "l1"], seeds=[0, 1, 2], levels=16)
        return study, 0.05
    if name == "lstm":
        task = tombola.Task(dataset=rows, model=Reader, validation=0.3)
        recipe = tombola.Recipe(optimizer="adam", lr=1e-2, clip_norm=1.0, epochs=10, batch_size=50)
        return Study(task=task, recipe=recipe, importances=["magnitude", "l2"], seeds=[0, 1, 2], levels=16), 0.01
    if name == "lenet-fashion-complete":
        few = {"importances": ["magnitude", "l1"], "data_seeds": [], "data_seeds_for": []}
        return load_study("lenet-fashion", few), 0.01
    if name == "lenet-mnist-complete":
        few = {"importances": ["magnitude", "l1"], "data_seeds": [], "data_seeds_for": []}
        return load_study("lenet-mnist", few | {"task.validation": 0.1}), 0.005
    if name == "resnet20-cifar10-small":
        return load_study(name, SMALL_RESNET), 0.02
    return load_study(name, SMALL_LENET), 0.01


STUDIES = (
    "digits",
    "lenet-mnist",
    "lenet-mnist-complete",
    "lenet-fashion",
    "lenet-fashion-complete",
    "resnet20-cifar10-small",
    "diabetes",
    "lstm",
)

CHECKED = {
    "importances": ["magnitude"],
    "seeds": list(range(20)),
    "data_seeds": [],
    "task.validation": 0.3,
    "recipe.epochs": 5,
}
"""The study whose finds are checked with fresh seeds."""

SEARCHED = 10
"""The number of its seeds that search and judge; the others are asked afterwards."""


def measure_strategies(study: Study, margin: float, **where: Any) -> None:
    """Run the whole study, then search with each strategy, and print a line for each."""
    tombola.run(study, progress=False, workers=1, **where)
    best = tombola.winners(study, margin=margin, **where).sort("level").row(-1, named=True)
    whole = work_of_rounds(open_planner(study, **where))
    print(
        f"all rounds: {best['importance']}, level {best['level']}, difference {100 * best['difference']:+.2f}, {whole}"
    )
    for strategy in STRATEGIES:
        try:
            found = tombola.find(study, within=margin, strategy=strategy, progress=False, workers=1, **where)
        except tombola.UserError as error:
            print(f"| `{strategy}` | {error} |", flush=True)
            continue
        seen = found.verdict
        path = " ".join(map(str, seen["path"]))
        print(
            f"| `{strategy}` | {seen['importance']} | {seen['level']} ({path}) | {100 * seen['difference']:+.2f} | "
            f"{100 * seen['low']:+.2f} .. {100 * seen['high']:+.2f} | "
            f"{100 * (seen['test'] - seen['dense_test']):+.2f} | "
            f"{seen['work']:.1f} | {100 * seen['work'] / whole:.0f} % |",
            flush=True,
        )


Gains = dict[tuple[str, int, int], float]
"""The gain of a ticket over its dense network by importance, seed and level; -inf if its training diverged."""


def measure_order(study: Study, margin: float, **where: Any) -> None:
    """Compare complete trainings of all rounds with trainings of a quarter of the length, and print the comparison."""
    short = shorten_study(study, "short")
    gains: list[Gains] = []
    for each in (short, study):
        tombola.run(each, progress=False, workers=1, **where)
        gains.append(read_gains(each, **where))
    levels = range(1, study.levels + 1)
    for importance in study.importances:
        columns = [importance]
        columns += [
            f"{correlate_levels(correlate, kind, gains[1], importance, study.seeds, levels):.2f}"
            for kind in gains
            for correlate in (spearmanr, kendalltau)
        ]
        for kind in gains:
            last = [find_last(kind, importance, [seed], levels, margin) for seed in study.seeds]
            columns.append(", ".join(map(str, last)))
        columns.append(str(find_last(gains[1], importance, study.seeds, levels, margin)))
        print(f"| {' | '.join(columns)} |", flush=True)
    if len(study.importances) > 2:
        found = [list(correlate_importances(kind, gains[1], study, levels)) for kind in gains]
        print("between importances, mean over levels and seeds:", *(f"{statistics.fmean(each):.2f}" for each in found))


def read_gains(study: Study, **where: Any) -> Gains:
    """Return the gains of the stored tickets of a study."""
    planner = open_planner(study, **where)
    tickets, measure, gains = Tickets(planner), planner.problem.measure, Gains()
    for seed in study.seeds:
        for importance in study.importances:
            chain = tickets.measure(Chain(seed, importance))
            values = [ticket.trained.history.value(measure) if ticket.trained else None for ticket in chain]
            for level in range(1, study.levels + 1):
                value = values[level] if level < len(values) else None
                known = value is not None and values[0] is not None
                gains[importance, seed, level] = measure_gain(value, values[0], measure) if known else -math.inf
    return gains


def mean_gain(gains: Gains, importance: str, seeds: Sequence[int], level: int) -> float:
    """Return the mean gain over seeds."""
    return statistics.fmean(gains[importance, seed, level] for seed in seeds)


def correlate_levels(
    correlate: Any, kind: Gains, whole: Gains, importance: str, seeds: Sequence[int], levels: Sequence[int]
) -> float:
    """Return the rank correlation over levels of one seed's gains with the complete trainings of the other seeds.

    It is the mean over the seeds.
    """
    found = []
    for seed in seeds:
        others = [each for each in seeds if each != seed]
        own = [kind[importance, seed, level] for level in levels]
        found.append(correlate(own, [mean_gain(whole, importance, others, level) for level in levels]).statistic)
    return statistics.fmean(found)


def correlate_importances(kind: Gains, whole: Gains, study: Study, levels: Sequence[int]) -> Iterator[float]:
    """Yield Spearman's rank correlation over importances, as above, for each seed and level at which it is defined."""
    for seed in study.seeds:
        others = [each for each in study.seeds if each != seed]
        for level in levels:
            own = [kind[importance, seed, level] for importance in study.importances]
            theirs = [mean_gain(whole, importance, others, level) for importance in study.importances]
            if len(set(own)) > 1 and len(set(theirs)) > 1:
                yield spearmanr(own, theirs).statistic


def find_last(gains: Gains, importance: str, seeds: Sequence[int], levels: Sequence[int], margin: float) -> int:
    """Return the sparsest level whose mean gain over seeds is within the margin; 0 if none is."""
    kept = [level for level in levels if mean_gain(gains, importance, seeds, level) >= -margin - 1e-9]
    return max(kept, default=0)


def measure_shared(study: Study, levels: Sequence[int], **where: Any) -> None:
    """Prune the dense networks at once by each importance, and by how many importances keep a connection; train all.

    Print the mean difference from the dense networks over the seeds, for each level a line.
    """
    planner = open_planner(study, **where)
    prepare_store(planner, where["store"])
    with open_workers(planner, 1, None) as workers:
        run(planner, workers, lambda *_: None, [Chain(seed, study.importances[0], early=True) for seed in study.seeds])
        tickets = Tickets(planner)
        starts: dict[Chain, Start] = {}
        for seed, level in product(study.seeds, levels):
            dense = tickets.progress(Chain(seed, study.importances[0], early=True)).tickets[0]
            density = (1 - study.fraction) ** level
            masks = {
                each: prune_at_once(planner, dense.trained.weights, dense.rewind, each, density, seed)
                for each in study.importances
            }
            masks["shared first"] = keep_shared(masks, dense.trained.weights.load(), planner.kept_dense)
            for name, mask in masks.items():
                chain = Chain(seed, f"{name}, at once to level {level}")
                starts[chain] = Start(level, dense.rewind, mask, study.recipe.rewind, planner.end)
        singles = plan_singles(tickets, starts, {"verb": "shared"})
        run(singles, workers, lambda *_: None)
    own, measure = Tickets(singles), planner.problem.measure
    names = [*study.importances, "shared first"]
    print(f"| level | {' | '.join(names)} |", flush=True)
    for level in levels:
        columns = []
        for name in names:
            gains = []
            for seed in study.seeds:
                before = tickets.measure(Chain(seed, study.importances[0], early=True))[0]
                after = own.measure(Chain(seed, f"{name}, at once to level {level}"))[0]
                gains.append(
                    measure_gain(after.trained.history.value(measure), before.trained.history.value(measure), measure)
                )
            columns.append(f"{100 * statistics.fmean(gains):+.2f}")
        print(f"| {level} | {' | '.join(columns)} |", flush=True)


def measure_learned(study: Study, levels: Sequence[int], **where: Any) -> None:
    """Compare tickets of learned masks with those of magnitude, by rounds and at once.

    Print the mean difference from the dense networks over the seeds, for each level a line.
    """
    rounds = study.model_copy(update={"importances": ("magnitude",), "levels": max(levels)})
    tombola.run(rounds, progress=False, workers=1, **where)
    by_rounds = read_gains(rounds, **where)
    print("| level | magnitude, level by level | magnitude, at once | `concrete`, at once |", flush=True)
    for level in levels:
        gains = [mean_gain(by_rounds, "magnitude", study.seeds, level)]
        for importance, score_at in (("magnitude", "end"), ("concrete", "rewind")):
            once = {"importances": (importance,), "levels": 1, "fraction": 1 - (1 - study.fraction) ** level}
            at_once = study.model_copy(update={**once, "score_at": score_at})
            tombola.run(at_once, progress=False, workers=1, **where)
            gains.append(mean_gain(read_gains(at_once, **where), importance, study.seeds, 1))
        print(f"| {level} | {' | '.join(f'{100 * gain:+.2f}' for gain in gains)} |", flush=True)


def keep_shared(masks: Mapping[str, Mask], weights: Mapping[str, Tensor], kept_dense: Collection[str]) -> Mask:
    """Return the mask, of as many connections as each mask has, of those that most masks have; then of larger |w|."""
    first = next(iter(masks.values()))
    layers = [layer for layer in first if layer not in kept_dense]
    votes = {layer: torch.stack([mask[layer] for mask in masks.values()]).sum(0) for layer in layers}
    largest = max(float(weights[layer].abs().max()) for layer in layers)
    scores = {layer: votes[layer].double() + weights[layer].abs().double() / (1 + largest) for layer in layers}
    alive = sum(first.counts[layer] for layer in layers)
    lowest = torch.cat([each.flatten() for each in scores.values()]).topk(alive).values[-1]
    return Mask.from_tensors({layer: scores[layer] >= lowest if layer in scores else first[layer] for layer in first})


def ask_once(candidate: Candidate, known: Known) -> tuple[Candidate, ...]:
    """Ask for one ticket, as a strategy."""
    return () if known.gains else (candidate,)


def check_seeds(store: Path, margin: float = 0.01, judges: int = 3) -> None:
    """Search on digits from each of ten seeds, with the next three as judges, and ask ten other seeds about the find."""
    study = load_study("digits", CHECKED)
    planner = Planner(study, load_problem(study.task), Store(store))
    prepare_store(planner, store)
    seeds, fresh = study.seeds[:SEARCHED], study.seeds[SEARCHED:]
    lines = []
    with open_workers(planner, 1, None) as workers:
        for first in range(SEARCHED):
            trials = [(planner, seeds[(first + step) % SEARCHED]) for step in range(1 + judges)]
            walk = search(trials, workers, lambda *_: None, find_strategy("race"), margin=margin, budget=Budget())
            found = walk.end.found
            if found is None:
                print(f"seed {first}: nothing found")
                continue
            seen = verdict(walk, margin)
            others = [(planner, seed) for seed in fresh]
            asked = search(others, workers, lambda *_: None, partial(ask_once, found), margin=1.0)
            gains = list(asked.known.gains[found].values())
            refuted = sum(gain < -margin - 1e-9 for gain in gains)
            mean = statistics.fmean(gains)
            inside = seen["low"] <= mean <= seen["high"]
            lines.append((refuted / len(gains), seen["outside"], seen["outside_most"], inside, seen["surely"]))
            print(
                f"| {seeds[first]} | {found.level} | {100 * seen['difference']:+.2f} | "
                f"{100 * seen['low']:+.2f} .. {100 * seen['high']:+.2f} | {100 * mean:+.2f} | "
                f"{100 * seen['outside']:.0f} % | {100 * seen['outside_most']:.0f} % | {refuted} of {len(gains)} |",
                flush=True,
            )
    share, stated, most, inside, surely = zip(*lines, strict=True)
    print(
        f"outside the margin {100 * statistics.fmean(share):.0f} %, stated {100 * statistics.fmean(stated):.0f} %; "
        f"not more often than at most {sum(map(float.__le__, share, most))} of {len(lines)}; "
        f"mean of fresh seeds in the interval {sum(inside)} of {len(lines)}; surely within {sum(surely)}"
    )


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("strategies", "order", "shared", "learned", "seeds"))
    parser.add_argument("study", nargs="?", choices=STUDIES, default="digits")
    parser.add_argument("--store", type=Path, default=Path("find-store"))
    parser.add_argument("--data")
    options = parser.parse_args()
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options.what == "seeds":
            check_seeds(options.store)
            return
        study, margin = define(options.study)
        if options.what in ("shared", "learned"):
            measure_levels = measure_shared if options.what == "shared" else measure_learned
            levels = (4, 6, 8, 10) if options.what == "shared" else (4, 8, 12, 16)
            measure_levels(study, levels, store=options.store, data=options.data)
            return
        measure = measure_strategies if options.what == "strategies" else measure_order
        measure(study, margin, store=options.store, data=options.data)


if __name__ == "__main__":
    main()

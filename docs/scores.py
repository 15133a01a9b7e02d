"""Print docs/scores.md from the results in a store: python docs/scores.py STORE [--data DIR] [STUDY ...]

The tickets of every score, as it is and normalised by l1, are compared with those of `magnitude`. The commands that
compute the results are printed above the tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tombola import Planner, Store, load_problem, load_study
from tombola.analysis.gather import ALL
from tombola.analysis.overlap import of_masks, relative_to_ticket
from tombola.importance import SCORES
from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain
from tombola.study.rounds import compute_mask
from tombola.study.schema import Study
from tombola.study.task import resolve_importance
from tombola.study.tickets import Tickets
from tombola.study.trainings import Round

STUDIES = ("digits", "lenet-mnist")
LEVELS = (3, 6, 10, 15)
ORDER = 100
AT_REWIND = ("magnitude", "snip", "grasp", "concrete", "synflow")
EVERY = tuple(f"{score}{normalise}" for score in SCORES for normalise in ("", "/l1"))
NAMES = tuple("l1" if name == "magnitude/l1" else name for name in EVERY)

HEAD = """\
# Every score, compared

This page is generated from stored results: `python docs/scores.py STORE --data DIR`. [Importances](importances.md)
explains scores, normalisations and selections, and says what these tables show.

Test accuracy is in %, the mean over two seeds. *Overlap* is the share of a ticket's connections that the ticket of
`magnitude` has too, at {sparsity} % sparsity, the mean over both seeds. *Chance* is the same for random masks with the
same layer densities. The *noise floor* is the overlap of two tickets of `magnitude` that differ only in the order of
the training data. *Seconds* is the time of one round of pruning of the dense network, on one thread. A dash is what
has not been run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("studies", nargs="*", default=STUDIES)
    options = parser.parse_args(arguments)
    print(HEAD.format(sparsity=_percent(LEVELS[-2])))
    for name in options.studies:
        print("\n".join(section(name, options.store, options.data)))
    return 0


def section(name: str, store: Path, data: Path | None) -> Iterator[str]:
    """Yield the tables of a study: scored at the end of training, and scored at the rewind point."""
    yield f"## {name}\n"
    compared: Tickets | None = None
    for score_at, importances in (("end", NAMES), ("rewind", AT_REWIND)):
        overrides = {
            "importances": list(importances),
            "seeds": [0, 1],
            "levels": LEVELS[-1],
            "recipe.epochs": 10,
            "data_seeds": [ORDER],
            "data_seeds_for": ["magnitude"],
            "score_at": score_at,
        }
        study = load_study(name, overrides)
        tickets = Tickets(Planner(study, load_problem(study.task, data), Store(store)))
        where = "trained weights" if score_at == "end" else "the initialisation alone, which is the rewind point here"
        yield f"Masks from {where}:\n"
        yield "```sh"
        yield f"tombola run {name} {_options(study)}"
        yield "```\n"
        compared = compared or tickets
        yield from table(tickets, compared, importances)
        yield ""


def table(tickets: Tickets, compared: Tickets, importances: Sequence[str]) -> Iterator[str]:
    """Yield the table of a study.

    Args:
        tickets: the tickets of the study.
        compared: the tickets of which magnitude's are compared with.
        importances: the importances, one line for each.
    """
    at = LEVELS[-2]
    yield f"| importance | {' | '.join(f'{_percent(level)} %' for level in LEVELS)} | overlap | chance | seconds |"
    yield "|---|" + "--:|" * (len(LEVELS) + 3)
    if tickets is compared:
        floor = [
            _overlap(_at(compared, "magnitude", seed, at), _at(compared, "magnitude", seed, at, ORDER))
            for seed in (0, 1)
        ]
        yield f"| noise floor | {' | ' * len(LEVELS)} {_mean(floor, 0)} | {_mean(floor, 1)} | |"
    for name in importances:
        cells = []
        for level in LEVELS:
            found = [_at(tickets, name, seed, level) for seed in (0, 1)]
            cells.append(_accuracy(found))
        pairs = [_overlap(_at(compared, "magnitude", seed, at), _at(tickets, name, seed, at)) for seed in (0, 1)]
        same = name == "magnitude" and tickets is compared
        overlap = "| " if same else f"{_mean(pairs, 0)} | {_mean(pairs, 1)}"
        yield f"| `{name}` | {' | '.join(cells)} | {overlap} | {_seconds(tickets, name)} |"


def _at(tickets: Tickets, importance: str, seed: int, level: int, order: int | None = None) -> Ticket | None:
    found = tickets.progress(Chain(seed, importance, order)).tickets
    return found[level] if level < len(found) else None


def _accuracy(found: Sequence[Ticket | None]) -> str:
    values = [ticket.trained.history.test_accuracy for ticket in found if ticket is not None and ticket.trained]
    if len(values) < len(found):
        return "–"
    known = [value for value in values if value is not None]
    return f"{100 * statistics.fmean(known):.2f}" if len(known) == len(found) else "diverged"


def _overlap(one: Ticket | None, other: Ticket | None) -> tuple[float, float] | None:
    """Return the share of a ticket that another has too, and what chance gives."""
    if one is None or other is None:
        return None
    rows = relative_to_ticket(of_masks({"one": one.mask, "other": other.mask}))
    total = rows.filter(rows["layer"] == ALL).row(0, named=True)
    return total["shared_of_ticket"], total["layers_expected"]


def _mean(pairs: Sequence[tuple[float, float] | None], place: int) -> str:
    known = [pair[place] for pair in pairs if pair is not None]
    return f"{statistics.fmean(known):.3f}" if len(known) == len(pairs) else "–"


def _seconds(tickets: Tickets, name: str) -> str:
    """Return the seconds of a round of pruning of the dense network."""
    planner = tickets.planner
    dense = _at(tickets, name, 0, 0)
    if dense is None or dense.trained is None:
        return "–"
    weights = dense.trained.weights if planner.study.score_at == "end" else dense.rewind
    pruning = Round("", weights, dense.rewind, planner.dense, 0, name, 0, planner.study.fraction)
    importance = resolve_importance(name)
    begun = time.perf_counter()
    compute_mask(pruning, planner.problem, planner.study, planner.rule, importance)
    return f"{time.perf_counter() - begun:.2f}"


def _percent(level: int) -> str:
    return f"{100 * (1 - 0.8**level):.2f}"


def _options(study: Study) -> str:
    at = " --score-at rewind" if study.score_at == "rewind" else ""
    return (
        f"--importances {' '.join(study.importances)} --seeds 0 1 --levels {study.levels} --recipe.epochs 10 "
        f"--data-seeds {ORDER} --data-seeds-for magnitude{at}"
    )


if __name__ == "__main__":
    raise SystemExit(main())

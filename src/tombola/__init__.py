"""Find the lottery tickets of a neural network under any importance, and compare them.

Where to begin:

    tombola.find_tickets(model, data, recipe, l1, levels=5)   the tickets of one network, level after level
    tombola.run("digits")                                     a whole study, with several seeds and importances
    tombola.find("digits", within=0.01)                       the sparsest ticket that keeps the accuracy, cheaply
    tombola.plan("digits")                                    what a run would train, and how long it would take
    tombola.results("digits")                                 its accuracies; also: overlap, layers, stability, winners,
                                                              weights, functions, connectivity, claims, compare, reinit,
                                                              matching, initial, similarity, controls, combine,
                                                              transfer, basins, rewind_point, early, verify
    tombola.charts("digits")["overlap"]                       its charts; tombola.report("digits", "page.html") writes
                                                              them all on one page
    tombola.loops.hold(model, mask, optimizer)                your own training loop: pruned weights stay 0.0
    tombola.Ticket.load("ticket.safetensors").apply(model)    a ticket that somebody has found
    tombola.run("digits", hooks=[my_function])                follow a run, log it, stop it: see tombola.hooks

A `Study` has a `Task` (data set, model, loss), a `Recipe`, importances, seeds and levels; `load_study` reads one. The
built-in data sets, models and importances are in `tombola.datasets`, `tombola.models` and `tombola.importance`; masks
come from other libraries and go to them by `tombola.interchange`. A mistake in what you give raises a `UserError`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Large pages for large tensors (Linux): touching fresh memory is a good part of what a step costs. Read by torch when
# it is first imported; a user's own setting stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Without a workspace of its own cuBLAS does not give equal bits each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if TYPE_CHECKING:
    from tombola import datasets, hooks, importance, interchange, loops, models
    from tombola.datasets.dataset import Dataset
    from tombola.errors import UserError
    from tombola.lottery.find import find_tickets
    from tombola.lottery.rewinding import lottery_ticket_rewinding
    from tombola.lottery.ticket import Ticket
    from tombola.pruning.eligible import prunable
    from tombola.pruning.mask import Mask
    from tombola.pruning.prune import prune
    from tombola.store.store import Store
    from tombola.study.planner import Planner
    from tombola.study.schema import Study, Task, load_study
    from tombola.study.task import Problem, load_problem
    from tombola.training.history import Checkpoint, History, Trained
    from tombola.training.recipe import Augmentation, Recipe
    from tombola.training.train import train
    from tombola.training.weights import Weights
    from tombola.workbench.checks import plan, verify
    from tombola.workbench.find import find
    from tombola.workbench.further import basins, initial, matching, similarity
    from tombola.workbench.pictures import charts, report
    from tombola.workbench.runs import reinit, run
    from tombola.workbench.tables import (
        claims,
        compare,
        connectivity,
        functions,
        layers,
        overlap,
        results,
        stability,
        weights,
        winners,
    )
    from tombola.workbench.tickets import read_ticket
    from tombola.workbench.trained import combine, controls, early, rewind_point, transfer

__version__ = "1.0.0rc1"

_HOME = {
    "Augmentation": "training.recipe",
    "Checkpoint": "training.history",
    "Dataset": "datasets.dataset",
    "History": "training.history",
    "Mask": "pruning.mask",
    "Planner": "study.planner",
    "Problem": "study.task",
    "Recipe": "training.recipe",
    "Store": "store.store",
    "Study": "study.schema",
    "Task": "study.schema",
    "Ticket": "lottery.ticket",
    "Trained": "training.history",
    "UserError": "errors",
    "Weights": "training.weights",
    "basins": "workbench.further",
    "charts": "workbench.pictures",
    "claims": "workbench.tables",
    "combine": "workbench.trained",
    "compare": "workbench.tables",
    "connectivity": "workbench.tables",
    "controls": "workbench.trained",
    "early": "workbench.trained",
    "find": "workbench.find",
    "find_tickets": "lottery.find",
    "functions": "workbench.tables",
    "initial": "workbench.further",
    "layers": "workbench.tables",
    "load_problem": "study.task",
    "load_study": "study.schema",
    "lottery_ticket_rewinding": "lottery.rewinding",
    "matching": "workbench.further",
    "plan": "workbench.checks",
    "overlap": "workbench.tables",
    "prunable": "pruning.eligible",
    "prune": "pruning.prune",
    "read_ticket": "workbench.tickets",
    "reinit": "workbench.runs",
    "report": "workbench.pictures",
    "results": "workbench.tables",
    "rewind_point": "workbench.trained",
    "run": "workbench.runs",
    "similarity": "workbench.further",
    "stability": "workbench.tables",
    "train": "training.train",
    "transfer": "workbench.trained",
    "verify": "workbench.checks",
    "weights": "workbench.tables",
    "winners": "workbench.tables",
}
_MODULES = {"datasets", "hooks", "importance", "interchange", "loops", "models"}

__all__ = [
    "Augmentation",
    "Checkpoint",
    "Dataset",
    "History",
    "Mask",
    "Planner",
    "Problem",
    "Recipe",
    "Store",
    "Study",
    "Task",
    "Ticket",
    "Trained",
    "UserError",
    "Weights",
    "basins",
    "charts",
    "claims",
    "combine",
    "compare",
    "connectivity",
    "controls",
    "datasets",
    "early",
    "find",
    "find_tickets",
    "functions",
    "hooks",
    "importance",
    "initial",
    "interchange",
    "layers",
    "load_problem",
    "load_study",
    "loops",
    "lottery_ticket_rewinding",
    "matching",
    "models",
    "overlap",
    "plan",
    "prunable",
    "prune",
    "read_ticket",
    "reinit",
    "report",
    "results",
    "rewind_point",
    "run",
    "similarity",
    "stability",
    "train",
    "transfer",
    "verify",
    "weights",
    "winners",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line's help needs no torch."""
    if name in _MODULES:
        return importlib.import_module(f"tombola.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"tombola.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tombola' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

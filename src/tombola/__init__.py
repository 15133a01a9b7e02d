"""Find the lottery tickets of a neural network under any importance, and tell how alike they are."""

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
    from tombola import datasets, importance, models
    from tombola.datasets.dataset import Dataset
    from tombola.errors import UserError
    from tombola.mask import Mask, prunable, prune
    from tombola.planning import Planner
    from tombola.problem import Problem, load_problem
    from tombola.recipe import Augmentation, Recipe
    from tombola.rewinding import find_tickets, lottery_ticket_rewinding
    from tombola.store import Store
    from tombola.study import Study, Task, load_study
    from tombola.ticket import Ticket
    from tombola.training import Checkpoint, History, Trained, train
    from tombola.weights import Weights

__version__ = "0.1.0"

_HOME = {
    "Augmentation": "recipe",
    "Checkpoint": "training",
    "Dataset": "datasets.dataset",
    "History": "training",
    "Mask": "mask",
    "Planner": "planning",
    "Problem": "problem",
    "Recipe": "recipe",
    "Store": "store",
    "Study": "study",
    "Task": "study",
    "Ticket": "ticket",
    "Trained": "training",
    "UserError": "errors",
    "Weights": "weights",
    "find_tickets": "rewinding",
    "load_problem": "problem",
    "load_study": "study",
    "lottery_ticket_rewinding": "rewinding",
    "prunable": "mask",
    "prune": "mask",
    "train": "training",
}
_MODULES = ("datasets", "importance", "models")

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
    "datasets",
    "find_tickets",
    "importance",
    "load_problem",
    "load_study",
    "lottery_ticket_rewinding",
    "models",
    "prunable",
    "prune",
    "train",
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

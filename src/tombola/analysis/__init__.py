"""Analyses: each finding of the paper as a table, beside what chance and noise would give.

Each finding has its module. A module has `of_study(tickets, ...)`, which reads a study's results and returns a polars
DataFrame, and the pure functions that it consists of, whose docstrings describe the columns.

- `overlap`: how many connections tickets share, against chance and against the noise floor.
- `layers`: density of each layer, collapse, effective sparsity.
- `stability`: how much trained weights change from level to level, shared connections against others.
- `reference`: accuracies beside the paper's, or beside tombola's published ones, with a verdict for each.
- `winners`: the sparsest ticket that keeps the dense network's accuracy.
- `weights`: distributions of weights and importances.
- `functions`: agreement of predictions, ensembles.
- `connectivity`: the error between two tickets' weights.
- `matching`: the overlap after the hidden units of one ticket are put into the order of the other's.
- `initial`: how many of the connections that begin with the largest weights are in the ticket.
- `similarity`: how alike networks are as functions: divergences, calibration, alignment of layers.
- `controls`: what a ticket loses if one thing about it is changed; tickets combined, or trained elsewhere.
- `basins`: up to which level a ticket is connected to the next one and to the dense network.
- `rewind_point`: from which iteration on two data orders stay connected.
- `early`: how early in training it is known which connections survive.
- `uniqueness`: up to what tickets are unique: the order of units, noise, a basin, and what of a ticket does not matter.
- `reinit`: partial reinitialisation: survival of shared connections against chance.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tombola.analysis import (
        basins,
        connectivity,
        controls,
        early,
        frontier,
        functions,
        initial,
        layers,
        matching,
        overlap,
        reference,
        reinit,
        rewind_point,
        similarity,
        stability,
        uniqueness,
        weights,
        winners,
    )

__all__ = [
    "basins",
    "connectivity",
    "controls",
    "early",
    "frontier",
    "functions",
    "initial",
    "layers",
    "matching",
    "overlap",
    "reference",
    "reinit",
    "rewind_point",
    "similarity",
    "stability",
    "uniqueness",
    "weights",
    "winners",
]


def __getattr__(name: str) -> ModuleType:
    """Import a module when it is first used: a verb of the command line loads only what it needs."""
    if name in __all__:
        return importlib.import_module(f"tombola.analysis.{name}")
    raise AttributeError(f"module 'tombola.analysis' has no attribute {name!r}")

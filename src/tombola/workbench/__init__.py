"""The workbench: run a study, and get its tables and charts, from a script, a notebook or the command line.

Every function takes a study: a `Study`, the name of a preset, or the path of a TOML file, with fields to override.
"""

from tombola.workbench.further import basins, initial, matching, similarity
from tombola.workbench.pictures import charts, write_report
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

__all__ = [
    "basins",
    "charts",
    "claims",
    "combine",
    "compare",
    "connectivity",
    "controls",
    "early",
    "functions",
    "initial",
    "layers",
    "matching",
    "overlap",
    "read_ticket",
    "reinit",
    "results",
    "rewind_point",
    "run",
    "similarity",
    "stability",
    "transfer",
    "weights",
    "winners",
    "write_report",
]

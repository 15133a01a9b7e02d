"""The workbench: run a study, and get its tables and charts, from a script, a notebook or the command line.

Every function takes a study: a `Study`, the name of a preset, or the path of a TOML file, with fields to override.
"""

from tombola.workbench.checks import plan, verify
from tombola.workbench.further import initial, matching, similarity
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

__all__ = [
    "charts",
    "claims",
    "compare",
    "connectivity",
    "functions",
    "initial",
    "layers",
    "matching",
    "overlap",
    "plan",
    "read_ticket",
    "reinit",
    "results",
    "run",
    "similarity",
    "stability",
    "verify",
    "weights",
    "winners",
    "write_report",
]

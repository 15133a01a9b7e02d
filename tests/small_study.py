"""A small study that several tests share: two importances, two seeds, three levels; 10 trainings, 12 tickets."""

from __future__ import annotations

from typing import Any

STUDY = ["digits", "--levels", "2", "--recipe.epochs", "1", "--importances", "magnitude", "l1", "--data-seeds"]
"""As the command line names it."""

OVERRIDES: dict[str, Any] = {
    "levels": 2,
    "recipe.epochs": 1,
    "importances": ["magnitude", "l1"],
    "data_seeds": [],
}
"""What that overrides of the preset, as `load_study` takes it."""

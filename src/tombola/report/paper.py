"""The paper's Table 2, for comparison with a study of one of the paper's systems."""

from __future__ import annotations

from functools import cache
from importlib import resources

import polars as pl

from tombola.study.schema import Study, load_study, presets

CITATION = (
    "B. Vandersmissen and J. Oramas, Considering Layerwise Importance in the Lottery Ticket Hypothesis, "
    "arXiv 2302.11244 (2023), Table 2"
)


_DECISIVE = ("task", "recipe", "fraction", "exclude", "keep_dense")


def of_study(study: Study) -> pl.DataFrame | None:
    """Return the accuracies that the paper reports for a study; None if the study is not one of the paper's.

    A study is the paper's if it has the task, the recipe, the fraction and the pruned layers of a preset for which the
    paper reports accuracies. It may have fewer levels, other seeds and other importances.

    One row for each level and importance that the paper reports, with the columns level, importance, accuracy and sd
    (standard deviation over three seeds), both in 0..1.

    >>> from tombola.study.schema import load_study
    >>> of_study(load_study("lenet-mnist", {"levels": 10})).row(0)
    (0, 'magnitude', 0.9811, 0.0008)
    >>> of_study(load_study("resnet20-cifar10-small")) is None
    True
    """
    for system in sorted(set(_table()["system"]) & set(presets())):
        preset = load_study(system)
        if all(getattr(study, field) == getattr(preset, field) for field in _DECISIVE):
            return _table().filter(pl.col("system") == system).drop("system")
    return None


@cache
def _table() -> pl.DataFrame:
    """Return the whole table, one row for each system, level and importance."""
    with resources.files("tombola.report").joinpath("paper.csv").open("rb") as file:
        wide = pl.read_csv(file.read(), comment_prefix="#", schema_overrides={"system": pl.String})
    names = [name.removesuffix("_sd") for name in wide.columns if name.endswith("_sd")]
    parts = [
        wide.select(
            "system",
            level=pl.col("step").cast(pl.Int64),
            importance=pl.lit(name),
            accuracy=(pl.col(name) / 100).round(6),
            sd=(pl.col(f"{name}_sd") / 100).round(6),
        )
        for name in names
    ]
    return pl.concat(parts)

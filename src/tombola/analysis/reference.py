"""References: accuracies to compare a study's with, those of the paper and those that tombola has published.

A published reference is a file `references/PRESET.csv` of this package. `write` makes it of the finished study of a
preset: a JSON document about the study in lines that begin with `#`, then one line for each ticket. The document has
the hash of all the rest, so that a file that was changed is refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from operator import attrgetter
from pathlib import Path
from typing import Any

import polars as pl
from scipy import special

from tombola.analysis.accuracy import Row, of_test_accuracy, row_of, rows, summarise
from tombola.engine.machine import count_kinds
from tombola.engine.run import count_remaining
from tombola.errors import NothingStoredError, UserError, describe_exception, list_first
from tombola.files import read_regular
from tombola.store.documents import LARGEST, parse_json
from tombola.store.names import name_of
from tombola.study.schema import Study, fields, load_study, presets
from tombola.study.tickets import Tickets
from tombola.training.metrics import ACCURACY

CITATION = (
    "B. Vandersmissen and J. Oramas, Considering Layerwise Importance in the Lottery Ticket Hypothesis, "
    "arXiv 2302.11244 (2023), Table 2"
)

PAPER, REFERENCE = "paper", "reference"
"""The names of the two references that a study can have."""

_WHOSE = "the published reference"

DECISIVE = ("task", "recipe", "fraction", "prune", "exclude", "keep_dense")
"""The fields of a study that must be those of a reference. Levels, seeds and importances may be others."""

WITHIN, DIFFERS = "within", "differs"
"""The verdicts."""

_MOST_NAMED = 4  # of the fields in which studies differ
_PAPER_SEEDS = 3
_PAPER_HASH = "523ff7e7e362759faa8bff86e79eb96eadd9722225e404c9e81224ab47039e31"
"""The hash of the lines of `paper.csv`, so that a file that was changed is refused."""

_COLUMNS = ("importance", "seed", "data_seed", "level", "alive", "accuracy", "train_loss", "test_loss", "collapsed")


@dataclass(frozen=True, eq=False)
class Reference:
    """Accuracies to compare a study's with.

    Args:
        name: `PAPER` or `REFERENCE`.
        preset: the name of the preset whose results they are.
        study: the study whose results they are.
        source: where they come from, as a phrase.
        table: one row for each importance and level, with the columns importance, level, accuracy, std (over seeds;
            both in 0..1) and seeds.
        tickets: the results of the tickets; empty for the paper, which reports means only.
        about: of a published reference, the document in its file: `study`; `data` (name and fingerprint); `counted`
            (see `Planner.describe_counted`) and `connections` (their number); `versions` (of tombola and torch);
            `machines` (kind -> number of trainings); `finished` (the first and the last time).
    """

    name: str
    preset: str
    study: Study
    source: str
    table: pl.DataFrame
    tickets: tuple[Row, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def paper(study: Study) -> Reference:
    """Return what the paper reports about a study, which is that of a preset with the same `DECISIVE` fields.

    Raises:
        UserError: where the paper has no such study; the message says in which fields the nearest one differs.

    >>> paper(load_study("lenet-mnist", {"levels": 10})).table.row(0)
    ('magnitude', 0, 0.9811, 0.0008, 3)
    """
    return _select("the paper", _paper(), study)


def published(study: Study) -> Reference:
    """Return the published reference of a study, which is that of a preset with the same `DECISIVE` fields.

    Raises:
        UserError: where no such study is published; the message says in which fields the nearest one differs.

    >>> published(load_study("digits", {"levels": 3})).preset
    'digits'
    """
    return _select(_WHOSE, _published(), study)


def _select(whose: str, known: Sequence[Reference], study: Study) -> Reference:
    differing = [_differences(study, one.study) for one in known]
    fewest = min(differing, key=len)
    nearest = known[differing.index(fewest)]
    if fewest:
        raise UserError(
            f"{whose} has no results of this study, only of {', '.join(one.preset for one in known)}; the nearest is "
            f"{nearest.preset}, with {list_first(fewest, _MOST_NAMED)}; make the study's "
            f"{', '.join(DECISIVE[:-1])} and {DECISIVE[-1]} equal to those of one of them"
        )
    return nearest


def of_study(tickets: Tickets, reference: Reference) -> pl.DataFrame:
    """Return the comparison of a study's stored results with a reference, see `compare`.

    Raises:
        UserError: where the reference is of other data, or has none of the study's importances.
        NothingStoredError: where the store has no result that the reference has too.
        tombola.errors.DamagedResultError: where a stored result is damaged.
    """
    check_data(reference, tickets.planner.problem.data.fingerprint)
    if ACCURACY not in tickets.planner.problem.metrics:
        raise UserError(f"the {reference.name} has accuracies, and accuracy is not among task.metrics; add it there")
    known = reference.table["importance"].unique(maintain_order=True).to_list()
    if not set(known) & set(tickets.study.importances):
        raise UserError(
            f"no accuracy of {reference.preset} is known for {', '.join(tickets.study.importances)}; "
            f"choose importances from {', '.join(known)}"
        )
    found = compare(rows(tickets), reference.table)
    if not len(found):
        raise NothingStoredError(f"no result that the {reference.name} has too is in {tickets.planner.store.root}")
    return found


def check_data(reference: Reference, fingerprint: str) -> None:
    """Raise `UserError` if a reference is known to be of another data set than the one with this fingerprint."""
    data = reference.about.get("data")
    if data is not None and data["fingerprint"] != fingerprint:
        raise UserError(
            f"the published reference of {reference.preset} is of other data: its {data['name']} has the fingerprint "
            f"{data['fingerprint'][:12]}, and the data set here has {fingerprint[:12]}; use the preset's data set"
        )


def compare(results: Sequence[Row], reference: pl.DataFrame) -> pl.DataFrame:
    """Return how accuracies compare with those of a reference, for each importance and level that both have.

    The difference of two means has the standard error sqrt(s1^2 / n1 + s2^2 / n2), for standard deviations s over n
    seeds. The verdict is "within" where |difference| is at most twice that, and "differs" where it is more. It is null
    where a side has fewer than two seeds. Where all seeds of both sides have one accuracy each, the standard error is
    0, which says that the test set is too small to show the spread, not that there is none: equal accuracies are
    "within", and others have no verdict.

    Columns:

    - importance, level. density: the mean over our seeds.
    - accuracy, std, seeds: ours, in 0..1. std is null for fewer than two seeds. Diverged trainings are left out.
    - reference_accuracy, reference_std, reference_seeds: the reference's.
    - difference: accuracy - reference_accuracy. standard_error: of the difference; null for fewer than two seeds.
    - verdict: "within", "differs" or null.

    Args:
        results: ours.
        reference: the table of a `Reference`.

    >>> ours = [Row("l1", seed, 1, 0.8, 0.9 + 0.02 * seed, 8, 0.1, False) for seed in (0, 1)]
    >>> theirs = pl.DataFrame({"importance": ["l1"], "level": [1], "accuracy": [0.93], "std": [0.01], "seeds": [4]})
    >>> found = compare(ours, theirs)
    >>> found.select(pl.col("difference", "standard_error").round(4), "verdict").row(0)
    (-0.02, 0.0112, 'within')
    """
    theirs = reference.select(
        "importance", "level", pl.col("accuracy", "std", "seeds").name.map(lambda name: f"reference_{name}")
    )
    error = (pl.col("std") ** 2 / pl.col("seeds") + pl.col("reference_std") ** 2 / pl.col("reference_seeds")).sqrt()
    rounding = 1e-9  # accuracies are whole numbers of examples; their means are rounded
    within = pl.col("difference").abs() <= 2 * pl.col("standard_error") + rounding
    differs = ~within & (pl.col("standard_error") > rounding)
    return (
        summarise(of_test_accuracy(results))
        .rename({"value": "accuracy"})
        .drop("diverged")
        .filter(pl.col("seeds") > 0)
        .join(theirs, on=["importance", "level"], how="inner", maintain_order="left")
        .with_columns(difference=pl.col("accuracy") - pl.col("reference_accuracy"), standard_error=error)
        .with_columns(verdict=pl.when(within).then(pl.lit(WITHIN)).when(differs).then(pl.lit(DIFFERS)))
    )


def describe(comparison: pl.DataFrame) -> str:
    """Return a sentence on the verdicts of a table of `compare`, with the share that is expected of equal means.

    Few seeds estimate a standard deviation badly, so fewer than 95 % are expected: P(|t| <= 2) of Student's t. Its
    degrees of freedom are Welch's (Biometrika 34, 1947) for equal standard deviations: 4 for three seeds and three.
    The dense networks of all importances are the same ones: where the reference's are too, they are one cell.

    >>> cells = {"level": [1, 2, 3], "accuracy": [0.9, 0.8, 0.7], "reference_accuracy": [0.9, 0.9, 0.7]}
    >>> verdicts = {"seeds": [3, 3, 1], "reference_seeds": 3, "verdict": ["within", "differs", None]}
    >>> describe(pl.DataFrame(cells | verdicts)).partition(" if ")[0]
    '1 of 2 cells is within 2 standard errors; 88 % are expected on average'
    """
    dense = pl.col("level") == 0
    once = comparison.filter(dense).unique(["accuracy", "reference_accuracy"])
    cells = pl.concat([once, comparison.filter(~dense)])
    judged = cells.filter(pl.col("verdict").is_not_null())
    missing = len(cells) - len(judged)
    sentences = []
    if len(judged):
        within = (judged["verdict"] == WITHIN).sum()
        expected = sum(_chance_within(*pair) for pair in judged.select("seeds", "reference_seeds").rows()) / len(judged)
        sentences.append(
            f"{within} of {len(judged)} cells {'is' if within == 1 else 'are'} within 2 standard errors; "
            f"{100 * expected:.0f} % are expected on average if the means are equal, "
            "and cells of one seed vary together."
        )
    if missing:
        what = "1 cell has" if missing == 1 else f"{missing} cells have"
        sentences.append(f"{what} no verdict, which needs two seeds or more on both sides, and a spread between them.")
    return " ".join(sentences)


def _chance_within(n: int, m: int) -> float:
    """Return the probability that means of n and of m draws from one normal distribution are "within".

    >>> round(_chance_within(3, 3), 4), round(_chance_within(1000, 1000), 3)
    (0.8839, 0.954)
    """
    freedom = (1 / n + 1 / m) ** 2 / (1 / (n**2 * (n - 1)) + 1 / (m**2 * (m - 1)))
    return 1 - 2 * float(special.stdtr(freedom, -2))


def write(tickets: Tickets) -> str:
    """Return the file of a reference: what came out of a finished study, without weights.

    Raises:
        NothingStoredError: where the study is not finished.
        tombola.errors.DamagedResultError: where a stored result is damaged.
    """
    planner, chains = tickets.planner, tickets.all()
    if left := count_remaining(list(chains.values())):
        raise NothingStoredError(
            f"a reference is made of a finished study: {left} of its trainings are not in {planner.store.root} yet"
        )
    records = list(tickets.records().values())
    times = sorted(record["finished"] for record in records)
    about = {
        "study": tickets.study.model_dump(mode="json"),
        "data": {"name": planner.problem.data.name, "fingerprint": planner.problem.data.fingerprint},
        "counted": planner.describe_counted(),
        "connections": planner.dense.total,
        "versions": {
            name: sorted({record["machine"]["versions"][name] for record in records}) for name in ("tombola", "torch")
        },
        "machines": {str(kind): count for kind, count in count_kinds(records).items()},
        "finished": [times[0], times[-1]],
    }
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(_COLUMNS)
    importances = tickets.study.importances
    for chain, progress in sorted(chains.items(), key=lambda item: importances.index(item[0].importance)):
        for ticket in progress.tickets:
            row = row_of(chain, ticket)
            order = "" if chain.data_seed is None else chain.data_seed
            losses = (row.test_accuracy, row.train_loss, row.test_loss)
            lines.writerow([row.importance, row.seed, order, row.level, row.alive, *losses, " ".join(row.collapsed)])
    about["hash"] = name_of([about, out.getvalue()])
    return "".join(f"# {line}\n" for line in json.dumps(about, indent=1).splitlines()) + out.getvalue()


def read(preset: str, text: str) -> Reference:
    """Return the reference of a preset from the text of its file, which `write` has made.

    The tickets with other data orders are in the file, but not in the reference.

    Raises:
        UserError: if it was changed or damaged since then.
    """
    try:
        return _read(preset, text)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise _damaged(f"{_WHOSE} of {preset}", describe_exception(error)) from error


def _damaged(what: str, why: str) -> UserError:
    return UserError(f"{what} is damaged ({why}); install tombola again")


def _read(preset: str, text: str) -> Reference:
    lines = text.splitlines()
    about = parse_json("".join(line.removeprefix("# ") for line in lines if line.startswith("#")))
    rows_of = [line for line in lines if not line.startswith("#")]
    if about.pop("hash") != name_of([about, "".join(f"{line}\n" for line in rows_of)]):
        raise ValueError("it does not match its hash")
    table = csv.DictReader(rows_of)
    found = tuple(_read_row(line, about["connections"]) for line in table if not line["data_seed"])
    versions = " and ".join(f"{name} {', '.join(about['versions'][name])}" for name in ("tombola", "torch"))
    source = f"{preset} by {versions} on {', '.join(about['machines'])}, finished on {about['finished'][-1][:10]}"
    return Reference(
        REFERENCE,
        preset,
        Study.model_validate_json(json.dumps(about["study"])),
        source,
        summarise(found).rename({"value": "accuracy"}).drop("density", "diverged"),
        found,
        about,
    )


def _read_row(line: Mapping[str, str], connections: int) -> Row:
    accuracy, train_loss, test_loss = (
        float(line[name]) if line[name] else None for name in ("accuracy", "train_loss", "test_loss")
    )
    alive = int(line["alive"])
    return Row(
        importance=line["importance"],
        seed=int(line["seed"]),
        level=int(line["level"]),
        density=alive / connections,
        value=accuracy,
        alive=alive,
        test_loss=test_loss,
        diverged=accuracy is None,
        collapsed=tuple(line["collapsed"].split()),
        train_loss=train_loss,
    )


@cache
def _published() -> tuple[Reference, ...]:
    """Return the references of this package, by the names of their presets."""
    folder = resources.files("tombola.analysis").joinpath("references")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".csv")), key=attrgetter("name"))
    return tuple(
        read(preset, _read_text(file, f"{_WHOSE} of {preset}"))
        for file, preset in ((file, file.name.removesuffix(".csv")) for file in files)
    )


def _read_text(file: Traversable, what: str) -> str:
    """Return the text of a file of this package; nothing but a regular file is read."""
    try:
        return read_regular(Path(str(file)), LARGEST).decode()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _damaged(what, why) from error


@cache
def _paper() -> tuple[Reference, ...]:
    """Return what the paper reports about each of its systems that is a preset."""
    what = "the table of the paper, paper.csv,"
    text = _read_text(resources.files("tombola.analysis").joinpath("paper.csv"), what)
    if name_of(text.splitlines()) != _PAPER_HASH:
        raise _damaged(what, "it does not match its hash")
    wide = pl.read_csv(text.encode(), comment_prefix="#", schema_overrides={"system": pl.String})
    names = [name.removesuffix("_std") for name in wide.columns if name.endswith("_std")]
    table = pl.concat(
        wide.select(
            "system",
            importance=pl.lit(name),
            level=pl.col("step").cast(pl.Int64),
            accuracy=(pl.col(name) / 100).round(6),
            std=(pl.col(f"{name}_std") / 100).round(6),
            seeds=pl.lit(_PAPER_SEEDS, pl.Int64),
        )
        for name in names
    )
    return tuple(
        Reference(PAPER, system, load_study(system), CITATION, table.filter(pl.col("system") == system).drop("system"))
        for system in wide["system"].unique(maintain_order=True)
        if system in presets()
    )


def _differences(study: Study, other: Study) -> list[str]:
    """Return a phrase for each decisive field in which two studies differ.

    >>> _differences(load_study("digits", {"recipe.lr": 0.2, "levels": 3}), load_study("digits"))
    ['recipe.lr 0.1 instead of 0.2']
    """
    found = []
    for name in (name for name, _, _ in fields() if name.split(".")[0] in DECISIVE):
        own, theirs = attrgetter(name)(study), attrgetter(name)(other)
        if own != theirs and name != "task.metrics":  # they do not change what is trained
            found.append(f"{name} {json.dumps(theirs)} instead of {json.dumps(own)}")
    return found

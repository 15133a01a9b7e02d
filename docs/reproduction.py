"""Print docs/reproduction.md, after a look into a store: python docs/reproduction.py STORE [--data DIR] [SYSTEM ...]

A system is a preset or a TOML file, with options of the command line, for example `'resnet20-cifar10-small --levels 7
--data DIR'`. By default, the presets are taken on which the paper's claims are tested. What the page says of a system
is kept in docs/reproduction/, a file each, so that systems may be run at different times and in different stores. The
file of a system is written anew where the store has a ticket of it from level 1 on; it is not if it is of another TOML
file of the same name. Presets without a file are listed as not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from tombola import UserError, load_study
from tombola.analysis import claims, overlap, reference
from tombola.analysis.accuracy import rows, table2
from tombola.analysis.evidence import Evidence, collect
from tombola.analysis.gather import DATA_ORDER, IMPORTANCES
from tombola.analysis.verdict import Claim
from tombola.analysis.verdict import describe as describe_claim
from tombola.cli.options import open_planner, study_options
from tombola.engine.machine import count_kinds
from tombola.engine.run import count_remaining
from tombola.study.tickets import Tickets

SYSTEMS = (
    "lenet-mnist",
    "lenet-fashion",
    "resnet20-cifar10-medium",
    "vgg16-cifar10-medium",
    "resnet18-cifar10-medium",
)
"""The systems on which the paper's claims are tested, if none are given."""

MARKS = {"holds": "holds", "holds in part": "in part", "does not hold": "**no**", "not testable": "–"}

KEPT = Path(__file__).with_suffix("")
"""The folder of what the page says of each system."""

HEAD = """\
# The paper's results, reproduced

`python docs/reproduction.py STORE SYSTEM ...` generates this page from stored results. It shows Table 2(a) of the paper
([arXiv 2302.11244](https://arxiv.org/abs/2302.11244)) beside ours, and a verdict on each of the paper's claims. Each
section gives the command whose results it shows.
[The paper's settings](conventions.md) have a page of their own; [the analyses](analyses.md#claims) say how claims are judged.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep what the store says of the systems, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("systems", nargs="*", default=SYSTEMS)
    options = parser.parse_intermixed_args(arguments)
    names = [_name(system) for system in options.systems]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"two systems are named {name}, by which they are kept; give one of them, or rename a file")
    for name, system in zip(names, options.systems, strict=True):
        path = KEPT / f"{name}.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("file") != _hash_file(system):
            parser.error(f"{name} is kept already, of a file with other contents; rename the file, or delete {path}")
    for name, system in zip(names, options.systems, strict=True):
        about = describe(system, options.store, options.data)
        if about is not None:
            text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
            (KEPT / f"{name}.json").write_text(text, encoding="utf-8")
    print(page({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))}))
    return 0


def describe(system: str, store: Path, data: Path | None) -> dict[str, Any] | None:
    """Return what the page says of a system; None, with a note, if the store or the data set is not there.

    Returns:
        `run`, the cells of the table of runs; `claims`, the number, statement and verdict of each; `section`, the
        lines of the system's section; and `file`, the hash of its TOML file, if it is no preset.
    """
    tickets = open_tickets(system, store, data)
    evidence = None if tickets is None else collect_evidence(system, tickets)
    if tickets is None or evidence is None:
        return None
    found = claims.judge(evidence)
    file = _hash_file(system)
    return {
        **({} if file is None else {"file": file}),
        "run": describe_run(tickets),
        "claims": [[claim.number, claim.statement.rstrip("."), claim.verdict] for claim in found],
        "section": "\n".join(section(system, tickets, evidence, found)).splitlines(),
    }


def page(kept: dict[str, Any]) -> str:
    """Return the page of what is kept of each system: the presets in their order, then the others by name."""
    names = [*(name for name in SYSTEMS if name in kept), *sorted(set(kept) - set(SYSTEMS))]
    about = {name: kept[name] for name in names}
    missing = [name for name in SYSTEMS if name not in kept]
    sections = [line for each in about.values() for line in [*each["section"], ""]]
    return "\n".join([HEAD, *overview(about, missing), *verdicts(about), *sections]).rstrip()


def open_tickets(system: str, store: Path, data: Path | None) -> Tickets | None:
    """Return the tickets of a system; None, with a note, if its data set is not there."""
    before = ["--store", str(store), *(["--data", str(data)] if data else [])]
    try:
        return Tickets(open_planner(study_options().parse_args([*before, *shlex.split(system)])))
    except UserError as error:
        print(f"{system}: {error}", file=sys.stderr)
        return None


def collect_evidence(name: str, tickets: Tickets) -> Evidence | None:
    """Return what the claims are judged by; None, with a note, if two importances have no level from 1 on."""
    try:
        return collect(tickets)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None


def describe_run(tickets: Tickets) -> list[str]:
    """Return how many trainings a run has, how many are to do, hours of one core, and kinds of machine."""
    records = list(tickets.records().values())
    hours = sum(record.get("seconds", 0.0) for record in records) / 3600
    kinds = "; ".join(f"{kind or 'not recorded'}" for kind in count_kinds(records))
    to_do = count_remaining(list(tickets.all().values()))
    return [str(len(records)), str(to_do), f"{hours:.1f}", kinds]


def overview(about: dict[str, Any], missing: Sequence[str]) -> Iterator[str]:
    """Yield the table of the runs."""
    yield "| system | trainings | to do | hours of one core | kinds of machine |"
    yield "|---|--:|--:|--:|---|"
    for name, each in about.items():
        yield f"| {name} | {' | '.join(each['run'])} |"
    for name in missing:
        yield f"| {name} | not run | | | |"
    yield ""


def verdicts(about: dict[str, Any]) -> Iterator[str]:
    """Yield the table of all claims and systems."""
    yield "## The claims\n"
    yield f"| claim | {' | '.join(about)} |"
    yield f"|---|{'---|' * len(about)}"
    judged = {name: {number: rest for number, *rest in each["claims"]} for name, each in about.items()}
    for number in dict.fromkeys(number for claims_of in judged.values() for number in claims_of):
        found = [claims_of.get(number) for claims_of in judged.values()]
        statements = dict.fromkeys(each[0] for each in found if each)
        marks = [MARKS[each[1]] if each else "" for each in found]
        yield f"| {number} {' / '.join(statements)} | {' | '.join(marks)} |"
    yield "\nA dash means that the system cannot decide; the sections below say why. Where the paper"
    yield "says something else of convolutional networks than of LeNet, both sentences are given, and each system is"
    yield "judged by its own.\n"


def section(name: str, tickets: Tickets, evidence: Evidence, found: Sequence[Claim]) -> Iterator[str]:
    """Yield the section of a system: three sentences, accuracies, and each claim with its numbers."""
    yield f"## {_name(name)}\n"
    yield f"    tombola run {_without_folders(name)}\n"
    yield " ".join(claims.summarise(found))
    of_preset, own = load_study(shlex.split(name)[0]).seeds, tickets.study.seeds
    if missing := sorted(set(of_preset) - set(own)):
        yield f"\nOf the preset's seeds ({_list(of_preset)}), these have not been run: {_list(missing)}."
    left = count_remaining(list(tickets.all().values()))
    if left:
        yield f"\nThis run is not finished: {left} trainings remain."
    yield f"\n{evidence.describe()} {tickets.planner.describe_counted()}\n"
    yield from accuracies(tickets)
    yield "\n| claim | verdict | ours | chance | noise floor | paper |"
    yield "|---|---|---|--:|--:|---|"
    for claim in found:
        about: dict[str, str] = describe_claim(claim)
        cells = [about.get(part, "") for part in ("verdict", "ours", "chance", "noise floor", "paper")]
        yield f"| {claim.number} {claim.statement.rstrip('.')} | {' | '.join(cells)} |"
    yield from by_layer(evidence)


def by_layer(evidence: Evidence) -> Iterator[str]:
    """Yield the table of the layers at the level of the claims: densities, overlap, and shared connections."""
    level, names = evidence.level, evidence.compared
    yield f"\nEach layer at level {level}, in %, means over seeds. The columns of importances are densities. *Overlap* is the share of a"
    yield "ticket that two importances share (least to greatest), *chance* that of random masks with the same layer densities, and"
    yield "*noise floor* that of two data orders. *Sd* and *flips* are Cliff's delta of shared against other connections, for the"
    yield "standard deviation and for changes of sign; below 0, shared connections are more stable. *Survive* says how much more"
    yield "often than by chance shared connections survive a partial reinitialisation (claim 6).\n"
    yield f"| layer | connections | {' | '.join(names)} | overlap | chance | noise floor | sd | flips | survive |"
    yield f"|---|--:|{'--:|' * len(names)}---|--:|--:|--:|--:|--:|"
    pairs = evidence.overlap.filter(level=level, k=2)
    shared = {(row["kind"], row["layer"]): row for row in overlap.summarise(pairs, "kind", "layer").to_dicts()}
    density = _means(evidence.layers.filter(level=level), "density", "layer", "importance")
    effect = _means(evidence.stability.filter(level=level), "effect", "layer", "measure")
    survive = {} if evidence.reinit is None else _means(evidence.reinit, "excess", "layer")
    for layer in [*evidence.shapes, "(all)"]:
        between, orders = (shared.get((kind, layer), {}) for kind in (IMPORTANCES, DATA_ORDER))
        cells = [layer, str(between["connections"]), *(_percent(density.get((layer, name))) for name in names)]
        mean, least, most = (_percent(between[part]) for part in ("shared_of_ticket", "lowest", "highest"))
        cells.append(f"{mean} ({least} to {most})" if mean else "")
        cells += [_percent(between["layers_expected"]), _percent(orders.get("shared_of_ticket"))]
        cells += [_signed(effect.get((layer, measure))) for measure in ("sd", "flipped")]
        cells.append(_percent(survive.get((layer,))))
        yield f"| {' | '.join(cells)} |"


def _means(table: pl.DataFrame, value: str, *by: str) -> dict[tuple[Any, ...], float | None]:
    """Return the mean of a column for each value of others."""
    return {tuple(row[:-1]): row[-1] for row in table.group_by(*by).agg(pl.col(value).mean()).select(*by, value).rows()}


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _signed(effect: float | None) -> str:
    return "" if effect is None else f"{effect:+.2f}"


def accuracies(tickets: Tickets) -> Iterator[str]:
    """Yield the table of accuracies: beside the paper's, with verdicts, if the paper has this system."""
    results = rows(tickets)
    try:
        theirs = reference.paper(tickets.study)
    except UserError:
        theirs = None
    if theirs is None:
        yield from own_accuracies(tickets)
        return
    compared = reference.compare(results, theirs.table)
    yield "Test accuracy in %: ours, the paper's, and whether they agree within 2 standard errors of the difference.\n"
    names = tickets.study.importances
    yield f"| sparsity | {' | '.join(names)} |"
    yield f"|--:|{'---|' * len(names)}"
    for at in compared.sort("level").partition_by("level", maintain_order=True):
        cells = {row["importance"]: _describe(row) for row in at.to_dicts()}
        density = statistics.fmean(at["density"].to_list())
        yield f"| {100 * (1 - density):.2f} | {' | '.join(cells.get(name, '') for name in names)} |"
    yield f"\n{reference.describe(compared)}"


def own_accuracies(tickets: Tickets) -> Iterator[str]:
    """Yield the table of accuracies of a system that is not the paper's: every fourth level and the last."""
    study = tickets.study
    table = table2(rows(tickets), study.importances)
    yield "Test accuracy in %, mean ± standard deviation over seeds.\n"
    yield f"| level | sparsity | {' | '.join(study.importances)} |"
    yield f"|--:|--:|{'--:|' * len(study.importances)}"
    last = max(level for level, _ in table.levels)
    for level, density in table.levels:
        if level % 4 and level != last:
            continue
        cells = []
        for name in study.importances:
            cell = table.cells[level, name]
            std = "" if cell.std is None else f" ± {100 * cell.std:.2f}"
            cells.append("" if cell.mean is None else f"{100 * cell.mean:.2f}{std}")
        yield f"| {level} | {100 * (1 - density):.2f} | {' | '.join(cells)} |"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _name(system: str) -> str:
    """Return the name of a system: that of the preset, or of the TOML file without its folder."""
    return Path(shlex.split(system)[0]).name


def _hash_file(system: str) -> str | None:
    """Return the hash of the TOML file of a system; None for a preset, and for a file that is not there."""
    path = Path(shlex.split(system)[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".toml" and path.is_file() else None


def _without_folders(system: str) -> str:
    """Return a system without the folders of the machine on which it ran; a relative path of a TOML file is kept."""
    file, *rest = shlex.split(system)
    parts = iter(rest)
    kept = [_name(system) if Path(file).is_absolute() else file]
    for part in parts:
        option, _, value = part.partition("=")
        if option not in ("--data", "--store"):
            kept.append(part)
        elif not value:
            next(parts, None)  # the folder
    return shlex.join(kept)


def _describe(row: dict[str, Any]) -> str:
    ours = f"{100 * row['accuracy']:.2f}" + ("" if row["std"] is None else f" ± {100 * row['std']:.2f}")
    theirs = f"{100 * row['reference_accuracy']:.2f} ± {100 * row['reference_std']:.2f}"
    verdict = {"within": "", "differs": " **differs**", None: ""}[row["verdict"]]
    return f"{ours} (paper {theirs}){verdict}"


if __name__ == "__main__":
    sys.exit(main())

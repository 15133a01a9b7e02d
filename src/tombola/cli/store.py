"""The verbs that check and manage stored results: `verify` and `store`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.cli.options import Verbs, open_planner, whole_number
from tombola.errors import DamagedResultError, StoreError, UserError
from tombola.terminal import say

if TYPE_CHECKING:
    from tombola.engine.machine import Kind
    from tombola.engine.verify import Finding
    from tombola.store.store import Entry, Store


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the command line."""
    verifying = verbs.add("verify", verify, verbs.study, verbs.table)
    verifying.add_argument(
        "--sample",
        type=whole_number(1),
        metavar="N",
        help="repeat only N of the trainings; with --chains, only N of the chains",
    )
    verifying.add_argument(
        "--chains", action="store_true", help="repeat whole chains of tickets, each from its initial weights on"
    )
    parts = verbs.add_group("store", store, "ls|check|gc")
    parts.add("store ls", ls, parts.store, parts.table)
    parts.add("store check", check, parts.store, parts.table)
    removing = parts.add("store gc", gc, parts.study, parts.table)
    removing.usage = "tombola store gc STUDY [STUDY ...] [option ...]"
    removing.add_argument(
        "more",
        nargs="*",
        metavar="STUDY",
        help="further studies whose results are kept; the options apply to all studies",
    )
    removing.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")


def verify(options: argparse.Namespace) -> int:
    """Repeat stored trainings in new processes, and compare every bit with the stored results.

    The exit status is 1 if any bit differs.
    """
    from tombola.cli.tables import show_table
    from tombola.engine.local import LocalWorkers
    from tombola.workbench.checks import repeat
    from tombola.workbench.runs import count_workers

    planner = open_planner(options)
    plain = options.format == "table"
    count = count_workers(options.workers, planner.study.device)
    with LocalWorkers(count, planner.study.task, options.data, None) as fresh, _show_count(plain) as tell:
        findings = repeat(planner, fresh, tell, sample=options.sample, chains=options.chains)
    if plain:
        _print_findings(findings)
    else:
        header = ["training", "key", "equal", "difference", "machine"]
        lines = [[f.what, f.key, f.difference is None, f.difference, "; ".join(f.machine)] for f in findings]
        show_table(header, lines, options.format)
    return 1 if any(finding.difference for finding in findings) else 0


def _print_findings(findings: list[Finding]) -> None:
    from tombola.workbench.text import count

    unequal = [finding for finding in findings if finding.difference]
    for finding in unequal:
        say(f"{finding.what} ({finding.key[:12]}) differs: {finding.difference}")
    elsewhere: dict[str, int] = {}
    for finding in findings:
        for phrase in finding.machine:
            elsewhere[phrase] = elsewhere.get(phrase, 0) + 1
    kinds: dict[tuple[Kind, Kind], int] = {}
    for finding in findings:
        if finding.kinds is not None:
            kinds[finding.kinds] = kinds.get(finding.kinds, 0) + 1
    for (before, now), number in kinds.items():
        say(f"stored results of another kind of machine, {number} of {len(findings)}: {before}, now {now}")
    for phrase, number in elsewhere.items():
        say(f"recorded elsewhere or with other versions, {number} of {len(findings)}: {phrase}")
    if unequal and not elsewhere:
        say("no difference between this machine and the recorded one is known")
    say(f"re-ran {count(len(findings), 'training')}: ", end="")
    say(f"{len(unequal)} differ from the stored results" if unequal else "all bit-identical")


@contextmanager
def _show_count(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows on a terminal how many trainings, and of how many, are verified."""
    live = shown and sys.stderr.isatty()

    def tell(done: int, total: int) -> None:
        if live:
            print(f"\rverified {done} of {total} ", end="", file=sys.stderr, flush=True)  # noqa: T201

    yield tell
    if live:
        say(file=sys.stderr)


def store(options: argparse.Namespace) -> int:
    """List what is in the store, check it, or remove what no study needs."""
    raise UserError("store: expected one of ls, check and gc")


def ls(options: argparse.Namespace) -> int:
    """List the contents of the store and their sizes."""
    from tombola.cli.tables import show_table, size

    store = _open(options.store)
    found = list(store.entries())
    if options.format != "table":
        show_table(["kind", "name", "bytes", *_FACTS], [_facts(store, one) for one in found], options.format)
        return 0
    lines = []
    for one in found:
        if one.kind == "result":
            _, _, taken, *facts = _facts(store, one)
            lines.append([one.name[:12], size(taken), *("" if fact is None else fact for fact in facts)])
    if lines:
        show_table(["result", "size", *_FACTS], lines, "table")
    _print_totals(found)
    return 0


_FACTS = ("density", "accuracy", "finished", "confirmed")


def _facts(store: Store, one: Entry) -> list[Any]:
    if one.kind != "result":
        return [one.kind, one.name, one.bytes, None, None, None, None]
    record = store.results.record(one.name)
    confirmed = [confirmation["when"] for confirmation in record.get("confirmed", [])]
    when = [record.get("finished"), confirmed[-1] if confirmed else None]
    try:
        document = store.results.document(one.name)
    except (DamagedResultError, UserError):
        document = None
    if document is None:
        return [one.kind, one.name, one.bytes, None, "damaged", *when]
    total = sum(map(math.prod, document.shapes.values()))
    density = round(sum(document.alive.values()) / total, 6) if total else None
    return [one.kind, one.name, one.bytes, density, document.history.test_accuracy, *when]


def _print_totals(found: list[Entry]) -> None:
    from tombola.cli.tables import size

    for kind in ("result", "mask", "checkpoint"):
        of_kind = [one for one in found if one.kind == kind]
        say(f"{len(of_kind)} {kind}s, {size(sum(one.bytes for one in of_kind))}")


def check(options: argparse.Namespace) -> int:
    """Read all files of the store; the exit status is 1 if anything is damaged.

    Files that do not belong to the store are listed, and do not change the exit status: nothing reads them.
    """
    from tombola.cli.tables import show_table, size
    from tombola.store.check import list_damage
    from tombola.store.layout import list_strays

    store = _open(options.store)
    found = list(store.entries())
    damaged = list(list_damage(store))
    plain = options.format == "table"
    for path in list_strays(store.root):
        say(f"{path} does not belong to the store and is ignored", file=sys.stdout if plain else sys.stderr)
    if not plain:
        lines = [[one.kind, one.name, one.reason] for one in damaged]
        show_table(["kind", "name", "damage"], lines, options.format)
        return 1 if damaged else 0
    for one in damaged:
        name = one.name[:12] if one.kind in ("result", "record", "metrics", "mask", "checkpoint", "claim") else one.name
        say(f"{one.kind} {name} {'are' if one.kind == 'metrics' else 'is'} damaged: {one.reason}")
    kinds = {one.kind for one in damaged}
    cures = [cure for kind, cure in _CURES.items() if kind in kinds]
    say(f"{len(found)} results, masks and checkpoints read, {size(sum(one.bytes for one in found))}: ", end="")
    say("; ".join([f"{len(damaged)} damaged", *dict.fromkeys(cures)]) if damaged else "all checksums are correct")
    return 1 if damaged else 0


_AGAIN = "`tombola run` repeats what is damaged of its study"
_GONE = "the next `tombola run` removes claims of no run"
_CURES = {
    "result": _AGAIN,
    "mask": _AGAIN,
    "checkpoint": _AGAIN,
    "behaviour": "results of this network are not used until the file is restored",
    "record": "`tombola verify` repeats a training and begins a new record",
    "metrics": "`tombola results` computes metrics again where a study names them",
    "run": _GONE,
    "claim": _GONE,
    "folder": "remove what lies in the place of a folder",
}


def gc(options: argparse.Namespace) -> int:
    """Remove everything from the store that none of the studies named here needs."""
    from tombola.cli.tables import show_table, size
    from tombola.store.collection import collect
    from tombola.study.needs import list_needs
    from tombola.study.tickets import Tickets

    named = [
        argparse.Namespace(**vars(options) | {"study": name}) for name in dict.fromkeys([options.study, *options.more])
    ]
    planners = [open_planner(one) for one in named]
    store = planners[0].store
    store.check_writable()

    def list_all_needs() -> set[str]:
        try:
            needs = [list_needs(Tickets(planner)) for planner in planners]
        except DamagedResultError as damage:
            raise UserError(
                f"store {store.root}: {damage}; repair it first with `tombola run`, "
                f"or the results that follow it in its chain would be removed"
            ) from damage
        there = {entry.name for entry in store.entries()}
        for one, needed in zip(named, needs, strict=True):
            if there and not there & needed:
                raise UserError(
                    f"{one.study}: store {store.root} has nothing of this study, so if its code or data have changed, "
                    f"all of its results would be removed; run it first{', or leave it out' if len(named) > 1 else ''}"
                )
        lost = {key for key in store.results if not store.results.record(key)}  # which verb asked for it is not known
        return lost.union(*needs)

    found = collect(store, list_all_needs, remove=not options.dry_run)
    if options.format != "table":
        lines = [[one.kind, one.name, one.bytes] for one in found.removed]
        show_table(["kind", "name", "bytes"], lines, options.format)
        return 0
    freed, kept = (sum(one.bytes for one in some) for some in (found.removed, found.kept))
    action = "would be removed" if options.dry_run else "removed"
    say(
        f"{len(found.removed)} of {len(found.removed) + len(found.kept)} results, masks and checkpoints {action}, "
        f"{size(freed)}; {size(kept)} are kept"
    )
    return 0


def _open(root: Path) -> Store:
    from tombola.files import STORE_FILE
    from tombola.store.store import Store

    if not os.path.lexists(root / STORE_FILE):
        raise StoreError(f"store {root}: there is no store in this folder")
    return Store(root, create=False)

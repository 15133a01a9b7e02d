"""The verbs that look after what is stored: `verify` and `store`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.errors import DamagedResultError, StoreError, UserError

if TYPE_CHECKING:
    from tombola.engine.machine import Kind
    from tombola.engine.verify import Finding
    from tombola.store.store import Entry, Store
    from tombola.study.planner import Planner

GetPlanner = Callable[[argparse.Namespace], "Planner"]


def add_verbs(
    verb: Callable[..., Any], study: Any, listing: Any, planner: GetPlanner, workers: Any, root: Path
) -> None:
    """Add the verbs `verify` and `store` to the command line.

    Args:
        verb: adds one: (name, function, *parents) -> its parser.
        study: the options of a verb that is about a study.
        listing: the options of a verb that lists something.
        planner: makes the planner of the study that options name.
        workers: how many trainings go side by side, by the options.
        root: the default store.
    """

    def verify_with(options: argparse.Namespace) -> int:
        return verify(options, planner(options), workers(options))

    def gc_with(options: argparse.Namespace) -> int:
        named = [argparse.Namespace(**vars(options) | {"study": name}) for name in [options.study, *options.more]]
        return gc(options, [planner(one) for one in named])

    verify_with.__doc__, gc_with.__doc__ = verify.__doc__, gc.__doc__
    verifying = verb("verify", verify_with, study, listing)
    verifying.add_argument("--sample", type=_from_one, metavar="N", help="only N of the trainings (or chains)")
    verifying.add_argument("--chains", action="store_true", help="whole chains, each from its initial weights on")
    storing = verb("store", _store)
    storing.usage = "tombola store ls|check|gc [option ...]"
    parts = storing.add_subparsers(required=True, metavar="ls|check|gc", parser_class=type(storing))
    where = type(storing)(add_help=False)
    where.add_argument("--store", type=Path, default=root, metavar="DIR", help="where results lie (%(default)s)")
    for name, function, parents in (("ls", ls, [where, listing]), ("check", check, [where, listing])):
        text = (function.__doc__ or "").strip()
        part = parts.add_parser(name, parents=parents, help=text, description=text, allow_abbrev=False)
        part.set_defaults(verb=function)
    text = (gc.__doc__ or "").strip().splitlines()[0]
    removing = parts.add_parser("gc", parents=[study, listing], help=text, description=text, allow_abbrev=False)
    removing.add_argument("more", nargs="*", metavar="STUDY", help="further studies to keep; overrides are for all")
    removing.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    removing.set_defaults(verb=gc_with)


def verify(options: argparse.Namespace, planner: Planner, workers: int) -> int:
    """Train again what is stored, in fresh processes, and compare every bit; exit status 1 where one differs."""
    from tombola.cli.display import show_table
    from tombola.engine.local import LocalWorkers
    from tombola.engine.verify import draw_sample, list_places, verify_chains, verify_trainings
    from tombola.study.tickets import Tickets

    tickets = Tickets(planner)
    chains = list(tickets.all())
    plain = options.format == "table"
    with LocalWorkers(workers, planner.study.task, options.data, None) as fresh:
        if options.chains:
            there = [chain for chain in chains if tickets.progress(chain).tickets]
            list_places(tickets, there)
            with _counting(plain) as tell:
                findings = list(verify_chains(planner, draw_sample(there, options.sample), fresh, tell))
        else:
            chosen = draw_sample(list_places(tickets, chains), options.sample)
            with _counting(plain) as tell:
                findings = []
                for finding in verify_trainings(planner, chosen, fresh):
                    findings.append(finding)
                    tell(len(findings), len(chosen))
    if plain:
        _say(findings)
    else:
        header = ["training", "key", "equal", "difference", "machine"]
        lines = [[f.what, f.key, f.difference is None, f.difference, "; ".join(f.machine)] for f in findings]
        show_table(header, lines, options.format)
    return 1 if any(finding.difference for finding in findings) else 0


def _say(findings: list[Finding]) -> None:
    unequal = [finding for finding in findings if finding.difference]
    for finding in unequal:
        print(f"{finding.what} ({finding.key[:12]}) differs: {finding.difference}")
    elsewhere: dict[str, int] = {}
    for finding in findings:
        for phrase in finding.machine:
            elsewhere[phrase] = elsewhere.get(phrase, 0) + 1
    kinds: dict[tuple[Kind, Kind], int] = {}
    for finding in findings:
        if finding.kinds is not None:
            kinds[finding.kinds] = kinds.get(finding.kinds, 0) + 1
    for (before, now), count in kinds.items():
        print(f"stored results of another kind of machine, {count} of {len(findings)}: {before}, now {now}")
    for phrase, count in elsewhere.items():
        print(f"recorded on another machine, {count} of {len(findings)}: {phrase}")
    if unequal and not elsewhere:
        print("the machine is the one recorded, as far as is known")
    if unequal:
        print(f"{len(unequal)} of {len(findings)} trainings done again differ from what is stored")
    else:
        print(f"{len(findings)} trainings done again: every bit of weights, masks and histories is as stored")


@contextmanager
def _counting(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a counter on a terminal."""
    live = shown and sys.stderr.isatty()

    def tell(done: int, total: int) -> None:
        if live:
            print(f"\rverified {done} of {total} ", end="", file=sys.stderr, flush=True)

    yield tell
    if live:
        print(file=sys.stderr)


def _store(options: argparse.Namespace) -> int:
    """Look after the store: list what is in it, check it, remove what is not needed."""
    raise UserError("store: say what to do, ls, check or gc")


def ls(options: argparse.Namespace) -> int:
    """List what is in the store, and how much it takes."""
    from tombola.cli.display import show_table, size

    store = _open(options.store)
    found = list(store.entries())
    if options.format != "table":
        show_table(["kind", "name", "bytes", *_FACTS], [_described(store, one) for one in found], options.format)
        return 0
    lines = []
    for one in found:
        if one.kind == "result":
            _, _, taken, *facts = _described(store, one)
            lines.append([one.name[:12], size(taken), *("" if fact is None else fact for fact in facts)])
    if lines:
        show_table(["result", "size", *_FACTS], lines, "table")
    _totals(found)
    return 0


_FACTS = ("density", "accuracy", "finished", "confirmed")


def _described(store: Store, one: Entry) -> list[Any]:
    if one.kind != "result":
        return [one.kind, one.name, one.bytes, None, None, None, None]
    record = store.results.record(one.name)
    confirmed = [confirmation["when"] for confirmation in record.get("confirmed", [])]
    when = [record.get("finished"), confirmed[-1] if confirmed else None]
    try:
        document = store.results.document(one.name)
    except DamagedResultError:
        document = None
    if document is None:
        return [one.kind, one.name, one.bytes, None, "damaged", *when]
    total = sum(_product(shape) for _, shape in document["mask"])
    density = round(sum(document["alive"].values()) / total, 6) if total else None
    return [one.kind, one.name, one.bytes, density, document["history"]["test_accuracy"], *when]


def _product(shape: list[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _totals(found: list[Entry]) -> None:
    from tombola.cli.display import size

    for kind in ("result", "mask", "checkpoint"):
        of_kind = [one for one in found if one.kind == kind]
        print(f"{len(of_kind)} {kind}s, {size(sum(one.bytes for one in of_kind))}")


def check(options: argparse.Namespace) -> int:
    """Read every byte in the store and compare checksums; exit status 1 where something is damaged."""
    from tombola.cli.display import show_table, size

    store = _open(options.store)
    found = list(store.entries())
    damaged = [(one, reason) for one in found if (reason := _damage(store, one))]
    if options.format != "table":
        lines = [[one.kind, one.name, reason] for one, reason in damaged]
        show_table(["kind", "name", "damage"], lines, options.format)
        return 1 if damaged else 0
    for one, reason in damaged:
        print(f"{one.kind} {one.name[:12]} is damaged: {reason}")
    print(f"{len(found)} results, masks and checkpoints read, {size(sum(one.bytes for one in found))}: ", end="")
    print(f"{len(damaged)} are damaged; `tombola run` does them again" if damaged else "every checksum is right")
    return 1 if damaged else 0


def _damage(store: Store, one: Entry) -> str | None:
    if one.kind == "mask":
        return None if store.masks.get(one.name) is not None else "its bits do not have their checksum"
    if one.kind == "checkpoint":
        return None if store.checkpoints.get(one.name) is not None else "its bytes do not have their checksum"
    try:
        store.results.check(one.name)
    except DamagedResultError as damage:
        return damage.reason
    return None


def gc(options: argparse.Namespace, planners: list[Planner]) -> int:
    """Remove from the store what none of the studies given needs."""
    from tombola.cli.display import show_table, size
    from tombola.store.claims import Claims
    from tombola.study.needs import list_needs
    from tombola.study.tickets import Tickets

    store = planners[0].store
    store.check_writable()
    with Claims(store.root) as claims:
        if not claims.alone():
            raise UserError(f"store {store.root}: another tombola is at work in it; remove nothing until that is done")
        try:
            needed = set().union(*(list_needs(Tickets(planner)) for planner in planners))
        except DamagedResultError as damage:
            raise UserError(
                f"store {store.root}: {damage}; repair it first with `tombola run`, "
                f"or the results that follow it in its chain would be removed"
            ) from damage
        found = list(store.entries())
        removed = [one for one in found if one.name not in needed]
        if not options.dry_run:
            store.sweep(claims.alone)
            for one in removed:
                store.remove(one)
    if options.format != "table":
        lines = [[one.kind, one.name, one.bytes] for one in removed]
        show_table(["kind", "name", "bytes"], lines, options.format)
        return 0
    freed, kept = (sum(one.bytes for one in some) for some in (removed, [one for one in found if one not in removed]))
    does = "would be removed" if options.dry_run else "removed"
    print(f"{len(removed)} of {len(found)} results, masks and checkpoints {does}, {size(freed)}; {size(kept)} are kept")
    return 0


def _open(root: Path) -> Store:
    from tombola.store.store import Store

    if not (root / "store.json").exists():
        raise StoreError(f"store {root}: there is no store")
    return Store(root, create=False)


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)

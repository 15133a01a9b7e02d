"""Who else is here: a collection and a run at the same time, many that make one store, and a run before a reboot."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import LONG, until
from stores import InTurn, content, planner, results
from tombola.engine.run import run
from tombola.errors import StoreError, UserError
from tombola.store import claims as claims_module
from tombola.store import store as store_module
from tombola.store.claims import Claims
from tombola.store.collection import collect
from tombola.store.layout import temporary_folder
from tombola.store.store import Entry, Store


def run_here(root: Path) -> None:
    torch.set_num_threads(1)  # each thread has its own number
    run(planner(root), InTurn(last_first=False), lambda *_: None)


def runs(root: Path) -> list[Path]:
    return list((root / "runs").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_here(root)
    return content(root)


WHEN = ["before it begins", "while it lists what is needed", "between a look and a removal", "after its first removal"]


@pytest.mark.parametrize("when", WHEN)
def test_a_run_that_begins_during_a_collection_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes], when: str
) -> None:
    """Nothing of the study is needed by the collection; at the end, the run has all of its results."""
    root = tmp_path / "store"
    run_here(root)
    beginning = threading.Thread(target=run_here, args=(root,), daemon=True)

    def begin(others: int = 1) -> None:
        if beginning.ident is None:
            beginning.start()
            until(lambda: len(runs(root)) == 1 + others, "the run says that it is here")

    def needs() -> set[str]:
        if when == "while it lists what is needed":
            begin()
        return set()

    removed: list[Entry] = []
    remove, look, looked = Store.remove, Claims.collector, threading.Event()

    def look_and_tell(claims: Claims) -> str | None:
        looked.set()
        return look(claims)

    def remove_and_begin(store: Store, entry: Entry) -> None:
        if when == "between a look and a removal":
            begin()
            until(lambda: looked.is_set() or not beginning.is_alive(), "the run looks for a collection")
        remove(store, entry)
        removed.append(entry)
        begin()

    monkeypatch.setattr(Claims, "collector", look_and_tell)

    monkeypatch.setattr(Store, "remove", remove_and_begin)
    if when == "before it begins":
        with Claims(root), pytest.raises(UserError, match="another run of tombola uses it"):
            collect(Store(root), needs)
    else:
        with pytest.raises(UserError, match=r"another run of tombola has begun to use it; [01] of \d+ results"):
            collect(Store(root), needs)
        beginning.join(LONG)
        assert not beginning.is_alive()
    assert len(removed) == ("removal" in when)
    assert content(root) == undisturbed


def test_a_run_sees_a_collection_and_the_other_way_round(tmp_path: Path) -> None:
    Store(tmp_path)
    with Claims(tmp_path, collects=True) as collecting:
        assert collecting.collector() is None
        with Claims(tmp_path) as running:
            assert running.collector() == f"process {os.getpid()} on {os.uname().nodename}"
            assert not collecting.alone()
            assert collecting.collector() is None
        assert collecting.take(key := "0" * 64)
        assert collecting.alone()
        assert collecting.owner(key), "what is its own is no claim of a dead run"
        dead = collecting._file.with_name(f"dead.1.{'0' * 8}")
        dead.write_bytes(collecting._file.read_bytes())
    with Claims(tmp_path) as running:
        assert running.collector() is None


def test_a_run_that_begins_during_a_collection_is_told_of_it(tmp_path: Path) -> None:
    told: list[str | None] = []

    def needs() -> set[str]:
        with Claims(tmp_path) as running:
            told.append(running.collector())
        return set()

    store = Store(tmp_path)
    temporary_folder(tmp_path).joinpath("half").write_text("x")
    collect(store, needs)
    assert not temporary_folder(tmp_path).joinpath("half").exists()
    assert told == [f"process {os.getpid()} on {os.uname().nodename}"]


def test_a_claim_is_left_to_its_run_also_if_it_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path)
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert theirs.take("key")
        ours._bury(tmp_path / "claims" / "key")  # it took the claim for that of a dead run
        assert not ours.take("key")
        monkeypatch.setattr(claims_module, "open_regular", lambda path: forbid(path, path))
        assert not ours.take("key")


def test_looking_at_a_claim_disturbs_nobody_else_who_looks(tmp_path: Path) -> None:
    (tmp_path / "claim").touch()
    with (tmp_path / "claim").open() as one, (tmp_path / "claim").open() as other:
        fcntl.flock(one, fcntl.LOCK_SH)
        assert not claims_module._is_locked(other.fileno())


def test_a_run_that_ends_while_claims_are_checked_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_and_read(path: Path) -> None:
        path.unlink()
        path.read_bytes()

    monkeypatch.setattr(claims_module, "read_document", remove_and_read)
    Store(tmp_path)
    with Claims(tmp_path):
        assert list(claims_module.check_claims(tmp_path)) == []


def test_a_run_says_that_it_has_waited_for_a_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["process 1 on a", "process 1 on a", None])
    monkeypatch.setattr(Claims, "collector", lambda _: next(answers))
    monkeypatch.setattr("tombola.engine.run._WAIT", 0.0)
    status = run(planner(tmp_path / "store"), InTurn(last_first=False), lambda *_: None)
    assert status.notes == ["process 1 on a was removing results from the store; this run has waited for it"]


def forbid(path: Path, target: Path) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))


def test_a_collection_removes_what_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    run_here(root)
    before = content(root)
    needed = {results(root)[0].name}
    planned = collect(Store(root), lambda: needed, remove=False)
    assert content(root) == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", forbid)
        with pytest.raises(UserError, match="cannot be removed: Operation not permitted"):
            Store(root).remove(planned.removed[0])
    assert content(root) == before
    done = collect(Store(root), lambda: needed)
    assert done == planned
    assert [path.name for path in results(root)] == sorted(needed)
    assert {entry.name for entry in done.kept} == needed
    assert not runs(root)


MANY = 16


@pytest.mark.parametrize("round", range(4))
def test_many_processes_make_one_store_at_the_same_moment(tmp_path: Path, round: int) -> None:
    """Each makes it, tries whether it can write, says that it is here and sweeps, as a run does."""
    barrier = threading.Barrier(MANY)

    def make(number: int) -> None:
        barrier.wait(LONG)
        store = Store(tmp_path / "a" / "store")
        store.check_writable()
        with Claims(store.root) as claims:
            store.sweep(claims.alone)

    with ThreadPoolExecutor(MANY) as pool:
        assert list(pool.map(make, range(MANY))) == [None] * MANY
    assert not list((tmp_path / "a/store/runs").iterdir())


def test_a_store_that_another_process_makes_in_between_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = Store._read_version, []

    def read_then_make(store: Store) -> int | None:
        version = real(store)
        if not made:
            made.append(True)
            Claims(Store(tmp_path).root).__exit__()  # there are other folders in the store too
        return version

    monkeypatch.setattr(Store, "_read_version", read_then_make)
    Store(tmp_path)
    (tmp_path / "store.json").unlink()
    with pytest.raises(StoreError, match="is not empty and is not a store"):
        Store(tmp_path)


def test_an_unfinished_marker_that_another_process_sweeps_away_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store_module.write_atomically

    def write_twice(path: Path, *more: Any) -> None:
        real(path, *more)
        raise UserError("cannot be written: No such file or directory")

    monkeypatch.setattr(store_module, "write_atomically", write_twice)
    Store(tmp_path / "store")


def test_a_file_that_another_process_sweeps_away_does_not_make_a_store_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile.mkstemp

    def make_and_remove(**where: Any) -> tuple[int, str]:
        handle, name = real(**where)
        os.unlink(name)
        return handle, name

    store = Store(tmp_path / "store")
    monkeypatch.setattr(tempfile, "mkstemp", make_and_remove)
    store.check_writable()


def forge(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], changed: float) -> None:
    """Write a run's file that another machine, or this one before a reboot, has left; nobody has locked it."""
    about = change(json.loads(path.read_text()))
    path.with_name(f"{path.name.partition('.')[0]}.1.00000000").write_text(json.dumps(about))
    left = path.with_name(f"{path.name.partition('.')[0]}.1.00000000")
    os.utime(left, (changed, changed))


@pytest.mark.parametrize(
    ("change", "changed", "alone"),
    [
        ({"host": "boot before"}, 999.0, True),
        ({"host": "boot before"}, 1001.0, False),  # it has been touched since
        ({"host": "another", "machine": "another"}, 999.0, False),
        ({"host": "another", "name": "another"}, 999.0, False),
        (
            {"locked": False},
            999.0,
            False,
        ),  # since the boot, on a file system without locks, by a clock that was set back
        ({"host": "boot before", "machine": None}, 999.0, False),  # of a container, or of an earlier version
    ],
)
def test_a_run_from_before_a_reboot_is_dead_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], changed: float, alone: bool
) -> None:
    monkeypatch.setattr(claims_module, "_machine_id", lambda: "this machine")
    with Claims(tmp_path, booted=1000.0) as ours:
        forge(ours._file, lambda about: about | change, changed)
        assert ours.alone() == alone
        assert len(runs(tmp_path)) == 2 - alone


def test_the_time_of_the_boot_is_in_the_past() -> None:
    assert 0 <= claims_module._boot_time() < claims_module.time.time()

"""kill -9 at any moment, then the same again: the store comes out byte for byte as if nothing had happened."""

from __future__ import annotations

import errno
import math
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import hypothesis
import pytest

from gate import Gate
from processes import LONG, fork, kill, run_command, status_of, wait_for_end, workers_of
from stores import RECORD, content, planner, records, results, run_study, study, write_study
from tombola.engine.local import LocalWorkers
from tombola.engine.run import run
from tombola.store.store import Store

GATE = Gate()
STUDY = GATE.before(study(["magnitude", "l1", "l2"], seeds=(0, 1), levels=2))


def drive(root: Path, writes: int = 0, workers: int = 2) -> int:
    """Run the study in a process of its own, with a checkpoint after each iteration; return its number.

    After SIGUSR1 the process writes so many times more to the disk, and is killed at the next time.
    """

    def work() -> None:
        _die_writing(writes)
        with LocalWorkers(workers, STUDY.task, None, root, checkpoint_every=0) as processes:
            run(planner(root, STUDY), processes, lambda *_: None)

    return fork(work)


def _die_writing(writes: int) -> None:
    """Have this process killed when it has written some times more to the disk after SIGUSR1.

    The signal itself replaces no function: it may come while a user's code is watched, which would be blamed for it.
    """
    real, left = os.fsync, math.inf

    def begin(*_: object) -> None:
        nonlocal left
        left = writes

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    signal.signal(signal.SIGUSR1, begin)


pytestmark = pytest.mark.xdist_group("processes")  # the process that workers are copies of starts once


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The study's store."""
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_study(root, STUDY)  # from here on the process that workers are copies of is there
    return content(root)


def kill_worker(gate: Gate, parent: int) -> None:
    """Kill a worker in the middle of a training."""
    arrival = gate.next()
    arrival.die()
    wait_for_end(arrival.pid)


def kill_writing_worker(gate: Gate, parent: int) -> None:
    """Kill a worker in the middle of writing a checkpoint."""
    arrival = gate.next()
    arrival.die_writing()
    wait_for_end(arrival.pid)


def kill_parent(gate: Gate, parent: int) -> None:
    """Kill the parent while a worker of it is in the middle of a training."""
    arrival = gate.next()
    kill(parent)
    wait_for_end(arrival.pid)  # by itself, at the gate: if it went on, it might write a checkpoint before
    arrival.go()


def kill_writing_parent(gate: Gate, parent: int) -> None:
    """Kill the parent in the middle of storing a result."""
    os.kill(parent, signal.SIGUSR1)
    while arrival := gate.next_before_end_of(parent):
        arrival.go()
    assert status_of(parent) == -signal.SIGKILL


def kill_both(gate: Gate, parent: int) -> None:
    """Kill the parent, and a worker at the same time."""
    arrival = gate.next()
    arrival.die()
    kill(parent)


KILLS: list[Callable[[Gate, int], None]] = [
    kill_worker,
    kill_writing_worker,
    kill_parent,
    kill_writing_parent,
    kill_both,
]


@pytest.mark.parametrize("seed", range(hypothesis.settings.default.max_examples // 100))
def test_kills_change_no_byte(tmp_path: Path, undisturbed: dict[str, bytes], seed: int) -> None:
    """Ten kills in a row, of the parent, a worker or both; the same command again after each of the parent."""
    chance = random.Random(seed)
    root = tmp_path / "store"
    kills = chance.sample(2 * KILLS, 2 * len(KILLS))
    workers_killed = 0  # of one parent
    with GATE.opened() as gate:
        parent = drive(root, writes=chance.randrange(12))
        for how in kills:
            for _ in range(chance.randrange(2, 25)):
                arrival = gate.next_before_end_of(parent)
                assert arrival is not None, "the study is over before the last kill"
                arrival.go()
            before = workers_of()
            if how in (kill_worker, kill_writing_worker) and workers_killed == 2:
                how = kill_both  # a run ends if a worker is killed three times in the same training
            workers_killed = workers_killed + 1 if how in (kill_worker, kill_writing_worker) else 0
            how(gate, parent)
            if not workers_killed:
                wait_for_end(*before)  # of themselves: their parent is gone
                parent = drive(root, writes=chance.randrange(12))
    assert status_of(parent) == 0
    assert content(root) == undisturbed
    assert all(set(record) == RECORD for record in records(root))


def test_work_is_kept_over_a_kill(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """A study is killed in the middle of its third training, which goes on from where it was."""
    root = tmp_path / "store"
    with GATE.opened() as gate:
        parent = drive(root, workers=1)
        while arrival := gate.next_before_end_of(parent):
            if len(results(root)) == 2 and arrival.iteration == 20:
                break
            arrival.go()
        assert arrival is not None
        kill(parent)
        wait_for_end(arrival.pid)  # before it writes another checkpoint
        arrival.go()
    stored = {path.name for path in results(root)}
    (checkpoint,) = (root / "checkpoints").iterdir()
    assert checkpoint.stem not in stored
    status = run_study(root, STUDY)
    assert status.done == len(results(root)) - len(stored)
    assert content(root) == undisturbed
    lengths = {path.name: Store(root).results.record(path.name)["iterations"] for path in results(root)}
    assert lengths.pop(checkpoint.stem) == 50 - 20
    assert sorted(lengths.values()) == [10] * 2 + [50] * 13, "every other training was done from its beginning"


def _limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_said_and_when_there_is_room_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [*write_study(tmp_path), "--workers", "1"]
    done = run_command(tmp_path, command, before=partial(_limit_files, 2500))
    assert done.returncode == 2
    assert "cannot be written: File too large; all results that were stored before are kept" in done.stderr
    assert "Traceback" not in done.stderr
    store = tmp_path / "tombola-store"
    assert not results(store)
    run_study(store)
    run_study(tmp_path / "undisturbed")
    assert content(store) == content(tmp_path / "undisturbed")


def test_a_disk_that_fills_in_the_middle_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola.errors import UserError

    real = os.fsync
    room = 30

    def fsync(handle: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left on device; all results that were stored before are kept"):
            run_study(tmp_path / "store")
    finished = len(results(tmp_path / "store"))
    assert finished >= 1
    status = run_study(tmp_path / "store")
    run_study(tmp_path / "undisturbed")
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")
    assert status.done == len(results(tmp_path / "store")) - finished


def test_a_read_only_store_is_refused_with_a_sentence(tmp_path: Path) -> None:
    run_study(tmp_path / "tombola-store")
    before = content(tmp_path / "tombola-store")
    _, _, file = write_study(tmp_path)
    code = f"""
from tombola.cli import main
assert main(["run", {file!r}]) == 2
assert main(["results", {file!r}]) == 0
"""
    done = subprocess.run(
        [*_read_only(tmp_path / "tombola-store"), sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LONG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("it cannot be written to: Read-only file system")
    assert "magnitude" in done.stdout
    assert content(tmp_path / "tombola-store") == before


def _read_only(folder: Path) -> list[str]:
    """Return what runs a command to which a folder is a file system that cannot be written to."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    for private in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        command = [*private, "sh", "-c", mount, str(folder)]
        with suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True, check=False, timeout=LONG).returncode == 0:
                return command
    pytest.skip("no file system can be mounted here; to run it: as root, or where a user may unshare namespaces")

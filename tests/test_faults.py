"""kill -9 at any moment, then the same again: the store comes out byte for byte as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import time
import warnings
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest

from stores import TASK, content, planner, records, results, run_study, study, write_study
from tombola.engine.local import LocalWorkers
from tombola.engine.run import run

KILLS = 20
STUDY = study(["magnitude", "l1", "l2"], seeds=(0, 1), levels=2, iterations=100, rewind=20)


def drive(root: Path) -> int:
    """Run the study in a process of its own, with a checkpoint every few milliseconds; return its number.

    It is a copy of this process, and so are its workers copies of one that has imported all they need: to start costs
    nothing. Otherwise it is a process like any other, and dies like one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        forkserver._forkserver.ensure_running = lambda: (
            None
        )  # it runs, as a child of the process that this is a copy of
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        plan = planner(root, STUDY)
        with LocalWorkers(2, TASK, None, root, checkpoint_every=0.005) as workers:
            run(plan, workers, lambda *_: None)
        status = 0
    finally:
        os._exit(status)


def workers() -> list[int]:
    server = forkserver._forkserver._forkserver_pid
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG) != (0, 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The study's store, and how long it takes."""
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_study(root, study(levels=0))  # from here on the process that workers are copies of is there
    began = time.monotonic()
    assert os.waitpid(drive(root.with_name("timed")), 0)[1] == 0
    return content(root.with_name("timed")), time.monotonic() - began


@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_change_no_byte(
    tmp_path: Path, undisturbed: tuple[dict[str, bytes], float], seed: int
) -> None:
    """Five kills in a row, of the parent, a worker or both; the same command again after each of the parent."""
    expected, seconds = undisturbed
    chance = random.Random(seed)
    kills = stores = 0
    while kills < KILLS // 4:  # more than one study, where one is faster than that
        root = tmp_path / f"store{stores}"
        stores += 1
        parent = drive(root)
        while True:
            time.sleep(chance.uniform(0, seconds / 3))
            whom = chance.choice(["parent", "worker", "both"])
            if kills == KILLS // 4 or ended(parent):
                break
            doomed = workers() if whom != "parent" else []
            if doomed:
                os.kill(chance.choice(doomed), signal.SIGKILL)
            if whom != "worker" or not doomed:
                os.kill(parent, signal.SIGKILL)
                os.waitpid(parent, 0)
                parent = drive(root)
            kills += 1
        with suppress(ChildProcessError):  # it has been waited for
            os.waitpid(parent, 0)
        assert content(root) == expected
        assert all(record for record in records(root))


def test_work_is_kept_over_a_kill(tmp_path: Path, undisturbed: tuple[dict[str, bytes], float]) -> None:
    """A study is killed as soon as there is a checkpoint of a training far on: it is gone on from there."""
    root = tmp_path / "store"
    parent = drive(root)
    while not list((root / "checkpoints").glob("*")) or len(results(root)) < 2:
        time.sleep(0.001)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    finished = len(results(root))
    began = time.monotonic()
    while workers():
        assert time.monotonic() - began < 5, "a worker outlives its parent"
        time.sleep(0.01)
    status = run_study(root, STUDY)
    assert status.done == len(results(root)) - finished
    assert content(root) == undisturbed[0]
    assert any(record["iterations"] < 80 for record in records(root)), "nothing went on from a checkpoint"


def _limited_to(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_said_and_when_there_is_room_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [*write_study(tmp_path), "--workers", "1"]
    full = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, preexec_fn=lambda: _limited_to(2500), check=False
    )
    assert full.returncode == 2
    assert "cannot be written: File too large; what was stored before is kept, the same command goes on" in full.stderr
    assert "Traceback" not in full.stderr
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
        with pytest.raises(UserError, match="No space left on device; what was stored before is kept"):
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
    command = write_study(tmp_path)
    mount = 'mount --bind tombola-store tombola-store && mount -o remount,ro,bind tombola-store && exec "$@"'
    private = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*private, "true"], cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run([*private, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("it cannot be written to: Read-only file system")
    command[1] = "results"
    done = subprocess.run([*private, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "magnitude" in done.stdout
    assert content(tmp_path / "tombola-store") == before

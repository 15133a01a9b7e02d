"""The engine: who does the trainings, in which order, beside what, and after which kills changes no bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores import TASK, InTurn, content, planner, problem, records, results, run_study, study, write_study
from tombola.engine import estimate as estimates
from tombola.engine.estimate import Speed
from tombola.engine.job import Job, Outcome, perform
from tombola.engine.local import LocalWorkers
from tombola.engine.run import Status, run
from tombola.engine.workers import At, Event, Failed
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.store.claims import Claims
from tombola.store.store import Store
from tombola.study.trainings import Training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of the small study, done by one worker."""
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_study(root, workers=1)
    return content(root)


def workers_of(server: int | None = None) -> list[int]:
    """The processes of workers: the children of the process that they are copies of."""
    server = server or forkserver._forkserver._forkserver_pid
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


def test_the_number_of_workers_changes_no_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    status = run_study(tmp_path / "store", workers=3)
    assert content(tmp_path / "store") == undisturbed
    assert status.done == status.total == len(results(tmp_path / "store"))


def test_the_order_of_completion_changes_no_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    two = study(seeds=(0, 1))
    orders = []
    for last_first in (False, True):
        workers = InTurn(last_first=last_first)
        run(planner(tmp_path / str(last_first), two), workers, lambda *_: None)
        orders.append(workers.order)
    assert orders[0] != orders[1]
    assert content(tmp_path / "False") == content(tmp_path / "True")
    assert undisturbed.items() <= content(tmp_path / "True").items()


def test_other_studies_in_the_store_change_no_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    root = tmp_path / "store"
    run(planner(root, study(["l2"], seeds=(1,), lr=0.1)), InTurn(last_first=False), lambda *_: None)
    others = content(root)
    status = run_study(root)
    assert content(root) == others | undisturbed
    assert status.done == len(results(root)) - sum(name.endswith("result.json") for name in others)


def test_a_finished_study_trains_nothing_and_a_longer_one_only_what_is_new(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    root = tmp_path / "store"
    run_study(root)
    workers = InTurn(last_first=False)
    assert run(planner(root), workers, lambda *_: None).total == 0
    assert workers.order == []
    assert run(planner(root, study(levels=2)), workers, lambda *_: None).done == len(workers.order) == 2
    assert undisturbed.items() <= content(root).items()


SURROUNDINGS = [
    {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "1", "LC_ALL": "C"},
    {
        "TZ": "America/St_Johns",
        "PYTHONHASHSEED": "4242",
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "tr_TR.UTF-8",
        "COLUMNS": "20",
    },
]


def test_time_zone_locale_and_hash_seed_change_no_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    command = [*write_study(tmp_path), "--workers", "1", "--store"]
    runs = [
        subprocess.Popen(
            [*command, str(number)], env=os.environ | surroundings, stdout=subprocess.DEVNULL, cwd=tmp_path
        )
        for number, surroundings in enumerate(SURROUNDINGS)
    ]
    assert [process.wait() for process in runs] == [0, 0]
    for number in range(2):
        assert content(tmp_path / str(number)) == undisturbed


def test_a_killed_worker_is_replaced_and_its_job_goes_on_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    root = tmp_path / "store"
    long = study(["magnitude"], levels=0, iterations=6000)
    plan = planner(root, long)
    killed: list[int] = []

    def kill(status: Status, _: Training | None) -> None:
        stopped = {path.stem for path in (root / "checkpoints").glob("*")}
        running = {key for key, (training, _) in status.running.items() if training.end == plan.end}
        for pid in [worker.process.pid or 0 for worker in workers._workers]:
            if len(killed) < 2 and pid not in killed and stopped & running:
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

    with LocalWorkers(1, TASK, None, root, checkpoint_every=0.01) as workers:
        run(plan, workers, kill)
    assert len(killed) == 2
    run_study(tmp_path / "undisturbed", long, workers=1)
    assert content(root) == content(tmp_path / "undisturbed")
    length = max(record["iterations"] for record in records(tmp_path / "undisturbed"))
    assert all(record["iterations"] < length for record in records(root)), "nothing went on from a checkpoint"


def test_a_job_that_kills_every_worker_is_given_up_with_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run(planner(root, study(["l1"], levels=0)), InTurn(last_first=False), lambda *_: None)

    def kill(status: Status, _: Training | None) -> None:
        for pid in workers_of():
            os.kill(pid, signal.SIGKILL)

    with LocalWorkers(1, TASK, None, root) as workers:
        before = content(root)
        with pytest.raises(
            UserError, match=r"level 0 failed: its process was ended by SIGKILL, 3 times; is there enough"
        ):
            run(
                planner(
                    root,
                    study(["l1"], iterations=10_000, levels=1).model_copy(),
                ),
                workers,
                kill,
            )
        assert before.items() <= content(root).items()


def test_a_checkpoint_cut_in_half_is_not_used(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    root = tmp_path / "store"
    waits_for = planner(root).progress(planner(root).chains[0]).waits_for
    assert waits_for is not None
    stopped: list[bytes] = []

    class Enough(Exception):
        pass

    def stop(iteration: int, checkpoint: Any) -> None:
        from tombola.store.checkpoints import checkpoint_to_bytes

        if iteration == 5:
            stopped.append(checkpoint_to_bytes(checkpoint()))
            raise Enough

    with pytest.raises(Enough):
        perform(Job.of(waits_for, study()), problem(), None, stop)
    store = Store(root)
    store.checkpoints.put(waits_for.key, stopped[0][: len(stopped[0]) // 2])
    run_study(root, workers=1)
    assert content(root) == undisturbed
    assert store.results.record(waits_for.key)["iterations"] == 10


def test_a_checkpoint_is_gone_on_from_to_the_same_bits(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    from tombola.store.checkpoints import checkpoint_to_bytes

    for level, at in (("rewind point", 3), ("level 0", 31), ("level 1", 45)):
        root = tmp_path / level
        run(planner(root, study(levels=0)), InTurn(last_first=False), lambda *_: None) if level == "level 1" else None
        if level == "level 0":
            waits = planner(root).progress(planner(root).chains[0]).waits_for
            assert waits is not None
            Store(root).results.put(
                waits.key,
                waits.identity,
                waits.mask,
                perform(Job.of(waits, study()), problem(), None, lambda *_: None).trained,
                {},
            )
        waits = planner(root).progress(planner(root).chains[0]).waits_for
        assert waits is not None
        taken: list[bytes] = []

        def watch(iteration: int, checkpoint: Any, at: int = at, taken: list[bytes] = taken) -> None:
            if iteration == at:
                taken.append(checkpoint_to_bytes(checkpoint()))

        perform(Job.of(waits, study()), problem(), None, watch)
        Store(root).checkpoints.put(waits.key, taken[0])
        run_study(root, workers=1)
        assert content(root) == undisturbed
        assert Store(root).results.record(waits.key)["iterations"] == waits.end - at


def test_a_flipped_byte_is_found_said_and_done_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    for name in ("weights.safetensors", "result.json", "SHA256SUMS"):
        root = tmp_path / name
        run(planner(root), InTurn(last_first=False), lambda *_: None)
        plan = planner(root)
        path = (
            plan.store.results.folder(plan.trainings(plan.chains[0])[-1].key) / name
        )  # the last level: no other waits for it
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        status = run(planner(root), InTurn(last_first=False), lambda *_: None)
        assert len(status.notes) == 1
        assert re.search(f"result {path.parent.name[:12]} is damaged", status.notes[0])
        assert status.done == 1
        assert content(root) == undisturbed


def test_workers_end_by_themselves_when_the_parent_is_gone(tmp_path: Path) -> None:
    driver = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from stores import *
from multiprocessing import forkserver
said = []
def say(status, _):
    if status.running and not said:
        print(forkserver._forkserver._forkserver_pid, flush=True)
        said.append(1)
root = Path({str(tmp_path / "store")!r})
plan = planner(root, study(iterations=1_000_000, rewind=0))
with LocalWorkers(1, TASK, None, root) as workers:
    run(plan, workers, say)
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    server = int(process.stdout.readline())
    while not (orphans := workers_of(server)):
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    began = time.monotonic()
    while any(_running(pid) for pid in [server, *orphans]):
        assert time.monotonic() - began < 5, "an orphan goes on"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_user_did_wrong_is_said_by_the_worker(tmp_path: Path) -> None:
    plan = planner(tmp_path / "store")
    with (
        LocalWorkers(1, TASK.model_copy(update={"model": "no_such_model"}), None, None) as workers,
        pytest.raises(
            UserError, match=r"rewind point failed: task\.model: unknown model 'no_such_model'|level 0 failed"
        ),
    ):
        run(plan, workers, lambda *_: None)


# Several at once


def test_two_runs_at_once_share_the_work(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """One run is begun inside the other, whenever that one has a training under way."""
    root = tmp_path / "store"
    inner: list[list[str]] = []

    def begin_another(status: Status, _: Training | None) -> None:
        if status.running and len(inner) < 3:
            claimed = set(status.running)
            other = InTurn(last_first=True)
            plan = planner(root)

            def stop(inner_status: Status, finished: Training | None) -> None:
                waits = {p.waits_for.key for p in inner_status.chains.values() if p.waits_for}
                assert not claimed & set(inner_status.running), "work of the other run is repeated"
                if waits <= claimed:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                run(plan, other, stop)
            inner.append(other.order)

    outer = _Slow()
    run(planner(root), outer, begin_another)
    done = outer.order + [key for order in inner for key in order]
    assert len(inner) == 3
    assert sorted(done) == sorted({folder.name for folder in results(root)}), "done twice, or not at all"
    assert content(root) == undisturbed


class _Slow(InTurn):
    """Tells that a training is under way before it does it."""

    count = 1

    def __init__(self) -> None:
        super().__init__(last_first=False)
        self._told: set[str] = set()

    def events(self, timeout: float) -> Iterator[Event]:
        if self._jobs and self._jobs[0].key not in self._told:
            self._told.add(self._jobs[0].key)
            yield At(self._jobs[0].key, 0)
        else:
            yield from super().events(timeout)


def test_two_commands_at_once_share_the_work(tmp_path: Path) -> None:
    both = study(["magnitude", "l1", "l2"], seeds=(0, 1))
    command = [*write_study(tmp_path, both), "--workers", "1"]
    orders = (["magnitude", "l1", "l2"], ["l2", "l1", "magnitude"])
    together = [
        subprocess.Popen([*command, "--importances", *order], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for order in orders
    ]
    outputs = [process.communicate()[0] for process in together]
    assert [process.returncode for process in together] == [0, 0]
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("[")]
    assert len(lines) == len(results(tmp_path / "tombola-store")) == 10, "a training was done twice"
    run(planner(tmp_path / "alone", both), InTurn(last_first=False), lambda *_: None)
    assert content(tmp_path / "alone") == content(tmp_path / "tombola-store")


def test_a_claim_is_for_one(tmp_path: Path) -> None:
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert ours.take("key")
        assert ours.take("key")
        assert not theirs.take("key")
        assert f"process {os.getpid()} on " in (theirs.owner("key") or "")
        theirs.release("key")  # it is not theirs to release
        assert not theirs.take("key")
        ours.release("key")
        assert theirs.take("key")
        assert not ours.take("key")
        assert not ours.alone()
    with Claims(tmp_path) as ours:
        assert ours.take("key")
        assert ours.alone()
    assert not list((tmp_path / "runs").iterdir())
    assert not list((tmp_path / "claims").iterdir())


def test_a_claim_dies_with_its_owner(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from tombola.store.claims import Claims
claims = Claims(Path({str(tmp_path)!r}))
print(claims.take("key"), flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    with Claims(tmp_path) as ours:
        assert not ours.take("key")
        assert not ours.alone()
        other.kill()
        other.wait()
        other.stdout.close()
        assert ours.take("key")
        assert ours.alone()


def test_a_claim_on_another_machine_dies_with_its_heartbeat(tmp_path: Path) -> None:
    """No lock is looked at between machines: only whether the file goes on changing, by the reader's own clock."""
    with Claims(tmp_path, host="here", heartbeat=600, patience=0.5) as ours:
        theirs = Claims(tmp_path, host="there", heartbeat=0.05)
        assert theirs.take("key")
        os.utime(theirs._handle, (0, 0))  # a clock of 1970
        for _ in range(15):
            assert not ours.take("key")
            time.sleep(0.1)
        theirs._over.set()
        theirs._beating.join()
        assert not ours.take("key")
        time.sleep(0.7)
        assert ours.take("key")
        assert not theirs.take("another") or theirs._file.exists()  # it finds itself buried, and begins anew
        theirs.__exit__()
        assert not ours.take("another") or ours.owner("another")


def test_a_file_system_without_hard_links_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    run(planner(tmp_path / "store"), InTurn(last_first=False), lambda *_: None)
    assert content(tmp_path / "store") == undisturbed


def test_records_say_where_and_how_long(tmp_path: Path) -> None:
    run(planner(tmp_path / "store", study(["l1"], levels=0)), InTurn(last_first=False), lambda *_: None)
    for record in records(tmp_path / "store"):
        assert record["threads"] == 1
        assert record["device"] == "cpu"
        assert 0 < record["seconds_per_iteration"] * record["iterations"] < 2 * record["seconds"] + 1
        assert set(record["machine"]) >= {"processor", "features", "instruction_set", "versions", "commit"}
        assert json.dumps(record)


def test_events_name_their_job() -> None:
    assert {At("k", 1).key, Failed("k", "why").key, Outcome("k", b"", b"", {}, {}).key} == {"k"}


# Predictions


class _Lasting(InTurn):
    """Workers whose trainings last as long as they are said to, by a clock of their own."""

    def __init__(self, count: int, speed: Speed) -> None:
        super().__init__(last_first=False)
        self.count = count
        self.now = 0.0
        self._speed = speed
        self._done_at: dict[str, float] = {}

    def submit(self, job: Job) -> None:
        super().submit(job)
        mask = Mask(job.shapes, {name: np.frombuffer(bits, np.uint8) for name, bits in job.bits.items()})
        self._done_at[job.key] = self.now + self._speed.training(mask.density, job.end - job.begin)

    def events(self, timeout: float) -> Iterator[Event]:
        job = min(self._jobs, key=lambda job: self._done_at[job.key])
        self._jobs.remove(job)
        self.now = self._done_at[job.key]
        yield perform(job, problem(), None, lambda *_: None)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_run_takes_as_long_as_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Sparser levels are faster here; the chains of two seeds are of unequal length."""
    speed = Speed({1.0: 0.01, 0.25: 0.004}, beside=0.05, start=0.0, source="said")
    of = study(["magnitude", "l1"], seeds=(0, 1), levels=2)
    run(
        planner(tmp_path / "store", study(["magnitude"], seeds=(1,), levels=1)),
        InTurn(last_first=False),
        lambda *_: None,
    )
    monkeypatch.setattr(estimates, "_speed", lambda *_: speed)
    plan = planner(tmp_path / "store", of)
    expected = estimates.estimate(plan, workers)
    lasting = _Lasting(workers, speed)
    run(plan, lasting, lambda *_: None)
    assert expected.to_train == 8 + 1
    assert lasting.now == pytest.approx(expected.seconds, rel=0.1)
    assert expected.critical is not None
    assert expected.critical[0].seed == 0
    assert expected.critical[1] <= expected.seconds + 1e-9


def test_speeds_come_from_records_and_by_density(tmp_path: Path) -> None:
    plan = planner(tmp_path / "store", study(["l1"], levels=2))
    run(plan, InTurn(last_first=False), lambda *_: None)
    for training in plan.trainings(plan.chains[0]):
        path = plan.store.results.folder(training.key) / "record.json"
        record = json.loads(path.read_text())
        record |= {"seconds_per_iteration": training.mask.density, "seconds": 100.0, "iterations": 10}
        path.write_text(json.dumps(record))
    longer = planner(tmp_path / "store", study(["l1"], levels=4))
    expected = estimates.estimate(longer, 2)
    assert expected.to_train == 2
    assert expected.source == "from the 4 that are done"
    # 50 iterations each, at the speed of the sparsest level known; beside them 100 - 10 x density, in the median 92.5
    assert expected.seconds_each == pytest.approx(50 * 0.25 + 92.5, rel=1e-6)
    assert expected.critical is not None
    assert expected.critical[1] == pytest.approx(2 * expected.seconds_each)


def test_a_study_that_was_never_run_is_timed(tmp_path: Path) -> None:
    expected = estimates.estimate(planner(tmp_path / "store", study(["l1"], levels=1)), 1)
    assert expected.source == "from a few iterations timed now"
    assert 0.001 < expected.seconds_each < 30
    assert expected.seconds > 3 * expected.seconds_each
    assert not results(tmp_path / "store")

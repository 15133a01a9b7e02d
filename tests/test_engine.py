"""The engine: who does the trainings, in which order, beside what, and after which kills changes no bit."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gate import Arrival, Gate
from processes import LONG, fork, start, start_command, status_of, until, wait_for_end
from stores import RECORD, TASK, InTurn, content, planner, problem, records, results, run_study, study, write_study
from tombola.cli.run import show_plan
from tombola.engine import estimate as estimates
from tombola.engine import run as engine
from tombola.engine.forecast import Speed
from tombola.engine.here import WorkersHere
from tombola.engine.job import Job, Outcome, perform
from tombola.engine.local import LocalWorkers
from tombola.engine.machine import machine
from tombola.engine.run import Status, run
from tombola.engine.workers import At, Event, Failed, make_watch
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.store.claims import Claims
from tombola.store.store import Store
from tombola.study.trainings import Training
from tombola.training.history import Checkpoint

pytestmark = pytest.mark.xdist_group("processes")  # the process that workers are copies of starts once


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of the small study, done by one worker."""
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_study(root, workers=1)
    return content(root)


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


SURROUNDINGS = {
    "TZ": "America/St_Johns",
    "PYTHONHASHSEED": "4242",
    "LC_ALL": "tr_TR.UTF-8",
    "LANG": "tr_TR.UTF-8",
    "COLUMNS": "20",
}


def test_time_zone_locale_and_hash_seed_change_no_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from stores import *\n"
        "torch.set_num_threads(1)\n"
        "run(planner(Path(sys.argv[1])), InTurn(last_first=False), lambda *_: None)"
    )
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": here} | SURROUNDINGS
    with start([sys.executable, "-c", code, str(tmp_path / "store")], env=environment) as process:
        assert process.wait(LONG) == 0
    assert content(tmp_path / "store") == undisturbed


def test_a_killed_worker_is_replaced_and_its_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "store"
    gate = Gate()
    of = gate.before(study(["magnitude"], levels=0))
    killed: list[int] = []

    def kill_twice(arrival: Arrival) -> None:
        """Once 20 iterations after level 0 has begun, and once 15 after it has gone on."""
        if len(killed) < 2 and arrival.iteration == (20, 15)[len(killed)]:
            killed.append(arrival.pid)
            arrival.die()
        else:
            arrival.go()

    with gate.answered(kill_twice):
        run_study(root, of, workers=1, checkpoint_every=0)
    assert len(set(killed)) == 2
    run_study(tmp_path / "undisturbed", of, workers=1)
    assert content(root) == content(tmp_path / "undisturbed")
    assert sorted(record["iterations"] for record in records(root)) == [10, 50 - 20 - 15]
    assert sorted(record["iterations"] for record in records(tmp_path / "undisturbed")) == [10, 50]


def test_a_job_that_kills_every_worker_is_given_up_with_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "store"
    gate = Gate()
    killed: list[int] = []

    def kill_level_0(arrival: Arrival) -> None:
        if arrival.iteration == 15:  # the rewind point has 10
            killed.append(arrival.pid)
            arrival.die()
        else:
            arrival.go()

    with (
        gate.answered(kill_level_0),
        pytest.raises(
            UserError, match=r"level 0 failed: its process was ended by SIGKILL, 3 times; is there enough memory\?$"
        ),
    ):
        run_study(root, gate.before(study(["l1"])), workers=1)
    assert len(set(killed)) == 3
    assert [record["iterations"] for record in records(root)] == [10], "what was done is kept"


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
            plan.store.results.folder(plan.progress(plan.chains[0]).trainings[-1].key) / name
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
    """In the middle of a training."""
    gate = Gate()
    command = [*write_study(tmp_path, gate.before(study())), "--workers", "1"]
    with gate.opened(), start_command(tmp_path, command) as (process, _, _):
        arrival = gate.next()
        while arrival.pid == process.pid:  # it tries the model out
            arrival.go()
            arrival = gate.next()
        process.kill()
        process.join(LONG)
        wait_for_end(arrival.pid)
        arrival.go()


def test_a_worker_says_that_the_store_was_damaged_since_the_run_began(tmp_path: Path) -> None:
    plan = planner(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_bytes(b"")
    with (
        LocalWorkers(1, TASK, None, tmp_path / "store") as workers,
        pytest.raises(UserError, match=r"level 0 failed: store .*store\.json"),
    ):
        run(plan, workers, lambda *_: None)


def test_what_a_user_did_wrong_is_said_by_the_worker(tmp_path: Path) -> None:
    plan = planner(tmp_path / "store")
    with (
        LocalWorkers(1, TASK.model_copy(update={"model": "no_such_model"}), None, None) as workers,
        pytest.raises(UserError, match=r"level 0 failed: task\.model: unknown model 'no_such_model'"),
    ):
        run(plan, workers, lambda *_: None)


# Several at once


def test_two_runs_at_once_share_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    """One run is begun inside the other, whenever that one has a training under way."""
    monkeypatch.setattr("tombola.engine.run._LOOK_EVERY", -1.0)  # each time round, not once a second
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


def test_two_processes_at_once_share_the_work(tmp_path: Path) -> None:
    gate = Gate()
    of = gate.before(study(["magnitude", "l1", "l2"], seeds=(0, 1)))
    run_study(tmp_path / "alone", of)

    def share(name: str, order: list[str]) -> None:
        """Do a part of the study, and write down which."""

        def note(status: Status, finished: Training | None) -> None:
            if finished is not None:
                (tmp_path / name / finished.key).touch()

        (tmp_path / name).mkdir()
        plan = planner(tmp_path / "store", of.model_copy(update={"importances": tuple(order)}))
        with LocalWorkers(1, of.task, None, None) as workers:
            run(plan, workers, note)

    with gate.opened():
        together = [fork(partial(share, name, order)) for name, order in ORDERS.items()]
        first, second = gate.next(), gate.next()
        assert first.pid != second.pid, "both are in the middle of a training, each in one of its own"
        first.go()
        second.go()
    assert [status_of(pid) for pid in together] == [0, 0]
    shares = [[path.name for path in (tmp_path / name).iterdir()] for name in ORDERS]
    assert all(shares), "one has done all of it"
    assert sorted(shares[0] + shares[1]) == sorted(path.name for path in results(tmp_path / "store"))
    assert content(tmp_path / "store") == content(tmp_path / "alone")


ORDERS = {"one": ["magnitude", "l1", "l2"], "other": ["l2", "l1", "magnitude"]}


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
import sys
from pathlib import Path
from tombola.store.claims import Claims
claims = Claims(Path({str(tmp_path)!r}))
print(claims.take("key"), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with (
        start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
        Claims(tmp_path) as ours,
    ):
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert not ours.take("key")
        assert not ours.alone()
        other.kill()
        other.wait(LONG)
        assert ours.take("key")
        assert ours.alone()


def test_a_claim_on_another_machine_dies_with_its_heartbeat(tmp_path: Path) -> None:
    """No lock is looked at between machines: only whether the file goes on changing, by the reader's own clock."""
    now = 1000.0
    with (
        Claims(tmp_path, host="here", heartbeat=LONG, patience=60, clock=lambda: now, booted=0.0) as ours,
        Claims(tmp_path, host="there", heartbeat=LONG) as theirs,
    ):
        assert theirs.take("key")
        for beat in range(5):
            os.utime(theirs._handle, (beat, beat))  # a clock of 1970
            assert not ours.take("key"), "it has changed"
            now += 59
            assert not ours.take("key"), "it has changed less than a minute ago"
        now += 1
        assert ours.take("key")
        assert ours.alone(), "the run is buried too"
        assert not theirs._file.exists()
        assert theirs.take("another"), "it finds itself buried, and begins anew"
        assert theirs._file.exists()
        assert not ours.take("another")
        assert not ours.alone()
        theirs.release("key")  # it is not theirs any more
        assert not theirs.take("key")
    assert not list((tmp_path / "runs").iterdir())
    assert not list((tmp_path / "claims").iterdir())


def test_a_run_beats(tmp_path: Path) -> None:
    with Claims(tmp_path, heartbeat=0.001) as claims:
        for _ in range(2):
            os.utime(claims._handle, (0, 0))
            until(lambda: os.fstat(claims._handle).st_mtime > 0, "the run touches its file")


def test_a_training_tells_and_keeps_by_the_clock() -> None:
    now = 0.0
    told: list[int] = []
    kept: list[float] = []
    checkpoint = Checkpoint(1, {}, {}, torch.zeros(0))
    watch = make_watch(told.append, lambda _: kept.append(now), 1.0, clock=lambda: now)
    for iteration in range(1, 26):
        now = iteration / 8
        watch(iteration, lambda: checkpoint)
    assert told == list(range(2, 26, 2)), "the first after more than a fifth of a second"
    assert kept == [1.0, 2.0, 3.0]


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
    found = records(tmp_path / "store")
    assert len(found) == 2, "the rewind point and level 0"
    for record in found:
        assert record["threads"] == 1
        assert record["device"] == "cpu"
        assert 0 < record["seconds_per_iteration"] * record["iterations"] < 2 * record["seconds"] + 1
        assert set(record) == RECORD
        assert set(record["machine"]) == set(machine())


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
    monkeypatch.setattr(estimates, "measure_speed", lambda *_, **__: speed)
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
    for training in plan.progress(plan.chains[0]).trainings:
        path = plan.store.results.folder(training.key) / "record.json"
        record = json.loads(path.read_text())
        record |= {"seconds_per_iteration": training.mask.density, "seconds": 100.0, "iterations": 10}
        path.write_text(json.dumps(record))
    longer = planner(tmp_path / "store", study(["l1"], levels=4))
    expected = estimates.estimate(longer, 2)
    assert expected.to_train == 2
    assert expected.source == "from the 4 finished trainings"
    # 50 iterations each, at the speed of the sparsest level known; beside them 100 - 10 x density, in the median 92.5
    assert expected.seconds_each == pytest.approx(50 * 0.25 + 92.5, rel=1e-6)
    assert expected.critical is not None
    assert expected.critical[1] == pytest.approx(2 * expected.seconds_each)


def test_a_study_that_was_never_run_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By workers that take 2 seconds to come and 0.01 seconds for an iteration, twice that where all is dense."""
    now = 0.0

    class Steady(InTurn):
        count = 1

        def __init__(self, *_: object) -> None:
            super().__init__(last_first=False)
            self._at = 0

        def events(self, timeout: float) -> Iterator[Event]:
            nonlocal now
            (job,) = self._jobs
            mask = Mask(job.shapes, {name: np.frombuffer(bits, np.uint8) for name, bits in job.bits.items()})
            each = 0.02 if mask.density == 1 else 0.01
            now += 20 * each if self._at else 2 + 20 * each
            self._at += 20
            yield At(job.key, self._at)

    monkeypatch.setattr(estimates, "LocalWorkers", Steady)
    monkeypatch.setattr(estimates, "time", SimpleNamespace(perf_counter=lambda: now))
    expected = estimates.estimate(planner(tmp_path / "store", study(["l1"], levels=1)), 1)
    assert expected.source == "from a few iterations timed now"
    assert expected.seconds_each == pytest.approx((10 * 0.02 + 50 * 0.02 + 50 * 0.01) / 3)
    assert expected.seconds == pytest.approx(3 * expected.seconds_each + 2)
    assert not results(tmp_path / "store")


def test_a_study_is_timed_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_TIMED_SECONDS", 0.0)  # as soon as two iterations are told of
    expected = estimates.estimate(planner(tmp_path / "store", study(["l1"], levels=1)), 1)
    assert expected.source == "from a few iterations timed now"
    assert 0 < 3 * expected.seconds_each <= expected.seconds < math.inf
    assert not results(tmp_path / "store")


def test_no_time_is_known_of_a_training_that_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Diverging(InTurn):
        count = 1

        def __init__(self, *_: object) -> None:
            super().__init__(last_first=False)

        def events(self, timeout: float) -> Iterator[Event]:
            yield Outcome(self._jobs[0].key, b"", b"", {"diverged_at": 3}, {})

    monkeypatch.setattr(estimates, "LocalWorkers", Diverging)
    of = planner(tmp_path / "store", study(["l1"], levels=1))
    expected = estimates.estimate(of, 1)
    assert expected.seconds is None
    show_plan(of, expected, 1, "table")
    said = "time: not known: a training that was timed diverged at iteration 3; lower recipe.lr"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(estimates, "_WORTH_TIMING", 0.0)
    assert estimates.prior_speed(of, 1) is None


def test_masks_are_not_computed_while_this_process_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = planner(tmp_path, study(["l1"], levels=0))
    idle = []
    with WorkersHere(of.problem, of.store) as workers:
        monkeypatch.setattr(engine, "_LOOK_EVERY", -1.0)
        monkeypatch.setattr(engine, "_take_results_of_other_runs", lambda *_: idle.append(workers.idle))
        engine.run(of, workers, lambda *_: None)
    assert idle
    assert all(idle)

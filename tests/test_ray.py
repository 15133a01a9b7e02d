"""The Ray engine, on a real cluster of two nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stores import TASK, content, planner, records, results, run_study, study, write_study
from tombola.engine.local import LocalWorkers
from tombola.engine.run import Status, run
from tombola.errors import UserError
from tombola.study.planner import Training

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'tombola[ray]'")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster
RayWorkers = pytest.importorskip("tombola.engine.ray").RayWorkers

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

STUDY = study(["magnitude", "l1", "l2"], levels=1, iterations=1000)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_study(root, STUDY)
    return content(root)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes: this process is on the first."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (its name; a busy machine would let them starve)
    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=small)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")  # while there is but the first node
    nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def run_on_ray(root: Path, show: Any = lambda *_: None, **how: Any) -> Status:
    plan = planner(root, STUDY)
    with RayWorkers(None, plan.problem, plan.study, plan.store, **how) as workers:
        return run(plan, workers, show)


def tasks() -> list[int]:
    """The processes of Ray, below this one, that are doing a training."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::_train" in (folder / "cmdline").read_bytes() and _below(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def _below(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def test_ray_gives_the_bits_of_the_local_engine(tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]) -> None:
    status = run_on_ray(tmp_path / "store")
    assert content(tmp_path / "store") == undisturbed
    assert status.done == len(results(tmp_path / "store"))


def test_a_killed_worker_and_a_lost_node_cost_only_what_they_were_doing(
    tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]
) -> None:
    root = tmp_path / "store"
    killed: list[int] = []
    lost: list[bool] = []
    before: dict[str, bytes] = {}

    def disturb(status: Status, _: Training | None) -> None:
        if not killed and len(status.running) >= 1 and list((root / "checkpoints").glob("*")) and (doomed := tasks()):
            os.kill(doomed[0], signal.SIGKILL)
            killed.append(doomed[0])
        if killed and not lost and len(status.running) == 2 and len(tasks()) == 2:
            before.update(content(root / "results"))
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            lost.append(True)

    status = run_on_ray(root, disturb, checkpoint_every=0.1)
    assert killed
    assert lost
    assert content(root) == undisturbed
    assert before.items() <= content(root / "results").items()
    assert status.done == len(results(root))
    assert any(record["iterations"] < 990 for record in records(root)), "nothing went on from a checkpoint"


def test_what_was_begun_here_is_ended_there(tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]) -> None:
    root = tmp_path / "store"

    def stop(status: Status, _: Training | None) -> None:
        if list((root / "checkpoints").glob("*")) and len(results(root)) >= 1:
            raise KeyboardInterrupt

    plan = planner(root, STUDY)
    with (
        pytest.raises(KeyboardInterrupt),
        LocalWorkers(1, TASK, None, root, checkpoint_every=0.1) as workers,
    ):
        run(plan, workers, stop)
    assert run_on_ray(root).done >= 1
    assert content(root) == undisturbed
    assert any(record["iterations"] < 990 for record in records(root)), "the checkpoint was not gone on from"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"python": "3.99"}, r"other software than this one: python: '3\.99' then"),
        ({"kernels": None}, "its kernels on one machine of the cluster and not on another"),
    ],
)
def test_other_software_on_a_node_is_said(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], said: str
) -> None:
    from tombola.engine import ray as engine

    here = engine.machine()
    monkeypatch.setattr(engine, "machine", lambda: here | other)
    with pytest.raises(UserError, match=said):
        run_on_ray(tmp_path / "store")


def test_the_command_line_runs_a_study_on_the_cluster(
    tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]
) -> None:
    command = [*write_study(tmp_path, STUDY), "--engine", "ray", "--address"]
    subprocess.run([*command, cluster.address], check=True, capture_output=True, cwd=tmp_path)
    assert content(tmp_path / "tombola-store") == undisturbed
    wrong = subprocess.run([*command, "127.0.0.1:1"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert wrong.returncode == 2
    assert "--address: no Ray cluster is reached" in wrong.stderr

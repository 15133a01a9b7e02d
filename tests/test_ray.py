"""The Ray engine, on a real cluster of two nodes on this machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gate import Arrival, Gate
from processes import LONG, run_command
from stores import TASK, content, planner, results, run_study, study, write_study
from tombola.engine.local import LocalWorkers
from tombola.engine.run import Status, run
from tombola.errors import ClusterError, UserError
from tombola.hooks import Hook, Report, StopTraining
from tombola.hooks.tell import tell_hooks
from tombola.store.store import Store
from tombola.study.schema import Study
from tombola.study.trainings import Training

INSTALLED = importlib.util.find_spec("ray") is not None
if INSTALLED:
    import ray
    from ray.cluster_utils import Cluster

    from tombola.engine.ray import RayWorkers

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="Ray is not installed; to run: make .venv/installed-checks"),
    pytest.mark.filterwarnings("default"),  # Ray's own
    pytest.mark.xdist_group("ray"),  # one cluster for all
]

GATE = Gate()
STUDY = GATE.before(study(["magnitude", "l1", "l2"]))
REWIND, LEVEL = 10, 50
"""Iterations of the trainings: one to the rewind point, and four of levels."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    run_study(root, STUDY)
    return content(root)


def start_node(start: Callable[[], Any]) -> Any:
    """Start a node of the cluster: Ray gives up after 30 seconds, which may be too short on a busy machine."""
    for _ in range(9):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes: this process is on the first."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (its name; a busy machine would let them starve)
    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    nodes = start_node(partial(Cluster, initialize_head=True, head_node_args=small))
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")  # while there is but the first node
    start_node(partial(nodes.add_node, num_cpus=1, object_store_memory=100_000_000))
    nodes.wait_for_nodes(timeout=LONG)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def run_on_ray(
    root: Path, show: Any = lambda *_: None, of: Study = STUDY, hooks: Sequence[Hook] = (), **how: Any
) -> Status:
    plan = planner(root, of)
    with (
        RayWorkers(None, plan.problem, plan.study, plan.store, **how) as workers,
        tell_hooks(show, hooks, plan, workers, epochs=True) as tell,
    ):
        return run(plan, workers, tell, tells_epochs=bool(hooks))


def iterations(root: Path) -> dict[str, int]:
    """Return how many iterations each training took, in the process that finished it."""
    return {path.name: Store(root).results.record(path.name)["iterations"] for path in results(root)}


def test_ray_gives_the_bits_of_the_local_engine(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the whole network too; a module of a user's own functions is on this machine alone.

    A hook that stops a chain in its second epoch of level 1 is told all epochs before; a run without it goes on.
    """
    told: list[tuple[str, int, int | None]] = []

    def stop(report: Report) -> None:
        told.append((report.chain.importance, report.level, report.epoch))
        if told[-1] == ("l1", 1, 2):
            raise StopTraining("enough")

    (tmp_path / "far_score.py").write_text(
        "from tombola.importance import NetworkScore\n"
        "import torch\n"
        "own = NetworkScore(lambda network: {n: w.detach() ** 2 for n, w in network.weights.items()})\n"
        "def make(parameters, lr): return torch.optim.SGD(parameters, lr, momentum=0.9)\n"
        "def fall(iteration, iterations): return 1 - iteration / iterations\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    of = study(
        ("l1", "taylor", "far_score:own/l1"), optimizer="far_score:make", schedule="far_score:fall", momentum=0.0
    )
    halted = run_on_ray(tmp_path / "ray", of=of, hooks=[stop])
    assert list(halted.to_halt.values()) == ["enough"]
    epochs = [(level, epoch) for name, level, epoch in told if name == "l1"]
    assert epochs == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, None), (1, 1), (1, 2)]
    status = run_on_ray(tmp_path / "ray", of=of)
    run_study(tmp_path / "local", of)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert status.done == status.total


def test_a_killed_worker_and_a_lost_node_cost_only_what_they_were_doing(
    tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]
) -> None:
    """The worker is killed in the middle of level 0; the node is lost while level 1 is under way on both."""
    root = tmp_path / "store"
    killed: list[str] = []
    lost: list[bool] = []
    before: dict[str, bytes] = {}
    held: list[Arrival] = []

    def hold(arrival: Arrival) -> None:
        stops = not killed if arrival.iteration == 20 else bool(killed) and not lost and not before_level_1(root)
        if stops:
            held.append(arrival)
        else:
            arrival.go()

    def disturb(status: Status, _: Training | None) -> None:
        checkpoints = [path.stem for path in (root / "checkpoints").glob("*.safetensors")]
        if not killed and held and checkpoints:
            killed.extend(checkpoints)
            held.pop().die()
        if killed and not lost and len(held) == 2:
            before.update(content(root / "results"))
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            lost.append(True)
            for arrival in held:
                arrival.go()  # the one that is left

    with GATE.answered(hold):
        status = run_on_ray(root, disturb, checkpoint_every=0)
    assert lost
    assert content(root) == undisturbed
    assert before.items() <= content(root / "results").items()
    assert status.done == len(results(root))
    lengths = iterations(root)
    (key,) = killed
    assert LEVEL - 20 <= lengths[key] < LEVEL, "it went on from a checkpoint"


def before_level_1(root: Path) -> bool:
    """Whether the rewind point and level 0 are not both done."""
    return len(results(root)) < 2


def test_what_was_begun_here_is_ended_there(tmp_path: Path, cluster: Any, undisturbed: dict[str, bytes]) -> None:
    root = tmp_path / "store"
    held: list[Arrival] = []

    def hold(arrival: Arrival) -> None:
        if arrival.iteration == 20:  # of level 0
            held.append(arrival)
        else:
            arrival.go()

    def stop(status: Status, _: Training | None) -> None:
        if held:
            raise KeyboardInterrupt

    with (
        GATE.answered(hold),
        pytest.raises(KeyboardInterrupt),
        LocalWorkers(1, STUDY.task, None, root, checkpoint_every=0) as workers,
    ):
        run(planner(root, STUDY), workers, stop)
    held.pop().go()  # it has been killed
    (checkpoint,) = (root / "checkpoints").iterdir()
    assert run_on_ray(root).done == 4
    assert content(root) == undisturbed
    lengths = iterations(root)
    assert lengths.pop(checkpoint.stem) == LEVEL - 20, "the checkpoint was gone on from"
    assert sorted(lengths.values()) == [REWIND, LEVEL, LEVEL, LEVEL]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"python": "3.99"}, r"other software than this one: python: '3\.99' then"),
        ({"kernels": None}, "kernels are installed on one machine of the cluster and not on another"),
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
    done = run_command(tmp_path, [*command, cluster.address])
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "tombola-store") == undisturbed
    wrong = run_command(tmp_path, [*command, "127.0.0.1:1"])
    assert wrong.returncode == 2
    assert "--address: the Ray cluster 127.0.0.1:1 cannot be reached" in wrong.stderr


def test_a_variable_that_names_no_cluster_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would end the process after a minute."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", pytest.fail)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    of = planner(tmp_path / "store", STUDY)
    with pytest.raises(ClusterError, match=r"the Ray cluster 127\.0\.0\.1:1 cannot be reached"):
        RayWorkers(1, of.problem, of.study, of.store)


def take_for_begun(monkeypatch: pytest.MonkeyPatch, put: Callable[..., Any]) -> None:
    """Let `RayWorkers` find a cluster that has begun, has no nodes, and takes objects by `put`."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "put", put)


def test_code_that_cannot_be_sent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray is asked, which prints pages about it."""
    (tmp_path / "locked_loss.py").write_text(
        "import threading\nfrom torch.nn import functional\nlock = threading.Lock()\n"
        "def loss(outputs, labels):\n    with lock:\n        return functional.cross_entropy(outputs, labels)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    take_for_begun(monkeypatch, pytest.fail)
    task = TASK.model_copy(update={"loss": "locked_loss:loss"})
    of = planner(tmp_path / "store", STUDY.model_copy(update={"task": task}))
    with pytest.raises(UserError, match=r"cannot be sent to other processes: TypeError: cannot pickle '_thread\.lock'"):
        RayWorkers(1, of.problem, of.study, of.store)


def test_what_the_command_has_computed_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker compares what its network computes with that; it would compare it with itself."""
    (tmp_path / "far_model.py").write_text(
        "import os\nfrom torch import nn\nimport tiny_task\n"
        "def model():\n"
        "    there = nn.Tanh() if 'FAR' in os.environ else nn.Identity()\n"
        "    return nn.Sequential(*tiny_task.model(), there)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sent: list[bytes] = []
    take_for_begun(monkeypatch, sent.append)
    monkeypatch.setattr(RayWorkers, "_new_post", lambda _: None)
    task = TASK.model_copy(update={"model": "far_model:model"})
    of = planner(tmp_path / "store", study(["l1"]).model_copy(update={"task": task}))
    here = of.problem.behaviour
    RayWorkers(1, of.problem, of.study, of.store)
    monkeypatch.setenv("FAR", "there")
    there, *_ = ray.cloudpickle.loads(sent[0])
    assert there.behaviour != here

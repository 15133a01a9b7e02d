"""A user's own code that is edited during a run, ends the program, draws without a seed or changes what is ours."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import nasty_task
from nasty_task import ENDINGS, SETTINGS, importance_of_one_buffer, loss_that_writes
from processes import LONG, until
from stores import InTurn, results
from stores import study as small_study
from tombola.cli import main
from tombola.datasets.dataset import Dataset
from tombola.engine.job import Job, perform
from tombola.engine.local import LocalWorkers
from tombola.engine.run import run
from tombola.engine.workers import Event, Failed
from tombola.errors import UserError
from tombola.exits import attribute_failure
from tombola.own.code import _imports, resolve, source_hash, steady_source
from tombola.pruning.mask import Mask
from tombola.pruning.prune import prune
from tombola.settings import default_device
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.repeatable import _check_state
from tombola.study.schema import Study, Task
from tombola.study.task import load_problem, try_out
from tombola.training.recipe import Recipe
from tombola.training.train import train

pytestmark = pytest.mark.xdist_group("processes")  # the process that workers are copies of starts once

EVIL = {"dataset": "nasty_task:dataset", "model": "nasty_task:model"}


def study_of(**task: object) -> Study:
    return small_study(["magnitude"], levels=1, rewind=0, iterations=10).model_copy(
        update={"task": Task.model_validate(EVIL | task)}
    )


def planner_of(root: Path, study: Study) -> Planner:
    return Planner(study, load_problem(study.task), Store(root))


# A module that is edited


def test_imports_that_a_full_stack_hides_are_found_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reads_os.py"
    path.write_text("import os\n")

    def fail(*_: object) -> None:
        raise RecursionError

    with monkeypatch.context() as patch:
        patch.setattr("tombola.own.code.ast.parse", fail)
        assert _imports("reads_os", path) == ()
    assert _imports("reads_os", path) == ("os",)


MODULE = """
from tiny_task import dataset
import tiny_task

WIDTH = 0

def model():
    return tiny_task.model()

class Layer:
    @classmethod
    def size(cls):
        return 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a user's module that can be imported."""
    path = tmp_path / f"edited_{tmp_path.name}.py".replace("-", "_")
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop(path.stem, None)


def test_workers_that_import_an_edited_module_store_nothing(module: Path, tmp_path: Path) -> None:
    study = small_study(["magnitude"], levels=1, iterations=10, rewind=0).model_copy(
        update={"task": Task(dataset="tiny_task:dataset", model=f"{module.stem}:model")}
    )
    plan = planner_of(tmp_path / "store", study)
    run(plan, InTurn(last_first=False, works_on=plan.problem), lambda *_: None)
    longer = planner_of(tmp_path / "store", study.model_copy(update={"levels": 2}))
    before = results(tmp_path / "store")
    module.write_text(MODULE.replace("WIDTH = 0", "WIDTH = 1"))
    sentence = f"task.model '{module.stem}:model': its source was edited after the run began; run the study again"
    with (
        LocalWorkers(1, study.task, None, tmp_path / "store") as workers,
        pytest.raises(UserError, match=f"level 2 failed: {re.escape(sentence)}"),
    ):
        run(longer, workers, lambda *_: None)
    assert results(tmp_path / "store") == before


def test_a_module_that_is_edited_after_its_import_is_refused(module: Path) -> None:
    task = Task(dataset="digits", model=f"{module.stem}:model")
    load_problem(task)
    module.write_text(MODULE + "# a comment")
    with pytest.raises(UserError, match=r"was edited after it was imported .* start again, with the file as it is now"):
        load_problem(task)


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [("tiny_task.model()", "tiny_task.model(2)"), ("return 3", "return 4"), ("():", "(")]
)
def test_a_module_that_is_edited_after_its_import_and_before_its_first_study_is_refused(
    module: Path, before: str, after: str, here: bool
) -> None:
    model = importlib.import_module(module.stem).model
    load_problem(Task(dataset="tiny_task:dataset", model="tiny_task:model"))
    module.write_text(MODULE.replace(before, after))
    with pytest.raises(ValueError, match=r"was edited after it was imported .* start again, with the file as it is"):
        load_problem(Task(dataset="tiny_task:dataset", model=(lambda: model()) if here else f"{module.stem}:model"))


def test_a_module_that_is_edited_while_it_is_imported_is_refused(module: Path) -> None:
    def import_and_edit() -> None:
        with steady_source([f"{module.stem}:model"]):
            resolve(f"{module.stem}:model", "task.model")
            module.write_text(MODULE + "# a comment")

    with pytest.raises(UserError, match="was edited after it was imported"):
        import_and_edit()


def test_a_module_whose_file_is_removed_is_refused(module: Path) -> None:
    task = Task(dataset="tiny_task:dataset", model=f"{module.stem}:model")
    load_problem(task)
    module.unlink()
    with pytest.raises(UserError, match="its file was removed after it was imported; put it back, and start again"):
        load_problem(task)


def test_a_module_that_replaces_itself_is_refused(module: Path) -> None:
    itself = "\nimport sys\nfrom types import SimpleNamespace\n\nsys.modules[__name__] = SimpleNamespace(model=model)\n"
    module.write_text(MODULE + itself)
    with pytest.raises(UserError, match=r"it puts another object in its place in sys\.modules"):
        load_problem(Task(dataset="tiny_task:dataset", model=f"{module.stem}:model"))


def test_a_function_that_a_library_makes_in_the_place_of_one_is_no_edit(module: Path) -> None:
    own = "from hypothesis import given, strategies\n\n\n@given(strategies.integers())\ndef check(x):\n    pass\n\n\n"
    module.write_text(own + MODULE)
    load_problem(Task(dataset="tiny_task:dataset", model=f"{module.stem}:model"))


def test_a_compiled_copy_of_another_source_is_refused(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with steady_source([f"{module.stem}:model"]):
        resolve(f"{module.stem}:model", "task.model")
    del sys.modules[module.stem]
    status = module.stat()
    module.write_text(MODULE.replace("WIDTH = 0", "WIDTH = 1"))
    os.utime(module, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times does
    with (
        pytest.raises(UserError, match=r"has imported a compiled copy of another source than .*; remove .*\.pyc"),
        steady_source([f"{module.stem}:model"]),
    ):
        resolve(f"{module.stem}:model", "task.model")


def test_a_module_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"nasty_task\.py: this module cannot be read: Permission denied"):
        source_hash("nasty_task:model")


def test_a_problem_of_another_name_is_not_worked_on(tmp_path: Path) -> None:
    plan = planner_of(tmp_path / "store", study_of())
    training = plan.progress(plan.chains[0]).waits_for
    assert training is not None
    job = Job.of(training, plan.study)
    for other, sentence in (
        (Task(dataset="tiny_task:dataset", model="nasty_task:model"), "data set 'tiny' is not the same each time"),
        (Task(**EVIL, loss="nasty_task:loss_that_writes"), "task.loss 'nasty_task:loss_that_writes': its source was"),
    ):
        with pytest.raises(UserError, match=sentence):
            perform(job, load_problem(other), None, lambda *_: None)


# What is drawn without a seed, and what ends the program


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that plans a study of some nasty parts, which must be refused before a store is begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(nasty_task.__file__).parent)

    def run(importance: str = "magnitude", **task: str) -> str:
        lines = [f'importances = ["{importance}"]', "seeds = [0]", "levels = 1", "[recipe]", "iterations = 5", "[task]"]
        lines += [f"{name} = {value}" for name, value in ({n: f'"{v}"' for n, v in EVIL.items()} | task).items()]
        Path("study.toml").write_text("\n".join(lines))
        assert main(["run", "study.toml", "--recipe.batch-size", "10"]) == 2
        assert not Path("tombola-store").exists()
        said = capsys.readouterr()
        assert said.err.startswith("tombola: ")
        assert said.err.count("\n") == 1
        assert len(said.err) < 1000
        return said.err

    return run


@pytest.mark.parametrize("how", ["attribute", "temporary buffer"])
def test_a_model_that_keeps_what_is_not_stored(how: str, refused: Callable[..., str]) -> None:
    said = refused(model='"nasty_task:model_that_forgets"', model_arguments=f'{{how = "{how}"}}')
    assert "task.model 'nasty_task:model_that_forgets': its outputs depend on something that it keeps from" in said


def test_a_model_that_keeps_it_in_a_buffer() -> None:
    task = Task(dataset="nasty_task:dataset", model="nasty_task:model_that_forgets", model_arguments={"how": "buffer"})
    _check_state(load_problem(task), task)


def test_a_data_set_with_a_fingerprint_of_its_own(refused: Callable[..., str]) -> None:
    assert "OwnDataset has a fingerprint of its own, under which any data" in refused(
        dataset='"nasty_task:data_of_own_class"'
    )


def test_what_is_drawn_without_a_seed_is_refused(refused: Callable[..., str]) -> None:
    assert "task.dataset 'nasty_task:data_without_seed': it gives different data in two calls; draw" in refused(
        dataset='"nasty_task:data_without_seed"'
    )
    assert "task.model 'nasty_task:model_without_seed': it gives different initial values of '" in refused(
        model='"nasty_task:model_without_seed"'
    )
    assert "task.model 'nasty_task:model_without_order': it gives different orders of parameters in two" in refused(
        model='"nasty_task:model_without_order"'
    )
    assert (
        "task.loss 'nasty_task:loss_without_seed': it gives different values in two calls with the same seed; draw"
        in refused(loss='"nasty_task:loss_without_seed"')
    )
    assert "importance 'nasty_task:importance_without_seed': it gives different scores in two calls; draw" in refused(
        "nasty_task:importance_without_seed"
    )


@pytest.mark.parametrize("how", ENDINGS)
def test_code_that_ends_the_program_is_refused(refused: Callable[..., str], how: str) -> None:
    sentence = ENDINGS[how][1]
    arguments = f'{{ how = "{how}" }}'
    assert sentence in refused(dataset='"nasty_task:data_that_ends"', dataset_arguments=arguments)
    assert sentence in refused(model='"nasty_task:model_that_ends"', model_arguments=arguments)
    assert sentence in refused(model='"nasty_task:layer_that_ends"', model_arguments=arguments)
    assert sentence in refused(loss=f'"nasty_task:ends by {how}"')
    assert sentence in refused(f"nasty_task:ends by {how}")


@pytest.mark.parametrize("how", ENDINGS)
def test_a_module_that_ends_the_program_when_it_is_imported_is_refused(
    refused: Callable[..., str], how: str, tmp_path: Path
) -> None:
    name = f"ending_{list(ENDINGS).index(how)}"
    (tmp_path / f"{name}.py").write_text(f"import nasty_task\nnasty_task.ENDINGS[{how!r}][0]()\n")
    assert ENDINGS[how][1] in refused(model=f'"{name}:f"')
    assert ENDINGS[how][1] in refused(f"{name}:f")


def test_an_exception_cannot_steer_the_terminal(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "steers.py").write_text(r"raise ValueError('\x1b[2J\u202e\x9b\ud800 [bold]')" + "\n")
    assert r"ValueError: \x1b[2J\u202e\x9b\ud800 [bold] (in " in refused(model='"steers:f"')


@pytest.mark.parametrize("how", ENDINGS)
def test_a_worker_says_what_ended_its_training(how: str, tmp_path: Path) -> None:
    arguments = {"how": how, "in_worker": True}
    study = study_of(model="nasty_task:layer_that_ends", model_arguments=arguments)
    plan = planner_of(tmp_path / "store", study)
    with (
        LocalWorkers(1, study.task, None, tmp_path / "store") as workers,
        pytest.raises(UserError, match=f"level 0 failed: .*{re.escape(ENDINGS[how][1])}"),
    ):
        run(plan, workers, lambda *_: None)


def test_a_child_that_a_dead_worker_leaves_keeps_nobody_waiting(tmp_path: Path) -> None:
    """It inherits the connection of the worker, whose end would not be noticed if the child kept it open."""
    children = tmp_path / "children"
    children.mkdir()
    study = study_of(model="nasty_task:layer_that_leaves_a_child", model_arguments={"folder": str(children)})
    plan = planner_of(tmp_path / "store", study)
    [need] = plan.progress(plan.chains[0]).needs
    said: list[Event] = []

    def failed() -> bool:
        said.extend(workers.events(1.0))
        return any(isinstance(each, Failed) for each in said)

    try:
        with LocalWorkers(1, study.task, None, None) as workers:
            workers.submit(Job.of(need, study))
            until(failed, "a training fails whose worker is killed three times")
    finally:
        for child in children.iterdir():
            os.kill(int(child.name), signal.SIGKILL)
    assert said == [Failed(need.key, "its process was ended by SIGKILL, 3 times; is there enough memory?")]


def test_a_model_that_changes_the_working_directory_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "wanders.py").write_text("import os\nfrom nasty_task import model\nos.chdir('elsewhere')\n")
    assert f"importing 'wanders' changed the working directory to {tmp_path / 'elsewhere'}; give paths in full" in (
        refused(model='"wanders:model"')
    )
    assert Path.cwd() == tmp_path


STATES = """
import torch
from torch import nn

class Extra(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}
    def set_extra_state(self, state):
        pass

class Waiting(nn.Linear):
    async def forward(self, x):
        return x

def lazy_norm(): return nn.Sequential(nn.Linear(8, 2), nn.LazyBatchNorm1d())
def meta(): return nn.Linear(8, 2, device="meta")
def extra(): return Extra(8, 2)
def waiting(): return Waiting(8, 2)
def sparse():
    model = nn.Linear(8, 2)
    model.register_buffer("s", torch.eye(2).to_sparse())
    return model
def expanded():
    model = nn.Linear(8, 2)
    model.weight = nn.Parameter(torch.randn(1, 8).expand(2, 8))
    return model
@torch.inference_mode()
def inferring(): return nn.Linear(8, 2)
def forgets():
    model = nn.Linear(8, 2)
    model._register_load_state_dict_pre_hook(lambda state, *_: state.clear())
    return model
"""


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lazy_norm", "task.model 'odd_states:lazy_norm': '1.weight' of its state is lazy"),
        ("meta", "'weight' of its state is on the device 'meta', where it has no values; build the model on the CPU"),
        ("extra", "'_extra_state' of its state is of type dict; keep it in a buffer, which is a tensor"),
        ("waiting", "expected a tensor, got coroutine"),
        ("sparse", "'s' of its state is sparse or quantised; expected a dense tensor"),
        ("expanded", "'weight' of its state has several elements in one place of memory, as after expand"),
        ("inferring", "'weight' of its state was made in torch.inference_mode, so that it cannot be trained"),
        ("forgets", "a new one that gets its state by load_state_dict raised RuntimeError: Error(s) in loading"),
    ],
)
def test_a_model_whose_state_cannot_be_kept_is_refused(
    refused: Callable[..., str], tmp_path: Path, name: str, sentence: str
) -> None:
    (tmp_path / "odd_states.py").write_text(STATES)
    assert sentence in refused(model=f'"odd_states:{name}"')


CTRL_C = """
import os, signal, sys
from tombola.cli import main, run
run.open_planner = lambda options: {what}
sys.argv[1:] = ["run", "digits"]
raise SystemExit(main())
"""


def test_ctrl_c_is_no_failure_of_the_users_code() -> None:
    code = CTRL_C.format(what="os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=LONG)
    assert done.returncode == 130
    assert "tombola: stopped; finished trainings are kept, continue with: tombola run digits" in done.stderr


# What reaches into ours


def test_an_importance_that_returns_its_own_buffer_gives_the_same_mask() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(size, generator=draw) for name, size in (("a", 300), ("b", 200), ("c", 300))}
    kept = {name: weight.clone() for name, weight in weights.items()}
    mask = Mask.from_tensors({name: torch.ones(len(weight), dtype=torch.bool) for name, weight in weights.items()})
    assert prune(weights, mask, importance_of_one_buffer, 0.5) == prune(kept, mask, lambda w: w, 0.5)
    assert all(weights[name].equal(kept[name]) for name in weights)


def test_a_loss_that_writes_to_its_labels_changes_no_data() -> None:
    data = nasty_task.dataset()
    digest, labels = Dataset(*vars(data).values()).fingerprint, data.test_labels.clone()
    model = nn.Linear(8, 2)

    def accuracy(loss: Callable[..., torch.Tensor]) -> float | None:
        recipe = Recipe(iterations=3, batch_size=10)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return train(model, state, Mask.ones_like(model), data, recipe, 0, loss=loss).history.test_accuracy

    first = accuracy(loss_that_writes)
    assert data.test_labels.equal(labels)
    assert Dataset(*[vars(data)[name] for name in Dataset.__dataclass_fields__]).fingerprint == digest
    assert accuracy(nn.functional.cross_entropy) == first


def test_a_loss_that_changes_the_data_set_is_found_by_the_worker(tmp_path: Path) -> None:
    study = study_of(dataset="nasty_task:dataset_kept", loss="nasty_task:loss_that_reaches_far")
    plan = planner_of(tmp_path / "store", study)
    with (
        LocalWorkers(1, study.task, None, tmp_path / "store") as workers,
        pytest.raises(UserError, match="changed the data set in place during a training; change a copy"),
    ):
        run(plan, workers, lambda *_: None)
    assert not results(tmp_path / "store")


# Settings of torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings() -> tuple[object, ...]:
    return (
        json.dumps,
        open,
        hashlib.sha256,
        signal.getsignal(signal.SIGINT),
        signal.getitimer(signal.ITIMER_REAL),
        torch.get_deterministic_debug_mode(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        default_device(torch),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mkldnn.enabled,
        *(precision_of(operation) for operation in ("matmul", "conv", "rnn")),
    )


def precision_of(operation: str) -> str:
    """The precision with which torch computes an operation of float32 on the CPU."""
    if not hasattr(torch.backends, "fp32_precision"):  # torch 2.8 or older
        return torch.get_float32_matmul_precision()
    precision: str = getattr(torch.backends.mkldnn, operation).fp32_precision
    return {"none": "ieee"}.get(precision, precision)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", SETTINGS)
def test_code_that_changes_a_setting_of_torch_is_refused_and_the_setting_is_restored(how: str, tmp_path: Path) -> None:
    before, said = settings(), SETTINGS[how][1]
    with pytest.raises(UserError, match=f"task.model 'nasty_task:model_that_sets' changed {said}"):
        load_problem(study_of(model="nasty_task:model_that_sets", model_arguments={"how": how}).task).build()
    assert settings() == before
    if how != "grad":  # an importance is computed without gradients
        mask = Mask.from_tensors({"w": torch.ones(4, dtype=torch.bool)})
        with pytest.raises(UserError, match=f"it changed {said}"):
            prune({"w": torch.arange(4.0)}, mask, getattr(nasty_task, f"sets {how}"), 0.5)
        assert settings() == before
    study = study_of(model="nasty_task:layer_that_sets", model_arguments={"how": how})
    plan = planner_of(tmp_path / "store", study)
    training = plan.progress(plan.chains[0]).waits_for
    assert training is not None
    with pytest.raises((UserError, RuntimeError), match=f"changed {said}|does not require grad"):
        perform(Job.of(training, study), plan.problem, None, lambda *_: None)
    assert settings() == before


@pytest.mark.usefixtures("one_thread")
def test_a_setting_that_a_module_changes_when_it_is_imported_is_restored(module: Path) -> None:
    lines = (
        "torch.set_num_threads(2)",
        "torch.set_grad_enabled(False)",
        "torch.set_default_dtype(torch.float64)",
        "torch.backends.mkldnn.enabled = False",
        "torch.set_float32_matmul_precision('medium')",
    )
    module.write_text("\n".join(["import torch", *lines, MODULE]))
    before = settings()
    assert resolve(f"{module.stem}:model", "task.model")().state_dict()["0.weight"].dtype == torch.float32
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("one_thread")
def test_a_device_that_this_machine_lacks_is_restored_too(module: Path) -> None:
    module.write_text(f"import torch\ntorch.set_default_device('xpu:0')\n{MODULE}")
    before = settings()
    assert resolve(f"{module.stem}:model", "task.model")().state_dict()["0.weight"].is_cpu
    assert settings() == before


@pytest.mark.usefixtures("one_thread")
def test_a_setting_of_gpus_alone_may_stay_changed(module: Path) -> None:
    module.write_text(f"import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\n{MODULE}")
    before = settings()
    try:
        resolve(f"{module.stem}:model", "task.model")()
        assert settings() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_code_that_closes_files_of_others_is_refused(tmp_path: Path) -> None:
    """The files of this process are put aside meanwhile: those from the first free number on are closed."""
    with (tmp_path / "first").open("w") as first:
        number = first.fileno()
    with (
        pytest.raises(UserError, match=r"^my_module closed files that are not its own; close only what it has opened"),
        attribute_failure("my_module"),
    ):
        os.closerange(number, number + 1)


@pytest.mark.parametrize(("how", "name"), [("replace", "first.weight"), ("add", "added.weight")])
def test_a_model_that_replaces_its_parameters_is_refused(how: str, name: str) -> None:
    study = study_of(model="nasty_task:model_that_replaces", model_arguments={"how": how})
    with pytest.raises(UserError, match=f"a step adds, removes or replaces its parameter '{name}'"):
        try_out(load_problem(study.task), study)


def test_a_layer_whose_name_cannot_be_written_is_refused() -> None:
    with pytest.raises(UserError, match=r"the name '\\ud800.weight' of its state has half of a character"):
        load_problem(study_of(model="nasty_task:layer_of_half_a_character").task).build()

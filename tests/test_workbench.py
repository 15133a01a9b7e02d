"""The workbench: studies from Python, with functions of a script or a notebook, and their tables and charts."""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny_task
import tombola
from processes import LONG
from tombola import Dataset, Recipe, Study, Task, Ticket, UserError, find_tickets, load_study, models
from tombola.engine.here import WorkersHere
from tombola.engine.job import Job
from tombola.engine.run import run as run_trainings
from tombola.engine.workers import Failed, Workers
from tombola.importance import Importance, Network, NetworkScore, Survivors, l1, magnitude, normalisation
from tombola.importance.network_scores import taylor
from tombola.own.functions import ComputedNameWarning, is_here, refer, resolve, source_hash
from tombola.store.store import Store
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.study.schema import override
from tombola.study.task import load_importance, load_problem
from tombola.workbench import runs
from tombola.workbench.example import finished

WIDTH = 8


def fresh(code: str, module: str = "__main__", **given: Any) -> dict[str, Any]:
    """Run code as a cell of a notebook would, and return what it defines."""
    space: dict[str, Any] = {
        "__name__": module,
        "nn": nn,
        "torch": torch,
        "partial": functools.partial,
        "Path": Path,
        "Mode": Mode,
        "Enum": Enum,
        "NamedTuple": NamedTuple,
    }
    space |= given
    exec(code, space)
    return space


def study(**fields: Any) -> Study:
    given: dict[str, Any] = {
        "task": Task(dataset=tiny_task.dataset(), model=lambda: tiny_task.model()),  # type: ignore[arg-type]
        "recipe": Recipe(iterations=12, batch_size=32, lr=0.1),
        "importances": ["magnitude"],
        "seeds": [0],
        "levels": 1,
        "fraction": 0.5,
    }
    return Study(**given | fields)


# References.


def test_functions_of_modules_are_named_and_built_in_ones_have_their_names() -> None:
    assert refer(tiny_task.model, "x") == "tiny_task:model"
    assert refer(models.lenet_300_100, "x") == "lenet_300_100"
    assert refer(functional.cross_entropy, "x") == "cross_entropy"
    assert refer(l1, "x") == "l1"
    assert refer(3, "x") == 3
    assert not is_here("tiny_task:model")
    of = study(importances=[l1, magnitude, "lamp"], task=Task(dataset="digits", model=models.resnet20))  # type: ignore[arg-type]
    assert of.importances == ("l1", "magnitude", "lamp")
    assert of.task.model == "resnet20"
    assert load_study("digits", {"importances": [l1, "lamp"]}).importances == ("l1", "lamp")


def test_what_only_this_process_has_is_found_again() -> None:
    data, build = tiny_task.dataset(), functools.partial(nn.Linear, 16, 4)
    for value in (data, build, lambda: 3):
        reference = refer(value, "x")
        assert is_here(reference)
        assert refer(value, "x") == reference
    assert resolve(refer(build, "x"), "x") is build
    assert resolve(refer(data, "x"), "x")() is data


def test_a_data_set_lives_as_long_as_the_tasks_that_name_it() -> None:
    data = replace(tiny_task.dataset(), name="of this test")
    alive = weakref.ref(data)
    of = study(task=Task(dataset=data, model="tiny_task:model"))  # type: ignore[arg-type]
    del data
    of = override(of, {"levels": 2})
    refer(replace(tiny_task.dataset(), name="of this test"), "x")  # an equal one, which is gone at once
    gc.collect()
    assert load_problem(of.task).data is alive()
    del of
    gc.collect()
    assert alive() is None


def test_importances_of_two_functions_and_of_the_network_are_found_again() -> None:
    def mine(survivors: Survivors) -> torch.Tensor:
        return survivors.magnitudes

    for value, label in (
        (Importance(mine, normalisation.l1), "mine-l1"),
        (NetworkScore(taylor), "taylor"),
        (Importance(NetworkScore(taylor, steps=2), normalisation.l1), "taylor-l1"),
    ):
        reference = refer(value, "importances")
        assert reference.rpartition("-")[0] == f"__main__:{label}"
        found, hashes = load_importance(reference)
        assert found == (value if isinstance(value, Importance) else Importance(value))
        assert hashes.keys() == {reference}


class Mode(Enum):
    A = "a"
    B = "b"


OWN = [
    f"class C({base}):\n    a = 1\n    def g(self):\n        return 3\nc = {value}\nf = lambda: c.g()"
    for base, value in {
        "dict": "C()", "float": "C(1)", "str": "C()", "tuple": "C()", "NamedTuple": "C()", "Enum": "C(1)",
    }.items()
]  # fmt: skip
KEPT = "class C({}):\n    __repr__ = lambda self: ''\nc = C()\nc.k = 3\nf = lambda: c"
META = "class M(type):\n    def __call__(self):\n        return 3\nclass f(metaclass=M):\n    pass"
TWO_DEFAULTS = "def a(k=0.01):\n    return k\ndef b(k=1):\n    return k\ndef f():\n    return a() + b()"
TWO_PARTIALS = "def g(k):\n    return k\na = partial(g, k=0.01)\nb = partial(g, k=1)\ndef f():\n    return a() + b()"
SAME = "def f():\n    return nn.Linear(2, width())\ndef width():\n    return SIZE\nSIZE = 3"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SAME, SAME.replace("SIZE = 3", "SIZE = 4")),
        (SAME, SAME.replace("return SIZE", "return SIZE + 1")),
        (SAME, SAME.replace("nn.Linear", "nn.Bilinear")),
        ("f = lambda: 3; g = lambda: 4", "f = lambda: 4; g = lambda: 3"),
        ("def f(a=3):\n    return a", "def f(a=4):\n    return a"),
        ("def outer(k):\n    return lambda: k\nf = outer(3)", "def outer(k):\n    return lambda: k\nf = outer(4)"),
        ("class f:\n    def g(self):\n        return 3", "class f:\n    def g(self):\n        return 4"),
        ("class b:\n    k = 3\nclass f(b):\n    pass", "class b:\n    k = 4\nclass f(b):\n    pass"),
        ("T = torch.ones(3)\ndef f():\n    return T", "T = torch.zeros(3)\ndef f():\n    return T"),
        ("D = {'a': (1, {2})}\ndef f():\n    return D", "D = {'a': (1, {3})}\ndef f():\n    return D"),
        ("def f():\n    return lambda: K\nK = 3", "def f():\n    return lambda: K\nK = 4"),
        (TWO_DEFAULTS, TWO_DEFAULTS.replace("k=1", "k=5")),
        (TWO_PARTIALS, TWO_PARTIALS.replace("k=1", "k=5")),
        ("D = {'a': {'b': 1}, 'c': 2}\nf = lambda: D", "D = {'a': {'b': 1, 'c': 2}}\nf = lambda: D"),
        ("D = {('a', 1), ('b', 2)}\nf = lambda: D", "D = {('a', 2), ('b', 1)}\nf = lambda: D"),
        ("class f:\n    g = staticmethod(len)", "class f:\n    g = classmethod(len)"),
        ("D = torch.float32\nf = lambda: D", "D = torch.float64\nf = lambda: D"),
        ("D = torch.device('cpu')\nf = lambda: D", "D = torch.device('cuda')\nf = lambda: D"),
        ("D = torch.ones(2).bfloat16()\nf = lambda: D", "D = torch.zeros(2).bfloat16()\nf = lambda: D"),
        ("D = Path('a')\nf = lambda: D", "D = Path('b')\nf = lambda: D"),
        ("D = Mode('a')\nf = lambda: D", "D = Mode('b')\nf = lambda: D"),
        ("def f():\n    return f.k\nf.k = 3", "def f():\n    return f.k\nf.k = 4"),
        ("def g(k):\n    pass\nf = partial(g, 1)\nf.k = 3", "def g(k):\n    pass\nf = partial(g, 1)\nf.k = 4"),
        *((code, code.replace("3", "4")) for code in (*OWN, KEPT.format("list"), KEPT.format("int"), META)),
        ("T = torch.ones(3)\nf = lambda: T", "T = torch.ones(3, requires_grad=True)\nf = lambda: T"),
    ],
)  # fmt: skip
def test_an_edit_of_what_a_function_uses_changes_its_identity(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    for code in (before, before, after):
        script = ModuleType("__main__")
        vars(script).update(fresh(code))
        monkeypatch.setitem(sys.modules, "__main__", script)
        reference = refer(script.f, "x")
        assert reference.startswith("__main__:")
        hashes.append(source_hash(reference))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.filterwarnings("ignore:.* f calls __import__")
@pytest.mark.parametrize(
    "text", ["import helper_of_a_script", "from helper_of_a_script import g", "lambda: __import__"]
)
def test_an_edit_of_a_module_that_a_function_imports_when_it_is_called_changes_its_identity(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for k in (3, 4):
        (tmp_path / "helper_of_a_script.py").write_text(f"def g():\n    return {k}\n")
        importlib.invalidate_caches()
        sys.modules.pop("helper_of_a_script", None)
        hashes.append(source_hash(refer(fresh(f"def f():\n    {text}\n    return 5")["f"], "x")))
    assert (hashes[0] != hashes[1]) == ("helper" in text)


def test_what_a_function_does_not_use_does_not_matter() -> None:
    one, other = (fresh("def f():\n    return 3\nunused = " + text)["f"] for text in ("1", "2"))
    assert source_hash(refer(one, "x")) == source_hash(refer(other, "x"))


@pytest.mark.parametrize(
    "body",
    [
        "eval('a')",
        "globals()['a']",
        "__import__('a' + 'b')",
        "importlib.import_module('a' + 'b')",
        "[exec('a') for _ in x]",
    ],
)
def test_a_function_that_computes_names_is_told_of(body: str) -> None:
    function = fresh(f"import importlib\ndef f(x):\n    return {body}")["f"]
    with pytest.warns(ComputedNameWarning, match="task.model: f calls .*, and what it finds by that is not in the"):
        refer(function, "task.model")


def test_a_method_named_like_a_function_of_python_is_another() -> None:
    refer(fresh("def f(model, x):\n    return model.eval()(x)")["f"], "task.forward")  # a warning is an error


def test_a_function_that_calls_itself() -> None:
    assert len(source_hash(refer(fresh("def f(n):\n    return n and f(n - 1)")["f"], "x"))) == 64


def test_the_identity_of_a_set_is_the_same_in_every_process() -> None:
    code = """if True:
        from tombola.own.functions import refer
        print(refer(lambda w: w if w in {"a", "b", "c"} else {"d", "e", "f", "g"}, "x"))
    """
    references = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG, check=True)
        references.add(done.stdout)
    assert len(references) == 1


def test_the_identity_is_of_the_code_that_runs_and_not_of_a_later_text(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("def f():\n    return 3\n")
    functions = []
    for text in ("def f():\n    return 3\n", "def f():\n    return 4\n"):
        space = {"__name__": "__main__", "__file__": str(path)}
        exec(compile(text, path, "exec"), space)
        functions.append(space["f"])
        path.write_text("def f():\n    return 4\n")
    one, other = (source_hash(refer(function, "x")) for function in functions)
    assert one != other


REFUSED = [
    object(), iter([]), torch.Generator(), np.array([object()]), torch.ones(2, device="meta"),
    torch.ones(2).to_sparse(),
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED)
def test_what_cannot_be_identified_is_refused(value: object) -> None:
    function = fresh("def network():\n    return k", module="here", k=value)["network"]
    with pytest.raises(UserError, match=r"^task.model: network: k: it uses a \w+, whose content cannot be identified"):
        refer(function, "task.model")


def test_a_module_in_the_place_of_a_function_that_returns_one() -> None:
    with pytest.raises(ValueError, match=r"task.model: expected a function that returns a module, got a module"):
        Task(dataset="digits", model=nn.Linear(2, 1))  # type: ignore[arg-type]


# Running.


def test_a_study_with_functions_of_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cubic(weights: torch.Tensor) -> torch.Tensor:
        return weights**3

    threads = torch.get_num_threads()
    of = study(importances=[magnitude, cubic])
    found = tombola.run(of, store=str(tmp_path / "s"))
    assert torch.get_num_threads() == threads
    assert found["level"].to_list() == [0, 1, 0, 1]
    assert "[3/3] seed 0, level 1, density 50.00 %" in capsys.readouterr().out
    assert tombola.run(of, store=tmp_path / "s").equals(found)
    assert "level" not in capsys.readouterr().out
    assert tombola.results(of, store=tmp_path / "s").equals(found)
    more = tombola.run(of, {"levels": 2, "importances": ["magnitude"]}, store=tmp_path / "s", progress=False)
    assert more["level"].to_list() == [0, 1, 2]
    with pytest.raises(UserError, match=r"workers: 2 processes cannot import .*<lambda>-\w+, which only this"):
        tombola.run(of, store=tmp_path / "s", workers=2)


def test_a_score_of_the_whole_network_of_this_process(tmp_path: Path) -> None:
    def squared(network: Network) -> Mapping[str, torch.Tensor]:
        return {layer: scores**2 for layer, scores in taylor(network).items()}

    task = Task(dataset="tiny_task:dataset", model="tiny_task:model")
    of = study(task=task, importances=[NetworkScore(squared), "l1"])
    assert tombola.run(of, store=tmp_path / "s", progress=False)["level"].to_list() == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"workers: 2 processes cannot import .*-\w+, which only this process has"):
        tombola.run(of, store=tmp_path / "s", workers=2)


def test_each_ticket_is_told_once(tmp_path: Path) -> None:
    told = []

    def tell(chain: Chain, ticket: Ticket) -> None:
        told.append((chain.importance, ticket.level))
        assert ticket.trained is not None
        if ticket.level == 2:
            raise RuntimeError("enough")

    of = study(importances=["magnitude", "l1"])
    tombola.run(of, store=tmp_path / "s", progress=False, on_ticket=tell)
    assert sorted(told) == [("l1", 0), ("l1", 1), ("magnitude", 0), ("magnitude", 1)]
    told.clear()
    tombola.run(of, store=tmp_path / "s", progress=False, on_ticket=tell)
    assert told == []
    with pytest.raises(RuntimeError, match="enough"):
        tombola.run(of, {"levels": 3, "importances": ["l1"]}, store=tmp_path / "s", progress=False, on_ticket=tell)
    assert told == [("l1", 2)]
    with pytest.raises(UserError, match="levels 0 to 2 are"):
        tombola.read_ticket(of, {"levels": 3}, importance="l1", seed=0, level=3, store=tmp_path / "s")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: sys.exit("no more"), "SystemExit: no more"),
        (lambda: signal.default_int_handler(2, None), "KeyboardInterrupt"),
        (lambda: os._exit(0), r"SystemExit: os._exit\(0\)"),
    ],
)
def test_a_failure_in_this_process(tmp_path: Path, fail: Callable[[], object], reason: str) -> None:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(outputs) == 50:  # a batch of a training, and of no trial
            fail()
        return functional.cross_entropy(outputs, labels)

    task = Task(dataset=tiny_task.dataset(), model=lambda: tiny_task.model(), loss=loss)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"training of magnitude, seed 0, level 0 failed: {reason}"):
        tombola.run(study(task=task), {"recipe.batch_size": 50}, store=tmp_path / "s", progress=False)


def test_a_task_is_tried_out_before_it_is_trained(tmp_path: Path) -> None:
    task = Task(dataset=tiny_task.dataset(), model=lambda: nn.Linear(5, 4))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="on inputs of shape"):
        tombola.run(study(task=task), store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_leaving_a_run_ends_its_training(tmp_path: Path) -> None:
    of = study(recipe=Recipe(iterations=10**9, batch_size=32))
    planner = Planner(of, load_problem(of.task), Store(tmp_path / "s"))
    waits_for = planner.progress(planner.chains[0]).waits_for
    assert waits_for is not None
    with WorkersHere(planner.problem, planner.store, checkpoint_every=0) as workers:
        assert workers.idle
        workers.submit(Job.of(waits_for, of))
        assert not workers.idle
        (event,) = workers.events(timeout=LONG)
        assert not isinstance(event, Failed)
    assert list((tmp_path / "s" / "checkpoints").iterdir())


SCRIPT = """
import tiny_task, tombola
from tombola import Recipe, Study, Task
here = lambda: tiny_task.model()
for model in (tiny_task.model, here):
    task = Task(dataset=tiny_task.dataset, model=model)
    study = Study(task=task, recipe=Recipe(iterations=12, batch_size=32), importances=["l1"], seeds=[0], levels=1)
    print(tombola.run(study, workers=1).height)
print("end")
"""


def test_a_script_without_a_guard_gives_the_bits_of_a_run_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "tiny_task.py").write_bytes(Path(tiny_task.__file__).read_bytes())
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[2/2] seed 0, level 1") == 2
    assert done.stdout.split("\n")[-3:] == ["2", "end", ""]
    assert done.stdout.count("end") == 1
    task = Task(dataset=tiny_task.dataset, model=tiny_task.model)  # type: ignore[arg-type]
    of = Study(task=task, recipe=Recipe(iterations=12, batch_size=32), importances=("l1",), seeds=(0,), levels=1)
    planner = Planner(of, load_problem(of.task), Store(tmp_path / "here"))
    with WorkersHere(planner.problem, planner.store) as workers:
        run_trainings(planner, workers, lambda *_: None)
    theirs = Store(tmp_path / "tombola-store", create=False)
    keys = [training.key for training in planner.progress(planner.chains[0]).trainings]
    assert len(keys) == 2
    for key in keys:
        one, other = planner.store.results.get(key), theirs.results.get(key)
        assert one is not None
        assert other is not None
        assert one.weights.hash == other.weights.hash


def test_the_display_of_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    display = ModuleType("IPython.display")
    display.display = lambda data, raw, display_id: handle  # type: ignore[attr-defined]
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    tombola.run(study(), store=tmp_path / "s")
    assert shown[0].startswith("0 of 2 trainings")
    assert "accuracy" in shown[-1]
    assert "\x1b" not in "".join(shown)
    assert all(one != other for one, other in itertools.pairwise(shown))


# Tables and charts.


TABLES: dict[str, Callable[[], pl.DataFrame]] = {
    "overlap": lambda: tombola.overlap(**finished(), levels=[1]),
    "stability": lambda: tombola.stability(**finished(), layers=["fc.weight"]),
    "winners": lambda: tombola.winners(**finished(), margin=1.0, importances=["l1"]),
    "connectivity": lambda: tombola.connectivity(**finished(), points=2),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_analyses(name: str) -> None:
    assert TABLES[name]().height > 0


def test_a_ticket_is_read_and_an_importance_may_be_named_or_given() -> None:
    zero: Any = np.int64(0)
    one = tombola.read_ticket(importance=l1, seed=0, level=1, **finished())
    other = tombola.read_ticket(importance="l1", seed=0, level=1, **finished())
    assert one.mask == other.mask == tombola.read_ticket(importance="l1", seed=zero, level=zero + 1, **finished()).mask
    assert one.load_trained().keys() == other.rewound.keys()
    assert tombola.layers(**finished(), importances=[l1])["importance"].unique().to_list() == ["l1"]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"importance": "l2"}, "^importance: the study has no importance 'l2', it has magnitude, l1$"),
        ({"seed": 7}, "^seed: the study has no seed 7, it has 0$"),
        ({"seed": False}, "^seed: the study has no seed False, it has 0$"),
        ({"seed": [0]}, r"^seed: the study has no seed \[0\], it has 0$"),
        ({"level": 2}, "^level: the study has no level 2, it has levels 0 to 1$"),
        ({"level": -1}, "^level: the study has no level -1"),
        ({"level": 1.0}, "^level: expected a whole number, got 1.0$"),
        ({"overrides": {"levels": 2}, "level": 2}, "^level 2 of l1, seed 0 is not in .*, levels 0 to 1 are$"),
    ],
)
def test_tickets_that_are_not_there(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        tombola.read_ticket(**{"importance": "l1", "seed": 0, "level": 1} | finished() | asked)


def test_reinit_starts_its_workers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    before = runs.open_workers

    def count(planner: Planner, *others: Any) -> Workers:
        opened.append(planner)
        return before(planner, *others)

    of, more = finished(), {"seeds": [0, 1]}
    tombola.run(**of, overrides=more, progress=False)
    monkeypatch.setattr(runs, "open_workers", count)
    assert tombola.reinit(**of, overrides=more, level=1, draws=1, progress=False)["seed"].unique().to_list() == [0, 1]
    assert len(opened) == 1
    with pytest.raises(UserError, match="workers: 4 processes cannot import"):
        tombola.reinit(**of, level=1, workers=4)


def test_mistakes_of_tables_and_charts(tmp_path: Path) -> None:
    of = finished()
    for call, text in [
        (lambda: tombola.overlap("digit"), "study 'digit' is neither a preset nor a .toml file; did you mean 'digits'"),
        (lambda: tombola.overlap(3), "study: expected a tombola.Study, the name of a preset"),
        (lambda: tombola.overlap(**of, levels=1), "levels: expected several, such as [1], got 1"),
        (lambda: tombola.overlap(**of, levels=[1.0]), "level: expected a whole number, got 1.0"),
        (lambda: tombola.charts(**of, level=1.0), "level: expected a whole number, got 1.0"),
        (lambda: tombola.reinit(**of, level=1.0), "level: expected a whole number, got 1.0"),
        (lambda: tombola.reinit(**of, level=1, draws=1.5), "draws: expected a whole number from 1 to 1000, got 1.5"),
        (lambda: tombola.reinit(**of, level=1, workers=-1), "workers: expected a whole number from 1 on, got -1"),
        (lambda: tombola.run("digits", store=tmp_path, workers=0), "workers: expected a whole number from 1 on, got 0"),
        (lambda: tombola.run("digits", store=tmp_path, workers=-1), "workers: expected a whole number from 1 on, got"),
        (lambda: tombola.results("digits", store=tmp_path), "no result of this study is in"),
        (lambda: tombola.charts("digits", store=tmp_path), "no result of this study is in"),
        (lambda: tombola.charts(**of, costly=["function"]), "costly: unknown analysis 'function'; did you mean"),
        (lambda: tombola.layers(**of, importances=["lamp"]), "importances: the study has no importance 'lamp'"),
        (lambda: tombola.report(**of, path=tmp_path / "no" / "r.html"), "there is no folder"),
        (lambda: tombola.report(**of, path=tmp_path), "is a folder; name a file in it"),
        (lambda: tombola.report(**of, path=3), "path: expected a path, got 3"),
        (lambda: tombola.compare("digits", store=tmp_path), "no result that the reference has too is in"),
        (lambda: override(of["study"], {"levels": -1}), "study: levels: expected a number from 0, got -1"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            call()  # type: ignore[no-untyped-call]
        assert text in str(caught.value)


# find_tickets.


def attempt(**arguments: Any) -> None:
    """Call find_tickets without taking a ticket."""
    given = {"model": tiny_task.model(), "data": tiny_task.dataset(), "recipe": Recipe(iterations=3), "importance": l1}
    find_tickets(**given | {"levels": 1} | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": nn.Linear(5, 4)}, r"^model: on inputs of shape \(2, 16\) from 'tiny' it raised RuntimeError"),
        ({"model": nn.Linear(16, 2)}, r"^model: .* outputs of shape \(2, 4\), one number for each of the 4 classes"),
        (
            {"loss": lambda outputs, labels: outputs},
            "^loss: expected one number, the mean over the batch",
        ),
        ({"importance": lambda weights: weights[1:]}, "^importance '<lambda>', layer '0.weight': expected a tensor of"),
        ({"importance": "l1"}, r"^expected an importance, got the text 'l1'; tombola.importance.find\('l1'\) finds it"),
        ({"importance": 3}, "^expected an importance or a function of a layer's weights, got int"),
        ({"device": "gpu"}, "^device: expected 'cpu' or 'cuda', got 'gpu'"),
        ({"levels": 40}, "^levels: 40 are too many"),
    ],
)
def test_find_tickets_finds_mistakes_before_it_trains(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        attempt(**arguments)


def test_tickets_say_where_they_are_from(tmp_path: Path) -> None:
    data: Dataset = tiny_task.dataset()
    (ticket,) = find_tickets(tiny_task.model(), data, Recipe(iterations=3), l1, levels=0, seed=5)
    assert ticket.provenance["importance"] == "l1"
    assert ticket.provenance["seed"] == 5
    assert ticket.provenance["data"] == {"name": "tiny", "fingerprint": data.fingerprint}
    ticket.save(tmp_path / "t")
    assert tombola.Ticket.load(tmp_path / "t").provenance == ticket.provenance


# What a check before a run finds.


def test_a_model_that_gives_more_tensors_the_second_time(tmp_path: Path) -> None:
    built = []

    def growing() -> nn.Module:
        built.append(None)
        model = tiny_task.model()
        if len(built) % 2:
            return model
        model.register_buffer("late", torch.zeros(1))
        return model

    of = study(task=Task(dataset=tiny_task.dataset(), model=growing))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"it gives different .* in two calls with the same seed; draw random numbers"):
        tombola.run(of, store=tmp_path / "s", progress=False)

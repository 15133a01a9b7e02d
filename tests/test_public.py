"""The public names: there, documented with an example that runs, and cheap to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny_task
import tombola
from tombola import Mask, Recipe, Store, Task, Ticket, UserError, Weights, datasets, interchange, loops
from tombola.importance import IMPORTANCES, find, l1
from tombola.inputs import call
from tombola.training.metrics import ACCURACY


def _in_a_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_is_what_is_visible() -> None:
    assert sorted(tombola.__all__) == tombola.__all__, "in the order of the alphabet, each once"
    assert len(set(tombola.__all__)) == len(tombola.__all__)
    assert set(dir(tombola)) == {*tombola.__all__, "__version__"}
    namespace: dict[str, object] = {}
    exec("from tombola import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == sorted(tombola.__all__)


def test_type_checkers_see_the_same_names() -> None:
    source = ast.parse(Path(inspect.getfile(tombola)).read_text(encoding="utf-8"))
    (checked,) = [
        node
        for node in source.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    homes = {
        alias.asname or alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(homes) == set(tombola.__all__)
    for name, module in homes.items():
        assert module is not None
        assert getattr(importlib.import_module(module), name) is getattr(tombola, name)


@pytest.mark.parametrize("name", tombola.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from tombola import {name}", namespace)
    assert namespace[name] is getattr(tombola, name)


def test_every_public_module_can_be_imported_by_its_name() -> None:
    modules = sorted(set(tombola.__all__) - set(OBJECTS))
    assert "interchange" in modules
    for name in modules:
        assert importlib.import_module(f"tombola.{name}") is getattr(tombola, name)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'tombola' has no attribute 'trian'"):
        tombola.trian  # noqa: B018
    with pytest.raises(ImportError):
        exec("from tombola import trian")


OBJECTS = [name for name in tombola.__all__ if not isinstance(getattr(tombola, name), ModuleType)]


def _check_docstring(thing: object) -> str:
    text = inspect.getdoc(thing) or ""
    first = text.partition("\n")[0]
    assert len(first) > 10
    assert text.partition("\n\n")[0].rstrip().endswith((".", ":")), "it begins with a sentence"
    return text


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_object_is_documented_with_an_example(name: str) -> None:
    assert "\n>>> " in _check_docstring(getattr(tombola, name))


@pytest.mark.parametrize("name", sorted(set(tombola.__all__) - set(OBJECTS)))
def test_every_public_module_is_documented(name: str) -> None:
    module = getattr(tombola, name)
    _check_docstring(module)
    for public in module.__all__ if hasattr(module, "__all__") else []:
        assert hasattr(module, public)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_is_documented_with_an_example(name: str) -> None:
    for function in (IMPORTANCES[name].score, IMPORTANCES[name].normalise):
        text = _check_docstring(function)
        assert text.startswith("Return ")
        assert "\n>>> " in text


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_method_is_documented(name: str) -> None:
    thing = getattr(tombola, name)
    if isinstance(thing, type):
        for method, value in vars(thing).items():
            if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod))):
                assert value.__doc__, f"{name}.{method}"


@pytest.mark.parametrize(
    "code",
    [
        "import tombola",
        "import tombola.cli",
        "from tombola.study.schema import load_study; load_study('digits')",
        "import tombola.cli, contextlib\nwith contextlib.suppress(SystemExit): tombola.cli.main(['--help'])"
        "\nimport sys; assert not {'dataclasses', 'statistics', 'tombola.lottery'} & set(sys.modules)",
    ],
    ids=["package", "command line", "study", "help"],
)
def test_torch_is_not_imported_before_it_is_needed(code: str) -> None:
    _in_a_fresh_process(f"{code}\nimport sys\nassert not {{'torch', 'sklearn', 'numpy'}} & set(sys.modules)")


def test_every_public_name_is_described_on_the_site() -> None:
    pages = "".join(page.read_text() for page in (Path(__file__).parents[1] / "docs" / "api").glob("*.md"))
    described = re.findall(r"^::: tombola\.([\w.]+)$", pages, re.MULTILINE)
    assert set(tombola.__all__) <= {part for name in described for part in name.split(".")}


class _BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"nowhere"


class _Frame:
    """A frame of pandas, or a tensor of several elements: neither true nor false, and compared element by element."""

    def __bool__(self) -> bool:
        raise ValueError("The truth value of a frame is ambiguous.")

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


# What is of no type that an argument may have.

WRONG: dict[str, Any] = {
    "None": None,
    "a number": 3,
    "a class": nn.Linear,
    "a function": lambda: None,
    "a dict": {"a": 1},
    "a list of None": [None],
    "a frame": pl.DataFrame({"a": [1]}),
    "a frame of pandas": _Frame(),
    "a path": Path("nothing", "there"),
}


def _calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, set[str]]]]:
    """Return public functions with valid arguments, and those of `WRONG` that an argument may be."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    mask, start, state = Mask.ones_like(model), loops.snapshot(model), model.state_dict()
    optimizer, tiny = torch.optim.SGD(model.parameters()), tiny_task.model()
    ticket = Ticket(0, mask, Weights.of(state), trained=None)
    layers: dict[str, Any] = {"exclude": ["0"], "keep_dense": ["1"]}
    pruning: dict[str, Any] = {"mask": mask, "importance": l1, "fraction": 0.1, "selection": "global", **layers}
    own, none, path = {"a function", "a class"}, {"None"}, {"a path"}
    of_importance = {"importance": own}  # it fails later, on a layer
    study: dict[str, Any] = {"study": "digits", "overrides": {}, "store": "nowhere", "data": "nowhere"}
    may: dict[str, set[str]] = {"study": path, "overrides": none, "store": path, "data": none | path}
    shown = {**study, "progress": False}
    return {
        "prunable": (tombola.prunable, {"model": model, "prune": ["0"]}, {}),
        "ones_like": (Mask.ones_like, {"model": model, "exclude": ["0"], "prune": ["*.weight"]}, {}),
        "from_tensors": (Mask.from_tensors, {"tensors": {"w": torch.ones(2).bool()}}, {}),
        "Weights.of": (Weights.of, {"state": state}, {}),
        "prune": (tombola.prune, {"weights": state, "seed": 0, **pruning}, of_importance | {"seed": {"a number"}}),
        "loops.prune": (loops.prune, {"model": model, "rewound": start, **pruning}, of_importance | {"rewound": none}),
        "hold": (loops.hold, {"model": model, "mask": mask, "optimizer": optimizer}, {}),
        "release": (loops.release, {"model": model}, {}),
        "snapshot": (loops.snapshot, {"model": model, "optimizer": optimizer}, {"optimizer": none}),
        "rewind": (loops.rewind, {"model": model, "start": start, "mask": mask}, {}),
        "lightning": (loops.lightning_callback, {"mask": mask, "model": model}, {"model": none}),
        "transformers": (loops.transformers_callback, {"mask": mask, "model": model}, {"model": none}),
        "from_torch_prune": (interchange.from_torch_prune, {"model": model}, {}),
        "to_torch_prune": (interchange.to_torch_prune, {"model": nn.Linear(4, 3), "mask": mask}, {}),
        "from_open_lth": (interchange.from_open_lth, {"masks": {"w": [1, 0]}}, {"masks": {"a dict"}}),
        "to_open_lth": (interchange.to_open_lth, {"mask": mask}, {}),
        "from_zeros": (interchange.from_zeros, {"model": model}, {}),
        "apply": (ticket.apply, {"model": model, "trained": False}, {}),
        "sparse": (ticket.sparse, {"model": model, "trained": False, "batch_size": 1}, {"batch_size": {"a number"}}),
        "save": (ticket.save, {"path": "nowhere/ticket", "trained": False}, {}),
        "load": (Ticket.load, {"path": "nowhere/ticket"}, {}),
        "Ticket": (
            lambda **of: Ticket(trained=None, **of),
            {"level": 0, "mask": mask, "rewind": Weights.of(state), "shared": {}, "provenance": {}},
            {"level": {"a number"}, "shared": {"a dict"}, "provenance": {"a dict"}},
        ),
        "find": (find, {"name": "l1"}, {}),
        "load data": (datasets.load, {"name": "digits", "directory": "nowhere"}, {"directory": none | path}),
        "load_problem": (tombola.load_problem, {"task": Task(dataset="x", model="y")}, {}),
        "Store": (Store, {"root": "nowhere", "create": False}, {"root": path}),
        "results": (tombola.results, study, may),
        "plan": (tombola.plan, study, may),
        "run": (tombola.run, {**shown, "epochs": False, "hooks": []}, may),
        "find ticket": (tombola.find, {**shown, "within": 0.1, "strategy": "rounds"}, may | {"strategy": own}),
        "winners": (tombola.winners, {**study, "surely": False, "margin": 0.1}, may),
        "verify": (tombola.verify, {**study, "chains": False, "sample": 1}, may | {"sample": none | {"a number"}}),
        **{
            name: (getattr(tombola, name), {**shown, "level": 1}, may | {"level": {"a number"}})
            for name in ("reinit", "controls", "combine", "early")
        },
        "overlap": (tombola.overlap, {**study, "importances": ["l1"]}, may | {"importances": none | own}),
        "train": (
            tombola.train,
            {"model": tiny, "initial": tiny.state_dict(), "mask": Mask.ones_like(tiny)}
            | {"data": tiny_task.dataset(), "recipe": Recipe(epochs=1), "seed": 0, "end": 1, "metrics": [ACCURACY]}
            | {"loss": functional.cross_entropy, "forward": call, "resume": None, "device": "cpu", "kernels": "auto"}
            | {"packed": None},
            {"seed": {"a number"}, "packed": none, "end": {"a number"} | none, "loss": own, "forward": own}
            | {"resume": none, "kernels": {"a dict"}},
        ),
        "find tickets": (
            lambda **of: list(tombola.find_tickets(**of)),
            {"model": tiny_task.model(), "data": tiny_task.dataset(), "recipe": Recipe(epochs=1), "importance": l1}
            | {"levels": 1, "metrics": ["accuracy"], "seed": 0, "exclude": [], "keep_dense": [], "shares": {}}
            | {"loss": "cross_entropy", "forward": call, "step": None, "optimizer": None, "kernels": "auto"}
            | {"progress": False},
            of_importance | {"shares": none, "forward": own, "loss": own, "step": own | none, "optimizer": own | none}
            | {"kernels": {"a dict"}, "levels": {"a number"}, "seed": {"a number"}},
        ),
    }  # fmt: skip


def test_what_is_of_a_wrong_type_is_told_in_a_sentence() -> None:
    calls = _calls()
    for name, (function, right, may) in calls.items():
        for argument in right:
            for kind in WRONG.keys() - may.get(argument, set()):
                told = _refusal(function, right | {argument: WRONG[kind]})
                assert told is not None, f"{name}: {argument}: {kind} was accepted"
                assert "\n" not in told
                assert len(told) < 500


@pytest.mark.parametrize(
    ("name", "argument", "wrong", "text"),
    [
        ("train", "seed", 1.5, "seed: expected a whole number, got 1.5"),
        ("train", "seed", True, "seed: expected a whole number, got True"),
        ("train", "seed", "1", "seed: expected a whole number, got '1'"),
        ("train", "watch_every", -1, "watch_every: expected a number of seconds, 0 or more, got -1"),
        ("train", "watch_every", float("nan"), "watch_every: expected a number of seconds, 0 or more, got nan"),
        ("train", "watch_every", "1", "watch_every: expected a number of seconds, 0 or more, got '1'"),
        ("train", "metrics", "accuracy", "metrics: expected a list of .*, got 'accuracy'; write \\['accuracy'\\]"),
        ("train", "metrics", [len], "metrics: expected a list of .*, got builtin_function_or_method"),
        ("find tickets", "metrics", "accuracy", "metrics: expected a list of names of .*; write \\['accuracy'\\]"),
        ("find tickets", "fraction", torch.tensor(0.2), "fraction: expected a number between 0 and 1, .* got Tensor"),
        ("save", "path", _BytesPath(), "Ticket.save: expected a path, got _BytesPath"),
        ("save", "path", "x" * 5000, "^Ticket.save: 'x+ ... is no path, because it has more than 4095 bytes$"),
        ("Weights.of", "state", np.int64(3), "got 3$"),
    ],
)
def test_what_is_nearly_right_is_told_too(name: str, argument: str, wrong: object, text: str) -> None:
    function, right, _ = _calls()[name]
    assert re.search(text, _refusal(function, right | {argument: wrong}) or "nothing was told")


def test_a_seed_may_be_a_number_of_numpy() -> None:
    function, right, _ = _calls()["train"]
    one, other = (function(**right | {"seed": seed}).weights.load() for seed in (np.int64(1), 1))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def _refusal(function: Callable[..., Any], given: dict[str, Any]) -> str | None:
    try:
        function(**given)
    except UserError as error:
        return str(error)
    return None

"""The public names: there, documented with an example that runs, and cheap to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tombola
from tombola.importance import IMPORTANCES


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
        "import tombola.cli, contextlib\nwith contextlib.suppress(SystemExit): tombola.cli.main(['--help'])",
    ],
    ids=["package", "command line", "study", "help"],
)
def test_torch_is_not_imported_before_it_is_needed(code: str) -> None:
    _in_a_fresh_process(f"{code}\nimport sys\nassert not {{'torch', 'sklearn', 'numpy'}} & set(sys.modules)")


def test_every_public_name_is_described_on_the_site() -> None:
    pages = "".join(page.read_text() for page in (Path(__file__).parents[1] / "docs" / "api").glob("*.md"))
    described = re.findall(r"^::: tombola\.([\w.]+)$", pages, re.MULTILINE)
    assert set(tombola.__all__) <= {part for name in described for part in name.split(".")}

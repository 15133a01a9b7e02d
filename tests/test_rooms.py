"""The rooms of the house: imports go up the list of ARCHITECTURE.md only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tombola

ROOT = Path(tombola.__file__).parent

ROOMS = [
    "errors", "terminal", "settings", "exits", "files", "inputs", "streams", "cores", "threads",
    "importance", "pruning",
    "interchange",
    "datasets",
    "models", "kernels", "own", "training", "lottery", "loops", "store", "study", "engine", "hooks", "analysis",
    "reporting", "workbench",
    "cli",
]  # fmt: skip
"""From the ground up; a module may import from its own room and from those before it."""


def list_imports(path: Path) -> set[str]:
    """Return the rooms that a module imports, wherever in it and also for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert not node.level, f"{path}: relative import"
            own = node.module == "tombola"
            found |= {f"tombola.{alias.name}" for alias in node.names} if own else {node.module}
    return {name.split(".")[1] for name in found if name.startswith("tombola.")} - {"__version__"}


def test_every_module_is_in_a_room() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__init__", "__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_up_only(room: str) -> None:
    modules = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert modules
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    below = {str(module.relative_to(ROOT)): list_imports(module) - allowed for module in modules}
    assert {module: names for module, names in below.items() if names} == {}

"""Change one place of the code at a time, run the tests that cover it, and list the changes that no test notices.

    python tests/mutate.py pruning importance             # rooms, or modules such as pruning/mask.py
    python tests/mutate.py store --tests tests/test_store.py --sample 100

Each change is made in a copy of the repository, and in one process that is forked from here, where torch is already
imported. Doctests of the changed module come first, then the tests of its room in the order given below: the first
failing test ends it. A change that makes the tests run for too long counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/tombola")

TESTS = {  # of each room, quick ones first
    "importance": ["test_importance.py", "test_mask.py"],
    "pruning": ["test_mask.py", "test_importance.py", "test_rewinding.py"],
    "lottery": ["test_rewinding.py"],
    "training": ["test_optimizer.py", "test_training.py", "test_rewinding.py"],
    "store": ["test_store.py", "test_sharing.py", "test_study.py", "test_faults.py"],
    "own": ["test_own_code.py", "test_workbench.py"],
    "study": ["test_study.py", "test_bad_input.py"],
    "analysis": [
        "test_analysis_chance.py",
        "test_analysis_overlap.py",
        "test_analysis_layers.py",
        "test_analysis_study.py",
        "test_results.py",
    ],
}
IMPORT_ONCE = ("torch", "numpy", "scipy.stats", "polars", "safetensors.torch", "pydantic", "sklearn")

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "max", "sorted": "list"}


@dataclass(frozen=True)
class Mutation:
    """One change of a module: where it is, what was there, what is there now, and the whole text with it."""

    path: Path
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"


def mutate(path: Path, source: str) -> list[Mutation]:
    """Return every mutation of a module, in the order of its lines."""
    tree = ast.parse(source)
    found = []
    for number, (_, _, node) in enumerate(places(tree)):
        for replacement in replacements(node):
            changed = copy.deepcopy(tree)
            parent, at, _ = list(places(changed))[number]
            put(parent, at, replacement)
            text = ast.unparse(ast.fix_missing_locations(changed))
            before, after = (ast.unparse(each).partition("\n")[0][:80] for each in (node, replacement))
            line = node.target.lineno if isinstance(node, ast.comprehension) else getattr(node, "lineno", 0)
            found.append(Mutation(path, line, before, after, text))
    return sorted(found, key=lambda mutation: mutation.line)


Place = tuple[str, int | None]


def places(node: ast.AST) -> Iterator[tuple[ast.AST, Place, ast.AST]]:
    """Yield (parent, place in it, node) of what runs: no docstrings, annotations, decorators, texts of f-strings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "ctx", "op", "ops", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            docstring = field == "body" and index == 0 and isinstance(child, ast.Expr)
            if docstring and isinstance(child.value, ast.Constant):
                continue
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            text = isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)
            if isinstance(child, ast.AST) and not typing and not text:
                yield node, (field, index), child
                yield from places(child)


def put(parent: ast.AST, place: Place, node: ast.AST) -> None:
    """Put a node in the place of another."""
    field, index = place
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node is replaced by, one change each."""
    match node:
        case ast.Compare():
            for index, op in enumerate(node.ops):
                yield alter(node, ops=[*node.ops[:index], COMPARISONS[type(op)](), *node.ops[index + 1 :]])
        case ast.BinOp() | ast.AugAssign():
            yield alter(node, op=OPERATORS[type(node.op)]())
        case ast.BoolOp():
            yield alter(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
        case ast.Constant(value=str()) if node.value:
            yield ast.Constant(f"{node.value}?")
        case ast.Return(value=ast.expr()) if not is_none(node.value):
            yield alter(node, value=ast.Constant(None))
        case ast.Yield(value=ast.expr()):
            yield alter(node, value=ast.Constant(None))
        case ast.If() | ast.While() | ast.IfExp():
            yield alter(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.For() | ast.comprehension():
            yield alter(node, iter=ast.Tuple([], ast.Load()))
            if isinstance(node, ast.comprehension) and node.ifs:
                yield alter(node, ifs=[])
        case ast.Call():
            for index in range(len(node.keywords)):
                yield alter(node, keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(attr=name) if name in ("min", "max", "any", "all"):
            yield alter(node, attr=NAMES[name])
        case ast.Slice():
            yield from (alter(node, **{end: None}) for end in ("lower", "upper", "step") if getattr(node, end))
        case ast.With() if len(node.items) > 1:
            for index in [index for index, item in enumerate(node.items) if item.optional_vars is None]:
                yield alter(node, items=[*node.items[:index], *node.items[index + 1 :]])
    if is_droppable(node):
        yield ast.Pass()


def is_droppable(node: ast.AST) -> bool:
    """Say whether a statement is deleted too: not where all that would come of it is a name that is not there."""
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name)
    return isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete))


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def alter(node: ast.AST, **fields: object) -> ast.AST:
    """Return a copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


class WithoutShrinking:
    """Lets hypothesis stop at the first example that fails: nobody reads a smaller one."""

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("mutate", phases=(Phase.explicit, Phase.generate), database=None)
        settings.load_profile("mutate")


def notices(copied: Path, module: Path, tests: Sequence[str], limit: float) -> bool:
    """Run the tests in a process of its own; return whether one fails, or they take longer than `limit` seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(copied / "output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(copied)
        os.environ["PYTHONPATH"] = str(copied / "src")
        sys.path[0] = str(copied / "src")  # in place of the folder of this file
        sys.dont_write_bytecode = True
        status = 1
        try:
            arguments = ["-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", str(module), *tests]
            status = pytest.main(arguments, plugins=[WithoutShrinking()])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(status))
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.02)


def modules(name: str) -> list[Path]:
    """Return the modules of a room or file, relative to the repository."""
    path = REPOSITORY / PACKAGE / name
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [each.relative_to(REPOSITORY) for each in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="room or file below src/tombola")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="tests to run, quick ones first")
    parser.add_argument("--sample", type=int, metavar="N", help="try N of the changes, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--list", action="store_true", help="list the changes and try none")
    options = parser.parse_args()

    paths = [path for name in options.modules for path in modules(name)]
    mutations = [each for path in paths for each in mutate(path, (REPOSITORY / path).read_text(encoding="utf-8"))]
    if options.sample and options.sample < len(mutations):
        drawn = random.Random(options.seed).sample(range(len(mutations)), options.sample)
        total, mutations = len(mutations), [mutations[index] for index in sorted(drawn)]
        print(f"{len(mutations)} of {total} changes, drawn with seed {options.seed}")
    if options.list:
        print(*mutations, sep="\n")
        return
    for name in IMPORT_ONCE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        survivors = run(Path(folder), mutations, options.tests)
    print(f"{len(survivors)} of {len(mutations)} changes survive")


def run(copied: Path, mutations: Sequence[Mutation], tests: Sequence[str] | None) -> list[Mutation]:
    """Try the mutations in a copy of the repository; return those that no test notices."""
    for name in ("src", "tests"):
        shutil.copytree(REPOSITORY / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", copied)
    found = importlib.util.find_spec("tombola")
    if found and found.origin:  # compiled code lies where the package is installed
        for library in (installed := Path(found.origin).parent).rglob("*.so"):
            shutil.copy(library, copied / PACKAGE / library.relative_to(installed))
    limits: dict[Path, float] = {}
    survivors = []
    for number, mutation in enumerate(mutations, 1):
        if number % 20 == 0:
            print(f"[{number}/{len(mutations)}] ...", file=sys.stderr, flush=True)
        path = mutation.path
        files = tests or [f"tests/{name}" for name in TESTS[path.relative_to(PACKAGE).parts[0]]]
        if path not in limits:
            begun = time.monotonic()
            if notices(copied, path, files, 1800):
                print((copied / "output.txt").read_text(), file=sys.stderr)
                sys.exit(f"{path}: the tests fail before anything is changed")
            limits[path] = 30 + 5 * (time.monotonic() - begun)
        (copied / path).write_text(mutation.source, encoding="utf-8")
        noticed = notices(copied, path, files, limits[path])
        shutil.copy(REPOSITORY / path, copied / path)
        if not noticed:
            survivors.append(mutation)
            print(f"[{number}/{len(mutations)}] survives: {mutation}", flush=True)
    return survivors


if __name__ == "__main__":
    main()

"""The documentation: its code runs, page by page from first line to last, its commands are understood, its files exist.

A block with a title, such as ```` ```python title="mine.py" ````, is written into that file. A command about a study
that the page has written is run, with fewer epochs; of all others the options and the study are read, because they take
minutes, or a cluster. For the same reason a block `py`, which needs results of a preset or another library, is compiled
and not run. Nearly every command about `digits` (see `of_digits`), in a sentence or a table too, is run with fewer
levels and epochs, and so are the analyses of `lenet-mnist`, of `digits`.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from small_study import OVERRIDES, STUDY
from tombola import Planner, Store, load_problem
from tombola.cli.main import main, make_parser
from tombola.cli.options import with_dashes
from tombola.study.schema import load_study, presets
from tombola.study.tickets import Tickets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = ["--levels", "3", "--seeds", "0", "--recipe.epochs", "1"]
FAST = {"run", "plan", "winners", "results", "export"}
ELSEWHERE = {"importances.md"}  # its code is a module; tests/test_rounds.py runs it

BLOCK = re.compile(r'^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^ {0,4}(?:\.venv/bin/)?tombola ((?:.*\\\n)*.*)$", re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of the commands of a block or of indented lines."""
    for found in COMMAND.finditer(text):
        arguments = shlex.split(found[1].replace("\\\n", " ").partition(" ...")[0], comments=True)
        yield [re.sub(r"\$\w+", "4", argument) for argument in arguments]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```" in page.read_text() and page.parent.name != "examples"],  # tests/test_examples.py
    ids=lambda page: page.stem,
)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers_here: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))  # so that it is gone afterwards
    del sys.modules["mine"]
    space: dict[str, object] = {"__name__": "page"}
    for language, title, text in BLOCK.findall(page.read_text()):
        if title:
            Path(title).write_text(text)
            if title.endswith(".toml"):
                load_study(Path(title))
        elif language == "toml":
            tomllib.loads(text)
        elif language == "py":
            compile(text, str(page), "exec")
        elif language == "python" and page.name not in ELSEWHERE:
            exec(compile(text, str(page), "exec"), space)
        for arguments in commands(text) if language == "sh" else ():
            own = [argument for argument in arguments[1:2] if argument.endswith(".toml") and Path(argument).exists()]
            if arguments[0] == "init" or (own and arguments[0] in FAST):
                assert main([*arguments, *(SMALL if own else [])]) == 0, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^(?: {4})?make ([\w-]+)", text, re.MULTILINE))
    assert all((ROOT / path).is_file() for path in re.findall(r"\bpython ((?:benchmarks|docs|tests)/[\w/]+\.py)", text))
    for arguments in commands(text):
        if {"--version", "--help"} & set(arguments) or arguments[0].isupper():
            continue
        options = make_parser().parse_args([with_dashes(argument) for argument in arguments])
        study = getattr(options, "study", None)
        if study is not None and not study.endswith(".toml") and not study.isupper():
            load_study(study)


ABOUT = re.compile(r"^ {0,4}tombola (.+)$|`tombola ([^`\n]+)`", re.MULTILINE)
ADDED = {"normalisation.md", "score.md"}  # their commands use what the reader has added to the code
LONG = {"scores.md"}  # its runs have all scores, which tests/test_scores.py computes
FEWER = {"--levels": ["2"], "--level": ["2"], "--recipe.epochs": ["1"], "--seeds": ["0", "1"], "--points": ["3"]}


def of_digits() -> dict[str, list[list[str]]]:
    """Return the commands about `digits` of each page, once, without those that need a user's code or a server.

    Nor is a reference compared with a run of fewer epochs.
    """
    found: dict[str, list[list[str]]] = {}
    for page in PAGES:
        for block, inline in (
            ABOUT.findall(page.read_text().replace("\\\n", " ")) if page.name not in ADDED | LONG else ()
        ):
            verb, *study = shlex.split((block or inline).partition(" ...")[0], comments=True)
            if study[:1] == ["lenet-mnist"] and verb not in FAST:
                study[0] = "digits"
            command = [verb, *study]
            known = any(command in commands for commands in found.values())
            if study[:1] == ["digits"] and "--against" not in study and not any(":" in part for part in study):
                found.setdefault(page.stem, []).extend([] if known else [command])
    return found


@pytest.mark.parametrize(("page", "about"), of_digits().items())
def test_the_commands_of_a_page_about_digits_run(
    page: str,
    about: list[list[str]],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers_here: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "tombola-store")
    if any("other.toml" in command for command in about):
        text = presets()["digits"].read_text().replace("lr = 0.1", "lr = 0.05")
        for field, few in {"levels": 2, "epochs": 1, "importances": '["magnitude", "l1"]', "data_seeds": "[]"}.items():
            text = re.sub(rf"^{field} = .*$", f"{field} = {few}", text, flags=re.MULTILINE)
        Path("other.toml").write_text(text)
        assert main(["run", "other.toml"]) == 0
    for command in about:
        assert main(command if "--reference" in command else fewer(command)) == 0, command


def fewer(command: list[str]) -> list[str]:
    """Return a command about `STUDY` or a part of it instead of `digits`; options that come later count."""
    own = "--importances" in command or command[0] == "rewind-point"  # which tries one importance, the first
    importances = [] if own else ["--importances", "magnitude", "l1"]
    few = [
        part
        for option in FEWER
        if option in command or option in {"--levels", "--recipe.epochs"}
        for part in (option, *FEWER[option])
    ]
    return [*command, *importances, *few, *([] if "--data-seeds" in command else ["--data-seeds"])]


@pytest.mark.parametrize("name", ["first-ticket", "compare-importances", "own-loop"])
def test_a_notebook_runs_and_shows_its_charts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers_here: None
) -> None:
    """The trainings are the same; what it shows was written by `docs/notebooks/execute.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "notebooks"))
    path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    shown = [cell["outputs"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    with torch.random.fork_rng():
        found = [outputs for _, outputs in importlib.import_module("execute").execute(path)]
    assert [_kinds(outputs) for outputs in found] == [_kinds(outputs) for outputs in shown]
    assert any("image/png" in kinds for kinds in map(_kinds, found))
    if name == "own-loop":
        printed = "".join(line for outputs in found for output in outputs for line in output.get("text", []))
        assert "pruned weights that are not 0.0: 0\n" in printed
        assert "rewound to equal bits: True\n" in printed
        assert "the sparse network's outputs are the same: True\n" in printed


def _kinds(outputs: list[dict[str, Any]]) -> list[str]:
    return [kind for output in outputs for kind in sorted(output.get("data", {output["output_type"]: None}))]


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    """What `mkdocs build --strict` finds, without building the site."""
    docs = ROOT / "docs"
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")}
    assert sorted(listed) == sorted(pages)
    for page in (*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"):
        text = BLOCK.sub("", page.read_text())
        for path, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]+))?\)", text):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert docs not in page.parents or docs in target.parents, f"{page.name}: {path} is not on the site"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as the site has them."""
    text = re.sub(r'^--8<-- "(.+)"$', lambda found: (ROOT / found[1]).read_text(), page.read_text(), flags=re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_page_of_the_command_line_has_its_choices_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backslash before a bar would be shown: Markdown leaves what stands in code as it is. Indented text is code."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    lines = list(importlib.import_module("hooks").describe_command_line())
    names = [line.partition(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| <code>")]
    assert "<code>--format table&#124;csv&#124;json</code>" in names
    assert not any("|" in name or "\\" in name for name in names)
    text = "\n".join(lines)
    assert "`tombola completion fish | source`" in text
    assert not re.search(r"^ +\S", text, re.MULTILINE)


def test_the_reproduction_is_made_of_what_is_kept_and_a_run_replaces_its_own_part(
    tmp_path: Path,
    finished_run: tuple[Path, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reproduction = importlib.import_module("reproduction")
    kept = {path.stem: json.loads(path.read_text()) for path in reproduction.KEPT.glob("*.json")}
    assert reproduction.page(kept) + "\n" == (ROOT / "docs" / "reproduction.md").read_text()
    monkeypatch.setattr(reproduction, "KEPT", tmp_path)
    (tmp_path / "lenet-mnist.json").write_text(json.dumps(kept["lenet-mnist"]))
    (tmp_path / "digits.json").write_text(json.dumps(kept["lenet-mnist"] | {"run": ["0", "10", "0.0", "none"]}))
    store = str(finished_run[0] / "tombola-store")
    assert reproduction.main([store, shlex.join(STUDY), "vgg16-cifar10-small"]) == 0
    printed = capsys.readouterr().out
    assert f"| lenet-mnist | {' | '.join(kept['lenet-mnist']['run'])} |" in printed
    assert re.search(r"^\| digits \| 10 \| 0 \| [\d.]+ \|", printed, re.MULTILINE)
    assert printed.count("| 4b The tickets differ") == 3, "in the table of all systems and in both sections"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.json", "lenet-mnist.json"]
    own = tmp_path / "elsewhere" / "own.toml"
    own.parent.mkdir()
    own.write_bytes(presets()["digits"].read_bytes())
    assert reproduction.main([store, shlex.join([str(own), *STUDY[1:]])]) == 0
    assert f"## own.toml\n\n    tombola run own.toml {shlex.join(STUDY[1:])}\n" in capsys.readouterr().out
    assert [path.name for path in own.parent.iterdir()] == ["own.toml"], "kept beside the others, not beside the file"
    with pytest.raises(SystemExit):
        reproduction.main([store, str(own), "another/own.toml"])
    assert "two systems are named own.toml" in capsys.readouterr().err


def test_the_comparison_of_scores_times_a_round_and_has_a_line_for_each_importance(
    tmp_path: Path, finished_run: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    scores = importlib.import_module("scores")
    study = load_study("digits", OVERRIDES)
    tickets = Tickets(Planner(study, load_problem(study.task), Store(finished_run[0] / "tombola-store")))
    assert [re.fullmatch(r"\d+\.\d\d", scores._seconds(tickets, name)) is None for name in study.importances] == [
        False
    ] * 2
    nothing = "\n".join(scores.section("digits", tmp_path / "nothing", None))
    assert [nothing.count(f"\n| `{name}` | – | – | – | – |") for name in scores.NAMES] == [
        2 if name in scores.AT_REWIND else 1 for name in scores.NAMES
    ]

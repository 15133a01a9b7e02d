"""The documentation: its code and its commands run, page by page, from first line to last; its files exist.

A block with a title, such as ```` ```python title="mine.py" ````, is written into that file. Commands run as they are
written, in a small world (`small_world`): presets of two levels and a few iterations, data sets of a few random images,
numbers of levels, seeds and epochs that are at most those of it, Ray and a GPU that are this process. Other modules
stand in for libraries that a page logs to or trains with. What no test can run is in `NOT_TYPED`, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from small_study import OVERRIDES, STUDY
from small_world import shrink, write_data, write_presets
from tombola import Planner, Store, load_problem
from tombola.analysis import reference
from tombola.cli.main import main, make_parser
from tombola.cli.options import open_study, with_dashes
from tombola.importance import NORMALISATIONS, importances
from tombola.study import schema
from tombola.study.schema import load_study, presets
from tombola.study.tickets import Tickets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_TYPED = {
    "it installs packages, as the checks themselves do": (
        "make demo",
        "pip install .",
        "pip install '.[data,report]'",
        "pip install '.[ray]'",
        "pip install '.[report]'",
        "pip install 'tombola[ray]'",
        "pip install timm",
        "pip install scikit-learn timm",
    ),
    "it runs or publishes the tests, the site or the package, of which this test is a part": (
        "make dist dist-plain",
        "make docs",
        "make golden WHY='...'",
        "make mutate",
        "make reference STUDY='PRESET --store DIR'",
        "make sanitize",
        "make test",
        "pytest --hypothesis-profile explore",
        'pytest --hypothesis-profile explore tests/test_ticket_file.py tests/test_faults.py -k "kills or changed_byte"',
        "pytest --hypothesis-profile explore tests/test_faults.py -k kills",
        "pytest tests/test_own_code.py",
        "pytest tests/test_store_damage.py",
    ),
    "it measures times for minutes": (
        "make bench",
        "python benchmarks/analyses.py",
        "python benchmarks/archives.py",
        "python benchmarks/gpu.py",
        "python benchmarks/run.py --avx2",
        "python benchmarks/inference.py --seconds 2",
    ),
    "other tests of this module call it, with small stores": (
        "python docs/reproduction.py STORE SYSTEM ...",
        "python docs/scores.py STORE --data DIR",
    ),
    "it belongs to another program": (
        "python open_lth.py lottery --default_hparams=mnist_lenet_300_100 --levels=24",
        "source ~/tombola/.venv/bin/activate",
        "head=$(hostname)",
        "sleep 30",
    ),
    "it needs a cluster; `tests/test_ray.py` has one of two nodes on this machine": (
        "ray start --head --port=6379 --num-cpus=16 --num-gpus=4",
        "srun --nodes=3 --exclude=$head ray start --address=$head:6379 --num-cpus=16 --num-gpus=4 --block &",
        "ray stop",
        "ray up",
        "ray up cluster.yaml",
        "ray rsync-up cluster.yaml data/ ~/data/",
        "ray exec cluster.yaml --tmux 'tombola run resnet20-cifar10 --data ~/data --device cuda --workers 8 "
        "--engine ray --address localhost:6379'",  # but the command in it is run
        "ray rsync-down cluster.yaml ~/tombola-store/ tombola-store/",
        "ray down cluster.yaml",
    ),
}
"""The commands of the pages that are not run, by the reason."""

SHOWN = ("text", "json", "mermaid", "bibtex", "yaml", "")
"""The languages of blocks that are only shown."""

SCORES = "python docs/scores.py tombola-store digits > scores.md"
PROGRAMS = r"(?:tombola|make|pip|pytest|python|ray)"
PART = re.compile(
    r'^```(?P<language>\w*)(?: title="(?P<title>[\w.-]+)")?\n(?P<text>(?s:.*?))^```$'
    r"|(?P<indented>(?:^ {4}.*\n)+)"
    rf"|`(?P<inline>{PROGRAMS} [^`]+)`",
    re.MULTILINE,
)
BLOCK = re.compile(r"^```(\w*)(?: title=\"([\w.-]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A part of a page: code in a language, with the file that it is, or a command."""

    language: str
    text: str
    title: str | None = None


def parts(page: Path) -> Iterator[Part]:
    """Yield the code and the commands of a page, in its order."""
    for found in PART.finditer(page.read_text()):
        lines = found["text"] if found["language"] == "sh" else found["indented"]
        if found["inline"]:
            yield Part("command", " ".join(found["inline"].split()))
        elif found["language"] not in (None, "sh"):
            yield Part(found["language"], found["text"], found["title"])
        elif found["language"] or (lines and re.search(rf"^ {{4}}{PROGRAMS} ", lines, re.MULTILINE)):
            for line in lines.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#.*$", "", f" {line}").strip()
                if command:
                    yield Part("command", command)


def commands(page: Path) -> list[str]:
    return [part.text for part in parts(page) if part.language == "command"]


EXAMPLES = ROOT / "docs" / "examples"  # tests/test_examples.py types them in
TYPED = [page for page in PAGES if page.parent != EXAMPLES or page.stem == "README"]
WITHOUT_STUDY = {"importances", "presets", "--help", "--version"}
WITHOUT_RESULTS = {"run", "plan", "find", "init"}


def is_mention(words: list[str]) -> bool:
    """Return whether a sentence only names a verb, as `tombola run`, or one of its options."""
    without = len(words) == 1 or words[1].startswith("--") or words == ["store", "gc"]
    return without and words[0] not in WITHOUT_STUDY and "--help" not in words


def arguments_of(command: str) -> list[str] | None:
    """Return the arguments of a command of tombola, and None for a mention or another program."""
    inner = re.search(r"'(tombola .*)'", command)
    program, *words = shlex.split(inner[1] if inner else command.partition(" ...")[0])
    return words if program == "tombola" and not is_mention(words) else None


def unique_commands() -> dict[Path, list[str]]:
    """Return the commands of each page, without those about a preset that an earlier page has too."""
    found: dict[Path, list[str]] = {}
    for page in TYPED:
        earlier = {command for each in found.values() for command in each if ".toml" not in command}
        found[page] = [command for command in commands(page) if command not in earlier and arguments_of(command)]
    return found


UNIQUE = unique_commands()


def test_what_is_not_run_is_known() -> None:
    """Whoever adds a command to a page adds it to what is run, or says here why not."""
    others = {
        command
        for page in PAGES
        for command in commands(page)
        if not command.startswith("tombola ") and command != SCORES
        if page.parent != EXAMPLES or not re.fullmatch(r"python \w+\.py", command)  # which is typed in
    }
    assert others == {command for kind in NOT_TYPED.values() for command in kind}
    makefile = (ROOT / "Makefile").read_text()
    for program, *names in map(shlex.split, others):
        for name in names:
            assert program != "make" or "=" in name or f"\n{name}:" in makefile, name
            assert not re.match(r"(benchmarks|docs|tests)/", name) or (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(arguments_of, commands(page)))], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the presets as they are, and every number as it is written."""
    monkeypatch.chdir(tmp_path)
    for arguments in filter(None, map(arguments_of, commands(page))):
        if {"--version", "--help"} & set(arguments):
            continue
        options = make_parser().parse_args([with_dashes(argument) for argument in in_place(arguments)])
        if getattr(options, "study", None) in presets():
            open_study(options)


PLACES = {"STUDY": "digits", "VERB": "run", "HOST:": "localhost:", "$head": "localhost", "$SLURM_CPUS_PER_TASK": "4"}
HERE = {"~/": "", "$HOME/": "", "/shared/": "", "cuda": "cpu"}  # every folder is the current one, and no GPU is needed


def in_place(arguments: list[str], places: dict[str, str] = PLACES) -> list[str]:
    """Return arguments with what a reader puts in the place of names."""
    for name, value in places.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    return arguments


MOST: dict[str, Callable[[list[str]], list[str]]] = {
    "--levels": lambda _: ["1"],
    "--level": lambda levels: sorted({str(min(int(level), 2)) for level in levels}),
    "--recipe.epochs": lambda _: ["1"],
    "--seeds": lambda seeds: [str(number) for number, _ in enumerate(seeds[:2])],
    "--at": lambda iterations: sorted({str(min(number, 2)) for number, _ in enumerate(iterations)}),
    "--points": lambda _: ["3"],
    "--within": lambda _: ["99"],
    "--draws": lambda _: ["1"],
}
"""What values of an option become in the small world; a study that a page runs with `--seeds` has one seed there."""


def reduce(arguments: list[str]) -> list[str]:
    """Return arguments with values that suit the small world."""
    options: list[list[str]] = [[]]
    one_seed = ["--seeds", "0"] if arguments[0] == "run" and "--seeds" in arguments else []  # the last one counts
    for argument in in_place(arguments, HERE):
        if argument.startswith("-"):
            options.append([])
        options[-1].append(re.sub(r"(_per_class)=\d+", r"\1=2", argument))
    few = [word for option, *values in filter(None, options) for word in (option, *MOST.get(option, list)(values))]
    return few + one_seed


DESCRIBED = dict.fromkeys(("mine.toml", "other.toml", "study.toml"), "digits")
"""The presets of which the files of studies are made that pages only mention."""


class Reader:
    """Types in what is on a page, in the current folder; runs the studies whose results the page takes for granted."""

    def __init__(self, presets: dict[str, Path]) -> None:
        self.presets = presets
        self.to_run = set(presets) - {"digits"}  # whose results are in the store

    def type(self, command: str) -> None:
        arguments = arguments_of(command)
        if arguments is None:
            return
        arguments = reduce(in_place(arguments))
        verb, *words = arguments
        for name in words if verb != "init" else ():
            if name.endswith(".toml") and not Path(name).exists():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(self.describe(name))
                self.to_run.add(name)
        studies = self.to_run.intersection(words)
        if verb not in WITHOUT_RESULTS and "--reference" not in words:
            assert all(run(["run", study]) == 0 for study in studies), studies
            self.to_run -= studies
        if "<(command)" in words:
            arguments = [verb, open_pipe(self.presets["digits"].read_text())]
        assert run(arguments) == 0, command
        self.to_run -= studies if verb == "run" else set()
        for name in words if verb == "init" else ():
            Path(name).write_text(shrink(Path(name).read_text()))

    def describe(self, name: str) -> str:
        """Return the study of a file of the project, or of one that a page describes in words."""
        if (ROOT / name).is_file():
            return shrink((ROOT / name).read_text())
        if name == "adam.toml":
            own = Path("small-resnet20.toml").read_text().replace("momentum = 0.9\n", "")
            return own.replace('"sgd"', '"adam"').replace("lr = 0.1", "lr = 0.003")
        text = self.presets[DESCRIBED[name]].read_text()
        return text.replace("lr = 0.1", "lr = 0.05") if name == "other.toml" else text


def run(arguments: list[str]) -> int | str:
    """Return the exit status of a command; `--help` and `--version` raise it."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code or 0


def open_pipe(text: str) -> str:
    """Return the path of a pipe in which a text is, as a shell gives it."""
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    return f"/dev/fd/{read}"


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "data"
    write_data(folder)
    return folder


@pytest.fixture
def reader(
    tmp_path: Path, small_data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, workers_here: None
) -> Reader:
    """Return a reader in an empty folder with data and a store in which `STUDY` is finished."""
    small = write_presets(presets(), tmp_path / "presets")
    published = [replace(each, study=load_study(small[each.preset])) for each in reference._published()]
    monkeypatch.setattr(schema, "presets", lambda: small)
    monkeypatch.setattr(reference, "_published", lambda: published)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_data, "data")
    shutil.copytree(finished, "tombola-store")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mine", "stands_in", "scores"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that it is gone afterwards
        del sys.modules[name]
    on_ray = ModuleType("tombola.engine.ray")
    on_ray.RayWorkers = open_on_ray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, on_ray.__name__, on_ray)
    for name in ("torch.utils.tensorboard", "mlflow", "lightning", "lightning.pytorch", "transformers"):
        module = ModuleType(name)
        for member in ("SummaryWriter", "MlflowClient", "Trainer"):
            setattr(module, member, MagicMock())
        for member in ("Callback", "TrainerCallback"):
            setattr(module, member, type(member, (), {}))
        monkeypatch.setitem(sys.modules, name, module)
    return Reader(small)


def open_on_ray(count: int | None, problem: Any, study: Any, store: Store, *, address: str | None, per_gpu: int) -> Any:
    """Return workers of this process in the place of those of Ray."""
    from tombola.engine import local

    assert address in (None, "localhost:6379")
    return local.LocalWorkers(count or 1, study.task, None, store.root)


@pytest.mark.parametrize(
    "page",
    [page for page in TYPED if UNIQUE[page] or any(part.language == "python" for part in parts(page))],
    ids=lambda page: page.stem,
)
def test_a_page_runs(page: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "page"}
    if page.stem == "your-loop":
        space |= {name: sys.modules[name] for name in ("lightning", "transformers")} | {"module": None, "loader": None}
        layers = torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
        torch.save({"state_dict": torch.nn.Sequential(*layers).state_dict()}, "sparseml.pth")
    for part in parts(page):
        assert part.language in ("command", "python", "toml", *SHOWN), part
        if part.title and part.title.endswith(".py"):
            compile(part.text, part.title, "exec")
        if part.title:
            Path(part.title).write_text(shrink(part.text) if part.title.endswith(".toml") else part.text)
            if part.title.endswith(".toml"):
                load_study(Path(part.title))
        elif part.language == "toml":
            tomllib.loads(part.text)
        elif part.language == "python":
            exec(compile(part.text, str(page), "exec"), space)
            add_to_the_code(space, monkeypatch)
        elif part.text == SCORES:
            monkeypatch.syspath_prepend(str(ROOT / "docs"))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert importlib.import_module("scores").main(["tombola-store", "digits"]) == 0
            assert "tombola run digits " in printed.getvalue()
        elif part.text in UNIQUE[page]:
            reader.type(part.text)


def add_to_the_code(space: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the score and the normalisation of the pages for contributors into their tables."""
    if "increase" in space:
        monkeypatch.setitem(importances.SCORES, "increase", space["increase"])
    if "largest" in space:
        monkeypatch.setitem(NORMALISATIONS, "largest", space["largest"])


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
    assert reproduction._without_folders("docs/own.toml --data=here --levels 2") == "docs/own.toml --levels 2"
    with pytest.raises(SystemExit):
        reproduction.main([store, str(own), "another/own.toml"])
    assert "two systems are named own.toml" in capsys.readouterr().err
    before = (tmp_path / "own.toml.json").read_bytes()
    own.write_text(own.read_text() + "# another study\n")
    with pytest.raises(SystemExit):
        reproduction.main([store, shlex.join([str(own), *STUDY[1:]])])
    assert "own.toml is kept already, of a file with other contents; rename the file, or" in capsys.readouterr().err
    assert (tmp_path / "own.toml.json").read_bytes() == before


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

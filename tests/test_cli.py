"""The command line as a user runs it. Bad input is in test_bad_input.py."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from gate import Arrival, Gate
from processes import LONG, parent_of, run_command, start, wait_for_end
from small_study import OVERRIDES, STUDY
from stores import results, study, write_study
from tombola import Planner, Store, Ticket, load_problem, load_study
from tombola.cli import find, main, trained
from tombola.cli.main import make_parser
from tombola.cli.options import warnings_as_notes
from tombola.engine.run import Status
from tombola.errors import UserError
from tombola.importance import IMPORTANCES, SCORES
from tombola.lottery import search
from tombola.study.chains import Chain, Progress, Waiting
from tombola.study.controls import KINDS
from tombola.study.schema import presets
from tombola.training.train import initial_state
from tombola.workbench import runs
from tombola.workbench.runs import count_workers

Completed = subprocess.CompletedProcess[str]
Here = Callable[..., str]

processes = pytest.mark.xdist_group("processes")  # the process that workers are copies of starts once
CONSOLE = [sys.executable, "-c", "from tombola.cli import main; raise SystemExit(main())"]


@pytest.fixture
def here(
    workers_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Here]:
    """A function that runs the command line in this process, in an empty folder, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget_modules() -> None:
        for module in ("mine", "mine_too", "other"):  # a user's own
            sys.modules.pop(module, None)

    def run(*arguments: str, status: int = 0) -> str:
        forget_modules()  # each command starts anew
        importlib.invalidate_caches()
        assert main(arguments) == status
        said = capsys.readouterr()
        return said.out if status == 0 else said.err

    yield run
    forget_modules()


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished store that may be changed, where the command line looks for it."""
    return Path(shutil.copytree(finished, tmp_path / "tombola-store"))


def list_trainings(said: str) -> list[str]:
    """The lines of a run's output that tell of trainings."""
    return [line for line in said.splitlines() if re.match(r"\[\d+/\d+\]", line)]


@pytest.mark.parametrize("flags", [[], ["-OO"]])
def test_help_needs_no_torch_and_no_docstrings(flags: list[str]) -> None:
    code = (
        "import sys; from tombola.cli import main\n"
        "try: main(['run', '--help-fields'])\n"
        "except SystemExit: print([name for name in ('torch', 'numpy', 'rich', 'sklearn') if name in sys.modules])"
    )
    command = [sys.executable, *flags, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LONG).stdout
    assert "--recipe.batch-size N" in said
    assert said.endswith("[]\n")


def test_options_have_the_names_that_the_library_has() -> None:
    """They stand twice, so that the help need not import the library."""
    parsed = make_parser().parse_args(["find", "digits"])
    assert tuple(search.STRATEGIES) == find._STRATEGIES
    assert parsed.strategy == search.DEFAULT
    assert tuple(KINDS) == trained._KINDS


def test_every_verb_is_in_the_help_and_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    groups = re.split(r"^(\S.*):$", text, flags=re.MULTILINE)
    verbs = [verb for lines in groups[2::2] for verb in re.findall(r"^  ([a-z]+) ", lines, re.MULTILINE)]
    assert {"init", "run", "plan", "results", "export", "importances", "presets", "store"} <= set(verbs)
    for verb in verbs:
        if verb == "tombola":  # an example
            continue
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        said = capsys.readouterr().out
        assert all(len(line) <= 80 for line in said.splitlines())
        assert "--recipe.lr" not in said
        if "--help-fields" in said:
            with pytest.raises(SystemExit, match="0"):
                main([verb, "--help-fields"])
            assert "--recipe.lr X" in capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_run_says_what_it_did_and_prints_its_results_in_plain_text(finished_run: tuple[Path, Completed]) -> None:
    _, run = finished_run
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout
    lines = list_trainings(run.stdout)
    assert [line.split("]")[0] for line in lines] == [f"[{number}/10" for number in range(1, 11)]
    dense = [line for line in lines if "level 0, density 100.00 %" in line]
    assert len(dense) == 2
    assert all("(magnitude, l1)" in line for line in dense)
    assert "test accuracy in % on digits, mean ± std over 2 seeds; best *\n" in run.stdout
    assert re.search(r"^    2     36\.00 +\d\d\.\d\d±\d+\.\d\d", run.stdout, re.MULTILINE)


def test_a_finished_study_trains_nothing_and_says_so(copied: Path, here: Here) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copied / "results").rglob("*")}
    said = here("run", *STUDY)
    assert list_trainings(said) == []
    assert "every training of this study is in tombola-store already; nothing was trained" in said
    assert {path: path.stat().st_mtime_ns for path in (copied / "results").rglob("*")} == before


def test_an_extended_study_trains_only_what_is_new(copied: Path, here: Here) -> None:
    before = {path.name for path in (copied / "results").glob("*/*")}
    wider = ["digits", "--levels", "3", "--recipe.epochs", "1", "--data-seeds", "--seeds", "0"]
    said = here("run", *wider, "--importances", "magnitude", "l1", "l2")
    assert len(list_trainings(said)) == 5  # level 3 of magnitude and l1, levels 1 to 3 of l2
    assert re.search(r"^5 trainings: about .+ s on 1 worker$", said, re.MULTILINE)
    assert not [line for line in list_trainings(said) if "level 0" in line]
    after = {path.name for path in (copied / "results").glob("*/*")}
    assert before < after
    assert len(after - before) == 5


def test_a_run_in_process_and_one_with_two_workers_give_the_same_bits(finished: Path, here: Here) -> None:
    here("run", *STUDY, "--seeds", "1")
    digests = {path.parent.name: path.read_bytes() for path in finished.glob("results/*/*/SHA256SUMS")}
    ours = {path.parent.name: path.read_bytes() for path in Path("tombola-store").glob("results/*/*/SHA256SUMS")}
    assert len(ours) == 5
    assert ours.items() <= digests.items()


def test_results_as_csv_and_json_say_the_same(copied: Path, here: Here) -> None:
    text = here("results", *STUDY, "--format", "csv")
    assert text.startswith("importance,seed,level,density,test_accuracy,")
    lines = list(csv.DictReader(io.StringIO(text)))
    documents = json.loads(here("results", *STUDY, "--format", "json"))
    assert len(lines) == len(documents) == 12
    for line, document in zip(lines, documents, strict=True):
        assert line["importance"] == document["importance"]
        for name in ("seed", "level", "alive"):
            assert int(line[name]) == document[name]
        for name in ("density", "test_accuracy", "test_loss", "train_loss"):
            assert float(line[name]) == document[name]
        assert (line["diverged"], line["collapsed"]) == ("false", "")
        assert (document["diverged"], document["collapsed"]) == (False, [])
        assert document["density"] == [1, 40160 / 50200, 32128 / 50200][document["level"]]


def test_results_of_an_unfinished_study_are_those_that_are_there(copied: Path, here: Here) -> None:
    said = here("results", *STUDY, "--levels", "3", "--seeds", "0", "1", "2", "--importances", "magnitude", "l2")
    assert re.search(r"^    1 +20\.00 +\d\d\.\d\d±\d+\.\d\d \(2 of 3\) +- *$", said, re.MULTILINE)
    assert said.endswith("the store has 8 of 24 tickets\n")


def test_a_damaged_result_is_said_to_be_and_done_again(copied: Path, here: Here) -> None:
    read = {path: json.loads(path.read_text()) for path in (copied / "results").glob("*/*/result.json")}
    dense = {each["identity"]["seed"]: path for path, each in read.items() if sum(each["alive"].values()) == 50_200}
    victim, document = dense[1].with_name("weights.safetensors"), dense[0]  # chains of both importances begin with them
    whole, text = victim.read_bytes(), document.read_text()
    os.truncate(victim, 100)
    document.write_text(text.replace("accuracy", "accurate"))
    for verb in (["results"], ["export", "--importance", "l1", "--seed", "0", "--level", "2", "-o", "t.safetensors"]):
        error = here(*verb[:1], *STUDY, *verb[1:], status=2)
        assert re.match(r"tombola: .*damaged .*`tombola run` .* removes it and repeats its training", error)
    said = here("run", *STUDY)
    assert len(list_trainings(said)) == 2
    assert victim.read_bytes() == whole
    assert document.read_text() == text


def test_plan_of_nothing_done_makes_no_store(here: Here) -> None:
    document = json.loads(here("plan", *STUDY, "--workers", "2", "--format", "json"))
    assert (document["existing"], document["to_train"], document["workers"]) == (0, 10, 2)
    assert document["seconds"] >= document["seconds_per_training"] * 5 > 0
    assert len(document["chains"]) == 4
    coverage = document["coverage"]
    assert 0 < coverage["counted"] < coverage["parameters"] == sum(part["parameters"] for part in coverage["parts"])
    assert not os.listdir()
    assert list_trainings(here("run", *STUDY, "--levels", "0", "--seeds", "0")) != []  # a plan is no hindrance to a run


def test_plan_says_what_exists_and_what_is_new(copied: Path, here: Here) -> None:
    document = json.loads(here("plan", *STUDY, "--levels", "3", "--format", "json"))
    assert (document["existing"], document["to_train"]) == (10, 4)
    text = here("plan", *STUDY, "--levels", "3")
    assert "4 trainings to do, 10 in tombola-store already\n" in text
    assert re.search(r"^l1 +1 +1 +3 +1$", text, re.MULTILINE)
    assert here("plan", *STUDY).endswith("all 10 trainings are in tombola-store: nothing is left to do\n")


def test_a_plans_disk_is_about_what_a_run_takes(copied: Path, here: Here) -> None:
    shutil.move(copied, "elsewhere")
    planned = json.loads(here("plan", *STUDY, "--format", "json"))["bytes"]
    taken = sum(path.stat().st_size for path in Path("elsewhere/results").rglob("*") if path.is_file())
    assert 0.7 < planned / taken < 1.5


@pytest.mark.parametrize("verb", ["results", "export"])
def test_verbs_that_read_make_no_store(verb: str, here: Here) -> None:
    more = ["--importance", "l1", "--seed", "0", "--level", "0", "-o", "t.safetensors"] if verb == "export" else []
    assert "tombola-store" in here(verb, *STUDY, *more, status=2)
    assert not os.listdir()


def test_an_exported_ticket_is_plain_safetensors(copied: Path, here: Here) -> None:
    chosen = ["--importance", "l1", "--seed", "1", "--level", "2"]
    here("export", *STUDY, *chosen, "-o", "plain.safetensors")
    here("export", *STUDY, *chosen, "-o", "t.safetensors", "--trained")
    parameters = [f"{layer}.{kind}" for layer in ("fc1", "fc2", "fc") for kind in ("weight", "bias")]
    weights = parameters[::2]
    tensors = safetensors.torch.load_file("t.safetensors")
    plain = safetensors.torch.load_file("plain.safetensors")
    assert set(plain) == {f"mask.{name}" for name in weights} | {f"rewind.{name}" for name in parameters}
    assert set(tensors) == set(plain) | {f"trained.{name}" for name in parameters}
    task = load_study("digits", OVERRIDES).task
    initial = initial_state(load_problem(task).build, 1)
    for name in parameters:
        alive = tensors.get(f"mask.{name}", torch.tensor(True))
        assert alive.dtype == torch.bool
        assert tensors[f"rewind.{name}"].equal(initial[name] * alive)
        assert (tensors[f"trained.{name}"] == 0)[~alive.expand_as(initial[name])].all()
        assert not tensors[f"trained.{name}"].equal(tensors[f"rewind.{name}"])
    assert sum(int(tensors[f"mask.{name}"].sum()) for name in weights) == 32128
    with safetensors.safe_open("t.safetensors", "pt") as file:
        about = json.loads(file.metadata()["tombola"])
    assert about["level"] == 2
    assert (about["provenance"]["importance"], about["provenance"]["seed"]) == ("l1", 1)
    assert about["provenance"]["study"]["task"]["dataset"] == "digits"
    row = [row for row in json.loads(here("results", *STUDY, "--format", "json")) if row["level"] == 2][-1]
    assert about["history"]["test_accuracy"] == row["test_accuracy"]
    assert Ticket.load(Path("t.safetensors")).mask.density == row["density"]


def test_importances_are_listed(here: Here) -> None:
    listed = list(dict.fromkeys([*IMPORTANCES, *SCORES]))
    assert [line.split()[0] for line in here("importances").splitlines()[3 : 3 + len(listed)]] == listed
    lines = list(csv.DictReader(io.StringIO(here("importances", "--format", "csv"))))
    assert [line["importance"] for line in lines] == listed
    assert lines[1]["description"].startswith("x / sum(x), in 0..1")
    assert json.loads(here("importances", "--format", "json"))[0]["importance"] == "magnitude"


def test_presets_are_listed(here: Here) -> None:
    assert [line.split()[0] for line in here("presets").splitlines()[2:]] == list(presets())
    listed = {line["preset"]: line for line in json.loads(here("presets", "--format", "json"))}
    assert (listed["digits"]["levels"], listed["digits"]["seeds"], listed["digits"]["importances"]) == (10, 2, 5)
    assert (listed["lenet-mnist"]["levels"], listed["lenet-mnist"]["seeds"]) == (24, 3)
    assert listed["lenet-mnist"]["description"].startswith("LeNet-300-100 on MNIST")


@pytest.mark.parametrize(
    "overrides",
    [
        ["--recipe.batch-size", "64", "--recipe.epochs", "1"],
        ["--recipe.batch_size=64", "--recipe.epochs=1"],
        ["--recipe.lr", ".1", "--recipe.epochs", "1"],
        ["--recipe.iterations", "22"],
        ["--task.model-arguments", "inputs=64", "--recipe.epochs", "1"],
        ["--device", "cpu", "--fraction", "0.2", "--exclude", "--recipe.epochs", "1"],
    ],
)
def test_an_override_names_the_same_study_in_every_form(overrides: list[str], copied: Path, here: Here) -> None:
    study = [word for word in STUDY if word not in ("--recipe.epochs", "1")]
    planned = json.loads(here("plan", *study, *overrides, "--format", "json"))
    assert planned["to_train"] == (10 if "--recipe.iterations" in overrides else 0)


def test_a_toml_file_and_overrides_name_the_same_study(copied: Path, here: Here) -> None:
    Path("study.toml").write_text(
        'importances = ["magnitude", "l1"]\nseeds = [0, 1]\nlevels = 2\nkeep_dense = ["fc"]\n'
        '[task]\ndataset = "digits"\nmodel = "lenet_300_100"\nmodel_arguments = { inputs = 64 }\n'
        "[recipe]\nbatch_size = 64\nepochs = 1\n"
    )
    assert here("results", "study.toml", "--format", "csv") == here("results", *STUDY, "--format", "csv")
    assert here("results", "./study.toml", "--format", "csv") == here("results", *STUDY, "--format", "csv")


@pytest.mark.parametrize(
    "overrides",
    [["--recipe.lr", "0.2"], ["--seeds", "2"], ["--recipe.batch-size", "32"], ["--task.model-arguments", "inputs=64",
     "classes=11"], ["--recipe.optimizer", "adam"], ["--task.dataset-arguments", "train_per_class=100"]],
)  # fmt: skip
def test_what_decides_bits_names_other_trainings(overrides: list[str], copied: Path, here: Here) -> None:
    assert json.loads(here("plan", *STUDY, "--levels", "0", *overrides, "--format", "json"))["existing"] == 0


MINE = """
import mine_too
import torch
from torch import nn
from tombola import Dataset

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.outer = nn.Linear(width, 3)

    def forward(self, x):
        return self.outer(mine_too.between(self.inner(x)))

def net(width=8):
    return Net(width)

def data(shift=0.0):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 4, generator=draw) + torch.nn.functional.one_hot(labels, 4) * 3 + shift
    return Dataset("mine", inputs[:45], labels[:45], inputs[45:], labels[45:], ("a", "b", "c"))

def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)

def cubed(w):
    return w**3
"""

MINE_TOML = """
importances = ["mine:cubed", "l1"]
seeds = [0]
levels = 1
[task]
dataset = "mine:data"
model = "mine:net"
loss = "mine:loss"
[recipe]
epochs = 1
batch_size = 9
"""


@pytest.fixture
def mine(here: Here) -> Here:
    """`here`, with a user's own model, data set, loss and importance, and a study of them that has run."""
    Path("mine.py").write_text(MINE)
    Path("mine_too.py").write_text("import torch\nbetween = torch.relu\n")
    Path("mine.toml").write_text(MINE_TOML)
    assert len(list_trainings(here("run", "mine.toml"))) == 3
    return here


def to_train(mine: Here, *arguments: str) -> int:
    return int(json.loads(mine("plan", *(arguments or ("mine.toml",)), "--format", "json"))["to_train"])


def test_a_users_own_code_is_found_in_this_folder(mine: Here) -> None:
    assert "mine:cubed" in mine("results", "mine.toml")
    assert to_train(mine) == 0


def test_a_users_own_code_is_found_beside_the_study(mine: Here, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("mine.py", "mine_too.py", "mine.toml"):
        shutil.move(name, tmp_path / "elsewhere" / name)
    assert to_train(mine, "elsewhere/mine.toml") == 0


def test_a_users_own_code_may_be_named_on_the_command_line(mine: Here) -> None:
    task = ["--task.dataset", "mine:data", "--task.model", "mine:net", "--task.loss", "mine:loss"]
    study = ["--task.model-arguments", "width=8", "--task.dataset-arguments", "shift=0.0", "--importances=mine:cubed"]
    length = ["--levels", "1", "--recipe.epochs", "1", "--recipe.batch-size", "9", "--seeds", "0", "--data-seeds"]
    assert len(list_trainings(mine("run", "digits", *task, *study, *length))) == 2  # arguments are a part of the name


@pytest.mark.parametrize(
    ("file", "old", "new", "count"),
    [
        ("mine.py", "self.outer(mine_too", "0.5 * self.outer(mine_too", 3),  # the model's forward
        ("mine_too.py", "torch.relu", "torch.tanh", 3),  # what it imports
        ("mine.py", "* 3 + shift", "* 2 + shift", 3),  # the data
        ("mine.py", "cross_entropy(outputs", "cross_entropy(2 * outputs", 3),  # the loss
        ("mine.toml", 'net"', 'net"\nmodel_arguments = { width = 9 }', 3),
        ("mine.toml", 'data"', 'data"\ndataset_arguments = { shift = 1.0 }', 3),
        ("mine.toml", "levels = 1", "levels = 2", 2),
        ("mine.toml", "levels = 1", "levels = 1\nexclude = ['outer']", 3),
    ],
)
def test_an_edit_trains_what_it_changes(file: str, old: str, new: str, count: int, mine: Here) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))
    assert to_train(mine) == count


def test_a_users_code_that_fails_while_training_is_told_with_its_line(mine: Here) -> None:
    wrong = "def loss(outputs, labels):\n    global calls\n    calls += 1\n    assert calls < 99, 'too many'\n"
    Path("mine.py").write_text("calls = 0\n" + MINE.replace("def loss(outputs, labels):\n", wrong))
    line = Path("mine.py").read_text().splitlines().index("    assert calls < 99, 'too many'") + 1
    error = mine("run", "mine.toml", "--recipe.epochs", "30", status=2)
    assert re.search(rf"level 0 failed: AssertionError: too many \(in .*mine\.py, line {line}\)$", error.strip())
    assert error.count("\n") == 1


def test_an_edited_importance_is_applied_again(mine: Here) -> None:
    # In a module of its own: the study's model and loss stay as they are.
    Path("other.py").write_text("def ranked(w):\n    return -w\n")
    Path("mine.toml").write_text(MINE_TOML.replace('"mine:cubed"', '"other:ranked"'))
    assert to_train(mine) == 1
    mine("run", "mine.toml")
    assert to_train(mine) == 0
    Path("other.py").write_text("def ranked(w):\n    return w.max() - w\n")
    assert to_train(mine) == 1


def test_a_users_modules_come_after_pythons_own_and_before_installed_ones(here: Here) -> None:
    here("results", *STUDY, status=2)
    place = sys.path.index(os.getcwd())
    assert place > sys.path.index(str(Path(os.__file__).parent))  # a random.py in the folder is no hindrance
    assert place < sys.path.index(str(Path(torch.__file__).parents[1]))


def test_a_training_that_diverges_ends_its_chain_and_the_study_goes_on(here: Here) -> None:
    study = [*STUDY, "--seeds", "0"]
    said = here("run", *study, "--recipe.lr", "1e30")
    assert "diverged (magnitude, l1)" in said
    assert "diverged, l1: level 0 (1 of 1 seeds); these chains end there" in said
    assert list_trainings(here("run", *study, "--recipe.lr", "1e30")) == []
    lines = list(csv.DictReader(io.StringIO(here("results", *study, "--recipe.lr", "1e30", "--format", "csv"))))
    assert [(line["level"], line["test_accuracy"], line["diverged"]) for line in lines] == [("0", "", "true")] * 2


def test_an_importance_that_fails_later_ends_its_chain_and_the_study_goes_on(here: Here) -> None:
    Path("mine.py").write_text(
        "def late(w):\n    if 15_000 < len(w) < 19_200:\n        raise RuntimeError('not this')\n    return w\n"
    )
    study = [*STUDY, "--seeds", "0", "--importances", "mine:late", "l1"]
    error = here("run", *study, status=2)
    assert re.search(r"mine:late, seed 0: .*'fc1.weight': it raised RuntimeError: not this", error)
    assert error.count("\n") == 1
    lines = list(csv.DictReader(io.StringIO(here("results", *study, "--format", "csv"))))
    assert [line["level"] for line in lines if line["importance"] == "l1"] == ["0", "1", "2"]
    assert [line["level"] for line in lines if line["importance"] == "mine:late"] == ["0", "1"]


def test_collapsed_layers_are_said(here: Here) -> None:
    Path("mine.py").write_text("def back_first(w):\n    return w * 0 + len(w)\n")  # small layers go first
    study = [*STUDY, "--seeds", "0", "--importances", "mine:back_first", "l1", "--fraction", "0.1", "--keep-dense"]
    said = here("run", *study, "--levels", "1")
    assert "collapsed layers, mine:back_first: fc.weight from level 1\n" in said
    rows = json.loads(here("results", *study, "--levels", "1", "--format", "json"))
    assert [row["collapsed"] for row in rows] == [[], ["fc.weight"], [], []]


def test_a_reader_that_goes_away_is_no_error() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for verb in (["presets"], ["presets", "--format", "json"]):
        read, write = os.pipe()
        os.close(read)
        said = subprocess.run(
            [*CONSOLE, *verb], env=buffered, stdout=write, stderr=subprocess.PIPE, check=False, timeout=LONG
        )
        os.close(write)
        assert (said.returncode, said.stderr) == (141, b"")


@processes
def test_ctrl_c_stops_at_once_says_how_to_go_on_and_keeps_what_is_done(tmp_path: Path) -> None:
    """It waits for no training: those that are under way would never end. What workers are copies of ends as well."""
    gate = Gate()
    of = gate.before(study(seeds=(0, 1)))
    command = [*write_study(tmp_path, of), "--workers", "2"]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    with gate.opened(), start(command, cwd=tmp_path, **how) as process:
        held: list[Arrival] = []
        while len(held) < 2:
            arrival = gate.next()
            if arrival.iteration == 20:  # of level 0: two rewind points are done
                held.append(arrival)
            else:
                arrival.go()
        server = parent_of(held[0].pid)
        assert server != process.pid
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, error = process.communicate(timeout=LONG)
        wait_for_end(server, *(arrival.pid for arrival in held))
        for arrival in held:
            arrival.go()
    assert process.returncode == 130
    assert (
        error == f"\ntombola: stopped; finished trainings are kept, continue with: tombola {shlex.join(command[1:])}\n"
    )
    assert len(results(tmp_path / "tombola-store")) == 2


# On a terminal


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def plain(self) -> str:
        """Without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())

    @property
    def width(self) -> int:
        """Of the longest line that was written."""
        return max(len(line) for line in re.split(r"[\r\n]+", self.plain))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 24 lines of 80."""
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    return Terminal()


def display(terminal: Terminal, planner: Planner, status: Status) -> str:
    """Return what a run's display shows last, where the run is so far."""
    from tombola.workbench.progress import show_progress

    terminal.seek(0)
    terminal.truncate()
    with contextlib.redirect_stdout(terminal), show_progress(planner, 2) as show:
        show(status, None)
    return terminal.plain


def test_a_run_is_live_on_a_terminal_and_fits_80_columns(finished: Path, terminal: Terminal) -> None:
    """Where nothing is done; where one chain waits for a training that is half done; and where all is done."""
    overrides = OVERRIDES | {"importances": ["magnitude", "min_max"], "data_seeds": [100]}
    of = load_study("digits", overrides)
    planner = Planner(of, load_problem(of.task), Store(finished))
    chains = {chain: planner.progress(chain) for chain in [*planner.chains, *planner.repeats]}
    waits_for = chains[Chain(0, "min_max")].waits_for
    assert waits_for is not None

    begun = display(
        terminal, planner, Status(8, chains={chain: Progress((), (), Waiting(waits_for, 3, 1)) for chain in chains})
    )
    assert "0 of 8 trainings" in begun
    assert re.search(r"^ *min_max +0 +- +- *\r?$", begun, re.MULTILINE)
    assert "training" not in begun.partition("trainings")[2]
    half = display(
        terminal, planner, Status(8, 3, chains, {waits_for.key: (waits_for, waits_for.end // 2)}, seconds_left=75.0)
    )
    assert "3 of 8 trainings" in half
    assert "1 min 15 s left" in half
    assert re.search(r"^ *magnitude +0 +2 of 2 +accuracy \d\d\.\d\d % *\r?$", half, re.MULTILINE)
    assert re.search(r"^ *magnitude, order 100 +0 +- +- *\r?$", half, re.MULTILINE)
    assert re.search(r"^ *min_max +0 +0 of 2 +accuracy \d\d\.\d\d % +training: \d+ % *\r?$", half, re.MULTILINE)
    assert terminal.width <= 80


def test_chains_at_work_are_shown_where_a_terminal_has_too_few_lines(
    finished: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", "7")  # of which two are for chains
    of = load_study("digits", OVERRIDES | {"importances": ["magnitude", "l1", "l2", "lamp"]})
    planner = Planner(of, load_problem(of.task), Store(finished))
    chains = {chain: planner.progress(chain) for chain in planner.chains}
    waits_for = chains[Chain(1, "lamp")].waits_for
    assert waits_for is not None
    text = display(terminal, planner, Status(9, 1, chains, {waits_for.key: (waits_for, waits_for.begin)}))
    assert len(re.findall(r" of 2 ", text)) == 2
    assert re.search(r"^ *lamp +1 .*training: 0 % *\r?$", text, re.MULTILINE)


def test_a_run_on_a_terminal_ends_with_its_results(
    workers_here: None, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(terminal):
        assert main(["run", *STUDY, "--levels", "1", "--seeds", "0", "1"]) == 0
    assert "6 of 6 trainings" in terminal.plain
    assert "test accuracy in % on digits, mean ± std over 2 seeds; best bold" in terminal.plain
    assert re.search(r"\x1b\[1m *\d\d\.\d\d±\d+\.\d\d\x1b\[0m", terminal.getvalue())  # the best, in bold
    assert "*" not in terminal.plain
    assert terminal.width <= 80


def test_a_table_too_wide_for_a_terminal_is_printed_in_parts(finished: Path, terminal: Terminal) -> None:
    names = ["magnitude", "l1", "l2", "softmax", "min_max", "lamp", "random"]
    with contextlib.redirect_stdout(terminal):
        assert main(["results", *STUDY, "--importances", *names, "--store", str(finished)]) == 0
    assert terminal.width <= 80
    assert terminal.plain.count("level  sparsity") == 2
    assert all(name in terminal.plain for name in names)


def test_trainings_at_once_are_one_per_core_and_one_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "count_cores", lambda: 6)
    for given, device, expected in ((None, "cpu", 6), (None, "cuda", 1), (3, "cpu", 3), (3, "cuda", 3)):
        assert count_workers(given, device) == expected


@processes
def test_what_a_users_code_prints_is_not_in_csv_or_json(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import torch\nfrom torch import nn\nprint('module')\n"
        "class Loud(nn.Sequential):\n    def forward(self, x):\n"
        "        print('forward')\n        return super().forward(x)\n"
        "def network():\n    print('network')\n"
        "    return Loud(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
        "def importance(w):\n    print('importance')\n    return w\n"
    )
    (tmp_path / "s.toml").write_text(
        'importances = ["loud:importance", "l1"]\nseeds = [0]\nlevels = 1\n'
        'task = { dataset = "digits", model = "loud:network" }\n'
        "recipe = { iterations = 3, batch_size = 16 }\n"
    )
    run = run_command(tmp_path, ["tombola", "run", "s.toml"])
    assert run.returncode == 0, run.stderr
    for verb in ("plan", "functions", "verify"):
        done = run_command(tmp_path, ["tombola", verb, "s.toml", "--format", "json"])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
        assert "module" in done.stderr


def test_notes_are_printed_also_when_the_verb_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with warnings_as_notes(Warning):
            warnings.warn("a word", UserWarning, stacklevel=1)
            raise UserError("the end")

    with pytest.raises(UserError):
        fail()
    assert capsys.readouterr().err == "note: a word\n"

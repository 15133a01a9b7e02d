"""Bad input: each mistake gives one clear sentence and exit status 2, before any training, and nothing is lost."""

# ruff: noqa: E501 (the sentences stand in tables, one a line)

from __future__ import annotations

import gzip
import itertools
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from small_study import STUDY
from tombola.cli import main
from tombola.errors import UserError

Refused = Callable[..., str]

GOOD = """
importances = ["l1"]
seeds = [0]
levels = 1
[task]
dataset = "digits"
model = "lenet_300_100"
model_arguments = { inputs = 64 }
[recipe]
epochs = 1
"""


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that runs the command line in an empty folder, which must refuse, and returns the sentence."""

    def no_worker(*_: object) -> None:
        raise AssertionError("a training was about to begin")

    monkeypatch.setattr("tombola.engine.local.LocalWorkers.__init__", no_worker)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone after the test, with what the command line adds to the path

    def run(*arguments: str) -> str:
        before = set(os.listdir())
        assert main(arguments) == 2
        assert set(os.listdir()) - before <= {"__pycache__"}  # no store was begun
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("tombola: ")
        assert said.err.count("\n") == 1
        assert said.err.endswith("\n")
        return said.err.removeprefix("tombola: ").removesuffix("\n")

    return run


def study(old: str = "", new: str = "") -> str:
    """Write the good study with one change; return its name."""
    assert old in GOOD
    Path("study.toml").write_text(GOOD.replace(old, new) if old else new)
    return "study.toml"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("levels = 1", "levels = 1\nlevel = 2", "study study.toml: unknown field 'level'; did you mean 'levels'?"),
        ("epochs = 1", "epochs = 1\nbatchsize = 2", "study study.toml: unknown field 'recipe.batchsize'; did you mean 'batch_size'?"),
        ("[recipe]", "[recip]", "study study.toml: unknown field 'recip'; did you mean 'recipe'?; the field 'recipe' is missing"),
        ("levels = 1", "levels = 'x'", "study study.toml: levels: expected a whole number, got 'x'"),
        ("levels = 1", "levels = -1", "study study.toml: levels: expected a number from 0, got -1"),
        ("levels = 1", "levels = 1.5", "study study.toml: levels: expected a whole number, got 1.5"),
        ("levels = 1", "levels = true", "study study.toml: levels: expected a whole number, got true"),
        ("levels = 1", "", "study study.toml: the field 'levels' is missing"),
        ("levels = 1", "fraction = 1.0\nlevels = 1", "study study.toml: fraction: expected a number below 1, got 1.0"),
        ("levels = 1", "fraction = 0\nlevels = 1", "study study.toml: fraction: expected a number above 0, got 0"),
        ("levels = 1", "fraction = nan\nlevels = 1", "study study.toml: fraction: expected a finite number, got nan"),
        ("levels = 1", "levels =", "study.toml: is not valid TOML: Invalid value (at line 4, column 9)"),
        ("levels = 1", "device = 'gpu'\nlevels = 1", "study study.toml: device: unknown 'gpu'; did you mean 'cpu'?"),
        ('["l1"]', '"l1"', "study study.toml: importances: expected a list, got 'l1'"),
        ('["l1"]', '["l1", 3]', "study study.toml: importances.1: expected a text, got 3"),
        ('["l1"]', "[]", "study study.toml: importances: at least one is needed"),
        ('["l1"]', '["l1", "l1"]', "study study.toml: importances: 'l1' is named more than once"),
        ("[0]", "[0, -1]", "study study.toml: seeds.1: expected a number from 0, got -1"),
        ("epochs = 1", "epochs = 1\nlr = 'a'", "study study.toml: recipe.lr: expected a number, got 'a'"),
        ("epochs = 1", "epochs = 1\nlr = 0.0", "study study.toml: recipe.lr: expected a number above 0, got 0.0"),
        ("epochs = 1", "epochs = 1\noptimizer = 'sdg'", "study study.toml: recipe.optimizer: unknown 'sdg'; did you mean 'sgd'?"),
        ("epochs = 1", "", "study study.toml: recipe: give exactly one of epochs and iterations"),
        ("epochs = 1", "epochs = 1\naugmentation = 3", "study study.toml: recipe.augmentation: expected a table, got 3"),
        ("levels = 1", "zq1 = 1\nzq2 = 1\nzq3 = 1\nzq4 = 1\nzq5 = 1\nlevels = 1", "study study.toml: unknown field 'zq1'; choose from 'task', 'recipe', 'importances', 'seeds', 'levels', 'fraction', 'data_seeds', 'data_seeds_for', 'prune', 'exclude', 'keep_dense', 'selection', 'shares', 'score_at', 'score_examples', 'device', 'kernels'; unknown field 'zq2'; unknown field 'zq3'; unknown field 'zq4'; and more"),
        ("[recipe]", "dataset_arguments = { a = { b = 1 } }\n[recipe]", "study study.toml: task.dataset_arguments.a: expected true or false, a whole number, a number, a text or a list"),
        (GOOD, "recipe = 3", "study study.toml: recipe: expected a table, got 3; the fields 'task', 'importances', 'seeds', 'levels' are missing"),
    ],
)  # fmt: skip
def test_a_study_with_a_mistake(old: str, new: str, sentence: str, refused: Refused) -> None:
    assert refused("run", study(old, new)) == sentence


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('["l1"]', '["magnitud"]', "importances: unknown importance 'magnitud'; did you mean 'magnitude'?"),
        ('["l1"]', '["L1"]', "importances: unknown importance 'L1'; did you mean 'l1'?"),
        ('["l1"]', '["norm"]', "choose from 'magnitude', 'l1', 'l2', 'softmax', 'min_max', 'lamp', 'rank', 'random', 'movement', 'initial', 'taylor'"),
        ('["l1"]', '["nowhere:f"]', "importance 'nowhere:f': there is no module 'nowhere' here or on Python's path"),
        ('["l1"]', '["math:sqrtt"]', "has no function 'sqrtt'; did you mean 'sqrt', 'isqrt'?"),
        ('["l1"]', '["math:"]', "importance 'math:': expected module:function, such as my_module:my_function"),
        ('"digits"', '"digit"', "there is no data set 'digit': did you mean 'digits'?"),
        ('"lenet_300_100"', '"lenet"', "task.model: unknown model 'lenet'; did you mean 'lenet_300_100'?"),
        ("inputs =", "input =", "task.model 'lenet_300_100': got an unexpected keyword argument 'input'; it takes inputs, classes"),
        ("[recipe]", "depends = ['']\n[recipe]", "task.depends: '' names nothing; expected a file, a folder, env:NAME"),
        ("[recipe]", "depends = ['env:']\n[recipe]", "task.depends: 'env:' names nothing; expected a file, a folder, env:NAME"),
        ("[recipe]", "checkpoint = '/dev/zero'\n[recipe]", "task.checkpoint '/dev/zero': cannot be read: it is not a regular file"),
        ("[recipe]", 'checkpoint = "a\\u0000b"\n[recipe]', "task.checkpoint 'a\\x00b': cannot be read: embedded null byte"),
        ("inputs = 64", "inputs = 65", "task.model 'lenet_300_100': on inputs of shape (2, 1, 8, 8) from 'digits' it raised RuntimeError"),
        ("inputs = 64", "inputs = 'x'", "inputs: expected a whole number from 1 to 1000000000, got 'x'"),
        ("inputs = 64", "inputs = 0", "inputs: expected a whole number from 1 to 1000000000, got 0"),
        ("inputs = 64", "inputs = 64.0", "inputs: expected a whole number from 1 to 1000000000, got 64.0"),
        ("inputs = 64", "inputs = true", "inputs: expected a whole number from 1 to 1000000000, got True"),
        ("inputs = 64", "inputs = 1_000_000_000_000", "inputs: expected a whole number from 1 to 1000000000, got 1000000000000"),
        ("inputs = 64", f"inputs = 0x{'f' * 4000}", "inputs: expected a whole number from 1 to 1000000000, got a number of more than"),
        ("inputs = 64", "inputs = 1_000_000_000", "task.model 'lenet_300_100': its 300000031410 parameters need about 4800 GB of memory"),
        ("inputs = 64", "classes = -1", "classes: expected a whole number from 1 to 1000000000, got -1"),
        ('"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"vgg16"\nmodel_arguments = { width = 65536 }', "task.model 'vgg16': its"),
        ('"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"resnet18"\nmodel_arguments = { width = 65536 }', "GB of memory in a training, this machine has"),
        ('"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"resnet20"\nmodel_arguments = { width = 0 }', "width: expected a whole number from 1 to 1000000000, got 0"),
        ("epochs = 1", "epochs = 1\naugmentation = { crop = 9 }", "recipe.augmentation.crop: 9 is more than the 8 pixels of a side of the images of 'digits'"),
        ("epochs = 1", "epochs = 1\naugmentation = { crop = 1_000_000_000_000 }", "crop: 1000000000000 is more than the 8 pixels"),
        ("[recipe]", "dataset_arguments = { train_per_class = 100_000_000_000_000_000_000 }\n[recipe]", "train_per_class = 100000000000000000000 asks for more examples than there are"),
        ("[recipe]", "dataset_arguments = { test_per_class = 0 }\n[recipe]", "test_per_class: expected a whole number from 1, got 0"),
        ("inputs = 64", "inputs = 64, classes = 5", "should give outputs of shape (2, 10), one number for each of the 10 classes, got shape (2, 5)"),
        ("levels = 1", "levels = 100", "levels: 100 are too many"),
        ("levels = 1", "levels = 100", "at most 45 levels are possible"),
        ("levels = 1", "exclude = ['fc9']\nlevels = 1", "exclude: 'fc9' is no prunable layer; did you mean 'fc'"),
        ("levels = 1", "exclude = ['fc1', 'fc2', 'fc']\nlevels = 1", "has no linear, convolution, recurrent or attention weight to prune besides those excluded"),
        ("epochs = 1", "epochs = 1\nrewind = 22", "recipe.rewind: iteration 22 is not within the training, which has 11"),
        ("epochs = 1", "epochs = 1\nrewind = 11", "recipe.rewind: iteration 11 is not within the training, which has 11"),
        ("epochs = 1", "epochs = 1\nbatch_size = 1353", "recipe.batch_size: 1353 is more than the 1352 training examples of 'digits'"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be(old: str, new: str, sentence: str, refused: Refused) -> None:
    assert sentence in refused("run", study(old, new))


def test_mistakes_on_the_command_line(refused: Refused) -> None:
    assert refused() == "VERB is missing (see tombola --help)"
    assert refused("rnu", "digits") == "unknown verb 'rnu'; did you mean 'run'? (see tombola --help)"
    assert refused("run", "") == "study: expected a path, got an empty text"
    assert refused("run", "digit") == "study 'digit' is neither a preset nor a .toml file; did you mean 'digits'?"
    assert refused("run", "gone.toml") == "gone.toml: cannot be read: No such file or directory"
    assert "STUDY is missing, it comes first, before the options" in refused("run", "--seeds", "0", "digits")
    assert "unknown option '--leves'; did you mean '--levels'" in refused("run", "digits", "--leves", "3")
    assert "unknown option '--recipe.epoch'; did you mean '--recipe.epochs'" in refused(
        "run", "digits", "--recipe.epoch=3"
    )
    assert refused("plan", "digits", "extra") == "unexpected argument 'extra' (see tombola plan --help)"
    assert refused("run", "digits", "--levels", "many") == "study digits: levels: expected a whole number, got 'many'"
    assert "--store: expected a path, got an empty text" in refused("run", "digits", "--store", "")
    assert "--workers: expected a whole number from 1 to 10000, got '0'" in refused("run", "digits", "--workers", "0")
    assert "unknown --format 'yaml'; choose from 'table', 'csv', 'json'" in refused(
        "results", "digits", "--format", "yaml"
    )
    assert "--task.model-arguments: expected NAME=VALUE, got 'inputs'" in refused(
        "run", "digits", "--task.model-arguments", "inputs"
    )
    assert "-o/--output are missing" in refused("export", "digits")
    assert refused("run", "digits", "--per-gpu", "2") == "--per-gpu is for --engine ray"
    assert refused("run", "digits", "--address", "here:1") == "--address is for --engine ray"
    assert refused("run", "digits", "--log-epochs") == "--log-epochs is for --log WRITER=PLACE, which is missing"
    assert refused("find", "digits", "-o", "a.svg", "--picture", "a.svg") == (
        "--picture a.svg: the ticket would be written there too; name another file"
    )
    assert "written there too" in refused("find", "digits", "-o", "a.svg", "--picture", f"../{Path.cwd().name}/a.svg")
    assert refused("run", "digits", "--store", "y/" * 2000).endswith(
        "the folder cannot be made: it is in too many others"
    )
    assert len(refused("run", "x" * 5000)) < 500


def test_no_gpu(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch finds no GPU here" in refused("run", "digits", "--device", "cuda")


modules = (f"of_a_user_{number}" for number in itertools.count())


def own(code: str, old: str, new: str) -> tuple[str, str]:
    """Write a user's module and the good study with it in place of something; return the module's and study's name."""
    module = next(modules)
    Path(f"{module}.py").write_text(f"import torch, tombola\nfrom torch import nn\n{code}\n")
    return module, study(old, new.replace("MODULE", module))


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def f(w): return w[1:]", "importance '{module}:f', layer 'fc1.weight': expected a tensor of shape (19200,), one number per survivor, got shape (19199,)"),
        ("def f(w): return w.tolist()", "expected a tensor of shape (19200,), one number per survivor, got list"),
        ("def f(w): return w / 0 * 0", "importance '{module}:f', layer 'fc1.weight': it returned NaN"),
        ("def f(w): raise RuntimeError('not\\nthis')", "it raised RuntimeError: not this (in {path}, line 3)"),
        ("def f(w, more): return w", "it raised TypeError: f() missing 1 required positional argument: 'more'"),
        ("def g(w): return w", "module '{module}' ({path}) has no function 'f'"),
        ("1 / 0", "importing '{module}' raised ZeroDivisionError: division by zero (in {path}, line 3)"),
        ("import nowhere", "importing '{module}' raised ModuleNotFoundError: No module named 'nowhere' (in {path}, line 3)"),
        ("raise SystemExit('usage')", "importing '{module}' raised SystemExit: usage (in {path}, line 3)"),
        ("def f(:", "importing '{module}' raised SyntaxError: invalid syntax ({module}.py, line 3)"),
    ],
)  # fmt: skip
def test_a_users_importance_that_fails(verb: str, code: str, sentence: str, refused: Refused, tmp_path: Path) -> None:
    module, name = own(code, '"l1"', '"MODULE:f"')
    assert sentence.format(module=module, path=tmp_path / f"{module}.py") in refused(verb, name)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def f(): return 3", "task.model '{module}:f': expected a torch module, got int"),
        ("def f(width): return 3", "task.model '{module}:f' raised TypeError: f() missing 1 required positional argument"),
        ("def f(): raise KeyError('q')", "task.model '{module}:f' raised KeyError: 'q' (in {path}, line 3)"),
        ("def f(): return nn.Flatten()", "Flatten has no linear, convolution, recurrent or attention weight to prune"),
        ("def f(): return nn.Linear(8, 10)", "for inputs of shape (2, 1, 8, 8) from 'digits' it should give outputs of shape (2, 10)"),
        ("def f(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))", "task.model '{module}:f': '1.weight' of its state is lazy"),
        ("SAME = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\ndef f(): return SAME", "task.model '{module}:f': it gives the same '1.weight' each time; build a new model in each call"),
        ("def f(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LSTM(10, 10))", "expected a tensor, got tuple"),
        ("class F(nn.Module):\n  def __init__(self): pass\ndef f(): return F()", "task.model '{module}:f' raised AttributeError: 'F' object has no attribute '_modules'"),
        ("def f():\n  m = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n  m._modules['a.b'] = nn.Linear(2, 2)\n  return m",
         "task.model '{module}:f': torch does not find its layer 'a.b' by this name; add layers as attributes"),
        ("class F(nn.Linear):\n  def forward(self, x): return torch.nested.nested_tensor(list(x.flatten(1)))\ndef f(): return F(64, 10)",
         "from 'digits': expected a dense tensor with values, got one that is nested"),
        ("class F(nn.Linear):\n  def forward(self, x):\n    T = type('T', (torch.Tensor,), {})\n    return super().forward(x.flatten(1)).as_subclass(T)\n"
         "def f(): return F(64, 10)", "task.model '{module}:f' raised TypeError: Multiple dispatch failed"),
        ("class F(nn.Linear):\n  def forward(self, x):\n    if not self.training: raise OSError('not now')\n"
         "    return super().forward(x.flatten(1))\ndef f(): return F(64, 10)", "it raised OSError: not now (in {path}, line 5)"),
        ("def f():\n  m = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n  m[1].weight.data[0, 0] = float('nan')\n  return m",
         "task.model '{module}:f': its initial '1.weight' is not finite (NaN or infinite)"),
        ("def f():\n  m = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n  m[1].bias.data[0] = float('inf')\n  return m",
         "task.model '{module}:f': its initial '1.bias' is not finite (NaN or infinite)"),
    ],
)  # fmt: skip
def test_a_users_model_that_fails(code: str, sentence: str, refused: Refused, tmp_path: Path) -> None:
    module, name = own(code, '"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"MODULE:f"')
    assert sentence.format(module=module, path=tmp_path / f"{module}.py") in refused("run", name)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def f(): return 3", "task.dataset '{module}:f': expected a tombola.Dataset, or a function (seed, epoch, split) that gives batches, got"),
        ("def f(): raise OSError('gone')", "task.dataset '{module}:f' raised OSError: gone (in {path}, line 3)"),
        ("def f(folder): return 3", "task.dataset '{module}:f': missing a required argument: 'folder'; it takes folder"),
        ("def f():\n  x, y = torch.zeros(4, 64), torch.tensor([0, 1, 2, 9])\n"
         "  return tombola.Dataset('own', x, y, x, y, ('a', 'b', 'c'))",
         "data set 'own', train set: label 9 of example 3 is out of range, expected 0..2 for 3 classes"),
        ("def f():\n  x, y = torch.zeros(4, 64), torch.zeros(4)\n  return tombola.Dataset('own', x, y, x, y, ('a',))",
         "data set 'own', train set: expected int64 labels of shape (4,), one per input, got torch.float32"),
        ("def f():\n  x, y = torch.zeros(4, 64), torch.zeros(4).long()\n  z = x / 0\n"
         "  return tombola.Dataset('own', x, y, z, y, ('a',))",
         "data set 'own', test set: 4 of 4 examples have inputs that are NaN or infinite, the first is example 0: remove"),
        ("def f():\n  x, y = torch.zeros(4, 64, requires_grad=True), torch.zeros(4).long()\n"
         "  return tombola.Dataset('own', x, y, x, y, ('a',))",
         "data set 'own', train set: its inputs require gradients: give tensor.detach()"),
    ],
)  # fmt: skip
def test_a_users_data_that_fail(code: str, sentence: str, refused: Refused, tmp_path: Path) -> None:
    module, name = own(code, '"digits"', '"MODULE:f"')
    assert sentence.format(module=module, path=tmp_path / f"{module}.py") in refused("run", name)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def f(o, l): return 1.0", "task.loss '{module}:f': expected one number, the mean over the batch, got float"),
        ("def f(o, l): return o", "expected one number, the mean over the batch, got a tensor of shape (2, 10)"),
        ("def f(o): return o.sum()", "task.loss '{module}:f' raised TypeError: f() takes 1 positional argument but 2"),
        (
            "def f(o, l): return torch.tensor(1.0)",
            "the loss does not depend on any parameter that is trained (requires_grad)",
        ),
        (
            "def f(o, l): return o.sum() / 0 * 0",
            "task.loss '{module}:f': at the first step, with the initial weights of 'lenet_300_100', "
            "the loss is NaN or infinite: every training would diverge",
        ),
        ("def f(o, l): return (o.sum() * 0 - 1).log()", "the loss is NaN or infinite: every training would diverge"),
        (
            "def f(o, l): return (o * 0).norm(dim=1).sqrt().mean()",
            "with the initial weights of 'lenet_300_100', the gradient of 'fc1.weight' is NaN or infinite",
        ),
    ],
)
def test_a_users_loss_that_fails(code: str, sentence: str, refused: Refused) -> None:
    module, name = own(code, "[task]", '[task]\nloss = "MODULE:f"')
    assert sentence.format(module=module) in refused("run", name)


@pytest.mark.parametrize(
    ("code", "field", "sentence"),
    [
        (
            "def f(iteration, end): return None",
            "[recipe]\nschedule",
            "recipe.schedule 'MODULE:f': expected a finite number from 0, got None at",
        ),
        (
            "def f(iteration, end): return 10 ** 400",
            "[recipe]\nschedule",
            "recipe.schedule 'MODULE:f': expected a finite number from 0, got 1000",
        ),
        (
            "def f(o, l): return '1'\nf.higher_is_better = True",
            "[task]\nmetrics",
            "task.metrics 'f': expected one number, got '1'",
        ),
        (
            "def f(o, l): return 10 ** 400\nf.higher_is_better = True",
            "[task]\nmetrics",
            "task.metrics 'f': expected one number, got 1000",
        ),
    ],
)
def test_a_function_that_gives_no_number(code: str, field: str, sentence: str, refused: Refused) -> None:
    table = field.partition("\n")[0]
    value = '["MODULE:f"]' if "metrics" in field else '"MODULE:f"'
    module, name = own(code, table, f"{field} = {value}")
    assert sentence.replace("MODULE", module) in refused("run", name)


def test_a_model_whose_outputs_are_not_finite(refused: Refused) -> None:
    code = "class F(nn.Module):\n  def __init__(self):\n    super().__init__()\n    self.fc = nn.Linear(64, 10)\n"
    code += "  def forward(self, x): return self.fc(x.flatten(1)) / 0\n"
    _, name = own(code, '"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"MODULE:F"')
    assert "the loss is NaN or infinite, as are outputs of the model: every training" in refused("run", name)


def test_a_model_whose_outputs_are_nan_in_evaluation(refused: Refused) -> None:
    code = "class F(nn.Module):\n  def __init__(self):\n    super().__init__()\n    self.fc = nn.Linear(64, 10)\n"
    code += "  def forward(self, x): return self.fc(x.flatten(1)) + (0 if self.training else float('nan'))\n"
    module, name = own(code, '"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"MODULE:F"')
    said = f"task.model '{module}:F': in evaluation mode, its outputs on the test set are NaN"
    assert refused("run", name) == said


def test_a_last_batch_too_small_for_the_model(refused: Refused) -> None:
    code = "def f(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))"
    _, name = own(code, '"lenet_300_100"\nmodel_arguments = { inputs = 64 }', '"MODULE:f"')
    # 1352 examples are 7 batches of 193 and one example
    assert (
        "recipe.batch_size: batches of 193 of the 1352 training examples of 'digits' leave a last batch of one example"
        in refused("run", name, "--recipe.batch-size", "193")
    )


def idx(array_type: int, shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, array_type, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with four small, sound files of MNIST's format."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 20), ("t10k", 10)):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(8, (count, 28, 28), bytes(784 * count)))
        labels = bytes(number % 10 for number in range(count))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(8, (count,), labels), mtime=0))
    return folder


def run_mnist(refused: Refused, mnist: Path) -> str:
    return refused("run", "lenet-mnist", "--data", str(mnist), "--recipe.batch-size", "10")


def test_missing_data_files(refused: Refused, mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> Path:
        raise UserError("the network is out of reach")

    monkeypatch.setattr("tombola.datasets.idx.download", no_network)
    (mnist / "t10k-images-idx3-ubyte").unlink()
    sentence = run_mnist(refused, mnist)
    assert "the network is out of reach" in sentence
    assert f"put t10k-images-idx3-ubyte.gz into {mnist}" in sentence


def test_truncated_data_files(refused: Refused, mnist: Path) -> None:
    path = mnist / "train-images-idx3-ubyte"
    os.truncate(path, 1000)
    assert run_mnist(refused, mnist).startswith(f"{path}: cut short: expected 15696 bytes")


@pytest.mark.parametrize(("begin", "end"), [(0, 30), (10, 20)])
def test_damaged_gzip_files(begin: int, end: int, refused: Refused, mnist: Path) -> None:
    path = mnist / "train-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[begin:end] = b"\x1f\x8b" + b"\xff" * (end - begin - 2)
    path.write_bytes(content)
    assert run_mnist(refused, mnist).startswith(f"{path}: ")


def test_labels_out_of_range(refused: Refused, mnist: Path) -> None:
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(8, (10,), bytes(range(1, 11))), mtime=0))
    assert run_mnist(refused, mnist) == f"{path}: label 10 of example 9 is out of range, expected 0..9"


def test_a_store_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for store in ("file", "file/store", "/proc/none/store"):
        said = refused("run", study("levels = 1", "levels = 0"), "--store", store)
        assert said.startswith(f"store {store}: ")
        assert store != "file" or "it is not a folder; name another one" in said
    assert refused("results", "digits", "--store", "a" * 256).endswith(
        "aa: store.json cannot be read: File name too long"
    )


def test_a_store_that_is_another_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "the folder is not empty and is not a store" in refused("run", "digits", "--store", "full")


def test_a_store_that_is_newer_or_damaged(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text(json.dumps({"store": 999}))
    for verb in ("run", "plan", "results"):
        assert "it has version 999 and this tombola reads version 1" in refused(verb, "digits", "--store", "store")
    (tmp_path / "store" / "store.json").write_text("{")
    assert "store.json is damaged" in refused("run", "digits", "--store", "store")


def test_a_store_that_cannot_be_written_to(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text(json.dumps({"store": 1}))

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tombola.store.store.tempfile.mkstemp", read_only)
    assert refused("run", "digits", "--store", "store") == "store store: it cannot be written to: Permission denied"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--importance": "l2"}, "--importance: the study has no importance 'l2', it has magnitude, l1"),
        ({"--seed": "5"}, "--seed: the study has no seed 5, it has 0, 1"),
        ({"--level": "3"}, "--level: the study has no level 3, it has levels 0 to 2"),
        ({"--level": "-1"}, "--level: expected a whole number from 0 on, got '-1' (see tombola export --help)"),
        ({"--levels": "4", "--level": "3"}, "level 3 of l1, seed 0 is not in {store}, levels 0 to 2 are; `tombola run` does the"),
        ({"--recipe.lr": "0.3"}, "level 1 of l1, seed 0 is not in {store}, none of its levels is; `tombola run` does the"),
        ({"-o": "gone/t.safetensors"}, "--output gone/t.safetensors: there is no folder gone; make it first"),
        ({"-o": "/"}, "--output /: is a folder; name a file in it"),
        ({"-o": "x/" * 3000}, "/x/x ... is no path, because it has more than 4095 bytes (see tombola export --help)"),
        ({"-o": "mine.py"}, "--output mine.py: is a .py file, which is not replaced; name another file"),
        ({"-o": "{store}/store.json"}, "--output {store}/store.json: lies in the store {store}; name a file in another folder"),
        ({"-o": "link/ticket"}, "--output link/ticket: lies in the store {store}; name a file in another folder"),
    ],
)  # fmt: skip
def test_exports_of_what_is_not_there(changes: dict[str, str], sentence: str, refused: Refused, finished: Path) -> None:
    Path("mine.py").touch()
    Path("link").symlink_to(finished / "results")
    options = {"--importance": "l1", "--seed": "0", "--level": "1", "-o": "t.safetensors", "--store": str(finished)}
    words = [word.format(store=finished) for option in (options | changes).items() for word in option]
    assert sentence.format(store=finished.resolve()) in refused("export", *STUDY, *words)
    assert Path("mine.py").stat().st_size == 0


@pytest.mark.parametrize("option", ["--store", "--data", "--level", "--seeds", "--levels", "--workers", "--format"])
def test_an_option_without_a_value(option: str, refused: Refused) -> None:
    assert refused("overlap", "digits", f"{option}=--").startswith(f"{option}: expected a value, got '--'")


@pytest.mark.parametrize("kind", ["pipe", "zeros", "large"])
def test_a_study_that_is_no_regular_file_is_not_waited_for(kind: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**33)  # it takes no room on the disk
    assert "study.toml: cannot be read: it " in refused("results", str(path))


def test_an_initial_checkpoint_that_is_a_pipe_is_not_waited_for(refused: Refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    name = study("[recipe]", "checkpoint = 'pipe'\n[recipe]")
    assert "task.checkpoint 'pipe': cannot be read: it is not a regular file" in refused("run", name)


def test_an_initial_checkpoint_that_is_no_checkpoint_takes_no_memory(refused: Refused, tmp_path: Path) -> None:
    with (tmp_path / "large").open("w") as file:
        file.truncate(100 << 30)
    name = study("[recipe]", "checkpoint = 'large'\n[recipe]")
    assert "task.checkpoint 'large': it is not a safetensors file: " in refused("run", name)


def test_a_study_may_come_from_a_pipe_of_the_shell(refused: Refused) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"levels = -1")
    os.close(writer)
    assert "levels: expected a number from 0" in refused("results", f"/dev/fd/{reader}")
    os.close(reader)


def test_results_of_what_is_not_there(refused: Refused, finished: Path) -> None:
    sentence = refused("results", *STUDY, "--recipe.lr", "0.3", "--store", str(finished))
    assert sentence == f"no result of this study is in {finished}; `tombola run` does the trainings that are missing"


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [("ray", "run digits --engine ray --store new", "ray"), ("argcomplete", "completion bash", "completion")],
)
def test_a_command_names_the_extra_that_it_lacks(
    module: str,
    command: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "tombola.engine.ray", raising=False)
    assert main(command.split()) == 2
    assert capsys.readouterr().err.strip().endswith(f"install it with: pip install 'tombola[{extra}]'")

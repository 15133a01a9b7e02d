"""Studies: presets, overrides, what is said about mistakes, and the identity of trainings."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tombola import Augmentation, Planner, Recipe, Store, Study, Task, UserError, Weights, load_problem, load_study
from tombola.cli.main import main
from tombola.own.code import own_modules, resolve, source_hash
from tombola.pruning.mask import Mask
from tombola.store.names import name_of
from tombola.study.schema import OldFieldWarning, fields, is_list, presets
from tombola.study.trainings import Training, name_mask, name_training
from tombola.threads import map_in_threads

SMALL = """\
importances = ["l1"]
seeds = [0]
levels = 2

[task]
dataset = "digits"
model = "lenet_300_100"

[recipe]
epochs = 1
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a study's file and return its name."""

    def write(text: str) -> str:
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# Presets.

PAPER: dict[str, dict[str, Any]] = {
    "lenet-mnist": {
        "task.dataset": "mnist",
        "task.model": "lenet_300_100",
        "recipe.epochs": 40,
        "recipe.batch_size": 128,
        "recipe.optimizer": "sgd",
        "recipe.lr": 0.1,
        "recipe.weight_decay": 0.0,
        "recipe.schedule": "constant",
        "recipe.rewind": 0,
        "recipe.augmentation": Augmentation(),
        "levels": 24,
    },
    "resnet20-cifar10": {
        "task.dataset": "cifar10",
        "task.model": "resnet20",
        "recipe.epochs": 160,
        "recipe.batch_size": 128,
        "recipe.optimizer": "sgd",
        "recipe.lr": 0.1,
        "recipe.momentum": 0.9,
        "recipe.weight_decay": 1e-4,
        "recipe.milestones": (80, 120),
        "recipe.gamma": 0.1,
        "recipe.rewind": 1000,
        "recipe.augmentation": Augmentation(flip=True, crop=4),
        "levels": 40,
    },
    "vgg16-cifar10": {
        "task.dataset": "cifar10",
        "task.model": "vgg16",
        "recipe.epochs": 160,
        "recipe.batch_size": 128,
        "recipe.optimizer": "sgd",
        "recipe.lr": 0.1,
        "recipe.momentum": 0.9,
        "recipe.weight_decay": 1e-4,
        "recipe.milestones": (80, 120),
        "recipe.gamma": 0.1,
        "recipe.rewind": 2000,
        "recipe.augmentation": Augmentation(flip=True, crop=4),
        "levels": 35,
    },
    "resnet18-tinyimagenet": {
        "task.dataset": "tiny-imagenet",
        "task.model": "resnet18",
        "recipe.epochs": 200,
        "recipe.batch_size": 256,
        "recipe.optimizer": "sgd",
        "recipe.lr": 0.2,
        "recipe.momentum": 0.9,
        "recipe.weight_decay": 1e-4,
        "recipe.milestones": (100, 150),
        "recipe.gamma": 0.1,
        "recipe.rewind": 1000,
        "recipe.augmentation": Augmentation(flip=True, crop=4),
        "levels": 40,
    },
}
"""Appendix A.4 of the paper."""

FIVE = ("magnitude", "l1", "l2", "softmax", "min_max")


def _value(study: Study, field: str) -> Any:
    value: Any = study
    for part in field.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_the_papers_systems(name: str) -> None:
    study = load_study(name)
    assert {field: _value(study, field) for field in PAPER[name]} == PAPER[name]
    assert (study.importances, study.seeds, study.fraction, study.exclude) == (FIVE, (0, 1, 2), 0.2, ())


def test_the_digits_preset() -> None:
    study = load_study("digits")
    assert study.task == Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64})
    assert (study.importances, study.seeds, study.levels, study.fraction) == (FIVE, (0, 1), 10, 0.2)


def test_a_built_in_model_loads_where_torch_does_not_tell_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.6, `torch.get_default_device` sees no `with torch.device(...)`, and fails after it was set to None."""

    def fail() -> torch.device:
        raise AttributeError("'NoneType' object has no attribute 'device'")

    monkeypatch.setattr(torch, "get_default_device", fail)
    task = Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64})
    assert all(parameter.device.type == "cpu" for parameter in load_problem(task).build().parameters())
    assert map_in_threads(abs, [-1, 2]) == [1, 2]


def test_fashion_is_the_papers_mnist_with_other_data() -> None:
    mnist, fashion = load_study("lenet-mnist"), load_study("lenet-fashion")
    assert fashion.task.dataset == "fashion-mnist"
    assert fashion == load_study("lenet-mnist", {"task.dataset": "fashion-mnist"})
    assert fashion != mnist


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    study = load_study(name)
    assert study == load_study(str(presets()[name]))
    first = presets()[name].read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# ")
    assert first.endswith(".")


# Files and overrides.


def test_a_file(write: Write) -> None:
    assert load_study(write(SMALL)) == Study(
        task=Task(dataset="digits", model="lenet_300_100"),
        recipe=Recipe(epochs=1),
        importances=("l1",),
        seeds=(0,),
        levels=2,
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("levels", 0, 0),
        ("fraction", 0.5, 0.5),
        ("seeds", [3, 4], (3, 4)),
        ("importances", ("a:b", "l2"), ("a:b", "l2")),
        ("exclude", [], ()),
        ("recipe.lr", 1, 1.0),
        ("recipe.batch_size", 7, 7),
        ("recipe.augmentation.crop", 2, 2),
        ("recipe.augmentation", {"flip": True}, Augmentation(flip=True)),
        ("task.model_arguments", {"inputs": 64, "sizes": [1, 2]}, {"inputs": 64, "sizes": (1, 2)}),
        ("device", "cuda", "cuda"),
    ],
)
def test_any_field_can_be_overridden(write: Write, field: str, value: Any, expected: Any) -> None:
    name = write(SMALL)
    study = load_study(name, {field: value})
    assert _value(study, field) == expected
    assert type(_value(study, field)) is type(expected)
    for other, _, _ in fields():
        if not other.startswith(field):
            assert _value(study, other) == _value(load_study(name), other)


@pytest.mark.parametrize(("one", "other"), [("epochs", "iterations"), ("iterations", "epochs")])
def test_overriding_the_length_replaces_it(write: Write, one: str, other: str) -> None:
    study = load_study(write(SMALL.replace("epochs = 1", f"{other} = 1")), {f"recipe.{one}": 5})
    assert (getattr(study.recipe, one), getattr(study.recipe, other)) == (5, None)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_overriding_the_optimizer_replaces_its_momentum(write: Write, optimizer: str) -> None:
    name = write(SMALL + "momentum = 0.9\nnesterov = true\n")
    assert load_study(name, {"recipe.optimizer": optimizer}).recipe == Recipe.model_validate(
        {"epochs": 1, "optimizer": optimizer}
    )
    with pytest.raises(UserError, match="recipe: momentum belongs to optimizer = 'sgd', and 'adam' does not use it"):
        load_study(name, {"recipe.optimizer": "adam", "recipe.momentum": 0.5})


@pytest.mark.parametrize(
    ("lines", "recipe", "sentence"),
    [
        ("optimizer = 'momentum'", {"momentum": 0.9}, "write optimizer = 'sgd', momentum = 0.9"),
        (
            "optimizer = 'nesterov'\nmomentum = 0.8",
            {"momentum": 0.8, "nesterov": True},
            "write optimizer = 'sgd', momentum = 0.8, nesterov = true",
        ),
        ("optimizer = 'nesterov'\nmomentum = 0.0", {}, "write optimizer = 'sgd', momentum = 0.0"),
    ],
)
def test_old_optimizers_are_read_with_a_sentence(
    write: Write, lines: str, recipe: dict[str, Any], sentence: str
) -> None:
    name = write(SMALL + lines)
    with pytest.warns(OldFieldWarning) as caught:
        study = load_study(name)
    old = lines.split("=")[1].split()[0]
    assert [str(each.message) for each in caught] == [
        f"study {name}: the next version will not read optimizer = {old}; {sentence}"
    ]
    assert study.recipe == Recipe(epochs=1, **recipe)
    for today in (SMALL, SMALL + "momentum = 0.9\nnesterov = true\n"):
        with pytest.warns(OldFieldWarning):
            found = load_study(write(today), {"recipe.optimizer": "momentum"})
        assert found.recipe == Recipe(epochs=1, momentum=0.9)
    old = write(SMALL + "optimizer = 'momentum'\nmomentum = 0.9\n")
    assert load_study(old, {"recipe.optimizer": "sgd"}).recipe == Recipe(epochs=1), "as it was read before"


def test_the_command_line_prints_the_sentence_as_a_note(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(
        SMALL.replace('"lenet_300_100"', '"lenet_300_100"\nmodel_arguments = { inputs = 64 }')
        + "optimizer = 'momentum'"
    )
    main(["results", name, "--store", str(tmp_path / "store")])
    assert capsys.readouterr().err.splitlines()[0] == (
        f"note: study {name}: the next version will not read optimizer = 'momentum'; "
        "write optimizer = 'sgd', momentum = 0.9"
    )


def test_an_old_optimizer_in_an_override_is_not_changed(write: Write) -> None:
    overrides = {"recipe": {"optimizer": "momentum", "epochs": 1}}
    with pytest.warns(OldFieldWarning):
        load_study(write(SMALL), overrides)
    assert overrides == {"recipe": {"optimizer": "momentum", "epochs": 1}}


def test_lists_may_stand_for_tuples_in_python() -> None:
    arguments: dict[str, Any] = {"sizes": [1, 2]}
    fields: dict[str, Any] = {"importances": ["l1"], "seeds": [0, 1], "data_seeds": [7], "exclude": ["fc"]}
    task = Task(dataset="digits", model="m", model_arguments=arguments)
    recipe = Recipe(epochs=3, schedule="milestones", milestones=[1, 2])  # type: ignore[arg-type]
    study = Study(task=task, recipe=recipe, levels=2, **fields)
    assert (study.importances, study.seeds, study.data_seeds, study.exclude) == (("l1",), (0, 1), (7,), ("fc",))
    assert (study.recipe.milestones, study.task.model_arguments) == ((1, 2), {"sizes": (1, 2)})
    for wrong in ({"seeds": [0.0]}, {"seeds": {0}}, {"importances": "l1"}, {"seeds": ["0"]}, {"exclude": iter("fc")}):
        with pytest.raises(UserError, match=f"^Study: {next(iter(wrong))}.*: expected a "):
            Study(task=task, recipe=recipe, levels=2, **(fields | wrong))
    for wrong in ({"milestones": [1.0]}, {"milestones": "1"}, {"lr": "0.1"}, {"epochs": 3.0}, {"nesterov": 1}):
        with pytest.raises(ValidationError):
            Recipe.model_validate({"epochs": 3, "schedule": "milestones", "milestones": [1], **wrong})


def test_a_mistake_in_an_argument_is_one_sentence() -> None:
    study = load_study("digits")
    parts: dict[str, Any] = {"task": study.task, "recipe": study.recipe, "importances": ["l1"], "seeds": [0]}
    with pytest.raises(UserError, match=r"^Study: levels: expected a number from 0, got -1$"):
        Study(**parts, levels=-1)
    with pytest.raises(UserError, match=r"^Recipe: unknown field 'epoch'; did you mean 'epochs'\?$"):
        Recipe(epoch=1)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"^Task: the field 'model' is missing$"):
        Task(dataset="digits")  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"^Study: recipe\.lr: expected a number, got 'x'$"):
        Study(**parts | {"recipe": {"epochs": 1, "lr": "x"}}, levels=1)


def test_overrides_are_not_changed(write: Write) -> None:
    overrides: dict[str, Any] = {"task.model_arguments": {"inputs": [1]}, "task.model": "x"}
    load_study(write(SMALL), overrides)
    assert overrides == {"task.model_arguments": {"inputs": [1]}, "task.model": "x"}


def test_a_study_is_frozen() -> None:
    study = load_study("digits")
    with pytest.raises(ValidationError, match="frozen"):
        study.levels = 3
    with pytest.raises(ValidationError, match="frozen"):
        study.recipe.lr = 3.0


def test_fields_are_the_leaves() -> None:
    names = [name for name, _, _ in fields()]
    assert len(set(names)) == len(names)
    assert {"levels", "task.model_arguments", "recipe.rewind", "recipe.augmentation.flip"} <= set(names)
    assert not {"task", "recipe", "recipe.augmentation"} & set(names)
    assert all(text for _, _, text in fields()), "each says what it is"
    lists = {name for name, annotation, _ in fields() if is_list(annotation)}
    assert lists == {
        "importances",
        "seeds",
        "data_seeds",
        "data_seeds_for",
        "prune",
        "exclude",
        "keep_dense",
        "task.metrics",
        "task.depends",
        "recipe.milestones",
        "recipe.betas",
        "recipe.no_decay",
    }


# Mistakes. Each text ends after the name of the file.


@pytest.mark.parametrize(
    ("line", "mistake", "text"),
    [
        ("levels = 2", "levls = 2", "unknown field 'levls'; did you mean 'levels'?; the field 'levels' is missing"),
        ("levels = 2", "", "the field 'levels' is missing"),
        ("levels = 2", "levels = -1", "levels: expected a number from 0, got -1"),
        ("levels = 2", "levels = 2.0", "levels: expected a whole number, got 2.0"),
        ("levels = 2", "levels = '2'", "levels: expected a whole number, got '2'"),
        ("levels = 2", "levels = true", "levels: expected a whole number, got true"),
        ("levels = 2", "levels = 2\nfraction = 1.0", "fraction: expected a number below 1, got 1.0"),
        ("levels = 2", "levels = 2\nfraction = 0", "fraction: expected a number above 0, got 0"),
        ("levels = 2", "levels = 2\nfraction = -0.2", "fraction: expected a number above 0, got -0.2"),
        ("levels = 2", "levels = 2\nfraction = nan", "fraction: expected a finite number, got nan"),
        ("levels = 2", "levels = 2\nfraction = '1/5'", "fraction: expected a number, got '1/5'"),
        ("levels = 2", "levels = 2\ndevice = 'gpu'", "device: unknown 'gpu'; did you mean 'cpu'?"),
        ("levels = 2", "levels = 2\nexclude = 'fc'", "exclude: expected a list, got 'fc'"),
        ("levels = 2", "levels = 2\nexclude = ['fc', 'fc']", "exclude: 'fc' is named more than once"),
        (
            "levels = 2",
            "levels = 2\ndata_seeds = [7, 0]",
            "data_seeds: 0 is the data order of seed 0 already, choose other numbers",
        ),
        ("seeds = [0]", "seeds = [3, 1, 3]", "seeds: 3 is named more than once"),
        ("seeds = [0]", "seeds = []", "seeds: at least one is needed"),
        ("seeds = [0]", "seeds = 0", "seeds: expected a list, got 0"),
        ("seeds = [0]", "seeds = [0, -1]", "seeds.1: expected a number from 0, got -1"),
        ("seeds = [0]", "seeds = [0, 'one']", "seeds.1: expected a whole number, got 'one'"),
        ('["l1"]', "['l1', 'l1']", "importances: 'l1' is named more than once"),
        ('["l1"]', "[]", "importances: at least one is needed"),
        ('["l1"]', "[1]", "importances.0: expected a text, got 1"),
        ("epochs = 1", "epochs = 1\niterations = 3", "recipe: give exactly one of epochs and iterations"),
        ("epochs = 1", "lr = 0.1", "recipe: give exactly one of epochs and iterations"),
        ("epochs = 1", "epochs = 0", "recipe.epochs: expected a number from 1, got 0"),
        ("epochs = 1", "epochs = 1\nbatch_sze = 3", "unknown field 'recipe.batch_sze'; did you mean 'batch_size'?"),
        ("epochs = 1", "epochs = 1\nlr = 0.0", "recipe.lr: expected a number above 0, got 0.0"),
        ("epochs = 1", "epochs = 1\nlr = inf", "recipe.lr: expected a finite number, got inf"),
        ("epochs = 1", "epochs = 1\nmomentum = 1.0", "recipe.momentum: expected a number below 1, got 1.0"),
        (
            "epochs = 1",
            "epochs = 1\noptimizer = 'adam'\nmomentum = 0.9",
            "recipe: momentum belongs to optimizer = 'sgd', and 'adam' does not use it: remove it",
        ),
        (
            "epochs = 1",
            "epochs = 1\noptimizer = 'adamw'\nnesterov = true",
            "recipe: nesterov belongs to optimizer = 'sgd', and 'adamw' does not use it: remove it",
        ),
        (
            "epochs = 1",
            "epochs = 1\nnesterov = true",
            "recipe: nesterov is a form of momentum, and momentum is 0: set momentum, or remove nesterov",
        ),
        ("epochs = 1", "epochs = 1\nrewind = -1", "recipe.rewind: expected a number from 0, got -1"),
        ("epochs = 1", "epochs = 1\noptimizer = 'sdg'", "recipe.optimizer: unknown 'sdg'; did you mean 'sgd'?"),
        (
            "epochs = 1",
            "epochs = 1\nschedule = 'linear'",
            "recipe.schedule: unknown 'linear'; choose from 'constant', 'milestones', 'cosine'",
        ),
        (
            "epochs = 1",
            "epochs = 1\nmilestones = [1]",
            "recipe: milestones and schedule = 'milestones' go together: give both or neither",
        ),
        (
            "epochs = 1",
            "epochs = 1\nschedule = 'milestones'",
            "recipe: milestones and schedule = 'milestones' go together: give both or neither",
        ),
        (
            "epochs = 1",
            "epochs = 1\nschedule = 'milestones'\nmilestones = [2, 1]",
            "recipe: milestones must be strictly increasing",
        ),
        (
            "epochs = 1",
            "epochs = 1\naugmentation = {flp = true}",
            "unknown field 'recipe.augmentation.flp'; did you mean 'flip'?",
        ),
        (
            "epochs = 1",
            "epochs = 1\naugmentation = {flip = 1}",
            "recipe.augmentation.flip: expected true or false, got 1",
        ),
        ("[recipe]\nepochs = 1", "", "the field 'recipe' is missing"),
        ("[task]", "[tusk]", "unknown field 'tusk'; did you mean 'task'?; the field 'task' is missing"),
        ('model = "lenet_300_100"', "", "the field 'task.model' is missing"),
        ('model = "lenet_300_100"', "model = 3", "task.model: expected a text, got 3"),
        (
            'model = "lenet_300_100"',
            'model = "m"\nmodel_arguments = 3',
            "task.model_arguments: expected a table, got 3",
        ),
    ],
)
def test_what_is_said_about_a_mistake(write: Write, line: str, mistake: str, text: str) -> None:
    assert line in SMALL
    name = write(SMALL.replace(line, mistake))
    with pytest.raises(UserError) as error:
        load_study(name)
    assert str(error.value) == f"study {name}: {text}"


def test_an_override_is_checked_as_the_file_is(write: Write) -> None:
    name = write(SMALL)
    for overrides, text in (
        ({"recipe.batch-size": 3}, "unknown field 'recipe.batch-size'; did you mean 'batch_size'?"),
        ({"fraction": 1.5}, "fraction: expected a number below 1, got 1.5"),
        ({"recipe.epochs": 2, "recipe.iterations": 3}, "recipe: give exactly one of epochs and iterations"),
    ):
        with pytest.raises(UserError) as error:
            load_study(name, overrides)
        assert str(error.value) == f"study {name}: {text}"
    with pytest.raises(UserError, match=r"^cannot set levels\.all: levels is not a table$"):
        load_study(name, {"levels.all": 3})


def test_several_mistakes_are_all_named(write: Write) -> None:
    name = write(SMALL.replace("levels = 2", "levels = -2\nfraction = 2.0").replace("epochs = 1", "epoch = 1"))
    with pytest.raises(UserError) as error:
        load_study(name)
    for text in (
        "levels: expected a number from 0, got -2",
        "fraction: expected a number below 1, got 2.0",
        "unknown field 'recipe.epoch'; did you mean 'epochs'?",
    ):
        assert text in str(error.value)


def test_toml_that_is_none(write: Write, tmp_path: Path) -> None:
    name = write(SMALL.replace("levels = 2", "levels ="))
    with pytest.raises(UserError) as error:
        load_study(name)
    assert str(error.value) == f"{name}: is not valid TOML: Invalid value (at line 3, column 9)"
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.toml: is not valid TOML: 'utf-8' codec can't decode"):
        load_study(str(tmp_path / "binary.toml"))


def test_a_mark_of_byte_order_is_no_part_of_a_study(write: Write, tmp_path: Path) -> None:
    plain = write(SMALL)
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + Path(plain).read_bytes())
    assert load_study(str(marked)) == load_study(plain)


def test_a_study_of_many_mistakes_is_refused_in_few_words(tmp_path: Path) -> None:
    path = tmp_path / "many.toml"
    path.write_text("".join(f"k{number} = 1\n" for number in range(3000)))
    with pytest.raises(UserError, match="unknown field 'k0'") as caught:
        load_study(path)
    assert len(str(caught.value)) < 3000
    path.write_text("a" + 2000 * ".a" + " = 1\n")
    with pytest.raises(UserError, match=r"unknown field 'a'|nested too deeply"):
        load_study(path)


def test_studies_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^study 'digit' is neither a preset nor a \.toml file; did you mean 'digits'\?$"
    ):
        load_study("digit")
    for name in ("missing.toml", str(tmp_path / "missing")):
        with pytest.raises(UserError, match=r"missing(\.toml)?: cannot be read: No such file or directory$"):
            load_study(name)


# Identity.


def _training(overrides: dict[str, Any], root: Path, seed: int = 0, level: int = 0) -> Training:
    study = load_study("digits", {"importances": ["magnitude"], **overrides})
    planner = Planner(study, load_problem(study.task), Store(root))
    initial = Weights("0" * 64, dict)  # random numbers, and so the initial weights, may differ by instruction set
    return planner.training(seed, initial, planner.dense, study.recipe.rewind, planner.end)


def test_identity_is_frozen(tmp_path: Path) -> None:
    """A stored result is found by the name of its training, which is the hash of these arguments.

    Where this fails, every result that users have stored is lost to them, and is trained again. That is right where
    the same arguments come to give other bits (then raise `trainings.SCHEME`, or a version that fewer names contain, or
    `task.BUILT_IN`), and a mistake otherwise: a new field of the recipe, say, or another default, must leave the names
    of existing trainings alone.
    """
    training = _training({}, tmp_path / "store")
    assert training.identity == {
        "scheme": 2,
        "data": "7a068d72e98b0510200074b650b7f8bd3d36057988973ae1dbaffbe7db662bef",
        "model": {"name": "lenet_300_100", "arguments": {"inputs": 64}, "version": 1},
        "loss": {"name": "cross_entropy", "arguments": {}, "version": 1},
        "recipe": {
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "schedule": "constant",
            "milestones": [],
            "gamma": 0.1,
            "warmup": 0,
            "batch_size": 64,
            "epochs": 20,
            "iterations": None,
            "rewind": 0,
            "precision": "float32",
            "augmentation": {"flip": False, "crop": 0},
        },
        "seed": 0,
        "initial": "0" * 64,
        "mask": "2f9fc1cd70eec5ce92cbfe968c113203e5e2c0a17c048d0b3cb7f2292a2d9ef9",
        "begin": 0,
        "end": 440,
        "threads": 1,
        "device": "cpu",
        "sparse": [],
        "perceptron": 1,
    }
    assert training.key == name_of(training.identity)
    assert training.key == "db7312ac6dcbf2b26bc072a447664daeea5b3f59777d4139eb1a001a4064d93e"


RECIPES: dict[str, tuple[Recipe, str]] = {
    "sgd": (
        Recipe(epochs=20, batch_size=64),
        "1fec88312eec3438f10bf978a9a0a82266782898ad4619440b3b01397f9118ac",
    ),
    "momentum": (
        Recipe(epochs=160, momentum=0.9, weight_decay=1e-4, schedule="milestones", milestones=(80, 120), rewind=1000),
        "a159a0b827187774164682ae68eb9f9efc8ca784a7ec4c8bee6a440bbe5f9817",
    ),
    "nesterov": (
        Recipe(iterations=500, momentum=0.8, nesterov=True, precision="bfloat16"),
        "0182c224269379b1b73345cc2a19eeb15c183208783da5e6d948d47bbb9cd956",
    ),
    "adam": (
        Recipe(epochs=3, optimizer="adam", lr=0.001, schedule="cosine", warmup=10),
        "9dbfcf4781fbc2cb32572bbbb5d9252ae05fe6108860fea61bace3be826d7091",
    ),
    "adamw": (
        Recipe(epochs=3, optimizer="adamw", lr=0.001, weight_decay=0.01),
        "075ac4e0983ee3d500f4b42bfbe469a62683cd0c1675f3b0bc971ac9070df591",
    ),
    "lenet-mnist": (
        load_study("lenet-mnist").recipe,
        "c260e5e5eac769879a98b09dfd579413ef788400ebc0648fb39fd31689c6846f",
    ),
    "resnet20-cifar10": (
        load_study("resnet20-cifar10").recipe,
        "3949219874e7a4ca72a0162becb2b2762d49b0efdb757239deb3029ef2089fb4",
    ),
    "vgg16-cifar10": (
        load_study("vgg16-cifar10").recipe,
        "0aeea5d033daaf0c2fc79213cb5676ca06df935c414fd39367e1fb821e4708b1",
    ),
    "resnet18-tinyimagenet": (
        load_study("resnet18-tinyimagenet").recipe,
        "b252973aa682357528dac23f7e28ded68cff87591de1a0e05abf13912fc3ad9f",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_identity_of_a_recipe_is_frozen(name: str) -> None:
    """These are the hashes of tombola's first version, whose recipes had other fields for the optimizer.

    The document is a part of every training's name. A change here loses users the results that they have stored.
    """
    recipe, expected = RECIPES[name]
    assert name_of(recipe.identity()) == expected


PROBLEM = {
    "data": "d" * 64,
    "model": {"name": "resnet20", "arguments": {}, "version": 1},
    "loss": {"name": "cross_entropy", "arguments": {}, "version": 1},
}

NAMES: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "lenet-mnist",
        "cpu",
        {"seed": 0, "begin": 0, "end": 18760, "sparse": ["fc1.weight"]},
        "44c095020f22668b53191729afb5c58484d123502dec7e353985bc12f01fc5f1",
    ),
    (
        "resnet20-cifar10",
        "cpu",
        {"seed": 2, "begin": 1000, "end": 62560, "sparse": []},
        "aa5b05a524b43894d8d99bc6d54a77e3a58f90cd2116f9c673889e6a5747f431",
    ),
    (
        "resnet18-tinyimagenet",
        "cuda",
        {"seed": 1, "begin": 0, "end": 1000, "sparse": []},
        "6263fdcdfa2951ade3254e13794298bfa416ec8c71a6e90e30d92aa9d9dd74f7",
    ),
]


@pytest.mark.parametrize(("preset", "device", "arguments", "name"), NAMES)
def test_names_of_trainings_are_frozen(preset: str, device: str, arguments: dict[str, Any], name: str) -> None:
    """The paper's recipes, with and without momentum, milestones, rewinding, sparse kernels and a GPU.

    Stores that users have are full of such names; see `test_identity_is_frozen` for when they may change.
    """
    alive = {"fc1.weight": torch.arange(12).reshape(3, 4) % 2 == 0, "fc.weight": torch.ones(2, 3, dtype=torch.bool)}
    mask, initial = Mask.from_tensors(alive), Weights("1" * 64, dict)
    recipe = load_study(preset).recipe
    assert name_training(PROBLEM, recipe, initial, mask, device=device, **arguments).key == name


def test_names_of_masks_are_frozen() -> None:
    """Where this fails, every mask that stores remember is computed again; see `PRUNING` for when that is right."""
    mask = Mask.from_tensors({"w": torch.tensor([True, False, True])})
    name = name_mask(Weights("1" * 64, dict), mask, 3, importance="l1", fraction=0.2, seed=7)
    assert name == name_of([1, "1" * 64, mask.hash, "l1", 0.2, 7, 3])
    assert name == "2bcf2e366bb0392cdff0afa9d8072420b11bef88c084160a51365814db1d5e15"


OTHER_TRAININGS: list[dict[str, Any]] = [
    {"recipe.lr": 0.2},
    {"recipe.epochs": 21},
    {"recipe.batch_size": 32},
    {"recipe.optimizer": "adam"},
    {"recipe.weight_decay": 0.1},
    {"recipe.rewind": 1},
    {"recipe.warmup": 1},
    {"recipe.schedule": "cosine"},
    {"recipe.augmentation.crop": 1},
    {"task.model_arguments": {"inputs": 64, "classes": 11}},
    {"task.dataset_arguments": {"train_per_class": 100}},
    {"exclude": ["fc"]},
]


def test_what_decides_the_bits_decides_the_name(tmp_path: Path) -> None:
    keys = [_training(overrides, tmp_path / "store").key for overrides in [{}, *OTHER_TRAININGS]]
    keys.append(_training({}, tmp_path / "store", seed=1).key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "overrides",
    [
        {"levels": 3},
        {"fraction": 0.3},
        {"keep_dense": []},
        {"seeds": [7]},
        {"importances": ["l2", "l1"]},
        {"data_seeds": []},
    ],
)
def test_what_does_not_decide_the_bits_does_not_decide_the_name(tmp_path: Path, overrides: dict[str, Any]) -> None:
    store = tmp_path / "store"
    assert _training(overrides, store).key == _training({}, store).key


# The source of a user's own code.

PACKAGE = {
    "mine/__init__.py": "",
    "mine/models.py": """
from __future__ import annotations
import json, torch
from torch import nn
from . import layers
from .sub.blocks import block
from .sub import activation as other
import mine.losses as losses
import spaces.inner

def build():
    from mine import lazy
    import broken
    return nn.Linear(1, 1)
""",
    "mine/layers.py": "from .widths import WIDTH\nfrom colorsys import ONE\n",
    "mine/widths.py": "import helper\nWIDTH = 1\n",
    "mine/sub/__init__.py": "from .activations import activation\n",
    "mine/sub/activations.py": "def activation(x): return x\n",
    "mine/sub/blocks.py": "from ..deep import depth\nfrom ...nowhere import nothing\nblock = 1\n",
    "mine/deep.py": "from mine import models\ndepth = 1\n",
    "mine/losses.py": "import helper.further\n",
    "mine/lazy.py": "",
    "mine/unrelated.py": "",
    "spaces/inner.py": "",
    "helper/__init__.py": "",
    "helper/further.py": "",
    "helper/unrelated.py": "",
    "broken/__init__.py": "raise RuntimeError('never imported')\n",
    "colorsys.py": "ONE = 1\n",  # a name of the standard library's, found before it
    "unrelated.py": "import mine.models\n",
}

IMPORTED = [name for name in PACKAGE if "unrelated" not in name]
UNRELATED = [name for name in PACKAGE if "unrelated" in name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own package, on Python's path."""
    root = tmp_path / "code"
    for name, text in PACKAGE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    tops = {Path(name).parts[0].removesuffix(".py") for name in PACKAGE} | {"written"}
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    _forget(tops)
    yield root
    _forget(tops)


def _forget(tops: set[str]) -> None:
    """Remove these modules, which another test may have imported from elsewhere."""
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]


def _edit(root: Path, name: str, text: str = "# edited\n") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text)
    importlib.invalidate_caches()


@pytest.mark.parametrize("name", IMPORTED)
def test_the_source_hash_changes_with_an_edit_of_what_is_imported(package: Path, name: str) -> None:
    before = source_hash("mine.models:build")
    assert source_hash("mine.models:build") == before
    _edit(package, name)
    assert source_hash("mine.models:build") != before


@pytest.mark.parametrize("name", UNRELATED)
def test_the_source_hash_does_not_change_with_another_edit(package: Path, name: str) -> None:
    before = source_hash("mine.models:build")
    _edit(package, name)
    _edit(package, "new.py")
    assert source_hash("mine.models:build") == before


def test_the_source_hash_is_of_the_module_whatever_the_function(package: Path) -> None:
    assert source_hash("mine.models:build") == source_hash("mine.models:other")
    assert source_hash("mine.models:build") != source_hash("mine.layers:build")


def test_the_source_hash_does_not_depend_on_where_the_source_lies(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "written.py").write_text("x = 1\n")
    importlib.invalidate_caches()
    before = source_hash("written:x")
    (package / "written.py").rename(tmp_path / "written.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert source_hash("written:x") == before
    (tmp_path / "written.py").write_text("x = 2\n")
    assert source_hash("written:x") != before


def test_a_module_that_comes_to_be_there_changes_the_source_hash(package: Path) -> None:
    (package / "written.py").write_text("try:\n    import fast\nexcept ImportError:\n    fast = None\n")
    importlib.invalidate_caches()
    before = source_hash("written:fast")
    _edit(package, "fast.py")
    assert source_hash("written:fast") != before


@pytest.mark.parametrize(
    "imported",
    ["torch", "torch.nn.functional", "json", "os.path", "tombola", "tombola.datasets", "sklearn.datasets", "nowhere"],
)
def test_installed_packages_and_tombola_are_not_a_part_of_the_source(package: Path, imported: str) -> None:
    (package / "written.py").write_text(f"import {imported}\nfrom {imported} import something\n")
    importlib.invalidate_caches()
    assert list(own_modules("written")) == ["written"]


def test_modules_of_folders_without_an_init_and_of_a_package_with_another_path_are_a_part(
    package: Path,
) -> None:
    _edit(package, "written.py", "import nested.deeply.inner, bundle.inner\n")
    _edit(package, "nested/deeply/inner.py")
    _edit(package, "elsewhere/vendored/inner.py")
    _edit(package, "bundle/__init__.py", "__path__.append(__path__[0].replace('bundle', 'elsewhere/vendored'))\n")
    try:
        assert set(own_modules("written")) == {"written", "nested.deeply.inner", "bundle", "bundle.inner"}
    finally:
        _forget({"nested", "bundle"})


def test_of_an_installed_package_its_own_source_counts() -> None:
    names = list(own_modules("iniconfig"))
    assert "iniconfig" in names
    assert all(name.partition(".")[0] == "iniconfig" for name in names)


# References.


def test_resolve(package: Path) -> None:
    (package / "written.py").write_text("def double(x):\n    return 2 * x\nCONSTANT = 3\n")
    importlib.invalidate_caches()
    assert resolve("written:double", "importance")(4) == 8
    where = package / "written.py"
    for reference, text in (
        ("written:triple", f"module 'written' ({where}) has no function 'triple'"),
        ("written:duble", f"module 'written' ({where}) has no function 'duble'; did you mean 'double'?"),
        ("written:CONSTANT", f"module 'written' ({where}) has no function 'CONSTANT'"),
        ("written:", "expected module:function, such as my_module:my_function"),
        (":double", "expected module:function, such as my_module:my_function"),
        ("written", "expected module:function, such as my_module:my_function"),
    ):
        with pytest.raises(UserError) as error:
            resolve(reference, "importance")
        assert str(error.value) == f"importance {reference!r}: {text}"
    for reference, module in (("writen:double", "writen"), ("mine.modls:build", "mine.modls")):
        with pytest.raises(UserError) as error:
            resolve(reference, "task.model")
        assert str(error.value) == (
            f"task.model {reference!r}: there is no module {module!r} here or on Python's path; "
            f"expected module:function, with the module in this folder, beside the study or installed"
        )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_resolve_a_module_that_fails(package: Path, source: str, text: str) -> None:
    (package / "written.py").write_text(f"\n{source}\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError) as error:
        resolve("written:f", "task.model")
    expected = f"task.model 'written:f': importing 'written' raised {text} (in {package / 'written.py'}, line 2)"
    assert str(error.value) == expected

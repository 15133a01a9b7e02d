"""Study: the description of an experiment as plain data. This module does not import torch, so that it loads fast."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from tombola.errors import UserError, as_path, as_texts, did_you_mean, expect, short
from tombola.files import read_regular
from tombola.own.functions import keep_data, refer
from tombola.training.fields import Fields, as_toml, explain
from tombola.training.recipe import Count, Recipe, Tuple

Arguments = dict[str, bool | int | float | str | Tuple[bool | int | float | str]]


_LARGEST = 2**24  # bytes of a study's file

MOST_SEEDS = 1000
"""Seeds of a study, because every verb follows the chains of each of them."""

MOST_CHAINS = 10_000
"""Chains of a study, those with further data orders included: a verb follows about a thousand of them in a second."""


class OldFieldWarning(UserWarning):
    """A study is written with fields of tombola's first version; the next version will not read them."""


class Task(Fields):
    """The data set, model and loss, each a name, a `module:function` of the user, or the function itself.

    A data set may also be a `tombola.Dataset`.

    >>> Task(dataset="digits", model="lenet_300_100", model_arguments={"inputs": 64}).loss
    'cross_entropy'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: str = Field(
        description="name of a data set, or module:function that returns a tombola.Dataset or draws batches"
    )
    dataset_arguments: Arguments = Field(default={}, description="arguments of the dataset function")
    model: str = Field(description="name of a model, or module:function that returns a torch module")
    model_arguments: Arguments = Field(default={}, description="arguments of the model function")
    loss: str = Field(
        default="cross_entropy",
        description="cross_entropy, mse, mae, huber, binary_cross_entropy, or module:function of (outputs, labels)",
    )
    forward: str | None = Field(
        default=None,
        description="module:function of (model, inputs) that returns the outputs; by default model(inputs)",
    )
    step: str | None = Field(
        default=None, description="module:function of (model, inputs, labels) that returns the training loss"
    )
    metrics: Annotated[Tuple[str], Field(min_length=1)] = Field(
        default=("accuracy",),
        description="names of metrics, or module:function of (outputs, labels); tickets are judged by the first",
    )
    validation: float | int | None = Field(
        default=None,
        description="share or number of the training examples to judge tickets on, instead of the test set",
    )
    checkpoint: str | None = Field(
        default=None,
        description="safetensors file with the initial weights of all seeds; by default each seed draws its own",
    )
    depends: Tuple[str] = Field(
        default=(), description="what else the results depend on: files, env:NAME, package:NAME, value:TEXT"
    )

    @property
    def own_code(self) -> list[str]:
        """The references to the user's own functions, `module:function`."""
        names = (self.dataset, self.model, self.loss, self.forward, self.step, *self.metrics)
        return [name for name in names if name is not None and ":" in name]

    @field_validator("dataset", "model", "loss", "forward", "step", "metrics", mode="before")
    @classmethod
    def _refer(cls, value: Any, info: ValidationInfo) -> Any:
        return _refer_each(value, f"task.{info.field_name}")

    @field_validator("metrics")
    @classmethod
    def _no_repetition(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _check_once(values)

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_number(cls, value: Any) -> Any:
        share = type(value) is float and 0 < value < 1
        if value is None or share or (type(value) is int and value >= 1):
            return value
        raise ValueError(f"expected a share between 0 and 1, or a number of examples from 1 on, got {short(value)}")

    def model_post_init(self, _: object) -> None:
        """Keep the data set as long as the task lives, if only this process has it."""
        keep_data(self.dataset, owner=self)


class Study(Fields):
    """An experiment: a task, a recipe, and importances x seeds x levels.

    >>> load_study("digits").levels
    10
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    task: Task
    recipe: Recipe
    importances: Annotated[Tuple[str], Field(min_length=1)] = Field(
        description="names of importances, score/normalisation, or module:function of your own"
    )
    seeds: Annotated[Tuple[Count], Field(min_length=1, max_length=MOST_SEEDS)] = Field(
        description="random seeds; each gives one chain of tickets per importance"
    )
    levels: Count = Field(description="number of pruning rounds; level 0 is the dense network")
    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="share of the connections alive that each round prunes"
    )
    data_seeds: Annotated[Tuple[Count], Field(max_length=MOST_SEEDS)] = Field(
        default=(), description="seeds of further data orders, which give the noise floor"
    )
    data_seeds_for: Tuple[str] = Field(
        default=(), description="importances that are also run with these data orders; by default the first"
    )
    prune: Tuple[str] = Field(
        default=(),
        description="patterns of the parameters that may be pruned, such as *.weight; those that begin with !, such as "
        "!*.norm*, take away; by default the weight matrices of linear, convolution, recurrent and attention layers",
    )
    exclude: Tuple[str] = Field(
        default=(), description="layers that are left out: neither pruned nor counted; * matches any characters"
    )
    keep_dense: Tuple[str] = Field(
        default=(), description="layers that are counted and never pruned; * matches any characters"
    )
    selection: Literal["global", "uniform", "erk", "shares"] = Field(
        default="global",
        description="what a round removes: the lowest values of all layers (global), or of each layer a fixed number",
    )
    shares: dict[str, float] = Field(
        default={},
        description="with selection shares: how much each layer loses relative to others; * matches any characters",
    )
    score_at: Literal["end", "rewind"] = Field(
        default="end",
        description="the weights that are scored: those at the end of training, or those of the rewind point",
    )
    score_examples: Annotated[int, Field(ge=1)] = Field(
        default=1024, description="number of training examples for a score that needs data, such as taylor"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="device to train on: cpu or cuda")
    kernels: Literal["auto", "off"] = Field(
        default="auto", description="sparse layers for the CPU: auto uses them where they are faster, off uses none"
    )

    @field_validator("importances", "data_seeds_for", mode="before")
    @classmethod
    def _refer(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, (list, tuple)):
            return values
        return [_shorten_name(value) for value in _refer_each(values, str(info.field_name))]

    @field_validator("importances", "seeds", "data_seeds", "data_seeds_for", "exclude", "keep_dense")
    @classmethod
    def _no_repetition(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _check_once(values)

    @model_validator(mode="after")
    def _other_orders(self) -> Study:
        for seed in set(self.seeds) & set(self.data_seeds):
            raise ValueError(f"data_seeds: {seed} is the data order of seed {seed} already, choose other numbers")
        for importance in self.data_seeds_for:
            if importance not in self.importances:
                message = did_you_mean(importance, self.importances)
                raise ValueError(f"data_seeds_for: {importance!r} is not one of this study's importances; {message}")
        return self

    @model_validator(mode="after")
    def _not_too_many(self) -> Study:
        orders = len(self.data_seeds) * len(self.repeated)
        chains = len(self.seeds) * (len(self.importances) + orders)
        if chains > MOST_CHAINS:
            raise ValueError(
                f"seeds: {len(self.seeds)} seeds × ({len(self.importances)} importances + {orders} with further data "
                f"orders) are {chains} chains of tickets, expected at most {MOST_CHAINS}; name fewer of them, or "
                "write several studies, which may share a store"
            )
        return self

    @model_validator(mode="after")
    def _selection(self) -> Study:
        if self.shares and self.selection != "shares":
            raise ValueError(f"shares: they are for selection = 'shares', and the selection is {self.selection!r}")
        return self

    @property
    def repeated(self) -> tuple[str, ...]:
        """The importances that are run with the data orders of `data_seeds` too."""
        return self.data_seeds_for or self.importances[:1]


def presets() -> dict[str, Path]:
    """Return the studies that come with the package: name -> TOML file."""
    folder = Path(str(resources.files("tombola.study") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def load_study(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Load a preset or a TOML file as a study, with some fields overridden.

    An override of `recipe.epochs` also removes the file's `iterations`, and vice versa. An override of
    `recipe.optimizer` with Adam or AdamW also removes the file's `momentum` and `nesterov`. An override of
    `importances` also removes all others from the file's `data_seeds_for`, and an override of `task.model` with
    another model removes the file's `keep_dense`, because the layers of another model have other names.

    Args:
        name: a preset's name, or the path of a TOML file (with a slash, or ending in `.toml`).
        overrides: dotted field -> value, such as `{"recipe.epochs": 2}`; functions may stand for `module:function`.

    Raises:
        UserError: if the file or a field is invalid; the message names the file, the field and what was expected.

    Warns:
        OldFieldWarning: if the study has fields of tombola's first version; the message says what to write instead.

    >>> load_study("digits", {"recipe.epochs": 2}).recipe.epochs
    2
    """
    name = str(as_path(name, "study"))
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
    elif name in presets():
        path = presets()[name]
    else:
        raise UserError(f"study {name!r} is neither a preset nor a .toml file; {did_you_mean(name, presets())}")
    try:
        document = tomllib.loads(_read(path).decode("utf-8-sig"))  # some editors write a mark of byte order
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply") from error
    except ValueError as error:  # also a whole number of thousands of digits, which is no TOMLDecodeError
        raise UserError(f"{path}: is not valid TOML: {error}") from error
    return _build(document, {} if overrides is None else overrides, f"study {name}")


def _read(path: Path) -> bytes:
    """Return the content of a study's file; a pipe is read if a shell has opened it for this process (`<(command)`)."""
    if path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) or path == Path("/dev/stdin"):
        with path.open("rb") as file:
            return file.read(_LARGEST)
    return read_regular(path, _LARGEST)


def override(study: Study, overrides: Mapping[str, Any]) -> Study:
    """Return a study with some fields overridden, by the rules of `load_study`.

    Raises:
        UserError: if a field is invalid.

    >>> override(load_study("digits"), {"levels": 3, "recipe.iterations": 50}).recipe.epochs is None
    True
    """
    return _build(study.model_dump(exclude_defaults=True), overrides, "study")


def _build(document: dict[str, Any], overrides: Mapping[str, Any], name: str) -> Study:
    """Return the study of a document with some fields overridden; its name is for messages."""
    expect(overrides, Mapping, "overrides", 'fields by name, such as {"recipe.epochs": 2}')
    as_texts(overrides, "overrides", "names of fields")
    overrides = {field: _refer_each(value, field) for field, value in overrides.items()}
    recipe = document.get("recipe")
    if isinstance(recipe, dict):
        for one, other in (("epochs", "iterations"), ("iterations", "epochs")):
            if f"recipe.{one}" in overrides:
                recipe.pop(other, None)
        _drop_unused_momentum(recipe, str(overrides.get("recipe.optimizer")))
    model = document["task"].get("model") if isinstance(document.get("task"), dict) else None
    for field, value in overrides.items():
        _set(document, field.split("."), value)
    if overrides.get("task.model", model) != model and "keep_dense" not in overrides:
        document.pop("keep_dense", None)
    if "importances" in overrides and "data_seeds_for" not in overrides:
        _drop_other_importances(document)
    if isinstance(document.get("recipe"), dict):
        document["recipe"] = _rewrite_old_optimizer(document["recipe"], name)
    try:
        return Study.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{name}: {explain(error, document, Study)}") from None


def _shorten_name(importance: Any) -> Any:
    """Return the shortest name of an importance: `l1` for `magnitude/l1`, and `taylor` for `taylor/identity`.

    >>> _shorten_name("magnitude/l1"), _shorten_name("taylor/identity"), _shorten_name("mine:f/identity")
    ('l1', 'taylor', 'mine:f/identity')
    """
    if not isinstance(importance, str) or ":" in importance:
        return importance
    return importance.removesuffix("/identity").removeprefix("magnitude/")


def fields(model: type[BaseModel] = Study, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield each leaf field as (dotted name, type, description)."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.annotation, info.description or ""


def is_list(annotation: Any) -> bool:
    """Return whether the type of a field is a list of values (a tuple in Python)."""
    return get_origin(annotation) is tuple


def _check_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    seen = set[Any]()
    for value in values:
        if value in seen:
            raise ValueError(f"{value!r} is named more than once")
        seen.add(value)
    return values


def _refer_each(value: Any, field: str) -> Any:
    return [refer(each, field) for each in value] if isinstance(value, (list, tuple)) else refer(value, field)


def _set(document: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            raise UserError(f"cannot set {'.'.join(path)}: {part} is not a table")
    document[path[-1]] = value


def _drop_unused_momentum(recipe: dict[str, Any], optimizer: str) -> None:
    """Remove the momentum from a file's recipe if an override selects an optimizer without momentum."""
    if (
        optimizer in ("adam", "adamw")
        or ":" in optimizer
        or (optimizer == "sgd" and recipe.get("optimizer") in ("momentum", "nesterov"))
    ):
        recipe.pop("momentum", None)
        recipe.pop("nesterov", None)


def _drop_other_importances(document: dict[str, Any]) -> None:
    """Remove from a file's `data_seeds_for` what an override of the importances leaves out."""
    repeated, importances = document.get("data_seeds_for"), document["importances"]
    if isinstance(repeated, list | tuple) and isinstance(importances, list | tuple):
        document["data_seeds_for"] = [name for name in repeated if name in importances]


def _rewrite_old_optimizer(recipe: dict[str, Any], study: str) -> dict[str, Any]:
    """Convert a recipe to today's fields; warn if its optimizer is written as in tombola's first version."""
    old = recipe.get("optimizer")
    if old not in ("momentum", "nesterov"):
        return recipe
    momentum = recipe.get("momentum", 0.9)
    today = {"optimizer": "sgd", "momentum": momentum, "nesterov": old == "nesterov" and bool(momentum)}
    sentence = ", ".join(f"{field} = {as_toml(value)}" for field, value in today.items() if value is not False)
    warnings.warn(
        f"{study}: the next version will not read optimizer = {old!r}; write {sentence}",
        OldFieldWarning,
        stacklevel=4,
    )
    return recipe | today

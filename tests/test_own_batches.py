"""Batches that a function of the user draws: trained, resumed, named, and refused where they do not repeat."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset, split_validation
from tombola.datasets.own_batches import dataset_of_batches
from tombola.errors import UserError
from tombola.importance.network_scores import NETWORK_SCORES
from tombola.pruning.mask import Mask
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.repeatable import check_repeatable
from tombola.study.schema import Study, load_study
from tombola.study.task import load_problem, try_out
from tombola.study.trainings import Training
from tombola.training.accumulation import counts_positions
from tombola.training.batches import batches, iterations
from tombola.training.history import Checkpoint
from tombola.training.recipe import Recipe
from tombola.training.scoring import score_network
from tombola.training.train import train

X = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
RECIPE = Recipe(epochs=3, batch_size=5, lr=0.2, momentum=0.5)

Pairs = Iterator[tuple[Any, Any]]


def draw(seed: int, epoch: int, split: str) -> Pairs:
    if split == "test":
        yield X[17:], Y[17:]
        return
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for part in order.split(5):
        yield X[part], Y[part]


def made(function: Callable[..., Any] = draw) -> Dataset:
    return dataset_of_batches("own", function, "source")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def run(data: Dataset, recipe: Recipe = RECIPE, **options: Any) -> Any:
    model = network()
    return train(model, model.state_dict(), Mask.ones_like(model), data, recipe, 0, **options)


def bits(trained: Any) -> list[Any]:
    return [trained.weights.hash, trained.batch_losses.tolist(), trained.history]


def test_each_epoch_is_the_one_that_the_function_draws() -> None:
    data = made()
    assert (data.train_examples, data.test_examples, data.held_examples) == (17, 6, 17)
    found = [labels.tolist() for _, labels in batches(data, RECIPE, 7, 0, 8)]
    assert found == [y.tolist() for epoch in (0, 1) for _, y in draw(7, epoch, "train")]
    assert [labels.tolist() for _, labels in batches(data, RECIPE, 7, 6, 8)] == found[6:]


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, [1, 1, 1, 1] * 2),
    ({"accumulate": 3}, [3, 1] * 2),
    ({"accumulate": 3, "drop_last": True}, [3] * 2),
    ({"drop_last": True}, [1, 1, 1] * 2),
])  # fmt: skip
def test_an_iteration_has_as_many_batches_as_the_recipe_says(fields: dict[str, Any], expected: list[int]) -> None:
    recipe = Recipe(epochs=2, batch_size=5, **fields)
    data = made()
    found = list(iterations(data, recipe, 3, 0, recipe.total_iterations(data.train_examples)))
    assert [len(several) for several in found] == expected
    second = found[len(expected) // 2][0][1]
    assert second.equal(next(iter(draw(3, 1, "train")))[1])  # type: ignore[union-attr]


def test_batches_train_as_the_same_batches_of_a_data_set() -> None:
    whole = Dataset("whole", X[:17], Y[:17], X[17:], Y[17:])

    def same(seed: int, epoch: int, split: str) -> Pairs:
        return batches(whole, RECIPE, seed, 4 * epoch, 4 * epoch + 4) if split == "train" else iter([(X[17:], Y[17:])])

    assert bits(run(made(same))) == bits(run(whole))


@pytest.mark.parametrize("fields", [{}, {"accumulate": 2}])
def test_a_training_that_is_stopped_ends_with_the_same_bits(fields: dict[str, Any]) -> None:
    taken: list[Checkpoint] = []
    do = partial(run, made(), RECIPE.model_copy(update=fields))
    expected = do(watch=lambda _, checkpoint: taken.append(checkpoint()))
    assert len(taken) > 1
    for checkpoint in taken[:-1]:
        assert bits(do(resume=checkpoint)) == bits(expected)


def test_scores_see_the_first_examples() -> None:
    model, whole = network(), Dataset("whole", *made_train(), X[17:], Y[17:])
    score = partial(
        score_network, NETWORK_SCORES["taylor"], Mask.ones_like(model), model=model, state=model.state_dict(),
        loss=nn.functional.cross_entropy, seed=0,
    )  # fmt: skip
    found, expected = score(data=made()), score(data=whole)
    assert found.keys() == expected.keys() > set()
    assert all(found[layer].equal(expected[layer]) for layer in expected)


def made_train() -> tuple[Tensor, Tensor]:
    first = list(draw(0, 0, "train"))
    return torch.cat([x for x, _ in first]), torch.cat([y for _, y in first])


class Object:
    """An object that draws, with a name for what it draws."""

    def __init__(self, fingerprint: Any, scale: float = 1.0) -> None:
        self.fingerprint, self.scale = fingerprint, scale

    def __call__(self, seed: int, epoch: int, split: str) -> Pairs:
        return ((self.scale * x, y) for x, y in draw(seed, epoch, split))


def test_the_fingerprint_is_of_source_and_content_or_as_given() -> None:
    def other(seed: int, epoch: int, split: str, change: str = "train") -> Pairs:
        return ((x + (split == change), y) for x, y in draw(seed, epoch, split))

    found = [made(), made(other), made(partial(other, change="test")), dataset_of_batches("own", draw, "edited")]
    assert len({data.fingerprint for data in found}) == 4
    assert made(lambda *arguments: list(draw(*arguments))).fingerprint == made().fingerprint
    assert made(Object("1")).fingerprint == made(Object("1", scale=2)).fingerprint != made(Object("2")).fingerprint
    with pytest.raises(UserError, match="its fingerprint is a int, expected a text"):
        made(Object(3))


def cut(seed: int, epoch: int, split: str, *, at: int = 3, more: int = 0) -> Pairs:
    """Draw another number of batches in other epochs than the first."""
    found = list(draw(seed, epoch, split))
    yield from found[:at] if epoch else found
    yield from found[:more] if epoch else []


def uneven(seed: int, epoch: int, split: str) -> Pairs:
    return iter(list(draw(seed, epoch, split))[::-1] if epoch and split == "train" else draw(seed, epoch, split))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (cut, "epoch 1 of seed 0 has 3 and not 4 batches, as the first epoch of seed 0 has"),
        (partial(cut, at=4, more=1), "epoch 1 of seed 0 has more than 4 batches"),
        (uneven, "batch 1 of epoch 1 of seed 0 has 2 examples and the first of all 5"),
    ],
)
def test_epochs_of_other_lengths_are_refused(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(made(function))
    for epochs in (1, 3):  # the last iteration of a training is looked at too
        assert len(list(batches(made(), RECIPE, 0, 0, 4 * epochs))) == 4 * epochs


def unseeded(seed: int, epoch: int, split: str) -> Pairs:
    order = torch.randperm(17)
    return ((X[part], Y[part]) for part in order.split(5))


def reused(seed: int, epoch: int, split: str) -> Pairs:
    buffer = torch.empty(5, 4)
    for inputs, labels in draw(seed, epoch, split):
        yield buffer[: len(inputs)].copy_(inputs) if split == "train" else inputs, labels


def test_a_model_that_changes_its_inputs_does_not_change_the_data() -> None:
    held = X.clone()

    def views(seed: int, epoch: int, split: str) -> Pairs:
        return ((held[start : start + 5], Y[start : start + 5]) for start in range(0, 15, 5))

    data, model = made(views), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    train(model, model.state_dict(), Mask.ones_like(model), data, RECIPE, 0)
    assert held.equal(X)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_function_that_never_ends_is_not_waited_for(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tombola.datasets.own_batches.MOST_BATCHES", 3)
    with pytest.raises(UserError, match=f"epoch 0 of seed 0, {split}, has more than 3 batches; let the function end"):
        made(lambda seed, epoch, of: itertools.repeat((X, Y)) if of == split else [(X, Y)])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (reused, "it changes a batch after it has given it"),
        (unseeded, "its batches do not repeat: two calls with seed 0, epoch 0"),
        (lambda seed, epoch, split: 3, "raised TypeError"),
        (lambda seed: [], "raised TypeError"),
        (lambda seed, epoch, split: [X], r"expected pairs \(inputs, targets\) of tensors"),
        (lambda seed, epoch, split: [(X, [1, 2])], r"expected pairs \(inputs, targets\) of tensors"),
        (lambda seed, epoch, split: [(X, Y[:3])], r"the tensors of a batch have \[3, 23\] examples"),
        (lambda seed, epoch, split: [], "its batches of seed 0, epoch 0, train: there are none"),
        (lambda seed, epoch, split: draw(seed, epoch, split) if split == "train" else [], "test: there are none"),
        (lambda seed, epoch, split: [(X, Y), (X[:, :2], Y)], "its batches differ in structure, type or shape"),
        (lambda seed, epoch, split: [(X / 0, Y)], "are NaN or infinite"),
    ],
)
def test_what_gives_no_batches_is_refused(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(UserError, match=f"data set 'own'.*{said}"):
        made(function)


def test_another_batch_size_than_that_of_the_batches_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"it is 4, and the batches of 'own' have 5 examples; set recipe.batch_size = 5"
    ):
        run(made(), Recipe(epochs=1, batch_size=4))


def test_a_validation_split_is_drawn_where_the_function_says_so() -> None:
    def drawn(seed: int, epoch: int, split: str) -> Pairs:
        return iter([(X[:4], Y[:4])]) if split == "validation" else draw(seed, epoch, split)

    plain = made(drawn)
    drawn.validation = True  # type: ignore[attr-defined]
    data = made(drawn)
    assert (plain.judged_on, data.judged_on, data.count("validation")) == ("test", "validation", 4)
    assert plain.fingerprint == made().fingerprint != data.fingerprint
    with pytest.raises(UserError, match="attribute validation = True, let it draw batches of the split 'validation'"):
        split_validation(made(), 0.5)


# In a study


def study(**fields: Any) -> Study:
    overrides = {
        "task.dataset": "drawn_task:data", "task.model": "drawn_task:network", "task.model_arguments": {},
        "keep_dense": [], "importances": ["taylor"], "levels": 1, "recipe.batch_size": 5, "recipe.epochs": 1,
    }  # fmt: skip
    return load_study("digits", overrides | fields)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("drawn_task")
    made.network, made.data = network, lambda: draw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "drawn_task", made)
    return made


def test_a_study_of_drawn_batches_is_tried_out(module: types.ModuleType, tmp_path: Path) -> None:
    problem = load_problem(study().task)
    try_out(problem, study())
    planner = Planner(study(), problem, Store(tmp_path / "store"))
    check_repeatable(planner)
    assert planner.end == 4
    with pytest.raises(UserError, match=r"score_examples: 20 are more than the 10 examples that are kept"):
        try_out(problem_of_few(problem), study(score_examples=20))


@pytest.mark.parametrize(
    ("accumulate", "tokens", "ignored", "drawn", "expected"),
    [
        (1, True, True, True, False),
        (2, False, False, False, False),
        (2, False, False, True, False),
        (2, True, False, False, False),
        (2, True, True, False, True),
        (2, False, True, False, True),
        (2, True, False, True, True),
    ],
)
def test_only_trainings_that_count_by_positions_have_it_in_their_name(
    accumulate: int,
    tokens: bool,
    ignored: bool,
    drawn: bool,
    expected: bool,
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    targets = Y[:, None].repeat(1, 3) if tokens else Y.clone()
    targets[0] = -100 if ignored else targets[0]

    def of_drawn(seed: int, epoch: int, split: str) -> Pairs:
        whole = slice(17, None) if split == "test" else slice(17)
        yield from zip(X[whole].split(5), targets[whole].split(5), strict=True)

    whole = Dataset("whole", X[:17], targets[:17], X[17:], targets[17:])
    module.data = lambda: of_drawn if drawn else whole  # type: ignore[attr-defined]
    heads = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))
    module.network = lambda: nn.Sequential(nn.Linear(4, 4), heads if tokens else nn.Linear(4, 2))  # type: ignore[attr-defined]
    fields: dict[str, Any] = {"recipe.accumulate": accumulate, "importances": ["l1"]}
    problem = load_problem(study(**fields).task)
    planner = Planner(study(**fields), problem, Store(tmp_path / "store"))
    training = planner.progress(planner.chains[0]).waits_for
    assert isinstance(training, Training)
    assert training.identity.get("positions", False) is expected
    assert problem.identity["loss"]["version"] == 1
    with_step = counts_positions(study(**fields).recipe, problem.data, problem.loss, lambda *_: torch.zeros(()))
    assert not with_step

    def refuse(*_: Any) -> int:
        raise AssertionError("positions were counted")

    if not expected:
        monkeypatch.setattr("tombola.training.train.count_positions", refuse)
    model = problem.build()
    recipe = study(**fields).recipe
    train(model, model.state_dict(), Mask.ones_like(model), problem.data, recipe, 0, end=1)


def problem_of_few(problem: Any) -> Any:
    """Return the problem with fewer examples in memory than an epoch has."""
    from dataclasses import replace

    data = problem.data
    return replace(
        problem, data=replace(data, train_inputs=data.train_inputs[:10], train_labels=data.train_labels[:10])
    )


def test_epochs_of_other_lengths_are_found_before_a_run(module: types.ModuleType) -> None:
    module.data = lambda: cut  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="epoch 1 of seed 1 has 3 and not 4 batches"):
        try_out(load_problem(study().task), study())


def test_what_is_neither_data_nor_batches_is_refused(module: types.ModuleType) -> None:
    module.data = lambda: 3  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"task.dataset 'drawn_task:data': expected a tombola.Dataset, or a function"):
        load_problem(study().task)

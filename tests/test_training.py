"""Training is a pure function of its arguments: the same bits, from the start or from any iteration."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as compute_again

import golden
from tombola import Augmentation, Checkpoint, Dataset, History, Mask, Recipe, Trained, UserError, kernels, train
from tombola.importance import SCORES
from tombola.streams import derive, generator
from tombola.training.batches import Changes, batches, iterations, normalisation
from tombola.training.convolutions import sound_convolutions
from tombola.training.evaluation import evaluate, predict
from tombola.training.losses import Losses
from tombola.training.scoring import score_network
from tombola.training.train import check_recipe_fits, initial_state
from tombola.training.trial import try_network
from tombola.training.weights import apply_mask
from training_cases import (
    AUGMENTED,
    CASES,
    EXAMPLES,
    IMAGES,
    VECTORS,
    Case,
    convolutions,
    perceptron,
    setting_of,
    small,
    tensors_of,
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))

cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def _checkpoints(run: Callable[..., Trained]) -> tuple[Trained, dict[int, Checkpoint]]:
    """Return what a training led to, and a checkpoint after every iteration."""
    taken: dict[int, Checkpoint] = {}

    def watch(iteration: int, take: Callable[[], Checkpoint]) -> None:
        taken[iteration] = take()
        assert taken[iteration].iteration == iteration

    return run(watch=watch), taken


def _bits(trained: Trained) -> tuple[str, History]:
    return trained.weights.hash, trained.history


# Golden bits.


@pytest.mark.xdist_group("golden")  # a setting's bits are computed in a process of their own, once
@pytest.mark.parametrize("setting", golden.SETTINGS)
@pytest.mark.parametrize(
    ("name", "kernel_set"),
    [(name, which) for name, case in CASES.items() for which in (golden.KERNELS if case.sparse else (None,))],
)
def test_golden_bits(name: str, kernel_set: str | None, setting: str) -> None:
    """Stored results are looked up by a training's arguments: were its bits to change, they would be wrong.

    Where it fails after a change of tombola that is meant, raise `planner.SCHEME` and write the new bits by
    `make golden`. After an upgrade of torch the key is another one: `make golden` adds its bits.
    """
    if kernel_set is not None and kernel_set not in {each.removesuffix("_in_halves") for each in golden.kernel_sets()}:
        pytest.skip(f"this processor or build has no {kernel_set!r} kernels; to run: take a processor that has them")
    computed = golden.compute_apart(setting)
    (key,) = (key for key in computed if key.startswith(f"{name}:") and _has_kernels(key, kernel_set))
    expected = golden.read()["bits"].get(key)
    if expected is None:
        pytest.skip(f"golden.json has no bits for {key!r}: add this machine's by make golden WHY='...'")
    assert computed[key] == expected, key


def _has_kernels(key: str, kernel_set: str | None) -> bool:
    return kernel_set is None or f", kernels {kernel_set}" in key


def test_golden_bits_have_a_history() -> None:
    """Every key of the file was added with a sentence that says why."""
    content = golden.read()
    assert all(entry["why"].strip() for entry in content["history"])
    added = {key for entry in content["history"] for key in entry["added"]}
    removed = {key for entry in content["history"] for key in entry.get("removed", [])}
    assert added - removed == set(content["bits"])


def test_golden_bits_that_two_settings_share_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where those of one setting are in the file already: nothing is overwritten in silence."""
    file = tmp_path / "golden.json"
    before = json.dumps({"history": [], "bits": {"case": {"weights": "as ever"}}})
    file.write_text(before)
    weights = dict.fromkeys(golden.SETTINGS, "as ever")
    monkeypatch.setattr(golden, "FILE", file)
    monkeypatch.setattr(golden, "compute_apart", lambda setting: {"case": {"weights": weights[setting]}})
    assert golden.write("nothing changes") == []
    weights["portable"] = "others"
    with pytest.raises(AssertionError, match="case: two settings of one key give different bits"):
        golden.write("one setting differs")
    assert file.read_text() == before
    weights = dict.fromkeys(golden.SETTINGS, "others")
    assert golden.write("all are others") == ["case"]
    assert golden.read()["bits"] == {"case": {"weights": "others"}}
    assert golden.read()["history"] == [{"why": "all are others", "added": [], "replaced": ["case"]}]


def test_golden_streams() -> None:
    """Data order and augmentation are drawn from these, which are the same on every machine; see above."""
    assert derive(0, "data order", 0) == 7573860489711797430
    assert torch.randperm(8, generator=generator(3, "data order", 1)).tolist() == [6, 7, 4, 1, 2, 3, 0, 5]
    changes = Changes(0, 2, 4, Augmentation(flip=True, crop=2))
    assert changes.offsets.tolist() == [[4, 4], [1, 4], [1, 0], [1, 3]]
    assert changes.flips.tolist() == [False, False, True, True]


# Rows of linear layers, which are trained without autograd.


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.92])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_row_is_trained_like_any_network(fraction: float, factor: int) -> None:
    """Under a loss of its own it is trained by autograd; a loss of twice the size asks for half the learning rate."""
    model, initial, mask = setting_of(perceptron, fraction)
    assert kernels.Perceptron.of(model) is not None
    recipe = Recipe(momentum=0.9, lr=0.05, weight_decay=0.0, batch_size=16, iterations=12)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return factor * nn.functional.cross_entropy(outputs, labels)

    usual = train(model, initial, mask, IMAGES, recipe, 0)
    own = train(model, initial, mask, IMAGES, recipe.model_copy(update={"lr": 0.05 / factor}), 0, loss=loss)
    assert usual.batch_losses.allclose(own.batch_losses / factor, rtol=1e-4)
    for name, weight in usual.weights.load().items():
        assert weight.allclose(own.weights.load()[name], rtol=1e-3, atol=1e-5), name
        assert not weight.equal(initial[name]), name


def test_a_row_is_trained_in_the_precision_asked_for() -> None:
    model, initial, mask = setting_of(perceptron)
    losses = [
        train(model, initial, mask, IMAGES, Recipe(batch_size=16, iterations=4, precision=precision), 0).batch_losses
        for precision in ("float32", "bfloat16")
    ]
    assert losses[0].allclose(losses[1], rtol=0.05)
    assert not losses[0].allclose(losses[1], rtol=1e-4)


# A pure function.


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["sgd"], OPTIMIZERS["adam"]], ids=["sgd", "adam"])
def test_nothing_that_goes_in_is_changed(optimizer: dict[str, Any]) -> None:
    model, initial, mask = setting_of(convolutions)
    recipe = Recipe(batch_size=5, epochs=2, augmentation=AUGMENTED, **optimizer)
    _, taken = _checkpoints(partial(train, model, initial, mask, IMAGES, recipe, 0))
    model.eval()
    inputs: list[Any] = [model.state_dict(), initial, tensors_of(IMAGES), vars(taken[4])]
    before = copy.deepcopy(inputs)
    torch.manual_seed(123)
    numbers = torch.get_rng_state()
    name = mask.hash
    train(model, initial, mask, IMAGES, recipe, 0, resume=taken[4])
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    assert torch.get_rng_state().equal(numbers)
    assert Mask.from_tensors(mask).hash == name
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(torch.tensor(1e-40) * 1) > 0, "numbers below the normal range are not flushed outside"


def test_data_are_not_changed_by_a_model_that_works_in_place() -> None:
    class Shift(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.add_(1)

    model = nn.Sequential(Shift(), nn.Linear(4, 3))
    before = copy.deepcopy(tensors_of(VECTORS))
    train(model, model.state_dict(), Mask.ones_like(model), VECTORS, Recipe(batch_size=5, epochs=1), 0)
    torch.testing.assert_close(tensors_of(VECTORS), before, rtol=0, atol=0)


@cases
def test_equal_arguments_give_equal_bits(case: Case) -> None:
    model, initial, mask = case.setting()
    recipe = case.recipe(momentum=0.9, augmentation=AUGMENTED)
    expected = _bits(train(model, initial, mask, IMAGES, recipe, 5))
    for state_of_the_world in range(3):
        torch.manual_seed(state_of_the_world)
        other = case.build()  # its own weights do not matter, nor does its mode
        other.train(state_of_the_world == 1)
        assert _bits(train(other, initial, mask, IMAGES, recipe, 5)) == expected


def test_what_is_not_equal_gives_other_bits() -> None:
    model, initial, mask = setting_of(convolutions)
    recipe = Recipe(batch_size=5, epochs=1)
    base: dict[str, Any] = {"initial": initial, "mask": mask, "data": IMAGES, "recipe": recipe, "seed": 0}
    shifted = dataclasses.replace(IMAGES, train_inputs=IMAGES.train_inputs + 1)
    others: list[dict[str, Any]] = [
        {},
        {"initial": initial_state(convolutions, 4)},
        {"mask": Mask.ones_like(model)},
        {"data": shifted},
        {"seed": 1},
        {"end": 4},
        {"begin": 1},
        {"recipe": recipe.model_copy(update={"precision": "bfloat16"})},
        {"recipe": recipe.model_copy(update={"weight_decay": 0.1})},
        {"recipe": recipe.model_copy(update={"augmentation": Augmentation(flip=True)})},
    ]
    assert len({train(model, **{**base, **other}).weights.hash for other in others}) == len(others)


def test_a_mask_decides_what_is_pruned_in_the_initial_state() -> None:
    model, initial, mask = setting_of(perceptron)
    recipe = Recipe(batch_size=5, epochs=1)
    spoilt = {name: torch.where(mask[name], t, math.nan) if name in mask else t for name, t in initial.items()}
    for state in (apply_mask(initial, mask), spoilt):
        assert _bits(train(model, state, mask, IMAGES, recipe, 0)) == _bits(
            train(model, initial, mask, IMAGES, recipe, 0)
        )


def test_the_number_of_threads_and_the_global_numbers_are_as_they_were_after_an_error() -> None:
    model, initial, mask = setting_of(small)
    before = torch.get_rng_state()

    def failing(outputs: Tensor, labels: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(model, initial, mask, VECTORS, Recipe(batch_size=5, epochs=1), 0, loss=failing)
    assert torch.get_rng_state().equal(before)
    assert float(torch.tensor(1e-40) * 1) > 0


# Pruned weights.


def _is_exactly_zero(values: Tensor) -> bool:
    return bool((values.view(torch.int32) == 0).all())  # not even -0.0


@optimizers
@cases
def test_pruned_weights_are_exactly_zero_after_every_step(case: Case, optimizer: dict[str, Any]) -> None:
    model, initial, mask = case.setting()
    recipe = case.recipe(lr=0.02, weight_decay=0.1, **optimizer)
    trained, taken = _checkpoints(partial(train, model, initial, mask, IMAGES, recipe, 0))
    assert len(taken) == case.iterations
    for state in (*(checkpoint.state for checkpoint in taken.values()), trained.weights.load()):
        for name, alive in mask.items():
            assert _is_exactly_zero(state[name][~alive])
            assert (state[name][alive] != 0).all()
            assert not state[name][alive].equal(initial[name][alive])


def test_a_layer_without_connections_stays_so_and_its_bias_learns() -> None:
    model, initial, _ = setting_of(small)
    mask = Mask.from_tensors({"0.weight": torch.zeros(5, 4, dtype=torch.bool), "2.weight": torch.ones(3, 5).bool()})
    state = train(model, initial, mask, VECTORS, Recipe(batch_size=5, epochs=1), 0).weights.load()
    assert _is_exactly_zero(state["0.weight"])
    assert not state["0.bias"].equal(initial["0.bias"])


def test_a_layer_that_is_not_in_the_mask_trains_densely() -> None:
    model, initial, _ = setting_of(small)
    mask = Mask.from_tensors({"2.weight": torch.zeros(3, 5, dtype=torch.bool)})
    state = train(model, initial, mask, VECTORS, Recipe(batch_size=5, epochs=1), 0).weights.load()
    assert _is_exactly_zero(state["2.weight"])
    assert state["0.weight"].equal(initial["0.weight"]), "no gradient comes through"
    assert not state["2.bias"].equal(initial["2.bias"])


class Tied(nn.Module):
    """Two layers with one weight, which a state holds twice and a mask once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.second(self.first(inputs).tanh()))
        return outputs


def test_pruned_weights_that_layers_share() -> None:
    model, initial, mask = setting_of(Tied)
    assert list(mask) == ["first.weight", "last.weight"]
    recipe = Recipe(momentum=0.9, weight_decay=0.1, batch_size=5, epochs=1)
    trained, taken = _checkpoints(partial(train, model, initial, mask, VECTORS, recipe, 0))
    for state in (*(checkpoint.state for checkpoint in taken.values()), trained.weights.load()):
        assert _is_exactly_zero(state["first.weight"][~mask["first.weight"]])
        assert state["second.weight"].equal(state["first.weight"])


def test_a_frozen_weight_keeps_its_value_and_its_mask() -> None:
    model, initial, mask = setting_of(small)
    model.get_parameter("0.weight").requires_grad_(False)
    recipe = Recipe(optimizer="adamw", weight_decay=0.1, batch_size=5, epochs=1)
    state = train(model, initial, mask, VECTORS, recipe, 0).weights.load()
    assert state["0.weight"].equal(apply_mask(initial, mask)["0.weight"])
    assert not state["2.weight"].equal(apply_mask(initial, mask)["2.weight"])


# Resuming.


def _store_and_read(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as it comes back from a file: no layout in memory but the usual one."""
    return dataclasses.replace(
        checkpoint,
        state={name: tensor.contiguous() for name, tensor in checkpoint.state.items()},
        optimizer={name: tensor.contiguous() for name, tensor in checkpoint.optimizer.items()},
    )


@optimizers
@pytest.mark.parametrize("case", [CASES["convolutions"], CASES["sparse convolutions"]], ids=["dense", "sparse"])
def test_resuming_at_any_iteration_gives_equal_bits(case: Case, optimizer: dict[str, Any]) -> None:
    model, initial, mask = case.setting()
    fields: dict[str, Any] = {"schedule": "cosine", "warmup": 3, "augmentation": AUGMENTED}
    recipe = case.recipe(lr=0.05, weight_decay=0.01, **optimizer, **fields)
    run = partial(train, model, initial, mask, IMAGES, recipe, 0, begin=1)
    expected, taken = _checkpoints(run)
    assert list(taken) == list(range(2, case.iterations + 1))
    for checkpoint in taken.values():
        assert _bits(run(resume=_store_and_read(checkpoint))) == _bits(expected)
        assert _bits(run(resume=checkpoint)) == _bits(expected)


def test_resuming_a_resumed_training() -> None:
    model, initial, mask = setting_of(perceptron)
    recipe = Recipe(momentum=0.9, nesterov=True, batch_size=5, epochs=3)
    run = partial(train, model, initial, mask, IMAGES, recipe, 0)
    expected, first = _checkpoints(run)
    _, second = _checkpoints(partial(run, resume=first[3]))
    assert list(second) == list(range(4, 16))
    assert _bits(run(resume=second[9])) == _bits(expected)


def test_a_checkpoint_does_not_change_while_the_training_goes_on() -> None:
    model, initial, mask = setting_of(convolutions)
    recipe = Recipe(optimizer="adam", batch_size=5, epochs=2)
    kept: list[Checkpoint] = []
    copies: list[dict[str, Any]] = []

    def watch(iteration: int, take: Callable[[], Checkpoint]) -> None:
        kept.append(take())
        copies.append(copy.deepcopy(vars(kept[-1])))

    train(model, initial, mask, IMAGES, recipe, 0, watch=watch)
    torch.testing.assert_close([vars(checkpoint) for checkpoint in kept], copies, rtol=0, atol=0)


# Parts of a training.


@pytest.mark.parametrize("schedule", ["constant", "milestones", "cosine"])
@pytest.mark.parametrize("case", [CASES["convolutions"], CASES["sparse convolutions"]], ids=["dense", "sparse"])
def test_data_order_and_learning_rate_go_on_from_the_beginning_iteration(
    case: Case, schedule: Literal["constant", "milestones", "cosine"]
) -> None:
    """Plain SGD has no state: two parts of a training, also cut within an epoch, are the whole."""
    model, initial, mask = case.setting()
    milestones = {"milestones": (1, 2)} if schedule == "milestones" else {}
    recipe = case.recipe(schedule=schedule, warmup=6, epochs=3, augmentation=AUGMENTED, **milestones)
    epoch = recipe.iterations_per_epoch(EXAMPLES)
    whole = train(model, initial, mask, IMAGES, recipe, 0)
    for split in (1, epoch, epoch + 1, 2 * epoch):
        first = train(model, initial, mask, IMAGES, recipe, 0, end=split)
        second = train(model, first.weights.load(), mask, IMAGES, recipe, 0, begin=split)
        assert second.weights.hash == whole.weights.hash
        assert second.history.test_accuracy == whole.history.test_accuracy
        assert second.history.test_loss == whole.history.test_loss
        # The epoch that was cut has a mean in each part.
        cut, at = divmod(split, epoch)
        assert len(first.history.losses) == cut + (at > 0)
        assert len(second.history.losses) == 3 - cut
        if at:
            both = (first.history.losses[-1] * at + second.history.losses[0] * (epoch - at)) / epoch
            assert both == pytest.approx(whole.history.losses[cut], rel=1e-12)
        else:
            assert first.history.losses + second.history.losses == whole.history.losses


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["momentum"], OPTIMIZERS["adam"]], ids=["momentum", "adam"])
def test_the_optimizer_starts_fresh(optimizer: dict[str, Any]) -> None:
    model, initial, mask = setting_of(small)
    recipe = Recipe(batch_size=5, epochs=2, **optimizer)
    whole = train(model, initial, mask, VECTORS, recipe, 0)
    _, taken = _checkpoints(partial(train, model, initial, mask, VECTORS, recipe, 0, end=4))
    parts = train(model, taken[4].state, mask, VECTORS, recipe, 0, begin=4)
    assert parts.weights.hash != whole.weights.hash
    bare = Checkpoint(4, taken[4].state, batch_losses=taken[4].batch_losses)
    assert train(model, initial, mask, VECTORS, recipe, 0, resume=bare).weights.hash == parts.weights.hash


def test_losses_are_means_over_the_batches_of_an_epoch() -> None:
    model, initial, mask = setting_of(small)
    recipe = Recipe(lr=1e-30, batch_size=5, iterations=8)  # nothing is learnt
    history = train(model, initial, mask, VECTORS, recipe, 0).history
    model.load_state_dict(apply_mask(initial, mask))
    with torch.no_grad():
        each = [float(nn.functional.cross_entropy(model(x), y)) for x, y in batches(VECTORS, recipe, 0, 0, 8)]
    assert history.losses == pytest.approx([sum(each[:5]) / 5, sum(each[5:]) / 3], rel=1e-6)
    assert history.test_accuracy == evaluate(model, VECTORS)[0]


def test_an_epoch_that_is_not_over_has_no_mean() -> None:
    losses = Losses(begin=0, end=6, per_epoch=3, device="cpu")
    for loss in (1.0, 2.0, 6.0, 5.0):
        losses.append(torch.tensor(loss))
    assert losses.epoch_means() == (3.0,)


def test_divergence_is_seen_within_a_long_epoch() -> None:
    losses, seen = Losses(begin=0, end=200, per_epoch=120), []
    for iteration in range(130):
        losses.append(torch.tensor(math.nan if iteration == 60 else 1.0))
        seen += [losses.iteration] * losses.have_diverged()
    assert seen == [100, 120]


def test_each_epoch_is_told_when_it_ends() -> None:
    model, initial, mask = setting_of(small)
    told: list[tuple[int, int]] = []
    recipe = Recipe(batch_size=5, iterations=8)  # an epoch of 5 and a part of another
    train(model, initial, mask, VECTORS, recipe, 0, on_epoch=lambda at, losses: told.append((at, len(losses))))
    assert told == [(5, 1), (8, 2)]


def test_weights_of_a_layer_without_connections_stay_zero() -> None:
    model, initial, mask = setting_of(small)
    mask = Mask.from_tensors({name: mask[name] & (name != "0.weight") for name in mask})
    seen: list[Tensor] = []
    recipe = Recipe(batch_size=5, iterations=2)
    train(model, initial, mask, VECTORS, recipe, 0, watch=lambda _, take: seen.append(take().state["0.weight"]))
    assert not torch.stack(seen).any()


def test_a_batch_may_have_all_examples_and_no_training_more_iterations_than_are_kept() -> None:
    check_recipe_fits(Recipe(batch_size=EXAMPLES, epochs=1), VECTORS)
    with pytest.raises(UserError, match=r"recipe.accumulate: 5 batches of 5 are more than the 22 training examples"):
        check_recipe_fits(Recipe(batch_size=5, accumulate=5, epochs=1), VECTORS)
    with pytest.raises(UserError, match=r"would have 1000000001 iterations; at most 1000000000 are possible"):
        check_recipe_fits(Recipe(batch_size=5, iterations=10**9 + 1), VECTORS)


def test_a_loss_of_ones_own() -> None:
    model, initial, mask = setting_of(small)

    def distance(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - nn.functional.one_hot(labels, 3)).square().mean()

    trained = train(model, initial, mask, VECTORS, Recipe(batch_size=5, epochs=1), 0, loss=distance)
    model.load_state_dict(trained.weights.load())
    model.eval()
    expected = distance(model(VECTORS.test_inputs), VECTORS.test_labels).item()
    assert trained.history.test_loss == pytest.approx(expected, rel=1e-6)


def test_it_learns() -> None:
    model, initial, _ = setting_of(perceptron)
    mask = Mask.ones_like(model)
    history = train(model, initial, mask, IMAGES, Recipe(lr=0.05, batch_size=5, epochs=20), 0).history
    assert history.losses[-1] < history.losses[0] / 5
    assert history.test_accuracy == 1.0


# Learning rates.


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(lr=0.5, batch_size=10, epochs=2), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (Recipe(lr=0.5, batch_size=10, epochs=2, warmup=4), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]),
        (
            Recipe(lr=1.0, batch_size=10, epochs=4, schedule="milestones", milestones=(1, 3), gamma=0.5),
            [1.0] * 3 + [0.5] * 6 + [0.25] * 3,
        ),
        (
            Recipe(lr=1.0, batch_size=10, iterations=6, schedule="milestones", milestones=(1, 9), gamma=0.1, warmup=4),
            [0.25, 0.5, 0.75, 0.1, 0.1, 0.1],
        ),
        (
            Recipe(lr=0.2, batch_size=10, epochs=2, schedule="cosine"),
            [0.2, 0.1 * (1 + math.sqrt(3) / 2), 0.15, 0.1, 0.05, 0.1 * (1 - math.sqrt(3) / 2)],
        ),
        (
            Recipe(lr=1.0, batch_size=10, iterations=4, schedule="cosine", warmup=2),
            [0.5, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
    ],
    ids=["constant", "warm-up", "milestones", "milestones and warm-up", "cosine", "cosine and warm-up"],
)  # fmt: skip
def test_lr_at(recipe: Recipe, expected: list[float]) -> None:
    examples = 25  # 3 iterations an epoch, the last of 5 examples
    assert recipe.total_iterations(examples) == len(expected)
    assert [recipe.lr_at(t, examples) for t in range(len(expected))] == pytest.approx(expected, rel=1e-14)


def test_the_learning_rate_is_that_of_the_iteration() -> None:
    """One weight, a constant gradient: each step is the learning rate."""
    data = Dataset("ones", torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), torch.ones(1, 1),
                   torch.zeros(1, dtype=torch.int64), ("a",))  # fmt: skip
    model = nn.Linear(1, 1, bias=False)
    recipe = Recipe(lr=0.5, batch_size=2, epochs=2, schedule="milestones", milestones=(1,), warmup=2)
    run = partial(train, model, {"weight": torch.zeros(1, 1)}, Mask.ones_like(model), data, recipe, 0,
                  loss=lambda outputs, labels: -outputs.mean())  # fmt: skip
    _, taken = _checkpoints(run)
    assert [float(taken[t].state["weight"]) for t in taken] == pytest.approx([0.25, 0.75, 0.8, 0.85], rel=1e-6)


# Batches.


def _number_examples(examples: int) -> Dataset:
    """A data set whose examples are their own numbers, as inputs and as labels."""
    labels = torch.arange(examples)
    inputs = labels.view(-1, 1, 1, 1) * 16 + torch.arange(12).view(1, 1, 3, 4)
    names = tuple(map(str, range(examples)))
    return Dataset(
        "numbered", inputs.to(torch.uint8), labels, inputs[:1].to(torch.uint8), labels[:1], names, (0.0,), (1.0,)
    )


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_an_epoch_has_each_example_once_also_where_gradients_of_batches_are_summed(accumulate: int) -> None:
    numbers = torch.arange(14)
    data = Dataset("rows", numbers[:, None].float(), numbers, numbers[:1, None].float(), numbers[:1], ())
    recipe = Recipe(batch_size=2, accumulate=accumulate, epochs=2)
    for epoch in range(2):
        begin = epoch * recipe.iterations_per_epoch(14)
        steps = list(iterations(data, recipe, 3, begin, begin + recipe.iterations_per_epoch(14)))
        labels = [label.tolist() for step in steps for _, label in step]
        assert [len(each) for each in labels] == 7 * [2]
        assert [len(step) for step in steps[:-1]] == (len(steps) - 1) * [accumulate]
        assert sorted(itertools.chain(*labels)) == numbers.tolist()


def test_an_epoch_is_a_permutation_and_its_last_batch_may_be_smaller() -> None:
    data = _number_examples(10)
    recipe = Recipe(batch_size=4, epochs=3)
    epochs = []
    for epoch in range(3):
        labels = [labels.tolist() for _, labels in batches(data, recipe, 0, 3 * epoch, 3 * epoch + 3)]
        assert [len(batch) for batch in labels] == [4, 4, 2]
        epochs.append([label for batch in labels for label in batch])
        assert sorted(epochs[-1]) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 7),
    begin=st.integers(0, 15),
    length=st.integers(0, 15),
    crop=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_batches_may_be_taken_up_at_any_iteration(batch: int, begin: int, length: int, crop: int, seed: int) -> None:
    data = _number_examples(7)
    recipe = Recipe(batch_size=batch, iterations=30, augmentation=Augmentation(crop=crop))
    whole = list(batches(data, recipe, seed, 0, begin + length))[begin:]
    part = list(batches(data, recipe, seed, begin, begin + length))
    assert len(whole) == len(part) == length
    for (inputs, labels), (same_inputs, same_labels) in zip(whole, part, strict=True):
        assert inputs.equal(same_inputs)
        assert labels.equal(same_labels)


def _by_example(data: Dataset, recipe: Recipe, seed: int, epochs: int) -> dict[tuple[int, int], list[float]]:
    per_epoch = recipe.iterations_per_epoch(len(data.train_inputs))
    return {
        (epoch, int(label)): image.flatten().tolist()
        for epoch in range(epochs)
        for inputs, labels in batches(data, recipe, seed, epoch * per_epoch, (epoch + 1) * per_epoch)
        for image, label in zip(inputs, labels, strict=True)
    }


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    flip=st.booleans(),
    crop=st.integers(0, 2),
    seed=st.integers(0, 2**40),
)
def test_augmentation_is_decided_by_seed_epoch_and_example_alone(
    sizes: tuple[int, int], flip: bool, crop: int, seed: int
) -> None:
    data = _number_examples(9)
    images = []
    for size in sizes:
        recipe = Recipe(batch_size=size, epochs=2, augmentation=Augmentation(flip=flip, crop=crop))
        images.append(_by_example(data, recipe, seed, 2))
    assert len(images[0]) == 2 * 9
    assert images[0] == images[1]


def test_augmentation_differs_by_seed_epoch_and_example() -> None:
    data = _number_examples(9)
    recipe = Recipe(batch_size=3, epochs=2, augmentation=Augmentation(crop=2))
    one, other = (_by_example(data, recipe, seed, 2) for seed in (0, 1))
    assert one != other
    assert [one[0, label] for label in range(9)] != [one[1, label] for label in range(9)]
    changes = Changes(0, 0, 1000, Augmentation(flip=True, crop=2))
    assert set(map(tuple, changes.offsets.tolist())) == set(itertools.product(range(5), repeat=2))
    assert 400 < int(changes.flips.sum()) < 600
    assert not Changes(0, 0, 1000, Augmentation(crop=2)).flips.any()
    assert not Changes(0, 0, 1000, Augmentation(flip=True)).offsets.any()


def test_flips_and_crops() -> None:
    image = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=torch.uint8)
    changes = Changes(0, 0, 5, Augmentation(flip=True, crop=1))
    changes.offsets = torch.tensor([[1, 1], [1, 1], [0, 0], [2, 1], [0, 2]])
    changes.flips = torch.tensor([False, True, False, False, True])
    chosen = torch.tensor([4, 0, 1, 2, 3])
    changed = changes.apply(torch.stack([image * (number + 1) for number in chosen.tolist()]), chosen)
    expected = {
        0: [[1, 2, 3], [4, 5, 6]],  # in the middle: as it was
        1: [[3, 2, 1], [6, 5, 4]],  # flipped
        2: [[0, 0, 0], [0, 1, 2]],  # the upper left corner of the padded image
        3: [[4, 5, 6], [0, 0, 0]],  # one row further down
        4: [[0, 0, 0], [0, 3, 2]],  # up and to the right, then flipped
    }
    assert changed.dtype == torch.uint8
    for position, number in enumerate(chosen.tolist()):
        assert (changed[position, 0] // (number + 1)).tolist() == expected[number], number


@pytest.mark.parametrize("crop", [0, 1, 3])
@pytest.mark.parametrize(("flip", "channels", "batch"), [(True, 2, 50), (False, 1, 50), (True, 3, 1), (True, 1, 1)])
def test_images_that_the_kernels_augment_have_the_bits_and_the_layout_of_others(
    crop: int, flip: bool, channels: int, batch: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, channels, 3, 5), generator=draw, dtype=torch.uint8)
    mean, scale = 255 * torch.rand((channels, 1, 1), generator=draw), torch.rand((channels, 1, 1), generator=draw)
    changes, chosen = Changes(0, 0, 60, Augmentation(flip=flip, crop=crop)), torch.randperm(60, generator=draw)[:batch]
    expected = kernels.normalise(changes.apply(images[chosen], chosen), mean, scale)
    others = images.to(memory_format=torch.channels_last)  # which the kernels do not support
    for found in (changes.read(images, chosen, mean, scale), changes.read(others, chosen, mean, scale)):
        assert found.equal(expected)
        assert found.stride() == expected.stride()
    made = kernels.augment_images(images, chosen, changes.offsets, changes.flips, crop, mean, scale)
    assert (made is not None) == kernels.available()


def test_channels_are_changed_alike() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    changes = Changes(0, 0, 2, Augmentation(flip=True, crop=0))
    changes.flips = torch.tensor([True, False])
    changed = changes.apply(images, torch.tensor([0, 1]))
    assert changed[0].equal(images[0].flip(2))
    assert changed[1].equal(images[1])


def test_normalisation() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).repeat(2, 2, 1, 1)
    expected = (pixels.double() / 255 - torch.tensor([0.4, 0.5]).view(2, 1, 1)) / torch.tensor([0.2, 0.3]).view(2, 1, 1)
    ready = normalisation(IMAGES)(pixels)
    assert ready.dtype == torch.float32
    torch.testing.assert_close(ready.double(), expected, rtol=1e-6, atol=1e-6)
    assert normalisation(VECTORS)(VECTORS.test_inputs).equal(VECTORS.test_inputs)


def test_a_model_sees_the_examples_of_its_batches() -> None:
    seen: list[Tensor] = []

    class Recorded(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                seen.append(inputs.clone())
            return super().forward(inputs)

    model = Recorded(4, 3)
    recipe = Recipe(batch_size=5, epochs=2)
    train(model, model.state_dict(), Mask.ones_like(model), VECTORS, recipe, 9)
    assert [len(inputs) for inputs in seen] == [5, 5, 5, 5, 2] * 2
    for epoch in range(2):
        order = torch.randperm(EXAMPLES, generator=generator(9, "data order", epoch))
        assert torch.cat(seen[5 * epoch : 5 * epoch + 5]).equal(VECTORS.train_inputs[order])


# What comes out.


def test_predictions_are_in_evaluation_mode_whatever_the_number_of_examples() -> None:
    inputs = torch.randn(1203, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1203, dtype=torch.int64)
    data = Dataset("many", inputs, labels, inputs, labels, ("a", "b"))
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9))
    outputs = predict(model, data)
    torch.testing.assert_close(outputs, model.eval()(inputs), rtol=1e-5, atol=1e-6)
    accuracy, loss = evaluate(model, data)
    assert accuracy == float((outputs.argmax(1) == 0).double().mean())
    assert loss == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-6)


def test_the_whole_state_comes_out_in_the_usual_layout() -> None:
    model, initial, mask = setting_of(convolutions)
    state = train(model, initial, mask, IMAGES, Recipe(batch_size=5, epochs=1), 0).weights.load()
    assert list(state) == list(model.state_dict())
    assert state["1.num_batches_tracked"] == 5
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("history", [History(), History((0.5, 1e-300), 0.97, 0.1), History((2.0,), diverged_at=3)])
def test_history_comes_back_from_json(history: History) -> None:
    assert History.from_json(history.to_json()) == history


def test_a_part_of_no_iterations_is_the_masked_initial_state() -> None:
    model, initial, mask = setting_of(small)
    trained = train(model, initial, mask, VECTORS, Recipe(batch_size=5, epochs=1), 0, begin=3, end=3)
    torch.testing.assert_close(trained.weights.load(), apply_mask(initial, mask), rtol=0, atol=0)
    assert trained.history.losses == ()


# Divergence.


@optimizers
def test_divergence_is_a_result_that_says_so(optimizer: dict[str, Any]) -> None:
    model, initial, mask = setting_of(perceptron)
    recipe = Recipe(lr=1e30, batch_size=5, epochs=40, **optimizer)
    trained, taken = _checkpoints(partial(train, model, initial, mask, IMAGES, recipe, 0))
    history = trained.history
    assert history.diverged_at is not None
    assert 0 <= history.diverged_at < 200
    assert max(taken, default=0) == history.diverged_at, "it stops there"
    assert history.test_accuracy is None
    assert history.test_loss is None
    assert all(math.isfinite(loss) for loss in history.losses)
    for name, alive in mask.items():
        assert _is_exactly_zero(trained.weights.load()[name][~alive])
    assert History.from_json(history.to_json()) == history
    again = train(model, initial, mask, IMAGES, recipe, 0)
    assert again.history == history


def test_divergence_at_the_very_end_is_seen_in_the_weights() -> None:
    model, initial, mask = setting_of(small)
    recipe = Recipe(lr=1e38, batch_size=5, iterations=1)
    history = train(model, initial, mask, VECTORS, recipe, 0, loss=lambda outputs, labels: 1e5 * outputs.sum()).history
    assert len(history.losses) == 1
    assert math.isfinite(history.losses[0])
    assert (history.diverged_at, history.test_accuracy) == (0, None)


def test_a_buffer_that_is_infinite_by_design_is_no_divergence() -> None:
    class Attending(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("forbidden", torch.tensor([0.0, -math.inf]))

    own, shared = Attending(), nn.Sequential(Attending(), nn.Linear(3, 4), Attending())
    shared[2].register_buffer("forbidden", shared[0].get_buffer("forbidden"))
    for model in (own, shared):
        history = train(
            model, model.state_dict(), Mask.ones_like(model), VECTORS, Recipe(batch_size=5, epochs=1), 0
        ).history
        assert history.diverged_at is None
        assert history.test_accuracy is not None


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int8],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pruned_weights_are_zero_whatever_they_were(dtype: torch.dtype, layout: torch.memory_format) -> None:
    numbers = [-1.5, 2.5, -0.0, math.inf, -math.inf, math.nan] if dtype.is_floating_point else [-1, 2, 0, 3, -4, 5]
    weight = torch.tensor(numbers * 8, dtype=dtype).view(4, 3, 2, 2).to(memory_format=layout)
    alive = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = apply_mask({"w": weight}, Mask.from_tensors({"w": alive}))["w"]
    assert kept.dtype == dtype
    assert kept[alive].view(torch.int8).equal(weight[alive].view(torch.int8))
    assert not kept[~alive].view(torch.int8).any()


def test_large_numbers_whose_sum_is_infinite_are_no_divergence() -> None:
    model = nn.Linear(4, 3)
    model.register_buffer("large", torch.full((4,), 3e38))
    history = train(
        model, model.state_dict(), Mask.ones_like(model), VECTORS, Recipe(batch_size=5, epochs=1), 0
    ).history
    assert history.diverged_at is None


def test_divergence_is_seen_at_the_end_of_its_epoch() -> None:
    """Epochs of 5 iterations; the loss is not finite from iteration 6 on."""
    model, initial, mask = setting_of(small)
    calls = iter(range(100))

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum() * (math.nan if next(calls) >= 6 else 1e-3)

    history = train(model, initial, mask, VECTORS, Recipe(batch_size=5, epochs=4), 0, loss=loss).history
    assert (history.diverged_at, len(history.losses)) == (9, 1)


# Errors.


@pytest.mark.parametrize(
    ("recipe", "data", "text"),
    [
        (
            Recipe(batch_size=23, epochs=1),
            IMAGES,
            "recipe.batch_size: 23 is more than the 22 training examples of 'images'",
        ),
        (
            Recipe(batch_size=5, epochs=2, rewind=10),
            IMAGES,
            "recipe.rewind: iteration 10 is not within the training, which has 10",
        ),
        (
            Recipe(batch_size=5, epochs=2, augmentation=Augmentation(flip=True)),
            VECTORS,
            "recipe.augmentation: it needs images (uint8), but 'vectors' has other inputs",
        ),
    ],
    ids=["batch", "rewind", "augmentation"],
)
def test_a_recipe_that_does_not_fit_the_data(recipe: Recipe, data: Dataset, text: str) -> None:
    model, initial, mask = setting_of(perceptron)
    with pytest.raises(UserError) as error:
        train(model, initial, mask, data, recipe, 0)
    assert str(error.value) == text


def test_a_state_or_mask_of_another_network() -> None:
    model, initial, mask = setting_of(small)
    recipe = Recipe(batch_size=5, epochs=1)
    with pytest.raises(
        UserError, match=r"^the state does not fit .* '0.weight' of shape \(5, 5\), .* of shape \(5, 4\)"
    ):
        train(model, {**initial, "0.weight": torch.zeros(5, 5)}, Mask.from_tensors({}), VECTORS, recipe, 0)
    with pytest.raises(UserError, match=r"^the state does not fit the model: it lacks '2\.bias', which the model has$"):
        train(model, {n: t for n, t in initial.items() if n != "2.bias"}, mask, VECTORS, recipe, 0)
    text = r"^the mask does not fit the model: it has layer 'fc' of shape \(2,\), the model has no such weight"
    with pytest.raises(UserError, match=text):
        train(model, initial, Mask.from_tensors({"fc": torch.ones(2).bool()}), VECTORS, recipe, 0)
    other = Mask.from_tensors({"0.weight": torch.ones(4, 5).bool()})
    text = r"^the mask does not fit the model: .* '0.weight' of shape \(4, 5\), the model has one of shape \(5, 4\)"
    with pytest.raises(UserError, match=text):
        train(model, apply_mask(initial, mask), other, VECTORS, recipe, 0)


@pytest.mark.parametrize("narrow", [True, False])
def test_convolutions_that_onednn_computes_out_of_bounds_have_no_stride(narrow: bool) -> None:
    seen: list[tuple[int, ...]] = []

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen = nn.Conv2d(2, 4 if narrow else 16, 3, padding=1)
            self.shortcut = nn.Conv2d(self.widen.out_channels, 8, 1, stride=2, bias=False)
            self.out = nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.shortcut(self.widen(x))
            if isinstance(y, Tensor) and y.grad_fn is not None:  # not while it is traced
                seen.append(y.grad_fn._saved_stride)
            outputs: Tensor = self.out(y.flatten(1))
            return outputs

    model, recipe = Strided(), Recipe(epochs=1, batch_size=8)
    try_network(lambda: model, nn.functional.cross_entropy, IMAGES, recipe, [])
    mask = Mask.ones_like(model)
    train(model, model.state_dict(), mask, IMAGES, recipe, seed=0, end=1, metrics=[])
    arguments: dict[str, Any] = {"model": model, "state": model.state_dict(), "data": IMAGES, "seed": 0}
    score_network(SCORES["taylor"], mask, loss=nn.functional.cross_entropy, examples=8, **arguments)
    assert seen == [(1, 1) if narrow else (2, 2)] * 3


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize(
    "how",
    [
        {"stride": 2},
        {"stride": (1, 3)},
        {"stride": 3, "padding": (2, 1), "groups": 2},
        {"stride": 2, "padding": "valid"},
    ],
)
def test_sound_convolutions_are_those_of_torch(how: dict[str, Any], dims: int) -> None:
    layer = nn.Conv2d(4, 6, 1, **how, dtype=torch.float64)
    x = torch.randn((2, 4, 7, 6)[4 - dims :], dtype=torch.float64, requires_grad=True)
    exact = layer(x)
    with sound_convolutions(layer, "cpu"), sound_convolutions(layer, "cpu"):
        sound = layer(x)
    assert torch.allclose(sound, exact, rtol=1e-12, atol=1e-12)
    delta = torch.randn_like(exact)
    needed = (x, *layer.parameters())
    for a, b in zip(*(torch.autograd.grad(y, needed, delta) for y in (sound, exact)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(KeyError), sound_convolutions(layer, "cpu"):
        raise KeyError
    assert nn.functional.conv2d is torch.conv2d


@pytest.mark.parametrize("arguments", [{"stride": [2]}, {"stride": (2,), "padding": [1]}, {"padding": "same"}])
def test_sound_convolutions_take_what_those_of_torch_take(arguments: dict[str, Any]) -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 1, 1)
    with sound_convolutions(nn.Conv2d(4, 8, 1, stride=2), "cpu"):
        sound = nn.functional.conv2d(x, weight, **arguments)
        for wrong in (
            {"stride": 2, "padding": "same"},
            {"stride": 0},
            {"stride": 2, "padding": -1},
            {"stride": (2, 2, 2)},
        ):
            with pytest.raises(RuntimeError):
                nn.functional.conv2d(x, weight, **wrong)  # type: ignore[arg-type]
    assert torch.allclose(sound, torch.conv2d(x, weight, **arguments), atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_that_is_computed_again_for_its_gradient_has_sound_convolutions(reentrant: bool) -> None:
    strides = []

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen = nn.Conv2d(2, 4, 3, padding=1)
            self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
            self.out = nn.Linear(72, 3)

        def compute(self, x: Tensor) -> Tensor:
            y: Tensor = self.shortcut(x)
            if isinstance(y, Tensor) and y.grad_fn is not None:
                strides.append(y.grad_fn._saved_stride)
            return y.relu()

        def forward(self, x: Tensor) -> Tensor:
            y: Any = self.widen(x)
            y = compute_again(self.compute, y, use_reentrant=reentrant) if torch.is_grad_enabled() else self.compute(y)
            outputs: Tensor = self.out(y.flatten(1))
            return outputs

    model, recipe = Recomputed(), Recipe(epochs=1, batch_size=8)
    train(model, model.state_dict(), Mask.ones_like(model), IMAGES, recipe, seed=0, end=1, metrics=[])
    assert strides
    assert set(strides) == {(1, 1)}

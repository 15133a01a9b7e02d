"""The recipe's options: what they compute beside torch's own, what they are named, and going on from a checkpoint."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tombola
from tombola.errors import UserError
from tombola.importance import find, l1
from tombola.lottery.find import find_tickets
from tombola.lottery.rewinding import lottery_ticket_rewinding
from tombola.lottery.rule import check_score_at
from tombola.pruning.mask import Mask
from tombola.store.checkpoints import checkpoint_from_bytes, checkpoint_to_bytes
from tombola.training.accumulation import accumulate
from tombola.training.batches import iterations
from tombola.training.history import Checkpoint, History, Trained
from tombola.training.loss_functions import count_positions
from tombola.training.optimizer import find_decayed
from tombola.training.own_optimizer import OwnOptimizer, check_optimizer
from tombola.training.recipe import Recipe
from tombola.training.train import train
from tombola.training.weights import Weights
from training_cases import EXAMPLES, IMAGES, VECTORS, convolutions, perceptron, setting_of, small

LATER: dict[str, Any] = {
    "betas": {"optimizer": "adam", "betas": (0.8, 0.99)},
    "no_decay": {"weight_decay": 0.1, "no_decay": ["*.bias"]},
    "clip_norm": {"clip_norm": 0.5},
    "accumulate": {"accumulate": 2},
    "drop_last": {"drop_last": True},
    "label_smoothing": {"label_smoothing": 0.2},
}


def loop(recipe: Recipe, make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    """Return the weights of a training by hand, with torch's own functions."""
    model, initial, _ = setting_of(small)
    model.load_state_dict(initial)
    optimizer = make(model)
    for batches in iterations(VECTORS, recipe, 0, 0, recipe.total_iterations(EXAMPLES)):
        optimizer.zero_grad()
        inputs = torch.cat([inputs for inputs, _ in batches])  # type: ignore[misc]
        labels = torch.cat([labels for _, labels in batches])  # type: ignore[misc]
        functional.cross_entropy(model(inputs), labels, label_smoothing=recipe.label_smoothing).backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def dense(recipe: Recipe, **options: Any) -> list[Tensor]:
    model, initial, mask = setting_of(small)
    everything = Mask.from_tensors({name: torch.ones(shape).bool() for name, shape in mask.shapes.items()})
    return list(train(model, initial, everything, VECTORS, recipe, 0, **options).weights.load().values())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, fused=True)


def groups(model: nn.Module) -> torch.optim.Optimizer:
    biases = [each for name, each in model.named_parameters() if name.endswith("bias")]
    others = [each for name, each in model.named_parameters() if not name.endswith("bias")]
    parts = [{"params": others, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(parts, 0.1, (0.8, 0.99), fused=True)


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({"clip_norm": 0.3}, sgd),
        ({"label_smoothing": 0.2}, sgd),
        ({"accumulate": 2}, sgd),
        ({"accumulate": 3, "drop_last": True}, sgd),
        ({"optimizer": "adamw", "betas": (0.8, 0.99), "weight_decay": 0.3, "no_decay": ("*.bias",)}, groups),
    ],
    ids=["clip", "smoothing", "accumulate", "drop", "groups"],
)
def test_a_training_is_that_of_a_loop_by_hand(
    fields: dict[str, Any], make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    recipe = Recipe(epochs=3, batch_size=5, **fields)
    for one, other in zip(dense(recipe), loop(recipe, make), strict=True):
        torch.testing.assert_close(one, other)
    plain = loop(Recipe(epochs=3, batch_size=5), sgd)
    assert not all(one.allclose(other) for one, other in zip(dense(recipe), plain, strict=True))


def test_accumulated_batches_count_by_the_tokens_that_a_loss_does_not_ignore() -> None:
    model, inputs = nn.Linear(3, 4), torch.randn(8, 5, 3)
    labels = torch.randint(4, (8, 5))
    labels[0, 1:] = labels[4:6] = -100

    def compute(inputs: Any, labels: Any) -> Tensor:
        loss = functional.cross_entropy(model(inputs).movedim(-1, 1), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    parts = [(inputs[chosen], labels[chosen]) for chosen in torch.arange(8).split(2)]
    count = partial(count_positions, functional.cross_entropy)
    loss = accumulate(compute, list(model.parameters()), parts, count)
    assert model.weight.grad is not None
    gradient, model.weight.grad = model.weight.grad, None
    torch.testing.assert_close(loss, compute(inputs, labels))
    torch.testing.assert_close(gradient, model.weight.grad)
    assert count_positions(functional.cross_entropy, torch.rand(3, 2)) == 3


def test_names_of_trainings_without_the_later_fields_stay() -> None:
    assert Recipe(epochs=1).identity() == {
        "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "schedule": "constant", "milestones": [],
        "gamma": 0.1, "warmup": 0, "batch_size": 128, "epochs": 1, "iterations": None, "rewind": 0,
        "precision": "float32", "augmentation": {"flip": False, "crop": 0},
    }  # fmt: skip
    for way in ("weights", "learning_rate", "nothing"):
        assert Recipe(epochs=1, rewind_to=way).identity() == Recipe(epochs=1).identity()
    for name, fields in LATER.items():
        assert name in Recipe(epochs=1, **fields).identity()
    assert set(LATER) == {name for name in Recipe.model_fields if name not in Recipe(epochs=1).identity()} - {
        "nesterov",
        "rewind_to",
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"betas": (0.8, 0.9)}, "betas belong to adam and adamw"),
        ({"betas": (0.8,)}, "^Recipe: betas: expected 2 values, got 1$"),
        ({"no_decay": ["*.bias"]}, "no_decay names parameters without weight decay, and weight_decay is 0"),
        (
            {"optimizer": "mine:f", "weight_decay": 0.1},
            "weight_decay belongs to tombola's optimizers; set it in 'mine:f'",
        ),
        ({"optimizer": "mine:f", "momentum": 0.1}, "momentum belongs to optimizer = 'sgd', and 'mine:f' does not"),
        ({"clip_norm": 0.0}, "^Recipe: clip_norm: expected a number above 0, got 0.0$"),
        ({"accumulate": 0}, "^Recipe: accumulate: expected a number from 1, got 0$"),
        ({"optimizer": "lion"}, "^Recipe: optimizer: unknown 'lion'; choose from 'sgd', 'adam', 'adamw'$"),
    ],
)
def test_fields_that_do_not_fit_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Recipe(epochs=1, **fields)


def test_more_batches_than_the_data_set_has() -> None:
    with pytest.raises(UserError, match=r"recipe.accumulate: 5 batches of 5 are more than the 22 training examples"):
        dense(Recipe(epochs=1, batch_size=5, accumulate=5))


# Functions of the user


def own_sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, 0.9, nesterov=True, fused=True)


class Counting(torch.optim.Optimizer):
    """Everything that a state may hold: tensors of other shapes and types, numbers, None, and numbers of a group."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0, "betas": (0.5, 0.5)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                state["nothing"] = None
                state["even"] = state["calls"] % 2 == 0
                mean = state.setdefault("mean", torch.zeros_like(parameter, dtype=torch.float64))
                mean.mul_(0.9).add_(parameter.grad)
                norm = state.setdefault("norm", torch.zeros(1))
                norm += parameter.grad.norm()
                noise = 0.01 * torch.randn(parameter.shape).to(parameter)
                size = group["lr"] / group["k"] ** 0.5 * (2 if state["even"] else 1)
                parameter.sub_((mean.float() / (1 + norm) + noise) * size)


def half(iteration: int, total: int) -> float:
    return 0.5 if 2 * iteration >= total else 1


OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accumulate": ({"accumulate": 2}, {}),
    "clip": ({"clip_norm": 0.1, "momentum": 0.9}, {}),
    "no_decay": ({"optimizer": "adam", "weight_decay": 0.1, "no_decay": ("*.bias",)}, {}),
    "sgd": ({"optimizer": "mine:sgd"}, {"optimizer": own_sgd}),
    "adam": ({"optimizer": "mine:adam"}, {"optimizer": torch.optim.NAdam}),
    "counting": ({"optimizer": "mine:counting"}, {"optimizer": Counting}),
    "schedule": ({"schedule": "mine:half", "warmup": 3}, {"schedule": half}),
}


def bits(trained: Trained) -> list[Any]:
    return [trained.weights.hash, trained.batch_losses.tolist(), trained.history]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("build", [perceptron, convolutions])
def test_a_training_that_is_stopped_ends_with_the_same_bits(name: str, build: Callable[[], nn.Module]) -> None:
    fields, options = OWN[name]
    recipe = Recipe(epochs=2, batch_size=5, **fields)
    model, initial, mask = setting_of(build)
    taken: list[Checkpoint] = []
    run = partial(train, model, initial, mask, IMAGES, recipe, 0, **options)
    expected = run(watch=lambda _, checkpoint: taken.append(checkpoint()))
    for stop in (0, len(taken) // 2, len(taken) - 2):
        stored = checkpoint_from_bytes(checkpoint_to_bytes(taken[stop]))
        assert bits(run(resume=stored)) == bits(expected)
    pruned = {name: tensor[~mask[name]] for name, tensor in expected.weights.load().items() if name in mask}
    assert all((tensor == 0).all() for tensor in pruned.values())


def test_torchs_optimizer_gives_the_bits_of_tombolas() -> None:
    ours = dense(Recipe(epochs=3, batch_size=5, momentum=0.9, nesterov=True, warmup=4))
    theirs = dense(Recipe(epochs=3, batch_size=5, optimizer="mine:sgd", warmup=4), optimizer=own_sgd)
    assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))


def test_the_schedule_decides_each_learning_rate() -> None:
    recipe = Recipe(iterations=4, lr=2.0, schedule="mine:half", warmup=2)
    assert [recipe.lr_at(iteration, 100, half) for iteration in range(6)] == [1.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert recipe.lr_at(0, 100, lambda iteration, total: 0) == 0
    for wrong in (float("nan"), -1, "1", None, True, torch.tensor(1.0)):
        with pytest.raises(UserError, match=r"recipe.schedule 'mine:half': expected a finite number from 0, got"):
            recipe.lr_at(0, 100, lambda iteration, total, wrong=wrong: wrong)  # type: ignore[misc]
    with pytest.raises(UserError, match=r"recipe.schedule 'mine:half': there is no module 'mine'"):
        recipe.lr_at(0, 100)
    with pytest.raises(UserError, match=r"recipe.optimizer 'mine:f': there is no module 'mine'"):
        dense(Recipe(epochs=1, batch_size=5, optimizer="mine:f"))


def test_a_recipe_takes_functions_themselves() -> None:
    def doubling(iteration: int, total: int) -> float:
        return 2.0

    named = Recipe(epochs=1, batch_size=5, optimizer=own_sgd, schedule=doubling)
    assert named.optimizer == f"{__name__}:own_sgd"
    assert re.fullmatch(r".+:doubling-[0-9a-f]{8}", named.schedule)
    assert named.lr_at(0, 100) == 0.2
    given = dense(Recipe(epochs=1, batch_size=5, optimizer="mine:sgd", lr=0.2), optimizer=own_sgd)
    assert all(one.equal(other) for one, other in zip(dense(named), given, strict=True))
    for unused in ({"optimizer": own_sgd}, {"schedule": doubling}):
        with pytest.raises(UserError, match=f"^{next(iter(unused))}: a function is used if recipe.* names one, and it"):
            dense(Recipe(epochs=1, batch_size=5), **unused)
    assert Recipe(epochs=1, optimizer=torch.optim.RMSprop).own_code == {"optimizer": "torch.optim.rmsprop:RMSprop"}


class Forgetful(torch.optim.SGD):
    """An optimizer that remembers something outside its state."""

    calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            group["lr"] *= self.calls
        super().step()


class Anchored(torch.optim.SGD):
    """An optimizer that remembers its first learning rate outside its state."""

    first = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first = self.first or self.param_groups[0]["lr"]
        self.param_groups[0]["lr"] = self.first
        super().step()


class Listing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.state[self.param_groups[0]["params"][0]]["old"] = [1]


class Huge(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.state[self.param_groups[0]["params"][0]]["count"] = 2**63


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Forgetful, "opt: from a copy of its state it does not go on with the same bits"),
        (Anchored, "opt: from a copy of its state it does not go on with the same bits"),
        (Listing, "opt: its state has 'old' of type list; an optimizer whose trainings can be resumed keeps only"),
        (Huge, "opt: its state has 'count' of type int; an optimizer whose trainings can be resumed keeps only"),
        (torch.optim.LBFGS, "opt: its step raised TypeError"),
        (lambda parameters: None, "opt raised TypeError"),
        (lambda parameters, lr: None, r"opt: expected a torch.optim.Optimizer, got NoneType"),
    ],
)
def test_an_optimizer_that_cannot_be_resumed_is_refused(make: Any, said: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with pytest.raises(UserError, match=said):
        check_optimizer(make, 0.1, [weight], "opt")


def test_an_optimizer_that_goes_on_with_nan_is_not_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), math.nan)
    check_optimizer(torch.optim.SGD, 0.1, [weight], "opt")


def test_the_state_of_an_own_optimizer_is_copied() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = OwnOptimizer(torch.optim.RMSprop, 0.1, [weight])
    optimizer.step(0.1)
    kept = optimizer.tensors()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    optimizer.step(0.1)
    assert all(kept[name].equal(before[name]) for name in before)
    assert not optimizer.tensors()["0.square_avg"].equal(kept["0.square_avg"])
    optimizer.groups[0]["centered"] = 0  # False in the beginning
    assert "group0.centered#int" in optimizer.tensors()


def test_the_groups_of_an_optimizer_keep_their_proportions() -> None:
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    one.grad = other.grad = torch.ones(1)
    optimizer = OwnOptimizer(
        lambda parameters, lr: torch.optim.SGD([{"params": [one]}, {"params": [other], "lr": lr / 10}], lr),
        0.5, [one, other],
    )  # fmt: skip
    optimizer.step(0.25)
    torch.testing.assert_close(torch.cat([one, other]).detach(), torch.tensor([0.75, 0.975]))


# What is rewound


def follow(way: Any, rewind: int = 3, end: int = 10) -> list[tuple[str, int, int]]:
    """Return (initial weights, begin, end) of each training of three levels."""
    number, asked = itertools.count(), list[tuple[str, int, int]]()

    def do(initial: Weights, mask: Mask, begin: int, end: int) -> Trained:
        asked.append((initial.hash, begin, end))
        return Trained(Weights(f"w{next(number)}", dict), History())

    tickets = lottery_ticket_rewinding(
        do, lambda weights, mask, level, start: mask, Weights("w", dict),
        Mask.from_tensors({"w": torch.ones(4).bool()}), rewind=rewind, end=end, levels=2, rewind_to=way,
    )  # fmt: skip
    assert len(list(tickets)) == 3
    return asked


@pytest.mark.parametrize(
    ("way", "starts"),
    [
        ("weights", [("w0", 3, 10), ("w0", 3, 10), ("w0", 3, 10)]),
        ("learning_rate", [("w0", 3, 10), ("w1", 3, 10), ("w2", 3, 10)]),
        ("nothing", [("w0", 3, 10), ("w1", 10, 17), ("w2", 17, 24)]),
    ],
)
def test_what_is_rewound(way: str, starts: list[tuple[str, int, int]]) -> None:
    assert follow(way) == [("w", 0, 3), *starts]


def test_fine_tuning_goes_on_with_the_last_learning_rate() -> None:
    for fields in ({"schedule": "cosine"}, {"schedule": "milestones", "milestones": [1, 3]}, {"warmup": 30}):
        recipe = Recipe(epochs=2, batch_size=5, **fields)  # type: ignore[arg-type]
        last = recipe.lr_at(9, EXAMPLES)
        assert [recipe.lr_at(iteration, EXAMPLES) for iteration in (10, 17, 1000)] == [last] * 3


@pytest.mark.parametrize("way", ["learning_rate", "nothing"])
def test_tickets_start_from_the_weights_of_the_level_before(way: str) -> None:
    model, initial, _ = setting_of(small)
    model.load_state_dict(initial)
    recipe = Recipe.model_validate({"epochs": 2, "batch_size": 5, "rewind": 3, "rewind_to": way, "schedule": "cosine"})
    tickets = list(find_tickets(model, VECTORS, recipe, l1, levels=2, progress=False))
    for before, after in itertools.pairwise(tickets):
        assert before.trained is not None
        assert after.rewind.hash == before.trained.weights.hash
        assert after.mask.alive < before.mask.alive
    plain = list(
        find_tickets(model, VECTORS, recipe.model_copy(update={"rewind_to": "weights"}), l1, levels=1, progress=False)
    )
    one, other = ([each.trained.weights.hash for each in made if each.trained] for made in (plain, tickets))
    assert one[0] == other[0], "the dense network is the same"
    assert one[1] != other[1]
    with pytest.raises(UserError, match=r"scores at the rewind point are for recipe.rewind_to = 'weights'"):
        check_score_at("rewind", find("l1"), recipe.rewind_to)


def rprop(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Rprop(parameters, lr)


def test_a_run_that_keeps_the_trained_weights(
    tmp_path: Path, workers_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"levels": 2, "seeds": [0], "data_seeds": [], "importances": ["l1", "movement/l1"], "recipe.epochs": 1}
    fields |= {"recipe.rewind": 2, "recipe.rewind_to": "nothing", "recipe.optimizer": rprop, "recipe.schedule": half}
    fields |= {"recipe.batch_size": 200, "recipe.clip_norm": 1.0}
    table = tombola.run("digits", fields, store=tmp_path / "store")
    printed = capsys.readouterr().out
    assert printed.count("rewind point") == 1
    assert sorted(table["level"].to_list()) == [0, 0, 1, 1, 2, 2]
    assert [printed.count(f"level {level},") for level in range(3)] == [1, 2, 2]
    assert tombola.run("digits", fields, store=tmp_path / "store").equals(table), "nothing is done again"
    other = {**fields, "recipe.optimizer": own_sgd, "levels": 0}
    assert not tombola.run("digits", other, store=tmp_path / "store").equals(table)


def test_no_decay_takes_all_names_of_a_shared_parameter() -> None:
    assert find_decayed(["a.weight", "out.weight"], ["b.*"], {"a.weight": ("b.weight",)}) == [False, True]

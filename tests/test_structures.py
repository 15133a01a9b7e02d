"""Data of any structure, and a forward and a step of the user: trained, scored, evaluated, and refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tombola.datasets.dataset import Dataset, subset
from tombola.engine.job import _unchanged
from tombola.errors import ImportanceError, UserError
from tombola.importance import l1
from tombola.importance.network_scores import NETWORK_SCORES
from tombola.inputs import Tensors, count_examples, list_tensors, select
from tombola.lottery.find import find_tickets
from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.study.task import _checked
from tombola.training.batches import batches
from tombola.training.evaluation import measure, predict
from tombola.training.metrics import as_metric, find
from tombola.training.recipe import Recipe
from tombola.training.scoring import score_network
from tombola.training.train import train
from tombola.training.trial import try_network

X = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
RECIPE = Recipe(epochs=2, batch_size=5, lr=0.1)


def split(inputs: Tensors, labels: Tensors = Y, **fields: Any) -> Dataset:
    parts = [select(part, slice(a, b)) for a, b in ((0, 16), (16, 23)) for part in (inputs, labels)]
    return Dataset("parts", *parts, **fields)


class Two(nn.Module):
    """A network of two inputs, which computes as `one_input` does with both side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.net = one_input()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([left, right], 1))
        return out


def one_input() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def trained(data: Dataset, model: nn.Module, recipe: Recipe = RECIPE, **options: Any) -> Any:
    return train(model, model.state_dict(), Mask.ones_like(model), data, recipe, 0, **options)


def state_of(result: Any) -> list[Tensor]:
    return list(result.weights.load().values())


def equal(one: Any, other: Any) -> bool:
    same = all(a.equal(b) for a, b in zip(state_of(one), state_of(other), strict=True))
    return same and one.batch_losses.equal(other.batch_losses) and one.history == other.history


PAIRS: dict[str, Tensors] = {
    "tuple": (X[:, :1], X[:, 1:]),
    "dict": {"right": X[:, 1:], "left": X[:, :1]},
}


# Data


@pytest.mark.parametrize("kind", PAIRS)
def test_several_inputs_train_to_the_bits_of_one(kind: str) -> None:
    # the kernels that take a sequence of linear layers apart are off for both: the loss is not torch's own
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels)

    one = trained(split(X), one_input(), loss=loss)
    other = trained(split(PAIRS[kind]), Two(), loss=loss)
    assert equal(one, other)


@given(st.sampled_from([*PAIRS, "one"]), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_an_epoch_shows_each_example_once_with_its_target(
    kind: str, batch_size: int, accumulate: int, drop_last: bool, begin: int
) -> None:
    recipe = Recipe(iterations=50, batch_size=batch_size, accumulate=accumulate, drop_last=drop_last)
    if batch_size * accumulate > 16:
        return
    numbers = torch.arange(23)
    data = split({"one": numbers, "tuple": (numbers, numbers), "dict": {"a": numbers, "b": numbers}}[kind], numbers)
    per_epoch = recipe.iterations_per_epoch(16)
    first = list(batches(data, recipe, 3, 0, per_epoch))
    seen = [int(number) for _, labels in first for number in labels]
    assert (
        len(set(seen)) == len(seen) == (16 // (batch_size * accumulate) * batch_size * accumulate if drop_last else 16)
    )
    for inputs, labels in first:
        assert all(tensor.equal(labels) for tensor in list_tensors(inputs).values())
        assert count_examples(inputs) <= batch_size
    whole, part = batches(data, recipe, 3, 0, begin + 4), batches(data, recipe, 3, begin, begin + 4)
    assert [labels.tolist() for _, labels in whole][-1] == [labels.tolist() for _, labels in part][-1]


@pytest.mark.parametrize(
    "inputs",
    [torch.arange(23), torch.zeros(23, 2, dtype=torch.uint8), X > 0, X.to(torch.complex64), {"ids": torch.arange(23)}],
    ids=["int64", "uint8", "bool", "complex", "dict"],
)
def test_inputs_of_any_type_reach_the_model_unchanged(inputs: Tensors) -> None:
    data = split(inputs, X)
    shown, targets = next(iter(batches(data, RECIPE, 0, 0, 1)))
    order = [int((target == X).all(1).nonzero()[0]) for target in targets]
    for name, tensor in list_tensors(shown).items():
        there = list_tensors(inputs)[name]
        assert tensor.dtype == there.dtype
        assert tensor.equal(there[torch.tensor(order)])


def test_the_fingerprint_tells_structure_names_and_content() -> None:
    parts: list[Tensors] = [X, (X,), {"a": X}, {"b": X}, (X, X), {"a": X, "b": X}, {"a": X, "b": X + 1}]
    assert len({split(part).fingerprint for part in parts}) == len(parts)
    assert split({"a": X, "b": X + 1}).fingerprint == split({"b": X + 1, "a": X}).fingerprint
    assert split(X, (Y, X)).fingerprint != split(X, (X, Y)).fingerprint


def test_a_mapped_data_set_is_not_copied(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers").write_bytes(X.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "numbers"), size=X.numel()).view(X.shape)
    data = split({"left": mapped[:, :1], "right": mapped})
    inside = {tensor.untyped_storage().data_ptr() for tensor in list_tensors(data.train_inputs).values()}
    assert inside == {mapped.untyped_storage().data_ptr()}
    assert all(
        tensor.data_ptr() < mapped.data_ptr() + mapped.nbytes for tensor in list_tensors(data.test_inputs).values()
    )


def test_a_data_set_of_several_tensors_is_watched_for_changes() -> None:
    data = split({"left": X[:, :1].clone(), "right": X[:, 1:].clone()})
    with pytest.raises(UserError, match="changed the data set in place"), _unchanged(data):
        data.train_inputs["right"].zero_()  # type: ignore[call-overload, union-attr]


@pytest.mark.parametrize(
    ("inputs", "labels", "fields", "said"),
    [
        ((X, X[:9]), Y, {}, r"train set: its inputs\[1\] hold 9 examples and its inputs\[0\] 23"),
        (X, X[:18], {}, "test set: its labels hold 2 examples and its inputs 7; the first dimension"),
        ((), Y, {}, "its inputs are of type tuple"),
        ({"a": [1, 2]}, Y, {}, "its inputs are of type dict"),
        ([X, X], Y, {}, "its inputs are of type list"),
        ({"a": X.to_sparse()}, Y, {}, r"its inputs\['a'\] are sparse or nested"),
        ({"a": X / 0}, Y, {}, r"have inputs\['a'\] that are NaN or infinite"),
        (X, X, {"classes": ("a", "b")}, "expected int64 labels .* targets that are no numbers of classes, leave out"),
        ({"a": X}, Y, {"mean": (0.5,), "std": (0.5,)}, None),
        (Y, Y, {"mean": (0.5,), "std": (0.5,)}, "mean and std are for uint8 images"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(inputs: Any, labels: Any, fields: dict[str, Any], said: str | None) -> None:
    def make() -> Dataset:
        return (
            split(inputs, labels, **fields)
            if len(labels) < 23
            else Dataset("parts", inputs, labels, inputs, labels, **fields)
        )

    if said is None:
        make()
        return
    with pytest.raises(UserError, match=said):
        make()


def test_test_inputs_of_another_form_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"its inputs are a dict of \['b'\]: torch.float32 \(4,\), the train set's a dict"
    ):
        Dataset("parts", {"a": X}, Y, {"b": X}, Y)
    with pytest.raises(UserError, match=r"test set: its labels are torch\.float32"):
        Dataset("parts", X, Y, X, X[:, 0])
    with pytest.raises(UserError, match="the labels of data set 'parts' are no numbers of classes"):
        subset(split(X), train_per_class=1)
    with pytest.raises(UserError, match="several tensors and have no single shape"):
        _ = split((X, X)).input_shape


# A forward and a step of the user


def regression(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def through_an_object(model: nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = model(inputs)["logits"]
    return logits


class Wrapped(nn.Module):
    """A network whose outputs are an object, like those of HuggingFace."""

    def __init__(self) -> None:
        super().__init__()
        self.net = one_input()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(inputs)}


def own_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(inputs), labels)


def test_a_forward_and_a_step_train_to_the_bits_of_the_same_loss() -> None:
    plain = trained(split(X), one_input(), loss=regression)
    assert equal(trained(split(X), Wrapped(), loss=regression, forward=through_an_object), plain)
    stepped = trained(split(X), one_input(), step=own_step)
    assert all(a.equal(b) for a, b in zip(state_of(stepped), state_of(plain), strict=True))
    assert trained(split(X), one_input(), step=lambda m, x, y: own_step(m, x, y) * 2).history != stepped.history
    assert predict(Wrapped(), split(X), through_an_object).equal(predict(one_input(), split(X)))


def test_a_step_sees_the_weights_of_a_sparse_network() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))
    mask = Mask.from_tensors(
        {name: torch.rand(model.get_parameter(name).shape) < 0.02 for name in ("0.weight", "2.weight")}
    )
    seen = set()

    def step(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen.add(tuple(network[0].weight.shape))  # type: ignore[index]
        return functional.cross_entropy(network(inputs), labels)

    inputs = torch.randn(64, 64)
    data = Dataset("wide", inputs, inputs[:, 0].gt(0).long(), inputs, inputs[:, 0].gt(0).long(), ("a", "b"))
    recipe = Recipe(iterations=2, batch_size=64)
    train(model, model.state_dict(), mask, data, recipe, 0, step=step)
    assert seen == {(256, 64)}


@pytest.mark.parametrize("name", NETWORK_SCORES)
def test_scores_of_several_inputs_equal_those_of_one(name: str) -> None:
    def score(data: Dataset, model: nn.Module, **options: Any) -> dict[str, Tensor]:
        found = score_network(
            NETWORK_SCORES[name], Mask.ones_like(model), removed=2, model=model, state=model.state_dict(), data=data,
            seed=0, loss=functional.cross_entropy, **options,
        )  # fmt: skip
        return dict(found)

    def by_name(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = model(inputs["left"], inputs["right"])
        return outputs

    plain = score(split(X), one_input())
    ways: list[tuple[Tensors, dict[str, Any]]] = [(PAIRS["tuple"], {}), (PAIRS["dict"], {})]
    for inputs, options in [*ways, (PAIRS["dict"], {"forward": by_name})]:
        found = score(split(inputs), Two(), **options)
        for layer, expected in plain.items():
            torch.testing.assert_close(found[f"net.{layer}"], expected)
    if name == "grasp":
        with pytest.raises(ImportanceError, match="a step of your own gives only the loss"):
            score(split(X), one_input(), step=own_step)
    else:
        for layer, each in score(split(X), one_input(), step=own_step).items():
            torch.testing.assert_close(each, plain[layer])


def test_a_score_that_feeds_ones_refuses_numbers_of_tokens() -> None:
    model = nn.Sequential(nn.Embedding(23, 4), nn.Linear(4, 2))
    with pytest.raises(
        ImportanceError, match=r"it gives the network the inputs 1, and this network takes inputs of torch.int64"
    ):
        score_network(
            NETWORK_SCORES["synflow"], Mask.from_tensors({"1.weight": torch.ones(2, 4).bool()}), model=model,
            state=model.state_dict(), data=split(torch.arange(23)), seed=0, loss=functional.cross_entropy,
        )  # fmt: skip


def test_tickets_of_a_network_with_a_forward_of_its_own() -> None:
    tickets = list(find_tickets(Wrapped(), split(X), RECIPE, l1, levels=2, forward=through_an_object, progress=False))
    assert [round(ticket.mask.density, 2) for ticket in tickets] == [1.0, 0.79, 0.62]


def test_a_metric_of_the_user_takes_several_targets() -> None:
    def both(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> float:
        return float((targets[0] == targets[1]).double().mean()) + len(outputs)

    both.higher_is_better = True  # type: ignore[attr-defined]
    data = split(X, (Y, Y))
    values, _ = measure(one_input(), data, first_target, [as_metric(both, "both", "both")])
    assert values == {"both": 8.0}


# What the try-out refuses


def first_target(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(outputs, targets[0])


def half_of(count: int, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters[:count], lr)


def embedding(model: type[nn.Module] = nn.Sequential) -> nn.Module:
    return nn.Sequential(nn.Embedding(23, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("build", "data", "options", "said"),
    [
        (Two, {"left": X[:, :1], "wrong": X[:, 1:]}, {}, "does not take the inputs of .*; it takes left, right"),
        (Two, (X, X, X), {}, "it takes left, right, and the inputs are 3 tensors"),
        (Wrapped, X, {}, "expected a tensor, got dict of .logits.; name a function"),
        (one_input, X, {"forward": lambda m, x: m(x).sum()}, "forward: for inputs of .* first dimension counts the"),
        (one_input, X, {"labels": Y + 1}, "loss: target 2 of example .* is out of range, expected 0..1"),
        (one_input, X, {"labels": X.abs()}, r"probabilities of the classes, got targets of shape \(1, 4\)"),
        (one_input, X, {"labels": X[:, 0], "loss": functional.mse_loss}, "raised UserWarning: Using a target size"),
        (one_input, X, {"step": lambda m, x, y: m(x)}, "step: expected one number, the mean over the batch"),
        (one_input, X, {"step": lambda m, x, y: m(x).sum() / 0}, "step: at the first step.* the loss is NaN"),
        (one_input, X, {"loss": lambda o, t: functional.cross_entropy(o, t, reduction="sum")}, "loss: .* it is a sum"),
        (lambda: one_input().double(), X, {}, "its parameters are float64 and the inputs of the data set float32"),
        (one_input, X, {"labels": functional.one_hot(Y)}, r"int64; .*class numbers by targets.argmax\(1\)"),
        (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), X, {}, r"\(examples, classes\), got shape \(1,\)"),
        (one_input, X, {"labels": X, "step": own_step, "metrics": [find("loss")]}, "probabilities .* a target is -"),
        (one_input, X, {"labels": Y[:, None]}, r"shape \(1,\), .* targets.reshape\(\(-1,\)\)"),
        (one_input, X, {"labels": (Y, Y), "loss": first_target}, "it needs targets that are one tensor"),
        (one_input, X, {"recipe": {"optimizer": "a:b"}, "optimizer": partial(half_of, 2)}, "not update 2 of the 4"),
        (one_input, X, {"recipe": {"label_smoothing": 0.1}, "loss": regression}, "label_smoothing: it is for the"),
        (one_input, X, {"recipe": {"label_smoothing": 0.1}, "step": own_step}, "label_smoothing: .* a step of"),
        (one_input, X, {"recipe": {"weight_decay": 0.1, "no_decay": ["*norm*"]}}, "no_decay: no parameter matches"),
        (lambda: nn.Sequential(one_input(), nn.BatchNorm1d(2)), X, {}, "leave a last batch of one example"),
    ],
)  # fmt: skip
def test_the_try_out_says_what_does_not_fit(
    build: Callable[[], nn.Module], data: Tensors, options: dict[str, Any], said: str
) -> None:
    options = dict(options)
    made = split(data, options.pop("labels", Y))
    recipe = RECIPE.model_copy(update=options.pop("recipe", {}))
    with pytest.raises(UserError, match=said):
        try_network(build, options.pop("loss", functional.cross_entropy), made, recipe, **options)


def test_what_fits_is_tried_out() -> None:
    try_network(lambda: nn.Sequential(one_input(), nn.BatchNorm1d(2)), functional.cross_entropy, split(X),
                RECIPE.model_copy(update={"drop_last": True}))  # fmt: skip
    try_network(embedding, functional.cross_entropy, split(torch.arange(23)), RECIPE)
    try_network(one_input, functional.mse_loss, split(X, X[:, :2]), RECIPE, [])
    try_network(one_input, lambda o, t: 1e-9 * functional.cross_entropy(o, t), split(X), RECIPE)  # small, and no sum
    try_network(one_input, functional.cross_entropy, split(X, torch.where(torch.arange(23) == 3, -100, Y)), RECIPE)


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4)]
        self.out = nn.Linear(4, 2)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)
        self.spare = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x)
        return out + torch.rand(2)


def test_layers_in_a_list_of_python_are_refused() -> None:
    with pytest.raises(UserError, match=r"its 'layers' is a list of layers, .* torch.nn.ModuleList"):
        _checked("task.model", Unregistered)()


def test_random_numbers_in_evaluation_mode_are_refused() -> None:
    with pytest.raises(UserError, match="in evaluation mode, it gives different outputs in two calls"):
        try_network(Noisy, functional.cross_entropy, split(X), RECIPE)


def test_weights_on_which_the_loss_does_not_depend_are_named() -> None:
    class Spare(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(x)
            return out

    assert try_network(Spare, functional.cross_entropy, split(X), RECIPE) == ["spare.weight", "spare.bias"]


class HandMade(nn.Module):
    """A layer with a mask of its own, kept and applied in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.hidden, self.out, self.way = nn.Linear(4, 40), nn.Linear(40, 2), way
        kept = torch.rand(40, 4) < 0.5
        if way == "rows":
            kept = torch.arange(40).view(-1, 1).expand(40, 4) % 2 == 0
        if way == "attribute":
            self.kept = kept
        elif way == "list":
            self.masks = [kept.float()]
        else:
            self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.hidden.weight
        if self.way == "drawn" and self.training:
            self.kept = torch.rand(40, 4) < 0.5
        kept = self.masks[0] if self.way == "list" else self.kept
        if self.way == "in place":
            weight.data.mul_(kept)
        elif self.way == "drawn":
            weight = weight * kept if self.training else weight * 0.5
        elif self.way == "limit":
            weight.data.clamp_(min=0)
        elif self.way != "unused":
            weight = weight * kept
        out: Tensor = self.out(functional.linear(x, weight, self.hidden.bias))
        return out


@pytest.mark.parametrize("way", ["buffer", "attribute", "list", "rows", "in place", "unused", "limit", "drawn"])
def test_a_network_that_masks_its_own_weights_is_refused(way: str) -> None:
    with ambient(0):
        model = HandMade(way)
    tried = partial(try_network, lambda: model, functional.cross_entropy, split(X), RECIPE)
    if way in ("unused", "limit", "drawn"):
        tried(dense=Mask.ones_like(model))
        return
    said = "it multiplies its 'hidden.weight' by its '(kept|masks)', so that .* of its 160 weights do nothing"
    if way == "in place":
        said = "a step sets .* of the 160 weights of 'hidden.weight' to 0"
    with pytest.raises(UserError, match=rf"{said}.*exclude = \['hidden.weight'\]"):
        tried(dense=Mask.ones_like(model))
    tried(dense=Mask.ones_like(model, exclude=["hidden"]))

"""Stretches, many iterations of a perceptron in one call: they have the bits of iterations that are done alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tombola import Dataset, Mask, Recipe, kernels, train
from tombola.datasets.drawn import Drawn
from tombola.kernels import layers, stretch
from tombola.kernels.linear import Perceptron, SparseLinear, has_onednn
from tombola.kernels.stretch import Stretch
from tombola.training import stretches
from tombola.training.history import Checkpoint, Trained
from tombola.training.train import initial_state
from training_cases import AUGMENTED, IMAGES, VECTORS, ignore, perceptron

BATCH = 16
ROWS = torch.randn(3 * BATCH, 72, generator=torch.Generator().manual_seed(0))
SAME = Dataset("rows", ROWS, torch.arange(3 * BATCH) % 3, ROWS[:3], torch.arange(3))  # batches of one size
TRAININGS: dict[str, tuple[Dataset, dict[str, Any]]] = {  # of the images, the last batch is smaller
    "sgd": (SAME, {}),
    "momentum": (IMAGES, {"momentum": 0.9, "weight_decay": 0.1, "schedule": "cosine"}),
    "nesterov": (
        IMAGES,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "no_decay": ["*.bias"], "drop_last": True},
    ),
    "adam": (IMAGES, {"optimizer": "adam", "schedule": "cosine"}),
    "adamw": (SAME, {"optimizer": "adamw", "weight_decay": 0.1, "no_decay": ["1.*"], "warmup": 3}),
}


def deep() -> nn.Module:
    relu = nn.ReLU
    last = nn.Linear(32, 3)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 32, bias=False), relu(), nn.Linear(32, 32), relu(), last, relu())


def frozen() -> nn.Module:
    """The same, with two layers of which one parameter is trained."""
    model = deep()
    for name in ("3.weight", "5.bias"):
        model.get_parameter(name).requires_grad_(False)
    return model


def masked(build: Callable[[], nn.Module], sparse: tuple[int, ...]) -> tuple[Mask, list[str]]:
    """Return a mask with few connections in some layers and most in the others, and the names of the former."""
    model, draw = build(), torch.Generator().manual_seed(0)
    full = Mask.ones_like(model)
    densities = [0.08 if number in sparse else 0.95 for number in range(len(full))]
    drawn = {name: torch.rand(full[name].shape, generator=draw) < d for name, d in zip(full, densities, strict=True)}
    mask = Mask.from_tensors(drawn)
    names = [list(full)[number] for number in sparse]
    assert set(names) <= set(kernels.sparse_layers(model, mask, batch_size=BATCH))
    return mask, names


needs_onednn = pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN; to run: take torch for x86-64")
needs_operators = pytest.mark.skipif(
    not stretch.can_call_operators(),
    reason="torch or the kernels lack what stretches need; to run: take torch 2.13 and a C++ compiler",
)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of iterations of each call that does some."""
    done: list[int] = []
    run = Stretch.run

    def counted(self: Stretch, *arguments: Any) -> Tensor:
        losses = run(self, *arguments)
        done.append(len(losses))
        return losses

    monkeypatch.setattr(Stretch, "run", counted)
    return done


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """Return a function that trains with each iteration done alone."""

    def trained(run: Callable[..., Trained], **named: Any) -> Trained:
        with monkeypatch.context() as patched:
            patched.setattr(stretches, "can_stretch", lambda *_: False)
            return run(**named)

    return trained


def bits(trained: Trained) -> tuple[object, ...]:
    return trained.weights.hash, trained.history, trained.batch_losses.tolist()


@needs_operators
@pytest.mark.parametrize(("data", "fields"), TRAININGS.values(), ids=list(TRAININGS))
@pytest.mark.parametrize(
    ("build", "sparse", "by_onednn"),
    [
        (deep, (), False), (deep, (0,), False), (deep, (1,), False), (deep, (0, 2), False), (deep, (0, 1, 2), False),
        (frozen, (0,), False), (frozen, (0, 1), False),
        (deep, (), True), (deep, (0,), True), (deep, (1,), True), (frozen, (), True),
    ],
)  # fmt: skip
def test_a_stretch_has_the_bits_of_its_iterations(
    build: Callable[[], nn.Module],
    sparse: tuple[int, ...],
    by_onednn: bool,
    data: Dataset,
    fields: dict[str, Any],
    runs: list[int],
    alone: Callable[..., Trained],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tombola.training.train.LONGEST", 1e9)
    monkeypatch.setattr("tombola.kernels.linear._ONEDNN_FROM", 0 if by_onednn else math.inf)
    recipe = Recipe(batch_size=BATCH, epochs=4, **fields)
    mask, names = masked(build, sparse)
    run = partial(train, build(), initial_state(build, 3), mask, data, recipe, 5, kernels=names)
    expected: list[Checkpoint] = []
    stopped: list[Checkpoint] = []
    by_one = alone(run, watch=lambda _, take: expected.append(take()))
    assert not runs
    assert bits(run()) == bits(by_one)
    assert sum(runs) == len(by_one.batch_losses) - 1  # all but the first
    assert max(runs) == recipe.iterations_per_epoch(data.train_examples) - (data is IMAGES and not recipe.drop_last)
    assert bits(run(watch=lambda _, take: stopped.append(take()))) == bits(by_one)
    torch.testing.assert_close([*map(vars, stopped)], [*map(vars, expected)], rtol=0, atol=0)
    assert bits(run(resume=expected[len(expected) // 2])) == bits(by_one)


@needs_operators
@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 9, 11)])
def test_images_are_packed_with_the_bits_of_normalised_ones(shape: tuple[int, int, int]) -> None:
    """Images of few pixels, and of many; 70 of them leave a block of samples that is not full, with AVX2 the second."""
    draw, features = torch.Generator().manual_seed(0), math.prod(shape)
    images = torch.randint(256, (90, *shape), dtype=torch.uint8, generator=draw)
    labels, order = torch.arange(90) % 3, torch.randperm(90, generator=draw)[:70]
    mean, scale = 255 * torch.rand(shape[0], 1, 1, generator=draw), torch.rand(shape[0], 1, 1, generator=draw)
    weight, alive = torch.randn(3, features, generator=draw), torch.rand(3, features, generator=draw) < 0.5
    for instruction_set in layers.extension.instruction_sets():
        layer = SparseLinear(weight, torch.zeros(3), alive, instruction_set)
        network = Perceptron.of(nn.Sequential(nn.Flatten(), layer))
        assert network is not None
        loss = network.cross_entropy(kernels.normalise_images(images, order, mean, scale), labels[order])
        gradients = [parameter.grad for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        losses = Stretch(network, images, labels, (mean, scale), len(order)).run(order, [0.1], 1.0)
        assert losses.tolist() == [loss.item()]
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


@needs_operators
@pytest.mark.parametrize(("width", "bias", "lr"), [(600, False, 1e-44), (1000, True, 1e-4)])
def test_layers_that_several_threads_compute_have_the_same_bits(
    width: int, bias: bool, lr: float, alone: Callable[..., Trained]
) -> None:
    """Each thread says whether it takes tiny numbers for 0: those of PyTorch's pool do not."""
    build = lambda: nn.Sequential(nn.Linear(72, width, bias=bias), nn.ReLU(), nn.Linear(width, 3))  # noqa: E731
    initial = initial_state(build, 0)
    initial["0.weight"] *= 1e-38
    if bias:
        initial["0.bias"] *= 1e-37
    data = Dataset("rows", ROWS.repeat(8, 1), SAME.train_labels.repeat(8), ROWS[:3], torch.arange(3))
    recipe = Recipe(epochs=1, batch_size=128, lr=lr, momentum=0.9)
    taken: list[Checkpoint] = []
    watch = lambda _, take: taken.append(take())  # noqa: E731
    run = partial(train, build(), initial, Mask.ones_like(build()), data, recipe, 0, watch=watch)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(2**18).add_(1)  # begins the other thread, before this one takes tiny numbers for 0
        run()
        alone(run)
    finally:
        torch.set_num_threads(before)
    assert len(taken) == 6
    torch.testing.assert_close(vars(taken[2]), vars(taken[5]), rtol=0, atol=0)


@needs_operators
@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_divergence_is_seen_at_the_same_iteration(lr: float, runs: list[int], alone: Callable[..., Trained]) -> None:
    recipe = Recipe(batch_size=4, epochs=30, lr=lr, momentum=0.99, weight_decay=0.1)  # checks within epochs too
    run = partial(train, perceptron(), initial_state(perceptron, 0), Mask.ones_like(perceptron()), IMAGES, recipe, 0)
    trained = run()
    assert runs
    assert trained.history.diverged_at is not None
    assert trained.history == alone(run).history
    assert len(trained.batch_losses) == trained.history.diverged_at + 1


@needs_operators
def test_a_watch_is_called_after_several_iterations_if_it_says_so(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tombola.training.train.LONGEST", 1e9)
    recipe = Recipe(batch_size=4, epochs=3)
    arguments = perceptron(), initial_state(perceptron, 0), Mask.ones_like(perceptron()), SAME, recipe, 0
    seen: list[int] = []
    told: list[int] = []
    watch = lambda iteration, _: seen.append(iteration)  # noqa: E731
    train(*arguments, watch=watch, watch_every=1e9, on_epoch=lambda iteration, _: told.append(iteration))
    assert (seen, runs, told) == ([1, 12, 24, 36], [11, 12, 12], [12, 24, 36])
    seen.clear()
    train(*arguments, watch=watch)
    assert seen == list(range(1, 37))


@needs_operators
def test_a_stretch_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(Stretch, "run", lambda self, order, rates, seconds: given.append(seconds) or torch.ones(1))
    arguments = perceptron(), initial_state(perceptron, 0), Mask.ones_like(perceptron()), SAME
    train(*arguments, Recipe(batch_size=16, epochs=1), 0, watch=ignore, watch_every=1e9)
    train(*arguments, Recipe(batch_size=16, epochs=1), 0)
    assert given == [stretches.LONGEST] * 4
    monkeypatch.undo()
    assert len(make().run(torch.arange(8), [0.1] * 4, -1.0)) == 1
    assert len(make().run(torch.arange(8), [0.1] * 4, 1e9)) == 4


def hooked() -> nn.Module:
    model = perceptron()
    model[1].register_forward_hook(ignore)
    return model


def shared() -> nn.Module:
    """A network with a bias that two layers share."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.ReLU(), nn.Linear(3, 3))
    model[3].bias = model[1].bias
    return model


def own_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)


def drawn() -> Dataset:
    """The batches of 4 of the images, drawn by a function."""
    batches = list(zip(IMAGES.train_inputs.float().split(4), IMAGES.train_labels.split(4), strict=True))
    train_set = Drawn("drawn", lambda seed, epoch, split: batches, len(batches), 4, 2, "")
    return replace(IMAGES, drawn=train_set)


UNSERVED: dict[str, dict[str, Any]] = {
    "accumulate": {"recipe": Recipe(epochs=1, batch_size=4, accumulate=2)},
    "clip_norm": {"recipe": Recipe(epochs=1, batch_size=4, clip_norm=1.0)},
    "augmentation": {"recipe": Recipe(epochs=1, batch_size=4, augmentation=AUGMENTED)},
    "label smoothing": {"recipe": Recipe(epochs=1, batch_size=4, label_smoothing=0.1)},
    "another loss": {"loss": lambda outputs, labels: nn.functional.cross_entropy(outputs, labels)},
    "a forward of one's own": {"forward": lambda model, inputs: model(inputs)},
    "a step of one's own": {"step": own_step},
    "an optimizer of one's own": {
        "recipe": Recipe(epochs=1, batch_size=4, optimizer="mine:sgd"),
        "optimizer": torch.optim.SGD,
    },
    "bfloat16": {"recipe": Recipe(epochs=1, batch_size=4, precision="bfloat16")},
    "a bias that is shared": {"build": shared},
    "a hook": {"build": hooked},
    "batches that are drawn": {"data": drawn()},
}


@pytest.mark.parametrize("fields", UNSERVED.values(), ids=list(UNSERVED))
def test_what_stretches_do_not_serve_is_done_iteration_by_iteration(fields: dict[str, Any], runs: list[int]) -> None:
    fields = {"recipe": Recipe(epochs=1, batch_size=4), "build": perceptron, "data": IMAGES} | fields
    recipe, build, data = (fields.pop(name) for name in ("recipe", "build", "data"))
    model = build()
    trained = train(model, initial_state(build, 0), Mask.ones_like(model), data, recipe, 0, **fields)
    assert len(trained.batch_losses) == recipe.iterations_per_epoch(22)
    assert not runs


def test_a_schedule_of_the_user_is_asked_once_for_each_iteration(runs: list[int]) -> None:
    asked: list[int] = []

    def schedule(iteration: int, _: int) -> float:
        asked.append(iteration)
        return 0.5

    model, recipe = perceptron(), Recipe(epochs=2, batch_size=4, schedule="mine:half")
    seen: list[list[int]] = []
    watch = lambda iteration, _: seen.append(list(asked))  # noqa: E731
    train(model, initial_state(perceptron, 0), Mask.ones_like(model), IMAGES, recipe, 0, schedule=schedule, watch=watch)
    assert seen == [list(range(iteration)) for iteration in range(1, 13)]
    assert not runs


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Dispatched, _Called, partial(torch.device, "cpu")])
def test_what_sees_each_operator_is_shown_each_iteration(mode: Callable[[], Any], runs: list[int]) -> None:
    model, recipe = perceptron(), Recipe(epochs=1, batch_size=4)
    arguments = model, initial_state(perceptron, 0), Mask.ones_like(model), IMAGES, recipe, 0
    with mode():
        seen = bits(train(*arguments))
    assert not runs
    assert seen == bits(train(*arguments))


@needs_operators
@pytest.mark.parametrize(
    ("inputs", "labels", "expected"),
    [
        (ROWS, SAME.train_labels, True),
        (ROWS, SAME.train_labels.masked_fill(SAME.train_labels == 2, -100), True),  # which the loss ignores
        (IMAGES.train_inputs, IMAGES.train_labels, True),
        (ROWS, SAME.train_labels + 1, False),
        (ROWS, SAME.train_labels - 1, False),
        (ROWS, SAME.train_labels.float(), False),
        (ROWS, SAME.train_labels[::2].contiguous(), False),
        (ROWS[:, :71].contiguous(), SAME.train_labels, False),
        (ROWS, SAME.train_labels.repeat_interleave(2)[::2], False),
        (ROWS.t().contiguous().t(), SAME.train_labels, False),
        (ROWS.double(), SAME.train_labels, False),
        ({"rows": ROWS}, SAME.train_labels, False),
    ],
)
def test_which_data_stretches_take(inputs: Any, labels: Any, expected: bool) -> None:
    network = kernels.Perceptron.of(perceptron())
    assert network is not None
    assert kernels.can_stretch(network, inputs, labels) == expected


@needs_operators
@pytest.mark.parametrize("missing", ["an argument", "the library's functions"])
def test_a_torch_without_the_operators_trains_iteration_by_iteration(
    missing: str, monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    model, recipe = perceptron(), Recipe(epochs=1, batch_size=4)
    arguments = model, initial_state(perceptron, 0), Mask.ones_like(model), IMAGES, recipe, 0
    expected = bits(train(*arguments))
    assert runs
    runs.clear()
    with monkeypatch.context() as patched:
        if missing == "an argument":
            patched.setattr(stretch, "_SCHEMAS", ("aten::relu_(Tensor(a!) self, int more) -> Tensor(a!)",))
        else:
            patched.setattr(layers, "extension", _Without(layers.extension))
        assert not stretch.can_call_operators()
        assert bits(train(*arguments)) == expected
    assert not runs
    assert stretch.can_call_operators()


@needs_operators
@needs_onednn
def test_a_torch_without_the_product_of_onednn_trains_other_layers_in_stretches(
    monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    load = layers.extension.load_operators

    class WithoutProduct(_Without):
        def __getattr__(self, name: str) -> Any:
            found = lambda path, onednn: load(path, onednn) and not onednn  # noqa: E731
            return found if name == "load_operators" else getattr(self._extension, name)

    def trained(large: bool) -> tuple[object, ...]:
        with monkeypatch.context() as patched:
            patched.setattr("tombola.kernels.linear._ONEDNN_FROM", 0 if large else math.inf)
            model, recipe = perceptron(), Recipe(epochs=1, batch_size=4)
            return bits(train(model, initial_state(perceptron, 0), Mask.ones_like(model), IMAGES, recipe, 0))

    expected = [trained(large) for large in (False, True, False)]
    with monkeypatch.context() as patched:
        patched.setattr(layers, "extension", WithoutProduct(layers.extension))
        done = []
        for large in (False, True, False):
            runs.clear()
            done.append(trained(large))
            assert bool(runs) != large
    assert done == expected


@needs_operators
@pytest.mark.parametrize("onednn", [False, True])
def test_functions_that_were_found_stay_if_others_are_not(onednn: bool) -> None:
    made, library = make(), next(Path(torch.__file__).parent.glob("lib/libc10.*"))
    assert not layers.extension.load_operators(str(library), onednn)
    assert made.run(torch.arange(2), [0.1], 1.0).isfinite().all()


class _Without:
    """The extension, where the operators are not found."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        return (lambda path, onednn: False) if name == "load_operators" else getattr(self._extension, name)


# What Python gives the C++ is checked.


def make(weight: Tensor | None = None, **changed: Any) -> Any:
    """Return a stretch of one dense layer of 4 inputs and 3 outputs on the vectors, in batches of 2."""
    weight = torch.zeros(3, 4) if weight is None else weight
    gradient = torch.zeros(3, 4)
    given = {
        "inputs": VECTORS.train_inputs,
        "mean": None,
        "scale": None,
        "labels": VECTORS.train_labels,
        "batch": 2,
        "layers": ((None, (weight, None), (gradient, None), False, False),),
    }
    made = layers.extension.Stretch(**(given | changed))
    made.sgd((weight,), (gradient,), (), 0.0, 0.0, nesterov=False)
    return _Run(made)


class _Run:
    def __init__(self, native: Any) -> None:
        self.native = native

    def run(self, order: Tensor, rates: list[float], seconds: float) -> Tensor:
        losses = torch.empty(len(rates))
        return losses[: self.native.run(order, rates, losses, seconds)]


ONE = torch.zeros(3, 4)


@needs_operators
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"inputs": VECTORS.train_inputs.double()}, "inputs: expected a tensor of float32"),
        ({"inputs": VECTORS.train_inputs.t()}, "inputs: expected .* contiguous"),
        ({"inputs": IMAGES.train_inputs, "mean": torch.ones(2), "scale": torch.ones(3)}, "scale: .* of 2 elements"),
        ({"inputs": IMAGES.train_inputs, "mean": torch.ones(2), "scale": torch.ones(2)}, "one of 72 inputs, got 4"),
        ({"labels": VECTORS.train_labels[:5]}, "labels: .* of 22 elements"),
        ({"labels": VECTORS.train_labels.int()}, "labels: expected a tensor of int64"),
        ({"batch": 0}, "batch: expected"),
        ({"layers": ()}, "layers: expected one or more"),
        ({"layers": ((None, (ONE, None), (ONE, None)),)}, "layers: expected"),
        (
            {"layers": ((None, (ONE[:, :2], None), (ONE, None), False, False),)},
            "layers: expected one of 4 inputs, got 2",
        ),
        ({"layers": ((None, (ONE, ONE[0]), (ONE, None), False, False),)}, "bias: .* of 3 elements"),
        ({"layers": ((None, (ONE, None), (ONE[:2], None), False, False),)}, "gradient: .* of 12 elements"),
        ({"layers": ((None, (ONE, None), (ONE, ONE), False, False),)}, "bias_gradient: .* of 3 elements"),
        ({"layers": ((None, (ONE,), (ONE,), False, False),)}, "weight and bias"),
        ({"layers": (("chain", (ONE, None), (ONE, None), False, False),)}, "expected a chain"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        make(**changed)


@needs_operators
def test_updates_and_runs_that_do_not_fit_are_refused() -> None:
    made, one, two = make(), torch.zeros(3), torch.zeros(2)
    for update in (
        partial(made.native.sgd, (one,), (two,), (), 0.0, 0.0, False),
        partial(made.native.sgd, (one,), (one,), (), 0.0, 0.9, False),
        partial(made.native.multiply, (one,), (two,)),
        partial(made.native.adam, (one,), (one,), (one,), (one,), (two,), 0.9, 0.9, 0.0, 1e-8, False),
        partial(made.native.adam, (one,), (one,), (one,), (one,), (), 0.9, 0.9, 0.0, 1e-8, False),
    ):
        with pytest.raises(ValueError, match=r"expected"):
            update()
    with pytest.raises(IndexError, match="expected numbers of 22 examples, from 0, got 22 at position 1"):
        made.run(torch.tensor([0, 22]), [0.1], 1.0)
    for order, rates in ((torch.arange(3), [0.1]), (torch.arange(2).int(), [0.1]), (torch.arange(4)[::2], [0.1])):
        with pytest.raises(ValueError, match="order: expected"):
            made.run(order, rates, 1.0)
    with pytest.raises(ValueError, match="losses: expected"):
        made.native.run(torch.arange(2), [0.1], torch.empty(2), 1.0)


@needs_operators
@pytest.mark.parametrize("change", ["resized", "moved"])
def test_a_weight_that_is_elsewhere_by_now_is_refused(change: str) -> None:
    weight = torch.zeros(3, 4)
    made = make(weight)
    made.run(torch.arange(2), [0.1], 1.0)
    if change == "resized":
        weight.untyped_storage().resize_(4)
    else:
        weight.set_(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="weight"):
        made.run(torch.arange(2), [0.1], 1.0)


class Operands(TorchDispatchMode):
    """References to the tensors that operators of PyTorch get."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += [weakref.ref(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        return func(*args, **kwargs or {})


@needs_operators
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=needs_onednn)])
def test_operators_free_their_arguments_also_if_they_fail(*, fails: bool, by_onednn: bool) -> None:
    assert stretch.can_call_operators(onednn=by_onednn)
    layer = (None, (torch.zeros(3, 4), torch.zeros(3)), (torch.zeros(3, 4), torch.zeros(3)), False, by_onednn)
    made = make(labels=torch.full((22,), 7 if fails else 0), layers=(layer,))
    with Operands() as operands, pytest.raises(RuntimeError) if fails else nullcontext():
        made.run(torch.arange(2), [0.1], 1.0)
    assert len(operands.all) >= 6
    del made
    assert [each() for each in operands.all if each() is not None] == []


@needs_operators
def test_what_an_operator_refuses_is_an_error() -> None:
    made = make(labels=torch.full((22,), 7))
    with pytest.raises(RuntimeError, match=r"aten::nll_loss2d_forward: .*Target 7 is out of bounds"):
        made.run(torch.arange(2), [0.1], 1.0)

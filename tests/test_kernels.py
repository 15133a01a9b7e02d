"""Sparse layers compute what the masked dense layers compute, to float32 rounding, and the same bits each time."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from processes import LONG
from tombola import Mask, Recipe, datasets, kernels, prune, train
from tombola.importance import magnitude
from tombola.kernels import BatchNorm2d, MaxPool2d, Perceptron, SparseConv2d, SparseLinear, layers, linear

needs_kernels = pytest.mark.skipif(
    not kernels.available(), reason="built without kernels; to run: reinstall with a C++ compiler"
)
SETS: list[str] = layers.extension.instruction_sets() if layers.extension else ["plain"]
EPSILON = torch.finfo(torch.float32).eps


def a_mask(shape: tuple[int, ...], kind: str) -> Tensor:
    """A mask of one of the kinds that tests draw from."""
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "one":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.flatten()[torch.randint(mask.numel(), ())] = True
        return mask
    mask = torch.rand(shape) < float(kind)
    if shape[0] > 2 and shape[1] > 2:
        mask[1] = False  # an output that nothing reaches
        mask[:, 2] = False  # an input that reaches nothing
    return mask


KINDS = st.sampled_from(["none", "one", "0.05", "0.3", "0.9", "1"])


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers at other strides."""
    if layout == "batch last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "gaps":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.contiguous()


LAYOUTS = st.sampled_from(["contiguous", "batch last", "channels last", "gaps"])


def assert_rounding(ours: Tensor, exact: Tensor, absolute: Tensor, terms: int) -> None:
    """|ours - exact| is at most what summing `terms` rounded products, of absolute sum `absolute`, may lose."""
    assert ours.shape == exact.shape
    excess = (ours.double() - exact).abs() - (terms + 4) * EPSILON * absolute
    assert excess.numel() == 0 or excess.max() <= 1e-30


def check(make: Callable[[Tensor, Tensor, Tensor], nn.Module], apply: Callable[..., Tensor], mask: Tensor, x: Tensor,
          layout: str, delta_layout: str) -> None:  # fmt: skip
    """Output and all gradients against float64, with the bound of the rounding error beside it."""
    weight, bias = torch.randn(mask.shape), torch.randn(mask.shape[0])
    layer = make(weight, bias, mask)
    values, added = layer.get_parameter("values"), layer.get_parameter("bias")

    def reference(*sign: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = [f(t.detach().double()).requires_grad_() for f, t in zip(sign, (x, weight * mask, bias), strict=False)]
        y = apply(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, sign[3](delta.double()))]

    x = in_layout(x, layout).requires_grad_()
    y = layer(x)
    products = linear._Product._backward_cls, layers._Product._backward_cls
    assert isinstance(y.grad_fn, products)  # the kernel, not the way around it
    delta = in_layout(torch.randn(y.shape), delta_layout)
    gradients = torch.autograd.grad(y, (x, values, added), delta)
    exact, bound = reference(*[lambda t: t] * 4), reference(*[torch.abs] * 4)
    taps, positions = mask[0].numel() + 1, delta.numel() // max(1, delta.shape[1])
    assert_rounding(y.detach(), exact[0], bound[0], taps)
    assert_rounding(gradients[0], exact[1], bound[1], mask.numel() // mask.shape[1])
    assert_rounding(gradients[1], exact[2][mask], bound[2][mask], positions)
    assert_rounding(gradients[2], exact[3], bound[3], positions)

    again = torch.autograd.grad(layer(x), (x, values, added), delta)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 2, 7, 63, 128, 130]),
    inputs=st.sampled_from([1, 3, 8, 37, 300]),
    outputs=st.sampled_from([1, 5, 40]),
    kind=KINDS,
    layout=LAYOUTS,
    delta_layout=LAYOUTS,
)
def test_linear_equals_masked_dense(
    instruction_set: str, seed: int, batch: int, inputs: int, outputs: int, kind: str, layout: str, delta_layout: str
) -> None:
    torch.manual_seed(seed)
    check(
        lambda w, b, m: SparseLinear(w, b, m, instruction_set),
        F.linear,
        a_mask((outputs, inputs), kind),
        torch.randn(batch, inputs),
        layout,
        delta_layout,
    )


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 7, 16, 33, 130]),
    channels=st.sampled_from([(1, 1), (3, 5), (50, 4), (4, 50)]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    image=st.tuples(st.integers(1, 9), st.integers(1, 11)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    kind=KINDS,
    layout=LAYOUTS,
    delta_layout=LAYOUTS,
)
def test_convolution_equals_masked_dense(
    instruction_set: str, seed: int, batch: int, channels: tuple[int, int], kernel: tuple[int, int],
    image: tuple[int, int], stride: int, padding: tuple[int, int], kind: str, layout: str, delta_layout: str
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    image = (max(image[0], kernel[0] - 2 * padding[0]), max(image[1], kernel[1] - 2 * padding[1]))
    check(
        lambda w, b, m: SparseConv2d(w, b, m, stride, padding, instruction_set),
        lambda x, w, b: F.conv2d(x, w, b, stride, padding),
        a_mask((channels[1], channels[0], *kernel), kind),
        torch.randn(batch, channels[0], *image),
        layout,
        delta_layout,
    )


@needs_kernels
def test_images_larger_than_the_cache() -> None:
    torch.manual_seed(0)
    check(
        lambda w, b, m: SparseConv2d(w, b, m, 2, (1, 1)),
        lambda x, w, b: F.conv2d(x, w, b, 2, 1),
        a_mask((6, 40, 3, 3), "0.3"),
        torch.randn(17, 40, 37, 130),
        "contiguous",
        "batch last",
    )


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.sampled_from([2, 7, 130]), st.integers(2, 5), st.integers(2, 9), st.integers(2, 9)),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_batch_norm_equals_torch(seed: int, shape: tuple[int, int, int, int], offset: float) -> None:
    torch.manual_seed(seed)
    dense = nn.BatchNorm2d(shape[1])
    nn.init.normal_(dense.weight), nn.init.normal_(dense.bias)
    ours = BatchNorm2d.of(copy.deepcopy(dense))
    dense.double()
    x = in_layout(torch.randn(shape) + offset, "batch last").requires_grad_()
    exact = x.detach().double().requires_grad_()
    delta = torch.randn(shape)
    y, z = ours(x), dense(exact)
    assert isinstance(y.grad_fn, layers._BatchNorm._backward_cls)
    y.backward(delta)
    z.backward(delta.double())

    def near(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a.double(), b, rtol=1e-4, atol=1e-3 if offset else 1e-4)

    parameters = zip(ours.parameters(), dense.parameters(), strict=True)
    for a, b in ((y, z), (x.grad, exact.grad), *((p.grad, q.grad) for p, q in parameters)):
        assert a is not None
        assert b is not None
        assert near(a, b)
    for a, b in zip(ours.buffers(), dense.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    assert near(ours.eval()(x), dense.eval()(exact))


def a_row(widths: list[int], relu_at_end: bool, flatten: bool, frozen: int | None) -> nn.Sequential:
    """A network of linear layers and ReLUs, every second layer without a bias, one layer without gradients."""
    model = nn.Sequential()
    if flatten:
        model.append(nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        layer = nn.Linear(inputs, outputs, bias=number % 2 == 0)
        layer.requires_grad_(number != frozen)
        model.append(layer)
        if number < len(widths) - 2 or relu_at_end:
            model.append(nn.ReLU(inplace=number % 2 == 0))
    return model


@pytest.mark.parametrize("sets", [*([name] for name in SETS), SETS], ids=[*SETS, "mixed"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 2, 7, 16, 33, 63, 64, 96, 128, 130]),
    widths=st.lists(st.sampled_from([1, 2, 9, 40, 300]), min_size=2, max_size=4),
    classes=st.sampled_from([2, 3, 10]),
    kinds=st.lists(st.sampled_from(["none", "one", "0.05", "0.5", "1", "dense"]), min_size=3, max_size=3),
    relu_at_end=st.booleans(),
    flatten=st.booleans(),
    frozen=st.sampled_from([None, 0, 1]),
    ignored=st.sampled_from(["none", "first"]),
    layout=LAYOUTS,
    by_onednn=st.booleans(),
)
def test_row_equals_autograd(
    sets: list[str], seed: int, batch: int, widths: list[int], classes: int, kinds: list[str], relu_at_end: bool,
    flatten: bool, frozen: int | None, ignored: str, layout: str, by_onednn: bool,
) -> None:  # fmt: skip
    """Loss and gradients of a row, dense and sparse layers mixed, against autograd in float64."""
    torch.manual_seed(seed)
    widths = [*widths, classes]
    model = a_row(widths, relu_at_end, flatten, frozen)
    exact = copy.deepcopy(model).double()
    masks = {}
    for (name, layer), kind in zip(list(model.named_children()), kinds * 3, strict=False):
        if isinstance(layer, nn.Linear) and kind != "dense" and kernels.available():
            masks[name] = a_mask(tuple(layer.weight.shape), kind)
            sparse = SparseLinear(layer.weight, layer.bias, masks[name], sets[len(masks) % len(sets)])
            model.set_submodule(name, sparse.requires_grad_(layer.weight.requires_grad))
            with torch.no_grad():
                exact.get_parameter(f"{name}.weight").mul_(masks[name])
    x, labels = in_layout(torch.randn(batch, widths[0]), layout), torch.randint(classes, (batch,))
    if ignored == "first" and batch > 1:
        labels[0] = -100
    with mock.patch.object(linear, "_ONEDNN_FROM", 0 if by_onednn else math.inf):
        row = Perceptron.of(model)
    assert row is not None
    assert row.takes(x, labels)
    loss = row.cross_entropy(x, labels)
    expected = F.cross_entropy(exact(x.double()), labels)
    if expected.requires_grad:
        torch.autograd.backward(expected)
    assert loss.double().allclose(expected, rtol=1e-5, atol=1e-6)
    for name, parameter in exact.named_parameters():
        child, _, attribute = name.partition(".")
        ours = model.get_parameter(f"{child}.values" if child in masks and attribute == "weight" else name).grad
        gradient = parameter.grad
        if not parameter.requires_grad:
            assert ours is None
            continue
        assert gradient is not None
        assert ours is not None
        gradient = gradient[masks[child]] if child in masks and attribute == "weight" else gradient
        assert torch.allclose(ours.double(), gradient, rtol=1e-4, atol=1e-5)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert torch.equal(loss, row.cross_entropy(x, labels))
    assert all(map(torch.equal, before, (p.grad for p in model.parameters() if p.grad is not None)))


@needs_kernels
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_a_row_hides_nothing_that_is_not_finite(wrong: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(SparseLinear(torch.randn(8, 8), torch.zeros(8), torch.rand(8, 8) < 0.5) for _ in range(2)))
    model.insert(1, nn.ReLU())
    x, labels = torch.randn(20, 8), torch.randint(8, (20,))
    x[3] = wrong
    found = []
    for gradients in ("row", "autograd"):
        model.zero_grad()
        if gradients == "row":
            row = Perceptron.of(model)
            assert row is not None
            row.cross_entropy(x, labels)
        else:
            torch.autograd.backward(F.cross_entropy(model(x), labels))
        found.append([p.grad.isnan() for p in model.parameters() if p.grad is not None])
    assert any(map(torch.any, found[0]))
    assert all(map(torch.equal, *found))


@needs_kernels
def test_what_fills_up_a_block_of_samples_adds_nothing() -> None:
    """An example of zeros would overflow in this network; there is none, though a block has room for some."""
    weights = (torch.tensor([[-3e38]]), torch.tensor([[2.0], [2.0]]), torch.ones(2, 2))
    biases = (torch.tensor([3e38]), torch.zeros(2), torch.zeros(2))
    model = nn.Sequential(*(SparseLinear(w, b, w != 0) for w, b in zip(weights, biases, strict=True)))
    row = Perceptron.of(model)
    assert row is not None
    row.cross_entropy(torch.ones(9, 1), torch.zeros(9, dtype=torch.int64))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@needs_kernels
def test_what_no_path_leads_from_is_left_out() -> None:
    """Nobody reads the second unit of the middle layer, so nothing is done with its weights, infinite ones here."""
    weights = [torch.ones(2, 3), torch.tensor([[1.0, 1.0], [torch.inf, torch.inf]]), torch.tensor([[1.0, 0.0]] * 2)]
    model = nn.Sequential(*(SparseLinear(w, torch.zeros(2), w != 0) for w in weights))
    row = Perceptron.of(model)
    assert row is not None
    row.cross_entropy(torch.ones(4, 3), torch.tensor([0, 1, 1, 1]))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[2].tolist()[2:] == [0, 0]
    assert gradients[3].tolist()[1] == 0


@pytest.mark.skipif(not linear.has_onednn(), reason="torch has no oneDNN; to run: take torch for x86-64")
def test_large_dense_layers_are_multiplied_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    x, labels = torch.randn(32, 256), torch.randint(4, (32,))
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        row = Perceptron.of(model)
        assert row is not None
        assert [part.by_onednn for part, _ in row.parts] == [enabled, False]
        loss = row.cross_entropy(x, labels)
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)


@needs_kernels
def test_rows_side_by_side_in_threads() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(100, 50), torch.randint(50, (100,))
    weights, masks = torch.randn(2, 50, 50), torch.rand(2, 50, 50) < 0.3

    def gradients(_: int) -> list[Tensor]:
        model = nn.Sequential(*(SparseLinear(w, None, m) for w, m in zip(weights, masks, strict=True)))
        row = Perceptron.of(model)
        assert row is not None
        row.cross_entropy(x, labels)
        return [p.grad for p in model.parameters() if p.grad is not None]

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(gradients, range(40))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
def test_layers_that_do_not_fit_make_no_chain() -> None:
    def layer(outputs: int, inputs: int) -> Any:
        weight = torch.ones(outputs, inputs)
        return SparseLinear(weight, None, weight.bool()).kernel((inputs,))

    for chain in [(), (layer(3, 2), layer(4, 2)), (None,)]:
        with pytest.raises((ValueError, TypeError)):
            layers.extension.Chain(chain, [False] * len(chain))


def test_row_of_other_networks() -> None:
    linear = nn.Linear(4, 4)
    assert Perceptron.of(nn.Sequential(linear)) is not None
    others = [
        nn.Sequential(),
        nn.Sequential(nn.ReLU(), linear),
        nn.Sequential(linear, nn.Tanh(), nn.Linear(4, 4)),
        nn.Sequential(linear, nn.ReLU(), linear),
        nn.Sequential(linear, nn.Linear(5, 4)),
        nn.Sequential(nn.Flatten(0), linear),
        nn.Sequential(nn.Flatten(1, 2), linear),
        nn.Sequential(nn.Linear(4, 4).requires_grad_(False)),
        nn.Sequential(SparseLinear(torch.ones(4, 0), None, torch.ones(4, 0).bool())),
        nn.Sequential(linear, nn.Flatten()),
        nn.Sequential(nn.Sequential(linear)),
        type("Own", (nn.Sequential,), {})(linear),
        linear,
        Net(),
    ]
    assert [Perceptron.of(model) for model in others] == [None] * len(others)
    for hook in ("register_forward_hook", "register_full_backward_hook"):
        hooked = nn.Sequential(nn.Linear(4, 4))
        getattr(hooked[0], hook)(lambda *_: None)
        assert Perceptron.of(hooked) is None
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        hooked = nn.Sequential(nn.Linear(4, 4))
        getattr(next(hooked.parameters()), hook)(lambda *_: None)
        assert Perceptron.of(hooked) is None
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert Perceptron.of(nn.Sequential(nn.Linear(4, 4))) is None
    finally:
        everywhere.remove()


def test_what_a_row_takes() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    row, flat = Perceptron.of(model), Perceptron.of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    assert row is not None
    assert flat is not None
    labels = torch.tensor([0, 1])
    assert row.takes(torch.ones(2, 4), labels)
    assert flat.takes(torch.ones(2, 1, 2, 2), labels)
    assert not row.takes(torch.ones(2, 1, 4), labels)
    assert not row.takes(torch.ones(2, 5), labels)
    assert not row.takes(torch.ones(4, 2), labels)
    assert not row.takes(torch.ones(2, 4).double(), labels)
    assert not row.takes(torch.ones(2, 4), labels.float())
    assert not row.takes(torch.ones(2, 4), labels[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        assert not row.takes(torch.ones(2, 4), labels)
    model.double()
    assert not row.takes(torch.ones(2, 4), labels)


class Net(nn.Module):
    """Convolutions, a normalisation, a stride, a shared and an ineligible layer, a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.fc1 = nn.Linear(12, 20)
        self.fc2 = nn.Linear(20, 20)
        self.tied = nn.Linear(20, 20)
        self.tied.weight = self.fc2.weight
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(self.grouped(F.relu(self.bn(self.conv1(x))))))
        x = F.relu(self.fc1(x.mean((2, 3))))
        logits: Tensor = self.fc(F.relu(self.tied(F.relu(self.fc2(x)))))
        return logits


def a_net(density: float = 0.2) -> tuple[Net, dict[str, Tensor]]:
    """A network whose pruned weights are zero, and its mask."""
    torch.manual_seed(1)
    model = Net()
    mask = {name: torch.rand_like(p) < density for name, p in model.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        for name, alive in mask.items():
            model.get_parameter(name).mul_(alive)
    return model, mask


@needs_kernels
def test_choices_leave_alone_what_must_stay_dense() -> None:
    model, mask = a_net()
    chosen = kernels.choices(model, mask)
    assert list(chosen) == list(mask)
    assert {name for name, choice in chosen.items() if choice == "dense"} == {"grouped.weight", "fc2.weight"}
    model.fc1.register_forward_hook(lambda *_: None)
    assert kernels.choices(model, mask)["fc1.weight"] == "dense"
    assert set(kernels.choices(model, {n: torch.ones_like(m) for n, m in mask.items()}).values()) == {"dense"}
    assert set(kernels.choices(model.double(), mask).values()) == {"dense"}


@pytest.mark.parametrize(
    "register", [name for name in dir(nn.Module) if name.startswith("register") and "hook" in name]
)
def test_a_module_with_any_hook_is_not_plain(register: str) -> None:
    module = nn.Linear(2, 2)
    assert layers.is_plain(module)
    hook = getattr(module, register)(lambda *_: None)
    assert not layers.is_plain(module)
    if hook is not None:  # that before a state dict is made cannot be removed in torch 2.6
        hook.remove()
        assert layers.is_plain(module)


def test_rule() -> None:
    assert kernels.choose((10, 100), 0.99)
    assert not kernels.choose((10, 100), 1)
    assert kernels.choose((100, 300), 0.75)
    assert not kernels.choose((100, 300), 0.76)
    for shape, most, most_of_others in (((300, 784), 0.65, 0.55), ((1000, 1000), 0.6, 0.45), ((4096, 4096), 0.45, 0.3)):
        for batch_size in (116, 128, 256, 512, 1000):  # they fill nine tenths of blocks of 128 samples
            assert kernels.choose(shape, most, batch_size)
            assert not kernels.choose(shape, most + 0.01, batch_size)
        for batch_size in (16, 64, 115, 129, 200, 300):
            assert kernels.choose(shape, most_of_others, batch_size)
            assert not kernels.choose(shape, most_of_others + 0.01, batch_size)
    assert kernels.choose((16, 3, 3, 3), 0.85, beside=True)
    assert not kernels.choose((16, 3, 3, 3), 0.86, beside=True)
    assert not kernels.choose((16, 3, 3, 3), 0.41)
    assert kernels.choose((16, 16, 3, 3), 0.4)
    assert not kernels.choose((16, 16, 3, 3), 0.41)
    assert kernels.choose((16, 3, 3, 3), 1, beside=True, packed=True)
    for inputs, most in ((16, 0.75), (256, 0.75), (257, 0.7), (1024, 0.7), (1025, 0.65), (2**14, 0.65)):
        for shape in ((256, inputs, 1, 1), (64, inputs, 2, 2)):  # limits hold for numbers of weights
            assert kernels.choose(shape, most, packed=True)
            assert not kernels.choose(shape, most + 0.01, packed=True)
    assert kernels.choose((128, 256, 1, 1), 1, beside=True, packed=True)
    assert not kernels.choose((129, 256, 1, 1), 0.76, beside=True, packed=True)
    assert not kernels.choose((128, 256, 1, 1), 0.86, packed=True)
    assert not kernels.choose((128, 256, 1, 1), 0.41, beside=True)
    assert kernels.choose((16, 16, 3, 3), 0.75, 32, packed=True)
    assert not kernels.choose((16, 16, 3, 3), 0.11, 31, packed=True)
    for batch_size, most in (
        (33, 0.1),
        (47, 0.1),
        (48, 0.3),
        (51, 0.3),
        (52, 0.75),
        (71, 0.1),
        (72, 0.75),
        (100, 0.75),
    ):
        assert kernels.choose((16, 16, 3, 3), most, batch_size, packed=True)
        assert not kernels.choose((16, 16, 3, 3), most + 0.01, batch_size, packed=True)
    assert kernels.choose((300, 784), 0.55, 33, packed=True)
    assert kernels.choose((300, 784), 0.55, 16)
    assert not kernels.choose((300, 784), 0.01, 15)
    assert kernels.choose((16, 16, 3, 3), 0.1, 63)
    assert not kernels.choose((16, 16, 3, 3), 0.11, 63)


@needs_kernels
def test_small_convolutions_do_as_their_neighbours() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4)))
    mask = {name: torch.zeros_like(p).bool() for name, p in model.named_parameters() if p.dim() == 4}
    for name, alive in zip(mask, (460, 460, 230, 500), strict=True):  # of 576
        mask[name].view(-1)[:alive] = True
    assert list(kernels.choices(model, mask).values()) == ["dense", "sparse", "sparse", "dense"]


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.sampled_from([1, 7, 64]), st.integers(1, 5), st.integers(2, 9), st.integers(2, 9)),
    layout=LAYOUTS,
    how=st.sampled_from([{}, {"stride": 1}, {"padding": 1}, {"ceil_mode": True}, {"return_indices": True}]),
)
def test_max_pooling_keeps_layout_and_bits(seed: int, shape: tuple[int, ...], layout: str, how: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    dense = nn.MaxPool2d(2, **how)
    x = in_layout(torch.randn(shape), layout)
    results = []
    for pool in (dense, MaxPool2d.of(copy.deepcopy(dense))):
        inputs = x.detach().requires_grad_()
        y = pool(inputs)
        y = y[0] if "return_indices" in how else y
        y.square().sum().backward()
        assert inputs.grad is not None
        results.append((y.detach(), inputs.grad))
    assert all(map(torch.equal, *results))
    if x.stride() == layers._strides(x.shape) and "return_indices" not in how:
        assert results[1][0].stride() == layers._strides(results[1][0].shape)


@needs_kernels
@pytest.mark.parametrize("index", [5, 3_000_000_000, 2**32 + 5, 70_000**2 - 1])
def test_every_weight_of_a_layer_of_more_than_an_int_counts(index: int) -> None:
    side = 70_000
    everything = torch.ones(side, dtype=torch.bool)
    one = layers.extension.Layer(torch.tensor([index]), side, side, (1, 1), (1, 1), 1, (0, 0), None, everything)
    x, y = torch.zeros(1, side), layers.empty((1, side))
    x[0, index % side] = 3
    chain = layers.extension.Chain((one,), (False,))
    chain.forward((torch.tensor([2.0]), None), x, y, torch.empty(chain.floats(1)))
    assert y[0, index // side] == 6
    assert y.count_nonzero() == 1


@needs_kernels
@pytest.mark.parametrize("kind", ["linear", "convolution", "batch norm"])
def test_gradients_that_come_as_a_negated_view(kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module
    x = layers.empty((8, 3) if kind == "linear" else (8, 3, 5, 6)).normal_().requires_grad_()
    if kind == "linear":
        layer = SparseLinear(torch.randn(4, 3), torch.randn(4), torch.ones(4, 3).bool())
    elif kind == "convolution":
        layer = SparseConv2d(torch.randn(4, 3, 2, 2), torch.randn(4), torch.ones(4, 3, 2, 2).bool())
    else:
        layer = BatchNorm2d.of(nn.BatchNorm2d(3))
    y = layer(x)
    weight = torch.randn(y.shape)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad((-weight * y).sum(), inputs, retain_graph=True)
    delta = layers.empty(y.shape).copy_(weight)
    assert torch._neg_view(delta).is_neg()
    found = torch.autograd.grad(y, inputs, torch._neg_view(delta), retain_graph=True)
    assert all(map(torch.allclose, found, expected))
    z = torch.complex(torch.ones(y.shape), y).conj()
    found = torch.autograd.grad((z * (2 + 1j)).real.sum(), inputs, retain_graph=True)
    assert all(map(torch.allclose, found, torch.autograd.grad(y.sum(), inputs)))


@needs_kernels
def test_weights_that_are_a_negated_view_or_a_subclass() -> None:
    torch.manual_seed(0)
    layer, x = SparseLinear(torch.randn(4, 3), None, torch.ones(4, 3).bool()), torch.randn(8, 3)
    values = layer.values.detach()
    negated = torch.func.functional_call(layer, {"values": torch._neg_view(values)}, x)
    assert torch.allclose(negated, -layer(x))
    assert torch.allclose(layer(x.as_subclass(Own)).as_subclass(Tensor), layer(x))


@needs_kernels
def test_a_chain_keeps_its_layers() -> None:
    layer = a_convolution(torch.tensor([0, 5]), outputs=4, inputs=3, kernel=(1, 1), image=(1, 1))
    with pytest.raises(TypeError):
        layers.extension.Chain([layer], [True])
    with pytest.raises(TypeError):
        layers.extension.Chain((layer, "layer"), [True, True])
    chain = layers.extension.Chain((layer,), [True])
    before = sys.getrefcount(layer)
    del chain
    assert sys.getrefcount(layer) < before


@needs_kernels
def test_targets_have_memory_of_their_own() -> None:
    weight = torch.ones(3, 3)
    layer = SparseLinear(weight, None, weight.bool()).kernel((3,))
    chain = layers.extension.Chain((layer,), [False])
    values, x, memory = torch.ones(9), torch.ones(7, 3), torch.empty(chain.floats(7))
    for expanded in (torch.empty(7, 1).expand(7, 3), torch.empty(3).expand(7, 3)):
        with pytest.raises(ValueError, match=r"target: expected .* not expanded, got"):
            chain.forward((values, None), x, expanded, memory)
        with pytest.raises(ValueError, match=r"target: expected .* not expanded, got"):
            chain.backward((values, None), x, memory, (None, None), expanded)
    own = "target: expected memory of its own, got that of "
    with pytest.raises(ValueError, match=own + "source"):
        chain.forward((values, None), x, x, memory)
    with pytest.raises(ValueError, match=own + "memory"):
        chain.forward((values, None), x, memory[:21].view(7, 3), memory)
    with pytest.raises(ValueError, match=own + "delta"):
        chain.backward((values, None), x, memory, (None, None), x)
    with pytest.raises(ValueError, match=own + "memory"):
        chain.backward((values, None), x, memory, (None, None), memory[:21].view(7, 3))
    images = layers.empty((7, 3, 1, 1)).fill_(1)
    with pytest.raises(ValueError, match=own + "source"):
        layer.forward(values, None, images, images)
    with pytest.raises(ValueError, match=own + "delta"):
        layer.input_gradient(values, images, images)
    one = torch.empty(1, 3).expand(1, 3)
    chain.forward((values, None), x[:1], one, torch.empty(chain.floats(1)))
    assert one.tolist() == [[3, 3, 3]]


@pytest.fixture
def other_defaults() -> Iterator[None]:
    """PyTorch's defaults for new tensors as they may be set: float64 on a device without numbers."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_defaults_for_new_tensors_do_not_matter(other_defaults: None) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float32, device="cpu") - 0.3

    linear = nn.Sequential()
    for _ in range(2):
        mask = tensor(9, 9) > 0
        linear.append(SparseLinear(tensor(9, 9), tensor(9), mask)).append(nn.ReLU())
    linear.append(nn.Linear(9, 9, dtype=torch.float32, device="cpu"))
    labels = torch.zeros(16, dtype=torch.int64, device="cpu")
    row = Perceptron.of(linear)
    assert row is not None
    assert row.takes(tensor(16, 9), labels) or not kernels.available()
    row.cross_entropy(tensor(16, 9), labels)
    images = nn.Sequential(
        SparseConv2d(tensor(9, 9, 2, 2), tensor(9), tensor(9, 9, 2, 2) > 0),
        BatchNorm2d.of(nn.BatchNorm2d(9, dtype=torch.float32, device="cpu")),
    )
    for model, x in ((linear, tensor(16, 9)), (images, tensor(16, 9, 3, 3))):
        y = model(x)
        assert y.is_cpu
        y.backward(torch.ones_like(y))
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    pixels, scale = torch.zeros((5, 1, 3, 4), dtype=torch.uint8, device="cpu"), tensor(1, 1, 1)
    normal = kernels.normalise_images(pixels, labels, scale, scale)
    assert normal.is_cpu
    assert normal.dtype == torch.float32


def test_training_does_not_depend_on_the_default_type() -> None:
    digits, model = datasets.load("digits", None), nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10))
    mask = prune(model.state_dict(), Mask.ones_like(model), magnitude, 0.8)
    states = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            states.append(train(model, model.state_dict(), mask, digits, Recipe(iterations=3), seed=0).weights)
        finally:
            torch.set_default_dtype(torch.float32)
    assert states[0].hash == states[1].hash


@needs_kernels
def test_kernels_that_another_thread_clears_are_given_all_the_same() -> None:
    class Forgetful(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None: ...

    layer = SparseLinear(torch.ones(4, 3), None, torch.ones(4, 3).bool())
    layer._kernels = Forgetful()
    assert layer.kernel((3,)) is not None


@pytest.mark.parametrize("wrong", ["images", "indices", "mean", "scale"])
def test_images_of_other_types_are_normalised_by_torch(wrong: str) -> None:
    images, indices = torch.randint(256, (5, 2, 3, 4), dtype=torch.uint8), torch.tensor([4, 0])
    mean, scale = torch.rand(2, 1, 1), torch.rand(2, 1, 1)
    expected = kernels.normalise_images(images, indices, mean, scale)
    given = {"images": images, "indices": indices, "mean": mean, "scale": scale}
    given[wrong] = given[wrong].int() if wrong == "indices" else given[wrong].double()
    found = kernels.normalise_images(**given)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)


def test_without_kernels_everything_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = a_net()
    monkeypatch.setattr(layers, "extension", None)
    assert not kernels.available()
    assert kernels.instruction_set() is None
    assert set(kernels.choices(model, mask).values()) == {"dense"}
    assert isinstance(kernels.sparsify(model, mask).get_submodule("fc"), nn.Linear)


def test_missing_kernels_are_told_once(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    ones = Mask.ones_like(model)
    half = prune(model.state_dict(), ones, magnitude, 0.5)
    digits, recipe = datasets.load("digits", None), Recipe(iterations=2)

    def count_warnings(mask: Mask) -> int:
        recwarn.clear()
        train(model, model.state_dict(), mask, digits, recipe, seed=0)
        return [warning.category for warning in recwarn].count(kernels.NoKernelsWarning)

    assert count_warnings(half) == 0 or not kernels.available()
    monkeypatch.setattr(layers, "extension", None)
    assert count_warnings(ones) == 0, "nothing is lost"
    assert [count_warnings(half), count_warnings(half)] == [1, 0]


@pytest.mark.parametrize("door", ["accelerate", "train"])
def test_the_warning_of_missing_kernels_names_the_place_of_the_call(
    door: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    half = prune(model.state_dict(), Mask.ones_like(model), magnitude, 0.5)
    digits = datasets.load("digits", None)
    monkeypatch.setattr(layers, "extension", None)

    def call() -> None:
        if door == "train":
            train(model, model.state_dict(), half, digits, Recipe(iterations=1), seed=0)
        else:
            kernels.accelerate(model, half)

    call()
    code = call.__code__
    (warning,) = [warning for warning in recwarn if warning.category is kernels.NoKernelsWarning]
    assert warning.filename == __file__
    assert warning.lineno in {line for *_, line in code.co_lines()}


def test_missing_kernels_are_told_by_a_run(tmp_path: Path) -> None:
    """Once, by the run, and not by the workers too, which have none either."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tombola.kernels._sparse'] = None\n")
    study = ["digits", "--importances", "magnitude", "--seeds", "0", "--levels", "1", "--recipe.epochs", "1"]
    program = "from tombola.cli import main; exit(main())"
    command = [sys.executable, "-c", program, "run", *study, "--store", str(tmp_path / "store"), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=LONG)
    assert done.stderr.count("without its compiled kernels") == 1
    records = [json.loads(path.read_text()) for path in (tmp_path / "store").rglob("record.json")]
    assert {record["machine"]["kernels"] for record in records} == {None}


@needs_kernels
def test_training_agrees_with_masked_dense() -> None:
    dense, mask = a_net()
    sparse = kernels.sparsify(copy.deepcopy(dense), mask)
    assert sum(p.numel() for p in sparse.parameters()) < sum(p.numel() for p in dense.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=1e-3) for m in (dense, sparse)]
    for _ in range(5):
        x, y = torch.randn(33, 3, 9, 9), torch.randint(4, (33,))
        for model, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y))
            for name, alive in mask.items() if model is dense else ():
                gradient = dense.get_parameter(name).grad
                assert gradient is not None
                gradient.mul_(alive)
            if model is sparse:  # the layers that stayed dense
                for name, parameter in sparse.named_parameters():
                    if name in mask and parameter.grad is not None:
                        parameter.grad.mul_(mask[name])
            optimizer.step()
    expected, state = dense.state_dict(), kernels.dense_state(sparse)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(state[name], tensor, rtol=1e-4, atol=1e-5), name
    for name, alive in mask.items():
        assert state[name][~alive].eq(0).all()
    fresh = Net()
    fresh.load_state_dict(state)
    sparse.eval(), fresh.eval()
    assert torch.allclose(sparse(x), fresh(x), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_bits_repeat_and_survive_copies() -> None:
    model, mask = a_net()
    x = torch.randn(130, 3, 9, 9)
    sparse = kernels.sparsify(model, mask)
    first = sparse(x)
    assert torch.equal(first, sparse(x))
    again, _ = a_net()
    assert torch.equal(first, kernels.sparsify(again, mask)(x))
    for other in (copy.deepcopy(sparse.eval()), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), sparse(x))


def test_weight_is_dense_and_differentiable() -> None:
    torch.manual_seed(0)
    mask = torch.rand(4, 3, 2, 2) < 0.4
    dense = torch.randn(4, 3, 2, 2)
    layer = SparseConv2d(dense, None, mask)
    assert torch.equal(layer.weight, dense * mask)
    assert abs(layer.density - mask.float().mean().item()) < 1e-6
    layer.double()

    def loss(values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"values": values}, torch.ones(1, 3, 2, 2, dtype=torch.float64))
        return y.square().sum()

    values = layer.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, values)
    torch.autograd.backward(layer.weight.square().sum())
    assert layer.values.grad is not None
    assert torch.allclose(layer.values.grad, 2 * layer.values.detach())


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (0, 3)])
def test_linear_takes_what_torch_takes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mask = torch.rand(4, 3) < 0.5
    layer = SparseLinear(torch.randn(4, 3), torch.randn(4), mask)
    x = torch.randn(shape)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.randn(2, 7))


def test_mask_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected a bool mask of shape \(4, 3\), got torch.bool \(3, 4\)"):
        SparseLinear(torch.randn(4, 3), None, torch.ones(3, 4, dtype=torch.bool))


# The boundary: whatever Python could get wrong is an exception, never memory.


OUTPUTS, INPUTS, KERNEL, IMAGE = 4, 3, (2, 2), (5, 6)
"""Of the convolution below: a stride of 1, no padding, images out of 4 x 5."""


def a_convolution(alive: Tensor | None = None, **changes: Any) -> Any:
    """The kernel of a convolution with every second weight alive."""
    weights = OUTPUTS * INPUTS * KERNEL[0] * KERNEL[1]
    how: dict[str, Any] = {
        "alive": torch.arange(0, weights, 2) if alive is None else alive,
        "outputs": OUTPUTS,
        "inputs": INPUTS,
        "kernel": KERNEL,
        "image": IMAGE,
        "stride": 1,
        "padding": (0, 0),
        "instruction_set": None,
        "read": torch.ones(OUTPUTS, dtype=torch.bool),
    }
    return layers.extension.Layer(**(how | changes))


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alive": torch.tensor([0, 48])}, "alive: expected ascending indices from 0 to 47, got 48 at position 1"),
        ({"alive": torch.tensor([-1, 3])}, "alive: expected ascending indices from 0 to 47, got -1 at position 0"),
        ({"alive": torch.tensor([3, 1])}, "alive: expected ascending indices from 0 to 47, got 1 at position 1"),
        ({"alive": torch.tensor([3, 3])}, "alive: expected ascending indices from 0 to 47, got 3 at position 1"),
        ({"alive": torch.tensor([1], dtype=torch.int32)}, "alive: expected a tensor of int64 .* got torch.int32"),
        ({"alive": torch.arange(8)[::2]}, r"alive: .* contiguous, of shape \(any,\), got .* strides \(2,\)"),
        ({"alive": [1, 2]}, "alive: expected a plain tensor, got list"),
        ({"read": torch.ones(3).bool()}, r"read: .* of shape \(4,\), got torch.bool of shape \(3,\)"),
        ({"read": torch.ones(4)}, "read: expected a tensor of bool .* got torch.float32"),
        ({"outputs": 0}, "outputs: expected from 1 to 1073741824, got 0"),
        ({"inputs": -3}, "inputs: expected from 1 to 1073741824, got -3"),
        (
            {"outputs": 2**30 + 1, "read": torch.ones(0).bool()},
            "outputs: expected from 1 to 1073741824, got 1073741825",
        ),
        ({"inputs": 2**30 + 1}, "inputs: expected from 1 to 1073741824, got 1073741825"),
        ({"kernel": (0, 2)}, "kernel: expected from 1 to 32768, got 0"),
        ({"image": (1, 6)}, "image: expected from 2 to 1048576, got 1"),
        ({"image": (5, 2**21)}, "image: expected from 1 to 1048576, got 2097152|from 2 to 1048576, got 2097152"),
        ({"stride": 0}, "stride: expected from 1 to 1048576, got 0"),
        ({"padding": (0, -1)}, "padding: expected from 0 to 1048576, got -1"),
        ({"instruction_set": "mmx"}, "instruction_set: expected one of this machine's, got 'mmx'"),
    ],
)
def test_a_layer_refuses_what_is_no_mask_of_its_weight(changes: dict[str, Any], message: str) -> None:
    a_convolution()
    with pytest.raises((ValueError, TypeError), match=message):
        a_convolution(**changes)


@needs_kernels
def test_a_layer_refuses_tiles_too_large_to_count() -> None:
    with pytest.raises(ValueError, match="image: the tiles of so large an image are too large"):
        a_convolution(image=(2**20, 2**20), kernel=(2**15, 2**15), inputs=1, alive=torch.tensor([0]))


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "float64": (lambda x: x.double(), "on the CPU, got torch.float64"),
    "bfloat16": (lambda x: x.bfloat16(), "on the CPU, got torch.bfloat16"),
    "meta": (lambda x: x.to("meta"), "on the CPU, got .* on meta"),
    "no tensor": (lambda x: x.numpy(), "expected a plain tensor, got ndarray"),
    "none": (lambda x: None, "expected a plain tensor, got NoneType|incompatible|with that of its bias"),
    "number": (lambda x: x.data_ptr(), "expected a plain tensor, got int"),
    "too short": (lambda x: x[..., :-1].clone(), "of shape .*, got"),
    "too long": (lambda x: torch.cat((x, x), -1), "of shape .*, got"),
    "a dimension more": (lambda x: x[None], "of shape .*, got"),
    "five dimensions more": (lambda x: x[None, None, None, None, None], "of shape .*, got"),
    "freed": (lambda x: _free(x), "with memory, got|of shape"),
    "of its own kind": (lambda x: x.as_subclass(Own), "expected a plain tensor, got Own"),
}
WHOLE = {
    "cut short": (lambda x: _cut(x), "with memory, got"),
    "negated": (torch._neg_view, "not a negated view, got"),
}
"""What is not looked up for contiguous floats, a network's weights and their gradients, and targets of a chain."""
GAPS = {"gaps": (lambda x: torch.stack((x, x), -1)[..., 0], "contiguous|varying fastest")}


class Own(Tensor):
    """A tensor that may say anything of its memory."""


def _free(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _cut(x: Tensor) -> Tensor:
    """The same tensor in the middle of a storage that ends before its last element."""
    wide = torch.cat((x.new_zeros(5), x.new_zeros(x.numel())))
    part = wide.as_strided(x.shape, x.stride(), 5)
    part.copy_(x)
    wide.untyped_storage().resize_((4 + x.numel()) * x.element_size())
    return part


def refuse_each(call: Callable[..., object], right: dict[str, Any], optional: set[str], strided: set[str]) -> None:
    """Give one wrong argument after the other to a call that goes well with the right ones."""
    call(**right)
    for name, tensor in right.items():
        if not isinstance(tensor, Tensor):
            continue
        checked = tensor.dtype != torch.float32 or name in strided or not tensor.is_contiguous()
        checked &= not (name == "target" and tensor.dim() == 2)
        more = ({} if name in strided else GAPS) | (WHOLE if checked else {})
        for kind, (change, message) in (WRONG | more).items():
            if kind == "none" and name in optional:
                call(**(right | {name: None}))
                continue
            with pytest.raises((ValueError, TypeError), match=message) as refused:
                call(**(right | {name: change(tensor)}))
            if not isinstance(refused.value, TypeError):
                assert str(refused.value).partition(": expected ")[0] in {*right, "gradients"}, (name, kind)


@needs_kernels
def test_a_layer_refuses_every_wrong_tensor() -> None:
    kernel, batch = a_convolution(), 7
    x, y = layers.empty((batch, INPUTS, *IMAGE)).fill_(1), layers.empty((batch, OUTPUTS, 4, 5)).fill_(1)
    values, bias = torch.ones(24), torch.ones(OUTPUTS)
    refuse_each(kernel.forward, {"values": values, "bias": bias, "source": x, "target": y}, {"bias"}, {"source"})
    refuse_each(kernel.input_gradient, {"values": values, "delta": y, "target": x}, set(), {"delta"})
    refuse_each(
        kernel.weight_gradient,
        {"source": x, "delta": y, "gradient": values, "bias_gradient": bias},
        {"bias_gradient"},
        {"source", "delta"},
    )
    more = layers.empty((batch + 1, *x.shape[1:])).fill_(1)
    with pytest.raises(
        ValueError, match=r"target: .* of shape \(8, 4, 4, 5\), got torch.float32 of shape \(7, 4, 4, 5\)"
    ):
        kernel.forward(values, bias, more, y)
    with pytest.raises(ValueError, match="delta: expected 8 samples like source, got 7"):
        kernel.weight_gradient(more, y, values, bias)
    with pytest.raises(ValueError, match=r"target: .* its first dimension varying fastest"):
        kernel.forward(values, bias, x, y.contiguous())


@needs_kernels
def test_a_layer_refuses_images_of_another_size_and_buffers_of_another_layer() -> None:
    kernel, other = a_convolution(), a_convolution(image=(6, 6))
    x, y = layers.empty((7, INPUTS, *IMAGE)).fill_(1), layers.empty((7, OUTPUTS, 4, 5)).fill_(1)
    values, bias = torch.ones(24), torch.ones(OUTPUTS)
    with pytest.raises(
        ValueError, match=r"source: .* of shape \(any, 3, 6, 6\), got torch.float32 of shape \(7, 3, 5, 6\)"
    ):
        other.forward(values, bias, x, y)
    fewer = a_convolution(torch.tensor([1, 2, 40]))
    with pytest.raises(ValueError, match=r"values: .* of shape \(3,\), got torch.float32 of shape \(24,\)"):
        fewer.forward(values, bias, x, y)
    with pytest.raises(ValueError, match=r"gradient: .* of shape \(3,\), got torch.float32 of shape \(24,\)"):
        fewer.weight_gradient(x, y, values, bias)
    kernel.forward(values, bias, x, y)


@needs_kernels
def test_a_chain_refuses_every_wrong_tensor() -> None:
    masks = [torch.rand(5, 3) < 2, torch.rand(2, 5) < 2]
    sparse = [SparseLinear(torch.ones(mask.shape), torch.ones(len(mask)), mask) for mask in masks]
    chain = layers.extension.Chain(tuple(layer.kernel(layer.shape[1:]) for layer in sparse), [True, False])
    x, y, memory = torch.ones(7, 3), layers.empty((7, 2)), torch.empty(chain.floats(7))
    names = ["values", "bias", "values2", "bias2"]

    def forward(source: Any, target: Any, memory: Any, **weights: Any) -> None:
        chain.forward(tuple(weights.values()), source, target, memory)

    def backward(delta: Any, memory: Any, target: Any, **tensors: Any) -> None:
        both = tuple(tensors.values())
        chain.backward(both[:4], delta, memory, both[4:], target)

    weights = dict(zip(names, [w.detach() for layer in sparse for w in (layer.values, layer.bias)], strict=True))
    first = {name: w for name, w in weights.items() if name in ("values", "bias")}
    one = layers.extension.Chain((sparse[0].kernel((3,)),), [True])
    own, hidden = torch.empty(one.floats(7)), layers.empty((7, 5))
    with pytest.raises(ValueError, match="weights: expected values and bias of 1 layers, got 4 tensors"):
        one.forward(tuple(weights.values()), x, hidden, own)

    def forward_one(source: Any, target: Any, memory: Any, values: Any, bias: Any) -> None:
        one.forward((values, bias), source, target, memory)

    def backward_one(**t: Any) -> None:
        one.backward(
            (t["values"], t["bias"]), t["delta"], t["memory"], (t["gradient"], t["bias_gradient"]), t["target"]
        )

    right = {"source": x, "target": hidden, "memory": own}
    refuse_each(forward_one, right | first, {"bias"}, {"source", "target"})
    gradients = {"gradient": torch.empty(15), "bias_gradient": torch.empty(5)}
    right = {"delta": hidden.fill_(1), "memory": own, "target": layers.empty((7, 3))}
    refuse_each(backward_one, right | first | gradients, {"bias", "bias_gradient", "target"}, {"delta", "target"})
    with pytest.raises(ValueError, match="gradients: expected that of a layer's values with that of its bias"):
        backward_one(**right, **first, **(gradients | {"gradient": None}))

    forward(x, y, memory, **weights)
    given = {f"d{name}": torch.empty_like(w) for name, w in weights.items()}
    backward(y, memory, None, **weights, **given)
    with pytest.raises(ValueError, match="gradients: expected values and bias of 2 layers, got 3 tensors"):
        backward(y, memory, None, **weights, **dict(list(given.items())[1:]))
    with pytest.raises(ValueError, match=r"values: .* of shape \(15,\), got torch.float32 of shape \(10,\)"):
        forward(x, y, memory, **dict(zip(names, [*weights.values()][2:] + [*weights.values()][:2], strict=True)))
    both, single = chain.floats(7), one.floats(7)
    assert both > single
    with pytest.raises(ValueError, match=rf"memory: .* of shape \({both},\), got torch.float32 of shape \({single},\)"):
        forward(x, y, own, **weights)
    with pytest.raises(ValueError, match=r"target: .* of shape \(7, 2\), got torch.float32 of shape \(8, 2\)"):
        forward(x, layers.empty((8, 2)), memory, **weights)
    with pytest.raises(ValueError, match="batch: expected 0 or more, got -1"):
        chain.floats(-1)


@needs_kernels
def test_batch_norm_refuses_every_wrong_tensor() -> None:
    x, three = layers.empty((7, 3, 4, 5)).normal_(), torch.ones(3)
    y, statistics = layers.empty(x.shape).fill_(1), torch.empty(3, 3)

    def forward(**tensors: Any) -> None:
        layers.extension.batch_norm(epsilon=1e-5, **tensors)

    right = {"x": x, "weight": three, "bias": three.clone(), "statistics": statistics, "y": y}
    refuse_each(forward, right, set(), set())
    right = {"x": x, "delta": y, "weight": three, "statistics": statistics, "gradient": layers.empty(x.shape)}
    right |= {"weight_gradient": torch.empty(3), "bias_gradient": torch.empty(3)}
    refuse_each(layers.extension.batch_norm_gradient, right, set(), set())


@needs_kernels
def test_the_sum_with_a_bias_refuses_every_wrong_tensor() -> None:
    outputs, bias = torch.ones(3, 4), torch.tensor([1.0, 2.0, 3.0])
    layers.extension.add_bias(outputs, bias)
    assert outputs.tolist() == [[2.0] * 4, [3.0] * 4, [4.0] * 4]
    refuse_each(partial(layers.extension.add_bias, outputs), {"bias": bias}, set(), set())
    for wrong in (outputs.double(), outputs.t(), outputs[0], outputs[:, ::2], outputs.to("meta")):
        with pytest.raises(ValueError, match="outputs: expected"):
            layers.extension.add_bias(wrong, bias)
    with pytest.raises(ValueError, match=r"bias: .* of shape \(2,\)"):
        layers.extension.add_bias(outputs[:2], bias)
    with pytest.raises(ValueError, match="expected memory of its own"):
        layers.extension.add_bias(outputs, outputs[0, :3])


@needs_kernels
def test_a_gate_refuses_every_wrong_tensor() -> None:
    delta, y, target = torch.ones(3, 4), torch.ones(3, 4), torch.empty(3, 4)
    refuse_each(layers.extension.gate, {"delta": delta, "y": y, "target": target}, set(), {"delta", "y", "target"})
    for wrong in (delta, y, torch.empty(1, 4).expand(3, 4)):
        with pytest.raises(ValueError, match="target: expected"):
            layers.extension.gate(delta, y, wrong)


@needs_kernels
def test_normalising_images_refuses_every_wrong_tensor() -> None:
    images, indices = torch.zeros((5, 2, 3, 4), dtype=torch.uint8), torch.tensor([0, 4, 2])
    mean = torch.ones(2, 1, 1)
    target = torch.empty((3, 2, 3, 4))
    right: dict[str, Any] = {
        "images": images,
        "indices": indices,
        "mean": mean,
        "scale": mean.clone(),
        "target": target,
    }
    refuse_each(layers.extension.normalise_images, right, set(), set())
    offsets, flips, cropped = torch.tensor([[0, 4]] * 5), torch.zeros(5, dtype=torch.bool), torch.empty((3, 3, 4, 2))
    right |= {"offsets": offsets, "flips": flips, "crop": 2, "target": cropped}
    augment = layers.extension.augment_images
    refuse_each(augment, right, set(), set())
    with pytest.raises(ValueError, match="crop: expected from 0 to 1048576, got -1"):
        augment(**right | {"crop": -1})
    for name, wrong in (("indices", -1), ("indices", 5), ("offsets", -1), ("offsets", 5), ("offsets", 2**62)):
        tensor = right[name].clone()
        tensor[-1] = wrong
        others = {"indices": torch.tensor([4, 4, 4])} if name == "offsets" else {}
        with pytest.raises(IndexError, match=rf"{name}: expected numbers .*, got {wrong} "):
            augment(**right | others | {name: tensor})


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_images_out_of_range_are_an_error(wrong: int) -> None:
    images, ones = torch.zeros((5, 1, 3, 4), dtype=torch.uint8), torch.ones(1, 1, 1)
    for layout in (images, images.expand(5, 2, 3, 4)[:, :1].transpose(2, 3)):
        with pytest.raises(IndexError, match="ind"):
            kernels.normalise_images(layout, torch.tensor([0, wrong]), ones, ones)
    if kernels.available():
        with pytest.raises(
            IndexError, match=f"indices: expected numbers of 5 images, from 0, got {wrong} at position 1"
        ):
            kernels.normalise_images(images, torch.tensor([0, wrong]), ones, ones)


def test_a_layer_with_what_the_kernels_cannot_do_is_computed_by_torch() -> None:
    torch.manual_seed(0)
    convolution = SparseConv2d(torch.randn(4, 3, 2, 2), torch.randn(4), torch.rand(4, 3, 2, 2) < 0.5)
    x = torch.randn(16, 3, 5, 6)
    assert convolution.bias is not None
    convolution.bias.data = convolution.bias.data.double()
    with pytest.raises(RuntimeError, match=r"(?i)type"):  # torch's own: never silently a wrong output
        convolution(x)
    linear = SparseLinear(torch.randn(4, 3), torch.randn(4), torch.rand(4, 3) < 0.5)
    turned = torch.randn(16, 3, dtype=torch.complex64).conj().imag
    assert turned.is_neg()
    assert torch.allclose(linear(turned), F.linear(turned, linear.weight, linear.bias), atol=1e-6)


@needs_kernels
def test_values_that_do_not_belong_to_the_mask_are_an_error() -> None:
    layer = SparseLinear(torch.randn(4, 3), torch.randn(4), torch.ones(4, 3).bool())
    for count in (11, 13):
        with pytest.raises(ValueError, match=rf"values: .* of shape \(12,\), got torch.float32 of shape \({count},\)"):
            torch.func.functional_call(layer, {"values": torch.ones(count)}, torch.ones(16, 3))


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("batch", [64, 128])
def test_images_of_one_pixel_with_padding(instruction_set: str, batch: int) -> None:
    torch.manual_seed(0)
    check(
        lambda w, b, m: SparseConv2d(w, b, m, 1, (1, 1), instruction_set),
        lambda x, w, b: F.conv2d(x, w, b, 1, 1),
        a_mask((5, 4, 1, 1), "0.9"),
        torch.randn(batch, 4, 1, 1),
        "batch last",
        "batch last",
    )


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (130, 2, 3, 4), (2, 1, 40, 60)])
def test_every_instruction_set_normalises(instruction_set: str, shape: tuple[int, int, int, int]) -> None:
    """What a machine's best instruction set does is tested above; its others do the same, to rounding."""
    torch.manual_seed(0)
    x, channels = layers.empty(shape).normal_(), shape[1]
    weight, bias, delta = torch.randn(channels), torch.randn(channels), layers.empty(shape).normal_()
    y, statistics = layers.empty(shape), torch.empty(3, channels)
    layers.extension.batch_norm(x, weight, bias, 1e-5, statistics, y, instruction_set)
    dx, dweight, dbias = layers.empty(shape), torch.empty(channels), torch.empty(channels)
    layers.extension.batch_norm_gradient(x, delta, weight, statistics, dx, dweight, dbias, instruction_set)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.batch_norm(exact[0], None, None, exact[1], exact[2], True, 0, 1e-5)
    gradients = torch.autograd.grad(expected, exact, delta.double())
    for ours, wanted in zip((y, dx, dweight, dbias), (expected, *gradients), strict=True):
        assert torch.allclose(ours.double(), wanted, rtol=1e-4, atol=1e-4)
    images, indices = torch.randint(256, shape, dtype=torch.uint8), torch.tensor([1, 0, 1])
    mean, scale, target = torch.rand(channels, 1, 1), torch.rand(channels, 1, 1), torch.empty((3, *shape[1:]))
    layers.extension.normalise_images(images, indices, mean, scale, target, instruction_set)
    assert torch.equal(target, (images[indices].float() - mean) * scale)


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 4), max_size=9),
    st.integers(0, 2**32),
)
def test_images_are_normalised_with_the_bits_of_torch(
    channels: int, height: int, width: int, chosen: list[int], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (5, channels, height, width), generator=draw, dtype=torch.uint8)
    mean = 255 * torch.rand((channels, 1, 1), generator=draw)
    scale = torch.rand((channels, 1, 1), generator=draw)
    which = torch.tensor(chosen, dtype=torch.int64)
    expected = (images[which].float() - mean) * scale
    assert torch.equal(kernels.normalise_images(images, which, mean, scale), expected)
    columns = images.to(memory_format=torch.channels_last)
    assert torch.equal(kernels.normalise_images(columns, which, mean, scale), expected)

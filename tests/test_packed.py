"""Networks whose activations stay packed compute what dense networks compute, and recorded operations hide nothing."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from test_kernels import (
    KINDS,
    LAYOUTS,
    SETS,
    a_mask,
    assert_rounding,
    in_layout,
    needs_kernels,
    refuse_each,
)
from tombola import Dataset, Mask, Planner, Recipe, Store, Study, Task, kernels, load_problem, prune, train
from tombola.kernels import layers, packed
from tombola.kernels.packed import Memory, Packed, Packing
from tombola.kernels.recording import record
from tombola.kernels.replace import replace_layers
from tombola.models import resnet20

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        packed._top_hooks is None, reason="this torch computes layer by layer; to run: with torch 2.7 or newer"
    ),
]


def run(model: nn.Module, x: Tensor, memory: Memory | None = None) -> Tensor:
    """The outputs of a forward pass that is recorded."""
    packing = Packing(memory or Memory())
    with record(packing):
        y = model(x)
    packing.compute()
    outputs: Tensor = packed.compute(y)
    return outputs


def is_packed(y: Tensor) -> bool:
    """Whether a function of recorded operations had a part in a tensor."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [each for each, _ in node.next_functions]
    return any(isinstance(node, packed._Compute._backward_cls) for node in seen)


def sparse_of(model: nn.Module, kind: str = "0.3") -> tuple[nn.Module, nn.Module]:
    """A network whose weights are masked, in float64, and the same with sparse layers."""
    mask = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            mask[name] = a_mask(tuple(parameter.shape), kind)
            parameter.data.mul_(mask[name])
    return copy.deepcopy(model).double(), replace_layers(model, mask, list(mask))


def assert_equal_steps(model: nn.Module, x: Tensor, kind: str = "0.3", *, packs: bool = True) -> None:
    """Outputs, gradients and buffers of a step against float64, with bounds for networks of a few layers."""
    exact, sparse = sparse_of(model, kind)
    memory = Memory()
    inputs = [x.double().requires_grad_(), x.requires_grad_()]
    outputs = [exact(inputs[0]), run(sparse, inputs[1], memory)]
    assert is_packed(outputs[1]) == packs
    delta = torch.randn(outputs[0].shape)
    for y in outputs:
        torch.autograd.backward(y, delta.to(y.dtype))
    close(outputs[1], outputs[0])
    assert inputs[0].grad is not None
    close(inputs[1].grad, inputs[0].grad)
    alive = {name: layer.alive for name, layer in sparse.named_modules() if isinstance(layer, layers.Sparse)}
    largest = max(float(each.grad.abs().max()) for each in exact.parameters() if each.grad is not None)
    for name, parameter in sparse.named_parameters():
        path, _, attribute = name.rpartition(".")
        dense = exact.get_parameter(f"{path}.weight" if attribute == "values" else name).grad
        close(
            parameter.grad,
            dense.flatten()[alive[path]] if dense is not None and path in alive and attribute == "values" else dense,
            largest,
        )
    for name, buffer in sparse.named_buffers():
        if not name.endswith("alive"):
            close(buffer, exact.get_buffer(name))
    given = [id(images) for free in memory._free.values() for images in free]
    assert len(given) == len(set(given)), "no memory is given back twice"


def close(ours: Tensor | None, exact: Tensor | None, scale: float = 1) -> None:
    """Compare numbers that were computed in float32 and in float64; `scale` is the size of those that were summed."""
    assert (ours is None) == (exact is None)
    if ours is None or exact is None:
        return
    ours, exact = ours.detach(), exact.detach()
    assert ours.shape == exact.shape
    if exact.numel():
        assert float((ours.double() - exact).abs().max()) <= 2e-4 * max(scale, float(exact.abs().max()))


# Single operations, with the bound of the rounding error.


@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.sampled_from([1, 3, 16, 33, 64]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.integers(1, 4),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    kind=KINDS,
    layout=LAYOUTS,
    bias=st.booleans(),
)
@example(  # channels of several tiles
    seed=0, batch=17, channels=(50, 50), kernel=(3, 3), image=(3, 6), stride=1, padding=(1, 1), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # eight pixels are two rows, and four are left
    seed=0, batch=33, channels=(3, 4), kernel=(3, 3), image=(3, 4), stride=1, padding=(1, 1), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # eight pixels lie in two rows
    seed=0, batch=33, channels=(3, 4), kernel=(3, 3), image=(3, 12), stride=1, padding=(1, 1), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # bands of rows
    seed=0, batch=33, channels=(64, 40), kernel=(3, 3), image=(6, 20), stride=1, padding=(1, 1), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # four pixels whose sources, or targets, are two apart
    seed=0, batch=33, channels=(5, 4), kernel=(3, 3), image=(8, 16), stride=2, padding=(1, 1), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # a step of two digits
    seed=0, batch=17, channels=(3, 2), kernel=(3, 3), image=(13, 44), stride=11, padding=(1, 1), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # pixels that no connection reads
    seed=0, batch=33, channels=(5, 4), kernel=(1, 1), image=(8, 16), stride=2, padding=(0, 0), kind="0.3",
    layout="contiguous", bias=True,
)  # fmt: skip
@example(  # strips of columns, and bands
    seed=0, batch=33, channels=(160, 96), kernel=(3, 3), image=(16, 20), stride=1, padding=(1, 1), kind="0.05",
    layout="contiguous", bias=True,
)  # fmt: skip
def test_a_convolution_equals_masked_dense(
    instruction_set: str, seed: int, batch: int, channels: tuple[int, int], kernel: tuple[int, int],
    image: tuple[int, int], stride: int, padding: tuple[int, int], kind: str, layout: str, bias: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    if any(side + 2 * more < taps for side, more, taps in zip(image, padding, kernel, strict=True)):
        return
    mask = a_mask((channels[1], channels[0], *kernel), kind)
    weight, added = torch.randn(mask.shape), torch.randn(channels[1]) if bias else None
    layer = kernels.SparseConv2d(weight, added, mask, stride, padding, instruction_set)
    x = in_layout(torch.randn(batch, channels[0], *image), layout).requires_grad_()
    y = run(layer, x, Memory(instruction_set))
    if not is_packed(y):
        assert kernel == image == (1, 1)  # a linear layer
        return
    delta = torch.randn(y.shape)
    weights = [layer.values, *([] if layer.bias is None else [layer.bias])]
    ours = [y.detach(), *torch.autograd.grad(y, (x, *weights), delta, retain_graph=True)]
    again = torch.autograd.grad(y, (x, *weights), delta)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], again, strict=True))

    def reference(sign: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = [sign(t.detach().double()) for t in (x, weight * mask, *([] if added is None else [added]))]
        inputs = [each.requires_grad_() for each in inputs]
        exact = F.conv2d(*inputs, stride=stride, padding=padding)
        return [exact.detach(), *torch.autograd.grad(exact, inputs, sign(delta.double()))]

    exact, bound = reference(lambda t: t), reference(torch.abs)
    exact[2], bound[2] = exact[2][mask], bound[2][mask]
    positions = delta.numel() // delta.shape[1]
    terms = [mask[0].numel() + 1, mask.numel() // mask.shape[1], positions, positions]
    for found, right, absolute, count in zip(ours, exact, bound, terms, strict=False):
        assert_rounding(found, right, absolute, count)


@pytest.mark.parametrize("frozen", [("values",), ("bias",), ("values", "bias"), ("values", "x"), ("bias", "x"), ("x",)])
def test_what_is_frozen_changes_no_other_gradient(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    layer = kernels.SparseConv2d(torch.randn(4, 3, 3, 3), torch.randn(4), a_mask((4, 3, 3, 3), "0.3"), 1, (1, 1))
    x, every = torch.randn(5, 3, 6, 6), {}
    for frozen_now in ((), frozen):
        tensors = {"values": layer.values, "bias": layer.bias, "x": x}
        for name, tensor in tensors.items():
            assert tensor is not None
            tensor.requires_grad_(name not in frozen_now)
            tensor.grad = None
        run(layer, x).square().sum().backward()  # type: ignore[no-untyped-call]
        for name, tensor in tensors.items():
            assert tensor is not None
            assert (tensor.grad is None) == (name in frozen_now)
            if not frozen_now:
                every[name] = tensor.grad
            elif tensor.grad is not None:
                close(tensor.grad, every[name].double())


@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.sampled_from([1, 16, 33]),
    channels=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.sampled_from([1, 3]),
    image=st.tuples(st.integers(1, 9), st.sampled_from([1, 4, 7, 8, 16])),
    stride=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@example(seed=0, batch=33, channels=(60, 60), size=3, image=(8, 16), stride=2, density=0.3, flags=(True, True, True))
@example(seed=0, batch=33, channels=(3, 2), size=3, image=(13, 44), stride=11, density=0.3, flags=(False, True, True))
def test_both_gradients_at_once_are_those_one_by_one(
    instruction_set: str, seed: int, batch: int, channels: tuple[int, int], size: int, image: tuple[int, int],
    stride: int, density: float, flags: tuple[bool, bool, bool],
) -> None:  # fmt: skip
    """Also where some outputs are not read, and where gradients of images are added or left out."""
    torch.manual_seed(seed)
    (inputs, outputs), (add, every, all_read), extension = channels, flags, layers.extension
    alive = (torch.rand(outputs * inputs * size * size) < density).nonzero().flatten()
    read = torch.ones(outputs, dtype=torch.bool) if all_read else torch.rand(outputs) < 0.5
    padding = (size // 2, size // 2)
    kernel = extension.Layer(alive, outputs, inputs, (size, size), image, stride, padding, instruction_set, read)
    if kernel.block != extension.block(instruction_set):
        return  # a linear layer
    shape = (batch, outputs, (image[0] - 1) // stride + 1, (image[1] - 1) // stride + 1)
    values, x, d = torch.randn(len(alive)), torch.randn(batch, inputs, *image), torch.randn(shape)
    before = torch.randn(x.shape)

    def packed_of(images: Tensor) -> Any:
        into = extension.PackedImages(tuple(images.shape), 2, instruction_set)
        extension.pack_images(images, into)
        return into

    def gradients(*, at_once: bool, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        source, delta, target = packed_of(of(x)), packed_of(of(d)), packed_of(before)
        dx, dw, db = torch.empty(x.shape), torch.full_like(values, torch.nan), torch.empty(outputs)
        if at_once:
            kernel.gradients_images(values, source, delta, dw, db, target, add=add, all=every)
        else:
            kernel.input_gradient_images(values, delta, target, add=add, all=every)
            kernel.weight_gradient_images(source, delta, dw, db)
        extension.unpack_images(target, dx)
        return dx, dw, db

    ours, each = (gradients(at_once=at_once, of=lambda t: t) for at_once in (True, False))
    assert torch.equal(ours[0], each[0])
    assert torch.equal(ours[2], each[2])
    assert bool(((ours[1] - each[1]).abs() <= 1e-5 * gradients(at_once=False, of=torch.abs)[1]).all())


@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.sampled_from([2, 16, 37]), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    offset=st.sampled_from([0.0, 100.0]),
    relu=st.booleans(),
    added=st.booleans(),
)
def test_normalisation_equals_torch(
    instruction_set: str, seed: int, shape: tuple[int, int, int, int], offset: float, relu: bool, added: bool
) -> None:
    torch.manual_seed(seed)
    memory, extension = Memory(instruction_set), layers.extension
    x, other, delta = torch.randn(shape) + offset, torch.randn(shape), torch.randn(shape)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    inputs = [each.double().requires_grad_() for each in (x, weight, bias, other)]
    exact = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True, eps=1e-5)
    exact = exact + inputs[3] if added else exact
    gate = (exact > 0) if relu else torch.ones_like(exact, dtype=torch.bool)
    gradients = torch.autograd.grad(exact * gate, inputs[: 4 if added else 3], delta.double())

    def pack(plain: Tensor, border: int) -> Any:
        buffer = memory.take(shape, border)
        extension.pack_images(plain, buffer)
        return buffer

    def unpack(images: Any) -> Tensor:
        plain = layers.empty(shape)
        extension.unpack_images(images, plain)
        return plain

    px, py, pd = pack(x, 1), memory.take(shape, 2), pack(delta, 3)
    more, statistics = (pack(other, 0) if added else None), torch.empty(3, shape[1])
    extension.normalise_packed(px, weight, bias, 1e-5, statistics, more, relu, py)
    size = 1 + offset
    assert torch.allclose(unpack(py).double(), (exact * gate).detach(), rtol=0, atol=1e-5 * size)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert torch.allclose(statistics[0].double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(statistics[1].double(), variance, rtol=1e-5, atol=1e-6)
    if relu and float(exact.detach().abs().min()) < 1e-4 * size:
        return  # rounding may decide otherwise
    dx, dw, db = memory.take(shape, 0), torch.empty(shape[1]), torch.empty(shape[1])
    given = py if relu and added else None
    extension.normalise_gradient_packed(px, pd, weight, bias, statistics, relu, given, dx, dw, db)
    spread = float((variance + 1e-5).rsqrt().max())
    for found, right in zip((unpack(dx), dw, db), gradients, strict=False):
        assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-4 * size * max(1.0, spread))
    if added and relu:
        assert torch.equal(unpack(pd), delta * gate)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("shape", [(3, 2, 8, 7), (40, 2, 8, 7), (64, 2, 8, 7), (512, 1, 32, 4)])
@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5])
@pytest.mark.parametrize("first_row", ["like the others", "apart", "apart in some images", "of one value"])
def test_variances_are_exact_wherever_the_mean_is(
    instruction_set: str, shape: tuple[int, int, int, int], mean: float, first_row: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) + mean
    if first_row != "like the others":
        x[: 8 if "some" in first_row else None, :, 0] = mean + (100 if "apart" in first_row else 0)
    statistics, _ = normalise(x, instruction_set)
    variance, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    close_mean = 1e-6 * float(variance.max().sqrt())
    torch.testing.assert_close(statistics[0].double(), exact, rtol=1e-7, atol=close_mean)
    torch.testing.assert_close(statistics[1].double(), variance, rtol=1e-6 * max(10, shape[2]), atol=0)


def normalise(x: Tensor, instruction_set: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Normalise images; return their statistics and a function from the gradient of the outputs to that of the bias."""
    packed_x, y, delta = (layers.extension.PackedImages(x.shape, 1, instruction_set) for _ in range(3))
    layers.extension.pack_images(x, packed_x)
    channels = x.shape[1]
    statistics, (weight, bias) = torch.empty(3, channels), torch.ones(2, channels)
    layers.extension.normalise_packed(packed_x, weight, bias, 1e-5, statistics, None, False, y)

    def bias_gradient(plain: Tensor) -> Tensor:
        layers.extension.pack_images(plain, delta)
        ends = torch.empty(channels), torch.empty(channels)
        layers.extension.normalise_gradient_packed(packed_x, delta, weight, bias, statistics, False, None, delta, *ends)
        return ends[1]

    return statistics, bias_gradient


@pytest.mark.parametrize("instruction_set", SETS)
def test_sums_of_many_numbers_are_exact(instruction_set: str) -> None:
    """In single precision, such a sum differs by a hundred thousandth and more."""
    shape = (512, 1, 64, 32)
    statistics, bias_gradient = normalise(
        torch.full(shape, 0.1).index_fill_(0, torch.arange(256), 0.3), instruction_set
    )
    found = bias_gradient(torch.full(shape, 0.1))
    torch.testing.assert_close(found, torch.tensor([0.1 * 2**20]), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[1], torch.tensor([0.01]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_running_statistics_are_updated_as_torch_does(momentum: float) -> None:
    torch.manual_seed(0)
    extension, x = layers.extension, torch.randn(5, 3, 2, 2)
    images = extension.PackedImages(x.shape, 0)
    running = torch.randn(3), torch.rand(3)
    expected = running[0].clone(), running[1].clone()
    F.batch_norm(x, *expected, training=True, momentum=momentum)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    right = {
        "statistics": torch.stack((mean, variance, variance)),
        "running_mean": running[0],
        "running_variance": running[1],
    }
    extension.update_statistics(images, momentum=momentum, **right)
    torch.testing.assert_close(running, expected)
    refuse_each(partial(extension.update_statistics, images, momentum=momentum), right, set(), set())
    with pytest.raises(ValueError, match=r"^x: expected at least two numbers in each channel"):
        extension.update_statistics(extension.PackedImages((1, 3, 1, 1), 0), momentum=momentum, **right)
    with pytest.raises(ValueError, match=r"^running_mean: expected .* shape \(2,\)"):
        extension.update_statistics(extension.PackedImages((5, 2, 2, 2), 0), momentum=momentum, **right)


def test_whoever_kept_running_statistics_notices_that_they_changed(network: nn.Module) -> None:
    _, sparse = sparse_of(network)
    before = [sparse.get_buffer(f"1.{name}")._version for name in layers.STATISTICS]
    run(sparse, torch.randn(20, 2, 7, 7))
    assert all(
        sparse.get_buffer(f"1.{name}")._version > old for name, old in zip(layers.STATISTICS, before, strict=True)
    )


POOLS = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 2, 3, (2, 3)]),
        "stride": st.sampled_from([None, (), 1, 2, (3, 1)]),
        "padding": st.sampled_from([0, (1,), (1, 0)]),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.sampled_from([1, 17]), st.integers(1, 3), st.integers(2, 7), st.integers(2, 7)),
    how=POOLS,
    ties=st.booleans(),
)
def test_max_pooling_has_the_bits_of_torch(
    seed: int, shape: tuple[int, int, int, int], how: dict[str, Any], ties: bool
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape).round() if ties else torch.randn(shape)
    one = torch.eye(shape[1])[:, :, None, None]
    identity = kernels.SparseConv2d(one, None, one > 0)
    theirs = nn.MaxPool2d(**how)
    try:
        expected_in = x.clone().requires_grad_()
        expected = theirs(expected_in)
    except RuntimeError:
        return  # torch refuses it
    ours_in = x.clone().requires_grad_()
    ours = run(nn.Sequential(identity, layers.MaxPool2d.of(nn.MaxPool2d(**how))), ours_in)
    assert torch.equal(ours, expected)
    delta = torch.randn(expected.shape).round()  # so that sums are exact
    torch.autograd.backward((ours, expected), (delta, delta))
    assert torch.equal(ours_in.grad, expected_in.grad)


MEANS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # with whether it is recorded
    "mean": (lambda x: x.mean((2, 3)), True),
    "mean from the end": (lambda x: torch.mean(x, [-1, -2], keepdim=True), True),
    "mean from both ends": (lambda x: x.mean((3, -2)) + x.mean((2, -1)), True),
    "pooling": (lambda x: F.adaptive_avg_pool2d(x, 1), True),
    "pooling of both sides": (lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1), True),
    "mean with NumPy's names": (lambda x: x.mean(axis=(2, 3), keepdims=True), False),
    "mean with another name": (lambda x: torch.mean(a=x, dim=(2, 3)), False),  # type: ignore[call-overload]
    "pooling with numbers of NumPy": (lambda x: F.adaptive_avg_pool2d(x, np.array([1, 1])), False),  # type: ignore[arg-type]
    "pooling to two": (lambda x: F.adaptive_avg_pool2d(x, 2), False),
    "mean over channels": (lambda x: x.mean((1, 2)), False),
    "mean of another type": (lambda x: x.mean((2, 3), dtype=torch.float64), False),
    "mean of all": (lambda x: x.mean(), False),
}


class Averaged(nn.Module):
    """A convolution, and a mean of its outputs."""

    def __init__(self, mean: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 1)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(self.convolution(x))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that receives the operations of each segment, with "+" for an addition and ">" for a ReLU in it."""
    done: list[list[str]] = []
    compute = packed.Segment.forward

    def note(segment: packed.Segment, outputs: Any) -> Any:
        done.append([f"{each.first.how}{'+' * bool(each.other)}{'>' * each.relu}" for each in segment.operations])
        return compute(segment, outputs)

    monkeypatch.setattr(packed.Segment, "forward", note)
    return done


@pytest.mark.parametrize(("mean", "recorded"), MEANS.values(), ids=list(MEANS))
@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (33, 2, 9, 2), (40, 2, 1, 2), (3, 2, 130, 40)])
def test_means_over_pixels_equal_torch(
    mean: Callable[[Tensor], Tensor], recorded: bool, shape: tuple[int, ...], planned: list[list[str]]
) -> None:
    torch.manual_seed(0)
    assert_equal_steps(Averaged(mean), torch.randn(shape) + 3, "1")
    assert any("average" in operations for operations in planned) == recorded


def test_a_mean_that_torch_refuses_is_refused() -> None:
    refused: list[tuple[Callable[[Any], Tensor], str]] = [
        (lambda x: x.mean((2, 2)), "multiple times"),
        (lambda x: x.mean((2, 7)), "out of range"),
        (lambda x: x.mean((2, "W")), "must be"),
        (lambda x: F.adaptive_avg_pool2d(x, (1.0, 1.0)), "must be"),  # type: ignore[arg-type]
    ]
    for mean, text in refused:
        _, sparse = sparse_of(Averaged(mean))
        with pytest.raises((RuntimeError, IndexError, TypeError), match=text):
            run(sparse, torch.randn(3, 2, 4, 4))


def test_what_was_averaged_may_be_changed() -> None:
    """Unlike most operations, a mean needs its input for no gradient, so that PyTorch allows this."""

    def mean(x: Tensor) -> Tensor:
        read = torch.sigmoid(x)
        average = F.adaptive_avg_pool2d(x, 1)
        changed = F.relu(x, inplace=True)
        return read + average + changed

    assert_equal_steps(Averaged(mean), torch.randn(5, 2, 3, 4), "1")


@pytest.mark.parametrize("momenta", [(0.1, 0.5, 0.1), (0.5, 0.1, 0.5)])
def test_layers_that_share_running_statistics_update_them_in_order(momenta: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(3, momentum=momentum) for momentum in momenta]
    for norm in norms[1:]:
        for name in layers.STATISTICS:
            norm.register_buffer(name, norms[0].get_buffer(name))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norms[0], nn.ReLU(), norms[1], nn.ReLU(), norms[2])
    dense, x = copy.deepcopy(model), torch.randn(5, 2, 7, 7)
    sparse = replace_layers(model, {"0.weight": torch.ones(3, 2, 3, 3) > 0}, ["0.weight"])
    assert is_packed(run(sparse, x))
    dense(x)
    for name in layers.STATISTICS:
        torch.testing.assert_close(sparse.get_buffer(f"1.{name}"), dense.get_buffer(f"1.{name}"))
        assert sparse.get_buffer(f"5.{name}") is sparse.get_buffer(f"1.{name}")


# Networks.


class Block(nn.Module):
    """A residual block, written in one of the usual ways."""

    def __init__(self, channels: int, outputs: int, stride: int, how: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=0.3)
        self.short = nn.Conv2d(channels, outputs, 1, stride) if channels != outputs or stride > 1 else None
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.short is None else self.short(x)
        if self.how == "in place":
            y = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
            y += short
            return y.relu_()
        if self.how == "functional":
            return F.relu(torch.add(short, self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))
        if self.how == "no norm":
            return (self.conv2(self.conv1(x).relu()) + short).relu()
        if self.how == "twice":  # values that several operations read
            y = self.bn1(self.conv1(x))
            y = y + y
            z = self.bn2(self.conv2(y)) + short
            return torch.relu(z) + z
        return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + short


WAYS = ["in place", "functional", "no norm", "twice", "linear"]


def a_network(how: str, outputs: int = 4, stride: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        Block(3, 3, 1, how),
        nn.MaxPool2d(2),
        Block(3, outputs, stride, how),
        nn.Identity(),
    )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("batch", [5, 32])
def test_networks_equal_masked_dense(how: str, batch: int) -> None:
    torch.manual_seed(3)
    assert_equal_steps(a_network(how), torch.randn(batch, 2, 9, 11))


class Skipping(nn.Module):
    """Convolutions that skip pixels of the images they read; `readers` says what else reads these images."""

    def __init__(self, readers: Sequence[str]) -> None:
        super().__init__()
        self.first, self.skips = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1, 2)
        self.wide, self.readers = nn.Conv2d(3, 3, 3, 2, padding=1), readers
        self.even = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        known = {
            "skips": self.skips,
            "wide": self.wide,
            "norm": lambda y: self.wide(y.relu()),
            "later": lambda y: self.skips(y + y),
            "even": lambda y: self.skips(self.even(y)),
            "pool": lambda y: F.max_pool2d(y, 2),
        }
        found: Tensor = self.skips(y)
        for name in self.readers:
            found = found + known[name](y)
        return found


@pytest.mark.parametrize("first", [True, False], ids=["", "reversed"])
@pytest.mark.parametrize(
    "readers",
    [
        (),
        ("skips",),
        ("wide",),
        ("norm", "wide"),
        ("later",),
        ("pool", "skips"),
        ("later", "wide", "pool"),
        ("wide", "even", "norm", "even"),
    ],
)
def test_convolutions_that_skip_pixels(readers: tuple[str, ...], first: bool) -> None:
    """Also where others read the same images, before or after them, and where they share weights."""
    torch.manual_seed(4)
    for batch, kind in ((33, "0.3"), (5, "1")):
        model = Skipping(readers if first else readers[::-1])
        assert_equal_steps(nn.Sequential(nn.Conv2d(2, 2, 1), model), torch.randn(batch, 2, 8, 8), kind)


def test_a_block_is_as_few_operations_as_it_can_be(planned: list[list[str]]) -> None:
    torch.manual_seed(0)
    _, sparse = sparse_of(a_network("in place"))
    run(sparse, torch.randn(4, 2, 8, 8))
    block = ["convolution", "norm>", "convolution", "norm+>"]
    first, second = ["source", "convolution", "norm>"], ["convolution", *block]
    assert planned == [[*first, *block, "pool", *second]]


def test_memory_is_used_again() -> None:
    torch.manual_seed(0)
    _, sparse = sparse_of(a_network("functional"))
    memory, x = Memory(), torch.randn(20, 2, 8, 8)

    def step() -> tuple[Tensor, list[int]]:
        y = run(sparse, x, memory)
        torch.autograd.backward(y.sum())
        del y
        return x, sorted(id(buffer) for free in memory._free.values() for buffer in free)

    first, second = step(), step()
    assert len(first[1]) > 10
    assert first[1] == second[1]
    memory.prepare("another size")
    assert not memory._free


def test_memory_of_sizes_that_are_no_longer_used_is_forgotten() -> None:
    memory = Memory()
    for height in range(4, 9):
        memory.prepare("inputs of one size")
        memory.give(memory.take((3, 2, height, 4), 1))
    assert len(memory._free) == 2


def test_images_of_another_height_have_memory_of_their_own() -> None:
    memory, six, seven = Memory(), (3, 2, 6, 2), (3, 2, 7, 2)
    first = memory.take(seven, 1)
    memory.give(first)
    assert memory.take(six, 1) is not first
    assert memory.take(seven, 1) is first


def test_a_batch_norm_in_two_places() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Conv2d(3, 3, 3), norm)
    assert_equal_steps(model, torch.randn(5, 2, 7, 7))


def test_steps_have_the_same_bits_again_and_in_any_memory() -> None:
    torch.manual_seed(0)
    _, sparse = sparse_of(a_network("functional"))
    memory, x, other = Memory(), torch.randn(20, 2, 8, 8), torch.randn(18, 2, 8, 8)

    def step(inputs: Tensor, memory: Memory) -> list[Tensor]:
        y = run(sparse, inputs, memory)
        return [y.detach().clone(), *torch.autograd.grad(y.square().sum(), list(sparse.parameters()))]

    expected = step(x, memory)
    step(other, memory)  # leaves its own samples in the same memory
    step(torch.full_like(x, torch.inf), memory)
    for again in (step(x, memory), step(x, Memory())):
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def fill_with_nan(memory: Memory) -> None:
    """Overwrite all images of the memory that is free, but not the zeros around them."""
    for (size, _), free in memory._free.items():
        for buffer in free:
            layers.extension.pack_images(torch.full(size, torch.nan), buffer)


class Between(nn.Module):
    """Two convolutions with normalisation between them, whose values other code reads."""

    def __init__(self, reads: Callable[[Tensor, Tensor, Tensor], Tensor], *, adds: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.reads, self.short = reads, nn.Conv2d(2, 6, 1) if adds else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x)
        b = self.bn1(a) if self.short is None else self.bn1(a) + self.short(x)
        return self.reads(a, b, self.conv2(b))


BETWEEN: list[tuple[Callable[..., nn.Module], tuple[int, int]]] = [
    *(
        (lambda how=how: nn.Sequential(a_network(how, outputs=6)), (2, n))
        for how, n in (("functional", 2), ("twice", 0))
    ),
    (lambda: Between(lambda a, b, c: c), (1, 1)),
    (lambda: Between(lambda a, b, c: c, adds=True), (1, 0)),
    (lambda: Between(lambda a, b, c: c + a), (0, 1)),
    (lambda: Between(lambda a, b, c: c + b), (1, 0)),
    (lambda: Between(lambda a, b, c: c * a * b), (0, 0)),
]
"""Networks, with how many of their convolutions and norms leave out channels."""


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("build", "left_out"), BETWEEN)
def test_channels_without_connections_stay_out_of_memory_and_change_no_bit(
    instruction_set: str,
    build: Callable[[], nn.Module],
    left_out: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(5)
    model = build()
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() == 4}
    for name, parameter in model.named_parameters():  # each channel has connections on both sides, on one or on none
        if name.endswith("bn1.bias"):
            nn.init.normal_(parameter)
        elif name.endswith("conv1.weight"):
            masks[name][1::3] = False
        elif name.endswith("conv2.weight"):
            masks[name][:, 1:3] = False
    sparse = replace_layers(
        nn.Sequential(model), {f"0.{name}": mask for name, mask in masks.items()}, [f"0.{n}" for n in masks]
    )
    for layer in sparse.modules():
        if isinstance(layer, layers.Sparse):
            layer.instruction_set = instruction_set
    x, plan, found = torch.randn(37, 2, 8, 8), packed.Segment._plan, []

    def plan_all(segment: packed.Segment, outputs: Any) -> None:
        plan(segment, outputs)
        found.append((len(segment._before), len(segment._behind)))
        segment._before, segment._behind = {}, {}

    def step(memory: Memory) -> list[Tensor]:
        network = copy.deepcopy(sparse)
        y = run(network, x, memory)
        torch.autograd.backward(y.square().sum())
        return [y.detach(), *(p.grad for p in network.parameters() if p.grad is not None), *network.buffers()]

    memory = Memory(instruction_set)
    step(memory)
    fill_with_nan(memory)
    ours = step(memory)
    monkeypatch.setattr(packed.Segment, "_plan", plan_all)
    every = step(Memory(instruction_set))
    assert found == [left_out]
    assert all(torch.equal(a, b) for a, b in zip(ours, every, strict=True))


# What is not recorded is computed as it would be without.


class Own(nn.Module):
    """Convolutions with code of the user between them."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)
        self.code, self.steps = code, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y: Tensor = self.conv2(self.code(self, self.bn(self.conv1(x))))
        return y


def by_data(model: Any, y: Tensor) -> Tensor:
    return y.relu() if y.mean() > 1e-3 or float(y.detach().abs().max()) > 0 else y * 0


def by_state(model: Any, y: Tensor) -> Tensor:
    return y.relu() if model.steps % 2 else y


def makes_tensors(model: Any, y: Tensor) -> Tensor:
    return y * torch.linspace(0.5, 2, y.shape[-1]).to(y.dtype) + y.new_ones(y.size())


def reads_without_gradient(model: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = y.abs().mean()
    return y / scale


def in_place(model: Any, y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 1] = 0.5
    y.mul_(2).add_(1)
    return y.relu_() + z


def in_pieces(model: Any, y: Tensor) -> Tensor:
    first, second, *_ = y.split(1, 1)
    return torch.cat([y[:, 2:], second, first], 1).relu()


def kept(model: Any, y: Tensor) -> Tensor:
    model.seen = [y, y.relu()]
    return model.seen[1] + model.seen[0].detach()


def adds_a_number(model: Any, y: Tensor) -> Tensor:
    return torch.add(1 + y + 2, y, alpha=3)


def broadcasts(model: Any, y: Tensor) -> Tensor:
    return y + y[:1] + y.mean((2, 3), keepdim=True)


def looks(model: Any, y: Tensor) -> Tensor:
    assert isinstance(y, Tensor)
    assert y.requires_grad
    assert y.dtype.is_floating_point
    assert not y.is_leaf
    assert len(y) == y.shape[0] == y.size(0)
    assert y.numel() == y.detach().numpy().size
    assert "grad_fn" in repr(y)
    return F.leaky_relu(y)


def reads_statistics(model: Any, y: Tensor) -> Tensor:
    return y / (model.bn.running_var + 0.1).sqrt().view(1, -1, 1, 1) + float(model.bn.num_batches_tracked)


def normalises_again(model: Any, y: Tensor) -> Tensor:
    return y + model.bn(torch.linspace(0, 9, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape))


def changes_settings(model: Any, y: Tensor) -> Tensor:
    norm = model.bn
    norm.eps, norm.momentum = 1.0, 0.0
    z = norm(y.relu())
    norm.eps, norm.momentum = 1e-5, 0.1
    return z


def does_not_track(model: Any, y: Tensor) -> Tensor:
    model.bn.track_running_stats = False
    z = model.bn(y.relu())
    model.bn.track_running_stats = True
    return z


def freezes_for_a_while(model: Any, y: Tensor) -> Tensor:
    model.bn.requires_grad_(False)
    z = model.bn(y.relu())
    model.bn.requires_grad_(True)
    return z


def unfreezes_for_a_while(model: Any, y: Tensor) -> Tensor:
    model.bn.requires_grad_(False)
    z = y.abs()  # computed while the layer is frozen
    model.bn.requires_grad_(True)
    return z


def reads_in_inference_mode(model: Any, y: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = float(y.abs().mean())
    return y.relu() / scale


def reads_in_threads(model: Any, y: Tensor) -> Tensor:
    with ThreadPoolExecutor(3) as pool:
        return sum(pool.map(lambda _: y.relu(), range(3)), y)


CODES = [by_data, by_state, makes_tensors, reads_without_gradient, in_place, in_pieces, kept, adds_a_number,
         broadcasts, looks, reads_statistics, normalises_again, changes_settings, does_not_track, freezes_for_a_while,
         unfreezes_for_a_while, reads_in_inference_mode, reads_in_threads]  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=[code.__name__ for code in CODES])
def test_code_between_layers_sees_tensors(code: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    model = Own(code)
    assert_equal_steps(model, torch.randn(6, 2, 5, 5))
    model.__dict__.pop("seen", None)
    assert_equal_steps(nn.Sequential(Own(code), Own(by_state)), torch.randn(6, 2, 7, 7))


def test_a_recorded_value_that_is_read_later_is_computed_once() -> None:
    torch.manual_seed(1)
    exact, sparse = sparse_of(Own(kept))
    x = torch.randn(6, 2, 5, 5)
    y, expected = run(sparse, x), exact(x.double())
    close(y, expected)
    for ours, theirs in zip(sparse.seen, exact.seen, strict=True):  # type: ignore[arg-type]
        assert type(ours) is Packed
        close(packed.compute(ours), theirs)
    assert int(sparse.bn.num_batches_tracked) == 1  # type: ignore[union-attr, arg-type]


class Shift(torch.autograd.Function):
    """A function behind the back of PyTorch's overrides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy


class NewShift(torch.autograd.Function):
    """The same in the other way to write it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy


class Returned(Shift):
    """A function that reads nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class WithGradient(Shift):
    """A function whose operations could be recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x.relu()


@pytest.mark.parametrize("function", [Shift, NewShift, Returned, WithGradient])
@pytest.mark.parametrize("read", [False, True])
def test_a_function_of_the_users_own_is_never_silently_wrong(
    function: type[torch.autograd.Function], *, read: bool
) -> None:
    def code(model: nn.Module, y: Tensor) -> Tensor:
        if read:
            y.mean()
        shifted: Tensor = function.apply(y)  # type: ignore[no-untyped-call]
        return shifted

    model = Own(code)
    assert packed.can_pack(model) == (function in (Returned, WithGradient))
    _, sparse = sparse_of(model)
    with pytest.raises(RuntimeError, match=r"a torch.autograd.Function of the network's own reads a tensor"):
        run(sparse, torch.randn(6, 2, 5, 5))


class Training(torch.autograd.Function):
    """A function in which a network is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module, losses: list[float]) -> Tensor:
        with torch.enable_grad():
            losses.append(float(a_step(model)(x, torch.arange(64) % 3)))
        return x


def test_a_function_that_trains_a_network_leaves_it_packed(network: nn.Module, computed: list[object]) -> None:
    x, losses = torch.randn(64, 2, 7, 7), list[float]()
    for trained in (Training.apply, partial(Training.forward, None)):
        torch.manual_seed(0)
        trained(x, copy.deepcopy(network), losses)
    assert computed == [5, 5]
    assert losses[0] == losses[1]


class Calling(Shift):
    """A function that calls another network, whose recorder is a different one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            return Packing(Memory()).record(network, x).detach()  # type: ignore[no-any-return]


def test_a_network_that_a_function_calls_does_not_hide_the_function() -> None:
    """Its outputs would be taken for ones without a gradient."""
    _, sparse = sparse_of(Own(lambda model, y: Calling.apply(y, lambda x: x * 2)))
    with pytest.raises(RuntimeError, match=r"a torch.autograd.Function of the network's own reads a tensor"):
        Packing(Memory()).record(sparse, torch.randn(6, 2, 5, 5))


def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_compiled_code_is_never_silently_wrong() -> None:
    compiled = torch.jit.script(double)
    model = Own(lambda model, y: compiled(y))
    assert not packed.can_pack(model)
    _, sparse = sparse_of(model)
    with pytest.raises(RuntimeError, match="failed in the TorchScript interpreter"):
        run(sparse, torch.randn(6, 2, 5, 5))
    assert not packed.can_pack(nn.Sequential(nn.Conv2d(2, 2, 1), torch.jit.script(nn.ReLU())))


@dataclass
class Outputs:
    images: Tensor


def keeps_gradient(model: Any, y: Tensor) -> Tensor:
    y.retain_grad()
    return y


def asks_for_a_gradient(model: Any, y: Tensor) -> Tensor:
    return y + torch.autograd.grad(y.relu().sum(), y, retain_graph=True)[0]


@pytest.mark.parametrize("code", [keeps_gradient, asks_for_a_gradient])
def test_networks_that_want_gradients_between_layers_are_not_packed(code: Callable[[Any, Tensor], Tensor]) -> None:
    assert not packed.can_pack(Own(code))


def copies_statistics(model: Any, y: Tensor) -> Tensor:
    model.seen = [buffer.clone() for buffer in model.buffers()]
    return y


def copies_itself(model: Any, y: Tensor) -> Tensor:
    model.seen = copy.deepcopy(model.bn)
    return y


def decays_weights(model: Any, y: Tensor) -> Tensor:
    for weight in model.parameters():
        weight.data.mul_(0.5)
    return y


@pytest.mark.parametrize("code", [copies_statistics, copies_itself, decays_weights])
def test_networks_whose_code_computes_with_their_own_tensors_are_not_packed(
    code: Callable[[Any, Tensor], Tensor],
) -> None:
    """Running statistics that a copy of them lacks, for example, would be those of the step before."""
    assert not packed.can_pack(Own(code))


def test_networks_whose_code_asks_for_properties_of_their_own_tensors_are_packed() -> None:
    def makes(model: nn.Module, y: Tensor) -> Tensor:
        weight = next(model.parameters())
        return y * float(torch.ones((), dtype=weight.dtype, device=weight.device)) if weight.requires_grad else y

    assert packed.can_pack(Own(makes))


def test_networks_that_return_a_class_of_their_own_are_not_packed() -> None:
    class Returns(Own):
        def forward(self, x: Tensor) -> Any:
            return Outputs(super().forward(x))

    assert not packed.can_pack(Returns(by_state))


def test_what_can_be_packed() -> None:
    assert packed.can_pack(resnet20(width=2))
    assert packed.can_pack(Own(by_state))
    assert not packed.can_pack(Own(by_data))  # what cannot be traced may be anything
    hooked = resnet20(width=2)
    hooked.bn1.register_forward_hook(lambda *_: None)
    assert not packed.can_pack(hooked)
    draws = Own(lambda model, y: y * float(torch.rand(())))
    state = torch.random.get_rng_state()
    assert packed.can_pack(draws)
    assert torch.equal(state, torch.random.get_rng_state())


def test_code_that_asks_for_the_type_of_a_tensor_keeps_its_own_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5, 5)
    asks = Own(lambda model, y: y.relu() if type(y) is Tensor else y)
    assert packed.can_pack(asks)
    assert kernels.find_difference(asks, lambda model: model(x).square().mean()) == "its loss is another one"
    assert kernels.find_difference(Own(by_state), lambda model: model(x).square().mean()) is None


def test_a_torch_that_does_not_say_who_watches_saved_tensors_computes_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch 2.6 does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    assert packed.can_pack(model)
    monkeypatch.setattr(packed, "_top_hooks", None)
    assert not packed.can_pack(model)
    assert_equal_steps(model, torch.randn(4, 2, 9, 9), packs=False)


def test_where_saved_tensors_are_watched_layers_compute_at_once() -> None:
    """As in a checkpoint, which computes again what autograd saved."""
    torch.manual_seed(0)

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.first = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 3)
            self.saved = 0

        def save(self, x: Tensor) -> Tensor:
            self.saved += 1
            return x

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            with torch.autograd.graph.saved_tensors_hooks(self.save, lambda x: x):
                z: Tensor = self.part(y)
            return z

    model = Watched()
    assert_equal_steps(model, torch.randn(4, 2, 9, 9))
    assert model.saved >= 4


CHANGES: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "eval": lambda norm: norm.eval(),
    "no momentum": lambda norm: setattr(norm, "momentum", None),
    "not affine": lambda norm: norm.__init__(3, affine=False),  # type: ignore[misc]
    "not tracked": lambda norm: norm.__init__(3, track_running_stats=False),  # type: ignore[misc]
    "frozen": lambda norm: norm.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_batch_norms(change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    CHANGES[change](model[1])
    exact, sparse = sparse_of(model)
    x = torch.randn(9, 2, 7, 7)
    y, expected = run(sparse, x), exact(x.double())
    assert is_packed(y)
    close(y, expected)
    for output in (y, expected):
        torch.autograd.backward(output.square().mean())
    close(sparse[0].values.grad, exact[0].weight.grad[exact[0].weight != 0])  # type: ignore[index, union-attr]
    for name, buffer in exact.named_buffers():
        close(sparse.get_buffer(name), buffer)
    assert (sparse.get_submodule("1").weight is None) == (change == "not affine")
    assert change != "frozen" or sparse.get_parameter("1.weight").grad is None


def a_step(model: nn.Module) -> kernels.Step:
    mask = {name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters() if p.dim() == 4}
    for name, alive in mask.items():
        model.get_parameter(name).data.mul_(alive)
    return kernels.accelerate(model, Mask.from_tensors(mask))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model.append(nn.Flatten())
    return model.append(nn.Linear(4 * 9, 3))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The segments that were computed."""
    found: list[object] = []
    compute = packed.Segment.compute

    def note(segment: packed.Segment) -> None:
        found.append(len(segment.values))
        compute(segment)

    monkeypatch.setattr(packed.Segment, "compute", note)
    return found


def test_a_step_is_packed_until_a_hook_looks_on(network: nn.Module, computed: list[object]) -> None:
    step = a_step(network)
    x, y = torch.randn(64, 2, 7, 7), torch.randint(3, (64,))
    loss = step(x, y)
    assert computed == [5]
    step.model.zero_grad()
    seen: list[type] = []
    handle = step.model[2].register_forward_hook(lambda _, __, output: seen.append(type(output)))
    assert torch.allclose(step(x, y), loss)
    handle.remove()
    step.model.zero_grad()
    handle = nn.modules.module.register_module_forward_hook(lambda _, __, output: seen.append(type(output)))
    assert torch.allclose(step(x, y), loss)
    handle.remove()
    assert set(seen) == {Tensor}
    assert computed == [5]
    with torch.autocast("cpu", torch.bfloat16):
        step.model.zero_grad()
        assert torch.allclose(step(x, y), loss, rtol=0.05)
    assert computed == [5]
    step.model.zero_grad()
    step(x, y)
    assert computed == [5, 5]


def test_hooks_of_parameters_and_gradients_twice(network: nn.Module) -> None:
    _, sparse = sparse_of(network)
    x = torch.randn(20, 2, 7, 7)
    values, seen = sparse.get_parameter("0.values"), []
    values.register_hook(lambda gradient: seen.append(gradient.clone()))
    y = run(sparse, x)
    torch.autograd.backward(y.square().sum(), retain_graph=True)
    first = values.grad.clone()  # type: ignore[union-attr]
    torch.autograd.backward(y.square().sum())
    assert torch.equal(values.grad, 2 * first)  # type: ignore[arg-type]
    assert torch.equal(seen[0], first)
    (gradient,) = torch.autograd.grad(run(sparse, x).square().sum(), (values,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradient.sum())


def test_without_gradients_layers_compute_at_once(network: nn.Module, computed: list[object]) -> None:
    exact, sparse = sparse_of(network)
    x = torch.randn(20, 2, 7, 7)
    with torch.no_grad():
        close(run(sparse, x), exact(x.double()))
    assert not computed
    close(sparse.get_buffer("1.running_var"), exact.get_buffer("1.running_var"))


def test_an_input_that_wants_a_gradient_from_then_on(network: nn.Module) -> None:
    _, sparse = sparse_of(network)
    conv = sparse[0]  # type: ignore[index]

    def gradient(packing: Packing | None) -> Tensor | None:
        x = torch.ones(4, 2, 7, 7)
        with record(packing):
            before = conv(x)
            y = before + conv(x.requires_grad_())
        torch.autograd.backward(packed.compute(y).sum())
        return x.grad

    close(gradient(Packing(Memory())), gradient(None))


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_what_is_changed_in_place_is_noticed(network: nn.Module, changed: str) -> None:
    _, sparse = sparse_of(network)
    conv, x = sparse[0], torch.randn(20, 2, 7, 7)  # type: ignore[index]
    with record(Packing(Memory())):
        y = conv(x)
        with torch.no_grad():
            (x if changed == "input" else conv.values).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        packed.compute(y)


def test_a_weight_that_changes_before_the_backward_pass_is_noticed(network: nn.Module) -> None:
    _, sparse = sparse_of(network)
    y = run(sparse, torch.randn(20, 2, 7, 7))
    with torch.no_grad():
        sparse.get_parameter("3.values").mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.backward(y.sum())


# Names.


def test_only_networks_with_sparse_convolutions_are_packed(network: nn.Module) -> None:
    mask = Mask.from_tensors({"0.weight": torch.ones(4, 2, 3, 3) > 0, "5.weight": torch.ones(3, 36) > 0})
    assert kernels.are_packed(network, mask, ["0.weight"])
    assert not kernels.are_packed(network, mask, ["5.weight"])
    assert not kernels.are_packed(network, mask, [])


def test_a_network_that_stays_packed_has_more_sparse_layers(network: nn.Module) -> None:
    mask = Mask.from_tensors({"0.weight": torch.arange(72).reshape(4, 2, 3, 3) < 50})
    assert kernels.accelerate(copy.deepcopy(network), mask, batch_size=32).sparse == ["0.weight"]
    for way in ({"packed": False}, {"forward": lambda model, x: model(x)}, {"batch_size": 31}):
        assert kernels.accelerate(copy.deepcopy(network), mask, **{"batch_size": 32, **way}).sparse == []


# Wrong arguments.


def test_packed_functions_refuse_every_wrong_argument() -> None:
    """Wrong are tensors as in `refuse_each`, images of another size or instruction set, and no images."""
    extension = layers.extension
    size, left, window = (7, 3, 4, 5), (7, 3, 2, 2), (2, 2, 2, 2, 0, 0)

    def some(size: tuple[int, int, int, int] = size, instruction_set: str | None = None) -> Any:
        return extension.PackedImages(size, 1, instruction_set)

    three, plain = torch.ones(3), torch.ones(size)
    both = {"weight": three, "bias": three.clone(), "statistics": torch.empty(3, 3)}
    ends = {"weight_gradient": torch.empty(3), "bias_gradient": torch.empty(3)}
    kernel = kernels.SparseConv2d(torch.ones(2, 3, 3, 3), None, torch.ones(2, 3, 3, 3) > 0, 1, (1, 1)).kernel((3, 4, 5))
    values, bias, outputs = torch.ones(54), torch.ones(2), (7, 2, 4, 5)
    calls: list[tuple[Callable[..., None], dict[str, Any], set[str], set[str]]] = [
        (extension.pack_images, {"source": plain, "target": some()}, set(), {"source"}),
        (extension.unpack_images, {"source": some(), "target": plain}, set(), {"target"}),
        (
            partial(extension.normalise_packed, epsilon=1e-5, relu=True),
            {"x": some(), "other": some(), "y": some(), **both},
            {"other"},
            set(),
        ),
        (
            partial(extension.normalise_gradient_packed, relu=False),
            {"x": some(), "delta": some(), "y": some(), "gradient": some(), **both, **ends},
            {"y"},
            set(),
        ),
        (partial(extension.sum_packed, relu=True), {"a": some(), "b": some(), "y": some()}, {"b"}, set()),
        (extension.gate_packed, {"delta": some(), "y": some()}, set(), set()),
        (partial(extension.max_pool_packed, window), {"x": some(), "y": some(left)}, set(), set()),
        (
            partial(extension.max_pool_gradient_packed, window),
            {"x": some(), "y": some(left), "delta": some(left), "gradient": some()},
            set(),
            set(),
        ),
        (extension.average_packed, {"x": some(), "y": some((7, 3, 1, 1))}, set(), set()),
        (extension.average_gradient_packed, {"delta": some((7, 3, 1, 1)), "gradient": some()}, set(), set()),
        (
            kernel.forward_images,
            {"values": values, "bias": bias, "source": some(), "target": some(outputs)},
            {"bias"},
            set(),
        ),
        (
            partial(kernel.input_gradient_images, add=False),
            {"values": values, "delta": some(outputs), "target": some()},
            set(),
            set(),
        ),
        (
            kernel.weight_gradient_images,
            {"source": some(), "delta": some(outputs), "gradient": values.clone(), "bias_gradient": bias.clone()},
            {"bias_gradient"},
            set(),
        ),
        (
            partial(kernel.gradients_images, add=False),
            {
                "values": values, "source": some(), "delta": some(outputs), "gradient": values.clone(),
                "bias_gradient": bias.clone(), "target": some(),
            },
            {"bias_gradient"},
            set(),
        ),
    ]  # fmt: skip
    averages = extension.average_packed, extension.average_gradient_packed  # of images of any height and width
    for call, right, optional, strided in calls:
        refuse_each(call, right, optional, strided)
        names = [name for name, given in right.items() if isinstance(given, extension.PackedImages)]
        wrong = [some((8, 3, 4, 5)), some((7, 4, 4, 5))]
        wrong += [some((7, 3, 6, 5)), some((7, 3, 4, 6))] if call not in averages else []
        if SETS[0] != "plain" and len(names) > 1:  # all of a call are of one instruction set
            wrong += [some(each, "plain") for each in (size, left, outputs)]
        for name in names:
            for images in wrong:
                with pytest.raises(
                    ValueError, match=r"^\w+: (expected images of size .* packed for .*, got|expected .* shape)"
                ):
                    call(**(right | {name: images}))
            for nothing in (plain, 0, *([None] if name not in optional else [])):
                with pytest.raises(TypeError):
                    call(**(right | {name: nothing}))


def test_packed_functions_refuse_targets_in_the_memory_of_their_source() -> None:
    """Functions that read their source again after writing refuse it as their target; the others accept it."""
    extension = layers.extension
    size, window, three = (3, 3, 1, 1), (1, 1, 1, 1, 0, 0), torch.ones(3)
    x, free, apart = (extension.PackedImages(size, 1) for _ in range(3))
    both, ends = (three, three.clone(), torch.zeros(3, 3)), (three.clone(), three.clone())
    calls: list[tuple[str, Callable[[], None]]] = [
        ("y", lambda: extension.normalise_packed(x, *both[:2], 1e-5, both[2], None, False, x)),
        ("y", lambda: extension.normalise_packed(free, *both[:2], 1e-5, both[2], x, False, x)),
        ("gradient", lambda: extension.normalise_gradient_packed(x, free, *both, False, None, x, *ends)),
        ("delta", lambda: extension.normalise_gradient_packed(x, x, *both, True, None, free, *ends)),
        ("y", lambda: extension.max_pool_packed(window, x, x)),
        ("gradient", lambda: extension.max_pool_gradient_packed(window, x, free, apart, x)),
        ("gradient", lambda: extension.max_pool_gradient_packed(window, free, x, apart, x)),
        ("gradient", lambda: extension.max_pool_gradient_packed(window, free, apart, x, x)),
        ("y", lambda: extension.average_packed(x, x)),
        ("gradient", lambda: extension.average_gradient_packed(x, x)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{name}: expected memory of its own"):
            call()
    images, found = torch.tensor([-1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(size), torch.empty(size)
    extension.pack_images(images, x)
    extension.normalise_packed(x, *both[:2], 1e-5, both[2], None, True, apart)
    for gradient in (extension.PackedImages(size, 1), free):
        extension.pack_images(images, free)
        extension.normalise_gradient_packed(x, free, *both, True, apart, gradient, *ends)
        before = found.clone()
        extension.unpack_images(gradient, found)
    assert torch.equal(found, before)
    extension.sum_packed(x, x, True, x)
    extension.unpack_images(x, found)
    assert torch.equal(found, 2 * images.relu())
    extension.pack_images(images, x)
    extension.gate_packed(x, x)
    extension.unpack_images(x, found)
    assert torch.equal(found, images.relu())
    wide = kernels.SparseConv2d(torch.ones(3, 3, 3, 3), None, torch.ones(3, 3, 3, 3) > 0, 1, (1, 1)).kernel((3, 4, 5))
    images = extension.PackedImages((3, 3, 4, 5), 1)
    with pytest.raises(ValueError, match=r"^target: expected memory of its own, got that of source"):
        wide.forward_images(torch.ones(81), None, images, images)
    with pytest.raises(ValueError, match=r"^target: expected memory of its own, got that of delta"):
        wide.input_gradient_images(torch.ones(81), images, images, add=False)
    other, gradient = extension.PackedImages((3, 3, 4, 5), 1), torch.ones(81)
    for source, delta, name in ((other, images, "delta"), (images, other, "source")):
        with pytest.raises(ValueError, match=rf"^target: expected memory of its own, got that of {name}"):
            wide.gradients_images(torch.ones(81), source, delta, gradient, None, images, add=False)
    for axis in range(4):
        target = torch.zeros([1 if at == axis else each for at, each in enumerate((3, 3, 4, 5))]).expand(3, 3, 4, 5)
        with pytest.raises(ValueError, match=r"target: .* not expanded"):
            extension.unpack_images(images, target)


def test_kernels_refuse_packed_images_that_do_not_fit() -> None:
    mask = torch.ones(2, 3, 3, 3) > 0
    layer = kernels.SparseConv2d(torch.ones(2, 3, 3, 3), None, mask, 1, (1, 1))
    kernel, extension = layer.kernel((3, 4, 5)), layers.extension
    assert (kernel.border, kernel.delta_border) == (1, 1)
    x, y = extension.PackedImages((7, 3, 4, 5), 1), extension.PackedImages((7, 2, 4, 5), 1)
    values = layer.values.detach()
    kernel.forward_images(values, None, x, y)
    kernel.input_gradient_images(values, y, x, add=True)
    kernel.weight_gradient_images(x, y, values.clone(), torch.ones(2))
    bare = extension.PackedImages((7, 3, 4, 5), 0)
    for product in (
        lambda: kernel.forward_images(values, None, bare, y),
        lambda: kernel.weight_gradient_images(bare, y, values.clone(), None),
        lambda: kernel.input_gradient_images(values, extension.PackedImages((7, 2, 4, 5), 0), x, add=True),
        lambda: kernel.gradients_images(
            values, bare, extension.PackedImages((7, 2, 4, 5), 0), values.clone(), None, x, add=True
        ),
    ):
        with pytest.raises(ValueError, match=r"^(source|delta): expected a border of at least 1, got 0"):
            product()
    for window in ((6, 1, 1, 1, 0, 0), (2, 2, 2, 2, 2**31 - 1, 0), (2, 2, 2, 2, 0, 2**31 - 1)):  # twice that is -2
        with pytest.raises(ValueError, match="window: expected one that fits the images"):
            extension.max_pool_packed(window, y, extension.PackedImages((7, 2, 1, 2), 1))
    for size, border, message in (
        ((7, 0, 4, 5), 0, "size: expected numbers from 1 to 2.28, got 0"),
        ((7, 2, 2**28 + 1, 5), 0, "size: expected numbers from 1"),
        ((7, 2, 4, 5), -1, "border: expected from 0 to"),
        ((7, 2, 4, 5), 2**20 + 1, "border: expected from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            extension.PackedImages(size, border)
    for size in ((2**28, 2**28, 2**28, 2**28), (2**28, 2**7, 2**3, 2**3)):
        with pytest.raises(MemoryError):
            extension.PackedImages(size, 1)
    for wrong in ((7, 3, 2, 1), (7, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"^y: expected images of size \(7, 3, 1, 1\)"):
            extension.average_packed(x, extension.PackedImages(wrong, 0))
        with pytest.raises(ValueError, match=r"^delta: expected images of size \(7, 3, 1, 1\)"):
            extension.average_gradient_packed(extension.PackedImages(wrong, 0), x)
    linear = kernels.SparseConv2d(torch.ones(2, 3, 1, 1), None, torch.ones(2, 3, 1, 1) > 0).kernel((3, 1, 1))
    with pytest.raises(ValueError, match="expected a convolution of images"):
        linear.forward_images(torch.ones(6), None, x, y)


def test_calls_are_checked_when_they_are_put_and_computed_when_they_are_run() -> None:
    extension, size = layers.extension, (3, 2, 4, 5)
    images, calls = extension.PackedImages(size, 1), extension.Calls()
    ones, found = torch.ones(size), torch.zeros(size)
    calls.put(extension.pack_images, ones, images)
    calls.put(extension.unpack_images, images, found)
    with pytest.raises(ValueError, match="source: expected"):
        calls.put(extension.pack_images, torch.ones(2, 2, 4, 5), images)
    with pytest.raises(ValueError, match="target: expected"):
        extension.unpack_images(images, torch.zeros(2, 2, 4, 5))
    assert not found.any()
    ones.mul_(2)
    del ones  # the calls keep what they use
    gc.collect()
    calls.run()
    assert (found == 2).all()
    layer, y = (
        kernels.SparseConv2d(torch.ones(2, 2, 1, 1), None, torch.ones(2, 2, 1, 1) > 0),
        extension.PackedImages(size, 0),
    )
    calls.put(layer.kernel((2, 4, 5)).forward_images, layer.values.detach(), None, images, y)
    calls.put(extension.unpack_images, y, found)
    del layer, images, y
    gc.collect()
    calls.run()
    assert (found == 4).all()
    found.zero_()
    calls.run()
    assert not found.any()  # nothing is left
    with pytest.raises(TypeError, match="function: expected one of the extension"):
        calls.put(lambda: extension.pack_images(torch.ones(size), extension.PackedImages(size, 1)))


def test_a_direct_call_is_computed_at_once_while_another_is_put() -> None:
    """Checks of arguments may run other code: that of a mode of PyTorch, or `__del__` where garbage is collected."""
    extension, size = layers.extension, (3, 2, 4, 5)
    calls, images, other = extension.Calls(), extension.PackedImages(size, 0), extension.PackedImages(size, 0)
    ones, found = torch.ones(size), torch.zeros(size)
    extension.pack_images(ones, other)

    class Reading(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if args[0] is ones and not found.any():
                with torch._C.DisableTorchFunction():
                    extension.unpack_images(other, found)
                    assert found.all()
            return func(*args, **kwargs or {})

    with Reading():
        calls.put(extension.pack_images, ones, images)
    assert found.all()
    calls.run()
    extension.unpack_images(images, found := torch.zeros(size))
    assert found.all()


def test_a_number_that_runs_code_when_it_is_read_is_refused() -> None:
    extension, size = layers.extension, (3, 2, 4, 5)

    class Epsilon:
        def __float__(self) -> float:
            raise AssertionError("it was read while a call was put")

    x, y = (extension.PackedImages(size, 0) for _ in range(2))
    two, statistics = torch.ones(2), torch.zeros(3, 2)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        extension.Calls().put(extension.normalise_packed, x, two, two.clone(), Epsilon(), statistics, None, False, y)


def test_memory_is_free_only_after_the_calls_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's backward pass could take it, and both would write to it at the same time."""
    torch.manual_seed(0)
    _, sparse = sparse_of(a_network("functional"))
    memory, own = Memory(), layers.extension
    waiting: set[int] = set()
    runs = []

    class Calls:
        def __init__(self) -> None:
            self.calls = own.Calls()

        def put(self, function: Any, *arguments: Any) -> None:
            waiting.update(id(each) for each in arguments if isinstance(each, own.PackedImages))
            self.calls.put(function, *arguments)

        def run(self) -> None:
            free = {id(images) for left in memory._free.values() for images in left}
            runs.append((len(waiting), waiting & free))
            self.calls.run()
            waiting.clear()

    watched = ModuleType(own.__name__)
    vars(watched).update(vars(own) | {"Calls": Calls})
    monkeypatch.setattr(layers, "extension", watched)
    for _ in range(2):
        torch.autograd.backward(run(sparse, torch.randn(20, 2, 8, 8), memory).sum())
    assert max(count for count, _ in runs) > 5
    assert all(not both for _, both in runs)


def test_a_copy_of_memory_has_memory_of_its_own() -> None:
    memory = Memory("plain")
    memory.give(memory.take((3, 2, 4, 5), 1))
    for copied in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert copied.instruction_set == "plain"
        assert not copied._free


# The same layers and the same bits, planned or not.


def some_images() -> Dataset:
    draw = torch.Generator().manual_seed(2)
    inputs, labels = torch.randint(256, (64, 2, 7, 7), generator=draw).to(torch.uint8), torch.arange(64) % 3
    return Dataset("some images", inputs, labels, inputs[:9], labels[:9], ("a", "b", "c"), (0.4, 0.5), (0.2, 0.3))


def two_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(144, 3))


@pytest.mark.parametrize("density", [0.9, 0.7, 0.5, 0.05])
@pytest.mark.parametrize("batch_size", [16, 32])
def test_a_plan_and_a_training_without_one_have_the_same_layers_and_bits(
    density: float, batch_size: int, tmp_path: Path
) -> None:
    task, recipe = Task(dataset=some_images, model=two_convolutions), Recipe(batch_size=batch_size, iterations=1)
    planner = Planner(
        Study(task=task, recipe=recipe, importances=["magnitude"], seeds=[0], levels=1),
        load_problem(task),
        Store(tmp_path),
    )
    initial = planner.initial(0)
    mask = prune(initial.load(), planner.dense, lambda weights: weights.abs(), 1 - density)
    planned = planner.training(0, initial, mask, 0, 1).identity
    sparse, stays = planned.get("sparse", []), "packed" in planned
    assert stays == (density < 0.1 or batch_size == 32)
    arguments = (planner.model, initial.load(), mask, planner.problem.data, recipe, 0)
    bits = train(*arguments, kernels=sparse, packed=stays).weights.hash
    assert bits == train(*arguments).weights.hash
    if density == 0.5:
        assert bits != train(*arguments, kernels="off").weights.hash

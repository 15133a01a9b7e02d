"""Passes without gradients: the kernels for few examples, and the layers that compute by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from test_kernels import KINDS, LAYOUTS, SETS, WHOLE, WRONG, a_mask, assert_rounding, in_layout, needs_kernels
from tombola import Mask, Ticket, UserError, Weights, kernels
from tombola.kernels import SparseConv2d, SparseLinear, layers
from tombola.kernels.choice import MOST_FEW, choose_to_infer


def check(layer: SparseConv2d | SparseLinear, dense: Any, mask: Tensor, x: Tensor, layout: str) -> None:
    """The kernel's outputs against float64, and that it was the kernel which computed them."""
    layer.infers = True
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()  # type: ignore[union-attr]
    with torch.inference_mode():
        y = layer(in_layout(x, layout))
        again = layer(in_layout(x, layout))
    assert any(key[0] == 0 and kernel is not None for key, kernel in layer._kernels.items())
    exact, bound = dense(x.double(), weight, bias), dense(x.double().abs(), weight.abs(), bias.abs())
    assert_rounding(y, exact, bound, mask[0].numel() + 1)
    assert torch.equal(y, again)
    assert y.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, MOST_FEW),
    inputs=st.integers(1, 60),
    outputs=st.integers(1, 40),
    kind=KINDS,
    layout=LAYOUTS,
)
def test_a_linear_layer_equals_masked_dense(
    instruction_set: str, seed: int, batch: int, inputs: int, outputs: int, kind: str, layout: str
) -> None:
    torch.manual_seed(seed)
    mask = a_mask((outputs, inputs), kind)
    layer = SparseLinear(torch.randn(mask.shape), torch.randn(outputs), mask, instruction_set)
    check(layer, functional.linear, mask, torch.randn(batch, inputs), layout)


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 9),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    image=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    kind=KINDS,
    layout=LAYOUTS,
)
def test_a_convolution_equals_masked_dense(
    instruction_set: str, seed: int, batch: int, channels: tuple[int, int], kernel: tuple[int, int],
    image: tuple[int, int], stride: int, padding: tuple[int, int], kind: str, layout: str
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    image = (max(image[0], kernel[0] - 2 * padding[0]), max(image[1], kernel[1] - 2 * padding[1]))
    mask = a_mask((channels[1], channels[0], *kernel), kind)
    layer = SparseConv2d(torch.randn(mask.shape), torch.randn(channels[1]), mask, stride, padding, instruction_set)
    x = torch.randn(batch, channels[0], *image)
    check(layer, lambda *given: functional.conv2d(*given, stride, padding), mask, x, layout)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_a_whole_image_of_many_tiles(batch: int) -> None:
    torch.manual_seed(0)
    mask = a_mask((7, 5, 3, 3), "0.3")
    layer = SparseConv2d(torch.randn(mask.shape), torch.randn(7), mask, 1, (1, 1))
    check(layer, lambda *given: functional.conv2d(*given, 1, 1), mask, torch.randn(batch, 5, 40, 33), "contiguous")


@needs_kernels
def test_what_gradients_are_asked_of_is_computed_by_the_kernels_that_give_them() -> None:
    layer = SparseLinear(torch.randn(5, 4), None, torch.ones(5, 4).bool())
    layer.infers = True
    x = torch.randn(2, 4)
    assert layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ layer.weight.t(), atol=1e-6)
        assert layer(x.bfloat16().to(torch.float64).float()[:, ::1]).shape == (2, 5)
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16


def a_kernel(**changes: Any) -> Any:
    how: dict[str, Any] = {
        "alive": torch.arange(0, 4 * 3 * 4, 2), "outputs": 4, "inputs": 3, "kernel": (2, 2), "image": (5, 6),
        "stride": 1, "padding": (0, 0), "samples": 2, "instruction_set": None,
    }  # fmt: skip
    return layers.extension.FewSamples(**(how | changes))


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alive": torch.tensor([0, 48])}, "alive: expected ascending indices from 0 to 47, got 48 at position 1"),
        ({"alive": torch.tensor([3, 3])}, "alive: expected ascending indices from 0 to 47, got 3 at position 1"),
        ({"alive": torch.arange(8)[::2]}, r"alive: .* contiguous, of shape \(any,\), got .* strides \(2,\)"),
        ({"outputs": 0}, "outputs: expected from 1 to 1073741824, got 0"),
        ({"image": (1, 6)}, "image: expected from 2 to 1048576, got 1"),
        ({"samples": 0}, "samples: expected from 1 to 1048576, got 0"),
        ({"image": (2**20, 2**20)}, "image: so many samples of so large an image are too large"),
        ({"image": (2**10, 2**10), "samples": 2**20}, "image: so many samples of so large an image are too large"),
        ({"stride": 2**20}, "image: so many samples of so large an image are too large"),
        ({"instruction_set": "mmx"}, "instruction_set: expected one of this machine's, got 'mmx'"),
    ],
)
def test_a_kernel_refuses_what_is_no_layer(changes: dict[str, Any], message: str) -> None:
    a_kernel()
    with pytest.raises((ValueError, TypeError), match=message):
        a_kernel(**changes)


@needs_kernels
@pytest.mark.parametrize("name", ["values", "bias", "source", "target"])
@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_a_kernel_refuses_wrong_tensors(name: str, wrong: str) -> None:
    if (name, wrong) == ("bias", "none"):
        return  # a layer may have no bias
    kernel = a_kernel()
    right = {
        "values": torch.ones(24), "bias": torch.ones(4), "source": torch.ones(3, 3, 5, 6),
        "target": torch.ones(3, 4, 4, 5),
    }  # fmt: skip
    kernel.forward(**right)
    change, message = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=message):
        kernel.forward(**right | {name: change(right[name])})


@needs_kernels
def test_a_kernel_refuses_memory_that_is_not_there() -> None:
    right = {"values": torch.ones(24), "bias": None, "source": torch.ones(3, 3, 5, 6), "target": torch.ones(3, 4, 4, 5)}
    for change, message in WHOLE.values():
        with pytest.raises(ValueError, match=message):
            a_kernel().forward(**right | {"source": change(right["source"])})
    with pytest.raises(ValueError, match="not expanded"):
        a_kernel().forward(**right | {"target": torch.ones(1, 4, 4, 5).expand(3, 4, 4, 5)})
    square = a_kernel(inputs=4, alive=torch.arange(4), kernel=(1, 1), image=(4, 4))
    with pytest.raises(ValueError, match="target: expected memory of its own, got that of source"):
        square.forward(torch.ones(4), None, x := torch.ones(1, 4, 4, 4), x)


def test_the_choice_is_of_layers_that_are_faster() -> None:
    assert choose_to_infer((300, 784), 0.1, 1)
    assert not any(choose_to_infer((300, 784), density, 1) for density in (0.101, 0.11, 0.12, 0.2))
    assert all(choose_to_infer((300, 784), density, 2) for density in (0.101, 0.11, 0.12, 0.2))
    assert choose_to_infer((300, 784), 0.2, 8)
    assert not choose_to_infer((10, 100), 0.02, 1)
    assert choose_to_infer((16, 16, 3, 3), 0.2, 1)
    assert not choose_to_infer((64, 64, 1, 1), 0.3, 128)
    assert choose_to_infer((300, 784), 0.3, 128) == kernels.choose((300, 784), 0.3, 128)


@pytest.mark.parametrize("batch_size", [0, -1, True, 1.5, "8", None, float("nan")])
def test_what_is_no_batch_size_is_refused(batch_size: Any) -> None:
    model = nn.Linear(2, 1)
    ticket = Ticket(0, Mask.ones_like(model), Weights.of(model.state_dict()), trained=None)
    with pytest.raises(UserError, match="batch_size: expected a whole number from 1 on, got "):
        ticket.sparse(model, batch_size=batch_size, trained=False)
    for no_model in (None, nn.Linear):
        with pytest.raises(UserError, match=r"expected a model, which is a torch\.nn\.Module, got "):
            ticket.sparse(no_model, trained=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 8, 128])
def test_a_ticket_computes_the_same_for_any_batch_size(batch_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, 2),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 128), nn.ReLU(), nn.Linear(128, 5),
    ).eval()  # fmt: skip
    alive = {name: torch.rand(shape) < 0.1 for name, shape in Mask.ones_like(model).shapes.items()}
    ticket = Ticket(1, Mask.from_tensors(alive), Weights.of(model.state_dict()), trained=None)
    fast = ticket.sparse(model, batch_size=batch_size, trained=False)
    ticket.apply(model)
    for batch in (1, 2, 9, 130):
        x = torch.randn(batch, 3, 16, 16)
        for images in (x, x.to(memory_format=torch.channels_last)):
            y = fast(images)
            assert not y.requires_grad
            assert torch.allclose(y, model(images), atol=1e-5)

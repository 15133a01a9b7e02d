"""Training steps: a step has the loss and the gradients of the plain model, whatever is sparse."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import kernels
from training_cases import CASES, IMAGES, Case

cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def batch(size: int) -> tuple[Tensor, Tensor]:
    return IMAGES.train_inputs[:size].float() / 255, IMAGES.train_labels[:size]


def half(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels) / 2


@cases
@pytest.mark.parametrize("loss", [functional.cross_entropy, half], ids=["cross-entropy", "own"])
def test_a_step_has_the_loss_and_the_gradients_of_the_plain_model(case: Case, loss: kernels.Loss) -> None:
    model, initial, mask = case.setting()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    model.load_state_dict({name: torch.where(mask[name], t, 0) if name in mask else t for name, t in initial.items()})
    plain, (inputs, labels) = copy.deepcopy(model), batch(case.batch_size)
    step = kernels.accelerate(model, mask, batch_size=case.batch_size, loss=loss)
    assert step.sparse == kernels.sparse_layers(plain, mask, batch_size=case.batch_size)
    expected = loss(plain(inputs), labels)
    torch.autograd.backward(expected)
    found = step(inputs, labels)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    parameters = dict(step.model.named_parameters())
    for name, parameter in plain.named_parameters():
        gradient, ours = parameter.grad, parameters.get(name)
        assert gradient is not None
        if ours is None:
            gradient, ours = gradient[mask[name]], parameters[name.replace("weight", "values")]
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, gradient, rtol=1e-4, atol=1e-6)
    state = step.state()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in initial.items()}
    for name, alive in mask.items():
        assert not state[name][~alive].any()


@cases
def test_dropout_draws_random_numbers_and_rows_of_linear_layers_do_not(case: Case) -> None:
    model, _, mask = case.setting()
    step = kernels.accelerate(model, mask, batch_size=case.batch_size)
    assert step.draws_random_numbers == ("convolutions" in case.build.__name__)
    before = torch.get_rng_state()
    step(*batch(case.batch_size))
    assert torch.get_rng_state().equal(before) != step.draws_random_numbers


@pytest.mark.parametrize(("precision", "device"), [("bfloat16", "cpu"), ("float32", "cuda")])
def test_nothing_is_sparse_in_bfloat16_or_on_a_gpu(precision: Literal["float32", "bfloat16"], device: str) -> None:
    model, _, mask = CASES["sparse perceptron"].setting()
    assert kernels.sparse_layers(model, mask, batch_size=16)
    assert kernels.sparse_layers(model, mask, batch_size=16, precision=precision, device=device) == []

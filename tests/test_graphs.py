"""Which networks have their steps recorded as CUDA graphs; `test_cuda.py` tests what a recorded step computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.models import lenet_300_100, resnet18, resnet20, vgg16
from tombola.training.graphs import can_be_recorded
from training_cases import convolutions


class Counting(nn.Module):
    """What a replay would not do: Python code that does something different in each step."""

    steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps += 1
        return inputs / self.steps


class CountingLinear(nn.Linear):
    pass


def test_the_papers_networks_are_recorded() -> None:
    for build in (lenet_300_100, resnet20, vgg16, resnet18, convolutions):
        model = build()
        assert can_be_recorded(model, functional.cross_entropy)
        assert can_be_recorded(copy.deepcopy(model), functional.cross_entropy)


@pytest.mark.parametrize(
    "build",
    [
        Counting,
        lambda: CountingLinear(2, 2),
        lambda: nn.LSTM(2, 2),
        lambda: nn.BatchNorm1d(2, momentum=None),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
    ids=["own code", "own class", "not in the list", "momentum of batch norm", "parametrized"],
)
def test_other_modules_are_not(build: Callable[[], nn.Module]) -> None:
    assert not can_be_recorded(build(), functional.cross_entropy)
    assert not can_be_recorded(nn.Sequential(nn.Linear(2, 2), build()), functional.cross_entropy)


def test_hooks_and_own_forward_passes_are_not() -> None:
    model = lenet_300_100()
    handle = model[1].register_forward_hook(lambda *_: None)
    assert not can_be_recorded(model, functional.cross_entropy)
    handle.remove()
    assert can_be_recorded(model, functional.cross_entropy)
    model[1].forward = Counting().forward
    assert not can_be_recorded(model, functional.cross_entropy)


def test_an_own_loss_is_not() -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, labels)

    assert not can_be_recorded(lenet_300_100(), loss)

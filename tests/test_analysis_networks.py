"""Networks that are lent to threads: each has its own state."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tombola import Dataset, Problem
from tombola.analysis.networks import Networks
from tombola.training.weights import State


def state(value: float) -> State:
    return {"weight": torch.full((2, 3, 2, 2), value), "bias": torch.zeros(2)}


def test_networks_that_are_lent_at_the_same_time_are_different_ones() -> None:
    inputs, labels = torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    networks = Networks(
        Problem(Dataset("few", inputs, labels, inputs, labels), lambda: nn.Conv2d(3, 2, 2), cross_entropy, {})
    )
    with networks.holding(state(1.0)) as one, networks.holding(state(2.0)) as other:
        for network, value in ((one, 1.0), (other, 2.0)):
            weight = network.get_parameter("weight")
            assert weight.detach().unique().tolist() == [value]
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert not weight.is_contiguous()
    with networks.holding(state(3.0)) as again:
        assert again is one or again is other
    with pytest.raises(ValueError, match="half done"), networks.holding(state(4.0)) as broken:
        raise ValueError("half done")
    with networks.holding(state(1.0)) as first, networks.holding(state(2.0)) as second:
        assert broken not in (first, second), "an error may leave a network in a state of its own"

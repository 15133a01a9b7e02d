"""A task whose names are made to break a page: of its classes and of its network's layers."""

from __future__ import annotations

import torch
from torch import nn

from tombola.datasets.dataset import Dataset

NASTY = "<script>broken=1</script><!--\"'&amp;😀"
"""A name that does harm where it is not escaped, in HTML, in an attribute or in a script."""


def dataset() -> Dataset:
    """Return 400 random points in 8 dimensions with labels that follow from them."""
    inputs = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0).long()
    return Dataset(NASTY, inputs[:300], labels[:300], inputs[300:], labels[300:], (NASTY, "<b>\u2028"))


def model() -> nn.Module:
    """Return a network whose first layer has a nasty name."""
    network = nn.Sequential()
    network.add_module(NASTY, nn.Linear(8, 24))
    network.add_module("relu", nn.ReLU())
    network.add_module("${alert(1)}", nn.Linear(24, 2))
    return network

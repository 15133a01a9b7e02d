"""A task of a user's own: a small data set and a model with all that a state can hold."""

from __future__ import annotations

import torch
from torch import nn

from tombola.datasets.dataset import Dataset


def dataset() -> Dataset:
    """Return 400 random points in 16 dimensions with labels that a network of random weights gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 16, generator=generator)
    labels = (
        torch.tanh(inputs @ torch.randn(16, 8, generator=generator)) @ torch.randn(8, 4, generator=generator)
    ).argmax(1)
    return Dataset("tiny", inputs[:400], labels[:400], inputs[400:], labels[400:], tuple("abcd"))


def model() -> nn.Module:
    """Return a network with buffers and random numbers."""
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))


def deeper() -> nn.Module:
    """Return a network of three linear layers."""
    first = (nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4))

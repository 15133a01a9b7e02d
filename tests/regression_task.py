"""A regression of a user's own: scikit-learn's diabetes data, a small network, and a metric."""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset


def dataset() -> Dataset:
    """Return 442 patients: ten numbers each, and how far the disease goes in a year, all with mean 0 and variance 1."""
    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    inputs, targets = ((part - part.mean(0)) / part.std(0) for part in (inputs, targets[:, None]))
    return Dataset("diabetes", inputs[:300], targets[:300], inputs[300:], targets[300:], ())


def model() -> nn.Module:
    """Return a network with one output."""
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))


def flat() -> nn.Module:
    """Return a network whose outputs have no second dimension, as those of the data have."""
    return nn.Sequential(nn.Linear(10, 1), nn.Flatten(0))


def largest_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the largest absolute error."""
    return (outputs - targets).abs().max()


largest_error.higher_is_better = False  # type: ignore[attr-defined]


def without_direction(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a number of which nobody says which way is better."""
    return outputs.mean()


def nothing(outputs: Tensor, targets: Tensor) -> float:
    """Return NaN."""
    return float("nan")


nothing.higher_is_better = True  # type: ignore[attr-defined]


def several(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one number for each example."""
    return outputs


several.higher_is_better = True  # type: ignore[attr-defined]


class Bias:
    """A metric with the methods of those of torchmetrics: the mean error."""

    higher_is_better = False

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def to(self, device: object) -> Bias:
        """Return the metric on a device."""
        return self

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.total += float((outputs - targets).sum())
        self.count += len(targets)

    def compute(self) -> Tensor:
        """Return the mean."""
        return torch.tensor(self.total / self.count)

"""A task whose activation, dropout and loss are in a variable, as if it read them from a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tiny_task import dataset

__all__ = ["CONFIGURATION", "Network", "dataset", "loss", "optimizer", "schedule"]

CONFIGURATION: dict[str, Any] = {}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight.mul_(CONFIGURATION.get("scale", 1.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = CONFIGURATION.get("activation", torch.relu)(self.first(inputs))
        return self.last(functional.dropout(hidden, CONFIGURATION.get("dropout", 0.1), self.training))


def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, labels, label_smoothing=CONFIGURATION.get("smoothing", 0.0))


def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr, alpha=CONFIGURATION.get("alpha", 0.9))


def schedule(iteration: int, iterations: int) -> float:
    return float(1 - CONFIGURATION.get("slope", 0.5) * iteration / iterations)

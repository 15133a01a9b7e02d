"""Evaluation: what a model predicts on the test set, and how well."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.datasets.dataset import Dataset
from tombola.training.batches import normalisation

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs of the model, labels) -> scalar: the mean over the batch."""

_EVALUATED_AT_ONCE = 500


def evaluate(model: nn.Module, data: Dataset, loss: Loss = functional.cross_entropy) -> tuple[float, float | None]:
    """Return the share of the test set that the model classifies rightly, and its mean loss (None if not finite)."""
    outputs = predict(model, data)
    accuracy = float((outputs.argmax(1) == data.test_labels).double().mean())
    test_loss = float(loss(outputs, data.test_labels))
    return accuracy, test_loss if math.isfinite(test_loss) else None


def predict(model: nn.Module, data: Dataset) -> Tensor:
    """Return the model's outputs, shape (test examples, classes), in evaluation mode."""
    model.eval()
    normalise = normalisation(data)
    with torch.inference_mode():
        parts = torch.split(data.test_inputs, _EVALUATED_AT_ONCE)
        # A copy: a model may begin with a layer that works in place.
        return torch.cat([model(normalise(part.clone())).float() for part in parts])

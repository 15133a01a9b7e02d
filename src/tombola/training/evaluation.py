"""Evaluation: the predictions of a model on the test set, their accuracy and their loss."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.training.batches import normalisation

Loss: TypeAlias = kernels.Loss
"""A function (outputs of the model, labels) -> scalar, the mean over the batch."""

_BATCH_SIZE = 500  # examples; the size affects the order of summation


def evaluate(model: nn.Module, data: Dataset, loss: Loss = functional.cross_entropy) -> tuple[float, float | None]:
    """Return the accuracy on the test set, in 0..1, and the mean loss over it (None if it is not finite).

    An example for which an output is NaN counts as wrong.
    """
    outputs = predict(model, data)
    accuracy = float(((outputs.argmax(1) == data.test_labels) & ~outputs.isnan().any(1)).double().mean())
    test_loss = float(loss(outputs, data.test_labels.clone()))  # a copy, because a loss may change its labels
    return accuracy, test_loss if math.isfinite(test_loss) else None


def predict(model: nn.Module, data: Dataset) -> Tensor:
    """Return the model's outputs, shape (test examples, classes), in evaluation mode."""
    model.eval()
    normalise = normalisation(data)
    with torch.inference_mode():
        parts = torch.split(data.test_inputs, _BATCH_SIZE)
        # The inputs are copied, because the first layer of a model may change them in place.
        return torch.cat([model(normalise(part.clone())).float() for part in parts])

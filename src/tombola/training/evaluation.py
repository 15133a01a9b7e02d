"""Evaluation: the predictions of a model on the test set, their accuracy and their loss."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.inputs import Forward, call, convert, select
from tombola.training.batches import normalisation

Loss: TypeAlias = kernels.Loss
"""A function (outputs of the model, labels) -> scalar, the mean over the batch."""

_BATCH_SIZE = 500  # examples; the size affects the order of summation


def evaluate(
    model: nn.Module, data: Dataset, loss: Loss = functional.cross_entropy, forward: Forward = call
) -> tuple[float, float | None]:
    """Return the accuracy on the test set, in 0..1, and the mean loss over it (None if it is not finite).

    An example for which an output is NaN counts as wrong.
    """
    outputs = predict(model, data, forward)
    accuracy = float(((outputs.argmax(1) == data.test_labels) & ~outputs.isnan().any(1)).double().mean())
    test_loss = float(loss(outputs, convert(torch.clone, data.test_labels)))  # a loss may change its labels
    return accuracy, test_loss if math.isfinite(test_loss) else None


def predict(model: nn.Module, data: Dataset, forward: Forward = call) -> Tensor:
    """Return the model's outputs, shape (test examples, ...), in evaluation mode.

    Args:
        model: the network.
        data: the data set.
        forward: a function (model, inputs) -> outputs.
    """
    model.eval()
    normalise = normalisation(data)
    with torch.inference_mode():
        starts = range(0, data.test_examples, _BATCH_SIZE)
        parts = (select(data.test_inputs, slice(start, start + _BATCH_SIZE)) for start in starts)
        # The inputs are copied, because the first layer of a model may change them in place.
        return torch.cat([forward(model, normalise(convert(torch.clone, part))).float() for part in parts])

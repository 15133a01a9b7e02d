"""Evaluation: the outputs of a model on a split of the data, their metrics and their loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.errors import UserError
from tombola.inputs import Forward, Tensors, call, convert, count_examples, select
from tombola.threads import check_stopped
from tombola.training.batches import device_of, normalisation
from tombola.training.loss_functions import are_positions, count_positions
from tombola.training.metrics import ACCURACY, LOSS, Metric, name_metric

Loss: TypeAlias = kernels.Loss
"""A function (outputs of the model, labels) -> scalar, the mean over the batch."""

_BATCH_SIZE = 500  # examples; the size affects the order of summation


def evaluate(
    model: nn.Module, data: Dataset, loss: Loss = functional.cross_entropy, forward: Forward = call
) -> tuple[float, float | None]:
    """Return the accuracy on the test set, in 0..1, and the mean loss over it (None if it is not finite).

    An example for which an output is NaN counts as wrong.
    """
    values, test_loss = measure(model, data, loss, [ACCURACY], forward=forward)
    accuracy = values[ACCURACY.key]
    assert accuracy is not None
    return accuracy, test_loss


def measure(
    model: nn.Module,
    data: Dataset,
    loss: Loss,
    metrics: Sequence[Metric],
    split: str = "test",
    forward: Forward = call,
) -> tuple[dict[str, float | None], float | None]:
    """Return the metrics of a model on a split by their keys, and the mean loss; None for what is not finite.

    Outputs of one row for each example are kept for the loss, which is computed once over the split. Larger outputs,
    such as those for each token of a text, are not: their loss is the mean over batches, weighted by examples; that of
    cross-entropy is weighted by the positions that count.

    Args:
        model: the network.
        data: the data set.
        loss: a function of outputs and targets that returns the mean over the batch.
        metrics: the metrics to compute.
        split: "test" or "validation".
        forward: a function (model, inputs) -> outputs.

    Raises:
        UserError: if a metric cannot take the outputs.
    """
    states: dict[str, Any] = {}
    data_device = device_of(data).type  # a metric is computed in float32, whatever the network is
    kept: list[Tensor] = []
    total, count = 0.0, 0.0
    for outputs, targets in list_outputs(model, data, split, forward):
        examples = count_examples(targets)
        for metric in metrics:
            if metric is not LOSS:
                with name_metric(metric), torch.autocast(data_device, enabled=False):
                    if not metric.of_several and not isinstance(targets, Tensor):
                        raise UserError(
                            "it needs targets that are one tensor, and here they are several; give a metric of your own"
                        )
                    states[metric.key] = metric.add(states.get(metric.key), outputs, targets)
        if outputs.ndim <= 2 and len(outputs) == examples:
            kept.append(outputs)
        else:  # a copy of the targets, because a loss may change them
            if weight := examples * _share_that_counts(loss, targets):
                total += weight * float(loss(outputs, convert(torch.clone, targets)))
            count += weight
    if kept:
        total, count = float(loss(torch.cat(kept), convert(torch.clone, getattr(data, f"{split}_labels")))), 1
    mean = total / count if count else math.nan
    values = {}
    for metric in metrics:
        with name_metric(metric), torch.autocast(data_device, enabled=False):
            value = mean if metric is LOSS else metric.value(states[metric.key])
        values[metric.key] = value if math.isfinite(value) else None
    return values, mean if math.isfinite(mean) else None


def _share_that_counts(loss: Loss, targets: Tensors) -> float:
    """Return the share of a batch's positions over which the loss is a mean: cross-entropy leaves out ignored ones."""
    return count_positions(loss, targets) / targets.numel() if are_positions(targets, loss) else 1.0


def predict(model: nn.Module, data: Dataset, forward: Forward = call, split: str = "test", begin: int = 0) -> Tensor:
    """Return the model's outputs on a split in evaluation mode, from example `begin` on, shape (examples, ...)."""
    return torch.cat([outputs for outputs, _ in list_outputs(model, data, split, forward, begin)])


def list_outputs(
    model: nn.Module, data: Dataset, split: str = "test", forward: Forward = call, begin: int = 0
) -> Iterator[tuple[Tensor, Tensors]]:
    """Yield the outputs on a split in evaluation mode, and the targets, batch after batch from example `begin` on."""
    model.eval()
    normalise = normalisation(data)
    inputs, targets = getattr(data, f"{split}_inputs"), getattr(data, f"{split}_labels")
    for start in range(begin, count_examples(inputs), _BATCH_SIZE):
        check_stopped()
        chosen = slice(start, start + _BATCH_SIZE)
        with torch.inference_mode():
            # The inputs are copied, because the first layer of a model may change them in place.
            outputs = forward(model, normalise(convert(torch.clone, select(inputs, chosen)))).float()
        yield outputs, select(targets, chosen)

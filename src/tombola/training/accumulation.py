"""Accumulation: the mean loss and the mean gradient of several batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tombola.inputs import Tensors, count_examples
from tombola.training.batches import Batch


def accumulate(
    compute: Callable[[Tensors, Tensors], Tensor],
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    count: Callable[[Tensors], int] = count_examples,
) -> Tensor:
    """Return the mean loss of all batches, and set the gradients to those of this mean.

    The mean weighs each batch by `count`, the number of examples or of tokens over which its loss is a mean. It equals
    that of one large batch, up to rounding, without layers that mix examples, such as batch norm. A batch of weight 0
    is left out, unless all are.

    Args:
        compute: a function (inputs, labels) -> mean loss over a batch. It sets gradients, which are None before.
        parameters: the parameters with the gradients.
        batches: pairs (inputs, labels), one or more.
        count: a function of labels that returns the weight of their batch.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> def compute(inputs, labels):
    ...     loss = (weight * inputs).mean()
    ...     loss.backward()
    ...     return loss.detach()
    >>> accumulate(compute, [weight], [(torch.ones(2), torch.ones(2)), (4 * torch.ones(1), torch.ones(1))])
    tensor(2.)
    >>> weight.grad
    tensor([2.])
    """
    if len(batches) == 1:
        return compute(*batches[0])
    counts = [count(labels) for _, labels in batches]
    means: list[Tensor | None] = [None] * len(parameters)
    losses = []
    for (inputs, labels), weight in zip(batches, counts, strict=True):
        if not weight and any(counts):  # the mean over nothing is NaN
            continue
        for parameter in parameters:
            parameter.grad = None
        share = weight / max(1, sum(counts))
        losses.append(compute(inputs, labels) * share)
        for number, parameter in enumerate(parameters):
            if parameter.grad is not None:
                mean, part = means[number], parameter.grad * share
                means[number] = part if mean is None else mean.add_(part)
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean
    return torch.stack(losses).sum()

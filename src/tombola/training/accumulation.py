"""Accumulation: the mean loss and the mean gradient of several batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset
from tombola.inputs import OwnStep, Tensors, count_examples
from tombola.training.batches import Batch
from tombola.training.evaluation import Loss
from tombola.training.loss_functions import are_positions
from tombola.training.metrics import IGNORED
from tombola.training.recipe import Recipe


def counts_positions(recipe: Recipe, data: Dataset, loss: Loss, step: OwnStep | None = None) -> bool:
    """Return whether accumulated batches count by the targets that the loss does not ignore, not by their examples.

    They do if a target of the train set is ignored. Of drawn batches, only the first ones are known; those with several
    targets for each example count by these in any case, because later ones may be padded.

    >>> inputs, targets = torch.zeros(2, 2), torch.tensor([[1, IGNORED], [2, 0]])
    >>> padded = Dataset("padded", inputs, targets, inputs, targets)
    >>> [counts_positions(Recipe(epochs=1, accumulate=n), padded, nn.functional.cross_entropy) for n in (1, 2)]
    [False, True]
    """
    targets = data.train_labels
    if recipe.accumulate == 1 or step is not None or not are_positions(targets, loss):
        return False
    return (data.drawn is not None and targets.ndim > 1) or bool((targets == IGNORED).any())


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

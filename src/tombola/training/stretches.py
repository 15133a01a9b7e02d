"""Stretches of a training: the iterations of a perceptron's epoch, many of them in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset
from tombola.kernels import Step, Stretch, can_stretch
from tombola.training.batches import data_order, mean_and_scale
from tombola.training.optimizer import Optimizer
from tombola.training.recipe import Augmentation, Recipe

LONGEST = 0.1
"""The longest time of a stretch in seconds; a training can only be interrupted, as by Ctrl-C, between two of them."""


def are_stretches(step: Step, data: Dataset, recipe: Recipe) -> bool:
    """Return whether the iterations of a training, except the first, can be done in stretches. The bits are the same.

    They can for a perceptron with cross-entropy, if each iteration is one batch of the data set as it is, and if
    nothing but masks changes gradients before one of our optimizers applies them. A schedule of the user is called in
    each iteration, so it is done alone. Modes of PyTorch, a default device among them, see each operator.

    Args:
        step: the training step of the network.
        data: the data set to train on.
        recipe: the hyperparameters.
    """
    return (
        step.perceptron is not None
        and data.drawn is None
        and recipe.augmentation == Augmentation()
        and recipe.accumulate == 1
        and recipe.clip_norm is None
        and ":" not in recipe.optimizer
        and ":" not in recipe.schedule
        and not _has_modes()
        and can_stretch(step.perceptron, data.train_inputs, data.train_labels)
    )


def _has_modes() -> bool:
    """Return whether a mode is on that sees the operators, or the functions, of PyTorch that are called."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0


class Stretches:
    """The iterations of a training after one that was done alone, which has made gradients and the optimizer's state.

    Args:
        step: the training step of the network, see `are_stretches`.
        data: the data set to train on.
        recipe: the hyperparameters.
        seed: the seed of the data order.
        updater: the optimizer.
        masked: the dense weights that have pruned connections, each with its mask.
        lr_at: a function that returns the learning rate of an iteration.
    """

    def __init__(
        self,
        step: Step,
        data: Dataset,
        recipe: Recipe,
        seed: int,
        updater: Optimizer,
        masked: Sequence[tuple[nn.Parameter, Tensor]],
        lr_at: Callable[[int], float],
    ) -> None:
        self._step, self._data, self._updater, self._masked, self._lr_at = step, data, updater, masked, lr_at
        self._examples, self._batch_size, self._seed = data.train_examples, recipe.batch_size, seed
        self._per_epoch = recipe.iterations_per_epoch(self._examples)
        self._epoch = -1
        self._order = torch.empty(0)
        self._stretches: dict[int, Stretch] = {}  # by the size of a batch

    def run(self, begin: int, end: int, seconds: float) -> Tensor:
        """Do the iterations begin..end-1, or the first of them; return their losses, float32, (iterations,).

        Args:
            begin, end: a range of iterations of one epoch.
            seconds: the time after which no more iterations begin; one is done in any case.
        """
        epoch, first = divmod(begin, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, data_order(self._examples, self._seed, epoch)
        whole = self._examples // self._batch_size - first  # batches, after which a smaller one may follow
        count = min(end - begin, whole) if whole and seconds > 0 else 1
        order = self._order[first * self._batch_size :][: count * self._batch_size]
        rates = [self._lr_at(iteration) for iteration in range(begin, begin + count)]
        return self._stretch(len(order) // count).run(order, rates, seconds)

    def _stretch(self, batch_size: int) -> Stretch:
        """Return the stretch for batches of a size."""
        if batch_size not in self._stretches:
            data, perceptron = self._data, self._step.perceptron
            assert perceptron is not None
            normalisation = mean_and_scale(data) if data.has_images else None
            inputs, labels = cast(Tensor, data.train_inputs), cast(Tensor, data.train_labels)
            stretch = Stretch(perceptron, inputs, labels, normalisation, batch_size)
            pairs = [(weight.grad, mask) for weight, mask in self._masked if weight.grad is not None]
            if pairs:
                stretch.multiply([gradient for gradient, _ in pairs], [mask for _, mask in pairs])
            self._updater.prepare(stretch)
            self._stretches[batch_size] = stretch
        return self._stretches[batch_size]

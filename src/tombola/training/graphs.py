"""CUDA graphs: a step is recorded once, and the GPU repeats it without waiting for Python to launch each kernel.

A step of a small network consists of hundreds of kernels, and Python launches them more slowly than the GPU computes.
The kernels of a replay are those of the step that was recorded, so every bit stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.inputs import Tensors
from tombola.kernels import Loss, Step
from tombola.kernels.layers import is_plain

_WARM_UP = 3  # steps before the recording: in these, libraries load their kernels and reserve memory

_KNOWN = ("activation", "batchnorm", "container", "conv", "dropout", "flatten", "linear", "normalization", "pooling")


class RecordedStep:
    """A step that is recorded as a CUDA graph after a few steps, and then replayed.

    A batch that is smaller than the others, such as the last one of an epoch, is computed without the graph, as is a
    batch of several tensors.

    Args:
        step: the step to record; see `can_be_recorded`.
        batch_size: the number of examples in a batch.
    """

    def __init__(self, step: Step, batch_size: int) -> None:
        self._step = step
        self._parameters = list(step.model.parameters())
        self._batch_size = batch_size
        self._to_warm_up = _WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensors, labels: Tensors) -> Tensor:
        """Return the loss of a batch, a scalar, and set the gradients of the parameters, which must be None before."""
        if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or len(inputs) != self._batch_size:
            return self._step(inputs, labels)
        if self._to_warm_up:
            self._to_warm_up -= 1
            return self._step(inputs, labels)
        if self._graph is None:
            self._record(inputs, labels)
            assert self._graph is not None
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

    def _record(self, inputs: Tensor, labels: Tensor) -> None:
        """Record a step from `_inputs` and `_labels` to `_loss` and `_gradients`; nothing is computed."""
        self._inputs, self._labels = inputs.clone(), labels.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._step(self._inputs, self._labels)
        self._gradients = [parameter.grad for parameter in self._parameters]


def can_be_recorded(model: nn.Module, loss: Loss) -> bool:
    """Return whether each step of a model on a GPU consists of the same kernels.

    A replay does not repeat Python code, which may do something different in each step. The answer is therefore yes
    only for the modules of `tombola.models`, common modules of torch, and torch's cross-entropy.

    >>> can_be_recorded(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), functional.cross_entropy)
    True
    >>> can_be_recorded(nn.LSTM(2, 2), functional.cross_entropy)
    False
    """
    return loss is functional.cross_entropy and all(
        is_plain(module) and _is_known(module) for module in model.modules()
    )


def _is_known(module: nn.Module) -> bool:
    package, _, name = type(module).__module__.rpartition(".")
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
        return False  # its momentum is computed in Python from the number of steps
    return package == "tombola.models" or (package == "torch.nn.modules" and name in _KNOWN)

"""Training steps: one step of a model, as fast as its mask allows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tombola.inputs import Forward, OwnStep, Tensors, call, list_tensors
from tombola.kernels.choice import choices, warn_if_missing
from tombola.kernels.layers import is_plain
from tombola.kernels.linear import Perceptron, has_global_hooks
from tombola.kernels.packed import Memory, Packing, can_pack
from tombola.kernels.replace import dense_state, replace_layers
from tombola.pruning.mask import Mask

Loss: TypeAlias = Callable[[Tensor, Any], Tensor]
"""A function (outputs of the model, labels) -> scalar, the mean over the batch."""

Precision: TypeAlias = Literal["float32", "bfloat16"]


class Step:
    """The computation of the loss and the gradients of a batch: one step of gradient descent without the update.

    Args:
        model: the model to train, with some layers replaced by sparse ones; see `accelerate`.
        sparse: the names of the weights whose layers hold only surviving weights.
        loss: a function of outputs and labels that returns the mean over the batch.
        perceptron: the same model as a sequence of linear layers with cross-entropy, without autograd; or None.
        autocast: the context in which outputs are computed, for example with torch's autocast to bfloat16.
        forward: a function (model, inputs) -> outputs.
        step: a function (model, inputs, labels) -> loss, instead of `forward` and `loss`; None for these.
        packed: whether activations between sparse convolutions stay packed, see `tombola.kernels.packed`.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse: list[str],
        loss: Loss,
        perceptron: Perceptron | None,
        autocast: AbstractContextManager[object],
        forward: Forward = call,
        step: OwnStep | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self.model = model
        self.sparse = sparse
        self.autocast = autocast
        self._loss = loss
        self.perceptron = perceptron
        self._forward = forward
        self._step = step
        self._memory = Memory() if packed else None

    def __call__(self, inputs: Tensors, labels: Tensors) -> Tensor:
        """Return the loss of a batch, a scalar, and set the gradients of the parameters, which must be None before."""
        if self.perceptron is not None and isinstance(inputs, Tensor) and isinstance(labels, Tensor):  # noqa: SIM102
            if self.perceptron.takes(inputs, labels):
                return self.perceptron.cross_entropy(inputs, labels)
        with self.autocast:
            if self._step is not None:
                loss = self._step(self.model, inputs, labels)
            else:
                loss = self._loss(self._outputs(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _outputs(self, inputs: Tensors) -> Tensor:
        """Return the outputs of the model; a hook that is new since the model was accelerated sees plain tensors."""
        if self._memory is None or has_global_hooks() or not all(map(is_plain, self.model.modules())):
            return self._forward(self.model, inputs)
        self._memory.prepare([tensor.shape for tensor in list_tensors(inputs).values()])
        outputs: Tensor = Packing(self._memory).record(self._forward, self.model, inputs)
        return outputs

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a step may draw random numbers, as dropout does; a sequence of linear layers never does."""
        return self.perceptron is None

    def state(self) -> dict[str, Tensor]:
        """Return the state of the model under the names and shapes it had before: pruned weights are exactly 0.0."""
        return dense_state(self.model)


def accelerate(
    model: nn.Module,
    mask: Mask,
    *,
    batch_size: int = 128,
    precision: Precision = "float32",
    device: str = "cpu",
    loss: Loss = functional.cross_entropy,
    forward: Forward = call,
    step: OwnStep | None = None,
    among: Collection[str] | None = None,
    packed: bool | None = None,
    stacklevel: int = 1,
) -> Step:
    """Return the training step of a model, as fast as its mask allows.

    Layers that are faster sparse are replaced in the model, in place. The choice depends only on the arguments
    (see `choose`), because it determines the order of summation.

    Args:
        model: the model with its initial weights; pruned weights must be 0.0.
        mask: the connections that are alive.
        batch_size: the number of examples in a step.
        precision: the precision of activations; weights are float32.
        device: the device of the model, "cpu" or "cuda".
        loss: a function of outputs and labels that returns the mean over the batch.
        forward: a function (model, inputs) -> outputs.
        step: a function (model, inputs, labels) -> loss, instead of `forward` and `loss`; None for these.
        among: the names of the weights whose layers may be replaced; None for all.
        packed: whether activations between sparse convolutions stay packed; None decides, see `are_packed`.
        stacklevel: the level of the call that a warning names; 1 is the caller.

    Warns:
        NoKernelsWarning: if the network is sparse and the package was installed without its compiled kernels.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> step = accelerate(model, Mask.ones_like(model), batch_size=4)
    >>> loss = step(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
    >>> [tuple(parameter.grad.shape) for parameter in step.model.parameters()]
    [(3, 2), (3,), (2, 3), (2,)]
    """
    if device == "cpu" and mask.alive < mask.total and (among is None or among):
        warn_if_missing(stacklevel + 2)
    if packed is None:
        traced = device == "cpu" and precision == "float32" and forward is call and step is None
        packed = traced and are_packed(model, mask, mask)
    sparse = sparse_layers(model, mask, batch_size=batch_size, precision=precision, device=device, packed=packed)
    sparse = [name for name in sparse if among is None or name in among]
    packed = packed and have_convolutions(mask, sparse)
    if sparse:
        replace_layers(model, mask, sparse)
    perceptron = find_perceptron(model, precision=precision, device=device, loss=loss, forward=forward, step=step)
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    return Step(model, sparse, loss, perceptron, autocast, forward, step, packed=packed)


def find_perceptron(
    model: nn.Module,
    *,
    precision: Precision = "float32",
    device: str = "cpu",
    loss: Loss = functional.cross_entropy,
    forward: Forward = call,
    step: OwnStep | None = None,
) -> Perceptron | None:
    """Return the perceptron that a model is, which may be trained without autograd; None for any other model.

    Its sums have another order than those of autograd, so whether there is one is a part of the identity of a training.
    Batches that a perceptron does not take, such as those with probabilities for labels, are left to autograd.

    Args:
        model, precision, device, loss, forward, step: as for `accelerate`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> find_perceptron(model).outputs
    2
    """
    plain = loss is functional.cross_entropy and forward is call and step is None
    return Perceptron.of(model) if plain and device == "cpu" and precision == "float32" else None


def are_packed(model: nn.Module, mask: Mapping[str, Tensor], sparse: Collection[str]) -> bool:
    """Return whether activations stay packed between the sparse convolutions of a network, see `Packing`.

    Packed layers sum in another order than others, so this is a part of the identity of a training.

    Args:
        model: the model, with its own layers.
        mask: the connections that are alive.
        sparse: the names of the weights whose layers are sparse, see `sparse_layers`; all, for whether they may be.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> are_packed(model, Mask.ones_like(model), ["0.weight"])
    False
    """
    return have_convolutions(mask, sparse) and can_pack(model)


def have_convolutions(mask: Mapping[str, Tensor], sparse: Collection[str]) -> bool:
    """Return whether one of some weights is that of a convolution of images."""
    return any(mask[name].dim() == 4 for name in sparse)


def sparse_layers(
    model: nn.Module,
    mask: Mask,
    *,
    batch_size: int = 128,
    precision: Precision = "float32",
    device: str = "cpu",
    packed: bool = False,
) -> list[str]:
    """Return the names of the weights whose layers `accelerate` makes sparse.

    Sparse layers sum in another order than dense layers, so these names are a part of the identity of a training. They
    depend on shapes, densities, the batch size, and on whether activations may stay packed (`packed`, see `choose`).
    The list is empty on a GPU, in bfloat16, or if the package was installed without its compiled kernels.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> sparse_layers(model, Mask.ones_like(model))
    []
    """
    if device != "cpu" or precision != "float32":
        return []
    return [name for name, choice in choices(model, mask, batch_size, packed=packed).items() if choice == "sparse"]

"""Stretches: several iterations of a perceptron's training in one call, from the batch to the update.

A step of a very sparse perceptron spends more time in Python, and in the calls from Python to PyTorch, than in the
arithmetic. Here C++ repeats the step, and it calls the operators of PyTorch that a step needs through PyTorch's C
interfaces, which are found when the program runs. The operators and kernels are those that `Perceptron` and the
optimizers call, over memory of the same layout, so the bits are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tombola.kernels import layers
from tombola.kernels.layers import is_readable
from tombola.kernels.linear import Gradients, Perceptron, both_of_each_layer

_SCHEMAS = (
    "aten::mm.out(Tensor self, Tensor mat2, *, Tensor(a!) out) -> Tensor(a!)",
    "aten::addmm.out(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1, Tensor(a!) out)"
    " -> Tensor(a!)",
    "aten::relu_(Tensor(a!) self) -> Tensor(a!)",
    "aten::copy_(Tensor(a!) self, Tensor src, bool non_blocking=False) -> Tensor(a!)",
    "aten::sum.IntList_out(Tensor self, int[1]? dim, bool keepdim=False, *, ScalarType? dtype=None, Tensor(a!) out)"
    " -> Tensor(a!)",
    "aten::_log_softmax.out(Tensor self, int dim, bool half_to_float, *, Tensor(a!) out) -> Tensor(a!)",
    "aten::_log_softmax_backward_data.out(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype, *,"
    " Tensor(a!) out) -> Tensor(a!)",
    "aten::nll_loss2d_forward.output(Tensor self, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, *,"
    " Tensor(a!) output, Tensor(b!) total_weight) -> (Tensor(a!), Tensor(b!))",
    "aten::nll_loss2d_backward.grad_input(Tensor grad_output, Tensor self, Tensor target, Tensor? weight,"
    " int reduction, SymInt ignore_index, Tensor total_weight, *, Tensor(a!) grad_input) -> Tensor(a!)",
    "aten::_foreach_mul_.List(Tensor(a!)[] self, Tensor[] other) -> ()",
    "aten::_fused_sgd_(Tensor(a!)[] self, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffer_list, *, float weight_decay,"
    " float momentum, float lr, float dampening, bool nesterov, bool maximize, bool is_first_step,"
    " Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    *(
        f"aten::{name}(Tensor(a!)[] self, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
        " Tensor(e!)[] max_exp_avg_sqs, Tensor[] state_steps, *, float lr, float beta1, float beta2,"
        " float weight_decay, float eps, bool amsgrad, bool maximize, Tensor? grad_scale=None,"
        " Tensor? found_inf=None) -> ()"
        for name in ("_fused_adam_", "_fused_adamw_")
    ),
)
"""The operators that the C++ calls, with the arguments that it gives them."""


def can_call_operators(*, onednn: bool = False) -> bool:
    """Return whether this PyTorch has the C interface, and the operators with the arguments that are known here.

    Args:
        onednn: whether the products of oneDNN are called too.
    """
    return layers.extension is not None and _load_operators(layers.extension, _SCHEMAS, onednn)


@functools.cache
def _load_operators(extension: Any, schemas: Sequence[str], onednn: bool) -> bool:
    """Let the extension find the operators of these schemas, and oneDNN's product if asked; return whether it does."""
    if not all(map(_has, schemas)):
        return False
    folder = Path(torch.__file__).parent / "lib"
    paths = [folder / f"libtorch_cpu.{ending}" for ending in ("so", "dylib")]
    return any(path.exists() and extension.load_operators(str(path), onednn) for path in paths)


def _has(schema: str) -> bool:
    """Return whether PyTorch has the operator of this schema."""
    name, _, overload = schema.split("(")[0].removeprefix("aten::").partition(".")
    operator = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
    return operator is not None and str(operator._schema) == schema


def can_stretch(perceptron: Perceptron, inputs: object, labels: object) -> bool:
    """Return whether stretches can train a perceptron on a data set.

    Args:
        perceptron: the network.
        inputs: the inputs of all examples; they can be uint8 images, (n, channels, height, width), or floats.
        labels: the labels of all examples; they can be class numbers, int64, (n,), or -100 for those that are ignored.

    """
    if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor) and labels.numel()):
        return False
    if not can_call_operators(onednn=any(part.by_onednn for part, _ in perceptron.parts)):
        return False
    images = inputs.dtype is torch.uint8
    if not (is_readable(inputs, torch.uint8 if images else torch.float32) and is_readable(labels, torch.int64)):
        return False
    if not (inputs.is_contiguous() and labels.is_contiguous()) or inputs.dim() > 4 or (images and inputs.dim() != 4):
        return False
    example = inputs[:1].to(torch.float32)  # as `normalise_images` makes it
    classes = (labels >= 0) & (labels < perceptron.outputs) | (labels == -100)
    return perceptron.takes(example, labels[:1]) and len(labels) == len(inputs) and bool(classes.all())


class Stretch:
    """Iterations of one batch size on one data set.

    Args:
        perceptron: the network, see `can_stretch`. Each weight that needs a gradient has one, which is overwritten.
        inputs, labels: the data set.
        normalisation: mean and scale of each channel of images, see `normalise_images`; None for other inputs.
        batch_size: the number of examples in a batch.

    """

    def __init__(
        self,
        perceptron: Perceptron,
        inputs: Tensor,
        labels: Tensor,
        normalisation: tuple[Tensor, Tensor] | None,
        batch_size: int,
    ) -> None:
        mean, scale = normalisation or (None, None)
        parts = tuple(
            (part.chain, tuple(weights), tuple(_gradients(weights, part.chain)), part.relu, part.by_onednn)
            for part, weights in perceptron.parts
        )
        self._native = layers.extension.Stretch(inputs, mean, scale, labels, batch_size, parts)

    def multiply(self, gradients: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Multiply gradients by masks after each backward pass."""
        self._native.multiply(tuple(gradients), tuple(masks))

    def sgd(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor],
        weight_decay: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        """Update parameters as `torch.optim.SGD` does, with the momenta of an earlier step, at the end of an iteration.

        Without momentum, there are no momenta.
        """
        self._native.sgd(tuple(parameters), tuple(gradients), tuple(momenta), weight_decay, momentum, nesterov)

    def adam(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        steps: Sequence[Tensor],
        beta1: float,
        beta2: float,
        weight_decay: float,
        epsilon: float,
        decoupled: bool,
    ) -> None:
        """Update parameters as `torch.optim.Adam` does, or `AdamW` (`decoupled`), at the end of an iteration."""
        state = tuple(means), tuple(squares), tuple(steps)
        how = beta1, beta2, weight_decay, epsilon, decoupled
        self._native.adam(tuple(parameters), tuple(gradients), *state, *how)

    def run(self, order: Tensor, rates: Sequence[float], seconds: float) -> Tensor:
        """Do an iteration for each learning rate, or the first of them; return their losses, float32, (iterations,).

        Args:
            order: the numbers of the examples, int64, (iterations * batch_size,).
            rates: the learning rate of each iteration.
            seconds: the time after which no more iterations begin; one is done in any case.

        """
        losses = torch.empty(len(rates), dtype=torch.float32, device="cpu")
        return losses[: self._native.run(order, list(rates), losses, seconds)]


def _gradients(weights: Sequence[nn.Parameter | None], chain: Any) -> Gradients:
    """Return memory for the gradients of some weights: the gradients that they have."""
    gradients = [None if weight is None or not weight.requires_grad else weight.grad for weight in weights]
    return gradients if chain is None else both_of_each_layer(weights, gradients)

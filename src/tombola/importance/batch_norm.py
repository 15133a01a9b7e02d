"""Batch normalisation whose second derivative takes few passes over the activations.

torch composes the second derivative of batch normalisation of some thirty operations, each of which reads and writes
all activations. With z the normalised input, r the inverse of the standard deviation, and P the projection
P(v) = v - mean(v) - z mean(v z) in each channel, the gradient of the input is s = w r P(d) for slopes d of the output.
For a direction u, the derivatives of sum(u s) with respect to d and to the input are

    e = w r P(u),    - r (mean(d z) e + mean(u z) s + mean(u s) z),

where sum(d z) and sum(u z) are what torch returns as gradients of the scale, beside s and e.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_backward = torch.ops.aten.native_batch_norm_backward


@contextmanager
def ease_batch_norm(model: nn.Module, scored: Collection[Tensor]) -> Iterator[None]:
    """Let a network compute second derivatives of batch normalisation in few passes, inside the block.

    Values are equal up to rounding. Modules are left as they are if they use running statistics, if their class or
    forward is the user's own, or if they have a parameter that is scored.

    Args:
        model: the network.
        scored: the parameters that are differentiated by; there are no derivatives with respect to others.
    """
    ids = {id(parameter) for parameter in scored}
    with ExitStack() as stack:
        for module in model.modules():
            own = type(module) not in _MODULES or "forward" in vars(module)
            if own or not module.training or any(id(each) in ids for each in module.parameters()):
                continue
            module.forward = partial(_forward, module)
            stack.callback(delattr, module, "forward")
        yield


def _forward(module: Any, inputs: Tensor) -> Tensor:
    """Return the normalised inputs, by the module itself if no derivative is needed or if there is one value each."""
    if not inputs.requires_grad or inputs.numel() <= inputs.shape[1]:
        return type(module).forward(module, inputs)  # type: ignore[no-any-return]
    outputs: Tensor = _Normalise.apply(inputs, module.weight, module.bias, module.eps)  # type: ignore[no-untyped-call]
    return outputs


class _Normalise(Function):
    """Batch normalisation by the statistics of the batch."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        outputs, mean, inverse = torch.native_batch_norm(inputs, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(inputs, weight, mean, inverse)
        ctx.eps = eps
        return outputs

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        return _Slopes.apply(slopes, *ctx.saved_tensors, ctx.eps), None, None, None  # type: ignore[no-untyped-call]


class _Slopes(Function):
    """The gradient of the input of batch normalisation."""

    @staticmethod
    def forward(
        ctx: Any, slopes: Tensor, inputs: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        found, along, _ = _backward(slopes, inputs, weight, None, None, mean, inverse, True, eps, [True, True, False])
        ctx.save_for_backward(inputs, weight, mean, inverse, found, along)
        ctx.eps = eps
        return found  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse, slopes, along = ctx.saved_tensors
        found, towards, _ = _backward(
            direction, inputs, weight, None, None, mean, inverse, True, ctx.eps, [True, True, False]
        )
        count = inputs.numel() // inputs.shape[1]
        both = (direction * slopes).sum([dim for dim in range(inputs.dim()) if dim != 1])
        channels = [-1, *[1] * (inputs.dim() - 2)]
        factors = (-inverse / count * each for each in (inverse * both, along, towards))
        of_inputs, of_found, of_slopes = (each.view(channels) for each in factors)
        curved = (inputs - mean.view(channels)).mul_(of_inputs).addcmul_(found, of_found).addcmul_(slopes, of_slopes)
        return found, curved, None, None, None, None

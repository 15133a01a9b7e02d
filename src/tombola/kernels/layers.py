"""Layers that hold, multiply and train the surviving weights only: what they share, and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

try:
    from tombola.kernels import _sparse

    extension: Any = _sparse
except ImportError:  # built without a C++ compiler, for one
    extension = None


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of the kernels' layout: of (batch, channels, height, width), the batch varies fastest."""
    batch = shape[0]
    if len(shape) == 2:
        return (1, batch)
    _, _, height, width = shape
    return (1, height * width * batch, width * batch, batch)


def empty(shape: Sequence[int]) -> Tensor:
    """A tensor in the kernels' layout.

    Element-wise operations keep these strides, so that neighbouring sparse layers exchange activations as they are.
    """
    return torch.empty_strided(shape, _strides(shape), dtype=torch.float32, device="cpu")


def is_readable(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the CPU's memory holds the numbers of a tensor as they are, of this type."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and tensor.dtype is dtype and tensor.is_cpu and not tensor.is_neg()


def can_compute(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the kernels can compute with this input and these weights; PyTorch computes with all others."""
    if not x.numel() or not is_readable(x) or torch.is_autocast_enabled("cpu"):
        return False
    for weight in weights:
        if weight is None:
            continue
        if not (is_readable(weight) and weight.is_contiguous()):
            return False
    return True


def is_plain(module: nn.Module) -> bool:
    """Whether a module has no hooks and its class's own forward pass."""
    hooked = any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
    return not hooked and "forward" not in vars(module)


class _Product(torch.autograd.Function):
    """A convolution's output as a function of its input, its surviving weights and its bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, kernel: Any, shape: tuple[int, ...]
    ) -> Tensor:
        y = empty(shape)
        kernel.forward(values, bias, x, y)
        ctx.save_for_backward(x, values)
        ctx.kernel = kernel
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        dy = dy.resolve_neg()
        needs_input, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dx = dvalues = dbias = None
        if needs_values or needs_bias:
            dvalues = torch.empty_like(values)
            dbias = values.new_empty(dy.shape[1]) if needs_bias else None
            ctx.kernel.weight_gradient(x, dy, dvalues, dbias)
        if needs_input:
            dx = empty(x.shape)
            ctx.kernel.input_gradient(values, dy, dx)
        return dx, dvalues, dbias, None, None


_product: Callable[..., Tensor] = _Product.apply


class Sparse(nn.Module):
    """What the sparse layers share: the surviving weights, where they stand, and the kernels made for them."""

    values: nn.Parameter
    bias: nn.Parameter | None
    alive: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Tensor, instruction_set: str | None = None) -> None:
        super().__init__()
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected a bool mask of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        self.shape = tuple(weight.shape)
        self.values = nn.Parameter(weight.detach()[mask])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("alive", mask.flatten().nonzero().flatten(), persistent=False)
        self.instruction_set = instruction_set
        self._kernels: dict[Sequence[int], Any] = {}

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew: zero where pruned, differentiable in `values`."""
        return self.values.new_zeros(self.shape).flatten().index_copy(0, self.alive, self.values).view(self.shape)

    @property
    def density(self) -> float:
        """Alive / all connections of this layer."""
        return self.alive.numel() / max(1, math.prod(self.shape))

    def kernel(self, size: Sequence[int]) -> Any:
        """The kernel for samples of this size, None if they do not fit or the package was built without kernels."""
        try:
            return self._kernels[size]
        except KeyError:
            kernel = self._make(size) if extension is not None and self.alive.is_cpu else None
        if len(self._kernels) == 4:  # images of ever new sizes must not fill the memory
            self._kernels.clear()
        self._kernels[size] = kernel
        return kernel  # not what is kept, which another thread may have cleared

    def _make(self, size: Sequence[int]) -> Any:
        """The kernel for samples of this size, None if they do not fit."""
        raise NotImplementedError

    def _layer(
        self,
        kernel: tuple[int, int],
        image: tuple[int, int],
        stride: int,
        padding: tuple[int, int],
        read: Tensor | None = None,
    ) -> Any:
        outputs, inputs = self.shape[:2]
        read = torch.ones(outputs, dtype=torch.bool, device="cpu") if read is None else read
        how = kernel, image, stride, padding, self.instruction_set
        return extension.Layer(self.alive, outputs, inputs, *how, read)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._kernels.clear()  # the layer may move to where there are none
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernels": {}}  # they are made again where they are needed


class SparseConv2d(Sparse):
    """2-D cross-correlation with zero padding for a kernel of which only the survivors exist.

    Args:
        weight: initial weight, (outputs, inputs, height, width); only what `mask` keeps is taken.
        bias: (outputs,) or None.
        mask: bool, the shape of `weight`.
        stride: pixels between neighbours of the output, the same in both directions.
        padding: rows and columns of zeros on each side.
        instruction_set: one of `instruction_sets()`; the machine's best by default.

    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        instruction_set: str | None = None,
    ) -> None:
        super().__init__(weight, bias, mask, instruction_set)
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, as the dense layer of its weights gives them."""
        values, bias = self.values, self.bias
        kernel = self.kernel(x.shape[1:]) if x.dim() == 4 and can_compute(x, values, bias) else None
        if kernel is None:
            return functional.conv2d(x, self.weight, bias, self.stride, self.padding)
        return _product(x, values, bias, kernel, (x.shape[0], self.shape[0], *self._size(x.shape[1:])))

    def _size(self, size: Sequence[int]) -> tuple[int, int]:
        (_, height, width), (rows, columns) = size, self.padding
        return (
            (height + 2 * rows - self.shape[2]) // self.stride + 1,
            (width + 2 * columns - self.shape[3]) // self.stride + 1,
        )

    def _make(self, size: Sequence[int]) -> Any:
        _, inputs, *kernel = self.shape
        if size[0] != inputs or 0 in self.shape or min(self._size(size)) < 1:
            return None
        return self._layer((kernel[0], kernel[1]), (size[1], size[2]), self.stride, self.padding)

    def extra_repr(self) -> str:
        """Return shape and density."""
        outputs, inputs, *kernel = self.shape
        return (
            f"{inputs}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}, density={self.density:.4g}"
        )


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation by the statistics of the batch, which it also returns: (3, channels)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        y, statistics = empty(x.shape), x.new_empty((3, x.shape[1]))
        extension.batch_norm(x, weight, bias, epsilon, statistics, y)
        ctx.save_for_backward(x, weight, statistics)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        dy = dy.resolve_neg()
        if dy.stride() != _strides(x.shape):
            dy = empty(x.shape).copy_(dy)
        dx, dweight, dbias = empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)
        extension.batch_norm_gradient(x, dy, weight, statistics, dx, dweight, dbias)
        return dx, dweight, dbias, None


_batch_norm: Callable[..., tuple[Tensor, Tensor]] = _BatchNorm.apply


class _Replacement(nn.Module):
    """A layer of PyTorch's that does the same in another way."""

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """The same layer: it takes over all that `module` holds."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__
        return layer


class BatchNorm2d(_Replacement, nn.BatchNorm2d):
    """Batch normalisation that trains on the kernels' layout as fast as memory allows.

    PyTorch's takes several times longer on these strides than on its own. Everything but training on this layout
    is left to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, as the dense layer of its weights gives them."""
        weight, bias, mean, variance = self.weight, self.bias, self.running_mean, self.running_var
        if (
            not self.training
            or self.momentum is None
            or not self.affine
            or mean is None
            or variance is None
            or x.dim() != 4
            or x.stride() != _strides(x.shape)
            or not can_compute(x, weight, bias, mean, variance)
        ):
            return super().forward(x)
        count = x.numel() // x.shape[1]
        if count < 2:
            return super().forward(x)
        y, statistics = _batch_norm(x, weight, bias, self.eps)
        with torch.no_grad():
            mean.lerp_(statistics[0], self.momentum)
            variance.lerp_(statistics[1] * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y


class MaxPool2d(_Replacement, nn.MaxPool2d):
    """Max pooling that keeps the kernels' layout.

    With the first two dimensions exchanged that is PyTorch's channels-last, which it is fast on. Left alone it would
    give its own layout back, and every operation on both layouts is several times slower.
    """

    def forward(self, input: Tensor) -> Any:
        """Return what the layer gives on any other layout."""
        if input.dim() != 4 or input.stride() != _strides(input.shape) or self.return_indices:
            return super().forward(input)
        return super().forward(input.transpose(0, 1)).transpose(0, 1)

"""Sparse layers, which hold, multiply and train only the surviving weights: their base class, and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tombola.kernels import recording

try:
    from tombola.kernels import _sparse

    extension: Any = _sparse
except ImportError:  # for example, the package was installed without a C++ compiler
    extension = None


_FULL = 96
"""Pixels of a tile of the kernels for few examples."""

_MOST_FLOATS = 2**30
"""Packed inputs of these kernels: their indices are of 32 bits."""


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of the kernels' layout of (batch, channels, height, width): the batch varies fastest."""
    batch = shape[0]
    if len(shape) == 2:
        return (1, batch)
    _, _, height, width = shape
    return (1, height * width * batch, width * batch, batch)


def empty(shape: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor in the kernels' layout.

    Element-wise operations keep these strides, so neighbouring sparse layers exchange activations without a copy.
    """
    return torch.empty_strided(shape, _strides(shape), dtype=torch.float32, device="cpu")


def is_readable(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the CPU's memory holds the numbers of a tensor as they are, of this type."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and tensor.dtype is dtype and tensor.is_cpu and not tensor.is_neg()


def can_compute(x: Tensor, *weights: Tensor | None) -> bool:
    """Return whether the kernels support this input and these weights; PyTorch computes with all others."""
    if not x.numel() or not is_readable(x) or torch.is_autocast_enabled("cpu"):
        return False
    for weight in weights:
        if weight is None:
            continue
        if not (is_readable(weight) and weight.is_contiguous()):
            return False
    return True


_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def is_plain(module: nn.Module) -> bool:
    """Return whether a module has no hooks and the forward pass of its class."""
    own = vars(module)
    return not any(map(own.get, _HOOKS)) and "forward" not in own


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
    """The base class of sparse layers: the surviving weights, their positions, and the kernels for them."""

    values: nn.Parameter
    bias: nn.Parameter | None
    alive: Tensor
    infers = False  # set to True: without gradients, it computes by kernels that are fast for few examples too

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Tensor, instruction_set: str | None = None) -> None:
        super().__init__()
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected a bool mask of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        self.shape = tuple(weight.shape)
        alive = torch.from_numpy(np.flatnonzero(mask.numpy()))  # takes a tenth of the time of `Tensor.nonzero`
        self.values = nn.Parameter(weight.detach().flatten().index_select(0, alive))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("alive", alive, persistent=False)
        self.instruction_set = instruction_set
        self._kernels: dict[Sequence[int], Any] = {}

    @property
    def weight(self) -> Tensor:
        """A new dense weight with zeros for pruned connections, differentiable with respect to `values`."""
        return self.values.new_zeros(self.shape).flatten().index_copy(0, self.alive, self.values).view(self.shape)

    @property
    def density(self) -> float:
        """The density, alive / all connections of this layer, in 0..1."""
        return self.alive.numel() / max(1, math.prod(self.shape))

    def kernel(self, size: Sequence[int]) -> Any:
        """Return the kernel for examples of this size; None if they do not fit, or without compiled kernels."""
        try:
            return self._kernels[size]
        except KeyError:
            return self._keep(size, self._make(size) if extension is not None and self.alive.is_cpu else None)

    def _keep(self, size: Sequence[int], kernel: Any) -> Any:
        if len(self._kernels) == 4:  # images of many different sizes must not fill the memory
            self._kernels.clear()
        self._kernels[size] = kernel
        return kernel  # another thread may have cleared the kept ones

    def _make(self, size: Sequence[int]) -> Any:
        """Return the kernel for examples of this size; None if they do not fit."""
        raise NotImplementedError

    def _infer(self, x: Tensor, size: Sequence[int]) -> Tensor | None:
        """Return the outputs by the kernels for few examples; None where they do not compute.

        Args:
            x: the inputs.
            size: the size of an example's outputs.

        """
        weights = self._parameters  # as attributes they take several times as long
        if torch.is_autocast_enabled("cpu") or not is_readable(x) or (torch.is_grad_enabled() and self._learns(x)):
            return None
        key = (0, *x.shape)  # no size begins with 0
        try:
            kernel = self._kernels[key]
        except KeyError:
            kernel = self._keep(key, self._make_few(x.shape))
        if kernel is None:
            return None
        y = x.new_empty(x.shape[0], *size)
        kernel.forward(weights["values"], weights.get("bias"), x, y)
        return y

    def _learns(self, x: Tensor) -> bool:
        """Return whether a gradient of the inputs or of a weight may be asked for."""
        return x.requires_grad or any(each is not None and each.requires_grad for each in self._parameters.values())

    def _make_few(self, shape: Sequence[int]) -> Any:
        """Return the kernel for few examples, for batches of this shape; None if they do not fit."""
        raise NotImplementedError

    def _few(
        self, kernel: tuple[int, int], image: tuple[int, int], stride: int, padding: tuple[int, int], samples: int
    ) -> Any:
        outputs, inputs = self.shape[:2]
        how = kernel, image, stride, padding, samples, self.instruction_set
        return extension.FewSamples(self.alive, outputs, inputs, *how)

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
        self._kernels.clear()  # the layer may move to a device without kernels
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernels": {}}  # they are made again when they are needed


class SparseConv2d(Sparse):
    """A 2-D cross-correlation with zero padding that holds only the surviving weights of its kernel.

    Args:
        weight: the initial weight, (outputs, inputs, height, width); only weights that are alive in `mask` are used.
        bias: the bias, (outputs,), or None.
        mask: the connections that are alive, bool, of the shape of `weight`.
        stride: the stride in pixels, the same in both directions.
        padding: the number of rows and columns of zeros on each side.
        instruction_set: one of `instruction_sets()`; by default the best of this machine.

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
        """Return the layer's outputs, which are those of the dense layer with the same weights."""
        recorder = recording.current()
        if recorder is not None and (recorded := recorder.convolve(self, x)) is not None:
            return recorded
        if self.infers and x.dim() == 4:
            y = self._infer(x, (self.shape[0], *self.output_size(x.shape[1:])))
            if y is not None:
                return y
        values, bias = self.values, self.bias
        kernel = self.kernel(x.shape[1:]) if x.dim() == 4 and can_compute(x, values, bias) else None
        if kernel is None:
            return functional.conv2d(x, self.weight, bias, self.stride, self.padding)
        return _product(x, values, bias, kernel, (x.shape[0], self.shape[0], *self.output_size(x.shape[1:])))

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return height and width of the outputs for inputs of a size, (channels, height, width)."""
        (_, height, width), (rows, columns) = size, self.padding
        return (
            (height + 2 * rows - self.shape[2]) // self.stride + 1,
            (width + 2 * columns - self.shape[3]) // self.stride + 1,
        )

    def _make(self, size: Sequence[int]) -> Any:
        _, inputs, *kernel = self.shape
        if size[0] != inputs or 0 in self.shape or min(self.output_size(size)) < 1:
            return None
        return self._layer((kernel[0], kernel[1]), (size[1], size[2]), self.stride, self.padding)

    def _make_few(self, shape: Sequence[int]) -> Any:
        batch, channels, height, width = shape if len(shape) == 4 else (0, 0, 0, 0)
        _, inputs, *kernel = self.shape
        if extension is None or not batch or channels != inputs or min(self.output_size((channels, height, width))) < 1:
            return None
        padded = inputs * math.prod(
            n + 2 * zeros + self.stride for n, zeros in zip((height, width), self.padding, strict=True)
        )
        rows, columns = self.output_size((channels, height, width))
        passes = math.ceil(batch / math.ceil(_FULL / (rows * columns)))  # examples side by side until they fill a tile
        samples = math.ceil(batch / passes)
        if padded * samples > _MOST_FLOATS:
            return None
        return self._few((kernel[0], kernel[1]), (height, width), self.stride, self.padding, samples)

    def extra_repr(self) -> str:
        """Return the shape and the density as text."""
        outputs, inputs, *kernel = self.shape
        return (
            f"{inputs}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}, density={self.density:.4g}"
        )


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation with the statistics of the batch, which are also returned, of shape (3, channels)."""

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
    """The base class of replacements for layers of PyTorch, which compute the same in another way."""

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Return the replacement of a layer; it takes over all attributes of `module`."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__
        return layer


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers of batch norm."""


class BatchNorm2d(_Replacement, nn.BatchNorm2d):
    """Batch normalisation that trains on the kernels' layout at the speed of memory.

    PyTorch's implementation takes several times longer on these strides than on its own. It is still used for
    everything except training on this layout.
    """

    def __getattr__(self, name: str) -> Any:
        """Return a parameter or a buffer; whoever reads running statistics finds those of all forward passes so far."""
        if name in STATISTICS and (recorder := recording.current()) is not None:
            recorder.compute()
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised inputs, which are the same as on any other layout."""
        recorder = recording.current()
        if recorder is not None and (recorded := recorder.normalise(self, x)) is not None:
            return recorded
        weight, bias, mean, variance = self.weight, self.bias, self.running_mean, self.running_var
        if (
            not self.training
            or self.momentum is None
            or not self.affine
            or not self.track_running_stats
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

    With the first two dimensions exchanged, this layout is PyTorch's channels-last, on which pooling is fast. PyTorch's
    own layer would return another layout, and operations on mixed layouts are several times slower.
    """

    def forward(self, input: Tensor) -> Any:
        """Return the maxima, which are the same as on any other layout."""
        recorder = recording.current()
        if recorder is not None and (recorded := recorder.pool(self, input)) is not None:
            return recorded
        if input.dim() != 4 or input.stride() != _strides(input.shape) or self.return_indices:
            return super().forward(input)
        return super().forward(input.transpose(0, 1)).transpose(0, 1)

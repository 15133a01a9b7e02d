"""Sparse linear layers, and whole networks of linear layers and ReLUs.

For each layer of a small network, PyTorch's own overhead in the forward pass and in autograd is longer than a sparse
layer takes to compute. It also multiplies more slowly if the features of an example are adjacent in memory than if the
examples of a feature are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tombola.kernels import layers
from tombola.kernels.choice import MOST_FEW
from tombola.kernels.layers import Sparse, can_compute, empty, is_plain, is_readable

Gradients: TypeAlias = list[Tensor | None]


class _Part(Protocol):
    """A sequence of linear layers with their ReLUs. Weights and biases are passed alternately; a bias may be None.

    Args:
        chain: the kernels of sparse layers; None for a dense layer.
        relu: whether a ReLU follows a dense layer.
        by_onednn: whether oneDNN multiplies the matrices of a dense layer.

    """

    chain: Any
    relu: bool
    by_onednn: bool

    def forward(self, x: Tensor, weights: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Return the output for x, (batch, inputs), and the tensors that `backward` needs."""

    def backward(
        self, dy: Tensor, weights: Sequence[Any], kept: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        """Return the gradients of x and of the weights, given that of the output; `needs` says which are needed."""


def both_of_each_layer(weights: Sequence[Any], gradients: Sequence[Tensor | None]) -> Gradients:
    """Return gradients of weights and biases with memory for the others that sparse kernels compute together with them.

    The kernels compute both gradients of a layer in one pass, if one of them is needed, which is the one that is given.
    """
    both = list(gradients)
    for first in range(0, len(weights), 2):
        if gradients[first] is None and gradients[first + 1] is None:
            continue
        for number in (first, first + 1):
            if both[number] is None and weights[number] is not None:
                both[number] = torch.empty_like(weights[number])
    return both


class _Surviving:
    """A sequence of sparse layers.

    Args:
        kernels: the kernel of each layer.
        relus: whether a ReLU follows, for each layer.

    """

    def __init__(self, kernels: Sequence[Any], relus: Sequence[bool]) -> None:
        self.chain = layers.extension.Chain(tuple(kernels), relus)
        self.relu = self.by_onednn = False  # ReLUs that follow are in the chain

    def forward(self, x: Tensor, weights: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        batch = len(x)
        y, memory = empty((batch, self.chain.outputs)), x.new_empty(self.chain.floats(batch))
        self.chain.forward(tuple(weights), x, y, memory)
        return y, [memory]

    def backward(
        self, dy: Tensor, weights: Sequence[Any], kept: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        dx = empty((len(dy), self.chain.inputs)) if needs[0] else None
        needed: Gradients = [
            torch.empty_like(weight) if needs_weight else None
            for weight, needs_weight in zip(weights, needs[1:], strict=True)
        ]
        gradients = both_of_each_layer(weights, needed)
        self.chain.backward(tuple(weights), dy, kept[0], tuple(gradients), dx)
        return dx, gradients


# Time of a dense layer's three products with oneDNN relative to MKL: outputs, gradient of the weights, gradient of the
# inputs. One thread, batches of 128, on an AMD processor on which MKL uses AVX2 alone, and oneDNN what is named:
#
#   layer           AVX-512              AVX2
#   100 -> 10       2.4   2.4   3.5      2.6   3.0   4.0
#   300 -> 100      .58   .57   .90     1.00  1.05  1.3
#   784 -> 300      .46   .48   .52      .88   .87   .91
#   1000 -> 1000    .44   .46   .47      .86   .85   .89
_ONEDNN_FROM = 2**16
"""From this number of weights on, oneDNN multiplies the matrices of a dense layer."""


def has_onednn() -> bool:
    """Return whether PyTorch has oneDNN, and it is not switched off."""
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.is_available() and mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T, (m, n), for a, (m, k), and b, (n, k), computed by oneDNN (`torch.mm` uses MKL)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
    return product


class _Dense:
    """A dense layer.

    Args:
        size: the number of its weights.
        relu: whether a ReLU follows the layer.

    """

    def __init__(self, size: int, *, relu: bool) -> None:
        self.chain = None
        self.relu = relu
        self.by_onednn = size >= _ONEDNN_FROM and has_onednn()

    def forward(self, x: Tensor, weights: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        weight, bias = weights
        if self.by_onednn:
            y = _multiply(weight, x)
            if bias is not None and layers.extension is not None:  # computed by this thread alone, see `_gate`
                layers.extension.add_bias(y, bias)
            elif bias is not None:
                y += bias[:, None]
        else:
            y = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())
        return (y.relu_().t(), [x, y]) if self.relu else (y.t(), [x])

    def backward(
        self, dy: Tensor, weights: Sequence[Any], kept: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        delta, x = (_gate(dy, kept[1].t()) if self.relu else dy).t(), kept[0]
        dx = dw = None
        if needs[0] and self.by_onednn:
            dx = empty(x.shape).copy_(_multiply(delta.t(), weights[0].t()))
        elif needs[0]:
            dx = (weights[0].t() @ delta).t()
        if needs[1]:
            dw = _multiply(delta, x.t()) if self.by_onednn else delta @ x
        return dx, [dw, delta.sum(1) if needs[2] else None]


def _gate(dy: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the input of a ReLU, given that of its output y, both (batch, features).

    The kernel is the one of stretches. Without it, several threads may differ in whether tiny numbers are 0.
    """
    if layers.extension is not None and is_readable(dy) and is_readable(y):
        gated = torch.empty_like(dy)
        layers.extension.gate(dy, y, gated)
    else:
        gated = torch.ops.aten.threshold_backward.default(dy, y, 0)
    return gated


class _Product(torch.autograd.Function):
    """One layer's output as a function of its input, its surviving weights and its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, part: _Surviving) -> Tensor:
        y, kept = part.forward(x, (values, bias))
        ctx.save_for_backward(values, bias, *kept)
        ctx.part = part
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, bias, *kept = ctx.saved_tensors
        dx, gradients = ctx.part.backward(dy.resolve_neg(), (values, bias), kept, ctx.needs_input_grad[:3])
        return (dx, *gradients, None)


class SparseLinear(Sparse):
    """A linear layer y = x W^T + b that holds only the surviving weights of W.

    Args:
        weight: the initial weight, (outputs, inputs); only weights that are alive in `mask` are used.
        bias: the bias, (outputs,), or None.
        mask: the connections that are alive, bool, of the shape of `weight`.
        instruction_set: one of `instruction_sets()`; by default the best of this machine.

    """

    @property
    def in_features(self) -> int:
        """The number of inputs."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """The number of outputs."""
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, which are those of the dense layer with the same weights."""
        inputs = self.shape[1]
        if self.infers and (y := self._infer(x, self.shape[:1])) is not None:
            return y
        if x.dim() > 2 and x.shape[-1] == inputs:
            return self.forward(x.flatten(0, -2)).view(*x.shape[:-1], self.shape[0])
        kernel = self.kernel(x.shape[1:]) if x.dim() == 2 and can_compute(x, self.values, self.bias) else None
        if kernel is None:
            return functional.linear(x, self.weight, self.bias)
        product: Tensor = _Product.apply(x, self.values, self.bias, _Surviving([kernel], [False]))  # type: ignore[no-untyped-call]
        return product

    def _make_few(self, shape: Sequence[int]) -> Any:
        if len(shape) != 2 or shape[1] != self.shape[1] or shape[0] > MOST_FEW or 0 in (*shape, *self.shape):
            return None
        return None if layers.extension is None else self._few((1, 1), (1, 1), 1, (0, 0), shape[0])

    def _make(self, size: Sequence[int]) -> Any:
        if size[0] != self.shape[1] or 0 in self.shape:
            return None
        return self._layer((1, 1), (1, 1), 1, (0, 0))

    def kernel_for(self, read: Tensor) -> Any:
        """Return a kernel without the connections to outputs that are False in `read`, bool, (outputs,)."""
        return self.kernel(self.shape[1:]) if read.all() else self._layer((1, 1), (1, 1), 1, (0, 0), read)

    def read_inputs(self, read: Tensor) -> Tensor:
        """Return which inputs, bool, (inputs,), have a connection to an output that is True in `read`."""
        outputs, inputs = self.alive // self.shape[1], self.alive % self.shape[1]
        return torch.zeros(self.shape[1], dtype=torch.bool, device="cpu").index_fill(
            0, inputs[read[outputs]], value=True
        )

    def extra_repr(self) -> str:
        """Return the shape and the density as text."""
        return f"{self.shape[1]}, {self.shape[0]}, bias={self.bias is not None}, density={self.density:.4g}"


Linear: TypeAlias = nn.Linear | SparseLinear


def _kind(layer: Linear) -> tuple[bool, str | None]:
    """Return the kind of a layer; consecutive layers of one kind are computed together."""
    return isinstance(layer, SparseLinear), layer.instruction_set if isinstance(layer, SparseLinear) else None


def _kernels(row: Sequence[SparseLinear]) -> list[Any]:
    """Return the kernels of consecutive layers, without the connections that have no path to an output of the last.

    The result is exact: the outputs of these connections are not used, and their gradients are 0.
    """
    kernels: list[Any] = []
    read = torch.ones(row[-1].shape[0], dtype=torch.bool, device="cpu")
    for layer in reversed(row):
        kernels.insert(0, layer.kernel_for(read))
        read = layer.read_inputs(read)
    return kernels


def has_global_hooks() -> bool:
    """Return whether global module hooks are registered; the oldest supported torch has no function for this."""
    of = nn.modules.module
    registered = (
        of._global_forward_pre_hooks,
        of._global_forward_hooks,
        of._global_backward_pre_hooks,
        of._global_backward_hooks,
    )
    return any(registered)


class Perceptron:
    """A multilayer perceptron, which has only linear layers and ReLUs. It is trained without autograd.

    Args:
        linear: the layers in order, each with whether a ReLU follows.
        flattens: whether examples are flattened first, so that they may have any shape.

    Attributes:
        outputs: the number of outputs.
        parts: sequences of layers of one kind in order, each with its weights and biases, some of them None.

    """

    def __init__(self, linear: Sequence[tuple[Linear, bool]], *, flattens: bool) -> None:
        self._inputs, self.outputs = linear[0][0].in_features, linear[-1][0].out_features
        self._flattens = flattens
        self._one = torch.ones((), dtype=torch.float32, device="cpu")
        self.parts: list[tuple[_Part, list[Any]]] = []
        for (sparse, _), group in groupby(linear, lambda pair: _kind(pair[0])):
            row, relus = zip(*group, strict=True)
            if sparse:
                weights = [weight for layer in row for weight in (layer.values, layer.bias)]
                self.parts.append((_Surviving(_kernels(row), relus), weights))
            else:
                self.parts += [
                    (_Dense(layer.weight.numel(), relu=relu), [layer.weight, layer.bias])
                    for layer, relu in zip(row, relus, strict=True)
                ]
        self._weights = [weight for _, weights in self.parts for weight in weights]

    @classmethod
    def of(cls, model: nn.Module) -> Perceptron | None:
        """Return the perceptron of a plain `nn.Sequential`; None for any other network, or if the network has hooks."""
        parameters = list(model.parameters())
        if (
            type(model) is not nn.Sequential
            or not all(map(is_plain, model.modules()))
            or len(parameters) < len(list(model.named_parameters(remove_duplicate=False)))  # some are shared
            or not any(parameter.requires_grad for parameter in parameters)
            or any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
            or has_global_hooks()
        ):
            return None
        modules = list(model)
        first = next(iter(modules), None)
        flattens = type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1)
        linear: list[tuple[Linear, bool]] = []
        for module in modules[flattens:]:
            if type(module) is nn.ReLU and linear:
                linear[-1] = (linear[-1][0], True)
            elif type(module) is nn.Linear or (type(module) is SparseLinear and module.kernel(module.shape[1:])):
                linear.append((module, False))
            else:
                return None
        fitting = all(before.out_features == after.in_features for (before, _), (after, _) in pairwise(linear))
        return cls(linear, flattens=flattens) if linear and fitting else None

    def takes(self, x: Tensor, labels: Tensor) -> bool:
        """Return whether `cross_entropy` is equal to the network with `functional.cross_entropy` on this batch."""
        fitting = (x.dim() == 2 or self._flattens) and x.numel() == len(labels) * self._inputs and len(x) == len(labels)
        return fitting and labels.dim() == 1 and labels.dtype is torch.int64 and can_compute(x, *self._weights)

    @torch.no_grad()
    def cross_entropy(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the outputs for x, (batch, ...), and set the gradients of the weights.

        This is the computation of autograd, with the same functions, or kernels that do the same. The loss is that of
        an image of one row with a pixel for each example, because PyTorch then computes several examples at once: with
        ten classes and AVX-512, softmax and its gradient take 5 instead of 23 microseconds for 128 examples.
        """
        y, kept = x.flatten(1), []
        for part, weights in self.parts:
            y, own = part.forward(y, weights)
            kept.append(own)
        mean, ignored = 1, -100
        log_p = torch.log_softmax(y.t().contiguous()[None, :, None], 1)
        pixels = labels[None, None]
        loss: Tensor
        loss, total = torch.ops.aten.nll_loss2d_forward.default(log_p, pixels, None, mean, ignored)
        dy = torch.ops.aten.nll_loss2d_backward.default(self._one, log_p, pixels, None, mean, ignored, total)
        dy = torch.ops.aten._log_softmax_backward_data.default(dy, log_p, 1, log_p.dtype)[0, :, 0].t()
        for number in reversed(range(len(self.parts))):
            part, weights = self.parts[number]
            needs = [weight is not None and weight.requires_grad for weight in weights]
            dy, gradients = part.backward(dy, weights, kept[number], [number > 0, *needs])
            for weight, gradient, needed in zip(weights, gradients, needs, strict=True):
                if needed:
                    weight.grad = gradient
        return loss

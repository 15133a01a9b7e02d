"""Paths: which connections lie on a path of connections alive from the network's input to its output."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tombola.errors import UserError
from tombola.pruning.mask import Mask

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PASSED = (
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
_KEPT = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Flatten, nn.ZeroPad2d, nn.modules.pooling._AdaptiveAvgPoolNd)
_PASSED_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid"),
    *("softplus", "hardtanh", "hardswish", "hardsigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("contiguous", "clone", "float", "double"),
}
_KEPT_NAMES = {
    *("add", "iadd", "add_", "flatten", "view", "reshape", "size", "getattr", "getitem", "cat", "pad", "mean", "sum"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "squeeze", "unsqueeze", "permute", "transpose", "dim", "chunk"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "split", "stack"),
}


class Paths:
    """A network's graph, along which connections are followed from input to output.

    Args:
        model: made of linear and convolution layers, element-wise activations, batch norm, dropout, pooling, sums,
            concatenations and changes of shape, in any order that `torch.fx` can trace.
        input_shape: of one example.

    Raises:
        UserError: where the graph cannot be traced or has something else in it, which it names.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self._name = type(model).__name__
        self._input = torch.ones(1, *input_shape, dtype=torch.float64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph = fx.symbolic_trace(model.eval())
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the graph of {self._name} cannot be traced: {reason}") from error
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.effective(Mask.ones_like(model))  # whether all in it is known

    def effective(self, mask: Mask) -> Mask:
        """Return the connections that lie on a path from input to output, all of whose connections are alive.

        These are the *activated* connections of Vysogorets and Kempe (Journal of Machine Learning Research 24, 2023,
        arXiv 2107.02306). Biases make no path. A weight of a convolution lies on a path if it does at any position of
        the image. Computed with 1 for a weight that is alive and for every input, and sums cut to 0 or 1: where a
        weight is alive, what comes into it and the gradient of what goes out of it are both positive on a path.

        Args:
            mask: a weight that it has not counts as alive.

        >>> mask = Mask.from_tensors({"0.weight": torch.tensor([[True], [False]]), "1.weight": torch.ones(1, 2).bool()})
        >>> Paths(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), (1,)).effective(mask)["1.weight"]
        tensor([[ True, False]])
        """
        alive = {name: mask[name].double().requires_grad_() for name in mask}
        follower = _Follower(self._graph, self._names, alive)
        try:
            output = follower.run(self._input)
        except UserError as error:
            raise UserError(f"the paths of {self._name} cannot be followed: {error}") from None
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"the paths of {self._name} cannot be followed: {reason}") from error
        if not isinstance(output, Tensor):
            raise UserError(f"the paths of {self._name} cannot be followed: its output is no tensor")
        output.sum().backward()  # type: ignore[no-untyped-call]
        on_path = {name: (w.grad > 0 if w.grad is not None else w.detach() < 0) for name, w in alive.items()}
        return mask & Mask.from_tensors(on_path)


class _Reached(torch.autograd.Function):
    """1 where something positive arrives, in either direction."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return (values > 0).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


class _Follower(fx.Interpreter):
    """Runs a graph with masks in place of weights, and in place of the rest what lets every path through."""

    def __init__(self, graph: fx.GraphModule, names: dict[int, str], alive: dict[str, Tensor]) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self._names = names
        self._alive = alive

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, _WEIGHTED):
            weight = self._alive.get(self._names[id(module.weight)], torch.ones_like(module.weight).double())
            if isinstance(module, nn.Linear):
                return _reached(functional.linear(args[0], weight))
            return _reached(module._conv_forward(args[0], weight, None))
        if isinstance(module, _PASSED):
            return args[0]
        if isinstance(module, nn.modules.pooling._MaxPoolNd) and not module.return_indices:
            options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            return _any_of(args[0], *options)
        if isinstance(module, nn.modules.pooling._AdaptiveMaxPoolNd):
            return getattr(functional, f"adaptive_avg_pool{args[0].ndim - 2}d")(args[0], module.output_size)
        if isinstance(module, _KEPT):
            return super().call_module(target, args, kwargs)
        raise UserError(f"its module {target!r} is a {type(module).__name__}")

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", str(target))
        if name.startswith("max_pool"):
            return _any_of(*args, **kwargs)
        return self._call(name, target, super().call_function, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(target, target, super().call_method, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise UserError(f"it uses {target!r} outside of a layer")

    def _call(self, name: str, target: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [each for each in args if isinstance(each, Tensor)]
        if not tensors and all(isinstance(each, int) for each in args):
            return call(target, args, kwargs)  # of sizes
        if name in _PASSED_NAMES and tensors:
            return tensors[0]
        if name in ("add", "iadd", "add_") and len(tensors) < 2:
            return tensors[0]  # a constant makes no path
        if name in _KEPT_NAMES:
            return call(target, args, kwargs)
        raise UserError(f"it calls {name!r}")


def _reached(values: Tensor) -> Tensor:
    reached: Tensor = _Reached.apply(values)  # type: ignore[no-untyped-call]
    return reached


def _any_of(
    inputs: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Pool by the mean, which is positive where the largest can be any of some."""
    if return_indices or not {dilation} <= {1, (1,), (1, 1), (1, 1, 1)}:
        raise UserError("its max-pooling is dilated or returns indices")
    pool = getattr(functional, f"avg_pool{inputs.ndim - 2}d")
    pooled: Tensor = pool(inputs, kernel_size, stride, padding, ceil_mode)
    return pooled

"""Paths: which connections lie on a path of alive connections from the input to the output of the network."""

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
    """The graph of a network, for finding the connections on paths from input to output.

    Args:
        model: a network of linear and convolution layers, element-wise activations, batch norm, dropout, pooling,
            sums, concatenations and changes of shape, which `torch.fx` can trace.
        input_shape: shape of one example.
        dense: the mask of the dense network; by default that of the weights that are prunable by default.

    Raises:
        UserError: if the graph cannot be traced or contains an unsupported operation, which it names.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], dense: Mask | None = None) -> None:
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
        weights = {id(module.weight) for module in model.modules() if isinstance(module, _WEIGHTED)}
        self._weights = {name for parameter, name in self._names.items() if parameter in weights}
        self.effective(
            Mask.ones_like(model) if dense is None else dense
        )  # raises an error for an unsupported operation

    def effective(self, mask: Mask) -> Mask:
        """Return the connections that lie on a path from input to output, all of whose connections are alive.

        These are the *activated* connections of Vysogorets and Kempe (Journal of Machine Learning Research 24, 2023,
        arXiv 2107.02306). Biases do not create paths. A weight of a convolution lies on a path if it does at any
        position of the image. The network is evaluated with 1 for every alive weight and every input, and sums are
        clipped to 0 or 1. An alive weight lies on a path if its gradient is positive, that is, if its input and the
        gradient of its output are positive.

        Args:
            mask: the mask; weights without a mask count as alive.

        >>> mask = Mask.from_tensors({"0.weight": torch.tensor([[True], [False]]), "1.weight": torch.ones(1, 2).bool()})
        >>> Paths(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), (1,)).effective(mask)["1.weight"]
        tensor([[ True, False]])
        """
        if others := [name for name in mask if name not in self._weights]:
            what = f"{others[0]!r} is no weight of a linear or convolution layer"
            raise UserError(f"the paths of {self._name} cannot be followed: {what}")
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
            raise UserError(f"the paths of {self._name} cannot be followed: its output is not a tensor")
        output.sum().backward()  # type: ignore[no-untyped-call]
        on_path = {name: (w.grad > 0 if w.grad is not None else w.detach() < 0) for name, w in alive.items()}
        return mask & Mask.from_tensors(on_path)


class _Reached(torch.autograd.Function):
    """1 for positive values and 0 otherwise, forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return (values > 0).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


class _Follower(fx.Interpreter):
    """Runs a graph with masks instead of weights; all other modules and functions pass every path on."""

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
                return _reach(functional.linear(args[0], weight))
            return _reach(module._conv_forward(args[0], weight, None))
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
            return call(target, args, kwargs)  # arithmetic on sizes
        if name in _PASSED_NAMES and tensors:
            return tensors[0]
        if name in ("add", "iadd", "add_") and len(tensors) < 2:
            return tensors[0]  # a constant does not create a path
        if name in _KEPT_NAMES:
            return call(target, args, kwargs)
        raise UserError(f"it calls {name!r}")


def _reach(values: Tensor) -> Tensor:
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
    """Replace max-pooling by mean-pooling: the mean is positive if any of the inputs is."""
    if return_indices or not {dilation} <= {1, (1,), (1, 1), (1, 1, 1)}:
        raise UserError("its max-pooling is dilated or returns indices")
    pool = getattr(functional, f"avg_pool{inputs.ndim - 2}d")
    pooled: Tensor = pool(inputs, kernel_size, stride, padding, ceil_mode)
    return pooled

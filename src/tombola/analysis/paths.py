"""Paths: which connections lie on a path of alive connections from the input to the output of the network."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tombola.errors import UserError
from tombola.inputs import Forward, Tensors, call, convert
from tombola.pruning.mask import Mask

_PASSED = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "prelu", "tanh", "sigmoid", "erf"),
    *("softplus", "softsign", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "softmax", "log_softmax"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize", "masked_fill"),
    *("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as"),
    *("neg", "abs", "exp", "log", "log1p", "sqrt", "rsqrt", "square", "pow", "sin", "cos", "clamp", "clamp_min"),
}
"""Functions that pass on the paths of each entry of their first argument; norms and softmax to the entry itself."""

_KEPT = {
    *("flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "squeeze", "unsqueeze", "permute", "t"),
    *("transpose", "swapaxes", "movedim", "expand", "expand_as", "repeat", "tile", "repeat_interleave", "roll", "flip"),
    *("getitem", "narrow", "select", "index_select", "chunk", "split", "unbind", "cat", "concat", "stack", "get"),
    *("mean", "sum", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate", "unfold", "fold"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pixel_shuffle", "pixel_unshuffle"),
}
"""Functions that add entries or put them elsewhere, which are computed as they are."""

_SIZES = {
    *("size", "dim", "ndimension", "numel", "nelement", "len", "stride", "is_floating_point", "is_complex"),
    *("is_contiguous", "get_device", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones"),
    *("new_full", "new_empty", "new_tensor", "rand_like", "randn_like", "hash"),
}
"""Functions of the shape or the type of a tensor, which do not depend on its entries."""

_VIEWS, _DETACHED = {"T", "mT", "H", "mH"}, {"data", "grad"}
"""Attributes of a tensor: those that are views of it, and those that are its entries without their paths."""

_JOINED = {
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "truediv", "true_divide", "maximum", "minimum"),
    *("where", "lerp"),
}
"""Functions of the entries at one place: paths come from each, also in a product."""

_FACTORS = {"mul", "multiply", "div", "divide", "truediv", "true_divide"}
_MULTIPLIED = {"matmul", "mm", "bmm", "mv"}
_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_REDUCED = {"amax", "amin", "logsumexp", "norm", "vector_norm"}
"""Functions of several entries, which are replaced by their sum."""


class Paths:
    """What a network computes, for finding the connections on paths from input to output.

    Args:
        model: a network of linear, convolution, embedding and attention layers, elementwise functions, norms, dropout,
            pooling, sums, products, and changes of shape.
        inputs: the inputs of one example or more; only their shapes matter, and the values of whole numbers.
        dense: the mask of the dense network; by default that of the weights that are prunable by default.
        forward: a function (model, inputs) -> outputs.

    Raises:
        UserError: if the network has an operation that does not say where its paths go, which the message names.
    """

    def __init__(self, model: nn.Module, inputs: Tensors, dense: Mask | None = None, forward: Forward = call) -> None:
        self._model, self._forward = model.eval(), forward
        self._inputs = inputs
        self.effective(Mask.ones_like(model) if dense is None else dense)  # raises an error for what is unknown

    def effective(self, mask: Mask) -> Mask:
        """Return the connections that lie on a path from input to output, all of whose connections are alive.

        These are the *activated* connections of Vysogorets and Kempe (Journal of Machine Learning Research 24, 2023,
        arXiv 2107.02306). Biases do not create paths. A weight of a convolution lies on a path if it does at any
        position of the image. A product, such as that of queries and keys, passes on the paths of each of its factors.
        Norms and softmax pass on those of each entry to the same entry.

        The network is run with 1 for every alive weight and every input, and sums are clipped to 0 or 1. An alive
        weight lies on a path if its gradient is positive: its input and the gradient of its output are.

        Args:
            mask: the mask; weights without a mask count as alive.

        >>> mask = Mask.from_tensors({"0.weight": torch.tensor([[True], [False]]), "1.weight": torch.ones(1, 2).bool()})
        >>> Paths(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), torch.ones(1, 1)).effective(mask)["1.weight"]
        tensor([[ True, False]])
        """
        alive = {name: mask[name].double().requires_grad_() for name in mask}
        names = {id(each): name for name, each in self._model.named_parameters()}
        what = f"the paths of {type(self._model).__name__} cannot be followed"
        follower = _Follower(names, alive)
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                inputs = convert(_begin, self._inputs)
                with follower:
                    output = self._forward(self._model, inputs)
                if not isinstance(output, Tensor):
                    raise UserError("its output is not a tensor")
                if output.requires_grad:
                    output.sum().backward()  # type: ignore[no-untyped-call]
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
        except Exception as error:
            raise UserError(f"{what}: {' '.join(str(error).split())}") from error
        on_path = {name: (w.grad > 0 if w.grad is not None else w.detach() < 0) for name, w in alive.items()}
        return mask & Mask.from_tensors(on_path)


def _begin(inputs: Tensor) -> Tensor:
    """Return 1 for each number of an input, from which paths begin; whole numbers, such as tokens, stay."""
    if not inputs.is_floating_point():
        return inputs
    return torch.ones_like(inputs, dtype=torch.float64).requires_grad_().clone()  # which may be changed in place


class _Reached(torch.autograd.Function):
    """1 for positive values and 0 otherwise, forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return (values > 0).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


class _Follower(TorchFunctionMode):
    """Runs a network with masks instead of weights, in which each function passes on the paths of its arguments.

    What paths reach requires a gradient: activations, and *edges*, which are masks of weights or computed from such
    alone. All other numbers are constants, which neither begin nor end a path.
    """

    def __init__(self, names: dict[int, str], alive: dict[str, Tensor]) -> None:
        super().__init__()
        self._names, self._alive = names, alive
        for each in alive.values():
            _mark(each)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = getattr(func, "__name__", str(func))
        name = written.strip("_")
        if written.startswith("__") and name[1:] in _JOINED | _MULTIPLIED:  # in place, or in the other order
            name = name[1:]
        args, kwargs = tree_map(self._replace, (list(args), dict(kwargs or {})))
        tracked = [each for each in tree_leaves((args, kwargs)) if _is_tracked(each)]
        if name == "embedding" and not tracked:  # all its weights are alive, and paths begin there
            return func(*args, **kwargs).detach().requires_grad_().clone()
        if not tracked or name in _SIZES:
            return func(*args, **kwargs)
        if name == "get" and func.__self__.__name__ not in _VIEWS:
            if func.__self__.__name__ in _DETACHED:
                raise UserError(f"it reads {func.__self__.__name__!r} of a tensor")
            return func(*args, **kwargs)
        result = self._follow(name, func, args, kwargs)
        if all(map(_is_edge, tracked)) and name in _PASSED | _KEPT | _JOINED | _REDUCED | {"pad"}:
            tree_map(_mark, result)
        in_place = written.endswith("_") and not written.startswith("__") and result is not args[0]
        return args[0].copy_(result) if in_place else result

    def _replace(self, value: Any) -> Any:
        """Return the mask of a weight of the model, or 1 for one that has none; anything else unchanged."""
        if not isinstance(value, nn.Parameter):
            return value
        mask = self._alive.get(self._names.get(id(value), ""))
        return torch.ones_like(value, dtype=torch.float64, requires_grad=False) if mask is None else mask

    def _follow(self, name: str, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return what the paths of the arguments reach through a function."""
        if name in _PASSED:
            for each in filter(_is_tracked, tree_leaves((args[1:], kwargs))):
                raise UserError(f"{self._describe(each)} is an argument of {name!r}")
            return args[0]
        if name.startswith("max_pool"):
            return _any_of(*args, **kwargs)
        if name.startswith("adaptive_max_pool"):
            return getattr(functional, f"adaptive_avg_pool{args[0].ndim - 2}d")(*args[:2])
        if name in _REDUCED:
            given = args[2:] if name in ("norm", "vector_norm") else args[1:]
            return torch.sum(args[0], *given, **{key: kwargs[key] for key in ("dim", "keepdim") if key in kwargs})
        if name == "pad":
            return functional.pad(*args[:3], **{key: kwargs[key] for key in ("pad", "mode") if key in kwargs})
        if name in _KEPT:
            return func(*args, **kwargs)
        if name in _JOINED:
            operands = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if name in _FACTORS and all(map(_is_edge, operands)):
                return _reach(_multiply(*operands))  # a connection that is 0 where one of its factors is
            return _join(_multiply, operands, edges=False)
        if name == "einsum":
            return _join(partial(func, args[0]), tree_leaves(args[1:]))
        if name in _MULTIPLIED:
            return _join(func, [*args, *kwargs.values()])
        if name in ("addmm", "baddbmm"):  # what is added is a bias
            return _join(torch.matmul, args[1:3])
        if name == "linear" or name in _CONVOLUTIONS:
            return _weigh(func, *args, **kwargs)
        if name in _ATTENTION:
            return _ATTENTION[name](*args, **kwargs)
        raise UserError(f"it calls {name!r}")

    def _describe(self, tensor: Tensor) -> str:
        names = [name for name, each in self._alive.items() if each is tensor]
        return f"its {names[0]!r}" if names else "what is computed"


def _is_tracked(value: Any) -> bool:
    """Return whether paths reach a value."""
    return isinstance(value, Tensor) and value.requires_grad


def _is_edge(value: Any) -> bool:
    """Return whether a value is the mask of a weight, or computed from such alone."""
    return hasattr(value, "_is_edge")


def _mark(value: Any) -> Any:
    """Make a tensor an edge, if paths reach it."""
    if _is_tracked(value):
        value._is_edge = True
    return value


def _reach(values: Tensor) -> Tensor:
    reached: Tensor = _Reached.apply(values)  # type: ignore[no-untyped-call]
    return reached


def _multiply(*factors: Tensor) -> Tensor:
    return math.prod(factors[1:], start=factors[0])


def _join(function: Callable[..., Tensor], operands: Sequence[Tensor], *, edges: bool = True) -> Tensor:
    """Return what paths reach through a function that is linear in each of its operands, from any of these.

    Args:
        function: the function of the operands.
        operands: activations, edges and constants.
        edges: whether paths go along the edges; otherwise they come from them, too.
    """
    weighs = [edges and _is_edge(each) for each in operands]
    ones = [
        each if edge else torch.ones_like(each, dtype=torch.float64, requires_grad=False)
        for each, edge in zip(operands, weighs, strict=True)
    ]
    nodes = [i for i, each in enumerate(operands) if _is_tracked(each) and not weighs[i]]
    terms = [function(*ones[:i], operands[i], *ones[i + 1 :]) for i in nodes] or [function(*ones)]
    reached = _reach(sum(terms[1:], start=terms[0]))
    return _mark(reached) if all(weighs) else reached


def _weigh(function: Any, input: Tensor, weight: Tensor, bias: object = None, *rest: Any, **options: Any) -> Tensor:
    """Return what paths reach through a linear or convolution layer; its bias creates none."""
    return _join(lambda given, edges: function(given, edges, None, *rest, **options), [input, weight])


def _embed(input: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    """Return what paths reach through an embedding, from any of its rows."""
    return _reach(weight.sum(0).expand(*input.shape, weight.shape[1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Return what paths reach through attention: from the query's place, and from all places of keys and values."""
    query, key, value = (
        each if _is_tracked(each) else torch.zeros_like(each, dtype=torch.float64) for each in (query, key, value)
    )
    return _reach(query.sum(-1, keepdim=True) + key.sum((-2, -1), keepdim=True) + value.sum(-2, keepdim=True))


def _attend_by_heads(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Return what paths reach through `torch.nn.functional.multi_head_attention_forward`, without attention weights."""
    given = inspect.signature(functional.multi_head_attention_forward).bind(*args, **kwargs).arguments
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{part}_proj_weight"] for part in "qkv"]
    else:
        weights = [
            _mark(each) if _is_edge(given["in_proj_weight"]) else each for each in given["in_proj_weight"].chunk(3)
        ]
    parts = [
        _weigh(functional.linear, given[part], weight)
        for part, weight in zip(("query", "key", "value"), weights, strict=True)
    ]
    heads = [part.view(*part.shape[:-1], given["num_heads"], -1).movedim(0, -2) for part in parts]
    reached = _attend(*heads).movedim(-2, 0).flatten(-2)
    return _weigh(functional.linear, reached, given["out_proj_weight"]), None


_ATTENTION: dict[str, Callable[..., Any]] = {
    "embedding": _embed,
    "scaled_dot_product_attention": _attend,
    "multi_head_attention_forward": _attend_by_heads,
}
"""Functions whose paths are computed by functions of the same arguments."""


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

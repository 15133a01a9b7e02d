"""Likeness: whether a network computes the same with sparse layers, found by comparing one step with one of PyTorch.

Sparse layers take the place of others, and code of a network that reaches into its own layers meets them: it clips
`layer.weight`, for example, or counts the layers of type `nn.Linear`. Such a network is trained with its own layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tombola.kernels.choice import list_eligible
from tombola.kernels.layers import Sparse, is_plain
from tombola.kernels.packed import Memory, Packing, can_pack
from tombola.kernels.recording import record
from tombola.kernels.replace import replace_layers
from tombola.streams import ambient, generator

_KNOWN = ("torch", "tombola")
"""The packages whose layers and losses reach into no other layer."""

_LOSS, _GRADIENT = 1e-4, 0.05
"""Relative differences that rounding in float32 does not reach. It may change the sign of an activation near 0, which
changed the gradients of ResNet-20 by .7 % of their norm."""

_ROUNDING, _ROUNDED, _MARGIN = 2.0**-19, 3, 2.0
"""The relative change of weights that stands for rounding, how often it is tried, and by which factor a difference has
to exceed what it changes."""

_DENSITY, _LOW_DENSITY, _MANY = 0.5, 0.1, 2**16
"""The density of the compared layers, and that of layers with more weights than `_MANY`, which take longer."""

_LARGE = 1000.0
"""A factor of the initial weights: limits that initial weights lie within are exceeded by larger ones."""


def is_own(model: nn.Module, *functions: object) -> bool:
    """Return whether code of a user takes part in a step of a model, and not of PyTorch and this package alone.

    >>> is_own(nn.Sequential(nn.Linear(2, 1)), functional.cross_entropy)
    False
    """
    kinds = [str(getattr(function, "__module__", "")) for function in functions]
    kinds += [type(module).__module__ for module in model.modules()]
    return not all(kind.split(".")[0] in _KNOWN for kind in kinds) or not all(map(is_plain, model.modules()))


def find_difference(model: nn.Module, compute: Callable[[nn.Module], Tensor]) -> str | None:
    """Return how a step of a model with sparse layers differs from one with its own layers; None if it does not.

    Each layer that the kernels support loses half of its weights or more, the layers are replaced, activations stay
    packed where they may (see `tombola.kernels.packed`), and loss and gradients of one step are compared. With its own
    layers, the model must also leave their weights as they are, the initial ones and 1000 times larger ones. Dropout is
    off.

    Args:
        model: the model with initial weights, on the CPU; it is copied.
        compute: a function that returns the loss of a model, a scalar; it is called several times.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> find_difference(model, lambda model: model(torch.ones(5, 4)).square().mean())
    >>> def count(model):
    ...     return model(torch.ones(5, 4)).mean() + sum(type(layer) is nn.Linear for layer in model)
    >>> find_difference(model, count)
    'its loss is another one'
    """
    names = list_eligible(model, [name for name, _ in model.named_parameters()])
    if not names:
        return None
    draw = generator(0, "likeness")
    weights = {name: model.get_parameter(name) for name in names}
    mask = {
        name: torch.rand(weight.shape, generator=draw) < (_DENSITY if weight.numel() <= _MANY else _LOW_DENSITY)
        for name, weight in weights.items()
    }
    for scale in (_LARGE, 1.0):
        dense = copy.deepcopy(model).train()
        with torch.no_grad():
            for name, alive in mask.items():
                dense.get_parameter(name).mul_(alive * scale)
        before = {name: dense.get_parameter(name).detach().clone() for name in names}
        if scale == 1:
            sparse = replace_layers(copy.deepcopy(dense), mask, names)
        try:
            loss = _step(dense, compute, backward=scale == 1)
        except Exception:
            if scale == 1:
                raise
            continue  # the network refuses such weights; this says nothing about its layers
        if changed := [name for name in names if not dense.get_parameter(name).equal(before[name])]:
            return f"it changes its {changed[0]!r} itself"
    return _compare(dense, sparse, loss, compute, mask)


def _compare(
    dense: nn.Module,
    sparse: nn.Module,
    loss: Tensor,
    compute: Callable[[nn.Module], Tensor],
    mask: Mapping[str, Tensor],
) -> str | None:
    """Return how a step of a sparse model differs from that of a dense one, which is done already; None if not.

    A gradient that rounding alone changes as much, as in deep networks with batch norm, does not differ.
    """
    try:
        with record(Packing(Memory()) if can_pack(dense) else None):
            other = _step(sparse, compute)
    except Exception as error:
        return f"it fails with {type(error).__name__}"
    if not torch.isclose(loss, other, rtol=_LOSS, atol=_LOSS, equal_nan=True):
        return "its loss is another one"
    ours, theirs = _gradients(dense, mask), _gradients(sparse, mask)
    largest = max((float(each.norm()) for each in ours.values() if each is not None), default=0.0)
    rounded: list[dict[str, Tensor | None]] = []
    for name, gradient in ours.items():
        found = theirs.get(name)
        if (gradient is None) != (found is None):
            return f"the gradient of {name!r} is another one"
        if gradient is None or found is None:
            continue
        if found.shape != gradient.shape:
            return f"the gradient of {name!r} is another one"
        difference = float((gradient - found).norm())
        if difference > _GRADIENT * max(float(gradient.norm()), _GRADIENT * largest):
            rounded = rounded or [_gradients(_round(dense, seed, compute), mask) for seed in range(_ROUNDED)]
            others = [each[name] for each in rounded]
            reached = max(float((gradient - other).norm()) for other in others if other is not None)
            if difference > _MARGIN * reached:
                return f"the gradient of {name!r} is another one"
    return None


def _round(model: nn.Module, seed: int, compute: Callable[[nn.Module], Tensor]) -> nn.Module:
    """Return a copy of a model whose weights are changed about as much as rounding does, after a step."""
    model = copy.deepcopy(model)
    draw = generator(seed, "rounding")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = None
            parameter.mul_(1 + _ROUNDING * torch.randn(parameter.shape, generator=draw))
    _step(model, compute)
    return model


def _step(model: nn.Module, compute: Callable[[nn.Module], Tensor], *, backward: bool = True) -> Tensor:
    """Compute the loss and the gradients of a model without dropout, whose draws depend on the layout of its inputs."""
    with ambient(0), _NoDropout():
        loss = compute(model)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _gradients(model: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradients of a model, of masked weights those that are alive, by the names of a dense model."""
    sparse = {path for path, module in model.named_modules() if isinstance(module, Sparse)}
    found = {}
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        own = f"{path}.weight" if path in sparse and attribute == "values" else name
        gradient = parameter.grad
        gradient = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
        if gradient is not None and own in mask and gradient.shape == mask[own].shape:
            gradient = gradient[mask[own]]
        found[own] = gradient
    return found


class _NoDropout(TorchFunctionMode):
    """A context in which dropout does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args, kwargs = (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:]), kwargs | {"dropout_p": 0.0}
            if len(args) > 4:
                del kwargs["dropout_p"]
        return func(*args, **kwargs)

"""Inputs and targets of a network: a tensor, a tuple of tensors, or a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""A tensor, or several by position or by name. The first dimension of each counts the examples."""

Forward: TypeAlias = Callable[[Any, Tensors], Tensor]
"""A function (model, inputs of a batch) -> outputs, such as `call`."""

OwnStep: TypeAlias = Callable[[Any, Tensors, Tensors], Tensor]
"""A function (model, inputs of a batch, targets of a batch) -> scalar, the mean loss over the batch."""


def list_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors by the name that messages call them: nothing for a single one, else a position or a key.

    >>> import torch
    >>> list(list_tensors((torch.zeros(1), torch.zeros(1)))), list(list_tensors({"ids": torch.zeros(1)}))
    (['[0]', '[1]'], ["['ids']"])
    """
    if isinstance(tensors, Tensor):
        return {"": tensors}
    items = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
    return {f"[{key!r}]": tensor for key, tensor in items}


def convert(function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    """Return the function's value for each tensor, in the same structure.

    >>> import torch
    >>> convert(torch.neg, {"a": torch.ones(2)})
    {'a': tensor([-1., -1.])}
    """
    if isinstance(tensors, Tensor):
        return function(tensors)
    if isinstance(tensors, dict):
        return {key: function(tensor) for key, tensor in tensors.items()}
    return tuple(function(tensor) for tensor in tensors)


def select(tensors: Tensors, chosen: Tensor | slice) -> Tensors:
    """Return some examples: those of the indices `chosen`, as copies, or those of a slice, as views.

    >>> import torch
    >>> select((torch.arange(3), torch.arange(3) > 1), torch.tensor([2, 0]))
    (tensor([2, 0]), tensor([ True, False]))
    """
    if isinstance(chosen, slice):
        return convert(lambda tensor: tensor[chosen], tensors)
    return convert(lambda tensor: tensor.index_select(0, chosen), tensors)


def count_examples(tensors: Tensors) -> int:
    """Return the number of examples.

    >>> import torch
    >>> count_examples({"ids": torch.zeros(3, 5), "mask": torch.zeros(3, 5)})
    3
    """
    return len(next(iter(list_tensors(tensors).values())))


def concatenate(parts: Sequence[Tensors]) -> Tensors:
    """Return the examples of several parts, all of one structure, one after the other.

    >>> import torch
    >>> concatenate([(torch.zeros(1), torch.ones(1)), (torch.ones(2), torch.zeros(2))])
    (tensor([0., 1., 1.]), tensor([1., 0., 0.]))
    """
    named = [list_tensors(part) for part in parts]
    joined = [torch.cat([each[key] for each in named]) for key in named[0]]
    first = parts[0]
    if isinstance(first, dict):
        return dict(zip(first, joined, strict=True))
    return tuple(joined) if isinstance(first, tuple) else joined[0]


def describe(tensors: Tensors) -> str:
    """Return the shapes in words, for messages.

    >>> import torch
    >>> describe(torch.zeros(2, 3)), describe({"ids": torch.zeros(2, 5)})
    ('shape (2, 3)', "shapes ['ids'] (2, 5)")
    """
    if isinstance(tensors, Tensor):
        return f"shape {tuple(tensors.shape)}"
    return f"shapes {', '.join(f'{name} {tuple(each.shape)}' for name, each in list_tensors(tensors).items())}"


def call(model: Callable[..., Any], inputs: Tensors) -> Any:
    """Return the outputs of a model: `model(x)` for a tensor, `model(*x)` for a tuple, `model(**x)` for a dictionary.

    >>> import torch
    >>> call(torch.add, (torch.ones(1), torch.ones(1)))
    tensor([2.])
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

"""Interchange: masks from and for other libraries.

Nothing is read by pickle here: files of other libraries are read by their own functions, or by
`torch.load(path, weights_only=True)`, and what these return is converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tombola.errors import UserError, expect
from tombola.pruning.eligible import describe_computed, prunable
from tombola.pruning.fit import find_weights
from tombola.pruning.mask import NOTHING_TO_PRUNE, Mask

_ORIGINAL, _MASK = "_orig", "_mask"
"""What `torch.nn.utils.prune` adds to the name of a pruned parameter, and to that of its mask."""


def from_torch_prune(model: nn.Module) -> Mask:
    """Return the mask of a model that `torch.nn.utils.prune` has pruned; layers without a mask are alive.

    The names are those that the parameters had before. `torch.nn.utils.prune.remove(layer, "weight")` gives a layer
    its plain weight back, with pruned weights 0.0.

    Raises:
        UserError: if no weight that is prunable is there, or if a mask has other values than 0 and 1.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> _ = torch_prune.l1_unstructured(model[0], "weight", amount=3)
    >>> from_torch_prune(model).counts
    {'0.weight': 5, '1.weight': 2}
    """
    expect(model, nn.Module, "model", "a torch.nn.Module")
    pruned = {name.removesuffix(_MASK): mask for name, mask in _list_masks(model)}
    alive = {}
    own = prunable(model)
    for name, parameter in model.named_parameters():
        plain = name.removesuffix(_ORIGINAL)
        if plain in pruned and plain != name:
            alive[plain] = _as_bool(plain, pruned[plain])
        elif name in own:
            alive[name] = torch.ones(parameter.shape, dtype=torch.bool)
    if not alive:
        raise UserError(f"{type(model).__name__} has {NOTHING_TO_PRUNE}")
    return Mask.from_tensors(alive)


def to_torch_prune(model: nn.Module, mask: Mask) -> None:
    """Give a model's layers the masks of `torch.nn.utils.prune`, which multiplies weights by them in each forward pass.

    Raises:
        UserError: if the mask does not fit the model, or if a layer has such a mask already.

    >>> model = nn.Linear(2, 1)
    >>> to_torch_prune(model, Mask.from_tensors({"weight": torch.tensor([[True, False]])}))
    >>> model.weight_mask, from_torch_prune(model).counts
    (tensor([[1., 0.]]), {'weight': 1})
    """
    expect(model, nn.Module, "model", "a torch.nn.Module")
    if _list_masks(model):
        raise UserError("the model has masks of torch.nn.utils.prune already; remove them first")
    weights = {id(weight): name for name, weight in find_weights(model, mask).items()}
    for module in list(model.modules()):
        for field, parameter in list(module.named_parameters(recurse=False)):
            if (name := weights.get(id(parameter))) is not None:
                add: Any = torch_prune.custom_from_mask
                add(module, field, mask[name].to(parameter.device))


def from_open_lth(masks: Mapping[str, Any]) -> Mask:
    """Return the mask of tensors or arrays of 0 and 1 by parameter name, such as open_lth's `Mask`.

    The file `mask.pth` of open_lth is read by `torch.load("mask.pth", weights_only=True)`.

    Raises:
        UserError: if a value is neither 0 nor 1.

    >>> from_open_lth({"fc.weight": torch.tensor([[1, 0]], dtype=torch.int32)})["fc.weight"]
    tensor([[ True, False]])
    """
    expect(masks, Mapping, "masks", "tensors by the names of layers")
    alive = {}
    for name, value in masks.items():
        alive[name] = _as_bool(name, value)
    if not alive:
        raise UserError("expected the masks of one layer or more, got none")
    return Mask.from_tensors(alive)


def to_open_lth(mask: Mask) -> dict[str, Tensor]:
    """Return int tensors of 0 and 1 by parameter name, as open_lth stores its masks.

    `torch.save(to_open_lth(mask), "mask.pth")` writes the file that open_lth reads.

    >>> to_open_lth(Mask.from_tensors({"w": torch.tensor([True, False])}))
    {'w': tensor([1, 0], dtype=torch.int32)}
    """
    expect(mask, Mask, "mask", "a tombola.Mask")
    return {name: alive.int() for name, alive in mask.items()}


def from_zeros(model: nn.Module, prune: Sequence[str] = ()) -> Mask:
    """Return the mask in which the weights of a model that are 0.0 are pruned, whatever pruned them.

    This is the way from SparseML and from torchao's sparsifiers, both of which are discontinued: their models are dense
    and have zeros.

    Args:
        model: a module.
        prune: patterns of the parameters that are prunable, see `tombola.prunable`.

    Raises:
        UserError: if the model has no weight that is prunable, or, unless `prune` says what is, if a weight of it is
            computed from other parameters, as while a sparsifier of torchao trains it.

    >>> model = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     model.weight[0, 1] = 0
    >>> from_zeros(model)["weight"]
    tensor([[ True, False]])
    """
    dense = Mask.ones_like(model, prune=prune)
    if not prune and (computed := describe_computed(model)):
        raise UserError(f"{type(model).__name__} would be read in part{computed}, or name what is to be read by prune")
    return Mask.from_tensors({name: weight.detach() != 0 for name, weight in find_weights(model, dense).items()})


def _list_masks(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the masks that `torch.nn.utils.prune` has added to weights, by name; those of biases are not counted."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [
        (name, mask)
        for name, mask in model.named_buffers(remove_duplicate=False)
        if name.endswith(_MASK)
        and f"{name.removesuffix(_MASK)}{_ORIGINAL}" in parameters
        and "weight" in name.rpartition(".")[2]
    ]


def _as_bool(name: str, value: Any) -> Tensor:
    """Return a tensor or an array of 0 and 1 as a bool tensor on the CPU.

    Raises:
        UserError: if it is something else.
    """
    try:
        tensor = torch.as_tensor(value).to_dense().cpu()
        if not ((tensor != 0) & (tensor != 1)).any():
            return tensor != 0
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: also a tensor without data
        raise UserError(f"mask of layer {name!r}: expected a tensor of 0 and 1, got {type(value).__name__}") from error
    raise UserError(f"mask of layer {name!r}: expected 0 and 1 only")

"""Replacement of a model's layers by sparse layers, and recovery of the dense state."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from tombola.kernels import layers
from tombola.kernels.choice import choices
from tombola.kernels.layers import BatchNorm2d, MaxPool2d, SparseConv2d
from tombola.kernels.linear import SparseLinear


def sparsify(model: nn.Module, mask: Mapping[str, Tensor], batch_size: int = 128) -> nn.Module:
    """Replace, in place, the layers for which `choices` returns "sparse", and return the model.

    Args:
        model: the model with its initial weights; pass a copy to keep the original.
        mask: parameter name -> bool tensor of the weight's shape, True if alive.
        batch_size: the number of examples in a training step.

    """
    chosen = choices(model, mask, batch_size)
    return replace_layers(model, mask, [name for name, choice in chosen.items() if choice == "sparse"])


def replace_layers(model: nn.Module, mask: Mapping[str, Tensor], names: Collection[str]) -> nn.Module:
    """Replace, in place, the layers with these weights, see `list_eligible`, and return the model."""
    for name in names:
        path = name.removesuffix(".weight")
        dense = model.get_submodule(path)
        layer: nn.Module
        if isinstance(dense, nn.Linear):
            layer = SparseLinear(dense.weight, dense.bias, mask[name])
        else:
            assert isinstance(dense, nn.Conv2d)
            assert not isinstance(dense.padding, str)
            rows, columns = dense.padding
            layer = SparseConv2d(dense.weight, dense.bias, mask[name], dense.stride[0], (rows, columns))
        layer.train(dense.training)
        layer.get_parameter("values").requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            layer.get_parameter("bias").requires_grad_(dense.bias.requires_grad)
        model.set_submodule(path, layer)
    if any(isinstance(module, SparseConv2d) for module in model.modules()):
        in_our_layout: dict[type[nn.Module], type[BatchNorm2d | MaxPool2d]]
        in_our_layout = {nn.BatchNorm2d: BatchNorm2d, nn.MaxPool2d: MaxPool2d}
        for path, module in list(model.named_modules()):
            ours = in_our_layout.get(type(module))
            if ours is not None and path and "forward" not in vars(module):
                model.set_submodule(path, ours.of(module))
    return model


def dense_names(model: nn.Module) -> dict[str, str]:
    """Return the name before `sparsify` of each parameter, by its name now.

    >>> dense_names(nn.Linear(2, 1))
    {'weight': 'weight', 'bias': 'bias'}
    """
    sparse = {
        f"{path}.values": f"{path}.weight" for path, each in model.named_modules() if isinstance(each, layers.Sparse)
    }
    return {name: sparse.get(name, name) for name, _ in model.named_parameters()}


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model as before `sparsify`: dense weights, exactly 0.0 for pruned connections."""
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, layers.Sparse)}
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        if path in sparse and attribute == "values":
            state[f"{path}.weight"] = sparse[path].weight.detach()
        else:
            state[name] = tensor
    return state

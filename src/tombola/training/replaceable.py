"""Replaceable layers: whether a network may be trained with sparse layers in the place of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from tombola import kernels
from tombola.datasets.dataset import Dataset
from tombola.errors import UserError, as_texts
from tombola.exits import attribute_failure
from tombola.inputs import Forward, call, convert
from tombola.pruning.mask import Mask
from tombola.training.batches import batches
from tombola.training.convolutions import sound_convolutions
from tombola.training.evaluation import Loss
from tombola.training.recipe import Recipe

Kernels: TypeAlias = Literal["auto", "off"] | Collection[str]
"""Which layers sparse ones may replace: those that are faster, none, or those of weights that were chosen before."""

_EXAMPLES = 32
"""The number of examples on which a step with sparse layers is compared with one of PyTorch."""


class OwnLayersWarning(UserWarning):
    """A network reaches into its own layers, so no layer is replaced, and sparse networks train at dense speed."""


def find_fault(
    model: nn.Module, data: Dataset, recipe: Recipe, loss: Loss, device: str = "cpu", *, forward: Forward = call
) -> str | None:
    """Return a sentence on why no layer of a network may be replaced by a sparse one; None if all may be.

    One step with sparse layers is compared with one of PyTorch, see `tombola.kernels.find_difference`. Networks and
    losses without code of a user are not tried out. The answer depends on the arguments alone.

    Args:
        model: the network with initial weights.
        data, recipe, loss: the data set, the hyperparameters and the loss of the training.
        device: the device to train on; layers are replaced on the CPU only.
        forward: a function (model, inputs) -> outputs.
    """
    if device != "cpu" or recipe.precision != "float32" or not kernels.is_own(model, loss, forward):
        return None
    few = recipe.model_copy(update={"batch_size": min(_EXAMPLES, recipe.batch_size)})
    inputs, labels = next(batches(data, few, 0, 0, 1))

    def compute(network: nn.Module) -> Tensor:
        outputs = forward(network, convert(torch.clone, inputs))
        return loss(outputs, convert(torch.clone, labels))  # copies, because both may be changed in place

    failing = f"{type(model).__name__} or its loss, in a step that is tried out,"
    with attribute_failure(failing), sound_convolutions(model, device):
        difference = kernels.find_difference(model, compute)
    if difference is None:
        return None
    return (
        f"{type(model).__name__} is trained with its own layers, at dense speed, because it does not compute the same "
        f"with sparse ones in their place: {difference}"
    )


def read_kernels(kernels: Kernels) -> Kernels:
    """Return "auto", "off" or a list of names; raise `UserError` for anything else."""
    if not isinstance(kernels, str):
        return as_texts(kernels, "kernels", "names of weights")
    if kernels not in ("auto", "off"):
        raise UserError(f"kernels: expected 'auto' or 'off', got {kernels!r}")
    return kernels


def may_be_sparse(recipe: Recipe, device: str, allowed: Kernels) -> bool:
    """Return whether any layer of a training may be sparse; if not, its network need not be traced.

    Args:
        recipe, device, allowed: as for `choose_layers`.
    """
    own = ":" in recipe.optimizer
    return device == "cpu" and recipe.precision == "float32" and bool(allowed) and allowed != "off" and not own


def choose_layers(
    model: nn.Module, mask: Mask, recipe: Recipe, device: str, allowed: Kernels, *, packed: bool
) -> list[str]:
    """Return the names of the weights whose layers a training replaces by sparse ones.

    Args:
        model: the network.
        mask: the connections that are alive.
        recipe: the hyperparameters of the training.
        device: the device to train on.
        allowed: "auto" for the layers that are faster, see `tombola.kernels.choose`; "off" for none; or the names of
            weights among which to choose. An optimizer of the user gets the network's own parameters: it allows none.
        packed: whether activations may stay packed between sparse convolutions, see `tombola.kernels.are_packed`.
    """
    if not may_be_sparse(recipe, device, allowed):
        return []
    found = kernels.sparse_layers(
        model, mask, batch_size=recipe.batch_size, precision=recipe.precision, device=device, packed=packed
    )
    return found if allowed == "auto" else [name for name in found if name in allowed]

"""Start: check, before anything is trained, that a network is dense, as level 0 has to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tombola.errors import UserError
from tombola.pruning.eligible import list_computed
from tombola.pruning.mask import Mask

FEW_ZEROS, SMALL_SHARE = 16, 0.01
"""A weight tensor with more zeros than these, as a number and as a share, starts with a mask, see `check_start`."""


def check_start(model: nn.Module, dense: Mask, prune: Sequence[str], what: str) -> None:
    """Check that the weights that may be pruned are parameters of a type that is trained, and are dense at the start.

    A tensor starts with a mask if more than 16 of its weights and more than 1 % of them are exactly 0.0. Three cases
    are initialisations instead: all weights are 0; the others are all equal, as in a unit matrix; and the row of an
    embedding that stands for padding.

    Args:
        model: the network with its initial weights.
        dense: the mask of the dense network.
        prune: the patterns that chose what is prunable, see `tombola.prunable`. With patterns, weights that are
            computed from other parameters are refused only if these are among what is prunable.
        what: what the network is called in messages.

    Raises:
        UserError: if a weight is not on the CPU, not float32 or float64, computed from other parameters (weight_norm,
            `torch.nn.utils.parametrize`), or has a mask or zeros already.

    >>> model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 1))
    >>> check_start(model, Mask.ones_like(model), (), "model")
    >>> with torch.no_grad():
    ...     _ = model[0].weight[:, 3:].zero_()
    >>> check_start(model, Mask.ones_like(model), (), "model")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: model: 170 of the 200 initial weights of '0.weight' are exactly 0, as in a network ...
    """
    for name, parameter in model.named_parameters():
        if fault := _find_fault(parameter, prunable=name in dense):
            raise UserError(f"{what}: its {name!r} {fault}")
    for name, sources, masked in _list_computed(model):
        if masked:
            raise UserError(
                f"{what}: its {name!r} has a mask of torch.nn.utils.prune, which level 0 would not keep; make the mask "
                "permanent with torch.nn.utils.prune.remove and give the network dense weights, or prune on in a loop "
                "of your own, from the mask that tombola.interchange.from_torch_prune reads"
            )
        if not prune or any(source in dense for source in sources):
            raise UserError(
                f"{what}: its {name!r} is computed from other parameters, as by weight_norm or "
                "torch.nn.utils.parametrize, so that its connections cannot be pruned; remove the parametrisation, or "
                'leave the layer out: prune = ["default"] means the weights of all other layers'
            )
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name in dense and (zeros := _count_zeros(weight, padding.get(id(parameter)))):
            raise UserError(
                f"{what}: {zeros} of the {weight.numel()} initial weights of {name!r} are exactly 0, as in a network "
                "that is pruned already, and level 0 would train them too; start from dense weights, leave it out "
                f"(exclude = [{name!r}]), or prune on in a loop of your own, from the mask that "
                "tombola.interchange.from_zeros reads"
            )


def _find_fault(parameter: nn.Parameter, *, prunable: bool) -> str | None:
    """Return what prevents a parameter from being trained; None if nothing does."""
    kind = str(parameter.dtype).removeprefix("torch.")
    if torch.nn.parameter.is_lazy(parameter):
        return "is lazy and has no shape yet: run the model once on an input first"
    if parameter.is_meta:
        return "is on the device 'meta', where it has no values; build the model on the CPU"
    if parameter.device.type != "cpu":
        return f"is on the device '{parameter.device}'; give the model on the CPU, and name the device to train on"
    if parameter.is_complex() or parameter.dtype in (torch.float16, torch.bfloat16):
        return f"is {kind}; expected float32, as model.float() gives"
    if prunable and not parameter.is_floating_point():
        return f"is {kind}, and only floating-point weights can be pruned; leave it out"
    return None


def _list_computed(model: nn.Module) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each weight that is no parameter: its name, the parameters that give it, and whether it is masked."""
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        own = [name for name, _ in module.named_parameters()]
        for name in list_computed(module):
            ends = (f"{name}_orig", f"{name}_g", f"{name}_v")
            sources = [start + one for one in own if one in ends or one.startswith(f"parametrizations.{name}.")]
            yield start + name, sources, f"{name}_mask" in dict(module.named_buffers(recurse=False))


def _count_zeros(weight: Tensor, padding: int | None) -> int:
    """Return how many weights of a tensor are 0.0 if it starts with a mask, see `check_start`; otherwise 0."""
    if padding is not None:
        weight = torch.cat([weight[:padding], weight[padding + 1 :]])
    zeros = weight.numel() - int(weight.count_nonzero())
    if zeros <= max(FEW_ZEROS, SMALL_SHARE * weight.numel()) or zeros == weight.numel():
        return 0
    others = weight[weight != 0]
    return zeros if (others != others[0]).any() else 0

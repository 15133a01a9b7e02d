"""Start: check, before anything is trained, that a network is dense, as level 0 has to be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tombola.errors import UserError, short
from tombola.pruning.eligible import list_computed
from tombola.pruning.mask import Mask

FEW_ZEROS, SMALL_SHARE = 16, 0.01
"""A weight tensor with more zeros than these, as a number and as a share, starts with a mask, see `check_start`."""


def check_registered(model: nn.Module, what: str) -> None:
    """Raise `UserError` if torch does not find a layer.

    It may be in a list or a dictionary of Python, or under a name with a dot. Layers without weights that are trained
    may be anywhere.

    >>> model = nn.Linear(2, 2)
    >>> model.activations = [nn.ReLU()]
    >>> check_registered(model, "model")
    >>> model.others = [nn.Linear(2, 2)]
    >>> check_registered(model, "model")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: model: its 'others' is a list of layers, whose weights torch neither trains nor ...
    """
    registered = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        if not _is_found(model, path, module):
            raise UserError(
                f"{what}: torch does not find its layer {short(path)} by this name; add layers as attributes or by "
                "add_module, with names that are not empty and have no dot"
            )
        for name, value in vars(module).items():
            several = list(value.values()) if isinstance(value, dict) else value
            if name.startswith("_") or not isinstance(several, list | tuple):
                continue
            if any(id(each) not in registered and _has_weights(each) for each in several):
                raise UserError(
                    f"{what}: its {f'{path}.{name}'.removeprefix('.')!r} is a {type(value).__name__} of layers, whose "
                    f"weights torch neither trains nor stores; put them into a torch.nn.ModuleList or ModuleDict"
                )


def _has_weights(value: object) -> bool:
    return isinstance(value, nn.Module) and any(parameter.requires_grad for parameter in value.parameters())


def _is_found(model: nn.Module, path: str, module: nn.Module) -> bool:
    try:
        return model.get_submodule(path) is module
    except AttributeError:
        return False


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
            `torch.nn.utils.parametrize`), in memory that another parameter or a buffer uses too, or has a mask or zeros
            already.

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
    for one, other in _list_overlaps(model):
        raise UserError(
            f"{what}: its {one!r} and {other!r} share memory and are not one parameter: a training copies each, and "
            "they become different; give both layers one parameter (b.weight = a.weight), or take its part in forward"
        )
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


def check_step(
    model: nn.Module, dense: Mask, start: Mapping[str, Tensor], outputs: Callable[[], Tensor], what: str
) -> None:
    """Check, after a forward and a backward pass, that the network does not mask weights itself.

    It does if a pass sets weights of both signs to 0.0 (a limit at 0 sets those of one sign), or if a module holds a
    tensor of 0 and 1 of the shape of a weight, and the weights do nothing where the tensor is 0: their gradient is 0.0,
    and the outputs stay the same bits when these weights become larger and smaller than all others. A mask that no
    module holds, such as that of a closure, goes unnoticed.

    Args:
        model: the network in evaluation mode, with gradients; before the pass, it has started dense, see `check_start`.
        dense: the mask of the dense network.
        start: the weights before the pass, by parameter name.
        outputs: a function that returns the outputs of the network on some examples, with those of the pass.
        what: what the network is called in messages.

    Raises:
        UserError: if a weight is masked.

    >>> model = nn.Linear(20, 10)
    >>> model.register_buffer("kept", torch.rand(10, 20) < 0.5)
    >>> outputs = lambda: nn.functional.linear(torch.ones(1, 20), model.weight * model.kept)
    >>> outputs().sum().backward()
    >>> check_step(model, Mask.ones_like(model), model.state_dict(), outputs, "model")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: model: it multiplies its 'weight' by its 'kept', so that ... of its 200 weights do ...
    """
    held = list(_list_of_zero_and_one(model))
    for name, weight in model.named_parameters():
        if name in dense and (fault := _find_mask(name, weight, start[name], held, outputs)):
            raise UserError(
                f"{what}: {fault}, and density would count them as alive; give it dense weights without a mask, leave "
                f"the layer out (exclude = [{name!r}]), or prune on in a loop of your own, with tombola.loops.hold"
            )


def _find_mask(
    name: str,
    weight: nn.Parameter,
    before: Tensor,
    held: Sequence[tuple[str, Tensor]],
    outputs: Callable[[], Tensor],
) -> str | None:
    """Return how a network masks one of its weights, see `check_step`; None if it does not.

    Args:
        name: the name of the weight.
        weight: the weight after the pass, with its gradient.
        before: the weight before the pass.
        held: the names and values of the tensors of 0 and 1 that modules hold.
        outputs: as in `check_step`.
    """
    lost, zeros = before[(weight == 0) & (before != 0)], _count_zeros(weight.detach(), None)
    if zeros and len(lost) and lost.min() < 0 < lost.max():
        return f"a step sets {zeros} of the {weight.numel()} weights of {name!r} to 0"
    gradient = weight.grad
    if gradient is None or gradient.is_sparse or not gradient.any():
        return None
    for other, mask in held:
        zeros = _count_zeros(mask, None, equal=True) if mask.shape == weight.shape else 0
        if zeros and not gradient[mask == 0].any() and not _depend(outputs, weight, mask == 0):
            of = f"{zeros} of its {weight.numel()}"
            return f"it multiplies its {name!r} by its {other!r}, so that {of} weights do nothing"
    return None


def _list_of_zero_and_one(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of 0 and 1 that modules hold as buffers, as attributes, or in lists and dictionaries."""
    for path, module in model.named_modules():
        held = {**dict(module.named_buffers(recurse=False)), **vars(module)}
        for name, value in held.items():
            parts = value if isinstance(value, list | tuple) else [value]
            parts = list(value.values()) if isinstance(value, dict) and not name.startswith("_") else parts
            for each in parts:
                plain = isinstance(each, Tensor) and not isinstance(each, nn.Parameter) and not each.is_meta
                if plain and each.ndim and each.layout is torch.strided and ((each == 0) | (each == 1)).all():
                    yield f"{path}.{name}".removeprefix("."), each


def _depend(outputs: Callable[[], Tensor], weight: nn.Parameter, chosen: Tensor) -> bool:
    """Return whether outputs depend on some weights of a tensor: on whether they are above or below all others."""
    before, large = weight.detach().clone(), 2 * weight.detach().abs().max() + 1
    with torch.no_grad():
        expected = outputs()
        try:
            for sign in (1, -1):
                weight.copy_(torch.where(chosen, sign * large, before))
                if not torch.allclose(outputs(), expected, rtol=0, atol=0, equal_nan=True):
                    return True
        except UserError:  # the network refuses such weights
            return True
        finally:
            weight.copy_(before)
    return False


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


def _list_overlaps(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of each two tensors of a model, the first a parameter, that share a number in memory."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is torch.strided and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor.detach()))
    parameters = dict(model.named_parameters())
    for several in by_storage.values():
        for (one, first), (other, second) in itertools.combinations(several, 2):
            (begin, end), (start, stop) = _span(first), _span(second)
            if one in parameters and begin < stop and start < end and torch.isin(_places(first), _places(second)).any():
                yield one, other


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return where in its storage a tensor begins and ends, in numbers."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset())
    return begin, begin + int(extent) + 1


def _places(tensor: Tensor) -> Tensor:
    """Return where in its storage each number of a tensor is."""
    begin, end = _span(tensor)
    return torch.arange(begin, end).as_strided(tensor.shape, tensor.stride()).flatten()


def _list_computed(model: nn.Module) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each weight that is no parameter: its name, the parameters that give it, and whether it is masked."""
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        own = [name for name, _ in module.named_parameters()]
        for name in list_computed(module):
            ends = (f"{name}_orig", f"{name}_g", f"{name}_v")
            sources = [start + one for one in own if one in ends or one.startswith(f"parametrizations.{name}.")]
            yield start + name, sources, f"{name}_mask" in dict(module.named_buffers(recurse=False))


def _count_zeros(weight: Tensor, padding: int | None, *, equal: bool = False) -> int:
    """Return how many weights of a tensor are 0.0 if it has a mask, see `check_start`; otherwise 0.

    Args:
        weight: the tensor.
        padding: the row that stands for padding, if it has one.
        equal: whether the other weights may be all equal, as they are in a mask.
    """
    if padding is not None:
        weight = torch.cat([weight[:padding], weight[padding + 1 :]])
    zeros = weight.numel() - int(weight.count_nonzero())
    if zeros <= max(FEW_ZEROS, SMALL_SHARE * weight.numel()) or zeros == weight.numel():
        return 0
    others = weight[weight != 0]
    return zeros if equal or (others != others[0]).any() else 0

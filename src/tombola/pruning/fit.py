"""Fit: find the entries of a mask or a state in a model, whatever wraps the model, and say what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from tombola.errors import UserError
from tombola.pruning.mask import Mask

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DataParallel, DistributedDataParallel, torch.compile, FSDP and checkpoint wrappers add to names."""

_MOST_NAMED = 3
"""The number of differences that a message describes."""

Shapes = Mapping[str, tuple[int, ...] | None]
"""The shapes of entries by name; None fits every shape."""


def match_names(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Return the known name of each name that has one: the same, or the only one that differs by wrappers alone.

    >>> match_names(["fc.weight", "head.bias"], ["module._orig_mod.fc.weight", "module._orig_mod.fc.bias"])
    {'fc.weight': 'module._orig_mod.fc.weight'}
    >>> match_names(["fc.weight"], ["module.fc.weight", "fc.weight"])
    {'fc.weight': 'fc.weight'}
    """
    by_bare: dict[str, list[str]] = {}
    for name in known:
        by_bare.setdefault(_without_wrappers(name), []).append(name)
    found = {name: [name] if name in known else by_bare.get(_without_wrappers(name), []) for name in names}
    return {name: candidates[0] for name, candidates in found.items() if len(candidates) == 1}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module within wrappers of the whole model: those of `torch.compile` and of several processes or GPUs.

    >>> layer = nn.Linear(2, 1)
    >>> unwrap(nn.DataParallel(layer)) is layer, unwrap(layer) is layer
    (True, True)
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def find_weights(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """Return the parameter of a model that each layer of a mask is about, by the mask's names.

    Raises:
        UserError: if there is no model or no mask, or if the mask belongs to another network; the message says which
            layers differ and how.

    >>> model = nn.DataParallel(nn.Linear(2, 1))
    >>> find_weights(model, Mask.ones_like(nn.Linear(2, 1)))["weight"] is model.module.weight
    True
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"expected a model, which is a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(mask, Mask):
        raise UserError(f"expected a tombola.Mask, got {type(mask).__name__}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = match_names(mask, parameters)
    there = {name: shape_of(parameters[known]) for name, known in names.items()}
    if differences := list(_list_missing(mask.shapes, there, "layer ")):
        raise UserError(f"the mask does not fit the model: {_shorten(differences)}")
    return {name: parameters[names[name]] for name in mask}


def fit_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return a state under the names that the model has for its entries.

    Args:
        model: a module.
        state: its complete state, or that of the same module under another wrapper.
        what: what the state is called in a message, such as `the ticket`.

    Raises:
        UserError: if there is no model or no state, if the model has no memory for its weights or its weights cannot
            be written to, or if the state belongs to another network; the message says which entries differ and how.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"expected a model, which is a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{what} does not fit the model: expected tensors by name, got {type(state).__name__}")
    own = model.state_dict()
    if away := [name for name, entry in own.items() if isinstance(entry, Tensor) and entry.is_meta]:
        raise UserError(
            f"the model's {away[0]!r} is on the device 'meta', which has no memory; give the model memory first, with "
            "model.to_empty(device='cpu')"
        )
    if fixed := [name for name, entry in own.items() if not _is_writable(entry)]:
        raise UserError(
            f"the model's {fixed[0]!r} cannot be written to: it was made in torch.inference_mode, or has several "
            "elements in one place of memory, as after expand; give the model a copy of it (clone)"
        )
    names = match_names(state, own)
    there = {name: shape_of(own[known]) for name, known in names.items()}
    differences = list(_list_missing({name: shape_of(entry) for name, entry in state.items()}, there, ""))
    differences += [f"it lacks {name!r}, which the model has" for name in own if name not in names.values()]
    differences += [
        f"{name!r} has complex numbers, the model has real ones"
        for name, known in names.items()
        if isinstance(state[name], Tensor) and state[name].is_complex() and not own[known].is_complex()
    ]
    if differences:
        raise UserError(f"{what} does not fit the model: {_shorten(differences)}")
    return {names[name]: entry for name, entry in state.items()}


def shape_of(entry: object) -> tuple[int, ...] | None:
    """Return the shape of an entry of a state; None if it has none: it is no tensor, or a lazy parameter."""
    if not isinstance(entry, Tensor) or torch.nn.parameter.is_lazy(entry):
        return None
    return tuple(entry.shape)


def _is_writable(entry: object) -> bool:
    """Return whether an entry of a model's state, if it is an ordinary tensor, can be replaced in its place."""
    if not isinstance(entry, Tensor) or torch.nn.parameter.is_lazy(entry) or entry.layout is not torch.strided:
        return True
    in_one_place = any(step == 0 and size > 1 for size, step in zip(entry.shape, entry.stride(), strict=True))
    return not in_one_place and (torch.is_inference_mode_enabled() or not entry.is_inference())


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _list_missing(ours: Shapes, theirs: Shapes, kind: str) -> Iterator[str]:
    """Yield a clause on each entry that the model does not have, or has with another shape."""
    for name, shape in ours.items():
        of = "" if shape is None else f" of shape {shape}"
        if name not in theirs:
            yield f"it has {kind}{name!r}{of}, the model has no such weight"
        elif None not in (shape, theirs[name]) and shape != theirs[name]:
            yield f"it has {kind}{name!r}{of}, the model has one of shape {theirs[name]}"


def _shorten(differences: list[str]) -> str:
    more = len(differences) - _MOST_NAMED
    return "; ".join(differences[:_MOST_NAMED]) + (f"; and {more} more differences" if more > 0 else "")

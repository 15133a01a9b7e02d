"""Hold: keep pruned weights at exactly 0.0 while an optimizer of torch trains a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from tombola.errors import UserError, expect, list_first
from tombola.loops.shards import check_equal_masks, is_sharded, own_part, pruned_part
from tombola.pruning.fit import find_weights, match_names
from tombola.pruning.mask import Mask

_HELD: Any = WeakIdKeyDictionary()
"""A weak reference to the hold of each held parameter; the optimizer and whoever has the handle keep the hold."""


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers of so many bytes."""

_DEEPEST = 10  # wrappers of an optimizer, one within the other; one that wraps itself never ends

_KEEP_ZEROS = {torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW}
"""Optimizers whose state stays 0.0 where it is 0.0 and the gradient and the weight are 0.0."""

_Masked: TypeAlias = "list[tuple[nn.Parameter, _Pruned]]"
_Place: TypeAlias = tuple[weakref.ref[nn.Module], str, nn.Parameter]


class Hold:
    """A mask that is held, as `hold` returns it; also a context manager that ends the hold.

    It lasts until `remove` is called, or until both its optimizer and this handle are gone.

    Args:
        mask: the connections that are alive.

    Attributes:
        mask: the connections that are alive.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self._weights: list[nn.Parameter] = []
        self._hooks: list[Any] = []

    def remove(self) -> None:
        """End the hold: later steps may change pruned weights. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            _HELD.pop(weight, None)
        self._hooks.clear()
        self._weights.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold(model: nn.Module, mask: Mask, optimizer: Optimizer, *others: Optimizer) -> Hold:
    """Keep a model's pruned weights at exactly 0.0 through every step of its optimizer, from now on.

    The weights and the optimizer's state of pruned connections are set to 0.0 at once and after every step. Their
    gradients are set to 0.0 as soon as they are computed, so that clipping by norm sees the alive connections alone.
    This holds for every optimizer of `torch.optim` and for others that derive from its `Optimizer`; with gradient
    accumulation, autocast, `GradScaler` and `torch.compile`.

    A copy of the model or of the optimizer (`copy.deepcopy`) has the same zeros and is not held: hold it too if it is
    trained. With `DistributedDataParallel` or FSDP2, every process calls `hold`, and equal masks are checked.

    Args:
        model: the network, possibly wrapped.
        mask: the connections that are alive; layers that it does not have are not changed.
        optimizer: the optimizer that trains the weights.
        others: further optimizers, if several train the weights of the mask.

    Returns:
        A handle: `remove()` ends the hold, and so does the end of a `with` block.

    Raises:
        UserError: if the mask does not fit the model, if no optimizer has a weight of the mask that is trained, if the
            model is held already, or if the processes that train the model have different masks; later, at a step, if
            a weight of the model has been replaced by another parameter.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> mask = Mask.from_tensors({"weight": torch.tensor([[True, False]])})
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with hold(model, mask, optimizer):
    ...     model(torch.ones(4, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight[0, 1].item(), model.weight.grad.tolist()
    (0.0, [[4.0, 0.0]])
    """
    weights = find_weights(model, mask)
    optimizers = [unwrap_optimizer(each) for each in (optimizer, *others)]
    _check_optimizers(optimizers, weights)
    if any(_hold_of(weight) for weight in weights.values()):
        raise UserError(
            "the model is held already: end the earlier hold first, with its remove() or tombola.loops.release(model)"
        )
    check_equal_masks(model, mask)
    held = Hold(mask)
    masked, places = list_masked(model, mask), _list_places(model, weights)
    for each in optimizers:
        own = _list_parameters([each])
        its = [(weight, pruned) for weight, pruned in masked if id(weight) in own]
        held._hooks.append(each.register_step_pre_hook(_before_step(its, places, weakref.ref(model), mask)))
        held._hooks.append(each.register_step_post_hook(_after_step(its, held, state=type(each) not in _KEEP_ZEROS)))
        held._hooks.append(each.register_load_state_dict_post_hook(_after_step(its, held, state=True)))
    for weight, pruned in masked:
        if weight.requires_grad:
            add_hook: Any = weight.register_post_accumulate_grad_hook
            held._hooks.append(add_hook(_ZeroGradient(pruned, held)))
    with torch.no_grad():
        zero_masked(masked, *optimizers)
    for weight in weights.values():
        held._weights.append(weight)
        _HELD[weight] = weakref.ref(held)
    return held


def release(model: nn.Module) -> None:
    """End the hold of a model, if it is held; this is useful if the handle that `hold` returned is lost.

    >>> model = nn.Linear(2, 1)
    >>> _ = hold(model, Mask.ones_like(model), torch.optim.SGD(model.parameters()))
    >>> release(model)
    """
    expect(model, nn.Module, "model", "a torch.nn.Module")
    for weight in model.parameters():
        if held := _hold_of(weight):
            held.remove()


def held_mask(model: nn.Module) -> Mask | None:
    """Return the mask at which a model is held; None if it is not held."""
    return next((held.mask for weight in model.parameters() if (held := _hold_of(weight))), None)


def _hold_of(weight: nn.Parameter) -> Hold | None:
    reference = _HELD.get(weight)
    return None if reference is None else reference()


class _Pruned:
    """The pruned connections of the part of a parameter that this process has.

    The bits of pruned entries are cleared: this is several times as fast as `masked_fill_`, and gives 0.0 also where
    an entry is NaN or infinite.
    """

    def __init__(self, weight: nn.Parameter, alive: Tensor) -> None:
        self._pruned, self._sharded = pruned_part(weight, alive), is_sharded(weight)
        self._bits: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def zero(self, tensor: Tensor) -> None:
        """Set the pruned entries of a tensor of the weight's shape to 0.0."""
        part = own_part(tensor) if self._sharded else tensor
        kept = self._bits.get((part.dtype, part.device))
        if kept is None:
            kept = torch.empty_like(part, dtype=_INTEGERS[part.element_size()])
            kept.copy_(self._pruned).sub_(1)  # 0 where pruned, otherwise -1, whose bits are all set
            self._bits[part.dtype, part.device] = kept
        part.view(kept.dtype).bitwise_and_(kept)


class _ZeroGradient:
    """A hook on a parameter; it keeps neither the parameter nor the hold, so that all of them can be collected."""

    def __init__(self, pruned: _Pruned, held: Hold) -> None:
        self._pruned, self._held = pruned, weakref.ref(held)

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        if weight.grad is not None and self._held() is not None:
            self._pruned.zero(weight.grad)


def _before_step(
    masked: _Masked, places: list[_Place], model: weakref.ref[nn.Module], mask: Mask
) -> Callable[..., None]:
    @torch.no_grad()
    def hook(*_: object) -> None:
        if not all(_is_there(*place) for place in places):
            _check_not_replaced(model(), mask)
        for weight, pruned in masked:  # gradients that are not computed by autograd, as in FSDP2
            if weight.grad is not None:
                pruned.zero(weight.grad)

    return hook


def _list_places(model: nn.Module, weights: dict[str, nn.Parameter]) -> list[_Place]:
    """Return where the held parameters are in a model, whose modules may be collected."""
    held = {id(weight) for weight in weights.values()}
    return [
        (weakref.ref(module), name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if id(weight) in held and weight is not None
    ]


def _is_there(module: weakref.ref[nn.Module], name: str, weight: nn.Parameter) -> bool:
    owner = module()
    return owner is not None and owner._parameters.get(name) is weight


def _check_not_replaced(model: nn.Module | None, mask: Mask) -> None:
    """Raise `UserError` if a held parameter of the model has been replaced by another, which is not held."""
    parameters = {} if model is None else dict(model.named_parameters(remove_duplicate=False))
    for name, known in match_names(mask, parameters).items():
        if not is_sharded(parameters[known]) and _hold_of(parameters[known]) is None:
            raise UserError(
                f"the model's weight {name!r} has been replaced by another parameter, whose pruned connections are not "
                "held; make a new optimizer, and hold the model again"
            )


def _after_step(masked: _Masked, held: Hold, *, state: bool) -> Callable[..., None]:
    @torch.no_grad()
    def hook(optimizer: Optimizer, *_: object, _held: Hold = held) -> None:  # the optimizer keeps the hold
        zero_masked(masked, *([optimizer] if state else []))

    return hook


def list_masked(model: nn.Module, mask: Mask) -> _Masked:
    """Return the parameters of a model that have pruned connections in a mask.

    Raises:
        UserError: if the mask does not fit the model.
    """
    weights = find_weights(model, mask).items()
    return [(weight, _Pruned(weight, mask[name])) for name, weight in weights if mask.counts[name] < mask.sizes[name]]


def zero_masked(masked: _Masked, *optimizers: Optimizer) -> None:
    """Set pruned weights to 0.0, and the optimizers' state of them."""
    for weight, pruned in masked:
        pruned.zero(weight)
        for optimizer in optimizers:
            for value in optimizer.state.get(weight, {}).values():
                if _is_per_weight(value, weight):
                    pruned.zero(value)


def _is_per_weight(value: Any, weight: Tensor) -> bool:
    """Return whether an entry of an optimizer's state has one number for each connection; quantised ones have codes."""
    plain = type(value) is Tensor or (isinstance(value, Tensor) and is_sharded(value))
    return plain and value.is_floating_point() and value.shape == weight.shape


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer of torch within the wrapper of another library, such as accelerate or Lightning."""
    inner = optimizer
    for _ in range(_DEEPEST):
        if not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
            inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise UserError(
            f"expected an optimizer of torch.optim, or one that derives from it, got {type(optimizer).__name__}"
        )
    return inner


def _check_optimizers(optimizers: list[Optimizer], weights: dict[str, nn.Parameter]) -> None:
    """Raise `UserError` if no optimizer has one of the weights that are trained."""
    held = _list_parameters(optimizers)
    missing = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in held]
    if missing:
        names = list_first(list(map(repr, missing)))
        raise UserError(
            f"the optimizer does not have the model's weights {names}; make it from the parameters of this model, "
            "after the model was wrapped or moved, or name all optimizers that train it"
        )


def _list_parameters(optimizers: list[Optimizer]) -> set[int]:
    """Return the identities of all parameters that the optimizers have."""
    return {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}

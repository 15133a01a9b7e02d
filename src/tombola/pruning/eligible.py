"""What may be pruned: the weight matrices of a network's layers, or the parameters that patterns choose."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from tombola.errors import UserError, as_texts, did_you_mean, expect, short

DEFAULT = "default"
"""The pattern of `prunable` that stands for the weights that are prunable by default."""

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(model: nn.Module, prune: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights that may be pruned, by parameter name in the order of the model.

    By default, these are the weight matrices of all linear, bilinear, convolution, recurrent and attention layers,
    HuggingFace's `Conv1D` among them. Embeddings, norms, biases and a module's own parameters are chosen by patterns,
    and so are frozen ones (`requires_grad = False`), unless all parameters are frozen.
    A weight that several layers share is named once, by its first name.

    Args:
        model: a module.
        prune: patterns of parameter names, which are read in order: `*.weight` adds what it matches, and `!*.norm*`
            takes away. Layers may be named too, see `resolve_layers`; a shared weight has all its names. `default`
            stands for the weights that are prunable by default, from which patterns also start if the first of them
            takes away. Without patterns, the default is meant.

    Raises:
        UserError: if a pattern matches no parameter, or if the patterns leave none.

    >>> list(prunable(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LSTM(3, 2))))
    ['0.weight', '2.weight_ih_l0', '2.weight_hh_l0']
    >>> list(prunable(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 2)), ["*.weight", "!2"]))
    ['0.weight', '1.weight']
    """
    expect(model, nn.Module, "model", "a torch.nn.Module")
    prune = as_texts(prune, "prune", "patterns")
    parameters = dict(model.named_parameters())
    weights = {id(weight) for module in model.modules() for _, weight in list_matrices(module)}
    frozen = list_frozen(model)
    default = {name for name, each in parameters.items() if id(each) in weights and name not in frozen}
    if not prune:
        return {name: parameter for name, parameter in parameters.items() if name in default}
    names = {other: first for first, others in list_names(model).items() for other in others}
    chosen = set(default) if prune[0].startswith("!") else set[str]()
    for pattern in prune:
        if pattern == DEFAULT:
            chosen |= default
            continue
        found = resolve_layers(names, [pattern.removeprefix("!")], "prune", "parameter of the model")
        matched = {names[name] for name in found}
        chosen = chosen - matched if pattern.startswith("!") else chosen | matched
    if not chosen:
        raise UserError(f"prune: {', '.join(map(repr, prune))} leave no parameter of {type(model).__name__} to prune")
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def list_frozen(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are not trained, as `requires_grad` is False; none if it is for all.

    >>> model = nn.Linear(2, 1)
    >>> model.bias.requires_grad = False
    >>> list_frozen(model), list_frozen(model.requires_grad_(False))
    (['bias'], [])
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return frozen if len(frozen) < len(list(model.parameters())) else []


def list_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the attributes of a layer that are prunable by default, with their parameters; none for other modules."""
    for name in _list_attributes(module):
        value = None if _is_computed(module, name) else getattr(module, name, None)
        if isinstance(value, nn.Parameter):
            yield name, value


def list_computed(module: nn.Module) -> list[str]:
    """Return the prunable attributes of a layer that are no parameters: other parameters and buffers give them.

    `torch.nn.utils.parametrize`, `weight_norm` and `torch.nn.utils.prune` do so.

    >>> list_computed(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))
    ['weight']
    """
    names = _list_attributes(module)
    return [name for name in names if _is_computed(module, name) or isinstance(vars(module).get(name), torch.Tensor)]


def describe_computed(model: nn.Module) -> str:
    """Return a clause on a model's weight that is no parameter, see `list_computed`; empty if there is none."""
    for path, module in model.named_modules():
        for name in list_computed(module):
            return (
                f"; its {f'{path}.{name}'.removeprefix('.')!r} is computed from other parameters, as by weight_norm, "
                "torch.nn.utils.parametrize or torch.nn.utils.prune: remove these first"
            )
    return ""


def list_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of each parameter by its first: a parameter that modules share has several.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> list_names(model)["0.weight"]
    ('0.weight', '1.weight')
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {each[0]: tuple(each) for each in names.values()}


def list_shared(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the other names of each parameter that modules share, by its first name."""
    return {first: others for first, (_, *rest) in list_names(model).items() if (others := tuple(rest))}


def resolve_layers(
    parameters: Collection[str],
    layers: Collection[str],
    field: str,
    kind: str = "prunable layer",
    shared: Mapping[str, Collection[str]] | None = None,
) -> frozenset[str]:
    """Return the parameter names that `layers` refers to.

    Args:
        parameters: the names of prunable weights, such as `fc.weight` or `lstm.weight_ih_l0`.
        layers: names of layers or of their parameters, such as `fc` or `fc.weight`; a parameter that does not end in
            `.weight` has its full name only. `*` stands for any characters, `?` for one, so `*.fc` means every layer
            whose name ends in `.fc`.
        field: what the user calls `layers`, for the message.
        kind: what each of `layers` should be, for the message.
        shared: the other names of parameters that modules share, which `layers` may use too, see `list_shared`.

    Raises:
        UserError: if one of `layers` matches no prunable layer.

    >>> sorted(resolve_layers(["fc1.weight", "fc2.weight", "head.fc.weight"], ["fc?", "head.fc.weight"], "exclude"))
    ['fc1.weight', 'fc2.weight', 'head.fc.weight']
    """
    names = {name: name for name in parameters}
    names |= {other: name for name, others in (shared or {}).items() if name in names for other in others}
    by_layer = {name.removesuffix(".weight"): first for name, first in names.items()}
    known = {**by_layer, **names}
    resolved = set[str]()
    for pattern in as_texts(layers, field, "names of layers"):
        found = [known[pattern]] if pattern in known else [known[name] for name in fnmatch.filter(known, pattern)]
        if not found:
            raise UserError(f"{field}: {short(pattern)} is no {kind}; {did_you_mean(pattern, list(by_layer))}")
        resolved.update(found)
    return frozenset(resolved)


def _list_attributes(module: nn.Module) -> list[str]:
    """Return the names of the attributes of a layer that hold weight matrices."""
    if isinstance(module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd) or _is_conv1d(module):
        return ["weight"]
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight_")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(module, nn.MultiheadAttention):
        return list(_ATTENTION)
    return []


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is HuggingFace's `Conv1D`, a linear layer whose weight is (inputs, outputs)."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def _is_computed(module: nn.Module, name: str) -> bool:
    return torch.nn.utils.parametrize.is_parametrized(module, name)

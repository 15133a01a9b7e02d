"""Rewinding and pruning in a training loop of one's own: the steps 3b to 3d of the paper's Algorithm 2."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tombola.errors import UserError, describe_exception, expect, short
from tombola.importance import Importance, NetworkScore, Normalisation, as_importance
from tombola.loops.hold import held_mask, list_masked, unwrap_optimizer, zero_masked
from tombola.loops.shards import check_equal_masks, gather, is_sharded
from tombola.pruning import prune as pruning
from tombola.pruning.fit import find_weights, fit_state, match_names, unwrap
from tombola.pruning.mask import Mask
from tombola.training.evaluation import Loss
from tombola.training.scoring import score_batches
from tombola.training.weights import copy_model, load_state, zero_pruned


@dataclass(frozen=True)
class Snapshot:
    """A copy of a model's state, as `snapshot` returns it.

    Args:
        state: parameters and buffers by name.
        optimizer: the state of the optimizer; None if the snapshot was made without one.
    """

    state: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None = None


def snapshot(model: nn.Module, optimizer: Optimizer | None = None) -> Snapshot:
    """Copy a model's weights and buffers, and the state of its optimizer if it is given.

    Later steps change neither the copies nor what `rewind` restores from them.

    Args:
        model: the network, possibly wrapped.
        optimizer: its optimizer, if its state (momentum, learning rates) is to be restored too.

    >>> model = nn.Linear(2, 1)
    >>> start = snapshot(model)
    >>> _ = nn.init.zeros_(model.weight)
    >>> bool(start.state["weight"].any())
    True
    """
    expect(model, nn.Module, "model", "a torch.nn.Module")
    state = {
        name: entry.detach().clone() if isinstance(entry, Tensor) else copy.deepcopy(entry)
        for name, entry in model.state_dict().items()
    }
    return Snapshot(state, None if optimizer is None else copy.deepcopy(unwrap_optimizer(optimizer).state_dict()))


def rewind(model: nn.Module, start: Snapshot, mask: Mask, optimizer: Optimizer | None = None) -> None:
    """Restore a model's weights and buffers from a snapshot, with pruned weights 0.0: step 3d of Algorithm 2.

    Args:
        model: the network, possibly wrapped.
        start: what `snapshot` returned for this network, wrapped or not.
        mask: the connections that are alive.
        optimizer: the optimizer to rewind too: its state and learning rates become those of the snapshot, or, if the
            snapshot has none, its state is emptied, as at the start of a training.

    Raises:
        UserError: if the snapshot or the mask is of another network, or if the model is held at another mask.

    >>> model = nn.Linear(2, 1)
    >>> start = snapshot(model)
    >>> rewind(model, start, Mask.from_tensors({"weight": torch.tensor([[False, True]])}))
    >>> model.weight[0, 0].item(), torch.equal(model.weight[0, 1], start.state["weight"][0, 1])
    (0.0, True)
    """
    if not isinstance(start, Snapshot):
        raise UserError(f"rewind: expected what tombola.loops.snapshot returned, got {type(start).__name__}")
    find_weights(model, mask)
    held = held_mask(model)
    if held is not None and held != mask:
        raise UserError("the model is held at another mask: end that hold first, with its remove()")
    fit_state(model, start.state, "the snapshot")  # before the optimizer changes
    if optimizer is not None:
        optimizer = unwrap_optimizer(optimizer)
        if start.optimizer is None:
            optimizer.state.clear()
        else:
            _load_optimizer(optimizer, start.optimizer)
        optimizer.zero_grad()
    load_state(model, start.state, "the snapshot")
    with torch.no_grad():
        zero_masked(list_masked(model, mask), *([] if optimizer is None else [optimizer]))


def prune(
    model: nn.Module,
    mask: Mask,
    importance: Importance | Normalisation,
    fraction: float,
    *,
    exclude: Collection[str] = (),
    keep_dense: Collection[str] = (),
    selection: str = "global",
    shares: Mapping[str, float] | None = None,
    rewound: Snapshot | None = None,
    loss: Loss | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    seed: int = 0,
) -> Mask:
    """Return the mask after one round of pruning by the weights that a model has now; see `tombola.prune`.

    Neither the model nor a hold changes: call `rewind`, then hold the new mask.

    Args:
        model: the network, possibly wrapped. With `DistributedDataParallel` or FSDP2, every process calls `prune`, and
            their masks are checked to be equal.
        mask: the connections that are alive.
        importance: a score with its normalisation, see `tombola.importance`.
        fraction: the fraction of the alive connections to remove, in (0, 1).
        exclude: the layers that this round neither prunes nor counts.
        keep_dense: the layers that are counted but not pruned.
        selection: how many connections each layer loses: `global`, `uniform`, `erk` or `shares`.
        shares: the shares of layers for the selection `shares`, by the mask's names.
        rewound: the rewind point, as `snapshot` returned it; a score such as `movement` needs it.
        loss: a function of outputs and labels that returns the mean over the batch; a score of the whole network, such
            as `taylor`, needs it.
        batches: pairs (inputs, labels) on the model's device, on which a score of the whole network is computed. Batch
            norm uses the statistics of each batch, and dropout is off. Every process takes the same batches.
        seed: the seed of the random numbers that the importance may draw; take another one in each round.

    Raises:
        UserError: if the mask or the rewind point does not fit the model, if a score of the whole network lacks loss or
            batches or the weights are sharded, and as `tombola.prune`.

    >>> from tombola.importance import magnitude
    >>> model = nn.Linear(5, 2)
    >>> prune(model, Mask.ones_like(model), magnitude, 0.3).counts
    {'weight': 7}
    """
    importance = as_importance(importance)
    if not isinstance(batches, Iterable):
        raise UserError(f"batches: expected pairs (inputs, labels), got {short(batches)}")
    found = pruning.prune(
        {name: gather(weight) for name, weight in find_weights(model, mask).items()},
        mask,
        importance,
        fraction,
        exclude=exclude,
        keep_dense=keep_dense,
        selection=selection,
        shares=shares,
        rewound=None if rewound is None else _find_rewound(mask, rewound),
        score_network=_prepare_scoring(model, importance, loss, list(batches), seed),
        seed=seed,
    )
    check_equal_masks(model, found)
    return found


def _find_rewound(mask: Mask, rewound: Snapshot) -> dict[str, Tensor]:
    """Return the weights of a snapshot by the mask's names; `tombola.prune` says which layers are missing."""
    if not isinstance(rewound, Snapshot):
        raise UserError(f"rewound: expected what tombola.loops.snapshot returned, got {type(rewound).__name__}")
    return {name: gather(rewound.state[known]) for name, known in match_names(mask, rewound.state).items()}


def _prepare_scoring(
    model: nn.Module,
    importance: Importance,
    loss: Loss | None,
    batches: Sequence[tuple[Tensor, Tensor]],
    seed: int,
) -> pruning.ScoreNetwork | None:
    """Return a function that computes scores of the whole network on a copy of a model; None if none is needed."""
    if not isinstance(importance.score, NetworkScore):
        return None
    what = f"importance {importance.name!r} scores the whole network"
    if loss is None or not batches:
        raise UserError(f"{what}: give the loss and some batches of examples, loss=... and batches=[(inputs, labels)]")
    if any(map(is_sharded, model.parameters())):
        raise UserError(f"{what}, which needs all weights in one process, and the weights of this model are sharded")

    def score_network(score: NetworkScore, mask: Mask, layers: Collection[str], removed: int) -> Mapping[str, Tensor]:
        network = copy_model(unwrap(model))
        zero_pruned(network, mask)
        names = match_names(mask, dict(network.named_parameters()))
        own = Mask.from_tensors({known: mask[name] for name, known in names.items()})
        prunable = {names[layer] for layer in layers}
        found = score_batches(score, own, prunable, removed, network=network, batches=batches, loss=loss, seed=seed)
        if not isinstance(found, Mapping):
            return found  # `tombola.prune` says what is wrong
        return {name: found[known] for name, known in names.items() if known in found}

    return score_network


def _load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    values = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(values, Mapping) or not all(isinstance(each, Mapping) for each in values.values()):
        raise UserError("the snapshot does not fit the optimizer: it does not have the state of one")
    try:
        optimizer.load_state_dict(copy.deepcopy(dict(state)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the snapshot does not fit the optimizer: {describe_exception(error)}") from error

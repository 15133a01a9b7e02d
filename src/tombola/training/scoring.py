"""Scoring: prepare a network and examples for a score of the whole network, such as `taylor`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset
from tombola.errors import ImportanceError, UserError
from tombola.importance.network_scores import NETWORK_SCORES, Network, NetworkScore
from tombola.inputs import Forward, OwnStep, call, select
from tombola.pruning.mask import Mask
from tombola.streams import ambient, generator
from tombola.training.batches import Batch, normalisation
from tombola.training.convolutions import sound_convolutions
from tombola.training.determinism import deterministic_algorithms, flush_denormals
from tombola.training.evaluation import Loss
from tombola.training.train import load_model, move_data
from tombola.training.weights import State, state_hash

EXAMPLES = 1024
"""The number of training examples that a score sees, unless something else is asked for."""

TRIED = 8
"""The number of examples that a score is tried out on before anything is trained."""


def score_network(
    score: NetworkScore,
    mask: Mask,
    prunable: Collection[str] | None = None,
    removed: int = 0,
    *,
    model: nn.Module,
    state: State,
    data: Dataset,
    loss: Loss,
    seed: int,
    examples: int = EXAMPLES,
    batch_size: int = 128,
    device: str = "cpu",
    forward: Forward = call,
    step: OwnStep | None = None,
) -> Mapping[str, Tensor]:
    """Return the scores of all connections of a network, layer -> a tensor of the weight's shape.

    The examples are drawn from the training set, without augmentation. Batch norm normalises each batch by its own
    mean and variance, as in training; its running statistics stay as they are. Dropout is off.

    Args:
        score: the score, see `tombola.importance.network_scores`.
        mask: the connections that are alive; the weights of the others are set to 0.
        prunable: the layers whose connections may be removed; None for all.
        removed: the number of connections that are removed by the scores; `concrete` needs it.
        model: the network; it is copied, and its own weights are ignored.
        state: the state to score.
        data: the data set from whose training set the examples come.
        loss: a function of outputs and labels that returns the mean over the batch.
        seed: the seed of the choice of examples and of the random numbers that the score draws.
        examples: the number of examples; all examples if there are fewer.
        batch_size: the largest number of examples in a batch; the batches have about equal sizes.
        device: the device to compute on, "cpu" or "cuda".
        forward: a function (model, inputs) -> outputs.
        step: a function (model, inputs, labels) -> loss, instead of `forward` and `loss`; None for these.

    Raises:
        ImportanceError: if the score changes the network, or if the loss is not finite.
        UserError: if there are no examples in a batch.

    >>> from tombola import datasets, models
    >>> from tombola.importance import SCORES
    >>> from torch.nn import functional
    >>> model = models.lenet_300_100(inputs=64)
    >>> mask = Mask.ones_like(model)
    >>> scores = score_network(SCORES["taylor"], mask, model=model, state=model.state_dict(),
    ...     data=datasets.load("digits", None), loss=functional.cross_entropy, seed=0)
    >>> scores["fc.weight"].shape
    torch.Size([10, 100])
    """
    for name, number in (("examples", examples), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"{name}: expected a number from 1, got {number}")
    data = move_data(data, device)
    network = load_model(model, state, mask, device)
    count = min(examples, data.held_examples)
    chosen = torch.randperm(data.held_examples, generator=generator(seed, "scored examples"))[:count].to(device)
    normalise = normalisation(data)
    batches = [
        (normalise(select(data.train_inputs, part)), select(data.train_labels, part))
        for part in chosen.tensor_split(math.ceil(count / batch_size))
    ]
    return score_batches(
        score,
        mask,
        prunable,
        removed,
        network=network,
        batches=batches,
        loss=loss,
        seed=seed,
        forward=forward,
        step=step,
    )


def score_batches(
    score: NetworkScore,
    mask: Mask,
    prunable: Collection[str] | None = None,
    removed: int = 0,
    *,
    network: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    seed: int,
    forward: Forward = call,
    step: OwnStep | None = None,
) -> Mapping[str, Tensor]:
    """Return the scores of all connections of a network on these batches, see `score_network`.

    Args:
        score: the score.
        mask: the connections that are alive, by the parameter names of `network`.
        prunable: the layers whose connections may be removed; None for all.
        removed: the number of connections that are removed by the scores; `concrete` needs it.
        network: the network with the weights to score, those of pruned connections 0; its mode and gradients change.
        batches: pairs (inputs, labels), on the device of the network.
        loss: a function of outputs and labels that returns the mean over the batch.
        seed: the seed of the random numbers that the score draws.
        forward, step: as of `score_network`.

    Raises:
        ImportanceError: if the score changes the network, or if the loss is not finite.
    """
    _use_batch_statistics(network)
    for layer in mask:
        network.get_parameter(layer).requires_grad_()  # a user may have frozen it
    device = next(network.parameters()).device
    alive = {layer: mask[layer].to(device) for layer in mask}
    built_in = score in NETWORK_SCORES.values()
    before = None if built_in else state_hash(network.state_dict())
    with (
        ambient(seed),
        torch.enable_grad(),
        flush_denormals(),
        deterministic_algorithms(device.type),
        sound_convolutions(network, device.type),
    ):
        found = score(
            Network(network, alive, batches, loss, generator(seed, "score"), forward, step, prunable, removed)
        )
    if before is not None and state_hash(network.state_dict()) != before:
        raise ImportanceError("it changed the network; a score has to leave weights and buffers as they are")
    return found


def _use_batch_statistics(model: nn.Module) -> None:
    """Let batch norm use the statistics of each batch without updating its own; switch dropout off."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            module.train()
            module.track_running_stats = False

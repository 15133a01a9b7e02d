"""What a training leads to and goes through, and where it can be taken up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tombola.training.weights import State, Weights


@dataclass(frozen=True)
class History:
    """What a training went through.

    Args:
        losses: the mean training loss of each epoch (of the part that the training saw).
        test_accuracy: share of the test set that is classified rightly at the end, in 0..1; None if it diverged.
        test_loss: mean loss over the test set at the end; None if it diverged.
        diverged_at: the iteration at which loss or weights were seen to be no longer finite; None otherwise.

    >>> History(losses=(0.9, 0.5), test_accuracy=0.8, test_loss=0.6).to_json()["losses"]
    [0.9, 0.5]
    """

    losses: tuple[float, ...] = ()
    test_accuracy: float | None = None
    test_loss: float | None = None
    diverged_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the history as JSON's types."""
        return asdict(self) | {"losses": list(self.losses)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> History:
        """Return the history of which `to_json` gave the document."""
        return cls(**{**document, "losses": tuple(document["losses"])})


@dataclass(frozen=True)
class Trained:
    """What a training leads to: the weights at its end, pruned ones exactly 0.0, and its history.

    Args:
        weights: of all parameters and buffers.
        history: what it went through.
        batch_losses: the training loss of every iteration, float32; empty where it was not loaded (see `Store`).

    >>> Trained(Weights.of({"w": torch.zeros(1)}), History(diverged_at=3)).history.test_accuracy is None
    True
    """

    weights: Weights
    history: History
    batch_losses: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to go on in the middle of a training; every random number follows from the iteration.

    Args:
        iteration: the next one to do.
        state: the network's state.
        optimizer: the optimizer's tensors, by `<parameter's number>.<name>`.
        batch_losses: as in `Trained`, of the iterations that are done.

    >>> Checkpoint(iteration=3, state={"w": torch.zeros(1)}, batch_losses=torch.ones(3)).iteration
    3
    """

    iteration: int
    state: State
    optimizer: State = field(default_factory=dict)
    batch_losses: Tensor = field(default_factory=lambda: torch.empty(0))


Watch: TypeAlias = Callable[[int, Callable[[], Checkpoint]], None]
"""Called after every iteration with the next one and a function that takes a checkpoint."""

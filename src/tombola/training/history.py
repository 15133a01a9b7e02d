"""The result of a training, its history, and the checkpoints from which it can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tombola.training.metrics import Measure
from tombola.training.weights import State, Weights


@dataclass(frozen=True)
class History:
    """The losses and the final metrics of a training.

    Args:
        losses: the mean training loss of each epoch; for an incomplete first or last epoch, over the trained part.
        test_accuracy: the accuracy on the test set at the end, in 0..1; None if the training diverged, or if
            accuracy is not among the metrics of the task.
        test_loss: the mean loss over the test set at the end; None if the training diverged.
        diverged_at: the iteration after which the loss or the weights were found not to be finite; None otherwise.
        metrics: all other metrics at the end, by split ("test" or "validation") and by the key of the metric; None for
            one that is not finite.

    >>> History(losses=(0.9, 0.5), test_accuracy=0.8, test_loss=0.6).to_json()["losses"]
    [0.9, 0.5]
    """

    losses: tuple[float, ...] = ()
    test_accuracy: float | None = None
    test_loss: float | None = None
    diverged_at: int | None = None
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict, hash=False)

    def has(self, measure: Measure) -> bool:
        """Return whether a metric on a split is known, if only that it is None.

        >>> History(test_accuracy=0.8).has(Measure()), History(test_accuracy=0.8).has(Measure(split="validation"))
        (True, False)
        """
        if self.diverged_at is not None or measure.key in self.metrics.get(measure.split, {}):
            return True
        known = {"accuracy": self.test_accuracy is not None, "loss": True}
        return measure.split == "test" and known.get(measure.key, False)

    def value(self, measure: Measure) -> float | None:
        """Return a metric on a split; None if it is not known or not finite, or if the training diverged.

        >>> History(metrics={"validation": {"loss": 0.5}}, test_loss=0.6).value(Measure("loss", split="validation"))
        0.5
        """
        own: dict[str, float | None] = {"loss": self.test_loss} if measure.split == "test" else {}
        if measure.split == "test" and self.test_accuracy is not None:
            own["accuracy"] = self.test_accuracy
        return ({**self.metrics.get(measure.split, {})} | own).get(measure.key)

    def to_json(self) -> dict[str, Any]:
        """Return the history as a document of JSON types; without other metrics, as it was before there were any."""
        document = asdict(self) | {"losses": list(self.losses)}
        if not self.metrics:
            del document["metrics"]
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> History:
        """Return the history from a document that `to_json` returned."""
        return cls(**{**document, "losses": tuple(document["losses"])})


class HistoryDocument(BaseModel):
    """The schema of the document that `History.to_json` returns, for documents that were read from a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    losses: list[float]
    test_accuracy: Annotated[float, Field(ge=0, le=1)] | None
    test_loss: float | None
    diverged_at: Annotated[int, Field(ge=0)] | None
    metrics: dict[Literal["test", "validation"], dict[str, float | None]] = {}


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Args:
        weights: all parameters and buffers at the end; pruned weights are exactly 0.0.
        history: losses and metrics.
        batch_losses: the training loss of every iteration, float32; empty if it was not loaded (see `Store`).

    >>> Trained(Weights.of({"w": torch.zeros(1)}), History(diverged_at=3)).history.test_accuracy is None
    True
    """

    weights: Weights
    history: History
    batch_losses: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """The state from which a training can be resumed; its random numbers are derived from the iteration.

    Args:
        iteration: the next iteration.
        state: the network's state.
        optimizer: the optimizer's state, by `<parameter's number>.<name>`.
        batch_losses: the training loss of every iteration so far, float32.

    >>> Checkpoint(iteration=3, state={"w": torch.zeros(1)}, batch_losses=torch.ones(3)).iteration
    3
    """

    iteration: int
    state: State
    optimizer: State = field(default_factory=dict)
    batch_losses: Tensor = field(default_factory=lambda: torch.empty(0))


Watch: TypeAlias = Callable[[int, Callable[[], Checkpoint]], None]
"""A function that is called after every iteration, or after several (see `watch_every` of `train`), with the number of
the next one and a function that returns a checkpoint."""

OnEpoch: TypeAlias = Callable[[int, tuple[float, ...]], None]
"""A function that is called after every epoch with the number of the next iteration and the losses of the epochs so
far, see `History`."""

"""Tickets: a mask, the weights to which it is rewound, and its provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from tombola.errors import UserError
from tombola.files import write_atomically
from tombola.pruning.mask import Mask
from tombola.training.history import History, Trained
from tombola.training.weights import State, Weights, apply_mask, zero_pruned


@dataclass(frozen=True)
class Ticket:
    """A lottery ticket: the connections that are alive at a level, and the weights to which they are rewound.

    Args:
        level: the number of pruning rounds; level n has density (1 - fraction)^n, so level 0 is the dense network.
        mask: the connections that are alive.
        rewind: the complete dense state at the rewind point.
        trained: the result of training the ticket; None if it is not known.
        provenance: the study, importance and seed that the ticket comes from, as a document of JSON types.

    >>> import torch
    >>> mask = Mask.from_tensors({"weight": torch.tensor([[True, False]])})
    >>> Ticket(1, mask, Weights.of({"weight": torch.ones(1, 2)}), trained=None).rewound
    {'weight': tensor([[1., 0.]])}
    """

    level: int
    mask: Mask
    rewind: Weights
    trained: Trained | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rewound(self) -> State:
        """The state from which the ticket is trained: that of the rewind point, with pruned weights 0.0."""
        return apply_mask(self.rewind.load(), self.mask.load())

    def apply(self, model: nn.Module, *, trained: bool = False) -> None:
        """Load the ticket's rewound (or trained) state into `model`, with pruned weights 0.0.

        Raises:
            UserError: if the ticket does not fit the model, or if the trained state is not known.
        """
        state = self.load_trained() if trained else self.rewound
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"the ticket does not fit the model: {' '.join(str(error).split())}") from error
        zero_pruned(model, self.mask.load())

    def load_trained(self) -> State:
        """Return the trained state, with pruned weights 0.0.

        Raises:
            UserError: if it is not known.
        """
        if self.trained is None:
            raise UserError(f"the ticket of level {self.level} has no trained weights")
        return self.trained.weights.load()

    def save(self, path: Path, *, trained: bool = False) -> None:
        """Write the ticket to a safetensors file.

        The file has the tensors `mask.<parameter>` (bool), `rewind.<name>` for every entry of the rewound state, and
        with `trained` also `trained.<name>`. Level, history and provenance are in the metadata, as JSON.
        """
        tensors = {f"mask.{name}": alive for name, alive in self.mask.load().items()}
        tensors |= {f"rewind.{name}": tensor.contiguous() for name, tensor in self.rewound.items()}
        if trained:
            tensors |= {f"trained.{name}": tensor.contiguous() for name, tensor in self.load_trained().items()}
        about = {
            "level": self.level,
            "layers": list(self.mask),
            "history": self.trained.history.to_json() if self.trained else History().to_json(),
            "provenance": dict(self.provenance),
        }
        write_atomically(path, safetensors.torch.save(tensors, {"tombola": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Ticket:
        """Return the ticket that `save` wrote; its `trained` is None if it was saved without the trained weights.

        Raises:
            UserError: if the file is missing or is not a ticket.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["tombola"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            mask = Mask.from_tensors({name: tensors[f"mask.{name}"] for name in about["layers"]})
            history, level, provenance = History.from_json(about["history"]), about["level"], about["provenance"]
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as a ticket that tombola saved: {error}") from error

        def part(prefix: str) -> State:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        trained = Trained(Weights.of(part("trained.")), history) if part("trained.") else None
        return cls(level, mask, Weights.of(part("rewind.")), trained, provenance)

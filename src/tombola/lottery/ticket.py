"""Tickets: a mask, the weights to which it is rewound, and its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from tombola import kernels
from tombola.errors import UserError, as_path, expect, expect_flags, expect_whole, short
from tombola.files import write_output
from tombola.lottery.ticket_file import Content, encode, read
from tombola.pruning.mask import Mask
from tombola.training.history import History, Trained
from tombola.training.weights import Shared, State, Weights, apply_mask, copy_model, load_state, zero_pruned


@dataclass(frozen=True)
class Ticket:
    """A lottery ticket: the connections that are alive at a level, and the weights to which they are rewound.

    Args:
        level: the number of pruning rounds; level n has density (1 - fraction)^n, so level 0 is the dense network.
        mask: the connections that are alive.
        rewind: the complete dense state from which the ticket is trained, namely that of the rewind point; where a
            recipe keeps the trained weights (`rewind_to`), that with which the level before ended.
        trained: the result of training the ticket; None if it is not known.
        provenance: the study, importance and seed that the ticket comes from, as a document of JSON types.
        shared: the other names of weights that modules share, by their names in the mask. The states have a weight
            under all its names, and it is pruned under all of them.

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
    shared: Shared = field(default_factory=dict)

    def __post_init__(self) -> None:
        expect_whole(self.level, "Ticket: level")
        expect(self.mask, Mask, "Ticket: mask", "a tombola.Mask")
        expect(self.rewind, Weights, "Ticket: rewind", "tombola.Weights, such as Weights.of(model.state_dict())")
        expect(self.trained, Trained | None, "Ticket: trained", "a tombola.Trained")
        expect(self.provenance, Mapping, "Ticket: provenance", "values by name")
        expect(self.shared, Mapping, "Ticket: shared", "tuples of names by name")

    @property
    def rewound(self) -> State:
        """The state from which the ticket is trained: that of the rewind point, with pruned weights 0.0."""
        return apply_mask(self.rewind.load(), self.mask.load(), self.shared)

    def apply(self, model: nn.Module, *, trained: bool = False) -> None:
        """Load the ticket's rewound (or trained) state into `model`, with pruned weights 0.0.

        An optimizer would let pruned weights grow again. To train the ticket in a loop of your own, hold its mask:
        `with tombola.loops.hold(model, ticket.mask, optimizer): ...` keeps them at 0.0, see `tombola.loops`.

        Args:
            model: the network, which may be wrapped, for example by `torch.compile` or `DistributedDataParallel`.
            trained: whether to load the trained state instead of the rewound one.

        Raises:
            UserError: if the ticket does not fit the model, or if the trained state is not known.
        """
        expect_flags(trained=trained)
        mask = self.mask.load()
        load_state(model, self.load_trained() if trained else self.rewound, "the ticket")
        zero_pruned(model, mask)

    def sparse(self, model: nn.Module, *, batch_size: int = 128, trained: bool = True) -> nn.Module:
        """Return a copy of `model` with the ticket's weights that computes with the surviving ones, on the CPU.

        Linear and convolution layers that the sparse kernels compute faster at this density and batch size hold only
        their surviving weights; all others stay dense. The copy is for running: its parameters require no gradients.
        Any batch size gives the same outputs up to rounding.

        Args:
            model: the network; it is not changed.
            batch_size: the number of examples for which to choose the layers.
            trained: whether to take the trained weights; otherwise the rewound ones.

        Raises:
            UserError: if the ticket does not fit the model, if the batch size is no whole number from 1 on, or if the
                trained state is not known.

        Warns:
            NoKernelsWarning: if tombola was installed without its compiled kernels; then all layers stay dense.

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> mask = Mask.ones_like(model) & Mask.from_tensors({"0.weight": torch.eye(32, 64) > 0,
        ...                                                   "2.weight": torch.ones(2, 32) > 0})
        >>> ticket = Ticket(1, mask, Weights.of(model.state_dict()), trained=None)
        >>> fast = ticket.sparse(model, trained=False)
        >>> ticket.apply(model)
        >>> inputs = torch.randn(128, 64)
        >>> torch.allclose(fast(inputs), model(inputs), atol=1e-5)
        True
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise UserError(f"batch_size: expected a whole number from 1 on, got {short(batch_size)}")
        found = copy_model(model)
        self.apply(found, trained=trained)
        found = found.cpu()
        kernels.warn_if_missing()
        return kernels.sparsify_to_infer(found, self.mask.load(), batch_size).requires_grad_(False)

    def load_trained(self) -> State:
        """Return the trained state, with pruned weights 0.0.

        Raises:
            UserError: if it is not known.
        """
        if self.trained is None:
            raise UserError(f"the ticket of level {self.level} has no trained weights")
        return self.trained.weights.load()

    def save(self, path: str | Path, *, trained: bool = False) -> None:
        """Write the ticket to a safetensors file, see `tombola.lottery.ticket_file`.

        Args:
            path: the file.
            trained: whether to include the trained weights.

        Raises:
            UserError: if the file cannot be written, or if the trained weights are not known.
        """
        expect_flags(trained=trained)
        history = self.trained.history if self.trained else History()
        state = self.load_trained() if trained else None
        mask = self.mask.load()
        shared = {name: others for name, others in self.shared.items() if name in mask}
        content = Content(self.level, mask, self.rewound, state, history, self.provenance, shared)
        write_output(as_path(path, "Ticket.save"), encode(content))

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Return the ticket that `save` wrote; its `trained` is None if it was saved without the trained weights.

        Every part of the file is checked against the others, and all of them against the seal.

        Raises:
            UserError: if the file is missing, is not a ticket, or was changed or damaged since it was written.

        Warns:
            UnsealedTicketWarning: if the file was written before tickets had a seal.
        """
        content = read(as_path(path, "Ticket.load"))
        trained = None if content.trained is None else Trained(Weights.of(content.trained), content.history)
        rewound = Weights.of(content.rewound)
        return cls(content.level, content.mask, rewound, trained, content.provenance, content.shared)

    def __copy__(self) -> Ticket:
        return self

    def __deepcopy__(self, memo: object) -> Ticket:
        return self  # nothing in a ticket changes

    def __reduce__(self) -> NoReturn:
        raise UserError("a ticket is not pickled: write it with its `save`, and read it with tombola.Ticket.load")

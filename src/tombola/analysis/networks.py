"""Networks: the network of a study in the trained states of its tickets, to be evaluated in several threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tombola.pruning.mask import Mask
from tombola.streams import ambient
from tombola.study.task import Problem
from tombola.training.train import load_model
from tombola.training.weights import State, copy_model, load_state


class Copies:
    """Copies of a model, of which each thread that asks for one has its own.

    Args:
        model: the model, which is not changed.

    >>> copies = Copies(nn.Linear(2, 1))
    >>> with copies.lending() as one, copies.lending() as other:
    ...     one is other
    False
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._free: list[nn.Module] = []

    @contextmanager
    def lending(self) -> Iterator[nn.Module]:
        """Lend a copy, whose state may be any. Whoever changes anything but its state has to undo it."""
        try:
            model = self._free.pop()
        except IndexError:
            model = copy_model(self._model)
        yield model
        self._free.append(model)  # not after an error, which may have left it half changed


class Networks:
    """The network of a study, of which each thread has a copy.

    Convolutional networks are channels-last, as in trainings: their evaluation takes about three quarters of the time.

    Args:
        problem: the data, the network and the loss of the study.
    """

    def __init__(self, problem: Problem) -> None:
        with ambient(0):
            model = problem.build()
        self._copies = Copies(load_model(model, model.state_dict(), Mask({}, {}), "cpu"))

    @contextmanager
    def holding(self, state: State) -> Iterator[nn.Module]:
        """Lend a copy of the network in a state, see `Copies.lending`."""
        with self._copies.lending() as model:
            load_state(model, state, "the ticket")
            yield model

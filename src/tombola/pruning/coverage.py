"""Coverage: how much of a network's parameters density counts, and what is pruned, kept dense and left out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from tombola.errors import list_first
from tombola.pruning.eligible import DEFAULT, list_frozen, list_names, prunable
from tombola.pruning.mask import Mask

PRUNED, KEPT_DENSE, LEFT_OUT, OTHER, FROZEN = "pruned", "kept dense", "left out", "not chosen", "frozen"
"""The roles of parameters: counted and pruned, counted and never pruned, excluded, and not chosen to be prunable; of
these, the frozen ones, which are not trained (`requires_grad = False`), have a role of their own."""

ENOUGH = 0.9
"""The share of the parameters that should be prunable; below it, density says little about the whole network."""

_NAMED = 3
"""The number of tensors that a row or a sentence names."""


_WORTH_NAMING = 0.01
"""The share of the parameters from which on a tensor is named among the largest that are not pruned."""


@dataclass(frozen=True)
class Part:
    """The tensors of one role.

    Args:
        role: `PRUNED`, `KEPT_DENSE`, `LEFT_OUT`, `OTHER` or `FROZEN`.
        shapes: the shape of each tensor, by its names: a tensor that modules share has several.
    """

    role: str
    shapes: dict[tuple[str, ...], tuple[int, ...]]

    @property
    def sizes(self) -> dict[tuple[str, ...], int]:
        """The number of parameters of each tensor, by its names."""
        return {names: math.prod(shape) for names, shape in self.shapes.items()}

    @property
    def parameters(self) -> int:
        """The number of parameters of all tensors."""
        return sum(self.sizes.values())

    def list_largest(self, most: int = _NAMED) -> str:
        """Return the names of the largest tensors as text, and how many others there are.

        >>> Part(PRUNED, {("a",): (1,), ("b", "c"): (1, 2), ("d",): (0,)}).list_largest(2)
        'b = c, a and 1 more'
        """
        sizes = self.sizes
        names = [" = ".join(names) for names in sorted(sizes, key=lambda names: -sizes[names])]
        return list_first(names, most)


@dataclass(frozen=True)
class Coverage:
    """What density is about: the parameters of a network by their roles. A shared tensor is counted once.

    Args:
        parts: one part for each role, in the order pruned, kept dense, left out, not chosen, frozen; any may be empty.
        patterns: the patterns that chose what is prunable, see `prunable`; empty for the default.
        frozen: the names of the parameters that are pruned and not trained, as patterns name them.
    """

    parts: tuple[Part, Part, Part, Part, Part]
    patterns: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The number of the network's parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def counted(self) -> int:
        """The number of parameters that density counts: those that are pruned and those that are kept dense."""
        return self.parts[0].parameters + self.parts[1].parameters

    def describe(self) -> str:
        """Return a sentence on how many of the network's parameters density counts."""
        _, kept, left_out, _, frozen = self.parts
        text = f"Density counts {self.counted} of the network's {self.total} parameters"
        if kept.shapes:
            text += f"; {kept.parameters} of these are kept dense ({', '.join(sorted(_firsts(kept)))})"
        if left_out.shapes:
            text += f"; {', '.join(sorted(_firsts(left_out)))} {'is' if len(left_out.shapes) == 1 else 'are'} left out"
        if frozen.shapes:
            text += f"; {frozen.parameters} are frozen and stay as they are ({frozen.list_largest()})"
        if self.frozen:
            are = "is" if len(self.frozen) == 1 else "are"
            text += f"; {', '.join(self.frozen)} {are} pruned though frozen, as `prune` says"
        return f"{text}."

    def warn(self) -> str:
        """Return a sentence for the case that less than `ENOUGH` of the parameters may be pruned; otherwise nothing."""
        pruned, *others = self.parts
        if pruned.parameters >= ENOUGH * self.total:
            return ""
        text = f"Only {100 * pruned.parameters / self.total:.3g} % of the network's parameters may be pruned"
        rest = [(size, names, part) for part in others for names, size in part.sizes.items()]
        largest = sorted(rest, key=lambda each: -each[0])[:_NAMED]
        largest = [each for each in largest if each[0] >= _WORTH_NAMING * self.total] or largest[:1]
        named = ", ".join(f"{names[0]} ({size}, {part.role})" for size, names, part in largest)
        text += f", so its density says little about the whole; the largest others are {named}"
        missing = [names[0] for _, names, part in largest if part.role == OTHER and len(part.shapes[names]) > 1]
        if missing:
            patterns = [*(self.patterns or [DEFAULT]), *missing]
            text += f"; prune = {_list(patterns)} would prune {'it' if len(missing) == 1 else 'them'} too"
        return f"{text}."

    def tabulate(self) -> list[tuple[str, int, int, float, str]]:
        """Return a row for each role that a tensor has: role, tensors, parameters, share in 0..1, largest tensors."""
        return [
            (part.role, len(part.shapes), part.parameters, part.parameters / self.total, part.list_largest())
            for part in self.parts
            if part.shapes
        ]


def cover(model: nn.Module, dense: Mask, kept_dense: Collection[str] = (), prune: Sequence[str] = ()) -> Coverage:
    """Return how much of a network's parameters density counts.

    Args:
        model: the network.
        dense: the mask of the dense network: the parameters that are counted.
        kept_dense: those of them that are never pruned, by parameter name.
        prune: the patterns that chose what is prunable, see `prunable`.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    >>> found = cover(model, Mask.ones_like(model), ["2.weight"])
    >>> found.describe()
    "Density counts 18 of the network's 43 parameters; 6 of these are kept dense (2.weight)."
    >>> [(role, parameters, largest) for role, _, parameters, _, largest in found.tabulate()]
    [('pruned', 12, '1.weight'), ('kept dense', 6, '2.weight'), ('not chosen', 25, '0.weight, 1.bias, 2.bias')]
    >>> found.warn().partition("; prune")[2]
    ' = ["default", "0.weight"] would prune it too.'
    """
    eligible, frozen = prunable(model, prune), list_frozen(model)
    pruned, kept, left_out, other, still = (Part(role, {}) for role in (PRUNED, KEPT_DENSE, LEFT_OUT, OTHER, FROZEN))
    parameters = dict(model.named_parameters())
    for first, names in list_names(model).items():
        if first in dense:
            part = kept if first in kept_dense else pruned
        elif first in eligible:
            part = left_out
        else:
            part = still if first in frozen else other
        part.shapes[names] = tuple(parameters[first].shape)
    still_pruned = tuple(name for name in _firsts(pruned) if name in frozen)
    return Coverage((pruned, kept, left_out, other, still), tuple(prune), still_pruned)


def _firsts(part: Part) -> list[str]:
    return [names[0] for names in part.shapes]


def _list(values: Sequence[str]) -> str:
    """Return a list of texts as TOML and Python write it."""
    quoted = (f'"{value}"' for value in values)
    return f"[{', '.join(quoted)}]"

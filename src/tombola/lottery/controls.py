"""Controls: change one thing about a ticket, to see what it owes its performance to.

Each function is pure: it takes a mask or a state, and returns another one. Training them is planned by
`tombola.study.controls`.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from tombola.pruning.mask import Mask
from tombola.streams import generator
from tombola.training.weights import Shared, State


def shuffle(mask: Mask, seed: int) -> Mask:
    """Return a mask in which the connections of each layer have changed places at random.

    Every set of as many connections of a layer is equally likely, and layers are independent. This is the random
    shuffling of Frankle et al. (arXiv 2009.08576), and a random mask with the same number of connections in each layer.

    Args:
        mask: the connections that are alive.
        seed: the seed of the places.

    >>> mask = Mask.from_tensors({"a": torch.tensor([1, 1, 0, 0, 0, 0]) > 0, "b": torch.tensor([1, 1]) > 0})
    >>> shuffle(mask, 0).counts
    {'a': 2, 'b': 2}
    """
    found = {}
    for name, shape in mask.shapes.items():
        order = torch.randperm(mask.sizes[name], generator=generator(seed, "shuffled mask", name))
        found[name] = mask[name].flatten()[order].reshape(shape)
    return Mask.from_tensors(found)


def keep_signs(initial: State, drawn: State, mask: Mask, shared: Shared = MappingProxyType({})) -> State:
    """Return the state `drawn` with the signs of `initial` in the layers of a mask: sign(initial) |drawn|.

    Zhou et al. (arXiv 1905.01067) and Gadhikar and Burkholz (arXiv 2504.12801) ask how much of a ticket its signs are.
    A weight of `initial` that is 0.0 has no sign, and keeps that of `drawn`. All other entries are those of `drawn`.

    Args:
        initial: the state whose signs are kept.
        drawn: another state of the same network.
        mask: the connections that are alive; only the names of its layers matter.
        shared: the other names of weights that modules share, under which the states have them too.

    >>> mask = Mask.from_tensors({"w": torch.tensor([True, False])})
    >>> keep_signs({"w": torch.tensor([-1.0, 2.0])}, {"w": torch.tensor([3.0, -4.0])}, mask)
    {'w': tensor([-3.,  4.])}
    """
    layers = set(mask) | {other for name in mask for other in shared.get(name, ())}
    return {
        name: torch.where(initial[name] == 0, tensor, torch.copysign(tensor, initial[name]))
        if name in layers
        else tensor
        for name, tensor in drawn.items()
    }

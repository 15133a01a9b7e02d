"""Steps of LeNet-300-100 against those of other packages' sparse layers; `run.py` calls it where they are installed."""

from __future__ import annotations

import json
import os

import sparselab
import sparseprop.modules.linear
import torch
from torch import nn

import steps

DENSITIES = (0.2, 0.1, 0.01)


def of_sparseprop(layer: nn.Linear) -> nn.Module:
    """SparseProp's layer (Nikdan et al., arXiv 2302.04852)."""
    made: nn.Module = sparseprop.modules.linear.SparseLinear.from_dense(layer)
    return made


def of_sparselab(layer: nn.Linear) -> nn.Module:
    """SparseLab's layer of the same density."""
    density = float((layer.weight != 0).double().mean())
    made: nn.Module = sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=1 - density)
    _ALIVE.append(made)
    return made


_ALIVE: list[nn.Module] = []
"""SparseLab remembers by the address of a layer, and takes one that comes to lie there later for it."""


def main() -> None:
    """Print, for each density, rounds of milliseconds: ours, SparseProp's, SparseLab's."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    system = steps.lenet(100)
    measured = {}
    for density in DENSITIES:
        mask = system.mask(density)
        measured[density] = [
            [
                1e3 * steps.ours(system, mask),
                1e3 * steps.by_peer(system, mask, of_sparseprop),
                1e3 * steps.by_peer(system, mask, of_sparselab),
            ]
            for _ in range(5)
        ]
    print(json.dumps(measured))


if __name__ == "__main__":
    main()

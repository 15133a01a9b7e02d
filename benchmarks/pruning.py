"""Pruning one round of 125 M float32 weights in 20 layers, against `torch.nn.utils.prune.global_unstructured`."""

from __future__ import annotations

import json
import resource
import sys
import time

LAYERS, SIDE = 20, 2500


def ours(importance: str) -> tuple[float, float]:
    """Return seconds and extra bytes at the peak of `tombola.prune` by an importance."""
    import torch

    from tombola import Mask, prune
    from tombola.importance import IMPORTANCES

    torch.manual_seed(0)
    weights = {f"layer{i}": torch.randn(SIDE, SIDE) for i in range(LAYERS)}
    mask = Mask.from_tensors({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()})
    before, begun = _peak(), time.perf_counter()
    pruned = prune(weights, mask, IMPORTANCES[importance], 0.2)
    seconds = time.perf_counter() - begun
    assert pruned.alive == mask.total - round(0.2 * mask.total)
    return seconds, _peak() - before


def theirs() -> tuple[float, float]:
    """Return the same of torch's global pruning by magnitude."""
    import torch
    from torch.nn.utils import prune

    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    before, begun = _peak(), time.perf_counter()
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.2)  # type: ignore[no-untyped-call]
    return time.perf_counter() - begun, _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    which = sys.argv[1]
    print(json.dumps(theirs() if which == "torch" else ours(which)))

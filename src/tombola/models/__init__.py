"""The paper's networks, as plain modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tombola.models.lenet import lenet_300_100

MODELS: dict[str, Callable[..., nn.Module]] = {"lenet_300_100": lenet_300_100}

__all__ = ["MODELS", "lenet_300_100"]

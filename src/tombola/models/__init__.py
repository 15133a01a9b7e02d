"""The paper's networks, as plain modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tombola.models.lenet import lenet_300_100
from tombola.models.resnet import resnet18, resnet20
from tombola.models.vgg import vgg16

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": lenet_300_100,
    "resnet20": resnet20,
    "vgg16": vgg16,
    "resnet18": resnet18,
}
"""The networks by name. To add one, write a function that returns a module, and add it here."""

__all__ = ["MODELS", "lenet_300_100", "resnet18", "resnet20", "vgg16"]

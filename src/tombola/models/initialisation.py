"""Initialisation of the paper's networks."""

from __future__ import annotations

from torch import nn


def kaiming(model: nn.Module) -> None:
    """Initialise linear and convolution weights with N(0, 2 / fan_in) (He et al., arXiv 1502.01852), nothing else."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)

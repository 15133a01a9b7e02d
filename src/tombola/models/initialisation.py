"""Initialisation of the paper's networks."""

from __future__ import annotations

from typing import Literal

from torch import nn

from tombola.errors import UserError, short

LARGEST = 10**9
"""Maximum size of a layer's input or output; such a layer needs more memory than machines have."""

BatchNormInit = Literal["ones", "uniform"]
"""How the scales of batch norm begin: all 1, as usual in torch, or drawn from U[0, 1], as in open_lth."""


def kaiming(model: nn.Module) -> None:
    """Initialise linear and convolution weights with N(0, 2 / fan_in) (He et al., arXiv 1502.01852), nothing else."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight)


def scale_batch_norm(model: nn.Module, init: BatchNormInit) -> None:
    """Initialise the scales of batch norm: "ones" leaves them at 1, "uniform" draws them from U[0, 1].

    Raises:
        UserError: for another word.
    """
    if init not in ("ones", "uniform"):
        raise UserError(f"batchnorm_init must be 'ones' or 'uniform', got {short(init)}")
    for module in model.modules():
        if init == "uniform" and isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)


def check_sizes(**sizes: int) -> None:
    """Raise `UserError` unless these arguments of a network are whole numbers from 1 to 10^9.

    >>> check_sizes(classes=10, width=0)
    Traceback (most recent call last):
    tombola.errors.UserError: width: expected a whole number from 1 to 1000000000, got 0
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST:
            raise UserError(f"{name}: expected a whole number from 1 to {LARGEST}, got {short(size)}")

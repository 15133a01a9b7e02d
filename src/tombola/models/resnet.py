"""ResNets: ResNet-20 for CIFAR, and ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tombola.errors import UserError, short
from tombola.models.initialisation import BatchNormInit, check_sizes, kaiming, scale_batch_norm

Stem = Literal["imagenet", "cifar"]
"""The first layers: a 7x7 convolution and a max-pooling, each of stride 2; or one 3x3 convolution of stride 1."""


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them: 1x1 where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, channels_in, h, w) -> (n, channels, h / stride, w / stride)."""
        hidden = torch.relu_(self.bn1(self.conv1(inputs)))
        hidden = self.bn2(self.conv2(hidden))
        return torch.relu_(hidden + self.shortcut(inputs))


class ResNet(nn.Module):
    """A stem, stages of blocks, mean over pixels, and a linear layer.

    Each stage except the first halves height and width; the stem "imagenet" divides both by 4.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        classes: int,
        stem: Stem = "cifar",
        batchnorm_init: BatchNormInit = "ones",
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise UserError(f"stem must be 'imagenet' or 'cifar', got {short(stem)}")
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(
            3, widths[0], 7 if large else 3, 2 if large else 1, padding=3 if large else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        self.blocks = nn.Sequential()
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for i in range(count):
                self.blocks.append(Block(channels, width, stride=2 if stage > 0 and i == 0 else 1))
                channels = width
        self.fc = nn.Linear(channels, classes)
        kaiming(self)
        scale_batch_norm(self, batchnorm_init)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (n, classes), of images of shape (n, 3, h, w)."""
        hidden = self.pool(torch.relu_(self.bn1(self.conv1(inputs))))
        hidden = self.blocks(hidden).mean((2, 3))
        logits: Tensor = self.fc(hidden)
        return logits


def resnet20(classes: int = 10, width: int = 16, batchnorm_init: BatchNormInit = "ones") -> ResNet:
    """Return ResNet-20 (He et al., arXiv 1512.03385) with 1x1-convolution shortcuts, Kaiming-normal weights.

    272,474 parameters, 270,896 of them prunable in 22 tensors.

    Args:
        classes: number of outputs.
        width: channels of the first stage; the next two have twice and four times as many.
        batchnorm_init: the initial scales of batch norm: "ones", or "uniform" for U[0, 1] as in open_lth.

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    check_sizes(classes=classes, width=width)
    return ResNet((width, 2 * width, 4 * width), (3, 3, 3), classes, "cifar", batchnorm_init)


def resnet18(
    classes: int = 200, width: int = 64, stem: Stem = "imagenet", batchnorm_init: BatchNormInit = "ones"
) -> ResNet:
    """Return ResNet-18 (He et al., arXiv 1512.03385), Kaiming-normal weights: 11,279,112 parameters with 200 classes.

    With the stem "cifar" it has 11,271,432 parameters, and needs about ten times the arithmetic for the same images.

    Args:
        classes: number of outputs.
        width: channels of the first stage; each of the next three has twice as many as the one before.
        stem: "imagenet" for a 7x7 convolution and a 3x3 max-pooling, each of stride 2; "cifar" for a 3x3 convolution of
            stride 1 and no pooling, a usual choice for images of 32 x 32 or 64 x 64 pixels.
        batchnorm_init: the initial scales of batch norm: "ones", or "uniform" for U[0, 1] as in open_lth.

    >>> sum(p.numel() for p in resnet18().parameters())
    11279112
    """
    check_sizes(classes=classes, width=width)
    return ResNet((width, 2 * width, 4 * width, 8 * width), (2, 2, 2, 2), classes, stem, batchnorm_init)

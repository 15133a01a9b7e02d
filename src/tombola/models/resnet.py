"""ResNets for small images: ResNet-20 (CIFAR) and ResNet-18 with a stem for 64 x 64 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tombola.models.initialisation import kaiming


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
    """A 3x3 stem of stride 1, stages of blocks, mean over pixels, and a linear layer.

    Each stage except the first halves height and width.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential()
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for i in range(count):
                self.blocks.append(Block(channels, width, stride=2 if stage > 0 and i == 0 else 1))
                channels = width
        self.fc = nn.Linear(channels, classes)
        kaiming(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (n, classes), of images of shape (n, 3, h, w)."""
        hidden = torch.relu_(self.bn1(self.conv1(inputs)))
        hidden = self.blocks(hidden).mean((2, 3))
        logits: Tensor = self.fc(hidden)
        return logits


def resnet20(classes: int = 10, width: int = 16) -> ResNet:
    """Return ResNet-20 (He et al., arXiv 1512.03385) with 1x1-convolution shortcuts, Kaiming-normal weights.

    272,474 parameters, 270,896 of them prunable in 22 tensors.

    Args:
        classes: number of outputs.
        width: channels of the first stage; the next two have twice and four times as many.

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    return ResNet((width, 2 * width, 4 * width), (3, 3, 3), classes)


def resnet18(classes: int = 200, width: int = 64) -> ResNet:
    """Return ResNet-18 (He et al., arXiv 1512.03385) for 64 x 64 images, Kaiming-normal weights: 11,271,432 parameters.

    Its stem is one 3x3 convolution of stride 1 without max-pooling, the field's usual choice for such images.

    Args:
        classes: number of outputs.
        width: channels of the first stage; each of the next three has twice as many as the one before.

    >>> sum(p.numel() for p in resnet18().parameters())
    11271432
    """
    return ResNet((width, 2 * width, 4 * width, 8 * width), (2, 2, 2, 2), classes)

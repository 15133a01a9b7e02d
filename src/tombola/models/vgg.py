"""VGG-16 for CIFAR: batch norm, convolutions with biases, one linear classifier."""

from __future__ import annotations

from torch import Tensor, nn

from tombola.models.initialisation import BatchNormInit, check_sizes, kaiming, scale_batch_norm

_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, batch norm and ReLU; max-pooling halves the image between them."""

    def __init__(self, classes: int, width: int, batchnorm_init: BatchNormInit) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for stage, multiples in enumerate(_STAGES):
            if stage > 0:
                self.features.append(nn.MaxPool2d(2))
            for multiple in multiples:
                self.features.append(nn.Conv2d(channels, multiple * width, 3, padding=1))
                self.features.append(nn.BatchNorm2d(multiple * width))
                self.features.append(nn.ReLU(inplace=True))
                channels = multiple * width
        self.fc = nn.Linear(channels, classes)
        kaiming(self)
        scale_batch_norm(self, batchnorm_init)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (n, classes), of images of shape (n, 3, h, w): the last stage's mean over pixels."""
        logits: Tensor = self.fc(self.features(inputs).mean((2, 3)))
        return logits


def vgg16(classes: int = 10, width: int = 64, batchnorm_init: BatchNormInit = "ones") -> VGG:
    """Return VGG-16 (Simonyan and Zisserman, arXiv 1409.1556) with batch norm and a single linear classifier.

    14,728,266 parameters, 14,715,584 of them prunable in 14 tensors; Kaiming-normal weights.

    Args:
        classes: number of outputs.
        width: channels of the first stage; later stages have up to 8 times as many.
        batchnorm_init: the initial scales of batch norm: "ones", or "uniform" for U[0, 1] as in open_lth.

    >>> sum(p.numel() for p in vgg16().parameters())
    14728266
    """
    check_sizes(classes=classes, width=width)
    return VGG(classes, width, batchnorm_init)

"""LeNet-300-100, the fully connected network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from tombola.models.initialisation import kaiming


class LeNet(nn.Module):
    """Three linear layers with ReLU between them; inputs of any shape are flattened."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc = nn.Linear(100, classes)
        kaiming(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (n, classes), of inputs of shape (n, ...)."""
        hidden = functional.relu(self.fc1(inputs.flatten(1)))
        hidden = functional.relu(self.fc2(hidden))
        logits: Tensor = self.fc(hidden)
        return logits


def lenet_300_100(inputs: int = 784, classes: int = 10) -> LeNet:
    """Return LeNet-300-100 (LeCun et al. 1998), Kaiming-normal weights: 266,610 parameters, 266,200 of them prunable.

    Args:
        inputs: numbers an example.
        classes: outputs.

    >>> sum(p.numel() for p in lenet_300_100().parameters())
    266610
    """
    return LeNet(inputs, classes)

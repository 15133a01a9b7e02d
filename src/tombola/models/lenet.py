"""LeNet-300-100, the fully connected network."""

from __future__ import annotations

from torch import nn

from tombola.models.initialisation import check_sizes, kaiming


def lenet_300_100(inputs: int = 784, classes: int = 10) -> nn.Sequential:
    """Return LeNet-300-100 (LeCun et al. 1998), Kaiming-normal weights: 266,610 parameters, 266,200 of them prunable.

    Three linear layers with ReLU between them; inputs of any shape (n, ...) are flattened.

    Args:
        inputs: number of inputs per example.
        classes: number of outputs.

    >>> sum(p.numel() for p in lenet_300_100().parameters())
    266610
    """
    check_sizes(inputs=inputs, classes=classes)
    model = nn.Sequential()
    model.flatten = nn.Flatten()
    model.fc1 = nn.Linear(inputs, 300)
    model.relu1 = nn.ReLU()
    model.fc2 = nn.Linear(300, 100)
    model.relu2 = nn.ReLU()
    model.fc = nn.Linear(100, classes)
    kaiming(model)
    return model

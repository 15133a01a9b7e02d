"""Data sets: from a name to tensors in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tombola.datasets.cifar10 import cifar10
from tombola.datasets.dataset import Dataset, subset
from tombola.datasets.digits import digits
from tombola.datasets.idx import fashion_mnist, mnist
from tombola.datasets.image_folder import image_folder
from tombola.datasets.tiny_imagenet import tiny_imagenet
from tombola.errors import UserError, did_you_mean

__all__ = ["DATASETS", "Dataset", "load", "subset"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "tiny-imagenet": tiny_imagenet,
    "image-folder": image_folder,
}
"""The data sets by name. Each function takes the data directory and, by keyword, its own arguments.

To add a data set, write a function that returns a `Dataset`, and add it here.
"""

_SUBSET = ("train_per_class", "test_per_class")


def load(name: str, directory: str | Path | None = None, **arguments: Any) -> Dataset:
    """Return the data set called `name`.

    Args:
        name: one of `DATASETS`.
        directory: the data directory; None means `data/` in the current folder, then the user's cache folder.
        arguments: arguments of the data set's function. Every data set also accepts `train_per_class` and
            `test_per_class`, the number of examples of each class to keep (see `subset`).

    Raises:
        UserError: for an unknown name or argument, a missing argument, or data that cannot be read.

    >>> load("digits", train_per_class=5).train_inputs.shape
    torch.Size([50, 1, 8, 8])
    """
    if name not in DATASETS:
        raise UserError(f"there is no data set {name!r}: {did_you_mean(name, DATASETS)}")
    parameters = [*inspect.signature(DATASETS[name]).parameters.values()][1:]
    known = [parameter.name for parameter in parameters] + [*_SUBSET]
    for argument in arguments:
        if argument not in known:
            accepted = ", ".join(repr(each) for each in known)
            raise UserError(f"data set {name!r} has no argument {argument!r}: it accepts {accepted}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"data set {name!r} needs the argument {parameter.name!r}")
    limits = {key: arguments.pop(key) for key in _SUBSET if key in arguments}
    try:
        return subset(DATASETS[name](None if directory is None else Path(directory), **arguments), **limits)
    except OSError as error:  # such as a folder without read permission
        raise UserError(f"data set {name!r}: {error.filename or directory}: {error.strerror or error}") from error

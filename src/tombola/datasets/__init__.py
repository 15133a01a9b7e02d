"""Data sets: from a name to tensors in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tombola.datasets.cifar10 import cifar10
from tombola.datasets.dataset import Dataset, subset
from tombola.datasets.digits import digits
from tombola.datasets.idx import fashion_mnist, mnist
from tombola.datasets.image_folder import image_folder
from tombola.datasets.tiny_imagenet import tiny_imagenet
from tombola.errors import UserError, as_path, did_you_mean, expect, short, shorten

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

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's red, green and blue values, for pixels in 0..1, as torchvision has them."""


def load(name: str, directory: str | Path | None = None, **arguments: Any) -> Dataset:
    """Return the data set called `name`.

    Args:
        name: one of `DATASETS`.
        directory: the data directory; None means `data/` in the current folder, then the user's cache folder.
        arguments: arguments of the data set's function. Every data set also accepts `train_per_class` and
            `test_per_class`, the number of examples of each class to keep (see `subset`), and `normalisation`:
            "own" for the mean and standard deviation of the data set, the default, or "imagenet" for those of
            ImageNet, which open_lth uses for all images in colour.

    Raises:
        UserError: for an unknown name or argument, a missing argument, or data that cannot be read.

    >>> load("digits", train_per_class=5).train_inputs.shape
    torch.Size([50, 1, 8, 8])
    """
    expect(name, str, "name", "the name of a data set")
    folder = None if directory is None else as_path(directory, "directory")
    if name not in DATASETS:
        raise UserError(f"there is no data set {name!r}: {did_you_mean(name, DATASETS)}")
    parameters = [*inspect.signature(DATASETS[name]).parameters.values()][1:]
    known = [parameter.name for parameter in parameters] + [*_SUBSET, "normalisation"]
    for argument in arguments:
        if argument not in known:
            accepted = ", ".join(repr(each) for each in known)
            raise UserError(f"data set {name!r} has no argument {argument!r}: it accepts {accepted}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"data set {name!r} needs the argument {parameter.name!r}")
    limits = {key: arguments.pop(key) for key in _SUBSET if key in arguments}
    normalisation = arguments.pop("normalisation", "own")
    if normalisation not in ("own", "imagenet"):
        raise UserError(f"data set {name!r}: normalisation must be 'own' or 'imagenet', got {short(normalisation)}")
    try:
        data = subset(DATASETS[name](folder, **arguments), **limits)
        return data if normalisation == "own" else _normalise_as_imagenet(data)
    except OSError as error:  # such as a folder without read permission
        path = shorten(str(error.filename or directory), 300)
        raise UserError(f"data set {name!r}: {path}: {error.strerror or error}") from error


def _normalise_as_imagenet(data: Dataset) -> Dataset:
    if len(data.mean) != 3:
        raise UserError(f"data set {data.name!r}: normalisation = 'imagenet' needs images with 3 channels")
    mean, std = IMAGENET
    return replace(data, mean=mean, std=std)

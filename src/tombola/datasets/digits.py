"""The handwritten digits of scikit-learn: 1797 images of 8 x 8 in `digits.npz`, whose origin `digits.txt` states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tombola.datasets.dataset import Dataset, rank_in_class

MEAN, STD = (0.3049,), (0.3756,)
"""Of the train set, on the scale where a pixel lies in 0..1."""


def digits(directory: Path | None = None) -> Dataset:
    """Return the handwritten digits, as uint8 images of shape (1, 8, 8).

    The pixels 0..16 are spread over 0..255. Of each class every fourth example, in scikit-learn's order, is in the
    test set (445 of 1797), so that both sets are balanced and never change.

    Args:
        directory: not used, nothing is read from it.

    >>> digits().train_inputs.shape
    torch.Size([1352, 1, 8, 8])
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        pixels, numbers = arrays["images"], arrays["labels"]
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(numbers.astype(np.int64))
    is_test = rank_in_class(labels) % 4 == 3
    return Dataset(
        "digits",
        images[~is_test],
        labels[~is_test],
        images[is_test],
        labels[is_test],
        classes=tuple("0123456789"),
        mean=MEAN,
        std=STD,
    )

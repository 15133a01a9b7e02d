"""TinyImageNet: 200 classes of pictures of 64 x 64, from the official folder or zip."""

from __future__ import annotations

from pathlib import Path

from tombola.datasets.dataset import Dataset
from tombola.datasets.files import download, download_folder, folders, missing
from tombola.datasets.pictures import Listing, is_picture, picture_set
from tombola.datasets.tree import Tree
from tombola.errors import UserError

URL = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
SIZE = 64
ANNOTATIONS = "val/val_annotations.txt"
"""Which class each validation picture is of: its name, a tab, the class, and four numbers that are not used."""


def tiny_imagenet(directory: Path | None = None) -> Dataset:
    """Return TinyImageNet: 100,000 and 10,000 pictures, uint8 of shape (3, 64, 64).

    The test set is the official validation set, as the official test set comes without labels. A class is called by
    its WordNet number, and the classes are in the order of these. Mean and sd are those of the train set.

    Args:
        directory: holds the folder `tiny-imagenet-200` or `tiny-imagenet-200.zip`, itself or in a folder
            `tiny-imagenet`; where neither is there the zip is downloaded into that folder. None looks in `data/` and in
            the user's cache folder, and downloads into it.

    Raises:
        UserError: for files that are missing and cannot be downloaded, damaged pictures, and a folder that is not the
            official one.
    """
    source = _find(directory)
    home = directory if directory in source.parents else source.parent
    return picture_set("tiny-imagenet", source, home, ("train", "val", "wnids.txt"), list_official, SIZE)

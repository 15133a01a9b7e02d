"""TinyImageNet: 200 classes of images of 64 x 64, from the official folder or zip."""

from __future__ import annotations

from pathlib import Path

from tombola.datasets.dataset import Dataset
from tombola.datasets.files import find_or_download
from tombola.datasets.images import Listing, image_set, is_image
from tombola.datasets.tree import Tree
from tombola.errors import UserError, short

NAMES = ("tiny-imagenet-200", "tiny-imagenet-200.zip")
URL = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
SIZE = 64

CLASSES = "wnids.txt"
"""Names of the classes, one per line."""

ANNOTATIONS = "val/val_annotations.txt"
"""A line for each validation image: its name, a tab, its class, and four numbers that are not used."""


def tiny_imagenet(directory: Path | None = None) -> Dataset:
    """Return TinyImageNet: 100,000 and 10,000 images, uint8 of shape (3, 64, 64).

    The test set is the official validation set, as the official test set comes without labels. A class is called by
    its WordNet number, and the classes are in the order of these. Grey images become grey colours. Mean and std are
    those of the train set.

    Args:
        directory: holds the folder `tiny-imagenet-200` or `tiny-imagenet-200.zip`, itself or in a folder
            `tiny-imagenet`; where neither is there, the zip is downloaded into that folder. None looks in `data/` and
            in the user's cache folder, and downloads into it.

    Raises:
        UserError: for files that are missing and cannot be downloaded, damaged images, and a folder that is not like
            the official one.
    """
    source = find_or_download("tiny-imagenet", directory, NAMES, CLASSES, URL, SHA256)
    return image_set("tiny-imagenet", source, directory, ("train", "val", CLASSES), list_official, SIZE)


def list_official(tree: Tree) -> Listing:
    """List the images `train/<class>/images/*` and those of `val/images` with the classes that are noted for them.

    Raises:
        UserError: where these, the list of classes and the notes do not agree.
    """
    lines = _lines(tree, CLASSES)
    classes = tuple(sorted(lines))
    numbers = {each: number for number, each in enumerate(classes)}
    train = []
    for name in tree.names:
        match name.split("/"):
            case ["train", each, "images", _] if is_image(name):
                if each not in numbers:
                    raise UserError(f"{tree.path}: 'train' has the class {each!r}, which is not in {CLASSES!r}")
                train.append((name, numbers[each]))
    empty = sorted(set(range(len(classes))) - {number for _, number in train})
    if empty:
        raise UserError(f"{tree.path}: the class {short(classes[empty[0]])} in 'train' holds no image")
    images = {name for name in tree.names if name.startswith("val/images/") and is_image(name)}
    test = []
    for line in _lines(tree, ANNOTATIONS):
        file, each, *_ = f"{line}\t".split("\t")
        name = f"val/images/{file}"
        if each not in numbers or name not in images:
            lack = f"the image {short(name)} is missing" if each in numbers else f"{short(each)} is not a class"
            raise UserError(f"{tree.path}: {ANNOTATIONS!r} notes the class {short(each)} for {short(file)}, but {lack}")
        images.remove(name)
        test.append((name, numbers[each]))
    if images:
        raise UserError(f"{tree.path}: {ANNOTATIONS!r} notes no class for the image {min(images)!r}")
    return Listing(classes, sorted(train), sorted(test))


def _lines(tree: Tree, name: str) -> list[str]:
    """Return the lines of a text file that must be there."""
    if name not in tree.names:
        raise UserError(f"{tree.path}: {name!r} is missing, expected the official folder or zip of TinyImageNet")
    ((_, content),) = tree.contents([name])
    return [line.strip() for line in content.decode(errors="replace").splitlines() if line.strip()]

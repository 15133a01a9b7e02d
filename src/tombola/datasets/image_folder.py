"""Your own images, in the folders `train` and `test`, each with one folder for each class."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tombola.datasets.dataset import Dataset
from tombola.datasets.images import LARGEST_SIDE, Listing, image_set, is_image
from tombola.datasets.tree import Tree
from tombola.errors import UserError, short

OTHER_IMAGES = (".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif", ".heic", ".ppm")
"""Files that are images but are not read; passing over them in silence would leave out examples."""


def image_folder(directory: Path | None, *, path: str, size: int | None = None, channels: int = 3) -> Dataset:
    """Return the images `train/<class>/*` and `test/<class>/*`, PNG or JPEG, as uint8 of shape (channels, h, w).

    The examples are in the order of the classes' names, within a class in that of the files' names. Mean and std are
    those of the train set.

    Args:
        directory: the data directory; None means `data/` in the current folder, then the current folder.
        path: the folder, or a .tar, .tar.gz, .tar.xz or .zip archive of it, in the data directory or absolute.
        size: height and width in pixels. An image of another size is scaled until its shorter side fits and its
            longer side is cut to the middle. None takes the images as they are, all of one size.
        channels: 3 for colours (grey images become grey colours), 1 for grey. Transparency is ignored.

    Raises:
        UserError: for a folder that is not as described, images of different sizes where `size` is not given,
            images that are damaged, archives that are damaged or not safe, a cache that cannot be written.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"image-folder: path must be the name of a folder or an archive, got {short(path)}")
    if size is not None and (type(size) is not int or not 1 <= size <= LARGEST_SIDE):
        raise UserError(
            f"image-folder: size must be a whole number of pixels from 1 to {LARGEST_SIDE}, got {short(size)}"
        )
    if type(channels) is not int or channels not in (1, 3):
        raise UserError(f"image-folder: channels must be 3 (colours) or 1 (grey), got {short(channels)}")
    roots = [Path("data"), Path()] if directory is None else [directory]
    try:
        place = Path(path).expanduser()
    except RuntimeError:  # there is no such user
        raise UserError(f"image-folder: path {short(path)} is in the home of a user who is not known") from None
    for root in roots:
        source = root / place
        if source.exists():
            entries = ("train", "test")
            return image_set("image-folder", source, directory, entries, list_classes, size, True, channels)
    places = " or ".join(str(root.absolute()) for root in roots)
    raise UserError(f"image-folder: there is no folder or archive {short(str(path))} in {places}")


def list_classes(tree: Tree) -> Listing:
    """List the images `train/<class>/*` and `test/<class>/*`.

    Raises:
        UserError: for a missing set, an empty class, classes that differ between the sets, images elsewhere.
    """
    train, test = _split(tree, "train"), _split(tree, "test")
    for one, other, has, lacks in ((train, test, "train", "test"), (test, train, "test", "train")):
        if one.keys() - other.keys():
            raise UserError(
                f"{tree.path}: {has!r} has {_describe_classes(one.keys() - other.keys())}, which {lacks!r} has not"
            )
    classes = tuple(sorted(train))
    parts = ([(name, label) for label, each in enumerate(classes) for name in part[each]] for part in (train, test))
    return Listing(classes, *parts)


def _split(tree: Tree, split: str) -> dict[str, list[str]]:
    """Return the names of the images of each class."""
    classes: dict[str, list[str]] = {}
    for name in tree.names:
        top, *parts = name.split("/")
        if top != split:
            continue
        if name.lower().endswith(OTHER_IMAGES):
            raise UserError(f"{tree.path}: {name!r} is not a PNG or JPEG image: convert it, or take it away")
        if len(parts) == 2:
            classes.setdefault(parts[0], [])
        if is_image(name):
            if len(parts) != 2:
                raise UserError(
                    f"{tree.path}: the image {name!r} lies at the wrong depth, expected {split}/<class>/<image>"
                )
            classes[parts[0]].append(name)
    if not classes:
        raise UserError(f"{tree.path}: expected images as {split}/<class>/<image>, found no class in {split!r}")
    empty = {each for each, names in classes.items() if not names}
    if empty:
        raise UserError(f"{tree.path}: {_describe_classes(empty)} in {split!r} holds no image (.png, .jpg or .jpeg)")
    return classes


def _describe_classes(classes: Iterable[str]) -> str:
    """Return the first class for a sentence, and the number of the others."""
    first, *others = sorted(classes)
    return f"the class {first!r}" + (f" (and {len(others)} more)" if others else "")

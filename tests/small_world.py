"""What the commands of the documentation need to run in seconds: small studies, and data sets of a few random images."""

from __future__ import annotations

import io
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tombola.datasets.cifar10 import CLASSES, NAMES, RECORD, TEST, TRAIN
from tombola.datasets.idx import FILES


FEW = '["magnitude", "l1"]'


def shrink(study: str) -> str:
    """Return the text of a study with two levels, two importances and a few iterations for each training."""
    text = re.sub(r"^(importances = )\[\"magnitude\", \"l1\", \"l2\".*\]", rf"\1{FEW}", study, flags=re.MULTILINE)
    text = re.sub(r"^(data_seeds_for = )\[.*\]", rf"\1{FEW}", text, flags=re.MULTILINE)
    text = re.sub(r"^(data_seeds = )\[.*\]", r"\1[]", text, flags=re.MULTILINE)
    text = re.sub(r"^(levels = )\d+", r"\g<1>2", text, flags=re.MULTILINE)
    text = re.sub(r"^(train_per_class = |test_per_class = )\d+", r"\g<1>2", text, flags=re.MULTILINE)
    if re.search(r"^rewind = ", text, re.MULTILINE):
        text = re.sub(r"^(batch_size = )\d+", r"\g<1>8", text, flags=re.MULTILINE)
        text = re.sub(r"^(rewind = )\d+", r"\g<1>1", text, flags=re.MULTILINE)
    return re.sub(r"^(epochs = )\d+", r"\g<1>1", text, flags=re.MULTILINE)


def write_presets(presets: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Write small editions of presets and return their paths; those of convolutional networks have one seed."""
    folder.mkdir()
    for name, path in presets.items():
        text = shrink(path.read_text())
        seeds = "seeds = [0]" if re.search(r"^rewind = ", text, re.MULTILINE) else "seeds = [0, 1]"
        (folder / path.name).write_text(re.sub(r"^seeds = \[.*\]", seeds, text, flags=re.MULTILINE))
    return {name: folder / path.name for name, path in presets.items()}


def write_data(folder: Path) -> None:
    """Write MNIST, Fashion-MNIST and CIFAR-10, and CIFAR-10 as an archive of images, in their own formats."""
    random = np.random.default_rng(0)
    for name in ("mnist", "fashion-mnist"):
        (folder / name).mkdir(parents=True)
        for file, count in zip(FILES, (300, 300, 40, 40), strict=True):
            images = "images" in file
            array = (
                random.integers(0, 256, (count, 28, 28), np.uint8) if images else np.arange(count, dtype=np.uint8) % 10
            )
            head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name / file).write_bytes(head + array.tobytes())
    (folder / NAMES[0]).mkdir()
    for file in (*TRAIN, *TEST):
        records = random.integers(0, 256, (10, RECORD), np.uint8)
        records[:, 0] = np.arange(10)
        (folder / NAMES[0] / file).write_bytes(records.tobytes())
    with tarfile.open(folder / "cifar10-images.tar.xz", "w:xz") as archive:
        for label, split, number in np.ndindex(10, 2, 2):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
            member = tarfile.TarInfo(f"{('train', 'test')[split]}/{CLASSES[label]}/{number}.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)

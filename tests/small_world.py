"""What lets the commands of the documentation run in seconds: small studies, and data sets of a few random images."""

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

SMALL = {
    r"importances = \[.*\"l2\".*\]": 'importances = ["magnitude", "l1"]',
    r"data_seeds_for = \[.*\]": 'data_seeds_for = ["magnitude", "l1"]',
    r"data_seeds = \[.*\]": "data_seeds = []",
    r"levels = \d+": "levels = 2",
    r"epochs = \d+": "epochs = 1",
    r"(train|test)_per_class = \d+": r"\1_per_class = 2",
}
"""The fields of a study that decide how long it takes, and what they are here."""

REWOUND = {
    r"batch_size = \d+": "batch_size = 8",
    r"rewind = \d+": "rewind = 1",
}
"""Those of a study that rewinds to a later iteration than the first: its trainings have two or three here."""


def shrink(study: str) -> str:
    """Return the text of a study with two levels, two importances and a few iterations for each training."""
    for field, small in (SMALL | (REWOUND if "\nrewind = " in study else {})).items():
        study = re.sub(f"^{field}", small, study, flags=re.MULTILINE)
    return study


def write_presets(presets: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Write small editions of presets and return their paths; those of convolutional networks have one seed."""
    folder.mkdir()
    for path in presets.values():
        text = "score_examples = 64\n" + shrink(path.read_text())
        seeds = "seeds = [0]" if "\nrewind = " in text else "seeds = [0, 1]"
        (folder / path.name).write_text(re.sub(r"^seeds = \[.*\]", seeds, text, flags=re.MULTILINE))
    return {name: folder / path.name for name, path in presets.items()}


def write_data(folder: Path) -> None:
    """Write MNIST, Fashion-MNIST and CIFAR-10, and CIFAR-10 as an archive of images, in their own formats."""
    random = np.random.default_rng(0)
    for name in ("mnist", "fashion-mnist"):
        (folder / name).mkdir(parents=True)
        for file, count in zip(FILES, (300, 300, 40, 40), strict=True):
            labels = np.arange(count, dtype=np.uint8) % 10
            array = random.integers(0, 256, (count, 28, 28), np.uint8) if "images" in file else labels
            head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name / file).write_bytes(head + array.tobytes())
    (folder / NAMES[0]).mkdir()
    for file in (*TRAIN, *TEST):
        records = random.integers(0, 256, (2, RECORD), np.uint8)
        records[:, 0] = 3, 5
        (folder / NAMES[0] / file).write_bytes(records.tobytes())
    with tarfile.open(folder / "cifar10-images.tar.xz", "w:xz") as archive:
        for label, split, number in np.ndindex(10, 2, 2):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
            member = tarfile.TarInfo(f"{('train', 'test')[split]}/{CLASSES[label]}/{number}.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)

"""Archives, images, IDX files and data sets that are made to do harm: each is one sentence, at once."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import os
import resource
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from test_datasets import idx_bytes
from test_image_datasets import entries, make_folder, pack, write
from tombola.datasets import Dataset, decoder, idx, load, tree
from tombola.datasets.decoder import Form, decode
from tombola.datasets.image_folder import list_classes
from tombola.errors import UserError
from tombola.training.evaluation import evaluate

MUCH = 300 << 10
"""Kilobytes of memory that no refusal needs."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a current folder and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if the block needs much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH


@contextmanager
def one_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Suppress these exceptions if their text is one sentence."""
    try:
        yield
    except kinds as error:
        text = str(error)
    else:
        return
    assert "\n" not in text
    text.encode()


def refusal(path: Path, **arguments: Any) -> str:
    """Return the sentence with which a data set of images is refused; nothing of it is kept."""
    with little_memory(), pytest.raises(UserError) as caught:
        load("image-folder", path.parent, path=path.name, **arguments)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500 + len(str(path))
    assert entries(path.parent) == []
    said.encode()
    return said


# Archives that unpack to much


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member of a tar archive, which may claim any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(size: int) -> bytes:
    """Return gzipped zeros, of a whole number of times 64 MiB."""
    return gzip.compress(bytes(64 << 20), 1, mtime=0) * (size >> 26)


END = bytes(2 * tarfile.BLOCKSIZE)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: gzip.compress(header("train/cat/0.png", 20 << 30)) + zeros(4 << 30), "it unpacks to more than 0.5 GB"),
        (lambda: header("train/cat/0.png", 20 << 30), "damaged or cut short: it ends before a file that it lists"),
        (lambda: header("train/cat/0.png", 65 << 20) + END, "neither a folder nor a whole .tar"),
        (lambda: gzip.compress(header("x", 20 << 30, tarfile.XHDTYPE)) + zeros(1 << 30), "a header in it is too large"),
        (lambda: header("x", 20 << 30, tarfile.XHDTYPE), "a header in it is too large"),
        (lambda: header("x", 20 << 30, tarfile.XGLTYPE), "a header in it is too large"),
        (lambda: header("x", 20 << 30, tarfile.GNUTYPE_LONGNAME), "a header in it is too large"),
        (lambda: header("x", 20 << 30, tarfile.GNUTYPE_LONGLINK), "a header in it is too large"),
        (lambda: header("train/cat/0.png", -512), "'train/cat/0.png' in it has a size below 0"),
        (lambda: header("train/cat/0.png", -(1 << 40)), "'train/cat/0.png' in it has a size below 0"),
        (lambda: (header("x", 512, tarfile.XHDTYPE) + b"11 a=12345\n".ljust(512, b"\0")) * 5000, ""),
        (lambda: pax({"path": "train/" + "a" * 5000}), "has more than 4096 characters"),
        (lambda: pax({"comment": "a" * (2 << 20)}), "a header in it is too large"),
        (lambda: pax({"size": "-1"}), ""),
        (lambda: pax({"GNU.sparse.map": "a,b", "GNU.sparse.major": "0"}), ""),
    ],
)  # fmt: skip
def test_a_tar_archive_that_asks_for_much(tmp_path: Path, content: Callable[[], bytes], said: str) -> None:
    (tmp_path / "bad.tar").write_bytes(content())
    assert said in refusal(tmp_path / "bad.tar")


def pax(fields: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("train/cat/0.png")
        info.pax_headers = fields
        archive.addfile(info)
    return file.getvalue()


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("hidden_in", ["one member", "many members", "padding"])
def test_a_compressed_archive_that_unpacks_to_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes], hidden_in: str
) -> None:
    monkeypatch.setattr(tree, "ALWAYS_ALLOWED", 1 << 20)
    if hidden_in == "one member":
        content = header("train/cat/0.png", 2 << 20) + bytes(2 << 20) + END
    elif hidden_in == "many members":
        content = b"".join(header(f"train/cat/{number}.png", 1 << 16) + bytes(1 << 16) for number in range(32)) + END
    else:
        content = header("train/cat/0.png", 0) + END + bytes(2 << 20)
    (tmp_path / "bad.tar").write_bytes(compress(content))
    assert "bad.tar: this archive is refused, it unpacks to more than 0.0 GB" in refusal(tmp_path / "bad.tar")


def test_an_archive_may_unpack_to_twenty_times_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "ALWAYS_ALLOWED", 0)
    make_folder(tmp_path / "pets")
    for kind in ("tar", "tar.gz", "zip"):
        pack(tmp_path / "pets", kind)
        assert len(load("image-folder", tmp_path, path=f"pets.{kind}").train_inputs) == 8


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"train/cat/{name}.png", content)
    return file.getvalue()


def test_a_zip_archive_with_one_large_file(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(zipped(a=bytes(65 << 20)))
    assert "'train/cat/a.png' in it has 68157440 bytes, more than the 67108864" in refusal(tmp_path / "bad.zip")


def test_a_zip_archive_whose_files_are_the_same_bytes(tmp_path: Path) -> None:
    """Several entries of the directory name one file: a bomb that no nesting needs."""
    content = zipped(a=bytes(60 << 20))
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    count, directory = 100, content[start:end]
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, count * len(directory), start, 0)
    (tmp_path / "bad.zip").write_bytes(content[:start] + count * directory + tail)
    assert "this archive holds 'train/cat/a.png' 100 times" in refusal(tmp_path / "bad.zip")


def test_a_zip_archive_whose_files_are_large_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "ALWAYS_ALLOWED", 1 << 20)
    (tmp_path / "bad.zip").write_bytes(zipped(a=bytes(1 << 20), b=bytes(1 << 20)))
    assert "this archive is refused, it unpacks to more than 0.0 GB" in refusal(tmp_path / "bad.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_archive_of_a_method_without_a_limit(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", method) as archive:
        archive.writestr("train/cat/0.png", bytes(1000))
    assert "'train/cat/0.png' in it is compressed, but not by the method 'deflate'" in refusal(tmp_path / "bad.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("other", [-1, 1, 1 << 20])
def test_a_zip_archive_with_a_forged_size(tmp_path: Path, method: int, other: int) -> None:
    """The checksum is forged too, so that it is that of the bytes that there seem to be."""
    make_folder(tmp_path / "pets")
    victim = tmp_path / "pets" / "train" / "cat" / "0.png"
    victim.write_bytes(victim.read_bytes() + b"and more")
    raw, size = victim.read_bytes(), victim.stat().st_size
    archive = pack(tmp_path / "pets", "zip")
    if method == zipfile.ZIP_DEFLATED:
        with zipfile.ZipFile(archive, "w", method) as file:
            for path in sorted((tmp_path / "pets").rglob("*.png")):
                file.write(path, path.relative_to(tmp_path / "pets"))
    content = archive.read_bytes()
    checksum = struct.pack("<L", zlib.crc32(raw[:other] if other < 0 else raw))
    place = content.rindex(struct.pack("<L", zlib.crc32(raw)))
    forged = checksum + content[place + 4 : place + 8] + struct.pack("<L", size + other)
    archive.write_bytes(content[:place] + forged + content[place + 12 :])
    assert "pets.zip: this archive is damaged or cut short:" in refusal(archive)


def test_a_zip_archive_with_a_forged_name(tmp_path: Path) -> None:
    """Its directory calls an image a text, so that it would be left out, or hides it."""
    make_folder(tmp_path / "pets")
    archive = pack(tmp_path / "pets", "zip")
    content = archive.read_bytes()
    place = content.rindex(b"train/cat/1.png")
    for forged in (b"train/cat/1.txt", b"train/cat/.png1", b"train/cot/1.png"):
        archive.write_bytes(content[:place] + forged + content[place + len(forged) :])
        said = f"damaged or cut short: the name {forged.decode()!r} is not the one before that file"
        assert said in refusal(archive)
    archive.write_bytes(content.replace(b"train/cat/1.png", b"train/cat/1\0png"))  # where zipfile ends the name
    assert r"the name 'train/cat/1\x00png' in it has a null character" in refusal(archive)


def test_an_archive_of_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "pets")
    for kind in ("tar", "zip"):
        pack(tmp_path / "pets", kind)
    monkeypatch.setattr(tree, "MOST_FILES", 11)
    for name in ("pets", "pets.tar", "pets.zip"):
        assert f"{name}: it has more than 11 files" in refusal(tmp_path / name)


def test_links_that_lead_back_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "pets")
    for number in range(20):
        (tmp_path / "pets" / "train" / f"l{number}").symlink_to(".")
    monkeypatch.setattr(tree, "MOST_FILES", 1000)
    assert "pets: it has more than 1000 files" in refusal(tmp_path / "pets")


# Special files, and names that are no text


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{os.open(path.parent, os.O_RDONLY)}/{path.name}")


SPECIAL = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "socket": socket_at,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_the_place_of_an_archive(tmp_path: Path, kind: str) -> None:
    SPECIAL[kind](tmp_path / "bad.zip")
    said = refusal(tmp_path / "bad.zip")
    assert "it is not a regular file" in said or "there is no folder or archive" in said or "symbolic links" in said


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_the_place_of_an_image(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path / "pets")
    SPECIAL[kind](tmp_path / "pets" / "train" / "cat" / "a.png")
    said = refusal(tmp_path / "pets")
    assert "a.png" in said
    assert "it is not a regular file" in said or "symbolic links" in said


def test_an_image_of_many_bytes(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets")
    with (tmp_path / "pets" / "train" / "cat" / "a.png").open("wb") as file:
        file.truncate(20 << 30)
    assert "'train/cat/a.png' cannot be read: it has 21474836480 bytes" in refusal(tmp_path / "pets")


def test_an_image_of_many_pixels(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets")
    write(tmp_path / "pets" / "test" / "dog" / "0.png", encode_large(10_001, 10_000))
    said = "'test/dog/0.png' is 10001 x 10000 pixels, expected at most 100000000 pixels"
    assert said in refusal(tmp_path / "pets", size=6)


def test_a_first_image_of_many_pixels(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets")
    write(tmp_path / "pets" / "train" / "cat" / "0.png", encode_large(5000, 10))
    assert "'train/cat/0.png' is 5000 x 10 pixels, expected at most 4096 x 4096: 'size'" in refusal(tmp_path / "pets")


def encode_large(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    make_folder(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "cat").rename(os.fsdecode(bytes(tmp_path / "pets" / "train") + b"/c\xe9"))
    assert r"the name 'train/c\udce9/" in refusal(tmp_path / "pets")
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        archive.add(tmp_path / "pets", "pets")
    assert r"the name 'pets/train/c\udce9" in (said := refusal(tmp_path / "pets.tar"))
    assert said.endswith("is not UTF-8: rename the file")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("train/é/0.png", b"")
    content = (tmp_path / "pets.zip").read_bytes().replace("é".encode(), b"\xe9\xe9")
    (tmp_path / "pets.zip").write_bytes(content)
    assert "the names in it are not UTF-8: pack it again with names that are" in refusal(tmp_path / "pets.zip")


# IDX files


@pytest.mark.parametrize("compress", [lambda content: content, lambda content: gzip.compress(content, mtime=0)])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**31, 2, 2), (60_000, 28, 28), (3, 28, 28), (1, 1, 1)])
def test_an_idx_file_with_a_forged_header(
    tmp_path: Path, shape: tuple[int, ...], compress: Callable[[bytes], bytes]
) -> None:
    content = b"\0\0\x08\x03" + struct.pack(">3I", *shape) + bytes(2 * 28 * 28)
    (tmp_path / "file").write_bytes(compress(content))
    with little_memory(), pytest.raises(UserError, match=r"file: (cut short|too long): expected "):
        idx.read_idx(tmp_path / "file", 3)


@pytest.mark.parametrize(("claimed", "said"), [(28, "too long: expected 800 bytes"), (2**28, "more than the")])
def test_an_idx_file_that_unpacks_to_much(tmp_path: Path, claimed: int, said: str) -> None:
    (tmp_path / "file").write_bytes(
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", claimed, 28, 1)) + zeros(4 << 30)
    )
    with little_memory(), pytest.raises(UserError, match=said):
        idx.read_idx(tmp_path / "file", 3)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_the_place_of_an_idx_file(tmp_path: Path, kind: str) -> None:
    SPECIAL[kind](tmp_path / "file")
    with pytest.raises(UserError, match="file: cannot be read: it is not a regular file"):
        idx.read_idx(tmp_path / "file", 3)


# Predictions


def test_an_example_whose_outputs_are_nan_counts_as_wrong() -> None:
    inputs, labels = torch.eye(4), torch.tensor([0, 1, 2, 3])
    data = Dataset("four", inputs, labels, inputs, labels, ("a", "b", "c", "d"))
    assert evaluate(nn.Identity(), data)[0] == 1.0

    class Poor(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x[:, :1] == 1, math.nan, x)  # of the first example, for which class 0 is right

    assert evaluate(Poor(), data) == (0.75, None)


# Bytes that change


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 10**6), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 10**6), st.integers(1, 600)),
        st.tuples(st.just("double"), st.integers(0, 10**6), st.integers(1, 600)),
        st.tuples(st.just("ones"), st.integers(0, 10**6), st.integers(1, 12)),
    ),
    min_size=1,
    max_size=4,
)
"""What happens to a file: bytes are set, removed, repeated, or set to 255, at places that wrap around its end."""


def change(content: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    for kind, place, value in changes:
        place %= max(1, len(content))
        before, after = content[:place], content[place:]
        if kind == "set":
            content = before + bytes((value,)) + after[1:]
        elif kind == "cut":
            content = before + after[value:]
        elif kind == "double":
            content = before + after[:value] + after
        else:
            content = before + b"\xff" * len(after[:value]) + after[value:]
    return content


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Archives of one small data set of images, by kind."""
    folder = tmp_path_factory.mktemp("sound") / "pets"
    make_folder(folder, train=2, test=1)
    return {kind: pack(folder, kind).read_bytes() for kind in ("tar", "tar.gz", "zip")}


def read_all(path: Path) -> list[tuple[str, int, bytes]]:
    """Return the name, the label and the pixels of every image of an archive."""
    listed = tree.open_tree(path, ("train", "test"))
    found = list_classes(listed)
    labels = dict([*found.train, *found.test])
    form = Form(3, 6, 6)
    return sorted((name, labels[name], decode(content, form)) for name, content in listed.contents(list(labels)))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(changes=CHANGES)
def test_a_changed_archive_never_gives_other_images(
    tmp_path: Path, sound: dict[str, bytes], kind: str, changes: list[tuple[str, int, int]]
) -> None:
    path = tmp_path / f"pets.{kind}"
    path.write_bytes(sound[kind])
    expected = read_all(path)
    path.write_bytes(change(sound[kind], changes))
    with one_sentence(UserError, decoder.TroubleError), little_memory():
        assert read_all(path) == expected


@pytest.mark.parametrize("zipped", [False, True])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(changes=CHANGES)
def test_a_changed_idx_file_is_read_or_refused(
    tmp_path: Path, zipped: bool, changes: list[tuple[str, int, int]]
) -> None:
    """A gzipped one never gives other numbers; one that is not has no checksum, but never gives more or fewer."""
    array = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
    content = gzip.compress(idx_bytes(array), mtime=0) if zipped else idx_bytes(array)
    (tmp_path / "file").write_bytes(change(content, changes))
    with one_sentence(UserError), little_memory():
        found = idx.read_idx(tmp_path / "file", 3)
        assert np.array_equal(found, array) if zipped else found.size == (tmp_path / "file").stat().st_size - 16

import dataclasses
import errno
import io
import json
import os
import resource
import shutil
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from rich.console import Console

from processes import LONG
from tombola.cli import main
from tombola.datasets import cache as cache_module
from tombola.datasets import decoder, files, images, load, progress, tree
from tombola.datasets.cache import mean_and_std
from tombola.datasets.decoder import Form, TroubleError, decode
from tombola.errors import UserError

CIFAR = sys.modules["tombola.datasets.cifar10"]
TINY = sys.modules["tombola.datasets.tiny_imagenet"]
ARCHIVES = ("tar", "tar.gz", "tar.xz", "zip")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has a current folder and a cache folder of its own, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for module in (CIFAR, TINY):
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:9/{module.URL.rpartition('/')[2]}")


def pixels(seed, height=6, width=6, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encode(array, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, kind, **options)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make_folder(root, classes=("cat", "dog"), train=4, test=2):
    """Write PNG images and return them as arrays (n, 3, 6, 6) with their labels, train then test."""
    parts = []
    for split, count in (("train", train), ("test", test)):
        arrays = []
        for label, each in enumerate(classes):
            for index in sorted(range(count), key=str):
                arrays.append(pixels([label, index, count]))
                write(root / split / each / f"{index}.png", encode(arrays[-1]))
        parts += [np.stack(arrays).transpose(0, 3, 1, 2), np.repeat(np.arange(len(classes)), count)]
    return parts


def pack(folder, kind, top=""):
    """Make an archive of a folder, and return its path."""
    archive = folder.with_name(f"{folder.name}.{kind}")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name.name)  # another order than the data set's
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in names:
                file.write(folder / name, f"{top}{name}")
    else:
        with tarfile.open(archive, f"w:{kind[4:]}") as file:
            for name in names:
                file.add(folder / name, f"{top}{name}")
    return archive


def assert_holds(dataset, parts):
    train_inputs, train_labels, test_inputs, test_labels = (torch.from_numpy(part) for part in parts)
    assert torch.equal(dataset.train_inputs, train_inputs)
    assert torch.equal(dataset.train_labels, train_labels)
    assert torch.equal(dataset.test_inputs, test_inputs)
    assert torch.equal(dataset.test_labels, test_labels)


def entries(directory):
    """The names of the entries in the cache, whole or not."""
    return sorted(path.name for path in (directory / ".tombola-cache").glob("*") if path.is_dir())


# Folders and archives


def test_a_folder_is_read_as_it_is(tmp_path):
    parts = make_folder(tmp_path / "pets")
    data = load("image-folder", tmp_path, path="pets")
    assert_holds(data, parts)
    assert data.classes == ("cat", "dog")
    flat = parts[0].transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert data.mean == pytest.approx(flat.mean(1).tolist(), abs=1e-12)
    assert data.std == pytest.approx(flat.std(1).tolist(), abs=1e-12)


def test_the_stored_fingerprint_is_that_of_the_content(tmp_path):
    make_folder(tmp_path / "pets")
    data = load("image-folder", tmp_path, path="pets")
    assert dataclasses.replace(data).fingerprint == data.fingerprint


@pytest.mark.parametrize("top", ["", "./", "top/", "./top/"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_serves_as_well_as_the_folder(tmp_path, kind, top):
    make_folder(tmp_path / "pets")
    write(tmp_path / "pets" / "README.txt", b"not an image")
    write(tmp_path / "pets" / "train" / "cat" / ".hidden.png", b"not an image")
    pack(tmp_path / "pets", kind, top)
    folder = load("image-folder", tmp_path, path="pets")
    assert load("image-folder", tmp_path, path=f"pets.{kind}").fingerprint == folder.fingerprint


def test_an_archive_may_call_its_own_folder_by_no_name(tmp_path):
    """`tar.add(folder, "")` in Python does."""
    make_folder(tmp_path / "pets")
    with tarfile.open(tmp_path / "pets.tar", "w") as file:
        file.add(tmp_path / "pets", "")
    folder = load("image-folder", tmp_path, path="pets")
    assert load("image-folder", tmp_path, path="pets.tar").fingerprint == folder.fingerprint


@pytest.mark.parametrize("given_directory", ["data", "here/data", "here", "elsewhere"])
def test_where_the_folder_is_looked_for(tmp_path, given_directory):
    parts = make_folder(tmp_path / given_directory / "pets")
    directory = tmp_path / "data" if given_directory == "data" else None
    path = str(tmp_path / "elsewhere" / "pets") if given_directory == "elsewhere" else "pets"
    assert_holds(load("image-folder", directory, path=path), parts)
    assert len(entries(tmp_path / given_directory)) == 1


def test_the_folder_may_be_the_data_directory_itself(tmp_path):
    parts = make_folder(tmp_path / "data")
    for _ in range(2):
        assert_holds(load("image-folder", tmp_path / "data", path="."), parts)
    assert len(entries(tmp_path / "data")) == 1


def test_subsets_of_images(tmp_path):
    parts = make_folder(tmp_path / "pets")
    data = load("image-folder", tmp_path, path="pets", train_per_class=3, test_per_class=1)
    assert_holds(data, [parts[0][[0, 1, 2, 4, 5, 6]], parts[1][[0, 1, 2, 4, 5, 6]], parts[2][::2], parts[3][::2]])
    assert data.fingerprint != load("image-folder", tmp_path, path="pets").fingerprint


# What images become


def test_a_given_size_brings_all_images_to_it(tmp_path):
    make_folder(tmp_path / "pets")
    white = np.full((12, 30, 3), 255, np.uint8)
    white[:, :5] = white[:, 25:] = 0  # of what is cut away, all that no pixel of the rest is near to
    write(tmp_path / "pets" / "train" / "cat" / "0.png", encode(white))
    data = load("image-folder", tmp_path, path="pets", size=6)
    assert torch.equal(data.train_inputs[0], torch.full((3, 6, 6), 255, dtype=torch.uint8))
    assert torch.equal(data.train_inputs[1], torch.from_numpy(pixels([0, 1, 4])).permute(2, 0, 1))  # is of this size


def test_photographs_are_fitted_without_decoding_detail_that_does_not_show(monkeypatch):
    stripes = np.zeros((80, 80, 3), np.uint8)
    stripes[:, np.arange(80) // 10 % 2 == 1] = 255
    form = Form(3, 16, 16, fit=True)
    exact = np.frombuffer(decode(encode(stripes), form), np.uint8).astype(int)
    sizes, fit = [], ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda image, *rest: sizes.append(image.size) or fit(image, *rest))
    sooner = np.frombuffer(decode(encode(stripes, "JPEG", quality=95), form), np.uint8).astype(int)
    assert np.abs(sooner - exact).mean() < 12
    assert sizes == [(40, 40)]  # half the detail, and more than twice what is needed


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_all_kinds_of_images_become_colours(tmp_path, kind):
    image = Image.fromarray(np.kron(pixels(0, 2, 2) // 128 * 255, np.ones((8, 8, 1), np.uint8))).convert(kind)
    file = io.BytesIO()
    image.save(file, "JPEG" if kind == "CMYK" else "PNG", **({"quality": 100} if kind == "CMYK" else {}))
    got = np.frombuffer(decode(file.getvalue(), Form(3, 16, 16)), np.uint8).reshape(3, 16, 16).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - np.asarray(image.convert("RGB"))).max() <= (4 if kind == "CMYK" else 0)


def test_grey_images_on_request(tmp_path):
    make_folder(tmp_path / "pets")
    data = load("image-folder", tmp_path, path="pets", channels=1)
    assert data.train_inputs.shape == (8, 1, 6, 6)
    grey = np.asarray(Image.fromarray(pixels([0, 0, 4])).convert("L"))
    assert torch.equal(data.train_inputs[0, 0], torch.from_numpy(grey.copy()))
    assert load("image-folder", tmp_path, path="pets").train_inputs.shape == (8, 3, 6, 6)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_image_cut_anywhere_is_refused_or_whole(kind):
    content, form = encode(pixels(0, 16, 16), kind), Form(3, 16, 16)
    whole, refused = decode(content, form), 0
    for length in range(len(content)):
        try:
            assert decode(content[:length], form) == whole
        except TroubleError:
            refused += 1
    assert refused > len(content) - 25  # all but the last marker


@given(st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_mean_and_std_agree_with_numpy(values):
    array = np.array(values)
    (mean,), (std,) = mean_and_std([int(array.sum())], [int((array**2).sum())], len(values))
    assert mean == pytest.approx((array / 255).mean())
    assert std == pytest.approx(array.std() / 255 or 1.0)


# The cache


def forbid_decoding(monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoder, "work", decoded)


def change_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_about(entry, **changes):
    """Change the file and leave out its hash, as earlier versions wrote it."""
    path = entry / "about.json"
    content = json.loads(path.read_text()) | changes
    del content["hash"]
    path.write_text(json.dumps(content))


def replace_in_about(entry, old, new):
    path = entry / "about.json"
    content = path.read_text()
    assert content.count(old) == 1
    path.write_text(content.replace(old, new))


def replace_with_pipe(path):
    path.unlink()
    os.mkfifo(path)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    parts = make_folder(tmp_path / "pets")
    load("image-folder", tmp_path, path="pets")
    forbid_decoding(monkeypatch)
    assert_holds(load("image-folder", tmp_path, path="pets"), parts)
    (tmp_path / "moved").mkdir()
    for name in ("pets", ".tombola-cache"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert_holds(load("image-folder", tmp_path / "moved", path="pets"), parts)


def test_the_pixels_are_mapped_not_read(tmp_path):
    make_folder(tmp_path / "pets")
    data = load("image-folder", tmp_path, path="pets")
    assert f"{entries(tmp_path)[0]}/pixels" in Path("/proc/self/maps").read_text()
    data.train_inputs.zero_()  # changes this process's copy alone
    assert load("image-folder", tmp_path, path="pets").train_inputs.any()


def test_a_changed_folder_is_decoded_again_and_the_old_pixels_go(tmp_path):
    parts = make_folder(tmp_path / "pets")
    load("image-folder", tmp_path, path="pets")
    (before,) = entries(tmp_path)
    write(tmp_path / "pets" / "test" / "dog" / "9.png", encode(pixels(9)))
    data = load("image-folder", tmp_path, path="pets")
    added = pixels(9).transpose(2, 0, 1)[None]
    assert_holds(data, [*parts[:2], np.concatenate([parts[2], added]), np.append(parts[3], 1)])
    (after,) = entries(tmp_path)
    assert before != after


def test_a_file_of_equal_size_and_date_is_noticed(tmp_path):
    make_folder(tmp_path / "pets")
    path = tmp_path / "pets" / "train" / "cat" / "0.png"
    write(path, encode(np.full((6, 6, 3), 1, np.uint8), compress_level=0))
    os.utime(path, (1e9, 1e9))
    assert load("image-folder", tmp_path, path="pets").train_inputs[0, 0, 0, 0] == 1
    size = path.stat().st_size
    write(path, encode(np.full((6, 6, 3), 2, np.uint8), compress_level=0))
    os.utime(path, (1e9, 1e9))
    assert path.stat().st_size == size
    assert load("image-folder", tmp_path, path="pets").train_inputs[0, 0, 0, 0] == 2


def test_a_new_empty_class_is_noticed(tmp_path):
    make_folder(tmp_path / "pets")
    load("image-folder", tmp_path, path="pets")
    (tmp_path / "pets" / "train" / "fox").mkdir()
    with pytest.raises(UserError, match="'fox'"):
        load("image-folder", tmp_path, path="pets")


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "about.json").unlink(),
        lambda entry: (entry / "about.json").write_text("{"),
        lambda entry: (entry / "about.json").write_text("[]"),
        lambda entry: (entry / "about.json").write_text("{}"),
        lambda entry: (entry / "pixels").unlink(),
        lambda entry: os.truncate(entry / "pixels", 100),
        lambda entry: change_byte(entry / "pixels", 0),
        lambda entry: change_byte(entry / "pixels", -1),
        lambda entry: change_about(entry, train_labels=[1, 0, 0, 0, 1, 1, 1, 1]),
        lambda entry: change_about(entry, test_labels=[0, 0, 1, 0]),
        lambda entry: change_about(entry, test_labels=[0, 0, 1, 2]),
        lambda entry: change_about(entry, train_labels=[0, 0, 0, 0, 1, 1, 1], test_labels=[1, 0, 0, 1, 1]),
        lambda entry: replace_in_about(entry, '"cat"', '"bat"'),
        lambda entry: replace_in_about(entry, "image-folder", "image-holder"),
        lambda entry: change_about(entry, shape=[3, 4, 9]),
        lambda entry: change_about(entry, shape=[3, -6, -6]),
        lambda entry: change_about(entry, mean=[0.5, 0.5, 0.5]),
        lambda entry: change_about(entry, mean=["a", None, {}]),
        lambda entry: change_about(entry, classes=["cat", "dog", "fox"]),
        lambda entry: change_about(entry, train_labels=[10**30] * 8),
        lambda entry: change_about(entry, fingerprint="0" * 64),
        lambda entry: (entry / "about.json").write_text("[" * 10**6),
        lambda entry: replace_with_pipe(entry / "about.json"),
        lambda entry: replace_with_pipe(entry / "pixels"),
        lambda entry: change_about(entry, shape=[3, 0, 0]) or replace_with_pipe(entry / "pixels"),
        lambda entry: shutil.rmtree(entry) or entry.write_text("a file"),
        lambda entry: entry.rename(entry.with_suffix(".moved")) and entry.symlink_to("nowhere.moved"),
        lambda entry: (entry / "pixels").rename(entry / "p") and (entry / "pixels").symlink_to("/dev/zero"),
    ],
)
def test_a_damaged_entry_is_written_again_and_this_is_said(tmp_path, damage):
    parts = make_folder(tmp_path / "pets")
    before = load("image-folder", tmp_path, path="pets")
    damage(tmp_path / ".tombola-cache" / entries(tmp_path)[0])
    with pytest.warns(cache_module.CacheWarning, match="not those that were written; they are decoded again"):
        after = load("image-folder", tmp_path, path="pets")
    assert_holds(after, parts)
    assert after.fingerprint == before.fingerprint
    assert len(entries(tmp_path)) == 1
    load("image-folder", tmp_path, path="pets")  # without a warning


def test_entries_of_two_data_sets_exchanged_are_both_written_again(tmp_path):
    """As after a restore in which names were mixed up: each is whole, and is of the other data set."""
    parts = [make_folder(tmp_path / name, (name, "other")) for name in ("cats", "dogs")]
    for name in ("cats", "dogs"):
        load("image-folder", tmp_path, path=name)
    one, other = (tmp_path / ".tombola-cache" / name for name in entries(tmp_path))
    one.rename(tmp_path / "between")
    other.rename(one)
    (tmp_path / "between").rename(other)
    for name, part in zip(("cats", "dogs"), parts, strict=True):
        with pytest.warns(cache_module.CacheWarning, match="not those that were written"):
            dataset = load("image-folder", tmp_path, path=name)
        assert_holds(dataset, part)
        assert dataset.classes == (name, "other")


def test_the_command_line_notes_that_images_are_decoded_again(tmp_path, capsys):
    make_folder(tmp_path / "pets")
    Path("study.toml").write_text(
        'importances = ["l1"]\nseeds = [0]\nlevels = 1\n[task]\ndataset = "image-folder"\n'
        'dataset_arguments = { path = "pets" }\nmodel = "lenet_300_100"\n'
        "model_arguments = { inputs = 108, classes = 2 }\n[recipe]\nepochs = 1\nbatch_size = 2\n"
    )

    def said():
        assert main(["results", "study.toml", "--data", str(tmp_path)]) == 2  # nothing is stored
        return capsys.readouterr().err

    assert "note: " not in said()
    change_byte(tmp_path / ".tombola-cache" / entries(tmp_path)[0] / "pixels", 7)
    assert "are not those that were written; they are decoded again\n" in said()
    assert "note: " not in said()


def test_a_damaged_entry_in_a_directory_that_cannot_be_written_to_is_not_used(tmp_path):
    parts = make_folder(tmp_path / "data" / "pets")
    load("image-folder", tmp_path / "data", path="pets")
    (entry,) = entries(tmp_path / "data")
    change_byte(tmp_path / "data" / ".tombola-cache" / entry / "pixels", 5)
    (tmp_path / "data" / ".tombola-cache").chmod(0o555)
    assert_holds(load("image-folder", tmp_path / "data", path="pets"), parts)


def test_images_for_which_there_is_no_space_are_not_begun(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2000, 1000, 1000))
    with pytest.raises(UserError, match=r"0\.0 MB, cannot be written here: only 0\.0 MB of the disk are free"):
        load("image-folder", tmp_path, path="pets")
    assert entries(tmp_path) == []


def test_an_entry_of_the_first_version_is_read(tmp_path):
    parts = make_folder(tmp_path / "pets")
    before = load("image-folder", tmp_path, path="pets")
    (entry,) = entries(tmp_path)
    about = tmp_path / ".tombola-cache" / entry / "about.json"
    content = json.loads(about.read_text())
    content["sd"] = content.pop("std")
    del content["hash"]
    about.write_text(json.dumps(content))
    written = about.stat().st_mtime_ns
    after = load("image-folder", tmp_path, path="pets")
    assert_holds(after, parts)
    assert (after.std, after.fingerprint) == (before.std, before.fingerprint)
    assert about.stat().st_mtime_ns == written, "the entry is used, and not written again"


def test_entries_of_another_scheme_are_not_used(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets")
    load("image-folder", tmp_path, path="pets")
    forbid_decoding(monkeypatch)
    monkeypatch.setattr(cache_module, "SCHEME", cache_module.SCHEME + 1)
    with pytest.raises(AssertionError, match="decoded again"):
        load("image-folder", tmp_path, path="pets")


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    make_folder(tmp_path / "pets")
    load("image-folder", tmp_path, path="pets")
    (entry,) = entries(tmp_path)
    os.rename(tmp_path / ".tombola-cache" / entry, tmp_path / ".tombola-cache" / f"{entry}-abc.partial")
    load("image-folder", tmp_path, path="pets")
    assert entries(tmp_path) == [entry]


def test_a_data_directory_that_nobody_may_write_to_is_left_alone(tmp_path, monkeypatch):
    parts = make_folder(tmp_path / "data" / "pets")
    (tmp_path / "data").chmod(0o555)
    assert_holds(load("image-folder", tmp_path / "data", path="pets"), parts)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["pets"]
    assert len([path for path in (files.cache_folder() / "pictures").iterdir() if path.is_dir()]) == 1
    forbid_decoding(monkeypatch)
    assert_holds(load("image-folder", tmp_path / "data", path="pets"), parts)


def test_an_entry_in_a_directory_that_cannot_be_written_to_is_used(tmp_path, monkeypatch):
    parts = make_folder(tmp_path / "data" / "pets")
    load("image-folder", tmp_path / "data", path="pets")
    (tmp_path / "data" / ".tombola-cache").chmod(0o555)
    forbid_decoding(monkeypatch)
    assert_holds(load("image-folder", tmp_path / "data", path="pets"), parts)


def test_several_at_once_decode_once(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets")
    calls, work = [], decoder.work
    monkeypatch.setattr(decoder, "work", lambda *arguments: calls.append(1) or work(*arguments))
    prints = []
    threads = [
        threading.Thread(target=lambda: prints.append(load("image-folder", tmp_path, path="pets").fingerprint))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert len(prints) == 4
    assert len(set(prints)) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["pwrite", "posix_fallocate", "fsync", "truncate"])
def test_a_full_disk_gives_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts = make_folder(tmp_path / "pets")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(UserError) as caught:
            load("image-folder", tmp_path, path="pets")
    assert str(caught.value) == (
        f"{tmp_path / '.tombola-cache'}: the decoded images, 0.0 MB, cannot be written here: "
        "No space left on device; nothing of them was left"
    )
    assert entries(tmp_path) == []
    assert_holds(load("image-folder", tmp_path, path="pets"), parts)


def test_a_cache_that_is_a_file_is_named(tmp_path):
    make_folder(tmp_path / "pets")
    (tmp_path / ".tombola-cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"\.tombola-cache: decoded images cannot be kept here: File exists"):
        load("image-folder", tmp_path, path="pets")


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    make_folder(tmp_path / "pets")
    monkeypatch.setattr(decoder, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("image-folder", tmp_path, path="pets")
    assert entries(tmp_path) == []


def test_progress_is_shown_on_a_terminal_alone(tmp_path, monkeypatch, capfd):
    make_folder(tmp_path / "pets")
    load("image-folder", tmp_path, path="pets")
    assert capfd.readouterr() == ("", "")
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=shown, force_terminal=True))
    load("image-folder", tmp_path, path="pets", size=7)
    assert "decoding pets" in shown.getvalue()
    assert "12/12" in shown.getvalue()


# Several processes


@pytest.fixture
def _processes(monkeypatch):
    """Even few images are decoded by three processes."""
    monkeypatch.setattr(images, "FEW", 0)
    monkeypatch.setattr(images, "count_cores", lambda: 3)
    forbid_decoding(monkeypatch)  # by this one


@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_several_processes_do_the_same(tmp_path, kind):
    parts = make_folder(tmp_path / "pets", train=40)
    path = "pets" if kind == "folder" else pack(tmp_path / "pets", kind).name
    assert_holds(load("image-folder", tmp_path, path=path), parts)


@pytest.mark.usefixtures("_processes")
def test_several_processes_name_the_image_too(tmp_path):
    make_folder(tmp_path / "pets", train=40)
    write(tmp_path / "pets" / "train" / "dog" / "7.png", b"not an image")
    with pytest.raises(UserError, match=r"the image 'train/dog/7\.png' is not a PNG or JPEG image"):
        load("image-folder", tmp_path, path="pets")
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("_processes")
def test_a_disk_that_fills_up_in_another_process_is_told(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets", train=40)
    monkeypatch.setattr(cache_module, "reserve", lambda *_: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(UserError, match="cannot be written here: File too large; nothing of them was left"):
            load("image-folder", tmp_path, path="pets")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("_processes")
def test_a_process_that_dies_is_told(tmp_path, monkeypatch):
    make_folder(tmp_path / "pets")
    for path in (tmp_path / "pets").rglob("*.png"):
        write(path, encode(pixels(0, 200, 200)))  # more than a pipe takes
    monkeypatch.setattr(decoder, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="a process that decodes images ended early, with status 3"):
        load("image-folder", tmp_path, path="pets")
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("_processes")
def test_an_archive_damaged_in_the_middle_is_told(tmp_path):
    make_folder(tmp_path / "pets", train=40)
    archive = pack(tmp_path / "pets", "zip")
    content = bytearray(archive.read_bytes())
    content[len(content) // 3] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"pets\.zip: (this archive is damaged|the image)"):
        load("image-folder", tmp_path, path="pets.zip")
    assert entries(tmp_path) == []


# Bad folders


def put(path, content=b""):
    return lambda root: write(root / path, content)


def remove(path):
    return lambda root: shutil.rmtree(root / path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            put("train/dog/2.png", encode(pixels(0, 5, 7))),
            "'train/dog/2.png' is 7 x 5 pixels, expected 6 x 6 as 'train/",
        ),
        (put("test/cat/0.png", b""), "the image 'test/cat/0.png' is empty"),
        (put("train/cat/0.png", b"text"), "the image 'train/cat/0.png' is not a PNG or JPEG image"),
        (put("train/cat/1.jpg", encode(pixels(0), "GIF")), "'train/cat/1.jpg' is not a PNG or JPEG image"),
        (put("train/cat/3.png", encode(pixels(0))[:60]), "the image 'train/cat/3.png' is damaged or cut short"),
        (
            put("test/dog/1.png", encode(pixels(0, channels=1).astype(np.uint16) * 256)),
            "'test/dog/1.png' has pixels of",
        ),
        (put("train/fox/0.png", encode(pixels(0))), "'train' has the class 'fox', which 'test' has not"),
        (put("test/fox/0.png", encode(pixels(0))), "'test' has the class 'fox', which 'train' has not"),
        (lambda root: (root / "train" / "fox").mkdir(), "the class 'fox' in 'train' holds no image"),
        (put("test/fox/a.txt"), "the class 'fox' in 'test' holds no image"),
        (put("train/cat/0.gif"), "'train/cat/0.gif' is not a PNG or JPEG image: convert it"),
        (put("train/0.png"), "the image 'train/0.png' lies at the wrong depth, expected train/<class>/<image>"),
        (put("train/cat/more/0.png"), "the image 'train/cat/more/0.png' lies at the wrong depth"),
        (remove("test"), "expected images as test/<class>/<image>, found no class in 'test'"),
        (remove("train"), "expected images as train/<class>/<image>, found no class in 'train'"),
        (lambda root: (root / "train/cat/9.png").symlink_to("nowhere"), "9.png: cannot be read: No such file"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(tmp_path, change, said):
    make_folder(tmp_path / "pets")
    change(tmp_path / "pets")
    with pytest.raises(UserError) as caught:
        load("image-folder", tmp_path, path="pets")
    assert str(tmp_path / "pets") in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == []


def test_mixed_sizes_name_both_images_and_the_way_out(tmp_path):
    make_folder(tmp_path / "pets")
    write(tmp_path / "pets" / "train" / "dog" / "2.png", encode(pixels(0, 5, 7)))
    with pytest.raises(UserError, match=r"2\.png' is .* as 'train/cat/0\.png' is: 'size' brings all to one size"):
        load("image-folder", tmp_path, path="pets")
    assert load("image-folder", tmp_path, path="pets", size=6).input_shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": "cats"}, "there is no folder or archive 'cats' in "),
        ({"path": ""}, "path must be the name of a folder or an archive, got ''"),
        ({"path": 3}, "path must be the name of a folder or an archive, got 3"),
        ({"path": "a\0b"}, "there is no folder or archive 'a\\x00b' in "),
        ({"path": "a" * 10_000}, "File name too long"),
        ({"path": "~nobody-of-this-name/pets"}, "is in the home of a user who is not known"),
        ({"path": "pets", "size": 10**12}, "size must be a whole number of pixels from 1 to 4096, got 1000000000000"),
        ({"path": "pets", "size": 10**5000}, "from 1 to 4096, got a number of more than 4300 digits"),
        ({"path": "pets", "channels": 10**5000}, "1 (grey), got a number of more than 4300 digits"),
        ({"path": "pets", "normalisation": 10**5000}, "must be 'own' or 'imagenet', got a number of more than 4300"),
        ({"path": "pets", "size": 0}, "size must be a whole number of pixels from 1 to 4096, got 0"),
        ({"path": "pets", "size": True}, "size must be a whole number of pixels"),
        ({"path": "pets", "size": "32"}, "size must be a whole number of pixels"),
        ({"path": "pets", "channels": 4}, r"channels must be 3 (colours) or 1 (grey), got 4"),
    ],
)
def test_bad_arguments(tmp_path, arguments, said):
    make_folder(tmp_path / "pets")
    with pytest.raises(UserError) as caught:
        load("image-folder", tmp_path, **arguments)
    assert said in str(caught.value)


# Bad archives


def tar_with(path, *members):
    with tarfile.open(path, "w") as file:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "train"
            file.addfile(info)


def zip_with(path, *members):
    with zipfile.ZipFile(path, "w") as file:
        for name, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, b"train")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../escape.png", "the name '../escape.png' in it leads out of it"),
        ("train/../../escape.png", "the name 'train/../../escape.png' in it leads out of it"),
        ("/train/cat/0.png", "the name '/train/cat/0.png' in it leads out of it"),
        ("train\\..\\..\\escape.png", "leads out of it"),
        ("C:\\escape.png", "leads out of it"),
        ("..", "the name '..' in it leads out of it"),
    ],
)
def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path, name, said):
    tar_with(tmp_path / "bad.tar", ("train/cat/0.png", tarfile.REGTYPE), (name, tarfile.REGTYPE))
    zip_with(tmp_path / "bad.zip", ("train/cat/0.png", 0o100644), (name, 0o100644))
    for archive in ("bad.tar", "bad.zip"):
        with pytest.raises(UserError) as caught:
            load("image-folder", tmp_path, path=archive)
        assert f"{archive}: this archive is refused" in str(caught.value)
        assert said in str(caught.value)
    assert not list(tmp_path.rglob("escape*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_tar_archive_with_links_or_devices_is_refused(tmp_path, kind):
    tar_with(tmp_path / "bad.tar", ("train/cat/0.png", kind))
    with pytest.raises(UserError, match=r"bad.tar: this archive is refused, 'train/cat/0.png' in it is a link"):
        load("image-folder", tmp_path, path="bad.tar")


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o010666])
def test_a_zip_archive_with_links_or_devices_is_refused(tmp_path, mode):
    zip_with(tmp_path / "bad.zip", ("train/cat/0.png", mode))
    with pytest.raises(UserError, match=r"bad.zip: this archive is refused, 'train/cat/0.png' in it is a link"):
        load("image-folder", tmp_path, path="bad.zip")


def test_an_archive_that_holds_a_name_twice_is_refused(tmp_path):
    tar_with(tmp_path / "bad.tar", ("train/a/0.png", tarfile.REGTYPE), ("./train/a/0.png", tarfile.REGTYPE))
    with pytest.raises(UserError, match=r"bad.tar: this archive holds 'train/a/0.png' 2 times"):
        load("image-folder", tmp_path, path="bad.tar")


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_cut_anywhere_is_refused(tmp_path, kind):
    make_folder(tmp_path / "pets", train=1, test=1)
    archive = pack(tmp_path / "pets", kind)
    content = archive.read_bytes()
    ends = len(content) - 8 if kind != "tar" else len(content.rstrip(b"\0")) + 500  # a .tar ends with much padding
    for length in sorted({*range(0, ends, 97), ends - 1}):
        archive.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"pets.{kind}: "):
            tree.open_tree(archive, ("train", "test"))


@pytest.mark.parametrize("content", [b"", b"some text", b"PK", encode(pixels(0))])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "pets.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"pets\.tar: (neither a folder nor a whole|this archive is damaged)"):
        load("image-folder", tmp_path, path="pets.tar")


def test_a_folder_at_the_top_is_looked_into_only_where_it_holds_everything(tmp_path):
    make_folder(tmp_path / "pets" / "one")
    make_folder(tmp_path / "pets" / "two")
    pack(tmp_path / "pets", "zip")
    with pytest.raises(UserError, match="found no class in 'train'"):
        load("image-folder", tmp_path, path="pets.zip")


# TinyImageNet


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small folder of the official layout; yields it and what it holds."""
    monkeypatch.setattr(TINY, "SIZE", 6)
    root, classes = tmp_path / "tiny-imagenet-200", ("n02", "n01")
    write(root / "wnids.txt", "\n".join(classes).encode())
    write(root / "words.txt", b"n01\tgoldfish\nn02\tcrane\n")
    write(root / "test" / "images" / "test_0.JPEG", b"not looked at")
    train, notes, val = {}, [], {}
    for label, each in enumerate(sorted(classes)):
        for index in range(3):
            train[label, index] = pixels([label, index])
            write(root / "train" / each / "images" / f"{each}_{index}.JPEG", encode(train[label, index]))
        write(root / "train" / each / f"{each}_boxes.txt", b"")
    for index, label in enumerate((1, 0, 1, 1)):
        val[index] = pixels(index, channels=1)
        write(root / "val" / "images" / f"val_{index}.JPEG", encode(val[index]))
        notes.append(f"val_{index}.JPEG\tn0{label + 1}\t0\t0\t5\t5\n")
    write(root / "val" / "val_annotations.txt", "".join(reversed(notes)).encode())
    inputs = np.stack([train[key] for key in sorted(train)]).transpose(0, 3, 1, 2)
    grey = np.stack([val[index].squeeze() for index in range(4)])[:, None].repeat(3, 1)
    return root, [inputs, np.array([0, 0, 0, 1, 1, 1]), grey, np.array([1, 0, 1, 1])]


@pytest.mark.parametrize("where", ["tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200", "tiny-imagenet", ""])
def test_tiny_imagenet_is_read_from_its_folder(tmp_path, tiny, where):
    root, parts = tiny
    shutil.copytree(root, tmp_path / "data" / where)
    data = load("tiny-imagenet", tmp_path / "data")
    assert_holds(data, parts)
    assert data.classes == ("n01", "n02")
    assert (data.name, len(entries(tmp_path / "data"))) == ("tiny-imagenet", 1)


def test_tiny_imagenet_is_read_from_its_zip(tmp_path, tiny):
    root, parts = tiny
    folder = load("tiny-imagenet", tmp_path)
    pack(root, "zip", "tiny-imagenet-200/")
    shutil.rmtree(root)
    zipped = load("tiny-imagenet", tmp_path)
    assert_holds(zipped, parts)
    assert zipped.fingerprint == folder.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "wnids.txt").unlink(), "'wnids.txt' is missing, expected the official folder or zip"),
        (lambda root: (root / "val/val_annotations.txt").unlink(), "'val/val_annotations.txt' is missing, expected"),
        (lambda root: (root / "val/images/val_2.JPEG").unlink(), "but the image 'val/images/val_2.JPEG' is missing"),
        (put("val/images/val_9.JPEG"), "notes no class for the image 'val/images/val_9.JPEG'"),
        (put("wnids.txt", b"n01\nn02\n" + b"a" * 10**6), "the class 'aaaaaaaaa"),
        (put("val/val_annotations.txt", b"a" * 10**6), "notes the class '' for 'aaaaaaaaa"),
        (put("val/val_annotations.txt", b"\xff\0" * 10**6), "notes the class '' for '"),
        (
            lambda root: [(root / "wnids.txt").unlink(), os.mkfifo(root / "wnids.txt")],
            "cannot be read: it is not a regular",
        ),
        (
            put("val/val_annotations.txt", b"val_0.JPEG\tn07\n"),
            "notes the class 'n07' for 'val_0.JPEG', but 'n07' is not",
        ),
        (put("val/val_annotations.txt", b"val_0.JPEG"), "notes the class '' for 'val_0.JPEG', but '' is not a class"),
        (put("train/n07/images/n07_0.JPEG"), "'train' has the class 'n07', which is not in 'wnids.txt'"),
        (remove("train/n01"), "the class 'n01' in 'train' holds no image"),
        (put("train/n01/images/n01_0.JPEG", encode(pixels(0, 5, 6))), "n01_0.JPEG' is 6 x 5 pixels, expected 6 x 6"),
    ],
)
def test_a_folder_that_is_not_the_official_tiny_imagenet(tmp_path, tiny, change, said):
    root, _ = tiny
    change(root)
    if not (root / "wnids.txt").exists():
        pack(root, "zip", "tiny-imagenet-200/")
        shutil.rmtree(root)
    with pytest.raises(UserError) as caught:
        load("tiny-imagenet", tmp_path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600


def test_without_tiny_imagenet_the_sentence_says_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match=rf"put tiny-imagenet-200.zip into {tmp_path / 'tiny-imagenet'}$"):
        load("tiny-imagenet", tmp_path)


# CIFAR-10


def make_cifar10(folder, count=3):
    """Write small files of the official binary version; return what they hold."""
    random = np.random.default_rng(0)
    inputs, labels = random.integers(0, 256, (6 * count, 3, 32, 32), np.uint8), random.integers(0, 10, 6 * count)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for name, part, label in zip(names, np.split(inputs, 6), np.split(labels, 6), strict=True):
        records = np.concatenate([label.astype(np.uint8)[:, None], part.reshape(count, -1)], 1)
        write(folder / name, records.tobytes())
    write(folder / "batches.meta.txt", b"airplane\n")
    train = 5 * count
    return [inputs[:train], labels[:train], inputs[train:], labels[train:]]


@pytest.mark.parametrize("where", ["cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "cifar10", ""])
def test_cifar10_is_read_from_its_folder(tmp_path, where):
    parts = make_cifar10(tmp_path / "data" / where)
    data = load("cifar10", tmp_path / "data")
    assert_holds(data, parts)
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    assert data.classes[:2] == ("airplane", "automobile")
    assert dataclasses.replace(data).fingerprint == data.fingerprint


def test_cifar10_is_read_from_its_archive(tmp_path):
    parts = make_cifar10(tmp_path / "cifar-10-binary")
    pack(tmp_path / "cifar-10-binary", "tar.gz", "cifar-10-batches-bin/")
    shutil.rmtree(tmp_path / "cifar-10-binary")
    assert_holds(load("cifar10", tmp_path), parts)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz", "data_batch_1"])
def test_the_pickled_cifar10_is_refused(tmp_path, name):
    write(tmp_path / name, b"cos\nsystem\n(S'touch escape'\ntR.")
    with pytest.raises(UserError) as caught:
        load("cifar10", tmp_path)
    assert "pickles, which are never loaded: get the binary version" in str(caught.value)
    assert f"cifar-10-binary.tar.gz, and put it into {tmp_path}" in str(caught.value)
    make_cifar10(tmp_path / "cifar10")
    assert load("cifar10", tmp_path).name == "cifar10"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data_batch_3.bin", b"\0" * 3072, "'data_batch_3.bin' is cut short: expected records of 3073 bytes, got 3072"),
        ("test_batch.bin", b"", "'test_batch.bin' is cut short: expected records of 3073 bytes, got 0"),
        ("test_batch.bin", b"\0" * 3073 + b"\x0a" * 3073, "label 10 of example 1 is out of range, expected 0..9"),
        ("data_batch_5.bin", None, "'data_batch_5.bin' is missing, expected the binary version of CIFAR-10"),
    ],
)
def test_a_damaged_cifar10_is_named(tmp_path, name, content, said):
    make_cifar10(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load("cifar10", tmp_path)
    assert said in str(caught.value)
    assert entries(tmp_path) == []


def test_without_cifar10_the_sentence_says_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match=rf"put cifar-10-binary.tar.gz into {tmp_path / 'cifar10'}$"):
        load("cifar10", tmp_path)


def test_an_entry_is_json_and_raw_bytes(tmp_path):
    make_cifar10(tmp_path)
    data = load("cifar10", tmp_path)
    entry = tmp_path / ".tombola-cache" / entries(tmp_path)[0]
    assert sorted(path.name for path in entry.iterdir()) == ["about.json", "pixels"]
    about = json.loads((entry / "about.json").read_text())
    assert about["fingerprint"] == data.fingerprint
    together = torch.cat([data.train_inputs, data.test_inputs])
    assert (entry / "pixels").read_bytes() == together.numpy().tobytes()

import dataclasses
import functools
import gzip
import hashlib
import http.server
import itertools
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processes import LONG
from tombola import datasets
from tombola.datasets import Dataset, files, idx, load, subset
from tombola.datasets.dataset import rank_in_class
from tombola.errors import UserError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = idx.FILES


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has a current folder and a cache folder of its own, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("MNIST", "FASHION_MNIST"):
        source = dataclasses.replace(getattr(idx, name), url="http://127.0.0.1:9", elsewhere=())
        monkeypatch.setattr(idx, name, source)


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_idx(folder, train=12, test=4, size=5, seed=0, zipped=False):
    """Write four small IDX files and return their arrays, in the order of their names in `idx.FILES`."""
    random = np.random.default_rng(seed)
    arrays = []
    for count in (train, test):
        arrays += [random.integers(0, 256, (count, size, size), np.uint8), random.integers(0, 10, count, np.uint8)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(idx.FILES, arrays, strict=True):
        content = idx_bytes(array)
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return arrays


def assert_holds(dataset, arrays):
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    assert torch.equal(dataset.train_inputs, train_images.unsqueeze(1))
    assert torch.equal(dataset.test_inputs, test_images.unsqueeze(1))
    assert torch.equal(dataset.train_labels, train_labels.long())
    assert torch.equal(dataset.test_labels, test_labels.long())


# The registry


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="there is no data set 'mnits': did you mean 'mnist'"):
        load("mnits", None)


def test_an_unknown_argument_is_answered_with_those_accepted():
    with pytest.raises(UserError, match="'digits' has no argument 'sise': it accepts 'train_per_class'"):
        load("digits", None, sise=3)
    with pytest.raises(UserError, match="'image-folder' has no argument 'sise': it accepts 'path', 'size', 'channels'"):
        load("image-folder", None, sise=3)


def test_a_missing_argument_is_named():
    with pytest.raises(UserError, match="'image-folder' needs the argument 'path'"):
        load("image-folder", None)


def test_the_public_names_are_there():
    assert all(hasattr(datasets, name) for name in datasets.__all__)
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "tiny-imagenet", "image-folder"} <= datasets.DATASETS.keys()


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path):
    """By a process without root's right to look into every folder."""
    (tmp_path / "shut").mkdir(mode=0)
    code = "import sys, pathlib, tombola.datasets as d; d.load('mnist', pathlib.Path(sys.argv[1]))"
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*without, sys.executable, "-c", code, str(tmp_path / "shut")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONG)
    assert re.search(r"UserError: data set 'mnist': .*shut", done.stderr.splitlines()[-1])


# The digits


def test_digits_are_split_once_and_for_all():
    from sklearn.datasets import load_digits

    data = load("digits", None)
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((1352, 1, 8, 8), (445, 1, 8, 8))
    # A literal: whoever changes it changes what every study of the digits means, and its name in every store.
    assert data.fingerprint == "7a068d72e98b0510200074b650b7f8bd3d36057988973ae1dbaffbe7db662bef"
    together = torch.cat([data.train_inputs, data.test_inputs]).flatten(1).tolist()
    original = np.rint(load_digits().data * 255 / 16).tolist()
    assert sorted(together) == sorted(original)


def test_digits_are_balanced_and_their_mean_and_std_are_those_of_the_train_set():
    data = load("digits", None)
    shares = torch.bincount(data.test_labels) / torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert shares.min() > 0.24
    assert shares.max() < 0.26
    pixels = data.train_inputs.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),), abs=5e-5)
    assert data.std == pytest.approx((pixels.std(correction=0).item(),), abs=5e-5)


# Subsets


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_the_rank_in_a_class_counts_those_before(labels):
    expected = [labels[:index].count(label) for index, label in enumerate(labels)]
    assert rank_in_class(torch.tensor(labels)).tolist() == expected


def test_a_subset_keeps_the_first_of_each_class_in_their_order():
    whole = load("digits", None)
    part = load("digits", None, train_per_class=7, test_per_class=3)
    for split, count in (("train", 7), ("test", 3)):
        inputs, labels = getattr(whole, f"{split}_inputs"), getattr(whole, f"{split}_labels")
        kept = sorted(index for label in range(10) for index in (labels == label).nonzero()[:count].flatten().tolist())
        assert torch.equal(getattr(part, f"{split}_inputs"), inputs[kept])
        assert torch.equal(getattr(part, f"{split}_labels"), labels[kept])
    assert (part.mean, part.std) == (whole.mean, whole.std)
    assert part.fingerprint != whole.fingerprint
    assert subset(whole) is whole


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3"])
def test_a_subset_of_no_whole_number_is_refused(count):
    with pytest.raises(UserError, match="train_per_class: expected a whole number from 1"):
        load("digits", None, train_per_class=count)


def test_a_subset_larger_than_a_class_is_refused():
    with pytest.raises(UserError, match=r"test_per_class = 50 asks for more .* has 43 test examples of class '8'"):
        load("digits", None, test_per_class=50)


# What fits together


class WithoutData(torch.Tensor):
    """A tensor like those of FakeTensorMode, whose import takes seconds."""

    def numpy(self, *, force=False):
        raise RuntimeError


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_inputs": [1, 2]}, "data set 'small', train set: inputs and labels must be tensors"),
        ({"test_labels": None}, "test set: inputs and labels must be tensors"),
        ({"train_inputs": torch.zeros(0, 1, 4, 4)}, "train set: it holds no example"),
        (
            {"train_labels": torch.tensor([0])},
            r"expected int64 labels of shape (2,), one per input, got torch.int64 of shape (1,)",
        ),
        ({"train_labels": torch.tensor([0.0, 1.0])}, "got torch.float32 of shape (2,)"),
        (
            {"test_inputs": torch.zeros(1, 1, 4, 5, dtype=torch.uint8)},
            "its inputs are torch.uint8 (1, 4, 5), the train set's",
        ),
        (
            {"test_inputs": torch.zeros(1, 1, 4, 4)},
            "its inputs are torch.float32 (1, 4, 4), the train set's torch.uint8",
        ),
        ({"train_labels": torch.tensor([0, 2])}, "label 2 of example 1 is out of range, expected 0..1 for 2 classes"),
        ({"test_labels": torch.tensor([-1])}, "test set: label -1 of example 0 is out of range"),
        ({"mean": (0.5, 0.5)}, "expected 1 means and positive stds, one per channel"),
        ({"std": (0.0,)}, "expected 1 means and positive stds, one per channel"),
        ({"std": (float("nan"),)}, "std: expected one finite number per channel, got (nan,)"),
        ({"mean": torch.tensor([float("inf")])}, "mean: expected one finite number per channel, got tensor([inf])"),
        ({"mean": torch.tensor(0.5)}, "mean: expected one finite number per channel, got tensor(0.5000)"),
        ({"mean": 0.5}, "mean: expected one finite number per channel, got 0.5"),
        ({"mean": None}, "mean: expected one finite number per channel, got None"),
        ({"mean": "1"}, "mean: expected one finite number per channel, got '1'"),
        ({"std": ("a",)}, "std: expected one finite number per channel, got ('a',)"),
        ({"std": (10**400,)}, "std: expected one finite number per channel, got (1000000"),
        ({"name": None}, "data set None: its name must be a text of at most 200 characters"),
        ({"name": "x" * 10**6}, "its name must be a text of at most 200 characters"),
        ({"classes": 2}, "classes must be a list of the names of the classes, got 2"),
        ({"train_inputs": torch.tensor(1.0)}, "its inputs are a single number: the first dimension counts"),
        ({"train_inputs": torch.zeros(2, 0)}, "an example of shape (0,) holds no number"),
        ({"train_inputs": torch.zeros(2, 3, device="meta")}, "its inputs are on the device 'meta', where tensors"),
        ({"train_labels": torch.zeros(2, dtype=torch.int64, device="meta")}, "its labels are on the device 'meta'"),
        (
            {"train_inputs": torch.zeros(2, 3).to_sparse()},
            "train set: its inputs are sparse or nested: make them dense",
        ),
        ({"test_inputs": torch.zeros(2, 3).to_sparse()}, "test set: its inputs are sparse or nested: make them dense"),
        ({"train_labels": torch.tensor([0, 1]).to_sparse()}, "its labels are sparse or nested: make them dense"),
        ({"train_inputs": torch.zeros(2, 3, requires_grad=True)}, "its inputs require gradients: give tensor.detach()"),
        ({"train_inputs": torch.zeros(2, 3).to(torch.float8_e5m2)}, "inputs are torch.float8_e5m2, a type in which"),
        (
            {"train_inputs": torch.zeros(2, 3).as_subclass(WithoutData)},
            "its inputs have no data that can be read, as within FakeTensorMode",
        ),
        ({"classes": {"a", "b"}}, "classes must be a list of the names of the classes, got {"),
        ({"classes": {0: "a", 1: "b"}}, "classes must be a list of the names of the classes, got {0: 'a'"),
        ({"classes": np.array(2)}, "classes must be a list of the names of the classes, got array"),
        ({"classes": "ab"}, "classes must be a list of the names of the classes, got 'ab'"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, said):
    with pytest.raises(UserError) as caught:
        small(**changes)
    assert said in str(caught.value)


def test_one_example_has_a_fingerprint_however_it_is_stored():
    columns = torch.arange(16.0).view(1, 8, 2)
    one, other = (
        Dataset("one", inputs, torch.tensor([1]), inputs, torch.tensor([0]), ("a", "b"))
        for inputs in (columns[:, :1, 0], columns[:, :1, 0].clone())
    )
    assert one.fingerprint == other.fingerprint
    targets = Dataset("target", inputs := torch.rand(4, 2), inputs[:, 0], inputs[:1], inputs[:1, 1])
    assert len(targets.fingerprint) == 64


def test_classes_may_be_an_array_and_inputs_conjugate_views():
    inputs = torch.complex(torch.ones(2, 3), torch.ones(2, 3))
    plain, view = (
        small(train_inputs=each, test_inputs=each[:1], mean=(), std=(), classes=np.array(["a", "b"]))
        for each in (inputs, inputs.conj_physical().conj())
    )
    assert plain.classes == ("a", "b")
    assert view.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        (torch.uint8, (2, 4), "uint8 inputs with mean and std are images and have the shape"),
        (torch.int64, (2, 4), "mean and std are for uint8 images; leave them out"),
    ],
)
def test_inputs_of_another_kind_are_refused(dtype, shape, said):
    inputs = torch.zeros(shape, dtype=dtype)
    with pytest.raises(UserError, match=said):
        small(train_inputs=inputs, test_inputs=inputs[:1])


def test_ready_made_inputs_may_have_any_shape():
    inputs = torch.zeros(2, 3)
    assert small(train_inputs=inputs, test_inputs=inputs[:1], mean=(), std=()).input_shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 1, 2, 2)])
def test_inputs_that_are_not_finite_are_refused(dtype, value, split, shape):
    parts = {f"{each}_inputs": torch.zeros(shape, dtype=dtype) for each in ("train", "test")}
    labels = {f"{each}_labels": torch.zeros(5, dtype=torch.int64) for each in ("train", "test")}
    assert small(**parts, **labels, mean=(), std=()).input_shape == shape[1:]
    parts[f"{split}_inputs"][3:].view(-1)[-1] = value
    with pytest.raises(UserError) as caught:
        small(**parts, **labels, mean=(), std=())
    assert str(caught.value) == (
        f"data set 'small', {split} set: 1 of 5 examples have inputs that are NaN or infinite, the first is example 4: "
        "remove these examples or replace the values"
    )


@pytest.mark.parametrize(
    "kind", [torch.tensor, np.array, list, lambda values: tuple(np.float64(value) for value in values)]
)
def test_mean_and_std_may_be_tensors_or_arrays(kind):
    data = small(mean=kind([0.5]), std=kind([0.25]))
    assert (data.mean, data.std) == ((0.5,), (0.25,))
    assert all(type(value) is float for value in data.mean + data.std)
    assert data.fingerprint == small(mean=(0.5,), std=(0.25,)).fingerprint


def test_a_subset_of_a_huge_size_is_refused():
    for split, count in itertools.product(("train", "test"), (10**20, 10**5000)):
        with pytest.raises(UserError, match=f"{split}_per_class = .* asks for more examples than there are"):
            load("digits", **{f"{split}_per_class": count})


# The fingerprint


def small(**changes):
    fields = {
        "name": "small",
        "train_inputs": torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4),
        "train_labels": torch.tensor([0, 1]),
        "test_inputs": torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4),
        "test_labels": torch.tensor([0]),
        "classes": ("a", "b"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    return Dataset(**fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_inputs": torch.arange(1, 33, dtype=torch.uint8).view(2, 1, 4, 4)},
        {"train_inputs": torch.arange(32, dtype=torch.uint8).view(2, 1, 2, 8), "test_inputs": torch.zeros(1, 1, 2, 8)},
        {"train_labels": torch.tensor([1, 0])},
        {"test_inputs": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)},
        {"test_labels": torch.tensor([1])},
        {"classes": ("a", "b", "c")},
        {"mean": (0.4,)},
        {"std": (0.4,)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_fingerprint_tells_whatever_can_decide_a_training(changes):
    if "test_inputs" in changes:
        changes["test_inputs"] = changes["test_inputs"].to(torch.uint8)
    assert small(**changes).fingerprint != small().fingerprint


def test_the_fingerprint_is_the_same_for_the_same_content():
    assert small().fingerprint == small(name="other", classes=("c", "d")).fingerprint
    strided = torch.arange(64, dtype=torch.uint8).view(2, 1, 4, 8)[..., ::2] // 2
    assert small(train_inputs=strided).fingerprint == small().fingerprint
    floats = small(train_inputs=torch.ones(2, 3), test_inputs=torch.ones(1, 3), mean=(), std=())
    negated = replace(floats, train_inputs=torch._neg_view(-floats.train_inputs))
    assert negated.fingerprint == floats.fingerprint


def test_the_fingerprint_follows_a_change_in_place():
    data = small()
    before = data.fingerprint
    data.train_labels.add_(0)
    assert data.fingerprint == before
    data.test_labels.fill_(1)
    assert data.fingerprint != before


def test_what_draws_nothing_is_refused():
    with pytest.raises(UserError, match="drawn: expected batches that a function draws, or None, got 3"):
        small(drawn=3)


# IDX files


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), zipped=st.booleans(), seed=st.integers(0, 99))
def test_idx_files_come_back_as_they_were(tmp_path, shape, zipped, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    content = idx_bytes(array)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    assert np.array_equal(idx.read_idx(path, len(shape)), array)


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected it to begin with 00 00 08 03, got nothing"),
        (b"\x89PNG", "expected it to begin with 00 00 08 03, got 89 50 4e 47"),
        (idx_bytes(IMAGES)[:4], "cut short: expected a header of 16 bytes, got 4"),
        (idx_bytes(IMAGES)[:-1], r"cut short: expected 40 bytes for the shape \(2, 3, 4\), got 39"),
        (idx_bytes(IMAGES) + b"x", r"too long: expected 40 bytes for the shape \(2, 3, 4\), got more"),
        (idx_bytes(IMAGES.reshape(-1)), "expected it to begin with 00 00 08 03, got 00 00 08 01"),
        (idx_bytes(IMAGES).replace(b"\x08", b"\x0d", 1), "not an IDX file of unsigned bytes with 3 dimensions"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "cut short: expected 792281"),
        (idx_bytes(IMAGES[:0]), "it holds no example"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-9], "cut short: the gzip file ends before its end marker"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-8] + b"\0" * 8, "damaged gzip file: CRC check failed"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0) + b"x", "damaged gzip file: Not a gzipped file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, said):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz: .*{said}"):
        idx.read_idx(path, 3)


@pytest.mark.parametrize("zipped", [False, True])
def test_an_idx_file_cut_anywhere_is_refused(tmp_path, zipped):
    content = gzip.compress(idx_bytes(IMAGES), mtime=0) if zipped else idx_bytes(IMAGES)
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(UserError):
            idx.read_idx(tmp_path / "cut", 3)


def test_a_gzipped_idx_file_with_any_byte_changed_never_gives_other_numbers(tmp_path):
    content = gzip.compress(idx_bytes(IMAGES), mtime=0)
    refused = 0
    for place in range(len(content)):
        (tmp_path / "changed").write_bytes(content[:place] + bytes((content[place] ^ 0x10,)) + content[place + 1 :])
        try:
            assert np.array_equal(idx.read_idx(tmp_path / "changed", 3), IMAGES)
        except UserError:
            refused += 1
    assert refused > len(content) - 10  # all but the date and other remarks in the gzip header


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing: cannot be read: No such file"):
        idx.read_idx(tmp_path / "nothing", 3)


# MNIST and Fashion-MNIST


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_mnist_is_found_in_the_data_directory(tmp_path, folder, zipped):
    arrays = make_idx(tmp_path / "data" / folder, zipped=zipped)
    data = load("mnist", tmp_path / "data")
    assert_holds(data, arrays)
    assert (data.mean, data.std, data.classes) == ((0.1307,), (0.3081,), tuple("0123456789"))


def test_fashion_mnist_has_its_own_classes_mean_and_std(tmp_path):
    arrays = make_idx(tmp_path / "fashion-mnist")
    data = load("fashion-mnist", tmp_path)
    assert_holds(data, arrays)
    assert (data.mean, data.std, data.classes[9]) == ((0.286,), (0.353,), "Ankle boot")


def test_the_data_sets_own_folder_comes_first(tmp_path):
    make_idx(tmp_path, seed=1)
    arrays = make_idx(tmp_path / "mnist", seed=2)
    assert_holds(load("mnist", str(tmp_path)), arrays)


@pytest.mark.parametrize("folder", ["here/data", "here/data/mnist", "cache/tombola/mnist"])
def test_without_a_data_directory_the_current_folder_and_the_cache_are_looked_into(tmp_path, folder):
    arrays = make_idx(tmp_path / folder)
    assert_holds(load("mnist"), arrays)


def test_fashion_mnist_is_taken_from_another_packages_folder_where_it_is_not_in_the_data_directory(
    tmp_path, monkeypatch
):
    packaged = dataclasses.replace(idx.FASHION_MNIST, elsewhere=(tmp_path / "packaged",))
    monkeypatch.setattr(idx, "FASHION_MNIST", packaged)
    arrays = make_idx(tmp_path / "packaged", seed=1)
    assert_holds(load("fashion-mnist", tmp_path / "data"), arrays)
    arrays = make_idx(tmp_path / "data" / "fashion-mnist", seed=2)
    assert_holds(load("fashion-mnist", tmp_path / "data"), arrays)


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Fashion-MNIST is not here; to run: apt-get install dataset-fashion-mnist"
)
def test_debians_fashion_mnist_is_the_official_one(monkeypatch):
    monkeypatch.setattr(idx, "FASHION_MNIST", dataclasses.replace(idx.FASHION_MNIST, elsewhere=(DEBIAN,)))
    data = load("fashion-mnist")
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert data.fingerprint == "78c25b1cd30c1b66db0feddc7564fe24c049b53c01487df596d13138af198a17"
    digest = hashlib.sha256(data.train_labels.to(torch.uint8).numpy().data).hexdigest()
    assert digest == idx.FASHION_MNIST.labels_sha256


def test_files_of_the_other_data_set_are_refused(tmp_path, monkeypatch):
    arrays = make_idx(tmp_path)
    official = hashlib.sha256(arrays[1].tobytes()).hexdigest()
    monkeypatch.setattr(idx, "MNIST", dataclasses.replace(idx.MNIST, labels_sha256=official))
    assert_holds(load("mnist", tmp_path), arrays)
    with pytest.raises(UserError, match="these are the files of 'mnist', not of 'fashion-mnist'"):
        load("fashion-mnist", tmp_path)


def test_more_images_than_labels_are_refused(tmp_path):
    make_idx(tmp_path)
    (tmp_path / TEST_LABELS).write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte: 3 labels, but .*t10k-images-idx3-ubyte holds 4"):
        load("mnist", tmp_path)


def test_a_label_out_of_range_is_refused(tmp_path):
    make_idx(tmp_path)
    (tmp_path / TRAIN_LABELS).write_bytes(idx_bytes(np.array([0] * 11 + [10], np.uint8)))
    with pytest.raises(
        UserError, match=r"train-labels-idx1-ubyte: label 10 of example 11 is out of range, expected 0..9"
    ):
        load("mnist", tmp_path)


def test_test_images_of_another_size_are_refused(tmp_path):
    make_idx(tmp_path)
    (tmp_path / TEST_IMAGES).write_bytes(idx_bytes(np.zeros((4, 5, 6), np.uint8)))
    with pytest.raises(UserError, match="images are of 5 x 6 pixels, those of train-images-idx3-ubyte of 5 x 5"):
        load("mnist", tmp_path)


# Downloads


@pytest.fixture
def served(tmp_path):
    """A folder that a server of its own serves; yields the folder, its address and the names that were asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.strip("/"))
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def official(served, monkeypatch):
    """Four small files that pass for the official ones; yields their arrays, their folder and what was asked for."""
    folder, url, asked = served
    arrays = make_idx(folder, zipped=True)
    sha256 = {name: hashlib.sha256((folder / f"{name}.gz").read_bytes()).hexdigest() for name in idx.FILES}
    monkeypatch.setattr(idx, "MNIST", dataclasses.replace(idx.MNIST, url=url, sha256=sha256))
    return arrays, folder, asked


@pytest.mark.parametrize("given_directory", [True, False])
def test_missing_files_are_downloaded_once(tmp_path, official, given_directory):
    arrays, _, asked = official
    directory = tmp_path / "data" if given_directory else None
    assert_holds(load("mnist", directory), arrays)
    home = tmp_path / ("data" if given_directory else "cache/tombola") / "mnist"
    assert sorted(path.name for path in home.iterdir()) == sorted(f"{name}.gz" for name in idx.FILES)
    assert_holds(load("mnist", directory), arrays)
    assert len(asked) == 4


def test_only_the_missing_file_is_downloaded_and_the_users_own_stay(tmp_path, official):
    arrays, _, asked = official
    own = make_idx(tmp_path, seed=3)
    (tmp_path / TEST_LABELS).unlink()
    assert_holds(load("mnist", tmp_path), [*own[:3], arrays[3]])
    assert asked == [f"{TEST_LABELS}.gz"]


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content + b"x", lambda _: b""])
def test_a_download_with_another_checksum_leaves_nothing(tmp_path, official, damage):
    _, folder, _ = official
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"data set 'mnist' is not complete in .*does not match"):
        load("mnist", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_file_that_the_server_does_not_have_leaves_nothing(tmp_path, official):
    _, folder, _ = official
    (folder / f"{TRAIN_IMAGES}.gz").unlink()
    with pytest.raises(UserError, match=r"could not be downloaded .*404"):
        load("mnist", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_data_directory_that_cannot_be_made_is_named(tmp_path, official):
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"could not be downloaded into .*data"):
        load("mnist", tmp_path / "data")


def test_without_a_network_one_sentence_says_which_files_to_put_where(tmp_path):
    with pytest.raises(UserError) as caught:
        load("mnist", tmp_path / "data")
    said = str(caught.value)
    assert said.startswith(f"data set 'mnist' is not complete in {tmp_path / 'data' / 'mnist'}")
    assert said.endswith(f"put {', '.join(f'{name}.gz' for name in idx.FILES)} into {tmp_path / 'data' / 'mnist'}")
    assert "out of reach ([Errno 111] Connection refused)" in said
    assert "\n" not in said
    assert not (tmp_path / "data").exists()


def test_without_a_network_only_the_files_that_are_missing_are_asked_for(tmp_path):
    make_idx(tmp_path)
    (tmp_path / TEST_LABELS).unlink()
    with pytest.raises(UserError, match=f"put {TEST_LABELS}.gz into {tmp_path}$"):
        load("mnist", tmp_path)


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(idx, "MNIST", dataclasses.replace(idx.MNIST, url=url))
        with pytest.raises(UserError, match="out of reach"):
            load("mnist", tmp_path)
        silent.settimeout(LONG)
        silent.accept()[0].close()  # somebody has asked


def test_a_name_that_is_never_resolved_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECONDS_TO_ANSWER", 0.2)
    over, asked, answered = threading.Event(), threading.Event(), threading.Event()

    def never(*_: object, **__: object) -> None:
        asked.set()
        over.wait(LONG)
        answered.set()
        raise socket.gaierror("at last")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    try:
        with pytest.raises(UserError, match=r"127\.0\.0\.1 did not answer within 0.2 seconds"):
            load("mnist", tmp_path)
        assert not answered.is_set()
        assert asked.wait(LONG)
    finally:
        over.set()


# Without the extra `data`


def test_a_download_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"needs the extra 'data' .*: pip install 'tombola\[data\]'"):
        load("cifar10", tmp_path)
    assert files.cache_folder() == tmp_path / "cache" / "tombola"


def test_images_without_their_package_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "pets" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"decoding the images of .*pets needs the extra 'data'"):
        load("image-folder", tmp_path, path="pets")


def test_no_package_of_an_extra_is_imported_before_it_is_needed():
    code = "import sys, tombola; tombola.datasets.load('digits'); print({'PIL', 'pooch', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

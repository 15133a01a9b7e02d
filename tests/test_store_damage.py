"""Damage of every kind to every file of a store: each verb ends with a sentence, and no number is another's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import settings

from processes import LONG
from stores import InTurn, content, planner, results, study, write_study
from tombola.cli import main
from tombola.engine.run import run
from tombola.errors import DamagedResultError, UserError
from tombola.files import IrregularFileError, open_regular, read_regular, remove_path
from tombola.reporting.contents import gather
from tombola.store.check import list_damage
from tombola.store.checkpoints import checkpoint_from_bytes, checkpoint_to_bytes
from tombola.store.claims import Claims, _this_host
from tombola.store.documents import read_tensors
from tombola.store.names import canonical, name_of
from tombola.store.store import Store
from tombola.training.history import Checkpoint

STUDY = study(levels=2)
VERBS = (["results"], ["winners"], ["store", "ls"], ["store", "check"], ["store", "gc"])
RUN = "host.1.0123abcd"
CHECKPOINT = Checkpoint(17, {"w": torch.ones(3)}, {"0.momentum_buffer": torch.ones(3)}, torch.tensor([0.1, 0.2]))
FAR = 2**33
"""Bytes of a file that takes no room on the disk, and more memory than tests have if it is read."""


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    """End a test that would wait for ever, for example for the other end of a pipe."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(LONG))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study and its store, in which also a checkpoint is, and the files of a run that has died."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("damage")
    write_study(folder, STUDY)
    root = folder / "tombola-store"
    run(planner(root, STUDY), InTurn(last_first=False), lambda *_: None)
    key = name_of("a training that is not done")
    Store(root).checkpoints.put(key, checkpoint_to_bytes(CHECKPOINT, None, key))
    about = {"host": _this_host(), "name": "host", "pid": 1, "locked": True}
    (root / "runs" / RUN).write_bytes(canonical(about))
    os.link(root / "runs" / RUN, root / "claims" / key)
    return folder


class Said:
    """What a verb printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Say = Callable[..., Said]


@pytest.fixture
def root(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that may be damaged, in the folder with its study."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone after the test, with what the command line adds to the path
    return tmp_path / "tombola-store"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """A function that runs a verb in this process; an exception is the end of the test."""

    def call(*verb: str) -> Said:
        named = [] if verb in (("store", "ls"), ("store", "check")) else ["small.toml"]
        status = main([*verb, *named, "--format", "csv"])
        said = capsys.readouterr()
        assert status in (0, 1, 2)
        assert (status == 2) == said.err.startswith("tombola: "), said.err
        if status == 2:
            assert said.out == ""
            assert said.err.count("\n") == 1, "one sentence"
        return Said(status, said.out, said.err)

    return call


@pytest.fixture(scope="module")
def numbers(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """What the verbs that print results print of the undamaged store."""
    import io

    found = {}
    before = Path.cwd()
    copied = tmp_path_factory.mktemp("undamaged")
    shutil.copytree(whole, copied, dirs_exist_ok=True)
    try:
        os.chdir(copied)
        for verb in ("results", "winners"):
            with contextlib.redirect_stdout(io.StringIO()) as text:
                assert main([verb, "small.toml", "--format", "csv"]) == 0
            found[verb,] = text.getvalue()
    finally:
        os.chdir(before)
    return found


def files(root: Path) -> dict[str, Path]:
    """Return one file of each kind."""
    result = Store(root).results.folder(planner(root, STUDY).progress(planner(root, STUDY).chains[0]).trainings[-1].key)
    return {
        "store.json": root / "store.json",
        **{name: result / name for name in ("result.json", "weights.safetensors", "SHA256SUMS", "record.json")},
        "mask": min((root / "masks").glob("*/*")),
        "checkpoint": min((root / "checkpoints").iterdir()),
        "run": root / "runs" / RUN,
        "claim": min((root / "claims").iterdir()),
    }


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return what removes a file and makes something else in its place."""

    def damage(path: Path) -> None:
        path.unlink() if path.is_file() else shutil.rmtree(path)
        make(path)

    return damage


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": replaced(lambda path: path.write_bytes(b"")),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "a list": lambda path: path.write_bytes(b"[]"),
    "a list of names": lambda path: path.write_bytes(b'["host", "name", "pid", "locked", "store", "identity"]'),
    "another shape": lambda path: path.write_bytes(b'{"store": "1", "confirmed": 3, "seconds": "x", "pid": []}'),
    "no number": lambda path: path.write_bytes(b'{"store": NaN, "seconds": NaN, "pid": NaN}'),
    "nested deeply": lambda path: path.write_bytes(b"[" * 100_000),
    "nested": lambda path: path.write_bytes(b'{"store":' * 500 + b"1" + b"}" * 500),
    "a pipe": replaced(os.mkfifo),
    "a socket": replaced(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)),
    "a folder": replaced(os.mkdir),
    "a link to nothing": replaced(lambda path: path.symlink_to("nowhere")),
    "a loop of links": replaced(lambda path: path.symlink_to(path.name)),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "many zeros": replaced(lambda path: (path.write_bytes(b""), os.truncate(path, FAR))),
    "zeros behind it": lambda path: os.truncate(path, FAR),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "kind",
    [
        "store.json",
        "result.json",
        "weights.safetensors",
        "SHA256SUMS",
        "record.json",
        "mask",
        "checkpoint",
        "run",
        "claim",
    ],
)
def test_damage_to_a_file_ends_no_verb_and_changes_no_number(
    root: Path, say: Say, numbers: dict[tuple[str, ...], str], kind: str, how: str
) -> None:
    DAMAGE[how](files(root)[kind])
    checked = say("store", "check")
    if kind == "store.json":
        assert checked.status == 2
        assert checked.err.startswith("tombola: store ")
    else:
        named = {"run": "run", "claim": "claim", "mask": "mask", "checkpoint": "checkpoint", "record.json": "record"}
        assert checked.status == 1
        assert named.get(kind, "result") in [line.partition(",")[0] for line in checked.out.splitlines()[1:]]
    assert say("store", "ls").status == (2 if kind == "store.json" else 0)
    for verb in (("results",), ("winners",)):
        said = say(*verb)
        if said.status == 0:
            assert said.out == numbers[verb]
        else:
            assert "damaged" in said.err or "cannot be read" in said.err or "is not a store" in said.err
            assert kind in ("store.json", "result.json", "weights.safetensors", "SHA256SUMS")
    removed = say("store", "gc")
    if kind in ("record.json", "mask", "checkpoint", "run", "claim"):
        assert removed.status == 0
        assert say("results").out == numbers["results",]
        assert not list((root / "runs").iterdir()), "the run that has died is forgotten"
        assert not list((root / "claims").iterdir())


def flip(part: float) -> Callable[[Path], object]:
    """Return what changes one bit of a file, in the byte at this part of its length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(len(content) - 1, int(part * len(content)))] ^= 1
        path.write_bytes(content)

    return damage


def change_digit(path: Path) -> None:
    """Change the last digit of an accuracy; of a file that has none, the last digit of all."""
    content = path.read_bytes()
    found = re.search(rb'"test_accuracy":0\.[0-9]*([0-9])', content) or re.search(rb"(?s).*([0-9])", content)
    if found:
        digit = b"8" if found[1] == b"7" else b"7"
        path.write_bytes(content[: found.start(1)] + digit + content[found.end(1) :])


MORE: dict[str, Callable[[Path], object]] = {
    "another digit": change_digit,
    "missing": Path.unlink,
    **{f"a bit at {part}": flip(part) for part in (0, 0.3, 0.6, 0.9, 1)},
    "a byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "twice": lambda path: path.write_bytes(path.read_bytes() * 2),
    "reversed": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "UTF-16": lambda path: path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16")),
    "large numbers": lambda path: path.write_bytes(b'{"seconds": 1e999, "store": 1%s}' % (b"0" * 5000)),
    "null": lambda path: path.write_bytes(b"null"),
    "a folder that is not empty": replaced(lambda path: (path.mkdir(), (path / "x").touch())),
    "its own process": replaced(lambda path: path.symlink_to("/proc/self/mem")),
}


def test_more_damage_to_a_file_changes_no_number(root: Path, say: Say, numbers: dict[tuple[str, ...], str]) -> None:
    """Another digit, and kinds of damage drawn by chance: the same each time, or all with the profile "explore"."""
    for kind, path in files(root).items():
        sound = path.read_bytes()
        drawn = random.Random(kind).sample(sorted(MORE), min(settings.default.max_examples // 50, len(MORE)))
        for how in ("another digit", *drawn):
            MORE[how](path)
            said = say("results")
            assert said.out == ("" if said.status == 2 else numbers["results",]), f"{kind}: {how}"
            assert said.status == 0 or kind in ("store.json", "result.json", "weights.safetensors", "SHA256SUMS")
            assert say("store", "check").status in (0, 1, 2)
            remove_path(path)
            path.write_bytes(sound)
    assert say("results").out == numbers["results",]


@pytest.mark.parametrize(
    "kind", ["store.json", "result.json", "weights.safetensors", "SHA256SUMS", "record.json", "mask", "run", "claim"]
)
def test_a_search_over_damage_finds_the_same_ticket(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With kinds of damage drawn by chance: what is damaged is trained or computed again."""
    monkeypatch.setattr("tombola.workbench.find.open_workers", lambda *_: InTurn(last_first=False))
    path = files(root)[kind]
    sound = path.read_bytes()
    search = ["find", "small.toml", "--within", "20", "--format", "csv"]
    assert main(search) == 0
    expected = capsys.readouterr().out
    draw = random.Random(kind)
    for how in draw.sample(sorted(DAMAGE), min(settings.default.max_examples // 50, len(DAMAGE))):
        remove_path(path)
        path.write_bytes(sound)
        DAMAGE[how](path)
        status = main(search)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        if kind == "store.json":
            assert (status, said.out) == (2, "")
            assert said.err.splitlines()[-1].startswith("tombola: store tombola-store: ")
        else:
            assert (status, said.out) == (0, expected)


def test_damaged_metrics_are_found_and_none_is_anothers(root: Path) -> None:
    store, path = Store(root), files(root)["result.json"].with_name("metrics.json")
    key, other = path.parent.name, next(each for each in store.results if each != path.parent.name)
    found = {"test": {"f1": 0.5}}
    for each in (key, other):
        store.results.add_metrics(each, found)
    sound, others = path.read_bytes(), store.results.folder(other).joinpath("metrics.json").read_bytes()
    assert store.results.metrics(key) == found
    forged = json.dumps({"hash": name_of([key, found]), "metrics": {"test": {"f1": 0.9}}}).encode()
    for damage in (*DAMAGE.values(), lambda path: path.write_bytes(others), lambda path: path.write_bytes(forged)):
        damage(path)
        assert store.results.metrics(key) == {}
        assert [(one.kind, one.name) for one in list_damage(store) if one.kind != "checkpoint"] == [("metrics", key)]
        path.unlink() if not path.is_dir() or path.is_symlink() else path.rmdir()
        path.write_bytes(sound)
    assert store.results.metrics(key) == found


def test_a_collection_for_a_study_of_which_the_store_has_nothing_is_refused(root: Path, say: Say) -> None:
    before = list(Store(root).entries())
    said = say("store", "gc", "--recipe.lr", "0.01")
    assert said.status == 2
    assert "small.toml: store tombola-store has nothing of this study" in said.err
    assert list(Store(root).entries()) == before


def test_results_whose_record_is_lost_are_kept_by_a_collection(root: Path, say: Say) -> None:
    """They may be those of another analysis: nobody knows."""
    paths = [folder / "record.json" for folder in results(root)]
    for path in paths:
        path.write_bytes(b"")
    assert say("store", "gc", "--levels", "1").status == 0
    assert [folder / "record.json" for folder in results(root)] == paths


FOLDERS = ["results", "masks", "checkpoints", "runs", "claims", "tmp", "results/??", "results/??/*", "masks/??"]


@pytest.mark.parametrize("how", ["empty", "a pipe", "a loop of links", "a link to nothing"])
@pytest.mark.parametrize("pattern", FOLDERS)
def test_what_lies_in_the_place_of_a_folder_ends_no_verb(
    root: Path, say: Say, numbers: dict[tuple[str, ...], str], pattern: str, how: str
) -> None:
    place = max(root.glob(pattern))
    DAMAGE[how](place)
    checked = say("store", "check")
    assert checked.status == 1
    kind = "result" if pattern == "results/??/*" else "folder"
    assert kind in [line.partition(",")[0] for line in checked.out.splitlines()[1:]]
    assert say("store", "ls").status == 0
    for verb in (("results",), ("winners",)):
        said = say(*verb)
        if pattern.startswith("results"):
            assert said.status == 2
            assert "is damaged" in said.err or "is not a folder" in said.err
        else:
            assert said.out == numbers[verb]
    say("store", "gc")


def tell_again(folder: Path, text: bytes) -> None:
    """Write a `result.json`, and its checksum with it."""
    (folder / "result.json").write_bytes(text)
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in
            ("result.json", "weights.safetensors")]  # fmt: skip
    (folder / "SHA256SUMS").write_text("".join(sums))


SHAPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda document: [document],
    "text": lambda document: "text",
    "nothing": lambda document: None,
    "no identity": lambda document: {name: part for name, part in document.items() if name != "identity"},
    "a history of text": lambda document: document | {"history": "0.9"},
    "an accuracy of text": lambda document: document | {"history": document["history"] | {"test_accuracy": "0.9"}},
    "a mask of one number": lambda document: document | {"mask": 3},
    "a shape of text": lambda document: document | {"mask": [["0.weight", "64"]]},
    "a negative shape": lambda document: document | {"mask": [["0.weight", [-64, 16]]]},
    "weights of no hash": lambda document: document | {"weights": "abc"},
    "another seed": lambda document: document | {"identity": document["identity"] | {"seed": 99}},
    "nested deeply": lambda document: document | {"identity": {"of": json.loads("[" * 200 + "]" * 200)}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_result_of_another_shape_is_damaged_though_its_checksum_is_right(root: Path, say: Say, shape: str) -> None:
    path = files(root)["result.json"]
    tell_again(path.parent, json.dumps(SHAPES[shape](json.loads(path.read_text()))).encode())
    for verb in ("results", "winners"):
        said = say(verb)
        assert said.status == 2
        assert f"result {path.parent.name[:12]} is damaged" in said.err
    assert say("store", "ls").status == 0
    assert f"result,{path.parent.name}," in say("store", "check").out


OF_OTHER_WEIGHTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "hash": lambda document: document | {"weights": "0" * 64},
    "shape": lambda document: document | {"mask": [[name, shape[::-1]] for name, shape in document["mask"]]},
    "numbers": lambda document: document | {"alive": dict.fromkeys(document["alive"], 1)},
}


@pytest.mark.parametrize("part", OF_OTHER_WEIGHTS)
def test_weights_that_are_not_those_of_the_document_are_damage_though_the_checksums_are_right(
    root: Path, say: Say, part: str
) -> None:
    path = files(root)["result.json"]
    tell_again(path.parent, json.dumps(OF_OTHER_WEIGHTS[part](json.loads(path.read_text()))).encode())
    trained = Store(root).results.get(path.parent.name)
    assert trained is not None
    with pytest.raises(DamagedResultError):
        trained.weights.load()
    assert f"result,{path.parent.name}," in say("store", "check").out


RECORDS: list[Any] = [
    [],
    3,
    None,
    {"confirmed": 3},
    {"confirmed": [3]},
    {"confirmed": [{}]},
    {"contradicted": [{"when": "2026", "machine": 3}]},
    {"seconds": "x"},
    {"seconds": -1},
    {"seconds": True},
    {"seconds_per_iteration": 1e300, "iterations": 10**30},
    {"finished": 3},
    {"colour": math.nan},
    {"colour": "\ud800"},
    {"finished": "\ud800"},
    {"finished": "\x1b[31m"},
    {"confirmed": [{"when": "\x9b31m"}]},
    {"iterations": 0.5},
    {"device": []},
    {"machine": []},
    {"machine": {"vendor": ["GenuineIntel"]}},
    {"machine": {"vendor": "a\nb"}},
    {"machine": {"other\x07": 3}},
    {"machine": {"versions": {"torch": ["2.6.0"]}}},
    {"machine": {"other": {"more": {"more": 3}}}},
    {"reinit": None},
    {"reinit": []},
    {"reinit": {"level": 1, "draws": 1001, "importances": ["magnitude", "l1"]}},
    {"search": [{"importance": "l1", "path": [1]}] * 1001},
    {"reinit": {"level": -1, "draws": 1, "importances": ["magnitude", "l1"]}},
    {"reinit": {"level": 1, "draws": 1, "importances": "magnitude"}},
    {"further": {"verb": "controls"}},
    {"further": {"verb": "controls", "of": [], "draws": 10**12}},
    {"further": {"verb": "early", "of": [], "iterations": [-1]}},
    {"further": {"verb": "transfer", "of": [], "trainings": [{"key": "x"}]}},
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record)[:60])
def test_a_record_of_another_shape_is_lost(root: Path, record: Any) -> None:
    path = files(root)["record.json"]
    path.write_text(json.dumps(record))
    store = Store(root)
    assert store.results.record(path.parent.name) == {}
    assert [(one.kind, one.name) for one in list_damage(store)] == [("record", path.parent.name)]


def test_a_record_that_is_lost_ends_no_verb(root: Path, say: Say, numbers: dict[tuple[str, ...], str]) -> None:
    path = files(root)["record.json"]
    path.write_text(json.dumps(RECORDS[0]))
    store = Store(root)
    assert say("results").out == numbers["results",]
    assert "the kind of machine is not recorded for 1 of" in say("results").err
    assert say("store", "ls").status == 0
    assert f"record,{path.parent.name},it is lost: " in say("store", "check").out
    contents = gather(planner(root, STUDY), "s", ["s"])
    assert contents.trainings_left == 0
    store.results.confirm(path.parent.name, {"when": "now"})
    assert store.results.record(path.parent.name) == {"confirmed": [{"when": "now"}]}
    assert [one for one in list_damage(store) if one.kind == "record"] == []


def test_records_of_other_versions_are_kept(root: Path) -> None:
    record = {"finished": "2026", "seconds": 1, "colour": ["red"], "machine": {"vendor": "x", "cores": 4, "numa": None}}
    path = files(root)["record.json"]
    path.write_text(json.dumps(record))
    assert Store(root).results.record(path.parent.name) == record


# exchanged


def test_two_results_exchanged_are_both_damaged_and_are_repeated(root: Path, say: Say) -> None:
    before = content(root)
    for one, other in combinations(results(root), 2):
        swap(one, other)
        said = say("results")
        assert said.status == 2
        assert "is damaged (it is the result of another training, " in said.err
        checked = say("store", "check")
        assert checked.status == 1
        assert checked.out.splitlines()[1:] == [
            f'result,{key.name},"it is the result of another training, {held.name[:12]}"'
            for key, held in sorted([(one, other), (other, one)])
        ]
        swap(one, other)
        assert say("store", "check").status == 0
    swap(one, other)
    status = run(planner(root, STUDY), InTurn(last_first=False), lambda *_: None)
    assert status.done >= 1
    assert len([note for note in status.notes if "is the result of another training" in note]) == 2
    assert {name: data for name, data in content(root).items() if not name.startswith(("runs", "claims"))} == {
        name: data for name, data in before.items() if not name.startswith(("runs", "claims"))
    }


def test_two_masks_exchanged_are_both_computed_again(root: Path, say: Say, numbers: dict[tuple[str, ...], str]) -> None:
    before = content(root)
    masks = sorted((root / "masks").glob("*/*"))
    assert len(masks) > 2
    for one, other in combinations(masks, 2):
        swap(one, other)
        assert Store(root).masks.get(one.stem) is None
        checked = say("store", "check")
        assert checked.status == 1
        assert checked.out.splitlines()[1:] == [
            f'mask,{mask.stem},"it holds the mask of another name, {held.stem[:12]}"'
            for mask, held in sorted([(one, other), (other, one)])
        ]
        for verb in (("results",), ("winners",)):
            assert say(*verb).out == numbers[verb]
        assert content(root) == before, "they are computed again, and stored"


def test_two_checkpoints_exchanged_are_both_not_resumed(root: Path, say: Say) -> None:
    store = Store(root)
    keys = [name_of(number) for number in range(2)]
    for key in keys:
        store.checkpoints.put(key, checkpoint_to_bytes(CHECKPOINT, "AVX2", key))
        assert store.checkpoints.get(key, "AVX2") is not None
        assert store.checkpoints.get(key, "AVX512") is None
    assert say("store", "check").status == 0
    one, other = (root / "checkpoints" / f"{key}.safetensors" for key in keys)
    swap(one, other)
    assert [store.checkpoints.get(key, "AVX2") for key in keys] == [None, None]
    checked = say("store", "check")
    assert checked.status == 1
    assert sorted(checked.out.splitlines()[1:]) == sorted(
        f'checkpoint,{key},"it holds the checkpoint of another training, {held[:12]}"'
        for key, held in [keys, keys[::-1]]
    )


def test_masks_and_checkpoints_without_names_are_read(root: Path, say: Say) -> None:
    """As earlier versions wrote them."""
    store = Store(root)
    for path in (root / "masks").glob("*/*"):
        mask = store.masks.get(path.stem)
        assert mask is not None
        layers = [[layer, list(shape)] for layer, shape in mask.shapes.items()]
        about = canonical({"hash": mask.hash, "layers": layers}).decode()
        path.write_bytes(safetensors.numpy.save(mask.bits, {"mask": about}))
        assert store.masks.get(path.stem) == mask
    (path,) = (root / "checkpoints").iterdir()
    path.write_bytes(checkpoint_to_bytes(CHECKPOINT))
    assert store.checkpoints.get(path.stem) is not None
    assert say("store", "check").status == 0


def test_a_checkpoint_of_no_iteration_is_none() -> None:
    whole = checkpoint_to_bytes(CHECKPOINT)
    tensors = safetensors.torch.load(whole)
    for about in ([], {}, {"iteration": "17"}, {"iteration": -1}, {"iteration": 17, "kind": 3}):
        changed = safetensors.torch.save(tensors, {"checkpoint": json.dumps(about), "checksum": "0" * 64})
        assert checkpoint_from_bytes(changed) is None


# strays


STRAYS = [
    ".DS_Store",
    "results/.DS_Store",
    "results/ab.txt",
    "results/{first}/.DS_Store",
    "results/{first}/notes/a.txt",
    "results/{other}/{key}/result.json",
    "results/{first}/{key}/.DS_Store",
    "masks/.DS_Store",
    "masks/ab/.DS_Store",
    "masks/ab/cd.safetensors",
    "checkpoints/.DS_Store",
    "checkpoints/thesis.safetensors",
    "runs/.DS_Store",
    "claims/.DS_Store",
]


def test_stray_files_are_told_and_left_alone(root: Path, say: Say, numbers: dict[tuple[str, ...], str]) -> None:
    listed = say("store", "ls").out
    key = results(root)[0].name
    other = "00" if key[:2] != "00" else "11"
    strays = [root / name.format(first=key[:2], other=other, key=key) for name in STRAYS]
    for path in strays:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"\0\0\0\1Bud1")
    (root / "tmp").mkdir(exist_ok=True)
    (root / "tmp" / "unfinished").write_bytes(b"")  # what is being written has its place
    for verb in (("results",), ("winners",)):
        assert say(*verb).out == numbers[verb]
    assert gather(planner(root, STUDY), "s", ["s"]).trainings_left == 0
    assert len(say("store", "ls").out) == len(listed)
    checked = say("store", "check")
    assert checked.status == 0
    told = [line.removesuffix(" does not belong to the store and is ignored") for line in checked.err.splitlines()]
    assert len(told) == len(strays)
    assert all(any(path.is_relative_to(Path(one).absolute()) for one in told) for path in strays)
    assert say("store", "gc").status == 0
    assert all(path.exists() for path in strays)
    assert run(planner(root, STUDY), InTurn(last_first=False), lambda *_: None).done == 0


def test_the_table_of_a_check_says_what_is_wrong_and_what_cures_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "check"]) == 0
    assert capsys.readouterr().out.endswith(": all checksums are correct\n")
    damaged = files(root)
    for name in ("result.json", "record.json", "run"):
        damaged[name].write_bytes(b"")
    (root / ".DS_Store").write_bytes(b"")
    assert main(["store", "check"]) == 1
    key = damaged["result.json"].parent.name[:12]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tombola-store/.DS_Store does not belong to the store and is ignored"
    assert f"result {key} is damaged: result.json does not match its checksum" in lines
    assert any(line.startswith(f"record {key} is damaged: it is lost: ") for line in lines)
    assert any(line.startswith(f"run {RUN} is damaged: ") for line in lines)
    assert lines[-1].endswith(
        "3 damaged; `tombola run` repeats what is damaged of its study; `tombola verify` repeats a training and begins "
        "a new record; the next `tombola run` removes claims of no run"
    )


# runs


def test_an_empty_file_of_a_run_stops_nobody_unless_it_is_locked(root: Path, say: Say) -> None:
    path = root / "runs" / RUN
    for claim in (root / "claims").iterdir():
        claim.unlink()
    path.write_bytes(b"")
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run of tombola uses it" in say("store", "gc").err
        assert path.exists()
    assert say("store", "gc").status == 0
    assert not path.exists()


def test_a_run_that_cannot_write_its_file_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="store: it cannot be written to: No space left on device"):
            Claims(store.root)
    assert [path for path in store.root.rglob("*") if path.is_file()] == [store.root / "store.json"]
    with Claims(store.root) as claims:
        assert claims.alone()


def test_a_run_begins_though_another_empties_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    rename, swept = Path.rename, list[Path]()

    def sweep_first(path: Path, target: Path) -> Path:
        if not swept:
            swept.append(path)
            path.unlink()
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", sweep_first)
        with Claims(store.root) as ours:
            assert ours.alone()
            assert len(list((store.root / "runs").iterdir())) == 1
    assert swept


# files


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(IrregularFileError, match="it has 5 bytes, expected at most 4"):
        read_regular(path, 4)
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 5) == b"12345"
    for how in ("a pipe", "a socket", "a folder", "a loop of links", "a device"):
        path.touch()
        DAMAGE[how](path)
        with pytest.raises(IrregularFileError, match="it is not a regular file"):
            open_regular(path)
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError):
        open_regular(path)
    path.touch()
    with pytest.raises(IrregularFileError):
        open_regular(path / "inner")


def test_a_file_of_tensors_may_have_none(tmp_path: Path) -> None:
    path, content = tmp_path / "none.safetensors", safetensors.numpy.save({})
    path.write_bytes(content)
    assert read_tensors(path) == content

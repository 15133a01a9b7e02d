"""The store: what is put comes back, whole or not at all, whatever fails in between."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tombola.errors import DamagedResultError, UserError
from tombola.files import write_atomically
from tombola.pruning.mask import Mask
from tombola.store.check import list_damage
from tombola.store.checkpoints import checkpoint_from_bytes, checkpoint_to_bytes
from tombola.store.names import canonical, name_of
from tombola.store.results import pack_state, unpack_state
from tombola.store.store import Store
from tombola.training.history import Checkpoint, History, Trained
from tombola.training.weights import Weights, apply_mask, state_hash

IDENTITY = {"some": "training"}
KEY = name_of(IDENTITY)
MASK_NAME, CHECKPOINT_NAME = name_of("a mask"), name_of("a checkpoint")
MASK = Mask.from_tensors({"a.weight": torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4})
STATE = apply_mask(
    {
        "a.weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
        "a.bias": torch.tensor([-0.0, 1e-42, 3.0]),
        "count": torch.tensor(7),
        "turned": torch.arange(6.0).view(2, 3).T,
    },
    MASK,
)
TRAINED = Trained(Weights.of(STATE), History((0.5, 1 / 3), 0.9, 0.1 + 0.2, None), torch.tensor([0.5, 0.25]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, identity: dict[str, str] = IDENTITY) -> None:
    store.results.put(name_of(identity), identity, MASK, TRAINED, {"seconds": 1.0})


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_what_is_put_comes_back_to_the_bit(store: Store) -> None:
    assert store.results.get(KEY) is None
    put(store)
    assert store.results.folder(KEY).stat().st_mode & 0o777 == 0o755, "others may read it"
    found = Store(store.root, create=False).results.get(KEY)
    assert found is not None
    assert found.history == TRAINED.history
    assert found.weights.hash == TRAINED.weights.hash
    assert found.weights.load().keys() == STATE.keys()
    for name, tensor in found.weights.load().items():
        assert tensor.dtype == STATE[name].dtype
        assert tensor.numpy().tobytes() == STATE[name].numpy().tobytes()
    assert store.results.mask(KEY) == MASK
    assert store.results.record(KEY) == {"seconds": 1.0}


def test_a_result_that_another_run_removes_while_it_is_read_is_not_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)
    read = store.results._read

    def remove_first(key: str, name: str) -> bytes:
        store.results.discard(key)
        return read(key, name)

    monkeypatch.setattr(store.results, "_read", remove_first)
    assert store.results.get(KEY) is None


def test_a_damaged_behaviour_keeps_its_number(store: Store) -> None:
    assert store.behaviours.add(KEY, 0, ((1.0,),))
    (store.root / "behaviours" / f"{KEY}.0.json").write_text("{}")
    assert store.behaviours.add(MASK_NAME, 1, ((2.0,),))
    assert store.behaviours.all(KEY) == {0: None}
    assert not store.behaviours.add(KEY, 0, ((1.0,),))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_behaviour_is_stored_where_there_are_no_hard_links(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert store.behaviours.add(KEY, 0, ((1.0,),))
    assert store.behaviours.all(KEY) == {0: ((1.0,),)}


def test_metrics_that_are_added_later_replace_no_others(store: Store) -> None:
    put(store)
    for metrics in ({"test": {"f1": 0.5}}, {"validation": {"f1": 0.25}}, {"test": {"r2": 1.0}}):
        store.results.add_metrics(KEY, metrics)
    assert store.results.metrics(KEY) == {"test": {"f1": 0.5, "r2": 1.0}, "validation": {"f1": 0.25}}


def test_a_store_that_another_process_makes_at_the_same_time_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_too_late(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        raise UserError("the unfinished marker was swept")

    monkeypatch.setattr("tombola.store.store.write_atomically", be_too_late)
    assert Store(tmp_path / "store").root.is_dir()


def test_only_living_weights_are_stored(store: Store) -> None:
    mask = Mask.from_tensors({"w": torch.arange(100_000).reshape(100, 1000) % 100 == 0})
    state = apply_mask({"w": torch.ones(100, 1000)}, mask)
    store.results.put(KEY, IDENTITY, mask, Trained(Weights.of(state), History()), {})
    assert (store.results.folder(KEY) / "weights.safetensors").stat().st_size < 4 * 1000 + 100_000 / 8 + 1000


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_has_as_many_weights_as_its_mask_has_connections(count: int) -> None:
    mask = Mask.from_tensors({"w": torch.tensor([[True, False], [False, True]])})
    packed = pack_state({"w": torch.ones(2, 2)}, mask) | {"alive.w": torch.ones(count)}
    with pytest.raises(ValueError, match=f"weights of w: {count}, but connections that are alive: 2"):
        unpack_state(packed, mask.shapes)


def test_a_result_that_is_there_stays_as_it_is(store: Store) -> None:
    put(store)
    store.results.put(KEY, IDENTITY, MASK, Trained(TRAINED.weights, History()), {"seconds": 2.0})
    assert store.results.record(KEY) == {"seconds": 1.0}
    found = store.results.get(KEY)
    assert found is not None
    assert found.history == TRAINED.history


def test_checksums_are_as_sha256sum_reads_them(store: Store) -> None:
    put(store)
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum; to run: apt-get install coreutils")
    assert os.system(f"cd {store.results.folder(KEY)} && sha256sum --quiet --check SHA256SUMS") == 0


_Call = Callable[..., Any]


def failing(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, error: BaseException) -> list[int]:
    """Let the n-th call of `os.<name>` raise; return a list whose length is the number of calls."""
    real: _Call = getattr(os, name)
    calls: list[int] = []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, call)
    return calls


STEPS = [("write", 4), ("fsync", 7), ("rename", 1), ("mkdir", 1)]


@pytest.mark.parametrize(("name", "nth"), [(name, nth) for name, most in STEPS for nth in range(1, most + 1)])
def test_a_full_disk_at_any_step_leaves_the_store_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    before = files(store.root)
    with monkeypatch.context() as patch:
        calls = failing(patch, name, nth, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        last = (name, nth) == ("fsync", 7)  # making the result's name last: the result is there already
        with (
            contextlib.nullcontext()
            if last
            else pytest.raises(UserError, match="No space left on device; all results that")
        ):
            put(store)
        assert len(calls) >= nth, "no such step is done any more"
    assert (KEY in store.results) == last
    if not last:
        assert files(store.root) == before
    put(store)
    store.results.check(KEY)
    assert not list((store.root / "tmp").iterdir())


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up after it."""


@pytest.mark.parametrize(("name", "nth"), [(name, nth) for name, most in STEPS for nth in range(1, most + 1)])
def test_a_kill_at_any_step_leaves_a_whole_result_or_none(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, name, nth, Killed())
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(os, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            put(store)
    again = Store(store.root, create=False)
    if KEY in again.results:
        again.results.check(KEY)
    put(again)
    again.results.check(KEY)
    again.sweep(lambda: True)
    assert files(store.root) == sorted(
        ["store.json"]
        + [
            f"results/{KEY[:2]}/{KEY}/{name}"
            for name in ("SHA256SUMS", "record.json", "result.json", "weights.safetensors")
        ]
    )


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "chmod"])
def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with monkeypatch.context() as patch:
        failing(patch, name, 1, OSError(errno.EIO, "broken"))
        with pytest.raises(UserError, match=r"file: cannot be written: broken"):
            write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert files(tmp_path) == ["file"]


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:3]))
    write_atomically(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("name", ["result.json", "weights.safetensors", "SHA256SUMS"])
def test_a_flipped_bit_anywhere_is_found(store: Store, name: str) -> None:
    put(store)
    path = store.results.folder(KEY) / name
    whole = path.read_bytes()
    sums = len("0" * 64)
    places = range(0, len(whole), 37) if name != "SHA256SUMS" else [0, sums - 1, sums + 3, len(whole) - 2]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x80
        path.write_bytes(damaged)
        with pytest.raises(DamagedResultError, match=f"result {KEY[:12]} is damaged"):
            store.results.check(KEY)
    path.write_bytes(whole)
    store.results.check(KEY)


@pytest.mark.parametrize("name", ["result.json", "weights.safetensors", "SHA256SUMS"])
def test_a_missing_or_cut_file_is_found(store: Store, name: str) -> None:
    put(store)
    path = store.results.folder(KEY) / name
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 3])
    with pytest.raises(DamagedResultError):
        store.results.check(KEY)
    path.unlink()
    with pytest.raises(DamagedResultError, match=f"{name} is missing"):
        store.results.check(KEY)
    if name != "weights.safetensors":
        with pytest.raises(DamagedResultError):
            store.results.get(KEY)


def test_damaged_weights_are_not_handed_out(store: Store) -> None:
    put(store)
    path = store.results.folder(KEY) / "weights.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    found = store.results.get(KEY)
    assert found is not None
    with pytest.raises(DamagedResultError, match=r"weights\.safetensors"):
        _ = found.weights.load()


def test_a_discarded_result_is_gone_and_can_be_put_again(store: Store) -> None:
    put(store)
    store.results.discard(KEY)
    store.results.discard(KEY)  # another run was faster
    assert files(store.root) == ["store.json"]
    put(store)
    store.results.check(KEY)


def test_a_lost_record_is_empty(store: Store) -> None:
    put(store)
    (store.results.folder(KEY) / "record.json").write_bytes(b"\xff{")
    assert store.results.record(KEY) == {}


def test_confirmations_are_kept_in_the_record_alone(store: Store) -> None:
    put(store)
    others = {
        path.name: path.read_bytes() for path in store.results.folder(KEY).iterdir() if path.name != "record.json"
    }
    store.results.confirm(KEY, {"when": "now"})
    store.results.confirm(KEY, {"when": "later"})
    assert store.results.record(KEY) == {"seconds": 1.0, "confirmed": [{"when": "now"}, {"when": "later"}]}
    assert others == {p.name: p.read_bytes() for p in store.results.folder(KEY).iterdir() if p.name != "record.json"}


def test_masks_come_back_and_damaged_ones_do_not(store: Store) -> None:
    store.masks.put(MASK_NAME, MASK)
    assert store.masks.get(MASK_NAME) == MASK
    path = store.root / "masks" / MASK_NAME[:2] / f"{MASK_NAME}.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        found = store.masks.get(MASK_NAME)
        assert found is None or found == MASK
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert store.masks.get(MASK_NAME) is None
    path.write_bytes(whole[: len(whole) // 2])
    assert store.masks.get(MASK_NAME) is None
    shutil.rmtree(store.root)
    assert not store.masks.put(MASK_NAME, MASK)
    assert not store.root.exists(), "a store that was removed stays removed"


def test_a_file_in_the_place_of_a_result_is_one_damage(store: Store) -> None:
    folder = store.results.folder(KEY)
    folder.parent.mkdir(parents=True)
    folder.write_text("x")
    assert [(damage.kind, damage.name) for damage in list_damage(store)] == [("result", KEY)]
    folder.unlink()
    folder.symlink_to("nothing")
    assert KEY in store.results, "a damaged result is there"


CHECKPOINT = Checkpoint(17, STATE, {"0.momentum_buffer": torch.randn(7, 5).T}, torch.tensor([0.1, 1 / 3, 2 / 3]))


def test_checkpoints_come_back_to_the_bit(store: Store) -> None:
    store.checkpoints.put(KEY, checkpoint_to_bytes(CHECKPOINT))
    found = store.checkpoints.get(KEY)
    assert found is not None
    assert found.iteration == 17
    assert torch.equal(found.batch_losses, CHECKPOINT.batch_losses)
    for ours, theirs in ((found.state, CHECKPOINT.state), (found.optimizer, CHECKPOINT.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].numpy().tobytes() == theirs[name].numpy().tobytes() for name in ours)
    store.checkpoints.discard(KEY)
    store.checkpoints.discard(KEY)
    assert store.checkpoints.get(KEY) is None


def test_a_cut_or_changed_checkpoint_is_none() -> None:
    whole = checkpoint_to_bytes(CHECKPOINT)
    assert checkpoint_from_bytes(whole) is not None
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        assert checkpoint_from_bytes(whole[:length]) is None
    old, new = b'\\"iteration\\": 17', b'\\"iteration\\": 18'
    assert old in whole
    assert checkpoint_from_bytes(whole.replace(old, new)) is None
    third, other = (torch.tensor(value).numpy().tobytes() for value in (2 / 3, 0.5))
    assert third in whole, "a loss"
    assert checkpoint_from_bytes(whole.replace(third, other)) is None
    assert checkpoint_from_bytes(whole[:-1] + bytes([whole[-1] ^ 1])) is None
    about, state = {"iteration": 17}, {"state.w": torch.ones(2)}
    named = {"checkpoint": json.dumps(about), "checksum": name_of([about, state_hash(state)])}
    assert checkpoint_from_bytes(safetensors.torch.save(state, named)) is None, "no losses"


def test_a_checkpoint_of_another_kind_of_machine_is_not_resumed() -> None:
    """A training that is resumed elsewhere would have the bits of neither kind."""
    named = checkpoint_to_bytes(CHECKPOINT, "AVX2")
    assert checkpoint_from_bytes(named, "AVX512") is None
    for content, kind in ((named, "AVX2"), (named, None), (checkpoint_to_bytes(CHECKPOINT), "AVX2")):
        found = checkpoint_from_bytes(content, kind)
        assert found is not None
        assert found.iteration == 17


def test_a_checkpoint_that_cannot_be_written_stops_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "fsync", 1, OSError(errno.ENOSPC, "full"))
    store.checkpoints.put(KEY, checkpoint_to_bytes(CHECKPOINT))
    assert store.checkpoints.get(KEY) is None
    (store.root / "checkpoints").rmdir()
    (store.root / "checkpoints").write_text("no folder")
    store.checkpoints.put(KEY, checkpoint_to_bytes(CHECKPOINT))


def test_sweeping_leaves_what_others_write(store: Store) -> None:
    (store.root / "tmp").mkdir()
    (store.root / "tmp" / "half").write_text("x")
    store.sweep(lambda: False)
    assert (store.root / "tmp" / "half").exists()

    def alone() -> bool:
        (store.root / "tmp" / "later").write_text("x")
        return True

    store.sweep(alone)
    assert files(store.root) == ["store.json", "tmp/later"]


def test_sweeping_leaves_the_checkpoints_of_trainings_that_are_not_done(store: Store) -> None:
    put(store)
    for key in (KEY, CHECKPOINT_NAME):
        store.checkpoints.put(key, checkpoint_to_bytes(Checkpoint(3, {"w": torch.ones(2)})))
    store.sweep(lambda: True)
    assert [store.checkpoints.read(key) is None for key in (KEY, CHECKPOINT_NAME)] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (canonical({"store": 2}), r"it has version 2 and this tombola reads version 1"),
        (canonical({"store": 0}), r"it has version 0 and this tombola reads version 1"),
        (b"\xff\xfe", r"store\.json is damaged"),
        (b"[]", r"store\.json is damaged"),
        (b'{"other": 1}', r"store\.json is damaged"),
    ],
)
def test_other_versions_are_refused_with_a_sentence(store: Store, text: bytes, message: str) -> None:
    (store.root / "store.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
        Store(store.root)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="the folder is not empty and is not a store"):
        Store(tmp_path)
    assert files(tmp_path) == ["thesis.tex"]


def test_a_kill_while_the_store_is_made_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    with monkeypatch.context() as patch:
        failing(patch, "replace", 1, Killed())
        patch.setattr(os, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            Store(root)
    assert len(files(root)) == 1
    store = Store(root)
    store.sweep(lambda: True)
    assert files(root) == ["store.json"]
    assert json.loads((root / "store.json").read_text()) == {"store": 1}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(UserError, match="store"):
        Store(tmp_path / "store")


def test_a_read_only_store_can_be_read_and_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "rename", "replace", "unlink", "link"):
        monkeypatch.setattr(os, name, refused)
    real = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, *rest, **named: refused() if flags & os.O_CREAT else real(path, flags, *rest, **named),
    )
    again = Store(store.root, create=False)
    assert again.results.get(KEY) is not None
    again.results.check(KEY)
    again.masks.put(MASK_NAME, MASK)
    assert again.masks.get(MASK_NAME) is None
    with pytest.raises(UserError, match="it cannot be written to: Read-only file system"):
        again.check_writable()
    with pytest.raises(UserError, match="Read-only file system"):
        put(again, {"another": "training"})


def test_entries_are_what_lies_in_the_store(store: Store) -> None:
    put(store)
    store.masks.put(MASK_NAME, MASK)
    store.checkpoints.put(CHECKPOINT_NAME, checkpoint_to_bytes(CHECKPOINT))
    found = {(entry.kind, entry.name): entry for entry in store.entries()}
    assert set(found) == {("result", KEY), ("mask", MASK_NAME), ("checkpoint", CHECKPOINT_NAME)}
    assert sum(entry.bytes for entry in found.values()) == sum(
        (store.root / name).stat().st_size for name in files(store.root) if name != "store.json"
    )
    for entry in found.values():
        store.remove(entry)
    assert files(store.root) == ["store.json"]


def test_no_number_is_written_that_json_has_not() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"loss": float("nan")})


def test_names_do_not_change() -> None:
    """A name that came out different would orphan every store there is."""
    assert name_of({"b": [1, 0.1, None, True, "ü"], "a": {}}) == (
        "df457af71ebbc2617d4fa56f9536c31decf5fd08e9ed4fe07be236ece220a426"
    )

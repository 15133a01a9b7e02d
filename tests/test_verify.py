"""Verifying finds what is not as training gives it, and says what differed first."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stores import InTurn, content, planner, results, study, write_study
from tombola.cli import main
from tombola.engine.run import run
from tombola.engine.verify import (
    Finding,
    draw_sample,
    first_in_histories,
    first_in_losses,
    first_in_masks,
    first_in_states,
    list_places,
    verify_chains,
    verify_trainings,
)
from tombola.pruning.mask import Mask
from tombola.store.names import canonical
from tombola.store.results import unpack_state
from tombola.store.store import Store
from tombola.study.chains import Chain
from tombola.study.planner import Planner
from tombola.training.history import History
from tombola.training.weights import state_hash

STUDY = study(["magnitude", "l1"], levels=2)

pytestmark = pytest.mark.xdist_group("processes")  # the process that workers are copies of starts once


@pytest.fixture
def plan(tmp_path: Path) -> Planner:
    """A planner of the study, whose trainings are all done."""
    plan = planner(tmp_path / "store", STUDY)
    run(plan, InTurn(last_first=False), lambda *_: None)
    return plan


def verify(plan: Planner) -> list[Finding]:
    return list(verify_trainings(list_places([(plan, plan.chains)]), InTurn(last_first=True)))


def verify_each_chain(plan: Planner) -> list[Finding]:
    return list(verify_chains(plan, plan.chains, InTurn(last_first=False), lambda *_: None))


def tamper(store: Store, key: str, name: str, change: Callable[[Any], None], hash: str | None = None) -> None:
    """Change what a result holds, and its checksums with it, as a training would have done that gave other bits."""
    folder = store.results.folder(key)
    document = json.loads((folder / "result.json").read_text())
    tensors = safetensors.torch.load((folder / "weights.safetensors").read_bytes())
    change(document if name == "result.json" else tensors)
    if name != "result.json":
        packed = {name: tensor for name, tensor in tensors.items() if name != "losses"}
        document["weights"] = state_hash(unpack_state(packed, {one: tuple(shape) for one, shape in document["mask"]}))
    files = {"result.json": canonical(document), "weights.safetensors": safetensors.torch.save(tensors)}
    for file, data in files.items():
        (folder / file).write_bytes(data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in files.items())
    (folder / "SHA256SUMS").write_text(sums)
    store.results.check(key)


def test_what_training_gives_is_confirmed(plan: Planner) -> None:
    before = content(plan.store.root)
    findings = verify(plan)
    assert len(findings) == len(results(plan.store.root)) == 6
    assert all(finding.difference is None and finding.machine == () for finding in findings)
    assert content(plan.store.root) == before
    for folder in results(plan.store.root):
        confirmed = plan.store.results.record(folder.name)["confirmed"]
        assert [set(one) for one in confirmed] == [{"when", "whole_chain", "machine"}]
    assert [finding.difference for finding in verify_each_chain(plan)] == [None] * 6
    assert plan.store.results.record(results(plan.store.root)[0].name)["confirmed"][1]["whole_chain"] is True
    assert content(plan.store.root) == before


def test_a_wrong_mask_that_was_remembered_and_trained_with_is_found(plan: Planner) -> None:
    """Its training has another name than the one that pruning leads to, and its own bits are right."""
    chain, store = Chain(0, "l1"), plan.store
    tickets = plan.progress(chain).tickets
    (name,) = plan.name_masks(chain, tickets[1:2])
    right = tickets[2].mask.load()
    alive = {layer: right[layer].flatten().roll(1).reshape(right.shapes[layer]) for layer in right}
    store.masks.put(name, Mask.from_tensors(alive))
    run(plan, InTurn(last_first=False), lambda *_: None)
    differences = [finding.difference for finding in verify(plan) if finding.difference]
    assert differences
    assert differences[0].startswith("a remembered mask is not the one that pruning gives: mask of ")


def test_one_weight_that_is_another_is_named(plan: Planner) -> None:
    chain = Chain(0, "l1")
    last = plan.progress(chain).trainings[-1]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["state.4.bias"][2] = torch.nextafter(tensors["state.4.bias"][2], torch.tensor(9.0))

    tamper(plan.store, last.key, "weights.safetensors", change)
    found = {finding.key: finding for finding in verify(plan)}
    assert [key for key, finding in found.items() if finding.difference] == [last.key]
    assert found[last.key].what == "l1, seed 0, level 2"
    difference = found[last.key].difference or ""
    assert difference.startswith("tensor 4.bias[2]: ")
    assert difference.endswith("(1 of 4 differ)")
    record = plan.store.results.record(last.key)
    assert "confirmed" not in record
    assert [one["difference"] for one in record["contradicted"]] == [difference]
    assert [one.what for one in verify_each_chain(plan) if one.difference] == ["l1, seed 0, level 2"]


def test_the_first_iteration_that_went_another_way_is_named(plan: Planner) -> None:
    dense = plan.progress(Chain(0, "l1")).trainings[1]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["losses"][20:] = torch.nextafter(tensors["losses"][20:], torch.tensor(9.0))
        tensors["state.4.bias"][2] += 1

    tamper(plan.store, dense.key, "weights.safetensors", change)
    unequal = [finding for finding in verify(plan) if finding.difference]
    assert [finding.what for finding in unequal] == ["magnitude, seed 0, level 0"]
    # It begins with iteration 10, the rewind point.
    assert (unequal[0].difference or "").startswith("the training loss of iteration 30: ")
    assert "; at the end, tensor 4.bias[2]: " in (unequal[0].difference or "")


def test_a_chain_that_went_another_way_is_found_where_it_began(plan: Planner) -> None:
    """As by an importance that came to give other masks: all that is stored fits together, but comes out otherwise."""
    level_1 = plan.progress(Chain(0, "l1")).trainings[2]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        bits = tensors["mask.0.weight"]
        alive, pruned = (next(n for n in range(8) if (int(bits[5]) >> n) % 2 == state) for state in (1, 0))
        bits[5] ^= (1 << alive) | (1 << pruned)

    tamper(plan.store, level_1.key, "weights.safetensors", change)
    unequal = [finding for finding in verify(plan) if finding.difference]
    assert [finding.what for finding in unequal] == ["l1, seed 0, level 1"]  # what follows has another name
    assert (unequal[0].difference or "").startswith("mask of 0.weight[2, ")


def test_a_wrong_remembered_mask_is_found(plan: Planner) -> None:
    chain = Chain(0, "l1")
    right = plan.progress(chain).trainings[2].mask
    wrong = Mask.from_tensors({name: alive.roll(1) for name, alive in right.items()})
    for entry in plan.store.entries():
        if entry.kind == "mask" and plan.store.masks.get(entry.name) == right:
            plan.store.masks.put(entry.name, wrong)
    again = planner(plan.store.root, STUDY)  # whose chain ends there now: no training of that mask was done
    run(again, InTurn(last_first=False), lambda *_: None)
    unequal = [finding for finding in verify(again) if finding.difference]
    assert any(
        "a remembered mask is not the one that pruning gives: mask of 0.weight[" in str(f.difference) for f in unequal
    )


def test_a_damaged_result_is_a_difference(plan: Planner) -> None:
    path = results(plan.store.root)[0] / "weights.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    chosen = [one for one in list_places([(plan, plan.chains)]) if one.training.key == path.parent.name]
    findings = list(verify_trainings(chosen[:1], InTurn(last_first=False)))
    assert len(findings) == 1
    assert "is damaged" in (findings[0].difference or "")


def test_another_machine_is_named(plan: Planner) -> None:
    for folder in results(plan.store.root):
        record = json.loads((folder / "record.json").read_text())
        record["threads"] = 2
        record["machine"]["versions"]["torch"] = "1.0"
        (folder / "record.json").write_text(json.dumps(record))
    findings = verify(plan)
    assert len(findings) == len(results(plan.store.root)) > 0
    for finding in findings:
        assert finding.difference is None
        assert finding.machine[0].startswith("versions.torch: '1.0' then, ")
        assert finding.machine[1] == "threads: 2 then, 1 now"


def test_a_sample_is_spread_and_the_same_each_time() -> None:
    assert draw_sample(range(100), 10) == draw_sample(range(100), 10)
    assert len(set(draw_sample(range(100), 10))) == 10
    assert max(draw_sample(range(100), 10)) > 50
    assert draw_sample(range(3), None) == draw_sample(range(3), 5) == [0, 1, 2]


def test_first_differences() -> None:
    one = {"a": torch.tensor([[1.0, -0.0], [3.0, 4.0]]), "b": torch.tensor(1)}
    assert first_in_states(one, one) is None
    other = {"a": torch.tensor([[1.0, 0.0], [3.0, 5.0]]), "b": torch.tensor(1)}
    assert first_in_states(one, other) == "tensor a[0, 1]: -0.0 in the store, 0.0 now (2 of 4 differ)"
    assert first_in_states(one, {"a": one["a"]}) == "only one of the states has tensor b"
    assert (
        first_in_states(one, one | {"b": torch.tensor(1.0)})
        == "tensor b: torch.int64 () in the store, torch.float32 () now"
    )
    assert first_in_states(one, one | {"b": torch.tensor(2)}) == "tensor b[]: 1 in the store, 2 now (1 of 1 differ)"
    mask, fewer = (Mask.from_tensors({"w": torch.tensor([True, last, True])}) for last in (True, False))
    assert first_in_masks(mask, mask) is None
    assert first_in_masks(mask, fewer) == "mask of w[1]: alive in the store, not now (1 connections differ)"
    assert first_in_masks(fewer, mask) == "mask of w[1]: pruned in the store, not now (1 connections differ)"
    history = History((0.5, 0.25), 0.9, 0.1, None)
    assert first_in_histories(history, history) is None
    assert first_in_histories(history, History((0.5, 0.25), 0.8, 0.1, None)) == (
        "test_accuracy: 0.9 in the store, 0.8 now"
    )
    losses = torch.tensor([0.5, 0.25, 0.125])
    assert first_in_losses(losses, losses.clone(), 7) is None
    other = torch.tensor([0.5, 0.75, 0.0])
    assert first_in_losses(losses, other, 7) == "the training loss of iteration 8: 0.25 in the store, 0.75 now"
    assert first_in_losses(losses, losses[:2], 7) == "the training has 3 iterations in the store, 2 now"


def test_the_command_line_verifies_in_fresh_processes_and_looks_after_the_store(
    plan: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plan.store.root.parent
    write_study(folder, STUDY)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def tombola(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = main([*arguments, "--store", "store"])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    done = tombola("verify", "small.toml", "--sample", "2")
    assert done.returncode == 0
    assert done.stdout == "re-ran 2 trainings: all bit-identical\n"

    key = plan.progress(Chain(0, "l1")).trainings[-1].key

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["state.0.bias"][0] += 1

    tamper(plan.store, key, "weights.safetensors", change)
    done = tombola("verify", "small.toml", "--chains", "--format", "json")
    assert done.returncode == 1
    assert [one["training"] for one in json.loads(done.stdout) if not one["equal"]] == ["l1, seed 0, level 2"]

    listed = json.loads(tombola("store", "ls", "--format", "json").stdout)
    assert sum(one["kind"] == "result" for one in listed) == 6
    assert all(one["confirmed"] for one in listed if one["kind"] == "result" and one["name"] != key)
    assert tombola("store", "check").returncode == 0
    path = plan.store.results.folder(key) / "result.json"
    path.write_bytes(path.read_bytes()[:-1])
    done = tombola("store", "check", "--format", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == [
        {"kind": "result", "name": key, "damage": "result.json does not match its checksum"}
    ]

    run(planner(plan.store.root, STUDY), InTurn(last_first=False), lambda *_: None)
    alone = content(plan.store.root)
    done = tombola("reinit", "small.toml", "--level", "1", "--draws", "2")
    assert done.returncode == 0, done.stderr
    before = content(plan.store.root)
    assert len(before) > len(alone)
    run(planner(plan.store.root, study(["l2"], seeds=(7,))), InTurn(last_first=False), lambda *_: None)
    assert len(content(plan.store.root)) > len(before)
    told = tombola("store", "gc", "small.toml", "--dry-run")
    assert "would be removed" in told.stdout
    assert len(content(plan.store.root)) > len(before)
    assert tombola("store", "gc", "small.toml").returncode == 0
    assert content(plan.store.root) == before

    text = (folder / "small.toml").read_text()
    (folder / "more.toml").write_text(text.replace("seeds = [0", "seeds = [7, 0"))
    assert tombola("store", "gc", "more.toml").returncode == 0
    assert content(plan.store.root) == before, "a seed that nobody has run yet takes nothing away"
    (folder / "one.toml").write_text(text.replace('"magnitude", ', ""))
    assert tombola("store", "gc", "one.toml").returncode == 0
    assert 0 < len(content(plan.store.root)) < len(alone), "its importance has no part in reinitialisations of two"

"""A pretrained start: the initial weights of a checkpoint, and files that are refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tombola.errors import UserError
from tombola.store.store import Store
from tombola.study.planner import Planner
from tombola.study.schema import Study, load_study
from tombola.study.task import load_problem, try_out


class Tied(nn.Module):
    """A network in which two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.outputs.weight = self.hidden.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.outputs(self.hidden(self.inputs(x.flatten(1)).relu()).relu())
        return out


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("pretrained_net")
    made.Tied = Tied  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrained_net", made)


def study(path: Path) -> Study:
    fields: dict[str, Any] = {"task.model": "pretrained_net:Tied", "task.model_arguments": {}, "levels": 1}
    return load_study("digits", fields | {"task.checkpoint": str(path), "importances": ["l1"], "keep_dense": []})


def planner(made: Study, folder: Path) -> Planner:
    return Planner(made, load_problem(made.task), Store(folder / "store"))


def write(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = {name: tensor for name, tensor in Tied().state_dict().items() if name != "outputs.weight"} | changes
    safetensors.torch.save_file(state, path)
    return state


def test_all_seeds_start_from_the_checkpoint_which_is_in_the_names(tmp_path: Path) -> None:
    state = write(tmp_path / "one.safetensors")
    made = planner(study(tmp_path / "one.safetensors"), tmp_path)
    for seed in made.study.seeds:
        found = made.initial(seed).load()
        assert all(found[name].equal(tensor) for name, tensor in state.items())
        assert found["outputs.weight"].equal(state["hidden.weight"])
    names = [made.progress(made.chains[0]).needs[0].key]
    write(tmp_path / "one.safetensors", **{"hidden.bias": torch.zeros(12)})
    names.append(
        (again := planner(study(tmp_path / "one.safetensors"), tmp_path)).progress(again.chains[0]).needs[0].key
    )
    assert names[0] != names[1]
    try_out(made.problem, made.study)
    assert not made.problem.build().hidden.bias.equal(state["hidden.bias"]), "reinitialisation still draws"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("pickle", r"it is a pickled file, .* safetensors.torch.save_file\(torch.load"),
        ("old pickle", "it is a pickled file"),
        (b"nothing", "it is not a safetensors file"),
        ({"hidden.bias": torch.zeros(3)}, r"task.checkpoint '.*' does not fit the model: .*hidden.bias"),
        ({"more": torch.zeros(3)}, r"task.checkpoint '.*' does not fit the model: .*more"),
        (None, "cannot be read: No such file"),
    ],
)
def test_another_file_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    if isinstance(content, dict):
        write(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(Tied().state_dict(), path, _use_new_zipfile_serialization=content == "pickle")
    with pytest.raises(UserError, match=said):
        load_problem(study(path).task)


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "nan.safetensors", **{"hidden.bias": torch.full((12,), float("nan"))})
    made = study(tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"its initial 'hidden.bias' is not finite"):
        try_out(load_problem(made.task), made)

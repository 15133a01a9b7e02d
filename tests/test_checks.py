"""`plan` and `verify` from Python, and data classes of a script in the functions of a study."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny_task
import tombola
from processes import LONG
from test_workbench import fresh, study
from tombola import UserError
from tombola.own.functions import refer, source_hash


def test_plan_and_verify_with_functions_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tombola.engine.estimate._TIMED_SECONDS", 0.0)
    of = study(levels=1)
    ahead = tombola.plan(of, store=tmp_path / "s")
    assert (ahead.existing, ahead.to_train, [missing for _, _, missing in ahead.chains]) == (0, 2, [2])
    assert ahead.seconds > 0
    assert ahead.source == "from a few iterations timed now"
    assert not (tmp_path / "s").exists()
    with pytest.raises(UserError, match="no result of this study is in"):
        tombola.verify(of, store=tmp_path / "s")
    tombola.run(of, store=tmp_path / "s", progress=False)
    assert tombola.plan(of, store=tmp_path / "s").to_train == 0
    found = tombola.verify(of, store=tmp_path / "s")
    assert found["training"].to_list() == ["magnitude, seed 0, level 0", "magnitude, seed 0, level 1"]
    assert found["equal"].all()
    assert len(tombola.verify(of, store=tmp_path / "s", sample=1)) == 1
    whole = tombola.verify(of, store=tmp_path / "s", chains=True)
    assert whole.drop("machine").equals(found.drop("machine"))
    for ask in (tombola.plan, tombola.verify):
        with pytest.raises(UserError, match="workers: 2 processes cannot import"):
            ask(of, store=tmp_path / "s", workers=2)


DATA_CLASS = """
from dataclasses import dataclass, field
@dataclass({decorator})
class Setting:
    width: int = {width}
    kind: Mode = Mode.A
    names: list = field(default_factory=lambda: [{names}])
    def twice(self):
        return {twice} * self.width
setting = Setting({given})
def network():
    return tiny_task.model(){used}
"""
GIVEN = {"decorator": "", "width": 3, "names": "", "twice": 2, "given": "", "used": ", setting.twice()"}


def hash_of(**changes: Any) -> str:
    space = fresh(DATA_CLASS.format(**GIVEN | changes), tiny_task=tiny_task)
    return source_hash(refer(space["network"], "task.model"))


def test_a_data_class_of_a_script_is_identified_by_its_content() -> None:
    same = hash_of()
    assert same == hash_of()
    others = [
        {"width": 4}, {"names": "1"}, {"twice": 3}, {"given": "5"}, {"decorator": "eq=False"},
        {"decorator": "order=True"}, {"decorator": "frozen=True"}, {"decorator": "slots=True"},
        {"used": ", Setting(3)"}, {"used": ", Setting(4)"},
    ]  # fmt: skip
    assert len({same, *(hash_of(**change) for change in others)}) == len(others) + 1
    assert hash_of(decorator="slots=True, frozen=True") == hash_of(decorator="slots=True, frozen=True")


SCRIPT = """
from dataclasses import dataclass
from enum import Enum
from tombola.own.functions import refer, source_hash
class Kind(Enum):
    A = "a"
@dataclass(frozen=True, order=True)
class Setting:
    kind: Kind = Kind.A
    also: frozenset = frozenset("xyz")
setting = Setting()
def f():
    return setting, Setting
print(source_hash(refer(f, "x")))
"""


def test_a_data_class_has_the_same_identity_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = {
        subprocess.run(
            [sys.executable, script], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, timeout=LONG, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_a_data_class_with_something_unknown_is_refused() -> None:
    with pytest.raises(UserError, match="it uses a object, whose content cannot be identified"):
        hash_of(names="object()", used=", setting")

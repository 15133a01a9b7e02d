"""The verbs to begin with: a new study file, shell completion, versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import LONG
from tombola.cli import main
from tombola.study.schema import Study, fields, load_study, presets

pytest.importorskip("argcomplete", reason="argcomplete is not installed; to run: make .venv/installed-tests")


def test_a_new_study_is_valid_and_names_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert (
        "put your functions into mine.py beside study.toml, then:\n  tombola plan study.toml" in capsys.readouterr().out
    )
    found = load_study("./study.toml")
    assert (found.task.model, found.task.dataset, found.levels) == ("mine:network", "mine:data", 10)
    text = Path("study.toml").read_text()
    assert all(f"{name.rpartition('.')[2]} = " in text for name, _, _ in fields(Study))
    assert main(["init", "odd.toml", "--model", "mine:𝒳", "--dataset", "a.package:data"]) == 0
    odd = load_study("./odd.toml").task
    assert (odd.model, odd.dataset) == ("mine:𝒳", "a.package:data")
    for name in (":", "mine:", ":data", "mine.py:data", 'mine:"\\'):
        capsys.readouterr()
        assert main(["init", "other.toml", "--dataset", name]) == 2
        assert "expected module:function, such as mine:network for mine.py" in capsys.readouterr().err
    assert main(["init", "other.toml", "--dataset", "digit"]) == 2
    assert capsys.readouterr().err == (
        "tombola: --dataset 'digit': no such name; did you mean 'digits'? (or give module:function of your own)\n"
    )
    assert main(["init", "other.toml", "--model", "x"]) == 2
    assert "choose from 'lenet_300_100', " in capsys.readouterr().err
    for name in ("a\x7f:b", "a\nb", "\udcff:b"):
        assert main(["init", "other.toml", "--model", name]) == 2
        assert "expected a name without control characters" in capsys.readouterr().err
    assert not Path("other.toml").exists()


def test_the_comments_of_a_new_study_are_its_default_values(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "a.toml"), "--model", "lenet_300_100", "--dataset", "digits"]) == 0
    text = (tmp_path / "a.toml").read_text()
    (tmp_path / "b.toml").write_text(
        "\n".join(line.removeprefix("# ") for line in text.splitlines()[3:] if " = ..." not in line)
    )
    assert load_study(tmp_path / "b.toml") == load_study(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("there.toml", "exists already"), ("link.toml", "exists already"), ("study.txt", "ends in .toml")],
)
def test_a_file_that_is_there_is_not_overwritten(
    tmp_path: Path, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.toml").write_text("mine")
    (tmp_path / "link.toml").symlink_to("nowhere")
    assert main(["init", str(tmp_path / name)]) == 2
    assert reason in capsys.readouterr().err
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_the_version_names_torch_and_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("tombola ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "tombola" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("tombola wi", {"winners"}),
        ("tombola run digits --recipe.warm", {"--recipe.warmup"}),
        ("tombola run ", {*presets(), "mine.toml", "folder/"}),
    ],
)
def test_what_is_typed_is_completed(typed: str, expected: set[str], tmp_path: Path) -> None:
    for name in ("mine.toml", "mine.py"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    answer = tmp_path / "folder" / "answer"
    about = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SHELL": "fish",
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
        "COMP_TYPE": "9",
    }
    command = [sys.executable, "-c", "from tombola.cli import main; main()"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | about, check=True, timeout=LONG, capture_output=True)
    assert set(answer.read_text().split()) == expected

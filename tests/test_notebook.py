"""The notebook of own loops: it runs, and what it shows is what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "own-loop.ipynb"


def test_the_notebook_of_own_loops_runs_and_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells are executed in order, and the value of a cell's last line is shown, as in Jupyter."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "notebook"}
    threads = torch.get_num_threads()
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    try:
        with torch.random.fork_rng():
            for cell in cells:
                module = ast.parse("".join(cell["source"]))
                last = module.body.pop() if isinstance(module.body[-1], ast.Expr) else None
                exec(compile(module, NOTEBOOK.name, "exec"), space)
                value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), space) if last else None
                kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
                assert ("image/png" in kinds) == (hasattr(value, "to_dict") and hasattr(value, "save")), (
                    "the charts are in the file"
                )
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "pruned weights that are not 0.0: 0\n" in shown
    assert "rewound to equal bits: True\n" in shown
    assert "the sparse network's outputs are the same: True\n" in shown
    kept = ["".join(output["text"]) for cell in cells for output in cell["outputs"] if "text" in output]
    assert [line.split(":")[0] for line in "".join(kept).splitlines() if ":" in line] == [
        line.split(":")[0] for line in shown.splitlines() if ":" in line
    ]

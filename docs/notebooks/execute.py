"""Execute notebooks and keep their outputs in them, charts as pictures: python docs/notebooks/execute.py FILE ..."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def execute(path: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Run the code cells of a notebook one after another in the current folder; yield each with its outputs.

    The value of a cell's last line is an output, as in Jupyter.
    """
    space: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        module = ast.parse("".join(cell["source"]), path.name)
        last = module.body.pop() if module.body and isinstance(module.body[-1], ast.Expr) else None
        value, printed = None, io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(module, path.name, "exec"), space)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), path.name, "eval"), space)
        yield cell, [*_text(printed.getvalue()), *_result(value)]


def _text(text: str) -> Iterator[dict[str, Any]]:
    if text:
        yield {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


def _result(value: Any) -> Iterator[dict[str, Any]]:
    if value is None:
        return
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "to_dict") and hasattr(value, "save"):  # a chart of Altair
        import vl_convert

        picture = vl_convert.vegalite_to_png(json.dumps(value.to_dict()), scale=1.5)
        data = {"text/plain": ["<chart>"], "image/png": base64.b64encode(picture).decode()}
    yield {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data}


def main(paths: list[str]) -> None:
    """Execute each notebook in an empty folder, and write its outputs into it."""
    for path in [Path(name).resolve() for name in paths]:
        document = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            outputs = [found for _, found in execute(path)]
        cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
        for number, (cell, found) in enumerate(zip(cells, outputs, strict=True), 1):
            for output in found:
                output |= {"execution_count": number} if "execution_count" in output else {}
            cell |= {"execution_count": number, "outputs": found}
        new = path.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        os.replace(new, path)


if __name__ == "__main__":
    main(sys.argv[1:])

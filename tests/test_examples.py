"""The worked pages of the documentation: their files and commands run as a user types them, and print what is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from libraries import needs
from pages import blocks, list_lines, shown, type_in

PAGES = Path(__file__).parents[1] / "docs" / "examples"
# One process imports timm, and reads its source, for all pages with a network of timm.
OF_TIMM = (needs("timm"), pytest.mark.xdist_group("timm"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(page.stem, marks=OF_TIMM if '"timm:' in page.read_text() else ())
        for page in sorted(PAGES.glob("*.md"))
        if page.stem != "README"
    ],
)
def test_a_page_is_typed_in(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers_here: None,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = (PAGES / f"{name}.md").read_text()
    if '"timm:' in page:
        request.getfixturevalue("importable_torchvision")
    expected = shown(page)
    assert any("tombola plan" in block for block in expected)
    assert any("tombola results" in block for block in expected)
    try:
        for block, printed in type_in(page):
            if block in expected:
                exact = "tombola plan" in block
                assert list_lines(printed, exact=exact) == list_lines(expected[block], exact=exact), block
    finally:
        for each in blocks(page):
            sys.modules.pop((each.file or "").removesuffix(".py"), None)  # the modules of the page
    assert "note: " not in capsys.readouterr().err.replace("note: no interval", "")
    assert (tmp_path / "ticket.safetensors").exists()

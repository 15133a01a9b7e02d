"""What the site needs besides its pages: the command line's help, drawings in its colours, links of root files, search."""

from __future__ import annotations

import argparse
import html
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
HERE = {"ARCHITECTURE.md": "inside.md", "CONTRIBUTING.md": "contributing/index.md", "CHANGELOG.md": "changes.md"}
"""The files beside `docs` that the site has as pages."""

LISTS = ("api/", "command-line.md", "changes.md")
"""The pages to look something up in. A search shows them below those that explain it."""

INLINE = re.compile(r"<code>[^<]*</code>")
"""Code within a sentence or a table; blocks have further tags in them."""

INDENTED = re.compile(r"(?<=\n\n) {4}tombola .*\n(?: {4}.*\n)*(?=\n|\Z)")
"""Indented commands, as generated pages have them."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the files of the root and the command line's help into the pages that ask for them; say how they are found."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith(LISTS):
        page.meta["search"] = {"boost": 0.001}  # since a title counts a thousand times as much as text
    markdown = re.sub(r"^--8<-- \"(.+)\"$", lambda found: _root_file(found[1], up), markdown, flags=re.MULTILINE)
    markdown = INDENTED.sub(lambda found: f"```sh\n{textwrap.dedent(found[0])}```\n", markdown)
    if page.file.src_uri == "command-line.md":
        markdown += "\n".join(describe_command_line())
    return markdown


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Put drawings into the page itself, where they have its colours; keep the hyphens of an option with its first word."""

    def draw(found: re.Match[str]) -> str:
        drawing = (DOCS / page.file.src_uri).parent / found[1]
        return f'<figure class="drawing">{drawing.read_text()}</figure>'

    def keep_together(found: re.Match[str]) -> str:
        return re.sub(r"--\w+", r'<span class="option">\g<0></span>', found[0])

    content = INLINE.sub(keep_together, content)
    return re.sub(r'<p><img [^>]*src="([^"]+\.svg)"[^>]*></p>', draw, content)


def _root_file(name: str, up: str) -> str:
    """Return a file of the root with its links as they are on the site, `up` being the way to its first page."""
    text = (DOCS.parent / name).read_text()
    if name.endswith(".ipynb"):
        return "\n\n".join(_show_notebook(json.loads(text)["cells"]))
    for path, page in HERE.items():
        text = text.replace(f"]({path}", f"]({up}{page}")
    text = re.sub(r"```mermaid.*?```", "![How a study runs](docs/pictures/house.svg)", text, flags=re.DOTALL)
    return text.replace("](docs/", f"]({up}")


def _show_notebook(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the cells of a notebook and their outputs in Markdown."""
    for cell in cells:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                yield f"![A chart](data:image/png;base64,{data['image/png']})"
            else:
                yield "```text\n" + "".join(output.get("text") or data["text/plain"]).rstrip() + "\n```"


def describe_command_line() -> Iterator[str]:
    """Yield the lines of a page with every verb of the command line, from its parser."""
    from tombola.cli.main import GROUPS, make_parser

    parser = make_parser()
    verbs = _subparsers(parser)
    seen: set[int] = set()
    for title, modules in GROUPS.items():
        yield f"\n## {title[0].upper()}{title[1:]}\n"
        homes = [module.__name__ for module in modules]
        for verb in verbs.values():
            if verb.get_default("verb").__module__ in homes:
                yield from _describe_verb(verb, seen)
    yield "\n## Fields of a study\n"
    yield "Verbs that are about a study take these options too. Each replaces the value in the study's file.\n"
    yield from _table(_group(verbs["run"], of_fields=True))


def _describe_verb(parser: Any, seen: set[int]) -> Iterator[str]:
    if id(parser) in seen:
        return
    seen.add(id(parser))
    yield f"\n### {parser.prog}\n"
    yield f"{_escape(parser.description or '')}\n"
    yield f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```\n"
    yield from _table(_group(parser, of_fields=False))
    for inner in _subparsers(parser).values():
        yield from _describe_verb(inner, seen)


def _group(parser: Any, *, of_fields: bool) -> list[argparse.Action]:
    groups = [group for group in parser._action_groups if (group.title == "fields of the study") == of_fields]
    actions = [action for group in groups for action in group._group_actions]
    return [action for action in actions if action.help and action.help != argparse.SUPPRESS]


def _table(actions: list[argparse.Action]) -> Iterator[str]:
    rows = [action for action in actions if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))]
    if not rows:
        return
    yield "| option | meaning |\n|---|---|"
    for action in rows:
        default = action.default if isinstance(action.default, (str, int, float, Path)) else ""
        text = (action.help or "").replace("%(default)s", str(default)).replace("%%", "%")
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        names = html.escape(" ".join([", ".join(action.option_strings), str(value)]).strip(), quote=False)
        meaning = _escape(text).replace("|", "\\|")
        yield f"| <code>{names.replace('|', '&#124;')}</code> | {meaning} |"
    yield ""


def _subparsers(parser: Any) -> dict[str, Any]:
    return {
        name: inner
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, inner in action.choices.items()
    }


def _escape(text: str) -> str:
    """Return the paragraphs of a text, each on one line, for Markdown."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return html.escape("\n\n".join(paragraphs), quote=False).replace("*", "\\*")

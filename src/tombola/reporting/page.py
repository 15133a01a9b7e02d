"""The page: one HTML file that contains everything it needs, so that it works offline and sends no request.

The template escapes all text. The content security policy of the page allows a browser to run the scripts whose hashes
it lists, and to load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import polars as pl
import vl_convert
from markupsafe import Markup

from tombola.analysis.claims import summarise
from tombola.reporting import findings, look, provenance, tables
from tombola.reporting.contents import Contents
from tombola.reporting.sections import sections
from tombola.terminal import visible_lines

VEGA_LITE = "6.4"
"""The version of Vega-Lite that draws both the page and the figures."""


def page(contents: Contents, *, refreshed: str = "") -> str:
    """Return the page as HTML.

    Args:
        contents: the data that the page shows.
        refreshed: for a page that is served: a path on the same server whose text changes with the contents. The page
            requests it regularly, and reloads itself when it has changed.
    """
    scripts = [_library(), _asset("page.js")]
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"connect-src {chr(39) + 'self' + chr(39) if refreshed else chr(39) + 'none' + chr(39)}; "
        "script-src " + " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    )
    found = sections(contents)
    return _template().render(
        contents=contents,
        policy=policy,
        css=look.css() + _asset("page.css"),
        scripts=scripts,
        summary=summarise(contents.claims) if contents.claims else (),
        claims=tables.claims(contents.claims),
        coverage=None if contents.coverage is None else tables.coverage(contents.coverage),
        findings=findings.findings(contents),
        progress=findings.progress(contents),
        keeps=findings.keeps(contents),
        sections=[section for section in found if section.parts],
        absent=[section for section in found if not section.parts],
        specification=look.on_page,
        fields=provenance.study_fields(contents.study),
        toml=provenance.as_toml(contents.study),
        machines=provenance.machines(contents.records),
        commands=provenance.commands(contents),
        refreshed=refreshed,
    )


def cells(table: pl.DataFrame) -> list[list[str]]:
    """Return a table's rows as text: percentages and points with two decimals or more, other numbers with four digits.

    >>> cells(pl.DataFrame({"layer": ["fc"], "shared %": [12.3456], "effect": [0.00123456], "sd": [None]}))
    [['fc', '12.35', '0.001235', '–']]
    """
    names = table.columns
    return [[_text(value, name) for value, name in zip(row, names, strict=True)] for row in table.rows()]


def numeric(table: pl.DataFrame) -> list[bool]:
    """Return for each column whether it holds numbers."""
    return [kind.is_numeric() for kind in table.dtypes]


def _text(value: Any, name: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        share = "%" in name or "points" in name or name.isdecimal()  # the column of a level holds percentages
        return f"{value:.2f}" if value == 0 or abs(value) >= (0.1 if share else 100) else f"{value:.4g}"
    return str(value)


def _visible_lines(value: Any) -> Any:
    """Return a text with what cannot be drawn as escape sequences, except for ends of lines; the rest unchanged."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return visible_lines(value)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible_lines,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cells=cells, numeric=numeric)
    return environment.get_template("page.html")


@cache
def _library() -> str:
    """Return the charting library's JavaScript in a form that can be embedded in a page."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return _within_script(bundle)


def _within_script(source: str) -> str:
    r"""Return JavaScript that does not contain the end of the script element around it.

    >>> _within_script("a = '</script>' + '<!--'")
    "a = '<\\/script>' + '<\\!--'"
    """
    return re.sub(r"<(/script|!--)", r"<\\\1", source, flags=re.IGNORECASE)


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _asset(name: str) -> str:
    return resources.files("tombola.reporting").joinpath("assets", name).read_text(encoding="utf-8")

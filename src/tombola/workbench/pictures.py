"""Charts of a study, to show inline in a notebook, and the report as one HTML page."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.analysis.defaults import MARGIN
from tombola.errors import NothingStoredError, UserError, as_path, as_texts, did_you_mean
from tombola.files import check_output, write_output
from tombola.own.functions import refer
from tombola.store.layout import STORE
from tombola.study.planner import Planner
from tombola.study.schema import Study, presets
from tombola.threads import one_thread
from tombola.workbench.studies import AnyStudy, Overrides, open_planner

if TYPE_CHECKING:
    from tombola.reporting.contents import Contents
    from tombola.reporting.look import Chart


def charts(
    study: AnyStudy,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    costly: Collection[str] = (),
    level: int | None = None,
    margin: float = MARGIN,
) -> dict[str, Chart]:
    """Return the charts of a study's report by name, as Altair charts, which a notebook shows inline.

    Altair fetches the code that draws them; `altair.renderers.enable("png", scale_factor=1.5)` needs no network.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        costly: further analyses, which take time: `"functions"`, `"connectivity"`, `"matching"`, `"similarity"`,
            `"basins"`, and, if they have been run, `"rewind-point"` and `"early"`.
        level: the level of the charts that show one level.
        margin: by how much the accuracy of a winning ticket may be lower, on the scale 0..1.

    Raises:
        UserError: if the store has no result of the study, or if the extra `report` is not installed.

    >>> from tombola.workbench.example import finished
    >>> "overlap" in charts(**finished())
    True
    """
    with one_thread(), check_installed():
        from tombola.reporting.look import inline
        from tombola.reporting.sections import sections, select_charts

        planner = open_planner(study, overrides, store=store, data=data)
        contents = gather_stored(planner, *name_study(study, overrides), costly=costly, level=level, margin=margin)
        found = select_charts(sections(contents))
        return {part.name: inline(part.chart, part.title) for part in found if part.chart is not None}


def report(
    study: AnyStudy,
    path: str | Path,
    overrides: Overrides = None,
    *,
    store: str | Path = STORE,
    data: str | Path | None = None,
    costly: Collection[str] = (),
    level: int | None = None,
    margin: float = MARGIN,
) -> Path:
    """Write a report on a study, one HTML file that needs no network, and return its path.

    Args:
        study: a `Study`, the name of a preset, or the path of a TOML file.
        path: the file to write.
        overrides: fields with other values.
        store: the folder of the store.
        data: the folder of the data sets.
        costly: further analyses, which take time: `"functions"`, `"connectivity"`, `"matching"`, `"similarity"`,
            `"basins"`, and, if they have been run, `"rewind-point"` and `"early"`.
        level: the level of the charts that show one level.
        margin: by how much the accuracy of a winning ticket may be lower, on the scale 0..1.

    Raises:
        UserError: if the store has no result of the study, if the file cannot be written, or if the extra `report` is
            not installed.

    >>> import tempfile
    >>> from tombola.workbench.example import finished
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report(path=folder + "/report.html", **finished()).stat().st_size > 100_000
    True
    """
    with one_thread(), check_installed():
        from tombola.reporting.page import page

        path = as_path(path, "path")
        check_output(path)
        planner = open_planner(study, overrides, store=store, data=data)
        contents = gather_stored(planner, *name_study(study, overrides), costly=costly, level=level, margin=margin)
        write_output(path, page(contents).encode())
        return path


def gather_stored(
    planner: Planner,
    title: str,
    command: Sequence[str],
    *,
    costly: Collection[str] = (),
    level: int | None = None,
    margin: float = MARGIN,
) -> Contents:
    """Gather the stored results of a study, see `tombola.reporting.contents.gather`.

    Raises:
        NothingStoredError: if the store has no result of the study.
    """
    from tombola.reporting.contents import COSTLY, FURTHER, gather

    known = (*COSTLY, *FURTHER)
    costly = as_texts(costly, "costly", "analyses")
    if unknown := [each for each in costly if each not in known]:
        raise UserError(f"costly: unknown analysis {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    contents = gather(planner, title, command, costly=costly, level=level, margin=margin)
    if not contents.results:
        raise NothingStoredError.of_study(planner.store.root)
    return contents


def name_study(study: AnyStudy, overrides: Overrides = None) -> tuple[str, list[str]]:
    """Return the title of a study, and how the command line names it: its name and the options that override fields.

    A `Study` has no name; the command line would read its fields, which a report shows, from a file.

    >>> name_study("digits", {"levels": 3})
    ('digits', ['digits', '--levels', '3'])
    """
    if isinstance(study, Study):
        return "study", ["study.toml"]
    known = str(study) if str(study) in presets() else Path(study).name
    return known.removesuffix(".toml"), [known, *flags(dict(overrides or {}))]


def flags(fields: dict[str, Any]) -> list[str]:
    """Return the options of the command line that override these fields of a study.

    >>> flags({"levels": 3, "seeds": [0, 1], "task.model_arguments": {"width": 8}})
    ['--levels', '3', '--seeds', '0', '1', '--task.model-arguments', 'width=8']
    >>> flags({"task.model_arguments": {"sizes": (1, 2)}, "recipe.epochs": None})
    ['--task.model-arguments', 'sizes=[1, 2]']
    >>> flags({"task.model_arguments": {"norm": "batch", "size": "8"}})
    ['--task.model-arguments', 'norm=batch', 'size="8"']
    """
    words = []
    for field, value in fields.items():
        if value is None:  # the default
            continue
        words.append(f"--{field.replace('_', '-')}")
        if isinstance(value, dict):
            words += [f"{key}={_quote(each) if _reads_as_value(each) else _word(each)}" for key, each in value.items()]
        else:
            words += [_word(refer(each, field)) for each in (value if isinstance(value, (list, tuple)) else [value])]
    return words


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_quote, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reads_as_value(value: Any) -> bool:
    """Return whether the command line would read a text as a number, a list or another value without quotes."""
    if not isinstance(value, str):
        return False
    try:
        tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        with suppress(ValueError):
            float(value)
            return True
        return False
    return True


def _quote(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _word(value)


@contextmanager
def check_installed() -> Iterator[None]:
    """If the charting library is missing, raise `UserError` with what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("altair", "jinja2", "vl_convert"):
            raise
        raise UserError(f"charts need {error.name}, which is not installed: pip install 'tombola[report]'") from error

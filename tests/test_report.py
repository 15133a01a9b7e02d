"""The report: in a browser, as figures, served; for studies of all sizes, and with names that would do harm."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import tomllib
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import combinations, count
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import pytest
import torch

from browser import CHROMIUM, Browser, PageGoneError, browser
from nasty_task import NASTY
from processes import LONG, start_command, until
from stores import InTurn
from tombola import Planner, Recipe, Store, Study, Task, UserError, load_problem, load_study
from tombola.analysis import layers, overlap, reference, reinit, winners
from tombola.analysis import weights as weights_analysis
from tombola.analysis.accuracy import Row
from tombola.cli import main
from tombola.engine.run import run
from tombola.pruning.mask import Mask
from tombola.reporting import charts, findings, look, provenance, tables
from tombola.reporting.contents import COSTLY, Contents, gather, summarise_verification
from tombola.reporting.figures import write
from tombola.reporting.page import page
from tombola.reporting.sections import sections, select_charts
from tombola.reporting.watch import ADDRESS, serve
from tombola.study.reinitialisation import plan
from tombola.study.tickets import Tickets

TASK = Task(dataset="nasty_task:dataset", model="nasty_task:model")
STUDY = Study(
    task=TASK,
    recipe=Recipe(lr=0.1, batch_size=50, epochs=2, rewind=2),
    importances=("magnitude", "l1", "min_max"),
    seeds=(0, 1),
    data_seeds=(100,),
    levels=3,
    fraction=0.4,
)

pytestmark = pytest.mark.xdist_group("report")  # one browser, and one study, for all
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; to run: apt-get install chromium")


def open_planner(root: Path, study: Study = STUDY) -> Planner:
    return Planner(study, load_problem(study.task), Store(root))


def finish(planner: Planner, **how: Any) -> None:
    run(planner, InTurn(last_first=False, works_on=planner.problem), lambda *_: None, **how)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Of a finished study, with partial reinitialisations: two draws at level 2, and of two importances one at 1."""
    torch.set_num_threads(1)
    planner = open_planner(tmp_path_factory.mktemp("report") / "store")
    finish(planner)
    for each in [*plan(Tickets(planner), 2, 2), *plan(Tickets(planner), 1, 1, ["min_max", "l1"], [1])]:
        finish(each.planner)
    return planner


@pytest.fixture(scope="module")
def contents(planner: Planner) -> Contents:
    return gather(planner, NASTY, ["nasty.toml"], costly=COSTLY, level=2)


@pytest.fixture(scope="module")
def html(contents: Contents) -> str:
    return page(contents)


@pytest.fixture(scope="module")
def study_file(planner: Planner, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What names the finished study on the command line."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(Path(__file__).with_name("nasty_task.py"), folder)
    (folder / "small.toml").write_text(provenance.as_toml(STUDY), encoding="utf-8")
    return [str(folder / "small.toml"), "--store", str(planner.store.root)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as one:
        yield one


def test_commands_do_every_stored_reinitialisation_again(contents: Contents) -> None:
    found = [command for what, command in provenance.commands(contents) if what == "partial reinitialisation"]
    assert found == [
        "tombola reinit nasty.toml --level 1 --draws 1 --importances l1 min_max",
        "tombola reinit nasty.toml --level 2 --draws 2",
    ]


def show(chromium: Browser, folder: Path, html: str, **how: Any) -> None:
    (folder / "report.html").write_text(html, encoding="utf-8")
    chromium.open((folder / "report.html").as_uri(), **how)


EMPTY_CHARTS = """[...document.querySelectorAll('.chart')].filter(chart =>
  !chart.querySelector('svg .role-mark.mark-rect path, svg .role-mark.mark-symbol path')
  || chart.querySelector('svg').getBoundingClientRect().width < 100).map(chart => chart.id)"""
CUT_TEXTS = """[...document.querySelectorAll('.chart')].flatMap(chart => {
  const { left, right } = chart.getBoundingClientRect();
  return [...chart.querySelectorAll('svg text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < left - 1 || box.right > right + 1;
  }).map(text => chart.id + ": " + text.textContent);
})"""
SIDEWAYS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def check_drawn(chromium: Browser, charts: int) -> None:
    assert chromium.errors == []
    assert len(chromium.requests) == 1, "only the page itself was asked for"
    assert int(chromium("document.documentElement.dataset.drawn")) == charts
    assert chromium(EMPTY_CHARTS) == []
    assert chromium(CUT_TEXTS) == []
    assert not chromium(SIDEWAYS)


# in a browser


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1600, False)])
def test_every_chart_is_drawn_and_nothing_is_asked_for(
    chromium: Browser, contents: Contents, html: str, tmp_path: Path, width: int, dark: bool
) -> None:
    assert len(html.encode()) < 6e6
    show(chromium, tmp_path, html, width=width, dark=dark)
    found = sections(contents)
    assert all(section.parts for section in found), "nothing was left out"
    check_drawn(chromium, len(select_charts(found)))
    background = chromium("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    numbers = "[...document.querySelectorAll('figure')].every(each => each.querySelector('details table tbody td'))"
    assert chromium(numbers), "each chart has its table"
    if dark:
        assert chromium.pdf().startswith(b"%PDF")


@in_browser
def test_names_are_shown_and_never_run(chromium: Browser, contents: Contents, html: str, tmp_path: Path) -> None:
    assert html.count("<script") - html.count('<script type="application/json"') == 2 + _in_library(html)
    show(chromium, tmp_path, html)
    assert chromium("window.broken") is None
    assert chromium("document.querySelector('h1').textContent") == NASTY
    assert NASTY in chromium("document.querySelector('#study').textContent"), "the classes"
    assert f"{NASTY}.weight" in chromium("document.querySelector('#layers table').textContent")
    shown = chromium("document.querySelector('#layers svg').textContent")
    assert "<script>" in shown
    assert chromium("document.querySelectorAll('script').length") == 2 + len(select_charts(sections(contents)))
    cell = chromium(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('#layers svg .mark-rect path').getBoundingClientRect())"
    )
    chromium("window.scrollTo(0, 0)")
    chromium(f"window.scrollTo(0, {cell[1] - 200})")
    top = chromium("document.querySelector('#layers svg .mark-rect path').getBoundingClientRect().y")
    chromium.hover(cell[0], top + 4)
    chromium.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    assert "<script>" in chromium("document.querySelector('#vg-tooltip-element').textContent")
    assert chromium("window.broken") is None
    assert chromium.errors == []


def _in_library(html: str) -> int:
    """How often the charting library itself speaks of scripts."""
    library = max(re.findall(r"<script>(.*?)</script>", html, re.DOTALL), key=len)
    return library.count("<script")


@in_browser
def test_the_slider_changes_the_matrix_by_keyboard(
    chromium: Browser, contents: Contents, html: str, tmp_path: Path
) -> None:
    show(chromium, tmp_path, html)
    figures = (
        "[...document.querySelectorAll('#chart-overlap-matrix svg .mark-text.role-mark text')].map(t => t.textContent)"
    )
    slider = "document.querySelector('#chart-overlap-matrix input[type=range]')"
    before = chromium(figures)
    assert len(before) == 8, "three importances with each other, and two data orders"
    assert chromium(f"{slider}.getAttribute('aria-label')")
    chromium(f"{slider}.focus()")
    assert chromium(f"{slider}.value") == "2"
    chromium.press("ArrowRight", 39)
    chromium.wait(f"{slider}.value === '3'")
    chromium.wait(f"JSON.stringify({figures}) !== {before!r}.join()")
    after = chromium(figures)
    assert before != after
    assert chromium.errors == []
    table = tables.pairs(contents.tables["overlap"])
    expected = table.filter((pl.col("level") == 3) & (pl.col("ticket") == "magnitude") & (pl.col("other") == "l1"))
    assert f"{expected['shared %'][0]:.1f}" in after


@in_browser
def test_twelve_importances_sixty_layers_and_one_seed(chromium: Browser, tmp_path: Path) -> None:
    large = synthetic_contents([f"importance_{number}" for number in range(12)], layer_count=60, levels=2)
    html = page(large)
    assert len(html.encode()) < 6e6
    show(chromium, tmp_path, html, width=360)
    check_drawn(chromium, len(select_charts(sections(large))))
    assert chromium("document.querySelector('#chart-accuracy .mark-area') === null"), "no band from one seed"
    room = "document.querySelector('#chart-accuracy .mark-group .background').getBoundingClientRect().width"
    assert chromium(room) > 230, "what is written around leaves room for the chart"
    labels = chromium(
        "[...document.querySelectorAll('#chart-accuracy .role-legend-label text')].map(t => t.textContent)"
    )
    assert labels == list(large.labels)
    top = "Math.min(...[...{}.querySelectorAll('text')].map(each => each.getBoundingClientRect().top))"
    place = "document.querySelector('#chart-accuracy')"
    assert chromium(f"{top.format(place)} >= {place}.getBoundingClientRect().top"), "no row of the legend is cut"
    assert len(chromium("[...document.querySelectorAll('.kept .card')].map(each => each.textContent)")) == 12
    assert chromium("document.querySelectorAll('#chart-layers-1-importance-0 .mark-rect path').length") >= 60 * 2


@in_browser
def test_tickets_without_a_connection_are_shown(chromium: Browser, tmp_path: Path) -> None:
    empty = synthetic_contents(["magnitude", "l1", "l2"], layer_count=1, levels=24)
    assert not empty.results[-1].alive
    show(chromium, tmp_path, page(empty))
    assert chromium.errors == []
    assert chromium(EMPTY_CHARTS) == ["chart-overlap-matrix"], "at the last level there is nothing to share"
    assert chromium("document.querySelectorAll('#chart-layers-1-magnitude .mark-text text').length") > 0


UNSEEN = "".join(map(chr, (0, 7, 10, 27, 127, 0x85, 0x2028, 0x2029, 0x202E, 0x2066, 0xFDD0, 0xFFFE, 0xFFFF)))
"""Characters that cannot be drawn, or that change how what follows is drawn."""


def unseen_contents() -> Contents:
    """Return contents whose names have characters that cannot be drawn."""
    made = synthetic_contents(["l1", f"l1{UNSEEN}"], layer_count=1, levels=1, block=f"a{UNSEEN}b")
    about = {**made.about_data, "name": f"d{UNSEEN}", "classes": (f"c{UNSEEN}", "half\ud800")}
    return dataclasses.replace(made, name=f"s{UNSEEN}\udce9", command=(f"s{UNSEEN}",), about_data=about)


@in_browser
def test_names_with_characters_that_cannot_be_drawn_are_shown_escaped(chromium: Browser, tmp_path: Path) -> None:
    contents = unseen_contents()
    show(chromium, tmp_path, page(contents))
    assert chromium.errors == []
    assert int(chromium("document.documentElement.dataset.drawn")) == len(select_charts(sections(contents)))
    assert chromium(EMPTY_CHARTS) == []
    assert r"a\x00\x07" in chromium("document.querySelector('#layers svg').textContent")
    assert r"\u2028\u2029\u202e" in chromium("document.querySelector('#layers table').textContent")
    assert r"half\ud800" in chromium("document.querySelector('#study').textContent")


def test_figures_of_names_with_characters_that_cannot_be_drawn(tmp_path: Path) -> None:
    charts = select_charts(sections(unseen_contents()))
    assert charts
    for path in write(charts[::3], tmp_path / "figures", ["svg"], look.COLUMN):
        ElementTree.parse(path)  # is well-formed XML
    for path in write(charts[:1], tmp_path / "figures", ["pdf", "png"], look.COLUMN):
        assert path.read_bytes()[:4] in (b"%PDF", b"\x89PNG")


def test_names_that_can_be_drawn_stay_as_they_are(contents: Contents) -> None:
    parts = select_charts(sections(contents))
    assert parts
    for part in parts:
        assert part.chart is not None
        drawn, made = look.on_page(part.chart), json.loads(part.chart.to_json(validate=False))
        assert all(drawn[key] == value for key, value in made.items() if key not in ("config", "autosize", "width"))


@in_browser
def test_a_page_that_is_served_loads_itself_anew(chromium: Browser) -> None:
    small = synthetic_contents(["magnitude", "l1"], layer_count=2, levels=1)
    with serve(0) as served:
        served.show(page(dataclasses.replace(small, name="first"), refreshed=ADDRESS))
        chromium.open(served.url)
        assert chromium("document.querySelector('h1').textContent") == "first"
        chromium.wait("performance.getEntriesByName(location.href + 'version').length > 0")
        opened = "document.querySelector('#overlap figure details').open"
        slider = "document.querySelector('#chart-overlap-matrix input')"
        assert chromium(f"{slider}.value") == "1"
        chromium(f"{opened} = true; {slider}.value = 0")
        served.show(page(dataclasses.replace(small, name="second"), refreshed=ADDRESS))
        chromium.wait("document.querySelector('h1')?.textContent === 'second'")
        chromium.wait("document.documentElement.dataset.drawn !== undefined")
        chromium.wait(f"{opened} && {slider}.value === '0'")
        assert chromium.errors == []
        assert all(url.startswith((served.url, "data:")) for url in chromium.requests)


def test_waiting_for_a_page_goes_on_where_another_one_takes_its_place() -> None:
    page_gone = {"error": {"code": -32000, "message": "Inspected target navigated or closed"}}
    begun = [{"result": {"targetId": "page"}}, {"result": {"sessionId": "session"}}, *[{"result": {}}] * 4]
    evaluated = [{"result": {"result": {"value": value}}} for value in (False, True)]
    answers = [*begun, page_gone, *evaluated, page_gone]
    read, to_read = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, answer in enumerate(answers, start=1):
            os.write(to_read, json.dumps({"id": number, **answer}).encode() + b"\0")
        made_up = Browser(nowhere, read)
        made_up.wait("true")
        with pytest.raises(PageGoneError, match="navigated"):
            made_up("true")
    finally:
        for end in (read, to_read, nowhere):
            os.close(end)


# contents and findings


def test_every_section_tells_what_it_shows_or_how_to_come_by_it(planner: Planner) -> None:
    some = gather(planner, "s", ["s.toml", "--levels", "3"], level=3)
    absent = {section.name: section.command for section in sections(some) if not section.parts}
    assert absent == {
        "connectivity": "tombola report s.toml --with connectivity --levels 3",
        "functions": "tombola report s.toml --with functions --levels 3",
        "matching": "tombola report s.toml --with matching --levels 3",
        "similarity": "tombola report s.toml --with similarity --levels 3",
    }
    none = dataclasses.replace(some, tables={name: each for name, each in some.tables.items() if name != "reinit"})
    html = page(none)
    assert "tombola reinit s.toml --level 3 --levels 3" in html
    assert str(planner.store.root) not in html


def test_every_partial_reinitialisation_in_the_store_is_shown(planner: Planner, contents: Contents) -> None:
    (section,) = [section for section in sections(contents) if section.name == "reinit"]
    assert [part.title for part in section.parts] == [
        "Level 1, connections shared by the tickets of l1 and min_max; 1 draw for each of 1 seed",
        "Level 2, connections shared by the tickets of all 3 importances; 2 draws for each of 2 seeds",
    ]
    of_two, of_all = (part.table for part in section.parts)
    assert of_two["importance"].unique(maintain_order=True).to_list() == ["l1", "min_max"]
    assert of_two["low"].null_count() == len(of_two), "from one draw no interval"
    expected = tables.reinit(reinit.of_plans(plan(Tickets(planner), 2, 2)))
    assert of_all.equals(expected)
    chart = section.parts[0].chart
    assert chart is not None
    drawn = str(look.on_page(chart))
    assert "'values': ['l1', 'min_max']" in drawn, "its legend"
    assert f"'domain': {list(STUDY.importances)}" in drawn, "colours are those of all charts"


def test_layers_stand_in_their_order_where_an_importance_lacks_one() -> None:
    rows = [("a", "one", None), ("a", "two", 0.5), ("b", "one", 0.1), ("b", "two", 0.2)]
    table = pl.DataFrame(rows, ["importance", "layer", "effect"], orient="row")
    table = table.with_columns(pl.lit(0.0).alias("shared, mean"), pl.lit(0.0).alias("other, mean"))
    drawn = look.on_page(charts.effects(table, ["a", "b"], "effect"))
    assert drawn["layer"][1]["encoding"]["y"]["sort"] == ["one", "two"]
    (values,) = [each for each in drawn["datasets"].values() if "effect" in each[0]]
    assert len(values) == 3


def test_reinitialisations_of_another_study_are_not_shown(planner: Planner) -> None:
    fewer = {"importances": ("magnitude", "l1"), "seeds": (0,), "data_seeds": ()}
    for other in (fewer, {"levels": 1, "seeds": (0,)}, {"recipe": STUDY.recipe.model_copy(update={"lr": 0.2})}):
        with pytest.raises(UserError, match="no partial reinitialisation is in"):
            reinit.of_study(Tickets(open_planner(planner.store.root, STUDY.model_copy(update=other))))
    seed = reinit.of_study(Tickets(open_planner(planner.store.root, STUDY.model_copy(update={"seeds": (1,)}))))
    assert seed.select("level", "seed", "draws").unique().sort("level").rows() == [(1, 1, 1), (2, 1, 2)]


def test_draws_that_not_every_seed_has_are_left_out(tmp_path: Path) -> None:
    study = STUDY.model_copy(update={"importances": ("magnitude", "l1"), "data_seeds": (), "levels": 1})
    half = open_planner(tmp_path / "store", study)
    finish(half)
    first, second = plan(Tickets(half), 1, 3)
    finish(first.planner)
    finish(second.planner, chains=[chain for chain in second.planner.chains if chain.seed < 3])
    assert reinit.of_study(Tickets(half)).select("seed", "draws").unique().sort("seed").rows() == [(0, 2), (1, 2)]


def test_the_level_that_is_shown(planner: Planner) -> None:
    table = winners.of_study(Tickets(planner), margin=1.0)
    assert table["level"].to_list() == [3, 3, 3], "a margin that everything keeps"
    assert gather(planner, "s", ["s"], margin=1.0).level == 3
    level: Any = np.int64(2)
    assert gather(planner, "s", ["s"], level=level).level == 2
    with pytest.raises(UserError, match=r"level 4: expected a level from 1 on .* they have levels 1 to 3"):
        gather(planner, "s", ["s"], level=4)


def test_the_numbers_of_the_findings(contents: Contents) -> None:
    found = {finding.title: finding for finding in findings.findings(contents)}
    dense = [row.test_accuracy for row in contents.results if row.level == 0 and row.importance == "l1"]
    assert found["Dense network"].figure == f"{100 * sum(map(float, filter(None, dense))) / 2:.2f} %"
    whole = contents.tables["overlap"].filter((pl.col("layer") == "(all)") & (pl.col("level") == 2))
    together = whole.filter(pl.col("k") == 3)["shared_of_ticket"].to_numpy().mean()
    assert found["Shared by all"].figure == f"{100 * together:.1f} %"
    floor = whole.filter(pl.col("kind") == "data order")["shared_of_ticket"].to_numpy().mean()
    assert found["Noise floor"].figure in (f"{100 * floor:.1f} %", f"{100 * floor:.0f} %")
    assert found["Bits confirmed"].figure == f"0 of {len(contents.records)}"
    assert "tombola verify does this" in found["Bits confirmed"].text


def test_the_sparsest_ticket_of_each_importance_has_its_sentence(contents: Contents) -> None:
    seeds = {"dense": (0.98, 0.97), "near": (0.976, 0.97), "far": (0.5, 0.5)}
    accuracies = {"magnitude": ("dense", "near", "near"), "l1": ("dense", "near", "far"), "min_max": ("dense", "far")}
    results = [
        Row(name, seed, level, 0.4**level, accuracy, 8, 0.1, False)
        for name, levels in accuracies.items()
        for level, which in enumerate(levels)
        for seed, accuracy in enumerate(seeds[which])
    ]
    found = winners.select_winners(winners.by_level(results, margin=0.005))
    shown = dataclasses.replace(contents, results=tuple(results), tables={"winners": found}, margin=0.005)
    kept = findings.keeps(shown)
    assert kept is not None
    assert "at most 0.5 points below the dense network's" in kept.meaning
    assert [(each.title, each.figure) for each in kept.findings] == [
        ("magnitude", "16.0 % alive"),
        ("l1", "40.0 % alive"),
        ("min_max", "none"),
    ]
    assert [each.text for each in kept.findings] == [
        "magnitude keeps the accuracy at level 2 with 16.0 % of the connections (6.2 times fewer): 97.30 %, and "
        "97.50 % for the dense network. The difference is −0.20 points (95 % interval −2.74 to +2.34, partly outside "
        "the margin). No sparser ticket is stored.",
        "l1 keeps the accuracy at level 1 with 40.0 % of the connections (2.5 times fewer): 97.30 %, and 97.50 % for "
        "the dense network. The difference is −0.20 points (95 % interval −2.74 to +2.34, partly outside the margin).",
        "No ticket of min_max up to level 1 keeps the accuracy.",
    ]
    alike = found.with_columns(low="difference", high="difference")
    text = findings.keeps(dataclasses.replace(shown, tables={"winners": alike})).findings[0].text  # type: ignore[union-attr]
    assert "−0.20 points, the same for every seed, so no interval can be given" in text
    surely = dataclasses.replace(shown, tables={"winners": found.with_columns(surely=True)})
    assert "fully within the margin" in findings.keeps(surely).findings[0].text  # type: ignore[union-attr]
    none = dataclasses.replace(shown, tables={"winners": found.filter(pl.col("importance") != "l1")})
    assert findings.keeps(none).findings[1].figure == "–"  # type: ignore[union-attr]
    assert "l1 keeps the accuracy at level 1 with 40.0\u00a0% of" in page(shown)


def test_what_collapsed_is_named(contents: Contents) -> None:
    gone = Row("l1", 0, 2, 0.36, 0.9, 8, 0.1, False, ("fc",))
    found = findings.collapse(dataclasses.replace(contents, results=(*contents.results, gone)))
    assert found is not None
    assert found.figure == "1"
    assert "l1: fc from level 2" in found.text
    assert "None for magnitude, min_max" in found.text


def test_what_verifying_has_found_is_told(contents: Contents) -> None:
    here, there = {"torch": "1"}, {"torch": "2"}
    records = [
        {"machine": here, "confirmed": [{"when": "2026-01-02T10:00:00+00:00", "machine": here}]},
        {"machine": here, "contradicted": [{"when": "2026-01-03T10:00:00+00:00", "machine": there}]},
        {
            "contradicted": [{"when": "2026-01-01T10:00:00+00:00"}],
            "confirmed": [{"when": "2026-01-04T10:00:00+00:00"}],
        },
        {},
    ]
    found = findings.verification(dataclasses.replace(contents, verified=summarise_verification(records)))
    assert found.figure == "2 of 4"
    assert "last on 2026-01-04 10:00 UTC. 1 gave other bits when last repeated, on another machine" in found.text


def test_a_study_that_is_not_finished_says_so(tmp_path: Path) -> None:
    planner = open_planner(tmp_path / "store")
    nothing = gather(planner, "s", ["s"])
    assert nothing.level is None
    assert "0 of 32 tickets are stored" in page(nothing)
    assert {section.command for section in sections(nothing)} == {"tombola run s"}
    finish(planner, chains=[chain for chain in planner.chains if chain.importance == "l1"])
    half = gather(planner, "s", ["s"])
    assert half.trainings_left > 0
    text = findings.progress(half)
    assert text is not None
    assert "This study is not finished: 12 of 32 tickets are stored" in text
    assert page(half)


def test_one_importance_has_nothing_to_compare_with(planner: Planner) -> None:
    alone = STUDY.model_copy(update={"importances": ("l1",), "seeds": (0,), "data_seeds": ()})
    one = gather(
        open_planner(planner.store.root, alone), "s", ["s", "--importances", "l1", "--seeds", "0", "--data-seeds"]
    )
    absent = {section.name: section for section in sections(one) if not section.parts}
    assert set(absent) == {"overlap", "stability", "reinit", "connectivity", "functions", "matching", "similarity"}
    expected = "tombola run s --importances l1 magnitude --seeds 0 --data-seeds"
    assert {section.command for section in absent.values()} == {expected}
    assert "one seed" in page(one)


def test_one_seed_has_neither_bands_nor_intervals() -> None:
    one = synthetic_contents(["magnitude", "l1"], layer_count=3, levels=2)
    assert tables.accuracy(one.results)["sd"].null_count() == 2 * 3
    kept = findings.keeps(one)
    assert kept is not None
    assert "From one seed no interval can be given" in kept.meaning
    assert all("95 %" not in finding.text for finding in kept.findings)
    assert not {"95 % from", "95 % to"} & set(kept.table.columns)
    (part, *_) = select_charts(sections(one))
    assert part.chart is not None
    assert "area" not in str(look.on_page(part.chart))


def test_the_papers_points_stand_beside_ours() -> None:
    one = synthetic_contents(["magnitude", "mine:own"], layer_count=1, levels=5)
    shown = dataclasses.replace(one, references=(reference.paper(load_study("lenet-mnist")),))
    parts = {part.name: part for part in sections(shown)[0].parts}
    assert parts["paper"].table["level"].to_list() == [0, 5]
    assert parts["paper"].table["paper %"].to_list() == [98.11, 98.0]
    assert parts["paper"].table["verdict"].to_list() == [None, None], "of one seed"
    assert parts["accuracy"].table.equals(sections(one)[0].parts[0].table), "ours are as they were"
    assert "paper %" in str(look.on_page(parts["accuracy"].chart))
    html = page(shown)
    assert "arXiv 2302.11244" in html
    assert "2 cells have no verdict" in html


def test_the_published_reference_stands_beside_ours_with_a_verdict() -> None:
    one = synthetic_contents(["magnitude", "l1"], layer_count=1, levels=2)
    other = [dataclasses.replace(row, seed=1, value=row.value + 0.004) for row in one.results]
    published = reference.published(load_study("digits"))
    shown = dataclasses.replace(one, results=(*one.results, *other), references=(published,))
    parts = {part.name: part for part in sections(shown)[0].parts}
    assert "paper" not in parts
    table = parts["reference"].table
    assert sorted(table.select("importance", "level").rows()) == [
        (name, n) for name in ("l1", "magnitude") for n in range(3)
    ]
    assert set(table["verdict"]) == {"within", "differs"}
    assert "reference %" not in str(look.on_page(parts["accuracy"].chart)), "its points would hide ours"
    html = page(shown)
    assert published.source in html
    assert "of 6 cells" in html


@pytest.mark.parametrize("name", ["digits", "resnet18-tinyimagenet-small"])
def test_a_study_as_toml_is_the_same_study(name: str, tmp_path: Path) -> None:
    study = load_study(name, {"exclude": ('a"b\\', "\u2028😀"), "task.model_arguments": {"k ey": "a'b"}})
    (tmp_path / "study.toml").write_text(provenance.as_toml(study), encoding="utf-8")
    assert load_study(str(tmp_path / "study.toml")) == study
    assert tomllib.loads(provenance.as_toml(study))["levels"] == study.levels


@pytest.mark.parametrize(("theme", "background"), [(look.LIGHT, "#ffffff"), (look.DARK, "#15181c")])
def test_colours_differ_for_readers_with_any_colour_blindness(theme: Sequence[str], background: str) -> None:
    assert len(theme) == 12
    apart = {
        (one, other): min(difference(theme[one], theme[other], kind) for kind in KINDS)
        for one, other in combinations(range(12), 2)
    }
    assert min(apart.values()) > 15
    assert min(distance for (_, other), distance in apart.items() if other < 5) > 24, "the paper's five"
    for (one, other), distance in apart.items():
        if look.dash(one) == look.dash(other) or look.shape(one) == look.shape(other):
            assert distance > 25, (one, other)
    for colour in theme:
        light, dark = sorted(map(luminance, (colour, background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_no_two_importances_look_alike() -> None:
    looks = [(number % 12, *look.dash(number), look.shape(number)) for number in range(60)]
    assert len(set(looks)) == 60, "with more than twelve, colours come again"
    assert len({each[1:] for each in looks[:12]}) == 12, "where there is no colour"


# the command line


def test_the_verbs_of_a_finished_study(
    study_file: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *study_file, "--importances", "magnitude", "l1", "-o", "report.html"]) == 0
    assert "24 of 24 tickets" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "tombola run small.toml --importances magnitude l1" in html
    assert "default-src &#39;none&#39;" in html
    assert str(Path(study_file[0]).parent) not in html
    assert main(["figures", *study_file, "--importances", "l1", "-o", "figures", "--columns", "2"]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(files) == names
    assert {"accuracy.pdf", "accuracy-near-dense.pdf", "layers-1-l1.pdf", "weights-end.pdf"} <= names
    assert all(content.startswith(b"%PDF") for content in files.values())


def test_figures_have_the_width_of_a_column(contents: Contents, tmp_path: Path) -> None:
    written = write(select_charts(sections(contents)), tmp_path / "new", ["svg"], look.COLUMN)
    assert len(written) == len(set(written)) == len(select_charts(sections(contents)))
    for path in written:
        width = re.search(r'<svg [^>]*?width="([0-9.]+)"', path.read_text(encoding="utf-8"))
        assert width is not None
        assert abs(float(width[1]) - 3.3 * 72) < 1, path.name
    (png,) = write(select_charts(sections(contents))[:1], tmp_path / "new", ["png"], look.BOTH_COLUMNS)
    assert png.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the folder cannot be created"):
        write([], tmp_path / "file", ["svg"], look.COLUMN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "digits", "-o", "nowhere/report.html"], "there is no folder nowhere; make it first"),
        (["report", "digits", "-o", "."], "is a folder; name a file in it"),
        (["report", "digits"], "-o/--output is missing"),
        (["report", "digits", "-o", "r.html", "--margin", "-1"], "--margin: expected percentage points of accuracy"),
        (["report", "digits", "-o", "r.html", "--with", "overlap"], "unknown --with 'overlap'"),
        (["report", "digits", "-o", "r.html"], "no result of this study is in tombola-store"),
        (["figures", "digits", "-o", "figures", "--format", "jpg"], "unknown --format 'jpg'"),
        (["watch", "digits", "--port", "99999"], "--port: expected a whole number from 0 to 65535, got '99999'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_what_to_install_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("tombola.reporting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    assert main(["report", "digits", "-o", str(tmp_path / "report.html")]) == 2
    assert "charts need altair, which is not installed: pip install 'tombola[report]'" in capsys.readouterr().err


def test_watching_serves_the_loopback_alone_and_ends_by_ctrl_c(study_file: list[str], tmp_path: Path) -> None:
    with start_command(tmp_path, ["tombola", "watch", *study_file]) as (process, output, errors):
        until(lambda: process.exitcode is not None or (output.exists() and "\n" in output.read_text()), "an address")
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", output.read_text())
        assert found is not None, errors.read_text()
        with urllib.request.urlopen(found[0], timeout=LONG) as answer:
            assert b"Findings" in answer.read()
            assert answer.headers["Cache-Control"] == "no-store"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(LONG)
        assert process.exitcode == 0
        assert "Traceback" not in errors.read_text()


def test_a_record_may_go_away_while_it_is_watched(study_file: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has removed it since the last look."""
    stat, looks, states = Path.stat, count(), []

    def stat_once(path: Path, **how: bool) -> os.stat_result:
        if path.name == "record.json" and next(looks):
            raise FileNotFoundError(path)
        return stat(path, **how)

    def look(state: Callable[[], Any], *_: object, **how: float) -> None:
        monkeypatch.setattr(Path, "stat", stat_once)
        states.append(state())
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("tombola.cli.report"), "_gather", lambda *_: None)
    monkeypatch.setattr(import_module("tombola.reporting.page"), "page", lambda *_, **how: "")
    monkeypatch.setattr(import_module("tombola.reporting.watch"), "keep_fresh", look)
    assert main(["watch", *study_file]) == 0
    assert [time is None for _, time in states[0]] == [False, *[True] * (len(states[0]) - 1)]


def test_the_server_answers_under_its_own_name_alone() -> None:
    with serve(0) as served:
        served.show("<p>one</p>")

        def status(path: str, host: str | None = None) -> int:
            request = urllib.request.Request(served.url + path, headers={"Host": host} if host else {})
            try:
                with urllib.request.urlopen(request, timeout=LONG) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        assert status("") == 200
        assert status("version") == 200
        assert status("etc/passwd") == 404
        assert status("", host="evil.example") == 403


def test_a_page_is_the_same_for_the_same_contents(contents: Contents, html: str) -> None:
    assert page(contents) == html


# what tests are made of


def synthetic_contents(importances: Sequence[str], layer_count: int, levels: int, block: str = "block") -> Contents:
    """Return contents of one seed, of random masks and weights."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{block}{number}.conv.weight" for number in range(layer_count)]
    rows, parts = [], {"overlap": [], "layers": [], "weights": []}  # type: ignore[var-annotated]
    for level in range(levels + 1):
        masks = {
            name: Mask.from_tensors({layer: torch.rand(40, generator=generator) < 0.7**level for layer in names})
            for name in importances
        }
        table = overlap.of_masks(masks)
        parts["overlap"].append(_after(table, level=level, seed=0, kind="importances"))
        for number, (name, mask) in enumerate(masks.items()):
            parts["layers"].append(_after(layers.of_mask(mask), level=level, importance=name, seed=0))
            accuracy = 0.98 - 0.01 * level - 0.001 * number
            rows.append(Row(name, 0, level, mask.density, accuracy, mask.alive, 0.1, False, mask.collapsed))
            if level == levels:
                state = {layer: torch.randn(40, generator=generator) for layer in names}
                for quantity in ("initial", "end"):
                    of_state = weights_analysis.of_state(state, mask)
                    where = {"level": level, "importance": name, "seed": 0, "quantity": quantity}
                    parts["weights"].append(_after(of_state, **where))
                scores = weights_analysis.of_importance(state, mask, lambda weights: weights)
                parts["weights"].append(_after(scores, level=level, importance=name, seed=0, quantity="score"))
    found = {name: pl.concat(each) for name, each in parts.items()}
    found["winners"] = winners.select_winners(winners.by_level(rows))
    fields = {"importances": tuple(importances), "seeds": (0,), "data_seeds": (), "levels": levels}
    study = load_study("digits").model_copy(update=fields)
    about = {"name": "synthetic", "classes": ("a", "b"), "train": 10, "test": 100, "shape": (8,)}
    count = len(rows)
    return Contents(
        "large", study, ("large.toml",), about, (40 * layer_count, 50 * layer_count), tuple(importances), tuple(rows),
        levels, 0.005, found, {}, tickets=count, expected=count, made="2026-01-02T03:04:05+00:00",
    )  # fmt: skip


def _after(table: pl.DataFrame, **where: object) -> pl.DataFrame:
    return table.select(*(pl.lit(value).alias(name) for name, value in where.items()), pl.all())


KINDS = {  # of colour blindness, simulated: Machado, Oliveira and Fernandes, IEEE TVCG 15, 2009, severity 1
    "none": np.eye(3),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def linear(colour: str) -> Any:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def difference(one: str, other: str, kind: str) -> float:
    """Return the distance of two colours in CIELAB, as a reader with this kind of colour blindness sees them."""

    def lab(colour: str) -> Any:
        to_xyz = np.array(
            [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
        )
        xyz = to_xyz @ np.clip(KINDS[kind] @ linear(colour), 0, 1) / np.array([0.95047, 1, 1.08883])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return float(np.linalg.norm(lab(one) - lab(other)))


def test_a_chart_of_a_notebook_shows_characters_that_cannot_be_drawn() -> None:
    chart = alt.Chart(alt.Data(values=[{"layer": "fc\x001"}])).mark_point().encode(x="layer:N")
    shown = str(look.inline(chart, "a\u202eb").to_dict())
    assert r"fc\\x001" in shown
    assert r"a\\u202eb" in shown

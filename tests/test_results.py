"""Results: the rows of a study, and the paper's Table 2 made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from small_study import OVERRIDES
from tombola import Mask, Planner, Store, Ticket, Weights, load_problem, load_study
from tombola.analysis.accuracy import Row, row_of, rows, summarise, table2
from tombola.cli.results import show_results
from tombola.cli.tables import size
from tombola.study.chains import Chain
from tombola.study.tickets import Tickets
from tombola.training.history import History, Trained
from tombola.training.metrics import TEST_ACCURACY
from tombola.workbench.text import duration


def row(importance: str, seed: int, level: int, accuracy: float | None, **more: Any) -> Row:
    return Row(importance, seed, level, 0.5**level, accuracy, 100, 0.1, accuracy is None, **more)


FOUND = [
    row("l1", 0, 0, 0.90), row("l1", 1, 0, 0.92),
    row("l1", 0, 1, 0.80), row("l1", 1, 1, None),
    row("l2", 0, 0, 0.90), row("l2", 1, 0, 0.94),
    row("l2", 0, 1, 0.70), row("l2", 1, 1, 0.71),
]  # fmt: skip


def test_a_cell_is_the_mean_and_the_standard_deviation_over_seeds() -> None:
    cell = table2(FOUND, ["l1", "l2"]).cells[0, "l2"]
    assert cell.mean == statistics.fmean([0.90, 0.94])
    assert cell.std == statistics.stdev([0.90, 0.94])


def test_a_cell_of_one_seed_has_no_standard_deviation_and_one_without_results_no_mean() -> None:
    table = table2(FOUND, ["l1", "l2", "softmax"])
    assert (table.cells[1, "l1"].mean, table.cells[1, "l1"].std) == (0.80, None)
    assert table.cells[1, "softmax"].mean is None


def test_diverged_trainings_are_counted_and_left_out_of_the_mean() -> None:
    cell = table2(FOUND, ["l1", "l2"]).cells[1, "l1"]
    assert (cell.values, cell.diverged) == ((0.80,), 1)
    means = summarise([row("l1", 0, 0, 0.9), row("l1", 1, 0, None)])
    assert means.select("value", "seeds", "diverged").row(0) == (0.9, 1, 1)


def test_a_training_that_diverged_has_no_training_loss() -> None:
    mask, weights = Mask.from_tensors({"w": torch.ones(2).bool()}), Weights.of({"w": torch.ones(2)})
    for at, loss in ((None, 0.5), (3, None)):
        trained = Trained(weights, History(losses=(1.0, 0.5), diverged_at=at))
        assert row_of(Chain(0, "l1"), Ticket(0, mask, weights, trained)).train_loss == loss


def test_the_best_has_the_highest_mean_of_those_with_the_most_seeds() -> None:
    table = table2(FOUND, ["l1", "l2"])
    assert table.best(0) == {"l2"}
    assert table.best(1) == {"l2"}  # l1's higher mean is of one seed of two
    error = replace(TEST_ACCURACY, label="error", higher_is_better=False)
    assert replace(table, measure=error).best(0) == {"l1"}


def test_none_is_best_where_all_are_alike() -> None:
    alike = [row(name, 0, 0, 0.9) for name in ("l1", "l2")]
    assert table2(alike, ["l1", "l2"]).best(0) == set()
    assert table2([*alike, row("lamp", 0, 0, 0.8)], ["l1", "l2", "lamp"]).best(0) == {"l1", "l2"}


def test_collapses_say_from_which_level_on_a_layer_has_no_connection() -> None:
    found = [
        row("l1", 0, 2, 0.5, collapsed=("fc1.weight",)),
        row("l1", 1, 1, 0.5, collapsed=("fc1.weight", "fc.weight")),
        row("l2", 0, 1, 0.5),
    ]
    assert table2(found, ["l1", "l2"]).collapses == {"l1": {"fc.weight": 1, "fc1.weight": 1}}


def test_levels_and_their_densities_are_in_order() -> None:
    assert table2(FOUND[::-1], ["l1"]).levels == ((0, 1.0), (1, 0.5))


def test_rows_are_those_of_the_store(finished: Path) -> None:
    study = load_study("digits", OVERRIDES)
    planner = Planner(study, load_problem(study.task), Store(finished, create=False))
    found = rows(Tickets(planner))
    assert [(r.importance, r.seed, r.level) for r in found] == [
        (importance, seed, level) for importance in ("magnitude", "l1") for seed in (0, 1) for level in (0, 1, 2)
    ]
    assert [r.alive for r in found[:3]] == [50200, 40160, 32128]
    for r in found:
        chain = next(c for c in planner.chains if (c.importance, c.seed) == (r.importance, r.seed))
        ticket = planner.progress(chain).tickets[r.level]
        assert ticket.trained is not None
        assert r.test_accuracy == ticket.trained.history.test_accuracy
        assert r.train_loss == ticket.trained.history.losses[-1]
        assert r.density == ticket.mask.density == r.alive / 50200
    assert [r.test_accuracy for r in found if r.level == 0][:2] == [r.test_accuracy for r in found if r.level == 0][2:]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that returns Table 2 as it is printed for given rows of a study of two levels."""

    def show(
        found: list[Row],
        importances: tuple[str, ...] = ("l1", "l2"),
        seeds: tuple[int, ...] = (0, 1),
        records: Sequence[dict[str, Any]] = (),
    ) -> str:
        monkeypatch.setattr("tombola.analysis.accuracy.rows", lambda tickets: found)
        planner = SimpleNamespace(
            study=SimpleNamespace(importances=importances, seeds=seeds, levels=1),
            problem=SimpleNamespace(data=SimpleNamespace(name="digits")),
            store=SimpleNamespace(root="the-store"),
            describe_counted=lambda: "Density counts 100 connections.",
            chains=[(importance, seed) for importance in importances for seed in seeds],
        )
        tickets = SimpleNamespace(planner=planner, records=lambda: dict(enumerate(records)))
        show_results(tickets, "table")  # type: ignore[arg-type]
        return capsys.readouterr().out

    return show


def test_the_plain_table(shown: Callable[..., str]) -> None:
    assert shown(FOUND) == (
        "test accuracy in % on digits, mean ± std over 2 seeds; best *\n"
        "level  sparsity               l1           l2\n"
        "─────────────────────────────────────────────\n"
        "    0      0.00      91.00±1.41   92.00±2.83*\n"
        "    1     50.00  80.00 (1 of 2)   70.50±0.71*\n"
        "Density counts 100 connections.\n"
        "diverged, l1: level 1 (1 of 2 seeds); these chains end there\n"
    )


def test_the_table_of_one_seed_and_one_importance_has_neither_deviations_nor_a_best(shown: Callable[..., str]) -> None:
    text = shown([row("l1", 0, 0, 0.9), row("l1", 0, 1, 0.8)], ("l1",), (0,))
    assert text.startswith("test accuracy in % on digits, seed 0\n")
    assert "±" not in text
    assert "*" not in text


def test_the_table_says_which_layers_collapsed_and_what_is_not_there_yet(shown: Callable[..., str]) -> None:
    text = shown([row("l1", 0, 0, 0.9), row("l1", 0, 1, 0.1, collapsed=("fc1.weight", "fc.weight"))])
    assert "collapsed layers, l1: fc.weight from level 1, fc1.weight from level 1\n" in text
    assert text.endswith("the store has 2 of 8 tickets\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (3.21, "3.2 s"), (59.9, "60 s"), (60, "1 min 0 s"), (7320, "2 h 2 min"), (2e5, "2 d 7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (123_456, "123 kB"), (1_234_567, "1.2 MB"), (5e12, "5.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text

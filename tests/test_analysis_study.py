"""Analyses of a whole study in a store, from the library and from the command line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

from tombola import Planner, Store, UserError, load_problem, load_study, threads, train
from tombola.analysis import (
    basins,
    claims,
    connectivity,
    functions,
    initial,
    layers,
    matching,
    overlap,
    reinit,
    similarity,
    stability,
    weights,
    winners,
)
from tombola.analysis.evidence import collect
from tombola.analysis.paths import Paths
from tombola.analysis.verdict import Claim
from tombola.cli import main
from tombola.cli.analysis import has_data_orders
from tombola.importance import l1
from tombola.pruning.mask import Mask
from tombola.study.chains import Chain
from tombola.study.reinitialisation import plan
from tombola.study.tickets import Tickets
from tombola.training.evaluation import predict
from tombola.training.weights import Weights

pytestmark = pytest.mark.xdist_group("analysis_study")  # one study for all

STUDY = """
importances = ["magnitude", "l1", "min_max"]
seeds = [0, 1]
data_seeds = [100]
levels = 3
fraction = 0.5

[task]
dataset = "digits"
dataset_arguments = { train_per_class = 12, test_per_class = 8 }
model = "lenet_300_100"
model_arguments = { inputs = 64 }

[recipe]
epochs = 2
batch_size = 32
rewind = 2
"""


def finish(planner: Planner, chains: list[Chain] | None = None) -> int:
    """Do the trainings that chains need, here; return how many were done."""
    done = 0
    for chain in chains if chains is not None else [*planner.chains, *planner.repeats]:
        while (training := planner.progress(chain).waits_for) is not None:
            trained = train(
                planner.problem.build(),
                training.initial.load(),
                training.mask,
                planner.problem.data,
                planner.study.recipe,
                training.seed,
                begin=training.begin,
                end=training.end,
            )
            planner.store.results.put(training.key, training.identity, training.mask, trained, {})
            done += 1
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study and its finished store."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "study.toml").write_text(STUDY)
    finish(open_planner(folder))
    return folder


def open_planner(folder: Path, store: str = "store", **overrides: Any) -> Planner:
    study = load_study(str(folder / "study.toml"), overrides)
    return Planner(study, load_problem(study.task), Store(folder / store))


@pytest.fixture(scope="module")
def planner(folder: Path) -> Planner:
    return open_planner(folder)


def figures(table: pl.DataFrame, **where: Any) -> list[dict[str, Any]]:
    return [each for each in table.to_dicts() if all(each[name] == value for name, value in where.items())]


# overlap


def test_overlap_has_every_comparison_of_every_level(planner: Planner) -> None:
    table = overlap.of_study(Tickets(planner))
    assert table["level"].unique().sort().to_list() == [0, 1, 2, 3]
    at = figures(table, level=2, seed=1, layer="(all)")
    assert [(each["kind"], each["tickets"]) for each in at] == [
        ("importances", ["magnitude", "l1"]),
        ("importances", ["magnitude", "min_max"]),
        ("importances", ["l1", "min_max"]),
        ("importances", ["magnitude", "l1", "min_max"]),
        ("data order", ["magnitude", "magnitude@100"]),
    ]


def test_the_noise_floor_compares_tickets_of_one_initialisation_and_two_data_orders(planner: Planner) -> None:
    (found,) = figures(overlap.of_study(Tickets(planner), levels=[2]), seed=1, kind="data order", layer="fc1.weight")
    own = planner.progress(Chain(1, "magnitude")).tickets[2]
    other = planner.progress(Chain(1, "magnitude", 100)).tickets[2]
    assert own.rewind.load()["fc1.weight"].shape == other.rewind.load()["fc1.weight"].shape
    assert found["shared"] == int((own.mask["fc1.weight"] & other.mask["fc1.weight"]).sum())
    assert own.mask != other.mask


def test_a_choice_of_importances_keeps_the_studys_noise_floor(planner: Planner) -> None:
    table = overlap.of_study(Tickets(planner), ["min_max", "l1"], [3])
    shown = {(each["kind"], *each["tickets"]) for each in table.to_dicts()}
    assert shown == {("importances", "min_max", "l1"), ("data order", "magnitude", "magnitude@100")}
    whole = {
        (r["seed"], r["shared"])
        for r in figures(overlap.of_study(Tickets(planner), levels=[3]), k=2, layer="(all)", kind="importances")
        if set(r["tickets"]) == {"l1", "min_max"}
    }
    assert {(r["seed"], r["shared"]) for r in figures(table, kind="importances", layer="(all)")} == whole


def test_an_unfinished_study_is_compared_as_far_as_it_is_there(folder: Path) -> None:
    planner = open_planner(folder, "unfinished")
    with pytest.raises(UserError, match=r"^no result of this study is in [^;]*$"):
        overlap.of_study(Tickets(planner))
    finish(planner, [Chain(0, "magnitude"), Chain(0, "l1")])
    table = overlap.of_study(Tickets(planner))
    assert {tuple(tickets) for tickets in table.filter(pl.col("level") == 3)["tickets"].to_list()} == {
        ("magnitude", "l1")
    }
    with pytest.raises(
        UserError, match=r"level 1 is not in .* yet for min_max, seed 0 and 3 more; no level can be compared$"
    ):
        overlap.of_study(Tickets(planner), levels=[1])


def test_levels_and_importances_that_are_not_the_studys_are_refused(planner: Planner) -> None:
    with pytest.raises(UserError, match="the study has no level 9, it has levels 0 to 3"):
        overlap.of_study(Tickets(planner), levels=[9])
    with pytest.raises(UserError, match="the study has no importance 'min-max'; did you mean 'min_max'"):
        overlap.of_study(Tickets(planner), ["min-max", "l1"])
    with pytest.raises(UserError, match="expected at least 2 to compare, got l1"):
        overlap.of_study(Tickets(planner), ["l1"])


# layers, winners, weights


def test_layers_of_every_ticket(planner: Planner) -> None:
    table = layers.of_study(Tickets(planner))
    assert len(table) == 4 * 6 * 4
    for chain in planner.chains:
        mask = planner.progress(chain).tickets[3].mask
        found = figures(table, level=3, importance=chain.importance, seed=chain.seed)
        assert {each["layer"]: each["alive"] for each in found} == {**mask.counts, "(all)": mask.alive}
        assert all(each["effective"] <= each["alive"] for each in found)
        assert found[-1]["density"] == pytest.approx(1 / 8, abs=1e-4)


class Sorted(nn.Module):
    """Puts its outputs in order, which makes no path that can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.fc(inputs.flatten(1))
        return hidden.sort().values


def test_a_warning_says_why_effective_sparsity_is_left_out(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    problem = planner.problem
    monkeypatch.setattr(planner, "problem", replace(problem, build=Sorted))
    monkeypatch.setattr(planner, "dense", Mask.ones_like(Sorted()))
    with pytest.warns(UserWarning, match="effective sparsity is not computed: the paths of Sorted .* it calls 'sort'"):
        assert layers.trace_paths(planner) is None


def test_winners_of_a_study_follow_from_its_results(planner: Planner) -> None:
    table = winners.of_study(Tickets(planner), ["l1", "min_max"], margin=0.03)
    assert table["importance"].to_list() == ["l1", "min_max"]
    for line in table.to_dicts():
        accuracies = [
            [planner.progress(Chain(seed, line["importance"])).tickets[level].trained.history.test_accuracy  # type: ignore[union-attr]
             for seed in (0, 1)]
            for level in range(4)
        ]  # fmt: skip
        means = [sum(each) / 2 for each in accuracies]  # type: ignore[arg-type]
        assert line["level"] == max(level for level in range(4) if means[level] >= means[0] - 0.03 - 1e-9)
        assert line["seeds"] == 2


def test_an_interval_over_one_seed_is_refused(folder: Path) -> None:
    planner = open_planner(folder, seeds=[0])
    with pytest.raises(UserError, match="an interval needs two seeds or more, and the study has one; run another"):
        winners.of_study(Tickets(planner), surely=True)
    assert winners.of_study(Tickets(planner))["low"].to_list() == [None] * 3


def test_ranges_are_those_of_the_dense_network(planner: Planner) -> None:
    table = weights.of_study(Tickets(planner), ["l1"], [0])
    expected = {
        (row["seed"], row["layer"], row["quantity"]): row["max"] - row["min"]
        for row in table.filter(pl.col("quantity") != "score").to_dicts()
    }
    found = weights.ranges(Tickets(planner), "magnitude").to_dicts()
    assert [(row["seed"], row["layer"]) for row in found] == [(s, n) for s in (0, 1) for n in planner.dense]
    for row in found:
        for quantity in ("initial", "end"):
            assert row[quantity] == pytest.approx(expected[row["seed"], row["layer"], quantity])


def test_weights_of_a_study(planner: Planner) -> None:
    table = weights.of_study(Tickets(planner), ["l1"], [1, 2])
    assert len(table) == 2 * 2 * 4 * 3
    ticket = planner.progress(Chain(1, "l1")).tickets[2]
    assert ticket.trained is not None
    survivors = ticket.trained.weights.load()["fc2.weight"][ticket.mask["fc2.weight"]]
    (end,) = figures(table, level=2, seed=1, quantity="end", layer="fc2.weight")
    assert end["max"] == float(survivors.max())
    (score,) = figures(table, level=2, seed=1, quantity="score", layer="fc2.weight")
    assert score["max"] == pytest.approx(float(survivors.double().abs().max() / survivors.double().abs().sum()))
    (initial,) = figures(table, level=2, seed=1, quantity="initial", layer="fc2.weight")
    (rewind,) = figures(table, level=2, seed=1, quantity="rewind", layer="fc2.weight")
    assert initial["mean"] != rewind["mean"]  # the rewind point is at iteration 2


@pytest.mark.parametrize("score_at", ["end", "rewind"])
def test_weights_of_a_study_are_those_of_its_states(folder: Path, score_at: str) -> None:
    planner = open_planner(folder, score_at=score_at)  # its dense networks are those of the study
    ticket = planner.progress(Chain(0, "l1")).tickets[0]
    states = {"initial": planner.initial(0).load(), "rewind": ticket.rewind.load(), "end": ticket.load_trained()}
    expected = {name: weights.of_state(state, ticket.mask) for name, state in states.items()}
    expected["score"] = weights.of_importance(states[score_at], ticket.mask, l1)
    found = weights.of_study(Tickets(planner), ["l1"], [0]).filter(pl.col("seed") == 0)
    for quantity, table in expected.items():
        assert found.filter(pl.col("quantity") == quantity).select(table.columns).equals(table)


def test_weights_of_a_study_have_no_scores_where_the_whole_network_is_scored(folder: Path) -> None:
    table = weights.of_study(Tickets(open_planner(folder, importances=["taylor"])))  # its dense network is that of all
    assert set(table["quantity"]) == {"initial", "rewind", "end"}


# stability, functions, connectivity


def test_stability_of_a_study_in_another_way(planner: Planner) -> None:
    table = stability.of_study(Tickets(planner), levels=[2], layers=["fc1.weight"])
    tickets = {name: planner.progress(Chain(1, name)).tickets for name in planner.study.importances}
    masks = [tickets[name][2].mask["fc1.weight"] for name in tickets]
    shared = masks[0] & masks[1] & masks[2]
    trained = torch.stack([t.trained.weights.load()["fc1.weight"] for t in tickets["l1"][:3]])  # type: ignore[union-attr]
    (sd,) = figures(table, importance="l1", seed=1, measure="sd")
    assert sd["shared"] == int(shared.sum())
    assert sd["shared_mean"] == pytest.approx(float(trained.double().std(0)[shared].mean()))
    (flips,) = figures(table, importance="l1", seed=1, measure="flips")
    flipped = (trained[1:].sign() != trained[:-1].sign()).sum(0).double()
    assert flips["other_mean"] == pytest.approx(float(flipped[masks[1] & ~shared].mean()))
    (movement,) = figures(table, importance="l1", seed=1, measure="movement")
    moved = (trained[2] - planner.initial(1).load()["fc1.weight"]).abs()
    assert movement["shared_q50"] == pytest.approx(float(moved[shared].median()), rel=0.05)


def test_stability_needs_levels_that_differ_and_layers_that_are_there(planner: Planner) -> None:
    with pytest.raises(UserError, match="it needs a level from 1 on"):
        stability.of_study(Tickets(planner), levels=[0])
    with pytest.raises(UserError, match=r"there is no layer 'fc9', there are fc1.weight, fc2.weight, fc.weight"):
        stability.of_study(Tickets(planner), layers=["fc9"])


def test_functions_compare_tickets_and_dense_networks(planner: Planner) -> None:
    table = functions.of_study(Tickets(planner))
    kinds = table.select("level", "kind", "seed").unique().sort("level", "kind", "seed").rows()
    assert kinds == [
        (0, "data order", 0),
        (0, "data order", 1),
        (0, "seeds", None),
        (3, "data order", 0),
        (3, "data order", 1),
        (3, "importances", 0),
        (3, "importances", 1),
    ]
    (line,) = figures(table, level=3, seed=0, kind="importances", tickets=["l1", "min_max"])
    model, data = planner.problem.build(), planner.problem.data
    outputs = []
    for name in ("l1", "min_max"):
        planner.progress(Chain(0, name)).tickets[3].apply(model, trained=True)
        outputs.append(predict(model, data))
    assert line["agreement"] == float((outputs[0].argmax(1) == outputs[1].argmax(1)).double().mean())
    ensemble = (outputs[0].softmax(1) + outputs[1].softmax(1)).argmax(1)
    assert line["ensemble_accuracy"] == float((ensemble == data.test_labels).double().mean())


def test_connectivity_ends_at_the_errors_of_the_tickets(planner: Planner) -> None:
    table = connectivity.of_study(Tickets(planner), ["magnitude", "l1"], [3], points=3)
    assert len(table) == 2 * 2 * 3
    rows = figures(table, seed=1, kind="importances", tickets=["magnitude", "l1"])
    history = [planner.progress(Chain(1, name)).tickets[3].trained.history for name in ("magnitude", "l1")]  # type: ignore[union-attr]
    assert [rows[0]["error"], rows[-1]["error"]] == pytest.approx([1 - h.test_accuracy for h in history])  # type: ignore[operator]
    assert [rows[0]["loss"], rows[-1]["loss"]] == pytest.approx([h.test_loss for h in history])
    assert figures(table, seed=1, kind="data order", tickets=["magnitude", "magnitude@100"])


def test_connectivity_and_layers_do_nothing_twice(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets, read, followed = Tickets(planner), list[str](), list[Mask]()
    trained = {each.tickets[3].trained.weights.hash for each in tickets.all().values()}  # type: ignore[union-attr]
    load, effective = Weights.load, Paths.effective
    monkeypatch.setattr(Weights, "load", lambda self: read.append(self.hash) or load(self))
    monkeypatch.setattr(Paths, "effective", lambda self, mask: followed.append(mask) or effective(self, mask))
    connectivity.of_study(tickets, levels=[3], points=2)
    assert sorted(each for each in read if each in trained) == sorted(trained)
    layers.of_study(tickets, ["magnitude", "l1"], levels=[0, 1])
    # The dense network is followed when the graph is made, and once for all tickets of level 0.
    assert sum(mask.density == 1 for mask in followed) == 2


@pytest.mark.parametrize(
    "of_study",
    [
        functions.of_study,
        partial(connectivity.of_study, points=3),
        partial(basins.of_study, points=2),
        similarity.of_study,
        partial(stability.of_study, levels=[2, 3]),
        layers.of_study,
        partial(weights.of_study, levels=[2, 3]),
        partial(matching.of_study, importances=["l1", "min_max"], by="activations", draws=1),
    ],
    ids=["functions", "connectivity", "basins", "similarity", "stability", "layers", "weights", "matching"],
)
def test_the_number_of_threads_changes_no_table(
    of_study: Callable[[Tickets], pl.DataFrame], planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, used = [], set[int]()
    load = Weights.load
    effective = Paths.effective
    monkeypatch.setattr(Weights, "load", lambda self: used.add(threading.get_ident()) or load(self))
    monkeypatch.setattr(Paths, "effective", lambda self, mask: used.add(threading.get_ident()) or effective(self, mask))
    for cores in (1, 3):
        used.clear()
        monkeypatch.setattr(threads, "count_cores", lambda cores=cores: cores)
        tables.append(of_study(Tickets(planner)))
        assert (len(used - {threading.get_ident()}) > 0) == (cores > 1)
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (3, r"levels: expected several, such as \[3\], got 3"),
        ([True], "level: expected a whole number, got True"),
        ([], "levels: expected one or more, got none"),
    ],
)
@pytest.mark.parametrize(
    "module", [connectivity, functions, initial, layers, matching, overlap, similarity, stability, weights]
)
def test_levels_that_are_none_are_refused(module: Any, levels: Any, message: str, planner: Planner) -> None:
    with pytest.raises(UserError, match=message):
        module.of_study(Tickets(planner), levels=levels)


# reinit


def test_reinit_keeps_what_is_shared_and_draws_the_rest_anew(planner: Planner) -> None:
    plans = plan(Tickets(planner), 2, 2, ["magnitude", "l1"])
    assert [each.seed for each in plans] == [0, 1]
    second = plans[1]
    masks = [planner.progress(Chain(1, name)).tickets[2].mask for name in ("magnitude", "l1")]
    assert second.kept == masks[0] & masks[1]
    theta_0, draws = planner.initial(1).load(), [second.planner.initial(draw).load() for draw in (1, 2)]
    for name in second.kept:
        kept = second.kept[name]
        assert all(draw[name][kept].equal(theta_0[name][kept]) for draw in draws)
        assert not any((draw[name] == theta_0[name])[~kept].any() for draw in draws)
        assert not (draws[0][name] == draws[1][name])[~kept].any()
    assert second.planner.chains == [Chain(d, name, 1) for d in (1, 2) for name in ("magnitude", "l1")]


def test_reinit_is_stored_and_found_again(folder: Path) -> None:
    planner = open_planner(folder)
    plans = plan(Tickets(planner), 1, 2, ["magnitude", "l1"])
    with pytest.raises(UserError, match=r"no result of this study|level 1 is not in"):
        reinit.of_plans(plans)
    # A rewind point, a dense network and one ticket of each importance, for each of two draws and two seeds.
    assert sum(finish(each.planner) for each in plans) <= 2 * 2 * 4
    again = plan(Tickets(open_planner(folder)), 1, 2, ["magnitude", "l1"])
    assert sum(finish(each.planner) for each in again) == 0
    table = reinit.of_plans(again)
    assert len(table) == 2 * 2 * 4
    (line,) = figures(table, importance="l1", seed=1, layer="fc1.weight")
    masks = [again[1].planner.progress(Chain(draw, "l1", 1)).tickets[1].mask for draw in (1, 2)]
    survived = [int((mask["fc1.weight"] & again[1].kept["fc1.weight"]).sum()) for mask in masks]
    assert line["survived"] == sum(survived) / 2
    assert line["draws"] == 2


def test_reinit_with_nothing_to_keep_is_refused(planner: Planner) -> None:
    with pytest.raises(UserError, match="tickets of level 0 share all connections"):
        plan(Tickets(planner), 0, 3)
    with pytest.raises(UserError, match="draws: expected a whole number from 1 to 1000, got 0"):
        plan(Tickets(planner), 1, 0)


# the command line


def command(folder: Path, verb: str, *arguments: str, store: str = "store") -> int:
    return main([verb, str(folder / "study.toml"), "--store", str(folder / store), *arguments])


VERBS = ("overlap", "layers", "stability", "winners", "weights", "functions", "connectivity")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_a_table_csv_and_json(verb: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {}
    for form in ("table", "csv", "json"):
        assert command(folder, verb, "--format", form) == 0
        outputs[form] = capsys.readouterr().out
    records = json.loads(outputs["json"])
    lines = list(csv.DictReader(io.StringIO(outputs["csv"])))
    assert len(lines) == len(records) > 0
    assert list(lines[0]) == list(records[0])
    first = outputs["table"].splitlines()[0]
    assert "importance" in first or "tickets" in first or "Jaccard" in first
    assert not any("nan" in line.lower() or "None" in line for line in outputs["table"].splitlines())


def test_overlap_at_a_level_shows_every_figure_with_chance_and_noise_floor(
    folder: Path, capsys: pytest.CaptureFixture[str], planner: Planner
) -> None:
    assert command(folder, "overlap", "--level", "3") == 0
    out = capsys.readouterr().out
    (line,) = [each for each in out.splitlines() if "magnitude & l1 & min_max" in each and "fc1.weight" in each][:1]
    (expected,) = figures(overlap.of_study(Tickets(planner), levels=[3]), seed=0, k=3, layer="fc1.weight")
    assert f"{100 * expected['shared_of_ticket']:.2f}" in line
    assert f"{100 * expected['layers_expected'] / expected['alive']:.2f}" in line
    assert f"{100 * expected['layers_low'] / expected['alive']:.2f} .. " in line
    assert "data order" in out
    assert "magnitude & magnitude@100" in out


def test_without_other_data_orders_a_note_says_how_to_get_the_noise_floor(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, "overlap", "--data-seeds") == 0
    assert "no noise floor: the study has one data order; find the tickets of" in capsys.readouterr().err


def test_two_data_orders_of_the_dense_network_alone_are_no_noise_floor() -> None:
    table = pl.DataFrame({"level": [0, 0, 2], "kind": ["importances", "data order", "importances"]})
    assert not has_data_orders(table)
    assert has_data_orders(table.with_columns(kind=pl.lit("data order")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["overlap", "--level", "7"], "the study has no level 7, it has levels 0 to 3"),
        (["overlap", "--importances", "l1"], "expected at least 2 to compare, got l1"),
        (["overlap", "--importances", "l1", "lamp"], "the study has no importance 'lamp'"),
        (["overlap", "--importances", "l1", "nonsense"], "unknown importance 'nonsense'"),
        (["winners", "--margin", "-1"], "--margin: expected percentage points of accuracy, 0 to 100, got '-1'"),
        (["winners", "--surely", "--seeds", "0"], "an interval needs two seeds or more"),
        (["stability", "--level", "0"], "it needs a level from 1 on"),
        (["stability", "--layer", "fc7"], "there is no layer 'fc7'"),
        (["connectivity", "--points", "1"], "--points: expected a whole number from 2 to 1001, got '1'"),
        (["reinit", "--level", "5"], "the study has no level 5"),
        (["functions", "--seeds", "0", "7"], "level 0 is not in "),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tombola: ")
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1


def test_importances_that_a_study_was_run_with_besides_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(open_planner(folder, importances=["lamp"], data_seeds=[], seeds=[0], levels=1))
    assert (
        command(folder, "overlap", "--seeds", "0", "--importances", "lamp", "l1", "--level", "1", "--format", "json")
        == 0
    )
    compared = {tuple(each["tickets"]) for each in json.loads(capsys.readouterr().out)}
    assert compared == {("lamp", "l1"), ("magnitude", "magnitude@100")}


def test_a_damaged_result_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = folder / "damaged"
    shutil.copytree(folder / "store", copy)
    for file in copy.glob("results/*/*/weights.safetensors"):
        os.chmod(file, 0o644)
        file.write_bytes(b"nothing")
    assert command(folder, "weights", store="damaged") == 2
    assert "is damaged" in capsys.readouterr().err


def test_no_analysis_warns_or_writes_where_all_is_well(folder: Path, planner: Planner) -> None:
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (overlap, layers, stability, winners, weights, functions, connectivity):
            assert len(module.of_study(Tickets(planner))) > 0
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before


@pytest.mark.usefixtures("workers_here")
def test_reinit_plans_runs_and_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--level", "1", "--draws", "1", "--seeds", "0", "--importances", "l1", "min_max"]
    assert command(folder, "reinit", *asked, "--format", "json") == 0
    captured = capsys.readouterr()
    records = json.loads(captured.out)  # what is trained is told elsewhere
    assert {(each["importance"], each["seed"], each["draws"]) for each in records} == {("l1", 0, 1), ("min_max", 0, 1)}
    assert "[4/4]" in captured.err
    assert command(folder, "reinit", *asked) == 0
    again = capsys.readouterr()
    assert "[1/" not in again.out + again.err
    assert "more than chance, %" in again.out
    assert command(folder, "reinit", *asked, "--plan") == 0
    out = capsys.readouterr().out
    assert "seed 0: " in out
    assert "connections kept" in out


def test_claims_of_a_study(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paths, "effective", None)  # no claim is about paths, which take long to follow
    tickets = Tickets(open_planner(folder))
    table = claims.of_study(tickets)
    assert table.columns == [field.name for field in dataclasses.fields(Claim)]
    assert table["number"].to_list() == [
        "1a",
        "1b",
        "2",
        "3a",
        "3b",
        "3c",
        "3d",
        "4a",
        "4b",
        "4c",
        "5a",
        "5b",
        "5c",
        "6",
        "7",
    ]
    evidence = collect(tickets)
    assert evidence.describe() == ("Tickets of magnitude, l1 are compared at level 3 (sparsity 87.50 %), from 2 seeds.")
    assert (evidence.guess, {each.importance for each in evidence.order_results}) == (0.1, {"magnitude"})
    assert collect(tickets, ["l1", "min_max"], 1).level == 1
    without = Tickets(open_planner(folder, importances=["l1", "min_max"]))
    assert collect(without, tables={"layers": evidence.layers}).compared == ("l1", "min_max")
    with pytest.raises(UserError, match="level 0: expected a level from 1 to 3"):
        collect(tickets, level=0)
    with pytest.raises(UserError, match=r"level 9: expected a level from 1 to 3, which all of magnitude, l1 have"):
        collect(tickets, level=9)
    with pytest.raises(UserError, match="expected at least 2 to compare"):
        collect(tickets, ["l1"])
    arguments = [str(folder / "study.toml"), "--store", str(folder / "store")]
    assert main(["claims", *arguments]) == 0
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).startswith(" ".join(claims.summarise(claims.judge(evidence))))
    assert "\n4b  The tickets differ by more than another data order makes them differ.\n    verdict: " in printed
    assert max(len(line) for line in printed.splitlines() if not re.match(r"    (to test it: )?tombola ", line)) <= 100
    assert main(["claims", *arguments, "--format", "json", "--importances", "l1", "min_max"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == table["number"].to_list()
    assert main(["claims", *arguments, "--levels", "0"]) == 2
    assert "no level from 1 on is in" in capsys.readouterr().err


def test_claims_and_matching_of_tickets_that_diverged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = open_planner(folder, str(tmp_path / "store"), **{"recipe.lr": 1e30, "seeds": [0], "data_seeds": [100]})
    finish(diverging)
    arguments = [str(folder / "study.toml"), "--store", str(tmp_path / "store"), "--seeds", "0"]
    assert main(["claims", *arguments, "--recipe.lr", "1e30"]) == 2
    assert capsys.readouterr().err == ("tombola: nothing can be compared: magnitude, seed 0 diverged at level 0\n")
    with pytest.raises(UserError, match="the units of magnitude cannot be matched: its training of level 0 diverged"):
        matching.of_study(Tickets(diverging), draws=1)

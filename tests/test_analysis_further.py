"""Further analyses of a whole study, from the library, from Python and from the command line."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import polars as pl
import pytest
import torch

import tombola
from stores import describe_uniqueness
from tombola import Planner, Store, UserError, load_problem, load_study
from tombola.analysis import functions, initial, matching, overlap, similarity
from tombola.cli import main
from tombola.cli.main import make_parser
from tombola.engine.here import WorkersHere
from tombola.engine.run import run
from tombola.pruning.mask import Mask
from tombola.reporting.contents import gather
from tombola.reporting.page import page
from tombola.reporting.sections import sections
from tombola.study.chains import Chain
from tombola.study.tickets import Tickets
from tombola.training.weights import Weights

pytestmark = pytest.mark.xdist_group("analysis_further")  # one study for all

STUDY = """
importances = ["magnitude", "l1"]
seeds = [0, 1]
data_seeds = [100]
levels = 2
fraction = 0.5
keep_dense = ["5"]

[task]
dataset = "tiny_task:dataset"
model = "tiny_task:deeper"

[recipe]
epochs = 2
batch_size = 32
rewind = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study and its finished store."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("further")
    (folder / "study.toml").write_text(STUDY)
    opened = open_planner(folder)
    with WorkersHere(opened.problem, opened.store) as workers:
        run(opened, workers, lambda *_: None)
    return folder


def open_planner(folder: Path, **overrides: Any) -> Planner:
    study = load_study(str(folder / "study.toml"), overrides)
    return Planner(study, load_problem(study.task), Store(folder / "store"))


@pytest.fixture(scope="module")
def tickets(folder: Path) -> Tickets:
    return Tickets(open_planner(folder))


def command(folder: Path, verb: str, *arguments: str) -> int:
    return main([verb, str(folder / "study.toml"), "--store", str(folder / "store"), *arguments])


def compared(table: pl.DataFrame) -> list[tuple[Any, ...]]:
    return table.select("level", "seed", "kind", "tickets").unique(maintain_order=True).rows()


# matching


def test_matching_compares_within_a_seed_the_data_orders_and_across_seeds(tickets: Tickets) -> None:
    table = matching.of_study(tickets, draws=2)
    assert compared(table) == [
        (2, 0, "importances", ["magnitude", "l1"]),
        (2, 0, "data order", ["magnitude", "magnitude@100"]),
        (2, 1, "importances", ["magnitude", "l1"]),
        (2, 1, "data order", ["magnitude", "magnitude@100"]),
        (2, None, "seeds", ["magnitude, seed 0", "magnitude, seed 1"]),
        (2, None, "seeds", ["l1, seed 0", "l1, seed 1"]),
    ]
    raw = overlap.of_study(tickets, levels=[2])
    both = table.filter(pl.col("kind") == "importances").join(
        raw, on=["level", "seed", "kind", "tickets", "layer"], suffix="_raw"
    )
    assert both.height == 2 * 5
    assert both["shared"].equals(both["shared_raw"].rename("shared"))
    assert both["layers_expected"].equals(both["layers_expected_raw"].rename("layers_expected"))
    kept = table.filter(pl.col("layer") == "5.weight")
    assert set(kept["matched_jaccard"]) == set(kept["chance_jaccard"]) == {1.0}


def _commands(printed: str) -> list[list[str]]:
    """Return the commands in what was printed, each at the end of a line."""
    return [shlex.split(text) for text in re.findall(r"^ .*?(tombola .*)$", printed, re.MULTILINE)]


def test_claims_say_up_to_what_tickets_are_unique(
    folder: Path, tickets: Tickets, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, "claims", "--level", "2", "--with", "matching", "basins") == 0
    judged, _, told = capsys.readouterr().out.partition("Unique up to what?")
    commands = {name: text for text in _commands(told) for name in ["controls", "rewind-point"] if name in text}
    study, store = str(folder / "study.toml"), ["--store", str(folder / "store")]
    assert commands["controls"] == ["tombola", "controls", study, "--level", "2", *store]
    assert commands["rewind-point"] == ["tombola", "rewind-point", study, *store]
    asked = _commands(judged)
    assert ["tombola", "run", study, "--importances", "magnitude", "l1", "softmax", "min_max", *store] in asked
    for each in (*commands.values(), *asked):
        assert make_parser().parse_args(each[1:]).study == study
    told = " ".join(told.split())
    means = matching.summarise(matching.of_study(tickets, levels=[2]))
    assert means["pairs"].to_list() == [2, 2, 1, 1]
    for kind, words in [("seeds", "seeds"), ("importances", "importances")]:
        raw, matched = (100 * means.filter(kind=kind)[name].mean() for name in ("jaccard", "matched_jaccard"))
        expected = f"Tickets of two {words} overlap at level 2 by {raw:.2f} %, and by {matched:.2f} % with"
        assert expected in told
    assert "are connected" in told or "no level is connected" in told
    limits = ("--tolerance", "0", "--margin", "100", "--points", "2")
    assert command(folder, "basins", *limits) == 0
    own = " ".join(capsys.readouterr().out.split())
    assert "and differ from iteration 0 on; `tombola rewind-point` compares orders that share the first 2" in own
    assert command(folder, "claims", "--level", "2", "--with", "basins", *limits) == 0
    limited = " ".join(capsys.readouterr().out.partition("Unique up to what?")[2].replace("- ", "").split())
    (sentence,) = re.findall(r"l1: [^:]*: [^:.]*\.", own)
    assert sentence in limited
    assert sentence not in told
    contents = gather(open_planner(folder), "s", ["s"], level=2, costly=["matching"])
    assert contents.unique == tuple(describe_uniqueness(tickets, asked=["matching"], level=2))
    assert "Unique up to what?" in page(contents)


def test_matching_raises_the_overlap_of_tickets_of_two_seeds_and_of_random_ones(tickets: Tickets) -> None:
    table = matching.of_study(tickets, ["l1"]).filter(pl.col("layer") == "(prunable)")
    (line,) = table.to_dicts()
    assert line["kind"] == "seeds"
    assert line["matched_jaccard"] > line["jaccard"] + 0.02
    assert line["chance_jaccard"] > line["layers_jaccard"] + 0.02
    assert line["moved"] > 0.9
    assert matching.of_study(tickets, ["l1"]).equals(matching.of_study(tickets, ["l1"]))


def test_matching_by_activations_is_another_matching(tickets: Tickets) -> None:
    table = matching.of_study(tickets, ["l1"], [1], "activations", draws=1)
    assert table["by"].unique().to_list() == ["activations"]
    assert table["moved"][0] > 0.5
    assert table["chance_sd"].to_list() == [None] * 5
    by_weights = matching.of_study(tickets, ["l1"], [1], draws=1)
    assert table["matched_shared"][-1] != by_weights["matched_shared"][-1]


def test_matching_from_python(folder: Path) -> None:
    table = tombola.matching(folder / "study.toml", store=folder / "store", importances=["l1"], levels=[1], draws=1)
    assert compared(table) == [(1, None, "seeds", ["l1, seed 0", "l1, seed 1"])]


# initial


def test_the_largest_initial_weights_by_hand() -> None:
    mask = Mask.from_tensors({"a": torch.tensor([1, 1, 1, 0, 0, 0]) > 0, "b": torch.tensor([0, 0]) > 0})
    state = {"a": torch.tensor([-3.0, 0.5, 2.0, 2.0, -1.0, 0.0]), "b": torch.ones(2)}
    table = initial.of_state(state, mask)  # of the two weights 2.0, the first is among the three largest, too: 0, 2, 3
    assert table.select("layer", "alive", "kept", "expected", "excess").rows() == [
        ("a", 3.0, 2 / 3, 0.5, pytest.approx(1 / 3)),
        ("b", 0.0, None, None, None),
        ("(all)", 3.0, 2 / 3, 0.5, pytest.approx(1 / 3)),
    ]
    tied = initial.of_state({"a": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), "b": torch.ones(2)}, mask)
    assert tied["kept"].to_list() == [1.0, None, 1.0]


def test_a_mask_of_the_largest_weights_keeps_all_and_one_of_the_others_none() -> None:
    weights = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    largest = weights.abs() >= weights.abs().flatten().sort().values[100]
    for mask, kept, excess in ((largest, 1.0, 1.0), (~largest, 0.0, -1.0)):
        line = initial.of_state({"w": weights}, Mask.from_tensors({"w": mask})).row(0, named=True)
        assert (line["kept"], line["excess"]) == (kept, excess)
        assert line["low"] < line["expected"] < line["high"]


def test_initial_weights_of_a_study_in_another_way(tickets: Tickets) -> None:
    table = initial.of_study(tickets, levels=[1, 2])
    assert len(table) == 2 * 2 * 2 * 2 * 5
    ticket = tickets.progress(Chain(1, "l1")).tickets[2]
    for quantity, state in (("initial", tickets.planner.initial(1).load()), ("rewind", ticket.rewind.load())):
        where = pl.struct("level", "importance", "seed", "quantity", "layer")
        for layer in ("0.weight", "3.weight"):
            asked = {"level": 2, "importance": "l1", "seed": 1, "quantity": quantity, "layer": layer}
            line = table.filter(where == asked).row(0, named=True)
            alive = ticket.mask[layer].flatten()
            order = state[layer].abs().flatten().argsort(descending=True, stable=True)
            assert line["kept"] == float(alive[order[: int(alive.sum())]].double().mean())
            assert line["expected"] == pytest.approx(float(alive.double().mean()))
    kept = table.filter(pl.col("layer") == "5.weight")
    assert set(kept["kept"]) == {1.0}
    assert kept["excess"].null_count() == len(kept)
    means = initial.summarise(table)
    assert means["seeds"].unique().to_list() == [2]
    own = pl.col("quantity") == "rewind"
    both = table.filter((pl.col("layer") == "(prunable)") & (pl.col("level") == 2) & own)
    line = means.filter((pl.col("layer") == "(prunable)") & (pl.col("level") == 2) & own).row(0, named=True)
    of_seeds = both.filter(pl.col("importance") == "magnitude")["kept"].to_list()
    assert line["kept"] == pytest.approx(sum(of_seeds) / 2)
    assert line["high"] - line["kept"] == pytest.approx(12.7062047 * abs(of_seeds[0] - of_seeds[1]) / 2)


def test_initial_from_python(folder: Path) -> None:
    table = tombola.initial(folder / "study.toml", store=folder / "store", importances=["l1"])
    assert table["quantity"].unique().sort().to_list() == ["initial", "rewind"]


# similarity


def test_similarity_compares_tickets_and_dense_networks(tickets: Tickets) -> None:
    table = similarity.of_study(tickets)
    assert compared(table) == [
        (0, 0, "data order", ["magnitude", "magnitude@100"]),
        (0, 1, "data order", ["magnitude", "magnitude@100"]),
        (0, None, "seeds", ["magnitude, seed 0", "magnitude, seed 1"]),
        (2, 0, "importances", ["magnitude", "l1"]),
        (2, 0, "data order", ["magnitude", "magnitude@100"]),
        (2, 1, "importances", ["magnitude", "l1"]),
        (2, 1, "data order", ["magnitude", "magnitude@100"]),
        (2, None, "seeds", ["magnitude, seed 0", "magnitude, seed 1"]),
        (2, None, "seeds", ["l1, seed 0", "l1, seed 1"]),
    ]
    assert table["layer"].unique(maintain_order=True).to_list() == ["(outputs)", "0", "3", "5"]
    outputs = table.filter(pl.col("layer") == "(outputs)")
    same = functions.of_study(tickets).join(outputs, on=["level", "seed", "kind", "tickets"], suffix="_too")
    assert len(same) == 6
    assert same["disagreement"].to_list() == pytest.approx([1 - each for each in same["agreement"]])
    assert same["accuracy"].equals(same["accuracy_too"].rename("accuracy"))
    final = table.filter(pl.col("layer") == "5")
    assert final["cka"].to_list() == pytest.approx(outputs["cka"].to_list())  # the last layer returns the outputs
    means = similarity.summarise(table)
    assert means.filter(pl.col("layer") == "(outputs)").select("level", "kind", "tickets", "pairs").rows() == [
        (0, "data order", "dense", 2),
        (0, "seeds", "dense", 1),
        (2, "data order", "magnitude & magnitude@100", 2),
        (2, "importances", "magnitude & l1", 2),
        (2, "seeds", "magnitude", 1),
        (2, "seeds", "l1", 1),
    ]


def test_similarity_has_intervals_over_seeds_and_none_from_pairs_that_share_seeds(tickets: Tickets) -> None:
    table = similarity.of_study(tickets).filter(pl.col("layer") == "(outputs)")
    means = similarity.summarise(table)
    (row,) = means.filter(level=2, kind="importances").to_dicts()
    one, other = table.filter(level=2, kind="importances").select("ece").to_series()
    assert row["ece"] == pytest.approx((one + other) / 2)
    assert row["ece_high"] - row["ece"] == pytest.approx(min(12.7062047 * abs(one - other) / 2, 1 - row["ece"]))
    of_seeds = means.filter(kind="seeds")
    assert of_seeds["ece_low"].null_count() == of_seeds["kl_high"].null_count() == 3
    tripled = pl.concat([table, table, table]).filter(seed=0)  # three pairs of one seed, as of three data orders
    assert similarity.summarise(tripled)["pairs"].to_list() == [3, 3, 3]
    assert similarity.summarise(tripled)["js_low"].null_count() == 3


def test_similarity_from_python(folder: Path) -> None:
    table = tombola.similarity(folder / "study.toml", store=folder / "store", importances=["l1"], levels=[1])
    of_seeds = [(level, None, "seeds", ["l1, seed 0", "l1, seed 1"]) for level in (0, 1)]
    assert compared(table) == [*((0, seed, "data order", ["l1", "l1@100"]) for seed in (0, 1)), *of_seeds]


# the report


def test_the_report_shows_the_figures_of_the_analyses(tickets: Tickets) -> None:
    contents = gather(tickets.planner, "s", ["s.toml"], costly=["matching", "similarity"], level=2)
    found = {part.name: part.table for section in sections(contents) for part in section.parts}
    means = matching.summarise(matching.of_study(tickets, levels=[2]))
    assert found["matching"]["matched %"].to_list() == [100 * each for each in means["matched_jaccard"]]
    assert found["similarity"]["what differs"].to_list()[:2] == ["data order", "seeds"]
    assert found["alignment"].height == 3 * found["similarity"].height
    figures = similarity.summarise(similarity.of_study(tickets, levels=[2])).filter(pl.col("layer") == "(outputs)")
    assert found["calibration"]["ensemble gain, points, high"].to_list() == [
        None if each is None else 100 * each for each in figures["gain_high"]
    ]
    assert found["initial"].height == 2 * 2 * 5
    assert found["initial"]["high"].null_count() == 0


# the command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["matching", "--importances", "l1"],
        ["matching", "--importances", "l1", "--by", "activations", "--level", "1"],
        ["initial"],
        ["similarity"],
    ],
)
def test_every_verb_prints_a_table_csv_and_json(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {}
    for form in ("table", "csv", "json"):
        assert command(folder, *arguments, "--format", form) == 0
        outputs[form] = capsys.readouterr().out
    records = json.loads(outputs["json"])
    lines = list(csv.DictReader(io.StringIO(outputs["csv"])))
    assert len(lines) == len(records) > 0
    assert list(lines[0]) == list(records[0])
    assert not any("nan" in line.lower() or "None" in line for line in outputs["table"].splitlines())


def test_the_table_of_matching_has_one_row_for_each_comparison(
    folder: Path, capsys: pytest.CaptureFixture[str], tickets: Tickets
) -> None:
    assert command(folder, "matching", "--draws", "1") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 4
    means = matching.summarise(matching.of_study(tickets, draws=1)).to_dicts()
    (own,) = [each for each in means if each["tickets"] == "magnitude & l1"]
    (line,) = [each for each in lines if "magnitude & l1" in each]
    figures = [f"{100 * own[name]:.2f}" for name in ("jaccard", "layers_jaccard", "matched_jaccard", "chance_jaccard")]
    assert line.split()[5:10] == ["2", *figures]
    assert [each.split()[1:4] for each in lines if "seeds" in each] == [
        ["seeds", "magnitude", "1"],
        ["seeds", "l1", "1"],
    ]


def test_a_note_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "matching", "--seeds", "0", "--data-seeds", "--draws", "1") == 0
    told = capsys.readouterr().err
    assert "initialisations are not compared: the study has one seed; find the tickets of others with" in told
    assert "one data order; find the tickets of others with `tombola run --data-seeds`" in told
    assert command(folder, "basins", "--points", "2", "--importances", "l1", "--seeds", "0") == 0
    told = capsys.readouterr().err
    assert "no interval: the study has one seed" in told
    assert "other data orders are missing; find them with `tombola run`, whose --data-seeds-for names" in told


def test_one_importance_is_compared_with_another_data_order(tickets: Tickets) -> None:
    table = matching.of_study(tickets, ["magnitude"], draws=1)
    assert table["kind"].unique().sort().to_list() == ["data order", "seeds"]
    (whole,) = table.filter(kind="data order", layer="(all)", seed=0).to_dicts()
    assert whole["tickets"] == ["magnitude", "magnitude@100"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["matching", "--level", "7"], "the study has no level 7, it has levels 0 to 2"),
        (["matching", "--importances", "nonsense"], "unknown importance 'nonsense'"),
        (["matching", "--importances", "l1", "--seeds", "0"], "there are no two tickets to match"),
        (["matching", "--seeds", "0", "7"], "level 0 is not in "),
        (["matching", "--draws", "0"], "--draws: expected a whole number from 1 to 1000, got '0'"),
        (["matching", "--by", "names"], "unknown --by 'names'"),
        (["similarity", "--level", "7"], "the study has no level 7, it has levels 0 to 2"),
        (
            ["similarity", "--importances", "l1", "--seeds", "0", "--data-seeds"],
            "there are no two networks to compare: expected two se",
        ),
        (
            ["similarity", "--level", "0", "--seeds", "0", "--data-seeds"],
            "two importances at a level from 1 on; run another",
        ),
        (["initial", "--level", "7"], "the study has no level 7, it has levels 0 to 2"),
        (["claims", "--tolerance", "2"], "--tolerance is for --with basins or rewind-point, which is missing"),
        (["claims", "--with", "rewind-point", "--margin", "0.5"], "--margin is for --with basins, which is missing"),
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


@pytest.mark.parametrize(("asked", "words"), [({"by": "names"}, "^by: expected weights"), ({"draws": 0}, "^draws: ex")])
def test_mistakes_in_python(asked: dict[str, Any], words: str, tickets: Tickets) -> None:
    with pytest.raises(UserError, match=words):
        matching.of_study(tickets, **asked)


def test_a_network_that_cannot_be_matched_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = Tickets(open_planner(folder))
    assert tickets.planner.identity
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, inputs: inputs.cumsum(1))  # a unit meets its neighbour
    with pytest.raises(UserError, match="with its units in another order it computes something else; its tickets can"):
        matching.of_study(tickets, ["l1"], draws=1)


def test_an_interval_of_shares_stays_between_nothing_and_all() -> None:
    same = {"level": 1, "importance": "l1", "quantity": "initial", "layer": "(all)", "connections": 10, "alive": 5}
    each = [{**same, "seed": seed, "kept": 0.9 + 0.1 * seed, "expected": 0.5, "excess": 0.8} for seed in (0, 1)]
    table = pl.DataFrame(each)
    assert initial.summarise(table)["high"].item() == 1.0


def test_predictions_of_token_classes_are_compared_position_by_position() -> None:
    ids = torch.arange(12).view(3, 4) % 3
    targets = ids.clone()
    targets[0, 0] = -100  # does not count
    build = partial(torch.nn.Sequential, torch.nn.Embedding(3, 2), torch.nn.Flatten(), torch.nn.Unflatten(1, (2, 4)))
    data = tombola.Dataset("tokens", ids, targets % 2, ids, torch.where(targets < 0, targets, targets % 2))
    made = tombola.Problem(data, build, torch.nn.functional.cross_entropy, {})
    assert made.of_classes
    ask = functions._Outputs(cast(Planner, SimpleNamespace(problem=made)))
    ticket = cast(Any, SimpleNamespace(trained=SimpleNamespace(weights=Weights.of(build().state_dict()))))
    assert ask(ticket).shape == (11, 2)
    assert ask.compare({"a": ticket, "b": ticket})["examples"].item() == 11

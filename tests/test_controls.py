"""Controls, combinations and transfers of tickets: what is changed, what is trained, and what is told."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tombola
from stores import InTurn, content, describe_uniqueness, planner, records, results, study
from tombola.analysis import controls, values
from tombola.analysis.values import value_at_density
from tombola.cli import main
from tombola.engine import estimate as estimates
from tombola.engine.forecast import Speed
from tombola.engine.run import run
from tombola.errors import NothingStoredError, UserError
from tombola.lottery.controls import keep_signs, shuffle
from tombola.pruning.mask import Mask
from tombola.reporting.contents import gather
from tombola.reporting.sections import sections
from tombola.study.chains import Chain
from tombola.study.controls import (
    KINDS,
    Plan,
    list_combinations,
    list_controls,
    list_transfers,
    plan_combinations,
    plan_controls,
    plan_transfers,
)
from tombola.study.needs import list_needs
from tombola.study.planner import Planner
from tombola.study.schema import Study
from tombola.study.tickets import Tickets
from tombola.training.train import initial_state
from tombola.training.weights import Weights

pytestmark = pytest.mark.xdist_group("controls")  # one study for all

SHORT = {"iterations": 12, "rewind": 2}
STUDY = study(seeds=(0, 1), levels=2, **SHORT)


def finish(of: Planner, most: int = 10_000) -> None:
    """Do the trainings of a planner, or the first of them."""

    class Enough(Exception):
        pass

    def count(status: Any, finished: Any) -> None:
        if status.done >= most:
            raise Enough

    with contextlib.suppress(Enough):
        run(of, InTurn(last_first=False), count)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a study of two importances, two seeds and two levels, and the controls of level 1."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("controls") / "store"
    finish(planner(root, STUDY))
    finish(plan_controls(open_tickets(root), 1).planner)
    return root


def open_tickets(root: Path, of: Study = STUDY) -> Tickets:
    return Tickets(planner(root, of))


# The transformations.

masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4)


def as_mask(bits: list[list[bool]]) -> Mask:
    return Mask.from_tensors({f"layer{number}": torch.tensor(each) for number, each in enumerate(bits)})


@settings(max_examples=40)
@given(bits=masks, seed=st.integers(0, 2**62))
def test_shuffling_keeps_the_number_of_connections_of_each_layer(bits: list[list[bool]], seed: int) -> None:
    mask = as_mask(bits)
    found = shuffle(mask, seed)
    assert (found.shapes, found.counts) == (mask.shapes, mask.counts)
    assert shuffle(mask, seed) == found
    full = as_mask([[True] * len(each) for each in bits])
    assert shuffle(full, seed) == full


def test_every_place_of_a_shuffled_mask_is_equally_likely() -> None:
    mask = Mask.from_tensors({"w": torch.tensor([[1, 1, 0], [0, 0, 0]]) > 0})
    draws = 1000
    hits = torch.stack([shuffle(mask, seed)["w"] for seed in range(draws)]).double().mean(0)
    sd = math.sqrt(1 / 3 * 2 / 3 / draws)
    assert (hits - 1 / 3).abs().max() < 4 * sd
    twice = Mask.from_tensors({"a": torch.arange(40) < 20, "b": torch.arange(40) < 20})
    assert not torch.equal(shuffle(twice, 0)["a"], shuffle(twice, 0)["b"]), "layers are independent"


numbers = st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6)


@settings(max_examples=60)
@given(own=numbers, drawn=numbers)
def test_signs_are_kept_and_nothing_else(own: list[float], drawn: list[float]) -> None:
    one = {"w": torch.tensor(own), "tied": torch.tensor(own), "b": torch.tensor(own)}
    other = {name: torch.tensor(drawn) for name in one}
    mask = Mask.from_tensors({"w": torch.zeros(6, dtype=torch.bool)})
    found = keep_signs(one, other, mask, {"w": ("tied",)})
    assert torch.equal(found["b"], other["b"])
    for name in ("w", "tied"):
        assert torch.equal(found[name].abs(), other[name].abs())
        there = (one[name] != 0) & (other[name] != 0)
        assert torch.equal(found[name].sign()[there], one[name].sign()[there])
        assert torch.equal(found[name][one[name] == 0], other[name][one[name] == 0])


# Controls.


def only(plan: Plan, kind: str, seed: int = 0, importance: str = "l1") -> tuple[Any, Any]:
    """Return what a control begins with, and the ticket."""
    (part,) = [each for each in plan.parts if (each.kind, each.seed, each.importance) == (kind, seed, importance)]
    (need,) = plan.planner.progress(part.chain).trainings or plan.planner.progress(part.chain).needs
    return need, plan.tickets.progress(Chain(seed, importance)).tickets[1]


def test_each_control_changes_one_thing_of_the_ticket(root: Path) -> None:
    plan = plan_controls(open_tickets(root), 1)
    own = plan.tickets.progress(Chain(0, "l1")).trainings[2]
    assert own.mask == plan.tickets.progress(Chain(0, "l1")).tickets[1].mask
    changed = {}
    for kind in KINDS:
        need, ticket = only(plan, kind)
        assert (need.begin, need.end) == (own.begin, own.end) == (2, 12)
        assert need.mask.counts == ticket.mask.counts or kind == "other-seed"
        weights, mask, order = (getattr(need, name) for name in ("initial", "mask", "seed"))
        changed[kind] = (weights.hash != own.initial.hash, mask != own.mask, order != own.seed)
    assert changed == {
        "new-order": (False, False, True),
        "signs": (True, False, False),
        "new-weights": (True, False, False),
        "shuffled": (False, True, False),
        "other-seed": (False, True, False),
        "random": (True, True, False),
    }
    fresh, again = only(plan, "new-weights")[0], only(plan, "random")[0]
    assert fresh.initial.hash == again.initial.hash, "controls of a draw are paired"
    assert only(plan, "shuffled")[0].mask == again.mask
    signs, drawn, mine = (only(plan, "signs")[0].initial.load(), fresh.initial.load(), own.initial.load())
    assert torch.equal(signs["0.weight"].sign(), mine["0.weight"].sign())
    assert torch.equal(signs["0.weight"].abs(), drawn["0.weight"].abs())
    assert only(plan, "other-seed")[0].mask == plan.tickets.progress(Chain(1, "l1")).tickets[1].mask
    assert only(plan, "new-order")[0].seed == 2


def test_what_controls_lose_in_another_way(root: Path) -> None:
    plan = plan_controls(open_tickets(root), 1)
    table = controls.of_controls(plan)
    assert len(table) == len(KINDS) * 2 * 2
    assert controls.of_study(open_tickets(root)).equals(table)
    tickets, own = plan.tickets, Tickets(plan.planner)
    for line in table.iter_rows(named=True):
        (part,) = [
            part
            for part in plan.parts
            if all(getattr(part, name) == line[name] for name in ("kind", "importance", "seed"))
        ]
        ticket = tickets.progress(Chain(line["seed"], line["importance"])).tickets[1]
        (trained,) = own.progress(part.chain).tickets
        assert ticket.trained is not None
        assert trained.trained is not None
        assert line["ticket"] == ticket.trained.history.test_accuracy
        assert line["value"] == trained.trained.history.test_accuracy
        assert line["lost"] == pytest.approx(line["ticket"] - line["value"])
        assert line["density"] == trained.mask.density
    means = controls.summarise(table)
    assert len(means) == len(KINDS) * 2
    line = means.row(0, named=True)
    lost = table.filter(kind=line["kind"], importance=line["importance"])["lost"].to_list()
    assert line["lost"] == pytest.approx(sum(lost) / 2)
    assert line["high"] - line["lost"] == pytest.approx(12.7062047 * abs(lost[0] - lost[1]) / 2)


def test_further_draws_go_on_after_a_stop_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    plan = plan_controls(open_tickets(store), 1, ["signs"], draws=2, importances=["l1"])
    assert [part.draw for part in plan.parts] == [1, 2, 1, 2]
    finish(plan.planner, most=1)
    assert len(results(store)) == len(results(root)) + 1
    half = controls.of_study(open_tickets(store)).filter(importance="l1", seed=0)
    assert sorted(half["draws"].to_list()) == [1, 1, 1, 1, 1, 2]
    finish(plan_controls(open_tickets(store), 1, ["signs"], draws=2, importances=["l1"]).planner)
    stopped = content(store)
    shutil.rmtree(store)
    shutil.copytree(root, store)
    finish(plan.planner)
    assert content(store) == stopped
    assert list_controls(open_tickets(store)) == {
        (1, ("magnitude", "l1")): (tuple(KINDS), 1),
        (1, ("l1",)): (("signs",), 2),
    }
    table = controls.of_study(open_tickets(store))
    assert table.filter(kind="signs", importance="l1")["draws"].to_list() == [2, 2]
    needs = list_needs(open_tickets(store))
    assert {folder.name for folder in results(store)} <= needs, "a collection keeps them"
    assert not {folder.name for folder in results(store)} & list_needs(open_tickets(store, study(seeds=(7,), **SHORT)))
    asked = [folder for folder in results(store) if "further" in json.loads((folder / "record.json").read_text())]
    forged = json.loads((asked[0] / "record.json").read_text())
    forged["further"]["draws"] = 1000
    (asked[0] / "record.json").write_text(json.dumps(forged))
    most = max(draws for _, draws in list_controls(open_tickets(store)).values())
    assert most == len(asked), "a report plans no more draws than there are trainings"


def test_controls_and_importances_share_what_is_drawn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled: list[tuple[Any, ...]] = []
    drawn: list[int] = []

    def draw(build: Any, seed: int) -> Any:
        drawn.append(seed)
        return initial_state(build, seed)

    def move(mask: Mask, seed: int) -> Mask:
        shuffled.append((mask, seed))
        return shuffle(mask, seed)

    monkeypatch.setattr("tombola.study.controls.shuffle", move)
    monkeypatch.setattr("tombola.study.controls.initial_state", draw)
    plan = plan_controls(open_tickets(root), 1, draws=2)
    assert len(shuffled) == len(set(shuffled)) == 2 * 2 * 2, "importances x seeds x draws"
    assert len(drawn) == 2 * len(set(drawn)) == 2 * 2 * 2, "once for the weights, once with other signs"
    assert len(plan.parts) == 2 * 2 * (2 * 5 + 1)


def test_controls_that_cannot_be(root: Path) -> None:
    other = study(seeds=(7,), **SHORT)
    tickets, one = open_tickets(root), open_tickets(root, study(seeds=(0,), levels=2, **SHORT))
    for call, text in [
        (lambda: plan_controls(tickets, 3), "the study has no level 3"),
        (lambda: plan_controls(tickets, 0), "controls: expected a level from 1 on; level 0 is the dense network"),
        (lambda: plan_controls(tickets, 1, ["sign"]), "kinds: unknown control 'sign'; did you mean 'signs'?"),
        (lambda: plan_controls(tickets, 1, draws=0), "draws: expected a whole number from 1 to 1000, got 0"),
        (lambda: plan_controls(tickets, 1, draws=True), "draws: expected a whole number from 1 to 1000, got True"),
        (lambda: plan_controls(tickets, 1, "signs"), "kinds: expected a list of kinds of controls, got 'signs'; write"),
        (lambda: plan_controls(one, 1, ["other-seed"]), "kinds: 'other-seed' needs the tickets of two seeds, and"),
        (lambda: plan_controls(tickets, 1, importances=["l2"]), "importances: the study has no importance 'l2'"),
        (lambda: plan_controls(open_tickets(root, study(seeds=(7,), **SHORT)), 1), "level 1 is not in"),
        (lambda: plan_controls(open_tickets(root, study(rewind_to="learning_rate", **SHORT)), 1), "it needs weights"),
        (lambda: plan_combinations(one, 1, "seeds"), "the study has one; run another seed"),
        (lambda: plan_combinations(tickets, 1, importances=["l1"]), "importances: expected at least 2 to compare"),
        (lambda: plan_combinations(tickets, 1, "orders"), "over: unknown 'orders'; choose from"),  # type: ignore[arg-type]
        (lambda: plan_transfers(tickets, open_tickets(root, other), 1), "two studies have no seed"),
        (lambda: controls.combinations_of_study(tickets), "no combinations are in"),
        (lambda: controls.of_study(open_tickets(root, study(seeds=(7,), **SHORT))), "no controls are in"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            call()
        assert text in str(caught.value)
    assert {part.kind for part in plan_controls(one, 1).parts} == set(KINDS) - {"other-seed"}


# Combinations.


def test_unions_and_intersections_are_tickets_of_their_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    tickets = open_tickets(store)
    plan = plan_combinations(tickets, 1)
    monkeypatch.setattr(estimates, "measure_speed", lambda *_, **__: Speed({0.0: 0.0, 1.0: 1.0}, 0.0, 0.0, "made up"))
    expected = estimates.estimate(plan.planner, 1, beside=tickets)
    finish(plan.planner)
    densities = controls.of_combinations(plan)["density"]
    assert expected.seconds == pytest.approx(10 * densities.sum()), "as long as masks of their densities take"
    table = controls.of_combinations(plan)
    assert table.select("kind", "seed").rows() == [
        (kind, seed) for seed in (0, 1) for kind in ("union", "intersection")
    ]
    for seed in (0, 1):
        one, other = (tickets.progress(Chain(seed, name)).tickets[1].mask for name in STUDY.importances)
        densities = table.filter(seed=seed)["density"].to_list()
        assert densities == [(one | other).density, (one & other).density]
        values = [value_at_density(tickets, Chain(seed, name), densities[0]) for name in STUDY.importances]
        line = table.filter(seed=seed, kind="union").row(0, named=True)
        assert line["same_density"] == pytest.approx(sum(value for value in values if value is not None) / 2)
        assert line["difference"] == pytest.approx(line["value"] - line["same_density"])
    seeds = plan_combinations(tickets, 1, "seeds", ["l1"])
    finish(seeds.planner)
    assert list_combinations(open_tickets(store)) == [(1, "importances", ("magnitude", "l1")), (1, "seeds", ("l1",))]
    both = controls.combinations_of_study(open_tickets(store))
    assert both["tickets"].to_list()[-1] == ["l1, seed 0", "l1, seed 1"]
    means = controls.summarise_combinations(both)
    assert means["seeds"].to_list() == [2] * 4
    assert {folder.name for folder in results(store)} <= list_needs(open_tickets(store))


def test_a_value_between_two_levels_by_hand(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = open_tickets(root)
    first, second = tickets.progress(Chain(0, "l1")).tickets[:2]
    a, b = (each.trained and each.trained.history.test_accuracy for each in (first, second))
    assert a is not None
    assert b is not None
    density = math.sqrt(first.mask.density * second.mask.density)
    assert value_at_density(tickets, Chain(0, "l1"), density) == pytest.approx((a + b) / 2)
    assert value_at_density(tickets, Chain(0, "l1"), 1.0) == a
    assert value_at_density(tickets, Chain(0, "l1"), 0.01) is None
    assert value_at_density(tickets, Chain(0, "l1"), 0.0) is None
    empty = SimpleNamespace(mask=SimpleNamespace(density=0.0), level=1)
    known = [*tickets.measure(Chain(0, "l1")), empty]
    monkeypatch.setattr(Tickets, "measure", lambda *_: known)
    assert value_at_density(tickets, Chain(0, "l1"), 1.0) == a, "a ticket without connections has no logarithm"


def test_no_value_lies_beside_a_ticket_that_diverged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = open_tickets(root)
    monkeypatch.setattr(values, "value_at", lambda _tickets, _chain, level: None if level == 1 else 0.5)
    assert value_at_density(tickets, Chain(0, "l1"), 0.9) is None
    assert value_at_density(tickets, Chain(0, "l1"), 0.65) is None
    assert value_at_density(tickets, Chain(0, "l1"), 1.0) == 0.5


# Transfers.


def test_a_mask_of_another_recipe_is_trained_here(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    here = study(seeds=(0, 1), levels=1, lr=0.02, **SHORT)
    with pytest.raises(NothingStoredError, match="level 0 is not in"):
        plan_transfers(open_tickets(store, here), open_tickets(store), 1)
    finish(planner(store, here.model_copy(update={"levels": 0})))
    plan = plan_transfers(open_tickets(store, here), open_tickets(store), 1, ["l1"])
    finish(plan.planner)
    table = controls.of_transfers(plan)
    assert table.select("importance", "seed").rows() == [("l1", 0), ("l1", 1)]
    assert table["own"].to_list() == [None, None]
    assert table["gained"].to_list() == pytest.approx((table["value"] - table["shuffled"]).to_list())
    (part, _) = plan.parts[:2]
    (training,) = plan.planner.progress(part.chain).trainings
    assert training.identity["recipe"]["lr"] == 0.02
    assert training.mask == open_tickets(store).progress(Chain(0, "l1")).tickets[1].mask
    assert isinstance(training.initial, Weights)
    dense = plan.tickets.progress(Chain(0, "l1")).tickets[0]
    assert training.initial.hash == dense.rewind.hash
    (again,) = list_transfers(open_tickets(store, here))
    assert controls.of_transfers(again).equals(table)
    assert set(table["source"]) == {"recipe.lr = 0.05"}
    (section,) = [each for each in sections(gather(planner(store, here), "s", ["s"])) if each.name == "transfers"]
    assert [part.title for part in section.parts] == ["Level 1 of the study with recipe.lr = 0.05"]
    assert section.parts[0].table["better than shuffled by"].to_list() == pytest.approx([100 * table["gained"].mean()])
    noted = [each["further"] for each in records(store) if each.get("further", {}).get("verb") == "transfer"]
    assert len(noted) == 4
    assert all(len(note["trainings"]) == 2 and len(note["of"]) == 1 for note in noted), "no more for more seeds"
    # After an edit of the network that the masks come from, which no field of its study tells, nothing is mixed.
    _write_notes(store, lambda note: note.update(origin=str(note["trainings"][0]["seed"])))
    plans = list_transfers(open_tickets(store, here))
    assert [{part.seed for part in each.parts} for each in plans] == [{0}, {1}]
    # In earlier versions, each note had all trainings and seeds, and no origin.
    trainings = [each for note in noted for each in note["trainings"]]
    dense = [key for note in noted for key in note["of"]]
    _write_notes(store, lambda note: note.update(trainings=trainings, of=dense) or note.pop("origin"))
    (again,) = list_transfers(open_tickets(store, here))
    assert controls.of_transfers(again).equals(table)
    shutil.rmtree(store / "results" / plan.planner.progress(plan.parts[1].chain).trainings[0].key[:2])
    assert controls.transfers_of_study(open_tickets(store, here))["seed"].to_list() == [1]
    with pytest.raises(NothingStoredError, match="no transfers are in"):
        controls.transfers_of_study(open_tickets(store))
    other = study(seeds=(0, 1), **SHORT).model_copy(
        update={"task": STUDY.task.model_copy(update={"model": "tiny_task:deeper"})}
    )
    with pytest.raises(UserError, match=r"two studies differ: layer '0\.weight' has the shapes 64 × 16 and 32 × 16"):
        plan_transfers(open_tickets(store), open_tickets(store, other), 1)


def _write_notes(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the note in each record of a transfer."""
    for path in store.glob("results/*/*/record.json"):
        record = json.loads(path.read_text())
        if record.get("further", {}).get("verb") == "transfer":
            change(record["further"])
            path.write_text(json.dumps(record))


# The report and the claims.


def test_stored_controls_and_combinations_are_in_the_report(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    finish(plan_combinations(open_tickets(store), 1).planner)
    contents = gather(planner(store, STUDY), "s", ["s"], level=1)
    found = {section.name: section for section in sections(contents)}
    (part,) = found["controls"].parts
    assert part.chart is not None
    assert part.table["trained"].unique(maintain_order=True).to_list() == list(KINDS.values())
    means = controls.summarise(controls.of_study(open_tickets(store)))
    assert part.table["lost"].to_list() == pytest.approx((100 * means["lost"]).to_list())
    (part,) = found["combinations"].parts
    assert part.table["kind"].to_list() == ["union", "intersection"]
    (sentence,) = describe_uniqueness(open_tickets(store))
    assert sentence.startswith("At level 1, a ticket loses with another data order ")
    of_l1 = controls.of_study(open_tickets(store)).filter(importance="l1", kind="signs")["lost"].to_list()
    (sentence,) = describe_uniqueness(open_tickets(store), ["l1"])
    assert f"with new magnitudes {100 * sum(of_l1) / 2:+.2f}" in sentence
    without = gather(planner(store, study(seeds=(0,), levels=2, importances=["l1"], **SHORT)), "s", ["s"])
    assert "combinations" not in {section.name for section in sections(without)}


# The command line and Python.


@pytest.mark.usefixtures("workers_here")
def test_verbs_plan_train_and_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--levels", "1", "--recipe.epochs", "1", "--importances", "magnitude", "l1", "--data-seeds"]
    few += ["--store", str(tmp_path), "--task.dataset-arguments", "train_per_class=10", "test_per_class=5"]
    assert main(["controls", "digits", "--level", "1", *few]) == 2
    assert "`tombola run` does the trainings that are missing" in capsys.readouterr().err
    assert main(["run", "digits", *few]) == 0
    capsys.readouterr()
    asked = ["digits", "--level", "1", *few]
    assert main(["controls", *asked, "--kinds", "signs", "--plan"]) == 0
    assert "4 trainings to do, 0 in" in capsys.readouterr().out
    assert main(["controls", *asked, "--kinds", "signs"]) == 0
    told = capsys.readouterr().out
    assert "[4/4]" in told
    assert main(["controls", *asked, "--seeds", *map(str, range(4)), "--draws", "1000", "--plan"]) == 2
    assert "these controls are 40024 trainings, expected at most 10000" in capsys.readouterr().err
    assert main(["controls", *asked, "--kinds", "signs", "--draws", "60", "--plan"]) == 0
    assert "the weights of 120 networks are drawn to name" in " ".join(capsys.readouterr().err.split())
    assert "only the signs of the weights, and new magnitudes" in told
    assert main(["controls", *asked, "--kinds", "signs", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("level,kind,importance,seed,draws,density,dense,ticket,value,lost\n")
    assert main(["combine", *asked, "--seeds", "0"]) == 0
    assert "intersection" in capsys.readouterr().out
    assert main(["transfer", *asked, "--from", "lenet-mnist", "--format", "json"]) == 2
    assert "tombola: " in capsys.readouterr().err
    assert main(["combine", *asked, "--over", "seeds", "--seeds", "0"]) == 2
    assert "combined, and the study has one; run another seed" in capsys.readouterr().err
    found = tombola.controls(
        "digits",
        {"levels": 1, "recipe.epochs": 1, "importances": ["magnitude", "l1"], "data_seeds": []}
        | {"task.dataset_arguments": {"train_per_class": 10, "test_per_class": 5}},
        level=1,
        kinds=["signs"],
        store=tmp_path,
        progress=False,
    )
    assert found["kind"].unique().to_list() == ["signs"]

"""Following chains: how far they are, why they end, what they need, and that each result is read once."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stores import InTurn, content, planner, problem, results, study
from tombola.analysis import connectivity, functions, layers, overlap, reinit, stability, weights, winners
from tombola.analysis.accuracy import rows
from tombola.engine.run import run
from tombola.errors import DamagedResultError, ImportanceError, NothingStoredError, UserError
from tombola.files import read_regular
from tombola.lottery.ticket import Ticket
from tombola.pruning.mask import Mask
from tombola.reporting.contents import COSTLY, gather
from tombola.store.names import name_of
from tombola.store.store import Store
from tombola.study import planner as planning
from tombola.study import reinitialisation
from tombola.study.chains import Chain, Diverged, Finished, Stopped, Waiting, select_chains
from tombola.study.needs import list_chain_needs, list_needs
from tombola.study.planner import Planner
from tombola.study.reinitialisation import plan
from tombola.study.tickets import Tickets
from tombola.study.trainings import Training
from tombola.training.history import History, Trained
from tombola.training.weights import Weights, apply_mask

LEVELS = 2
CHAIN = Chain(0, "l1")


def finish(of: Planner) -> None:
    run(of, InTurn(last_first=False), lambda *_: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a study of two importances, two seeds and two levels, and two of its reinitialisations."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("planner") / "store"
    finish(planner(root, STUDY))
    for each in plan(Tickets(planner(root, STUDY)), 1, 2):
        finish(each.planner)
    return root


STUDY = study(seeds=(0, 1), levels=LEVELS)


def put(store: Store, training: Training, history: History) -> None:
    """Store a made-up result of a training: weights that grow with their index."""
    state = {name: torch.arange(t.numel()).reshape(t.shape) + 1.0 for name, t in training.initial.load().items()}
    trained = Trained(Weights.of(apply_mask(state, training.mask)), history)
    store.results.put(training.key, training.identity, training.mask, trained, {})


def test_building_a_planner_draws_nothing_from_torchs_global_stream(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    planner(tmp_path / "store", STUDY)
    assert torch.random.get_rng_state().equal(before)
    problem().build()
    assert not torch.random.get_rng_state().equal(before), "a model draws its weights from that stream"


def test_a_chain_waits_for_one_training_after_the_other_until_it_is_finished(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", study(["l1"], levels=1))
    seen = []
    while isinstance(end := of.progress(CHAIN).end, Waiting):
        progress = of.progress(CHAIN)
        assert progress.waits_for is not None
        assert progress.waits_for.key == end.need.key
        seen.append((end.need.begin, end.need.end, end.remaining, end.shared, len(progress.tickets)))
        assert end.need.key not in of.store.results
        put(of.store, end.need, History(test_accuracy=0.5))
        assert [training.key for training in of.progress(CHAIN).trainings][-1] == end.need.key
    assert seen == [(0, 10, 3, 2, 0), (10, 60, 2, 1, 0), (10, 60, 1, 1, 1)]
    progress = of.progress(CHAIN)
    assert (progress.end, progress.waits_for, progress.remaining, progress.stopped) == (Finished(), None, 0, None)
    assert [ticket.level for ticket in progress.tickets] == [0, 1]


def test_a_chain_ends_with_a_training_that_diverged(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", study(["l1"], levels=1, rewind=0))
    training = of.progress(CHAIN).waits_for
    assert training is not None
    put(of.store, training, History(diverged_at=7))
    progress = of.progress(CHAIN)
    assert progress.end == Diverged()
    assert (len(progress.tickets), progress.waits_for, progress.remaining) == (1, None, 0)


def test_the_last_level_is_finished_though_its_training_diverged(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", study(["l1"], levels=0, rewind=0))
    training = of.progress(CHAIN).waits_for
    assert training is not None
    put(of.store, training, History(diverged_at=7))
    assert of.progress(CHAIN).end == Finished()


def test_a_chain_stops_where_its_importance_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = planner(tmp_path / "store", study(["l1"], levels=1, rewind=0))
    training = of.progress(CHAIN).waits_for
    assert training is not None
    put(of.store, training, History(test_accuracy=0.5))

    def fail(*_: Any, **__: Any) -> Mask:
        raise ImportanceError("importance 'l1', layer '0.weight': it returned NaN")

    monkeypatch.setattr("tombola.study.rounds.prune_round", fail)
    progress = of.progress(CHAIN)
    assert progress.end == Stopped("importance 'l1', layer '0.weight': it returned NaN")
    assert progress.stopped == "importance 'l1', layer '0.weight': it returned NaN"
    assert len(progress.tickets) == len(progress.trainings) == 1

    def mistake(*_: Any, **__: Any) -> Mask:
        raise UserError("another mistake")

    monkeypatch.setattr("tombola.study.rounds.prune_round", mistake)
    with pytest.raises(UserError, match="another mistake"):
        of.progress(CHAIN)


def test_initial_weights_can_be_given(tmp_path: Path) -> None:
    own = planner(tmp_path / "store", STUDY)
    given = {3: own.initial(1)}
    chains = [Chain(3, "l1", 1)]
    other = Planner(STUDY, problem(), own.store, initial=given.__getitem__, chains=chains)
    assert other.chains == chains
    waits_for, same = other.progress(chains[0]).waits_for, own.progress(Chain(1, "l1")).waits_for
    assert waits_for is not None
    assert same is not None
    assert waits_for.key == same.key, "a training is named by its weights, whatever its seed is called"


# tickets


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Return a counter of how often each `result.json` is read from now on."""
    reads: Counter[Path] = Counter()

    def count(path: Path, most: int) -> bytes:
        if path.name == "result.json":
            reads[path] += 1
        return read_regular(path, most)

    monkeypatch.setattr("tombola.store.results.read_regular", count)
    return reads


def test_all_analyses_together_read_each_result_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = Tickets(planner(root, STUDY))
    reads = count_reads(monkeypatch)
    rows(tickets)
    tables = [m.of_study(tickets) for m in (overlap, layers, stability, winners, weights, functions, connectivity)]
    tables.append(reinit.of_study(tickets))
    assert all(len(table) for table in tables)
    assert set(reads.values()) == {1}
    assert {path.parent for path in reads} == set(results(root))


def test_a_report_reads_each_result_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = planner(root, STUDY)
    reads = count_reads(monkeypatch)
    contents = gather(of, "s", ["s"], costly=COSTLY)
    assert {"overlap", "layers", "stability", "winners", "weights", "initial", *COSTLY, "reinit"} == set(
        contents.tables
    )
    assert set(reads.values()) == {1}


def test_masks_of_tickets_stay_on_disk(root: Path) -> None:
    tickets = Tickets(planner(root, STUDY))
    for progress in tickets.all().values():
        for ticket, training in zip(progress.tickets[1:], progress.trainings[-LEVELS:], strict=True):
            assert ticket.mask.load() is not ticket.mask, "its bits are in memory"
            assert training.mask is ticket.mask
            assert ticket.mask.load() == ticket.mask
            assert ticket.mask.load().counts == ticket.mask.counts
    at = tickets.at(1, [CHAIN])[CHAIN].mask
    assert at.load() is at, "of the level asked for they are in memory"


def test_a_ticket_says_where_it_came_from(root: Path) -> None:
    of = planner(root, STUDY)
    about = {"study": STUDY.model_dump(mode="json"), "importance": CHAIN.importance, "seed": CHAIN.seed}
    assert [ticket.provenance for ticket in of.progress(CHAIN).tickets] == [about] * 3
    assert of._provenance(replace(CHAIN, data_seed=7)) == about | {"data_seed": 7}


def test_the_bits_of_a_tickets_mask_are_in_memory_only_while_they_are_used(root: Path) -> None:
    """Whatever the ticket refers to: 15 tickets x 25 levels of a large network would be gigabytes."""
    gc.collect()
    before = {id(each) for each in gc.get_objects() if type(each) is Mask and each._bits}
    progress = planner(root, STUDY).progress(CHAIN)
    gc.collect()
    loaded = [each for each in gc.get_objects() if type(each) is Mask and each._bits and id(each) not in before]
    assert len(progress.tickets) == 3
    assert {mask.alive == mask.total for mask in loaded} == {True}, "only the dense network's"


def test_looking_a_layer_up_loads_no_mask(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = planner(root, STUDY).progress(CHAIN).tickets[2].mask
    monkeypatch.setattr(Mask, "load", lambda self: pytest.fail("the mask was loaded"))
    assert [name in mask for name in (*mask, "no layer")] == [True] * len(mask) + [False]


def test_a_mask_that_is_no_longer_remembered_is_read_from_the_result(tmp_path: Path, root: Path) -> None:
    import shutil

    shutil.copytree(root, tmp_path / "store")
    of = planner(tmp_path / "store", STUDY)
    ticket: Ticket = of.progress(CHAIN).tickets[2]
    expected = ticket.mask.load()
    shutil.rmtree(tmp_path / "store" / "masks")
    assert ticket.mask.load() == expected
    path = of.store.results.folder(of.progress(CHAIN).trainings[-1].key) / "weights.safetensors"
    shutil.rmtree(tmp_path / "store" / "masks")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(DamagedResultError, match=r"its mask cannot be read: it has \d+ bytes, its header says \d+"):
        ticket.mask.load()
    path.write_bytes(safetensors.torch.save({"another": torch.ones(1)}))
    with pytest.raises(DamagedResultError, match=r"its mask cannot be read: File does not contain tensor"):
        ticket.mask.load()


def test_a_damaged_result_is_no_mistake_of_the_user(tmp_path: Path, root: Path) -> None:
    import shutil

    assert not issubclass(DamagedResultError, UserError)
    shutil.copytree(root, tmp_path / "store")
    of = planner(tmp_path / "store", STUDY)
    path = of.store.results.folder(of.progress(CHAIN).trainings[-1].key) / "result.json"
    path.write_bytes(path.read_bytes()[:-1])
    tickets = Tickets(of)
    for read in (rows, overlap.of_study, list_needs):
        with pytest.raises(DamagedResultError, match=r"^result \w{12} is damaged \(result\.json does not match its"):
            read(tickets)


def test_levels_that_are_not_there_are_named(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", study(levels=2, rewind=0))
    with pytest.raises(NothingStoredError, match=r"^level 0 is not in .* for magnitude, seed 0 and 1 more; no level"):
        Tickets(of).require([0, 1], of.chains)
    training = of.progress(CHAIN).waits_for
    assert training is not None
    put(of.store, training, History(test_accuracy=0.5))
    tickets = Tickets(of)
    tickets.require([0], of.chains)
    with pytest.raises(NothingStoredError, match=r"^level 1 is not in .* for magnitude, seed 0 and 1 more; level 0 "):
        tickets.require([0, 2, 1], of.chains)
    with pytest.raises(UserError, match="the study has no level 3, it has levels 0 to 2"):
        tickets.require([3], of.chains)
    put(of.store, training_of_level_1(of), History(diverged_at=3))
    with pytest.raises(UserError, match=r"^l1, seed 0 has no level 2: it ends at level 1 \(its training div") as said:
        Tickets(of).require([2], [CHAIN])
    assert not isinstance(said.value, NothingStoredError), "no run can find it"
    assert (tickets.last_level(of.chains), Tickets(planner(tmp_path / "no", STUDY)).last_level([CHAIN])) == (0, None)


def training_of_level_1(of: Planner) -> Training:
    training = of.progress(CHAIN).waits_for
    assert training is not None
    return training


def test_chains_are_selected_by_importance() -> None:
    assert select_chains(STUDY, None) == planner_chains()
    assert select_chains(STUDY, ["l1", "l1"]) == [Chain(0, "l1"), Chain(1, "l1")]
    with pytest.raises(UserError, match="the study has no importance 'l2'"):
        select_chains(STUDY, ["l2"])
    with pytest.raises(UserError, match=r"at least 2 to compare, got l1; add another one, such as magnitude$"):
        select_chains(STUDY, ["l1"], at_least=2)
    with pytest.raises(UserError, match="got l1; add another one, such as magnitude, and run the study with it"):
        select_chains(STUDY.model_copy(update={"importances": ("l1",)}), None, at_least=2)


def planner_chains() -> list[Chain]:
    return [Chain(seed, name) for seed in STUDY.seeds for name in STUDY.importances]


# needs


def test_a_study_needs_all_that_its_run_and_its_reinitialisations_stored(root: Path) -> None:
    names = {entry.name for entry in Store(root, create=False).entries()}
    tickets = Tickets(planner(root, STUDY))
    assert list_needs(tickets) == names
    own = list_chain_needs(tickets)
    assert own < names
    assert names - own == {entry.name for entry in Store(root).entries() if entry.name in names - own}


def test_a_record_that_says_a_thousand_draws_makes_a_collection_draw_no_more(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    before = list_needs(Tickets(planner(store, STUDY)))
    notes = Store(store).results.notes("reinit")
    most = max(note["draws"] for note in notes.values())
    for key in notes:
        _change_record(Store(store).results.folder(key) / "record.json", draws=1000)
    drawn: list[int] = []
    draw = reinitialisation.new_seed
    monkeypatch.setattr(reinitialisation, "new_seed", lambda *place: drawn.append(place[1]) or draw(*place))
    tickets = Tickets(planner(store, STUDY))
    assert list_needs(tickets) >= before
    assert set(drawn) == set(range(1, most + 2))
    drawn.clear()
    assert len(reinit.of_study(tickets))
    assert set(drawn) == set(range(1, most + 2))


def test_a_draw_that_was_done_before_an_earlier_one_is_needed(root: Path, tmp_path: Path) -> None:
    """A run that was interrupted may have done the second draw first."""
    store = tmp_path / "store"
    shutil.copytree(root, store)
    tickets = Tickets(planner(store, STUDY))
    ((level, names),) = reinitialisation.list_notes(tickets)
    for seed in STUDY.seeds:
        plan = reinitialisation.plan_again(tickets, level, 2, names, seed)
        assert plan is not None
        first, second = ({t.key for c in plan.planner.chains if c.seed == draw for t in
                          plan.planner.progress(c).trainings} for draw in (1, 2))  # fmt: skip
        assert second - first
        for key in first - second:
            Store(store).results.discard(key)
        assert second <= list_needs(Tickets(planner(store, STUDY)))


@pytest.mark.parametrize("field", ["recipe", "seed", "data", "model"])
def test_draws_of_another_study_are_not_needed_though_draws_are_missing(root: Path, tmp_path: Path, field: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(root, store)
    of = planner(store, STUDY)
    results = of.store.results
    for key in results.notes("reinit"):
        _change_record(results.folder(key) / "record.json", draws=3)
    before = list_needs(Tickets(of))
    key = min(results.notes("reinit"))
    document, trained = results.document(key), results.get(key)
    assert document is not None
    assert trained is not None
    for number in range(2):
        changes = {"initial": f"{number}" * 64} | ({field: "another"} if number else {})
        identity = {**document.identity, **changes}
        results.put(name_of(identity), identity, results.read_mask(key, of.dense.shapes), trained, results.record(key))
        (added,) = set(results.notes("reinit")) - before
        needs = list_needs(Tickets(of))
        assert needs == (before if number else before | {added})
        before |= {added}


def _change_record(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text())
    record["reinit"] |= changes
    path.write_text(json.dumps(record))


def test_each_chain_is_followed_once_for_what_a_study_needs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of searches may say many paths, which all begin with the same masks."""
    of, followed, chosen = planner(root, STUDY), list[Chain](), list[str]()
    progress, choose = Planner.progress, planning.choose_layers

    def follow(self: Planner, chain: Chain, *find: Any) -> Any:
        followed.append(chain)
        return progress(self, chain, *find)

    def choose_layers(model: Any, mask: Mask, *others: Any, packed: bool) -> list[str]:
        chosen.append(mask.hash)
        return choose(model, mask, *others, packed=packed)

    monkeypatch.setattr(Planner, "progress", follow)
    monkeypatch.setattr(planning, "choose_layers", choose_layers)
    list_chain_needs(Tickets(of))
    assert len(set(followed)) == len(followed) == len(of.chains) + len(of.repeats)
    assert len(set(chosen)) == len(chosen) > 1


def test_needs_do_not_depend_on_what_was_read_before(root: Path) -> None:
    of = planner(root, STUDY)
    expected = list_needs(Tickets(planner(root, study(["l1"], levels=LEVELS))))
    for chain in of.chains:
        of.progress(chain)
    gather(of, "s", ["s"])
    assert list_needs(Tickets(planner(root, study(["l1"], levels=LEVELS)))) == expected
    assert 0 < len(expected) < len(list_needs(Tickets(of)))


def test_a_study_that_nobody_has_run_needs_the_checkpoint_of_its_first_training(tmp_path: Path) -> None:
    of = planner(tmp_path / "store", STUDY)
    waits = {training.key for chain in of.chains if (training := of.progress(chain).waits_for)}
    assert list_needs(Tickets(of)) == waits
    assert len(waits) == len(STUDY.seeds)


def test_planning_reads_and_writes_no_result(root: Path) -> None:
    before = content(root)
    list_needs(Tickets(planner(root, STUDY)))
    assert content(root) == before

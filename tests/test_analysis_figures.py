"""Stability, winners, weights, functions, connectivity, reinit: their pure functions by hand and in another way."""

from __future__ import annotations

import itertools
import math
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from torch import Tensor, nn

from processes import LONG
from tombola import Dataset, Mask, UserError, load_study
from tombola.analysis import connectivity, functions, gather, reinit, stability, weights, winners
from tombola.analysis.accuracy import Row
from tombola.analysis.values import quantile_of_sorted, value_at, value_at_density
from tombola.importance import l1, random
from tombola.study.chains import Chain
from tombola.training.weights import State, Weights


def mask(**layers: str) -> Mask:
    return Mask.from_tensors({name: torch.tensor([bit == "1" for bit in bits]) for name, bits in layers.items()})


def only(table: pl.DataFrame, **where: object) -> dict[str, Any]:
    (found,) = (each for each in table.to_dicts() if all(each[name] == value for name, value in where.items()))
    return found


# stability


def states(*rows: list[float]) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor(row)} for row in rows]


def test_stability_by_hand() -> None:
    trained = states([1.0, -1.0, 2.0, 9.0], [1.0, 1.0, -4.0, 0.0], [1.0, -3.0, 6.0, 0.0])
    (rewind,) = states([-1.0, 1.0, 1.0, 1.0])
    (initial,) = states([0.5, 0.5, 0.5, 0.5])
    table = stability.of_ticket(trained, rewind, initial, mask(w="1110"), mask(w="1000"))
    assert (
        table["measure"].to_list()
        == ["sd", "sd", "flipped", "flipped", "flips", "flips", "flips_from_start", "flips_from_start"]
        + ["movement"] * 2
    )
    sd = only(table, measure="sd", layer="w")
    assert (sd["shared"], sd["other"]) == (1, 2)
    assert sd["shared_mean"] == 0.0
    assert sd["other_mean"] == pytest.approx((np.std([-1, 1, -3], ddof=1) + np.std([2, -4, 6], ddof=1)) / 2)
    assert sd["effect"] == -1.0
    flips = only(table, measure="flips", layer="w")
    assert (flips["shared_mean"], flips["other_mean"]) == (0.0, 2.0)
    flipped = only(table, measure="flipped", layer="w")
    assert (flipped["shared_mean"], flipped["other_mean"]) == (0.0, 1.0)
    from_start = only(table, measure="flips_from_start", layer="w")
    assert (from_start["shared_mean"], from_start["other_mean"]) == (3.0, 1.5)
    assert from_start["effect"] == 1.0
    movement = only(table, measure="movement", layer="w")
    assert (movement["shared_q50"], movement["other_q50"]) == (0.5, 4.5)
    assert {**movement, "layer": "(all)"} == only(table, measure="movement", layer="(all)")


def test_a_weight_that_is_zero_has_a_sign_of_its_own() -> None:
    (start,) = states([1.0, 1.0])
    table = stability.of_ticket(states([0.0, 1.0], [0.0, 1.0]), start, start, mask(w="11"), mask(w="10"))
    assert only(table, measure="flips", layer="w")["shared_mean"] == 0
    assert only(table, measure="flips_from_start", layer="w")["shared_mean"] == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_effect_is_cliffs_delta_counted_pair_by_pair(shared: list[int], other: list[int]) -> None:
    values = [float(each) for each in shared + other]
    (start,) = states([0.0] * len(values))
    is_shared = mask(w="1" * len(shared) + "0" * len(other))
    table = stability.of_ticket(states(values), start, start, mask(w="1" * len(values)), is_shared)
    delta = np.mean([np.sign(a - b) for a, b in itertools.product(shared, other)])
    found = only(table, measure="movement", layer="w")
    assert found["effect"] == pytest.approx(delta)
    assert 0 <= found["p"] <= 1


@pytest.mark.parametrize("shared", [3, 12, 28, 39])
def test_ranks_and_quantiles_are_those_of_scipy_and_numpy(shared: int) -> None:
    weights = np.random.default_rng(0).integers(-2, 3, (5, 40)).astype(np.float32)
    (start,) = states([0.0] * 40)
    is_shared = mask(w="1" * shared + "0" * (40 - shared))
    table = stability.of_ticket(states(*weights.tolist()), start, start, mask(w="1" * 40), is_shared)
    changed = np.sign(weights[1:]) != np.sign(weights[:-1])
    values = {
        "flipped": changed.any(0),
        "flips": changed.sum(0),
        "flips_from_start": (weights != 0).sum(0),
        "movement": np.abs(weights[-1]),
    }
    for measure, each in values.items():
        groups = each[:shared].astype(float), each[shared:].astype(float)
        found, expected = only(table, measure=measure, layer="w"), scipy.stats.mannwhitneyu(*groups)
        assert found["effect"] == pytest.approx(2 * expected.statistic / (shared * (40 - shared)) - 1)
        assert found["p"] == pytest.approx(expected.pvalue, rel=1e-9)
        for name, group in zip(("shared", "other"), groups, strict=True):
            quantiles = [found[f"{name}_{q}"] for q in ("q05", "q25", "q50", "q75", "q95")]
            assert quantiles == pytest.approx(np.quantile(group, (0.05, 0.25, 0.5, 0.75, 0.95)))


def test_numbers_that_are_all_equal_and_numbers_that_are_none_say_nothing() -> None:
    size = 330_740  # of which rounding makes the variance of equal ranks less than 0
    zeros = np.zeros(size, np.int64)
    assert stability._mann_whitney(zeros[: size // 3], zeros[size // 3 :])[1] == 1
    assert math.isnan(quantile_of_sorted(np.array([1.0, 2.0, math.nan]), 0.25))


def test_stability_where_everything_or_nothing_is_shared() -> None:
    (start,) = states([1.0, 2.0])
    table = stability.of_ticket(states([1.0, 2.0]), start, start, mask(w="11"), mask(w="11"))
    assert table.schema["effect"] == table.schema["other_mean"] == pl.Float64, "else it does not stack on other tables"
    found = only(table, measure="sd", layer="w")
    assert (found["other"], found["other_mean"], found["effect"], found["p"]) == (0, None, None, None)


def test_all_layers_together_leave_out_those_that_are_kept_dense() -> None:
    state = {"w": torch.ones(2), "d": torch.ones(3)}
    alive, shared = mask(w="11", d="111"), mask(w="10", d="111")
    whole = only(stability.of_ticket([state], state, state, alive, shared, ["d"]), measure="sd", layer="(all)")
    assert (whole["shared"], whole["other"]) == (1, 1)


# winners


def results(accuracies: dict[int, list[float | None]], importance: str = "l1") -> list[Row]:
    return [
        Row(importance, seed, level, 0.8**level, accuracy, 1, 0.1, accuracy is None, ())
        for level, row in accuracies.items()
        for seed, accuracy in enumerate(row)
    ]


def test_winners_by_hand() -> None:
    table = winners.by_level(results({0: [0.90, 0.92, 0.94], 1: [0.91, 0.92, 0.93], 2: [0.89, 0.91, 0.945]}))
    level = only(table, level=2)
    assert level["dense_accuracy"] == pytest.approx(0.92)
    assert level["difference"] == pytest.approx(-0.005)
    half = 4.302653 * math.sqrt(((-0.01 + 0.005) ** 2 * 2 + 0.01**2) / 2) / math.sqrt(3)  # t for 2 degrees of freedom
    assert (level["low"], level["high"]) == (pytest.approx(-0.005 - half), pytest.approx(-0.005 + half))
    assert (level["keeps"], level["surely"]) == (True, False)


def test_the_sparsest_level_wins_even_after_one_that_fails() -> None:
    table = winners.by_level(results({0: [0.9, 0.9], 1: [0.8, 0.8], 2: [0.9, 0.9], 3: [0.7, 0.7]}))
    assert winners.select_winners(table)["level"].to_list() == [2]


def test_a_margin_is_kept_exactly() -> None:
    table = winners.by_level(results({0: [0.98], 1: [0.975], 2: [0.974]}), margin=0.005)
    assert table["keeps"].to_list() == [True, True, False]
    assert table["surely"].to_list() == [None] * 3


def test_a_level_at_which_a_training_diverged_does_not_win() -> None:
    table = winners.by_level(results({0: [0.9, 0.9], 1: [0.9, None]}))
    assert only(table, level=1)["keeps"] is False
    assert only(table, level=1)["accuracy"] is None


def test_winners_surely_have_their_whole_interval_in_the_margin() -> None:
    table = winners.by_level(results({0: [0.9, 0.9], 1: [0.897, 0.897], 2: [0.8999, 0.8899]}), margin=0.0051)
    assert winners.select_winners(table)["level"].to_list() == [2]
    assert winners.select_winners(table, surely=True)["level"].to_list() == [1]


def test_margins_beyond_reason_are_refused() -> None:
    with pytest.raises(UserError, match="margin: expected a share of the test set, in 0 to 1, got 5"):
        winners.by_level([], margin=5)


# weights


def test_weights_by_hand() -> None:
    state = {"w": torch.tensor([-2.0, 100.0, 0.0, 4.0])}
    line = only(weights.of_state(state, mask(w="1011")))
    assert (line["count"], line["min"], line["max"], line["q50"]) == (3, -2.0, 4.0, 0.0)
    assert line["q25"] == -1.0
    assert line["mean"] == pytest.approx(2 / 3)
    assert line["sd"] == pytest.approx(float(torch.tensor([-2.0, 0.0, 4.0]).std()))


def test_weights_of_a_collapsed_layer_are_null() -> None:
    line = only(weights.of_state({"w": torch.ones(2)}, mask(w="00")))
    assert line == {"layer": "w", "count": 0} | {name: None for name in line if name not in ("layer", "count")}


def test_importances_are_those_that_pruning_compares() -> None:
    state = {"w": torch.tensor([-1.0, 3.0, 5.0])}
    line = only(weights.of_importance(state, mask(w="110"), l1))
    assert (line["min"], line["max"], line["count"]) == (0.25, 0.75, 2)
    again = [only(weights.of_importance(state, mask(w="111"), random, seed=3)) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] != only(weights.of_importance(state, mask(w="111"), random, seed=4))


# functions


def test_functions_by_hand() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    outputs = {
        "a": torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]),  # predicts 0 1 0 0
        "b": torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 9.0], [0.0, 1.0]]),  # predicts 0 1 1 1
    }
    line = only(functions.of_outputs(outputs, labels))
    assert line["agreement"] == 0.5
    assert line["expected"] == pytest.approx(3 / 4 * 1 / 4 + 1 / 4 * 3 / 4)
    assert line["kappa"] == pytest.approx(cohen_kappa_score([0, 1, 0, 0], [0, 1, 1, 1]))
    assert line["accuracy"] == 0.75
    assert line["ensemble_accuracy"] == 1.0  # b is the surer of the third, a of the fourth
    assert line["low"] < 0.5 < line["high"]


def test_three_networks_agree_where_all_do() -> None:
    outputs = {
        name: torch.eye(3)[classes].double() for name, classes in zip("abc", ([0, 1], [0, 1], [0, 2]), strict=True)
    }
    table = functions.of_outputs(outputs, torch.tensor([0, 1]))
    assert table["k"].to_list() == [2, 2, 2, 3]
    assert table["agreement"].to_list() == [1.0, 0.5, 0.5, 0.5]


def test_the_ensemble_takes_the_mean_of_probabilities_not_of_outputs() -> None:
    outputs = {name: torch.tensor([[margin, 0.0]]) for name, margin in (("a", 5.0), ("b", -2.0), ("c", -2.0))}
    line = only(functions.of_outputs(outputs, torch.tensor([1])), k=3)
    assert line["ensemble_accuracy"] == 1.0  # of class 0 the probabilities are 0.99, 0.12 and 0.12


def test_wilsons_interval_solves_his_equation() -> None:
    low, high = functions.wilson(30, 100)
    for bound in (low, high):
        assert (0.3 - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / 100)


def test_outputs_of_different_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="of one shape"):
        functions.of_outputs({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}, torch.zeros(2))


def test_outputs_that_are_no_numbers_predict_no_class() -> None:
    labels = torch.tensor([0, 1, 0])
    one, other = torch.eye(2)[labels], torch.full((3, 2), math.nan)
    found = functions.of_outputs({"one": one, "other": other, "third": other}, labels)
    assert (
        found["agreement"].to_list() == found["expected"].to_list() == found["ensemble_accuracy"].to_list() == [0.0] * 4
    )
    assert found["accuracy"].to_list() == [0.5, 0.5, 0.0, pytest.approx(1 / 3)]


# connectivity


def test_the_barrier_is_the_rise_above_the_line_between_the_ends() -> None:
    errors = {0.0: 0.1, 0.25: 0.5, 0.5: 0.5, 0.75: 0.35, 1.0: 0.3}
    table = connectivity.along_line(
        {"w": torch.tensor(0.0)},
        {"w": torch.tensor(1.0)},
        lambda state: (errors[float(state["w"])], None),
        points=5,
    )
    assert table["error"].to_list() == list(errors.values())
    assert table["alpha"].to_list() == list(errors)
    assert table["barrier"].to_list() == pytest.approx([0.35] * 5)


def test_a_line_is_summed_up_by_its_ends_its_highest_point_and_its_barrier() -> None:
    where = {"level": 1, "seed": 0, "kind": "importances", "tickets": [["a", "b"]] * 3}
    table = pl.DataFrame({**where, "alpha": [0.0, 0.5, 1.0], "error": [0.1, 0.4, 0.2], "barrier": 0.25})
    assert connectivity.summarise(table).rows() == [(1, 0, "importances", ["a", "b"], 0.1, 0.2, 0.4, 0.25)]


def test_a_line_begins_with_the_end_that_no_other_thread_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, other = threading.Event(), threading.Event()

    def measure(state: State) -> tuple[float, None]:
        if state["w"] > 0:
            other.set()
        else:
            begun.set()
            assert other.wait(LONG)
        return 0.0, None

    monkeypatch.setattr(connectivity, "build_measure", lambda planner: measure)
    held = [Weights.of({"w": torch.tensor(float(number))}) for number in range(3)]
    dense, one, two = (cast("Any", SimpleNamespace(trained=SimpleNamespace(weights=each))) for each in held)
    line = connectivity.Lines(cast("Any", None), points=2)
    thread = threading.Thread(target=line, args=(dense, one))
    thread.start()
    assert begun.wait(LONG)
    assert len(line(dense, two)) == 2  # waiting for the dense network first would end neither of the two lines
    thread.join(LONG)


def test_no_barrier_where_the_error_falls_on_the_way() -> None:
    one, other = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
    table = connectivity.along_line(one, other, lambda state: (abs(float(state["w"]) - 0.5), 0.0))
    assert table["barrier"].to_list() == [0.0] * 11


def test_integers_are_those_of_the_first_state() -> None:
    one, other = ({"w": torch.tensor(0.0), "batches": torch.tensor(n)} for n in (4, 8))
    seen = []
    with pytest.raises(UserError, match="points: expected 2 or more, got 1"):
        connectivity.along_line(one, other, lambda state: (0.0, 0.0), points=1)
    connectivity.along_line(one, other, lambda state: (float(seen.append(int(state["batches"])) or 0), 0.0), points=3)
    assert seen == [4, 4, 4]


def test_lines_between_different_networks_are_refused() -> None:
    with pytest.raises(UserError, match="different networks"):
        connectivity.along_line({"w": torch.zeros(1)}, {"w": torch.zeros(2)}, lambda _: (0.0, 0.0))


def test_statistics_of_batch_norm_become_those_of_the_training_set() -> None:
    inputs = torch.randn(1200, 3, generator=torch.Generator().manual_seed(0)) * 4 + 7
    labels = torch.zeros(1200, dtype=torch.int64)
    data = Dataset("d", inputs, labels, inputs[:2], labels[:2], ("a",))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    nn.init.constant_(model[0].running_mean, 99)  # type: ignore[arg-type]
    nn.init.constant_(model[0].num_batches_tracked, 5)  # type: ignore[arg-type]
    connectivity.recompute_statistics(model, data)
    parts = inputs.chunk(3)
    assert torch.allclose(model[0].running_mean, inputs.mean(0), atol=1e-4)  # type: ignore[arg-type]
    expected = torch.stack([part.var(0) for part in parts]).mean(0)
    assert torch.allclose(model[0].running_var, expected, rtol=1e-4)  # type: ignore[arg-type]
    assert model[2].running_mean.abs().max() < 1e-2  # type: ignore[union-attr, operator] # after a norm, without dropout
    assert model[0].momentum == 0.1
    assert not any(module.training for module in model.modules())


# values


def test_a_value_at_a_density_lies_between_those_of_two_levels() -> None:
    tickets: Any = SimpleNamespace(planner=SimpleNamespace(problem=SimpleNamespace(measure=None)))
    chain = [
        SimpleNamespace(
            level=level,
            mask=SimpleNamespace(density=density),
            trained=SimpleNamespace(history=SimpleNamespace(value=lambda _, found=found: found)),
        )
        for level, (density, found) in enumerate([(1.0, 0.9), (0.5, 0.8), (0.25, 0.6), (0.0, 0.1)])
    ]
    tickets.measure = lambda _: chain
    at = {density: value_at_density(tickets, Chain(0, "l1"), density) for density in (1.0, 0.25, 0.2, 0.0)}
    assert at == {1.0: 0.9, 0.25: 0.6, 0.2: None, 0.0: None}
    assert value_at_density(tickets, Chain(0, "l1"), math.sqrt(0.125)) == pytest.approx(0.7)
    assert (value_at(tickets, Chain(0, "l1"), 3), value_at(tickets, Chain(0, "l1"), 4)) == (0.1, None)


# gather


def test_a_group_has_two_tickets_and_says_whether_some_are_missing() -> None:
    study = load_study("digits", {"importances": ["l1", "l2", "lamp"], "seeds": [0, 1], "levels": 1, "data_seeds": []})
    chains = [Chain(seed, name) for seed in study.seeds for name in study.importances]
    stored = {0: chains, 1: [Chain(0, "l1"), Chain(0, "l2"), Chain(1, "l1")]}
    tickets: Any = SimpleNamespace(
        study=study,
        planner=SimpleNamespace(chains=chains),
        at=lambda level, _: dict.fromkeys(stored[level]),
        require=lambda *_: None,
    )
    assert [level for level, _ in gather.by_level(tickets, chains, [1, 0, 1])] == [0, 1]
    found = [(group.level, group.seed, list(group.tickets), group.complete) for group in gather.groups(tickets)]
    every = ["l1", "l2", "lamp"]
    assert found == [(0, 0, every, True), (0, 1, every, True), (1, 0, ["l1", "l2"], False)]


# reinit


def test_a_draw_counts_if_all_its_chains_are_finished() -> None:
    stored = {"a": 3, "b": 3, "c": 3, "d": 1, "e": 3}
    plan = SimpleNamespace(draws=lambda: iter([["a", "b"], ["c", "d"], ["e"]]))
    tickets = SimpleNamespace(
        study=SimpleNamespace(levels=2), progress=lambda chain: SimpleNamespace(tickets=range(stored[chain]))
    )
    assert reinit.count_draws(plan, tickets) == 1  # type: ignore[arg-type]


def test_reinit_by_hand() -> None:
    kept = mask(x="11110000", y="1000")
    draws = [mask(x="11100000", y="0001"), mask(x="00110011", y="1001")]
    table = reinit.of_masks(kept, draws)
    x = only(table, layer="x")
    assert (x["connections"], x["kept"], x["draws"], x["alive"], x["survived"]) == (8, 4, 2, 3.5, 2.5)
    assert x["expected"] == pytest.approx((4 * 3 / 8 + 4 * 4 / 8) / 2)
    excess = [3 / 1.5 - 1, 2 / 2 - 1]
    assert x["excess"] == pytest.approx(np.mean(excess))
    assert x["high"] - x["excess"] == pytest.approx(12.7062 * np.std(excess, ddof=1) / math.sqrt(2), rel=1e-4)
    # by the hypergeometric distribution, 0 to 3 of 4 survive in the first draw, and 1 to 3 in the second
    assert (x["chance_low"], x["chance_high"]) == ((0 / 1.5 + 1 / 2) / 2 - 1, (3 / 1.5 + 3 / 2) / 2 - 1)
    whole = only(table, layer="(all)")
    assert whole["chance_low"] < 0 < whole["chance_high"]
    assert whole["survived"] == (3 + 3) / 2
    assert whole["expected"] == pytest.approx((1.5 + 0.25 + 2 + 0.5) / 2)


def test_reinit_of_masks_drawn_at_random_lies_within_chance() -> None:
    draw = np.random.default_rng(0)
    kept = Mask.from_tensors({"w": torch.from_numpy(draw.permutation(2000) < 300)})
    draws = [Mask.from_tensors({"w": torch.from_numpy(draw.permutation(2000) < 500)}) for _ in range(20)]
    line = only(reinit.of_masks(kept, draws), layer="w")
    assert line["low"] < 0 < line["high"]
    assert line["chance_low"] < line["excess"] < line["chance_high"]
    assert line["expected"] == 75


def test_one_draw_has_no_interval_and_an_empty_layer_no_excess() -> None:
    table = reinit.of_masks(mask(x="11", y="11"), [mask(x="10", y="00"), mask(x="10", y="11")])
    assert only(table, layer="y")["excess"] is None, "in one of the draws, nothing is expected"
    table = reinit.of_masks(mask(x="10", y="00"), [mask(x="11", y="11")])
    x, y = only(table, layer="x"), only(table, layer="y")
    assert (x["excess"], x["low"], x["high"], x["chance_low"], x["chance_high"]) == (0, None, None, 0, 0)
    assert (y["expected"], y["excess"]) == (0, None)

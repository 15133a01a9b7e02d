"""Overlap of masks: by hand, by construction, and by counting in another way."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from tombola import Mask, UserError
from tombola.analysis import overlap


def mask(**layers: str) -> Mask:
    return Mask.from_tensors({name: torch.tensor([bit == "1" for bit in bits]) for name, bits in layers.items()})


def random_masks(seed: int, count: int = 4, sizes: tuple[int, ...] = (70, 13, 200)) -> dict[str, Mask]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"m{i}": Mask.from_tensors(
            {f"l{j}": torch.rand(size, generator=draw) < torch.rand(1, generator=draw) for j, size in enumerate(sizes)}
        )
        for i in range(count)
    }


def row(table: pl.DataFrame, layer: str, *tickets: str) -> dict[str, Any]:
    (found,) = (each for each in table.to_dicts() if each["layer"] == layer and each["tickets"] == [*tickets])
    return found


def test_two_masks_by_hand() -> None:
    table = overlap.of_masks({"a": mask(x="11100000", y="1100"), "b": mask(x="01110000", y="0001")})
    assert table["tickets"].to_list() == [["a", "b"]] * 3
    x = row(table, "x", "a", "b")
    assert (x["connections"], x["alive"], x["shared"], x["shared_of_all"]) == (8, 3, 2, 0.25)
    assert x["shared_of_ticket"] == pytest.approx(2 / 3)
    assert x["jaccard"] == 0.5
    assert x["kappa"] == pytest.approx((0.75 - 34 / 64) / (1 - 34 / 64))
    assert x["layers_expected"] == pytest.approx(9 / 8)
    assert x["layers_jaccard"] == pytest.approx((9 / 8) / (6 - 9 / 8))
    assert x["global_expected"] == pytest.approx(8 * 5 / 12 * 4 / 12)
    y = row(table, "y", "a", "b")
    assert (y["alive"], y["shared"], y["jaccard"]) == (1.5, 0, 0.0)
    whole = row(table, "(all)", "a", "b")
    assert (whole["connections"], whole["alive"], whole["shared"], whole["jaccard"]) == (12, 4.5, 2, 2 / 7)
    assert whole["layers_expected"] == pytest.approx(9 / 8 + 2 / 4)
    assert whole["global_expected"] == pytest.approx(20 / 12)


def test_the_papers_random_tickets_share_a_ninth_of_a_per_cent() -> None:
    size, alive = 100_000, 3520
    drawn = [np.random.default_rng(i).permutation(size) < alive for i in range(3)]
    masks = {str(i): Mask.from_tensors({"w": torch.from_numpy(each)}) for i, each in enumerate(drawn)}
    whole = row(overlap.of_masks(masks), "(all)", "0", "1", "2")
    assert whole["global_expected"] / whole["alive"] == pytest.approx(0.0352**2)  # 0.12 % of a ticket, as PAPER.md says
    assert whole["global_low"] <= whole["shared"] <= whole["global_high"]


def test_equal_masks_share_everything_and_disjoint_ones_nothing() -> None:
    one, other = mask(x="1111000011110000"), mask(x="0000111100001111")
    equal = row(overlap.of_masks({"a": one, "b": one}), "(all)", "a", "b")
    assert (equal["shared_of_ticket"], equal["jaccard"], equal["kappa"]) == (1.0, 1.0, 1.0)
    disjoint = row(overlap.of_masks({"a": one, "b": other}), "(all)", "a", "b")
    assert (disjoint["shared"], disjoint["jaccard"], disjoint["kappa"]) == (0, 0.0, -1.0)


def test_intervals_of_two_masks_are_exact() -> None:
    half = mask(x="11110000")  # P(0) = P(4) = 1 / 70; the binomial's interval is 0 to 3
    table = overlap.of_masks({"a": half, "b": half})
    for layer in ("x", "(all)"):
        found = row(table, layer, "a", "b")
        chance = "layers" if layer == "x" else "global"
        assert (found[f"{chance}_low"], found[f"{chance}_high"]) == (1, 3)


def test_a_summary_has_the_least_and_the_greatest_share() -> None:
    table = overlap.of_masks({"a": mask(x="1100"), "b": mask(x="1100"), "c": mask(x="0110")}).filter(k=2, layer="x")
    assert overlap.summarise(table, "layer").select("lowest", "highest", "comparisons").row(0) == (0.5, 1.0, 3)


def test_a_layer_that_is_kept_dense_is_whole_by_chance_too() -> None:
    half = mask(x="11110000", y="11")
    table = overlap.of_masks({"a": half, "b": half}, kept_dense=["y"])
    expected = {"x": (2, 2 / 6), "y": (2, 1.0), "(all)": (4, 4 / 8), "(prunable)": (2, 2 / 6)}
    for layer, (shared, jaccard) in expected.items():
        found = row(table, layer, "a", "b")
        assert (found["global_expected"], found["global_jaccard"]) == pytest.approx((shared, jaccard)), layer


def test_what_is_not_defined_is_null() -> None:
    empty = row(overlap.of_masks({"a": mask(x="000"), "b": mask(x="000")}), "x", "a", "b")
    assert (empty["shared_of_ticket"], empty["jaccard"], empty["kappa"], empty["layers_jaccard"]) == (None,) * 4
    dense = row(overlap.of_masks({"a": mask(x="111"), "b": mask(x="111")}), "x", "a", "b")
    assert (dense["kappa"], dense["jaccard"]) == (None, 1.0)
    assert (dense["layers_low"], dense["layers_high"], dense["global_low"], dense["global_high"]) == (3, 3, 3, 3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_figures_in_another_way(seed: int, count: int) -> None:
    masks = random_masks(seed, count)
    table = overlap.of_masks(masks)
    names = list(masks)
    assert len(table) == (len(list(combinations(names, 2))) + (count > 2)) * 4
    for layer in ("l0", "l1", "l2", "(all)"):
        tensors = {
            name: torch.cat([*each.values()]) if layer == "(all)" else each[layer] for name, each in masks.items()
        }
        for group in [*combinations(names, 2), tuple(names)]:
            found = row(table, layer, *group)
            stacked = torch.stack([tensors[name] for name in group])
            shared, union = int(stacked.all(0).sum()), int(stacked.any(0).sum())
            assert found["k"] == len(group)
            assert found["shared"] == shared
            assert found["shared_of_all"] == shared / stacked.shape[1]
            assert found["alive"] == pytest.approx(float(stacked.sum()) / len(group))
            assert found["jaccard"] == (pytest.approx(shared / union) if union else None)
            if len(group) == 2 and found["kappa"] is not None:
                assert found["kappa"] == pytest.approx(cohen_kappa_score(*stacked.int().numpy()), abs=1e-9)
            assert found["layers_low"] - 1 <= found["layers_expected"] <= found["layers_high"] + 1


def test_kappa_of_three_is_congers() -> None:
    masks = random_masks(3, 3)
    tensors = [torch.cat([*each.values()]).numpy() for each in masks.values()]
    pairs = list(combinations(tensors, 2))
    agree = np.mean([(a == b).mean() for a, b in pairs])
    by_chance = np.mean([a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()) for a, b in pairs])
    found = row(overlap.of_masks(masks), "(all)", *masks)
    assert found["kappa"] == pytest.approx((agree - by_chance) / (1 - by_chance))


def test_of_an_incomplete_group_only_pairs_are_compared() -> None:
    masks = {name: Mask.from_tensors({"w": torch.rand(9) < 0.5}) for name in "abc"}
    assert set(overlap._compare(masks, (), together=False)["k"]) == {2}
    assert set(overlap.of_masks(masks)["k"]) == {2, 3}


def test_blocks_and_bytes_that_are_not_full_are_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = random_masks(5, 3, (1, 63, 64, 65, 1000))
    whole = overlap.of_masks(masks)
    monkeypatch.setattr(overlap, "_BLOCK", 2)
    assert overlap.of_masks(masks).equals(whole)


def test_intervals_hold_random_masks_with_the_same_layer_densities() -> None:
    sizes, alive = {"x": 300, "y": 100}, {"x": 90, "y": 60}
    random = np.random.default_rng(1)

    def draw() -> Mask:
        return Mask.from_tensors({n: torch.from_numpy(random.permutation(s) < alive[n]) for n, s in sizes.items()})

    inside = []
    for _ in range(150):
        table = overlap.of_masks({name: draw() for name in "abc"})
        inside.append(table.select(pl.col("shared").is_between("layers_low", "layers_high")).to_series())
    shares = np.mean([each.to_numpy() for each in inside], axis=0)
    assert (shares > 0.9).all()
    assert shares.mean() < 0.99


def test_intervals_hold_random_masks_with_the_same_global_density() -> None:
    random = np.random.default_rng(2)

    def draw() -> Mask:
        bits = torch.from_numpy(random.permutation(400) < 120)
        return Mask.from_tensors({"x": bits[:300], "y": bits[300:]})

    inside = []
    for _ in range(150):
        table = overlap.of_masks({name: draw() for name in "abc"})
        inside.append(table.select(pl.col("shared").is_between("global_low", "global_high")).to_series().to_numpy())
    shares = np.mean(inside, axis=0)
    assert (shares > 0.9).all()
    assert shares.mean() < 0.99


def test_masks_of_different_networks_are_refused() -> None:
    with pytest.raises(UserError, match="different networks cannot be combined: they differ in y"):
        overlap.of_masks({"a": mask(x="1"), "b": mask(x="1", y="1")})
    with pytest.raises(UserError, match="at least two masks"):
        overlap.of_masks({"a": mask(x="1")})

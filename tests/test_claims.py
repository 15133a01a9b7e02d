"""The verdicts on the paper's claims: on cases worked by hand, and on a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tombola.analysis import claims, evidence
from tombola.analysis.accuracy import Row
from tombola.analysis.ends import Ends
from tombola.analysis.evidence import Evidence
from tombola.analysis.verdict import Claim, conclude, count_seeds

THREE = ("magnitude", "l1", "l2")
FIVE = (*THREE, "softmax", "min_max")
DENSE = {"conv1.weight": (4, 3, 3, 3), "a.weight": (8, 4, 3, 3), "s.weight": (8, 4, 1, 1), "fc.weight": (2, 8)}
DEEP = {
    "conv1.weight": (4, 3, 3, 3),
    **{f"b{number}.weight": (4, 4, 3, 3) for number in range(4)},
    "s.weight": (8, 4, 1, 1),
    "fc.weight": (2, 8),
}


def row(importance: str, seed: int, level: int, accuracy: float, collapsed: Sequence[str] = ()) -> Row:
    return Row(importance, seed, level, 0.5**level, accuracy, 1, 0.1, False, tuple(collapsed))


def results(accuracy: Callable[[str, int, int], float], importances: Sequence[str] = THREE) -> tuple[Row, ...]:
    return tuple(
        row(name, seed, level, accuracy(name, seed, level))
        for name in importances
        for seed in (0, 1, 2)
        for level in range(4)
    )


def layers(alive: Callable[[str, str, int, int], int], importances: Sequence[str] = THREE) -> pl.DataFrame:
    """Make a table of layers of 100 connections, with this number alive: of (importance, layer, level, seed)."""
    lines = []
    for name in importances:
        for seed in (0, 1, 2):
            for level in range(4):
                counts = {layer: alive(name, layer, level, seed) for layer in DEEP}
                density = sum(counts.values()) / (100 * len(counts))
                lines += [
                    {"level": level, "importance": name, "seed": seed, "layer": layer, "connections": 100}
                    | {"alive": count, "ahead": density - count / 100}
                    for layer, count in counts.items()
                ]
    return pl.DataFrame(lines)


def overlap(two: Sequence[float], noise: Sequence[float], layer: str = "(all)") -> pl.DataFrame:
    """Make a table of overlap: of all three and of each two importances by seed, and of two data orders."""
    lines = [
        {"seed": seed, "kind": kind, "k": k, "layer": layer, "alive": 10.0, "layers_expected": 0.5}
        | {"shared_of_ticket": value}
        for values, kind, k in ((two, "importances", 2), (two, "importances", 3), (noise, "data order", 2))
        for seed, value in enumerate(values)
    ]
    return pl.DataFrame(lines)


def stability(effects: Sequence[float | None], measure: str = "sd", layer: str = "(all)") -> pl.DataFrame:
    lines = [{"seed": seed, "measure": measure, "layer": layer, "effect": value} for seed, value in enumerate(effects)]
    return pl.DataFrame(lines, {"seed": pl.Int64, "measure": pl.String, "layer": pl.String, "effect": pl.Float64})


EVIDENCE = Evidence(
    compared=THREE,
    importances=THREE,
    level=3,
    results=results(lambda *_: 0.9),
    order_results=results(lambda *_: 0.9),
    shapes=DEEP,
    kept_dense=frozenset(),
    guess=0.1,
    layers=layers(lambda *_: 50),
    overlap=overlap([0.1, 0.1, 0.1], [0.5, 0.5, 0.5]),
    stability=stability([-0.5, -0.4, -0.6]),
)


def test_the_ends_of_a_tied_network_are_one_layer_and_what_is_not_known_is_said() -> None:
    tied = replace(EVIDENCE, ends=Ends(("b0.weight",), ("b0.weight",)))
    assert (tied.groups["input layer"], tied.groups["output layer"]) == (["b0.weight"], ["b0.weight"])
    assert tied.groups["other layers"] == ["conv1.weight", "b1.weight", "b2.weight", "b3.weight", "fc.weight"]
    assert tied.prunable == list(DEEP)
    assert "by order" not in tied.describe()
    assert "first and its last layer by order" in replace(EVIDENCE, ends=Ends.by_order(DEEP)).describe()
    uncounted = judge(claims.special_layers, ends=Ends(("wte.weight",), ()), shapes={"a": (2, 2), "b": (2, 2)})
    assert uncounted.verdict == "not testable"
    embedded = Ends(("wte.weight",), ("fc.weight",))
    assert "does not count the input layer (wte.weight)" in replace(EVIDENCE, ends=embedded).describe()
    assert "does not count" not in tied.describe()
    assert judge(claims.move_further, ends=embedded).reason == "the input layer is not counted"


def judge(claim: Callable[[Evidence], Claim], **changes: object) -> Claim:
    return claim(replace(EVIDENCE, **changes))  # type: ignore[arg-type]


def test_what_is_needed_can_be_run() -> None:
    """A seed must differ from the data orders, and layers that are kept dense bound the sparsity."""
    assert replace(EVIDENCE, data_seeds=(3, 100)).more_seeds == "seeds 0 1 2 4"
    assert EVIDENCE.more_levels(0.988) == "levels 7"
    large = dict.fromkeys(DEEP, (100, 100)) | {"fc.weight": (10, 10)}
    for shape, needs in (((5, 10), "levels 7"), ((50, 10), "")):  # 0.1 % and 1 % of the connections
        shapes = large | {"fc.weight": shape}
        assert replace(EVIDENCE, shapes=shapes, kept_dense=frozenset({"fc.weight"})).more_levels(0.988) == needs
    still = tuple(replace(each, density=0.5) for each in EVIDENCE.results)
    assert replace(EVIDENCE, results=still).more_levels(0.988) == "", "no round has removed anything"


def test_an_open_interval_of_claim_6_asks_for_what_a_seed_lacks() -> None:
    lines = [{"seed": seed, "layer": "conv1.weight", "excess": 0.1 - seed, "level": 2, "draws": 3} for seed in (0, 1)]
    assert judge(claims.found_again, reinit=pl.DataFrame(lines)).needs == "reinit 2"
    lines.append({"seed": 2, "layer": "conv1.weight", "excess": 0.3, "level": 2, "draws": 3})
    assert judge(claims.found_again, reinit=pl.DataFrame(lines)).needs == "seeds 0 1 2 3"


def test_a_verdict_follows_from_the_parts_and_says_what_is_open() -> None:
    shown, hidden = "a (95 % 1 to 2)", "b"
    assert conclude("seeds 2", {shown: True, hidden: True}) == ("holds", f"{shown}, {hidden}", "")
    some = conclude("seeds 2", {shown: True, "b (95 % 0 to 1)": None}, "points")
    assert some == ("holds in part", f"points: {shown}, b (95 % 0 to 1); some intervals contain both answers", "")
    assert conclude("seeds 2", {hidden: None}) == ("not testable", "b; one seed gives no interval", "seeds 2")
    assert conclude("seeds 2", {shown: False, hidden: None})[0] == "not testable"
    assert count_seeds([True, False], "text") == ("holds in part", "text; in 1 of 2 seeds")
    assert count_seeds([True], "text") == ("holds", "text; in 1 of 1 seed")
    assert count_seeds([False, False], "text")[0] == "does not hold"


def test_a_claim_keeps_what_is_needed_only_if_it_is_not_testable() -> None:
    claim = Claim("1a", "statement", "paper").add_measure("points", [0.9, 0.9, 1.0], within=(0.0, 1.0))
    assert (claim.seeds, claim.high, round(claim.low or 0, 3)) == (3, 1.0, 0.79)
    assert claim.decide("holds", "reason", "seeds 3").needs == ""
    assert claim.decide("not testable", "reason", "seeds 3").needs == "seeds 3"


def test_the_last_level_is_that_of_the_shortest_chain_that_has_not_diverged() -> None:
    short = tuple(each for each in EVIDENCE.results if (each.importance, each.seed, each.level) != ("l1", 2, 3))
    assert replace(EVIDENCE, results=short).last_level("l1") == 2
    assert evidence.distance(EVIDENCE.results, 3, 0.875) == 0
    diverged = {"a": [None] * 4, "b": [None, None, 7]}  # at which iteration, if it did
    chains: dict[str, Any] = {
        name: [SimpleNamespace(trained=SimpleNamespace(history=SimpleNamespace(diverged_at=at))) for at in levels]
        for name, levels in diverged.items()
    }
    tickets: Any = SimpleNamespace(last_level=lambda _: 2, progress=lambda name: SimpleNamespace(tickets=chains[name]))
    assert evidence._last_sound_level(tickets, list(chains)) == 1  # type: ignore[arg-type]


def test_the_tables_of_other_importances_are_left_out() -> None:
    lines = [("importances", "l1"), ("data order", "l1"), ("data order", "taylor")]
    table = pl.DataFrame({"kind": [kind for kind, _ in lines], "tickets": [[name, f"{name}@1"] for _, name in lines]})
    assert evidence._drop_other_floors(table, THREE).rows() == table[:2].rows()
    rows = [(["l1", "magnitude", "l2"], 2, 3), ([*THREE], 3, 3), ([*THREE], 4, 0), (["l1", "l2"], 5, 3)]
    stored = pl.DataFrame(rows, {"compared": pl.List(pl.String), "level": pl.Int64, "draws": pl.Int64}, orient="row")
    assert evidence._select_reinit(stored, THREE).rows() == stored[1:2].rows()  # type: ignore[union-attr]
    assert evidence._select_reinit(stored, ["l1", "taylor"]) is None


# 1.


def test_alike_is_measured_against_two_data_orders() -> None:
    equal = judge(claims.perform_alike)
    assert (equal.verdict, equal.value, equal.noise) == ("holds", 0.0, 0.0)

    def apart(name: str, seed: int, level: int) -> float:
        return 0.9 - (0.02 + 0.001 * seed if name == "l2" and level > 0 else 0)

    same_order = judge(claims.perform_alike, results=results(apart), order_results=results(apart))
    assert same_order.verdict == "does not hold"
    assert same_order.value == pytest.approx((2 * (2.0 + 2.1 + 2.2) / 3) / 3)  # two of the three pairs
    orders = results(lambda name, seed, level: apart(name, seed, level) - 0.02)
    noisy = judge(claims.perform_alike, results=results(apart), order_results=orders)
    assert (noisy.verdict, round(noisy.noise or 0, 6)) == ("holds", 2.0)
    assert noisy.reason.startswith(
        "over levels 1 to 3, the difference of two importances exceeds that of two data orders by"
    )


def test_alike_needs_a_data_order_of_what_is_compared_and_no_divergence() -> None:
    for orders in ((), results(lambda *_: 0.9, ["softmax"])):
        alone = judge(claims.perform_alike, order_results=orders)
        assert alone.verdict == "not testable"
        assert alone.reason == "there is no second data order of magnitude, l1, l2, which gives the noise floor"
    diverged = tuple(replace(each, value=None) if each.importance == "l1" else each for each in EVIDENCE.results)
    assert judge(claims.perform_alike, results=diverged).reason == "a training at these levels diverged"
    five = results(lambda *_: 0.9, FIVE)
    for orders in (results(lambda *_: 0.9, ["softmax"]), tuple(each for each in EVIDENCE.results if each.seed == 0)):
        assert judge(claims.perform_alike, results=five, order_results=orders).needs == "data_seeds_for magnitude"
    judged = tuple(replace(each, measure=replace(each.measure, name="r2", label="R2")) for each in EVIDENCE.results)
    for claim in (claims.perform_alike, claims.fall_behind):
        assert judge(claim, results=judged).reason.endswith("of accuracy, and these tickets are judged by R2")


def test_alike_on_the_whole_and_not_at_the_compared_level_is_not_alike() -> None:
    late = results(lambda name, seed, level: 0.9 - (0.06 + 0.001 * seed if name == "l1" and level == 3 else 0))
    found = judge(claims.perform_alike, results=late, order_results=late)
    assert found.verdict == "does not hold"
    before = judge(claims.perform_alike, results=late, order_results=late, level=2)
    assert (before.verdict, before.value) == ("holds", 0.0)
    for level, points, verdict in ((3, 1.5, "does not hold"), (1, 3.0, "not testable"), (3, 1.05, "does not hold")):
        # two of the three pairs differ: at this level by two thirds of the points, over three levels by two ninths
        once = results(lambda name, _, at, a=level, p=points: 0.9 - p / 100 * ((name, at) == ("l1", a)))
        assert judge(claims.perform_alike, results=once, order_results=once).verdict == verdict
    only_dense = results(lambda name, seed, level: 0.9 - (0.3 if name == "l1" and level == 0 else 0))
    assert judge(claims.perform_alike, results=only_dense, order_results=only_dense).value == 0


@pytest.mark.parametrize("convolutional", [True, False])
def test_softmax_and_min_max_fall_behind_on_convolutional_networks_only(convolutional: bool) -> None:
    shapes = DEEP if convolutional else {"fc1.weight": (9, 9), "fc.weight": (2, 9)}

    def found(softmax: float | None, min_max: float, levels: int = 8) -> Claim:
        loss = {"softmax": softmax, "min_max": min_max}
        accuracy = tuple(
            row(name, seed, level, 0.9 - (loss.get(name, 0) or 0) * (level == 8))
            for name in FIVE
            for seed in (0, 1, 2)
            for level in range(levels + 1)
        )
        if softmax is None:
            accuracy = tuple(
                replace(each, value=None) if (each.importance, each.level) == ("softmax", 8) else each
                for each in accuracy
            )
        return judge(claims.fall_behind, importances=FIVE, results=accuracy, shapes=shapes)

    assert found(0.1, 0.2).verdict == ("holds" if convolutional else "does not hold")
    assert found(0.0, 0.2).verdict == "holds in part"
    assert found(0.0, 0.0).verdict == ("does not hold" if convolutional else "holds")
    assert found(0.1, 0.2).value == pytest.approx(-15)
    assert found(None, 0.2).value == pytest.approx((-80 - 20) / 2), "a training that diverged is a random guess"
    assert found(0.1, 0.2, levels=5).reason == "all of them have levels up to a sparsity of 96.88 % only"
    assert judge(claims.fall_behind).needs == "importances magnitude l1 l2 softmax min_max"


def test_falling_behind_is_judged_at_a_level_that_all_have_and_above_a_guess() -> None:
    accuracy = tuple(
        row(name, seed, level, 0.9 if name in THREE else 0.7)
        for name in FIVE
        for seed in (0, 1, 2)
        for level in range(8 if name == "min_max" else 9)
    )
    found = judge(claims.fall_behind, importances=FIVE, results=accuracy)
    assert (found.verdict, found.seeds, "at a sparsity of 99.22 %" in found.reason) == ("holds", 3, True)
    near = tuple(replace(each, value=0.15) for each in accuracy)
    reason = "the other tickets are near a random guess at this sparsity, too"
    assert judge(claims.fall_behind, importances=FIVE, results=near).reason == reason


# 2.


def collapsing(*names: str, deepest: int = 7, importances: Sequence[str] = (*THREE, "softmax")) -> tuple[Row, ...]:
    return tuple(
        row(name, seed, each, 0.9, ["a.weight"] if name in names and each >= 2 else [])
        for name in importances
        for seed in (0, 1)
        for each in range(deepest + 1)
    )


def test_who_collapses() -> None:
    as_claimed = judge(claims.collapse, results=collapsing("magnitude", "softmax"))
    assert (as_claimed.verdict, as_claimed.value) == ("holds", 1.0)
    assert "magnitude: in 2 of 2 seeds, first at level 2; l1: no layer lost" in as_claimed.reason
    assert judge(claims.collapse, results=collapsing("magnitude", "l1", "softmax")).verdict == "holds in part"
    assert judge(claims.collapse, results=collapsing("softmax")).verdict == "holds in part"
    assert judge(claims.collapse, results=collapsing("l1", "l2")).verdict == "does not hold"
    for name, verdict in (("magnitude", "holds in part"), ("softmax", "holds")):  # in one of two seeds
        once = tuple(
            replace(each, collapsed=()) if (each.importance, each.seed) == (name, 1) else each
            for each in collapsing("magnitude", "softmax")
        )
        assert judge(claims.collapse, results=once).verdict == verdict, name
    assert judge(claims.collapse, results=collapsing("softmax", deepest=4)).needs == "levels 7"  # 1 - 0.5^7 > 98.8 %
    short = tuple(each for each in collapsing("softmax") if each.importance != "magnitude" or each.level < 3)
    assert judge(claims.collapse, results=short).reason.startswith("magnitude ends at a sparsity of 75.00 %")
    uneven = tuple(each for each in collapsing("softmax") if (each.importance, each.seed) != ("magnitude", 1))
    uneven += tuple(row("magnitude", 1, level, 0.9) for level in range(5))
    assert judge(claims.collapse, results=uneven).reason.startswith("magnitude ends at a sparsity of 93.75 %")
    assert judge(claims.collapse, results=collapsing(importances=("l1", "l2"))).verdict == "not testable"
    perceptron = judge(claims.collapse, results=collapsing("magnitude", "softmax"), shapes={"fc.weight": (2, 2)})
    assert perceptron.verdict == "not testable"
    assert "the paper says this of convolutional networks" in perceptron.reason


def test_without_shortcuts_a_collapse_is_missing_where_the_papers_vgg_has_collapsed() -> None:
    plain = {name: shape for name, shape in DEEP.items() if name != "s.weight"}
    before = judge(claims.collapse, results=collapsing(deepest=9), shapes=plain)
    assert before.verdict == "not testable"
    assert before.reason.startswith("magnitude ends at a sparsity of 99.80 %, and at least 99.87 % are needed; magn")
    assert judge(claims.collapse, results=collapsing(deepest=10), shapes=plain).verdict == "holds in part"
    assert judge(claims.collapse, results=collapsing("magnitude", "softmax"), shapes=plain).verdict == "holds"


# 3.


def test_layers_that_are_pruned_less() -> None:
    def alive(_: str, layer: str, level: int, seed: int) -> int:
        return {"conv1.weight": 80, "s.weight": 60 + seed, "fc.weight": 20}.get(layer, 40) if level == 3 else 100

    found = judge(claims.special_layers, layers=layers(alive))
    assert (found.verdict, found.value, found.low) == ("holds in part", 2.0, 2.0)
    assert "output layer 0.50 (95 % 0.50 to 0.50)" in found.reason
    others = layers(lambda name, *where: alive(name, *where) if name in THREE else 1, FIVE)
    assert judge(claims.special_layers, layers=others, importances=FIVE).value == 2.0
    kept = judge(claims.special_layers, layers=layers(alive), kept_dense=frozenset(["fc.weight"]))
    assert kept.verdict == "holds"
    assert "output layer" not in kept.reason
    assert judge(claims.special_layers, shapes={"a.weight": (2, 2), "b.weight": (2, 2)}).verdict == "not testable"
    of_sequences = {"conv1.weight": (4, 3, 3), "a.weight": (8, 4, 3), "s.weight": (8, 4, 1), "fc.weight": (2, 8)}
    assert replace(EVIDENCE, shapes=of_sequences).groups["1x1 shortcuts"] == ["s.weight"]


def test_deeper_layers() -> None:
    depth = {layer: number for number, layer in enumerate(DEEP)}
    sparser = judge(claims.deeper_layers, layers=layers(lambda _, layer, *__: 90 - 10 * depth[layer]))
    assert (sparser.verdict, sparser.value) == ("holds", -1.0)
    denser = judge(claims.deeper_layers, layers=layers(lambda _, layer, *__: 10 + 10 * depth[layer]))
    assert (denser.verdict, denser.value) == ("does not hold", 1.0)
    assert judge(claims.deeper_layers).value == 0.0, "all layers are equally dense"
    few = judge(claims.deeper_layers, shapes=DENSE)
    assert few.reason == "the network has 1 layer between input and output, 4 are needed"


def test_spikes_and_who_follows() -> None:
    def alive(name: str, layer: str, level: int, _: int) -> int:
        if name == "softmax":  # half of the layers in each round
            early = layer in ("conv1.weight", "b0.weight", "b1.weight")
            return (100, 50 if early else 100, 50, 25 if early else 50)[level]
        return (100, 80, 64, 51)[level] + (0 if name == "min_max" else 9 * (layer == "b0.weight") * (level > 0))

    table, accuracy = layers(alive, FIVE), results(lambda *_: 0.9, FIVE)
    five = {"importances": FIVE, "results": accuracy}
    assert judge(claims.spikes, layers=table, **five).verdict == "holds"
    follows = judge(claims.follows, layers=table, **five)
    assert (follows.verdict, follows.value) == ("holds", 0.0)
    swapped = table.with_columns(pl.col("importance").replace({"softmax": "min_max", "min_max": "softmax"}))
    assert judge(claims.spikes, layers=swapped, **five).verdict == "does not hold"
    worse = judge(claims.follows, layers=swapped, **five)
    assert (worse.verdict, "levels 1 to 3" in worse.reason) == ("does not hold", True)
    from_1 = swapped.filter(pl.col("level") > 0, importance="min_max", seed=0)
    assert worse.value == pytest.approx(100 * float(from_1["ahead"].abs().mean()))  # type: ignore[arg-type]
    short = tuple(each for each in accuracy if each.importance != "l1" or each.level < 2)
    cut = judge(claims.follows, layers=swapped, importances=FIVE, results=short)
    assert "levels 1 to 1" in cut.reason, "levels that all importances have"
    assert judge(claims.spikes).verdict == judge(claims.follows).verdict == "not testable"


def test_spikes_count_the_round_in_which_a_layer_loses_its_last_connection() -> None:
    table = layers(lambda *where: (100, 50, 20, 0)[where[2]])
    for last, shares in ((2, [0.5, 0.6]), (3, [0.5, 0.6, 1.0])):
        found = claims._unevenness(replace(EVIDENCE, layers=table), "l1", 0, last)
        assert found == pytest.approx(statistics.stdev(shares))


@pytest.mark.parametrize(("own", "verdict"), [(1.4, "does not hold"), (1.6, "holds")])
def test_spikes_are_half_as_much_again_as_those_of_every_other(
    own: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"softmax": own, "l1": 1.0, "magnitude": 0.5}
    monkeypatch.setattr(claims, "_unevenness", lambda _, name, *__: found[name])
    assert judge(claims.spikes, importances=tuple(found), results=results(lambda *_: 0.9, [*found])).verdict == verdict


# 4.


def test_overlap_is_measured_against_chance_and_against_two_data_orders() -> None:
    few = judge(claims.overlap_little)
    assert (few.verdict, few.value, few.chance, few.noise) == ("holds", 10.0, 5.0, None)
    assert judge(claims.overlap_little, overlap=overlap([0.6, 0.61, 0.62], [])).verdict == "does not hold"
    assert judge(claims.overlap_little, overlap=overlap([0.3, 0.8], [])).verdict == "not testable"
    beyond = judge(claims.distinct_beyond_noise)
    assert (beyond.verdict, beyond.value, beyond.noise, beyond.chance) == ("holds", 40.0, 50.0, 5.0)
    same = judge(claims.distinct_beyond_noise, overlap=overlap([0.62, 0.61, 0.63], [0.61, 0.61, 0.61]))
    assert same.verdict == "not testable"
    assert same.reason.endswith("the interval contains both answers")
    more = judge(claims.distinct_beyond_noise, overlap=overlap([0.7, 0.71, 0.72], [0.6, 0.61, 0.62]))
    assert more.verdict == "does not hold"
    assert judge(claims.distinct_beyond_noise, overlap=overlap([0.1, 0.2], [])).needs == "data_seeds_for magnitude"


def test_what_is_kept_dense_does_not_count_as_shared() -> None:
    kept = frozenset(["fc.weight"])
    table = pl.concat([overlap([0.9] * 3, [0.9] * 3), overlap([0.2] * 3, [0.6] * 3, "(prunable)")])
    assert judge(claims.overlap_little, overlap=table, kept_dense=kept).value == pytest.approx(20)
    assert judge(claims.distinct_beyond_noise, overlap=table, kept_dense=kept).value == pytest.approx(40)
    assert judge(claims.overlap_little, overlap=table).value == pytest.approx(90)


def test_ends_share_more() -> None:
    first = overlap([0.5, 0.6, 0.7], [], "conv1.weight").with_columns(layers_expected=pl.lit(2.0))
    parts = [overlap([0.1] * 3, []), first, overlap([0.05] * 3, [], "fc.weight")]
    two = pl.col("k") == 2  # what only two tickets share does not count
    table = pl.concat(parts).with_columns(shared_of_ticket=pl.when(two).then(0.9).otherwise("shared_of_ticket"))
    found = judge(claims.ends_share_more, overlap=table)
    assert (found.verdict, found.value) == ("holds in part", pytest.approx(100 * ((0.6 - 0.2) - (0.1 - 0.05))))


# 5.


def test_effects_on_shared_connections() -> None:
    assert judge(claims.vary_less).verdict == "holds"
    assert judge(claims.vary_less, stability=stability([0.5, 0.4, 0.6])).verdict == "does not hold"
    assert judge(claims.vary_less, stability=stability([-0.5, 0.4, 0.6])).needs == "seeds 0 1 2 3"
    assert judge(claims.vary_less, stability=stability([0.0, 0.0])).verdict == "does not hold"
    assert judge(claims.vary_less, stability=stability([None])).verdict == "not testable"
    assert judge(claims.vary_less, stability=stability([-0.5, math.nan, -0.6])).seeds == 2
    assert judge(claims.flip_less, stability=stability([-0.5, -0.5], "flipped")).verdict == "holds"
    further = stability([0.5, 0.4, 0.6], "movement", "conv1.weight")
    assert judge(claims.move_further, stability=further).verdict == "holds"
    assert judge(claims.move_further, stability=further.with_columns(-pl.col("effect"))).verdict == "does not hold"


# 6.


def test_connections_found_again() -> None:
    missing = judge(claims.found_again)
    assert (missing.verdict, missing.reason.count("exactly these importances (magnitude, l1, l2)")) == (
        "not testable",
        1,
    )

    def table(**excess: float) -> pl.DataFrame:
        lines = [
            {"level": 3, "draws": 3, "seed": seed, "layer": f"{layer}.weight", "excess": value + 0.01 * seed}
            for layer, value in excess.items()
            for seed in (0, 1, 2)
        ]
        return pl.DataFrame(lines)

    found = judge(claims.found_again, reinit=table(conv1=0.2, s=0.1, fc=4.5))
    assert (found.verdict, found.value, found.chance) == ("holds", pytest.approx(21), 0.0)
    assert found.reason.startswith("level 3, 3 draws, % more often than by chance: input layer +21.0 (95 % +18.5")
    assert judge(claims.found_again, reinit=table(conv1=0.2, fc=-0.5)).verdict == "holds in part"
    two = Ends(("conv1.weight", "b0.weight"), ("fc.weight",))
    assert judge(claims.found_again, reinit=table(conv1=0.2, b0=0.0), ends=two).value == pytest.approx(11)


# 7.


def test_ranges_widen() -> None:
    assert judge(claims.ranges_widen).verdict == "not testable"

    def table(**factors: float) -> pl.DataFrame:
        lines = [
            {"seed": seed, "layer": layer, "initial": 2.0 * number, "end": 2.0 * number * factor * (1 + 0.01 * seed)}
            for number, (layer, factor) in enumerate(factors.items())
            for seed in (0, 1, 2)
        ]
        return pl.DataFrame(lines)

    equal = 9.0  # the initial weights of this layer are equal, so that its range is 0
    found = judge(claims.ranges_widen, ranges=table(equal=equal, conv1=4.0, fc=1.5))
    assert (found.verdict, found.value, found.chance) == ("holds", pytest.approx(1.5 * 1.01), 1.0)
    assert "in the geometric mean of all layers 2.47 (95 %" in found.reason  # the root of 1.5 * 4, times 1.01
    assert judge(claims.ranges_widen, ranges=table(equal=equal, conv1=4.0, fc=0.9)).verdict == "holds in part"
    assert judge(claims.ranges_widen, ranges=table(equal=equal, conv1=0.8, fc=0.9)).verdict == "does not hold"
    assert judge(claims.ranges_widen, ranges=table(equal=equal)).verdict == "not testable"


# All.


@given(number=st.integers(0, len(claims.CLAIMS) - 1))
def test_from_one_seed_nothing_is_claimed_with_an_interval(number: int) -> None:
    one = replace(
        EVIDENCE,
        results=tuple(each for each in EVIDENCE.results if each.seed == 0),
        layers=EVIDENCE.layers.filter(seed=0),
        overlap=EVIDENCE.overlap.filter(seed=0),
        stability=EVIDENCE.stability.filter(seed=0),
        ranges=pl.DataFrame({"seed": [0], "layer": ["fc.weight"], "initial": [1.0], "end": [2.0]}),
    )
    claim = claims.CLAIMS[number](one)
    assert claim.low is None
    assert claim.high is None
    assert claim.verdict == "not testable" or "seed" in claim.reason


@pytest.mark.parametrize("values", [[0.3, 0.1, 0.2], [0.5, 0.5, 0.1, 0.4, 0.1], [1.0, 2.0, 2.0, 3.0]])
def test_the_correlation_with_the_position_is_that_of_scipy(values: list[float]) -> None:
    expected = scipy.stats.spearmanr(range(len(values)), values).statistic
    assert claims._correlate_with_position(values) == expected
    assert claims._correlate_with_position([0.5] * 3) == 0


def test_three_sentences() -> None:
    sentences = claims.summarise(claims.judge(EVIDENCE))
    assert len(sentences) == 3
    assert sentences[0].startswith("Tickets of different importances differ by more than another data order makes")
    assert sentences[1].startswith("They perform alike: over levels 1 to 3, the difference of two importances exceeds")
    assert sentences[2].startswith("It is not known whether shared connections are more stable than others")
    against = pl.concat([stability([0.5, 0.5]), stability([0.1, 0.1], "flipped")])
    less = claims.summarise(claims.judge(replace(EVIDENCE, stability=against)))[2]
    assert less.startswith("Shared connections are not more stable than others")
    both = pl.concat([stability([-0.5, -0.5]), stability([-0.1, -0.1], "flipped")])
    stable = claims.summarise(claims.judge(replace(EVIDENCE, stability=both)))[2]
    assert stable.startswith("Shared connections are more stable than others: for the spread of a weight over levels,")


def test_networks_of_one_layer_and_effects_that_are_not_a_number() -> None:
    one = replace(EVIDENCE, shapes={"fc.weight": (2, 2)}, stability=stability([float("nan")] * 3))
    verdicts = {claim.number: claim.verdict for claim in claims.judge(one)}
    assert {verdicts[number] for number in ("3a", "3b", "4c", "5a", "5b", "5c")} == {"not testable"}

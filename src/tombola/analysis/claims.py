"""Claims: what the paper says about lottery tickets, and whether the tickets of a study agree.

Each claim of the paper (Vandersmissen and Oramas, arXiv 2302.11244) is tested with a number of the study, which is
compared with chance and with the noise floor where these exist. Intervals are 95 % intervals over seeds (Student's t).
From one seed there is no interval, so a claim that needs one is not testable.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import polars as pl

from tombola.analysis.accuracy import Row
from tombola.analysis.ends import Ends
from tombola.analysis.evidence import Evidence, collect, distance
from tombola.analysis.gather import ALL, DATA_ORDER, IMPORTANCES, PRUNABLE
from tombola.analysis.verdict import (
    Claim,
    compare,
    conclude,
    count_seeds,
    format_interval,
    format_mean,
    is_above,
    is_below,
    need,
    to_frame,
)
from tombola.analysis.winners import Bounds
from tombola.study.tickets import Tickets

_DELTA: Bounds = (-1.0, 1.0)
"""The possible values of Cliff's delta."""

_FACTOR: Bounds = (0.0, math.inf)
"""The possible values of a quotient of two lengths."""

MARGIN = 0.5
"""Accuracies that differ by at most this many percentage points are alike."""

DEEP = 0.988
"""The sparsity from which it counts against the paper's claims that they are not seen; it sees them from here on."""

DEEP_WITHOUT_SHORTCUTS = 0.9987
"""The same for the collapse of a network without 1x1 shortcuts: the paper's VGG-16 lives at 99.62 %, not at 99.88 %."""


def of_study(tickets: Tickets, importances: Sequence[str] | None = None, level: int | None = None) -> pl.DataFrame:
    """Return the paper's claims with the verdicts of a study's tickets: one row for each claim.

    The columns are the fields of `Claim`. The compared importances are by default those of the paper's claims
    (magnitude, l1 and l2) that the study has, if it has two of them, and otherwise all of the study's.

    Args:
        tickets: tickets of the study.
        importances: the importances to compare, two or more.
        level: the level at which tickets are compared; by default the level nearest to the paper's sparsity, 96.48 %,
            or the last that all compared importances have if that is denser.

    Raises:
        UserError: if importances or the level are not in the study.
        NothingStoredError: if they are not stored yet.
    """
    return to_frame(judge(collect(tickets, importances, level)))


def judge(evidence: Evidence) -> list[Claim]:
    """Return every claim with its verdict, in the paper's order."""
    return [claim(evidence) for claim in CLAIMS]


# 1. Accuracy.


def perform_alike(evidence: Evidence) -> Claim:
    """Judge claim 1a: magnitude, l1 and l2 are alike.

    The value is the mean |difference| of the accuracies of two importances with the same seed, minus the same of two
    data orders of one of these importances, over all levels from 1 to the compared level. The claim holds if this is at
    most half a point, and so is the same number at the compared level alone.
    """
    claim = Claim(
        *("1a", "Tickets of different importances have the same accuracy."),
        "at most 1.5 points apart up to 98.85 %; on VGG-16, up to 33 points from 99.88 % on",
    )
    if other := evidence.other_metric:
        return claim.decide("not testable", other)
    seeds = evidence.seeds
    found = [_accuracy_differences(evidence, seed, range(1, evidence.level + 1)) for seed in seeds]
    last = [_accuracy_differences(evidence, seed, [evidence.level]) for seed in seeds]
    if any(two is None for two, _ in (*found, *last)):
        return claim.decide("not testable", "a training at these levels diverged")
    noise = [100 * floor for _, floor in found if floor is not None]
    if len(noise) < len(seeds):
        return claim.decide(*evidence.no_floor)
    exceeds = "the difference of two importances exceeds that of two data orders by"
    excess = {
        name: [100 * (two - floor) for two, floor in each if two is not None and floor is not None]
        for name, each in (
            (f"over levels 1 to {evidence.level}, {exceeds}", found),
            (f"and at level {evidence.level} by", last),
        )
    }
    parts = {
        f"{name} {format_mean(values, '+.2f')} points": is_below(values, MARGIN) for name, values in excess.items()
    }
    measured = claim.add_measure("points more than two data orders differ by", next(iter(excess.values())))
    measured = measured.add_baselines(noise=statistics.fmean(noise))
    verdict, reason, needs = conclude(evidence.more_seeds, parts)
    if verdict == "holds in part":  # alike on the whole, but not where it counts
        verdict = "does not hold" if list(parts.values())[-1] is False else "not testable"
        needs = evidence.more_seeds
    return measured.decide(verdict, reason, needs)


def _accuracy_differences(evidence: Evidence, seed: int, levels: Collection[int]) -> tuple[float | None, float | None]:
    """Return the mean |difference| of accuracy between two importances, and between two data orders of one of them.

    The first is None if one of the accuracies is missing, the second if there is no second data order.
    """
    own = {(row.importance, row.level): row.value for row in evidence.results if row.seed == seed}
    pairs = [
        (own.get((one, level)), own.get((other, level)))
        for one, other in combinations(evidence.compared, 2)
        for level in levels
    ]
    orders = [
        (own.get((row.importance, row.level)), row.value)
        for row in evidence.order_results
        if row.seed == seed and row.level in levels and row.importance in evidence.compared
    ]
    complete = all(one is not None and other is not None for one, other in pairs)
    return _mean_difference(pairs) if complete else None, _mean_difference(orders)


def fall_behind(evidence: Evidence) -> Claim:
    """Judge claim 1b: softmax and min_max keep up early and fall behind later, but not on a fully connected network.

    The value is the accuracy of softmax and min_max minus the mean of the compared importances, at the level nearest to
    a sparsity of 99.5 %. A training that diverged counts as a random guess.
    """
    expected = evidence.convolutional
    claim = Claim(
        "1b",
        f"softmax and min_max {'fall behind at high sparsity' if expected else 'keep up also at high sparsity'}.",
        "at 98.85 % -0.3 to -29.6 and -0.4 to -3.6 points, at 99.62 % -0.1 to -30.8 and +0.4 to -13.0"
        if expected
        else "+0.4 and +1.0 points at 99.53 %",
    )
    if other := evidence.other_metric:
        return claim.decide("not testable", other)
    names = [name for name in evidence.importances if name in ("softmax", "min_max")]
    if not names:
        needs = evidence.more_importances("softmax", "min_max")
        return claim.decide("not testable", "softmax and min_max are not among the importances", needs)
    at = _rows_at(evidence, 0.995, (*names, *evidence.compared))
    density = statistics.fmean(row.density for row in at.values())
    if 1 - density < DEEP:
        reason = f"all of them have levels up to a sparsity of {100 * (1 - density):.2f} % only"
        return claim.decide("not testable", reason, evidence.more_levels(DEEP))
    accuracy = {key: evidence.guess if row.value is None else row.value for key, row in at.items()}
    others = [statistics.fmean(accuracy[name, seed] for name in evidence.compared) for seed in evidence.seeds]
    if statistics.fmean(others) < 2 * evidence.guess:
        return claim.decide("not testable", "the other tickets are near a random guess at this sparsity, too")
    behind = {
        name: [100 * (accuracy[name, seed] - other) for seed, other in zip(evidence.seeds, others, strict=True)]
        for name in names
    }
    parts = {
        text: _not(keeps_up) if expected else keeps_up for text, keeps_up in compare(behind, -MARGIN, "+.2f").items()
    }
    measured = claim.add_measure(
        "points from the compared importances", [statistics.fmean(each) for each in zip(*behind.values(), strict=True)]
    )
    return measured.decide(
        *conclude(evidence.more_seeds, parts, f"points at a sparsity of {100 * (1 - density):.2f} %")
    )


def _rows_at(evidence: Evidence, sparsity: float, importances: Collection[str]) -> dict[tuple[str, int], Row]:
    """Return the results by importance and seed, at the level nearest to a sparsity among those that all have."""
    last = min(evidence.last_level(name) for name in importances)
    own = [row for row in evidence.results if row.importance in importances and row.level <= last]
    level = min({row.level for row in own}, key=lambda each: distance(own, each, sparsity))
    return {(row.importance, row.seed): row for row in own if row.level == level}


# 2. Collapse.


def collapse(evidence: Evidence) -> Claim:
    """Judge claim 2: magnitude and softmax lose whole layers, l1 and l2 do not.

    Magnitude agrees if it loses a layer in every seed, softmax if it does in any (by its accuracy, the paper's does in
    one of three on VGG-16), l1 and l2 if they do in none. That magnitude loses no layer counts against the claim only
    at a sparsity at which the paper's has lost one. The value is the share of seeds in which magnitude loses a layer.
    """
    claim = Claim("2", "magnitude and softmax lose whole layers; l1 and l2 do not.", "in every VGG and ResNet run")
    chains: dict[str, dict[int, int | None]] = {}
    for row in sorted(evidence.results, key=lambda row: row.level):
        first = chains.setdefault(row.importance, {}).setdefault(row.seed, None)
        if first is None and row.collapsed:
            chains[row.importance][row.seed] = row.level
    text = "; ".join(f"{name}: {_describe_collapse(levels.values())}" for name, levels in chains.items())
    expected = {"magnitude": True, "softmax": True, "l1": False, "l2": False}
    lost = {name: [level is not None for level in chains[name].values()] for name in chains if name in expected}
    if "magnitude" not in lost or len(lost) < 2:
        needs = evidence.more_importances("magnitude", "l1")
        return claim.decide("not testable", f"it compares magnitude with l1, l2 or softmax; {text}", needs)
    agree = {name: any(each) == expected[name] for name, each in lost.items()} | {"magnitude": all(lost["magnitude"])}
    measured = claim.add_measure(
        "as the share of seeds in which magnitude loses a layer", [*map(float, lost["magnitude"])]
    )
    measured = replace(measured, low=None, high=None)
    if not evidence.convolutional:
        return measured.decide("not testable", f"the paper says this of convolutional networks; {text}")
    whole = [seed for seed, level in chains["magnitude"].items() if level is None]
    ends_at = min((1 - _sparsest(evidence, "magnitude", seed) for seed in whole), default=1.0)
    needed = DEEP if evidence.groups["1x1 shortcuts"] else DEEP_WITHOUT_SHORTCUTS
    if ends_at < needed:
        ends = f"magnitude ends at a sparsity of {100 * ends_at:.2f} %, and at least {100 * needed:.4g} % are needed"
        return measured.decide("not testable", f"{ends}; {text}", evidence.more_levels(needed))
    if len(evidence.seeds) < 2:
        text += "; from one seed"
    return measured.decide(
        "holds" if all(agree.values()) else "holds in part" if any(agree.values()) else "does not hold", text
    )


def _sparsest(evidence: Evidence, importance: str, seed: int) -> float:
    return min(row.density for row in evidence.results if (row.importance, row.seed) == (importance, seed))


def _describe_collapse(levels: Collection[int | None]) -> str:
    first = [level for level in levels if level is not None]
    if not first:
        return "no layer lost"
    return f"in {len(first)} of {len(levels)} seeds, first at level {min(first)}"


# 3. Layers.


def special_layers(evidence: Evidence) -> Claim:
    """Judge claim 3a: input layer, output layer and 1x1 shortcuts are pruned less than the other layers.

    The value is the density of the input layer divided by that of the other layers, at the compared level.
    """
    claim = Claim(
        "3a", "Input layer, output layer and 1x1 shortcuts are pruned less than the other layers.", "in all systems"
    )
    groups = evidence.groups
    if not groups["other layers"]:
        return claim.decide("not testable", "the network has no other layers")
    ratios = {
        group: [
            _density(evidence, seed, groups[group]) / max(_density(evidence, seed, groups["other layers"]), 1e-12)
            for seed in evidence.seeds
        ]
        for group in ("input layer", "output layer", "1x1 shortcuts")
        if groups[group]
    }
    if not ratios:
        return claim.decide("not testable", "none of these layers is counted and pruned")
    measured = claim.add_measure("density of the input layer / of the other layers", ratios.get("input layer", []))
    return measured.decide(
        *conclude(evidence.more_seeds, compare(ratios, 1, ".2f"), "density, divided by that of the other layers")
    )


def deeper_layers(evidence: Evidence) -> Claim:
    """Judge claim 3b: deeper layers are sparser.

    The value is Spearman's rank correlation (American Journal of Psychology 15, 1904) of the position of a layer and
    its density, over the layers that are neither input, output nor shortcut, at the compared level.
    """
    claim = Claim("3b", "Deeper layers are sparser.", "in all convolutional systems")
    body = evidence.groups["other layers"]
    if len(body) < 4:
        layers = f"{len(body)} layer{'' if len(body) == 1 else 's'}"
        return claim.decide("not testable", f"the network has {layers} between input and output, 4 are needed")
    correlations = [
        _correlate_with_position([_density(evidence, seed, [name]) for name in body]) for seed in evidence.seeds
    ]
    measured = claim.add_measure("rank correlation of depth and density", correlations, (-1.0, 1.0))
    text = f"the rank correlation is {format_mean(correlations, '+.2f', (-1.0, 1.0))}"
    return measured.add_baselines(chance=0.0).decide(*conclude(evidence.more_seeds, {text: is_below(correlations, 0)}))


def spikes(evidence: Evidence) -> Claim:
    """Judge claim 3c: softmax prunes in spikes, a layer untouched in one round and much pruned in another.

    The value is the standard deviation over rounds of the share of a layer's connections that a round prunes, mean over
    layers, for softmax. The claim holds if it is at least one and a half times that of each other importance.
    """
    claim = Claim("3c", "softmax prunes a layer in spikes.", "softmax alone")
    if "softmax" not in evidence.importances or len(evidence.importances) < 2:
        needs = evidence.more_importances("softmax", "magnitude")
        return claim.decide("not testable", "softmax and another importance are needed", needs)
    last = evidence.common_level
    found = {
        name: [_unevenness(evidence, name, seed, last) for seed in evidence.seeds] for name in evidence.importances
    }
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    if not evidence.prunable:
        return claim.decide("not testable", "the network has no layers to compare")
    if not all(len(values) == len(evidence.seeds) for values in known.values()):
        reason = "fewer than three levels of some importance are stored"
        return claim.decide("not testable", reason, need("levels", max(3, last)))
    others = {name: values for name, values in known.items() if name != "softmax"}
    largest = [max(values[number] for values in others.values()) for number in range(len(evidence.seeds))]
    agree = [own >= 1.5 * other for own, other in zip(known["softmax"], largest, strict=True)]
    text = ", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in known.items())
    measured = claim.add_measure("standard deviation over rounds of the share pruned", known["softmax"])
    return measured.decide(*count_seeds(agree, text))


def follows(evidence: Evidence) -> Claim:
    """Judge claim 3d: min_max follows the global sparsity best.

    The value is the mean |density of the network - density of a layer| over layers and levels, for min_max.
    """
    claim = Claim("3d", "min_max follows the sparsity of the network best.", "best of five importances")
    if "min_max" not in evidence.importances or len(evidence.importances) < 2:
        needs = evidence.more_importances("min_max", "magnitude")
        return claim.decide("not testable", "min_max and another importance are needed", needs)
    last = evidence.common_level
    table = evidence.layers.filter(pl.col("layer").is_in(evidence.prunable) & pl.col("level").is_between(1, last))
    means = table.group_by("importance", "seed").agg(pl.col("ahead").abs().mean() * 100).sort("seed")
    found = {name: means.filter(pl.col("importance") == name)["ahead"].to_list() for name in evidence.importances}
    if not all(len(values) == len(evidence.seeds) for values in found.values()):
        return claim.decide("not testable", "some importances have no results")
    agree = [all(own <= other for other in seed) for own, *seed in zip(found["min_max"], *found.values(), strict=True)]
    average = sorted((statistics.fmean(values), name) for name, values in found.items())
    measured = claim.add_measure("points of density from the network's", found["min_max"], (0.0, 100.0))
    text = ", ".join(f"{name} {mean:.2f}" for mean, name in average)
    return measured.decide(*count_seeds(agree, f"in points, levels 1 to {last}: {text}"))


# 4. Overlap.


def overlap_little(evidence: Evidence) -> Claim:
    """Judge claim 4a: the tickets overlap little.

    The value is the share of a ticket's connections that the tickets of all compared importances have, in %, at the
    compared level, without the layers that are kept dense. The claim holds if less than half are shared.
    """
    claim = Claim("4a", "The tickets of different importances share few connections.", "9.34 % of a ticket")
    k = len(evidence.compared)
    table = _overlap_of(evidence, IMPORTANCES, k)
    if not len(table):
        return claim.decide("not testable", "the tickets of one seed are not all stored, or have no connections")
    values, chance = table["shared"].to_list(), statistics.fmean(table["chance"].to_list())
    measured = claim.add_measure("% of a ticket shared by all", values)
    measured = measured.add_baselines(chance=chance, noise=_shares(evidence, DATA_ORDER)[1] if k == 2 else None)
    interval = format_interval(measured.low, measured.high, ".1f")
    text = f"they share {measured.value:.1f} %{interval}, chance {chance:.1f} %"
    return measured.decide(*conclude(evidence.more_seeds, {text: is_below(values, 50)}))


def distinct_beyond_noise(evidence: Evidence) -> Claim:
    """Judge claim 4b: tickets of two importances differ by more than tickets of two data orders do.

    The value is the noise floor minus the share of a ticket that two importances have in common, in points, at the
    compared level, without the layers that are kept dense: positive if importances matter more than the data order.
    """
    claim = Claim("4b", "The tickets differ by more than another data order makes them differ.", "not measured")
    two, mean_two = _shares(evidence, IMPORTANCES)
    noise, mean_noise = _shares(evidence, DATA_ORDER)
    both = [seed for seed in two if seed in noise]
    if not both or mean_two is None or mean_noise is None:
        return claim.decide(*evidence.no_floor)
    lower = [noise[seed] - two[seed] for seed in both]
    chance = statistics.fmean(_overlap_of(evidence, IMPORTANCES, 2)["chance"].to_list())
    measured = claim.add_measure("points between noise floor and overlap", lower)
    measured = measured.add_baselines(chance=chance, noise=mean_noise)
    shares = f"two importances share {mean_two:.1f} % of a ticket and two data orders {mean_noise:.1f} %"
    difference = f"{shares}; the difference is {format_mean(lower, '+.1f')} points"
    return measured.decide(*conclude(evidence.more_seeds, {difference: is_above(lower, 0)}))


def ends_share_more(evidence: Evidence) -> Claim:
    """Judge claim 4c: the tickets share more in the input and output layers than elsewhere.

    The value is the share that all compared tickets have in common beyond chance in the input layer, minus the same in
    all layers; chance is that of the densities of the layers.
    """
    claim = Claim("4c", "They share more in the input and the output layer.", "68.78 % in the first convolution")
    table = evidence.overlap.filter((pl.col("kind") == IMPORTANCES) & (pl.col("k") == len(evidence.compared)))
    shares: dict[str, list[float]] = {}
    for seed in evidence.seeds:
        own = {
            row["layer"]: row["shared_of_ticket"] - row["layers_expected"] / row["alive"]
            for row in table.filter((pl.col("seed") == seed) & pl.col("shared_of_ticket").is_not_null()).to_dicts()
        }
        for group in ("input layer", "output layer"):
            found = [own[name] for name in evidence.groups[group] if own.get(name) is not None]
            if found and own.get(_total(evidence)) is not None:
                shares.setdefault(group, []).append(100 * (statistics.fmean(found) - own[_total(evidence)]))
    if not shares:
        return claim.decide("not testable", "neither layer has connections that all tickets share")
    measured = claim.add_measure("points more in the input layer", shares.get("input layer", []))
    return measured.decide(
        *conclude(evidence.more_seeds, compare(shares, 0, "+.1f"), "points beyond chance, more than in all layers")
    )


# 5. Stability.


def vary_less(evidence: Evidence) -> Claim:
    """Judge claim 5a: the trained weights of shared connections vary less from level to level.

    The value is Cliff's delta of the standard deviation, see `tombola.analysis.stability`; mean over importances.
    """
    return _judge_effect(evidence, "5a", "Shared connections have a lower standard deviation over levels.", "sd")


def flip_less(evidence: Evidence) -> Claim:
    """Judge claim 5b: shared connections change their sign less often.

    The value is Cliff's delta of whether a connection changes its sign at all, which is the difference of two shares.
    """
    return _judge_effect(evidence, "5b", "Shared connections change their sign less often.", "flipped")


def move_further(evidence: Evidence) -> Claim:
    """Judge claim 5c: in the input layer, shared connections move further from their initial value.

    The value is Cliff's delta of the distance between trained and initial weight, in the input layer.
    """
    layers = (evidence.ends or Ends.by_order(evidence.shapes)).inputs
    statement = "In the input layer, shared connections move further from their initial value."
    if not evidence.shapes.keys() & set(layers):
        return Claim("5c", statement, "in all its figures").decide("not testable", "the input layer is not counted")
    return _judge_effect(evidence, "5c", statement, "movement", layers=layers, below=False)


def _judge_effect(
    evidence: Evidence,
    number: str,
    statement: str,
    measure: str,
    *,
    layers: Collection[str] = (ALL,),
    below: bool = True,
) -> Claim:
    claim = Claim(number, statement, "in all its figures")
    table = evidence.stability.filter((pl.col("measure") == measure) & pl.col("layer").is_in(layers))
    by_seed = (
        table.with_columns(pl.col("effect").fill_nan(None))
        .drop_nulls("effect")
        .group_by("seed")
        .agg(pl.col("effect").mean())
        .sort("seed")
    )
    if not len(by_seed):
        return claim.decide("not testable", "there are no shared connections, or no others")
    values = by_seed["effect"].to_list()
    agrees = is_below(values, 0) if below else is_above(values, 0)
    measured = claim.add_measure("Cliff's delta, shared against others", values, _DELTA).add_baselines(chance=0.0)
    return measured.decide(
        *conclude(evidence.more_seeds, {f"Cliff's delta is {format_mean(values, '+.3f', _DELTA)}": agrees})
    )


# 6. Partial reinitialisation.


def found_again(evidence: Evidence) -> Claim:
    """Judge claim 6: connections that keep their initial weight survive more often than by chance.

    The value is how much more often they survive in the input layer, in %.
    """
    claim = Claim(
        "6",
        "Shared connections that keep their initial weight survive more often than by chance.",
        "+8.5 to +70 % in the first convolution, +440 to +480 % in the classifier, -3.2 to +20 % in the shortcuts",
    )
    if evidence.reinit is None:
        compared = ", ".join(evidence.compared)
        reason = f"no partial reinitialisation of exactly these importances ({compared}) is stored"
        return claim.decide("not testable", reason, need("reinit", evidence.level))
    found: dict[str, list[float]] = {}
    for group in ("input layer", "output layer", "1x1 shortcuts"):
        names = evidence.groups[group]
        own = evidence.reinit.filter(pl.col("layer").is_in(names)).drop_nulls("excess")
        if len(own):
            means = own.group_by("seed").agg(pl.col("excess").mean() * 100).sort("seed")
            found[group] = means["excess"].to_list()
    if not found:
        return claim.decide("not testable", "nothing is expected by chance in these layers")
    level, draws = evidence.reinit["level"][0], evidence.reinit["draws"][0]
    measured = claim.add_measure("% more often than by chance, input layer", found.get("input layer", []))
    about = f"level {level}, {draws} {'draw' if draws == 1 else 'draws'}, % more often than by chance"
    without = set(evidence.seeds) - set(evidence.reinit["seed"].to_list())
    more = need("reinit", level) if without else evidence.more_seeds
    return measured.add_baselines(chance=0.0).decide(*conclude(more, compare(found, 0, "+.1f"), about))


# 7. Ranges of weights.


def ranges_widen(evidence: Evidence) -> Claim:
    """Judge claim 7: training widens the range of each layer's weights.

    The value is the range (maximum - minimum) of a layer's weights after the training of the dense network, divided by
    that at initialisation, in the layer where this is least. Layers whose initial weights are all equal are left out.
    """
    claim = Claim(
        "7",
        "Training widens the range of each layer's weights.",
        "in the four layers of its Table 1, to 1.6 to 2.9 times the initial range",
    )
    known = None if evidence.ranges is None else evidence.ranges.filter(pl.col("initial") > 0)
    if known is None or not len(known):
        return claim.decide("not testable", "the initial weights of each layer are equal, or not known")
    by_seed = known.with_columns(factor=pl.col("end") / pl.col("initial")).group_by("seed")
    least = by_seed.agg(pl.col("factor").min()).sort("seed")["factor"].to_list()
    mean = by_seed.agg(pl.col("factor").log().mean().exp()).sort("seed")["factor"].to_list()
    measured = claim.add_measure("times the initial range, in the layer that widens least", least, _FACTOR)
    measured = measured.add_baselines(chance=1.0)
    factors = {"in the layer that widens least": least, "in the geometric mean of all layers": mean}
    return measured.decide(
        *conclude(
            evidence.more_seeds,
            compare(factors, 1, ".2f", _FACTOR),
            "range after training, divided by the initial range",
        )
    )


CLAIMS: tuple[Callable[[Evidence], Claim], ...] = (
    *(perform_alike, fall_behind, collapse),
    *(special_layers, deeper_layers, spikes, follows),
    *(overlap_little, distinct_beyond_noise, ends_share_more),
    *(vary_less, flip_less, move_further),
    found_again,
    ranges_widen,
)
"""The paper's claims in its order."""


def summarise(claims: Sequence[Claim]) -> tuple[str, str, str]:
    """Return three sentences: are the tickets unique beyond noise, do they perform alike, are shared ones more stable.

    Args:
        claims: of `judge`.
    """
    by_number = {claim.number: claim for claim in claims}
    unique, alike = by_number["4b"], by_number["1a"]
    distinct = {
        "holds": "Tickets of different importances differ by more than another data order makes them differ",
        "does not hold": "Tickets of different importances differ no more than another data order makes them differ",
        "not testable": "It is not known whether importances make tickets differ by more than another data order does",
    }
    perform = {
        "holds": "They perform alike",
        "does not hold": "They do not perform alike",
        "not testable": "It is not known whether they perform alike",
    }
    spread, sign = by_number["5a"], by_number["5b"]
    if {spread.verdict, sign.verdict} == {"holds"}:
        text = "Shared connections are more stable than others"
    elif {spread.verdict, sign.verdict} == {"does not hold"}:
        text = "Shared connections are not more stable than others"
    elif "not testable" in (spread.verdict, sign.verdict):
        text = "It is not known whether shared connections are more stable than others"
    else:
        text = "Shared connections are not in every respect more stable than others"
    return (
        f"{distinct[unique.verdict]}: {unique.reason}.",
        f"{perform[alike.verdict]}: {alike.reason}.",
        f"{text}: for the spread of a weight over levels, {spread.reason}; for a change of its sign, {sign.reason}.",
    )


def _not(answer: bool | None) -> bool | None:
    return None if answer is None else not answer


def _mean_difference(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    differences = [abs(one - other) for one, other in pairs if one is not None and other is not None]
    return statistics.fmean(differences) if differences else None


def _correlate_with_position(values: Sequence[float]) -> float:
    """Return Spearman's rank correlation of values and their position; 0 if all are equal."""
    ranks = pl.Series(values, dtype=pl.Float64).rank()
    return 0.0 if len(set(values)) == 1 else float(np.corrcoef(np.arange(len(values)), ranks)[1, 0])


def _density(evidence: Evidence, seed: int, names: Sequence[str]) -> float:
    """Return the density of some layers together, mean over the compared importances."""
    table = evidence.layers.filter(
        (pl.col("level") == evidence.level)
        & (pl.col("seed") == seed)
        & pl.col("importance").is_in(evidence.compared)
        & pl.col("layer").is_in(names)
    )
    alive, connections = (sum(table[column].to_list()) for column in ("alive", "connections"))
    return float(alive / connections)


def _unevenness(evidence: Evidence, importance: str, seed: int, last: int) -> float | None:
    """Return the standard deviation over rounds of the share of a layer that a round prunes, mean over layers."""
    found = []
    for name in evidence.prunable:
        table = evidence.layers.filter(
            (pl.col("importance") == importance)
            & (pl.col("seed") == seed)
            & (pl.col("layer") == name)
            & (pl.col("level") <= last)
        ).sort("level")
        alive = table["alive"].to_list()
        shares = [1 - after / before for before, after in pairwise(alive) if before]
        if len(shares) > 1:
            found.append(statistics.stdev(shares))
    return statistics.fmean(found) if found else None


def _total(evidence: Evidence) -> str:
    return PRUNABLE if evidence.kept_dense else ALL


def _shares(evidence: Evidence, kind: str) -> tuple[dict[int, float], float | None]:
    """Return the share of a ticket, in %, that two tickets have in common: by seed, and the mean."""
    means = _overlap_of(evidence, kind, 2).group_by("seed").agg(pl.col("shared").mean()).sort("seed")
    by_seed = dict(means.select("seed", "shared").rows())
    return by_seed, statistics.fmean(by_seed.values()) if by_seed else None


def _overlap_of(evidence: Evidence, kind: str, k: int) -> pl.DataFrame:
    """Return seed, shared and chance, in % of a ticket, of each comparison of k tickets that have connections.

    Layers that are kept dense do not count. Chance is that of random tickets with the same layer densities.
    """
    layer = pl.col("layer") == _total(evidence)
    table = evidence.overlap.filter((pl.col("kind") == kind) & (pl.col("k") == k) & layer)
    return table.drop_nulls("shared_of_ticket").select(
        "seed",
        shared=100 * pl.col("shared_of_ticket"),
        chance=100 * pl.col("layers_expected") / pl.col("alive"),
    )

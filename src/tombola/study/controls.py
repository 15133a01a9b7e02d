"""Controls, combinations and transfers of tickets: plan the trainings that change one thing about a ticket.

All begin with the mask of a stored ticket, or with several of them, and are trained as the tickets of the study are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import and_, or_
from typing import Any, Literal, TypeAlias

from tombola.errors import UserError, as_texts, did_you_mean
from tombola.lottery.controls import keep_signs, shuffle
from tombola.pruning.mask import Mask
from tombola.store.names import name_of
from tombola.streams import derive
from tombola.study.chains import Chain, Start, select_chains
from tombola.study.planner import Planner
from tombola.study.schema import MOST_CHAINS, Study
from tombola.study.singles import (
    NOTE,
    check_weights_elsewhere,
    count_notes,
    find_training,
    list_notes,
    name_dense,
    plan_singles,
)
from tombola.study.tickets import Tickets, check_draws, check_level
from tombola.training.train import initial_state
from tombola.training.weights import State, Weights, state_hash

KINDS: Mapping[str, str] = {
    "new-order": "the ticket with another data order",
    "signs": "only the signs of the weights, and new magnitudes",
    "new-weights": "the mask with new weights",
    "shuffled": "the weights with a shuffled mask",
    "other-seed": "the weights with the mask of another seed",
    "random": "a shuffled mask with new weights",
}
"""The kinds of controls, with what each trains in the place of the ticket. The first is the noise of a training."""

DRAWN = ("signs", "new-weights", "random")
"""The kinds of controls whose weights are drawn anew."""

COMBINED: Mapping[str, Callable[[Mask, Mask], Mask]] = {"union": or_, "intersection": and_}
"""The ways in which tickets are combined."""

_TRANSFERS = ("transferred", "shuffled")
"""What is trained of each mask of another study: the mask, and the same mask shuffled."""

_OF_MASKS = ("prune", "keep_dense", "exclude", "fraction", "selection", "shares", "score_at", "score_examples")
"""The fields of a study, apart from its task and recipe, that decide on the masks of a level."""

Over: TypeAlias = Literal["importances", "seeds"]
"""What differs between the tickets that are combined."""


@dataclass(frozen=True)
class Part:
    """One training of a plan.

    Args:
        kind: the kind of the control, "union" or "intersection", or "transferred" or "shuffled".
        importance: the importance of the ticket; empty for a combination of several.
        seed: the seed of the initialisation that it is trained from.
        draw: the number of the draw, from 1 on.
        chain: its chain in the planner.
        tickets: the chains whose tickets its mask is made of.
    """

    kind: str
    importance: str
    seed: int
    draw: int
    chain: Chain
    tickets: tuple[Chain, ...]


@dataclass(frozen=True)
class Plan:
    """The trainings of controls, combinations or transfers.

    Args:
        tickets: the tickets of the study in which they are trained.
        level: the level of the tickets.
        planner: the planner of the trainings.
        parts: the trainings.
        source: of transfers, how the study that the masks come from differs from the study of `tickets`.
    """

    tickets: Tickets
    level: int
    planner: Planner
    parts: tuple[Part, ...]
    source: str = ""


def plan_controls(
    tickets: Tickets,
    level: int,
    kinds: Collection[str] | None = None,
    draws: int = 1,
    importances: Sequence[str] | None = None,
) -> Plan:
    """Return the trainings of the controls of a study's tickets.

    Controls of one draw are paired: `signs`, `new-weights` and `random` have the same new weights apart from signs, and
    `shuffled` and `random` have the same mask.

    Args:
        tickets: the tickets of the study.
        level: the level of the tickets, from 1 on.
        kinds: which of `KINDS`; by default all, without `other-seed` if the study has one seed.
        draws: the number of random draws of each control, 1 to 1000. A draw of `other-seed` is another seed, of which
            there may be fewer.
        importances: the names of the importances; by default all.

    Raises:
        UserError: if an argument is invalid, or if a kind needs what the study does not have.
        NothingStoredError: if the store does not have the tickets yet.
        DamagedResultError: if a stored result is damaged.
    """
    study = tickets.study
    seeds = study.seeds
    chosen = _choose_kinds(kinds, study)
    check_draws(draws)
    if {"shuffled", "other-seed"} & set(chosen):
        check_weights_elsewhere(tickets, "controls")
    chains = select_chains(study, importances)
    _require(tickets, level, chains, "controls")
    orders = list_orders(study, draws)
    drawn = functools.cache(functools.partial(_draw_weights, tickets.planner))  # controls and importances share draws
    signed: dict[tuple[str, str], Weights] = {}
    shuffled = functools.cache(_shuffle)
    starts: dict[Chain, Start] = {}
    parts = []
    for kind in chosen:
        for chain in chains:
            ticket, training = find_training(tickets, chain, level)
            for draw in range(1, min(draws, len(seeds) - 1) + 1 if kind == "other-seed" else draws + 1):
                weights, mask = ticket.rewind, ticket.mask
                source, order = chain, orders[draw - 1] if kind == "new-order" else None
                if kind in DRAWN:
                    weights = drawn(chain.seed, draw)
                if kind == "signs":
                    pair = ticket.rewind.hash, weights.hash
                    if pair not in signed:
                        signed[pair] = _keep_signs(tickets.planner, ticket.rewind, weights)
                    weights = signed[pair]
                if kind in ("shuffled", "random"):
                    mask = shuffled(mask, chain.seed, draw)
                if kind == "other-seed":
                    source = Chain(seeds[(seeds.index(chain.seed) + draw) % len(seeds)], chain.importance)
                    mask = find_training(tickets, source, level)[0].mask
                name = f"{chain.importance}, {kind}" + (f" {draw}" if draw > 1 else "")
                own = Chain(chain.seed, name, order)
                starts[own] = Start(level, weights, mask, training.begin, training.end)
                parts.append(Part(kind, chain.importance, chain.seed, draw, own, (source,)))
    names = list(dict.fromkeys(chain.importance for chain in chains))
    note = {"verb": "controls", "level": level, "kinds": list(chosen), "draws": draws, "importances": names}
    return Plan(tickets, level, plan_singles(tickets, starts, note), tuple(parts))


def check_size(study: Study, kinds: Collection[str] | None, draws: int, importances: Sequence[str] | None) -> None:
    """Raise `UserError` if these controls are more trainings than a study may have chains.

    Args:
        study, kinds, draws, importances: the study and the arguments of `plan_controls`.

    >>> from tombola.study.schema import load_study
    >>> check_size(load_study("digits"), ["signs"], 1000, None)
    >>> check_size(load_study("digits"), None, 1000, None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tombola.errors.UserError: these controls are 50010 trainings, expected at most 10000; ask for fewer ...
    """
    check_draws(draws)
    tickets = len(select_chains(study, importances))
    counts = [min(draws, len(study.seeds) - 1) if k == "other-seed" else draws for k in _choose_kinds(kinds, study)]
    if tickets * sum(counts) > MOST_CHAINS:
        raise UserError(
            f"these controls are {tickets * sum(counts)} trainings, expected at most {MOST_CHAINS}; ask for fewer "
            "importances, kinds or draws at a time"
        )


def list_controls(tickets: Tickets) -> dict[tuple[int, tuple[str, ...]], tuple[tuple[str, ...], int]]:
    """List the controls of a study that its store has trainings of.

    Returns:
        (level, importances) -> the kinds in the order of `KINDS`, and the largest number of draws, at most as many as
        there are trainings of controls; sorted by level.
    """
    study, stored = tickets.study, count_notes(tickets, "controls")
    found: dict[tuple[int, tuple[str, ...]], tuple[set[str], int]] = {}
    for note in list_notes(tickets, "controls"):
        known = note["importances"] and set(note["importances"]) <= set(study.importances)
        if 1 <= note["level"] <= study.levels and known:
            names = tuple(name for name in study.importances if name in note["importances"])
            kinds, draws = found.get((note["level"], names), (set(), 1))
            found[note["level"], names] = kinds | set(note["kinds"]), max(draws, min(note["draws"], stored))
    allowed = [kind for kind in KINDS if kind != "other-seed" or len(study.seeds) > 1]
    return {
        place: (tuple(kind for kind in allowed if kind in kinds), draws)
        for place, (kinds, draws) in sorted(found.items(), key=lambda each: each[0])
    }


def plan_combinations(
    tickets: Tickets, level: int, over: Over = "importances", importances: Sequence[str] | None = None
) -> Plan:
    """Return the trainings of the union and the intersection of tickets, as tickets of their own.

    Args:
        tickets: the tickets of the study.
        level: the level of the tickets, from 1 on.
        over: what differs between the tickets that are combined: the tickets of all importances of a seed, or those of
            all seeds of an importance; the latter are trained from the initial weights of each seed.
        importances: the names of the importances; by default all.

    Raises:
        UserError: if an argument is invalid, if there is one ticket to combine, or if tickets share no connection.
        NothingStoredError: if the store does not have the tickets yet.
        DamagedResultError: if a stored result is damaged.
    """
    study = tickets.study
    if over not in ("importances", "seeds"):
        raise UserError(f"over: unknown {over!r}; {did_you_mean(str(over), ('importances', 'seeds'))}")
    check_weights_elsewhere(tickets, "combinations")
    chains = select_chains(study, importances, at_least=2 if over == "importances" else 1)
    if over == "seeds" and len(study.seeds) < 2:
        raise UserError(
            "combinations: the tickets of two seeds or more are combined, and the study has one; run another seed"
        )
    _require(tickets, level, chains, "combinations")
    names = list(dict.fromkeys(chain.importance for chain in chains))
    starts: dict[Chain, Start] = {}
    parts = []
    for seed in study.seeds:
        for name in ("",) if over == "importances" else names:
            of = tuple(chain for chain in chains if (chain.importance == name if name else chain.seed == seed))
            ticket, training = find_training(tickets, Chain(seed, name or names[0]), level)
            masks = [find_training(tickets, chain, level)[0].mask for chain in of]
            for kind, combine in COMBINED.items():
                mask = functools.reduce(combine, masks)
                if not mask.alive:
                    raise UserError(f"combinations: tickets of seed {seed} share no connection at level {level}")
                chain = Chain(seed, f"{kind} of {f'{name} over seeds' if name else 'importances'}")
                starts[chain] = Start(level, ticket.rewind, mask, training.begin, training.end)
                parts.append(Part(kind, name, seed, 1, chain, of))
    note = {"verb": "combine", "level": level, "over": over, "importances": names}
    return Plan(tickets, level, plan_singles(tickets, starts, note), tuple(parts))


def list_combinations(tickets: Tickets) -> list[tuple[int, Over, tuple[str, ...]]]:
    """List the combinations of a study that its store has trainings of: level, what differs, and importances."""
    study, found = tickets.study, set()
    for note in list_notes(tickets, "combine"):
        names = tuple(name for name in study.importances if name in note["importances"])
        several = {"importances": len(names), "seeds": len(study.seeds) if names else 0}.get(note["over"], 0)
        if 1 <= note["level"] <= study.levels and set(note["importances"]) <= set(study.importances) and several > 1:
            found.add((note["level"], note["over"], names))
    return sorted(found)


def plan_transfers(tickets: Tickets, others: Tickets, level: int, importances: Sequence[str] | None = None) -> Plan:
    """Return the trainings of one study's masks in the networks of another, and of the same masks shuffled.

    Args:
        tickets: the tickets of the study in which the masks are trained.
        others: the tickets of the study that the masks come from.
        level: the level of the masks, from 1 on.
        importances: the names of the importances; by default those that both studies have.

    Raises:
        UserError: if the networks differ, or if the studies have no seed or importance in common.
        NothingStoredError: if the store does not have the masks, or the dense networks of the study, yet.
        DamagedResultError: if a stored result is damaged.
    """
    study, source = tickets.study, others.study
    ours, theirs = tickets.planner.dense.shapes, others.planner.dense.shapes
    if ours != theirs:
        name = sorted({name for name, _ in set(ours.items()) ^ set(theirs.items())})[0]
        shapes = " and ".join(" × ".join(map(str, each[name])) if name in each else "none" for each in (ours, theirs))
        raise UserError(f"transfer: the networks of the two studies differ: layer {name!r} has the shapes {shapes}")
    names = importances or [name for name in source.importances if name in study.importances]
    seeds = [seed for seed in source.seeds if seed in study.seeds]
    if not names or not seeds:
        what = "seed" if names else "importance"
        raise UserError(f"transfer: the two studies have no {what} in common; run one of them with one of the other's")
    chains = [chain for chain in select_chains(source, names) if chain.seed in seeds]
    _require(others, level, chains, "transfer")
    select_chains(study, names)
    tickets.require([0], [Chain(chain.seed, study.importances[0]) for chain in chains])
    starts: dict[Chain, Start] = {}
    parts = []
    for chain in chains:
        mask = find_training(others, chain, level)[0].mask
        dense, training = find_training(tickets, Chain(chain.seed, study.importances[0]), 0)
        for kind in _TRANSFERS:
            own = Chain(chain.seed, f"{chain.importance}, {kind}")
            moved = mask if kind == "transferred" else shuffle(mask, derive(chain.seed, "control", 1))
            starts[own] = Start(level, dense.rewind, moved, training.begin, training.end)
            parts.append(Part(kind, chain.importance, chain.seed, 1, own, (chain,)))
    found = _describe_difference(study, source)
    origin = name_of(others.planner.identity)
    about = {"verb": "transfer", "level": level, "importances": list(dict.fromkeys(names))}
    note = {**about, "source": found, "origin": origin}
    planner = plan_singles(tickets, starts, note)
    planner.about_each = _note_pairs(tickets, planner, parts)
    return Plan(tickets, level, planner, tuple(parts), found)


def _note_pairs(tickets: Tickets, planner: Planner, parts: Sequence[Part]) -> dict[str, Mapping[str, Any]]:
    """Return the note of each training: the names of the two trainings of its mask, from which the mask is read later.

    Each note is about one mask and its seed, so that the notes of a study grow with the number of its masks, not with
    the square of it. The other study, from which the masks come, may not be at hand later. The two trainings of a mask
    name each other, because one of them may be stored already for another reason and have no note.
    """
    pairs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for part in parts:
        about = {"kind": part.kind, "importance": part.importance, "seed": part.seed}
        pairs.setdefault((part.importance, part.seed), []).append(about | {"key": _name_training(planner, part.chain)})
    named: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs.values():
        for key in {each["key"] for each in pair}:
            named.setdefault(key, []).extend(pair)  # tickets of two importances may have the same mask
    dense = {seed: name_dense(tickets, [seed]) for seed in {part.seed for part in parts}}
    note = planner.about[NOTE]
    return {
        key: {NOTE: {**note, "of": dense[trainings[0]["seed"]], "trainings": trainings}}
        for key, trainings in named.items()
    }


def list_transfers(tickets: Tickets) -> list[Plan]:
    """Return the transfers to a study that its store has trainings of, without the study that the masks come from."""
    planner, plans = tickets.planner, []
    for (level, source, _), pairs in _collect_pairs(tickets).items():
        starts: dict[Chain, Start] = {}
        parts = []
        for seed, importance in product(tickets.study.seeds, tickets.study.importances):
            keys = pairs.get((seed, importance), [])
            chain = Chain(seed, tickets.study.importances[0])
            if not keys or not tickets.progress(chain).tickets:
                continue
            documents = [planner.store.results.document(key) for key in keys]
            if any(each is None or each.shapes != planner.dense.shapes for each in documents):
                continue
            dense, training = find_training(tickets, chain, 0)
            for kind, key in zip(_TRANSFERS, keys, strict=True):
                own = Chain(seed, f"{importance}, {kind}")
                mask = planner.store.results.read_mask(key, planner.dense.shapes)
                starts[own] = Start(level, dense.rewind, mask, training.begin, training.end)
                parts.append(Part(kind, importance, seed, 1, own, ()))
        if parts:
            note = {"verb": "transfer", "level": level, "source": source}
            plans.append(Plan(tickets, level, plan_singles(tickets, starts, note), tuple(parts), source))
    return plans


def _collect_pairs(tickets: Tickets) -> dict[tuple[int, str, str], dict[tuple[int, str], list[str]]]:
    """Return what the notes of transfers name: by level, source and origin, the two trainings of a seed and importance.

    Each note names the trainings of one mask. Those of earlier versions name all trainings of their plan.
    """
    found: dict[tuple[int, str, str], dict[tuple[int, str], list[str]]] = {}
    for note in list_notes(tickets, "transfer"):
        named: dict[tuple[int, str], dict[str, str]] = {}
        for each in note["trainings"]:
            named.setdefault((each["seed"], each["importance"]), {})[each["kind"]] = each["key"]
        pairs = found.setdefault((note["level"], note["source"], note["origin"]), {})
        for place, keys in named.items():
            if set(_TRANSFERS) <= set(keys):
                pairs.setdefault(place, [keys[kind] for kind in _TRANSFERS])
    return dict(sorted(found.items(), key=lambda each: each[0]))


def _name_training(planner: Planner, chain: Chain) -> str:
    """Return the name of the only training of a chain."""
    progress = planner.progress(chain, lambda _: None)
    (training,) = progress.needs
    return training.key


def _describe_difference(study: Study, other: Study) -> str:
    """Return the fields in which another study differs from a study, apart from those that say which tickets it has.

    >>> from tombola.study.schema import load_study
    >>> _describe_difference(load_study("digits"), load_study("digits", {"recipe.lr": 0.5, "seeds": [7]}))
    'recipe.lr = 0.5'
    """
    ours, theirs = (
        {f"{part}.{name}": value for part in ("task", "recipe") for name, value in document[part].items()}
        | {name: document[name] for name in _OF_MASKS}
        for document in (each.model_dump(mode="json") for each in (study, other))
    )
    changed = [f"{name} = {json.dumps(value)}" for name, value in theirs.items() if value != ours[name]]
    return ", ".join(changed) or "the same task and recipe"


def list_orders(study: Study, count: int) -> list[int]:
    """Return the seeds of data orders that differ from those of the study's own tickets, the study's own first.

    >>> from tombola.study.schema import load_study
    >>> list_orders(load_study("digits"), 3)
    [100, 101, 102]
    """
    known = list(study.data_seeds)
    first = max([*known, *study.seeds]) + 1
    return [*known, *range(first, first + count)][:count]


def _choose_kinds(kinds: Collection[str] | None, study: Study) -> list[str]:
    """Return the kinds of controls in the order of `KINDS`; raise `UserError` if a study cannot have one of them."""
    one = len(study.seeds) < 2
    if kinds is None:
        return [kind for kind in KINDS if kind != "other-seed" or not one]
    kinds = as_texts(kinds, "kinds", "kinds of controls")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"kinds: unknown control {kind!r}; {did_you_mean(kind, KINDS)}")
    if one and "other-seed" in kinds:
        raise UserError("kinds: 'other-seed' needs the tickets of two seeds, and the study has one; run another seed")
    return [kind for kind in KINDS if kind in kinds]


def _require(tickets: Tickets, level: int, chains: Sequence[Chain], what: str) -> None:
    """Check that chains have a level from 1 on."""
    check_level(tickets.study, level)
    if level < 1:
        raise UserError(f"{what}: expected a level from 1 on; level 0 is the dense network")
    tickets.require([level], chains)


def _shuffle(mask: Mask, seed: int, draw: int) -> Mask:
    return shuffle(mask, derive(seed, "control", draw))


def _draw_weights(planner: Planner, seed: int, draw: int) -> Weights:
    """Return newly drawn weights; they are drawn each time that they are loaded."""

    def load() -> State:
        return initial_state(planner.problem.build, derive(seed, "control", draw))

    return Weights(state_hash(load()), load)


def _keep_signs(planner: Planner, own: Weights, drawn: Weights) -> Weights:
    """Return drawn weights with the signs of a ticket's own weights."""

    def load() -> State:
        return keep_signs(own.load(), drawn.load(), planner.dense, planner.shared)

    return Weights(state_hash(load()), load)

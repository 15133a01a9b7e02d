"""Partial reinitialisation: are connections that tickets share found again where all other weights are drawn anew?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np
import polars as pl
import torch

from tombola.analysis.chance import interval, interval_of_two, moments, support
from tombola.analysis.gather import ALL, after, by_level, select_chains
from tombola.analysis.winners import mean_with_interval
from tombola.errors import UserError
from tombola.pruning.mask import Mask
from tombola.store.store import DamagedResultError
from tombola.streams import derive
from tombola.study.planner import Chain, Planner
from tombola.training.train import initial_state
from tombola.training.weights import State, Weights


@dataclass(frozen=True)
class Plan:
    """The trainings of one seed's partial reinitialisations.

    Args:
        seed: whose initialisation is kept in part; data order and all else is the seed's too.
        kept: the connections that keep their initial weights: those that the compared tickets share.
        planner: of the draws: a study like any other, but for its initial weights. Its chains have the number of a
            draw, 1 and on, as their seed, and `seed` as their data seed.
    """

    seed: int
    kept: Mask
    planner: Planner


def plans(
    planner: Planner,
    level: int,
    draws: int,
    importances: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Plan]:
    """Return what is to be trained, for each seed of a study.

    Args:
        planner: of the study.
        level: of the tickets whose shared connections are kept, and up to which the procedure is run again.
        draws: of the other weights.
        importances: whose tickets are compared and run again; two or more, by default all.
        seeds: which of the study's; by default all.

    Raises:
        UserError: where level or importances are not there, or the tickets share nothing.
    """
    seeds = planner.study.seeds if seeds is None else seeds
    chains = [chain for chain in select_chains(planner, importances, at_least=2) if chain.seed in seeds]
    names = tuple(dict.fromkeys(chain.importance for chain in chains))
    if level < 1:
        raise UserError("reinit: at level 0 every connection is shared, it needs a level from 1 on")
    if draws < 1:
        raise UserError(f"draws: expected 1 or more, got {draws}")
    asked = range(1, draws + 1)
    return [_plan(planner, level, names, seed, kept, asked) for seed, kept in _shared(planner, level, chains).items()]


def _shared(planner: Planner, level: int, chains: Sequence[Chain]) -> dict[int, Mask]:
    """Return the connections that the tickets of these chains share at a level, by seed.

    Raises:
        UserError: where the level is not there or they share nothing.
    """
    ((_, tickets),) = by_level(planner, chains, [level])
    shared: dict[int, Mask] = {}
    for chain, ticket in tickets.items():
        shared[chain.seed] = ticket.mask & shared.get(chain.seed, ticket.mask)
    for seed, kept in shared.items():
        if not kept.alive:
            raise UserError(f"reinit: the tickets of seed {seed} share no connection at level {level}")
    return shared


def _plan(planner: Planner, level: int, names: Sequence[str], seed: int, kept: Mask, draws: Sequence[int]) -> Plan:
    """Return the trainings of these draws of one seed."""
    theta_0 = planner.initial(seed).load()
    states = {
        draw: partly_new(theta_0, initial_state(planner.problem.build, new_seed(seed, draw)), kept) for draw in draws
    }
    initial = {draw: Weights.of(state) for draw, state in states.items()}
    about = {"reinit": {"level": level, "draws": max(draws), "importances": list(names)}}
    return Plan(seed, kept, planner.restarted(initial, seed, tuple(names), level, about))


def stored(planner: Planner) -> pl.DataFrame:
    """Return the table of `of_plans` for every partial reinitialisation of a study that is in its store.

    Before its columns comes `compared`: the importances whose tickets were compared, in the study's order. Of each
    level and set of importances there are the seeds that have a first draw, and the draws that all these have.

    Args:
        planner: of the study.

    Raises:
        UserError: where there is none.
    """
    study = planner.study
    records = (planner.store.record(one.name) for one in planner.store.entries() if one.kind == "result")
    notes = [record["reinit"] for record in records if "reinit" in record]
    asked = {
        (note["level"], tuple(name for name in study.importances if name in note["importances"]))
        for note in notes
        if note["level"] <= study.levels and set(note["importances"]) <= set(study.importances)
    }
    tables = []
    for level, names in sorted(asked, key=lambda each: (each[0], -len(each[1]), each[1])):
        there = {seed: found for seed in study.seeds if (found := _draws(planner, level, names, seed))}
        draws = range(1, 1 + min((number for _, number in there.values()), default=0))
        complete = [_plan(planner, level, names, seed, kept, draws) for seed, (kept, _) in there.items()]
        tables += [after(of_plans(complete), compared=list(names))] if there else []
    if not tables:
        raise UserError(f"no partial reinitialisation is in {planner.store.root}")
    return pl.concat(tables)


def _draws(planner: Planner, level: int, names: Sequence[str], seed: int) -> tuple[Mask, int] | None:
    """Return what one seed's reinitialisations keep, and how many draws the store has from the first on; None for 0."""
    try:
        kept = _shared(planner, level, [Chain(seed, name) for name in names])[seed]
    except DamagedResultError:
        raise
    except UserError:  # the study has no such tickets: another one asked
        return None

    def done(draw: int) -> bool:
        other = _plan(planner, level, names, seed, kept, [draw]).planner
        return all(len(other.progress(chain).tickets) == level + 1 for chain in other.chains)

    number = sum(1 for _ in takewhile(done, count(1)))
    return (kept, number) if number else None


def new_seed(seed: int, draw: int) -> int:
    """Return the seed from which the other weights of a draw come."""
    return derive(seed, "reinitialisation", draw)


def partly_new(initial: State, drawn: State, kept: Mask) -> State:
    """Return the state `drawn`, with the weights of `initial` where `kept` is alive.

    >>> kept = Mask.from_tensors({"w": torch.tensor([True, False])})
    >>> partly_new({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}, kept)
    {'w': tensor([1., 4.])}
    """
    return {
        name: torch.where(kept[name], initial[name], tensor) if name in kept else tensor
        for name, tensor in drawn.items()
    }


def of_plans(found: Sequence[Plan]) -> pl.DataFrame:
    """Return how much more often than by chance the kept connections survive.

    The columns of `of_masks`, after level, importance and seed.

    Args:
        found: of `plans`, whose trainings are done.

    Raises:
        UserError: where they are not.
    """
    tables = []
    for plan in found:
        study = plan.planner.study
        ((level, tickets),) = by_level(plan.planner, plan.planner.chains, [study.levels])
        for name in study.importances:
            masks = [tickets[Chain(draw, name, plan.seed)].mask for draw in study.seeds]
            tables.append(after(of_masks(plan.kept, masks), level=level, importance=name, seed=plan.seed))
    return pl.concat(tables)


def of_masks(kept: Mask, masks: Sequence[Mask]) -> pl.DataFrame:
    """Return how much more often than by chance kept connections survive, over the draws.

    One row for each layer, and one for all ("(all)"), with the columns

    - layer. connections: how many it has. kept: how many kept their initial weights. draws: how many there are.
    - alive, survived: connections alive in a draw's ticket, and kept ones among them; means over draws.
    - expected: of survived, by chance: kept x alive / connections in each layer (for "(all)" their sum, so that it says
      nothing about how layers differ); mean over draws.
    - excess: survived / expected - 1, the mean over draws; 0.085 is "+8.5 %". low, high: its 95 % interval over draws
      by Student's t; null for one draw.
    - chance_low, chance_high: between which survived / expected - 1 of one draw lies in 95 % of the cases where the
      ticket is a random mask with the same layer densities (see `tombola.analysis.chance`); means over draws.
      All of these are null where nothing is expected.

    Args:
        kept: the connections that kept their initial weights.
        masks: of the draws' tickets.

    >>> kept = Mask.from_tensors({"w": torch.tensor([1, 1, 0, 0]).bool()})
    >>> found = Mask.from_tensors({"w": torch.tensor([1, 1, 0, 0]).bool()})
    >>> of_masks(kept, [found]).select("survived", "expected", "excess").row(0)
    (2.0, 1.0, 1.0)
    """
    sizes = np.array(list(kept.sizes.values()), dtype=np.int64)
    of_kept = np.array(list(kept.counts.values()), dtype=np.int64)
    alive = np.array([list(mask.counts.values()) for mask in masks], dtype=np.int64)
    survived = np.array([list((mask & kept).counts.values()) for mask in masks], dtype=np.int64)
    sets = np.stack([np.broadcast_to(of_kept, alive.shape), alive])
    expected, variance = moments(sizes, sets)
    low, high = interval_of_two(np.broadcast_to(sizes, alive.shape), sets)
    least, largest = (bound.sum(axis=1) for bound in support(sizes, sets))
    total_low, total_high = interval(expected.sum(axis=1), variance.sum(axis=1), least, largest)
    lines = []
    for number, name in enumerate([*kept, ALL]):
        part = slice(number, number + 1) if name != ALL else slice(None)
        by_chance = expected[:, part].sum(axis=1)
        counts = survived[:, part].sum(axis=1)
        bounds = (total_low, total_high) if name == ALL else (low[:, number], high[:, number])
        line = {
            "layer": name,
            "connections": int(sizes[part].sum()),
            "kept": int(of_kept[part].sum()),
            "draws": len(masks),
            "alive": float(alive[:, part].sum(axis=1).mean()),
            "survived": float(counts.mean()),
            "expected": float(by_chance.mean()),
        }
        names = ("excess", "low", "high", "chance_low", "chance_high")
        figures: Sequence[float | None] = [None] * 5
        if (by_chance > 0).all():
            over_draws = mean_with_interval((counts / by_chance - 1).tolist())
            figures = [*over_draws, *(float((bound / by_chance - 1).mean()) for bound in bounds)]
        lines.append(line | dict(zip(names, figures, strict=True)))
    return pl.DataFrame(lines, schema_overrides=dict.fromkeys(names, pl.Float64))

"""Partial reinitialisation: are shared connections found again after the remaining weights are reinitialised?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import polars as pl

from tombola.analysis.chance import interval, interval_of_two, moments, support
from tombola.analysis.gather import ALL, after, by_level
from tombola.analysis.winners import mean_with_interval
from tombola.errors import NothingStoredError
from tombola.pruning.mask import Mask
from tombola.study.reinitialisation import Plan, list_notes, plan_again
from tombola.study.tickets import Tickets


def of_study(tickets: Tickets) -> pl.DataFrame:
    """Return the table of `of_plans` for every partial reinitialisation of a study that its store has.

    Before its columns comes `compared`: the importances whose tickets were compared, in the study's order. Of each
    level and set of importances there are the seeds that have a first draw, and the draws that all of these have.

    Args:
        tickets: of the study.

    Raises:
        NothingStoredError: where the store has none.
        tombola.errors.DamagedResultError: where a stored result is damaged.
    """
    tables = []
    stored = len(tickets.planner.store.results.notes("reinit"))  # each draw that the store has is one of them or more
    for (level, names), most in list_notes(tickets).items():
        plans = [plan_again(tickets, level, min(most, stored), names, seed) for seed in tickets.study.seeds]
        pairs = [(plan, Tickets(plan.planner)) for plan in plans if plan is not None]
        found = {plan.seed: (plan, own, number) for plan, own in pairs if (number := count_draws(plan, own))}
        draws = min((number for _, _, number in found.values()), default=0)
        tables += [after(_of_draws(plan, own, draws), compared=list(names)) for plan, own, _ in found.values()]
    if not tables:
        raise NothingStoredError(f"no partial reinitialisation is in {tickets.planner.store.root}")
    return pl.concat(tables)


def count_draws(plan: Plan, tickets: Tickets) -> int:
    """Return how many draws of a plan the store has, from the first on.

    Args:
        plan: the plan.
        tickets: of the plan's planner.
    """
    complete = tickets.study.levels + 1
    found = takewhile(
        lambda chains: all(len(tickets.progress(each).tickets) == complete for each in chains), plan.draws()
    )
    return sum(1 for _ in found)


def of_plans(plans: Sequence[Plan]) -> pl.DataFrame:
    """Return how much more often than by chance the kept connections survive.

    The columns of `of_masks`, after level, importance and seed.

    Args:
        plans: of `tombola.study.reinitialisation.plan`, whose trainings are done.

    Raises:
        NothingStoredError: where they are not done.
    """
    return pl.concat([_of_draws(plan, Tickets(plan.planner), len(plan.planner.study.seeds)) for plan in plans])


def _of_draws(plan: Plan, tickets: Tickets, draws: int) -> pl.DataFrame:
    """Return the table of `of_plans` of one seed, over the first draws."""
    study = tickets.study
    chains = [chain for chain in tickets.planner.chains if chain.seed <= draws]
    ((level, found),) = by_level(tickets, chains, [study.levels])
    tables = []
    for name in study.importances:
        masks = [ticket.mask for chain, ticket in found.items() if chain.importance == name]
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

    >>> import torch
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

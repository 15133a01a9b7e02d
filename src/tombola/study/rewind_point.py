"""The rewind point: plan the trainings that find the iteration from which two data orders stay connected.

At an iteration k, the network (or a ticket that is rewound to k) is trained to the end twice, with two data orders
(Frankle et al., arXiv 1912.05671). Before k the two share everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tombola.errors import UserError
from tombola.study.chains import Chain, Start
from tombola.study.controls import list_orders
from tombola.study.planner import Planner
from tombola.study.singles import NOTE, find_training, list_notes, name_dense, plan_singles
from tombola.study.tickets import Tickets, check_level

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""The iterations that are tried by default, as shares of a training."""


@dataclass(frozen=True)
class Point:
    """The trainings of one iteration.

    Args:
        iteration: the iteration k.
        planner: the planner of the study with its rewind point at k: the dense networks, and the tickets if any.
        chains: the chains of the planner, one for each seed.
        levels: the levels whose networks are trained with another data order: 0, and that of the tickets if any.
        order: the seed of the other data order.
        density: that of the masks whose overlap is compared: the density of the study's last level.
    """

    iteration: int
    planner: Planner
    chains: tuple[Chain, ...]
    levels: tuple[int, ...]
    order: int
    density: float

    @cached_property
    def tickets(self) -> Tickets:
        """The tickets of the planner, which are read when they are first used."""
        return Tickets(self.planner)

    def plan_orders(self) -> tuple[Planner, dict[tuple[int, int], Chain]]:
        """Return the planner of the trainings with another data order, and their chains by seed and level.

        What begins with a network that the store does not have yet is left out.
        """
        starts: dict[Chain, Start] = {}
        places: dict[tuple[int, int], Chain] = {}
        for chain in self.chains:
            there = len(self.tickets.progress(chain).tickets)
            for level in (each for each in self.levels if each < there):
                ticket, training = find_training(self.tickets, chain, level)
                own = Chain(chain.seed, f"from {self.iteration}, level {level}", self.order)
                starts[own] = Start(level, ticket.rewind, ticket.mask, training.begin, training.end)
                places[chain.seed, level] = own
        note = {name: value for name, value in self.planner.about[NOTE].items() if name != "of"}
        planner = plan_singles(self.tickets, starts, note)
        planner.about = dict(self.planner.about)  # the dense networks of the study itself, whatever its rewind point
        return planner, places


def plan_rewind_points(
    tickets: Tickets,
    iterations: Sequence[int] | None = None,
    level: int | None = None,
    importance: str | None = None,
) -> list[Point]:
    """Return the trainings of each iteration that is tried, from the first on.

    Args:
        tickets: the tickets of the study; the store need not have any.
        iterations: the iterations; by default shares of a training, see `SHARES`.
        level: the level of the tickets that are tried besides the dense network, found anew for each iteration; None
            for the dense network alone.
        importance: the importance of these tickets; by default the first of the study.

    Raises:
        UserError: if an argument is invalid, or if tickets of the study are not rewound.
        DamagedResultError: if a stored result is damaged.
    """
    study, planner = tickets.study, tickets.planner
    if study.recipe.rewind_to != "weights":
        raise UserError(
            f"rewind point: with recipe.rewind_to = {study.recipe.rewind_to!r} tickets are not rewound to an iteration"
        )
    end = planner.end
    tried = sorted({round(share * end) for share in SHARES}) if iterations is None else sorted(set(iterations))
    if not tried:
        raise UserError("rewind point: no iterations to try; name at least one")
    for each in tried:
        if not 0 <= each < end:
            raise UserError(f"rewind point: iteration {each} is not within the training, which has {end}")
    if level is not None:
        check_level(study, level)
    name = importance or study.importances[0]
    if name not in study.importances:
        raise UserError(
            f"importances: the study has no importance {name!r}; choose from {', '.join(study.importances)}"
        )
    (order,) = list_orders(study, 1)
    note = {"verb": "rewind-point", "level": level or 0, "importances": [name], "iterations": tried}
    about = {NOTE: {**note, "of": name_dense(tickets)}}
    fields = {"importances": (name,), "data_seeds": (), "data_seeds_for": (), "levels": level or 0}
    density = (1 - study.fraction) ** study.levels
    points = []
    for each in tried:
        recipe = study.recipe.model_copy(update={"rewind": each})
        other = study.model_copy(update={**fields, "recipe": recipe})
        own = Planner(other, planner.problem, planner.store, initial=planner.initial, about=about)
        points.append(Point(each, own, tuple(own.chains), (0, level) if level else (0,), order, density))
    return points


def list_planners(points: Sequence[Point]) -> Iterator[Planner]:
    """Yield the planners of all trainings in an order in which they can be done: each when its turn comes."""
    for point in points:
        yield point.planner
        yield point.plan_orders()[0]


def list_rewind_points(tickets: Tickets) -> list[tuple[list[int], int | None, str]]:
    """List the rewind points of a study that its store has trainings of: iterations, level or None, importance."""
    study = tickets.study
    found: dict[tuple[int, str], set[int]] = {}
    for note in list_notes(tickets, "rewind-point"):
        known = {each for each in note["iterations"] if each < tickets.planner.end}
        for name in note["importances"]:
            if name in study.importances and note["level"] <= study.levels:
                found.setdefault((note["level"], name), set()).update(known)
    return [(sorted(each), level or None, name) for (level, name), each in sorted(found.items()) if each]

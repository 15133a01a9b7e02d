"""Single trainings: those that further analyses add to the chains of a study, planned, stored and resumed like them.

Each training has a note in its record: the verb that asked for it, with its arguments, and the names of the dense
networks of the study, from which it is known whose it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from tombola.errors import UserError
from tombola.lottery.ticket import Ticket
from tombola.study.chains import Chain, Start
from tombola.study.planner import Planner
from tombola.study.tickets import Tickets
from tombola.study.trainings import Training

NOTE = "further"
"""The name of the note in a training's record."""

_EMPTY: Mapping[str, Any] = {
    **{"level": 0, "draws": 1, "importances": [], "kinds": [], "iterations": []},
    **{"over": "", "source": "", "origin": "", "trainings": []},
}
"""The arguments of the verbs, where a note does not have them."""


def plan_singles(tickets: Tickets, starts: Mapping[Chain, Start], note: Mapping[str, Any]) -> Planner:
    """Return the planner of single trainings, which differ from those of a study in what they begin with.

    Args:
        tickets: the tickets of the study.
        starts: what each training begins with. The seed of its chain is that of the initialisation, the data seed that
            of the data order, and the importance is a text that says what it is.
        note: the verb that asks for the trainings (`verb`), and its arguments.
    """
    planner = tickets.planner
    study = planner.study.model_copy(update={"levels": 0, "data_seeds": (), "data_seeds_for": ()})
    about = {NOTE: {**note, "of": name_dense(tickets)}}
    return Planner(study, planner.problem, planner.store, initial=planner.initial, starts=starts, about=about)


def name_dense(tickets: Tickets, seeds: Collection[int] | None = None) -> list[str]:
    """Return the names of the first training of seeds of a study, by default all, whether the store has it or not."""
    planner = tickets.planner
    end = planner.study.recipe.rewind or planner.end
    wanted = {(chain.seed, chain.order_seed) for chain in planner.chains if seeds is None or chain.seed in seeds}
    return sorted(planner.training(order, planner.initial(seed), planner.dense, 0, end).key for seed, order in wanted)


def find_training(tickets: Tickets, chain: Chain, level: int) -> tuple[Ticket, Training]:
    """Return the ticket of a level of a chain, with its mask in memory, and the training that it was trained by.

    Args:
        tickets: the tickets of the study.
        chain: a chain that has the level.
        level: the level.
    """
    progress = tickets.progress(chain)
    trainings = [training for training in progress.trainings if training.end >= tickets.planner.end]
    ticket = progress.tickets[level]
    return replace(ticket, mask=ticket.mask.load()), trainings[level]


def list_notes(tickets: Tickets, verb: str) -> list[dict[str, Any]]:
    """Return the notes of the trainings of a study that a verb asked for, each once, in the order of their texts."""
    dense = set(name_dense(tickets))
    notes = (note for note in _read_notes(tickets).values() if note["verb"] == verb and dense & set(note["of"]))
    found = {repr(sorted(note.items())): note for note in notes}
    return [found[text] for text in sorted(found)]


def count_notes(tickets: Tickets, verb: str) -> int:
    """Return how many trainings of the store a verb asked for."""
    return sum(note["verb"] == verb for note in _read_notes(tickets).values())


def list_single_needs(tickets: Tickets, needs: Iterable[str]) -> set[str]:
    """Return the names of the stored trainings that belong to a study and not to its chains.

    Args:
        tickets: the tickets of the study.
        needs: the names of what its chains need.
    """
    own = set(needs)
    return {key for key, note in _read_notes(tickets).items() if own & set(note["of"])}


def check_weights_elsewhere(tickets: Tickets, what: str) -> None:
    """Raise `UserError` if tickets begin with trained weights, because then other connections have no weights."""
    how = tickets.study.recipe.rewind_to
    if how != "weights":
        raise UserError(
            f"{what}: it needs weights for other connections than those of a ticket, and with recipe.rewind_to = "
            f"{how!r} tickets begin with trained weights, which only their own connections have"
        )


def _read_notes(tickets: Tickets) -> dict[str, dict[str, Any]]:
    return {key: {**_EMPTY, **note} for key, note in tickets.planner.store.results.notes(NOTE).items()}

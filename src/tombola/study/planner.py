"""Planning: which trainings a study needs, and which of them are done.

A study is one chain of tickets for each importance and seed. A chain is the paper's Algorithm 2 with a `train` that
looks results up; where one is not there yet, that training is what the chain waits for. Trainings are named by their
arguments, so chains that need the same training wait for the same name, and it is done once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tombola.errors import UserError
from tombola.importance import IMPORTANCES
from tombola.kernels import sparse_layers
from tombola.lottery.rewinding import check_levels, lottery_ticket_rewinding, prune_round
from tombola.lottery.ticket import Ticket
from tombola.pruning.mask import Mask
from tombola.store.names import name_of
from tombola.store.store import DamagedResultError, Store
from tombola.study.schema import Study
from tombola.study.task import Problem, resolve_importance
from tombola.training.history import Trained
from tombola.training.train import initial_state
from tombola.training.weights import Weights

SCHEME = 2
"""Version of how trainings are named and done: to be raised where `train` comes to give other bits."""

PRUNING = 1
"""Version of `prune` and the built-in importances: to be raised where they come to give other masks."""


THREADS = 1
"""Threads of a training: a part of its name, since they decide the order of sums."""


@dataclass(frozen=True)
class Training:
    """One training: its name and its arguments.

    Args:
        key: SHA-256 of the identity.
        identity: all that decides the bits of its result, as JSON's types.
        initial: the weights it starts from.
        mask: the connections that are alive.
        seed: of data order and every other random choice.
        begin, end: its iterations.
    """

    key: str
    identity: dict[str, Any]
    initial: Weights
    mask: Mask
    seed: int
    begin: int
    end: int


class MissingError(Exception):
    """A training that a chain needs and the store does not have."""

    def __init__(self, training: Training) -> None:
        super().__init__(training.key)
        self.training = training


@dataclass(frozen=True)
class Chain:
    """The tickets of one seed by one importance.

    Args:
        seed: of the initialisation, and of data order and every other random choice.
        importance: what is pruned by.
        data_seed: of all but the initialisation, where it is another one; None where it is the same.
    """

    seed: int
    importance: str
    data_seed: int | None = None

    def __str__(self) -> str:
        other = "" if self.data_seed is None else f", data order {self.data_seed}"
        return f"{self.importance}, seed {self.seed}{other}"


@dataclass(frozen=True)
class Progress:
    """How far a chain is.

    Args:
        tickets: those whose trainings are done, from level 0 on.
        waits_for: the training to be done next; None where the chain is at its end.
        remaining: trainings it still needs.
        shared: the first of these that every chain of the seed needs, or that this one waits for.
        stopped: why the chain cannot go on, where its importance fails on what was trained.
    """

    tickets: tuple[Ticket, ...]
    waits_for: Training | None = None
    remaining: int = 0
    shared: int = 0
    stopped: str | None = None


class Planner:
    """Names a study's trainings and follows its chains through a store.

    Args:
        study: what to run.
        problem: the study's task, loaded.
        store: where results lie.
        remember: whether masks are taken from the store where it has them, and not derived anew.

    Attributes:
        chains: importances x seeds, which the study's results are about.
        repeats: chains of the first importance with further data orders: what the noise floor is made of.
        about: what the records of its trainings say besides; for `tombola store gc`.

    Raises:
        UserError: where importances, layers to exclude or levels are not possible.

    >>> import pathlib, tempfile
    >>> from tombola import load_problem, load_study
    >>> study = load_study("digits", {"importances": ("l1",), "seeds": (0,), "levels": 2})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     planner = Planner(study, load_problem(study.task), Store(pathlib.Path(folder) / "store"))
    ...     planner.progress(planner.chains[0]).remaining
    3
    """

    def __init__(self, study: Study, problem: Problem, store: Store, *, remember: bool = True) -> None:
        self.study = study
        self.problem = problem
        self.store = store
        self.end = study.recipe.total_iterations(len(problem.data.train_inputs))
        self.chains = [Chain(seed, importance) for seed in study.seeds for importance in study.importances]
        first = study.importances[0]
        self.repeats = [Chain(seed, first, data_seed) for seed in study.seeds for data_seed in study.data_seeds]
        self._initial: dict[int, Weights] = {}
        self._importances = {name: resolve_importance(name) for name in study.importances}
        self._derived: dict[str, Mask] = {}
        self._remember = remember
        self.about: dict[str, Any] = {}
        self._model = problem.build()
        self.dense = Mask.ones_like(self._model, study.exclude)
        check_levels(self.dense.total, study.fraction, study.levels)
        for name in [name for name in study.importances if name not in IMPORTANCES]:  # whether they work, before all
            self._pruned(self.initial(study.seeds[0]), self.dense, 0, Chain(study.seeds[0], name))

    def restarted(
        self,
        initial: Mapping[int, Weights],
        seed: int,
        importances: tuple[str, ...],
        levels: int,
        about: dict[str, Any],
    ) -> Planner:
        """Return a planner of the same study from other initial weights.

        Args:
            initial: by numbers that take the place of its chains' seeds.
            seed: of data order and every other random choice, for all of them.
            importances: which of the study's.
            levels: how far, at most as far as the study.
            about: see `Planner`.
        """
        other = copy.copy(self)
        other.about = about
        fields = {"seeds": tuple(initial), "data_seeds": (), "importances": importances, "levels": levels}
        other.study = self.study.model_copy(update=fields)
        other._initial = dict(initial)
        other.chains = [Chain(number, importance, seed) for number in initial for importance in importances]
        other.repeats = []
        return other

    def initial(self, seed: int) -> Weights:
        """The initial weights of a seed."""
        if seed not in self._initial:
            self._initial[seed] = Weights.of(initial_state(self.problem.build, seed))
        return self._initial[seed]

    def tickets(self, chain: Chain) -> Iterator[Ticket]:
        """Yield the tickets of a chain, level by level, as far as the store has them.

        Raises:
            Missing: where the store does not have the training that comes next.
            DamagedResultError: where the store's result is damaged.
        """
        about: dict[str, Any] = {
            "study": self.study.model_dump(mode="json"),
            "importance": chain.importance,
            "seed": chain.seed,
        }
        if chain.data_seed is not None:
            about["data_seed"] = chain.data_seed
        found = lottery_ticket_rewinding(
            partial(self._looked_up, _data_seed(chain)),
            partial(self._pruned, chain=chain),
            self.initial(chain.seed),
            self.dense,
            rewind=self.study.recipe.rewind,
            end=self.end,
            levels=self.study.levels,
        )
        for ticket in found:
            yield replace(ticket, provenance=about)

    def trainings(self, chain: Chain) -> list[Training]:
        """Return the trainings of a chain that the store has, the rewind point's first.

        Raises:
            DamagedResultError: where a stored result is damaged.
        """
        tickets = self.progress(chain).tickets
        initial, rewind = self.initial(chain.seed), self.study.recipe.rewind
        found = [self._training(_data_seed(chain), t.rewind, t.mask, rewind, self.end) for t in tickets]
        if rewind and (point := self._training(_data_seed(chain), initial, self.dense, 0, rewind)).key in self.store:
            found.insert(0, point)
        return found

    def keys(self, chain: Chain) -> list[str]:
        """Return the names of the trainings of a chain that the store has, the rewind point's first."""
        return [training.key for training in self.trainings(chain)]

    def progress(self, chain: Chain) -> Progress:
        """Return how far a chain is.

        Raises:
            DamagedResultError: where a stored result is damaged.
        """
        tickets: list[Ticket] = []
        try:
            tickets.extend(self.tickets(chain))
        except MissingError as missing:
            shared = 2 if missing.training.end < self.end else 1  # level 0 comes after the rewind point
            to_come = self.study.levels - len(tickets) + shared
            return Progress(tuple(tickets), missing.training, to_come, shared)
        except DamagedResultError:
            raise
        except UserError as error:  # of the importance; other chains go on
            return Progress(tuple(tickets), stopped=str(error))
        return Progress(tuple(tickets))

    def _looked_up(self, seed: int, initial: Weights, mask: Mask, begin: int, end: int) -> Trained:
        training = self._training(seed, initial, mask, begin, end)
        trained = self.store.get(training.key)
        if trained is None:
            raise MissingError(training)
        return trained

    def _training(self, seed: int, initial: Weights, mask: Mask, begin: int, end: int) -> Training:
        recipe, device = self.study.recipe, self.study.device
        sparse = sparse_layers(
            self._model, mask, batch_size=recipe.batch_size, precision=recipe.precision, device=device
        )
        identity = {
            "scheme": SCHEME,
            **self.problem.identity,
            "recipe": recipe.identity(),
            "seed": seed,
            "initial": initial.hash,
            "mask": mask.hash,
            "begin": begin,
            "end": end,
            "threads": THREADS,
            "device": device,
            "sparse": sparse,
        }
        return Training(name_of(identity), identity, initial, mask, seed, begin, end)

    def _pruned(self, weights: Weights, mask: Mask, level: int, chain: Chain) -> Mask:
        """Prune as `prune_round` does, or recall what that gave.

        By a built-in importance it is remembered in the store. A user's own may have been edited since, so what it
        gave is remembered no longer than this planner is.
        """
        study = self.study
        name = name_of([PRUNING, weights.hash, mask.hash, chain.importance, study.fraction, _data_seed(chain), level])
        built_in = self._remember and chain.importance in IMPORTANCES
        remembered = self.store.mask(name) if built_in else self._derived.get(name)
        if remembered is not None:
            return remembered
        pruned = prune_round(
            weights,
            mask,
            level,
            importance=self._importances[chain.importance],
            fraction=study.fraction,
            seed=_data_seed(chain),
        )
        if built_in:
            self.store.put_mask(name, pruned)
        else:
            self._derived[name] = pruned
        return pruned


def _data_seed(chain: Chain) -> int:
    return chain.seed if chain.data_seed is None else chain.data_seed

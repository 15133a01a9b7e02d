"""Planning: find out which trainings a study needs and which of them its store has.

A study has one chain of tickets for each importance and seed. To follow a chain, the planner runs the paper's Algorithm
2 with a `train` that looks up results in the store. If a result is missing, the chain waits for that training.
Trainings are named by their arguments, so chains that need the same training wait for the same name, and it is done
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from tombola.errors import DamagedResultError, RoundError, UserError, expect, expect_flags
from tombola.importance import NetworkScore, is_built_in
from tombola.inputs import call
from tombola.kernels import can_pack, find_perceptron, have_convolutions
from tombola.lottery.rewinding import lottery_ticket_rewinding
from tombola.lottery.rule import Rule, check_rule, check_score_at, resolve_shares
from tombola.lottery.search import EARLY
from tombola.lottery.ticket import Ticket
from tombola.pruning.coverage import Coverage, cover
from tombola.pruning.eligible import list_shared, prunable
from tombola.pruning.mask import Mask, resolve_kept_dense
from tombola.store.store import Store
from tombola.streams import ambient
from tombola.study.behaviour import Observed, identify, keep_behaviour, observe_study
from tombola.study.chains import Chain, Diverged, Finished, Need, Progress, Start, Stopped, Waiting
from tombola.study.rounds import compute_mask
from tombola.study.schema import Study
from tombola.study.task import Problem, load_importance, load_recipe
from tombola.study.trainings import Round, Training, name_mask, name_training
from tombola.training.accumulation import counts_positions
from tombola.training.history import Trained
from tombola.training.loss_functions import training_loss
from tombola.training.replaceable import choose_layers, find_fault, may_be_sparse
from tombola.training.weights import Weights

_TRIES = 10
"""How often a run numbers what its network computes, if other runs take the number before."""


class Planner:
    """Names a study's trainings and follows its chains through a store.

    Args:
        study: the study to plan.
        problem: the data set, model and loss of the study.
        store: the store with the results.
        initial: a function that returns the initial weights of a seed; by default it initialises the model.
        chains: the chains of the study; by default one for each importance and seed.
        starts: single trainings; each stands in the place of a chain, whose importance is any text, and whose only
            ticket is what the training gives.
        remember: whether to read masks from the store if it has them; otherwise all masks are computed again.
        about: extra metadata for the records of the trainings.

    Attributes:
        about: extra metadata for the records of all trainings.
        about_each: extra metadata for the record of one training, by its name; it takes precedence over `about`.
        chains: the chains that the study's results are about.
        repeats: chains with further data orders, for the noise floor: those of the importances that the study's
            `data_seeds_for` names, or of the first importance.
        model: the network, with arbitrary weights.
        dense: the mask of the dense network.
        shared: the other names of the mask's weights that modules share.
        kept_dense: the layers that are counted and never pruned, by parameter name.
        rule: what all rounds of pruning have in common.
        end: the number of iterations of a complete training.

    Raises:
        UserError: if the importances, the layers to exclude or the number of levels are invalid.

    >>> import pathlib, tempfile
    >>> from tombola import load_problem, load_study
    >>> study = load_study("digits", {"importances": ("l1",), "seeds": (0,), "levels": 2})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     planner = Planner(study, load_problem(study.task), Store(pathlib.Path(folder) / "store"))
    ...     planner.progress(planner.chains[0]).remaining
    3
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        store: Store,
        *,
        initial: Callable[[int], Weights] | None = None,
        chains: Sequence[Chain] | None = None,
        starts: Mapping[Chain, Start] | None = None,
        remember: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        expect(study, Study, "study", "a tombola.Study")
        expect(problem, Problem, "problem", "a tombola.Problem")
        expect(store, Store, "store", "a tombola.Store")
        expect_flags(remember=remember)
        self.study = study
        self.problem = problem
        self.store = store
        self.about = dict(about or {})
        self.about_each: dict[str, Mapping[str, Any]] = {}
        self.end = study.recipe.total_iterations(problem.data.train_examples)
        own = [Chain(seed, importance) for seed in study.seeds for importance in study.importances]
        self._starts = dict(starts or {})
        self.chains = list(self._starts) if starts is not None else own if chains is None else list(chains)
        self.repeats = [
            Chain(seed, importance, data_seed)
            for seed in study.seeds
            for data_seed in study.data_seeds
            for importance in study.repeated
        ]
        self._initialise = initial or (lambda seed: Weights.of(problem.initial(seed)))
        self._initial: dict[int, Weights] = {}
        loaded = {name: load_importance(name) for name in study.importances}
        self._importances = {name: importance for name, (importance, _) in loaded.items()}
        self._sources = {name: sources for name, (_, sources) in loaded.items()}
        _, self._recipe_sources = load_recipe(study.recipe)
        self._computed: dict[str, Mask] = {}
        self._sparse: dict[tuple[tuple[str, int], ...], list[str]] = {}
        self._failures: dict[str, str] = {}
        self._remember = remember
        with ambient(0):
            self.model = problem.build()
        self.dense = Mask.ones_like(self.model, study.exclude, study.prune)
        self.shared = {name: others for name, others in list_shared(self.model).items() if name in self.dense}
        left_out = prunable(self.model, study.prune).keys() - self.dense.keys()
        self.kept_dense = resolve_kept_dense(self.dense, study.keep_dense, left_out, list_shared(self.model))
        shares = resolve_shares(self.dense, study.shares)
        self.rule = Rule(study.fraction, self.kept_dense, study.selection, shares)
        check_rule(self.rule, self.dense, study.levels)
        for importance in self._importances.values():
            check_score_at(study.score_at, importance, study.recipe.rewind_to)
        for name in [name for name in study.importances if not is_built_in(name)]:  # fail before any training
            pruning = self.first_round(name)
            self._prune(pruning.weights, self.dense, 0, pruning.rewind, Chain(pruning.seed, name))

    @property
    def coverage(self) -> Coverage:
        """What density is about: the parameters that are pruned, kept dense, left out and not chosen."""
        return cover(self.model, self.dense, self.kept_dense, self.study.prune)

    @cached_property
    def kernel_fault(self) -> str | None:
        """A sentence on why no layer of the network may be replaced by a sparse one; None if all may be."""
        study, problem = self.study, self.problem
        if study.kernels == "off" or problem.step is not None:
            return None
        return find_fault(self.model, problem.data, study.recipe, problem.loss, study.device, forward=problem.forward)

    @cached_property
    def _can_pack(self) -> bool:
        """Whether activations may stay packed between sparse convolutions, see `tombola.kernels.are_packed`."""
        return self.problem.forward is call and can_pack(self.model)

    @cached_property
    def _is_perceptron(self) -> bool:
        """Whether the network may be trained as a perceptron, see `tombola.kernels.find_perceptron`."""
        recipe, problem = self.study.recipe, self.problem
        found = find_perceptron(
            self.model,
            precision=recipe.precision,
            device=self.study.device,
            loss=training_loss(recipe, problem.loss, problem.step),
            forward=problem.forward,
            step=problem.step,
        )
        return found is not None

    @cached_property
    def _counts_positions(self) -> bool:
        """Whether accumulated batches count by positions, see `tombola.training.accumulation.counts_positions`."""
        problem = self.problem
        return counts_positions(self.study.recipe, problem.data, problem.loss, problem.step)

    def describe_counted(self) -> str:
        """Return a sentence on what density is about, and a second one if it is about a small part of the network.

        >>> import pathlib, tempfile
        >>> from tombola import load_problem, load_study
        >>> study = load_study("digits", {"levels": 2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(Planner(study, load_problem(study.task), Store(pathlib.Path(folder) / "s")).describe_counted())
        Density counts 50200 of the network's 50610 parameters; 1000 of these are kept dense (fc.weight).
        """
        coverage = self.coverage
        return " ".join(filter(None, (coverage.describe(), coverage.warn())))

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What identifies data, network and loss in the names of trainings, see `tombola.study.behaviour.identify`."""
        return identify(self.observed, self.store)

    @cached_property
    def observed(self) -> Observed:
        """What the code of the study computes, see `tombola.study.behaviour.observe_study`."""
        return observe_study(self.problem, self.model, self.study.recipe)

    def keep_behaviour(self) -> None:
        """Store what the network computes, before results of it are stored.

        Raises:
            UserError: if it cannot be written.
        """
        for _ in range(_TRIES):
            if keep_behaviour(self.observed, self.store, self.identity):
                return
            del self.identity  # another run has taken the number
        raise UserError(f"store {self.store.root}: other runs write what this study's network computes; try again")

    def initial(self, seed: int) -> Weights:
        """Return the initial weights of a seed."""
        if seed not in self._initial:
            self._initial[seed] = self._initialise(seed)
        return self._initial[seed]

    def levels(self, chain: Chain) -> Sequence[int]:
        """Return the levels of a chain's tickets, from 0 on."""
        return (0, *chain.path) if chain.path or chain.early else range(self.study.levels + 1)

    @property
    def early_end(self) -> int:
        """The iteration at which trainings end that end early, see `tombola.lottery.search.EARLY`."""
        begin = self.study.recipe.rewind
        return begin + max(1, round(EARLY * (self.end - begin)))

    def length(self, chain: Chain, level: int) -> int:
        """Return the number of iterations of the training of a level of a chain; that of -1 is the rewind point."""
        begin = self.study.recipe.rewind
        if level < 0:
            return begin
        return (self.early_end if chain.early and level < self.levels(chain)[-1] else self.end) - begin

    def learning_length(self, importance: str) -> int:
        """Return the iterations of training that see as many examples as a round of an importance does to learn a mask.

        It is 0 for importances that learn nothing, see `tombola.importance.NetworkScore.passes`.
        """
        score, recipe = self._importances[importance].score, self.study.recipe
        if not isinstance(score, NetworkScore):
            return 0
        examples = min(self.study.score_examples, self.problem.data.held_examples)
        return math.ceil(score.steps * score.passes * examples / (recipe.batch_size * recipe.accumulate))

    def is_rewind_point(self, training: Training) -> bool:
        """Return whether a training of a chain is that of the rewind point, with which it begins if there is one."""
        return training.begin < self.study.recipe.rewind

    def fraction(self, chain: Chain, level: int) -> float:
        """Return the fraction of the alive connections that the round after a level of a chain removes.

        A round to the next level but k removes 1 - (1 - f)^k, so that it leaves as many as k rounds of the study.
        """
        after = next((each for each in self.levels(chain) if each > level), level + 1)
        fraction = self.study.fraction
        return fraction if after == level + 1 else 1 - (1 - fraction) ** (after - level)

    def training(self, seed: int, initial: Weights, mask: Mask, begin: int, end: int) -> Training:
        """Return a training of the study, with its name.

        Args:
            seed: the seed of the data order and of every other random choice.
            initial: the weights at the start.
            mask: the connections that are alive.
            begin, end: the range of iterations, begin..end-1.
        """
        sparse = self._choose_layers(mask)
        return name_training(
            self.identity,
            self.study.recipe,
            initial,
            mask,
            seed=seed,
            begin=begin,
            end=end,
            device=self.study.device,
            sparse=sparse,
            packed=have_convolutions(mask, sparse) and self._can_pack,
            perceptron=self._is_perceptron,
            positions=self._counts_positions,
            behaviour=self.observed.computes,
            sources=self._recipe_sources,
        )

    def _choose_layers(self, mask: Mask) -> list[str]:
        """Return the names of the weights whose layers a training makes sparse; many masks have the same densities."""
        counts = tuple(sorted(mask.counts.items()))
        if counts not in self._sparse:
            allowed = "off" if self.problem.step is not None else self.study.kernels
            traced = may_be_sparse(self.study.recipe, self.study.device, allowed) and have_convolutions(mask, mask)
            packed = traced and self._can_pack
            sparse = choose_layers(self.model, mask, self.study.recipe, self.study.device, allowed, packed=packed)
            self._sparse[counts] = [] if sparse and self.kernel_fault else sparse
        return self._sparse[counts]

    def progress(self, chain: Chain, find: Callable[[str], Trained | None] | None = None) -> Progress:
        """Follow a chain through the store and return its progress.

        Args:
            chain: a chain of one of the study's importances.
            find: a function that returns the result of a training by its name, or None if there is none; by default it
                reads the store.

        Raises:
            UserError: if trainings of the chain end early, and the study cannot prune by such trainings.
            DamagedResultError: if a stored result is damaged.
        """
        find = find or self.store.results.get
        if chain.early and not can_prune_early(self.study):
            raise UserError(
                "early: masks are taken early from trainings whose weights are scored and rewound; the study has "
                f"score_at = {self.study.score_at!r} and recipe.rewind_to = {self.study.recipe.rewind_to!r}, so name "
                "another strategy"
            )
        if chain in self._starts:
            return self._progress_single(chain, self._starts[chain], find)
        asked: list[tuple[Training, Trained | None]] = []
        missing: list[Round] = []

        def look_up(initial: Weights, mask: Mask, begin: int, end: int) -> Trained | None:
            training = self.training(chain.order_seed, initial, mask, begin, end)
            asked.append((training, find(training.key)))
            return asked[-1][1]

        def prune(weights: Weights, mask: Mask, level: int, rewind: Weights) -> Mask | None:
            found = self._prune(weights, mask, levels[level], rewind, chain)
            if isinstance(found, Mask):
                return found
            missing.append(found)
            return None

        study, levels = self.study, self.levels(chain)
        algorithm = lottery_ticket_rewinding(
            look_up,
            prune,
            self.initial(chain.seed),
            self.dense,
            rewind=study.recipe.rewind,
            end=self.end,
            levels=len(levels) - 1,
            score_at=study.score_at,
            rewind_to=study.recipe.rewind_to,
            early=self.early_end if chain.early else None,
        )
        tickets: list[Ticket] = []
        provenance = self._provenance(chain)
        stopped = None
        try:
            for ticket in algorithm:
                training, trained = asked[-1]
                if trained is None or len(tickets) < ticket.level:  # a level before this one is not trained yet
                    continue
                mask = self._unload(training, chain, tickets[-1]) if tickets else self.dense
                asked[-1] = replace(training, mask=mask), trained
                level = levels[ticket.level]
                tickets.append(replace(ticket, level=level, mask=mask, provenance=provenance, shared=self.shared))
        except RoundError as error:
            stopped = Stopped(str(error))
        trainings = tuple(training for training, trained in asked if trained is not None)
        ended = stopped or (Finished() if len(tickets) == len(levels) else Diverged())
        waiting = self._wait(asked, missing, len(levels), stopped=stopped is not None, early=chain.early)
        return Progress(tuple(tickets), trainings, waiting or ended)

    def _progress_single(self, chain: Chain, start: Start, find: Callable[[str], Trained | None]) -> Progress:
        """Look up a single training and return its progress."""
        training = self.training(chain.order_seed, start.weights, start.mask, start.begin, start.end)
        trained = find(training.key)
        if trained is None:
            return Progress((), (), Waiting(training, 1, 1))
        provenance = self._provenance(chain)
        ticket = Ticket(start.level, start.mask, start.weights, trained, provenance, self.shared)
        return Progress((ticket,), (training,), Finished())

    def name_masks(self, chain: Chain, tickets: Sequence[Ticket]) -> list[str]:
        """Return the names under which the store remembers the masks that these tickets of a chain are pruned to."""
        return [self._name_mask(chain, ticket) for ticket in tickets if ticket.level < self.levels(chain)[-1]]

    def first_round(self, importance: str) -> Round:
        """Return the round that prunes the initial network of the first seed by an importance."""
        seed = self.study.seeds[0]
        weights, chain = self.initial(seed), Chain(seed, importance)
        name = self._name(weights, self.dense, 0, weights, chain)
        return self._round(name, weights, weights, self.dense, 0, chain)

    def compute(self, pruning: Round) -> None:
        """Do a round of pruning in this process, and remember its mask or its failure."""
        try:
            mask = compute_mask(pruning, self.problem, self.study, self.rule, self._importances[pruning.importance])
        except RoundError as error:
            self.fail(pruning.key, str(error))
        else:
            self.keep(pruning.key, mask)

    def keep(self, name: str, mask: Mask) -> None:
        """Remember the mask that a round of pruning gave, in the store too."""
        if not self.store.masks.put(name, mask):
            self._computed[name] = mask

    def fail(self, name: str, reason: str) -> None:
        """Note that the importance failed in a round of pruning; the chains that wait for it end there."""
        self._failures[name] = reason

    def has(self, need: Need) -> bool:
        """Return whether the store has the result of a training, or the mask of a round of pruning."""
        if isinstance(need, Training):
            return need.key in self.store.results
        return self._find_mask(need.key) is not None

    def _wait(
        self,
        asked: Sequence[tuple[Training, Trained | None]],
        rounds: Sequence[Round],
        levels: int,
        *,
        stopped: bool,
        early: bool,
    ) -> Waiting | None:
        """Return what a chain waits for; None if it needs nothing.

        Args:
            asked: the trainings that the chain needs as far as they are known, with their results.
            rounds: the round of pruning whose mask is not known yet, if any.
            levels: the number of the chain's levels, level 0 included.
            stopped: whether the importance failed, so that no other trainings are needed.
            early: whether trainings end early, so that not all chains share the training of level 0.
        """
        trainings = [training for training, trained in asked if trained is None]
        if not trainings and not rounds:
            return None
        done = sum(trained is not None and not self.is_rewind_point(training) for training, trained in asked)
        rewind = sum(map(self.is_rewind_point, trainings))  # level 0 comes after the rewind point
        remaining = len(trainings) if stopped else levels - done + rewind
        if rounds:
            return Waiting(rounds[0], remaining, 0, tuple(trainings))
        return Waiting(trainings[0], remaining, 1 if early else 1 + rewind, tuple(trainings[1:]))

    @cached_property
    def _document(self) -> dict[str, Any]:
        """The study as a document of JSON types, which the tickets of all chains share."""
        return self.study.model_dump(mode="json")

    def _provenance(self, chain: Chain) -> dict[str, Any]:
        about: dict[str, Any] = {
            "study": self._document,
            "importance": chain.importance,
            "seed": chain.seed,
        }
        about |= {} if chain.data_seed is None else {"data_seed": chain.data_seed}
        about |= {"path": list(chain.path)} if chain.path else {}
        return about | {"early_end": self.early_end} if chain.early else about

    def _prune(self, weights: Weights, mask: Mask, level: int, rewind: Weights, chain: Chain) -> Mask | Round:
        """Prune as `prune_round` does; return the remembered mask if there is one.

        The scores of whole networks are computed by workers: until then, the round of pruning is returned. The store
        remembers the masks that they give and those of built-in importances. A user's own score of a layer may have
        been edited since, so its masks are remembered only by this planner.
        """
        name = self._name(weights, mask, level, rewind, chain)
        if name in self._failures:
            raise RoundError(self._failures[name])
        importance = self._importances[chain.importance]
        by_worker = isinstance(importance.score, NetworkScore)
        known = self._computed.get(name)
        if known is None and self._remember and (by_worker or is_built_in(chain.importance)):
            known = self.store.masks.get(name)
        if known is not None:
            return known
        pruning = self._round(name, weights, rewind, mask, level, chain)
        if by_worker and self._remember:
            return pruning
        found = compute_mask(pruning, self.problem, self.study, self.rule, importance)
        if self._remember and is_built_in(chain.importance):
            self.store.masks.put(name, found)
        else:
            self._computed[name] = found
        return found

    def _round(self, name: str, weights: Weights, rewind: Weights, mask: Mask, level: int, chain: Chain) -> Round:
        others = self._name_others(rewind, chain.importance)
        of_network = isinstance(self._importances[chain.importance].score, NetworkScore)
        computes = self.observed.computes if of_network else ()
        return Round(
            name,
            weights,
            rewind,
            mask,
            level,
            chain.importance,
            chain.order_seed,
            self.fraction(chain, level),
            others,
            computes,
        )

    def _name(self, weights: Weights, mask: Mask, level: int, rewind: Weights, chain: Chain) -> str:
        return name_mask(
            weights,
            mask,
            level,
            importance=chain.importance,
            fraction=self.fraction(chain, level),
            seed=chain.order_seed,
            kept_dense=self.kept_dense,
            others=self._name_others(rewind, chain.importance),
        )

    def _name_others(self, rewind: Weights, name: str) -> dict[str, Any]:
        """Return what determines a mask besides the arguments that all rounds have; empty for the paper's rounds."""
        study, importance, others = self.study, self._importances[name], dict[str, Any]()
        if self._sources[name]:
            others["sources"] = self._sources[name]
        if study.selection != "global":
            others["selection"] = [study.selection, sorted(self.rule.shares.items())]
        if importance.reads_rewind_point:
            others["rewind"] = rewind.hash
        if isinstance(importance.score, NetworkScore):
            others["network"] = {
                **self.identity,
                "examples": study.score_examples,
                "batch_size": study.recipe.batch_size,
                "device": study.device,
            }
        return others

    def _name_mask(self, chain: Chain, ticket: Ticket) -> str:
        """Return the name of the mask that a ticket is pruned to."""
        assert ticket.trained is not None
        scored = ticket.trained.weights if self.study.score_at == "end" else ticket.rewind
        return self._name(scored, ticket.mask, ticket.level, ticket.rewind, chain)

    def _find_mask(self, name: str) -> Mask | None:
        return self._computed.get(name) or self.store.masks.get(name)

    def _unload(self, training: Training, chain: Chain, before: Ticket) -> Mask:
        """Return the mask of a stored training without its bits in memory; they are read each time they are used.

        Args:
            training: the training of a ticket.
            chain: the chain of the ticket.
            before: the ticket of the previous level.
        """
        name, key, expected = self._name_mask(chain, before), training.key, training.mask.hash

        def load() -> Mask:  # without `training`, which holds the bits
            known = self._find_mask(name)
            if known is None or known.hash != expected:
                known = self.store.results.read_mask(key, self.dense.shapes)
            if known.hash != expected:
                raise DamagedResultError(key, "its mask is not the one that its name was computed from")
            return known

        return training.mask.unload(load)


def can_prune_early(study: Study) -> bool:
    """Return whether a study can prune by trainings that end early: it scores trained weights, and rewinds weights."""
    return study.score_at == "end" and study.recipe.rewind_to == "weights"

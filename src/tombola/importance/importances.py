"""The type of an importance, a score with its normalisation, and the built-in importances."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

from tombola.errors import ImportanceError, UserError, did_you_mean, expect
from tombola.importance import normalisation, scores
from tombola.importance.network_scores import NETWORK_SCORES, NetworkScore
from tombola.importance.normalisation import NORMALISATIONS, Normalisation
from tombola.importance.scores import LAYER_SCORES, Score, Survivors
from tombola.streams import generator


@dataclass(frozen=True)
class Importance:
    """A score with its normalisation: normalise(score(survivors)), layer by layer.

    Args:
        score: a function that rates the surviving connections of a layer, see `tombola.importance.scores`, or a score
            of the whole network, see `tombola.importance.network_scores`.
        normalise: a function that makes the scores of all layers comparable, see `tombola.importance.normalisation`.

    >>> importance = Importance(scores.magnitude, normalisation.l1)
    >>> importance.name
    'l1'
    >>> importance(torch.tensor([3.0, 1.0]))
    tensor([0.7500, 0.2500])
    """

    score: Score | NetworkScore
    normalise: Normalisation = normalisation.identity

    @property
    def name(self) -> str:
        """The name `score/normalisation`, without the identity and, as in the paper, without the magnitude.

        >>> Importance(scores.random, normalisation.l1).name, Importance(scores.random).name
        ('random/l1', 'random')
        >>> Importance(scores.magnitude, normalisation.l1).name, Importance(scores.magnitude).name
        ('l1', 'magnitude')
        """
        if self.normalise is normalisation.identity:
            return _name_of(self.score)
        if self.score is scores.magnitude:
            return _name_of(self.normalise)
        return f"{_name_of(self.score)}/{_name_of(self.normalise)}"

    @property
    def description(self) -> str:
        """The formula in one line, from the docstrings of the two functions; x are the scores, by default |w|.

        >>> Importance(scores.magnitude, normalisation.min_max).description
        '(x - min x) / (max x - min x), in 0..1'
        >>> Importance(scores.random, normalisation.min_max).description
        '(x - min x) / (max x - min x), in 0..1, of the score random'
        """
        if self.normalise is normalisation.identity:
            return _first_line_of(self.score)
        of = "" if self.score is scores.magnitude else f", of the score {_name_of(self.score)}"
        return _first_line_of(self.normalise) + of

    @property
    def reads_rewind_point(self) -> bool:
        """Whether the scores may depend on the weights at the rewind point."""
        return self.score not in (scores.magnitude, scores.random) and not isinstance(self.score, NetworkScore)

    def of(self, survivors: Survivors) -> Tensor:
        """Return the importances of a layer's n surviving connections, of shape (n,) in flat order.

        Raises:
            ImportanceError: if the score needs the whole network.
        """
        if isinstance(self.score, NetworkScore):
            raise ImportanceError("it needs the whole network, not one layer's weights alone")
        return self.normalise(self.score(survivors))

    def __call__(self, magnitudes: Tensor, seed: int = 0) -> Tensor:
        """Return the importances of connections, given only their absolute weights.

        Args:
            magnitudes: the absolute weights |w|, of shape (n,).
            seed: the seed of the random numbers that the score may draw.
        """
        return self.of(Survivors(magnitudes, generator(seed, "importance")))


def Seeded(function: Callable[[Tensor, torch.Generator], Tensor]) -> Importance:  # noqa: N802 (it was a class)
    """Return an importance that draws random numbers: `function(magnitudes, generator)`.

    Pruning calls the function with a separate generator for each layer and each round, derived from the seed.

    Args:
        function: a function (magnitudes, generator) -> importances; magnitudes are |w|, float64 of shape (n,).

    >>> coin = Seeded(lambda w, g: torch.randint(2, w.shape, generator=g))
    >>> bool((coin(torch.ones(8), seed=1) == coin(torch.ones(8), seed=1)).all())
    True
    """

    @wraps(function)
    def score(survivors: Survivors) -> Tensor:
        return function(survivors.magnitudes, survivors.generator)

    return Importance(score)


@dataclass(frozen=True)
class _OfMagnitudes:
    """A user's function of the absolute weights of a layer, as a score."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, survivors: Survivors) -> Tensor:
        return self.function(survivors.magnitudes)


def as_importance(importance: Importance | Callable[[Tensor], Tensor]) -> Importance:
    """Convert a function of the absolute weights of a layer to an importance; return an importance unchanged.

    Raises:
        UserError: if it is neither; a name, such as "l1", is found by `find`.

    >>> def cubic(weights):
    ...     return weights**3 / (weights**3).sum()
    >>> as_importance(cubic).name, as_importance(cubic)(torch.tensor([1.0, 1.0]))
    ('cubic', tensor([0.5000, 0.5000]))
    """
    if isinstance(importance, str):
        raise UserError(
            f"expected an importance, got the text {importance!r}; tombola.importance.find({importance!r}) finds it"
        )
    if not callable(importance):
        raise UserError(f"expected an importance or a function of a layer's weights, got {type(importance).__name__}")
    return importance if isinstance(importance, Importance) else Importance(_OfMagnitudes(importance))


def _name_of(part: Score | NetworkScore | Normalisation) -> str:
    function = _function_of(part)
    return str(getattr(function, "__name__", type(function).__name__))


def _function_of(part: Score | NetworkScore | Normalisation) -> Callable[..., object]:
    return part.function if isinstance(part, NetworkScore | _OfMagnitudes) else part


def _first_line_of(part: Score | NetworkScore | Normalisation) -> str:
    text = inspect.getdoc(_function_of(part)) or _name_of(part)
    return text.splitlines()[0].removeprefix("Return ").rstrip(".")


magnitude = Importance(scores.magnitude)
l1 = Importance(scores.magnitude, normalisation.l1)
l2 = Importance(scores.magnitude, normalisation.l2)
softmax = Importance(scores.magnitude, normalisation.softmax)
min_max = Importance(scores.magnitude, normalisation.min_max)
lamp = Importance(scores.magnitude, normalisation.lamp)
rank = Importance(scores.magnitude, normalisation.rank)
random = Importance(scores.random)

IMPORTANCES = {each.name: each for each in (magnitude, l1, l2, softmax, min_max, lamp, rank, random)}
"""The built-in importances by name, as on the command line and in studies."""


SCORES: dict[str, Score | NetworkScore] = {**LAYER_SCORES, **NETWORK_SCORES}
"""All scores by name."""


def find(name: str) -> Importance:
    """Return the importance with a name of `IMPORTANCES`, a score, or any score with any normalisation.

    The last is written `score/normalisation`. A normalisation alone is short for that of the magnitude.

    Raises:
        UserError: if there is no such importance, score or normalisation.

    >>> find("magnitude/rank").name, find("magnitude/l1") == l1, find("taylor").name
    ('rank', True, 'taylor')
    """
    expect(name, str, "importance", "its name, such as 'l1'")
    if name in IMPORTANCES:
        return IMPORTANCES[name]
    score, slash, normalise = name.partition("/")
    if not slash and name in NORMALISATIONS and name != "identity":
        score, normalise = "magnitude", name
    elif not slash:
        if name not in SCORES:
            raise UserError(
                f"unknown importance {name!r}; {did_you_mean(name, dict.fromkeys([*IMPORTANCES, *SCORES]))}"
            )
        normalise = "identity"
    return Importance(find_score(score, name), find_normalisation(normalise, name))


def find_score(name: str, importance: str) -> Score | NetworkScore:
    """Return the built-in score of this name; raise `UserError` if there is none, which names the importance."""
    if name not in SCORES:
        raise UserError(f"importance {importance!r}: unknown score {name!r}; {did_you_mean(name, SCORES)}")
    return SCORES[name]


def find_normalisation(name: str, importance: str) -> Normalisation:
    """Return the built-in normalisation of this name; raise `UserError` if there is none, like `find_score`."""
    if name not in NORMALISATIONS:
        close = did_you_mean(name, NORMALISATIONS)
        raise UserError(f"importance {importance!r}: unknown normalisation {name!r}; {close}")
    return NORMALISATIONS[name]


def is_built_in(name: str) -> bool:
    """Return whether `find` knows an importance of this name."""
    try:
        find(name)
    except UserError:
        return False
    return True

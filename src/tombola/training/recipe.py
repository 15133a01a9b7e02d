"""Recipe: the hyperparameters of a training as plain data."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tombola.errors import UserError, short
from tombola.exits import attribute_failure
from tombola.own.functions import refer, resolve
from tombola.training.fields import Fields

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]

_Item = TypeVar("_Item")

Reference = Annotated[str, Field(pattern="^[^:]+:[^:]+$")]
"""The name of a function of the user, `module:function`."""

Schedule: TypeAlias = Callable[[int, int], float]
"""A function (iteration, number of iterations) -> factor of the learning rate, 0 or more."""

RewindTo: TypeAlias = Literal["weights", "learning_rate", "nothing"]
"""What is rewound after a round of pruning, see `tombola.lottery.rewinding`."""

_LATER = ("betas", "no_decay", "clip_norm", "accumulate", "drop_last", "label_smoothing")
"""Fields that decide a training and came after the first version: a part of its name only if they are not default."""

_LARGEST_LR = 88  # the logarithm of the largest float32


def _tuple_of_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Tuple = Annotated[tuple[_Item, ...], BeforeValidator(_tuple_of_list)]
"""A tuple of any length, which can also be given as a list."""


class Augmentation(Fields):
    """Random changes of training images, which depend only on seed, epoch and example.

    >>> Augmentation(flip=True, crop=4).crop
    4
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    flip: bool = Field(default=False, description="mirror half of the images left to right")
    crop: Count = Field(default=0, description="pad images by this many zero pixels, then crop them at random")


class Recipe(Fields):
    """The hyperparameters of a training: optimizer, learning-rate schedule, length, and rewind point.

    The learning rate at iteration t is lr x warm-up x schedule, where the warm-up rises linearly over its iterations
    ((t + 1) / warmup, at most 1), and the schedule is 1 (constant), gamma^(milestones reached) or
    (1 + cos(pi t / T)) / 2 (cosine, T the number of iterations). A function may stand for `module:function`.

    >>> Recipe(epochs=2, batch_size=100).total_iterations(examples=250)
    6
    >>> import operator
    >>> Recipe(epochs=1, schedule=operator.truediv).schedule
    '_operator:truediv'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    optimizer: Literal["sgd", "adam", "adamw"] | Reference = Field(
        default="sgd", description="sgd, adam, adamw, or module:function of (parameters, learning rate)"
    )
    lr: Annotated[float, Field(gt=0)] = Field(default=0.1, description="learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="momentum of sgd; 0 is plain SGD")
    nesterov: bool = Field(default=False, description="use Nesterov's form of momentum")
    betas: Annotated[Tuple[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=(0.9, 0.999), description="decay rates of the two moments of adam and adamw"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight decay of every parameter")
    no_decay: Tuple[str] = Field(
        default=(), description="parameters without weight decay, such as *.bias; * matches any characters"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="largest norm of the gradients of all parameters together; larger gradients are scaled down",
    )
    schedule: Literal["constant", "milestones", "cosine"] | Reference = Field(
        default="constant",
        description="learning rate: constant, milestones, cosine, or module:function of (iteration, iterations)",
    )
    milestones: Tuple[Positive] = Field(
        default=(), description="epochs at which the learning rate is multiplied by gamma"
    )
    gamma: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="factor of the learning rate at each milestone"
    )
    warmup: Count = Field(default=0, description="iterations over which the learning rate rises from 0")
    batch_size: Positive = Field(default=128, description="number of examples in a batch")
    accumulate: Positive = Field(
        default=1,
        description="number of batches in an iteration, which updates the weights once, by their mean gradient",
    )
    drop_last: bool = Field(
        default=False, description="leave out the last iteration of an epoch if it has fewer examples than the others"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="label smoothing of the training loss, for cross_entropy only"
    )
    epochs: Positive | None = Field(default=None, description="length of a training in epochs (or give iterations)")
    iterations: Positive | None = Field(default=None, description="length of a training in iterations (or give epochs)")
    rewind: Count = Field(default=0, description="the iteration to whose weights tickets are rewound")
    rewind_to: RewindTo = Field(
        default="weights",
        description="what is rewound: weights (and the learning rate), learning_rate alone, or nothing (fine-tuning)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="precision of activations (bfloat16: torch's autocast); weights are float32"
    )
    augmentation: Augmentation = Field(default=Augmentation(), description="random changes of training images")

    @field_validator("optimizer", "schedule", mode="before")
    @classmethod
    def _refer(cls, value: Any, info: ValidationInfo) -> Any:
        return refer(value, f"recipe.{info.field_name}")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("give exactly one of epochs and iterations")
        if (self.schedule == "milestones") != bool(self.milestones):
            raise ValueError("milestones and schedule = 'milestones' go together: give both or neither")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must be strictly increasing")
        if self.gamma > 1 and len(self.milestones) * math.log(self.gamma) + math.log(self.lr) > _LARGEST_LR:
            raise ValueError(f"gamma: at the last milestone, the learning rate would be more than e^{_LARGEST_LR}")
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            field = "momentum" if self.momentum else "nesterov"
            raise ValueError(f"{field} belongs to optimizer = 'sgd', and {self.optimizer!r} does not use it: remove it")
        if ":" in self.optimizer and (self.weight_decay or self.betas != Recipe.model_fields["betas"].default):
            field = "weight_decay" if self.weight_decay else "betas"
            raise ValueError(
                f"{field} belongs to tombola's optimizers; set it in {self.optimizer!r}, and remove it here"
            )
        if self.optimizer == "sgd" and self.betas != Recipe.model_fields["betas"].default:
            raise ValueError("betas belong to adam and adamw, and 'sgd' does not use them: remove them")
        if self.no_decay and not self.weight_decay:
            raise ValueError("no_decay names parameters without weight decay, and weight_decay is 0: remove no_decay")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is a form of momentum, and momentum is 0: set momentum, or remove nesterov")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the recipe as a document of JSON types, from which the name of a training is computed.

        The document has the fields of tombola's first version, so that older stored results are found: in that version
        an optimizer was `sgd`, `momentum`, `nesterov`, `adam` or `adamw`, and an unused momentum was 0.9. Later fields
        are left out where they have their defaults. What is rewound is never in it: a training is a function of its
        initial weights and its iterations, whichever way led to them.

        >>> recipe = Recipe(epochs=1, momentum=0.8, nesterov=True)
        >>> [recipe.identity()[field] for field in ("optimizer", "momentum")]
        ['nesterov', 0.8]
        >>> [Recipe(epochs=1).identity()[field] for field in ("optimizer", "momentum")]
        ['sgd', 0.9]
        """
        document = self.model_dump(mode="json")
        del document["rewind_to"]
        for name in _LATER:
            if getattr(self, name) == Recipe.model_fields[name].default:
                del document[name]
        nesterov = document.pop("nesterov")
        if self.momentum:
            document["optimizer"] = "nesterov" if nesterov else "momentum"
        else:
            document["momentum"] = 0.9
        return document

    def iterations_per_epoch(self, examples: int) -> int:
        """Return the number of iterations in an epoch of this many examples; the last one may be smaller.

        >>> recipe = Recipe(epochs=1, batch_size=100, accumulate=2)
        >>> recipe.iterations_per_epoch(900), recipe.model_copy(update={"drop_last": True}).iterations_per_epoch(900)
        (5, 4)
        """
        size = self.batch_size * self.accumulate
        return examples // size if self.drop_last else math.ceil(examples / size)

    def total_iterations(self, examples: int) -> int:
        """Return the number of iterations of a complete training on this many examples."""
        if self.iterations is not None:
            return self.iterations
        assert self.epochs is not None
        return self.epochs * self.iterations_per_epoch(examples)

    @property
    def own_code(self) -> dict[str, str]:
        """The references to the user's own functions, `module:function`, by field."""
        named = {"optimizer": self.optimizer, "schedule": self.schedule}
        return {field: name for field, name in named.items() if ":" in name}

    def load_own(self, field: str) -> Callable[..., Any] | None:
        """Return the user's own function that a field names, `"optimizer"` or `"schedule"`; None if it names none.

        Raises:
            UserError: if there is no such function.
        """
        name = self.own_code.get(field)
        return None if name is None else resolve(name, f"recipe.{field}")

    def lr_at(self, iteration: int, examples: int, schedule: Schedule | None = None) -> float:
        """Return the learning rate at an iteration (counted from 0) of a training on this many examples.

        A training that goes on after its last iteration keeps the last learning rate.

        Args:
            iteration: the iteration.
            examples: the number of training examples.
            schedule: the user's function that the recipe names, if it names one; by default it is found by its name.

        Raises:
            UserError: if there is no such function, or if it does not return a finite number from 0.
        """
        iteration = min(iteration, self.total_iterations(examples) - 1)
        factor = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "milestones":
            epoch = iteration // self.iterations_per_epoch(examples)
            factor *= self.gamma ** sum(milestone <= epoch for milestone in self.milestones)
        elif self.schedule == "cosine":
            factor *= (1 + math.cos(math.pi * iteration / self.total_iterations(examples))) / 2
        elif ":" in self.schedule:
            factor *= self.own_factor(schedule, iteration, self.total_iterations(examples))
        return self.lr * factor

    def own_factor(self, schedule: Schedule | None, iteration: int, total: int, least: float = 0.0) -> float:
        """Return the factor of the learning rate that the user's own schedule gives.

        Raises:
            UserError: if it is no finite number from `least` on.
        """
        schedule = schedule or self.load_own("schedule")
        assert schedule is not None
        with attribute_failure(f"recipe.schedule {self.schedule!r}"):
            factor = schedule(iteration, total)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not least <= factor <= sys.float_info.max:
            raise UserError(
                f"recipe.schedule {self.schedule!r}: expected a finite number from 0, got {short(factor)} at iteration "
                f"{iteration} of {total}"
            )
        return float(factor)


def shorten(recipe: Recipe, share: float) -> Recipe:
    """Return a recipe whose trainings have a share of the length, with its milestones, warm-up and rewind point.

    >>> short = shorten(Recipe(epochs=20, schedule="milestones", milestones=(10, 15), warmup=8, rewind=100), 0.25)
    >>> short.epochs, short.milestones, short.warmup, short.rewind
    (5, (2, 4), 2, 25)
    >>> shorten(Recipe(iterations=4), 0.1).iterations
    1
    """
    fields = recipe.model_dump()
    for name in ("epochs", "iterations"):
        if fields[name] is not None:
            fields[name] = max(1, round(fields[name] * share))
    fields["milestones"] = tuple(sorted({max(1, round(each * share)) for each in recipe.milestones}))
    for name in ("warmup", "rewind"):
        fields[name] = round(fields[name] * share)
    return Recipe.model_validate(fields)

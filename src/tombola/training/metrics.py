"""Metrics: how good the outputs of a network on a whole split of the data are, each with the direction that is better.

The built-in metrics are sums over examples in float64, which are added batch by batch in the order of the data, so that
the outputs of a split need not be in memory at once. A user's own function of all outputs is given them together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tombola.errors import UserError, did_you_mean, kind_of
from tombola.exits import attribute_failure
from tombola.inputs import Tensors, concatenate, convert

IGNORED = -100
"""The class number of a position that does not count, such as padding; as in `torch.nn.functional.cross_entropy`."""

RESERVED = frozenset(
    {"alive", "collapsed", "density", "difference", "diverged", "high", "importance", "keeps", "level", "low"}
    | {"seed", "seeds", "surely"}
)
"""Columns of the tables in which a metric has a column of its own; no metric has one of these names."""


@dataclass(frozen=True)
class Measure:
    """What tickets are judged by, a metric on a split of the data, and how its values are written.

    Args:
        key: what identifies the metric in stored results: its name, for a user's own with the hash of its source.
        name: the name of the metric, which is in the names of columns.
        label: the name of the metric in sentences.
        split: "validation", or "test" for data without a validation split.
        higher_is_better: whether a higher value is better.
        percent: whether values are shares in 0..1, which are written in percent.

    >>> Measure().text(0.9), Measure("mse", "mse", "MSE", higher_is_better=False, percent=False).text(2903.5061)
    ('90.00 %', '2904')
    """

    key: str = "accuracy"
    name: str = "accuracy"
    label: str = "accuracy"
    split: str = "test"
    higher_is_better: bool = True
    percent: bool = True

    @property
    def column(self) -> str:
        """The name of the column with the values on this split, such as `test_accuracy`."""
        return f"{self.split}_{self.name}"

    @property
    def heading(self) -> str:
        """The heading of the column of a printed table: `accuracy %`, or only the label."""
        return f"{self.label} %" if self.percent else self.label

    @property
    def unit(self) -> str:
        """The unit of differences of values."""
        return "points" if self.percent else self.label

    @property
    def scale(self) -> int:
        """The factor between a value and what is written: 100 for percent."""
        return 100 if self.percent else 1

    def figure(self, value: float, *, sign: bool = False) -> str:
        """Return a value without its unit: two decimals in percent, else four significant digits.

        >>> Measure().figure(-0.0022, sign=True), Measure(percent=False).figure(0.51234)
        ('-0.22', '0.5123')
        """
        return f"{self.scale * value:{'+' if sign else ''}{'.2f' if self.percent else '.4g'}}"

    def spread(self, std: float) -> str:
        """Return a standard deviation: two decimals in percent, else two significant digits."""
        return self.figure(std) if self.percent else f"{std:.2g}"

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        return self.figure(value) + (" %" if self.percent else "")

    def gain(self, value: float, other: float) -> float:
        """Return by how much a value is better than another; it is negative if it is worse."""
        return value - other if self.higher_is_better else other - value


TEST_ACCURACY = Measure()
"""What tickets are judged by unless a task says otherwise."""


@dataclass(frozen=True)
class Metric:
    """A number that is computed from the outputs of a network on a whole split and from the targets.

    Args:
        name: its name.
        higher_is_better: whether a higher value is better.
        percent: whether values are shares in 0..1, which are written in percent.
        add: a function (state, outputs, targets) -> state that adds a batch; the state of no batch is None.
        value: a function of the state of all batches that returns the metric; NaN if it is not defined.
        label: the name in sentences; by default the name with spaces.
        key: what identifies it in stored results; by default the name.
        of_classes: whether the targets are numbers of classes, and the outputs have a score for each class.
        of_several: whether the targets may be several tensors.

    >>> state = MSE.add(None, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    >>> MSE.value(MSE.add(state, torch.tensor([0.0]), torch.tensor([1.0])))
    1.6666666666666667
    """

    name: str
    higher_is_better: bool
    percent: bool
    add: Callable[[Any, Tensor, Any], Any]
    value: Callable[[Any], float]
    label: str = ""
    key: str = ""
    of_classes: bool = False
    of_several: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name.replace("_", " "))
        object.__setattr__(self, "key", self.key or self.name)

    def on(self, split: str) -> Measure:
        """Return the metric on a split, without its computation."""
        return Measure(self.key, self.name, self.label, split, self.higher_is_better, self.percent)


def compute(metric: Metric, outputs: Tensor, targets: Tensor) -> float:
    """Return a metric of outputs and targets that are in memory.

    Raises:
        UserError: if the metric cannot take them.

    >>> compute(R2, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
    0.5
    """
    return metric.value(metric.add(None, outputs, targets))


def check_names(metrics: Sequence[Metric]) -> None:
    """Raise `UserError` if two metrics have the same name: their values would be in the same column.

    >>> check_names([ACCURACY, ACCURACY])
    Traceback (most recent call last):
    tombola.errors.UserError: task.metrics: two of them are called 'accuracy'; rename your function or leave one out
    """
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task.metrics: two of them are called {name!r}; rename your function or leave one out")


@contextmanager
def name_metric(metric: Metric) -> Iterator[None]:
    """Put the name of a metric before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task.metrics {metric.name!r}: {error}") from error


def _sum(
    name: str,
    *,
    higher: bool,
    parts: Callable[[Tensor, Tensor], Tensor],
    value: Callable[[Tensor], float],
    percent: bool = False,
    label: str = "",
    of_classes: bool = False,
) -> Metric:
    """Return the metric that is a function of sums over the examples.

    Args:
        name, percent, label, of_classes: see `Metric`.
        higher: whether a higher value is better.
        parts: a function of the outputs and targets of a batch that returns its sums in float64.
        value: a function of the sums over all batches.
    """

    def add(state: Tensor | None, outputs: Tensor, targets: Tensor) -> Tensor:
        more = parts(outputs, targets)
        return more if state is None else state + more

    return Metric(name, higher, percent, add, value, label, of_classes=of_classes)


def flatten_classes(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of classes as (positions, classes) and (positions,), without ignored positions.

    The classes are the second dimension of the outputs, as in torch's cross-entropy, or the last one.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise UserError(
            f"it needs class numbers as targets (int64), got {targets.dtype}; for numbers, choose r2, mse or mae"
        )
    shape, classes = tuple(outputs.shape), outputs.shape[1] if outputs.ndim > 1 else 0
    second = outputs.ndim > 1 and (shape[0], *shape[2:]) == tuple(targets.shape)
    last = outputs.ndim > 1 and shape[:-1] == tuple(targets.shape)
    if second and last and outputs.ndim > 2:
        raise UserError(
            f"outputs of shape {shape} do not show whether the classes are the second or the last dimension; "
            "use a length that is not the number of classes"
        )
    if not second and not last:
        raise UserError(
            f"it needs outputs with one more dimension than the targets, for the classes, got outputs of shape {shape} "
            f"and targets of shape {tuple(targets.shape)}"
        )
    scores = outputs.movedim(1, -1) if second else outputs
    classes = scores.shape[-1]
    scores, targets = scores.reshape(-1, classes), targets.reshape(-1)
    counted = targets != IGNORED
    if not counted.all():
        scores, targets = scores[counted], targets[counted]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise UserError(f"it needs targets in 0..{classes - 1} for outputs of {classes} classes, got {_range(targets)}")
    return scores, targets


def list_classes(targets: Tensor) -> Tensor:
    """Return the targets of all positions that count, shape (positions,), see `flatten_classes`.

    >>> list_classes(torch.tensor([[1, 0], [2, IGNORED]]))
    tensor([1, 0, 2])
    """
    flat = targets.flatten()
    return flat[flat != IGNORED]


def _range(targets: Tensor) -> str:
    return f"{int(targets.min())}..{int(targets.max())}"


def _numbers(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets that are numbers in float64."""
    if outputs.shape != targets.shape:
        raise UserError(
            f"it needs one output for each target, got outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}"
        )
    if targets.is_complex():
        raise UserError(f"it needs real targets, got {targets.dtype}")
    return outputs.double(), targets.double()


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each position whether the highest score is that of its class; a NaN score counts as wrong."""
    scores, classes = flatten_classes(outputs, targets)
    return (scores.argmax(1) == classes) & ~scores.isnan().any(1)


def _right_of_five(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each position whether its class is among the five highest; ties go to the lower number."""
    scores, classes = flatten_classes(outputs, targets)
    if scores.shape[1] < 5:
        raise UserError(f"it needs outputs of five classes or more, got {scores.shape[1]}")
    own, places = scores.gather(1, classes[:, None]), torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (places < classes[:, None]))
    return (before.sum(1) < 5) & ~scores.isnan().any(1)


def _share(name: str, right: Callable[[Tensor, Tensor], Tensor], label: str = "") -> Metric:
    """Return the metric that is the share of positions that are right."""

    def add(state: list[Tensor] | None, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        return [*(state or []), right(outputs, targets)]

    def value(state: list[Tensor]) -> float:
        return float(torch.cat(state).double().mean())  # the mean of all at once, as stored accuracies are

    return Metric(name, higher_is_better=True, percent=True, add=add, value=value, label=label, of_classes=True)


def _confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each class the numbers of positions: of the class, predicted as it, and both; shape (3, classes)."""
    scores, classes = flatten_classes(outputs, targets)
    number, predicted = scores.shape[1], scores.argmax(1)
    predicted = torch.where(scores.isnan().any(1), number, predicted)  # no class at all
    both = classes[predicted == classes]
    counts = [torch.bincount(each, minlength=number + 1)[:number] for each in (classes, predicted, both)]
    return torch.stack(counts).double()


def _f1(sums: Tensor) -> float:
    of_class, predicted, both = sums
    return _mean_of_present(2 * both, of_class + predicted)


def _iou(sums: Tensor) -> float:
    of_class, predicted, both = sums
    return _mean_of_present(both, of_class + predicted - both)


def _mean_of_present(part: Tensor, whole: Tensor) -> float:
    """Return the mean of part / whole over the classes that occur among targets or predictions."""
    return float((part / whole)[whole > 0].mean())


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of all positions, and their number."""
    scores, classes = flatten_classes(outputs, targets)
    total = functional.cross_entropy(scores, classes, reduction="none").double().sum()
    return torch.stack([total, torch.full_like(total, len(classes))])


def _mean(sums: Tensor) -> float:
    return float(sums[0] / sums[1])


def _perplexity(sums: Tensor) -> float:
    return float((sums[0] / sums[1]).exp())


def _errors(error: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that sums an error over all numbers, and counts them."""

    def parts(outputs: Tensor, targets: Tensor) -> Tensor:
        predicted, true = _numbers(outputs, targets)
        total = error(predicted - true).sum()
        return torch.stack([total, torch.full_like(total, true.numel())])

    return parts


def _add_variance(state: tuple[Tensor, Tensor] | None, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Add to (offset, sums): number, sum and sum of squares of the targets less an offset, and of squared errors.

    The offset is the first target, so that the sums of squares of targets far from 0 lose no digits.
    """
    predicted, true = (each.flatten(1) if each.ndim > 1 else each[:, None] for each in _numbers(outputs, targets))
    offset = true[0] if state is None else state[0]
    true, errors = true - offset, (predicted - true).square().sum(0)
    sums = torch.stack([torch.full_like(errors, len(true)), true.sum(0), true.square().sum(0), errors])
    return offset, sums if state is None else state[1] + sums


def _r2(state: tuple[Tensor, Tensor]) -> float:
    number, total, squares, errors = state[1]
    variance = squares - total.square() / number
    return float(torch.where(variance > 0, 1 - errors / variance, math.nan).mean())


ACCURACY = _share("accuracy", _right)
MSE = _sum("mse", higher=False, parts=_errors(torch.square), value=_mean, label="MSE")
R2 = Metric("r2", higher_is_better=True, percent=False, add=_add_variance, value=_r2, label="R2")

LOSS = Metric("loss", higher_is_better=False, percent=False, add=lambda *_: None, value=lambda _: math.nan)
"""The task's own loss, which an evaluation computes anyway."""

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        _share("top5_accuracy", _right_of_five, "top-5 accuracy"),
        _share("token_accuracy", _right),
        _sum("f1", higher=True, parts=_confusion, value=_f1, percent=True, label="F1", of_classes=True),
        _sum("mean_iou", higher=True, parts=_confusion, value=_iou, percent=True, label="mean IoU", of_classes=True),
        _sum(
            "cross_entropy", higher=False, parts=_cross_entropies, value=_mean, label="cross-entropy", of_classes=True
        ),
        _sum("perplexity", higher=False, parts=_cross_entropies, value=_perplexity, of_classes=True),
        MSE,
        _sum("mae", higher=False, parts=_errors(torch.abs), value=_mean, label="MAE"),
        R2,
        LOSS,
    )
}
"""The built-in metrics by name.

- accuracy, token_accuracy: the share of positions whose class has the highest score. top5_accuracy: that are among the
  five highest.
- f1: the mean over classes of 2 tp / (2 tp + fp + fn). mean_iou: of tp / (tp + fp + fn). Classes that occur neither
  among targets nor among predictions are left out.
- cross_entropy: the mean over positions. perplexity: exp of it. loss: the task's own loss.
- mse, mae: the mean over all numbers of the squared and of the absolute error.
- r2: 1 - sum of squared errors / sum of squared deviations from the mean, the mean over outputs if there are several;
  not defined if all targets are equal.

Targets of classes are int64; a position whose target is `IGNORED` does not count.
"""


def find(name: str) -> Metric:
    """Return a built-in metric.

    Raises:
        UserError: if there is none of this name.

    >>> find("perplexitty")
    Traceback (most recent call last):
    tombola.errors.UserError: unknown metric 'perplexitty'; did you mean 'perplexity'?
    """
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}; {did_you_mean(name, METRICS)}")
    return METRICS[name]


def load_metric(metric: Metric | str | Callable[..., Any]) -> Metric:
    """Return a metric: a built-in one by its name, or that of a function of the user, see `as_metric`.

    >>> load_metric("r2") is R2
    True
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        return find(metric)
    if not callable(metric):
        raise UserError(f"metrics: expected names of metrics or functions, got {type(metric).__name__}")
    name = str(getattr(metric, "__name__", type(metric).__name__))
    return as_metric(metric, name, name)


def as_metric(function: Callable[..., Any], name: str, key: str) -> Metric:
    """Return the metric of a user: a function of all outputs and targets, or what returns a `torchmetrics.Metric`.

    Args:
        function: a function (outputs, targets) -> number with the attribute `higher_is_better`, and `percent = True` if
            its values are shares in 0..1; or a function without arguments, or a class, that gives a
            `torchmetrics.Metric`.
        name: the name of the metric.
        key: what identifies it in stored results.

    Raises:
        UserError: if it is neither, or has no direction.

    >>> def largest_error(outputs, targets):
    ...     return (outputs - targets).abs().max()
    >>> largest_error.higher_is_better = False
    >>> compute(as_metric(largest_error, "largest_error", "k"), torch.tensor([1.0]), torch.tensor([3.0]))
    2.0
    """
    if name in METRICS:
        raise UserError(f"a metric of your own cannot be called {name!r}, like a built-in one; rename the function")
    if name in RESERVED:
        raise UserError(f"a metric cannot be called {name!r}, which is a column of the tables; rename the function")
    if _is_accumulator(function) or _takes_nothing(function):
        return _of_torchmetrics(function, name, key)
    higher = getattr(function, "higher_is_better", None)
    if not isinstance(higher, bool):
        raise UserError(
            f"metric {name!r}: it does not say which way is better; set {name}.higher_is_better = True or False"
        )

    def add(
        state: tuple[list[Tensor], list[Tensors]] | None, outputs: Tensor, targets: Tensors
    ) -> tuple[list[Tensor], list[Tensors]]:
        kept = state or ([], [])
        kept[0].append(outputs)
        kept[1].append(convert(torch.clone, targets))  # the function may change them
        return kept

    def value(state: tuple[list[Tensor], list[Tensors]]) -> float:
        with attribute_failure(name):
            result: Any = function(torch.cat(state[0]), concatenate(state[1]))
        return _as_number(result)

    return Metric(name, higher, bool(getattr(function, "percent", False)), add, value, key=key, of_several=True)


def _is_accumulator(value: object) -> bool:
    """Return whether this is a class like those of torchmetrics."""
    return isinstance(value, type) and hasattr(value, "update") and hasattr(value, "compute")


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _of_torchmetrics(build: Callable[[], Any], name: str, key: str) -> Metric:
    """Return the metric of a function that builds a `torchmetrics.Metric`, which is updated batch by batch."""
    with attribute_failure(name):
        one = build()
    if not all(callable(getattr(one, method, None)) for method in ("update", "compute")):
        raise UserError(
            f"expected a function of (outputs, targets), or one that gives a torchmetrics.Metric, got {one!r}"
        )
    higher = one.higher_is_better
    if not isinstance(higher, bool):
        raise UserError(f"{type(one).__name__} does not say which way is better; set its higher_is_better")
    percent = (getattr(one, "plot_lower_bound", None), getattr(one, "plot_upper_bound", None)) == (0, 1)

    def add(state: Any, outputs: Tensor, targets: Tensors) -> Any:
        with attribute_failure(name):
            state = state if state is not None else build().to(outputs.device)
            state.update(outputs, convert(torch.clone, targets))
        return state

    def value(state: Any) -> float:
        with attribute_failure(name):
            result = state.compute()
        return _as_number(result)

    return Metric(name, higher, percent, add, value, key=key, of_several=True)


def _as_number(result: object) -> float:
    """Return the result of a user's metric as a number; raise `UserError` if it is not one number."""
    if isinstance(result, Tensor) and result.numel() != 1:
        raise UserError(f"expected one number, got a tensor of shape {tuple(result.shape)}")
    try:
        if isinstance(result, Tensor):
            return float(result.detach())  # torch warns of a number that has a gradient
        if not isinstance(result, str | bytes):
            return float(result)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # OverflowError: a whole number of hundreds of digits
        pass
    raise UserError(f"expected one number, got {kind_of(result)}")

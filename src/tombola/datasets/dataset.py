"""A data set: the tensors of its inputs and targets."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tombola.datasets.drawn import Drawn
from tombola.errors import UserError, expect, kind_of, short
from tombola.inputs import Tensors, count_examples, list_tensors, select
from tombola.streams import generator

_LONGEST_NAME = 200


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, held in memory or mapped into it: nothing copies the whole of it.

    Inputs and targets are a tensor, a tuple of tensors or a dictionary of tensors, of any type. A model is called as
    `model(x)`, `model(*x)` or `model(**x)`.

    Args:
        name: its name.
        train_inputs: tensors of shape (n, ...). A uint8 tensor (n, channels, height, width) with `mean` and `std` is
            images, which these normalise when a batch is made. All other inputs are used unchanged; those of
            floating point must be finite.
        train_labels: the targets, shape (n, ...). With `classes`, they are int64 of shape (n,), each in
            0..len(classes)-1.
        test_inputs, test_labels: the same for the test set, with the same types and the same shapes of an example.
        classes: the classes' names; none if the targets are not numbers of classes.
        mean, std: one finite number per channel, for pixels in 0..1; images only. Tensors and arrays, or tuples
            of NumPy's numbers, become tuples of floats.
        drawn: the batches of the train set, if a function of the user draws them; then the train set above holds only
            the first examples. See `tombola.datasets.own_batches`.
        validation_inputs, validation_labels: the same for the validation set, on which tickets are judged; None
            if there is none, and then tickets are judged on the test set.

    Raises:
        UserError: if the parts do not match, if a tensor is not an ordinary one (sparse, nested, quantised or without
            data, or one that requires gradients), or if an input is NaN or infinite.

    >>> import torch
    >>> data = Dataset("two", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]),
    ...                torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), (0.5,), (0.5,))
    >>> data.input_shape
    (1, 2, 2)
    >>> texts = {"ids": torch.zeros(4, 7, dtype=torch.int64), "mask": torch.ones(4, 7, dtype=torch.bool)}
    >>> Dataset("texts", texts, torch.zeros(4, 3), texts, torch.zeros(4, 3)).input_shapes
    {"['ids']": (7,), "['mask']": (7,)}
    """

    name: str
    train_inputs: Tensors
    train_labels: Tensors
    test_inputs: Tensors
    test_labels: Tensors
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    drawn: Drawn | None = None
    validation_inputs: Tensors | None = None
    validation_labels: Tensors | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > _LONGEST_NAME:
            raise UserError(
                f"data set {short(self.name)}: its name must be a text of at most {_LONGEST_NAME} characters"
            )
        expect(self.drawn, Drawn | None, f"data set {self.name!r}: drawn", "batches that a function draws, or None")
        object.__setattr__(self, "classes", _read_classes(f"data set {self.name!r}", self.classes))
        for split in self.splits:
            inputs, labels = getattr(self, f"{split}_inputs"), getattr(self, f"{split}_labels")
            where = f"data set {self.name!r}, {split} set"
            _check_ordinary(where, inputs, labels)
            if self.classes:
                _check_classes(where, inputs, labels, len(self.classes))
            _check_equal(where, inputs, labels)
            for what, tensors, like in (("inputs", inputs, self.train_inputs), ("labels", labels, self.train_labels)):
                if _form(tensors) != _form(like):
                    raise UserError(
                        f"{where}: its {what} are {_name_form(tensors)}, the train set's {_name_form(like)}"
                    )
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(f"data set {self.name!r}: {name}", getattr(self, name)))
        if self.has_images:
            _check_images(self)
        elif self.mean + self.std and not all(t.is_floating_point() for t in list_tensors(self.train_inputs).values()):
            raise UserError(f"data set {self.name!r}: mean and std are for uint8 images; leave them out")
        for split in self.splits:
            for name, tensor in list_tensors(getattr(self, f"{split}_inputs")).items():
                if tensor.is_floating_point() or tensor.is_complex():
                    _check_finite(f"data set {self.name!r}, {split} set", name, tensor)

    @property
    def has_images(self) -> bool:
        """Whether the inputs are uint8 images, which are normalised by `mean` and `std`."""
        inputs = self.train_inputs
        return isinstance(inputs, Tensor) and inputs.dtype == torch.uint8 and bool(len(self.mean) or len(self.std))

    @property
    def train_examples(self) -> int:
        """The number of examples in an epoch."""
        drawn = self.drawn
        return self.held_examples if drawn is None else (drawn.per_epoch - 1) * drawn.batch_size + drawn.smallest

    def count(self, split: str) -> int:
        """Return the number of examples of a split: "train", "test" or "validation"."""
        if not isinstance(split, str) or split not in self.splits:
            raise UserError(f"split: expected one of {', '.join(map(repr, self.splits))}, got {kind_of(split)}")
        return self.train_examples if split == "train" else count_examples(getattr(self, f"{split}_inputs"))

    @property
    def held_examples(self) -> int:
        """The number of examples of the train set in memory: all, or the first of those that are drawn."""
        return count_examples(self.train_inputs)

    @property
    def test_examples(self) -> int:
        """The number of examples in the test set."""
        return count_examples(self.test_inputs)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of one example, by the name that `tombola.inputs.list_tensors` gives it."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in list_tensors(self.train_inputs).items()}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example.

        Raises:
            UserError: if the inputs are several tensors, see `input_shapes`.
        """
        if not isinstance(self.train_inputs, Tensor):
            raise UserError(f"data set {self.name!r}: its inputs are several tensors and have no single shape")
        return tuple(self.train_inputs.shape[1:])

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of its parts: train, test, and validation if there is one."""
        without = self.validation_inputs is None and self.validation_labels is None
        return ("train", "test") if without else ("train", "test", "validation")

    @property
    def judged_on(self) -> str:
        """The split on which tickets are judged: validation if there is one, else test."""
        return self.splits[-1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the data set that affects the bits of a training or the choice of a ticket.

        It is computed once, and again after a tensor was changed in place, which torch counts.
        """
        if self.drawn is not None:
            return self.drawn.fingerprint
        parts = [getattr(self, f"{split}_{part}") for split in self.splits for part in ("inputs", "labels")]
        tensors = [tensor for part in parts for tensor in list_tensors(part).values()]
        versions = [(id(each), 0 if each.is_inference() else each._version) for each in tensors]
        known, _, fingerprint = vars(self).get("_fingerprint", (None, None, ""))
        if known != versions:
            digests = [digest_of_part(part) for part in parts]
            fingerprint = fingerprint_of(len(self.classes), self.mean, self.std, digests)
            # The tensors are kept because the number of one that is gone may be given to another.
            object.__setattr__(self, "_fingerprint", (versions, tensors, fingerprint))
        return str(fingerprint)


def subset(dataset: Dataset, train_per_class: int | None = None, test_per_class: int | None = None) -> Dataset:
    """Return the first examples of each class, in the data set's own order, with its mean and std unchanged.

    Args:
        dataset: the whole data set; it is returned unchanged if nothing is to be removed.
        train_per_class: number of examples of each class to keep in the train set; None keeps all.
        test_per_class: the same for the test set.

    Raises:
        UserError: for a number below 1, or above the number of examples of a class.

    >>> from tombola.datasets.digits import digits
    >>> len(subset(digits(), train_per_class=10).train_inputs)
    100
    """
    expect(dataset, Dataset, "subset", "a tombola.Dataset")
    if train_per_class is None and test_per_class is None:
        return dataset
    train = _first(dataset, "train", train_per_class)
    test = _first(dataset, "test", test_per_class)
    return replace(
        dataset,
        train_inputs=select(dataset.train_inputs, train),
        train_labels=select(dataset.train_labels, train),
        test_inputs=select(dataset.test_inputs, test),
        test_labels=select(dataset.test_labels, test),
    )


def split_validation(dataset: Dataset, validation: float | int) -> Dataset:
    """Return the data set with a validation set that is carved from its train set.

    The examples are the first ones of one random permutation of the train set, whatever the seeds of a study. They
    stay in the order that they have in the train set. Mean and std stay those of the data set.

    Args:
        dataset: a data set without a validation set.
        validation: the number of examples, or their share of the train set if it is less than 1.

    Raises:
        UserError: if there is a validation set already, or if it or the train set would have no example.

    >>> from tombola.datasets.digits import digits
    >>> found = split_validation(digits(), 0.1)
    >>> len(found.train_inputs), len(found.validation_inputs)
    (1217, 135)
    """
    examples = dataset.held_examples
    if dataset.drawn is not None:
        raise UserError(
            f"task.validation: the training examples of {dataset.name!r} are drawn by a function; give it the "
            "attribute validation = True, let it draw batches of the split 'validation', and leave task.validation out"
        )
    if dataset.validation_inputs is not None:
        raise UserError(f"task.validation: data set {dataset.name!r} has a validation set of its own; leave it out")
    count = round(validation * examples) if validation < 1 else int(validation)
    if not 1 <= count < examples:
        raise UserError(
            f"task.validation = {short(validation)}: {count} of the {examples} train examples of {dataset.name!r} "
            "would be for validation; 1 or more are needed there, and for the training too"
        )
    order = torch.randperm(examples, generator=generator(0, "validation"))
    chosen, kept = order[:count].sort().values, order[count:].sort().values
    return replace(
        dataset,
        train_inputs=select(dataset.train_inputs, kept),
        train_labels=select(dataset.train_labels, kept),
        validation_inputs=select(dataset.train_inputs, chosen),
        validation_labels=select(dataset.train_labels, chosen),
    )


def rank_in_class(labels: Tensor) -> Tensor:
    """Return for each example the number of earlier examples of its class: shape (n,), int64.

    >>> rank_in_class(torch.tensor([0, 1, 0, 0, 1])).tolist()
    [0, 0, 1, 2, 1]
    """
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = torch.cumsum(counts, 0) - counts
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return ranks


def digest_of(tensor: Tensor) -> list[str]:
    """Return what identifies a tensor: its type, its shape and the SHA-256 of its bytes."""
    whole = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    # As strides, because the step of a dimension of one number may be more than 1, as that of x[:1, 0].
    row = whole.as_strided((whole.numel(),), (1,))
    content = row.view(torch.uint8).numpy().data
    return [str(tensor.dtype), str(tuple(tensor.shape)), hashlib.sha256(content).hexdigest()]


def digest_of_part(part: Tensors) -> list[Any]:
    """Return what identifies inputs or targets; the order of a dictionary's keys does not count."""
    if isinstance(part, Tensor):
        return digest_of(part)
    digests = [[name, digest_of(tensor)] for name, tensor in list_tensors(part).items()]
    return [type(part).__name__, sorted(digests) if isinstance(part, dict) else digests]


def fingerprint_of(
    classes: int, mean: tuple[float, ...], std: tuple[float, ...], digests: Sequence[Sequence[Any]]
) -> str:
    """Return a data set's fingerprint from the digests of inputs and labels of its splits: train, test, validation."""
    return hashlib.sha256(json.dumps([classes, mean, std, digests]).encode()).hexdigest()


def _peculiarity(tensor: Tensor) -> str | None:
    """Return in which way a tensor is not an ordinary one that can be used as it is; None if it is one."""
    if tensor.is_meta:
        return "are on the device 'meta', where tensors have no data: load them on 'cpu'"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "are sparse or nested: make them dense (to_dense or to_padded_tensor)"
    if tensor.is_quantized:
        return "are quantised: make them floats (dequantize)"
    if tensor.requires_grad:
        return "require gradients: give tensor.detach()"
    if tensor.ndim == 0:
        return "are a single number: the first dimension counts the examples"
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return f"are {tensor.dtype}, a type in which torch can do few computations: make them float16 or float32"
    try:
        digest_of(tensor[:1])
    except RuntimeError:
        return "have no data that can be read, as within FakeTensorMode: make them outside of it"
    return None


def _check_ordinary(where: str, inputs: object, labels: object) -> None:
    """Raise `UserError` unless inputs and targets are ordinary tensors that hold examples."""
    for what, tensors in (("inputs", inputs), ("labels", labels)):
        several: list[Any] = []
        if isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors):
            several = list(tensors.values())
        elif isinstance(tensors, tuple):
            several = list(tensors)
        if not isinstance(tensors, Tensor) and not (several and all(isinstance(each, Tensor) for each in several)):
            raise UserError(
                f"{where}: inputs and labels must be tensors, tuples of tensors, or dictionaries of tensors by name, "
                f"and its {what} are of type {type(tensors).__name__}"
            )
        for name, tensor in list_tensors(cast(Tensors, tensors)).items():
            if peculiarity := _peculiarity(tensor):
                raise UserError(f"{where}: its {what}{name} {peculiarity}")
    (_, first), *_ = named = _name_tensors(cast(Tensors, inputs), cast(Tensors, labels))
    if len(first) == 0:
        raise UserError(f"{where}: it holds no example")
    for name, tensor in named:
        if len(tensor) and tensor.numel() == 0:
            example = "an example" if name == "inputs" else f"an example of its {name}"
            raise UserError(f"{where}: {example} of shape {tuple(tensor.shape[1:])} holds no number")


def _check_equal(where: str, inputs: Tensors, labels: Tensors) -> None:
    """Raise `UserError` unless all tensors have the same number of examples, and are on the same device."""
    (first, tensor), *others = _name_tensors(inputs, labels)
    for name, other in others:
        if len(other) != len(tensor):
            raise UserError(
                f"{where}: its {name} hold {len(other)} examples and its {first} {len(tensor)}; the first dimension "
                f"of each tensor counts the examples"
            )
        if other.device != tensor.device:
            raise UserError(
                f"{where}: its {first} are on {str(tensor.device)!r} and its {name} on {str(other.device)!r}; load all "
                f"on 'cpu'"
            )


def _name_tensors(inputs: Tensors, labels: Tensors) -> list[tuple[str, Tensor]]:
    """Return all tensors of a split, each with its name in messages."""
    parts = (("inputs", inputs), ("labels", labels))
    return [(f"{what}{name}", tensor) for what, part in parts for name, tensor in list_tensors(part).items()]


def _read_classes(where: str, classes: object) -> tuple[str, ...]:
    """Return the names of classes as texts; they have an order, as a list, a tuple or an array has."""
    listed = classes.tolist() if isinstance(classes, np.ndarray | Tensor) else classes
    if not isinstance(listed, Iterable) or isinstance(listed, str | Mapping | set | frozenset):
        raise UserError(f"{where}: classes must be a list of the names of the classes, got {short(classes)}")
    return tuple(map(str, listed))


def _check_classes(where: str, inputs: Tensors, labels: Tensors, classes: int) -> None:
    """Raise `UserError` unless the targets are one number of a class per example."""
    count = count_examples(inputs)
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.dtype != torch.int64:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else _name_form(labels)
        raise UserError(
            f"{where}: expected int64 labels of shape ({count},), one per input, got {got}; for targets that are no "
            f"numbers of classes, leave out classes"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        index = int((labels == bad).nonzero()[0])
        raise UserError(
            f"{where}: label {bad} of example {index} is out of range, expected 0..{classes - 1} for {classes} classes"
        )


def _check_images(data: Dataset) -> None:
    """Raise `UserError` unless uint8 inputs with a mean or a std are images with one of each per channel."""
    inputs = cast(Tensor, data.train_inputs)
    if inputs.ndim != 4:
        raise UserError(
            f"data set {data.name!r}: uint8 inputs with mean and std are images and have the shape "
            f"(n, channels, height, width), got {tuple(inputs.shape)}; give other inputs as floats or without mean "
            f"and std"
        )
    channels = inputs.shape[1]
    if len(data.mean) != channels or len(data.std) != channels or not all(s > 0 for s in data.std):
        raise UserError(f"data set {data.name!r}: expected {channels} means and positive stds, one per channel")


def _form(tensors: Tensors) -> tuple[type, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Return what the inputs, or the targets, of all splits have in common: structure, types and shapes."""
    return type(tensors) if not isinstance(tensors, Tensor) else Tensor, {
        name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in list_tensors(tensors).items()
    }


def _name_form(tensors: Tensors) -> str:
    """Return the types and shapes of an example in words."""
    parts = [
        f"{name}{': ' if name else ''}{tensor.dtype} {tuple(tensor.shape[1:])}"
        for name, tensor in list_tensors(tensors).items()
    ]
    return ", ".join(parts) if isinstance(tensors, Tensor) else f"a {type(tensors).__name__} of {', '.join(parts)}"


def _check_finite(where: str, name: str, inputs: Tensor) -> None:
    """Raise `UserError` if an input is NaN or infinite; it needs no memory unless one is."""
    ends = torch.aminmax(torch.view_as_real(inputs.resolve_conj()) if inputs.is_complex() else inputs)
    if not all(end.isfinite() for end in ends):
        wrong = ~inputs.isfinite().flatten(1).all(1) if inputs.ndim > 1 else ~inputs.isfinite()
        raise UserError(
            f"{where}: {int(wrong.sum())} of {len(inputs)} examples have inputs{name} that are NaN or infinite, the "
            f"first is example {int(wrong.nonzero()[0])}: remove these examples or replace the values"
        )


def _numbers(where: str, values: object) -> tuple[float, ...]:
    """Return mean or std as a tuple; a tuple of Python's numbers is returned unchanged, as fingerprints depend on it.

    Raises:
        UserError: if they are not finite numbers.
    """
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        numbers = tuple(v if type(v) in (int, float) else float(v) for v in values)  # type: ignore[attr-defined]
        if all(map(math.isfinite, numbers)):
            return numbers
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise UserError(f"{where}: expected one finite number per channel, got {short(values)}")


def _first(dataset: Dataset, split: str, per_class: int | None) -> Tensor | slice:
    """Return the indices of the first `per_class` examples of each class."""
    labels: Tensor = getattr(dataset, f"{split}_labels")
    if per_class is None:
        return slice(None)
    if not isinstance(per_class, int) or isinstance(per_class, bool) or per_class < 1:
        raise UserError(f"{split}_per_class: expected a whole number from 1, got {short(per_class)}")
    if not dataset.classes:
        raise UserError(f"{split}_per_class: the labels of data set {dataset.name!r} are no numbers of classes")
    counts = torch.bincount(labels, minlength=len(dataset.classes))
    if int(counts.min()) < per_class:
        fewest = int(counts.argmin())
        raise UserError(
            f"{split}_per_class = {short(per_class)} asks for more examples than there are: data set "
            f"{dataset.name!r} has {int(counts[fewest])} {split} examples of class {dataset.classes[fewest]!r}"
        )
    return (rank_in_class(labels) < per_class).nonzero().squeeze(1)

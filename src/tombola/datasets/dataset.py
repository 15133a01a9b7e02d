"""A data set: tensors in memory."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tombola.errors import UserError, short


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled data set for classification, held in memory.

    Args:
        name: its name.
        train_inputs: shape (n, ...). uint8 means images (n, channels, height, width), which `mean` and `std`
            normalise when a batch is made; floating point means inputs that are used unchanged, which must be finite.
        train_labels: shape (n,), int64, each in 0..len(classes)-1.
        test_inputs, test_labels: the same for the test set.
        classes: the classes' names.
        mean, std: one finite number per channel, for pixels in 0..1; uint8 inputs only. Tensors and arrays, or tuples
            of NumPy's numbers, become tuples of floats.

    Raises:
        UserError: if the parts do not match, if a tensor is not an ordinary one (sparse, nested, quantised or without
            data, or one that requires gradients), or if an input is NaN or infinite.

    >>> import torch
    >>> data = Dataset("two", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]),
    ...                torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), (0.5,), (0.5,))
    >>> data.input_shape
    (1, 2, 2)
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not hasattr(self.classes, "__len__"):
            raise UserError(f"data set {self.name!r}: classes must be the names of the classes, got {self.classes!r}")
        for split in ("train", "test"):
            inputs, labels = getattr(self, f"{split}_inputs"), getattr(self, f"{split}_labels")
            where = f"data set {self.name!r}, {split} set"
            if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
                raise UserError(f"{where}: inputs and labels must be tensors")
            for what, tensor in (("inputs", inputs), ("labels", labels)):
                if peculiarity := _peculiarity(tensor):
                    raise UserError(f"{where}: its {what} {peculiarity}")
            if len(inputs) == 0:
                raise UserError(f"{where}: it holds no example")
            if inputs.numel() == 0:
                raise UserError(f"{where}: an example of shape {tuple(inputs.shape[1:])} holds no number")
            if labels.shape != (len(inputs),) or labels.dtype != torch.int64:
                raise UserError(
                    f"{where}: expected int64 labels of shape ({len(inputs)},), one per input, "
                    f"got {labels.dtype} of shape {tuple(labels.shape)}"
                )
            if inputs.shape[1:] != self.train_inputs.shape[1:] or inputs.dtype != self.train_inputs.dtype:
                raise UserError(
                    f"{where}: its inputs are {inputs.dtype} {tuple(inputs.shape[1:])}, "
                    f"the train set's {self.train_inputs.dtype} {tuple(self.train_inputs.shape[1:])}"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                bad = low if low < 0 else high
                index = int((labels == bad).nonzero()[0])
                raise UserError(
                    f"{where}: label {bad} of example {index} is out of range, "
                    f"expected 0..{len(self.classes) - 1} for {len(self.classes)} classes"
                )
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(f"data set {self.name!r}: {name}", getattr(self, name)))
        if self.train_inputs.dtype == torch.uint8:
            channels = self.train_inputs.shape[1] if self.train_inputs.ndim == 4 else None
            if channels is None:
                raise UserError(
                    f"data set {self.name!r}: uint8 inputs are images and have the shape "
                    f"(n, channels, height, width), got {tuple(self.train_inputs.shape)}; give other inputs as floats"
                )
            if len(self.mean) != channels or len(self.std) != channels or not all(s > 0 for s in self.std):
                raise UserError(f"data set {self.name!r}: expected {channels} means and positive stds, one per channel")
        elif not self.train_inputs.is_floating_point():
            raise UserError(f"data set {self.name!r}: inputs are uint8 images or floats, got {self.train_inputs.dtype}")
        else:
            for split in ("train", "test"):
                _check_finite(f"data set {self.name!r}, {split} set", getattr(self, f"{split}_inputs"))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train_inputs.shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the data set that affects the bits of a training."""
        tensors = (self.train_inputs, self.train_labels, self.test_inputs, self.test_labels)
        return fingerprint_of(len(self.classes), self.mean, self.std, [digest_of(tensor) for tensor in tensors])


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
    if train_per_class is None and test_per_class is None:
        return dataset
    train = _first(dataset, "train", train_per_class)
    test = _first(dataset, "test", test_per_class)
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[train],
        train_labels=dataset.train_labels[train],
        test_inputs=dataset.test_inputs[test],
        test_labels=dataset.test_labels[test],
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
    content = tensor.cpu().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data
    return [str(tensor.dtype), str(tuple(tensor.shape)), hashlib.sha256(content).hexdigest()]


def fingerprint_of(classes: int, mean: tuple[float, ...], std: tuple[float, ...], digests: list[list[str]]) -> str:
    """Return a data set's fingerprint from the digests of its four tensors: train inputs and labels, then test."""
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
    return None


def _check_finite(where: str, inputs: Tensor) -> None:
    """Raise `UserError` if an input is NaN or infinite; it needs no memory unless one is."""
    low, high = torch.aminmax(inputs.detach())
    if not low.isfinite() or not high.isfinite():
        wrong = ~inputs.isfinite().flatten(1).all(1) if inputs.ndim > 1 else ~inputs.isfinite()
        raise UserError(
            f"{where}: {int(wrong.sum())} of {len(inputs)} examples have inputs that are NaN or infinite, the first is "
            f"example {int(wrong.nonzero()[0])}: remove these examples or replace the values"
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
    counts = torch.bincount(labels, minlength=len(dataset.classes))
    if int(counts.min()) < per_class:
        fewest = int(counts.argmin())
        raise UserError(
            f"{split}_per_class = {short(per_class)} asks for more examples than there are: data set "
            f"{dataset.name!r} has {int(counts[fewest])} {split} examples of class {dataset.classes[fewest]!r}"
        )
    return (rank_in_class(labels) < per_class).nonzero().squeeze(1)

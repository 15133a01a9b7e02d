"""Tasks of a user who means harm: names that are made to break a page, and functions that end the program."""

from __future__ import annotations

import builtins
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tombola.datasets.dataset import Dataset

NASTY = "<script>broken=1</script><!--\"'&amp;😀"
"""A name that does harm where it is not escaped, in HTML, in an attribute or in a script."""


def dataset() -> Dataset:
    """Return 400 random points in 8 dimensions with labels that follow from them."""
    inputs = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0).long()
    return Dataset(NASTY, inputs[:300], labels[:300], inputs[300:], labels[300:], (NASTY, "<b>\u2028"))


def model() -> nn.Module:
    """Return a network whose first layer has a nasty name."""
    network = nn.Sequential()
    network.add_module(NASTY, nn.Linear(8, 24))
    network.add_module("relu", nn.ReLU())
    network.add_module("${alert(1)}", nn.Linear(24, 2))
    return network


class Mute(Exception):
    """An exception that cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("nothing is said")


class Foreign(BaseException):
    """An exception that `except Exception` does not catch."""


def _raise(error: BaseException) -> None:
    raise error


ENDINGS: dict[str, tuple[Callable[[], object], str]] = {
    "sys.exit": (lambda: sys.exit(0), "SystemExit: 0"),
    "os._exit": (lambda: os._exit(0), "SystemExit: os._exit(0)"),
    "interrupt": (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "foreign": (lambda: _raise(Foreign("away")), "Foreign: away"),
    "mute": (lambda: _raise(Mute()), "Mute: (its message raised RuntimeError)"),
    "long": (lambda: _raise(ValueError("x" * 10**6)), "ValueError: xxx"),
    "end of file": (lambda: _raise(EOFError()), "EOFError"),
    "no reader": (lambda: _raise(ConnectionResetError("gone")), "ConnectionResetError: gone"),
}
"""How a user's code may end the program: name -> (function that does it, what is to be said)."""


def data_that_ends(how: str) -> Dataset:
    """End the program instead of returning a data set."""
    ENDINGS[how][0]()
    return dataset()


def model_that_ends(how: str) -> nn.Module:
    """End the program instead of returning a network."""
    ENDINGS[how][0]()
    return model()


class Ending(nn.Module):
    """A layer that ends the program when it is used, perhaps only in a worker."""

    def __init__(self, how: str, in_worker: bool) -> None:
        super().__init__()
        self._how, self._in_worker = how, in_worker

    def forward(self, x: Tensor) -> Tensor:
        if not self._in_worker or multiprocessing.parent_process() is not None:
            ENDINGS[self._how][0]()
        return x


def layer_that_ends(how: str, in_worker: bool = False) -> nn.Module:
    """Return a network that ends the program when it is used."""
    return nn.Sequential(*model(), Ending(how, in_worker))


class Orphaning(nn.Module):
    """A layer that, in a worker, leaves a copy of its process behind and kills it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def forward(self, x: Tensor) -> Tensor:
        if multiprocessing.parent_process() is not None:
            child = os.fork()
            if not child:
                signal.pause()
            Path(self._folder, str(child)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def layer_that_leaves_a_child(folder: str) -> nn.Module:
    """Return a network that writes the numbers of the processes which it leaves behind into a folder."""
    return nn.Sequential(*model(), Orphaning(folder))


def _function_that_ends(how: str) -> Callable[..., Tensor]:
    def end(*_: Tensor) -> Tensor:
        ENDINGS[how][0]()
        return torch.zeros(())

    return end


for _how in ENDINGS:  # losses and importances have no arguments of their own
    globals()[f"ends by {_how}"] = _function_that_ends(_how)


_COUNTER = iter(range(10**9))


def data_without_seed() -> Dataset:
    """Return other data each time."""
    torch.manual_seed(next(_COUNTER))
    inputs, labels = torch.randn(20, 8), torch.arange(20) % 2
    return Dataset("unseeded", inputs, labels, inputs, labels, ("a", "b"))


def model_without_seed() -> nn.Module:
    """Return other weights each time, whatever the seed of torch's generator is."""
    torch.manual_seed(next(_COUNTER))
    return model()


class Shuffled(nn.Sequential):
    """A network that lists its parameters in another order each time."""

    def named_parameters(self, *how: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        found = list(super().named_parameters(*how, **named))
        return iter(found[::-1] if next(_COUNTER) % 2 else found)


def model_without_order() -> nn.Module:
    """Return a network whose parameters have no order."""
    return Shuffled(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def loss_without_seed(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return another number each time."""
    return nn.functional.cross_entropy(outputs, labels) * (1 + next(_COUNTER))


def importance_without_seed(weights: Tensor) -> Tensor:
    """Return other scores each time."""
    return torch.rand(len(weights), generator=torch.Generator().manual_seed(next(_COUNTER)), dtype=torch.float64)


class Forgetful(nn.Module):
    """A layer whose outputs depend on the number of batches so far, which it keeps outside its state."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.batches = 0
        self.register_buffer("count", torch.zeros(()), persistent=how == "buffer")
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.how == "attribute":
            self.batches += 1
        elif self.training:
            self.count += 1
        return x * (1 + self.batches + self.count)


def model_that_forgets(how: str) -> nn.Module:
    """Return a network that keeps something in an attribute, in a buffer that is not stored, or in one that is."""
    return nn.Sequential(*model(), Forgetful(how))


class OwnDataset(Dataset):
    """A data set whose fingerprint says nothing about its content."""

    fingerprint = "always the same"


def data_of_own_class() -> Dataset:
    """Return a data set with a fingerprint of its own."""
    return OwnDataset(**vars(dataset()))


_BUFFER = torch.empty(10**5, dtype=torch.float64)


def importance_of_one_buffer(weights: Tensor) -> Tensor:
    """Return magnitudes, for all layers in the same memory, and spoil the argument."""
    scores = _BUFFER[: len(weights)].copy_(weights)
    weights.zero_()
    return scores


def loss_that_writes(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy; at a test, replace the labels by the predictions."""
    loss = nn.functional.cross_entropy(outputs, labels)
    if not outputs.requires_grad:
        labels.copy_(outputs.argmax(1))
    return loss


DATA = dataset()


def dataset_kept() -> Dataset:
    """Return a data set that the other functions of this module can change."""
    return DATA


def loss_that_reaches_far(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, and change the data set in a worker."""
    if multiprocessing.parent_process() is not None:
        DATA.test_labels.fill_(0)
    return nn.functional.cross_entropy(outputs, labels)


SETTINGS: dict[str, tuple[Callable[[], object], str]] = {
    "threads": (lambda: torch.set_num_threads(2), "torch's number of threads from 1 to 2"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "torch's default type of numbers from torch.float32"),
    "device": (lambda: torch.set_default_device("meta"), "torch's default device from cpu to meta"),
    "grad": (lambda: torch.set_grad_enabled(False), "torch's grad mode from True to False"),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), "torch's autocast from False to True"),
    "determinism": (
        lambda: torch.use_deterministic_algorithms(True),
        "torch's deterministic debug mode from 0 to 2",
    ),
    "onednn": (
        lambda: setattr(torch.backends.mkldnn, "enabled", False),
        "torch.backends.mkldnn.enabled from True to False",
    ),
    "json": (lambda: setattr(json, "dumps", lambda *_, **__: "{}"), "Python's json.dumps, which would change what is"),
    "open": (lambda: setattr(builtins, "open", lambda *_, **__: None), "Python's builtins.open, which"),
    "hash": (lambda: setattr(hashlib, "sha256", hashlib.md5), "Python's hashlib.sha256, which"),
    "stdout": (lambda: setattr(sys, "stdout", None), "Python's sys.stdout, which"),
    "ctrl-c": (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "Python's answer to Ctrl-C"),
    "alarm": (lambda: signal.alarm(1000), "an alarm of the process from False to True"),
}
if hasattr(torch.backends, "fp32_precision"):  # torch 2.9 or newer
    _OF = "torch.backends.mkldnn.{}.fp32_precision from ieee to {}"
    SETTINGS |= {
        "medium": (lambda: torch.set_float32_matmul_precision("medium"), _OF.format("matmul", "bf16")),
        "tf32": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), _OF.format("matmul", "tf32")),
        "conv": (lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"), _OF.format("conv", "bf16")),
        "flags": (lambda: torch.backends.mkldnn.set_flags(None, _fp32_precision="bf16"), _OF.format("matmul", "bf16")),
    }
else:
    SETTINGS["medium"] = (
        lambda: torch.set_float32_matmul_precision("medium"),
        r"torch.get_float32_matmul_precision\(\) from highest to medium",
    )
"""Settings that a user's code may change: name -> (function that does it, what is to be said)."""


def model_that_sets(how: str) -> nn.Module:
    """Change a setting of torch, and return a network."""
    SETTINGS[how][0]()
    return model()


class Setting(nn.Module):
    """A layer that changes a setting of torch when it is used in a training, and not when it is tried out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8 and self.training:
            SETTINGS[self._how][0]()
        return x


def layer_that_sets(how: str) -> nn.Module:
    """Return a network that changes a setting of torch in a training."""
    return nn.Sequential(*model(), Setting(how))


def _importance_that_sets(how: str) -> Callable[[Tensor], Tensor]:
    def score(weights: Tensor) -> Tensor:
        SETTINGS[how][0]()
        return weights

    return score


for _how in SETTINGS:
    globals()[f"sets {_how}"] = _importance_that_sets(_how)


class Replacing(nn.Module):
    """A network that puts another parameter in the place of its own, or adds one, when it is used."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self._how = nn.Linear(8, 8), nn.Linear(8, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self._how == "replace":
            self.first.weight = nn.Parameter(self.first.weight.detach() * 0.9)
        elif not hasattr(self, "added"):
            self.added = nn.Linear(8, 8)
        hidden: Tensor = self.last(self.first(x))
        return hidden


def model_that_replaces(how: str) -> nn.Module:
    """Return a network that replaces or adds parameters."""
    return Replacing(how)


def layer_of_half_a_character() -> nn.Module:
    """Return a network of which a layer's name cannot be written."""
    network = nn.Sequential(*model())
    network.add_module("\ud800", nn.Linear(2, 2))
    return network

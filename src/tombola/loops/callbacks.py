"""Callbacks that hold a mask in the training loops of other libraries."""

from __future__ import annotations

from typing import Any

from torch import nn

from tombola.errors import UserError, expect
from tombola.loops.hold import Hold, hold
from tombola.pruning.mask import Mask


class Holder:
    """Holds a mask from the start of a training to its end; the callbacks of both libraries are built on it.

    Args:
        mask: the connections that are alive.
        model: the network that the mask is about; None for that which the library trains.
    """

    def __init__(self, mask: Mask, model: nn.Module | None = None) -> None:
        self.mask, self.model = mask, model
        self._held: Hold | None = None

    def begin(self, model: nn.Module, optimizers: list[Any]) -> None:
        """Hold the mask; a hold that an interrupted training has left is ended first."""
        self.end()
        if not optimizers:
            raise UserError("the training has no optimizer, so there is nothing to hold a mask through")
        self._held = hold(self.model or model, self.mask, *optimizers)

    def end(self) -> None:
        """End the hold, if there is one."""
        if self._held is not None:
            self._held.remove()
        self._held = None


class LightningHooks(Holder):
    """The hooks of a callback of PyTorch Lightning."""

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        """Hold the mask: the optimizers are there, and a checkpoint has been loaded."""
        self.begin(module, list(trainer.optimizers))

    def on_train_end(self, trainer: Any, module: nn.Module) -> None:
        """End the hold."""
        self.end()

    def on_exception(self, trainer: Any, module: nn.Module, exception: BaseException) -> None:
        """End the hold."""
        self.end()


class TransformersHooks(Holder):
    """The hooks of a callback of Hugging Face's Trainer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the mask: model and optimizer are there, and a checkpoint has been loaded."""
        self.begin(kwargs["model"], [kwargs["optimizer"]])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the hold."""
        self.end()


def lightning_callback(mask: Mask, model: nn.Module | None = None) -> Any:
    """Return a callback of PyTorch Lightning that holds a mask during `Trainer.fit`, see `tombola.loops.hold`.

    Args:
        mask: the connections that are alive.
        model: the network that the mask is about; by default the LightningModule, whose layers are then named as in
            `Mask.ones_like(lightning_module)`.

    Returns:
        A `lightning.pytorch.Callback`, or one of `pytorch_lightning` if only that is installed.

    Raises:
        UserError: if Lightning is not installed.
    """
    _expect(mask, model)
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise UserError("PyTorch Lightning is not installed: pip install lightning") from error
    return type("HoldMask", (LightningHooks, Callback), {})(mask, model)


def transformers_callback(mask: Mask, model: nn.Module | None = None) -> Any:
    """Return a callback of Hugging Face's Trainer that holds a mask during `train`, see `tombola.loops.hold`.

    Args:
        mask: the connections that are alive.
        model: the network that the mask is about; by default the one that the Trainer trains.

    Returns:
        A `transformers.TrainerCallback`.

    Raises:
        UserError: if transformers is not installed.
    """
    _expect(mask, model)
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:
        raise UserError("transformers is not installed: pip install transformers accelerate") from error
    return type("HoldMask", (TransformersHooks, TrainerCallback), {})(mask, model)


def _expect(mask: object, model: object) -> None:
    """Raise `UserError` for arguments of a wrong type, before the library is imported, which takes seconds."""
    expect(mask, Mask, "mask", "a tombola.Mask")
    expect(model, nn.Module | None, "model", "a torch.nn.Module")

"""`tiny_task` with a model that asks a test, before each iteration of a training, whether it may go on: see `gate`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys

import torch
from torch import Tensor, nn

from tiny_task import dataset, model

__all__ = ["dataset", "gated"]


class Gate(nn.Module):
    """Passes its input on, after it has asked at an abstract address; where nobody listens there, at once."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._iteration = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and _is_worker():  # not when it is only observed or tried out
            _obey(_ask(self._address, self._iteration))
            self._iteration += 1
        return x


def gated(address: str) -> nn.Module:
    """Return `tiny_task`'s network behind a gate. It counts the iterations of one training in one process, from 0."""
    return nn.Sequential(*model(), Gate(address))


def _is_worker() -> bool:
    """Return whether this process does trainings for another one."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return bool(ray._private.worker.global_worker.mode == ray.WORKER_MODE)
    return multiprocessing.parent_process() is not None


def _ask(address: str, iteration: int) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(f"\0{address}")
            connection.sendall(f"{os.getpid()} {iteration}\n".encode())
            return connection.recv(100).decode()
        except OSError:
            return ""


def _obey(answer: str) -> None:
    match answer:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die writing":
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)

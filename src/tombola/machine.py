"""The machine: what of it can decide bits, recorded with each result."""

from __future__ import annotations

import functools
import platform
from importlib import metadata
from typing import Any

import torch


@functools.cache
def machine() -> dict[str, Any]:
    """Return processor, instruction set and library versions, as JSON's types.

    >>> sorted(machine())
    ['instruction_set', 'processor', 'python', 'system', 'versions']
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("tombola", "torch", "numpy")},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

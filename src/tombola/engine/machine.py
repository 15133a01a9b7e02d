"""The machine: what of it can decide bits, recorded with each result."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tombola import kernels

_FEATURES = ("avx", "fma", "amx", "sse4", "asimd", "sve", "bf16")


@functools.cache
def machine() -> dict[str, Any]:
    """Return processor, its features, library versions and tombola's commit, as JSON's types.

    >>> sorted(machine())
    ['commit', 'features', 'instruction_set', 'kernels', 'processor', 'python', 'system', 'versions']
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpu("model name") or platform.processor(),
        "features": " ".join(sorted(flag for flag in _cpu("flags").split() if flag.startswith(_FEATURES))),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.instruction_set(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("tombola", "torch", "numpy")},
        "commit": _commit(),
    }


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what of a recorded machine is another now, one phrase each; what was not recorded is not compared.

    >>> differences({"versions": {"torch": "2.6"}, "python": "3.11"}, {"versions": {"torch": "2.7"}, "python": "3.11"})
    ["versions.torch: '2.6' then, '2.7' now"]
    """
    found = []
    for name, then in recorded.items():
        here = now.get(name)
        if isinstance(then, dict) and isinstance(here, dict):
            found += [f"{name}.{phrase}" for phrase in differences(then, here)]
        elif then != here:
            found.append(f"{name}: {then!r} then, {here!r} now")
    return found


def _cpu(field: str) -> str:
    """Return a field of the first processor, or "" where it is not known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""


def _commit() -> str | None:
    """Return the commit of tombola's source, with a plus where it was edited since; None where it is no checkout."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # tombola's own checkout, not one that it lies in
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.SubprocessError):
        return None

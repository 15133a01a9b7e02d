"""Machines: the properties that can affect bits, which are recorded with each result, and the kinds of machines."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tombola import kernels

_FEATURES = ("avx", "fma", "amx", "sse4", "asimd", "sve", "bf16")


@functools.cache
def machine() -> dict[str, Any]:
    """Return this machine's processor and its features, library versions and tombola's commit, as JSON's types.

    >>> sorted(machine())
    ['commit', 'features', 'instruction_set', 'kernels', 'processor', 'python', 'system', 'vendor', 'versions']
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "vendor": _cpu("vendor_id") or _cpu("CPU implementer") or platform.processor(),
        "processor": _cpu("model name") or platform.processor(),
        "features": " ".join(sorted(flag for flag in _cpu("flags").split() if flag.startswith(_FEATURES))),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.instruction_set(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("tombola", "torch", "numpy")},
        "commit": _commit(),
    }


@dataclass(frozen=True)
class Kind:
    """A kind of machine: equal trainings give equal bits on all machines of one kind.

    Args:
        vendor: the vendor of the processor.
        instruction_set: torch's capability of the processor, such as "AVX2".
        kernels: the instruction set of tombola's kernels; None if they are not installed.
        torch: the version of torch.
        architecture: the architecture of the processor, such as "x86_64".
        device: the device that trains: "cpu", or the name of a GPU.

    >>> str(Kind("GenuineIntel", "AVX512", "avx512", "2.6.0", "x86_64"))
    'GenuineIntel x86_64 (torch 2.6.0 with AVX512, kernels with avx512)'
    """

    vendor: str
    instruction_set: str
    kernels: str | None
    torch: str
    architecture: str
    device: str = "cpu"

    def __str__(self) -> str:
        own = f"kernels with {self.kernels}" if self.kernels else "no kernels"
        where = "" if self.device == "cpu" else f" with {self.device}"
        return f"{self.vendor} {self.architecture}{where} (torch {self.torch} with {self.instruction_set}, {own})"


def kind(record: Mapping[str, Any]) -> Kind | None:
    """Return the kind of machine that a training ran on; None if its record is incomplete.

    Args:
        record: the record of a training; its field "machine" is what `machine` returned.

    >>> kind({"machine": machine()}) == kind({"machine": machine()}), kind({})
    (True, None)
    """
    about = record.get("machine", {})
    try:
        return Kind(
            about["vendor"],
            about["instruction_set"],
            about["kernels"],
            about["versions"]["torch"],
            about["system"].split()[-1],
            record.get("device", "cpu"),
        )
    except (KeyError, TypeError, IndexError, AttributeError):
        return None


def kind_here(device: str = "cpu") -> Kind | None:
    """Return the kind of this machine, with the device ("cpu" or "cuda") that trains.

    >>> kind_here() == kind({"machine": machine()})
    True
    """
    return kind({"machine": machine(), "device": device_name(device)})


def device_name(device: str) -> str:
    """Return "cpu", or the name of this machine's GPU for "cuda"."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def count_kinds(records: Iterable[Mapping[str, Any]]) -> dict[Kind | None, int]:
    """Return how many trainings ran on each kind of machine, the most frequent first; None is the unknown kind.

    >>> count_kinds([{}, {}])
    {None: 2}
    """
    return dict(Counter(map(kind, records)).most_common())


def describe_kinds(counts: Mapping[Kind | None, int]) -> str | None:
    """Return a sentence if trainings ran on several kinds of machine, or if a kind is not recorded; None otherwise.

    Args:
        counts: the result of `count_kinds`.

    >>> one, other = (Kind(vendor, "AVX2", "avx2", "2.6.0", "x86_64") for vendor in ("GenuineIntel", "AuthenticAMD"))
    >>> describe_kinds({one: 4}) is None
    True
    >>> describe_kinds({one: 4, other: 1}).partition(": ")[0]
    'the trainings ran on 2 kinds of machine, whose bits can differ'
    >>> describe_kinds({one: 4, None: 1})
    'the kind of machine is not recorded for 1 of 5 trainings'
    """
    known = {str(each): count for each, count in counts.items() if each is not None}
    missing = counts.get(None, 0)
    unknown = f"the kind of machine is not recorded for {missing} of {sum(counts.values())} trainings"
    if len(known) > 1:
        listed = ", ".join(f"{count} on {name}" for name, count in known.items())
        text = f"the trainings ran on {len(known)} kinds of machine, whose bits can differ: {listed}"
        return f"{text}; {unknown}" if missing else text
    return unknown if missing else None


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each recorded field in which a machine differs from the recorded machine.

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
    """Return a field of the first processor, or "" if it is not known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""


def _commit() -> str | None:
    """Return the commit of tombola's source, followed by a plus if it has been edited; None outside a checkout."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # fails inside a checkout of another project
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.SubprocessError):
        return None

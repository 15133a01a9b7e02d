"""Processor cores: how many this process may use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")  # of the system's files
_MOUNT = re.compile(r"\S+ \S+ \S+ (\S+) /(\S+) .* - (cgroup2?) \S+ (\S+)")  # see proc_pid_mountinfo(5)
_GROUP = re.compile(r"\d+:([^:]*):(/.*)")  # controllers, of which version 2 names none, and path; see cgroups(7)


def count_cores() -> int:
    """Return the number of cores that this process may use: those that it may run on, or fewer if it has a quota.

    A quota of processor time, such as a container's, is a number of cores, which is rounded up.

    >>> count_cores() >= 1
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *map(math.ceil, _list_quotas())])


def _list_quotas() -> Iterator[float]:
    """Yield the quotas, in cores, of the control groups of this process and of the groups that these are in."""
    mounts, groups = (_read(_ROOT / "proc/self" / name).splitlines() for name in ("mountinfo", "cgroup"))
    for fields in (found.groups() for found in map(_MOUNT.fullmatch, mounts) if found):
        root, folder, kind, options = map(_unescape, fields)
        for controllers, path in (found.groups() for found in map(_GROUP.fullmatch, groups) if found):
            unified = kind == "cgroup2" and not controllers
            if unified or "cpu" in set(controllers.split(",")) & set(options.split(",")):
                group = PurePosixPath(path)
                inside = group.relative_to(root).parts if group.is_relative_to(root) else ()
                for depth in range(len(inside) + 1):
                    yield from _read_quota(_ROOT.joinpath(folder, *inside[:depth]))


def _read_quota(group: Path) -> Iterator[float]:
    """Yield the quota of a control group in cores, if it has one."""
    of_version_1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    for text in (_read(group / "cpu.max"), of_version_1):
        if found := re.fullmatch(r"([1-9]\d*)\s+([1-9]\d*)\s*", text):  # "max" and "-1" mean that there is none
            yield int(found[1]) / int(found[2])


def _unescape(field: str) -> str:
    """Return a field of mountinfo, in which blanks and backslashes are octal numbers, as it was."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read(path: Path) -> str:
    """Return the text of a file, in which paths may have any bytes; nothing if it is not there."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""

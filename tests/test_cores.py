"""The cores that a process may use, in containers with a quota too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tombola import cores

UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
CPU = "33 31 0:31 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "34 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER = "22 1 8:1 / /\udcff rw,relatime - ext4 /dev/sda1 rw,errors=remount-ro"  # its name is no text


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "expected"),
    [
        ([], [], {}, 8),
        ([OTHER, UNIFIED], ["0::/"], {"cpu.max": "200000 100000\n"}, 2),
        ([UNIFIED], ["0::/"], {"cpu.max": "max 100000\n"}, 8),
        ([UNIFIED], ["0::/"], {"cpu.max": "150000 100000\n"}, 2),
        ([UNIFIED], ["0::/"], {"cpu.max": "1000 100000\n"}, 1),
        ([UNIFIED], ["0::/"], {"cpu.max": "6400000 100000\n"}, 8),
        ([UNIFIED], ["0::/"], {"cpu.max": "unknown\n"}, 8),
        ([UNIFIED], ["0::/"], {"cpu.max": "0 100000\n"}, 8),
        ([UNIFIED], ["0::/a/b"], {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "500000 100000\n"}, 3),
        ([UNIFIED], ["0::/a/b"], {"a/cpu.max": "500000 100000\n", "a/b/cpu.max": "max 100000\n"}, 5),
        ([UNIFIED], ["0::/a"], {"b/cpu.max": "100000 100000\n"}, 8),
        ([CPU.format(root="/")], ["4:cpu,cpuacct:/a"], {"cpu,cpuacct/a": (300000, 100000)}, 3),
        ([CPU.format(root="/")], ["4:cpu,cpuacct:/a"], {"cpu,cpuacct/a": (-1, 100000)}, 8),
        ([CPU.format(root="/")], ["4:cpu,cpuacct:/a"], {"cpu,cpuacct": (100000, 50000)}, 2),
        ([CPU.format(root="/docker/x")], ["4:cpu,cpuacct:/docker/x/a"], {"cpu,cpuacct/a": (200000, 100000)}, 2),
        ([CPU.format(root="/docker/x")], ["4:cpu,cpuacct:/"], {"cpu,cpuacct": (200000, 100000)}, 2),
        ([CPU.format(root=r"/a\134x2d")], [r"4:cpu:/a\x2d/b"], {"cpu,cpuacct/b": (200000, 100000)}, 2),
        ([UNIFIED.replace("cgroup ", r"cgroup/a\040b ", 1)], ["0::/"], {"a b/cpu.max": "200000 100000\n"}, 2),
        ([MEMORY], ["5:memory:/"], {"memory": (200000, 100000)}, 8),
        ([UNIFIED, MEMORY], ["4:cpu:/a"], {"a/cpu.max": "3 1", "memory/a": (3, 1)}, 8),
        ([CPU.format(root="/docker/x")], ["4:cpu:/y"], {"cpu,cpuacct": (2, 1), "cpu,cpuacct/y": (1, 1)}, 2),
        ([UNIFIED, CPU.format(root="/")], ["4:cpu:/a", "0::/b"], {"cpu,cpuacct/a": (4, 1), "b/cpu.max": "3 1"}, 3),
        ([UNIFIED, CPU.format(root="/")], ["4:cpu:/a", "0::/b"], {"cpu,cpuacct/b": (2, 1), "a/cpu.max": "3 1"}, 8),
    ],
)
def test_cores_are_those_of_the_smallest_quota(
    mounts: list[str],
    groups: list[str],
    files: dict[str, str | tuple[int, int]],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The names of `files` are below /sys/fs/cgroup; a pair is the quota and the period of a group of version 1."""
    every = {"proc/self/mountinfo": "\n".join(mounts), "proc/self/cgroup": "\n".join(groups)}
    for name, content in files.items():
        if isinstance(content, str):
            every[f"sys/fs/cgroup/{name}"] = content
        else:
            for of, number in zip(("quota", "period"), content, strict=True):
                every[f"sys/fs/cgroup/{name}/cpu.cfs_{of}_us"] = f"{number}\n"
    for name, text in every.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.fsencode(text))
    monkeypatch.setattr(cores, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.count_cores() == expected


def test_another_system_has_all_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_ROOT", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert cores.count_cores() == expected

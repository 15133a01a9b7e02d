"""Archives that unpack to 20 GB: how long each is looked at before it is refused, and the memory that this takes.

one    one member of 20 GB
many   members of 64 MB each
pad    an empty member, and 20 GB after the end marker
pax    a pax header of 20 GB
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PART, PARTS = 64 << 20, 320
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda content: gzip.compress(content, 1, mtime=0),
    "bz2": bz2.compress,
    "xz": lambda content: lzma.compress(content, preset=0),
}
REFUSED = """
import resource, sys, time
from tombola.datasets import load
began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load("image-folder", path=sys.argv[1])
except ValueError as error:
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{time.perf_counter() - began:6.1f} s {more:6.0f} MB  {str(error).rpartition(': ')[2]}")
"""


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def archives(compress: Callable[[bytes], bytes]) -> Iterator[tuple[str, list[bytes]]]:
    zeros = compress(bytes(PART))  # compressed files can stand one after the other
    yield "one", [compress(header("train/cat/0.png", PART * PARTS)), *[zeros] * PARTS]
    yield "many", [part for number in range(PARTS) for part in (compress(header(f"train/cat/{number}", PART)), zeros)]
    yield "pad", [compress(header("train/cat/0.png", 0) + bytes(1024)), *[zeros] * PARTS]
    yield "pax", [compress(header("x", PART * PARTS, tarfile.XHDTYPE)), *[zeros] * PARTS]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind, compress in COMPRESSIONS.items():
            for name, parts in archives(compress):
                path = Path(folder) / f"{name}.tar.{kind}"
                path.write_bytes(b"".join(parts))
                print(f"{path.name:12}", end="", flush=True)
                subprocess.run([sys.executable, "-c", REFUSED, str(path)], check=True)


if __name__ == "__main__":
    main()

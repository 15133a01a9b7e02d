"""Run the tests several times, some of them on a busy machine: python tests/repeat.py RUNS BUSY COMMAND...

Prints a line for each run: its seconds, and how many tests passed, failed and were skipped; what a run that fails wrote
is printed too. The last runs are the busy ones: all that while, each core has an endless loop to do as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LIMIT = 3600.0
"""Seconds after which a run is given up."""


def main(runs: int, busy: int, command: Sequence[str]) -> int:
    """Return 0 where every run passed."""
    failures = 0
    for number in range(1, runs + 1):
        is_busy = number > runs - busy
        began = time.monotonic()
        with busy_cores() if is_busy else contextlib.nullcontext():
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=LIMIT
            )
        seconds = time.monotonic() - began
        counts = ", ".join(f"{count(done.stdout, what)} {what}" for what in ("passed", "failed", "error", "skipped"))
        where = "busy" if is_busy else "idle"
        print(f"run {number:2} of {runs}, {where}: {seconds:4.0f} s, {counts}, status {done.returncode}", flush=True)
        if done.returncode:
            failures += 1
            print(done.stdout, flush=True)
    return min(failures, 1)


def count(output: str, what: str) -> int:
    """Return a number from pytest's summary, which need not be the last line; 0 where there is none.

    >>> output = "...\\n3 failed, 1314 passed, 7 skipped in 317.45s (0:05:17)\\nmake: *** [test] Error 1\\n"
    >>> count(output, "failed"), count(output, "passed"), count(output, "error")
    (3, 1314, 0)
    >>> count("9 passed\\n", "passed")
    0
    """
    summaries = [line for line in output.splitlines() if re.search(r" in [\d.]+s\b", line)]
    found = re.search(rf"(\d+) {what}s?\b", summaries[-1]) if summaries else None
    return int(found[1]) if found else 0


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))

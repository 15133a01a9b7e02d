"""Claims: record which run does which training, so that several runs on one store do not repeat each other's work.

    STORE/runs/<name>     the file of a run; the run holds a lock on it and touches it every few seconds
    STORE/claims/<key>    a hard link to the file of the run that does this training

Creating a hard link is atomic and fails if the name exists, also on a network file system. The claim and the file of
the run are the same file, so the claim needs no heartbeat of its own. Another process decides whether a run is alive

- on the same machine by its lock, which the system releases when the process ends, however it ends;
- on another machine, which may not see locks, by the modification time of the file: a run that has not touched its file
  for two minutes counts as dead. The reader measures these two minutes with its own clock, so clocks need not agree.

No result depends on claims: it has the same bits whichever run computed it, and it is stored atomically. At worst a
training is done twice. This also happens on a file system without hard links, because nothing can be claimed there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEARTBEAT = 5.0
"""Seconds between two touches of a run's file."""

PATIENCE = 120.0
"""Seconds without a touch after which a run on another machine counts as dead. Network file systems may show
times that are up to a minute old."""


class Claims:
    """The claims of this process on the trainings of a store.

    Args:
        root: the store's folder.
        heartbeat: the seconds between two touches of the run's file, see `HEARTBEAT`.
        patience: the seconds after which a silent run counts as dead, see `PATIENCE`.
        host: the name of the machine, or container, on which locks are visible.
        clock: a function that returns the time in seconds; it measures the patience.
    """

    def __init__(
        self,
        root: Path,
        *,
        heartbeat: float = HEARTBEAT,
        patience: float = PATIENCE,
        host: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs, self._claims = root / "runs", root / "claims"
        self._patience = patience
        self._host = host or _this_host()
        self._clock = clock
        self._seen: dict[int, tuple[int, float]] = {}  # inode -> modification time, and when it was first seen
        self._held: set[str] = set()
        self._over = threading.Event()
        self._register()
        self._beating = threading.Thread(target=self._beat, args=(heartbeat,), daemon=True)
        self._beating.start()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._beating.join()
        for key in list(self._held):
            self.release(key)
        with contextlib.suppress(OSError):
            self._file.unlink()
        os.close(self._handle)

    def take(self, key: str) -> bool:
        """Claim a training; return whether this process has the claim."""
        if key in self._held:
            return True
        claim = self._claims / key
        for _ in range(3):
            try:
                os.link(self._file, claim)
            except FileExistsError:
                if self._alive(claim):
                    return False
                self._bury(claim)
            except FileNotFoundError:  # another run took this one for dead, because this machine slept
                os.close(self._handle)
                self._register()
            except OSError:
                return True  # the file system has no hard links
            else:
                self._held.add(key)
                return True
        return False

    def release(self, key: str) -> None:
        """Release a claim."""
        self._held.discard(key)
        claim = self._claims / key
        with contextlib.suppress(OSError):
            if claim.stat().st_ino == os.fstat(self._handle).st_ino:
                claim.unlink()

    def owner(self, key: str) -> str | None:
        """Describe the process that does a training; return None if no process does it."""
        about = _read(self._claims / key)
        return f"process {about['pid']} on {about['name']}" if about else None

    def alone(self) -> bool:
        """Return whether no other run is alive; remove the files of dead runs."""
        for folder in (self._claims, self._runs):
            for path in folder.iterdir():
                if path != self._file and not self._alive(path):
                    self._bury(path)
        return not any(path != self._file for path in self._runs.iterdir())

    def _register(self) -> None:
        """Create this run's file and lock it."""
        for folder in (self._runs, self._claims):
            folder.mkdir(exist_ok=True)
        about: dict[str, Any] = {"host": self._host, "name": socket.gethostname(), "pid": os.getpid(), "locked": True}
        self._file = self._runs / f"{about['name']}.{about['pid']}.{secrets.token_hex(4)}"
        self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            about["locked"] = False  # a file system without locks
        os.write(self._handle, json.dumps(about).encode())

    def _beat(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            with contextlib.suppress(OSError):
                os.utime(self._handle)

    def _alive(self, path: Path) -> bool:
        """Return whether the run that owns this file or claim is alive."""
        about = _read(path)
        if about is None and not path.exists():
            return False
        try:
            handle = os.open(path, os.O_RDONLY)  # opening a file makes a network file system refresh its attributes
        except OSError:
            return path.exists()
        try:
            status = os.fstat(handle)
            if status.st_ino == os.fstat(self._handle).st_ino:
                return True
            if about is not None and about["locked"] and about["host"] == self._host:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return False
                return True
            changed, since = self._seen.get(status.st_ino, (None, 0.0))
            if changed != status.st_mtime_ns:
                self._seen[status.st_ino] = status.st_mtime_ns, self._clock()
                return True
            return self._clock() - since < self._patience
        finally:
            os.close(handle)

    def _bury(self, path: Path) -> None:
        """Remove the file of a dead run, unless a live run has put its own file there in the meantime."""
        grave = self._runs.parent / "tmp" / f"{path.name}.{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            grave.parent.mkdir(exist_ok=True)
            path.rename(grave)
            if self._alive(grave):
                os.link(grave, path)
            grave.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a run's file; None if it is missing or empty."""
    try:
        about = json.loads(path.read_text())
        return about if {"host", "name", "pid", "locked"} <= set(about) else None
    except (OSError, ValueError, TypeError):
        return None


def _this_host() -> str:
    """Return a name of the running kernel; processes on one kernel see each other's locks, also across containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"

"""Claims: which run does which training, so that several runs on one store do not repeat each other's work.

    STORE/runs/<name>     the file of a run; the run holds a lock on it and touches it every few seconds
    STORE/claims/<key>    a hard link to the file of the run that does this training

To make a link is one atomic step that fails where the name exists, on a network file system too. The claim is the same
file as the run's, so it needs no heartbeat of its own. Whether a run is alive is decided

- on the same machine by its lock, which the system releases when the process ends, however it ends;
- from another machine, which may not see locks, by the file's time of change: a run that has not touched its file for
  two minutes of the reader's own clock counts as dead, so clocks need not agree.

No result depends on claims: it has the same bits whichever run made it, and it is stored atomically. At worst a
training is done twice. Where a file system has no hard links nothing is claimed, and this is what happens.
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
"""Seconds without a touch after which a run on another machine counts as dead. File systems on a network may show
times that are up to a minute old."""


class Claims:
    """The trainings of a store that this process does.

    Args:
        root: the store's folder.
        heartbeat: see `HEARTBEAT`.
        patience: see `PATIENCE`.
        host: the name of the machine, or container, on which locks are visible.
        clock: returns the time in seconds, by which patience is measured.
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
        self._seen: dict[int, tuple[int, float]] = {}  # inode -> time of change, and since when we see that one
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
            except FileNotFoundError:  # another run removed our file as dead: this machine slept
                os.close(self._handle)
                self._register()
            except OSError:
                return True  # no hard links here
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
        """Return which process does a training, for people; None where none does."""
        about = _read(self._claims / key)
        return f"process {about['pid']} on {about['name']}" if about else None

    def alone(self) -> bool:
        """Return whether no other run is alive; the files of dead ones are removed."""
        for folder in (self._claims, self._runs):
            for path in folder.iterdir():
                if path != self._file and not self._alive(path):
                    self._bury(path)
        return not any(path != self._file for path in self._runs.iterdir())

    def _register(self) -> None:
        """Make this run's file and lock it."""
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
        """Return whether the run is alive whose file or claim this is."""
        about = _read(path)
        if about is None and not path.exists():
            return False
        try:
            handle = os.open(path, os.O_RDONLY)  # opening it makes a network file system read the attributes again
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
        """Remove the file of a dead run, unless a live run has put its own file in its place meanwhile."""
        grave = self._runs.parent / "tmp" / f"{path.name}.{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            grave.parent.mkdir(exist_ok=True)
            path.rename(grave)
            if self._alive(grave):
                os.link(grave, path)
            grave.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a run's file; None where it is missing or empty."""
    try:
        about = json.loads(path.read_text())
        return about if {"host", "name", "pid", "locked"} <= set(about) else None
    except (OSError, ValueError, TypeError):
        return None


def _this_host() -> str:
    """Return a name of the running kernel: its processes see each other's locks, in all containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"

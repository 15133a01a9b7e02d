"""Claims: record which run does which training, so that several runs on one store do not repeat each other's work.

    STORE/runs/<name>     the file of a run; the run holds a lock on it and touches it every few seconds
    STORE/claims/<key>    a hard link to the file of the run that does this training

Creating a hard link is atomic and fails if the name exists, also on a network file system. The claim and the file of
the run are the same file, so the claim needs no heartbeat of its own. Another process decides whether a run is alive

- on the same machine by its lock, which the system releases when the process ends, however it ends;
- on this machine, but before it was started again, as dead: see `/etc/machine-id`;
- on another machine, which may not see locks, by the modification time of the file: a run that has not touched its file
  for two minutes counts as dead. The reader measures these two minutes with its own clock, so clocks need not agree.

The file of a run gets its content and its lock in `tmp` before it is renamed into `runs`, so a file there without
the content of a run is what a full disk or a damage has left; it belongs to no run unless it is locked. Files with
other names, such as those of a file manager, are ignored.

No result depends on claims: it has the same bits whichever run computed it, and it is stored atomically. At worst a
training is done twice. This also happens on a file system without hard links, because nothing can be claimed there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tombola.errors import UserError, refuse_windows
from tombola.files import open_regular, remove_path, write_durably
from tombola.store.documents import describe, read_document
from tombola.store.layout import KEY, RUN, temporary_folder
from tombola.store.names import canonical

with contextlib.suppress(ImportError):  # Windows has none, see `refuse_windows`
    import fcntl

HEARTBEAT = 5.0
"""Seconds between two touches of a run's file."""

PATIENCE = 120.0
"""Seconds without a touch after which a run on another machine counts as dead. Network file systems may show
times that are up to a minute old."""

_TRIES = 10
"""How often a run that starts writes its file, if others remove it before it has its place."""


class Claims:
    """The claims of this process on the trainings of a store.

    Args:
        root: the store's folder.
        collects: whether this process removes results from the store, see `collector`.
        heartbeat: the seconds between two touches of the run's file, see `HEARTBEAT`.
        patience: the seconds after which a silent run counts as dead, see `PATIENCE`.
        host: the name of the machine, or container, on which locks are visible.
        clock: a function that returns the time in seconds; it measures the patience.
        booted: the time at which this machine was started, in seconds since the epoch; None to ask the system.

    Raises:
        UserError: if the file of the run cannot be written, and on Windows.
    """

    def __init__(
        self,
        root: Path,
        *,
        collects: bool = False,
        heartbeat: float = HEARTBEAT,
        patience: float = PATIENCE,
        host: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        booted: float | None = None,
    ) -> None:
        refuse_windows("runs of a study")
        self._root, self._runs, self._claims = root, root / "runs", root / "claims"
        self._patience = patience
        self._host = host or _this_host()
        self._clock = clock
        self._booted = _boot_time() if booted is None else booted
        self._collects = collects
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
        with contextlib.suppress(OSError):  # code of the user may have closed all files
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
                before = self._handle
                self._register()
                os.close(before)
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
        return f"process {about.pid} on {about.name}" if about else None

    def alone(self) -> bool:
        """Return whether no other run is alive; remove the files of dead runs."""
        for path in (*_list_claims(self._root), *self._list_other_runs()):
            if not self._alive(path):
                self._bury(path)
        return not self._list_other_runs()

    def collector(self) -> str | None:
        """Describe another process that removes results from the store; return None if there is none.

        A process that collects has its file in `runs` before it looks whether it is alone, and removes something only
        if it is. A run has its file there before it looks for a collector, and reads no result while there is one.
        Whichever of the two files came second, its process sees the other file.
        """
        for path in self._list_other_runs():
            about = _read(path)
            if about is not None and about.collects and self._alive(path):
                return f"process {about.pid} on {about.name}"
        return None

    def _list_other_runs(self) -> list[Path]:
        return [path for path in _list_runs(self._root) if path != self._file]

    def _register(self) -> None:
        """Create this run's file and lock it."""
        for left in reversed(range(_TRIES)):
            try:
                self._file, self._handle = self._write_file()
                return
            except OSError as error:
                if left and isinstance(error, FileNotFoundError):
                    continue  # another run, which was alone until now, has emptied `tmp`
                raise UserError(f"store {self._root}: it cannot be written to: {describe(error)}") from error

    def _write_file(self) -> tuple[Path, int]:
        """Write and lock this run's file; return its path and its open handle."""
        for folder in (self._runs, self._claims):
            folder.mkdir(exist_ok=True)
        name, pid = socket.gethostname(), os.getpid()
        path = self._runs / f"{name}.{pid}.{secrets.token_hex(4)}"
        unfinished = temporary_folder(self._root) / path.name
        handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            about = _About(
                host=self._host,
                name=name,
                pid=pid,
                locked=_lock(handle),
                machine=_machine_id(),
                collects=self._collects,
            )
            write_durably(handle, canonical(about.model_dump()))
            unfinished.rename(path)
        except BaseException:
            os.close(handle)
            remove_path(unfinished)
            raise
        return path, handle

    def _beat(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            with contextlib.suppress(OSError):
                os.utime(self._handle)

    def _alive(self, path: Path) -> bool:
        """Return whether the run that owns this file or claim is alive."""
        about = _read(path)
        try:
            with open_regular(path) as file:  # opening a file makes a network file system refresh its attributes
                status = os.fstat(file.fileno())
                if status.st_ino == os.fstat(self._handle).st_ino:
                    return True
                if about is None or (about.locked and about.host == self._host):
                    return _is_locked(file.fileno())
        except OSError:
            return path.is_file()  # there is one that cannot be opened
        if about is not None and self._is_from_before_boot(about, status.st_mtime):
            return False
        changed, since = self._seen.get(status.st_ino, (None, 0.0))
        if changed != status.st_mtime_ns:
            self._seen[status.st_ino] = status.st_mtime_ns, self._clock()
            return True
        return self._clock() - since < self._patience

    def _is_from_before_boot(self, about: _About, changed: float) -> bool:
        """Return whether a run was on this machine before it was started again, so that its lock is gone."""
        here = about.machine is not None and (about.machine, about.name) == (_machine_id(), socket.gethostname())
        return here and about.host != self._host and changed < self._booted

    def _bury(self, path: Path) -> None:
        """Remove the file of a dead run, unless a live run has put its own file there in the meantime."""
        with contextlib.suppress(OSError):
            grave = temporary_folder(self._root) / f"{path.name}.{secrets.token_hex(4)}"
            path.rename(grave)
            if self._alive(grave):
                os.link(grave, path)
            remove_path(grave)


class _About(BaseModel):
    """The content of a run's file."""

    model_config = ConfigDict(strict=True)

    host: str
    name: str
    pid: int
    locked: bool
    machine: str | None = None
    collects: bool = False


def check_claims(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of runs and the claims that cannot be read, with what is wrong with each.

    They do no harm: they belong to no run, and the next run removes them.

    Args:
        root: the store's folder.
    """
    for path in (*_list_runs(root), *_list_claims(root)):
        try:
            _About.model_validate(read_document(path))
        except FileNotFoundError:
            if path.is_symlink():
                yield path, "it is a link to nothing"  # otherwise the run has just ended
        except (OSError, ValueError) as error:
            yield path, describe(error)


def _list_runs(root: Path) -> list[Path]:
    return sorted(path for path in (root / "runs").glob("*") if RUN.fullmatch(path.name))


def _list_claims(root: Path) -> list[Path]:
    return sorted(path for path in (root / "claims").glob("*") if KEY.fullmatch(path.name))


def _read(path: Path) -> _About | None:
    """Return the content of a run's file; None if it has none."""
    try:
        return _About.model_validate(read_document(path))
    except (OSError, ValueError):
        return None


def _lock(handle: int) -> bool:
    """Lock a file; return whether the file system has locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(handle: int) -> bool:
    """Return whether another process has locked a file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # the file system has no locks
    return False


def _machine_id() -> str | None:
    """Return the name that this machine, or container, keeps when it is started again; None if it has none."""
    try:
        return Path("/etc/machine-id").read_text().strip() or None
    except (OSError, ValueError):
        return None


def _boot_time() -> float:
    """Return the time at which this machine was started, in seconds since the epoch by its present clock."""
    try:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return 0.0


def _this_host() -> str:
    """Return a name of the running kernel; processes on one kernel see each other's locks, also across containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"

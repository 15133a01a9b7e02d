"""Processes that tests start, stop at a point and kill: waited for by events, and only for so long.

No test depends on how long something takes. `LONG` is no expectation: it only ends a test that would hang.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tombola.cli import main
from tombola.engine.local import PRELOADED

LONG = 300.0
"""Seconds after which a test gives up waiting for something that must come."""

_CHILDREN: set[int] = set()
"""What `fork` started and nobody has waited for."""


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds that no event tells of; fail where it does not come to hold."""
    give_up = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < give_up, f"waited {LONG:g} s in vain: {what}"
        time.sleep(0.01)  # between two looks


def wait_for_end(*pids: int) -> None:
    """Wait until processes have ended, children or not."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([handle], [], [], LONG)[0], f"process {pid} goes on"
        finally:
            os.close(handle)


def status_of(pid: int) -> int:
    """Wait for the end of a child; return its exit status, or minus the number of the signal that ended it."""
    wait_for_end(pid)
    _CHILDREN.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    """Kill a child, and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL


def kill_children() -> None:
    """Kill what `fork` started and nobody has waited for: what a test that fails leaves behind."""
    for pid in list(_CHILDREN):
        os.kill(pid, signal.SIGKILL)
        status_of(pid)


@contextmanager
def start(command: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command, with `how` for `subprocess.Popen`; if it still runs at the end of the block, it is killed."""
    with subprocess.Popen(command, text=True, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def _do_nothing() -> None:
    pass


def fork(work: Callable[[], object]) -> int:
    """Do some work in a copy of this process; return the copy's number.

    The workers that it starts are copies of the process of which this one's workers are copies, which has imported all
    that they need. So nothing has to be imported again. Otherwise it is a process like any other, and dies like one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are not copied
        pid = os.fork()
    if pid:
        _CHILDREN.add(pid)
        return pid
    status = 1
    try:
        forkserver._forkserver.ensure_running = lambda: None  # it runs, but is no child of this process
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def from_fork_server(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Return a process like a worker's, which has imported torch already, and which has not been started.

    It is no copy of this process: threads are not copied, and other libraries would wait for theirs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context.Process(target=work, args=arguments)


@contextmanager
def start_command(
    folder: Path, command: Sequence[str], before: Callable[[], object] = _do_nothing
) -> Iterator[tuple[BaseProcess, Path, Path]]:
    """Start the command line in a process `from_fork_server`; in the end it is killed.

    Args:
        folder: the working directory of the process.
        command: `tombola` and its arguments.
        before: a function that the process calls first; it must be pickled.

    Returns:
        the process, and the files with all that it and its workers write as output and as errors.
    """
    with tempfile.TemporaryDirectory() as written:
        output, errors = Path(written, "output"), Path(written, "errors")
        process = from_fork_server(_work, folder, command, before, output, errors)
        process.start()
        try:
            yield process, output, errors
        finally:
            process.kill()
            process.join()


def _work(folder: Path, command: Sequence[str], before: Callable[[], object], output: Path, errors: Path) -> None:
    """Run the command line in this process, and end it; its workers come from where it comes from."""
    forkserver._forkserver.ensure_running = lambda: None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # workers leave it to the process that started them
    os.chdir(folder)
    sys.path.insert(0, "")
    for number, path in enumerate((output, errors), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    status = 1
    try:
        with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
            before()
            status = main(command[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_command(
    folder: Path, command: Sequence[str], before: Callable[[], object] = _do_nothing
) -> subprocess.CompletedProcess[str]:
    """Run the command line as `start_command` does; return its exit status and what it wrote."""
    with start_command(folder, command, before) as (process, output, errors):
        process.join(LONG)
        assert process.exitcode is not None, f"{command} goes on"
        return subprocess.CompletedProcess(command, process.exitcode, output.read_text(), errors.read_text())


def workers_of(server: int | None = None) -> list[int]:
    """Return the processes of workers: the children of the process that they are copies of, by default of ours."""
    server = server or forkserver._forkserver._forkserver_pid
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

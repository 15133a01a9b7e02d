"""A gate: where a test stops trainings in other processes at an iteration, to let them go on or die there.

The trainings are those of `gated_task`. Each asks before each iteration and waits for the answer.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from processes import LONG
from tombola.study.schema import Study, Task


@dataclass(frozen=True)
class Arrival:
    """A training that waits at the gate.

    Args:
        pid: its process.
        iteration: which comes next; counted from 0 where this process began, or went on with, the training.
    """

    pid: int
    iteration: int
    connection: socket.socket

    def go(self) -> None:
        """Let it go on to the next iteration."""
        self._answer("go")

    def die(self) -> None:
        """Have it killed on the spot."""
        self._answer("die")

    def die_writing(self) -> None:
        """Have it killed when it next writes something to a disk: a checkpoint of this iteration."""
        self._answer("die writing")

    def _answer(self, answer: str) -> None:
        with self.connection, contextlib.suppress(OSError):  # it may have been killed
            self.connection.sendall(answer.encode())


class Gate:
    """Opened, it stops each training before each iteration; closed or never opened, it lets all go on."""

    def __init__(self) -> None:
        self.address = f"{tempfile.gettempdir()}/gate-{secrets.token_hex(8)}"  # short, as a socket's name must be
        self._listener: socket.socket | None = None

    def task(self) -> Task:
        """The task whose trainings stop here."""
        arguments = {"address": self.address}
        return Task(dataset="gated_task:dataset", model="gated_task:gated", model_arguments=arguments)

    def before(self, of: Study) -> Study:
        """Return a study whose trainings stop here."""
        return of.model_copy(update={"task": self.task()})

    @contextmanager
    def opened(self) -> Iterator[Gate]:
        with socket.socket(socket.AF_UNIX) as self._listener:
            self._listener.bind(self.address)
            self._listener.listen(64)
            try:
                yield self
            finally:
                os.unlink(self.address)  # who asks from now on goes on
                while select.select([self._listener], [], [], 0)[0]:  # and so does who is waiting
                    self._listener.accept()[0].close()

    def next(self) -> Arrival:
        """Return who comes to the gate next."""
        arrival = self._next([])
        assert arrival is not None
        return arrival

    def next_before_end_of(self, pid: int) -> Arrival | None:
        """Return who comes to the gate next; None where a process ends before."""
        process = os.pidfd_open(pid)
        try:
            return self._next([process])
        finally:
            os.close(process)

    def _next(self, ends: list[int]) -> Arrival | None:
        """Return who comes next; None where there is something to be read from `ends`, and nobody has come."""
        assert self._listener is not None
        ready = select.select([self._listener, *ends], [], [], LONG)[0]
        assert ready, "nobody comes to the gate"
        if self._listener not in ready:
            return None
        connection, _ = self._listener.accept()
        connection.settimeout(LONG)
        said = b""
        while not said.endswith(b"\n"):
            more = connection.recv(100)
            if not more:  # it was killed while it asked
                connection.close()
                return self._next(ends)
            said += more
        pid, iteration = map(int, said.split())
        return Arrival(pid, iteration, connection)

    @contextmanager
    def answered(self, answer: Callable[[Arrival], None]) -> Iterator[None]:
        """Have a thread answer whoever comes, while this process does something else."""

        def serve() -> None:
            while arrival := self._next([ended]):
                answer(arrival)

        ended, end = os.pipe()
        with self.opened():
            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            try:
                yield
            finally:
                os.close(end)
                thread.join(LONG)
                os.close(ended)
                assert not thread.is_alive(), "an answer never comes"

"""A gate: where a test stops trainings in other processes at an iteration, to let them go on or die there.

The trainings are those of `gated_task`. Each asks before each iteration and waits for the answer.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
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
        self.address = f"gate-{secrets.token_hex(8)}"
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []

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
            self._listener.bind(f"\0{self.address}")  # abstract: no file, whose path might be too long
            self._listener.listen(64)
            try:
                yield self
            finally:
                self._close()

    def _close(self) -> None:
        """Let everybody go on, now and from now on; even if forks of this process hold the sockets."""
        assert self._listener is not None
        with contextlib.suppress(OSError):  # nobody is waiting any more
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.setblocking(False)
            while True:
                self._connections.append(self._listener.accept()[0])
        self._listener.close()
        while self._connections:
            with self._connections.pop() as connection, contextlib.suppress(OSError):  # it was answered
                connection.shutdown(socket.SHUT_RDWR)

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
        self._connections.append(connection)
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
        """Have a thread answer whoever comes, while this process does something else; an error in it opens the gate."""

        def serve() -> None:
            try:
                while arrival := self._next([ended]):
                    answer(arrival)
            except BaseException:
                self._close()  # nobody would be answered any more
                raise

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

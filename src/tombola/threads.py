"""Threads: how many torch computes with, independent pieces of work in several, and what they have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from typing import Generic, TypeVar

import torch

from tombola.cores import count_cores
from tombola.settings import default_device

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MOST = 4
"""The most pieces of work at the same time; each may hold what a network computes for a batch of examples."""

_WAIT = 0.2  # seconds
_LEAST = 4  # results that are kept however large they are

_here = threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block: the number of threads affects the order of a sum and so its last bits.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Return `function(item)` for each item in order, computed in one thread for each core, and in at most `MOST`.

    Each call computes the same bits as alone, because torch uses one thread in it. Where torch may use several threads
    (see `one_thread`), inside another such call, and under autocast or another default device, the calls are made one
    after the other.

    If calls fail, the error of the first of them in order is raised. Then, and after Ctrl-C, calls that have not begun
    are left out, and calls that have begun end at their next `check_stopped`.

    Args:
        function: a function that threads may call at the same time.
        items: its arguments.

    >>> map_in_threads(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    items = list(items)
    threads = min(count_cores(), MOST, len(items))
    alone = torch.get_num_threads() > 1 or hasattr(_here, "stopped")
    # New threads do not have these settings of the thread that calls.
    alone = alone or torch.is_autocast_enabled("cpu") or default_device(torch).type != "cpu"
    if threads < 2 or alone:
        return [function(item) for item in items]
    stopped = threading.Event()

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets its number, which would undo the next line
        torch.set_num_threads(1)
        _here.stopped = stopped

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        try:
            futures = [pool.submit(copy_context().run, function, item) for item in items]
            return [_result_of(future) for future in futures]
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _result_of(future: Future[_Result]) -> _Result:
    """Return the result of a future.

    Each wait for it is short, so that Python answers Ctrl-C after it: the import of polars sets SA_RESTART for the
    signal of Ctrl-C, with which the system resumes a wait.
    """
    while not wait([future], timeout=_WAIT).done:
        pass
    return future.result()


def check_stopped() -> None:
    """End a call of `map_in_threads` whose result is not needed any more; anywhere else, do nothing.

    Raises:
        CancelledError: to end the call.
    """
    if hasattr(_here, "stopped") and _here.stopped.is_set():
        raise CancelledError


class Shared:
    """A context of the whole process for several blocks at the same time, in other threads or inside one another.

    The first block enters the context, and the last one leaves it.

    Args:
        make: a function that returns the context.

    >>> from contextlib import closing
    >>> class Setting:
    ...     def close(self): print("as before")
    >>> shared = Shared(lambda: closing(Setting()))
    >>> with shared.block():
    ...     with shared.block():
    ...         print("inner")
    ...     print("outer")
    inner
    outer
    as before
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make, self._entered = make, ExitStack()
        self._blocks, self._lock = 0, threading.Lock()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Be in the context inside the block."""
        with self._lock:
            if self._blocks == 0:
                self._entered.enter_context(self._make())
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._entered.close()


class Kept(Generic[_Item, _Result]):
    """A function whose latest results are kept by name. Several threads that ask for the same one compute it once.

    An error is raised in each thread that waits for the result, and is not kept.

    Args:
        function: the function of one argument.
        size: a function that returns the size of a result.
        room: the sum of the sizes up to which results are kept; the latest four always are.

    >>> squares = Kept(lambda number: print("computing") or number**2)
    >>> squares("two", 2), squares("two", 2)
    computing
    (4, 4)
    """

    def __init__(
        self, function: Callable[[_Item], _Result], size: Callable[[_Result], int] = lambda _: 0, room: int = 0
    ) -> None:
        self._function, self._size, self._room = function, size, room
        self._known: dict[Hashable, Future[_Result]] = {}  # the one that was asked for last at the end
        self._lock = threading.Lock()

    def __contains__(self, name: Hashable) -> bool:
        """Return whether a result is kept or is being computed."""
        return name in self._known

    def __call__(self, name: Hashable, item: _Item) -> _Result:
        """Return the result for an item; items with the same name have the same result."""
        with self._lock:
            known = self._known.pop(name, None)
            future = self._known[name] = known or Future()
        if known is None:
            try:
                future.set_result(self._function(item))
            except BaseException as error:
                with self._lock:
                    self._known.pop(name, None)
                future.set_exception(error)
                raise
            self._forget()
        try:
            return future.result()
        except CancelledError:  # another thread, which was to compute the result, was stopped
            check_stopped()
            return self(name, item)

    def _forget(self) -> None:
        with self._lock:
            sizes = {name: self._size(each.result()) for name, each in self._known.items() if each.done()}
            for name in list(sizes)[: max(0, len(sizes) - _LEAST)]:
                if sum(sizes.values()) > self._room:
                    del self._known[name], sizes[name]

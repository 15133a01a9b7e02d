"""Work that is done in several threads: its order, its errors, and results that are kept."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from contextvars import ContextVar

import pytest
import torch

from tombola import threads
from tombola.threads import Kept, check_stopped, map_in_threads, one_thread

LONG = 60.0  # seconds that no thread waits unless something is wrong


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: 2)


def test_calls_are_made_at_the_same_time_and_their_results_are_in_order() -> None:
    first_two = threading.Barrier(2)

    def call(number: int) -> tuple[int, int]:
        if number < 2:
            first_two.wait(LONG)  # for the other one: it fails where one call follows the other
        return number, torch.get_num_threads()

    with one_thread():
        assert map_in_threads(call, range(5)) == [(number, 1) for number in range(5)]


@pytest.mark.parametrize("several", ["threads of torch", "calls inside a call"])
def test_calls_follow_each_other_where_something_else_uses_the_cores(several: str) -> None:
    def name(_: int) -> str:
        return threading.current_thread().name

    with one_thread():
        if several == "threads of torch":
            torch.set_num_threads(2)
            assert map_in_threads(name, range(3)) == [name(0)] * 3
        else:
            for inner in map_in_threads(lambda _: [name(0), *map_in_threads(name, range(3))], range(2)):
                assert len(set(inner)) == 1


def test_the_first_error_in_order_is_raised_and_ends_the_calls_that_have_begun() -> None:
    failed, never, ends, begun = threading.Event(), threading.Event(), list[int](), list[int]()

    def call(number: int) -> None:
        begun.append(number)
        if number == 0:
            failed.wait(LONG)
            raise ValueError("the first")
        if number == 1:
            failed.set()
            raise ValueError("the second")
        for _ in range(6000):
            try:
                check_stopped()
            except CancelledError:
                ends.append(number)
                raise
            never.wait(LONG / 6000)

    with one_thread(), pytest.raises(ValueError, match="the first"):
        map_in_threads(call, range(9))
    assert len(begun) < 9
    assert sorted(ends) == sorted(number for number in begun if number > 1)
    check_stopped()  # outside of such calls it does nothing


def test_ctrl_c_ends_the_calls_also_where_the_system_resumes_waits() -> None:
    never, ends = threading.Event(), list[int]()

    def call(number: int) -> None:
        never.wait(0.3)  # the main thread waits by now
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(600):
            try:
                check_stopped()
            except CancelledError:
                ends.append(number)
                raise
            never.wait(LONG / 600)

    signal.siginterrupt(signal.SIGINT, False)  # as the import of polars does
    try:
        with one_thread(), pytest.raises(KeyboardInterrupt):
            map_in_threads(call, range(2))
    finally:
        signal.siginterrupt(signal.SIGINT, True)
    assert sorted(ends) == [0, 1], "the calls have not ended by themselves"


def test_threads_that_ask_for_one_result_compute_it_once() -> None:
    both, computed = threading.Barrier(2), list[int]()
    double = Kept(lambda number: computed.append(number) or 2 * number)

    def ask(_: int) -> int:
        both.wait(LONG)
        return double("three", 3)

    with one_thread():
        assert map_in_threads(ask, range(2)) == [6, 6]
    assert computed == [3]


def test_results_are_kept_as_long_as_there_is_room() -> None:
    computed: list[int] = []

    def keep(size: Callable[[int], int]) -> list[int]:
        computed.clear()
        result = Kept(lambda number: computed.append(number) or number, size, room=5)
        for number in [*range(6), 1, 0, 1, 5]:
            assert result(number, number) == number
        return computed

    assert keep(lambda _: 1) == [*range(6), 0], "five fit, of which 1 was asked for again before 0"
    assert keep(lambda _: 9) == [*range(6), 1, 0], "four are kept however large they are"


def test_an_error_is_not_kept() -> None:
    computed: list[int] = []

    def fail(number: int) -> None:
        computed.append(number)
        raise ValueError("no result")

    result = Kept(fail, lambda _: 1, room=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no result"):
            result("one", 1)
    assert computed == [1, 1]


def test_a_result_whose_computation_was_stopped_is_computed_by_the_thread_that_waits() -> None:
    asked, computed = threading.Event(), list[str]()

    def compute(name: str) -> str:
        computed.append(name)
        if len(computed) == 1:
            asked.wait(LONG)
            raise CancelledError
        return name

    result = Kept(compute)

    def ask_first() -> None:
        with suppress(CancelledError):
            result("one", "first")

    first = threading.Thread(target=ask_first)
    first.start()
    while not computed:
        time.sleep(0.001)
    second = threading.Timer(0.05, asked.set)
    second.start()
    assert result("one", "second") == "second"
    first.join(LONG)
    assert computed == ["first", "second"]


def test_settings_of_a_thread_are_those_of_each_call() -> None:
    setting = ContextVar("setting", default=0)
    setting.set(3)

    def call(_: int) -> tuple[int, torch.dtype]:
        return setting.get(), torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype

    with one_thread(), torch.autocast("cpu", torch.bfloat16):
        assert map_in_threads(call, range(3)) == [(3, torch.bfloat16)] * 3
    with one_thread():
        assert map_in_threads(call, range(3)) == [(3, torch.float32)] * 3

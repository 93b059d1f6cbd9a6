"""Items made on a thread: the same ones, no more ahead than allowed, and never a thread that stays."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ds_align.packing import make_ahead
from ds_align.packing.ahead import THREAD_NAME


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    assert threads() == []
    yield
    gc.collect()
    assert threads() == []


class Counted:
    """Numbers from 0 on, and how many were made, by which thread."""

    def __init__(self, count: int | None = None, fails_at: int | None = None) -> None:
        self.made = 0
        self.threads: set[str] = set()
        self.count = count
        self.fails_at = fails_at

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count() if self.count is None else range(self.count):
            if number == self.fails_at:
                raise ValueError(f"item {number}")
            self.made += 1
            self.threads.add(threading.current_thread().name)
            yield number


def settle(items: Counted) -> int:
    """How many are made when the thread does no more."""
    made = -1
    while made != items.made:
        made = items.made
        time.sleep(0.02)
    return made


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_from_another_thread(depth: int) -> None:
    items = Counted(50)
    assert list(make_ahead(items, depth=depth)) == list(range(50))
    assert items.threads == {THREAD_NAME}


def test_nothing_starts_before_the_first_item_is_asked_for() -> None:
    items = Counted(5)
    ahead = make_ahead(items)
    assert settle(items) == 0 and threads() == []
    assert next(ahead) == 0


def test_the_queue_is_bounded() -> None:
    items = Counted()
    ahead = make_ahead(items, depth=2)
    for number in range(4):
        assert next(ahead) == number
        # Those that were taken, two that wait, and one in the maker's hand.
        assert settle(items) == number + 1 + 2 + 1


def test_an_error_comes_behind_the_items_before_it() -> None:
    found = []
    with pytest.raises(ValueError, match="item 3") as raised:
        found.extend(make_ahead(Counted(fails_at=3)))
    # Where it happened is still in the traceback.
    assert any(entry.name == "__iter__" for entry in raised.traceback)
    assert found == [0, 1, 2]


def test_exits_in_the_maker_are_not_lost() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(make_ahead(items()))


def test_a_break_ends_the_thread() -> None:
    for number in make_ahead(Counted()):
        if number == 2:
            break
    assert threads() == []


def test_an_error_of_the_user_ends_the_thread() -> None:
    def loop() -> None:
        for number in make_ahead(Counted()):
            if number == 1:
                raise KeyError(number)

    with pytest.raises(KeyError):
        loop()


def test_closing_and_dropping_end_the_thread() -> None:
    ahead = make_ahead(Counted())
    next(ahead)
    assert len(threads()) == 1
    ahead.close()
    assert threads() == [] and list(ahead) == []
    ahead = make_ahead(Counted())
    next(ahead)
    del ahead
    assert threads() == []


def test_closing_does_not_wait_for_items_that_nobody_takes() -> None:
    def slow() -> Iterator[int]:
        for number in itertools.count():
            time.sleep(0.05)
            yield number

    ahead = make_ahead(slow())
    assert next(ahead) == 0
    started = time.perf_counter()
    ahead.close()
    # One item may be in the making.
    assert time.perf_counter() - started < 1.0


def test_a_generator_in_a_cycle_is_collected() -> None:
    class Holder:
        pass

    holder = Holder()
    holder.itself = holder
    holder.ahead = make_ahead(Counted())
    next(holder.ahead)
    del holder
    gc.collect()
    assert threads() == []


def test_prepare_runs_once_and_first_on_the_thread() -> None:
    calls: list[str] = []

    def items() -> Iterator[int]:
        calls.append("items")
        yield 1

    prepared = make_ahead(items(), prepare=lambda: calls.append(threading.current_thread().name))
    assert list(prepared) == [1]
    assert calls == [THREAD_NAME, "items"]


def test_making_and_using_run_at_the_same_time() -> None:
    def slow() -> Iterator[int]:
        for number in range(8):
            time.sleep(0.05)
            yield number

    waited = 0.0
    ahead = make_ahead(slow())
    next(ahead)
    for _ in range(7):
        time.sleep(0.1)
        started = time.perf_counter()
        next(ahead)
        waited += time.perf_counter() - started
    # In turn it would be 7 * 0.05 s.
    assert waited < 0.15


def test_a_process_ends_in_peace_while_items_are_made() -> None:
    """The iterator is kept to the end of the program, its thread inside of torch all the time."""
    code = """
import torch
from ds_align.packing import make_ahead

def items():
    while True:
        yield torch.randn(200, 200) @ torch.randn(200, 200)

kept = make_ahead(items(), depth=10**6)
next(kept)
"""
    for _ in range(3):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (ran.returncode, ran.stderr) == (0, "")

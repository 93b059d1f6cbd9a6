"""Items made ahead on a thread, so that whoever takes them does not wait for their making."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

THREAD_NAME = "ds_align-ahead"
_running: dict[threading.Thread, _Shelf] = {}


class _Shelf(Generic[Item]):
    """A few finished items between a thread that makes them and one that takes them."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_finished = False
        self._error: BaseException | None = None

    def put(self, item: Item) -> bool:
        """Waits for room; False where nobody takes any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) < self._depth)
            if not self._is_closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._is_closed

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self._error, self._is_finished = error, True
            self._changed.notify_all()

    def take(self) -> Iterator[Item]:
        """The items in order; raises the maker's error behind the last one that it finished."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._is_finished)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Nobody takes any more."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()


def make_ahead(
    items: Iterable[Item], *, depth: int = 2, prepare: Callable[[], None] | None = None
) -> Iterator[Item]:
    """The same items in the same order, up to depth of them (and one in the making) ahead of their use.

    prepare: called first on the thread. The thread starts with the first item that is asked for. It has ended
    when the iterator is exhausted, closed or dropped, or has raised the error that making an item raised.
    Making an item must not communicate: another thread's collectives would get out of order between ranks.
    """
    shelf: _Shelf[Item] = _Shelf(depth)
    # A daemon: an iterator that is never dropped must not keep the process from ending.
    thread = threading.Thread(target=_make, args=(items, shelf, prepare), name=THREAD_NAME, daemon=True)
    _running[thread] = shelf
    thread.start()
    try:
        yield from shelf.take()
    finally:
        shelf.close()
        # The collector may run on any thread, so also on that one.
        if thread is not threading.current_thread():
            thread.join()
        _running.pop(thread, None)


@atexit.register
def _end_threads() -> None:
    """Ends what iterators that were never dropped left running.

    Python kills a daemon that is inside of torch at that moment, and C++ then aborts the process.
    """
    for thread, shelf in list(_running.items()):
        shelf.close()
        thread.join()


def _make(items: Iterable[Item], shelf: _Shelf[Item], prepare: Callable[[], None] | None) -> None:
    try:
        if prepare is not None:
            prepare()
        for item in items:
            if not shelf.put(item):
                return
    except BaseException as error:  # noqa: BLE001 - raised again where the items are taken
        shelf.finish(error)
    else:
        shelf.finish()

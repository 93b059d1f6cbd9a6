"""Ends a rank that makes no progress, and shows where it hangs.

A peer that died is told by the back end within seconds; one that hangs is not: the others wait in a
collective, and so does the launcher of several nodes, for ever.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from ds_align import distributed
from ds_align.errors import EXIT_UNFORESEEN

# A thread of Python cannot run while other code holds the interpreter: after so much longer C ends the rank.
_GRACE_SECONDS = 15.0


# The one that is open in this process.
_open: Watchdog | None = None


def beat(what: str) -> None:
    """Something was done; what: in words, such as "step 12". Without an open watchdog it does nothing."""
    if _open is not None:
        _open.beat(what)


class Watchdog:
    """A thread that ends the process when `beat` was not called for `seconds`; None: it does nothing."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._last = (time.monotonic(), "the start of training")
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        global _open  # noqa: PLW0603 - whoever makes progress need not know who watches
        if self.seconds is not None:
            _open = self
            self.beat("the start of training")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open  # noqa: PLW0603 - see above
        _open = None
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str) -> None:
        """See the function."""
        self._last = (time.monotonic(), what)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            # Put off as long as this thread runs. The first stderr: a test or a notebook may have put another
            # object in its place.
            faulthandler.dump_traceback_later(self.seconds + _GRACE_SECONDS, exit=True, file=sys.__stderr__)
            since, what = self._last
            silent = time.monotonic() - since
            if silent > self.seconds:
                self._end(silent, what)

    def _end(self, silent: float, what: str) -> None:
        """Shows the stacks of all threads and leaves without waiting for anybody."""
        text = (
            f"rank {distributed.environment_rank()}: nothing was done for {silent:.0f} s since {what} "
            f"(hang_timeout={self.seconds:g}); another rank hangs or is gone, or a step takes longer: see "
            "where this one waits below, and at the other ranks; raise hang_timeout if all is well\n"
        )
        sys.__stderr__.write(text)
        sys.__stderr__.flush()
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(EXIT_UNFORESEEN)

"""Leaving a run when the machine asks for it: a signal to any rank, one decision for all of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ds_align import distributed

# What schedulers send before they take the machine away, and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# The third signal ends the process as if it were not handled.
_AT_ONCE = 3
# What a shell says of a process that SIGTERM ended.
_EXIT_TERMINATED = 128 + signal.SIGTERM


class Interruption:
    """Notes the signals of this rank while it is open; `agreed` asks all ranks.

    The first signal ends the run after the step that is under way, the second changes nothing (it may come
    while a checkpoint is written), the third ends the process at once. So does a SIGTERM where another rank
    of this machine is gone: then it is the launcher that clears up, and the step will never end. Outside of
    the main thread, where Python takes no signals, nothing is noted. Opening is collective: every rank must
    do it.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._earlier: dict[signal.Signals, Callable | int | None] = {}
        self._group: Any = None
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._earlier_fd = -1

    def __enter__(self) -> Interruption:
        self._group = distributed.host_group()
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._wakeup = socket.socketpair()
            self._wakeup[1].setblocking(False)
            self._earlier_fd = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wakeup is None:
            return
        signal.set_wakeup_fd(self._earlier_fd)
        for number, handler in self._earlier.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._wakeup[1].close()

    def _note(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._names.append(name)
        if len(self._names) >= _AT_ONCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        said = "the run ends after this step and is saved" if len(self._names) == 1 else "it is being saved"
        text = f"rank {distributed.rank()}: {name}: {said}; a third signal ends it at once\n"
        # print is not safe in a handler: the signal may have come inside of another one.
        os.write(sys.__stderr__.fileno(), text.encode())

    def _listen(self) -> None:
        """Hears of signals even while the main thread waits in a collective, where no handler runs."""
        listener = self._wakeup[0]
        with listener:
            while heard := listener.recv(16):
                if signal.SIGTERM in heard and is_left_behind():
                    text = f"rank {distributed.environment_rank()}: another rank is gone: ends at once\n"
                    os.write(sys.__stderr__.fileno(), text.encode())
                    os._exit(_EXIT_TERMINATED)

    def agreed(self) -> str | None:
        """Who got which signal, where any rank got one; the same on every rank.

        Collective: every rank must call this, at the same step. It costs one small message between hosts,
        and does not wait for a device.
        """
        first = distributed.first_rank(bool(self._names), self._group)
        if first is None:
            return None
        name = distributed.broadcast_text(self._names[0] if self._names else "", first, self._group)
        return f"{name} on rank {first}"


def is_left_behind() -> bool:
    """Whether a rank that the same launcher started on this machine is gone."""
    expected = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    if expected is None or not Path("/proc").is_dir():
        return False
    parent, alive = os.getppid(), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of a program stands in brackets and may hold anything.
            state, parent_of = (
                path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            )
        except (OSError, ValueError):
            continue
        alive += int(parent_of) == parent and state != "Z"
    return alive < int(expected)

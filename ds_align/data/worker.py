"""The other side of parallel.py: `python -m ds_align.data.worker` encodes what comes in through its pipe.

Pickled objects come in: the ChunkSettings, then parts; an (answer, error) pair goes out for each.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any, BinaryIO

# Ctrl-C reaches every process of the terminal; the one that started this one decides.
signal.signal(signal.SIGINT, signal.SIG_IGN)

from ds_align.data.chunks import ChunkEncoder  # noqa: E402
from ds_align.data.parallel import CannotShareError  # noqa: E402


def main() -> None:
    """Answers until the pipe closes."""
    # What libraries print on stdout must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=2**20)
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    try:
        settings = pickle.load(requests)
        encoder = ChunkEncoder(settings)
    except Exception as error:  # noqa: BLE001 - told to the other side
        _answer(answers, None, CannotShareError(f"{type(error).__name__}: {error}"))
        return
    _answer(answers, None, None)
    while True:
        try:
            part = pickle.load(requests)
        except EOFError:
            return
        try:
            answer, error = encoder.encode(part), None
        except Exception as caught:  # noqa: BLE001 - raised again on the other side
            answer, error = None, _sendable(caught)
        _answer(answers, answer, error)


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever pickle meets
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(again, type(error)) else RuntimeError(f"{type(error).__name__}: {error}")


def _answer(answers: BinaryIO, answer: Any, error: Exception | None) -> None:
    try:
        pickle.dump((answer, error), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
    except BrokenPipeError:
        # Nobody listens any more; a normal exit would try to flush the pipe again, and complain.
        os._exit(0)


if __name__ == "__main__":
    main()

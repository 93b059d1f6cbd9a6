"""Chunks tokenized by several processes, in order.

The processes are fresh interpreters that talk over pipes. A fork would copy the threads' locks of torch and
DeepSpeed in whatever state they are; multiprocessing's spawn would import the user's script a second time,
and train there where it has no main guard. A process ends when its pipe closes, so none outlives this one.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from ds_align.data.chunks import ChunkEncoder, ChunkSettings, EncodedChunk
from ds_align.data.readers import CHUNK_ROWS
from ds_align.data.rows import Rows
from ds_align.errors import ConfigError

# Starting a process takes as long as tokenizing some thousand rows.
_SMALL_SET_ROWS = 20_000
# This process, which gathers the chunks, keeps about as many busy.
_MOST_PROCESSES = 32
# Chunks that wait for each process, so that none idles while this one writes.
_WAITING = 2


class CannotShareError(Exception):
    """Why other processes cannot do the work of this one."""


def num_processes(wanted: int | Literal["auto"], num_rows: int, *, sharing_ranks: int) -> int:
    """Processes that tokenize: `wanted`, or by the rows and the cores that each of the ranks may use."""
    num_chunks = max(1, -(-num_rows // CHUNK_ROWS))
    if wanted != "auto":
        return min(wanted, num_chunks)
    if num_rows < _SMALL_SET_ROWS:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // sharing_ranks, num_chunks, _MOST_PROCESSES))


def encode_here(settings: ChunkSettings, parts: Iterable[Rows]) -> Iterator[EncodedChunk]:
    """Encodes each part in this process."""
    encoder = ChunkEncoder(settings)
    return (encoder.encode(part) for part in parts)


class EncodingProcesses:
    """Processes that are ready to encode; a context manager that ends them."""

    def __init__(self, settings: ChunkSettings, number: int) -> None:
        """Raises CannotShareError where the tokenizer cannot be sent to another process."""
        try:
            content = pickle.dumps(settings)
        except Exception as error:
            raise CannotShareError(f"{type(error).__name__}: {error}") from error
        self._workers: list[_Worker] = []
        try:
            self._workers += [_Worker() for _ in range(number)]
            for worker in self._workers:
                worker.send(content)
            for worker in self._workers:
                worker.receive()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> EncodingProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def encode(self, parts: Iterable[Rows]) -> Iterator[EncodedChunk]:
        """The encoded parts, in their order; an error is raised in the place of its part."""
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def encode_one(part: Rows) -> EncodedChunk:
            worker = idle.get()
            try:
                worker.send(pickle.dumps(part))
                return worker.receive()
            finally:
                idle.put(worker)

        waiting: deque[Future[EncodedChunk]] = deque()
        threads = ThreadPoolExecutor(len(self._workers))
        try:
            for part in parts:
                waiting.append(threads.submit(encode_one, part))
                if len(waiting) >= _WAITING * len(self._workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process and its pipes."""

    def __init__(self) -> None:
        # -P: a file of the working directory must not stand in for a library.
        # The cores are shared by process, so each needs one thread; a GPU would only lose memory to it.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ds_align.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def send(self, content: bytes) -> None:
        """Hands over one pickled object."""
        try:
            self._process.stdin.write(content)
            self._process.stdin.flush()
        except BrokenPipeError:
            # receive says why.
            return

    def receive(self) -> Any:
        """The answer to what was sent. Raises what the other process raised."""
        try:
            answer, error = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise ConfigError(
                f"dataset_num_proc: a process that tokenizes ended with code {code} (-9: out of memory, as a "
                "rule); set a smaller dataset_num_proc"
            ) from None
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                continue

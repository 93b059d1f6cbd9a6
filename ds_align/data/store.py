"""Tokenized data on disk: one directory an entry, written whole or not at all, mapped into memory.

`tables.arrow` is an Arrow IPC file with one row, whose columns are the arrays of Tables as lists; nothing is
copied on reading. `entry.json` holds the rest and the hash of the Arrow file, behind a hash of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ds_align.data.tables import Tables, TokenTable
from ds_align.file_digests import FileDigests

FORMAT = 1
_TABLES = "tables.arrow"
_ENTRY = "entry.json"
# A directory of an unfinished entry that nobody wrote to for this long has no owner.
_ABANDONED_SECONDS = 86400


class DamagedEntryError(Exception):
    """What is wrong with an entry; it must be made again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that was verified: its arrays as views of the memory map, and `facts` as JSON values."""

    tables: Tables
    facts: dict[str, Any]


def read_entry(directory: Path, digests: FileDigests) -> Entry | None:
    """The entry in `directory`, None where there is none. Raises DamagedEntryError.

    The hash of a large file is remembered by `digests`, so that it is verified once.
    """
    if not directory.is_dir():
        return None
    path = directory / _TABLES
    try:
        stored = _read_facts(directory / _ENTRY)
        if digests.digest(path) != stored["tables_sha256"]:
            raise DamagedEntryError(f"{_TABLES} is not what was written")
        columns = _map_columns(path)
    except OSError as error:
        raise DamagedEntryError(f"{error.strerror or error}: {error.filename}") from error
    # A map of the tokens is not trusted before its hash was seen: Arrow reads where the file tells it to.
    return Entry(_as_tables(columns, stored), stored["facts"])


@contextlib.contextmanager
def new_entry(directory: Path) -> Iterator[Path]:
    """A private directory beside `directory` to write an entry in; it is gone afterwards, whatever happens.

    Raises OSError where the disk refuses.
    """
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.partial")
    _remove_abandoned(directory.parent)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_entry(partial: Path, directory: Path, tables: Tables, facts: dict[str, Any]) -> None:
    """Writes the entry into `partial` and moves it to `directory`; one that another process put there stays.

    Raises OSError where the disk refuses.
    """
    path = partial / _TABLES
    _write_columns(path, tables.columns())
    with path.open("rb") as file:
        tables_sha256 = _hash(file)
    stored = {
        "format": FORMAT,
        "tables_sha256": tables_sha256,
        "digest": tables.digest,
        "max_length": tables.max_length,
        "facts": facts,
    }
    text = json.dumps(stored)
    content = f"{sha256(text.encode()).hexdigest()}\n{text}\n"
    with (partial / _ENTRY).open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for spool in partial.glob("*.spool"):
        spool.unlink()
    _fsync_directory(partial)
    try:
        partial.rename(directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _fsync_directory(directory.parent)


def remove_entry(directory: Path) -> None:
    """Takes an entry away at once, so that nobody meets one that is half removed."""
    away = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.partial")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        digest, _, text = path.read_text(encoding="utf-8").rstrip("\n").partition("\n")
    except UnicodeDecodeError:
        digest, text = "", ""
    if sha256(text.encode()).hexdigest() != digest:
        raise DamagedEntryError(f"{_ENTRY} is not what was written")
    return json.loads(text)


def _write_columns(path: Path, columns: dict[str, np.ndarray]) -> None:
    import pyarrow as pa

    arrays = []
    for column in columns.values():
        values = column.view(np.uint8) if column.dtype == bool else column
        buffer = pa.py_buffer(np.ascontiguousarray(values))
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])
        arrays.append(pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), flat))
    batch = pa.record_batch(arrays, names=list(columns))
    with path.open("wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _map_columns(path: Path) -> dict[str, np.ndarray]:
    import pyarrow as pa

    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {
        name: column.values.to_numpy(zero_copy_only=True)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def _as_tables(columns: dict[str, np.ndarray], stored: dict[str, Any]) -> Tables:
    desirable, completion_index = columns.get("desirable"), columns.get("completion_index")
    return Tables(
        TokenTable(columns["prompt_values"], columns["prompt_offsets"]),
        columns["prompt_index"],
        TokenTable(columns["completion_values"], columns["completion_offsets"]),
        None if desirable is None else desirable.view(bool),
        columns.get("kl_index"),
        stored["max_length"],
        stored["digest"],
        None if completion_index is None else completion_index.reshape(-1, 2),
    )


def _hash(file: Any) -> str:
    from hashlib import file_digest

    return file_digest(file, "sha256").hexdigest()


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """What processes left behind that were killed while they wrote."""
    limit = time.time() - _ABANDONED_SECONDS
    for path in parent.glob("*.partial"):
        with contextlib.suppress(OSError):
            if max(item.stat().st_mtime for item in (path, *path.iterdir())) < limit:
                shutil.rmtree(path, ignore_errors=True)

"""Log-probs of a frozen reference on disk, found by what they were computed from and by nothing else.

A cache is a directory per reference (its weights, precision and tokenizer: see `identity`) that holds Arrow
files. A row's key is the hash of its prompt's and its completion's token ids, so runs, methods, epochs and
data sets share what they have in common, and no setting can make a row stale. Files are written under
another name and renamed when they are on the disk, and never changed: any number of ranks and runs may write
at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from ds_align.errors import CheckpointError, DataError

FORMAT = 1
KEY_BYTES = 16
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logps", pa.large_list(pa.field("item", pa.float32(), nullable=False)), nullable=False),
        pa.field("checksum", pa.uint32(), nullable=False),
    ]
)
_PART, _PARTIAL = "part-", ".tmp-"
_ABANDONED_SECONDS = 24 * 3600
# Enough to notice a disk that is full.
_PROBE_BYTES = 1 << 16


def row_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """Hash of a completion behind its prompt, both int32 [num_tokens]."""
    found = blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=KEY_BYTES)
    found.update(np.ascontiguousarray(prompt_ids, dtype="<i4").data)
    found.update(np.ascontiguousarray(completion_ids, dtype="<i4").data)
    return found.digest()


def identity(facts: Mapping[str, object]) -> str:
    """Name of a reference's directory: a hash of everything that the log-probs depend on but the tokens."""
    text = json.dumps({**facts, "format": FORMAT}, sort_keys=True)
    return blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One file, mapped: keys uint64 [n, 2], offsets int64 [n + 1] into values, checksums uint32 [n]."""

    name: str
    keys: np.ndarray
    offsets: np.ndarray
    values: np.ndarray
    checksums: np.ndarray
    # Holds the mapping that the arrays point into.
    batch: pa.RecordBatch

    @classmethod
    def open(cls, path: Path) -> _Part:
        """Raises OSError and pyarrow.ArrowException for a file that is not whole."""
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        if not batch.schema.equals(_SCHEMA):
            raise pa.ArrowInvalid(f"unexpected columns {batch.schema.names}")
        batch.validate()
        key, logps, checksum = batch.columns
        return cls(
            path.name,
            np.frombuffer(key.buffers()[1], dtype="<u8", count=2 * len(key)).reshape(-1, 2),
            logps.offsets.to_numpy(),
            logps.values.to_numpy(),
            checksum.to_numpy(),
            batch,
        )

    def read(self, row: int, key: bytes, length: int) -> np.ndarray | None:
        """The row's log-probs, a view; None where it is damaged."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        if stop - start != length or not 0 <= start <= stop <= len(self.values):
            return None
        values = self.values[start:stop]
        return values if _checksum(key, values) == self.checksums[row] else None


@dataclass(frozen=True, slots=True, eq=False)
class _Index:
    """The rows of all files by key; of rows with one key, those of later files come first.

    high, low: uint64 [n], the halves of the keys in order; part, row: int64 [n], where each row stands.
    """

    high: np.ndarray
    low: np.ndarray
    part: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> _Index:
        counts = [len(part.keys) for part in parts]
        keys = np.concatenate([np.empty((0, 2), dtype=np.uint64), *(part.keys for part in parts)])
        part = np.repeat(np.arange(len(counts)), counts)
        row = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(count) for count in counts)])
        order = np.lexsort((-part, keys[:, 1], keys[:, 0]))
        return cls(keys[order, 0], keys[order, 1], part[order], row[order])

    def places(self, key: bytes) -> Iterator[tuple[int, int]]:
        """(part, row) of each row with this key."""
        high, low = np.frombuffer(key, dtype="<u8")
        place = int(np.searchsorted(self.high, high))
        while place < len(self.high) and self.high[place] == high:
            if self.low[place] == low:
                yield int(self.part[place]), int(self.row[place])
            place += 1


def _checksum(key: bytes, values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values, dtype="<f4").data, zlib.crc32(key))


def _write_error(directory: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        advice = "a file stands in its path, give a directory"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "give a directory that you can write"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free space or give another directory"
    else:
        advice = "give another directory"
    return CheckpointError(
        f"ref_cache_dir: {directory} cannot be written ({error.strerror or error}); {advice}"
    )


class ReferenceCache:
    """The rows of one reference. `parts` are the files that this process reads; others may come beside them.

    damaged_files, damaged_rows: where files and single rows were found damaged; they count as not there.
    """

    def __init__(self, directory: Path, facts: Mapping[str, object]) -> None:
        self.directory = directory / identity(facts)
        self.facts = dict(facts)
        self.parts: list[_Part] = []
        self.damaged_files: list[str] = []
        self.damaged_rows: list[str] = []
        self._torn: list[Path] = []
        self._index = _Index.of([])

    def part_names(self) -> list[str]:
        """Names of the files that are there now, in a fixed order."""
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.glob(f"{_PART}*.arrow"))

    def open_parts(self, names: Sequence[str]) -> None:
        """Adds files to those that are read; one that is not whole is a damaged file and left out."""
        known = {part.name for part in self.parts}
        for name in names:
            if name in known:
                continue
            try:
                self.parts.append(_Part.open(self.directory / name))
            except (OSError, pa.ArrowException) as error:
                self.damaged_files.append(f"{self.directory / name}: {' '.join(str(error).split())[:120]}")
                # Not after an error of the system, such as too many open files: the file may be whole. Arrow
                # raises OSError too, without a number.
                if getattr(error, "errno", None) is None:
                    self._torn.append(self.directory / name)
        self._index = _Index.of(self.parts)

    def __len__(self) -> int:
        return len(self._index.high)

    def damage(self) -> str | None:
        """What is damaged, in words; None where nothing is."""
        files, rows = (sorted(set(places)) for places in (self.damaged_files, self.damaged_rows))
        counts = [
            f"{len(places)} {noun}{'s' if len(places) > 1 else ''}"
            for places, noun in ((files, "file"), (rows, "single row"))
            if places
        ]
        if not counts:
            return None
        places = [*files, *rows]
        verb = "is damaged and counts" if len(places) == 1 else "are damaged and count"
        return f"{' and '.join(counts)} {verb} as missing: {'; '.join(places[:3])}"

    def forget_damage(self) -> None:
        """From here on only what is found damaged again is."""
        self.damaged_files.clear()
        self.damaged_rows.clear()

    def set_aside(self) -> None:
        """Renames the files that are not whole, so that no later run reads or names them again."""
        for path in self._torn:
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".damaged"))
        self._torn.clear()

    def find(self, key: bytes, length: int) -> np.ndarray | None:
        """Log-probs float32 [length] of a key (a view that must not be written); None where there are none.

        A row whose checksum does not fit is passed over; where no other row has the key it is noted in
        `damaged_rows`.
        """
        index, last = self._index, None
        for number, row in index.places(key):
            part = self.parts[number]
            values = part.read(row, key, length)
            if values is not None:
                return values
            last = f"{self.directory / part.name}: row {row}"
        if last is not None:
            self.damaged_rows.append(last)
        return None

    def read(self, key: bytes, length: int) -> np.ndarray:
        """As find, for a row that must be there. Raises DataError."""
        values = self.find(key, length)
        if values is None:
            fault = "damaged" if self.damaged_rows else "not there"
            raise DataError(
                f"{self.directory}: a row of the reference cache that was whole at the start is {fault}; "
                "start the run again, which computes it again"
            )
        return values

    def write_part(self, rows: Iterable[tuple[bytes, np.ndarray]]) -> str:
        """Writes rows of (key, log-probs) as a new file and returns its name. Raises CheckpointError."""
        keys, values = zip(*rows, strict=True)
        batch = pa.record_batch(
            [
                pa.array(keys, type=_SCHEMA.field("key").type),
                pa.LargeListArray.from_arrays(
                    pa.array(np.cumsum([0, *map(len, values)]), type=pa.int64()),
                    pa.array(np.concatenate(values).astype(np.float32, copy=False)),
                    type=_SCHEMA.field("logps").type,
                ),
                pa.array([_checksum(*row) for row in zip(keys, values, strict=True)], type=pa.uint32()),
            ],
            schema=_SCHEMA,
        )
        name = f"{_PART}{uuid.uuid4().hex}.arrow"
        try:
            self._write_durably(name, batch)
        except OSError as error:
            raise _write_error(self.directory, error) from error
        return name

    def check_place(self) -> None:
        """check_writable as far as it can be told without writing. Raises CheckpointError."""
        there = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        number = None
        if not there.is_dir():
            number = errno.ENOTDIR
        elif not os.access(there, os.W_OK | os.X_OK):
            number = errno.EACCES
        if number is not None:
            raise _write_error(self.directory, OSError(number, os.strerror(number)))

    def check_writable(self) -> None:
        """Writes and removes a file where the rows will go. Raises CheckpointError."""
        probe = self.directory / f"{_PARTIAL}probe-{uuid.uuid4().hex}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            raise _write_error(self.directory, error) from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _write_durably(self, name: str, batch: pa.RecordBatch) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"{_PARTIAL}{name}"
        try:
            with partial.open("wb") as file:
                with pa.ipc.new_file(file, batch.schema) as writer:
                    writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.directory / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def describe(self, about: Mapping[str, object]) -> None:
        """Writes what the reference is beside its rows, for people, and removes what dead writers left."""
        with contextlib.suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.directory / "about.json"
            if not file.is_file():
                file.write_text(json.dumps({**about, **self.facts}, indent=1), encoding="utf-8")
            for partial in self.directory.glob(f"{_PARTIAL}*"):
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    partial.unlink()

"""Rows where they lie: in lists, Arrow tables and files of JSON, each with its origin.

A record keeps where it came from (`file:line`) so that every later complaint can name it. A line that cannot
be read becomes a BadRow: whether that stops the run is decided where all bad rows are known.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from ds_align.data.text_file import TextFile

MAX_LINE_BYTES = 32 * 2**20
# Offset, size in bytes and line number of each row of a text file.
Places = tuple[array, array, array]


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read; `origin` says where (`file:line` or `name: record N`, counted from 1)."""

    origin: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and why; expected: what rows of its kind hold, where that is known.

    lines: of the file that went with it; a quote that is not closed takes all that follow along.
    """

    origin: str
    reason: str
    expected: str = ""
    lines: int = 1


class Rows(Protocol):
    """Rows that can be counted and read in file order, as often as wanted; a part of them can be pickled."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Record | BadRow]: ...
    def part(self, start: int, stop: int) -> Rows:
        """The rows from start to stop."""


class ListRows:
    """A list of dicts, or a datasets.Dataset, which reads the same way; `first`: number of the first row."""

    def __init__(
        self, rows: Sequence[Any], name: str, lines: Sequence[int] | None = None, first: int = 1
    ) -> None:
        self._rows = rows
        self._name = name
        self._lines = lines
        self._first = first

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record | BadRow]:
        for index in range(len(self._rows)):
            number = self._first + index
            where = f": record {number}" if self._lines is None else f":{self._lines[index]}"
            yield _as_row(f"{self._name}{where}", self._rows[index])

    def part(self, start: int, stop: int) -> ListRows:
        """The rows themselves: a slice of an Arrow table would be pickled with all of it."""
        lines = None if self._lines is None else self._lines[start:stop]
        rows = [self._rows[index] for index in range(start, stop)]
        return ListRows(rows, self._name, lines, self._first + start)


class JsonlRows:
    """JSON objects in a file, each parsed when it is read; places: None for one on each line.

    One pass, when it is first needed, finds the lines.
    """

    def __init__(self, file: TextFile, places: Places | None = None) -> None:
        self._file = file
        self._places = places

    def _find(self) -> Places:
        """The place of each line that is not blank."""
        if self._places is None:
            offsets, sizes, numbers = self._places = no_places()
            offset = 0
            with self._file.open() as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        offsets.append(offset)
                        sizes.append(len(line))
                        numbers.append(number)
                    offset += len(line)
        return self._places

    def __len__(self) -> int:
        return len(self._find()[0])

    def __iter__(self) -> Iterator[Record | BadRow]:
        with self._file.open() as file:
            for offset, size, number in zip(*self._find(), strict=True):
                yield self._read(file, offset, size, number)

    def part(self, start: int, stop: int) -> JsonlRows:
        """The places of the rows; who reads them opens the file."""
        offsets, sizes, numbers = self._find()
        return JsonlRows(self._file, (offsets[start:stop], sizes[start:stop], numbers[start:stop]))

    def _read(self, file: Any, offset: int, size: int, number: int) -> Record | BadRow:
        origin = f"{self._file}:{number}"
        if size > MAX_LINE_BYTES:
            return BadRow(
                origin, f"the line has {size} bytes, at most {MAX_LINE_BYTES} are read; shorten or remove it"
            )
        file.seek(offset)
        # An error at the end of the line must not be placed on the next one.
        raw = file.read(size).rstrip(b"\r\n")
        # The byte order mark belongs to the file, not to its first record.
        start = 3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
        try:
            return _as_row(origin, json.loads(raw[start:].decode("utf-8")))
        except UnicodeDecodeError as error:
            return BadRow(origin, utf8_reason(offset + start + error.start, raw[start + error.start]))
        except json.JSONDecodeError as error:
            remedy = "mend or remove it"
            if raw[start:].lstrip().startswith(b"[") and number == 1:
                remedy = "a file that is one JSON list is read under the ending .json"
            reason = f"malformed JSON ({error.msg}); expected one JSON object a line; {remedy}"
            return BadRow(f"{origin}:{error.colno}", reason)
        except (ValueError, RecursionError) as error:
            return BadRow(origin, f"JSON that cannot be read ({error}); mend or remove the line")


class JoinedRows:
    """The rows of several sources, one behind the other; each row keeps its own origin."""

    def __init__(self, members: Sequence[Rows]) -> None:
        self._members = members
        self._starts: list[int] | None = None

    def _find(self) -> list[int]:
        """Where each member starts, and where the last one ends."""
        if self._starts is None:
            self._starts = [0, *accumulate(map(len, self._members))]
        return self._starts

    def __len__(self) -> int:
        return self._find()[-1]

    def __iter__(self) -> Iterator[Record | BadRow]:
        for member in self._members:
            yield from member

    def part(self, start: int, stop: int) -> JoinedRows:
        """Parts of the members that hold these rows."""
        starts, found = self._find(), []
        for index in range(max(0, bisect_right(starts, start) - 1), len(self._members)):
            first, last = starts[index], starts[index + 1]
            if first >= stop:
                break
            if max(start, first) < min(stop, last):
                found.append(self._members[index].part(max(start, first) - first, min(stop, last) - first))
        return JoinedRows(found)


def no_places() -> Places:
    """Places of no row yet."""
    return array("q"), array("q"), array("q")


def utf8_reason(offset: int, byte: int) -> str:
    """Where a file stops being UTF-8, and the remedy."""
    if offset == 0 and byte in (0xFF, 0xFE):
        return (
            "the file begins with the byte order mark of UTF-16; save it as UTF-8, or convert it with iconv "
            "-f UTF-16 -t UTF-8"
        )
    return f"invalid UTF-8 at byte offset {offset} (0x{byte:02x}); convert the file to UTF-8, e.g. with iconv"


def _as_row(origin: str, value: Any) -> Record | BadRow:
    if isinstance(value, Mapping):
        return Record(origin, value)
    found = f"found {type(value).__name__}, expected an object with named columns"
    return BadRow(
        origin, f"{found}; a file that is one list ends in .json" if isinstance(value, list) else found
    )

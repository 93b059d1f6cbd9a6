"""The rows of a JSON file: one list, an object of lists (splits), or one object on each line.

The file is seen through a window that holds an item at a time. One byte is one character there (Latin-1), as
JSON's own marks are ASCII and no part of another character in UTF-8: a position is a byte offset.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

from ds_align.data.rows import MAX_LINE_BYTES, JsonlRows, Places, no_places, utf8_reason
from ds_align.data.text_file import TextFile
from ds_align.errors import DataError

# A JSON object with one of these keys is a record, not a table of splits.
RECORD_COLUMNS = (
    *("chosen", "rejected", "completion", "chosen_ids", "rejected_ids", "completion_ids"),
    *("label", "kto_tag", "scores", "ratings", "ranks", "completions", "prompt", "instruction"),
)
_BOM = b"\xef\xbb\xbf"
_WINDOW_BYTES = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class _MalformedError(Exception):
    """A message of the JSON parser, and the byte offset that it is about."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def json_tables(file: TextFile) -> dict[str, JsonlRows]:
    """The rows of each split; a list is all "train". Raises DataError for text that is not such JSON."""
    try:
        with file.open() as stream:
            splits = _find_splits(_Window(stream), file)
    except _MalformedError as error:
        line, column = _line_and_column(file, error.offset)
        raise DataError(
            f"{file}:{line}:{column}: malformed JSON ({error}); expected a list of objects, "
            "an object of splits, or one object on each line; mend the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: JSON that cannot be read ({error}); mend the file") from error
    # Many published .json files hold one object on each line.
    found = {"train": None} if splits is None else splits
    return {name: JsonlRows(file, places) for name, places in found.items()}


def _find_splits(window: _Window, file: TextFile) -> dict[str, Places] | None:
    """Places of the rows of each split; None where the first object is a record itself."""
    window.skip_space()
    mark = window.mark()
    if mark == "[":
        rows, _ = _read_list(window)
        window.skip_space()
        if window.mark():
            raise _MalformedError("Extra data", window.offset)
        return {"train": rows}
    if mark == "{":
        splits = _read_object(window)
        window.skip_space()
        return None if window.mark() else splits
    if not mark:
        raise DataError(
            f"{file}: the file is empty; expected one JSON object for each preference; check the path"
        )
    raise _MalformedError("Expecting a list or an object", window.offset)


def _read_list(window: _Window) -> tuple[Places, bool]:
    """Places of the items of the list that opens here, and whether all are objects."""
    places, all_objects = no_places(), True
    offsets, sizes, numbers = places
    window.step()
    window.skip_space()
    if window.mark() == "]":
        window.step()
        return places, True
    while True:
        offset, line = window.offset, window.line()
        all_objects &= isinstance(window.value(), dict)
        for column, value in zip(
            (offsets, sizes, numbers), (offset, window.offset - offset, line), strict=True
        ):
            column.append(value)
        if window.next_item("]"):
            return places, all_objects


def _read_object(window: _Window) -> dict[str, Places] | None:
    """Splits of the object that opens here; None where it holds no list of objects, or is a record."""
    splits: dict[str, Places] = {}
    is_record = False
    window.step()
    window.skip_space()
    closed = window.mark() == "}"
    if closed:
        window.step()
    while not closed:
        if window.mark() != '"':
            raise _MalformedError("Expecting property name enclosed in double quotes", window.offset)
        key = window.value().encode("latin-1", "surrogatepass").decode("utf-8", "surrogatepass")
        window.skip_space()
        if window.mark() != ":":
            raise _MalformedError("Expecting ':' delimiter", window.offset)
        window.step()
        window.skip_space()
        is_record |= key in RECORD_COLUMNS
        if window.mark() == "[":
            places, all_objects = _read_list(window)
            splits |= {key: places} if all_objects else {}
        else:
            window.value()
        closed = window.next_item("}")
    return None if is_record or not splits else splits


class _Window:
    """The text from `offset` on, as far as it is needed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        start = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        stream.seek(start)
        self._text, self._position, self._start, self._read = "", 0, start, start
        self._line, self._counted = 1, 0

    @property
    def offset(self) -> int:
        """The byte that is next."""
        return self._start + self._position

    def line(self) -> int:
        """The line of that byte, from 1."""
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def mark(self) -> str:
        """The next character; "" at the end."""
        if self._position == len(self._text):
            self._grow()
        return self._text[self._position : self._position + 1]

    def step(self) -> None:
        """Goes past one character."""
        self._position += 1

    def skip_space(self) -> None:
        """Goes on to what is no space."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._text) or not self._grow():
                return

    def next_item(self, closing: str) -> bool:
        """Goes past the comma, or the closing mark, and says whether it was that."""
        self.skip_space()
        mark = self.mark()
        if mark not in (closing, ",") or not mark:
            raise _MalformedError("Expecting ',' delimiter", self.offset)
        self.step()
        if mark == ",":
            self.skip_space()
        return mark == closing

    def value(self) -> Any:
        """Reads the value that starts here; its texts are not decoded."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                place = self._start + error.pos
                if len(self._text) - self._position > MAX_LINE_BYTES:
                    message = f"an item of more than {MAX_LINE_BYTES} bytes, or one without an end"
                    raise _MalformedError(message, self.offset) from error
                if not self._grow():
                    raise _MalformedError(error.msg, place) from error
                continue
            # A number goes on, perhaps, behind the window.
            if end < len(self._text) or not self._grow():
                self._position = end
                return value

    def _grow(self) -> bool:
        """Reads on, and lets go of what is behind; False at the end of the file."""
        waiting = len(self._utf8.getstate()[0])
        block = self._stream.read(max(_WINDOW_BYTES, len(self._text) - self._position))
        try:
            self._utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = self._read - waiting + error.start
            raise ValueError(utf8_reason(offset, error.object[error.start])) from error
        if not block:
            return False
        self.line()
        self._read += len(block)
        self._text = self._text[self._position :] + block.decode("latin-1")
        self._start += self._position
        self._position = self._counted = 0
        return True


def _line_and_column(file: TextFile, offset: int) -> tuple[int, int]:
    """Where a byte stands, both from 1; the column in characters."""
    line, before = 1, b""
    with file.open() as stream:
        while block := stream.read(min(_WINDOW_BYTES, offset)):
            offset -= len(block)
            line += block.count(b"\n")
            _, newline, last = block.rpartition(b"\n")
            before = last if newline else before + block
    before = before.removeprefix(_BOM) if line == 1 else before
    return line, len(before.decode("utf-8", "replace")) + 1

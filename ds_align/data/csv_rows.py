"""Rows of CSV and TSV files (RFC 4180: a quoted cell may hold line ends; a quote in it is doubled).

A cell is text. Where a column of preferences holds more than text, it is JSON: messages, token ids, tools.
Spreadsheets write `;` where the comma parts decimals: the first row says what parts the cells.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from ds_align.data.contents import LABEL_TEXTS, MAX_WORDS_OF_A_NAME
from ds_align.data.ranked import OTHER_LISTS, OTHER_SCORES
from ds_align.data.rows import MAX_LINE_BYTES, BadRow, Places, Record, no_places, utf8_reason
from ds_align.data.text_file import TextFile
from ds_align.errors import DataError

if TYPE_CHECKING:
    from ds_align.data.schemas import Columns

DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Tried where the usual one of the ending is not in the first row.
_OTHER_DELIMITERS = b";\t|,"
# A spreadsheet's own first line, as in `sep=;`.
_SEPARATOR_LINE = re.compile(rb'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "kl_completion")
_LABEL_COLUMNS = ("label", "kto_tag")
_LIST_COLUMNS = ("completions", *OTHER_LISTS, "scores", *OTHER_SCORES, "ranks")
# Always JSON, and absent where the cell is empty.
_JSON_COLUMNS = frozenset(
    {
        *("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "kl_completion_ids"),
        *("conversations", "messages", "tools"),
    }
)
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_LIKE_MESSAGES = re.compile(r"\s*(\[\s*)?\{\s*['\"](role|content|from|value)['\"]\s*:")
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Cells:
    """Which columns may hold messages, which lists (of answers, scores or ranks), and which the label."""

    texts: frozenset[str]
    labels: frozenset[str]
    lists: frozenset[str]

    @classmethod
    def from_columns(cls, columns: Columns | None) -> Cells:
        """Takes the names from a column map; None: every column has its own name."""
        if columns is None:
            return cls(frozenset(_TEXT_COLUMNS), frozenset(_LABEL_COLUMNS), frozenset(_LIST_COLUMNS))
        names = (columns.prompt, columns.chosen, columns.rejected, columns.completion)
        lists = (columns.completions, columns.scores, columns.ranks)
        return cls(
            frozenset({*names, "kl_completion"}),
            frozenset(_LABEL_COLUMNS if columns.label == "label" else (columns.label,)),
            frozenset({*lists, *_LIST_COLUMNS}),
        )

    def read(self, name: str, text: str) -> Any:
        """The value of a cell, None where there is none. Raises ValueError with the reason."""
        if name in self.labels:
            return LABEL_TEXTS.get(text.strip().lower(), text) if text.strip() else None
        if name in _JSON_COLUMNS:
            return _parse(name, text) if text.strip() else None
        if name in self.lists and text.lstrip().startswith("["):
            return _list_or_text(text)
        if name in self.texts and text.lstrip()[:1] in ("[", "{"):
            return _messages_or_text(name, text)
        return None if name == "kl_completion" and not text else text


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"column {name!r} is not JSON ({error}); write the cell with json.dumps") from error


def _list_or_text(text: str) -> Any:
    """A list; text that only begins like one stays, and whoever needs the list says so."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _messages_or_text(name: str, text: str) -> Any:
    """Messages; any other text stays as it is, JSON or not, for an answer may be JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _LIKE_MESSAGES.match(text):
            raise ValueError(
                f"column {name!r} looks like messages and is not JSON ({error}); write the cell with "
                "json.dumps"
            ) from error
        return text
    items = value if isinstance(value, list) else [value]
    is_talk = bool(items) and all(
        isinstance(item, dict) and any(keys <= item.keys() for keys in _MESSAGE_KEYS) for item in items
    )
    return value if is_talk else text


class CsvRows:
    """A CSV file whose first row names the columns: one pass finds the rows, each is parsed when read."""

    def __init__(
        self,
        file: TextFile,
        cells: Cells,
        delimiter: str,
        names: tuple[str, ...] | None = None,
        places: Places | None = None,
    ) -> None:
        self._file = file
        self._cells = cells
        self._delimiter = delimiter
        self._names = names
        self._places = places

    @property
    def names(self) -> tuple[str, ...]:
        """The columns. Raises DataError for a first row that does not name them."""
        self._find()
        return self._names

    def _find(self) -> Places:
        """The places of the rows, behind that of the names; blank lines are not rows."""
        if self._places is None:
            with self._file.open() as stream:
                lines = _Lines(stream)
                self._delimiter = _delimiter_of(stream, lines, self._delimiter, self._file)
                places = _find_places(lines, self._delimiter, self._file)
                self._names = ()
                if places[0]:
                    self._names = self._read_names(stream, *(column.pop(0) for column in places))
            self._places = places
        return self._places

    def _read_names(self, stream: BinaryIO, offset: int, size: int, number: int) -> tuple[str, ...]:
        cells = self._split(stream, offset, size)
        if isinstance(cells, str):
            raise DataError(f"{self._file}:{number}: {cells}; mend the first row, which names the columns")
        names = tuple(name.strip() for name in cells)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{self._file}:{number}: two columns have the name {twice!r}; rename one")
        return names

    def __len__(self) -> int:
        return len(self._find()[0])

    def __iter__(self) -> Iterator[Record | BadRow]:
        places = self._find()
        _allow_long_cells()
        with self._file.open() as stream:
            for offset, size, number in zip(*places, strict=True):
                yield self._read(stream, offset, size, f"{self._file}:{number}")

    def part(self, start: int, stop: int) -> CsvRows:
        """The places of the rows; who reads them opens the file."""
        offsets, sizes, numbers = (column[start:stop] for column in self._find())
        return CsvRows(self._file, self._cells, self._delimiter, self._names, (offsets, sizes, numbers))

    def _read(self, stream: BinaryIO, offset: int, size: int, origin: str) -> Record | BadRow:
        cells = self._split(stream, offset, size)
        if isinstance(cells, str):
            return _bad_row(stream, offset, size, origin, f"{cells}; mend or remove the row")
        if len(cells) != len(self._names):
            remedy = f"quote cells that hold {self._delimiter!r} or line ends"
            if any(len(name.split()) > MAX_WORDS_OF_A_NAME for name in self._names):
                remedy = "does the first row of the file name the columns?"
            found = f"the row has {len(cells)} cells, the first row names {len(self._names)} columns"
            return _bad_row(stream, offset, size, origin, f"{found}; {remedy}")
        try:
            values = {
                name: self._cells.read(name, cell) for name, cell in zip(self._names, cells, strict=True)
            }
        except ValueError as error:
            return BadRow(origin, str(error))
        return Record(origin, {name: value for name, value in values.items() if value is not None})

    def _split(self, stream: BinaryIO, offset: int, size: int) -> list[str] | str:
        """The cells of a row, or why it has none."""
        if size > MAX_LINE_BYTES:
            return f"the row has {size} bytes, at most {MAX_LINE_BYTES} are read; is a quote not closed?"
        stream.seek(offset)
        raw = stream.read(size)
        start = len(_BOM) if offset == 0 and raw.startswith(_BOM) else 0
        try:
            text = raw[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            return utf8_reason(offset + start + error.start, raw[start + error.start])
        try:
            return next(csv.reader([text], delimiter=self._delimiter, strict=True), [])
        except csv.Error as error:
            return f"malformed CSV ({error})"


def _bad_row(stream: BinaryIO, offset: int, size: int, origin: str, reason: str) -> BadRow:
    """A row that cannot be used, with the lines that it goes over: a lost quote may have glued rows to it."""
    stream.seek(offset)
    lines, left = 0, size
    while left > 0 and (block := stream.read(min(left, 2**20))):
        lines += block.count(b"\n")
        left -= len(block)
    lines = max(1, lines)
    if lines > 1:
        reason = f"{reason}; it goes over {lines} lines, which count as as many rows: is a quote not closed?"
    return BadRow(origin, reason, lines=lines)


class _Lines:
    """Lines of a file as text of one character a byte, and where the next one starts."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0
        self.number = 1

    def skip(self, size: int) -> None:
        """Notes that the first line, of so many bytes, was read."""
        self.offset += size
        self.number += 1

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.offset += len(line)
            self.number += 1
            # A byte order mark before a quote would make it an ordinary character.
            yield line.removeprefix(_BOM if self.offset == len(line) else b"").decode("latin-1")


def _delimiter_of(stream: BinaryIO, lines: _Lines, usual: str, file: TextFile) -> str:
    """What parts the cells: what a `sep=` line says, which is stepped over, else what the first row has."""
    first = stream.readline(MAX_LINE_BYTES)
    if first[:2] in _UTF16_BOMS:
        raise DataError(f"{file}: {utf8_reason(0, first[0])}")
    said = _SEPARATOR_LINE.fullmatch(first.removeprefix(_BOM))
    if said is not None:
        lines.skip(len(first))
        return said[1].decode("latin-1")
    stream.seek(0)
    found = [byte for byte in _OTHER_DELIMITERS if byte in first]
    return usual if usual.encode() in first or not found else chr(found[0])


def _find_places(lines: _Lines, delimiter: str, file: TextFile) -> Places:
    offsets, sizes, numbers = places = no_places()
    _allow_long_cells()
    reader = csv.reader(iter(lines), delimiter=delimiter)
    offset, number = lines.offset, lines.number
    try:
        for cells in reader:
            # Spreadsheets write lines of delimiters alone behind the last row.
            if any(cell.strip() for cell in cells):
                offsets.append(offset)
                sizes.append(lines.offset - offset)
                numbers.append(number)
            offset, number = lines.offset, lines.number
    except csv.Error as error:
        remedy = "close or double the quotes of this row"
        if "new-line character" in str(error):
            remedy = "end the lines with a line feed: a carriage return alone ends none"
        raise DataError(f"{file}:{number}: malformed CSV ({error}); {remedy}") from error
    return places


def _allow_long_cells() -> None:
    """Python's own limit of 131072 characters is for the whole process; it is only ever raised."""
    if csv.field_size_limit() < MAX_LINE_BYTES:
        csv.field_size_limit(MAX_LINE_BYTES)

"""Sources to records: JSONL, JSON, `datasets` directories and objects, lists of dicts, and their splits."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_align.data.rows import BadRow, JsonlRows, ListRows, Record, Rows, utf8_reason
from ds_align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    Source = str | Path | Sequence[Mapping[str, Any]] | Dataset | DatasetDict

# Rows that are read and tokenized together.
CHUNK_ROWS = 1024
JSONL_ENDINGS = (".jsonl", ".ndjson")
SUPPORTED = ".jsonl, .ndjson, .json, or a directory written by datasets' save_to_disk"
# A JSON object with one of these keys is a record, not a table of splits.
RECORD_COLUMNS = ("chosen", "rejected", "completion", "chosen_ids", "rejected_ids", "completion_ids")
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_SPLIT = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class RecordSet:
    """The rows of one split of one source; `part(start, stop)` are some of them, for any process to read."""

    name: str
    num_rows: int
    part: Callable[[int, int], Rows]

    def rows(self) -> Iterator[Record | BadRow]:
        """A fresh pass over all rows."""
        for start in range(0, self.num_rows, CHUNK_ROWS):
            yield from self.part(start, start + CHUNK_ROWS)


def open_records(source: Source, split: str | None = None) -> RecordSet:
    """Open `source` and select `split` ("train", "validation", "train[:90%]", "train[10:20]").

    Without a split the train split is taken, or the only split there is. Percentages round to the nearest
    row, so that "train[:90%]" and "train[90%:]" part the rows. Raises DataError for a source or a split that
    does not exist, holds nothing, or has a form that is not read.
    """
    name = _source_name(source)
    tables = _tables(source, name)
    wanted = _SPLIT.fullmatch(split or _default_split(tables, name))
    if wanted is None:
        raise DataError(
            f"split={split!r} of {name} cannot be read; expected a name with an optional slice, "
            "such as train, validation, train[:90%] or train[100:200]"
        )
    table = tables.get(wanted["name"])
    if table is None:
        hint = _nearest(wanted["name"], list(tables))
        raise DataError(
            f"{name}: there is no split {wanted['name']!r}; found {', '.join(tables)}{hint}; name one of them"
        )
    start, stop = (_bound(wanted[key], len(table), key) for key in ("start", "stop"))
    if stop <= start:
        found = "is empty" if len(table) == 0 else f"has {len(table)} rows, split={split!r} selects none"
        raise DataError(f"{name}: {found}; expected at least one preference; give a data set with rows")
    return RecordSet(
        name=display_name(source, split),
        num_rows=stop - start,
        part=lambda first, last: table.part(start + first, min(start + last, stop)),
    )


def display_name(source: Source, split: str | None) -> str:
    """What messages call a split of a source."""
    name = _source_name(source)
    return name if split is None else f"{name} ({split})"


def origin_prefix(source: Source) -> str:
    """What the origins of a source's rows begin with: the path, or "" for a source in memory."""
    if not isinstance(source, str | Path):
        return ""
    return str(source) if Path(source).is_dir() else str(Path(source))


def available_splits(source: Source) -> list[str]:
    """Names of the splits of `source`, in file order; a JSONL file and a list have "train" alone.

    Raises DataError like `open_records`.
    """
    return list(_tables(source, _source_name(source)))


def _source_name(source: Source) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return "records" if isinstance(source, list | tuple) else "dataset"


def _default_split(tables: Mapping[str, Rows], name: str) -> str:
    if "train" in tables:
        return "train"
    if len(tables) == 1:
        return next(iter(tables))
    if not tables:
        raise DataError(f"{name}: holds no split; expected at least one with preferences in it")
    raise DataError(
        f"{name}: has the splits {', '.join(tables)} and no train; name one, as in split={next(iter(tables))}"
    )


def _bound(text: str | None, num_rows: int, side: str) -> int:
    if text is None:
        return 0 if side == "start" else num_rows
    row = (int(text[:-1]) * num_rows + 50) // 100 if text.endswith("%") else int(text)
    return min(max(row + num_rows if text.startswith("-") else row, 0), num_rows)


def _nearest(name: str, names: Sequence[str]) -> str:
    match = get_close_matches(name, names, n=1)
    return f", the nearest is {match[0]!r}" if match else ""


def _tables(source: Source, name: str) -> dict[str, Rows]:
    if isinstance(source, list | tuple):
        return {"train": ListRows(source, name)}
    if not isinstance(source, str | Path):
        return _dataset_tables(source, name)
    path = check_path(source)
    if path.is_dir():
        return _directory_tables(path, name)
    return {"train": JsonlRows(path)} if path.suffix.lower() in JSONL_ENDINGS else _json_tables(path)


def check_path(source: str | Path) -> Path:
    """The path of a file or directory that may hold preferences. Raises DataError; reads nothing."""
    name, path = str(source), Path(source)
    if not path.exists():
        raise DataError(f"{name}: no such file or directory; expected {SUPPORTED}; check the path")
    if path.is_dir():
        return path
    ending = path.suffix.lower()
    if ending not in (*JSONL_ENDINGS, ".json"):
        raise DataError(
            f"{name}: the ending {ending!r} is not read; expected {SUPPORTED}; convert the file to JSONL"
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"{name}: the file is empty; expected one JSON object for each preference; check the path"
        )
    return path


def _directory_tables(path: Path, name: str) -> dict[str, Rows]:
    if not any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{name}: this directory was not written by datasets' save_to_disk (no dataset_dict.json, no "
            f"state.json); expected {SUPPORTED}; name the file inside it"
        )
    from datasets import load_from_disk

    return _dataset_tables(load_from_disk(str(path)), name)


def _dataset_tables(source: Any, name: str) -> dict[str, Rows]:
    from datasets import Dataset, DatasetDict

    if isinstance(source, DatasetDict):
        return {split: ListRows(rows, f"{name} ({split})") for split, rows in source.items()}
    if isinstance(source, Dataset):
        return {"train": ListRows(source, name)}
    raise DataError(
        f"a data set of type {type(source).__name__} is not read; expected a path, a list of dicts, "
        "a datasets.Dataset or a datasets.DatasetDict"
    )


def _json_tables(path: Path) -> dict[str, Rows]:
    raw = path.read_bytes()
    start = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = raw[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {utf8_reason(start + error.start, raw[start + error.start])}") from error
    del raw
    try:
        tables = _parse_json(text, path)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: malformed JSON ({error.msg}); expected a list of objects, "
            "an object of splits, or one object on each line; mend the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read ({error}); mend the file") from error
    return tables


def _parse_json(text: str, path: Path) -> dict[str, Rows]:
    position = _skip_space(text, 0)
    if text[position : position + 1] == "[":
        items, end = _list_items(text, position)
        _expect_end(text, end)
        return {"train": _located(items, text, path)}
    if text[position : position + 1] != "{":
        if position == len(text):
            raise DataError(
                f"{path}: the file is empty; expected one JSON object for each preference; check the path"
            )
        raise json.JSONDecodeError("Expecting a list or an object", text, position)
    splits, end = _object_lists(text, position)
    # Many published .json files hold one object on each line.
    if splits is None or _skip_space(text, end) != len(text):
        return {"train": JsonlRows(path)}
    return {name: _located(items, text, path) for name, items in splits.items()}


def _located(items: list[tuple[int, Any]], text: str, path: Path) -> ListRows:
    """Rows with the line that each object starts on: newlines counted once from object to object."""
    lines, line, seen = array("q"), 1, 0
    for position, _ in items:
        line += text.count("\n", seen, position)
        seen = position
        lines.append(line)
    return ListRows([value for _, value in items], str(path), lines)


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _expect_end(text: str, position: int) -> None:
    end = _skip_space(text, position)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _list_items(text: str, position: int) -> tuple[list[tuple[int, Any]], int]:
    """Items of the list that opens at `position`, each with its own position; and where the list ends."""
    items: list[tuple[int, Any]] = []
    position = _skip_space(text, position + 1)
    if text[position : position + 1] == "]":
        return items, position + 1
    while True:
        value, end = _DECODER.raw_decode(text, position)
        items.append((position, value))
        position, closed = _next_item(text, end, "]")
        if closed:
            return items, position


def _next_item(text: str, position: int, closing: str) -> tuple[int, bool]:
    position = _skip_space(text, position)
    mark = text[position : position + 1]
    if mark == closing:
        return position + 1, True
    if mark != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return _skip_space(text, position + 1), False


def _object_lists(text: str, position: int) -> tuple[dict[str, list[tuple[int, Any]]] | None, int]:
    """Splits of the object that opens at `position` (None: it is a record itself); and where it ends."""
    whole, end = _DECODER.raw_decode(text, position)
    lists = [
        key
        for key, value in whole.items()
        if isinstance(value, list) and all(isinstance(row, dict) for row in value)
    ]
    if not lists or any(column in whole for column in RECORD_COLUMNS):
        return None, end
    splits: dict[str, list[tuple[int, Any]]] = {}
    position, closed = _skip_space(text, position + 1), False
    while not closed:
        key, position = _DECODER.raw_decode(text, position)
        position = _skip_space(text, _skip_space(text, position) + 1)
        if key in lists:
            splits[key], position = _list_items(text, position)
        else:
            _, position = _DECODER.raw_decode(text, position)
        position, closed = _next_item(text, position, "}")
    return splits, end

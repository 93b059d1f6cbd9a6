"""Sources to records: files, directories, the Hub, `datasets` objects and lists; and their splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_align.data.csv_rows import DELIMITERS, Cells, CsvRows
from ds_align.data.directory import check_same_columns, file_format, split_files
from ds_align.data.hub import FORMATS, Place, load_with_datasets, locate
from ds_align.data.json_lists import json_tables
from ds_align.data.parquet_rows import ParquetRows
from ds_align.data.rows import BadRow, JoinedRows, JsonlRows, ListRows, Record, Rows
from ds_align.data.text_file import TextFile
from ds_align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ds_align.data.schemas import Columns

    Source = str | Path | Sequence[Mapping[str, Any]] | Dataset | DatasetDict

# Rows that are read and tokenized together.
CHUNK_ROWS = 1024
SUPPORTED = (
    ".jsonl, .ndjson, .json, .csv, .tsv (these also with .gz or .zst), .parquet, a directory of such files "
    "or one written by datasets' save_to_disk, or org/name on the Hub"
)
_SPLIT = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


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


def open_records(source: Source, split: str | None = None, *, columns: Columns | None = None) -> RecordSet:
    """Open `source` and select `split` ("train", "validation", "train[:90%]", "train[10:20]").

    columns: which cells of a CSV file may hold messages or labels; None: those with the usual names. Without
    a split the train split is taken, or the only split there is. Percentages round to the nearest
    row, so that "train[:90%]" and "train[90%:]" part the rows. Raises DataError for a source or a split that
    does not exist, holds nothing, or has a form that is not read.
    """
    name = _source_name(source)
    tables = _tables(source, name, Cells.from_columns(columns))
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
    place = locate(source)
    return str(source) if place.read_by_datasets or place.path.is_dir() else str(place.path)


def available_splits(source: Source) -> list[str]:
    """Names of the splits of `source`, in file order; a file of rows and a list have "train" alone.

    Raises DataError like `open_records`.
    """
    if isinstance(source, str | Path):
        place = check_place(source)
        if not place.read_by_datasets and place.path.is_dir() and not _was_saved(place.path):
            return list(_split_files(place.path, str(source)))
    return list(_tables(source, _source_name(source), Cells.from_columns(None)))


def must_be_read_for_splits(source: Source) -> bool:
    """Whether only all of a file says which splits it has: a JSON file may hold one list or several."""
    return isinstance(source, str | Path) and file_format(Path(source))[0] == ".json"


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
        f"{name}: has the splits {', '.join(tables)} and no train; name the one that trains, as in "
        f"--dataset_split {_likely_train(tables)}"
    )


def _likely_train(tables: Mapping[str, Rows]) -> str:
    return next((name for name in tables if "train" in name), next(iter(tables)))


def _bound(text: str | None, num_rows: int, side: str) -> int:
    if text is None:
        return 0 if side == "start" else num_rows
    row = (int(text[:-1]) * num_rows + 50) // 100 if text.endswith("%") else int(text)
    return min(max(row + num_rows if text.startswith("-") else row, 0), num_rows)


def _nearest(name: str, names: Sequence[str]) -> str:
    match = get_close_matches(name, names, n=1)
    return f", the nearest is {match[0]!r}" if match else ""


def _tables(source: Source, name: str, cells: Cells) -> dict[str, Rows]:
    if isinstance(source, list | tuple):
        return {"train": ListRows(source, name)}
    if not isinstance(source, str | Path):
        return _dataset_tables(source, name)
    place = check_place(source)
    if place.read_by_datasets:
        return _dataset_tables(load_with_datasets(place), name)
    if place.path.is_dir():
        return _directory_tables(place, name, cells)
    return _file_tables(place.path, cells)


def check_place(source: str | Path) -> Place:
    """Where preferences lie that a setting names. Raises DataError where none can be; reads nothing."""
    name, place = str(source), locate(source)
    if place.path is None or place.read_by_datasets:
        return place
    if not place.path.exists():
        raise DataError(f"{name}: no such file or directory; expected {SUPPORTED}; check the path")
    if place.config is not None:
        raise DataError(f"{name}: this directory has no configs in a README.md; leave out {place.config!r}")
    if place.path.is_dir():
        return place
    _check_file(place.path)
    return place


def _check_file(path: Path) -> None:
    ending, compression = file_format(path)
    if ending not in FORMATS or (compression and ending == ".parquet"):
        raise DataError(
            f"{path}: the ending {ending + compression!r} is not read; expected {SUPPORTED}; rename "
            "or convert the file"
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"{path}: the file is empty; expected one JSON object for each preference; check the path"
        )


def _file_tables(path: Path, cells: Cells) -> dict[str, Rows]:
    ending, _ = file_format(path)
    if ending == ".json":
        return dict(json_tables(TextFile(path)))
    if ending == ".parquet":
        return {"train": ParquetRows(path)}
    if ending in DELIMITERS:
        return {"train": CsvRows(TextFile(path), cells, DELIMITERS[ending])}
    return {"train": JsonlRows(TextFile(path))}


def _directory_tables(place: Place, name: str, cells: Cells) -> dict[str, Rows]:
    path = place.path
    if _was_saved(path):
        from datasets import load_from_disk

        return _dataset_tables(load_from_disk(str(path)), name)
    tables: dict[str, Rows] = {}
    for split, files in _split_files(path, name).items():
        members = {}
        for file in files:
            _check_file(file)
            members[file] = _only_table(_file_tables(file, cells), file)
        columns = {file: rows.names for file, rows in members.items() if hasattr(rows, "names")}
        check_same_columns(columns, name)
        tables[split] = JoinedRows(list(members.values()))
    return tables


def _was_saved(path: Path) -> bool:
    return any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def _split_files(path: Path, name: str) -> dict[str, list[Path]]:
    splits = split_files(path, name)
    if not splits:
        raise DataError(
            f"{name}: this directory holds no data file, and was not written by datasets' save_to_disk (no "
            f"dataset_dict.json, no state.json); expected {SUPPORTED}; name the file inside it"
        )
    return splits


def _only_table(tables: dict[str, Rows], file: Path) -> Rows:
    if list(tables) != ["train"]:
        raise DataError(
            f"{file}: holds the splits {', '.join(tables)}; expected one list of rows in a file of a "
            "directory; name the file itself"
        )
    return tables["train"]


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

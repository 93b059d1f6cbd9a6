"""The same rows in every form of file that is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Row = dict
JSON_CELLS = (list, dict)


def as_jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_json(rows: list[Row]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_splits(rows: list[Row]) -> bytes:
    return json.dumps({"about": [1, {"a": "]"}], "test": rows[:1], "train": rows}).encode()


def as_csv(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        cells = {
            name: json.dumps(value, ensure_ascii=False) if isinstance(value, JSON_CELLS) else value
            for name, value in row.items()
        }
        writer.writerow(cells)
    return text.getvalue().encode()


def as_tsv(rows: list[Row]) -> bytes:
    return as_csv(rows, "\t")


def as_parquet(rows: list[Row], rows_each: int = 7) -> bytes:
    """Row groups of rows_each, so that no part of a test ends where a group does."""
    sink = io.BytesIO()
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    pq.write_table(pa.table(columns), sink, row_group_size=rows_each)
    return sink.getvalue()


PLAIN: dict[str, Callable[[list[Row]], bytes]] = {
    "a.jsonl": as_jsonl,
    "a.ndjson": as_jsonl,
    "a.json": as_json,
    "splits.json": as_splits,
    "lines.json": as_jsonl,
    "a.csv": as_csv,
    "a.TSV": as_tsv,
    "a.parquet": as_parquet,
}
COMPRESSED = {
    f"{name}{ending}": (lambda rows, write=write, pack=pack: pack(write(rows)))
    for name, write in PLAIN.items()
    if name != "a.parquet"
    for ending, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress))
}
FORMATS = PLAIN | COMPRESSED


def write(directory: Path, name: str, rows: list[Row]) -> Path:
    """Writes the rows in the form that the name asks for."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_bytes(FORMATS[name](rows))
    return path

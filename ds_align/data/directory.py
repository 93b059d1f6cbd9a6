"""A directory of data files as splits: files whose names say train, validation or test, and shards.

`train.jsonl`, `train-00000-of-00002.parquet`, `validation_1.csv.gz`; files that name no split are, all
together and in the order of their names, "train".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_align.data.hub import FORMATS
from ds_align.data.text_file import COMPRESSIONS
from ds_align.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?")
_NUMBERED = re.compile(r"(?P<split>[A-Za-z]+)([._\-]?\d+)?")
# What accompanies data files and is none.
_BESIDE = re.compile(
    r"[._].*|README.*|LICEN[CS]E.*|.*\.(md|txt|py|yaml|yml)|dataset_infos?\.json", re.IGNORECASE
)


def file_format(path: Path) -> tuple[str, str]:
    """The ending that says how a file is read, and that of its compression: (".csv", ".gz")."""
    ending = path.suffix.lower()
    if ending in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), ending
    return ending, ""


def split_files(directory: Path, name: str) -> dict[str, list[Path]]:
    """The files of each split, those of train first, in the order of their names; {} where there is none.

    Raises DataError for files of several formats, files that are not data, and shards that are missing.
    """
    files = _data_files(directory, name) or _data_files(directory / "data", name)
    formats = sorted({file_format(file)[0] for file in files})
    if len(formats) > 1:
        raise DataError(
            f"{name}: holds files of several formats ({', '.join(formats)}), which may hold the same rows; "
            "leave one, or name a file"
        )
    stems = {file: _stem(file) for file in files}
    named = {file: _split_of(stem) for file, stem in stems.items()}
    found: dict[str, list[Path]] = {}
    for file, split in named.items():
        found.setdefault(split or "train", []).append(file)
    without = next((file for file, split in named.items() if split is None), None)
    if without is not None and len(set(named.values())) > 1:
        known = next(split for split in named.values() if split is not None)
        raise DataError(
            f"{name}: {without.name} names no split and other files do ({known}); rename it or move it away"
        )
    _check_shards(stems.values(), name)
    order = [split for split in dict.fromkeys(SPLITS.values()) if split in found]
    return {split: found[split] for split in [*order, *sorted(found.keys() - set(order))]}


def check_same_columns(columns: Mapping[Path, Sequence[str]], name: str) -> None:
    """Raises DataError where files that are one table differ in their columns."""
    first, expected = next(iter(columns.items()), (None, ()))
    for path, found in columns.items():
        if set(found) != set(expected):
            differing = ", ".join(sorted(set(found) ^ set(expected)))
            raise DataError(
                f"{name}: {path.name} has other columns than {first.name} ({differing}); expected files of "
                "one form; rename or remove columns, or move files away"
            )


def _data_files(directory: Path, name: str) -> list[Path]:
    if not directory.is_dir():
        return []
    files = sorted(path for path in directory.iterdir() if path.is_file())
    found = [path for path in files if file_format(path)[0] in FORMATS and not _BESIDE.fullmatch(path.name)]
    other = next((path for path in files if path not in found and not _BESIDE.fullmatch(path.name)), None)
    if found and other is not None:
        raise DataError(
            f"{name}: {other.name} is no data file (expected {', '.join(FORMATS)}, also with "
            f"{' or '.join(COMPRESSIONS)}); move it away, or name a file"
        )
    return found


def _stem(file: Path) -> str:
    ending, compression = file_format(file)
    return file.name[: len(file.name) - len(ending) - len(compression)]


def _split_of(stem: str) -> str | None:
    shard = _SHARD.fullmatch(stem)
    if shard is not None:
        return SPLITS.get(shard["split"].lower(), shard["split"])
    numbered = _NUMBERED.fullmatch(stem)
    return SPLITS.get(numbered["split"].lower()) if numbered is not None else None


def _check_shards(stems: Sequence[str], name: str) -> None:
    numbers: dict[tuple[str, int], set[int]] = {}
    for stem in stems:
        shard = _SHARD.fullmatch(stem)
        if shard is not None:
            numbers.setdefault((shard["split"], int(shard["total"])), set()).add(int(shard["number"]))
    for (split, total), found in numbers.items():
        missing = sorted(set(range(total)) - found)
        if missing:
            raise DataError(
                f"{name}: {split}-{missing[0]:05d}-of-{total:05d} is missing ({len(found)} of {total} files "
                "are there); get the others"
            )

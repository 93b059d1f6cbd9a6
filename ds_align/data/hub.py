"""Where a source lies: a local path, or a data set of the Hugging Face Hub by its id.

An id is `org/name`, with `:config` and `@revision` where they are wanted; `hf://datasets/org/name` is one for
certain. A name that could be a misspelt path is never taken for an id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ds_align.data.text_file import COMPRESSIONS
from ds_align.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PREFIX = "hf://datasets/"
_ID = re.compile(
    r"(?P<repo>\w[\w.\-]*/\w[\w.\-]*)(?::(?P<config>[\w.\-]+))?(?:@(?P<revision>[\w.\-/]+))?", re.ASCII
)
_MOST_REASON = 300


@dataclass(frozen=True, slots=True)
class Place:
    """Where a source lies. path: None for the Hub; config: the part of it that is wanted, None for all."""

    path: Path | None
    repo: str | None = None
    config: str | None = None
    revision: str | None = None

    @property
    def read_by_datasets(self) -> bool:
        """Whether the `datasets` library finds its files: on the Hub, and where README.md lists configs."""
        return self.path is None or (self.path.is_dir() and _lists_configs(self.path / "README.md"))


def locate(source: str | Path) -> Place:
    """Where a source lies, whether or not it exists. Raises DataError for an hf:// address without id."""
    text = str(source)
    if text.startswith(_PREFIX):
        match = _ID.fullmatch(text.removeprefix(_PREFIX))
        if match is None:
            raise DataError(f"{text}: not the address of a data set; expected {_PREFIX}org/name[:config]")
        return Place(None, **match.groupdict())
    path = Path(source)
    if path.exists() or isinstance(source, Path):
        return Place(path)
    directory, _, config = text.rpartition(":")
    if directory and Path(directory).is_dir():
        return Place(Path(directory), config=config)
    match = _ID.fullmatch(text)
    if match is None or _could_be_path(match["repo"]):
        return Place(path)
    return Place(None, **match.groupdict())


def with_choice(source: str | Path, config: str | None, revision: str | None) -> str | Path:
    """The source with the config and the revision of the settings. Raises DataError where it has others."""
    if config is None and revision is None:
        return source
    place = locate(source)
    if revision is not None and place.path is not None:
        raise DataError(
            f"dataset_revision={revision!r} without effect: {source} is no data set of the Hub; leave it out"
        )
    for name, wanted, found in (
        ("config_name", config, place.config),
        ("revision", revision, place.revision),
    ):
        if wanted is not None and found not in (None, wanted):
            raise DataError(f"{source} and dataset_{name}={wanted!r} disagree; give one of the two")
    base = str(place.path) if place.path is not None else f"{_PREFIX}{place.repo}"
    config, revision = config or place.config, revision or place.revision
    return base + (f":{config}" if config else "") + (f"@{revision}" if revision else "")


def load_with_datasets(place: Place) -> DatasetDict:
    """All splits of a place that `datasets` reads, as maps of files on disk. Raises DataError."""
    return _load_from_hub(place) if place.path is None else _load(place)


# The hash of the files and their rows are asked for one after the other.
@lru_cache(maxsize=4)
def _load_from_hub(place: Place) -> DatasetDict:
    return _load(place)


def _load(place: Place) -> DatasetDict:
    from datasets import load_dataset

    name = place.repo or str(place.path)
    try:
        return load_dataset(name, place.config, revision=place.revision)
    except Exception as error:  # the library, its servers and its files fail in too many ways to list
        reason = " ".join(str(error).split())[:_MOST_REASON] or type(error).__name__
        raise DataError(f"{name}: {_what_failed(place)} ({reason})") from error


def _what_failed(place: Place) -> str:
    if place.path is not None:
        return "cannot be read as its README.md says; mend its configs, or name one as DIRECTORY:config"
    wanted = "".join(
        f", {name} {value}"
        for name, value in (("config", place.config), ("revision", place.revision))
        if value is not None
    )
    copy = f"`hf download --repo-type dataset {place.repo} --local-dir DIR` and give that directory"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return (
            f"this data set of the Hub{wanted} is not on this machine and HF_HUB_OFFLINE is set; unset "
            f"it, or {copy}"
        )
    return (
        f"no such file or directory, and the Hub did not give this data set{wanted}; check the name and the "
        f"network, `hf auth login` where it is private, or {copy}"
    )


def _could_be_path(text: str) -> bool:
    """Whether a name with one slash looks like a path: its folder is here, or it ends like a data file."""
    folder, _, name = text.partition("/")
    endings = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    known = (*FORMATS, *COMPRESSIONS)
    return Path(folder).is_dir() or any(get_close_matches(ending, known, n=1) for ending in endings)


def _lists_configs(readme: Path) -> bool:
    """Whether the YAML at the top of a data set's README.md says which files are which split."""
    try:
        with readme.open(encoding="utf-8") as file:
            if file.readline().strip() != "---":
                return False
            for line in file:
                if line.strip() == "---":
                    return False
                if line.startswith("configs:"):
                    return True
    except (OSError, UnicodeDecodeError):
        return False
    return False

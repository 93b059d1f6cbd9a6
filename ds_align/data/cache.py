"""Tokens by content on disk: made by one process of a node, mapped by all.

A source in memory has no content hash that is cheaper than its tokens, so it is not kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ds_align import distributed, errors
from ds_align.config.places import cache_root
from ds_align.data import readers
from ds_align.data.build import DataFields, Job, Tokenized, tokenize_source
from ds_align.data.key import code_digest, entry_key, source_digest
from ds_align.data.store import DamagedEntryError, new_entry, publish_entry, read_entry, remove_entry
from ds_align.errors import DataError, DsAlignError
from ds_align.file_digests import FileDigests

if TYPE_CHECKING:
    from ds_align.data.readers import Source

_POLL_SECONDS = 0.05
# The ranks of a node come here together; the first of them, which shows the progress, is let through.
_HEAD_START_SECONDS = 0.2


def obtain(job: Job) -> Tokenized:
    """The tokens of a job: from the cache, or made and kept there, or made where there is no cache.

    Raises DataError and ConfigError as load_preferences does; the process that waited for one that failed
    raises the same error.
    """
    local_ranks = _ranks_of_node()
    setting = job.config.dataset_cache_dir
    if setting in (None, "none") or not isinstance(job.source, str | Path):
        return tokenize_source(job, sharing_ranks=local_ranks)
    readers.check_place(job.source)
    try:
        return TokenCache(cache_directory(setting)).obtain(job)
    except OSError as error:
        # Whatever the cache's disk refuses, the data can be had without it.
        found = tokenize_source(job, sharing_ranks=local_ranks)
        remark = (
            f"dataset_cache_dir={setting}: cannot be used ({error.strerror or error}: {error.filename}); "
            "every process tokenizes for itself; give another directory, or none"
        )
        return _with_remarks(found, (remark,))


def available_splits(source: Source, config: DataFields | None = None) -> list[str]:
    """Names of the splits of `source`, in file order; a file of rows and a list have "train" alone.

    config: where the names that a JSON file holds are remembered. Raises DataError like `open_records`.
    """
    if config is None or config.dataset_cache_dir in (None, "none"):
        return readers.available_splits(source)
    if not readers.must_be_read_for_splits(source) or Path(source).is_dir():
        return readers.available_splits(source)
    readers.check_place(source)
    with contextlib.suppress(OSError):
        return TokenCache(cache_directory(config.dataset_cache_dir)).split_names(source)
    return readers.available_splits(source)


def cache_directory(setting: str) -> Path:
    """Where dataset_cache_dir says that entries lie."""
    return cache_root() / "tokens" if setting == "auto" else Path(setting).expanduser()


class TokenCache:
    """A directory of entries by their keys. Raises OSError where it cannot be written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.digests = FileDigests(directory / "files.json")
        for folder in ("locks", "entries", "splits"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        # A file system that is mounted read-only, or full, says so here rather than after the work.
        probe = directory / f"{uuid.uuid4().hex}.probe"
        probe.write_text("probe")
        probe.unlink()

    def obtain(self, job: Job) -> Tokenized:
        """The tokens of a job, whose source is a path; they are a map of an entry's file."""
        source = Path(job.source).resolve()
        with _Lock(self.directory / "locks" / f"{_name(str(source))}.lock") as lock:
            digest = source_digest(job.source, self.digests)
            key = entry_key(job, digest)
            lock.raise_error_of(key)
            directory = self.directory / "entries" / key
            remarks: tuple[str, ...] = ()
            try:
                entry = read_entry(directory, self.digests)
            except DamagedEntryError as error:
                remarks = (f"{job.source}: the tokens in {directory} were damaged ({error}); made again",)
                remove_entry(directory)
                entry = None
            if entry is not None:
                facts = entry.facts
                shown = [(place, reason) for place, reason in facts["shown_bad"]]
                return Tokenized(
                    *(entry.tables, facts["counts"], shown),
                    directory=directory,
                    forms=facts["forms"],
                    shown_contradictions=facts["shown_contradictions"],
                    notes=tuple(facts["notes"]),
                    finding=facts["finding"],
                )
            try:
                return _with_remarks(self._make(job, directory, digest), remarks)
            except DsAlignError as error:
                lock.leave_error(key, error)
                raise

    def _make(self, job: Job, directory: Path, digest: str) -> Tokenized:
        with new_entry(directory) as partial:
            # The other ranks wait for this one, so all cores are free.
            made = tokenize_source(job, sharing_ranks=1, directory=partial)
            # These tokens would be found under the hash of what the file was.
            if source_digest(job.source, self.digests) != digest:
                raise DataError(f"{job.source}: changed while it was read; start again when it is whole")
            facts = {
                "counts": made.counts,
                "shown_bad": made.shown_bad,
                "forms": made.forms,
                "shown_contradictions": made.shown_contradictions,
                "notes": made.notes,
                "finding": made.finding,
            }
            publish_entry(partial, directory, made.tables, facts)
        try:
            entry = read_entry(directory, self.digests)
        except DamagedEntryError as error:
            raise OSError(None, str(error), str(directory)) from error
        if entry is None:
            raise OSError(None, "an entry vanished", str(directory))
        return replace(made, tables=entry.tables, directory=directory)

    def split_names(self, source: str | Path) -> list[str]:
        """Names of the splits in a JSON file, which is parsed once."""
        name = _name(f"{source_digest(source, self.digests)} {code_digest()}")
        path = self.directory / "splits" / f"{name}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, list):
                return found
        found = readers.available_splits(source)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(path)
        return found


class _Lock:
    """One process at a time; who waited learns why the one before it failed.

    On a file system without locks each process goes on at once: the same work is done more than once, and
    the entry that is moved into place first counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waited = False

    def __enter__(self) -> _Lock:
        if int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(_HEAD_START_SECONDS)
        self._file = self._path.open("a+", encoding="utf-8")
        while not self._try():
            self._waited = True
            time.sleep(_POLL_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            # Closing does not do it where a fork holds the file open, too.
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def raise_error_of(self, key: str) -> None:
        """Raises what the process that this one waited for left behind for the same key."""
        self._file.seek(0)
        try:
            left = json.loads(self._file.read() or "{}")
        except ValueError:
            left = {}
        if self._waited and left.get("key") == key:
            raise getattr(errors, left["kind"])(left["message"])
        self._file.truncate(0)

    def leave_error(self, key: str, error: DsAlignError) -> None:
        """Keeps an error for those who wait."""
        self._file.write(json.dumps({"key": key, "kind": type(error).__name__, "message": str(error)}))
        self._file.flush()


def _ranks_of_node() -> int:
    """Ranks that run on this node; the deepspeed command names their number in its own way."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return distributed.world_size()


def _name(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _with_remarks(found: Tokenized, remarks: tuple[str, ...]) -> Tokenized:
    return replace(found, remarks=(*remarks, *found.remarks))

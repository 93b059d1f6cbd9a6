"""Content hashes of files, remembered, so that a large file that did not change is read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

# A file that was written this recently may be written again within one tick of its clock, with the same
# size: its time then says nothing.
_SETTLED_SECONDS = 2.0


class FileDigests:
    """SHA-256 of files; `memory` is a JSON file that keeps them by path, size and modification time.

    Any process may use the same memory: a lost entry only means that a file is read again, and a memory that
    cannot be read or written is not an error. keep: whether new entries are written into it.
    """

    def __init__(self, memory: Path | None, *, keep: bool = True) -> None:
        self.memory = memory
        self.keep = keep
        self._known = {} if memory is None else _read_memory(memory)

    def digest(self, path: Path) -> str:
        """Hex digest of a file's content. Raises OSError."""
        path = path.resolve()
        status = path.stat()
        seen = [status.st_size, status.st_mtime_ns]
        known = self._known.get(str(path))
        if known is not None and known[:2] == seen:
            return known[2]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
            self._remember(str(path), [*seen, found])
        return found

    def digest_all(self, paths: Iterable[Path]) -> str:
        """One digest of several files: of their names (not their directory) and contents, in name order."""
        total = hashlib.sha256()
        for path in sorted(paths, key=lambda path: path.name):
            total.update(f"{path.name}\0{self.digest(path)}\n".encode())
        return total.hexdigest()

    def _remember(self, path: str, entry: list) -> None:
        self._known[path] = entry
        if self.memory is None or not self.keep:
            return
        # Another process may have added its own since this one read the file.
        known = {**_read_memory(self.memory), path: entry}
        partial = self.memory.with_name(f"{self.memory.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
            partial.replace(self.memory)


def _read_memory(memory: Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {path: entry for path, entry in known.items() if isinstance(entry, list) and len(entry) == 3}

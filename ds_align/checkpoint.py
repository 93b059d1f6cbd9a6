"""The envelope of a checkpoint: directory, hashes, manifest, choice, pruning; not what is inside.

A directory counts only when its manifest verifies. It is written under another name and renamed when every
file is on the disk and hashed, so a crash at any moment leaves the earlier ones as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ds_align import distributed
from ds_align.errors import CheckpointError

Result = TypeVar("Result")

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".tmp-"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint; state is its run_state.json."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def run_directory(self) -> Path:
        """The output_dir of the run that wrote it."""
        return self.path.absolute().parent.parent


def step_name(step: int) -> str:
    """Name of the directory of a step; names sort as steps do."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each checkpoint directory, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def begin(folder: Path, step: int) -> Path:
    """An empty directory to write the files of a step into; publish gives it its name.

    Collective: every rank must call this. Raises CheckpointError.
    """
    partial = folder / f"{_PARTIAL}{step_name(step)}"

    def make() -> None:
        if distributed.is_main():
            _remove(partial)
            partial.mkdir(parents=True)

    with_disk_errors(make, partial)
    return partial


def scratch(folder: Path, name: str) -> Path:
    """A directory that is not there, under a name that pruning clears up. Collective; CheckpointError."""
    path = folder / f"{_PARTIAL}{name}"

    def clear() -> None:
        if distributed.is_main():
            _remove(path)
            folder.mkdir(parents=True, exist_ok=True)

    with_disk_errors(clear, path)
    return path


def publish(partial: Path, step: int) -> int:
    """Flushes and hashes every file, writes the manifest, gives the directory its name; returns the bytes.

    Every rank must have finished writing. Collective: every rank must call this. Raises CheckpointError.
    """
    distributed.barrier()
    listed = with_disk_errors(lambda: _files_of(partial) if distributed.is_main() else [], partial)
    names = distributed.broadcast_object(listed)
    share = names[distributed.rank() :: distributed.world_size()]
    mine = with_disk_errors(lambda: {name: _seal(partial / name) for name in share}, partial)
    entries = {name: entry for part in distributed.gather_objects(mine) for name, entry in part.items()}

    def commit() -> None:
        if distributed.is_main():
            _write_manifest(partial, step, {name: entries[name] for name in names})
            _put_in_place(partial, step)

    with_disk_errors(commit, partial)
    return sum(entry["size"] for entry in entries.values())


def discard(partial: Path) -> None:
    """Removes what a failed write left, so that it does not hold the space; never raises."""
    if distributed.is_main():
        with contextlib.suppress(OSError):
            _remove(partial)


def prune(folder: Path, step: int, limit: int | None) -> None:
    """Keeps the newest `limit` checkpoints (None: all) up to the one of `step`, which was just written.

    Newer ones are removed too: they belong to a course that the run has left, or are not whole, and the next
    resume must not go back to them. Collective: every rank must call this. Raises CheckpointError.
    """

    def clean() -> None:
        if not distributed.is_main():
            return
        steps = list_steps(folder)
        past = [path for number, path in steps if number <= step]
        for path in [path for number, path in steps if number > step] + past[limit or len(past) :]:
            _remove(path)
        for path in folder.glob(f"{_PARTIAL}*"):
            _remove(path)

    with_disk_errors(clean, folder)


def forget(folder: Path) -> None:
    """Removes all checkpoints of a run that is replaced. Raises OSError."""
    for _, path in list_steps(folder):
        _remove(path)
    for path in [*folder.glob(f"{_PARTIAL}*"), folder / LATEST]:
        _remove(path)


def choose(output_dir: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint that a run goes on from, verified; None to start afresh.

    resume: None, "auto" (the newest whole one in output_dir; one warning names each that is not) or a
    directory. Collective: every rank must call this. Raises CheckpointError for a directory that is no whole
    checkpoint.
    """
    if resume is None:
        return None
    if resume != "auto":
        return verify(Path(resume))
    folder = output_dir / FOLDER
    candidates, bad = distributed.broadcast_object((list_steps(folder), _leftovers(folder)))
    chosen = None
    for _, path in candidates:
        try:
            chosen = verify(path)
            break
        except CheckpointError as error:
            bad.append(str(error))
    if bad and distributed.is_main():
        then = f"going on from {chosen.path.name}" if chosen else "none is left to go on from"
        print(f"warning: {folder}: {then}; not used: {' | '.join(bad)}", flush=True)
    return chosen


def verify(path: Path) -> Checkpoint:
    """Checks every file against the manifest, the hashes shared out over the ranks.

    Collective: every rank must call this. Raises CheckpointError, on every rank, that names the file.
    """
    entries, step = distributed.agree(lambda: _read_manifest(path))
    distributed.agree(lambda: _check_files(path, entries))
    return distributed.agree(lambda: Checkpoint(path, step, read_state(path, step)))


def read_state(path: Path, step: int) -> dict[str, Any]:
    """run_state.json of a verified checkpoint. Raises CheckpointError."""
    state = _read_json(path / RUN_STATE)
    if state.get("format") != FORMAT or state.get("global_step") != step:
        raise CheckpointError(
            f"{path / RUN_STATE}: format {state.get('format')!r} of step {state.get('global_step')!r}, "
            f"expected format {FORMAT} of step {step}; resume from another checkpoint"
        )
    return state


def with_disk_errors(action: Callable[[], Result], path: Path) -> Result:
    """Runs action on every rank; an OSError on any becomes a CheckpointError on all.

    Collective: every rank must call this.
    """

    def attempt() -> Result:
        try:
            return action()
        except OSError as error:
            raise write_error(path, error.strerror or str(error)) from error

    return distributed.agree(attempt)


def write_error(path: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that cannot be written."""
    return CheckpointError(
        f"{path}: the checkpoint cannot be written ({reason}); earlier ones are as they were: make room "
        "(save_total_limit keeps fewer) and continue with --resume"
    )


def _files_of(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _leftovers(folder: Path) -> list[str]:
    """What an interrupted write, or a pointer to nowhere, has to say; the pointer itself decides nothing."""
    found = [f"{path}: the writing of it was interrupted" for path in sorted(folder.glob(f"{_PARTIAL}*"))]
    latest = folder / LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not (folder / name).is_dir():
            found.append(f"{latest}: names {name!r}, which is not there")
    return found


def _seal(path: Path) -> dict[str, Any]:
    """Size and hash of a file that is on the disk, not only in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return {"size": size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write_manifest(partial: Path, step: int, files: dict[str, dict]) -> None:
    content = {"format": FORMAT, "step": step, "world_size": distributed.world_size(), "files": files}
    text = json.dumps({**content, "seal": _seal_of(content)}, indent=1) + "\n"
    write_durably(partial / MANIFEST, text)
    for directory in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync_directory(directory)


def _seal_of(content: dict) -> str:
    """Hash of a manifest's content: a flipped bit in the manifest itself must not go unseen."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Writes a text file to the disk. Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(partial: Path, step: int) -> None:
    folder = partial.parent
    final = folder / step_name(step)
    if final.exists():
        # A directory cannot be renamed over one that holds files.
        stale = folder / f"{_PARTIAL}old-{final.name}"
        _remove(stale)
        final.rename(stale)
    partial.rename(final)
    _sync_directory(folder)
    pointer = folder / f"{_PARTIAL}{LATEST}"
    write_durably(pointer, final.name + "\n")
    pointer.replace(folder / LATEST)
    _sync_directory(folder)


def _sync_directory(path: Path) -> None:
    """Puts names and renames on the disk; not every file system can, and then there is nothing to do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # The manifest goes first: what is left of an interrupted removal must not look whole.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: there is no such file, so this is no whole checkpoint; "
            f"give a directory such as OUTPUT_DIR/{FOLDER}/{step_name(100)}"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error
    return content if isinstance(content, dict) else {}


def _read_manifest(path: Path) -> tuple[dict[str, dict], int]:
    manifest = _read_json(path / MANIFEST)
    seal = manifest.pop("seal", None)
    if manifest.get("format") != FORMAT or seal != _seal_of(manifest):
        raise CheckpointError(
            f"{path / MANIFEST}: damaged, or of another format than {FORMAT}; resume from another checkpoint"
        )
    return manifest["files"], manifest["step"]


def _check_files(path: Path, entries: dict[str, dict]) -> None:
    """Sizes of all files, then the hashes of this rank's share. Raises CheckpointError."""
    for name, entry in entries.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "is not there" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{file}: {found}, expected {entry['size']} bytes; resume from another checkpoint"
            )
    for name in sorted(entries)[distributed.rank() :: distributed.world_size()]:
        try:
            digest = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error.strerror})") from error
        if digest != entries[name]["sha256"]:
            raise CheckpointError(
                f"{path / name}: the content is not what was written (its hash differs from that of the "
                "manifest); resume from another checkpoint"
            )

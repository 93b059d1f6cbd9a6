"""Content hashes are remembered by path, size and time, and never wrong for a file that may still change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from ds_align.file_digests import FileDigests


def settle(path: Path, age: float = 60.0) -> None:
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    settle(path)
    return path


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_digest_is_that_of_the_content(tmp_path: Path, file: Path) -> None:
    assert FileDigests(None).digest(file) == sha(b"one")
    assert FileDigests(tmp_path / "memory.json").digest(file) == sha(b"one")


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, file: Path) -> None:
    memory = tmp_path / "sub" / "memory.json"
    FileDigests(memory).digest(file)
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FileDigests(memory).digest(file) == sha(b"one")
    # The same, told apart by the time alone.
    settle(file, 30.0)
    assert FileDigests(memory).digest(file) == sha(b"two")


def test_another_size_is_another_file(tmp_path: Path, file: Path) -> None:
    memory = tmp_path / "memory.json"
    FileDigests(memory).digest(file)
    status = file.stat()
    file.write_bytes(b"longer")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FileDigests(memory).digest(file) == sha(b"longer")


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, file: Path) -> None:
    memory = tmp_path / "memory.json"
    settle(file, 0.0)
    FileDigests(memory).digest(file)
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FileDigests(memory).digest(file) == sha(b"two")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 3}', b"\xff\xfe"])
def test_a_broken_memory_is_no_error(tmp_path: Path, file: Path, content: bytes) -> None:
    memory = tmp_path / "memory.json"
    memory.write_bytes(content)
    assert FileDigests(memory).digest(file) == sha(b"one")


def test_two_memories_in_use_keep_both_entries(tmp_path: Path, file: Path) -> None:
    memory, other = tmp_path / "memory.json", tmp_path / "other.bin"
    other.write_bytes(b"other")
    settle(other)
    first, second = FileDigests(memory), FileDigests(memory)
    first.digest(file)
    second.digest(other)
    for path in (file, other):
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FileDigests(memory).digest(file) == sha(b"one")
    assert FileDigests(memory).digest(other) == sha(b"other")


def test_several_files_are_told_apart_by_name_and_content_not_by_place(tmp_path: Path) -> None:
    def made(folder: str, **contents: str) -> list[Path]:
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / name for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_text(content)
        return paths

    digests = FileDigests(None)
    first = digests.digest_all(made("first", a="1", b="2"))
    assert digests.digest_all(reversed(made("second", a="1", b="2"))) == first
    assert digests.digest_all(made("third", a="2", b="1")) != first
    assert digests.digest_all(made("fourth", a="1", c="2")) != first


def test_a_memory_that_is_only_read_stays_as_it_is(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "kept" / "files.json"
    assert FileDigests(memory, keep=False).digest(file) == sha(b"one")
    assert not memory.parent.exists()
    FileDigests(memory).digest(file)
    known = memory.read_bytes()
    file.write_bytes(b"other")
    settle(file)
    assert FileDigests(memory, keep=False).digest(file) == sha(b"other")
    assert memory.read_bytes() == known

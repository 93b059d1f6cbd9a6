"""Rows on disk: found by their tokens alone, whole or not there, whoever writes at the same time."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ds_align.errors import CheckpointError, DataError
from ds_align.reference_cache import ReferenceCache, identity, row_key

FACTS = {"model": "abc", "dtype": "float32"}


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


def row(number: int, length: int = 4) -> tuple[bytes, np.ndarray]:
    values = -np.arange(1, length + 1, dtype=np.float32) / (number + 1)
    return row_key(ids(1, 2), ids(*[number] * length)), values


def reopened(directory: Path, facts: dict | None = None) -> ReferenceCache:
    cache = ReferenceCache(directory, facts or FACTS)
    cache.open_parts(cache.part_names())
    return cache


def written(directory: Path, *parts: list) -> list[Path]:
    cache = ReferenceCache(directory, FACTS)
    return [cache.directory / cache.write_part(rows) for rows in parts]


def test_what_is_written_is_found_bit_for_bit(tmp_path: Path) -> None:
    rows = [row(number, length) for number, length in enumerate((1, 7, 4, 300))]
    written(tmp_path, rows[:3], rows[3:])
    cache = reopened(tmp_path)
    assert len(cache) == 4
    for key, values in rows:
        assert cache.find(key, len(values)).tobytes() == values.tobytes()
    assert cache.find(row(9)[0], 4) is None
    assert cache.damage() is None


def test_an_empty_directory_holds_nothing(tmp_path: Path) -> None:
    cache = reopened(tmp_path / "absent")
    assert len(cache) == 0
    assert cache.find(row(0)[0], 4) is None


def test_the_boundary_between_prompt_and_completion_is_part_of_the_key() -> None:
    keys = {
        row_key(ids(1, 2), ids(3)),
        row_key(ids(1), ids(2, 3)),
        row_key(ids(1, 2), ids(3, 3)),
        row_key(ids(1, 2, 3), ids()),
    }
    assert len(keys) == 4
    assert row_key(ids(1, 2), ids(3)) == row_key(np.asarray([1, 2], dtype=np.int64), ids(3))


@pytest.mark.parametrize("changed", [{"model": "abd"}, {"dtype": "bfloat16"}, {"tokenizer": "x"}])
def test_another_reference_has_other_rows(tmp_path: Path, changed: dict) -> None:
    written(tmp_path, [row(0)])
    assert identity(FACTS | changed) != identity(FACTS)
    assert len(reopened(tmp_path, FACTS | changed)) == 0
    assert identity(dict(reversed(FACTS.items()))) == identity(FACTS)


@pytest.mark.parametrize("seed", range(8))
def test_every_row_of_every_file_is_found(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts = [
        [(int(draw.integers(41)), int(draw.integers(1, 6))) for _ in range(draw.integers(1, 30))]
        for _ in range(draw.integers(6))
    ]
    written(tmp_path, *([row(*place) for place in part] for part in parts))
    cache = reopened(tmp_path)
    present = {place for part in parts for place in part}
    for number in range(41):
        for length in range(1, 6):
            key, values = row(number, length)
            found = cache.find(key, length)
            assert (found is not None) == ((number, length) in present)
            assert found is None or found.tobytes() == values.tobytes()


def test_a_flipped_bit_makes_its_row_absent_and_no_other(tmp_path: Path) -> None:
    rows = [row(number) for number in range(3)]
    (file,) = written(tmp_path, rows)
    data = bytearray(file.read_bytes())
    place = data.index(rows[1][1].tobytes())
    data[place + 5] ^= 1
    file.write_bytes(data)
    cache = reopened(tmp_path)
    assert [cache.find(key, 4) is not None for key, _ in rows] == [True, False, True]
    assert cache.damage() == f"1 single row is damaged and counts as missing: {file}: row 1"
    with pytest.raises(DataError, match=r"damaged; start the run again"):
        cache.read(rows[1][0], 4)


def test_a_row_written_again_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    key, values = row(0)
    first, second = written(tmp_path, [row(0)], [row(0)])
    for file in (first, second):
        intact = file.read_bytes()
        data = bytearray(intact)
        data[data.index(values.tobytes())] ^= 8
        file.write_bytes(data)
        cache = reopened(tmp_path)
        assert cache.find(key, 4).tobytes() == values.tobytes()
        assert cache.damage() is None
        file.write_bytes(intact)


def test_a_row_of_another_length_is_no_answer(tmp_path: Path) -> None:
    written(tmp_path, [row(0)])
    cache = reopened(tmp_path)
    assert cache.find(row(0)[0], 3) is None


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -200])
def test_a_file_that_is_not_whole_is_left_out(tmp_path: Path, keep: int) -> None:
    torn, whole = written(tmp_path, [row(0)], [row(1)])
    data = torn.read_bytes()
    torn.write_bytes(data[:keep])
    cache = reopened(tmp_path)
    assert cache.find(row(0)[0], 4) is None
    assert cache.find(row(1)[0], 4) is not None
    assert cache.damage().startswith(f"1 file is damaged and counts as missing: {torn}: ")
    cache.set_aside()
    assert whole.is_file()
    assert torn.with_suffix(".damaged").is_file()
    assert reopened(tmp_path).damage() is None


def test_any_damaged_byte_gives_the_true_values_or_none(tmp_path: Path) -> None:
    rows = [row(number) for number in range(2)]
    (file,) = written(tmp_path, rows)
    data = file.read_bytes()
    for place in range(0, len(data), 3):
        broken = bytearray(data)
        broken[place] ^= 0x41
        file.write_bytes(broken)
        cache = reopened(tmp_path)
        for key, values in rows:
            found = cache.find(key, 4)
            assert found is None or found.tobytes() == values.tobytes(), place


def test_a_file_that_was_being_written_is_never_read(tmp_path: Path) -> None:
    (file,) = written(tmp_path, [row(0)])
    partial = file.with_name(f".tmp-{file.name}")
    file.rename(partial)
    cache = reopened(tmp_path)
    assert len(cache) == 0
    cache.describe({"path": "m"})
    assert partial.exists()
    os.utime(partial, (time.time() - 2 * 86400,) * 2)
    cache.describe({"path": "m"})
    assert not partial.exists()


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    cache = ReferenceCache(tmp_path / "taken", FACTS)
    with pytest.raises(
        CheckpointError, match=r"ref_cache_dir: .*taken.* cannot be written \(Not a directory\)"
    ):
        cache.write_part([row(0)])


def test_a_place_is_tried_before_there_is_anything_to_write(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "new" / "place", FACTS)
    cache.check_writable()
    assert list(cache.directory.iterdir()) == []
    (tmp_path / "taken").write_text("a file")
    for place in ("taken", "taken/below"):
        for check in (ReferenceCache.check_writable, ReferenceCache.check_place):
            with pytest.raises(CheckpointError, match=r"ref_cache_dir: .*a file stands in its path, give a"):
                check(ReferenceCache(tmp_path / place, FACTS))
    ReferenceCache(tmp_path / "unmade", FACTS).check_place()
    assert not (tmp_path / "unmade").exists()
    # Not even root may make a directory here.
    with pytest.raises(
        CheckpointError, match=r"cannot be written \(.*\); give a directory that you can write"
    ):
        ReferenceCache(Path("/sys/kernel"), FACTS).check_writable()


def _write_many(directory: Path, first: int) -> None:
    for start in range(first, first + 40, 8):
        written(directory, [row(number) for number in range(start, start + 8)])


def test_many_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    # Half of the rows are written by two of them.
    writers = [context.Process(target=_write_many, args=(tmp_path, first)) for first in (0, 20, 40, 60)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    cache = reopened(tmp_path)
    assert all(cache.find(row(number)[0], 4) is not None for number in range(100))
    assert cache.damage() is None
    assert not list(cache.directory.glob(".tmp-*"))


def test_files_that_come_later_are_added(tmp_path: Path) -> None:
    written(tmp_path, [row(0)])
    cache = reopened(tmp_path)
    (file,) = written(tmp_path, [row(1)])
    assert cache.find(row(1)[0], 4) is None
    cache.open_parts([file.name])
    cache.open_parts([file.name])
    assert len(cache) == 2
    assert cache.find(row(1)[0], 4) is not None


def test_damage_counts_files_and_rows_apart(tmp_path: Path) -> None:
    files = written(tmp_path, [row(0)], [row(1)], [row(2), row(3)])
    files[0].write_bytes(b"torn")
    files[1].write_bytes(b"torn")
    data = bytearray(files[2].read_bytes())
    for number in (2, 3):
        data[data.index(row(number)[1].tobytes())] ^= 1
    files[2].write_bytes(data)
    cache = reopened(tmp_path)
    for number in (2, 3, 3):
        cache.find(row(number)[0], 4)
    assert cache.damage().startswith("2 files and 2 single rows are damaged and count as missing: ")
    cache.forget_damage()
    assert cache.damage() is None

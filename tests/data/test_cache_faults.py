"""The cache of tokens under damage, killed and competing processes, and disks that refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ds_align.data import load_preferences
from ds_align.data.cache import _Lock, _name
from ds_align.errors import ConfigError, DataError
from tests.data import messy
from tests.data.messy import is_hit, row

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("damage", ["flip", "cut", "no tables", "facts", "no facts", "empty"])
def test_damage_is_found_and_mended(load, damage):
    first = load()
    expected, directory = messy.facts(first), first.directory
    tables, facts = directory / "tables.arrow", directory / "entry.json"
    if damage == "flip":
        content = bytearray(tables.read_bytes())
        content[len(content) // 2] ^= 1
        tables.write_bytes(content)
    elif damage == "cut":
        os.truncate(tables, tables.stat().st_size - 40)
    elif damage == "facts":
        facts.write_text(facts.read_text().replace('"rows": 20', '"rows": 21'))
    elif damage == "empty":
        facts.write_bytes(b"")
    else:
        (tables if damage == "no tables" else facts).unlink()
    mended = load()
    assert not is_hit(mended)
    assert "were damaged" in mended.notes[0] and str(directory) in mended.notes[0]
    assert messy.facts(mended) == {**expected, "notes": mended.notes}
    assert is_hit(load()) and load().notes == ()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_verified_file_is_not_read_again(load, monkeypatch):
    """Its hash is remembered once it is old enough for its time to say something."""
    import hashlib

    directory = load().directory
    for path in (load.path, directory / "tables.arrow"):
        os.utime(path, (1e9, 1e9))
    assert is_hit(load())
    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or real(file, name))
    assert is_hit(load())
    assert read == []


def command(path: Path, cache: Path) -> list[str]:
    code = (
        "import sys\n"
        "from ds_align import DPOConfig\n"
        "from ds_align.data import load_preferences\n"
        f"config = DPOConfig(dataset_cache_dir={str(cache)!r}, dataset_num_proc=1)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"found = load_preferences({str(path)!r}, tokenizer=None, inputs='pairs', config=config)\n"
        "print(found.num_processes, found.digest(), flush=True)\n"
    )
    return [sys.executable, "-c", code]


def start(path: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(path, cache),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )


@pytest.fixture
def many_ids(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "ids.jsonl"
    with path.open("w") as file:
        for _ in range(20_000):
            ids = rng.integers(2, 90, (3, 40)).tolist()
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            file.write(json.dumps(dict(zip(names, ids, strict=True))) + "\n")
    return path


def test_two_processes_at_once_do_the_work_once(many_ids, tmp_path):
    processes = [start(many_ids, tmp_path / "cache") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(number for number, _ in answers) == ["0", "0", "1"]
    assert len({digest for _, digest in answers}) == 1
    assert len(list((tmp_path / "cache" / "entries").iterdir())) == 1


def test_what_a_killed_process_leaves_is_never_used(many_ids, settings, tmp_path):
    entries = tmp_path / "cache" / "entries"
    process = start(many_ids, tmp_path / "cache")
    process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in entries.glob("*.partial/*.spool")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    (left,) = entries.iterdir()
    assert left.suffix == ".partial"
    config = settings(dataset_cache_dir=str(tmp_path / "cache"))
    found = load_preferences(many_ids, tokenizer=None, inputs="pairs", config=config)
    assert not is_hit(found) and len(found) == found.counts["rows_read"] == 20_000
    plain = settings(dataset_cache_dir="none")
    assert found.digest() == load_preferences(many_ids, tokenizer=None, inputs="pairs", config=plain).digest()
    # What is left is somebody's work for a day, then nobody's.
    assert left.is_dir()
    for path in (*left.iterdir(), left):
        os.utime(path, (1e9, 1e9))
    load_preferences(many_ids, tokenizer=None, inputs="pairs", config=settings(
        dataset_cache_dir=str(tmp_path / "cache"), max_length=50))  # fmt: skip
    assert not left.exists()


def opened(path: Path) -> int:
    """How many times this process has a file open."""
    return sum(os.path.realpath(link) == str(path) for link in Path("/proc/self/fd").iterdir())


def test_who_waits_hears_the_error_of_the_one_who_worked(settings, write_jsonl, tmp_path, bpe):
    path = write_jsonl([row(1), "{"])
    config = settings(dataset_cache_dir=str(tmp_path / "cache"))

    def load():
        return load_preferences(path, tokenizer=bpe(), inputs="pairs", config=config)

    with pytest.raises(DataError) as first:
        load()
    lock_path = tmp_path / "cache" / "locks" / f"{_name(str(path.resolve()))}.lock"
    left = json.loads(lock_path.read_text())
    assert left["message"] == str(first.value) and left["kind"] == "DataError"
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            load()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    with _Lock(lock_path) as lock:
        thread.start()
        deadline = time.monotonic() + 60
        while opened(lock_path) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        lock.raise_error_of("another key")
        # Not what the data would give: so it was heard, not found again.
        lock.leave_error(left["key"], ConfigError("said by the other"))
        assert not caught
    thread.join(60)
    assert [str(error) for error in caught] == ["said by the other"]
    # Who comes later looks for himself.
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        load()


@pytest.mark.parametrize("place", ["below a file", "read only"])
def test_without_a_usable_directory_the_data_are_there_all_the_same(load, tmp_path, place):
    if place == "below a file":
        (tmp_path / "file").write_text("")
        cache = tmp_path / "file" / "cache"
    else:
        cache = tmp_path / "locked"
        cache.mkdir(mode=0o500)
        if os.access(cache, os.W_OK):
            # root may write everywhere but here.
            cache = Path("/proc/ds_align")
    expected = load(dataset_cache_dir="none")
    found = load(dataset_cache_dir=str(cache))
    assert not is_hit(found) and found.directory is None
    assert found.digest() == expected.digest() and found.counts == expected.counts
    assert f"dataset_cache_dir={cache}: cannot be used" in found.notes[0]
    assert expected.notes == found.notes[1:] == ()


def test_memory_does_not_grow_with_the_tokens(settings, tmp_path):
    """Six chunks more may cost what is kept of a row (about 200 bytes), not their 600 tokens a row."""
    import tracemalloc

    rng = np.random.default_rng(0)
    line = json.dumps({"chosen_ids": rng.integers(2, 90, 300).tolist(), "rejected_ids": [3] * 299})[1:]
    peaks = []
    for num_rows in (2048, 8192):
        path = tmp_path / f"{num_rows}.jsonl"
        path.write_text("".join(f'{{"prompt_ids": [{number}], {line}\n' for number in range(num_rows)))
        tracemalloc.start()
        found = load_preferences(path, tokenizer=None, inputs="pairs", config=settings(max_length=600))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert int(found.completion_lengths.sum()) == 599 * num_rows
        assert found[num_rows - 1].prompt_ids.tolist() == [num_rows - 1]
    tokens = 4 * 599 * (8192 - 2048)
    assert peaks[1] - peaks[0] < 400 * (8192 - 2048) < tokens / 5


def test_a_file_that_changes_while_it_is_read_is_refused(settings, tmp_path, bpe):
    """Its tokens would be found under the hash of what the file was."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(50)))
    tokenizer = bpe()

    class Writing(type(tokenizer)):
        def __call__(self, *arguments, **options):
            with path.open("a") as file:
                file.write(json.dumps(row(99)) + "\n")
            return super().__call__(*arguments, **options)

    tokenizer.__class__ = Writing
    with pytest.raises(DataError, match="changed while it was read"):
        load_preferences(path, tokenizer=tokenizer, inputs="pairs", config=settings())
    assert not list((tmp_path / "tokens" / "entries").iterdir())

"""Several processes, one process and the cache give the same rows, counts, notes and errors."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_align.data import build, load_preferences
from ds_align.data.chunks import ChunkSettings
from ds_align.data.parallel import EncodingProcesses, num_processes
from ds_align.data.ranked import PairRules
from ds_align.data.readers import open_records
from ds_align.data.schemas import Columns
from ds_align.data.truncate import Limits
from ds_align.errors import ConfigError, DataError
from tests.data import messy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("inputs", "labels"), [("pairs", False), ("unpaired", False), ("unpaired", True)])
def test_every_way_gives_the_same(bpe, settings, tmp_path, inputs, labels):
    path = messy.write(tmp_path / "messy.jsonl", 2600, seed=7, labels=labels)
    cuts = {"max_length": 24, "max_prompt_length": 9, "on_bad_rows": "skip"}

    def load(**changes):
        config = settings(**cuts, **changes)
        return load_preferences(path, tokenizer=bpe(), inputs=inputs, config=config)

    plain = load(dataset_num_proc=1, dataset_cache_dir="none")
    ways = {
        "two processes": load(dataset_num_proc=2, dataset_cache_dir="none"),
        "written": load(dataset_num_proc=2),
        "mapped": load(),
    }
    assert [way.num_processes for way in (plain, *ways.values())] == [1, 2, 2, 0]
    assert [way.directory is None for way in (plain, *ways.values())] == [True, True, False, False]
    expected = messy.facts(plain)
    for name, way in ways.items():
        found = messy.facts(way)
        for part, value in expected.items():
            assert found[part] == value, f"{name}: {part}"
    # What is compared must be there to be compared.
    counted = {name for name, number in plain.counts.items() if number}
    assert {"prompts_cut", "completions_cut", "duplicate_rows", "contradictory_rows", "bad_rows"} <= counted
    assert "7 of 2607 rows were left out" in plain.notes[0]


def test_errors_are_the_same_and_come_in_file_order(bpe, settings, tmp_path):
    path = messy.write(tmp_path / "messy.jsonl", 2600, seed=3)
    messages = set()
    for number in (1, 2):
        for cache in ("none", str(tmp_path / "cache")):
            config = settings(dataset_num_proc=number, dataset_cache_dir=cache)
            with pytest.raises(DataError) as caught:
                load_preferences(path, tokenizer=bpe(), inputs="pairs", config=config)
            messages.add(str(caught.value))
    (message,) = messages
    assert "7 of 2607 rows cannot be used" in message
    assert 0 < message.index(f"{path}:201:12") < message.index(f"{path}:1793:12: malformed JSON")
    for number in (1, 2):
        # The first text row is named, though another process may meet a later one sooner.
        config = settings(dataset_num_proc=number, dataset_cache_dir="none", on_bad_rows="skip")
        with pytest.raises(DataError, match="the row is text and no tokenizer was given") as caught:
            load_preferences(path, tokenizer=None, inputs="pairs", config=config)
        messages.add(str(caught.value))
    assert len(messages) == 2


def test_lists_and_arrow_tables_go_to_other_processes(settings):
    import datasets

    rows = [
        {"prompt_ids": [number % 97], "chosen_ids": [1, number], "rejected_ids": [2]}
        for number in range(1500)
    ]
    found = [
        load_preferences(
            source, tokenizer=None, inputs="pairs", config=settings(dataset_num_proc=number), split=split
        )
        for source in (rows, datasets.Dataset.from_list(rows))
        for number in (1, 2)
        for split in (None, "train[100:1400]")
    ]
    assert [way.num_processes for way in found] == [1, 1, 2, 2] * 2
    assert len({way.digest() for way in found[::2]}) == len({way.digest() for way in found[1::2]}) == 1
    assert [way.name for way in found] == ["records", "records (train[100:1400])"] * 2 + [
        "dataset",
        "dataset (train[100:1400])",
    ] * 2


def test_what_cannot_be_sent_is_done_here_and_said(bpe, settings, tmp_path):
    path = messy.write(tmp_path / "messy.jsonl", 1300, seed=1)
    tokenizer = bpe()
    # A class of this function is nothing that another process could import.
    tokenizer.__class__ = type("Local", (type(tokenizer),), {})
    config = settings(dataset_num_proc=2, dataset_cache_dir="none", on_bad_rows="skip")
    found = load_preferences(path, tokenizer=tokenizer, inputs="pairs", config=config)
    assert found.num_processes == 1
    assert (
        "tokenized in one process, not in 2: another process cannot be given the tokenizer" in found.notes[0]
    )
    plain = load_preferences(
        path,
        tokenizer=bpe(),
        inputs="pairs",
        config=settings(dataset_num_proc=1, dataset_cache_dir="none", on_bad_rows="skip"),
    )
    assert found.digest() == plain.digest() and found.notes[1:] == plain.notes


def chunk_settings(tokenizer) -> ChunkSettings:
    return ChunkSettings(tokenizer, None, "pairs", "pairs", Columns(), Limits(), PairRules())


def test_a_process_that_dies_is_an_error_and_none_is_left(bpe, tmp_path):
    records = open_records(messy.write(tmp_path / "messy.jsonl", 1100, seed=2))
    parts = [records.part(0, 600), records.part(600, 1100)]
    with EncodingProcesses(chunk_settings(bpe()), 2) as processes:
        children = [worker._process for worker in processes._workers]
        chunks = list(processes.encode(parts))
        assert [chunk.num_read for chunk in chunks] == [600, 500]
        children[1].kill()
        with pytest.raises(
            ConfigError, match=r"a process that tokenizes ended with code -9 .*dataset_num_proc"
        ):
            list(processes.encode(parts * 3))
    assert all(child.returncode is not None for child in children)


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('started', flush=True)\n"
        "from types import SimpleNamespace\n"
        "from ds_align import DPOConfig\n"
        "from ds_align.data import load_preferences\n"
        "rows = [{'prompt_ids': [n % 9], 'chosen_ids': [n, 1], 'rejected_ids': [2]} for n in range(2000)]\n"
        "config = DPOConfig(dataset_num_proc=2)\n"
        "found = load_preferences(rows, tokenizer=None, inputs='pairs', config=config)\n"
        "print(len(found), found.num_processes)\n"
    )
    # A module of the working directory must not stand in for a library in the other processes.
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "scripts").mkdir()
    script = script.rename(tmp_path / "scripts" / "script.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["started", "2000", "2"]


def test_the_number_of_processes():
    cores = len(os.sched_getaffinity(0))
    assert num_processes("auto", 19_999, sharing_ranks=1) == 1
    assert num_processes("auto", 10**6, sharing_ranks=1) == min(cores, 32)
    assert num_processes("auto", 10**6, sharing_ranks=10**4) == 1
    assert num_processes(8, 10**6, sharing_ranks=4) == 8
    assert num_processes(8, 1025, sharing_ranks=1) == 2  # two chunks of at most 1024 rows
    assert num_processes(8, 1, sharing_ranks=1) == 1


def test_a_turn_ends_alike_in_every_process(bpe, settings, tmp_path):
    """A template whose end of a turn depends on the conversation: no memory of earlier rows may show."""
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{{ '<|im_end|>' if messages[0]['content'] | length > 20 else '!' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path = messy.write(tmp_path / "messy.jsonl", 2300, seed=11)
    found = [
        load_preferences(
            path,
            tokenizer=bpe(template),
            inputs="pairs",
            config=settings(dataset_num_proc=number, dataset_cache_dir="none", on_bad_rows="skip"),
        )
        for number in (1, 2)
    ]
    assert found[0].digest() == found[1].digest()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_is_shown_once(settings, monkeypatch, capsys):
    rows = [{"prompt_ids": [1], "chosen_ids": [2, number], "rejected_ids": [3]} for number in range(1500)]

    def load() -> None:
        load_preferences(rows, tokenizer=None, inputs="pairs", config=settings())

    load()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(build, "_QUIET_SECONDS", 0.0)
    load()
    line = r"records: 1500 rows tokenized in [\d.]+ s \(\d+ rows/s, 1 processes\)\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    load()
    assert "tokenizing records: 100%" in terminal.getvalue()
    assert "rows tokenized in" not in terminal.getvalue()
    # Another rank is silent either way.
    monkeypatch.setenv("RANK", "1")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        load()
        assert stream.getvalue() == ""

"""Overlap of two data sets, and how rows are read: lists, streams, little memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ds_align.data.duplicates import prompt_overlap, scan_duplicates
from ds_align.data.schemas import Preference
from tests.data.preference_texts import pair, random_rows

PROGRAM = Path(__file__).resolve().parent / "programs" / "duplicates_memory.py"
ROOT = Path(__file__).resolve().parents[2]


def test_overlap_counts_each_evaluation_row_once() -> None:
    train = [
        pair(0, "How tall is the tower of Pisa?", "a", "b"),
        pair(1, "Name a fruit that is yellow.", "c", "d"),
    ]
    evaluation = [
        pair(10, "How tall is the tower of Pisa?", "x", "y"),
        pair(11, "how tall is the tower of Pisa?", "x", "y"),
        pair(12, "How tall is the tower of Pisa!", "x", "y"),
        pair(13, "How tall is the Eiffel tower?", "x", "y"),
        pair(14, "HOW tall is the tower of Pisa!", "z", "y"),
    ]
    report = prompt_overlap(train, evaluation)
    assert (report.num_train, report.num_eval, report.exact, report.near) == (2, 5, 1, 3)
    found = [(finding.kind, finding.origins) for finding in report.findings]
    assert found == [("overlap", (f"f:{number}", "f:0")) for number in (10, 11, 12, 14)]
    # 30 characters, one of them exchanged.
    assert [round(finding.similarity, 4) for finding in report.findings] == [1.0, 1.0, 0.9667, 0.9667]
    assert len(prompt_overlap(train, evaluation, max_examples=2).findings) == 2
    exact = prompt_overlap(train, evaluation, near=False)
    assert (exact.exact, exact.near, len(exact.findings)) == (1, 0, 1)


class Stream:
    """Rows that can be passed over again, but not asked for by number."""

    def __init__(self, rows: list[Preference]) -> None:
        self.rows, self.passes = rows, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.rows)


def test_a_stream_gives_what_a_list_gives() -> None:
    rows = random_rows(random.Random(3), 100)
    stream = Stream(rows)
    found, wanted = scan_duplicates(stream), scan_duplicates(rows)
    assert found.findings == wanted.findings and found.counts == wanted.counts
    # Keys, signatures, texts of suggested pairs, origins.
    assert stream.passes == 4
    assert prompt_overlap(Stream(rows[:50]), Stream(rows[50:])) == prompt_overlap(rows[:50], rows[50:])


def test_an_iterator_is_refused() -> None:
    with pytest.raises(TypeError, match="can be passed over once; give a list"):
        scan_duplicates(iter([]))
    with pytest.raises(TypeError, match="generator"):
        prompt_overlap([], (row for row in []))


@pytest.mark.parametrize("max_examples", [0, 2])
def test_the_first_examples_of_each_kind_are_kept(max_examples: int) -> None:
    rows = random_rows(random.Random(7), 200)
    all_found = scan_duplicates(rows, max_examples=1000)
    few = scan_duplicates(rows, max_examples=max_examples)
    assert few.counts == all_found.counts
    for kind in few.counts:
        wanted = [found for found in all_found.findings if found.kind == kind]
        assert len(wanted) > 2
        assert [found for found in few.findings if found.kind == kind] == wanted[:max_examples]


def run_program(*arguments: object) -> dict:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_little_memory_costs_passes_and_finds_the_same() -> None:
    rng = random.Random(5)
    rows = random_rows(rng, 40) + [pair(number, f"{number}", "a", "b") for number in range(40, 6000)]
    stream = Stream(rows)
    found, wanted = scan_duplicates(stream, memory_mb=1), scan_duplicates(rows)
    assert found.counts == wanted.counts
    assert found.removable.tolist() == wanted.removable.tolist()
    # A quarter of the megabyte: 10 bands of 6000 keys of 4 bytes, so that 64 take 7 passes and not 1.
    assert stream.passes >= 3 + 6


@pytest.mark.slow
def test_texts_are_not_held() -> None:
    """3000 rows of 20000 characters: 60 MB of text, of which some megabytes at a time are looked at."""
    found = run_program(3000, 2200, 512)
    assert found["counts"]["near_duplicate"] == 30
    assert found["growth_mb"] < 40

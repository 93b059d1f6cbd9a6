"""No form of file is held in memory as a whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import formats
from tests.distributed.launching import environment

PROGRAM = Path(__file__).resolve().parent / "programs" / "read_in_pieces.py"
NUM_ROWS = 12_000
# A row has about 4 kB, a file of text 48 MB; what is allowed holds some chunks of 1024 rows, 4 MB each.
ALLOWED_BYTES = 24 * 2**20
TEXTS = ("a.jsonl", "a.json", "splits.json", "a.csv", "a.jsonl.gz", "a.json.zst", "a.csv.zst")


def rows(number: int) -> list[dict]:
    texts = [random.Random(seed).randbytes(1000).hex() for seed in range(50)]
    return [
        {
            "prompt": f"p{index}",
            "chosen": f"{index} {texts[index % 50]}",
            "rejected": f"no {index} {texts[index * 7 % 50]}",
        }
        for index in range(number)
    ]


def read(small: Path, path: Path) -> tuple[int, int]:
    """Rows and grown bytes, in a process of its own: a peak never falls again."""
    command = [sys.executable, PROGRAM, small, path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(json.loads(done.stdout))


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_read_in_pieces(name, tmp_path):
    small = formats.write(tmp_path / "small", name, rows(20))
    large = formats.write(tmp_path / "large", name, rows(NUM_ROWS))
    num_rows, grown = read(small, large)
    assert num_rows == NUM_ROWS
    assert grown < ALLOWED_BYTES, f"{grown / 2**20:.1f} MB"


def test_parquet_is_decoded_in_pieces(tmp_path):
    """144 MB in one row group, so that no group can be let go; Arrow keeps some MB that it does not use."""
    small = formats.write(tmp_path / "small", "a.parquet", rows(20))
    table = pa.concat_tables([pa.Table.from_pylist(rows(NUM_ROWS))] * 3)
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=3 * NUM_ROWS, use_dictionary=False)
    assert (tmp_path / "large.parquet").stat().st_size > 130e6
    num_rows, grown = read(small, tmp_path / "large.parquet")
    assert num_rows == 3 * NUM_ROWS
    assert grown < 72 * 2**20, f"{grown / 2**20:.1f} MB"


def test_a_saved_directory_is_mapped(tmp_path):
    """The map's pages count as memory once they were read; they are the system's to take back."""
    for name, number in (("small", 20), ("large", NUM_ROWS)):
        datasets.Dataset.from_list(rows(number)).save_to_disk(tmp_path / name)
    num_rows, grown = read(tmp_path / "small", tmp_path / "large")
    assert num_rows == NUM_ROWS
    assert grown < ALLOWED_BYTES + NUM_ROWS * 4100

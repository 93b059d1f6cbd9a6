"""What a step costs as it grows: the units that are counted, and one small table run for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import SIZES, TABLES, Row, figures, products, table

ROOT = Path(__file__).resolve().parents[2]


def test_products_count_the_weights_that_a_token_meets():
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
    }
    # Layer: q and o 8 * 8 each, k and v 8 * 4 each, three of 8 * 16; head 10 * 8.
    assert products(Row("", sizes)) == 2 * (2 * 64 + 2 * 32 + 3 * 128) + 80


def test_the_last_column_is_the_cost_of_a_unit_over_that_of_the_first_row():
    def run(seconds: float, tokens: float) -> dict:
        result = {"cpu_s": seconds, "wall_s": seconds, "growth_mb": 1.0, "peak_mb": 2.0}
        return {"ranks": [{**result, "logged": [{"loss": 0.5}]}], "tokens": tokens}

    row = Row("", grows="tokens")
    found = [figures(row, [run(1.0, 100), run(9.0, 100), run(2.0, 100)]), figures(row, [run(3.0, 200)])]
    # The median 2 s for 100 tokens, then 3 s for 200: 0.015 / 0.02 = 0.75 of it a token.
    lines = list(table(found))
    assert (lines[1].split()[-1], lines[2].split()[-1]) == ("1.00", "0.75")


def test_the_rows_of_a_table_differ_in_what_it_is_about():
    assert [row.prompts for row in TABLES["tokens"](4)] == [4, 8, 16, 32]
    assert {row.ranks for row in TABLES["ranks"](4)} == {1, 2}
    assert len({products(row) for row in TABLES["model"](4)}) == 4
    vocabularies = [row.sizes["vocab_size"] for row in TABLES["vocabulary"](4)]
    assert vocabularies == sorted(set(vocabularies))
    assert all(row.sizes == SIZES for name in ("tokens", "ranks", "offload") for row in TABLES[name](4))


@pytest.mark.distributed
def test_where_the_reference_lies_changes_no_loss(tmp_path):
    command = [sys.executable, "benchmarks/scaling.py", "--tables", "offload", "--profile", "tiny"]
    options = ["--steps", "1", "--repeats", "1", "--prompts", "2", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        command + options, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    offloaded, on_device = json.loads((tmp_path / "out.json").read_text())["tables"]["offload"]
    assert (offloaded["row"], on_device["row"]) == ("offloaded", "on the device")
    # Where a weight lies in memory decides which kernel the matrix library takes.
    assert offloaded["loss"] == pytest.approx(on_device["loss"], rel=1e-6)
    assert min(offloaded["seconds"], on_device["seconds"]) > 0

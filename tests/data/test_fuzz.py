"""Files with random faults: never a traceback, never a hang, never a row that is neither kept nor counted.

DS_ALIGN_FUZZ_FILES sets how many files are tried.
"""

from __future__ import annotations

import os
import random
import time
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_align.config import DPOConfig, KTOConfig
from ds_align.data import load_preferences
from ds_align.data.build import LEFT_OUT
from ds_align.errors import DataError
from tests.data import formats, mutations

NUM_FILES = int(os.environ.get("DS_ALIGN_FUZZ_FILES", "1500"))
# Each file has a few rows; one that takes seconds would take hours with a million.
MOST_SECONDS = 5.0
NAMES = sorted(formats.FORMATS)


@pytest.mark.parametrize("part", range(4))
def test_no_file_is_a_surprise(tmp_path, bpe, part):
    tokenizer = bpe()
    read = refused = 0
    for seed in range(part, NUM_FILES, 4):
        rng = random.Random(seed)
        name = rng.choice(NAMES)
        content = mutations.spoiled_file(rng, name)
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(content)
        config_class, inputs = rng.choice(((DPOConfig, "pairs"), (KTOConfig, "unpaired")))
        config = config_class(
            on_bad_rows="skip", max_bad_fraction=1.0, dataset_cache_dir="none", dataset_num_proc=1
        )
        told = mutations.describe(seed, name, content)
        started = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                data = load_preferences(path, tokenizer=tokenizer, inputs=inputs, config=config)
        except DataError as error:
            refused += 1
            assert str(path) in str(error), told
            assert "\n" not in str(error), told
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}: {told}") from error
        else:
            read += 1
            counts = data.counts
            left = sum(counts[count] for count in ("bad_rows", "dropped_equal_pairs", *LEFT_OUT))
            # A record gives a preference at least, or is counted; two for KTO's pairs.
            assert counts["rows_read"] <= counts["rows"] + left, told
            assert len(data) == counts["rows"] > 0, told
            if name.endswith("jsonl"):
                assert counts["rows_read"] == mutations.as_json_lines(content), told
        assert time.process_time() - started < MOST_SECONDS, told
        path.unlink()
    assert read > NUM_FILES // 40
    assert refused > NUM_FILES // 40


def test_a_number_that_no_float_holds_is_a_bad_row(bpe):
    rows = [{"prompt": "p", "completions": ["a", "b"], "scores": [1, value]} for value in (2, 10**400)]
    config = DPOConfig(on_bad_rows="skip", max_bad_fraction=1.0, dataset_cache_dir="none")
    data = load_preferences(rows, tokenizer=bpe(), inputs="pairs", config=config)
    assert (data.counts["rows"], data.counts["bad_rows"]) == (1, 1)
    assert "expected a finite number" in " ".join(data.notes)


def test_tools_that_are_no_descriptions_are_a_bad_row(bpe):
    chat = {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    rows = [chat, chat | {"tools": ["search"]}]
    config = DPOConfig(on_bad_rows="skip", max_bad_fraction=1.0, dataset_cache_dir="none")
    data = load_preferences(rows, tokenizer=bpe(), inputs="pairs", config=config)
    assert (data.counts["rows"], data.counts["bad_rows"]) == (1, 1)
    assert "expected descriptions of tools as JSON objects" in " ".join(data.notes)


def test_text_of_a_parquet_file_that_is_not_utf8_is_a_bad_row(tmp_path, bpe):
    rows = [{"prompt": f"p{number}", "chosen": "aaaa", "rejected": f"bad{number}"} for number in range(3)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    assert b"bad1" in content
    path.write_bytes(content.replace(b"bad1", b"b\xffd1"))
    config = DPOConfig(on_bad_rows="skip", max_bad_fraction=1.0, dataset_cache_dir="none")
    data = load_preferences(path, tokenizer=bpe(), inputs="pairs", config=config)
    assert (data.counts["rows"], data.counts["bad_rows"]) == (2, 1)
    assert "row 2: a text is not UTF-8 (0xff)" in " ".join(data.notes)

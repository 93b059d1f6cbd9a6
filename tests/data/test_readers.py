from __future__ import annotations

import json

import pytest

from ds_align.data import available_splits
from ds_align.data.readers import BadRow, Record, open_records
from ds_align.data.rows import MAX_LINE_BYTES
from ds_align.errors import DataError

ROWS = [{"prompt": f"p{index}"} for index in range(10)]


def prompts(source, split=None):
    return [row.columns["prompt"] for row in open_records(source, split).rows()]


def test_a_jsonl_record_knows_its_line_and_blank_lines_are_not_rows(write_jsonl):
    path = write_jsonl([ROWS[0], "", "  ", ROWS[1]])
    rows = list(open_records(path).rows())
    assert rows == [Record(f"{path}:1", ROWS[0]), Record(f"{path}:4", ROWS[1])]
    assert open_records(path).num_rows == 2


def test_a_json_list_record_knows_the_line_that_it_starts_on(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n  {"prompt": "a"}, {"prompt":\n "b"},\n\n  {"prompt": "c"}\n]\n')
    origins = [row.origin for row in open_records(path).rows()]
    assert origins == [f"{path}:2", f"{path}:2", f"{path}:5"]
    assert prompts(path) == ["a", "b", "c"]


def test_json_splits_are_found_and_train_is_the_default(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": 1, "validation": ROWS[:2], "train": ROWS[2:]}, indent=1))
    assert available_splits(path) == ["validation", "train"]
    assert prompts(path) == [f"p{index}" for index in range(2, 10)]
    assert prompts(path, "validation") == ["p0", "p1"]
    line = path.read_text().splitlines()[
        int(next(open_records(path, "train").rows()).origin.split(":")[-1]) - 1
    ]
    assert line.strip() == "{"


def test_one_object_a_line_is_read_in_a_json_file_too(write_jsonl):
    row = {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}]}
    assert prompts(write_jsonl(ROWS, "many.json")) == [f"p{index}" for index in range(10)]
    assert prompts(write_jsonl([row], "one.json")) == ["a"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:90%]", range(9)),
        ("train[90%:]", range(9, 10)),
        ("train[2:4]", range(2, 4)),
        ("train[-3:]", range(7, 10)),
        ("train[:-25%]", range(8)),  # -25 % of 10 rows: (-250 + 50) // 100 = -2 rows from the end
        ("train[5:999]", range(5, 10)),
    ],
)
def test_split_slices(split, expected):
    assert prompts(ROWS, split) == [f"p{index}" for index in expected]


@pytest.mark.parametrize("percent", range(0, 101, 7))
@pytest.mark.parametrize("num_rows", [1, 3, 10, 101])
def test_a_percentage_parts_the_rows_without_loss_or_repetition(num_rows, percent):
    rows = [{"prompt": index} for index in range(num_rows)]
    taken = []
    for split in (f"train[:{percent}%]", f"train[{percent}%:]"):
        try:
            taken += prompts(rows, split)
        except DataError as error:
            assert "selects none" in str(error)
    assert taken == list(range(num_rows))


def test_malformed_json_names_file_line_and_column(write_jsonl):
    path = write_jsonl([ROWS[0], '{"prompt": "a" "b"}'])
    bad = list(open_records(path).rows())[1]
    assert isinstance(bad, BadRow)
    assert bad.origin == f"{path}:2:16"
    assert "Expecting ',' delimiter" in bad.reason


def test_malformed_json_in_a_list_names_file_line_and_column(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": }]')
    with pytest.raises(DataError, match=r"data\.json:2:13: malformed JSON"):
        open_records(path)


def test_invalid_utf8_names_the_byte_offset(tmp_path):
    first = b'{"prompt": "a"}\n'
    path = tmp_path / "data.jsonl"
    path.write_bytes(first + b'{"prompt": "\xff"}\n')
    bad = list(open_records(path).rows())[1]
    # The first line has 16 bytes, {"prompt": " has 12 before the bad one: offset 28.
    assert bad.origin == f"{path}:2"
    assert "byte offset 28 (0xff)" in bad.reason
    whole = path.with_suffix(".json")
    whole.write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(DataError, match="byte offset 13"):
        open_records(whole)


def test_a_byte_order_mark_is_not_part_of_the_first_record(tmp_path):
    for name, text in (("a.jsonl", '{"prompt": "a"}'), ("b.json", '[{"prompt": "a"}]')):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert prompts(path) == ["a"]


def test_an_overlong_line_is_a_bad_row_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}\n{"prompt": "b"}\n')
    first, second = open_records(path).rows()
    assert "at most 33554432 are read" in first.reason
    assert second.columns == {"prompt": "b"}


def test_control_characters_deep_nesting_and_long_numbers_are_bad_rows(write_jsonl):
    path = write_jsonl(
        ['{"prompt": "a\0b"}', "[" * 100_000, '{"prompt": ' + "9" * 5000 + "}", "[1]", ROWS[0]]
    )
    rows = list(open_records(path).rows())
    assert [type(row) for row in rows] == [BadRow] * 4 + [Record]
    assert "found list, expected an object" in rows[3].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.arrow", b"ARROW1", r"the ending '\.arrow' is not read; expected \.jsonl"),
        ("data.txt.gz", b"a", r"the ending '\.txt\.gz' is not read"),
        ("data.parquet.gz", b"a", r"the ending '\.parquet\.gz' is not read"),
        ("data.parquet", b"PAR1", "not a whole Parquet file"),
        ("data.csv", b"prompt,chosen", "is empty; expected at least one preference"),
        ("data.jsonl", b"", "the file is empty"),
        ("data.jsonl", b"\n \n", "is empty"),
        ("data.json", b"  \n", "the file is empty"),
        ("data.json", b"[]", "is empty"),
        ("data.json", b'"text"', r"data\.json:1:1: malformed JSON"),
        ("data.json", b'[{"a": 1}] x', r"data\.json:1:12: malformed JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_records(path)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file.*check the path"):
        open_records(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="not written by datasets' save_to_disk"):
        open_records(tmp_path)
    with pytest.raises(DataError, match="there is no split 'trian'; found train, the nearest is 'train'"):
        open_records(ROWS, "trian")
    with pytest.raises(DataError, match="expected a name with an optional slice"):
        open_records(ROWS, "train[a:b]")
    with pytest.raises(DataError, match="selects none"):
        open_records(ROWS, "train[4:4]")
    with pytest.raises(DataError, match="expected at least one preference"):
        open_records([])
    with pytest.raises(DataError, match="type int is not read"):
        open_records(3)


def test_datasets_objects_and_directories_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict({"train": train, "test": train.select(range(2))})
    train.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "two")
    assert prompts(train) == prompts(tmp_path / "one") == [row["prompt"] for row in ROWS]
    assert prompts(both, "test") == prompts(tmp_path / "two", "test") == ["p0", "p1"]
    assert available_splits(both) == ["train", "test"]
    assert next(open_records(train).rows()).origin == "dataset: record 1"


def test_without_a_train_split_the_likely_one_is_named_with_its_flag(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(
        json.dumps({name: [{"prompt": "p"}] for name in ("test_prefs", "train_prefs")}), encoding="utf-8"
    )
    with pytest.raises(DataError, match="--dataset_split train_prefs"):
        open_records(path)

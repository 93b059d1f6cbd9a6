"""Directories of data files: which files are which split, and what does not belong together."""

from __future__ import annotations

import json

import pytest

from ds_align.data import available_splits
from ds_align.data.readers import open_records
from ds_align.errors import DataError
from tests.data import formats


def fill(directory, *names: str):
    """Each file holds two rows that say its name."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{name} {index}", "chosen": "a"} for index in range(2)]
        form = "a" + name[name.index(".") :]
        path.write_bytes(formats.FORMATS[form](rows))
    return directory


def files(source, split=None) -> list[str]:
    """Names of the files in the order of the rows."""
    found = [row.columns["prompt"] for row in open_records(source, split).rows()]
    assert [text[-1] for text in found] == ["0", "1"] * (len(found) // 2)
    return [text[:-2] for text in found[::2]]


def test_files_without_a_split_are_train_in_the_order_of_their_names(tmp_path):
    fill(tmp_path, "b.jsonl", "a.jsonl", "c.jsonl")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "_SUCCESS").write_text("")
    assert available_splits(tmp_path) == ["train"]
    assert files(tmp_path) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    first = next(open_records(tmp_path, "train[2:]").rows())
    assert first.origin == f"{tmp_path}/b.jsonl:1"


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl.zst", ".json", ".json.gz"])
def test_names_say_the_split(tmp_path, ending):
    names = ["train-00000-of-00002", "train-00001-of-00002", "val_1", "val_2", "test"]
    fill(tmp_path, *(f"{name}{ending}" for name in names))
    assert available_splits(tmp_path) == ["train", "validation", "test"]
    assert files(tmp_path) == [f"train-0000{index}-of-00002{ending}" for index in range(2)]
    assert files(tmp_path, "validation") == [f"val_{index}{ending}" for index in (1, 2)]
    # Rows 1 and 2 of 4: the second of the first file, the first of the second.
    sliced = [row.columns["prompt"] for row in open_records(tmp_path, "train[1:3]").rows()]
    assert sliced == [f"{names[0]}{ending} 1", f"{names[1]}{ending} 0"]


def test_shards_of_any_split_and_the_folder_data(tmp_path):
    fill(tmp_path / "data", "train_prefs-00000-of-00001.parquet", "test_prefs-00000-of-00001-0a1b.parquet")
    assert available_splits(tmp_path) == ["test_prefs", "train_prefs"]
    assert files(tmp_path, "train_prefs") == ["train_prefs-00000-of-00001.parquet"]
    with pytest.raises(DataError, match="has the splits test_prefs, train_prefs and no train; name the one"):
        open_records(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jsonl", "a.parquet"), r"several formats \(\.jsonl, \.parquet\)"),
        (("train.jsonl", "more.jsonl"), r"more\.jsonl names no split and other files do \(train\)"),
        (("train-00000-of-00003.csv", "train-00002-of-00003.csv"), "train-00001-of-00003 is missing"),
    ],
)
def test_what_does_not_belong_together(tmp_path, names, message):
    fill(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        open_records(tmp_path)
    with pytest.raises(DataError, match=message):
        available_splits(tmp_path)


def test_other_files_and_other_columns_are_refused(tmp_path):
    fill(tmp_path, "a.csv", "b.csv")
    (tmp_path / "b.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(DataError, match=r"b\.csv has other columns than a\.csv \(chosen, completion\)"):
        open_records(tmp_path)
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(DataError, match=r"model\.bin is no data file"):
        open_records(tmp_path)


def test_a_file_of_splits_inside_of_a_directory_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"a": 1}], "test": [{"a": 1}]}))
    with pytest.raises(DataError, match=r"a\.json: holds the splits train, test; expected one list"):
        open_records(tmp_path)


def test_a_changed_file_of_a_directory_is_another_entry_of_the_cache(settings, tmp_path):
    from ds_align.data import load_preferences

    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    names = [formats.write(tmp_path / "set", name, rows) for name in ("a.jsonl",)]

    def load():
        return load_preferences(tmp_path / "set", tokenizer=None, inputs="pairs", config=settings())

    first, again = load(), load()
    assert (first.num_processes, again.num_processes) == (1, 0)
    names[0].write_bytes(formats.as_jsonl(rows * 2))
    assert len(load()) == 2

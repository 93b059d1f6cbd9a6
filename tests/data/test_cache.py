"""The cache of tokens: what is found again, and what never is."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ds_align import DPOConfig
from ds_align.data import available_splits, load_preferences
from ds_align.errors import DataError
from tests.data import messy
from tests.data.messy import is_hit

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{{ eos_token }}{% endfor %}"


def test_a_second_start_maps_what_the_first_wrote(load):
    first, second = load(), load()
    assert (is_hit(first), is_hit(second)) == (False, True)
    assert first.directory == second.directory
    assert messy.facts(first) == messy.facts(second)
    for dataset in (first, second):
        values = dataset[3].chosen_ids
        assert not values.flags.owndata and not values.flags.writeable
        while isinstance(values, np.ndarray):
            values = values.base
        assert type(values).__module__.startswith("pyarrow")


def test_nothing_that_can_change_a_token_is_missed(load, bpe, metaspace):
    assert not is_hit(load())
    changes = {
        "max_length": 8,
        "max_prompt_length": 3,
        "max_completion_length": 2,
        "truncation_side": "right",
        "on_bad_rows": "skip",
        "chat_template": TEMPLATE,
        "inputs": "unpaired",
        "split": "train[:50%]",
    }
    for name, value in changes.items():
        assert not is_hit(load(**{name: value})), name
        assert is_hit(load(**{name: value})), name
    assert not is_hit(load(on_bad_rows="skip", max_bad_fraction=0.5))
    for column in ("completion", "label"):
        assert not is_hit(load(**{f"dataset_{column}_field": "other"})), column
    tokenizers = {
        "template": bpe(TEMPLATE),
        "special token": bpe(bos_token="<|im_start|>"),
        "eos": bpe(eos_token="<|endoftext|>"),
        "another": metaspace,
    }
    longer = bpe()
    longer.add_tokens(["barked"])
    tokenizers["added token"] = longer
    for name, tokenizer in tokenizers.items():
        assert not is_hit(load(tokenizer=tokenizer)), name
        assert is_hit(load(tokenizer=tokenizer)), name
    assert is_hit(load())


def test_renamed_columns_are_another_entry(settings, write_jsonl):
    for column in ("prompt", "chosen", "rejected"):
        rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
        path = write_jsonl(rows)
        config = settings(**{f"dataset_{column}_field": "other"})
        assert not is_hit(load_preferences(path, tokenizer=None, inputs="pairs", config=config)), column


def test_changed_content_is_never_taken_for_the_old(load):
    before = load()
    content = load.path.read_bytes()
    load.path.write_bytes(content.replace(b"cat 7", b"dog 7"))
    assert load.path.stat().st_size == len(content)
    after = load()
    assert not is_hit(after)
    assert after[7].prompt_ids.tolist() != before[7].prompt_ids.tolist()
    assert after[8].prompt_ids.tolist() == before[8].prompt_ids.tolist()
    load.path.write_bytes(content)
    assert is_hit(load())


def test_what_changes_no_token_changes_no_entry(load, bpe, tmp_path):
    first = load()
    os.utime(load.path, (1e9, 1e9))
    assert is_hit(load())
    assert is_hit(load(dataset_num_proc=2))
    tokenizer = bpe()
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert is_hit(load(tokenizer=tokenizer))
    moved = shutil.copy(load.path, tmp_path / "elsewhere.jsonl")
    again = load(path=moved)
    assert is_hit(again) and again.name == str(moved) and again.digest() == first.digest()
    # Settings of the training have no part in it, nor the class of the config.
    cache = {"dataset_cache_dir": str(first.directory.parents[1])}
    for changes in ({}, {"learning_rate": 1e-6}, {"per_device_train_batch_size": 3}, {"seed": 7}):
        config = DPOConfig(**cache, **changes)
        assert is_hit(load_preferences(load.path, tokenizer=bpe(), inputs="pairs", config=config)), changes


def test_messages_name_the_path_that_was_given(settings, write_jsonl, monkeypatch, bpe):
    path = write_jsonl([*(messy.row(number) for number in range(30)), "{"])
    monkeypatch.chdir(path.parent)
    config = settings(on_bad_rows="skip", max_bad_fraction=0.5)
    for given, shown in ((path, str(path)), ("./data.jsonl", "data.jsonl"), ("data.jsonl", "data.jsonl")):
        found = load_preferences(given, tokenizer=bpe(), inputs="pairs", config=config)
        assert f"1 of 31 rows were left out: {shown}:31:2: malformed JSON" in found.notes[0]
    assert is_hit(found)


def test_directories_are_known_by_the_content_of_their_files(settings, tmp_path):
    import datasets

    def save(name: str, answers: dict[str, int]) -> Path:
        parts = {
            split: datasets.Dataset.from_list(
                [{"prompt_ids": [1], "chosen_ids": [answer], "rejected_ids": [3]}]
            )
            for split, answer in answers.items()
        }
        datasets.DatasetDict(parts).save_to_disk(tmp_path / name)
        return tmp_path / name

    def load(path: Path, split: str):
        return load_preferences(path, tokenizer=None, inputs="pairs", config=settings(), split=split)

    one = save("one", {"train": 5, "test": 6})
    assert not is_hit(load(one, "train")) and not is_hit(load(one, "test")) and is_hit(load(one, "train"))
    assert load(one, "test")[0].chosen_ids.tolist() == [6]
    swapped = save("swapped", {"train": 6, "test": 5})
    found = load(swapped, "train")
    assert not is_hit(found) and found[0].chosen_ids.tolist() == [6]


def test_nothing_is_written_where_nothing_is_wanted(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ALIGN_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]))
    for source, setting in ((path, "none"), (path, None), (rows, "auto")):
        config = settings(dataset_cache_dir=setting)
        found = load_preferences(source, tokenizer=None, inputs="pairs", config=config)
        assert found.directory is None and not (tmp_path / "cache").exists()
    found = load_preferences(path, tokenizer=None, inputs="pairs", config=settings(dataset_cache_dir="auto"))
    assert found.directory.is_relative_to(tmp_path / "cache" / "tokens")


def test_the_splits_of_a_json_file_are_those_of_its_content(settings, tmp_path):
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    path = tmp_path / "data.json"
    for names in (["train", "test"], ["test", "train"], ["train"]):
        path.write_text(json.dumps(dict.fromkeys(names, rows)))
        for _ in range(2):
            assert available_splits(path, settings()) == available_splits(path) == names
    with pytest.raises(DataError, match="no such file"):
        available_splits(tmp_path / "other.json", settings())
    path.write_text("[")
    with pytest.raises(DataError, match="malformed JSON"):
        available_splits(path, settings())


def test_a_tokenizer_in_python_is_known_by_its_vocabulary_settings_and_code(load, tmp_path, monkeypatch):
    from transformers import ByT5Tokenizer

    assert not ByT5Tokenizer().is_fast
    for tokenizer in (ByT5Tokenizer(), ByT5Tokenizer(extra_ids=99)):
        assert [is_hit(load(tokenizer=tokenizer)) for _ in range(2)] == [False, True]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        code = f"from transformers import ByT5Tokenizer\nclass Own(ByT5Tokenizer):\n    name = {name!r}\n"
        (tmp_path / name / "own_tokenizer.py").write_text(code)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / name)
            tokenizer = importlib.import_module("own_tokenizer").Own()
            assert [is_hit(load(tokenizer=tokenizer)) for _ in range(2)] == [False, True], name
        sys.modules.pop("own_tokenizer")


def test_a_template_that_asks_for_the_day_is_new_each_day(load, monkeypatch):
    clock = "{{ strftime_now('%d') }}" + TEMPLATE
    # These two zones are 26 hours apart, so they never have the same date.
    expected = [("AAA+12", False, False), ("BBB-14", True, False), ("AAA+12", True, True)]
    found = []
    for zone, *_ in expected:
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        found.append((zone, is_hit(load(chat_template=TEMPLATE)), is_hit(load(chat_template=clock))))
    monkeypatch.delenv("TZ")
    time.tzset()
    assert found == expected

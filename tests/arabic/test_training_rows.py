"""A run trains on the rows that balance_dataset would take, and on no others."""

from __future__ import annotations

import json

import pytest

from ds_align import ArabicDialectDatasetProcessor, DataError, DPOConfig, KTOConfig
from ds_align.arabic.scorer import label_text
from ds_align.config.cli import parse_command_line
from ds_align.data.readers import open_records
from ds_align.data.subset import pick_rows
from ds_align.errors import ConfigError
from ds_align.splits import load_splits

SHARES = {"egy": 0.5, "msa": 0.5}
TEXTS = {"egy": "ازيك دلوقتي", "msa": "الكتاب الذي سوف نقرأ", "lev": "شو بدك هلق"}


def rows_of(number: int = 30) -> list[dict]:
    """Token ids that tell a row's number, with a dialect in turn: 3 msa, 1 egy, 1 lev of five."""
    turn = ("msa", "egy", "msa", "lev", "msa")
    return [
        {
            "prompt_ids": [1, index + 10],
            "chosen_ids": [2, index + 10],
            "rejected_ids": [3, index + 10],
            "dialect": turn[index % 5],
            "said": TEXTS[turn[index % 5]],
        }
        for index in range(number)
    ]


def trained(data) -> list[int]:
    return [int(row.prompt_ids[1]) - 10 for row in data]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_for(tmp_path, **changes) -> DPOConfig:
    return DPOConfig(
        **{"dataset_cache_dir": str(tmp_path / "tokens"), "dialect_distribution": SHARES, **changes}
    )


def taken_by_hand(rows, shares=SHARES, **given) -> list[int]:
    found = ArabicDialectDatasetProcessor().balance_dataset(rows, shares, seed=42, **given)
    return [ids[1] - 10 for ids in found["prompt_ids"]]


def test_a_run_takes_the_rows_of_balance_dataset(tmp_path) -> None:
    rows = rows_of()
    path = write(tmp_path / "rows.jsonl", rows)
    expected = taken_by_hand(rows)
    # 6 egy; of 13 rows each has 6.5 and msa comes first.
    assert len(expected) == 13 and sum(rows[number]["dialect"] == "egy" for number in expected) == 6
    for source in (path, rows):
        splits = load_splits(config_for(tmp_path), None, source, rows[:4])
        assert trained(splits.train) == expected
        assert trained(splits.evaluation) == [0, 1, 2, 3]
        assert splits.train.finding["quotas"] == {"msa": 7, "egy": 6}
        assert splits.train.counts["dialect_msa_found"] == 18
        assert splits.train.counts["dialect_lev_found"] == 6
        assert splits.train.counts["dialect_egy_taken"] == 6
        assert any("13 of 30 rows by dialect" in message for message in splits.messages)
    assert trained(load_splits(config_for(tmp_path, dialect_distribution=None), None, path).train) == [
        *range(30)
    ]


def test_a_balanced_data_set_can_be_given_to_a_run() -> None:
    """In the way of `trainer.train(processor.balance_dataset(...))`."""
    balanced = ArabicDialectDatasetProcessor().balance_dataset(rows_of(), SHARES, seed=42)
    assert trained(load_splits(DPOConfig(), None, balanced).train) == taken_by_hand(rows_of())


def test_rows_without_a_label_are_judged_by_their_text(tmp_path) -> None:
    rows = [{name: value for name, value in row.items() if name != "dialect"} for row in rows_of()]
    assert {label_text(text).name for text in TEXTS.values()} == set(TEXTS)
    config = config_for(tmp_path, dialect_text_field="said")
    data = load_splits(config, None, write(tmp_path / "rows.jsonl", rows)).train
    assert trained(data) == taken_by_hand(rows, text_field="said") == taken_by_hand(rows_of())
    assert data.finding["sources"]["egy"] == {"lexicon": 6}
    with pytest.raises(DataError, match="rows.jsonl:1: no text to tell the dialect from"):
        load_splits(config_for(tmp_path), None, tmp_path / "rows.jsonl")


def test_the_columns_of_the_run_are_read(tmp_path) -> None:
    rows = [{"question": TEXTS["egy"], "chosen_ids": [5], "rejected_ids": [6], "prompt_ids": [1, 10]}] * 3
    config = config_for(tmp_path, dataset_prompt_field="question", dialect_distribution={"egy": 1})
    assert len(load_splits(config, None, rows).train) == 3


def test_the_cache_keeps_the_choice_and_its_report(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of())

    def load(**changes):
        return load_splits(config_for(tmp_path, **changes), None, path).train

    first, again = load(), load()
    assert first.num_processes == 1 and again.num_processes == 0
    assert (again.notes, again.finding, again.counts) == (first.notes, first.finding, first.counts)
    assert trained(again) == trained(first)
    others = [
        {"seed": 1},
        {"dialect_distribution": {"egy": 0.25, "msa": 0.75}},
        {"dialect_distribution": None},
        {"dialect_label_map": {"lev": "egy"}},
        {"dialect_text_field": "said"},
    ]
    for changes in others:
        assert load(**changes).directory != first.directory, changes
        assert load(**changes).num_processes == 0
    # The same shares in other words.
    assert load(dialect_distribution="msa=0.50, egy=5e-1").directory == first.directory


def test_other_weights_of_a_classifier_are_another_choice(tmp_path) -> None:
    from ds_align.arabic import DialectSubset

    (tmp_path / "model.bin").write_bytes(b"one")
    config = config_for(tmp_path, dialect_classifier=str(tmp_path / "model.bin"))
    first = DialectSubset.from_config(config).key
    assert DialectSubset.from_config(config).key == first
    (tmp_path / "model.bin").write_bytes(b"two")
    assert DialectSubset.from_config(config).key != first
    with pytest.raises(ConfigError, match="missing.bin.*nothing is there"):
        DialectSubset.from_config(config_for(tmp_path, dialect_classifier=str(tmp_path / "missing.bin")))


def test_rows_that_cannot_train_take_no_place(tmp_path) -> None:
    rows = rows_of()
    rows[1] |= {"rejected_ids": rows[1]["chosen_ids"]}  # egy: equal answers
    rows[6] = {"dialect": "egy", "chosen_ids": [1]}  # egy: no prompt
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="1 of 30 rows cannot be used.*rows.jsonl:7"):
        load_splits(config_for(tmp_path), None, path)
    data = load_splits(config_for(tmp_path, on_bad_rows="skip", max_bad_fraction=0.5), None, path).train
    # 4 egy are left; of 9 each has 4.5 and msa comes first.
    assert data.finding["quotas"] == {"msa": 5, "egy": 4}
    assert len(data) == 9 and not {1, 6} & set(trained(data))
    assert data.counts["rows_read"] == 30
    assert (data.counts["bad_rows"], data.counts["dropped_equal_pairs"]) == (1, 1)


def test_unpaired_rows_and_what_is_held_out(tmp_path) -> None:
    config = KTOConfig(dialect_distribution=SHARES, dataset_cache_dir=None)
    assert trained(load_splits(config, None, rows_of()).train) == [
        number for number in taken_by_hand(rows_of()) for _ in range(2)
    ]
    splits = load_splits(config_for(tmp_path, eval_fraction=0.25), None, rows_of())
    assert sorted(trained(splits.train) + trained(splits.evaluation)) == taken_by_hand(rows_of())
    assert any("held out of the rows that dialect_distribution chose" in text for text in splits.messages)


def test_flags_and_yaml_say_the_same(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("dialect_distribution: {egy: 0.4, msa: 0.6}\ndialect_column: region\n")
    by_file = parse_command_line(["--method", "dpo", "--config", str(tmp_path / "run.yaml")])
    by_flags = parse_command_line(
        ["--method=dpo", "--dialect_distribution", "egy=0.4, msa=0.6", "--dialect_column", "region"]
    )
    by_json = parse_command_line(
        ["--method=dpo", "--dialect_distribution", '{"egy": 0.4, "msa": 0.6}', "--dialect_column=region"]
    )
    assert by_file == by_flags == by_json
    assert by_file.dialect_distribution == {"egy": 0.4, "msa": 0.6}
    by_file.to_yaml(tmp_path / "again.yaml")
    assert DPOConfig.from_yaml(tmp_path / "again.yaml") == by_file
    with pytest.raises(ConfigError, match="--dialect_distribution: .*the shares sum to 1.2"):
        parse_command_line(["--method", "dpo", "--dialect_distribution", "egy=0.6,msa=0.6"])
    with pytest.raises(ConfigError, match="expected shares of dialects, as a mapping or as text"):
        parse_command_line(["--method", "dpo", "--dialect_distribution", "egy=0.6,egy=0.4"])


@pytest.mark.parametrize("form", ["jsonl", "list"])
def test_picked_rows_are_the_rows_with_these_numbers(form: str, tmp_path) -> None:
    import pickle

    import numpy as np

    rows = [{"number": number} for number in range(200)]
    source = rows if form == "list" else write(tmp_path / "rows.jsonl", rows)
    records = open_records(source)
    numbers = np.array([0, 1, 5, 21, 22, 60, 198, 199])
    picked = pick_rows(records, numbers)
    assert picked.num_rows == 8
    assert [row.columns["number"] for row in picked.rows()] == numbers.tolist()
    every = [row.origin for row in records.rows()]
    assert [row.origin for row in picked.rows()] == [every[number] for number in numbers]
    part = pickle.loads(pickle.dumps(picked.part(2, 7)))
    assert len(part) == 5
    assert [row.columns["number"] for row in part] == numbers[2:7].tolist()
    assert [row.columns["number"] for row in part.part(1, 3)] == [21, 22]
    assert len(pick_rows(records, numbers[:0]).part(0, 5)) == 0

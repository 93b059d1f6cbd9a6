"""Where evaluation rows come from, and that held-out prompts are held out whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ds_align import distributed
from ds_align.config import DPOConfig, KTOConfig
from ds_align.errors import ConfigError, DataError
from ds_align.splits import load_splits


def records(num_prompts: int, pairs_each: int = 3, first: int = 0) -> list[dict]:
    """Token-id rows; the prompts alternate, so that those of one prompt are not neighbours."""
    return [
        {
            "prompt_ids": [1, prompt + 10],
            "chosen_ids": [2, number + 1],
            "rejected_ids": [3, number + 1, 4],
        }
        for number in range(pairs_each)
        for prompt in range(first, first + num_prompts)
    ]


def contents(data) -> list[tuple]:
    return [(*row.prompt_ids.tolist(), -1, *row.chosen_ids.tolist()) for row in data]


def prompts(data) -> set[tuple]:
    return {tuple(row.prompt_ids.tolist()) for row in data}


@pytest.mark.parametrize(("fraction", "num_held"), [(0.25, 5), (0.01, 1), (0.5, 10), (0.94, 19)])
def test_whole_prompts_are_held_out_and_nothing_is_lost(fraction: float, num_held: int) -> None:
    rows = records(20)
    splits = load_splits(DPOConfig(eval_fraction=fraction), None, rows)
    assert splits.eval_set == "held_out"
    assert len(prompts(splits.evaluation)) == num_held
    assert not prompts(splits.train) & prompts(splits.evaluation)
    whole = load_splits(DPOConfig(), None, rows)
    assert (whole.evaluation, whole.eval_set) == (None, None)
    assert sorted(contents(splits.train) + contents(splits.evaluation)) == sorted(contents(whole.train))
    assert len(splits.evaluation) == 3 * num_held
    # Both sides keep the order of the file.
    order = {row: number for number, row in enumerate(contents(whole.train))}
    for data in (splits.train, splits.evaluation):
        places = [order[row] for row in contents(data)]
        assert places == sorted(places)


def test_what_is_held_out_depends_on_the_seed_alone() -> None:
    rows = records(40)

    def held(seed: int) -> list[tuple]:
        return contents(load_splits(DPOConfig(eval_fraction=0.2, seed=seed), None, rows).evaluation)

    assert held(1) == held(1)
    assert held(1) != held(2)


def test_unpaired_rows_of_a_prompt_stay_together() -> None:
    splits = load_splits(KTOConfig(eval_fraction=0.3), None, records(10))
    assert not prompts(splits.train) & prompts(splits.evaluation)
    assert len(splits.train) + len(splits.evaluation) == 60


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(DataError, match="eval_fraction=0.9 of 2 distinct prompts leaves no training data"):
        load_splits(DPOConfig(eval_fraction=0.9), None, records(2))
    with pytest.raises(DataError, match="of 1 distinct prompts"):
        load_splits(DPOConfig(eval_fraction=0.1), None, records(1))


def test_the_argument_goes_before_the_path(tmp_path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(3, first=50)), encoding="utf-8")
    config = DPOConfig(eval_dataset_path=path)
    by_path = load_splits(config, None, records(5))
    assert by_path.eval_set == "given" and len(by_path.evaluation) == 9
    by_argument = load_splits(config, None, records(5), records(2, first=60))
    assert by_argument.eval_set == "given" and len(by_argument.evaluation) == 6
    assert len(by_path.train) == len(by_argument.train) == 15


def test_a_split_of_the_source_goes_before_holding_out() -> None:
    import datasets

    source = datasets.DatasetDict(
        test=datasets.Dataset.from_list(records(2, first=50)),
        train=datasets.Dataset.from_list(records(6)),
    )
    splits = load_splits(DPOConfig(eval_fraction=0.5), None, source)
    assert splits.eval_set == "split"
    assert (len(splits.train), len(splits.evaluation)) == (18, 6)
    assert prompts(splits.evaluation) == {(1, 60), (1, 61)}


def test_no_training_data_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="dataset_path is missing"):
        load_splits(DPOConfig(), None)


def test_every_rank_needs_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = records(3, pairs_each=1)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert len(load_splits(DPOConfig(), None, rows).train) == 3
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(DataError, match="3 usable rows for 4 ranks"):
        load_splits(DPOConfig(), None, rows)
    # What is left after holding out counts, not what the file had.
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(DataError, match="2 usable rows for 3 ranks"):
        load_splits(DPOConfig(eval_fraction=0.3), None, rows)


def test_selected_rows_have_the_lengths_of_their_tokens() -> None:
    splits = load_splits(DPOConfig(eval_fraction=0.25), None, records(20))
    for data in (splits.train, splits.evaluation):
        lengths = [(len(row.chosen_ids), len(row.rejected_ids)) for row in data]
        assert np.array_equal(data.completion_lengths, lengths)


def test_what_became_of_the_rows_is_said_first_with_the_method() -> None:
    rows = [*records(4), {"prompt_ids": [9], "chosen_ids": [1], "rejected_ids": [1]}]
    columns = "(prompt_ids, chosen_ids, rejected_ids)"
    splits = load_splits(KTOConfig(), None, rows, records(2))
    became = "24 labelled answers, 1 with equal answers left out"
    assert splits.messages[:2] == (
        f"kto: records (train): 13 pairs of token ids {columns} -> {became}",
        f"kto: records: 6 pairs of token ids {columns} -> 12 labelled answers",
    )
    # Rows that are held out come from the same data, which are described once.
    held = load_splits(DPOConfig(eval_fraction=0.5), None, rows)
    assert [message for message in held.messages if columns in message] == [
        f"dpo: records (train): 13 pairs of token ids {columns} -> 12 pairs, 1 with equal answers left out"
    ]


def write_splits(path) -> str:
    """train: prompts 0 to 9, validation: 50, 51, test: 60; three rows each."""
    parts = {"train": records(10), "validation": records(2, first=50), "test": records(1, first=60)}
    path.write_text(json.dumps(parts), encoding="utf-8")
    return str(path)


def test_the_splits_that_settings_name(tmp_path) -> None:
    source = write_splits(tmp_path / "data.json")

    def sizes(**settings: object) -> tuple:
        splits = load_splits(DPOConfig(dataset_path=source, **settings), None)
        return len(splits.train), splits.evaluation and len(splits.evaluation), splits.eval_set

    assert sizes() == (30, 6, "split")
    assert sizes(dataset_split="train[:90%]") == (27, 6, "split")
    assert sizes(dataset_split="train[:90%]", eval_dataset_split="train[90%:]") == (27, 3, "split")
    assert sizes(dataset_splits=["train[:4]", "test"]) == (4, 3, "split")
    assert sizes(dataset_splits=["test"]) == (3, 6, "split")
    # What trains is not what evaluates.
    assert sizes(dataset_split="validation") == (6, 3, "split")
    assert sizes(dataset_split="train[:5]", eval_dataset_path=source, eval_dataset_split="test") == (
        5,
        3,
        "given",
    )
    with pytest.raises(DataError, match="there is no split 'tets'"):
        sizes(eval_dataset_split="tets")


def test_a_data_set_with_a_test_split_alone_is_not_evaluated_on_itself(tmp_path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"test": records(3)}), encoding="utf-8")
    splits = load_splits(DPOConfig(dataset_path=path), None)
    assert (len(splits.train), splits.evaluation) == (9, None)


def test_a_mixture_trains_and_an_argument_goes_before_it(tmp_path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        lines = (json.dumps(row) for row in records(4, first=10 * number))
        path.write_text("\n".join(lines), encoding="utf-8")
    config = DPOConfig(mixture=[{"path": str(path)} for path in paths], eval_fraction=0.25)
    splits = load_splits(config, None)
    assert (len(splits.train), len(splits.evaluation), splits.eval_set) == (18, 6, "held_out")
    assert sorted({*splits.train.sources, *splits.evaluation.sources}) == [0, 1]
    assert sum("mixture part" in message for message in splits.messages) == 2
    assert len(load_splits(config, None, records(2)).train) < 6
    with pytest.raises(ConfigError, match="dataset_config_name without effect: the data was given itself"):
        load_splits(DPOConfig(dataset_config_name="en"), None, records(2))


def test_a_mixture_is_not_balanced_by_dialect(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in records(4)), encoding="utf-8")
    config = DPOConfig(mixture=[{"path": str(path)}], dialect_distribution={"egy": 1.0})
    with pytest.raises(ConfigError, match="cannot be had with a mixture"):
        load_splits(config, None)


def test_repeats_within_a_part_of_a_mixture_are_left_out(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in records(4) * 2), encoding="utf-8")
    mixture = [{"path": str(path)}]
    assert len(load_splits(DPOConfig(mixture=mixture), None).train) == 24
    assert len(load_splits(DPOConfig(mixture=mixture, deduplicate="exact"), None).train) == 12

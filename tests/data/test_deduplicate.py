"""The setting deduplicate: what is left out of the training data, what is said of it, and what is kept."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest

from ds_align.config import DPOConfig, KTOConfig
from ds_align.data.deduplicate import without_duplicates
from ds_align.data.ranked import PairRules
from ds_align.data.readers import RecordSet, open_records
from ds_align.data.rows import ListRows
from ds_align.data.schemas import Columns
from ds_align.data.subset import pick_rows
from ds_align.splits import load_splits

FRESH = [
    {
        "prompt": f"Tell me about subject number {number} please.",
        "chosen": f"Well, {word} is a fine thing to know about, and {number} reasons say so.",
        "rejected": f"No idea what {word} could be.",
    }
    for number, word in enumerate(("rivers", "mountains", "poetry", "bridges", "owls", "bread"))
]
NEAR = FRESH[1] | {"chosen": FRESH[1]["chosen"].replace("fine", "fine,").upper()}
TURNED = FRESH[2] | {"chosen": FRESH[2]["rejected"], "rejected": FRESH[2]["chosen"]}
ROWS = [*FRESH[:3], FRESH[0], NEAR, TURNED, *FRESH[3:], FRESH[0]]
KEPT = {
    "none": ROWS,
    "exact": [*FRESH[:3], NEAR, TURNED, *FRESH[3:]],
    "near": [*FRESH[:3], TURNED, *FRESH[3:]],
}


def contents(data) -> list[tuple]:
    return [(*row.prompt_ids, -1, *row.chosen_ids, -1, *row.rejected_ids) for row in data]


@pytest.fixture
def config(tmp_path: Path):
    def build(deduplicate: str, **changes) -> DPOConfig:
        given = {"dataset_cache_dir": str(tmp_path / "cache"), "deduplicate": deduplicate, **changes}
        return DPOConfig(**given)

    return build


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
@pytest.mark.parametrize("source", ["jsonl", "json", "list", "dataset"])
def test_the_rows_that_stay_are_those_of_a_source_without_the_others(
    deduplicate: str, source: str, config, bpe, write_jsonl, tmp_path: Path
) -> None:
    if source == "json":
        given = tmp_path / "rows.json"
        given.write_text(json.dumps(ROWS))
    else:
        given = {
            "jsonl": write_jsonl(ROWS), "list": ROWS, "dataset": datasets.Dataset.from_list(ROWS)
        }[source]  # fmt: skip
    train = load_splits(config(deduplicate), bpe(), given).train
    wanted = load_splits(config("none"), bpe(), KEPT[deduplicate]).train
    assert contents(train) == contents(wanted)
    assert train.counts["rows"] == len(train) == len(KEPT[deduplicate])
    assert train.counts["rows_read"] == len(ROWS)
    if deduplicate == "none":
        assert not any("repeat" in note for note in train.notes)
        assert train.counts["duplicate_rows"] == 2
    else:
        num_near = int(deduplicate == "near")
        assert train.counts["duplicates_removed"] == 2
        assert train.counts["near_duplicates_removed"] == num_near
        assert train.counts["contradictory_rows_found"] == 2
        assert (
            f"{2 + num_near} of 10 rows repeat an earlier one and were left out (2 equal, " in train.notes[0]
        )
        assert "2 rows say the opposite of another one and stay, such as " in train.notes[1]


def test_the_cache_keeps_what_was_said_and_tells_the_settings_apart(config, bpe, write_jsonl) -> None:
    path = write_jsonl(ROWS)
    loads = {name: load_splits(config(name), bpe(), path).train for name in ("none", "exact", "near")}
    assert len({data.directory for data in loads.values()}) == 3
    for name, first in loads.items():
        again = load_splits(config(name), bpe(), path).train
        assert again.num_processes == 0
        assert (again.counts, again.notes, contents(again)) == (first.counts, first.notes, contents(first))
    assert f"such as {path}:3 and {path}:6;" in loads["near"].notes[1]


def test_evaluation_data_are_left_as_they_are(config, bpe) -> None:
    splits = load_splits(config("near"), bpe(), ROWS, ROWS)
    assert (len(splits.train), len(splits.evaluation)) == (7, 10)


def test_rows_are_held_out_of_what_is_left(config, bpe) -> None:
    splits = load_splits(config("near", eval_fraction=0.4), bpe(), ROWS)
    assert len(splits.train) + len(splits.evaluation) == 7
    held, kept = (
        set(map(tuple, (row.prompt_ids for row in part))) for part in (splits.evaluation, splits.train)
    )
    assert not held & kept


def test_unpaired_methods_lose_both_rows_of_a_repeated_pair(bpe) -> None:
    train = load_splits(KTOConfig(deduplicate="exact"), bpe(), ROWS).train
    assert len(train) == 2 * 8
    singles = [
        {"prompt": "p q", "completion": text, "label": label} for text in ("a", "b") for label in (1, 1, 0)
    ]
    train = load_splits(KTOConfig(deduplicate="exact"), bpe(), singles).train
    assert (len(train), train.counts["contradictory_rows_found"]) == (4, 6)


def test_bad_rows_and_equal_pairs_are_counted_as_ever(config, bpe, write_jsonl) -> None:
    equal = FRESH[4] | {"rejected": FRESH[4]["chosen"]}
    path = write_jsonl(["{", *ROWS, {"prompt": "no answer"}, equal, equal, FRESH[5]])
    settings = {"on_bad_rows": "skip", "max_bad_fraction": 0.5}
    train = load_splits(config("exact", **settings), bpe(), path).train
    plain = load_splits(config("none", **settings), bpe(), path).train
    for name in ("rows_read", "bad_rows", "dropped_equal_pairs"):
        assert train.counts[name] == plain.counts[name] > 0
    assert train.counts["duplicates_removed"] == 3
    assert len(train) == len(plain) - 3


def test_several_processes_leave_out_the_same_rows(config, bpe, write_jsonl) -> None:
    rows = [row | {"prompt": f"{row['prompt']} {number}"} for number in range(400) for row in ROWS]
    path = write_jsonl(rows)
    one, two = (
        load_splits(config("exact", dataset_num_proc=number, dataset_cache_dir="none"), bpe(), path).train
        for number in (1, 2)
    )
    assert two.num_processes == 2
    assert len(one) == 400 * 8
    assert one.digest() == two.digest()


def test_parts_of_chosen_rows_are_those_of_a_list() -> None:
    rows = [{"number": number} for number in range(9)]
    chosen = np.array([1, 0, 0, 1, 1, 0, 1, 0, 1], dtype=bool)
    wanted = [record for record, keep in zip(ListRows(rows, "x"), chosen, strict=True) if keep]
    some = pick_rows(RecordSet("x", 9, ListRows(rows, "x").part), np.flatnonzero(chosen))
    assert (some.num_rows, list(some.rows())) == (5, wanted)
    for start, stop in product(range(7), repeat=2):
        part = some.part(start, stop)
        assert (len(part), list(part)) == (len(wanted[start:stop]), wanted[start:stop])
        assert list(part.part(1, 3)) == wanted[start:stop][1:3]


def test_records_are_read_in_parts_of_any_size() -> None:
    records = open_records(ROWS)
    found = without_duplicates(records, "pairs", Columns(), PairRules(), "near").records
    whole = [record.columns for record in found.rows()]
    assert whole == KEPT["near"]
    for start, stop in product(range(9), repeat=2):
        assert [record.columns for record in found.part(start, stop)] == whole[start:stop]

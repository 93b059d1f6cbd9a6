"""The checks of tokens on mixtures and on ranked lists, whose completions do not lie row by row."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ds_align.config import DPOConfig, KTOConfig
from ds_align.data import load_preferences
from ds_align.data.tables import JoinedTable, TokenTable
from ds_align.doctor import tokens
from ds_align.splits import load_splits
from tests.doctor.patients import make_tokenizer

RANKED = [
    {"prompt": f"p{number}", "completions": ["a b c", "a b", "d", "e f g h"], "scores": [3, 1, 2, 4]}
    for number in range(5)
]


@pytest.fixture
def tables() -> tuple[TokenTable, JoinedTable]:
    rows = [[1, 1, 2], [2, 1], [1], [3, 2, 2], [2]]
    values = np.concatenate(rows).astype(np.int32)
    whole = TokenTable.from_lengths(values, np.array([3, 2, 1, 3, 1]))
    # The second one begins inside of its values, the first ends inside of them.
    parts = [TokenTable(values, whole.offsets[:3]), TokenTable(values, whole.offsets[2:])]
    return whole, JoinedTable(parts)


def test_tokens_are_counted_over_joined_tables(tables):
    for table in tables:
        assert tokens._count(table, 2).tolist() == [1, 1, 0, 2, 1]
        assert tokens._firsts(table).tolist() == [1, 2, 1, 3, 2]
        assert tokens._lasts(table).tolist() == [2, 1, 1, 2, 2]
        assert tokens._with_pairs(table, 2).tolist() == [False, False, False, True, False]
        assert tokens._with_pairs(table, 1).tolist() == [True, False, False, False, False]


def test_the_place_of_a_completion_is_where_its_row_finds_it():
    pairs = [{"prompt_ids": [1], "chosen_ids": [2, row], "rejected_ids": [3, row]} for row in range(4)]
    data = load_preferences(
        RANKED,
        tokenizer=make_tokenizer(),
        inputs="pairs",
        config=DPOConfig(ranked_pairs="all", dataset_cache_dir="none"),
    )
    plain = load_preferences(
        pairs, tokenizer=None, inputs="pairs", config=DPOConfig(dataset_cache_dir="none")
    )
    # 4 * 3 / 2 pairs of each list, of 4 completions.
    assert (len(data), len(data.tables.completions)) == (30, 20)
    for found in (data, data.select(np.array([29, 3, 7])), plain, plain.select(np.array([2, 0]))):
        for row, (chosen, rejected) in zip(found, found.completion_index, strict=True):
            assert np.array_equal(found.tables.completions[chosen], row.chosen_ids)
            assert np.array_equal(found.tables.completions[rejected], row.rejected_ids)


@pytest.mark.parametrize("config_class", [DPOConfig, KTOConfig])
def test_a_mixture_is_examined(tmp_path, config_class):
    for name, rows in (("lists", RANKED), ("pairs", [{"prompt": "x", "chosen": "a b", "rejected": "c"}] * 3)):
        lines = "\n".join(json.dumps(row | {"prompt": f"{row['prompt']} {n}"}) for n, row in enumerate(rows))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    parts = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("lists", "pairs")]
    config = config_class(mixture=parts, dataset_cache_dir="none")
    data = load_splits(config, make_tokenizer()).train
    eos = make_tokenizer().eos_token_id
    # Every completion of a mixture ends with its one EOS, wherever it lies.
    assert (tokens._count(data.tables.completions, eos)[data.completion_index] == 1).all()
    assert tokens._ends_with(data, eos).all()

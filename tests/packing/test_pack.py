"""The tensors of a pack, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_align.batch import Layout, PackedBatch, Pair, Segment, Unpaired
from ds_align.packing import Group, PreferenceTable, build_batch


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# Units in order: 0 (20, 21), 1 (30) under the prompt (1, 2, 3); 2 (40), 3 (50, 51) under (9).
PAIRS = [
    Pair(ids(1, 2, 3), ids(20, 21), ids(30)),
    Pair(ids(9), ids(40), ids(50, 51)),
]
GROUPS = [Group(0, (0, 1), (0,), 6), Group(1, (2, 3), (1,), 4)]


def build(layout: Layout) -> PackedBatch:
    return build_batch(PreferenceTable.from_preferences(PAIRS), GROUPS, [70, 80], layout)


def test_shared() -> None:
    batch = build(Layout.SHARED)
    assert batch.input_ids.tolist() == [[1, 2, 3, 20, 21, 30, 9, 40, 50, 51]]
    # Completions of one prompt stand at the same positions.
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    assert batch.attention_mask is None
    assert batch.segments == (
        Segment((0, 5), ((0, 5),)),
        Segment((5, 6), ((0, 3), (5, 6))),
        Segment((6, 8), ((6, 8),)),
        Segment((8, 10), ((6, 7), (8, 10))),
    )
    # The last prompt position (2, then 6) predicts the first token of both completions.
    assert batch.source_index.tolist() == [2, 3, 2, 6, 6, 8]
    assert (batch.num_tokens, batch.num_unshared_tokens, batch.num_padded_tokens) == (10, 14, 20)


def test_plain() -> None:
    batch = build(Layout.PLAIN)
    assert batch.input_ids.tolist() == [[1, 2, 3, 20, 21, 1, 2, 3, 30, 9, 40, 9, 50, 51]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert [segment.query for segment in batch.segments] == [(0, 5), (5, 9), (9, 11), (11, 14)]
    assert all(segment.keys == (segment.query,) for segment in batch.segments)
    assert batch.source_index.tolist() == [2, 3, 7, 9, 11, 12]
    assert (batch.num_tokens, batch.num_unshared_tokens, batch.num_padded_tokens) == (14, 14, 20)


def test_padded() -> None:
    batch = build(Layout.PADDED)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 20, 21],
        [1, 2, 3, 30, 0],
        [9, 40, 0, 0, 0],
        [9, 50, 51, 0, 0],
    ]
    assert batch.attention_mask.tolist() == [[1] * 5, [1] * 4 + [0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0], [0, 1, 2, 0, 0]]
    assert batch.segments is None
    assert batch.source_index.tolist() == [2, 3, 5 + 2, 10, 15, 16]
    assert (batch.num_tokens, batch.num_unshared_tokens, batch.num_padded_tokens) == (14, 14, 20)


@pytest.mark.parametrize("layout", list(Layout))
def test_what_every_layout_scores(layout: Layout) -> None:
    batch = build(layout)
    assert batch.labels.tolist() == [20, 21, 30, 40, 50, 51]
    assert batch.completion_index.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.completion_lengths.tolist() == [2, 1, 1, 2]
    assert batch.units.tolist() == [0, 1, 2, 3]
    assert batch.members.tolist() == [[0, 1], [2, 3]]
    assert batch.rows == (70, 80)
    assert batch.desirable is None
    assert (batch.num_completions, batch.num_preferences) == (4, 2)
    assert batch.labels.dtype == batch.input_ids.dtype == batch.source_index.dtype == torch.long


def test_members_are_places_in_the_pack_not_units() -> None:
    table = PreferenceTable.from_preferences(PAIRS)
    batch = build_batch(table, [GROUPS[1]], [70, 80], Layout.SHARED)
    assert batch.units.tolist() == [2, 3]
    assert batch.members.tolist() == [[0, 1]]
    assert batch.rows == (80,)


def test_unpaired_rows_carry_their_label() -> None:
    rows = [
        Unpaired(ids(1), ids(20), True, ids(21)),
        Unpaired(ids(2), ids(30), False, None),
        Unpaired(ids(3), ids(40), True, None),
    ]
    table = PreferenceTable.from_preferences(rows)
    # Units: 0 and its y' 1 under the first prompt, then 2 and 3.
    groups = [Group(2, (3,), (2,), 2), Group(1, (2,), (1,), 2)]
    batch = build_batch(table, groups, [5, 6, 7], Layout.SHARED)
    assert batch.desirable.tolist() == [True, False]
    assert batch.rows == (7, 6)
    assert batch.members.tolist() == [[0], [1]]
    scored = build_batch(table, [Group(0, (1,), (), 2)], [5, 6, 7], Layout.SHARED)
    assert (scored.num_preferences, scored.num_completions) == (0, 1)
    assert scored.desirable.dtype == torch.bool and scored.members.shape == (0, 1)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_dummy_computes_one_token_and_scores_none(layout: Layout) -> None:
    batch = build_batch(PreferenceTable.from_preferences(PAIRS), (), (), layout)
    assert batch.input_ids.tolist() == [[0]]
    assert batch.labels.numel() == batch.num_completions == batch.num_preferences == 0
    assert (batch.num_tokens, batch.num_unshared_tokens, batch.num_padded_tokens) == (0, 0, 0)
    assert batch.members.shape == (0, 2)


def test_a_batch_moves_as_a_whole() -> None:
    batch = build(Layout.SHARED)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.members.device.type == "meta"
    assert moved.segments == batch.segments and moved.rows == batch.rows
    assert batch.input_ids.device.type == "cpu"

"""Pairs with scores: those nearer than a margin are left out, and settings that change nothing are named."""

from __future__ import annotations

import json

import pytest

from ds_align.config import DPOConfig
from ds_align.data.ranked import PairRules
from ds_align.errors import ConfigError, DataError
from tests.data.test_ranked import FOUR, load, reason

SCORED = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 5, "rejected_score": 1},
    {"prompt": "d", "chosen": "b", "rejected": "c", "chosen_score": 2.5, "rejected_score": 2.0},
    {"prompt": "e", "chosen": "b", "rejected": "c", "chosen_score": 1, "rejected_score": 3},
]


@pytest.mark.parametrize(("margin", "kept"), [(None, 3), (0, 2), (0.5, 2), (0.6, 1), (4, 1)])
@pytest.mark.parametrize("inputs", ["pairs", "unpaired"])
def test_pairs_below_the_margin_are_dropped_and_counted(bpe, settings, margin, kept, inputs):
    # The margins are 4, 0.5 and -2.
    data = load(SCORED, settings, inputs, bpe(), min_score_margin=margin)
    assert len(data) == kept * (2 if inputs == "unpaired" else 1)
    assert data.counts["dropped_low_margin"] == 3 - kept
    assert ("below min_score_margin left out" in data.summary) is (kept < 3)
    assert ("chosen_score" in data.summary) is (margin is not None)


def test_score_columns_have_other_names_and_must_be_there(bpe, settings):
    zephyr = [
        {"score_chosen": row.pop("chosen_score"), "score_rejected": row.pop("rejected_score"), **row}
        for row in json.loads(json.dumps(SCORED))
    ]
    tokenizer = bpe()
    assert len(load(zephyr, settings, tokenizer=tokenizer, min_score_margin=1.0)) == 1
    named = settings_of(settings, "score_chosen", "score_rejected")
    assert len(load(zephyr, named, tokenizer=tokenizer)) == 1
    with pytest.raises(
        DataError, match=r"min_score_margin=1 needs the columns 'good' and 'bad', found .*; leave"
    ):
        load(zephyr, settings_of(settings, "good", "bad"), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"no preference is left .*, 3 below min_score_margin\)"):
        load(SCORED, settings, tokenizer=tokenizer, min_score_margin=9.0)
    rules = PairRules(min_score_margin=1.0)
    assert "column 'chosen_score' holds 'x'" in reason(SCORED[0] | {"chosen_score": "x"}, "pairs", rules)


def settings_of(settings, chosen, rejected):
    def build(**changes):
        return settings(
            **changes,
            min_score_margin=1.0,
            dataset_chosen_score_field=chosen,
            dataset_rejected_score_field=rejected,
        )

    return build


def test_settings_without_effect_are_named(bpe, settings):
    tokenizer = bpe()
    data = load(SCORED, settings, tokenizer=tokenizer, ranked_pairs="all", ranked_min_gap=2.0)
    unused, odd = data.notes
    assert unused == "records: ranked_pairs=all, ranked_min_gap=2.0 changes nothing: no row is a ranked list"
    assert odd.startswith("records: 1 pairs have a chosen_score below the rejected_score")
    data = load([FOUR], settings, tokenizer=tokenizer, min_score_margin=2.0)
    assert "min_score_margin=2.0 changes nothing: no row is a pair with scores" in data.notes[0]
    assert load([FOUR], settings, tokenizer=tokenizer, ranked_pairs="all").notes == ()
    with pytest.raises(
        ConfigError, match="dataset_chosen_score_field without effect: min_score_margin is none"
    ):
        DPOConfig(model_name_or_path="m", dataset_path="d", dataset_chosen_score_field="x")

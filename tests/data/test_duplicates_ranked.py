"""Ranked lists that repeat each other are compared as a whole."""

from __future__ import annotations

import pytest

from ds_align.data.duplicates import scan_duplicates
from ds_align.data.ranked import PairRules
from ds_align.data.rows import Record
from ds_align.data.schemas import Columns, Preference, parse_row

ANSWERS = ["It is in the north.", "It is in the south.", "Nobody knows where it is."]


def ranked(number: int, answers: list[str], scores: list[float]) -> Preference:
    row = {"prompt": "Where is the lake?", "completions": answers, "scores": scores}
    found = parse_row(Record(f"rows:{number}", row), "ranked", Columns(), PairRules(ranked_pairs="all"))
    assert isinstance(found, Preference)
    return found


@pytest.mark.parametrize("near", [False, True])
def test_a_list_repeats_another_only_with_the_same_answers_and_order(near):
    lists = [
        ranked(1, ANSWERS, [3.0, 2.0, 1.0]),
        ranked(2, ANSWERS, [1.0, 2.0, 3.0]),  # the other way round: something else is said
        ranked(3, ANSWERS, [9.0, 8.0, 7.0]),  # other scores, the same order
        ranked(4, ANSWERS[:2], [3.0, 2.0]),
        ranked(5, ANSWERS[:2], [2.0, 3.0]),
    ]
    report = scan_duplicates(lists, near=near)
    assert report.removable.tolist() == [2]
    assert (report.counts["duplicate"], report.counts["near_duplicate"], report.counts["equal"]) == (1, 0, 0)


def test_a_list_that_nearly_repeats_another_is_found():
    longer = [f"{answer} This is what people of the village said when they were asked." for answer in ANSWERS]
    almost = [longer[0].replace("asked", "Asked"), *longer[1:]]
    report = scan_duplicates([ranked(1, longer, [3.0, 2.0, 1.0]), ranked(2, almost, [3.0, 2.0, 1.0])])
    assert report.removable.tolist() == [1]
    assert report.counts["near_duplicate"] == 1

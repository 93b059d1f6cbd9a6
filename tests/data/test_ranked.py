"""Ranked lists and scored pairs: which pairs they give, what is left out, and how they are stored."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ds_align.batch import Layout
from ds_align.batches import BatchPlanner
from ds_align.config import DPOConfig
from ds_align.data import load_preferences
from ds_align.data.ranked import PairRules, RankedList, answer_labels, choose_pairs
from ds_align.data.rows import BadRow, Record
from ds_align.data.schemas import Columns, parse_row, recognise_layout
from ds_align.errors import DataError
from ds_align.packing import PreferenceTable
from tests.data import messy


def choose(values, answers=None, prompt="p", **rules):
    answers = answers or [f"answer {number}" for number in range(len(values))]
    return choose_pairs(RankedList(answers, values, ("completions", "scores")), prompt, PairRules(**rules))


def read(row, layout="ranked", rules=None, **columns):
    return parse_row(Record("f:1", row), layout, Columns(**columns), rules)


def reason(row, layout="ranked", rules=None, **columns):
    found = read(row, layout, rules, **columns)
    assert isinstance(found, BadRow), found
    return found.reason


def load(rows, settings, inputs="pairs", tokenizer=None, **changes):
    return load_preferences(rows, tokenizer=tokenizer, inputs=inputs, config=settings(**changes))


# The two-by-two of 3, 1, 2, 3: 3 > 1, 3 > 2, 3 = 3, 1 < 2, 1 < 3, 2 < 3.
VALUES = [3.0, 1.0, 2.0, 3.0]


def test_all_pairs_by_hand():
    assert choose(VALUES, ranked_pairs="all") == (
        ((0, 1), (0, 2), (2, 1), (3, 1), (3, 2)),
        Counter(ranked_ties=1),
    )


def test_a_smallest_gap_by_hand():
    # The gaps are 2, 1, 0 (a tie), 1, 2, 1.
    found = choose(VALUES, ranked_pairs="all", ranked_min_gap=1.5)
    assert found == (((0, 1), (3, 1)), Counter(ranked_ties=1, ranked_below_gap=3))
    assert choose([1.0, 2.0], ranked_min_gap=1.0) == (((1, 0),), Counter())
    assert choose([1.0, 2.0], ranked_min_gap=1.1) == ((), Counter(ranked_below_gap=1))
    # 0.3 - 0.2 is 0.09999999999999998.
    assert choose([0.3, 0.2], ranked_min_gap=0.1) == (((0, 1),), Counter())


def test_the_best_against_the_worst():
    (pair,), left_out = choose(VALUES)
    assert pair in ((0, 1), (3, 1)) and not left_out
    assert choose([2.0, 5.0, -1.0]) == (((1, 2),), Counter())
    # Who is drawn of two best ones does not depend on the seed: equal rules mean equal pairs.
    assert {PairRules.from_config(config(seed)) for seed in range(5)} == {PairRules()}


def config(seed, mode="best_worst"):
    return DPOConfig(model_name_or_path="m", dataset_path="d", seed=seed, ranked_pairs=mode)


@pytest.mark.parametrize("mode", ["best_worst", "best_random"])
def test_equal_answers_give_no_pair_and_one_tie(mode):
    assert choose([4.0, 4.0, 4.0], ranked_pairs=mode) == ((), Counter(ranked_ties=1))
    # 3 pairs of two of three.
    assert choose([4.0, 4.0, 4.0], ranked_pairs="all") == ((), Counter(ranked_ties=3))


def test_a_random_worse_answer_is_far_enough_and_drawn_by_seed_and_content():
    values = [9.0, 8.5, 3.0, 1.0, 2.0]
    rejected = Counter()
    for number in range(300):
        ((chosen, other),), _ = choose(
            values, prompt=f"p{number}", ranked_pairs="best_random", ranked_min_gap=1.0, seed=7
        )
        assert chosen == 0
        rejected[other] += 1
    # Three are far enough: 100 each, and four standard deviations sqrt(300 * 1/3 * 2/3) = 8.2 around it.
    assert set(rejected) == {2, 3, 4}
    assert all(abs(count - 100) < 33 for count in rejected.values()), rejected
    by_seed = {
        choose(values, prompt="p", ranked_pairs="best_random", ranked_min_gap=1.0, seed=seed)[0]
        for seed in range(20)
    }
    assert by_seed == {((0, 2),), ((0, 3),), ((0, 4),)}
    assert PairRules.from_config(config(5, "best_random")).seed == 5


@pytest.mark.parametrize("mode", ["all", "best_worst", "best_random"])
def test_the_order_of_the_answers_changes_no_pair(mode):
    answers, values = list("abcdef"), [3.0, 1.0, 2.0, 3.0, 1.0, 0.5]
    generator = np.random.default_rng(0)

    def texts(order):
        rows, left_out = choose(
            [values[i] for i in order], [answers[i] for i in order], ranked_pairs=mode, seed=3
        )
        return sorted((answers[order[one]], answers[order[other]]) for one, other in rows), left_out

    expected = texts(range(6))
    assert all(texts(generator.permutation(6).tolist()) == expected for _ in range(20))


def test_labels_by_hand():
    # 0 wins twice; 1 loses twice; 2 wins once and loses once.
    assert answer_labels(((0, 1), (0, 2), (2, 1))) == {0: True, 1: False, 2: None}
    assert answer_labels(()) == {}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"completions": ["a", "b"], "scores": [1, 2]}, {}),
        ({"completions": ["a", "b"], "ranks": [2, 1]}, {}),
        ({"responses": ("a", "b"), "scores": np.array([0.1, 0.2])}, {}),
        ({"answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]}, {}),
        ({"generations": ["a", "b"], "ratings": [-2, -1]}, {}),
        ({"completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}]}, {}),
        ({"completions": [{"content": "a", "score": 1}, {"content": "b", "score": 2}]}, {}),
        ({"my_list": ["a", "b"], "my_scores": [1, 2]}, {"completions": "my_list", "scores": "my_scores"}),
        # A column goes before what the objects say, scores before ranks.
        ({"completions": [{"text": "a", "score": 9}, {"text": "b", "score": 1}], "scores": [1, 2]}, {}),
        ({"completions": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, {}),
        # A named list is meant, though there are pairs beside it.
        (
            {"all_responses": ["a", "b"], "scores": [1, 2], "chosen": "x", "rejected": "y"},
            {"completions": "all_responses"},
        ),
    ],
)
def test_every_form_of_a_list_gives_the_same_pair(row, columns):
    row = {"prompt": "p", "extra": {"kept": [1]}, **row}
    assert recognise_layout([Record("f:1", row)], "pairs", Columns(**columns), "f") == "ranked"
    found = read(row, **columns)
    assert (found.prompt, found.completions, found.comparisons) == ("p", ("a", "b"), ((1, 0),))


def test_messages_in_a_list_lose_their_scores():
    answers = [{"role": "assistant", "content": text, "score": len(text)} for text in ("aa", "b")]
    found = read({"prompt": [{"role": "user", "content": "p"}], "completions": answers})
    assert found.completions[0] == [{"role": "assistant", "content": "aa"}]
    assert found.comparisons == ((0, 1),)


def test_pairs_go_before_lists_and_lists_before_labels():
    def layout(row):
        return recognise_layout([Record("f:1", row)], "unpaired", Columns(), "f")

    ranked = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}
    assert layout(ranked | {"chosen": "a", "rejected": "b"}) == "pairs"
    assert layout(ranked | {"label": True}) == "ranked"
    assert layout({"prompt": "p", "completion": "a", "label": True, "answers": ["x", "y"]}) == "unpaired"
    assert layout({"messages": [], "kto_tag": True}) == "unpaired"
    assert layout({"prompt": "p", "answers": "no list"}) == "unpaired"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scores": None}, "is a list of answers without scores or ranks, found prompt, completions, scores"),
        ({"scores": [1]}, "column 'scores' has 1 numbers for 2 answers"),
        ({"scores": 1}, "column 'scores' holds int, expected a list of 2 numbers"),
        ({"scores": [1, None]}, "column 'completions' has 1 of 2 answers with a text and a value"),
        ({"scores": [1, float("inf")]}, "column 'scores[1]' holds inf, expected a finite number"),
        ({"scores": [1, True]}, "column 'scores[1]' holds True"),
        ({"scores": [1, "2 of 5"]}, "column 'scores[1]' holds '2 of 5'"),
        ({"completions": ["a"]}, "column 'completions' has 1 answer(s), expected two or more"),
        ({"completions": "ab"}, "column 'completions' holds str, expected a list of answers"),
        ({"completions": ["a", " "]}, "column 'completions' has 1 of 2 answers with a text and a value"),
        ({"completions": ["a", 3]}, "column 'completions[1]' holds int"),
        ({"completions": [{"x": 1}, {"response": "b"}]}, "column 'completions[0]' has x, expected one of"),
        ({"completions": ["a", [{"role": "user", "content": "b"}]]}, "a completion has the roles ['user']"),
    ],
)
def test_bad_lists_say_what_is_wrong(change, expected):
    found = read({"prompt": "p", "completions": ["a", "b"], "scores": [1, 2], **change})
    assert expected in found.reason
    assert "ranked lists need {prompt, completions, scores or ranks}" in found.expected


@pytest.mark.parametrize(
    ("completions", "scores"),
    [
        (["a", None, "b", "c"], [3, 9, 1, 2]),
        (["a", "x", "b", "c"], ["3.0", "N/A", " 1", "2e0"]),
        (["a", "x", "b", "c"], [3, float("nan"), 1, 2]),
        (["a", " ", "b", "c"], [3, 9, 1, 2]),
    ],
)
def test_an_answer_without_a_text_or_a_value_is_left_out_and_counted(completions, scores):
    for row in (
        {"prompt": "p", "completions": completions, "scores": scores},
        {
            "prompt": "p",
            "completions": [
                {"response": text, "overall_score": score}
                for text, score in zip(completions, scores, strict=True)
            ],
        },
    ):
        found = read(row, rules=PairRules("all"))
        assert found.completions == ("a", "b", "c")
        assert sorted(found.comparisons) == [(0, 1), (0, 2), (2, 1)]
        assert found.counted == {"ranked_unusable_answers": 1}


FOUR = {"prompt": "the cat", "completions": [" sat", " ran", " lay", " ate"], "scores": [4, 3, 2, 1]}


def test_the_answers_of_a_list_are_stored_once(bpe, settings, write_jsonl):
    path = write_jsonl([FOUR, {"prompt": "x", "chosen": "y", "rejected": "z"}, FOUR | {"prompt": "the dog"}])
    tokenizer, changes = bpe(), {"ranked_pairs": "all", "on_bad_rows": "skip", "max_bad_fraction": 0.5}
    made = load(path, settings, tokenizer=tokenizer, **changes)
    again = load(path, settings, tokenizer=tokenizer, **changes)
    assert (made.num_processes, again.num_processes) == (1, 0)
    # 4 * 3 / 2 = 6 pairs of each list, of 4 answers.
    assert len(made) == 12 and made.counts["rows_read"] == 3
    assert len(made._tables.completions) == 8
    assert made.prompt_keys.tolist() == [0] * 6 + [1] * 6
    for data in (made, again):
        texts = [
            (tokenizer.decode(row.chosen_ids)[:4], tokenizer.decode(row.rejected_ids)[:4]) for row in data
        ]
        every = [
            (one, other)
            for i, one in enumerate(FOUR["completions"])
            for other in FOUR["completions"][i + 1 :]
        ]
        assert texts == every * 2
        lengths = [[len(row.chosen_ids), len(row.rejected_ids)] for row in data]
        assert data.completion_lengths.tolist() == lengths
    assert messy.facts(made) == messy.facts(again)
    assert made.summary == again.summary
    part = made.select(np.array([7, 2]))
    assert messy.contents(part) == [messy.contents(made)[7], messy.contents(made)[2]]
    assert part.completion_lengths.tolist() == made.completion_lengths[[7, 2]].tolist()


def test_a_table_row_by_row_has_no_index(bpe, settings):
    pairs = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    assert load(pairs, settings)._tables.completion_index is None
    # Of two answers, too, though the better one is the second: it is stored first.
    data = load(
        [{"prompt": "p", "completions": [" sat", " ran"], "scores": [1, 2]}], settings, tokenizer=bpe()
    )
    assert data._tables.completion_index is None
    assert bpe().decode(data[0].chosen_ids) == " ran<|im_end|>"


def test_several_processes_and_the_cache_give_the_same(bpe, settings, write_jsonl):
    path = write_jsonl([FOUR | {"prompt": f"the cat {number}"} for number in range(1100)])
    found = [
        load(
            path,
            settings,
            inputs,
            bpe(),
            ranked_pairs="best_random" if inputs == "pairs" else "all",
            dataset_num_proc=number,
            dataset_cache_dir=directory,
        )
        for inputs in ("pairs", "unpaired")
        for number, directory in ((1, "none"), (2, "none"))
    ]
    assert [data.num_processes for data in found] == [1, 2, 1, 2]
    for one, other in (found[:2], found[2:]):
        assert messy.facts(one) == messy.facts(other) and one.summary == other.summary


def test_the_cache_knows_the_rules_and_the_seed_only_where_something_is_drawn(bpe, settings, write_jsonl):
    tokenizer = bpe()
    path = write_jsonl([FOUR | {"chosen_score": 1, "rejected_score": 0}])

    def is_hit(**changes):
        return messy.is_hit(load(path, settings, tokenizer=tokenizer, **changes))

    assert [is_hit(), is_hit(), is_hit(seed=7)] == [False, True, True]
    assert [is_hit(ranked_pairs="all"), is_hit(ranked_pairs="all", seed=7)] == [False, True]
    assert [is_hit(ranked_min_gap=2.0), is_hit(ranked_min_gap=3.0), is_hit(min_score_margin=1.0)] == [
        False
    ] * 3
    drawn = {"ranked_pairs": "best_random"}
    assert [is_hit(**drawn), is_hit(**drawn), is_hit(**drawn, seed=7)] == [False, True, False]
    assert not is_hit(dataset_tools_field="x")


def test_a_step_with_all_pairs_of_a_prompt_computes_each_answer_once(bpe, settings):
    rows = [FOUR | {"prompt": f"the cat {number}"} for number in range(5)]
    data = load(rows, settings, tokenizer=bpe(), ranked_pairs="all")
    config = DPOConfig(
        model_name_or_path="m", dataset_path="d", group_by_prompt=True, per_device_train_batch_size=6
    )
    planner = BatchPlanner(config, Layout.SHARED)
    steps = list(planner.rows_by_step(data))
    assert len(steps) == 5
    for rows in steps:
        table = PreferenceTable.from_preferences([data[int(row)] for row in rows])
        assert (len(table.prompts), len(table.completions), len(table.members)) == (1, 4, 6)


def test_counts_of_a_file_by_hand(bpe, settings):
    rows = [
        FOUR,
        # A tie of the whole list, one of two best, and one whose best and worst read the same.
        FOUR | {"prompt": "a", "scores": [1, 1, 1, 1]},
        FOUR | {"prompt": "b", "scores": [2, 2, 1, 1.5]},
        {"prompt": "c", "completions": [" sat", " sat"], "scores": [1, 2]},
    ]
    tokenizer = bpe()
    data = load(rows, settings, tokenizer=tokenizer)
    assert (len(data), data.counts["rows_read"], data.counts["ranked_ties"]) == (2, 4, 1)
    assert data.counts["dropped_equal_pairs"] == 1
    assert data.summary == (
        "records: 4 ranked lists (prompt, completions, scores) -> 2 pairs, best against worst, "
        "1 with equal answers and 1 ties left out"
    )
    data = load(rows, settings, tokenizer=tokenizer, ranked_pairs="all")
    # 6 + 0 + 5 + 0 pairs; 6 ties of the second row, 1 of the third, 1 equal pair of the fourth.
    assert (len(data), data.counts["ranked_ties"], data.counts["dropped_equal_pairs"]) == (11, 7, 1)
    data = load(rows, settings, "unpaired", tokenizer, ranked_pairs="all")
    # Of FOUR: 3, 1, -1, -3 wins more than losses, none is 0. Of the third row " sat" and " ran" win 2 each,
    # " ate" wins 1 and loses 2, " lay" loses 3: all have a label, too.
    labels = [True, True, False, False]  # in the order of the list
    assert [row.desirable for row in data] == labels + labels
    assert data.counts["ranked_undecided"] == 0
    assert data.summary.endswith(
        "-> 8 labelled answers, every two answers, 1 with equal answers and 7 ties left out"
    )


def test_answers_without_a_label_are_counted(bpe, settings):
    row = {"prompt": "a", "completions": [" sat", " ran", " lay"], "scores": [1, 2, 3]}
    data = load([row, row | {"prompt": "b"}], settings, "unpaired", bpe(), ranked_pairs="all")
    # In the order of the list: " sat" loses twice, " ran" wins once and loses once, " lay" wins twice.
    assert [row.desirable for row in data] == [False, True, False, True]
    assert data.counts["ranked_undecided"] == 2
    # y' of each row is the next row of the other prompt.
    assert [row.kl_ids.tolist() for row in data][:2] == [data[2].completion_ids.tolist()] * 2


def test_a_file_of_ties_alone_is_refused(bpe, settings):
    with pytest.raises(DataError, match=r"no preference is left of 1 rows .*, 1 ties\)"):
        load([FOUR | {"scores": [1, 1, 1, 1]}], settings, tokenizer=bpe())

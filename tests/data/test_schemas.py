from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ds_align.data.readers import BadRow, Record
from ds_align.data.schemas import Columns, Preference, count_text_hazards, parse_row, recognise_layout
from ds_align.errors import DataError

USER = {"role": "user", "content": "What is the capital of Egypt?"}
GOOD = {"role": "assistant", "content": "Cairo."}
WEAK = {"role": "assistant", "content": "Paris."}
SYSTEM = {"role": "system", "content": "Be brief."}


def parse(row, layout="pairs", **columns):
    return parse_row(Record("data.jsonl:7", row), layout, Columns(**columns))


def reason(row, layout="pairs", **columns):
    result = parse(row, layout, **columns)
    assert isinstance(result, BadRow), result
    assert result.origin == "data.jsonl:7"
    return result.reason


def test_string_pairs_and_extra_columns():
    row = parse({"prompt": "a", "chosen": "b", "rejected": "c", "score": 0.5, "annotator": {"id": [1]}})
    assert row == Preference("data.jsonl:7", "a", ("b", "c"))


def test_string_unpaired():
    row = parse({"prompt": "a", "completion": "b", "label": 0, "kl_completion": "d"}, "unpaired")
    assert row == Preference("data.jsonl:7", "a", ("b",), desirable=False, kl_completion="d")


def test_the_column_map_renames():
    row = parse({"question": "a", "good": "b", "bad": "c"}, prompt="question", chosen="good", rejected="bad")
    assert (row.prompt, row.completions) == ("a", ("b", "c"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [WEAK]},
        {"prompt": [SYSTEM, USER], "chosen": GOOD["content"], "rejected": WEAK["content"]},
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, WEAK]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, WEAK]},
        {"prompt": USER["content"], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, WEAK]},
        {"messages": [SYSTEM, USER], "chosen": GOOD, "rejected": WEAK},
        {
            "conversations": [
                {"from": "system", "value": SYSTEM["content"]},
                {"from": "human", "value": USER["content"]},
            ],
            "chosen": {"from": "gpt", "value": GOOD["content"]},
            "rejected": {"from": "gpt", "value": WEAK["content"]},
        },
    ],
)
def test_every_conversational_form_gives_the_same_preference(row):
    parsed = parse(row)
    assert parsed.prompt == [SYSTEM, USER]
    assert parsed.completions == ([GOOD], [WEAK])


def test_a_plain_prompt_with_message_answers_is_a_user_turn():
    assert parse({"prompt": USER["content"], "chosen": [GOOD], "rejected": [WEAK]}).prompt == [USER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"completion": [USER, GOOD], "label": True},
        {"messages": [USER, GOOD], "label": True},
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "completion": GOOD["content"],
            "label": 1,
        },
    ],
)
def test_every_conversational_unpaired_form_gives_the_same_preference(row):
    assert parse(row, "unpaired") == Preference("data.jsonl:7", [USER], ([GOOD],), desirable=True)


def test_equal_conversations_keep_their_last_message_as_the_answer():
    row = parse({"chosen": [USER, GOOD], "rejected": [USER, GOOD]})
    assert (row.prompt, row.completions) == ([USER], ([GOOD], [GOOD]))


def test_keys_that_datasets_fills_with_none_are_dropped():
    row = parse(
        {"prompt": [{**USER, "name": None}], "chosen": [GOOD], "rejected": [WEAK], "tools": '[{"name": "f"}]'}
    )
    assert row.prompt == [USER]
    assert row.tools == [{"name": "f"}]


def test_token_ids_are_taken_as_int32():
    row = parse({"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "prompt": "text is ignored"})
    assert [ids.tolist() for ids in (row.prompt, *row.completions)] == [[1], [2, 3], [4]]
    assert all(ids.dtype == np.int32 for ids in (row.prompt, *row.completions))
    row = parse(
        {"prompt_ids": [1], "completion_ids": [2], "label": True, "kl_completion_ids": [9]}, "unpaired"
    )
    assert (row.desirable, row.kl_completion.tolist()) == (True, [9])


def test_a_missing_column_names_the_nearest_and_the_schema():
    bad = parse({"prompt": "a", "chosne": "b", "rejected": "c"})
    found = "column 'chosen' is missing, found prompt, chosne, rejected; the nearest is 'chosne'"
    assert found in bad.reason
    assert "pairs need {prompt, chosen, rejected}" in bad.expected
    assert "dataset_*_field" in bad.reason


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
            "if 'instruction' holds the prompts, set dataset_prompt_field=instruction",
        ),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "set dataset_prompt_field=question"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "the prompt stands inside of the answers: write the turns as messages",
        ),
        (
            {"What is the largest planet?": "Name a colour.", "Jupiter it is.": "Red."},
            "does the first row of the file name the columns?",
        ),
    ],
)
def test_a_missing_column_of_a_known_form_has_its_own_remedy(row, expected):
    assert expected in reason(row)


def test_an_instruction_with_an_input_beside_it_is_counted():
    row = {"instruction": "Sum up.", "input": "A long text.", "chosen": "b", "rejected": "c"}
    found = parse(row, prompt="instruction")
    assert found.counted == {"instructions_with_unused_input": 1}
    assert not parse(row | {"input": ""}, prompt="instruction").counted
    assert not parse(row | {"prompt": "p"}).counted


def test_a_conversation_that_ends_with_the_users_turn_says_so():
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    found = reason({"messages": turns, "label": True}, "unpaired")
    assert "a conversation ends with a user message, expected the assistant's answer last" in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chosen": None}, "column 'chosen' is null, expected a string"),
        ({"prompt": None}, "column 'prompt' is null"),
        ({"chosen": 3}, "column 'chosen' holds int, expected a string or a list of messages"),
        ({"chosen": " \n\t"}, "column 'chosen' is empty or white space"),
        ({"rejected": ""}, "column 'rejected' is empty or white space"),
        ({"rejected": []}, "column 'rejected' is an empty list"),
        ({"rejected": ["a"]}, "a list of str, expected messages with role and content"),
        ({"rejected": [{"role": "asistant", "content": "x"}]}, "role 'asistant', expected one of"),
        ({"rejected": [{"role": "assistant", "content": None}]}, "whose content is NoneType"),
        ({"rejected": [{"role": "assistant", "content": " "}]}, "column 'rejected' is empty or white space"),
        ({"rejected": [GOOD, USER]}, "a completion has the roles ['assistant', 'user']"),
        ({"prompt": [USER, GOOD]}, "the prompt ends with an assistant message"),
        ({"chosen": "\ud800"}, "a lone surrogate (\\ud800 at character 0)"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, WEAK]},
            "do not begin with the text of the prompt column",
        ),
    ],
)
def test_bad_pairs_say_what_is_wrong(change, expected):
    assert expected in reason({"prompt": "a", "chosen": "b", "rejected": "c", **change})


@pytest.mark.parametrize("label", ["yes", 2, 0.5, -1, None])
def test_a_label_is_true_or_false(label):
    assert "column 'label'" in reason({"prompt": "a", "completion": "b", "label": label}, "unpaired")


@pytest.mark.parametrize(
    "ids", [[], [-1], [1.5], [2**31], [2**70], [[1], [2]], [[1], [2, 3]], "1 2", [True, False], ["1"]]
)
def test_bad_token_ids(ids):
    assert "column 'chosen_ids'" in reason({"prompt_ids": [1], "chosen_ids": ids, "rejected_ids": [4]})


def test_incomplete_token_ids_name_the_column():
    assert "column 'rejected_ids' is missing" in reason({"prompt_ids": [1], "chosen_ids": [2]})


def rows_of(*rows):
    return [Record(f"data.jsonl:{line}", row) for line, row in enumerate(rows, 1)]


def test_layouts_are_recognised_by_the_columns_of_most_rows():
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    single = {"prompt": "a", "completion": "b", "label": True}
    assert recognise_layout(rows_of(pair, pair, single), "pairs", Columns(), "d") == "pairs"
    assert recognise_layout(rows_of(pair), "unpaired", Columns(), "d") == "pairs"
    assert recognise_layout(rows_of(single), "unpaired", Columns(), "d") == "unpaired"
    assert recognise_layout(rows_of({"x": 1}), "unpaired", Columns(), "d") == "unpaired"
    with pytest.raises(
        DataError, match="d: the rows are unpaired.*train with method kto, or give paired data"
    ):
        recognise_layout(rows_of(single), "pairs", Columns(), "d")


def test_a_system_prompt_may_have_a_column_of_its_own():
    plain = {"prompt": [USER], "chosen": [GOOD], "rejected": [WEAK]}
    assert parse(plain | {"system": SYSTEM["content"]}).prompt == [SYSTEM, USER]
    assert parse(plain | {"instructions": "x"}, system="instructions").prompt[0]["content"] == "x"
    for nothing in (None, "", " \n"):
        assert parse(plain | {"system": nothing}).prompt == [USER]
    # Said twice it is one; said differently nobody can know which is meant.
    twice = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [WEAK]}
    assert parse(twice | {"system": SYSTEM["content"]}).prompt == [SYSTEM, USER]
    assert "give two different system messages" in reason(twice | {"system": "Be long."})
    assert "column 'system' holds int, expected the text of a system message" in reason(plain | {"system": 3})
    # A string prompt beside answers that are messages is a user turn behind it.
    mixed = {"prompt": USER["content"], "chosen": [GOOD], "rejected": [WEAK], "system": SYSTEM["content"]}
    assert parse(mixed).prompt == [SYSTEM, USER]


def test_strings_do_not_show_a_system_prompt_or_tools_and_are_counted():
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for extra, number in (
        ({"system": "x"}, 1),
        ({"tools": []}, 0),
        ({"tools": [{}]}, 1),
        ({"system": ""}, 0),
    ):
        row = parse(plain | extra)
        assert (row.prompt, row.counted.get("strings_with_system_or_tools", 0)) == ("a", number)


def test_a_label_may_be_a_kto_tag_unless_its_column_is_named():
    row = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "kto_tag": False,
    }
    found = parse(row, "unpaired")
    assert (found.prompt[0]["content"], found.completions[0][0]["content"], found.desirable) == (
        "a",
        "b",
        False,
    )
    assert found.form == "labelled answers as messages (conversations, kto_tag)"
    assert "column 'good' is missing" in reason(row, "unpaired", label="good")
    assert "column 'kto_tag' holds 'no'" in reason(row | {"kto_tag": "no"}, "unpaired")


@pytest.mark.parametrize(
    ("row", "layout", "form"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", "pairs (prompt, chosen, rejected)"),
        (
            {"conversations": [USER], "chosen": GOOD, "rejected": WEAK, "tools": "[{}]", "system": "x"},
            "pairs",
            "pairs as messages (conversations, chosen, rejected, system, tools)",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, WEAK]}, "pairs", "pairs as messages (chosen, rejected)"),
        (
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
            "pairs",
            "pairs of token ids (prompt_ids, chosen_ids, rejected_ids)",
        ),
        (
            {"prompt": "a", "completion": "b", "label": 1, "kl_completion": "c"},
            "unpaired",
            "labelled answers (prompt, completion, label, kl_completion)",
        ),
        (
            {"prompt_ids": [1], "completion_ids": [2], "label": True, "kl_completion_ids": [3]},
            "unpaired",
            "labelled token ids (prompt_ids, completion_ids, label, kl_completion_ids)",
        ),
        (
            {"instruction": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": 2}]},
            "ranked",
            "ranked lists (instruction, answers, rank)",
        ),
    ],
)
def test_what_was_read_is_said_with_the_columns_that_were_used(row, layout, form):
    assert parse(row | {"annotator": 3}, layout).form == form


def test_hazards_are_counted_and_arabic_marks_are_not():
    counts: Counter[str] = Counter()
    for text in ("\u202eabc", "می\u200cروم \u200fنعم\u200e \u061c", "a\0b", "plain"):
        count_text_hazards(Preference("x", text, ("b", "c")), counts)
    assert counts == Counter(rows_with_bidi_controls=1, rows_with_nul=1)


def test_a_pair_that_is_also_a_labelled_answer_is_counted():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True}
    assert parse(row).counted == {"pairs_with_unused_label": 1}
    assert not parse(row | {"label": None}).counted


def test_a_pair_whose_scores_say_the_opposite_is_counted():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 1.0, "rejected_score": 2}
    assert parse(row).counted == {"pairs_scored_the_other_way": 1}
    for scores in ((2, 2), (3.0, 2), (None, 2), ("1", 2)):
        assert not parse(row | dict(zip(("chosen_score", "rejected_score"), scores, strict=True))).counted


@pytest.mark.parametrize(
    ("label", "expected"), [("1", True), ("True", True), (" false", False), ("0", False)]
)
def test_labels_as_texts(label, expected):
    assert parse({"prompt": "a", "completion": "b", "label": label}, "unpaired").desirable is expected


def test_a_first_row_of_one_column_is_named():
    assert "the first row was read as one column" in reason({"prompt;chosen;rejected": "a;b;c"})

"""Checks 1 to 4 on rows whose tokens are known one by one."""

from __future__ import annotations

import pytest

from ds_align.doctor import as_warnings_where_legal, examine
from ds_align.doctor.tokens import spread, template_closes_turns
from tests.doctor.patients import BOS, CHATML, EOS, check, facts_of, ids, make_tokenizer, texts

GOOD = ids([5, 6], [7, EOS], [8, EOS])


def test_one_bos_and_one_eos_are_well():
    tokenizer = make_tokenizer(bos=True)
    rows = [ids([BOS, 5, 6], [7, EOS], [8, 9, EOS]), ids([BOS, 5], [9, EOS], [8, EOS])]
    found = check(1, facts_of(rows, tokenizer=tokenizer))
    assert (found.level, found.examples) == ("ok", ())
    assert found.value == {
        "rows_with_double_bos": 0,
        "completions_with_several_eos": 0,
        "completions_of_several_turns": 0,
        "rows_with_eos_inside": 0,
    }


@pytest.mark.parametrize(
    "row",
    [
        ids([BOS, BOS, 5], [7, EOS], [8, EOS]),  # in the prompt
        ids([5, BOS], [BOS, 7, EOS], [8, EOS]),  # across the boundary
        ids([5, 6], [7, EOS], [BOS, BOS, EOS]),  # in a completion
    ],
)
def test_two_bos_in_a_row_are_an_error(row):
    facts = facts_of([GOOD, row, GOOD], tokenizer=make_tokenizer(bos=True))
    found = check(1, facts)
    assert found.level == "error"
    assert found.value["rows_with_double_bos"] == 1
    assert "1 of 3 rows" in found.message
    assert found.examples[0].startswith("row 2: ")


def test_bos_that_do_not_touch_are_well():
    rows = [ids([BOS, 5, BOS], [7, EOS], [8, EOS])]
    # The last token of a prompt and the first of the next one stand side by side in the storage.
    rows.append(ids([BOS, 6], [9, EOS], [8, EOS]))
    assert check(1, facts_of(rows, tokenizer=make_tokenizer(bos=True))).level == "ok"


def test_several_eos_in_the_scored_tokens_are_an_error():
    facts = facts_of([GOOD, ids([5], [7, EOS, EOS], [8, EOS, 9, EOS])])
    found = check(1, facts)
    assert found.level == "error"
    assert found.value["completions_with_several_eos"] == 2
    assert "2 of 4 completions" in found.message
    assert "<eos><eos>" in found.examples[0]


def test_eos_of_earlier_turns_are_fine_where_the_template_writes_them():
    tokenizer = make_tokenizer(template=CHATML)
    assert template_closes_turns(tokenizer, None)
    assert not template_closes_turns(make_tokenizer(), None)
    assert not template_closes_turns(
        make_tokenizer(), "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    turns = [{"role": "assistant", "content": text} for text in ("ab", "cd")]
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": turns, "rejected": turns[:1]}
    facts = facts_of([row], tokenizer=tokenizer, also={"template_closes_turns": True})
    found = check(1, facts)
    assert (found.level, found.value["completions_of_several_turns"]) == ("ok", 1)
    # Neither did these ids go through the template, nor do strings.
    given = ids([5, EOS, 6, EOS], [7, EOS, 9, EOS], [8, EOS])
    strings = {"prompt": "a", "chosen": "b<eos>c", "rejected": "d"}
    # Ids may have gone through it elsewhere.
    for rows, level in (([given], "warning"), ([strings], "error")):
        found = check(1, facts_of(rows, tokenizer=tokenizer, also={"template_closes_turns": True}))
        assert (found.level, found.value["completions_with_several_eos"]) == (level, 1)
    assert check(1, facts_of([given], tokenizer=tokenizer)).level == "error"
    doubled = facts_of([ids([5], [7, EOS, EOS], [8, EOS])], also={"template_closes_turns": True})
    assert check(1, doubled).level == "error"


def test_missing_eos():
    assert check(2, facts_of([GOOD])).level == "ok"
    found = check(2, facts_of([GOOD, ids([5, 6], [7, 9], [8, EOS])]))
    assert (found.level, found.value) == ("error", {"completions_without_eos": 1, "completions": 4})
    assert "the id 0" in found.remedy


def test_a_cut_completion_needs_no_eos():
    # 2 + 4 tokens become 2 + 2: the EOS goes with the cut.
    rows = [ids([5, 6], [7, 8, 9, EOS], [8, EOS])]
    facts = facts_of(rows, max_length=4)
    assert facts.train[0].chosen_ids.tolist() == [7, 8]
    assert check(2, facts).level == "ok"
    assert check(2, facts_of(rows, max_completion_length=3)).level == "ok"


def test_ids_without_any_eos_do_not_stop_a_run():
    """Token ids are taken as they are; where most end with an EOS, one that does not is a mistake."""
    bare = facts_of([ids([5], [7], [8]), ids([5], [9, EOS, EOS], [8])])
    usual = facts_of([GOOD, ids([5], [7], [9, EOS])])
    for facts, level in ((bare, "warning"), (usual, "error")):
        findings, _ = examine(facts, [1, 2])
        assert findings[1].level == "error"
        assert as_warnings_where_legal(findings, facts)[1].level == level
    findings, _ = examine(bare, [1])
    assert as_warnings_where_legal(findings, bare)[0].level == "warning"


def test_prompt_boundary_that_a_merge_crosses():
    tokenizer = make_tokenizer(merges=True)
    # " " + "yes" would be the tokens " y", "e", "s" together.
    facts = facts_of(texts(3, prompt="ok? "), tokenizer=tokenizer)
    found = check(3, facts)
    assert found.level == "warning"
    assert (found.value["rows_judged"], found.value["rows_shifted"]) == (3, 3)
    assert (
        "token 4 of the prompt: alone ['?', 'Ġ'], with its completion ['?', 'Ġy', 'e']" in found.examples[0]
    )


def test_prompt_boundary_up_to_one_percent_is_well():
    tokenizer = make_tokenizer(merges=True)
    rows = texts(100)
    rows[7] = {"prompt": "ok? ", "chosen": "yes", "rejected": "nay"}
    assert check(3, facts_of(rows, tokenizer=tokenizer)).level == "ok"  # 1 of 100
    rows[8] = {"prompt": "well ", "chosen": "yes", "rejected": "nay"}
    assert check(3, facts_of(rows, tokenizer=tokenizer)).level == "warning"  # 2 of 100


def test_prompt_boundary_leaves_out_what_does_not_come_back():
    # "Ġ", "y" as ids are not how the tokenizer writes " y".
    rows = [ids([5, 2, 91 - 33 + 30 + 3], [7, EOS], [8, EOS])]
    tokenizer = make_tokenizer(merges=True)
    assert tokenizer.convert_ids_to_tokens(rows[0]["prompt_ids"][1:]) == ["Ġ", "y"]
    found = check(3, facts_of(rows, tokenizer=tokenizer))
    assert (found.level, found.value["rows_judged"]) == ("ok", 0)


def test_truncation_up_to_five_percent_is_well():
    rows = texts(40)
    # 2 prompt tokens + 3 letters + EOS = 6; with 4 letters it is 7.
    for number, level in ((2, "ok"), (3, "warning")):
        long = [
            row | ({"rejected": "nays"} if place < number else {}) for place, row in enumerate(rows[:10] * 4)
        ]
        facts = facts_of(long, max_length=6)
        found = check(4, facts)
        assert facts.train.counts["completions_cut"] == number
        # The rows that end at the limit by themselves are not cut ones: 2 / 40 is 5 %, 3 / 40 is more.
        assert (found.level, found.value["rows_cut"]) == (level, number)


def test_a_cut_prompt_counts_as_a_cut_row():
    found = check(4, facts_of(texts(10), max_prompt_length=1))
    assert (found.level, found.value["rows_cut"], found.value["prompts_cut"]) == ("warning", 10, 10)


def test_a_completion_cut_to_nothing_is_an_error_that_a_run_survives():
    facts = facts_of([{"prompt": "a long one", "chosen": "yes", "rejected": "no"}, *texts(3)], max_length=6)
    findings, _ = examine(facts, [4])
    assert facts.train[0].chosen_ids.tolist() == facts.tokenizer("y")["input_ids"]
    assert (findings[0].level, findings[0].value["rows_cut_to_nothing"]) == ("error", 1)
    assert as_warnings_where_legal(findings, facts)[0].level == "warning"
    # A completion that has one token of its own is not cut.
    assert check(4, facts_of([ids([5, 6, 7, 8, 9], [7], [8])], max_length=6)).level == "ok"


def test_spread_takes_first_and_last():
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    assert spread(101, 3) == [0, 50, 100]


def test_the_text_of_the_eos_inside_of_a_message_is_a_warning():
    tokenizer = make_tokenizer(template=CHATML)
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    for chosen, level in (("b<eos>c", "warning"), ("b<eos>", "ok"), ("b", "ok")):
        facts = facts_of(
            [row | {"chosen": chosen}], tokenizer=tokenizer, also={"template_closes_turns": True}
        )
        found = check(1, facts)
        assert (found.level, found.value["rows_with_eos_inside"]) == (level, int(level == "warning"))

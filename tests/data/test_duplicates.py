"""Repeats and contradictions against a comparison of all pairs, in every form and script that rows have."""

from __future__ import annotations

import itertools
import random
from functools import cache

import numpy as np
import pytest

from ds_align.data.duplicates import DuplicateReport, prompt_overlap, scan_duplicates
from ds_align.data.schemas import Preference
from ds_align.data.text_keys import normalise
from tests.data.preference_texts import pair, random_rows


def single(number: int, prompt: str, completion: str, desirable: bool) -> Preference:
    return Preference(f"f:{number}", prompt, (completion,), desirable)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's recursion, row by row."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        left, row[0] = row[0], number
        for place, second in enumerate(other, 1):
            left, row[place] = row[place], min(left + (letter != second), row[place] + 1, row[place - 1] + 1)
    return row[-1]


@cache
def similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    if abs(len(one) - len(other)) > 0.1 * longest:
        return 0.0
    return 1.0 if not longest else 1 - edit_distance(one, other) / longest


def field_similarity(one: tuple[str, ...], other: tuple[str, ...]) -> float:
    return min(similarity(normalise(a), normalise(b)) for a, b in zip(one, other, strict=True))


def all_pairs(rows: list[Preference]) -> tuple[dict[str, int], list[int]]:
    """Counts and removable rows of text pairs, by comparing every row with every other."""
    fields = [(row.prompt, *row.completions) for row in rows]
    equal = [number for number, (_, chosen, rejected) in enumerate(fields) if chosen == rejected]
    rest = [number for number in range(len(rows)) if number not in equal]
    duplicates = [b for b in rest if any(fields[a] == fields[b] for a in rest if a < b)]
    contradictory = [b for b in rest if any((fields[a][0], *fields[a][:0:-1]) == fields[b] for a in rest)]
    distinct = [
        number
        for number in rest
        if number not in duplicates and normalise(fields[number][1]) != normalise(fields[number][2])
    ]
    group = {number: number for number in distinct}
    for a, b in itertools.combinations(distinct, 2):
        direct = field_similarity(fields[a], fields[b])
        turned = field_similarity(fields[a], (fields[b][0], *fields[b][:0:-1]))
        if direct >= 0.9 and turned < direct:
            old, new = sorted((group[a], group[b]))[::-1]
            group = {number: new if leader == old else leader for number, leader in group.items()}
    near = [number for number, leader in group.items() if leader != number]
    near_equal = [number for number in rest if similarity(*fields[number][1:]) > 0.9]
    keys = {number: tuple(map(normalise, fields[number])) for number in rest}
    keys = {number: key for number, key in keys.items() if key[1] != key[2]}
    opposed = [b for b in keys if any((keys[a][0], *keys[a][:0:-1]) == keys[b] for a in keys)]
    counts = {
        "equal": len(equal),
        "duplicate": len(duplicates),
        "contradictory": len(contradictory),
        "near_duplicate": len(near),
        "near_equal": len(near_equal),
        "near_contradictory": len(set(opposed) - set(contradictory)),
    }
    return counts, sorted(duplicates + near)


@pytest.mark.parametrize("seed", range(8))
def test_small_sets_give_what_comparing_all_pairs_gives(seed: int) -> None:
    rng = random.Random(seed)
    rows = random_rows(rng, 40)
    report = scan_duplicates(rows)
    counts, removable = all_pairs(rows)
    assert report.counts == counts
    assert report.removable.tolist() == removable
    assert report.removable.dtype == np.int64
    assert report.num_rows == 40


def test_the_random_sets_hold_every_kind() -> None:
    reports = [scan_duplicates(random_rows(random.Random(seed), 40)) for seed in range(8)]
    assert all(min(kinds) < max(kinds) for kinds in zip(*(r.counts.values() for r in reports), strict=True))
    assert all(sum(report.counts[kind] for report in reports) > 5 for kind in reports[0].counts)


@pytest.mark.parametrize("seed", range(4))
def test_counts_do_not_depend_on_the_order_of_the_rows(seed: int) -> None:
    rng = random.Random(seed)
    rows = random_rows(rng, 150)
    wanted = scan_duplicates(rows).counts
    for _ in range(3):
        rng.shuffle(rows)
        assert scan_duplicates(rows).counts == wanted


def kinds(report: DuplicateReport) -> list[tuple[str, tuple[str, ...], float]]:
    return [(found.kind, found.origins, round(found.similarity, 4)) for found in report.findings]


def test_each_kind_by_hand() -> None:
    rows = [
        pair(0, "Where does the river Nile end?", "It ends in the Mediterranean Sea.", "In Cairo."),
        pair(1, "Where does the river Nile end?", "It ends in the Mediterranean Sea.", "In Cairo."),
        pair(2, "Where does the river Nile end?", "In Cairo.", "It ends in the Mediterranean Sea."),
        pair(3, "Name one colour of a rainbow.", "Red", "Red"),
        pair(4, "where does  the river NILE end?", "It ends in the Mediterranean sea.", "In Cairo."),
        # 33 characters, one of them exchanged: 1 - 1/33 = 0.9697.
        pair(5, "Where does the river Nile end?", "It ends in the Mediterranean Sea!", "In Cairo."),
        # 1 - 1/20 = 0.95.
        pair(6, "Count to five.", "one two three four 5", "one two three four 6"),
        # Ranked data: one prompt, one chosen answer, another rejected answer.
        pair(7, "Where does the river Nile end?", "It ends in the Mediterranean Sea.", "In Paris."),
    ]
    report = scan_duplicates(rows)
    assert report.counts == {
        "equal": 1, "duplicate": 1, "contradictory": 3, "near_duplicate": 2, "near_equal": 1,
        "near_contradictory": 1,
    }  # fmt: skip
    assert report.removable.tolist() == [1, 4, 5]
    assert kinds(report) == [
        ("equal", ("f:3",), 1.0),
        ("duplicate", ("f:0", "f:1"), 1.0),
        ("contradictory", ("f:0", "f:2"), 1.0),
        ("near_duplicate", ("f:0", "f:4"), 1.0),
        ("near_duplicate", ("f:0", "f:5"), 0.9697),
        ("near_equal", ("f:6",), 0.95),
        ("near_contradictory", ("f:2", "f:4"), 1.0),
    ]
    exact = scan_duplicates(rows, near=False)
    assert exact.counts == report.counts | dict.fromkeys(
        ("near_duplicate", "near_equal", "near_contradictory"), 0
    )
    assert exact.removable.tolist() == [1]


def test_unpaired_rows_by_hand() -> None:
    rows = [
        single(0, "Say hello to the whole class.", "Hello to all of you!", True),
        single(1, "Say hello to the whole class.", "Hello to all of you!", True),
        single(2, "Say hello to the whole class.", "Hello to all of you!", False),
        single(3, "Say hello to the whole class.", "Hello to all of you.", True),
        single(4, "Say hello to the whole class.", "Hello to all of you?", False),
    ]
    report = scan_duplicates(rows)
    # Row 4 is near to row 2 alone, which has its label; row 3 to row 0.
    assert report.removable.tolist() == [1, 3, 4]
    assert report.counts == {
        "equal": 0, "duplicate": 1, "contradictory": 3, "near_duplicate": 2, "near_equal": 0,
        "near_contradictory": 0,
    }  # fmt: skip
    assert ("contradictory", ("f:0", "f:2"), 1.0) in kinds(report)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("كَتَبَ الوَلَدُ الدَّرْسَ", "كتب الولد الدرس"),
        ("العـــــربية لغة جميلة", "العربية لغة جميلة"),
        ("ﷺ ﻻ", "صلى الله عليه وسلم لا"),
        ("ＦＵＬＬ　ｗｉｄｔｈ", "full width"),
        ("Straße\n\tam  Fluss ", "STRASSE am Fluss"),
        ("ガギグ", "ｶﾞｷﾞｸﾞ"),
    ],
)
def test_what_the_key_leaves_out(one: str, other: str) -> None:
    assert one != other
    assert normalise(one) == normalise(other)
    rows = [
        pair(0, one, "the first answer", "another reply"),
        pair(1, other, "the first answer", "another reply"),
    ]
    report = scan_duplicates(rows)
    assert (report.counts["near_duplicate"], report.removable.tolist()) == (1, [1])
    assert rows[0].prompt == one


def test_base_letters_of_arabic_count() -> None:
    assert normalise("قلب") != normalise("كلب")
    assert normalise("أكل") != normalise("اكل")


def test_rows_that_teach_vowel_signs_or_case_are_compared_as_written() -> None:
    rows = [
        pair(0, "شكّل الجملة", "كَتَبَ الوَلَدُ", "كتب الولد"),
        pair(1, "شكّل الجملة", "كتب الولد", "كَتَبَ الوَلَدُ"),
        pair(2, "شكّل الجملة", "كَتَبَ الوَلَدُ", "كَتَبَ الولد"),
        pair(3, "شكّل الجملة", "كَتَبَ الوَلَدُ", "كتب الولد"),
    ]
    report = scan_duplicates(rows)
    assert report.removable.tolist() == [3]
    assert report.counts["contradictory"] == 3
    assert report.counts["near_duplicate"] == 0


def test_a_near_opposite_is_no_repeat() -> None:
    one, other = "The quick brown fox jumps over it.", "The quick brown fox jumps over me."
    report = scan_duplicates([pair(0, "Which?", one, other), pair(1, "Which? ", other, one)])
    assert report.removable.tolist() == []
    assert report.counts["near_equal"] == 2


def test_rows_that_contradict_but_for_case_and_spaces() -> None:
    rows = [
        pair(0, "Is it warm?", "Yes, it is.", "No, it is not."),
        pair(1, "is it  warm? ", "No, it is NOT.", "yes, it is."),
        single(2, "Is it cold?", "A little.", True),
        single(3, "Is it cold? ", "a little.", False),
        pair(4, "Is it dry?", "Yes.", "No."),
    ]
    for some, places in ((rows[:2] + rows[4:], ("f:0", "f:1")), (rows[2:4], ("f:2", "f:3"))):
        report = scan_duplicates(some)
        assert report.counts["near_contradictory"] == 2
        assert ("near_contradictory", places, 1.0) in kinds(report)
        assert sum(report.counts.values()) == 2
        assert report.removable.tolist() == []
        assert sum(scan_duplicates(some, near=False).counts.values()) == 0


def test_a_prompt_is_the_same_as_a_string_and_as_a_message() -> None:
    ask = [{"role": "user", "content": "Is it warm?"}]
    strings = [pair(0, "Is it warm?", "Yes.", "No."), pair(1, "Is it cold?", "Yes.", "No.")]
    talks = [conversation(2, ask, "Certainly.", "Hardly."), conversation(3, [LAST, *ask], "Yes.", "No.")]
    for train, evaluation in ((strings, talks), (talks, strings)):
        report = prompt_overlap(train, evaluation)
        assert (report.exact, report.near) == (1, 0)
    near = [conversation(4, [{"role": "user", "content": "is it warm? "}], "Certainly.", "Hardly.")]
    assert prompt_overlap(strings, near).near == 1


LAST = {"role": "system", "content": "Be brief."}


def messages(*texts: str, last: str = "assistant") -> list[dict]:
    roles = ("user", "assistant") if last == "assistant" else ("assistant", "user")
    return [{"role": roles[-(len(texts) - i) % 2], "content": text} for i, text in enumerate(texts)]


def conversation(number: int, prompt: list[dict], chosen: str, rejected: str, **more: object) -> Preference:
    answers = tuple([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Preference(f"f:{number}", prompt, answers, **more)


LONG = "You are a careful assistant that answers in one short sentence and never invents anything at all. "


def test_conversations_are_compared_message_by_message() -> None:
    def prompt(question: str) -> list[dict]:
        return [{"role": "system", "content": LONG}, {"role": "user", "content": question}]

    rows = [
        conversation(0, prompt("What is 2 + 3?"), "It is five.", "It is six."),
        # Nearly the same text as a whole, but the question is another one.
        conversation(1, prompt("Why is that?"), "It is five.", "It is six."),
        conversation(2, prompt("what is 2 + 3?"), "It is five.", "It is six."),
        conversation(3, prompt("What is 2 + 3?"), "It is five.", "It is six.", tools=[{"name": "add"}]),
        pair(4, LONG + "What is 2 + 3?", "It is five.", "It is six."),
    ]
    report = scan_duplicates(rows)
    assert report.removable.tolist() == [2]
    assert prompt_overlap(rows[:1], rows[1:]).near == 1


def test_token_ids() -> None:
    def ids(number: int, *fields: list[int]) -> Preference:
        prompt, *answers = (np.array(field, dtype=np.int32) for field in fields)
        return Preference(f"f:{number}", prompt, tuple(answers))

    first, second = list(range(100, 130)), list(range(500, 530))
    rows = [
        ids(0, [1, 2, 3], first, second),
        ids(1, [1, 2, 3], first, second),
        ids(2, [1, 2, 3], second, first),
        ids(3, [1, 2, 3], [*first[:-1], 7], second),
        ids(4, [1, 2, 3], first, first),
        ids(5, [1, 2, 3], first, [*first[:-1], 7]),
        # Ids beyond every character are compared exactly.
        ids(6, [1, 2, 2**31 - 1], first, second),
        ids(7, [1, 2, 2**31 - 2], first, second),
        ids(8, [1, 2, 2**31 - 1], first, second),
        pair(9, "1 2 3", "a", "b"),
    ]
    report = scan_duplicates(rows)
    assert report.removable.tolist() == [1, 3, 8]
    assert report.counts == {
        "equal": 1, "duplicate": 2, "contradictory": 3, "near_duplicate": 1, "near_equal": 1,
        "near_contradictory": 0,
    }  # fmt: skip


def test_empty_and_very_short_texts() -> None:
    rows = [
        pair(0, "", "a", "b"),
        pair(1, "", "a", "b"),
        pair(2, "", "A", "b"),
        pair(3, "", "c", "b"),
        pair(4, " ", "a", "b"),
        pair(5, "x", "a", "b"),
        pair(6, "", "", "b"),
        pair(7, "", "\0", "b"),
    ]
    report = scan_duplicates(rows)
    assert report.removable.tolist() == [1, 2, 4]
    assert scan_duplicates([]).counts == dict.fromkeys(report.counts, 0)
    assert scan_duplicates(rows[:1]).removable.tolist() == []
    assert prompt_overlap([], rows).exact == prompt_overlap(rows, []).exact == 0


def test_a_text_of_a_million_characters_is_compared_exactly() -> None:
    text = "word " * 200_000
    rows = [
        pair(0, text, "a", "b"),
        pair(1, text + "x", "a", "b"),
        pair(2, text, "a", "b"),
        pair(3, text, text, text + "x"),
    ]
    report = scan_duplicates(rows)
    assert report.removable.tolist() == [2]
    assert report.counts["near_equal"] == 0

"""The demonstration preferences: what can and what cannot be learned from them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ds_align.demo.data import FRAMINGS, LANGUAGES, SPLITS, TOPICS, preference_rows, write_preferences


def has_arabic(text):
    return any("\u0600" <= character <= "\u06ff" for character in text)


def has_latin(text):
    return any(character.isascii() and character.isalpha() for character in text)


def entity_names(split):
    return {
        entity.subject[language]
        for topic in TOPICS
        for entity in topic.entities[split]
        for language in LANGUAGES
    }


def patterns(split):
    return {
        pattern
        for topic in TOPICS
        for side in (topic.patterns[split].questions, topic.patterns[split].answers)
        for language in LANGUAGES
        for pattern in side[language]
    }


def test_sizes():
    # 8 topics x 16 entities x 4 questions x 2 answers x 2 languages, and 8 x 8 x 2 x 1 x 2.
    assert len(preference_rows("train")) == 8 * 16 * 4 * 2 * 2 == 2048
    assert len(preference_rows("heldout")) == 8 * 8 * 2 * 1 * 2 == 256


@pytest.mark.parametrize("split", SPLITS)
def test_preferred_answer_is_in_the_language_of_the_question(split):
    for row in preference_rows(split):
        arabic_question = has_arabic(row["prompt"])
        assert has_latin(row["prompt"]) != arabic_question
        assert has_arabic(row["chosen"]) == arabic_question or not has_arabic(row["rejected"])
        assert has_latin(row["chosen"]) == (not arabic_question)
        assert has_latin(row["rejected"]) == arabic_question


@pytest.mark.parametrize("split", SPLITS)
def test_answers_alone_do_not_tell_which_is_preferred(split):
    rows = preference_rows(split)
    assert Counter(row["chosen"] for row in rows) == Counter(row["rejected"] for row in rows)
    assert sum(has_arabic(row["prompt"]) for row in rows) == len(rows) // 2


def test_splits_share_no_entity_no_pattern_and_no_text():
    assert entity_names("train").isdisjoint(entity_names("heldout"))
    assert patterns("train").isdisjoint(patterns("heldout"))
    for language in LANGUAGES:
        assert set(FRAMINGS["train"][language]).isdisjoint(FRAMINGS["heldout"][language])
    train, heldout = preference_rows("train"), preference_rows("heldout")
    for fields in (("prompt",), ("chosen", "rejected")):
        texts = [{row[field] for row in rows for field in fields} for rows in (train, heldout)]
        assert texts[0].isdisjoint(texts[1])


def test_patterns_are_parallel_and_complete():
    for topic in TOPICS:
        for split in SPLITS:
            for side in (topic.patterns[split].questions, topic.patterns[split].answers):
                assert len(side["en"]) == len(side["ar"]) == len(set(side["en"])) == len(set(side["ar"]))
            assert all("{x}" in text for texts in topic.patterns[split].questions.values() for text in texts)
            assert all("{y}" in text for texts in topic.patterns[split].answers.values() for text in texts)
            assert all(
                has_arabic(text) and not has_latin(text.replace("{x}", "").replace("{y}", ""))
                for side in (topic.patterns[split].questions, topic.patterns[split].answers)
                for text in side["ar"]
            )


def test_framings_are_parallel():
    for framings in FRAMINGS.values():
        assert (
            len(framings["en"]) == len(framings["ar"]) == len(set(framings["en"])) == len(set(framings["ar"]))
        )
        assert all("{x}" in text for texts in framings.values() for text in texts)


def test_same_seed_same_rows():
    assert preference_rows("train", seed=3) == preference_rows("train", seed=3)
    assert preference_rows("train", seed=3) != preference_rows("train", seed=4)


def test_file_is_readable_json_lines(tmp_path):
    path = tmp_path / "heldout.jsonl"
    write_preferences(path, "heldout")
    text = path.read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == preference_rows("heldout")
    assert "\\u" not in text

"""The demonstration preferences: the preferred answer is in the language of the question.

Each question is asked in English and in Arabic with the same two answers, one a language each, so the
chosen and the rejected answers of a split are the same texts: nothing about an answer alone says which
one is preferred, only the question does. The held-out split has other entities and other patterns.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from ds_align.demo.lexicon import Entity, Topic, read_pairs
from ds_align.demo.topics_living import ANIMALS, CITIES, FOODS, JOBS
from ds_align.demo.topics_things import COLOURS, NUMBERS, OPPOSITES, TOOLS

TOPICS = (CITIES, ANIMALS, FOODS, JOBS, NUMBERS, COLOURS, OPPOSITES, TOOLS)
LANGUAGES = ("en", "ar")
SPLITS = ("train", "heldout")
_ANSWERS_PER_QUESTION = {"train": 2, "heldout": 1}

# What stands around a question, {x}: without it, a few hundred questions would be learned by heart.
FRAMINGS = {
    "train": read_pairs("""
        {x} | {x}
        Please answer: {x} | أجب من فضلك: {x}
        Hello! {x} | مرحبًا! {x}
        I have a question. {x} | عندي سؤال. {x}
        My teacher asks: {x} | يسأل معلّمي: {x}
        {x} Thank you. | {x} شكرًا لك.
        Quick question: {x} | سؤال سريع: {x}
        {x} I want to know. | {x} أريد أن أعرف.
    """),
    "heldout": read_pairs("""
        Dear friend! {x} | صديقي العزيز! {x}
        {x} Answer me quickly. | {x} أجبني بسرعة.
    """),
}

PreferenceRow = dict[str, str]


def preference_rows(split: str, *, seed: int = 0) -> list[PreferenceRow]:
    """Return the rows {prompt, chosen, rejected} of "train" (2048) or "heldout" (256), shuffled by `seed`.

    A prompt ends with a line break and an answer starts right after it.
    """
    generator = random.Random(f"{split}-{seed}")
    rows = [row for topic in TOPICS for row in _topic_rows(topic, split, generator)]
    generator.shuffle(rows)
    return rows


def write_preferences(path: Path, split: str, *, seed: int = 0) -> None:
    """Write the rows of a split as JSON lines in UTF-8, Arabic left readable."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in preference_rows(split, seed=seed))
    path.write_text("".join(lines), encoding="utf-8")


def _topic_rows(topic: Topic, split: str, generator: random.Random) -> Iterator[PreferenceRow]:
    patterns = topic.patterns[split]
    num_questions, num_answers = len(patterns.questions["en"]), len(patterns.answers["en"])
    for entity, question in itertools.product(topic.entities[split], range(num_questions)):
        for answer in generator.sample(range(num_answers), _ANSWERS_PER_QUESTION[split]):
            framing = generator.randrange(len(FRAMINGS[split]["en"]))
            answers = {
                language: _fill(patterns.answers[language][answer], entity, language)
                for language in LANGUAGES
            }
            for language, other in (LANGUAGES, LANGUAGES[::-1]):
                asked = _fill(patterns.questions[language][question], entity, language)
                prompt = FRAMINGS[split][language][framing].format(x=asked) + "\n"
                yield {"prompt": prompt, "chosen": answers[language], "rejected": answers[other]}


def _fill(pattern: str, entity: Entity, language: str) -> str:
    text = pattern.format(x=entity.subject[language], y=entity.answer[language])
    return text[0].upper() + text[1:]

"""The shape of the demonstration data's words and sentence patterns, in English and Arabic.

A topic has entities (the thing asked about and its answer, in both languages) and patterns for
questions and answers. Training and held-out rows share neither entities nor patterns. The nth English
pattern and the nth Arabic one say the same, so an answer is equally good in both languages.
Arabic patterns are built so that no word has to agree with the gender of what is filled in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing to ask about (`{x}` in a pattern) and the answer (`{y}`), by language code "en" and "ar"."""

    subject: dict[str, str]
    answer: dict[str, str]


@dataclass(frozen=True, slots=True)
class Patterns:
    """Question and answer patterns by language code; lists of the two languages run in parallel."""

    questions: dict[str, tuple[str, ...]]
    answers: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic of the demonstration data with the entities and patterns of each split."""

    name: str
    entities: dict[str, tuple[Entity, ...]]
    patterns: dict[str, Patterns]


def read_entities(table: str) -> tuple[Entity, ...]:
    """Read a table of lines `subject en | subject ar | answer en | answer ar`."""
    found = []
    for line in table.strip().splitlines():
        subject_en, subject_ar, answer_en, answer_ar = (cell.strip() for cell in line.split("|"))
        found.append(Entity({"en": subject_en, "ar": subject_ar}, {"en": answer_en, "ar": answer_ar}))
    return tuple(found)


def read_pairs(table: str) -> dict[str, tuple[str, ...]]:
    """Read a table of lines `english text | arabic text` into one tuple a language, in parallel."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return {"en": tuple(row[0] for row in rows), "ar": tuple(row[1] for row in rows)}


def read_patterns(questions: str, answers: str) -> Patterns:
    """Read two tables of lines `english pattern | arabic pattern`."""
    return Patterns(questions=read_pairs(questions), answers=read_pairs(answers))

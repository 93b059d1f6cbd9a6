"""Preference rows of every kind that the data room meets, from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [
    "the",
    "cat",
    "sat",
    "hello",
    "world",
    "عاصمة",
    "مصر",
    "dog",
    "barked",
    "Cairo",
    "\u202ahidden",
    "mat",
]


def write(path: Path, num_rows: int, seed: int, *, labels: bool = False) -> Path:
    """JSONL with strings, conversations and ids, repeats, contradictions, equal pairs and bad rows."""
    rng = random.Random(seed)
    lines: list[str] = []
    rows: list[dict] = []
    for number in range(num_rows):
        kind = rng.random()
        if rows and kind < 0.1:
            row = rng.choice(rows)
        elif rows and kind < 0.2:
            row = opposite(rng.choice(rows))
        else:
            row = fresh(rng, labels=labels)
        if number % 397 == 200:
            lines.append('{"prompt": ')
        rows.append(row)
        lines.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fresh(rng: random.Random, *, labels: bool) -> dict:
    kind = rng.random()
    names = ("completion",) if labels else ("chosen", "rejected")
    extra = {"label": rng.random() < 0.5} if labels else {}
    if kind < 0.2:
        ids = {f"{name}_ids": [rng.randrange(200) for _ in range(rng.randint(1, 30))] for name in names}
        return {"prompt_ids": [rng.randrange(50)], **ids, **extra}
    prompt = text(rng, 12)
    answers = {name: " " + text(rng, 20) for name in names}
    if kind < 0.6:
        if labels and kind < 0.3:
            extra["kl_completion"] = " " + text(rng, 20)
        return {"prompt": prompt, **answers, **extra}
    talk = {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}
    return {"prompt": [{"role": "user", "content": prompt}], **talk, **extra}


def opposite(row: dict) -> dict:
    if "label" in row:
        return {**row, "label": not row["label"]}
    pairs = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"))
    swapped = {a: row[b] for one, two in pairs if one in row for a, b in ((one, two), (two, one))}
    return {**row, **swapped}


def text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def contents(dataset) -> list[tuple]:
    """All rows as plain values."""
    names = (
        ("prompt_ids", "chosen_ids", "rejected_ids")
        if dataset.inputs == "pairs"
        else ("prompt_ids", "completion_ids", "desirable", "kl_ids")
    )

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else value

    return [tuple(plain(getattr(row, name)) for name in names) for row in dataset]


def facts(dataset) -> dict:
    """Everything that a user sees of a data set."""
    return {
        "name": dataset.name,
        "rows": contents(dataset),
        "counts": list(dataset.counts.items()),
        "notes": dataset.notes,
        "digest": dataset.digest(),
        "lengths": dataset.completion_lengths.tolist(),
        "kl_lengths": dataset.kl_lengths.tolist(),
        "keys": dataset.prompt_keys.tolist(),
    }


def row(number: int) -> dict:
    """One plain pair."""
    return {"prompt": f"the cat {number}", "chosen": f" sat {number}", "rejected": " barked"}


def is_hit(dataset) -> bool:
    """Whether no process tokenized for it."""
    return dataset.num_processes == 0

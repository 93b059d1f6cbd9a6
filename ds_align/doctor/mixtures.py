"""The parts of a mixture held against each other: rows of one that repeat or contradict rows of another."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from ds_align.data import PreferenceDataset
from ds_align.data.tables import first_appearances
from ds_align.data.text_keys import signed_digest

_OPPOSITE = np.array([1, 0], dtype=np.uint64)


def across_parts(data: PreferenceDataset) -> tuple[int, int]:
    """(rows that repeat a row of an earlier part, rows that say the opposite of a row of another part).

    By the tokens as they are trained on, to the last one; O(rows).
    """
    keys, parts = _keys(data), data.sources
    groups = first_appearances(np.concatenate([keys, keys ^ _OPPOSITE]))
    own, opposite = groups[: len(keys)], groups[len(keys) :]
    lowest = np.full(len(groups), len(data.parts))
    highest = np.full(len(groups), -1)
    np.minimum.at(lowest, own, parts)
    np.maximum.at(highest, own, parts)
    repeats = parts > lowest[own]
    # Where no row says the opposite, highest is -1 and lowest no part.
    opposed = (highest[opposite] >= 0) & ((lowest[opposite] != parts) | (highest[opposite] != parts))
    return int(repeats.sum()), int(opposed.sum())


def _keys(data: PreferenceDataset) -> np.ndarray:
    """uint64 [rows, 2]: equal for equal rows; of those that say the opposite of each other bit 0 differs."""
    answers, labels = data.tables.completions, data.tables.desirable
    found = []
    for prompt, numbers in zip(data.prompt_keys, data.completion_index, strict=True):
        digests = [blake2b(answers[number], digest_size=16).digest() for number in numbers]
        label = None if labels is None else bool(labels[numbers[0]])
        found.append(signed_digest(prompt.tobytes(), digests, label))
    return np.frombuffer(b"".join(found), dtype="<u8").reshape(-1, 2)

"""What two preferences are compared by: a hash of the exact content, and texts freed of what rarely matters.

Only keys are made here; the text that is trained on is never touched.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from ds_align.data.contents import Content, as_turns
from ds_align.data.schemas import Preference

# The shape of a content, which must be equal, then its texts, which may be nearly equal.
Texts = tuple[str, ...]

# Longer texts are near-equal to none but those with the same key: the edit distance of two such texts takes
# seconds.
MAX_COMPARED_CHARACTERS = 2**17
# White space of every kind became a blank, so that this one separates.
_SEPARATOR = "\x1f"
# Vowel signs, Koranic marks and the stretching character; base letters stay.
_ARABIC_MARKS = re.compile(
    "[\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed]"
)
# Token ids become characters without case, composition or white space, so that they compare as text does.
_FIRST_ID_CHARACTER = 0x20000
_MAX_IDS = 0x110000 - _FIRST_ID_CHARACTER


def normalise(text: str) -> str:
    """A key of a text: NFKC, case folded, white space as single blanks, no Arabic vowel signs, no tatweel."""
    if not text.isascii():
        text = _ARABIC_MARKS.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.casefold().split())


def exact_digest(content: Content, extra: Any = None) -> bytes:
    """128 bits of a content as it is; a string, a conversation and token ids never have the same."""
    if isinstance(content, str):
        kind, raw = b"text", content.encode("utf-8", "surrogatepass")
    elif isinstance(content, np.ndarray):
        kind, raw = b"ids", np.ascontiguousarray(content, dtype="<i4").tobytes()
    else:
        kind, raw = b"messages", _as_json(content).encode("utf-8", "surrogatepass")
    digest = blake2b(raw, digest_size=16, person=kind).digest()
    if not extra:
        return digest
    raw = digest + _as_json(extra).encode("utf-8", "surrogatepass")
    return blake2b(raw, digest_size=16, person=b"extra").digest()


def has_equal_answers(preference: Preference) -> bool:
    """Whether a pair has one answer twice; a ranked list is never said to."""
    if not _is_pair(preference):
        return False
    chosen, rejected = preference.completions
    if isinstance(chosen, np.ndarray) or isinstance(rejected, np.ndarray):
        return np.array_equal(chosen, rejected)
    return chosen == rejected


def _is_pair(preference: Preference) -> bool:
    """Whether a row is one pair; a ranked list may hold any number, and is compared as a whole."""
    return len(preference.completions) == 2 and preference.comparisons == ((0, 1),)


def preference_digest(preference: Preference) -> bytes:
    """128 bits that a preference shares with its repeats; in one that says the opposite, bit 0 differs."""
    prompt = exact_digest(preference.prompt, preference.tools)
    answers = [exact_digest(content) for content in preference.completions]
    if preference.desirable is None and not _is_pair(preference):
        order = repr(preference.comparisons).encode()
        key = blake2b(b"".join((prompt, *answers, order)), digest_size=16, person=b"ranked").digest()
        return bytes([key[0] & 0xFE]) + key[1:]
    return signed_digest(prompt, answers, preference.desirable)


def signed_digest(prompt: bytes, answers: Sequence[bytes], desirable: bool | None) -> bytes:  # noqa: FBT001
    """128 bits of a prompt and its answers in any order; bit 0 is their sense.

    That is the label of a single answer (desirable), else which of two answers is the better one: rows that
    say the opposite of each other differ in this bit alone.
    """
    sense = answers[0] > answers[-1] if desirable is None else desirable
    key = blake2b(b"".join((prompt, *sorted(answers))), digest_size=16).digest()
    return bytes([key[0] & 0xFE | sense]) + key[1:]


def prompt_texts(preference: Preference) -> Texts:
    """The texts of the prompt; tools belong to its shape."""
    return comparable(preference.prompt, preference.tools)


def asked_digest(preference: Preference) -> bytes:
    """128 bits that a prompt shares with the same question in another form: a string, or a user's message."""
    return exact_digest(_asked(preference), preference.tools)


def asked_texts(preference: Preference) -> Texts:
    """prompt_texts, the same for a string and for a user's message."""
    return comparable(_asked(preference), preference.tools)


def _asked(preference: Preference) -> Content:
    prompt = preference.prompt
    return as_turns(prompt, "user") if isinstance(prompt, str) else prompt


def field_texts(preference: Preference) -> tuple[Texts, ...]:
    """The texts of the prompt and of each completion; a label belongs to the shape of its completion."""
    if preference.desirable is None and not _is_pair(preference):
        return prompt_texts(preference), *_list_texts(preference)
    completions = (comparable(content, preference.desirable) for content in preference.completions)
    return prompt_texts(preference), *completions


def _list_texts(preference: Preference) -> tuple[Texts, Texts]:
    """The answers of a ranked list in as many fields as a pair has: the first, and all others.

    Lists that compare their answers otherwise have other shapes.
    """
    first, *others = (comparable(content, preference.comparisons) for content in preference.completions)
    shapes = [texts[0] for texts in others]
    return first, (_as_json(["others", *shapes]), *(text for texts in others for text in texts[1:]))


def comparable(content: Content, extra: Any = None) -> Texts:
    """The shape of a content (extra, kind, and every key of a message but its text), then its texts."""
    shape = "" if extra is None else _as_json(extra)
    if isinstance(content, str):
        return shape, normalise(content)
    if isinstance(content, np.ndarray):
        if content.size and int(content.max()) >= _MAX_IDS:
            return f"{shape} ids {exact_digest(content).hex()}", ""
        codes = (content.astype("<u4") + np.uint32(_FIRST_ID_CHARACTER)).tobytes()
        return f"{shape} ids", codes.decode("utf-32-le")
    rest = [{key: item for key, item in message.items() if key != "content"} for message in content]
    texts = (normalise(message["content"] or "") for message in content)
    return f"{shape} {_as_json(rest)}", *texts


def texts_digest(fields: tuple[Texts, ...], *, desirable: bool | None = None) -> bytes:
    """128 bits of normalised texts and their shapes; in a row that says the opposite, bit 0 differs.

    desirable: the label that the shape of a single answer begins with.
    """
    prompt, *answers = (_SEPARATOR.join(texts) for texts in fields)
    if desirable is not None:
        answers = [answers[0].removeprefix(_as_json(desirable))]
    prompt_key, *keys = (exact_digest(text) for text in (prompt, *answers))
    # A prompt by itself, as overlaps are found, has no sense.
    return signed_digest(prompt_key, keys, desirable) if keys else prompt_key


def num_characters(texts: Texts) -> int:
    """Characters of the texts, the shape left out."""
    return sum(map(len, texts[1:]))


def fields_similarity(left: tuple[Texts, ...], right: tuple[Texts, ...], least: float) -> float:
    """The edit similarity of the pair of texts that differs most; 0.0 below `least` or for other shapes."""
    lowest = 1.0
    for one, other in zip(left, right, strict=True):
        if len(one) != len(other) or one[0] != other[0]:
            return 0.0
        for text, second in zip(one[1:], other[1:], strict=True):
            lowest = min(lowest, edit_similarity(text, second, least))
            if not lowest:
                return 0.0
    return lowest


def edit_similarity(text: str, other: str, least: float) -> float:
    """1 - (Levenshtein distance) / (characters of the longer text); 0.0 where that is below `least`."""
    from rapidfuzz.distance import Levenshtein

    if text == other:
        return 1.0
    return Levenshtein.normalized_similarity(text, other, score_cutoff=least)


def answer_similarity(preference: Preference, least: float) -> float:
    """Edit similarity of a pair's answers as written; 0.0 below `least`, for very long ones, for lists."""
    if not _is_pair(preference):
        return 0.0
    chosen, rejected = (_written(content) for content in preference.completions)
    if max(len(chosen), len(rejected)) > MAX_COMPARED_CHARACTERS:
        return 0.0
    return edit_similarity(chosen, rejected, least)


def _written(content: Content) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, np.ndarray):
        return comparable(content)[-1]
    return "\n".join(message["content"] or "" for message in content)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)

"""The built-in classifier: counts the words of a text that give its dialect away, and says so if they do not.

It knows no context and no sound. What it labels is meant to be right; the rest is "unknown". A dialect that
has no label here (Iraqi, Sudanese, Yemeni) shares words with its neighbours and may get their label.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from ds_align.arabic.lexicon import MARKERS, PHRASES, SHARED, STRONG, WEAK, WORD_FORMS
from ds_align.arabic.normalise import fold, is_arabic, is_arabic_script, words

# Evidence below this is thin: one strong marker or two weak ones reach it.
THIN = 2
# The best dialect must lead the next by so many points.
MARGIN = 1
# Of the words in Arabic script, so many may have letters that Arabic does not have.
MAX_FOREIGN = 0.2
UNKNOWN = "unknown"
# A quotation of up to three words is an example of how someone speaks; a longer one is speech.
_FEW = r"[^\s{0}]+(?:\s+[^\s{0}]+){{0,2}}"
_QUOTED = re.compile("|".join(f"{a}\\s*{_FEW.format(a + b)}\\s*{b}" for a, b in ("«»", "“”", '""')))
_MIN_WORDS = 3
# The conjunction wa-, and the article alone or after a one-letter word. Without fa-, which would make Gulf
# wayid of the standard fawa'id.
_CLITICS = (re.compile("و(?=\\w{3})"), re.compile("[وف]?(?:[بك]?ال|لل)(?=\\w{3})"))


@dataclass(frozen=True, slots=True)
class Label:
    """What a text is taken for. confidence: 0 (nothing is known) to 1, None where its giver has none.

    For the built-in scorer it is s/(s + r) * (1 - 2**(-s/2)), s the points of the label and r those of the
    best other one: the share of the evidence times how much of it there is. It orders labels; it is no
    calibrated probability.
    """

    name: str
    confidence: float | None


def score(text: str) -> dict[str, int]:
    """Points of each label: the sum of the weights of the distinct markers that the text holds.

    A marker that stands twice is no new evidence, nor is a word in quotation marks that is spoken about. Text
    that is not Arabic has no points.
    """
    points = dict.fromkeys(MARKERS, 0)
    found = [(word, _look_at(word)) for word in _spoken(text)]
    found = [(word, seen) for word, seen in found if seen.is_script]
    foreign = sum(seen.is_foreign for _, seen in found)
    if not found or foreign > MAX_FOREIGN * len(found):
        return points
    evidence: set[object] = set()
    for _, seen in found:
        evidence.update(seen.evidence)
    evidence.update(_phrases_in([word for word, _ in found]))
    weights = _weights()
    for item in evidence:
        for label, weight in weights[item].items():
            points[label] += weight
    return points


def _spoken(text: str) -> list[str]:
    """The words without those that are quoted, a few at a time; all, where hardly any other is there."""
    unquoted = list(words(_QUOTED.sub(" ", text)))
    return unquoted if len(unquoted) >= _MIN_WORDS else list(words(text))


def label_text(text: str) -> Label:
    """The dialect of a text by the lexicon; "unknown" where the evidence is thin, tied or mixed.

    A dialect needs THIN points, MARGIN more than every other dialect, and half as many as the standard
    language. The standard language needs THIN points and no point of any dialect. O(words).
    """
    points = score(text)
    standard = points.pop("msa")
    (best, most), (_, second) = sorted(points.items(), key=lambda item: -item[1])[:2]
    if most == 0 and standard >= THIN:
        return Label("msa", _confidence(standard, 0))
    if most >= THIN and most - second >= MARGIN and 2 * most >= standard:
        return Label(best, _confidence(most, max(second, standard)))
    return Label(UNKNOWN, 0.0)


def label_texts(texts: Sequence[str]) -> list[Label]:
    """label_text of each."""
    return [label_text(text) for text in texts]


def _confidence(points: int, others: int) -> float:
    return points / (points + others) * (1.0 - 2.0 ** (-points / 2))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a word is by itself. evidence: keys of _weights()."""

    is_script: bool
    is_foreign: bool
    evidence: tuple[object, ...]


# Few words make most of any text.
@lru_cache(maxsize=1 << 16)
def _look_at(word: str) -> _Seen:
    forms = [form for form, regex in _word_forms() if regex.fullmatch(word)]
    marker = _marker_in(word)
    return _Seen(is_arabic_script(word), not is_arabic(word), (*forms, *([] if marker is None else [marker])))


def _marker_in(word: str) -> str | None:
    """The marker that a word is, else the one that is left without its conjunction or article."""
    weights = _weights()
    if word in weights:
        return word
    for clitic in _CLITICS:
        start = clitic.match(word)
        if start is not None and word[start.end() :] in weights:
            return word[start.end() :]
    return None


def _phrases_in(found: list[str]) -> Iterator[int]:
    """Numbers of the phrases that stand in these words."""
    by_first = _phrases()
    for place, word in enumerate(found):
        for number, regex, not_after in by_first.get(word, ()):
            if place and found[place - 1] in not_after:
                continue
            if regex.match(" ".join(found[place + 1 : place + 3])):
                yield number


@cache
def _weights() -> dict[object, dict[str, int]]:
    """Weights of what counts: a folded marker, a phrase by its number, a word form by -1 less its number."""
    table: dict[object, dict[str, int]] = {}
    for label, markers in MARKERS.items():
        for text, weight in ((markers.strong, STRONG), (markers.weak, WEAK)):
            for word in fold(text).split():
                table.setdefault(word, {}).setdefault(label, weight)
    for text, labels in SHARED:
        for word in fold(text).split():
            for label in labels:
                table.setdefault(word, {}).setdefault(label, WEAK)
    table.update({number: phrase.weights for number, phrase in enumerate(PHRASES)})
    table.update({-1 - number: form.weights for number, form in enumerate(WORD_FORMS)})
    return table


@cache
def _word_forms() -> list[tuple[int, re.Pattern[str]]]:
    return [(-1 - number, re.compile(form.regex)) for number, form in enumerate(WORD_FORMS)]


@cache
def _phrases() -> dict[str, list[tuple[int, re.Pattern[str], frozenset[str]]]]:
    """First word to the phrases that it may begin: number, the rest, and what must not stand before it."""
    table: dict[str, list[tuple[int, re.Pattern[str], frozenset[str]]]] = {}
    for number, phrase in enumerate(PHRASES):
        rest = re.compile(rf"(?:{phrase.then})(?!\S)" if phrase.then else "")
        for word in fold(phrase.first).split():
            table.setdefault(word, []).append((number, rest, frozenset(phrase.not_after.split())))
    return table

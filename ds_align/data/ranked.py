"""Ranked lists: several answers to one prompt with scores or ranks, and the pairs that are made of them.

The answers stand in `completions` (or `responses`, `answers`, `generations`): strings, message lists, or
objects that hold the text and perhaps its score or rank. Scores (`scores`, `ratings`) are better when they
are higher, ranks (`ranks`) when they are lower: 1 is the best. A column goes before what the objects say,
scores before ranks. An answer without a text or a value (null, NaN, "N/A") is left out and counted.

What is drawn is drawn by a hash of the answer and its prompt: it depends neither on the order of the rows or
of the answers nor on who reads them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np

from ds_align.data.contents import Content, RowError, as_content, as_number, present, require

RankedPairs = Literal["all", "best_worst", "best_random"]
Comparisons = tuple[tuple[int, int], ...]

OTHER_LISTS = ("responses", "answers", "generations")
OTHER_SCORES = ("ratings",)
TEXT_KEYS = ("response", "answer", "content", "text")
_SCORE_KEYS = ("overall_score", "score", "rating")
_RANK_KEYS = ("rank",)
# A gap of 0.1 between 0.3 and 0.2 is a little less than 0.1 in binary.
_ROUNDING = 1e-9


class PairFields(Protocol):
    """The settings of a config that say which pairs are made and kept."""

    ranked_pairs: RankedPairs
    ranked_min_gap: float | None
    min_score_margin: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class PairRules:
    """Which pairs are made of a ranked list, and which scored pairs are kept; None is no limit.

    seed is 0 unless something is drawn by it, so that equal rules mean equal pairs.
    """

    ranked_pairs: RankedPairs = "best_worst"
    ranked_min_gap: float | None = None
    min_score_margin: float | None = None
    seed: int = 0

    @classmethod
    def from_config(cls, config: PairFields) -> PairRules:
        """Take the rules from a config."""
        seed = config.seed if config.ranked_pairs == "best_random" else 0
        return cls(config.ranked_pairs, config.ranked_min_gap, config.min_score_margin, seed)


class ListColumns(Protocol):
    """Names of the columns of a ranked list."""

    completions: str
    scores: str
    ranks: str


@dataclass(frozen=True, slots=True)
class RankedList:
    """Answers and their values, higher is better; columns: the names of what was read.

    places: where each answer stands in the row; num_unusable: answers that are left out.
    """

    answers: list[Content]
    values: list[float]
    columns: tuple[str, ...]
    places: tuple[str, ...] = ()
    num_unusable: int = 0


def list_column(row: Mapping[str, Any], columns: ListColumns) -> str | None:
    """The column that holds a list of answers; None where there is none."""
    name = present(row, columns.completions, "completions", OTHER_LISTS)
    return name if isinstance(row.get(name), list | tuple | np.ndarray) else None


def read_ranked_list(row: Mapping[str, Any], columns: ListColumns) -> RankedList:
    """The answers of a row and what they are worth. Raises RowError."""
    name = list_column(row, columns) or columns.completions
    items = require(row, name, "a list of answers")
    if not isinstance(items, list | tuple | np.ndarray):
        raise RowError(f"column {name!r} holds {type(items).__name__}, expected a list of answers")
    if len(items) < 2:
        raise RowError(f"column {name!r} has {len(items)} answer(s), expected two or more to compare")
    answers = [_answer(item, f"{name}[{number}]") for number, item in enumerate(items)]
    values, source = _values(row, items, name, columns)
    usable = [
        number
        for number, (answer, value) in enumerate(zip(answers, values, strict=True))
        if answer is not None and value is not None
    ]
    if len(usable) < 2:
        raise RowError(
            f"column {name!r} has {len(usable)} of {len(items)} answers with a text and a value, expected "
            "two or more to compare"
        )
    return RankedList(
        [answers[number] for number in usable],
        [values[number] for number in usable],
        (name, source),
        tuple(f"{name}[{number}]" for number in usable),
        len(items) - len(usable),
    )


def _answer(item: Any, place: str) -> Content | None:
    """The text or the messages of an answer; None where it has none."""
    if item is None or (isinstance(item, str) and not item.strip()):
        return None
    if not isinstance(item, Mapping):
        return as_content(item, place)
    if "role" in item or "from" in item:
        # A template would see a score that stands in a message.
        return as_content({key: item[key] for key in item if key not in _VALUE_KEYS}, place)
    if not any(key in item for key in TEXT_KEYS):
        found = ", ".join(map(str, item)) or "nothing"
        raise RowError(f"column {place!r} has {found}, expected one of {', '.join(TEXT_KEYS)} with the text")
    text = next((item[key] for key in TEXT_KEYS if item.get(key) is not None), None)
    return None if text is None or (isinstance(text, str) and not text.strip()) else as_content(text, place)


_VALUE_KEYS = (*_SCORE_KEYS, *_RANK_KEYS)


def _values(
    row: Mapping[str, Any], items: Sequence[Any], name: str, columns: ListColumns
) -> tuple[list[float | None], str]:
    """What the answers are worth, higher is better (None: unknown), and the name of what says so."""
    scores = present(row, columns.scores, "scores", OTHER_SCORES)
    for column, sign in ((scores, 1.0), (columns.ranks, -1.0)):
        if row.get(column) is not None:
            return _signed(_numbers(row[column], column, len(items)), sign), column
    objects = [item for item in items if isinstance(item, Mapping)]
    for key in (*_SCORE_KEYS, *_RANK_KEYS):
        if len(objects) == len(items) and any(item.get(key) is not None for item in objects):
            sign = -1.0 if key in _RANK_KEYS else 1.0
            found = [_value(item.get(key), f"{name}[{number}].{key}") for number, item in enumerate(objects)]
            return _signed(found, sign), key
    raise RowError(
        f"column {name!r} is a list of answers without scores or ranks, found {', '.join(map(str, row))}; "
        f"give a column {columns.scores!r} or {columns.ranks!r}, or answers that are objects with "
        f"{', '.join(_VALUE_KEYS)}"
    )


def _signed(values: list[float | None], sign: float) -> list[float | None]:
    return [None if value is None else sign * value for value in values]


def _value(value: Any, column: str) -> float | None:
    """A finite number; None for what says that there is none."""
    is_nan = isinstance(value, float | np.floating) and np.isnan(value)
    said = isinstance(value, str) and value.strip().lower() in _NO_VALUE
    return None if value is None or is_nan or said else as_number(value, column)


_NO_VALUE = ("", "n/a", "na", "nan", "none", "null")


def _numbers(values: Any, column: str, num_answers: int) -> list[float | None]:
    if not isinstance(values, list | tuple | np.ndarray):
        raise RowError(
            f"column {column!r} holds {type(values).__name__}, expected a list of {num_answers} numbers"
        )
    if len(values) != num_answers:
        raise RowError(f"column {column!r} has {len(values)} numbers for {num_answers} answers")
    return [_value(value, f"{column}[{number}]") for number, value in enumerate(values)]


def choose_pairs(
    ranked: RankedList, prompt: Content | None, rules: PairRules
) -> tuple[Comparisons, Counter[str]]:
    """Which answers are compared, as (chosen, rejected) numbers of answers, and what was left out.

    all: every two answers. best_worst: the best with the worst. best_random: the best with one of those that
    are worse, drawn by the seed. Of several best or worst answers one is drawn. Answers of equal value give
    no pair (counted as ranked_ties), nor do those nearer than ranked_min_gap (ranked_below_gap).
    """
    values, left_out = ranked.values, Counter[str]()
    if rules.ranked_pairs == "all":
        wanted = list(combinations(range(len(values)), 2))
    else:
        best = _draw(_those_worth(values, max(values)), ranked, prompt, rules.seed)
        low = _those_worth(values, min(values))
        if rules.ranked_pairs == "best_random":
            far = [number for number in range(len(values)) if not _why_not(values, best, number, rules)]
            low = far or low
        # Where all are equal the best is among the worst.
        others = [number for number in low if number != best]
        wanted = [(best, _draw(others, ranked, prompt, rules.seed))]
    kept = []
    for pair in wanted:
        reason = _why_not(values, *pair, rules)
        if reason is None:
            kept.append(pair if values[pair[0]] > values[pair[1]] else pair[::-1])
        else:
            left_out[reason] += 1
    return tuple(kept), left_out


def _those_worth(values: list[float], value: float) -> list[int]:
    return [number for number, other in enumerate(values) if other == value]


def _why_not(values: list[float], one: int, other: int, rules: PairRules) -> str | None:
    """What two answers that give no pair are counted as."""
    gap = abs(values[one] - values[other])
    if gap == 0:
        return "ranked_ties"
    return None if is_at_least(gap, rules.ranked_min_gap) else "ranked_below_gap"


def is_at_least(gap: float, limit: float | None) -> bool:
    """Whether a difference reaches its limit, but for rounding."""
    return limit is None or gap >= limit - _ROUNDING * max(1.0, abs(limit))


def _draw(numbers: list[int], ranked: RankedList, prompt: Content | None, seed: int) -> int:
    """One of the answers; each is as likely as the others over many prompts."""
    if len(numbers) == 1:
        return numbers[0]
    return min(numbers, key=lambda number: _ticket([seed, prompt, ranked.answers[number]]))


def _ticket(content: list[Any]) -> bytes:
    return blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).digest()


def answer_labels(comparisons: Comparisons) -> dict[int, bool | None]:
    """The answers as labelled examples, each once: an answer that wins more of the comparisons than it loses
    is desirable (True), one that loses more is not; None where it wins as many as it loses.
    """
    balance: Counter[int] = Counter()
    for chosen, rejected in comparisons:
        balance[chosen] += 1
        balance[rejected] -= 1
    return {number: None if wins == 0 else wins > 0 for number, wins in balance.items()}

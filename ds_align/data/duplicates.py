"""Repeats, contradictions and overlap of preferences, in memory that does not grow with the texts."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ds_align.data.near_pairs import (
    LEAST_SIMILARITY,
    Groups,
    Matches,
    PreferenceRows,
    Search,
    count_characters,
    no_opposite,
)
from ds_align.data.schemas import Preference
from ds_align.data.tables import first_appearances
from ds_align.data.text_keys import (
    MAX_COMPARED_CHARACTERS,
    Texts,
    answer_similarity,
    asked_digest,
    asked_texts,
    field_texts,
    has_equal_answers,
    preference_digest,
    texts_digest,
)

KINDS = ("equal", "duplicate", "contradictory", "near_duplicate", "near_equal", "near_contradictory")
_OPPOSITE = np.array([1, 0], dtype=np.uint64)
_MEGABYTE = 2**20
# Texts that are hashed or compared together, and what sorting takes.
_WORKING_BYTES = 96 * _MEGABYTE
_OVERLAP_BYTES = 256 * _MEGABYTE


@dataclass(frozen=True, slots=True)
class Finding:
    """One example of a kind: the rows that it is about, in file order, and how similar they are (0 to 1)."""

    kind: str
    origins: tuple[str, ...]
    similarity: float


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """What was found in a data set.

    counts, by kind, every kind always there: equal, duplicate and near_duplicate are rows that teach nothing
    (more), contradictory, near_contradictory and near_equal rows that are concerned and stay. A row counts in
    one of equal, duplicate and near_duplicate at most, and in one kind of contradictory. findings: the first
    of each kind in file order. removable int64: the sorted numbers of the duplicate and near_duplicate rows;
    equal ones are dropped by every load.
    """

    num_rows: int
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    removable: np.ndarray


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """Evaluation rows whose prompt is in the training data, exactly or (not counted there) nearly."""

    num_train: int
    num_eval: int
    exact: int
    near: int
    findings: tuple[Finding, ...]


# An example before its rows are named: kind, row numbers in file order, similarity.
_Example = tuple[str, tuple[int, ...], float]


def scan_duplicates(
    preferences: Iterable[Preference], *, near: bool = True, max_examples: int = 5, memory_mb: int = 512
) -> DuplicateReport:
    """Finds rows that repeat or contradict others, and rows whose two answers are (nearly) equal.

    Exact kinds go by a 128-bit hash of prompt, tools, answers and label. Near rows have the same number of
    messages with the same roles, and in every message an edit similarity of 0.9 at least to the other row's,
    after `normalise`; a group is what such pairs connect. Nearly contradictory rows are contradictory after
    `normalise` and not before. Without `near` the near kinds stay 0.

    preferences: a list, or what can be passed over several times. memory_mb holds keys and signatures (60
    bytes a row, and as many of 256 bytes as there is room for; less room means more passes over the rows),
    not the preferences themselves. Raises TypeError for an iterator.
    """
    rows = PreferenceRows(preferences)
    found = _Keys(max_examples)
    for preference in rows:
        found.add(preference, near=near)
    num_rows = len(found.equal)
    equal = np.flatnonzero(np.frombuffer(found.equal, dtype=np.uint8))
    unequal = np.flatnonzero(np.frombuffer(found.equal, dtype=np.uint8) == 0)
    keys = found.exact_keys()[unequal]
    firsts = unequal[first_appearances(keys)] if len(unequal) else unequal
    duplicates = unequal[firsts != unequal]
    examples: list[_Example] = [("equal", (row,), 1.0) for row in equal[:max_examples].tolist()]
    repeated = zip(firsts[firsts != unequal].tolist(), duplicates.tolist(), strict=True)
    examples += [("duplicate", pair, 1.0) for pair, _ in zip(repeated, range(max_examples), strict=False)]
    opposed, contradictions = _contradictions(keys, unequal)
    examples += contradictions[:max_examples]
    near_rows, num_opposed = np.empty(0, dtype=np.int64), 0
    if near:
        distinct = unequal[firsts == unequal]
        near_rows, near_examples = _near_rows(rows, found, distinct, memory_mb)
        examples += near_examples[:max_examples]
        examples += found.near_equal_examples
        num_opposed, opposites = _near_contradictions(found, unequal, opposed)
        examples += opposites[:max_examples]
    counts = (
        *(len(equal), len(duplicates), int(opposed.sum())),
        *(len(near_rows), found.num_near_equal, num_opposed),
    )
    return DuplicateReport(
        num_rows,
        dict(zip(KINDS, counts, strict=True)),
        _named(rows, examples),
        np.sort(np.concatenate([duplicates, near_rows])),
    )


def prompt_overlap(
    train: Iterable[Preference],
    evaluation: Iterable[Preference],
    *,
    near: bool = True,
    max_examples: int = 5,
) -> OverlapReport:
    """Finds evaluation rows whose prompt is (nearly) that of a training row; nearness as in scan_duplicates.

    Both are lists, or what can be passed over several times. Raises TypeError for an iterator.
    """
    rows = PreferenceRows(train, evaluation)
    exact, keys = bytearray(), _Keys(max_examples)
    for preference in rows:
        exact += asked_digest(preference)
        if near:
            keys.add_texts((asked_texts(preference),))
    num_train, num_eval = rows.sizes
    partners = _partners(exact, num_train)
    is_exact = partners >= 0
    examples: list[_Example] = [
        ("overlap", (num_train + place, int(partners[place])), 1.0)
        for place in np.flatnonzero(is_exact)[:max_examples].tolist()
    ]
    num_near = 0
    if near and num_train and num_eval:
        near_examples = _near_overlap(rows, keys, num_train, is_exact)
        num_near = len(near_examples)
        examples = sorted(examples + near_examples, key=lambda example: example[1])
    return OverlapReport(
        num_train, num_eval, int(is_exact.sum()), num_near, _named(rows, examples[:max_examples])
    )


@dataclass(slots=True)
class _Keys:
    """What a pass keeps of each row; flat, so that a million rows stay small."""

    max_examples: int
    num_fields: int = 0
    exact: bytearray = field(default_factory=bytearray)
    equal: bytearray = field(default_factory=bytearray)
    texts: bytearray = field(default_factory=bytearray)
    lengths: array = field(default_factory=lambda: array("i"))
    comparable: bytearray = field(default_factory=bytearray)
    num_near_equal: int = 0
    near_equal_examples: list[_Example] = field(default_factory=list)

    def add(self, preference: Preference, *, near: bool) -> None:
        """Keeps the keys of a row; asks how near its answers are to each other."""
        is_equal = has_equal_answers(preference)
        self.exact += preference_digest(preference)
        self.equal.append(is_equal)
        if near:
            fields = field_texts(preference)
            # Answers that differ in case or vowel signs alone are compared as they are written.
            allowed = len(fields) == 2 or fields[1] != fields[2]
            self.add_texts(fields, desirable=preference.desirable, allowed=allowed)
            if len(fields) == 3 and not is_equal:
                self._judge_answers(preference)

    def add_texts(
        self, fields: tuple[Texts, ...], *, desirable: bool | None = None, allowed: bool = True
    ) -> None:
        """Keeps what the near search needs of a row."""
        self.num_fields = self.num_fields or len(fields)
        lengths = count_characters(fields)
        self.texts += texts_digest(fields, desirable=desirable)
        self.lengths.extend(lengths)
        self.comparable.append(1 + (max(lengths) <= MAX_COMPARED_CHARACTERS) if allowed else 0)

    def _judge_answers(self, preference: Preference) -> None:
        similarity = answer_similarity(preference, LEAST_SIMILARITY)
        if similarity > LEAST_SIMILARITY:
            self.num_near_equal += 1
            if len(self.near_equal_examples) < self.max_examples:
                row = len(self.equal) - 1
                self.near_equal_examples.append(("near_equal", (row,), similarity))

    def exact_keys(self) -> np.ndarray:
        """uint64 [rows, 2]."""
        return np.frombuffer(self.exact, dtype="<u8").reshape(-1, 2)

    def text_keys(self) -> np.ndarray:
        """uint64 [rows, 2]."""
        return np.frombuffer(self.texts, dtype="<u8").reshape(-1, 2)

    def search(
        self,
        rows: PreferenceRows,
        numbers: np.ndarray,
        fields: Callable[[Preference], tuple[Texts, ...]],
        opposite: Callable[[tuple[Texts, ...]], tuple[Texts, ...] | None],
    ) -> Search:
        """A search among some of the rows."""
        lengths = np.frombuffer(self.lengths, dtype=np.int32).reshape(-1, self.num_fields)[numbers]
        tie_keys = self.text_keys()[numbers, 0].astype(np.uint32)
        return Search(rows, numbers, lengths, tie_keys, fields, opposite)


def _contradictions(
    keys: np.ndarray, numbers: np.ndarray, shown: np.ndarray | None = None
) -> tuple[np.ndarray, list[_Example]]:
    """Which rows have one that says the opposite, and the first that does for each that is shown.

    shown: bool; None: of equal rows the first.
    """
    if not len(keys):
        return np.zeros(0, dtype=bool), []
    senses = (keys[:, 0] & np.uint64(1)).astype(np.int64)
    groups = first_appearances(keys & ~_OPPOSITE)
    firsts = np.full((2, len(keys)), len(keys))
    np.minimum.at(firsts, (senses, groups), np.arange(len(keys)))
    others = firsts[1 - senses, groups]
    concerned = others < len(keys)
    if shown is None:
        shown = firsts[senses, groups] == np.arange(len(keys))
    rows = np.flatnonzero(concerned & shown)
    pairs = zip(numbers[rows].tolist(), numbers[others[rows]].tolist(), strict=True)
    examples = dict.fromkeys(("contradictory", (min(pair), max(pair)), 1.0) for pair in pairs)
    return concerned, list(examples)


def _near_contradictions(
    found: _Keys, numbers: np.ndarray, opposed: np.ndarray
) -> tuple[int, list[_Example]]:
    """How many rows contradict another after `normalise` alone; opposed: of these numbers, those that do so
    as they are.
    """
    is_compared = np.frombuffer(found.comparable, dtype=np.uint8)[numbers] > 0
    numbers, opposed = numbers[is_compared], opposed[is_compared]
    concerned, examples = _contradictions(found.text_keys()[numbers], numbers, ~opposed)
    kind = "near_contradictory"
    return int((concerned & ~opposed).sum()), [(kind, *what) for _, *what in examples]


def _near_rows(
    rows: PreferenceRows, keys: _Keys, distinct: np.ndarray, memory_mb: int
) -> tuple[np.ndarray, list[_Example]]:
    """Rows that are near to an earlier one of their group, and an example for each."""
    state = np.frombuffer(keys.comparable, dtype=np.uint8)
    numbers = distinct[state[distinct] > 0]
    if len(numbers) < 2:
        return np.empty(0, dtype=np.int64), []
    # Rows with the same normalised texts stand for one another.
    same = first_appearances(keys.text_keys()[numbers])
    is_first = same == np.arange(len(numbers))
    places = np.flatnonzero(is_first & (state[numbers] > 1))
    groups = Groups(len(places))
    search = keys.search(rows, numbers[places], field_texts, _turned)
    used = 2 * (len(keys.exact) + len(keys.texts) + 4 * len(keys.lengths))
    search.run(groups, max(memory_mb * _MEGABYTE - used - _WORKING_BYTES, memory_mb * _MEGABYTE // 4))
    leaders = np.arange(len(numbers))
    leaders[places] = places[groups.firsts()]
    leaders = leaders[same]
    near = leaders != np.arange(len(numbers))
    partners = {}
    for first, second, similarity in groups.pairs:
        for place, other in ((places[first], places[second]), (places[second], places[first])):
            partners.setdefault(int(place), (int(other), similarity))
    examples = []
    for place in np.flatnonzero(near).tolist():
        other, similarity = partners[place] if is_first[place] else (int(same[place]), 1.0)
        pair = sorted((int(numbers[place]), int(numbers[other])))
        examples.append(("near_duplicate", tuple(pair), similarity))
    return numbers[near], examples


def _turned(fields: tuple[Texts, ...]) -> tuple[Texts, ...] | None:
    """The pair that says the opposite of a pair."""
    return (fields[0], fields[2], fields[1]) if len(fields) == 3 else None


def _partners(digests: bytearray, num_train: int) -> np.ndarray:
    """For each evaluation row the first training row with the same key, -1 where there is none."""
    keys = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    firsts = first_appearances(keys)[num_train:] if len(keys) else np.empty(0, dtype=np.int64)
    return np.where(firsts < num_train, firsts, -1)


def _near_overlap(rows: PreferenceRows, keys: _Keys, num_train: int, is_exact: np.ndarray) -> list[_Example]:
    """For each evaluation row without its very prompt in the training data, one that is near."""
    firsts = first_appearances(keys.text_keys())
    evaluation = num_train + np.flatnonzero(~is_exact)
    partner = {row: (int(firsts[row]), 1.0) for row in evaluation.tolist() if firsts[row] < num_train}
    is_first = firsts == np.arange(len(firsts))
    is_first &= np.frombuffer(keys.comparable, dtype=np.uint8) > 1
    # Prompts of exact rows stand for others of the evaluation that are written in another way.
    numbers = np.flatnonzero(is_first)
    matches = Matches(len(numbers), int(np.searchsorted(numbers, num_train)))
    search = keys.search(rows, numbers, lambda row: (asked_texts(row),), no_opposite)
    search.run(matches, _OVERLAP_BYTES)
    found = {int(numbers[b]): (int(numbers[a]), similarity) for a, b, similarity in matches.pairs}
    for row in evaluation.tolist():
        if row not in partner and int(firsts[row]) in found:
            partner[row] = found[int(firsts[row])]
    return [("overlap", (row, other), similarity) for row, (other, similarity) in partner.items()]


def _named(rows: PreferenceRows, examples: list[_Example]) -> tuple[Finding, ...]:
    numbers = np.unique(np.array([row for _, pair, _ in examples for row in pair], dtype=np.int64))
    origins = {row: preference.origin for row, preference in rows.fetch(numbers)}
    return tuple(
        Finding(kind, tuple(origins[row] for row in pair), float(similarity))
        for kind, pair, similarity in examples
    )

"""Pairs of rows whose texts are nearly equal, among very many rows: band keys suggest them, texts decide.

Band keys are sorted one band at a time; texts are read again for what the bands suggest alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ds_align.data.minhash import MINIMA, NUM_BANDS, band_keys
from ds_align.data.schemas import Preference
from ds_align.data.text_keys import Texts, fields_similarity, num_characters

LEAST_SIMILARITY = 0.9
# Characters that are hashed together; their arrays take about 60 bytes each.
_BATCH_CHARACTERS = 2**19
_BATCH_ROWS = 2**14
# Characters of the texts that are compared together; they are held as strings.
_READ_CHARACTERS = 2**24
# Suggested pairs that wait for their texts, and refused ones that are remembered: 8 bytes each.
_MAX_WAITING = 2**21
# All pairs of a run of equal keys are suggested up to this size; a longer one is mostly chance (a phrase that
# a whole data set shares), and there each row meets its next ones in an order that changes with the band.
_FULL_RUN = 32
_NEXT_ROWS = 8


class PreferenceRows:
    """Preferences that are passed over several times; the second source's rows follow those of the first.

    A source is a sequence, or anything that begins anew each time it is iterated: what has no [] is passed
    over again for each block of texts that is needed. Raises TypeError for an iterator.
    """

    def __init__(self, *sources: Iterable[Preference]) -> None:
        for source in sources:
            if isinstance(source, Iterator):
                raise TypeError(
                    f"preferences are a {type(source).__name__}, which can be passed over once; give a list "
                    "or an object whose __iter__ begins anew"
                )
        self._sources = sources
        self.sizes: list[int] = []

    def __iter__(self) -> Iterator[Preference]:
        """A pass over all rows; a whole one sets `sizes`, the number of rows of each source."""
        sizes = []
        for source in self._sources:
            sizes.append(0)
            for preference in source:
                sizes[-1] += 1
                yield preference
        self.sizes = sizes

    def fetch(self, numbers: np.ndarray) -> Iterator[tuple[int, Preference]]:
        """The rows with these numbers (sorted, distinct), each with its number; after a whole pass."""
        start = 0
        for source, size in zip(self._sources, self.sizes, strict=True):
            wanted = numbers[(numbers >= start) & (numbers < start + size)]
            if hasattr(source, "__getitem__"):
                for number in wanted.tolist():
                    yield number, source[number - start]
            elif len(wanted):
                chosen = set(wanted.tolist())
                for number, preference in enumerate(source, start):
                    if number in chosen:
                        yield number, preference
            start += size


class Judge(Protocol):
    """Takes what the texts decided, and knows which pairs need no texts any more."""

    def may_ask(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs (places, first < second) may say something new, told quickly."""

    def must_ask(self, first: int, second: int) -> bool:
        """Whether a pair still says something new."""

    def accept(self, first: int, second: int, similarity: float) -> None:
        """Takes a pair whose texts are nearly equal."""


@dataclass(frozen=True, slots=True)
class Search:
    """Which rows are compared, and by what.

    numbers: sorted row numbers; place p below stands for row numbers[p]. lengths int32 [p, fields]:
    characters. tie_keys uint32 [p]: a hash of the content, so that no choice depends on the rows' order.
    fields: the texts of a row. opposite: the fields of a row that would say the contrary, or None.
    """

    rows: PreferenceRows
    numbers: np.ndarray
    lengths: np.ndarray
    tie_keys: np.ndarray
    fields: Callable[[Preference], tuple[Texts, ...]]
    opposite: Callable[[tuple[Texts, ...]], tuple[Texts, ...] | None]

    def run(self, judge: Judge, signature_bytes: int) -> None:
        """Gives the judge every pair that is found; signature_bytes: what band keys may take at a time."""
        num_places = len(self.numbers)
        at_once = max(1, min(NUM_BANDS, signature_bytes // max(1, 4 * num_places)))
        verifier = _Verifier(self, judge)
        for start in range(0, NUM_BANDS, at_once) if num_places > 1 else ():
            bands = range(start, min(start + at_once, NUM_BANDS))
            keys = self._signatures(bands)
            for row, band in zip(keys, bands, strict=True):
                for first, second in _same_keys(row, self.tie_keys, band):
                    verifier.suggest(first, second)
        verifier.finish()

    def _signatures(self, bands: range) -> np.ndarray:
        """uint32 [bands, places]."""
        keys = np.empty((len(bands), len(self.numbers)), dtype=np.uint32)
        wanted = iter(self.numbers.tolist())
        number, place = next(wanted), 0
        batch: list[list[str]] = [[] for _ in MINIMA[self.lengths.shape[1]]]
        waiting = 0
        for row, preference in enumerate(self.rows):
            if row != number:
                continue
            for column, texts in zip(batch, self.fields(preference), strict=True):
                column.append(" ".join(texts[1:]))
                waiting += len(column[-1])
            number = next(wanted, -1)
            if waiting >= _BATCH_CHARACTERS or len(batch[0]) == _BATCH_ROWS or number < 0:
                keys[:, place : place + len(batch[0])] = band_keys(batch, bands)
                place, waiting = place + len(batch[0]), 0
                batch = [[] for _ in batch]
        return keys


def _same_keys(keys: np.ndarray, tie_keys: np.ndarray, band: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (first, second) with the same key, step by step apart in the order of the keys."""
    order = np.argsort(keys)
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    in_run = np.zeros(len(keys), dtype=bool)
    in_run[1:] |= same
    in_run[:-1] |= same
    order, ordered = order[in_run], ordered[in_run]
    if not len(order):
        return
    ties = tie_keys[order] * np.uint32(2 * band + 1) + np.uint32(band)
    order = order[np.argsort(ordered.astype(np.uint64) << np.uint64(32) | ties)]
    starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.flatnonzero(starts), append=len(starts))
    runs = np.repeat(np.arange(len(sizes)), sizes)
    reach = np.repeat(np.where(sizes <= _FULL_RUN, _FULL_RUN, _NEXT_ROWS), sizes)
    for step in range(1, _FULL_RUN):
        chosen = np.flatnonzero((runs[:-step] == runs[step:]) & (reach[:-step] >= step))
        if not len(chosen):
            return
        left, right = order[chosen], order[chosen + step]
        yield np.minimum(left, right), np.maximum(left, right)


class _Verifier:
    """Collects suggested pairs and reads their texts, many at a time."""

    def __init__(self, search: Search, judge: Judge) -> None:
        self._search = search
        self._judge = judge
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._refused = np.empty(0, dtype=np.int64)

    def suggest(self, first: np.ndarray, second: np.ndarray) -> None:
        """Takes pairs of places; an edit distance is at least the difference of the lengths."""
        lengths = self._search.lengths
        small, large = (
            np.minimum(lengths[first], lengths[second]),
            np.maximum(lengths[first], lengths[second]),
        )
        alike = (small >= LEAST_SIMILARITY * large - 1e-6).all(axis=1)
        alike &= self._judge.may_ask(first, second)
        self._waiting.append(first[alike] * len(self._search.numbers) + second[alike])
        self._num_waiting += len(self._waiting[-1])
        if self._num_waiting >= _MAX_WAITING:
            self.finish()

    def finish(self) -> None:
        """Decides all pairs that wait."""
        if not self._num_waiting:
            return
        pairs = np.unique(np.concatenate(self._waiting))
        pairs = pairs[~np.isin(pairs, self._refused, assume_unique=True)]
        self._waiting, self._num_waiting = [], 0
        first, second = np.divmod(pairs, len(self._search.numbers))
        sizes = (self._search.lengths[first].sum(axis=1) + self._search.lengths[second].sum(axis=1)).cumsum()
        blocks = np.searchsorted(sizes, np.arange(_READ_CHARACTERS, sizes[-1:].sum(), _READ_CHARACTERS))
        refused = [
            part[~self._decide(*np.divmod(part, len(self._search.numbers)))]
            for part in np.split(pairs, blocks)
            if len(part)
        ]
        # Beyond this size a pair may be read twice, which costs time alone.
        self._refused = np.concatenate([*refused, self._refused])[:_MAX_WAITING]

    def _decide(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether each pair is near."""
        search, judge = self._search, self._judge
        numbers = search.numbers[np.unique(np.concatenate([first, second]))]
        texts = {number: search.fields(preference) for number, preference in search.rows.fetch(numbers)}
        near = np.zeros(len(first), dtype=bool)
        for place, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            if not judge.must_ask(one, other):
                continue
            left, right = texts[int(search.numbers[one])], texts[int(search.numbers[other])]
            similarity = fields_similarity(left, right, LEAST_SIMILARITY)
            turned = search.opposite(right) if similarity else None
            if similarity and (turned is None or fields_similarity(left, turned, similarity) == 0.0):
                near[place] = True
                judge.accept(one, other, similarity)
        return near


class Groups:
    """A judge that joins near rows to groups; a pair within one group says nothing new."""

    def __init__(self, num_places: int) -> None:
        self._parents = np.arange(num_places)
        self.pairs: list[tuple[int, int, float]] = []

    def may_ask(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs are not known to be of one group."""
        return self._parents[first] != self._parents[second]

    def must_ask(self, first: int, second: int) -> bool:
        """Whether a pair is of two groups."""
        return self._root(first) != self._root(second)

    def accept(self, first: int, second: int, similarity: float) -> None:
        """Joins the groups of both places."""
        low, high = sorted((self._root(first), self._root(second)))
        self._parents[high] = low
        self.pairs.append((first, second, similarity))

    def firsts(self) -> np.ndarray:
        """The first place of the group of each place."""
        while True:
            upper = self._parents[self._parents]
            if np.array_equal(upper, self._parents):
                return self._parents
            self._parents = upper

    def _root(self, place: int) -> int:
        parents = self._parents
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = int(parents[place])
        return place


class Matches:
    """A judge of pairs across two sources: which places from `start` on are near to one before it."""

    def __init__(self, num_places: int, start: int) -> None:
        self._start = start
        self._matched = np.zeros(num_places, dtype=bool)
        self.pairs: list[tuple[int, int, float]] = []

    def may_ask(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs lie across the border and have a second place without a partner."""
        return (first < self._start) & (second >= self._start) & ~self._matched[second]

    def must_ask(self, first: int, second: int) -> bool:  # noqa: ARG002 - the protocol's
        """Whether the second place has no partner yet."""
        return not self._matched[second]

    def accept(self, first: int, second: int, similarity: float) -> None:
        """Notes the partner."""
        self._matched[second] = True
        self.pairs.append((first, second, similarity))


def count_characters(fields: Iterable[Texts]) -> list[int]:
    """What `lengths` of a Search holds for a row."""
    return [num_characters(texts) for texts in fields]


def no_opposite(_: Any) -> None:
    """For rows that cannot contradict."""

"""Rows of a source that repeat others are left out before they are tokenized."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_align.data.duplicates import DuplicateReport, scan_duplicates
from ds_align.data.ranked import PairRules
from ds_align.data.readers import RecordSet
from ds_align.data.rows import BadRow, Record
from ds_align.data.schemas import Columns, Preference, RowLayout, parse_row
from ds_align.data.subset import pick_rows

Deduplicate = Literal["none", "exact", "near"]


class ParsedRecords:
    """The preferences of a source that can be read, in file order; anew at each pass, by number after one."""

    def __init__(
        self, records: RecordSet, layout: RowLayout, columns: Columns, rules: PairRules | None = None
    ) -> None:
        self._records = records
        self._layout = layout
        self._columns = columns
        self._rules = rules
        self._places: array | None = None

    def __iter__(self) -> Iterator[Preference]:
        places = array("q")
        for place, record in enumerate(self._records.rows()):
            preference = self._parse(record)
            if preference is not None:
                places.append(place)
                yield preference
        self._places = places

    def __getitem__(self, number: int) -> Preference:
        """The preference with this number among those that can be read."""
        place = self.places[number]
        preference = self._parse(next(iter(self._records.part(place, place + 1))))
        assert preference is not None
        return preference

    @property
    def places(self) -> array:
        """Where in the source each preference stands; known after a whole pass."""
        assert self._places is not None, "nothing was read yet"
        return self._places

    def _parse(self, record: Record | BadRow) -> Preference | None:
        parsed = record
        if isinstance(record, Record):
            parsed = parse_row(record, self._layout, self._columns, self._rules)
        return parsed if isinstance(parsed, Preference) else None


class JoinedPreferences:
    """Preferences of several sources, one behind the other; by number after a pass, as ParsedRecords."""

    def __init__(self, members: Sequence[ParsedRecords]) -> None:
        self._members = members

    def __iter__(self) -> Iterator[Preference]:
        for member in self._members:
            yield from member

    def __getitem__(self, number: int) -> Preference:
        """The preference with this number."""
        for member in self._members:
            if number < len(member.places):
                return member[number]
            number -= len(member.places)
        raise IndexError(number)


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """A source without its repeats, and what was found in it."""

    records: RecordSet
    report: DuplicateReport

    @property
    def counts(self) -> dict[str, int]:
        """What a data set's counts say of it."""
        found = self.report.counts
        return {
            "duplicates_removed": found["duplicate"],
            "near_duplicates_removed": found["near_duplicate"],
            "contradictory_rows_found": found["contradictory"] + found["near_contradictory"],
        }

    @property
    def contradictions(self) -> list[tuple[str, ...]]:
        """Origins of the first rows that contradict each other."""
        kinds = ("contradictory", "near_contradictory")
        return [found.origins for found in self.report.findings if found.kind in kinds]


def without_duplicates(
    records: RecordSet,
    layout: RowLayout,
    columns: Columns,
    rules: PairRules,
    deduplicate: Literal["exact", "near"],
) -> Deduplicated:
    """Leaves out all but the first of each group of (nearly) equal rows; rows that cannot be read stay."""
    preferences = ParsedRecords(records, layout, columns, rules)
    report = scan_duplicates(preferences, near=deduplicate == "near")
    kept = np.ones(records.num_rows, dtype=bool)
    kept[np.asarray(preferences.places, dtype=np.int64)[report.removable]] = False
    return Deduplicated(pick_rows(records, np.flatnonzero(kept)), report)

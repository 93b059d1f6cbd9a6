"""Rows of a source that are chosen before any of them is tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ds_align.data.readers import RecordSet
from ds_align.data.rows import BadRow, Record, Rows

# Rows that lie closer together than this are read in one piece, with what is between them.
_MAX_GAP = 16


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows in file order, what was counted, sentences for the user, and the whole finding as JSON values."""

    records: RecordSet
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    finding: dict[str, Any] = field(default_factory=dict)


class Subset(Protocol):
    """A choice of rows. key: JSON values of all that the choice depends on beside the rows themselves."""

    key: Any

    def choose(self, records: RecordSet, is_usable: Callable[[Record], bool]) -> Chosen:
        """The chosen rows, and every row that is not usable, so that bad rows are counted as without a
        choice. Raises DataError.
        """


class PickedRows:
    """Some rows of other rows; picks: their numbers, ascending."""

    def __init__(self, pieces: list[tuple[Rows, list[int]]]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return sum(len(picks) for _, picks in self._pieces)

    def __iter__(self) -> Iterator[Record | BadRow]:
        for rows, picks in self._pieces:
            wanted = set(picks)
            yield from (row for number, row in enumerate(rows) if number in wanted)

    def part(self, start: int, stop: int) -> PickedRows:
        """The picked rows from start to stop."""
        places = [(rows, pick) for rows, picks in self._pieces for pick in picks][start:stop]
        return PickedRows([(rows.part(pick, pick + 1), [0]) for rows, pick in places])


def pick_rows(records: RecordSet, numbers: np.ndarray) -> RecordSet:
    """The rows with these numbers (ascending, none twice), with their origins."""

    def part(start: int, stop: int) -> PickedRows:
        wanted = np.asarray(numbers[start:stop])
        if not len(wanted):
            return PickedRows([])
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > _MAX_GAP) + 1)
        return PickedRows(
            [(records.part(int(run[0]), int(run[-1]) + 1), (run - run[0]).tolist()) for run in runs]
        )

    return RecordSet(records.name, len(numbers), part)

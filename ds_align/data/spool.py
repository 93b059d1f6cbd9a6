"""Chunks of tokens gathered into the arrays of a whole data set, in memory or on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ds_align.data.chunks import COUNTED, EncodedChunk
from ds_align.data.rows import BadRow
from ds_align.data.tables import Tables, TokenTable, first_appearances, mismatched_rows

SHOWN_BAD_ROWS = 5
_BLOCK_ROWS = 65536


class _GrowingArray:
    """One flat array that grows at its end: bytes in memory, or a file where `path` is given."""

    def __init__(self, dtype: str, path: Path | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._bytes = bytearray()
        self._path = path
        self._file = None if path is None else path.open("wb", buffering=2**20)

    def append(self, part: np.ndarray) -> None:
        content = np.ascontiguousarray(part, dtype=self._dtype).data.cast("B") if part.size else b""
        if self._file is None:
            self._bytes += content
        else:
            self._file.write(content)

    def finish(self) -> np.ndarray:
        """All that was appended, as a view of the memory or a read-only map of the file."""
        if self._file is None:
            return np.frombuffer(self._bytes, dtype=self._dtype)
        self.close()
        # An empty file cannot be mapped.
        if not self._path.stat().st_size:
            return np.zeros(0, dtype=self._dtype)
        return np.memmap(self._path, dtype=self._dtype, mode="r")

    def close(self) -> None:
        """Nothing more is appended."""
        if self._file is not None:
            self._file.close()


class Spool:
    """Takes the chunks of a data set in file order, then gives its tables.

    directory: where the tokens wait as files, so that memory holds about 50 bytes a row, and 200 while finish
    sorts; None keeps all in memory.
    """

    def __init__(self, inputs: str, max_length: int | None, directory: Path | None = None) -> None:
        self._directory = directory
        self._arrays: list[_GrowingArray] = []
        self._inputs = inputs
        self._max_length = max_length
        self._prompts, self._completions, self._kl = (
            self._growing(name) for name in ("prompts", "parts", "kl")
        )
        self._prompt_lengths, self._completion_lengths, self._kl_lengths = (
            _GrowingArray("<i4") for _ in range(3)
        )
        self._prompt_keys, self._preference_keys = _GrowingArray("<u8"), _GrowingArray("<u8")
        self._desirable, self._kl_rows = _GrowingArray("?"), _GrowingArray("<i8")
        self._row_prompts = self._growing("row_prompts", "<i8")
        self._row_completions = self._growing("row_completions", "<i8")
        self._num_prompts, self._num_completions = 0, 0
        self.num_preferences = 0
        self.forms: Counter[str] = Counter()
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self.num_bad = 0
        self.num_swallowed = 0
        self.shown_bad: list[BadRow] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self._arrays:
            array.close()

    def _growing(self, name: str, dtype: str = "<i4") -> _GrowingArray:
        path = None if self._directory is None else self._directory / f"{name}.spool"
        self._arrays.append(_GrowingArray(dtype, path))
        return self._arrays[-1]

    def add(self, chunk: EncodedChunk) -> None:
        """Appends a chunk behind the others."""
        self._prompts.append(chunk.prompts.values)
        self._prompt_lengths.append(chunk.prompts.lengths)
        self._completions.append(chunk.completions.values)
        self._completion_lengths.append(chunk.completions.lengths)
        self._kl.append(chunk.given_kl.values)
        self._kl_lengths.append(chunk.given_kl.lengths)
        self._kl_rows.append(chunk.kl_rows + self._num_completions)
        self._row_prompts.append(chunk.row_prompts + self._num_prompts)
        self._row_completions.append(chunk.row_completions + self._num_completions)
        self._num_prompts += len(chunk.prompts.lengths)
        self._num_completions += len(chunk.completions.lengths)
        self._desirable.append(chunk.desirable)
        self._prompt_keys.append(chunk.prompt_keys)
        self._preference_keys.append(chunk.preference_keys)
        # Counter's own sum leaves out what is 0.
        self.counts.update(chunk.counts)
        self.forms.update(chunk.forms)
        self.num_preferences += len(chunk.row_prompts)
        self.num_bad += sum(row.lines for row in chunk.bad)
        self.num_swallowed += sum(row.lines - 1 for row in chunk.bad)
        self.shown_bad += chunk.bad[: SHOWN_BAD_ROWS - len(self.shown_bad)]

    def finish(self) -> Tables:
        """Stores equal prompts once and pairs KTO's rows; counts what only all rows together show."""
        self._count_repeats()
        firsts = first_appearances(self._prompt_keys.finish().reshape(-1, 2))
        is_first = firsts == np.arange(len(firsts))
        prompts = self._distinct_prompts(is_first)
        prompt_index = (np.cumsum(is_first) - 1)[firsts][self._row_prompts.finish()]
        if self._inputs == "pairs":
            completions = TokenTable.from_lengths(
                self._completions.finish(), self._completion_lengths.finish()
            )
            index = self._row_completions.finish().reshape(-1, 2)
            # Each is used at least once, in order of first use: as many as there are means row by row.
            is_row_by_row = index.size == self._num_completions
            return Tables(
                prompts, prompt_index, completions, completion_index=None if is_row_by_row else index
            )
        kl_index = mismatched_rows(prompt_index)
        kl_rows = self._kl_rows.finish()
        kl_index[kl_rows] = self._num_completions + np.arange(len(kl_rows))
        self._append_kl()
        self.counts["rows_without_kl_completion"] += int((kl_index < 0).sum())
        completions = TokenTable.from_lengths(self._completions.finish(), self._completion_lengths.finish())
        return Tables(
            prompts, prompt_index, completions, self._desirable.finish(), kl_index, self._max_length
        )

    def _count_repeats(self) -> None:
        """Count a preference met before, and one that says the opposite of an earlier one; both stay."""
        keys = self._preference_keys.finish().reshape(-1, 2)
        rows = np.arange(len(keys))
        opposite = keys ^ np.array([1, 0], dtype=keys.dtype)
        firsts = first_appearances(np.concatenate([keys, opposite]))
        self.counts["duplicate_rows"] += int((firsts[: len(keys)] < rows).sum())
        self.counts["contradictory_rows"] += int((firsts[len(keys) :] < rows).sum())

    def _distinct_prompts(self, is_first: np.ndarray) -> TokenTable:
        values, lengths = self._prompts.finish(), self._prompt_lengths.finish()
        if is_first.all():
            return TokenTable.from_lengths(values, lengths)
        kept, stop = self._growing("distinct"), 0
        for row in range(0, len(lengths), _BLOCK_ROWS):
            block = lengths[row : row + _BLOCK_ROWS]
            start, stop = stop, stop + int(block.sum(dtype=np.int64))
            kept.append(values[start:stop][np.repeat(is_first[row : row + _BLOCK_ROWS], block)])
        return TokenTable.from_lengths(kept.finish(), lengths[is_first])

    def _append_kl(self) -> None:
        values, lengths, stop = self._kl.finish(), self._kl_lengths.finish(), 0
        for row in range(0, len(lengths), _BLOCK_ROWS):
            start, stop = stop, stop + int(lengths[row : row + _BLOCK_ROWS].sum(dtype=np.int64))
            self._completions.append(values[start:stop])
        self._completion_lengths.append(lengths)
